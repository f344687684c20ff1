"""Parquet files: the same rows as in JSON, row group by row group; nulls, types, damage."""

import datetime
import decimal
import json
import random
import re
import sys

import pyarrow
import pytest
from pyarrow import parquet

import data
from parts.parquet import BATCH_ROWS
from parts.rows import parse_row, read_rows
from parts.test_rows import ROWS, A, B, S, U, contents, lines, load

PAIR = {"prompt": "p", "chosen": "a", "rejected": "b"}


def write(path, rows, **how):
    """Write rows, with nulls for the fields that a row lacks."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    columns = {name: [row.get(name) for row in rows] for name in names}
    parquet.write_table(pyarrow.table(columns), path, **how)
    return path


def without_null(value):
    """Return JSON without the fields that are null."""
    if isinstance(value, dict):
        return {key: without_null(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [without_null(item) for item in value]
    return value


@pytest.mark.parametrize("row", [row for row, _, _ in ROWS.values()], ids=ROWS)
def test_every_format_gives_the_comparisons_of_json_lines(tmp_path, row):
    path = write(tmp_path / "a.parquet", [row, row])
    expected = load(tmp_path / "a.jsonl", lines([row, row]))
    assert list(data.load_comparisons(path)) == expected and len(expected) == 2


def random_rows(count: int, seed: int = 0) -> list[dict]:
    """Make rows of messages; fields and keys of messages are missing here and there."""
    rng = random.Random(seed)
    rows = []
    for i in range(count):
        row = {"prompt": [U | {"content": f"{i} é"}], "chosen": [A], "rejected": [dict(B)]}
        if rng.random() < 0.5:
            row["prompt"] = [S, *row["prompt"]]
        if rng.random() < 0.3:
            row["rejected"][0]["reasoning_content"] = "Hm."
        if rng.random() < 0.3:
            row["margin"] = rng.choice([1.5, 0.0, -2.0])
        if rng.random() < 0.3:
            row["subset"] = rng.choice(["math", "chat"])
        if rng.random() < 0.3:
            row["info"] = {"source": "x", "tags": rng.choice([[], ["a", "b"]])}
        if rng.random() < 0.2:
            row["label"] = None
        rows.append(row)
    return rows


@pytest.mark.parametrize(
    "how",
    [
        dict(row_group_size=7),
        dict(row_group_size=1),
        dict(compression="zstd"),
        dict(compression="none", use_dictionary=False),
        dict(data_page_version="2.0", data_page_size=100),
    ],
    ids=str,
)
def test_nulls_are_absent_fields(tmp_path, how):
    """Rows, row numbers and notes are those of JSON lines without the fields."""
    rows = random_rows(100)
    path = write(tmp_path / "a.parquet", rows, **how)
    expected = [(i, without_null(row)) for i, row in enumerate(rows, start=1)]
    assert [(i, json.loads(text)) for i, text in read_rows(path)] == expected
    expected = load(tmp_path / "a.jsonl", lines(without_null(rows)))
    assert list(data.load_comparisons(path)) == expected
    assert any("reasoning_content" in note for c in expected for note in c.notes)
    assert any("info" in note for c in expected for note in c.notes)
    assert not any("label" in note for c in expected for note in c.notes)


def test_rows_of_different_formats_in_one_file(tmp_path):
    """Each has nulls where the other has its fields."""
    rows = [PAIR, {"chosen": "a", "rejected": "b"}, {"prompt": "p", "responses": ["a", "b", "c"]}]
    rows.append({"prompt": "p", "response": "a"})
    path = write(tmp_path / "a.parquet", rows)
    found = list(data.load_comparisons(path, min_responses=1))
    expected = [("p", ["a", "b"]), ("", ["a", "b"]), ("p", ["a", "b", "c"]), ("p", ["a"])]
    assert contents(found) == expected
    assert found == load(tmp_path / "a.jsonl", lines(rows), min_responses=1)


def test_more_rows_than_are_read_at_once(tmp_path):
    rows = [{**PAIR, "prompt": f"{i}"} for i in range(2 * BATCH_ROWS + 3)]
    path = write(tmp_path / "a.parquet", rows, row_group_size=BATCH_ROWS + 1)
    found = [(i, json.loads(text)["prompt"]) for i, text in read_rows(path)]
    assert found == [(i + 1, f"{i}") for i in range(len(rows))]


TIME = datetime.datetime(2020, 1, 2, 3, 4, 5, 600)
UNREAD = {  # a column of each kind, which nothing reads
    "ns": pyarrow.array([1], pyarrow.timestamp("ns")),
    "zone": pyarrow.array([1], pyarrow.timestamp("us", "Europe/Berlin")),
    "duration": pyarrow.array([1], pyarrow.duration("ns")),
    "date": pyarrow.array([TIME.date()]),
    "time": pyarrow.array([1], pyarrow.time64("ns")),
    "decimal": pyarrow.array([decimal.Decimal("1.50")]),
    "bytes": pyarrow.array([b"\xff\x00"]),
    "map": pyarrow.array([[("k", 1)]], pyarrow.map_(pyarrow.string(), pyarrow.int64())),
    "names": pyarrow.array(["x"]).dictionary_encode(),
    "half": pyarrow.array([1.5], pyarrow.float16()),
    "nan": pyarrow.array([float("nan")]),
    "huge": pyarrow.array([2**63], pyarrow.uint64()),
    "yes": pyarrow.array([True]),
    "image": pyarrow.array([{"bytes": b"\x89PNG", "path": None, "at": TIME}]),
    "messages": pyarrow.array([[{"role": "user", "at": TIME, "n": None}]]),
    "fixed": pyarrow.array([b"ab"], pyarrow.binary(2)),
}


@pytest.mark.parametrize("name", UNREAD)
def test_columns_of_any_kind_may_stand_beside(tmp_path, name):
    columns = {field: [value] for field, value in PAIR.items()}
    columns |= {"null": pyarrow.nulls(1), name: UNREAD[name]}
    parquet.write_table(pyarrow.table(columns), tmp_path / "a.parquet")
    (comparison,) = data.load_comparisons(tmp_path / "a.parquet")
    assert contents([comparison]) == [("p", ["a", "b"])]
    assert comparison.notes == (f'field "{name}" is not read',)


def test_text_and_numbers_of_other_types_are_read(tmp_path):
    columns = {
        "prompt": pyarrow.array(["é"], pyarrow.large_string()),
        "chosen": pyarrow.array(["a"]).dictionary_encode(),
        "rejected": pyarrow.array(["ß".encode()]),  # text that was stored as bytes
        "margin": pyarrow.array([decimal.Decimal("1.5")]),
        "target": pyarrow.array([1], pyarrow.int8()),
        "subset": pyarrow.array([TIME.date()]),
    }
    parquet.write_table(pyarrow.table(columns), tmp_path / "a.parquet")
    (found,) = data.load_comparisons(tmp_path / "a.parquet")
    assert contents([found]) == [("é", ["a", "ß"])]
    assert (found.margin, found.target, found.subset) == (1.5, 1.0, "2020-01-02")


def test_bytes_that_are_no_text_are_an_error_of_their_row(tmp_path):
    path = write(tmp_path / "a.parquet", [{**PAIR, "chosen": b"a"}, {**PAIR, "chosen": b"\xff"}])
    rows = data.load_comparisons(path)
    assert next(rows).responses == ["a", "b"]
    with pytest.raises(ValueError, match=f"^{path}:2: chosen: expected text, found an object"):
        next(rows)


def test_errors_name_the_row(tmp_path):
    rows = [PAIR, PAIR, {"prompt": "p", "chosen": "a"}, PAIR]
    path = write(tmp_path / "a.parquet", rows, row_group_size=2)
    with pytest.raises(ValueError, match=f"^{path}:3: rejected: expected text, found null"):
        list(data.load_comparisons(path))
    bad_rows = []
    assert len(list(data.load_comparisons(path, bad_rows=bad_rows))) == 3
    assert bad_rows == ["3: rejected: expected text, found null or nothing"]
    path = write(tmp_path / "b.parquet", [{"question": "q", "chosen": "a", "rejected": "b"}])
    with pytest.raises(ValueError, match=f"^{path}:1: .*--fields prompt=question"):
        list(data.load_comparisons(path))


@pytest.mark.parametrize("rows", [{"prompt": pyarrow.array([], pyarrow.string())}, {}])
def test_a_file_without_rows(tmp_path, rows):
    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table(rows), path)
    with pytest.raises(ValueError, match=f"^{path}: no row in it"):
        list(data.load_comparisons(path))


# --------------------------------------------------------------------------------------------------
# Damage


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: b"",
        lambda content: b"PAR1",
        lambda content: content[:-1],
        lambda content: content[: len(content) // 2],
        lambda content: b"\0" * len(content),
        lambda content: lines([PAIR]).encode(),
    ],
    ids=["empty", "start alone", "end cut", "half", "zeros", "JSON lines"],
)
def test_a_damaged_file_is_named(tmp_path, damage):
    path = write(tmp_path / "a.parquet", [PAIR] * 50)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=f"^{path}: cannot be read after row 0 .*or no parquet"):
        list(data.load_comparisons(path))


@pytest.mark.parametrize("part", ["pages", "footer"])
def test_a_flipped_byte_ends_in_rows_or_in_an_error_that_names_the_file(tmp_path, part):
    path = write(tmp_path / "a.parquet", random_rows(60), row_group_size=20, compression="zstd")
    whole, rng = path.read_bytes(), random.Random(0)
    footer = len(whole) - 8 - int.from_bytes(whole[-8:-4], "little")
    first, last = (4, footer) if part == "pages" else (footer, len(whole))
    failed = 0
    for _ in range(150):
        content = bytearray(whole)
        content[rng.randrange(first, last)] ^= 1 << rng.randrange(8)
        path.write_bytes(content)
        try:
            for _, text in read_rows(path):
                json.loads(text)
        except ValueError as error:
            assert str(error).startswith(f"{path}: ")
            failed += 1
    assert failed > 20


def test_row_groups_in_front_of_a_damaged_one_are_read(tmp_path):
    """Rows come out group by group: the first ones before a later one is looked at."""
    path = tmp_path / "a.parquet"
    write(path, random_rows(60), row_group_size=20, compression="zstd", use_dictionary=False)
    group = parquet.ParquetFile(path).metadata.row_group(2).column(0)
    content = bytearray(path.read_bytes())
    start = group.data_page_offset
    content[start : start + group.total_compressed_size] = bytes(group.total_compressed_size)
    path.write_bytes(content)
    rows = read_rows(path)
    assert [next(rows)[0] for _ in range(40)] == list(range(1, 41))
    with pytest.raises(ValueError, match=f"^{path}: cannot be read after row 40 "):
        next(rows)


@pytest.mark.parametrize("name", ["chosen", "id"])
def test_two_columns_of_one_name_are_refused(tmp_path, name):
    """A row would keep the value of the last one alone, and say nothing."""
    path, names = tmp_path / "a.parquet", ["prompt", "chosen", "rejected", "id", name]
    columns = [pyarrow.array([text]) for text in "pabcd"]
    parquet.write_table(pyarrow.table(columns, names=names), path)
    with pytest.raises(ValueError, match=f'^{path}: found two columns "{name}"; give each'):
        list(data.load_comparisons(path))


def test_an_object_with_a_name_twice_is_refused(tmp_path):
    path, values = tmp_path / "a.parquet", [pyarrow.array([text]) for text in ("user", "a", "b")]
    message = pyarrow.StructArray.from_arrays(values, names=["role", "content", "content"])
    parquet.write_table(pyarrow.table([message], names=["chosen"]), path)
    with pytest.raises(ValueError, match=f"^{path}: .*duplicate field names"):
        list(data.load_comparisons(path))


def test_without_pyarrow_the_error_has_the_line_that_installs_it(tmp_path, monkeypatch):
    path = write(tmp_path / "a.parquet", [PAIR])
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    words = f"{path}: reading it needs `pip install -r requirements-parquet.txt`"
    with pytest.raises(ValueError, match=f"^{re.escape(words)}$"):
        list(data.load_comparisons(path))
    assert load(tmp_path / "a.jsonl", lines([PAIR]))  # no other file needs it


def test_the_rows_are_json_as_parse_row_takes_it(tmp_path):
    path = write(
        tmp_path / "a.parquet", [{"prompt": '\u2028\0"\\', "chosen": "😀", "rejected": ""}]
    )
    ((_, text),) = read_rows(path)
    assert parse_row(text)["prompt"] == '\u2028\0"\\' and b"\n" not in text
