"""The backbone and the reward model, against DeepSpeed-Chat's numbers and against `transformers`."""

import itertools
import json
import math
import pickle
import random
from pathlib import Path

import pytest
import torch

import data
from model import FAMILIES, GPT, GPTConfig, scaled_dot_product
from parts.packed import PackedAttention, packed_size
from rm import LAYOUTS, RewardModel

TESTDATA = Path(__file__).parent / "testdata"
CHECKPOINTS = ["gpt2", "llama_gqa", "opt", "opt_postnorm_proj"]


def from_deepspeed_chat(name: str, file: str):
    """A tiny checkpoint, with the value head and the numbers that DeepSpeed-Chat's code computed from it."""
    numbers = json.loads((TESTDATA / name / file).read_text())
    pad_id, n = numbers.get("pad_id", 0), numbers.get("num_padding_at_beginning", 0)
    model = RewardModel.from_pretrained(TESTDATA / name, pad_id=pad_id, num_padding_at_beginning=n)
    model.v_head.weight.data = torch.tensor(numbers["v_head"])
    return model, {
        key: torch.tensor(value) if isinstance(value, list) and key != "steps" else value
        for key, value in numbers.items()
    }


def close(got, expected, tolerance=1e-5, name=""):
    expected = torch.as_tensor(expected)
    print(f"{name} worst difference {(got - expected).abs().max():.1e}")
    torch.testing.assert_close(got, expected, atol=tolerance, rtol=0, check_dtype=False)


def small(model_type, **overrides):
    return GPTConfig(
        model_type,
        **{
            "vocab_size": 50,
            "n_positions": 32,
            "n_layer": 2,
            "n_head": 4,
            "n_embd": 16,
            **overrides,
        },
    )


def left_padded(L=12):
    torch.manual_seed(1)
    ids = torch.randint(1, 50, (3, L))
    mask = torch.ones_like(ids)
    mask[0, :3], mask[1, -4:], mask[2, :2], mask[2, -3:] = 0, 0, 0, 0
    return ids * mask, mask


# ----------------------------------------------------------------------------------------------------------------------
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
    ids, mask, prompt_length = (
        step3["input_ids"],
        step3["attention_mask"],
        int(step3["prompt_length"]),
    )
    real = mask.bool()
    real[:, prompt_length:] = True  # left padding has no meaning, right padding has
    for attention_mask in (mask, None):
        out = model.forward_value(ids, attention_mask, prompt_length=prompt_length)
        close(out["values"][real], step3["values"][real])
        close(out["chosen_end_scores"], step3["chosen_end_scores"])
        close(
            model.forward_value(ids, attention_mask, return_value_only=True)[real],
            step3["values"][real],
        )


@pytest.mark.parametrize("name", ["gpt2", "llama_gqa"])
def test_trajectory(name):
    """20 steps of AdamW as trajectory.json describes them: the loss before each."""
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


# ----------------------------------------------------------------------------------------------------------------------
# transformers


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
        (
            "llama",
            {
                "n_embd": 64,
                "rope_scaling": {
                    "rope_type": "llama3",
                    "factor": 8.0,
                    "low_freq_factor": 1.0,
                    "high_freq_factor": 4.0,
                    "original_max_position_embeddings": 16,
                },
            },
        ),
    ],
)
def test_same_hidden_states_as_transformers(model_type, overrides, dtype, tolerance):
    """The config.json and weights that we write make the same backbone in transformers, at left and right padding."""
    import transformers

    torch.manual_seed(0)
    ours = GPT(small(model_type, **overrides)).to(dtype)
    for parameter in ours.parameters():
        torch.nn.init.normal_(
            parameter, std=0.5
        )  # biases and norms too: at zeros and ones, mistakes would not show
    config = transformers.AutoConfig.for_model(**ours.config.to_hf())
    theirs = transformers.AutoModel.from_config(config, attn_implementation="sdpa").to(dtype).eval()
    missing, unexpected = theirs.load_state_dict(ours.to_hf(), strict=False)
    assert not unexpected and not [name for name in missing if "inv_freq" not in name]
    ids, mask = left_padded()
    meaningful = mask.bool() | (mask.cumsum(1) > 0)  # everything but left padding
    # DeepSpeed-Chat's calls leave positions to the model: columns, but for OPT, which counts attended tokens.
    positions = (
        {}
        if model_type == "opt"
        else {"position_ids": torch.arange(ids.shape[1]).expand(ids.shape)}
    )
    expected = theirs(ids, attention_mask=mask, **positions).last_hidden_state
    if model_type == "llama" and dtype == torch.float64:
        tolerance = 1e-5  # transformers computes rotary angles and RMSNorm in float32 even then
    close(ours(ids, mask)[meaningful], expected[meaningful], tolerance)
    expected = theirs(ids, **positions).last_hidden_state
    close(ours(ids), expected, tolerance)
    assert ours(ids).dtype == dtype


