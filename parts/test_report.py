"""Charts and the page of a run, read by parsers and by a browser."""

import itertools
import json
import math
import re
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from html import unescape
from html.parser import HTMLParser

import pytest
import torch

import data
import train
from parts import report
from parts.guards import visible
from parts.metrics import LISTS, calibration_error, standard_error

HOSTILE = (
    "</span><script>alert(1)</script> \"quoted\" 'single' & &amp; ]]> <!-- -->"
    "\x1b[31mred\x1b]0;title\x07\x9b2J\x00\x7f "
    "\u202edcba\u2066 \u2028 🙂🙃 שלום \r\n\ttab"
)


# --------------------------------------------------------------------------------------------------
# Helpers, also for tools/test_pairs_page.py


def events_of_a_run(steps=3000):
    step = [
        {
            "event": "step",
            "step": t,
            "loss": None if t == 7 else 0.7 - 0.1 * t / steps,
            "lr": 1e-4,
            "grad_norm": None if t == 7 else 50.0 if t == 1234 else 1.0,
            "pairs": 8,
            "tokens": 100,
            "seconds": 0.5,
        }
        for t in range(1, steps + 1)
    ]
    metrics = {
        "accuracy": 0.75,
        "chosen_score": 1.0,
        "rejected_score": -1.0,
        "margin": 2.0,
        "ece": 0.1,
        "pairs": 500,
        "dropped": 0,
        "bayes_accuracy": 0.9,
    }
    return [
        {"event": "eval", "step": 0, "loss": 0.7} | metrics,
        *step,
        {"event": "eval", "step": steps, "loss": 0.5} | metrics,
    ]


def numbers_of(chosen, rejected, true_margin=(), **known):
    """Make the lists of an evaluation of pairs: targets 1 and no subset, unless given."""
    numbers = {name: [] for name in LISTS}
    numbers |= {"chosen": chosen, "rejected": rejected, "true_margin": list(true_margin)}
    numbers |= {"target": [1.0] * len(chosen), "subset": [None] * len(chosen)}
    return numbers | {"scores": [*chosen, *rejected]} | known


def scores_of_a_run(pairs=500):
    true = torch.randn(pairs, generator=torch.manual_seed(0), dtype=torch.float64) * 2
    chosen = torch.randn(pairs, dtype=torch.float64)
    rejected = chosen - true - torch.randn(pairs, dtype=torch.float64)
    return chosen.tolist(), rejected.tolist(), true.tolist()


FLAGS = [
    ("data_path", [HOSTILE, "b.jsonl"]),
    ("data_split", [2.0, 4.0, 4.5]),
    ("learning_rate", 1e-4),
    ("max_steps", 2000),
    ("resume", False),
    ("offload", True),
    ("<flag>", None),
]


@pytest.fixture(scope="module")
def run_page(tmp_path_factory):
    path = tmp_path_factory.mktemp("run") / "report.html"
    report.run_page(path, events_of_a_run(), FLAGS, numbers_of(*scores_of_a_run()))
    return path.read_text(encoding="utf-8")


class Node:
    def __init__(self, tag, attributes):
        self.tag, self.attributes, self.children = tag, dict(attributes), []

    def text(self):
        return "".join(child if isinstance(child, str) else child.text() for child in self.children)

    def all(self, test):
        found = [self] if test(self) else []
        return found + [
            node for child in self.children if isinstance(child, Node) for node in child.all(test)
        ]

    def having(self, attribute):
        return self.all(lambda node: attribute in node.attributes)

    def of_class(self, name):
        return self.all(lambda node: name in (node.attributes.get("class") or "").split())


class Tree(HTMLParser):
    """A parser that is strict: every tag that is opened is closed, in its order."""

    def __init__(self, text):
        super().__init__()
        self.open = [Node("document", {})]
        self.feed(text)
        self.close()
        assert [node.tag for node in self.open] == ["document"]
        self.root = self.open[0]

    def handle_starttag(self, tag, attributes):
        assert len({name for name, _ in attributes}) == len(attributes)
        node = Node(tag, attributes)
        self.open[-1].children.append(node)
        if tag != "meta":
            self.open.append(node)

    def handle_startendtag(self, tag, attributes):
        assert tag in ("line", "path", "circle", "rect")  # in HTML itself a tag is not closed by />
        self.handle_starttag(tag, attributes)
        self.handle_endtag(tag)

    def handle_endtag(self, tag):
        assert self.open.pop().tag == tag

    def handle_data(self, text):
        self.open[-1].children.append(text)

    def handle_comment(self, text):
        raise AssertionError(f"a comment: {text}")


