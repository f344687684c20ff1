"""Hugging Face's model directories <-> our config fields, weight names and value head, both ways.

It builds no model: model.py and rm.py do, and hand in shapes and weights. Tokenizers' files are the
business of parts/tokenizers.py.
"""

import json
import math
import re
import shutil
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath, PureWindowsPath

import torch

from parts.files import replacing
from parts.guards import LONGEST_NAME, check_padding, check_weights, counted, one_line
from parts.inputs import is_file
from parts.memory import full_memory
from parts.tokenizers import NO_JSON, has_tokenizer, load_tokenizer, refuse_others

# --------------------------------------------------------------------------------------------------
# Families

COMMON = dict(  # fields of most families
    norm="layernorm",
    norm_eps=1e-5,
    gated=False,
    qkv_bias=True,
    attn_out_bias=True,
    mlp_bias=True,
    qk_norm=False,
    parallel_residual=False,
    pre_norm=True,
    position_offset=0,
    rotary_fraction=1.0,
)
REQUIRED = ("vocab_size", "n_positions", "n_layer", "n_head", "n_embd", "n_inner")
FIXED = dict(is_causal=True, use_mrope=False, attn_logit_softcapping=None)  # of every family


@dataclass(frozen=True)
class Family:
    """A kind of backbone: what makes it one, and how its checkpoints spell what ours have."""

    variant: dict  # fields of GPTConfig that make a backbone one of this family
    config: dict[str, str]  # field of GPTConfig -> key of config.json
    fixed: dict  # key that would change the computation -> the only value that is supported
    missing: dict  # key -> its default in transformers, where that differs from ours
    dropouts: dict[str, float]  # key of a dropout -> its default in transformers, where not 0
    names: dict[str, str]  # module of GPT -> Hugging Face's name
    layer_names: dict[str, str]  # module of Block -> Hugging Face's name, which several may share
    prefixes: tuple[str, ...]  # may stand before a name; first: the prefix of classifiers
    classes: str  # how the names of Hugging Face's classes begin
    required: tuple[str, ...] = REQUIRED  # fields whose key must be there
    bos_in_front: bool = True  # texts begin with bos
    transposed: bool = False  # weights of blocks are stored as (in, out)
    interleaved: bool = False  # q, k and v alternate, head by head, in the weight that they share
    ignored: tuple[str, ...] = ()  # endings of buffers that old checkpoints carry


# The row that llama, mistral, qwen2 and qwen3 start from.
LLAMA = Family(
    variant=COMMON
    | dict(
        norm="rmsnorm",
        norm_eps=1e-6,
        activation="silu",
        gated=True,
        qkv_bias=False,
        attn_out_bias=False,
        mlp_bias=False,
        rope_theta=1e4,
    ),
    config=dict(
        vocab_size="vocab_size",
        n_positions="max_position_embeddings",
        n_layer="num_hidden_layers",
        n_head="num_attention_heads",
        n_kv_head="num_key_value_heads",
        n_embd="hidden_size",
        head_dim="head_dim",
        n_inner="intermediate_size",
        activation="hidden_act",
        norm_eps="rms_norm_eps",
        rope_theta="rope_theta",
        rope_scaling="rope_scaling",
    ),
    fixed=dict(partial_rotary_factor=1.0),
    missing={},
    dropouts={},
    names=dict(embed="embed_tokens", blocks="layers", norm="norm"),
    layer_names=dict(
        attn_norm="input_layernorm",
        q="self_attn.q_proj",
        k="self_attn.k_proj",
        v="self_attn.v_proj",
        q_norm="self_attn.q_norm",
        k_norm="self_attn.k_norm",
        attn_out="self_attn.o_proj",
        mlp_norm="post_attention_layernorm",
        mlp_gate="mlp.gate_proj",
        mlp_in="mlp.up_proj",
        mlp_out="mlp.down_proj",
    ),
    prefixes=("model.",),
    classes="Llama",
    ignored=("rotary_emb.inv_freq",),
)
WINDOW = dict(sliding_window="sliding_window")
ATTENTION_BIAS = dict(qkv_bias="attention_bias", attn_out_bias="attention_bias")
QWEN_MISSING = dict(
    num_key_value_heads=32, sliding_window=4096, use_sliding_window=False, max_window_layers=28
)

