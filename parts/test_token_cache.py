"""Token files: what is in them, when they are found again, and what a killed builder leaves."""

import dataclasses
import gzip
import inspect
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import zlib
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest

import data
from conftest import forked, forked_ok, same_bits
from data import Comparison
from parts import token_cache
from parts.rows import NO_PROMPT, REPEATED, TWICE, Reading, reading_of
from parts.test_rows import GOOD, lines
from parts.test_tokenizers import tokenizer  # noqa: F401, a fixture
from test_data import Letters, groups_of, letters


def write(path, comparisons):
    """Write a file of comparisons, with blank lines; None becomes a row that is no comparison."""
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


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.json"])
def test_token_file_is_mapped_and_has_what_tokenize_gives(tmp_path, tokenizer, name):
    """Rows keep their numbers, so that --data_split counts as DeepSpeed-Chat does: an identical
    pair is a row without sequences."""
    comparisons = (
        built_in(5)
        + [Comparison("p", ["a", "a"]), Comparison("p", ["a", "b", "a"])]
        + built_in(4, seed=4)
    )
    path = write(tmp_path / name, comparisons)
    file = data.tokenize_file(path, tokenizer, 90, "left", tmp_path / "cache")
    assert groups_of(file) == [
        [] if i == 5 else data.tokenize(c, tokenizer, 90)[:2] for i, c in enumerate(comparisons)
    ]  # of row 6, the third response repeats the first
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


def test_tokens_are_found_again_under_another_name(tmp_path, monkeypatch, tokenizer):
    def count(*arguments):
        built.append(arguments)
        return tokenized(*arguments)

    tokenized, built = data.tokenized, []
    monkeypatch.setattr(data, "tokenized", count)
    how = (tokenizer, 50, "left", tmp_path / "cache", True)
    first = data.tokenize_file(write(tmp_path / "a.jsonl", [*built_in(2), None]), *how)
    assert len(built) == 2
    for lock in (tmp_path / "cache").glob("*.lock"):
        lock.unlink()
    (tmp_path / "a.jsonl").rename(tmp_path / "b.jsonl")
    os.utime(tmp_path / "b.jsonl", (1, 1))
    again = data.tokenize_file(tmp_path / "b.jsonl", *how)
    assert len(built) == 2 and groups_of(again) == groups_of(first) and again.key == first.key
    # Nor is anything written there, which may be read-only.
    assert not list((tmp_path / "cache").glob("*.lock"))
    assert [file.bad_rows[0].partition(": ")[0] for file in (first, again)] == [
        f"{tmp_path}/a.jsonl:5",
        f"{tmp_path}/b.jsonl:5",
    ]


CHANGES = {  # of the arguments of tokenize_file: each makes other tokens, or might
    "content": dict(path="other.jsonl"),
    "kind of file, JSON": dict(path="same.json"),
    "kind of file, gzip": dict(path="same.jsonl.gz"),
    "kind of file, parquet": dict(path="same.parquet"),
    "pad id": dict(tokenizer=lambda tokenizer: data.Tokenizer(tokenizer.model_proto, 5)),
    "tokenizer": dict(tokenizer=lambda tokenizer: data.train_tokenizer(["ab", "abc"] * 9, 300)),
    "max_seq_len": dict(max_seq_len=51),
    "truncation_side": dict(truncation_side="right"),
    "skip_bad_rows": dict(skip_bad_rows=True),
    "fields": dict(reading=reading_of({"chosen": "rejected", "rejected": "chosen"})),
    "subset": dict(reading=reading_of({"subset": "kind"})),
    "ignore_fields": dict(reading=reading_of(ignore_fields=["margin"])),
    "another one": dict(reading=reading_of(ignore_fields=["system"])),
    "text_as": dict(reading=reading_of(text_as="messages")),
}


