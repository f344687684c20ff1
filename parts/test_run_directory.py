"""A run's directory: nothing is lost when a run is killed, a file damaged, or the disk full."""

import functools
import io
import itertools
import json
import math
import os
import pickle
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch

import data
import rm
import train
from conftest import (
    FORKS,
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
    read_rows,
    same_bits,
    same_run,
    signal_in_step,
    start,
    wait_for_steps,
    words,
)
from parts import run_directory
from parts.distributed import Process
from parts.run_directory import RunDirectory, checkpoint_steps, newest_checkpoint, shell_word
from parts.tensor_files import own_rows

STEP = {"event": "step", "loss": 0.5, "lr": 0.1, "grad_norm": 1.0}
STEP |= {"pairs": 4, "tokens": 40, "seconds": 0.1}
EVAL = {"event": "eval", "loss": 0.5, "accuracy": 0.5, "pairs": 4}


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
        run = RunDirectory(tmp_path, 2, Process())
        run.open({}, 0, 1000, 2000, saves_checkpoints=False)
        run.log(**STEP, step=number)
    assert (tmp_path / "earlier-1" / "pytorch_model.bin").read_text() == "model 1"
    assert (tmp_path / "earlier-2" / "pytorch_model.bin").read_text() == "model 2"
    metrics = (tmp_path / "earlier-2" / "metrics.jsonl").read_text()
    assert json.loads(metrics) == {**STEP, "step": 1}
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
    run = RunDirectory(tmp_path, 2, Process())
    run.open({}, 0, 1000, 2000, saves_checkpoints=False)
    for step in (1, 2, 3):
        run.log(**STEP | {"loss": float("nan")}, step=step)
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"event": "step", "st')
    assert [event["step"] for event in run.events()] == [1, 2, 3]
    resumed = RunDirectory(tmp_path, 2, Process())
    resumed.open({}, 2, 1000, 2000, saves_checkpoints=False)
    resumed.log(**EVAL, step=2)
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
    run = RunDirectory(tmp_path, 2, Process())
    expected = list(itertools.islice(data.known_rewards(0), 20))
    path = run.write_examples(data.known_rewards(0))
    assert path == tmp_path / "examples.jsonl"
    found = [(pair.prompt, pair.responses) for pair in data.load_comparisons(path)]
    assert found == [(pair.prompt, pair.responses) for pair in expected]
    for row in map(json.loads, path.read_text().splitlines()):
        assert list(row) == ["prompt", "chosen", "rejected"]


def test_next_commands_are_quoted_and_start_this_python_and_rm_py_from_here(tmp_path, monkeypatch):
    (tmp_path / "a b.jsonl").write_text("")
    run = RunDirectory("it's out", 2, Process())
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
# Two runs in one directory


def test_second_run_is_refused_at_once_and_the_first_goes_on(small, undisturbed, tmp_path):
    """The error names the process, and stands alone: nothing was prepared, or moved away."""
    output_dir = tmp_path / "out"
    first = start(
        output_dir, *small, "--save_interval 4", before=functools.partial(hold_in_step, 6)
    )
    wait_for_steps(output_dir, 5, first[0].is_alive)
    for flags in ([], ["--resume"]):
        said = refusal(output_dir, *small, *flags)
        line = f"train.py: error: --output_dir {output_dir}: process {first[0].pid} on "
        assert said.startswith(line) and len(said.splitlines()) == 1, said
    assert not (output_dir / "earlier-1").exists()
    os.kill(first[0].pid, signal.SIGTERM)
    assert end(first)[0] == [0]
    forked_ok(output_dir, *small, "--save_interval 4 --resume")
    same_bits(output_dir, undisturbed)


def refusal(output_dir, *arguments):
    """Start train.py in a directory in which another run is; it must fail. What it says."""
    pipe = output_dir.parent / "second"
    codes, (said,) = forked(pipe, *arguments, last=["--output_dir", output_dir])
    assert codes == [1], said
    return said


def test_killed_run_leaves_no_lock(small, tmp_path):
    output_dir = tmp_path / "out"
    killed = functools.partial(signal_in_step, 0, 4, signal.SIGKILL)
    assert forked(output_dir, *small, before=killed)[0] == [-9]
    assert (output_dir / ".lock").exists()
    forked_ok(output_dir, *small, "--max_steps 1")


