"""Comparisons token by token: no text of a data file becomes markup or moves the cursor of a
terminal, and every number is that of `rm.pairwise_loss`."""

import io
import itertools
import json
import math
import re
import sys

import pytest
import sentencepiece
import torch

import data
import rm
from model import GPT, GPTConfig
from parts.guards import visible
from parts.report import LEVELS
from parts.test_report import (
    HOSTILE,
    NEEDS_CHROMIUM,
    SCHEMES,
    Tree,
    check_in_a_browser,
    check_whole,
)
from tools import pairs_page, score
from tools.test_score import chat_checkpoint  # noqa: F401


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Save a small model with random weights, whose rewards differ visibly.

    One of its tokens is markup; most hostile characters are several tokens.
    """
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
    {"prompt": HOSTILE, "chosen": "a " + HOSTILE, "rejected": "b " + HOSTILE + HOSTILE},
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
    run_program([checkpoint, file, "--html", path])
    return path.read_text(encoding="utf-8")


def run_program(arguments, **environment):
    """Run the program of `python rm.py` in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["rm.py", *map(str, arguments)])
        for name in ("NO_COLOR", "FORCE_COLOR"):
            patch.delenv(name, raising=False)
        for name, value in environment.items():
            patch.setenv(name, value)
        score.main()


def rows_of(page):
    return Tree(page).root.having("data-row")


def whole_texts(row):
    responses = row.get("responses") or [
        row[key] for key in ("chosen", "rejected", "response") if key in row
    ]
    return [row.get("prompt", "") + response for response in responses]


# --------------------------------------------------------------------------------------------------
# The page


def test_the_page_is_whole_runs_nothing_and_loads_nothing(page):
    check_whole(page)


@NEEDS_CHROMIUM
@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_page_fits_and_can_be_read_in_a_browser(scheme, page, tmp_path):
    """Text can be read on every shade, too."""
    spans = "".join(f'<span class="s{n}">{n}</span>' for n in range(-LEVELS, LEVELS + 1))
    page = page.replace("</main>", f'<div class="text">{spans}</div></main>')
    check_in_a_browser(page, scheme, tmp_path)


def test_hostile_text_arrives_as_text(page):
    shown = visible(HOSTILE)
    assert (
        "␛[31mred␛]0;title␇⟨U+009B⟩2J␀␡ ⟨U+202E⟩dcba⟨U+2066⟩ ⟨U+2028⟩ 🙂🙃 שלום ␍↵\n⇥\ttab" in shown
    )
    assert shown in rows_of(page)[1].text() and shown in rows_of(page)[6].text()
    title = Tree(page).root.all(lambda node: node.tag == "title")[0].text()
    assert title == 'rows <script>&".jsonl: comparisons'


def test_the_texts_of_tokens_joined_are_the_prompt_and_the_responses(page):
    for row, html in zip(ROWS, rows_of(page)):
        prompt, *responses = html.of_class("text")
        names = [
            re.sub(r"⟨(bos|eos|pad)⟩|[◆■]", "", re.sub("⟨pad⟩·*", "", text.text()))
            for text in (prompt, *responses)
        ]
        whole = whole_texts(row)
        assert [names[0] + name for name in names[1:]] == [visible(text) for text in whole]
        assert not row.get("prompt") or names[0] == visible(row["prompt"])


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
    model = score.trained_model(checkpoint)
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
    count = len(margins)
    error = math.sqrt(accuracy * (1 - accuracy) / count)
    figures = f"{count}pairs{accuracy:.4f} ± {error:.4f} ({count} pairs)accuracy"
    ties = sum(m == 0 for m in margins)
    if ties:
        figures += f"{ties}tie" + "s" * (ties > 1)
    figures += f"{margin:+.4f}mean margin{loss:.4f}mean loss"
    assert figures in Tree(page).root.text()


def test_a_collapsed_model_is_called_so(checkpoint, file, page, tmp_path):
    """With a value head of 0 all pairs are ties."""
    model = rm.RewardModel.from_pretrained(checkpoint)
    torch.nn.init.zeros_(model.v_head.weight)
    model.save_pretrained(tmp_path, tokenizer=data.load_tokenizer(checkpoint))
    run_program([tmp_path, file, "--html", tmp_path / "page.html"])
    text = Tree((tmp_path / "page.html").read_text()).root.text()
    assert "11pairs0.0000 ± 0.0803 (11 pairs)accuracy11ties+0.0000mean margin" in text
    said = "This model has collapsed: the scores of 15 responses have a standard deviation of 0, "
    assert said in text and "collapsed" not in page


