"""Check loss.json and rankings.json with numpy alone: loss, end scores and gradient, to 1e-12.

    python run_numpy.py [DIRECTORY]                      exit status 1 if any case is WRONG

Written from README.md, to be read or translated. Imports nothing of this repository."""

import json
import sys
from pathlib import Path

import numpy as np

OUTSIDE = -(2**62)  # in place of an id, where a row's column does not belong to its text
NAMES = "loss", "chosen_mean_scores", "rejected_mean_scores", "grad_rewards"


def texts_of(ids, mask, pad_id: int, leading: int):
    """Return (2B, L): the ids where a row's text is, OUTSIDE elsewhere. No mask: 0 dimensions."""
    pads, B = ids == pad_id, len(ids) // 2
    inside = pads.cumsum(1) <= leading
    left_padded = (inside.sum(1) == leading) & ~inside.all(1) & ~pads.all(1)
    if mask.ndim:
        inside = (mask.cumsum(1) > 0) & (mask[:, ::-1].cumsum(1)[:, ::-1] > 0)
    texts, begins = np.where(inside, ids, OUTSIDE), inside.argmax(1)
    differ_late = (texts[:B] == texts[B:]).all(1) & (ids[:B] != ids[B:]).any(1)
    assert inside.any(1).all(), "a row has no token"
    assert np.all(begins[:B] == begins[B:]), "the texts of a pair begin at different columns"
    assert mask.ndim or not any([*left_padded, *differ_late]), "a mask has to tell where texts are"
    return texts


def region(chosen, rejected):
    """Return (B, L): True from the first difference of two texts to the longer end."""
    differ = chosen != rejected
    either = (chosen != OUTSIDE) | (rejected != OUTSIDE)
    columns = (differ.cumsum(1) > 0) & (either[:, ::-1].cumsum(1)[:, ::-1] > 0)
    columns[~differ.any(1), -1] = True
    return columns


def term(x, target):
    """Return the loss of the differences x, and its slope; sigmoid(x) is e^-log(1 + e^-x)."""
    against, towards = np.logaddexp(0, -x), np.logaddexp(0, x)
    value = target * against + (1 - target) * towards
    return value, (1 - target) * np.exp(-against) - target * np.exp(-towards)


def results(texts, rewards, share, margins=0, targets=1, loss="divergent", center=0) -> tuple:
    """Compute B pairs: texts and rewards (2B, L), all chosen ones first. A pair weighs `share`."""
    B, L = len(texts) // 2, texts.shape[1]
    is_end = np.arange(L) == L - 1 - (texts != OUTSIDE)[:, ::-1].argmax(1)[:, None]
    scores, columns = rewards[is_end], region(texts[:B], texts[B:])
    read, place = rewards, 1
    if loss == "end":
        read, place, columns = scores[:, None], is_end, np.ones((B, 1))
    value, slope = term(read[:B] - read[B:] - margins, targets)
    weight, total = share * columns / columns.sum(1, keepdims=True), scores[:B] + scores[B:]
    mean = (weight * value).sum() + center * share * (total**2).sum()
    of_scores = is_end * np.tile(2 * center * share * total, 2)[:, None]
    gradient = place * np.concatenate([weight * slope, -weight * slope]) + of_scores
    return mean, scores[:B], scores[B:], gradient


def loss_case(case: dict) -> tuple:
    """Compute a case of loss.json. Raises AssertionError where the batch breaks a rule."""
    ids, rewards, mask = (np.array(case[key]) for key in ("input_ids", "rewards", "attention_mask"))
    assert ids.size > 0 and ids.ndim == 2 and len(ids) % 2 == 0, "ids are no pairs of rows"
    assert rewards.shape == ids.shape and mask.shape in ((), ids.shape), "shapes differ"
    assert case["input_ids_dtype"] == "int64" and case["rewards_dtype"] in ("float32", "float64")
    B = len(ids) // 2
    options = {"margins": [0] * B, "targets": [1] * B} | case["options"]
    margins, targets = np.vstack(options["margins"]), np.vstack(options["targets"])
    loss, center = options.get("loss", "divergent"), options.get("center_rewards_coefficient", 0)
    assert loss in ("divergent", "end") and len(margins) == len(targets) == B, "wrong options"
    possible = (targets >= 0) & (targets <= 1) & ((targets == 1) | (margins == 0))
    assert possible.all(), "a target is no probability, or has a margin beside it"
    texts = texts_of(ids, mask, case["pad_id"], case["num_padding_at_beginning"])
    return results(texts, rewards, 1 / B, margins, targets, loss, center)


def ranking_case(case: dict) -> tuple:
    """Compute the mean over comparisons of the mean over their pairs."""
    loss, chosen_scores, rejected_scores, gradients = 0.0, [], [], []
    for group, rewards in zip(case["token_groups"], map(np.array, case["rewards"])):
        texts = np.array([text + [OUTSIDE] * (len(rewards[0]) - len(text)) for text in group])
        rows = np.concatenate(np.triu_indices(len(group), 1))  # the better ones, then the worse
        share = 2 / len(rows) / len(case["rewards"])
        mean, better, worse, gradient = results(texts[rows], rewards[rows], share)
        loss += mean
        chosen_scores += [*better]
        rejected_scores += [*worse]
        gradients.append(np.eye(len(group))[rows].T @ gradient)
    return loss, chosen_scores, rejected_scores, gradients


def close(got, expected) -> bool:
    if isinstance(expected, float):
        return abs(got - expected) <= 1e-12 * max(1, abs(expected))
    return len(got) == len(expected) and all(map(close, got, expected))


def wrong(compute, case: dict) -> list[str]:
    """Return what is wrong with a case, an empty list if nothing is."""
    try:
        got = compute(case)
    except AssertionError as error:
        return [f"refused: {error}"] if "loss" in case else []
    return [name for name, x in zip(NAMES, got) if name not in case or not close(x, case[name])]


if __name__ == "__main__":
    directory, verdicts = Path([Path(__file__).parent, *sys.argv[1:]][-1]), []
    for file, compute in (("loss.json", loss_case), ("rankings.json", ranking_case)):
        for case in json.loads((directory / file).read_text())["cases"]:
            names = ", ".join(wrong(compute, case))
            verdicts.append(f"WRONG ({names})" if names else "ok")
            print(f"{file}  {verdicts[-1]:9}  {case['name']}")
    print(f"{len(verdicts)} cases, {len(verdicts) - verdicts.count('ok')} WRONG")
    sys.exit(set(verdicts) != {"ok"})
