"""What a training run will take, before anything is loaded: parameters, memory per rank, time per step.

    python train.py --dry_run [flags]                              at the speed of a torch.mm on this machine
    python train.py --dry_run --flops 4e14 [flags]                 at a given FLOP/s
    WORLD_SIZE=64 python train.py --dry_run [flags]                for 64 ranks

The model is made of fake tensors, which have shapes and no memory, and its own forward and backward pass run on them, under FSDP2
with ranks that are not there, while every tensor's bytes are counted from when an operation returns it until nothing holds it
any more. So no formula of a family, layout, dtype or ZeRO stage (Rajbhandari et al. 2020) can be wrong here: there is none.

Not counted: what Python, PyTorch and CUDA take without a model, NCCL's buffers, gaps between blocks of memory, and a kernel's
own workspace. The operations are those of a CPU. Communication takes no time here. Evaluating and saving are not looked at.
"""

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
from parts.huggingface import read_config
from rm import RewardModel
from train import (
    DTYPES,
    Process,
    check_positions,
    collate,
    distribute,
    divide,
    half_precision,
    set_up,
)

aten = torch.ops.aten
FLOP = (
    flop_registry
    | {  # attention is counted in full, also where a causal kernel leaves half of it out
        aten._scaled_dot_product_flash_attention_for_cpu: flop_registry[
            aten._scaled_dot_product_flash_attention
        ],
        aten._scaled_dot_product_flash_attention_for_cpu_backward: flop_registry[
            aten._scaled_dot_product_flash_attention_backward
        ],
    }
)


class Meter(TorchDispatchMode):
    """Counts the bytes of the tensors that operations return, each storage once and while it lives, and their FLOP.

    `peak` is the largest sum, with the gradients of parameters; `activations` the largest one without them, in bytes.
    """

    def __init__(self, parameters):
        super().__init__()
        self.sizes, self.live, self.gradients, self.peak, self.activations, self.flop = (
            weakref.WeakKeyDictionary(),
            0,
            0,
            0,
            0,
            0,
        )
        for parameter in parameters:
            storage = local(parameter).untyped_storage()
            self.sizes[storage] = [
                storage.nbytes()
            ]  # written to or viewed, it is still no activation
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(self.add_gradient)

    def add_gradient(self, parameter):
        self.gradients += local(parameter.grad).nbytes

    def add(self, storage):
        """Count a storage that is new, or has another size than before."""
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
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket in FLOP:
            self.flop += FLOP[func.overloadpacket](*args, **(kwargs or {}), out_val=out)
        for tensor in tree_leaves(out):
            if torch.is_tensor(tensor):
                self.add(tensor.untyped_storage())
        self.peak, self.activations = (
            max(self.peak, self.live),
            max(self.activations, self.live - self.gradients),
        )
        return out


