"""Pages that teach: comparisons token by token, and a finished training run. Imported only when one is asked for.

    python rm.py CHECKPOINT FILE --html page.html     the comparisons in FILE: rewards of the tokens, and how the loss comes about
    python rm.py CHECKPOINT FILE --show               the same in the terminal
    run_page("out/report.html", ...)                  a training run: curves, scores, calibration
    chart([Series(...), ...]), standalone(svg)        the plots on these pages, and one as an .svg file

A page is one file without scripts that loads nothing. Losses are rm.py's: nothing here computes one.
"""

import functools
import itertools
import math
import os
import unicodedata
from dataclasses import dataclass
from html import escape
from pathlib import Path

import torch
from tqdm import tqdm

from data import load_comparisons, pad_rows, read_rows, shared_prefix, tokenize
from rm import divergent_region, pair_loss

# Hues that the common kinds of colour blindness keep apart: (light, dark). Of series, in their order; the last one is grey.
SERIES = [
    ("#00756a", "#4cc4b0"),
    ("#b0357d", "#f08cc4"),
    ("#2f6fb5", "#7db4ee"),
    ("#b85400", "#f0a050"),
    ("#6a6a70", "#9a9aa2"),
]
SHADES = {
    "light": ("#f5ab5e", "#f0f0ec", "#86bbee"),
    "dark": ("#8a4610", "#2c2e33", "#17588f"),
}  # rewards: low, middle, high
LEVELS = 8  # of shading, on either side of the middle
ANSI = (
    208,
    215,
    222,
    230,
    255,
    195,
    159,
    117,
    75,
)  # the same of 256 terminal colours, under black text
INK = {
    "light": dict(ink="#1d1f24", soft="#5d6068", line="#dcdcd8", paper="#ffffff", page="#f7f7f5"),
    "dark": dict(ink="#e9eaee", soft="#a2a5ae", line="#3a3c43", paper="#1d1e22", page="#141518"),
}

# ----------------------------------------------------------------------------------------------------------------------
# Charts


@dataclass
class Series:
    """What a chart draws. y: numbers; None and what is not finite leaves a gap. x: as many numbers, by default 0, 1, 2, ..."""

    y: list[float | None]
    x: list[float] | None = None
    name: str = ""  # in the legend; "": not there
    kind: str = "line"  # line, point, or bar
    color: int = 0  # of SERIES
    style: str = ""  # of a line: "", "dashed", "dotted" or "thin"
    width: float = 0.8  # of a bar, in units of x
    error: list[float] | None = None  # half the lengths of error bars
    notes: list[str] | None = None  # tooltips of the points or bars
    labels: list[str] | None = None  # texts above them