def hold_directory(directory, pipe):
    """Lock a directory, as a run does, until something is sent through the pipe."""
    directory.mkdir()
    run_directory.hold(directory)
    pipe.send("locked")
    pipe.recv()


def test_directory_that_another_run_makes_meanwhile_is_refused(tmp_path):
    """Both start without it, and prepare their data; the second to finish finds it locked."""
    output_dir = tmp_path / "out"
    run = RunDirectory(output_dir, 2, Process())
    ours, theirs = FORKS.Pipe()
    other = FORKS.Process(target=hold_directory, args=(output_dir, theirs))
    other.start()
    assert ours.recv() == "locked"
    with pytest.raises(ValueError, match=f"--output_dir {output_dir}: process {other.pid} on "):
        run.open({}, 0, 1000, 2000, saves_checkpoints=False)
    ours.send("end")
    other.join()
    run.open({}, 0, 1000, 2000, saves_checkpoints=False)
    assert (output_dir / ".lock").read_text().startswith(f"process {os.getpid()} on ")


def test_lock_is_no_link_to_follow(tmp_path):
    (tmp_path / "notes.txt").write_text("a user's")
    (tmp_path / ".lock").symlink_to(tmp_path / "notes.txt")
    with pytest.raises(ValueError, match="--output_dir .* cannot be written to"):
        RunDirectory(tmp_path, 2, Process())
    assert (tmp_path / "notes.txt").read_text() == "a user's"


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


def test_what_a_killed_run_was_writing_is_gone_after_the_next_start(small, undisturbed, tmp_path):
    output_dir = shutil.copytree(undisturbed, tmp_path / "out")
    unfinished = ["metrics.jsonl", "report.html", "pytorch_model.bin", "model.safetensors"]
    for name in unfinished:
        (output_dir / f"{name}.part").write_text("half")
    (output_dir / "checkpoints" / ".step-13.part").mkdir()
    (output_dir / "checkpoints" / ".step-4.old").mkdir()
    (output_dir / "notes.part").write_text("a user's")
    forked_ok(output_dir, *small, "--resume")
    assert [path.name for path in output_dir.glob("*.part")] == ["notes.part"]
    assert not list((output_dir / "checkpoints").glob(".*"))


def test_a_directory_by_links_is_trained_into(small, undisturbed, tmp_path):
    """The links stay, those of files in it, too, and the model is that of any other run."""
    (tmp_path / "there").mkdir()
    (tmp_path / "out").symlink_to("there")
    (tmp_path / "there" / "metrics.jsonl").symlink_to("../metrics")
    said = forked_ok(tmp_path / "out", *small)
    assert "earlier run" not in said
    forked_ok(tmp_path / "out", *small, "--resume")
    assert (tmp_path / "out").is_symlink() and (tmp_path / "there" / "metrics.jsonl").is_symlink()
    same_bits(tmp_path / "there", undisturbed)
    (tmp_path / "dangling").symlink_to("nowhere")
    (code,), (said,) = forked(tmp_path / "dangling", *small)
    last = said.splitlines()[-1]
    assert code == 1 and last.startswith("train.py: error: --output_dir") and "dangling" in last


@pytest.mark.parametrize(
    "word",
    ["a/b", "a b", "it's", "\x1b]52;c;aGk=\x07'\\n\\", "\n\u202eé\u009b日", "\udcff", "", "\x071"],
)
def test_a_word_of_a_command_is_visible_and_read_as_it_is(word):
    quoted = shell_word(word)
    assert quoted.isprintable()
    done = subprocess.run(["bash", "-c", f"printf %s {quoted}"], capture_output=True, check=True)
    assert os.fsdecode(done.stdout) == word


def test_finished_run_ends_at_once_with_the_same_model(small, undisturbed, tmp_path):
    output_dir = shutil.copytree(undisturbed, tmp_path / "out")
    (output_dir / "pytorch_model.bin").unlink()  # killed while it was saved
    said = forked_ok(output_dir, *small, "--resume")
    assert "resuming after step 12" in said and "accuracy after training" in said
    same_bits(output_dir, undisturbed)


