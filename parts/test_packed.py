"""The packed layout: by hand, by definition, and against the padded layout.

DeepSpeed-Chat's numbers in both layouts are in test_model.py.
"""

import copy
import inspect
import itertools
import math
import random
from contextlib import nullcontext
from dataclasses import replace
from unittest import mock

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import data
from model import GPT, scaled_dot_product
from parts.compiling import compile_blocks
from parts.packed import PackedAttention, packed_size, plan_varlen, reward_places
from rm import RewardModel
from test_model import BIASES, SCALED, small
from tools import bench

KINDS = [
    ("gpt2", {}),
    ("opt", {}),
    ("opt", {"pre_norm": False, "embed_dim": 8}),
    ("llama", {}),
    ("llama", {"n_kv_head": 2}),
    ("llama", SCALED),
    ("llama", BIASES | {"mlp_bias": True}),
    ("mistral", {"sliding_window": 32}),
    ("qwen2", {"n_kv_head": 2}),
    ("qwen3", {"n_kv_head": 2, "head_dim": 6}),
    ("gpt_neox", {"n_embd": 32}),
    ("gpt_neox", {"n_embd": 32, "parallel_residual": False}),
]


def lively(model_type, **overrides):
    """Make a small model whose numbers are large enough to show mistakes."""
    torch.manual_seed(0)
    model = RewardModel(GPT(small(model_type, **overrides)), pad_id=0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def random_groups(seed, sizes=range(2, 7), vocab_size=50):
    """Draw comparisons with every relation that texts can have.

    They share a start or nothing, are prefixes of each other or equal, and have pad ids inside.
    """
    rng = random.Random(seed)
    groups = []
    for size in sizes:
        trunk = rng.choices(range(vocab_size), k=rng.choice((0, 1, 5, 11)))
        group = [
            trunk + rng.choices(range(vocab_size), k=rng.randint(0 if trunk else 1, 12))
            for _ in range(size)
        ]
        if rng.random() < 0.3:
            end = rng.randint(1, len(group[0]))
            group[-1] = group[0][:end]  # a prefix of another, or equal to it
        groups.append(group)
    return groups


def rewards_of_texts(model, batch):
    """Compute the rewards behind the trunk, for each comparison a list of (N,) for each text."""
    rewards = model.packed_rewards(batch)
    return [[rewards[places] for places in texts] for texts in reward_places(batch)]


def padded(model, groups):
    """Compute loss and scores of comparisons in the padded layout, one after the other.

    The loss is the mean over the pairs of a comparison, then over the comparisons.
    """
    losses, scores = [], []
    for group in groups:
        better, worse = zip(*itertools.combinations(group, 2))
        out = model(*data.pad_rows([*better, *worse], model.pad_id))
        losses.append(out["loss"])
        scores.append((out["chosen_mean_scores"], out["rejected_mean_scores"]))
    chosen, rejected = (torch.cat(column) for column in zip(*scores))
    return {
        "loss": torch.stack(losses).mean(),
        "chosen_mean_scores": chosen,
        "rejected_mean_scores": rejected,
    }


# --------------------------------------------------------------------------------------------------
# Layout


def test_packed_batch_by_hand():
    batch = data.pack([[[5, 6, 7, 8], [5, 6, 9]], [[1], [2, 3]]], pad_id=0)
    assert (batch.trunks, batch.branches, batch.tails) == ([2, 0], [2, 1, 1, 2], [0, 1, 1, 0])
    trunks, branches, tails = [5, 6], [7, 8, 9, 1, 2, 3], [0, 0]
    assert batch.input_ids.tolist() == trunks + branches + tails
    assert batch.positions.tolist() == [0, 1] + [2, 3, 2, 0, 0, 1] + [3, 1]
    assert batch.num_tokens == 10 == sum(map(packed_size, batch.token_groups))
    assert batch.length == 4
    # The score of the second text is read at its last token, in its branch.
    prefix = data.pack([[[5, 6, 7], [5, 6]]], pad_id=0)
    assert (prefix.trunks, prefix.branches, prefix.tails) == ([1], [2, 1], [0, 1])


@pytest.mark.parametrize(
    "groups, words",
    [
        ([], ["no comparison"]),
        ([[[1], [2]], [[1, 2]]], ["comparison 1", "2 or more"]),
        ([[[1], []]], ["comparison 0", "[1, 0]"]),
    ],
)
def test_bad_groups_are_refused(groups, words):
    with pytest.raises(ValueError) as error:
        data.pack(groups, pad_id=0)
    assert all(word in str(error.value) for word in words), error.value


# --------------------------------------------------------------------------------------------------
# Attention


@pytest.mark.parametrize("model_type, overrides", KINDS)
def test_no_token_attends_to_another_comparison_or_branch_or_to_padding(model_type, overrides):
    """Compare which embeddings each reward depends on, by gradients, with the definition."""
    model = lively(model_type, **overrides).double()
    # Every id but the shared ones belongs to one text.
    groups = [[[1, 2, 3, 4], [1, 2, 5], [1, 2, 6, 7, 8]], [[11, 12, 13], [11, 14]]]
    rewards = rewards_of_texts(model, data.pack(groups, pad_id=0))
    for group, rows in zip(groups, rewards):
        for text, row in zip(group, rows):
            trunk = max(map(len, group)) - len(row)
            for column, reward in enumerate(row, start=trunk):
                embed = model.backbone.embed.weight
                (grad,) = torch.autograd.grad(reward, embed, retain_graph=True)
                seen = set(grad.abs().sum(1).nonzero().flatten().tolist())
                expected = set(text[: column + 1])
                if column >= len(text):
                    expected.add(0)
                assert seen == expected, (text, column)


def varlen_of_2_13(
    q, k, v, cu_seq_q, cu_seq_k, max_q, max_k, *, window_size=(-1, -1), enable_gqa=False
):
    """Refuse grouped heads unless told, as PyTorch 2.13's varlen_attn does."""
    assert enable_gqa == (q.shape[1] != k.shape[1])
    return varlen_of_2_11(q, k, v, cu_seq_q, cu_seq_k, max_q, max_k, window_size=window_size)


def varlen_of_2_11(q, k, v, cu_seq_q, cu_seq_k, max_q, max_k, *, window_size=(-1, -1)):
    """Compute by definition what torch.nn.attention.varlen.varlen_attn computes on GPUs alone.

    Causal is aligned to the ends. PyTorch 2.11 takes grouped heads without being told.
    """
    result = []
    assert cu_seq_q.dtype == cu_seq_k.dtype == torch.int32 and q.shape[-1] % 8 == 0
    for n in range(len(cu_seq_q) - 1):
        (a, b), (c, d) = cu_seq_q[n : n + 2].tolist(), cu_seq_k[n : n + 2].tolist()
        assert 0 < b - a <= max_q and 0 < d - c <= max_k
        keys, values = (x[c:d].repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q[a:b], keys) / q.shape[-1] ** 0.5
        if window_size == (-1, 0):
            seen = torch.arange(d - c) <= torch.arange(b - a)[:, None] + (d - c) - (b - a)
            scores = scores.masked_fill(~seen, -math.inf)
        result.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), values))
    return torch.cat(result)