# A family is a row. Its names are those of Hugging Face's class without a head.
FAMILIES = {
    "gpt2": Family(
        variant=COMMON | dict(activation="gelu_new"),
        config=dict(
            vocab_size="vocab_size",
            n_positions="n_positions",
            n_layer="n_layer",
            n_head="n_head",
            n_embd="n_embd",
            n_inner="n_inner",
            activation="activation_function",
            norm_eps="layer_norm_epsilon",
        ),
        fixed=dict(
            scale_attn_weights=True,
            scale_attn_by_inverse_layer_idx=False,
            add_cross_attention=False,
        ),
        missing={},
        dropouts=dict(resid_pdrop=0.1, embd_pdrop=0.1, attn_pdrop=0.1),
        names=dict(embed="wte", pos_embed="wpe", blocks="h", norm="ln_f"),
        layer_names=dict(
            attn_norm="ln_1",
            q="attn.c_attn",
            k="attn.c_attn",
            v="attn.c_attn",
            attn_out="attn.c_proj",
            mlp_norm="ln_2",
            mlp_in="mlp.c_fc",
            mlp_out="mlp.c_proj",
        ),
        prefixes=("transformer.",),
        classes="GPT2",
        required=("vocab_size", "n_layer", "n_head", "n_embd"),
        bos_in_front=False,
        transposed=True,  # Hugging Face's "Conv1D"
        ignored=(".attn.bias", ".attn.masked_bias"),
    ),
    "opt": Family(
        variant=COMMON | dict(activation="relu", position_offset=2),
        config=dict(
            vocab_size="vocab_size",
            n_positions="max_position_embeddings",
            n_layer="num_hidden_layers",
            n_head="num_attention_heads",
            n_embd="hidden_size",
            n_inner="ffn_dim",
            activation="activation_function",
            embed_dim="word_embed_proj_dim",
            pre_norm="do_layer_norm_before",
        ),
        fixed=dict(
            _remove_final_layer_norm=False, enable_bias=True, layer_norm_elementwise_affine=True
        ),
        missing={},
        dropouts=dict(dropout=0.1),
        names=dict(
            embed="decoder.embed_tokens",
            pos_embed="decoder.embed_positions",
            project_in="decoder.project_in",
            blocks="decoder.layers",
            norm="decoder.final_layer_norm",
            project_out="decoder.project_out",
        ),
        layer_names=dict(
            attn_norm="self_attn_layer_norm",
            q="self_attn.q_proj",
            k="self_attn.k_proj",
            v="self_attn.v_proj",
            attn_out="self_attn.out_proj",
            mlp_norm="final_layer_norm",
            mlp_in="fc1",
            mlp_out="fc2",
        ),
        prefixes=("model.", "decoder."),
        classes="OPT",
    ),
    "llama": replace(LLAMA, config=LLAMA.config | ATTENTION_BIAS | dict(mlp_bias="mlp_bias")),
    "mistral": replace(
        LLAMA,
        config=LLAMA.config | WINDOW,
        classes="Mistral",
        missing=dict(num_key_value_heads=8, sliding_window=4096),
    ),
    "qwen2": replace(
        LLAMA,
        variant=LLAMA.variant | dict(qkv_bias=True),
        config=LLAMA.config | WINDOW,
        classes="Qwen2",
        bos_in_front=False,
        missing=QWEN_MISSING,
    ),
    "qwen3": replace(
        LLAMA,
        variant=LLAMA.variant | dict(qk_norm=True),
        config=LLAMA.config | ATTENTION_BIAS | WINDOW,
        classes="Qwen3",
        bos_in_front=False,
        missing=QWEN_MISSING | dict(head_dim=128),
    ),
    "gpt_neox": Family(
        variant=COMMON
        | dict(activation="gelu", parallel_residual=True, rope_theta=1e4, rotary_fraction=0.25),
        config=dict(
            vocab_size="vocab_size",
            n_positions="max_position_embeddings",
            n_layer="num_hidden_layers",
            n_head="num_attention_heads",
            n_embd="hidden_size",
            n_inner="intermediate_size",
            activation="hidden_act",
            norm_eps="layer_norm_eps",
            parallel_residual="use_parallel_residual",
            rope_theta="rotary_emb_base",
            rope_scaling="rope_scaling",
            rotary_fraction="rotary_pct",
            **ATTENTION_BIAS,
        ),
        fixed={},
        missing={},
        dropouts={},
        names=dict(embed="embed_in", blocks="layers", norm="final_layer_norm"),
        layer_names=dict(
            attn_norm="input_layernorm",
            q="attention.query_key_value",
            k="attention.query_key_value",
            v="attention.query_key_value",
            attn_out="attention.dense",
            mlp_norm="post_attention_layernorm",
            mlp_in="mlp.dense_h_to_4h",
            mlp_out="mlp.dense_4h_to_h",
        ),
        prefixes=("gpt_neox.",),
        classes="GPTNeoX",
        bos_in_front=False,
        interleaved=True,
        ignored=(".attention.bias", ".attention.masked_bias", "rotary_emb.inv_freq"),
    ),
}


def family_of(model_type) -> Family:
    """Return the row of FAMILIES. Raises ValueError where there is none."""
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise ValueError(
            f"model_type {quoted(model_type)} is not supported; supported are {', '.join(FAMILIES)}"
        )
    return FAMILIES[model_type]


# --------------------------------------------------------------------------------------------------
# config.json

