"""A GPT backbone: token ids in, last hidden states out (no language-model head).

One class. What distinguishes gpt2, opt and llama is data: the fields of `GPTConfig`, filled in by the table `FAMILIES`,
which also holds each family's Hugging Face names. Adding a family means adding a row to that table.

Notable features:
- attention through `F.scaled_dot_product_attention`
- grouped-query attention, rotary positions, RMSNorm, SwiGLU (llama); learned positions, LayerNorm, GELU (gpt2)
- norms before the sublayers, or after them with a narrower embedding (OPT-350m, DeepSpeed-Chat's own reward model)
- rewards are read at padding, so padding queries see every real key of their row and no padding key, as in `transformers`
- rows with padding, or comparisons packed one after the other without (`data.PackedBatch`): only attention knows which

Shapes in comments: B rows, L positions, T tokens of a packed batch, H heads, D width of a head, C width of the hidden state.
"""

import json
import math
import re
import zipfile
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from parts.packed import PackedAttention

ACTIVATIONS = {
    "gelu": F.gelu,
    "gelu_new": partial(F.gelu, approximate="tanh"),
    "gelu_pytorch_tanh": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
    "silu": F.silu,
}

# Per family: `variant` are the fields of GPTConfig that make it one. `config` maps fields to keys of Hugging Face's
# config.json; those of the `required` ones must be there. `fixed` are keys that would change the computation and must have
# this value. `names` maps our modules to Hugging Face's; where one of theirs stands for several of ours, our rows follow
# each other in it. `prefixes` stand before a name or don't, depending on which of Hugging Face's classes wrote it; the
# first one is that of the classes with a head. `ignored` are the endings of buffers that old checkpoints carry.
FAMILIES = {
    "gpt2": dict(
        variant=dict(
            norm="layernorm",
            norm_eps=1e-5,
            activation="gelu_new",
            gated=False,
            bias=True,
            rope_theta=None,
            pre_norm=True,
            position_offset=0,
        ),
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
        required=("vocab_size", "n_layer", "n_head", "n_embd"),
        fixed=dict(
            scale_attn_weights=True,
            scale_attn_by_inverse_layer_idx=False,
            add_cross_attention=False,
        ),
        architecture="GPT2Model",
        classifier="GPT2ForSequenceClassification",
        prefixes=("transformer.",),
        transposed=True,  # GPT-2 stores its linear weights as (in, out): "Conv1D"
        bos_in_front=False,
        names={
            "embed": "wte",
            "pos_embed": "wpe",
            "blocks.{}.attn_norm": "h.{}.ln_1",
            "blocks.{}.q": "h.{}.attn.c_attn",
            "blocks.{}.k": "h.{}.attn.c_attn",
            "blocks.{}.v": "h.{}.attn.c_attn",
            "blocks.{}.attn_out": "h.{}.attn.c_proj",
            "blocks.{}.mlp_norm": "h.{}.ln_2",
            "blocks.{}.mlp_in": "h.{}.mlp.c_fc",
            "blocks.{}.mlp_out": "h.{}.mlp.c_proj",
            "norm": "ln_f",
        },
        ignored=(".attn.bias", ".attn.masked_bias"),
    ),
    "opt": dict(
        variant=dict(
            norm="layernorm",
            norm_eps=1e-5,
            activation="relu",
            gated=False,
            bias=True,
            rope_theta=None,
            pre_norm=True,
            position_offset=2,
        ),
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
        required=("vocab_size", "n_positions", "n_layer", "n_head", "n_embd", "n_inner"),
        fixed=dict(
            _remove_final_layer_norm=False, enable_bias=True, layer_norm_elementwise_affine=True
        ),
        architecture="OPTModel",
        classifier="OPTForSequenceClassification",
        prefixes=("model.", "decoder."),
        transposed=False,
        bos_in_front=True,
        names={
            "embed": "decoder.embed_tokens",
            "pos_embed": "decoder.embed_positions",
            "project_in": "decoder.project_in",
            "blocks.{}.attn_norm": "decoder.layers.{}.self_attn_layer_norm",
            "blocks.{}.q": "decoder.layers.{}.self_attn.q_proj",
            "blocks.{}.k": "decoder.layers.{}.self_attn.k_proj",
            "blocks.{}.v": "decoder.layers.{}.self_attn.v_proj",
            "blocks.{}.attn_out": "decoder.layers.{}.self_attn.out_proj",
            "blocks.{}.mlp_norm": "decoder.layers.{}.final_layer_norm",
            "blocks.{}.mlp_in": "decoder.layers.{}.fc1",
            "blocks.{}.mlp_out": "decoder.layers.{}.fc2",
            "norm": "decoder.final_layer_norm",
            "project_out": "decoder.project_out",
        },
        ignored=(),
    ),
    "llama": dict(
        variant=dict(
            norm="rmsnorm",
            norm_eps=1e-6,
            activation="silu",
            gated=True,
            bias=False,
            rope_theta=10000.0,
            pre_norm=True,
            position_offset=0,
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
        required=("vocab_size", "n_positions", "n_layer", "n_head", "n_embd", "n_inner"),
        fixed=dict(attention_bias=False, mlp_bias=False),
        architecture="LlamaModel",
        classifier="LlamaForSequenceClassification",
        prefixes=("model.",),
        transposed=False,
        bos_in_front=True,
        names={
            "embed": "embed_tokens",
            "blocks.{}.attn_norm": "layers.{}.input_layernorm",
            "blocks.{}.q": "layers.{}.self_attn.q_proj",
            "blocks.{}.k": "layers.{}.self_attn.k_proj",
            "blocks.{}.v": "layers.{}.self_attn.v_proj",
            "blocks.{}.attn_out": "layers.{}.self_attn.o_proj",
            "blocks.{}.mlp_norm": "layers.{}.post_attention_layernorm",
            "blocks.{}.mlp_gate": "layers.{}.mlp.gate_proj",
            "blocks.{}.mlp_in": "layers.{}.mlp.up_proj",
            "blocks.{}.mlp_out": "layers.{}.mlp.down_proj",
            "norm": "norm",
        },
        ignored=("rotary_emb.inv_freq",),
    ),
}


def family_of(model_type) -> dict:
    """The row of FAMILIES. Raises ValueError where there is none."""
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise ValueError(
            f"model_type {model_type!r} is not supported; supported are {', '.join(FAMILIES)}"
        )
    return FAMILIES[model_type]


def rope_keys(hf: dict) -> dict:
    """The rope_theta and rope_scaling of a parsed config.json, None where it has none. Raises ValueError for unknown kinds.

    transformers 5 put these two top-level keys into one dictionary; a "type" in there is an older "rope_type".
    """
    both = hf.get("rope_scaling") or {}, hf.get("rope_parameters") or {}
    if not all(isinstance(rope, dict) for rope in both):
        raise ValueError(
            f"rope_scaling or rope_parameters is {both[0] or both[1]!r}; expected an object"
        )
    rope = both[0] | both[1]
    theta, kind = (
        hf.get("rope_theta", rope.get("rope_theta")),
        rope.get("rope_type", rope.get("type", "default")),
    )
    if kind == "default":
        return {"rope_theta": theta, "rope_scaling": None}
    if kind != "llama3":
        raise ValueError(f"rope_type is {kind!r}; supported are default and llama3")
    for key in (
        "factor",
        "low_freq_factor",
        "high_freq_factor",
        "original_max_position_embeddings",
    ):
        if not isinstance(rope.get(key), (int, float)):
            raise ValueError(f"{key} of the rope scaling is {rope.get(key)!r}; expected a number")
    return {"rope_theta": theta, "rope_scaling": rope}


@dataclass
class GPTConfig:
    """The shape of a backbone. A field that is None takes the family's value (FAMILIES), or the usual one for the others.

    Raises ValueError where the fields do not fit together.
    """

    model_type: str = "gpt2"  # a family
    vocab_size: int = 50257  # rows of the token embedding
    n_positions: int = 1024  # longest row; with learned positions, rows of their table
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768  # C, width of the hidden state
    n_kv_head: int | None = None  # fewer than n_head: grouped-query attention
    head_dim: int | None = None
    n_inner: int | None = None  # width of the MLP
    norm: str | None = None  # "layernorm" or "rmsnorm"
    norm_eps: float | None = None
    activation: str | None = None
    gated: bool | None = None  # SwiGLU: activation(gate) * up
    bias: bool | None = None  # of the linear layers
    rope_theta: float | None = (
        None  # base of the rotary frequencies; where the family has none: learned positions
    )
    rope_scaling: dict | None = None  # Llama 3's, under Hugging Face's keys
    pre_norm: bool | None = (
        None  # norms before the sublayers and at the end; else after the sublayers alone
    )
    embed_dim: int | None = (
        None  # width of embedding and output; other than n_embd, projections stand in between
    )
    position_offset: int | None = (
        None  # row of the learned position table where position 0 stands (OPT: 2)
    )
    dropout: float = 0.0  # after the embedding, on attention weights, before each residual sum
    init_std: float | None = (
        None  # of fresh weights: 0.02 at GPT-2's width of 768, in proportion to 1 / sqrt(width)
    )
    token_ids: dict = field(
        default_factory=dict
    )  # bos_token_id, eos_token_id, pad_token_id, as config.json has them

    def __post_init__(self):
        for name, value in family_of(self.model_type)["variant"].items():
            if getattr(self, name) is None:
                setattr(self, name, value)
        self.n_kv_head = self.n_kv_head or self.n_head
        self.embed_dim = self.embed_dim or self.n_embd
        if self.n_embd % self.n_head and self.head_dim is None:
            raise ValueError(f"width {self.n_embd} does not divide into {self.n_head} heads")
        self.head_dim = self.head_dim or self.n_embd // self.n_head
        if self.n_head % self.n_kv_head:
            raise ValueError(
                f"{self.n_head} query heads do not divide among {self.n_kv_head} key-value heads"
            )
        if self.rope_theta is not None and self.head_dim % 2:
            raise ValueError(f"rotary positions need an even head width, not {self.head_dim}")
        if (
            self.n_inner is None
        ):  # with a gate there are three matrices, not two: 8/3 keeps the number of parameters
            self.n_inner = 8 * math.ceil(self.n_embd / 3) if self.gated else 4 * self.n_embd
        self.init_std = self.init_std or 0.02 * math.sqrt(768 / self.n_embd)
        if self.activation not in ACTIVATIONS:
            raise ValueError(
                f"activation {self.activation!r} is not known; known are {', '.join(ACTIVATIONS)}"
            )

    @classmethod
    def from_hf(cls, hf: dict) -> "GPTConfig":
        """The config that a parsed Hugging Face config.json describes. Raises ValueError for what we cannot compute."""
        family = family_of(hf.get("model_type"))
        hf = hf | rope_keys(hf)
        for key, value in family["fixed"].items():
            if hf.get(key, value) != value:
                raise ValueError(f"{key} is {hf[key]!r}; only {value!r} is supported")
        given = {
            ours: hf[theirs]
            for ours, theirs in family["config"].items()
            if hf.get(theirs) is not None
        }
        missing = [family["config"][ours] for ours in family["required"] if ours not in given]
        if missing:
            raise ValueError(f"{', '.join(missing)} missing")
        for key in ("bos_token_id", "pad_token_id", "num_padding_at_beginning"):
            if key in hf and not (
                type(hf[key]) is int and hf[key] < 2**24 or hf[key] is None and key.endswith("id")
            ):
                raise ValueError(
                    f"{key} is {hf[key]!r}; expected a {'token id or null' if key.endswith('id') else 'whole number'}"
                )
        if hf.get("quantization_config"):
            raise ValueError(
                "quantization_config: the weights are quantized; give a directory with those of before, or dequantize them"
            )
        for ours, value in given.items():
            kind = {
                "activation": str,
                "norm_eps": float,
                "rope_theta": float,
                "pre_norm": bool,
                "rope_scaling": dict,
            }.get(ours, int)
            if (
                type(value) not in ((int, float) if kind is float else (kind,))
                or kind in (int, float)
                and not 0 < value < 2**31
            ):
                expected = {
                    str: "a name",
                    float: "a number above 0",
                    int: "a whole number above 0",
                    bool: "true or false",
                    dict: "an object",
                }[kind]
                raise ValueError(f"{family['config'][ours]} is {value!r}; expected {expected}")
        token_ids = {
            key: hf[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id") if key in hf
        }
        return cls(model_type=hf["model_type"], **given, token_ids=token_ids)

    def to_hf(self) -> dict:
        """The content of a config.json from which `transformers` makes the same backbone."""
        family = FAMILIES[self.model_type]
        hf = {"model_type": self.model_type, "architectures": [family["architecture"]]}
        hf |= {theirs: getattr(self, ours) for ours, theirs in family["config"].items()}
        return hf | {"tie_word_embeddings": False} | self.token_ids


HEADS = (
    "lm_head.weight",
    "score.weight",
    "v_head.weight",
)  # weights in a checkpoint that are not the backbone's


ALL = slice(None)


class Block(nn.Module):
    """One transformer layer: x + attention(norm(x)), then x + mlp(norm(x)); without pre_norm, norm(x + attention(x)) and so on."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        c, q_width, kv_width = (
            config.n_embd,
            config.n_head * config.head_dim,
            config.n_kv_head * config.head_dim,
        )
        self.attn_norm = make_norm(config)
        self.q = nn.Linear(c, q_width, bias=config.bias)
        self.k = nn.Linear(c, kv_width, bias=config.bias)
        self.v = nn.Linear(c, kv_width, bias=config.bias)
        self.attn_out = nn.Linear(q_width, c, bias=config.bias)
        self.mlp_norm = make_norm(config)
        self.mlp_gate = nn.Linear(c, config.n_inner, bias=config.bias) if config.gated else None
        self.mlp_in = nn.Linear(c, config.n_inner, bias=config.bias)
        self.mlp_out = nn.Linear(config.n_inner, c, bias=config.bias)

    def forward(self, x, attend, rotary, keys=ALL, read=ALL):
        """x: (B, L, C), or packed (T, C). `attend` is the attention of that layout, `rotary` the tables of `rotary_tables`.

        `keys`: the rows of x that are attended to. `read`: the rows of which anything is read later, and which are returned.
        """
        pre_norm, y = self.config.pre_norm, self.attn_norm(x) if self.config.pre_norm else x
        x = x[read] + self.drop(self.attention(y, attend, rotary, keys, read))
        x = x if pre_norm else self.attn_norm(x)
        x = x + self.drop(self.mlp(self.mlp_norm(x) if pre_norm else x))
        return x if pre_norm else self.mlp_norm(x)

    def drop(self, x):
        return F.dropout(x, self.config.dropout, self.training)

    def attention(self, x, attend, rotary, keys, read):
        context = x[keys]
        q, k, v = (
            linear(rows).unflatten(-1, (-1, self.config.head_dim))  # (..., H, D)
            for linear, rows in ((self.q, x[read]), (self.k, context), (self.v, context))
        )
        if rotary is not None:
            q, k = (
                rotate(heads, *(table[rows] for table in rotary))
                for heads, rows in ((q, read), (k, keys))
            )
        return self.attn_out(
            attend(q, k, v, self.config.dropout if self.training else 0.0).flatten(-2)
        )

    def mlp(self, x):
        activation = ACTIVATIONS[self.config.activation]
        if self.mlp_gate is None:
            return self.mlp_out(activation(self.mlp_in(x)))
        return self.mlp_out(activation(self.mlp_gate(x)) * self.mlp_in(x))


class GPT(nn.Module):
    """A decoder-only transformer without a head (Radford et al. 2019; Touvron et al. 2023 for llama)."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        self.gradient_checkpointing = (
            False  # keep only the blocks' inputs, and compute the blocks again in the backward pass
        )
        self.embed = make_embedding(config.vocab_size, config.embed_dim)
        if config.rope_theta is None:
            self.pos_embed = make_embedding(
                config.n_positions + config.position_offset, config.n_embd
            )
        self.project_in = self.project_out = None
        if config.embed_dim != config.n_embd:
            self.project_in = nn.Linear(config.embed_dim, config.n_embd, bias=False)
            self.project_out = nn.Linear(config.n_embd, config.embed_dim, bias=False)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.norm = make_norm(config) if config.pre_norm else None
        if not self.embed.weight.is_meta:
            self.apply(self._init_weights)

    def _init_weights(self, module):
        """GPT-2's: normal with `init_std`; layers that write to the residual stream scaled down by the number of writes."""
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=self.config.init_std)
        if getattr(module, "bias", None) is not None:
            nn.init.zeros_(module.bias)
        if isinstance(
            module, Block
        ):  # apply() visits children first, so this comes after their own initialization
            for linear in (module.attn_out, module.mlp_out):
                nn.init.normal_(
                    linear.weight, std=self.config.init_std / math.sqrt(2 * self.config.n_layer)
                )

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Last hidden states, after the final norm and OPT's output projection.

        input_ids: (B, L) int64. attention_mask: (B, L), 1 where a token may be attended to; None: everywhere.
        Returns (B, L, embed_dim). Values at left padding have no meaning. Positions are columns, at padding too; but OPT
        counts attended tokens, and all padding has the position before the first.
        Raises ValueError for rows longer than `n_positions`.
        """
        L = input_ids.shape[1]
        positions = torch.arange(L, device=input_ids.device)
        if self.config.position_offset and attention_mask is not None:
            positions = attention_mask.long().cumsum(1) * attention_mask.long() - 1  # (B, L)
        mask = None if attention_mask is None else causal_mask(attention_mask)
        return self.transform(input_ids, positions, L, partial(padded_attention, mask=mask))

    def forward_packed(self, batch) -> torch.Tensor:
        """The same for a `data.PackedBatch`, at all of its tokens but the trunks': (tokens - trunk tokens, embed_dim)."""
        positions, n_text = batch.positions, batch.num_tokens - sum(batch.tails)
        if self.config.position_offset:
            positions = torch.cat((positions[:n_text], torch.full_like(positions[n_text:], -1)))
        attend = PackedAttention(batch, scaled_dot_product)
        return self.transform(
            batch.input_ids,
            positions,
            batch.length,
            attend,
            slice(n_text),
            slice(sum(batch.trunks), None),
        )

    def transform(self, input_ids, positions, length: int, attend, keys=ALL, read=ALL):
        """Token-wise work, which knows of no layout, around `attend`, which does."""
        if length > self.config.n_positions:
            raise ValueError(
                f"rows of {length} tokens, but the model has {self.config.n_positions} positions"
            )
        x, rotary = self.embed(input_ids), None
        if self.project_in is not None:
            x = self.project_in(x)
        if self.config.rope_theta is None:
            x = x + self.pos_embed(positions + self.config.position_offset)
        else:
            rotary = rotary_tables(positions, self.config, x.dtype)
        x = F.dropout(x, self.config.dropout, self.training)
        for block in self.blocks:
            run = (
                partial(checkpoint, block, use_reentrant=False)
                if self.gradient_checkpointing and self.training
                else block
            )
            x = run(x, attend, rotary, keys, read if block is self.blocks[-1] else ALL)
        if self.norm is not None:
            x = self.norm(x)
        return x if self.project_out is None else self.project_out(x)

    @classmethod
    def from_pretrained(cls, path) -> "GPT":
        """The backbone of a Hugging Face directory, in float32 (`read_checkpoint` says which files it needs).

        Raises ValueError that names the file and what is wrong with it.
        """
        hf, weights = read_checkpoint(path)
        return cls.from_hf(hf, weights, source=path)

    @classmethod
    def from_hf(cls, hf: dict, weights: dict[str, torch.Tensor], source) -> "GPT":
        """The backbone that a parsed config.json and weights under Hugging Face's names make. `source` is for errors."""
        try:
            config = GPTConfig.from_hf(hf)
        except ValueError as error:
            raise ValueError(f"{source}/config.json: {error}") from None
        family = FAMILIES[config.model_type]

        def bare(name):
            for prefix in (
                "rwtransformer.",
                "rwtranrsformer.",
                *family["prefixes"],
            ):  # DeepSpeed-Chat's, in both spellings
                name = name.removeprefix(prefix)
            return name

        weights = {bare(name): (name, weight) for name, weight in weights.items()}
        with torch.device(
            "meta"
        ):  # shapes without memory: the checkpoint's tensors become the parameters
            model = cls(config)
        state, parameters = {}, dict(model.named_parameters())
        for theirs, ours in model.hf_names().items():
            if bare(theirs) not in weights:
                raise ValueError(f"{source}: weight {theirs} is missing")
            _, weight = weights.pop(bare(theirs))
            rows = [len(parameters[name]) for name in ours]
            expected = [sum(rows), *parameters[ours[0]].shape[1:]]
            if is_transposed := model.is_transposed(ours[0]):
                expected.reverse()
            if list(weight.shape) != expected:
                raise ValueError(
                    f"{source}: weight {theirs} has shape {list(weight.shape)}; config.json asks for {expected}"
                )
            if weight.dtype not in (torch.float32, torch.float64, torch.float16, torch.bfloat16):
                raise ValueError(
                    f"{source}: weight {theirs} is {weight.dtype}; expected float32, float16, bfloat16 or float64"
                )
            # float() and t() copy no float32 weight: it stays in the file, mapped, until something writes to it.
            parts = (weight.t() if is_transposed else weight).float().split(rows)
            if len(parts) > 1:
                parts = [part.clone(memory_format=torch.contiguous_format) for part in parts]
            state |= zip(ours, parts)
        left_over = [
            name
            for bare_name, (name, _) in weights.items()
            if not bare_name.endswith((*family["ignored"], *HEADS))
        ]
        if left_over:
            raise ValueError(
                f"{source}: weight {left_over[0]} is not part of a {config.model_type} backbone of "
                f"{config.n_layer} layers (config.json)"
            )
        model.load_state_dict(state, assign=True)
        return model

    def hf_names(self) -> dict[str, list[str]]:
        """Hugging Face's name of every weight -> our names of what it holds, row after row: one, or gpt2's q, k and v."""
        names = {}
        for ours, _ in self.named_parameters():
            module, kind = ours.rsplit(".", 1)
            layer = re.search(r"\d+", module)
            theirs = FAMILIES[self.config.model_type]["names"][re.sub(r"\d+", "{}", module)]
            names.setdefault(f"{theirs.format(layer and layer[0])}.{kind}", []).append(ours)
        return names

    def is_transposed(self, name: str) -> bool:
        """Whether Hugging Face keeps this weight of ours as (in, out)."""
        return (
            FAMILIES[self.config.model_type]["transposed"]
            and name.startswith("blocks.")
            and self.get_parameter(name).dim() == 2
        )

    def resize_embedding(self, rows: int):
        """Make the token embedding `rows` rows long. New rows are zeros."""
        self.embed.weight = nn.Parameter(resize_rows(self.embed.weight.detach(), rows))
        self.embed.num_embeddings = self.config.vocab_size = rows

    def to_hf(self) -> dict[str, torch.Tensor]:
        """The weights under their Hugging Face names, without prefix: the inverse of `from_hf`."""
        weights = {}
        for theirs, ours in self.hf_names().items():
            weight = torch.cat([self.get_parameter(name).detach() for name in ours])
            weights[theirs] = weight.t().contiguous() if self.is_transposed(ours[0]) else weight
        return weights