@pytest.fixture(scope="module")
def keys(tmp_path_factory, tokenizer):
    """Return the keys of one file of rows, by what is changed of the arguments."""
    folder = tmp_path_factory.mktemp("keys")
    rows = [{"prompt": c.prompt, "chosen": "a", "rejected": "b"} for c in built_in(2)]
    content = lines(rows).encode()
    for name in ("same.jsonl", "same.json"):
        (folder / name).write_bytes(content)
    (folder / "same.jsonl.gz").write_bytes(gzip.compress(content))
    (folder / "other.jsonl").write_bytes(content + b"\n")
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    pyarrow.parquet.write_table(pyarrow.table(columns), folder / "same.parquet")
    usual = dict(
        path="same.jsonl",
        tokenizer=lambda tokenizer: tokenizer,
        max_seq_len=50,
        truncation_side="left",
        cache_dir=folder / "cache",
        skip_bad_rows=False,
        reading=Reading(),
    )
    found = {}
    for name, change in {"none": {}, "again": {}, **CHANGES}.items():
        how = usual | change
        how |= {"path": folder / how["path"], "tokenizer": how["tokenizer"](tokenizer)}
        found[name] = data.tokenize_file(**how).key
    return found


@pytest.mark.parametrize("change", CHANGES)
def test_the_key_follows_from_every_argument(keys, change):
    assert keys["again"] == keys["none"]
    others = [key for name, key in keys.items() if name not in (change, "again")]
    assert keys[change] not in others


def test_the_key_follows_from_the_version_and_from_all_of_tokenize_file(
    keys, tmp_path, monkeypatch
):
    """A new argument of tokenize_file needs a case above; a new version makes all tokens anew."""
    arguments = inspect.signature(data.tokenize_file).parameters.keys() - {"cache_dir"}
    assert {name for change in CHANGES.values() for name in change} == arguments
    assert {field.name for field in dataclasses.fields(Reading)} <= CHANGES.keys()
    path = write(tmp_path / "a.jsonl", built_in(2))
    how = (path, Letters(), 50, "left", tmp_path / "cache")
    first, hash_of = data.tokenize_file(*how).key, token_cache.hash_of

    def other_version(version, *parts):
        return hash_of(version + "0", *parts)

    assert data.tokenize_file(*how).key == first
    monkeypatch.setattr(token_cache, "hash_of", other_version)
    assert data.tokenize_file(*how).key != first


def test_notes_subsets_and_counts_are_stored_with_the_tokens(tmp_path, monkeypatch):
    """They come from the cache as they were when the file was read."""
    rows = [
        {"prompt": "p", "chosen": "a", "rejected": "b", "label": 1, "subset": "x", "target": 0.5},
        {"prompt": "p", "chosen": "a", "rejected": "b", "label": 2, "subset": "y"},
        {"prompt": "p", "responses": ["a", "b", "a"], "subset": "x"},
        {"prompt": "p q", "chosen": "p qa", "rejected": "p qb", "margin": 1},
        {"prompt": "p", "chosen": "a" * 30, "rejected": "b", "label": None},
        {"prompt": "p", "chosen": "a" * 30, "rejected": "a" * 30, "label": 3, "subset": "z"},
        {"prompt": "p"},
        {"chosen": "a", "rejected": "b"},
    ]
    path = tmp_path / "a.jsonl"
    path.write_text(lines(rows))
    how = (path, Letters(), 20, "left", tmp_path / "cache", True)
    for _ in range(2):
        file = data.tokenize_file(*how)
        assert file.notes() == [
            f'{path}: field "label" is not read (3 rows)',
            f"{path}: {TWICE} (1 row)",
            f"{path}: {REPEATED} (1 row)",
            f"{path}: {NO_PROMPT} (1 row)",
            f"{path}: 1 row with a margin, which the loss takes off the difference of the rewards",
            f"{path}: 1 row with a target other than 1, the probability that the first response is "
            "preferred",
            f"{path}: skipped 1 row without a comparison; the first: {path}:7: fields found: "
            "prompt; expected chosen and rejected, or prompt and responses; --fields reads fields "
            "with other names",
        ]
        found = [file[i] for i in range(7)]
        assert [one.subset for one in found] == ["x", "y", "x", None, None, "z", None]
        assert [one.target for one in found] == [0.5, 1, 1, 1, 1, 1, 1]
        assert [one.margin for one in found] == [0, 0, 0, 1, 0, 0, 0]
        assert [one.truncated for one in found] == [False] * 4 + [True, True, False]
        assert [len(one.sequences) for one in found] == [2, 2, 2, 2, 2, 0, 2]
        every = data.select([file], np.array([(0, row) for row in range(7)]))
        assert (len(every), every.dropped, every.truncated) == (6, 1, 1)  # of those that are left
        few = data.select([file], np.array([(0, 0), (0, 1)]))
        assert (len(few), few.dropped, few.truncated) == (2, 0, 0)
        monkeypatch.setattr(data, "tokenize_rows", None)  # the second time nothing is tokenized