# Kinds of values: how an error words one, and its test.
COUNT = ("a whole number above 0, below 2^31", lambda value: is_whole(value, 1, 2**31))
LAYER_COUNT = ("a whole number from 1 to 10,000", lambda value: is_whole(value, 1, 10_001))
POSITIVE = ("a number above 0, from 1e-30 to 1e30", lambda value: is_number(value, 1e-30, 1e30))
FINITE = ("a finite number, from -1e30 to 1e30", lambda value: is_number(value, -1e30, 1e30))
NAME = ("a name", lambda value: isinstance(value, str))
SWITCH = ("true or false", lambda value: isinstance(value, bool))
OBJECT = ("an object", lambda value: isinstance(value, dict))
# Llama 1 says by -1 that it has no pad.
TOKEN_ID = (
    "a token id (from 0, below 2^24), -1 or null",
    lambda value: value is None or is_whole(value, -1, 2**24),
)
TOKEN_ID_OR_LIST = (
    "a token id (from 0, below 2^24), -1, null or a list of ids",
    lambda value: all(map(TOKEN_ID[1], value)) if type(value) is list else TOKEN_ID[1](value),
)
FRACTION = ("a number above 0, at most 1", lambda value: is_number(value, 1e-30, 1))
COUNT_OR_NULL = (f"{COUNT[0]}, or null", lambda value: value is None or COUNT[1](value))
COUNT_FROM_0 = ("a whole number from 0, below 2^31", lambda value: is_whole(value, 0, 2**31))
SIDE = ("left or right", lambda value: value in ("left", "right"))
LAYER_TYPES = ("full_attention", "sliding_attention")
LAYERS = (
    f"a list of {' and '.join(LAYER_TYPES)}, or null",
    lambda value: value is None or all_of(value, LAYER_TYPES),
)

FIELD_KINDS = dict(  # of GPTConfig's fields; the others are counts
    n_layer=LAYER_COUNT,
    activation=NAME,
    norm_eps=FRACTION,
    qkv_bias=SWITCH,
    attn_out_bias=SWITCH,
    mlp_bias=SWITCH,
    parallel_residual=SWITCH,
    rope_theta=POSITIVE,
    rope_scaling=OBJECT,
    rotary_fraction=FRACTION,
    sliding_window=COUNT_OR_NULL,
    pre_norm=SWITCH,
)
KEY_KINDS = dict(  # of keys that any config.json may have
    bos_token_id=TOKEN_ID,
    eos_token_id=TOKEN_ID_OR_LIST,
    pad_token_id=TOKEN_ID,
    num_padding_at_beginning=COUNT_FROM_0,
    reward_bias=FINITE,
    max_seq_len=COUNT,
    truncation_side=SIDE,
)
WINDOW_KINDS = dict(  # of keys that say which layers have a sliding window
    sliding_window=COUNT_OR_NULL,
    use_sliding_window=SWITCH,
    max_window_layers=COUNT_FROM_0,
    layer_types=LAYERS,
)
LLAMA_3 = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
ROPE = ("rope_type", "rope_theta", "partial_rotary_factor", *LLAMA_3)
TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
# Keys that `config_to_hf` or `save_reward_model` write anew, or that would not hold for what they
# write: its weights are in float32, and code that a model brought along is not copied.
REWRITTEN = (
    *("model_type", "architectures", "_name_or_path", "dtype", "torch_dtype", "auto_map"),
    *("rope_parameters", "rope_scaling", "rope_theta", "partial_rotary_factor"),
    *("num_labels", "id2label", "label2id", "problem_type"),
    *("num_padding_at_beginning", "reward_bias"),
)


def is_whole(value, low: int, stop: int) -> bool:
    """Tell whether a value is an int from `low` to `stop - 1`; true and false are none."""
    return type(value) is int and low <= value < stop


def is_number(value, low: float, high: float) -> bool:
    """Tell whether a value is a number from `low` to `high`; NaN, true and false are none."""
    return type(value) in (int, float) and low <= value <= high


def all_of(value, names: tuple[str, ...]) -> bool:
    """Tell whether a value is a list of these names alone."""
    return isinstance(value, list) and all(item in names for item in value)


def check(hf: dict, key: str, kind: tuple):
    """Raise ValueError where the value of `key` is not of its kind."""
    expected, is_of_kind = kind
    if not is_of_kind(hf.get(key)):
        raise ValueError(f"{key} is {quoted(hf.get(key))}; expected {expected}")


def quoted(value) -> str:
    """Write a name or a value of JSON for an error: its repr, at most 200 characters of it."""
    return one_line(repr(value), 200)


def config_fields(hf: dict) -> dict:
    """Return the fields of GPTConfig that a parsed config.json describes.

    Raises ValueError that names the key where a backbone cannot be computed, or a value is wrong.
    """
    family = family_of(hf.get("model_type"))
    found = family.dropouts | hf
    hf = family.missing | hf | rope_keys(family, hf)
    for key, value in (FIXED | family.fixed).items():
        if hf.get(key, value) != value:
            raise ValueError(f"{key} is {quoted(hf[key])}; only {value!r} is supported")
    if hf.get("quantization_config"):
        raise ValueError(
            "quantization_config: the weights are quantized; give a directory with unquantized "
            "ones, or dequantize them"
        )
    for key, kind in KEY_KINDS.items():
        if key in hf:
            check(hf, key, kind)
    fields = {"model_type": hf["model_type"]}
    for field, key in family.config.items():
        if hf.get(key) is not None:
            check(hf, key, FIELD_KINDS.get(field, COUNT))
            fields[field] = hf[key]
    missing = [family.config[field] for field in family.required if field not in fields]
    if missing:
        raise ValueError(f"{', '.join(missing)} missing")
    check_heads(family, fields)
    fields["token_ids"] = {key: hf[key] for key in TOKEN_IDS if key in hf}
    fields |= window_fields(family, hf)
    used = (*family.config.values(), *TOKEN_IDS, *fields.get("window_keys", ()), *REWRITTEN)
    fields["other_keys"] = {key: value for key, value in found.items() if key not in used}
    return fields


