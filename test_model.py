"""The backbone and the reward model, against DeepSpeed-Chat's numbers and against `transformers`.

Tests of the packed layout are in parts/test_packed.py, tests of files in parts/test_huggingface.py.
"""

import json
import sys
import warnings
from contextlib import ExitStack, contextmanager
from pathlib import Path
from unittest import mock

import pytest
import torch

import data
from model import GPT, GPTConfig
from parts.huggingface import FAMILIES
from rm import RewardModel

TESTDATA = Path(__file__).parent / "testdata"
CHECKPOINTS = ["gpt2", "llama_gqa", "opt", "opt_postnorm_proj"]
LLAMA_3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}


def from_deepspeed_chat(name: str, file: str):
    """Load a tiny checkpoint, its value head, and what DeepSpeed-Chat computed from it."""
    numbers = json.loads((TESTDATA / name / file).read_text())
    pad_id, n = numbers.get("pad_id", 0), numbers.get("num_padding_at_beginning", 0)
    model = RewardModel.from_pretrained(TESTDATA / name, pad_id=pad_id, num_padding_at_beginning=n)
    model.v_head.weight.data = torch.tensor(numbers["v_head"])
    for key, value in numbers.items():
        if isinstance(value, list) and key != "steps":
            numbers[key] = torch.tensor(value)
    return model, numbers


def close(got, expected, tolerance=1e-5, name=""):
    expected = torch.as_tensor(expected)
    print(f"{name} worst difference {(got - expected).abs().max():.1e}")
    torch.testing.assert_close(got, expected, atol=tolerance, rtol=0, check_dtype=False)


def small(model_type, **overrides):
    shape = dict(vocab_size=50, n_positions=32, n_layer=2, n_head=4, n_embd=16)
    return GPTConfig(model_type, **shape | overrides)


def positions_of(model_type, ids):
    """Return keywords for transformers: columns, as DeepSpeed-Chat's calls have them.

    OPT counts attended tokens by itself.
    """
    if model_type == "opt":
        return {}
    return {"position_ids": torch.arange(ids.shape[1]).expand(ids.shape)}


def left_padded(L=12):
    torch.manual_seed(1)
    ids = torch.randint(1, 50, (3, L))
    mask = torch.ones_like(ids)
    for row, columns in ((0, slice(3)), (1, slice(-4, None)), (2, slice(2)), (2, slice(-3, None))):
        mask[row, columns] = 0
    return ids * mask, mask


# --------------------------------------------------------------------------------------------------
# DeepSpeed-Chat's numbers


@pytest.mark.parametrize("name", CHECKPOINTS)
@pytest.mark.parametrize("mask_given", [True, False])
def test_hidden_states_rewards_loss_and_gradient(name, mask_given):
    model, expected = from_deepspeed_chat(name, "expected.json")
    ids, mask = expected["input_ids"], expected["attention_mask"]
    close(model.backbone(ids, mask), expected["last_hidden_state"], name="hidden states")
    out = model(ids, mask) if mask_given else model(ids)
    out["loss"].backward()
    close(model.token_rewards(ids, mask), expected["rewards"], name="rewards")
    for key in ("loss", "chosen_mean_scores", "rejected_mean_scores"):
        close(out[key], expected[key], name=key)
    close(model.v_head.weight.grad, expected["grad_v_head"], name="gradient of v_head")
    close(
        torch.stack([p.grad.norm() for p in model.parameters()]).norm(),
        expected["grad_norm"],
        name="gradient norm",
    )


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_step_3_values_with_left_padded_prompts(name):
    model, expected = from_deepspeed_chat(name, "expected.json")
    step3 = {key: torch.tensor(value) for key, value in expected["step3"].items()}
    ids, mask = step3["input_ids"], step3["attention_mask"]
    prompt_length = int(step3["prompt_length"])
    real = mask.bool()
    real[:, prompt_length:] = True  # left padding has no meaning, right padding has
    for attention_mask in (mask, None):
        out = model.forward_value(ids, attention_mask, prompt_length=prompt_length)
        close(out["values"][real], step3["values"][real])
        close(out["chosen_end_scores"], step3["chosen_end_scores"])
        values = model.forward_value(ids, attention_mask, return_value_only=True)
        close(values[real], step3["values"][real])


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_packed_layout_has_deepspeed_chats_numbers(name):
    model, expected = from_deepspeed_chat(name, "expected.json")
    ids, mask = expected["input_ids"], expected["attention_mask"]
    B = len(ids) // 2
    rows = [row[: int(length)].tolist() for row, length in zip(ids, mask.sum(1))]
    out = model(data.pack([[rows[i], rows[B + i]] for i in range(B)], model.pad_id))
    out["loss"].backward()
    for key in ("loss", "chosen_mean_scores", "rejected_mean_scores"):
        close(out[key], expected[key], name=key)
    close(model.v_head.weight.grad, expected["grad_v_head"], name="gradient of v_head")
    close(
        torch.stack([p.grad.norm() for p in model.parameters()]).norm(),
        expected["grad_norm"],
        name="gradient norm",
    )


