"""Helpers of several test files: files of comparisons, and runs of the programs, some interrupted.

`run` starts a program as a user does. `start`, `end`, `forked` and `forked_ok` start train.py in
processes forked from one that has PyTorch imported, which takes seconds less. They pass arguments
through `words`, so that "--max_steps 12" is two arguments. Tests of one file alone have their
fixtures there.
"""

import os

# Before PyTorch is imported: with tiny models a second thread only waits.
os.environ["OMP_NUM_THREADS"] = "1"

import itertools
import json
import multiprocessing
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from tqdm import tqdm

import data
import train
from parts.flags import parse_flags
from parts.run_directory import HELD

HERE = Path(__file__).resolve().parent
TINY = "--n_layer 2 --n_head 2 --n_embd 32 --max_seq_len 64".split()
# Seconds after which a process counts as hung. No test comes near it, however busy the machine is.
LIMIT = 1800


# They take minutes: started last, one of them would leave the other cores without work.
SLOW_FILES = ("test_gpu_check.py", "test_dry_run.py", "test_train.py", "test_score.py")


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.path.name not in SLOW_FILES)


@pytest.fixture(scope="session", autouse=True)
def token_cache_of_the_session(tmp_path_factory):
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(autouse=True)
def locks_of_a_test():
    """Release the directories of runs in this process, which a run holds until its process ends."""
    yield
    for descriptor in HELD.values():
        os.close(descriptor)
    HELD.clear()


# --------------------------------------------------------------------------------------------------
# Files of comparisons


def write_rows(path, n, seed=0, ranking=()):
    """Write n rows of the built-in data; those numbered in `ranking` get a third response."""
    stream = data.known_rewards(seed)
    with open(path, "w") as file:
        for i, pair in enumerate(itertools.islice(stream, n)):
            chosen, rejected = pair.responses
            row = {"prompt": pair.prompt, "chosen": chosen, "rejected": rejected}
            if i in ranking:
                row = {"prompt": pair.prompt, "responses": [chosen, rejected, " No."]}
            file.write(json.dumps(row) + "\n")
    return path


def read_rows(path):
    """Read the JSON object of every line."""
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="session")
def files(tmp_path_factory):
    """Write 70 comparisons to train on, 21 to evaluate on; the paths. Rankings are among them."""
    folder = tmp_path_factory.mktemp("files")
    training = write_rows(folder / "train.jsonl", 70, ranking={3, 20, 21})
    evaluation = write_rows(folder / "eval.jsonl", 21, seed=9, ranking={5})
    return training, evaluation


@pytest.fixture(scope="session")
def on_files(files):
    """Give the flags to train and evaluate on `files`."""
    return ["--data_path", files[0], "--eval_path", files[1]]


# --------------------------------------------------------------------------------------------------
# Programs, started as a user does


def words(arguments) -> list[str]:
    """Split texts at their spaces, and turn paths and numbers into text."""
    result = []
    for argument in arguments:
        if isinstance(argument, str):
            result += argument.split()
        else:
            result.append(str(argument))
    return result


def run(program, *arguments, processes=0, cwd=None):
    """Run a program of this repository to its end; with `processes`, under torchrun."""
    command = [sys.executable]
    if processes:
        command += ["-m", "torch.distributed.run", "--standalone"]
        command += [f"--nproc_per_node={processes}"]
    command += [HERE / program, *words(arguments)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=LIMIT)


# --------------------------------------------------------------------------------------------------
# train.py in this process


def parsed(monkeypatch, *arguments):
    """Parse flags of train.py, after those of a tiny model."""
    monkeypatch.setattr(sys, "argv", ["train.py", *TINY, *words(arguments)])
    return parse_flags(list(train.FAMILIES), train.LOSSES)


def complaint(monkeypatch, capsys, *arguments) -> str:
    """Run train.py, which must fail. Returns its last line on standard error."""
    monkeypatch.setattr(sys, "argv", ["train.py", *words(arguments)])
    with pytest.raises(SystemExit) as exit:
        train.main()
    assert exit.value.code != 0
    if isinstance(exit.value.code, str):
        return exit.value.code
    return capsys.readouterr().err.strip().splitlines()[-1]


