"""The packed layout: how comparisons lie in memory without padding, who attends to whom, and how.

It computes no loss (rm.py, for which it says where the rewards of pairs lie) and no hidden states
(model.py, which hands in its attention).

The rows of a pair begin with the same prompt, and the padded layout pads them to a common length:

    chosen      P P P P P P C C C . . . . . . .        P  prompt, in both rows
    rejected    P P P P P P R R R R R . . . . .        C, R  the responses      .  padding

Packed, what all texts of a comparison share is computed once, and padding only where the loss reads
rewards. A comparison is one trunk (what its texts share), a branch for each text (the rest), and a
tail for each text: the padding from its own end to the end of the longest text. In memory all
trunks come first, then all branches, then all tails.

Who attends to whom, x: a row attends to a column (`...` stands for more of the same):

                    P P P P P P   C C C   R R R R R
    trunk     P   | x           |       |
              P   | x x         |       |
              ... | x x x x x x |       |
    chosen    C   | x x x x x x | x     |
              C   | x x x x x x | x x   |
              C   | x x x x x x | x x x |
    its tail  .   | x x x x x x | x x x |
              .   | x x x x x x | x x x |
    rejected  R   | x x x x x x |       | x
              R   | x x x x x x |       | x x
              ... | x x x x x x |       | x x x x x

A token depends on nothing after it. So a trunk, computed once, gives its branches exactly what they
would get in rows of their own; positions are the columns of those rows. The loss reads the shorter
text's rewards at padding, which sees its whole text and no other padding.

For sharing prompts compare Wang & Hegde (2024, arXiv 2410.20305).

Shapes: T tokens of a packed batch, H heads, D width of a head.
"""

import functools
import inspect
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace

import numpy as np
import torch

# Comparisons that have at most this many tokens together share a call of attention, because a small
# call costs more time than its arithmetic.
SHORT = 200


# --------------------------------------------------------------------------------------------------
# Layout


@dataclass
class PackedBatch:
    """Comparisons laid out flat: all trunks, then all branches, then all tails."""

    token_groups: list[list[list[int]]]  # what was packed: comparisons, texts, token ids
    input_ids: torch.Tensor  # (T,) int64
    positions: torch.Tensor  # (T,) int64, columns of the padded layout
    trunks: list[int]  # lengths, one for each comparison
    branches: list[int]  # lengths, one for each text, comparison after comparison
    tails: list[int]  # lengths, one for each text
    length: int  # tokens of the longest text
    pad_id: int
    longest_tail: int | None  # tails are cut to this length; None: they are whole
    margins: Sequence[float] | None = None  # one for each comparison; None: 0
    targets: Sequence[float] | None = None  # one for each comparison; None: 1
    pairs: tuple["PairIndex | None", "PairIndex"] | None = None  # from `index_pairs`
    calls: tuple[tuple["VarlenCall", ...], ...] | None = None  # of flash attention

    @property
    def num_tokens(self) -> int:
        """T, the number of tokens computed on."""
        return len(self.input_ids)

    def to(self, device) -> "PackedBatch":
        """Return the batch with its tensors on `device`, and ready for attention there.

        The copies do not wait for the device.
        """
        device = torch.device(device)
        calls = self.calls
        if calls is None and device.type != "cpu":
            calls = plan_varlen(self)
        return moved(replace(self, calls=calls), device)


def moved(value, device: torch.device):
    """Copy a tensor, or the tensors in a dataclass or tuple, to a device without waiting for it."""
    if torch.is_tensor(value):
        if device.type == "cuda" and value.device.type == "cpu":
            value = value.pin_memory()  # from other memory, a copy waits
        return value.to(device, non_blocking=True)
    if is_dataclass(value):
        names = [item.name for item in fields(value)]
        return replace(value, **{name: moved(getattr(value, name), device) for name in names})
    if isinstance(value, tuple):
        return tuple(moved(item, device) for item in value)
    return value


def shared_prefix(texts: list[list[int]]) -> int:
    """Count the tokens that all texts have in common at their start."""
    # All texts lie between the first and the last in lexical order, and begin as these two do.
    first, last = min(texts), max(texts)
    for position, (token, other) in enumerate(zip(first, last)):
        if token != other:
            return position
    return len(first)


def trunk_length(group: list[list[int]]) -> int:
    """Count the tokens that the texts of a comparison share, except the last token of each text.

    A text's score is read at its last token, so that token lies in the branch.
    """
    return min(shared_prefix(group), min(map(len, group)) - 1)


def tail_length(length: int, longest: int, longest_tail: int | None) -> int:
    """Count the padding behind a text of `length` tokens beside a text of `longest` tokens."""
    padding = longest - length
    if longest_tail is None:
        return padding
    return min(padding, longest_tail)


