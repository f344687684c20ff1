"""Measure speed and memory beside other implementations, always in turns and in one run.

    python -m tools.bench           training steps: packed beside padded, transformers and TRL
    python -m tools.bench --device cuda     the same on a GPU: bf16, real shapes, --compile
    python -m tools.bench ranks     two processes of one thread beside one process of two threads
    python -m tools.bench load      loading checkpoints of real shapes, beside transformers

It holds models, batches and steps to measure; the real loop is in train.py, the figures are in
docs/benchmarks.md. Needs requirements-dev.txt; TRL takes part where `pip install trl==1.16.0` has
put it.
"""

import argparse
import gc
import importlib.util
import itertools
import json
import math
import os
import random
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F

import data
import train
from model import GPT, GPTConfig
from parts.compiling import compile_blocks
from parts.distributed import Process, share_of
from parts.guards import counted
from parts.packed import packed_size
from rm import RewardModel, pairwise_loss
from tools import dry_run

HERE = Path(__file__).resolve().parent
# config.json of published models (a part of its keys), then smaller ones.
SHAPES = json.loads((HERE / "shapes.json").read_text())


def spread(values, unit: str = "", digits: int = 2) -> str:
    """Write the median of some values, and their range in parentheses."""
    median = f"{statistics.median(values):.{digits}f}{unit}"
    return f"{median} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def table_head(*columns: str):
    print(f"| {' | '.join(columns)} |\n" + "| --- " * len(columns) + "|")


# --------------------------------------------------------------------------------------------------
# Memory of a process


def anonymous_memory(status: str) -> int:
    """Read from /proc/PID/status how many bytes a process has that no file stands behind."""
    return 1024 * int(re.search(r"RssAnon:\s+(\d+)", status)[1])


def measure(program: str, *arguments: str) -> tuple[int, str]:
    """Measure the memory of a Python program while it works.

    The program prints its memory, waits for a line, works, prints a line, waits for a line, and
    prints its result. Returns the peak of its anonymous memory above what it printed, sampled every
    millisecond; and the result.
    """
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    command = [sys.executable, "-c", program, *arguments]
    with subprocess.Popen(command, cwd=HERE.parent, **pipes) as child:
        base = int(child.stdout.readline())
        status = Path(f"/proc/{child.pid}/status")
        samples = [anonymous_memory(status.read_text())]
        is_done = threading.Event()

        def sample():
            while not is_done.wait(0.001):
                samples[0] = max(samples[0], anonymous_memory(status.read_text()))

        sampler = threading.Thread(target=sample)
        sampler.start()
        print(file=child.stdin, flush=True)
        child.stdout.readline()
        is_done.set()
        sampler.join()
        peak = max(samples[0], anonymous_memory(status.read_text()))
        return peak - base, child.communicate("\n")[0]


# --------------------------------------------------------------------------------------------------
# Loading

CLASSIFIER = "AutoModelForSequenceClassification"
LOADERS = ("GPT (ours)", "AutoModel", "RewardModel (ours)", CLASSIFIER)
MODEL = """
import json, sys, transformers
config = transformers.AutoConfig.for_model(**json.loads(sys.argv[1]))
transformers.AutoModel.from_config(config).save_pretrained(sys.argv[2])
"""
# A child's base is its memory after `import torch`.
LOAD = """
import sys, torch
status = open("/proc/self/status").read()
from tools.bench import load_in_child
load_in_child(status, *sys.argv[1:])
"""


def load(loader: str, path: str) -> torch.nn.Module:
    """Load a backbone alone, or with a fresh head; our RewardModel adds a row for a new pad id."""
    if loader == "GPT (ours)":
        return GPT.from_pretrained(path)
    if loader == "RewardModel (ours)":
        return RewardModel.from_pretrained(path).backbone
    import transformers

    if loader == "AutoModel":
        return transformers.AutoModel.from_pretrained(path)
    return getattr(transformers, CLASSIFIER).from_pretrained(path, num_labels=1).base_model


