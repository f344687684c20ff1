"""Random configurations of every family, in Hugging Face's files, beside `transformers`.

Each is a config.json as others write it, with weights of a model of transformers. Tests of single
features are in test_model.py, tests of files in parts/test_huggingface.py. To try more:

    python test_families.py 200        worst differences of each family, over 200 configurations
"""

import json
import random
import sys
import tempfile
from collections import defaultdict
from pathlib import Path

import pytest
import torch

from model import GPT
from parts.huggingface import FAMILIES
from parts.test_packed import padded, random_groups
from rm import RewardModel
from test_model import LLAMA_3, exact_transformers, left_padded, positions_of

LENGTH = 24  # of the longest row
TOLERANCES = {
    "hidden states, float32": 1e-5,
    "hidden states, float64": 1e-9,
    "step 3, float64": 1e-9,
    "packed, float64": 1e-10,
    "gradients, float64": 1e-10,
    "scores of the hf layout": 1e-5,
    "hidden states of the deepspeed-chat layout": 1e-5,
    "bits of either layout": 0,
}

# --------------------------------------------------------------------------------------------------
# Configurations


def rotary_keys(rng: random.Random, model_type: str) -> dict:
    """Draw rotary positions, spelled as transformers 4 or 5 does."""
    rope = {"rope_type": "default", "rope_theta": rng.choice((100.0, 10000.0, 1e6))}
    if rng.random() < 0.4:
        rope |= LLAMA_3 | {"rope_type": "llama3"}
    fraction = rng.choice((0.25, 0.5, 1.0))
    if model_type == "gpt_neox":
        rope["partial_rotary_factor"] = fraction
    if rng.random() < 0.5:
        return {"rope_parameters": rope}
    keys = {"rope_theta": rope.pop("rope_theta")}
    if model_type == "gpt_neox":
        del rope["partial_rotary_factor"]
        keys = {"rotary_emb_base": keys["rope_theta"], "rotary_pct": fraction}
    if rope["rope_type"] == "llama3":
        keys["rope_scaling"] = rope
    return keys


def window_keys(rng: random.Random, model_type: str, layers: int) -> dict:
    """Draw a sliding window as long as the longest row, or one that no layer uses."""
    keys = {"sliding_window": rng.choice((None, LENGTH, LENGTH + 1))}
    if model_type == "mistral":
        return keys
    keys["use_sliding_window"] = rng.random() < 0.7
    if not keys["use_sliding_window"]:
        keys["sliding_window"] = rng.choice((None, 4))
    keys["max_window_layers"] = rng.randint(0, layers)
    if keys["max_window_layers"] == layers:
        keys["sliding_window"] = 4
    if keys["sliding_window"] and keys["use_sliding_window"] and rng.random() < 0.3:
        keys["layer_types"] = ["full_attention"] * layers
    return keys


def random_config(seed: int) -> dict:
    """Draw a config.json; the families take turns."""
    rng, model_type = random.Random(seed), list(FAMILIES)[seed % len(FAMILIES)]
    layers, heads = rng.randint(1, 3), rng.choice((1, 2, 4))
    width = heads * rng.choice((4, 6, 8))
    inner = rng.choice((12, 4 * width))
    shape = {
        "vocab_size": 50,
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "max_position_embeddings": 32,
    }
    if model_type == "gpt2":
        return {
            "model_type": model_type,
            "vocab_size": 50,
            "n_positions": 32,
            "n_embd": width,
            "n_layer": layers,
            "n_head": heads,
            "n_inner": rng.choice((None, inner)),
            "activation_function": rng.choice(("gelu_new", "relu", "gelu")),
            "layer_norm_epsilon": rng.choice((1e-5, 1e-3)),
        }
    if model_type == "opt":
        return shape | {
            "model_type": model_type,
            "ffn_dim": inner,
            "do_layer_norm_before": rng.random() < 0.5,
            "word_embed_proj_dim": rng.choice((width, 4)),
            "activation_function": rng.choice(("relu", "gelu")),
        }
    keys = shape | {"model_type": model_type, "intermediate_size": inner}
    keys |= rotary_keys(rng, model_type)
    keys["tie_word_embeddings"] = rng.random() < 0.5
    if model_type in ("llama", "qwen3", "gpt_neox") and rng.random() < 0.6:
        keys["attention_bias"] = rng.random() < 0.5
    if model_type == "gpt_neox":
        keys["hidden_act"] = rng.choice(("gelu", "gelu_fast", "gelu_new"))
        keys["layer_norm_eps"] = rng.choice((1e-5, 1e-3))
        keys["use_parallel_residual"] = rng.random() < 0.5
        return keys
    keys["rms_norm_eps"] = rng.choice((1e-6, 1e-3))
    keys["num_key_value_heads"] = rng.choice([n for n in (1, 2, 4) if heads % n == 0])
    if model_type == "llama":
        keys["mlp_bias"] = rng.random() < 0.5
    else:
        keys |= window_keys(rng, model_type, layers)
    if rng.random() < 0.6 or model_type == "qwen3":
        keys["head_dim"] = rng.choice((4, 6, 10))
    return keys


# --------------------------------------------------------------------------------------------------
# Comparing


def theirs_of(directory, dtype: torch.dtype):
    """Load a backbone with transformers."""
    import transformers

    options = {"dtype": dtype, "attn_implementation": "sdpa"}
    return transformers.AutoModel.from_pretrained(directory, **options).eval()


def write_model(config: dict, directory: Path, dtype: torch.dtype):
    """Write config.json, and weights of a language model, large enough to show mistakes.

    The weights are in shards, tied or not, in one of three dtypes.
    """
    import transformers

    (directory / "config.json").write_text(json.dumps(config))
    read = transformers.AutoConfig.from_pretrained(directory)
    model = transformers.AutoModelForCausalLM.from_config(read)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    model.to(dtype).save_pretrained(directory, max_shard_size="20KB")
    (directory / "config.json").write_text(json.dumps(config))  # as others have written it


