"""Checkpoints, read and written, as the hub has them and as `transformers` loads them."""

import json
import math
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch

import data
import model
from model import GPT, GPTConfig
from parts.huggingface import (
    FAMILIES,
    LAYOUTS,
    config_to_hf,
    read_config,
    rows_to_add,
    truncation_of,
)
from rm import RewardModel
from test_model import LLAMA_3, close, left_padded, positions_of, small

TESTDATA = Path(__file__).parent.parent / "testdata"
PREFIXES = ("transformer.", "model.", "gpt_neox.", "decoder.")
GROUPED = ("llama", "mistral", "qwen2", "qwen3")  # families with fewer key-value heads


# --------------------------------------------------------------------------------------------------
# Files of others


def language_model(model_type):
    """Make a model of transformers with a head, grouped-query attention where the family has it."""
    import transformers

    overrides = {"n_kv_head": 2, "head_dim": 6} if model_type in GROUPED else {}
    hf = small(model_type, **overrides).to_hf()
    config = transformers.AutoConfig.for_model(**hf)
    return transformers.AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.parametrize("model_type", FAMILIES)
def test_backbone_saved_by_transformers_loads(model_type, tmp_path):
    """Load both weight files, with the prefix and the head of a language model."""
    torch.manual_seed(0)
    theirs = language_model(model_type)
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
    index = tmp_path / "shards" / "model.safetensors.index.json"
    index.write_text(index.read_text().replace('"model-', '"below/model-'))
    (tmp_path / "shards" / "below").mkdir()
    for shard in (tmp_path / "shards").glob("*.safetensors"):
        shard.rename(shard.parent / "below" / shard.name)
    close(GPT.from_pretrained(tmp_path / "shards")(ids), expected)


def without(name, *prefixes):
    for prefix in prefixes:
        name = name.removeprefix(prefix)
    return name


def with_old_buffers(weights, model_type):
    weights = dict(weights)
    for i in range(2):
        mask = torch.ones(1, 1, 32, 32).tril().bool()
        if model_type == "gpt2":
            weights[f"transformer.h.{i}.attn.bias"] = mask
            weights[f"transformer.h.{i}.attn.masked_bias"] = torch.tensor(-1e4)
        if model_type in GROUPED:
            weights[f"model.layers.{i}.self_attn.rotary_emb.inv_freq"] = torch.ones(2)
        if model_type == "gpt_neox":
            weights[f"gpt_neox.layers.{i}.attention.bias"] = mask
            weights[f"gpt_neox.layers.{i}.attention.masked_bias"] = torch.tensor(-1e9)
            weights[f"gpt_neox.layers.{i}.attention.rotary_emb.inv_freq"] = torch.ones(2)
    return weights


def with_untied_head(weights, model_type):
    name = "embed_out.weight" if model_type == "gpt_neox" else "lm_head.weight"
    weights = {name: w for name, w in weights.items() if name != "lm_head.weight"}
    return weights | {name: torch.randn(50, 16)}


VARIANTS = {  # one model in files of the hub: weights by a model with a head -> weights in the file
    "with prefix": lambda weights, model_type: weights,
    "without prefix": lambda weights, model_type: {
        without(name, "transformer.", "model.", "gpt_neox."): w for name, w in weights.items()
    },
    "of the bare decoder": lambda weights, model_type: {
        without(name, *PREFIXES): w for name, w in weights.items()
    },
    "untied head": with_untied_head,
    "head of a classifier": lambda weights, model_type: (
        weights | {"score.weight": torch.randn(2, 16)}
    ),
    "no head": lambda weights, model_type: {
        name: w for name, w in weights.items() if name != "lm_head.weight"
    },
    "old buffers": with_old_buffers,
    "float16": lambda weights, model_type: {name: w.half() for name, w in weights.items()},
    "bfloat16": lambda weights, model_type: {name: w.bfloat16() for name, w in weights.items()},
}


@pytest.mark.parametrize(
    "file", ["model.safetensors", "pytorch_model.bin", "pytorch_model.bin of old"]
)
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("model_type", FAMILIES)
def test_files_from_the_hub(model_type, variant, file, tmp_path):
    import safetensors.torch

    torch.manual_seed(0)
    theirs = language_model(model_type)
    weights = {name: torch.randn_like(w) / 2 for name, w in theirs.state_dict().items()}
    weights = VARIANTS[variant](weights, model_type)
    stored = {without(name, *PREFIXES): w.float() for name, w in weights.items()}
    kept = {name: stored[without(name, *PREFIXES)] for name in theirs.base_model.state_dict()}
    theirs.base_model.load_state_dict(kept)
    theirs.config.save_pretrained(tmp_path)
    if file == "model.safetensors":
        safetensors.torch.save_file(weights, tmp_path / file)
    else:  # PyTorch before 1.6 did not write zip archives
        is_zip = "old" not in file
        path = tmp_path / "pytorch_model.bin"
        torch.save(weights, path, _use_new_zipfile_serialization=is_zip)
    ids, mask = left_padded()
    positions = positions_of(model_type, ids)
    expected = theirs.base_model(ids, attention_mask=mask, **positions).last_hidden_state
    model = RewardModel.from_pretrained(tmp_path, pad_id=0)
    assert model.has_fresh_head and {p.dtype for p in model.parameters()} == {torch.float32}
    close(model.backbone(ids, mask)[mask.bool()], expected[mask.bool()])


ROPE_5 = {"rope_type": "default", "rope_theta": 500.0}


@pytest.mark.parametrize(
    "model_type, keys",
    [
        *((model_type, {"rope_theta": 500.0}) for model_type in GROUPED),
        *((model_type, {"rope_parameters": ROPE_5}) for model_type in GROUPED),
        *((model_type, {}) for model_type in (*GROUPED, "gpt_neox")),
        ("llama", {"rope_theta": 500.0, "rope_scaling": None}),
        ("llama", {"rope_theta": 500.0, "rope_scaling": {"rope_type": "llama3", **LLAMA_3}}),
        ("llama", {"rope_theta": 500.0, "rope_scaling": {"type": "llama3", **LLAMA_3}}),
        ("llama", {"rope_parameters": ROPE_5 | LLAMA_3 | {"rope_type": "llama3"}}),
        ("llama", {"rope_theta": 500, "rope_parameters": ROPE_5}),
        ("qwen2", {"rope_theta": 500.0, "rope_scaling": {"type": "llama3", **LLAMA_3}}),
        ("qwen3", {"rope_parameters": ROPE_5 | {"partial_rotary_factor": 1.0}}),
        ("gpt_neox", {"rotary_pct": 0.5, "rotary_emb_base": 500}),
        ("gpt_neox", {"rotary_pct": 1.0}),
        ("gpt_neox", {"rotary_emb_base": 500}),
        # transformers 4 wrote each number twice
        (
            "gpt_neox",
            {
                "rotary_pct": 0.5,
                "partial_rotary_factor": 0.5,
                "rotary_emb_base": 500,
                "rope_theta": 500,
                "rope_scaling": None,
            },
        ),
        ("gpt_neox", {"rope_parameters": ROPE_5}),
        ("gpt_neox", {"rope_parameters": ROPE_5 | {"partial_rotary_factor": 0.5}}),
        ("gpt_neox", {"rotary_pct": 0.5, "rope_scaling": {"type": "llama3", **LLAMA_3}}),
    ],
    ids=str,
)
def test_rotary_keys_of_old_and_new_config_files(model_type, keys, tmp_path):
    import transformers

    torch.manual_seed(0)
    hf = small(model_type, n_embd=64).to_hf()
    hf = {key: value for key, value in hf.items() if "rope" not in key and "rot" not in key} | keys
    (tmp_path / "config.json").write_text(json.dumps(hf))
    config = transformers.AutoConfig.from_pretrained(tmp_path)
    theirs = transformers.AutoModel.from_config(config).eval()
    torch.save(theirs.state_dict(), tmp_path / "pytorch_model.bin")
    ids = torch.randint(0, 50, (2, 32))
    expected = theirs(ids).last_hidden_state
    ours = GPT.from_pretrained(tmp_path)
    close(ours(ids), expected)
    config = transformers.AutoConfig.for_model(**ours.config.to_hf())
    again = transformers.AutoModel.from_config(config).eval()
    again.load_state_dict(theirs.state_dict())
    close(again(ids).last_hidden_state, expected)