@pytest.mark.parametrize("longest_tail", [None, 1, 0])
@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("varlen_attn", [varlen_of_2_11, varlen_of_2_13])
def test_the_gpu_path_computes_in_two_calls_what_many_calls_compute(
    varlen_attn, kv_heads, longest_tail, monkeypatch
):
    """Test which rows go where, which a CPU can tell; with queries of trunks, and without them.

    Where no tail is longer than a token, a single call does it.
    """
    import torch.nn.attention.varlen

    calls = mock.Mock(side_effect=varlen_attn, __signature__=inspect.signature(varlen_attn))
    monkeypatch.setattr(torch.nn.attention.varlen, "varlen_attn", calls)
    torch.manual_seed(0)
    for seed in range(5):
        batch = data.pack(random_groups(seed), 0, longest_tail=longest_tail)
        batch = replace(batch, calls=plan_varlen(batch))
        n_text = batch.num_tokens - sum(batch.tails)
        q, k, v = (
            torch.randn(n, heads, 8, dtype=torch.float64)
            for n, heads in ((batch.num_tokens, 4), (n_text, kv_heads), (n_text, kv_heads))
        )
        for queries in (q, q[sum(batch.trunks) :]):
            many = PackedAttention(batch, scaled_dot_product)
            two = PackedAttention(batch, scaled_dot_product)
            expected = many.with_masks(queries, k, v, 0.0)
            for _ in range(2):  # the second time by the plan of the first
                calls.reset_mock()
                found = two.with_varlen(queries, k, v)
                assert calls.call_count == 1 + (max(batch.tails) > 1)
                torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)
                found = many.with_masks(queries, k, v, 0.0)
                torch.testing.assert_close(found, expected, atol=0, rtol=0)


