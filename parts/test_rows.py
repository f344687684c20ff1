"""Rows of data files: what they mean, which files are refused, and how."""

import gzip
import json
import os
import random
import re
from collections import Counter

import pytest

import data
from data import Comparison
from parts.rows import (
    LOOKS_LIKE_PROMPT,
    MOST_NOTES,
    NO_PROMPT,
    OURS,
    REPEATED,
    Reading,
    files_of,
    note_lines,
    parse_row,
    reading_of,
    unused_lines,
)

# --------------------------------------------------------------------------------------------------
# Rows

U, A, S = (
    {"role": role, "content": content}
    for role, content in [("user", "hi"), ("assistant", "A"), ("system", "Be brief.")]
)
B, C, MORE = A | {"content": "B"}, A | {"content": "C"}, U | {"content": "More?"}
WHY = MORE | {"content": "Why?"}
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
    "whole dialogues of messages": ({"chosen": [U, A], "rejected": [U, B]}, [], [[U, A], [U, B]]),
    "prompt and responses of messages (TRL)": (
        {"prompt": [U], "chosen": [A], "rejected": [B]},
        [U],
        [[A], [B]],
    ),
    "several turns": (
        {"prompt": [U, A, MORE], "chosen": [B, WHY, C], "rejected": [A]},
        [U, A, MORE],
        [[B, WHY, C], [A]],
    ),
    "text prompt repeated in messages (UltraFeedback)": (
        {"prompt": "hi", "chosen": [U, A], "rejected": [U, B], "score_chosen": 8.0},
        [U],
        [[A], [B]],
    ),
    "the same after a system message": (
        {"prompt": "hi", "chosen": [S, U, A], "rejected": [S, U, B]},
        [S, U],
        [[A], [B]],
    ),
    "system message": ({"prompt": [S, U], "chosen": [A], "rejected": [B]}, [S, U], [[A], [B]]),
    "text prompt, responses of messages": (
        {"prompt": "hi", "chosen": [A], "rejected": [B]},
        [U],
        [[A], [B]],
    ),
    "prompt of messages, text responses": (
        {"prompt": [U], "chosen": "A", "rejected": "B"},
        [U],
        [[A], [B]],
    ),
    "ranking": (
        {"prompt": "p", "responses": ["best", "middle", "worst"]},
        "p",
        ["best", "middle", "worst"],
    ),
    "ranking of messages": ({"prompt": [U], "responses": [[B], [C], [A]]}, [U], [[B], [C], [A]]),
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


def contents(comparisons) -> list[tuple]:
    """Return prompt and responses of comparisons."""
    return [(comparison.prompt, comparison.responses) for comparison in comparisons]


@pytest.mark.parametrize("file, content", KINDS.values(), ids=KINDS.keys())
def test_every_kind_of_file_gives_the_same_comparisons(tmp_path, file, content):
    rows = [row for row, _, _ in ROWS.values()]
    expected = [(prompt, responses) for _, prompt, responses in ROWS.values()]
    assert contents(load(tmp_path / file, content(rows))) == expected


def test_a_single_response_is_a_row_only_where_asked_for(tmp_path):
    assert load(tmp_path / "a.jsonl", '{"prompt": "p", "response": "r"}', min_responses=1) == [
        Comparison("p", ["r"])
    ]
    with pytest.raises(ValueError, match="prompt, response; expected chosen and rejected"):
        load(tmp_path / "a.jsonl", '{"prompt": "p", "response": "r"}')


LISTS = {"prompt": "p", "chosen": ["a"], "rejected": ["b", "c"]}


