"""Train a reward model on pairs of responses. This file is the loop, from the flags to the saved model.

    python train.py                                                        built-in data, no files needed
    python train.py --data_path pairs.jsonl --model_name_or_path MODEL     your data, a pre-trained model
    torchrun --standalone --nproc_per_node=4 train.py [flags]              one node, four GPUs
    torchrun --nnodes=2 --node_rank=0 --nproc_per_node=8 \\
        --master_addr=10.0.0.1 --master_port=29500 train.py [flags]        the first of two nodes
    torchrun --nnodes=2 --node_rank=1 --nproc_per_node=8 \\
        --master_addr=10.0.0.1 --master_port=29500 train.py [flags]        the second one
    torchrun --standalone --nproc_per_node=8 --max-restarts=3 train.py --zero_stage 3 --dtype bf16 [flags]
                                                                           sharded weights; goes on after a failure

Processes talk through NCCL on GPUs and gloo on CPUs. N processes compute what one process does with a batch N times as
large: every comparison of a step weighs the same, whichever rank, micro-batch or ragged last batch it falls into.
`python train.py --help` lists the flags; --output_dir gets the model, its tokenizer, metrics.jsonl and checkpoints. On
SIGTERM or SIGINT the step is finished and a checkpoint saved; the same command with --resume goes on from there, and ends
with the weights of a run that was never stopped.
"""

from __future__ import annotations  # the loop comes first, and what it uses below it

import argparse
import functools
import importlib
import itertools
import json
import math
import operator
import os
import secrets
import shutil
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import data
from model import GPT, GPTConfig
from parts import token_cache
from parts.huggingface import FAMILIES, WEIGHT_FILES, read_config
from parts.metrics import Writer, spearman, summarize, summary_writer
from parts.packed import packed_size
from parts.report import run_page
from parts.tokenizers import CONFIG_FILES, TOKENIZER_FILES
from rm import LOSSES, RewardModel

BUILT_IN = dict(train_batch_size=32, max_steps=2000, eval_pairs=4000, tokenizer_pairs=2000)
EVAL_SEED = 0  # of the built-in eval set: the same for every --seed, so that runs can be compared
TOKENIZER_CHARACTERS = 50_000_000  # a tokenizer is trained on at most so much text; more changes little and takes its time
SCHEDULES = (
    "linear",
    "cosine",
    "cosine_with_restarts",
    "polynomial",
    "constant",
    "constant_with_warmup",
)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
warnings.filterwarnings(
    "ignore", "torch.distributed is disabled"
)  # said at every checkpoint of a single process
EXTRAS = {
    "dry_run": "dry_run",
    "lora": "lora_dim",
    "normalize": "normalize_rewards",
}  # file: flag
EXTRAS_IN = {"dry_run": "tools", "lora": "parts", "normalize": "parts"}
LONGEST_STREAK = 25  # of steps skipped in fp16: the scaler has then gone from 65536 to 0.002, so it is not the scale


# ----------------------------------------------------------------------------------------------------------------------
# Flags


def number(kind, low, high=None, above=False):
    """An argparse type: an int or float from `low` (or above it) to `high`, if need be the largest one of its kind."""
    limit = high if high is not None else {int: 2**31 - 1, float: sys.float_info.max}[kind]

    def parse(text):
        try:
            value = kind(text)
            if low <= value <= limit and not (above and value == low):
                return value
        except ValueError:
            pass
        what = {int: "a whole number", float: "a number"}[kind]
        bounds = f"{'above' if above else 'from'} {low}" + (
            f" to {limit}" if high or kind is int else ""
        )
        raise argparse.ArgumentTypeError(f"found {text!r}; expected {what} {bounds}")

    return parse


def shares(text):
    """--data_split: the stages' shares of the data, of any sum."""
    try:
        values = [number(float, 0)(part) for part in text.split(",")]
    except argparse.ArgumentTypeError:
        values = []
    if len(values) != 3 or values[1] == 0:
        raise argparse.ArgumentTypeError(
            f"found {text!r}; expected three numbers from 0, like 2,4,4; the second, our share, above 0"
        )
    return values


