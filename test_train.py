"""The loop: its parts, runs of the program on one process and on two, and what it says about bad input."""

import functools
import gzip
import itertools
import json
import math
import multiprocessing
import os
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import data
import rm
import train
from tools.score import score

HERE = Path(__file__).parent
TINY = ["--n_layer", "2", "--n_head", "2", "--n_embd", "32", "--max_seq_len", "64"]


def run(*arguments, processes=0, cwd=None):
    """A run of one of the programs, in a process of its own; with `processes`, under torchrun."""
    arguments = [str(argument) for argument in arguments]
    program, arguments = HERE / arguments[0], arguments[1:]
    launcher = [sys.executable]
    if processes:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    return subprocess.run(
        [*launcher, program, *arguments], cwd=cwd, capture_output=True, text=True, timeout=300
    )


def train_ok(output_dir, *arguments, processes=0):
    """A run of train.py that must succeed -> its events, by kind."""
    done = run("train.py", *TINY, "--output_dir", output_dir, *arguments, processes=processes)
    assert done.returncode == 0, done.stderr
    return done, events_of(output_dir)


def events_of(output_dir):
    """What a run logged, by kind."""
    events = [json.loads(line) for line in (output_dir / "metrics.jsonl").read_text().splitlines()]
    return {
        kind: [event for event in events if event["event"] == kind] for kind in ("step", "eval")
    }


def train_forked(output_dir, *arguments, processes=1):
    """The same as `train_ok`, in a process forked from one that has torch imported, which is sooner there -> its events, by kind."""
    forked_ok(output_dir, *TINY, *arguments, processes=processes)
    return events_of(output_dir)


def flags(monkeypatch, *arguments):
    """The parsed flags of train.py with these arguments."""
    monkeypatch.setattr(sys, "argv", ["train.py", *TINY, *map(str, arguments)])
    return train.parse_flags()


def write_rows(path, n, seed=0, ranking=()):
    """n rows of the built-in data as a file; the rows numbered in `ranking` become rankings of three."""
    stream = data.known_rewards(seed)
    with open(path, "w") as file:
        for i in range(n):
            c = next(stream)
            row = {"prompt": c.prompt, "chosen": c.responses[0], "rejected": c.responses[1]}
            if i in ranking:
                row = {"prompt": c.prompt, "responses": [*c.responses, " No."]}
            file.write(json.dumps(row) + "\n")
    return path


# ----------------------------------------------------------------------------------------------------------------------
# Parts


@pytest.mark.parametrize("warmup", [0, 3])
@pytest.mark.parametrize("kind", train.SCHEDULES)
def test_schedules_are_those_of_transformers(kind, warmup):
    from transformers import get_scheduler

    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=2e-3)
    theirs = get_scheduler(kind, optimizer, num_warmup_steps=warmup, num_training_steps=10)
    for step in range(10):
        assert train.learning_rate(kind, 2e-3, step, warmup, 10) == pytest.approx(
            theirs.get_last_lr()[0], rel=1e-9, abs=1e-15
        )
        optimizer.step()
        theirs.step()


def test_sampler_is_a_function_of_seed_and_step_and_shows_everything_once_an_epoch():
    epochs = [
        [train.batch_indices(10, 4, seed=5, step=3 * epoch + step) for step in range(3)]
        for epoch in range(2)
    ]
    assert [len(batch) for batch in epochs[0]] == [4, 4, 2]
    assert all(sorted(np.concatenate(batches)) == list(range(10)) for batches in epochs)
    assert not np.array_equal(np.concatenate(epochs[0]), np.concatenate(epochs[1]))
    assert not np.array_equal(epochs[0][0], train.batch_indices(10, 4, seed=6, step=0))
    assert np.array_equal(epochs[1][1], train.batch_indices(10, 4, seed=5, step=4))


@pytest.mark.parametrize("layout", ["packed", "padded"])
@pytest.mark.parametrize("budget", [1, 20, 60, 10**6])
def test_micro_batches_hold_every_comparison_once_within_the_budget(layout, budget):
    """And are no more than they must be: the next comparison would not have fitted in."""
    rng = np.random.default_rng(0)
    groups = [
        [[7] * rng.integers(0, 6) + [k] * rng.integers(1, 9) for k in range(rng.integers(2, 5))]
        for _ in range(30)
    ]
    sizes = [train.size_of(group, layout) for group in groups]
    batches = train.micro_batches(range(30), sizes, budget)
    assert sorted(i for batch in batches for i in batch) == list(range(30))
    model = rm.RewardModel(
        train.GPT(train.GPTConfig(n_layer=1, n_embd=8, n_head=2, vocab_size=9, n_positions=4)), 0
    )
    tokens = [
        train.collate([data.Tokenized(groups[i]) for i in batch], model, layout, "cpu")[1]
        for batch in batches
    ]
    assert all(n <= budget or len(batch) == 1 for n, batch in zip(tokens, batches))
    for batch, following in zip(batches, batches[1:]):
        one_more = [data.Tokenized(groups[i]) for i in [*batch, following[0]]]
        sizes_differ = len({len(comparison.sequences) for comparison in one_more}) > 1
        assert (
            train.collate(one_more, model, layout, "cpu")[1] > budget
            or layout == "padded"
            and sizes_differ
        )
    if layout == "padded":
        assert all(len({len(groups[i]) for i in batch}) == 1 for batch in batches)


@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_ranks_get_every_comparison_once_and_similar_numbers_of_tokens(layout):
    rng = np.random.default_rng(0)
    groups = [[[1] * 5 + [k] * rng.integers(1, 60) for k in range(2)] for _ in range(64)]
    sizes = [train.size_of(group, layout) for group in groups]
    shares = train.shares_of_ranks(sizes, 4)
    assert sorted(sum(shares, [])) == list(range(64))
    tokens = [sum(math.prod(sizes[i][:2]) for i in share) for share in shares]
    assert max(tokens) - min(tokens) <= 130  # one comparison's, of some 2,000
    assert [len(share) for share in train.shares_of_ranks(sizes[:3], 4)] == [1, 1, 1, 0]


@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_with_sharded_weights_every_rank_has_as_many_micro_batches(layout):
    """One large comparison on a rank alone, many small ones in micro-batches on the other; each is computed once."""
    batch = [data.Tokenized([[1] * 200, [2] * 200])] + [data.Tokenized([[1] * 6, [2] * 5])] * 20
    for stage, empty in ((0, 0), (3, 1)):
        args = train.argparse.Namespace(layout=layout, zero_stage=stage)
        parts = [train.divide(batch, 100, args, train.Process(rank, 2)) for rank in range(2)]
        assert sorted(i for part in parts for chunk in part for i in chunk) == list(range(21))
        assert (len({len(part) for part in parts}) == 1) == bool(stage)
        assert any([] in part for part in parts) == bool(stage)
    assert train.divide(
        batch[:1], 100, train.argparse.Namespace(layout=layout, zero_stage=0), train.Process(1, 2)
    ) == [[]]


def test_collate_puts_chosen_rows_before_rejected_rows():
    comparisons = [data.Tokenized([[1, 2], [3]], margin=0.5), data.Tokenized([[4], [5, 6, 7], [8]])]
    model = rm.RewardModel(
        train.GPT(train.GPTConfig(n_layer=1, n_embd=8, n_head=2, vocab_size=9, n_positions=4)), 0
    )
    (ids, mask, margins), tokens = train.collate(comparisons, model, "padded", "cpu")
    assert ids.tolist() == [
        [1, 2, 0],
        [4, 0, 0],
        [4, 0, 0],
        [5, 6, 7],
        [3, 0, 0],
        [5, 6, 7],
        [8, 0, 0],
        [8, 0, 0],
    ]
    assert (
        mask.tolist() == (ids != 0).long().tolist()
        and tokens == 24
        and list(margins) == [0.5, 0.0, 0.0, 0.0]
    )
    (batch,), tokens = train.collate(comparisons, model, "packed", "cpu")
    assert batch.num_tokens == tokens == 13 and list(batch.margins) == [0.5, 0.0]
    model.backbone.config.position_offset = 2  # as in OPT, where a tail is computed once
    assert train.collate(comparisons, model, "packed", "cpu")[1] == 11


def test_weight_decay_is_on_matrices_only(monkeypatch):
    model = rm.RewardModel(
        train.GPT(
            train.GPTConfig("gpt2", n_layer=1, n_embd=8, n_head=2, vocab_size=9, n_positions=4)
        ),
        0,
    )
    args = flags(monkeypatch, "--weight_decay", 0.1)
    decayed, kept = train.make_optimizer(model, args, train.Process()).param_groups
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert (decayed["weight_decay"], kept["weight_decay"]) == (0.1, 0.0)
    assert all("norm" in names[id(p)] or names[id(p)].endswith("bias") for p in kept["params"])
    assert len(decayed["params"]) + len(kept["params"]) == len(names)
    assert "v_head.weight" in {names[id(p)] for p in decayed["params"]}


def test_numbers_behind_an_evaluation_are_of_pairs_and_of_responses(monkeypatch):
    args = flags(monkeypatch)
    torch.manual_seed(0)
    model = rm.RewardModel(
        train.GPT(train.GPTConfig(n_layer=1, n_embd=8, n_head=2, vocab_size=300, n_positions=9)), 0
    )
    comparisons = [
        data.Comparison("a", ["b", "c"], [2.0, 1.0]),
        data.Comparison("a", ["c", "bb", "ccc"], [3.0, 0.5, 1.0]),
    ]
    dataset = data.tokenize_all(comparisons, data.train_tokenizer(["a", "ab", "ac"], 300), 9)
    metrics, numbers = train.evaluate(model, dataset, args, train.Process(), step=0)
    (b, c), (_, bb, ccc) = score(model.eval(), [dataset[i].sequences for i in range(2)], 8)
    assert numbers["chosen"] == pytest.approx([b, c, c, bb]) and numbers[
        "rejected"
    ] == pytest.approx([c, bb, ccc, ccc])
    assert numbers["true_margin"] == [1.0, 2.5, 2.0, -0.5]
    assert numbers["scores"] == pytest.approx([b, c, c, bb, ccc]) and numbers["rewards"] == [
        2.0,
        1.0,
        3.0,
        0.5,
        1.0,
    ]
    assert metrics["pairs"] == 4