@pytest.mark.parametrize(
    "row, prompt, responses",
    [
        (LISTS, "p", ["a", "b", "c"]),
        ({**LISTS, "rejected": ["b"]}, "p", ["a", "b"]),
        ({**LISTS, "prompt": [U]}, [U], [[{**A, "content": text}] for text in "abc"]),
        (
            {"prompt": "hi", "chosen": [[A]], "rejected": [[B], "b"]},
            [U],
            [[A], [B], [{**A, "content": "b"}]],
        ),
        ({"prompt": [U], "chosen": [[U, A]], "rejected": [[U, B]] * 2}, [U], [[A], [B], [B]]),
        ({"chosen": ["x a"], "rejected": ["x b", "x c"]}, "", ["x a", "x b", "x c"]),
        ({"chosen": [[U, A]], "rejected": [[U, B]]}, [], [[U, A], [U, B]]),
        (
            {"prompt": "Say: ", "chosen": ["Say: a"], "rejected": ["Say: b"] * 3},
            "Say:",
            [" a", *[" b"] * 3],
        ),
    ],
)
def test_lists_of_chosen_and_rejected_are_one_comparison_to_be_scored(row, prompt, responses):
    """RewardBench 2's rows: texts, dialogues or whole dialogues, the chosen one first."""
    found = parsed({**row, "subset": "Math"}, min_responses=1)
    assert (found["prompt"], found["responses"]) == (prompt, responses)
    assert (found["ranked"], found["subset"], found["target"]) == (False, "Math", 1.0)
    with pytest.raises(ValueError) as error:
        parsed(row)
    assert str(error.value).startswith("chosen and rejected: found lists of responses")
    assert "for training, give each rejected response a row of its own" in str(error.value)


@pytest.mark.parametrize(
    "change, words",
    [
        ({"chosen": "a"}, "chosen: found text; expected a list of responses"),
        ({"chosen": []}, "chosen: found an empty list; expected a list of responses"),
        ({"rejected": []}, "rejected: found an empty list; expected a list of responses"),
        ({"rejected": None}, "rejected: found null or nothing; expected a list of responses"),
        ({"rejected": [A]}, "rejected: found chat messages; expected a list of responses"),
        ({"chosen": ["a", "b"]}, "chosen: found 2 responses; expected a list of one; rows in "),
        ({"rejected": ["b", None]}, "rejected[1]: expected text, found null or nothing"),
        ({"rejected": ["b", [A], 7]}, "rejected[2]: expected text or a list of chat messages"),
        ({"target": 0.5}, "target: found beside lists of chosen and rejected responses"),
        ({"margin": 1}, "margin: found beside lists of chosen and rejected responses"),
        ({"rejected": ["b", "\ud800"]}, "rejected[1]: character 0 is half of a surrogate pair"),
    ],
)
def test_bad_lists_of_chosen_and_rejected(change, words):
    with pytest.raises(ValueError) as error:
        parsed({**LISTS, **change}, min_responses=1)
    assert str(error.value).startswith(words)


def parsed(row: dict, min_responses=2, **reading) -> dict:
    return parse_row(json.dumps(row).encode(), reading_of(**reading), min_responses)


def notes(row: dict, **reading) -> list[str]:
    return [note for note in parsed(row, **reading)["notes"] if not note.startswith("--")]


def test_plain_fields():
    """Texts stay texts, but beside a list of messages they become messages."""
    usual = {"margin": 0.0, "target": 1.0, "subset": None, "ranked": True, "notes": ()}
    row = {"prompt": "p", "responses": ["a", "b"], "margin": 2, "subset": "s"}
    expected = {"prompt": "p", "responses": ["a", "b"], "margin": 2.0, "subset": "s"}
    assert parsed(row) == usual | expected
    row = {"prompt": "hi", "chosen": [A], "rejected": "B", "target": 0.25}
    assert parsed(row) == usual | {"prompt": [U], "responses": [[A], [B]], "target": 0.25}
    row = {"prompt": [S, U], "chosen": [S, U, A], "rejected": [S, U, B]}
    expected = {"prompt": [S, U], "responses": [[A], [B]], "notes": (REPEATED,)}
    assert parsed(row) == usual | expected


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


# --------------------------------------------------------------------------------------------------
# Fields: what is read, what is an error, what is named

PAIR = {"chosen": "a", "rejected": "b"}
SPELLINGS = [str.lower, str.upper, str.title, lambda name: name[0] + name[1:].upper()]
LOOK_ALIKES = sorted({spell(name) for name in LOOKS_LIKE_PROMPT for spell in SPELLINGS})
LOOK_ALIKES.remove("prompt")


def test_the_names_that_look_like_a_prompt_are_those_of_the_contract():
    names = "prompt question instruction input query context history"
    assert list(LOOKS_LIKE_PROMPT) == names.split()


