"""SVG charts, and the page of a training run: one file without scripts, which loads nothing.

It runs no model and computes no loss; pages of comparisons are in tools/pairs_page.py.
"""

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from html import escape
from pathlib import Path

import torch

from parts.files import writing
from parts.guards import counted, visible
from parts.metrics import (
    accuracy_in_words,
    collapse,
    confidence_bins,
    decided,
    decided_by_subset,
    pairs_of,
    standard_error,
)

# Hues that the common kinds of colour blindness keep apart, (light, dark), in the order of the
# series; the last one is grey.
SERIES = [
    ("#00756a", "#4cc4b0"),
    ("#b0357d", "#f08cc4"),
    ("#2f6fb5", "#7db4ee"),
    ("#b85400", "#f0a050"),
    ("#6a6a70", "#9a9aa2"),
]
# Backgrounds that stand for a low, a middle and a high reward
SHADES = {"light": ("#f5ab5e", "#f0f0ec", "#86bbee"), "dark": ("#8a4610", "#2c2e33", "#17588f")}
LEVELS = 8  # of shading, on either side of the middle
INK = {
    "light": dict(ink="#1d1f24", soft="#5d6068", line="#dcdcd8", paper="#ffffff", page="#f7f7f5"),
    "dark": dict(ink="#e9eaee", soft="#a2a5ae", line="#3a3c43", paper="#1d1e22", page="#141518"),
}
STROKES = {
    "": "",
    "dashed": ' stroke-dasharray="6 4"',
    "dotted": ' stroke-dasharray="1.5 4"',
    "thin": ' stroke-opacity=".35"',
}
# Around a text that may lie on lines
HALO = ' class="halo" paint-order="stroke" stroke="#ffffff" stroke-width="4"'


def safe(value) -> str:
    """Return the text of a value as HTML that shows it and does nothing else."""
    return escape(visible(str(value)))


def finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


# --------------------------------------------------------------------------------------------------
# Charts


@dataclass
class Series:
    """A row of numbers in a chart."""

    y: list[float | None]  # None, NaN and infinities leave a gap
    x: list[float] | None = None  # None: 0, 1, 2, ...
    name: str = ""  # in the legend; "" is left out of it
    kind: str = "line"  # line, point, or bar
    color: int = 0  # an index of SERIES
    style: str = ""  # a key of STROKES, for a line
    width: float = 0.8  # in units of x, for a bar
    error: list[float] | None = None  # half the lengths of error bars
    notes: list[str] | None = None  # tooltips of the points or bars
    labels: list[str] | None = None  # texts above them

    def points(self) -> list[tuple[int, float, float, float]]:
        """List index, x, y and error of every finite number."""
        errors = self.error or [0] * len(self.y)
        rows = zip(itertools.count(), self.x or range(len(self.y)), self.y, errors)
        return [row for row in rows if finite(row[2])]


@dataclass
class Axes:
    """The box of a chart's data, in units of the view box, and the numbers at its borders."""

    left: float
    right: float
    top: float
    bottom: float
    x_low: float
    x_high: float
    y_low: float
    y_high: float

    def at_x(self, x: float) -> float:
        share = (x - self.x_low) / (self.x_high - self.x_low)
        return self.left + share * (self.right - self.left)

    def at_y(self, y: float) -> float:
        """Return the height of y, or of the border that y lies beyond."""
        share = (min(max(y, self.y_low), self.y_high) - self.y_low) / (self.y_high - self.y_low)
        return self.bottom - share * (self.bottom - self.top)


