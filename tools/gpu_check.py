"""Find out what there is to know on a first GPU, in one command of at most 8 minutes.

    python -m tools.gpu_check [--budget 450] [--only facts,exact,...] [--skip ...] [--tiny]

Runs in the root of a checkout, or as a copy anywhere with PROJECT set to one. After every part it
writes gpu_check.json and gpu_check.txt into $OUT (gpu_out); a part that fails says so, and the next
one runs. --tiny makes everything small, to try this program on a CPU, where a stand-in replaces the
flash kernel. Models, batches and steps to measure are in tools/bench.py, the figures in
docs/gpu.md.
"""

import argparse
import functools
import importlib.metadata
import inspect
import itertools
import json
import math
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np

ROOT = Path(os.environ.get("PROJECT") or Path.cwd()).resolve()
if not (ROOT / "train.py").exists():
    ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch
from torch.nn.attention import varlen

import train
from data import Tokenized
from model import GPTConfig
from parts.flags import parse_flags
from parts.huggingface import FAMILIES
from parts.packed import PackedAttention, PackedBatch, VarlenCall, moved, plan_varlen
from rm import LOSSES, RewardModel
from tools import bench, dry_run

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda", 0) if CUDA else torch.device("cpu")
KERNEL_DTYPE = torch.bfloat16 if CUDA else torch.float32


@dataclass
class Job:
    """A program that runs beside the first parts."""

    process: subprocess.Popen
    log: Path
    out: Path  # --output_dir
    killed: int | None = None  # the step after which a worker was killed


@dataclass
class Check:
    """A run of this program: its settings, and its findings so far."""

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


def attend_by_the_book(q, k, v, q_starts, k_starts, max_q, max_k, window_size=(-1, -1)):
    """Compute what varlen_attn computes, one sequence after the other."""
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


def stand_in(kernel: Callable) -> Callable:
    """Make a stand-in for varlen_attn, which is as strict as this PyTorch's about its arguments."""
    parameters = inspect.signature(kernel)

    @torch.compiler.disable
    @functools.wraps(kernel)
    def varlen_attn(*tensors, enable_gqa=False, **options):
        announced = {"enable_gqa": True} if enable_gqa else {}
        parameters.bind(*tensors, **announced, **options)  # TypeError, as the kernel has it
        has_groups = tensors[0].shape[1] != tensors[1].shape[1]
        if has_groups and "enable_gqa" in parameters.parameters and not enable_gqa:
            raise ValueError("grouped heads without enable_gqa")
        return attend_by_the_book(*tensors, **options)

    return varlen_attn


def pretend_flash() -> ExitStack:
    """Let packed batches attend on a CPU as they do on a GPU, by the stand-in."""

    def is_half(q, dropout_p):
        return q.dtype in (torch.float16, torch.bfloat16) and dropout_p == 0

    def to(batch, device):
        return moved(replace(batch, calls=batch.calls or plan_varlen(batch)), torch.device(device))

    changes = ExitStack()
    kernel = stand_in(varlen.varlen_attn)
    changes.enter_context(mock.patch.object(varlen, "varlen_attn", kernel))
    changes.enter_context(mock.patch("parts.packed.can_use_varlen", is_half))
    changes.enter_context(mock.patch.object(PackedBatch, "to", to))
    return changes


def seconds(function: Callable, *arguments) -> float:
    """Time a call, until the GPU has done it."""

    def run():
        function(*arguments)
        bench.wait_for(DEVICE)

    bench.wait_for(DEVICE)
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
    return bench.random_model(config_of(shape, tiny), device)


def batches_of(count: int, pairs: int, tiny: bool) -> list:
    if not tiny:
        return bench.random_batches(count, pairs)
    batches = bench.random_batches(count, 3)
    return [[[text[-40:] for text in group] for group in batch] for batch in batches]


# --------------------------------------------------------------------------------------------------
# Facts, the kernel by itself, exactness