@pytest.mark.parametrize("name", LOOK_ALIKES)
def test_a_field_that_looks_like_the_prompt_is_an_error_with_two_ways_out(name):
    """Both ways, tried as the message spells them, read the row."""
    with pytest.raises(ValueError) as error:
        parsed({**PAIR, name: "Letter A? "})
    assert f'"{name}"' in str(error.value)
    assert f"--fields prompt={name} " in str(error.value)
    assert f"--ignore_fields {name} " in str(error.value)
    row = parsed({**PAIR, name: "Letter A? "}, fields={"prompt": name})
    assert (row["prompt"], row["responses"]) == ("Letter A? ", ["a", "b"])
    row = parsed({**PAIR, name: "Letter A? "}, ignore_fields=[name])
    assert (row["prompt"], row["responses"]) == ("", ["a", "b"])
    for flags in ({"fields": {"prompt": name}}, {"ignore_fields": [name]}):
        assert set(notes({**PAIR, name: "Letter A? "}, **flags)) <= {NO_PROMPT}


@pytest.mark.parametrize("value", ["q", " ", [U], {"text": "q"}, 7, 0, True])
@pytest.mark.parametrize(
    "row", [PAIR, {"responses": ["a", "b"]}, {"response": "a"}, {"chosen": [U, A], "rejected": [U]}]
)
def test_such_a_field_is_an_error_in_rows_of_every_kind(row, value):
    with pytest.raises(ValueError, match='no field "prompt", but a field "input"'):
        parsed({**row, "input": value}, min_responses=1)


@pytest.mark.parametrize("value", [None, "", []])
@pytest.mark.parametrize("name", LOOKS_LIKE_PROMPT[1:])
def test_such_a_field_that_is_empty_is_none(name, value):
    expected = [NO_PROMPT] if value is None else [NO_PROMPT, f'field "{name}" is not read']
    assert notes({**PAIR, name: value}) == expected


def test_beside_a_prompt_such_a_field_is_one_that_is_not_read():
    for name in LOOK_ALIKES:
        assert notes({"prompt": "p", **PAIR, name: "x"}) == [f'field "{name}" is not read']


def test_a_prompt_that_fields_replaces_does_not_stand_in_for_it():
    """A row of another file of the run, say, which has the prompt under our name."""
    with pytest.raises(
        ValueError, match='no field "question", but a field "prompt", .*prompt=prompt '
    ):
        parsed({"prompt": "p", **PAIR}, fields={"prompt": "question"})


UNREAD = {"label": "tie", "weight": 2.0, "margins": 1, "tools": [], "Margin": 1, "é\n\x1b": {}}


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "p", **PAIR},
        PAIR,
        {"prompt": "p", "responses": ["a", "b", "c"]},
        {"prompt": [U], "chosen": [A], "rejected": [B]},
        {"prompt": "p", "response": "a"},
    ],
)
def test_every_other_field_is_named(row):
    expected = ['field "label" is not read', 'field "weight" is not read']
    expected += ['field "margins" is not read', 'field "tools" is not read']
    expected += ['field "Margin" is not read', 'field "é↵␛" is not read']
    found = parsed({**UNREAD, **row, "null": None}, min_responses=1)["notes"]
    assert [note for note in found if note != NO_PROMPT] == expected
    found = parsed({**UNREAD, **row}, min_responses=1, ignore_fields=UNREAD)["notes"]
    assert {note.split()[0] for note in found if note != NO_PROMPT} == {"--ignore_fields"}


@pytest.mark.parametrize(
    "row, names",
    [
        ({"prompt": "p", **PAIR, "responses": ["c", "d"], "response": "e"}, "responses response"),
        ({"prompt": "p", "responses": ["c", "d"], "response": "e"}, "response"),
        ({"prompt": "p", "responses": ["c", "d"], "response": None}, ""),
    ],
)
def test_responses_of_another_kind_are_named_too(row, names):
    assert notes(row) == [f'field "{name}" is not read' for name in names.split()]


