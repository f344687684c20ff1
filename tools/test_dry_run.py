"""The dry run's estimates beside measured peaks, transformers' numbers of parameters, and arithmetic by hand."""

import argparse
import itertools
import json
import os
import re
import resource
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from tools import dry_run
from tools.bench import SHAPES
from train import parse_flags

HERE = Path(__file__).resolve().parent.parent

FLAGS = dict(
    n_layer=2, n_head=8, n_embd=512, vocab_size=4000, max_seq_len=256, per_device_train_batch_size=3
)
SMALL = dict(n_layer=2, n_head=2, n_embd=32, vocab_size=300, max_seq_len=32)
LLAMA_70B = dict(
    model_type="llama",
    vocab_size=32000,
    hidden_size=8192,
    intermediate_size=28672,
    num_hidden_layers=80,
    num_attention_heads=64,
    num_key_value_heads=8,
    max_position_embeddings=4096,
    rms_norm_eps=1e-5,
)  # Llama 2's

NOT_FROM_SCRATCH = dict(n_layer=None, n_head=None, n_embd=None, vocab_size=None)


def flags(**changed) -> argparse.Namespace:
    """What train.py makes of its flags."""
    given = {name: value for name, value in (FLAGS | changed).items() if value is not None}
    words = (
        (f"--{name}", *([] if value is True else [str(value)])) for name, value in given.items()
    )
    with mock.patch("sys.argv", ["train.py", *itertools.chain(*words)]):
        return parse_flags()


def model_dir(path, **config) -> str:
    (path / "config.json").write_text(json.dumps(config))
    return str(path)


# Prints the peak memory of steps of training with each of the flags, above that before the model is made, in bytes: a line of rank 0.
# A small model goes first: what libraries allocate when they are first used is not the model's.
STEPS = """
import argparse, json, re, sys
import torch
import torch.distributed as dist
from tools import dry_run
from train import Process, collate, distribute, divide, half_precision, make_optimizer

def memory(name):
    return 1024 * int(re.search(name + r":\\s+(\\d+)", open("/proc/self/status").read())[1])

def train(args):
    model = dry_run.make_model(args)
    trained, optimizer, groups = distribute(model, args, process), make_optimizer(model, args, Process(rank=1)), dry_run.assumed_step(args)
    for _ in range(2 if world_size == 1 else 3):  # the second has the optimizer's states, the third all of the buckets
        for chunk in divide(groups * world_size, args.micro_batch_tokens, args, process):
            inputs, _ = collate([groups[0] for _ in chunk], model, args.layout, process.device)
            with half_precision(args, process):
                loss = trained(*inputs)["loss"]
            loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), args.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()

torch.set_num_threads(1)
rank, world_size = int(sys.argv[1]), int(sys.argv[2])
process = Process(rank, world_size)
if world_size > 1:
    dist.init_process_group("gloo", init_method="file://" + sys.argv[3], rank=rank, world_size=world_size)
for flags in sys.argv[4:]:
    small, large = (argparse.Namespace(**changed) for changed in json.loads(flags))
    train(small)
    open("/proc/self/clear_refs", "w").write("5")  # sets the peak, VmHWM, to what there is now (man 5 proc)
    before = memory("VmRSS")
    train(large)
    if rank == 0:
        print(memory("VmHWM") - before, flush=True)
"""


def measure(tmp_path, world_size: int, *cases) -> list[int]:
    """The peaks of `STEPS`, on rank 0 of `world_size` processes, for each of the flags."""
    arguments = [
        str(world_size),
        str(tmp_path / "store"),
        *(json.dumps([vars(args) | SMALL, vars(args)]) for args in cases),
    ]
    # With this, glibc gives a block above it back to the system as soon as it is freed, and the resident memory is what the program holds.
    # Without, it keeps freed blocks of up to 32 MB, in pieces into which what comes next often does not fit.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", STEPS, str(rank), *arguments],
            cwd=HERE,
            env=environment,
            text=True,
            stdout=subprocess.PIPE,
        )
        for rank in range(world_size)
    ]
    outputs = [process.communicate()[0] for process in ranks]
    assert not any(process.returncode for process in ranks)
    return [int(line) for line in outputs[0].split()]