def test_a_resumed_run_does_not_take_a_later_evaluation_for_that_before_training(
    small, undisturbed, tmp_path
):
    output_dir = shutil.copytree(undisturbed, tmp_path / "out")
    lines = (output_dir / "metrics.jsonl").read_text().splitlines(keepends=True)
    (output_dir / "metrics.jsonl").write_text("".join(lines[-2:]))
    said = forked_ok(output_dir, *small, "--resume")
    assert f"{output_dir}/metrics.jsonl: the lines of 11 steps of 12 are missing" in said
    assert "accuracy before training: not known; metrics.jsonl has no evaluation at step 0" in said
    assert re.search(r"accuracy after training: 0\.\d+ ", said) and " before, " not in said


def test_a_pipe_in_place_of_the_metrics_is_refused(small, undisturbed, tmp_path):
    output_dir = shutil.copytree(undisturbed, tmp_path / "out")
    (output_dir / "metrics.jsonl").unlink()
    os.mkfifo(output_dir / "metrics.jsonl")
    codes, (said,) = forked(output_dir, *small, "--resume")
    assert codes == [1]
    assert f"{output_dir}/metrics.jsonl: is a named pipe; expected a file" in said


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
    "flags",
    [
        "",
        "--zero_stage 3 --dtype bf16",
        "--zero_stage 2 --offload --dtype fp16",
        # Without dropout flash attention computes.
        "--dtype bf16 --dropout 0",
        "--zero_stage 3 --dtype bf16 --dropout 0",
        "--zero_stage 2 --offload --dtype fp16 --dropout 0",
        "--dtype bf16 --dropout 0 --compile",
    ],
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
            lambda step: os.truncate(step / "rank-0.safetensors", 1000),
            "rank-0.safetensors is not what was written",
        ),
        (
            lambda step: flip(step / "rank-0.safetensors", 300_000),
            "rank-0.safetensors is not what was written",
        ),
        (lambda step: (step / ".metadata").write_text("x"), ".metadata is not what was written"),
        (lambda step: flip(step / "facts.json", 24), "facts.json is not what was written"),
        (lambda step: os.truncate(step / "facts.json", 300), "facts.json is not what was written"),
        (lambda step: (step / "facts.json").write_text("{}"), "facts.json is not what was written"),
        (lambda step: (step / "facts.json").unlink(), "facts.json is missing"),
        (lambda step: (step / "sha256.json").unlink(), "sha256.json"),
        (lambda step: (step / "sha256.json").write_text("{}"), "is not what was written"),
        (lambda step: (step / "sha256.json").write_text("[]"), "step-12"),
        (lambda step: (step / "rank-0.safetensors").unlink(), "rank-0.safetensors is missing"),
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
        flip(output_dir / "checkpoints" / f"step-{step}" / "rank-0.safetensors", 70_000)
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
    flip(output_dir / "checkpoints" / "step-12" / "rank-0.safetensors", 70)
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


@pytest.mark.parametrize("model_type", ["gpt2", "opt", "llama", "gpt_neox"])
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
    """Change the facts of a checkpoint, which stays whole."""
    file = checkpoint / "facts.json"
    facts = json.loads(file.read_text())
    change(facts)
    file.write_text(json.dumps(facts))
    rehash(checkpoint)


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


# --------------------------------------------------------------------------------------------------
# Wrong content with right checksums


def rehash(checkpoint):
    """Write the checksums of a checkpoint anew, as an attacker can: it is whole again."""
    (checkpoint / "sha256.json").write_text(json.dumps(run_directory.hashes(checkpoint)))


class Payload:
    """An object whose pickle makes a directory when it is loaded."""

    def __init__(self, directory):
        self.directory = directory

    def __reduce__(self):
        return os.mkdir, (str(self.directory),)


def payloads(directory):
    """Return a pickle that makes this directory: plain, and as torch.save writes it."""
    zipped = io.BytesIO()
    torch.save(Payload(directory), zipped)
    plain = pickle.dumps(Payload(directory), protocol=2)
    return {"pickle": plain, "torch.save": zipped.getvalue()}


def resume_here(output_dir, flags, monkeypatch) -> bool:
    """Run train.py --resume in this process; whether it succeeded."""
    arguments = words([*flags, "--resume --output_dir", output_dir])
    monkeypatch.setattr(sys, "argv", ["train.py", *arguments])
    monkeypatch.setattr(train, "stop_signals", list)  # an interrupt stays pytest's
    try:
        train.main()
    except SystemExit:
        return False
    return True


