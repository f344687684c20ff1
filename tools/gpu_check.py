"""Find out what there is to know on a first GPU, in one command of at most 8 minutes.

    python -m tools.gpu_check [--budget 450] [--only facts,exact,...] [--skip ...] [--tiny]

Runs in the root of a checkout, or as a copy anywhere with PROJECT set to one. After every part it
writes gpu_check.json and gpu_check.txt into $OUT (gpu_out); a part that fails says so, and the next
one runs. --tiny makes everything small, to try this program on a CPU, where a stand-in replaces the
flash kernel. Models, batches and steps to measure are those of tools/bench.py.
"""

import argparse
import gc
import importlib.metadata
import inspect
import itertools
import json
import math
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from unittest import mock

ROOT = Path(os.environ.get("PROJECT") or Path.cwd()).resolve()
if not (ROOT / "train.py").exists():
    ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch
import torch.nn.functional as F
from torch.nn.attention import varlen

import rm
import train
from data import Tokenized
from model import GPT, Block, GPTConfig, rotate
from parts.flags import parse_flags
from parts.huggingface import FAMILIES
from parts.packed import PackedAttention, starts_of
from rm import LOSSES, RewardModel
from tools import bench, dry_run

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda", 0) if CUDA else torch.device("cpu")
KERNEL_DTYPE = torch.bfloat16 if CUDA else torch.float32
PEAK = 990e12  # FLOP/s of an H100 or H200 (SXM) in dense bf16, by the datasheet


@dataclass
class Job:
    """A program that runs beside the first parts."""

    process: subprocess.Popen
    log: Path
    out: Path  # --output_dir
    killed: int | None = None  # the step after which a worker was killed


@dataclass
class Check:
    """One run of this program: how it runs, and its findings so far."""

    tiny: bool
    budget: float  # seconds after which no further part begins
    out: Path
    found: dict = field(default_factory=dict)
    lines: list[str] = field(default_factory=list)
    jobs: dict[str, Job] = field(default_factory=dict)
    watcher: threading.Thread | None = None
    started: float = field(default_factory=time.perf_counter)
    where: Path = field(default_factory=lambda: Path(tempfile.mkdtemp(prefix="gpu_check")))

    def elapsed(self) -> float:
        return time.perf_counter() - self.started

    def say(self, text: str = ""):
        self.lines.append(text)
        print(text, flush=True)

    def save(self):
        result = {"argv": sys.argv, "seconds": self.elapsed(), "parts": self.found}
        (self.out / "gpu_check.json").write_text(json.dumps(result, indent=1, default=str))
        (self.out / "gpu_check.txt").write_text("\n".join(self.lines) + "\n")

    def failed(self, name: str, error: Exception) -> dict:
        """Say in a line that something failed. Returns its traceback, for gpu_check.json."""
        self.say(f"  {name:36s} FAILED {type(error).__name__}: {str(error)[:200]}")
        return {"failed": traceback.format_exc()[-1500:]}


# --------------------------------------------------------------------------------------------------
# Helpers


@torch.compiler.disable
def attend_by_the_book(q, k, v, q_starts, k_starts, max_q, max_k, window_size=(-1, -1)):
    """Compute what varlen_attn computes, one sequence after the other.

    The parameters are those of PyTorch 2.11, without `enable_gqa`.
    """
    group = q.shape[1] // k.shape[1]
    answers = []
    queries = itertools.pairwise(q_starts.tolist())
    keys = itertools.pairwise(k_starts.tolist())
    for (start, stop), (first, last) in zip(queries, keys):
        key, value = (x[first:last].repeat_interleave(group, dim=1) for x in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q[start:stop], key) / q.shape[-1] ** 0.5
        if window_size == (-1, 0):  # causal, aligned to the ends
            shift = scores.shape[2] - scores.shape[1]
            future = torch.ones_like(scores, dtype=torch.bool).triu(shift + 1)
            scores = scores.masked_fill(future, -math.inf)
        answers.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), value))
    return torch.cat(answers)


def varlen_options(heads: int, kv_heads: int) -> dict:
    """Tell varlen_attn of grouped heads where it asks; PyTorch 2.11 takes them as they are."""
    knows = "enable_gqa" in inspect.signature(varlen.varlen_attn).parameters
    return {"enable_gqa": True} if knows and heads != kv_heads else {}


def sync():
    if CUDA:
        torch.cuda.synchronize()


def free():
    gc.collect()
    if CUDA:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def peak_gb() -> float:
    return torch.cuda.max_memory_allocated() / 1e9 if CUDA else math.nan


def seconds(function: Callable, *arguments) -> float:
    """Time a call, until the GPU has done it."""

    def run():
        function(*arguments)
        sync()

    sync()
    return bench.seconds(run)


