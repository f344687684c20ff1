"""The loss, as a specification: `rm.pairwise_loss` on DeepSpeed-Chat's numbers and on small cases.

Ids in the small cases: 1 to 9 are tokens, 0 is the pad id. Rewards are random unless a test gives
them.
"""

import inspect
import itertools
import json
import math
import operator
import random
import re
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import rm
from rm import pairwise_loss

CASES = json.loads((Path(__file__).parent / "testdata" / "loss_cases.json").read_text())["cases"]


def batch(*rows, seed=0):
    """Make (2B, L) ids of chosen rows, then rejected rows, and random float64 rewards."""
    ids = torch.tensor(rows)
    rewards = torch.randn(
        ids.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)
    )
    return ids, rewards.requires_grad_()


def bradley_terry(rewards, chosen, rejected, positions):
    """The mean over positions of log(1 + exp(-(r_chosen - r_rejected))), in plain Python."""
    margins = [rewards[chosen, t].item() - rewards[rejected, t].item() for t in positions]
    return sum(math.log1p(math.exp(-margin)) for margin in margins) / len(margins)


# --------------------------------------------------------------------------------------------------
# DeepSpeed-Chat's numbers


def differences_to_deepspeed_chat(case):
    """Compute the worst differences from DeepSpeed-Chat: loss, end scores, d loss / d rewards."""
    rewards = torch.tensor(case["rewards"], dtype=torch.float64, requires_grad=True)
    out = pairwise_loss(
        torch.tensor(case["input_ids"]), rewards, case["pad_id"], case["num_padding_at_beginning"]
    )
    out["loss"].backward()
    got = {**out, "grad_rewards": rewards.grad}
    return {
        name: (got[name] - torch.tensor(case[name], dtype=torch.float64)).abs().max().item()
        for name in ("loss", "chosen_mean_scores", "rejected_mean_scores", "grad_rewards")
    }


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
def test_deepspeed_chat(case):
    worst = max(differences_to_deepspeed_chat(case).values())
    print(f"worst difference {worst:.1e}")
    assert worst < 1e-12


def shorter_end(chosen, rejected):
    start, stop = divergent_region(chosen, rejected)
    return start, max(start + 1, min(len(chosen), len(rejected)))


def from_the_start(chosen, rejected):
    return 0, max(len(chosen), len(rejected))


def one_too_early(chosen, rejected):
    start, stop = divergent_region(chosen, rejected)
    return start - 1, stop


def one_too_late(chosen, rejected):
    start, stop = divergent_region(chosen, rejected)
    return min(start + 1, stop - 1), stop


def last_token_alone(chosen, rejected):
    start, stop = divergent_region(chosen, rejected)
    return stop - 1, stop


def summed(chosen_rewards, rejected_rewards, *_):
    """Make terms whose mean over a region is the sum of the right ones."""
    return -torch.nn.functional.logsigmoid(chosen_rewards - rejected_rewards) * len(chosen_rewards)


divergent_region = rm.divergent_region
WRONG = [
    ("divergent_region", f)
    for f in (shorter_end, from_the_start, one_too_early, one_too_late, last_token_alone)
]


@pytest.mark.parametrize(
    "name, wrong", [*WRONG, ("pair_terms", summed)], ids=lambda x: getattr(x, "__name__", None)
)
def test_deepspeed_chat_numbers_tell_wrong_losses_apart(name, wrong, monkeypatch):
    """The cases above would catch these losses, each in its value and in its gradient."""
    monkeypatch.setattr(rm, name, wrong)
    worst = [differences_to_deepspeed_chat(case) for case in CASES]
    assert max(difference["loss"] for difference in worst) > 1e-2
    assert max(difference["grad_rewards"] for difference in worst) > 1e-2


# --------------------------------------------------------------------------------------------------
# The packed path beside the padded one: right losses in both, and each wrong loss fails in both


@dataclass
class Case:
    """Rows of ids with a reward for each, and what the loss of their comparisons is."""

    name: str
    input_ids: list[list[int]]  # (N, L)
    rewards: list[list[float]]  # (N, L)
    groups: list[list[int]]  # rows of each comparison, best first
    ends: list[int]  # (N,) lengths of the texts
    pad_id: int
    num_padding_at_beginning: int
    attention_mask: list[list[int]] | None
    loss: float
    grad_rewards: list[list[float]]  # (N, L)
    options: dict = field(default_factory=dict)  # keywords of `pairwise_loss`


def known_cases():
    """Take the cases of DeepSpeed-Chat and of vectors/loss.json that a packed batch can hold.

    It has no left padding. Identical texts have equal rewards there, so which position is read
    doesn't matter; rewards that somebody made up differ.
    """
    vectors = json.loads((Path(__file__).parent / "vectors" / "loss.json").read_text())["cases"]
    for case in CASES + vectors:
        if case.get("error") or case["pad_id"] < 0:
            continue
        rows, mask = case["input_ids"], case.get("attention_mask")
        if mask:
            ends = [sum(ones) for ones in mask]
            if any(ones != sorted(ones, reverse=True) for ones in mask):
                continue
        else:
            leading = case["num_padding_at_beginning"]
            ends = rm.text_ends(torch.tensor(rows), case["pad_id"], leading, None)
        texts = [row[:end] for row, end in zip(rows, ends)]
        B = len(rows) // 2
        if any(texts[i] == texts[B + i] for i in range(B)):
            continue
        yield Case(
            case["name"],
            rows,
            case["rewards"],
            [[i, B + i] for i in range(B)],
            ends,
            case["pad_id"],
            case["num_padding_at_beginning"],
            mask,
            case["loss"],
            case["grad_rewards"],
            case.get("options", {}),
        )


