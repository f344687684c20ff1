"""A run's directory: nothing is lost when a run is killed, a file damaged, or the disk full."""

import functools
import itertools
import json
import os
import resource
import shlex
import shutil
import signal
import sys

import numpy as np
import pytest
import torch

import data
import train
from conftest import (
    HERE,
    TINY,
    complaint,
    end,
    events_of,
    forked,
    forked_ok,
    hold_in_step,
    in_step,
    metrics_of,
    same_bits,
    same_run,
    signal_in_step,
    start,
    wait_for_steps,
    words,
)
from parts import run_directory
from parts.distributed import Process
from parts.run_directory import ANY, RunDirectory, checkpoint_steps, differences, newest_checkpoint


@pytest.fixture(scope="module")
def undisturbed(small, tmp_path_factory):
    """Train without an interruption, with checkpoints at steps 4, 8 and 12. The directory."""
    output_dir = tmp_path_factory.mktemp("undisturbed") / "out"
    forked_ok(output_dir, *small, "--save_interval 4 --keep_checkpoints 9")
    return output_dir


# --------------------------------------------------------------------------------------------------
# Files of earlier runs


def test_files_of_an_earlier_run_are_kept(tmp_path, capsys):
    for number in (1, 2):
        (tmp_path / "pytorch_model.bin").write_text(f"model {number}")
        (tmp_path / "model.safetensors").write_text("would be taken for the new model")
        (tmp_path / "examples.jsonl").write_text(f"examples {number}")
        (tmp_path / "notes.txt").write_text("not ours")
        run = RunDirectory(tmp_path, 2, {}, Process())
        run.open(0, 1000, saves_checkpoints=False)
        run.log(event="step", step=number)
    assert (tmp_path / "earlier-1" / "pytorch_model.bin").read_text() == "model 1"
    assert (tmp_path / "earlier-2" / "pytorch_model.bin").read_text() == "model 2"
    metrics = (tmp_path / "earlier-2" / "metrics.jsonl").read_text()
    assert json.loads(metrics) == {"event": "step", "step": 1}
    assert (tmp_path / "earlier-2" / "examples.jsonl").read_text() == "examples 2"
    assert not (tmp_path / "model.safetensors").exists()
    assert not (tmp_path / "examples.jsonl").exists()
    assert (tmp_path / "metrics.jsonl").exists()
    assert (tmp_path / "notes.txt").read_text() == "not ours"
    assert f"{tmp_path}/earlier-2" in capsys.readouterr().out


def test_output_directory_that_cannot_be_written_to(monkeypatch, capsys, tmp_path):
    (tmp_path / "file").write_text("in the way")
    line = complaint(monkeypatch, capsys, "--output_dir", tmp_path / "file")
    assert "--output_dir" in line and str(tmp_path / "file") in line
    assert (tmp_path / "file").read_text() == "in the way"


def test_metrics_are_cut_after_the_step_that_a_run_resumes_at(tmp_path):
    """A line that the end of a run has cut goes, too; a number that is not finite becomes null."""
    run = RunDirectory(tmp_path, 2, {}, Process())
    run.open(0, 1000, saves_checkpoints=False)
    for step in (1, 2, 3):
        run.log(event="step", step=step, loss=float("nan"))
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"event": "step", "st')
    assert [event["step"] for event in run.events()] == [1, 2, 3]
    resumed = RunDirectory(tmp_path, 2, {}, Process())
    resumed.open(2, 1000, saves_checkpoints=False)
    resumed.log(event="eval", step=2)
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 2]
    assert json.loads(lines[0])["loss"] is None
    assert resumed.has_evaluation(2) and not resumed.has_evaluation(1)


# --------------------------------------------------------------------------------------------------
# The end of a run


def commands(text: str) -> list[str]:
    """List the commands, the last three lines, without their indent."""
    return [line.strip() for line in text.splitlines()[-3:]]


def test_examples_are_comparisons_that_data_files_hold(tmp_path):
    run = RunDirectory(tmp_path, 2, {}, Process())
    expected = list(itertools.islice(data.known_rewards(0), 20))
    path = run.write_examples(data.known_rewards(0))
    assert path == tmp_path / "examples.jsonl"
    found = [(pair.prompt, pair.responses) for pair in data.load_comparisons(path)]
    assert found == [(pair.prompt, pair.responses) for pair in expected]
    for row in map(json.loads, path.read_text().splitlines()):
        assert list(row) == ["prompt", "chosen", "rejected"]