@torch.no_grad()
def load_in_child(status: str, loader: str, path: str):
    """Load a model in a process of its own, for `measure`; status: before imports but torch's.

    The result is how long loading took, and how long until a first forward pass of 8 tokens was
    done: a loader may map the file and leave the reading of it to that pass.
    """
    if "ours" not in loader:
        import transformers

        transformers.logging.disable_progress_bar()
        transformers.logging.set_verbosity_error()
        # A tiny model of the same class first: transformers imports the class only then.
        config = json.loads(Path(path, "config.json").read_text()) | SHAPES["tiny"]
        config = transformers.AutoConfig.for_model(**config)
        getattr(transformers, CLASSIFIER).from_config(config)
    print(anonymous_memory(status), flush=True)
    sys.stdin.readline()
    start = time.perf_counter()
    backbone = load(loader, path)
    loaded = time.perf_counter() - start
    print("loaded", flush=True)
    sys.stdin.readline()
    used = loaded + seconds(backbone, torch.arange(8)[None])
    print(json.dumps([loaded, used]), flush=True)


def bench_load(rounds: int):
    memory = "peak anonymous memory / weights"
    table_head("checkpoint", "weights, float32", "loader", "load", "load and first forward", memory)
    for name in ("OPT-350m", "GPT-2 124M", "llama 1B"):
        runs = {loader: [] for loader in LOADERS}
        with tempfile.TemporaryDirectory() as directory:
            command = [sys.executable, "-c", MODEL, json.dumps(SHAPES[name]), directory]
            subprocess.run(command, check=True, stderr=subprocess.DEVNULL)
            size = sum(file.stat().st_size for file in Path(directory).glob("*.safetensors"))
            for _ in range(rounds):
                for loader in LOADERS:
                    peak, result = measure(LOAD, loader, directory)
                    runs[loader].append((*json.loads(result), peak))
        for loader, results in runs.items():
            loaded, used, peaks = zip(*results)
            times = f"{spread(loaded, ' s')} | {spread(used, ' s')}"
            memory = f"{max(peaks) / size:.3f}"
            print(f"| {name} | {size / 1e9:.2f} GB | {loader} | {times} | {memory} |", flush=True)


# --------------------------------------------------------------------------------------------------
# Batches


VOCAB_SIZE, MAX_SEQ_LEN = 8000, 512
# Prefix and tails of 1,500 pairs of hh-harmless, in tokens of a BPE of 8,000.
LENGTHS = HERE / "hh_harmless_lengths.csv"


def random_batches(batches: int, size: int) -> list[list[list[list[int]]]]:
    """Make batches of pairs of random ids, with lengths of real pairs, truncated on the left.

    The lengths are a systematic sample of all pairs in the order of their tokens, shuffled.
    """
    rng, lengths = random.Random(0), []
    for row in LENGTHS.read_text().split()[1:]:
        prefix, chosen, rejected = map(int, row.split(","))
        prefix = max(0, min(prefix, MAX_SEQ_LEN - max(chosen, rejected)))
        room = MAX_SEQ_LEN - prefix
        lengths.append((prefix, min(chosen, room), min(rejected, room)))
    lengths.sort(key=lambda row: row[0] + 2 * max(row[1:]))
    count = batches * size
    sample = [lengths[int((i + 0.5) * len(lengths) / count)] for i in range(count)]
    rng.shuffle(sample)
    pairs = []
    for row in sample:
        trunk, *tails = (random_ids(rng, length) for length in row)
        tails[1][0] = tails[0][0] % (VOCAB_SIZE - 1) + 1  # the texts differ from there
        pairs.append([trunk + tail for tail in tails])
    return [pairs[i : i + size] for i in range(0, count, size)]


def random_ranking(responses: int, length: int, rng: random.Random) -> list[list[int]]:
    trunk, *tails = (random_ids(rng, length) for _ in range(1 + responses))
    return [trunk + [i + 1] + tail[1:] for i, tail in enumerate(tails)]


def random_ids(rng: random.Random, length: int) -> list[int]:
    return [rng.randrange(4, VOCAB_SIZE) for _ in range(length)]


# --------------------------------------------------------------------------------------------------
# Training steps: forward, backward, clipping and AdamW


def small_model(model_type: str = "gpt2", n_layer: int = 8, n_embd: int = 512) -> RewardModel:
    torch.manual_seed(0)
    config = GPTConfig(
        model_type,
        vocab_size=VOCAB_SIZE,
        n_positions=MAX_SEQ_LEN,
        n_layer=n_layer,
        n_embd=n_embd,
        n_head=n_embd // 64,
    )
    return RewardModel(GPT(config), pad_id=0)


