"""Tensors of a checkpoint: each rank writes a file, and reads the rows it needs from all files.

A file is in the format of safetensors, a header in JSON and then numbers, so nothing in it can run.
Which tensors a checkpoint has, and when it is whole, is known to parts/run_directory.py.
"""

import itertools
import json
import math
import os
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch.distributed.tensor import DTensor

# https://huggingface.co/docs/safetensors: 8 bytes with the length of the header, the header, data.
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "U8": torch.uint8,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class Part(NamedTuple):
    """Rows of a tensor, in a file; a scalar is one row."""

    file: Path
    start: int  # byte of the file
    dtype: torch.dtype
    shape: tuple[int, ...]  # (rows, ...)

    def read(self, first: int, stop: int) -> torch.Tensor:
        """Read rows `first` to `stop - 1`, into memory."""
        row_bytes = math.prod(self.shape[1:]) * self.dtype.itemsize
        count = (stop - first) * row_bytes
        start = self.start + first * row_bytes
        content = np.fromfile(self.file, np.uint8, count, offset=start)
        return torch.from_numpy(content).view(self.dtype).view(stop - first, *self.shape[1:])


def own_rows(tensor: torch.Tensor) -> tuple[torch.Tensor, int]:
    """Return this rank's rows of a tensor, and the number of the first; a scalar is one row.

    FSDP2 shards rows as torch.chunk does; another tensor is whole on every rank.
    """
    if not isinstance(tensor, DTensor):
        return torch.atleast_1d(tensor), 0
    mesh = tensor.device_mesh
    rows = math.ceil(len(tensor) / mesh.size())
    return tensor.to_local(), min(len(tensor), rows * mesh.get_local_rank())


def rank_file(directory: Path, rank: int) -> Path:
    """Return the path of a rank's file in a checkpoint."""
    return directory / f"rank-{rank}.safetensors"


def save(directory: Path, rank: int, shared: dict, own: dict[str, torch.Tensor]):
    """Write rank-N.safetensors, and flush it to the disk.

    shared: tensors that all ranks have in common. Every rank writes its rows of a sharded one; rank
    0 writes the others. own: tensors of this rank alone.
    """
    tensors = dict(own)
    for name, tensor in shared.items():
        rows, _ = own_rows(tensor.detach())
        if isinstance(tensor, DTensor) or rank == 0:
            tensors[name] = rows
    # Wide numbers stand first, so that each lies at a multiple of its size.
    names = sorted(tensors, key=lambda name: -tensors[name].itemsize)
    header, stop = {}, 0
    for name in names:
        tensor = tensors[name]
        start, stop = stop, stop + tensor.nbytes
        dtype = DTYPE_NAMES[tensor.dtype]
        header[name] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": [start, stop]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(rank_file(directory, rank), "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            content = tensors[name].cpu().contiguous().flatten()
            file.write(content.view(torch.uint8).numpy())
        file.flush()
        os.fsync(file.fileno())


def load(directory: Path, rank: int, shared: dict, own: dict[str, torch.Tensor]):
    """Fill tensors with the values of a checkpoint, in place. shared, own: as in `save`.

    The checkpoint may be of another number of ranks, and sharded or not.
    Raises ValueError that names the file or the tensor which is not as it should be.
    """
    files = {file: parts_of(file) for file in files_of(directory)}
    for name, tensor in shared.items():
        parts = [parts[name] for parts in files.values() if name in parts]
        fill(tensor.detach(), parts, f"{directory}: {name}")
    file = rank_file(directory, rank)
    for name, tensor in own.items():
        parts = [files[file][name]] if name in files.get(file, {}) else []
        fill(tensor, parts, f"{file}: {name}")


def fill(tensor: torch.Tensor, parts: list[Part], called: str):
    """Copy this rank's rows of a tensor from the parts of it in files, which follow each other.

    called: the tensor, as an error names it.
    """
    whole = torch.atleast_1d(tensor)
    for part in parts:
        if part.dtype != whole.dtype or part.shape[1:] != whole.shape[1:]:
            raise ValueError(
                f"{called} is {part.dtype} of shape {list(part.shape)} in {part.file.name}; "
                f"expected {whole.dtype} of shape {list(whole.shape)}, or rows of it"
            )
    found = sum(part.shape[0] for part in parts)
    if found != len(whole):
        raise ValueError(f"{called} has {found} rows; expected {len(whole)}")
    rows, first = own_rows(tensor)
    start = 0
    for part in parts:
        stop = start + part.shape[0]
        low, high = max(first, start), min(first + len(rows), stop)
        if low < high:
            rows[low - first : high - first] = part.read(low - start, high - start)
        start = stop


def files_of(directory: Path) -> list[Path]:
    """List the files of a checkpoint's tensors, in the order of their ranks."""
    files = []
    for rank in itertools.count():
        file = rank_file(directory, rank)
        if not file.exists():
            return files
        files.append(file)


def parts_of(file: Path) -> dict[str, Part]:
    """Read the header of a file: its tensors by name. Raises ValueError that names the file."""
    size = file.stat().st_size
    with open(file, "rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        text = opened.read(length) if 8 + length <= size else b""
    try:
        header = json.loads(text)
        return {name: part_of(file, 8 + length, entry) for name, entry in header.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(
            f"{file}: is no file of tensors ({type(error).__name__}: {error})"
        ) from None


def part_of(file: Path, data: int, entry: dict) -> Part:
    """Read a tensor's entry in a header. data: the byte after the header.

    Raises ValueError, KeyError or TypeError where it is wrong.
    """
    start, stop = entry["data_offsets"]
    part = Part(file, data + start, DTYPES[entry["dtype"]], tuple(entry["shape"]))
    if not all(type(number) is int and number >= 0 for number in (start, stop, *part.shape)):
        raise ValueError(f"found a negative number or none at all in {entry}")
    nbytes = math.prod(part.shape) * part.dtype.itemsize
    if not part.shape or stop - start != nbytes or data + stop > file.stat().st_size:
        raise ValueError(f"found {start} to {stop} as the bytes of shape {part.shape}")
    return part