def test_evaluation_leaves_the_model_in_training_mode(monkeypatch):
    args = flags(monkeypatch, "--dropout", 0.5)
    model = rm.RewardModel(
        train.GPT(
            train.GPTConfig(
                n_layer=1, n_embd=8, n_head=2, vocab_size=300, n_positions=4, dropout=0.5
            )
        ),
        0,
    )
    dataset = data.tokenize_all(
        [data.Comparison("a", ["b", "c"])], data.train_tokenizer(["a", "ab", "ac"], 300), 4
    )
    first, second = (
        train.evaluate(model, dataset, args, train.Process(), step=0) for _ in range(2)
    )
    assert first == second  # no dropout in an evaluation
    assert model.training


def test_held_out_data_is_the_end_of_the_shuffled_second_share(monkeypatch, tmp_path):
    """Of two files, each split 1:2:1 as DeepSpeed-Chat splits it; nothing is in both parts, and both files are."""
    paths = [write_rows(tmp_path / "a.jsonl", 40), write_rows(tmp_path / "b.jsonl", 60, seed=1)]
    for path in paths:  # numbered, to be told apart
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        rows[5]["rejected"] = rows[5]["chosen"]  # is dropped, but counts as a row of the split
        path.write_text(
            "".join(
                json.dumps({**row, "prompt": f"{path.stem}{i} "}) + "\n"
                for i, row in enumerate(rows)
            )
        )
    args = flags(
        monkeypatch,
        "--data_path",
        *paths,
        "--data_split",
        "1,2,1",
        "--eval_fraction",
        0.2,
        "--seed",
        3,
        "--max_seq_len",
        512,
    )
    tokenizer = data.train_tokenizer(["a 0123456789 b"], 400)
    training, held_out = (
        [tokenizer.decode(part[i].sequences[0]).split()[0] for i in range(len(part))]
        for part in train.load_data(args, tokenizer, train.Process())
    )
    share = set()
    for path, n in zip(paths, (40, 60)):
        order = np.arange(n)
        np.random.RandomState(3).shuffle(order)
        share |= {f"{path.stem}{i}" for i in order[n // 4 : 3 * n // 4]}
    assert {"a5", "b5"} < share
    assert (len(training), len(held_out)) == (39, 9)
    assert set(training) | set(held_out) == share - {"a5", "b5"}
    assert {prompt[0] for prompt in held_out} == {"a", "b"}


def test_value_head_follows_from_the_seed_and_dropout_from_the_flag(
    monkeypatch, tmp_path, built_in_run
):
    output_dir = shutil.copytree(built_in_run[0], tmp_path / "backbone")
    weights = torch.load(output_dir / "pytorch_model.bin", weights_only=True)
    del weights["v_head.weight"]
    torch.save(weights, output_dir / "pytorch_model.bin")
    args = [
        "--model_name_or_path",
        output_dir,
        "--max_seq_len",
        64,
        "--data_path",
        write_rows(tmp_path / "rows.jsonl", 30),
    ]
    heads = []
    for seed in (1, 1, 2):
        monkeypatch.setattr(
            sys, "argv", ["train.py", *map(str, args), "--seed", str(seed), "--dropout", "0.25"]
        )
        model = train.prepare(train.parse_flags(), train.Process())[0]
        assert {block.config.dropout for block in model.backbone.blocks} == {
            0.25
        }  # the flag's, not the checkpoint's
        heads.append(model.v_head.weight)
    assert torch.equal(heads[0], heads[1]) and not torch.equal(heads[0], heads[2])


# ----------------------------------------------------------------------------------------------------------------------
# Runs


@pytest.fixture(scope="module")
def built_in_run(tmp_path_factory):
    output_dir = tmp_path_factory.mktemp("built_in")
    return output_dir, *train_ok(
        output_dir, "--max_steps", 3, "--eval_interval", 2, "--eval_iters", 4
    )


def test_metrics_of_a_run(built_in_run):
    _, done, events = built_in_run
    assert [event["step"] for event in events["step"]] == [1, 2, 3]
    assert [event["step"] for event in events["eval"]] == [0, 2, 3]
    assert set(events["step"][0]) == {
        "event",
        "step",
        "loss",
        "lr",
        "grad_norm",
        "pairs",
        "tokens",
        "seconds",
    }
    assert set(events["eval"][0]) == {
        "event",
        "step",
        "loss",
        "accuracy",
        "chosen_score",
        "rejected_score",
        "margin",
        "ece",
        "pairs",
        "dropped",
        "bayes_accuracy",
        "probability_error",
    }
    assert all(event["pairs"] == 32 and 64 < event["tokens"] < 64 * 48 for event in events["step"])
    assert [event["lr"] for event in events["step"]] == pytest.approx(
        [1e-3 * 0.5 * (1 + math.cos(math.pi * i / 3)) for i in range(3)]
    )


def test_last_lines_say_accuracy_where_the_model_lies_and_how_to_score(built_in_run):
    output_dir, done, events = built_in_run
    accuracy, place, how = done.stdout.strip().splitlines()[-3:]
    assert (
        f"{events['eval'][0]['accuracy']:.4f} before, {events['eval'][-1]['accuracy']:.4f} after"
        in accuracy
    )
    assert f"{events['eval'][-1]['bayes_accuracy']:.4f}" in accuracy
    assert re.search(
        r"of 128 eval responses' scores with their true rewards: -?0\.\d{4}$", done.stdout, re.M
    )
    assert f"{output_dir}/report.html" in place and (output_dir / "report.html").exists()
    assert str(output_dir) in place and f"python rm.py {output_dir} " in how


def test_evaluation_of_the_saved_model_by_hand(built_in_run):
    """The metrics of the last evaluation, recomputed one text at a time from the files of the run."""
    output_dir, _, events = built_in_run
    model, tokenizer = rm.RewardModel.from_pretrained(output_dir), data.load_tokenizer(output_dir)
    stream, margins, true_margins, losses = data.known_rewards(train.EVAL_SEED), [], [], []
    for _ in range(4 * 16):
        c = next(stream)
        rows = [
            [tokenizer.bos_id, *tokenizer.encode(c.prompt + response), tokenizer.eos_id]
            for response in c.responses
        ]
        r = [
            model.forward_value(torch.tensor([row]), return_value_only=True)[0, -1].item()
            for row in rows
        ]
        margins.append(r[0] - r[1])
        true_margins.append(c.rewards[0] - c.rewards[1])
        losses.append(model(*data.pad_rows(rows, tokenizer.pad_id))["loss"].item())
    sigmoid = lambda x: 1 / (1 + math.exp(-x))
    last = events["eval"][-1]
    assert last["pairs"] == 64
    assert last["accuracy"] == np.mean([m > 0 for m in margins])
    assert last["bayes_accuracy"] == np.mean([m > 0 for m in true_margins])
    assert last["margin"] == pytest.approx(np.mean(margins), abs=1e-5)
    assert last["loss"] == pytest.approx(np.mean(losses), abs=1e-5)
    expected = np.mean([abs(sigmoid(m) - sigmoid(t)) for m, t in zip(margins, true_margins)])
    assert last["probability_error"] == pytest.approx(expected, abs=1e-5)


def test_run_by_hand(monkeypatch, tmp_path):
    """Five steps of a run, with all that shapes an update, done again with PyTorch's and transformers' own parts."""
    from transformers import get_scheduler

    rows, held_out = (
        write_rows(tmp_path / "rows.jsonl", 20),
        write_rows(tmp_path / "held_out.jsonl", 2, seed=9),
    )
    arguments = [
        "--data_path",
        rows,
        "--eval_path",
        held_out,
        "--per_device_train_batch_size",
        8,
        "--max_steps",
        5,
        "--learning_rate",
        1e-2,
        "--lr_scheduler_type",
        "linear",
        "--num_warmup_steps",
        2,
        "--weight_decay",
        0.5,
        "--max_grad_norm",
        0.05,
        "--truncation_side",
        "right",
        "--max_seq_len",
        21,
        "--seed",
        5,
    ]
    events = train_forked(tmp_path / "out", *arguments)
    tokenizer = data.load_tokenizer(tmp_path / "out")
    args = flags(monkeypatch, *arguments)
    torch.manual_seed(5)
    model = train.new_model(args, tokenizer)
    decayed = [
        p
        for name, p in model.named_parameters()
        if not name.endswith("bias") and "norm" not in name
    ]
    rest = [p for name, p in model.named_parameters() if name.endswith("bias") or "norm" in name]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.5}, {"params": rest, "weight_decay": 0.0}],
        lr=1e-2,
        betas=(0.9, 0.95),
    )
    scheduler = get_scheduler("linear", optimizer, num_warmup_steps=2, num_training_steps=5)
    comparisons = list(data.load_comparisons(rows))
    order = np.arange(20)  # the whole file is the default share, in DeepSpeed-Chat's order
    np.random.RandomState(5).shuffle(order)
    pairs = [
        [
            (
                [tokenizer.bos_id]
                + tokenizer.encode(comparisons[i].prompt + response)
                + [tokenizer.eos_id]
            )[:21]
            for response in comparisons[i].responses
        ]
        for i in order
    ]
    pairs = [pair for pair in pairs if pair[0] != pair[1]]  # cut at 21 tokens, some are identical
    assert 16 < len(pairs) < 20 and max(len(ids) for pair in pairs for ids in pair) == 21
    epochs = [np.random.RandomState([5, epoch]).permutation(len(pairs)) for epoch in (0, 1)]
    batches = [epoch[start : start + 8] for epoch in epochs for start in (0, 8, 16)]
    for batch, event in zip(batches, events["step"]):
        ids = [pairs[i][which] for which in (0, 1) for i in batch]
        loss = model(*data.pad_rows(ids, tokenizer.pad_id))["loss"]
        optimizer.zero_grad()
        loss.backward()
        grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.05).item()
        assert event["lr"] == pytest.approx(scheduler.get_last_lr()[0], rel=1e-9)
        optimizer.step()
        scheduler.step()
        assert event["loss"] == pytest.approx(loss.item(), abs=1e-5)
        assert event["grad_norm"] == pytest.approx(grad_norm, rel=1e-3)
    saved = rm.RewardModel.from_pretrained(tmp_path / "out")
    for (name, expected), parameter in zip(model.named_parameters(), saved.parameters()):
        # on average, since Adam turns a gradient of rounding errors alone into a step of any sign
        assert (parameter[: len(expected)] - expected).abs().mean() < 1e-4, name


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    return write_rows(folder / "train.jsonl", 70, ranking={3, 20, 21}), write_rows(
        folder / "eval.jsonl", 21, seed=9, ranking={5}
    )


