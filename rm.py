"""Pairwise reward-model training: the loss, and the model it trains. The algorithm of DeepSpeed-Chat's step 2.

    1. A batch is the chosen sequences followed by the rejected ones: (2B, L) token ids.
    2. A transformer and a value head give a reward for every token: (2B, L).
    3. Split in half: row i is the chosen, row B + i the rejected response of pair i.
    4. A pair diverges at the first position where its token ids differ, or where one text has ended.
    5. Its loss is the mean of -logsigmoid(r_chosen[t] - r_rejected[t]) from there to the LONGER of the two ends.
    6. The loss is the mean over the pairs. The score of a sequence is its reward at its last token.

`pairwise_loss` is steps 3 to 6, `RewardModel.forward` all six.

    python rm.py CHECKPOINT FILE.jsonl [--out scores.jsonl]

scores the responses in FILE: comparisons in any format of data.py, or rows {"prompt": ..., "response": ...}. With --show
or --html page.html it shows them instead, token by token, and how their loss comes about.

    python rm.py convert CHECKPOINT DIRECTORY --layout hf

writes a trained model in another layout: hf for transformers, deepspeed-chat for its step 3. Both programs are in
tools/score.py.
"""

import itertools
import json
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from model import GPT
from parts import huggingface
from parts.flags import hand_over

# ----------------------------------------------------------------------------------------------------------------------
# The loss


LOSSES = ("divergent", "end")


def pair_loss(
    chosen_rewards: torch.Tensor,
    rejected_rewards: torch.Tensor,
    ends: tuple[torch.Tensor, torch.Tensor] | None = None,
    margin: float | torch.Tensor = 0.0,
    loss: str = "divergent",
    center_rewards_coefficient: float = 0.0,
) -> torch.Tensor:
    """The loss of one pair: mean over t of -log sigmoid(r_chosen[t] - r_rejected[t]).

    Both (T,), T >= 1, the rewards of the divergent region, float32 or float64. Returns a scalar. It is the negative log
    likelihood of the preference under Bradley & Terry (1952), as in Ouyang et al. (2022), eq. 1, at every token.

    Variants of it, all off by default; the last two read `ends`, the rewards at the two last tokens, scalars:
    margin: by how much the chosen one is to be better, taken off the difference (Touvron et al. 2023, Llama 2, eq. 2).
    loss: "end" reads the ends alone (Ouyang et al. 2022, and TRL), in place of the region.
    center_rewards_coefficient: times the squared sum of the ends, which is added (Eisenstein et al. 2023, and TRL): rewards
    keep near 0, which differences of rewards alone leave open.
    Raises ValueError for another `loss`, and where `ends` are needed and not given.
    """
    if loss not in LOSSES:
        raise ValueError(f"loss: found {loss!r}; expected {' or '.join(LOSSES)}")
    if ends is None and (loss == "end" or center_rewards_coefficient):
        raise ValueError(
            "ends: found None; expected the rewards at the two last tokens, which loss 'end' and centering read"
        )
    if loss == "end":
        chosen_rewards, rejected_rewards = ends
    term = -F.logsigmoid(chosen_rewards - rejected_rewards - margin).mean()
    return (
        term + center_rewards_coefficient * sum(ends) ** 2 if center_rewards_coefficient else term
    )


