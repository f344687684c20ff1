"""The loop and what it is made of: schedules, batches, evaluation, whole runs, bad input.

Flags, processes, the run's directory and numbers that are not finite have tests in parts/.
"""

import gzip
import itertools
import json
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest
import torch
import transformers

import data
import rm
import train
from conftest import (
    HERE,
    LIMIT,
    TINY,
    complaint,
    events_of,
    forked,
    forked_ok,
    metrics_of,
    parsed,
    read_rows,
    run,
    same_bits,
    same_run,
    words,
    write_rows,
)
from model import GPT, GPTConfig
from parts.chat import chat_text, given_template
from parts.distributed import Process, cut_into_micro_batches, size_of
from parts.flags import SCHEDULES
from parts.test_huggingface import save_backbone
from parts.test_tokenizers import FAILING, FAST, byte_level, failing_tokenizer, hub_files
from tools import score


def tiny_model(model_type="gpt2", vocab_size=9, **fields):
    """Make a reward model of one layer, 8 wide, with the pad id 0."""
    config = GPTConfig(model_type, vocab_size=vocab_size, n_layer=1, n_embd=8, n_head=2, **fields)
    return rm.RewardModel(GPT(config), 0)


# --------------------------------------------------------------------------------------------------
# Steps


@pytest.mark.parametrize("warmup", [0, 3])
@pytest.mark.parametrize("kind", SCHEDULES)
def test_schedules_are_those_of_transformers(kind, warmup):
    from transformers import get_scheduler

    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=2e-3)
    theirs = get_scheduler(kind, optimizer, num_warmup_steps=warmup, num_training_steps=10)
    for step in range(10):
        expected = pytest.approx(theirs.get_last_lr()[0], rel=1e-9, abs=1e-15)
        assert train.learning_rate(kind, 2e-3, step, warmup, 10) == expected
        optimizer.step()
        theirs.step()


def test_sampler_is_a_function_of_seed_and_step_and_shows_everything_once_an_epoch():
    epochs = []
    for epoch in range(2):
        steps = range(3 * epoch, 3 * epoch + 3)
        epochs.append([train.batch_indices(10, 4, seed=5, step=step) for step in steps])
    assert [len(batch) for batch in epochs[0]] == [4, 4, 2]
    assert all(sorted(np.concatenate(batches)) == list(range(10)) for batches in epochs)
    assert not np.array_equal(np.concatenate(epochs[0]), np.concatenate(epochs[1]))
    assert not np.array_equal(epochs[0][0], train.batch_indices(10, 4, seed=6, step=0))
    assert np.array_equal(epochs[1][1], train.batch_indices(10, 4, seed=5, step=4))


def test_stream_of_built_in_data_resumes_after_the_steps_done():
    whole = train.batches_after(0, iter(range(100)), 7, seed=5)
    later = train.batches_after(3, iter(range(100)), 7, seed=5)
    assert list(itertools.islice(whole, 3, 6)) == list(itertools.islice(later, 3))


def test_collate_puts_chosen_rows_before_rejected_rows():
    comparisons = [
        data.Tokenized([[1, 2], [3]], margin=0.5),
        data.Tokenized([[4], [5, 6, 7], [8]]),
        data.Tokenized([[1], [2]], target=0.25),
    ]
    model, cpu = tiny_model(n_positions=4), torch.device("cpu")
    (ids, mask, margins, targets), tokens = train.collate(comparisons, model, "padded", cpu)
    chosen = [[1, 2, 0], [4, 0, 0], [4, 0, 0], [5, 6, 7], [1, 0, 0]]
    rejected = [[3, 0, 0], [5, 6, 7], [8, 0, 0], [8, 0, 0], [2, 0, 0]]
    assert ids.tolist() == chosen + rejected
    assert mask.tolist() == (ids != 0).long().tolist()
    assert tokens == 30
    assert list(margins) == [0.5, 0.0, 0.0, 0.0, 0.0]
    assert list(targets) == [1.0, 1.0, 1.0, 1.0, 0.25]
    (batch,), tokens = train.collate(comparisons, model, "packed", cpu)
    assert batch.num_tokens == tokens == 15
    assert list(batch.margins) == [0.5, 0.0, 0.0]
    assert list(batch.targets) == [1.0, 1.0, 0.25]
    model.backbone.config.position_offset = 2  # as in OPT, where a tail is computed once
    assert train.collate(comparisons, model, "packed", cpu)[1] == 13


@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_target_of_a_comparison_is_in_its_loss(layout):
    """In `loss_alone`, which names rows of a loss that is not finite; by hand from the scores."""
    torch.manual_seed(0)
    model = tiny_model(n_positions=4)
    torch.nn.init.normal_(model.v_head.weight, std=3)
    loss_of = lambda *tokenized: train.loss_alone(
        model, layout, "fp32", torch.device("cpu"), list(tokenized)
    )
    # They differ in the last token alone, so the loss is that of the scores.
    texts = [[1, 2, 3], [1, 2, 4]]
    out = model(torch.tensor(texts), torch.ones(2, 3))
    difference = (out["chosen_mean_scores"] - out["rejected_mean_scores"]).item()
    assert 0.1 < abs(difference) < 10
    q = 1 / (1 + math.exp(-difference))
    losses = [-p * math.log(q) - (1 - p) * math.log(1 - q) for p in (0.0, 0.3, 0.5)]
    tokenized = [data.Tokenized(texts, target=p) for p in (0.0, 0.3, 0.5)]
    assert [loss_of(one) for one in tokenized] == pytest.approx(losses, abs=1e-5)
    assert loss_of(*tokenized) == pytest.approx(np.mean(losses), abs=1e-5)
    with pytest.raises(ValueError, match="targets: found nan for pair 1; expected a number from 0"):
        loss_of(tokenized[0], data.Tokenized(texts, target=math.nan))
    with pytest.raises(ValueError, match="targets: found 0.5 for comparison 1, a ranking of 3"):
        loss_of(tokenized[0], data.Tokenized([*texts, [1, 2, 5]], target=0.5))


def test_weight_decay_is_on_matrices_only():
    model = tiny_model(n_positions=4)
    optimizer = train.make_optimizer(model, 1e-3, 0.1, 5e-4, Process())
    decayed, kept = optimizer.param_groups
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert (decayed["weight_decay"], kept["weight_decay"]) == (0.1, 0.0)
    for parameter in kept["params"]:
        name = names[id(parameter)]
        assert "norm" in name or name.endswith("bias")
    assert len(decayed["params"]) + len(kept["params"]) == len(names)
    assert "v_head.weight" in {names[id(parameter)] for parameter in decayed["params"]}


# --------------------------------------------------------------------------------------------------
# Evaluation


class Log:
    """A run's directory that keeps the last event."""

    def log(self, **event):
        self.event = event


def test_numbers_behind_an_evaluation_are_of_pairs_and_of_responses(monkeypatch):
    args = parsed(monkeypatch)
    torch.manual_seed(0)
    model = tiny_model(vocab_size=300, n_positions=9)
    comparisons = [
        data.Comparison("a", ["b", "c"], [2.0, 1.0]),
        data.Comparison("a", ["c", "bb", "ccc"], [3.0, 0.5, 1.0]),
    ]
    dataset = data.tokenize_all(comparisons, data.train_tokenizer(["a", "ab", "ac"], 300), 9)
    log = Log()
    numbers = train.evaluate(model, dataset, args, Process(), 0, log)
    scores = []
    for i in range(2):
        rows = [torch.tensor([text]) for text in dataset[i].sequences]
        values = [model.eval().forward_value(row, return_value_only=True) for row in rows]
        scores.append([value[0, -1].item() for value in values])
    (b, c), (_, bb, ccc) = scores
    assert numbers["chosen"] == pytest.approx([b, c, c, bb])
    assert numbers["rejected"] == pytest.approx([c, bb, ccc, ccc])
    assert numbers["true_margin"] == [1.0, 2.5, 2.0, -0.5]
    assert numbers["scores"] == pytest.approx([b, c, c, bb, ccc])
    assert numbers["rewards"] == [2.0, 1.0, 3.0, 0.5, 1.0]
    assert log.event["pairs"] == 4


