"""LoRA, against the paper, plain models, and the names that transformers gives to layers."""

import copy
import math
import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

import data
from model import GPT, GPTConfig
from parts import lora
from parts.huggingface import FAMILIES
from rm import RewardModel

TESTDATA = Path(__file__).parent.parent / "testdata"
VARIANTS = {
    "gpt2": {},
    "opt": {},
    "opt post-norm": {"pre_norm": False, "embed_dim": 8},
    "llama": {},
    "llama grouped": {"n_kv_head": 2},
    "llama biases": {"qkv_bias": True, "attn_out_bias": True, "mlp_bias": True},
    "mistral": {},
    "qwen2": {"n_kv_head": 2},
    "qwen3": {"head_dim": 6},
    "gpt_neox": {},
    "gpt_neox sequential": {"parallel_residual": False},
}
GATED = ("llama", "mistral", "qwen2", "qwen3")
GROUPS = [[[1, 2, 3, 4, 5], [1, 2, 3, 6]], [[7, 8], [7, 9, 10, 11, 12, 13]]]
CHOSEN, REJECTED = zip(*GROUPS)
INPUT_IDS, MASK = data.pad_rows([*CHOSEN, *REJECTED], 0)


def plain_model(variant="opt", dtype=torch.float64, **overrides):
    """Make two blocks with random weights everywhere, biases and norms too."""
    torch.manual_seed(0)
    shape = dict(vocab_size=20, n_positions=16, n_layer=2, n_head=4, n_embd=16)
    config = GPTConfig(variant.split()[0], **shape | VARIANTS[variant] | overrides)
    model = RewardModel(GPT(config), pad_id=0).to(dtype)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model


def add(model, dim, module_name=None, only=False):
    return lora.add(model, model.backbone.linear_layers(), dim, module_name, only)


def lora_model(*args, dim=3, module_name=None, only=False, **kwargs):
    """Make a `plain_model` with a LoRA that is not zero."""
    model = plain_model(*args, **kwargs)
    add(model, dim, module_name, only)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.3)
    return model


def layers_with_lora(model):
    return {
        name: module
        for name, module in model.backbone.named_modules()
        if isinstance(module, lora.LoRALinear)
    }


def trainable(model):
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


