"""Train a reward model on pairs of responses. This file is the loop, from the flags to the saved model.

    python train.py                                                        built-in data, no files needed
    python train.py --data_path pairs.jsonl --model_name_or_path MODEL     your data, a pre-trained model
    torchrun --standalone --nproc_per_node=4 train.py [flags]              one node, four GPUs
    torchrun --nnodes=2 --node_rank=0 --nproc_per_node=8 \\
        --master_addr=10.0.0.1 --master_port=29500 train.py [flags]        the first of two nodes
    torchrun --nnodes=2 --node_rank=1 --nproc_per_node=8 \\
        --master_addr=10.0.0.1 --master_port=29500 train.py [flags]        the second one

Processes talk through NCCL on GPUs and gloo on CPUs. N processes compute what one process does with a batch N times as
large: every comparison of a step weighs the same, whichever rank, micro-batch or ragged last batch it falls into.
`python train.py --help` lists the flags; --output_dir gets the model, its tokenizer, and metrics.jsonl.
"""

import argparse
import functools
import itertools
import json
import math
import operator
import os
import sys
import time
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import data
from model import FAMILIES, GPT, WEIGHT_FILES, GPTConfig, index_of
from rm import RewardModel

BUILT_IN = dict(train_batch_size=32, max_steps=2000, eval_pairs=4000, tokenizer_pairs=2000)
EVAL_SEED = 0  # of the built-in eval set: the same for every --seed, so that runs can be compared
TOKENIZER_TEXTS = 200_000  # a tokenizer is trained on at most so many texts; more changes little and takes its time
SCHEDULES = ("linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup")

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
        bounds = f"{'above' if above else 'from'} {low}" + (f" to {limit}" if high or kind is int else "")
        raise argparse.ArgumentTypeError(f"found {text!r}; expected {what} {bounds}")

    return parse


def shares(text):
    """--data_split: the stages' shares of the data, of any sum."""
    try:
        values = [number(float, 0)(part) for part in text.split(",")]
    except argparse.ArgumentTypeError:
        values = []
    if len(values) != 3 or values[1] == 0:
        raise argparse.ArgumentTypeError(f"found {text!r}; expected three numbers from 0, like 2,4,4; the second is the share of "
                                         "reward-model training, above 0")
    return values


