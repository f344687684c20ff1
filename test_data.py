"""The specification of data.py: what rows mean, which files are refused and how, and how text becomes token ids."""

import collections
import gzip
import io
import itertools
import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import torch

import data
from data import Comparison


# ----------------------------------------------------------------------------------------------------------------------
# Rows

U, A, S = (
    {"role": role, "content": content}
    for role, content in [("user", "hi"), ("assistant", "A"), ("system", "Be brief.")]
)
B, C, MORE = A | {"content": "B"}, A | {"content": "C"}, U | {"content": "More?"}
HI, SAYS_A, SAYS_B = (
    "\n\nHuman: hi",
    "\n\nAssistant: A",
    "\n\nAssistant: B",
)  # the template's text of U, A and B
ROWS = {  # name: (a row of a file, the prompt that it means, the responses that it means)
    "text (rm-static)": (
        {"prompt": HI, "response": " A", "chosen": " A", "rejected": " B", "score": 1},
        HI,
        [" A", " B"],
    ),
    "whole dialogues (hh-rlhf)": (
        {"chosen": HI + SAYS_A, "rejected": HI + SAYS_B},
        "",
        [HI + SAYS_A, HI + SAYS_B],
    ),
    "whole dialogues of messages": (
        {"chosen": [U, A], "rejected": [U, B]},
        "",
        [HI + SAYS_A, HI + SAYS_B],
    ),
    "prompt and responses of messages (TRL)": (
        {"prompt": [U], "chosen": [A], "rejected": [B]},
        HI,
        [SAYS_A, SAYS_B],
    ),
    "several turns": (
        {"prompt": [U, A, MORE], "chosen": [B, MORE | {"content": "Why?"}, C], "rejected": [A]},
        HI + SAYS_A + "\n\nHuman: More?",
        [SAYS_B + "\n\nHuman: Why?\n\nAssistant: C", SAYS_A],
    ),
    "text prompt repeated in messages (UltraFeedback)": (
        {"prompt": "hi", "chosen": [U, A], "rejected": [U, B], "score_chosen": 8.0},
        "",
        [HI + SAYS_A, HI + SAYS_B],
    ),
    "the same after a system message": (
        {"prompt": "hi", "chosen": [S, U, A], "rejected": [S, U, B]},
        "",
        ["Be brief." + HI + SAYS_A, "Be brief." + HI + SAYS_B],
    ),
    "system message": (
        {"prompt": [S, U], "chosen": [A], "rejected": [B]},
        "Be brief." + HI,
        [SAYS_A, SAYS_B],
    ),
    "text prompt, responses of messages": (
        {"prompt": "hi", "chosen": [A], "rejected": [B]},
        HI,
        [SAYS_A, SAYS_B],
    ),
    "prompt of messages, text responses": (
        {"prompt": [U], "chosen": "A", "rejected": "B"},
        HI,
        [SAYS_A, SAYS_B],
    ),
    "ranking": (
        {"prompt": "p", "responses": ["best", "middle", "worst"]},
        "p",
        ["best", "middle", "worst"],
    ),
    "ranking of messages": (
        {"prompt": [U], "responses": [[B], [C], [A]]},
        HI,
        [SAYS_B, "\n\nAssistant: C", SAYS_A],
    ),
    # U+2028 and U+0085 end a line for str.splitlines, but not in JSON lines.
    "text as it is": (
        {"prompt": " \t😀\u2028", "chosen": "é\u0085 \0", "rejected": ""},
        " \t😀\u2028",
        ["é\u0085 \0", ""],
    ),
}


def lines(rows) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


KINDS = {  # name: (file name, rows -> content)
    "JSON lines": ("a.jsonl", lines),
    "compressed": ("a.jsonl.gz", lines),
    "JSON lines in .json": ("a.json", lines),
    "array over lines": ("a.json", lambda rows: json.dumps(rows, indent=2, ensure_ascii=False)),
    "array in one line": ("a.json", json.dumps),
    "byte order mark": ("a.jsonl", lambda rows: "\ufeff" + lines(rows)),
    "blank lines": ("a.jsonl", lambda rows: "\n \t\n" + lines(rows).replace("\n", "\n\n")),
    "byte order mark and blank lines, array": (
        "a.json",
        lambda rows: "\ufeff\n \n" + json.dumps(rows, indent=2) + "\n\n",
    ),
    "lines that end in CR LF": (
        "a.jsonl",
        lambda rows: lines(rows).replace("\n", "\r\n").rstrip("\r\n"),
    ),
}


def load(path, content: str | bytes, **options) -> list[Comparison]:
    content = content.encode() if isinstance(content, str) else content
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return list(data.load_comparisons(path, **options))


@pytest.mark.parametrize("file, content", KINDS.values(), ids=KINDS.keys())
def test_every_kind_of_file_gives_the_same_comparisons(tmp_path, file, content):
    rows = [row for row, _, _ in ROWS.values()]
    assert load(tmp_path / file, content(rows)) == [
        Comparison(prompt, responses) for _, prompt, responses in ROWS.values()
    ]


def test_a_single_response_is_a_row_only_where_asked_for(tmp_path):
    assert load(tmp_path / "a.jsonl", '{"prompt": "p", "response": "r"}', min_responses=1) == [
        Comparison("p", ["r"])
    ]
    with pytest.raises(ValueError, match="prompt, response; expected chosen and rejected"):
        load(tmp_path / "a.jsonl", '{"prompt": "p", "response": "r"}')


@pytest.mark.parametrize(
    "row, margin",
    [('"margin": 1.5', 1.5), ('"margin": -2', -2.0), ('"margin": null', 0.0), ('"other": 1', 0.0)],
)
def test_margin_of_a_pair_goes_with_it_to_the_tokens(tmp_path, tokenizer, row, margin):
    file = tmp_path / "rows.jsonl"
    file.write_text(
        '{"prompt": "a", "chosen": "b", "rejected": "c", %s}\n{"prompt": "a", "chosen": "c", "rejected": "b"}\n'
        % row
    )
    assert [comparison.margin for comparison in data.load_comparisons(file)] == [margin, 0.0]
    tokens = data.tokenize_file(file, tokenizer, 64, "left", tmp_path / "cache")
    both = data.select([tokens], np.array([[0, 1], [0, 0]]))
    assert [both[i].margin for i in range(2)] == [0.0, margin]
    assert data.tokenize_all(data.load_comparisons(file), tokenizer, 64)[0].margin == margin


