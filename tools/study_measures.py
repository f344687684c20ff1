"""Measures of the margins of pairs, with standard errors that know which pairs belong together.

Margins are computed by tools/study_real.py; tools/study_results.py writes the pages.
"""

import math

import numpy as np
import torch

from parts.metrics import calibration_error

SIMILAR = 0.1  # lengths that differ by at most this share of the longer one
DRAWS = 4000  # of the bootstrap


def correctness(margins) -> np.ndarray:
    """Count each pair as right (1), wrong (0) or tied (0.5): margins (...) -> (...)."""
    return (np.sign(margins) + 1) / 2


def cluster_sums(values: np.ndarray, clusters: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Sum values and count them by cluster: two arrays (number of clusters,)."""
    _, places = np.unique(clusters, return_inverse=True)
    return np.bincount(places, weights=values), np.bincount(places)


def mean_and_error(values: np.ndarray, clusters: np.ndarray) -> tuple[float, float]:
    """Compute the mean of values and its standard error, clustered (Liang & Zeger 1986).

    values, clusters: (N,). Values of one cluster may depend on each other. With every value in a
    cluster of its own it is the usual standard error, std(ddof=1) / sqrt(N). Both are NaN without
    a value.
    """
    if len(values) == 0:
        return math.nan, math.nan
    mean = values.mean()
    sums, counts = cluster_sums(values, clusters)
    deviations = sums - counts * mean
    n = len(sums)
    return float(mean), float(np.sqrt((deviations**2).sum() * n / (n - 1)) / len(values))


def bootstrap(difference: np.ndarray, clusters: np.ndarray, seed: int = 0) -> dict:
    """Resample clusters to find how sure the mean of paired differences is.

    difference, clusters: (N,). Returns the mean, the bootstrap's standard error, and its 2.5 and
    97.5 percentiles.
    """
    sums, counts = cluster_sums(difference, clusters)
    drawn = np.random.RandomState(seed).randint(len(sums), size=(DRAWS, len(sums)))
    means = sums[drawn].sum(1) / counts[drawn].sum(1)
    low, high = np.percentile(means, [2.5, 97.5])
    numbers = {"mean": difference.mean(), "error": means.std(ddof=1), "low": low, "high": high}
    return {name: float(number) for name, number in numbers.items()}


def kinds_of_length(lengths: np.ndarray) -> dict[str, np.ndarray]:
    """Tell for each pair which response is longer: masks (N,) by name. lengths: (N, 2)."""
    longest = lengths.max(1)
    is_similar = np.abs(lengths[:, 0] - lengths[:, 1]) <= SIMILAR * longest
    return {
        "longer": ~is_similar & (lengths[:, 0] > lengths[:, 1]),
        "shorter": ~is_similar & (lengths[:, 0] < lengths[:, 1]),
        "similar": is_similar,
    }


def measures(margins: np.ndarray, clusters: np.ndarray, lengths: np.ndarray) -> dict:
    """Compute the measures of an arm over its seeds: means over seeds of what each pair has.

    margins: (S, N), one row a seed. Returns accuracy, loss and calibration error, and the accuracy
    where the chosen response is longer, shorter, or of similar length, each as [mean, standard
    error], the latter None for the calibration error. The errors are those of drawing other pairs;
    `seeds` has the accuracy of each seed.
    """
    right = correctness(margins).mean(0)
    losses = np.logaddexp(0, -margins).mean(0)
    errors = [calibration_error(torch.from_numpy(row)) for row in margins]
    found = {
        "pairs": len(right),
        "seeds": [float(row.mean()) for row in correctness(margins)],
        "accuracy": mean_and_error(right, clusters),
        "loss": mean_and_error(losses, clusters),
        "ece": (float(np.mean(errors)), None),
    }
    for name, mask in kinds_of_length(lengths).items():
        found[f"pairs_{name}"] = int(mask.sum())
        found[f"accuracy_{name}"] = mean_and_error(right[mask], clusters[mask])
    return found