def make_embedding(rows: int, width: int) -> nn.Embedding:
    """Without nn.Embedding's own initialization: on the meta device it would import a large part of PyTorch, for nothing."""
    return nn.Embedding.from_pretrained(torch.empty(rows, width), freeze=False)


def make_norm(config: GPTConfig) -> nn.Module:
    if config.norm == "rmsnorm":
        return nn.RMSNorm(config.n_embd, eps=config.norm_eps)
    return nn.LayerNorm(config.n_embd, eps=config.norm_eps)


def scaled_dot_product(q, k, v, dropout_p: float, **mask) -> torch.Tensor:
    """Attention of q (B, L, H, D) to k and v (B, M, H_kv, D): (B, L, H, D)."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    y = F.scaled_dot_product_attention(
        q, k, v, dropout_p=dropout_p, enable_gqa=q.shape[1] != k.shape[1], **mask
    )
    return y.transpose(1, 2)


def padded_attention(q, k, v, dropout_p: float, mask) -> torch.Tensor:
    """q (B, L, H, D), k and v (B, L, H_kv, D), mask of `causal_mask` or None -> (B, L, H, D)."""
    return scaled_dot_product(q, k, v, dropout_p, attn_mask=mask, is_causal=mask is None)


def causal_mask(attention_mask: torch.Tensor) -> torch.Tensor:
    """(B, L) of 1 and 0 -> (B, 1, L, L) bool: position i attends to j <= i where the mask is 1 at j."""
    L = attention_mask.shape[1]
    causal = torch.ones(L, L, dtype=torch.bool, device=attention_mask.device).tril()
    mask = causal & attention_mask.bool()[:, None, None, :]
    # At left padding a query has no key; a softmax over nothing is NaN, and NaN spreads. It attends to itself instead.
    return mask | (~mask.any(-1, keepdim=True) & torch.eye(L, dtype=torch.bool, device=mask.device))


def rotary_tables(positions: torch.Tensor, config: GPTConfig, dtype: torch.dtype):
    """cos and sin of position * frequency (Su et al. 2021, RoFormer), each (L, 1, D) to broadcast over heads."""
    wide = torch.promote_types(dtype, torch.float32)
    exponents = (
        torch.arange(0, config.head_dim, 2, device=positions.device).to(wide) / config.head_dim
    )
    frequencies = 1.0 / config.rope_theta**exponents
    if scaling := config.rope_scaling:
        # Llama 3.1: wavelengths beyond the original context are stretched by `factor`, short ones stay, and those between
        # are blended (Dubey et al. 2024; the formula is that of Meta's llama-models).
        turns = scaling["original_max_position_embeddings"] * frequencies / (2 * math.pi)
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        blend = ((turns - low) / (high - low)).clamp(0, 1)
        frequencies = (1 - blend) * frequencies / scaling["factor"] + blend * frequencies
    angles = positions.to(wide)[:, None] * frequencies  # (L, D / 2)
    angles = torch.cat((angles, angles), dim=-1)[:, None, :]
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate the pairs (x[d], x[d + D/2]) of x (B, L, H, D): Hugging Face's order, where the paper pairs neighbours."""
    first, second = x.chunk(2, dim=-1)
    return (x * cos + torch.cat((-second, first), dim=-1) * sin).to(x.dtype)


