"""docs/data.md: its rows are read as it says, and its code makes rows of other data sets."""

import json
import re
from pathlib import Path

import pytest

import data
from parts.rows import LOOKS_LIKE_PROMPT, OURS, parse_row, reading_of

PAGE = (Path(__file__).parent / "docs" / "data.md").read_text()
USER, GOOD, BAD = (
    {"role": role, "content": content}
    for role, content in [("user", "Hi."), ("assistant", "Hello."), ("assistant", "No.")]
)


def test_the_page_is_short_and_narrow():
    assert len(PAGE.split()) < 1200
    assert max(map(len, PAGE.splitlines())) <= 100


def test_the_page_names_every_field_and_flag():
    for name in (*OURS, *LOOKS_LIKE_PROMPT):
        assert f"`{name}`" in PAGE or f'"{name}"' in PAGE, name
    for flag in ("--fields", "--ignore_fields", "--text_as", "--eval_by", "--skip_bad_rows"):
        assert flag in PAGE


TABLE = re.findall(r"^\| `(\{.*\})` \| (.*) \|$", PAGE, re.MULTILINE)
EXPECTED = [  # of the rows in the table: prompt, responses
    ("Hi. ", ["Hello.", "No."]),
    ("", ["H: Hi. A: Hello.", "H: Hi. A: No."]),
    ([USER], [[GOOD], [BAD]]),
    ([], [[USER, GOOD], [USER, BAD]]),
    ("Hi. ", ["Hello.", "Hm.", "No."]),
    ("Hi. ", ["Hello."]),
    ("Hi. ", ["Hello.", "Hm.", "No."]),
]


@pytest.mark.parametrize("row, expected", list(zip(TABLE, EXPECTED, strict=True)), ids=str)
def test_rows_of_the_table(row, expected):
    text = row[0]
    for name, message in {"USER": USER, "GOOD": GOOD, "BAD": BAD}.items():
        text = text.replace(name, json.dumps(message))
    found = parse_row(text.encode(), min_responses=1)
    assert (found["prompt"], found["responses"]) == expected


def test_the_repeated_prompt_of_the_page():
    (text,) = re.findall(r'`(\{"prompt": "Q: Hi.*\})`', PAGE)
    found = parse_row(text.encode())
    assert found["prompt"] + found["responses"][0] == "Q: Hi?\nA: Yes."
    assert found["notes"] == ("the prompt, which the responses repeat, is read once",)


def test_the_note_of_the_page():
    row = {"prompt": "p", "chosen": "a", "rejected": "b", "label": 1}
    (note,) = parse_row(json.dumps(row).encode())["notes"]
    assert f"pairs.jsonl: {note} (812 rows)" in PAGE


# --------------------------------------------------------------------------------------------------
# Data sets of others: rows of their shape, made up

CODE = {}
for block in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL):
    exec(block, CODE)


def turn(role, content, **more):
    return {"role": role, "content": content, **more}


def read(tmp_path, rows) -> list[tuple]:
    """Write rows by the page's code and read them: dialogues, target and subset of each."""
    path = tmp_path / "rows.jsonl"
    CODE["write"](rows, path)
    found = []
    for comparison in data.load_comparisons(path):
        whole = [comparison.prompt + response for response in comparison.responses]
        assert comparison.notes in (
            (),
            ("no prompt, so chosen and rejected are read as whole dialogues",),
        )
        found.append((whole, comparison.target, comparison.subset))
    return found


def test_helpsteer3(tmp_path):
    context = [turn("user", "Hi."), turn("assistant", "Hello."), turn("user", "More?")]
    rows = []
    for preference in (-3, -1, 0, 1, 3):
        row = {"domain": "stem", "language": "english", "context": context, "response1": "one"}
        row |= {"response2": "two", "overall_preference": preference, "individual_preference": []}
        rows.append(row)
    one, two = [*context, turn("assistant", "one")], [*context, turn("assistant", "two")]
    first, tie = ([one, two], 1.0, "stem"), ([one, two], 0.5, "stem")
    second = ([two, one], 1.0, "stem")
    assert read(tmp_path, CODE["helpsteer3"](rows)) == [first, first, tie, second, second]


def test_ultrafeedback(tmp_path):
    def row(*scores):
        completions = []
        for i, score in enumerate(scores):
            completions.append({"model": "m", "response": f"r{i}", "overall_score": score})
        return {"source": "s", "instruction": "Do it.", "models": [], "completions": completions}

    rows = [row(6.5, 8.0, 3.0, 7.0), row(5.0, 5.0, 7.0), row(4.0, 4.0), row(1.0)]
    dialogues = []
    for order in ([1, 3, 0, 2], [2, 1]):
        dialogues.append([[turn("user", "Do it."), turn("assistant", f"r{i}")] for i in order])
    expected = [(ranking, 1.0, None) for ranking in dialogues]
    assert read(tmp_path, CODE["ultrafeedback"](rows)) == expected


