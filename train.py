"""Train a reward model on pairs of responses: the loop, from the flags to the saved model.

    python train.py                                              built-in data, no files needed
    python train.py --data_path FILE --model_name_or_path DIR    your data, a pre-trained model
    torchrun --standalone --nproc_per_node=4 train.py [flags]    one node, four GPUs
    torchrun --nnodes=2 --node_rank=0 --nproc_per_node=8 \\
        --master_addr=10.0.0.1 --master_port=29500 train.py [flags]    the first of two nodes
    torchrun --nnodes=2 --node_rank=1 --nproc_per_node=8 \\
        --master_addr=10.0.0.1 --master_port=29500 train.py [flags]    the second of two nodes
    torchrun --standalone --nproc_per_node=8 --max-restarts=3 \\
        train.py --zero_stage 3 --dtype bf16 [flags]      sharded weights; resumes after a failure

Processes talk through NCCL on GPUs and gloo on CPUs. N processes compute what one process computes
with a batch N times as large: every comparison of a step weighs the same, whichever rank,
micro-batch or ragged last batch it falls into. `python train.py --help` lists the flags, which
parts/flags.py holds; --output_dir gets the model, its tokenizer, metrics.jsonl and checkpoints, by
parts/run_directory.py. On SIGTERM or SIGINT the step is finished and a checkpoint saved; the same
command with --resume continues from there, and ends with the weights of a run that was never
stopped.
"""

import itertools
import math
import sys
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from dataclasses import asdict
from functools import lru_cache, partial
from pathlib import Path
from time import perf_counter

import numpy as np
import torch
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import data
from parts import guards, huggingface, lora, metrics, report
from parts.agreement import ANY, check_ranks
from parts.chat import ChatTemplate, given_template
from parts.compiling import compile_blocks
from parts.distributed import Process, complaint_about, leave, shard, share_of, whole_state
from parts.files import outlive_readers
from parts.flags import (
    RESULT_FLAGS,
    common_flags,
    hand_over,
    objective_of,
    parse_flags,
    row_reading,
)
from parts.guards import counted
from parts.huggingface import FAMILIES, read_config
from parts.normalize import normalize
from parts.rows import convert_rows, files_of
from parts.run_directory import RunDirectory, stop_signals
from parts.token_cache import cached, file_hash, file_notes, hash_of
from parts.tokenizers import sample_texts
from rm import GPT, LOSSES, GPTConfig, RewardModel

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
EVAL_SEED = 0  # of the built-in eval set: the same for every --seed, so that runs can be compared
EVAL_PAIRS = 4000  # of the built-in data
TOKENIZER_PAIRS = 2000  # of the built-in data
LONGEST_STREAK = 25  # steps skipped in a row in fp16: its scale has fallen from 65536 to 0.004


# --------------------------------------------------------------------------------------------------
# The loop