@pytest.mark.parametrize("model_type", FAMILIES)
def test_backbone_saved_by_transformers_loads(model_type, tmp_path):
    """Both weight files, with the prefix and the head of a language model."""
    import transformers

    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(
        **small(model_type, n_kv_head=2 if model_type == "llama" else 4).to_hf()
    )
    theirs = transformers.AutoModelForCausalLM.from_config(config).eval()
    theirs.save_pretrained(tmp_path / "safetensors")
    theirs.save_pretrained(tmp_path / "shards", max_shard_size="10KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    (tmp_path / "bin").mkdir()
    theirs.config.save_pretrained(tmp_path / "bin")
    torch.save(theirs.state_dict(), tmp_path / "bin" / "pytorch_model.bin")
    ids = torch.randint(0, 50, (2, 7))
    expected = theirs.base_model(ids).last_hidden_state
    for directory in ("safetensors", "shards", "bin"):
        close(GPT.from_pretrained(tmp_path / directory)(ids), expected)


def old_buffers(model_type, n_layer=2):
    if model_type == "gpt2":
        return {
            f"transformer.h.{i}.attn.{name}": torch.ones(1, 1, 32, 32).tril().bool()
            if name == "bias"
            else torch.tensor(-1e4)
            for i in range(n_layer)
            for name in ("bias", "masked_bias")
        }
    return (
        {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(2) for i in range(n_layer)}
        if model_type == "llama"
        else {}
    )


def without(name, *prefixes):
    for prefix in prefixes:
        name = name.removeprefix(prefix)
    return name


VARIANTS = {  # what hub files of one and the same model look like: weights by a model with a head -> weights in a file
    "with prefix": lambda weights, model_type: weights,
    "without prefix": lambda weights, model_type: {
        without(name, "transformer.", "model."): w for name, w in weights.items()
    },
    "of the bare decoder": lambda weights, model_type: {
        without(name, "transformer.", "model.", "decoder."): w for name, w in weights.items()
    },
    "untied head": lambda weights, model_type: weights | {"lm_head.weight": torch.randn(50, 16)},
    "head of a classifier": lambda weights, model_type: (
        weights | {"score.weight": torch.randn(2, 16)}
    ),
    "no head": lambda weights, model_type: {
        name: w for name, w in weights.items() if name != "lm_head.weight"
    },
    "old buffers": lambda weights, model_type: weights | old_buffers(model_type),
    "float16": lambda weights, model_type: {name: w.half() for name, w in weights.items()},
    "bfloat16": lambda weights, model_type: {name: w.bfloat16() for name, w in weights.items()},
}


@pytest.mark.parametrize(
    "file", ["model.safetensors", "pytorch_model.bin", "pytorch_model.bin of old"]
)
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("model_type", FAMILIES)
def test_files_as_the_hub_has_them(model_type, variant, file, tmp_path):
    import safetensors.torch
    import transformers

    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(
        **small(model_type, n_kv_head=2 if model_type == "llama" else 4).to_hf()
    )
    theirs = transformers.AutoModelForCausalLM.from_config(config).eval()
    weights = VARIANTS[variant](
        {name: torch.randn_like(w) / 2 for name, w in theirs.state_dict().items()}, model_type
    )
    kept = {
        name: without(name, "transformer.", "model.", "decoder.")
        for name in theirs.base_model.state_dict()
    }
    stored = {without(name, "transformer.", "model.", "decoder."): w for name, w in weights.items()}
    theirs.base_model.load_state_dict({name: stored[bare].float() for name, bare in kept.items()})
    config.save_pretrained(tmp_path)
    if file == "model.safetensors":
        safetensors.torch.save_file(weights, tmp_path / file)
    else:  # PyTorch before 1.6 did not write zip archives
        torch.save(
            weights,
            tmp_path / "pytorch_model.bin",
            _use_new_zipfile_serialization="old" not in file,
        )
    ids, mask = left_padded()
    positions = (
        {}
        if model_type == "opt"
        else {"position_ids": torch.arange(ids.shape[1]).expand(ids.shape)}
    )
    expected = theirs.base_model(ids, attention_mask=mask, **positions).last_hidden_state[
        mask.bool()
    ]
    model = RewardModel.from_pretrained(tmp_path, pad_id=0)
    assert model.has_fresh_head and {p.dtype for p in model.parameters()} == {torch.float32}
    close(model.backbone(ids, mask)[mask.bool()], expected)


LLAMA_3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}


@pytest.mark.parametrize(
    "keys",
    [
        {"rope_theta": 500.0},
        {"rope_theta": 500.0, "rope_scaling": None},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}},
        {"rope_theta": 500.0, "rope_scaling": {"rope_type": "llama3", **LLAMA_3}},
        {"rope_theta": 500.0, "rope_scaling": {"type": "llama3", **LLAMA_3}},
        {"rope_parameters": {"rope_type": "llama3", "rope_theta": 500.0, **LLAMA_3}},
        {},
    ],
    ids=lambda keys: ",".join(keys) or "none",
)
def test_rotary_keys_of_old_and_new_config_files(keys, tmp_path):
    import transformers

    torch.manual_seed(0)
    hf = {
        key: value for key, value in small("llama", n_embd=64).to_hf().items() if "rope" not in key
    } | keys
    (tmp_path / "config.json").write_text(json.dumps(hf))
    theirs = transformers.AutoModel.from_config(
        transformers.AutoConfig.from_pretrained(tmp_path)
    ).eval()
    torch.save(theirs.state_dict(), tmp_path / "pytorch_model.bin")
    ids = torch.randint(0, 50, (2, 32))
    close(GPT.from_pretrained(tmp_path)(ids), theirs(ids).last_hidden_state)


# ----------------------------------------------------------------------------------------------------------------------
# Properties


@pytest.mark.parametrize("model_type", FAMILIES)
def test_a_position_sees_itself_and_what_is_before_it(model_type):
    torch.manual_seed(0)
    model, ids = GPT(small(model_type)), torch.randint(0, 50, (1, 8))
    changed = ids.clone()
    changed[0, 5] = (ids[0, 5] + 1) % 50
    same = torch.isclose(model(ids), model(changed), atol=1e-6).all(-1)[0]
    assert same.tolist() == [True] * 5 + [False] * 3