@pytest.mark.parametrize("name", ["gpt2", "llama_gqa"])
def test_trajectory(name):
    """Take the 20 steps of AdamW of trajectory.json, and compare the loss before each."""
    model, expected = from_deepspeed_chat(name, "trajectory.json")
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=3e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0
    )
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=20)
    losses = []
    for step in expected["steps"]:
        loss = model(torch.tensor(step["input_ids"]))["loss"]
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        cosine.step()
    close(torch.tensor(losses), [step["loss"] for step in expected["steps"]], 1e-4)


# --------------------------------------------------------------------------------------------------
# transformers

BIASES = {"qkv_bias": True, "attn_out_bias": True}
SCALED = {"n_embd": 64, "rope_scaling": {"rope_type": "llama3", **LLAMA_3}}


class Float64:
    """PyTorch with float64 under the name of float32."""

    float = float32 = torch.float64

    def __getattr__(self, name):
        return getattr(torch, name)


@contextmanager
def exact_transformers():
    """Have transformers compute rotary tables and RMSNorm in float64: by itself, in float32."""
    import transformers

    modules = [transformers.modeling_rope_utils]
    for family in FAMILIES.values():
        model = getattr(transformers, family.classes + "Model")
        modules.append(sys.modules[model.__module__])
    with ExitStack() as stack:
        for module in modules:
            stack.enter_context(mock.patch.object(module, "torch", Float64()))
        yield


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.float64, 1e-12)])
@pytest.mark.parametrize(
    "model_type, overrides",
    [
        ("gpt2", {}),
        ("gpt2", {"n_inner": 24, "activation": "relu"}),
        ("opt", {}),
        ("opt", {"pre_norm": False, "embed_dim": 8}),
        ("llama", {}),
        ("llama", {"n_kv_head": 1, "head_dim": 6}),
        ("llama", SCALED),
        ("llama", BIASES),
        ("llama", BIASES | {"mlp_bias": True}),
        ("llama", {"mlp_bias": True}),
        ("mistral", {"n_kv_head": 2, "sliding_window": 12}),
        ("mistral", {"head_dim": 6}),
        ("qwen2", {"n_kv_head": 2}),
        ("qwen2", {"head_dim": 6, "sliding_window": 12}),
        ("qwen2", SCALED),
        ("qwen3", {"n_kv_head": 2}),
        ("qwen3", BIASES | {"head_dim": 6, "sliding_window": 13}),
        ("gpt_neox", {}),  # a fraction of 1 / 4 of a head of 4: rounded up to a pair
        ("gpt_neox", {"n_embd": 32}),
        ("gpt_neox", {"n_embd": 32, "parallel_residual": False}),
        ("gpt_neox", {"rotary_fraction": 1.0, "qkv_bias": False, "attn_out_bias": False}),
        ("gpt_neox", {"n_embd": 24, "rotary_fraction": 0.5, "activation": "gelu_fast"}),
        ("gpt_neox", SCALED),
        ("gpt_neox", {"n_embd": 12, "rotary_fraction": 0.25}),  # of 3: nothing is turned
    ],
)
def test_same_hidden_states_as_transformers(model_type, overrides, dtype, tolerance):
    """Make the same backbone in transformers, of our config.json and weights; both paddings."""
    import transformers

    torch.manual_seed(0)
    ours = GPT(small(model_type, **overrides)).to(dtype)
    for parameter in ours.parameters():  # biases and norms too: zeros and ones would hide mistakes
        torch.nn.init.normal_(parameter, std=0.5)
    config = transformers.AutoConfig.for_model(**ours.config.to_hf())
    with exact_transformers() if dtype == torch.float64 else ExitStack():
        theirs = transformers.AutoModel.from_config(config, attn_implementation="sdpa")
        theirs = theirs.to(dtype).eval()
        missing, unexpected = theirs.load_state_dict(ours.to_hf(), strict=False)
        assert not unexpected and not [name for name in missing if "inv_freq" not in name]
        ids, mask = left_padded()
        meaningful = mask.bool() | (mask.cumsum(1) > 0)  # everything but left padding
        positions = positions_of(model_type, ids)
        expected = theirs(ids, attention_mask=mask, **positions).last_hidden_state
        if overrides.get("activation") == "gelu_fast":
            tolerance = max(tolerance, 1e-9)  # transformers rounds its constant to ten digits
        close(ours(ids, mask)[meaningful], expected[meaningful], tolerance)
        expected = theirs(ids, **positions).last_hidden_state
        close(ours(ids), expected, tolerance)
    assert ours(ids).dtype == dtype


