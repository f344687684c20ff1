"""A GPT backbone: token ids in, last hidden states out (no language-model head).

Families and how their checkpoints spell things: parts/huggingface.py. How a packed batch lies in
memory and attends: parts/packed.py.

Notable features:
- seven families are one class; what distinguishes them is data, the fields of `GPTConfig`
- attention through `F.scaled_dot_product_attention`
- grouped-query attention, rotary positions, RMSNorm, SwiGLU (llama, mistral; with biases on q, k
  and v: qwen2; with norms on q and k: qwen3)
- learned positions, LayerNorm, GELU (gpt2)
- attention and MLP side by side, rotary positions on a part of each head (gpt_neox)
- norms before the sublayers, or after them with a narrower embedding (OPT-350m, DeepSpeed-Chat's
  own reward model)
- rewards are read at padding, so padding queries see every real key of their row and no padding
  key, as in `transformers`
- padded rows, or packed comparisons (parts/packed.py): only attention knows which

Shapes in comments: B rows, L positions, T tokens of a packed batch, H heads, D width of a head,
C width of the hidden state.
"""

import math
from dataclasses import dataclass, field
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from parts import guards, huggingface
from parts.packed import PackedAttention, PackedBatch

ACTIVATIONS = {
    "gelu": F.gelu,
    "gelu_fast": partial(F.gelu, approximate="tanh"),  # its constant has ten digits there
    "gelu_new": partial(F.gelu, approximate="tanh"),
    "gelu_pytorch_tanh": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
    "silu": F.silu,
}


@dataclass
class GPTConfig:
    """The shape of a backbone. A None takes the family's value, or follows from others.

    Raises ValueError where the fields do not fit together.
    """

    model_type: str = "gpt2"  # a family
    vocab_size: int = 50257  # rows of the token embedding
    n_positions: int = 1024  # longest row
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768  # C, width of the hidden state
    n_kv_head: int | None = None  # fewer than n_head: grouped-query attention
    head_dim: int | None = None  # D
    n_inner: int | None = None  # width of the MLP
    norm: str | None = None  # "layernorm" or "rmsnorm"
    norm_eps: float | None = None
    activation: str | None = None
    gated: bool | None = None  # SwiGLU: activation(gate) * up
    qkv_bias: bool | None = None  # biases of the linear layers
    attn_out_bias: bool | None = None
    mlp_bias: bool | None = None
    qk_norm: bool | None = None  # norms on each head of q and k
    parallel_residual: bool | None = None  # attention and MLP read the same x
    rope_theta: float | None = None  # base of the rotary frequencies; None: learned positions
    rope_scaling: dict | None = None  # Llama 3's, under Hugging Face's keys
    rotary_fraction: float | None = None  # part of a head that rotary positions turn
    sliding_window: int | None = None  # tokens that a layer attends to at most; None: all
    pre_norm: bool | None = None  # norms before the sublayers and at the end; else after sublayers
    embed_dim: int | None = None  # width of embedding and output, projected if not n_embd
    position_offset: int | None = None  # row of the position table for position 0 (OPT: 2)
    dropout: float = 0.0  # after the embedding, on attention weights, before each residual sum
    init_std: float | None = None  # of fresh weights; None: 0.02 * sqrt(768 / n_embd)
    token_ids: dict = field(default_factory=dict)  # bos, eos, pad, under config.json's keys
    window_keys: dict = field(default_factory=dict)  # config.json's: which layers have the window
    other_keys: dict = field(default_factory=dict)  # config.json's that no computation here reads

    def __post_init__(self):
        for name, value in huggingface.family_of(self.model_type).variant.items():
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
        if self.rope_theta is not None and self.rotary_fraction == 1 and self.head_dim % 2:
            raise ValueError(f"rotary positions need an even head width, not {self.head_dim}")
        if self.n_inner is None:
            self.n_inner = 4 * self.n_embd
            if self.gated:  # three matrices, not two: 8/3 keeps the number of parameters
                self.n_inner = 8 * math.ceil(self.n_embd / 3)
        self.init_std = self.init_std or 0.02 * math.sqrt(768 / self.n_embd)
        if self.activation not in ACTIVATIONS:
            raise ValueError(
                f"activation {self.activation!r} is not known; known are {', '.join(ACTIVATIONS)}"
            )

    @classmethod
    def from_hf(cls, hf: dict, source) -> "GPTConfig":
        """Make the config that a parsed config.json describes; errors name its directory."""
        try:
            return cls(**huggingface.config_fields(hf))
        except ValueError as error:
            raise ValueError(f"{source}/config.json: {error}") from None

    def to_hf(self) -> dict:
        """Return the content of a config.json from which `transformers` makes the same backbone."""
        return huggingface.config_to_hf(vars(self))


