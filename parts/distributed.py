"""Processes: how they meet and leave, which rank computes on what, sharded weights.

The loop that all ranks run, and DistributedDataParallel, which averages their gradients, are in
train.py.
"""

import functools
import operator
import os
import secrets
import sys
import time
import traceback
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import timedelta
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard
from tqdm import tqdm

from parts.guards import one_line
from parts.memory import full_memory, memory_line
from parts.packed import packed_size

# Tokens that an evaluation on a CPU computes on at once, at most. On the built-in data four times
# as many take a quarter longer: the numbers of a layer are then larger than the caches.
CPU_TOKENS = 4096
ROOM = {  # where memory is full: what takes less of it
    "GPU's": (
        "give fewer --micro_batch_tokens, or --gradient_checkpointing, or a --zero_stage; in an "
        "evaluation a smaller --per_device_eval_batch_size"
    ),
    "machine's": (
        "give fewer --micro_batch_tokens, a smaller --max_seq_len, --gradient_checkpointing, or a "
        "smaller model, in an evaluation a smaller --per_device_eval_batch_size; --dry_run says "
        "what the flags take"
    ),
}
PATIENCE = timedelta(days=7)  # for ranks that prepare data, or read or write files

# --------------------------------------------------------------------------------------------------
# This process


@dataclass
class Process:
    """This process among those that torchrun started, or alone."""

    rank: int = 0
    world_size: int = 1
    device: torch.device = torch.device("cpu")
    patient_group: dist.ProcessGroup | None = None  # of all ranks, with PATIENCE as its time-out

    @classmethod
    def start(cls, is_sharded: bool, timeout: float) -> "Process":
        """Find this process's device and join the others; sharding needs a group even for one.

        Raises ValueError where this machine has fewer GPUs than ranks.
        """
        device = cls.device
        if torch.cuda.is_available():
            device = torch.device("cuda", own_gpu(torch.cuda.device_count()))
            torch.cuda.set_device(device)
        if "RANK" not in os.environ and not is_sharded:
            return cls(device=device)
        rank, world_size = meet(device, timeout)
        patient_group = dist.new_group(backend="gloo", timeout=PATIENCE)
        return cls(rank, world_size, device, patient_group)

    def wait(self):
        """Wait until all ranks are here."""
        if self.world_size > 1:
            dist.barrier()

    def wait_patiently(self):
        """Wait until all ranks are here, where some may take longer than --process_timeout.

        They prepare data, or read or write files. A rank that ends is noticed at once.
        """
        if self.world_size == 1:
            return
        waiting = dist.barrier(self.patient_group, async_op=True)
        while not waiting.is_completed():  # an interrupt is answered meanwhile
            time.sleep(0.01)
        waiting.wait()

    def print(self, text: str):
        """Print one line, on rank 0, beside a progress bar if there is one."""
        if self.rank == 0:
            tqdm.write(one_line(text))

    def bar(self, steps: Iterable | None, **options) -> tqdm:
        """Show progress through `steps`, on rank 0. None: the caller says how far it is."""
        return tqdm(steps, disable=self.rank != 0, **options)

    def at_most(self, tokens: int) -> int:
        """Return `tokens`, or on a CPU CPU_TOKENS if these are fewer."""
        return min(tokens, CPU_TOKENS) if self.device.type == "cpu" else tokens

    def gradient_scaler(self, enabled: bool, offload: bool) -> torch.amp.GradScaler:
        """Make the scaler of a loss in fp16, with its scale in the memory where gradients lie.

        offload: gradients lie in the CPU's memory. A scale on the GPU would be copied there without
            waiting, and read before it has arrived.
        """
        device = torch.device("cpu") if offload else self.device
        scaler = torch.amp.GradScaler(device.type, enabled=enabled)
        scaler.scale(torch.zeros((), device=device))  # the first tensor says where the scale lies
        return scaler

    def sum(self, values: list[float]) -> list[float]:
        """Add every number up over the ranks. A process alone copies nothing to its device."""
        if self.world_size == 1:
            return [float(value) for value in values]
        values = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(values)
        return values.tolist()

    def join(self, *values) -> list:
        """Concatenate each list, or add each number, of all ranks. Slower than `sum`."""
        ranks = [values] * self.world_size
        if self.world_size > 1:
            dist.all_gather_object(ranks, values)
        return [functools.reduce(operator.add, column) for column in zip(*ranks)]

    def broadcast(self, value):
        """Return rank 0's value on every rank."""
        return self.join([value])[0][0]