@pytest.mark.parametrize(
    "row, words",
    [
        (
            '"chosen": "b", "rejected": "c", "margin": "1"',
            "margin: found text; expected a number between -1e30 and 1e30",
        ),
        (
            '"chosen": "b", "rejected": "c", "margin": NaN',
            "margin: found nan; expected a number between -1e30 and 1e30",
        ),
        (
            '"chosen": "b", "rejected": "c", "margin": true',
            "margin: found true or false; expected a number between -1e30 and 1e30",
        ),
        (
            '"responses": ["b", "c", "d"], "margin": 1',
            "margin: found with 3 responses; a margin is between two",
        ),
    ],
)
def test_bad_margin(tmp_path, row, words):
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", %s}\n' % row)
    with pytest.raises(ValueError, match=f"rows.jsonl:1: {re.escape(words)}"):
        list(data.load_comparisons(tmp_path / "rows.jsonl"))


def test_a_later_turn_with_the_words_of_the_prompt_does_not_repeat_it(tmp_path):
    (comparison,) = load(
        tmp_path / "a.jsonl", lines([{"prompt": [U], "chosen": [A, U, B], "rejected": [A, U]}])
    )
    assert comparison.prompt + comparison.responses[0] == HI + SAYS_A + HI + SAYS_B


# ----------------------------------------------------------------------------------------------------------------------
# Files that are refused

GOOD = b'{"prompt": "p", "chosen": "a", "rejected": "b"}\n'


def row3(found, **row):
    return "a.jsonl", GOOD + b"\n" + json.dumps(row).encode(), 3, found


BAD = {  # name: (file name, content, line or None, what was found)
    "empty": ("a.jsonl", b"", None, "no row"),
    "empty array": ("a.json", b"[ ]", None, "no row"),
    "not gzip": ("a.jsonl.gz", GOOD, 1, "not gzip"),
    "gzip, its checksum wrong": ("a.jsonl.gz", gzip.compress(GOOD)[:-8] + bytes(8), 2, "damaged"),
    "gzip without the suffix": ("a.jsonl", gzip.compress(GOOD), 1, "not UTF-8"),
    "Latin-1": ("a.jsonl", GOOD + b'{"chosen": "\xe9"}', 2, "not UTF-8"),
    "Latin-1 in an array": ("a.json", b"[" + GOOD + b"," + GOOD + b',"\xe9"]', 3, "not UTF-8"),
    "UTF-16": ("a.jsonl", GOOD.decode().encode("utf-16"), 1, "not UTF-8"),
    "broken JSON": (
        "a.jsonl",
        GOOD * 2 + b'{"prompt" "p"}\n' + GOOD,
        3,
        "not JSON (Expecting ':' delimiter, column 11)",
    ),
    "last row cut": ("a.jsonl", GOOD + GOOD[:-9], 2, "not JSON"),
    "one object over lines": ("a.json", b'{\n"prompt": "p"}', 1, "not JSON"),
    "array without a comma": (
        "a.json",
        b"[\n" + GOOD + GOOD + b"]",
        3,
        "not JSON (Expecting ',' delimiter, column 1)",
    ),
    "two arrays": ("a.json", b"[" + GOOD + b"]\n[]", 3, "not JSON (Extra data"),
    "array with a number": (
        "a.json",
        b"[\n\n" + GOOD + b",\n3]",
        5,
        "expected an object, found a number",
    ),
    "array in .jsonl": (
        "a.jsonl",
        b"[" + GOOD.strip() + b"]",
        1,
        "expected an object, found a list",
    ),
    "no fields": row3("fields found: none"),
    "other fields": row3("fields found: question, answer", question="q", answer="a"),
    "no rejected": row3("rejected: expected text, found null or nothing", prompt="p", chosen="a"),
    "prompt null": row3("prompt: expected text, found null", prompt=None, chosen="a", rejected="b"),
    "number for text": row3(
        "chosen: expected text, found a number", prompt="p", chosen=1, rejected="b"
    ),
    "ranking without a prompt": row3("prompt is missing", responses=["a", "b"]),
    "ranking of one": row3("responses: found 1", prompt="p", responses=["a"]),
    "ranking that is text": row3("responses: found text", prompt="p", responses="ab"),
    "ranking with a number": row3(
        "responses[1]: expected text, found a number", prompt="p", responses=["a", 2]
    ),
    "unknown role": row3(
        'chosen[1]: found role "tool"', chosen=[U, {"role": "tool", "content": "t"}], rejected=[B]
    ),
    "no role": row3(
        "rejected[0]: found role null", chosen=[A], rejected=[{"from": "human", "value": "v"}]
    ),
    "no content": row3(
        "chosen[0].content: expected text, found null", chosen=[{"role": "user"}], rejected=[B]
    ),
    "text for a message": row3("chosen[0]: found text", chosen=["a"], rejected=[B]),
    "lone surrogate": row3(
        "chosen: character 2 is half of a surrogate pair", chosen="ab\ud800", rejected="b"
    ),
}


@pytest.mark.parametrize(
    "file, content, line, found",
    [
        *(pytest.param(*case, id=name) for name, case in BAD.items()),
        ("a.json", b"[" + GOOD + b",]", 2, "not JSON"),
        ("a.json", b"[" * 100_000, 1, "not JSON"),
        ("a.jsonl", GOOD + b"[" * 100_000, 2, "not JSON"),
        ("a.jsonl", GOOD + b"9" * 5000, 2, "not JSON"),
    ],
)
def test_bad_file(tmp_path, file, content, line, found):
    """A ValueError that starts with the file and the line, and says what was found there."""
    (tmp_path / file).write_bytes(content)
    with pytest.raises(ValueError) as error:
        list(data.load_comparisons(tmp_path / file))
    assert str(error.value).startswith(
        f"{tmp_path / file}: " if line is None else f"{tmp_path / file}:{line}: "
    )
    assert found in str(error.value)


def test_bad_path(tmp_path):
    for path, found in [(tmp_path / "none.jsonl", "no such file"), (tmp_path, "is a directory")]:
        with pytest.raises(ValueError, match=f"^{re.escape(str(path))}: {found}"):
            list(data.load_comparisons(path))


def test_rows_are_read_one_by_one(tmp_path):
    """So the second row may be written after the first came out, and both come out before the third, which is broken."""
    path = tmp_path / "a.jsonl"
    path.write_bytes(GOOD)
    rows = data.load_comparisons(path)
    assert next(rows) == Comparison("p", ["a", "b"])
    path.write_bytes(GOOD + GOOD.replace(b'"p"', b'"new"') + b"!")
    assert next(rows) == Comparison("new", ["a", "b"])
    with pytest.raises(ValueError, match="a.jsonl:3: "):
        next(rows)


