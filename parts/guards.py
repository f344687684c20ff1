"""Checks of batches, row by row; the source of numbers that are not finite; text that is shown.

It computes no loss (rm.py) and ends no run (train.py).
"""

import math
import re
import unicodedata
from collections.abc import Callable, Sequence

import numpy as np
import torch

from parts.packed import PackedBatch

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
LONGEST_LINE = 3500  # characters of a message: with what stands in front of it below 4,000
LONGEST_NAME = 200  # characters of a name in a message
JOINERS = "\u200c\u200d"  # they join letters and emoji; beside ASCII they only hide
JOINS_NOTHING = re.compile(f"(?<![^\0-\x7f])[{JOINERS}]|[{JOINERS}](?![^\0-\x7f])")

# --------------------------------------------------------------------------------------------------
# Batches


def check_rows(
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None,
    pairs: bool = False,
    vocab_size: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Check ids (N, L) and mask (N, L); with `pairs`, that rows i and N/2 + i can be compared.

    Returns ids and mask (bool, or None) on the CPU, where the ends of texts are searched for.
    Raises ValueError that names the row and what is wrong with it.
    """
    check_ids(input_ids)
    ids = input_ids.cpu()
    if pairs and len(ids) % 2:
        raise ValueError(
            f"input_ids: {counted(len(ids), 'row')}; pairs need an even number, "
            "all chosen rows and then all rejected ones"
        )
    if vocab_size is not None:
        unknown = ((ids < 0) | (ids >= vocab_size)).nonzero()
        if len(unknown) > 0:
            row, column = unknown[0].tolist()
            raise ValueError(
                f"row {row}: id {int(ids[row, column])} at column {column}; "
                f"the model has ids 0 to {vocab_size - 1}"
            )
    if attention_mask is None:
        return ids, None
    check_mask(attention_mask, ids.shape)
    mask = attention_mask.cpu()
    others = ((mask != 0) & (mask != 1)).nonzero()  # NaN is neither
    if len(others) > 0:  # masks exist that are added to attention, 0 where this one is 1
        row, column = others[0].tolist()
        raise ValueError(
            f"attention_mask: row {row} has {mask[row, column].item()} at column {column}; "
            "expected 1 on text and 0 elsewhere"
        )
    mask = mask != 0
    empty = (~mask.any(dim=1)).nonzero().flatten().tolist()
    if empty:
        raise ValueError(
            f"row {empty[0]} has no token: its attention_mask is 0 everywhere; leave the row out"
        )
    if pairs:
        starts = mask.int().argmax(dim=1).tolist()
        check_starts(starts)
    return ids, mask


def check_ids(input_ids: torch.Tensor):
    """Raise ValueError unless ids are integers of shape (N, L). Their values are not looked at."""
    is_known = torch.is_tensor(input_ids) and input_ids.dtype in (torch.int64, torch.int32)
    if not is_known or input_ids.dim() != 2 or 0 in input_ids.shape:
        raise ValueError(
            "input_ids: expected integers, int64, of shape (rows, length), "
            f"found {kind_of(input_ids)}"
        )


def check_mask(attention_mask: torch.Tensor, shape: torch.Size):
    """Raise ValueError unless a mask has the shape of the ids. Its values are not looked at."""
    if not torch.is_tensor(attention_mask) or attention_mask.shape != shape:
        raise ValueError(
            f"attention_mask: expected the shape of input_ids, {list(shape)}, "
            f"found {kind_of(attention_mask)}"
        )


def kind_of(value) -> str:
    """Describe what was found in place of a tensor, or of one of another dtype or shape."""
    if torch.is_tensor(value):
        return f"{value.dtype} of shape {list(value.shape)}"
    return type(value).__name__


def check_starts(starts: list[int]):
    """Raise ValueError where the two rows of a pair begin at different columns. starts: (2B,)."""
    B = len(starts) // 2
    for i, (chosen, rejected) in enumerate(zip(starts[:B], starts[B:])):
        if chosen != rejected:
            raise ValueError(
                f"pair {i}: row {i} begins at column {chosen}, row {B + i} at column {rejected} "
                "(attention_mask): rows padded on the left by different amounts cannot be "
                "compared; pad them on the right"
            )


def check_rewards(rewards: torch.Tensor, shape: torch.Size):
    """Raise ValueError unless rewards are float32 or float64 of this shape."""
    is_wide = torch.is_tensor(rewards) and rewards.dtype in (torch.float32, torch.float64)
    if not is_wide or rewards.shape != shape:
        raise ValueError(
            f"rewards: expected float32 or float64 of shape {list(shape)}, as input_ids; "
            f"found {kind_of(rewards)}"
        )


def check_loss(loss: str, known: tuple[str, ...], center_rewards_coefficient: float):
    """Raise ValueError for an objective that is not known, or a weight that is no number from 0."""
    if loss not in known:
        raise ValueError(f"loss: found {loss!r}; expected {' or '.join(known)}")
    found = center_rewards_coefficient
    is_number = hasattr(found, "__float__")  # a tensor and numpy's numbers are, too
    if not is_number or not 0 <= found < math.inf:  # NaN is not
        raise ValueError(
            f"center_rewards_coefficient: found {found!r}; expected a finite number from 0"
        )


def check_padding(pad_id: int, num_padding_at_beginning: int, source: str = ""):
    """Raise ValueError unless both are whole numbers, and the second is not below 0.

    source: begins the message.
    """
    numbers = {"pad_id": pad_id, "num_padding_at_beginning": num_padding_at_beginning}
    for name, number in numbers.items():
        # Tensors and numpy's integers are whole numbers, too.
        is_whole = hasattr(number, "__index__") and not isinstance(number, bool)
        if is_whole and (name == "pad_id" or number >= 0):
            continue
        expected = "a token id" if name == "pad_id" else "a whole number from 0"
        raise ValueError(f"{source}{name}: found {number!r}; expected {expected}")


def check_margins(margins: Sequence[float] | None, count: int) -> list[float]:
    """Return the margin of every pair, or packed comparison: 0 where none are given.

    Raises ValueError that names the pair whose margin is not finite, or a wrong number of margins.
    """
    if margins is None:
        return [0.0] * count
    expected = f"a finite number for each of {count}"
    margins = as_floats("margins", margins, count, expected)
    for i, margin in enumerate(margins):
        if not math.isfinite(margin):
            raise ValueError(f"margins: found {margin} for pair {i}; expected {expected}")
    return margins


def check_targets(
    targets: Sequence[float] | None, margins: list[float], token_groups: list | None = None
) -> list[float]:
    """Return the target of every pair, or packed comparison: 1 where none are given.

    margins: from `check_margins`. token_groups: the texts of packed comparisons, (B,).
    Raises ValueError for a wrong number of targets, or one that names the pair whose target is no
    number from 0 to 1, or is not 1 beside a margin or in a ranking of more than two.
    """
    count = len(margins)
    if targets is None:
        return [1.0] * count
    expected = f"a number from 0 to 1 for each of {count}"
    targets = as_floats("targets", targets, count, expected)
    for i, (target, margin) in enumerate(zip(targets, margins)):
        if not 0 <= target <= 1:  # NaN is not
            raise ValueError(f"targets: found {target} for pair {i}; expected {expected}")
        if target == 1:
            continue
        if margin != 0:
            raise ValueError(
                f"targets: found {target} for pair {i}, which has the margin {margin}; a margin "
                "needs target 1, and another target needs margin 0"
            )
        if token_groups is not None:
            check_ranking(i, len(token_groups[i]), target)
    return targets


def as_floats(
    name: str, numbers: Sequence[float] | torch.Tensor, count: int, expected: str
) -> list[float]:
    """Return numbers, a tensor, an array or a list of them, as floats.

    Raises ValueError that begins with their name where they are not as many numbers, in one row.
    expected: ends the message.
    """
    if torch.is_tensor(numbers):
        numbers = numbers.tolist()
    try:
        numbers = np.asarray(numbers)
    except ValueError:  # lists of several lengths
        numbers = np.asarray(numbers, dtype=object)
    found = counted(numbers.size, "number")
    if numbers.dtype.kind not in "buif":
        found = f"values of dtype {numbers.dtype}"
    elif numbers.ndim != 1:
        found += f" of shape {list(numbers.shape)}"
    elif len(numbers) == count:
        return numbers.astype(np.float64).tolist()
    raise ValueError(f"{name}: found {found}; expected {expected}")


def check_ranking(number: int, responses: int, target: float):
    """Raise ValueError that names the comparison: a ranking of more than two with a target."""
    if responses > 2 and target != 1:
        raise ValueError(
            f"targets: found {target} for comparison {number}, a ranking of {responses}; a target "
            "is of two responses, and a ranking has target 1"
        )


def check_packed(batch: PackedBatch, longest_tail: int | None):
    """Raise ValueError for a batch without the padding, or without the pairs, that a loss reads."""
    is_enough = batch.longest_tail is None
    if longest_tail is not None and not is_enough:
        # Tails of one token stand for longer ones; tails of two cannot.
        is_enough = longest_tail <= batch.longest_tail <= 1
    has_pairs = min(map(len, batch.token_groups)) >= 2
    if not (has_pairs and is_enough):
        raise ValueError(
            f"the batch was packed for scores alone (longest_tail {batch.longest_tail}, "
            f"min_responses): this loss needs longest_tail {longest_tail}, and pairs; "
            "`RewardModel.pack` makes such batches"
        )


def check_packed_ids(batch: PackedBatch, vocab_size: int):
    """Raise ValueError that names the comparison and response with an id the model lacks."""
    has_padding = any(batch.tails)
    if has_padding and not 0 <= batch.pad_id < vocab_size:
        raise ValueError(f"pad_id {batch.pad_id}; the model has ids 0 to {vocab_size - 1}")
    for i, group in enumerate(batch.token_groups):
        for j, text in enumerate(group):
            if min(text) < 0 or max(text) >= vocab_size:
                unknown = [token for token in text if not 0 <= token < vocab_size]
                raise ValueError(
                    f"comparison {i}, response {j}: id {unknown[0]}; "
                    f"the model has ids 0 to {vocab_size - 1}"
                )


# --------------------------------------------------------------------------------------------------
# Numbers that are not finite


def non_finite_rows(
    batch: list, micro_batches: list[list], losses: list, loss_of: Callable, process
) -> list[str]:
    """Name for each rank the rows whose loss is not finite, as "rank 0: file:line, file:line".

    batch: the comparisons of a step, the same on all ranks, each with its place in `where`.
    micro_batches, losses: comparisons that this rank computed on, and the loss of each micro-batch.
    loss_of: computes the loss of a list of comparisons. It is called for each suspect alone, by all
        ranks, because in a packed batch NaN times an attention of 0 spoils other rows, too.
    """
    number = {id(comparison): i for i, comparison in enumerate(batch)}
    own = []
    for comparisons, loss in zip(micro_batches, losses):
        if not math.isfinite(loss):
            own += [number[id(comparison)] for comparison in comparisons]
    guilty = []
    for i in sorted(process.join(own)[0]):
        if not math.isfinite(loss_of([batch[i]])):
            guilty.append(i)
    rows = []
    for i in sorted(own):
        if i in guilty or not guilty:  # where no suspect fails alone, all of them are named
            rows.append(batch[i].where)
    named = []
    if rows:
        named.append(f"rank {process.rank}: {listed(rows)}")
    return process.join(named)[0]


def non_finite(tensors: dict[str, torch.Tensor]) -> list[str]:
    """List the names of tensors that hold a number which is not finite."""
    names = []
    for name, tensor in tensors.items():
        if tensor.dtype in FLOATS and tensor.numel():
            # One NaN makes both extremes NaN. isfinite() would take memory, and ten times as long.
            low, high = tensor.detach().aminmax()
            if not (math.isfinite(low) and math.isfinite(high)):
                names.append(name)
    return names


def check_weights(weights: dict[str, torch.Tensor], source):
    """Raise ValueError that names a weight which holds a number that is not finite.

    source: the checkpoint, as an error names it.
    """
    names = non_finite(weights)
    if names:
        name = one_line(names[0], LONGEST_NAME)
        raise ValueError(
            f"{source}: weight {name} holds NaN or infinity, as training leaves it that has "
            "diverged; take an earlier checkpoint"
        )


def check_scores(scores: list[float], where: str):
    """Raise ValueError unless all end scores of a row are finite. where: names the row."""
    for i, score in enumerate(scores):
        if not math.isfinite(score):
            raise ValueError(
                f"{where}: the score of response {i} is {score:g}; the model's numbers overflow "
                "there, so take another checkpoint"
            )


def check_evaluation(numbers: dict[str, list], left: str):
    """Raise ValueError where the last evaluation is not finite.

    numbers: lists by name, with the `loss` and the scores. left: says what is left of the run.
    """
    for name in ("loss", "chosen", "rejected"):
        values = numbers[name]
        spoiled = [value for value in values if not math.isfinite(value)]
        if spoiled:
            raise ValueError(
                f"the last evaluation is not finite ({name}: {len(spoiled)} of {len(values)} "
                f"numbers, such as {spoiled[0]:g}); {left}. A smaller --learning_rate may help"
            )


def listed(names: list[str], most: int = 8) -> str:
    """Join the first names with commas, and count the others."""
    text = ", ".join(names[:most])
    if len(names) > most:
        text += f" and {len(names) - most} more"
    return text


def non_finite_message(
    loss: float, grad_norm: float, rows: list[str], batch: list, streak: int
) -> str:
    """Say which number of a step is not finite, and where it comes from.

    rows: from `non_finite_rows`. batch: the comparisons of the step. streak: the number of such
    steps in a row, with this one.
    """
    if rows:
        text = f"the loss is {loss:g} ({'; '.join(rows)})"
    else:
        names = listed([comparison.where for comparison in batch], most=1)
        text = f"the gradient norm is {grad_norm:g}, that of a finite loss (rows: {names})"
    if streak > 1:
        before = counted(streak - 1, "skipped step")
        text += f", after {before} whose numbers were not finite either"
    return text


# --------------------------------------------------------------------------------------------------
# Text that is shown: counts in English, and text from outside


def counted(n: int, noun: str, plural: str = "") -> str:
    """Write how many things there are: "1 pair", "4,000 pairs".

    plural: the noun's, where it is not the noun with an s.
    """
    if n == 1:
        return f"1 {noun}"
    return f"{n:,} {plural or noun + 's'}"


def visible(text: str) -> str:
    """Replace invisible characters, and characters that act on a page or a terminal, by signs.

    Control characters, also those of the writing direction, become signs or names: ⟨U+202E⟩.
    Newlines and tabs stay, behind a sign. A message on one line takes `one_line`.
    """
    if text.isprintable():
        return text
    return "".join(map(visible_character, text))


def visible_character(character: str) -> str:
    """Return a character, or the sign that `visible` shows in its place."""
    if character == "\n":
        return "↵\n"
    if character == "\t":
        return "⇥\t"
    if character < " ":
        return chr(0x2400 + ord(character))
    if character == "\x7f":
        return "␡"
    if character in JOINERS:
        return character
    if unicodedata.category(character) in ("Cc", "Cf", "Cs", "Zl", "Zp"):
        return f"⟨U+{ord(character):04X}⟩"
    return character


def one_line(text, most: int = LONGEST_LINE) -> str:
    """Show text from outside in a message: visible, without newlines, at most `most` characters.

    The middle of longer text is left out: its start and its end say more. text: of any type.
    """
    text = str(text)
    if not text.isprintable():
        text = JOINS_NOTHING.sub(lambda found: f"⟨U+{ord(found[0]):04X}⟩", text)
        text = visible(text).replace("\n", "").replace("\t", "")
    if len(text) <= most:
        return text
    left_out = f" … {len(text):,} characters in all … "
    kept = max(2, most - len(left_out))
    return text[: kept - kept // 3] + left_out + text[-(kept // 3) :]


def shown(name) -> str:
    """Return a name from outside in quotes, as `one_line` shows it, cut to 60 characters."""
    text = one_line(str(name)[:60])
    return f'"{text}…"' if len(str(name)) > 60 else f'"{text}"'
