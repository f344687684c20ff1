"""The pages of report.py, read by parsers and by a browser: nothing in a data file becomes markup or moves the terminal's cursor,
and every number on a page is that of `rm.pairwise_loss`."""

import io
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
import sentencepiece
import torch

import data
import parts
import rm
import train
from parts import report
from model import GPT, GPTConfig

HOSTILE = (
    "</span><script>alert(1)</script> \"quoted\" 'single' & &amp; ]]> <!-- -->\x1b[31mred\x1b]0;title\x07\x9b2J\x00\x7f "
    "\u202edcba\u2066 \u2028 🙂🙃 שלום \r\n\ttab"
)


# ----------------------------------------------------------------------------------------------------------------------
# What the tests look at


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A small model with random weights whose rewards differ visibly. One of its tokens is markup; most hostile characters are several."""
    directory = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    texts = [c.prompt + c.responses[0] for c in itertools.islice(data.known_rewards(1), 200)]
    tokenizer = data.train_tokenizer(texts + [" <!-- "] * 200, 500)
    assert [] != [i for i in tokenizer.encode(HOSTILE) if "<!--" in tokenizer.decode([i])]
    config = GPTConfig(
        "llama", vocab_size=tokenizer.vocab_size, n_positions=400, n_layer=2, n_head=2, n_embd=16
    )
    model = rm.RewardModel(GPT(config), tokenizer.pad_id)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    model.save_pretrained(directory, tokenizer=tokenizer)
    return directory


ROWS = [
    {
        "prompt": "\n\nHuman: What is the capital of France?\n\nAssistant:",
        "chosen": " The capital of France is Paris.",
        "rejected": " The capital of France is Rome. So much for that. Anyway.",
    },
    {"prompt": HOSTILE, "chosen": HOSTILE + " a", "rejected": HOSTILE + HOSTILE},
    {"prompt": "Same?", "chosen": " Same.", "rejected": " Same."},
    {"chosen": "🙂", "rejected": "🙃"},  # they diverge within a character
    {"chosen": "One is the start", "rejected": "One is the start of the other"},
    {
        "prompt": "Which?",
        "responses": [" A best answer.", " Good.", "", " The worst of all answers."],
    },
    {"prompt": "Alone?", "response": " " + HOSTILE},
]


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("rows") / 'rows <script>&".jsonl'
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


@pytest.fixture(scope="module")
def page(checkpoint, file, tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "page.html"
    run_rm([checkpoint, file, "--html", path])
    return path.read_text(encoding="utf-8")


def run_rm(arguments, **environment):
    """The program of rm.py, in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["rm.py", *map(str, arguments)])
        for name in ("NO_COLOR", "FORCE_COLOR"):
            patch.delenv(name, raising=False)
        for name, value in environment.items():
            patch.setenv(name, value)
        rm.main()


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


def scores_of_a_run(pairs=500):
    true = torch.randn(pairs, generator=torch.manual_seed(0), dtype=torch.float64) * 2
    chosen = torch.randn(pairs, dtype=torch.float64)
    return (
        chosen.tolist(),
        (chosen - true - torch.randn(pairs, dtype=torch.float64)).tolist(),
        true.tolist(),
    )


@pytest.fixture(scope="module")
def run_page(tmp_path_factory):
    path = tmp_path_factory.mktemp("run") / "report.html"
    report.run_page(
        path,
        events_of_a_run(),
        {"data_path": [HOSTILE], "learning_rate": 1e-4, "<flag>": None},
        *scores_of_a_run(),
    )
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
    """Strict: every tag that is opened is closed, in its order."""

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


def rows_of(page):
    return Tree(page).root.having("data-row")


def whole_texts(row):
    responses = row.get("responses") or [
        row[key] for key in ("chosen", "rejected", "response") if key in row
    ]
    return [row.get("prompt", "") + response for response in responses]


# ----------------------------------------------------------------------------------------------------------------------
# Pages as markup


@pytest.mark.parametrize("name", ["page", "run_page"])
def test_a_page_is_whole_runs_nothing_and_loads_nothing(name, request):
    page = request.getfixturevalue(name)
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