class Block(nn.Module):
    """A transformer layer: x + attention(norm(x)), then x + mlp(norm(x)).

    Without pre_norm: norm(x + attention(x)), then norm(x + mlp(x)).
    With parallel_residual: x + attention(norm(x)) + mlp(norm(x)), each with a norm of its own.
    """

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        c = config.n_embd
        q_width = config.n_head * config.head_dim
        kv_width = config.n_kv_head * config.head_dim
        self.attn_norm = make_norm(config, c)
        self.q = nn.Linear(c, q_width, bias=config.qkv_bias)
        self.k = nn.Linear(c, kv_width, bias=config.qkv_bias)
        self.v = nn.Linear(c, kv_width, bias=config.qkv_bias)
        self.q_norm = make_norm(config, config.head_dim) if config.qk_norm else None
        self.k_norm = make_norm(config, config.head_dim) if config.qk_norm else None
        self.attn_out = nn.Linear(q_width, c, bias=config.attn_out_bias)
        self.mlp_norm = make_norm(config, c)
        self.mlp_gate = nn.Linear(c, config.n_inner, bias=config.mlp_bias) if config.gated else None
        self.mlp_in = nn.Linear(c, config.n_inner, bias=config.mlp_bias)
        self.mlp_out = nn.Linear(config.n_inner, c, bias=config.mlp_bias)

    def forward(self, x, attend, rotary, n_keys: int | None, first: int):
        """Transform x, (B, L, C) or packed (T, C).

        attend: the attention of the layout. rotary: cos and sin of `rotary_tables`, or None.
        n_keys, first: of a packed x, the number of its rows that are attended to, and the first row
            that is computed, see `GPT.forward_packed`; a padded x is taken whole.
        """
        rows = from_row(x, first)  # those that are computed
        if not self.config.pre_norm:
            y = self.attention(x, attend, rotary, n_keys, first)
            x = self.attn_norm(rows + self.drop(y))
            return self.mlp_norm(x + self.drop(self.mlp(x)))
        y = self.attention(self.attn_norm(x), attend, rotary, n_keys, first)
        y = rows + self.drop(y)
        mlp_input = rows if self.config.parallel_residual else y
        return y + self.drop(self.mlp(self.mlp_norm(mlp_input)))

    def drop(self, x):
        return F.dropout(x, self.config.dropout, self.training)

    def attention(self, x, attend, rotary, n_keys, first):
        x = as_factor(x)
        context = x[:n_keys]
        x = from_row(x, first)
        q = self.heads(self.q(x))  # (..., H, D)
        k = self.heads(self.k(context))  # (..., H_kv, D)
        v = self.heads(self.v(context))
        if self.q_norm is not None:
            q = normalize_heads(self.q_norm, q)
            k = normalize_heads(self.k_norm, k)
        if rotary is not None:
            cos, sin = rotary
            q = rotate(q, cos[first:], sin[first:])
            k = rotate(k, cos[:n_keys], sin[:n_keys])
        dropout_p = self.config.dropout if self.training else 0.0
        return self.attn_out(attend(q, k, v, dropout_p).flatten(-2))

    def heads(self, x):
        return x.unflatten(-1, (-1, self.config.head_dim))

    def mlp(self, x):
        x = as_factor(x)
        activation = ACTIVATIONS[self.config.activation]
        if self.mlp_gate is None:
            return self.mlp_out(activation(self.mlp_in(x)))
        return self.mlp_out(activation(self.mlp_gate(x)) * self.mlp_in(x))


