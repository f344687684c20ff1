"""Pairwise reward-model training: the loss, and the model it trains, as in DeepSpeed-Chat's step 2.

    1. A batch is the chosen sequences followed by the rejected ones: (2B, L) token ids.
    2. A transformer and a value head give a reward for every token: (2B, L).
    3. Split in half: row i is the chosen, row B + i the rejected response of pair i.
    4. A pair diverges at the first position where its ids differ, or where one text has ended.
    5. Its loss is the mean of -logsigmoid(r_chosen[t] - r_rejected[t]) from there to the LONGER of
       the two ends.
    6. The loss is the mean over the pairs. The score of a sequence is its reward at its last token.

`pairwise_loss` is steps 3 to 6, `RewardModel.forward` all six. By default, training packs its
batches instead of padding them (parts/packed.py), to the same numbers: `forward_packed`.

This file reads no files and knows no tokenizer: parts/huggingface.py reads and writes checkpoints,
data.py turns text into token ids. `python rm.py` hands over to tools/score.py:

    python rm.py CHECKPOINT FILE.jsonl [--out scores.jsonl]       score the responses in a file
    python rm.py convert CHECKPOINT DIRECTORY --layout hf         write a model in another layout
"""

import sys
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import nn

from model import GPT, GPTConfig  # GPTConfig for train.py, which imports it from here
from parts import guards, huggingface
from parts.flags import hand_over
from parts.packed import PackedBatch, index_pairs, pack

# --------------------------------------------------------------------------------------------------
# The loss


LOSSES = ("divergent", "end")


def pair_terms(
    chosen_rewards: torch.Tensor,
    rejected_rewards: torch.Tensor,
    margin: float | torch.Tensor = 0.0,
    target: float | torch.Tensor = 1.0,
) -> torch.Tensor:
    """The terms of the loss: -log sigmoid(r_chosen - r_rejected) at each position.

    chosen_rewards, rejected_rewards: tensors of one shape, float32 or float64.
    Returns their shape: the negative log likelihood of the preference under Bradley & Terry (1952),
    as in Ouyang et al. (2022), eq. 1, at every token.

    margin: by how much the chosen text is to be better; it is subtracted from the difference
        (Touvron et al. 2023, Llama 2, eq. 2).
    target: the probability p, 0 to 1, that the chosen text is preferred; with d for the difference
        a term is -(p log sigmoid(d) + (1 - p) log sigmoid(-d)) (Christiano et al. 2017, 2.2.3).
    Both are one number for all positions, or a tensor with a number for each.
    """
    difference = chosen_rewards - rejected_rewards - margin
    log_likelihood = F.logsigmoid(difference)
    if torch.is_tensor(target) or target != 1:
        log_likelihood = target * log_likelihood + (1 - target) * F.logsigmoid(-difference)
    return -log_likelihood


def centering_terms(chosen_scores: torch.Tensor, rejected_scores: torch.Tensor) -> torch.Tensor:
    """The squared sum of the two end scores of each pair (Eisenstein et al. 2023, TRL).

    Its weight in the loss keeps rewards near 0: differences leave their level open.
    """
    return (chosen_scores + rejected_scores) ** 2