def test_cut_gzip(tmp_path):
    """Of a download that broke off the whole rows come out; then the error names the line after them."""
    path, rng, count = tmp_path / "a.jsonl.gz", random.Random(0), 0
    rows = b"".join(
        GOOD.replace(b'"p"', b'"%s"' % rng.randbytes(200).hex().encode()) for _ in range(2000)
    )
    path.write_bytes(gzip.compress(rows)[:200_000])
    with pytest.raises(ValueError) as error:
        for count, _ in enumerate(data.load_comparisons(path), start=1):
            pass
    assert str(error.value).startswith(f"{path}:{count + 1}: cannot be decompressed")
    assert 500 < count < 1500


# ----------------------------------------------------------------------------------------------------------------------
# --data_split


@pytest.mark.parametrize(
    "n, shares, bounds",
    [
        (10, [0, 1, 0], [0, 0, 10, 10]),  # the default: everything is ours
        (11, [6, 2, 2], [0, 7, 9, 11]),  # 6.6, 2.2, 2.2
        (
            8,
            [1, 1, 1],
            [0, 2, 5, 8],
        ),  # 2.67 each, rounded 3, 6, 9: one too many, taken off every boundary but the first
        (7, [1, 1, 1], [0, 3, 5, 7]),  # 2.33 each, rounded 2, 4, 6: one too few
        (5, [1, 1], [0, 3, 5]),  # 2.5 each, rounded to even: 2, 4
        (3, [1, 1], [0, 1, 3]),  # 1.5 each, rounded to even: 2, 4
        (1, [1, 1, 1], [0, 1, 1, 1]),
        (3, [0, 1, 1], [0, -1, 1, 3]),  # as there: -1 counts from the end, and stage 2 gets nothing
    ],
)
def test_split_is_deepspeed_chats(n, shares, bounds):
    """Boundaries worked by hand; and a shuffle by numbers, since NumPy has frozen the stream of RandomState."""
    order = np.arange(n, dtype=np.uint32)
    np.random.RandomState(1234).shuffle(order)
    assert n != 10 or order.tolist() == [7, 2, 9, 1, 0, 8, 4, 5, 6, 3]
    for stage in range(len(shares)):
        indices = data.split_indices(n, shares, stage, seed=1234)
        assert indices.dtype == np.uint32
        assert indices.tolist() == order[bounds[stage] : bounds[stage + 1]].tolist()


@pytest.mark.parametrize(
    "shares", [[1, 1, 1], [2, 4, 4], [0.6, 0.2, 0.2], [3, 5, 7, 11], [1, 0, 1]]
)
def test_stages_are_disjoint_and_cover_everything(shares):
    for n in (1, 2, 3, 10, 101, 997):
        stages = [
            data.split_indices(n, shares, stage, seed=n).tolist() for stage in range(len(shares))
        ]
        assert sorted(itertools.chain(*stages)) == list(range(n))
        assert all(
            abs(len(stage) - n * share / sum(shares)) <= len(shares)
            for stage, share in zip(stages, shares)
        )


# ----------------------------------------------------------------------------------------------------------------------
# Tokenizer

TEXTS = [
    "the cat sat on the mat\n\nHuman: hello\n\nAssistant: ab ab ab\tcab",
    "a  dog, and a log",
] * 20


@pytest.fixture(scope="module")
def tokenizer():
    return data.train_tokenizer(TEXTS, 400)


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "  two  spaces  ",
        "\n\nHuman: a\n\n",
        "\ta\t",
        "\r\n",
        "\0a\0",
        "😀👨\u200d👩\u200d👧",
        "日本 жщ ß",
        "e\u0301 é ﬁ ①",
        "<s></s><pad><unk><0x41>",
        "\ufeff\u2028\u00a0\u0085",
        "QXZ{}~",
    ],
)
def test_round_trip_is_lossless(tokenizer, text):
    """Characters that were not in the training text are spelled in bytes. No text makes a special id."""
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert all(4 <= i < tokenizer.vocab_size for i in ids)


def test_trained_tokenizer_has_fixed_special_ids(tokenizer):
    pieces = sentencepiece.SentencePieceProcessor(model_proto=tokenizer.model_proto)
    assert [pieces.id_to_piece(i) for i in range(5)] == ["<pad>", "<s>", "</s>", "<unk>", "<0x00>"]
    assert (tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id) == (0, 1, 2)
    assert tokenizer.vocab_size == tokenizer.text_size == pieces.get_piece_size()


@pytest.mark.parametrize("special", [0, 1, 2, 3, 400])
def test_special_ids_have_no_text(tokenizer, special):
    """Nor have the ids beyond the vocabulary that an embedding of more rows has."""
    assert tokenizer.decode([special, *tokenizer.encode("a cat"), special, special]) == "a cat"


def test_training_is_reproducible_and_vocab_size_an_upper_bound(tokenizer):
    assert data.train_tokenizer(iter(TEXTS), 400).model_proto == tokenizer.model_proto
    assert tokenizer.vocab_size < 400  # so much the text supports
    assert data.train_tokenizer(TEXTS, 50_000).vocab_size == tokenizer.vocab_size
    assert data.train_tokenizer(TEXTS, 290).vocab_size == 290
    for vocab_size in (8, 256, 260):  # 4 special ids and 256 bytes are 260, before any letter
        with pytest.raises(ValueError, match=f"^{vocab_size} ids are too few .*; 282 would do"):
            data.train_tokenizer(TEXTS, vocab_size)


def sentencepiece_model(**options) -> bytes:
    model = io.BytesIO()
    options = (
        dict(
            model_type="bpe",
            vocab_size=300,
            byte_fallback=True,
            hard_vocab_limit=False,
            minloglevel=2,
        )
        | options
    )
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS), model_writer=model, **options
    )
    return model.getvalue()


PADS = [  # options of a sentencepiece model, the pad id that is asked for, and what pad_id, bos_id, eos_id, vocab_size become
    (dict(pad_id=3), None, 3, 1, 2, 300),
    (dict(pad_id=-1), None, 300, 1, 2, 301),  # no pad (Llama)
    (dict(pad_id=-1, pad_piece="</s>"), None, 300, 1, 2, 301),  # pad is eos
    (dict(pad_id=-1, pad_piece="<s>"), None, 300, 1, 2, 301),  # pad is bos
    (dict(pad_id=3, bos_id=-1, eos_id=1, unk_id=0), None, 3, None, 1, 300),
    (dict(pad_id=-1, bos_id=-1, eos_id=-1), None, 300, None, None, 301),
    (dict(pad_id=-1), 2, 2, 1, 2, 300),  # --pad_id, as DeepSpeed-Chat has it for OPT
    (dict(pad_id=3), 5, 5, 1, 2, 300),  # an id of text: as padding it has none
    (dict(pad_id=3), 310, 310, 1, 2, 311),
]


