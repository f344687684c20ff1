"""Tests of tools/dry_run.py: measured peaks, transformers' numbers of parameters, sums by hand."""

import argparse
import ctypes
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode

from conftest import FORKS, LIMIT
from parts.distributed import Process, share_of
from parts.flags import parse_flags
from parts.huggingface import FAMILIES
from rm import LOSSES
from tools import dry_run
from tools.bench import SHAPES
from train import autocast, collate, distribute, make_optimizer

HERE = Path(__file__).resolve().parent.parent

FLAGS = {
    "n_layer": 2,
    "n_head": 8,
    "n_embd": 512,
    "vocab_size": 4000,
    "max_seq_len": 256,
    "per_device_train_batch_size": 3,
}
SMALL = {"n_layer": 2, "n_head": 2, "n_embd": 32, "vocab_size": 300, "max_seq_len": 32}
LLAMA_70B = {  # Llama 2's
    "model_type": "llama",
    "vocab_size": 32000,
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
}
NOT_FROM_SCRATCH = dict.fromkeys(("n_layer", "n_head", "n_embd", "vocab_size"))


def flags(**changed) -> argparse.Namespace:
    """Parse flags as train.py does; a flag that is None is not given."""
    words = ["train.py"]
    for name, value in (FLAGS | changed).items():
        if value is not None:
            words.append(f"--{name}")
        if value is not None and value is not True:
            words.append(str(value))
    with mock.patch("sys.argv", words):
        return parse_flags(list(FAMILIES), LOSSES)


def model_dir(path, **config) -> str:
    (path / "config.json").write_text(json.dumps(config))
    return str(path)