@dataclass
class Ours:
    """A model of ours and its training step, as the loop of train.py takes it."""

    model: torch.nn.Module
    layout: str = "packed"
    dtype: str = "fp32"
    pad_to: int | None = None  # tokens that padded rows are filled up to; None: the longest row
    at_once: int | None = None  # comparisons of a micro-batch; None: all
    optimizer: torch.optim.Optimizer | None = None  # of the same weights; None: an AdamW

    def __post_init__(self):
        self.parameters = list(self.model.parameters())
        self.device = self.parameters[0].device
        if self.optimizer is None:
            self.optimizer = torch.optim.AdamW(
                self.parameters, lr=1e-5, betas=(0.9, 0.95), fused=True
            )

    def collate(self, groups: list) -> tuple[tuple, int]:
        """Return the model's arguments and the number of tokens that it computes on."""
        comparisons = [data.Tokenized(group) for group in groups]
        inputs, tokens = train.collate(comparisons, self.model, self.layout, self.device)
        if self.pad_to:
            ids, mask, *rest = inputs
            missing = (0, self.pad_to - ids.shape[1])
            inputs = (F.pad(ids, missing), F.pad(mask, missing), *rest)
            tokens = inputs[0].numel()
        return inputs, tokens

    def run(self, inputs: tuple) -> dict[str, torch.Tensor]:
        """Compute the loss, by this name, and perhaps scores, as `pairwise_loss` does."""
        return self.model(*inputs)

    def micro_batches(self, groups: list) -> Iterator[tuple[tuple, int, float]]:
        """Yield the model's arguments, the tokens and the share of the step, by micro-batch."""
        size = self.at_once or len(groups)
        for start in range(0, len(groups), size):
            part = groups[start : start + size]
            yield *self.collate(part), len(part) / len(groups)

    def forward_backward(self, groups: list) -> tuple[torch.Tensor, int]:
        """Add up the gradients of a step. Returns its loss and its tokens."""
        return self.backward(self.micro_batches(groups))

    def backward(self, micro_batches: Iterable) -> tuple[torch.Tensor, int]:
        """Do as `forward_backward`, with the micro-batches of a step."""
        losses, tokens = [], 0
        for inputs, count, share in micro_batches:
            with train.autocast(self.dtype, self.device):
                loss = self.run(inputs)["loss"] * share
            loss.backward()
            losses.append(loss.detach())
            tokens += count
        return torch.stack(losses).double().sum(), tokens

    def clip(self) -> torch.Tensor:
        return torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)

    def update(self):
        self.optimizer.step()
        self.optimizer.zero_grad()

    def step(self, groups: list) -> int:
        """Take a step. Returns its tokens. Raises ValueError where loss or norm is not finite."""
        loss, tokens = self.forward_backward(groups)
        norm = self.clip().item()
        check_finite(loss.item(), norm)
        self.update()
        return tokens

    def steps(self, batches: list) -> Iterator[int]:
        """Take a step on each batch, and yield its tokens."""
        return map(self.step, batches)


def check_finite(loss: float, norm: float):
    if not math.isfinite(loss + norm):
        raise ValueError(f"loss {loss}, norm of the gradient {norm}: not finite")


class TransformersOPT(Ours):
    """An OPT of transformers, with a value head and the reference loop of rm.py as its loss."""

    def __init__(self, config: dict, device: str | torch.device = "cpu", **how):
        import transformers

        torch.manual_seed(0)
        config |= {"dropout": 0.0, "pad_token_id": 0, "attn_implementation": "sdpa"}
        config = transformers.OPTConfig(**config)
        model = torch.nn.Module()
        with torch.device(device):
            model.backbone = transformers.OPTModel(config)
            model.v_head = torch.nn.Linear(config.word_embed_proj_dim, 1, bias=False)
        model.pad_id = config.pad_token_id
        super().__init__(model, "padded", **how)

    def run(self, inputs):
        ids, mask, *_ = inputs
        hidden = self.model.backbone(ids, attention_mask=mask).last_hidden_state
        with torch.autocast(self.device.type, enabled=False):
            rewards = self.model.v_head(hidden.float()).squeeze(-1)
        return pairwise_loss(ids, rewards, self.model.pad_id, attention_mask=mask)