@pytest.mark.parametrize("place", ["prompt", "chosen", "rejected"])
@pytest.mark.parametrize("at", [0, -1])
def test_keys_of_messages_that_are_not_read_are_named(place, at):
    row = {"prompt": [S, U], "chosen": [A, MORE, B], "rejected": [B, WHY, C]}
    messages = list(row[place])
    messages[at] = messages[at] | {"reasoning_content": "Hm.", "name": None, "tool_calls": []}
    row[place] = messages
    expected = [
        f'field "{key}" of messages is not read' for key in ("reasoning_content", "tool_calls")
    ]
    assert notes(row) == expected
    assert notes(row, ignore_fields=["tool_calls"]) == expected[:1]
    assert parsed(row)["prompt"] == [S, U]
    assert parsed(row)["responses"] == [[A, MORE, B], [B, WHY, C]]


def test_keys_of_messages_in_rankings_and_whole_dialogues():
    more = A | {"reasoning_content": "Hm."}
    for row in (
        {"prompt": "hi", "responses": [[B], "C", [more]]},
        {"chosen": [U, A], "rejected": [U, more]},
    ):
        assert 'field "reasoning_content" of messages is not read' in notes(row)


@pytest.mark.parametrize("ours", OURS)
def test_each_of_our_fields_can_have_another_name(ours):
    """With --fields the row means what the row with our names means, notes aside."""
    row = {"prompt": [U], "chosen": [A], "rejected": [B], "margin": 1.5}
    row |= {"system": "Be brief.", "subset": "s"}
    if ours == "responses":
        row = {"prompt": "p", "responses": ["a", "b", "c"]}
    if ours == "response":
        row = {"prompt": "p", "response": "a"}
    if ours == "target":
        row |= {"margin": 0, "target": 0.25}
    renamed = {("theirs" if name == ours else name): value for name, value in row.items()}
    expected = parsed(row, min_responses=1)
    found = parsed(renamed, min_responses=1, fields={ours: "theirs"})
    assert found | {"notes": ()} == expected and expected["notes"] == ()
    assert found["notes"] == (f"--fields {ours}=theirs",)


def test_fields_can_swap_and_take_names_of_ours():
    row = {"prompt": "p", "chosen": "worse", "rejected": "better"}
    swap = {"chosen": "rejected", "rejected": "chosen"}
    assert parsed(row, fields=swap)["responses"] == ["better", "worse"]
    assert notes(row, fields=swap) == []
    row = {"prompt": "p", "question": "q", "system": "s", **PAIR}
    found = parsed(row, fields={"prompt": "system"})
    assert found["prompt"] == "s"  # which is then no system message
    assert found["notes"][1:] == ('field "prompt" is not read', 'field "question" is not read')


def test_fields_of_ours_can_be_ignored():
    row = {"prompt": "p", **PAIR, "margin": "a lot", "system": "s", "subset": {}, "target": 7}
    ignored = ["margin", "system", "subset", "target", "prompt"]
    found = parsed(row, ignore_fields=ignored)
    assert (found["prompt"], found["margin"], found["target"]) == ("", 0.0, 1.0)
    assert found["subset"] is None


def test_one_field_to_ignore_may_be_given_as_text():
    assert reading_of(ignore_fields="meta") == reading_of(ignore_fields=["meta"])


@pytest.mark.parametrize(
    "reading, words",
    [
        (dict(fields={"promt": "q"}), "--fields: found promt=q; expected one of prompt, chosen,"),
        (dict(fields={"rewards": "q"}), "--fields: found rewards=q; expected one of"),
        (dict(fields=[("prompt", "a"), ("prompt", "b")]), "--fields: found prompt twice"),
        (dict(fields=[("prompt", "a"), ("system", "a")]), "--fields: found a twice"),
        (
            dict(fields={"prompt": "a"}, ignore_fields=["a"]),
            "--ignore_fields: found a, which --fields reads as prompt",
        ),
        (dict(text_as="chat"), "--text_as: found chat; expected text or messages"),
    ],
)
def test_flags_that_cannot_be_meant(tmp_path, reading, words):
    with pytest.raises(ValueError, match=f"^{re.escape(words)}"):
        reading_of(**reading)
    (tmp_path / "a.jsonl").write_bytes(GOOD)
    with pytest.raises(ValueError, match=f"^{re.escape(words)}"):
        list(data.load_comparisons(tmp_path / "a.jsonl", **reading))