def test_next_commands_are_quoted_and_start_this_python_and_rm_py_from_here(tmp_path, monkeypatch):
    (tmp_path / "a b.jsonl").write_text("")
    run = RunDirectory("it's out", 2, {}, Process())
    ours = sys.executable
    for directory, found, python, program in (
        (HERE, os.path.join(os.path.dirname(ours), "python"), "python", "rm.py"),
        (tmp_path, "/elsewhere/python", ours, f"{HERE}/rm.py"),
        (HERE, None, ours, "rm.py"),
    ):
        monkeypatch.chdir(directory)
        monkeypatch.setattr(shutil, "which", lambda name: found)
        text = run.last_lines([tmp_path / "missing.jsonl", tmp_path / "a b.jsonl"], [])
        shared = [python, program, "it's out", f"{tmp_path}/a b.jsonl"]
        assert [shlex.split(command) for command in commands(text)] == [
            [*shared, "--show"],
            [*shared, "--html", "it's out/pairs.html"],
            [*shared, "--out", "it's out/scores.jsonl"],
        ]
    flags = ["--fields", "prompt=the question", "--text_as", "messages"]
    for command in commands(run.last_lines([tmp_path / "a b.jsonl"], flags)):
        assert shlex.split(command)[4:8] == flags
    # Where no file can be scored, the user fills in one.
    assert shlex.split(commands(run.last_lines([], []))[0])[3] == "FILE.jsonl"


@pytest.mark.parametrize("processes", [1, 2])
def test_run_on_built_in_data_leaves_examples_also_when_it_resumes(processes, tmp_path):
    output_dir = tmp_path / "out"
    flags = [*TINY, "--max_steps 2 --vocab_size 400 --eval_iters 1 --save_interval 2 --resume"]
    said = forked_ok(output_dir, *flags, processes=processes)
    examples = (output_dir / "examples.jsonl").read_bytes()
    assert len(examples.splitlines()) == 20
    assert [shlex.split(command)[3] for command in commands(said)] == [
        f"{output_dir}/examples.jsonl"
    ] * 3
    (output_dir / "examples.jsonl").unlink()
    again = forked_ok(output_dir, *flags, processes=processes)
    assert "resuming after step 2" in again
    assert again.splitlines()[-5:] == said.splitlines()[-5:]
    assert (output_dir / "examples.jsonl").read_bytes() == examples


# --------------------------------------------------------------------------------------------------
# Killed runs


def kill_in_save(n):
    """Kill the process at the n-th operation on files and directories of its first save."""
    save, count, watching = run_directory.save_checkpoint, itertools.count(1), []

    def hook(event, arguments):
        operation = event in ("os.mkdir", "os.rename", "os.remove", "os.rmdir")
        if event == "open" and "checkpoints" in str(arguments[0]):
            operation = True
        if watching and operation and next(count) == n:
            os.kill(os.getpid(), signal.SIGKILL)

    def watched(*arguments):
        run_directory.save_checkpoint = save
        watching.append(True)
        save(*arguments)
        watching.clear()

    run_directory.save_checkpoint = watched
    sys.addaudithook(hook)


def kill_rank_in_save(rank, n):
    if os.environ["RANK"] == str(rank):
        kill_in_save(n)


def test_killed_at_every_operation_of_a_save(small, undisturbed, tmp_path):
    """Each process resumes from the last checkpoint, and is killed one operation later."""
    output_dir, newest = tmp_path / "out", 0
    flags = [*small, "--save_interval 1 --keep_checkpoints 1 --resume"]
    for killed in itertools.count():
        status, _ = forked(output_dir, *flags, before=functools.partial(kill_in_save, killed + 1))
        if status != [-9]:
            break
        steps = checkpoint_steps(output_dir / "checkpoints")
        whole, _ = newest_checkpoint(output_dir / "checkpoints", Process())
        assert whole == max(steps, default=0) >= newest
        newest = whole
    assert status == [0] and killed > 10 and 0 < newest < 12
    same_bits(output_dir, undisturbed)