class TRL:
    """The RewardTrainer of TRL: its collator, its training_step, the optimizer that it makes."""

    def __init__(self):
        import datasets
        import tokenizers
        import transformers
        import trl

        torch.manual_seed(0)
        transformers.logging.set_verbosity_error()
        config = transformers.GPT2Config(**SHAPES["small GPT-2"], num_labels=1)
        words = {"<pad>": 0, "<s>": 1, "</s>": 2}
        words = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<pad>"))
        tokenizer = transformers.PreTrainedTokenizerFast(
            tokenizer_object=words, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
        )
        arguments = trl.RewardConfig(
            output_dir=tempfile.mkdtemp(),
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            report_to=[],
            max_length=MAX_SEQ_LEN,
            per_device_train_batch_size=8,
            learning_rate=1e-5,
            disable_tqdm=True,
        )
        rows = [{"chosen_ids": [3, 4], "rejected_ids": [3, 5]}]
        self.trainer = trl.RewardTrainer(
            transformers.GPT2ForSequenceClassification(config),
            arguments,
            processing_class=tokenizer,
            train_dataset=datasets.Dataset.from_list(rows),
        )
        # Its loop, which we do not run, sets this.
        self.trainer.current_gradient_accumulation_steps = 1
        self.model = self.trainer.model.train()
        self.optimizer = self.trainer.create_optimizer()

    def step(self, groups):
        batch = self.trainer.data_collator(
            [{"chosen_ids": chosen, "rejected_ids": rejected} for chosen, rejected in groups]
        )
        self.trainer.training_step(self.model, batch)
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()


def seconds(function: Callable, *arguments) -> float:
    start = time.perf_counter()
    function(*arguments)
    return time.perf_counter() - start


def compare(name: str, goal: str, ours, theirs, batches: list, their_batches: list | None = None):
    """Print how many times as long a step of theirs takes, in turns, on the same comparisons."""
    their_batches = their_batches or batches
    ours.step(batches[0])  # the first step allocates
    theirs.step(their_batches[0])
    our_times, their_times = [], []
    for our_batch, their_batch in zip(batches, their_batches):
        our_times.append(seconds(ours.step, our_batch))
        their_times.append(seconds(theirs.step, their_batch))
    ratios = [their_time / our_time for our_time, their_time in zip(our_times, their_times)]
    medians = f"{statistics.median(their_times):.2f} s | {statistics.median(our_times):.2f} s"
    print(f"| {name} | {spread(ratios, ' x')} | {goal} | {medians} |", flush=True)