def ranking_case():
    """Make a ranking of three, the longest text last; loss and gradient in plain Python.

    d/dx of log(1 + exp(-x)) is -1 / (1 + exp(x)).
    """
    ids, rewards = batch([1, 2, 3, 0, 0, 0, 0], [1, 2, 4, 5, 0, 0, 0], [1, 6, 7, 8, 9, 9, 0])
    regions = {(0, 1): [2, 3], (0, 2): range(1, 6), (1, 2): range(1, 6)}
    loss, gradient = 0.0, [[0.0] * 7 for _ in range(3)]
    for (i, j), region in regions.items():
        loss += bradley_terry(rewards, i, j, region) / 3
        for t in region:
            margin = rewards[i, t].item() - rewards[j, t].item()
            slope = -1 / (1 + math.exp(margin)) / len(region) / 3
            gradient[i][t] += slope
            gradient[j][t] -= slope
    rows, rewards = ids.tolist(), rewards.tolist()
    return Case("ranking", rows, rewards, [[0, 1, 2]], [3, 4, 6], 0, 0, None, loss, gradient)


BOTH = [*known_cases(), ranking_case()]


class GivenRewards(torch.nn.Module):
    """A backbone of width 1 whose hidden states are the rewards of a case, whatever the layout."""

    def __init__(self, case: Case, rewards: torch.Tensor):
        super().__init__()
        self.case, self.rewards = case, rewards
        self.config = SimpleNamespace(embed_dim=1, vocab_size=2**62, position_offset=0)

    def forward(self, input_ids, attention_mask):
        return self.rewards[pair_rows(self.case)][..., None]

    def forward_packed(self, batch):
        branches, tails = [], []
        for group, trunk in zip(self.case.groups, batch.trunks):
            for row in group:
                end = self.case.ends[row]
                branches.append(self.rewards[row, trunk:end])
                tails.append(self.rewards[row, end : end + batch.tails[len(tails)]])
        return torch.cat(branches + tails)[:, None]


def pair_rows(case: Case) -> list[int]:
    """List the rows of the padded layout: the chosen of all pairs, then the rejected."""
    pairs = []
    for group in case.groups:
        pairs += itertools.combinations(group, 2)
    return [chosen for chosen, _ in pairs] + [rejected for _, rejected in pairs]


def loss_and_gradient(case: Case, path: str, reads_padding=True):
    """Compute a case with a RewardModel: the loss, and d loss / d rewards (N, L)."""
    leaf = torch.tensor(case.rewards, dtype=torch.float64, requires_grad=True)
    rewards = leaf
    if not reads_padding:
        rewards = leaf * (torch.arange(leaf.shape[1]) < torch.tensor(case.ends)[:, None])
    objective = dict(case.options)
    variants = objective.pop("margins", None), objective.pop("targets", None)
    backbone = GivenRewards(case, rewards)
    model = rm.RewardModel(backbone, case.pad_id, case.num_padding_at_beginning, **objective)
    torch.nn.init.ones_(model.double().v_head.weight)
    if path == "packed":
        texts = [row[:end] for row, end in zip(case.input_ids, case.ends)]
        groups = [[texts[row] for row in group] for group in case.groups]
        loss = model(model.pack(groups, *variants))["loss"]
    else:
        rows, mask = pair_rows(case), None
        if case.attention_mask:
            mask = torch.tensor(case.attention_mask)[rows]
        loss = model(torch.tensor(case.input_ids)[rows], mask, *variants)["loss"]
    loss.backward()
    return loss.item(), leaf.grad


def errors(case: Case, path: str, **how) -> tuple[float, float]:
    """Compare a case with its numbers: errors of the loss and of its gradient.

    Infinite, where they are not finite or where there are none.
    """
    try:
        loss, gradient = loss_and_gradient(case, path, **how)
    except (RuntimeError, ValueError):
        return math.inf, math.inf
    expected = torch.tensor(case.grad_rewards, dtype=torch.float64)
    found = abs(loss - case.loss), (gradient - expected).abs().max().item()
    return tuple(error if math.isfinite(error) else math.inf for error in found)


@pytest.mark.parametrize("path", ["packed", "padded"])
@pytest.mark.parametrize("case", BOTH, ids=lambda case: case.name)
def test_both_paths_give_known_numbers(case, path):
    loss, gradient = loss_and_gradient(case, path)
    assert loss == pytest.approx(case.loss, rel=1e-12, abs=1e-12)
    expected = torch.tensor(case.grad_rewards, dtype=torch.float64)
    torch.testing.assert_close(gradient, expected, atol=1e-12, rtol=0)


def to_the_end_of_the_rows(chosen, rejected):
    """Beyond the longer end; in a packed ranking, to the end of its longest text."""
    start, stop = divergent_region(chosen, rejected)
    return start, 10**6 if start < stop else stop


def up_to_the_pad_id(chosen, rejected):
    """Texts end before their first pad id (0, and 2 in the cases with a leading one)."""
    pad_id = 2 if chosen[0] == 2 else 0
    cut = [
        list(itertools.takewhile(lambda token: token != pad_id, text))
        for text in (chosen, rejected)
    ]
    start, stop = divergent_region(*cut)
    if start == stop:
        stop = max(len(chosen), len(rejected))
        start = stop - 1
    return start, stop


def swapped(chosen_rewards, rejected_rewards, *rest):
    return pair_terms(rejected_rewards, chosen_rewards, *rest)


def log_of_sigmoid_as_written(chosen_rewards, rejected_rewards, *_):
    return -torch.log(torch.sigmoid(chosen_rewards - rejected_rewards))


def without_gradient(chosen_rewards, rejected_rewards, *rest):
    return pair_terms(chosen_rewards.detach(), rejected_rewards.detach(), *rest)


def of_target(term):
    """Make `pair_terms` of a term that gets the differences of the rewards, and the targets."""

    def wrong(chosen_rewards, rejected_rewards, margin, target):
        differences = chosen_rewards - rejected_rewards - margin
        return term(differences, torch.as_tensor(target, dtype=differences.dtype))

    return wrong


def cross_entropy(x, p):
    return -(p * logsigmoid(x) + (1 - p) * logsigmoid(-x))