@pytest.mark.parametrize("world_size", [1, 2])
def test_bar_of_an_evaluation_moves_with_every_micro_batch(world_size, monkeypatch):
    """It ends at the number of comparisons, also where other ranks evaluate a part of them."""

    class Watched(Process):
        def bar(self, steps, total, **options):
            self.moved, self.bar_of = [], super().bar(steps, total=total, **options)
            monkeypatch.setattr(self.bar_of, "update", self.update)
            return self.bar_of

        def update(self, count):
            self.moved.append(count)
            self.bar_of.n += count

        def join(self, *values):  # of this rank alone
            return list(values)

    args = parsed(monkeypatch, "--per_device_eval_batch_size 1")
    torch.manual_seed(0)
    model = tiny_model(vocab_size=300, n_positions=64)
    tokenizer = data.train_tokenizer(["a", "ab", "ac"], 300)
    comparisons = [data.Comparison("a" * 20, ["b" * (i % 9 + 1), "c"]) for i in range(150)]
    dataset = data.tokenize_all(comparisons, tokenizer, 64)
    process = Watched(0, world_size)
    numbers = train.evaluate(model, dataset, args, process, 0)
    assert sum(process.moved) == process.bar_of.total == 150
    assert len(numbers["chosen"]) == pytest.approx(150 / world_size, abs=2)
    budget = 2 * 64  # tokens, of which these comparisons have 22 to 44
    assert len(process.moved) > 150 * 22 / budget / world_size
    assert 0 < max(process.moved) <= world_size * math.ceil(budget / 22)


def test_evaluation_leaves_the_model_in_training_mode(monkeypatch):
    args = parsed(monkeypatch, "--dropout 0.5")
    model = tiny_model(vocab_size=300, n_positions=4, dropout=0.5)
    tokenizer = data.train_tokenizer(["a", "ab", "ac"], 300)
    dataset = data.tokenize_all([data.Comparison("a", ["b", "c"])], tokenizer, 4)
    found = []
    for _ in range(2):
        log = Log()
        numbers = train.evaluate(model, dataset, args, Process(), 0, log)
        found.append((numbers, log.event))
    assert found[0] == found[1]  # no dropout in an evaluation
    assert model.training


# --------------------------------------------------------------------------------------------------
# Preparation


def test_held_out_data_is_the_end_of_the_shuffled_second_share(monkeypatch, tmp_path):
    """Two files are split 1:2:1 as DeepSpeed-Chat splits them. No row is in both parts."""
    paths = [write_rows(tmp_path / "a.jsonl", 40), write_rows(tmp_path / "b.jsonl", 60, seed=1)]
    for path in paths:
        rows = read_rows(path)
        rows[5]["rejected"] = rows[5]["chosen"]  # is dropped, but counts as a row of the split
        for i, row in enumerate(rows):
            row["prompt"] = f"{path.stem}{i} "
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    args = parsed(
        monkeypatch,
        *["--data_path", *paths],
        "--data_split 1,2,1 --eval_fraction 0.2 --seed 3 --max_seq_len 512",
    )
    tokenizer = data.train_tokenizer(["a 0123456789 b"], 400)
    prompts = []
    for part in train.load_data(args, tokenizer, Process()):
        texts = [tokenizer.decode(part[i].sequences[0]) for i in range(len(part))]
        prompts.append([text.split()[0] for text in texts])
    training, held_out = prompts
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
    monkeypatch, tmp_path, built_in_run, capsys
):
    backbone = shutil.copytree(built_in_run[0], tmp_path / "backbone")
    weights = torch.load(backbone / "pytorch_model.bin", weights_only=True)
    del weights["v_head.weight"]
    torch.save(weights, backbone / "pytorch_model.bin")
    rows = write_rows(tmp_path / "rows.jsonl", 30)
    given = ["--model_name_or_path", backbone, "--data_path", rows, "--max_seq_len 64"]
    heads = []
    for seed in (1, 1, 2):
        arguments = words([*given, "--dropout 0.25 --seed", seed])
        monkeypatch.setattr(sys, "argv", ["train.py", *arguments])
        args = train.parse_flags(list(train.FAMILIES), train.LOSSES)
        model, *_ = train.prepare(args, Process())
        found = {block.config.dropout for block in model.backbone.blocks}
        assert found == {0.25}  # the flag's, not the checkpoint's
        heads.append(model.v_head.weight)
        said = "no value head there (v_head.weight or score.weight), so a fresh one"
        assert f"{backbone}: {said}" in capsys.readouterr().out
    assert torch.equal(heads[0], heads[1])
    assert not torch.equal(heads[0], heads[2])


# --------------------------------------------------------------------------------------------------
# Runs


def test_a_run_saves_how_it_truncated(built_in_run):
    config = json.loads((built_in_run[0] / "config.json").read_text())
    assert (config["max_seq_len"], config["truncation_side"]) == (64, "left")


def test_metrics_of_a_run(built_in_run):
    _, _, events = built_in_run
    assert [event["step"] for event in events["step"]] == [1, 2, 3]
    assert [event["step"] for event in events["eval"]] == [0, 2, 3]
    names = "event step loss lr grad_norm pairs tokens seconds"
    assert set(events["step"][0]) == set(names.split())
    names = "event step loss accuracy chosen_score rejected_score margin ece pairs ties dropped"
    names += " truncated bayes_accuracy probability_error"
    assert set(events["eval"][0]) == set(names.split())
    for event in events["step"]:
        assert event["pairs"] == 32
        assert 64 < event["tokens"] < 64 * 48
    expected = [1e-3 * 0.5 * (1 + math.cos(math.pi * i / 3)) for i in range(3)]
    assert [event["lr"] for event in events["step"]] == pytest.approx(expected)


def run_commands(text, monkeypatch, capsys):
    """Run the last three lines of a run, which a shell splits, here; return what they print."""
    printed, programs = [], set()
    for command in text.splitlines()[-3:]:
        split = f"printf '%s\\n' {command}"
        given = subprocess.run(split, shell=True, capture_output=True, text=True, check=True).stdout
        python, program, *arguments = given.splitlines()
        programs.add((python, program))
        monkeypatch.setattr(sys, "argv", ["rm.py", *arguments])
        capsys.readouterr()
        score.main()
        printed.append(capsys.readouterr().out)
    assert len(programs) == 1
    return printed


def test_commands_at_the_end_of_a_run_work_as_they_stand(built_in_run, monkeypatch, capsys):
    """They show, or score, 20 pairs of the eval set, to the scores of the last evaluation."""
    output_dir, said, _ = built_in_run
    shown, *_ = run_commands(said, monkeypatch, capsys)
    command = said.splitlines()[-3]
    done = subprocess.run(command, shell=True, capture_output=True, text=True, timeout=LIMIT)
    assert (done.returncode, done.stdout) == (0, shown), done.stderr
    assert shown.count("chosen  score") == shown.count("rejected  score") == 20
    assert (output_dir / "pairs.html").read_text().count("data-row") == 20
    pairs = list(itertools.islice(data.known_rewards(train.EVAL_SEED), 20))
    rows = read_rows(output_dir / "examples.jsonl")
    assert [[row["prompt"], row["chosen"], row["rejected"]] for row in rows] == [
        [pair.prompt, *pair.responses] for pair in pairs
    ]
    model, tokenizer = rm.RewardModel.from_pretrained(output_dir), data.load_tokenizer(output_dir)
    for pair, row in zip(pairs, read_rows(output_dir / "scores.jsonl"), strict=True):
        ids, mask = data.pad_rows(data.tokenize(pair, tokenizer, 64), tokenizer.pad_id)
        expected = model.forward_value(ids, mask)["chosen_end_scores"].tolist()
        assert row["scores"] == pytest.approx(expected, abs=1e-5)


