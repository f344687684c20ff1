"""Rows of data files: what they mean, which files are refused, and how."""

import gzip
import json
import random
import re

import pytest

import data
from data import Comparison
from parts.rows import parse_row

# --------------------------------------------------------------------------------------------------
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


def test_plain_fields():
    """Texts stay texts, but beside a list of messages they become messages; other keys go."""
    row = {"prompt": "p", "responses": ["a", "b"], "margin": 2, "more": 1}
    assert parse_row(json.dumps(row).encode()) == {
        "prompt": "p",
        "responses": ["a", "b"],
        "margin": 2.0,
    }
    row = {"prompt": "hi", "chosen": [A | {"name": "x"}], "rejected": "B"}
    assert parse_row(json.dumps(row).encode()) == {
        "prompt": [U],
        "responses": [[A], [B]],
        "margin": 0.0,
    }
    row = {"prompt": [S, U], "chosen": [S, U, A], "rejected": [S, U, B]}
    assert parse_row(json.dumps(row).encode()) == {
        "prompt": [],
        "responses": [[S, U, A], [S, U, B]],
        "margin": 0.0,
    }


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


# --------------------------------------------------------------------------------------------------
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
    """The ValueError starts with the file and the line, and says what was found there."""
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
    """The second row may be written after the first is out; the third is broken, both are out."""
    path = tmp_path / "a.jsonl"
    path.write_bytes(GOOD)
    rows = data.load_comparisons(path)
    assert next(rows) == Comparison("p", ["a", "b"])
    path.write_bytes(GOOD + GOOD.replace(b'"p"', b'"new"') + b"!")
    assert next(rows) == Comparison("new", ["a", "b"])
    with pytest.raises(ValueError, match="a.jsonl:3: "):
        next(rows)


def test_cut_gzip(tmp_path):
    """A download that broke off gives its whole rows; then the error names the next line."""
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
