"""Known traps: wrong losses by name, each made of vectors/run_numpy.py with one step done wrong.

    python -m tools.traps

writes vectors/traps.json and traps.md: which cases of the kit, and which invariants, each of them
fails (a minute). tools/check_vectors.py compares a foreign loss with these. The right loss is in
rm.py, the invariants are in tools/invariants.py.
"""

import argparse
import contextlib
import itertools
import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import numpy as np

from tools.invariants import NAMES, broken_by
from tools.make_vectors import write_json
from vectors import run_numpy
from vectors.run_numpy import OUTSIDE

VECTORS = Path(run_numpy.__file__).parent
right = run_numpy.results  # the functions as they are, while a trap stands in place of one
right_region = run_numpy.region
right_texts = run_numpy.texts_of
right_term = run_numpy.term
right_loss_case = run_numpy.loss_case
right_ranking = run_numpy.ranking_case


@dataclass
class Trap:
    """A wrong loss: `wrong` stands in place of the function `place` of run_numpy.py."""

    name: str
    what: str  # completes the sentence "The loss ..."
    place: str
    wrong: Callable


# --------------------------------------------------------------------------------------------------
# Wrong steps


def with_span(wrong: Callable) -> Callable:
    """Make a region of `wrong`, which gets the right start and stop and the ends of the texts.

    Identical texts keep their region unless `wrong` names another one for (L - 1, L).
    """

    def region(chosen, rejected):
        columns = right_region(chosen, rejected)
        for i, row in enumerate(columns):
            start, stop = np.flatnonzero(row)[[0, -1]] + (0, 1)
            ends = [np.flatnonzero(text != OUTSIDE)[-1] + 1 for text in (chosen[i], rejected[i])]
            if not np.array_equal(chosen[i], rejected[i]):
                start, stop = wrong(start, stop, ends, len(row))
            columns[i] = False
            columns[i, start:stop] = True
        return columns

    return region


def where_ids_differ(chosen, rejected):
    columns = right_region(chosen, rejected)
    differ = (chosen != rejected) & columns
    return np.where(differ.any(1, keepdims=True), differ, columns)


def with_texts(wrong: Callable) -> Callable:
    """Make texts of `wrong`, which gets ids, mask and pad id and returns where a text is."""

    def texts_of(ids, mask, pad_id, leading):
        right_texts(ids, mask, pad_id, leading)  # refuses what is to be refused
        inside = wrong(ids, mask, pad_id, leading)
        return np.where(inside, ids, OUTSIDE)

    return texts_of


def up_to_the_last_other_id(ids, mask, pad_id, leading):
    return (ids != pad_id)[:, ::-1].cumsum(1)[:, ::-1] > 0


def as_many_as_the_mask_has_ones(ids, mask, pad_id, leading):
    if mask.ndim:
        return np.arange(ids.shape[1]) < mask.sum(1, keepdims=True)
    return right_texts(ids, mask, pad_id, leading) != OUTSIDE


def with_weights(weigh: Callable) -> Callable:
    """Weigh pairs in another way: `weigh` gets the lengths of the regions and which are identical.

    It returns weights that are 1 / B in the right loss.
    """

    def results(texts, rewards, share, margins=0, targets=1, loss="divergent", center=0):
        B = len(texts) // 2
        margins, targets = (np.broadcast_to(x, (B, 1)) for x in (margins, targets))
        mean, chosen, rejected, gradient = right(
            texts, rewards, share, margins, targets, loss, center
        )
        plain, _, _, plain_gradient = right(texts, rewards, share, margins, targets, loss)
        mean, gradient = mean - plain, gradient - plain_gradient  # centering alone
        lengths = right_region(texts[:B], texts[B:]).sum(1)
        if loss == "end":
            lengths = np.ones(B)
        identical = (texts[:B] == texts[B:]).all(1)
        for i, weight in enumerate(weigh(lengths, identical) * share * B):
            rows = [i, B + i]
            of_pair = margins[i : i + 1], targets[i : i + 1], loss
            term, _, _, slopes = right(texts[rows], rewards[rows], weight, *of_pair)
            mean += term
            gradient[rows] += slopes
        return mean, chosen, rejected, gradient

    return results


