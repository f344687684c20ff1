"""Metrics by hand, and TensorBoard's events as its own reader finds them."""

import json
import math
import random
import sys
import time

import numpy as np
import pytest
import torch

import data
import train
from parts.metrics import (
    LISTS,
    Writer,
    accuracy_in_words,
    best_summary,
    by_subset,
    calibration_error,
    collapse,
    collect,
    in_a_line,
    outcome,
    score_summary,
    spearman,
    standard_error,
    subset_lines,
    summarize,
)


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


def numbers_of(chosen, rejected, **known):
    """Make the lists of an evaluation: targets 1, no subset and no reward, unless given."""
    numbers = {name: [] for name in LISTS}
    numbers |= {"chosen": chosen, "rejected": rejected}
    numbers |= {"target": [1.0] * len(chosen), "subset": [None] * len(chosen)}
    return numbers | known


def test_summary_by_hand():
    scores = [2.0, 1.0, 0.0], [0.0, 1.0, 3.0]
    metrics = summarize(0.5, numbers_of(*scores), dropped=7, truncated=4)
    ece = calibration_error(torch.tensor([2.0, 0.0, -3.0], dtype=torch.float64))
    assert metrics == {
        "loss": 0.5,
        "accuracy": pytest.approx(1 / 3),  # a tie counts as wrong
        "chosen_score": 1.0,
        "rejected_score": pytest.approx(4 / 3),
        "margin": pytest.approx(-1 / 3),
        "ece": ece,
        "pairs": 3,
        "ties": pytest.approx(1 / 3),
        "dropped": 7,
        "truncated": 4,
    }
    known = summarize(0.5, numbers_of(*scores, true_margin=[1.0, -1.0, 1.0]), 7, 4)
    sigmoid = lambda x: 1 / (1 + math.exp(-x))
    errors = [sigmoid(2) - sigmoid(1), sigmoid(0) - sigmoid(-1), sigmoid(1) - sigmoid(-3)]
    assert known == metrics | {
        "bayes_accuracy": pytest.approx(2 / 3),
        "probability_error": pytest.approx(sum(errors) / 3),
    }


def by_definition(pairs):
    """Compute accuracy and calibration error in plain Python, pair by pair.

    pairs: (chosen score, rejected score, target) of each.
    """
    right, bins = [], {}
    for chosen, rejected, target in pairs:
        if target == 0.5:
            continue
        better, worse = (chosen, rejected) if target > 0.5 else (rejected, chosen)
        right.append(better > worse)
        confidence = 1 / (1 + math.exp(-abs(chosen - rejected)))
        bins.setdefault(min(int((confidence - 0.5) / 0.05), 9), []).append(
            (better > worse) - confidence
        )
    if not right:
        return None, None
    return sum(right) / len(right), sum(abs(sum(gaps)) for gaps in bins.values()) / len(right)


def test_metrics_with_targets_and_subsets_by_definition():
    """Random scores, a third of them tied, targets on either side of 0.5 and at it."""
    rng = random.Random(0)
    for _ in range(100):
        pairs, subsets = [], []
        for _ in range(rng.randint(1, 60)):
            chosen = rng.gauss(0, 1.5)
            rejected = chosen if rng.random() < 0.3 else rng.gauss(0, 1.5)
            pairs.append((chosen, rejected, rng.choice([1.0, 0.7, 0.5, 0.5, 0.2, 0.0])))
            subsets.append(rng.choice([None, "b", "a", "Z"]))
        chosen, rejected, targets = map(list, zip(*pairs))
        numbers = numbers_of(chosen, rejected, target=targets, subset=subsets)
        metrics = summarize(0.5, numbers, 0, 0)
        accuracy, ece = by_definition(pairs)
        assert metrics["accuracy"] == (accuracy and pytest.approx(accuracy, abs=1e-12))
        assert metrics["ece"] == (ece and pytest.approx(ece, abs=1e-12))
        assert metrics["pairs"] == len(pairs)
        assert metrics["ties"] == pytest.approx(np.mean(np.equal(chosen, rejected)))
        assert metrics["margin"] == pytest.approx(np.mean(chosen) - np.mean(rejected))
        names = sorted(set(subsets) - {None})
        assert list(metrics.get("by", {})) == names
        for name in names:
            own = [pair for pair, subset in zip(pairs, subsets) if subset == name]
            accuracy, _ = by_definition(own)
            expected = accuracy and pytest.approx(accuracy, abs=1e-12)
            assert metrics["by"][name] == {"accuracy": expected, "pairs": len(own)}