@pytest.fixture(scope="module")
def one_process(files, tmp_path_factory):
    """12 steps with a global batch of 12: epochs of 70 comparisons, so each sixth batch is ragged (10)."""
    output_dir = tmp_path_factory.mktemp("one")
    return output_dir, train_ok(
        output_dir,
        "--data_path",
        files[0],
        "--eval_path",
        files[1],
        "--max_steps",
        12,
        "--per_device_train_batch_size",
        12,
        "--eval_interval",
        6,
    )[1]


def same_run(one, other):
    for kind, key in (
        ("step", "loss"),
        ("step", "grad_norm"),
        ("eval", "loss"),
        ("eval", "margin"),
    ):
        assert [e[key] for e in other[kind]] == pytest.approx(
            [e[key] for e in one[kind]], abs=1e-4
        ), (kind, key)
    for kind in ("step", "eval"):
        assert [e["pairs"] for e in other[kind]] == [e["pairs"] for e in one[kind]]


def test_two_processes_give_the_curve_of_one(files, one_process, tmp_path):
    """Global batch 12 as 2 ranks x 3 comparisons x 2, in many micro-batches, with ragged batches and rankings among pairs."""
    _, events = train_ok(
        tmp_path,
        "--data_path",
        files[0],
        "--eval_path",
        files[1],
        "--max_steps",
        12,
        "--eval_interval",
        6,
        "--per_device_train_batch_size",
        3,
        "--gradient_accumulation_steps",
        2,
        "--per_device_eval_batch_size",
        4,
        "--micro_batch_tokens",
        150,
        processes=2,
    )
    same_run(one_process[1], events)
    assert (tmp_path / "tokenizer.model").read_bytes() == (
        one_process[0] / "tokenizer.model"
    ).read_bytes()


@pytest.mark.parametrize("layout, tokens", [("packed", 100), ("padded", 10**6), ("padded", 200)])
def test_micro_batches_and_layout_do_not_change_the_curve(
    files, one_process, tmp_path, layout, tokens
):
    events = train_forked(
        tmp_path / "out",
        "--data_path",
        files[0],
        "--eval_path",
        files[1],
        "--max_steps",
        12,
        "--eval_interval",
        6,
        "--layout",
        layout,
        "--per_device_train_batch_size",
        4,
        "--gradient_accumulation_steps",
        3,
        "--micro_batch_tokens",
        tokens,
    )
    same_run(one_process[1], events)
    computed = [sum(event["tokens"] for event in run["step"]) for run in (events, one_process[1])]
    assert computed[0] == computed[1] if layout == "packed" else computed[0] > computed[1]


@pytest.mark.parametrize("model_type", train.FAMILIES)
def test_twenty_steps_packed_or_padded_are_the_same_in_float64(model_type, files):
    """Pairs and a ranking; in the padded layout in micro-batches that add up."""
    tokenizer = data.train_tokenizer(["a b c d e"], 300)
    comparisons = list(data.tokenize_all(data.load_comparisons(files[0]), tokenizer, 64))
    curves = {}
    for layout in ("packed", "padded"):
        torch.manual_seed(0)
        config = train.GPTConfig(
            model_type,
            n_layer=2,
            n_embd=16,
            n_head=2,
            vocab_size=tokenizer.vocab_size,
            n_positions=256,
        )
        model = rm.RewardModel(train.GPT(config), tokenizer.pad_id).double()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, betas=(0.9, 0.95), fused=True)
        curves[layout] = []
        for step in range(20):
            batch = [
                comparisons[i] for i in train.batch_indices(len(comparisons), 8, seed=0, step=step)
            ]
            curves[layout].append(0.0)
            sizes = [train.size_of(comparison.sequences, layout) for comparison in batch]
            for chunk in train.micro_batches(range(len(batch)), sizes, 1000):
                inputs, _ = train.collate([batch[i] for i in chunk], model, layout, "cpu")
                loss = model(*inputs)["loss"] * len(chunk) / len(batch)
                loss.backward()
                curves[layout][-1] += loss.item()
            optimizer.step()
            optimizer.zero_grad()
    worst = max(abs(a - b) for a, b in zip(*curves.values()))
    print(f"worst difference {worst:.1e}")
    assert worst < 1e-5 and curves["packed"][-1] != curves["packed"][0]


def test_a_batch_smaller_than_the_number_of_ranks(tmp_path):
    """5 comparisons in batches of 4: the second batch has one comparison for two ranks."""
    file, held_out = (
        write_rows(tmp_path / "train.jsonl", 5),
        write_rows(tmp_path / "eval.jsonl", 3, seed=9),
    )
    flags = ["--data_path", file, "--eval_path", held_out, "--max_steps", 4]
    one = train_forked(tmp_path / "one", *flags, "--per_device_train_batch_size", 4)
    two = train_forked(tmp_path / "two", *flags, "--per_device_train_batch_size", 2, processes=2)
    assert [event["pairs"] for event in two["step"]] == [4, 1, 4, 1]
    same_run(one, two)


WATCHED = """
import sys, torch, torch.distributed as dist
sys.path.insert(0, {here!r})
import train

def watched(model, args, process):
    optimizer = make_optimizer(model, args, process)
    step = optimizer.step
    def step_and_compare():
        step()
        mine = torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
        others = [torch.empty_like(mine) for _ in range(process.world_size)]
        dist.all_gather(others, mine)
        process.print(f"ranks agree: {{all(torch.equal(mine, other) for other in others)}}")
        print(f"dropout seed {{torch.initial_seed()}}", flush=True)
    optimizer.step = step_and_compare
    return optimizer

make_optimizer, train.make_optimizer = train.make_optimizer, watched
train.main()
"""


def test_parameters_stay_equal_across_ranks(files, tmp_path):
    """After every step, to the bit; with accumulation, ragged batches, and dropout, which differs between the ranks."""
    script = tmp_path / "watched.py"
    script.write_text(WATCHED.format(here=str(HERE)))
    done = run(
        script,
        *TINY,
        "--output_dir",
        tmp_path / "out",
        "--data_path",
        files[0],
        "--eval_path",
        files[1],
        "--max_steps",
        7,
        "--per_device_train_batch_size",
        3,
        "--gradient_accumulation_steps",
        2,
        "--micro_batch_tokens",
        150,
        "--dropout",
        0.1,
        processes=2,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("ranks agree: True") == 7
    assert len(set(re.findall(r"dropout seed \d+", done.stdout))) == 2


def test_training_lowers_the_loss_on_what_it_is_trained_on(files, tmp_path):
    events = train_forked(
        tmp_path / "out",
        "--data_path",
        files[0],
        "--eval_path",
        files[0],
        "--num_train_epochs",
        12,
        "--learning_rate",
        3e-3,
    )
    assert len(events["step"]) == 12 * math.ceil(70 / 16)
    assert events["eval"][-1]["accuracy"] > 0.8 > events["eval"][0]["accuracy"]
    assert events["eval"][-1]["loss"] < events["eval"][0]["loss"] - 0.1


def test_rows_that_are_no_comparison_are_left_out_where_asked_for(tmp_path):
    rows = write_rows(tmp_path / "rows.jsonl", 24).read_bytes().splitlines(keepends=True)
    (tmp_path / "rows.jsonl").write_bytes(
        b"".join([*rows[:9], b"{\n", *rows[9:], b'{"prompt": "p"}\n', b"\xff\n"])
    )
    done, events = train_ok(
        tmp_path / "out",
        "--data_path",
        tmp_path / "rows.jsonl",
        "--eval_path",
        tmp_path / "rows.jsonl",
        "--skip_bad_rows",
    )
    assert (
        f"{tmp_path}/rows.jsonl: 3 rows left out, as they are no comparison; the first: {tmp_path}/rows.jsonl:10: not JSON"
        in done.stdout
    )
    assert sum(step["pairs"] for step in events["step"]) == events["eval"][-1]["pairs"] == 24


def test_a_trained_model_is_one_to_start_from(built_in_run, tmp_path):
    """--model_name_or_path takes what a run left; without --eval_path the last 5 % of 80 comparisons are held out."""
    output_dir, *_ = built_in_run
    rows = write_rows(tmp_path / "rows.jsonl", 80)
    done = run(
        "train.py",
        "--model_name_or_path",
        output_dir,
        "--data_path",
        rows,
        "--max_seq_len",
        48,
        "--output_dir",
        tmp_path / "out",
    )
    assert done.returncode == 0, done.stderr
    first, *steps, _ = [
        json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()
    ]
    assert first["pairs"] == 4 and sum(step["pairs"] for step in steps) == 76
    assert steps[0]["lr"] == 5e-5  # DeepSpeed-Chat's default, where there is something to keep
    assert (tmp_path / "out" / "tokenizer.model").read_bytes() == (
        output_dir / "tokenizer.model"
    ).read_bytes()


def test_opt_as_the_hub_has_it_becomes_what_deepspeed_chats_step_3_loads(tmp_path):
    """vocab.json, merges.txt and a checkpoint by transformers go in. What comes out is loaded as `create_critic_model(rlhf_training
    =True)` does: the backbone from config.json, its embedding resized to 8 * ceil(length of the tokenizer / 8), then the weights."""
    pytest.importorskip("tokenizers")  # reads vocab.json
    import tokenizers
    import transformers

    texts = [c.prompt + c.responses[0] for c, _ in zip(data.known_rewards(0), range(100))]
    bpe = tokenizers.ByteLevelBPETokenizer()
    bpe.train_from_iterator(
        texts, vocab_size=300, special_tokens=["<s>", "<pad>", "</s>"], show_progress=False
    )
    source, output_dir = tmp_path / "opt", tmp_path / "out"
    config = transformers.OPTConfig(
        vocab_size=304,
        hidden_size=16,
        ffn_dim=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
        word_embed_proj_dim=8,
        do_layer_norm_before=False,
        bos_token_id=2,
    )
    transformers.OPTForCausalLM(config).save_pretrained(source)
    bpe.save_model(str(source))
    special = {
        "bos_token": "</s>",
        "eos_token": "</s>",
        "unk_token": "</s>",
        "pad_token": "<pad>",
        "add_bos_token": True,
    }
    (source / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "GPT2Tokenizer", **special})
    )
    rows = write_rows(tmp_path / "rows.jsonl", 24)
    done = run(
        "train.py",
        "--model_name_or_path",
        source,
        "--data_path",
        rows,
        "--max_seq_len",
        64,
        "--output_dir",
        output_dir,
    )
    assert done.returncode == 0, done.stderr

    tokenizer = transformers.AutoTokenizer.from_pretrained(output_dir)
    backbone = transformers.AutoModel.from_config(
        transformers.AutoConfig.from_pretrained(output_dir)
    )
    backbone.resize_token_embeddings(8 * math.ceil(len(tokenizer) / 8))
    weights = torch.load(output_dir / "pytorch_model.bin", weights_only=True)
    head = weights.pop("v_head.weight")
    backbone.load_state_dict(
        {name.removeprefix("rwtransformer."): weight for name, weight in weights.items()},
        strict=True,
    )
    c = next(data.known_rewards(1))
    ids = torch.tensor([tokenizer(c.prompt + c.responses[0])["input_ids"]])[:, :64]
    ours = rm.RewardModel.from_pretrained(output_dir).eval()
    expected = (backbone.eval()(ids).last_hidden_state @ head.T)[..., 0]
    assert (ours.pad_id, ours.num_padding_at_beginning) == (1, 0)
    assert torch.allclose(ours.forward_value(ids, return_value_only=True), expected, atol=1e-5)