def test_payloads_run_where_pickles_are_trusted(tmp_path):
    content = payloads(tmp_path / "ran")
    pickle.loads(content["pickle"])
    (tmp_path / "ran").rmdir()
    torch.load(io.BytesIO(content["torch.save"]), weights_only=False)
    (tmp_path / "ran").rmdir()


@pytest.mark.parametrize("kind", ["pickle", "torch.save"])
@pytest.mark.parametrize("in_front", [False, True], ids=["alone", "in front"])
@pytest.mark.parametrize(
    "name",
    [
        "checkpoints/step-12/rank-0.safetensors",
        "checkpoints/step-12/facts.json",
        "checkpoints/step-12/sha256.json",
        "checkpoints/step-12/.metadata",  # as PyTorch's own checkpoints have it
        "checkpoints/step-12/__0_0.distcp",
        "metrics.jsonl",
        "pytorch_model.bin",
        "config.json",
        "tokenizer.model",
        ".lock",
    ],
)
def test_nothing_in_a_run_directory_runs(
    name, in_front, kind, small, undisturbed, tmp_path, monkeypatch
):
    """Resuming from it, and loading its model and tokenizer: an error, or all goes well."""
    output_dir = shutil.copytree(undisturbed, tmp_path / "out")
    file = output_dir / name
    content = payloads(tmp_path / "ran")[kind]
    if in_front and file.exists():
        content += file.read_bytes()
    file.write_bytes(content)
    if file.parent.name == "step-12" and file.name != "sha256.json":
        rehash(file.parent)
    for load in (rm.RewardModel.from_pretrained, data.load_tokenizer):
        try:
            load(output_dir)
        except ValueError:
            pass
    is_resumed = resume_here(output_dir, small, monkeypatch)
    assert is_resumed or file.name == "rank-0.safetensors"
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "facts, found",
    [
        (None, "expected an object, found NoneType"),
        ([1], "expected an object, found list"),
        ({"scaler": ...}, "scaler is None"),
        ({"scaler": None}, "scaler is None"),
        ({"scaler": {"scale": "1"}}, "scaler is {'scale': '1'}"),
        ({"result": [1]}, "result is [1]"),
        ({"result": ...}, "result is None"),
        ({"step": 8}, "step is 8"),
        ({"step": "12"}, "step is '12'"),
        ({"skipped": [1]}, "skipped is [1]"),
        ({"skipped": {"1": 2}}, "skipped is {'1': 2}"),
        ({"processes": [1, 2]}, "processes is [1, 2]"),
        ({"threads": 1}, "threads is 1"),
        ("[" * 100_000, "recursion"),
        ("\0" * 300, "Expecting value"),
    ],
)
def test_facts_that_no_run_has_written_are_skipped_by_name(
    facts, found, small, undisturbed, tmp_path, capsys
):
    """... stands for a fact that is missing."""
    checkpoints = shutil.copytree(undisturbed / "checkpoints", tmp_path / "checkpoints")
    file = checkpoints / "step-12" / "facts.json"
    if isinstance(facts, dict):
        facts = json.loads(file.read_text()) | facts
        facts = {name: value for name, value in facts.items() if value is not ...}
    file.write_text(facts if isinstance(facts, str) else json.dumps(facts))
    rehash(checkpoints / "step-12")
    assert newest_checkpoint(checkpoints, Process())[0] == 8
    said = capsys.readouterr().out
    assert said.startswith(f"{checkpoints}/step-12: skipped, as it is damaged: ")
    assert found in said


def test_scaler_of_a_run_without_one_is_refused_by_name(
    small, undisturbed, tmp_path, monkeypatch, capsys
):
    flags = [*small, "--dtype fp16 --save_interval 6"]
    forked_ok(tmp_path / "out", *flags)
    checkpoint = tmp_path / "out" / "checkpoints" / "step-12"
    edit_facts(checkpoint, lambda facts: facts.update(scaler={}))
    line = complaint(monkeypatch, capsys, *flags, "--resume --output_dir", tmp_path / "out")
    assert f"{checkpoint}/facts.json: scaler is not as it was saved" in line