def chart(
    series: list[Series],
    title: str = "",
    x_label: str = "",
    y_label: str = "",
    categories: list[str] | None = None,
    vlines: list[tuple] = (),
    hlines: list[tuple] = (),
    x_range: tuple | None = None,
    y_range: tuple | None = None,
    size: tuple[int, int] = (420, 240),
) -> str:
    """Draw lines, points and bars as an <svg>.

    categories: names of the places 0, 1, ...; series of different colours stand side by side there.
    vlines, hlines: (position, text) of reference lines.
    x_range, y_range: (low, high); by default as wide as the data.
    size: of the view box, in units of which text is 12 high; the page decides how wide the chart
    is. Colours follow the page's style sheet where it has one (`standalone` brings it along), else
    they are those of a light page.
    """
    width, height = size
    legend = legend_places(series, width)
    top = 14 + 12 * len(vlines)
    if title:
        top += 18
    if legend:
        top += 18 * (legend[-1][2] + 1)
    if any(s.labels for s in series):
        top += 8
    bottom = height - (40 if x_label else 24)
    x_low, x_high = x_limits(series, categories, x_range)
    y_ticks = ticks(*(y_range or y_extent(series, hlines)))
    axes = Axes(50, width - 20, top, bottom, x_low, x_high, y_ticks[0], y_ticks[-1])
    out = [
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{safe(title or y_label)}" '
        'font-family="system-ui, sans-serif" font-size="12">'
    ]
    if title:
        out.append(text(8, 18, title, "start", "ink", ' font-weight="600"'))
    out += scales(axes, y_ticks, categories)
    if x_label:
        out.append(text((axes.left + axes.right) / 2, height - 6, x_label))
    if y_label:
        place = f"translate(12 {(axes.top + axes.bottom) / 2:.0f}) rotate(-90)"
        out.append(text(0, 0, y_label, more=f' transform="{place}"'))
    # Series of one colour, as a line and its points, share a place.
    colors = sorted({s.color for s in series}) if categories else [0]
    labels = []
    for s in series:
        slot = s.width / len(colors)
        shift = 0
        if categories:
            shift = (colors.index(s.color) - (len(colors) - 1) / 2) * slot
        out.append(draw(s, axes, shift, slot))
        labels += draw_labels(s, axes, shift)
    out += labels  # above the lines of all series
    out += reference_lines(axes, vlines, hlines)
    for s, x, row in legend:
        out.append(legend_entry(s, x, 16 + 18 * (row + bool(title))))
    return "".join(out) + "</svg>"


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """List about `count` round numbers, the first at or below `low`, the last at or above `high`.

    They are multiples of 1, 2 or 5 times a power of ten.
    """
    if high - low < 1e-9 * max(abs(low), abs(high), 1e-9):  # one value
        low, high = low - (abs(low) * 0.1 or 1), high + (abs(high) * 0.1 or 1)
    power = 10.0 ** math.floor(math.log10((high - low) / count))
    step = next(power * m for m in (1, 2, 5, 10) if (high - low) / (power * m) <= count)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [n * step for n in range(first, last + 1)]


def x_limits(series: list[Series], categories, x_range) -> tuple[float, float]:
    if categories:
        return -0.5, len(categories) - 0.5
    xs = []
    for s in series:
        reach = s.width / 2 if s.kind == "bar" else 0
        for _, x, _, _ in s.points():
            xs += [x - reach, x + reach]
    low, high = x_range or (min(xs, default=0), max(xs, default=1))
    return (low, high) if low < high else (low - 0.5, high + 0.5)


def y_extent(series: list[Series], hlines: list[tuple]) -> tuple[float, float]:
    ys = [y for y, _ in hlines]
    for s in series:
        if s.kind == "bar":
            ys.append(0)
        for _, _, y, error in s.points():
            ys += [y - error, y + error]
    return min(ys, default=0), max(ys, default=1)


def legend_places(series: list[Series], width: int) -> list[tuple[Series, float, int]]:
    """List series that have a name, each with the left end and the row of its legend entry."""
    places, x, row = [], 0, 0
    for s in [s for s in series if s.name]:
        room = 40 + 6.5 * len(s.name)
        if x and x + room > width - 16:
            x, row = 0, row + 1
        places.append((s, x, row))
        x += room
    return places


def text(x, y, words, anchor="middle", kind="soft", more="") -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" class="{kind}" '
        f'fill="{INK["light"][kind]}"{more}>{safe(words)}</text>'
    )


def line(x1, y1, x2, y2, kind, color, more="") -> str:
    return (
        f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" class="{kind}" '
        f'stroke="{color}"{more}/>'
    )