def test_the_order_of_flags_does_not_matter():
    one = reading_of([("prompt", "q"), ("chosen", "c")], ["x", "y", "x"])
    assert one == reading_of({"chosen": "c", "prompt": "q"}, ["y", "x"])
    assert one == Reading((("chosen", "c"), ("prompt", "q")), ("x", "y"), "text")


def test_notes_are_printed_with_the_number_of_rows():
    rows = [{"prompt": "p", **PAIR, "label": 1}] * 3 + [{"prompt": "p", **PAIR, "x": 1, "label": 0}]
    rows += [PAIR]
    counts = Counter(note for row in rows for note in parsed(row)["notes"])
    assert note_lines("a.jsonl", counts, len(rows)) == [
        'a.jsonl: field "label" is not read (4 rows)',
        'a.jsonl: field "x" is not read (1 row)',
        f"a.jsonl: {NO_PROMPT} (1 row)",
    ]
    assert note_lines("a.jsonl", Counter(parsed(PAIR)["notes"]), 1) == []  # all rows are like that


def test_a_file_whose_keys_are_numbers_does_not_flood_the_terminal():
    counts = Counter(
        note for i in range(1000) for note in notes({"prompt": "p", **PAIR, f"{i}": 1})
    )
    found = note_lines("a.jsonl", counts, 1000)
    assert (
        len(found) == MOST_NOTES + 1
        and found[-1] == "a.jsonl: and 960 more such lines, which are left out"
    )
    (note,) = notes({"prompt": "p", **PAIR, "k" * 10**6: 1})
    assert note == f'field "{"k" * 60}…" is not read'


def test_flags_that_name_no_field_of_any_file_are_said():
    reading = reading_of({"prompt": "question", "subset": "kind"}, ["label", "lable"])
    files = [[{"question": "q", **PAIR, "label": 1, "kind": None}], [{"question": "q", **PAIR}]]
    counts = []
    for rows in files:
        counts.append(Counter())
        for row in rows:
            counts[-1].update(parse_row(json.dumps(row).encode(), reading)["notes"])
    assert unused_lines(reading, counts) == [
        '--ignore_fields lable: no row has a field "lable"',
        '--fields subset=kind (--eval_by): no row has a field "kind"',
    ]
    message = A | {"reasoning_content": "Hm."}
    reading = reading_of(ignore_fields=["reasoning_content"])
    row = {"prompt": "hi", "chosen": [message], "rejected": [B]}
    found = parse_row(json.dumps(row).encode(), reading)["notes"]
    assert unused_lines(reading, [Counter(found)]) == []


# --------------------------------------------------------------------------------------------------
# system, --text_as, target, subset

TEXT = {"prompt": "hi", "chosen": "A", "rejected": "B"}


def test_system_stands_in_front():
    expected = ([S, U], [[A], [B]])
    for prompt in ("hi", [U]):
        row = {"system": "Be brief.", "prompt": prompt, "chosen": [A], "rejected": "B"}
        found = parsed(row)
        assert (found["prompt"], found["responses"]) == expected
    found = parsed({"system": "Be brief.", **TEXT}, text_as="messages")
    assert (found["prompt"], found["responses"]) == expected
    found = parsed({"system": "Be brief.", "chosen": [U, A], "rejected": [U, B]})
    assert found["prompt"] == [] and found["responses"] == [[S, U, A], [S, U, B]]


@pytest.mark.parametrize("system", [None, ""])
def test_an_empty_system_is_none(system):
    assert parsed({"system": system, **TEXT}) == parsed(TEXT)
    messages = {"prompt": [U], "chosen": [A], "rejected": [B]}
    assert parsed({"system": system, **messages}) == parsed(messages)


@pytest.mark.parametrize(
    "row", [TEXT, {"chosen": "A", "rejected": "B"}, {"prompt": "p", "response": "r"}]
)
def test_system_beside_text_alone_is_an_error_that_names_the_flag(row):
    with pytest.raises(
        ValueError, match="^system: .* --text_as messages .* --ignore_fields system"
    ):
        parsed({"system": "Be brief.", **row}, min_responses=1)