def test_last_lines_name_the_accuracy_the_model_and_how_to_score(built_in_run):
    output_dir, said, events = built_in_run
    before, after = events["eval"][0], events["eval"][-1]
    *accuracies, place, _, _, _, _ = said.strip().splitlines()[-8:]
    how = said.strip().splitlines()[-3:]
    shares = before["accuracy"], after["accuracy"], after["bayes_accuracy"]
    names = "accuracy before training", "accuracy after training", "best possible accuracy"
    for line, name, share in zip(accuracies, names, shares, strict=True):
        error = math.sqrt(share * (1 - share) / 64)
        assert line.startswith(name) and f": {share:.4f} ± {error:.4f} (64 pairs)" in line
    correlation = r"of the scores of 128 eval responses with their true rewards: -?0\.\d{4}$"
    assert re.search(correlation, said, re.M)
    assert f"{output_dir}/report.html" in place
    assert (output_dir / "report.html").exists()
    assert str(output_dir) in place
    flags = ["--show", f"--html {output_dir}/pairs.html", f"--out {output_dir}/scores.jsonl"]
    for command, flag in zip(how, flags, strict=True):
        assert command.endswith(f"rm.py {output_dir} {output_dir}/examples.jsonl {flag}")


def test_evaluation_of_the_saved_model_by_hand(built_in_run):
    """Compute the metrics of the last evaluation again, text by text, from the files of the run."""
    output_dir, _, events = built_in_run
    model, tokenizer = rm.RewardModel.from_pretrained(output_dir), data.load_tokenizer(output_dir)
    margins, true_margins, losses = [], [], []
    for pair in itertools.islice(data.known_rewards(train.EVAL_SEED), 4 * 16):
        rows = []
        for response in pair.responses:
            tokens = tokenizer.encode(pair.prompt + response)
            rows.append([tokenizer.bos_id, *tokens, tokenizer.eos_id])
        scores = []
        for row in rows:
            values = model.forward_value(torch.tensor([row]), return_value_only=True)
            scores.append(values[0, -1].item())
        margins.append(scores[0] - scores[1])
        true_margins.append(pair.rewards[0] - pair.rewards[1])
        losses.append(model(*data.pad_rows(rows, tokenizer.pad_id))["loss"].item())
    sigmoid = lambda x: 1 / (1 + math.exp(-x))
    last = events["eval"][-1]
    assert last["pairs"] == 64
    assert last["accuracy"] == np.mean([margin > 0 for margin in margins])
    assert last["bayes_accuracy"] == np.mean([margin > 0 for margin in true_margins])
    assert last["margin"] == pytest.approx(np.mean(margins), abs=1e-5)
    assert last["loss"] == pytest.approx(np.mean(losses), abs=1e-5)
    expected = np.mean([abs(sigmoid(m) - sigmoid(t)) for m, t in zip(margins, true_margins)])
    assert last["probability_error"] == pytest.approx(expected, abs=1e-5)


def test_run_by_hand(monkeypatch, tmp_path):
    """Five steps, with everything that shapes an update, done with PyTorch's and transformers' own.

    Flags: a linear schedule with warm-up, weight decay, clipping, truncation on the right.
    """
    from transformers import get_scheduler

    rows = write_rows(tmp_path / "rows.jsonl", 20)
    held_out = write_rows(tmp_path / "held_out.jsonl", 2, seed=9)
    arguments = [
        *["--data_path", rows, "--eval_path", held_out],
        "--per_device_train_batch_size 8 --max_steps 5 --learning_rate 1e-2 --weight_decay 0.5",
        "--lr_scheduler_type linear --num_warmup_steps 2 --max_grad_norm 0.05",
        "--truncation_side right --max_seq_len 21 --seed 5",
    ]
    forked_ok(tmp_path / "out", *TINY, *arguments)
    tokenizer = data.load_tokenizer(tmp_path / "out")
    args = parsed(monkeypatch, *arguments)
    torch.manual_seed(5)
    model = train.new_model(args, tokenizer)
    decayed, rest = [], []
    for name, parameter in model.named_parameters():
        kind = rest if name.endswith("bias") or "norm" in name else decayed
        kind.append(parameter)
    groups = [{"params": decayed, "weight_decay": 0.5}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95))
    scheduler = get_scheduler("linear", optimizer, num_warmup_steps=2, num_training_steps=5)
    comparisons = list(data.load_comparisons(rows))
    order = np.arange(20)  # the whole file is the default share, in DeepSpeed-Chat's order
    np.random.RandomState(5).shuffle(order)
    pairs = []
    for i in order:
        pair = []
        for response in comparisons[i].responses:
            tokens = tokenizer.encode(comparisons[i].prompt + response)
            pair.append([tokenizer.bos_id, *tokens, tokenizer.eos_id][:21])
        if pair[0] != pair[1]:  # cut at 21 tokens, some are identical
            pairs.append(pair)
    assert 16 < len(pairs) < 20
    assert max(len(ids) for pair in pairs for ids in pair) == 21
    epochs = [np.random.RandomState([5, epoch]).permutation(len(pairs)) for epoch in (0, 1)]
    batches = [epoch[start : start + 8] for epoch in epochs for start in (0, 8, 16)]
    for batch, event in zip(batches, events_of(tmp_path / "out")["step"]):
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
def one_process(on_files, tmp_path_factory):
    """Train 12 steps of 12 comparisons. An epoch has 70, so each sixth batch is ragged (10)."""
    output_dir = tmp_path_factory.mktemp("one") / "out"
    flags = "--max_steps 12 --per_device_train_batch_size 12 --eval_interval 6"
    forked_ok(output_dir, *TINY, *on_files, flags)
    return output_dir, events_of(output_dir)


def test_two_processes_give_the_curve_of_one(on_files, one_process, tmp_path):
    """A batch of 12 as 2 ranks x 3 comparisons x 2, with ragged batches and with rankings."""
    done = run(
        "train.py",
        *[*TINY, *on_files, "--output_dir", tmp_path],
        "--max_steps 12 --eval_interval 6 --per_device_train_batch_size 3",
        "--gradient_accumulation_steps 2 --per_device_eval_batch_size 4 --micro_batch_tokens 150",
        processes=2,
    )
    assert done.returncode == 0, done.stderr
    same_run(one_process[1], events_of(tmp_path))
    tokenizers = [path / "tokenizer.model" for path in (tmp_path, one_process[0])]
    assert tokenizers[0].read_bytes() == tokenizers[1].read_bytes()


@pytest.mark.parametrize("layout, tokens", [("packed", 100), ("padded", 10**6), ("padded", 200)])
def test_micro_batches_and_layout_do_not_change_the_curve(
    on_files, one_process, tmp_path, layout, tokens
):
    forked_ok(
        tmp_path / "out",
        *[*TINY, *on_files],
        "--max_steps 12 --eval_interval 6 --per_device_train_batch_size 4",
        f"--gradient_accumulation_steps 3 --layout {layout} --micro_batch_tokens {tokens}",
    )
    events = events_of(tmp_path / "out")
    same_run(one_process[1], events)
    computed = [sum(event["tokens"] for event in run["step"]) for run in (events, one_process[1])]
    if layout == "packed":
        assert computed[0] == computed[1]
    else:
        assert computed[0] > computed[1]


@pytest.mark.parametrize("model_type", train.FAMILIES)
def test_twenty_steps_packed_or_padded_are_the_same_in_float64(model_type, files):
    """Pairs and a ranking; in the padded layout in micro-batches that add up."""
    tokenizer = data.train_tokenizer(["a b c d e"], 300)
    comparisons = list(data.tokenize_all(data.load_comparisons(files[0]), tokenizer, 64))
    shape = dict(vocab_size=tokenizer.vocab_size, n_positions=256, n_layer=2, n_embd=16, n_head=2)
    curves = {}
    for layout in ("packed", "padded"):
        torch.manual_seed(0)
        model = rm.RewardModel(GPT(GPTConfig(model_type, **shape)), tokenizer.pad_id).double()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, betas=(0.9, 0.95), fused=True)
        curves[layout] = []
        for step in range(20):
            indices = train.batch_indices(len(comparisons), 8, seed=0, step=step)
            batch = [comparisons[i] for i in indices]
            sizes = [size_of(comparison.sequences, layout, None) for comparison in batch]
            total = 0.0
            for micro_batch in cut_into_micro_batches(range(len(batch)), sizes, 1000):
                chosen = [batch[i] for i in micro_batch]
                inputs, _ = train.collate(chosen, model, layout, torch.device("cpu"))
                loss = model(*inputs)["loss"] * len(micro_batch) / len(batch)
                loss.backward()
                total += loss.item()
            curves[layout].append(total)
            optimizer.step()
            optimizer.zero_grad()
    worst = max(abs(a - b) for a, b in zip(*curves.values()))
    print(f"worst difference {worst:.1e}")
    assert worst < 1e-5
    assert curves["packed"][-1] != curves["packed"][0]