def test_killed_at_any_time(small, undisturbed, tmp_path):
    """From outside, at times drawn at random. Each run gets further than the one before it.

    A run that is not killed in time waits three steps later.
    """
    output_dir, rng = tmp_path / "out", np.random.default_rng(0)
    for step in (1, 3, 5, 7):
        held = functools.partial(hold_in_step, step + 3)
        ranks = start(output_dir, *small, "--save_interval 1 --resume", before=held)
        wait_for_steps(output_dir, step, ranks[0].is_alive)
        ranks[0].join(0.1 * rng.random())
        ranks[0].kill()
        assert end(ranks)[0] == [-9]
    forked_ok(output_dir, *small, "--resume")
    same_bits(output_dir, undisturbed)


def test_killed_in_a_save_with_two_processes(two, tmp_path):
    """A rank dies before the checkpoint has its name, the other one ends by itself."""
    output_dir = tmp_path / "out"
    for rank, operation in ((1, 1), (0, 8)):
        killed = functools.partial(kill_rank_in_save, rank, operation)
        codes, said = forked(output_dir, *two[1], "--resume", processes=2, before=killed)
        assert codes[rank] == -9 and codes[1 - rank] == 1, said
        assert "waited in vain" in said[1 - rank].strip().splitlines()[-1]
    forked_ok(output_dir, *two[1], "--resume", processes=2)
    same_bits(output_dir, two[0])


def test_only_the_newest_checkpoints_are_kept_and_nothing_else(small, tmp_path):
    output_dir = tmp_path / "out"
    flags = [*small, "--save_interval 2 --keep_checkpoints 3 --resume"]
    killed = functools.partial(signal_in_step, 0, 4, signal.SIGKILL)
    forked(output_dir, *flags, before=killed)
    (output_dir / "checkpoints" / ".step-7.part").mkdir()
    forked_ok(output_dir, *flags)
    left = {path.name for path in (output_dir / "checkpoints").iterdir()}
    assert left == {"step-8", "step-10", "step-12"}


def test_finished_run_ends_at_once_with_the_same_model(small, undisturbed, tmp_path):
    output_dir = shutil.copytree(undisturbed, tmp_path / "out")
    (output_dir / "pytorch_model.bin").unlink()  # killed while it was saved
    said = forked_ok(output_dir, *small, "--resume")
    assert "resuming after step 12" in said and "accuracy after training" in said
    same_bits(output_dir, undisturbed)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_ends_the_run_after_the_step_with_a_checkpoint(number, small, undisturbed, tmp_path):
    output_dir = tmp_path / "out"
    held = functools.partial(hold_in_step, 6)
    ranks = start(output_dir, *small, "--save_interval 0", before=held)
    wait_for_steps(output_dir, 3, ranks[0].is_alive)
    os.kill(ranks[0].pid, number)
    codes, (said,) = end(ranks)
    last = metrics_of(output_dir)[-1]["step"]
    assert codes == [0] and 3 <= last < 12
    assert not (output_dir / "pytorch_model.bin").exists()
    stopped = f"stopped after step {last} of 12, as asked to; the same command with --resume "
    assert stopped + f"continues from {output_dir}/checkpoints/step-{last}" in said
    forked_ok(output_dir, *small, "--save_interval 0 --resume")
    same_bits(output_dir, undisturbed)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize(
    "flags", ["", "--zero_stage 3 --dtype bf16", "--zero_stage 2 --offload --dtype fp16"]
)
def test_on_a_gpu_a_killed_run_resumes_with_the_same_curve(flags, small, tmp_path):
    flags = [*small, "--save_interval 4", flags]
    forked_ok(tmp_path / "whole", *flags, gpu=True)
    killed = functools.partial(signal_in_step, 0, 7, signal.SIGKILL)
    assert forked(tmp_path / "out", *flags, gpu=True, before=killed)[0] == [-9]
    forked_ok(tmp_path / "out", *flags, "--resume", gpu=True)
    same_run(events_of(tmp_path / "whole"), events_of(tmp_path / "out"))


# --------------------------------------------------------------------------------------------------
# Damaged checkpoints