class GPT(nn.Module):
    """A decoder-only transformer without a head (Radford et al. 2019; Touvron et al. 2023)."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        self.gradient_checkpointing = False  # keep block inputs only; the backward pass recomputes
        self.embed = make_embedding(config.vocab_size, config.embed_dim)
        if config.rope_theta is None:
            rows = config.n_positions + config.position_offset
            self.pos_embed = make_embedding(rows, config.n_embd)
        self.project_in = self.project_out = None
        if config.embed_dim != config.n_embd:
            self.project_in = nn.Linear(config.embed_dim, config.n_embd, bias=False)
            self.project_out = nn.Linear(config.n_embd, config.embed_dim, bias=False)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.norm = make_norm(config, config.n_embd) if config.pre_norm else None
        if not self.embed.weight.is_meta:
            self.apply(self._init_weights)

    def _init_weights(self, module):
        """Initialize as GPT-2: normal with `init_std`, biases zero.

        Layers that write to the residual stream are scaled by 1 / sqrt(number of such layers).
        """
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=self.config.init_std)
        if getattr(module, "bias", None) is not None:
            nn.init.zeros_(module.bias)
        if isinstance(module, Block):  # apply() has visited its layers by now
            std = self.config.init_std / math.sqrt(2 * self.config.n_layer)
            for linear in (module.attn_out, module.mlp_out):
                nn.init.normal_(linear.weight, std=std)

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Compute last hidden states, after the final norm and OPT's output projection.

        input_ids: (B, L) int64. attention_mask: (B, L), 1 where a token may be attended to; None:
        everywhere. Returns (B, L, embed_dim). Values at left padding have no meaning. Positions are
        columns, at padding too; but OPT counts attended tokens from 0, and all padding has
        position -1. Raises ValueError for rows longer than `n_positions` or `sliding_window`, and
        for ids or a mask of another shape or kind.
        """
        guards.check_ids(input_ids)
        if attention_mask is not None:
            guards.check_mask(attention_mask, input_ids.shape)
        L = input_ids.shape[1]
        positions = torch.arange(L, device=input_ids.device)
        if self.config.position_offset and attention_mask is not None:
            positions = attention_mask.long().cumsum(1) * attention_mask.long() - 1  # (B, L)
        mask = None if attention_mask is None else causal_mask(attention_mask)
        return self.transform(input_ids, positions, L, partial(padded_attention, mask=mask))

    def forward_packed(self, batch: PackedBatch) -> torch.Tensor:
        """Compute last hidden states of branches and tails: (T - trunk tokens, embed_dim).

        No token attends to tails, which are padding and lie at the end. No reward of a trunk is
        read, so the last block computes the tokens behind the trunks alone.
        """
        positions = batch.positions
        n_text = batch.num_tokens - sum(batch.tails)
        if self.config.position_offset:
            positions = torch.cat((positions[:n_text], torch.full_like(positions[n_text:], -1)))
        attend = PackedAttention(batch, scaled_dot_product)
        n_trunk = sum(batch.trunks)
        return self.transform(batch.input_ids, positions, batch.length, attend, n_text, n_trunk)

    def transform(self, input_ids, positions, length: int, attend, n_keys=None, n_unread=0):
        """Compute last hidden states of either layout; `attend` is the attention of the layout.

        length: tokens of the longest row. n_keys: tokens, the first ones, that are attended to;
        None: all. n_unread: tokens, the first ones, that the last block does not compute.
        """
        longest, limit = huggingface.longest_row(vars(self.config))
        if length > longest:
            raise ValueError(f"rows of {length} tokens, but the model has {limit}")
        x = self.embed(input_ids)
        rotary = None
        if self.project_in is not None:
            x = self.project_in(x)
        if self.config.rope_theta is None:
            x = x + self.pos_embed(positions + self.config.position_offset)
        else:
            rotary = rotary_tables(positions, self.config, x.dtype)
        x = F.dropout(x, self.config.dropout, self.training)
        for block in self.blocks:
            # Earlier blocks compute every token: the next block attends to trunks.
            first = n_unread if block is self.blocks[-1] else 0
            if self.gradient_checkpointing and self.training:
                x = checkpoint(block, x, attend, rotary, n_keys, first, use_reentrant=False)
            else:
                x = block(x, attend, rotary, n_keys, first)
        if self.norm is not None:
            x = self.norm(x)
        return x if self.project_out is None else self.project_out(x)

    @classmethod
    def from_pretrained(cls, path) -> "GPT":
        """Load the backbone of a Hugging Face directory (`read_checkpoint`), in float32.

        Raises ValueError that names the file and what is wrong with it.
        """
        hf, weights = huggingface.read_checkpoint(path)
        return cls.from_hf(hf, weights, source=path)

    @classmethod
    def from_hf(cls, hf: dict, weights: dict[str, torch.Tensor], source) -> "GPT":
        """Make a backbone of a parsed config.json and weights under Hugging Face's names."""
        config = GPTConfig.from_hf(hf, source)
        huggingface.check_sizes(vars(config), weights, source)
        # Shapes without memory: the checkpoint's tensors become the parameters.
        with torch.device("meta"):
            model = cls(config)
        shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
        state = huggingface.state_dict_to_ours(hf, weights, shapes, source)
        model.load_state_dict(state, assign=True)
        return model

    def to_hf(self) -> dict[str, torch.Tensor]:
        """Copy the weights, under their Hugging Face names: the inverse of `from_hf`."""
        return huggingface.state_dict_to_hf(vars(self.config), self.state_dict())

    def linear_layers(self) -> list[tuple[str, nn.Module, str]]:
        """List the linear layers of the blocks: DeepSpeed-Chat's name, block, attribute of it."""
        layers = []
        for i, block in enumerate(self.blocks):
            for child, module in block.named_children():
                if isinstance(module, nn.Linear):
                    name = huggingface.module_name(self.config.model_type, f"blocks.{i}.{child}")
                    layers.append((huggingface.DEEPSPEED_CHAT + name, block, child))
        return layers

    def resize_embedding(self, rows: int):
        """Make the token embedding `rows` rows long. New rows are zeros."""
        self.embed.weight = nn.Parameter(huggingface.resize_rows(self.embed.weight.detach(), rows))
        self.embed.num_embeddings = self.config.vocab_size = rows