def packed_size(group: list[list[int]], longest_tail: int | None = None) -> int:
    """Count the tokens that one comparison takes in a packed batch."""
    trunk = trunk_length(group)
    longest = max(map(len, group))
    size = trunk
    for text in group:
        size += len(text) - trunk + tail_length(len(text), longest, longest_tail)
    return size


def pack(
    token_groups: list[list[list[int]]],
    pad_id: int,
    margins: Sequence[float] | None = None,
    targets: Sequence[float] | None = None,
    min_responses: int = 2,
    longest_tail: int | None = None,
) -> PackedBatch:
    """Pack comparisons, each a list of token lists, best first.

    token_groups: a list's length is where its text ends; it may contain `pad_id`.
    margins, targets: one for each comparison, for the loss, which checks them.
    min_responses: 1 allows single texts, to be scored.
    longest_tail: cut tails to this length; None: keep them whole. `RewardModel.pack` knows the
        length that its loss needs.
    Raises ValueError that names the comparison which has too few texts, an empty one, or other
    things than lists of token ids.
    """
    if not token_groups:
        raise ValueError("no comparison to pack")
    trunks, branches, tails = [], [], []  # pieces: (token ids, column of the first one)
    for number, group in enumerate(token_groups):
        kinds = [type(text).__name__ for text in group if not isinstance(text, (list, tuple))]
        if kinds:
            raise ValueError(
                f"comparison {number}: found {kinds[0]}; expected texts, each a list of token ids"
            )
        if len(group) < min_responses or not all(group):
            lengths = [len(text) for text in group]
            raise ValueError(
                f"comparison {number}: sequences of {lengths} tokens; "
                f"expected {min_responses} or more, none empty"
            )
        shared = trunk_length(group)
        longest = max(map(len, group))
        trunks.append((group[0][:shared], 0))
        for text in group:
            branches.append((text[shared:], shared))
            padding = tail_length(len(text), longest, longest_tail)
            tails.append(([pad_id] * padding, len(text)))
    input_ids, positions = [], []
    for tokens, column in trunks + branches + tails:
        input_ids += tokens
        positions.append(np.arange(column, column + len(tokens)))
    ids = np.array(input_ids)  # PyTorch takes longer to read a list
    if ids.dtype.kind not in "iu":
        raise ValueError(f"token_groups, pad_id: found {ids.dtype}; expected token ids, int64")
    return PackedBatch(
        token_groups,
        torch.tensor(ids.astype(np.int64, copy=False)),
        torch.tensor(np.concatenate(positions)),
        trunks=[len(tokens) for tokens, _ in trunks],
        branches=[len(tokens) for tokens, _ in branches],
        tails=[len(tokens) for tokens, _ in tails],
        length=max(len(text) for group in token_groups for text in group),
        pad_id=pad_id,
        longest_tail=longest_tail,
        margins=margins,
        targets=targets,
    )


# --------------------------------------------------------------------------------------------------
# Where the loss finds its rewards


def reward_places(batch: PackedBatch) -> list[list[np.ndarray]]:
    """List the places of each text's rewards: indices into `RewardModel.packed_rewards`.

    Returns for each comparison an array for each text, with a place for each of its columns, from
    the first behind the trunk to the end of the longest text, or without tails to the text's own
    end. A tail of one token stands for a longer one.
    """
    branch_starts = itertools.accumulate(batch.branches, initial=0)
    tail_starts = itertools.accumulate(batch.tails, initial=sum(batch.branches))
    pieces = zip(branch_starts, batch.branches, tail_starts, batch.tails)
    result = []
    for group in batch.token_groups:
        longest = max(map(len, group))
        places = []
        for text in group:
            branch_start, branch, tail_start, tail = next(pieces)
            padding = tail_start + np.arange(tail)
            if tail == 1:
                padding = padding.repeat(longest - len(text))
            places.append(np.concatenate((branch_start + np.arange(branch), padding)))
        result.append(places)
    return result