def parse_flags():
    parser = argparse.ArgumentParser(description="Train a reward model on pairs of responses.", allow_abbrev=False)
    count, size, positive = number(int, 1), number(int, 1, 2**16), number(float, 0, above=True)
    flag = parser.add_argument_group("data").add_argument
    flag("--data_path", nargs="+", metavar="FILE", help="comparisons: .jsonl, .jsonl.gz or .json (default: built-in data)")
    flag("--data_split", type=shares, default=[0.0, 1.0, 0.0], metavar="A,B,C",
         help="shares of the three RLHF stages; B's rows are used, the same as in DeepSpeed-Chat (0,1,0: all)")
    flag("--eval_path", nargs="+", metavar="FILE", help="comparisons to evaluate on (default: a part of --data_path)")
    flag("--eval_fraction", type=number(float, 0, 0.9, above=True), default=0.05,
         help="that part: the last of the shuffled data (0.05)")
    flag("--max_seq_len", type=number(int, 2, 2**20), default=512, help="tokens; longer sequences are truncated (512)")
    flag("--truncation_side", choices=("left", "right"), default="left", help="right is DeepSpeed-Chat's (left)")
    flag("--tokenizer_path", metavar="PATH", help="a tokenizer (default: the model's; from scratch, one trained on the data)")
    flag("--pad_id", type=number(int, 0, 2**24), help="padding's id (default: the tokenizer's own, or a new one)")
    flag("--num_padding_at_beginning", type=number(int, 0),
         help="leading pad ids that belong to a text (default: 1 where bos is the pad, else 0)")

    flag = parser.add_argument_group("model").add_argument
    flag("--model_name_or_path", metavar="DIR", help="a pre-trained model (default: from scratch, by the next five)")
    flag("--model_type", choices=list(FAMILIES), help="(llama)")
    flag("--n_layer", type=size, help="(4)")
    flag("--n_head", type=size, help="(4)")
    flag("--n_embd", type=size, help="(96)")
    flag("--vocab_size", type=number(int, 300, 2**24), help="at most; a small text supports fewer pieces (8000)")
    flag("--dropout", type=number(float, 0, 0.99), default=0.0, help="(0)")

    flag = parser.add_argument_group("training").add_argument
    flag("--per_device_train_batch_size", type=count, help=f"comparisons (16; built-in data: {BUILT_IN['train_batch_size']})")
    flag("--per_device_eval_batch_size", type=count, default=16,
         help="comparisons of full length: as many tokens are computed on at once (16)")
    flag("--gradient_accumulation_steps", type=count, default=1, help="(1)")
    flag("--layout", choices=("packed", "padded"), default="packed",
         help="packed: no padding, a shared prompt once; padded: rows of pairs, the reference; without dropout the same numbers (packed)")
    flag("--micro_batch_tokens", type=count, help="tokens computed on at once, by each process; a step of more is cut into micro-batches, "
         "to the same result (2 x per_device_train_batch_size x max_seq_len)")
    flag("--learning_rate", type=positive, help="(5e-5; from scratch 2e-3)")
    flag("--weight_decay", type=number(float, 0), default=0.0, help="on matrices only (0)")
    flag("--max_grad_norm", type=positive, default=1.0, help="(1.0)")
    flag("--lr_scheduler_type", choices=SCHEDULES, default="cosine", help="(cosine)")
    flag("--num_warmup_steps", type=number(int, 0), default=0, help="optimizer steps (0)")
    flag("--num_train_epochs", type=count, default=1, help="(1)")
    flag("--max_steps", type=count, help=f"optimizer steps, in place of epochs (built-in data: {BUILT_IN['max_steps']})")
    flag("--eval_interval", type=number(int, 0), default=0, help="optimizer steps between evaluations (0: only before and after)")
    flag("--eval_iters", type=number(int, 0), default=0, help="batches per evaluation and process (0: all)")
    flag("--seed", type=number(int, 0, 2**32 - 1), default=1234, help="(1234)")
    flag("--output_dir", default="out", help="(out)")
    args = parser.parse_args()

    scratch = dict(model_type="llama", n_layer=4, n_head=4, n_embd=96, vocab_size=8000)
    for name, default in scratch.items():
        if args.model_name_or_path and getattr(args, name) is not None:
            parser.error(f"argument --{name}: found beside --model_name_or_path, whose config.json decides this; give one of them")
        if getattr(args, name) is None:
            setattr(args, name, default)
    if args.n_embd % args.n_head:
        parser.error(f"argument --n_head: found {args.n_head}, which does not divide --n_embd {args.n_embd}")
    if args.model_type == "llama" and args.n_embd // args.n_head % 2:
        parser.error(f"argument --n_head: found {args.n_head} for --n_embd {args.n_embd}; rotary positions need heads of even width")
    model_dir = args.model_name_or_path and Path(args.model_name_or_path).resolve()
    if not args.output_dir or Path(args.output_dir).resolve() == model_dir:
        parser.error(f"argument --output_dir: found {args.output_dir!r}; expected a directory, and not that of --model_name_or_path")
    if args.eval_path and not args.data_path:
        parser.error("argument --eval_path: found without --data_path; the built-in data has its own eval set")
    if args.per_device_train_batch_size is None:
        args.per_device_train_batch_size = 16 if args.data_path else BUILT_IN["train_batch_size"]
    if args.micro_batch_tokens is None:
        args.micro_batch_tokens = 2 * args.per_device_train_batch_size * args.max_seq_len
    if args.learning_rate is None:
        args.learning_rate = 5e-5 if args.model_name_or_path else 2e-3
    return args


# ----------------------------------------------------------------------------------------------------------------------
# Parts of the loop