@pytest.mark.parametrize("system", [["Be brief."], {"role": "system"}, 3])
def test_system_that_is_no_text(system):
    with pytest.raises(ValueError, match="^system: expected text, found"):
        parsed({"system": system, "prompt": [U], "chosen": [A], "rejected": [B]})


def test_text_as_messages():
    """The prompt is the user's message, the response the assistant's; rows of messages stay."""
    found = parsed(TEXT, text_as="messages")
    assert (found["prompt"], found["responses"]) == ([U], [[A], [B]])
    found = parsed({"prompt": "hi", "responses": ["B", "", "A"]}, text_as="messages")
    assert (found["prompt"], found["responses"]) == (
        [U],
        [[B], [{"role": "assistant", "content": ""}], [A]],
    )
    found = parsed({"prompt": "", "response": "A"}, min_responses=1, text_as="messages")
    assert (found["prompt"], found["responses"]) == ([], [[A]])
    for row, _, _ in ROWS.values():
        if isinstance(row.get("chosen"), list):
            assert parsed(row, text_as="messages") == parsed(row)


def test_whole_dialogues_of_text_are_no_messages():
    with pytest.raises(ValueError, match="^prompt is missing; --text_as messages .*--text_as text"):
        parsed({"chosen": HI + SAYS_A, "rejected": HI + SAYS_B}, text_as="messages")


@pytest.mark.parametrize("target", [0, 0.0, 0.25, 0.5, 1, 1.0, None])
def test_target(target):
    expected = 1.0 if target is None else target
    found = parsed({**TEXT, "target": target})["target"]
    assert found == expected and isinstance(found, float)
    assert parsed({"prompt": "p", "responses": ["a", "b"], "target": target})["target"] == expected


@pytest.mark.parametrize(
    "row, words",
    [
        ({**TEXT, "target": "0.5"}, "target: found text; expected a number from 0 to 1"),
        ({**TEXT, "target": True}, "target: found true or false; expected a number from 0 to 1"),
        ({**TEXT, "target": -0.1}, "target: found -0.1; expected a number from 0 to 1"),
        ({**TEXT, "target": 1.5}, "target: found 1.5; expected a number from 0 to 1"),
        ({**TEXT, "target": float("nan")}, "target: found nan; expected a number from 0 to 1"),
        ({**TEXT, "target": 10**400}, "target: found 1000"),
        (
            {"prompt": "p", "responses": ["a", "b", "c"], "target": 0.5},
            "target: found with 3 responses; a target is of two",
        ),
        (
            {"prompt": "p", "response": "a", "target": 1},
            "target: found with 1 response; a target is of two",
        ),
        (
            {**TEXT, "target": 0.5, "margin": 1.5},
            "target: found 0.5 beside margin 1.5; a row with a margin has target 1",
        ),
    ],
)
def test_bad_target(row, words):
    with pytest.raises(ValueError, match=f"^{re.escape(words)}"):
        parsed(row, min_responses=1)


def test_target_1_goes_with_a_margin_and_any_target_with_none():
    assert parsed({**TEXT, "target": 1, "margin": 1.5})["margin"] == 1.5
    assert parsed({**TEXT, "target": 0.5, "margin": 0})["target"] == 0.5
    assert parsed({**TEXT, "target": None, "margin": 2})["target"] == 1.0


@pytest.mark.parametrize(
    "subset, expected",
    [
        ("math", "math"),
        (3, "3"),
        (0.5, "0.5"),
        (True, "true"),
        (None, None),
        ("", None),
        ("é", "é"),
    ],
)
def test_subset(subset, expected):
    assert parsed({**TEXT, "subset": subset})["subset"] == expected
    assert parsed({**TEXT, "kind": subset}, fields={"subset": "kind"})["subset"] == expected


@pytest.mark.parametrize("subset", [["a"], {"a": 1}, "\ud800"])
def test_bad_subset(subset):
    with pytest.raises(ValueError, match="^subset: "):
        parsed({**TEXT, "subset": subset})


# --------------------------------------------------------------------------------------------------
# Directories and globs


def make_files(folder, names):
    for name in names.split():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"prompt": name, **PAIR}))