def test_files_of_an_earlier_run_are_kept(tmp_path, capsys):
    for number in (1, 2):
        (tmp_path / "pytorch_model.bin").write_text(f"model {number}")
        (tmp_path / "model.safetensors").write_text("would be taken for the new model")
        (tmp_path / "notes.txt").write_text("not ours")
        model = rm.RewardModel(
            train.GPT(train.GPTConfig(n_layer=1, n_embd=8, n_head=2, vocab_size=9, n_positions=4)),
            0,
        )
        args = train.argparse.Namespace(output_dir=tmp_path, save_interval=0)
        train.open_output(model, args, 0, train.Process())[0].write(f"metrics {number}")
    assert (tmp_path / "earlier-1" / "pytorch_model.bin").read_text() == "model 1"
    assert (tmp_path / "earlier-2" / "pytorch_model.bin").read_text() == "model 2"
    assert (tmp_path / "earlier-2" / "metrics.jsonl").read_text() == "metrics 1"
    assert not (tmp_path / "model.safetensors").exists()
    assert (tmp_path / "metrics.jsonl").exists() and (
        tmp_path / "notes.txt"
    ).read_text() == "not ours"
    assert f"{tmp_path}/earlier-2" in capsys.readouterr().out


# ----------------------------------------------------------------------------------------------------------------------
# Bad input: one line that names the flag or the file and line, what was found, and what would be right


def complaint(monkeypatch, capsys, *arguments) -> str:
    """The last line that train.py with these arguments leaves on standard error; its exit status must not be 0."""
    monkeypatch.setattr(sys, "argv", ["train.py", *map(str, arguments)])
    with pytest.raises(SystemExit) as exit:
        train.main()
    assert exit.value.code != 0
    return (
        exit.value.code
        if isinstance(exit.value.code, str)
        else capsys.readouterr().err.strip().splitlines()[-1]
    )


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--learning_rate", "fast"], ["--learning_rate", "'fast'", "above 0"]),
        (["--learning_rate", "0"], ["--learning_rate", "'0'", "above 0"]),
        (["--learning_rate", "nan"], ["--learning_rate", "'nan'", "above 0"]),
        (
            ["--per_device_train_batch_size", "-1"],
            ["--per_device_train_batch_size", "'-1'", "whole number", "from 1"],
        ),
        (
            ["--gradient_accumulation_steps", "1.5"],
            ["--gradient_accumulation_steps", "'1.5'", "whole number"],
        ),
        (["--data_split", "2,4"], ["--data_split", "'2,4'", "three numbers"]),
        (["--data_split", "1,0,1"], ["--data_split", "'1,0,1'", "above 0"]),
        (["--eval_fraction", "1"], ["--eval_fraction", "'1'", "0.9"]),
        (["--seed", "-1"], ["--seed", "'-1'", "from 0"]),
        (["--lr_scheduler_type", "cosin"], ["--lr_scheduler_type", "'cosin'", "cosine"]),
        (["--model_type", "bert"], ["--model_type", "'bert'", "gpt2", "llama"]),
        (["--n_embd", "30", "--n_head", "4"], ["--n_head", "4", "--n_embd 30"]),
        (["--model_type", "llama", "--n_embd", "12", "--n_head", "4"], ["--n_head", "4", "even"]),
        (["--vocab_size", "100"], ["--vocab_size", "'100'", "from 300"]),
        (["--n_layer", "2", "--model_name_or_path", "x"], ["--n_layer", "--model_name_or_path"]),
        (["--eval_path", "x.jsonl"], ["--eval_path", "--data_path"]),
        (["--max_step", "3"], ["--max_step"]),  # no abbreviations
        # flags come before files
        (["--model_name_or_path", "/no/such", "--dropout", "2"], ["--dropout", "'2'"]),
    ],
    ids=lambda x: " ".join(x) if "--" in x[0] and len(x) < 5 and x[0].startswith("--") else "",
)
def test_bad_flags(flags, words, monkeypatch, capsys):
    line = complaint(monkeypatch, capsys, *flags)
    assert line.startswith("train.py: error:") and all(word in line for word in words), line


GOOD = '{"prompt": "p", "chosen": "a", "rejected": "b"}'


@pytest.mark.parametrize(
    "content, words",
    [
        (None, ["rows.jsonl", "no such file"]),
        ("", ["rows.jsonl", "no row"]),
        (GOOD + "\n{", ["rows.jsonl:2:", "not JSON"]),
        (GOOD.encode() + b'\n{"prompt": "\xe9', ["rows.jsonl:2:", "not UTF-8"]),
        (GOOD, ["rows.jsonl.gz:1:", "not gzip"]),
        (gzip.compress(GOOD.encode())[:-9], ["rows.jsonl.gz:1:", "cut"]),
        ('{"chosen": "a", "reject": "b"}', ["rows.jsonl:1:", "rejected", "nothing"]),
        ('{"chosen": "a", "rejected": "b"}\n[]', ["rows.jsonl:2:", "a list", "an object"]),
        (
            GOOD + '\n\n{"prompt": "p", "chosen": 1, "rejected": "b"}',
            ["rows.jsonl:3:", "chosen", "a number"],
        ),
        ('{"prompt": "p", "chosen": "a"}', ["rows.jsonl:1:", "rejected", "nothing"]),
        ('{"prompt": "p", "responses": ["a"]}', ["rows.jsonl:1:", "responses", "1", "two or more"]),
        (
            '{"prompt": "p", "chosen": "a", "rejected": "a"}\n' * 30,
            ["rows.jsonl", "30 rows", "identical"],
        ),
        (GOOD, ["--data_path", "1 comparisons", "--eval_path"]),
    ],
    ids=[
        "missing",
        "empty",
        "broken JSON",
        "not UTF-8",
        "not gzip",
        "cut gzip",
        "other field",
        "a list",
        "not text",
        "no rejected",
        "ranking of one",
        "all identical",
        "too few",
    ],
)
def test_bad_data(content, words, monkeypatch, capsys, tmp_path):
    file = (
        tmp_path / words[0].split(":")[0]
        if words[0].startswith("rows")
        else tmp_path / "rows.jsonl"
    )
    if content is not None:
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
    line = complaint(monkeypatch, capsys, "--data_path", file, "--output_dir", tmp_path / "out")
    assert line.startswith("train.py: error:") and all(word in line for word in words), line
    assert not (tmp_path / "out").exists()


def test_bad_rows_left_out_leave_some_and_a_place_for_tokens_can_be_written_to(
    monkeypatch, capsys, tmp_path
):
    (tmp_path / "rows.jsonl").write_text("3\n4\n")
    line = complaint(monkeypatch, capsys, "--data_path", tmp_path / "rows.jsonl", "--skip_bad_rows")
    assert (
        f"{tmp_path}/rows.jsonl: no row of it is a comparison" in line and "found a number" in line
    )
    for place in (tmp_path / "rows.jsonl", tmp_path / "rows.jsonl" / "below"):
        for tokenizer in ([], ["--tokenizer_path", tmp_path]):
            data.train_tokenizer(["a few words"], 290).save(tmp_path)
            line = complaint(
                monkeypatch,
                capsys,
                "--data_path",
                write_rows(tmp_path / "good.jsonl", 3),
                "--data_output_path",
                place,
                *tokenizer,
            )
            assert f"--data_output_path {place}: " in line and "a directory" in line


@pytest.mark.parametrize("flag, value", [("--lora_dim", [2]), ("--dry_run", [])])
def test_flag_of_a_missing_extra_is_said(flag, value, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "parts", None)
    monkeypatch.setitem(sys.modules, "tools", None)
    for name in ("lora", "dry_run"):
        monkeypatch.delitem(sys.modules, f"parts.{name}", raising=False)
        monkeypatch.delitem(sys.modules, f"tools.{name}", raising=False)
    assert f"{flag}: needs " in complaint(monkeypatch, capsys, flag, *value)


def test_model_directory_is_checked_before_the_data_and_both_before_a_tokenizer_is_trained(
    monkeypatch, capsys, tmp_path, built_in_run
):
    missing_data = ["--data_path", tmp_path / "missing.jsonl"]
    line = complaint(monkeypatch, capsys, "--model_name_or_path", "no/model", *missing_data)
    assert "--model_name_or_path no/model: no such directory" in line
    monkeypatch.setattr(
        data,
        "train_tokenizer",
        lambda *_: pytest.fail("trained a tokenizer before it looked at the data"),
    )
    assert "missing.jsonl" in complaint(monkeypatch, capsys, *missing_data)


def test_model_and_flags_must_fit(monkeypatch, capsys, tmp_path, built_in_run):
    output_dir, *_ = built_in_run
    line = complaint(monkeypatch, capsys, "--model_name_or_path", output_dir, "--max_seq_len", 65)
    assert "--max_seq_len" in line and "65" in line and "64 positions" in line
    large = data.train_tokenizer(
        [c.prompt for c, _ in zip(data.known_rewards(0), range(300))]
        + ["many more words than before " * 3],
        3000,
    )
    large.save(tmp_path)
    line = complaint(
        monkeypatch,
        capsys,
        "--model_name_or_path",
        HERE / "testdata" / "gpt2",
        "--tokenizer_path",
        tmp_path,
        "--max_seq_len",
        64,
    )
    assert "96 token ids" in line and str(large.text_size) in line and "--tokenizer_path" in line


