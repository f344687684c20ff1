"""What a training run will take, before anything is loaded: parameters, memory per rank, time per step.

    python train.py --dry_run [flags]                              at the speed of a torch.mm on this machine
    python train.py --dry_run --flops 4e14 [flags]                 at a given FLOP/s
    torchrun --nproc_per_node=8 train.py --dry_run [flags]         for 8 ranks

The model is made of fake tensors, which have shapes and no memory (`torch._subclasses.FakeTensorMode`), and train.py's own forward
and backward pass run on them, while every tensor's bytes are counted from when an operation returns it until nothing
holds it any more. So there is no formula of a family, layout or dtype here that could be wrong; arithmetic is what parts of
the states a rank holds (Rajbhandari et al. 2020, ZeRO) and what FSDP2 gathers at a time.

Not counted: what Python, PyTorch and CUDA take without a model, NCCL's buffers, gaps between blocks of memory, and a kernel's
own workspace. The kernels are those of a CPU; communication takes no time here.
"""

import math
import time
import weakref
from contextlib import contextmanager, nullcontext
from unittest import mock

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from model import GPT, GPTConfig, read_config
from rm import RewardModel
from train import collate, micro_batches

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

aten = torch.ops.aten
FLOP = flop_registry | {  # attention is counted in full, also where a causal kernel leaves half of it out
    aten._scaled_dot_product_flash_attention_for_cpu: flop_registry[aten._scaled_dot_product_flash_attention],
    aten._scaled_dot_product_flash_attention_for_cpu_backward: flop_registry[aten._scaled_dot_product_flash_attention_backward],
}


class Meter(TorchDispatchMode):
    """Counts the bytes of the tensors that operations return, each storage once and while it lives, and their FLOP.

    `peak` is the largest sum, with the gradients of parameters; `activations` the largest one without them, in bytes.
    """

    def __init__(self, parameters):
        super().__init__()
        self.sizes, self.live, self.gradients, self.peak, self.activations, self.flop = weakref.WeakKeyDictionary(), 0, 0, 0, 0, 0
        for parameter in parameters:
            storage = local(parameter).untyped_storage()
            self.sizes[storage] = [storage.nbytes()]  # written to or viewed, it is still no activation
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
        self.peak, self.activations = max(self.peak, self.live), max(self.activations, self.live - self.gradients)
        return out

    def __enter__(self):
        resize_ = torch.UntypedStorage.resize_  # no operation, and FSDP2 frees what it has gathered by it

        def counted(storage, size):
            resize_(storage, size)
            self.add(storage)

        self.patch = mock.patch.object(torch.UntypedStorage, "resize_", counted)
        self.patch.start()
        return super().__enter__()

    def __exit__(self, *exception):
        self.patch.stop()
        return super().__exit__(*exception)