def test_targets_change_only_what_is_about_the_outcome():
    """Scores, margins, ties and the probability error are of all pairs, as they stand."""
    scores, true = ([2.0, 1.0, 0.0, 1.0], [0.0, 1.0, 3.0, 0.0]), [1.0, -1.0, 1.0, 2.0]
    plain = summarize(0.5, numbers_of(*scores, true_margin=true), 1, 2)
    targets = [1.0, 0.9, 0.2, 0.5]
    soft = summarize(0.5, numbers_of(*scores, true_margin=true, target=targets), 1, 2)
    changed = {name for name in plain if plain[name] != soft[name]}
    assert changed == {"accuracy", "ece", "bayes_accuracy"}
    assert (plain["accuracy"], soft["accuracy"]) == (0.5, pytest.approx(2 / 3))
    # The best possible on the same labels: right, wrong, wrong.
    assert (plain["bayes_accuracy"], soft["bayes_accuracy"]) == (0.75, pytest.approx(1 / 3))


@pytest.mark.parametrize("subset", [None, "a"])
def test_no_accuracy_where_every_target_is_one_half(subset):
    numbers = numbers_of([1.0, 2.0], [0.0, 2.0], target=[0.5, 0.5], subset=[subset] * 2)
    found = summarize(0.7, numbers, 0, 0)
    assert (found["accuracy"], found["ece"], found["pairs"], found["ties"]) == (None, None, 2, 0.5)
    assert found.get("by", {}) == ({subset: {"accuracy": None, "pairs": 2}} if subset else {})
    json.dumps(found, allow_nan=False)
    expected = "accuracy none, loss 0.7000, mean margin 0.5000, calibration error none"
    left_out = "2 pairs of target 0.5 left out"
    assert in_a_line(found, numbers) == f"{expected}; {left_out}"
    events = [{"event": "eval", "step": step} | found for step in (0, 3)]
    assert outcome(events, numbers).splitlines()[-2:] == [
        "accuracy before training: none",
        f"accuracy after training: none; {left_out}",
    ]
    first, *_ = score_summary([(1.0, 0.5, subset), (0.0, 0.5, subset)]).splitlines()
    assert first == f"accuracy none, mean margin 0.5000; {left_out}"


def test_collected_numbers_are_of_every_pair_of_a_ranking():
    numbers = {name: [] for name in LISTS}
    comparisons = [
        data.Tokenized([[1], [2]], target=0.25, subset="a"),
        data.Tokenized([[1], [2], [3]], subset="b"),
        data.Tokenized([[1], [2]], rewards=[1.0, 3.0]),
    ]
    collect(numbers, comparisons, [1.0, 5.0, 5.0, 4.0, 7.0], [2.0, 4.0, 3.0, 3.0, 8.0])
    assert numbers == {
        "chosen": [1.0, 5.0, 5.0, 4.0, 7.0],
        "rejected": [2.0, 4.0, 3.0, 3.0, 8.0],
        "target": [0.25, 1.0, 1.0, 1.0, 1.0],
        "subset": ["a", "b", "b", "b", None],
        "true_margin": [-2.0],
        "scores": [1.0, 2.0, 5.0, 4.0, 3.0, 7.0, 8.0],
        "rewards": [1.0, 3.0],
    }


# --------------------------------------------------------------------------------------------------
# In words


def test_standard_error_is_the_spread_of_accuracies():
    """The accuracies of 20,000 sets of 24 pairs, each ranked right with probability 0.625."""
    rng = np.random.default_rng(0)
    accuracies = rng.binomial(24, 0.625, 20_000) / 24
    assert standard_error(0.625, 24) == pytest.approx(accuracies.std(), rel=0.02)
    assert standard_error(0.625, 24) == pytest.approx(math.sqrt(0.625 * 0.375 / 24), abs=1e-12)