@pytest.mark.parametrize("model_type", (*GROUPED, "gpt_neox"))
def test_missing_keys_are_those_of_transformers(model_type, tmp_path):
    """Grouped heads, a head's width, windows, biases: each family has defaults of its own."""
    import transformers

    torch.manual_seed(0)
    hf = {
        "model_type": model_type,
        "vocab_size": 50,
        "hidden_size": 32,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 32 if "qwen" in model_type else 8,
        "max_position_embeddings": 32,
    }
    if model_type != "qwen3":  # whose heads are 128 wide
        hf["hidden_size"] = 4 * hf["num_attention_heads"]
    (tmp_path / "config.json").write_text(json.dumps(hf))
    config = transformers.AutoConfig.from_pretrained(tmp_path)
    theirs = transformers.AutoModel.from_config(config).eval()
    torch.save(theirs.state_dict(), tmp_path / "pytorch_model.bin")
    ids = torch.randint(0, 50, (2, 32))
    ours = GPT.from_pretrained(tmp_path)
    close(ours(ids), theirs(ids).last_hidden_state)
    assert ours.config.sliding_window == (4096 if model_type == "mistral" else None)


WINDOWS = [  # family, keys, the window, in a model of two layers
    ("mistral", {"sliding_window": 4}, 4),
    ("mistral", {"sliding_window": None}, None),
    ("mistral", {"sliding_window": 4, "layer_types": ["full_attention"] * 2}, None),
    ("mistral", {"sliding_window": 4, "layer_types": ["full_attention", "sliding_attention"]}, 4),
]
for qwen in ("qwen2", "qwen3"):
    used = {"sliding_window": 4, "use_sliding_window": True}
    WINDOWS += [
        (qwen, {}, None),
        (qwen, {"sliding_window": 4}, None),
        (qwen, used, None),  # max_window_layers is 28
        (qwen, used | {"max_window_layers": 2}, None),
        (qwen, used | {"max_window_layers": 1}, 4),
        (qwen, used | {"max_window_layers": 0}, 4),
        (qwen, used | {"max_window_layers": 0, "use_sliding_window": False}, None),
        (qwen, used | {"max_window_layers": 0, "sliding_window": None}, None),
        (qwen, used | {"max_window_layers": 0, "layer_types": ["full_attention"] * 2}, None),
        (qwen, used | {"layer_types": ["sliding_attention", "full_attention"]}, 4),
    ]


@pytest.mark.parametrize("model_type, keys, window", WINDOWS, ids=str)
def test_sliding_windows_load_and_are_saved_as_they_were(model_type, keys, window, tmp_path):
    """Where no layer uses it, a row may be longer; saved, transformers computes the same."""
    import transformers

    torch.manual_seed(0)
    hf = small(model_type, n_kv_head=2, vocab_size=48).to_hf()
    names = ("sliding_window", "use_sliding_window", "max_window_layers")
    hf = {key: value for key, value in hf.items() if key not in names} | keys
    (tmp_path / "config.json").write_text(json.dumps(hf))
    config = transformers.AutoConfig.from_pretrained(tmp_path)
    theirs = transformers.AutoModel.from_config(config).eval()
    torch.save(theirs.state_dict(), tmp_path / "pytorch_model.bin")
    ids = torch.randint(0, 48, (2, 12))
    expected = theirs(ids).last_hidden_state
    model = RewardModel.from_pretrained(tmp_path, pad_id=0)
    assert model.backbone.config.sliding_window == window
    close(model.backbone(ids[:, :4]), expected[:, :4])
    if window is None:
        close(model.backbone(ids), expected)
    else:
        with pytest.raises(ValueError, match="rows of 12 tokens, .*sliding_window of 4"):
            model.backbone(ids)
    for layout in LAYOUTS:
        model.save_pretrained(tmp_path / layout, layout)
        saved = read_config(tmp_path / layout)
        assert {key: saved[key] for key in keys} == keys
        again = GPT.from_pretrained(tmp_path / layout).config
        assert again.sliding_window == window
        assert again.window_keys == model.backbone.config.window_keys
        config = transformers.AutoConfig.from_pretrained(tmp_path / layout)
        loaded = transformers.AutoModel.from_config(config).eval()
        loaded.load_state_dict(theirs.state_dict())
        close(loaded(ids).last_hidden_state, expected)


# --------------------------------------------------------------------------------------------------
# Saving