logsigmoid = torch.nn.functional.logsigmoid
TARGETS = [
    "targets: at every token",
    "targets: chosen is a prefix of rejected",
    "targets: mask, pad ids inside",
]
# Wrong terms of a pair that has a target, and cases that must tell each of them apart
WRONG_TARGETS = {
    "the target ignored": (
        lambda x, p: -logsigmoid(x),
        [*TARGETS, "targets: of the ends", "targets: of one pair alone"],
    ),
    "the target reversed": (
        lambda x, p: cross_entropy(x, 1 - p),
        [*TARGETS, "targets: of the ends", "targets: of one pair alone"],
    ),
    "the target rounded": (lambda x, p: cross_entropy(x, p.round()), TARGETS),
    "the target as a weight": (lambda x, p: -p * logsigmoid(x), TARGETS),
    "the target on the mean difference": (
        lambda x, p: cross_entropy(x.where(p == 1, x.mean()), p),
        ["targets: at every token", "targets: one half"],
    ),
    "the target's second term subtracted": (
        lambda x, p: -(p * logsigmoid(x) - (1 - p) * logsigmoid(-x)),
        TARGETS,
    ),
    "the target's second term not reversed": (
        lambda x, p: -(p * logsigmoid(x) + (1 - p) * logsigmoid(x)),
        TARGETS,
    ),
    "the target halfway to 1": (lambda x, p: cross_entropy(x, (1 + p) / 2), TARGETS),
    "log of 1 - sigmoid as written": (
        lambda x, p: -(p * logsigmoid(x) + (1 - p) * torch.log(1 - torch.sigmoid(x))),
        ["targets: large differences"],
    ),
}

pair_terms = rm.pair_terms
# Every wrong loss of tools/test_vectors.py by its name there, and cases that must tell it apart.
WRONG_LOSSES = {
    "the whole row": ("divergent_region", from_the_start, ["random batch of 8"]),
    "to the end of L": ("divergent_region", to_the_end_of_the_rows, ["ranking"]),
    "up to the shorter end": (
        "divergent_region",
        shorter_end,
        ["chosen shorter", "rejected ends first", "ranking"],
    ),
    "a sum for the mean": ("pair_terms", summed, ["no padding", "ranking"]),
    "one too early": ("divergent_region", one_too_early, ["no padding", "chosen shorter"]),
    "one too late": ("divergent_region", one_too_late, ["no padding", "no shared prefix"]),
    "the last token alone": (
        "divergent_region",
        last_token_alone,
        ["no padding", "equal again later", "ranking"],
    ),
    "the pad id over the mask": (
        "divergent_region",
        up_to_the_pad_id,
        ["mask: pad id in the prompt", "mask: pad id in a response"],
    ),
    "chosen and rejected swapped": ("pair_terms", swapped, ["no padding", "one token", "ranking"]),
    "log of sigmoid as written": (
        "pair_terms",
        log_of_sigmoid_as_written,
        ["large differences against the chosen"],
    ),
    "leading pads unknown": ("divergent_region", up_to_the_pad_id, ["leading pad of the text"]),
    "no gradient": ("pair_terms", without_gradient, ["no padding", "ranking"]),
}
WRONG_LOSSES |= {
    name: ("pair_terms", of_target(term), cases) for name, (term, cases) in WRONG_TARGETS.items()
}


@pytest.mark.parametrize("path", ["packed", "padded"])
@pytest.mark.parametrize("name", WRONG_LOSSES)
def test_wrong_losses_fail_in_both_paths(name, path, monkeypatch):
    """In value and in gradient, in each of the cases named, where right losses agree to 1e-12."""
    place, wrong, names = WRONG_LOSSES[name]
    monkeypatch.setattr(rm, place, wrong)
    cases = [case for case in BOTH if case.name in names]
    assert len(cases) == len(names)
    for case in cases:
        assert min(errors(case, path)) > 1e-3, case.name


@pytest.mark.parametrize("path", ["packed", "padded"])
@pytest.mark.parametrize(
    "name, wrong", [*WRONG, ("pair_terms", summed)], ids=lambda x: getattr(x, "__name__", None)
)
def test_deepspeed_chat_numbers_tell_wrong_losses_apart_in_both_paths(
    name, wrong, path, monkeypatch
):
    monkeypatch.setattr(rm, name, wrong)
    names = {case["name"] for case in CASES}
    found = [errors(case, path) for case in BOTH if case.name in names]
    assert max(loss for loss, _ in found) > 1e-2
    assert max(gradient for _, gradient in found) > 1e-2


@pytest.mark.parametrize("path", ["packed", "padded"])
def test_rewards_at_padding_count_in_both_paths(path):
    """The wrong loss "nothing at padding" takes them for 0."""
    names = ["chosen ends first", "rejected is a prefix of chosen, which fills L", "ranking"]
    cases = [case for case in BOTH if case.name in names]
    assert len(cases) == len(names)
    for case in cases:
        assert min(errors(case, path, reads_padding=False)) > 1e-3, case.name


@pytest.mark.parametrize("path", ["packed", "padded"])
@pytest.mark.parametrize(
    "margin, target, words",
    [
        (math.nan, 1.0, "margins: found nan for pair 0"),
        (0.0, math.nan, "targets: found nan for pair 0"),
    ],
)
def test_bad_batch_is_refused_in_both_paths(margin, target, words, path, monkeypatch):
    """The wrong loss "nothing refused" gives a number for a margin or a target that is none."""
    model = rm.RewardModel(GivenRewards(BOTH[0], torch.tensor(BOTH[0].rewards)), BOTH[0].pad_id)
    rows = torch.tensor(BOTH[0].input_ids)

    def loss():
        if path == "packed":
            return model(model.pack([rows.tolist()], [margin], [target]))["loss"]
        return model(rows, None, [margin], [target])["loss"]

    with pytest.raises(ValueError, match=words):
        loss()
    monkeypatch.setattr(rm.guards, "check_margins", lambda margins, count: margins)
    monkeypatch.setattr(rm.guards, "check_targets", lambda targets, *_: targets)
    assert loss().isnan()


# --------------------------------------------------------------------------------------------------
# The region, case by case