def resize_rows(weight: torch.Tensor, rows: int) -> torch.Tensor:
    """The first `rows` rows of a matrix, followed by rows of zeros where it has fewer."""
    if rows == len(weight):
        return weight
    resized = weight.new_empty(rows, weight.shape[1])
    resized[: len(weight)] = weight[:rows]
    resized[len(weight) :] = 0
    return resized


WEIGHT_FILES = (
    "model.safetensors",
    "pytorch_model.bin",
)  # in the order in which they are looked for


def index_of(file: Path) -> Path:
    return file.with_name(file.name + ".index.json")


def read_config(path) -> dict:
    """The parsed config.json of a directory. Raises ValueError that names what is missing or broken."""
    path = Path(path)
    if not path.is_dir():
        raise ValueError(
            f"{path}: no such directory; a model is a directory with config.json and its weights"
        )
    try:
        hf = json.loads((path / "config.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(
            f"{path}: no config.json there; a model directory has one beside its weights"
        ) from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}/config.json: not JSON ({error})") from None
    if not isinstance(hf, dict):
        raise ValueError(f"{path}/config.json: expected an object, found {type(hf).__name__}")
    return hf


def read_checkpoint(path) -> tuple[dict, dict[str, torch.Tensor]]:
    """The parsed config.json of a directory, and its weights: those of model.safetensors, else of pytorch_model.bin, each
    whole or in the shards that an index beside it lists.

    The files are mapped, not read: a weight takes memory of its own only once it is written to or converted.
    Raises ValueError that names the file that is missing or broken.
    """
    path, hf = Path(path), read_config(path)
    whole = next(
        (
            path / name
            for name in WEIGHT_FILES
            for found in (path / name, index_of(path / name))
            if found.exists()
        ),
        None,
    )
    if whole is None:
        raise ValueError(f"{path}: neither {' nor '.join(WEIGHT_FILES)} there, whole or in shards")
    files = [whole]
    if not whole.exists():
        try:
            shards = json.loads(index_of(whole).read_text(encoding="utf-8"))["weight_map"].values()
            files = [path / name for name in sorted(set(shards))]
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(
                f"{index_of(whole)}: expected an object with a weight_map ({type(error).__name__}: {error})"
            ) from None
    if whole.suffix == ".safetensors":
        try:
            from safetensors.torch import load_file as load
        except ImportError:
            raise ValueError(
                f"{path}: reading its safetensors needs `pip install -r requirements-hf.txt`"
            ) from None
    else:

        def load(file):  # files of PyTorch before 1.6 are no zip archives, and cannot be mapped
            return torch.load(
                file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file)
            )

    weights = {}
    for file in files:
        try:
            weights |= load(file)
        except Exception as error:  # each library has its own kinds of exception for a cut, missing or foreign file
            reason = f"{type(error).__name__}: {error}".splitlines()
            raise ValueError(f"{file}: cannot be read as weights ({reason[0]})") from None
    if not all(
        isinstance(name, str)
        and torch.is_tensor(weight)
        and weight.layout == torch.strided
        and not weight.is_meta
        for name, weight in weights.items()
    ):
        raise ValueError(
            f"{files[0]}: expected a dictionary of names and tensors, found something else"
        )
    return hf, weights