@pytest.mark.parametrize("loss", ["divergent", "end"])
def test_variants_of_the_loss_train_the_same_in_both_layouts_and_with_two_processes(
    loss, small, tmp_path, monkeypatch
):
    """Pairs of several margins, targets and subsets, in small micro-batches.

    The first evaluation by hand: its loss, and what follows from the outcomes.
    """
    file = write_rows(tmp_path / "rows.jsonl", 24)
    rows = read_rows(file)
    for i, row in enumerate(rows):
        row |= [{"margin": 1.5}, {}, {"target": [0.0, 0.3, 0.5, 0.75][i % 4]}][i % 3]
        row |= [{"subset": "b"}, {}, {"subset": "a"}, {}, {"subset": "b"}][i % 5]
    file.write_text("\n".join(json.dumps(row) for row in rows))
    arguments = [
        *[*small, "--data_path", file, "--eval_path", file],
        f"--dropout 0 --loss {loss} --center_rewards_coefficient 0.2",
        "--micro_batch_tokens 300 --max_steps 4",
    ]
    forked_ok(tmp_path / "packed", *arguments)
    forked_ok(tmp_path / "padded", *arguments, "--layout padded")
    forked_ok(tmp_path / "two", *arguments, "--per_device_train_batch_size 6", processes=2)
    packed = metrics_of(tmp_path / "packed")
    for name in ("padded", "two"):
        for one, event in zip(packed, metrics_of(tmp_path / name), strict=True):
            assert event["loss"] == pytest.approx(one["loss"], abs=1e-4)
            if event["event"] == "eval":
                for key in ("accuracy", "pairs", "ties", "dropped", "truncated", "by"):
                    assert event[key] == one[key], key
                assert event["ece"] == pytest.approx(one["ece"], abs=1e-4)
    tokenizer = data.load_tokenizer(tmp_path / "packed")
    args = parsed(monkeypatch, *arguments)
    torch.manual_seed(1234)
    model = train.new_model(args, tokenizer)
    losses, outcomes = [], {"a": [], "b": [], "all": []}
    for row in rows:
        comparison = data.Comparison(row["prompt"], [row["chosen"], row["rejected"]])
        tokens = data.tokenize(comparison, tokenizer, 64)
        ids, mask = data.pad_rows(tokens, tokenizer.pad_id)
        target = row.get("target", 1.0)
        out = rm.pairwise_loss(
            ids,
            model.token_rewards(ids, mask),
            tokenizer.pad_id,
            attention_mask=mask,
            loss=loss,
            margins=[row.get("margin", 0.0)],
            targets=[target],
            center_rewards_coefficient=0.2,
        )
        losses.append(out["loss"].item())
        margin = (out["chosen_mean_scores"] - out["rejected_mean_scores"]).item()
        is_right = margin > 0 if target > 0.5 else margin < 0
        for name in ("all", row.get("subset")):
            if name is not None:
                outcomes[name].append(None if target == 0.5 else is_right)
    assert packed[0]["event"] == "eval"
    assert packed[0]["loss"] == pytest.approx(np.mean(losses), abs=1e-5)
    expected = {}
    for name, found in outcomes.items():
        decided = [is_right for is_right in found if is_right is not None]
        assert 0 < len(decided) and (name != "all" or len(decided) == len(found) - 2)
        expected[name] = {"accuracy": pytest.approx(np.mean(decided)), "pairs": len(found)}
    assert packed[0] == packed[0] | expected.pop("all")
    assert packed[0]["by"] == expected


def test_evaluation_without_a_preferred_response(tmp_path):
    """Accuracy is null where every target is 0.5, in the whole set or in a subset."""
    training = write_rows(tmp_path / "train.jsonl", 8)
    rows = [row | {"target": 0.5, "subset": "x"} for row in read_rows(training)]
    held_out = tmp_path / "eval.jsonl"
    held_out.write_text("\n".join(json.dumps(row) for row in rows))
    arguments = [*TINY, "--max_steps 2 --vocab_size 400 --save_interval 0"]
    arguments += ["--data_path", training, "--eval_path", held_out]
    said = forked_ok(tmp_path / "out", *arguments)
    for event in events_of(tmp_path / "out")["eval"]:
        assert (event["accuracy"], event["ece"], event["pairs"]) == (None, None, 8)
        assert event["by"] == {"x": {"accuracy": None, "pairs": 8}}
    left_out = "; 8 pairs of target 0.5 left out"
    assert re.search(rf"step 0: accuracy none, loss [0-9.]+, .* error none{left_out}\n", said)
    assert "  x: none before, none after\n" in said
    assert f"accuracy before training: none\naccuracy after training: none{left_out}\n" in said
    assert "none: every target is 0.5" in (tmp_path / "out" / "report.html").read_text()


def test_truncated_comparisons_are_counted(files, tmp_path):
    """All texts are longer than 12 tokens; at 64 none is truncated."""
    arguments = [*TINY, "--max_steps 1 --vocab_size 400 --save_interval 0"]
    arguments += ["--data_path", files[0], "--eval_path", files[1]]
    for length, truncated in ((12, 21), (64, 0)):
        said = forked_ok(tmp_path / f"{length}", *arguments, f"--max_seq_len {length}")
        for event in events_of(tmp_path / f"{length}")["eval"]:
            assert (event["truncated"], event["pairs"]) == (truncated, 23)
        assert (f"; {truncated} truncated to --max_seq_len" in said) == (truncated > 0)


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_half_precision_gives_nearly_the_curve(dtype, stage_0, tmp_path):
    forked_ok(tmp_path / "out", *stage_0[1], f"--dtype {dtype} --zero_stage 3", processes=2)
    curves = []
    for path in (stage_0[0], tmp_path / "out"):
        curves.append([event["loss"] for event in events_of(path)["step"]])
    assert 1e-5 < max(abs(a - b) for a, b in zip(*curves)) < 5e-3


def compile_without_a_compiler():
    """Let --compile make graphs, and run them without generated code, which takes minutes."""
    compile_blocks = train.compile_blocks

    def compile_and_say_so(blocks):
        print("the blocks are compiled")
        compile_blocks(blocks, backend="eager")

    train.compile_blocks = compile_and_say_so


def test_compiled_blocks_give_the_same_curve(files, tmp_path):
    arguments = [*TINY, "--max_steps 4 --vocab_size 400 --save_interval 2"]
    arguments += ["--data_path", files[0], "--eval_path", files[1]]
    forked_ok(tmp_path / "eager", *arguments)
    before = compile_without_a_compiler
    said = forked_ok(tmp_path / "compiled", *arguments, "--compile", before=before)
    assert "the blocks are compiled" in said
    same_run(events_of(tmp_path / "compiled"), events_of(tmp_path / "eager"))


def test_training_lowers_the_loss_on_what_it_is_trained_on(files, tmp_path):
    data_flags = ["--data_path", files[0], "--eval_path", files[0]]
    forked_ok(tmp_path / "out", *TINY, *data_flags, "--num_train_epochs 12 --learning_rate 3e-3")
    events = events_of(tmp_path / "out")
    before, after = events["eval"]
    assert len(events["step"]) == 12 * math.ceil(70 / 16)
    assert after["accuracy"] > 0.8 > before["accuracy"]
    assert after["loss"] < before["loss"] - 0.1