def pairwise_loss(
    input_ids: torch.Tensor,
    rewards: torch.Tensor,
    pad_id: int,
    num_padding_at_beginning: int = 0,
    attention_mask: torch.Tensor | None = None,
    loss: str = "divergent",
    margins: Sequence[float] | None = None,
    center_rewards_coefficient: float = 0.0,
) -> dict[str, torch.Tensor]:
    """The loss of a batch of pairs, one pair after the other (DeepSpeed-Chat, step 2, `RewardModel.forward`).

    input_ids: (2B, L) int64, rows 0..B-1 chosen, rows B..2B-1 rejected, right-padded with `pad_id`.
    rewards: (2B, L) float32 or float64.
    num_padding_at_beginning: how many leading `pad_id` belong to the text (OPT: 1, its bos is DeepSpeed-Chat's pad).
    attention_mask: (2B, L), 1 on text. It decides where texts end; without it, the pad id does.
    loss, margins (B,), center_rewards_coefficient: variants of the pair's term, which `pair_loss` explains.

    Returns `loss`, a scalar: the mean over pairs of the mean over the divergent region; `chosen_mean_scores` and
    `rejected_mean_scores`, (B,): the rewards at the last tokens ("mean" is DeepSpeed-Chat's name for these).
    Raises ValueError where a batch breaks these rules, or where without a mask the ends cannot be known.
    """
    ids, mask = check_batch(input_ids, pad_id, attention_mask, pairs=True)
    if rewards.shape != ids.shape or rewards.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"rewards: expected float32 or float64 of shape {list(ids.shape)}, that of input_ids; "
            f"found {rewards.dtype} of shape {list(rewards.shape)}"
        )
    ends = text_ends(ids, pad_id, num_padding_at_beginning, mask)
    if mask is not None:  # ids before a text and after it are not compared
        ids = ids.masked_fill((mask.cumsum(1) == 0) | (mask.flip(1).cumsum(1).flip(1) == 0), pad_id)
    rows, B = ids.tolist(), len(ids) // 2
    margins = check_margins(margins, B)
    losses, chosen_scores, rejected_scores = [], [], []
    for chosen, rejected in zip(range(B), range(B, 2 * B)):  # 3. split in half
        start, stop = divergent_region(
            rows[chosen][: ends[chosen]], rows[rejected][: ends[rejected]]
        )  # 4. find the divergence
        if (
            start == stop
        ):  # identical texts: equal rewards, so log 2 (less a margin) and no gradient
            if rows[chosen] != rows[rejected]:  # after both ends, so by the pad id alone
                raise ValueError(
                    f"pair {chosen} (rows {chosen} and {rejected}): the pad id at column {stop} ends both texts before "
                    "they first differ; pass an attention_mask, which tells where texts end"
                )
            start, stop = len(rows[chosen]) - 1, len(rows[chosen])
        scores = rewards[chosen, ends[chosen] - 1], rewards[rejected, ends[rejected] - 1]
        losses.append(
            pair_loss(
                rewards[chosen, start:stop],
                rewards[rejected, start:stop],  # 5. mean over the region
                scores,
                margins[chosen],
                loss,
                center_rewards_coefficient,
            )
        )
        chosen_scores.append(scores[0])
        rejected_scores.append(scores[1])
    return {
        "loss": torch.stack(losses).mean(),  # 6. mean over the pairs
        "chosen_mean_scores": torch.stack(chosen_scores),
        "rejected_mean_scores": torch.stack(rejected_scores),
    }


def divergent_region(chosen: list[int], rejected: list[int]) -> tuple[int, int]:
    """(start, stop) of the positions that the loss of two texts, given as token ids, reads.

    The texts diverge where their ids first differ, or where exactly one of them has ended; the region reaches from
    there to the longer end, so the rewards that the shorter text gets at its padding count too. That of identical texts
    is empty.
    """
    shorter, longer = sorted((len(chosen), len(rejected)))
    return next((t for t, (a, b) in enumerate(zip(chosen, rejected)) if a != b), shorter), longer


def text_ends(ids, pad_id: int, num_padding_at_beginning: int, mask) -> list[int]:
    """For every row the position after its last token. `ids`, `mask`: (N, L), on the CPU.

    With a mask that is after its last 1. Without, it is the position of the first pad id, not counting the first
    `num_padding_at_beginning` of them (DeepSpeed-Chat's rule), or L where there is none.
    """
    N, L = ids.shape
    if mask is not None:
        return [int(row.nonzero()[-1]) + 1 for row in mask]
    ends = []
    for row in range(N):
        pads = (ids[row] == pad_id).nonzero().flatten().tolist()
        end = pads[num_padding_at_beginning] if len(pads) > num_padding_at_beginning else L
        if end == num_padding_at_beginning < L and len(pads) < L:
            raise ValueError(
                f"row {row} is padded on the left: it begins with more than the {num_padding_at_beginning} pad ids ({pad_id}) that "
                "belong to the text (num_padding_at_beginning); pad it on the right, or pass an attention_mask, which "
                "tells where texts end"
            )
        if end == 0:
            raise ValueError(
                f"row {row} has no token: every id is the pad id {pad_id}; leave the pair out"
            )
        ends.append(end)
    return ends


def check_margins(margins, B: int) -> list[float]:
    """Of every pair, or packed comparison, its margin, 0 where none are given. Raises ValueError that names it."""
    margins = (
        [0.0] * B
        if margins is None
        else torch.as_tensor(margins, dtype=torch.float64).flatten().tolist()
    )
    bad = [i for i, margin in enumerate(margins) if not math.isfinite(margin)]
    if bad or len(margins) != B:
        raise ValueError(
            f"margins: found {f'{margins[bad[0]]} for pair {bad[0]}' if bad else f'{len(margins)} numbers'}; expected a finite "
            f"number for each of {B}"
        )
    return margins