def make_embedding(rows: int, width: int) -> nn.Embedding:
    # On the meta device, nn.Embedding's own initialization would import much of PyTorch.
    return nn.Embedding.from_pretrained(torch.empty(rows, width), freeze=False)


def make_norm(config: GPTConfig, width: int) -> nn.Module:
    if config.norm == "rmsnorm":
        return nn.RMSNorm(width, eps=config.norm_eps)
    return nn.LayerNorm(width, eps=config.norm_eps)


def as_factor(x: torch.Tensor) -> torch.Tensor:
    """Cast x as autocast does in front of a matrix product: once for all products that take x."""
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    return x


def from_row(x: torch.Tensor, first: int) -> torch.Tensor:
    """Return x[first:], or x itself for 0, as even x[0:] would be copied in the backward pass."""
    return x[first:] if first else x


def normalize_heads(norm: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Apply `norm` to each head of x (..., H, D), in the norm's dtype: autocast has halved x's."""
    return norm(x.to(norm.weight.dtype)).to(x.dtype)


def scaled_dot_product(q, k, v, dropout_p: float, **options) -> torch.Tensor:
    """Attend from q (B, L, H, D) to k and v (B, M, H_kv, D). Returns (B, L, H, D).

    options: attn_mask or is_causal, as PyTorch's function takes them.
    """
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    options["enable_gqa"] = q.shape[1] != k.shape[1]
    y = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout_p, **options)
    return y.transpose(1, 2)


def padded_attention(q, k, v, dropout_p: float, mask) -> torch.Tensor:
    """Attend within rows: q, k, v (B, L, ...). mask: from `causal_mask`; None: causal alone."""
    return scaled_dot_product(q, k, v, dropout_p, attn_mask=mask, is_causal=mask is None)


def causal_mask(attention_mask: torch.Tensor) -> torch.Tensor:
    """Let position i attend to j <= i where the mask is 1 at j: (B, L) -> (B, 1, L, L) bool."""
    L = attention_mask.shape[1]
    causal = torch.ones(L, L, dtype=torch.bool, device=attention_mask.device).tril()
    mask = causal & attention_mask.bool()[:, None, None, :]
    # At left padding a query has no key; a softmax over nothing is NaN, and NaN spreads. It attends
    # to itself instead.
    return mask | (~mask.any(-1, keepdim=True) & torch.eye(L, dtype=torch.bool, device=mask.device))


def rotary_tables(positions: torch.Tensor, config: GPTConfig, dtype: torch.dtype):
    """Return cos and sin of position * frequency (Su et al. 2021, RoFormer).

    Each is (L, 1, R), to broadcast over heads. R is how much of a head is turned; where the
    fraction gives an odd number, it is rounded up, as in `transformers`.
    """
    wide = torch.promote_types(dtype, torch.float32)
    width = int(config.head_dim * config.rotary_fraction)
    exponents = torch.arange(0, width, 2, device=positions.device).to(wide)
    frequencies = 1.0 / config.rope_theta ** (exponents / width)
    if scaling := config.rope_scaling:
        # Llama 3.1: wavelengths beyond the original context are stretched by `factor`, short ones
        # stay, and those between are blended (Dubey et al. 2024; the formula is that of Meta's
        # llama-models).
        turns = scaling["original_max_position_embeddings"] * frequencies / (2 * math.pi)
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        blend = ((turns - low) / (high - low)).clamp(0, 1)
        frequencies = (1 - blend) * frequencies / scaling["factor"] + blend * frequencies
    angles = positions.to(wide)[:, None] * frequencies  # (L, R / 2)
    angles = torch.cat((angles, angles), dim=-1)[:, None, :]
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate the pairs (x[d], x[d + R/2]) of x (B, L, H, D); the last D - R pass through.

    cos, sin: (L, 1, R). The order is Hugging Face's; the paper pairs neighbours.
    """
    width = cos.shape[-1]
    if width < x.shape[-1]:
        return torch.cat((rotate(x[..., :width], cos, sin), x[..., width:]), dim=-1)
    first, second = x.chunk(2, dim=-1)
    return (x * cos + torch.cat((-second, first), dim=-1) * sin).to(x.dtype)
