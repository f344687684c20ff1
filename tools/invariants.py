"""Invariants: how loss, scores and gradient follow a change of the inputs, whatever the numbers.

They hold for every correct implementation of vectors/README.md on any batch, so they also test
cases that nobody computed. Each one is checked here on the cases of loss.json or rankings.json.
tools/check_vectors.py puts a foreign loss through them, tools/traps.py known wrong ones; expected
numbers are in vectors/.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from vectors.run_numpy import NAMES, OUTSIDE, texts_of

TOLERANCE = 1e-11  # relative above 1; some of them add up two or three results


class NotTaken(Exception):
    """Raised by `compute` where a loss does not take the options of a case."""


@dataclass
class Invariant:
    """A rule. `holds` gets `compute` and a case, and returns None where the rule says nothing.

    compute: turns a case, with lists for tensors, into a dictionary of the results in NAMES; the
        scores may be missing.
    """

    name: str
    rule: str
    holds: Callable
    file: str = "loss.json"


def broken_by(compute: Callable, cases: dict[str, list[dict]]) -> dict[str, str]:
    """Return the invariants that `compute` breaks, each with the name of the first case.

    cases: by the name of their file.
    """
    broken = {}
    for invariant in INVARIANTS:
        for case in cases.get(invariant.file, []):
            if invariant.name not in broken and not holds(invariant, compute, case):
                broken[invariant.name] = case["name"]
    return broken


def holds(invariant: Invariant, compute: Callable, case: dict) -> bool:
    """Check one invariant on one case; True where it says nothing about the case."""
    if case.get("error") is not None:
        return True
    case = case | {"rewards_dtype": "float64"}
    try:
        return invariant.holds(compute, case) in (True, None)
    except NotTaken:
        return True
    except Exception:  # a batch refused, or a breakdown: the changed case is as good as the other
        return False


# --------------------------------------------------------------------------------------------------
# Helpers


def close(got, expected) -> bool:
    got, expected = np.asarray(got, float), np.asarray(expected, float)
    if got.shape != expected.shape:
        return False
    return bool(np.all(abs(got - expected) <= TOLERANCE * np.maximum(1, abs(expected))))


def same(got: dict, expected: dict, names=NAMES) -> bool:
    """Compare the results that both have."""
    return all(
        close(got[name], expected[name]) for name in names if name in got and name in expected
    )


def scores_of(results: dict) -> dict:
    """Return the end scores as arrays, where there are any."""
    return {name: np.asarray(results[name]) for name in NAMES[1:3] if name in results}


def array(case: dict, name: str):
    return np.array(case[name])


def texts(case: dict):
    """Return (2B, L), the ids where a text is, OUTSIDE elsewhere."""
    ids, mask = array(case, "input_ids"), array(case, "attention_mask")
    return texts_of(ids, mask, case["pad_id"], case["num_padding_at_beginning"])


def halves(case: dict):
    rows = texts(case)
    return rows[: len(rows) // 2], rows[len(rows) // 2 :]


def has_identical(case: dict) -> bool:
    chosen, rejected = halves(case)
    return bool((chosen == rejected).all(1).any())


def option(case: dict, name: str, default=None):
    return case["options"].get(name, default)


def is_plain(case: dict, *but: str) -> bool:
    """Tell whether a case has the default objective, options named in `but` aside."""
    return not case["options"].keys() - {*but}


def with_columns(case: dict, ids, mask, rewards, front: bool) -> dict:
    """Add columns to every row, in front or behind."""

    def joined(old, new):
        new = np.broadcast_to(np.array(new), (len(old), len(new)))
        parts = [new, old] if front else [old, new]
        return np.concatenate(parts, axis=1).tolist()

    changed = case | {
        "input_ids": joined(array(case, "input_ids"), ids),
        "rewards": joined(array(case, "rewards"), rewards),
    }
    if case["attention_mask"] is not None:
        changed["attention_mask"] = joined(array(case, "attention_mask"), mask)
    return changed


def with_pairs(case: dict, pairs: list[int], swap: bool = False) -> dict:
    """Take these pairs of a batch, in this order; `swap`: the rejected text as the chosen one."""
    B = len(case["input_ids"]) // 2
    rows = [*pairs, *(B + pair for pair in pairs)]
    if swap:
        rows = [*(B + pair for pair in pairs), *pairs]
    changed = case | {"options": dict(case["options"])}
    for name in ("input_ids", "rewards", "attention_mask"):
        if case[name] is not None:
            changed[name] = [case[name][row] for row in rows]
    for name in ("margins", "targets"):
        if name in case["options"]:
            changed["options"][name] = [case["options"][name][pair] for pair in pairs]
    return changed


# --------------------------------------------------------------------------------------------------
# The rules


def more_padding(compute, case):
    pads = (array(case, "input_ids") == case["pad_id"]).sum(1)
    counts_as_text = (
        case["attention_mask"] is None and pads.min() < case["num_padding_at_beginning"]
    )
    if has_identical(case) or counts_as_text:
        return None
    pad_id, L = case["pad_id"], len(case["input_ids"][0])
    got = compute(with_columns(case, [pad_id] * 2, [0, 0], [7.25, -3.5], front=False))
    gradient = np.asarray(got["grad_rewards"])
    of_texts = got | {"grad_rewards": gradient[:, :L]}
    return same(of_texts, compute(case)) and not gradient[:, L:].any()


def more_prompt(compute, case):
    mask, highest = case["attention_mask"], max(array(case, "input_ids").max(), case["pad_id"])
    if mask is not None and not array(case, "attention_mask")[:, 0].all():
        return None
    ids = [highest + 1, highest + 2]
    got = compute(with_columns(case, ids, [1, 1], [7.25, -3.5], front=True))
    gradient = np.asarray(got["grad_rewards"])
    of_texts = got | {"grad_rewards": gradient[:, 2:]}
    return same(of_texts, compute(case)) and not gradient[:, :2].any()


def rewards_of_the_prompt(compute, case):
    if not is_plain(case, "margins", "targets"):
        return None
    ids, mask = array(case, "input_ids"), case["attention_mask"]
    differ = ids[: len(ids) // 2] != ids[len(ids) // 2 :]
    if mask is not None:
        mask = np.array(mask)
        differ |= mask[: len(ids) // 2] != mask[len(ids) // 2 :]
    chosen, rejected = halves(case)
    differ |= (chosen == OUTSIDE) != (rejected == OUTSIDE)
    differ[~differ.any(1), -1] = True  # identical texts: the last column is read
    shared = np.tile(differ.cumsum(1) == 0, (2, 1))
    rewards = np.where(shared, 7.25, array(case, "rewards"))
    return same(
        compute(case | {"rewards": rewards.tolist()}), compute(case), ("loss", "grad_rewards")
    )


def rewards_behind_both_ends(compute, case):
    if has_identical(case):
        return None
    chosen, rejected = halves(case)
    either = (chosen != OUTSIDE) | (rejected != OUTSIDE)
    behind = np.tile(either[:, ::-1].cumsum(1)[:, ::-1] == 0, (2, 1))
    rewards = np.where(behind, 7.25, array(case, "rewards"))
    return same(compute(case | {"rewards": rewards.tolist()}), compute(case))


def constant(compute, case):
    if option(case, "center_rewards_coefficient"):
        return None
    got = compute(case | {"rewards": (array(case, "rewards") + 8.0).tolist()})
    scores = {name: score - 8.0 for name, score in scores_of(got).items()}
    return same(got | scores, compute(case))


def order_of_pairs(compute, case):
    B = len(case["input_ids"]) // 2
    reversed_pairs = list(range(B))[::-1]
    got, expected = compute(with_pairs(case, reversed_pairs)), compute(case)
    rows = [*reversed_pairs, *(B + pair for pair in reversed_pairs)]
    gradient = np.asarray(expected["grad_rewards"])[rows]
    scores = {name: score[reversed_pairs] for name, score in scores_of(expected).items()}
    return same(got, expected | scores | {"grad_rewards": gradient})


def mean_of_pairs(compute, case):
    B = len(case["input_ids"]) // 2
    outs = [compute(with_pairs(case, [pair])) for pair in range(B)]
    gradients = [np.asarray(out["grad_rewards"]) / B for out in outs]
    got = {
        "loss": np.mean([float(out["loss"]) for out in outs]),
        "grad_rewards": [rows[0] for rows in gradients] + [rows[1] for rows in gradients],
    }
    return same(got, compute(case), got)


def batch_twice(compute, case):
    B = len(case["input_ids"]) // 2
    got, expected = compute(with_pairs(case, [*range(B), *range(B)])), compute(case)
    rows = [*range(B), *range(B), *range(B, 2 * B), *range(B, 2 * B)]
    gradient = np.asarray(expected["grad_rewards"])[rows] / 2
    return same(got, {"loss": expected["loss"], "grad_rewards": gradient})


def swap_with_targets(compute, case):
    if "margins" in case["options"]:
        return None
    B = len(case["input_ids"]) // 2
    targets = [1.0 - p for p in option(case, "targets", [1.0] * B)]
    swapped = with_pairs(case, list(range(B)), swap=True)
    swapped["options"]["targets"] = targets
    got, expected = compute(swapped), compute(case)
    gradient = np.asarray(expected["grad_rewards"])
    scores = dict(zip(NAMES[2:0:-1], scores_of(expected).values()))
    gradient = np.concatenate([gradient[B:], gradient[:B]])
    return same(got, expected | scores | {"grad_rewards": gradient})


def swap_without_targets(compute, case):
    """sigmoid(d) + sigmoid(-d) = 1, and every difference of a pair weighs 1 / (B columns)."""
    if not is_plain(case, "loss"):
        return None
    B = len(case["input_ids"]) // 2
    got, other = compute(case), compute(with_pairs(case, list(range(B)), swap=True))
    slopes = [np.asarray(out["grad_rewards"])[:B].sum(1) for out in (got, other)]
    return close(slopes[0] + slopes[1], np.full(B, -1 / B))


def rows_sum_to_zero(compute, case):
    if option(case, "center_rewards_coefficient"):
        return None
    gradient = np.asarray(compute(case)["grad_rewards"])
    B = len(gradient) // 2
    total = gradient[:B] + gradient[B:]
    if option(case, "loss") == "end":
        total = total.sum(1)
    return close(total, np.zeros_like(total))


def signs(compute, case):
    if not is_plain(case, "loss", "margins"):
        return None
    gradient = np.asarray(compute(case)["grad_rewards"])
    B = len(gradient) // 2
    return bool((gradient[:B] <= 0).all() and (gradient[B:] >= 0).all())


def is_moderate(case: dict) -> bool:
    """Tell whether no sigmoid is rounded to 0 or 1."""
    return abs(array(case, "rewards")).max() <= 8


def prefix(compute, case):
    if not is_plain(case) or not is_moderate(case):
        return None
    gradient, found = np.asarray(compute(case)["grad_rewards"]), None
    chosen_rows, rejected_rows = halves(case)
    for i, (chosen, rejected) in enumerate(zip(chosen_rows, rejected_rows)):
        both = (chosen != OUTSIDE) & (rejected != OUTSIDE)
        longer = (chosen != OUTSIDE) | (rejected != OUTSIDE)
        if (both != longer).any() and (chosen[both] == rejected[both]).all():
            nonzero = (gradient[i] != 0) & (gradient[len(chosen_rows) + i] != 0)
            found = found is not False and bool((nonzero == (longer & ~both)).all())
    return found


def padding_of_the_shorter(compute, case):
    if not is_plain(case) or not is_moderate(case):
        return None
    gradient = np.asarray(compute(case)["grad_rewards"])
    chosen, rejected = halves(case)
    one_alone = (chosen != OUTSIDE) != (rejected != OUTSIDE)
    return bool((gradient[: len(chosen)][one_alone] != 0).all())


def names_of_ids(compute, case):
    renamed = case | {
        "input_ids": (array(case, "input_ids") * 7 + 3).tolist(),
        "pad_id": case["pad_id"] * 7 + 3,
    }
    return same(compute(renamed), compute(case))


def mask_of_the_texts(compute, case):
    if case["attention_mask"] is not None:
        return None
    mask = (texts(case) != OUTSIDE).astype(int)
    return same(compute(case | {"attention_mask": mask.tolist()}), compute(case))


def ids_outside(compute, case):
    if case["attention_mask"] is None:
        return None
    ids = np.where(
        texts(case) == OUTSIDE, array(case, "input_ids").max() + 1, array(case, "input_ids")
    )
    return same(compute(case | {"input_ids": ids.tolist()}), compute(case))


def equal_rewards(compute, case):
    if not is_plain(case, "loss", "targets"):
        return None
    rewards = np.full_like(array(case, "rewards"), 0.75)
    return close(compute(case | {"rewards": rewards.tolist()})["loss"], np.log(2))


def linear_in_target(compute, case):
    if "targets" not in case["options"] or "margins" in case["options"]:
        return None
    if option(case, "center_rewards_coefficient"):
        return None
    B, outs = len(case["input_ids"]) // 2, []
    for target in (1.0, 0.0):
        options = case["options"] | {"targets": [target] * B}
        outs.append(np.asarray(compute(case | {"options": options})["grad_rewards"]))
    p = np.tile(np.array(case["options"]["targets"]), 2)[:, None]
    return close(compute(case)["grad_rewards"], p * outs[0] + (1 - p) * outs[1])


def defaults(compute, case):
    B = len(case["input_ids"]) // 2
    neutral = {"targets": [1.0] * B, "margins": [0.0] * B, "center_rewards_coefficient": 0.0}
    if option(case, "targets"):
        del neutral["margins"]
    return same(compute(case | {"options": neutral | case["options"]}), compute(case))


def margin_as_constant(compute, case):
    if not is_plain(case, "loss", "margins"):
        return None
    B = len(case["input_ids"]) // 2
    margins = np.array(option(case, "margins", [0.0] * B)) + 0.5
    with_margin = compute(case | {"options": case["options"] | {"margins": margins.tolist()}})
    rewards = array(case, "rewards").astype(float)
    rewards[B:] += 0.5
    other = compute(case | {"rewards": rewards.tolist()})
    return same(with_margin, other, ("loss", "grad_rewards"))


def mean_of_comparisons(compute, case):
    losses = []
    for group, rewards in zip(case["token_groups"], case["rewards"]):
        losses.append(compute(case | {"token_groups": [group], "rewards": [rewards]})["loss"])
    return close(np.mean(losses), compute(case)["loss"])


def mean_of_a_ranking(compute, case):
    for group, rewards in zip(case["token_groups"], case["rewards"]):
        losses = []
        for i in range(len(group)):
            for j in range(i + 1, len(group)):
                pair = {
                    "token_groups": [[group[i], group[j]]],
                    "rewards": [[rewards[i], rewards[j]]],
                }
                losses.append(compute(case | pair)["loss"])
        ranking = compute(case | {"token_groups": [group], "rewards": [rewards]})["loss"]
        if not close(np.mean(losses), ranking):
            return False
    return True


RANKINGS = "rankings.json"
INVARIANTS = [
    Invariant(
        "more padding",
        "Columns of padding behind all texts change nothing, whatever their rewards, and have a "
        "gradient of 0. Not with identical texts, whose region is the row's last column.",
        more_padding,
    ),
    Invariant(
        "more prompt",
        "Columns of equal tokens in front of all texts change nothing, whatever their rewards.",
        more_prompt,
    ),
    Invariant(
        "rewards of what is shared",
        "Rewards in front of the first difference change neither loss nor gradient.",
        rewards_of_the_prompt,
    ),
    Invariant(
        "rewards behind both ends",
        "Rewards behind both ends of a pair change nothing. Not with identical texts.",
        rewards_behind_both_ends,
    ),
    Invariant(
        "a constant",
        "A constant added to all rewards is added to the scores and changes neither loss nor "
        "gradient. Not with centering.",
        constant,
    ),
    Invariant(
        "order of pairs",
        "Pairs in another order have the same loss; scores and gradient follow the order.",
        order_of_pairs,
    ),
    Invariant(
        "mean of pairs",
        "The loss of a batch is the mean of the losses of its pairs, each as a batch of its own.",
        mean_of_pairs,
    ),
    Invariant(
        "batch twice",
        "A batch with every pair twice has the same loss and half of the gradient.",
        batch_twice,
    ),
    Invariant(
        "swap with targets",
        "Chosen and rejected swapped, and p turned into 1 - p, is the same loss. Not with margins.",
        swap_with_targets,
    ),
    Invariant(
        "swap turns d into -d",
        "A chosen row's gradient sum, and that after chosen and rejected are swapped, add up to "
        "-1 / B, as sigmoid(d) + sigmoid(-d) = 1. Without margins, targets and centering.",
        swap_without_targets,
    ),
    Invariant(
        "gradient rows sum to zero",
        "The two rows of a pair's gradient add up to 0 in every column; with the loss of the ends, "
        "over all columns. Not with centering.",
        rows_sum_to_zero,
    ),
    Invariant(
        "signs of the gradient",
        "No reward of a chosen text raises the loss, none of a rejected one lowers it. Without "
        "targets and centering.",
        signs,
    ),
    Invariant(
        "a prefix",
        "Where one text is the start of the other, the region is exactly what the longer one has "
        "beyond it.",
        prefix,
    ),
    Invariant(
        "padding of the shorter text",
        "In every column where one text has ended and the other has not, the gradient is not 0.",
        padding_of_the_shorter,
    ),
    Invariant(
        "names of ids",
        "Ids, and with them the pad id, replaced one to one change nothing.",
        names_of_ids,
    ),
    Invariant(
        "a mask of the texts",
        "A mask that says what the pad id says changes nothing.",
        mask_of_the_texts,
    ),
    Invariant(
        "ids outside of the texts",
        "With a mask, ids outside of the texts change nothing.",
        ids_outside,
    ),
    Invariant(
        "equal rewards",
        "If all rewards are equal, the loss is log 2, with any target. Without margins and "
        "centering.",
        equal_rewards,
    ),
    Invariant(
        "linear in the target",
        "The gradient at p is p times that at 1 plus 1 - p times that at 0. Not with margins, and "
        "without centering.",
        linear_in_target,
    ),
    Invariant(
        "neutral options",
        "Targets of 1, margins of 0 and a centering of 0 are the same as none.",
        defaults,
    ),
    Invariant(
        "a margin is a constant",
        "A margin is the same as a constant added to all rewards of the rejected texts, for loss "
        "and gradient.",
        margin_as_constant,
    ),
    Invariant(
        "mean of comparisons",
        "The loss is the mean of the losses of the comparisons, each as a batch of its own.",
        mean_of_comparisons,
        RANKINGS,
    ),
    Invariant(
        "mean of a ranking",
        "The loss of a ranking is the mean of the losses of its K (K - 1) / 2 pairs; so a ranking "
        "of two is a pair.",
        mean_of_a_ranking,
        RANKINGS,
    ),
]
