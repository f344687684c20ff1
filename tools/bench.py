"""Speed and memory beside other implementations: everything that is compared is measured in turns, in one run.

    python -m tools.bench             a training step in the packed layout, beside the padded ones, transformers and TRL
    python -m tools.bench ranks       two processes of one thread beside one process of two threads
    python -m tools.bench load        checkpoints of real shapes with random weights: our loading beside transformers'

Needs requirements-dev.txt; TRL where `pip install trl==1.16.0` has put it. The figures in README.md are from here.
"""

import argparse
import importlib.util
import itertools
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

import data
import train
from model import GPT, GPTConfig
from parts.packed import packed_size
from rm import RewardModel, pairwise_loss

# --------------------------------------------------------------------------------------------------
# Loading


SHAPES = {  # the config.json of facebook/opt-350m and openai-community/gpt2; a llama in the shape of Llama 3.2 1B
    "OPT-350m": dict(
        model_type="opt",
        vocab_size=50272,
        hidden_size=1024,
        ffn_dim=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        word_embed_proj_dim=512,
        max_position_embeddings=2048,
        do_layer_norm_before=False,
    ),
    "GPT-2 124M": dict(model_type="gpt2"),
    "llama 1B": dict(
        model_type="llama",
        vocab_size=128256,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=64,
        max_position_embeddings=131072,
        tie_word_embeddings=True,
    ),
}
TINY = {  # of the same classes, made before the clock starts: transformers imports them when they are first used
    "opt": dict(
        vocab_size=8,
        hidden_size=8,
        ffn_dim=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        word_embed_proj_dim=4,
        pad_token_id=1,
    ),
    "gpt2": dict(vocab_size=8, n_embd=8, n_layer=1, n_head=1),
    "llama": dict(
        vocab_size=8,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
    ),
}
LOADERS = {  # the backbone alone, and with a fresh head; ours then also has a row for a new pad id in its embedding
    "GPT (ours)": "model.GPT.from_pretrained(path)",
    "AutoModel": "transformers.AutoModel.from_pretrained(path)",
    "RewardModel (ours)": "rm.RewardModel.from_pretrained(path).backbone",
    "AutoModelForSequenceClassification": "transformers.AutoModelForSequenceClassification.from_pretrained(path, num_labels=1).base_model",
}


# The programs below run in processes of their own, and begin with this.
MEMORY = """
import re, select, sys, json, time
def anonymous_memory(pid="self"):  # bytes that no file stands behind
    return 1024 * int(re.search(r"RssAnon:\\s+(\\d+)", open(f"/proc/{pid}/status").read())[1])
"""

# The first line that it prints says how much memory it has after `import torch`, the last one how long loading took, and how
# long until a first forward pass was done: a loader may map the file and leave the reading of it to that pass. Imports are
# not counted.
LOAD = (
    MEMORY
    + """
import torch
base = anonymous_memory()
from tools.bench import LOADERS
loader, path = sys.argv[1:]
if "ours" in loader:
    import model, rm
else:
    import transformers
    transformers.logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()
    transformers.AutoModelForSequenceClassification.from_config(transformers.AutoConfig.for_model(**json.load(open(path + "/tiny.json"))))
print(base, flush=True)
sys.stdin.readline()
start = time.perf_counter()
backbone = eval(LOADERS[loader])
loaded = time.perf_counter() - start
print("loaded", flush=True)
sys.stdin.readline()
start = time.perf_counter()
with torch.no_grad():
    backbone(torch.arange(8)[None])
print(json.dumps([loaded, loaded + time.perf_counter() - start]), flush=True)
"""
)

# Samples the memory of another process every millisecond, from its first line on standard input to its second.
SAMPLE = (
    MEMORY
    + """
peak = anonymous_memory(sys.argv[1])
print(flush=True)
while not select.select([sys.stdin], [], [], 0.001)[0]:
    peak = max(peak, anonymous_memory(sys.argv[1]))
print(max(peak, anonymous_memory(sys.argv[1])))
"""
)