@dataclass
class Process:
    """This process among those that torchrun started, or alone."""

    rank: int = 0
    world_size: int = 1
    device: torch.device = torch.device("cpu")

    @classmethod
    def start(cls) -> "Process":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if torch.cuda.is_available() else cls.device
        if device.type == "cuda":
            torch.cuda.set_device(device)
        if "RANK" not in os.environ:
            return cls(device=device)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        return cls(dist.get_rank(), dist.get_world_size(), device)

    def print(self, text: str):
        if self.rank == 0:
            tqdm.write(text)

    def join(self, *values) -> list:
        """Every value added up over the ranks; lists are joined."""
        if self.world_size == 1:
            return list(values)
        parts = [None] * self.world_size
        dist.all_gather_object(parts, values)
        return [functools.reduce(operator.add, column) for column in zip(*parts)]


def learning_rate(kind: str, peak: float, step: int, warmup: int, total: int) -> float:
    """The learning rate of optimizer step `step` (from 0) of `total`: as transformers' `get_scheduler`, so DeepSpeed-Chat's."""
    if step < warmup and kind != "constant":
        return peak * step / warmup
    remaining = max(0.0, (total - step) / max(1, total - warmup))  # 1 after warm-up, 0 at the end
    if kind == "linear":
        return peak * remaining
    if kind == "polynomial":  # of degree 1, to 1e-7
        return 1e-7 + (peak - 1e-7) * remaining
    if kind in ("cosine", "cosine_with_restarts"):  # with one cycle, which is the default, there is no restart
        return peak * 0.5 * (1 - math.cos(math.pi * remaining))
    return peak