@pytest.fixture(scope="module")
def ours_and_theirs(tmp_path_factory):
    """Write the same pairs as JSON lines with our fields, and as parquet with other ones."""
    folder = tmp_path_factory.mktemp("theirs")
    for name, seed in (("a", 0), ("b", 1)):
        rows = read_rows(write_rows(folder / f"{name}.jsonl", 20, seed))
        columns = {"question": [row["prompt"] for row in rows], "label": [1, None] * 10}
        columns |= {"good": [row["chosen"] for row in rows], "source": ["x"] * 20}
        columns["bad"] = [row["rejected"] for row in rows]
        (folder / "parquet").mkdir(exist_ok=True)
        table = pyarrow.table(columns)
        pyarrow.parquet.write_table(table, folder / "parquet" / f"{name}.parquet")
    return folder


FIELDS = "--fields prompt=question chosen=good rejected=bad"
SHORT = [*TINY, "--vocab_size 400 --max_steps 3 --max_seq_len 24 --save_interval 2"]


def test_parquet_with_other_fields_trains_as_json_lines_with_ours(ours_and_theirs, tmp_path):
    """A directory and a glob; unread fields are named for each file, from the cache, too."""
    folder = ours_and_theirs
    ours = [
        "--data_path",
        folder / "a.jsonl",
        folder / "b.jsonl",
        "--eval_path",
        folder / "b.jsonl",
    ]
    said = forked_ok(tmp_path / "ours", *SHORT, *ours)
    assert "is not read" not in said and "dropped for" not in said
    counts = []
    for name in ("train", "eval"):
        counts.append(re.search(rf"{name}: (\d+) comparisons; (\d+) truncated", said))
    assert [found[1] for found in counts] == ["40", "20"]
    assert all(0 < int(found[2]) <= int(found[1]) for found in counts)
    for path in (folder / "parquet", f"{folder}/parquet/*.parquet"):
        theirs = ["--data_path", path, "--eval_path", folder / "parquet" / "b.parquet", FIELDS]
        theirs += ["--ignore_fields source more"]
        said = forked_ok(tmp_path / "theirs", *SHORT, *theirs)
        same_bits(tmp_path / "theirs", tmp_path / "ours")
        for name in ("a", "b"):
            line = f'{folder}/parquet/{name}.parquet: field "label" is not read (10 rows)\n'
            assert said.count(line) == 1
        assert said.count("is not read") == 2
        assert said.count('--ignore_fields more: no row has a field "more"\n') == 1
    for change in ("--ignore_fields label", "--eval_by label", "--text_as messages"):
        flags = [*SHORT, *theirs, change, "--resume"]
        (code,), (said,) = forked(tmp_path / "theirs", *flags)
        assert code != 0 and "the training data, or how it is read" in said, said
        assert "--fields, --ignore_fields, --text_as, --eval_by" in said


def test_a_field_that_looks_like_the_prompt_ends_the_run(
    ours_and_theirs, tmp_path, monkeypatch, capsys
):
    """With the flag that the line names it goes on."""
    path = tmp_path / "a.jsonl"
    row = {"system": "", "question": "Letter A? ", "chosen": "yes", "rejected": "no"}
    path.write_text((json.dumps(row) + "\n") * 30)
    line = complaint(monkeypatch, capsys, "--data_path", path, "--output_dir", tmp_path / "out")
    assert f"{path}:1: " in line and "--ignore_fields question" in line
    (flag,) = re.findall("--fields prompt=question", line)
    said = forked_ok(tmp_path / "out", *TINY, "--max_steps 1", flag, "--data_path", path)
    assert "train: 28 comparisons\n" in said and "eval: 2 comparisons\n" in said


def test_the_cached_tokenizer_follows_from_how_rows_are_read(ours_and_theirs, monkeypatch):
    """The fields read, the order of files, and the rest of what it is trained on."""
    keys, cached = {}, train.cached

    def watched(directory, *how):
        keys[flags] = directory.name
        return cached(directory, *how)

    def new(flags):
        args = parsed(monkeypatch, "--vocab_size 400", flags)
        train.new_tokenizer(args, given_template(args.chat_template))

    monkeypatch.setattr(train, "cached", watched)
    a, b = ours_and_theirs / "parquet" / "a.parquet", ours_and_theirs / "parquet" / "b.parquet"
    swap = "--fields prompt=question chosen=bad rejected=good"
    for flags in (
        f"--data_path {a} {b} {FIELDS}",
        f"--data_path {b} {a} {FIELDS}",
        f"--data_path {a} {FIELDS}",
        f"--data_path {a} {b} {swap}",
        f"--data_path {a} {b} {FIELDS} --text_as messages",
        f"--data_path {a} {b} {FIELDS} --ignore_fields label",
        f"--data_path {a} {b} {FIELDS} --skip_bad_rows",
        f"--data_path {a} {b} {FIELDS} --vocab_size 390",
    ):
        new(flags)
    assert len(set(keys.values())) == len(keys) == 8
    flags = f"--data_path {a} {b} {FIELDS}"
    before = keys[flags]
    new(flags)
    assert keys[flags] == before


def test_a_text_that_the_tokenizer_cannot_encode_is_an_error_of_its_row(
    tmp_path, monkeypatch, capsys
):
    change, good, bad = FAILING["a normalizer panics"]
    flags = [*TINY, "--tokenizer_path", failing_tokenizer(tmp_path / "tokenizer", change)]
    file = tmp_path / "rows.jsonl"
    rows = [{"prompt": "", "chosen": "x y", "rejected": "y"} for _ in range(20)]
    rows[7]["chosen"] = bad
    file.write_text("\n".join(map(json.dumps, rows)))
    flags += ["--data_path", file, "--output_dir", tmp_path / "out"]
    line = complaint(monkeypatch, capsys, *flags)
    assert line.startswith(f'train.py: error: {file}:8: the tokenizer cannot encode "{bad}" (')
    said = forked_ok(tmp_path / "out", *flags, "--skip_bad_rows")
    assert f"{file}: skipped 1 row without a comparison; the first: {file}:8: " in said
    assert sum(step["pairs"] for step in events_of(tmp_path / "out")["step"]) == 18
    assert "Traceback" not in said


def test_bad_rows_are_skipped_and_counted_on_request(tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", 24)
    rows = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*rows[:9], b"{\n", *rows[9:], b'{"prompt": "p"}\n', b"\xff\n"]))
    data_flags = ["--data_path", path, "--eval_path", path]
    said = forked_ok(tmp_path / "out", *TINY, *data_flags, "--skip_bad_rows")
    events = events_of(tmp_path / "out")
    assert f"{path}: skipped 3 rows without a comparison; the first: {path}:10: not JSON" in said
    assert said.splitlines()[-1].split()[3] == "FILE.jsonl"  # `path` is none for rm.py
    assert sum(step["pairs"] for step in events["step"]) == events["eval"][-1]["pairs"] == 24


def test_a_trained_model_is_one_to_start_from(built_in_run, tmp_path, monkeypatch, capsys):
    """--model_name_or_path takes what a run left; without --eval_path, 5 % of 80 are held out.

    The last lines are commands that score the data, also where paths need quotes.
    """
    model, *_ = built_in_run
    rows = write_rows(tmp_path / "my rows.jsonl", 80)
    output_dir = tmp_path / "what it's for"
    flags = ["--model_name_or_path", model, "--data_path", rows, "--max_seq_len 48"]
    shown, *_ = run_commands(forked_ok(output_dir, *flags), monkeypatch, capsys)
    assert shown.count("chosen  score") == 80
    assert (output_dir / "pairs.html").exists()
    assert len(read_rows(output_dir / "scores.jsonl")) == 80
    first, *steps, _ = read_rows(output_dir / "metrics.jsonl")
    assert first["pairs"] == 4
    assert sum(step["pairs"] for step in steps) == 76
    assert steps[0]["lr"] == 5e-5  # DeepSpeed-Chat's default, where there is something to keep
    tokenizers = [path / "tokenizer.model" for path in (output_dir, model)]
    assert tokenizers[0].read_bytes() == tokenizers[1].read_bytes()