def check_heads(family: Family, fields: dict):
    """Raise ValueError where a width does not divide into heads. fields: those of config.json."""
    keys, n_head = family.config, fields["n_head"]
    n_kv_head, head_dim = fields.get("n_kv_head", n_head), fields.get("head_dim")
    heads = f"{keys['n_head']} is {n_head}"
    if n_head % n_kv_head:
        raise ValueError(f"{heads}, which does not divide by {keys['n_kv_head']} {n_kv_head}")
    if head_dim is None:
        head_dim, rest = divmod(fields["n_embd"], n_head)
        if rest:
            raise ValueError(f"{heads}, which does not divide {keys['n_embd']} {fields['n_embd']}")
    turns_all = fields.get("rotary_fraction", family.variant["rotary_fraction"]) == 1
    if "rope_theta" in fields and turns_all and head_dim % 2:
        raise ValueError(f"{heads}, of width {head_dim}; rotary positions need an even one")


def rope_keys(family: Family, hf: dict) -> dict:
    """Return the rotary keys of a parsed config.json, under the family's names for them.

    transformers 5 puts all of them into one object, rope_parameters; older versions have base and
    fraction at the top, and only the scaling in an object, whose "rope_type" was once "type".
    Raises ValueError for kinds and keys that are not supported, and where a key has two values.
    """
    rope = {}
    for place in ("rope_scaling", "rope_parameters"):
        if hf.get(place):
            check(hf, place, OBJECT)
            found = dict(hf[place])
            found.setdefault("rope_type", found.pop("type", "default"))
            add_rope_keys(rope, found)
    names = {}
    for key, field in (("rope_theta", "rope_theta"), ("partial_rotary_factor", "rotary_fraction")):
        names[key] = family.config.get(field, key)
        add_rope_keys(rope, {key: hf.get(names[key])})
        rope.setdefault(key, family.variant.get(field, hf.get(key)))
        # gpt_neox has names of its own; transformers 4 wrote these beside them.
        add_rope_keys(rope, {key: hf.get(key)})
    kind = rope.get("rope_type", "default")
    if kind not in ("default", "llama3"):
        raise ValueError(f"rope_type is {quoted(kind)}; supported are default and llama3")
    unknown = sorted(rope.keys() - set(ROPE))
    if unknown:
        raise ValueError(f"{unknown[0]} among the rotary keys; supported are {', '.join(ROPE)}")
    scaling = None
    if kind == "llama3":
        add_rope_keys(rope, {LLAMA_3[-1]: hf.get(LLAMA_3[-1])})
        scaling = {"rope_type": kind}
        for key in LLAMA_3:
            check(rope, key, POSITIVE)
            scaling[key] = rope[key]
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        if low >= high:
            raise ValueError(
                f"low_freq_factor is {low} and high_freq_factor {high}; expected the first to be "
                "lower"
            )
    return {name: rope[key] for key, name in names.items()} | {"rope_scaling": scaling}


def add_rope_keys(rope: dict, found: dict):
    """Add keys that are not null. Raises ValueError where one is there with another value."""
    for key, value in found.items():
        if value is None:
            continue
        other = rope.setdefault(key, value)
        if other is not value and other != value:  # NaN does not equal itself
            raise ValueError(
                f"{key} is {quoted(other)} in one place and {quoted(value)} in another"
            )


def window_fields(family: Family, hf: dict) -> dict:
    """Return the fields `sliding_window`, None where no layer uses one, and `window_keys`.

    hf: a parsed config.json, in which the keys of the family's `missing` are filled in.
    Raises ValueError for a wrong value, and for layer_types that contradict the other keys.
    """
    if "sliding_window" not in family.config:
        return {}
    keys = {}
    for key, kind in WINDOW_KINDS.items():
        if key in family.missing or (key == "layer_types" and key in hf):
            check(hf, key, kind)
            keys[key] = hf[key]
    window = keys["sliding_window"]
    if keys.get("use_sliding_window") is False:
        window = None
    n_layer = hf[family.config["n_layer"]]
    is_used = keys.get("max_window_layers", 0) < n_layer
    layer_types = keys.get("layer_types")
    if layer_types is not None:
        is_used = "sliding_attention" in layer_types
        if len(layer_types) != n_layer or (is_used and window is None):
            raise ValueError(
                f"layer_types is {quoted(layer_types)}, which does not fit {n_layer} layers and a "
                f"sliding_window of {window}"
            )
    return {"sliding_window": window if is_used else None, "window_keys": keys}


def config_to_hf(fields: dict) -> dict:
    """Return the config.json of a GPTConfig with these fields: the inverse of `config_fields`.

    Raises ValueError where two fields that share a key differ.
    """
    family = family_of(fields["model_type"])
    hf = {"tie_word_embeddings": False} | dict.fromkeys(family.dropouts, fields["dropout"])
    hf |= fields["other_keys"]
    hf |= {"model_type": fields["model_type"], "architectures": [family.classes + "Model"]}
    for field, key in family.config.items():
        if hf.setdefault(key, fields[field]) != fields[field]:
            raise ValueError(f"{field} is {fields[field]}, but another field makes {key} {hf[key]}")
    if "use_sliding_window" in family.missing:
        hf |= {"use_sliding_window": hf["sliding_window"] is not None, "max_window_layers": 0}
    return hf | fields["token_ids"] | fields["window_keys"]