@pytest.mark.parametrize("options, given, pad_id, bos_id, eos_id, vocab_size", PADS)
def test_pad_is_the_given_one_or_the_tokenizers_own_or_new(
    tmp_path, options, given, pad_id, bos_id, eos_id, vocab_size
):
    """A new id, right after the vocabulary, where text or its end could be mistaken for padding. Saving keeps them all."""
    (tmp_path / "tokenizer.model").write_bytes(sentencepiece_model(**options))
    (tmp_path / "saved").mkdir()
    data.load_tokenizer(tmp_path / "tokenizer.model", given).save(tmp_path / "saved")
    for loaded in (data.load_tokenizer(tmp_path, given), data.load_tokenizer(tmp_path / "saved")):
        assert (loaded.pad_id, loaded.bos_id, loaded.eos_id, loaded.vocab_size) == (
            pad_id,
            bos_id,
            eos_id,
            vocab_size,
        )
        assert loaded.decode([*loaded.encode("a dog"), pad_id, pad_id]) == "a dog"
    assert data.load_tokenizer(tmp_path / "saved", pad_id=5).pad_id == 5


@pytest.mark.parametrize(
    "file, content, found",
    [
        *(
            (
                "tokenizer.model",
                lambda model, share=share: model[: int(share * len(model))],
                "damaged",
            )
            for share in (0.9, 0.5, 0.01)
        ),
        ("tokenizer.model", lambda model: b"", "damaged"),
        *(
            ("tokenizer_config.json", lambda model, config=config: config, "")
            for config in (b"{", b"[]", b'{"pad_token_id": "x"}', b'{"pad_token_id": -1}')
        ),
    ],
)
def test_damaged_tokenizer_file(tmp_path, tokenizer, file, content, found):
    with pytest.raises(ValueError, match=f"^{tmp_path}: no tokenizer in this directory"):
        data.load_tokenizer(tmp_path)
    tokenizer.save(tmp_path)
    (tmp_path / file).write_bytes(content(tokenizer.model_proto))
    with pytest.raises(ValueError, match=f"^{tmp_path}/{file}: .*{found}"):
        data.load_tokenizer(tmp_path)


@pytest.mark.parametrize("pad_id", [None, 2, 450])
def test_what_was_saved_is_read_without_the_library(tmp_path, monkeypatch, tokenizer, pad_id):
    """With the same ids, whether parts/ was there to add its files or not."""
    tokenizer = data.Tokenizer(tokenizer.model_proto, pad_id)
    for name in ("with", "without"):
        if name == "without":
            monkeypatch.setitem(sys.modules, "parts.hf_tokenizer", None)
        (tmp_path / name).mkdir()
        tokenizer.save(tmp_path / name)
    assert sorted(file.name for file in (tmp_path / "without").iterdir()) == [
        "tokenizer.model",
        "tokenizer_config.json",
    ]
    for name in ("with", "without"):
        loaded = data.load_tokenizer(tmp_path / name)
        assert all(
            getattr(loaded, key) == getattr(tokenizer, key)
            for key in ("pad_id", "bos_id", "eos_id", "text_size", "vocab_size")
        )
        assert loaded.encode(TEXTS[0]) == tokenizer.encode(TEXTS[0])


@pytest.mark.parametrize(
    "file, beside",
    [
        ("tokenizer.json", None),
        ("vocab.json", None),
        ("tokenizer.model", "tokenizer_config.json"),
        ("tokenizer.model", "special_tokens_map.json"),
        ("tokenizer.model", "added_tokens.json"),
    ],
)
def test_what_only_the_library_can_read(tmp_path, monkeypatch, file, beside):
    monkeypatch.setitem(sys.modules, "parts.hf_tokenizer", None)
    for name in (file, beside or file):
        (tmp_path / name).write_text("{}")
    with pytest.raises(
        ValueError,
        match=f"^{tmp_path}/{file}: reading it and the files beside it needs parts/hf_tokenizer.py",
    ):
        data.load_tokenizer(tmp_path)


# ----------------------------------------------------------------------------------------------------------------------
# Sequences


class Letters:
    """A tokenizer with one token a letter, so that a test shows what is cut. < is bos, > eos, _ pad."""

    def __init__(self, bos_id="<", eos_id=">", pad_id="_"):
        self.bos_id, self.eos_id, self.pad_id = (
            letter and ord(letter) for letter in (bos_id, eos_id, pad_id)
        )

    def encode(self, text):
        return list(map(ord, text))

    def fingerprint(self):
        return repr(vars(self))


def letters(groups):
    return [["".join(map(chr, ids)) for ids in group] for group in groups]


def sequences(prompt, *responses, max_seq_len=99, side="left", **special):
    return letters(
        [data.tokenize(Comparison(prompt, list(responses)), Letters(**special), max_seq_len, side)]
    )[0]


def test_a_sequence_is_bos_text_eos():
    assert sequences("p:", "ab", "c") == ["<p:ab>", "<p:c>"]
    assert sequences("p:", "ab", "c", bos_id=None) == ["p:ab>", "p:c>"]
    assert sequences("p:", "ab", "c", eos_id=None) == ["<p:ab", "<p:c"]
    assert sequences("p:", "ab", "c", eos_id="_") == [
        "<p:ab",
        "<p:c",
    ]  # an eos that is the pad could not be told from it
    assert sequences("p:", "ab", "c", bos_id="_") == [
        "_p:ab>",
        "_p:c>",
    ]  # num_padding_at_beginning 1
    assert sequences("", "", "c") == ["<>", "<c>"]
    with pytest.raises(
        ValueError, match=r"responses\[1\] .* empty"
    ):  # no token that could have a reward
        sequences("", "c", "", bos_id=None, eos_id=None)


def test_truncation_worked_by_hand():
    """Left: bos and eos stay; every response loses as many tokens, out of what all share, until the longest fits; then ends
    go. Right: the end goes, eos with it (DeepSpeed-Chat's tokenizer call)."""
    assert sequences("prompt", "ab", "c", max_seq_len=10) == ["<promptab>", "<promptc>"]
    assert sequences("prompt", "ab", "c", max_seq_len=8) == ["<omptab>", "<omptc>"]
    assert sequences("p", "abcd", "xy", max_seq_len=5) == ["<abc>", "<xy>"]
    assert sequences("p", "abx", "aby", max_seq_len=4) == [
        "<bx>",
        "<by>",
    ]  # what the responses share is shared too
    assert sequences("pq", "", "abc", max_seq_len=5) == ["<>", "<abc>"]
    assert sequences("pq", "a", "b", "cd", max_seq_len=5) == ["<qa>", "<qb>", "<qcd>"]
    assert sequences("pq", "abc", max_seq_len=4) == [
        "<ab>"
    ]  # a single response shares with others its prompt, and no more
    assert sequences("prompt", "ab", "c", max_seq_len=9, side="right") == ["<promptab", "<promptc>"]
    assert sequences("prompt", "ab", "c", max_seq_len=4, side="right") == ["<pro", "<pro"]