@pytest.mark.parametrize(
    "chosen, rejected, region",
    [
        ([1, 2, 3, 4, 5], [1, 2, 6, 7, 8], [2, 3, 4]),  # no padding at all
        (
            [1, 2, 3, 0, 0, 0],
            [1, 2, 6, 7, 8, 0],
            [2, 3, 4],
        ),  # chosen ends first: its rewards at padding count
        ([1, 2, 6, 7, 8, 0], [1, 2, 3, 0, 0, 0], [2, 3, 4]),  # rejected ends first
        ([1, 2, 0, 0], [1, 2, 3, 4], [2, 3]),  # a prefix of the other: they diverge where it ends
        ([1, 2, 3, 4], [1, 2, 3, 5], [3]),  # divergence at the last token
        (
            [1, 2, 3],
            [4, 2, 3],
            [0, 1, 2],
        ),  # at the first: no shared prompt (DeepSpeed-Chat: AssertionError)
        (
            [1, 2, 3, 4, 5],
            [1, 6, 3, 4, 5],
            [1, 2, 3, 4],
        ),  # equal again later: still divergent to the end
        (
            [1, 2, 0, 3, 4],
            [1, 5, 6, 0, 7],
            [1, 2],
        ),  # a pad id inside ends a text; what follows is not read
        ([1, 2, 0, 0], [1, 2, 0, 0], [3]),  # identical: the row's last position
    ],
)
def test_region(chosen, rejected, region):
    ids, rewards = batch(chosen, rejected)
    loss = pairwise_loss(ids, rewards, pad_id=0)["loss"]
    assert loss.item() == pytest.approx(bradley_terry(rewards, 0, 1, region), abs=1e-12)
    loss.backward()
    assert rewards.grad.abs().sum(0).nonzero().flatten().tolist() == region


def test_identical_pair_with_equal_rewards_is_log_2_without_gradient():
    ids = torch.tensor([[1, 2, 0], [1, 2, 0]])
    reward_of_row = torch.randn(1, 3, dtype=torch.float64, requires_grad=True)
    loss = pairwise_loss(ids, reward_of_row.expand(2, 3), pad_id=0)["loss"]
    loss.backward()
    assert loss.item() == pytest.approx(math.log(2), abs=1e-15)
    assert reward_of_row.grad.abs().max() == 0


def test_mean_over_pairs_weighs_a_short_and_a_long_region_the_same():
    ids, rewards = batch(
        [1, 2, 3, 4, 5, 6], [1, 1, 1, 1, 1, 2], [1, 7, 7, 7, 7, 7], [1, 1, 1, 1, 1, 3]
    )
    long, short = bradley_terry(rewards, 0, 2, range(1, 6)), bradley_terry(rewards, 1, 3, [5])
    assert pairwise_loss(ids, rewards, pad_id=0)["loss"].item() == pytest.approx(
        (long + short) / 2, abs=1e-12
    )


def test_scores_are_the_rewards_at_the_last_tokens():
    ids, rewards = batch([1, 2, 3, 0], [1, 4, 5, 6], [1, 2, 0, 0], [7, 8, 9, 0])
    out = pairwise_loss(ids, rewards, pad_id=0)
    assert out["chosen_mean_scores"].tolist() == [rewards[0, 2].item(), rewards[1, 3].item()]
    assert out["rejected_mean_scores"].tolist() == [rewards[2, 1].item(), rewards[3, 2].item()]


def test_leading_pad_id_can_belong_to_the_text():
    """OPT in DeepSpeed-Chat: bos is the pad id, so the first pad id does not end the text."""
    ids, rewards = batch([2, 5, 6, 2, 2], [2, 5, 7, 8, 2])
    out = pairwise_loss(ids, rewards, pad_id=2, num_padding_at_beginning=1)
    assert out["loss"].item() == pytest.approx(bradley_terry(rewards, 0, 1, [2, 3]), abs=1e-12)
    assert out["chosen_mean_scores"].item() == rewards[0, 2].item()
    empty, rewards = batch([2, 2, 2], [2, 5, 2])  # a text of nothing but its bos
    out = pairwise_loss(empty, rewards, pad_id=2, num_padding_at_beginning=1)
    assert out["loss"].item() == pytest.approx(bradley_terry(rewards, 0, 1, [1]), abs=1e-12)
    assert out["chosen_mean_scores"].item() == rewards[0, 0].item()


def test_mask_tells_where_a_text_with_the_pad_id_inside_ends():
    ids, rewards = batch([1, 0, 2, 3, 0], [1, 0, 2, 4, 5])
    mask = torch.tensor([[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]])
    out = pairwise_loss(ids, rewards, pad_id=0, attention_mask=mask)
    assert out["loss"].item() == pytest.approx(bradley_terry(rewards, 0, 1, [3, 4]), abs=1e-12)
    assert out["chosen_mean_scores"].item() == rewards[0, 3].item()
    assert out["rejected_mean_scores"].item() == rewards[1, 4].item()


def test_texts_diverge_where_one_has_ended_even_if_the_other_goes_on_with_the_pad_id():
    ids, rewards = batch([1, 2, 0, 3], [1, 2, 0, 0])
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    out = pairwise_loss(ids, rewards, pad_id=0, attention_mask=mask)
    assert out["loss"].item() == pytest.approx(bradley_terry(rewards, 0, 1, [2, 3]), abs=1e-12)


def test_ids_beyond_both_ends_do_not_count():
    ids, rewards = batch([1, 2, 8, 0], [1, 2, 9, 0])
    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 0, 0]])
    out = pairwise_loss(ids, rewards, pad_id=0, attention_mask=mask)  # identical texts
    assert out["loss"].item() == pytest.approx(bradley_terry(rewards, 0, 1, [3]), abs=1e-12)


def test_ids_in_front_of_a_left_padded_pair_do_not_count():
    """Step 3 pads prompts so. Where both rows begin at the same column, the mask is enough."""
    ids, rewards = batch([7, 1, 2, 0], [8, 1, 2, 3])
    mask = torch.tensor([[0, 1, 1, 0], [0, 1, 1, 1]])
    out = pairwise_loss(ids, rewards, pad_id=0, attention_mask=mask)
    assert out["loss"].item() == pytest.approx(bradley_terry(rewards, 0, 1, [3]), abs=1e-12)
    assert out["chosen_mean_scores"].item() == rewards[0, 2].item()
    assert out["rejected_mean_scores"].item() == rewards[1, 3].item()