def without_identical(lengths, identical):
    return ~identical / max(1, np.sum(~identical))


def last_column(texts, rewards, share, margins=0, targets=1, loss="divergent", center=0):
    full = np.where(texts == OUTSIDE, 0, texts)  # as if every row were a text up to its last column
    if loss == "end":
        return right(full, rewards, share, margins, targets, loss, center)
    mean, _, _, gradient = right(texts, rewards, share, margins, targets, loss)
    with_center = right(full, rewards, share, margins, targets, loss, center)
    without = right(full, rewards, share, margins, targets, loss)
    mean = mean + with_center[0] - without[0]
    return mean, with_center[1], with_center[2], gradient + with_center[3] - without[3]


def nothing_at_padding(texts, rewards, *rest):
    inside = texts != OUTSIDE
    mean, chosen, rejected, gradient = right(texts, rewards * inside, *rest)
    return mean, chosen, rejected, gradient * inside


def mean_difference(texts, rewards, share, margins=0, targets=1, loss="divergent", center=0):
    """Compute pairs with a target other than 1 from the mean difference of their region."""
    B, averaged = len(texts) // 2, rewards.copy()
    columns = right_region(texts[:B], texts[B:])
    for i in np.flatnonzero(np.broadcast_to(targets, (B, 1)) != 1):
        for row in (i, B + i):
            averaged[row, columns[i]] = rewards[row, columns[i]].mean()
    if loss == "end":
        return right(texts, rewards, share, margins, targets, loss, center)
    with_center = right(texts, rewards, share, margins, targets, loss, center)
    without = right(texts, rewards, share, margins, targets, loss)
    mean, _, _, gradient = right(texts, averaged, share, margins, targets, loss)
    mean = mean + with_center[0] - without[0]
    return mean, with_center[1], with_center[2], gradient + with_center[3] - without[3]


def with_options(change: Callable) -> Callable:
    """Hand on other options: `change` gets margins, targets, loss and center, and returns them."""

    def results(texts, rewards, share, margins=0, targets=1, loss="divergent", center=0):
        return right(texts, rewards, share, *change(margins, targets, loss, center))

    return results


def squares_apart(texts, rewards, share, margins=0, targets=1, loss="divergent", center=0):
    """Add the two squares of the end scores in place of the square of their sum."""
    without = right(texts, rewards, share, margins, targets, loss)
    _, chosen, rejected, _ = without
    inside = texts != OUTSIDE
    is_end = inside & (inside[:, ::-1].cumsum(1)[:, ::-1] == 1)
    scores = np.concatenate([chosen, rejected])
    mean = without[0] + center * share * (scores**2).sum()
    slopes = np.where(is_end, 2 * center * share * scores[:, None], 0.0)
    return mean, chosen, rejected, without[3] + slopes


def bfloat16(x):
    """Round to the 8 significant bits of bfloat16, halves to even."""
    fraction, exponent = np.frexp(x)
    return np.ldexp(np.round(fraction * 256) / 256, exponent)


def with_log(of_chosen: Callable, of_rejected: Callable) -> Callable:
    """Make a term of two functions of the differences, whose values stand for -log sigmoid."""

    def term(x, target):
        _, slope = right_term(x, target)
        rejected = np.where(target == 1, 0.0, (1 - target) * of_rejected(x))
        return target * of_chosen(x) + rejected, slope

    return term


def with_target(change: Callable) -> Callable:
    """Change targets, where there are any other than 1."""

    def term(x, target):
        if np.any(np.asarray(target) != 1):
            target = change(np.asarray(target))
        return right_term(x, target)

    return term


def combined(of_chosen: float, of_rejected: float) -> Callable:
    """Make a term of p log sigmoid(x) + (1 - p) (a log sigmoid(x) + b log sigmoid(-x)).

    `of_chosen` and `of_rejected`: a and b, 0 and 1 in the right term.
    """

    def term(x, target):
        towards, against = right_term(x, 1.0), right_term(x, 0.0)
        parts = []
        for first, second in zip(towards, against):
            rest = (1 - target) * (of_chosen * first + of_rejected * second)
            parts.append(target * first + rest)
        return tuple(parts)

    return term


