"""Files of token ids, mapped from the disk, and found again by a key of all that they follow from.

Also hashes of files and values, and directories that are built once. How rows become tokens is
handed in; `tokenize_file` in data.py does so, and has the rules.
"""

import fcntl
import functools
import hashlib
import itertools
import json
import os
import shutil
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from parts.guards import counted, one_line
from parts.inputs import is_file
from parts.memory import full_memory
from parts.rows import Reading, bad_row, note_lines, nothing_left, read_rows, unused_lines

NO_LIMIT = 1 << 40  # of tokens in a sequence
CHUNK_BYTES = 1 << 20  # rows of a file are tokenized together up to this size of their JSON
CHECKSUMS = "checksums.json"  # in a cached directory: the length and CRC-32 of its other files

# One row of a file: line number, what `Tokenized` has of it, the index of its subset's name (-1:
# none), and its sequences `first` to `first + count - 1`.
ROW = np.dtype(
    [
        ("line", "i8"),
        ("margin", "f8"),
        ("target", "f8"),
        ("subset", "i4"),
        ("truncated", "?"),
        ("first", "i8"),
        ("count", "i8"),
    ]
)


class Tokenized(NamedTuple):
    """A comparison as token ids."""

    sequences: list[list[int]]  # best first, no two of them equal; none where all responses are
    where: str = ""  # where it is from: the file and the line
    margin: float = 0.0
    rewards: list[float] | None = None  # true rewards of the responses, where they are known
    target: float = 1.0  # of two responses: the probability that the first is preferred
    subset: str | None = None
    truncated: bool = False  # whether --max_seq_len took a token


def cut_sequences(
    comparison: Tokenized, cut: Callable[[int], list[list[int]]], max_seq_len: int
) -> Tokenized:
    """Give a comparison its sequences, cut to max_seq_len, and whether this took a token.

    cut: returns all sequences, best first, with a number of tokens at most. A sequence that equals
    an earlier one is dropped, with its true reward; all are where one would be left.
    """
    sequences = cut(max_seq_len)
    truncated = is_truncated(sequences, cut, max_seq_len)
    kept = first_of_each(sequences)
    if len(kept) == 1:
        kept = []
    rewards = comparison.rewards
    if rewards is not None:
        rewards = [rewards[i] for i in kept]
    sequences = [sequences[i] for i in kept]
    return comparison._replace(sequences=sequences, rewards=rewards, truncated=truncated)


def is_truncated(
    sequences: list[list[int]], cut: Callable[[int], list[list[int]]], max_seq_len: int
) -> bool:
    """Tell whether a comparison has lost tokens. sequences: all of `cut(max_seq_len)`."""
    if max(map(len, sequences)) < max_seq_len:
        return False
    return max(map(len, cut(NO_LIMIT))) > max_seq_len


def first_of_each(sequences: list[list[int]]) -> list[int]:
    """Return the indices of the sequences that equal no earlier one."""
    return [i for i, sequence in enumerate(sequences) if sequence not in sequences[:i]]


@dataclass
class TokenizedFile:
    """The comparisons of one file, in arrays that are mapped from the disk. Item r is row r."""

    path: str
    key: str  # a hash of all that the tokens follow from
    bad_rows: list[str]  # where a row was skipped, and what is wrong with it
    counts: Counter  # how many rows have each note of `parse_row`
    subsets: list[str]  # the names of subsets
    tokens: np.ndarray  # (number of tokens,) int32, all sequences one after the other
    sequences: np.ndarray  # (S + 1,) int64. Sequence s is tokens[sequences[s] : sequences[s + 1]]
    rows: np.ndarray  # (R,) ROW. A row whose responses are identical has no sequences

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, row: int) -> Tokenized:
        line, margin, target, subset, truncated, first, count = self.rows[row].tolist()
        bounds = self.sequences[first : first + count + 1].tolist()
        sequences = [self.tokens[start:stop].tolist() for start, stop in zip(bounds, bounds[1:])]
        name = self.subsets[subset] if subset >= 0 else None
        where = f"{self.path}:{line}"
        return Tokenized(sequences, where, margin, None, target, name, truncated)

    def notes(self) -> list[str]:
        """List the lines that a user should read about this file, with numbers of rows."""
        lines = note_lines(self.path, self.counts, len(self.rows))
        with_margin = np.count_nonzero(self.rows["margin"])
        if with_margin:
            lines.append(
                f"{self.path}: {counted(with_margin, 'row')} with a margin, which the loss takes "
                "off the difference of the rewards"
            )
        with_target = np.count_nonzero(self.rows["target"] != 1)
        if with_target:
            lines.append(
                f"{self.path}: {counted(with_target, 'row')} with a target other than 1, the "
                "probability that the first response is preferred"
            )
        if self.bad_rows:
            lines.append(
                f"{self.path}: skipped {counted(len(self.bad_rows), 'row')} without a comparison; "
                f"the first: {self.bad_rows[0]}"
            )
        return lines