def test_vocabulary_too_small_for_the_text_is_said_with_what_it_needs(
    monkeypatch, capsys, tmp_path
):
    letters = "".join(chr(0x4E00 + i) for i in range(90))
    rows = [{"prompt": letters, "chosen": f"a{i}", "rejected": f"b{i}"} for i in range(30)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    line = complaint(
        monkeypatch, capsys, "--data_path", tmp_path / "rows.jsonl", "--vocab_size", 310
    )
    assert "--vocab_size" in line and "310" in line
    needed = int(line.split("; ")[1].split()[0])
    assert (
        data.train_tokenizer((row["prompt"] + row["chosen"] for row in rows), needed).text_size
        == needed
    )


def test_training_that_diverges_stops_before_it_spoils_the_weights(tmp_path):
    """The step is not taken and not logged; what was logged before stays valid JSON."""
    done = run(
        "train.py",
        *TINY,
        "--output_dir",
        tmp_path,
        "--learning_rate",
        1e30,
        "--max_grad_norm",
        1e30,
        "--eval_iters",
        1,
    )
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert (
        "train.py: error: at step" in done.stderr.splitlines()[-1]
        and "--learning_rate" in done.stderr.splitlines()[-1]
    )
    for line in (tmp_path / "metrics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


def test_output_directory_that_cannot_be_written_to(monkeypatch, capsys, tmp_path):
    (tmp_path / "file").write_text("in the way")
    line = complaint(monkeypatch, capsys, "--output_dir", tmp_path / "file")
    assert "--output_dir" in line and str(tmp_path / "file") in line
    assert (tmp_path / "file").read_text() == "in the way"


def test_bad_input_ends_the_program_with_one_line_and_no_traceback(tmp_path):
    done = run("train.py", "--data_path", tmp_path / "no.jsonl")
    assert done.returncode == 1 and done.stdout == ""
    assert (
        done.stderr.strip()
        == f"train.py: error: {tmp_path}/no.jsonl: no such file; expected .jsonl, .jsonl.gz or .json"
    )


# ----------------------------------------------------------------------------------------------------------------------
# Nothing lost: processes that get killed, files that get cut. A run is a process forked from one that has torch imported

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["train", "torch._dynamo"])  # the optimizer imports it, in two seconds
NEEDS_LORA = pytest.mark.skipif(
    not (HERE / "parts" / "lora.py").exists(), reason="parts/ is not there"
)
SMALL = [
    *TINY,
    "--vocab_size",
    "400",
    "--max_steps",
    "12",
    "--eval_interval",
    "6",
    "--dropout",
    "0.1",
]


def one_rank(arguments, said, environment, before):
    for stream in (1, 2):
        os.dup2(os.open(said, os.O_WRONLY), stream)
    os.environ |= environment
    train.tqdm.set_lock(
        threading.RLock()
    )  # its own one would be left over where the process is killed
    sys.argv = ["train.py", *arguments]
    before()
    train.main()


def start(output_dir, *arguments, processes=1, before=int, gpu=False):
    """Start train.py with these flags -> its processes. `before` is called in each of them first."""
    arguments = [*map(str, arguments), "--output_dir", str(output_dir)]
    with socket.create_server(("localhost", 0)) as free:
        port = free.getsockname()[1]
    ranks = []
    for rank in range(processes):
        environment = {} if gpu else {"CUDA_VISIBLE_DEVICES": ""}
        if processes > 1:
            environment |= {
                "RANK": f"{rank}",
                "LOCAL_RANK": f"{rank}",
                "WORLD_SIZE": f"{processes}",
                "MASTER_ADDR": "localhost",
                "MASTER_PORT": f"{port}",
            }
        os.mkfifo(pipe := f"{output_dir}.{rank}")
        ranks.append(
            FORKS.Process(target=one_rank, args=(arguments, pipe, environment, before), name=pipe)
        )
        ranks[-1].said = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
        ranks[-1].start()
    return ranks


def end(ranks):
    """Wait for them -> the exit status of each, and what it said."""
    for process in ranks:
        process.join(120)
    said = [os.read(process.said, 2**16).decode() for process in ranks]
    for process in ranks:
        os.close(process.said)
        os.unlink(process.name)
    return [process.exitcode for process in ranks], said


def forked(output_dir, *arguments, **how):
    return end(start(output_dir, *arguments, **how))


def forked_ok(output_dir, *arguments, **how):
    codes, said = forked(output_dir, *arguments, **how)
    assert set(codes) == {0}, said
    return said[0]


def metrics_of(output_dir):
    """What was logged, but for the time that it took."""
    events = [json.loads(line) for line in (output_dir / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in event.items() if name != "seconds"} for event in events]


def same_bits(output_dir, expected):
    assert metrics_of(output_dir) == metrics_of(expected)
    assert (output_dir / "pytorch_model.bin").read_bytes() == (
        expected / "pytorch_model.bin"
    ).read_bytes()


@pytest.fixture(scope="module")
def small(files):
    return [
        *SMALL,
        "--data_path",
        files[0],
        "--eval_path",
        files[1],
        "--per_device_train_batch_size",
        12,
    ]


@pytest.fixture(scope="module")
def undisturbed(small, tmp_path_factory):
    output_dir = tmp_path_factory.mktemp("undisturbed") / "out"
    forked_ok(output_dir, *small, "--save_interval", 4, "--keep_checkpoints", 9)
    return output_dir


@pytest.mark.parametrize("loss", ["divergent", "end"])
def test_variants_of_the_loss_train_the_same_in_both_layouts_and_with_two_processes(
    loss, small, tmp_path
):
    """Pairs of different margins in micro-batches of a few; the evaluation before the first step, and so the loss, by hand."""
    rows = [
        json.dumps(json.loads(line) | {"margin": i % 3})
        for i, line in enumerate(write_rows(tmp_path / "rows.jsonl", 24).open())
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows))
    arguments = [
        *small,
        "--dropout",
        0,
        "--data_path",
        tmp_path / "rows.jsonl",
        "--eval_path",
        tmp_path / "rows.jsonl",
        "--loss",
        loss,
        "--center_rewards_coefficient",
        0.2,
        "--micro_batch_tokens",
        300,
    ]
    forked_ok(tmp_path / "packed", *arguments, "--max_steps", 4)
    forked_ok(tmp_path / "padded", *arguments, "--max_steps", 4, "--layout", "padded")
    forked_ok(
        tmp_path / "two",
        *arguments,
        "--max_steps",
        4,
        "--per_device_train_batch_size",
        6,
        processes=2,
    )
    packed, *others = (metrics_of(tmp_path / name) for name in ("packed", "padded", "two"))
    for other in others:
        for one, event in zip(packed, other, strict=True):
            assert event["loss"] == pytest.approx(one["loss"], abs=1e-4)
    tokenizer = data.load_tokenizer(tmp_path / "packed")
    torch.manual_seed(1234)
    args = train.argparse.Namespace(
        model_type="llama",
        n_layer=2,
        n_head=2,
        n_embd=32,
        max_seq_len=64,
        num_padding_at_beginning=None,
    )
    model = train.new_model(args, tokenizer)
    losses = []
    for line in rows:
        row, comparison = json.loads(line), data.parse_comparison(line.encode())
        ids, mask = data.pad_rows(data.tokenize(comparison, tokenizer, 64), tokenizer.pad_id)
        rewards = model.token_rewards(ids, mask)
        losses.append(
            rm.pairwise_loss(ids, rewards, tokenizer.pad_id, 0, mask, loss, [row["margin"]], 0.2)[
                "loss"
            ].item()
        )
    assert packed[0]["event"] == "eval" and packed[0]["loss"] == pytest.approx(
        np.mean(losses), abs=1e-5
    )


def die(rank, step, how):
    """End process `rank` as it begins this step, in its first life."""
    batches = train.global_batches

    def watched(*arguments):
        for number, batch in enumerate(batches(*arguments), start=arguments[-1] + 1):
            if (
                number == step
                and os.environ.get("RANK", "0") == str(rank)
                and os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"
            ):
                os.kill(os.getpid(), how)
            yield batch

    train.global_batches = watched


def kill_in_save(n):
    """kill -9 at the n-th operation on files and directories of the first save."""
    save, count = train.save_checkpoint, itertools.count(1)

    def hook(event, arguments):
        operation = (
            event in ("os.mkdir", "os.rename", "os.remove", "os.rmdir")
            or event == "open"
            and "checkpoints" in str(arguments[0])
        )
        if watching and operation and next(count) == n:
            os.kill(os.getpid(), signal.SIGKILL)

    def watched(*arguments):
        train.save_checkpoint = save
        watching.append(True)
        save(*arguments)
        watching.clear()

    watching, train.save_checkpoint = [], watched
    sys.addaudithook(hook)


def test_killed_at_every_operation_of_a_save(small, undisturbed, tmp_path):
    """Each process goes on from the last checkpoint, and is killed one operation later in its first save than the one before it."""
    output_dir, newest = tmp_path / "out", 0
    arguments = [*small, "--save_interval", 1, "--keep_checkpoints", 1, "--resume"]
    for killed in itertools.count():
        status, _ = forked(
            output_dir, *arguments, before=functools.partial(kill_in_save, killed + 1)
        )
        if status != [-9]:
            break
        steps = train.checkpoint_steps(output_dir / "checkpoints")
        whole, _ = train.newest_checkpoint(output_dir / "checkpoints", train.Process())
        assert whole == max(steps, default=0) >= newest
        newest = whole
    assert status == [0] and killed > 10 and 0 < newest < 12
    same_bits(output_dir, undisturbed)


def test_killed_at_any_time(small, undisturbed, tmp_path):
    """From outside, at times that are drawn at random after one more step than the time before."""
    output_dir, rng = tmp_path / "out", np.random.default_rng(0)
    for step in (1, 3, 5, 7):
        ranks = start(output_dir, *small, "--save_interval", 1, "--resume", before=slowly)
        wait_for_steps(output_dir, step, ranks[0].is_alive)
        ranks[0].join(0.1 * rng.random())
        ranks[0].kill()
        assert end(ranks)[0] == [-9]
    forked_ok(output_dir, *small, "--resume")
    same_bits(output_dir, undisturbed)


