"""Metrics of end scores: accuracy, calibration, correlation; how they are said and shown.

It runs no model: train.py's `evaluate` computes the scores and hands them in.
"""

import itertools
import math
from collections import Counter
from collections.abc import Sequence

import numpy as np
import torch

from parts.guards import LONGEST_NAME, counted, one_line

# The lists that an evaluation collects. Of every pair: the end scores, the target, the subset (or
# None), and the difference of the true rewards where these are known. Of every response: the end
# score, and the true reward where it is known.
LISTS = ("chosen", "rejected", "target", "subset", "true_margin", "scores", "rewards")
SUBSETS_LISTED = 20  # in a terminal
COLLAPSED = 1e-3  # a standard deviation of end scores below it says that a model has no opinion


def collect(
    numbers: dict[str, list], comparisons: list, chosen: list[float], rejected: list[float]
):
    """Append what an evaluation needs to know of comparisons to the lists of LISTS.

    chosen, rejected: (P,), the end scores of all pairs (i, j), i < j, comparison after comparison.
    """
    numbers["chosen"] += chosen
    numbers["rejected"] += rejected
    pair = 0
    for comparison in comparisons:
        count = len(comparison.sequences)
        pairs = count * (count - 1) // 2
        numbers["target"] += [comparison.target] * pairs
        numbers["subset"] += [comparison.subset] * pairs
        # The first pairs of a comparison are its first response with each other response.
        numbers["scores"] += [chosen[pair], *rejected[pair : pair + count - 1]]
        pair += pairs
        rewards = comparison.rewards or []
        numbers["rewards"] += rewards
        numbers["true_margin"] += [a - b for a, b in itertools.combinations(rewards, 2)]


def summarize(loss: float, numbers: dict[str, list], dropped: int, truncated: int) -> dict:
    """Compute the metrics of an evaluation, under their names in metrics.jsonl.

    loss: the mean loss. numbers: the lists of LISTS. dropped, truncated: how many comparisons of
    the eval set have been dropped, and how many have lost tokens to --max_seq_len.
    `accuracy` and `ece` are None where every target is 0.5.
    """
    chosen, rejected, target, true_margin = (
        torch.tensor(numbers[name], dtype=torch.float64)
        for name in ("chosen", "rejected", "target", "true_margin")
    )
    margin = chosen - rejected
    metrics = {
        "loss": loss,
        "accuracy": accuracy(margin, target),
        "chosen_score": chosen.mean().item(),
        "rejected_score": rejected.mean().item(),
        "margin": margin.mean().item(),
        "ece": calibration_error(decided(margin, target)),
        "pairs": len(margin),
        "ties": (margin == 0).double().mean().item(),
        "dropped": dropped,
        "truncated": truncated,
    }
    if len(true_margin):
        error = torch.sigmoid(margin) - torch.sigmoid(true_margin)
        metrics["bayes_accuracy"] = accuracy(true_margin, target)
        metrics["probability_error"] = error.abs().mean().item()
    by = by_subset(margin, target, numbers["subset"])
    if by:
        metrics["by"] = by
    return metrics