@pytest.mark.parametrize("model_type", FAMILIES)
def test_nothing_depends_on_what_is_masked(model_type):
    """Other ids at left padding change nothing behind them, and gradients stay finite there."""
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
    model = RewardModel(
        GPT(small(model_type, n_embd=8, n_head=2, vocab_size=9, n_positions=5)), pad_id=0
    ).double()
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
        assert ((up - down) / (2 * step)).item() == pytest.approx(
            (parameter.grad * direction).sum().item(), rel=1e-6, abs=1e-9
        ), name  # the bias of the keys has gradient 0, up to rounding


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
    assert (
        dropped == [0.5] * 8
    )  # twice: embedding, attention weights, and the two sums of the one layer
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
    opt_like = RewardModel(model.backbone, pad_id=2, num_padding_at_beginning=1)
    out = opt_like.forward_value(
        torch.tensor([[2, 5, 6, 2, 2]]), attention_mask=torch.tensor([[1, 1, 1, 0, 0]])
    )
    assert out["chosen_end_scores"].item() == out["values"][0, 2].item()


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda m: m(torch.tensor([[1, 2], [1, 50]])), ["row 1", "id 50", "column 1", "0 to 49"]),
        (lambda m: m(torch.ones(2, 40).long()), ["40 tokens", "32 positions"]),
        (lambda m: m(torch.tensor([[0, 1], [1, 2]])), ["row 0", "left", "attention_mask"]),
        (
            lambda m: m.forward_value(torch.tensor([[1, 2]]), prompt_length=3),
            ["prompt_length 3", "0 to 2"],
        ),
        (
            lambda m: m.forward_value(torch.tensor([[1, 2]]), torch.zeros(1, 2)),
            ["row 0", "attention_mask"],
        ),
    ],
    ids=["id", "length", "left", "prompt_length", "mask"],
)
def test_bad_batches_are_refused(call, words):
    with pytest.raises(ValueError) as error:
        call(RewardModel(GPT(small("gpt2")), pad_id=0))
    assert all(word in str(error.value) for word in words), error.value


# ----------------------------------------------------------------------------------------------------------------------
# The packed layout, against the padded one


def padded(model, groups):
    """The loss and the scores of comparisons, pair by pair in the padded layout: the mean over each one's pairs, then over all."""
    losses, scores = [], []
    for group in groups:
        pairs = []
        for pair in itertools.combinations(group, 2):
            input_ids, mask = data.pad_rows(pair, model.pad_id)
            out = model(input_ids, mask)
            pairs.append(out["loss"])
            scores.append((out["chosen_mean_scores"], out["rejected_mean_scores"]))
        losses.append(torch.stack(pairs).mean())
    chosen, rejected = (torch.cat(column) for column in zip(*scores))
    return {
        "loss": torch.stack(losses).mean(),
        "chosen_mean_scores": chosen,
        "rejected_mean_scores": rejected,
    }


def random_groups(seed, sizes=range(2, 7), vocab_size=50):
    """Comparisons with every relation that texts can have: shared starts, none, prefixes, equal ones, pad ids inside."""
    rng = random.Random(seed)
    groups = []
    for size in sizes:
        trunk = rng.choices(range(vocab_size), k=rng.choice((0, 1, 5, 11)))
        group = [
            trunk + rng.choices(range(vocab_size), k=rng.randint(0 if trunk else 1, 12))
            for _ in range(size)
        ]
        if rng.random() < 0.3:
            group[-1] = group[0][
                : rng.randint(1, len(group[0]))
            ]  # a prefix of another, or the same text
        groups.append(group)
    return groups


KINDS = [
    ("gpt2", {}),
    ("opt", {}),
    ("opt", {"pre_norm": False, "embed_dim": 8}),
    ("llama", {}),
    ("llama", {"n_kv_head": 2}),
    (
        "llama",
        {
            "n_embd": 64,
            "rope_scaling": {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 16,
            },
        },
    ),
]


def lively(model_type, **overrides):
    """A small model whose numbers are large enough to show mistakes."""
    torch.manual_seed(0)
    model = RewardModel(GPT(small(model_type, **overrides)), pad_id=0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


@pytest.mark.parametrize(
    "dtype, tolerance", [(torch.float64, 1e-10), (torch.float32, 1e-5)], ids=["float64", "float32"]
)
@pytest.mark.parametrize("model_type, overrides", KINDS)
def test_packed_loss_scores_and_gradients_are_those_of_the_padded_layout(
    model_type, overrides, dtype, tolerance, monkeypatch
):
    model = lively(model_type, **overrides).to(dtype)
    for seed in range(6):
        groups = random_groups(seed)
        monkeypatch.setattr(
            "parts.packed.SHORT", (0, 60, 10**6)[seed % 3]
        )  # each text, some comparisons, all of them at once
        expected = padded(model, groups)
        expected["loss"].backward()
        gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
        model.zero_grad()
        out = model(data.pack(groups, model.pad_id))
        out["loss"].backward()
        for key in expected:
            torch.testing.assert_close(out[key], expected[key], atol=tolerance, rtol=tolerance)
        for name, parameter in model.named_parameters():
            scale = max(1.0, gradients[name].abs().max().item())
            torch.testing.assert_close(
                parameter.grad, gradients[name], atol=tolerance * scale, rtol=0, msg=name
            )
        model.zero_grad()


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_packed_layout_has_deepspeed_chats_numbers(name):
    model, expected = from_deepspeed_chat(name, "expected.json")
    ids, mask, B = (
        expected["input_ids"],
        expected["attention_mask"],
        len(expected["input_ids"]) // 2,
    )
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


@pytest.mark.parametrize("loss", ["divergent", "end"])
@pytest.mark.parametrize("model_type", ["gpt2", "opt"])
def test_variants_of_the_loss_are_the_same_in_both_layouts(model_type, loss):
    """With margins and centering, on pairs and rankings; for the ends alone no padding is computed."""
    model = lively(model_type).double()
    model.objective = {"loss": loss, "center_rewards_coefficient": 0.1}
    groups = random_groups(1, sizes=(2, 2, 4))
    margins = [0.5, -1.0, 0.0]
    batch = data.pack(groups, model.pad_id, longest_tail=model.longest_tail, margins=margins)
    assert batch.num_tokens == sum(packed_size(group, model.longest_tail) for group in groups)
    if loss == "end":
        assert not any(batch.tails)
    expected = []
    for group, margin in zip(groups, margins):
        pairs = list(itertools.combinations(group, 2))
        input_ids, mask = data.pad_rows([a for a, _ in pairs] + [b for _, b in pairs], model.pad_id)
        expected.append(model(input_ids, mask, [margin] * len(pairs))["loss"])
    results = [
        [loss, *torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)]
        for loss in (model(batch)["loss"], torch.stack(expected).mean())
    ]
    for packed, reference in zip(*results):
        if reference is None or packed is None:  # the embedding of OPT's padding positions, say
            assert (packed if reference is None else reference).abs().max() == 0
        else:
            torch.testing.assert_close(packed, reference, atol=1e-10, rtol=1e-10)
    plain = model.objective = {}
    assert model(data.pack(groups, model.pad_id))["loss"] != results[0][0], plain