def file_notes(
    files: list[TokenizedFile], eval_files: list[TokenizedFile], reading: Reading
) -> list[str]:
    """List the lines that a user should read about files, and about flags that name no field."""
    lines, both = [], [*files, *eval_files]
    for file in {file.path: file for file in both}.values():
        lines += file.notes()
    lines += [*copies(files), *copies(eval_files)]
    trained_on = {file.key: file.path for file in files}
    for file in eval_files:
        if file.key in trained_on:
            lines.append(
                f"{file.path}: its rows are trained on, too ({trained_on[file.key]}), so the "
                "evaluation does not show what is learned about new ones"
            )
    return lines + unused_lines(reading, [file.counts for file in both])


def copies(files: list[TokenizedFile]) -> list[str]:
    """List a line for each file that has the content of an earlier one."""
    lines, first = [], {}
    for file in files:
        before = first.setdefault(file.key, file.path)
        if before != file.path:
            lines.append(f"{file.path}: has the content of {before}, so each row counts twice")
    return lines


@dataclass
class TokenizedData:
    """Comparisons to train or to evaluate on, without those whose responses are identical.

    Item i is row `selected[i, 1]` of `files[selected[i, 0]]`.
    """

    files: list[TokenizedFile] | list[list[Tokenized]]
    selected: np.ndarray  # (n, 2) int64
    dropped: int  # number of comparisons that were selected, and dropped as identical
    truncated: int = 0  # number of comparisons kept of which --max_seq_len took a token

    def __len__(self) -> int:
        return len(self.selected)

    def __getitem__(self, i: int) -> Tokenized:
        file, row = self.selected[i]
        return self.files[file][row]

    def summary(self, max_seq_len: int) -> str:
        """Say how many comparisons there are, how many were dropped, how many truncated."""
        text = counted(len(self), "comparison")
        if self.dropped:
            text += f"; {self.dropped:,} dropped for identical sequences"
        if self.truncated:
            text += f"; {self.truncated:,} truncated to --max_seq_len {max_seq_len}"
        return text

    def fingerprint(self) -> str:
        """Return a hash of all that tokens, margins and their order follow from; of files only."""
        return hash_of([file.key for file in self.files], hashlib.sha256(self.selected).digest())


def rows_of(files: list[TokenizedFile], pick: Callable[[int], np.ndarray]) -> np.ndarray:
    """List rows of files, (n, 2) int64: the index of a file, and of a row in it.

    pick: maps the number of rows of a file to the row numbers to use, as --data_split says.
    Raises ValueError that names a file of which no row is picked.
    """
    selected = []
    for number, file in enumerate(files):
        rows = pick(len(file))
        if len(rows) == 0:
            raise ValueError(
                f"--data_split: the second share of {file.path}, which has "
                f"{counted(len(file), 'row')}, is empty; give a larger one"
            )
        selected.append(np.stack((np.full(len(rows), number), rows), axis=1))
    return np.concatenate(selected)


def select(files: list[TokenizedFile], selected: np.ndarray) -> TokenizedData:
    """Select rows by `selected`, (n, 2) int64: the index of a file, and of a row in it."""
    kept = np.zeros(len(selected), dtype=bool)
    truncated = np.zeros(len(selected), dtype=bool)
    for number, file in enumerate(files):
        is_from_file = selected[:, 0] == number
        rows = file.rows[selected[is_from_file, 1]]
        kept[is_from_file] = rows["count"] > 0
        truncated[is_from_file] = rows["truncated"]
    dropped = int((~kept).sum())
    return TokenizedData(files, selected[kept], dropped, int((kept & truncated).sum()))


# --------------------------------------------------------------------------------------------------
# Token files