OTHER_KEYS = {  # of families, under the names of transformers; none is its default
    "gpt2": dict(resid_pdrop=0.2, embd_pdrop=0.0, attn_pdrop=0.3, reorder_and_upcast_attn=True),
    "opt": dict(dropout=0.0, attention_dropout=0.2, layerdrop=0.25),
    "llama": dict(attention_dropout=0.2),
    "mistral": dict(attention_dropout=0.2),
    "qwen2": dict(attention_dropout=0.2),
    "qwen3": dict(attention_dropout=0.2),
    "gpt_neox": dict(attention_dropout=0.2, hidden_dropout=0.3, classifier_dropout=0.4),
}
# What a saved model has of its own: shape of the head, its dtype, padding, labels.
NOT_KEPT = {
    *(
        "_name_or_path",
        "architectures",
        "dtype",
        "transformers_version",
        "vocab_size",
        "pad_token_id",
    ),
    *("id2label", "label2id", "problem_type", "num_padding_at_beginning"),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("model_type", FAMILIES)
def test_keys_that_we_do_not_use_are_saved_as_they_were(model_type, layout, tmp_path):
    """transformers reads every setting of the source in what we save, but for those of our own."""
    import transformers

    theirs = language_model(model_type)
    keys = OTHER_KEYS[model_type] | dict(initializer_range=0.5, use_cache=False)
    keys |= dict(my_own_key=[1, {"a": None}], bos_token_id=3, eos_token_id=[4, 5])
    for key, value in keys.items():
        setattr(theirs.config, key, value)
    theirs.to(torch.bfloat16).save_pretrained(tmp_path / "source")
    model = RewardModel.from_pretrained(tmp_path / "source", pad_id=7)
    model.save_pretrained(tmp_path / "saved", layout)
    saved = read_config(tmp_path / "saved")
    assert {key: saved[key] for key in keys} == keys
    before, after = (
        transformers.AutoConfig.from_pretrained(tmp_path / name).to_dict()
        for name in ("source", "saved")
    )
    different = {key for key in before | after if before.get(key) != after.get(key)}
    assert different <= NOT_KEPT
    loaded = transformers.AutoModel.from_pretrained(tmp_path / "source", dtype="float32")
    again = RewardModel.from_pretrained(tmp_path / "saved").backbone
    ids = torch.randint(0, 40, (2, 9))
    close(again(ids), loaded.eval()(ids).last_hidden_state)
    assert again.config.other_keys == model.backbone.config.other_keys


@pytest.mark.parametrize("dropout", [0.0, 0.25])
@pytest.mark.parametrize("model_type", FAMILIES)
def test_dropouts_of_a_new_model_are_those_of_its_training(model_type, dropout, tmp_path):
    """transformers' default of 0.1, in gpt2 and opt, would be back in DeepSpeed-Chat's step 3."""
    import transformers

    model = RewardModel(GPT(small(model_type, dropout=dropout)), pad_id=0)
    model.save_pretrained(tmp_path)
    config = transformers.AutoConfig.from_pretrained(tmp_path)
    names = FAMILIES[model_type].dropouts
    assert [getattr(config, name) for name in names] == [dropout] * len(names)
    if dropout == 0:
        theirs = transformers.AutoModel.from_config(config).train()
        ids = torch.randint(0, 40, (2, 9))
        assert torch.equal(theirs(ids).last_hidden_state, theirs(ids).last_hidden_state)


@pytest.mark.parametrize("model_type", ["gpt2", "opt"])
def test_dropouts_that_a_file_does_not_name_are_transformers_defaults(model_type, tmp_path):
    import transformers

    hf = small(model_type).to_hf()
    for name in FAMILIES[model_type].dropouts:
        del hf[name]
    save_backbone(GPT(small(model_type)), tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(hf))
    RewardModel.from_pretrained(tmp_path, pad_id=0).save_pretrained(tmp_path / "saved")
    before, after = (
        transformers.AutoConfig.from_pretrained(directory)
        for directory in (tmp_path, tmp_path / "saved")
    )
    for name in FAMILIES[model_type].dropouts:
        assert getattr(after, name) == getattr(before, name) == 0.1


@pytest.mark.parametrize(
    "other_keys, expected",
    [({}, (32, "left")), ({"max_seq_len": 20, "truncation_side": "right"}, (20, "right"))],
    ids=str,
)
@pytest.mark.parametrize("window", [None, 24])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_length_and_side_of_truncation_are_saved_with_model_and_tokenizer(
    layout, window, other_keys, expected, tmp_path
):
    import transformers

    config = small("mistral", sliding_window=window, other_keys=other_keys, vocab_size=300)
    tokenizer = data.train_tokenizer(["a few words", "and some more"], 290)
    model = RewardModel(GPT(config), tokenizer.pad_id)
    model.save_pretrained(tmp_path, layout, tokenizer)
    loaded = RewardModel.from_pretrained(tmp_path).backbone.config
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    if window and not other_keys:
        expected = (window, "left")
    assert truncation_of(vars(loaded)) == expected
    assert (theirs.model_max_length, theirs.truncation_side) == expected
    assert theirs.model_input_names == ["input_ids", "attention_mask"]
    assert theirs.unk_token is None and len(theirs) == tokenizer.vocab_size


def test_qwen2_keeps_a_tokenizer_that_is_not_qwens(tmp_path):
    """AutoTokenizer takes Qwen2Tokenizer for the family, also where remote code is trusted."""
    import transformers

    tokenizer = data.train_tokenizer(["a few words", "and some more"], 290)
    model = RewardModel(GPT(small("qwen2", vocab_size=300)), tokenizer.pad_id)
    model.save_pretrained(tmp_path, "hf", tokenizer)
    for how in ({}, {"trust_remote_code": True}):
        theirs = transformers.AutoTokenizer.from_pretrained(tmp_path, **how)
        text = "some  few, e\u0301 words <s>\n"
        assert theirs(text, add_special_tokens=False)["input_ids"] == tokenizer.encode(text)
        assert len(theirs) == tokenizer.vocab_size


HEADS_FOUND = [  # name and shape of a head; whether it is the value head; what is said
    (None, None, False, "no value head there (v_head.weight or score.weight), so a fresh one"),
    ("v_head.weight", (1, 16), True, "value head read from v_head.weight"),
    ("score.weight", (1, 16), True, "value head read from score.weight"),
    ("score.weight", (3, 16), False, "score.weight has shape [3, 16]; expected [1, 16]; that is a"),
]


@pytest.mark.parametrize("name, shape, is_read, words", HEADS_FOUND, ids=str)
def test_it_is_said_where_the_value_head_was_read(name, shape, is_read, words, tmp_path):
    backbone = GPT(small("llama"))
    save_backbone(backbone, tmp_path)
    width = backbone.config.n_embd
    head = None
    if name:
        head = torch.randn(shape[0], width)
        add_weight(tmp_path, name, head)
    model = RewardModel.from_pretrained(tmp_path, pad_id=0)
    assert model.head_remark == words or words.replace("16", str(width)) in model.head_remark
    assert model.has_fresh_head != is_read
    assert not is_read or torch.equal(model.v_head.weight, head)


def test_it_is_said_which_weights_are_read_where_there_are_two_files(tmp_path):
    """model.safetensors comes first, as in transformers; the other file may be another model."""
    import safetensors.torch

    weights = GPT(small("gpt2")).to_hf()
    (tmp_path / "config.json").write_text(json.dumps(small("gpt2").to_hf()))
    safetensors.torch.save_file(weights, tmp_path / "model.safetensors")
    weights["v_head.weight"] = torch.ones(1, small("gpt2").n_embd)
    torch.save(weights, tmp_path / "pytorch_model.bin")
    model = RewardModel.from_pretrained(tmp_path)
    words = "weights read from model.safetensors; pytorch_model.bin, there too, not read"
    assert model.has_fresh_head and model.head_remark.endswith(f", so a fresh one; {words}")
    (tmp_path / "model.safetensors").unlink()
    model = RewardModel.from_pretrained(tmp_path)
    assert not model.has_fresh_head and model.head_remark == "value head read from v_head.weight"


@pytest.mark.parametrize("model_type", FAMILIES)
def test_a_score_head_of_transformers_is_read(model_type, tmp_path):
    import transformers

    config = transformers.AutoConfig.for_model(**small(model_type).to_hf())
    config.num_labels, config.pad_token_id = 1, 0
    theirs = transformers.AutoModelForSequenceClassification.from_config(config).eval()
    theirs.save_pretrained(tmp_path)
    model = RewardModel.from_pretrained(tmp_path)
    assert model.head_remark == "value head read from score.weight" and model.pad_id == 0
    ids = torch.randint(1, 40, (3, 9))
    scores = model.forward_value(ids)["chosen_end_scores"]
    close(scores, theirs(ids).logits[:, 0])


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
    config = small(model_type, token_ids={"bos_token_id": 1, "eos_token_id": 2})
    model = RewardModel(GPT(config), pad_id=49, num_padding_at_beginning=3)
    model.save_pretrained(tmp_path)
    loaded = RewardModel.from_pretrained(tmp_path)
    assert (loaded.pad_id, loaded.num_padding_at_beginning) == (49, 3)
    ids = torch.randint(0, 49, (4, 9))
    mask = torch.ones_like(ids)
    assert torch.equal(loaded(ids, mask)["loss"], model(ids, mask)["loss"])
    weights = torch.load(tmp_path / "pytorch_model.bin", weights_only=True)
    embed = weights[f"rwtransformer.{FAMILIES[model_type].names['embed']}.weight"]
    rows = json.loads((tmp_path / "config.json").read_text())["vocab_size"]
    assert len(embed) == 56 == rows  # 8 * ceil(50 / 8)
    assert embed[50:].count_nonzero() == 0


def test_embedding_is_saved_with_the_rows_that_the_tokenizer_needs(tmp_path):
    """Save 8 * ceil(length of the tokenizer / 8) rows, as DeepSpeed-Chat's step 3 does.

    It does so also where the model had more rows.
    """
    tokenizer = data.train_tokenizer(["a few words", "and some more"], 290)
    model = RewardModel(GPT(small("llama", vocab_size=400)), pad_id=tokenizer.pad_id)
    model.save_pretrained(tmp_path, tokenizer=tokenizer)
    weights = torch.load(tmp_path / "pytorch_model.bin", weights_only=True)
    rows = len(weights["rwtransformer.embed_tokens.weight"])
    assert rows == 8 * -(-tokenizer.vocab_size // 8) < 400
    assert data.load_tokenizer(tmp_path).encode("some words") == tokenizer.encode("some words")
    assert RewardModel.from_pretrained(tmp_path).pad_id == tokenizer.pad_id


@pytest.mark.parametrize("pad_id", [None, 0, 320])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("model_type", FAMILIES)
def test_round_trip_with_a_tokenizer(model_type, layout, pad_id, tmp_path):
    """Get everything back bit for bit, with as many rows as the length of the tokenizer asks for.

    The tokenizer's own pad is id 0; a new one stands at the end of a vocabulary of 290, or some ids
    behind it.
    """
    import transformers

    torch.manual_seed(0)
    proto = data.train_tokenizer(["a few words", "and some more"], 290).model_proto
    tokenizer = data.Tokenizer(proto, pad_id)
    backbone = GPT(small(model_type, vocab_size=tokenizer.vocab_size))
    model = RewardModel(backbone, tokenizer.pad_id, num_padding_at_beginning=2)
    model.save_pretrained(tmp_path, layout=layout, tokenizer=tokenizer)
    again = RewardModel.from_pretrained(tmp_path)
    assert (again.pad_id, again.num_padding_at_beginning) == (tokenizer.pad_id, 2)
    assert not again.has_fresh_head
    ours, saved = dict(model.named_parameters()), dict(again.named_parameters())
    kind = transformers.AutoTokenizer
    if model_type == "qwen2":  # for which transformers 5 makes Qwen's tokenizer of any files
        kind = transformers.PreTrainedTokenizerFast
    rows = 8 * math.ceil(len(kind.from_pretrained(tmp_path)) / 8)
    embed = saved["backbone.embed.weight"]
    assert len(embed) == rows
    assert json.loads((tmp_path / "config.json").read_text())["vocab_size"] == rows
    assert rows >= tokenizer.vocab_size > rows - 8
    assert not embed[tokenizer.vocab_size :].any()
    assert ours.keys() == saved.keys()
    for name, parameter in ours.items():
        assert torch.equal(parameter, saved[name][: len(parameter)]), name
    assert data.load_tokenizer(tmp_path).pad_id == tokenizer.pad_id


@pytest.mark.parametrize("layout", LAYOUTS)
def test_model_is_saved_over_the_files_it_was_loaded_from(layout, tmp_path):
    """Save over mapped files: they must not change under the model whose weights they hold."""
    torch.manual_seed(0)
    RewardModel(GPT(small("llama", vocab_size=48)), pad_id=0).save_pretrained(tmp_path, layout)
    model = RewardModel.from_pretrained(tmp_path)
    before = model.backbone.blocks[0].q.weight.detach().clone()
    other = RewardModel(GPT(small("llama", vocab_size=48)), pad_id=0)
    other.save_pretrained(tmp_path, layout)
    assert torch.equal(model.backbone.blocks[0].q.weight, before)
    model.save_pretrained(tmp_path, layout)
    assert torch.equal(RewardModel.from_pretrained(tmp_path).backbone.blocks[0].q.weight, before)


def test_model_is_not_saved_beside_another_that_would_be_read_instead(tmp_path):
    model = RewardModel(GPT(small("llama")), pad_id=0)
    for first, second, file in (
        ("hf", "deepspeed-chat", "model.safetensors"),
        ("deepspeed-chat", "hf", "pytorch_model.bin"),
    ):
        model.save_pretrained(tmp_path / first, first)
        with pytest.raises(ValueError, match=f"{first}/{file}: another model"):
            model.save_pretrained(tmp_path / first, second)


@pytest.mark.parametrize("layout", ["deepspeed-chat", "hf"])
def test_weights_have_the_permissions_of_config_json(layout, tmp_path):
    RewardModel(GPT(small("gpt2")), pad_id=0).save_pretrained(tmp_path, layout)
    files = list(tmp_path.iterdir())
    assert len(files) == 2 and len({file.stat().st_mode for file in files}) == 1


def test_backbone_of_a_trained_model_loads_as_a_backbone(tmp_path):
    """Load every bit, also in the other spelling of DeepSpeed-Chat's prefix."""
    model = RewardModel(GPT(small("gpt2", vocab_size=48)), pad_id=0)
    model.save_pretrained(tmp_path)

    # Outputs may differ: loaded weights lie transposed, where a product may round otherwise.
    def have_equal_weights(loaded, saved):
        pairs = zip(loaded.parameters(), saved.parameters(), strict=True)
        return all(torch.equal(a, b) for a, b in pairs)

    assert have_equal_weights(GPT.from_pretrained(tmp_path), model.backbone)
    weights = torch.load(tmp_path / "pytorch_model.bin", weights_only=True)
    old = {name.replace("rwtransformer", "rwtranrsformer"): w for name, w in weights.items()}
    torch.save(old, tmp_path / "pytorch_model.bin")
    assert have_equal_weights(RewardModel.from_pretrained(tmp_path), model)


# --------------------------------------------------------------------------------------------------
# Padding


def save_backbone(backbone, directory):
    (directory / "config.json").write_text(json.dumps(backbone.config.to_hf()))
    torch.save(backbone.to_hf(), directory / "pytorch_model.bin")


@pytest.mark.parametrize(
    "model_type, token_ids, expected",
    [
        ("llama", {"bos_token_id": 1, "pad_token_id": 1}, (1, 1)),
        ("llama", {"bos_token_id": 1, "pad_token_id": 2}, (2, 0)),
        # a new id right after the vocabulary
        ("llama", {"bos_token_id": 1, "pad_token_id": None}, (48, 0)),
        ("llama", {"bos_token_id": 1, "pad_token_id": -1}, (48, 0)),  # Llama 1's way to say "none"
        # these put no bos in front
        ("gpt2", {"bos_token_id": 1, "pad_token_id": 1}, (1, 0)),
        ("qwen2", {"bos_token_id": 1, "pad_token_id": 1}, (1, 0)),
        ("qwen3", {"bos_token_id": 1, "pad_token_id": 1}, (1, 0)),
        ("gpt_neox", {"bos_token_id": 1, "pad_token_id": 1}, (1, 0)),
        ("mistral", {"bos_token_id": 1, "pad_token_id": 1}, (1, 1)),
    ],
)
def test_padding_follows_from_the_directory(model_type, token_ids, expected, tmp_path):
    save_backbone(GPT(small(model_type, vocab_size=48, token_ids=token_ids)), tmp_path)
    model = RewardModel.from_pretrained(tmp_path)
    assert (model.pad_id, model.num_padding_at_beginning) == expected
    given = RewardModel.from_pretrained(tmp_path, pad_id=3, num_padding_at_beginning=2)
    assert (given.pad_id, given.num_padding_at_beginning) == (3, 2)


@pytest.mark.parametrize(
    "name, values",
    [("pad_id", (True, "3", 1.5)), ("num_padding_at_beginning", (True, "1", 1.5, -1))],
)
def test_padding_of_another_kind_is_refused(name, values, tmp_path):
    save_backbone(GPT(small("gpt2")), tmp_path)
    for value in values:
        with pytest.raises(ValueError, match=f"{name}.*{value}"):
            RewardModel.from_pretrained(tmp_path, **{name: value})


@pytest.mark.parametrize("place", ["file", "file/below"])
def test_a_model_is_not_saved_where_a_file_lies(place, tmp_path):
    (tmp_path / "file").write_text("theirs")
    model = RewardModel(GPT(small("gpt2")), pad_id=0)
    with pytest.raises(ValueError, match=f"{place}: cannot be made a directory .* another one"):
        model.save_pretrained(tmp_path / place)
    assert (tmp_path / "file").read_text() == "theirs"


def test_bias_of_rewards_may_be_a_large_whole_number(tmp_path):
    save_backbone(GPT(small("gpt2")), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"reward_bias": 10**20}))
    values = RewardModel.from_pretrained(tmp_path).forward_value(torch.tensor([[5, 6]]), None, True)
    assert values.tolist() == [[pytest.approx(1e20)] * 2]