def test_opt_as_the_hub_has_it_becomes_what_deepspeed_chats_step_3_loads(tmp_path):
    """A checkpoint by transformers, vocab.json and merges.txt go in; the trained model is loaded.

    Loaded as `create_critic_model(rlhf_training=True)` does it: the backbone from config.json, its
    embedding resized to 8 * ceil(length of the tokenizer / 8), then the weights.
    """
    import tokenizers
    import transformers

    texts = []
    for pair in itertools.islice(data.known_rewards(0), 100):
        texts.append(pair.prompt + pair.responses[0])
    bpe = tokenizers.ByteLevelBPETokenizer()
    special = ["<s>", "<pad>", "</s>"]
    bpe.train_from_iterator(texts, vocab_size=300, special_tokens=special, show_progress=False)
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
    tokenizer_config = {
        "tokenizer_class": "GPT2Tokenizer",
        "bos_token": "</s>",
        "eos_token": "</s>",
        "unk_token": "</s>",
        "pad_token": "<pad>",
        "add_bos_token": True,
    }
    (source / "tokenizer_config.json").write_text(json.dumps(tokenizer_config))
    rows = write_rows(tmp_path / "rows.jsonl", 24)
    flags = ["--model_name_or_path", source, "--data_path", rows, "--max_seq_len 64"]
    forked_ok(output_dir, *flags)

    tokenizer = transformers.AutoTokenizer.from_pretrained(output_dir)
    config = transformers.AutoConfig.from_pretrained(output_dir)
    backbone = transformers.AutoModel.from_config(config)
    backbone.resize_token_embeddings(8 * math.ceil(len(tokenizer) / 8))
    weights = torch.load(output_dir / "pytorch_model.bin", weights_only=True)
    head = weights.pop("v_head.weight")
    weights = {name.removeprefix("rwtransformer."): weight for name, weight in weights.items()}
    backbone.load_state_dict(weights, strict=True)
    pair = next(data.known_rewards(1))
    ids = torch.tensor([tokenizer(pair.prompt + pair.responses[0])["input_ids"]])[:, :64]
    ours = rm.RewardModel.from_pretrained(output_dir).eval()
    expected = (backbone.eval()(ids).last_hidden_state @ head.T)[..., 0]
    assert (ours.pad_id, ours.num_padding_at_beginning) == (1, 0)
    assert torch.allclose(ours.forward_value(ids, return_value_only=True), expected, atol=1e-5)


# --------------------------------------------------------------------------------------------------
# Bad input: one line that names the flag or the file and line, what was found, what would be right

GOOD = '{"prompt": "p", "chosen": "a", "rejected": "b"}'
NUMBER = '{"prompt": "p", "chosen": 1, "rejected": "b"}'
IDENTICAL = '{"prompt": "p", "chosen": "a", "rejected": "a"}\n' * 30