def measure(program: str, *arguments) -> tuple[int, str]:
    """Run a program that prints its memory, waits for a line, works, prints a line, waits for one, and prints its result.

    Returns the peak of its anonymous memory, above what it printed, while it worked; and the result.
    """
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    with subprocess.Popen([sys.executable, "-c", program, *arguments], **pipes) as child:
        base = int(child.stdout.readline())
        with subprocess.Popen([sys.executable, "-c", SAMPLE, str(child.pid)], **pipes) as sampler:
            sampler.stdout.readline()
            print(file=child.stdin, flush=True)
            child.stdout.readline()
            peak = int(sampler.communicate("\n")[0])
        return peak - base, child.communicate("\n")[0]


def measure_load(loader: str, path: Path) -> tuple[float, float, int]:
    """Seconds until loaded, seconds until the first forward pass of 8 tokens is done, peak of anonymous memory until loaded."""
    peak, result = measure(LOAD, loader, str(path))
    loaded, used = json.loads(result)
    return loaded, used, peak


def make_checkpoint(config: dict, path: Path):
    subprocess.run(
        [
            sys.executable,
            "-c",
            "import sys, json, transformers as t\nconfig = json.loads(sys.argv[1])\n"
            "t.AutoModel.from_config(t.AutoConfig.for_model(**config)).save_pretrained(sys.argv[2])",
            json.dumps(config),
            path,
        ],
        check=True,
        stderr=subprocess.DEVNULL,
    )


def bench_load(rounds: int):
    print(
        "| checkpoint | weights, float32 | loader | load | load and first forward | peak anonymous memory / weights |\n"
        + "| --- " * 6
        + "|"
    )
    for name, config in SHAPES.items():
        with tempfile.TemporaryDirectory() as directory:
            make_checkpoint(config, Path(directory))
            (Path(directory) / "tiny.json").write_text(
                json.dumps(config | TINY[config["model_type"]])
            )
            size = sum(file.stat().st_size for file in Path(directory).glob("*.safetensors"))
            runs = {loader: [] for loader in LOADERS}
            for _ in range(rounds):
                for loader in LOADERS:
                    runs[loader].append(measure_load(loader, Path(directory)))
        for loader, results in runs.items():
            loaded, used, peak = zip(*results)
            print(
                f"| {name} | {size / 1e9:.2f} GB | {loader} | {statistics.median(loaded):.2f} s ({min(loaded):.2f} to {max(loaded):.2f}) "
                f"| {statistics.median(used):.2f} s ({min(used):.2f} to {max(used):.2f}) | {max(peak) / size:.3f} |",
                flush=True,
            )


# --------------------------------------------------------------------------------------------------
# Training steps: forward, backward, clipping and AdamW, on pairs with the lengths of hh-harmless


VOCAB_SIZE, MAX_SEQ_LEN = 8000, 512
LENGTHS = (
    Path(__file__).parent / "hh_harmless_lengths.csv"
)  # prefix and tails of 1,500 pairs, in tokens of a BPE of 8,000


def random_batches(batches: int, size: int) -> list[list[list[list[int]]]]:
    """Batches of pairs of random ids with the lengths of real ones, the left side truncated as train.py does.

    The lengths are a systematic sample: of all pairs in the order of their tokens every so many-th, shuffled.
    """
    rng, lengths = random.Random(0), []
    for row in LENGTHS.read_text().split()[1:]:
        prefix, chosen, rejected = map(int, row.split(","))
        prefix = max(0, min(prefix, MAX_SEQ_LEN - max(chosen, rejected)))
        lengths.append(
            (prefix, min(chosen, MAX_SEQ_LEN - prefix), min(rejected, MAX_SEQ_LEN - prefix))
        )
    lengths.sort(key=lambda row: row[0] + 2 * max(row[1:]))
    sample = [
        lengths[int((i + 0.5) * len(lengths) / (batches * size))] for i in range(batches * size)
    ]
    rng.shuffle(sample)
    pairs = []
    for row in sample:
        trunk, *tails = ([rng.randrange(4, VOCAB_SIZE) for _ in range(n)] for n in row)
        tails[1][0] = tails[0][0] % (VOCAB_SIZE - 1) + 1  # they differ from there
        pairs.append([trunk + tail for tail in tails])
    return [pairs[i : i + size] for i in range(0, len(pairs), size)]