def train(args, process: Process):
    """Train a model as the flags say, from their files to the saved model."""
    tensorboard = args.tensorboard_path if args.enable_tensorboard else None
    run = RunDirectory(args.output_dir, args.keep_checkpoints, process, tensorboard)
    model, tokenizer, training, evaluation = prepare(args, process)
    global_batch = args.per_device_train_batch_size * args.gradient_accumulation_steps
    global_batch *= process.world_size
    total_steps = args.max_steps
    if total_steps is None:
        total_steps = args.num_train_epochs * math.ceil(len(training) / global_batch)
    size = sum(parameter.numel() for parameter in model.parameters())
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    process.print(
        f"{model.backbone.config.model_type} backbone, {size:,} parameters; {process.world_size} x "
        f"{process.device}; {counted(total_steps, 'step')} of {counted(global_batch, 'comparison')}"
    )
    result = result_follows_from(args, model, tokenizer, training, global_batch, total_steps)
    check_ranks(common_flags(args) | result, model, evaluation, process)
    done, facts = run.step_to_resume(result, total_steps, args.resume)
    run.open(result, done, 4 * size, 8 * trained, args.save_interval > 0)

    # Call `replica` to train, not `model`: its hooks average the gradients over the ranks.
    is_sharded = args.zero_stage > 0
    replica = distribute(model, args.zero_stage, args.offload, process)
    optimizer = make_optimizer(
        model, args.learning_rate, args.weight_decay, args.lora_learning_rate, process
    )
    peaks = [group["lr"] for group in optimizer.param_groups]
    scaler = process.gradient_scaler(args.dtype == "fp16", args.offload)
    skipped, streak = 0, 0  # steps skipped in fp16: in all, and in a row until now
    torch.manual_seed(args.seed + process.rank)  # dropout differs between ranks
    if done:
        run.load(facts, model, optimizer, scaler, args.seed)
        skipped, streak = facts["skipped"]

    signals, stopping, scores = stop_signals(), False, None
    # An interval of 0 leaves step 0 in these ranges; the last step is asked for by itself.
    eval_steps = range(0, total_steps, args.eval_interval or total_steps)
    save_steps = range(0, total_steps, args.save_interval or total_steps)
    if (done in eval_steps or done == total_steps) and not run.has_evaluation(done):
        scores = evaluate(model, evaluation, args, process, done, run)
    batches = batches_after(done, training, global_batch, args.seed)
    steps = range(done + 1, total_steps + 1)
    bar = process.bar(steps, initial=done, total=total_steps, unit=" steps")
    step_ended = perf_counter()
    for step, batch in zip(bar, batches):
        for group, peak in zip(optimizer.param_groups, peaks):
            group["lr"] = learning_rate(
                args.lr_scheduler_type, peak, step - 1, args.num_warmup_steps, total_steps
            )

        # `batch` holds the comparisons of all ranks; this rank takes its share, in micro-batches.
        # For an empty micro-batch the first comparison of the batch runs, and weighs nothing.
        micro_batches = share_of(
            batch, args.layout, model.longest_tail, args.micro_batch_tokens, process, is_sharded
        )
        losses, pair_count, token_count = [], 0, 0
        for i, comparisons in enumerate(micro_batches):
            inputs, count = collate(comparisons or batch[:1], model, args.layout, process.device)
            is_last = i == len(micro_batches) - 1  # DDP averages the gradients then
            with nullcontext() if is_last or replica is model else replica.no_sync():
                with autocast(args.dtype, process.device):
                    out = replica(*inputs)
                # Every comparison of the step weighs the same; the hooks divide by world_size.
                share = out["loss"] * (len(comparisons) / len(batch))
                scaler.scale(share * process.world_size).backward()
            losses.append(share.detach())
            token_count += count
            if comparisons:
                pair_count += len(out["chosen_mean_scores"])

        # In fp16 this notes gradients that are not finite; `scaler.step` then skips the update.
        scaler.unscale_(optimizer)
        grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), args.max_grad_norm)
        if is_sharded:
            grad_norm = grad_norm.full_tensor()
        grad_norm = grad_norm.item()
        loss = torch.stack(losses).double().sum().item()
        # Summed over the ranks, so that all of them continue, or none.
        loss, pairs, tokens, stopping = process.sum([loss, pair_count, token_count, len(signals)])
        if math.isfinite(loss) and math.isfinite(grad_norm):
            streak = 0
        else:
            skipped, streak = skipped + 1, streak + 1
            if not scaler.is_enabled() or streak == LONGEST_STREAK:
                loss_of = partial(loss_alone, model, args.layout, args.dtype, process.device)
                rows = guards.non_finite_rows(batch, micro_batches, losses, loss_of, process)
                reason = guards.non_finite_message(loss, grad_norm, rows, batch, streak)
                raise ValueError(
                    f"at step {step} {reason}; training cannot continue from there, and the "
                    f"optimizer did not step; {run.what_is_left()}. A smaller --learning_rate than "
                    f"{args.learning_rate:g}, or more --num_warmup_steps, may help"
                )
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()

        began, step_ended = step_ended, perf_counter()
        lr = optimizer.param_groups[0]["lr"]
        counts = {"pairs": int(pairs), "tokens": int(tokens), "seconds": step_ended - began}
        run.log(event="step", step=step, loss=loss, lr=lr, grad_norm=grad_norm, **counts)
        bar.set_postfix(loss=f"{loss:.4f}", refresh=False)
        is_last_step = step == total_steps
        if is_last_step or (step in eval_steps and not stopping):
            scores = evaluate(model, evaluation, args, process, step, run)
        if stopping or step in save_steps or (is_last_step and args.save_interval):
            facts = {"scaler": scaler.state_dict(), "skipped": [skipped, streak]}
            run.save(step, model, optimizer, facts)
        if stopping:
            break
    bar.close()
    if stopping and step < total_steps:
        process.print(
            f"stopped after step {step} of {total_steps}, as asked to; the same command with "
            f"--resume continues from {run.checkpoints}/step-{step}"
        )
    else:
        if scores is None:  # this run had ended before
            scores = evaluate(model, evaluation, args, process, total_steps)
        finish(model, tokenizer, evaluation, scores, skipped, args, run, process)
    process.wait_patiently()  # no rank leaves before the model is saved