def scales(axes: Axes, y_ticks: list[float], categories: list[str] | None) -> list[str]:
    """Draw the grid, and the numbers or names at both axes."""
    out = []
    for y in y_ticks:
        at = axes.at_y(y)
        out.append(line(axes.left, at, axes.right, at, "grid", INK["light"]["line"]))
        out.append(text(axes.left - 6, at + 4, f"{round(y, 12):g}", "end"))
    names = dict(enumerate(categories or []))
    if not categories:
        x_ticks = ticks(axes.x_low, axes.x_high, 6)
        names = {x: f"{round(x, 12):g}" for x in x_ticks if axes.x_low <= x <= axes.x_high}
    return out + [text(axes.at_x(x), axes.bottom + 16, name) for x, name in names.items()]


def draw(s: Series, axes: Axes, shift: float, slot: float) -> str:
    """Draw a series, moved by `shift`; its bars are `slot` wide. Both are in units of x."""
    width = 1 if s.style == "thin" else 2
    out = [
        f'<g class="k{s.color}" color="{SERIES[s.color][0]}" fill="none" stroke="currentColor" '
        f'stroke-width="{width}" stroke-linecap="round" stroke-linejoin="round">'
    ]
    if s.kind == "line":
        path = ""
        points = zip(s.x or range(len(s.y)), s.y)
        for is_drawn, run in itertools.groupby(points, key=lambda point: finite(point[1])):
            if is_drawn:  # h0: a dot, where a run is one point
                run = [f"{axes.at_x(x + shift):.1f},{axes.at_y(y):.1f}" for x, y in run]
                path += f"M{'L'.join(run)}h0"
        out.append(f'<path d="{path}"{STROKES[s.style]}/>')
    else:
        for i, x, y, error in s.points():
            out += draw_mark(s, i, axes, x + shift, y, error, slot)
    return "".join(out) + "</g>"


def draw_mark(s: Series, i: int, axes: Axes, x, y, error, slot) -> Iterator[str]:
    """Draw point or bar i of a series, with its tooltip and error bar."""
    note = f"<title>{safe(s.notes[i])}</title>" if s.notes else ""
    at = axes.at_x(x)
    if s.kind == "bar":
        left, right = axes.at_x(x - slot / 2), axes.at_x(x + slot / 2)
        upper, lower = sorted((axes.at_y(y), axes.at_y(0)))
        yield (
            f'<rect x="{left:.1f}" y="{upper:.1f}" width="{max(right - left - 1, 0.5):.1f}" '
            f'height="{lower - upper:.1f}" fill="currentColor" fill-opacity=".45" '
            f'stroke="none">{note}</rect>'
        )
    else:
        yield (
            f'<circle cx="{at:.1f}" cy="{axes.at_y(y):.1f}" r="3.5" fill="currentColor" '
            f'stroke="none">{note}</circle>'
        )
    if error:
        ends = f"{axes.at_y(y - error):.1f}V{axes.at_y(y + error):.1f}"
        yield f'<path d="M{at:.1f},{ends}" stroke-width="1.5"/>'


def draw_labels(s: Series, axes: Axes, shift: float) -> Iterator[str]:
    """Draw the texts above the points or bars of a series, moved by `shift` as in `draw`."""
    for i, x, y, error in s.points():
        if s.labels:
            top = axes.at_y(y + error) - 5
            words = text(axes.at_x(x + shift), top, s.labels[i], more=' font-size="10"')
            yield f"<g{HALO}>{words}</g>"


def reference_lines(axes: Axes, vlines: list[tuple], hlines: list[tuple]) -> list[str]:
    """Draw lines across the data. Each text of a vertical line has a row: lines may be close."""
    out, texts = [], []
    color, dashes = INK["light"]["soft"], ' stroke-dasharray="3 3"'
    for i, (x, words) in enumerate(vlines):
        at, y = axes.at_x(x), axes.top - 12 * (len(vlines) - i) + 6
        out.append(line(at, y - 8, at, axes.bottom, "rule", color, dashes))
        if at > (axes.left + axes.right) / 2:
            words = text(at - 4, y, words, "end")
        else:
            words = text(at + 4, y, words, "start")
        texts.append(f"<g{HALO}>{words}</g>")
    for y, words in hlines:
        at = axes.at_y(y)
        out.append(line(axes.left, at, axes.right, at, "rule", color, dashes))
        texts.append(f"<g{HALO}>{text(axes.right, at - 5, words, 'end')}</g>")
    return out + texts