def token_file(
    path,
    cache_dir,
    tokenize_rows,
    fingerprint: str,
    max_seq_len: int,
    side: str,
    skip_bad_rows,
    reading: Reading,
) -> TokenizedFile:
    """Return the comparisons of a file as token ids, which may be larger than memory.

    tokenize_rows: takes the JSON of rows, and returns for each a `Tokenized` and the notes of
        `parse_row`, or the ValueError that says what is wrong with the row.
    fingerprint: of the tokenizer; with max_seq_len, side and reading all that tokenize_rows follows
        from.
    cache_dir: one process of a machine writes the tokens there once, while others that need them
        wait. They are found again by a hash of the file's content and the other arguments, and
        made again where they are damaged.
    Raises ValueError that names the file and the line, or the file where all rows are identical.
    """
    content = file_hash(path)
    how = (fingerprint, max_seq_len, side, skip_bad_rows, reading)
    key = hash_of("tokens 6", content, Path(path).suffix, *how)

    def build(directory: Path):
        bad_rows = [] if skip_bad_rows else None
        about = {"notes": Counter(), "subsets": {}}
        sequences, rows = write_tokens(directory, path, tokenize_rows, bad_rows, about)
        if len(rows) == 0:
            raise nothing_left(path, bad_rows)
        if len(sequences) == 1:
            raise ValueError(
                f"{path}: has {counted(len(rows), 'row')}, and the responses of each are identical "
                f"(--max_seq_len {max_seq_len}); some must differ"
            )
        np.save(directory / "sequences.npy", sequences)
        np.save(directory / "rows.npy", rows)
        (directory / "bad_rows.json").write_text(json.dumps(bad_rows or []))
        (directory / "about.json").write_text(json.dumps(about))

    return open_tokens(cached(Path(cache_dir) / key, build, {path: content}), path, key)


def write_tokens(
    directory: Path, path, tokenize_rows, bad_rows: list[str] | None, about: dict
) -> tuple[np.ndarray, np.ndarray]:
    """Write the tokens of a data file to tokens.bin; return `TokenizedFile`'s sequences and rows.

    about: "notes" counts the notes of rows; "subsets" gets an index for each name.
    Raises ValueError for the first bad row, or with `bad_rows` collects the errors there.
    """
    lengths, rows = [[0]], []  # an array for each chunk
    is_small = os.path.getsize(path) <= CHUNK_BYTES
    bar = tqdm(desc=f"tokenize {one_line(Path(path).name, 60)}", unit=" rows", disable=is_small)
    with open(directory / "tokens.bin", "wb") as out, bar:
        for chunk in divide_rows(read_rows(path)):
            sequences, found = [], []
            results = tokenize_rows([text for _, text in chunk])
            for (line, _), result in zip(chunk, results, strict=True):
                if isinstance(result, ValueError):
                    bad_row(path, line, result, bad_rows)
                    continue
                row, notes = result
                about["notes"].update(notes)
                found.append(row_of(row, line, about["subsets"]))
                sequences += row.sequences
            out.write(np.fromiter(itertools.chain(*sequences), np.int32))
            lengths.append(np.fromiter(map(len, sequences), np.int64))
            rows.append(np.array(found, ROW))
            bar.update(len(chunk))
    rows = np.concatenate(rows)
    rows["first"] = rows["count"].cumsum() - rows["count"]
    return np.concatenate(lengths).cumsum(), rows


def row_of(row: Tokenized, line: int, subsets: dict[str, int]) -> tuple:
    """Return the fields of ROW, `first` not yet known. subsets: gets an index for a new name."""
    subset = -1
    if row.subset is not None:
        subset = subsets.setdefault(row.subset, len(subsets))
    return line, row.margin, row.target, subset, row.truncated, 0, len(row.sequences)


def divide_rows(rows: Iterator[tuple[int, bytes]]) -> Iterator[list[tuple[int, bytes]]]:
    """Yield lists of rows; each ends where it reaches CHUNK_BYTES, or with the last row.

    An error of reading comes after the rows before it, which may have errors of their own.
    """
    chunk, size = [], 0
    try:
        for line, text in rows:
            chunk.append((line, text))
            size += len(text)
            if size >= CHUNK_BYTES:
                yield chunk
                chunk, size = [], 0
    except ValueError:
        yield chunk
        raise
    if chunk:
        yield chunk


def open_tokens(directory: Path, path, key: str) -> TokenizedFile:
    """Map the files of a cached directory. Raises ValueError where they are none of `token_file`.

    Their checksums are right, so an accident has not made them so.
    """
    try:
        sequences = np.load(directory / "sequences.npy", mmap_mode="r")
        rows = np.load(directory / "rows.npy", mmap_mode="r")
        bad_rows = json.loads((directory / "bad_rows.json").read_text())
        about = json.loads((directory / "about.json").read_text())
        tokens = np.memmap(directory / "tokens.bin", np.int32, "r")
        if len(tokens) != sequences[-1]:
            raise ValueError(f"{len(tokens)} tokens in place of {sequences[-1]}")
        where = [f"{path}:{row}" for row in bad_rows]
        counts, subsets = Counter(about["notes"]), list(about["subsets"])
    except (OSError, EOFError, ValueError, TypeError, LookupError, RecursionError) as error:
        if full_memory(error):
            raise MemoryError(f"{directory}: {error}") from None
        message = f"{directory}: foreign ({error}); delete it, and it will be made again"
        raise ValueError(message) from None
    return TokenizedFile(path, key, where, counts, subsets, tokens, sequences, rows)