def truncate_token_by_token(prompt, texts, bos, eos, max_seq_len, side):
    """The contract's rule, one token after the other."""
    cut = lambda rows, size: [row[:-1] if len(row) > size else row for row in rows]  # noqa: E731
    if side == "right":
        rows = [bos + text + eos for text in texts]
        while max(map(len, rows)) > max_seq_len:
            rows = cut(rows, max_seq_len)
        return rows
    room = max_seq_len - len(bos + eos)
    while (
        max(map(len, texts)) > room
        and all(texts)
        and len({text[0] for text in texts}) == 1
        and (len(texts) > 1 or prompt)
        and (bos or eos or min(map(len, texts)) > 1)
    ):  # every sequence keeps a token
        texts, prompt = [text[1:] for text in texts], prompt[1:]
    while max(map(len, texts)) > room:
        texts = cut(texts, room)
    return [bos + text + eos for text in texts]


@pytest.mark.parametrize("side", ["left", "right"])
def test_truncation_against_token_by_token(side):
    rng = random.Random(0)
    for _ in range(4000):
        bos_id, eos_id = rng.choice(["<", None]), rng.choice([">", None, "_"])
        bos, eos = bos_id or "", ">" if eos_id == ">" else ""
        least = 0 if bos or eos else 1
        prompt, *responses = (
            "".join(rng.choices("ab", k=rng.randint(least, 7))) for _ in range(rng.randint(2, 5))
        )
        texts, max_seq_len = [prompt + response for response in responses], rng.randint(2, 16)
        found = sequences(
            prompt, *responses, max_seq_len=max_seq_len, side=side, bos_id=bos_id, eos_id=eos_id
        )
        assert found == truncate_token_by_token(prompt, texts, bos, eos, max_seq_len, side)
        if side == "left" and (bos or eos) and max_seq_len > 2:
            assert (len(set(found)) > 1) == (
                len(set(texts)) > 1
            )  # responses that differ stay different: no pair is lost


def test_prompt_and_response_are_encoded_as_one_string():
    """A token may reach across the boundary, as it does when the model reads text."""
    tokenizer = data.train_tokenizer(["ab", "ab c", "cab"] * 9, 300)
    (ab,), (c,) = tokenizer.encode("ab"), tokenizer.encode("c")
    assert data.tokenize(Comparison("a", ["b", "bc"]), tokenizer, 9) == [[1, ab, 2], [1, ab, c, 2]]


def test_tokenize_all_drops_and_counts_identical_sequences():
    comparisons = [
        Comparison("p", ["same", "same"], [1.0, 0.0]),
        Comparison("p", ["a", "b"], [2.0, 1.0]),
        Comparison(
            "longer", ["a", "b"], [3.0, 2.0]
        ),  # <longe and <longe, once the right side is cut
        Comparison("p", ["a", "a", "b"]),  # two of a ranking are the same, and not all
    ]
    kept = data.tokenize_all(comparisons, Letters(), 6, "right")
    assert letters(groups_of(kept)) == [["<pa>", "<pb>"], ["<pa>", "<pa>", "<pb>"]]
    assert (len(kept), kept.dropped) == (2, 2)
    assert [(kept[i].rewards, kept[i].where) for i in range(2)] == [
        ([2.0, 1.0], "built-in comparison 2"),
        (None, "built-in comparison 4"),
    ]
    assert data.tokenize_all(comparisons, Letters(), 6, "left").dropped == 1


# ----------------------------------------------------------------------------------------------------------------------
# Token files


def write(path, comparisons):
    """A file of comparisons, with blank lines; rows that are None are none."""
    rows = [
        {"prompt": c.prompt, "responses": c.responses} if c else {"prompt": "p"}
        for c in comparisons
    ]
    content = (
        json.dumps(rows, indent=1) if path.suffix == ".json" else lines(rows).replace("\n", "\n\n")
    )
    path.write_bytes(gzip.compress(content.encode()) if path.suffix == ".gz" else content.encode())
    return path


def built_in(n: int, seed: int = 3) -> list[Comparison]:
    return [Comparison(c.prompt, c.responses) for c, _ in zip(data.known_rewards(seed), range(n))]


def groups_of(file) -> list[list[list[int]]]:
    return [file[row].sequences for row in range(len(file))]


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.json"])
def test_token_file_is_mapped_and_has_what_tokenize_gives(tmp_path, tokenizer, name):
    """Row by row, so that --data_split counts as DeepSpeed-Chat does: an identical pair is a row, of no sequences."""
    comparisons = (
        built_in(5)
        + [Comparison("p", ["a", "a"]), Comparison("p", ["a", "b", "a"])]
        + built_in(4, seed=4)
    )
    path = write(tmp_path / name, comparisons)
    file = data.tokenize_file(path, tokenizer, 90, "left", tmp_path / "cache")
    assert groups_of(file) == [
        data.tokenize(c, tokenizer, 90) if i != 5 else [] for i, c in enumerate(comparisons)
    ]
    text = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    assert file.rows["line"].tolist() == [
        i for i, line in enumerate(text.split(b"\n"), start=1) if line.lstrip().startswith(b"{")
    ]
    assert all(
        isinstance(array, np.memmap) and array.mode == "r"
        for array in (file.tokens, file.sequences, file.rows)
    )
    assert file.tokens.dtype == np.int32 and len(file.tokens) == sum(
        len(sequence) for group in groups_of(file) for sequence in group
    )


def test_data_of_two_files_drops_and_counts_among_the_selected_rows(tmp_path):
    same = Comparison("p", ["x", "x"])
    files = [
        data.tokenize_file(
            write(tmp_path / name, comparisons), Letters(), 99, "left", tmp_path / "cache"
        )
        for name, comparisons in [
            ("a.jsonl", [same, Comparison("p", ["a", "b"]), same]),
            ("b.jsonl", [Comparison("q", ["c", "d"]), same, Comparison("r", ["e", "f"])]),
        ]
    ]
    kept = data.select(files, np.array([[1, 2], [0, 1], [1, 1], [1, 0], [0, 2]]))
    assert letters(groups_of(kept)) == [["<re>", "<rf>"], ["<pa>", "<pb>"], ["<qc>", "<qd>"]]
    assert kept.dropped == 2
    assert [kept[i].where for i in range(3)] == [
        f"{tmp_path}/b.jsonl:5",
        f"{tmp_path}/a.jsonl:3",
        f"{tmp_path}/b.jsonl:1",
    ]
    other = [
        data.select(files, np.array(rows)).fingerprint()
        for rows in ([[1, 2], [0, 1], [1, 0]], [[0, 1], [1, 2], [1, 0]])
    ]
    assert other[0] == kept.fingerprint() != other[1]
    like_a = data.tokenize_file(
        write(tmp_path / "c.jsonl", [same, Comparison("p", ["a", "c"]), same]),
        Letters(),
        99,
        "left",
        tmp_path / "cache",
    )
    assert data.select([like_a, files[1]], kept.selected).fingerprint() != kept.fingerprint()


