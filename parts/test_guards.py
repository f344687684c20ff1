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
    complaint,
    events_of,
    forked,
    forked_ok,
    metrics_of,
    read_rows,
    same_bits,
    signal_in_step,
    words,
    write_rows,
)
from parts.distributed import Process, share_of
from parts.guards import (
    check_evaluation,
    check_scores,
    check_weights,
    counted,
    listed,
    non_finite,
    non_finite_message,
    one_line,
    shown,
    visible,
)
from parts.run_directory import newest_checkpoint
from rm import GPT, RewardModel
from tools import score


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
    """Copy a model, and write rows of which row 17 alone has a certain token.

    Returns the flags to train on them, the path of the rows, and the token, which `nan_at` spoils.
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
    other = write_rows(folder / "eval.jsonl", 4, seed=9)
    flags = ["--model_name_or_path", model, "--max_seq_len 64 --save_interval 1"]
    flags += ["--data_path", path, "--eval_path", other]
    return flags, path, token


def nan_at(token):
    """Have the model compute NaN where this token stands; its weights stay finite."""
    load_model = train.load_model

    def spoil(module, inputs, output):
        return output.masked_fill((inputs[0] == token)[..., None], math.nan)

    def watched(*arguments):
        model = load_model(*arguments)
        model.backbone.embed.register_forward_hook(spoil)
        return model

    train.load_model = watched


@pytest.mark.parametrize(
    "processes, layout, stage",
    [(1, "packed", 0), (1, "padded", 0), (2, "packed", 0), (2, "padded", 3)],
)
def test_error_of_a_loss_that_is_not_finite_names_step_rank_and_row(
    processes, layout, stage, with_nan, tmp_path, monkeypatch
):
    """Row 17 alone, though in a packed micro-batch it spoils others. The step before is saved."""
    flags, path, token = with_nan
    flags = [*flags, f"--layout {layout} --zero_stage {stage}"]
    flags += ["--per_device_train_batch_size", 8 // processes]
    before = functools.partial(nan_at, token)
    codes, said = forked(tmp_path / "out", *flags, processes=processes, before=before)
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
    codes, (said,) = forked(tmp_path / "out", *TINY, flags)
    assert codes == [1] and "Traceback" not in said
    last = said.splitlines()[-1]
    assert "train.py: error: at step" in last and "--learning_rate" in last
    for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


# --------------------------------------------------------------------------------------------------
# Weights and scores


SPOILED = [math.nan, math.inf, -math.inf]


@pytest.mark.parametrize("value", SPOILED)
@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str
)
def test_one_number_that_is_not_finite_is_found_wherever_it_is(value, dtype):
    weights = {"a": torch.full((3, 5), 60000.0).to(dtype), "none": torch.zeros(0).to(dtype)}
    weights |= {"mask": torch.tensor([True]), "scalar": torch.tensor(0.0).to(dtype)}
    assert non_finite(weights) == []
    for name, index in [("a", (0, 0)), ("a", (2, 4)), ("a", (1, 3)), ("scalar", ())]:
        before = weights[name][index].clone()
        weights[name][index] = value
        assert non_finite(weights) == [name]
        with pytest.raises(ValueError, match=f"^place: weight {name} holds NaN or infinity"):
            check_weights(weights, "place")
        weights[name][index] = before


@pytest.mark.parametrize("value", SPOILED)
@pytest.mark.parametrize(
    "name", ["v_head.weight", "rwtransformer.embed_tokens.weight", "rwtransformer.norm.weight"]
)
def test_weights_that_are_not_finite_are_refused_by_name_when_they_are_read(
    name, value, built_in_run, on_files, tmp_path, monkeypatch, capsys
):
    """By the library, by train.py and by rm.py: nothing is trained, and no data is blamed."""
    model = shutil.copytree(built_in_run[0], tmp_path / "model")
    weights = torch.load(model / "pytorch_model.bin", weights_only=True)
    weights[name].view(-1)[-1] = value
    torch.save(weights, model / "pytorch_model.bin")
    expected = f"{model}: weight {name} holds NaN or infinity"
    for kind in (RewardModel, GPT):
        with pytest.raises(ValueError, match=expected):
            kind.from_pretrained(model)
    flags = [*on_files, "--max_seq_len 64 --model_name_or_path", model]
    line = complaint(monkeypatch, capsys, *flags, "--output_dir", tmp_path / "out")
    assert expected in line
    monkeypatch.setattr(sys, "argv", words(["rm.py", model, on_files[1]]))
    with pytest.raises(SystemExit, match=f"^rm.py: error: {expected}"):
        score.main()
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("layout", ["deepspeed-chat", "hf"])
def test_weights_that_are_not_finite_are_not_saved(layout, built_in_run, tmp_path):
    """The files that were there stay as they were."""
    model = RewardModel.from_pretrained(built_in_run[0])
    model.save_pretrained(tmp_path, layout)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    model.v_head.weight.data[0, 0] = math.nan
    with pytest.raises(ValueError, match="weight (v_head|score).weight holds NaN or infinity"):
        model.save_pretrained(tmp_path, layout)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("normalize", ["", "--normalize_rewards"])
def test_last_evaluation_that_is_not_finite_ends_the_run_with_an_error(
    normalize, processes, with_nan, tmp_path
):
    """Row 17 is evaluated on, not trained on: the weights are finite, and so the model is saved."""
    flags, path, token = with_nan
    other = flags[-1]
    flags = [*flags, "--data_path", other, "--eval_path", path, "--max_steps 3", normalize]
    before = functools.partial(nan_at, token)
    codes, said = forked(tmp_path / "out", *flags, processes=processes, before=before)
    assert codes == [1] * processes, said
    line = said[0].strip().splitlines()[-1]
    assert line.startswith("train.py: error: the last evaluation is not finite (")
    assert "the model is saved" in line and f"{tmp_path}/out/checkpoints/step-3" in line
    evaluations = events_of(tmp_path / "out")["eval"]
    assert [event["loss"] for event in evaluations] == [None, None]
    RewardModel.from_pretrained(tmp_path / "out")


def test_scores_and_losses_are_looked_at():
    check_scores([1.0, -3e38], "file: row 3")
    with pytest.raises(ValueError, match="^file: row 3: the score of response 1 is inf"):
        check_scores([1.0, math.inf], "file: row 3")
    numbers = {"chosen": [1.0, 2.0], "rejected": [0.0, 1.0], "subset": [None], "loss": [0.5]}
    check_evaluation(numbers, "nothing is left")
    numbers["loss"] = [math.nan]
    with pytest.raises(ValueError, match="finite .loss: 1 of 1 .* nan.*; nothing is left"):
        check_evaluation(numbers, "nothing is left")


def test_message_of_many_rows_lists_the_first_and_counts_the_others():
    assert listed(["a", "b"]) == "a, b"
    assert listed(["a", "b", "c", "d"], most=2) == "a, b and 2 more"
    batch = [data.Tokenized([[1], [2]], where=f"file:{i}") for i in range(3)]
    text = non_finite_message(1.5, math.inf, [], batch, streak=1)
    assert text == ("the gradient norm is inf, that of a finite loss (rows: file:0 and 2 more)")


# --------------------------------------------------------------------------------------------------
# Text from outside


@pytest.mark.parametrize(
    "text, expected",
    [
        ("a\x1b]52;c;aGk=\x07b", "a␛]52;c;aGk=␇b"),
        ("a\x00\x7f\x9b1m", "a␀␡⟨U+009B⟩1m"),
        ("a\u202eb\u2066c\u200fd", "a⟨U+202E⟩b⟨U+2066⟩c⟨U+200F⟩d"),
        ("a\u200bb\ufeffc\xadd", "a⟨U+200B⟩b⟨U+FEFF⟩c⟨U+00AD⟩d"),
        ("a\u2028b\u2029\x85", "a⟨U+2028⟩b⟨U+2029⟩⟨U+0085⟩"),
        ("a\udcffb\ud800", "a⟨U+DCFF⟩b⟨U+D800⟩"),  # bytes of a path that are not UTF-8
        ("cho\u200dsen\u200c", "cho⟨U+200D⟩sen⟨U+200C⟩"),
        ("👩\u200d💻 می\u200cخواهم é ▁ 日本", "👩\u200d💻 می\u200cخواهم é ▁ 日本"),
        ("a\r\nb\tc\n", "a␍↵b⇥c↵"),
        ("", ""),
    ],
)
def test_text_from_outside_is_shown_on_one_line(text, expected):
    assert one_line(text) == expected
    assert shown(text) == f'"{expected}"'
    assert one_line(expected) == expected
    if "⟨U+200D⟩" not in expected:  # on pages they may join tokens
        assert visible(text).replace("\n", "").replace("\t", "") == expected


@pytest.mark.parametrize("filling", ["x", "\x1b", "\u202e", "\n", "日"])
@pytest.mark.parametrize("most", [60, 200, 3500])
def test_long_text_loses_its_middle(filling, most):
    text = one_line("start " + filling * 10**6 + " end", most)
    assert text.startswith("start ") and text.endswith(" end") and "characters in all" in text
    assert most - 2 <= len(text) <= most and text.isprintable()
    assert len(shown("start " + filling * 10**6)) <= 60 * 8 + 3


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