def test_packed_batch_takes_nothing_beside_it_and_no_unknown_loss():
    model = lively("gpt2")
    batch = data.pack([[[1, 2], [1, 3]]], model.pad_id)
    for beside in ({"margins": [1.0]}, {"attention_mask": torch.ones(2, 2)}):
        with pytest.raises(ValueError, match="give margins to data.pack"):
            model(batch, **beside)
    with pytest.raises(
        ValueError, match="margins: found 2 numbers; expected a finite number for each of 1"
    ):
        model(data.pack([[[1, 2], [1, 3]]], model.pad_id, margins=[1.0, 2.0]))
    model.objective = {"loss": "End"}
    with pytest.raises(ValueError, match="loss: found 'End'; expected divergent or end"):
        model(batch)


@pytest.mark.parametrize("layout", ["deepspeed-chat", "hf"])
def test_weights_can_be_read_by_whom_config_json_can(layout, tmp_path):
    RewardModel(GPT(small("gpt2")), pad_id=0).save_pretrained(tmp_path, layout)
    assert (
        len({file.stat().st_mode for file in tmp_path.iterdir()}) == 1
        and len(list(tmp_path.iterdir())) == 2
    )


def test_packed_batch_by_hand():
    batch = data.pack([[[5, 6, 7, 8], [5, 6, 9]], [[1], [2, 3]]], pad_id=0)
    assert (batch.trunks, batch.branches, batch.tails) == ([2, 0], [2, 1, 1, 2], [0, 1, 1, 0])
    assert batch.input_ids.tolist() == [5, 6] + [7, 8, 9, 1, 2, 3] + [
        0,
        0,
    ]  # trunks, branches, tails
    assert batch.positions.tolist() == [0, 1] + [2, 3, 2, 0, 0, 1] + [3, 1]
    assert batch.num_tokens == 10 == sum(map(packed_size, batch.token_groups)) and batch.length == 4
    prefix = data.pack(
        [[[5, 6, 7], [5, 6]]], pad_id=0
    )  # the score of the second is read at its last token, in its branch
    assert (prefix.trunks, prefix.branches, prefix.tails) == ([1], [2, 1], [0, 1])


@pytest.mark.parametrize("model_type, overrides", KINDS)
def test_nothing_attends_to_another_comparison_or_branch_or_to_padding(model_type, overrides):
    """By gradients: which embeddings the reward at each place depends on, against the definition."""
    model = lively(model_type, **overrides).double()
    groups = [
        [[1, 2, 3, 4], [1, 2, 5], [1, 2, 6, 7, 8]],
        [[11, 12, 13], [11, 14]],
    ]  # every id but the shared ones is its text's own
    rewards = model.packed_rewards(data.pack(groups, pad_id=0))
    for group, rows in zip(groups, rewards):
        for text, row in zip(group, rows):
            trunk = max(map(len, group)) - len(row)
            for column, reward in enumerate(row, start=trunk):
                (grad,) = torch.autograd.grad(
                    reward, model.backbone.embed.weight, retain_graph=True
                )
                seen = set(grad.abs().sum(1).nonzero().flatten().tolist())
                assert seen == set(text[: column + 1]) | ({0} if column >= len(text) else set()), (
                    text,
                    column,
                )


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
def test_the_two_calls_of_the_gpu_path_are_what_many_calls_compute(
    varlen_attn, kv_heads, longest_tail, monkeypatch
):
    """As far as a CPU can tell: which rows go where. With the trunks' queries, and without, as in the last block."""
    import torch.nn.attention.varlen

    monkeypatch.setattr(torch.nn.attention.varlen, "varlen_attn", varlen_attn)
    torch.manual_seed(0)
    for seed in range(5):
        batch = data.pack(random_groups(seed), 0, longest_tail=longest_tail)
        n_text = batch.num_tokens - sum(batch.tails)
        q, k, v = (
            torch.randn(n, heads, 8, dtype=torch.float64)
            for n, heads in ((batch.num_tokens, 4), (n_text, kv_heads), (n_text, kv_heads))
        )
        for queries in (q, q[sum(batch.trunks) :]):
            many, two = (
                PackedAttention(batch, scaled_dot_product),
                PackedAttention(batch, scaled_dot_product),
            )
            expected = many.with_masks(queries, k, v, 0.0)
            for _ in range(2):  # the second time by the plan of the first
                torch.testing.assert_close(
                    two.with_varlen(queries, k, v), expected, atol=1e-12, rtol=0
                )
                torch.testing.assert_close(
                    many.with_masks(queries, k, v, 0.0), expected, atol=0, rtol=0
                )


def test_single_texts_are_packed_for_scoring_alone():
    model = lively("llama")
    texts = [[5, 6, 7], [8], [0, 9, 0]]
    with pytest.raises(ValueError, match="comparison 0: 1 sequences"):
        data.pack([[text] for text in texts], 0)
    rows = model.packed_rewards(
        data.pack([[text] for text in texts], 0, min_responses=1, longest_tail=0)
    )
    for (row,), text in zip(rows, texts):
        values = model.forward_value(
            torch.tensor([text]), torch.ones(1, len(text)), return_value_only=True
        )
        assert row.shape == (1,) and row[0].item() == pytest.approx(values[0, -1].item(), abs=1e-5)