def local(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's part of a tensor that FSDP2 has sharded; any other one as it is."""
    return getattr(tensor, "_local_tensor", tensor)


def make_model(args) -> RewardModel:
    """The model that the flags ask for, on whatever device is set; of a model directory only config.json is read.

    A pad id that no config.json names is a new one, as with most tokenizers. Raises ValueError that names the file or flag.
    """
    pad_id = args.pad_id
    if args.model_name_or_path:
        hf = read_config(args.model_name_or_path)
        try:
            config = GPTConfig.from_hf(hf)
        except ValueError as error:
            raise ValueError(f"{args.model_name_or_path}/config.json: {error}") from None
        if args.max_seq_len > config.n_positions:
            raise ValueError(f"--max_seq_len: found {args.max_seq_len}; {args.model_name_or_path} has {config.n_positions} positions, "
                             "so give at most that")
        if pad_id is None:
            pad_id = config.token_ids.get("pad_token_id")
            pad_id = config.vocab_size if pad_id is None or pad_id < 0 else pad_id
        config.vocab_size = max(config.vocab_size, pad_id + 1)
    else:
        config = GPTConfig(args.model_type, vocab_size=args.vocab_size, n_positions=args.max_seq_len, n_layer=args.n_layer,
                           n_head=args.n_head, n_embd=args.n_embd)
    config.dropout = args.dropout
    model = RewardModel(GPT(config), pad_id or 0)
    model.backbone.gradient_checkpointing = args.gradient_checkpointing
    if args.lora_dim:
        from extras import lora

        lora.add(model, args.lora_dim, args.lora_module_name, args.only_optimize_lora)
    return model


def assumed_step(args) -> list[list[list[int]]]:
    """A rank's comparisons of one step: pairs of --max_seq_len tokens whose first half is shared. Real texts are mostly shorter."""
    shared = args.max_seq_len // 2
    pair = [[1] * shared + [i] * (args.max_seq_len - shared) for i in (2, 3)]
    return [pair] * (args.per_device_train_batch_size * args.gradient_accumulation_steps)


def run_largest(model: RewardModel, groups: list, args) -> tuple[Meter, int, int, int]:
    """Forward and backward pass of the largest micro-batch of a step, on fake tensors.

    Returns what it took, its tokens, the tokens of the step, and the number of micro-batches.
    """
    if args.layout == "padded":  # its loss reads values, which fake tensors don't have, and takes as much as this mean
        model.forward = lambda *inputs: {"loss": model.token_rewards(*inputs).mean()}
    meter, batches = Meter(model.parameters()), micro_batches(groups, args.layout, args.micro_batch_tokens)
    batches = [collate([groups[i] for i in batch], model, args.layout, "cpu") for batch in batches]
    inputs, tokens = max(batches, key=lambda batch: batch[1])
    with meter:
        # Without autocast's cache: every weight is used once, and FSDP could not give up a copy that the cache holds.
        with torch.autocast("cpu", DTYPES[args.dtype], enabled=args.dtype != "fp32", cache_enabled=False):
            loss = model(*inputs)["loss"]
        loss.backward()
    return meter, tokens, sum(batch[1] for batch in batches), len(batches)


def shard(model: RewardModel, mesh, zero_stage: int):
    """FSDP2: every block is a group, and so is the rest. At stage 2 what is gathered stays until the backward pass."""
    for module in (*model.backbone.blocks, model):
        fully_shard(module, mesh=mesh, reshard_after_forward=zero_stage == 3)


@contextmanager
def ranks(world_size: int):
    """A mesh of so many ranks, of which this is the first and the others are not there."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world_size)
    try:
        yield init_device_mesh("cpu", (world_size,))
    finally:
        dist.destroy_process_group()


def estimate(args, world_size: int, groups: list | None = None) -> dict:
    """What a step takes on each of `world_size` ranks. groups: a rank's comparisons of the step (None: `assumed_step`).

    Returns numbers of parameters (`parameters`, `trained`); bytes: `weights`, `gradients` and `optimizer` in float32, `activations` (with
    them the weights that FSDP2 gathers), their `peak` on the device, less than the sum where gradients come as activations
    go, and those that `--offload` keeps on the `host`; and of a step `tokens`, `micro_batches` and `flop` of a rank.
    Raises ValueError that names the file or flag.
    """
    groups = groups or assumed_step(args)
    sharded = args.zero_stage and (world_size > 1 or args.offload)
    with ranks(world_size) if sharded else nullcontext() as mesh, FakeTensorMode():
        model = make_model(args)
        result = {"parameters": sum(parameter.numel() for parameter in model.parameters()),
                  "trained": sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)}
        if sharded:
            shard(model, mesh, args.zero_stage)
        weights = sum(local(parameter).nbytes for parameter in model.parameters())
        gradients = sum(local(parameter).nbytes for parameter in model.parameters() if parameter.requires_grad)
        meter, tokens, step_tokens, count = run_largest(model, groups, args)
    result |= {"weights": weights, "gradients": gradients, "optimizer": 2 * gradients, "activations": meter.activations, "host": 0,
               "tokens": step_tokens, "micro_batches": count, "flop": meter.flop * step_tokens / tokens}
    states = weights + 3 * gradients
    if sharded and args.offload:
        result |= {"host": states, "peak": meter.activations}
    elif count > 1 or world_size > 1 and not sharded:  # gradients of the micro-batch before, or DistributedDataParallel's buckets
        result["peak"] = states + meter.activations
    else:
        result["peak"] = states - gradients + meter.peak
    return result


def measured_flops(dtype: torch.dtype) -> float:
    """FLOP/s of the best of some products of two matrices of 2048 x 2048, on a GPU if there is one."""
    device, best = "cuda" if torch.cuda.is_available() else "cpu", math.inf
    a = torch.randn(2048, 2048, device=device).to(dtype)
    for _ in range(4):
        start = time.perf_counter()
        torch.mm(a, a)[0, 0].item()  # reading it waits for the GPU
        best = min(best, time.perf_counter() - start)
    return 2 * 2048**3 / best


def report(args, world_size: int) -> str:
    """The estimate as text, for `train.py --dry_run`. Raises ValueError that names the file or flag."""
    e = estimate(args, world_size)
    flops = args.flops or measured_flops(DTYPES[args.dtype])
    pairs = args.per_device_train_batch_size * args.gradient_accumulation_steps
    return "\n".join([
        f"{e['parameters']:,} parameters, {e['trained']:,} of them trained; {world_size} rank{'s' * (world_size > 1)}",
        f"a step: {pairs} pairs a rank, assumed to be of {args.max_seq_len} tokens and to share the first half; {args.layout}, these are "
        f"{e['tokens']:,} tokens in {e['micro_batches']} micro-batch{'es' * (e['micro_batches'] > 1)}",
        "memory per rank, GB:",
        *(f"  {name:12}{e[name] / 1e9:10.3f}" for name in ("weights", "gradients", "optimizer", "activations")),
        f"  {'peak':12}{e['peak'] / 1e9:10.3f}" + (f", and {e['host'] / 1e9:.3f} in the CPU's memory" if e["host"] else ""),
        f"time per step: {e['flop'] / flops:.3g} s for {e['flop']:.3g} FLOP a rank at {flops:.3g} FLOP/s "
        f"({'given' if args.flops else 'torch.mm on this machine; a step reaches less'})"
        + ("; communication is not counted" if world_size > 1 else ""),
    ])