def found_in(folder, *paths) -> str:
    """Return the files that paths in a folder stand for, relative to it."""
    return " ".join(
        file.removeprefix(f"{folder}/") for file in files_of(f"{folder}/{path}" for path in paths)
    )


ALL = "b.jsonl a.json c2.jsonl c10.jsonl B.jsonl more/z.jsonl more/y.json README.md d.jsonl.bak"


@pytest.mark.parametrize(
    "paths, expected",
    [
        (["."], "B.jsonl a.json b.jsonl c10.jsonl c2.jsonl"),
        (["more"], "more/y.json more/z.jsonl"),
        (["more/"], "more/y.json more/z.jsonl"),
        (["b.jsonl", "a.json"], "b.jsonl a.json"),  # as given
        (["*.jsonl"], "B.jsonl b.jsonl c10.jsonl c2.jsonl"),
        (["c?.jsonl"], "c2.jsonl"),
        (["[ab].js*"], "a.json b.jsonl"),
        (["*/*"], "more/y.json more/z.jsonl"),
        (["m*"], "more/y.json more/z.jsonl"),  # a directory that a glob matches
        (["**/*.json"], "a.json more/y.json"),
        (["c*", "more", "a.json"], "c10.jsonl c2.jsonl more/y.json more/z.jsonl a.json"),
        (["README.md"], "README.md"),  # named by itself: an error of its rows
    ],
)
def test_directories_and_globs(tmp_path, paths, expected):
    make_files(tmp_path, ALL)
    assert found_in(tmp_path, *paths).replace("./", "") == expected


def test_a_directory_and_a_glob_are_read_in_order(tmp_path):
    make_files(tmp_path, "b.jsonl a.json c.jsonl")
    for path in (tmp_path, f"{tmp_path}/*"):
        prompts = [comparison.prompt for comparison in data.load_comparisons(path)]
        assert prompts == ["a.json", "b.jsonl", "c.jsonl"]


def test_a_file_whose_name_looks_like_a_glob_is_a_file(tmp_path):
    make_files(tmp_path, "a[1].jsonl a1.jsonl")
    assert found_in(tmp_path, "a[1].jsonl") == "a[1].jsonl"


@pytest.mark.parametrize(
    "path, words",
    [
        ("no.jsonl", "no such file; expected .jsonl, .jsonl.gz, .json or .parquet"),
        ("*.parquet", "no file matches; expected .jsonl, .jsonl.gz, .json or .parquet"),
        (
            "empty",
            "a directory without a data file; expected .jsonl, .jsonl.gz, .json or .parquet in it",
        ),
        (
            "e*",
            "a directory without a data file; expected .jsonl, .jsonl.gz, .json or .parquet in it",
        ),
        ("no/such/*.jsonl", "no file matches; expected"),
    ],
)
def test_paths_without_a_data_file(tmp_path, path, words):
    make_files(tmp_path, "a.jsonl empty/README.md")
    with pytest.raises(ValueError) as error:
        files_of([f"{tmp_path}/a.jsonl", f"{tmp_path}/{path}"])
    name = f"{tmp_path}/empty" if path == "e*" else f"{tmp_path}/{path}"
    assert str(error.value).startswith(f"{name}: {words}")


def test_one_path_object_given_twice_is_refused(tmp_path):
    make_files(tmp_path, "a.jsonl")
    path = f"{tmp_path}/a.jsonl"
    with pytest.raises(ValueError, match="a.jsonl: found twice"):
        files_of([path, path])