def legend_entry(s: Series, x: float, y: float) -> str:
    width = 2 if s.kind == "line" else 7
    more = f'{STROKES[s.style]} stroke-width="{width}"'
    key = line(8 + x, y, 26 + x, y, "key", "currentColor", more)
    name = text(31 + x, y + 4, s.name, "start", "ink")
    return f'<g class="k{s.color}" color="{SERIES[s.color][0]}">{key}</g>{name}'


def standalone(svg: str) -> str:
    """Turn a chart into the content of an .svg file, with a style of its own for light and dark."""
    style = f"<style>{style_of_charts()}svg{{background:var(--paper)}}</style>"
    svg = svg.replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1)
    return svg.replace(">", f">{style}", 1) + "\n"


# --------------------------------------------------------------------------------------------------
# Pages

STYLE = "\n" + Path(__file__).with_name("page.css").read_text(encoding="utf-8")


def style_of_charts() -> str:
    """Define the colours as custom properties, for light and dark, and use them in charts."""

    def properties(theme):
        names = dict(INK[theme])
        for i, pair in enumerate(SERIES):
            names[f"c{i}"] = pair[theme == "dark"]
        return ":root{" + "".join(f"--{name}:{color};" for name, color in names.items()) + "}"

    return (
        properties("light")
        + "@media (prefers-color-scheme:dark){"
        + properties("dark")
        + "}"
        + "".join(f".k{i}{{color:var(--c{i})}}" for i in range(len(SERIES)))
        + "text.ink{fill:var(--ink)}text.soft{fill:var(--soft)}line.grid{stroke:var(--line)}"
        "line.rule{stroke:var(--soft)}.halo{stroke:var(--paper)}"
    )


def style_of_shades() -> str:
    """Define backgrounds .s-8 (low) to .s8 (high). They are mixed here: older browsers cannot."""

    def shades(theme):
        low, middle, high = SHADES[theme]
        rules = ""
        for level in range(-LEVELS, LEVELS + 1):
            end = high if level > 0 else low
            color = "#"
            for i in (1, 3, 5):  # two hexadecimal digits each of red, green and blue
                a, b = int(middle[i : i + 2], 16), int(end[i : i + 2], 16)
                color += f"{round(a + (b - a) * (abs(level) / LEVELS)):02x}"
            rules += f".s{level}{{background:{color}}}"
        return rules

    return f"{shades('light')}@media (prefers-color-scheme:dark){{{shades('dark')}}}"


def write_page(path, title: str, body: str):
    """Write a page, whole or not at all: an earlier file stays until then."""
    # Should text from the data get through as markup, it could load nothing.
    policy = "default-src 'none'; style-src 'unsafe-inline'"
    page = (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{safe(title)}</title>"
        f"<style>{style_of_charts()}{STYLE}{style_of_shades()}</style></head>\n"
        f"<body><main>{body}</main></body></html>\n"
    )
    with writing(path) as out:
        out.write(page)


def facts(values: dict) -> str:
    """Write a row of large numbers with their names below."""
    cells = ""
    for name, value in values.items():
        cells += f'<div><b>{value}</b><span class="soft small">{name}</span></div>'
    return f'<div class="facts">{cells}</div>'


def table(head: list[str], body: list[list[str]], kind: str = "") -> str:
    """Write a table of cells that are HTML already. kind: its CSS class."""
    names = "".join(f"<th>{name}</th>" for name in head)
    rows = ""
    for cells in body:
        row = "".join(f"<td>{cell}</td>" for cell in cells)
        rows += f"<tr>{row}</tr>"
    return (
        f'<div class="scroll"><table class="{kind}"><thead><tr>{names}</tr></thead>'
        f"<tbody>{rows}</tbody></table></div>"
    )


# --------------------------------------------------------------------------------------------------
# The page of a run

NEAR_GUESSING = 0.6  # an accuracy below it is shown beside that of guessing
UNUSUAL = ("ties", "dropped", "truncated")  # metrics that are 0 in most runs
# How the page calls metrics that are not called what they are; see `metrics.summarize`.
METRICS = {
    "chosen_score": "mean score of the chosen",
    "rejected_score": "mean score of the rejected",
    "margin": "mean margin",
    "ece": "calibration error (ECE)",
    "ties": "share of ties",
    "dropped": "dropped as identical",
    "bayes_accuracy": "best possible accuracy",
    "probability_error": "error of the probability",
}