def local(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's part of a tensor that FSDP2 has sharded; any other one as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def make_model(args) -> RewardModel:
    """The model that the flags ask for, on whatever device is set; of a model directory only config.json is read.

    A pad id that no config.json names is a new one, as with most tokenizers. Raises ValueError that names the file or flag.
    """
    pad_id = args.pad_id
    if args.model_name_or_path:
        config = GPTConfig.from_hf(read_config(args.model_name_or_path), args.model_name_or_path)
        check_positions(config, args)
        if pad_id is None:
            pad_id = config.token_ids.get("pad_token_id")
            pad_id = config.vocab_size if pad_id is None or pad_id < 0 else pad_id
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
    model = RewardModel(GPT(config), pad_id or 0)
    set_up(model, args)
    return model


def assumed_step(args) -> list[Tokenized]:
    """A rank's comparisons of one step: pairs of --max_seq_len tokens whose first half is shared. Real texts are mostly shorter."""
    shared = args.max_seq_len // 2
    pair = [[1] * shared + [i] * (args.max_seq_len - shared) for i in (2, 3)]
    return [Tokenized(pair)] * (args.per_device_train_batch_size * args.gradient_accumulation_steps)


def run_largest(model: RewardModel, groups: list, args) -> tuple[Meter, int, int, int]:
    """Forward and backward pass of the largest micro-batch of a step, on fake tensors.

    Returns what it took, its tokens, the tokens of the step, and the number of micro-batches.
    """
    if (
        args.layout == "padded"
    ):  # its loss reads values, which fake tensors don't have, and takes as much as this mean
        model.forward = lambda ids, mask, margins: {"loss": model.token_rewards(ids, mask).mean()}
    meter, process, resize_ = Meter(model.parameters()), Process(), torch.UntypedStorage.resize_
    chunks = divide(groups, args.micro_batch_tokens, args, process, model.longest_tail)
    batches = [
        collate([groups[i] for i in chunk], model, args.layout, process.device) for chunk in chunks
    ]
    inputs, tokens = max(batches, key=lambda batch: batch[1])
    if args.layout == "packed":
        inputs[0].margins = None  # 0, too, and no values to read

    def resize_and_count(storage, size):
        resize_(storage, size)
        meter.add(storage)

    # FSDP2 frees what it has gathered by resizing it, which is no operation that a TorchDispatchMode sees.
    with meter, mock.patch.object(torch.UntypedStorage, "resize_", resize_and_count):
        with half_precision(args, process):
            loss = model(*inputs)["loss"]
        loss.backward()
    return meter, tokens, sum(batch[1] for batch in batches), len(batches)


@contextmanager
def ranks(world_size: int):
    """A process group of so many ranks, of which this is the first and the others are not there."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world_size)
    try:
        yield
    finally:
        dist.destroy_process_group()


def estimate(args, world_size: int, groups: list | None = None) -> dict:
    """What a step takes on each of `world_size` ranks. groups: a rank's comparisons of the step (None: `assumed_step`).

    Returns numbers of parameters (`parameters`, `trained`); bytes: `weights`, `gradients` and `optimizer` in float32, `activations` (with
    them what FSDP2 gathers), their `peak` on the device, which is less than the sum where gradients come as activations
    go, and what `--offload` keeps on the `host`; and of a step of a rank `tokens`, `micro_batches` and `flop`.
    Raises ValueError that names the file or flag.
    """
    groups, sharded = groups or assumed_step(args), args.zero_stage > 0
    with ranks(world_size) if sharded else nullcontext():
        with FakeTensorMode() as fake:
            model = make_model(args)
        parameters = [parameter.numel() for parameter in model.parameters()]
        trained = [parameter.numel() for parameter in model.parameters() if parameter.requires_grad]
        if sharded:
            distribute(model, args, Process(world_size=world_size))
        weights = sum(local(parameter).nbytes for parameter in model.parameters())
        gradients = sum(
            local(parameter).nbytes for parameter in model.parameters() if parameter.requires_grad
        )
        with fake:
            meter, tokens, step_tokens, count = run_largest(model, groups, args)
    states = weights + 3 * gradients  # with AdamW's two moments
    if args.offload:
        host, peak = states, meter.activations
    elif (
        count > 1 or world_size > 1 and not sharded
    ):  # there are gradients from the start: of another micro-batch, or in buckets
        host, peak = 0, states + meter.activations
    else:
        host, peak = 0, states - gradients + meter.peak
    return {
        "parameters": sum(parameters),
        "trained": sum(trained),
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


def measured_flops(dtype: torch.dtype) -> float:
    """FLOP/s of torch.mm, on a GPU if there is one: the best of three products of square matrices as large as take 0.05 s."""
    device, n, seconds = "cuda" if torch.cuda.is_available() else "cpu", 128, 0.0
    while seconds < 0.05 and n < 2**13:
        n *= 2
        a, times = torch.randn(n, n, device=device).to(dtype), []
        for _ in range(3):
            start = time.perf_counter()
            torch.mm(a, a)[0, 0].item()  # reading it waits for the GPU
            times.append(time.perf_counter() - start)
        seconds = min(times)
    return 2 * n**3 / seconds


def report(args, world_size: int) -> str:
    """The estimate as text, for `train.py --dry_run`. Raises ValueError that names the file or flag."""
    e = estimate(args, world_size)
    flops = args.flops or measured_flops(DTYPES[args.dtype])
    pairs = args.per_device_train_batch_size * args.gradient_accumulation_steps
    return "\n".join(
        [
            f"{e['parameters']:,} parameters, {e['trained']:,} of them trained; {world_size} rank{'s' * (world_size > 1)}",
            f"a step: {pairs} pair{'s' * (pairs > 1)} a rank, assumed to be of {args.max_seq_len} tokens and to share the first half; "
            f"{args.layout}, these are {e['tokens']:,} tokens in {e['micro_batches']} micro-batch{'es' * (e['micro_batches'] > 1)}",
            "memory per rank, GB:",
            *(
                f"  {name:12}{e[name] / 1e9:10.3f}"
                for name in ("weights", "gradients", "optimizer", "activations")
            ),
            f"  {'peak':12}{e['peak'] / 1e9:10.3f}"
            + (f", and {e['host'] / 1e9:.3f} in the CPU's memory" if e["host"] else ""),
            f"time per step: {e['flop'] / flops:.3g} s for {e['flop']:.3g} FLOP a rank at {flops:.3g} FLOP/s "
            f"({'given' if args.flops else 'torch.mm on this machine; a step reaches less'}); the optimizer and communication are not counted",
        ]
    )
