"""Numbers that are not finite: which step, rank and row they come from, and what fp16 does of them.

What a batch must be is tested where it is asked for: test_loss.py, test_model.py.
"""

import functools
import itertools
import json
import math
import os
import shutil
import signal
import sys

import pytest
import torch

import data
import train
from conftest import (
    TINY,
    events_of,
    forked,
    forked_ok,
    metrics_of,
    read_rows,
    run,
    same_bits,
    signal_in_step,
    words,
    write_rows,
)
from parts.distributed import Process, share_of
from parts.guards import counted, listed, non_finite_message
from parts.run_directory import newest_checkpoint


def facts_of(output_dir):
    """Read the step and the facts of the newest whole checkpoint."""
    return newest_checkpoint(output_dir / "checkpoints", Process())


@pytest.mark.parametrize(
    "arguments, expected",
    [
        ((0, "pair"), "0 pairs"),
        ((1, "pair"), "1 pair"),
        ((4000, "pair"), "4,000 pairs"),
        ((1, "micro-batch", "micro-batches"), "1 micro-batch"),
        ((2, "micro-batch", "micro-batches"), "2 micro-batches"),
    ],
)
def test_one_thing_is_singular(arguments, expected):
    assert counted(*arguments) == expected


# --------------------------------------------------------------------------------------------------
# Where they come from


@pytest.fixture(scope="module")
def with_nan(built_in_run, tmp_path_factory):
    """Make a model whose embedding of one token is NaN, and rows of which row 17 has that token.

    Returns the flags to train on them, and the path of the rows.
    """
    folder = tmp_path_factory.mktemp("with_nan")
    without = shutil.ignore_patterns("checkpoints")
    model = shutil.copytree(built_in_run[0], folder / "model", ignore=without)
    path = write_rows(folder / "rows.jsonl", 40)
    rows = read_rows(path)
    rows[16]["rejected"] += " Quite."
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    tokenizer = data.load_tokenizer(model)
    used = [set(tokenizer.encode("".join(row.values()))) for row in rows]
    token = min(used[16] - set().union(*used[:16], *used[17:]))
    weights = torch.load(model / "pytorch_model.bin", weights_only=True)
    weights["rwtransformer.embed_tokens.weight"][token] = math.nan
    torch.save(weights, model / "pytorch_model.bin")
    flags = ["--model_name_or_path", model, "--data_path", path, "--max_seq_len 64"]
    flags += ["--eval_path", write_rows(folder / "eval.jsonl", 4, seed=9), "--save_interval 1"]
    return flags, path