def check_whole(page):
    """Check that a page is well-formed, runs nothing and loads nothing."""
    nodes = Tree(page).root.all(lambda node: True)
    tags = {node.tag for node in nodes}
    assert {"svg", "table", "style"} <= tags
    assert not tags & {
        "script",
        "link",
        "img",
        "iframe",
        "object",
        "embed",
        "base",
        "form",
        "image",
        "use",
        "foreignobject",
    }
    for node in nodes:
        assert not [
            a
            for a in node.attributes
            if a.startswith("on") or a in ("src", "href", "xlink:href", "srcset", "action")
        ], node.attributes
        assert "url(" not in (node.attributes.get("style") or "")
    style = "".join(node.text() for node in nodes if node.tag == "style")
    assert "url(" not in style and "@import" not in style and "<" not in style
    assert "default-src 'none'" in page and not re.search(r"https?:", page)
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\u2028]", page)


PROBE = """<!doctype html><meta charset="utf-8"><body style="margin:0"><script>
function look(frame) {
  const doc = frame.contentDocument, root = doc.documentElement, view = frame.contentWindow;
  doc.querySelectorAll("details").forEach(one => one.open = true);
  const rgb = color => color.match(/[0-9.]+/g).map(Number);
  const linear = c => (c /= 255) <= .04045 ? c / 12.92 : ((c + .055) / 1.055) ** 2.4;
  const weights = [.2126, .7152, .0722];
  const light = color =>
    rgb(color).slice(0, 3).reduce((sum, c, i) => sum + linear(c) * weights[i], 0);
  let worst = 99, where = "", overflow = [];
  for (const node of doc.querySelectorAll("body *:not(style):not(svg):not(svg *)")) {
    const isWide = node.getBoundingClientRect().right > root.clientWidth + 1;
    if (isWide && !node.closest(".scroll")) overflow.push(node.tagName + "." + node.className);
    if (![...node.childNodes].some(child => child.nodeType == 3 && child.data.trim())) continue;
    let behind = node;
    const background = node => view.getComputedStyle(node).backgroundColor;
    while (behind && (rgb(background(behind))[3] ?? 1) == 0) behind = behind.parentElement;
    const lights = [light(view.getComputedStyle(node).color), light(background(behind))];
    const [a, b] = lights.sort((x, y) => y - x);
    const contrast = (a + .05) / (b + .05);
    if (contrast < worst) { worst = contrast; where = node.outerHTML.slice(0, 90); }
  }
  return {clientWidth: root.clientWidth, scrollWidth: root.scrollWidth, overflow, worst, where,
          page: view.getComputedStyle(doc.body).backgroundColor};
}
onload = () => {
  const found = [...document.querySelectorAll("iframe")].map(look);
  document.body.textContent = "RESULT" + JSON.stringify(found) + "END";
};
</script>FRAMES</body>"""


NEEDS_CHROMIUM = pytest.mark.skipif(
    not shutil.which("chromium"), reason="needs chromium (apt-get install chromium)"
)
SCHEMES = {"light": "rgb(247, 247, 245)", "dark": "rgb(20, 21, 24)"}