@functools.lru_cache(maxsize=2)
def epoch_order(n: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.RandomState([seed, epoch]).permutation(n)


def batch_indices(n: int, global_batch: int, seed: int, step: int) -> np.ndarray:
    """The comparisons of optimizer step `step` (from 0): a function of its arguments alone. An epoch's last may be smaller."""
    epoch, step = divmod(step, math.ceil(n / global_batch))
    return epoch_order(n, seed, epoch)[step * global_batch : (step + 1) * global_batch]


def size_of(group: list, layout: str) -> tuple[int, int]:
    """(rows, length) of a comparison as computed on; a batch is the sum of rows times the largest length. Packed: rows of a token."""
    return (data.packed_size(group), 1) if layout == "packed" else (len(group) * (len(group) - 1), max(map(len, group)))


def share_of(groups: list, layout: str, process: Process) -> list[int]:
    """Indices of the comparisons that are this rank's: the largest one first, each goes to the rank with the fewest tokens."""
    if process.world_size == 1:
        return list(range(len(groups)))
    tokens, shares = [0] * process.world_size, [[] for _ in range(process.world_size)]
    sizes = [math.prod(size_of(group, layout)) for group in groups]
    for i in sorted(range(len(groups)), key=lambda i: -sizes[i]):
        rank = tokens.index(min(tokens))
        shares[rank].append(i)
        tokens[rank] += sizes[i]
    return sorted(shares[process.rank])


def micro_batches(groups: list, layout: str, budget: int) -> list[list[int]]:
    """Cut comparisons into micro-batches of at most `budget` tokens as computed on; a larger comparison is one by itself.

    Returns indices into `groups`. Padded micro-batches have similar lengths and equally many responses each: then the mean
    over their pairs is the mean over their comparisons of the mean over their pairs, and they add up by their number.
    """
    order = list(range(len(groups)))
    if layout == "padded":
        order.sort(key=lambda i: (len(groups[i]), max(map(len, groups[i]))))
    result, rows, longest = [], 0, 0
    for i in order:
        more, length = size_of(groups[i], layout)
        rows, longest = rows + more, max(longest, length)
        if not result or rows * longest > budget or layout == "padded" and len(groups[result[-1][0]]) != len(groups[i]):
            result.append([])
            rows, longest = more, length
        result[-1].append(i)
    return result


def collate(groups: list, model: RewardModel, layout: str, device) -> tuple:
    """Comparisons as token lists, best first -> what the model is called with, and the number of tokens that it computes on.

    Padded: (2B, L) ids and mask, the chosen rows of all pairs, then the rejected. Packed: a PackedBatch.
    """
    if layout == "packed":
        batch = data.pack(groups, model.pad_id, longest_tail=1 if model.backbone.config.position_offset else None)
        return (batch.to(device),), batch.num_tokens
    pairs = [pair for group in groups for pair in itertools.combinations(group, 2)]
    rows = [chosen for chosen, _ in pairs] + [rejected for _, rejected in pairs]
    input_ids, mask = data.pad_rows(rows, model.pad_id)
    return (input_ids.to(device), mask.to(device)), input_ids.numel()


def calibration_error(margin: torch.Tensor) -> float:
    """Expected calibration error (Naeini et al. 2015) of sigmoid(margin) as the probability that the first is better.

    margin: (N,), chosen minus rejected end score. 10 equal bins of the confidence max(p, 1 - p) over [0.5, 1].
    """
    confidence, right = torch.sigmoid(margin.abs()), (margin > 0).double()
    bins = torch.bucketize(confidence, torch.linspace(0.5, 1, 11, dtype=confidence.dtype)[1:-1], right=True)
    gaps = torch.zeros(10, dtype=torch.float64).index_add_(0, bins, right - confidence.double())
    return float(gaps.abs().sum()) / len(margin)


@torch.no_grad()
def evaluate(model: RewardModel, dataset: data.TokenizedData, args, process: Process, step: int) -> dict:
    """The metrics of an eval set, each comparison counted once. Every rank computes its part and gets the whole."""
    n = len(dataset.groups)
    if args.eval_iters:
        n = min(n, args.eval_iters * args.per_device_eval_batch_size * process.world_size)
    share = share_of(dataset.groups[:n], args.layout, process)
    groups, rewards = ([column[i] for i in share] for column in (dataset.groups, dataset.rewards))
    loss, chosen, rejected, true_margin = 0.0, [], [], []
    model.eval()
    batches = micro_batches(groups, args.layout, 2 * args.per_device_eval_batch_size * args.max_seq_len)
    for batch in tqdm(batches, desc=f"eval at step {step}", leave=False, disable=process.rank != 0):
        inputs, _ = collate([groups[i] for i in batch], model, args.layout, process.device)
        out = model(*inputs)
        loss += out["loss"].item() * len(batch)
        chosen += out["chosen_mean_scores"].tolist()
        rejected += out["rejected_mean_scores"].tolist()
        for i in batch:
            true_margin += [a - b for a, b in itertools.combinations(rewards[i] or (), 2)]
    model.train()
    loss, chosen, rejected, true_margin = process.join(loss, chosen, rejected, true_margin)
    chosen, rejected = torch.tensor(chosen, dtype=torch.float64), torch.tensor(rejected, dtype=torch.float64)
    margin = chosen - rejected
    metrics = {"loss": loss / n, "accuracy": (margin > 0).double().mean().item(),
               "chosen_score": chosen.mean().item(), "rejected_score": rejected.mean().item(), "margin": margin.mean().item(),
               "ece": calibration_error(margin), "pairs": len(margin), "dropped": dataset.dropped}
    if true_margin:
        true_margin = torch.tensor(true_margin, dtype=torch.float64)
        metrics["bayes_accuracy"] = (true_margin > 0).double().mean().item()
        metrics["probability_error"] = (torch.sigmoid(margin) - torch.sigmoid(true_margin)).abs().mean().item()
    return metrics


# ----------------------------------------------------------------------------------------------------------------------
# Preparation: everything that can be wrong with flags, files and models shows here, before the first step


def built_in_data(args):
    """The endless built-in training data of a --seed, which is never that of the eval set."""
    return data.known_rewards(EVAL_SEED + 1 + args.seed)


def load_file(path) -> list[data.Comparison]:
    comparisons = list(data.load_comparisons(path))
    if all(len(set(comparison.responses)) == 1 for comparison in comparisons):
        raise ValueError(f"{path}: in all {len(comparisons)} rows the responses are identical; a comparison needs some that differ")
    return comparisons


def load_data(args) -> tuple[list | None, list]:
    """Training and eval comparisons. Training is None for the built-in data, whose comparisons are drawn as they are needed."""
    if not args.data_path:
        return None, list(itertools.islice(data.known_rewards(EVAL_SEED), BUILT_IN["eval_pairs"]))
    train = []
    for path in args.data_path:
        comparisons = load_file(path)
        share = data.split_indices(len(comparisons), args.data_split, stage=1, seed=args.seed)
        if len(share) == 0:
            raise ValueError(f"--data_split: the second share of the {len(comparisons)} rows of {path} is no row; give a larger one")
        train += [comparisons[i] for i in share]
    if args.eval_path:
        return train, [comparison for path in args.eval_path for comparison in load_file(path)]
    np.random.RandomState(args.seed).shuffle(train)
    held_out = max(1, round(args.eval_fraction * len(train)))
    if held_out >= len(train):
        raise ValueError(f"--data_path: {len(train)} comparisons (after --data_split); too few to hold some out for evaluation; "
                         "give more, or an --eval_path")
    return train[:-held_out], train[-held_out:]


def load_model(args, tokenizer) -> RewardModel:
    """The pre-trained model, with what the flags say about padding."""
    model = RewardModel.from_pretrained(args.model_name_or_path, tokenizer.pad_id, leading_pads(args, tokenizer))
    rows = json.loads((Path(args.model_name_or_path) / "config.json").read_text(encoding="utf-8"))["vocab_size"]
    if tokenizer.text_size > rows:
        raise ValueError(f"--model_name_or_path {args.model_name_or_path}: the model has {rows} token ids, the tokenizer "
                         f"{tokenizer.text_size}; give the tokenizer that belongs to it (--tokenizer_path)")
    if args.max_seq_len > model.backbone.config.n_positions:
        raise ValueError(f"--max_seq_len: found {args.max_seq_len}; {args.model_name_or_path} has {model.backbone.config.n_positions} "
                         "positions, so give at most that")
    return model


def new_model(args, tokenizer) -> RewardModel:
    """A model from scratch."""
    config = GPTConfig(
        args.model_type, vocab_size=tokenizer.vocab_size, n_positions=args.max_seq_len, n_layer=args.n_layer, n_head=args.n_head,
        n_embd=args.n_embd, token_ids={"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id})
    return RewardModel(GPT(config), tokenizer.pad_id, leading_pads(args, tokenizer))


def leading_pads(args, tokenizer) -> int:
    given = args.num_padding_at_beginning
    return int(tokenizer.bos_id == tokenizer.pad_id) if given is None else given


def new_tokenizer(args, comparisons, process: Process) -> data.Tokenizer:
    """A tokenizer trained on the training text by rank 0, and handed to the others."""
    model_proto = [None]
    if process.rank == 0:
        process.print("training a tokenizer")
        texts = (comparison.prompt + response for comparison in comparisons for response in comparison.responses)
        try:
            model_proto = [data.train_tokenizer(itertools.islice(texts, TOKENIZER_TEXTS), args.vocab_size).model_proto]
        except ValueError as error:
            raise ValueError(f"--vocab_size: {error}") from None
    if process.world_size > 1:
        dist.broadcast_object_list(model_proto)
    return data.Tokenizer(model_proto[0], args.pad_id)


def tokenize_split(name: str, comparisons, args, tokenizer, process: Process) -> data.TokenizedData:
    bar = tqdm(comparisons, desc=f"tokenize {name}", leave=False, disable=process.rank != 0)
    tokenized = data.tokenize_all(bar, tokenizer, args.max_seq_len, args.truncation_side)
    process.print(f"{name}: {len(tokenized.groups)} comparisons; {tokenized.dropped} dropped, because their sequences are identical")
    if not tokenized.groups:
        raise ValueError(f"{name} data: all {tokenized.dropped} comparisons have identical sequences at --max_seq_len "
                         f"{args.max_seq_len}; a comparison needs responses that differ")
    return tokenized


def prepare(args, process: Process):
    """The model, its tokenizer, and tokenized training (None: built-in) and eval data.

    The order is that of the cost of a mistake: the model directory, the data, and only then a tokenizer is trained.
    """
    torch.manual_seed(args.seed)  # for fresh weights, the same ones on every rank
    tokenizer, model, pretrained = None, None, args.model_name_or_path
    if pretrained and not Path(pretrained).is_dir():
        raise ValueError(f"--model_name_or_path {pretrained}: no such directory; expected one with config.json and weights")
    if args.tokenizer_path or pretrained:
        try:
            tokenizer = data.load_tokenizer(args.tokenizer_path or pretrained, args.pad_id)
        except ValueError as error:
            raise ValueError(f"{error}; --tokenizer_path says where one is") from None
    if pretrained:
        model = load_model(args, tokenizer)
    train, evaluation = load_data(args)
    if tokenizer is None:
        sample = train or itertools.islice(built_in_data(args), BUILT_IN["tokenizer_pairs"])
        tokenizer = new_tokenizer(args, sample, process)
    if model is None:
        model = new_model(args, tokenizer)
    model.backbone.config.dropout = args.dropout
    train = train and tokenize_split("train", train, args, tokenizer, process)
    return model.to(process.device), tokenizer, train, tokenize_split("eval", evaluation, args, tokenizer, process)


def open_output(output_dir: str, process: Process):
    """Make the output directory and open its metrics.jsonl, on rank 0. What an earlier run left there is kept, in earlier-N."""
    if process.rank != 0:
        return None
    path = Path(output_dir)
    try:
        path.mkdir(parents=True, exist_ok=True)
        tokenizer_files = (*data.TOKENIZER_FILES, "merges.txt", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
        files = ("metrics.jsonl", "config.json", *WEIGHT_FILES, *(index_of(Path(name)) for name in WEIGHT_FILES), *tokenizer_files)
        if earlier := [path / name for name in files if (path / name).exists()]:
            number = next(n for n in itertools.count(1) if not (path / f"earlier-{n}").exists())
            (path / f"earlier-{number}").mkdir()
            for file in earlier:
                file.rename(path / f"earlier-{number}" / file.name)
            process.print(f"{path} held the files of an earlier run; they are in {path}/earlier-{number} now")
        return open(path / "metrics.jsonl", "w")
    except OSError as error:
        raise ValueError(f"--output_dir {output_dir}: cannot be written to ({error.strerror}); give another directory") from None


def make_optimizer(model: RewardModel, args, process: Process) -> torch.optim.AdamW:
    """AdamW (Loshchilov & Hutter 2019) as in DeepSpeed-Chat, but for one rule of what decays: matrices do, vectors don't."""
    matrices = [parameter for parameter in model.parameters() if parameter.dim() >= 2]
    vectors = [parameter for parameter in model.parameters() if parameter.dim() < 2]
    for name, group in ((f"weight decay {args.weight_decay:g}", matrices), ("no weight decay", vectors)):
        process.print(f"{name}: {len(group)} tensors, {sum(parameter.numel() for parameter in group):,} parameters")
    groups = [{"params": matrices, "weight_decay": args.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=args.learning_rate, betas=(0.9, 0.95), fused=True)


def global_batches(train: data.TokenizedData | None, args, tokenizer, global_batch: int):
    """The comparisons of every optimizer step, all ranks' together, without end. Every rank yields the same."""
    if train:
        for step in itertools.count():
            yield [train.groups[i] for i in batch_indices(len(train.groups), global_batch, args.seed, step)]
    stream, fresh = built_in_data(args), []
    while True:
        while len(fresh) < global_batch:
            drawn = itertools.islice(stream, global_batch)
            fresh += data.tokenize_all(drawn, tokenizer, args.max_seq_len, args.truncation_side).groups
        yield fresh[:global_batch]
        fresh = fresh[global_batch:]


# ----------------------------------------------------------------------------------------------------------------------
# The loop


def main():
    args = parse_flags()
    process = Process.start()
    try:
        model, tokenizer, train, evaluation = prepare(args, process)
        metrics_file = open_output(args.output_dir, process)
    except (ValueError, OSError) as error:
        sys.exit(f"train.py: error: {error}")

    def log(**event):
        if process.rank == 0:
            metrics_file.write(json.dumps(event) + "\n")
            metrics_file.flush()

    def run_evaluation(step):
        metrics = evaluate(model, evaluation, args, process, step)
        log(event="eval", step=step, **metrics)
        process.print(f"step {step}: " + ", ".join(f"{name} {value:.4g}" for name, value in metrics.items()))
        return metrics

    global_batch = args.per_device_train_batch_size * args.gradient_accumulation_steps * process.world_size
    total_steps = args.max_steps or BUILT_IN["max_steps"]
    if train and not args.max_steps:
        total_steps = args.num_train_epochs * math.ceil(len(train.groups) / global_batch)
    process.print(f"{model.backbone.config.model_type} backbone, {sum(p.numel() for p in model.parameters()):,} parameters; "
                  f"{process.world_size} x {process.device}; {total_steps} steps of {global_batch} comparisons")
    # The hooks that average gradients run only when the wrapped module is called, as `trained(...)`. Calling another
    # method of it, or `model` itself, would train each rank on its own, without a word.
    trained = DistributedDataParallel(model) if process.world_size > 1 else model
    optimizer = make_optimizer(model, args, process)
    torch.manual_seed(args.seed + process.rank)  # dropout differs between ranks
    before = after = run_evaluation(0)
    batches = global_batches(train, args, tokenizer, global_batch)
    bar = tqdm(itertools.islice(batches, total_steps), total=total_steps, unit=" steps", disable=process.rank != 0)
    step_ended = time.perf_counter()
    for step, batch in enumerate(bar, start=1):
        lr = learning_rate(args.lr_scheduler_type, args.learning_rate, step - 1, args.num_warmup_steps, total_steps)
        for group in optimizer.param_groups:
            group["lr"] = lr
        # This rank's comparisons. In a last batch of fewer comparisons than ranks some have none: they take part in the
        # averaging of gradients with a comparison that weighs nothing.
        share = [batch[i] for i in share_of(batch, args.layout, process)]
        weight = 1 / len(batch) if share else 0.0
        share = share or batch[:1]
        chunks = micro_batches(share, args.layout, args.micro_batch_tokens)
        total_loss, pairs, tokens = torch.zeros((), dtype=torch.float64, device=process.device), 0, 0
        for i, chunk in enumerate(chunks):
            inputs, computed = collate([share[j] for j in chunk], model, args.layout, process.device)
            last = i == len(chunks) - 1
            with nullcontext() if last or process.world_size == 1 else trained.no_sync():
                out = trained(*inputs)
                loss = out["loss"] * (len(chunk) * weight)  # summed over micro-batches and ranks: the mean over the batch
                (loss * process.world_size).backward()  # DistributedDataParallel takes the mean over ranks, we want the sum
            total_loss += loss.detach()
            pairs += len(out["chosen_mean_scores"]) if weight else 0
            tokens += computed
        grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), args.max_grad_norm)
        if not torch.isfinite(grad_norm):  # the same on every rank, so all of them leave
            sys.exit(f"train.py: error: at step {step} the gradient norm is {grad_norm:g}; training cannot go on from there. "
                     f"A smaller --learning_rate than {args.learning_rate:g}, or more --num_warmup_steps, may help")
        optimizer.step()
        optimizer.zero_grad()
        sums = torch.stack((total_loss, total_loss.new_tensor(pairs), total_loss.new_tensor(tokens)))
        if process.world_size > 1:
            dist.all_reduce(sums)
        (loss, pairs, tokens), now = sums.tolist(), time.perf_counter()
        log(event="step", step=step, loss=loss, lr=lr, grad_norm=grad_norm.item(), pairs=int(pairs), tokens=int(tokens),
            seconds=now - step_ended)
        step_ended = now
        bar.set_postfix(loss=f"{loss:.4f}", lr=f"{lr:.2e}")
        if step == total_steps or args.eval_interval and step % args.eval_interval == 0:
            after = run_evaluation(step)
    if process.rank == 0:
        model.save_pretrained(args.output_dir, tokenizer=tokenizer)
        best = f"; the best possible (Bayes-optimal) is {after['bayes_accuracy']:.4f}" if "bayes_accuracy" in after else ""
        print(f"accuracy on {after['pairs']} eval pairs: {before['accuracy']:.4f} before, {after['accuracy']:.4f} after training{best}\n"
              f"model: {args.output_dir}   metrics: {args.output_dir}/metrics.jsonl\n"
              f"score with it: python rm.py {args.output_dir} FILE.jsonl")
    if process.world_size > 1:
        dist.barrier()  # nobody leaves before the model is saved
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