@pytest.mark.parametrize(
    "processes, layout, stage",
    [(1, "packed", 0), (1, "padded", 0), (2, "packed", 0), (2, "padded", 3)],
)
def test_error_of_a_loss_that_is_not_finite_names_step_rank_and_row(
    processes, layout, stage, with_nan, tmp_path, monkeypatch
):
    """Row 17 alone, though in a packed micro-batch it spoils others. The step before is saved."""
    flags, path = with_nan
    flags = [*flags, f"--layout {layout} --zero_stage {stage}"]
    flags += ["--per_device_train_batch_size", 8 // processes]
    codes, said = forked(tmp_path / "out", *flags, processes=processes)
    assert codes == [1] * processes, said
    monkeypatch.setattr(sys, "argv", ["train.py", *words(flags)])
    args = train.parse_flags(list(train.FAMILIES), train.LOSSES)
    model, _, dataset, _ = train.prepare(args, Process())
    found = None
    for step, batch in enumerate(train.batches_after(0, dataset, 8, args.seed), start=1):
        for comparison in batch:
            if comparison.where.endswith(":17"):
                found = comparison
        if found:
            break
    ranks = []
    for rank in range(processes):
        share = share_of(
            batch, layout, model.longest_tail, 10**6, Process(rank, processes), stage > 0
        )
        if any(found is comparison for comparison in sum(share, [])):
            ranks.append(rank)
    (rank,) = ranks
    for text in said:
        line = text.strip().splitlines()[-1]
        cause = f"at step {step} the loss is nan (rank {rank}: {path}:17); "
        assert f"train.py: error: {cause}" in line
        assert f"the last whole checkpoint is {tmp_path}/out/checkpoints/step-{step - 1}." in line
    assert facts_of(tmp_path / "out")[0] == step - 1 > 0
    assert metrics_of(tmp_path / "out")[-1]["step"] == step - 1


def test_gradient_norm_that_is_not_finite_stops_the_run(small, tmp_path):
    codes, (said,) = forked(
        tmp_path / "out", *small, "--save_interval 1", before=functools.partial(overflow, 3, 12)
    )
    last = said.strip().splitlines()[-1]
    assert codes == [1], said
    assert "at step 3 the gradient norm is inf, that of a finite loss (rows: " in last
    assert "/step-2." in last


def test_training_that_diverges_stops_before_it_spoils_the_weights(tmp_path):
    """The step is not taken and not logged; what was logged before stays valid JSON."""
    flags = "--learning_rate 1e30 --max_grad_norm 1e30 --eval_iters 1"
    done = run("train.py", *TINY, flags, "--output_dir", tmp_path)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    last = done.stderr.splitlines()[-1]
    assert "train.py: error: at step" in last and "--learning_rate" in last
    for line in (tmp_path / "metrics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


def test_message_of_many_rows_lists_the_first_and_counts_the_others():
    assert listed(["a", "b"]) == "a, b"
    assert listed(["a", "b", "c", "d"], most=2) == "a, b and 2 more"
    batch = [data.Tokenized([[1], [2]], where=f"file:{i}") for i in range(3)]
    text = non_finite_message(1.5, math.inf, [], batch, streak=1)
    assert text == ("the gradient norm is inf, that of a finite loss (rows: file:0 and 2 more)")


# --------------------------------------------------------------------------------------------------
# fp16


def overflow(first, last, rank=0):
    """Make one gradient infinite, from step `first` to `last`, before it is unscaled.

    With sharded weights on one rank alone. Each of these steps prints whether weights were kept.
    """
    unscale, update = torch.amp.GradScaler.unscale_, torch.amp.GradScaler.update
    steps, before = itertools.count(1), []

    def local(tensor):
        if hasattr(tensor, "to_local"):
            return tensor.to_local()
        return tensor

    def watched(self, optimizer):
        if first <= next(steps) <= last:
            parameters = optimizer.param_groups[0]["params"]
            for parameter in parameters:
                weight = local(parameter.detach())
                before.append((weight, weight.clone()))
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
def test_fp16_skips_a_step_on_all_ranks_and_counts_it(processes, stage, small, tmp_path):
    flags = [*small, f"--dtype fp16 --zero_stage {stage}"]
    flags += ["--per_device_train_batch_size", 12 // processes]
    codes, said = forked(
        tmp_path / "out",
        *flags,
        processes=processes,
        before=functools.partial(overflow, 3, 4, rank=processes - 1),
    )
    assert codes == [0] * processes, said
    for text in said:
        assert text.count("kept: True") == 2 and "kept: False" not in text
    steps = events_of(tmp_path / "out")["step"]
    assert [event["step"] for event in steps if event["grad_norm"] is None] == [3, 4]
    assert len(steps) == 12
    assert "2 steps skipped" in said[0]
    _, facts = facts_of(tmp_path / "out")
    assert facts["scaler"]["scale"] == 65536 / 4
    assert facts["scaler"]["_growth_tracker"] == 8
    assert facts["skipped"] == [2, 0]
    weights = torch.load(tmp_path / "out" / "pytorch_model.bin", weights_only=True)
    assert all(weight.isfinite().all() for weight in weights.values())


def test_fp16_resumes_with_its_scale_where_no_step_was_taken_yet(small, tmp_path):
    flags = [*small, "--dtype fp16"]
    forked_ok(tmp_path / "whole", *flags, before=functools.partial(overflow, 1, 3))
    forked_ok(tmp_path / "out", *flags, before=overflow_and_stop)
    resumed = functools.partial(overflow, 1, 1)
    said = forked_ok(tmp_path / "out", *flags, "--resume", before=resumed)
    assert "3 steps skipped" in said
    same_bits(tmp_path / "out", tmp_path / "whole")
    _, one = facts_of(tmp_path / "out")
    _, other = facts_of(tmp_path / "whole")
    assert one["scaler"] == other["scaler"]
    assert one["scaler"]["scale"] == 65536 / 8
    assert one["skipped"] == other["skipped"] == [3, 0]


def overflow_and_stop():
    overflow(1, 2)
    signal_in_step(0, 2, signal.SIGTERM)


def test_fp16_stops_after_a_long_streak(small, tmp_path):
    flags = [*small, "--dtype fp16 --save_interval 3"]
    codes, (said,) = forked(tmp_path / "out", *flags, before=long_streak)
    last = said.strip().splitlines()[-1]
    assert codes == [1], said
    assert "at step 9 the gradient norm is inf" in last
    assert "after 4 skipped steps whose numbers were not finite either" in last
    assert "/checkpoints/step-6." in last


def long_streak():
    train.LONGEST_STREAK = 5
    overflow(5, 12)
