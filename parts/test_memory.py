"""A full memory: real errors of the libraries, and the line that the programs print."""

import errno
import gzip
import json
import resource

import numpy as np
import pyarrow.parquet
import pytest
import torch

import data
from conftest import TINY, forked
from parts import huggingface, rows, tokenizers
from parts.distributed import complaint_about
from parts.memory import full_memory
from parts.test_huggingface import broken
from test_data import Letters
from tools import score


def overflow():
    with torch.device("meta"):
        return torch.empty(2**31, 2**31)


FULL = {  # what needs more memory than there is
    "torch": lambda: torch.empty(2**60, dtype=torch.uint8),
    "torch, a product": overflow,
    "numpy": lambda: np.empty(2**60, dtype=np.uint8),
    "Python": lambda: bytearray(2**60),
    "pyarrow": lambda: pyarrow.allocate_buffer(2**60),
    "a system call": lambda: (_ for _ in ()).throw(OSError(errno.ENOMEM, "Cannot allocate memory")),
    "Windows": lambda: (_ for _ in ()).throw(
        RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 8 bytes.")
    ),
    "C++": lambda: (_ for _ in ()).throw(RuntimeError("std::bad_alloc")),
}


@pytest.mark.parametrize("kind", FULL)
def test_a_full_memory_of_the_machine_is_said_with_what_makes_room(kind):
    with pytest.raises(Exception) as error:
        FULL[kind]()
    assert full_memory(error.value) == "machine's"
    line = complaint_about(error.value, 60)
    assert line.startswith("train.py: error: the machine's memory is full (") and "\n" not in line
    assert "--max_seq_len" in line and "()" not in line


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
        RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"),
        RuntimeError("CUDA error: out of memory\nCompile with ..."),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    ],
)
def test_a_full_memory_of_the_gpu_is_said_with_what_makes_room(error):
    line = complaint_about(error, 60)
    assert line.startswith("train.py: error: the GPU's memory is full (CUDA") and "\n" not in line
    assert "--zero_stage" in line


@pytest.mark.parametrize(
    "error",
    [
        ValueError("DefaultCPUAllocator"),
        OSError(errno.ENOSPC, "No space left on device"),
        RuntimeError("shapes cannot be multiplied"),
        RuntimeError("Timed out"),
        KeyError("memory"),
    ],
)
def test_other_errors_are_not_about_memory(error):
    assert full_memory(error) == "" and "memory is full" not in complaint_about(error, 60)


def leave_little_memory():
    """Limit the addresses of this process to 400 MB more than it has."""
    with open("/proc/self/statm") as file:
        pages = int(file.read().split()[0])
    limit = pages * resource.getpagesize() + 400 * 2**20
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


@pytest.mark.parametrize(
    "flags, words",
    [("--n_embd 16384", 10), ("--max_seq_len 200000 --layout padded", 200_000)],
    ids=["a large model", "a long response"],
)
def test_a_run_that_needs_too_much_memory_ends_with_a_line(flags, words, tmp_path):
    path = tmp_path / "rows.jsonl"
    row = {"prompt": "p", "chosen": " x" * words, "rejected": " y"}
    path.write_text((json.dumps(row) + "\n") * 4)
    arguments = [*TINY, flags, "--vocab_size 300 --data_path", path]
    arguments += ["--data_output_path", tmp_path / "cache"]
    codes, said = forked(tmp_path / "out", *arguments, before=leave_little_memory)
    line = said[0].strip().splitlines()[-1]
    assert codes == [1] and "Traceback" not in said[0]
    assert "train.py: error: the machine's memory is full ([enforce fail" in line


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("DefaultCPUAllocator: x")])
def test_rm_py_says_it_too(error, monkeypatch):
    def fail(arguments):
        raise error

    monkeypatch.setattr(score, "score_program", fail)
    with pytest.raises(SystemExit) as exit:
        score.main()
    assert exit.value.code.startswith("rm.py: error: the machine's memory is full (")
    assert "--batch_size" in exit.value.code


def test_a_bug_in_rm_py_keeps_its_traceback(monkeypatch):
    def fail(arguments):
        raise RuntimeError("shapes cannot be multiplied")

    monkeypatch.setattr(score, "score_program", fail)
    with pytest.raises(RuntimeError, match="shapes cannot"):
        score.main()