def learning_rate(kind: str, peak: float, step: int, warmup: int, total: int) -> float:
    """The learning rate of optimizer step `step` (from 0) of `total`, by the schedule `kind`.

    The schedules are those of transformers' `get_scheduler`, which DeepSpeed-Chat calls.
    """
    if step < warmup and kind != "constant":
        return peak * step / warmup
    remaining = max(0.0, (total - step) / max(1, total - warmup))  # 1 after warm-up, 0 at the end
    if kind == "linear":
        return peak * remaining
    if kind == "polynomial":  # of degree 1, to 1e-7
        return 1e-7 + (peak - 1e-7) * remaining
    if kind in ("cosine", "cosine_with_restarts"):  # one cycle, the default, has no restart
        return peak * 0.5 * (1 - math.cos(math.pi * remaining))
    return peak


@lru_cache(maxsize=2)  # all steps of an epoch ask for its permutation
def epoch_order(n: int, seed: int, epoch: int) -> np.ndarray:
    """Return a permutation of n comparisons, (n,) int64, from seed and epoch alone."""
    return np.random.RandomState([seed, epoch]).permutation(n)


def batch_indices(n: int, global_batch: int, seed: int, step: int) -> np.ndarray:
    """Return the comparisons of optimizer step `step` (from 0), as indices below n.

    A function of its arguments alone. The last batch of an epoch may be smaller.
    """
    epoch, step = divmod(step, math.ceil(n / global_batch))
    return epoch_order(n, seed, epoch)[step * global_batch : (step + 1) * global_batch]


def batches_after(
    done: int, training, global_batch: int, seed: int
) -> Iterator[list[data.Tokenized]]:
    """Yield the comparisons of each step after `done`, for all ranks together, without end.

    training: a data set, or the endless stream of built-in comparisons.
    """
    if isinstance(training, data.TokenizedData):
        for step in itertools.count(done):
            indices = batch_indices(len(training), global_batch, seed, step)
            yield [training[i] for i in indices]
    stream = itertools.islice(training, done * global_batch, None)
    while True:
        yield list(itertools.islice(stream, global_batch))


def collate(
    comparisons: list[data.Tokenized], model: RewardModel, layout: str, device: torch.device
) -> tuple[tuple, int]:
    """Return the arguments to call the model with, and the number of tokens it computes on.

    Packed: a PackedBatch. Padded: ids and mask, (2B, L) int64, the chosen rows of all pairs, then
    the rejected; the margins and the targets of the pairs.
    """
    if layout == "packed":
        groups = [comparison.sequences for comparison in comparisons]
        margins = [comparison.margin for comparison in comparisons]
        targets = [comparison.target for comparison in comparisons]
        batch = model.pack(groups, margins, targets)
        return (batch.to(device),), batch.num_tokens
    chosen, rejected, margins, targets = [], [], [], []
    for number, comparison in enumerate(comparisons):
        guards.check_ranking(number, len(comparison.sequences), comparison.target)
        for better, worse in itertools.combinations(comparison.sequences, 2):
            chosen.append(better)
            rejected.append(worse)
            margins.append(comparison.margin)
            targets.append(comparison.target)
    input_ids, mask = data.pad_rows(chosen + rejected, model.pad_id)
    return (input_ids.to(device), mask.to(device), margins, targets), input_ids.numel()


def autocast(dtype: str, device: torch.device) -> torch.autocast:
    """Compute matrix products in `dtype`: "fp32", "bf16" or "fp16".

    Autocast's cache of weights in half precision is off: a pass uses each weight once, and the
    cached copy would stay in memory when FSDP frees the weight.
    """
    return torch.autocast(device.type, DTYPES[dtype], enabled=dtype != "fp32", cache_enabled=False)