@pytest.mark.parametrize(
    "counts, text",
    [
        ((2, 0, 0), "2 comparisons"),
        ((1, 0, 0), "1 comparison"),
        ((2, 1, 0), "2 comparisons; 1 dropped for identical sequences"),
        ((1500, 0, 7), "1,500 comparisons; 7 truncated to --max_seq_len 20"),
        (
            (3, 4, 1),
            "3 comparisons; 4 dropped for identical sequences; 1 truncated to --max_seq_len 20",
        ),
    ],
)
def test_summary_says_nothing_about_none(counts, text):
    size, dropped, truncated = counts
    selected = np.zeros((size, 2), np.int64)
    assert token_cache.TokenizedData([], selected, dropped, truncated).summary(20) == text


def test_notes_on_files_say_which_flags_name_no_field(tmp_path):
    rows = [{"prompt": "p", "chosen": "a", "rejected": "b", "label": 1}]
    files = []
    reading = reading_of({"subset": "kind"}, ["label", "lable"])
    for name, more in (("a.jsonl", {}), ("b.jsonl", {"kind": "k", "x": 1})):
        (tmp_path / name).write_text(lines([rows[0] | more]))
        how = (tmp_path / name, Letters(), 20, "left", tmp_path / "cache", False, reading)
        files.append(data.tokenize_file(*how))
    unused = '--ignore_fields lable: no row has a field "lable"'
    unread = f'{tmp_path}/b.jsonl: field "x" is not read (1 row)'
    assert token_cache.file_notes(files, [], reading) == [unread, unused]
    assert token_cache.file_notes(files[:1], files[1:], reading) == [unread, unused]
    kind = '--fields subset=kind (--eval_by): no row has a field "kind"'
    assert token_cache.file_notes(files[:1], [], reading) == [unused, kind]


def test_copies_of_files_are_named_and_files_to_train_and_to_evaluate_on(tmp_path):
    files = []
    for name, prompt in (("a.jsonl", "p"), ("b.jsonl", "q"), ("copy.jsonl", "p")):
        path = tmp_path / name
        path.write_text(lines([{"prompt": prompt, "chosen": "a", "rejected": "b"}]))
        how = (path, Letters(), 20, "left", tmp_path / "cache", False, Reading())
        files.append(data.tokenize_file(*how))
    a, b, copy = files
    twice = (
        f"{tmp_path}/copy.jsonl: has the content of {tmp_path}/a.jsonl, so each row counts twice"
    )
    assert token_cache.file_notes(files, [], Reading()) == [twice]
    assert token_cache.file_notes([b], [a, copy], Reading()) == [twice]
    assert token_cache.file_notes([a], [b], Reading()) == []
    for file in (a, copy):
        (line,) = token_cache.file_notes([b, a], [file], Reading())
        assert line.startswith(f"{file.path}: its rows are trained on, too ({tmp_path}/a.jsonl), ")


def test_a_file_is_hashed_once_and_again_if_it_changes(tmp_path, monkeypatch):
    path = tmp_path / "a"
    path.write_bytes(b"abc")
    first = token_cache.file_hash(path)
    with monkeypatch.context() as patch:
        patch.setattr(token_cache.hashlib, "file_digest", None)
        assert token_cache.file_hash(path) == first
    path.write_bytes(b"abd")
    os.utime(path, (1, 1))
    assert token_cache.file_hash(path) != first