def flip(path, position):
    """Change a bit of the byte at this position."""
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    "damage, expected",
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
    damage, expected, undisturbed, tmp_path, capsys
):
    checkpoints = shutil.copytree(undisturbed / "checkpoints", tmp_path / "checkpoints")
    damage(checkpoints / "step-12")
    step, facts = newest_checkpoint(checkpoints, Process())
    said = capsys.readouterr().out
    assert step == facts["step"] == 8
    assert said.startswith(f"{checkpoints}/step-12: skipped, as it is damaged"), said
    assert expected in said, said


@pytest.mark.parametrize("name, every", [("facts.json", 41), ("sha256.json", 1)])
def test_every_byte_of_facts_and_of_hashes_counts(name, every, undisturbed, tmp_path):
    step = shutil.copytree(undisturbed / "checkpoints" / "step-4", tmp_path / "step-4")
    for position in range(0, (step / name).stat().st_size, every):
        flip(step / name, position)
        assert newest_checkpoint(tmp_path, Process()) == (0, {}), position
        flip(step / name, position)
    assert newest_checkpoint(tmp_path, Process())[0] == 4


def test_damaged_checkpoints_give_way_and_what_is_whole_stays(small, undisturbed, tmp_path):
    """Damaged ones that are newer do not count among those to keep.

    Where none is whole, the run starts anew and keeps the files.
    """
    output_dir = shutil.copytree(undisturbed, tmp_path / "out")
    for step in (8, 12):
        flip(output_dir / "checkpoints" / f"step-{step}" / "__0_0.distcp", 70_000)
    flags = [*small, "--save_interval 5 --keep_checkpoints 1 --resume"]
    killed = functools.partial(signal_in_step, 0, 7, signal.SIGKILL)
    _, (said,) = forked(output_dir, *flags, before=killed)
    for step in (8, 12):
        assert f"step-{step}: skipped, as it is damaged" in said
    assert "resuming after step 4" in said
    assert checkpoint_steps(output_dir / "checkpoints") == [5]
    assert "resuming after step 5" in forked_ok(output_dir, *flags)
    assert checkpoint_steps(output_dir / "checkpoints") == [12]
    same_bits(output_dir, undisturbed)
    flip(output_dir / "checkpoints" / "step-12" / ".metadata", 70)
    said = forked_ok(output_dir, *flags)
    assert "step-12: skipped, as it is damaged" in said and f"{output_dir}/earlier-1" in said
    assert (output_dir / "earlier-1" / "checkpoints" / "step-12").is_dir()
    assert (output_dir / "earlier-1" / "pytorch_model.bin").exists()
    same_bits(output_dir, undisturbed)


# --------------------------------------------------------------------------------------------------
# What a run must agree with to resume


def test_longer_run_with_a_constant_schedule_resumes_where_the_shorter_one_ended(
    small, tmp_path, monkeypatch, capsys
):
    flags = [*small, "--lr_scheduler_type constant --save_interval 6"]
    forked_ok(tmp_path / "one", *flags, "--max_steps 7")
    forked_ok(tmp_path / "one", *flags, "--resume --max_steps 12")
    forked_ok(tmp_path / "other", *flags)
    weights = []
    for name in ("one", "other"):
        weights.append(torch.load(tmp_path / name / "pytorch_model.bin", weights_only=True))
    assert all(torch.equal(weight, weights[1][name]) for name, weight in weights[0].items())
    flags += ["--resume --max_steps 11 --output_dir", tmp_path / "one"]
    line = complaint(monkeypatch, capsys, *flags)
    assert "--max_steps: found 11" in line and "at least 12" in line