def parse_flags():
    parser = argparse.ArgumentParser(
        description="Train a reward model on pairs of responses.", allow_abbrev=False
    )
    count, size, positive = number(int, 1), number(int, 1, 2**16), number(float, 0, above=True)
    flag = parser.add_argument_group("data").add_argument
    flag(
        "--data_path",
        nargs="+",
        metavar="FILE",
        help="comparisons: .jsonl, .jsonl.gz or .json (default: built-in data)",
    )
    flag(
        "--data_split",
        type=shares,
        default=[0.0, 1.0, 0.0],
        metavar="A,B,C",
        help="shares of the three RLHF stages; B's rows are used, the same as in DeepSpeed-Chat (0,1,0: all)",
    )
    flag(
        "--eval_path",
        nargs="+",
        metavar="FILE",
        help="comparisons to evaluate on (default: a part of --data_path)",
    )
    flag(
        "--eval_fraction",
        type=number(float, 0, 0.9, above=True),
        default=0.05,
        help="that part: the last of the shuffled data (0.05)",
    )
    flag(
        "--max_seq_len",
        type=number(int, 2, 2**20),
        default=512,
        help="tokens; longer sequences are truncated (512)",
    )
    flag(
        "--truncation_side",
        choices=("left", "right"),
        default="left",
        help="right is DeepSpeed-Chat's (left)",
    )
    flag(
        "--tokenizer_path",
        metavar="PATH",
        help="a tokenizer (default: the model's; from scratch, one trained on the data)",
    )
    flag(
        "--pad_id",
        type=number(int, 0, 2**24),
        help="padding's id (default: the tokenizer's own, or a new one)",
    )
    flag(
        "--num_padding_at_beginning",
        type=number(int, 0),
        help="leading pad ids that belong to a text (default: 1 where bos is pad, else 0)",
    )
    flag(
        "--skip_bad_rows",
        action="store_true",
        help="leave out and count rows that are no comparison (default: the first one is an error)",
    )
    flag(
        "--data_output_path",
        metavar="DIR",
        default=str(
            Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "reward-model"
        ),
        help="where text is kept as tokens, to be found again by its hash; on a disk of each machine (~/.cache/reward-model)",
    )

    flag = parser.add_argument_group("model").add_argument
    flag(
        "--model_name_or_path",
        metavar="DIR",
        help="a pre-trained model (default: from scratch, by the next five)",
    )
    flag("--model_type", choices=list(FAMILIES), help="(llama)")
    flag("--n_layer", type=size, help="(2)")
    flag("--n_head", type=size, help="(4)")
    flag("--n_embd", type=size, help="(128)")
    flag(
        "--vocab_size",
        type=number(int, 300, 2**24),
        help="at most; a small text supports fewer pieces (8000)",
    )
    flag("--dropout", type=number(float, 0, 0.99), default=0.0, help="(0)")
    flag(
        "--lora_dim",
        type=number(int, 0, 2**16),
        default=0,
        help="rank of the LoRA beside linear layers; merged on saving (0: none)",
    )
    flag(
        "--lora_module_name",
        metavar="PART",
        help="of the names of those layers, as in DeepSpeed-Chat (default: all in the blocks)",
    )
    flag("--only_optimize_lora", action="store_true", help="train LoRA and the value head alone")
    flag("--lora_learning_rate", type=positive, default=5e-4, help="(5e-4)")

    flag = parser.add_argument_group("training").add_argument
    flag(
        "--per_device_train_batch_size",
        type=count,
        help=f"comparisons (16; built-in data: {BUILT_IN['train_batch_size']})",
    )
    flag(
        "--per_device_eval_batch_size",
        type=count,
        default=16,
        help="comparisons of full length: so many tokens are computed on at once (16)",
    )
    flag("--gradient_accumulation_steps", type=count, default=1, help="(1)")
    flag(
        "--loss",
        choices=LOSSES,
        default="divergent",
        help="where rewards are compared: from the divergence on, or at the ends alone (divergent)",
    )
    flag(
        "--center_rewards_coefficient",
        type=number(float, 0),
        default=0.0,
        help="weight of the squared sum of a pair's end scores (0)",
    )
    flag(
        "--layout",
        choices=("packed", "padded"),
        default="packed",
        help="packed: no padding, a shared prompt once; padded: rows of pairs, the reference; without dropout the same numbers (packed)",
    )
    flag(
        "--micro_batch_tokens",
        type=count,
        help="tokens computed on at once, by each process; a step of more is cut into micro-batches, "
        "to the same result (2 x per_device_train_batch_size x max_seq_len)",
    )
    flag("--learning_rate", type=positive, help="(5e-5; from scratch 1e-3)")
    flag("--weight_decay", type=number(float, 0), default=0.0, help="on matrices only (0)")
    flag("--max_grad_norm", type=positive, default=1.0, help="(1.0)")
    flag("--lr_scheduler_type", choices=SCHEDULES, default="cosine", help="(cosine)")
    flag(
        "--num_warmup_steps",
        type=number(int, 0),
        help="optimizer steps (0; built-in data: a twentieth)",
    )
    flag("--num_train_epochs", type=count, default=1, help="(1)")
    flag(
        "--max_steps",
        type=count,
        help=f"optimizer steps, in place of epochs (built-in data: {BUILT_IN['max_steps']})",
    )
    flag(
        "--eval_interval",
        type=number(int, 0),
        default=0,
        help="optimizer steps between evaluations (0: only before and after)",
    )
    flag(
        "--eval_iters",
        type=number(int, 0),
        default=0,
        help="batches per evaluation and process (0: all)",
    )
    flag("--seed", type=number(int, 0, 2**32 - 1), default=1234, help="(1234)")

    flag = parser.add_argument_group("machine").add_argument
    flag(
        "--dtype",
        choices=list(DTYPES),
        default="fp32",
        help="of matrix products, by autocast; weights and the loss stay in fp32 (fp32)",
    )
    flag(
        "--gradient_checkpointing",
        action="store_true",
        help="compute the blocks twice instead of keeping what the backward pass needs",
    )
    flag(
        "--zero_stage",
        type=int,
        choices=(0, 2, 3),
        default=0,
        help="0: each process has all weights; 2 and 3: FSDP2 shards them, 3 also between forward and backward (0)",
    )
    flag(
        "--offload",
        action="store_true",
        help="with --zero_stage 2 or 3: weights, gradients and optimizer states on the CPU",
    )
    flag(
        "--process_timeout",
        type=number(float, 0, 1e6, above=True),
        default=1800.0,
        help="seconds after which processes give up waiting for each other (1800)",
    )
    flag(
        "--dry_run",
        action="store_true",
        help="only say what memory and time these flags take, on as many processes as there are",
    )
    flag("--flops", type=positive, help="FLOP/s of a process, for --dry_run (default: measured)")

    flag = parser.add_argument_group("output").add_argument
    flag("--output_dir", default="out", help="(out)")
    flag(
        "--normalize_rewards",
        action="store_true",
        help="after training: zero mean and unit variance of the end scores over the eval responses",
    )
    flag(
        "--enable_tensorboard",
        action="store_true",
        help="write the numbers of metrics.jsonl for TensorBoard, too (pip install tensorboard)",
    )
    flag(
        "--tensorboard_path",
        metavar="DIR",
        default="step2_tensorboard",
        help="where (step2_tensorboard)",
    )
    flag(
        "--save_interval",
        type=number(int, 0),
        default=500,
        help="optimizer steps between checkpoints (500; 0: only when stopped)",
    )
    flag("--keep_checkpoints", type=count, default=2, help="so many, the newest (2)")
    flag(
        "--resume",
        action="store_true",
        help="go on from the newest whole checkpoint in --output_dir, or start where there is none",
    )
    args = parser.parse_args()
    args.resume |= (
        os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"
    )  # torchrun started the processes again, after a failure

    scratch = dict(model_type="llama", n_layer=2, n_head=4, n_embd=128, vocab_size=8000)
    for name, default in scratch.items():
        if args.model_name_or_path and getattr(args, name) is not None:
            parser.error(
                f"argument --{name}: found beside --model_name_or_path, whose config.json decides this; give one of them"
            )
        if getattr(args, name) is None:
            setattr(args, name, default)
    heads, model_dir = (
        f"{args.n_head} for --n_embd {args.n_embd}",
        args.model_name_or_path and Path(args.model_name_or_path).resolve(),
    )
    for is_wrong, name, found in (
        (args.n_embd % args.n_head, "n_head", f"{heads}; expected a divisor"),
        (
            args.model_type == "llama" and args.n_embd // args.n_head % 2,
            "n_head",
            f"{heads}; rotary positions need heads of even width",
        ),
        (
            not args.output_dir or Path(args.output_dir).resolve() == model_dir,
            "output_dir",
            f"{args.output_dir!r}; expected a directory, and not that of --model_name_or_path",
        ),
        (
            args.offload and not args.zero_stage,
            "offload",
            "with --zero_stage 0, which has nothing to offload; give --zero_stage 2 or 3",
        ),
        (
            args.lora_module_name and not args.lora_dim,
            "lora_module_name",
            "without --lora_dim; give its rank",
        ),
        (
            args.only_optimize_lora and not args.lora_dim,
            "only_optimize_lora",
            "without --lora_dim; give its rank",
        ),
        (
            args.eval_path and not args.data_path,
            "eval_path",
            "without --data_path; the built-in data has its own eval set",
        ),
    ):
        if is_wrong:
            parser.error(f"argument --{name}: found {found}")
    if args.per_device_train_batch_size is None:
        args.per_device_train_batch_size = 16 if args.data_path else BUILT_IN["train_batch_size"]
    if args.num_warmup_steps is None:
        args.num_warmup_steps = (
            0 if args.data_path else (args.max_steps or BUILT_IN["max_steps"]) // 20
        )
    if args.micro_batch_tokens is None:
        args.micro_batch_tokens = 2 * args.per_device_train_batch_size * args.max_seq_len
    if args.learning_rate is None:
        args.learning_rate = 5e-5 if args.model_name_or_path else 1e-3
    return args


def extra(name: str):
    """The module in parts/ or tools/ that a flag asks for."""
    try:
        return importlib.import_module(f"{EXTRAS_IN[name]}.{name}")
    except ModuleNotFoundError:
        raise ValueError(
            f"--{EXTRAS[name]}: needs {EXTRAS_IN[name]}/{name}.py, which is not there; put it beside train.py, or leave the flag out"
        ) from None


# ----------------------------------------------------------------------------------------------------------------------
# The loop