def test_hostile_text_arrives_as_text(page, run_page):
    shown = report.visible(HOSTILE)
    assert (
        "␛[31mred␛]0;title␇⟨U+009B⟩2J␀␡ ⟨U+202E⟩dcba⟨U+2066⟩ ⟨U+2028⟩ 🙂🙃 שלום ␍↵\n⇥\ttab" in shown
    )
    assert shown in rows_of(page)[1].text() and shown in rows_of(page)[6].text()
    title = Tree(page).root.all(lambda node: node.tag == "title")[0].text()
    assert title == 'rows <script>&".jsonl: comparisons'
    text = Tree(run_page).root.text()
    assert report.visible(str([HOSTILE])) in text and "--<flag>" in text


def test_the_texts_of_tokens_joined_are_the_prompt_and_the_responses(page):
    for row, html in zip(ROWS, rows_of(page)):
        prompt, *responses = html.of_class("text")
        names = [
            re.sub(r"⟨(bos|eos|pad)⟩|[◆■]", "", re.sub("⟨pad⟩·*", "", text.text()))
            for text in (prompt, *responses)
        ]
        whole = whole_texts(row)
        assert [names[0] + name for name in names[1:]] == [report.visible(text) for text in whole]
        assert not row.get("prompt") or names[0] == report.visible(row["prompt"])


def test_a_token_has_its_place_its_name_and_its_mark(page):
    row = rows_of(page)[0]
    assert "⟨bos⟩" in row.of_class("prompt")[0].text()
    chosen, rejected = row.of_class("text")[1:]
    assert re.search(r" is( ◆|◆ ).*\.⟨eos⟩■⟨pad⟩·+$", chosen.text()) and re.search(
        r" is( ◆|◆ ).*\.⟨eos⟩■$", rejected.text()
    )
    ends = [len(text.having("title")) - len(text.of_class("mark")) for text in (chosen, rejected)]
    assert (
        ends[0]
        == ends[1]
        == int(row.having("data-stop")[0].attributes["data-stop"])
        - len(row.of_class("prompt")[0].having("title"))
    )
    lines = [path.attributes["d"].count(",") for path in row.all(lambda node: node.tag == "path")]
    texts = [len(text.having("title")) - len(text.of_class("mark")) for text in (chosen, rejected)]
    pads = len(chosen.of_class("pad"))
    assert pads > 2 and lines == [
        texts[0] - pads,
        pads + 1,
        texts[1],
        1,
    ]  # the traces: text, then from its last token on padding
    half = rows_of(page)[3].of_class(
        "text"
    )  # two emoji: the bytes that they share are shared tokens without a text
    assert [text.text() for text in half] == ["⟨bos⟩", "◆🙂⟨eos⟩■", "◆🙃⟨eos⟩■"] and half[
        0
    ].of_class("empty")


def test_the_numbers_on_the_page_are_those_of_pairwise_loss(page, checkpoint):
    model = rm.trained_model(checkpoint)
    tokenizer, losses, margins = data.load_tokenizer(checkpoint), [], []
    for row, html in zip(ROWS, rows_of(page)):
        comparison = data.parse_comparison(json.dumps(row).encode(), min_responses=1)
        sequences = data.tokenize(comparison, tokenizer, 400)
        found = [float(node.attributes["data-pair-loss"]) for node in html.having("data-pair-loss")]
        scores = [float(node.attributes["data-score"]) for node in html.having("data-score")]
        expected = []
        for (i, a), (j, b) in itertools.combinations(enumerate(sequences), 2):
            input_ids, mask = data.pad_rows([a, b], model.pad_id)
            with torch.no_grad():
                out = rm.pairwise_loss(
                    input_ids,
                    model.token_rewards(input_ids, mask),
                    model.pad_id,
                    attention_mask=mask,
                )
            expected.append(out["loss"].item())
            assert [scores[i], scores[j]] == pytest.approx(
                [out["chosen_mean_scores"].item(), out["rejected_mean_scores"].item()], abs=1e-5
            )
            margins.append(scores[i] - scores[j])
        assert len(expected) == len(found) and found == pytest.approx(expected, abs=1e-5)
        if expected:
            assert float(html.attributes["data-loss"]) == pytest.approx(
                sum(expected) / len(expected), abs=1e-5
            )
            losses.append(sum(expected) / len(expected))
        if len(expected) == 1:
            terms = [float(node.attributes["data-term"]) for node in html.having("data-term")]
            region = html.having("data-start")[0].attributes
            assert len(terms) == int(region["data-stop"]) - int(region["data-start"])
            assert sum(terms) / len(terms) == pytest.approx(expected[0], abs=1e-5)
            assert (
                f"loss {found[0]:.4f}" in html.text()
                and f"margin {margins[-1]:+.4f}" in html.text()
            )
            assert f"P(chosen preferred) {1 / (1 + math.exp(-margins[-1])):.3f}" in html.text()
    accuracy, margin, loss = (
        sum(m > 0 for m in margins) / len(margins),
        sum(margins) / len(margins),
        sum(losses) / len(losses),
    )
    assert (
        f"{len(margins)}pairs{accuracy:.4f}accuracy{margin:+.4f}mean margin{loss:.4f}mean loss"
        in Tree(page).root.text()
    )