@pytest.mark.parametrize(
    "damage, words",
    [
        (
            lambda step: os.truncate(step / "__0_0.distcp", 1000),
            "__0_0.distcp is not what was written",
        ),
        (lambda step: flip(step / "__0_0.distcp", 300_000), "__0_0.distcp is not what was written"),
        (lambda step: flip(step / ".metadata", 5000), ".metadata is not what was written"),
        (lambda step: flip(step / "facts.json", 24), "facts.json is not what was written"),
        (lambda step: os.truncate(step / "facts.json", 300), "facts.json is not what was written"),
        (lambda step: (step / "facts.json").write_text("{}"), "facts.json is not what was written"),
        (lambda step: (step / "facts.json").unlink(), "facts.json is missing"),
        (lambda step: (step / "sha256.json").unlink(), "sha256.json"),
        (lambda step: (step / "sha256.json").write_text("{}"), "is not what was written"),
        (lambda step: (step / "sha256.json").write_text("[]"), "step-12"),
        (lambda step: (step / "__0_0.distcp").unlink(), "__0_0.distcp is missing"),
    ],
)
def test_damaged_checkpoint_is_skipped_for_the_one_before_it(
    damage, words, undisturbed, tmp_path, capsys
):
    checkpoints = shutil.copytree(undisturbed / "checkpoints", tmp_path / "checkpoints")
    damage(checkpoints / "step-12")
    step, facts = train.newest_checkpoint(checkpoints, train.Process())
    said = capsys.readouterr().out
    assert (
        step == facts["step"] == 8
        and said.startswith(f"{checkpoints}/step-12: skipped, as it is damaged")
        and words in said
    ), said


def flip(path, position):
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("name, every", [("facts.json", 41), ("sha256.json", 1)])
def test_every_byte_of_facts_and_of_hashes_counts(name, every, undisturbed, tmp_path, capsys):
    step = shutil.copytree(undisturbed / "checkpoints" / "step-4", tmp_path / "step-4")
    for position in range(0, (step / name).stat().st_size, every):
        flip(step / name, position)
        assert train.newest_checkpoint(tmp_path, train.Process()) == (0, {}), position
        flip(step / name, position)
    assert train.newest_checkpoint(tmp_path, train.Process())[0] == 4


def test_damaged_checkpoints_give_way_and_what_is_whole_stays(small, undisturbed, tmp_path):
    """Newer ones that are damaged do not count among those to keep. Where none is whole the run starts anew, and keeps the files."""
    output_dir = shutil.copytree(undisturbed, tmp_path / "out")
    for step in (8, 12):
        flip(output_dir / "checkpoints" / f"step-{step}" / "__0_0.distcp", 70_000)
    arguments = [*small, "--save_interval", 5, "--keep_checkpoints", 1, "--resume"]
    _, (said,) = forked(output_dir, *arguments, before=functools.partial(die, 0, 7, signal.SIGKILL))
    assert (
        all(f"step-{step}: skipped, as it is damaged" in said for step in (8, 12))
        and "going on after step 4" in said
    )
    assert train.checkpoint_steps(output_dir / "checkpoints") == [5]
    assert "going on after step 5" in forked_ok(output_dir, *arguments)
    assert train.checkpoint_steps(output_dir / "checkpoints") == [12]
    same_bits(output_dir, undisturbed)
    flip(output_dir / "checkpoints" / "step-12" / ".metadata", 70)
    said = forked_ok(output_dir, *arguments)
    assert "step-12: skipped, as it is damaged" in said and f"{output_dir}/earlier-1" in said
    assert (output_dir / "earlier-1" / "checkpoints" / "step-12").is_dir() and (
        output_dir / "earlier-1" / "pytorch_model.bin"
    ).exists()
    same_bits(output_dir, undisturbed)


def test_only_the_newest_checkpoints_are_kept_and_nothing_else(small, tmp_path):
    arguments = [*small, "--save_interval", 2, "--keep_checkpoints", 3, "--resume"]
    forked(tmp_path / "out", *arguments, before=functools.partial(die, 0, 4, signal.SIGKILL))
    (tmp_path / "out" / "checkpoints" / ".step-7.part").mkdir()
    forked_ok(tmp_path / "out", *arguments)
    assert {path.name for path in (tmp_path / "out" / "checkpoints").iterdir()} == {
        "step-8",
        "step-10",
        "step-12",
    }


def test_finished_run_ends_at_once_with_the_same_model(small, undisturbed, tmp_path):
    output_dir = shutil.copytree(undisturbed, tmp_path / "out")
    (output_dir / "pytorch_model.bin").unlink()  # killed while it was saved
    said = forked_ok(output_dir, *small, "--resume")
    assert "going on after step 12" in said and "accuracy on" in said
    same_bits(output_dir, undisturbed)


def slowly():
    divide = train.divide
    train.divide = lambda *arguments: time.sleep(0.05) or divide(*arguments)


def wait_for_steps(output_dir, n, is_alive):
    while (
        not (output_dir / "metrics.jsonl").exists()
        or (output_dir / "metrics.jsonl").read_text().count('"step", "step"') < n
    ):
        assert is_alive()
        time.sleep(0.02)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_ends_the_run_after_the_step_with_a_checkpoint(number, small, undisturbed, tmp_path):
    output_dir = tmp_path / "out"
    ranks = start(output_dir, *small, "--save_interval", 0, before=slowly)
    wait_for_steps(output_dir, 3, ranks[0].is_alive)
    os.kill(ranks[0].pid, number)
    codes, (said,) = end(ranks)
    last = metrics_of(output_dir)[-1]["step"]
    assert codes == [0] and 3 <= last < 12 and not (output_dir / "pytorch_model.bin").exists()
    assert (
        f"stopped after step {last} of 12, as asked to; the same command with --resume goes on from {output_dir}/checkpoints/step-{last}"
        in said
    )
    forked_ok(output_dir, *small, "--save_interval", 0, "--resume")
    same_bits(output_dir, undisturbed)


def test_longer_run_with_a_constant_schedule_goes_on_where_the_shorter_one_ended(
    small, tmp_path, monkeypatch, capsys
):
    constant = ["--lr_scheduler_type", "constant", "--save_interval", 6]
    forked_ok(tmp_path / "one", *small, *constant, "--max_steps", 7)
    forked_ok(tmp_path / "one", *small, *constant, "--resume", "--max_steps", 12)
    forked_ok(tmp_path / "other", *small, *constant)
    weights = [
        torch.load(tmp_path / name / "pytorch_model.bin", weights_only=True)
        for name in ("one", "other")
    ]
    assert all(torch.equal(weight, weights[1][name]) for name, weight in weights[0].items())
    line = complaint(
        monkeypatch,
        capsys,
        *small,
        *constant,
        "--resume",
        "--max_steps",
        11,
        "--output_dir",
        tmp_path / "one",
    )
    assert "--max_steps: found 11" in line and "at least 12" in line


