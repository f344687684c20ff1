"""Goldens: numbers that the code computed before its redesign, and that it is to compute after it.

    python test_goldens.py --write      compute all of them anew, and write testdata/goldens.json

Each kind of golden has one function here that computes it; --write and the tests both call it. The
file was written at commit c0e6c6a, on a CPU with AVX-512, with one thread.

Data, batches and token ids are compared exactly; sums of fresh weights and curves of training to
TOLERANCE. Measured: with two threads, and with PyTorch's AVX2 kernels, the sums are the same and
the curves differ by up to 2e-15. Without AVX2, PyTorch draws other normal numbers from a seed.
"""

import hashlib
import itertools
import json
import math
import multiprocessing
import os
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before PyTorch is imported; as conftest.py does

import pytest
import torch

import data
import train
from model import GPT, GPTConfig
from rm import RewardModel

FILE = Path(__file__).parent / "testdata" / "goldens.json"
TOLERANCE = 1e-12  # relative; for curves, absolute where a number is below 1
NEEDS_AVX2 = pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"),
    reason="without AVX2, PyTorch draws other normal numbers from a seed",
)

# --------------------------------------------------------------------------------------------------
# The built-in data, by the seed of its stream: 0 for the eval set, 1 + --seed for training

STREAMS = {"eval": 0, "training, --seed 1234": 1235}


def known_rewards(case: str) -> list:
    """List [prompt, responses, rewards] of the first 20 comparisons of a stream."""
    stream = itertools.islice(data.known_rewards(STREAMS[case]), 20)
    return [[pair.prompt, pair.responses, pair.rewards] for pair in stream]


@pytest.mark.parametrize("case", STREAMS)
def test_built_in_data(case):
    assert known_rewards(case) == golden("known_rewards", case)


# --------------------------------------------------------------------------------------------------
# Batches: (comparisons, comparisons in a global batch, seed, optimizer steps)

BATCHES = {
    "n 10, batch 4: ragged": (10, 4, 5, range(7)),
    "n 67, batch 12: ragged": (67, 12, 1234, [0, 4, 5, 6, 11, 12, 599]),
    "n 64, batch 16: even": (64, 16, 0, [0, 3, 4, 7, 400]),
    "n 5, batch 8: one batch an epoch": (5, 8, 1, range(4)),
    "n 30, batch 30, largest seed": (30, 30, 2**32 - 1, [0, 1]),
    "n 9, batch 1": (9, 1, 2, range(20)),
}


def batches(case: str) -> list[list[int]]:
    """List for each step the indices of its comparisons, in their order."""
    n, global_batch, seed, steps = BATCHES[case]
    return [train.batch_indices(n, global_batch, seed, step).tolist() for step in steps]


@pytest.mark.parametrize("case", BATCHES)
def test_batches(case):
    assert batches(case) == golden("batches", case)


# --------------------------------------------------------------------------------------------------
# Fresh weights

TINY = dict(vocab_size=41, n_positions=24, n_layer=2, n_head=4, n_embd=32)
CONFIGS = {
    "gpt2": dict(model_type="gpt2"),
    "opt": dict(model_type="opt"),
    "opt, post-norm, embed_dim": dict(model_type="opt", pre_norm=False, embed_dim=16),
    "llama": dict(model_type="llama"),
    "llama, n_kv_head": dict(model_type="llama", n_kv_head=2),
}


def fresh_weights(case: str) -> list:
    """List [shape, sum, sum of squares] of every weight of a new model, in the model's order.

    The weights are float32, the sums float64, and independent of the order of adding.
    """
    torch.manual_seed(1234)
    model = RewardModel(GPT(GPTConfig(**CONFIGS[case], **TINY)), 0)
    result = []
    for weight in model.parameters():
        values = weight.detach().double().flatten().tolist()
        squares = [value * value for value in values]
        result.append([list(weight.shape), math.fsum(values), math.fsum(squares)])
    return result


@NEEDS_AVX2
@pytest.mark.parametrize("case", CONFIGS)
def test_fresh_weights(case):
    ours = fresh_weights(case)
    theirs = golden("fresh_weights", case)
    assert [shape for shape, *_ in ours] == [shape for shape, *_ in theirs]
    for sums, expected in zip(ours, theirs):
        assert sums[1:] == pytest.approx(expected[1:], rel=TOLERANCE, abs=0)


# --------------------------------------------------------------------------------------------------
# Token ids, by a tokenizer of at most 500 ids: (longest sequence, side that is cut)

TRUNCATIONS = {"whole": (64, "left"), "left": (32, "left"), "right": (32, "right")}


def token_ids(case: str) -> list:
    """Tokenize the first 50 comparisons of the eval set: 5 as ids, 45 as the hash of their ids.

    The tokenizer is trained on 300 comparisons of the training data.
    """
    texts = []
    for pair in itertools.islice(data.known_rewards(1235), 300):
        texts += [pair.prompt + response for response in pair.responses]
    tokenizer = data.train_tokenizer(texts, 500)
    rows = []
    for pair in itertools.islice(data.known_rewards(0), 50):
        rows.append(data.tokenize(pair, tokenizer, *TRUNCATIONS[case]))
    hashes = [hashlib.sha256(json.dumps(row).encode()).hexdigest()[:16] for row in rows]
    return rows[:5] + hashes[5:]


@pytest.mark.parametrize("case", TRUNCATIONS)
def test_token_ids(case):
    assert token_ids(case) == golden("token_ids", case)


# --------------------------------------------------------------------------------------------------
# Curves: 20 steps of train.py in float64. An epoch of 45 comparisons is 5 batches of 8 and one of 5