def check_in_a_browser(page, scheme, tmp_path):
    """Look at a page in a narrow and in a wide window, in a light or dark colour scheme.

    Nothing is wider than the window but what scrolls in its own box, and all text has the contrast
    that WCAG asks for, 4.5 to 1.
    """
    (tmp_path / "page.html").write_text(page)
    frames = [360, 1400]
    style = "border:0;display:block;height:900px"
    iframes = [
        f'<iframe src="page.html" style="{style};width:{width}px"></iframe>' for width in frames
    ]
    (tmp_path / "probe.html").write_text(PROBE.replace("FRAMES", "".join(iframes)))
    done = subprocess.run(
        [
            "chromium",
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-quic",
            "--no-first-run",
            "--disable-background-networking",
            "--disable-component-update",
            "--disable-sync",
            "--hide-scrollbars",
            f"--user-data-dir={tmp_path / 'profile'}",
            "--allow-file-access-from-files",
            "--window-size=1500,1000",
            f"--blink-settings=preferredColorScheme={int(scheme == 'light')}",
            "--dump-dom",
            (tmp_path / "probe.html").as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=120,
    )
    found = re.search("RESULT(.*)END", done.stdout)
    assert found, done.stderr[-1000:]
    for width, seen in zip(frames, json.loads(unescape(found[1])), strict=True):
        assert (
            seen["clientWidth"] == width and seen["scrollWidth"] <= width and seen["overflow"] == []
        ), (width, seen)
        assert seen["worst"] >= 4.5, (width, seen)
        assert seen["page"] == SCHEMES[scheme]


# --------------------------------------------------------------------------------------------------
# Charts


def numbers(text):
    return [float(x) for x in re.findall(r"-?[0-9.]+", text)]


@pytest.mark.parametrize(
    "low, high",
    [(0, 1), (0.2, 0.9), (-3.7, 12), (1e-9, 3e-9), (5, 5), (0, 0), (-1e6, 1e6), (0.5, 1)],
)
def test_ticks_are_round_and_enclose_the_data(low, high):
    found = report.ticks(low, high)
    assert (
        found[0] <= low + 1e-9 * abs(low)
        and found[-1] >= high - 1e-9 * abs(high)
        and 2 <= len(found) <= 7
    )
    step = found[1] - found[0]
    assert round(step / 10 ** math.floor(math.log10(step) + 1e-9), 6) in (1, 2, 5)


def test_a_chart_alone_is_a_whole_svg_file():
    svg = report.standalone(
        report.chart(
            [
                report.Series(
                    [0.8, 0.9],
                    name="a < b",
                    kind="point",
                    error=[0.05, 0.02],
                    notes=["n = 3 & more", "\x1b"],
                ),
                report.Series([0.7, None], name="c", kind="bar", color=1),
            ],
            'Title "&"',
            "x",
            "y",
            categories=["first", "<second>"],
            hlines=[(0.95, "best")],
        )
    )
    root = ElementTree.fromstring(svg)
    name = "{http://www.w3.org/2000/svg}"
    texts = [node.text for node in root.iter(name + "text")]
    assert (
        root.tag == name + "svg"
        and root[0].tag == name + "style"
        and "prefers-color-scheme:dark" in root[0].text
    )
    assert {'Title "&"', "x", "y", "first", "<second>", "a < b", "c", "best"} <= set(texts)
    circles, bars = list(root.iter(name + "circle")), list(root.iter(name + "rect"))
    assert [circle[0].text for circle in circles] == ["n = 3 & more", "␛"] and len(bars) == 1
    first, second = (
        [float(node.get("x")) for node in root.iter(name + "text") if node.text == label][0]
        for label in ("first", "<second>")
    )
    assert (
        float(circles[0].get("cx")) < first < float(bars[0].get("x")) + float(bars[0].get("width"))
    )  # side by side
    assert float(circles[1].get("cx")) < second
    scale = {
        float(node.text): float(node.get("y"))
        for node in root.iter(name + "text")
        if re.fullmatch("[0-9.]+", node.text)
    }
    per_unit = (scale[1] - scale[0]) / 1
    x, low, high = numbers(next(root.iter(name + "path")).get("d"))[:3]  # the first error bar
    assert x == float(circles[0].get("cx")) and abs(abs(low - high) - 0.1 * abs(per_unit)) < 0.11
    assert abs(float(circles[0].get("cy")) - (scale[0] - 4 + 0.8 * per_unit)) < 0.11


def test_a_curve_has_gaps_where_there_is_no_number_and_no_data_draws_nothing():
    path = next(
        ElementTree.fromstring(
            report.chart([report.Series([1, 2, math.nan, None, 3, math.inf])])
        ).iter("path")
    ).get("d")
    assert [part.count(",") for part in path.split("M")[1:]] == [2, 1]
    assert "nan" not in report.chart([report.Series([math.nan])]) and "nan" not in report.chart([])


def test_a_long_curve_keeps_its_spikes():
    x, y = list(range(100_000)), [0.0] * 100_000
    y[54321], y[77777], y[10] = 9.0, -9.0, math.nan
    a, b = report.thinned(x, y)
    assert (
        len(a) == len(b) <= 1000
        and a == sorted(a)
        and {(54321, 9.0), (77777, -9.0)} <= set(zip(a, b))
    )


# --------------------------------------------------------------------------------------------------
# The page of a run


def test_the_page_is_whole_runs_nothing_and_loads_nothing(run_page):
    check_whole(run_page)


@NEEDS_CHROMIUM
@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_page_fits_and_can_be_read_in_a_browser(scheme, run_page, tmp_path):
    check_in_a_browser(run_page, scheme, tmp_path)


def test_hostile_text_in_flags_arrives_as_text(run_page):
    text = Tree(run_page).root.text()
    assert visible(HOSTILE) in text and "--<flag>" in text


def test_a_long_run_makes_a_small_page(tmp_path):
    report.run_page(
        tmp_path / "report.html", events_of_a_run(20_000), [], numbers_of(*scores_of_a_run())
    )
    page = (tmp_path / "report.html").read_text()
    assert len(page) < 200_000
    assert "nan" not in page.lower().replace("nans", "")


def test_the_bins_of_the_reliability_diagram_are_those_of_the_calibration_error(run_page):
    chosen, rejected, _ = scores_of_a_run()
    notes = [
        node.text()
        for node in Tree(run_page).root.all(lambda node: node.tag == "title")
        if node.text().startswith("confidence")
    ]
    error = 0
    for note in notes:
        _, _, accuracy, _, count, confidence = numbers(note)
        error += abs(accuracy - confidence) * count / 500
    margins = torch.tensor(chosen, dtype=torch.float64) - torch.tensor(
        rejected, dtype=torch.float64
    )
    assert len(notes) == 10 and sum(numbers(note)[4] for note in notes) == 500
    assert error == pytest.approx(calibration_error(margins), abs=2e-4)


def test_the_page_of_a_run_has_its_numbers(run_page):
    chosen, rejected, true = scores_of_a_run()
    root = Tree(run_page).root
    text = root.text()
    for heading in (
        "Loss",
        "Accuracy in evaluation",
        "End scores",
        "Margins",
        "Reliability",
        "Probability that the chosen response is better",
        "Learning rate",
        "Gradient norm, before clipping",
    ):
        assert root.all(
            lambda node: node.tag == "svg" and node.attributes["aria-label"] == heading
        ), heading
    assert (
        "0.7500 ± 0.0194 (500 pairs)eval accuracy0.9000 ± 0.0134 (500 pairs)best possible accuracy"
        in text.replace("\n", "")
        and "best possible (Bayes-optimal)" in text
    )
    assert "best possible accuracy" + 2 * "0.9000 ± 0.0134 (500 pairs)" in text
    assert "Training took 25.0 minutes, for 24,000 pairs and 300,000 tokens." in text
    notes = [node.text() for node in root.all(lambda node: node.tag == "title")]
    counts = [
        int(found[1])
        for note in notes
        if (found := re.fullmatch(r"-?[0-9.e+-]+: ([0-9]+) pairs?", note))
    ]
    assert len(counts) == 3 * 40 and sum(counts) == 3 * 500
    bins = [numbers(note) for note in notes if note.startswith("true")]
    assert sum(count for *_, count in bins) == 500
    low = [
        1 / (1 + math.exp(b - a))
        for a, b, t in zip(chosen, rejected, true)
        if 1 / (1 + math.exp(-t)) < 0.1
    ]
    assert bins[0][1] == pytest.approx(sum(low) / len(low), abs=1e-3) and bins[0][2] == len(low)


def table_of(page, heading):
    """Return the rows below the head of the table in the card with this heading, as texts."""
    cards = Tree(page).root.of_class("card")
    (card,) = [card for card in cards if card.children[0].text() == heading]
    rows = card.all(lambda node: node.tag == "tr")[1:]
    return [[cell.text() for cell in row.children] for row in rows]


def test_flags_are_shown_in_words(run_page):
    assert table_of(run_page, "Flags") == [
        ["--data_path", f"{visible(HOSTILE)} b.jsonl"],
        ["--data_split", "2,4,4.5"],
        ["--learning_rate", "0.0001"],
        ["--max_steps", "2000"],
        ["--resume", "no"],
        ["--offload", "yes"],
        ["--<flag>", "not given"],
    ]


def test_metrics_are_shown_in_words_without_counts_that_are_0(tmp_path):
    first, *steps, last = events_of_a_run(1)
    first |= {"ties": 0.0, "dropped": 0, "truncated": 0}
    last |= {"ties": 0.25, "dropped": 0, "truncated": 2, "margin": None}
    last["by"] = {"<chat>": {"accuracy": 0.5, "pairs": 2}, "code": {"accuracy": 1.0, "pairs": 498}}
    subsets = ["<chat>"] * 2 + ["code"] * 498
    numbers = numbers_of([1.0] * 500, [0.5] * 500, subset=subsets)
    report.run_page(tmp_path / "report.html", [first, *steps, last], [], numbers)
    assert table_of((tmp_path / "report.html").read_text(), "Evaluation") == [
        ["loss", "0.7000", "0.5000"],
        ["accuracy", *["0.7500 ± 0.0194 (500 pairs)"] * 2],
        ["mean score of the chosen", "1.0000", "1.0000"],
        ["mean score of the rejected", "-1.0000", "-1.0000"],
        ["mean margin", "2.0000", "not finite"],
        ["calibration error (ECE)", "0.1000", "0.1000"],
        ["pairs", "500", "500"],
        ["best possible accuracy", *["0.9000 ± 0.0134 (500 pairs)"] * 2],
        ["share of ties", "0.0000", "0.2500"],
        ["truncated", "0", "2"],
        ["accuracy on <chat>", "", "0.5000 ± 0.3536 (2 pairs)"],
        ["accuracy on code", "", "1.0000 ± 0.0020 (498 pairs)"],
    ]


def test_one_pair_and_one_step_are_singular(tmp_path):
    first, step, last = events_of_a_run(1)
    last["pairs"] = step["pairs"] = step["tokens"] = 1
    step["seconds"] = 0.9
    report.run_page(
        tmp_path / "report.html", [first, step, last], [], numbers_of([1.0], [0.5], [2.0])
    )
    text = Tree((tmp_path / "report.html").read_text()).root.text()
    assert "(1 pair)eval accuracy" in text and "0.5000eval loss1step" in text
    assert "Training took 1 second, for 1 pair and 1 token." in text
    assert re.search(r"true 0\.881, learned 0\.622, 1 pair(?!s)", text)
    assert re.search(r"accuracy 1\.0000 ± 0\.4714 \(1 pair\), mean confidence 0\.6225", text)


def y_axis_of(root):
    """Return the heights of the numbers at the y axis of a chart of accuracies, by number."""
    places = {}
    for node in root.iter("text"):
        if node.get("text-anchor") == "end" and re.fullmatch("[01][.0-9]*", node.text):
            places[float(node.text)] = float(node.get("y")) - 4
    return places


@pytest.mark.parametrize("lowest, is_shown", [(0.45, True), (0.55, True), (0.7, False)])
def test_guessing_is_a_line_in_the_accuracy_of_a_model_that_begins_there(lowest, is_shown):
    events = [
        {"step": step, "accuracy": accuracy, "loss": 0.5}
        for step, accuracy in [(0, lowest), (200, 0.8), (400, None), (600, 0.9)]
    ]
    charts = report.run_charts([], events, numbers_of([1.0], [0.5]))
    (svg,) = [svg for svg in charts if 'aria-label="Accuracy in evaluation"' in svg]
    root = ElementTree.fromstring(svg)
    texts = {node.text: float(node.get("y")) for node in root.iter("text")}
    assert ("guessing" in texts) == is_shown
    assert len(list(root.iter("circle"))) == 3
    axis = y_axis_of(root)
    assert (min(axis), max(axis)) == (0.4 if lowest < 0.5 else 0.5, 1.0)
    if is_shown:
        rules = [node for node in root.iter("line") if node.get("class") == "rule"]
        (rule,) = rules
        at = axis[1.0] + (axis[min(axis)] - axis[1.0]) * 0.5 / (1 - min(axis))
        assert float(rule.get("y1")) == float(rule.get("y2")) == pytest.approx(at, abs=0.1)


@pytest.mark.parametrize(
    "accuracies, pairs, lowest",
    [
        ([0.9071, 0.9068, 0.9073], 4000, 0.5),  # noise
        ([0.9, 0.95], 20, 0.5),
        ([0.45, 0.9], 4000, 0.4),
        ([0.0, 1.0], 1, 0.0),  # the error of 0.0000 ends at the axis
        ([0.5], 2, 0.0),
        ([None, None], 9, 0.5),
        ([], 9, 0.5),
    ],
)
def test_the_axis_of_accuracy_reaches_from_guessing_to_1_and_points_have_errors(
    accuracies, pairs, lowest
):
    events = []
    for step, accuracy in enumerate(accuracies):
        events.append({"step": step, "accuracy": accuracy, "pairs": pairs + 3})
    root = ElementTree.fromstring(report.accuracy_chart(events, undecided=3))
    places = y_axis_of(root)
    assert (min(places), max(places)) == (lowest, 1.0)
    unit = (places[lowest] - places[1.0]) / (1 - lowest)
    bars = [node.get("d") for node in root.iter("path") if "V" in node.get("d")]
    known = [accuracy for accuracy in accuracies if accuracy is not None]
    for accuracy, bar in zip(known, bars, strict=True):
        error = standard_error(accuracy, pairs)
        bottom, top = map(float, bar.partition(",")[2].split("V"))
        shown = min(accuracy + error, 1) - max(accuracy - error, 0)
        assert bottom - top == pytest.approx(shown * unit, abs=0.11)


def test_a_collapsed_model_is_called_so_on_the_page(tmp_path):
    path, events = tmp_path / "report.html", events_of_a_run(2)
    same = numbers_of([0.25, 0.25], [0.25, 0.25])
    report.run_page(path, events, [], same)
    said = "This model has collapsed: the scores of 4 responses have a standard deviation of 0, "
    assert said in Tree(path.read_text()).root.text()
    check_whole(path.read_text())
    report.run_page(path, events, [], numbers_of([0.26, 0.25], [0.25, 0.25]))
    assert "collapsed" not in path.read_text()


def test_the_page_has_accuracy_by_subset_ties_and_truncated_comparisons(tmp_path):
    events = events_of_a_run(2)
    by = {HOSTILE: {"accuracy": 0.25, "pairs": 1200}, "b": {"accuracy": None, "pairs": 3}}
    events[0] |= {"ties": 0.5, "truncated": 7}
    events[-1] |= {"ties": 0.125, "truncated": 7, "by": by}
    path = tmp_path / "report.html"
    known = {"subset": [HOSTILE] * 1200 + ["b"] * 3, "target": [1.0] * 1200 + [0.5] * 3}
    numbers = numbers_of(*scores_of_a_run(1203), **known)
    report.run_page(path, events, [], numbers)
    rows = table_of(path.read_text(), "Evaluation")
    assert ["share of ties", "0.5000", "0.1250"] in rows and ["truncated", "7", "7"] in rows
    assert ["accuracy", *["0.7500 ± 0.0125 (1,200 pairs)"] * 2] in rows
    found = "0.2500 ± 0.0125 (1,200 pairs)"
    assert [f"accuracy on {visible(HOSTILE)}", "", found] in rows
    assert ["accuracy on b", "", "none: every target is 0.5"] in rows
    events[0]["by"] = {"b": {"accuracy": 0.75, "pairs": 4}}
    report.run_page(path, events, [], numbers)
    rows = table_of(path.read_text(), "Evaluation")
    assert ["accuracy on b", "0.7500", "none: every target is 0.5"] in rows
    check_whole(path.read_text())


def test_metrics_of_an_older_version_still_make_a_page(tmp_path):
    """It had no ties, truncated or by; a run that resumes with this version has both kinds."""
    path = tmp_path / "report.html"
    report.run_page(path, events_of_a_run(2), [], numbers_of(*scores_of_a_run()))
    rows = table_of(path.read_text(), "Evaluation")
    assert ["accuracy", *["0.7500 ± 0.0194 (500 pairs)"] * 2] in rows
    assert not {"share of ties", "truncated"} & {row[0] for row in rows}
    events = events_of_a_run(2)
    events[-1]["ties"] = 0.5
    report.run_page(path, events, [], numbers_of(*scores_of_a_run()))
    assert ["share of ties", "", "0.5000"] in table_of(path.read_text(), "Evaluation")


def test_margins_and_reliability_are_of_decided_pairs_turned_to_the_preferred_response(tmp_path):
    path, targets = tmp_path / "report.html", [1.0, 0.2, 0.5, 0.5, 0.0]
    # Margins 1, 2 (reversed: -2), 3 and 4 (left out), -1 (reversed: 1)
    scores = [1.0, 2.0, 3.0, 4.0, 0.0], [0.0, 0.0, 0.0, 0.0, 1.0]
    report.run_page(path, events_of_a_run(2), [], numbers_of(*scores, target=targets))
    notes = [
        node.text() for node in Tree(path.read_text()).root.all(lambda node: node.tag == "title")
    ]
    bins = [numbers(note) for note in notes if note.startswith("confidence")]
    filled = {bin[0]: (bin[2], bin[4]) for bin in bins if bin[4]}
    assert filled == {0.7: (1.0, 2), 0.85: (0.0, 1)}  # sigmoid(1) is 0.73, sigmoid(2) 0.88
    (svg,) = Tree(path.read_text()).root.all(
        lambda node: node.tag == "svg" and node.attributes["aria-label"] == "Margins"
    )
    bars = [node.text() for node in svg.all(lambda node: node.tag == "title")]
    found = [numbers(bar) for bar in bars if not bar.endswith(": 0 pairs")]
    assert found == [[pytest.approx(-2, abs=0.1), 1], [pytest.approx(1, abs=0.1), 2]]
    # Without a decided pair there is a page, too.
    report.run_page(path, events_of_a_run(2), [], numbers_of([1.0], [0.0], target=[0.5]))
    assert "Reliability" in path.read_text()


def test_a_run_without_true_rewards_or_with_one_step_or_none(tmp_path):
    for events in (
        events_of_a_run(1),
        [event for event in events_of_a_run(1) if event["event"] == "step"],
        [],
    ):
        events = [
            {key: value for key, value in event.items() if key != "bayes_accuracy"}
            for event in events
        ]
        report.run_page(tmp_path / "report.html", events, [], numbers_of([1.0], [0.5]))
        page = (tmp_path / "report.html").read_text()
        assert (
            "better" not in page
            and "possible" not in page
            and Tree(page).root.all(lambda node: node.tag == "svg")
        )


def test_the_page_of_a_real_run(tmp_path, monkeypatch):
    """The page shows the numbers of metrics.jsonl, which train.py writes."""
    pairs = [
        {"prompt": c.prompt, "responses": c.responses}
        for c in itertools.islice(data.known_rewards(0), 40)
    ]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    arguments = [
        "--data_path",
        tmp_path / "pairs.jsonl",
        *["--n_layer", "1", "--n_head", "2", "--n_embd", "16", "--vocab_size", "400"],
        "--max_seq_len",
        "100",
        "--max_steps",
        "3",
        "--eval_fraction",
        "0.5",
        "--per_device_train_batch_size",
        "2",
        "--save_interval",
        "0",
        "--output_dir",
        tmp_path / "out",
        "--data_output_path",
        tmp_path / "cache",
    ]
    monkeypatch.setattr(sys, "argv", ["train.py", *map(str, arguments)])
    monkeypatch.setattr(train, "stop_signals", list)  # an interrupt stays pytest's
    train.main()
    events = [
        json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()
    ]
    report.run_page(tmp_path / "report.html", events, [("seed", 1)], numbers_of(*scores_of_a_run()))
    last = [event for event in events if event["event"] == "eval"][-1]
    text = Tree((tmp_path / "report.html").read_text()).root.text()
    for name, title in (
        ("loss", "loss"),
        ("accuracy", "accuracy"),
        ("margin", "mean margin"),
        ("ece", "calibration error (ECE)"),
    ):
        before = r"-?[0-9.]+"
        if name == "accuracy":
            before += r" ± [0-9.]+ \(500 pairs\)"
        assert re.search(rf"{re.escape(title)}{before}{last[name]:.4f}", text), name