# --------------------------------------------------------------------------------------------------
# Weights

# No part of a backbone; embed_out is gpt_neox's lm_head before transformers 5.
HEADS = ("lm_head.weight", "embed_out.weight", "score.weight", "v_head.weight")
DEEPSPEED_CHAT = "rwtransformer."  # its prefix of a backbone's names
DEEPSPEED_CHAT_PREFIXES = (DEEPSPEED_CHAT, "rwtranrsformer.")  # in both spellings


def module_name(model_type: str, module: str) -> str:
    """Translate our name of a module, `embed` or `blocks.3.q`, into Hugging Face's."""
    family = family_of(model_type)
    if not module.startswith("blocks."):
        return family.names[module]
    _, number, child = module.split(".")
    return f"{family.names['blocks']}.{number}.{family.layer_names[child]}"


def weight_names(model_type: str, ours: Iterable[str]) -> dict[str, list[str]]:
    """Map each Hugging Face name to our weights in it: one, or gpt2's q, k and v row after row."""
    names = {}
    for name in ours:
        module, kind = name.rsplit(".", 1)
        names.setdefault(f"{module_name(model_type, module)}.{kind}", []).append(name)
    return names


def bare_name(model_type: str, name: str) -> str:
    """Strip the prefixes that depend on the program which wrote a weight."""
    for prefix in DEEPSPEED_CHAT_PREFIXES + family_of(model_type).prefixes:
        name = name.removeprefix(prefix)
    return name


def is_transposed(model_type: str, name: str, dimensions: int) -> bool:
    """Tell whether Hugging Face stores this weight of ours as (in, out)."""
    return family_of(model_type).transposed and name.startswith("blocks.") and dimensions == 2


def names_by_parameter(model_type: str, weights: dict, source) -> dict[str, str]:
    """Map names without prefixes to those of a checkpoint. Raises ValueError for two of one."""
    stored = {}
    for name in weights:
        other = stored.setdefault(bare_name(model_type, name), name)
        if other != name:
            raise ValueError(
                f"{source}: weights {quoted(other)} and {quoted(name)} are one parameter; expected "
                "one of them"
            )
    return stored


def check_sizes(fields: dict, weights: dict, source):
    """Raise ValueError that names the key by which config.json asks for more than the weights have.

    fields: of the GPTConfig. It takes no memory: a model of a million layers would take minutes to
    lay out, before its first weight is missed.
    """
    model_type = fields["model_type"]
    family = family_of(model_type)
    stored = names_by_parameter(model_type, weights, source)
    prefix = bare_name(model_type, family.names["blocks"] + ".")
    layers = {name.split(".")[1] for name in stored if name.startswith(prefix)}
    if len(layers) < fields["n_layer"]:
        raise ValueError(
            f"{source}/config.json: {family.config['n_layer']} is {fields['n_layer']}, but the "
            f"weights have {counted(len(layers), 'layer')}"
        )
    width, head_dim = fields["n_embd"], fields["head_dim"]
    query, key = fields["n_head"] * head_dim, fields["n_kv_head"] * head_dim
    sizes = {  # rows, columns, and the fields that they follow from
        "embed": (fields["vocab_size"], fields["embed_dim"], "vocab_size embed_dim n_embd"),
        "blocks.0.q": (query, width, "n_head head_dim n_embd"),
        "blocks.0.k": (key, width, "n_kv_head n_head head_dim n_embd"),
        "blocks.0.mlp_in": (fields["n_inner"], width, "n_inner n_embd"),
    }
    if family.layer_names["q"] == family.layer_names["k"]:
        del sizes["blocks.0.k"]
        sizes["blocks.0.q"] = (query + 2 * key, width, "n_head head_dim n_embd")
    if fields["rope_theta"] is None:
        rows = fields["n_positions"] + fields["position_offset"]
        sizes["pos_embed"] = (rows, width, "n_positions n_embd")
    for module, (rows, columns, names) in sizes.items():
        theirs = module_name(model_type, module) + ".weight"
        name = stored.get(bare_name(model_type, theirs))
        if name is None:
            raise ValueError(f"{source}: weight {theirs} is missing")
        expected = [rows, columns]
        if is_transposed(model_type, module, 2):
            expected.reverse()
        found = list(weights[name].shape)
        if found != expected:
            asked = []
            for field in names.split():
                if field in family.config:
                    asked.append(f"{family.config[field]} {fields[field]}")
            raise ValueError(
                f"{source}: weight {theirs} has shape {found}; config.json asks for {expected} "
                f"({', '.join(asked)})"
            )


