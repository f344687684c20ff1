"""Metrics of end scores: accuracy, calibration, correlation; TensorBoard's copy of them.

It runs no model: train.py's `evaluate` computes the scores and hands them in.
"""

import itertools

import numpy as np
import torch


def collect(
    numbers: dict[str, list[float]], comparisons: list, chosen: list[float], rejected: list[float]
):
    """Append the end scores and true rewards of comparisons to the lists of `train.evaluate`.

    chosen, rejected: (P,), the end scores of all pairs (i, j), i < j, comparison after comparison.
    """
    numbers["chosen"] += chosen
    numbers["rejected"] += rejected
    pair = 0
    for comparison in comparisons:
        count = len(comparison.sequences)
        # The first pairs of a comparison are its first response with each other response.
        numbers["scores"] += [chosen[pair], *rejected[pair : pair + count - 1]]
        pair += count * (count - 1) // 2
        rewards = comparison.rewards or []
        numbers["rewards"] += rewards
        numbers["true_margin"] += [a - b for a, b in itertools.combinations(rewards, 2)]


def summarize(
    loss: float, chosen: list[float], rejected: list[float], true_margin: list[float], dropped: int
) -> dict[str, float]:
    """Compute the metrics of an evaluation, under their names in metrics.jsonl.

    loss: the mean loss. chosen, rejected: (P,), the end scores of every pair. true_margin: (P,),
    the differences of their true rewards; empty where these are not known. dropped: how many
    comparisons of the eval set have been dropped.
    """
    chosen, rejected, true_margin = (
        torch.tensor(values, dtype=torch.float64) for values in (chosen, rejected, true_margin)
    )
    margin = chosen - rejected
    metrics = {
        "loss": loss,
        "accuracy": (margin > 0).double().mean().item(),
        "chosen_score": chosen.mean().item(),
        "rejected_score": rejected.mean().item(),
        "margin": margin.mean().item(),
        "ece": calibration_error(margin),
        "pairs": len(margin),
        "dropped": dropped,
    }
    if len(true_margin):
        error = torch.sigmoid(margin) - torch.sigmoid(true_margin)
        metrics["bayes_accuracy"] = (true_margin > 0).double().mean().item()
        metrics["probability_error"] = error.abs().mean().item()
    return metrics


def confidence_bins(margin: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Sort pairs by confidence, max(p, 1 - p) with p = sigmoid(margin), into 10 equal bins.

    margin: (N,), chosen minus rejected end score. Returns the confidences, (N,), and their bins,
    (N,) int64: bin i of 0 to 9 begins at 0.5 + 0.05 i.
    """
    confidence = torch.sigmoid(margin.abs())
    borders = torch.linspace(0.5, 1, 11, dtype=confidence.dtype)[1:-1]
    return confidence, torch.bucketize(confidence, borders, right=True)


def calibration_error(margin: torch.Tensor) -> float:
    """Compute the expected calibration error (Naeini et al. 2015) of sigmoid(margin).

    margin: (N,), chosen minus rejected end score; its sigmoid is the model's probability that the
    chosen response is better.
    """
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


def outcome(events: list[dict], scores: list[float], rewards: list[float]) -> str:
    """Say what training changed, in a line or two.

    events: of metrics.jsonl. scores, rewards: (R,), the last end scores of the eval responses, and
    their true rewards; empty where these are not known.
    """
    evaluations = [event for event in events if event["event"] == "eval"]
    before, after = evaluations[0], evaluations[-1]
    text = (
        f"accuracy on {after['pairs']} eval pairs: {before['accuracy']:.4f} before, "
        f"{after['accuracy']:.4f} after training"
    )
    if "bayes_accuracy" in after:
        text += f"; the best possible (Bayes-optimal) is {after['bayes_accuracy']:.4f}"
    if rewards:
        text = (
            f"Spearman's correlation of {len(scores)} eval responses' scores with their true "
            f"rewards: {spearman(scores, rewards):.4f}\n{text}"
        )
    return text


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
        """Write the numbers of a line of metrics.jsonl, at its step; null is skipped."""
        try:
            for name, value in event.items():
                if name not in ("event", "step") and value is not None:
                    self.writer.add_scalar(f"{event['event']}/{name}", value, event["step"])
            self.writer.flush()
        except OSError as error:
            raise unwritable(self.writer.log_dir, error) from None


def unwritable(directory: str, error: OSError) -> ValueError:
    return ValueError(
        f"--tensorboard_path {directory}: cannot be written to ({error.strerror}); "
        "give another directory"
    )