def check(tmp_path, world_size, *cases):
    """Print the estimated and the measured peaks; they must agree to 15 %."""
    args = [flags(**case) for case in cases]
    for case, args, measured in zip(cases, args, measure(tmp_path, world_size, *args), strict=True):
        estimated = dry_run.estimate(args, world_size)["peak"]
        print(
            f"{case}: estimated {estimated / 1e6:.0f} MB, measured {measured / 1e6:.0f} MB, ratio {estimated / measured:.3f}"
        )
        assert abs(estimated / measured - 1) < 0.15


def test_peak_is_what_training_takes(tmp_path):
    check(
        tmp_path,
        1,
        dict(model_type="gpt2"),
        dict(model_type="gpt2", layout="padded", gradient_checkpointing=True),
        dict(model_type="opt", gradient_checkpointing=True, dtype="bf16"),
        dict(model_type="llama", layout="padded", dtype="bf16"),
        dict(model_type="llama", micro_batch_tokens=600, lora_dim=8),
    )


def test_peak_is_what_a_rank_of_two_takes(tmp_path):
    check(
        tmp_path,
        2,
        *(
            dict(n_layer=4, max_seq_len=32) | case
            for case in (
                dict(zero_stage=0),
                dict(zero_stage=2),
                dict(zero_stage=3, gradient_checkpointing=True, dtype="bf16"),
            )
        ),
    )


@pytest.mark.parametrize("name, new_pad", [("OPT-350m", 0), ("llama 1B", 1)])
def test_parameters_are_those_of_transformers(name, new_pad, tmp_path):
    transformers = pytest.importorskip("transformers")
    config = SHAPES[name]
    with torch.device("meta"):
        theirs = transformers.AutoModel.from_config(transformers.AutoConfig.for_model(**config))
    pads = {} if new_pad else {"pad_token_id": 1}  # without one there is a row more
    with FakeTensorMode():
        model = dry_run.make_model(
            flags(model_name_or_path=model_dir(tmp_path, **config | pads), **NOT_FROM_SCRATCH)
        )
    expected = sum(
        parameter.numel() for parameter in theirs.parameters()
    ) + model.v_head.in_features * (1 + new_pad)
    assert sum(parameter.numel() for parameter in model.parameters()) == expected


def test_flop_are_six_for_a_weight_and_a_token():
    """Two forward and four backward; attention's, two products forward and five backward, which compute the scores again."""
    L, C, rows, layers = 64, 48, 6, 2  # two rows a pair
    case = dict(
        model_type="gpt2",
        layout="padded",
        n_layer=layers,
        n_head=2,
        n_embd=C,
        max_seq_len=L,
        per_device_train_batch_size=3,
    )
    once = dry_run.estimate(flags(**case), 1)
    assert once["tokens"] == rows * L
    assert (
        once["flop"] == 6 * rows * L * (layers * 12 * C * C + C) + 7 * layers * rows * 2 * L * L * C
    )
    again = dry_run.estimate(flags(**case, gradient_checkpointing=True), 1)
    assert (
        1.2 < again["flop"] / once["flop"] < 4 / 3
    )  # the last product of a block needs not be computed again
    in_parts = dry_run.estimate(
        flags(**case | dict(gradient_accumulation_steps=2, micro_batch_tokens=rows * L)), 1
    )
    assert (in_parts["flop"], in_parts["micro_batches"]) == (2 * once["flop"], 2)


TINY = dict(
    n_layer=1, n_head=2, n_embd=8, vocab_size=300, max_seq_len=16, per_device_train_batch_size=1
)


