"""The dry run's estimates beside measured peaks, transformers' numbers of parameters, and arithmetic by hand."""

import argparse
import itertools
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(HERE))  # `pytest` alone puts only this file's directory there

from extras import dry_run
from extras.bench import SHAPES

FLAGS = dict(
    model_name_or_path=None, model_type="llama", n_layer=3, n_head=6, n_embd=384, vocab_size=4000, dropout=0.0, pad_id=None, max_seq_len=256,
    per_device_train_batch_size=4, gradient_accumulation_steps=1, micro_batch_tokens=2048, layout="packed", gradient_checkpointing=False,
    dtype="fp32", zero_stage=0, offload=False, lora_dim=0, lora_module_name="", only_optimize_lora=False, flops=1e12)
SMALL = dict(n_layer=2, n_head=2, n_embd=32, vocab_size=300, max_seq_len=32, per_device_train_batch_size=2)
LLAMA_70B = dict(model_type="llama", vocab_size=32000, hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64,
                 num_key_value_heads=8, max_position_embeddings=4096, rms_norm_eps=1e-5, bos_token_id=1, eos_token_id=2)  # Llama 2's


def flags(**changed) -> argparse.Namespace:
    return argparse.Namespace(**FLAGS | changed)


def model_dir(path, **config) -> str:
    (path / "config.json").write_text(json.dumps(config))
    return str(path)


# Prints the peak memory of steps of training with each of the flags, above that before the model is made, in bytes: a line of rank 0.
# A small model goes first: what libraries allocate when they are first used is not the model's.
STEPS = """
import argparse, json, re, sys
import torch
import torch.distributed as dist
from extras import dry_run
from train import collate, micro_batches

def memory(name):
    return 1024 * int(re.search(name + r":\\s+(\\d+)", open("/proc/self/status").read())[1])

def train(args):
    model = trained = dry_run.make_model(args)
    if args.zero_stage:
        dry_run.shard(model, dist.device_mesh.init_device_mesh("cpu", (world_size,)), args.zero_stage)
    elif world_size > 1:
        trained = torch.nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    groups = dry_run.assumed_step(args)
    for _ in range(2 if world_size == 1 else 3):  # the second has the optimizer's states, the third all of DistributedDataParallel's buckets
        for chunk in micro_batches(groups, args.layout, args.micro_batch_tokens):
            inputs, _ = collate([groups[i] for i in chunk], model, args.layout, "cpu")
            with torch.autocast("cpu", dry_run.DTYPES[args.dtype], enabled=args.dtype != "fp32", cache_enabled=False):
                loss = trained(*inputs)["loss"]
            loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

torch.set_num_threads(1)
rank, world_size = int(sys.argv[1]), int(sys.argv[2])
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
    arguments = [str(world_size), str(tmp_path / "store"), *(json.dumps([vars(args) | SMALL, vars(args)]) for args in cases)]
    # With this, glibc gives a block above it back to the system as soon as it is freed, and the resident memory is what the program holds.
    # Without, it keeps freed blocks of up to 32 MB, in pieces into which what comes next often does not fit.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    ranks = [subprocess.Popen([sys.executable, "-c", STEPS, str(rank), *arguments], cwd=HERE, env=environment, text=True,
                              stdout=subprocess.PIPE) for rank in range(world_size)]
    outputs = [process.communicate()[0] for process in ranks]
    assert not any(process.returncode for process in ranks)
    return [int(line) for line in outputs[0].split()]


def check(tmp_path, world_size, *cases):
    """Print the estimated and the measured peaks; they must agree to 15 %."""
    for args, measured in zip(cases, measure(tmp_path, world_size, *cases), strict=True):
        estimated = dry_run.estimate(args, world_size)["peak"]
        print(f"{args.model_type} {args.layout} {args.dtype}, gradient_checkpointing {args.gradient_checkpointing}, micro_batch_tokens "
              f"{args.micro_batch_tokens}, zero_stage {args.zero_stage}: estimated {estimated / 1e6:.0f} MB, measured {measured / 1e6:.0f} MB, "
              f"ratio {estimated / measured:.3f}")
        assert abs(estimated / measured - 1) < 0.15


def test_peak_is_what_training_takes(tmp_path):
    check(tmp_path, 1,
          flags(model_type="gpt2"),
          flags(model_type="gpt2", layout="padded", gradient_checkpointing=True),
          flags(model_type="opt", gradient_checkpointing=True, dtype="bf16"),
          flags(model_type="llama", layout="padded", dtype="bf16"),
          flags(model_type="llama", micro_batch_tokens=800))


def test_peak_is_what_a_rank_of_two_takes(tmp_path):
    check(tmp_path, 2, *(flags(n_embd=768, max_seq_len=32, zero_stage=zero_stage) for zero_stage in (0, 2, 3)))
