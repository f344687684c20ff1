"""Files of tensors: safetensors reads them, and rows find their places over any number of ranks."""

import itertools
import json
import math

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.testing._internal.distributed.fake_pg import FakeStore

from parts import tensor_files
from parts.tensor_files import DTYPES, files_of, own_rows, parts_of, rank_file


def some_tensors():
    """Make tensors of every dtype, with a scalar, odd sizes and an empty one."""
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name, dtype in DTYPES.items():
        for shape in [(), (3,), (5, 3), (2, 1, 7)]:
            values = torch.randn(shape, generator=generator) * 100
            tensors[f"{name} {list(shape)}"] = values.abs().to(dtype)
    tensors["empty"] = torch.zeros(0, 4)
    return tensors


def test_files_are_those_of_the_safetensors_library(tmp_path):
    """It reads ours, a scalar as one row; we read its own."""
    import safetensors.torch

    tensors = some_tensors()
    tensor_files.save(tmp_path, 0, tensors, {})
    found = safetensors.torch.load_file(rank_file(tmp_path, 0))
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], torch.atleast_1d(tensor)), name
    theirs = {name: torch.atleast_1d(tensor) for name, tensor in tensors.items()}
    safetensors.torch.save_file(theirs, rank_file(tmp_path, 0))
    ours = {name: torch.full_like(tensor, 7) for name, tensor in tensors.items()}
    tensor_files.load(tmp_path, 0, ours, {})
    assert all(torch.equal(ours[name], tensor) for name, tensor in tensors.items())


def test_every_tensor_lies_at_a_multiple_of_its_size(tmp_path):
    tensor_files.save(tmp_path, 0, some_tensors(), {})
    for name, part in parts_of(rank_file(tmp_path, 0)).items():
        assert part.start % part.dtype.itemsize == 0, name


def test_tensors_of_a_rank_are_its_own_and_others_are_written_once(tmp_path):
    shared = {"w": torch.arange(6.0).view(3, 2), "step": torch.tensor(4.0)}
    for rank in range(3):
        tensor_files.save(tmp_path, rank, shared, {"random": torch.tensor([rank])})
    files = files_of(tmp_path)
    assert [list(parts_of(file)) for file in files] == [
        ["random", "w", "step"],
        ["random"],
        ["random"],
    ]
    for rank in range(3):
        read = {name: torch.zeros_like(tensor) for name, tensor in shared.items()}
        own = {"random": torch.tensor([7])}
        tensor_files.load(tmp_path, rank, read, own)
        assert own["random"].tolist() == [rank]
        assert all(torch.equal(read[name], tensor) for name, tensor in shared.items())


@pytest.fixture
def ranks_of():
    """Give a function that shards a tensor over n ranks as FSDP2 does: a DTensor for each of them.

    Each belongs to a process group of its own, of ranks that do not exist.
    """

    def ranks(tensor, n):
        for rank, rows in enumerate([*tensor.chunk(n), *[tensor[:0]] * n][:n]):
            dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=n)
            try:
                mesh = init_device_mesh("cpu", (n,))
                layout = {"shape": tensor.shape, "stride": tensor.stride()}
                yield rank, DTensor.from_local(rows.clone(), mesh, [Shard(0)], **layout)
            finally:
                dist.destroy_process_group()

    return ranks


@pytest.mark.parametrize("rows", [1, 4, 5, 7])
@pytest.mark.parametrize("written, read", [*itertools.product([1, 2, 3, 5], repeat=2)])
def test_rows_are_found_over_any_number_of_ranks(rows, written, read, ranks_of, tmp_path):
    """Written sharded over some ranks, read over others, or whole."""
    tensor = torch.randn(rows, 3, generator=torch.Generator().manual_seed(rows))
    for rank, sharded in ranks_of(tensor, written):
        local, first = own_rows(sharded)
        assert torch.equal(local, tensor[first : first + len(local)])
        tensor_files.save(tmp_path, rank, {"w": sharded}, {})
    found = []
    for rank, sharded in ranks_of(torch.full_like(tensor, math.nan), read):
        tensor_files.load(tmp_path, rank, {"w": sharded}, {})
        found.append(sharded.to_local())
    assert torch.equal(torch.cat(found), tensor)
    whole = torch.full_like(tensor, math.nan)
    tensor_files.load(tmp_path, 0, {"w": whole}, {})
    assert torch.equal(whole, tensor)