def pairwise_loss(
    input_ids: torch.Tensor,
    rewards: torch.Tensor,
    pad_id: int,
    num_padding_at_beginning: int = 0,
    attention_mask: torch.Tensor | None = None,
    loss: str = "divergent",
    margins: Sequence[float] | None = None,
    targets: Sequence[float] | None = None,
    center_rewards_coefficient: float = 0.0,
) -> dict[str, torch.Tensor]:
    """The loss of a batch of pairs, pair by pair (DeepSpeed-Chat, step 2, `RewardModel.forward`).

    input_ids: (2B, L) int64, rows 0..B-1 chosen, rows B..2B-1 rejected, padded with `pad_id`: on
        the right; with a mask also on the left, both rows of a pair by the same number of columns.
    rewards: (2B, L) float32 or float64.
    num_padding_at_beginning: number of leading `pad_id` that belong to a text and do not end it
        (OPT: 1, since its bos is DeepSpeed-Chat's pad).
    attention_mask: (2B, L), 1 on text. It decides where texts end; without it, the pad id does.
    loss: "divergent", or "end", which compares the two end scores alone, in place of the region
        (Ouyang et al. 2022, TRL).
    margins, targets: (B,), see `pair_terms`. A pair with a margin other than 0 needs target 1.
    center_rewards_coefficient: the weight of `centering_terms`, which are added.

    Returns `loss`, a scalar: the mean over pairs of the mean over the divergent region;
    `chosen_mean_scores` and `rejected_mean_scores`, (B,): the rewards at the last tokens ("mean" is
    DeepSpeed-Chat's name).
    Raises ValueError where a batch breaks these rules, or where without a mask the ends cannot be
    known.
    """
    ids, mask = guards.check_rows(input_ids, attention_mask, pairs=True)
    guards.check_rewards(rewards, ids.shape)
    guards.check_loss(loss, LOSSES, center_rewards_coefficient)
    ends = text_ends(ids, pad_id, num_padding_at_beginning, mask)
    if mask is not None:  # ids before a text and after it are not compared
        column = torch.arange(ids.shape[1])
        first = mask.int().argmax(dim=1, keepdim=True)
        ids = ids.where((column >= first) & (column < torch.tensor(ends)[:, None]), pad_id)
    rows = ids.tolist()
    B = len(rows) // 2
    margins = guards.check_margins(margins, B)
    targets = guards.check_targets(targets, margins)
    losses, chosen_scores, rejected_scores = [], [], []
    for chosen, rejected in zip(range(B), range(B, 2 * B)):  # 3. split in half
        chosen_text = rows[chosen][: ends[chosen]]
        rejected_text = rows[rejected][: ends[rejected]]
        start, stop = divergent_region(chosen_text, rejected_text)  # 4. find the divergence
        if start == stop:  # identical texts have equal rewards: log 2 without a margin, no gradient
            if rows[chosen] != rows[rejected]:  # they differ after the ends, which are then wrong
                raise ValueError(
                    f"pair {chosen} (rows {chosen} and {rejected}): the pad id at column {stop} "
                    "ends both texts before they first differ; pass an attention_mask, which tells "
                    "where texts end"
                )
            start, stop = len(rows[chosen]) - 1, len(rows[chosen])
        region = slice(start, stop)
        scores = rewards[chosen, ends[chosen] - 1], rewards[rejected, ends[rejected] - 1]
        compared = rewards[chosen, region], rewards[rejected, region]
        if loss == "end":
            compared = scores
        term = pair_terms(*compared, margins[chosen], targets[chosen]).mean()  # 5. over the region
        if center_rewards_coefficient:
            term = term + center_rewards_coefficient * centering_terms(*scores)
        losses.append(term)
        chosen_scores.append(scores[0])
        rejected_scores.append(scores[1])
    return {
        "loss": torch.stack(losses).mean(),  # 6. mean over the pairs
        "chosen_mean_scores": torch.stack(chosen_scores),
        "rejected_mean_scores": torch.stack(rejected_scores),
    }


def divergent_region(chosen: list[int], rejected: list[int]) -> tuple[int, int]:
    """Find the positions that the loss of two texts (token ids) reads: start, and stop after them.

    The texts diverge where their ids first differ, or where exactly one of them has ended; the
    region reaches from there to the longer end, so the rewards that the shorter text gets at its
    padding count, too. The region of identical texts is empty.
    """
    shorter, longer = sorted((len(chosen), len(rejected)))
    differ = (t for t, (a, b) in enumerate(zip(chosen, rejected)) if a != b)
    return next(differ, shorter), longer