def finite(value) -> bool:
    return value is not None and math.isfinite(value)


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About `count` round numbers (1, 2 or 5 times a power of ten) that begin at or below `low` and end at or above `high`."""
    if high - low < 1e-9 * max(abs(low), abs(high), 1e-9):  # one value
        low, high = low - (abs(low) * 0.1 or 1), high + (abs(high) * 0.1 or 1)
    power = 10.0 ** math.floor(math.log10((high - low) / count))
    step = next(power * m for m in (1, 2, 5, 10) if (high - low) / (power * m) <= count)
    return [
        n * step for n in range(math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9) + 1)
    ]


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
    """Lines, points and bars over numbers, or over `categories` (x is then 0, 1, ... and colours stand side by side), as an <svg>.

    vlines, hlines: (position, text) of reference lines. x_range, y_range: (low, high); by default what the data needs.
    size: of the view box, in units of which text is 12 high; the page decides how wide the chart is. Colours follow the page's
    style sheet where it is there (`standalone` brings it along), else those for light pages.
    """
    width, height = size
    points = [
        [
            (j, x, y, e)
            for j, (x, y, e) in enumerate(
                zip(s.x or range(len(s.y)), s.y, s.error or [0] * len(s.y))
            )
            if finite(y)
        ]
        for s in series
    ]
    xs = [
        x + side * s.width / 2 * (s.kind == "bar")
        for s, some in zip(series, points)
        for _, x, _, _ in some
        for side in (-1, 1)
    ]
    ys = [y + side * e for some in points for _, _, y, e in some for side in (-1, 1)] + [
        y for y, _ in hlines
    ]
    ys += [0] * any(s.kind == "bar" for s in series)
    x_low, x_high = x_range or (min(xs, default=0), max(xs, default=1))
    if categories:
        x_low, x_high = -0.5, len(categories) - 0.5
    elif x_low == x_high:
        x_low, x_high = x_low - 0.5, x_high + 0.5
    y_ticks = ticks(*(y_range or (min(ys, default=0), max(ys, default=1))))
    y_low, y_high = y_ticks[0], y_ticks[-1]

    legend, place, row = [], 0, 0  # items that don't fit go on into a row of their own
    for s in (s for s in series if s.name):
        room = 40 + 6.5 * len(s.name)
        if place and place + room > width - 16:
            place, row = 0, row + 1
        legend.append((s, place, row))
        place += room
    left, right, bottom = 50, width - 20, height - (40 if x_label else 24)
    top = (
        14
        + 18 * bool(title)
        + (18 * (row + 1) if legend else 0)
        + 12 * len(vlines)
        + 8 * any(s.labels for s in series)
    )

    def at_x(x):
        return left + (x - x_low) / (x_high - x_low) * (right - left)

    def at_y(y):
        return bottom - (min(max(y, y_low), y_high) - y_low) / (y_high - y_low) * (bottom - top)

    def text(x, y, words, anchor="middle", kind="soft", more=""):
        color = INK["light"][kind]
        return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" class="{kind}" fill="{color}"{more}>{escape(visible(words))}</text>'

    def line(x1, y1, x2, y2, kind="grid", more=""):
        color = {"grid": INK["light"]["line"], "rule": INK["light"]["soft"], "key": "currentColor"}[
            kind
        ]
        return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" class="{kind}" stroke="{color}"{more}/>'

    strokes = {
        "dashed": ' stroke-dasharray="6 4"',
        "dotted": ' stroke-dasharray="1.5 4"',
        "thin": ' stroke-opacity=".35"',
    }
    dashed = ' stroke-dasharray="3 3"'
    out = [
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(visible(title or y_label))}" '
        'font-family="system-ui, sans-serif" font-size="12">'
    ]
    out += [text(8, 18, title, "start", "ink", ' font-weight="600"')] * bool(title)
    for y in y_ticks:
        out += [
            line(left, at_y(y), right, at_y(y)),
            text(left - 6, at_y(y) + 4, f"{round(y, 12):g}", "end"),
        ]
    named = (
        enumerate(categories)
        if categories
        else ((x, f"{round(x, 12):g}") for x in ticks(x_low, x_high, 6) if x_low <= x <= x_high)
    )
    out += [text(at_x(x), bottom + 16, name) for x, name in named]
    out += [text((left + right) / 2, height - 6, x_label)] * bool(x_label)
    out += [
        text(0, 0, y_label, more=f' transform="translate(12 {(top + bottom) / 2:.0f}) rotate(-90)"')
    ] * bool(y_label)
    slots = (
        sorted({s.color for s in series}) if categories else [0]
    )  # series of one colour, as a line and its points, share a place
    for s, some in zip(series, points):
        out.append(
            f'<g class="k{s.color}" color="{SERIES[s.color][0]}" fill="none" stroke="currentColor" '
            f'stroke-width="{1 if s.style == "thin" else 2}" '
            'stroke-linecap="round" stroke-linejoin="round">'
        )
        slot = s.width / len(slots)
        shift = (slots.index(s.color) - (len(slots) - 1) / 2) * slot if categories else 0
        if s.kind == "line":
            drawn = {x: y for _, x, y, _ in some}
            runs = itertools.groupby(s.x or range(len(s.y)), key=drawn.__contains__)
            paths = [
                "L".join(f"{at_x(x + shift):.1f},{at_y(drawn[x]):.1f}" for x in run)
                for is_drawn, run in runs
                if is_drawn
            ]
            drawing = "".join(f"M{path}h0" for path in paths)  # h0: a dot, where a run is one point
            out.append(f'<path d="{drawing}"{strokes.get(s.style, "")}/>')
        for j, x, y, e in some if s.kind != "line" else []:
            note = f"<title>{escape(visible(s.notes[j]))}</title>" if s.notes else ""
            if s.kind == "bar":
                x1, x2 = (at_x(x + shift + side * slot / 2) for side in (-1, 1))
                out.append(
                    f'<rect x="{x1:.1f}" y="{min(at_y(y), at_y(0)):.1f}" width="{max(x2 - x1 - 1, 0.5):.1f}" '
                    f'height="{abs(at_y(y) - at_y(0)):.1f}" fill="currentColor" fill-opacity=".45" stroke="none">{note}</rect>'
                )
            else:
                out.append(
                    f'<circle cx="{at_x(x + shift):.1f}" cy="{at_y(y):.1f}" r="3.5" fill="currentColor" stroke="none">{note}</circle>'
                )
            if e:
                out.append(
                    f'<path d="M{at_x(x + shift):.1f},{at_y(y - e):.1f}V{at_y(y + e):.1f}" stroke-width="1.5"/>'
                )
            if s.labels:
                out.append(
                    text(
                        at_x(x + shift),
                        at_y(y + e) - 5,
                        s.labels[j],
                        more=' stroke="none" font-size="10"',
                    )
                )
        out.append("</g>")
    halo = ' class="halo" paint-order="stroke" stroke="#ffffff" stroke-width="4"'
    rows = [
        top - 12 * (len(vlines) - i) + 6 for i in range(len(vlines))
    ]  # each text in one of its own: lines may be close
    out += [
        line(at_x(x), y - 8, at_x(x), bottom, "rule", dashed) for (x, _), y in zip(vlines, rows)
    ]
    for (x, words), y in zip(vlines, rows):
        side = -1 if at_x(x) > (left + right) / 2 else 1
        out.append(
            f"<g{halo}>{text(at_x(x) + 4 * side, y, words, 'start' if side == 1 else 'end')}</g>"
        )
    for y, words in hlines:
        out += [
            line(left, at_y(y), right, at_y(y), "rule", dashed),
            text(right, at_y(y) - 5, words, "end"),
        ]
    for s, x, row in legend:
        y = 16 + 18 * (row + bool(title))
        key = line(
            8 + x,
            y,
            26 + x,
            y,
            "key",
            f'{strokes.get(s.style, "")} stroke-width="{2 if s.kind == "line" else 7}"',
        )
        out.append(
            f'<g class="k{s.color}" color="{SERIES[s.color][0]}">{key}</g>{text(31 + x, y + 4, s.name, "start", "ink")}'
        )
    return "".join(out) + "</svg>"


def standalone(svg: str) -> str:
    """A chart as the content of an .svg file: with its own style, for light and dark."""
    style = f"<style>{style_of_charts()}svg{{background:var(--paper)}}</style>"
    return (
        svg.replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1).replace(
            ">", f">{style}", 1
        )
        + "\n"
    )


# ----------------------------------------------------------------------------------------------------------------------
# Comparisons, scored


@dataclass
class Pair:
    """What the loss of responses i and j of a row, of which i is the better one, consists of."""

    i: int
    j: int
    start: int  # the positions that the loss reads: start to stop - 1
    stop: int
    loss: float
    margin: float  # end score of i minus end score of j


@dataclass
class Row:
    """A comparison of K responses, best first, or a single response, and its rewards."""

    sequences: list[list[int]]  # token ids
    texts: list[
        list[str]
    ]  # of every sequence the text of each token, and of padding up to the longest end, L
    rewards: torch.Tensor  # (K, L) float32 or wider, on the CPU
    prompt: int  # tokens in front of the responses
    cut: int  # tokens of the prompt that truncation took off, in front of them
    lost: list[int]  # tokens of every response that it took off
    margin: float = 0.0  # that the data asks for, of a pair

    @property
    def ends(self) -> list[int]:
        return [len(sequence) for sequence in self.sequences]

    @property
    def scores(self) -> list[float]:
        return [self.rewards[i, end - 1].item() for i, end in enumerate(self.ends)]

    @functools.cached_property
    def pairs(self) -> list[Pair]:
        pairs = []
        for i, j in itertools.combinations(range(len(self.sequences)), 2):
            start, stop = divergent_region(self.sequences[i], self.sequences[j])
            start = min(
                start, stop - 1
            )  # of identical texts the last token, as in `RewardModel.forward_packed`
            loss = pair_loss(
                self.rewards[i, start:stop], self.rewards[j, start:stop], margin=self.margin
            ).item()
            pairs.append(Pair(i, j, start, stop, loss, self.scores[i] - self.scores[j]))
        return pairs

    def read(self, i: int) -> tuple[int, int]:
        """(first, stop) of the positions of response i that a loss reads; of one alone from the prompt to its end."""
        pairs = [pair for pair in self.pairs if i in (pair.i, pair.j)]
        return (
            (min(pair.start for pair in pairs), max(pair.stop for pair in pairs))
            if pairs
            else (self.prompt, self.ends[i])
        )


@torch.no_grad()
def scored_rows(model, tokenizer, path, count: int, max_seq_len: int) -> list[Row]:
    """The first `count` rows of a file (`data.load_comparisons`, also of one response), in the padded layout, the reference.

    Raises ValueError that names the file and the line.
    """
    rows, device = [], model.v_head.weight.device
    for comparison in tqdm(
        itertools.islice(load_comparisons(path, min_responses=1), count), unit=" rows", leave=False
    ):
        sequences = tokenize(comparison, tokenizer, max_seq_len)
        input_ids, mask = pad_rows(sequences, model.pad_id)
        rewards = model.token_rewards(input_ids.to(device), mask.to(device)).cpu()
        padding = ["⟨pad⟩"] + ["·"] * len(input_ids[0])  # by name once, as there may be hundreds
        texts = [
            token_texts(tokenizer, sequence) + padding[: len(input_ids[0]) - len(sequence)]
            for sequence in sequences
        ]
        # How far the prompt reaches: as far as all texts have its tokens, less what truncation took off. Of whole dialogues: what they share.
        whole = tokenize(comparison, tokenizer, 2**31)
        bos = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
        alone = (
            [bos + tokenizer.encode(comparison.prompt)]
            if comparison.prompt or len(whole) == 1
            else []
        )
        prompt = shared_prefix([*alone, *whole])
        dropped = [len(a) - len(b) for a, b in zip(whole, sequences)]
        cut = min(*dropped, prompt - len(bos))
        prompt = min(
            prompt - cut, *(len(sequence) - 1 for sequence in sequences)
        )  # the last token, where the score is, is the response's
        rows.append(
            Row(
                sequences,
                texts,
                rewards,
                prompt,
                cut,
                [n - cut for n in dropped],
                comparison.margin,
            )
        )
    return rows


def token_texts(tokenizer, sequence: list[int]) -> list[str]:
    """The text of each token; joined, the text of the sequence. bos, eos and pad are shown by name.

    Tokens cannot be decoded one by one: a character may be several of them (bytes), and sentencepiece leaves out the space
    in front of the first. So a token's text is what it adds to that of the tokens before it, and a token that does not
    complete a character has "".
    """
    names = {tokenizer.pad_id: "⟨pad⟩", tokenizer.eos_id: "⟨eos⟩", tokenizer.bos_id: "⟨bos⟩"}
    texts, before, start = (
        [""] * len(sequence),
        0,
        0,
    )  # tokens from `start` on have no text yet; those from `before` on are decoded with them
    for t, token in enumerate(sequence):
        if token in names:
            texts[t] = names[token]
        so_far, text = (
            tokenizer.decode(sequence[before:start]),
            tokenizer.decode(sequence[before : t + 1]),
        )
        is_last = all(later in names for later in sequence[t + 1 :])
        if (
            token not in names
            and len(text) > len(so_far)
            and (is_last or not text.endswith("\ufffd"))
        ):
            texts[t], before, start = text[len(so_far) :], start, t + 1
    return texts


def visible(text: str) -> str:
    """The text with signs for what cannot be seen, or would do something to the page or the terminal: control characters, also
    those of the writing direction, become names. A line still ends at its end."""

    def sign(c):
        if c in "\n\t":
            return {"\n": "↵\n", "\t": "⇥\t"}[c]
        if c < " " or c == "\x7f":
            return chr(0x2400 + ord(c)) if c < " " else "␡"
        is_hidden = (
            unicodedata.category(c) in ("Cc", "Cf", "Zl", "Zp") and c not in "\u200c\u200d"
        )  # these two join letters and emoji
        return f"⟨U+{ord(c):04X}⟩" if is_hidden else c

    return "".join(map(sign, text))


class Scale:
    """From rewards to shades. Only differences of rewards have a meaning, so the middle shade is for the median of those that are shown."""

    def __init__(self, rows: list[Row]):
        shown = torch.cat(
            [row.rewards[:, row.prompt :].flatten() for row in rows] or [torch.zeros(0)]
        ).double()
        shown = shown[shown.isfinite()]
        self.middle = shown.median().item() if len(shown) else 0.0
        distances = (shown - self.middle).abs().sort().values.tolist() or [1.0]
        self.reach = max(
            distances[int(0.98 * (len(distances) - 1))], 1e-6
        )  # a few may lie beyond it

    def level(self, reward: float) -> float:
        """-1 (low) to 1 (high)."""
        return (
            min(max((reward - self.middle) / self.reach, -1.0), 1.0)
            if math.isfinite(reward)
            else 0.0
        )


# ----------------------------------------------------------------------------------------------------------------------
# In the terminal


def show(rows: list[Row], out, colors: bool):
    """Write the rows to the text file `out`, with 256 ANSI colours or with marks alone: ◆ where responses diverge, ■ at an end."""
    scale = Scale(rows)

    def paint(words, code):
        return "\n".join(
            f"\x1b[{code}m{line}\x1b[0m" if line and colors else line for line in words.split("\n")
        )

    for n, row in enumerate(rows, start=1):
        pairs = row.pairs
        out.write(
            paint(f"row {n}", 1)
            + f"  prompt of {counted(row.prompt, 'token')}"
            + f", {row.cut} more cut" * bool(row.cut)
            + "\n"
            + paint("".join(map(visible, row.texts[0][: row.prompt])), 2)
            + "\n"
        )
        for i, (name, texts) in enumerate(zip(names_of(row), row.texts)):
            start, _ = row.read(i)
            out.write(
                paint(name, 1)
                + f"  score {row.scores[i]:.4f}"
                + f", {counted(row.lost[i], 'token')} cut" * bool(row.lost[i])
                + "\n"
            )
            for t in range(row.prompt, len(texts)):
                shade = ANSI[
                    round((scale.level(row.rewards[i, t].item()) + 1) / 2 * (len(ANSI) - 1))
                ]
                out.write("◆" * (t == start and bool(pairs)))
                out.write(
                    paint(visible(texts[t]), f"38;5;16;48;5;{shade}" if t >= start else 2)
                    + "■" * (t == row.ends[i] - 1)
                )
            out.write("\n")
        for pair in pairs:
            names = names_of(row)
            out.write(
                (f"{names[pair.i]} over {names[pair.j]}: " if len(pairs) > 1 else "")
                + f"loss {pair.loss:.4f}, the mean over "
                f"[{pair.start}, {pair.stop}), {counted(pair.stop - pair.start, 'position')}; "
                f"margin {pair.margin:+.4f}, probability {probability(pair.margin):.4f}\n"
            )
        if len(pairs) > 1:
            out.write(
                f"mean of {len(pairs)} pairs: loss {mean([pair.loss for pair in pairs]):.4f}\n"
            )
        out.write("\n")


def names_of(row: Row) -> list[str]:
    k = len(row.sequences)
    return (
        ["response"]
        if k == 1
        else ["chosen", "rejected"]
        if k == 2
        else [f"rank {i + 1}" for i in range(k)]
    )


def counted(n: int, what: str) -> str:
    return f"{n} {what}{'s' * (n != 1)}"


def probability(margin: float) -> float:
    """That the first is preferred, by the model (Bradley & Terry)."""
    return torch.sigmoid(torch.tensor(margin, dtype=torch.float64)).item()


def mean(values) -> float:
    return sum(values) / len(values) if values else math.nan


# ----------------------------------------------------------------------------------------------------------------------
# Pages


STYLE = """
:root{color-scheme:light dark}
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--ink);font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif;overflow-wrap:anywhere}
main{max-width:1080px;margin:0 auto;padding:28px 16px 64px}
h1{font-size:1.5rem;line-height:1.25;margin:0 0 .5rem;letter-spacing:-.01em}
h2{font-size:1.02rem;margin:0;font-weight:600}
p{margin:.5rem 0;max-width:46em}
.soft,summary,th{color:var(--soft)}
.small,table,summary{font-size:.875rem}
.card{background:var(--paper);border:1px solid var(--line);border-radius:12px;padding:16px;margin:20px 0;min-width:0}
.head{display:flex;flex-wrap:wrap;gap:2px 18px;align-items:baseline;margin-bottom:10px}
.facts{display:flex;flex-wrap:wrap;gap:10px 34px;margin:18px 0}
.facts b{display:block;font-size:1.3rem;font-weight:600;line-height:1.2;font-variant-numeric:tabular-nums}
.cols{display:grid;grid-template-columns:minmax(0,1fr);gap:16px 28px}
@media (min-width:820px){.cols{grid-template-columns:repeat(2,minmax(0,1fr))}.cols .card{margin:0}}
@media (max-width:819px){.cols .card{margin:0}}
@media (max-width:480px){main{padding:16px 10px 40px}.card{padding:12px}}
svg{display:block;width:100%;max-width:560px;height:auto;margin:0 auto}
.text{white-space:pre-wrap;line-height:1.9;margin:2px 0 14px}
.text.prompt{color:var(--soft);white-space:normal;line-height:1.6;margin:6px 0 14px}
.text span{padding:2px 0;border-radius:2px}
.text:not(.prompt) span:not(.off,.mark){box-shadow:inset -1px 0 var(--paper)}
.off{color:var(--soft)}
.name{font-size:.85em}
.empty::before{content:"⋯";font-size:.6em}
.pad{border-bottom:2px dotted var(--soft)}
.mark{color:var(--ink);font-size:.8em;font-weight:600;margin:0 2px;white-space:nowrap}
.bar{display:flex;max-width:340px;height:14px;border-radius:3px;overflow:hidden}.bar span{flex:1}
.bar.ends{justify-content:space-between;height:auto;margin-bottom:6px}.bar.ends span{flex:none}
.scroll{overflow:auto;max-height:24rem;margin-top:8px}
table{border-collapse:collapse;font-variant-numeric:tabular-nums}
th,td{text-align:right;padding:3px 14px 3px 0;border-bottom:1px solid var(--line);font-weight:400;white-space:pre}
th:first-child,td:first-child{text-align:left}
.words td,.words th{text-align:left;white-space:pre-wrap}
details{margin:6px 0}summary{cursor:pointer}
code{font:.92em ui-monospace,Menlo,Consolas,monospace}
"""


def style_of_charts() -> str:
    """Colours as custom properties, for light and dark, and what in a chart has them."""

    def properties(theme):
        names = INK[theme] | {f"c{i}": pair[theme == "dark"] for i, pair in enumerate(SERIES)}
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
    """Backgrounds .s-8 (low) to .s8 (high), for light and dark; mixed here, as older browsers cannot."""

    def mixed(theme, level):
        low, middle, high = (
            [int(color[i : i + 2], 16) for i in (1, 3, 5)] for color in SHADES[theme]
        )
        share = abs(level) / LEVELS
        return "#" + "".join(
            f"{round(a + (b - a) * share):02x}" for a, b in zip(middle, high if level > 0 else low)
        )

    light, dark = (
        "".join(
            f".s{level}{{background:{mixed(theme, level)}}}" for level in range(-LEVELS, LEVELS + 1)
        )
        for theme in SHADES
    )
    return f"{light}@media (prefers-color-scheme:dark){{{dark}}}"


def write_page(path, title: str, body: str):
    """The whole file, or what was there before."""
    policy = "default-src 'none'; style-src 'unsafe-inline'"  # should text from the data get through as markup, it could load nothing
    page = (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(visible(title))}</title><style>{style_of_charts()}{STYLE}{style_of_shades()}</style></head>\n"
        f"<body><main>{body}</main></body></html>\n"
    )
    part = Path(f"{path}.part")
    part.write_text(page, encoding="utf-8")
    os.replace(part, path)


def facts(**named) -> str:
    return (
        '<div class="facts">'
        + "".join(
            f'<div><b>{value}</b><span class="soft small">{name.replace("_", " ")}</span></div>'
            for name, value in named.items()
        )
        + "</div>"
    )


def table(head: list[str], body: list[list[str]], kind: str = "") -> str:
    """Cells are HTML already."""
    rows = ["".join(f"<td>{cell}</td>" for cell in cells) for cells in body]
    return (
        f'<div class="scroll"><table class="{kind}"><thead><tr>'
        + "".join(f"<th>{name}</th>" for name in head)
        + "</tr></thead><tbody>"
        + "".join(f"<tr>{row}</tr>" for row in rows)
        + "</tbody></table></div>"
    )


def spans(row: Row, i: int, scale: Scale, first: int, last: int, shade_from: int) -> str:
    """Tokens first to last - 1 of response i, from `shade_from` on with their shade."""
    out = []
    for t in range(first, last):
        text, reward = row.texts[i][t], row.rewards[i, t].item()
        kinds = [
            f"s{round(scale.level(reward) * LEVELS)}" if t >= shade_from else "off",
            *["empty"] * (text == ""),
            *["name"] * (text in ("⟨bos⟩", "⟨eos⟩", "⟨pad⟩")),
            *["pad"] * (t >= row.ends[i]),
        ]
        out.append(
            f'<span class="{" ".join(kinds)}" title="position {t}, reward {reward:.4f}">{escape(visible(text))}</span>'
        )
    return "".join(out)


def row_html(n: int, row: Row, scale: Scale) -> str:
    pairs, names = row.pairs, names_of(row)
    loss = mean([pair.loss for pair in pairs])
    head = [f"<h2>Row {n}</h2>"]
    if len(pairs) == 1:
        pair = pairs[0]
        right = (
            "✓ ranked as people did"
            if pair.margin > 0
            else "✗ ranked the other way round"
            if pair.margin < 0
            else "a tie"
        )
        head += [
            f"loss <b>{loss:.4f}</b>",
            f"margin <b>{pair.margin:+.4f}</b>",
            f"P(chosen preferred) <b>{probability(pair.margin):.3f}</b>",
            right,
        ]
    elif pairs:
        head += [
            f"mean loss <b>{loss:.4f}</b> of {len(pairs)} pairs",
            f"{sum(pair.margin > 0 for pair in pairs)} ranked as people did",
        ]
    prompt = f"{'prompt' if len(names) == 1 else 'shared prompt'}, {counted(row.prompt, 'token')}"
    total = f' data-loss="{loss!r}"' if pairs else ""
    cut = f", and {row.cut} more that truncation cut off" if row.cut else ""
    out = [
        f'<section class="card" data-row="{n}"{total}><div class="head">'
        + "".join(f"<span>{item}</span>" for item in head)
        + "</div>",
        f"<details{' open' if row.prompt <= 150 else ''}><summary>{prompt}{cut}</summary>"
        f'<div class="text prompt" dir="auto">{spans(row, 0, scale, 0, row.prompt, row.prompt)}</div></details>',
    ]
    for i, (name, end, score) in enumerate(zip(names, row.ends, row.scores)):
        start, stop = row.read(i)
        lost = f", {counted(row.lost[i], 'token')} of it cut off" if row.lost[i] else ""
        mark = (
            f'<span class="mark" title="the responses diverge here, at position {start}">◆</span>'
            if pairs
            else ""
        )
        out.append(
            f'<div class="small"><b class="k{i % 4}">{name}</b> <span class="soft">score {score:.4f}{lost}</span></div>'
            f'<div class="text" dir="auto" data-score="{score!r}">'
            + spans(row, i, scale, row.prompt, start, start)
            + mark
            + spans(row, i, scale, max(start, row.prompt), end, start)
            + f'<span class="mark" title="the text ends: its score is read here, at position {end - 1}">■</span>'
            + spans(row, i, scale, end, stop, start)
            + "</div>"
        )
    out.append(
        f'<div class="cols"><div>{traces(row, pairs, names)}</div><div>{how(row, pairs, names, loss)}</div></div></section>'
    )
    return "".join(out)


def traces(row: Row, pairs: list[Pair], names: list[str]) -> str:
    """The rewards of the responses over the positions; over padding dotted."""
    series, ends = [], row.ends
    for i, (name, end) in enumerate(zip(names, ends)):
        _, stop = row.read(i)
        rewards = row.rewards[i].tolist()
        series.append(
            Series(
                rewards[row.prompt : end],
                list(range(row.prompt, end)),
                name,
                color=i % 4,
                style=["", "dashed"][i % 2],
            )
        )
        series.append(
            Series(rewards[end - 1 : stop], list(range(end - 1, stop)), color=i % 4, style="dotted")
        )
        series.append(
            Series(
                [rewards[end - 1]],
                [end - 1],
                kind="point",
                color=i % 4,
                notes=[f"{name}: end score {rewards[end - 1]:.4f}"],
            )
        )
    lines = (
        [
            (
                min(pair.start for pair in pairs),
                "divergence" if len(pairs) == 1 else "first divergence",
            )
        ]
        if pairs
        else []
    )
    if len(names) == 2:
        lines += [(end - 1, f"end of {name}") for name, end in zip(names, ends)]
    return chart(series, "Reward at every position", "position", vlines=lines)


def how(row: Row, pairs: list[Pair], names: list[str], loss: float) -> str:
    """How the loss of a row came about."""
    if not pairs:
        return (
            f"<p>The score is the reward at the last token, position {row.ends[0] - 1}: <b>{row.scores[0]:.4f}</b>. "
            "A single response has no loss.</p>"
        )
    if len(pairs) > 1:
        cells = [
            [
                f"{names[p.i]} &gt; {names[p.j]}",
                f"[{p.start}, {p.stop})",
                f"{p.margin:+.4f}",
                f"{probability(p.margin):.4f}",
                f'<span data-pair-loss="{p.loss!r}">{p.loss:.4f}</span>',
            ]
            for p in pairs
        ]
        return (
            f"<p>The loss of a ranking is the mean over its {len(pairs)} pairs: <b>{loss:.4f}</b>. Each is the mean of "
            "<code>−logsigmoid(r_better − r_worse)</code> over the pair's region, from where the two diverge to the longer end.</p>"
            + table(["pair", "region", "margin", "P", "loss"], cells)
        )
    p, cells = pairs[0], []
    for t in range(p.start, p.stop):
        chosen, rejected = row.rewards[0, t : t + 1], row.rewards[1, t : t + 1]
        term = pair_loss(chosen, rejected, margin=row.margin).item()  # of a region of one position
        cells.append(
            [
                str(t),
                *(escape(visible(texts[t]).rstrip("\n\t")) for texts in row.texts),
                f"{chosen.item():.4f}",
                f"{rejected.item():.4f}",
                f"{(chosen - rejected).item():+.4f}",
                f'<span data-term="{term!r}">{term:.4f}</span>',
            ]
        )
    is_same = row.sequences[0] == row.sequences[1]
    same = (
        " The texts are identical: the last position is read, the loss is log 2, and nothing is learned."
        * is_same
    )
    less = f" − {row.margin:g}" if row.margin else ""  # the margin that the data asks for
    return (
        f'<p data-pair-loss="{p.loss!r}" data-start="{p.start}" data-stop="{p.stop}"><b>The loss</b> reads positions '
        f"[{p.start}, {p.stop}), from the divergence to the longer end: {counted(len(cells), 'position')}. It is the mean of "
        f"<code>−logsigmoid(r_chosen − r_rejected{less})</code> over them: <b>{p.loss:.4f}</b>.{same}</p>"
        f"<p><b>The scores</b> are the rewards at the last tokens: {row.scores[0]:.4f} and {row.scores[1]:.4f}. "
        f"Their difference, the margin, is {p.margin:+.4f}, and the model's probability that the chosen one is preferred is "
        f"sigmoid({p.margin:.4f}) = <b>{probability(p.margin):.4f}</b>.</p>"
        f"<details><summary>The terms, position by position</summary>"
        + table(
            [
                "position",
                "chosen",
                "rejected",
                "r<sub>chosen</sub>",
                "r<sub>rejected</sub>",
                "difference",
                "term",
            ],
            cells,
        )
        + "</details>"
    )


def comparisons_page(path, rows: list[Row], file, checkpoint, max_seq_len: int):
    """Write the page of `rm.py --html`: the first rows of a file, as `scored_rows` gives them, at least one."""
    scale, total = Scale(rows), sum(1 for _ in read_rows(file))
    pairs = [row.pairs for row in rows]
    margins = [pair.margin for some in pairs for pair in some]
    numbers = (
        {
            "pairs": len(margins),
            "accuracy": f"{mean([m > 0 for m in margins]):.4f}",
            "mean_margin": f"{mean(margins):+.4f}",
            "mean_loss": f"{mean([mean([p.loss for p in some]) for some in pairs if some]):.4f}",
        }
        if margins
        else {"responses": len(rows)}
    )
    which = (
        f"All {total:,} rows"
        if len(rows) == total
        else f"The first {len(rows):,} of {total:,} rows (<code>--rows</code>)"
    )
    bar = "".join(f'<span class="s{level}"></span>' for level in range(-LEVELS, LEVELS + 1))
    source, scorer = (f"<code>{escape(visible(str(name)))}</code>" for name in (file, checkpoint))
    body = (
        "<h1>What the reward model sees</h1><p>A reward model is a transformer with one linear layer on top that gives every token a "
        "number, the reward; the one at a text's last token is the text's score. It learns from pairs of responses of which people "
        "chose one: the loss of a pair is the binary cross-entropy of “the chosen one is better”, with the difference of the two "
        "rewards as the logit, averaged over the positions from where the texts diverge to the longer end.</p>"
        f'{facts(**numbers)}<p class="small soft">{which} of {source}, scored by {scorer} at up to {max_seq_len} tokens. '
        "The figures above are of what is shown; nothing else was computed for this page.</p>"
        f'<div class="card small"><div class="bar">{bar}</div><div class="bar ends soft"><span>{scale.middle - scale.reach:.2f}</span>'
        f"<span>{scale.middle:.2f}</span><span>{scale.middle + scale.reach:.2f}</span></div>"
        "<div>The shade is the reward, from low to high around the median of this page; only differences have a meaning. "
        "Losses are those of the default objective, whatever the model was trained with.</div>"
        "<div>◆ the responses diverge &nbsp; ■ a text ends, and its score is read "
        '&nbsp; <span class="pad">dotted</span> padding, where the loss reads rewards, too &nbsp; <span class="off">grey</span> '
        "before the divergence: no part of the loss &nbsp; ⋯ a token that does not complete a character</div></div>"
    )
    write_page(
        path,
        f"{Path(file).name}: comparisons",
        body + "".join(row_html(n, row, scale) for n, row in enumerate(rows, start=1)),
    )


def thinned(x: list, y: list, limit: int = 1000) -> tuple[list, list]:
    """At most `limit` points of a curve: of every stretch its lowest and its highest one, so that no spike is lost."""
    points = [(a, b) for a, b in zip(x, y) if finite(b)]
    if len(points) > limit:
        stretch = math.ceil(2 * len(points) / limit)
        parts = (points[i : i + stretch] for i in range(0, len(points), stretch))
        points = sorted(
            point
            for part in parts
            for point in {min(part, key=lambda p: p[1]), max(part, key=lambda p: p[1])}
        )
    return [a for a, _ in points], [b for _, b in points]


def histogram(groups: dict[str, list[float]], title: str, x_label: str, **more) -> str:
    """Counts of each group in 40 bins that all share."""
    values = torch.tensor(
        [v for values in groups.values() for v in values if finite(v)], dtype=torch.float64
    )
    low, high = (values.min().item(), values.max().item()) if len(values) else (0.0, 1.0)
    high = high if high > low else low + 1
    width, series = (high - low) / 40, []
    for color, (name, group) in enumerate(groups.items()):
        counts = torch.histc(
            torch.tensor([v for v in group if finite(v)], dtype=torch.float64), 40, low, high
        ).tolist()
        x = [low + (i + 0.5) * width for i in range(40)]
        notes = [f"{at:.3g}: {int(n)} pairs" for at, n in zip(x, counts)]
        series.append(
            Series(
                counts, x, name if len(groups) > 1 else "", "bar", color, width=width, notes=notes
            )
        )
    return chart(series, title, x_label, "pairs", **more)


def reliability(margins: torch.Tensor) -> str:
    """Observed accuracy by confidence, in the bins of `train.calibration_error`."""
    from train import confidence_bins  # here, as pages of pairs can do without the loop

    (confidence, bins), right = confidence_bins(margins), (margins > 0).double()
    observed = [right[bins == i].mean().item() if (bins == i).any() else None for i in range(10)]
    counts = [int((bins == i).sum()) for i in range(10)]
    notes = [
        f"confidence {0.5 + 0.05 * i:.2f} to {0.55 + 0.05 * i:.2f}: accuracy {observed[i] or 0:.4f}, "
        f"mean confidence {confidence[bins == i].mean():.4f}, {counts[i]} pairs"
        for i in range(10)
    ]  # a bin without pairs has neither a bar nor its note
    bars = Series(
        observed,
        [0.525 + 0.05 * i for i in range(10)],
        "ranked right, of so many pairs",
        "bar",
        0,
        width=0.05,
        notes=notes,
        labels=[str(n) for n in counts],
    )
    return chart(
        [bars, Series([0.5, 1.0], [0.5, 1.0], "calibrated", color=4, style="dashed")],
        "Reliability",
        "confidence: probability of the response it prefers",
        "accuracy",
        x_range=(0.5, 1),
        y_range=(0, 1),
    )


def learned_and_true(margins: torch.Tensor, true_margins: torch.Tensor) -> str:
    learned, true = torch.sigmoid(margins), torch.sigmoid(true_margins)
    bins = torch.bucketize(true, torch.linspace(0, 1, 11, dtype=torch.float64)[1:-1], right=True)
    used = [bins == i for i in range(10) if (bins == i).any()]
    x, y, spread = (
        [f(some).item() for some in used]
        for f in (
            lambda b: true[b].mean(),
            lambda b: learned[b].mean(),
            lambda b: learned[b].std(correction=0),
        )
    )
    points = Series(
        y,
        x,
        "mean in a bin, ± standard deviation",
        "point",
        0,
        error=spread,
        notes=[
            f"true {a:.3f}, learned {b:.3f}, {int(some.sum())} pairs"
            for a, b, some in zip(x, y, used)
        ],
    )
    return chart(
        [Series([0, 1], [0, 1], "perfect", color=4, style="dashed"), points],
        "Probability that the chosen one is better",
        "true",
        "learned",
        x_range=(0, 1),
        y_range=(0, 1),
    )


def run_page(
    path,
    events: list[dict],
    flags: dict,
    chosen: list[float],
    rejected: list[float],
    true_margins: list[float] | None = None,
):
    """Write the page of a training run that has ended.

    events: the objects of its metrics.jsonl. flags: names and values. chosen, rejected: (P,), the end scores of the pairs of the
    last evaluation. true_margins: (P,), the differences of their true rewards, where these are known.
    """
    steps, evals = (
        [event for event in events if event["event"] == kind] for kind in ("step", "eval")
    )
    at, losses = [event["step"] for event in steps], [event["loss"] for event in steps]
    window = max(1, len(steps) // 50)
    sums, counts = (
        [0, *itertools.accumulate(v)]
        for v in ([v if finite(v) else 0 for v in losses], [int(finite(v)) for v in losses])
    )
    smooth = [
        (b - a) / max(m - n, 1) for a, b, n, m in zip(sums, sums[window:], counts, counts[window:])
    ]
    eval_at = [event["step"] for event in evals]

    def curve(name, title):
        return chart(
            [Series(*reversed(thinned(at, [event[name] for event in steps])), color=2)],
            title,
            "step",
            size=(420, 180),
        )

    def evaluated(what, name=""):
        values = [event.get(what) for event in evals]
        return [
            Series(values, eval_at, name, "line", color=1),
            Series(values, eval_at, kind="point", color=1),
        ]

    margins = torch.tensor(chosen, dtype=torch.float64) - torch.tensor(
        rejected, dtype=torch.float64
    )
    first, last = (evals[0], evals[-1]) if evals else ({}, {})
    best = (
        [(last["bayes_accuracy"], "best possible (Bayes-optimal)")]
        if finite(last.get("bayes_accuracy"))
        else []
    )
    charts = [
        chart(
            [
                Series(
                    *reversed(thinned(at, losses)),
                    "a step",
                    color=0,
                    style="thin" if window > 1 else "",
                ),
                *(
                    [
                        Series(
                            *reversed(thinned(at[window - 1 :], smooth)), f"mean of {window} steps"
                        )
                    ]
                    if window > 1
                    else []
                ),
                *evaluated("loss", "evaluation"),
            ],
            "Loss",
            "step",
        ),
        chart(evaluated("accuracy"), "Accuracy in evaluation", "step", hlines=best),
        histogram(
            {"chosen": chosen, "rejected": rejected}, "End scores", "reward at the last token"
        ),
        histogram(
            {"margin": margins.tolist()},
            "Margins",
            "end score of chosen minus rejected",
            vlines=[(0, "right from here on")],
        ),
        reliability(margins),
        *(
            [learned_and_true(margins, torch.tensor(true_margins, dtype=torch.float64))]
            if true_margins
            else []
        ),
        curve("lr", "Learning rate"),
        curve("grad_norm", "Gradient norm, before clipping"),
    ]
    names = [name for name in last if name not in ("event", "step")]
    of_flags = [
        [f"<code>--{escape(visible(str(name)))}</code>", escape(visible(str(value)))]
        for name, value in flags.items()
    ]

    def number(value):
        return (
            f"{value:,}"
            if isinstance(value, int)
            else f"{value:.4f}"
            if finite(value)
            else "not finite"
        )

    numbers = {
        "eval accuracy": number(last.get("accuracy")),
        "eval loss": number(last.get("loss")),
        "eval pairs": number(last.get("pairs", 0)),
        "steps": number(len(steps)),
    }
    if best:
        numbers = {
            "eval accuracy": numbers.pop("eval accuracy"),
            "the best possible": number(best[0][0]),
        } | numbers
    seconds = sum(event["seconds"] for event in steps)
    body = (
        "<h1>A training run</h1><p>The model learned from pairs of responses which one people prefer. Accuracy is how often, in pairs kept "
        f"aside, it gives the preferred response the higher score; the loss is also about how sure it was.</p>{facts(**numbers)}"
        f'<div class="cols">{"".join(f"""<div class="card">{svg}</div>""" for svg in charts)}</div>'
        "<div class='cols' style='margin-top:20px'><div class='card'><h2>Evaluation</h2>"
        + table(
            ["", f"step {first.get('step', '')}", f"step {last.get('step', '')}"],
            [
                [escape(visible(str(name))), number(first.get(name)), number(last[name])]
                for name in names
            ],
        )
        + f"<p class='small soft'>Training: {sum(event['pairs'] for event in steps):,} pairs, "
        f"{sum(event['tokens'] for event in steps):,} tokens, {seconds / 60:.1f} min.</p></div><div class='card'><h2>Flags</h2>"
        + table(["flag", "value"], of_flags, "words")
        + "</div></div>"
    )
    write_page(path, "A training run", body)