def random_ranking(responses: int, length: int, rng) -> list[list[int]]:
    trunk, *tails = (
        [rng.randrange(4, VOCAB_SIZE) for _ in range(length)] for _ in range(1 + responses)
    )
    return [trunk + [i + 1] + tail[1:] for i, tail in enumerate(tails)]


class Ours:
    """A model of ours and one training step of it, as train.py does it."""

    def __init__(self, layout: str, model_type="gpt2", pad_to=None, n_layer=8, n_embd=512):
        torch.manual_seed(0)
        config = GPTConfig(
            model_type,
            vocab_size=VOCAB_SIZE,
            n_positions=MAX_SEQ_LEN,
            n_layer=n_layer,
            n_embd=n_embd,
            n_head=n_embd // 64,
        )
        self.model, self.layout, self.pad_to = RewardModel(GPT(config), pad_id=0), layout, pad_to
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=1e-5, betas=(0.9, 0.95), fused=True
        )

    def inputs(self, groups):
        inputs, _ = train.collate(
            [data.Tokenized(group) for group in groups], self.model, self.layout, "cpu"
        )
        if self.pad_to:
            *rows, margins = inputs
            inputs = (
                *(torch.nn.functional.pad(x, (0, self.pad_to - x.shape[1])) for x in rows),
                margins,
            )
        return inputs

    def loss(self, groups):
        return self.model(*self.inputs(groups))["loss"]

    def step(self, groups):
        self.update(self.loss(groups))

    def update(self, loss):
        loss.backward()
        torch.nn.utils.clip_grad_norm_(
            [p for group in self.optimizer.param_groups for p in group["params"]], 1.0
        )
        self.optimizer.step()
        self.optimizer.zero_grad()


class TransformersOPT(Ours):
    """The backbone of transformers, with a value head and the reference loop of rm.py as its loss."""

    def __init__(self):
        import transformers

        super().__init__("padded", "opt", pad_to=MAX_SEQ_LEN)
        config = transformers.OPTConfig(
            vocab_size=VOCAB_SIZE,
            hidden_size=512,
            ffn_dim=2048,
            num_hidden_layers=8,
            num_attention_heads=8,
            word_embed_proj_dim=512,
            max_position_embeddings=MAX_SEQ_LEN,
            dropout=0.0,
            pad_token_id=0,
        )
        self.model.backbone.blocks, self.theirs = (
            torch.nn.ModuleList(),
            transformers.OPTModel(config),
        )
        self.optimizer = torch.optim.AdamW(
            [*self.theirs.parameters(), *self.model.v_head.parameters()],
            lr=1e-5,
            betas=(0.9, 0.95),
            fused=True,
        )

    def loss(self, groups):
        input_ids, mask, _ = self.inputs(groups)
        hidden = self.theirs(input_ids, attention_mask=mask).last_hidden_state
        return pairwise_loss(
            input_ids, self.model.v_head(hidden).squeeze(-1), 0, attention_mask=mask
        )["loss"]