def decided(margin: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Select the pairs of which one response is preferred, and turn them that way round.

    margin: (P,), first minus second score. target: (P,), the probability that the first response is
    preferred; pairs of 0.5 are left out, pairs below it reversed. Returns (D,): the score of the
    preferred response minus that of the other.
    """
    preferred = torch.where(target < 0.5, -margin, margin)
    return preferred[target != 0.5]


def accuracy(margin: torch.Tensor, target: torch.Tensor) -> float | None:
    """Compute the share of decided pairs whose preferred response has the higher score.

    margin, target: (P,), as in `decided`. A tie counts as wrong. None where no pair is decided.
    """
    margin = decided(margin, target)
    if len(margin) == 0:
        return None
    return (margin > 0).double().mean().item()


def standard_error(accuracy: float, count: int) -> float:
    """Compute the binomial standard error of an accuracy a on n = `count` pairs: sqrt(a (1-a) / n).

    Where every pair is right, or none, this would be 0, however few pairs there are; a is then the
    add-one estimate, (right + 1) / (n + 2), Laplace's rule of succession: 0.4714 for one pair,
    0.0393 for 24. Pairs count as independent. Those of one ranking are not, so the true error of
    rankings is larger.
    """
    estimate = accuracy
    if accuracy in (0, 1):
        estimate = (accuracy * count + 1) / (count + 2)
    return math.sqrt(estimate * (1 - estimate) / count)


def by_subset(margin: torch.Tensor, target: torch.Tensor, subset: Sequence[str | None]) -> dict:
    """Compute {subset: {"accuracy", "pairs"}}, in the order of names; pairs without one are not in.

    margin, target: (P,), as in `decided`. subset: (P,). `pairs` counts those of target 0.5, too.
    """
    places = {}
    for place, name in enumerate(subset):
        if name is not None:
            places.setdefault(name, []).append(place)
    by = {}
    for name in sorted(places):
        own = places[name]
        by[name] = {"accuracy": accuracy(margin[own], target[own]), "pairs": len(own)}
    return by


def decided_by_subset(subset: Sequence[str | None], target: Sequence[float]) -> Counter:
    """Count the pairs that accuracy reads, those with a target other than 0.5, in every subset."""
    return Counter(name for name, probability in zip(subset, target) if probability != 0.5)


def confidence_bins(margin: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Sort pairs by confidence, max(p, 1 - p) with p = sigmoid(margin), into 10 equal bins.

    margin: (N,), chosen minus rejected end score. Returns the confidences, (N,), and their bins,
    (N,) int64: bin i of 0 to 9 begins at 0.5 + 0.05 i.
    """
    confidence = torch.sigmoid(margin.abs())
    borders = torch.linspace(0.5, 1, 11, dtype=confidence.dtype)[1:-1]
    return confidence, torch.bucketize(confidence, borders, right=True)


def calibration_error(margin: torch.Tensor) -> float | None:
    """Compute the expected calibration error (Naeini et al. 2015) of sigmoid(margin).

    margin: (N,), chosen minus rejected end score; its sigmoid is the model's probability that the
    chosen response is better. None without a pair.
    """
    if len(margin) == 0:
        return None
    confidence, bins = confidence_bins(margin)
    excess = (margin > 0).double() - confidence.double()
    gaps = torch.zeros(10, dtype=torch.float64).index_add_(0, bins, excess)
    return float(gaps.abs().sum()) / len(margin)


def spearman(a: list[float], b: list[float]) -> float:
    """Compute Spearman's correlation, that of the ranks; equal values share their mean rank."""
    ranks = []
    for values in (a, b):
        _, group, counts = np.unique(values, return_inverse=True, return_counts=True)
        ranks.append((np.cumsum(counts) - (counts - 1) / 2)[group])
    return float(np.corrcoef(ranks)[0, 1])


# --------------------------------------------------------------------------------------------------
# In words


def in_words(number: float | None) -> str:
    return "none" if number is None else f"{number:.4f}"


def accuracy_in_words(accuracy: float | None, count: int, noun: str = "pair") -> str:
    """Write an accuracy with its standard error: "0.6250 ± 0.0988 (24 pairs)"; None is "none".

    count: the number of pairs, or of what `noun` says, that the accuracy is a share of; at 0, as in
    a subset that an earlier evaluation alone had, the accuracy stands without an error.
    """
    if accuracy is None or count == 0:
        return in_words(accuracy)
    return f"{accuracy:.4f} ± {standard_error(accuracy, count):.4f} ({counted(count, noun)})"


def ties_in_words(ties: int) -> str:
    verb = "counts" if ties == 1 else "count"
    return f"{counted(ties, 'tie')} {verb} as wrong"


def remarks(margin: torch.Tensor, target: torch.Tensor) -> list[str]:
    """List what a reader should know of the pairs of an accuracy: undecided ones, and ties.

    margin, target: (P,), as in `decided`.
    """
    found = []
    left_out = int((target == 0.5).sum())
    if left_out:
        found.append(f"{counted(left_out, 'pair')} of target 0.5 left out")
    ties = int((decided(margin, target) == 0).sum())
    if ties:
        found.append(ties_in_words(ties))
    return found


def collapse(scores: Sequence[float]) -> str:
    """Say that a model has collapsed, where its end scores hardly vary; "" where they do.

    scores: (N,), one for every response. Their standard deviation is compared with COLLAPSED; fewer
    than two scores tell nothing. A collapsed model looks perfect where ties count as right.
    """
    if len(scores) < 2:
        return ""
    deviation = float(np.std(scores))
    if not deviation < COLLAPSED:
        return ""
    return (
        f"collapsed: the scores of {counted(len(scores), 'response')} have a standard deviation of "
        f"{deviation:.2g}, below {COLLAPSED:g}"
    )


def pairs_of(numbers: dict[str, list]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return margins and targets, (P,) float64, from the lists of LISTS."""
    chosen, rejected, target = (
        torch.tensor(numbers[name], dtype=torch.float64)
        for name in ("chosen", "rejected", "target")
    )
    return chosen - rejected, target


def in_a_line(found: dict, numbers: dict[str, list]) -> str:
    """Say in a line what an evaluation has found. metrics.jsonl has all numbers of `summarize`.

    found: from `summarize`. numbers: the lists of LISTS that it is made of.
    """
    margin, target = pairs_of(numbers)
    right = accuracy_in_words(found["accuracy"], len(decided(margin, target)))
    line = (
        f"accuracy {right}, loss {found['loss']:.4f}, mean margin {found['margin']:.4f}, "
        f"calibration error {in_words(found['ece'])}"
    )
    parts = [line, *remarks(margin, target), collapse(numbers["scores"])]
    return "; ".join(filter(None, parts))


def subset_lines(
    by: dict[str, dict],
    counts: dict[str, int],
    before: dict[str, dict] | None = None,
    title: str = "accuracy by subset",
    noun: str = "pair",
) -> list[str]:
    """Write accuracy by subset, a line each; subsets beyond SUBSETS_LISTED are counted.

    by: from `by_subset`. counts: from `decided_by_subset`, of what `noun` says. before: the
    accuracies before training, to be shown beside those of `by`, or None.
    """
    if not by:
        return []
    lines = [f"{title}:"]
    for name, found in list(by.items())[:SUBSETS_LISTED]:
        text = accuracy_in_words(found["accuracy"], counts[name], noun)
        if before is not None:
            earlier = before.get(name, {}).get("accuracy")
            text = f"{accuracy_in_words(earlier, counts[name])} before, {text} after"
        lines.append(f"  {one_line(name, LONGEST_NAME)}: {text}")
    if len(by) > SUBSETS_LISTED:
        lines.append(f"  and {counted(len(by) - SUBSETS_LISTED, 'more subset')}")
    return lines


def score_summary(pairs: list[tuple[float, float, str | None]]) -> str:
    """Say how the scores of pairs compare with their preferences, in lines (python rm.py).

    pairs: first minus second score, target, and subset of each pair; at least one.
    """
    margins, targets, subsets = zip(*pairs)
    margin, target = (torch.tensor(x, dtype=torch.float64) for x in (margins, targets))
    text = f"accuracy {accuracy_in_words(accuracy(margin, target), len(decided(margin, target)))}"
    text += f", mean margin {margin.mean():.4f}"
    counts = decided_by_subset(subsets, targets)
    lines = subset_lines(by_subset(margin, target, subsets), counts)
    return "\n".join(["; ".join([text, *remarks(margin, target)]), *lines])


def best_summary(rows: list[tuple[float, str | None]]) -> str:
    """Say how often the chosen text of a row scores highest, in lines (python rm.py).

    rows: the score of the chosen text minus the highest score of the others, and the subset of
    each row, at least one. A tie is not highest, as in RewardBench 2.
    """
    leads, subsets = zip(*rows)
    lead, target = torch.tensor(leads, dtype=torch.float64), torch.ones(len(rows))
    title = "the chosen text scores highest"
    text = f"{title}: {accuracy_in_words(accuracy(lead, target), len(rows), 'row')}"
    counts = decided_by_subset(subsets, target.tolist())
    by = by_subset(lead, target, subsets)
    lines = subset_lines(by, counts, title=f"{title}, by subset", noun="row")
    return "\n".join(["; ".join([text, *remarks(lead, target)]), *lines])


def outcome(events: list[dict], numbers: dict[str, list]) -> str:
    """Say what training changed, in some lines.

    events: of metrics.jsonl. numbers: the lists of LISTS, of the last evaluation.
    """
    evaluations = [event for event in events if event["event"] == "eval"]
    before, after = evaluations[0], evaluations[-1]
    if before["step"] > 0:  # the lines before it were lost
        before = None
    lines = []
    scores, rewards = numbers["scores"], numbers["rewards"]
    if rewards:
        lines.append(
            f"Spearman's correlation of the scores of {counted(len(scores), 'eval response')} with "
            f"their true rewards: {spearman(scores, rewards):.4f}"
        )
    counts = decided_by_subset(numbers["subset"], numbers["target"])
    lines += subset_lines(after.get("by", {}), counts, before and before.get("by"))
    collapsed = collapse(scores)
    if collapsed:
        lines.append(collapsed)
    margin, target = pairs_of(numbers)
    count = len(decided(margin, target))
    text = "not known; metrics.jsonl has no evaluation at step 0"
    if before:
        text = accuracy_in_words(before["accuracy"], count)
    lines.append(f"accuracy before training: {text}")
    text = f"accuracy after training: {accuracy_in_words(after['accuracy'], count)}"
    lines.append("; ".join([text, *remarks(margin, target)]))
    if after.get("bayes_accuracy") is not None:
        best = accuracy_in_words(after["bayes_accuracy"], count)
        lines.append(f"best possible accuracy (Bayes-optimal): {best}")
    return "\n".join(lines)


# --------------------------------------------------------------------------------------------------
# TensorBoard (train.py --enable_tensorboard)


def summary_writer() -> type:
    """Import TensorBoard's SummaryWriter. Raises ValueError where tensorboard is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise ValueError("--enable_tensorboard: needs `pip install tensorboard`") from None
    return SummaryWriter


class Writer:
    """Write events of metrics.jsonl for TensorBoard, as step/loss, step/lr, eval/accuracy, ...

    done: the step after which the run resumes; later steps in the directory are hidden, at 0 all
    steps of an earlier run. Methods raise ValueError where the directory cannot be written to.
    """

    def __init__(self, directory: str, done: int = 0):
        purge_step = done + 1 if done else 0
        try:
            self.writer = summary_writer()(directory, purge_step=purge_step)
        except OSError as error:
            raise unwritable(directory, error) from None

    def write(self, event: dict):
        """Write the numbers of a line of metrics.jsonl, at its step; null is skipped.

        Accuracy by subset becomes eval/accuracy/SUBSET.
        """
        numbers = {name: event[name] for name in event.keys() - {"event", "step", "by"}}
        for subset, found in event.get("by", {}).items():
            numbers[f"accuracy/{subset}"] = found["accuracy"]
        try:
            for name, value in numbers.items():
                if value is not None:
                    self.writer.add_scalar(f"{event['event']}/{name}", value, event["step"])
            self.writer.flush()
        except OSError as error:
            raise unwritable(self.writer.log_dir, error) from None


def unwritable(directory: str, error: OSError) -> ValueError:
    return ValueError(
        f"--tensorboard_path {directory}: cannot be written to ({error.strerror}); "
        "give another directory"
    )