def test_only_the_first_rows_are_computed_and_the_page_says_so(checkpoint, file, tmp_path):
    many = tmp_path / "many.jsonl"
    many.write_text(json.dumps(ROWS[0]) + "\n" + json.dumps(ROWS[4]) + "\n" + "not JSON\n" * 3)
    run_rm([checkpoint, many, "--html", tmp_path / "page.html", "--rows", 2])
    page = (tmp_path / "page.html").read_text()
    assert len(rows_of(page)) == 2 and "The first 2 of 5 rows" in Tree(page).root.text()
    many.write_text((json.dumps(ROWS[4]) + "\n") * 103)
    run_rm([checkpoint, many, "--html", tmp_path / "page.html"])
    page = (tmp_path / "page.html").read_text()
    assert len(rows_of(page)) == 100 and "The first 100 of 103 rows" in Tree(page).root.text()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["many.jsonl", "page.html"]


def test_long_comparisons_are_truncated_as_the_program_does(checkpoint, tmp_path):
    file = tmp_path / "long.jsonl"
    file.write_text(
        json.dumps({"prompt": "a b c d e f g h " * 8, "chosen": " yes", "rejected": " no, no, no"})
        + "\n"
    )
    run_rm(
        [
            checkpoint,
            file,
            "--html",
            tmp_path / "page.html",
            "--out",
            tmp_path / "scores.jsonl",
            "--max_seq_len",
            40,
        ]
    )
    (row,) = rows_of((tmp_path / "page.html").read_text())
    tokenizer = data.load_tokenizer(checkpoint)
    sequences = data.tokenize(next(data.load_comparisons(file)), tokenizer, 40)
    whole = data.tokenize(next(data.load_comparisons(file)), tokenizer, 10**6)
    prompt, chosen, rejected = row.of_class("text")
    assert len((prompt.having("title") + rejected.having("title"))) - 2 == len(sequences[1]) == 40
    assert f", and {len(whole[0]) - len(sequences[0])} more that truncation cut off" in row.text()
    assert re.sub("[◆■]", "", chosen.text()).startswith(" yes⟨eos⟩")
    assert "tokens of it cut off" not in row.text()
    scores = [float(node.attributes["data-score"]) for node in row.having("data-score")]
    assert scores == pytest.approx(
        json.loads((tmp_path / "scores.jsonl").read_text())["scores"], abs=1e-5
    )


def tokenizer_of(kind, checkpoint, directory):
    """Of all kinds that differ in how they decode."""
    if kind == "of the checkpoint":
        return data.load_tokenizer(checkpoint)
    if kind == "sentencepiece":
        return data.load_tokenizer(checkpoint / "tokenizer.model")
    if kind == "sentencepiece with a space in front":  # as Llama 2
        model = io.BytesIO()
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(["some words for a small vocabulary"] * 9),
            model_writer=model,
            model_type="bpe",
            vocab_size=300,
            hard_vocab_limit=False,
            byte_fallback=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            minloglevel=2,
        )
        return data.Tokenizer(model.getvalue())
    tokenizers = pytest.importorskip("tokenizers")
    backend = tokenizers.ByteLevelBPETokenizer()  # as GPT-2
    backend.train_from_iterator(
        ["some words for a small vocabulary"], 300, special_tokens=["<|endoftext|>"]
    )
    backend.save_model(str(directory))
    return data.load_tokenizer(directory)