def test_brute_force():
    """Random texts whose ends are known: no search for them can be wrong in the same way."""
    rng = random.Random(0)
    for seed in range(300):
        texts = []
        B, L = rng.randint(1, 4), rng.randint(1, 9)
        for _ in range(B):
            prompt = [
                rng.randint(0, 2) for _ in range(rng.randint(0, L))
            ]  # 0, the pad id, occurs in texts
            texts.append(
                [
                    (prompt + [rng.randint(0, 2) for _ in range(rng.randint(0, L))])[:L] or [1]
                    for _ in range(2)
                ]
            )
        rows = [pair[0] for pair in texts] + [pair[1] for pair in texts]
        ids, rewards = batch(*[row + [0] * (L - len(row)) for row in rows], seed=seed)
        mask = torch.tensor([[1] * len(row) + [0] * (L - len(row)) for row in rows])
        expected = 0.0
        for i, (chosen, rejected) in enumerate(texts):
            if chosen == rejected:
                region = [L - 1]
            else:
                start = next(t for t in range(L) if chosen[: t + 1] != rejected[: t + 1])
                region = range(start, max(len(chosen), len(rejected)))
            expected += bradley_terry(rewards, i, B + i, region) / B
        out = pairwise_loss(ids, rewards, pad_id=0, attention_mask=mask)
        assert out["loss"].item() == pytest.approx(expected, abs=1e-12)
        assert out["chosen_mean_scores"].tolist() == [
            rewards[i, len(rows[i]) - 1].item() for i in range(B)
        ]
        assert out["rejected_mean_scores"].tolist() == [
            rewards[B + i, len(rows[B + i]) - 1].item() for i in range(B)
        ]
        if not any(0 in row for row in rows):  # then the pad id says the same as the mask
            assert pairwise_loss(ids, rewards, pad_id=0)["loss"].item() == out["loss"].item()


def test_gradient_is_the_finite_difference():
    ids, rewards = batch([1, 2, 3, 0, 0], [1, 1, 1, 1, 2], [1, 2, 4, 5, 0], [1, 3, 0, 0, 0])
    assert torch.autograd.gradcheck(
        lambda r: pairwise_loss(ids, r, pad_id=0)["loss"], rewards, eps=1e-6, atol=1e-8
    )


def test_large_margins_stay_finite():
    """-log(sigmoid(x)) as written is inf at x = -1000; logsigmoid gives 1000, and slope -1."""
    ids = torch.tensor([[1, 2], [1, 3]])
    rewards = torch.tensor([[0.0, -500.0], [0.0, 500.0]], requires_grad=True)
    loss = pairwise_loss(ids, rewards, pad_id=0)["loss"]
    loss.backward()
    assert loss.item() == 1000.0
    assert rewards.grad.tolist() == [[0.0, -1.0], [0.0, 1.0]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dtype_is_kept(dtype):
    ids, rewards = batch([1, 2], [1, 3])
    out = pairwise_loss(ids, rewards.to(dtype), pad_id=0)
    assert {value.dtype for value in out.values()} == {dtype}


# --------------------------------------------------------------------------------------------------
# Variants of a pair's term


def test_variants_by_hand():
    """In plain Python: the region or the ends alone, less a margin, plus what centers."""
    ids, rewards = batch([1, 2, 3, 0, 0], [1, 4, 5, 6, 7], [1, 2, 4, 5, 0], [1, 4, 5, 6, 7])
    ends, regions, margins, center = [(2, 3), (4, 4)], [[2, 3], [4]], [0.7, -0.3], 0.05
    term = lambda difference: math.log1p(math.exp(-difference))
    for loss, positions in (
        ("divergent", [[(t, t) for t in region] for region in regions]),
        ("end", [[pair] for pair in ends]),
    ):
        expected = 0.0
        for i, places in enumerate(positions):
            expected += (
                sum(
                    term(rewards[i, a].item() - rewards[2 + i, b].item() - margins[i])
                    for a, b in places
                )
                / len(places)
                / 2
            )
            expected += (
                center
                * (rewards[i, ends[i][0]].item() + rewards[2 + i, ends[i][1]].item()) ** 2
                / 2
            )
        out = pairwise_loss(
            ids,
            rewards,
            0,
            loss=loss,
            margins=torch.tensor(margins),
            center_rewards_coefficient=center,
        )
        assert out["loss"].item() == pytest.approx(expected, abs=1e-7)  # margins of float32
        out = pairwise_loss(
            ids, rewards, 0, loss=loss, margins=margins, center_rewards_coefficient=center
        )
        assert out["loss"].item() == pytest.approx(expected, abs=1e-12)


def test_loss_of_the_ends_reads_nothing_else():
    ids, rewards = batch([1, 2, 3, 0, 0], [1, 2, 4, 5, 6])
    pairwise_loss(ids, rewards, 0, loss="end")["loss"].backward()
    assert rewards.grad.nonzero().tolist() == [[0, 2], [1, 4]]


def test_centering_alone_pulls_the_sum_of_the_ends_to_zero():
    """Its gradient is 2 c (r_chosen + r_rejected) at both ends, and moves no difference."""
    ids, rewards = batch([1, 2], [1, 3])
    gradients = [
        torch.autograd.grad(
            pairwise_loss(ids, rewards, 0, center_rewards_coefficient=c)["loss"], rewards
        )[0]
        for c in (0.0, 0.5)
    ]
    expected = torch.zeros_like(rewards)
    expected[:, 1] = rewards.detach()[:, 1].sum()
    torch.testing.assert_close(gradients[1] - gradients[0], expected, atol=1e-12, rtol=0)


def test_no_margin_and_no_centering_change_no_bit():
    ids, rewards = batch([1, 2, 3, 0], [1, 2, 4, 5])
    assert (
        pairwise_loss(ids, rewards, 0, margins=[0.0], center_rewards_coefficient=0.0)["loss"]
        == pairwise_loss(ids, rewards, 0)["loss"]
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_target_of_1_changes_no_bit_and_computes_nothing_more(dtype, monkeypatch):
    """Neither beside a margin nor beside pairs of other targets."""
    calls, logsigmoid = [], torch.nn.functional.logsigmoid
    monkeypatch.setattr(
        torch.nn.functional, "logsigmoid", lambda x: calls.append(x.shape) or logsigmoid(x)
    )
    for seed in range(20):
        rows = [1, 2, 3, 0, 0], [7, 2, 4, 5, 6], [1, 2, 4, 5, 6], [8, 2, 3, 0, 0]
        ids, rewards = batch(*rows, seed=seed)
        rewards = rewards.detach().to(dtype).requires_grad_()
        difference = rewards[:2] - rewards[2:] - torch.tensor([[0.3], [0.0]], dtype=dtype)
        terms = [-logsigmoid(difference[0, 2:5]).mean(), -logsigmoid(difference[1]).mean()]
        expected = torch.stack(terms).mean()
        calls.clear()
        given = pairwise_loss(ids, rewards, 0, margins=[0.3, 0.0], targets=[1, 1.0])["loss"]
        assert calls == [(3,), (5,)]
        without = pairwise_loss(ids, rewards, 0, margins=[0.3, 0.0])["loss"]
        assert given == without == expected
        gradients = [torch.autograd.grad(x, rewards)[0] for x in (given, without, expected)]
        assert torch.equal(gradients[0], gradients[1]) and torch.equal(gradients[0], gradients[2])
        mixed = pairwise_loss(ids, rewards, 0, margins=[0.3, 0.0], targets=[1.0, 0.25])["loss"]
        assert torch.equal(torch.autograd.grad(mixed, rewards)[0][0], gradients[0][0])


@pytest.mark.parametrize("loss", ["divergent", "end"])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-6), (torch.float64, 1e-14)])
def test_target_gives_the_cross_entropy_of_torch_at_every_position(dtype, tolerance, loss):
    """With gradients; probabilities that no binary fraction holds among them."""
    targets = [0.7, 0.0, 1.0, 0.5, 1 / 3]
    chosen = [[1, 2, 3, 4, 5], [1, 6, 0, 0, 0], [2, 3, 4, 0, 0], [9, 0, 0, 0, 0], [1, 1, 1, 1, 2]]
    rejected = [[1, 2, 7, 0, 0], [1, 2, 3, 4, 5], [2, 3, 5, 0, 0], [8, 8, 0, 0, 0], [1, 1, 1, 1, 3]]
    regions, ends = (
        [(2, 5), (1, 5), (2, 3), (0, 2), (4, 5)],
        [(4, 2), (1, 4), (2, 2), (0, 1), (4, 4)],
    )
    for seed in range(10):
        ids, rewards = batch(*chosen, *rejected, seed=seed)
        rewards = (5 * rewards.detach()).to(dtype).requires_grad_()
        terms = []
        for i, (p, (start, stop)) in enumerate(zip(targets, regions)):
            logits = rewards[i, start:stop] - rewards[5 + i, start:stop]
            if loss == "end":
                logits = rewards[i, ends[i][0]] - rewards[5 + i, ends[i][1]]
            label = torch.full_like(logits, p)
            terms.append(torch.nn.functional.binary_cross_entropy_with_logits(logits, label))
        expected = torch.stack(terms).mean()
        found = pairwise_loss(ids, rewards, 0, loss=loss, targets=targets)["loss"]
        assert found.dtype == dtype
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
        ours, theirs = (torch.autograd.grad(x, rewards)[0] for x in (found, expected))
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