# --------------------------------------------------------------------------------------------------
# Which rank computes on which comparisons


class Size(NamedTuple):
    """The size of a comparison. A batch computes on (sum of rows) x (largest length) tokens.

    Padded, a row is a row. Packed, every token counts as a row of length 1, so that the rule holds.
    """

    rows: int
    length: int
    responses: int  # a padded micro-batch holds comparisons with equally many; packed: 0 for all

    @property
    def tokens(self) -> int:
        return self.rows * self.length


def size_of(texts: list[list[int]], layout: str, longest_tail: int | None) -> Size:
    """Measure a comparison, K token lists, in the layout "packed" or "padded" (rows of pairs)."""
    if layout == "packed":
        return Size(packed_size(texts, longest_tail), 1, 0)
    count = len(texts)
    return Size(count * (count - 1), max(map(len, texts)), count)


def share_of(
    batch: list,
    layout: str,
    longest_tail: int | None,
    budget: int,
    process: Process,
    is_sharded: bool,
) -> list[list]:
    """Take this rank's comparisons of a batch, in micro-batches of at most `budget` tokens.

    batch: the comparisons of all ranks, each with its token lists in `sequences`.
    Returns at least one micro-batch; with sharded weights as many as every other rank has, because
    ranks wait for each other in each micro-batch. So a micro-batch may be empty.
    """
    sizes = [size_of(comparison.sequences, layout, longest_tail) for comparison in batch]
    shares = split_over_ranks(sizes, process.world_size)
    ranks = [cut_into_micro_batches(share, sizes, budget) for share in shares]
    own = ranks[process.rank]
    count = 1
    if is_sharded:
        count = max(map(len, ranks))
    empty = [[]] * (count - len(own))
    return [[batch[i] for i in indices] for indices in own + empty]


def split_over_ranks(sizes: list[Size], world_size: int) -> list[list[int]]:
    """List for each rank the indices of its comparisons.

    The largest comparison goes first, each to the rank that has the fewest tokens.
    """
    tokens = [0] * world_size
    shares = [[] for _ in range(world_size)]
    for i in sorted(range(len(sizes)), key=lambda i: -sizes[i].tokens):
        rank = tokens.index(min(tokens))
        shares[rank].append(i)
        tokens[rank] += sizes[i].tokens
    return [sorted(share) for share in shares]


def cut_into_micro_batches(share: list[int], sizes: list[Size], budget: int) -> list[list[int]]:
    """Cut comparisons into micro-batches of at most `budget` tokens; a larger one stands alone.

    The comparisons of a padded micro-batch have similar lengths and equally many responses. So its
    loss, the mean over its pairs, is also the mean over its n comparisons, and n / batch size is
    its weight in the loss of the batch.
    """
    micro_batches = []
    rows, longest, responses = 0, 0, None
    # Packed comparisons are equal in length and responses here, so they keep their order.
    for i in sorted(share, key=lambda i: (sizes[i].responses, sizes[i].length)):
        size = sizes[i]
        rows += size.rows
        longest = max(longest, size.length)
        if not micro_batches or rows * longest > budget or size.responses != responses:
            micro_batches.append([])
            rows, longest, responses = size
        micro_batches[-1].append(i)
    return micro_batches


# --------------------------------------------------------------------------------------------------
# Sharded weights (FSDP2)


def shard(model, blocks, process: Process, reshard: bool, offload: bool):
    """Shard the weights of `model` over the ranks, in place: ZeRO (Rajbhandari et al. 2020).

    blocks: modules whose weights are gathered together, one after the other; `model` takes what
        they leave: embeddings, norm and head.
    reshard: whether gathered weights are freed between forward and backward (stage 3), or kept (2).
    offload: whether weights, gradients and optimizer states lie in the CPU's memory.
    """
    mesh = init_device_mesh(process.device.type, (process.world_size,))
    options = {"mesh": mesh, "reshard_after_forward": reshard}
    if offload:
        options["offload_policy"] = CPUOffloadPolicy(pin_memory=process.device.type == "cuda")
    for module in (*blocks, model):
        fully_shard(module, **options)