def apart(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Find the largest difference; infinity for numbers that are not finite."""
    return (found - expected).abs().nan_to_num(nan=float("inf")).max().item()


def hidden_states(model, ids, mask, model_type) -> torch.Tensor:
    positions = positions_of(model_type, ids)
    return model(ids, attention_mask=mask, **positions).last_hidden_state


def packed_beside_padded(model: RewardModel, seed: int) -> tuple[float, float]:
    """Compare loss and scores, then gradients, these by each weight's largest."""
    groups = random_groups(seed, sizes=(2, 3))
    expected = padded(model, groups)
    weights = dict(model.named_parameters())
    gradients = torch.autograd.grad(expected["loss"], weights.values())
    out = model(model.pack(groups))
    found = torch.autograd.grad(out["loss"], weights.values())
    largest = max(gradient.abs().max().item() for gradient in gradients)
    apart_in_gradients = 0.0
    for one, other in zip(found, gradients):
        scale = other.abs().max().item()
        if scale < 1e-12 * largest:  # it is 0 but for rounding: the last norm's bias, say
            scale = largest
        apart_in_gradients = max(apart_in_gradients, apart(one, other) / scale)
    return max(apart(out[key], expected[key]) for key in expected), apart_in_gradients


def through_files(model: RewardModel, directory: Path, ids, mask, model_type: str) -> dict:
    """Save a model in both layouts, and load it with transformers and with ours."""
    import transformers

    found = {}
    positions = positions_of(model_type, ids)
    model.save_pretrained(directory / "hf", layout="hf")
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(directory / "hf")
    lengths = mask.sum(1)
    logits = theirs.eval()(ids, attention_mask=mask, **positions).logits[:, 0]
    ours = model.token_rewards(ids, mask)[torch.arange(len(ids)), lengths - 1]
    found["scores of the hf layout"] = apart(logits, ours)
    model.save_pretrained(directory / "chat")
    weights = torch.load(directory / "chat" / "pytorch_model.bin")
    config = transformers.AutoConfig.from_pretrained(directory / "chat")
    theirs = torch.nn.Module()
    theirs.rwtransformer = transformers.AutoModel.from_config(config).eval()
    theirs.v_head = torch.nn.Linear(model.v_head.in_features, 1, bias=False)
    theirs.load_state_dict(weights)  # every name, as DeepSpeed-Chat's step 3 does
    expected = hidden_states(theirs.rwtransformer, ids, mask, model_type)
    found["hidden states of the deepspeed-chat layout"] = apart(model.backbone(ids, mask), expected)
    bits = 0.0
    for layout in ("hf", "chat"):
        again = RewardModel.from_pretrained(directory / layout)
        bits = max(bits, apart(again.token_rewards(ids, mask), model.token_rewards(ids, mask)))
        for name, parameter in model.named_parameters():
            bits = max(bits, apart(again.get_parameter(name)[: len(parameter)], parameter))
    return found | {"bits of either layout": bits}


def differences(seed: int, directory: Path) -> dict[str, float]:
    """Compare everything that a configuration is to give; the names are those of TOLERANCES."""
    torch.manual_seed(seed)
    config = random_config(seed)
    model_type = config["model_type"]
    dtypes = (torch.float32, torch.float16, torch.bfloat16)
    write_model(config, directory, random.Random(f"dtype {seed}").choice(dtypes))
    model = RewardModel(GPT.from_pretrained(directory), pad_id=0)
    torch.nn.init.normal_(model.v_head.weight)
    ids, mask = left_padded(LENGTH)
    is_read = mask.cumsum(1) > 0  # all but left padding
    expected = hidden_states(theirs_of(directory, torch.float32), ids, mask, model_type)
    found = {"hidden states, float32": apart(model.backbone(ids, mask)[is_read], expected[is_read])}
    right = torch.arange(LENGTH) < torch.tensor([[LENGTH], [9], [1]])
    right_ids = torch.randint(1, 50, (3, LENGTH)) * right
    found |= through_files(model, directory, right_ids, right.long(), model_type)
    model = model.double()
    with exact_transformers():
        theirs = theirs_of(directory, torch.float64)
        expected = hidden_states(theirs, ids, mask, model_type)
        expected_right = hidden_states(theirs, right_ids, right.long(), model_type)
    hidden = model.backbone(ids, mask)
    found["hidden states, float64"] = max(
        apart(hidden[is_read], expected[is_read]),
        apart(model.backbone(right_ids, right), expected_right),
    )
    values = model.forward_value(ids, mask, return_value_only=True)
    expected = expected @ model.v_head.weight[0]
    found["step 3, float64"] = max(
        apart(values[is_read], expected[is_read]), apart(values, hidden @ model.v_head.weight[0])
    )
    numbers, gradients = packed_beside_padded(model, seed)
    return found | {"packed, float64": numbers, "gradients, float64": gradients}


@pytest.mark.parametrize("seed", range(30))
def test_random_configuration(seed, tmp_path):
    for name, value in differences(seed, tmp_path).items():
        assert value <= TOLERANCES[name], (name, value, random_config(seed))


def main():
    worst = defaultdict(lambda: defaultdict(float))
    for seed in range(int(sys.argv[1])):
        with tempfile.TemporaryDirectory() as directory:
            for name, value in differences(seed, Path(directory)).items():
                family = random_config(seed)["model_type"]
                worst[family][name] = max(worst[family][name], value)
    for family, found in worst.items():
        print(family)
        for name, value in found.items():
            print(f"    {name:45} {value:.1e}")


if __name__ == "__main__":
    main()