def soft_bradley_terry(rewards, chosen, rejected, positions, p):
    """The mean over positions of the cross-entropy of p and the model's probability, by hand."""
    total = 0.0
    for t in positions:
        q = 1 / (1 + math.exp(rewards[rejected, t].item() - rewards[chosen, t].item()))
        total -= p * math.log(q) + (1 - p) * math.log(1 - q)
    return total / len(positions)


def test_targets_by_brute_force():
    """Random texts, targets of every kind, a margin beside some targets of 1; in plain Python."""
    rng = random.Random(1)
    for seed in range(200):
        B, L = rng.randint(1, 4), rng.randint(2, 9)
        texts = [[rng.choices(range(1, 4), k=rng.randint(1, L)) for _ in "ab"] for _ in range(B)]
        rows = [pair[0] for pair in texts] + [pair[1] for pair in texts]
        ids, rewards = batch(*[row + [0] * (L - len(row)) for row in rows], seed=seed)
        targets = [rng.choice([0.0, 0.5, 1.0, rng.random()]) for _ in range(B)]
        margins = [rng.choice([0.0, 1.5]) if p == 1 else 0.0 for p in targets]
        expected = 0.0
        for i, (chosen, rejected) in enumerate(texts):
            region = [L - 1]
            if chosen != rejected:
                start = next(t for t in range(L) if chosen[: t + 1] != rejected[: t + 1])
                region = range(start, max(len(chosen), len(rejected)))
            shifted = rewards.detach().clone()
            shifted[i] -= margins[i]
            expected += soft_bradley_terry(shifted, i, B + i, region, targets[i]) / B
        out = pairwise_loss(ids, rewards, 0, targets=targets, margins=margins)
        assert out["loss"].item() == pytest.approx(expected, abs=1e-12)
        plain = pairwise_loss(ids, rewards, 0)
        for name in ("chosen_mean_scores", "rejected_mean_scores"):
            assert torch.equal(out[name], plain[name])  # targets move the loss alone


@pytest.mark.parametrize("loss", ["divergent", "end"])
def test_gradient_with_targets_is_the_finite_difference(loss):
    ids, rewards = batch([1, 2, 3, 0, 0], [1, 1, 1, 1, 2], [1, 2, 4, 5, 0], [1, 3, 0, 0, 0])
    options = {"loss": loss, "targets": [0.3, 0.0], "center_rewards_coefficient": 0.1}
    assert torch.autograd.gradcheck(
        lambda r: pairwise_loss(ids, r, 0, **options)["loss"], rewards, eps=1e-6, atol=1e-8
    )


def test_target_of_0_is_the_reversed_pair_and_p_is_1_minus_p_of_it():
    ids, rewards = batch([1, 2, 3, 0], [7, 2, 0, 0], [1, 2, 4, 5], [7, 3, 4, 5])
    swapped_ids, swapped_rewards = ids[[2, 3, 0, 1]], rewards[[2, 3, 0, 1]]
    for p in (0.0, 0.25, 0.5):
        found = pairwise_loss(ids, rewards, 0, targets=[p, p])["loss"]
        reversed_ = pairwise_loss(swapped_ids, swapped_rewards, 0, targets=[1 - p, 1 - p])["loss"]
        assert found.item() == pytest.approx(reversed_.item(), abs=1e-15)
    found = pairwise_loss(ids, rewards, 0, targets=[0.0, 0.0])["loss"]
    assert found == pairwise_loss(swapped_ids, swapped_rewards, 0)["loss"]