# --------------------------------------------------------------------------------------------------
# Hashes, and directories that are made once


def file_hash(path) -> str:
    """Return the SHA-256 of a file, which is read once, and again if the file changes."""
    if not Path(path).is_file():
        next(read_rows(path))  # raises the error that says what is there
    return content_hash(path, *version_of(path), os.stat(path).st_ctime_ns)


@functools.cache
def content_hash(path, *version) -> str:
    return content_hash_now(path)


def content_hash_now(path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def version_of(path) -> tuple[int, ...]:
    """Return numbers of a file that change with its content: inode, size, time of change.

    The time of a change to the inode (ctime) is none of them: a new hard link changes that, too.
    """
    stat = os.stat(path)
    return stat.st_ino, stat.st_size, stat.st_mtime_ns


def hash_of(*parts) -> str:
    """Return a hash of values whose `repr` says all about them."""
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:32]


def cached(
    directory: Path, build: Callable[[Path], None], sources: dict[str, str] | None = None
) -> Path:
    """Return `directory`; where it is missing, one process has `build` fill it, and others wait.

    It is complete or absent: a directory that is half built when a process ends is discarded. Its
    files are compared with their checksums; where one is damaged, all are built again, and a line
    says so.
    sources: files that `build` reads, and the `file_hash` of each, which the name of the directory
        follows from. Raises ValueError that names a source which was changed since, or meanwhile.
    """
    if directory.exists() and not damage(directory):
        return directory
    directory.parent.mkdir(parents=True, exist_ok=True)
    with open(directory.with_name(directory.name + ".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # released when its process ends, however that happens
        if directory.exists():
            found = damage(directory)
            if not found:  # another process has built it meanwhile
                return directory
            tqdm.write(f"{directory}: {found}; it is discarded, and made again")
            discard(directory)
        part = directory.with_name(directory.name + ".part")
        discard(part)  # left by a process that was killed
        part.mkdir()
        try:
            build_from(sources or {}, build, part)
            write_checksums(part)
            for file in part.iterdir():
                with open(file, "rb+") as written:
                    os.fsync(written)
            part.rename(directory)
        finally:
            shutil.rmtree(part, ignore_errors=True)  # it is there only after an error
    return directory


def discard(path: Path):
    """Delete a directory, or whatever lies there in place of it. Raises OSError where it stays."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def build_from(sources: dict[str, str], build: Callable[[Path], None], directory: Path):
    """Have `build` fill a directory from files which still have, and keep, the given hashes.

    They are hashed again after `build`. A file that changed meanwhile has another hash, and a file
    that changed and was changed back has another time of change.
    Raises ValueError that names such a file.
    """
    versions = [version_of(path) for path in sources]
    build(directory)
    for (path, content), version in zip(sources.items(), versions):
        if version_of(path) != version or content_hash_now(path) != content:
            raise ValueError(f"{path}: was changed while it was read; start again when complete")


def write_checksums(directory: Path):
    checksums = {file.name: checksum(file) for file in directory.iterdir()}
    (directory / CHECKSUMS).write_text(json.dumps(checksums))


def checksum(file: Path) -> list[int]:
    """Return the length and the CRC-32 of a file.

    They show accidents of disks and programs. Whoever can write into a cache on purpose can write
    checksums, too, so a slower hash would not be safer.
    """
    size, crc = 0, 0
    with open(file, "rb") as content:
        for block in iter(functools.partial(content.read, 1 << 20), b""):
            size += len(block)
            crc = zlib.crc32(block, crc)
    return [size, crc]


def damage(directory: Path) -> str:
    """Say which file of a cached directory is not as it was written; "" where all are."""
    try:
        if not is_file(directory / CHECKSUMS):
            return f"{CHECKSUMS} is missing"
        expected = json.loads((directory / CHECKSUMS).read_text())
        for name, found in expected.items():
            if not is_file(directory / name):
                return f"{name} is missing"
            if checksum(directory / name) != found:
                return f"{name} is damaged"
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        return f"damaged ({error})"
    if not expected:
        return f"{CHECKSUMS} is empty"
    return ""