def test_a_row_of_one_chosen_and_several_rejected_texts(checkpoint, tmp_path, capsys):
    """The chosen response stands beside each of the others, which are not compared."""
    responses = ROWS[5]["responses"]
    rows = [
        {"prompt": "Which?", "chosen": responses[:1], "rejected": responses[1:]},
        {"prompt": "Which?", "responses": responses},
    ]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    run_program([checkpoint, file, "--show", "--html", tmp_path / "page.html"])
    tree = Tree((tmp_path / "page.html").read_text())
    found, ranking = tree.root.having("data-row")
    pairs = [
        [float(node.attributes["data-pair-loss"]) for node in html.having("data-pair-loss")]
        for html in (found, ranking)
    ]
    assert len(pairs[1]) == 6 and pairs[0] == pairs[1][:3]
    names = [row.children[0].text() for row in found.all(lambda node: node.tag == "tr")[1:]]
    assert names == [f"chosen > rejected {i}" for i in (1, 2, 3)]
    scores = [float(node.attributes["data-score"]) for node in found.having("data-score")]
    share = float(scores[0] > max(scores[1:]))
    expected = f"{share:.4f} ± 0.4714 (1 row)chosen scores highest"
    assert expected in tree.root.text()
    shown = capsys.readouterr().out
    assert "chosen over rejected 3: loss" in shown and "rejected 1 over" not in shown


def test_positions_that_the_loss_reads_are_said_in_words(page):
    """ROWS[2] has identical responses, whose loss reads one position, the last."""
    for row in rows_of(page):
        for node in row.having("data-start"):
            start, stop = (int(node.attributes[f"data-{name}"]) for name in ("start", "stop"))
            words = f"positions {start} to {stop - 1}"
            if stop == start + 1:
                words = f"position {start}"
            assert f"The loss reads {words}: from where" in node.text()
            assert f"over {stop - start} position" in node.text()
    assert "over 1 position: 0.6931." in rows_of(page)[2].text()
    ranking = rows_of(page)[5]
    rows = ranking.all(lambda node: node.tag == "tr")[1:]
    right = sum(float(row.children[2].text()) > 0 for row in rows)
    assert f"{right} of 6 pairs ranked right" in ranking.text()


def test_one_row_and_one_pair_are_singular(checkpoint, tmp_path):
    (tmp_path / "one.jsonl").write_text(json.dumps(ROWS[0]) + "\n")
    run_program([checkpoint, tmp_path / "one.jsonl", "--html", tmp_path / "page.html"])
    text = Tree((tmp_path / "page.html").read_text()).root.text()
    assert "1pair" in text and "This page shows the only row of" in text


def test_only_the_first_rows_are_computed_and_the_page_says_so(checkpoint, file, tmp_path):
    many = tmp_path / "many.jsonl"
    many.write_text(json.dumps(ROWS[0]) + "\n" + json.dumps(ROWS[4]) + "\n" + "not JSON\n" * 3)
    run_program([checkpoint, many, "--html", tmp_path / "page.html", "--rows", 2])
    page = (tmp_path / "page.html").read_text()
    assert len(rows_of(page)) == 2 and "the first 2 of 5 rows" in Tree(page).root.text()
    many.write_text((json.dumps(ROWS[4]) + "\n") * 103)
    run_program([checkpoint, many, "--html", tmp_path / "page.html"])
    page = (tmp_path / "page.html").read_text()
    assert len(rows_of(page)) == 100 and "the first 100 of 103 rows" in Tree(page).root.text()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["many.jsonl", "page.html"]


def test_long_comparisons_are_truncated_as_for_their_scores(checkpoint, tmp_path):
    file = tmp_path / "long.jsonl"
    file.write_text(
        json.dumps({"prompt": "a b c d e f g h " * 8, "chosen": " yes", "rejected": " no, no, no"})
        + "\n"
    )
    run_program(
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
    """Return a tokenizer of each kind that decodes in its own way."""
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
        score.trained_model(checkpoint),
        data.load_tokenizer(checkpoint),
    )
    file.write_text(
        "".join(
            json.dumps({"prompt": "a ", "chosen": "b c", "rejected": "d", "margin": margin}) + "\n"
            for margin in (0, 1.5)
        )
    )
    run_program([checkpoint, file, "--html", tmp_path / "page.html"])
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