def test_margin_of_a_row_is_in_its_loss_and_in_its_terms(checkpoint, tmp_path):
    file, model, tokenizer = (
        tmp_path / "rows.jsonl",
        rm.trained_model(checkpoint),
        data.load_tokenizer(checkpoint),
    )
    file.write_text(
        "".join(
            json.dumps({"prompt": "a ", "chosen": "b c", "rejected": "d", "margin": margin}) + "\n"
            for margin in (0, 1.5)
        )
    )
    run_rm([checkpoint, file, "--html", tmp_path / "page.html"])
    ids, mask = data.pad_rows(
        data.tokenize(next(data.load_comparisons(file)), tokenizer, 400), model.pad_id
    )
    for margin, row in zip((0, 1.5), rows_of((tmp_path / "page.html").read_text()), strict=True):
        with torch.no_grad():
            expected = rm.pairwise_loss(
                ids,
                model.token_rewards(ids, mask),
                model.pad_id,
                attention_mask=mask,
                margins=[margin],
            )["loss"].item()
        terms = [float(node.attributes["data-term"]) for node in row.having("data-term")]
        assert [
            float(node.attributes["data-pair-loss"]) for node in row.having("data-pair-loss")
        ] == pytest.approx([expected], abs=1e-5)
        assert sum(terms) / len(terms) == pytest.approx(expected, abs=1e-5) and (
            "− 1.5)" in row.text()
        ) == bool(margin)


def test_responses_that_are_too_long_themselves(checkpoint, tmp_path):
    file = tmp_path / "long.jsonl"
    file.write_text(
        json.dumps({"prompt": "a b c d", "chosen": " e f" * 30, "rejected": " g"}) + "\n"
    )
    run_rm([checkpoint, file, "--html", tmp_path / "page.html", "--max_seq_len", 20])
    (row,) = rows_of((tmp_path / "page.html").read_text())
    tokenizer = data.load_tokenizer(checkpoint)
    prompt, chosen = (len(tokenizer.encode(text)) for text in ("a b c d", "a b c d" + " e f" * 30))
    assert (
        f"shared prompt, 1 token, and {prompt} more that truncation cut off" in row.text()
    )  # bos alone is left
    assert f"{chosen - prompt - 18} tokens of it cut off" in row.text()


@pytest.mark.parametrize(
    "kind", ["of the checkpoint", "sentencepiece", "sentencepiece with a space in front", "bytes"]
)
def test_token_texts_join_to_the_text_whatever_the_tokenizer(kind, checkpoint, tmp_path):
    tokenizer = tokenizer_of(kind, checkpoint, tmp_path)
    bos = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    for text in [
        "",
        "a",
        " a  b",
        "words for  words",
        HOSTILE,
        "🙂",
        "日本語",
        "\ufffd",
        "x\ufffd\ufffdy",
    ]:
        ids = tokenizer.encode(text)
        texts = report.token_texts(tokenizer, [*bos, *ids, tokenizer.eos_id])
        assert (
            len(texts) == len(bos) + len(ids) + 1
            and texts[-1] in ("⟨bos⟩", "⟨eos⟩")
            and "".join(texts[len(bos) : -1]) == text
        )
    cut = tokenizer.encode("a🙂")[:-1]  # in the middle of a character
    assert "".join(report.token_texts(tokenizer, cut)) == tokenizer.decode(cut)


def test_a_text_of_a_thousand_tokens_takes_no_time(checkpoint):
    tokenizer = data.load_tokenizer(checkpoint)
    ids = tokenizer.encode("日本語 and words " * 200)
    windows = []
    decode = tokenizer.decode
    tokenizer.decode = lambda ids: windows.append(len(ids)) or decode(ids)
    assert (
        "".join(report.token_texts(tokenizer, ids)) == "日本語 and words " * 200 and len(ids) > 1000
    )
    assert max(windows) < 10  # a few tokens are decoded at a time, not all up to here