def test_what_is_no_file_in_a_checkpoint_makes_it_damaged(undisturbed, tmp_path, capsys):
    checkpoints = shutil.copytree(undisturbed / "checkpoints", tmp_path / "checkpoints")
    os.mkfifo(checkpoints / "step-12" / "pipe")
    (checkpoints / "step-8" / "directory").mkdir()
    assert newest_checkpoint(checkpoints, Process())[0] == 4
    said = capsys.readouterr().out
    assert "pipe is no file" in said and "directory is no file" in said


GOOD = json.dumps(STEP | {"step": 1}).encode()


@pytest.mark.parametrize(
    "line",
    [
        b"{}",
        b"5",
        b"null",
        b"[" * 100_000,
        b"\0" * 300,
        b'{"event": "step", "note": "\xc3',
        GOOD[: len(GOOD) // 2],
        json.dumps(EVAL | {"step": 1, "pairs": None}).encode(),
        json.dumps(STEP | {"step": "1"}).encode(),
        json.dumps(STEP | {"step": 1, "loss": "0.5"}).encode(),
        json.dumps(STEP | {"step": 1, "event": ["step"]}).encode(),
        json.dumps(STEP | {"step": 1, "lr": float("nan")}).encode(),
        json.dumps(STEP | {"step": 1, "seconds": 10**400}).encode(),
        json.dumps(EVAL | {"step": 1, "ece": [0.5]}).encode(),
        json.dumps({"event": "step", "step": 1}).encode(),
    ],
)
@pytest.mark.parametrize("is_last", [False, True])
def test_line_of_metrics_that_is_no_event_is_skipped_and_named(line, is_last, tmp_path, capsys):
    """All other lines are kept, up to the step that the run resumes at."""
    lines = [json.dumps(STEP | {"step": step}).encode() for step in (1, 2, 3)]
    lines.insert(3 if is_last else 1, line)
    ends = b"" if is_last else b"\n"
    (tmp_path / "metrics.jsonl").write_bytes(b"\n".join(lines) + ends)
    run = RunDirectory(tmp_path, 2, Process())
    run.open({}, 2, 1000, 2000, saves_checkpoints=False)
    assert [event["step"] for event in read_rows(tmp_path / "metrics.jsonl")] == [1, 2]
    said = capsys.readouterr().out
    number = 4 if is_last else 2
    assert f"{tmp_path}/metrics.jsonl: line {number} skipped" in said


def test_run_resumes_after_a_power_failure_with_what_is_whole(small, undisturbed, tmp_path):
    """The last lines of metrics.jsonl were not on the disk yet; those of the checkpoint were."""
    output_dir = shutil.copytree(undisturbed, tmp_path / "out")
    shutil.rmtree(output_dir / "checkpoints" / "step-12")
    metrics = output_dir / "metrics.jsonl"
    lines = metrics.read_bytes().splitlines(keepends=True)
    assert json.loads(lines[10])["step"] == 9
    metrics.write_bytes(b"".join(lines[:10]) + lines[10][:40] + b"\0" * 700)
    said = forked_ok(output_dir, *small, "--resume")
    assert "resuming after step 8" in said and f"{metrics}: line 11 skipped" in said
    same_bits(output_dir, undisturbed)


# --------------------------------------------------------------------------------------------------
# Another machine


def two_threads():
    torch.set_num_threads(2)


def test_another_number_of_threads_is_named(small, undisturbed, tmp_path):
    output_dir = shutil.copytree(undisturbed, tmp_path / "out")
    shutil.rmtree(output_dir / "checkpoints" / "step-12")
    said = forked_ok(output_dir, *small, "--resume --save_interval 4", before=two_threads)
    line = "step-8 was computed with 1 threads, this run has 2 (OMP_NUM_THREADS): rounding differs"
    assert line in said, said
    shutil.rmtree(output_dir / "checkpoints" / "step-12")
    assert "was computed with" not in forked_ok(output_dir, *small, "--resume")


# --------------------------------------------------------------------------------------------------
# Numbers that are not finite


def spoil_in_step(step, value, rank="0"):
    """Have the optimizer's step spoil the embedding of the last token, which no text has."""
    optimizers, make_optimizer = [], train.make_optimizer

    def watched(*arguments):
        optimizers.append(make_optimizer(*arguments))
        optimizers[0].register_step_post_hook(spoil)
        return optimizers[0]

    def spoil(optimizer, *_):
        if next(steps) == step and os.environ.get("RANK", "0") == rank:
            weight = optimizer.param_groups[0]["params"][0].detach()
            own_rows(weight)[0][-1, -1] = value

    steps = itertools.count(1)
    train.make_optimizer = watched


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("step", [8, 12], ids=["a checkpoint", "the last step"])
def test_weights_that_are_not_finite_are_in_no_checkpoint(step, value, small, tmp_path):
    output_dir = tmp_path / "out"
    before = functools.partial(spoil_in_step, step, value)
    codes, (said,) = forked(
        output_dir, *small, "--save_interval 4 --eval_interval 0", before=before
    )
    assert codes == [1], said
    line = said.strip().splitlines()[-1]
    assert (
        f"after step {step} model.backbone.embed.weight is not finite, so no checkpoint is" in line
    )
    assert f"the last whole checkpoint is {output_dir}/checkpoints/step-{step - 4}." in line
    assert max(checkpoint_steps(output_dir / "checkpoints")) == step - 4
    assert not (output_dir / "pytorch_model.bin").exists()


def test_weights_of_one_rank_that_are_not_finite_end_all_ranks(two, tmp_path):
    before = functools.partial(spoil_in_step, 8, math.nan, rank="1")
    flags = [*two[1], "--zero_stage 3"]
    codes, said = forked(tmp_path / "out", *flags, processes=2, before=before)
    assert codes == [1, 1], said
    for text in said:
        assert "is not finite, so no checkpoint is saved of it" in text.strip().splitlines()[-1]
    assert checkpoint_steps(tmp_path / "out" / "checkpoints") == [4]


# --------------------------------------------------------------------------------------------------
# A full disk


def limit_files(size):
    """Allow this process no file of more than `size` bytes."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def limit_in_step(step, size):
    in_step(step, functools.partial(limit_files, size))


def limit_rank_in_step(rank, step, size):
    if os.environ["RANK"] == str(rank):
        limit_in_step(step, size)


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
    assert not list(output_dir.rglob("*.part"))
    forked_ok(output_dir, *small, "--save_interval 4 --resume")
    same_bits(output_dir, undisturbed)


@pytest.mark.parametrize("rank", [0, 1])
def test_full_disk_of_one_rank_ends_all_with_the_same_line(rank, two, tmp_path):
    """The disk takes no 20 KB; with sharded weights both ranks write into a checkpoint."""
    output_dir = tmp_path / "out"
    before = functools.partial(limit_rank_in_step, rank, 6, 20_000)
    codes, said = forked(output_dir, *two[1], "--zero_stage 3", processes=2, before=before)
    assert codes == [1, 1], said
    for text in said:
        line = text.strip().splitlines()[-1]
        assert "cannot be written to ([Errno 27] File too large); the last whole" in line, text
        assert f"{output_dir}/checkpoints/step-4" in line
    assert checkpoint_steps(output_dir / "checkpoints") == [4]
    assert not list(output_dir.rglob("*.part"))


def test_disk_without_room_is_seen_at_the_start_and_what_is_there_counts(
    small, undisturbed, tmp_path, monkeypatch, capsys
):
    output_dir = shutil.copytree(undisturbed, tmp_path / "out")
    usage = shutil._ntuple_diskusage(10**9, 10**9 - 500_000, 500_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    line = complaint(monkeypatch, capsys, *small, "--output_dir", tmp_path / "new")
    assert f"--output_dir {tmp_path}/new" in line and "--keep_checkpoints" in line
    assert [path.name for path in (tmp_path / "new").iterdir()] == [".lock"]
    # AdamW has no moments of weights that are frozen.
    frozen = ["--lora_dim 4 --only_optimize_lora --save_interval 0 --output_dir", tmp_path / "lora"]
    monkeypatch.setattr(sys, "argv", ["train.py", *words([*small, *frozen])])
    monkeypatch.setattr(train, "stop_signals", list)  # an interrupt stays pytest's
    train.main()
    flags = [*small, "--output_dir", output_dir, "--resume --keep_checkpoints 2"]
    monkeypatch.setattr(sys, "argv", ["train.py", *words(flags)])
    train.main()  # finished, with three checkpoints
    assert "accuracy after training" in capsys.readouterr().out