@dataclass
class PairIndex:
    """The N positions at which a loss compares two rewards, pair after pair."""

    places: torch.Tensor  # (2N,) int64: of all chosen rewards, then of all rejected ones
    weights: torch.Tensor  # (N,) float64: of each position in the loss; they add up to 1
    margins: torch.Tensor | float  # (N,) float64, or 0 for all
    targets: torch.Tensor | float  # (N,) float64, or 1 for all

    @classmethod
    def of(cls, pairs: list[tuple[np.ndarray, np.ndarray, float, float, float]]) -> "PairIndex":
        """Make the index of pairs: chosen places, rejected places, weight, margin, target."""
        chosen, rejected, *numbers = zip(*pairs)
        counts = [len(places) for places in chosen]
        weights, margins, targets = np.array(numbers, dtype=np.float64)
        at_positions = []
        for values, default in ((margins, 0.0), (targets, 1.0)):
            if (values == default).all():
                at_positions.append(default)
            else:
                at_positions.append(torch.tensor(values.repeat(counts)))
        places = torch.tensor(np.concatenate(chosen + rejected))
        return cls(places, torch.tensor((weights / counts).repeat(counts)), *at_positions)

    def read(self, rewards: torch.Tensor) -> tuple:
        """Return the arguments of `rm.pair_terms`, of one dtype, from rewards (R,)."""
        chosen, rejected = rewards.index_select(0, self.places).chunk(2)
        margins, targets = self.margins, self.targets
        if torch.is_tensor(margins):
            margins = margins.to(rewards.dtype)
        if torch.is_tensor(targets):
            targets = targets.to(rewards.dtype)
        return chosen, rejected, margins, targets

    def mean(self, terms: torch.Tensor) -> torch.Tensor:
        """Return the weighted mean of terms (N,), a scalar."""
        return (terms * self.weights.to(terms.dtype)).sum()


def index_pairs(
    batch: PackedBatch, region: Callable, margins: list[float], targets: list[float]
) -> tuple[PairIndex | None, PairIndex]:
    """Index what a loss reads of a packed batch: the regions of its pairs, and their ends.

    region: finds (start, stop), the columns that the loss of two texts reads; none for equal texts.
    margins, targets: one for each comparison.
    Raises ValueError for a region that starts in a trunk.
    Every comparison weighs the same; its pairs share its weight, and the positions of a pair share
    the weight of the pair. The first index is None where the batch was packed without tails
    (longest_tail 0): only the ends of its texts can be read then.
    """
    regions, ends = [], []
    has_tails = batch.longest_tail != 0
    for group, trunk, places, margin, target in zip(
        batch.token_groups, batch.trunks, reward_places(batch), margins, targets
    ):
        pairs = list(itertools.combinations(range(len(group)), 2))
        weight = 1 / (len(batch.token_groups) * len(pairs))
        numbers = weight, margin, target
        for i, j in pairs:
            # Places begin behind the trunk.
            last, other_last = len(group[i]) - 1 - trunk, len(group[j]) - 1 - trunk
            ends.append((places[i][last, None], places[j][other_last, None], *numbers))
            if has_tails:
                start, stop = region(group[i], group[j])
                start = min(start, stop - 1)  # identical texts: their last token
                if start < trunk:
                    raise ValueError(
                        f"region: starts at column {start} of texts {i} and {j}; a packed batch "
                        f"has no rewards of their first {trunk} tokens, which all texts share"
                    )
                columns = slice(start - trunk, stop - trunk)
                regions.append((places[i][columns], places[j][columns], *numbers))
    return PairIndex.of(regions) if has_tails else None, PairIndex.of(ends)


# --------------------------------------------------------------------------------------------------
# Attention


