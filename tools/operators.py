"""Count what a training step asks of the host: operators, and milliseconds of Python and dispatch.

    python -m tools.operators [--pairs 16 64 128] [--shapes OPT-350m "llama 1B"]

On a GPU a step of a small batch waits for the host, which starts one operator after the other. This
program counts them without a GPU, along the path that a GPU takes: bf16 by autocast, and a stand-in
for flash attention that counts as one operator. Lengths are those of hh-harmless. It measures no
step of a GPU: tools/bench.py does.
"""

import argparse
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass, replace
from unittest import mock

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import varlen
from torch.utils._python_dispatch import TorchDispatchMode

from model import GPT, GPTConfig
from parts.flags import number
from parts.packed import plan_varlen
from rm import RewardModel
from tools import bench

ROUNDS = 5  # of which the fastest counts: other programs may disturb the rest


# --------------------------------------------------------------------------------------------------
# The path of a GPU, on a CPU


@torch.library.custom_op("tools::flash_attention", mutates_args=())
def flash_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Stand in for flash attention: one operator, whose numbers are not attention's."""
    return torch.empty_like(q)


@flash_attention.register_fake
def _(q, k, v):
    return torch.empty_like(q)


@torch.library.custom_op("tools::flash_attention_backward", mutates_args=())
def flash_attention_backward(
    gradient: torch.Tensor, k: torch.Tensor, v: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Stand in for the gradient of flash attention: one operator."""
    return torch.empty_like(gradient), torch.empty_like(k), torch.empty_like(v)


@flash_attention_backward.register_fake
def _(gradient, k, v):
    return torch.empty_like(gradient), torch.empty_like(k), torch.empty_like(v)


def keep_keys(ctx, inputs, output):
    ctx.save_for_backward(*inputs[1:])


def backward(ctx, gradient):
    return flash_attention_backward(gradient, *ctx.saved_tensors)


flash_attention.register_autograd(backward, setup_context=keep_keys)


def varlen_attn(query, key, value, *lengths, window_size=(-1, -1), enable_gqa=False):
    return flash_attention(query, key, value)


@contextmanager
def path_of_a_gpu():
    """Attend by the stand-in, as in half precision on a GPU."""
    with mock.patch.object(varlen, "varlen_attn", varlen_attn):
        with mock.patch("parts.packed.can_use_varlen", lambda q, dropout_p: True):
            yield


class OnGPU(bench.Ours):
    """A step whose batches are planned as `PackedBatch.to` plans them for a GPU."""

    def collate(self, groups):
        (batch,), tokens = super().collate(groups)
        return (replace(batch, calls=plan_varlen(batch)),), tokens


# --------------------------------------------------------------------------------------------------
# Operators


class Count(TorchDispatchMode):
    """Count the operators that compute or copy; views cost a GPU nothing."""

    def __init__(self):
        super().__init__()
        self.names = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        is_query = func.namespace == "prim"
        if not (is_query or func.is_view or func is torch.ops.aten.detach.default):
            self.names[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


@dataclass
class Operators:
    """Operators of a step without its optimizer: of the forward and the backward pass."""

    forward: int
    backward: int
    casts: int  # of both: changes of the dtype

    @property
    def all(self) -> int:
        return self.forward + self.backward


def count_operators(model: RewardModel, groups: list) -> Operators:
    """Count the operators of a step of a model on fake tensors, in bf16."""
    ours = OnGPU(model, "packed", "bf16")
    inputs, _ = ours.collate(groups)
    with Count() as forward:
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
            loss = ours.run(inputs)["loss"]
    with Count() as backward:
        loss.backward()
        # On a GPU, clipping takes all gradients in a few operators.
        torch.nn.utils.clip_grad_norm_(ours.parameters, 1.0, foreach=True)
    names = forward.names + backward.names
    return Operators(forward.names.total(), backward.names.total(), names["_to_copy"])


def fake_model(shape: dict) -> RewardModel:
    """Make a model of a published shape without memory; to be called in a FakeTensorMode."""
    return RewardModel(GPT(GPTConfig.from_hf(shape, "tools/shapes.json")), pad_id=0)


# --------------------------------------------------------------------------------------------------
# Milliseconds of the host


def fastest(function, *arguments) -> float:
    """Measure the milliseconds of a call: the fastest of some."""
    function(*arguments)
    return 1e3 * min(bench.seconds(function, *arguments) for _ in range(ROUNDS))


@dataclass
class Host:
    """Milliseconds of the host in a step, without the optimizer."""

    pack: float  # to lay out a batch, to plan its attention and index its loss
    loss: float  # forward and backward pass of the loss alone
    dispatch: float  # both passes of a model whose tensors take no time to compute

    @property
    def all(self) -> float:
        return self.pack + self.dispatch


class GivenRewards(torch.nn.Module):
    """Stand in for a backbone whose hidden states, of width 1, are the rewards."""

    def __init__(self, config: GPTConfig, count: int):
        super().__init__()
        self.config = replace(config, embed_dim=1)
        self.rewards = torch.nn.Parameter(torch.randn(count, 1))

    def forward_packed(self, batch):
        return self.rewards


def host_milliseconds(config: GPTConfig, groups: list) -> Host:
    """Measure what a step of a model with these layers costs the host, on real lengths.

    The loss has all pairs' real regions. To dispatch, the model is narrow and its texts are a few
    tokens long, so that no kernel takes longer than its start.
    """
    wide = RewardModel(GPT(narrow(config)), pad_id=0)
    step = OnGPU(wide, "packed", "bf16")
    pack = fastest(step.collate, groups)
    (batch,), _ = step.collate(groups)
    rewards = GivenRewards(wide.backbone.config, sum(batch.branches) + sum(batch.tails))
    loss_alone = RewardModel(rewards, pad_id=0)

    def loss():
        loss_alone(batch)["loss"].backward()

    short = [[[1, 2, 3 + i] + [4] * i for i in range(2)] for _ in groups]
    inputs, _ = step.collate(short)

    def dispatch():
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
            step.run(inputs)["loss"].backward()
        step.clip()

    return Host(pack, fastest(loss), fastest(dispatch))


def narrow(config: GPTConfig) -> GPTConfig:
    """Return a config of the same layers and heads whose widths and vocabulary are small."""
    width = 8 * config.n_head
    narrowed = dict(n_embd=width, embed_dim=width, head_dim=8, n_inner=width)
    return replace(config, vocab_size=bench.VOCAB_SIZE, n_positions=bench.MAX_SEQ_LEN, **narrowed)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--pairs", type=number(int, 1), nargs="+", default=[16, 64, 128])
    parser.add_argument("--shapes", nargs="+", choices=list(bench.SHAPES), default=["OPT-350m"])
    args = parser.parse_args()
    torch.set_num_threads(1)
    heads = "operators", "forward", "backward", "casts", "host", "pack", "loss", "dispatch"
    bench.table_head("shape", "pairs", *heads)
    with path_of_a_gpu():
        for shape in args.shapes:
            for pairs in args.pairs:
                (groups,) = bench.random_batches(1, pairs)
                with FakeTensorMode(allow_non_fake_inputs=True):
                    model = fake_model(bench.SHAPES[shape])
                    found = count_operators(model, groups)
                host = host_milliseconds(model.backbone.config, groups)
                numbers = found.all, found.forward, found.backward, found.casts
                times = host.all, host.pack, host.loss, host.dispatch
                cells = [f"{number:,}" for number in numbers] + [f"{ms:.1f} ms" for ms in times]
                print(f"| {shape} | {pairs} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