def test_padding_falls_back_to_the_tokenizer(tmp_path):
    data.train_tokenizer(["a few words", "and some more"], 290).save(tmp_path)
    save_backbone(GPT(small("llama", vocab_size=300)), tmp_path)
    assert RewardModel.from_pretrained(tmp_path).pad_id == data.load_tokenizer(tmp_path).pad_id == 0


def test_a_pad_id_of_minus_one_is_none(tmp_path):
    """Take the tokenizer's own pad where config.json says -1, Llama 1's way."""
    data.train_tokenizer(["a few words", "and some more"], 290).save(tmp_path)
    backbone = GPT(small("llama", vocab_size=300, token_ids={"pad_token_id": -1}))
    save_backbone(backbone, tmp_path)
    assert RewardModel.from_pretrained(tmp_path).pad_id == 0


def test_pad_id_beyond_the_embedding_adds_rows_of_zeros():
    # Its config.json has no pad id: it gets a new one behind the vocabulary.
    model = RewardModel.from_pretrained(TESTDATA / "gpt2")
    assert model.pad_id == 96
    assert model.backbone.embed.weight.shape == (97, 32)
    assert model.backbone.embed.weight[96].count_nonzero() == 0
    model = RewardModel.from_pretrained(TESTDATA / "gpt2", pad_id=99)
    assert model.backbone.embed.weight.shape == (100, 32)