class PackedAttention:
    """Attention of a packed batch, called once in every block.

    scaled_dot_product: attention of rows, model.py's: q (B, L, H, D), k and v (B, M, H_kv, D),
    dropout, and `attn_mask` or `is_causal` by name -> (B, L, H, D).

    Pieces are numbered as they lie: trunks, branches, tails. A trunk attends to itself; a branch to
    its trunk and itself; a tail to the whole text and to no padding.
    """

    def __init__(self, batch: PackedBatch, scaled_dot_product: Callable):
        self.batch = batch
        self.scaled_dot_product = scaled_dot_product
        self.lengths = batch.trunks + batch.branches + batch.tails
        self.masks = {}  # of `plan_masks`, by the number of queries: the last block has fewer

    def __call__(self, q, k, v, dropout_p: float) -> torch.Tensor:
        """Attend from q to k and v, without the rows of tails; returns a tensor of q's shape.

        q: (T, H, D), or in the last block without the rows of trunks. k, v: (T - tails, H_kv, D).
        """
        if self.batch.calls and can_use_varlen(q, dropout_p):
            return self.with_varlen(q, k, v)
        return self.with_masks(q, k, v, dropout_p)

    def with_masks(self, q, k, v, dropout_p: float) -> torch.Tensor:
        """Attend by one call of `scaled_dot_product` for each branch, or for short comparisons."""
        batch = self.batch
        n_trunks = len(batch.trunks)
        with_trunks = len(q) == batch.num_tokens
        if len(q) not in self.masks:
            self.masks[len(q)] = self.plan_masks(with_trunks, q)
        key_lengths = batch.trunks + batch.branches
        query_lengths = key_lengths + batch.tails
        if not with_trunks:
            query_lengths = [0] * n_trunks + query_lengths[n_trunks:]
        # The gradient of a split is one concatenation; the gradient of a slice is as large as q.
        queries = q.split(query_lengths)
        k, v = k.split(key_lengths), v.split(key_lengths)
        answers = list(queries)  # pieces without a token keep their empty query
        for asking, asked, mask in self.masks[len(q)]:
            query = torch.cat([queries[piece] for piece in asking])[None]
            key = torch.cat([k[piece] for piece in asked])[None]
            value = torch.cat([v[piece] for piece in asked])[None]
            y = self.scaled_dot_product(
                query, key, value, dropout_p, attn_mask=mask, is_causal=mask is None
            )
            parts = y[0].split([query_lengths[piece] for piece in asking])
            for piece, part in zip(asking, parts):
                answers[piece] = part
        return torch.cat(answers)

    def plan_masks(self, with_trunks: bool, q: torch.Tensor) -> list[tuple]:
        """List the attention calls: pieces that ask, pieces that are asked, and the mask.

        The mask is 0 where a query sees a key, else -inf, in q's dtype; None for a trunk that asks
        itself alone, which is causal.
        """
        batch = self.batch
        n_trunks, n_branches = len(batch.trunks), len(batch.branches)
        trunk_of = [i for i, group in enumerate(batch.token_groups) for _ in group]
        # Each piece has the number of its trunk and of its branch; a trunk has branch -1.
        trunk_numbers = [*range(n_trunks), *trunk_of, *trunk_of]
        branch_numbers = [-1] * n_trunks + [*range(n_branches), *range(n_branches)]
        numbers = torch.tensor([trunk_numbers, branch_numbers])
        lengths = torch.tensor(self.lengths)
        numbers = numbers.repeat_interleave(lengths, dim=1, output_size=batch.num_tokens)
        numbers = moved(numbers, q.device)  # (2, T)
        # For each piece the trunk, branch and column of its tokens, (3, length).
        origins = torch.cat((numbers, batch.positions[None])).split(self.lengths, dim=1)
        plan = []
        for asking, asked in self.list_calls(with_trunks):
            mask = None
            if asking != asked:
                queries = torch.cat([origins[piece] for piece in asking], dim=1)
                keys = torch.cat([origins[piece] for piece in asked], dim=1)
                mask = q.new_zeros(()).where(sees(queries, keys), -math.inf)
            plan.append((asking, asked, mask))
        return plan

    def list_calls(self, with_trunks: bool) -> list[tuple[list[int], list[int]]]:
        """List the attention calls by the indices of pieces: the asking and the asked pieces."""
        n_branches = len(self.batch.branches)
        calls = []
        room = 0  # tokens that still fit into the last call
        first = len(self.batch.trunks)
        for trunk, group in enumerate(self.batch.token_groups):
            branches = list(range(first, first + len(group)))
            tails = [branch + n_branches for branch in branches]
            first += len(group)
            has_queries = with_trunks and self.lengths[trunk] > 0
            asking_trunks = [trunk] if has_queries else []
            size = sum(self.lengths[piece] for piece in [trunk, *branches, *tails])
            if size > SHORT:
                if has_queries:
                    calls.append(([trunk], [trunk]))
                for branch, tail in zip(branches, tails):
                    calls.append(([branch, tail], [trunk, branch]))
                room = 0
                continue
            if size > room:
                calls.append(([], []))
                room = SHORT
            asking, asked = calls[-1]
            asking += asking_trunks + branches + tails
            asked += [trunk, *branches]
            room -= size
        return calls

    def with_varlen(self, q, k, v) -> torch.Tensor:
        """Attend by flash kernels that take many sequences at once and no mask."""
        from torch.nn.attention.varlen import varlen_attn

        all_queries, without_trunks = self.batch.calls
        calls = all_queries if len(q) == self.batch.num_tokens else without_trunks
        options = {}
        if q.shape[1] != k.shape[1] and calls[0].announces_gqa:
            options["enable_gqa"] = True
        queries = [q]
        if len(calls) > 1:
            queries = q.split([call.queries for call in calls])
        answers = []
        for query, call in zip(queries, calls):
            key, value = k, v
            if call.rows is not None:
                key, value = k.index_select(0, call.rows), v.index_select(0, call.rows)
            lengths = call.query_starts, call.key_starts, call.longest_query, call.longest_key
            answer = varlen_attn(query, key, value, *lengths, window_size=call.window, **options)
            answers.append(answer)
        return answers[0] if len(answers) == 1 else torch.cat(answers)