def test_tokens_are_found_again_by_what_they_follow_from(tmp_path, monkeypatch, tokenizer):
    def count(*arguments):
        built.append(arguments)
        return tokenize(*arguments)

    tokenize, built = data.tokenize, []
    monkeypatch.setattr(data, "tokenize", count)
    comparisons = [*built_in(2), None]
    how = dict(
        tokenizer=tokenizer,
        max_seq_len=50,
        truncation_side="left",
        cache_dir=tmp_path / "cache",
        skip_bad_rows=True,
    )
    first = data.tokenize_file(write(tmp_path / "a.jsonl", comparisons), **how)
    assert len(built) == 2
    for lock in (tmp_path / "cache").glob("*.lock"):
        lock.unlink()
    (tmp_path / "a.jsonl").rename(tmp_path / "b.jsonl")
    os.utime(tmp_path / "b.jsonl", (1, 1))
    again = data.tokenize_file(tmp_path / "b.jsonl", **how)
    assert len(built) == 2 and groups_of(again) == groups_of(first) and again.key == first.key
    assert not list(
        (tmp_path / "cache").glob("*.lock")
    )  # nor is anything written there, which may be read-only
    assert [file.bad_rows[0].partition(": ")[0] for file in (first, again)] == [
        f"{tmp_path}/a.jsonl:5",
        f"{tmp_path}/b.jsonl:5",
    ]

    write(tmp_path / "c.jsonl", [*built_in(2, seed=4), None])
    (tmp_path / "b.json").write_bytes((tmp_path / "b.jsonl").read_bytes())
    write(tmp_path / "good.jsonl", comparisons[:2])
    data.tokenize_file(tmp_path / "good.jsonl", **how)
    for name, change in [
        ("c.jsonl", {}),
        ("b.json", {}),
        ("b.jsonl", dict(tokenizer=data.Tokenizer(tokenizer.model_proto, 5))),
        ("b.jsonl", dict(max_seq_len=51)),
        ("b.jsonl", dict(truncation_side="right")),
        ("good.jsonl", dict(skip_bad_rows=False)),
    ]:
        built.clear()
        data.tokenize_file(tmp_path / name, **how | change)
        assert len(built) == 2, (name, change)


def test_a_file_is_hashed_once_and_again_if_it_changes(tmp_path, monkeypatch):
    path = tmp_path / "a"
    path.write_bytes(b"abc")
    first = data.file_hash(path)
    with monkeypatch.context() as patch:
        patch.setattr(data.hashlib, "file_digest", None)
        assert data.file_hash(path) == first
    path.write_bytes(b"abd")
    os.utime(path, (1, 1))
    assert data.file_hash(path) != first


def test_bad_rows_of_a_token_file(tmp_path):
    """The first is the error; or all are left out, and said."""
    good = Comparison("p", ["a", "b"])
    path, cache = (
        write(
            tmp_path / "a.jsonl",
            [good, None, Comparison("p", ["a", "c"]), Comparison("", ["a", ""])],
        ),
        tmp_path / "cache",
    )
    with pytest.raises(ValueError, match=f"^{path}:3: fields found: prompt; expected"):
        data.tokenize_file(path, Letters(None, None), 99, "left", cache)
    file = data.tokenize_file(path, Letters(None, None), 99, "left", cache, skip_bad_rows=True)
    assert letters(groups_of(file)) == [["pa", "pb"], ["pa", "pc"]] and file.rows[
        "line"
    ].tolist() == [1, 5]
    assert [re.match(f"{path}:.: ......", row)[0] for row in file.bad_rows] == [
        f"{path}:3: fields",
        f"{path}:7: respon",
    ]
    write(path, [good, Comparison("", ["a", ""])])
    with pytest.raises(ValueError, match=f"^{path}:3: responses.1. .* empty"):
        data.tokenize_file(path, Letters(None, None), 99, "left", cache)
    write(path, [None, None])
    for read in (
        lambda: data.tokenize_file(path, Letters(), 99, "left", cache, skip_bad_rows=True),
        lambda: list(data.load_comparisons(path, bad_rows=[])),
    ):
        with pytest.raises(
            ValueError,
            match=f"^{path}: no row of it is a comparison, for example {path}:3: fields found: prompt",
        ):
            read()
    write(path, [Comparison("p", ["abc", "abd"])] * 2)
    with pytest.raises(
        ValueError, match=f"^{path}: in all 2 rows the responses are identical .*--max_seq_len 4"
    ):
        data.tokenize_file(path, Letters(), 4, "right", cache)
    path.write_bytes(gzip.compress(GOOD))
    path = path.rename(tmp_path / "a.jsonl.gz")
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(
        ValueError, match=f"^{path}:2: cannot be decompressed"
    ):  # that is more than a bad row
        data.tokenize_file(path, Letters(), 99, "left", cache, skip_bad_rows=True)
    assert (
        len([entry for entry in cache.iterdir() if entry.suffix != ".lock"]) == 1
    )  # the one that came out


@pytest.mark.parametrize(
    "name, change",
    [
        ("tokens.bin", lambda content: content[:-4]),
        ("tokens.bin", lambda content: content[:-1]),
        ("tokens.bin", lambda content: b""),
        ("tokens.bin", None),
        ("rows.npy", lambda content: content[:-1]),
        ("sequences.npy", lambda content: b""),
        ("bad_rows.json", lambda content: b"["),
    ],
)
def test_damaged_token_file_is_said_and_can_be_deleted(tmp_path, name, change):
    path = write(tmp_path / "a.jsonl", [Comparison("p", ["a", "b"])])
    how = (path, Letters(), 99, "left", tmp_path / "cache")
    directory = tmp_path / "cache" / data.tokenize_file(*how).key
    content = (directory / name).read_bytes()
    (directory / name).unlink()
    if change:
        (directory / name).write_bytes(change(content))
    with pytest.raises(
        ValueError, match=f"^{directory}: damaged .*; delete it, and it will be made again"
    ):
        data.tokenize_file(*how)
    shutil.rmtree(directory)
    assert letters(groups_of(data.tokenize_file(*how))) == [["<pa>", "<pb>"]]