def bench_steps(rounds: int):
    torch.set_num_threads(2)
    batches = random_batches(rounds, 8)
    tokens = [sum(map(packed_size, batch)) for batch in batches]
    mean = f"{statistics.mean(tokens):.0f} packed tokens each on average"
    print(f"{counted(rounds, 'batch', 'batches')} of 8 pairs, {mean}\n")
    first = "a training step of ours, packed, is faster than"
    table_head(first, "median (range)", "goal", "their step", "our step")
    packed = Ours(small_model())
    half = batches[: (rounds + 1) // 2]  # where a step takes long
    padded = Ours(small_model(), "padded", pad_to=MAX_SEQ_LEN)
    name = "our own padded path at max_seq_len (DeepSpeed-Chat's layout)"
    compare(name, "5.5 x", packed, padded, half)
    padded = Ours(small_model(), "padded")
    name = "our own padded path at the batch's longest (TRL's layout)"
    compare(name, "4.5 x", packed, padded, batches)
    name = "an OPT of transformers, padded to max_seq_len, with the reference loop (ours: opt)"
    theirs = TransformersOPT(SHAPES["small OPT"], pad_to=MAX_SEQ_LEN)
    compare(name, "6 x", Ours(small_model("opt")), theirs, half)
    has_trl = importlib.util.find_spec("trl") is not None
    if has_trl:
        compare("TRL's RewardTrainer", "4.5 x", packed, TRL(), batches)
    else:
        print("| TRL's RewardTrainer | not installed | 4.5 x | | |")
    rng = random.Random(0)
    rankings = [[random_ranking(4, 64, rng) for _ in range(4)] for _ in half]
    pairs = []
    for batch in rankings:
        both = [itertools.combinations(ranking, 2) for ranking in batch]
        pairs.append([list(pair) for pair in itertools.chain(*both)])
    name = "rankings of 4: the same six pairs packed one by one"
    compare(name, "3.3 x", packed, packed, rankings, pairs)
    print_share_of_peak(half, tokens)
    if has_trl:
        ours, trl = (measure(STEPS, name)[0] for name in ("ours", "TRL"))
        print(
            f"peak memory, above that before the model is made: ours {ours / 1e6:.0f} MB, "
            f"TRL {trl / 1e6:.0f} MB, ratio {ours / trl:.2f}; goal 0.5"
        )


def non_embedding(model: torch.nn.Module) -> int:
    """Count the parameters of a model, without its embeddings."""
    named = model.named_parameters()
    return sum(weight.numel() for name, weight in named if "embed" not in name)


def print_share_of_peak(batches: list, tokens: list[int]):
    """Print which share of torch.mm's FLOP/s a step of a larger model reaches."""
    large = Ours(small_model(n_layer=12, n_embd=768))
    weights = non_embedding(large.model)
    a, b = torch.randn(4096, 4096), torch.randn(4096, 4096)
    large.step(batches[0])
    torch.mm(a, b)
    shares = []
    for batch, count in zip(batches, tokens):
        peak = 2 * 4096**3 / min(seconds(torch.mm, a, b) for _ in range(3))
        shares.append(6 * weights * count / seconds(large.step, batch) / peak)
    print(
        f"\nshare of the matmul peak ({peak / 1e9:.0f} GFLOP/s by torch.mm 4096^3), 12 layers x "
        f"768: median {spread(shares)}; goal 0.8",
        flush=True,
    )


STEPS = "import sys; from tools.bench import steps_in_child; steps_in_child(sys.argv[1])"


def steps_in_child(name: str):
    """Take steps in a process of its own, for `measure`; all imports come before."""
    torch.set_num_threads(2)
    if name == "TRL":
        import datasets  # noqa: F401
        import tokenizers  # noqa: F401
        import transformers
        import trl

        _ = trl.RewardTrainer, transformers.GPT2ForSequenceClassification
    print(anonymous_memory(Path("/proc/self/status").read_text()), flush=True)
    sys.stdin.readline()
    contestant = TRL() if name == "TRL" else Ours(small_model())
    for batch in random_batches(6, 8):
        contestant.step(batch)
    print("done", flush=True)
    sys.stdin.readline()
    print("ended")


# --------------------------------------------------------------------------------------------------
# Processes


def train_rank():
    """Train as a rank, by the loop's own division of a batch; rank 0 prints pairs a second.

    A step has 16 pairs over all ranks.
    """
    process = Process.start(False, 600.0)
    ours = Ours(small_model())
    replica = train.distribute(ours.model, 0, False, process)
    batches = random_batches(8, 16)

    def step(groups):
        batch = [data.Tokenized(group) for group in groups]
        (comparisons,) = share_of(batch, "packed", None, 10**9, process, False)
        inputs, _ = ours.collate([comparison.sequences for comparison in comparisons])
        share = len(comparisons) / len(batch) * process.world_size
        (replica(*inputs)["loss"] * share).backward()
        ours.clip()
        ours.update()

    step(batches[0])
    step(batches[1])
    process.wait()
    took = sum(seconds(step, batch) for batch in batches)
    process.print(f"{sum(map(len, batches)) / took:.4f}")
    process.wait()


def bench_ranks(rounds: int):
    kinds = {1: "one process of two threads", 2: "two processes of one thread"}
    speeds = {1: [], 2: []}
    for _ in range(rounds):
        for ranks, found in speeds.items():
            command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
            command += [f"--nproc_per_node={ranks}", "-m", "tools.bench", "rank"]
            done = subprocess.run(
                command,
                cwd=HERE.parent,
                env=os.environ | {"OMP_NUM_THREADS": str(2 // ranks)},
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
                check=True,
            )
            found.append(float(done.stdout.split()[0]))
    for ranks, name in kinds.items():
        print(f"{name}: median {spread(speeds[ranks], ' pairs/s')}")
    ratios = [two / one for one, two in zip(speeds[1], speeds[2])]
    print(f"ratio: median {spread(ratios, digits=3)}; goal 0.95")


# --------------------------------------------------------------------------------------------------
# On a GPU

# FLOP/s in dense bf16 by the datasheets. The first name that is in the device's own name counts.
PEAKS = {"H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12, "H200": 989e12, "A100": 312e12}


def dense_peak(device: torch.device) -> tuple[float, str]:
    """Return the FLOP/s of a device in dense bf16, and where the figure is from."""
    if device.type == "cuda":
        for name, flops in PEAKS.items():
            if name in torch.cuda.get_device_name(device):
                return flops, "by the datasheet"
    return dry_run.measured_flops("bf16"), "by torch.mm"


def random_model(config: GPTConfig, device: torch.device) -> RewardModel:
    """Make a model of random weights on a device, always the same one."""
    torch.manual_seed(0)
    with torch.device(device):
        model = RewardModel(GPT(config), 1, int(config.model_type == "opt"))
    torch.nn.init.normal_(model.v_head.weight, std=0.02)
    return model


def compiled(model: RewardModel) -> RewardModel:
    """Return a model of the same weights, in the same memory, whose blocks are compiled.

    On a CPU the graphs are run as they are: code for them would take minutes.
    Graphs of earlier models are forgotten, as PyTorch keeps 8 of a function.
    """
    torch.compiler.reset()
    with torch.device("meta"):
        twin = RewardModel(GPT(model.backbone.config), model.pad_id, model.num_padding_at_beginning)
    twin.load_state_dict(model.state_dict(keep_vars=True), assign=True)
    on_gpu = model.v_head.weight.is_cuda
    compile_blocks(twin.backbone.blocks, "inductor" if on_gpu else "eager")
    return twin


def contestants_of(config: GPTConfig, device: torch.device) -> dict[str, Ours]:
    """Make what is compared on a GPU, all in bf16: ours, which share their weights, and OPT's."""
    model = random_model(config, device)
    packed = Ours(model, dtype="bf16")
    shared = {"dtype": "bf16", "optimizer": packed.optimizer}
    found = {
        "packed": packed,
        "packed, --compile": Ours(compiled(model), **shared),
        # 64 padded pairs at once would need more memory than most GPUs have.
        "padded": Ours(model, "padded", at_once=16, **shared),
    }
    if config.model_type == "opt":
        theirs = TransformersOPT(config.to_hf(), device, dtype="bf16", at_once=16)
        found["transformers, padded"] = theirs
    return found


def wait_for(device: torch.device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def free():
    """Give back the memory of models that are gone."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@dataclass
class Turn:
    """Steps of a contestant, from an idle device to an idle device."""

    seconds: float
    tokens: int
    peak: int  # bytes allocated above those before
    graphs: int  # that torch.compile made meanwhile

    @classmethod
    def of(cls, contestant: Ours, batches: list) -> "Turn":
        """Take a step on each batch."""
        device = contestant.device
        stats = torch._dynamo.utils.counters["stats"]
        graphs, before, peak = stats["unique_graphs"], 0, 0
        wait_for(device)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            before = torch.cuda.memory_allocated(device)
        start = time.perf_counter()
        tokens = sum(contestant.steps(batches))
        wait_for(device)
        took = time.perf_counter() - start
        if device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(device) - before
        return cls(took, tokens, peak, stats["unique_graphs"] - graphs)


def in_turns(contestants: dict[str, Ours], batches: list, rounds: int, peak: float) -> dict:
    """Let each contestant take a turn on the batches, `rounds` times after one that warms up.

    peak: FLOP/s of the device.
    Returns the figures of each contestant, or its traceback as `failed`.
    """
    turns, found = {name: [] for name in contestants}, {}
    for _ in range(rounds + 1):
        for name, contestant in contestants.items():
            if name in found:
                continue
            try:
                turns[name].append(Turn.of(contestant, batches))
            except Exception:
                found[name] = {"failed": traceback.format_exc()}
                contestant.optimizer.zero_grad()
                free()
    for name, contestant in contestants.items():
        if name not in found:
            found[name] = figures(contestant, batches, turns[name], peak)
    return {name: found[name] for name in contestants}


def figures(contestant: Ours, batches: list, turns: list[Turn], peak: float) -> dict[str, float]:
    """Compute a contestant's figures from its turns, the first of which warmed up."""
    warm_up, *measured = turns
    steps = len(batches) * len(measured)
    took = sum(turn.seconds for turn in measured)
    tokens = sum(turn.tokens for turn in measured)
    speeds = [sum(map(len, batches)) / turn.seconds for turn in measured]
    # Weights and AdamW's two moments stay; gradients and activations come and go.
    weights = sum(parameter.nbytes for parameter in contestant.parameters)
    return {
        "pairs/s": statistics.median(speeds),
        "lowest": min(speeds),
        "highest": max(speeds),
        "ms a step": took / steps * 1e3,
        "tokens a step": tokens / steps,
        "share of peak": 6 * non_embedding(contestant.model) * tokens / took / peak,
        "peak GB": (3 * weights + max(turn.peak for turn in measured)) / 1e9,
        "seconds of warm-up": warm_up.seconds,
        "graphs": warm_up.graphs,
        "graphs later": sum(turn.graphs for turn in measured),
    }


def bench_device(device: torch.device, rounds: int, configs: dict, sizes=(16, 64, 128)):
    """Print the table of a device: training steps in bf16 of models with these configs."""
    peak, source = dense_peak(device)
    name = str(device)
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    print(f"{name}, {peak / 1e12:.4g} TFLOP/s {source}; PyTorch {torch.__version__}\n")
    columns = "pairs/s (range)", "ms a step", "share of the peak", "peak memory"
    table_head("model", "pairs a step", "layout", *columns)
    for shape, config in configs.items():
        contestants = contestants_of(config, device)
        for size in sizes:
            found = in_turns(contestants, random_batches(4, size), rounds, peak)
            for contestant, numbers in found.items():
                print(f"| {shape} | {size} | {contestant} | {in_a_row(numbers)} |", flush=True)
        contestants = None
        free()


def in_a_row(numbers: dict) -> str:
    """Write the figures of `in_turns` as the last cells of a row."""
    if "failed" in numbers:
        return f"{numbers['failed'].splitlines()[-1][:100]} | | |"
    speeds = f"{numbers['pairs/s']:.0f} ({numbers['lowest']:.0f} to {numbers['highest']:.0f})"
    memory = f"{numbers['peak GB']:.1f} GB"
    return f"{speeds} | {numbers['ms a step']:.1f} | {numbers['share of peak']:.3f} | {memory}"


def device_of(name: str, what: str) -> torch.device:
    """Check --device. Raises ValueError where it cannot be measured."""
    if what != "steps":
        raise ValueError(f"--device {name}: found beside `{what}`, which measures CPUs alone")
    if not torch.cuda.is_available():
        raise ValueError(
            f"--device {name}: PyTorch {torch.__version__} finds no GPU; leave the flag out to "
            "measure the CPU"
        )
    return torch.device(name)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    programs = {"steps": bench_steps, "ranks": bench_ranks, "load": bench_load}
    choices = (*programs, "rank")  # rank: one process of `ranks`
    what = "{steps,ranks,load}"
    parser.add_argument("what", nargs="?", choices=choices, default="steps", metavar=what)
    parser.add_argument(
        "--rounds", type=int, default=8, help="how often each is measured, in turns (8)"
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="(cpu)")
    args = parser.parse_args()
    if args.what == "rank":
        train_rank()
        return
    program = programs[args.what]
    if args.device != "cpu":
        try:
            device = device_of(args.device, args.what)
        except ValueError as error:
            sys.exit(f"bench: error: {error}")
        shapes = "OPT-350m", "TinyLlama 1.1B"
        configs = {shape: GPTConfig.from_hf(SHAPES[shape], shape) for shape in shapes}
        program = partial(bench_device, device, configs=configs)
    took = seconds(program, args.rounds)
    print(f"{took:.0f} s")


if __name__ == "__main__":
    main()