@dataclass
class VarlenCall:
    """A call of PyTorch's varlen_attn: sequences of queries, each with its keys."""

    queries: int  # of all sequences
    rows: torch.Tensor | None  # (M,) int64, of k and v; None: all of them, in their order
    query_starts: torch.Tensor  # (sequences + 1,) int32: where each starts, and the last one ends
    key_starts: torch.Tensor  # (sequences + 1,) int32, in `rows`
    longest_query: int
    longest_key: int
    window: tuple[int, int]  # (-1, 0): causal, aligned to the ends of queries and keys; (-1, -1)
    announces_gqa: bool  # `asks_for_gqa`, asked here and not in a compiled block

    @classmethod
    def of(cls, sequences: list[tuple[int, np.ndarray]], window, n_keys: int) -> "VarlenCall":
        """Make a call of sequences, each a number of queries and the rows of their keys in k.

        n_keys: the number of rows of k.
        """
        from torch.nn.attention.varlen import varlen_attn  # not above: importing it takes a second

        query_lengths = [count for count, _ in sequences]
        rows = np.concatenate([keys for _, keys in sequences])
        query_starts, longest_query = starts_of(query_lengths)
        key_starts, longest_key = starts_of([len(keys) for _, keys in sequences])
        if np.array_equal(rows, np.arange(n_keys)):
            rows = None
        else:
            rows = torch.from_numpy(rows)
        lengths = query_starts, key_starts, longest_query, longest_key
        return cls(sum(query_lengths), rows, *lengths, window, asks_for_gqa(varlen_attn))


def plan_varlen(batch: PackedBatch) -> tuple[tuple[VarlenCall, ...], ...]:
    """List the calls of attention for the queries of all tokens, and for those behind trunks.

    The first call is causal: trunks, branches, and tails if none is longer than one token, because
    a single query, aligned to the last key, sees all keys. Longer tails have a call of their own.
    """
    key_lengths = batch.trunks + batch.branches
    n_keys = sum(key_lengths)
    rows = np.split(np.arange(n_keys), np.cumsum(key_lengths)[:-1])
    trunks = rows[: len(batch.trunks)]
    branches = iter(rows[len(batch.trunks) :])
    texts = []
    for trunk, group in zip(trunks, batch.token_groups):
        for _ in group:
            texts.append(np.concatenate((trunk, next(branches))))
    causal = list(zip(batch.branches, texts))
    tails = [(count, keys) for count, keys in zip(batch.tails, texts) if count > 0]
    calls_of_tails = ()
    if max(batch.tails) <= 1:
        causal += tails
    else:
        calls_of_tails = (VarlenCall.of(tails, (-1, -1), n_keys),)
    of_trunks = [(len(trunk), trunk) for trunk in trunks if len(trunk) > 0]
    plans = []
    for sequences in (of_trunks + causal, causal):
        plans.append((VarlenCall.of(sequences, (-1, 0), n_keys), *calls_of_tails))
    return tuple(plans)


def can_use_varlen(q: torch.Tensor, dropout_p: float) -> bool:
    """Tell whether the flash kernel takes q (T, H, D): half precision, no dropout, its widths."""
    is_half = q.dtype in (torch.float16, torch.bfloat16)
    if not (q.is_cuda and is_half and dropout_p == 0):
        return False
    width = q.shape[-1]
    is_ampere_or_newer = torch.cuda.get_device_capability(q.device) >= (8, 0)
    return width % 8 == 0 and width <= 256 and is_ampere_or_newer


@functools.cache
def asks_for_gqa(varlen_attn: Callable) -> bool:
    """Tell whether grouped heads must be announced: PyTorch 2.11 takes them as they are."""
    return "enable_gqa" in inspect.signature(varlen_attn).parameters


def sees(queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """Tell which queries attend to which keys, by the (trunk, branch, column) of each token.

    queries (3, N), keys (3, M), int64 -> (N, M) bool. A query sees the trunk of its comparison and
    its own branch, up to its own column.
    """
    trunk, branch, column = queries[:, :, None]
    key_trunk, key_branch, key_column = keys[:, None, :]
    is_same_text = (key_branch == -1) | (key_branch == branch)
    return (key_trunk == trunk) & is_same_text & (key_column <= column)


def starts_of(lengths: list[int]) -> tuple[torch.Tensor, int]:
    """Return where sequences of these lengths start and end, (N + 1,) int32, and the longest."""
    starts = [0, *itertools.accumulate(lengths)]
    return torch.tensor(starts, dtype=torch.int32), max(lengths)