def text_ends(
    ids: torch.Tensor, pad_id: int, num_padding_at_beginning: int, mask: torch.Tensor | None
) -> list[int]:
    """Find for every row the position after its last token. `ids`, `mask`: (N, L), on the CPU.

    With a mask it lies after the row's last 1. Without, it is the position of the first pad id that
    is not among the first `num_padding_at_beginning` of them (DeepSpeed-Chat's rule), or L.
    Raises ValueError that names a row which is padded on the left or has no token.
    """
    guards.check_padding(pad_id, num_padding_at_beginning)
    if mask is not None:
        return [int(row.nonzero()[-1]) + 1 for row in mask]
    L = ids.shape[1]
    ends = []
    for row, row_ids in enumerate(ids):
        pads = (row_ids == pad_id).nonzero().flatten().tolist()
        end = L
        if len(pads) > num_padding_at_beginning:
            end = pads[num_padding_at_beginning]
        if end == num_padding_at_beginning < L and len(pads) < L:
            raise ValueError(
                f"row {row} is padded on the left: it begins with more than the "
                f"{guards.counted(num_padding_at_beginning, 'pad id')} ({pad_id}) of the text "
                "(num_padding_at_beginning); pad it on the right, or pass an attention_mask, "
                "which tells where texts end"
            )
        if end == 0:
            raise ValueError(
                f"row {row} has no token: every id is the pad id {pad_id}; leave the pair out"
            )
        ends.append(end)
    return ends


# --------------------------------------------------------------------------------------------------
# The model