@torch.no_grad()
def loss_alone(
    model: RewardModel, layout: str, dtype: str, device: torch.device, comparisons: list
) -> float:
    """Compute the loss of some comparisons, without gradients."""
    inputs, _ = collate(comparisons, model, layout, device)
    with autocast(dtype, device):
        return model(*inputs)["loss"].item()


def finish(
    model: RewardModel,
    tokenizer: data.Tokenizer,
    evaluation: data.TokenizedData,
    scores: dict[str, list],
    skipped: int,
    args,
    run: RunDirectory,
    process: Process,
):
    """Save the model and the page of the run, and print the outcome.

    scores: lists of numbers that the last evaluation was made of, from `evaluate`.
    """
    model = plain_model(model, args.lora_dim, process)
    if process.rank != 0:
        return
    failure = None
    try:
        guards.check_evaluation(scores, f"the model is saved in {run.path}; {run.what_is_left()}")
        if args.normalize_rewards:
            print(normalize(model, scores["scores"]))
    except ValueError as error:
        failure = error  # the model is saved as it is, first
    events = run.events()
    with run.writing():
        model.save_pretrained(run.path, tokenizer=tokenizer)
        report.run_page(run.path / "report.html", events, list(vars(args).items()), scores)
    if failure:
        raise failure
    if skipped:
        print(f"{counted(skipped, 'step')} skipped: gradients too large for fp16")
    print(metrics.outcome(events, scores))
    if args.data_path:
        files = [file.path for file in evaluation.files if not file.bad_rows]
    else:
        files = [run.write_examples(data.known_rewards(EVAL_SEED))]
    print(run.last_lines(files, row_reading(args).as_flags()))


def plain_model(model: RewardModel, lora_dim: int, process: Process) -> RewardModel:
    """Return, on rank 0, the model with all its weights, and with LoRA merged into them."""
    state = whole_state(model)
    if process.rank != 0:
        return model
    if lora_dim:
        state = lora.merge(state)
    with torch.device("meta"):
        plain = RewardModel(
            GPT(model.backbone.config),
            model.pad_id,
            model.num_padding_at_beginning,
            reward_bias=model.reward_bias,
        )
    plain.load_state_dict(state, assign=True)
    return plain


# --------------------------------------------------------------------------------------------------
# Evaluation