def error_of(found, expected) -> float:
    """Compute |found - expected| / |expected| in float64, infinite where it is not finite."""
    found, expected = (torch.as_tensor(x).detach().double().cpu() for x in (found, expected))
    value = ((found - expected).norm() / expected.norm().clamp_min(1e-300)).item()
    return value if math.isfinite(value) else math.inf


def config_of(shape: str, tiny: bool) -> GPTConfig:
    """Make the config of a real shape, "OPT-350m" or "TinyLlama 1.1B", or of a small family."""
    if shape in bench.SHAPES and not tiny:
        return GPTConfig.from_hf(bench.SHAPES[shape], shape)
    family = {"OPT-350m": "opt", "TinyLlama 1.1B": "llama"}.get(shape, shape)
    width = 32 if tiny else 256
    more = {"opt": {"embed_dim": width // 2, "pre_norm": False}, "llama": {"n_kv_head": 2}}
    more["qwen3"] = {"n_kv_head": 2}
    return GPTConfig(
        family,
        vocab_size=8000,
        n_positions=2048,
        n_layer=2 if tiny else 4,
        n_head=4,
        n_embd=width,
        init_std=0.08,
        **more.get(family, {}),
    )


def make_model(shape: str, tiny: bool, device=DEVICE) -> RewardModel:
    torch.manual_seed(0)
    config = config_of(shape, tiny)
    with torch.device(device):
        model = RewardModel(GPT(config), 1, int(config.model_type == "opt"))
    torch.nn.init.normal_(model.v_head.weight, std=0.02)
    return model


def batches_of(count: int, pairs: int, tiny: bool) -> list:
    if not tiny:
        return bench.random_batches(count, pairs)
    batches = bench.random_batches(count, 3)
    return [[[text[-40:] for text in group] for group in batch] for batch in batches]


# --------------------------------------------------------------------------------------------------
# A prototype of what could be faster: plans and indices made ahead, on another thread if need be;
# one loss over all regions; for OPT one call of attention a layer; blocks by torch.compile


class Prepared:
    """A packed batch with all that a step needs on the device: nothing is copied within the step.

    calls: for all blocks but the last, and for the last, attention calls as `block_forward` takes.
    """

    def __init__(self, groups: list, model: RewardModel):
        batch = model.pack(groups)
        self.groups = groups
        self.num_tokens = batch.num_tokens
        self.n_trunks = sum(batch.trunks)
        self.length = batch.length
        self.ids = on_device(batch.input_ids)
        if model.backbone.config.position_offset:
            batch.positions[batch.num_tokens - sum(batch.tails) :] = -1
        self.positions = on_device(batch.positions)
        attention = PackedAttention(batch, None)
        self.calls = []
        for with_trunks in (True, False):
            plan = attention.plan_varlen(with_trunks, "cpu")
            if len(plan) == 2 and max(batch.tails) == 1:
                plan = [joined(*plan)]
            calls = []
            for count, rows, (q_starts, k_starts, *longest), is_causal in plan:
                tensors = map(on_device, (rows, q_starts, k_starts))
                calls.append((count, *tensors, *longest, is_causal))
            self.calls.append(tuple(calls))
        self.regions = [on_device(tensor) for tensor in regions(model, batch)]

    def __len__(self) -> int:
        return len(self.groups)


def on_device(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.pin_memory().to(DEVICE, non_blocking=True) if CUDA else tensor


def joined(causal: tuple, full: tuple) -> tuple:
    """Join two calls of `plan_varlen`: a single query that sees all is causal, too."""
    starts = []
    for first, second in zip(causal[2][:2], full[2][:2]):
        starts.append(torch.cat((first, second[1:] + first[-1])))
    longest = map(max, causal[2][2:], full[2][2:])
    return causal[0] + full[0], torch.cat((causal[1], full[1])), (*starts, *longest), True


def regions(model: RewardModel, batch) -> list[torch.Tensor]:
    """List places of the chosen and the rejected rewards that the loss reads, and their weights.

    It is the loss of rm.py that reads: places stand for rewards.
    """
    chosen, rejected, counts = [], [], []

    def pair_loss(chosen_places, rejected_places, *rest):
        chosen.append(chosen_places)
        rejected.append(rejected_places)
        counts.append(len(chosen_places))
        return torch.zeros(())

    places = torch.arange(sum(batch.branches) + sum(batch.tails))
    with mock.patch.object(rm, "pair_loss", pair_loss):
        with mock.patch.object(RewardModel, "value", lambda self, hidden: places):
            with mock.patch.object(GPT, "forward_packed", lambda self, batch: places):
                model.forward_packed(batch)
    pairs = [math.comb(len(group), 2) for group in batch.token_groups]
    pairs = torch.tensor(pairs).repeat_interleave(torch.tensor(pairs))  # of a pair's comparison
    counts = torch.tensor(counts)
    weights = (1 / (counts * pairs * len(batch.token_groups))).repeat_interleave(counts)
    return [torch.cat(chosen), torch.cat(rejected), weights]


def block_forward(block, x, rotary, calls: tuple, read: int, options: dict):
    """Compute Block.forward with its attention in it; `read`: the first row that is read later.

    calls: number of queries, rows of keys, starts of queries and keys, longest of both, causal.
    """
    pre_norm = block.config.pre_norm
    y = block.attn_norm(x) if pre_norm else x
    if torch.is_autocast_enabled(x.device.type):
        y = y.to(torch.get_autocast_dtype(x.device.type))  # once, not for each of q, k and v
    q, k, v = block.q(y[read:]), block.k(y), block.v(y)
    q, k, v = (heads.unflatten(-1, (-1, block.config.head_dim)) for heads in (q, k, v))
    if rotary is not None:
        cos, sin = rotary
        q = rotate(q, cos[read:], sin[read:])
        k = rotate(k, cos, sin)
    queries, answers = [q], []
    if len(calls) > 1:
        queries = q.split([call[0] for call in calls])
    for query, (_, rows, *lengths, is_causal) in zip(queries, calls):
        pieces = query, k.index_select(0, rows), v.index_select(0, rows)
        window = (-1, 0) if is_causal else (-1, -1)
        answers.append(varlen.varlen_attn(*pieces, *lengths, window_size=window, **options))
    y = torch.cat(answers) if len(answers) > 1 else answers[0]
    x = x[read:] + block.attn_out(y.flatten(-2))
    x = x if pre_norm else block.attn_norm(x)
    x = x + block.mlp(block.mlp_norm(x) if pre_norm else x)
    return x if pre_norm else block.mlp_norm(x)


class Fast(bench.Ours):
    """The prototype's step. Loss and norm would be read a step later."""

    def __init__(self, model: RewardModel, dtype: str = "bf16", is_compiled: bool = False):
        super().__init__(model, "packed", dtype)
        config = model.backbone.config
        self.options = varlen_options(config.n_head, config.n_kv_head)
        self.block = torch.compile(block_forward, dynamic=True) if is_compiled else block_forward

    def collate(self, groups):
        prepared = groups if isinstance(groups, Prepared) else Prepared(groups, self.model)
        return prepared, prepared.num_tokens

    def run(self, prepared):
        def forward(block, x, calls, rotary, keys, rows):
            read = rows.start or 0  # 0: all blocks but the last
            return self.block(block, x, rotary, calls[read > 0], read, self.options)

        read = slice(prepared.n_trunks, None)
        with mock.patch.object(Block, "forward", forward):
            hidden = self.model.backbone.transform(
                prepared.ids, prepared.positions, prepared.length, prepared.calls, read=read
            )
        chosen, rejected, weights = prepared.regions
        rewards = self.model.value(hidden)
        margins = rewards.index_select(0, chosen) - rewards.index_select(0, rejected)
        return {"loss": -(F.logsigmoid(margins) * weights).sum()}

    def step(self, groups):
        _, tokens = self.forward_backward(groups)
        self.clip()
        self.update()
        return tokens


# --------------------------------------------------------------------------------------------------
# Facts, the kernel by itself, exactness


def facts(check: Check) -> dict:
    """The machine and its versions; how fast it multiplies, copies and launches."""
    found = {
        "python": sys.version,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cpu": platform.processor(),
        "cores": os.cpu_count(),
        "varlen_attn": str(inspect.signature(varlen.varlen_attn)),
    }
    for name in ("transformers", "numpy", "triton"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError as error:
            found[name] = repr(error)
    if CUDA:
        found["gpu"] = str(torch.cuda.get_device_properties(0))
        found["nccl"] = torch.cuda.nccl.version()
        found["cudnn"] = torch.backends.cudnn.version()
        query = "name,driver_version,clocks.sm,power.limit,memory.used"
        command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"]
        found["nvidia-smi"] = subprocess.run(command, capture_output=True, text=True).stdout
    for dtype in ("bf16", "fp32"):
        found[f"TFLOP/s {dtype}"] = dry_run.measured_flops(dtype) / 1e12
    a = torch.ones(2**29 if CUDA else 2**20, device=DEVICE)
    b = a.clone()
    found["copy TB/s, read and written"] = 2 * a.nbytes / seconds(b.copy_, a) / 1e12
    x = torch.zeros(1, device=DEVICE)
    seconds(x.add_, 1)
    start = time.perf_counter()
    for _ in range(2000):
        x.add_(1)
    found["microseconds of the CPU an add_"] = (time.perf_counter() - start) / 2000 * 1e6
    for name, value in found.items():
        check.say(f"  {name}: {value}")
    return found


SEQUENCES = {  # lengths of queries and keys
    "causal, fewer queries than keys": [(5, 5), (40, 200), (1, 17), (130, 131)],
    "full, single queries": [(1, 300), (1, 4), (1, 65)],
    "full": [(3, 9), (70, 200)],
}


def kernel(check: Check) -> dict:
    """varlen_attn by itself in bf16, beside float64: head widths, grouped heads, single queries."""
    found, errors = {}, []
    widths = (8,) if check.tiny else (64, 80, 128)
    for width, heads, name in itertools.product(widths, ((4, 4), (8, 2)), SEQUENCES):
        key = f"width {width}, heads {heads}, {name}"
        try:
            found[key] = kernel_errors(width, *heads, SEQUENCES[name], name.startswith("causal"))
            errors.append(found[key])
        except Exception as error:
            found[key] = check.failed(key, error)
    largest = [f"{max(column):.1e}" for column in zip(*errors)]
    bad = [key for key, value in found.items() if value in errors and max(value) > 0.02]
    check.say(f"  {len(found)} cases; largest error of output, dq, dk, dv: {largest}; bad: {bad}")
    return found


def kernel_errors(width: int, heads: int, kv_heads: int, lengths: list, is_causal: bool) -> list:
    """Compute the errors of output, dq, dk and dv."""
    torch.manual_seed(0)
    counts, key_counts = zip(*lengths)
    n, m = sum(counts), sum(key_counts)
    tensors = []
    for size, number in ((n, heads), (m, kv_heads), (m, kv_heads), (n, heads)):
        tensors.append(torch.randn(size, number, width).bfloat16().double())
    q_starts, longest = starts_of(counts, DEVICE)
    k_starts, longest_key = starts_of(key_counts, DEVICE)
    window = (-1, 0) if is_causal else (-1, -1)
    results = []
    for attend, device, dtype, options in (
        (attend_by_the_book, "cpu", torch.float64, {}),
        (varlen.varlen_attn, DEVICE, KERNEL_DTYPE, varlen_options(heads, kv_heads)),
    ):
        *leaves, gradient = (tensor.to(device, dtype) for tensor in tensors)
        leaves = [leaf.detach().requires_grad_() for leaf in leaves]
        starts = q_starts.to(device), k_starts.to(device)
        out = attend(*leaves, *starts, longest, longest_key, window_size=window, **options)
        results.append((out, *torch.autograd.grad(out, leaves, gradient)))
    expected, found = results
    return [error_of(a, b) for a, b in zip(found, expected)]


VARIANTS = ("packed", "padded", "masks", "checkpointing", "prototype", "compiled")


def variants(family: str, tiny: bool) -> Iterator[tuple[str, str]]:
    """Yield dtype and variant of every path, each of which the part `exact` takes by itself."""
    dtypes = ("fp32", "bf16") if tiny else ("fp32", "bf16", "fp16")
    for dtype, variant in itertools.product(dtypes, VARIANTS):
        if variant == "masks" and dtype == "fp32":  # it is the program's own choice
            continue
        if variant == "prototype" and dtype != "bf16" and CUDA:
            continue
        if variant == "compiled" and (family, dtype) != ("opt", "bf16"):
            continue
        if variant == "prototype" and family in ("qwen3", "gpt_neox"):  # its block has no such part
            continue
        yield dtype, variant


def numbers_of(contestant: bench.Ours, groups: list) -> dict[str, torch.Tensor]:
    """Compute loss, scores (the prototype has none), and all gradients as one vector."""
    contestant.model.zero_grad()
    inputs, _ = contestant.collate(groups)
    with train.autocast(contestant.dtype, contestant.device):
        numbers = contestant.run(inputs)
    numbers["loss"].backward()
    gradients = [parameter.grad.flatten().double().cpu() for parameter in contestant.parameters]
    return numbers | {"gradient": torch.cat(gradients)}


def exact(check: Check) -> dict:
    """Loss, scores and gradients of every path, beside the padded one in float64 on the CPU."""
    found = {}
    torch.set_num_threads(max(1, (os.cpu_count() or 2) // 2))
    (groups,) = batches_of(1, 10, check.tiny)
    for family in ("gpt2", "opt", "llama", "qwen3", "gpt_neox"):
        reference = make_model(family, check.tiny, "cpu").double()
        expected = numbers_of(bench.Ours(reference, "padded"), groups)
        model = make_model(family, check.tiny, "cpu").to(DEVICE)
        for dtype, variant in variants(family, check.tiny):
            key = f"{family} {dtype} {variant}"
            try:
                found[key] = errors_of_path(model, dtype, variant, groups, expected)
                listed = "  ".join(f"{name} {value:.1e}" for name, value in found[key].items())
                check.say(f"  {key:24s} {listed}")
            except Exception as error:
                found[key] = check.failed(key, error)
    return found


def errors_of_path(model: RewardModel, dtype: str, variant: str, groups, expected) -> dict:
    attend = PackedAttention.__call__  # the program's own choice
    if variant == "masks":
        attend = PackedAttention.with_masks
    elif dtype != "fp32" and not CUDA:

        def attend(self, q, k, v, dropout_p):
            return self.with_varlen(q, k, v)

    if variant in ("prototype", "compiled"):
        contestant = Fast(model, dtype, variant == "compiled")
    else:
        contestant = bench.Ours(model, "padded" if variant == "padded" else "packed", dtype)
    model.backbone.gradient_checkpointing = variant == "checkpointing"
    with mock.patch.object(PackedAttention, "__call__", attend):
        found = numbers_of(contestant, groups)
        again = numbers_of(contestant, groups)
    errors = {name: error_of(value, expected[name]) for name, value in found.items()}
    return errors | {"the same run again": error_of(again["gradient"], found["gradient"])}


# --------------------------------------------------------------------------------------------------
# Programs: runs of train.py, tests and estimates, started first, as they are no timings

KILLED = "nccl killed zero 3 bf16"  # a worker of it is killed, and torchrun starts it again
TRAININGS = {
    "cpu fp32": "",
    "gpu fp32": "",
    "gpu bf16": "--dtype bf16",
    "gpu bf16 padded": "--dtype bf16 --layout padded",
    "gpu fp16": "--dtype fp16",
    "gpu bf16 checkpointing": "--dtype bf16 --gradient_checkpointing",
    "nccl zero 2 bf16": "--dtype bf16 --zero_stage 2",
    "nccl zero 3 bf16": "--dtype bf16 --zero_stage 3",
    "nccl zero 3 offload bf16": "--dtype bf16 --zero_stage 3 --offload",
    "nccl zero 2 offload fp16": "--dtype fp16 --zero_stage 2 --offload",
    "nccl zero 0 bf16": "--dtype bf16",
    KILLED: "--dtype bf16 --zero_stage 3 --save_interval 10",
}
TINY = "--n_layer 2 --n_embd 32 --n_head 2 --max_seq_len 64 --per_device_train_batch_size 8"
TINY_TRAININGS = ("cpu fp32", "gpu bf16 padded", "nccl zero 3 bf16", KILLED)
TORCHRUN = "-m torch.distributed.run --standalone --nproc_per_node=1"
TESTS = "-m pytest -q -rs -p no:cacheprovider -k on_a_gpu test_train.py parts"
EQUAL = (
    (KILLED, "nccl zero 3 bf16"),
    ("gpu bf16", "gpu bf16 padded"),
    ("gpu bf16", "gpu bf16 checkpointing"),
    ("gpu bf16", "nccl zero 0 bf16"),
)


def start_jobs(check: Check):
    """Start all programs, and a thread that watches them."""
    estimates = [str(Path(__file__).resolve()), "--estimates", str(check.where / "estimates.json")]
    if check.tiny:
        estimates.append("--tiny")
    start_job(check, "estimates", estimates, sees_gpu=False)
    start_job(check, "pytest", TESTS.split())
    for name, flags in TRAININGS.items():
        flags = f"{flags} --max_steps 60 --eval_iters 4"
        if check.tiny:
            flags = f"{flags} --max_steps 6 {TINY}".replace("interval 10", "interval 2")
        if check.tiny and name not in TINY_TRAININGS:
            continue
        launcher = TORCHRUN.split() if name.startswith("nccl") else []
        if name == KILLED:
            launcher.append("--max-restarts=1")
        output_dir = ["--output_dir", str(check.where / name)]
        words = [*launcher, "train.py", *flags.split(), *output_dir]
        start_job(check, name, words, sees_gpu=name != "cpu fp32")
    limit = math.inf if check.tiny else 300
    check.watcher = threading.Thread(target=watch, args=(check.jobs, limit), daemon=True)
    check.watcher.start()
    if check.tiny:  # on few cores the other parts would keep the watcher from its work
        check.watcher.join()


def start_job(check: Check, name: str, words: list[str], sees_gpu: bool = True):
    log = (check.out if name == "pytest" else check.where) / f"log.{name}.txt"
    environment = {"XDG_CACHE_HOME": str(check.where / "cache"), "OMP_NUM_THREADS": "1"}
    if not sees_gpu:
        environment["CUDA_VISIBLE_DEVICES"] = ""
    process = subprocess.Popen(
        [sys.executable, *words],
        cwd=ROOT,
        env=os.environ | environment,
        stdout=log.open("w"),
        stderr=subprocess.STDOUT,
    )
    check.jobs[name] = Job(process, log, check.where / name)


def watch(jobs: dict[str, Job], limit: float):
    """Wait until all programs have ended, `limit` seconds at most; kill a worker meanwhile."""
    end = time.perf_counter() + limit
    while time.perf_counter() < end and any(job.process.poll() is None for job in jobs.values()):
        try:
            kill_worker(jobs[KILLED])
        except OSError:  # of a process that has just ended
            pass
        time.sleep(0.05)
    for job in jobs.values():
        if job.process.poll() is None:
            job.process.kill()
            job.process.wait()


def kill_worker(job: Job):
    """Kill the worker of a run that has a checkpoint and has gone on from there, once."""
    done = max((event["step"] for event in events_of(job.out)), default=0)
    saved = [int(path.name.removeprefix("step-")) for path in job.out.glob("checkpoints/step-*")]
    if job.killed or done <= min(saved, default=done):
        return
    for task in Path(f"/proc/{job.process.pid}/task").glob("*"):
        for child in (task / "children").read_text().split():
            if b"train.py" in Path(f"/proc/{child}/cmdline").read_bytes():
                os.kill(int(child), signal.SIGKILL)
                job.killed = done


def events_of(directory: Path) -> list[dict]:
    try:
        return [json.loads(row) for row in (directory / "metrics.jsonl").read_text().splitlines()]
    except (OSError, ValueError):
        return []


def programs(check: Check) -> dict:
    """train.py by itself and under torchrun; the tests that need a GPU."""
    check.watcher.join()
    found, curves = {}, {}
    for name in (*TRAININGS, "pytest"):
        if name not in check.jobs:
            continue
        job = check.jobs[name]
        log = job.log.read_text(errors="replace").strip()
        lines = log.splitlines()
        outcome = " ".join(lines[-1:])
        found[name] = {"exit": job.process.returncode, "log": log[-1500:]}
        if name != "pytest":
            events = events_of(job.out)
            curves[name] = {e["step"]: e["loss"] for e in events if e["event"] == "step"}
            found[name] |= {"curve": curves[name], "killed after": job.killed}
            found[name]["apart"] = apart(curves[name], curves["cpu fp32"])
            times = [event["seconds"] for event in events if event["event"] == "step"]
            accuracy = events[-1].get("accuracy") if events else None
            outcome = (
                f"{len(times)} steps, {statistics.median(times or [0]) * 1e3:6.1f} ms each, at "
                f"most {found[name]['apart']:.1e} from cpu fp32, accuracy {accuracy}"
            )
            if job.killed:
                outcome += f", killed after {job.killed}"
        if job.process.returncode != 0:
            outcome = f"FAILED {outcome} {' | '.join(lines[-3:])[-400:]}"
        check.say(f"  {name:26s} exit {job.process.returncode}  {outcome}")
    for one, other in EQUAL:
        if one in curves and other in curves:
            found[f"{one} | {other}"] = apart(curves[one], curves[other])
            check.say(f"  {one} beside {other}: {found[f'{one} | {other}']:.1e} apart")
    return found


def apart(curve: dict, other: dict) -> float:
    """Compute the largest difference of two curves, losses by step."""
    steps = [step for step in curve if None not in (curve[step], other.get(step))]
    return max((abs(curve[step] - other[step]) for step in steps), default=math.nan)


# --------------------------------------------------------------------------------------------------
# Speed and memory


def attempt(check: Check, found: dict, key: str, make: Callable, batches: list):
    """Time the steps of a contestant for about 3 seconds, and say so."""
    free()
    try:
        found[key] = timed(make(), batches)
        listed = "  ".join(f"{name} {value:.4g}" for name, value in found[key].items())
        check.say(f"  {key:44s} {listed}")
    except torch.OutOfMemoryError as error:
        found[key] = {"out of memory": str(error)[:200]}
        check.say(f"  {key:44s} out of memory")
    except Exception as error:
        found[key] = check.failed(key, error)


def timed(contestant: bench.Ours, batches: list) -> dict:
    for batch in batches[:2]:  # these allocate, and choose kernels
        contestant.step(batch)
    sync()
    if CUDA:
        torch.cuda.reset_peak_memory_stats()
    tokens, count = 0, 0
    start = time.perf_counter()
    for batch in batches[2:]:
        tokens += contestant.step(batch)
        count += 1
        if time.perf_counter() - start > 3:
            break
    sync()
    took = time.perf_counter() - start
    named = contestant.model.named_parameters()
    weights = sum(p.numel() for name, p in named if p.dim() == 2 and "embed" not in name)
    return {
        "pairs/s": len(batches[0]) * count / took,
        "tokens/s": tokens / took,
        "ms a step": took / count * 1e3,
        "tokens a step": tokens / count,
        "MFU": 6 * weights * tokens / took / PEAK,
        "peak GB": peak_gb(),
        "steps": count,
    }


def speed(check: Check) -> dict:
    """A step of train.py's loop: forward, backward, clipping, AdamW; lengths of hh-harmless."""
    found, sets = {}, {}
    for pairs in (16, 64, 128):
        sets[pairs] = batches_of(3 if check.tiny else 10, pairs, check.tiny)
    longest = 40 if check.tiny else 512
    packed = [("bf16", 16, None), ("bf16", 64, None), ("bf16", 128, None)]
    packed += [("fp32", 16, None), ("fp32", 64, None)]
    padded = [("bf16", 16, longest), ("bf16", 64, longest), ("bf16", 16, None), ("bf16", 64, None)]
    padded += [("fp32", 16, longest)]
    for name, shape, layout, plan in (
        ("OPT-350m", "OPT-350m", "packed", packed),
        ("OPT-350m", "OPT-350m", "padded", padded),
        ("transformers OPT-350m", "OPT-350m", "padded", padded),
        ("TinyLlama 1.1B", "TinyLlama 1.1B", "packed", [packed[i] for i in (0, 1, 3)]),
        ("TinyLlama 1.1B", "TinyLlama 1.1B", "padded", [padded[i] for i in (0, 2)]),
    ):
        for dtype, pairs, pad_to in plan:
            # Padded, train.py's own --micro_batch_tokens makes micro-batches of 16.
            how = {"dtype": dtype, "pad_to": pad_to, "at_once": 16 if layout == "padded" else None}

            def make():
                if name.startswith("transformers"):
                    hf = config_of(shape, check.tiny).to_hf()
                    return bench.TransformersOPT(hf, DEVICE, **how)
                return bench.Ours(make_model(shape, check.tiny), layout, **how)

            length = f" to {pad_to or 'the longest'}" if layout == "padded" else ""
            key = f"{name} {layout}{length} {dtype} {pairs}"
            attempt(check, found, key, make, sets[pairs])
    return found


def profile(check: Check) -> dict:
    """The kernels of a step, how long the GPU works, and the lines that wait for it."""
    found = {}
    contestant = bench.Ours(make_model("OPT-350m", check.tiny))
    for pairs in (16, 64):
        *first, profiled, last = batches_of(4, pairs, check.tiny)
        for batch in first:
            contestant.step(batch)
        with torch.profiler.profile() as profiler:
            wall = seconds(contestant.step, profiled) * 1e3
        found[pairs] = {"ms, profiled": wall} | kernels_of(profiler)
        if CUDA:
            found[pairs]["lines that wait"] = lines_that_wait(contestant, last)
        top = found[pairs].pop("top")
        check.say(f"  {pairs} pairs: {found[pairs]}")
        for name, count, ms in top[:15]:
            check.say(f"    {ms:8.2f} ms {count:6d} x {name}")
        found[pairs]["top"] = top
    return found


def kernels_of(profiler) -> dict:
    """List what the GPU did, the longest first, and count the calls of CUDA."""
    kernels, calls = [], {}
    no_kernels = ("Optimizer.", "ProfilerStep", "FSDP", "##", "Torch-Compiled")
    for event in profiler.key_averages():
        if event.key.startswith("cu"):
            calls[event.key] = event.count
        on_gpu = event.device_type == torch.autograd.DeviceType.CUDA
        if on_gpu and not event.key.startswith(no_kernels):
            kernels.append((event.key[:110], event.count, event.self_device_time_total / 1e3))
    kernels.sort(key=lambda kernel: -kernel[2])
    return {
        "GPU busy ms": sum(ms for _, _, ms in kernels),
        "kernels and copies": sum(count for _, count, _ in kernels),
        "calls of CUDA": calls,
        "top": kernels[:40],
    }


def lines_that_wait(contestant: bench.Ours, batch: list) -> dict[str, int]:
    """Count the waits of a step for the GPU by the line that waits."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            contestant.step(batch)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    waits = [warning for warning in caught if "synchroniz" in str(warning.message)]
    lines = [f"{Path(warning.filename).name}:{warning.lineno}" for warning in waits]
    return {line: lines.count(line) for line in lines}


def prototype(check: Check) -> dict:
    """Plans, indices and loss made ahead; for OPT one call a layer; then with blocks compiled."""
    found, sets = {}, {}
    model = make_model("OPT-350m", check.tiny)
    for pairs in (64, 16, 128):
        batches = batches_of(3 if check.tiny else 14, pairs, check.tiny)
        start = time.perf_counter()
        sets[pairs] = [Prepared(batch, model) for batch in batches]
        took = (time.perf_counter() - start) / len(batches)
        found[f"ms to prepare {pairs} pairs"] = took * 1e3
        check.say(f"  preparing {pairs} pairs takes {took * 1e3:.1f} ms of a CPU")
    for name, is_compiled in (("prototype", False), ("prototype, compiled", True)):
        for pairs, batches in sets.items():
            if check.elapsed() > check.budget + 20 and not check.tiny:
                return found
            key = f"OPT-350m {name} bf16 {pairs}"
            start = check.elapsed()
            attempt(check, found, key, lambda: Fast(model, "bf16", is_compiled), batches)
            check.say(f"    {check.elapsed() - start:.1f} s in all")
    return found


ESTIMATED = (
    ("OPT-350m", "bf16", "packed"),
    ("OPT-350m", "fp32", "packed"),
    ("OPT-350m", "bf16", "padded"),
    ("TinyLlama 1.1B", "bf16", "packed"),
)


def write_estimates(path: Path, tiny: bool):
    """Write what tools/dry_run.py estimates into a file, {case: GB of the peak, or an error}."""
    found = {}
    directory = path.with_suffix(".model")
    directory.mkdir(exist_ok=True)
    (groups,) = batches_of(1, 16, tiny)
    for shape, dtype, layout in ESTIMATED:
        config = config_of(shape, tiny).to_hf() | {"pad_token_id": 1}
        (directory / "config.json").write_text(json.dumps(config))
        words = ["train.py", "--model_name_or_path", str(directory), "--dtype", dtype]
        words += ["--layout", layout, "--micro_batch_tokens", "1000000000"]
        with mock.patch("sys.argv", words):
            args = parse_flags(list(FAMILIES), LOSSES)
        try:
            comparisons = [Tokenized(group) for group in groups]
            estimate = dry_run.estimate(args, 1, comparisons)["peak"] / 1e9
        except Exception as error:
            estimate = f"FAILED {error!r}"[:300]
        found[f"{shape} {dtype} {layout}"] = estimate
        path.write_text(json.dumps(found))


def memory(check: Check) -> dict:
    """Peaks beside what tools/dry_run.py estimates for the same comparisons."""
    job, path, found = check.jobs["estimates"], check.where / "estimates.json", {}
    job.process.wait()
    if not path.exists():
        raise FileNotFoundError(f"no estimates: {job.log.read_text()[-300:]}")
    (groups,) = batches_of(1, 16, check.tiny)
    for key, estimate in json.loads(path.read_text()).items():
        *shape, dtype, layout = key.split()
        try:
            contestant = bench.Ours(make_model(" ".join(shape), check.tiny), layout, dtype)
            contestant.step(groups)  # the optimizer's states are there from now on
            free()
            contestant.forward_backward(groups)
            found[key] = {"estimated GB": estimate, "measured GB": peak_gb()}
            check.say(f"  {key:28s} {found[key]}")
        except Exception as error:
            found[key] = check.failed(key, error)
        contestant = None
        free()
    return found


# --------------------------------------------------------------------------------------------------
# The program

# Seconds that each part takes on a GPU.
PARTS = {facts: 10, kernel: 30, exact: 90, programs: 110}
PARTS |= {speed: 100, profile: 25, prototype: 90, memory: 20}


def run_part(check: Check, part: Callable):
    """Run a part, unless the time is over; its failure does not end the program."""
    name, elapsed = part.__name__, check.elapsed()
    if elapsed > check.budget - PARTS[part] / 3 and not check.tiny:
        check.say(f"\n{name}: left out, {elapsed:.0f} s are over")
        return
    check.say(f"\n{name}: {part.__doc__} (at {elapsed:.0f} s)")
    try:
        check.found[name] = part(check)
    except Exception as error:
        check.found[name] = check.failed(name, error)
    check.save()


def main():
    parser = argparse.ArgumentParser(allow_abbrev=False)
    flag = parser.add_argument
    flag("--tiny", action="store_true", help="make everything small, to try this on a CPU")
    flag("--budget", type=float, default=450.0, help="seconds after which no part begins (450)")
    flag("--only", default="", help="names of parts, with commas between")
    flag("--skip", default="", help="names of parts, with commas between")
    flag("--estimates", type=Path, help="(internal) write what dry_run says into this file")
    args = parser.parse_args()
    if args.estimates:
        write_estimates(args.estimates, args.tiny)
        return
    if not CUDA:
        varlen.varlen_attn = attend_by_the_book
    out = Path(os.environ.get("OUT") or "gpu_out").resolve()
    out.mkdir(parents=True, exist_ok=True)
    check = Check(args.tiny, args.budget, out)
    names = args.only.split(",") if args.only else [part.__name__ for part in PARTS]
    names = set(names) - set(args.skip.split(","))
    for part in PARTS:
        if part.__name__ not in names:
            continue
        if part is not facts and not check.jobs and names & {"programs", "memory"}:
            start_jobs(check)  # after the figures of the machine by itself
        run_part(check, part)
    for job in check.jobs.values():
        if job.process.poll() is None:
            job.process.kill()
    check.say(f"\n{check.elapsed():.0f} s")
    check.save()


if __name__ == "__main__":
    main()