class TRL:
    """The RewardTrainer of TRL: its collator, its training_step, the optimizer it makes."""

    def __init__(self):
        import datasets
        import tokenizers
        import transformers
        import trl

        torch.manual_seed(0)
        transformers.logging.set_verbosity_error()
        config = transformers.GPT2Config(
            vocab_size=VOCAB_SIZE,
            n_positions=MAX_SEQ_LEN,
            n_embd=512,
            n_layer=8,
            n_head=8,
            num_labels=1,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        )
        words = tokenizers.Tokenizer(
            tokenizers.models.WordLevel({"<pad>": 0, "<s>": 1, "</s>": 2}, unk_token="<pad>")
        )
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
        self.trainer = trl.RewardTrainer(
            transformers.GPT2ForSequenceClassification(config),
            arguments,
            processing_class=tokenizer,
            train_dataset=datasets.Dataset.from_list(
                [{"chosen_ids": [3, 4], "rejected_ids": [3, 5]}]
            ),
        )
        self.trainer.current_gradient_accumulation_steps = (
            1  # its loop, which we do not run, sets this
        )
        self.model, self.optimizer = self.trainer.model.train(), self.trainer.create_optimizer()

    def step(self, groups):
        batch = self.trainer.data_collator(
            [{"chosen_ids": chosen, "rejected_ids": rejected} for chosen, rejected in groups]
        )
        self.trainer.training_step(self.model, batch)
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()


def seconds(function, *arguments) -> float:
    start = time.perf_counter()
    function(*arguments)
    return time.perf_counter() - start


def compare(name: str, goal: str, ours, theirs, batches: list, their_batches: list | None = None):
    """Print how many times as long a step of theirs takes: both in turns on the same comparisons, the median of the ratios."""
    their_batches = their_batches or batches
    ours.step(batches[0]), theirs.step(their_batches[0])  # the first step allocates
    times = [
        (seconds(ours.step, a), seconds(theirs.step, b)) for a, b in zip(batches, their_batches)
    ]
    ratios = [b / a for a, b in times]
    a, b = (statistics.median(column) for column in zip(*times))
    print(
        f"| {name} | {statistics.median(ratios):.2f} x ({min(ratios):.2f} to {max(ratios):.2f}) | {goal} | {b:.2f} s | {a:.2f} s |",
        flush=True,
    )


