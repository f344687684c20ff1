"""Estimate what a training run takes before anything is loaded: parameters, memory, time per step.

    python train.py --dry_run [flags]                   at the speed of torch.mm on this machine
    python train.py --dry_run --flops 4e14 [flags]      at a given FLOP/s
    WORLD_SIZE=64 python train.py --dry_run [flags]     for 64 ranks

The model is made of fake tensors, which have shapes and no memory. Its own forward and backward
pass run on them, under FSDP2 with ranks that do not exist, while every tensor's bytes are counted
from when an operation returns it until nothing holds it any more. So no formula of a family,
layout, dtype or ZeRO stage (Rajbhandari et al. 2020) can be wrong here: there is none.

This file has no model and no loop of its own: those are in rm.py and train.py. It does not count
what Python, PyTorch and CUDA take without a model, NCCL's buffers, gaps between blocks of memory,
and a kernel's own workspace. The operations are those of a CPU, communication takes no time, and
evaluating and saving are left out.
"""

import os
import time
import weakref
from contextlib import contextmanager, nullcontext
from unittest import mock

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from data import Tokenized
from model import GPT, GPTConfig
from parts.distributed import Process, complaint_about, leave, share_of
from parts.files import show_output
from parts.flags import objective_of, parse_flags
from parts.guards import counted
from parts.huggingface import FAMILIES, check_pad_id, read_config
from rm import LOSSES, RewardModel
from train import DTYPES, autocast, check_positions, collate, distribute, set_up

# --------------------------------------------------------------------------------------------------
# Counting


def attention_flop(query, key, *rest, **options) -> int:
    """Count the two products of attention, in full even where a causal kernel skips half of them.

    query: (B, H, L, D). key: (B, H_kv, M, D); grouped heads take no fewer products. The counter of
    PyTorch 2.11 refuses grouped heads.
    """
    batch, heads, length, width = query.shape
    return 4 * batch * heads * length * key.shape[2] * width


def attention_backward_flop(gradient, query, key, *rest, **options) -> int:
    """Count the five products of the backward pass, which computes the scores again."""
    return attention_flop(query, key) * 5 // 2


FLOP = dict(flop_registry)
attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
attention_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
FLOP[attention] = attention_flop
FLOP[attention_backward] = attention_backward_flop


class Meter(TorchDispatchMode):
    """Count the bytes of tensors that operations return, each storage once, and their FLOP.

    `peak` is the largest sum of bytes that live at once, with the gradients of parameters;
    `activations` is the largest sum without them.
    """

    def __init__(self, parameters):
        super().__init__()
        self.sizes = weakref.WeakKeyDictionary()  # storage: [bytes]
        self.live = 0
        self.gradients = 0
        self.peak = 0
        self.activations = 0
        self.flop = 0
        for parameter in parameters:
            # A parameter that is viewed or written to is still no activation.
            storage = local(parameter).untyped_storage()
            self.sizes[storage] = [storage.nbytes()]
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(self.add_gradient)

    def add_gradient(self, parameter):
        self.gradients += local(parameter.grad).nbytes

    def add(self, storage):
        """Count a storage that is new, or has changed its size."""
        if storage not in self.sizes:
            self.sizes[storage] = [0]
            weakref.finalize(storage, self.resize, self.sizes[storage], 0)
        self.resize(self.sizes[storage], storage.nbytes())

    def resize(self, size: list[int], new: int):
        self.live += new - size[0]
        size[0] = new

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.prim.device.default:  # most of the calls, and they compute nothing
            return args[0].fake_device
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if func.overloadpacket in FLOP:
            self.flop += FLOP[func.overloadpacket](*args, **kwargs, out_val=out)
        for tensor in tree_leaves(out):
            if torch.is_tensor(tensor):
                self.add(tensor.untyped_storage())
        self.peak = max(self.peak, self.live)
        self.activations = max(self.activations, self.live - self.gradients)
        return out