def thinned(x: list, y: list, limit: int = 1000) -> tuple[list, list]:
    """Keep at most `limit` finite points of a curve, and all of its spikes.

    Of every stretch the lowest and the highest point stay.
    """
    points = [(a, b) for a, b in zip(x, y) if finite(b)]
    if len(points) > limit:
        stretch = math.ceil(2 * len(points) / limit)
        kept = set()
        for i in range(0, len(points), stretch):
            part = points[i : i + stretch]
            kept |= {min(part, key=lambda p: p[1]), max(part, key=lambda p: p[1])}
        points = sorted(kept)
    return [a for a, _ in points], [b for _, b in points]


def curve(x: list, y: list, name: str = "", color: int = 0, style: str = "") -> Series:
    x, y = thinned(x, y)
    return Series(y, x, name, color=color, style=style)


def moving_mean(values: list[float | None], window: int) -> list[float]:
    """Compute the mean of the finite numbers among every `window` neighbours."""
    sums, counts = [0], [0]
    for value in values:
        is_finite = finite(value)
        sums.append(sums[-1] + (value if is_finite else 0))
        counts.append(counts[-1] + is_finite)
    ends = zip(sums, sums[window:], counts, counts[window:])
    return [(b - a) / max(m - n, 1) for a, b, n, m in ends]


def histogram(groups: dict[str, list[float]], title: str, x_label: str, vlines=()) -> str:
    """Draw the counts of each group in 40 common bins, without numbers that are not finite."""
    shown = {}
    for name, values in groups.items():
        kept = [value for value in values if finite(value)]
        shown[name] = torch.tensor(kept, dtype=torch.float64)
    values = torch.cat(list(shown.values()))
    low, high = (values.min().item(), values.max().item()) if len(values) else (0.0, 1.0)
    high = high if high > low else low + 1
    width = (high - low) / 40
    series = []
    x = [low + (i + 0.5) * width for i in range(40)]
    for color, (name, group) in enumerate(shown.items()):
        counts = torch.histc(group, 40, low, high).tolist()
        notes = [f"{at:.3g}: {counted(int(n), 'pair')}" for at, n in zip(x, counts)]
        name = name if len(shown) > 1 else ""
        series.append(Series(counts, x, name, "bar", color, width=width, notes=notes))
    return chart(series, title, x_label, "pairs", vlines=vlines)


def reliability(margins: torch.Tensor) -> str:
    """Draw the observed accuracy by confidence, in the bins of the calibration error."""
    confidence, bins = confidence_bins(margins)
    right = (margins > 0).double()
    middles, observed, errors, labels, notes = [], [], [], [], []
    for i in range(10):
        is_in = bins == i
        count = int(is_in.sum())
        if count == 0:
            continue
        accuracy = right[is_in].mean().item()
        middles.append(0.525 + 0.05 * i)
        observed.append(accuracy)
        errors.append(standard_error(accuracy, count))
        labels.append(str(count))
        notes.append(
            f"confidence {0.5 + 0.05 * i:.2f} to {0.55 + 0.05 * i:.2f}: "
            f"accuracy {accuracy_in_words(accuracy, count)}, "
            f"mean confidence {confidence[is_in].mean():.4f}"
        )
    name = "ranked right, with standard error and number of pairs"
    bars = Series(
        observed, middles, name, "bar", width=0.05, error=errors, notes=notes, labels=labels
    )
    calibrated = Series([0.5, 1.0], [0.5, 1.0], "calibrated", color=4, style="dashed")
    x_label = "confidence in the response that the model prefers"
    return chart(
        [bars, calibrated], "Reliability", x_label, "accuracy", x_range=(0.5, 1), y_range=(0, 1)
    )