def state_dict_to_ours(hf: dict, weights: dict, shapes: dict, source) -> dict[str, torch.Tensor]:
    """Turn the weights of a checkpoint into a state dict of GPT, in float32.

    hf: the parsed config.json. weights: under Hugging Face's names, with or without prefixes.
    shapes: what GPT asks for. source: the checkpoint, as errors name it.
    Raises ValueError that names a weight which is missing, left over, or of another shape or dtype.
    """
    model_type = hf["model_type"]
    family = family_of(model_type)
    stored = names_by_parameter(model_type, weights, source)
    state = {}
    for theirs, ours in weight_names(model_type, shapes).items():
        bare = bare_name(model_type, theirs)
        if bare not in stored:
            raise ValueError(f"{source}: weight {theirs} is missing")
        weight = weights[stored.pop(bare)]
        shape = shapes[ours[0]]
        rows = [shapes[name][0] for name in ours]
        expected = [sum(rows), *shape[1:]]
        transposed = is_transposed(model_type, ours[0], len(shape))
        if transposed:
            expected.reverse()
        if list(weight.shape) != expected:
            raise ValueError(
                f"{source}: weight {theirs} has shape {list(weight.shape)}; "
                f"config.json asks for {expected}"
            )
        if weight.dtype not in (torch.float32, torch.float64, torch.float16, torch.bfloat16):
            raise ValueError(
                f"{source}: weight {theirs} is {weight.dtype}; "
                "expected float32, float16, bfloat16 or float64"
            )
        if transposed:
            weight = weight.t()
        # t() and float() copy no float32 weight: it stays in the file, mapped, until it is written.
        weight = weight.float()
        if family.interleaved and len(ours) > 1:
            heads = weight.unflatten(0, (hf[family.config["n_head"]], len(ours), -1))
            parts = [part.flatten(0, 1) for part in heads.unbind(1)]
        else:
            parts = weight.split(rows)
        if len(parts) > 1:
            parts = [part.clone(memory_format=torch.contiguous_format) for part in parts]
        state.update(zip(ours, parts))
    n_layer = hf[family.config["n_layer"]]
    for bare, name in stored.items():
        if bare not in HEADS and not bare.endswith(family.ignored):
            raise ValueError(
                f"{source}: weight {one_line(name, LONGEST_NAME)} is not part of a {model_type} "
                f"backbone of {counted(n_layer, 'layer')} (config.json)"
            )
    return state