def test_states_by_hand():
    """llama, 8 wide, its MLP 24: embedding, q, k, v, attn_out, gate, in and out of the MLP, three norms, v_head."""
    whole = 4 * (300 * 8 + 4 * 8 * 8 + 2 * 24 * 8 + 8 * 24 + 3 * 8 + 1 * 8)
    fourth = 4 * (
        75 * 8 + 4 * 2 * 8 + 2 * 6 * 8 + 2 * 24 + 3 * 2 + 1 * 8
    )  # the first rank has the whole of a single row
    one, buckets, stage_2, stage_3 = (
        dry_run.estimate(flags(**TINY, zero_stage=stage), ranks)
        for stage, ranks in ((0, 1), (0, 4), (2, 4), (3, 4))
    )
    assert one["parameters"] == one["trained"] == whole / 4
    for found, states in ((one, whole), (buckets, whole), (stage_2, fourth), (stage_3, fourth)):
        assert (found["weights"], found["gradients"], found["optimizer"]) == (
            states,
            states,
            2 * states,
        )
    assert buckets["peak"] == 4 * whole + buckets["activations"]
    assert 3 * whole + one["activations"] < one["peak"] < 4 * whole + one["activations"]


def test_what_is_gathered():
    """Stage 2 keeps the weights of all blocks until the backward pass, stage 3 those of two; --offload moves the rest."""
    deep = TINY | dict(n_layer=8, n_embd=64)
    one, stage_2, stage_3 = (
        dry_run.estimate(flags(**deep, zero_stage=stage), 64) for stage in (0, 2, 3)
    )
    assert stage_2["activations"] - one["activations"] > one["weights"]
    assert stage_3["activations"] - one["activations"] < one["weights"] / 2
    host = dry_run.estimate(flags(**deep, zero_stage=3, offload=True), 64)
    assert (host["host"], host["peak"]) == (4 * host["weights"], host["activations"])
    assert host["activations"] == stage_3["activations"]


def test_lora_alone_is_trained_by_hand():
    found = dry_run.estimate(
        flags(**TINY, lora_dim=2, lora_module_name="q_proj", only_optimize_lora=True), 1
    )
    assert found["trained"] == 2 * (8 + 8) + 8
    assert found["parameters"] == dry_run.estimate(flags(**TINY), 1)["parameters"] + 2 * (8 + 8)
    assert (found["gradients"], found["optimizer"]) == (4 * found["trained"], 8 * found["trained"])


def test_a_model_of_70_billion_parameters_is_not_allocated(tmp_path):
    start = time.monotonic()
    done = subprocess.run(
        [
            sys.executable,
            "train.py",
            "--dry_run",
            "--model_name_or_path",
            model_dir(tmp_path, **LLAMA_70B),
            "--dtype",
            "bf16",
            "--zero_stage",
            "3",
            "--per_device_train_batch_size",
            "1",
            "--gradient_checkpointing",
            "--flops",
            "4e14",
        ],
        cwd=HERE,
        text=True,
        capture_output=True,
        env=os.environ | {"WORLD_SIZE": "64"},
    )
    seconds, peak = (
        time.monotonic() - start,
        1024 * resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss,
    )  # of the largest child so far
    assert done.returncode == 0, done.stderr
    print(f"{done.stdout}in {seconds:.0f} s, at most {peak / 1e6:.0f} MB")
    assert done.stdout.startswith(
        "68,714,520,576 parameters, 68,714,520,576 of them trained; 64 ranks\n"
    )
    assert done.stdout.endswith(
        "at 4e+14 FLOP/s (given); the optimizer and communication are not counted\n"
    )
    assert peak < 1e9 and seconds < 60


def test_mistakes_are_named_in_one_line(tmp_path):
    (tmp_path / "biased").mkdir()
    directory, biased = (
        model_dir(tmp_path, **LLAMA_70B),
        model_dir(tmp_path / "biased", **LLAMA_70B, attention_bias=True),
    )
    for case, message in (
        (dict(model_name_or_path="nowhere"), "nowhere: no such directory"),
        (
            dict(model_name_or_path=directory, max_seq_len=4097),
            f"--max_seq_len: found 4097; {directory} has 4096 positions",
        ),
        (dict(model_name_or_path=biased), f"{biased}/config.json: attention_bias is True"),
    ):
        with pytest.raises(ValueError, match=f"^{re.escape(message)}[^\n]*$"):
            dry_run.report(flags(**case | NOT_FROM_SCRATCH), 1)
