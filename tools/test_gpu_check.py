"""Tests of tools/gpu_check.py: with --tiny all of its parts run, on a CPU, and nothing fails.

No figure of a GPU is tested: none has run it. The steps that it times are in tools/test_bench.py.
"""

import inspect
import json
import math
import os
import re
import shutil
import subprocess
import sys
import threading
import warnings
from pathlib import Path

import pytest
import torch
from torch.nn.attention import varlen

from parts import packed
from tools import bench, gpu_check

ROOT = Path(__file__).resolve().parent.parent


def test_every_part_of_a_copy_in_another_directory_runs_on_a_cpu(tmp_path):
    copy = shutil.copy(ROOT / "tools" / "gpu_check.py", tmp_path)
    environment = {"PROJECT": str(ROOT), "OUT": str(tmp_path), "TMPDIR": str(tmp_path)}
    environment["CUDA_VISIBLE_DEVICES"] = ""
    done = subprocess.run(
        [sys.executable, copy, "--tiny"],
        cwd=tmp_path,
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    text = done.stdout
    assert done.returncode == 0, text
    parts = json.loads((tmp_path / "gpu_check.json").read_text())["parts"]
    assert list(parts) == [part.__name__ for part in gpu_check.PARTS]
    written = (tmp_path / "gpu_check.txt").read_text().splitlines()
    assert set(written) <= set(text.splitlines())  # the profiler prints more
    assert "FAILED" not in text and "failed" not in json.dumps(parts), text
    assert "left out" not in text and "out of memory" not in text
    check_errors(parts["kernel"], parts["exact"])
    check_programs(parts["programs"])
    check_figures(parts)


def check_errors(kernel: dict, exact: dict):
    """The stand-in kernel is exact in float32; bfloat16 has 8 bits."""
    assert len(kernel) == 6
    for errors in kernel.values():
        assert len(errors) == 4 and max(errors) < 1e-6
    assert len(exact) == 36
    for key, errors in exact.items():
        limit = 2e-6 if " fp32 " in key else 2e-2
        assert max(errors.values()) < limit, (key, errors)
        assert errors["the same run again"] == 0
        assert errors["loss"] < limit / 10
    paths = {key.partition(" ")[2] for key in exact}
    assert {"bf16 packed", "bf16 masks", "bf16 padded", "bf16 compiled"} < paths


def check_programs(programs: dict):
    assert set(gpu_check.TINY_TRAININGS) | {"pytest 0"} < programs.keys()
    assert programs["pytest 0"]["exit"] == 0
    assert re.search(r"^[1-9]\d* skipped in", programs["pytest 0"]["log"], re.MULTILINE)
    assert programs[gpu_check.WAITS]["lines that wait"] == {}
    for name in gpu_check.TINY_TRAININGS:
        outcome = programs[name]
        assert outcome["exit"] == 0
        assert list(outcome["curve"]) == ["1", "2", "3", "4", "5", "6"]
        assert outcome["apart"] < 1e-2
    assert programs[gpu_check.KILLED]["killed after"] >= 3
    assert programs[f"{gpu_check.KILLED} | nccl zero 3 bf16"] == 0


def check_figures(parts: dict):
    assert len(parts["speed"]) == 18
    assert len(parts["prototype"]) == 8
    for timing in [*parts["speed"].values(), *parts["prototype"].values()]:
        assert timing["pairs/s"] > 0 and timing["tokens a step"] > 3 * 41
        assert timing["graphs later"] == 0
    compiled = [name for name, timing in parts["speed"].items() if timing["graphs"]]
    assert compiled == ["OPT-350m 16 packed, --compile", "TinyLlama 1.1B 16 packed, --compile"]
    assert parts["end_to_end"]["pairs/s"] > 0
    assert list(parts["profile"]) == ["packed 16", "packed 64", "packed, --compile 64"]
    assert len(parts["memory"]) == 4
    for peaks in parts["memory"].values():
        assert 0 < peaks["estimated GB"] < 0.1 and math.isnan(peaks["measured GB"])


def test_parts_are_chosen_and_a_failure_is_written_down(tmp_path, monkeypatch):
    def kernel(check):
        raise ValueError("made up")

    monkeypatch.setattr(gpu_check, "PARTS", {gpu_check.facts: 10, kernel: 30, gpu_check.exact: 9})
    monkeypatch.setattr("sys.argv", ["gpu_check.py", "--tiny", "--skip", "exact"])
    monkeypatch.setenv("OUT", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    gpu_check.main()
    parts = json.loads((tmp_path / "gpu_check.json").read_text())["parts"]
    assert list(parts) == ["facts", "kernel"]
    assert "ValueError: made up" in parts["kernel"]["failed"]
    assert "FAILED ValueError: made up" in (tmp_path / "gpu_check.txt").read_text()


# --------------------------------------------------------------------------------------------------
# The stand-in for the flash kernel


def kernel_2_11(query, key, value, cu_q, cu_k, max_q, max_k, *, window_size=(-1, -1)):
    raise AssertionError


def kernel_2_13(q, k, v, cu_q, cu_k, max_q, max_k, *, window_size=(-1, -1), enable_gqa=False):
    raise AssertionError


@pytest.mark.parametrize(
    "kernel, heads, options, error",
    [
        (kernel_2_11, 2, {}, None),
        (kernel_2_11, 1, {}, None),
        (kernel_2_11, 1, {"enable_gqa": True}, TypeError),
        (kernel_2_13, 2, {}, None),
        (kernel_2_13, 1, {"enable_gqa": True}, None),
        (kernel_2_13, 1, {}, ValueError),
        (kernel_2_13, 2, {"scale": 1.0}, TypeError),
    ],
)
def test_the_stand_in_is_as_strict_as_the_kernel(kernel, heads, options, error):
    """A call that the kernel of this PyTorch would refuse must not pass here."""
    stand_in = gpu_check.stand_in(kernel)
    assert inspect.signature(stand_in) == inspect.signature(kernel)
    starts = torch.tensor([0, 3], dtype=torch.int32)
    q, k = torch.randn(3, 2, 4), torch.randn(3, heads, 4)
    call = (q, k, k, starts, starts, 3, 3)
    if error is None:
        assert stand_in(*call, **options).shape == q.shape
    else:
        with pytest.raises(error):
            stand_in(*call, **options)


def test_the_real_kernel_is_back_after_the_stand_in():
    before = varlen.varlen_attn, packed.can_use_varlen, packed.PackedBatch.to
    with gpu_check.pretend_flash():
        assert varlen.varlen_attn is not before[0]
    assert (varlen.varlen_attn, packed.can_use_varlen, packed.PackedBatch.to) == before


# --------------------------------------------------------------------------------------------------
# Changes to the loop, and waits


def trained(**changes) -> torch.Tensor:
    """Take a step on each of three batches; return the weights, and check the tokens."""
    model = gpu_check.make_model("gpt2", True)
    batches = gpu_check.batches_of(3, 3, True)
    step = gpu_check.Changed(model, **changes)
    expected = [model.pack(batch).num_tokens for batch in batches]
    assert list(step.steps(batches)) == expected
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def test_changes_to_the_loop_change_no_weight():
    model = gpu_check.make_model("gpt2", True)
    for _ in bench.Ours(model).steps(gpu_check.batches_of(3, 3, True)):
        pass
    expected = torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
    for packs_ahead in (False, True):
        for reads_late in (False, True):
            found = trained(packs_ahead=packs_ahead, reads_late=reads_late)
            assert (found == expected).all()


@pytest.mark.parametrize("reads_late, steps", [(False, 0), (True, 1)])
def test_a_loss_that_is_not_finite_is_found_a_step_later_if_read_late(reads_late, steps):
    model = gpu_check.make_model("gpt2", True)
    model.v_head.weight.data.fill_(math.nan)
    step = gpu_check.Changed(model, reads_late=reads_late)
    taken = 0
    with pytest.raises(ValueError, match="not finite"):
        for _ in step.steps(gpu_check.batches_of(3, 3, True)):
            taken += 1
    assert taken == steps


def test_the_thread_is_one_item_ahead():
    third_is_asked = threading.Event()
    asked = []

    def function(item):
        asked.append(item)
        if item == 3:
            third_is_asked.set()
        return 10 * item

    results = gpu_check.ahead(function, [1, 2, 3])
    assert next(results) == 10
    assert 3 not in asked
    assert next(results) == 20
    assert third_is_asked.wait(60)  # the third one is computed while nobody asks for it
    assert list(results) == [30]
    assert list(gpu_check.ahead(function, [])) == []
    with pytest.raises(ZeroDivisionError):
        list(gpu_check.ahead(lambda item: 1 // item, [1, 0]))


WARNING = f"{gpu_check.WAITING} (Triggered internally at /pytorch/c10/cuda/CUDAFunctions.cpp:129.)"


def test_waits_are_counted_by_the_innermost_line_of_the_project(monkeypatch):
    modes = []
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)

    def waits():
        warnings.warn_explicit(WARNING, UserWarning, "torch/_tensor.py", 7)
        warnings.warn("Synchronization debug mode does not detect all synchronizing operations")

    def step():
        waits()
        waits()

    line = waits.__code__.co_firstlineno + 1
    assert gpu_check.waits_of(step) == {f"test_gpu_check.py:{line}": 2}
    assert modes == ["warn", "default"]


def test_waits_are_counted_in_the_log_of_a_run():
    log = f"""
        a line of the run
        /work/train.py:159: UserWarning: {WARNING}
          grad_norm = grad_norm.item()
        /work/train.py:160: UserWarning: {WARNING}
        /work/train.py:159: UserWarning: {WARNING}
        /work/train.py:161: UserWarning: something else
        """
    assert gpu_check.lines_in(log) == {"train.py:159": 2, "train.py:160": 1}