def test_rank_reads_no_more_than_its_rows(ranks_of, tmp_path, monkeypatch):
    """No rank needs memory for what another one has."""
    tensor, sizes = torch.zeros(64, 8), []
    tensor_files.save(tmp_path, 0, {"w": tensor}, {})
    fromfile = tensor_files.np.fromfile

    def watched(file, dtype, count, offset):
        sizes.append(count)
        return fromfile(file, dtype, count, offset=offset)

    monkeypatch.setattr(tensor_files.np, "fromfile", watched)
    for rank, sharded in ranks_of(tensor, 4):
        tensor_files.load(tmp_path, rank, {"w": sharded}, {})
    assert sizes == [tensor.nbytes // 4] * 4


# --------------------------------------------------------------------------------------------------
# Files that are no files of tensors


def write(file, header, data=b"\0" * 48, length=None):
    """Write a file with this header, text or a value, and these bytes behind it."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    length = len(text) if length is None else length
    file.write_bytes(length.to_bytes(8, "little") + text + data)


ENTRY = {"dtype": "F32", "shape": [4, 3], "data_offsets": [0, 48]}


@pytest.mark.parametrize(
    "header",
    [
        b"",
        b"{",
        b"\xff" * 9,
        b"[" * 100_000,
        [],
        None,
        {"w": None},
        {"w": {}},
        {"w": ENTRY | {"dtype": "F8"}},
        {"w": ENTRY | {"dtype": ["F32"]}},
        {"w": ENTRY | {"shape": [4, 4]}},
        {"w": ENTRY | {"shape": [-4, -3]}},
        {"w": ENTRY | {"shape": "43"}},
        {"w": ENTRY | {"shape": [4.0, 3]}},
        {"w": ENTRY | {"shape": []}},
        {"w": ENTRY | {"shape": [10**30, 10**30]}},
        {"w": ENTRY | {"data_offsets": [4, 52]}},
        {"w": ENTRY | {"data_offsets": [-4, 44]}},
        {"w": ENTRY | {"data_offsets": [48, 0]}},
        {"w": ENTRY | {"data_offsets": [0]}},
        {"w": ENTRY | {"data_offsets": 48}},
    ],
)
def test_header_that_describes_no_tensors_is_refused(header, tmp_path):
    file = tmp_path / "rank-0.safetensors"
    write(file, header)
    with pytest.raises(ValueError, match=f"{file}: is no file of tensors"):
        parts_of(file)


@pytest.mark.parametrize("length", [2**63, 10**6, 3])
def test_length_of_a_header_is_checked_before_it_is_read(length, tmp_path):
    file = tmp_path / "rank-0.safetensors"
    write(file, {"w": ENTRY}, length=length)
    with pytest.raises(ValueError, match=f"{file}: is no file of tensors"):
        parts_of(file)
    write(file, {"w": ENTRY})
    assert parts_of(file)["w"].read(1, 3).tolist() == [[0.0] * 3] * 2


@pytest.mark.parametrize(
    "found, expected",
    [
        (torch.zeros(4, 2), r"is torch.float32 of shape \[4, 2\]"),
        (torch.zeros(4, 3, dtype=torch.float64), "is torch.float64"),
        (torch.zeros(5, 3), "has 5 rows; expected 4"),
        (torch.zeros(3, 3), "has 3 rows; expected 4"),
        (None, "has 0 rows; expected 4"),
    ],
)
@pytest.mark.parametrize("is_own", [False, True])
def test_tensor_of_another_shape_or_dtype_is_refused_by_name(found, expected, is_own, tmp_path):
    own, shared = {}, {}
    if found is not None:
        (own if is_own else shared)["w"] = found
    tensor_files.save(tmp_path, 0, shared, own)
    given = [{}, {}]
    given[is_own]["w"] = torch.zeros(4, 3)
    place = f"{rank_file(tmp_path, 0)}" if is_own else f"{tmp_path}"
    with pytest.raises(ValueError, match=f"{place}: w {expected}"):
        tensor_files.load(tmp_path, 0, *given)