@pytest.mark.parametrize(
    "other, expected",
    [
        ("--seed 5", "--seed was 1234 and is 5"),
        ("--learning_rate 2e-3", "--learning_rate was 0.001 and is 0.002"),
        ("--weight_decay 0.1", "--weight_decay"),
        ("--max_grad_norm 2", "--max_grad_norm"),
        ("--lr_scheduler_type linear", "--lr_scheduler_type was 'cosine' and is 'linear'"),
        ("--num_warmup_steps 2", "--num_warmup_steps"),
        ("--max_steps 13", "--max_steps"),
        ("--truncation_side right", "--truncation_side"),
        ("--max_seq_len 63", "--max_seq_len"),
        ("--dropout 0.2", "--dropout"),
        ("--dtype bf16", "--dtype"),
        ("--loss end", "--loss was 'divergent' and is 'end'"),
        ("--center_rewards_coefficient 0.1", "--center_rewards_coefficient was 0.0 and is 0.1"),
        ("--lora_dim 2", "--lora_dim"),
        ("--layout padded", "--layout was 'packed'"),
        ("--n_layer 1", "--n_layer"),
        ("--num_padding_at_beginning 1", "--num_padding_at_beginning"),
        ("--vocab_size 390", "--vocab_size"),
        ("--data_split 1,1,0", "--data_split"),
        ("--per_device_train_batch_size 6", "--per_device_train_batch_size"),
        ("--gradient_accumulation_steps 2", "--gradient_accumulation_steps"),
        ("--gradient_accumulation_steps 2 --seed 5", "--seed was"),
    ],
)
def test_flags_that_change_the_result_are_refused_by_name(
    other, expected, small, undisturbed, monkeypatch, capsys
):
    before = (undisturbed / "metrics.jsonl").read_bytes()
    flags = [*small, other, "--resume --output_dir", undisturbed]
    line = complaint(monkeypatch, capsys, *flags)
    assert f"{undisturbed}/checkpoints/step-12" in line
    assert expected in line and other.split()[0] in line
    assert len(line) < 700, line
    assert (undisturbed / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize("model_type", train.FAMILIES)
def test_run_resumes_with_the_same_flags_or_the_same_batch_made_up_otherwise(
    model_type, small, tmp_path
):
    flags = [*small, f"--model_type {model_type} --max_steps 4"]
    forked_ok(tmp_path / "whole", *flags)
    forked_ok(tmp_path / "out", *flags, "--save_interval 2")
    shutil.rmtree(tmp_path / "out" / "checkpoints" / "step-4")
    accumulated = "--per_device_train_batch_size 4 --gradient_accumulation_steps 3"
    accumulated += f" --micro_batch_tokens {10**6}"
    said = forked_ok(tmp_path / "out", *flags, accumulated, "--resume")
    assert "resuming after step 2" in said
    same_bits(tmp_path / "out", tmp_path / "whole")


def edit_facts(checkpoint, change):
    """Change the facts of a checkpoint, which stays whole: its hashes are written anew."""
    file = checkpoint / "facts.json"
    facts = json.loads(file.read_text())
    change(facts)
    file.write_text(json.dumps(facts))
    (checkpoint / "sha256.json").write_text(json.dumps(run_directory.hashes(checkpoint)))


@pytest.mark.parametrize(
    "change, expected",
    [
        (lambda facts: facts["result"].pop("seed"), "--seed was not recorded and is 1234"),
        (
            lambda facts: facts["result"].pop("config.n_layer"),
            "n_layer of the model's config (--model_name_or_path, --model_type, --n_layer, "
            "--n_head, --n_embd) was not recorded and is 2",
        ),
        (
            lambda facts: facts["result"].update(momentum=0.9),
            "--momentum is unknown to this version of train.py",
        ),
        (
            lambda facts: facts["result"].update({"config.window": None}),
            "window of the model's config (--model_name_or_path, --model_type, --n_layer, "
            "--n_head, --n_embd) is unknown to this version of train.py",
        ),
    ],
    ids=["a flag is missing", "a field is missing", "an unknown flag", "an unknown field"],
)
def test_name_that_one_side_lacks_is_refused(
    change, expected, small, undisturbed, tmp_path, monkeypatch, capsys
):
    output_dir = shutil.copytree(undisturbed, tmp_path / "out")
    edit_facts(output_dir / "checkpoints" / "step-12", change)
    line = complaint(monkeypatch, capsys, *small, "--resume --output_dir", output_dir)
    assert line.startswith(f"train.py: error: --resume: {output_dir}/checkpoints/step-12 ")
    assert f": {expected}; give the same flags, or another --output_dir" in line
    metrics = [path / "metrics.jsonl" for path in (output_dir, undisturbed)]
    assert metrics[0].read_bytes() == metrics[1].read_bytes()


def before_the_redesign(facts):
    """Turn facts into those of commit c0e6c6a, which named each flag by a sentence."""
    result = facts.pop("result")
    del facts["version"]
    facts["same_run"] = {f"--{name}": result[name] for name in ("seed", "learning_rate", "dtype")}


@pytest.mark.parametrize(
    "change, found",
    [(before_the_redesign, "None"), (lambda facts: facts.update(version=99), "99")],
    ids=["before the redesign", "a later version"],
)
def test_checkpoint_of_another_version_is_refused(
    change, found, small, undisturbed, tmp_path, monkeypatch, capsys
):
    output_dir = shutil.copytree(undisturbed, tmp_path / "out")
    edit_facts(output_dir / "checkpoints" / "step-12", change)
    line = complaint(monkeypatch, capsys, *small, "--resume --output_dir", output_dir)
    path = f"{output_dir}/checkpoints/step-12"
    assert line.startswith(f"train.py: error: --resume: {path} was written by another version")
    assert f"version {found}, expected {run_directory.VERSION}" in line
    assert "--output_dir" in line and "\n" not in line
    assert checkpoint_steps(output_dir / "checkpoints") == [12, 8, 4]


def test_differences_name_both_values():
    before = {"seed": 1, "global_batch": 12, "config.n_head": 2, "same": 0, "gone": 3}
    now = {"seed": 2, "global_batch": 6, "config.n_head": 4, "same": 0, "new": 4}
    found = differences(before, now)
    assert [line.partition(" (")[0] for line in found] == [
        "n_head of the model's config",
        "the batch of all processes",
        "--gone is unknown to this version of train.py",
        "--new was not recorded and is 4",
        "--seed was 1 and is 2",
    ]
    assert found[0].endswith(" was 2 and is 4") and found[1].endswith(" was 12 and is 6")
    assert differences(now, dict(now)) == []


def test_differences_say_nothing_of_facts_that_do_not_count():
    """Where dropout differs, the layout counts on one side alone; dropout names the difference."""
    before = {"dropout": 0.0, "layout": ANY}
    found = differences(before, {"dropout": 0.1, "layout": "packed"})
    assert found == ["--dropout was 0.0 and is 0.1"]


# --------------------------------------------------------------------------------------------------
# A full disk


def limit_files(size):
    """Allow this process no file of more than `size` bytes."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def limit_in_step(step, size):
    in_step(step, functools.partial(limit_files, size))


def limit_in_the_end():
    finish = train.finish

    def watched(*arguments):
        limit_files(100_000)
        finish(*arguments)

    train.finish = watched


@pytest.mark.parametrize(
    "before, last",
    [
        (functools.partial(limit_in_step, 6, 300_000), 4),
        (functools.partial(limit_in_step, 6, 10), 4),
        (limit_in_the_end, 12),
    ],
    ids=["a checkpoint", "metrics.jsonl", "the model"],
)
def test_error_of_a_full_disk_names_the_last_checkpoint_which_stays(
    before, last, small, undisturbed, tmp_path
):
    output_dir = tmp_path / "out"
    codes, (said,) = forked(output_dir, *small, "--save_interval 4", before=before)
    line = said.strip().splitlines()[-1]
    assert codes == [1] and "Traceback" not in said, said
    error = f"train.py: error: --output_dir {output_dir}: cannot be written to ("
    assert line.startswith(error) and f"{output_dir}/checkpoints/step-{last}" in line
    forked_ok(output_dir, *small, "--save_interval 4 --resume")
    same_bits(output_dir, undisturbed)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_disk_without_room_is_seen_at_the_start_and_what_is_there_counts(
    small, undisturbed, tmp_path, monkeypatch, capsys
):
    output_dir = shutil.copytree(undisturbed, tmp_path / "out")
    usage = shutil._ntuple_diskusage(10**9, 10**9 - 500_000, 500_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    line = complaint(monkeypatch, capsys, *small, "--output_dir", tmp_path / "new")
    assert f"--output_dir {tmp_path}/new" in line and "--keep_checkpoints" in line
    assert not list((tmp_path / "new").iterdir())
    flags = [*small, "--output_dir", output_dir, "--resume --keep_checkpoints 2"]
    monkeypatch.setattr(sys, "argv", ["train.py", *words(flags)])
    monkeypatch.setattr(train, "stop_signals", list)  # an interrupt stays pytest's
    train.main()  # finished, with three checkpoints
    assert "accuracy after training" in capsys.readouterr().out
