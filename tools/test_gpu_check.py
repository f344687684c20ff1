"""Tests of tools/gpu_check.py: with --tiny all of its parts run, on a CPU, and nothing fails."""

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

from tools import gpu_check

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
    assert len(exact) == 42
    for key, errors in exact.items():
        limit = 2e-6 if " fp32 " in key else 2e-2
        assert max(errors.values()) < limit, (key, errors)
        assert errors["the same run again"] == 0
        assert errors["loss"] < limit / 10
    paths = {key.partition(" ")[2] for key in exact}
    assert {"bf16 packed", "bf16 masks", "bf16 padded", "bf16 compiled"} < paths


def check_programs(programs: dict):
    assert set(gpu_check.TINY_TRAININGS) | {"pytest"} < programs.keys()
    assert programs["pytest"]["exit"] == 0 and "skipped" in programs["pytest"]["log"]
    for name in gpu_check.TINY_TRAININGS:
        outcome = programs[name]
        assert outcome["exit"] == 0
        assert list(outcome["curve"]) == ["1", "2", "3", "4", "5", "6"]
        assert outcome["apart"] < 1e-2
    assert programs[gpu_check.KILLED]["killed after"] >= 3
    assert programs[f"{gpu_check.KILLED} | nccl zero 3 bf16"] == 0


def check_figures(parts: dict):
    assert len(parts["speed"]) == 20
    timings = [value for value in parts["prototype"].values() if isinstance(value, dict)]
    assert len(timings) == 6
    for timing in [*parts["speed"].values(), *timings]:
        assert timing["pairs/s"] > 0 and timing["steps"] == 1 and timing["tokens a step"] > 3 * 41
    assert list(parts["profile"]) == ["16", "64"]
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
    monkeypatch.setattr(gpu_check.varlen, "varlen_attn", None)
    gpu_check.main()
    parts = json.loads((tmp_path / "gpu_check.json").read_text())["parts"]
    assert list(parts) == ["facts", "kernel"]
    assert "ValueError: made up" in parts["kernel"]["failed"]
    assert "FAILED ValueError: made up" in (tmp_path / "gpu_check.txt").read_text()