def facts(check: Check) -> dict:
    """The machine and its versions; how fast it multiplies, copies and launches."""
    found = {
        "python": sys.version,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cpu": re.search(r"model name\s*: (.*)|$", Path("/proc/cpuinfo").read_text())[1],
        "cores": os.cpu_count(),
        "C compiler, for --compile": shutil.which("cc") or shutil.which("gcc"),
        "varlen_attn": str(inspect.signature(varlen.varlen_attn)),
    }
    for name in ("transformers", "numpy", "sentencepiece", "triton"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError as error:
            found[name] = repr(error)
    if CUDA:
        found["gpu"] = str(torch.cuda.get_device_properties(0))
        found["nccl"] = torch.cuda.nccl.version()
        found["cudnn"] = torch.backends.cudnn.version()
    if shutil.which("nvidia-smi"):
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


SEQUENCES = {  # numbers of queries and keys
    "causal, fewer queries than keys": [(5, 5), (40, 200), (1, 17), (130, 131)],
    "causal, single queries": [(1, 300), (1, 4), (1, 65)],
    "full": [(3, 9), (70, 200), (1, 65)],
}


def kernel(check: Check) -> dict:
    """Flash attention as blocks call it, in bf16, beside float64: widths, grouped heads."""
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
    window = (-1, 0) if is_causal else (-1, -1)
    rows = np.split(np.arange(m), np.cumsum(key_counts)[:-1])
    call = VarlenCall.of(list(zip(counts, rows)), window, m)
    lengths = call.query_starts, call.key_starts, call.longest_query, call.longest_key

    def by_the_book(q, k, v):
        return attend_by_the_book(q, k, v, *lengths, window_size=window)

    calls = ((moved(call, DEVICE),),) * 2
    batch = SimpleNamespace(trunks=[], branches=[], tails=[], num_tokens=n, calls=calls)
    flash = PackedAttention(batch, None).with_varlen
    results = []
    for attend, device, dtype in (
        (by_the_book, "cpu", torch.float64),
        (flash, DEVICE, KERNEL_DTYPE),
    ):
        *leaves, gradient = (tensor.to(device, dtype) for tensor in tensors)
        leaves = [leaf.detach().requires_grad_() for leaf in leaves]
        out = attend(*leaves)
        results.append((out, *torch.autograd.grad(out, leaves, gradient)))
    expected, found = results
    return [error_of(a, b) for a, b in zip(found, expected)]


VARIANTS = ("packed", "padded", "masks", "checkpointing", "compiled")


def variants(family: str, tiny: bool) -> Iterator[tuple[str, str]]:
    """Yield dtype and variant of every path, each of which the part `exact` takes by itself."""
    dtypes = ("fp32", "bf16") if tiny else ("fp32", "bf16", "fp16")
    for dtype, variant in itertools.product(dtypes, VARIANTS):
        if variant == "masks" and dtype == "fp32":  # it is the program's own choice
            continue
        compiled = ("llama",) if tiny else ("opt", "llama")
        if variant == "compiled" and (family not in compiled or dtype != "bf16"):
            continue
        yield dtype, variant


def numbers_of(contestant: bench.Ours, groups: list) -> dict[str, torch.Tensor]:
    """Compute loss, scores, and all gradients as one vector."""
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
    """Compute the errors of a path. Raises RuntimeError where another kernel than its own ran."""
    if variant == "compiled":
        model = bench.compiled(model)
    contestant = bench.Ours(model, "padded" if variant == "padded" else "packed", dtype)
    model.backbone.gradient_checkpointing = variant == "checkpointing"
    with ExitStack() as changes:
        change = functools.partial(mock.patch.object, PackedAttention)
        if variant == "masks":
            changes.enter_context(change("__call__", PackedAttention.with_masks))
        uses_flash = dtype != "fp32" and variant in ("packed", "checkpointing")
        if variant != "compiled":  # a watched function would be none of the graph
            original = PackedAttention.with_varlen
            watch = change("with_varlen", autospec=True, side_effect=original)
            flash = changes.enter_context(watch)
        found = numbers_of(contestant, groups)
        again = numbers_of(contestant, groups)
    if variant != "compiled" and flash.called != uses_flash:
        raise RuntimeError(f"flash attention: expected {uses_flash}, found {flash.called}")
    errors = {name: error_of(value, expected[name]) for name, value in found.items()}
    return errors | {"the same run again": error_of(again["gradient"], found["gradient"])}


# --------------------------------------------------------------------------------------------------
# Programs: runs of train.py, tests and estimates, started first, as they are no timings

WAITS = "gpu bf16 waits"  # PyTorch warns where it waits for the GPU
WAITING = "called a synchronizing CUDA operation"
WATCH = """
import runpy, torch
if torch.cuda.is_available():
    torch.cuda.set_sync_debug_mode("warn")
runpy.run_path("train.py", run_name="__main__")
"""
KILLED = "nccl killed zero 3 bf16"  # a worker of it is killed, and torchrun starts it again
TRAININGS = {
    "cpu fp32": "",
    "gpu fp32": "",
    "gpu bf16": "--dtype bf16",
    "gpu bf16 compiled": "--dtype bf16 --compile",
    "gpu bf16 padded": "--dtype bf16 --layout padded",
    "gpu bf16 dropout": "--dtype bf16 --dropout 0.1",  # not by flash attention
    "gpu bf16 dropout compiled": "--dtype bf16 --dropout 0.1 --compile",
    "gpu fp16": "--dtype fp16",
    "gpu bf16 checkpointing": "--dtype bf16 --gradient_checkpointing",
    "nccl zero 2 bf16": "--dtype bf16 --zero_stage 2",
    "nccl zero 3 bf16": "--dtype bf16 --zero_stage 3",
    "nccl zero 3 offload bf16": "--dtype bf16 --zero_stage 3 --offload",
    "nccl zero 2 offload fp16": "--dtype fp16 --zero_stage 2 --offload",
    "nccl zero 2 offload fp16 dropout": "--dtype fp16 --zero_stage 2 --offload --dropout 0.1",
    "nccl zero 0 bf16": "--dtype bf16",
    KILLED: "--dtype bf16 --zero_stage 3 --save_interval 10",
    WAITS: "--dtype bf16",
}
TINY = "--n_layer 2 --n_embd 32 --n_head 2 --max_seq_len 64 --per_device_train_batch_size 8"
TINY_TRAININGS = ("cpu fp32", "nccl zero 3 bf16", KILLED, WAITS)
TORCHRUN = "-m torch.distributed.run --standalone --nproc_per_node=1"
TESTS = "-m pytest -q -rs -p no:cacheprovider"
EQUAL = (
    (KILLED, "nccl zero 3 bf16"),
    ("gpu bf16", "gpu bf16 padded"),
    ("gpu bf16", "gpu bf16 checkpointing"),
    ("gpu bf16", "gpu bf16 compiled"),
    ("gpu bf16", WAITS),
    ("gpu bf16", "nccl zero 0 bf16"),
)


def start_jobs(check: Check):
    """Start all programs, and a thread that watches them."""
    estimates = [str(Path(__file__).resolve()), "--estimates", str(check.where / "estimates.json")]
    if check.tiny:
        estimates.append("--tiny")
    start_job(check, "estimates", estimates, sees_gpu=False)
    tests = tests_on_a_gpu()
    # A process for each of them, because one after the other they take minutes.
    for i, names in enumerate([tests] if check.tiny else [[test] for test in tests]):
        words = [*TESTS.split(), "--basetemp", str(check.where / f"pytest {i}"), *names]
        start_job(check, f"pytest {i}", words)
    for name, flags in TRAININGS.items():
        flags = f"{flags} --max_steps 60 --eval_iters 4"
        if check.tiny:
            flags = f"{flags} --max_steps 6 {TINY}".replace("interval 10", "interval 2")
        if check.tiny and name not in TINY_TRAININGS:
            continue
        launcher = TORCHRUN.split() if name.startswith("nccl") else []
        if name == KILLED:
            launcher.append("--max-restarts=1")
        program = ["-W", "always", "-c", WATCH] if name == WAITS else ["train.py"]
        output_dir = ["--output_dir", str(check.where / name)]
        words = [*launcher, *program, *flags.split(), *output_dir]
        start_job(check, name, words, sees_gpu=name != "cpu fp32")
    limit = math.inf if check.tiny else 200
    check.watcher = threading.Thread(target=watch, args=(dict(check.jobs), limit), daemon=True)
    check.watcher.start()
    if check.tiny:  # on few cores the other parts would keep the watcher from its work
        check.watcher.join()


def tests_on_a_gpu() -> list[str]:
    """List the tests that need a GPU, as pytest names them."""
    files = [*ROOT.glob("test_*.py"), *ROOT.glob("*/test_*.py")]
    files = [path.relative_to(ROOT) for path in files if "_on_a_gpu" in path.read_text()]
    command = [sys.executable, *TESTS.split(), "--collect-only", "-k", "on_a_gpu", *files]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    return [line for line in done.stdout.splitlines() if "::" in line]


def start_job(check: Check, name: str, words: list[str], sees_gpu: bool = True) -> Job:
    log = (check.out if name.startswith("pytest") else check.where) / f"log.{name}.txt"
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
    return check.jobs[name]


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
    for name, job in check.jobs.items():
        if name == "estimates":
            continue
        log = job.log.read_text(errors="replace").strip()
        lines = log.splitlines()
        outcome = " ".join(lines[-1:])
        found[name] = {"exit": job.process.returncode, "log": log[-1500:]}
        if name in TRAININGS:
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
            if name == WAITS:
                found[name]["lines that wait"] = listed = lines_in(log)
                outcome += f"; lines that waited, how often: {listed}"
        if job.process.returncode != 0:
            outcome = f"FAILED {outcome} {' | '.join(lines[-3:])[-400:]}"
        check.say(f"  {name:26s} exit {job.process.returncode}  {outcome}")
    for one, other in EQUAL:
        if one in curves and other in curves:
            found[f"{one} | {other}"] = apart(curves[one], curves[other])
            check.say(f"  {one} beside {other}: {found[f'{one} | {other}']:.1e} apart")
    return found


def lines_in(log: str) -> dict[str, int]:
    """Count PyTorch's warnings of a wait for the GPU by file and line."""
    lines = re.findall(rf"([^/\s]+:\d+): UserWarning: {WAITING}", log)
    return {line: lines.count(line) for line in lines}


def apart(curve: dict, other: dict) -> float:
    """Compute the largest difference of two curves, losses by step."""
    steps = [step for step in curve if None not in (curve[step], other.get(step))]
    return max((abs(curve[step] - other[step]) for step in steps), default=math.nan)


# --------------------------------------------------------------------------------------------------
# Speed


@functools.cache
def peak_flops() -> float:
    return bench.dense_peak(DEVICE)[0]


def measure(check: Check, found: dict, key: str, contestants: dict, batches: list):
    """Time contestants in turns, and say so; none after the end of the budget."""
    if check.elapsed() > check.budget and not check.tiny:
        check.say(f"  {key}: left out, {check.elapsed():.0f} s are over")
        return
    rounds = 1 if check.tiny else 2
    for name, figures in bench.in_turns(contestants, batches, rounds, peak_flops()).items():
        name = f"{key} {name}"
        found[name] = figures
        if "failed" in figures:
            check.say(f"  {name:44s} FAILED {figures['failed'].splitlines()[-1][:200]}")
            continue
        listed = "  ".join(f"{figure} {value:.4g}" for figure, value in figures.items())
        check.say(f"  {name:44s} {listed}")


def speed(check: Check) -> dict:
    """Steps of train.py's loop, in turns: forward, backward, clipping, AdamW; hh-harmless."""
    found = {}
    for shape, sizes in (("OPT-350m", (16, 64, 128)), ("TinyLlama 1.1B", (16, 64))):
        contestants = bench.contestants_of(config_of(shape, check.tiny), DEVICE)
        packed = contestants["packed"]
        contestants["packed, fp32"] = replace(packed, dtype="fp32")
        for pairs in sizes:
            if pairs == sizes[-1]:  # the others would take most of the time
                contestants = {name: contestants[name] for name in ("packed", "packed, --compile")}
            batches = batches_of(3, pairs, check.tiny)
            measure(check, found, f"{shape} {pairs}", contestants, batches)
        contestants = packed = None
        bench.free()
    return found


def end_to_end(check: Check) -> dict:
    """train.py itself, --compile, blocks of OPT-350m's shape, 64 pairs a step of hh's lengths."""
    pairs, steps = (3, 4) if check.tiny else (64, 40)
    path, out = check.where / "pairs.jsonl", check.where / "end to end"
    rows = []
    for pair in itertools.chain(*batches_of(steps, pairs, check.tiny)):
        chosen, rejected = (" ".join(map(word, ids)) for ids in pair)
        rows.append(json.dumps({"chosen": chosen, "rejected": rejected}))
    path.write_text("\n".join(rows) + "\n")
    flags = "--model_type opt --n_layer 24 --n_embd 1024 --n_head 16 --compile"
    if check.tiny:
        flags = TINY
    flags += f" --dtype bf16 --eval_iters 1 --save_interval 0 --max_steps {steps}"
    flags += f" --per_device_train_batch_size {pairs} --data_path"
    words = ["train.py", *flags.split(), str(path), "--output_dir", str(out)]
    job = start_job(check, "end to end", words)
    job.process.wait(150)
    rows = [event for event in events_of(out) if event["event"] == "step"]
    if job.process.returncode != 0:
        raise RuntimeError(job.log.read_text(errors="replace")[-1000:])
    measured = rows[steps // 2 :]  # the first ones compile, allocate, and choose kernels
    took = sum(row["seconds"] for row in measured)
    found = {"first step, s": rows[0]["seconds"]}
    found["pairs/s"] = sum(row["pairs"] for row in measured) / took
    found["tokens/s"] = sum(row["tokens"] for row in measured) / took
    found["ms a step"] = took / len(measured) * 1e3
    check.say(f"  {found}")
    return found


def word(token: int) -> str:
    """Spell an id as a word of three letters. There are 4,096, so a tokenizer has most of them."""
    return "".join(chr(97 + token // 16**i % 16) for i in range(3))


def profile(check: Check) -> dict:
    """The kernels of a step, how long the GPU works, and the lines that wait for it."""
    found = {}
    model = make_model("OPT-350m", check.tiny)
    contestants = {"packed": bench.Ours(model, dtype="bf16")}
    contestants["packed, --compile"] = bench.Ours(bench.compiled(model), dtype="bf16")
    for name, pairs in (("packed", 16), ("packed", 64), ("packed, --compile", 64)):
        *first, profiled, last = batches_of(4, pairs, check.tiny)
        for batch in first:
            contestants[name].step(batch)
        with torch.profiler.profile() as profiler:
            wall = seconds(contestants[name].step, profiled) * 1e3
        figures = {"ms, profiled": wall} | kernels_of(profiler)
        if CUDA:
            figures |= lines_that_wait(contestants[name], last)
        top = figures.pop("top")
        check.say(f"  {name} {pairs} pairs: {figures}")
        for kernel_name, count, ms in top[:15]:
            check.say(f"    {ms:8.2f} ms {count:6d} x {kernel_name}")
        found[f"{name} {pairs}"] = figures | {"top": top}
    return found


def kernels_of(profiler) -> dict:
    """List what the GPU did, the longest first, and count the calls of CUDA."""
    kernels, calls = [], {}
    no_kernels = ("Optimizer.", "ProfilerStep", "FSDP", "##", "Torch-Compiled")
    for event in profiler.key_averages():
        on_gpu = event.device_type == torch.autograd.DeviceType.CUDA
        if not on_gpu and event.key.startswith("cu"):
            calls[event.key] = event.count
        if on_gpu and not event.key.startswith(no_kernels):
            kernels.append((event.key[:110], event.count, event.self_device_time_total / 1e3))
    kernels.sort(key=lambda kernel: -kernel[2])
    return {
        "GPU busy ms": sum(ms for _, _, ms in kernels),
        "kernels and copies": sum(count for _, count, _ in kernels),
        "flash kernels": sum(count for name, count, _ in kernels if "flash" in name.lower()),
        "calls of CUDA": calls,
        "top": kernels[:40],
    }


def lines_that_wait(contestant: bench.Ours, batch: list) -> dict[str, dict[str, int]]:
    """List the lines that wait for the GPU, and how often they do.

    Until the gradient is clipped there should be none; a whole step reads the loss and the norm.
    """

    def until_clipped():
        contestant.forward_backward(batch)
        contestant.clip()
        contestant.optimizer.zero_grad()

    return {
        "lines that wait until the gradient is clipped": waits_of(until_clipped),
        "lines that wait in a step": waits_of(lambda: contestant.step(batch)),
    }


def waits_of(function: Callable) -> dict[str, int]:
    """Count PyTorch's warnings of a wait for the GPU by the innermost line of this project."""
    lines = []

    def note(message, *rest):
        if WAITING not in str(message):
            return
        for frame in reversed(traceback.extract_stack()[:-1]):
            path = Path(frame.filename)
            if path.is_relative_to(ROOT) and "site-packages" not in path.parts:
                lines.append(f"{path.name}:{frame.lineno}")
                return

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = note
        torch.cuda.set_sync_debug_mode("warn")
        try:
            function()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return {line: lines.count(line) for line in lines}


# --------------------------------------------------------------------------------------------------
# Prototype: changes to the loop that train.py does not have, to see what they would gain


@dataclass
class Changed(bench.Ours):
    """A step with changes to the loop. Without any, it is that of `bench.Ours`."""

    packs_ahead: bool = False  # a thread packs the next batch, and copies it from pinned memory
    # Loss and norm are read when the next step is queued, so an update is made before it is known
    # whether it should be. The loop would have to let the device skip it.
    reads_late: bool = False

    def steps(self, batches: list) -> Iterator[int]:
        prepared = map(self.prepare, batches)
        if self.packs_ahead:
            prepared = ahead(self.prepare, batches)
        numbers = None
        for micro_batches in prepared:
            loss, tokens = self.backward(micro_batches)
            before, numbers = numbers, Numbers(loss, self.clip())
            known = before if self.reads_late else numbers
            if known is not None:
                known.check()
            self.update()
            yield tokens
        numbers.check()

    def prepare(self, groups: list) -> list:
        return list(self.micro_batches(groups))


class Numbers:
    """Loss and norm of a step, on their way to the CPU."""

    def __init__(self, loss: torch.Tensor, norm: torch.Tensor):
        self.values = torch.stack((loss, norm.double())).to("cpu", non_blocking=True)
        self.arrived = torch.cuda.Event() if CUDA else None
        if CUDA:
            self.arrived.record()

    def check(self):
        if CUDA:
            self.arrived.synchronize()
        bench.check_finite(*self.values.tolist())


def ahead(function: Callable, items: Iterable) -> Iterator:
    """Yield function(item) of each item; a thread computes the next one meanwhile."""
    with ThreadPoolExecutor(1) as thread:
        following = None
        for item in items:
            current, following = following, thread.submit(function, item)
            if current is not None:
                yield current.result()
        if following is not None:
            yield following.result()


def prototype(check: Check) -> dict:
    """A packed step with changes to the loop: a thread that packs ahead, numbers read late."""
    found, contestants = {}, {}
    model = make_model("OPT-350m", check.tiny)
    shared = {"dtype": "bf16", "optimizer": bench.Ours(model).optimizer}
    for compiled, one in (("", model), (", --compile", bench.compiled(model))):
        for packs_ahead, reads_late in itertools.product((False, True), repeat=2):
            name = "packed" + compiled
            name += " + thread" if packs_ahead else ""
            name += " + read late" if reads_late else ""
            changes = {"packs_ahead": packs_ahead, "reads_late": reads_late}
            contestants[name] = Changed(one, **shared, **changes)
    for pairs in (64,) if check.tiny else (64, 16, 128):
        batches = batches_of(3 if check.tiny else 6, pairs, check.tiny)
        measure(check, found, f"OPT-350m {pairs}", contestants, batches)
    return found


# --------------------------------------------------------------------------------------------------
# Memory

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
            bench.free()
            peak = math.nan
            if CUDA:
                torch.cuda.reset_peak_memory_stats()
            contestant.forward_backward(groups)
            if CUDA:
                peak = torch.cuda.max_memory_allocated() / 1e9
            found[key] = {"estimated GB": estimate, "measured GB": peak}
            check.say(f"  {key:28s} {found[key]}")
        except Exception as error:
            found[key] = check.failed(key, error)
        contestant = None
        bench.free()
    return found


# --------------------------------------------------------------------------------------------------
# The program

# Seconds that each part takes on a GPU.
PARTS = {facts: 10, kernel: 15, exact: 90, programs: 40, speed: 100}
PARTS |= {end_to_end: 60, profile: 25, prototype: 60, memory: 20}


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
    if not (CUDA or args.tiny):
        sys.exit("gpu_check: no GPU here; --tiny tries this program on a CPU")
    out = Path(os.environ.get("OUT") or "gpu_out").resolve()
    out.mkdir(parents=True, exist_ok=True)
    check = Check(args.tiny, args.budget, out)
    names = args.only.split(",") if args.only else [part.__name__ for part in PARTS]
    names = set(names) - set(args.skip.split(","))
    with ExitStack() if CUDA else pretend_flash():
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