FAR_PAD_IDS = [1096, 16777215, 2**31, 2**63, 10**400, -1, -(2**63), 1.5, "5"]


@pytest.mark.parametrize("pad_id", FAR_PAD_IDS, ids=lambda value: str(value)[:12])
def test_a_pad_id_far_beyond_the_embedding_is_refused_before_rows_are_added(pad_id, monkeypatch):
    monkeypatch.setattr(GPT, "resize_embedding", None)
    with pytest.raises(ValueError) as error:
        RewardModel.from_pretrained(TESTDATA / "gpt2", pad_id=pad_id)
    words = [f"{TESTDATA}/gpt2", "--pad_id", f"{pad_id!r}"[:100], "96 rows", "0 to 1095"]
    assert all(word in str(error.value) for word in words) and len(str(error.value)) < 600


def test_a_pad_id_a_thousand_rows_beyond_the_embedding_is_the_last():
    model = RewardModel.from_pretrained(TESTDATA / "gpt2", pad_id=1095)
    assert model.pad_id == 1095 and model.backbone.embed.weight.shape == (1096, 32)


@pytest.mark.parametrize("pad_id", [1096, 2**24 - 1])
def test_a_far_pad_id_of_config_json_is_refused(pad_id, tmp_path):
    directory = broken(tmp_path / "model", {"pad_token_id": pad_id}, {})
    with pytest.raises(ValueError, match=f"pad_token_id of config.json. is {pad_id}, .* 96 rows"):
        RewardModel.from_pretrained(directory)
    assert RewardModel.from_pretrained(directory, pad_id=5).pad_id == 5


# --------------------------------------------------------------------------------------------------
# Errors


def broken(directory, config, weights):
    """Copy the tiny gpt2 checkpoint with changes. Keys and weights that become `...` go."""
    config = json.loads((TESTDATA / "gpt2" / "config.json").read_text()) | config
    weights = GPT.from_pretrained(TESTDATA / "gpt2").to_hf() | weights
    config = {key: value for key, value in config.items() if value is not ...}
    weights = {name: weight for name, weight in weights.items() if weight is not ...}
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(config))
    torch.save(weights, directory / "pytorch_model.bin")
    return directory


BAD_WEIGHTS = {  # what is wrong: weights, words of the error
    "missing": ({"h.1.mlp.c_fc.bias": ...}, ["h.1.mlp.c_fc.bias", "missing"]),
    "left over": ({"h.2.ln_1.weight": torch.ones(32)}, ["h.2.ln_1.weight", "not part of"]),
    "left over that ends like a buffer": (
        {"h.2.attn.c_attn.bias": torch.ones(96)},
        ["h.2.attn.c_attn.bias", "not part of"],
    ),
    "shape": ({"ln_f.bias": torch.ones(31)}, ["ln_f.bias", "[31]", "[32]"]),
    "transposed": (
        {"h.0.mlp.c_fc.weight": torch.ones(128, 32)},
        ["h.0.mlp.c_fc.weight", "[128, 32]", "[32, 128]"],
    ),
    "list for a weight": ({"ln_f.bias": [1.0] * 32}, ["pytorch_model.bin", "tensors"]),
    "sparse": ({"ln_f.bias": torch.ones(32).to_sparse()}, ["pytorch_model.bin", "tensors"]),
    "int8": ({"ln_f.bias": torch.ones(32).to(torch.int8)}, ["ln_f.bias", "int8", "float32"]),
}
BAD_CONFIGS = {  # what is wrong: keys, words of the error
    "width": ({"n_embd": 64}, ["wte.weight", "[96, 32]", "[96, 64]"]),
    "family": ({"model_type": "bert"}, ["config.json", "'bert'", "gpt2", "llama"]),
    "key": ({"n_layer": ...}, ["config.json", "n_layer", "missing"]),
    "unsupported": (
        {"scale_attn_by_inverse_layer_idx": True},
        ["scale_attn_by_inverse_layer_idx", "True"],
    ),
    "activation": ({"activation_function": "swish2"}, ["swish2", "gelu_new"]),
    "heads": ({"n_head": 5}, ["config.json", "32", "5"]),
    "no heads": ({"n_head": 0}, ["config.json", "n_head", "0"]),
    "text for a number": ({"n_layer": "2"}, ["config.json", "n_layer", "'2'"]),
    "text for eps": ({"layer_norm_epsilon": "x"}, ["config.json", "layer_norm_epsilon", "'x'"]),
    "text for an id": ({"pad_token_id": "0"}, ["config.json", "pad_token_id", "'0'"]),
    "list for a family": ({"model_type": []}, ["config.json", "[]", "gpt2"]),
    "huge pad": ({"pad_token_id": 10**12}, ["config.json", "pad_token_id", "10000"]),
    "huge n_positions": ({"n_positions": 10**20}, ["config.json", "n_positions", "10000"]),
    "list for bos": ({"bos_token_id": [1]}, ["config.json", "bos_token_id", "[1]"]),
    "null for a count": (
        {"num_padding_at_beginning": None},
        ["config.json", "num_padding_at_beginning", "None"],
    ),
    "a length of 0": ({"max_seq_len": 0}, ["config.json", "max_seq_len", "0", "above 0"]),
    "a side": ({"truncation_side": "top"}, ["config.json", "'top'", "left or right"]),
    "text for a bias": ({"reward_bias": "0"}, ["config.json", "reward_bias", "'0'", "finite"]),
    "quantized": ({"quantization_config": {"bits": 4}}, ["config.json", "quantization_config"]),
    "list for rope": ({"rope_parameters": [1]}, ["config.json", "rope_parameters", "[1]"]),
    "unknown rope": ({"rope_scaling": {"type": "yarn"}}, ["config.json", "'yarn'", "llama3"]),
    "incomplete rope": (
        {"rope_scaling": {"rope_type": "llama3", "factor": 8}},
        ["config.json", "low_freq_factor"],
    ),
}