def test_target_of_a_row_is_in_its_loss_and_in_its_terms(checkpoint, tmp_path, capsys):
    """Against the cross-entropy of PyTorch; and what is said of the outcome, and counted."""
    file, targets = tmp_path / "rows.jsonl", (1.0, 0.75, 0.5, 0.25, 0.0)
    row = {"prompt": "a ", "chosen": "b c", "rejected": "d"}
    file.write_text("".join(json.dumps(row | {"target": p}) + "\n" for p in targets))
    run_program([checkpoint, file, "--html", tmp_path / "page.html", "--show"])
    shown = capsys.readouterr().out.split("\nrow ")
    model, tokenizer = score.trained_model(checkpoint), data.load_tokenizer(checkpoint)
    sequences = data.tokenize(next(data.load_comparisons(file)), tokenizer, 400)
    ids, mask = data.pad_rows(sequences, model.pad_id)
    with torch.no_grad():
        rewards = model.token_rewards(ids, mask)
    start, stop = rm.divergent_region(*sequences)
    logits = rewards[0, start:stop] - rewards[1, start:stop]
    page = (tmp_path / "page.html").read_text()
    said = []
    for target, html, words in zip(targets, rows_of(page), shown, strict=True):
        expected = torch.nn.functional.binary_cross_entropy_with_logits(
            logits, torch.full_like(logits, target), reduction="none"
        ).tolist()
        terms = [float(node.attributes["data-term"]) for node in html.having("data-term")]
        assert terms == pytest.approx(expected, abs=1e-5)
        loss = sum(expected) / len(expected)
        (found,) = html.having("data-pair-loss")
        assert float(found.attributes["data-pair-loss"]) == pytest.approx(loss, abs=1e-5)
        note = "" if target == 1 else f" at target {target:g}"
        assert f"loss {loss:.4f}{note}, the mean over" in words
        assert f"loss {loss:.4f}{note}" in html.text()
        assert ("target" in html.text()) == (target != 1)
        formula = f"−({target:g} logsigmoid(d) + {1 - target:g} logsigmoid(−d))"
        assert (formula in html.text()) == (target != 1)
        said.append(re.search("[✓✗] the|neither response is preferred", html.text())[0])
    right, wrong = "✓ the", "✗ the"
    if rewards[0, len(sequences[0]) - 1] < rewards[1, len(sequences[1]) - 1]:
        right, wrong = wrong, right
    assert said == [right, right, "neither response is preferred", wrong, wrong]
    assert "5pairs0.5000 ± 0.2500 (4 pairs)accuracy" in Tree(page).root.text()


def test_responses_that_are_too_long_themselves(checkpoint, tmp_path):
    file = tmp_path / "long.jsonl"
    file.write_text(
        json.dumps({"prompt": "a b c d", "chosen": " e f" * 30, "rejected": " g"}) + "\n"
    )
    run_program([checkpoint, file, "--html", tmp_path / "page.html", "--max_seq_len", 20])
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
        texts = pairs_page.token_texts(tokenizer, [*bos, *ids, tokenizer.eos_id])
        assert (
            len(texts) == len(bos) + len(ids) + 1
            and texts[-1] in ("⟨bos⟩", "⟨eos⟩")
            and "".join(texts[len(bos) : -1]) == text
        )
    cut = tokenizer.encode("a🙂")[:-1]  # in the middle of a character
    assert "".join(pairs_page.token_texts(tokenizer, cut)) == tokenizer.decode(cut)


def test_a_text_of_a_thousand_tokens_is_decoded_a_few_tokens_at_a_time(checkpoint):
    tokenizer = data.load_tokenizer(checkpoint)
    ids = tokenizer.encode("日本語 and words " * 200)
    windows = []
    decode = tokenizer.decode
    tokenizer.decode = lambda ids: windows.append(len(ids)) or decode(ids)
    assert (
        "".join(pairs_page.token_texts(tokenizer, ids)) == "日本語 and words " * 200
        and len(ids) > 1000
    )
    assert max(windows) < 10  # a few tokens are decoded at a time, not all up to here


def test_special_tokens_of_a_template_have_names_and_no_text(chat_checkpoint, tmp_path, capsys):
    """Names stand apart from a user's text; the prompt reaches up to the answer."""
    user = [{"role": "user", "content": "the cat <b>"}]
    answers = [[{"role": "assistant", "content": text}] for text in ("a mat", "a log")]
    file = tmp_path / "rows.jsonl"
    rows = [{"prompt": user, "chosen": answers[0], "rejected": answers[1]}]
    rows.append({"prompt": user, "response": answers[0]})
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    run_program([chat_checkpoint, file, "--html", tmp_path / "page.html"])
    start = "⟨|im_start|⟩user\nthe cat <b>⟨eos⟩\n⟨|im_start|⟩assistant\n"
    for row, expected in zip(
        rows_of((tmp_path / "page.html").read_text()),
        ([start, "a mat⟨eos⟩", "a log⟨eos⟩"], [start, "a mat⟨eos⟩"]),
        strict=True,
    ):
        shown = [re.sub("[◆■·]|⟨pad⟩", "", node.text()) for node in row.of_class("text")]
        assert [text.replace("↵", "") for text in shown] == expected
        names = [node.text() for node in row.of_class("name")]
        assert set(names) <= {"⟨|im_start|⟩", "⟨eos⟩", "⟨pad⟩"}
        assert names.count("⟨|im_start|⟩") == 2
        assert row.of_class("empty") == []
    run_program([chat_checkpoint, file, "--show"])
    assert start.replace("\n", "↵\n") in capsys.readouterr().out