def test_bad_rows_of_a_token_file(tmp_path):
    """The first bad row is the error; or all are skipped, and listed."""
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
            match=f"^{path}: no row of it is a comparison, "
            f"for example {path}:3: fields found: prompt",
        ):
            read()
    write(path, [Comparison("p", ["abc", "abd"])] * 2)
    expected = f"^{path}: has 2 rows, and the responses of each are identical .*--max_seq_len 4"
    with pytest.raises(ValueError, match=expected):
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


def flip(file, bit=0):
    content = bytearray(file.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    file.write_bytes(content)


def replace_by(make):
    def replace(file):
        file.unlink()
        make(file)

    return replace


DAMAGES = {  # of a file
    "first bit": flip,
    "last bit": lambda file: flip(file, 8 * file.stat().st_size - 1),
    "zeros": lambda file: file.write_bytes(bytes(file.stat().st_size)),
    "half": lambda file: os.truncate(file, file.stat().st_size // 2),
    "without the last byte": lambda file: os.truncate(file, file.stat().st_size - 1),
    "longer": lambda file: file.write_bytes(file.read_bytes() * 2),
    "empty": lambda file: file.write_bytes(b""),
    "five": lambda file: file.write_bytes(b"5"),
    "bracket": lambda file: file.write_bytes(b"["),
    "nesting": lambda file: file.write_bytes(b"[" * 10**5),
    "missing": Path.unlink,
    "a directory": replace_by(Path.mkdir),
    "a named pipe": replace_by(os.mkfifo),
    "a lost link": replace_by(lambda file: file.symlink_to("nowhere")),
}
ENTRY = ("tokens.bin", "sequences.npy", "rows.npy", "bad_rows.json", "about.json", "checksums.json")


@pytest.mark.parametrize("kind", DAMAGES)
@pytest.mark.parametrize("name", ENTRY)
def test_a_damaged_entry_is_made_again_and_a_line_says_so(tmp_path, name, kind, capsys):
    path = write(tmp_path / "a.jsonl", [Comparison("p", ["a", "b"]), None])
    how = (path, Letters(), 99, "left", tmp_path / "cache", True)
    file = data.tokenize_file(*how)
    expected = file.notes(), groups_of(file)
    directory = tmp_path / "cache" / file.key
    assert {file.name for file in directory.iterdir()} == set(ENTRY)
    assert capsys.readouterr().out == ""
    DAMAGES[kind](directory / name)
    file = data.tokenize_file(*how)
    assert (file.notes(), groups_of(file)) == expected
    line = capsys.readouterr().out
    assert line.startswith(f"{directory}: ") and line.count("\n") == 1 and "made again" in line
    assert name in line or name == "checksums.json"
    file = data.tokenize_file(*how)
    assert (file.notes(), groups_of(file)) == expected and capsys.readouterr().out == ""


@pytest.mark.parametrize("make", [Path.touch, os.mkfifo, Path.mkdir])
def test_something_else_in_place_of_an_entry_is_replaced(tmp_path, make, capsys):
    path = write(tmp_path / "a.jsonl", [Comparison("p", ["a", "b"])])
    how = (path, Letters(), 99, "left", tmp_path / "cache")
    directory = tmp_path / "cache" / data.tokenize_file(*how).key
    shutil.rmtree(directory)
    make(directory)
    assert letters(groups_of(data.tokenize_file(*how))) == [["<pa>", "<pb>"]]
    assert capsys.readouterr().out.startswith(f"{directory}: ")


@pytest.mark.parametrize(
    "name, content",
    [
        ("bad_rows.json", b"5"),
        ("bad_rows.json", b"["),
        ("about.json", b"[]"),
        ("about.json", b"{}"),
        ("sequences.npy", b""),
        ("rows.npy", b"\x93NUMPY"),
        ("tokens.bin", b""),
        ("tokens.bin", b"1234"),
    ],
)
def test_foreign_content_with_right_checksums_is_named(tmp_path, name, content):
    """Somebody has made the checksums anew."""
    path = write(tmp_path / "a.jsonl", [Comparison("p", ["a", "b"])])
    how = (path, Letters(), 99, "left", tmp_path / "cache")
    directory = tmp_path / "cache" / data.tokenize_file(*how).key
    (directory / name).write_bytes(content)
    (directory / "checksums.json").unlink()
    token_cache.write_checksums(directory)
    with pytest.raises(ValueError, match=f"^{directory}: foreign .*; delete it, and it will be"):
        data.tokenize_file(*how)


def test_processes_that_find_damage_at_once_build_once(tmp_path, capsys):
    """They wait for each other at the first look, and at the lock; one builds, all use it."""
    built, found = [], []
    looks = threading.Barrier(4)

    def build(directory):
        (directory / "file").write_text("whole")
        built.append(directory)

    def look():
        entry = tmp_path / "a"
        assert token_cache.damage(entry)
        looks.wait(timeout=600)
        found.append((token_cache.cached(entry, build) / "file").read_text())

    token_cache.cached(tmp_path / "a", build)
    (tmp_path / "a" / "file").write_text("whale")
    threads = [threading.Thread(target=look) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == ["whole"] * 4 and len(built) == 2
    assert capsys.readouterr().out.count("file is damaged; it is discarded, and made again") == 1


def test_two_ranks_that_find_damage_train_on_what_one_of_them_makes_again(small, tmp_path):
    """Both look before either has prepared. The weights are those of a run with a fresh cache."""
    cache = tmp_path / "cache"
    arguments = [*small, "--max_steps 2 --data_output_path", cache]
    forked_ok(tmp_path / "first", *arguments, processes=2)
    damaged = sorted(cache.glob("*/tokens.bin")) + sorted(cache.glob("*/tokenizer.model"))
    for file in damaged:
        flip(file, 80)
    codes, said = forked(tmp_path / "second", *arguments, processes=2)
    assert codes == [0, 0] and len(damaged) == 3
    for file in damaged:
        line = f"{file.parent}: {file.name} is damaged; it is discarded, and made again"
        assert "".join(said).count(line) == 1
    same_bits(tmp_path / "second", tmp_path / "first")


def test_checksums_are_those_of_zlib_in_any_blocks(tmp_path):
    content = np.random.default_rng(0).bytes(3 * 2**20 + 7)
    (tmp_path / "a").write_bytes(content)
    assert token_cache.checksum(tmp_path / "a") == [len(content), zlib.crc32(content)]


# --------------------------------------------------------------------------------------------------
# Files that change


def put(path, content, like=None):
    """Write a file in place, or with `like`, the result of os.stat, as if it were as old."""
    path.write_bytes(content)
    if like:
        os.utime(path, ns=(like.st_atime_ns, like.st_mtime_ns))


@pytest.mark.parametrize("keeps_time", [False, True])
@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.json", "a.parquet"])
@pytest.mark.parametrize("moment", ["before", "while", "while, and back"])
def test_tokens_are_never_kept_under_the_hash_of_another_content(
    tmp_path, monkeypatch, moment, name, keeps_time
):
    """The file changes behind its hash: before it is read, as it is, or until it has been read."""
    path, other = tmp_path / name, tmp_path / f"other {name}"
    for file, response in ((path, "a"), (other, "b")):
        row = {"prompt": "p", "chosen": response, "rejected": "c"}
        if name.endswith(".parquet"):
            table = pyarrow.table({field: [text] for field, text in row.items()})
            pyarrow.parquet.write_table(table, file)
        else:
            content = lines([row]).encode()
            file.write_bytes(gzip.compress(content, mtime=0) if ".gz" in name else content)
    first, second = path.read_bytes(), other.read_bytes()
    assert first != second and len(first) == len(second)
    stat = os.stat(path) if keeps_time else None
    read_rows, build_from = token_cache.read_rows, token_cache.build_from

    def changed_before(*arguments):
        put(path, second, stat)
        build_from(*arguments)

    def changed_while(file):
        put(path, second, stat)
        yield from read_rows(file)
        if "back" in moment:
            put(path, first)

    if moment == "before":
        monkeypatch.setattr(token_cache, "build_from", changed_before)
    else:
        monkeypatch.setattr(token_cache, "read_rows", changed_while)
    how = (Letters(), 99, "left", tmp_path / "cache")
    with pytest.raises(ValueError, match=f"^{path}: was changed while it was read; start again"):
        data.tokenize_file(path, *how)
    assert {entry.suffix for entry in (tmp_path / "cache").iterdir()} == {".lock"}
    monkeypatch.undo()
    response = "b" if path.read_bytes() == second else "a"
    assert letters(groups_of(data.tokenize_file(path, *how))) == [[f"<p{response}>", "<pc>"]]


def test_a_file_that_changes_while_it_is_read_is_not_kept(tmp_path, monkeypatch):
    def grow(*arguments):
        with open(path, "ab") as file:
            file.write(GOOD)
        return tokenize_rows(*arguments)

    path = write(tmp_path / "a.jsonl", [Comparison("p", ["a", "b"])])
    tokenize_rows = data.tokenize_rows
    monkeypatch.setattr(data, "tokenize_rows", grow)
    with pytest.raises(ValueError, match=f"^{path}: was changed while it was read"):
        data.tokenize_file(path, Letters(), 99, "left", tmp_path / "cache")
    assert {entry.suffix for entry in (tmp_path / "cache").iterdir()} == {".lock"}


def test_chunks_of_rows(monkeypatch):
    monkeypatch.setattr(token_cache, "CHUNK_BYTES", 10)
    rows = [(i, b"x" * size) for i, size in enumerate([4, 5, 1, 3, 30, 2, 2])]
    assert list(token_cache.divide_rows(iter(rows))) == [rows[:3], rows[3:5], rows[5:]]
    assert list(token_cache.divide_rows(iter(rows[:5]))) == [rows[:3], rows[3:5]]


@pytest.mark.parametrize("kind", ["sentencepiece", "Hugging Face"])
def test_chunks_change_nothing(tmp_path, monkeypatch, tokenizer, capfd, kind):
    """The arrays, the skipped rows and the first error are the same; larger files have a bar."""
    if kind == "Hugging Face":
        tokenizer.save(tmp_path)
        tokenizer = data.load_tokenizer(tmp_path / "tokenizer.json")
    comparisons = built_in(150)
    comparisons[60] = comparisons[130] = None
    path, found = write(tmp_path / "a.jsonl", comparisons), []
    for chunk, skip in itertools.product((1 << 20, 1500, 1), (True, False)):
        monkeypatch.setattr(token_cache, "CHUNK_BYTES", chunk)
        try:
            file = data.tokenize_file(
                path, tokenizer, 50, "left", tmp_path / f"cache {chunk}", skip
            )
            arrays = (file.tokens, file.sequences, file.rows)
            found.append([*(array.tolist() for array in arrays), file.bad_rows])
        except ValueError as error:
            found.append(str(error))
        bar = capfd.readouterr().err
        is_large = chunk <= 1500
        assert ("tokenize a.jsonl: " in bar) == is_large
        assert ("150 rows" in bar) == (is_large and skip)
    assert found[:2] == found[2:4] == found[4:]
    assert len(found[0][2]) == 148 and len(found[0][3]) == 2
    assert found[1].startswith(f"{path}:121: fields found")


def bad_and_cut(path):
    """Write a gzip file whose third line is a bad row, and whose end is cut off."""
    write(path, [Comparison("p", ["a", "b"]), None])
    path.write_bytes(path.read_bytes()[:-3])


def empty_and_bad(path):
    """Write rows of which line 3 has no token, and line 5 no responses."""
    write(path, [Comparison("p", ["a", "b"]), Comparison("", ["a", ""]), None])


@pytest.mark.parametrize("chunk", [1, 1 << 20])
@pytest.mark.parametrize(
    "name, write_bad, words",
    [
        ("a.jsonl.gz", bad_and_cut, "fields found: prompt"),
        ("a.jsonl", empty_and_bad, "responses.1. and its prompt are empty"),
    ],
)
def test_the_error_of_the_first_bad_row_is_raised(
    tmp_path, monkeypatch, chunk, name, write_bad, words
):
    """Rows of a chunk are parsed, then encoded together; their errors come in the file's order."""
    monkeypatch.setattr(token_cache, "CHUNK_BYTES", chunk)
    write_bad(tmp_path / name)
    with pytest.raises(ValueError, match=f"^{tmp_path / name}:3: {words}"):
        data.tokenize_file(tmp_path / name, Letters(None, None), 99, "left", tmp_path / "cache")


def test_processes_that_need_the_same_directory_wait_for_the_one_that_builds(tmp_path, monkeypatch):
    """The directory is on the disk before it is named, and lacks a killed builder's files."""
    built, found, synced, at_the_lock = [], [], [], []
    half_built, all_came = threading.Event(), threading.Event()
    flock = token_cache.fcntl.flock

    def build(directory):
        (directory / "file").write_text("half")
        half_built.set()
        assert all_came.wait(timeout=600)
        (directory / "file").write_text("whole")
        built.append(directory)

    def count(*arguments):
        at_the_lock.append(arguments)
        if len(at_the_lock) == 4:
            all_came.set()
        flock(*arguments)

    def read():
        found.append((token_cache.cached(tmp_path / "new/a", build) / "file").read_text())

    monkeypatch.setattr(token_cache.fcntl, "flock", count)
    monkeypatch.setattr(os, "fsync", lambda file: synced.append(Path(file.name)))
    (tmp_path / "new" / "a.part" / "left").mkdir(parents=True)
    threads = [threading.Thread(target=read) for _ in range(4)]
    threads[0].start()
    assert half_built.wait(timeout=600)
    for thread in threads[1:]:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == ["whole"] * 4 and len(built) == 1
    part = tmp_path / "new/a.part"
    assert sorted(synced) == [part / "checksums.json", part / "file"]
    assert {str(entry.relative_to(tmp_path)) for entry in tmp_path.rglob("*")} == {
        "new",
        "new/a",
        "new/a.lock",
        "new/a/checksums.json",
        "new/a/file",
    }
    # In a directory that is not there yet:
    token_cache.cached(tmp_path / "other/b", lambda directory: None)


def test_what_a_killed_builder_leaves_is_not_used(tmp_path, tokenizer):
    """SIGKILL between two chunks, none read ahead. The next process builds the whole file."""
    path, cache = write(tmp_path / "a.jsonl", built_in(300)), tmp_path / "cache"
    (tmp_path / "tokenizer.model").write_bytes(tokenizer.model_proto)
    program = """
import sys, time, data
from parts import token_cache
def count(path, read_rows=token_cache.read_rows):
    global rows_read
    for rows_read, row in enumerate(read_rows(path), start=1):
        yield row
calls = []
def stop_at_the_second(rows, *how, tokenize_rows=data.tokenize_rows):
    calls.append(rows)
    if len(calls) == 2:
        print(rows_read, flush=True)  # and one chunk is written
        time.sleep(1000)
    return tokenize_rows(rows, *how)
token_cache.read_rows, data.tokenize_rows, token_cache.CHUNK_BYTES = count, stop_at_the_second, 500
data.tokenize_file(sys.argv[1], data.load_tokenizer(sys.argv[2]), 50, "left", sys.argv[3])
"""
    arguments = [sys.executable, "-c", program, path, tmp_path / "tokenizer.model", cache]
    directory = Path(data.__file__).parent
    with subprocess.Popen(
        arguments, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, cwd=directory
    ) as builder:
        try:
            assert 0 < int(builder.stdout.readline()) <= 6  # 500 bytes are 2 or 3 rows
        finally:
            builder.kill()
    (part,) = cache.glob("*.part")
    assert (part / "tokens.bin").exists() and not part.with_suffix("").exists()
    file = data.tokenize_file(path, tokenizer, 50, "left", cache)
    assert groups_of(file) == [data.tokenize(c, tokenizer, 50) for c in built_in(300)]
    assert {entry.name for entry in cache.iterdir()} == {file.key, file.key + ".lock"}