@pytest.mark.parametrize(
    "paths, found",
    [
        (["a.jsonl", "a.jsonl"], "a.jsonl: found twice"),
        (["b.jsonl", "a.jsonl", "a.json*"], "a.jsonl: found twice"),
        (["a.jsonl", "more/../a.jsonl"], "more/../a.jsonl: is the same file as DIR/a.jsonl"),
        (["more", "more/y.jsonl"], "more/y.jsonl: found twice"),
        (["more/y.jsonl", "more/"], "more/y.jsonl: found twice"),
        (["a.jsonl", "link.jsonl"], "link.jsonl: is the same file as DIR/a.jsonl"),
        (["hard.jsonl", "a.jsonl"], "a.jsonl: is the same file as DIR/hard.jsonl"),
        (["more", "folder"], "folder/y.jsonl: is the same file as DIR/more/y.jsonl"),
        (["."], "hard.jsonl: is the same file as DIR/a.jsonl"),
    ],
)
def test_one_file_by_two_paths_is_refused(tmp_path, paths, found):
    make_files(tmp_path, "a.jsonl b.jsonl more/y.jsonl")
    (tmp_path / "link.jsonl").symlink_to("a.jsonl")
    os.link(tmp_path / "a.jsonl", tmp_path / "hard.jsonl")
    (tmp_path / "folder").symlink_to("more")
    with pytest.raises(ValueError) as error:
        files_of(f"{tmp_path}/{path}" for path in paths)
    assert str(error.value).startswith(f"{tmp_path}/{found.replace('DIR', str(tmp_path))}; give")


def test_one_file_by_a_relative_and_an_absolute_path_is_refused(tmp_path, monkeypatch):
    make_files(tmp_path, "a.jsonl b.jsonl")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=f"^{tmp_path}/a.jsonl: is the same file as a.jsonl; "):
        files_of(["a.jsonl", f"{tmp_path}/a.jsonl"])
    (tmp_path / "b.jsonl").write_bytes((tmp_path / "a.jsonl").read_bytes())
    assert files_of(["a.jsonl", "b.jsonl"]) == ["a.jsonl", "b.jsonl"]  # a copy is another file


def test_errors_in_a_directory_name_the_file(tmp_path):
    make_files(tmp_path, "a.jsonl b.jsonl")
    (tmp_path / "b.jsonl").write_text(json.dumps(PAIR) + "\n[]")
    with pytest.raises(ValueError, match=f"^{tmp_path}/b.jsonl:2: expected an object"):
        list(data.load_comparisons(tmp_path))


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


MESSAGE = '{"role": "user", "content": "u", "content": "v"}'
REPEATED_KEYS = {  # the JSON of a row, the key that it has twice or three times
    "field": ('{"prompt": "p", "chosen": "a", "rejected": "b", "chosen": "c"}', "chosen", 2),
    "three": ('{"prompt": 1, "prompt": 2, "prompt": "p", "responses": ["a", "b"]}', "prompt", 3),
    "equal values": ('{"prompt": "p", "chosen": "a", "chosen": "a", "rejected": "b"}', "chosen", 2),
    "message": (f'{{"prompt": [{MESSAGE}], "chosen": "a", "rejected": "b"}}', "content", 2),
    "message of a response": (f'{{"chosen": [{MESSAGE}], "rejected": "b"}}', "content", 2),
    "field that is not read": (
        '{"prompt": "p", "chosen": "a", "rejected": "b", "more": [{"x": {"id": 1, "id": 2}}]}',
        "id",
        2,
    ),
    "escaped": ('{"prompt": "p", "chosen": "a", "rejected": "b", "\\u0063hosen": 1}', "chosen", 2),
}


@pytest.mark.parametrize("file", ["a.jsonl", "a.json", "array.json"])
@pytest.mark.parametrize("text, key, count", REPEATED_KEYS.values(), ids=REPEATED_KEYS)
def test_a_key_that_stands_twice_is_an_error_of_its_row(tmp_path, file, text, key, count):
    """Python's json would take the last value, and say nothing; such a row can be skipped."""
    rows = [GOOD.decode().strip(), text, GOOD.decode().strip()]
    content = "\n".join(rows)
    if file.startswith("array"):
        content = "[" + ",\n".join(rows) + "]"
    (tmp_path / file).write_text(content)
    with pytest.raises(ValueError) as error:
        list(data.load_comparisons(tmp_path / file))
    found = f'"{key}": found {count} times in one object; give each key once'
    assert str(error.value) == f"{tmp_path / file}:2: {found}"
    bad_rows = []
    assert len(list(data.load_comparisons(tmp_path / file, bad_rows=bad_rows))) == 2
    assert bad_rows == [f"2: {found}"]


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
    for path, found in [
        (tmp_path / "none.jsonl", "no such file"),
        (tmp_path, "a directory without a data file"),
    ]:
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