def test_shp(tmp_path):
    rows = []
    for label in (1, 0):
        row = {"post_id": "x", "domain": "askbaking_train", "history": "How?", "labels": label}
        row |= {"human_ref_A": "A", "human_ref_B": "B", "score_A": 9, "score_B": 3}
        rows.append(row | {"score_ratio": 3.0, "seconds_difference": 5.0})
    a, b = ([turn("user", "How?"), turn("assistant", name)] for name in "AB")
    expected = [([a, b], 1.0, "askbaking_train"), ([b, a], 1.0, "askbaking_train")]
    assert read(tmp_path, CODE["shp"](rows)) == expected


@pytest.mark.parametrize("has_parts", [False, True], ids=["100k", "140k"])
def test_arena(tmp_path, has_parts):
    a = [turn("user", "Hi."), turn("assistant", "A"), turn("user", "So?"), turn("assistant", "AA")]
    b = [turn("user", "Hi."), turn("assistant", "B"), turn("user", "So?"), turn("assistant", "BB")]

    def stored(dialogue):
        messages = []
        for message in dialogue:
            content = message["content"]
            if has_parts:
                content = [{"type": "text", "text": content[:1]}, {"type": "image", "text": None}]
                content.append({"type": "text", "text": message["content"][1:]})
            messages.append(turn(message["role"], content, num_tokens=3))
        return messages

    bad = "both_bad" if has_parts else "tie (bothbad)"
    rows = []
    for winner in ("model_a", "model_b", "tie", bad):
        row = {"model_a": "x", "model_b": "y", "winner": winner, "language": "English"}
        rows.append(row | {"conversation_a": stored(a), "conversation_b": stored(b)})
    expected = [([a, b], target, None) for target in (1.0, 0.0, 0.5, 0.5)]
    assert read(tmp_path, CODE["arena"](rows)) == expected


@pytest.mark.parametrize("system", [{}, {"system": ""}, {"system": "Be brief."}], ids=str)
def test_sharegpt(tmp_path, system):
    turns = [("human", "Hi."), ("gpt", "Hello."), ("human", "More?")]
    row = {"conversations": [{"from": name, "value": text} for name, text in turns], **system}
    row |= {"chosen": {"from": "gpt", "value": "A"}, "rejected": {"from": "gpt", "value": "B"}}
    context = [turn("user", "Hi."), turn("assistant", "Hello."), turn("user", "More?")]
    if system.get("system"):
        context = [turn("system", "Be brief."), *context]
    dialogues = [[*context, turn("assistant", answer)] for answer in "AB"]
    assert read(tmp_path, CODE["sharegpt"]([row])) == [(dialogues, 1.0, None)]
    row["conversations"] = [{"from": "system", "value": "Be brief."}, *row["conversations"]]
    ((whole, _, _),) = read(tmp_path, CODE["sharegpt"]([row]))
    assert whole[0][0] == turn("system", "Be brief.") and len(whole[0]) == 5


def test_functions_of_the_page_are_short():
    for block in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL):
        for name, body in re.findall(r"^def (\w+)\(data\):\n((?: .*\n)+)", block, re.MULTILINE):
            assert len(body.splitlines()) <= 7, name


def test_samples_of_other_data_sets_are_refused_as_they_are():
    """Fields that the functions read are an error that names them, or a line would be lost."""
    shp = {"history": "How?", "human_ref_A": "A", "human_ref_B": "B", "labels": 1}
    with pytest.raises(ValueError, match="fields found: history, human_ref_A"):
        parse_row(json.dumps(shp).encode())
    fields = {"chosen": "human_ref_A", "rejected": "human_ref_B"}
    with pytest.raises(ValueError, match="--fields prompt=history"):
        parse_row(json.dumps(shp).encode(), reading_of(fields))
    helpsteer = {"context": [USER], "response1": "a", "response2": "b"}
    fields = {"chosen": "response1", "rejected": "response2"}
    with pytest.raises(ValueError, match="--fields prompt=context"):
        parse_row(json.dumps(helpsteer).encode(), reading_of(fields))
    sharegpt = {"conversations": [{"from": "human", "value": "Hi."}], "chosen": {"value": "a"}}
    with pytest.raises(ValueError, match="chosen: expected text, found an object"):
        parse_row(json.dumps(sharegpt).encode())
