"""What TensorBoard's own reader finds in the directory."""

import json
import sys
import time

import pytest

import train
from parts.tensorboard import Writer


def read(directory):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(directory))
    found.Reload()
    return {
        tag: [(event.step, event.value) for event in found.Scalars(tag)]
        for tag in found.Tags()["scalars"]
    }


def test_tensorboard_has_the_numbers_of_metrics_jsonl(tmp_path, monkeypatch):
    monkeypatch.setattr(
        sys,
        "argv",
        [
            "train.py",
            "--max_steps",
            "2",
            "--n_layer",
            "1",
            "--n_embd",
            "16",
            "--n_head",
            "2",
            "--eval_iters",
            "1",
            "--output_dir",
            str(tmp_path / "out"),
            "--enable_tensorboard",
            "--tensorboard_path",
            str(tmp_path / "board"),
        ],
    )
    train.main()
    expected = {}
    for event in map(json.loads, (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()):
        for name in event.keys() - {"event", "step"}:
            expected.setdefault(f"{event['event']}/{name}", []).append(
                (event["step"], pytest.approx(event[name], rel=1e-6))
            )
    assert read(tmp_path / "board") == expected and len(expected) > 12


def test_steps_that_a_resumed_run_takes_again_are_there_once(tmp_path):
    for done, steps in (
        (0, (1, 2, 9)),
        (0, (1, 2, 3)),
        (2, (3, 4)),
    ):  # an earlier run, a run, and that resumed
        writer = Writer(tmp_path, done)
        for step in steps:
            writer.write(
                {"event": "step", "step": step, "loss": step + done / 10, "grad_norm": None}
            )
        writer.writer.close()
        time.sleep(1.1)  # files are read in the order of their names, which tell the second
    assert {
        tag: [(step, round(value, 4)) for step, value in points]
        for tag, points in read(tmp_path).items()
    } == {"step/loss": [(1, 1.0), (2, 2.0), (3, 3.2), (4, 4.2)]}


def test_missing_package_and_bad_path_are_said(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="--tensorboard_path .*file: cannot be written to"):
        Writer(str(tmp_path / "file"))
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    monkeypatch.delitem(sys.modules, "parts.tensorboard")
    monkeypatch.setattr(
        sys, "argv", ["train.py", "--data_path", "missing.jsonl", "--enable_tensorboard"]
    )
    with pytest.raises(
        SystemExit, match="train.py: error: --enable_tensorboard: needs `pip install tensorboard`"
    ):
        train.main()