def whole_state(model) -> dict[str, torch.Tensor]:
    """Gather a state dict, of a sharded or plain model: on rank 0 all weights, on the CPU."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    return get_model_state_dict(model, options=options)


# --------------------------------------------------------------------------------------------------
# How processes meet and leave


def own_gpu(count: int) -> int:
    """Return the number of this rank's GPU on this machine, which has `count`.

    Raises ValueError where torchrun has started more ranks here.
    """
    number = int(os.environ.get("LOCAL_RANK", 0))
    ranks = max(number + 1, int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    if ranks > count:
        raise ValueError(
            f"--nproc_per_node: found {ranks} ranks on this machine, which has {count} GPUs "
            "(CUDA_VISIBLE_DEVICES counts); give at most that"
        )
    return number


def meet(device: torch.device, timeout: float) -> tuple[int, int]:
    """Join the processes that torchrun started, or a group of one. Returns (rank, world size).

    timeout: seconds after which processes stop waiting for each other.
    """
    limit = timedelta(seconds=timeout)
    store, rank, world_size = dist.HashStore(), 0, 1
    if "RANK" in os.environ:
        store, rank, world_size = next(dist.rendezvous("env://", timeout=limit))
        store.set_timeout(limit)
        store = dist.PrefixStore(agree_on_name(store, rank, world_size, timeout), store)
    backend = "gloo"
    if device.type == "cuda":
        backend = "cpu:gloo,cuda:nccl"
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=limit)
    return rank, world_size


def agree_on_name(store: dist.Store, rank: int, world_size: int, seconds: float) -> str:
    """Agree on a name for this meeting, the same on all ranks, within `seconds`.

    After a restart, torchrun's store still has the addresses of the processes before (PyTorch issue
    135712); under a new name nobody finds those. Rank 0 answers all greetings, old ones too.
    """
    mine = secrets.token_hex(8)
    if rank:
        store.set(f"greeting of {rank}", mine)
        name = store.get(f"answer to {mine}").decode()
        store.set(f"{rank} in {name}", "")
        return name
    absent = set(range(1, world_size))
    end = time.monotonic() + seconds
    while absent and time.monotonic() < end:
        for other in absent:
            greeting = store.get(f"greeting of {other}").decode()
            store.set(f"answer to {greeting}", mine)
        absent = {other for other in absent if not store.check([f"{other} in {mine}"])}
        time.sleep(0.01)
    return mine


def lost_process(error: BaseException) -> bool:
    """Tell whether an error means that another process did not answer.

    NCCL has exceptions of its own for a lost process, gloo has not.
    """
    if isinstance(error, dist.DistError):
        return True
    signs = ("gloo", "Connection", "Timed out", "timeout")
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in signs)


def leave(complaint: str | None):
    """End this process: status 1 and the complaint on standard error, or status 0.

    In a process group it ends without cleaning up. An orderly end would wait for processes that are
    gone. It could also hang: gloo's thread needs Python's lock to free its last tensors, while the
    destructor of the process group holds the lock and waits for the thread.
    """
    if dist.is_initialized():
        if complaint:
            print(complaint, file=sys.stderr)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(complaint is not None)
    if complaint:
        sys.exit(complaint)


def complaint_about(error: BaseException, timeout: float) -> str:
    """Say in a line what ended the run, and what to do; a traceback where it is a bug.

    timeout: --process_timeout, seconds.
    """
    if isinstance(error, KeyboardInterrupt):
        return "train.py: interrupted before the first step; nothing was trained"
    memory = full_memory(error)
    if memory:
        return f"train.py: error: {memory_line(error, ROOM[memory])}"
    if isinstance(error, (ValueError, OSError)):
        return f"train.py: error: {one_line(error)}"
    first_line = str(error).partition("\n")[0]
    if type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
        reason = " ".join(str(error).partition("\n\n")[0].split())
        return (
            f"train.py: error: --compile: torch.compile failed ({reason}); it needs a C++ compiler "
            "on a CPU and triton on a GPU; without the flag the same run goes on"
        )
    if lost_process(error):
        return (
            f"train.py: error: rank {os.environ.get('RANK', 0)} waited in vain for another "
            f"process, which ended or did not answer within --process_timeout {timeout:g} s "
            f"({first_line}); the same command with --resume continues from the last checkpoint, "
            "with torchrun's --max-restarts by itself"
        )
    return "".join(traceback.format_exception(error))