def test_a_file_that_changes_while_it_is_read_is_not_kept(tmp_path, monkeypatch):
    def grow(*arguments):
        yield from tokenize_rows(*arguments)
        with open(path, "ab") as file:
            file.write(GOOD)

    path, tokenize_rows = (
        write(tmp_path / "a.jsonl", [Comparison("p", ["a", "b"])]),
        data.tokenize_rows,
    )
    monkeypatch.setattr(data, "tokenize_rows", grow)
    with pytest.raises(ValueError, match=f"^{path}: was changed while it was read"):
        data.tokenize_file(path, Letters(), 99, "left", tmp_path / "cache")
    assert {entry.suffix for entry in (tmp_path / "cache").iterdir()} == {".lock"}


def test_chunks_of_rows(monkeypatch):
    monkeypatch.setattr(data, "BYTES_AT_ONCE", 10)
    rows = [(i, b"x" * size) for i, size in enumerate([4, 5, 1, 3, 30, 2, 2])]
    assert list(data.divide_rows(iter(rows))) == [rows[:3], rows[3:5], rows[5:]]
    assert list(data.divide_rows(iter(rows[:5]))) == [rows[:3], rows[3:5]]


def test_processes_tokenize_as_one_does(tmp_path, monkeypatch, tokenizer, capfd):
    """The same arrays, the same rows left out, the same first error; with a progress bar."""
    comparisons = built_in(150)
    comparisons[60] = comparisons[130] = None
    path, found = write(tmp_path / "a.jsonl", comparisons), []
    for chunk, skip in itertools.product((1 << 20, 1500), (True, False)):
        monkeypatch.setattr(data, "BYTES_AT_ONCE", chunk)
        try:
            file = data.tokenize_file(
                path, tokenizer, 50, "left", tmp_path / f"cache {chunk}", skip
            )
            found.append(
                [
                    *(array.tolist() for array in (file.tokens, file.sequences, file.rows)),
                    file.bad_rows,
                ]
            )
        except ValueError as error:
            found.append(str(error))
        bar = capfd.readouterr().err
        assert ("tokenize a.jsonl: " in bar) == (chunk == 1500) and ("150 rows" in bar) == (
            chunk == 1500 and skip
        )
    assert (
        found[:2] == found[2:]
        and len(found[0][2]) == 148
        and len(found[0][3]) == 2
        and found[1].startswith(f"{path}:121: fields found")
    )


def test_a_process_that_tokenizes_and_is_killed_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "BYTES_AT_ONCE", 100)
    monkeypatch.setattr(data, "start_worker", sys.exit)
    path = write(tmp_path / "a.jsonl", built_in(9))
    with pytest.raises(ValueError, match=f"^{path}: a process that tokenized it was killed"):
        data.tokenize_file(
            path, data.Tokenizer(sentencepiece_model()), 99, "left", tmp_path / "cache"
        )