# --------------------------------------------------------------------------------------------------
# The computation


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_fresh_lora_changes_no_bit_of_the_outputs(variant, dtype):
    model, batch = plain_model(variant, dtype), data.pack(GROUPS, 0)
    before = model(INPUT_IDS, MASK), model(batch)
    layers = 14 if variant.split()[0] in GATED else 12
    assert add(model, 3) == len(layers_with_lora(model)) == layers
    for out, expected in zip((model(INPUT_IDS, MASK), model(batch)), before):
        assert all(torch.equal(out[key], expected[key]) for key in expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_right_is_uniform_within_one_over_the_root_of_dim_and_left_is_zero(dtype):
    model = plain_model(dtype=dtype, n_embd=64)
    add(model, 4)
    for layer in layers_with_lora(model).values():
        right, left = layer.lora_right_weight, layer.lora_left_weight
        assert right.shape == (layer.in_features, 4) and left.shape == (4, layer.out_features)
        assert right.dtype == left.dtype == dtype and not left.any()
        assert 0.45 < right.max() <= 0.5 and -0.5 <= right.min() < -0.45  # 1 / sqrt(4)
        # The deviation is that of at least 256 numbers.
        assert right.float().std().item() == pytest.approx(1 / math.sqrt(12), rel=0.15)


def test_layer_multiplies_by_weight_plus_low_rank_product():
    for bias in (True, False):
        torch.manual_seed(0)
        layer = lora.LoRALinear(nn.Linear(7, 5, bias).double(), 3)
        nn.init.normal_(layer.lora_left_weight)
        x, expected = torch.randn(2, 4, 7).double(), torch.zeros(2, 4, 5).double()
        for o in range(5):
            for i in range(7):
                product = sum(
                    layer.lora_right_weight[i, d] * layer.lora_left_weight[d, o] for d in range(3)
                )
                expected[..., o] += x[..., i] * (layer.weight[o, i] + product / 3).item()
        torch.testing.assert_close(
            layer(x), expected + layer.bias if bias else expected, atol=1e-14, rtol=1e-14
        )


@pytest.mark.parametrize("gradient_checkpointing", [False, True])
@pytest.mark.parametrize("only", [False, True])
@pytest.mark.parametrize("variant", VARIANTS)
def test_loss_and_gradients_are_those_of_the_papers_equation(variant, only, gradient_checkpointing):
    """Compute h = W x + (alpha / r) B A x by hooks on the layers of a plain model.

    This is eq. 3 of Hu et al., with alpha / r of section 4.1.
    """
    model, reference, pairs = lora_model(variant, only=only), plain_model(variant), []
    for name, layer in layers_with_lora(model).items():
        A, B = (
            weight.detach().T.clone().requires_grad_()
            for weight in (layer.lora_right_weight, layer.lora_left_weight)
        )
        reference.backbone.get_submodule(name).register_forward_hook(
            lambda _, args, h, A=A, B=B: (
                h + torch.einsum("dr,rk,...k->...d", B, A, args[0]) * (1 / len(A))
            )
        )
        pairs += [(layer.lora_right_weight, A), (layer.lora_left_weight, B)]
    model.backbone.gradient_checkpointing = gradient_checkpointing
    out, expected = model(INPUT_IDS, MASK), reference(INPUT_IDS, MASK)
    out["loss"].backward()
    expected["loss"].backward()
    for key in expected:
        torch.testing.assert_close(out[key], expected[key], atol=1e-12, rtol=0)
    for ours, theirs in pairs:
        torch.testing.assert_close(ours.grad, theirs.grad.T, atol=1e-12, rtol=0)
    for name in trainable(model) & trainable(reference):
        torch.testing.assert_close(
            model.get_parameter(name).grad, reference.get_parameter(name).grad, atol=1e-12, rtol=0
        )
    assert all(
        parameter.grad is None for parameter in model.parameters() if not parameter.requires_grad
    )


@pytest.mark.parametrize("variant", VARIANTS)
def test_gradients_are_finite_differences(variant):
    model = lora_model(variant)
    batch = data.pack(GROUPS, 0)
    model(batch)["loss"].backward()
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            direction, step = torch.randn_like(parameter), 1e-6
            with torch.no_grad():
                parameter += step * direction
                up = model(batch)["loss"]
                parameter -= 2 * step * direction
                down = model(batch)["loss"]
                parameter += step * direction
            slope = (parameter.grad * direction).sum().item()
            found = ((up - down) / (2 * step)).item()
            assert found == pytest.approx(slope, rel=1e-6, abs=1e-9), name


def test_autocast_computes_in_bfloat16_and_trains_in_float32():
    torch.manual_seed(0)
    layer = lora.LoRALinear(nn.Linear(16, 16), 3)
    nn.init.normal_(layer.lora_left_weight)
    x = torch.randn(8, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    # Values reach 4 or so, 2^-9 of which is 0.008.
    torch.testing.assert_close(y.float(), layer(x), atol=0.03, rtol=0.01)
    y.sum().backward()
    assert layer.lora_right_weight.grad.dtype == layer.lora_left_weight.grad.dtype == torch.float32


# --------------------------------------------------------------------------------------------------
# Which layers, and what is trained


MODULE_NAMES = "rwtransformer. decoder.layers. layers.1. q_proj self_attn c_attn fc h.0. mlp"
MODULE_NAMES += " attention.query_key_value dense norm"
FUSED = ("c_attn", "query_key_value")  # q, k and v in one, which are three layers of ours


@pytest.mark.parametrize("module_name", [None, *MODULE_NAMES.split()])
@pytest.mark.parametrize("model_type", FAMILIES)
def test_layers_are_chosen_by_the_names_that_transformers_gives_them(model_type, module_name):
    """Choose by DeepSpeed-Chat's rule: linear layers whose name there contains the given one.

    GPT-2's Conv1D counts as one, unlike there.
    """
    import transformers

    model = plain_model(model_type)
    theirs = nn.Module()
    config = transformers.AutoConfig.for_model(**model.backbone.config.to_hf())
    theirs.rwtransformer = transformers.AutoModel.from_config(config)
    linear = (nn.Linear, transformers.pytorch_utils.Conv1D)
    expected = sum(
        3 if name.endswith(FUSED) else 1
        for name, module in theirs.named_modules()
        if isinstance(module, linear) and (module_name is None or module_name in name)
    )
    if expected == 0:
        with pytest.raises(ValueError, match="--lora_module_name"):
            add(model, 3, module_name)
    else:
        assert add(model, 3, module_name) == expected == len(layers_with_lora(model))


@pytest.mark.parametrize(
    "variant, module_name, expected",
    [
        (
            "gpt2",
            "c_attn",
            ["blocks.0.q", "blocks.0.k", "blocks.0.v", "blocks.1.q", "blocks.1.k", "blocks.1.v"],
        ),
        ("gpt2", "rwtransformer.h.1.mlp.c_proj", ["blocks.1.mlp_out"]),
        ("opt", "q_proj", ["blocks.0.q", "blocks.1.q"]),
        ("opt post-norm", "decoder.layers.0.fc", ["blocks.0.mlp_in", "blocks.0.mlp_out"]),
        ("llama", "gate", ["blocks.0.mlp_gate", "blocks.1.mlp_gate"]),
        ("qwen3", "layers.1.self_attn.q", ["blocks.1.q"]),
        ("gpt_neox", "layers.0.attention.query", ["blocks.0.q", "blocks.0.k", "blocks.0.v"]),
        ("gpt_neox", "attention.dense", ["blocks.0.attn_out", "blocks.1.attn_out"]),
    ],
)
def test_other_layers_and_other_weights_stay_as_they_are(variant, module_name, expected):
    """Freeze the weights beside which LoRA stands, and nothing else, without `only`."""
    model = plain_model(variant)
    before = trainable(model)
    assert add(model, 3, module_name) == len(expected)
    assert list(layers_with_lora(model)) == expected
    layers = ["backbone." + name for name in expected]
    added = {f"{name}.lora_{side}_weight" for name in layers for side in ("right", "left")}
    assert set(dict(model.named_parameters())) == before | added
    assert trainable(model) == (before | added) - {name + ".weight" for name in layers}


@pytest.mark.parametrize(
    "model_type, weights",
    [
        ("gpt2", 12 * 16 * 16),
        ("opt", 12 * 16 * 16),
        ("llama", 4 * 16 * 16 + 3 * 16 * 48),
        ("mistral", 4 * 16 * 16 + 3 * 16 * 48),
        ("gpt_neox", 12 * 16 * 16),
    ],
)
def test_numbers_of_trained_parameters(model_type, weights):
    """Expect dim * (in + out) for each layer, and the value head, or all but their weights."""
    widths = 4 * (16 + 16) + (3 * (16 + 48) if model_type in GATED else 2 * (16 + 64))
    full = sum(p.numel() for p in plain_model(model_type).parameters())
    for dim in (1, 8):
        count = {}
        for only in (False, True):
            parameters = lora_model(model_type, dim=dim, only=only).parameters()
            count[only] = sum(p.numel() for p in parameters if p.requires_grad)
        assert count[True] == 2 * dim * widths + 16
        assert count[False] == full + 2 * dim * widths - 2 * weights


@pytest.mark.parametrize("variant", VARIANTS)
def test_only_trains_lora_and_the_value_head(variant):
    model = plain_model(variant)
    add(model, 3, only=True)
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    for _ in range(2):  # in the first step R has no gradient, because L is zero
        model(INPUT_IDS, MASK)["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
    after = model.state_dict()
    changed = {name for name in after if not torch.equal(after[name], before[name])}
    assert changed == {name for name in before if "lora_" in name or name == "v_head.weight"}


@pytest.mark.parametrize("name", ["gpt2", "opt"])
def test_weights_are_the_same_parameters_as_before(name):
    """Keep the parameters, also gpt2's, which are transposed views of the mapped file."""
    model = RewardModel.from_pretrained(TESTDATA / name, pad_id=0)
    before = {}
    for name, parameter in model.named_parameters():
        before[name] = (parameter, parameter.data_ptr(), parameter.stride())
    add(model, 2)
    for name, (parameter, pointer, stride) in before.items():
        now = model.get_parameter(name)
        assert now is parameter and now.data_ptr() == pointer and now.stride() == stride
    is_gpt2 = model.backbone.config.model_type == "gpt2"
    assert model.backbone.blocks[0].mlp_in.weight.is_contiguous() != is_gpt2


@pytest.mark.parametrize(
    "dim, module_name, words",
    [
        (
            3,
            "decoder.layers.",
            [
                "--lora_module_name",
                "'decoder.layers.'",
                "rwtransformer.layers.0.self_attn.q_proj",
                ".down_proj",
            ],
        ),
        (3, "blocks.0.q", ["--lora_module_name", "'blocks.0.q'"]),  # our name
        (3, "norm", ["--lora_module_name", "'norm'"]),  # not a linear layer
        (16, None, ["--lora_dim", "16", "1 to 15", "rwtransformer.layers.0.self_attn.q_proj"]),
        (8, "v_proj", ["--lora_dim", "8", "1 to 7", "v_proj", "from 16 to 8"]),
        (8, None, ["--lora_dim", "8", "1 to 7", "k_proj"]),
        (0, None, ["--lora_dim", "0"]),
    ],
)
def test_errors_say_what_to_give_and_leave_the_model_alone(dim, module_name, words):
    model = plain_model("llama grouped")
    with pytest.raises(ValueError) as error:
        add(model, dim, module_name, only=True)
    assert all(word in str(error.value) for word in words), error.value
    assert not layers_with_lora(model) and trainable(model) == set(model.state_dict())
    assert add(model, 8, "q_proj") == 2 and add(model, 7, "v_proj") == 2  # as wide as they go


# --------------------------------------------------------------------------------------------------
# Merging


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-6), (torch.float64, 1e-14)])
@pytest.mark.parametrize("module_name", [None, "0."])
@pytest.mark.parametrize("variant", VARIANTS)
def test_merged_weights_make_a_plain_model_of_the_same_rewards(
    variant, module_name, dtype, tolerance
):
    model = lora_model(variant, dtype, module_name=module_name)
    state = model.state_dict()
    before = copy.deepcopy(state)
    merged = lora.merge(state)
    assert list(state) == list(before)
    assert all(torch.equal(state[name], before[name]) for name in before)
    with torch.device("meta"):
        plain = RewardModel(GPT(model.backbone.config), 0)
    plain.load_state_dict(merged, assign=True)
    got, expected = plain.token_rewards(INPUT_IDS, MASK), model.token_rewards(INPUT_IDS, MASK)
    torch.testing.assert_close(got, expected, atol=tolerance, rtol=0)
    assert (got - plain_model(variant, dtype).token_rewards(INPUT_IDS, MASK)).abs().max() > 0.01
    with_lora = {f"backbone.{name}.weight" for name in layers_with_lora(model)}
    assert all(merged[name] is state[name] for name in merged.keys() - with_lora)