@pytest.mark.parametrize(
    "other, words",
    [
        (["--seed", "5"], "--seed was 1234 and is 5"),
        (["--learning_rate", "2e-3"], "--learning_rate was 0.001 and is 0.002"),
        (["--weight_decay", "0.1"], "--weight_decay"),
        (["--max_grad_norm", "2"], "--max_grad_norm"),
        (["--lr_scheduler_type", "linear"], "--lr_scheduler_type was 'cosine' and is 'linear'"),
        (["--num_warmup_steps", "2"], "--num_warmup_steps"),
        (["--max_steps", "13"], "--max_steps"),
        (["--truncation_side", "right"], "--truncation_side"),
        (["--max_seq_len", "63"], "--max_seq_len"),
        (["--dropout", "0.2"], "--dropout"),
        (["--dtype", "bf16"], "--dtype"),
        (["--loss", "end"], "--loss was 'divergent' and is 'end'"),
        (
            ["--center_rewards_coefficient", "0.1"],
            "--center_rewards_coefficient was 0.0 and is 0.1",
        ),
        pytest.param(["--lora_dim", "2"], "--lora_dim", marks=NEEDS_LORA),
        (["--layout", "padded"], "--layout was 'packed'"),
        (["--n_layer", "1"], "--n_layer"),
        (["--num_padding_at_beginning", "1"], "--num_padding_at_beginning"),
        (["--vocab_size", "390"], "--vocab_size"),
        (["--data_split", "1,1,0"], "--data_split"),
        (["--per_device_train_batch_size", "6"], "--per_device_train_batch_size"),
        (["--gradient_accumulation_steps", "2"], "--gradient_accumulation_steps"),
        (["--gradient_accumulation_steps", "2", "--seed", "5"], "--seed was"),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, list) else "",
)
def test_flags_that_change_the_result_are_refused_by_name(
    other, words, small, undisturbed, monkeypatch, capsys
):
    before = (undisturbed / "metrics.jsonl").read_bytes()
    line = complaint(monkeypatch, capsys, *small, *other, "--resume", "--output_dir", undisturbed)
    assert (
        f"{undisturbed}/checkpoints/step-12" in line
        and all(word in line for word in (words, other[0]))
        and len(line) < 700
    ), line
    assert (undisturbed / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize("model_type", train.FAMILIES)
def test_same_flags_are_not_refused_and_neither_is_the_same_batch_made_up_otherwise(
    model_type, small, tmp_path
):
    small = [*small, "--model_type", model_type, "--max_steps", 4]
    forked_ok(tmp_path / "whole", *small)
    forked_ok(tmp_path / "out", *small, "--save_interval", 2)
    shutil.rmtree(tmp_path / "out" / "checkpoints" / "step-4")
    forked_ok(
        tmp_path / "out",
        *small,
        "--per_device_train_batch_size",
        4,
        "--gradient_accumulation_steps",
        3,
        "--resume",
        "--micro_batch_tokens",
        10**6,
    )
    same_bits(tmp_path / "out", tmp_path / "whole")


# ----------------------------------------------------------------------------------------------------------------------
# Nothing lost, with two processes


@pytest.fixture(scope="module")
def two(small, tmp_path_factory):
    """A run on two processes -> its directory, and its flags."""
    output_dir = tmp_path_factory.mktemp("two") / "out"
    arguments = [
        *small,
        "--per_device_train_batch_size",
        3,
        "--gradient_accumulation_steps",
        2,
        "--micro_batch_tokens",
        300,
        "--save_interval",
        4,
        "--process_timeout",
        20,
    ]
    forked_ok(output_dir, *arguments, processes=2)
    return output_dir, arguments


@pytest.mark.parametrize("rank", [0, 1])
def test_killed_rank_ends_the_others_with_a_line_and_nothing_is_lost(rank, two, tmp_path):
    output_dir = tmp_path / "out"
    codes, said = forked(
        output_dir, *two[1], processes=2, before=functools.partial(die, rank, 6, signal.SIGKILL)
    )
    assert codes[rank] == -9 and codes[1 - rank] == 1, said
    last = said[1 - rank].strip().splitlines()[-1]
    assert (
        last.startswith(f"train.py: error: rank {1 - rank} waited in vain for another process")
        and "--resume" in last
    ), said
    assert "Traceback" not in said[1 - rank]
    forked_ok(output_dir, *two[1], "--resume", processes=2)
    same_bits(output_dir, two[0])


def test_rank_that_does_not_answer_ends_the_others_after_the_time_out(two, tmp_path):
    output_dir = tmp_path / "out"
    ranks = start(
        output_dir,
        *two[1],
        "--process_timeout",
        2,
        processes=2,
        before=functools.partial(die, 1, 4, signal.SIGSTOP),
    )
    ranks[0].join(20)
    for process in ranks:
        process.kill()
    codes, said = end(ranks)
    assert codes == [1, -9] and "waited in vain" in said[0].strip().splitlines()[-1], said


def test_signal_to_one_rank_stops_both(two, tmp_path):
    output_dir = tmp_path / "out"
    codes, said = forked(
        output_dir, *two[1], processes=2, before=functools.partial(die, 1, 3, signal.SIGTERM)
    )
    assert codes == [0, 0] and "stopped after step 3 of 12" in said[0] and "stopped" not in said[1]
    forked_ok(output_dir, *two[1], "--resume", processes=2)
    same_bits(output_dir, two[0])


def test_killed_in_a_save_with_two_processes(two, tmp_path):
    """One of them dies after a shard is written and before the checkpoint has its name."""
    output_dir = tmp_path / "out"
    for rank, operation in ((1, 1), (0, 8)):
        codes, said = forked(
            output_dir,
            *two[1],
            "--resume",
            processes=2,
            before=functools.partial(kill_rank_in_save, rank, operation),
        )
        assert (
            codes[rank] == -9
            and codes[1 - rank] == 1
            and "waited in vain" in said[1 - rank].strip().splitlines()[-1]
        ), said
    forked_ok(output_dir, *two[1], "--resume", processes=2)
    same_bits(output_dir, two[0])


def kill_rank_in_save(rank, n):
    if os.environ["RANK"] == str(rank):
        kill_in_save(n)


def test_another_number_of_processes_goes_on_at_the_same_place(small, tmp_path):
    """On two, then on one, then on two, without dropout: the curve of one process."""
    arguments = [*small, "--dropout", 0, "--save_interval", 4]
    forked_ok(tmp_path / "one", *arguments)
    halves = [*arguments, "--per_device_train_batch_size", 6]
    stop = lambda step: functools.partial(die, 0, step, signal.SIGTERM)
    forked_ok(tmp_path / "out", *halves, processes=2, before=stop(5))
    said = forked_ok(tmp_path / "out", *arguments, "--resume", before=stop(7))
    assert "going on after step 5" in said
    forked_ok(tmp_path / "out", *halves, "--resume", "--zero_stage", 3, processes=2)
    same_run(by_kind(tmp_path / "one"), by_kind(tmp_path / "out"))
    codes, said = forked(tmp_path / "out", *arguments, "--resume", processes=2)
    assert 0 not in codes and "--per_device_train_batch_size" in said[0].strip().splitlines()[-1]


def by_kind(output_dir):
    return {
        kind: [event for event in metrics_of(output_dir) if event["event"] == kind]
        for kind in ("step", "eval")
    }


# ----------------------------------------------------------------------------------------------------------------------
# Numbers that are not finite


@pytest.fixture(scope="module")
def with_nan(built_in_run, tmp_path_factory):
    """A model whose embedding of one token is NaN, and data in which one row, 17, has that token -> the flags for them."""
    folder = tmp_path_factory.mktemp("with_nan")
    path = shutil.copytree(
        built_in_run[0], folder / "model", ignore=shutil.ignore_patterns("checkpoints")
    )
    rows = [
        json.loads(line) for line in write_rows(folder / "rows.jsonl", 40).read_text().splitlines()
    ]
    tokenizer = data.load_tokenizer(path)
    rows[16]["rejected"] += " Quite."
    used = [set(tokenizer.encode("".join(row.values()))) for row in rows]
    token = min(used[16] - set().union(*used[:16], *used[17:]))
    weights = torch.load(path / "pytorch_model.bin", weights_only=True)
    weights["rwtransformer.embed_tokens.weight"][token] = math.nan
    torch.save(weights, path / "pytorch_model.bin")
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [
        "--model_name_or_path",
        path,
        "--max_seq_len",
        64,
        "--data_path",
        folder / "rows.jsonl",
        "--eval_path",
        write_rows(folder / "eval.jsonl", 4, seed=9),
        "--save_interval",
        1,
    ]


@pytest.mark.parametrize(
    "processes, layout, stage",
    [(1, "packed", 0), (1, "padded", 0), (2, "packed", 0), (2, "padded", 3)],
)
def test_loss_that_is_not_finite_is_said_with_step_rank_and_row(
    processes, layout, stage, with_nan, tmp_path, monkeypatch
):
    """Row 17 alone, though in a packed micro-batch it spoils others; weights and checkpoints are those of the step before."""
    arguments = [
        *with_nan,
        "--layout",
        layout,
        "--per_device_train_batch_size",
        8 // processes,
        "--zero_stage",
        stage,
    ]
    codes, said = forked(tmp_path / "out", *arguments, processes=processes)
    assert codes == [1] * processes, said
    monkeypatch.setattr(sys, "argv", ["train.py", *map(str, arguments)])
    args = train.parse_flags()
    _, tokenizer, dataset, _ = train.prepare(args, train.Process())
    batches = enumerate(train.global_batches(dataset, args, tokenizer, 8, 0), start=1)
    step, i, batch = next(
        (step, i, batch)
        for step, batch in batches
        for i in range(8)
        if batch[i].where.endswith(":17")
    )
    rank = next(
        rank
        for rank in range(processes)
        if i in sum(train.divide(batch, 10**6, args, train.Process(rank, processes)), [])
    )
    for line in (text.strip().splitlines()[-1] for text in said):
        assert (
            f"train.py: error: at step {step} the loss is nan (rank {rank}: {with_nan[5]}:17); "
            in line
        )
        assert f"The last checkpoint is {tmp_path}/out/checkpoints/step-{step - 1}." in line
    assert (
        train.newest_checkpoint(tmp_path / "out" / "checkpoints", train.Process())[0]
        == step - 1
        > 0
    )
    assert metrics_of(tmp_path / "out")[-1]["step"] == step - 1


def test_gradient_norm_that_is_not_finite_stops_the_run(small, tmp_path):
    codes, (said,) = forked(
        tmp_path / "out", *small, "--save_interval", 1, before=functools.partial(overflow, 3, 12)
    )
    last = said.strip().splitlines()[-1]
    assert (
        codes == [1]
        and "at step 3 the gradient norm is inf, that of a finite loss (rows: " in last
        and "/step-2." in last
    ), said


def overflow(first, last, rank=0):
    """From step `first` to `last` one gradient is infinite before it is unscaled; with sharded weights that is on one rank alone."""
    unscale, update, steps, before = (
        torch.amp.GradScaler.unscale_,
        torch.amp.GradScaler.update,
        itertools.count(1),
        [],
    )
    local = lambda tensor: tensor.to_local() if hasattr(tensor, "to_local") else tensor

    def watched(self, optimizer):
        if first <= next(steps) <= last:
            parameters = optimizer.param_groups[0]["params"]
            before[:] = [
                (local(parameter.detach()), local(parameter.detach()).clone())
                for parameter in parameters
            ]
            if os.environ.get("RANK", "0") == str(rank):
                local(parameters[0].grad)[-1, -1] = math.inf
        unscale(self, optimizer)

    def updated(self):
        update(self)
        if before:
            print(f"kept: {all(torch.equal(now, then) for now, then in before)}", flush=True)
        before.clear()

    torch.amp.GradScaler.unscale_, torch.amp.GradScaler.update = watched, updated


@pytest.mark.parametrize("processes, stage", [(1, 0), (2, 3)])
def test_fp16_leaves_a_step_out_on_all_ranks_and_counts_it(processes, stage, small, tmp_path):
    arguments = [
        *small,
        "--per_device_train_batch_size",
        12 // processes,
        "--dtype",
        "fp16",
        "--zero_stage",
        stage,
    ]
    codes, said = forked(
        tmp_path / "out",
        *arguments,
        processes=processes,
        before=functools.partial(overflow, 3, 4, rank=processes - 1),
    )
    assert codes == [0] * processes, said
    assert all(text.count("kept: True") == 2 and "kept: False" not in text for text in said)
    steps = by_kind(tmp_path / "out")["step"]
    assert [event["step"] for event in steps if event["grad_norm"] is None] == [3, 4] and len(
        steps
    ) == 12
    assert "2 steps were left out" in said[0]
    facts = train.newest_checkpoint(tmp_path / "out" / "checkpoints", train.Process())[1]
    assert (
        facts["scaler"]["scale"] == 65536 / 4
        and facts["scaler"]["_growth_tracker"] == 8
        and facts["skipped"] == [2, 0]
    )
    weights = torch.load(tmp_path / "out" / "pytorch_model.bin", weights_only=True)
    assert all(weight.isfinite().all() for weight in weights.values())


def test_fp16_goes_on_with_its_scale_where_no_step_was_taken_yet(small, tmp_path):
    arguments = [*small, "--dtype", "fp16"]
    forked_ok(tmp_path / "whole", *arguments, before=functools.partial(overflow, 1, 3))
    forked_ok(tmp_path / "out", *arguments, before=overflow_and_stop)
    said = forked_ok(
        tmp_path / "out", *arguments, "--resume", before=functools.partial(overflow, 1, 1)
    )
    assert "3 steps were left out" in said
    same_bits(tmp_path / "out", tmp_path / "whole")
    one, other = (
        train.newest_checkpoint(tmp_path / name / "checkpoints", train.Process())[1]
        for name in ("out", "whole")
    )
    assert (
        one["scaler"] == other["scaler"]
        and one["scaler"]["scale"] == 65536 / 8
        and one["skipped"] == other["skipped"] == [3, 0]
    )


def overflow_and_stop():
    overflow(1, 2)
    die(0, 2, signal.SIGTERM)


def test_fp16_stops_after_a_long_streak(small, tmp_path):
    codes, (said,) = forked(
        tmp_path / "out", *small, "--dtype", "fp16", "--save_interval", 3, before=long_streak
    )
    last = said.strip().splitlines()[-1]
    assert (
        codes == [1]
        and "at step 9 the gradient norm is inf" in last
        and "after 4 that were not finite either" in last
    ), said
    assert "/checkpoints/step-6." in last


def long_streak():
    train.LONGEST_STREAK = 5
    overflow(5, 12)


# ----------------------------------------------------------------------------------------------------------------------
# A disk that is full


def limit_in_step(step, size):
    """From this step on no file can be written beyond `size` bytes."""
    batches = train.global_batches

    def watched(*arguments):
        for number, batch in enumerate(batches(*arguments), start=1):
            if number == step:
                resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
            yield batch

    train.global_batches = watched


def limit_in_the_end():
    finish = train.finish
    train.finish = lambda *arguments: (
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000)) or finish(*arguments)
    )