# ----------------------------------------------------------------------------------------------------------------------
# The terminal


def test_the_terminal_shows_the_same_text_with_and_without_colours(checkpoint, file, capsys):
    run_rm([checkpoint, file, "--show"], FORCE_COLOR="1")
    colored = capsys.readouterr().out
    assert set(re.findall("\x1b[^m]*m", colored)) <= {
        f"\x1b[{code}m" for code in (0, 1, 2, *(f"38;5;16;48;5;{shade}" for shade in report.ANSI))
    }
    assert len(set(re.findall("48;5;[0-9]+", colored))) > 3
    plain = re.sub("\x1b\\[[0-9;]*m", "", colored)
    for environment in (
        {},
        {"NO_COLOR": "1", "FORCE_COLOR": "1"},
    ):  # here the output is no terminal
        run_rm([checkpoint, file, "--show"], **environment)
        assert capsys.readouterr().out == plain
    assert not re.search(
        "[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", plain
    )  # no control character of the data; nor any other
    for row, shown in zip(ROWS, re.split("row [0-9]+  prompt of ", plain)[1:]):
        prompt, *responses = re.split(
            "(?:chosen|rejected|response|rank [0-9])  score -?[0-9.]+\n", shown
        )
        prompt = prompt.split("\n", 1)[1][:-1]
        responses = [
            re.sub("⟨(bos|eos|pad)⟩|[◆■]", "", re.sub("■(⟨pad⟩·*)?\n(?s:.*)", "", text))
            for text in responses
        ]
        whole = whole_texts(row)
        assert [prompt.replace("⟨bos⟩", "") + text for text in responses] == [
            report.visible(text) for text in whole
        ]


def test_a_background_ends_with_its_line(checkpoint, file, capsys):
    """Where a line ends inside of a token, the colour would otherwise fill the rest of the screen."""
    run_rm([checkpoint, file, "--show"], FORCE_COLOR="1")
    for line in capsys.readouterr().out.split("\n"):
        codes = re.findall("\x1b\\[([0-9;]*)m", line)
        assert codes[1::2] == ["0"] * (len(codes) // 2) and len(codes) % 2 == 0


def test_the_numbers_in_the_terminal_are_those_of_the_page(checkpoint, file, page, capsys):
    run_rm([checkpoint, file, "--show"], NO_COLOR="1")
    out = capsys.readouterr().out
    assert [float(x) for x in re.findall("loss ([0-9.]+), the mean over", out)] == pytest.approx(
        [
            float(node.attributes["data-pair-loss"])
            for node in Tree(page).root.having("data-pair-loss")
        ],
        abs=1e-4,
    )
    assert [float(x) for x in re.findall("  score (-?[0-9.]+)", out)] == pytest.approx(
        [float(node.attributes["data-score"]) for node in Tree(page).root.having("data-score")],
        abs=1e-4,
    )


# ----------------------------------------------------------------------------------------------------------------------
# The program around them


def test_scores_are_written_as_before_where_out_is_given_and_only_then(
    checkpoint, file, tmp_path, capsys
):
    run_rm([checkpoint, file])
    before = capsys.readouterr()
    run_rm(
        [
            checkpoint,
            file,
            "--show",
            "--html",
            tmp_path / "page.html",
            "--out",
            tmp_path / "scores.jsonl",
            "--rows",
            1,
        ]
    )
    after = capsys.readouterr()
    assert (tmp_path / "scores.jsonl").read_text() == before.out and len(
        before.out.splitlines()
    ) == len(ROWS)
    assert after.out.startswith("row 1") or "row 1" in after.out.splitlines()[0]
    assert (
        '"scores"' not in after.out
        and after.out.count("chosen") == 1
        and len(rows_of((tmp_path / "page.html").read_text())) == 1
    )
    run_rm([checkpoint, file, "--html", tmp_path / "page.html"])
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--html", "."], "argument --html: found .; expected a file in a directory that exists"),
        (
            ["--html", "no/page.html"],
            "argument --html: found no/page.html; expected a file in a directory that exists",
        ),
        (
            ["--html", "FILE"],
            "argument --html: found FILE, which is the file to score; give another",
        ),
        (
            ["--html", "x", "--out", "./x"],
            "argument --html: found x, which is that of --out; give another",
        ),
        (["--rows", "3"], "argument --rows: found 3; expected 1 or more, and --html or --show"),
        (
            ["--show", "--rows", "0"],
            "argument --rows: found 0; expected 1 or more, and --html or --show",
        ),
    ],
)
def test_what_cannot_be_done_is_said_in_one_line(
    arguments, message, checkpoint, file, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        run_rm([checkpoint, file, *(str(file) if a == "FILE" else a for a in arguments)])
    assert stop.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1] == "rm.py: error: " + message.replace(
        "FILE", str(file)
    )
    assert not list(tmp_path.iterdir())