def test_merge_rounds_half_precision_once():
    model = lora_model(dtype=torch.bfloat16)
    merged = lora.merge(model.state_dict())
    exact = lora.merge({name: weight.double() for name, weight in model.state_dict().items()})
    assert {weight.dtype for weight in merged.values()} == {torch.bfloat16}
    for name, weight in merged.items():
        assert torch.equal(weight, exact[name].bfloat16()), name


def test_merge_without_lora_is_the_state_itself():
    state = plain_model().state_dict()
    assert lora.merge(state) == state and lora.merge({}) == {}


# --------------------------------------------------------------------------------------------------
# Two processes


def train_two_steps(model, forward, rows):
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    for _ in range(2):
        forward(INPUT_IDS[rows], MASK[rows])["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()


def one_of_two_processes(rank, path):
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
    from torch.distributed.fsdp import fully_shard
    from torch.nn.parallel import DistributedDataParallel

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{path}/store", rank=rank, world_size=2)
    for wrapper in ("ddp", "fsdp"):
        for only in (False, True):
            model = lora_model(dim=1, only=only)  # of L, (1, out), one of the processes has no row
            model.backbone.gradient_checkpointing = True
            if wrapper == "ddp":
                forward = DistributedDataParallel(model)
            else:
                for block in model.backbone.blocks:
                    fully_shard(block)
                forward = fully_shard(model)
            train_two_steps(model, forward, [rank, rank + 2])  # one pair each
            options = StateDictOptions(full_state_dict=True, cpu_offload=True)
            state = lora.merge(get_model_state_dict(model, options=options))
            if rank == 0:
                torch.save(state, path / f"{wrapper} {only}.pt")
    dist.barrier()
    os._exit(0)  # as train.py ends, and for its reason


def test_two_processes_train_the_model_of_one(tmp_path):
    """Compare merged weights after two steps, with gradient checkpointing.

    The two processes use DistributedDataParallel, or fully_shard for each block.
    """
    torch.multiprocessing.spawn(one_of_two_processes, (tmp_path,), nprocs=2)
    for only in (False, True):
        model = lora_model(dim=1, only=only)
        train_two_steps(model, model, [0, 1, 2, 3])
        expected = lora.merge(model.state_dict())
        before = lora.merge(lora_model(dim=1, only=only).state_dict())
        name = "backbone.blocks.0.q.weight"
        assert (expected[name] - before[name]).abs().max() > 1e-3
        for wrapper in ("ddp", "fsdp"):
            state = torch.load(tmp_path / f"{wrapper} {only}.pt")
            assert list(state) == list(expected)
            for name in expected:
                difference = (state[name] - expected[name]).abs().max().item()
                assert difference < 1e-14, (wrapper, only, name, difference)