@pytest.mark.parametrize("count", [1, 2, 24, 4000])
@pytest.mark.parametrize("accuracy", [0.0, 1.0])
def test_standard_error_where_all_or_no_pairs_are_right_is_that_of_the_add_one_estimate(
    accuracy, count
):
    estimate = 1 / (count + 2)  # or 1 minus it
    expected = math.sqrt(estimate * (1 - estimate) / count)
    assert standard_error(accuracy, count) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    "accuracy, count, words",
    [
        (0.625, 24, "0.6250 ± 0.0988 (24 pairs)"),
        (0.0, 1, "0.0000 ± 0.4714 (1 pair)"),
        (1.0, 24, "1.0000 ± 0.0393 (24 pairs)"),
        (0.5, 4000, "0.5000 ± 0.0079 (4,000 pairs)"),
        (None, 0, "none"),
        (0.25, 0, "0.2500"),
    ],
)
def test_accuracy_in_words(accuracy, count, words):
    assert accuracy_in_words(accuracy, count) == words


def test_a_model_whose_scores_hardly_vary_is_called_collapsed():
    """At a standard deviation of 0.001; neither one score nor NaN tells anything."""
    near = [1.0, 1.0 + 1.98e-3]  # the standard deviation is half the difference
    assert collapse(near) == (
        "collapsed: the scores of 2 responses have a standard deviation of 0.00099, below 0.001"
    )
    assert collapse([5.0] * 3).startswith("collapsed: the scores of 3 responses have")
    for scores in ([1.0, 1.0 + 2.01e-3], [5.0], [], [math.nan, 1.0]):
        assert collapse(scores) == ""
    numbers = numbers_of([0.5, 0.5], [0.5, 0.5], scores=[0.5] * 4)
    event = {"event": "eval", "step": 0} | summarize(math.log(2), numbers, 0, 0)
    line, lines = in_a_line(event, numbers), outcome([event], numbers).splitlines()
    said = "2 ties count as wrong; collapsed: the scores of 4 responses have a standard deviation"
    assert f"; {said} of 0, below 0.001" in line
    assert lines[0].startswith("collapsed: the scores of 4 responses")
    assert lines[2] == ("accuracy after training: 0.0000 ± 0.3062 (2 pairs); 2 ties count as wrong")


@pytest.mark.parametrize(
    "pairs, accuracy", [(1, "1.0000 ± 0.4714 (1 pair)"), (4000, "1.0000 ± 0.0002 (4,000 pairs)")]
)
def test_line_of_an_evaluation(pairs, accuracy):
    """Counts of what was dropped, and of anything else, are in metrics.jsonl alone."""
    numbers = numbers_of([2.0] * pairs, [0.0] * pairs, subset=["a"] * pairs)
    found = summarize(0.25, numbers, 0, 0)
    expected = f"accuracy {accuracy}, loss 0.2500, mean margin 2.0000"
    assert in_a_line(found, numbers) == f"{expected}, calibration error {found['ece']:.4f}"


def test_ties_are_counted_among_the_pairs_that_accuracy_reads():
    chosen, rejected, targets = [1.0, 1.0, 1.0, 2.0], [1.0, 1.0, 1.0, 1.0], [1.0, 0.2, 0.5, 1.0]
    numbers = numbers_of(chosen, rejected, target=targets)
    line = in_a_line(summarize(0.5, numbers, 0, 0), numbers)
    assert line.startswith("accuracy 0.3333 ± 0.2722 (3 pairs), loss 0.5000")
    assert line.endswith("; 1 pair of target 0.5 left out; 2 ties count as wrong")
    found = score_summary([(0.0, 1.0, None), (1.0, 1.0, None)])
    assert found == "accuracy 0.5000 ± 0.3536 (2 pairs), mean margin 0.5000; 1 tie counts as wrong"


def test_subsets_are_listed_by_name_and_the_others_counted():
    zeros = torch.zeros(30)
    by = by_subset(zeros + 1, zeros + 1, [f"s{i:02}" for i in reversed(range(30))])
    counts = dict.fromkeys(by, 2)
    lines = subset_lines(by, counts)
    assert lines[0] == "accuracy by subset:"
    assert lines[1:21] == [f"  s{i:02}: 1.0000 ± 0.3062 (2 pairs)" for i in range(20)]
    assert lines[21:] == ["  and 10 more subsets"]
    assert len(subset_lines(dict(list(by.items())[:20]), counts)) == 21  # none is left to count
    name = "\x1b[31m\u202e"
    hostile = by_subset(zeros[:1], zeros[:1], [name])
    expected = "  ␛[31m⟨U+202E⟩: 0.0000 ± 0.4714 (1 pair)"
    assert subset_lines(hostile, {name: 1})[1] == expected