def test_who_wants_the_same_waits_for_the_one_who_builds(tmp_path, monkeypatch):
    """It is on the disk before it gets its name, and nothing is in it of one that was killed before."""

    def build(directory):
        (directory / "file").write_text("half")
        time.sleep(0.2)
        (directory / "file").write_text("whole")
        built.append(directory)

    built, found, synced = [], [], []
    monkeypatch.setattr(os, "fsync", lambda file: synced.append(Path(file.name)))
    (tmp_path / "new" / "a.part" / "left").mkdir(parents=True)
    threads = [
        threading.Thread(
            target=lambda: found.append(
                (data.cached(tmp_path / "new/a", build) / "file").read_text()
            )
        )
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
        time.sleep(0.05)  # the last ones come while it is half built
    for thread in threads:
        thread.join()
    assert found == ["whole"] * 4 and len(built) == 1 and synced == [tmp_path / "new/a.part/file"]
    assert {str(entry.relative_to(tmp_path)) for entry in tmp_path.rglob("*")} == {
        "new",
        "new/a",
        "new/a.lock",
        "new/a/file",
    }
    data.cached(
        tmp_path / "other/b", lambda directory: None
    )  # in a directory that is not there yet


def test_a_builder_that_is_killed_leaves_nothing_that_is_used_and_no_process(tmp_path, tokenizer):
    """SIGKILL between two parts of a token file, of which only a few are worked on ahead. The next one builds it whole."""
    path, cache = write(tmp_path / "a.jsonl", built_in(300)), tmp_path / "cache"
    (tmp_path / "tokenizer.model").write_bytes(tokenizer.model_proto)
    program = """
import sys, time, data
def count(path, read_rows=data.read_rows):
    global rows_read
    for rows_read, row in enumerate(read_rows(path), start=1):
        yield row
def stop_after_one(*arguments, tokenize_rows=data.tokenize_rows):
    for part in tokenize_rows(*arguments):
        yield part
        print(rows_read, flush=True)  # and one part is written
        time.sleep(100)
data.read_rows, data.tokenize_rows, data.BYTES_AT_ONCE = count, stop_after_one, 500
data.tokenize_file(sys.argv[1], data.load_tokenizer(sys.argv[2]), 50, "left", sys.argv[3])
"""
    arguments = [sys.executable, "-c", program, path, tmp_path / "tokenizer.model", cache]
    with subprocess.Popen(
        arguments, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, cwd=Path(__file__).parent
    ) as builder:
        try:
            assert (
                0 < int(builder.stdout.readline()) <= 4 * (2 * len(os.sched_getaffinity(0)) + 1)
            )  # 500 bytes are 2 or 3 rows
            workers = [
                pid
                for pid in children(builder.pid)
                if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()
            ]
            wait_until(lambda: all(map(ignores_interrupts, workers)))
        finally:
            builder.kill()
    (part,) = cache.glob("*.part")
    assert (part / "tokens.bin").exists() and not part.with_suffix("").exists()
    try:
        assert workers
        wait_until(lambda: not any(map(is_running, workers)))
    finally:
        for pid in filter(is_running, workers):
            os.kill(pid, signal.SIGKILL)
    file = data.tokenize_file(path, tokenizer, 50, "left", cache)
    assert groups_of(file) == [data.tokenize(c, tokenizer, 50) for c in built_in(300)]
    assert {entry.name for entry in cache.iterdir()} == {file.key, file.key + ".lock"}


def wait_until(condition):
    until = time.time() + 30
    while not condition():
        assert time.time() < until
        time.sleep(0.05)


def ignores_interrupts(pid: int) -> bool:
    ignored = re.search(r"SigIgn:\t(\w+)", Path(f"/proc/{pid}/status").read_text())[1]
    return bool(int(ignored, 16) >> signal.SIGINT - 1 & 1)


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def is_running(pid: int) -> bool:
    try:
        return (
            Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
        )  # a zombie has ended
    except FileNotFoundError:
        return False


# ----------------------------------------------------------------------------------------------------------------------
# Batches


def test_pad_rows():
    """A pad id inside a text is text: the mask says so."""
    input_ids, mask = data.pad_rows([[5, 0, 6], [7]], pad_id=0)
    assert input_ids.tolist() == [[5, 0, 6], [7, 0, 0]] and mask.tolist() == [[1, 1, 1], [1, 0, 0]]
    assert input_ids.dtype == mask.dtype == torch.int64


# ----------------------------------------------------------------------------------------------------------------------
# The built-in data

# Every statement that a response can make: (the question that it answers, the answer, whether it is true)
STATEMENTS = {
    statement.format(subject, answer): (question.format(subject), answer, answer == facts[subject])
    for question, statement, facts in data.QUESTIONS
    for subject in facts
    for answer in facts.values()
}
REMARKS = {
    remark: tone for remarks in data.TONES for tone, remark in zip(("polite", "rude"), remarks)
}


@pytest.fixture(scope="module")
def pairs():
    return list(itertools.islice(data.known_rewards(seed=7), 24_000))


def better_first(pairs) -> float:
    """The share of pairs whose label is the sign of the true difference: the accuracy of who knows the true rewards."""
    return sum(pair.rewards[0] > pair.rewards[1] for pair in pairs) / len(pairs)


def words(text: str) -> list[str]:
    return re.findall(r"\w+|[^\w\s]", text)


def read(prompt: str, response: str) -> tuple[str, str, int, str]:
    """(quality, tone, number of rambling sentences, answer), from the text alone."""
    question, whole = re.fullmatch(r"\n\nHuman: (.*)\n\nAssistant:", prompt)[1], response
    remarks = [remark for remark in REMARKS if remark in response]
    rambles = [ramble for ramble in data.RAMBLES if ramble in response]
    for sentence in remarks + rambles:
        response = response.replace(" " + sentence, "", 1)
    assert whole == " ".join([response, *remarks, *rambles])  # in this order
    answered, answer, true = STATEMENTS[response[1:]]  # nothing else is left
    assert true or answered == question  # what is off topic is true
    quality = "off topic" if answered != question else "right" if true else "wrong"
    return quality, REMARKS[remarks[0]] if remarks else "neutral", len(rambles), answer


def test_same_seed_same_pairs(pairs):
    """Whatever else draws random numbers meanwhile."""
    stream = data.known_rewards(seed=7)
    for expected in pairs[:100]:
        random.seed(1)
        assert next(stream) == expected
    assert sum(a == b for a, b in zip(pairs, itertools.islice(data.known_rewards(seed=8), 100))) < 5


def test_true_rewards_follow_from_the_text(pairs):
    seen = collections.Counter()
    for pair in pairs[:2000]:
        for response, reward in zip(pair.responses, pair.rewards):
            quality, tone, rambles, _ = read(pair.prompt, response)
            seen.update([quality, tone, rambles])
            expected = (
                data.QUALITY_REWARD[quality] + data.TONE_REWARD[tone] + data.RAMBLE_REWARD * rambles
            )
            assert reward == pytest.approx(expected, abs=1e-6)
    assert (
        set(seen) == {"right", "wrong", "off topic", "polite", "neutral", "rude", 0, 1}
        and min(seen.values()) > 200
    )


def test_labels_follow_bradley_terry(pairs):
    """At every difference d of true rewards the better response comes first with frequency sigmoid(d): within 4 standard
    deviations of the binomial, and 1 count for the rare differences. Who knows the rewards knows most labels, not all."""
    assert 0.75 < better_first(pairs) < 0.92
    by_difference = collections.defaultdict(list)
    for pair in pairs:
        by_difference[round(abs(pair.rewards[0] - pair.rewards[1]), 6)].append(pair)
    for d, group in by_difference.items():
        n, p = len(group), 1 / (1 + math.exp(-d))
        assert d > 0  # equal rewards teach nothing
        assert abs(n * better_first(group) - n * p) <= 4 * math.sqrt(n * p * (1 - p)) + 1


def test_no_answer_is_better_than_another(pairs):
    """An answer is right for one question of its kind and wrong for all others, as is each answer of that kind. So each stands in
    the same share of right as of wrong responses: within 4.5 standard deviations."""
    assert len(STATEMENTS) == sum(
        len(facts) ** 2 for _, _, facts in data.QUESTIONS
    )  # no two facts of a kind have one answer
    read_all = [read(pair.prompt, response) for pair in pairs for response in pair.responses]
    right, wrong = (
        collections.Counter(row[-1] for row in read_all if row[0] == quality)
        for quality in ("right", "wrong")
    )
    p = right.total() / (right + wrong).total()
    assert (
        set(right)
        == set(wrong)
        == {answer for _, _, facts in data.QUESTIONS for answer in facts.values()}
    )
    for answer, n in (right + wrong).items():
        assert abs(right[answer] - n * p) <= 4.5 * math.sqrt(n * p * (1 - p)), answer


def test_counting_words_is_not_enough(pairs):
    """The best linear reward over word counts (the convex Bradley-Terry fit) stays 0.05 below Bayes on held-out pairs: to get
    further, a model has to read the question and the order of words, of which a polite and a rude remark have the same."""
    assert all(
        polite != rude and sorted(words(polite)) == sorted(words(rude))
        for polite, rude in data.TONES
    )
    counts = [
        [collections.Counter(words(response)) for response in pair.responses] for pair in pairs
    ]
    column = {word: i for i, word in enumerate(sorted(set().union(*itertools.chain(*counts))))}
    features = torch.zeros(len(pairs), len(column))  # chosen - rejected
    for row, (chosen, rejected) in zip(features.numpy(), counts):
        for word in chosen | rejected:
            row[column[word]] = chosen[word] - rejected[word]
    weight = torch.zeros(len(column), requires_grad=True)
    optimizer = torch.optim.LBFGS([weight], max_iter=100, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = (
            torch.nn.functional.softplus(-features[:20_000] @ weight).mean()
            + 1e-4 * weight.square().sum()
        )
        loss.backward()
        return loss

    optimizer.step(closure)
    margins = (features[20_000:] @ weight).detach()
    accuracy = ((margins > 0).double() + 0.5 * (margins == 0)).mean().item()
    print(
        f"accuracy of counting words {accuracy:.4f}, Bayes-optimal {better_first(pairs[20_000:]):.4f}"
    )
    assert accuracy < better_first(pairs[20_000:]) - 0.05
    assert (
        accuracy > 0.52
    )  # it has learned what can be learned so, such as to dislike rambling; 0.008 is one standard deviation