# --------------------------------------------------------------------------------------------------
# train.py in forked processes

FORKS = multiprocessing.get_context("forkserver")
# The optimizer imports torch._dynamo, and some files of tests transformers: each takes seconds.
FORKS.set_forkserver_preload(["conftest", "torch._dynamo", "transformers", "pyarrow.parquet"])
SMALL = [*TINY, *"--vocab_size 400 --max_steps 12 --eval_interval 6 --dropout 0.1".split()]


def one_rank(arguments, pipe, environment, before):
    """Run train.py in this process, which prints into a named pipe. `before` is called first."""
    for stream in (1, 2):
        os.dup2(os.open(pipe, os.O_WRONLY), stream)
    os.environ |= environment
    tqdm.set_lock(threading.RLock())  # its own one would be left over where the process is killed
    sys.argv = ["train.py", *arguments]
    before()
    train.main()


def start(output_dir, *arguments, processes=1, before=int, gpu=False, last=(), variables=None):
    """Start train.py with these flags, on so many ranks. Returns the processes.

    before: a function without arguments that each process calls first; to hook into the run.
    last, variables: more flags, and environment variables, of the last rank alone.
    """
    arguments = [*words(arguments), "--output_dir", str(output_dir)]
    with socket.create_server(("localhost", 0)) as free:
        port = free.getsockname()[1]
    ranks = []
    for rank in range(processes):
        environment = {} if gpu else {"CUDA_VISIBLE_DEVICES": ""}
        if processes > 1:
            environment |= {"RANK": f"{rank}", "LOCAL_RANK": f"{rank}"}
            environment |= {"WORLD_SIZE": f"{processes}"}
            environment |= {"MASTER_ADDR": "localhost", "MASTER_PORT": f"{port}"}
        if rank == processes - 1:
            arguments = [*arguments, *words(last)]
            environment |= variables or {}
        # A pipe is no file: the tests of a full disk limit the size of files.
        pipe = f"{output_dir}.{rank}"
        os.mkfifo(pipe)
        how = (arguments, pipe, environment, before)
        process = FORKS.Process(target=one_rank, args=how, name=pipe)
        process.said = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
        process.start()
        ranks.append(process)
    return ranks


def end(ranks):
    """Wait for processes of `start`. Returns the exit statuses, and what each process printed."""
    for process in ranks:
        process.join(LIMIT)
        process.kill()  # one that hangs
        process.join()
    said = [os.read(process.said, 2**16).decode() for process in ranks]
    for process in ranks:
        os.close(process.said)
        os.unlink(process.name)
    return [process.exitcode for process in ranks], said


def forked(output_dir, *arguments, **how):
    """Run train.py to its end, as `start` and `end` say."""
    return end(start(output_dir, *arguments, **how))


def forked_ok(output_dir, *arguments, **how):
    """Run train.py, which must succeed on all ranks. Returns what rank 0 printed."""
    codes, said = forked(output_dir, *arguments, **how)
    assert set(codes) == {0}, said
    return said[0]


@pytest.fixture(scope="session")
def built_in_run(tmp_path_factory):
    """Train three steps on the built-in data: the directory, what the run printed, its events."""
    output_dir = tmp_path_factory.mktemp("built_in") / "out"
    said = forked_ok(output_dir, *TINY, "--max_steps 3 --eval_interval 2 --eval_iters 4")
    return output_dir, said, events_of(output_dir)


@pytest.fixture(scope="session")
def small(on_files):
    """Give the flags of a run of 12 steps on `files`, with dropout."""
    return [*SMALL, *on_files, "--per_device_train_batch_size 12"]