COMMON = "--n_layer 2 --n_head 2 --n_embd 32 --vocab_size 400 --max_steps 20 --num_warmup_steps 3"
COMMON += " --weight_decay 0.1 --eval_iters 1 --save_interval 0 --seed 7"
RUNS = {  # (file of comparisons, flags)
    "packed": ("pairs", ""),
    "padded": ("pairs", "--layout padded"),
    "rankings": ("rankings", ""),
    "rankings, padded": ("rankings", "--layout padded"),
    "micro-batches": (
        "rankings",
        "--per_device_train_batch_size 4 --gradient_accumulation_steps 2 --micro_batch_tokens 150",
    ),
    "dropout": ("pairs", "--dropout 0.2"),
    "truncated": ("pairs", "--max_seq_len 32 --truncation_side right"),
    "end": ("pairs", "--loss end --center_rewards_coefficient 0.1"),
    "gpt2": ("rankings", "--model_type gpt2"),
    "opt": ("rankings", "--model_type opt"),
    "built-in data": (None, ""),
}
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["train", "torch._dynamo"])  # as conftest.py does


def write_rows(path: Path, n: int, seed: int, rankings=()):
    """Write n built-in comparisons; those numbered in `rankings` get a third response."""
    rows = []
    for i, pair in enumerate(itertools.islice(data.known_rewards(seed), n)):
        row = {"prompt": pair.prompt, "chosen": pair.responses[0], "rejected": pair.responses[1]}
        if i in rankings:
            row = {"prompt": pair.prompt, "responses": [*pair.responses, " No."]}
        rows.append(json.dumps(row) + "\n")
    path.write_text("".join(rows))


def in_float64():
    """Have train.py make new models in float64. `new_model` is no part of the public contract."""
    new_model = train.new_model
    train.new_model = lambda *arguments: new_model(*arguments).double()


def main_in_float64(arguments: list[str], said: Path):
    """Run train.py in this process, on the CPU. The file `said` gets what it prints."""
    sys.stdout = sys.stderr = open(said, "w", buffering=1)
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    sys.argv = ["train.py", *arguments]
    in_float64()
    train.main()


def curves(case: str, folder: Path) -> list:
    """Run train.py and list what it logged, in its order.

    A step gives ["step", loss, gradient norm], an evaluation ["eval", loss, margin].
    """
    file, flags = RUNS[case]
    output_dir = folder / "out"
    said = folder / "said"
    arguments = [*COMMON.split(), "--max_seq_len", "64", "--per_device_train_batch_size", "8"]
    arguments += ["--output_dir", str(output_dir), "--data_output_path", str(folder / "tokens")]
    if file:
        write_rows(folder / "pairs.jsonl", 45, seed=3)
        write_rows(folder / "rankings.jsonl", 45, seed=3, rankings={2, 3, 20, 21, 40})
        write_rows(folder / "eval.jsonl", 12, seed=9, rankings={5})
        arguments += ["--data_path", str(folder / f"{file}.jsonl")]
        arguments += ["--eval_path", str(folder / "eval.jsonl")]
    process = FORKS.Process(target=main_in_float64, args=([*arguments, *flags.split()], said))
    said.touch()
    process.start()
    process.join(1800)  # unless it hangs
    if process.is_alive():
        process.kill()
        process.join()
    assert process.exitcode == 0, said.read_text()
    result = []
    for event in map(json.loads, (output_dir / "metrics.jsonl").read_text().splitlines()):
        other = {"step": "grad_norm", "eval": "margin"}[event["event"]]
        result.append([event["event"], event["loss"], event[other]])
    return result


@NEEDS_AVX2
@pytest.mark.parametrize("case", RUNS)
def test_curves(case, tmp_path):
    ours = curves(case, tmp_path)
    theirs = golden("curves", case)
    assert [kind for kind, *_ in ours] == [kind for kind, *_ in theirs]
    for numbers, expected in zip(ours, theirs):
        assert numbers[1:] == pytest.approx(expected[1:], rel=TOLERANCE, abs=TOLERANCE)


# --------------------------------------------------------------------------------------------------
# The file


def golden(kind: str, case: str) -> list:
    """Read the rows of one golden."""
    return json.loads(FILE.read_text())[kind][case]


def all_goldens() -> dict[str, dict[str, list]]:
    """Compute what the file holds: kind -> case -> rows."""
    goldens = {
        "known_rewards": {case: known_rewards(case) for case in STREAMS},
        "batches": {case: batches(case) for case in BATCHES},
        "fresh_weights": {case: fresh_weights(case) for case in CONFIGS},
        "token_ids": {case: token_ids(case) for case in TRUNCATIONS},
        "curves": {},
    }
    for case in RUNS:
        with tempfile.TemporaryDirectory() as folder:
            goldens["curves"][case] = curves(case, Path(folder))
    return goldens


def as_json(goldens: dict[str, dict[str, list]]) -> str:
    """Format goldens as JSON, a row a line. Floats stand there as their repr, so they are exact."""
    kinds = []
    for kind, cases in goldens.items():
        parts = []
        for case, rows in cases.items():
            lines = ",\n".join(f"   {json.dumps(row)}" for row in rows)
            parts.append(f"  {json.dumps(case)}: [\n{lines}\n  ]")
        kinds.append(f" {json.dumps(kind)}: {{\n" + ",\n".join(parts) + "\n }")
    return "{\n" + ",\n".join(kinds) + "\n}\n"


if __name__ == "__main__":
    if sys.argv[1:] != ["--write"]:
        sys.exit("usage: python test_goldens.py --write")
    FILE.write_text(as_json(all_goldens()))