def learned_and_true(margins: torch.Tensor, true_margins: torch.Tensor) -> str:
    """Draw the learned probabilities by the true ones, in 10 bins."""
    learned, true = torch.sigmoid(margins), torch.sigmoid(true_margins)
    bins = torch.bucketize(true, torch.linspace(0, 1, 11, dtype=torch.float64)[1:-1], right=True)
    x, y, spread, notes = [], [], [], []
    for i in bins.unique():
        is_in = bins == i
        x.append(true[is_in].mean().item())
        y.append(learned[is_in].mean().item())
        spread.append(learned[is_in].std(correction=0).item())
        count = counted(int(is_in.sum()), "pair")
        notes.append(f"true {x[-1]:.3f}, learned {y[-1]:.3f}, {count}")
    name = "mean in a bin, ± standard deviation"
    points = Series(y, x, name, "point", error=spread, notes=notes)
    perfect = Series([0, 1], [0, 1], "perfect", color=4, style="dashed")
    title = "Probability that the chosen response is better"
    return chart([perfect, points], title, "true", "learned", x_range=(0, 1), y_range=(0, 1))


def accuracy_chart(evals: list[dict], undecided: int) -> str:
    """Draw the accuracy of every evaluation with its standard error, on an axis from guessing to 1.

    undecided: the number of pairs of an evaluation that accuracy leaves out. The axis begins lower
    only where accuracies or their errors reach lower, so that noise never fills the chart.
    """
    x = [event["step"] for event in evals]
    values = [event["accuracy"] for event in evals]
    errors = []
    for event in evals:
        count = event.get("pairs", 0) - undecided
        is_known = finite(event["accuracy"]) and count > 0
        errors.append(standard_error(event["accuracy"], count) if is_known else 0.0)
    marks = []
    if evals and finite(evals[-1].get("bayes_accuracy")):
        marks.append((evals[-1]["bayes_accuracy"], "best possible (Bayes-optimal)"))
    if min(filter(finite, values), default=1) < NEAR_GUESSING:
        marks.append((0.5, "guessing"))
    points = Series(values, x, kind="point", color=1, error=errors)
    lowest = min([0.5, *(y - error for _, _, y, error in points.points())])
    return chart(
        [Series(values, x, color=1), points],
        "Accuracy in evaluation",
        "step, with standard errors",
        hlines=marks,
        y_range=(max(lowest, 0), 1),
    )


def run_charts(steps: list[dict], evals: list[dict], numbers: dict[str, list]) -> list[str]:
    """Draw the charts of a run from its events by kind, and from `numbers` as in `run_page`."""
    at = [event["step"] for event in steps]
    losses = [event["loss"] for event in steps]

    def of_steps(name, title):
        values = [event[name] for event in steps]
        return chart([curve(at, values, color=2)], title, "step", size=(420, 180))

    window = max(1, len(steps) // 50)
    curves = [curve(at, losses, "a step", style="thin" if window > 1 else "")]
    if window > 1:
        means = moving_mean(losses, window)
        curves.append(curve(at[window - 1 :], means, f"mean of {window} steps"))
    eval_losses, eval_steps = ([event[key] for event in evals] for key in ("loss", "step"))
    curves.append(Series(eval_losses, eval_steps, "evaluation", color=1))
    curves.append(Series(eval_losses, eval_steps, kind="point", color=1))
    margins, targets = pairs_of(numbers)
    preferred = decided(margins, targets)
    scores = {"chosen": numbers["chosen"], "rejected": numbers["rejected"]}
    zero = [(0, "ranked right from here on")]
    charts = [
        chart(curves, "Loss", "step"),
        accuracy_chart(evals, len(margins) - len(preferred)),
        histogram(scores, "End scores", "reward at the last token"),
        histogram(
            {"margin": preferred.tolist()}, "Margins", "end score of preferred minus other", zero
        ),
        reliability(preferred),
    ]
    if numbers["true_margin"]:
        true_margins = torch.tensor(numbers["true_margin"], dtype=torch.float64)
        charts.append(learned_and_true(margins, true_margins))
    charts.append(of_steps("lr", "Learning rate"))
    return [*charts, of_steps("grad_norm", "Gradient norm, before clipping")]


def flag_value(value) -> str:
    """Write the value of a flag in words: lists as they are typed, nothing in Python's notation."""
    if value is None:
        return "not given"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, list):
        is_of_numbers = all(isinstance(part, float) for part in value)
        return ("," if is_of_numbers else " ").join(map(flag_value, value))
    return str(value)