def check_batch(input_ids, pad_id, attention_mask, pairs=False, vocab_size=None):
    """Raise ValueError for a batch of wrong shape or content. Returns ids and mask on the CPU, where ends are searched for."""
    if input_ids.dim() != 2 or input_ids.is_floating_point() or 0 in input_ids.shape:
        raise ValueError(
            f"input_ids: expected integers of shape (rows, length), found {input_ids.dtype} of shape "
            f"{list(input_ids.shape)}"
        )
    ids, mask, B = input_ids.cpu(), None, len(input_ids) // 2
    if pairs and len(ids) % 2:
        raise ValueError(
            f"input_ids: {len(ids)} rows; pairs need an even number, all chosen rows and then all rejected ones"
        )
    if vocab_size is not None and ((ids < 0) | (ids >= vocab_size)).any():
        row, column = ((ids < 0) | (ids >= vocab_size)).nonzero()[0].tolist()
        raise ValueError(
            f"row {row}: id {int(ids[row, column])} at column {column}; the model has ids 0 to {vocab_size - 1}"
        )
    if attention_mask is not None:
        mask = attention_mask.cpu() != 0
        if mask.shape != ids.shape:
            raise ValueError(
                f"attention_mask: shape {list(mask.shape)}; expected that of input_ids, {list(ids.shape)}"
            )
        starts = [int(row.nonzero()[0]) if row.any() else None for row in mask]
        if None in starts:
            raise ValueError(
                f"row {starts.index(None)} has no token: its attention_mask is 0 everywhere; leave the row out"
            )
        for i in range(B if pairs else 0):
            if starts[i] != starts[B + i]:
                raise ValueError(
                    f"pair {i}: row {i} begins at column {starts[i]}, row {B + i} at column {starts[B + i]} (attention_mask): "
                    "rows padded on the left by different amounts cannot be compared; pad them on the right"
                )
    return ids, mask


# ----------------------------------------------------------------------------------------------------------------------
# The model