def test_an_error_leaves_the_page_of_before(checkpoint, tmp_path):
    file, page = tmp_path / "rows.jsonl", tmp_path / "page.html"
    file.write_text(json.dumps(ROWS[0]) + "\n{}\n")
    page.write_text("before")
    with pytest.raises(SystemExit, match="rows.jsonl:2: fields found: none"):
        run_rm([checkpoint, file, "--html", page])
    assert page.read_text() == "before" and len(list(tmp_path.iterdir())) == 2


def test_without_the_module_its_flags_say_so_and_the_others_work(
    checkpoint, file, monkeypatch, capsys
):
    monkeypatch.delattr(parts, "report")
    monkeypatch.setitem(sys.modules, "parts.report", None)
    with pytest.raises(SystemExit) as stop:
        run_rm([checkpoint, file, "--show"])
    assert (
        stop.value.code
        == "rm.py: error: --html and --show need parts/report.py, which is not there; put it beside rm.py, or leave them out"
    )
    run_rm([checkpoint, file])
    assert len(capsys.readouterr().out.splitlines()) == len(ROWS)


# ----------------------------------------------------------------------------------------------------------------------
# Charts and the page of a run


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


def test_a_curve_has_gaps_where_there_is_no_number_and_none_of_nothing():
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


def test_a_long_run_makes_a_small_page(tmp_path):
    report.run_page(tmp_path / "report.html", events_of_a_run(20_000), {}, *scores_of_a_run())
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
    error = sum(abs(numbers(note)[2] - numbers(note)[3]) * numbers(note)[4] for note in notes) / 500
    margins = torch.tensor(chosen, dtype=torch.float64) - torch.tensor(
        rejected, dtype=torch.float64
    )
    assert len(notes) == 10 and sum(numbers(note)[4] for note in notes) == 500
    assert error == pytest.approx(train.calibration_error(margins), abs=2e-4)


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
        "Probability that the chosen one is better",
        "Learning rate",
        "Gradient norm, before clipping",
    ):
        assert root.all(
            lambda node: node.tag == "svg" and node.attributes["aria-label"] == heading
        ), heading
    assert (
        "0.7500eval accuracy0.9000the best possible" in text.replace("\n", "")
        and "best possible (Bayes-optimal)" in text
    )
    assert "bayes_accuracy0.90000.9000" in text and "24,000 pairs, 300,000 tokens, 25.0 min" in text
    notes = [node.text() for node in root.all(lambda node: node.tag == "title")]
    counts = [
        int(found[1])
        for note in notes
        if (found := re.fullmatch(r"-?[0-9.e+-]+: ([0-9]+) pairs", note))
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
        report.run_page(tmp_path / "report.html", events, {}, [1.0], [0.5])
        page = (tmp_path / "report.html").read_text()
        assert (
            "better" not in page
            and "possible" not in page
            and Tree(page).root.all(lambda node: node.tag == "svg")
        )


def test_the_page_of_a_real_run(checkpoint, tmp_path, monkeypatch):
    """metrics.jsonl as train.py writes it."""
    pairs = [
        {"prompt": c.prompt, "responses": c.responses}
        for c in itertools.islice(data.known_rewards(0), 40)
    ]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    arguments = [
        "--data_path",
        tmp_path / "pairs.jsonl",
        "--model_name_or_path",
        checkpoint,
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
    monkeypatch.setattr(train.signal, "signal", lambda *_: None)  # an interrupt stays pytest's
    train.main()
    events = [
        json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()
    ]
    report.run_page(tmp_path / "report.html", events, {"seed": 1}, *scores_of_a_run())
    last = [event for event in events if event["event"] == "eval"][-1]
    text = Tree((tmp_path / "report.html").read_text()).root.text()
    for name in ("loss", "accuracy", "margin", "ece"):
        assert re.search(rf"{name}-?[0-9.]+{last[name]:.4f}", text), name


# ----------------------------------------------------------------------------------------------------------------------
# In a browser


PROBE = """<!doctype html><meta charset="utf-8"><body style="margin:0"><script>
function look(frame) {
  const doc = frame.contentDocument, root = doc.documentElement, view = frame.contentWindow;
  doc.querySelectorAll("details").forEach(one => one.open = true);
  const rgb = color => color.match(/[0-9.]+/g).map(Number);
  const linear = c => (c /= 255) <= .04045 ? c / 12.92 : ((c + .055) / 1.055) ** 2.4;
  const light = color => rgb(color).slice(0, 3).reduce((sum, c, i) => sum + linear(c) * [.2126, .7152, .0722][i], 0);
  let worst = 99, where = "", overflow = [];
  for (const node of doc.querySelectorAll("body *:not(style):not(svg):not(svg *)")) {
    if (node.getBoundingClientRect().right > root.clientWidth + 1 && !node.closest(".scroll")) overflow.push(node.tagName + "." + node.className);
    if (![...node.childNodes].some(child => child.nodeType == 3 && child.data.trim())) continue;
    let behind = node;
    while (behind && (rgb(view.getComputedStyle(behind).backgroundColor)[3] ?? 1) == 0) behind = behind.parentElement;
    const [a, b] = [light(view.getComputedStyle(node).color), light(view.getComputedStyle(behind).backgroundColor)].sort((x, y) => y - x);
    if ((a + .05) / (b + .05) < worst) { worst = (a + .05) / (b + .05); where = node.outerHTML.slice(0, 90); }
  }
  return {clientWidth: root.clientWidth, scrollWidth: root.scrollWidth, overflow, worst, where,
          page: view.getComputedStyle(doc.body).backgroundColor};
}
onload = () => { document.body.textContent = "RESULT" + JSON.stringify([...document.querySelectorAll("iframe")].map(look)) + "END"; };
</script>FRAMES</body>"""


@pytest.mark.skipif(
    not shutil.which("chromium"), reason="needs chromium (apt-get install chromium)"
)
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_pages_fit_and_can_be_read_in_a_browser(scheme, page, run_page, tmp_path):
    """Narrow and wide: nothing wider than the window but what scrolls in its own box; on every shade text of WCAG's contrast, 4.5 to 1."""
    legend = (
        '<div class="text">'
        + "".join(
            f'<span class="s{n}">{n}</span>' for n in range(-report.LEVELS, report.LEVELS + 1)
        )
        + "</div>"
    )
    (tmp_path / "page.html").write_text(page.replace("</main>", legend + "</main>"))
    (tmp_path / "run.html").write_text(run_page)
    frames = [(name, width) for name in ("page", "run") for width in (360, 1400)]
    (tmp_path / "probe.html").write_text(
        PROBE.replace(
            "FRAMES",
            "".join(
                f'<iframe src="{name}.html" style="border:0;display:block;width:{width}px;height:900px"></iframe>'
                for name, width in frames
            ),
        )
    )
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
    for (name, width), seen in zip(frames, json.loads(unescape(found[1])), strict=True):
        assert (
            seen["clientWidth"] == width and seen["scrollWidth"] <= width and seen["overflow"] == []
        ), (name, width, seen)
        assert seen["worst"] >= 4.5, (name, width, seen)
        assert seen["page"] == {"light": "rgb(247, 247, 245)", "dark": "rgb(20, 21, 24)"}[scheme]