def bench_steps(rounds: int):
    torch.set_num_threads(2)
    batches = random_batches(rounds, 8)
    tokens = [sum(map(packed_size, batch)) for batch in batches]
    print(
        f"{rounds} batches of 8 pairs, {statistics.mean(tokens):.0f} packed tokens each on average\n"
    )
    print(
        "| a training step of ours, packed, is faster than | median (range) | goal | their step | our step |\n"
        + "| --- " * 5
        + "|"
    )
    packed, half = (
        Ours("packed"),
        batches[: (rounds + 1) // 2],
    )  # half of them where a step takes long
    compare(
        "our own padded path at max_seq_len (DeepSpeed-Chat's layout)",
        "5.5 x",
        packed,
        Ours("padded", pad_to=MAX_SEQ_LEN),
        half,
    )
    compare(
        "our own padded path at the batch's longest (TRL's layout)",
        "4.5 x",
        packed,
        Ours("padded"),
        batches,
    )
    compare(
        "an OPT of transformers, padded to max_seq_len, with the reference loop (ours: opt)",
        "6 x",
        Ours("packed", "opt"),
        TransformersOPT(),
        half,
    )
    if importlib.util.find_spec("trl"):
        compare("TRL's RewardTrainer", "4.5 x", packed, TRL(), batches)
    else:
        print("| TRL's RewardTrainer | not installed | 4.5 x | | |")
    rng = random.Random(0)
    rankings = [[random_ranking(4, 64, rng) for _ in range(4)] for _ in half]
    pairs = [
        [list(pair) for ranking in batch for pair in itertools.combinations(ranking, 2)]
        for batch in rankings
    ]
    compare(
        "rankings of 4: the same six pairs packed one by one",
        "3.3 x",
        packed,
        packed,
        rankings,
        pairs,
    )

    large = Ours("packed", n_layer=12, n_embd=768)
    weights = sum(p.numel() for name, p in large.model.named_parameters() if "embed" not in name)
    a, b = torch.randn(4096, 4096), torch.randn(4096, 4096)
    large.step(batches[0]), torch.mm(a, b)
    shares = []
    for batch, count in zip(half, tokens):
        peak = 2 * 4096**3 / min(seconds(torch.mm, a, b) for _ in range(3))
        shares.append(6 * weights * count / seconds(large.step, batch) / peak)
    print(
        f"\nshare of the matmul peak ({peak / 1e9:.0f} GFLOP/s by torch.mm 4096^3), 12 layers x 768: median {statistics.median(shares):.2f} "
        f"({min(shares):.2f} to {max(shares):.2f}); goal 0.8",
        flush=True,
    )
    if importlib.util.find_spec("trl"):
        (ours, _), (trl, _) = (
            measure(STEP, contestant) for contestant in ("Ours('packed')", "TRL()")
        )
        print(
            f"peak memory, above that before the model is made: ours {ours / 1e6:.0f} MB, TRL {trl / 1e6:.0f} MB, ratio {ours / trl:.2f}; goal 0.5"
        )


# Imports come before the first line that it prints, the model after it.
STEP = (
    MEMORY
    + """
from tools.bench import *
torch.set_num_threads(2)
if "TRL" in sys.argv[1]:
    import trl, transformers, datasets, tokenizers
    trl.RewardTrainer, transformers.GPT2ForSequenceClassification
print(anonymous_memory(), flush=True)
sys.stdin.readline()
contestant = eval(sys.argv[1])
for batch in random_batches(6, 8):
    contestant.step(batch)
print("done", flush=True)
sys.stdin.readline()
print("ended")
"""
)


# --------------------------------------------------------------------------------------------------
# Processes


# A rank: the loop's own division of a batch and averaging of gradients, 16 pairs a step over all ranks. Rank 0 prints pairs a second.
RANK = """
import argparse
from tools.bench import *
args = argparse.Namespace(layout="packed", zero_stage=0, process_timeout=600.0)
process = train.Process.start(args)
ours, batches = Ours("packed"), random_batches(8, 16)
trained = train.distribute(ours.model, args, process)
def step(batch):
    (chunk,) = train.divide([data.Tokenized(pair) for pair in batch], 10**9, args, process)
    loss = trained(*ours.inputs([batch[i] for i in chunk]))["loss"] * (len(chunk) / len(batch) * process.world_size)
    ours.update(loss)
step(batches[0]), step(batches[1])
process.wait()
took = sum(seconds(step, batch) for batch in batches)
process.print(f"{sum(map(len, batches)) / took:.4f}")
process.wait()
"""


def bench_ranks(rounds: int):
    kinds, speeds = (
        {1: "one process of two threads", 2: "two processes of one thread"},
        {1: [], 2: []},
    )
    with tempfile.NamedTemporaryFile("w", suffix=".py") as program:
        program.write(RANK)
        program.flush()
        for _ in range(rounds):
            for ranks in kinds:
                done = subprocess.run(
                    [
                        sys.executable,
                        "-m",
                        "torch.distributed.run",
                        "--standalone",
                        f"--nproc_per_node={ranks}",
                        program.name,
                    ],
                    env=os.environ
                    | {
                        "OMP_NUM_THREADS": str(2 // ranks),
                        "PYTHONPATH": str(Path(__file__).parents[1]),
                    },
                    stdout=subprocess.PIPE,
                    stderr=subprocess.DEVNULL,
                    text=True,
                    check=True,
                )
                speeds[ranks].append(float(done.stdout.split()[-1]))
    for ranks, name in kinds.items():
        print(
            f"{name}: median {statistics.median(speeds[ranks]):.2f} pairs/s ({min(speeds[ranks]):.2f} to {max(speeds[ranks]):.2f})"
        )
    ratios = [two / one for one, two in zip(speeds[1], speeds[2])]
    print(
        f"ratio: median {statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f}); goal 0.95"
    )


def main():
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("what", nargs="?", choices=("steps", "ranks", "load"), default="steps")
    parser.add_argument(
        "--rounds", type=int, default=8, help="how often each is measured, in turns (8)"
    )
    args = parser.parse_args()
    start = time.perf_counter()
    {"steps": bench_steps, "ranks": bench_ranks, "load": bench_load}[args.what](args.rounds)
    print(f"{time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