class RewardModel(nn.Module):
    """A GPT backbone and a value head: a reward for every token.

    pad_id: pads rows; where no attention_mask is given, it also tells where texts end.
    num_padding_at_beginning: as in `pairwise_loss`; a packed batch does not need it.
    loss, center_rewards_coefficient: the objective, as `pairwise_loss` explains it.
    reward_bias: added to every reward; differences cancel it (parts/normalize.py).
    has_fresh_head: whether the value head is random: nothing has trained it.

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
        self.head_remark = ""  # where the checkpoint had the value head, or why it is fresh

    def forward(
        self,
        input_ids: torch.Tensor | PackedBatch,
        attention_mask: torch.Tensor | None = None,
        margins: Sequence[float] | None = None,
        targets: Sequence[float] | None = None,
    ) -> dict[str, torch.Tensor]:
        """Compute loss and end scores of a batch of pairs, with the rules of `pairwise_loss`.

        input_ids: (2B, L), all chosen rows, then all rejected ones; or a `PackedBatch`, which has
            margins and targets of its own, for `forward_packed`. A packed batch comes through
            `forward` because the hooks of DistributedDataParallel run here alone.
        attention_mask: (2B, L), tells which tokens are attended to and where texts end; without it,
            both follow from the pad id.
        margins, targets: (B,).
        """
        if isinstance(input_ids, PackedBatch):
            if attention_mask is not None or margins is not None or targets is not None:
                raise ValueError(
                    "attention_mask, margins or targets: found beside a packed batch, which has "
                    "lengths of its own; give margins and targets to `RewardModel.pack`"
                )
            return self.forward_packed(input_ids)
        vocab_size = self.backbone.config.vocab_size
        ids, mask = guards.check_rows(input_ids, attention_mask, pairs=True, vocab_size=vocab_size)
        attended = attention_mask
        if mask is None:
            ends = text_ends(ids, self.pad_id, self.num_padding_at_beginning, None)
            column = torch.arange(ids.shape[1], device=input_ids.device)
            attended = column < torch.tensor(ends, device=input_ids.device)[:, None]
        rewards = self.token_rewards(input_ids, attended)
        return pairwise_loss(
            ids,
            rewards,
            self.pad_id,
            self.num_padding_at_beginning,
            mask,
            self.loss,
            margins,
            targets,
            self.center_rewards_coefficient,
        )

    @property
    def longest_tail(self) -> int | None:
        """The number of padding tokens that the loss needs behind a text; None: all of them."""
        if self.loss == "end":
            return 0
        # OPT: all padding of a text has the same id, position and keys, so the same reward.
        if self.backbone.config.position_offset:
            return 1
        return None

    def pack(self, token_groups: list, margins=None, targets=None, region=None) -> PackedBatch:
        """Pack comparisons as `data.pack` does, with as much padding as this model's loss reads.

        region: finds what the loss of two texts reads; None: `divergent_region`.
        """
        batch = pack(token_groups, self.pad_id, margins, targets, longest_tail=self.longest_tail)
        return self.with_pairs(batch, region or divergent_region)

    def with_pairs(self, batch: PackedBatch, region: Callable) -> PackedBatch:
        """Return the batch with an index of the rewards that the loss of each pair reads."""
        margins = guards.check_margins(batch.margins, len(batch.token_groups))
        targets = guards.check_targets(batch.targets, margins, batch.token_groups)
        pairs = index_pairs(batch, region, margins, targets)
        return replace(batch, pairs=pairs).to(batch.input_ids.device)

    def forward_packed(self, batch: PackedBatch) -> dict[str, torch.Tensor]:
        """Compute loss and end scores of a packed batch: the numbers of `forward`, all at once.

        The loss of a ranking of K responses, best first, is the mean over its K(K-1)/2 pairs
        (i, j), i < j; the loss of the batch is the mean over its comparisons (Ouyang et al. 2022,
        eq. 1 and section 3.5). Scores are (P,), one for each of the P pairs, in their order.
        Raises ValueError for a batch that was packed for scores alone, and for margins and targets
        that `guards.check_targets` refuses.
        """
        guards.check_packed(batch, self.longest_tail)
        guards.check_loss(self.loss, LOSSES, self.center_rewards_coefficient)
        if batch.pairs is None:
            batch = self.with_pairs(batch, divergent_region)
        regions, ends = batch.pairs
        rewards = self.packed_rewards(batch)
        chosen_scores, rejected_scores, *_ = ends.read(rewards)
        compared = ends if self.loss == "end" else regions
        loss = compared.mean(pair_terms(*compared.read(rewards)))
        if self.center_rewards_coefficient:
            centering = ends.mean(centering_terms(chosen_scores, rejected_scores))
            loss = loss + self.center_rewards_coefficient * centering
        return {
            "loss": loss,
            "chosen_mean_scores": chosen_scores.clone(),  # FSDP2 warns of views
            "rejected_mean_scores": rejected_scores.clone(),
        }

    def packed_rewards(self, batch: PackedBatch) -> torch.Tensor:
        """The rewards (R,) of all branches, then of all tails; `reward_places` finds each text's.

        Raises ValueError that names the comparison, the response and an id that the model lacks.
        """
        guards.check_packed_ids(batch, self.backbone.config.vocab_size)
        return self.value(self.backbone.forward_packed(batch))

    def token_rewards(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """The reward of every token: ids and mask (N, L) -> rewards (N, L), float32 or wider."""
        return self.value(self.backbone(input_ids, attention_mask))

    def value(self, hidden: torch.Tensor) -> torch.Tensor:
        """The value head: hidden states (..., C) -> rewards (...), float32 or wider, in any mode.

        In half precision rewards near 8 would be multiples of 1/128 (fp16) or 1/16 (bf16); the loss
        reads their differences.
        """
        wide = torch.promote_types(self.v_head.weight.dtype, torch.float32)
        with torch.autocast(hidden.device.type, enabled=False):
            rewards = F.linear(hidden.to(wide), self.v_head.weight.to(wide)).squeeze(-1)
        if self.reward_bias:
            rewards = rewards + self.reward_bias
        return rewards

    def forward_value(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        return_value_only: bool = False,
        prompt_length: int = 0,
        use_cache: bool = False,
    ) -> torch.Tensor | dict[str, torch.Tensor]:
        """Compute values and end scores for step 3 of RLHF (PPO); DeepSpeed-Chat calls this name.

        A critic takes the values, a reward model the end score.

        input_ids: (N, L) int64, prompts of `prompt_length` columns, padded on the left or not, then
            answers padded on the right.
        attention_mask: (N, L); None: every id but the pad id is attended to.
        use_cache: DeepSpeed-Chat's trainer passes it; it changes nothing.
        Returns values (N, L) alone, or a dict of `values` and `chosen_end_scores` (N,): the value
        at the mask's last 1; without a mask the value before the first pad id at or after
        `prompt_length` (leading pad ids of a text aside), or at the row's end. Values where the
        mask is 0 have no meaning. Raises ValueError that names the row.
        """
        vocab_size = self.backbone.config.vocab_size
        ids, mask = guards.check_rows(input_ids, attention_mask, vocab_size=vocab_size)
        L = ids.shape[1]
        if prompt_length not in range(L + 1):
            raise ValueError(
                f"prompt_length {prompt_length}: expected 0 to {L}, the length of the rows"
            )
        if attention_mask is None:
            attention_mask = input_ids != self.pad_id
        values = self.token_rewards(input_ids, attention_mask)
        if return_value_only:
            return values
        # A leading pad that belongs to the text does not end it.
        start = max(prompt_length, self.num_padding_at_beginning)
        scores = []
        for row, row_ids in enumerate(ids):
            pads = (row_ids[start:] == self.pad_id).nonzero()
            end = start + int(pads[0]) if len(pads) else L
            if mask is not None:
                end = int(mask[row].nonzero()[-1]) + 1
            if end == 0:
                raise ValueError(
                    f"row {row} begins with the pad id {self.pad_id}: at prompt_length 0 no value "
                    "stands before it; give the prompt_length"
                )
            scores.append(values[row, end - 1])
        return {"values": values, "chosen_end_scores": torch.stack(scores)}

    @classmethod
    def from_pretrained(cls, path, pad_id=None, num_padding_at_beginning=None, **objective):
        """Load what `save_pretrained` wrote, or a Hugging Face backbone, with a fresh value head.

        pad_id, num_padding_at_beginning: None reads them from the directory, as
        `huggingface.padding_of` says. A pad_id beyond the embedding adds rows of zeros up to it.
        objective: `loss` and `center_rewards_coefficient`.
        The value head is `v_head.weight`, or a `score.weight` of one row.
        Raises ValueError that names the file.
        """
        hf, weights = huggingface.read_checkpoint(path)
        backbone = GPT.from_hf(hf, weights, source=path)
        head, remark = huggingface.value_head(weights, backbone.config.embed_dim, source=path)
        pad_id, leading = huggingface.padding_of(path, hf, pad_id, num_padding_at_beginning)
        backbone.resize_embedding(max(pad_id + 1, backbone.config.vocab_size))
        bias = float(hf.get("reward_bias", 0.0))
        model = cls(
            backbone, pad_id, leading, reward_bias=bias, has_fresh_head=head is None, **objective
        )
        model.head_remark = remark
        if head is not None:
            model.v_head.weight.data.copy_(head)
        return model

    def save_pretrained(self, path, layout: str = "deepspeed-chat", tokenizer=None):
        """Write config.json, the weights, and a tokenizer's files into the directory `path`.

        layout "deepspeed-chat": pytorch_model.bin with the keys that DeepSpeed-Chat's step 3 loads.
        Before that, step 3 resizes the embedding to 8 * ceil(length of the tokenizer / 8) rows, so
        as many rows are written.
        layout "hf": model.safetensors (needs safetensors), which
        `transformers.AutoModelForSequenceClassification` loads.
        Raises ValueError for an unknown layout, and where weights of another kind lie in `path`.
        """
        huggingface.save_reward_model(self, path, layout, tokenizer)


# --------------------------------------------------------------------------------------------------
# The programs


def main():
    try:
        hand_over("score", sys.argv[1:], "python rm.py")
    except ValueError as error:
        sys.exit(f"rm.py: error: {guards.one_line(error)}")


if __name__ == "__main__":
    main()