@torch.no_grad()
def evaluate(
    model: RewardModel,
    dataset: data.TokenizedData,
    args,
    process: Process,
    step: int,
    run: RunDirectory | None = None,
) -> dict[str, list]:
    """Evaluate on a data set, each comparison counted once, on all ranks together; log and print.

    Returns the lists that the metrics are made of, see `metrics.LISTS`, and the `loss`. True
    numbers are empty where they are not known. run: logs the metrics; None does not, and prints
    nothing.
    """
    n = len(dataset)
    if args.eval_iters:
        n = min(n, args.eval_iters * args.per_device_eval_batch_size * process.world_size)
    # Among many comparisons ranks get equal shares, and padded micro-batches similar lengths.
    at_once = 64 * args.per_device_eval_batch_size * process.world_size
    budget = process.at_most(2 * args.per_device_eval_batch_size * args.max_seq_len)
    loss = 0.0
    numbers = {name: [] for name in metrics.LISTS}
    model.eval()
    bar = process.bar(None, total=n, desc=f"eval at step {step}", unit=" comparisons", leave=False)
    for start in range(0, n, at_once):
        batch = [dataset[i] for i in range(start, min(start + at_once, n))]
        micro_batches = share_of(
            batch, args.layout, model.longest_tail, budget, process, args.zero_stage > 0
        )
        for i, comparisons in enumerate(micro_batches, start=1):
            inputs, _ = collate(comparisons or batch[:1], model, args.layout, process.device)
            with autocast(args.dtype, process.device):
                out = model(*inputs)
            loss += out["loss"].item() * len(comparisons)
            if comparisons:
                chosen, rejected = out["chosen_mean_scores"], out["rejected_mean_scores"]
                metrics.collect(numbers, comparisons, chosen.tolist(), rejected.tolist())
            bar.update(start + len(batch) * i // len(micro_batches) - bar.n)  # of all ranks
    bar.close()
    model.train()
    loss, *lists = process.join(loss, *numbers.values())
    numbers = dict(zip(numbers, lists)) | {"loss": [loss / n]}
    if run:
        found = metrics.summarize(loss / n, numbers, dataset.dropped, dataset.truncated)
        run.log(event="eval", step=step, **found)
        process.print(f"step {step}: {metrics.in_a_line(found, numbers)}")
    return numbers


# --------------------------------------------------------------------------------------------------
# Preparation: everything that can be wrong with flags, files and models shows here, before the
# first step


def prepare(args, process: Process):
    """Load or make the model (on the CPU), its tokenizer, training data and eval data.

    Training data is an endless stream of comparisons where it is built in. The order is that of the
    cost of a mistake: the model directory, the data, and only then is a tokenizer trained.
    """
    torch.manual_seed(args.seed)  # fresh weights are the same on every rank
    template = given_template(args.chat_template)
    tokenizer = None
    directory = args.model_name_or_path
    if directory and not Path(directory).is_dir():
        raise ValueError(f"--model_name_or_path {huggingface.missing_directory(directory)}")
    place = args.tokenizer_path or directory
    if place:
        try:
            tokenizer = data.load_tokenizer(place, args.pad_id, args.chat_template)
        except ValueError as error:
            hint = huggingface.download_hint(place)
            raise ValueError(f"{error}; --tokenizer_path names another place{hint}") from None
    model = load_model(args, tokenizer, process) if directory else None
    for path in [*files_of(args.data_path or ()), *files_of(args.eval_path or ())]:
        file_hash(path)  # a missing file shows now
    try:
        if tokenizer is None:
            tokenizer = new_tokenizer(args, template)
        training, evaluation = load_data(args, tokenizer, process)
    except OSError as error:
        raise ValueError(
            f"--data_output_path {args.data_output_path}: {error}; give a directory on a disk with "
            "room for the tokens"
        ) from None
    for name, dataset in (("train", training), ("eval", evaluation)):
        if not isinstance(dataset, data.TokenizedData):
            continue
        process.print(f"{name}: {dataset.summary(args.max_seq_len)}")
        if not len(dataset):
            raise ValueError(
                f"{name} data: no comparison is left at --max_seq_len {args.max_seq_len}; it needs "
                "responses that differ"
            )
    if model is None:
        model = new_model(args, tokenizer)
    layers = set_up(model, args)
    if layers:
        process.print(f"LoRA of rank {args.lora_dim} beside {counted(layers, 'linear layer')}")
    return model, tokenizer, training, evaluation


def load_model(args, tokenizer: data.Tokenizer, process: Process) -> RewardModel:
    """Load the model of --model_name_or_path, which must have the tokenizer's ids, or get them."""
    directory = args.model_name_or_path
    rows = GPTConfig.from_hf(read_config(directory), directory).vocab_size
    missing = huggingface.rows_to_add(rows, tokenizer)
    if missing is None:
        raise ValueError(
            f"--model_name_or_path {directory}: has {rows} token ids, the tokenizer "
            f"{tokenizer.text_size}; give the tokenizer of the model (--tokenizer_path)"
        )
    leading = leading_pads(args.num_padding_at_beginning, tokenizer)
    model = RewardModel.from_pretrained(directory, tokenizer.pad_id, leading, **objective_of(args))
    if missing:
        model.backbone.resize_embedding(tokenizer.vocab_size)
        process.print(f"{missing} rows of zeros added to the embedding, for the added tokens")
    check_positions(model.backbone.config, args.max_seq_len, directory)
    process.print(f"{directory}: {model.head_remark}")
    return model


def check_positions(config: GPTConfig, max_seq_len: int, directory: str):
    """Raise ValueError where the model in `directory` takes no rows of --max_seq_len tokens."""
    longest, limit = huggingface.longest_row(vars(config))
    if max_seq_len > longest:
        raise ValueError(
            f"--max_seq_len: found {max_seq_len}; {directory} has {limit}, so give at most that"
        )


def new_model(args, tokenizer: data.Tokenizer) -> RewardModel:
    """Make a model from scratch."""
    config = GPTConfig(
        args.model_type,
        vocab_size=tokenizer.vocab_size,
        n_positions=args.max_seq_len,
        n_layer=args.n_layer,
        n_head=args.n_head,
        n_embd=args.n_embd,
        token_ids={"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id},
    )
    leading = leading_pads(args.num_padding_at_beginning, tokenizer)
    return RewardModel(GPT(config), tokenizer.pad_id, leading, **objective_of(args))


def leading_pads(given: int | None, tokenizer: data.Tokenizer) -> int:
    """Count the leading pad ids that belong to a text: as given, else 1 where bos is the pad."""
    if given is not None:
        return given
    return int(tokenizer.bos_id == tokenizer.pad_id)


def set_up(model: RewardModel, args) -> int:
    """Set dropout, gradient checkpointing, compiling and LoRA; return how many layers got LoRA."""
    model.backbone.config.dropout = args.dropout
    model.backbone.config.other_keys["max_seq_len"] = args.max_seq_len
    model.backbone.config.other_keys["truncation_side"] = args.truncation_side
    model.backbone.gradient_checkpointing = args.gradient_checkpointing
    if args.compile:
        compile_blocks(model.backbone.blocks)
    if not args.lora_dim:
        return 0
    layers = model.backbone.linear_layers()
    return lora.add(model, layers, args.lora_dim, args.lora_module_name, args.only_optimize_lora)


def new_tokenizer(args, template: ChatTemplate) -> data.Tokenizer:
    """Train a tokenizer, once for the same files; every process gets the same tokenizer."""
    to_texts = partial(data.texts_of, tokenizer=template)

    def train_on(sources: list[Iterable[list[str]]]) -> bytes:
        texts = sample_texts(sources)
        try:
            return data.train_tokenizer(texts, args.vocab_size).model_proto
        except ValueError as error:
            raise ValueError(f"--vocab_size: {error}") from None

    if not args.data_path:
        pairs = itertools.islice(built_in_data(args.seed), TOKENIZER_PAIRS)
        return data.Tokenizer(train_on([map(to_texts, pairs)]), args.pad_id, template=template)

    files, reading = files_of(args.data_path), row_reading(args)

    def build(directory: Path):
        tqdm.write("training a tokenizer")
        bad_rows = [] if args.skip_bad_rows else None
        how = {**asdict(reading), "bad_rows": bad_rows}
        rows = [data.load_comparisons(path, **how) for path in files]
        sources = [convert_rows(to_texts, file, bad_rows) for file in rows]
        (directory / "tokenizer.model").write_bytes(train_on(sources))

    hashes = {path: file_hash(path) for path in files}
    contents = [(hashes[path], Path(path).suffix) for path in files]
    key = hash_of(
        "tokenizer 4", contents, args.vocab_size, args.skip_bad_rows, reading, template.source
    )
    directory = cached(Path(args.data_output_path) / key, build, hashes)
    model_proto = (directory / "tokenizer.model").read_bytes()
    return data.Tokenizer(model_proto, args.pad_id, template=template)


def built_in_data(seed: int) -> Iterator[data.Comparison]:
    """The endless built-in training data of a --seed, never the data of the eval set."""
    return data.known_rewards(EVAL_SEED + 1 + seed)


def load_data(args, tokenizer: data.Tokenizer, process: Process):
    """Load training and eval data as token ids.

    Training data is an endless stream where it is built in, a TokenizedData otherwise.
    """
    settings = tokenizer, args.max_seq_len, args.truncation_side
    if not args.data_path:
        pairs = itertools.islice(data.known_rewards(EVAL_SEED), EVAL_PAIRS)
        training = data.tokenize_each(built_in_data(args.seed), *settings)
        return training, data.tokenize_all(pairs, *settings)

    settings += args.data_output_path, args.skip_bad_rows, row_reading(args)
    files = [data.tokenize_file(path, *settings) for path in files_of(args.data_path)]
    eval_files = [data.tokenize_file(path, *settings) for path in files_of(args.eval_path or ())]
    for line in file_notes(files, eval_files, row_reading(args)):
        process.print(line)
    split = partial(data.split_indices, data_split=args.data_split, stage=1, seed=args.seed)
    selected = data.rows_of(files, split)
    if args.eval_path:
        every_row = data.rows_of(eval_files, np.arange)
        return data.select(files, selected), data.select(eval_files, every_row)
    selected = np.random.RandomState(args.seed).permutation(selected)
    held_out = max(1, round(args.eval_fraction * len(selected)))
    if held_out >= len(selected):
        raise ValueError(
            f"--data_path: {counted(len(selected), 'comparison')} (after --data_split), too few to "
            "hold some out; give more, or --eval_path"
        )
    return data.select(files, selected[:-held_out]), data.select(files, selected[-held_out:])


def distribute(model: RewardModel, zero_stage: int, offload: bool, process: Process):
    """Move the model to this process's device, or shard it; return what to call to train it.

    Calling another method than `forward`, or `model` itself, would silently train each rank on its
    own.
    """
    for parameter in model.parameters():
        parameter.data = parameter.data.contiguous()  # gpt2's checkpoints have them transposed
    if zero_stage:
        shard(model, model.backbone.blocks, process, zero_stage == 3, offload)
        return model
    model.to(process.device)
    if process.world_size == 1:
        return model
    return DistributedDataParallel(model, gradient_as_bucket_view=True)


def make_optimizer(
    model: RewardModel, rate: float, weight_decay: float, lora_rate: float, process: Process
) -> torch.optim.AdamW:
    """Make AdamW (Loshchilov & Hutter 2019) as in DeepSpeed-Chat, but for what decays.

    One rule for every family: matrices decay, vectors don't.
    """
    groups = {
        "matrices": {"params": [], "lr": rate, "weight_decay": weight_decay},
        "vectors": {"params": [], "lr": rate, "weight_decay": 0.0},
        "LoRA": {"params": [], "lr": lora_rate, "weight_decay": weight_decay},
    }
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if "lora_" in name:
            kind = "LoRA"
        elif parameter.dim() >= 2:
            kind = "matrices"
        else:
            kind = "vectors"
        groups[kind]["params"].append(parameter)
    for kind, group in groups.items():
        if group["params"]:
            count = sum(parameter.numel() for parameter in group["params"])
            process.print(
                f"{kind}: {counted(len(group['params']), 'tensor')}, {count:,} parameters, "
                f"learning rate {group['lr']:g}, weight decay {group['weight_decay']:g}"
            )
    used = [group for group in groups.values() if group["params"]]
    return torch.optim.AdamW(used, betas=(0.9, 0.95), fused=True)


def result_follows_from(
    args,
    model: RewardModel,
    tokenizer: data.Tokenizer,
    training,
    global_batch: int,
    total_steps: int,
) -> dict:
    """List what the weights of a run follow from, by names that later versions keep.

    A resumed run must agree. How ranks and accumulation make up a batch doesn't count.
    """
    result = {name: getattr(args, name) for name in RESULT_FLAGS}
    result["global_batch"] = global_batch
    for name, value in asdict(model.backbone.config).items():
        if name not in ("dropout", "other_keys"):  # a flag, and keys that no computation reads
            result[f"config.{name}"] = value
    result["padding"] = [model.pad_id, model.num_padding_at_beginning]
    result["tokenizer"] = tokenizer.fingerprint()
    result["training_data"] = "built-in"
    if isinstance(training, data.TokenizedData):
        result["training_data"] = training.fingerprint()
    # Dropout draws its numbers for other tokens in another layout, and in other kernels.
    for name in ("layout", "compile"):
        result[name] = getattr(args, name) if args.dropout else ANY
    is_constant = args.lr_scheduler_type.startswith("constant")
    result["total_steps"] = ANY if is_constant else total_steps
    return result


def main():
    outlive_readers()
    args = parse_flags(FAMILIES, LOSSES)
    complaint = None
    try:
        if args.enable_tensorboard:
            metrics.summary_writer()  # says at once if it is not installed
        if args.dry_run:
            hand_over("dry_run", sys.argv[1:], "--dry_run")
        train(args, Process.start(args.zero_stage > 0, args.process_timeout))
    except (Exception, KeyboardInterrupt) as error:
        complaint = complaint_about(error, args.process_timeout)
    leave(complaint)


if __name__ == "__main__":
    main()