def swapped(x, target):
    value, slope = right_term(-x, target)
    return value, -slope


def refuses_nothing(case: dict):
    try:
        return right_loss_case(case)
    except AssertionError:
        return 0.0, [], [], []


def with_pairs(weigh: Callable) -> Callable:
    """Weigh the pairs of rankings in another way.

    weigh: gets i, j and K of a pair, and the numbers of pairs and of comparisons of the case; the
        right one returns 2 / (K (K - 1)) / comparisons.
    """

    def ranking_case(case: dict):
        _, chosen, rejected, _ = right_ranking(case)
        loss, gradients = 0.0, []
        sizes = [len(group) for group in case["token_groups"]]
        all_pairs = sum(size * (size - 1) // 2 for size in sizes)
        for group, rewards in zip(case["token_groups"], case["rewards"]):
            gradients.append(np.zeros_like(rewards))
            for i, j in itertools.combinations(range(len(group)), 2):
                pair = {
                    "token_groups": [[group[i], group[j]]],
                    "rewards": [[rewards[i], rewards[j]]],
                }
                mean, _, _, (gradient,) = right_ranking(pair)
                weight = weigh(i, j, len(group), all_pairs, len(sizes))
                loss += weight * mean
                gradients[-1][[i, j]] += weight * gradient
        return loss, chosen, rejected, gradients

    return ranking_case


# --------------------------------------------------------------------------------------------------
# The traps


REGIONS = [
    Trap(
        "the whole row",
        "reads every column up to the longer end, what the texts share, too",
        "region",
        with_span(lambda start, stop, ends, L: (0, stop)),
    ),
    Trap(
        "to the end of L",
        "reads the padding behind both ends, too",
        "region",
        with_span(lambda start, stop, ends, L: (start, L)),
    ),
    Trap(
        "up to the shorter end",
        "leaves out the columns where one text has ended",
        "region",
        with_span(lambda start, stop, ends, L: (start, max(start + 1, min(ends)))),
    ),
    Trap(
        "one too early",
        "begins at the last token that the texts share",
        "region",
        with_span(lambda start, stop, ends, L: (max(0, start - 1), stop)),
    ),
    Trap(
        "one too late",
        "begins behind the first difference",
        "region",
        with_span(lambda start, stop, ends, L: (min(start + 1, stop - 1), stop)),
    ),
    Trap(
        "the last token alone",
        "reads the last column of the region alone",
        "region",
        with_span(lambda start, stop, ends, L: (stop - 1, stop)),
    ),
    Trap(
        "only where ids differ",
        "leaves out columns of the region where the ids are equal again",
        "region",
        where_ids_differ,
    ),
]
ENDS = [
    Trap(
        "the pad id over the mask",
        "finds ends by the pad id though there is a mask",
        "texts_of",
        lambda ids, mask, pad_id, leading: right_texts(ids, np.array(None), pad_id, leading),
    ),
    Trap(
        "padding found from the right",
        "ends a text at its last id that is not the pad id",
        "texts_of",
        with_texts(up_to_the_last_other_id),
    ),
    Trap(
        "as long as the mask's sum",
        "takes the number of ones in the mask for the end",
        "texts_of",
        with_texts(as_many_as_the_mask_has_ones),
    ),
    Trap(
        "leading pads unknown",
        "ignores num_padding_at_beginning: the first pad id ends the text",
        "texts_of",
        lambda ids, mask, pad_id, leading: right_texts(ids, mask, pad_id, 0),
    ),
    Trap(
        "score at the last column",
        "takes the reward in the row's last column for the end score",
        "results",
        last_column,
    ),
    Trap(
        "ids as float32",
        "compares ids as float32, which holds integers up to 2^24",
        "texts_of",
        lambda ids, *rest: right_texts(ids.astype(np.float32).astype(np.int64), *rest),
    ),
    Trap(
        "ids as int32",
        "compares ids as int32",
        "texts_of",
        lambda ids, *rest: right_texts(ids.astype(np.int32).astype(np.int64), *rest),
    ),
    Trap(
        "nothing at padding",
        "takes 0 for rewards at padding, in place of what the model gives there",
        "results",
        nothing_at_padding,
    ),
]
MEANS = [
    Trap(
        "a sum for the mean",
        "sums over the region of a pair",
        "results",
        with_weights(lambda lengths, identical: lengths / len(lengths)),
    ),
    Trap(
        "mean over all columns of the batch",
        "weighs a pair by the length of its region",
        "results",
        with_weights(lambda lengths, identical: lengths / lengths.sum()),
    ),
    Trap(
        "a sum over the pairs",
        "sums over the pairs",
        "results",
        with_weights(lambda lengths, identical: np.ones(len(lengths))),
    ),
    Trap(
        "identical pairs dropped",
        "leaves identical texts out of the mean",
        "results",
        with_weights(without_identical),
    ),
    Trap(
        "every pair of the batch weighs the same",
        "is the mean over the pairs of all comparisons together",
        "ranking_case",
        with_pairs(lambda i, j, K, pairs, count: 1 / pairs),
    ),
    Trap(
        "a sum over the pairs of a ranking",
        "sums over the pairs of a comparison",
        "ranking_case",
        with_pairs(lambda i, j, K, pairs, count: 1 / count),
    ),
    Trap(
        "neighbours of a ranking alone",
        "compares a response with the next one alone",
        "ranking_case",
        with_pairs(lambda i, j, K, pairs, count: (j == i + 1) / (K - 1) / count),
    ),
    Trap(
        "the best of a ranking against the rest",
        "compares the first response with the others alone",
        "ranking_case",
        with_pairs(lambda i, j, K, pairs, count: (i == 0) / (K - 1) / count),
    ),
]
TERMS = [
    Trap("chosen and rejected swapped", "prefers the rejected text", "term", swapped),
    Trap(
        "log of sigmoid as written",
        "computes log(1 / (1 + exp(-x))), which overflows",
        "term",
        with_log(lambda x: -np.log(1 / (1 + np.exp(-x))), lambda x: right_term(x, 0.0)[0]),
    ),
    Trap(
        "log of 1 - sigmoid as written",
        "computes log(1 - 1 / (1 + exp(-x))), which overflows",
        "term",
        with_log(lambda x: right_term(x, 1.0)[0], lambda x: -np.log(1 - 1 / (1 + np.exp(-x)))),
    ),
    Trap(
        "bfloat16 arithmetic",
        "subtracts rewards, and takes the logarithm, in bfloat16",
        "term",
        lambda x, target: tuple(map(bfloat16, right_term(bfloat16(x), target))),
    ),
    Trap(
        "no gradient",
        "is computed outside of automatic differentiation",
        "term",
        lambda x, target: (right_term(x, target)[0], np.zeros_like(x)),
    ),
    Trap(
        "nothing refused",
        "gives a number for a batch that breaks a rule",
        "loss_case",
        refuses_nothing,
    ),
]
OPTIONS = [
    Trap(
        "always the ends",
        "reads the two end scores whatever the options say",
        "results",
        with_options(lambda margins, targets, loss, center: (margins, targets, "end", center)),
    ),
    Trap(
        "never the ends",
        "reads the region whatever the options say",
        "results",
        with_options(
            lambda margins, targets, loss, center: (margins, targets, "divergent", center)
        ),
    ),
    Trap(
        "the margin added",
        "adds the margin to the difference",
        "results",
        with_options(lambda margins, targets, *rest: (-margins, targets, *rest)),
    ),
    Trap(
        "the margin ignored",
        "takes no margin off the difference",
        "results",
        with_options(lambda margins, targets, *rest: (0, targets, *rest)),
    ),
    Trap(
        "the centering ignored",
        "adds nothing for the end scores",
        "results",
        with_options(lambda margins, targets, loss, center: (margins, targets, loss, 0)),
    ),
    Trap(
        "the centering of each score apart",
        "adds the squares of the two end scores, and not the square of their sum",
        "results",
        squares_apart,
    ),
    Trap("the target ignored", "takes 1 for every target", "term", with_target(np.ones_like)),
    Trap(
        "the target reversed",
        "takes the target for the probability that the rejected text is preferred",
        "term",
        with_target(lambda target: 1 - target),
    ),
    Trap("the target rounded", "rounds targets to 0 and 1", "term", with_target(np.round)),
    Trap("the target as a weight", "multiplies the loss by the target", "term", combined(0, 0)),
    Trap(
        "the target on the mean difference",
        "takes the mean over the region first where there is a target",
        "results",
        mean_difference,
    ),
    Trap(
        "the target's second term subtracted",
        "subtracts (1 - p) log sigmoid(-d) from p log sigmoid(d)",
        "term",
        combined(0, -1),
    ),
    Trap(
        "the target's second term not reversed",
        "has log sigmoid(d) in both terms",
        "term",
        combined(1, 0),
    ),
    Trap(
        "the target halfway to 1",
        "takes (1 + p) / 2 for the target p",
        "term",
        with_target(lambda target: (1 + target) / 2),
    ),
]
TRAPS = [*REGIONS, *ENDS, *MEANS, *TERMS, *OPTIONS]


# --------------------------------------------------------------------------------------------------
# What they fail


def load_cases() -> dict[str, list[dict]]:
    cases = {}
    for file in ("loss.json", "rankings.json"):
        cases[file] = json.loads((VECTORS / file).read_text(encoding="utf-8"))["cases"]
    return cases


def compute(case: dict) -> dict:
    """Compute a case of either file with run_numpy.py as it is at the moment."""
    function = run_numpy.loss_case if "options" in case else run_numpy.ranking_case
    return dict(zip(NAMES, function(case)))


def failed_cases(cases: dict[str, list[dict]]) -> dict[str, list[str]]:
    """Return the names of the cases that run_numpy.py fails as it is at the moment, by file."""
    functions = {"loss.json": run_numpy.loss_case, "rankings.json": run_numpy.ranking_case}
    failed = {}
    for file, of_file in cases.items():
        wrong = [case["name"] for case in of_file if run_numpy.wrong(functions[file], case)]
        failed[file] = wrong
    return failed


@contextlib.contextmanager
def in_place(trap: Trap):
    """Put a trap into run_numpy.py for a while."""
    with mock.patch.object(run_numpy, trap.place, trap.wrong), np.errstate(all="ignore"):
        yield


def trap_table(cases: dict[str, list[dict]]) -> list[dict]:
    """Return for every trap what it does, the cases that it fails, the invariants that it breaks.

    `breaks`: by the name of the invariant the first case that shows it.
    """
    rows = []
    for trap in TRAPS:
        with in_place(trap):
            fails, breaks = failed_cases(cases), broken_by(compute, cases)
        rows.append({"name": trap.name, "what": trap.what, "fails": fails, "breaks": breaks})
    return rows


def page(rows: list[dict], count: int) -> str:
    """Write the table for readers: for every trap, the cases that few other traps fail."""
    failures = Counter()
    for row in rows:
        for names in row["fails"].values():
            failures.update(names)
    lines = [
        "# Known traps",
        "",
        f"Written by `python -m tools.traps`: {len(rows)} wrong losses, each of them the loss of",
        f"run_numpy.py with one step done wrong, and how many of {count} cases each one fails. The",
        "cases named are those that the fewest other traps fail; traps.json has all of them, and",
        "the case that shows each broken invariant.",
        "",
        "| trap | the loss ... | fails | for example | breaks |",
        "| --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        names = [name for of_file in row["fails"].values() for name in of_file]
        names.sort(key=lambda name: failures[name])  # stable: else in the order of the files
        examples = "; ".join(names[:3])
        broken = "; ".join(row["breaks"])
        lines.append(f"| {row['name']} | {row['what']} | {len(names)} | {examples} | {broken} |")
    return "\n".join(lines) + "\n"


def main():
    argparse.ArgumentParser(description=__doc__, allow_abbrev=False).parse_args()
    cases = load_cases()
    rows = trap_table(cases)
    write_json(VECTORS / "traps.json", {"traps": rows})
    text = page(rows, sum(map(len, cases.values())))
    (VECTORS / "traps.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