# --------------------------------------------------------------------------------------------------
# Properties


@pytest.mark.parametrize("model_type", FAMILIES)
def test_a_position_sees_itself_and_earlier_ones(model_type):
    torch.manual_seed(0)
    model, ids = GPT(small(model_type)), torch.randint(0, 50, (1, 8))
    changed = ids.clone()
    changed[0, 5] = (ids[0, 5] + 1) % 50
    same = torch.isclose(model(ids), model(changed), atol=1e-6).all(-1)[0]
    assert same.tolist() == [True] * 5 + [False] * 3


@pytest.mark.parametrize("model_type", FAMILIES)
def test_masked_tokens_change_nothing(model_type):
    """Change ids at left padding: nothing behind them changes, and gradients stay finite there."""
    torch.manual_seed(0)
    model = GPT(small(model_type))
    ids, mask = left_padded()
    hidden = model(ids, mask)
    other = model(torch.where(mask.bool(), ids, 7), mask)
    assert torch.equal(hidden[mask.bool()], other[mask.bool()])
    hidden.sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize("model_type", FAMILIES)
def test_gradient_of_every_parameter_is_the_finite_difference(model_type):
    torch.manual_seed(0)
    config = small(model_type, n_embd=8, n_head=2, vocab_size=9, n_positions=5)
    model = RewardModel(GPT(config), pad_id=0).double()
    ids = torch.tensor([[1, 2, 3, 0, 0], [1, 2, 4, 5, 0]])
    model(ids)["loss"].backward()
    for name, parameter in model.named_parameters():
        direction, step = torch.randn_like(parameter), 1e-6
        with torch.no_grad():
            parameter += step * direction
            up = model(ids)["loss"]
            parameter -= 2 * step * direction
            down = model(ids)["loss"]
            parameter += step * direction
        slope = (parameter.grad * direction).sum().item()
        # The bias of the keys has gradient 0, up to rounding.
        assert ((up - down) / (2 * step)).item() == pytest.approx(slope, rel=1e-6, abs=1e-9), name


def test_dropout_is_active_in_training_alone(monkeypatch):
    torch.manual_seed(0)
    model, ids = GPT(small("gpt2", dropout=0.5, n_layer=1)), torch.randint(0, 50, (1, 8))
    dropped = []
    real = torch.nn.functional.dropout, torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(
        torch.nn.functional,
        "dropout",
        lambda x, p, training=True: dropped.append(p * training) or real[0](x, p, training),
    )
    monkeypatch.setattr(
        torch.nn.functional,
        "scaled_dot_product_attention",
        lambda *a, **k: dropped.append(k["dropout_p"]) or real[1](*a, **k),
    )
    assert not torch.equal(model(ids), model(ids))
    # Twice: embedding, attention weights, and the two sums of the one layer.
    assert dropped == [0.5] * 8
    model.eval()
    assert torch.equal(model(ids), model(ids))
    assert dropped[8:] == [0.0] * 8