@pytest.mark.parametrize(
    "before, last",
    [
        (functools.partial(limit_in_step, 6, 300_000), 4),
        (functools.partial(limit_in_step, 6, 10), 4),
        (limit_in_the_end, 12),
    ],
    ids=["a checkpoint", "metrics.jsonl", "the model"],
)
def test_full_disk_is_said_and_the_last_checkpoint_stays(
    before, last, small, undisturbed, tmp_path
):
    output_dir = tmp_path / "out"
    codes, (said,) = forked(output_dir, *small, "--save_interval", 4, before=before)
    line = said.strip().splitlines()[-1]
    assert codes == [1] and "Traceback" not in said, said
    assert (
        line.startswith(f"train.py: error: --output_dir {output_dir}: cannot be written to (")
        and f"{output_dir}/checkpoints/step-{last}" in line
    )
    forked_ok(output_dir, *small, "--save_interval", 4, "--resume")
    same_bits(output_dir, undisturbed)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_disk_without_room_is_seen_at_the_start_and_what_is_there_counts(
    small, undisturbed, tmp_path, monkeypatch, capsys
):
    output_dir = shutil.copytree(undisturbed, tmp_path / "out")
    usage = lambda free: monkeypatch.setattr(
        shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9 - free, free)
    )
    usage(500_000)
    line = complaint(monkeypatch, capsys, *small, "--output_dir", tmp_path / "new")
    assert (
        f"--output_dir {tmp_path}/new" in line
        and "--keep_checkpoints" in line
        and not list((tmp_path / "new").iterdir())
    )
    small = [
        "train.py",
        *map(str, small),
        "--output_dir",
        str(output_dir),
        "--resume",
        "--keep_checkpoints",
        "2",
    ]
    monkeypatch.setattr(sys, "argv", small)
    train.main()  # finished, with three checkpoints
    assert "accuracy on" in capsys.readouterr().out


# ----------------------------------------------------------------------------------------------------------------------
# torchrun


def test_torchrun_starts_again_after_a_killed_rank_and_passes_signals_on(two, tmp_path):
    """Rank 1 is killed in step 6; all start again from step 4 by themselves. Then torchrun gets SIGTERM; a resume finishes the run."""
    script, output_dir = tmp_path / "script.py", tmp_path / "out"
    script.write_text(
        f"import sys\nsys.path.insert(0, {str(HERE)!r})\nimport signal, test_train, train\n"
        "test_train.slowly()\ntest_train.die(1, 6, signal.SIGKILL)\ntrain.main()\n"
    )
    launcher = [
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node=2",
        "--max-restarts=1",
        script,
    ]
    arguments = [sys.executable, *launcher, *two[1], "--output_dir", output_dir]
    torchrun = subprocess.Popen(
        list(map(str, arguments)), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    wait_for_steps(output_dir, 8, lambda: torchrun.poll() is None)
    torchrun.terminate()
    said, _ = torchrun.communicate(timeout=60)
    step = metrics_of(output_dir)[-1]["step"]
    assert (
        "rank 0 waited in vain" in said
        and "going on after step 4" in said
        and f"stopped after step {step} of 12" in said
    ), said
    forked_ok(output_dir, *two[1], "--resume", processes=2)
    same_bits(output_dir, two[0])


# ----------------------------------------------------------------------------------------------------------------------
# Scale


@pytest.fixture(scope="module")
def stage_0(small, tmp_path_factory):
    """One process without dropout -> its directory, and its flags for two."""
    output_dir, arguments = tmp_path_factory.mktemp("stage_0") / "out", [*small, "--dropout", 0]
    forked_ok(output_dir, *arguments)
    return output_dir, [
        *arguments,
        "--per_device_train_batch_size",
        6,
        "--micro_batch_tokens",
        300,
        "--save_interval",
        4,
    ]


def same_model(output_dir, expected, atol=1e-4):
    weights = [
        torch.load(path / "pytorch_model.bin", weights_only=True) for path in (output_dir, expected)
    ]
    assert weights[0].keys() == weights[1].keys()
    for name, weight in weights[0].items():
        assert type(weight) is torch.Tensor and (weight - weights[1][name]).abs().mean() < atol, (
            name
        )
    assert (output_dir / "config.json").read_bytes() == (expected / "config.json").read_bytes()


@pytest.mark.parametrize(
    "arguments",
    [
        ["--zero_stage", 2],
        ["--zero_stage", 3, "--gradient_checkpointing"],
        ["--zero_stage", 3, "--offload", "--layout", "padded"],
    ],
    ids=lambda x: " ".join(map(str, x)),
)
def test_sharded_weights_give_the_curve_and_the_model_of_one_process(arguments, stage_0, tmp_path):
    forked_ok(tmp_path / "out", *stage_0[1], *arguments, processes=2)
    same_run(by_kind(stage_0[0]), by_kind(tmp_path / "out"))
    same_model(tmp_path / "out", stage_0[0])


def in_float64():
    new_model = train.new_model
    train.new_model = lambda *arguments: new_model(*arguments).double()


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_in_float64_two_processes_give_the_curve_of_one_to_rounding(stage, stage_0, tmp_path):
    forked_ok(tmp_path / "one", *stage_0[1], "--per_device_train_batch_size", 12, before=in_float64)
    forked_ok(tmp_path / "two", *stage_0[1], "--zero_stage", stage, processes=2, before=in_float64)
    one, two = (by_kind(tmp_path / name) for name in ("one", "two"))
    for kind in ("step", "eval"):
        assert [event["loss"] for event in two[kind]] == pytest.approx(
            [event["loss"] for event in one[kind]], abs=1e-12
        )
    assert (
        torch.load(tmp_path / "two" / "pytorch_model.bin", weights_only=True)["v_head.weight"].dtype
        == torch.float64
    )


def test_sharded_run_goes_on_to_the_bit_with_dropout(two, tmp_path):
    arguments = [*two[1], "--zero_stage", 3, "--gradient_checkpointing"]
    forked_ok(tmp_path / "whole", *arguments, processes=2)
    codes, said = forked(
        tmp_path / "out",
        *arguments,
        processes=2,
        before=functools.partial(die, 0, 6, signal.SIGKILL),
    )
    assert codes == [-9, 1] and "waited in vain" in said[1]
    forked_ok(tmp_path / "out", *arguments, "--resume", processes=2)
    same_bits(tmp_path / "out", tmp_path / "whole")


@NEEDS_LORA
@pytest.mark.parametrize("only", [[], ["--only_optimize_lora"]])
def test_lora_saves_a_plain_model_sharded_or_not(only, stage_0, tmp_path):
    """And a run with it goes on: on one process, then on two at stage 3."""
    lora = [*stage_0[1], "--lora_dim", 3, "--lora_learning_rate", 1e-2, *only]
    forked_ok(tmp_path / "one", *lora, "--per_device_train_batch_size", 12)
    forked_ok(
        tmp_path / "two",
        *lora,
        "--per_device_train_batch_size",
        12,
        before=functools.partial(die, 0, 5, signal.SIGTERM),
    )
    forked_ok(tmp_path / "two", *lora, "--zero_stage", 3, "--resume", processes=2)
    same_run(by_kind(tmp_path / "one"), by_kind(tmp_path / "two"))
    same_model(tmp_path / "two", tmp_path / "one")
    assert by_kind(tmp_path / "one")["eval"][-1]["loss"] != by_kind(stage_0[0])["eval"][-1]["loss"]
    assert not any(
        "lora" in name
        for name, _ in rm.RewardModel.from_pretrained(tmp_path / "two").named_parameters()
    )


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_half_precision_gives_nearly_the_curve(dtype, stage_0, tmp_path):
    forked_ok(tmp_path / "out", *stage_0[1], "--dtype", dtype, "--zero_stage", 3, processes=2)
    curves = [
        [event["loss"] for event in by_kind(path)["step"]]
        for path in (stage_0[0], tmp_path / "out")
    ]
    assert 1e-5 < max(abs(a - b) for a, b in zip(*curves)) < 5e-3


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["--zero_stage", 3, "--dtype", "bf16"],
        ["--zero_stage", 2, "--offload", "--dtype", "fp16"],
    ],
    ids=lambda x: " ".join(map(str, x)),
)
def test_on_a_gpu_a_killed_run_goes_on_with_the_same_curve(arguments, small, tmp_path):
    arguments = [*small, "--save_interval", 4, *arguments]
    forked_ok(tmp_path / "whole", *arguments, gpu=True)
    assert forked(
        tmp_path / "out", *arguments, gpu=True, before=functools.partial(die, 0, 7, signal.SIGKILL)
    )[0] == [-9]
    forked_ok(tmp_path / "out", *arguments, "--resume", gpu=True)
    same_run(by_kind(tmp_path / "whole"), by_kind(tmp_path / "out"))