def test_gradient_of_a_target_is_the_probability_less_the_target():
    """It vanishes where the model's probability is the target: 0.8 at a difference of log 4."""
    ids = torch.tensor([[1, 2], [1, 3]])
    for p, difference in ((0.8, math.log(4)), (0.5, 0.0), (0.8, 0.0), (0.1, 2.0)):
        rewards = torch.tensor([[0.0, difference], [0.0, 0.0]], dtype=torch.float64)
        rewards.requires_grad_()
        pairwise_loss(ids, rewards, 0, targets=[p])["loss"].backward()
        slope = 1 / (1 + math.exp(-difference)) - p
        assert rewards.grad[:, 1].tolist() == pytest.approx([slope, -slope], abs=1e-15)


@pytest.mark.parametrize("difference, loss", [(1000.0, 750.0), (-1000.0, 250.0)])
def test_large_differences_stay_finite_with_a_target(difference, loss):
    """log(1 - sigmoid(x)) as written is -inf at x = 1000."""
    ids = torch.tensor([[1, 2], [1, 3]])
    rewards = torch.tensor([[0.0, difference], [0.0, 0.0]], requires_grad=True)
    found = pairwise_loss(ids, rewards, 0, targets=[0.25])["loss"]
    found.backward()
    assert found.item() == loss
    slope = 0.75 if difference > 0 else -0.25
    assert rewards.grad.tolist() == [[0.0, slope], [0.0, -slope]]


@pytest.mark.parametrize(
    "options, words",
    [
        ({"loss": "last"}, ["loss", "'last'", "divergent or end"]),
        ({"center_rewards_coefficient": -0.1}, ["center_rewards_coefficient", "-0.1", "from 0"]),
        ({"center_rewards_coefficient": math.nan}, ["center_rewards_coefficient", "nan"]),
        ({"center_rewards_coefficient": "1"}, ["center_rewards_coefficient", "'1'"]),
        ({"margins": torch.ones(1, 2)}, ["margins", "of shape [1, 2]", "each of 2"]),
        ({"margins": ["1", "2"]}, ["margins", "values of dtype", "each of 2"]),
        ({"margins": [1.0, None]}, ["margins", "values of dtype object", "each of 2"]),
        ({"margins": [1.0]}, ["margins", "found 1 number", "each of 2"]),
        ({"margins": [0.0, math.nan]}, ["margins", "nan for pair 1"]),
        ({"targets": [1.0]}, ["targets", "found 1 number", "from 0 to 1 for each of 2"]),
        ({"targets": [1.0, 0.5, 1.0]}, ["targets", "found 3 numbers", "from 0 to 1 for each of 2"]),
        ({"targets": torch.ones(2, 1)}, ["targets", "of shape [2, 1]", "each of 2"]),
        ({"targets": [1.0, math.nan]}, ["targets", "nan for pair 1", "from 0 to 1"]),
        ({"targets": [1.0, math.inf]}, ["targets", "inf for pair 1", "from 0 to 1"]),
        ({"targets": [1.0, -0.25]}, ["targets", "-0.25 for pair 1", "from 0 to 1"]),
        ({"targets": [1.0, 1.25]}, ["targets", "1.25 for pair 1", "from 0 to 1"]),
        (
            {"targets": [1.0, 0.75], "margins": [0.5, 0.5]},
            ["targets", "0.75 for pair 1", "margin 0.5", "needs target 1"],
        ),
        (
            {"targets": [1.0, 0.0], "margins": [0.5, -2.0]},
            ["targets", "0.0 for pair 1", "margin -2.0", "needs target 1"],
        ),
    ],
    ids=str,
)
def test_bad_variants_are_refused(options, words):
    with pytest.raises(ValueError) as error:
        pairwise_loss(*batch([1, 2], [4, 5], [1, 3], [4, 6]), 0, **options)
    assert all(word in str(error.value) for word in words), error.value


# --------------------------------------------------------------------------------------------------
# What is refused, and how it is said

MASK = torch.tensor([[1, 1, 1, 0]] * 2)


@pytest.mark.parametrize(
    "rows, kwargs, words",
    [
        # A pad id in the shared prompt ends both texts before they differ: DeepSpeed-Chat's mean
        # over nothing is NaN.
        (
            [[1, 2, 3, 4], [1, 0, 2, 3], [1, 2, 3, 5], [1, 0, 2, 4]],
            {},
            ["pair 1", "rows 1 and 3", "column 1", "attention_mask"],
        ),
        ([[0, 1, 2, 3], [1, 2, 4, 0]], {}, ["row 0", "left", "attention_mask"]),
        ([[1, 2, 3, 0], [0, 0, 1, 2]], {}, ["row 1", "left", "attention_mask"]),
        (
            [[2, 2, 5, 6], [2, 5, 7, 2]],
            {"pad_id": 2, "num_padding_at_beginning": 1},
            ["row 0", "left", "attention_mask"],
        ),
        ([[1, 2, 3, 0], [0, 0, 0, 0]], {}, ["row 1", "no token"]),
        ([[1, 2, 3, 4]] * 3, {}, ["3 rows", "even"]),
        (
            [[1, 2, 3, 4]] * 2,
            {"attention_mask": torch.ones(2, 3)},
            ["attention_mask", "[2, 3]", "[2, 4]"],
        ),
        (
            [[1, 2, 3, 4]] * 2,
            {"attention_mask": MASK * torch.tensor([[1], [0]])},
            ["row 1", "no token"],
        ),
        (
            [[1, 2, 3, 4]] * 2,  # a mask that is added to attention has it the other way round
            {"attention_mask": torch.tensor([[0.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, -1e9]])},
            ["attention_mask", "row 1", "-1000000000.0 at column 3", "expected 1 on text"],
        ),
        ([[1, 2, 3, 4]] * 2, {"attention_mask": MASK * math.nan}, ["row 0", "nan at column 0"]),
        ([[1, 2, 3, 4]] * 2, {"attention_mask": MASK * 2}, ["row 0", "2 at column 0"]),
        ([[1, 2, 3, 4]] * 2, {"attention_mask": MASK.tolist()}, ["[2, 4]", "found list"]),
        ([[1, 2, 3, 4]] * 2, {"margins": [[1.0], [1.0, 2.0]]}, ["margins: found values of"]),
        ([[1, 2, 3, 4]] * 2, {"center_rewards_coefficient": None}, ["coefficient: found None"]),
        ([[1, 2, 3, 4]] * 2, {"pad_id": None}, ["pad_id", "None", "a token id"]),
        ([[1, 2, 3, 4]] * 2, {"pad_id": "0"}, ["pad_id", "'0'", "a token id"]),
        ([[1, 2, 3, 4]] * 2, {"pad_id": 0.5}, ["pad_id", "0.5", "a token id"]),
        *(
            ([[1, 2, 3, 4]] * 2, {"num_padding_at_beginning": n}, ["num_padding_at_beginning"])
            for n in (-1, 1.5, True, "1")
        ),
        (
            [[0, 1, 2, 3], [1, 2, 3, 4]],
            {"attention_mask": torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]])},
            ["pair 0", "column 1", "left"],
        ),
    ],
    ids=lambda x: x[0] if isinstance(x, list) and isinstance(x[0], str) else "",
)
def test_refused(rows, kwargs, words):
    ids, rewards = batch(*rows)
    with pytest.raises(ValueError) as error:
        pairwise_loss(ids, rewards, **{"pad_id": 0, **kwargs})
    assert all(word in str(error.value) for word in words), error.value