def memory(name: str) -> int:
    """Read a number of this process from /proc, such as VmRSS, in bytes."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(re.search(name + r":\s+(\d+)", status)[1])


def train_steps(args: argparse.Namespace, process: Process):
    """Take steps of training as the flags say, on made-up comparisons."""
    model = dry_run.make_model(args)
    replica = distribute(model, args.zero_stage, args.offload, process)
    rates = (args.learning_rate, args.weight_decay, args.lora_learning_rate)
    optimizer = make_optimizer(model, *rates, Process(rank=1))
    batch = dry_run.assumed_step(args) * process.world_size
    # The second step has the optimizer's states, the third all of the buckets.
    for _ in range(2 if process.world_size == 1 else 3):
        for comparisons in share_of(
            batch,
            args.layout,
            model.longest_tail,
            args.micro_batch_tokens,
            process,
            args.zero_stage > 0,
        ):
            inputs, _ = collate(comparisons, model, args.layout, process.device)
            with autocast(args.dtype, process.device):
                loss = replica(*inputs)["loss"]
            loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), args.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()


def measure_rank(process: Process, folder: Path, cases: list[argparse.Namespace]):
    """Train as one of several processes; write the peaks of memory into a file, in bytes.

    The peak is that above what the process has before the model is made. A small model goes first:
    what libraries allocate when they are first used is not the model's.
    """
    torch.set_num_threads(1)
    # With this (M_MMAP_THRESHOLD), glibc gives a block above it back to the system as soon as it is
    # freed, and the resident memory is what the program holds. Without, it keeps freed blocks of up
    # to 32 MB, in pieces into which what comes next often does not fit.
    ctypes.CDLL(None).mallopt(-3, 65536)
    if process.world_size > 1:
        store, ranks = f"file://{folder}/store", (process.world_size, process.rank)
        dist.init_process_group("gloo", store, None, *ranks)
    peaks = []
    for args in cases:
        train_steps(argparse.Namespace(**vars(args) | SMALL), process)
        # Sets the peak, VmHWM, to what there is now (man 5 proc).
        Path("/proc/self/clear_refs").write_text("5")
        before = memory("VmRSS")
        train_steps(args, process)
        peaks.append(memory("VmHWM") - before)
    (folder / f"peaks {process.rank}").write_text(json.dumps(peaks))


def measure(tmp_path, world_size: int, *cases) -> list[int]:
    """Measure the peak of rank 0 of `world_size` processes, for each case of flags, in bytes."""
    ranks = []
    for rank in range(world_size):
        given = (Process(rank, world_size), tmp_path, cases)
        ranks.append(FORKS.Process(target=measure_rank, args=given))
        ranks[-1].start()
    for process in ranks:
        process.join(LIMIT)
    assert [process.exitcode for process in ranks] == [0] * world_size
    return json.loads((tmp_path / "peaks 0").read_text())


def check(tmp_path, world_size, *cases):
    """Print the estimated and the measured peaks; they must agree to 15 %."""
    parsed = [flags(**case) for case in cases]
    peaks = measure(tmp_path, world_size, *parsed)
    for case, args, measured in zip(cases, parsed, peaks, strict=True):
        estimated = dry_run.estimate(args, world_size)["peak"]
        ratio = estimated / measured
        print(
            f"{case}: estimated {estimated / 1e6:.0f} MB, measured {measured / 1e6:.0f} MB, "
            f"ratio {ratio:.3f}"
        )
        assert abs(ratio - 1) < 0.15


def test_peak_is_what_training_takes(tmp_path):
    check(
        tmp_path,
        1,
        {"model_type": "gpt2"},
        {"model_type": "gpt2", "layout": "padded", "gradient_checkpointing": True},
        {"model_type": "opt", "gradient_checkpointing": True, "dtype": "bf16"},
        {"model_type": "llama", "layout": "padded", "dtype": "bf16"},
        {"model_type": "llama", "micro_batch_tokens": 600, "lora_dim": 8},
        {"model_type": "qwen3", "dtype": "bf16"},
        {"model_type": "gpt_neox", "layout": "padded"},
    )


def test_peak_is_what_a_rank_of_two_takes(tmp_path):
    deep = {"n_layer": 4, "max_seq_len": 32}
    check(
        tmp_path,
        2,
        deep | {"zero_stage": 0},
        deep | {"zero_stage": 2},
        deep | {"zero_stage": 3, "gradient_checkpointing": True, "dtype": "bf16"},
    )


@pytest.mark.parametrize(
    "name, new_pad",
    [
        ("OPT-350m", 0),
        ("llama 1B", 1),
        ("Mistral 7B", 1),
        ("Qwen2.5 0.5B", 1),
        ("Qwen3 0.6B", 1),
        ("Pythia 410M", 1),
    ],
)
def test_parameters_are_those_of_transformers(name, new_pad, tmp_path):
    transformers = pytest.importorskip("transformers")
    config = SHAPES[name]
    with torch.device("meta"):
        theirs = transformers.AutoModel.from_config(transformers.AutoConfig.for_model(**config))
    pads = {} if new_pad else {"pad_token_id": 1}  # without one there is a row more
    directory = model_dir(tmp_path, **config | pads)
    with FakeTensorMode():
        model = dry_run.make_model(flags(model_name_or_path=directory, **NOT_FROM_SCRATCH))
    expected = sum(parameter.numel() for parameter in theirs.parameters())
    expected += model.v_head.in_features * (1 + new_pad)
    assert sum(parameter.numel() for parameter in model.parameters()) == expected


def test_flop_are_six_for_a_weight_and_a_token():
    """Weights: two forward, four backward. Attention: two products forward, five backward."""
    L, C, rows, layers = 64, 48, 6, 2  # two rows a pair
    case = {
        "model_type": "gpt2",
        "layout": "padded",
        "n_layer": layers,
        "n_head": 2,
        "n_embd": C,
        "max_seq_len": L,
        "per_device_train_batch_size": 3,
    }
    once = dry_run.estimate(flags(**case), 1)
    assert once["tokens"] == rows * L
    of_weights = 6 * rows * L * (layers * 12 * C * C + C)
    assert once["flop"] == of_weights + 7 * layers * rows * 2 * L * L * C
    again = dry_run.estimate(flags(**case, gradient_checkpointing=True), 1)
    # The last product of a block needs not be computed again.
    assert 1.2 < again["flop"] / once["flop"] < 4 / 3
    case |= {"gradient_accumulation_steps": 2, "micro_batch_tokens": rows * L}
    in_parts = dry_run.estimate(flags(**case), 1)
    assert (in_parts["flop"], in_parts["micro_batches"]) == (2 * once["flop"], 2)


def test_flop_of_attention_with_grouped_heads_are_those_of_the_query_heads(tmp_path):
    """The counter of PyTorch 2.11 refuses grouped heads; ours must not ask it."""
    L, C, rows, layers, heads = 32, 64, 2, 3, 8
    config = {
        "model_type": "llama",
        "vocab_size": 300,
        "hidden_size": C,
        "intermediate_size": 96,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": 2,
        "max_position_embeddings": L,
    }
    case = NOT_FROM_SCRATCH | {
        "model_name_or_path": model_dir(tmp_path, **config),
        "layout": "padded",
        "max_seq_len": L,
        "per_device_train_batch_size": 1,
    }
    grouped = dry_run.estimate(flags(**case), 1)
    key_value_weights = 2 * C * C * 2 // heads
    weights = layers * (2 * C * C + key_value_weights + 3 * 96 * C) + C
    assert grouped["flop"] == 6 * rows * L * weights + 7 * layers * rows * 2 * L * L * C


TINY = {
    "n_layer": 1,
    "n_head": 2,
    "n_embd": 8,
    "vocab_size": 300,
    "max_seq_len": 16,
    "per_device_train_batch_size": 1,
}


def test_states_by_hand():
    """A llama 8 wide: embedding, q, k, v, attn_out, gate, in and out of the MLP, norms, v_head."""
    whole = 4 * (300 * 8 + 4 * 8 * 8 + 2 * 24 * 8 + 8 * 24 + 3 * 8 + 1 * 8)
    # The first rank has the whole of a single row.
    fourth = 4 * (75 * 8 + 4 * 2 * 8 + 2 * 6 * 8 + 2 * 24 + 3 * 2 + 1 * 8)
    one = dry_run.estimate(flags(**TINY, zero_stage=0), 1)
    buckets = dry_run.estimate(flags(**TINY, zero_stage=0), 4)
    stage_2 = dry_run.estimate(flags(**TINY, zero_stage=2), 4)
    stage_3 = dry_run.estimate(flags(**TINY, zero_stage=3), 4)
    assert one["parameters"] == one["trained"] == whole / 4
    for found, states in ((one, whole), (buckets, whole), (stage_2, fourth), (stage_3, fourth)):
        assert (found["weights"], found["gradients"]) == (states, states)
        assert found["optimizer"] == 2 * states
    assert buckets["peak"] == 4 * whole + buckets["activations"]
    assert 3 * whole + one["activations"] < one["peak"] < 4 * whole + one["activations"]


def test_gathered_weights_count():
    """Stage 2 keeps the weights of all blocks until the backward pass, stage 3 those of two blocks.

    --offload moves the rest to the CPU.
    """
    deep = TINY | {"n_layer": 8, "n_embd": 64}
    one, stage_2, stage_3 = (
        dry_run.estimate(flags(**deep, zero_stage=stage), 8) for stage in (0, 2, 3)
    )
    assert stage_2["activations"] - one["activations"] > one["weights"]
    assert stage_3["activations"] - one["activations"] < one["weights"] / 2
    host = dry_run.estimate(flags(**deep, zero_stage=3, offload=True), 8)
    assert (host["host"], host["peak"]) == (4 * host["weights"], host["activations"])
    assert host["activations"] == stage_3["activations"]


def test_lora_alone_is_trained_by_hand():
    lora = {"lora_dim": 2, "lora_module_name": "q_proj", "only_optimize_lora": True}
    found = dry_run.estimate(flags(**TINY, **lora), 1)
    assert found["trained"] == 2 * (8 + 8) + 8
    assert found["parameters"] == dry_run.estimate(flags(**TINY), 1)["parameters"] + 2 * (8 + 8)
    assert (found["gradients"], found["optimizer"]) == (4 * found["trained"], 8 * found["trained"])


# Runs a command and prints the peak of its memory, in kB. The kernel counts the memory of the
# process that starts another one, too, and that of a session of tests is large.
MEASURED = """
import resource, subprocess, sys
done = subprocess.run(sys.argv[1:])
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
sys.exit(done.returncode)
"""


def test_llama_2_70b_has_its_number_of_parameters(tmp_path):
    directory = model_dir(tmp_path, **LLAMA_70B)
    with FakeTensorMode():
        model = dry_run.make_model(flags(model_name_or_path=directory, **NOT_FROM_SCRATCH))
    assert sum(parameter.numel() for parameter in model.parameters()) == 68_714_520_576


def test_a_model_of_70_billion_parameters_is_not_allocated(tmp_path):
    """Five blocks have as many as the 80 of Llama 2 70B, and take less time."""
    wide = {"num_hidden_layers": 5, "hidden_size": 4 * 8192, "intermediate_size": 4 * 28672}
    command = [sys.executable, "-c", MEASURED, sys.executable, "train.py", "--dry_run"]
    command += ["--model_name_or_path", model_dir(tmp_path, **LLAMA_70B | wide), "--dtype", "bf16"]
    command += ["--zero_stage", "3", "--per_device_train_batch_size", "1"]
    command += ["--gradient_checkpointing", "--flops", "4e14"]
    done = subprocess.run(
        command, cwd=HERE, text=True, capture_output=True, env=os.environ | {"WORLD_SIZE": "64"}
    )
    assert done.returncode == 0, done.stderr
    *lines, peak = done.stdout.splitlines()
    peak = 1024 * int(peak)
    print("\n".join(lines), f"\nat most {peak / 1e6:.0f} MB")
    # Norms and embedding, with a row for the pad id, are four times as wide, as is the value head.
    number = 80 * (2 * 8192**2 + 2 * 8192 * 1024 + 3 * 8192 * 28672)
    number += (5 * 2 + 1 + 32001 + 1) * 4 * 8192
    assert lines[0] == f"{number:,} parameters, {number:,} of them trained; 64 ranks"
    end = "at 4e+14 FLOP/s (given); the optimizer and communication are not counted"
    assert lines[-1].endswith(end)
    assert peak < 1e9


def test_mistakes_are_named_in_one_line(tmp_path):
    for name in ("stretched", "windowed"):
        (tmp_path / name).mkdir()
    directory = model_dir(tmp_path, **LLAMA_70B)
    stretched = {"rope_scaling": {"type": "linear", "factor": 2.0}}
    stretched = model_dir(tmp_path / "stretched", **LLAMA_70B, **stretched)
    mistral = LLAMA_70B | {"model_type": "mistral", "sliding_window": 32}
    windowed = model_dir(tmp_path / "windowed", **mistral)
    too_long = f"--max_seq_len: found 4097; {directory} has 4096 positions"
    too_wide = f"--max_seq_len: found 33; {windowed} has a sliding_window of 32 tokens"
    for case, message in (
        ({"model_name_or_path": "nowhere"}, "nowhere: no such directory"),
        ({"model_name_or_path": directory, "max_seq_len": 4097}, too_long),
        ({"model_name_or_path": windowed, "max_seq_len": 33}, too_wide),
        ({"model_name_or_path": directory, "pad_id": 33000}, f"{directory}: the pad id (--pad_id,"),
        ({"model_name_or_path": stretched}, f"{stretched}/config.json: rope_type is 'linear'"),
    ):
        with pytest.raises(ValueError, match=f"^{re.escape(message)}[^\n]*$"):
            dry_run.report(flags(**case | NOT_FROM_SCRATCH), 1)


def test_a_mistake_ends_the_program_with_one_line(monkeypatch):
    monkeypatch.setattr("sys.argv", ["train.py", "--dry_run", "--model_name_or_path", "nowhere"])
    with pytest.raises(SystemExit, match="^train.py: error: nowhere: no such directory[^\n]*$"):
        dry_run.main()


def test_rank_0_alone_prints(monkeypatch, capsys):
    words = [f"--{name}={value}" for name, value in TINY.items()]
    monkeypatch.setattr("sys.argv", ["train.py", "--dry_run", "--flops=1e9", *words])
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank, lines in (("0", 9), ("1", 0)):
        monkeypatch.setenv("RANK", rank)
        dry_run.main()
        assert len(capsys.readouterr().out.splitlines()) == lines