def run(args, process: Process):
    model, tokenizer, train, evaluation = prepare(args, process)
    global_batch = (
        args.per_device_train_batch_size * args.gradient_accumulation_steps * process.world_size
    )
    epochs = (
        args.num_train_epochs * math.ceil(len(train) / global_batch)
        if train
        else BUILT_IN["max_steps"]
    )  # in steps
    total_steps = args.max_steps or epochs
    process.print(
        f"{model.backbone.config.model_type} backbone, {sum(p.numel() for p in model.parameters()):,} parameters; "
        f"{process.world_size} x {process.device}; {total_steps} steps of {global_batch} comparisons"
    )
    checkpoints = Path(args.output_dir) / "checkpoints"
    same_run = result_follows_from(args, model, tokenizer, train, global_batch, total_steps)
    done, facts = step_to_go_on_from(checkpoints, args, same_run, total_steps, process)
    tensorboard = None
    if args.enable_tensorboard and process.rank == 0:
        tensorboard = Writer(args.tensorboard_path, done)
    metrics_file, is_evaluated = open_output(model, args, done, process)
    # The hooks that average gradients run only when the wrapped module is called, as `trained(...)`. Calling another
    # method of it, or `model` itself, would train each rank on its own, without a word.
    trained = distribute(model, args, process)
    optimizer = make_optimizer(model, args, process)
    peaks = [group["lr"] for group in optimizer.param_groups]
    scaler = torch.amp.GradScaler(process.device.type, enabled=args.dtype == "fp16")
    skipped, streak = (
        0,
        0,
    )  # steps that fp16's scaler left out; of these, those up to now without one between them
    torch.manual_seed(args.seed + process.rank)  # dropout differs between ranks
    if done:
        load_checkpoint(checkpoints / f"step-{done}", facts, model, optimizer, args, process)
        scaler.load_state_dict(facts["scaler"])
        skipped, streak = facts["skipped"]
        process.print(f"going on after step {done}, from {checkpoints}/step-{done}")

    def log(**event):
        if process.rank == 0:
            event = {
                name: None if isinstance(value, float) and not math.isfinite(value) else value
                for name, value in event.items()
            }
            with said_if_unwritable(checkpoints):
                metrics_file.write(json.dumps(event) + "\n")  # JSON has no NaN and no infinity
                metrics_file.flush()
                if tensorboard:
                    tensorboard.write(event)

    def evaluation_is_due(step):
        return step in (0, total_steps) or args.eval_interval and step % args.eval_interval == 0

    def run_evaluation(step):
        metrics, numbers = evaluate(model, evaluation, args, process, step)
        log(event="eval", step=step, **metrics)
        process.print(
            f"step {step}: " + ", ".join(f"{name} {value:.4g}" for name, value in metrics.items())
        )
        return numbers

    def save(step):
        facts = {
            "step": step,
            "processes": [process.world_size, process.device.type],
            "scaler": scaler.state_dict(),
            "skipped": [skipped, streak],
            "same_run": same_run,
        }
        with said_if_unwritable(checkpoints):
            if process.rank == 0:
                os.fsync(metrics_file.fileno())  # its lines up to here are of the checkpoint
            save_checkpoint(
                checkpoints,
                step,
                training_state(model, optimizer, process),
                facts,
                args.keep_checkpoints,
                process,
            )

    signals, stopping = [], False
    for which in (signal.SIGTERM, signal.SIGINT):
        signal.signal(which, lambda which, frame: signals.append(which))
    numbers = run_evaluation(done) if evaluation_is_due(done) and not is_evaluated else None
    batches, step_ended = (
        global_batches(train, args, tokenizer, global_batch, done),
        time.perf_counter(),
    )
    with tqdm(total=total_steps, initial=done, unit=" steps", disable=process.rank != 0) as bar:
        for step, batch in zip(range(done + 1, total_steps + 1), batches):
            for group, peak in zip(optimizer.param_groups, peaks):
                group["lr"] = learning_rate(
                    args.lr_scheduler_type, peak, step - 1, args.num_warmup_steps, total_steps
                )
            chunks, losses, pairs, tokens = (
                divide(batch, args.micro_batch_tokens, args, process, model.longest_tail),
                [],
                0,
                0,
            )
            for i, chunk in enumerate(
                chunks
            ):  # an empty one takes part in the averaging of gradients, with a loss that weighs nothing
                inputs, computed = collate(
                    [batch[j] for j in chunk or [0]], model, args.layout, process.device
                )
                with (
                    nullcontext() if i == len(chunks) - 1 or trained is model else trained.no_sync()
                ):
                    with half_precision(args, process):
                        out = trained(*inputs)
                    loss = out["loss"] * (
                        len(chunk) / len(batch)
                    )  # summed over micro-batches and ranks: the mean over the batch
                    scaler.scale(
                        loss * process.world_size
                    ).backward()  # DistributedDataParallel and FSDP take the mean over ranks
                losses.append(loss.detach())
                pairs += len(out["chosen_mean_scores"]) if chunk else 0
                tokens += computed
            scaler.unscale_(optimizer)
            grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), args.max_grad_norm)
            grad_norm = (grad_norm.full_tensor() if args.zero_stage else grad_norm).item()
            loss = torch.stack(losses).double().sum().item()
            loss, pairs, tokens, stopping = process.sum([loss, pairs, tokens, len(signals)])
            if math.isfinite(loss) and math.isfinite(
                grad_norm
            ):  # the same on every rank, so all of them leave, or none
                streak = 0
            else:
                skipped, streak = skipped + 1, streak + 1
                if not scaler.is_enabled() or streak == LONGEST_STREAK:
                    stop_at_non_finite(
                        model,
                        step,
                        loss,
                        grad_norm,
                        batch,
                        chunks,
                        losses,
                        checkpoints,
                        args,
                        process,
                    )
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            began, step_ended = step_ended, time.perf_counter()
            log(
                event="step",
                step=step,
                loss=loss,
                lr=optimizer.param_groups[0]["lr"],
                grad_norm=grad_norm,
                pairs=int(pairs),
                tokens=int(tokens),
                seconds=step_ended - began,
            )
            bar.set_postfix(loss=f"{loss:.4f}", refresh=False)
            bar.update()
            if evaluation_is_due(step) and (not stopping or step == total_steps):
                numbers = run_evaluation(step)
            if (
                stopping
                or args.save_interval
                and (step % args.save_interval == 0 or step == total_steps)
            ):
                save(step)
            if stopping:
                break
    if stopping and step < total_steps:
        process.print(
            f"stopped after step {step} of {total_steps}, as asked to; the same command with --resume goes on from "
            f"{checkpoints}/step-{step}"
        )
    else:
        if numbers is None:  # of a run that had ended before
            _, numbers = evaluate(model, evaluation, args, process, total_steps)
        finish(model, tokenizer, numbers, skipped, args, process)
    process.wait()  # nobody leaves before the model is saved


def learning_rate(kind: str, peak: float, step: int, warmup: int, total: int) -> float:
    """The learning rate of optimizer step `step` (from 0) of `total`: as transformers' `get_scheduler`, so DeepSpeed-Chat's."""
    if step < warmup and kind != "constant":
        return peak * step / warmup
    remaining = max(0.0, (total - step) / max(1, total - warmup))  # 1 after warm-up, 0 at the end
    if kind == "linear":
        return peak * remaining
    if kind == "polynomial":  # of degree 1, to 1e-7
        return 1e-7 + (peak - 1e-7) * remaining
    if kind in (
        "cosine",
        "cosine_with_restarts",
    ):  # with one cycle, which is the default, there is no restart
        return peak * 0.5 * (1 - math.cos(math.pi * remaining))
    return peak