@pytest.mark.parametrize("weights, words", BAD_WEIGHTS.values(), ids=BAD_WEIGHTS)
def test_bad_weights_are_refused(weights, words, tmp_path):
    directory = broken(tmp_path / "model", {}, weights)
    with pytest.raises(ValueError) as error:
        GPT.from_pretrained(directory)
    assert all(word in str(error.value) for word in [str(directory), *words]), error.value


@pytest.mark.parametrize("config, words", BAD_CONFIGS.values(), ids=BAD_CONFIGS)
def test_bad_configs_are_refused(config, words, tmp_path):
    directory = broken(tmp_path / "model", config, {})
    with pytest.raises(ValueError) as error:
        GPT.from_pretrained(directory)
    assert all(word in str(error.value) for word in [str(directory), *words]), error.value


ALL_OF_THEM = list(FAMILIES)
ROTARY = [model_type for model_type in FAMILIES if model_type not in ("gpt2", "opt")]
WITH_WINDOW = ["mistral", "qwen2", "qwen3"]
REFUSED = [  # families, keys of config.json, words of the error
    (ALL_OF_THEM, {"is_causal": False}, ["is_causal is False", "True"]),
    (ALL_OF_THEM, {"use_mrope": True}, ["use_mrope is True", "False"]),
    (ALL_OF_THEM, {"attn_logit_softcapping": 50.0}, ["attn_logit_softcapping is 50.0"]),
    (ROTARY, {"hidden_act": "swish2"}, ["swish2", "silu"]),
    (ROTARY, {"rope_scaling": {"type": "linear", "factor": 2.0}}, ["'linear'", "llama3"]),
    (ROTARY, {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, ["'dynamic'", "llama3"]),
    (ROTARY, {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, ["'yarn'", "llama3"]),
    (ROTARY, {"rope_parameters": {"rope_type": "longrope"}}, ["'longrope'", "llama3"]),
    (ROTARY, {"rope_scaling": {"mrope_section": [1, 1]}}, ["mrope_section", "rotary"]),
    (ROTARY, {"rope_parameters": {"full_attention": {}}}, ["full_attention", "rotary"]),
    (GROUPED, {"rope_theta": 1.5, "rope_parameters": {"rope_theta": 2.5}}, ["1.5", "2.5"]),
    (["gpt_neox"], {"rotary_pct": 0.5, "partial_rotary_factor": 1.0}, ["0.5", "1.0"]),
    (GROUPED, {"rope_theta": "10"}, ["rope_theta is '10'", "above 0"]),
    (["gpt_neox"], {"rotary_emb_base": "10"}, ["rotary_emb_base is '10'", "above 0"]),
    (GROUPED, {"rope_theta": None, "rope_parameters": {"rope_theta": 0}}, ["is 0", "above 0"]),
    (
        ROTARY,
        {"original_max_position_embeddings": 8, "rope_scaling": {"rope_type": "llama3", **LLAMA_3}},
        ["original_max_position_embeddings is 16", "8"],
    ),
    (GROUPED, {"partial_rotary_factor": 0.5}, ["partial_rotary_factor is 0.5", "1.0"]),
    (GROUPED, {"rope_parameters": {"partial_rotary_factor": 0.5}}, ["partial_rotary_factor"]),
    (["llama", "qwen3", "gpt_neox"], {"attention_bias": "no"}, ["attention_bias", "'no'"]),
    (["llama"], {"mlp_bias": 1}, ["mlp_bias is 1", "true or false"]),
    (
        ["gpt_neox"],
        {"use_parallel_residual": None, "rotary_pct": 2},
        ["rotary_pct is 2", "at most 1"],
    ),
    (["gpt_neox"], {"use_parallel_residual": 0}, ["use_parallel_residual is 0"]),
    (["gpt_neox"], {"rotary_emb_base": 500, "rope_theta": 10000}, ["rope_theta", "500", "10000"]),
    # transformers takes 10000, the default of rotary_emb_base
    (["gpt_neox"], {"rotary_emb_base": None, "rope_theta": 500}, ["rope_theta", "500"]),
    (WITH_WINDOW, {"sliding_window": "4"}, ["sliding_window is '4'", "null"]),
    (WITH_WINDOW, {"sliding_window": 0}, ["sliding_window is 0", "null"]),
    (WITH_WINDOW, {"layer_types": ["full_attention"]}, ["layer_types", "2 layers"]),
    (WITH_WINDOW, {"layer_types": ["chunked_attention"] * 2}, ["layer_types", "sliding_attention"]),
    (
        WITH_WINDOW,
        {"sliding_window": None, "layer_types": ["sliding_attention"] * 2},
        ["layer_types", "sliding_window of None"],
    ),
    (["qwen2", "qwen3"], {"use_sliding_window": 1}, ["use_sliding_window is 1"]),
    (["qwen2", "qwen3"], {"max_window_layers": -1}, ["max_window_layers is -1"]),
]


@pytest.mark.parametrize(
    "model_type, keys, words",
    [(model_type, keys, words) for types, keys, words in REFUSED for model_type in types],
    ids=str,
)
def test_keys_that_would_change_the_computation_are_refused(model_type, keys, words):
    with pytest.raises(ValueError) as error:
        GPTConfig.from_hf(small(model_type).to_hf() | keys, "model")
    assert all(word in str(error.value) for word in ["model/config.json", *words]), error.value


@pytest.mark.parametrize("model_type", ["gemma2", "phi3", "deberta-v2", "qwen2_moe", "qwen", None])
def test_other_families_are_refused_with_the_list_of_those_that_are_supported(model_type):
    with pytest.raises(ValueError) as error:
        GPTConfig.from_hf(small("llama").to_hf() | {"model_type": model_type}, "model")
    assert f"{model_type!r} is not supported; supported are {', '.join(FAMILIES)}" in str(
        error.value
    )


def test_two_fields_that_config_json_cannot_tell_apart_are_not_saved():
    with pytest.raises(ValueError, match="attn_out_bias is False, .* attention_bias True"):
        config_to_hf(vars(small("llama", qkv_bias=True)))


class Payload:
    def __reduce__(self):
        return print, ("code in a pickle ran",)


def add_weight(directory, name, weight):
    file = directory / "pytorch_model.bin"
    torch.save({**torch.load(file), name: weight}, file)


def write_cut_safetensors(directory):
    import safetensors.torch

    weights = GPT.from_pretrained(directory).to_hf()
    (directory / "model.safetensors").write_bytes(safetensors.torch.save(weights)[:5000])


def write_index(directory, content):
    (directory / "model.safetensors.index.json").write_text(content)


BAD_FILES = {  # what is wrong: how it comes about, words of the error
    "no config": (lambda d: (d / "config.json").unlink(), ["no config.json"]),
    "cut config": (
        lambda d: (d / "config.json").write_text('{"model_type": "gpt2"'),
        ["config.json", "not JSON"],
    ),
    "no weights": (
        lambda d: (d / "pytorch_model.bin").unlink(),
        ["neither model.safetensors nor pytorch_model.bin"],
    ),
    "cut weights": (lambda d: os.truncate(d / "pytorch_model.bin", 5000), ["pytorch_model.bin"]),
    "code in the pickle": (
        lambda d: (d / "pytorch_model.bin").write_bytes(pickle.dumps(Payload(), protocol=2)),
        ["pytorch_model.bin"],
    ),
    "not safetensors": (
        lambda d: (d / "model.safetensors").write_bytes(b"not safetensors"),
        ["model.safetensors"],
    ),
    "cut safetensors": (write_cut_safetensors, ["model.safetensors"]),
    "missing shard": (
        lambda d: write_index(d, '{"weight_map": {"wte.weight": "model-1-of-2.safetensors"}}'),
        ["model-1-of-2.safetensors"],
    ),
    "index of numbers": (
        lambda d: write_index(d, '{"weight_map": {"wte.weight": 1}}'),
        ["index.json", "weight_map"],
    ),
    "cut index": (lambda d: write_index(d, '{"weight_map": '), ["index.json", "weight_map"]),
    "index of nothing": (lambda d: write_index(d, "[]"), ["index.json", "weight_map"]),
    "head of another width": (
        lambda d: add_weight(d, "v_head.weight", torch.ones(1, 31)),
        ["v_head.weight", "[1, 31]", "[1, 32]"],
    ),
    "score of another width": (
        lambda d: add_weight(d, "score.weight", torch.ones(1, 31)),
        ["score.weight", "[1, 31]", "[1, 32]"],
    ),
}


@pytest.mark.parametrize("spoil, words", BAD_FILES.values(), ids=BAD_FILES)
def test_bad_files_are_refused(spoil, words, tmp_path, capfd):
    directory = broken(tmp_path / "model", {}, {})
    spoil(directory)
    with pytest.raises(ValueError) as error:
        RewardModel.from_pretrained(directory)
    assert all(word in str(error.value) for word in [str(directory), *words]), error.value
    assert "code in a pickle ran" not in capfd.readouterr().out


OUTSIDE = ["../a.bin", "/a.bin", "below/../../a.bin", "..", ".", "", "a\\..\\..\\a.bin", "C:a.bin"]
OUTSIDE += ["\\a.bin", "a\0.bin", None, True, 5, ["a.bin"], {}]


@pytest.mark.parametrize("name", OUTSIDE, ids=str)
@pytest.mark.parametrize("index", ["model.safetensors", "pytorch_model.bin"])
def test_an_index_names_files_of_its_directory_alone(index, name, tmp_path):
    """The file that it names outside is there, so that an error is not about a missing one."""
    directory = broken(tmp_path / "model", {}, {})
    (directory / "pytorch_model.bin").rename(tmp_path / "a.bin")
    (directory / f"{index}.index.json").write_text(json.dumps({"weight_map": {"wte.weight": name}}))
    with pytest.raises(ValueError) as error:
        GPT.from_pretrained(directory)
    start = f"{directory}/{index}.index.json: weight_map has 'wte.weight' in {name!r}; expected"
    assert str(error.value).startswith(start)


def test_links_to_other_places_are_followed(tmp_path):
    """The cache of huggingface_hub is made of them."""
    directory = broken(tmp_path / "model", {}, {})
    expected = GPT.from_pretrained(directory).state_dict()
    for name in ("config.json", "pytorch_model.bin"):
        (directory / name).rename(tmp_path / name)
    (directory / "config.json").symlink_to("../config.json")
    (directory / "pytorch_model.bin.index.json").write_text('{"weight_map": {"a": "shard.bin"}}')
    (directory / "shard.bin").symlink_to(tmp_path / "pytorch_model.bin")
    found = GPT.from_pretrained(directory).state_dict()
    assert all(torch.equal(found[name], weight) for name, weight in expected.items())


TWO_NAMES = [  # families, and what stands before the second name of a parameter
    *((model_type, FAMILIES[model_type].prefixes[0]) for model_type in FAMILIES),
    *((model_type, "rwtransformer.") for model_type in FAMILIES),
    *((model_type, "rwtranrsformer.") for model_type in FAMILIES),
    *((model_type, "rwtransformer." + FAMILIES[model_type].prefixes[0]) for model_type in FAMILIES),
]


@pytest.mark.parametrize("model_type, prefix", TWO_NAMES)
def test_two_names_of_one_parameter_are_refused(model_type, prefix, tmp_path):
    """Which one was loaded would depend on their order in the file."""
    backbone = GPT(small(model_type))
    save_backbone(backbone, tmp_path)
    GPT.from_pretrained(tmp_path)
    for name in backbone.to_hf():
        (tmp_path / "pytorch_model.bin").unlink()
        save_backbone(backbone, tmp_path)
        add_weight(tmp_path, prefix + name, torch.zeros(1))
        with pytest.raises(ValueError) as error:
            GPT.from_pretrained(tmp_path)
        assert f"{tmp_path}: weights {name!r} and {prefix + name!r} are one param" in str(
            error.value
        )


def test_one_name_in_two_shards_is_refused(tmp_path):
    directory = broken(tmp_path / "model", {}, {})
    shutil.copy(directory / "pytorch_model.bin", directory / "a.bin")
    (directory / "pytorch_model.bin").rename(directory / "b.bin")
    index = {"weight_map": {"wte.weight": "a.bin", "wpe.weight": "b.bin"}}
    (directory / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    with pytest.raises(
        ValueError, match="/b.bin: weight .* is also in .*/a.bin; expected it in one"
    ):
        GPT.from_pretrained(directory)


def test_two_value_heads_are_refused(tmp_path):
    directory = broken(tmp_path / "model", {}, {})
    add_weight(directory, "v_head.weight", torch.ones(1, 32))
    add_weight(directory, "score.weight", torch.ones(2, 32))  # a classifier's is passed over
    assert (
        RewardModel.from_pretrained(directory).head_remark == "value head read from v_head.weight"
    )
    add_weight(directory, "score.weight", torch.zeros(1, 32))
    with pytest.raises(ValueError, match="v_head.weight and score.weight are both value heads"):
        RewardModel.from_pretrained(directory)


# --------------------------------------------------------------------------------------------------
# Every key of config.json, with every kind of wrong value

HUGE = [10**400, -(10**400), 1e300, math.inf, -math.inf, math.nan]
NO_COUNTS = [0, -1, True, 1.5, 2**31, 10**12, "2", [2], {}, *HUGE]
NO_NUMBERS = [True, "1", [1], {}, *HUGE]
NO_SWITCHES = [0, 1, "true", [], {}, *HUGE]
NO_IDS = [-2, 2**24, 2**63, True, 1.5, "1", {}, *HUGE]
LAYER_KEYS = ("n_layer", "num_hidden_layers")
SIZES = ("vocab_size", "n_embd", "n_inner", "n_head", "head_dim", "n_kv_head", "embed_dim")


def wrong_values(model_type):
    """Yield each key of a family's config.json with values that are not of its kind."""
    for field, key in FAMILIES[model_type].config.items():
        if field == "norm_eps":
            values = [0, -1e-5, 2, *NO_NUMBERS]
        elif field == "rope_theta":
            values = [0, -1, *NO_NUMBERS]
        elif field == "rotary_fraction":
            values = [0, -1, 2, *NO_NUMBERS]
        elif field == "rope_scaling":
            values = [True, "x", [1], 5, *HUGE]
        elif field == "activation":
            values = [True, 1, [], {}, *HUGE]
        elif field == "sliding_window":
            values = [value for value in NO_COUNTS if value is not None]
        elif field.endswith("bias") or field in ("pre_norm", "parallel_residual"):
            values = NO_SWITCHES
        else:
            values = NO_COUNTS
        for value in values:
            yield key, value
    for value in NO_IDS:
        yield "pad_token_id", value
        yield "bos_token_id", value
        yield "eos_token_id", value
        yield "eos_token_id", [1, value]
    for key in ("num_padding_at_beginning", "max_seq_len"):
        for value in NO_COUNTS[1:]:
            yield key, value
    for value in NO_NUMBERS:
        yield "reward_bias", value
    for value in [1, "top", [], None, *HUGE]:
        yield "truncation_side", value


@pytest.mark.parametrize("model_type", FAMILIES)
def test_a_value_of_another_kind_is_named_with_its_key(model_type, tmp_path):
    hf = small(model_type).to_hf()
    GPTConfig.from_hf(hf, "model")
    count = 0
    for key, value in wrong_values(model_type):
        with pytest.raises(ValueError) as error:
            GPTConfig.from_hf(hf | {key: value}, "model")
        words = str(error.value)
        assert words.startswith("model/config.json: ") and len(words) < 600
        assert f"{key} is {value!r}"[:100] in words and "expected" in words, (key, value, words)
        count += 1
    assert count > 150


LAYOUT_KEYS = [  # families, and their keys that weights have as a size
    (model_type, key)
    for model_type, family in FAMILIES.items()
    for field, key in family.config.items()
    if field in (*SIZES, "n_layer")
    or (field == "n_positions" and "rope_theta" not in family.config)
]


@pytest.mark.parametrize("factor", [3, 2**20])  # twice as many heads may have half the width
@pytest.mark.parametrize("model_type, key", LAYOUT_KEYS)
def test_sizes_are_compared_with_the_weights_before_a_model_is_built(
    model_type, key, factor, tmp_path, monkeypatch
):
    """A million layers would take minutes, and the product of two sizes may overflow."""
    overrides = {"n_kv_head": 2, "head_dim": 6} if model_type in GROUPED else {}
    backbone = GPT(small(model_type, **overrides))
    save_backbone(backbone, tmp_path)
    hf = json.loads((tmp_path / "config.json").read_text())
    monkeypatch.setattr(model.Block, "__init__", None)
    hf[key] *= factor
    (tmp_path / "config.json").write_text(json.dumps(hf))
    with pytest.raises(ValueError) as error:
        GPT.from_pretrained(tmp_path)
    assert str(tmp_path) in str(error.value) and f"{key} " in str(error.value)
    assert f"{hf[key]}" in str(error.value) and "config.json" in str(error.value)


@pytest.mark.parametrize("model_type", ROTARY)
def test_positions_of_rotary_families_take_no_memory(model_type, tmp_path):
    save_backbone(GPT(small(model_type, n_positions=2**31 - 1)), tmp_path)
    assert GPT.from_pretrained(tmp_path).config.n_positions == 2**31 - 1


def test_layers_are_counted_and_not_believed(tmp_path):
    """The weights name a layer of a high number, and no others below it."""
    backbone = GPT(small("gpt2"))
    save_backbone(backbone, tmp_path)
    add_weight(tmp_path, "h.9999.ln_1.weight", torch.ones(16))
    hf = json.loads((tmp_path / "config.json").read_text()) | {"n_layer": 10_000}
    (tmp_path / "config.json").write_text(json.dumps(hf))
    with pytest.raises(ValueError, match="n_layer is 10000, but the weights have 3 layers"):
        GPT.from_pretrained(tmp_path)


WRONG_ROPE = [  # keys of rope_scaling, and words of the error
    *(({"factor": value}, "factor is") for value in [0, -1, None, *NO_NUMBERS]),
    *(({"low_freq_factor": value}, "low_freq_factor is") for value in [0, -1, None, *NO_NUMBERS]),
    *(({"high_freq_factor": value}, "high_freq_factor is") for value in [0, -1, None, *NO_NUMBERS]),
    *(
        ({"original_max_position_embeddings": value}, "original_max_position_embeddings is")
        for value in [0, -1, None, *NO_NUMBERS]
    ),
    ({"low_freq_factor": 4.0}, "low_freq_factor is 4.0 and high_freq_factor 4.0"),
    ({"high_freq_factor": 0.5}, "low_freq_factor is 1.0 and high_freq_factor 0.5"),
]


@pytest.mark.parametrize("place", ["rope_scaling", "rope_parameters"])
@pytest.mark.parametrize("keys, words", WRONG_ROPE, ids=lambda value: str(value)[:40])
@pytest.mark.parametrize("model_type", ROTARY)
def test_rotary_numbers_that_give_no_numbers_are_refused(model_type, keys, words, place):
    rope = {"rope_type": "llama3", **LLAMA_3} | keys
    with pytest.raises(ValueError) as error:
        GPTConfig.from_hf(small(model_type).to_hf() | {place: rope}, "model")
    assert (
        str(error.value).startswith(f"model/config.json: {words}") and len(str(error.value)) < 600
    )


def test_missing_directory_is_named():
    with pytest.raises(ValueError, match="/no/such/model: no such directory"):
        GPT.from_pretrained("/no/such/model")


@pytest.mark.parametrize("load", [GPT.from_pretrained, RewardModel.from_pretrained, read_config])
def test_a_name_of_the_hub_that_is_no_directory_gets_the_command_that_downloads_it(load):
    with pytest.raises(ValueError) as error:
        load("Qwen/Qwen3-0.6B")
    command = "`hf download Qwen/Qwen3-0.6B --local-dir Qwen/Qwen3-0.6B`"
    assert str(error.value).startswith("Qwen/Qwen3-0.6B: no such directory; ")
    assert str(error.value).endswith(command)
    for path in ("/no/model", "no", "./no/model", "no/model/deep", "no/mo del"):
        with pytest.raises(ValueError) as error:
            load(path)
        assert "no such directory" in str(error.value) and "hf download" not in str(error.value)


# --------------------------------------------------------------------------------------------------
# Tokens that were added to a tokenizer


class Sizes:
    """The two numbers of a tokenizer that `rows_to_add` reads."""

    def __init__(self, model_size, text_size):
        self.model_size, self.text_size = model_size, text_size


@pytest.mark.parametrize(
    "model_size, text_size, expected",
    [
        (90, 90, 0),
        (100, 100, 0),
        (90, 101, 1),
        (100, 103, 3),
        (100, 1100, 1000),
        (100, 1101, None),
        (101, 101, None),  # an id of the tokenizer's own vocabulary has no row
        (101, 103, None),
    ],
)
def test_rows_are_added_for_a_few_added_tokens_alone(model_size, text_size, expected):
    assert rows_to_add(100, Sizes(model_size, text_size)) == expected