def test_end_score_is_before_the_first_pad_id_at_or_after_prompt_length():
    model = RewardModel(GPT(small("llama")), pad_id=0)
    ids = torch.tensor([[0, 0, 5, 6, 7, 0, 0], [3, 4, 5, 6, 7, 8, 0], [1, 2, 3, 4, 5, 6, 7]])
    for prompt_length, ends in ((3, [4, 5, 6]), (1, [0, 5, 6]), (6, [5, 5, 6]), (7, [6, 6, 6])):
        out = model.forward_value(ids, prompt_length=prompt_length)
        assert out["chosen_end_scores"].tolist() == [
            out["values"][row, end].item() for row, end in enumerate(ends)
        ]
    with pytest.raises(ValueError, match="row 0 .*prompt_length"):
        model.forward_value(ids, prompt_length=0)
    # With a mask its last 1 is the end, wherever the pad id stands.
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 0], [1, 1, 1, 1, 1, 1, 0], [1, 1, 1, 0, 0, 0, 0]])
    for prompt_length in (0, 3):
        out = model.forward_value(ids, mask, prompt_length=prompt_length, use_cache=True)
        ends = out["values"][[0, 1, 2], [5, 5, 2]]
        assert torch.equal(out["chosen_end_scores"], ends)
    opt_like = RewardModel(model.backbone, pad_id=2, num_padding_at_beginning=1)
    out = opt_like.forward_value(
        torch.tensor([[2, 5, 6, 2, 2]]), attention_mask=torch.tensor([[1, 1, 1, 0, 0]])
    )
    assert out["chosen_end_scores"].item() == out["values"][0, 2].item()


def test_backbone_takes_rows_that_are_padding_alone():
    """A batch that is filled up with empty rows gives the same numbers for the others."""
    for family in FAMILIES:
        backbone = GPT(small(family)).eval()
        ids, mask = torch.tensor([[5, 6, 7], [0, 0, 0]]), torch.tensor([[1, 1, 1], [0, 0, 0]])
        close(backbone(ids, mask)[:1].detach(), backbone(ids[:1], mask[:1]).detach())


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda m: m(torch.tensor([[1, 2], [1, 50]])), ["row 1", "id 50", "column 1", "0 to 49"]),
        (lambda m: m(torch.ones(2, 40).long()), ["40 tokens", "32 positions"]),
        (lambda m: m(data.pack([[[1] * 40, [2]]], 0)), ["40 tokens", "32 positions"]),
        (lambda m: m(torch.tensor([[0, 1], [1, 2]])), ["row 0", "left", "attention_mask"]),
        (
            lambda m: m.forward_value(torch.tensor([[1, 2]]), prompt_length=3),
            ["prompt_length 3", "0 to 2"],
        ),
        (
            lambda m: m.forward_value(torch.tensor([[1, 2]]), prompt_length=1.5),
            ["prompt_length 1.5", "0 to 2"],
        ),
        (
            lambda m: m.forward_value(torch.tensor([[1, 2]]), torch.zeros(1, 2)),
            ["row 0", "attention_mask"],
        ),
        (lambda m: m(torch.ones(2, 3).byte()), ["input_ids", "int64", "uint8"]),
        (lambda m: m(torch.tensor([[1, 2], [1, -1]])), ["row 1", "id -1", "0 to 49"]),
        (lambda m: m.backbone(torch.ones(2, 3)), ["input_ids", "int64", "float32"]),
        (
            lambda m: m.backbone(torch.ones(2, 3).long(), torch.ones(2, 4)),
            ["attention_mask", "[2, 3]", "[2, 4]"],
        ),
        (
            lambda m: m(torch.ones(2, 3).long(), torch.full((2, 3), 2)),
            ["attention_mask", "row 0", "2 at column 0"],
        ),
        (lambda m: m([[1, 2], [1, 3]]), ["input_ids", "found list"]),
    ],
)
def test_bad_batches_are_refused(call, words):
    with pytest.raises(ValueError) as error:
        call(RewardModel(GPT(small("gpt2")), pad_id=0))
    assert all(word in str(error.value) for word in words), error.value


@pytest.mark.parametrize("model_type", ["mistral", "qwen2", "qwen3"])
def test_rows_longer_than_the_sliding_window_are_refused_in_both_layouts(model_type):
    model = RewardModel(GPT(small(model_type, sliding_window=8)), pad_id=0)
    model(torch.tensor([[1] * 8, [2] * 8]))
    model(data.pack([[[1] * 8, [2] * 8]], 0))
    longer = torch.tensor([[1] * 9, [2] * 8 + [0]])
    for call in (
        lambda: model(longer),
        lambda: model(data.pack([[[1] * 9, [2] * 8]], 0)),
        lambda: model.forward_value(longer, prompt_length=3),
        lambda: model.backbone(longer),
    ):
        with pytest.raises(ValueError, match="rows of 9 tokens, .*sliding_window of 8"):
            call()