def raise_memory_error(*arguments, **how):
    raise MemoryError("malloc of size 8 failed")


def test_a_checkpoint_that_does_not_fit_is_not_called_damaged(tmp_path, monkeypatch):
    directory = broken(tmp_path / "model", {}, {})
    monkeypatch.setattr(huggingface, "load_pickle", raise_memory_error)
    with pytest.raises(MemoryError):
        huggingface.read_checkpoint(directory)
    data.train_tokenizer(["a few words"], 290).save(tmp_path)
    monkeypatch.setattr(tokenizers, "sentencepiece_tokenizer", raise_memory_error)
    with pytest.raises(MemoryError):
        data.load_tokenizer(tmp_path)


def test_a_parquet_file_that_does_not_fit_is_named_and_not_called_damaged(tmp_path, monkeypatch):
    path = tmp_path / "a.parquet"
    table = pyarrow.table({name: ["a", "b"] for name in ("prompt", "chosen", "rejected")})
    pyarrow.parquet.write_table(table, path)
    error = pyarrow.ArrowMemoryError("malloc of size 99999999999 failed")
    monkeypatch.setattr("parts.parquet.plain_values", lambda *how: (_ for _ in ()).throw(error))
    for read in (lambda: list(data.load_comparisons(path)), lambda: tokens_of(path)):
        with pytest.raises(MemoryError, match=f"^{path}: cannot be read behind row 0: malloc of"):
            read()


def tokens_of(path):
    return data.tokenize_file(path, Letters(), 99, "left", path.parent / "cache")


GOOD_ROW = b'{"prompt": "p", "chosen": "a", "rejected": "b"}\n'


def row_of(size):
    """Write a row of so many bytes, its newline included."""
    return GOOD_ROW.replace(b'"p"', b'"' + b"p" * (size - len(GOOD_ROW) + 1) + b'"')


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.json", "b.json", "a.parquet"])
def test_a_row_longer_than_the_limit_is_named(name, tmp_path, monkeypatch):
    """A byte more than the limit, with the newline, is too much; b.json is an array."""
    monkeypatch.setattr(rows, "MOST_ROW_BYTES", 10**6)
    path = tmp_path / name
    for size in (10**6, 10**6 + 1):
        content = GOOD_ROW + row_of(size) + GOOD_ROW
        if name == "a.parquet":
            prompts = ["p", "p" * (size - len(GOOD_ROW) + 2), "p"]  # its JSON has no newline
            table = pyarrow.table({"prompt": prompts, "chosen": ["a"] * 3, "rejected": ["b"] * 3})
            pyarrow.parquet.write_table(table, path)
        elif name == "a.jsonl.gz":
            path.write_bytes(gzip.compress(content, 1))
        elif name == "b.json":
            row = row_of(size + 1).strip()
            path.write_bytes(b"[%s,\n%s,\n%s]" % (GOOD_ROW, row, GOOD_ROW))
        else:
            path.write_bytes(content)
        if size == 10**6:
            assert len(list(data.load_comparisons(path))) == 3
    line = {"b.json": 3}.get(name, 2)
    for read in (lambda: list(data.load_comparisons(path, bad_rows=[])), lambda: tokens_of(path)):
        with pytest.raises(ValueError, match=f"^{path}:{line}: a row of more than 1,000,000 bytes"):
            read()


def test_a_gzip_bomb_is_not_unpacked_into_the_memory(tmp_path):
    """A file of some megabytes, whose second line is 10 GB long."""
    path = tmp_path / "a.jsonl.gz"
    part = gzip.compress(b"x" * 2**20) * 64  # parts of a gzip file follow each other
    with open(path, "wb") as file:
        file.write(gzip.compress(GOOD_ROW))
        for _ in range(160):
            file.write(part)
    flags = ["--data_path", path, "--vocab_size 300 --data_output_path", tmp_path / "cache"]
    codes, said = forked(tmp_path / "out", *TINY, *flags, before=leave_little_memory)
    assert codes == [1] and "Traceback" not in said[0]
    line = said[0].strip().splitlines()[-1]
    assert f"error: {path}:2: a row of more than {rows.MOST_ROW_BYTES:,} bytes" in line