class RewardModel(nn.Module):
    """A GPT backbone and a value head: a reward for every token.

    pad_id: fills rows up; where no attention_mask is given, it also tells where texts end.
    num_padding_at_beginning: how many leading `pad_id` belong to a text (OPT: 1).
    loss, center_rewards_coefficient: the objective, as `pair_loss` explains it.
    reward_bias: is added to every reward, which no difference shows (parts/normalize.py).
    has_fresh_head: nothing has trained the value head.

    All of these are attributes, and no part of the state_dict.
    """

    def __init__(
        self,
        backbone: GPT,
        pad_id: int,
        num_padding_at_beginning: int = 0,
        loss: str = "divergent",
        center_rewards_coefficient: float = 0.0,
        reward_bias: float = 0.0,
        has_fresh_head: bool = True,
    ):
        super().__init__()
        self.backbone = backbone
        self.v_head = nn.Linear(backbone.config.embed_dim, 1, bias=False)
        self.pad_id = pad_id
        self.num_padding_at_beginning = num_padding_at_beginning
        self.loss = loss
        self.center_rewards_coefficient = center_rewards_coefficient
        self.reward_bias = reward_bias
        self.has_fresh_head = has_fresh_head

    @property
    def objective(self) -> dict:
        """The keywords of `pair_loss` that say what is minimized."""
        return {"loss": self.loss, "center_rewards_coefficient": self.center_rewards_coefficient}

    @property
    def longest_tail(self) -> int | None:
        """How much of the padding in a packed batch (`data.pack`) the loss needs; None: all. OPT's padding has one position."""
        if self.objective.get("loss") == "end":
            return 0
        return 1 if self.backbone.config.position_offset else None

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        margins: Sequence[float] | None = None,
    ) -> dict[str, torch.Tensor]:
        """Rewards and loss of a batch of pairs. Takes, returns and raises what `pairwise_loss` does.

        attention_mask: (2B, L), what is attended to and where texts end; without one, both follow from the pad id.
        margins: (B,). A `data.PackedBatch`, which has its own, in place of input_ids goes to `forward_packed`: through here, so
        that the hooks of DistributedDataParallel run.
        """
        if not torch.is_tensor(input_ids):
            if attention_mask is not None or margins is not None:
                raise ValueError(
                    "attention_mask or margins: found beside a packed batch, which has lengths of its own; give margins to data.pack"
                )
            return self.forward_packed(input_ids)
        ids, mask = check_batch(
            input_ids,
            self.pad_id,
            attention_mask,
            pairs=True,
            vocab_size=self.backbone.config.vocab_size,
        )
        attended = attention_mask
        if mask is None:
            ends = torch.tensor(
                text_ends(ids, self.pad_id, self.num_padding_at_beginning, None),
                device=input_ids.device,
            )
            attended = torch.arange(ids.shape[1], device=input_ids.device) < ends[:, None]
        rewards = self.token_rewards(input_ids, attended)
        return pairwise_loss(
            input_ids,
            rewards,
            self.pad_id,
            self.num_padding_at_beginning,
            attention_mask,
            margins=margins,
            **self.objective,
        )

    def forward_packed(self, batch) -> dict[str, torch.Tensor]:
        """Rewards and loss of a `data.PackedBatch`: the numbers of `forward`, without padding and with each trunk computed once.

        The loss of a ranking of K responses, best first, is the mean over its K(K-1)/2 pairs (i, j), i < j; the loss of the
        batch is the mean over its comparisons (Ouyang et al. 2022, eq. 1 and section 3.5). The scores are those of the pairs.
        """
        needed = math.inf if self.longest_tail is None else self.longest_tail
        if (
            batch.longest_tail is not None
            and batch.longest_tail < needed
            or min(map(len, batch.token_groups)) < 2
        ):
            raise ValueError(
                f"the batch was packed for scores alone (longest_tail {batch.longest_tail}, min_responses): this loss needs "
                f"longest_tail {self.longest_tail}, and pairs"
            )
        losses, chosen_scores, rejected_scores = [], [], []
        margins = check_margins(batch.margins, len(batch.token_groups))
        for texts, trunk, rewards, margin in zip(
            batch.token_groups, batch.trunks, self.packed_rewards(batch), margins
        ):
            pair_losses = []
            for i, j in itertools.combinations(range(len(texts)), 2):
                start, stop = divergent_region(texts[i], texts[j])
                region = slice(
                    min(start, stop - 1) - trunk, stop - trunk
                )  # of identical texts the last token
                scores = (
                    rewards[i][len(texts[i]) - 1 - trunk],
                    rewards[j][len(texts[j]) - 1 - trunk],
                )
                pair_losses.append(
                    pair_loss(
                        rewards[i][region], rewards[j][region], scores, margin, **self.objective
                    )
                )
                chosen_scores.append(scores[0])
                rejected_scores.append(scores[1])
            losses.append(torch.stack(pair_losses).mean())
        return {
            "loss": torch.stack(losses).mean(),
            "chosen_mean_scores": torch.stack(chosen_scores),
            "rejected_mean_scores": torch.stack(rejected_scores),
        }

    def packed_rewards(self, batch) -> list[list[torch.Tensor]]:
        """Of every comparison of a `data.PackedBatch`, the rewards after its trunk: one tensor for each response."""
        vocab_size = self.backbone.config.vocab_size
        if any(batch.tails) and not 0 <= batch.pad_id < vocab_size:
            raise ValueError(f"pad_id {batch.pad_id}; the model has ids 0 to {vocab_size - 1}")
        for i, group in enumerate(batch.token_groups):
            for j, text in enumerate(group):
                if min(text) < 0 or max(text) >= vocab_size:
                    found = next(token for token in text if not 0 <= token < vocab_size)
                    raise ValueError(
                        f"comparison {i}, response {j}: id {found}; the model has ids 0 to {vocab_size - 1}"
                    )
        rewards = self.value(self.backbone.forward_packed(batch)).split(
            batch.branches + batch.tails
        )
        parts, result = zip(rewards, rewards[len(batch.tails) :]), []
        for group in batch.token_groups:
            longest = max(map(len, group))
            # a tail of one token stands for a longer one
            result.append(
                [
                    torch.cat((branch, tail.expand(longest - len(text)))) if len(tail) else branch
                    for text, (branch, tail) in zip(group, parts)
                ]
            )
        return result

    def token_rewards(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """The reward for every token of N rows, input_ids and attention_mask (N, L): (N, L), float32 or wider."""
        return self.value(self.backbone(input_ids, attention_mask))

    def value(self, hidden: torch.Tensor) -> torch.Tensor:
        """The value head: hidden states (..., C) -> rewards (...), float32 or wider, under autocast too.

        In half precision rewards near 8 would be multiples of 1/128 (fp16) or 1/16 (bf16); the loss reads their differences.
        """
        wide = torch.promote_types(self.v_head.weight.dtype, torch.float32)
        with torch.autocast(hidden.device.type, enabled=False):
            rewards = F.linear(hidden.to(wide), self.v_head.weight.to(wide)).squeeze(-1)
        return rewards + self.reward_bias if self.reward_bias else rewards

    def forward_value(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        return_value_only: bool = False,
        prompt_length: int = 0,
    ) -> torch.Tensor | dict[str, torch.Tensor]:
        """What step 3 of RLHF (PPO) calls: values for a critic, an end score for a reward (DeepSpeed-Chat).

        input_ids: (N, L) int64, prompts of `prompt_length` columns, padded on the left or not, then answers padded on the
        right. attention_mask: (N, L); None: every id but the pad id is attended to.
        Returns `values` (N, L), and unless `return_value_only`, in a dict with `chosen_end_scores` (N,): the value before
        the first pad id at or after `prompt_length`, or at the row's end. Values where the mask is 0 have no meaning.
        Raises ValueError that names the row.
        """
        ids, _ = check_batch(
            input_ids, self.pad_id, attention_mask, vocab_size=self.backbone.config.vocab_size
        )
        L = ids.shape[1]
        if not 0 <= prompt_length <= L:
            raise ValueError(
                f"prompt_length {prompt_length}: expected 0 to {L}, the length of the rows"
            )
        values = self.token_rewards(
            input_ids, input_ids != self.pad_id if attention_mask is None else attention_mask
        )
        if return_value_only:
            return values
        scores = []
        start = max(
            prompt_length, self.num_padding_at_beginning
        )  # a leading pad that belongs to the text does not end it
        for row in range(len(ids)):
            pads = (ids[row, start:] == self.pad_id).nonzero()
            end = start + int(pads[0]) if len(pads) else L
            if end == 0:
                raise ValueError(
                    f"row {row} begins with the pad id {self.pad_id}: at prompt_length 0 no value stands before it; "
                    "give the prompt_length"
                )
            scores.append(values[row, end - 1])
        return {"values": values, "chosen_end_scores": torch.stack(scores)}

    @classmethod
    def from_pretrained(cls, path, pad_id=None, num_padding_at_beginning=None, **objective):
        """Load a directory of `save_pretrained`, or a Hugging Face backbone (a fresh value head).

        pad_id, num_padding_at_beginning: None takes what the directory says (`padding_of`). A
        pad_id beyond the embedding adds rows of zeros up to it.
        objective: `loss` and `center_rewards_coefficient`.
        The value head is `v_head.weight`, or a `score.weight` of one row.
        Raises ValueError that names the file.
        """
        hf, weights = huggingface.read_checkpoint(path)
        backbone = GPT.from_hf(hf, weights, source=path)
        head = huggingface.value_head(weights, backbone.config.embed_dim, source=path)
        pad_id, leading = huggingface.padding_of(path, hf, pad_id, num_padding_at_beginning)
        backbone.resize_embedding(max(pad_id + 1, backbone.config.vocab_size))
        found = {"reward_bias": hf.get("reward_bias", 0.0), "has_fresh_head": head is None}
        model = cls(backbone, pad_id, leading, **objective, **found)
        if head is not None:
            model.v_head.weight.data.copy_(head)
        return model

    def save_pretrained(self, path, layout: str = "deepspeed-chat", tokenizer=None):
        """Write config.json, the weights, and a tokenizer's files into the directory `path`.

        layout "deepspeed-chat": pytorch_model.bin with the keys that DeepSpeed-Chat's step 3 loads.
        It resizes the embedding to 8 * ceil(length of the tokenizer / 8) rows before it does, so
        that is how many are written.
        layout "hf": model.safetensors (needs safetensors), which
        `transformers.AutoModelForSequenceClassification` loads.
        Raises ValueError for another layout, and where weights of another kind lie in `path`.
        """
        huggingface.save_reward_model(self, path, layout, tokenizer)


# --------------------------------------------------------------------------------------------------
# The programs


def main():
    try:
        hand_over("score", sys.argv[1:], "scoring")
    except ValueError as error:
        sys.exit(f"rm.py: error: {error}")


if __name__ == "__main__":
    main()