# --------------------------------------------------------------------------------------------------
# What a GPU would do, on stand-ins


@torch.library.custom_op("test_packed::varlen", mutates_args=())
def varlen_operator(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seq_q: torch.Tensor,
    cu_seq_k: torch.Tensor,
    max_q: int,
    max_k: int,
    window_size: list[int],
) -> torch.Tensor:
    """Compute attention as one operator, as on a GPU, with a gradient that is wrong but cheap."""
    lengths = cu_seq_q, cu_seq_k, max_q, max_k
    return varlen_of_2_11(q, k, v, *lengths, window_size=tuple(window_size))


@varlen_operator.register_fake
def varlen_on_meta(q, *rest):
    return torch.empty_like(q)


def keep_shape(ctx, inputs, output):
    ctx.shape = inputs[1].shape


def cheap_gradient(ctx, gradient):
    keys = gradient.new_zeros(ctx.shape)
    return gradient, keys, keys, None, None, None, None, None


varlen_operator.register_autograd(cheap_gradient, setup_context=keep_shape)


def varlen_attn(q, k, v, *lengths, window_size):
    return varlen_operator(q, k, v, *lengths, list(window_size))


@pytest.fixture
def flash(monkeypatch):
    """Let packed batches attend by a stand-in for the flash kernel, on any device."""
    import torch.nn.attention.varlen

    monkeypatch.setattr(torch.nn.attention.varlen, "varlen_attn", varlen_attn)
    monkeypatch.setattr("parts.packed.can_use_varlen", lambda q, dropout_p: True)


class NoWaiting(TorchDispatchMode):
    """Raise an AssertionError where the host would wait for the device `meta`.

    It waits for a value (`.item()`, which meta tensors refuse by themselves), for a copy to the
    host, and for a copy to the device that does not say `non_blocking`.
    """

    copies = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        before = {x.device.type for x in tree_leaves((args, kwargs)) if torch.is_tensor(x)}
        after = {x.device.type for x in tree_leaves(out) if torch.is_tensor(x)}
        if before and before != after:
            self.copies += 1
            assert after == {"meta"} and kwargs.get("non_blocking"), f"{func} waits"
        return out