@pytest.mark.parametrize(
    "groups, words",
    [
        ([], ["no comparison"]),
        ([[[1], [2]], [[1, 2]]], ["comparison 1", "2 or more"]),
        ([[[1], []]], ["comparison 0", "[1, 0]"]),
    ],
)
def test_what_cannot_be_packed_is_refused(groups, words):
    with pytest.raises(ValueError) as error:
        data.pack(groups, pad_id=0)
    assert all(word in str(error.value) for word in words), error.value


def test_bad_packed_batches_are_refused():
    model = RewardModel(GPT(small("gpt2")), pad_id=0)
    with pytest.raises(ValueError, match="33 tokens, but the model has 32 positions"):
        model(data.pack([[[1] * 33, [2]]], 0))
    with pytest.raises(
        ValueError, match=r"comparison 1, response 0: id 50; the model has ids 0 to 49"
    ):
        model(data.pack([[[1], [2]], [[1, 50], [2]]], 0))


@pytest.mark.parametrize(
    "options",
    [dict(longest_tail=0), dict(longest_tail=1), dict(longest_tail=2), dict(min_responses=1)],
    ids=str,
)
def test_a_batch_packed_for_scores_alone_has_no_loss(options):
    groups = [[[1, 2, 3], [1, 4, 5, 6, 7, 8]]] + ([[[1]]] if "min_responses" in options else [])
    with pytest.raises(ValueError, match="packed for scores alone"):
        lively("gpt2")(data.pack(groups, 0, **options))


def test_a_pad_id_beyond_the_vocabulary_is_refused():
    with pytest.raises(ValueError, match="pad_id 50; the model has ids 0 to 49"):
        lively("gpt2")(data.pack([[[1, 2, 3], [1, 4]]], 50))


def test_dropout_in_the_packed_layout_is_active_in_training_alone():
    model, batch = (
        RewardModel(GPT(small("gpt2", dropout=0.5)), pad_id=0),
        data.pack([[[1, 2, 3], [1, 4]]], 0),
    )
    assert not torch.equal(model(batch)["loss"], model(batch)["loss"])
    model.eval()
    assert torch.equal(model(batch)["loss"], model(batch)["loss"])


# ----------------------------------------------------------------------------------------------------------------------
# Checkpoints