def test_token_texts_of_a_dialogue_join_to_what_the_template_renders(chat_checkpoint):
    tokenizer = data.load_tokenizer(chat_checkpoint)
    contents = ["", " a  b", HOSTILE, "🙂日本", "\n\n"]
    dialogue = [{"role": "user", "content": content} for content in contents]
    text = tokenizer.render(dialogue)
    texts = pairs_page.token_texts(tokenizer, tokenizer.encode(text))
    shown = text.replace("<|im_start|>", "⟨|im_start|⟩").replace("<|im_end|>", "⟨eos⟩")
    assert "".join(texts) == shown


# --------------------------------------------------------------------------------------------------
# The terminal


def test_the_terminal_shows_the_same_text_with_and_without_colours(checkpoint, file, capsys):
    run_program([checkpoint, file, "--show"], FORCE_COLOR="1")
    colored = capsys.readouterr().out
    assert set(re.findall("\x1b[^m]*m", colored)) <= {
        f"\x1b[{code}m"
        for code in (0, 1, 2, *(f"38;5;16;48;5;{shade}" for shade in pairs_page.ANSI))
    }
    assert len(set(re.findall("48;5;[0-9]+", colored))) > 3
    plain = re.sub("\x1b\\[[0-9;]*m", "", colored)
    for environment in (
        {},
        {"NO_COLOR": "1", "FORCE_COLOR": "1"},
    ):  # here the output is no terminal
        run_program([checkpoint, file, "--show"], **environment)
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
            visible(text) for text in whole
        ]


def test_the_last_lines_in_the_terminal_explain_the_signs(checkpoint, file, tmp_path, capsys):
    run_program([checkpoint, file, "--show"])
    diverge, ends = capsys.readouterr().out.splitlines()[-2:]
    assert diverge.startswith("◆ the responses diverge") and ends.startswith("■ a response ends")
    (tmp_path / "one.jsonl").write_text(json.dumps(ROWS[6]) + "\n")
    run_program([checkpoint, tmp_path / "one.jsonl", "--show"])
    assert "◆" not in capsys.readouterr().out  # a response alone diverges from nothing


def test_a_background_ends_with_its_line(checkpoint, file, capsys):
    """A line may end inside a token: its colour would else fill the rest of the screen."""
    run_program([checkpoint, file, "--show"], FORCE_COLOR="1")
    for line in capsys.readouterr().out.split("\n"):
        codes = re.findall("\x1b\\[([0-9;]*)m", line)
        assert codes[1::2] == ["0"] * (len(codes) // 2) and len(codes) % 2 == 0


def test_the_numbers_in_the_terminal_are_those_of_the_page(checkpoint, file, page, capsys):
    run_program([checkpoint, file, "--show"], NO_COLOR="1")
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


# --------------------------------------------------------------------------------------------------
# The program around them


def test_a_page_replaces_the_scores_unless_out_is_given(checkpoint, file, tmp_path, capsys):
    run_program([checkpoint, file])
    before = capsys.readouterr()
    run_program(
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
    run_program([checkpoint, file, "--html", tmp_path / "page.html"])
    said = capsys.readouterr()
    assert said.out == ""
    assert f"{tmp_path}/page.html: a page of {len(ROWS)} rows\n" in said.err


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
def test_flags_that_do_not_go_together_are_an_error_of_one_line(
    arguments, message, checkpoint, file, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        run_program([checkpoint, file, *(str(file) if a == "FILE" else a for a in arguments)])
    assert stop.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1] == "rm.py: error: " + message.replace(
        "FILE", str(file)
    )
    assert not list(tmp_path.iterdir())


def test_an_error_leaves_the_earlier_page(checkpoint, tmp_path):
    file, page = tmp_path / "rows.jsonl", tmp_path / "page.html"
    file.write_text(json.dumps(ROWS[0]) + "\n{}\n")
    page.write_text("before")
    with pytest.raises(SystemExit, match="rows.jsonl:2: fields found: none"):
        run_program([checkpoint, file, "--html", page])
    assert page.read_text() == "before" and len(list(tmp_path.iterdir())) == 2