def state_dict_to_hf(fields: dict, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Copy the weights of GPT, under Hugging Face's names: the inverse of `state_dict_to_ours`.

    fields: of its GPTConfig.
    """
    model_type = fields["model_type"]
    weights = {}
    for theirs, ours in weight_names(model_type, state).items():
        parts = [state[name] for name in ours]
        if family_of(model_type).interleaved and len(parts) > 1:
            heads = [part.unflatten(0, (fields["n_head"], -1)) for part in parts]
            weight = torch.stack(heads, dim=1).flatten(0, 2)
        else:
            weight = torch.cat(parts)
        if is_transposed(model_type, ours[0], weight.dim()):
            weight = weight.t().contiguous()
        weights[theirs] = weight
    return weights


def resize_rows(weight: torch.Tensor, rows: int) -> torch.Tensor:
    """Return the first `rows` rows of a matrix, followed by rows of zeros where it has fewer."""
    if rows == len(weight):
        return weight
    resized = weight.new_empty(rows, weight.shape[1])
    resized[: len(weight)] = weight[:rows]
    resized[len(weight) :] = 0
    return resized


# --------------------------------------------------------------------------------------------------
# Files

WEIGHT_FILES = (  # in the order in which weights are looked for: whole, or an index of shards
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)


def download_hint(path) -> str:
    """Return the command that downloads a model, as the end of an error about a missing path.

    Returns "" where the path is not like a hub's OWNER/NAME. The command puts the files where the
    path says, so that the user's own command then works.
    """
    looks_like_a_name = re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", str(path), re.ASCII)
    if not looks_like_a_name or Path(path).exists():
        return ""
    return f"; a model of the Hugging Face hub comes by `hf download {path} --local-dir {path}`"


def missing_directory(path) -> str:
    """Word the error about a model's directory that does not exist."""
    return (
        f"{path}: no such directory; a model is a directory with config.json and its weights"
        + download_hint(path)
    )


def read_config(path) -> dict:
    """Return the parsed config.json of a directory. Raises ValueError that names what is wrong."""
    if not Path(path).is_dir():
        raise ValueError(missing_directory(path))
    path = Path(path)
    if not is_file(path / "config.json"):
        raise ValueError(
            f"{path}: no config.json there; a model directory has one beside its weights"
        )
    try:
        hf = json.loads((path / "config.json").read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}/config.json: not JSON ({error})") from None
    if not isinstance(hf, dict):
        raise ValueError(f"{path}/config.json: expected an object, found {type(hf).__name__}")
    return hf


def read_checkpoint(path) -> tuple[dict, dict[str, torch.Tensor]]:
    """Return the parsed config.json of a directory, and its weights as they are named there.

    They are read from model.safetensors, else from pytorch_model.bin, whole or in the shards that
    an index beside it lists. The files are mapped, not read: a weight takes memory of its own only
    once it is written to or converted.
    Raises ValueError that names the file which is missing or broken.
    """
    path, hf = Path(path), read_config(path)
    files = files_of_weights(path)[:1]
    if not files:
        raise ValueError(
            f"{path}: neither model.safetensors nor pytorch_model.bin there, whole or in shards"
        )
    load = load_pickle
    if files[0].name.startswith("model.safetensors"):
        load = import_safetensors(f"{path}: reading its safetensors").load_file
    if files[0].suffix == ".json":
        files = shards_of(files[0])
    weights, places = {}, {}
    for file in files:
        if not is_file(file):
            raise ValueError(f"{file}: no such file, but the index of the weights names it")
        try:
            found = dict(load(file))
        except Exception as error:  # of a cut or foreign file; each library has its kinds
            if full_memory(error):
                raise error
            reason = one_line(f"{type(error).__name__}: {error}".splitlines()[0], 300)
            raise ValueError(f"{file}: cannot be read as weights ({reason})") from None
        for name in found:
            if name in places:
                other = f"weight {quoted(name)} is also in {places[name]}"
                raise ValueError(f"{file}: {other}; expected it in one file")
            places[name] = file
        weights |= found
    for name, weight in weights.items():
        is_named_tensor = isinstance(name, str) and torch.is_tensor(weight)
        if not is_named_tensor or weight.layout != torch.strided or weight.is_meta:
            raise ValueError(
                f"{files[0]}: expected a dictionary of names and tensors, found something else"
            )
    check_weights(weights, path)
    return hf, weights


def files_of_weights(path) -> list[Path]:
    """List the files of weights in a directory, the one that is read first."""
    return [Path(path) / name for name in WEIGHT_FILES if is_file(Path(path) / name)]


def unread_weights(path) -> str:
    """Say which file of weights is read, where there are others that are not; else ""."""
    files = files_of_weights(path)
    if len(files) < 2:
        return ""
    others = ", ".join(file.name for file in files[1:])
    return f"weights read from {files[0].name}; {others}, there too, not read"


def shards_of(index: Path) -> list[Path]:
    """List the files that an index names, all of them in its directory or below.

    Raises ValueError where it is no such index, or names another place.
    """
    try:
        weight_map = dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(
            f"{index}: expected an object with a weight_map ({type(error).__name__}: {error})"
        ) from None
    for weight, name in weight_map.items():
        if not is_below(name):
            raise ValueError(
                f"{index}: weight_map has {quoted(weight)} in {quoted(name)}; expected the name of "
                "a file in this directory, such as model-00001-of-00002.safetensors"
            )
    return [index.parent / name for name in sorted(set(weight_map.values()))]


def is_below(name) -> bool:
    """Tell whether a name from an index leads to a file of its directory, or of one below.

    It is a name on every system: no backslash, no drive. Links on the disk may lead anywhere.
    """
    if not isinstance(name, str) or "\\" in name or "\0" in name:
        return False
    path = PurePosixPath(name)
    has_drive = bool(PureWindowsPath(name).drive)
    return bool(path.name) and not (path.is_absolute() or ".." in path.parts or has_drive)


def load_pickle(file: Path) -> dict:
    """Map a file of torch.save, without running code in it; PyTorch before 1.6 wrote no zips."""
    can_map = zipfile.is_zipfile(file)
    return torch.load(file, map_location="cpu", weights_only=True, mmap=can_map)


def import_safetensors(what: str):
    """Return the module safetensors.torch. Raises ValueError that says `what` needs it."""
    try:
        import safetensors.torch
    except ImportError:
        raise ValueError(f"{what} needs `pip install -r requirements-hf.txt`") from None
    return safetensors.torch


# --------------------------------------------------------------------------------------------------
# Reward models

LAYOUTS = ("deepspeed-chat", "hf")  # of a saved model
MOST_ADDED_ROWS = 1000  # of zeros, behind an embedding, for tokens that were added to a tokenizer


def padding_of(path, hf: dict, pad_id: int | None, leading: int | None) -> tuple[int, int]:
    """Return the pad id, and how many of them begin a text; None takes what the directory says.

    The pad id is config.json's, else the tokenizer's, else a new id right after the vocabulary; the
    number is config.json's, else 1 where texts begin with a bos that is also the pad, else 0.
    Raises ValueError as `check_pad_id` and `check_padding` do.
    """
    if pad_id is None and (hf.get("pad_token_id") or 0) >= 0:  # Llama 1 says "none" by -1
        pad_id = hf.get("pad_token_id")
    if pad_id is None and has_tokenizer(path):
        pad_id = load_tokenizer(path, chat_template="plain").pad_id
    if pad_id is None:
        pad_id = hf["vocab_size"]
    check_pad_id(pad_id, hf["vocab_size"], path)
    if leading is None:
        is_bos = family_of(hf["model_type"]).bos_in_front and hf.get("bos_token_id") == pad_id
        leading = hf.get("num_padding_at_beginning", int(is_bos))
    check_padding(pad_id, leading, f"{path}: ")
    return pad_id, leading


def check_pad_id(pad_id: int, rows: int, source):
    """Raise ValueError where an embedding of `rows` rows would need too many more for a pad id.

    source: the model's directory.
    """
    if not isinstance(pad_id, int) or not 0 <= pad_id < rows + MOST_ADDED_ROWS:
        raise ValueError(
            f"{source}: the pad id (--pad_id, pad_id, or pad_token_id of config.json) is "
            f"{quoted(pad_id)}, and the embedding has {rows} rows, to which at most "
            f"{MOST_ADDED_ROWS:,} are added; expected an id from 0 to {rows + MOST_ADDED_ROWS - 1}"
        )


def rows_to_add(rows: int, tokenizer) -> int | None:
    """Count the rows of zeros that an embedding of `rows` rows needs for a tokenizer's ids.

    Returns None where they are not the model's: other ids than those of added tokens have no row,
    or more than MOST_ADDED_ROWS of them.
    """
    missing = max(0, tokenizer.text_size - rows)
    if tokenizer.model_size > rows or missing > MOST_ADDED_ROWS:
        return None
    return missing


def value_head(
    weights: dict[str, torch.Tensor], width: int, source
) -> tuple[torch.Tensor | None, str]:
    """Return the value head of a checkpoint, (1, width), or None where it has none; and a remark.

    The remark says where the head was read, or why there is none: a score.weight of more rows is a
    classifier's; and which files of weights were not read (`unread_weights`).
    Raises ValueError for another width, and for a v_head.weight of another shape.
    """
    more = unread_weights(source)
    if more:
        more = f"; {more}"
    names = [name for name in ("v_head.weight", "score.weight") if name in weights]
    if not names:
        return None, f"no value head there (v_head.weight or score.weight), so a fresh one{more}"
    name = names[0]
    shape = list(weights[name].shape)
    if len(names) == 2 and list(weights[names[1]].shape) == [1, width]:
        raise ValueError(f"{source}: {' and '.join(names)} are both value heads; expected one")
    found = f"weight {name} has shape {shape}; expected {[1, width]}"
    if shape == [1, width]:
        return weights[name], f"value head read from {name}{more}"
    if name == "score.weight" and len(shape) == 2 and shape[0] != 1:
        return None, f"{found}; that is a classifier's, so a fresh value head{more}"
    raise ValueError(f"{source}: {found}")


def save_reward_model(model, path, layout: str, tokenizer=None):
    """Write a reward model into a directory, as `RewardModel.save_pretrained` says."""
    if layout not in LAYOUTS:
        raise ValueError(f"layout {layout!r} is not known; known are {' and '.join(LAYOUTS)}")
    safetensors = import_safetensors(f"layout {layout!r}") if layout == "hf" else None
    path = Path(path)
    if layout == "hf" and tokenizer and tokenizer.gap().startswith(NO_JSON):
        raise ValueError(f"layout 'hf': {tokenizer.gap()}; layout 'deepspeed-chat' keeps the model")
    file = path / ("model.safetensors" if layout == "hf" else "pytorch_model.bin")
    refuse_others("model", [path / name for name in WEIGHT_FILES if path / name != file])
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(
            f"{path}: cannot be made a directory ({error.strerror}); give another one"
        ) from None
    length = tokenizer.vocab_size if tokenizer else model.backbone.config.vocab_size
    rows = 8 * math.ceil(max(length, model.pad_id + 1) / 8)
    hf = model.backbone.config.to_hf() | {
        "vocab_size": rows,
        "pad_token_id": model.pad_id,
        "num_padding_at_beginning": model.num_padding_at_beginning,
    }
    if model.reward_bias:
        hf["reward_bias"] = model.reward_bias
    family = family_of(hf["model_type"])
    prefix, head_name = DEEPSPEED_CHAT, "v_head.weight"
    if layout == "hf":
        prefix, head_name = family.prefixes[0], "score.weight"
        hf["architectures"] = [family.classes + "ForSequenceClassification"]
        hf |= {"id2label": {"0": "reward"}, "label2id": {"reward": 0}}
        hf["problem_type"] = "regression"  # pipelines then give the score itself
    weights = model.backbone.to_hf()
    embed = family.names["embed"] + ".weight"
    weights[embed] = resize_rows(weights[embed], rows)
    weights = {prefix + name: weight.cpu() for name, weight in weights.items()}
    weights[head_name] = model.v_head.weight.detach().cpu().clone()
    check_weights(weights, f"{path}: not written")
    # The model may be mapped from the file that it replaces: nothing is written into that.
    with replacing(file) as part:
        if layout == "hf":
            safetensors.save_file(weights, part, metadata={"format": "pt"})
        else:
            torch.save(weights, part)
        (path / "config.json").write_text(json.dumps(hf, indent=2) + "\n")
        shutil.copymode(path / "config.json", part)  # safetensors lets its owner alone read it
    if tokenizer:
        tokenizer.save(path, tokenizer_settings(vars(model.backbone.config)))


def longest_row(fields: dict) -> tuple[int, str]:
    """Return how many tokens a row may have at most, and the limit in words: "32 positions".

    fields: of a GPTConfig.
    """
    longest, window = fields["n_positions"], fields["sliding_window"]
    if window is not None and window < longest:
        return window, f"a sliding_window of {window} tokens"
    return longest, f"{longest} positions"


def truncation_of(fields: dict) -> tuple[int, str]:
    """Return the length to which the texts of a model are truncated, and the side that is cut.

    fields: of its GPTConfig. Both are as in training; without a record of it, the longest row and
    the left side.
    """
    keys = fields["other_keys"]
    return keys.get("max_seq_len", longest_row(fields)[0]), keys.get("truncation_side", "left")


def tokenizer_settings(fields: dict) -> dict:
    """Return the keys of a tokenizer_config.json that follow from the model beside it.

    fields: of its GPTConfig.
    """
    length, side = truncation_of(fields)
    settings = {"model_max_length": length, "truncation_side": side}
    if fields["model_type"] == "qwen2":
        # AutoTokenizer of transformers 5 takes its Qwen2Tokenizer here, whatever class is asked
        # for; that replaces all of tokenizer.json but the vocabulary, unless told so. No code comes
        # with the tokenizer that could be run.
        settings |= {"trust_remote_code": True}
    return settings
