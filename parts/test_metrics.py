"""Metrics by hand, and TensorBoard's events as its own reader finds them."""

import json
import math
import sys
import time

import pytest
import torch

import train
from parts.metrics import Writer, calibration_error, spearman, summarize


def test_calibration_error_by_hand():
    """Two bins: p = 0.6 (two pairs, one ranked right) and p = 0.88 (one, ranked right).

    Their gaps weigh 2/3 and 1/3.
    """
    logit = lambda p: math.log(p / (1 - p))
    margin = torch.tensor([logit(0.6), -logit(0.6), logit(0.88)], dtype=torch.float64)
    assert calibration_error(margin) == pytest.approx(
        2 / 3 * abs(0.5 - 0.6) + 1 / 3 * abs(1 - 0.88), abs=1e-12
    )
    # Confidence 1 is in the last bin.
    assert calibration_error(torch.tensor([40.0])) == pytest.approx(0.0, abs=1e-12)
    assert math.isnan(calibration_error(torch.tensor([math.nan])))


def test_spearman_by_hand():
    """Equal values share their mean rank: 1, 2.5, 2.5, 4.

    With 4, 1, 3, 2 the products of deviations sum to -3.
    """
    assert spearman([1, 2, 3], [10, 20, 1000]) == pytest.approx(1)
    assert spearman([1, 2, 2, 9], [0.4, 0.1, 0.3, 0.2]) == pytest.approx(-3 / math.sqrt(4.5 * 5))


def test_summary_by_hand():
    metrics = summarize(0.5, [2.0, 1.0, 0.0], [0.0, 1.0, 3.0], [], dropped=7)
    ece = calibration_error(torch.tensor([2.0, 0.0, -3.0], dtype=torch.float64))
    assert metrics == {
        "loss": 0.5,
        "accuracy": pytest.approx(1 / 3),  # a tie counts as wrong
        "chosen_score": 1.0,
        "rejected_score": pytest.approx(4 / 3),
        "margin": pytest.approx(-1 / 3),
        "ece": ece,
        "pairs": 3,
        "dropped": 7,
    }
    known = summarize(0.5, [2.0, 1.0, 0.0], [0.0, 1.0, 3.0], [1.0, -1.0, 1.0], dropped=7)
    sigmoid = lambda x: 1 / (1 + math.exp(-x))
    errors = [sigmoid(2) - sigmoid(1), sigmoid(0) - sigmoid(-1), sigmoid(1) - sigmoid(-3)]
    assert known == metrics | {
        "bayes_accuracy": pytest.approx(2 / 3),
        "probability_error": pytest.approx(sum(errors) / 3),
    }


# --------------------------------------------------------------------------------------------------
# TensorBoard


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


def test_steps_that_a_resumed_run_repeats_are_there_once(tmp_path):
    # An earlier run, a run, and that run resumed
    for done, steps in ((0, (1, 2, 9)), (0, (1, 2, 3)), (2, (3, 4))):
        writer = Writer(tmp_path, done)
        for step in steps:
            writer.write(
                {"event": "step", "step": step, "loss": step + done / 10, "grad_norm": None}
            )
        writer.writer.close()
        time.sleep(1.1)  # files are read in the order of their names, which hold the second
    assert {
        tag: [(step, round(value, 4)) for step, value in points]
        for tag, points in read(tmp_path).items()
    } == {"step/loss": [(1, 1.0), (2, 2.0), (3, 3.2), (4, 4.2)]}


def test_missing_package_and_bad_path_are_errors_that_name_the_flag(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="--tensorboard_path .*file: cannot be written to"):
        Writer(str(tmp_path / "file"))
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    monkeypatch.setattr(
        sys, "argv", ["train.py", "--data_path", "missing.jsonl", "--enable_tensorboard"]
    )
    with pytest.raises(
        SystemExit, match="train.py: error: --enable_tensorboard: needs `pip install tensorboard`"
    ):
        train.main()