@pytest.mark.parametrize(
    "overrides", [{"n_head": 4, "n_embd": 12}, {"head_dim": 3}], ids=["width", "head_dim"]
)
@pytest.mark.parametrize("model_type", FAMILIES)
def test_a_head_that_is_turned_as_a_whole_needs_an_even_width(model_type, overrides):
    if FAMILIES[model_type].variant.get("rope_theta") is None or model_type == "gpt_neox":
        GPT(small(model_type, **overrides))
    else:
        with pytest.raises(ValueError, match="even head width, not 3"):
            small(model_type, **overrides)
    with pytest.raises(ValueError, match="even head width, not 3"):
        small("gpt_neox", rotary_fraction=1.0, **overrides)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_rewards_of_a_half_precision_model_are_float32(model_type):
    model = RewardModel(GPT(small(model_type)), pad_id=0).bfloat16()
    out = model(torch.tensor([[1, 2, 3], [1, 4, 0]]))
    assert {value.dtype for value in out.values()} == {torch.float32}


def inputs_of(ids, layout):
    """Pack pairs of rows, chosen ones first, or leave them padded."""
    if layout == "padded":
        return ids
    B = len(ids) // 2
    return data.pack([[ids[i].tolist(), ids[B + i].tolist()] for i in range(B)], 0)


@pytest.mark.parametrize("layout", ["packed", "padded"])
@pytest.mark.parametrize("model_type", FAMILIES)
def test_under_autocast_blocks_compute_in_half_precision_and_rewards_and_loss_do_not(
    model_type, layout, monkeypatch
):
    torch.manual_seed(0)
    model = RewardModel(GPT(small(model_type)), pad_id=0)
    ids = torch.randint(1, 48, (8, 9))
    inputs = inputs_of(ids, layout)
    exact = model(inputs)
    dtypes = set()
    attend = torch.nn.functional.scaled_dot_product_attention

    def noted(q, k, v, **options):
        dtypes.update((q.dtype, k.dtype, v.dtype))
        return attend(q, k, v, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", noted)
    with torch.autocast("cpu", torch.bfloat16), warnings.catch_warnings(action="error"):
        out = model(inputs)
    assert dtypes == {torch.bfloat16}  # queries and keys, too, which norms and rotation leave so
    assert {value.dtype for value in out.values()} == {torch.float32}
    scores = torch.cat([out["chosen_mean_scores"], out["rejected_mean_scores"]])
    assert (scores.bfloat16().float() != scores).any()  # not rounded to half precision
    assert out["loss"] != exact["loss"] and torch.allclose(out["loss"], exact["loss"], atol=0.02)


@pytest.mark.parametrize("layout", ["packed", "padded"])
@pytest.mark.parametrize("model_type", FAMILIES)
def test_gradient_checkpointing_keeps_less_and_changes_no_bit(model_type, layout):
    """Use dropout: the blocks draw the same numbers when they are computed again."""
    torch.manual_seed(0)
    model = RewardModel(GPT(small(model_type, n_layer=4, dropout=0.3)), pad_id=0)
    ids = torch.randint(1, 48, (8, 9))
    inputs = inputs_of(ids, layout)
    kept, gradients = [], []
    for model.backbone.gradient_checkpointing in (False, True):
        saved = []
        torch.manual_seed(1)
        model.zero_grad()
        with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
            loss = model(inputs)["loss"]
        kept.append(sum(x.numel() for x in saved))
        loss.backward()
        gradients.append([loss.detach(), *(parameter.grad for parameter in model.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*gradients))
    assert kept[1] < kept[0] / 3


def test_fresh_weights_have_gpt2s_standard_deviations():
    """Expect 0.02 at width 768, over the root of their number for writes to the residual stream."""
    torch.manual_seed(0)
    blocks = GPT(small("gpt2", n_embd=192, n_layer=8)).blocks
    std = 0.02 * 2  # a quarter of the width
    stds = {"q": std, "v": std, "mlp_in": std, "attn_out": std / 4, "mlp_out": std / 4}
    for name, expected in stds.items():
        weights = torch.stack([getattr(block, name).weight.detach() for block in blocks])
        assert weights.std().item() == pytest.approx(expected, rel=0.02), name