@pytest.fixture(scope="session")
def two(small, tmp_path_factory):
    """Train on two processes, with checkpoints at steps 4, 8 and 12: the directory, and the flags.

    Where a process is lost, gloo says so at once; the time-out is for processes that only wait.
    """
    output_dir = tmp_path_factory.mktemp("two") / "out"
    arguments = [*small, "--per_device_train_batch_size 3 --gradient_accumulation_steps 2"]
    arguments += ["--micro_batch_tokens 300 --save_interval 4", "--process_timeout", LIMIT]
    forked_ok(output_dir, *arguments, processes=2)
    return output_dir, arguments


@pytest.fixture(scope="session")
def stage_0(small, tmp_path_factory):
    """Train on one process without dropout: the directory, and the flags of a run on two."""
    output_dir = tmp_path_factory.mktemp("stage_0") / "out"
    arguments = [*small, "--dropout 0"]
    forked_ok(output_dir, *arguments)
    arguments += ["--per_device_train_batch_size 6 --micro_batch_tokens 300 --save_interval 4"]
    return output_dir, arguments


# --------------------------------------------------------------------------------------------------
# Interruptions: functions for `before`, and what waits for the run that they hook into


def in_step(step, act):
    """Call `act` as the run begins this step."""
    batches_after = train.batches_after

    def watched(done, *arguments):
        for number, batch in enumerate(batches_after(done, *arguments), start=done + 1):
            if number == step:
                act()
            yield batch

    train.batches_after = watched


def signal_in_step(rank, step, number):
    """Have the process of this rank signal itself as it begins this step, in its first life."""
    restarts = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    if os.environ.get("RANK", "0") == str(rank) and restarts == "0":
        in_step(step, lambda: os.kill(os.getpid(), number))


def hold_in_step(step):
    """Hold the run as it begins this step, until a signal comes."""
    stop_signals, received = train.stop_signals, []

    def watched():
        received.append(stop_signals())
        return received[0]

    def hold():
        while not received[0]:
            time.sleep(0.01)

    train.stop_signals = watched
    in_step(step, hold)


def wait_for_steps(output_dir, n, is_alive):
    """Wait until metrics.jsonl has n steps. The run must stay alive until then."""
    metrics = output_dir / "metrics.jsonl"
    while not metrics.exists() or metrics.read_text().count('"step", "step"') < n:
        assert is_alive()
        time.sleep(0.02)


def wait_for_stop(process):
    """Wait until a signal has stopped a process (state T, man 5 proc). It must stay alive."""
    while Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[0] != "T":
        assert process.is_alive()
        time.sleep(0.02)


def in_float64():
    """Have train.py make new models in float64."""
    new_model = train.new_model
    train.new_model = lambda *arguments: new_model(*arguments).double()


# --------------------------------------------------------------------------------------------------
# What a run has left


def events_of(output_dir):
    """Read metrics.jsonl: {"step": the events of steps, "eval": those of evaluations}."""
    events = {"step": [], "eval": []}
    for event in read_rows(output_dir / "metrics.jsonl"):
        events[event["event"]].append(event)
    return events


def metrics_of(output_dir):
    """Read metrics.jsonl, without the time that steps took."""
    events = read_rows(output_dir / "metrics.jsonl")
    return [{name: value for name, value in event.items() if name != "seconds"} for event in events]


def same_run(one, other):
    """Compare the events of two runs: numbers to 1e-4, and the same pairs."""
    for kind, key in (
        ("step", "loss"),
        ("step", "grad_norm"),
        ("eval", "loss"),
        ("eval", "margin"),
    ):
        expected = [event[key] for event in one[kind]]
        assert [event[key] for event in other[kind]] == pytest.approx(expected, abs=1e-4), key
    for kind in ("step", "eval"):
        assert [event["pairs"] for event in other[kind]] == [event["pairs"] for event in one[kind]]


def same_bits(output_dir, expected):
    """Compare metrics and weights of two runs, to the bit."""
    assert metrics_of(output_dir) == metrics_of(expected)
    weights = [path / "pytorch_model.bin" for path in (output_dir, expected)]
    assert weights[0].read_bytes() == weights[1].read_bytes()