def local(tensor: torch.Tensor) -> torch.Tensor:
    """Return this rank's part of a tensor that FSDP2 has sharded; any other tensor as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


# --------------------------------------------------------------------------------------------------
# The estimate


def make_model(args) -> RewardModel:
    """Make the model that the flags ask for, reading only config.json of a model directory.

    The model lies on the device that is set. Where config.json has no pad id, the pad id is a new
    one, as with most tokenizers. Raises ValueError that names the file or flag.
    """
    directory, pad_id = args.model_name_or_path, args.pad_id
    if directory:
        config = GPTConfig.from_hf(read_config(directory), directory)
        check_positions(config, args.max_seq_len, directory)
        if pad_id is None:
            pad_id = config.token_ids.get("pad_token_id")
        if pad_id is None or pad_id < 0:
            pad_id = config.vocab_size
        check_pad_id(pad_id, config.vocab_size, directory)
        config.vocab_size = max(config.vocab_size, pad_id + 1)
    else:
        config = GPTConfig(
            args.model_type,
            vocab_size=args.vocab_size,
            n_positions=args.max_seq_len,
            n_layer=args.n_layer,
            n_head=args.n_head,
            n_embd=args.n_embd,
        )
    model = RewardModel(GPT(config), pad_id or 0, **objective_of(args))
    set_up(model, args)
    return model


def assumed_step(args) -> list[Tokenized]:
    """Make up a rank's comparisons of one step: pairs of --max_seq_len tokens, half of them shared.

    Real texts are mostly shorter.
    """
    shared = args.max_seq_len // 2
    pair = [[1] * shared + [token] * (args.max_seq_len - shared) for token in (2, 3)]
    return [Tokenized(pair)] * (args.per_device_train_batch_size * args.gradient_accumulation_steps)


def run_largest(model: RewardModel, comparisons: list, args) -> tuple[Meter, int, int, int]:
    """Run forward and backward pass of the largest micro-batch of a step, on fake tensors.

    Returns the meter, the tokens of the micro-batch and of the step, the number of micro-batches.
    """
    process = Process()
    micro_batches = share_of(
        comparisons, args.layout, model.longest_tail, args.micro_batch_tokens, process, False
    )
    batches = [collate(part, model, args.layout, process.device) for part in micro_batches]
    inputs, tokens = max(batches, key=lambda batch: batch[1])
    if args.layout == "padded":
        # The padded loss reads values, which fake tensors lack; a mean takes as much memory.
        model.forward = lambda ids, mask, *_: {"loss": model.token_rewards(ids, mask).mean()}
    meter = Meter(model.parameters())
    resize_ = torch.UntypedStorage.resize_

    def resize_and_count(storage, size):
        resize_(storage, size)
        meter.add(storage)

    # FSDP2 frees gathered weights by resizing them, an operation that a TorchDispatchMode misses.
    with meter, mock.patch.object(torch.UntypedStorage, "resize_", resize_and_count):
        with autocast(args.dtype, process.device):
            loss = model(*inputs)["loss"]
        loss.backward()
    return meter, tokens, sum(count for _, count in batches), len(batches)


@contextmanager
def ranks(world_size: int):
    """Open a process group in which this is the first rank and the others do not exist."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world_size)
    try:
        yield
    finally:
        dist.destroy_process_group()


