"""Tests of tools/study_measures.py beside brute force."""

import itertools

import numpy as np
import pytest
import torch

from parts.metrics import calibration_error
from tools.study_measures import bootstrap, correctness, kinds_of_length, mean_and_error, measures

RNG = np.random.default_rng(0)


def test_a_tie_is_half_right():
    assert correctness([[2.0, -1.0, 0.0]]).tolist() == [[1, 0, 0.5]]


def test_clusters_of_one_give_the_usual_standard_error():
    values = RNG.normal(size=50)
    mean, error = mean_and_error(values, RNG.permutation(50))
    assert mean == pytest.approx(values.mean())
    assert error == pytest.approx(values.std(ddof=1) / np.sqrt(50))


def test_repeated_pairs_give_the_error_of_the_pairs_that_they_repeat():
    values = RNG.normal(size=40)
    expected = mean_and_error(values, np.arange(40))
    found = mean_and_error(np.repeat(values, 3), np.repeat(np.arange(40), 3))
    assert found == pytest.approx(expected)


def test_the_clustered_error_is_that_of_means_over_drawn_data():
    """Draw data sets of 60 clusters, 1 to 4 values each, that share a part of their noise."""
    counts = RNG.integers(1, 5, size=60)
    clusters = np.repeat(np.arange(60), counts)
    means, errors = [], []
    for _ in range(3000):
        values = RNG.normal(size=60)[clusters] + 0.5 * RNG.normal(size=len(clusters))
        mean, error = mean_and_error(values, clusters)
        means.append(mean)
        errors.append(error)
    assert np.mean(errors) == pytest.approx(np.std(means), rel=0.05)
    independent = np.sqrt(1.25 / len(clusters))
    assert np.mean(errors) > 1.3 * independent


def test_the_bootstrap_is_that_of_all_resamples():
    """With 4 clusters there are 256 resamples, which can be listed."""
    values, clusters = RNG.normal(size=7), np.array([0, 0, 1, 2, 2, 2, 3])
    means = []
    for drawn in itertools.product(range(4), repeat=4):
        some = np.concatenate([values[clusters == cluster] for cluster in drawn])
        means.append(some.mean())
    found = bootstrap(values, clusters)
    assert found["mean"] == pytest.approx(values.mean())
    assert found["error"] == pytest.approx(np.std(means), rel=0.05)
    for name, percent in (("low", 2.5), ("high", 97.5)):
        place = (np.array(means) <= found[name]).mean() * 100
        assert place == pytest.approx(percent, abs=1.5)
    assert bootstrap(values, clusters) == found


def test_the_bootstrap_agrees_with_the_clustered_error():
    clusters = np.repeat(np.arange(200), 3)
    values = RNG.normal(size=200)[clusters] + RNG.normal(size=600)
    expected = mean_and_error(values, clusters)[1]
    assert bootstrap(values, clusters)["error"] == pytest.approx(expected, rel=0.05)


def test_lengths_within_a_tenth_are_similar():
    lengths = np.array([[100, 90], [100, 89], [90, 100], [89, 100], [5, 5]])
    kinds = kinds_of_length(lengths)
    assert kinds["similar"].tolist() == [True, False, True, False, True]
    assert kinds["longer"].tolist() == [False, True, False, False, False]
    assert kinds["shorter"].tolist() == [False, False, False, True, False]


def test_measures_are_means_over_seeds():
    margins = RNG.normal(size=(3, 300))
    clusters, lengths = np.arange(300) // 2, RNG.integers(1, 100, size=(300, 2))
    found = measures(margins, clusters, lengths)
    each = [measures(row[None], clusters, lengths) for row in margins]
    for name in ("accuracy", "loss", "ece", "accuracy_longer", "accuracy_similar"):
        assert found[name][0] == pytest.approx(np.mean([one[name][0] for one in each]))
    assert found["seeds"] == [one["accuracy"][0] for one in each]
    assert found["loss"][0] == pytest.approx(np.log(1 + np.exp(-margins)).mean())
    assert each[0]["ece"][0] == pytest.approx(calibration_error(torch.from_numpy(margins[0])))
    is_similar = kinds_of_length(lengths)["similar"]
    assert found["pairs_similar"] == is_similar.sum() > 10
    expected = (margins[:, is_similar] > 0).mean()
    assert found["accuracy_similar"][0] == pytest.approx(expected)
    names = ("longer", "shorter", "similar")
    assert sum(found[f"pairs_{name}"] for name in names) == found["pairs"] == 300