def duration(seconds: float) -> str:
    if seconds < 120:
        return counted(round(seconds), "second")
    return f"{seconds / 60:.1f} minutes"


def metric_rows(first: dict, last: dict, numbers: dict[str, list]) -> list[list[str]]:
    """List what two evaluations have found, in words: name, number of the first and of the last.

    numbers: as in `run_page`. Counts that are 0 in both are left out; each subset of the data has a
    row.
    """
    rows, count = [], len(decided(*pairs_of(numbers)))
    counts = decided_by_subset(numbers["subset"], numbers["target"])
    for name, value in last.items():
        if name in ("event", "step") or (value == 0 == first.get(name) and name in UNUSUAL):
            continue
        if name == "by":
            for subset, found in value.items():
                before = first.get("by", {}).get(subset, {})
                title, own = f"accuracy on {subset}", counts[subset]
                rows.append(
                    (title, metric(before, "accuracy", own), metric(found, "accuracy", own))
                )
        else:
            title = METRICS.get(name, name.replace("_", " "))
            rows.append((title, metric(first, name, count), metric(last, name, count)))
    return [[safe(title), before, after] for title, before, after in rows]


def number(value: float | None) -> str:
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.4f}" if finite(value) else "not finite"


def metric(event: dict, name: str, count: int) -> str:
    """Write a number of an evaluation; nothing where an older version did not compute it.

    count: the number of pairs that accuracies are a share of.
    """
    if name not in event:
        return ""
    is_undecided = event.get("accuracy", 0) is None
    if is_undecided and name in ("accuracy", "ece"):
        return "none: every target is 0.5"
    if name in ("accuracy", "bayes_accuracy"):
        return accuracy_in_words(event[name], count)
    return number(event[name])


def run_page(path, events: list[dict], flags: list[tuple[str, object]], numbers: dict[str, list]):
    """Write the page of a training run that has ended.

    events: the objects of its metrics.jsonl. flags: names and values, to be shown. numbers: the
    lists of `metrics.LISTS`, of the last evaluation.
    Margins and reliability are shown of pairs that `metrics.decided` selects.
    """
    steps = [event for event in events if event["event"] == "step"]
    evals = [event for event in events if event["event"] == "eval"]
    first, last = (evals[0], evals[-1]) if evals else ({}, {})
    count = len(decided(*pairs_of(numbers)))
    figures = {"eval accuracy": metric(last, "accuracy", count)}
    if finite(last.get("bayes_accuracy")):
        figures["best possible accuracy"] = metric(last, "bayes_accuracy", count)
    figures["eval loss"] = number(last.get("loss"))
    amount, _, noun = counted(len(steps), "step").partition(" ")
    figures[noun] = amount
    warning = collapse(numbers["scores"])
    if warning:
        warning = f'<p class="card"><b>This model has {warning}.</b></p>'
    charts = ""
    for svg in run_charts(steps, evals, numbers):
        charts += f'<div class="card">{svg}</div>'
    head = ["", f"step {first.get('step', '')}", f"step {last.get('step', '')}"]
    values = [[f"<code>--{safe(name)}</code>", safe(flag_value(value))] for name, value in flags]
    body = (
        "<h1>A training run</h1><p>A reward model learned from pairs of responses: in each pair, "
        "one response was chosen and the other rejected. Its accuracy is the share of held-out "
        "pairs in which it scores the chosen response higher. The loss also depends on how sure it "
        "is.</p>"
        f'{facts(figures)}{warning}<div class="cols">{charts}</div>'
        "<div class='cols' style='margin-top:20px'><div class='card'><h2>Evaluation</h2>"
        f"{table(head, metric_rows(first, last, numbers), 'names')}<p class='small soft'>"
        f"Training took {duration(sum(event['seconds'] for event in steps))}, for "
        f"{counted(sum(event['pairs'] for event in steps), 'pair')} and "
        f"{counted(sum(event['tokens'] for event in steps), 'token')}.</p></div>"
        f"<div class='card'><h2>Flags</h2>{table(['flag', 'value'], values, 'words')}</div></div>"
    )
    write_page(path, "A training run", body)