class NoListsOnTheDevice(TorchFunctionMode):
    """Raise an AssertionError where a list becomes a tensor of a device: such a copy waits."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func in (torch.tensor, torch.as_tensor, torch.Tensor.new_tensor):
            assert out.device.type == "cpu", f"{func} waits"
        return out


@pytest.mark.parametrize("loss", ["divergent", "end"])
@pytest.mark.parametrize("attention", ["flash", "masks"])
@pytest.mark.parametrize("model_type", ["gpt2", "opt", "llama", "gpt_neox"])
def test_nothing_waits_for_the_device_between_two_steps(
    model_type, attention, loss, monkeypatch, request
):
    """Pack, compute, differentiate and clip on the meta device; the loop then reads the loss."""
    if attention == "flash":
        request.getfixturevalue("flash")
    # The meta device has no autocast; with it, casts join that do not leave the device.
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: False)
    model = lively(model_type).to("meta")
    model.loss = loss
    model.center_rewards_coefficient = 0.1
    step = bench.Ours(model)
    groups = random_groups(0, sizes=(2, 2, 3))
    with NoWaiting() as mode, NoListsOnTheDevice():
        value, tokens = step.forward_backward(groups)
        norm = step.clip()
        copied = mode.copies
        with pytest.raises(RuntimeError):  # reading is what waits
            (value + norm).item()
        with pytest.raises(AssertionError, match="waits"):
            torch.tensor([1, 2], device="meta")
    assert copied > 2 and tokens == model.pack(groups).num_tokens


@pytest.mark.parametrize(
    "model_type, attention, backend",
    [("opt", "flash", "eager"), ("qwen3", "flash", "aot_eager"), ("llama", "masks", "eager")],
)
def test_compiled_blocks_serve_every_layer_and_every_length(
    model_type, attention, backend, monkeypatch, request
):
    """Compile with a backend that makes graphs, and no code of them.

    aot_eager gives a CPU the graphs that a GPU would get, forward and backward; eager the forward
    ones, in half the time.

    The first batch makes two graphs of a block: of the last one and of all others. No other batch
    makes one, and loss and gradients are those without compiling.
    """
    if attention == "flash":
        request.getfixturevalue("flash")
    masks = PackedAttention.with_masks
    monkeypatch.setattr(PackedAttention, "with_masks", masks)  # `compile_blocks` changes it
    torch.compiler.reset()
    model = lively(model_type, n_layer=4, n_embd=32, n_head=4).double()
    plain = copy.deepcopy(model)
    compile_blocks(model.backbone.blocks, backend=backend)
    graphs = torch._dynamo.utils.counters["stats"]
    graphs.clear()
    counts = []
    for seed in range(5):
        batch = model.pack(random_groups(seed))
        if attention == "flash":
            batch = replace(batch, calls=plan_varlen(batch))  # as `PackedBatch.to` makes them
        found, expected = model(batch), plain(batch)
        torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)
        found["loss"].backward()
        expected["loss"].backward()
        counts.append(graphs["unique_graphs"])
    assert set(counts) == {2 if attention == "flash" else counts[0]} and counts[0] < 10
    for one, other in zip(model.parameters(), plain.parameters()):
        torch.testing.assert_close(one.grad, other.grad, atol=1e-10, rtol=1e-10)


# --------------------------------------------------------------------------------------------------
# The reward model


@pytest.mark.parametrize(
    "dtype, tolerance", [(torch.float64, 1e-10), (torch.float32, 1e-5)], ids=["float64", "float32"]
)
@pytest.mark.parametrize("model_type, overrides", KINDS)
def test_loss_scores_and_gradients_equal_those_of_the_padded_layout(
    model_type, overrides, dtype, tolerance, monkeypatch
):
    model = lively(model_type, **overrides).to(dtype)
    for seed in range(6):
        groups = random_groups(seed)
        # A call for each text, for some comparisons, for all of them at once.
        monkeypatch.setattr("parts.packed.SHORT", (0, 60, 10**6)[seed % 3])
        expected = padded(model, groups)
        expected["loss"].backward()
        gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
        model.zero_grad()
        out = model(data.pack(groups, model.pad_id))
        out["loss"].backward()
        for key in expected:
            torch.testing.assert_close(out[key], expected[key], atol=tolerance, rtol=tolerance)
            assert not out[key]._is_view()  # FSDP2 would warn in every run with --zero_stage
        for name, parameter in model.named_parameters():
            scale = max(1.0, gradients[name].abs().max().item())
            torch.testing.assert_close(
                parameter.grad, gradients[name], atol=tolerance * scale, rtol=0, msg=name
            )
        model.zero_grad()


@pytest.mark.parametrize("loss", ["divergent", "end"])
@pytest.mark.parametrize("model_type", ["gpt2", "opt", "gpt_neox"])
def test_variants_of_the_loss_are_the_same_in_both_layouts(model_type, loss):
    """Use margins, targets, centering, on pairs and rankings; the ends alone need no padding."""
    model = lively(model_type).double()
    model.loss, model.center_rewards_coefficient = loss, 0.1
    groups = random_groups(1, sizes=(2, 2, 2, 4, 2))
    margins, targets = [0.5, -1.0, 0.0, 0.0, 0.0], [1.0, 1.0, 0.3, 1.0, 0.0]
    batch = model.pack(groups, margins, targets)
    assert batch.num_tokens == sum(packed_size(group, model.longest_tail) for group in groups)
    if loss == "end":
        assert not any(batch.tails)
    expected = []
    for group, margin, target in zip(groups, margins, targets):
        pairs = list(itertools.combinations(group, 2))
        input_ids, mask = data.pad_rows([a for a, _ in pairs] + [b for _, b in pairs], model.pad_id)
        variants = [margin] * len(pairs), [target] * len(pairs)
        expected.append(model(input_ids, mask, *variants)["loss"])
    results = [
        [loss, *torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)]
        for loss in (model(batch)["loss"], torch.stack(expected).mean())
    ]
    for packed, reference in zip(*results):
        if reference is None or packed is None:  # the embedding of OPT's padding positions, say
            assert (packed if reference is None else reference).abs().max() == 0
        else:
            torch.testing.assert_close(packed, reference, atol=1e-10, rtol=1e-10)
    model.loss, model.center_rewards_coefficient = "divergent", 0.0
    assert model(data.pack(groups, model.pad_id))["loss"] != results[0][0]


def test_packed_batch_allows_no_mask_margins_or_targets_beside_it_and_no_unknown_loss():
    model = lively("gpt2")
    batch = data.pack([[[1, 2], [1, 3]]], model.pad_id)
    for beside in ({"margins": [1.0]}, {"targets": [1.0]}, {"attention_mask": torch.ones(2, 2)}):
        with pytest.raises(ValueError, match="give margins and targets to `RewardModel.pack`"):
            model(batch, **beside)
    words = "margins: found 2 numbers; expected a finite number for each of 1"
    with pytest.raises(ValueError, match=words):
        model(data.pack([[[1, 2], [1, 3]]], model.pad_id, margins=[1.0, 2.0]))
    model.loss = "End"
    with pytest.raises(ValueError, match="loss: found 'End'; expected divergent or end"):
        model(batch)


@pytest.mark.parametrize(
    "targets, margins, words",
    [
        ([1.0], None, "targets: found 1 number; expected a number from 0 to 1 for each of 2"),
        ([2.0, 1.0], None, "targets: found 2.0 for pair 0; expected a number from 0 to 1"),
        ([0.9, 1.0], [0.5, 0.0], "targets: found 0.9 for pair 0, which has the margin 0.5"),
        ([1.0, 0.5], None, "targets: found 0.5 for comparison 1, a ranking of 3"),
    ],
)
def test_targets_that_a_packed_batch_cannot_have(targets, margins, words):
    model = lively("gpt2")
    groups = [[[1, 2], [1, 3]], [[4, 5], [4, 6], [4, 7]]]
    with pytest.raises(ValueError, match=words):
        model(model.pack(groups, margins, targets))
    allowed = model(model.pack(groups, [0.0, 0.0], [0.5, 1.0]))["loss"]
    assert allowed != model(model.pack(groups))["loss"]


@pytest.mark.parametrize(
    "overrides", [{}, {"pre_norm": False, "embed_dim": 8}], ids=["pre_norm", "post_norm"]
)
def test_one_token_of_a_tail_is_enough_where_padding_has_one_position(overrides):
    model = lively("opt", **overrides).double()
    groups = random_groups(0)
    whole, short = data.pack(groups, 0), data.pack(groups, 0, longest_tail=1)
    assert short.num_tokens < whole.num_tokens and max(short.tails) == 1
    results = []
    for batch in (whole, short):
        loss = model(batch)["loss"]
        results.append([loss, *torch.autograd.grad(loss, list(model.parameters()))])
    for one, other in zip(*results):
        torch.testing.assert_close(other, one, atol=1e-10, rtol=1e-10)


def test_single_texts_are_packed_for_scoring_alone():
    model = lively("llama")
    texts = [[5, 6, 7], [8], [0, 9, 0]]
    with pytest.raises(
        ValueError, match=r"comparison 0: sequences of \[3\] tokens; expected 2 or more"
    ):
        data.pack([[text] for text in texts], 0)
    batch = data.pack([[text] for text in texts], 0, min_responses=1, longest_tail=0)
    for (row,), text in zip(rewards_of_texts(model, batch), texts):
        mask = torch.ones(1, len(text))
        values = model.forward_value(torch.tensor([text]), mask, return_value_only=True)
        assert row.shape == (1,) and row[0].item() == pytest.approx(values[0, -1].item(), abs=1e-5)


def test_bad_packed_batches_are_refused():
    model = RewardModel(GPT(small("gpt2")), pad_id=0)
    with pytest.raises(ValueError, match="33 tokens, but the model has 32 positions"):
        model(data.pack([[[1] * 33, [2]]], 0))
    words = "comparison 1, response 0: id 50; the model has ids 0 to 49"
    with pytest.raises(ValueError, match=words):
        model(data.pack([[[1], [2]], [[1, 50], [2]]], 0))


@pytest.mark.parametrize(
    "groups, pad_id, words",
    [
        ([[[1], [2]], [3, 4]], 0, "comparison 1: found int; expected texts"),
        ([["ab", "c"]], 0, "comparison 0: found str; expected texts"),
        ([[torch.tensor([1, 2]), torch.tensor([3])]], 0, "comparison 0: found Tensor"),
        ([[[1.5], [2]]], 0, "found float64; expected token ids"),
        ([[["a"], ["b"]]], 0, "expected token ids, int64"),
        ([[[2**70], [1]]], 0, "expected token ids, int64"),
        ([[[1, 2], [3]]], None, "pad_id: found object; expected token ids"),
    ],
)
def test_what_is_no_list_of_token_ids_is_not_packed(groups, pad_id, words):
    with pytest.raises(ValueError, match=words):
        data.pack(groups, pad_id)


@pytest.mark.parametrize(
    "options",
    [dict(longest_tail=0), dict(longest_tail=1), dict(longest_tail=2), dict(min_responses=1)],
    ids=str,
)
def test_a_batch_packed_for_scores_alone_has_no_loss(options):
    groups = [[[1, 2, 3], [1, 4, 5, 6, 7, 8]]]
    if "min_responses" in options:
        groups.append([[1]])
    with pytest.raises(ValueError, match="packed for scores alone"):
        lively("gpt2")(data.pack(groups, 0, **options))


def test_a_pad_id_beyond_the_vocabulary_is_refused():
    with pytest.raises(ValueError, match="pad_id 50; the model has ids 0 to 49"):
        lively("gpt2")(data.pack([[[1, 2, 3], [1, 4]]], 50))


def test_dropout_in_the_packed_layout_is_active_in_training_alone():
    model = RewardModel(GPT(small("gpt2", dropout=0.5)), pad_id=0)
    batch = data.pack([[[1, 2, 3], [1, 4]]], 0)
    assert not torch.equal(model(batch)["loss"], model(batch)["loss"])
    model.eval()
    assert torch.equal(model(batch)["loss"], model(batch)["loss"])


def test_region_that_starts_in_the_trunk_is_refused():
    """A trunk has no rewards: a negative place would be another text's, or the row's end."""
    model, groups = lively("gpt2"), [[[1, 2, 3, 4], [1, 2, 5]]]
    model.pack(groups, region=lambda chosen, rejected: (2, 4))
    for start in (0, 1):
        with pytest.raises(ValueError, match=f"region: starts at column {start} of texts 0 and 1"):
            model.pack(groups, region=lambda chosen, rejected: (start, 4))