@functools.lru_cache(maxsize=2)
def epoch_order(n: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.RandomState([seed, epoch]).permutation(n)


def batch_indices(n: int, global_batch: int, seed: int, step: int) -> np.ndarray:
    """The comparisons of optimizer step `step` (from 0): a function of its arguments alone. An epoch's last may be smaller."""
    epoch, step = divmod(step, math.ceil(n / global_batch))
    return epoch_order(n, seed, epoch)[step * global_batch : (step + 1) * global_batch]


def global_batches(
    train: data.TokenizedData | None, args, tokenizer, global_batch: int, done: int
) -> Iterator[list[data.Tokenized]]:
    """Of every optimizer step after the first `done`, its comparisons, all ranks' together. Without end, and the same on every rank."""
    if train:
        for step in itertools.count(done):
            yield [train[i] for i in batch_indices(len(train), global_batch, args.seed, step)]
    stream = data.tokenize_each(
        built_in_data(args), tokenizer, args.max_seq_len, args.truncation_side
    )
    for step in itertools.count():
        batch = list(itertools.islice(stream, global_batch))
        if step >= done:
            yield batch


def size_of(group: list, layout: str, longest_tail: int | None = None) -> tuple[int, int, int]:
    """(rows, length, responses) of a comparison. A batch computes on the sum of rows times the largest length; packed: rows of a token."""
    if layout == "packed":
        return packed_size(group, longest_tail), 1, 0
    return len(group) * (len(group) - 1), max(map(len, group)), len(group)


def shares_of_ranks(sizes: list[tuple], world_size: int) -> list[list[int]]:
    """For every rank the indices of its comparisons: the largest one first, each goes to the rank with the fewest tokens."""
    tokens, shares = [0] * world_size, [[] for _ in range(world_size)]
    for i in sorted(range(len(sizes)), key=lambda i: -sizes[i][0] * sizes[i][1]):
        rank = tokens.index(min(tokens))
        shares[rank].append(i)
        tokens[rank] += sizes[i][0] * sizes[i][1]
    return [sorted(share) for share in shares]


def micro_batches(share: list[int], sizes: list[tuple], budget: int) -> list[list[int]]:
    """Cut comparisons into micro-batches of at most `budget` tokens as computed on; a larger comparison is one by itself.

    Padded micro-batches have similar lengths and equally many responses each: then the mean over their pairs is the mean
    over their comparisons of the mean over their pairs, and they add up by their number.
    """
    result, rows, longest = [], 0, 0
    for i in sorted(
        share, key=lambda i: (sizes[i][2], sizes[i][1])
    ):  # packed: all the same, the order stays
        more, length, responses = sizes[i]
        rows, longest = rows + more, max(longest, length)
        if not result or rows * longest > budget or sizes[result[-1][0]][2] != responses:
            result.append([])
            rows, longest = more, length
        result[-1].append(i)
    return result


def divide(
    batch: list[data.Tokenized],
    budget: int,
    args,
    process: Process,
    longest_tail: int | None = None,
) -> list[list[int]]:
    """Which of these comparisons, all ranks', this rank computes on, in micro-batches.

    At least one, and with sharded weights as many on every rank, because there the ranks wait for each other in each: some
    may be empty.
    """
    sizes = [size_of(comparison.sequences, args.layout, longest_tail) for comparison in batch]
    shares = shares_of_ranks(sizes, process.world_size)
    mine = micro_batches(shares[process.rank], sizes, budget)
    most = (
        max(len(micro_batches(share, sizes, budget)) for share in shares) if args.zero_stage else 1
    )
    return mine + [[]] * (most - len(mine))


def collate(
    comparisons: list[data.Tokenized], model: RewardModel, layout: str, device
) -> tuple[tuple, int]:
    """What the model is called with, and the number of tokens that it computes on.

    Padded: (2B, L) ids and mask, the chosen rows of all pairs, then the rejected; the pairs' margins. Packed: a PackedBatch.
    """
    if layout == "packed":
        sequences, _, margins, _ = zip(*comparisons)
        batch = data.pack(sequences, model.pad_id, longest_tail=model.longest_tail, margins=margins)
        return (batch.to(device),), batch.num_tokens
    pairs = [
        (*pair, comparison.margin)
        for comparison in comparisons
        for pair in itertools.combinations(comparison.sequences, 2)
    ]
    chosen, rejected, margins = zip(*pairs)
    input_ids, mask = data.pad_rows([*chosen, *rejected], model.pad_id)
    return (input_ids.to(device), mask.to(device), margins), input_ids.numel()


def half_precision(args, process: Process):
    """Without autocast's cache: every weight is used once a pass, and its copy would outlive the one that FSDP frees."""
    return torch.autocast(
        process.device.type, DTYPES[args.dtype], enabled=args.dtype != "fp32", cache_enabled=False
    )


@torch.no_grad()
def stop_at_non_finite(
    model, step, loss, grad_norm, batch, chunks, losses, checkpoints: Path, args, process: Process
):
    """End the run with a line that names the step, and of each rank the rows whose loss is not finite."""
    suspects, alone = (
        [
            i
            for chunk, chunk_loss in zip(chunks, losses)
            if not math.isfinite(chunk_loss)
            for i in chunk
        ],
        [],
    )
    for i in sorted(
        process.join(suspects)[0]
    ):  # by itself, on every rank; in a packed batch, NaN with an attention of 0 is NaN too
        inputs, _ = collate([batch[i]], model, args.layout, process.device)
        with half_precision(args, process):
            alone += [] if math.isfinite(model(*inputs)["loss"]) else [i]
    rows = [batch[i].where for i in sorted(suspects) if i in alone or not alone]
    said = ", ".join(rows[:8]) + (f" and {len(rows) - 8} more" if len(rows) > 8 else "")
    (ranks,) = process.join([f"rank {process.rank}: {said}"] if rows else [])
    first = f"{batch[0].where} and {len(batch) - 1} more" if len(batch) > 1 else batch[0].where
    streak = (
        f", after {LONGEST_STREAK - 1} that were not finite either and were left out"
        if args.dtype == "fp16"
        else ""
    )
    what = (
        f"the loss is {loss:g} ({'; '.join(ranks)})"
        if ranks
        else f"the gradient norm is {grad_norm:g}, that of a finite loss (rows: {first})"
    )
    last = checkpoint_steps(checkpoints)
    raise ValueError(
        f"at step {step} {what}{streak}; training cannot go on from there, and the optimizer did not step. "
        f"{f'The last checkpoint is {checkpoints}/step-{last[0]}. ' if last else ''}A smaller --learning_rate than "
        f"{args.learning_rate:g}, or more --num_warmup_steps, may help"
    )


def finish(model: RewardModel, tokenizer, numbers: dict, skipped: int, args, process: Process):
    """Save the model and a page about the run, and say how it went. numbers: those that the last evaluation was made of, from `evaluate`."""
    model, output_dir = plain_model(model, args, process), Path(args.output_dir)
    if process.rank != 0:
        return
    events = [json.loads(line) for line in (output_dir / "metrics.jsonl").read_text().splitlines()]
    evaluations = [event for event in events if event["event"] == "eval"]
    before, after = evaluations[0], evaluations[-1]
    complaint = None
    if args.normalize_rewards:
        try:
            print(extra("normalize").normalize(model, numbers["scores"]))
        except ValueError as error:
            complaint = error  # the model is saved as it is, first
    with said_if_unwritable(output_dir / "checkpoints"):
        model.save_pretrained(output_dir, tokenizer=tokenizer)
        run_page(
            output_dir / "report.html",
            events,
            vars(args),
            numbers["chosen"],
            numbers["rejected"],
            numbers["true_margin"],
        )
    if complaint:
        raise complaint
    best = (
        f"; the best possible (Bayes-optimal) is {after['bayes_accuracy']:.4f}"
        if "bayes_accuracy" in after
        else ""
    )
    if numbers["rewards"]:
        print(
            f"Spearman's correlation of {len(numbers['scores'])} eval responses' scores with their true rewards: "
            f"{spearman(numbers['scores'], numbers['rewards']):.4f}"
        )
    if skipped:
        print(f"{skipped} steps were left out, as their gradients were too large for fp16")
    print(
        f"accuracy on {after['pairs']} eval pairs: {before['accuracy']:.4f} before, {after['accuracy']:.4f} after training{best}\n"
        f"model: {args.output_dir}   metrics: {args.output_dir}/metrics.jsonl   page: {args.output_dir}/report.html\n"
        f"score with it: python rm.py {args.output_dir} FILE.jsonl"
    )


def plain_model(model: RewardModel, args, process: Process) -> RewardModel:
    """On rank 0 the model with all its weights, and LoRA merged into them."""
    state = get_model_state_dict(
        model, options=StateDictOptions(full_state_dict=True, cpu_offload=True)
    )
    if process.rank != 0:
        return model
    if args.lora_dim:
        state = extra("lora").merge(state)
    with torch.device("meta"):
        plain = RewardModel(
            GPT(model.backbone.config),
            model.pad_id,
            model.num_padding_at_beginning,
            reward_bias=model.reward_bias,
        )
    plain.load_state_dict(state, assign=True)
    return plain


# ----------------------------------------------------------------------------------------------------------------------
# Evaluation


@torch.no_grad()
def evaluate(
    model: RewardModel, dataset: data.TokenizedData, args, process: Process, step: int
) -> tuple[dict, dict]:
    """The metrics of an eval set, each comparison counted once. Every rank computes its part and gets the whole.

    Also returns the numbers that they are made of, as lists: `chosen`, `rejected` (end scores), `true_margin`, of every pair;
    `scores`, `rewards`, of every response. The true ones are empty where they are not known.
    """
    n = len(dataset)
    if args.eval_iters:
        n = min(n, args.eval_iters * args.per_device_eval_batch_size * process.world_size)
    at_once, budget = (
        64 * args.per_device_eval_batch_size * process.world_size,
        2 * args.per_device_eval_batch_size * args.max_seq_len,
    )
    loss, numbers = (
        0.0,
        {name: [] for name in ("chosen", "rejected", "true_margin", "scores", "rewards")},
    )
    model.eval()
    for start in tqdm(
        range(0, n, at_once), desc=f"eval at step {step}", leave=False, disable=process.rank != 0
    ):
        batch = [dataset[i] for i in range(start, min(start + at_once, n))]
        for chunk in divide(batch, budget, args, process, model.longest_tail):
            inputs, _ = collate(
                [batch[i] for i in chunk or [0]], model, args.layout, process.device
            )
            with half_precision(args, process):
                out = model(*inputs)
            loss += out["loss"].item() * len(chunk)
            pairs = zip(out["chosen_mean_scores"].tolist(), out["rejected_mean_scores"].tolist())
            for comparison in (batch[i] for i in chunk):
                K, true = len(comparison.sequences), comparison.rewards or []
                chosen, rejected = zip(*itertools.islice(pairs, K * (K - 1) // 2))
                numbers["chosen"] += chosen
                numbers["rejected"] += rejected
                numbers["true_margin"] += [a - b for a, b in itertools.combinations(true, 2)]
                numbers["scores"] += [
                    chosen[0],
                    *rejected[: K - 1],
                ]  # the first pairs are those of the first response
                numbers["rewards"] += true
    model.train()
    loss, *lists = process.join(loss, *numbers.values())
    numbers = dict(zip(numbers, lists))
    metrics = summarize(
        loss / n, numbers["chosen"], numbers["rejected"], numbers["true_margin"], dataset.dropped
    )
    return metrics, numbers


# ----------------------------------------------------------------------------------------------------------------------
# Preparation: everything that can be wrong with flags, files and models shows here, before the first step


def prepare(args, process: Process):
    """The model, on the CPU; its tokenizer; tokenized training data (None: the built-in data, drawn as needed) and eval data.

    The order is that of the cost of a mistake: the model directory, the data, and only then is a tokenizer trained.
    """
    torch.manual_seed(args.seed)  # for fresh weights, the same ones on every rank
    tokenizer, model, pretrained = None, None, args.model_name_or_path
    if pretrained and not Path(pretrained).is_dir():
        raise ValueError(
            f"--model_name_or_path {pretrained}: no such directory; expected one with config.json and weights"
        )
    if args.tokenizer_path or pretrained:
        try:
            tokenizer = data.load_tokenizer(args.tokenizer_path or pretrained, args.pad_id)
        except ValueError as error:
            raise ValueError(f"{error}; --tokenizer_path says where one is") from None
    if pretrained:
        model = RewardModel.from_pretrained(
            pretrained, tokenizer.pad_id, leading_pads(args, tokenizer)
        )
        rows = read_config(pretrained)["vocab_size"]
        if tokenizer.text_size > rows:
            raise ValueError(
                f"--model_name_or_path {pretrained}: has {rows} token ids, the tokenizer {tokenizer.text_size}; give the one of "
                "the model (--tokenizer_path)"
            )
        check_positions(model.backbone.config, args)
    for path in [*(args.data_path or ()), *(args.eval_path or ())]:
        token_cache.file_hash(path)
    try:
        if tokenizer is None:
            tokenizer = new_tokenizer(args)
        train, evaluation = load_data(args, tokenizer, process)
    except OSError as error:
        raise ValueError(
            f"--data_output_path {args.data_output_path}: {error}; give a directory on a disk with room for the tokens"
        ) from None
    for name, dataset in (("train", train), ("eval", evaluation)):
        if dataset is not None:
            process.print(
                f"{name}: {len(dataset)} comparisons; {dataset.dropped} dropped, because their sequences are identical"
            )
            if not len(dataset):
                raise ValueError(
                    f"{name} data: no comparison is left at --max_seq_len {args.max_seq_len}; it needs responses that differ"
                )
    if model is None:
        model = new_model(args, tokenizer)
    if lora_layers := set_up(model, args):
        process.print(f"LoRA of rank {args.lora_dim} beside {lora_layers} linear layers")
    return model, tokenizer, train, evaluation


def check_positions(config: GPTConfig, args):
    if args.max_seq_len > config.n_positions:
        raise ValueError(
            f"--max_seq_len: found {args.max_seq_len}; {args.model_name_or_path} has {config.n_positions} positions, "
            "so give at most that"
        )


def new_model(args, tokenizer) -> RewardModel:
    """A model from scratch."""
    config = GPTConfig(
        args.model_type,
        vocab_size=tokenizer.vocab_size,
        n_positions=args.max_seq_len,
        n_layer=args.n_layer,
        n_head=args.n_head,
        n_embd=args.n_embd,
        token_ids={"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id},
    )
    return RewardModel(GPT(config), tokenizer.pad_id, leading_pads(args, tokenizer))


def leading_pads(args, tokenizer) -> int:
    given = args.num_padding_at_beginning
    return int(tokenizer.bos_id == tokenizer.pad_id) if given is None else given


def set_up(model: RewardModel, args) -> int:
    """Dropout, objective, gradient checkpointing and LoRA as the flags say. Returns the number of layers that got LoRA."""
    model.backbone.config.dropout = args.dropout
    model.loss = args.loss
    model.center_rewards_coefficient = args.center_rewards_coefficient
    model.backbone.gradient_checkpointing = args.gradient_checkpointing
    if not args.lora_dim:
        return 0
    layers = model.backbone.linear_layers()
    return extra("lora").add(
        model, layers, args.lora_dim, args.lora_module_name, args.only_optimize_lora
    )


def new_tokenizer(args) -> data.Tokenizer:
    """A tokenizer trained on the text of --data_path, once for the same files, or on built-in data. Every process gets the same."""

    def train() -> bytes:
        sources, texts = [itertools.islice(built_in_data(args), BUILT_IN["tokenizer_pairs"])], []
        if args.data_path:
            tqdm.write("training a tokenizer")
            sources = [
                data.load_comparisons(path, bad_rows=[] if args.skip_bad_rows else None)
                for path in args.data_path
            ]
        for comparisons in sources:
            room = TOKENIZER_CHARACTERS // len(sources)
            for comparison in (
                comparisons
            ):  # to the last row, also without room: the data comes before the tokenizer
                added = [
                    comparison.prompt + response for response in comparison.responses if room > 0
                ]
                texts += added
                room -= sum(map(len, added))
        try:
            return data.train_tokenizer(texts, args.vocab_size).model_proto
        except ValueError as error:
            raise ValueError(f"--vocab_size: {error}") from None

    if not args.data_path:
        return data.Tokenizer(train(), args.pad_id)
    key = token_cache.hash_of(
        "tokenizer 1",
        [token_cache.file_hash(path) for path in args.data_path],
        args.vocab_size,
        args.skip_bad_rows,
    )
    directory = token_cache.cached(
        Path(args.data_output_path) / key,
        lambda directory: (directory / "tokenizer.model").write_bytes(train()),
    )
    return data.Tokenizer((directory / "tokenizer.model").read_bytes(), args.pad_id)


def built_in_data(args):
    """The endless built-in training data of a --seed, which is never that of the eval set."""
    return data.known_rewards(EVAL_SEED + 1 + args.seed)


def load_data(
    args, tokenizer, process: Process
) -> tuple[data.TokenizedData | None, data.TokenizedData]:
    """Training and eval data. Training is None for the built-in data, whose comparisons are drawn as they are needed."""
    how = tokenizer, args.max_seq_len, args.truncation_side
    if not args.data_path:
        return None, data.tokenize_all(
            itertools.islice(data.known_rewards(EVAL_SEED), BUILT_IN["eval_pairs"]), *how
        )

    def load(paths, share_of) -> tuple[list[data.TokenizedFile], np.ndarray]:
        """Files, and which rows of them: (n, 2) int64, numbers of files and of rows."""
        files, selected = (
            [
                data.tokenize_file(path, *how, args.data_output_path, args.skip_bad_rows)
                for path in paths
            ],
            [],
        )
        for i, file in enumerate(files):
            if with_margin := np.count_nonzero(file.rows["margin"]):
                process.print(
                    f"{file.path}: {with_margin} rows have a margin, which the loss takes off their differences"
                )
            if file.bad_rows:
                process.print(
                    f"{file.path}: {len(file.bad_rows)} rows left out, as they are no comparison; the first: {file.bad_rows[0]}"
                )
            share = share_of(len(file))
            if len(share) == 0:
                raise ValueError(
                    f"--data_split: the second share of the {len(file)} rows of {file.path} is no row; give a larger one"
                )
            selected.append(np.stack((np.full(len(share), i), share), axis=1))
        return files, np.concatenate(selected)

    files, selected = load(
        args.data_path, lambda n: data.split_indices(n, args.data_split, stage=1, seed=args.seed)
    )
    if args.eval_path:
        return data.select(files, selected), data.select(*load(args.eval_path, np.arange))
    selected = np.random.RandomState(args.seed).permutation(selected)
    held_out = max(1, round(args.eval_fraction * len(selected)))
    if held_out >= len(selected):
        raise ValueError(
            f"--data_path: {len(selected)} comparisons (after --data_split), too few to hold some out; give more, or --eval_path"
        )
    return data.select(files, selected[:-held_out]), data.select(files, selected[-held_out:])


def distribute(model: RewardModel, args, process: Process):
    """The model on this process's device, and what is to be called in its place, so that gradients are averaged over ranks."""
    for parameter in model.parameters():
        parameter.data = parameter.data.contiguous()  # gpt2's checkpoints have them transposed
    if not args.zero_stage:
        model.to(process.device)
        return (
            DistributedDataParallel(model, gradient_as_bucket_view=True)
            if process.world_size > 1
            else model
        )
    options = dict(
        mesh=init_device_mesh(process.device.type, (process.world_size,)),
        reshard_after_forward=args.zero_stage == 3,
    )
    if args.offload:
        options["offload_policy"] = CPUOffloadPolicy(pin_memory=process.device.type == "cuda")
    for module in (
        *model.backbone.blocks,
        model,
    ):  # the root takes what the blocks leave: embeddings, norm and head
        fully_shard(module, **options)
    return model


def make_optimizer(model: RewardModel, args, process: Process) -> torch.optim.AdamW:
    """AdamW (Loshchilov & Hutter 2019) as in DeepSpeed-Chat, but for one rule of what decays: matrices do, vectors don't."""
    trained = {
        name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad
    }
    lora = [name for name in trained if "lora_" in name]
    matrices = [
        name for name, parameter in trained.items() if parameter.dim() >= 2 and name not in lora
    ]
    vectors = [name for name, parameter in trained.items() if parameter.dim() < 2]
    groups = []
    for what, names, lr, decay in (
        ("matrices", matrices, args.learning_rate, args.weight_decay),
        ("vectors", vectors, args.learning_rate, 0.0),
        ("LoRA", lora, args.lora_learning_rate, args.weight_decay),
    ):
        if names:
            groups.append(
                {"params": [trained[name] for name in names], "lr": lr, "weight_decay": decay}
            )
            count = sum(parameter.numel() for parameter in groups[-1]["params"])
            process.print(
                f"{what}: {len(names)} tensors, {count:,} parameters, learning rate {lr:g}, weight decay {decay:g}"
            )
    return torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=True)


# ----------------------------------------------------------------------------------------------------------------------
# The output directory, and checkpoints/step-N in it, each whole or not there


def open_output(model: RewardModel, args, step: int, process: Process):
    """Make the output directory ready, on rank 0, for a run that goes on after `step`.

    At step 0 the files of an earlier run are moved to earlier-N; later, what metrics.jsonl has of later steps is taken out.
    Returns metrics.jsonl, open on rank 0, and whether the evaluation of `step` is in it. Raises ValueError where the disk has
    no room for what the run will write: the model, and checkpoints, one of them half-written.
    """
    path, metrics, metrics_file, events = (
        Path(args.output_dir),
        Path(args.output_dir) / "metrics.jsonl",
        None,
        [],
    )
    # Checkpoints go first: what is left, should this be interrupted, is not taken for a run to go on with.
    names = (
        "checkpoints",
        "metrics.jsonl",
        "report.html",
        "config.json",
        *WEIGHT_FILES,
        *TOKENIZER_FILES,
        *CONFIG_FILES,
        "merges.txt",
    )
    try:
        if process.rank == 0:
            path.mkdir(parents=True, exist_ok=True)
            if not step and (earlier := [path / name for name in names if (path / name).exists()]):
                aside = next(
                    aside
                    for n in itertools.count(1)
                    if not (aside := path / f"earlier-{n}").exists()
                )
                aside.mkdir()
                for file in earlier:
                    file.rename(aside / file.name)
                process.print(f"{path} held the files of an earlier run; they are in {aside} now")

            size = sum(
                4 * parameter.numel() for parameter in model.parameters()
            )  # bytes; a checkpoint also has the two moments of AdamW
            checkpoints = args.keep_checkpoints + 1 if args.save_interval else 1
            needed, free = size * (1 + 3 * checkpoints), shutil.disk_usage(path).free
            free += sum(
                file.stat().st_size for file in (path / "checkpoints").rglob("*")
            )  # of this run, and counted in what is needed
            if free < needed:
                raise ValueError(
                    f"--output_dir {path}: {free / 1e9:.1f} GB are free there; the model and {checkpoints} checkpoints of it "
                    f"(--keep_checkpoints, and the one being written) take {needed / 1e9:.1f} GB; give another directory"
                )

            lines = metrics.read_text().splitlines(keepends=True) if metrics.exists() else []
            events = [
                json.loads(line) for line in lines if line.endswith("\n")
            ]  # not one that the end of the run cut
            events = [event for event in events if event["step"] <= step]
            (path / "metrics.jsonl.part").write_text(
                "".join(json.dumps(event) + "\n" for event in events)
            )
            (path / "metrics.jsonl.part").rename(metrics)
            metrics_file = open(metrics, "a")
    except OSError as error:
        raise ValueError(
            f"--output_dir {path}: cannot be written to ({error.strerror}); give another directory"
        ) from None
    return metrics_file, process.share(
        any(event["event"] == "eval" and event["step"] == step for event in events)
    )


@contextmanager
def said_if_unwritable(checkpoints: Path):
    """An error of writing becomes a ValueError that says what is left."""
    try:
        yield
    except (OSError, RuntimeError, CheckpointException) as error:
        if isinstance(error, CheckpointException):  # of several ranks
            error, _ = next(iter(error.failures.values()))
        if lost_process(error):
            raise error
        last = checkpoint_steps(checkpoints)
        left = (
            f"the last whole checkpoint is {checkpoints}/step-{last[0]}"
            if last
            else "there is no earlier checkpoint"
        )
        raise ValueError(
            f"--output_dir {checkpoints.parent}: cannot be written to ({str(error).partition(chr(10))[0]}); {left}. Make room, and "
            "the same command with --resume goes on from there"
        ) from None


def training_state(model: RewardModel, optimizer, process: Process) -> dict:
    """What a checkpoint holds in tensors: this rank's shards, or where every rank has everything, all of it."""
    model_state, optimizer_state = get_state_dict(model, optimizer)
    random = {"cpu": torch.get_rng_state()}
    if process.device.type == "cuda":
        random["cuda"] = torch.cuda.get_rng_state()
    return {
        "model": model_state,
        "optimizer": optimizer_state,
        "random": {f"rank {process.rank}": random},
    }


def save_checkpoint(
    directory: Path, step: int, state: dict, facts: dict, keep: int, process: Process
):
    """Write directory/step-N under another name, and give it its own when all of it is on the disk. Keeps the newest `keep`.

    facts: what a run that goes on from here must know or agree with, in JSON. Raises OSError or CheckpointException.
    """
    whole, part = directory / f"step-{step}", directory / f".step-{step}.part"
    if process.rank == 0:
        for left_over in directory.glob(".step-*"):  # of a run that was killed while it saved
            shutil.rmtree(left_over)
        part.mkdir(parents=True)
    process.wait()
    dcp.save(
        state, checkpoint_id=part, no_dist=not dist.is_initialized()
    )  # every rank its shards, synced to the disk
    process.wait()
    if process.rank == 0:
        (part / "facts.json").write_text(json.dumps(facts))
        (part / "sha256.json").write_text(json.dumps(hashes(part)))
        for path in (part / "facts.json", part / "sha256.json", part):
            sync(path)
        if whole.exists():  # a damaged one
            whole.rename(directory / f".step-{step}.old")
        part.rename(whole)
        sync(directory)
        steps = checkpoint_steps(directory)
        for old in set(steps) - set(
            [earlier for earlier in steps if earlier <= step][:keep]
        ):  # later ones were damaged when this run began
            (directory / f"step-{old}").rename(directory / f".step-{old}.old")
        for old in directory.glob(".step-*.old"):
            shutil.rmtree(old)
    process.wait()


def sync(path: Path):
    """Have the disk know of a file's content, or of a directory's names."""
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def hashes(checkpoint: Path) -> dict[str, str]:
    """What sha256.json says of a checkpoint's other files, if they are as they were written."""
    return {
        path.name: token_cache.file_hash(path)
        for path in sorted(checkpoint.iterdir())
        if path.name != "sha256.json"
    }


def checkpoint_steps(directory: Path) -> list[int]:
    """Those that have a checkpoint, the newest first."""
    return sorted(
        (int(path.name[5:]) for path in directory.glob("step-*") if path.name[5:].isdecimal()),
        reverse=True,
    )


def newest_checkpoint(directory: Path, process: Process) -> tuple[int, dict]:
    """The step and the facts of the newest checkpoint that is whole, (0, {}) where there is none. Says which it skips, and why."""
    newest = 0, {}
    for step in checkpoint_steps(directory) if process.rank == 0 else ():
        path = directory / f"step-{step}"
        try:
            written, found = json.loads((path / "sha256.json").read_text()), hashes(path)
            for name in written | found:
                if written.get(name) != found.get(name):
                    raise ValueError(
                        f"{name} is not what was written" if name in found else f"{name} is missing"
                    )
            newest = step, json.loads((path / "facts.json").read_text())
            break
        except (OSError, ValueError, TypeError) as error:
            process.print(f"{path}: skipped, as it is damaged: {error}")
    return process.share(newest)


def load_checkpoint(path: Path, facts: dict, model: RewardModel, optimizer, args, process: Process):
    """Model, optimizer and random states as they were. With another number or kind of processes random states begin anew."""
    state = training_state(model, optimizer, process)
    if facts["processes"] != [process.world_size, process.device.type]:
        del state["random"]
    dcp.load(state, checkpoint_id=path, no_dist=not dist.is_initialized())
    set_state_dict(
        model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"]
    )
    if "random" not in state:
        torch.manual_seed(args.seed + process.rank + facts["step"] * process.world_size)
        return
    random = state["random"][f"rank {process.rank}"]
    torch.set_rng_state(random["cpu"])
    if "cuda" in random:
        torch.cuda.set_rng_state(random["cuda"])


def result_follows_from(
    args, model: RewardModel, tokenizer, train, global_batch: int, total_steps: int
) -> dict:
    """What the weights of a run follow from, by the flags that decide it. How ranks, rows and accumulation make up a batch doesn't count."""
    names = (
        "seed",
        "learning_rate",
        "weight_decay",
        "max_grad_norm",
        "lr_scheduler_type",
        "num_warmup_steps",
        "truncation_side",
        "max_seq_len",
        "dropout",
        "dtype",
        "loss",
        "center_rewards_coefficient",
        "lora_dim",
        "lora_module_name",
        "only_optimize_lora",
        "lora_learning_rate",
    )
    facts = {f"--{name}": getattr(args, name) for name in names}
    facts[
        "the batch of all processes (--per_device_train_batch_size, --gradient_accumulation_steps)"
    ] = global_batch
    facts |= {
        f"{name} of the model's config (--model_name_or_path, --model_type, --n_layer, --n_head, --n_embd)": value
        for name, value in asdict(model.backbone.config).items()
        if name != "dropout"
    }
    facts["the pad id (--pad_id, --num_padding_at_beginning)"] = [
        model.pad_id,
        model.num_padding_at_beginning,
    ]
    facts["the tokenizer (--tokenizer_path, --vocab_size)"] = tokenizer.fingerprint()
    facts["the training data (--data_path, --data_split, --eval_path, --eval_fraction)"] = (
        train.fingerprint() if train else "built-in"
    )
    if args.dropout:  # its numbers are drawn for other tokens
        facts["--layout"] = args.layout
    if not args.lr_scheduler_type.startswith("constant"):
        facts["the number of steps (--max_steps, --num_train_epochs)"] = total_steps
    return facts


def step_to_go_on_from(
    checkpoints: Path, args, same_run: dict, total_steps: int, process: Process
) -> tuple[int, dict]:
    """The step and the facts of the checkpoint that --resume finds; (0, {}): start. Raises ValueError where it is of another run."""
    done, facts = newest_checkpoint(checkpoints, process) if args.resume else (0, {})
    path, before = checkpoints / f"step-{done}", facts.get("same_run", {})
    others = [
        f"{name} was {before[name]!r} and is {same_run[name]!r}"
        for name in same_run
        if name in before and same_run[name] != before[name]
    ]
    if others:
        raise ValueError(
            f"--resume: {path} is of a run with other flags: {'; '.join(others)}; give the same ones, or another --output_dir"
        )
    if done > total_steps:
        raise ValueError(
            f"--max_steps: found {total_steps}; {path} has gone further; give at least {done}, or another --output_dir"
        )
    return done, facts


# ----------------------------------------------------------------------------------------------------------------------
# Processes


@dataclass
class Process:
    """This process among those that torchrun started, or alone."""

    rank: int = 0
    world_size: int = 1
    device: torch.device = torch.device("cpu")

    @classmethod
    def start(cls, args) -> "Process":
        device = (
            torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
            if torch.cuda.is_available()
            else cls.device
        )
        if device.type == "cuda":
            torch.cuda.set_device(device)
        if "RANK" not in os.environ and not args.zero_stage:
            return cls(device=device)
        timeout, store, rank, world_size = (
            timedelta(seconds=args.process_timeout),
            dist.HashStore(),
            0,
            1,
        )
        if "RANK" in os.environ:
            store, rank, world_size = next(dist.rendezvous("env://", timeout=timeout))
            store.set_timeout(timeout)
            store = dist.PrefixStore(
                agree_on_name(store, rank, world_size, args.process_timeout), store
            )
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(
            backend, store=store, rank=rank, world_size=world_size, timeout=timeout
        )
        return cls(rank, world_size, device)

    def wait(self):
        """For all ranks to be here."""
        if self.world_size > 1:
            dist.barrier()

    def print(self, text: str):
        if self.rank == 0:
            tqdm.write(text)

    def sum(self, values: list[float]) -> list[float]:
        """Every number added up over the ranks."""
        values = torch.tensor(values, dtype=torch.float64, device=self.device)
        if self.world_size > 1:
            dist.all_reduce(values)
        return values.tolist()

    def join(self, *values) -> list:
        """The same for what is no number: lists are joined. Slower."""
        parts = [values] * self.world_size
        if self.world_size > 1:
            dist.all_gather_object(parts, values)
        return [functools.reduce(operator.add, column) for column in zip(*parts)]

    def share(self, value):
        """Rank 0's value, on every rank."""
        return self.join([value])[0][0]


def agree_on_name(store: dist.Store, rank: int, world_size: int, seconds: float) -> str:
    """One that the processes give their meeting. After a restart by torchrun, its store still has the addresses of the processes
    before them (pytorch issue 135712); under a new name nobody finds those. Rank 0 answers all greetings, old ones too."""
    mine, absent, end = secrets.token_hex(8), set(range(1, world_size)), time.monotonic() + seconds
    if rank:
        store.set(f"greeting of {rank}", mine)
        name = store.get(f"answer to {mine}").decode()
        store.set(f"{rank} in {name}", "")
        return name
    while absent and time.monotonic() < end:
        for other in absent:
            store.set(f"answer to {store.get(f'greeting of {other}').decode()}", mine)
        absent = {other for other in absent if not store.check([f"{other} in {mine}"])}
        time.sleep(0.01)
    return mine


def lost_process(error: BaseException) -> bool:
    """Whether another process did not answer: NCCL has exceptions of its own for that, gloo has not."""
    signs = ("gloo", "Connection", "Timed out", "timeout")
    return (
        isinstance(error, dist.DistError)
        or isinstance(error, RuntimeError)
        and any(sign in str(error) for sign in signs)
    )


def main():
    args, complaint = parse_flags(), None
    try:
        for name, flag in EXTRAS.items():
            if getattr(args, flag):
                extra(name)  # before anything is read
        if args.enable_tensorboard:
            summary_writer()
        if args.dry_run:
            report = extra("dry_run").report
            if os.environ.get("RANK", "0") == "0":
                print(report(args, int(os.environ.get("WORLD_SIZE", 1))))
            return
        run(args, Process.start(args))
    except (ValueError, OSError) as error:
        complaint = f"train.py: error: {error}"
    except KeyboardInterrupt:
        complaint = "train.py: interrupted before the first step; nothing was trained"
    except torch.OutOfMemoryError as error:
        complaint = (
            f"train.py: error: the GPU's memory is full ({str(error).splitlines()[0]}); give fewer --micro_batch_tokens, or "
            "--gradient_checkpointing, or a --zero_stage"
        )
    except (Exception, CheckpointException) as error:
        if lost_process(error):
            complaint = (
                f"train.py: error: rank {os.environ.get('RANK', 0)} waited in vain for another process, which ended or did not answer "
                f"within --process_timeout {args.process_timeout:g} s ({str(error).splitlines()[0]}); the same command with --resume "
                "goes on from the last checkpoint, with torchrun's --max-restarts by itself"
            )
        elif dist.is_initialized():
            complaint = traceback.format_exc()
        else:
            raise
    if dist.is_initialized():
        # An orderly end waits for processes that are gone. It can also hang: gloo's thread needs Python's lock to free its
        # last tensors, while the destructor of the process group holds that lock and waits for the thread.
        if complaint:
            print(complaint, file=sys.stderr)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(complaint is not None)
    if complaint:
        sys.exit(complaint)


if __name__ == "__main__":
    main()