@pytest.mark.parametrize(
    "content, expected",
    [
        (None, ["rows.jsonl", "no such file"]),
        ("", ["rows.jsonl", "no row"]),
        (GOOD + "\n{", ["rows.jsonl:2:", "not JSON"]),
        (GOOD.encode() + b'\n{"prompt": "\xe9', ["rows.jsonl:2:", "not UTF-8"]),
        (GOOD, ["rows.jsonl.gz:1:", "not gzip"]),
        (gzip.compress(GOOD.encode())[:-9], ["rows.jsonl.gz:1:", "cut"]),
        ('{"chosen": "a", "reject": "b"}', ["rows.jsonl:1:", "rejected", "nothing"]),
        ('{"chosen": "a", "rejected": "b"}\n[]', ["rows.jsonl:2:", "a list", "an object"]),
        (GOOD + "\n\n" + NUMBER, ["rows.jsonl:3:", "chosen", "a number"]),
        ('{"prompt": "p", "chosen": "a"}', ["rows.jsonl:1:", "rejected", "nothing"]),
        ('{"prompt": "p", "responses": ["a"]}', ["rows.jsonl:1:", "responses", "1", "two or more"]),
        (IDENTICAL, ["rows.jsonl", "30 rows", "identical"]),
        (GOOD, ["--data_path", "1 comparison", "--eval_path"]),
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
def test_bad_data(content, expected, monkeypatch, capsys, tmp_path):
    name = expected[0].split(":")[0]
    file = tmp_path / (name if name.startswith("rows") else "rows.jsonl")
    if isinstance(content, str):
        content = content.encode()
    if content is not None:
        file.write_bytes(content)
    line = complaint(monkeypatch, capsys, "--data_path", file, "--output_dir", tmp_path / "out")
    assert line.startswith("train.py: error:") and all(word in line for word in expected), line
    assert not (tmp_path / "out").exists()


def test_a_file_of_bad_rows_alone_is_refused(monkeypatch, capsys, tmp_path):
    (tmp_path / "rows.jsonl").write_text("3\n4\n")
    line = complaint(monkeypatch, capsys, "--skip_bad_rows --data_path", tmp_path / "rows.jsonl")
    assert f"{tmp_path}/rows.jsonl: no row of it is a comparison" in line
    assert "found a number" in line


def test_a_place_for_tokens_that_cannot_be_written_to_is_named(monkeypatch, capsys, tmp_path):
    (tmp_path / "file").write_text("in the way")
    data.train_tokenizer(["a few words"], 290).save(tmp_path)
    rows = write_rows(tmp_path / "rows.jsonl", 3)
    for place in (tmp_path / "file", tmp_path / "file" / "below"):
        for tokenizer in ([], ["--tokenizer_path", tmp_path]):
            flags = ["--data_path", rows, "--data_output_path", place, *tokenizer]
            line = complaint(monkeypatch, capsys, *flags)
            assert f"--data_output_path {place}: " in line and "a directory" in line


def test_model_directory_is_checked_before_the_data_and_both_before_a_tokenizer_is_trained(
    monkeypatch, capsys, tmp_path
):
    missing_data = ["--data_path", tmp_path / "missing.jsonl"]
    line = complaint(monkeypatch, capsys, "--model_name_or_path no/model", *missing_data)
    assert "--model_name_or_path no/model: no such directory" in line

    def refuse(*_):
        pytest.fail("trained a tokenizer before it looked at the data")

    monkeypatch.setattr(data, "train_tokenizer", refuse)
    assert "missing.jsonl" in complaint(monkeypatch, capsys, *missing_data)


def test_model_and_flags_must_fit(monkeypatch, capsys, tmp_path, built_in_run):
    output_dir, *_ = built_in_run
    line = complaint(monkeypatch, capsys, "--max_seq_len 65 --model_name_or_path", output_dir)
    assert "--max_seq_len" in line and "65" in line and "64 positions" in line
    texts = [pair.prompt for pair in itertools.islice(data.known_rewards(0), 300)]
    large = data.train_tokenizer([*texts, "many more words than before " * 3], 3000)
    large.save(tmp_path)
    gpt2 = HERE / "testdata" / "gpt2"
    flags = ["--model_name_or_path", gpt2, "--tokenizer_path", tmp_path, "--max_seq_len 64"]
    line = complaint(monkeypatch, capsys, *flags)
    assert "96 token ids" in line and str(large.text_size) in line and "--tokenizer_path" in line


def backbone_beside_added_tokens(directory, names: list[str], missing: int):
    """Write a qwen3, and a tokenizer with added tokens, `missing` of whose ids have no row."""
    backend = byte_level()
    backend.add_special_tokens(names)
    config = {"tokenizer_class": "Qwen2Tokenizer", "eos_token": "<|endoftext|>"}
    hub_files(directory, backend=backend, config=config | {"pad_token": names[-1]})
    torch.manual_seed(0)
    shape = dict(n_layer=2, n_head=2, n_embd=16, n_positions=64)
    size = backend.get_vocab_size()
    backbone = GPT(GPTConfig("qwen3", vocab_size=size - missing, **shape))
    save_backbone(backbone, directory)
    return backbone, size


@pytest.mark.parametrize("missing", [0, 1, 2])
def test_added_tokens_that_the_embedding_lacks_get_rows_of_zeros_and_a_line(
    missing, monkeypatch, capsys, tmp_path
):
    directory = tmp_path / "model"
    backbone, size = backbone_beside_added_tokens(directory, ["<|tool|>", "[PAD]"], missing)
    data_path = write_rows(tmp_path / "rows.jsonl", 30)
    flags = ["--model_name_or_path", directory, "--max_seq_len 64 --data_path", data_path]
    monkeypatch.setattr(sys, "argv", ["train.py", *words(flags)])
    args = train.parse_flags(list(train.FAMILIES), train.LOSSES)
    model, tokenizer, *_ = train.prepare(args, Process())
    embed = model.backbone.embed.weight
    assert len(embed) == size == tokenizer.vocab_size and tokenizer.pad_id == size - 1
    assert torch.equal(embed[: size - missing], backbone.embed.weight)
    assert not embed[size - missing :].any()
    line = f"{missing} rows of zeros added to the embedding, for the added tokens"
    assert (line in capsys.readouterr().out.splitlines()) == (missing > 0)


@pytest.mark.parametrize("added, missing", [(2, 3), (1001, 1001)], ids=["its own", "too many"])
def test_other_ids_that_the_embedding_lacks_are_refused(
    added, missing, monkeypatch, capsys, tmp_path
):
    names = [f"<|{i}|>" for i in range(added)]
    _, size = backbone_beside_added_tokens(tmp_path / "model", names, missing)
    line = complaint(monkeypatch, capsys, "--model_name_or_path", tmp_path / "model")
    assert f"has {size - missing} token ids, the tokenizer {size}" in line
    assert "--tokenizer_path" in line


@pytest.mark.parametrize("pad_id", [2000, 16777215])
def test_a_pad_id_far_beyond_the_embedding_is_refused_before_the_data(
    pad_id, monkeypatch, capsys, tmp_path
):
    tokenizer = data.train_tokenizer(["a few words"], 290)
    tokenizer.save(tmp_path)
    shape = dict(n_positions=64, n_layer=1, n_head=1, n_embd=8)
    save_backbone(GPT(GPTConfig("gpt2", vocab_size=tokenizer.vocab_size, **shape)), tmp_path)
    flags = ["--data_path missing.jsonl --max_seq_len 64 --pad_id", pad_id]
    line = complaint(monkeypatch, capsys, *flags, "--model_name_or_path", tmp_path)
    assert "--pad_id" in line and f" is {pad_id}, " in line and "expected an id from 0" in line


def foreign(file):
    file.write_bytes(data.train_tokenizer(["another text"] * 9, 300).model_proto)


def cut(file):
    file.write_bytes(file.read_bytes()[:1000])


@pytest.mark.parametrize("damage", [foreign, Path.unlink, cut, Path.touch])
def test_a_damaged_tokenizer_in_the_cache_is_trained_again(damage, monkeypatch, capsys, tmp_path):
    rows, cache = write_rows(tmp_path / "rows.jsonl", 30), tmp_path / "cache"
    flags = ["--vocab_size 400 --data_path", rows, "--data_output_path", cache]
    args = parsed(monkeypatch, *flags)
    template = given_template("auto")
    expected = train.new_tokenizer(args, template).model_proto
    assert "made again" not in capsys.readouterr().out
    (file,) = cache.glob("*/tokenizer.model")
    damage(file)
    is_damaged = damage != Path.touch
    assert train.new_tokenizer(args, template).model_proto == expected == file.read_bytes()
    line = f"{file.parent}: tokenizer.model is "
    assert (line in capsys.readouterr().out) == is_damaged


def test_a_tokenizer_is_never_kept_under_the_hash_of_another_text(monkeypatch, tmp_path):
    """The file changes behind its hash. Later the first text gets its own tokenizer."""
    rows = write_rows(tmp_path / "rows.jsonl", 30)
    other = write_rows(tmp_path / "other.jsonl", 30, seed=5).read_bytes()
    first, hash_of = rows.read_bytes(), train.hash_of

    def changed(*parts):
        rows.write_bytes(other)
        return hash_of(*parts)

    flags = ["--vocab_size 400 --data_path", rows, "--data_output_path", tmp_path / "cache"]
    args, template = parsed(monkeypatch, *flags), given_template("auto")
    monkeypatch.setattr(train, "hash_of", changed)
    with pytest.raises(ValueError, match=f"^{rows}: was changed while it was read"):
        train.new_tokenizer(args, template)
    assert not list((tmp_path / "cache").glob("*/tokenizer.model"))
    monkeypatch.setattr(train, "hash_of", hash_of)
    of_other = train.new_tokenizer(args, template).model_proto
    rows.write_bytes(first)
    assert train.new_tokenizer(args, template).model_proto != of_other


@pytest.mark.parametrize("model_type", ["mistral", "qwen2", "qwen3"])
def test_a_sliding_window_narrower_than_the_rows_is_refused_before_the_data(
    model_type, monkeypatch, capsys, tmp_path
):
    data.train_tokenizer(["a few words"], 290).save(tmp_path)
    shape = dict(n_layer=2, n_head=2, n_embd=16, n_positions=64, vocab_size=290)
    save_backbone(GPT(GPTConfig(model_type, sliding_window=32, **shape)), tmp_path)
    flags = ["--model_name_or_path", tmp_path, "--data_path", tmp_path / "missing.jsonl"]
    line = complaint(monkeypatch, capsys, *flags, "--max_seq_len 33")
    assert "--max_seq_len: found 33" in line and "sliding_window of 32" in line
    assert "missing.jsonl" in complaint(monkeypatch, capsys, *flags, "--max_seq_len 32")


@pytest.mark.parametrize("flag", ["--model_name_or_path", "--tokenizer_path"])
def test_a_name_of_the_hub_gets_the_command_that_downloads_it(flag, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    line = complaint(monkeypatch, capsys, flag, "Qwen/Qwen3-0.6B")
    assert flag in line and "Qwen/Qwen3-0.6B: no such" in line
    assert line.endswith("`hf download Qwen/Qwen3-0.6B --local-dir Qwen/Qwen3-0.6B`")


def test_error_of_a_vocabulary_too_small_for_the_text_names_the_size_it_needs(
    monkeypatch, capsys, tmp_path
):
    letters = "".join(chr(0x4E00 + i) for i in range(90))
    rows = [{"prompt": letters, "chosen": f"a{i}", "rejected": f"b{i}"} for i in range(30)]
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(json.dumps(row) for row in rows))
    line = complaint(monkeypatch, capsys, "--vocab_size 310 --data_path", file)
    assert "--vocab_size" in line and "310" in line
    needed = int(line.split("; ")[1].split()[0])
    texts = [row["prompt"] + row["chosen"] for row in rows]
    assert data.train_tokenizer(texts, needed).text_size == needed


def test_bad_input_ends_the_program_with_one_line_and_no_traceback(tmp_path):
    done = run("train.py", "--data_path", tmp_path / "no.jsonl")
    assert done.returncode == 1 and done.stdout == ""
    expected = f"train.py: error: {tmp_path}/no.jsonl: no such file; "
    assert done.stderr.strip() == expected + "expected .jsonl, .jsonl.gz, .json or .parquet"


# --------------------------------------------------------------------------------------------------
# Chat templates

TURNS = """{{ bos_token }}
{%- for turn in messages %}
    {%- if (turn.role == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('user and assistant take turns') }}
    {%- endif %}
    {%- if turn.role == 'user' %}
        {{- '[INST] ' + turn.content + ' [/INST]' }}
    {%- else %}
        {{- ' ' + turn.content + eos_token }}
    {%- endif %}
{%- endfor %}
"""


def turns(*contents):
    roles = itertools.cycle(["user", "assistant"])
    return [{"role": role, "content": content} for role, content in zip(roles, contents)]


@pytest.fixture(scope="module")
def dialogues(tmp_path_factory):
    """Write 30 rows of messages."""
    path = tmp_path_factory.mktemp("dialogues") / "rows.jsonl"
    lines = []
    for pair in itertools.islice(data.known_rewards(3), 30):
        prompt = turns("Hi", "Hello.", pair.prompt)
        chosen, rejected = ([turns("", text)[1]] for text in pair.responses)
        lines.append(json.dumps({"prompt": prompt, "chosen": chosen, "rejected": rejected}))
    path.write_text("\n".join(lines))
    return path


@pytest.fixture(scope="module")
def chat_model(tmp_path_factory):
    """Save a tiny llama with a tokenizer whose template is TURNS, and which puts a bos in front."""
    config = {"bos_token": "<s>", "eos_token": "</s>", "chat_template": TURNS}
    directory = tmp_path_factory.mktemp("chat") / "model"
    backend = byte_level(["<s>", "</s>", "[INST]", "[/INST]"], "<s> $A")
    hub_files(directory, backend=backend, config=FAST | config)
    torch.manual_seed(0)
    tiny = GPTConfig("llama", vocab_size=304, n_positions=300, n_layer=2, n_head=2, n_embd=32)
    rm.RewardModel(GPT(tiny), 0).save_pretrained(directory)
    return directory


def test_messages_are_trained_on_by_the_models_own_template(
    dialogues, chat_model, tmp_path, monkeypatch, capsys
):
    """The saved model has it, for transformers and for `python rm.py`, whose scores are by hand."""
    output_dir = tmp_path / "out"
    flags = ["--model_name_or_path", chat_model, "--data_path", dialogues, "--max_seq_len 300"]
    forked_ok(output_dir, *flags, "--layout padded")
    theirs = transformers.AutoTokenizer.from_pretrained(output_dir)
    assert theirs.chat_template == TURNS
    own = transformers.AutoTokenizer.from_pretrained(chat_model)
    tokens, scores = 0, []
    model = rm.RewardModel.from_pretrained(output_dir).eval()
    for row in read_rows(dialogues):
        sequences = []
        for name in ("chosen", "rejected"):
            dialogue = row["prompt"] + row[name]
            ids = own.apply_chat_template(dialogue, tokenize=True, return_dict=False)
            assert theirs.apply_chat_template(dialogue, tokenize=True, return_dict=False) == ids
            assert ids[0] == own.bos_token_id != ids[1] and ids[-1] == own.eos_token_id
            sequences.append(ids)
        ids, mask = data.pad_rows(sequences, model.pad_id)
        values = model.forward_value(ids, mask)
        scores.append(values["chosen_end_scores"].tolist())
        tokens += sum(map(len, sequences))
    first, *steps, last = read_rows(output_dir / "metrics.jsonl")
    assert tokens * 28 / 30 < sum(step["tokens"] for step in steps) < 1.5 * tokens
    monkeypatch.setattr(sys, "argv", words(["rm.py", output_dir, dialogues]))
    score.main()
    found = [json.loads(line)["scores"] for line in capsys.readouterr().out.splitlines()]
    assert np.allclose(found, scores, atol=1e-5)


@pytest.mark.parametrize("choice", ["auto", "plain", "file"])
@pytest.mark.parametrize("kind", ["own template", "no template", "from scratch"])
def test_the_flag_decides_how_messages_become_text(
    choice, kind, dialogues, chat_model, monkeypatch, tmp_path
):
    source = "{% for m in messages %}{{ m.role + '|' + m.content + eos_token }}{% endfor %}"
    if choice == "file":
        choice = tmp_path / "my.jinja"
        choice.write_text(source)
    flags = ["--data_path", dialogues, "--eval_path", dialogues, "--chat_template", choice]
    tokenizer_path = chat_model
    if kind == "no template":
        tokenizer_path = tmp_path / "plain"
        tokenizer_path.mkdir()
        data.train_tokenizer(["some words"], 300).save(tokenizer_path)
    if kind != "from scratch":
        flags += ["--tokenizer_path", tokenizer_path]
    args = parsed(monkeypatch, *flags, "--vocab_size 400 --max_seq_len 300")
    _, tokenizer, training, _ = train.prepare(args, Process())
    sequences = {found.where: found.sequences[0] for found in training}
    bos, eos = "<|reward model bos|>", "<|reward model eos|>"
    if kind == "own template":
        bos, eos = "<s>", "</s>"
    for line, row in enumerate(read_rows(dialogues), start=1):
        dialogue = row["prompt"] + row["chosen"]
        if isinstance(choice, Path):
            text = "".join(f"{turn['role']}|{turn['content']}{eos}" for turn in dialogue)
        elif choice == "auto" and kind == "own template":
            text = "<s>"
            for user, assistant in zip(dialogue[::2], dialogue[1::2]):
                text += f"[INST] {user['content']} [/INST] {assistant['content']}</s>"
        else:
            text = chat_text(dialogue)
        ids = tokenizer.encode(text)
        if ids[0] != tokenizer.bos_id:
            ids.insert(0, tokenizer.bos_id)
        if ids[-1] != tokenizer.eos_id:
            ids.append(tokenizer.eos_id)
        assert sequences[f"{dialogues}:{line}"] == ids
    tokenizer.save(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    rendered = theirs.apply_chat_template(dialogue, tokenize=False)
    assert tokenizer.render(dialogue) == text
    # For transformers, the plain template writes bos and eos itself.
    assert rendered == (bos + text + eos if text == chat_text(dialogue) else text)


def test_a_tokenizer_is_trained_on_what_the_template_renders(dialogues, monkeypatch, tmp_path):
    """Each template has a tokenizer of its own in the cache, although the files are the same."""
    (tmp_path / "my.jinja").write_text("{% for m in messages %}qq {{ m.content }}{% endfor %}")
    ids = []
    for choice in (tmp_path / "my.jinja", "plain"):
        flags = ["--data_path", dialogues, "--chat_template", choice, "--vocab_size 400"]
        args = parsed(monkeypatch, *flags)
        tokenizer = train.new_tokenizer(args, given_template(str(choice)))
        ids.append(tokenizer.encode("qq "))
    assert len(ids[0]) < len(ids[1])


@pytest.mark.parametrize("skips", [False, True])
@pytest.mark.parametrize("scratch", [False, True])
def test_a_row_that_the_template_refuses_is_a_bad_row(
    scratch, skips, dialogues, chat_model, monkeypatch, capsys, tmp_path
):
    rows = dialogues.read_text().splitlines()
    wrong = json.loads(rows[0])
    wrong["prompt"] = wrong["prompt"][:2]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join([rows[0], "", json.dumps(wrong), *rows[1:]]))
    (tmp_path / "turns.jinja").write_text(TURNS)
    flags = ["--data_path", path, "--eval_path", dialogues, "--max_seq_len 300"]
    if scratch:
        flags += ["--chat_template", tmp_path / "turns.jinja", "--vocab_size 400"]
    else:
        flags += ["--tokenizer_path", chat_model]
    words = "does not take these messages: user and assistant take turns"
    if skips:
        args = parsed(monkeypatch, *flags, "--skip_bad_rows")
        _, _, training, _ = train.prepare(args, Process())
        assert len(training) == 30
        said = capsys.readouterr().out
        assert "skipped 1 row without a comparison" in said
        assert f"{path}:3: " in said and words in said
    else:
        line = complaint(monkeypatch, capsys, *flags, "--output_dir", tmp_path / "out")
        assert line.startswith(f"train.py: error: {path}:3: ") and line.endswith(words)


def test_a_wrong_chat_template_shows_before_any_file_is_read(monkeypatch, capsys, tmp_path):
    (tmp_path / "bad.jinja").write_text("{% if %}")
    for name, found in (("bad.jinja", "not a jinja template"), ("none", "no such file")):
        flags = ["--chat_template", tmp_path / name, "--model_name_or_path no/model"]
        line = complaint(monkeypatch, capsys, *flags, "--data_path no/data.jsonl")
        assert line.startswith(f"train.py: error: --chat_template {tmp_path / name}: {found}")


def test_the_tokenizer_of_another_template_is_another_run(dialogues, chat_model, monkeypatch):
    flags = ["--tokenizer_path", chat_model, "--data_path", dialogues, "--eval_path", dialogues]
    results = []
    for choice in ("auto", "plain"):
        args = parsed(monkeypatch, *flags, "--chat_template", choice)
        model, tokenizer, training, _ = train.prepare(args, Process())
        results.append(train.result_follows_from(args, model, tokenizer, training, 16, 9))
    assert results[0]["tokenizer"] != results[1]["tokenizer"]
    assert results[0]["training_data"] != results[1]["training_data"]