@pytest.mark.parametrize(
    "rewards",
    [
        torch.zeros(2, 3),
        torch.zeros(2, 4, 1),
        torch.zeros(2, 4).bfloat16(),
        torch.zeros(2, 4).long(),
        [[0.0] * 4] * 2,
    ],
    ids=["short", "3D", "bfloat16", "integers", "a list"],
)
def test_rewards_of_another_shape_or_kind_are_refused(rewards):
    with pytest.raises(ValueError, match="rewards: expected float32 or float64"):
        pairwise_loss(torch.tensor([[1, 2, 3, 4]] * 2), rewards, pad_id=0)


@pytest.mark.parametrize(
    "ids",
    [
        torch.ones(4).long(),
        torch.ones(2, 4),
        torch.ones(2, 0).long(),
        torch.ones(2, 4).bool(),
        torch.ones(2, 4).byte(),
        torch.ones(2, 4).long().numpy(),
        [[1, 1, 1, 1]] * 2,
        None,
    ],
    ids=["1D", "float", "empty", "mask", "bytes", "numpy", "lists", "none"],
)
def test_input_ids_of_another_shape_or_kind_are_refused(ids):
    with pytest.raises(ValueError, match="input_ids: expected integers"):
        pairwise_loss(ids, torch.zeros(2, 4), pad_id=0)


def test_readme_works_a_pair_by_hand():
    """The table of the README, computed again: ids are numbers of the words, padding is 0."""
    lines = (Path(__file__).parent / "README.md").read_text().splitlines()
    text = " ".join(line.strip() for line in lines)
    table = {
        cells[0]: cells[1:]
        for line in lines
        if (cells := [cell.strip() for cell in line.strip("|").split("|")])[0]
        in (
            "chosen",
            "rejected",
            "reward, chosen",
            "reward, rejected",
            "difference",
            "-logsigmoid(difference)",
        )
    }
    words = {"padding": 0}
    ids = torch.tensor(
        [
            [words.setdefault(word, len(words)) for word in table[row]]
            for row in ("chosen", "rejected")
        ]
    )
    rewards = torch.tensor(
        [
            [float(number) for number in table[row]]
            for row in ("reward, chosen", "reward, rejected")
        ],
        dtype=torch.float64,
        requires_grad=True,
    )
    out = pairwise_loss(ids, rewards, pad_id=0)
    out["loss"].backward()
    numbers = {
        name: [number and float(number) for number in table[name]]
        for name in ("difference", "-logsigmoid(difference)")
    }
    difference = (rewards[0] - rewards[1]).tolist()
    region = [t for t, number in enumerate(numbers["difference"]) if number != ""]
    assert (
        region
        == list(range(*divergent_region([i for i in ids[0].tolist() if i], ids[1].tolist())))
        == [3, 4, 5, 6]
    )
    for t in region:
        assert numbers["difference"][t] == pytest.approx(difference[t], abs=1e-12)
        assert numbers["-logsigmoid(difference)"][t] == pytest.approx(
            math.log1p(math.exp(-difference[t])), abs=5e-5
        )
    assert re.search(r"the mean of the four: \*\*(.*?)\*\*", text)[1] == f"{out['loss']:.4f}"
    assert rewards.grad.abs().sum(0).nonzero().flatten().tolist() == region and torch.equal(
        rewards.grad[0], -rewards.grad[1]
    )
    assert (
        f"{-rewards.grad[0, 3]:.4f} at position 3, where the model is wrong, "
        f"and {-rewards.grad[0, 4]:.4f} at position 4" in text
    )
    chosen, rejected = out["chosen_mean_scores"].item(), out["rejected_mean_scores"].item()
    assert f"{chosen} for the chosen response, at its end; {rejected} for the rejected one" in text
    probability = 1 / (1 + math.exp(rejected - chosen))
    assert f"sigmoid({chosen} - {rejected}) = **{probability:.4f}**" in text


def test_readme_points_at_lines_that_exist():
    """The README's table of six steps names functions and comments of rm.py that are there."""
    here = Path(__file__).parent
    rows = [
        line
        for line in (here / "README.md").read_text().splitlines()
        if re.match(r"\| [1-6]\. ", line)
    ]
    assert len(rows) == 6
    loop = inspect.getsource(pairwise_loss)
    for number, row in enumerate(rows, start=1):
        names = [
            name
            for name in re.findall(r"`([A-Za-z_.]+)`", row.split("|")[2])
            if "." not in name or name.startswith("RewardModel.")
        ]
        assert names and all(operator.attrgetter(name)(rm) for name in names if name != "collate")
        assert loop.count(f"# {number}. ") == (1 if number >= 3 else 0)