@pytest.mark.parametrize("model_type", FAMILIES)
def test_hf_layout_gives_the_same_end_scores_in_transformers(model_type, tmp_path):
    import transformers

    torch.manual_seed(0)
    narrow = {"embed_dim": 8, "pre_norm": False} if model_type == "opt" else {}
    model = RewardModel(GPT(small(model_type, **narrow)), pad_id=49)
    model.save_pretrained(tmp_path, layout="hf")
    theirs, info = transformers.AutoModelForSequenceClassification.from_pretrained(
        tmp_path, output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    ids = torch.randint(0, 49, (4, 9))
    mask = torch.arange(9) < torch.tensor([[9], [5], [7], [1]])
    ids[~mask] = 49
    scores = model(ids, mask.long())
    expected = theirs(ids, attention_mask=mask.long()).logits[:, 0]
    close(torch.cat((scores["chosen_mean_scores"], scores["rejected_mean_scores"])), expected)
    again = RewardModel.from_pretrained(tmp_path)
    assert torch.equal(again(ids, mask.long())["loss"], scores["loss"]) and again.pad_id == 49


@pytest.mark.parametrize("model_type", FAMILIES)
def test_saved_model_is_loaded_as_it_was(model_type, tmp_path):
    torch.manual_seed(0)
    model = RewardModel(
        GPT(small(model_type, token_ids={"bos_token_id": 1, "eos_token_id": 2})),
        pad_id=49,
        num_padding_at_beginning=3,
    )
    model.save_pretrained(tmp_path)
    loaded = RewardModel.from_pretrained(tmp_path)
    assert (loaded.pad_id, loaded.num_padding_at_beginning) == (49, 3)
    ids = torch.randint(0, 49, (4, 9))
    assert torch.equal(
        loaded(ids, torch.ones_like(ids))["loss"], model(ids, torch.ones_like(ids))["loss"]
    )
    weights = torch.load(tmp_path / "pytorch_model.bin", weights_only=True)
    embed = weights[f"rwtransformer.{FAMILIES[model_type]['names']['embed']}.weight"]
    assert (
        len(embed) == 56 == json.loads((tmp_path / "config.json").read_text())["vocab_size"]
    )  # 8 * ceil(50 / 8)
    assert embed[50:].count_nonzero() == 0


def test_embedding_is_saved_with_the_rows_that_the_tokenizer_needs(tmp_path):
    """DeepSpeed-Chat's step 3 resizes to 8 * ceil(length of the tokenizer / 8), also where the model had more rows."""
    tokenizer = data.train_tokenizer(["a few words", "and some more"], 290)
    model = RewardModel(GPT(small("llama", vocab_size=400)), pad_id=tokenizer.pad_id)
    model.save_pretrained(tmp_path, tokenizer=tokenizer)
    weights = torch.load(tmp_path / "pytorch_model.bin", weights_only=True)
    assert (
        len(weights["rwtransformer.embed_tokens.weight"]) == 8 * -(-tokenizer.vocab_size // 8) < 400
    )
    assert data.load_tokenizer(tmp_path).encode("some words") == tokenizer.encode("some words")
    assert RewardModel.from_pretrained(tmp_path).pad_id == tokenizer.pad_id


@pytest.mark.parametrize("pad_id", [None, 0, 320])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("model_type", FAMILIES)
def test_round_trip_with_a_tokenizer(model_type, layout, pad_id, tmp_path):
    """Everything comes back bit for bit, and the rows of the embedding are what the length of the tokenizer asks for: its own pad
    is id 0; a new one stands at the end of a vocabulary of 290, or some ids behind it."""
    pytest.importorskip("tokenizers")  # writes what AutoTokenizer reads
    import transformers

    torch.manual_seed(0)
    proto = data.train_tokenizer(["a few words", "and some more"], 290).model_proto
    tokenizer = data.Tokenizer(proto, pad_id)
    model = RewardModel(
        GPT(small(model_type, vocab_size=tokenizer.vocab_size)),
        tokenizer.pad_id,
        num_padding_at_beginning=2,
    )
    model.save_pretrained(tmp_path, layout=layout, tokenizer=tokenizer)
    again = RewardModel.from_pretrained(tmp_path)
    assert (again.pad_id, again.num_padding_at_beginning, again.has_fresh_head) == (
        tokenizer.pad_id,
        2,
        False,
    )
    ours, saved = dict(model.named_parameters()), dict(again.named_parameters())
    rows = 8 * math.ceil(len(transformers.AutoTokenizer.from_pretrained(tmp_path)) / 8)
    assert (
        len(saved["backbone.embed.weight"])
        == rows
        == json.loads((tmp_path / "config.json").read_text())["vocab_size"]
    )
    assert (
        rows >= tokenizer.vocab_size > rows - 8
        and not saved["backbone.embed.weight"][tokenizer.vocab_size :].any()
    )
    assert ours.keys() == saved.keys() and all(
        torch.equal(p, saved[name][: len(p)]) for name, p in ours.items()
    )
    assert data.load_tokenizer(tmp_path).pad_id == tokenizer.pad_id


@pytest.mark.parametrize("layout", LAYOUTS)
def test_model_is_saved_over_the_files_that_it_was_loaded_from(layout, tmp_path):
    """Its weights are mapped from them, so they must not change under it."""
    torch.manual_seed(0)
    RewardModel(GPT(small("llama", vocab_size=48)), pad_id=0).save_pretrained(tmp_path, layout)
    model = RewardModel.from_pretrained(tmp_path)
    before = model.backbone.blocks[0].q.weight.detach().clone()
    other = RewardModel(GPT(small("llama", vocab_size=48)), pad_id=0)
    other.save_pretrained(tmp_path, layout)
    assert torch.equal(model.backbone.blocks[0].q.weight, before)
    model.save_pretrained(tmp_path, layout)
    assert torch.equal(RewardModel.from_pretrained(tmp_path).backbone.blocks[0].q.weight, before)


def test_model_is_not_saved_beside_one_that_would_be_read_in_its_place(tmp_path):
    model = RewardModel(GPT(small("llama")), pad_id=0)
    for first, second, file in (
        ("hf", "deepspeed-chat", "model.safetensors"),
        ("deepspeed-chat", "hf", "pytorch_model.bin"),
    ):
        model.save_pretrained(tmp_path / first, first)
        with pytest.raises(ValueError, match=f"{first}/{file}: another model"):
            model.save_pretrained(tmp_path / first, second)


def test_backbone_of_a_trained_model_loads_as_a_backbone(tmp_path):
    """Bit for bit, and also in the other spelling of the prefix that versions of DeepSpeed-Chat have."""
    model = RewardModel(GPT(small("gpt2", vocab_size=48)), pad_id=0)
    model.save_pretrained(tmp_path)
    # the parameters, not the outputs: loaded ones lie transposed in memory, where a product may round otherwise
    same = lambda loaded, saved: all(
        torch.equal(a, b) for a, b in zip(loaded.parameters(), saved.parameters(), strict=True)
    )
    assert same(GPT.from_pretrained(tmp_path), model.backbone)
    weights = torch.load(tmp_path / "pytorch_model.bin", weights_only=True)
    old = {
        name.replace("rwtransformer", "rwtranrsformer"): weight for name, weight in weights.items()
    }
    torch.save(old, tmp_path / "pytorch_model.bin")
    assert same(RewardModel.from_pretrained(tmp_path), model)


@pytest.mark.parametrize(
    "model_type, token_ids, expected",
    [
        ("llama", {"bos_token_id": 1, "pad_token_id": 1}, (1, 1)),
        ("llama", {"bos_token_id": 1, "pad_token_id": 2}, (2, 0)),
        (
            "llama",
            {"bos_token_id": 1, "pad_token_id": None},
            (48, 0),
        ),  # a new id right after the vocabulary
        ("llama", {"bos_token_id": 1, "pad_token_id": -1}, (48, 0)),  # Llama 1's way to say "none"
        ("gpt2", {"bos_token_id": 1, "pad_token_id": 1}, (1, 0)),  # gpt2 puts no bos in front
    ],
)
def test_padding_follows_from_the_directory(model_type, token_ids, expected, tmp_path):
    backbone = GPT(small(model_type, vocab_size=48, token_ids=token_ids))
    (tmp_path / "config.json").write_text(json.dumps(backbone.config.to_hf()))
    torch.save(backbone.to_hf(), tmp_path / "pytorch_model.bin")
    model = RewardModel.from_pretrained(tmp_path)
    assert (model.pad_id, model.num_padding_at_beginning) == expected
    given = RewardModel.from_pretrained(tmp_path, pad_id=3, num_padding_at_beginning=2)
    assert (given.pad_id, given.num_padding_at_beginning) == (3, 2)


def test_padding_is_the_tokenizers_where_config_says_nothing(tmp_path):
    data.train_tokenizer(["a few words", "and some more"], 290).save(tmp_path)
    backbone = GPT(small("llama", vocab_size=300))
    (tmp_path / "config.json").write_text(json.dumps(backbone.config.to_hf()))
    torch.save(backbone.to_hf(), tmp_path / "pytorch_model.bin")
    assert RewardModel.from_pretrained(tmp_path).pad_id == data.load_tokenizer(tmp_path).pad_id == 0


def test_no_pad_said_by_minus_one_is_no_pad(tmp_path):
    """Llama 1's way: the tokenizer's own is taken."""
    data.train_tokenizer(["a few words", "and some more"], 290).save(tmp_path)
    backbone = GPT(small("llama", vocab_size=300, token_ids={"pad_token_id": -1}))
    (tmp_path / "config.json").write_text(json.dumps(backbone.config.to_hf()))
    torch.save(backbone.to_hf(), tmp_path / "pytorch_model.bin")
    assert RewardModel.from_pretrained(tmp_path).pad_id == 0


def test_rewards_of_a_half_precision_model_are_float32():
    model = RewardModel(GPT(small("llama")), pad_id=0).bfloat16()
    out = model(torch.tensor([[1, 2, 3], [1, 4, 0]]))
    assert {value.dtype for value in out.values()} == {torch.float32}


@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_under_autocast_blocks_compute_in_half_precision_and_rewards_and_loss_do_not(layout):
    torch.manual_seed(0)
    model = RewardModel(GPT(small("llama")), pad_id=0)
    ids = torch.randint(1, 48, (8, 9))
    inputs = (
        ids
        if layout == "padded"
        else data.pack([[ids[i].tolist(), ids[i + 4].tolist()] for i in range(4)], 0)
    )
    exact = model(inputs)
    with torch.autocast("cpu", torch.bfloat16):
        out = model(inputs)
    assert {value.dtype for value in out.values()} == {torch.float32}
    scores = torch.cat([out["chosen_mean_scores"], out["rejected_mean_scores"]])
    assert (scores.bfloat16().float() != scores).any()  # not rounded to half precision
    assert out["loss"] != exact["loss"] and torch.allclose(out["loss"], exact["loss"], atol=0.02)


@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_gradient_checkpointing_keeps_less_and_changes_no_bit(layout):
    """With dropout: the blocks draw the same numbers when they are computed again."""
    torch.manual_seed(0)
    model = RewardModel(GPT(small("gpt2", n_layer=4, dropout=0.3)), pad_id=0)
    ids = torch.randint(1, 48, (8, 9))
    inputs = (
        ids
        if layout == "padded"
        else data.pack([[ids[i].tolist(), ids[i + 4].tolist()] for i in range(4)], 0)
    )
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
    """0.02 at width 768; what writes to the residual stream is divided by the square root of the number of writes."""
    torch.manual_seed(0)
    blocks = GPT(small("gpt2", n_embd=192, n_layer=8)).blocks
    std = 0.02 * 2  # a quarter of the width
    for name, expected in (
        ("q", std),
        ("v", std),
        ("mlp_in", std),
        ("attn_out", std / 4),
        ("mlp_out", std / 4),
    ):
        weights = torch.stack([getattr(block, name).weight.detach() for block in blocks])
        assert weights.std().item() == pytest.approx(expected, rel=0.02), name


def test_pad_id_beyond_the_embedding_adds_rows_of_zeros():
    model = RewardModel.from_pretrained(
        TESTDATA / "gpt2"
    )  # its config.json has no pad id: a new one behind the vocabulary
    assert model.pad_id == 96
    assert model.backbone.embed.weight.shape == (97, 32)
    assert model.backbone.embed.weight[96].count_nonzero() == 0
    assert RewardModel.from_pretrained(
        TESTDATA / "gpt2", pad_id=99
    ).backbone.embed.weight.shape == (100, 32)


class Payload:
    def __reduce__(self):
        return print, ("code in a pickle ran",)


def broken(directory, change):
    """A copy of the tiny gpt2 checkpoint with one thing wrong."""
    config = json.loads((TESTDATA / "gpt2" / "config.json").read_text())
    weights = GPT.from_pretrained(TESTDATA / "gpt2").to_hf()
    directory.mkdir()
    change(config, weights)
    (directory / "config.json").write_text(json.dumps(config))
    torch.save(weights, directory / "pytorch_model.bin")
    return directory


@pytest.mark.parametrize(
    "change, words",
    [
        (
            lambda config, weights: weights.pop("h.1.mlp.c_fc.bias"),
            ["h.1.mlp.c_fc.bias", "missing"],
        ),
        (
            lambda config, weights: weights.update({"h.2.ln_1.weight": torch.ones(32)}),
            ["h.2.ln_1.weight", "not part of"],
        ),
        (
            lambda config, weights: weights.update({"h.2.attn.c_attn.bias": torch.ones(96)}),
            ["h.2.attn.c_attn.bias", "not part of"],
        ),
        (
            lambda config, weights: weights.update({"ln_f.bias": torch.ones(31)}),
            ["ln_f.bias", "[31]", "[32]"],
        ),
        (
            lambda config, weights: weights.update({"h.0.mlp.c_fc.weight": torch.ones(128, 32)}),
            ["h.0.mlp.c_fc.weight", "[128, 32]", "[32, 128]"],
        ),
        (lambda config, weights: config.update(n_embd=64), ["wte.weight", "[96, 32]", "[96, 64]"]),
        (
            lambda config, weights: config.update(model_type="bert"),
            ["config.json", "'bert'", "gpt2", "llama"],
        ),
        (lambda config, weights: config.pop("n_layer"), ["config.json", "n_layer", "missing"]),
        (
            lambda config, weights: config.update(scale_attn_by_inverse_layer_idx=True),
            ["scale_attn_by_inverse_layer_idx", "True"],
        ),
        (
            lambda config, weights: config.update(activation_function="swish2"),
            ["swish2", "gelu_new"],
        ),
        (lambda config, weights: config.update(n_head=5), ["config.json", "32", "5"]),
        (lambda config, weights: config.update(n_head=0), ["config.json", "n_head", "0"]),
        (lambda config, weights: config.update(n_layer="2"), ["config.json", "n_layer", "'2'"]),
        (
            lambda config, weights: config.update(layer_norm_epsilon="x"),
            ["config.json", "layer_norm_epsilon", "'x'"],
        ),
        (
            lambda config, weights: config.update(pad_token_id="0"),
            ["config.json", "pad_token_id", "'0'"],
        ),
        (lambda config, weights: config.update(model_type=[]), ["config.json", "[]", "gpt2"]),
        (
            lambda config, weights: weights.update({"ln_f.bias": [1.0] * 32}),
            ["pytorch_model.bin", "tensors"],
        ),
        (
            lambda config, weights: weights.update({"ln_f.bias": torch.ones(32).to_sparse()}),
            ["pytorch_model.bin", "tensors"],
        ),
        (
            lambda config, weights: weights.update({"ln_f.bias": torch.ones(32).to(torch.int8)}),
            ["ln_f.bias", "int8", "float32"],
        ),
        (
            lambda config, weights: config.update(pad_token_id=10**12),
            ["config.json", "pad_token_id", "10000"],
        ),
        (
            lambda config, weights: config.update(n_positions=10**20),
            ["config.json", "n_positions", "10000"],
        ),
        (
            lambda config, weights: config.update(bos_token_id=[1]),
            ["config.json", "bos_token_id", "[1]"],
        ),
        (
            lambda config, weights: config.update(num_padding_at_beginning=None),
            ["config.json", "num_padding_at_beginning", "None"],
        ),
        (
            lambda config, weights: config.update(quantization_config={"bits": 4}),
            ["config.json", "quantization_config"],
        ),
        (
            lambda config, weights: config.update(rope_parameters=[1]),
            ["config.json", "rope_parameters", "[1]"],
        ),
        (
            lambda config, weights: config.update(rope_scaling={"type": "yarn"}),
            ["config.json", "'yarn'", "llama3"],
        ),
        (
            lambda config, weights: config.update(
                rope_scaling={"rope_type": "llama3", "factor": 8}
            ),
            ["config.json", "low_freq_factor"],
        ),
    ],
    ids=[
        "missing",
        "left over",
        "left over that ends like a buffer",
        "shape",
        "transposed",
        "width",
        "family",
        "key",
        "unsupported",
        "activation",
        "heads",
        "no heads",
        "text for a number",
        "text for eps",
        "text for an id",
        "list for a family",
        "list for a weight",
        "sparse",
        "int8",
        "huge pad",
        "huge n_positions",
        "list for bos",
        "null for a count",
        "quantized",
        "list for rope",
        "unknown rope",
        "incomplete rope",
    ],
)
def test_bad_checkpoints_are_refused(change, words, tmp_path):
    directory = broken(tmp_path / "model", change)
    with pytest.raises(ValueError) as error:
        GPT.from_pretrained(directory)
    assert all(word in str(error.value) for word in [str(directory), *words]), error.value


def cut(weights, file):
    import safetensors.torch

    file.write_bytes(safetensors.torch.save(weights)[:5000])


@pytest.mark.parametrize(
    "spoil, words",
    [
        (lambda d: (d / "config.json").unlink(), ["no config.json"]),
        (
            lambda d: (d / "config.json").write_text('{"model_type": "gpt2"'),
            ["config.json", "not JSON"],
        ),
        (
            lambda d: (d / "pytorch_model.bin").unlink(),
            ["neither model.safetensors nor pytorch_model.bin"],
        ),
        (
            lambda d: (d / "pytorch_model.bin").write_bytes(
                (d / "pytorch_model.bin").read_bytes()[:5000]
            ),
            ["pytorch_model.bin"],
        ),
        (
            lambda d: (d / "pytorch_model.bin").write_bytes(pickle.dumps(Payload(), protocol=2)),
            ["pytorch_model.bin"],
        ),
        (
            lambda d: (d / "model.safetensors").write_bytes(b"not safetensors"),
            ["model.safetensors"],
        ),
        (
            lambda d: cut(GPT.from_pretrained(d).to_hf(), d / "model.safetensors"),
            ["model.safetensors"],
        ),
        (
            lambda d: (d / "model.safetensors.index.json").write_text(
                '{"weight_map": {"wte.weight": "model-1-of-2.safetensors"}}'
            ),
            ["model-1-of-2.safetensors"],
        ),
        (
            lambda d: (d / "model.safetensors.index.json").write_text(
                '{"weight_map": {"wte.weight": 1}}'
            ),
            ["index.json", "weight_map"],
        ),
        (
            lambda d: (d / "model.safetensors.index.json").write_text('{"weight_map": '),
            ["index.json", "weight_map"],
        ),
        (
            lambda d: (d / "model.safetensors.index.json").write_text("[]"),
            ["index.json", "weight_map"],
        ),
        (
            lambda d: torch.save(
                {**torch.load(d / "pytorch_model.bin"), "v_head.weight": torch.ones(1, 31)},
                d / "pytorch_model.bin",
            ),
            ["v_head.weight", "[1, 31]", "[1, 32]"],
        ),
        (
            lambda d: torch.save(
                {**torch.load(d / "pytorch_model.bin"), "score.weight": torch.ones(1, 31)},
                d / "pytorch_model.bin",
            ),
            ["score.weight", "[1, 31]", "[1, 32]"],
        ),
    ],
    ids=[
        "no config",
        "cut config",
        "no weights",
        "cut weights",
        "code in the pickle",
        "not safetensors",
        "cut safetensors",
        "missing shard",
        "index of numbers",
        "cut index",
        "index of nothing",
        "head of another width",
        "score of another width",
    ],
)
def test_bad_files_are_refused(spoil, words, tmp_path, capfd):
    directory = broken(tmp_path / "model", lambda config, weights: None)
    spoil(directory)
    with pytest.raises(ValueError) as error:
        RewardModel.from_pretrained(directory)
    assert all(word in str(error.value) for word in [str(directory), *words]), error.value
    assert "code in a pickle ran" not in capfd.readouterr().out


def test_missing_directory_is_named():
    with pytest.raises(ValueError, match="/no/such/model: no such directory"):
        GPT.from_pretrained("/no/such/model")