def test_outcome_has_the_subsets_before_and_after():
    """The pair of "a" that has target 0.5 is in no accuracy, and in no number of pairs."""
    subsets = ["b", "a", None, "a"]
    targets = [1.0, 1.0, 1.0, 0.5]
    numbers = numbers_of([2.0, 1.0, 0.0, 1.0], [0.0, 2.0, 1.0, 0.0], subset=subsets, target=targets)
    after = {"event": "eval", "step": 3} | summarize(0.5, numbers, 0, 0)
    before = after | {"step": 0, "accuracy": 2 / 3, "by": {"b": {"accuracy": 0.0, "pairs": 1}}}
    assert outcome([before, {"event": "step"}, after], numbers).splitlines() == [
        "accuracy by subset:",
        "  a: none before, 0.0000 ± 0.4714 (1 pair) after",
        "  b: 0.0000 ± 0.4714 (1 pair) before, 1.0000 ± 0.4714 (1 pair) after",
        "accuracy before training: 0.6667 ± 0.2722 (3 pairs)",
        "accuracy after training: 0.3333 ± 0.2722 (3 pairs); 1 pair of target 0.5 left out",
    ]
    del before["by"]  # written by an older version
    lines = outcome([before, after], numbers).splitlines()
    assert lines[1] == "  a: 0.0000 ± 0.4714 (1 pair)"


def test_outcome_in_words():
    numbers = numbers_of([2.0], [0.0]) | {"scores": [2.0, 1.0], "rewards": [0.5, 0.1]}
    before = {"event": "eval", "step": 0, "accuracy": 0.0, "pairs": 1}
    after = {"event": "eval", "step": 3, "accuracy": 1.0, "pairs": 1, "bayes_accuracy": 1.0}
    spearmans = "Spearman's correlation of the scores of 2 eval responses with their true rewards"
    assert outcome([before, {"event": "step"}, after], numbers).splitlines() == [
        f"{spearmans}: 1.0000",
        "accuracy before training: 0.0000 ± 0.4714 (1 pair)",
        "accuracy after training: 1.0000 ± 0.4714 (1 pair)",
        "best possible accuracy (Bayes-optimal): 1.0000 ± 0.4714 (1 pair)",
    ]


def test_summary_of_scores_by_hand():
    pairs = [(1.0, 1.0, "b"), (-1.0, 0.2, "b"), (-2.0, 1.0, "a"), (4.0, 0.5, "b")]
    left_out = "1 pair of target 0.5 left out"
    assert score_summary(pairs).splitlines() == [
        f"accuracy 0.6667 ± 0.2722 (3 pairs), mean margin 0.5000; {left_out}",
        "accuracy by subset:",
        "  a: 0.0000 ± 0.4714 (1 pair)",
        "  b: 1.0000 ± 0.3062 (2 pairs)",
    ]
    found = score_summary([(4.0, 0.5, None)])
    assert found == f"accuracy none, mean margin 4.0000; {left_out}"


def test_summary_of_rows_whose_chosen_text_should_score_highest():
    """A tie is not highest."""
    rows = [(0.5, "b"), (-0.1, "b"), (0.0, "a"), (2.0, None)]
    title = "the chosen text scores highest"
    assert best_summary(rows).splitlines() == [
        f"{title}: 0.5000 ± 0.2500 (4 rows); 1 tie counts as wrong",
        f"{title}, by subset:",
        "  a: 0.0000 ± 0.4714 (1 row)",
        "  b: 0.5000 ± 0.3536 (2 rows)",
    ]
    assert best_summary(rows[3:]) == f"{title}: 1.0000 ± 0.4714 (1 row)"


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


def test_accuracy_by_subset_has_a_tag_for_each_subset(tmp_path):
    by = {"a b": {"accuracy": 0.25, "pairs": 4}, "c": {"accuracy": None, "pairs": 1}}
    writer = Writer(tmp_path)
    for step in (0, 5):
        event = {"event": "eval", "step": step, "accuracy": 0.5, "ece": None}
        writer.write(event | {"by": by})
    writer.writer.close()
    assert read(tmp_path) == {
        "eval/accuracy": [(0, 0.5), (5, 0.5)],
        "eval/accuracy/a b": [(0, 0.25), (5, 0.25)],
    }


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