def estimate(args, world_size: int, comparisons: list | None = None) -> dict:
    """Estimate what a step takes on each of `world_size` ranks.

    comparisons: a rank's comparisons of the step; None: `assumed_step`.
    Returns numbers of parameters (`parameters`, `trained`); in bytes `weights`, `gradients` and
    `optimizer`, all float32, `activations` (with what FSDP2 gathers), their `peak` on the device,
    less than the sum where gradients come as activations go, and what `--offload` keeps on the
    `host`; and `tokens`, `micro_batches` and `flop` of a rank's step.
    Raises ValueError that names the file or flag.
    """
    comparisons = comparisons or assumed_step(args)
    is_sharded = args.zero_stage > 0
    with ranks(world_size) if is_sharded else nullcontext():
        with FakeTensorMode() as fake:
            model = make_model(args)
        if is_sharded:
            distribute(model, args.zero_stage, args.offload, Process(world_size=world_size))
        parameters = list(model.parameters())
        trained = [parameter for parameter in parameters if parameter.requires_grad]
        weights = sum(local(parameter).nbytes for parameter in parameters)
        gradients = sum(local(parameter).nbytes for parameter in trained)
        with fake:
            meter, tokens, step_tokens, count = run_largest(model, comparisons, args)
    host = 0
    peak = weights + 2 * gradients + meter.peak  # 2: AdamW's two moments
    # Gradients lie there from the start: another micro-batch's, or buckets of all of them.
    if count > 1 or (world_size > 1 and not is_sharded):
        peak = weights + 3 * gradients + meter.activations
    if args.offload:
        host = weights + 3 * gradients
        peak = meter.activations
    return {
        "parameters": sum(parameter.numel() for parameter in parameters),
        "trained": sum(parameter.numel() for parameter in trained),
        "weights": weights,
        "gradients": gradients,
        "optimizer": 2 * gradients,
        "activations": meter.activations,
        "peak": peak,
        "host": host,
        "tokens": step_tokens,
        "micro_batches": count,
        "flop": meter.flop * step_tokens / tokens,
    }


# --------------------------------------------------------------------------------------------------
# The report


def measured_flops(dtype: str) -> float:
    """Measure the FLOP/s of torch.mm, on a GPU if there is one: the best of three products.

    The matrices are square, and large enough to take 0.05 s.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    n, seconds = 128, 0.0
    while seconds < 0.05 and n < 2**13:
        n *= 2
        a = torch.randn(n, n, device=device).to(DTYPES[dtype])
        times = []
        for _ in range(3):
            start = time.perf_counter()
            torch.mm(a, a)[0, 0].item()  # reading it waits for the GPU
            times.append(time.perf_counter() - start)
        seconds = min(times)
    return 2 * n**3 / seconds


def report(args, world_size: int) -> str:
    """Write the estimate as text. Raises ValueError that names the file or flag."""
    found = estimate(args, world_size)
    flops, source = args.flops, "given"
    if not flops:
        flops = measured_flops(args.dtype)
        source = "torch.mm on this machine; a step reaches less"
    pairs = args.per_device_train_batch_size * args.gradient_accumulation_steps
    micro_batches = counted(found["micro_batches"], "micro-batch", "micro-batches")
    parameters = f"{found['parameters']:,} parameters, {found['trained']:,} of them trained"
    step = (
        f"a step: {counted(pairs, 'pair')} a rank, assumed to be of {args.max_seq_len} "
        f"tokens and to share the first half; {args.layout}, these are {found['tokens']:,} tokens "
        f"in {micro_batches}"
    )
    lines = [f"{parameters}; {counted(world_size, 'rank')}", step, "memory per rank, GB:"]
    for name in ("weights", "gradients", "optimizer", "activations", "peak"):
        lines.append(f"  {name:12}{found[name] / 1e9:10.3f}")
    if found["host"]:
        lines[-1] += f", and {found['host'] / 1e9:.3f} in the CPU's memory"
    lines.append(
        f"time per step: {found['flop'] / flops:.3g} s for {found['flop']:.3g} FLOP a rank at "
        f"{flops:.3g} FLOP/s ({source}); the optimizer and communication are not counted"
    )
    return "\n".join(lines)


def main():
    show_output()
    args = parse_flags(list(FAMILIES), LOSSES)
    complaint = None
    try:
        if os.environ.get("RANK", "0") == "0":
            print(report(args, int(os.environ.get("WORLD_SIZE", "1"))))
    except (Exception, KeyboardInterrupt) as error:
        complaint = complaint_about(error, args.process_timeout)
    leave(complaint)


if __name__ == "__main__":
    main()
