"""The directory of a run, --output_dir: checkpoints, metrics, examples, earlier runs; signals.

It knows neither the loop (train.py) nor what a model's files hold (parts/huggingface.py). A
checkpoint, checkpoints/step-N, is whole or not there.
"""

import itertools
import json
import math
import os
import shlex
import shutil
import signal
import sys
import warnings
from collections.abc import Iterable
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from parts.distributed import lost_process
from parts.flags import REPOSITORY
from parts.guards import counted
from parts.huggingface import WEIGHT_FILES
from parts.metrics import Writer
from parts.token_cache import file_hash
from parts.tokenizers import CONFIG_FILES, TOKENIZER_FILES

VERSION = 3  # of the facts in a checkpoint
EXAMPLES = 20  # comparisons in examples.jsonl
ANY = "any"  # the value of a fact that does not count, since another fact says so

# How an error calls what a result follows from; everything else is a flag of its name.
DESCRIPTIONS = {
    "global_batch": "the batch of all processes (--per_device_train_batch_size, "
    "--gradient_accumulation_steps)",
    "total_steps": "the number of steps (--max_steps, --num_train_epochs)",
    "config": "the model's config (--model_name_or_path, --model_type, --n_layer, --n_head, "
    "--n_embd)",
    "padding": "the pad id (--pad_id, --num_padding_at_beginning)",
    "tokenizer": "the tokenizer (--tokenizer_path, --vocab_size)",
    "training_data": "the training data, or how it is read (--data_path, --data_split, "
    "--eval_path, --eval_fraction, --fields, --ignore_fields, --text_as, --eval_by, "
    "--skip_bad_rows)",
}

# PyTorch says so at every checkpoint of a single process.
warnings.filterwarnings("ignore", "torch.distributed is disabled")


class RunDirectory:
    """The files of one run, written by rank 0; checkpoints by all ranks.

    result: what the weights of the run follow from, by stable names, in JSON. A run resumes from
    checkpoints of the same result alone.
    tensorboard_path: directory of TensorBoard's copy of the metrics, or None.
    """

    def __init__(
        self,
        path,
        keep_checkpoints: int,
        result: dict,
        process,
        tensorboard_path: str | None = None,
    ):
        self.path = Path(path)
        self.checkpoints = self.path / "checkpoints"
        self.keep = keep_checkpoints
        self.result = result
        self.process = process
        self.metrics_file = None
        self.evaluated = set()  # on rank 0, the steps whose evaluation metrics.jsonl has
        self.tensorboard_path = tensorboard_path
        self.tensorboard = None

    # ----------------------------------------------------------------------------------------------
    # Start

    def step_to_resume(self, total_steps: int) -> tuple[int, dict]:
        """Find the newest whole checkpoint: its step and its facts, or (0, {}) to start anew.

        Raises ValueError that names each difference of what the results of the two runs follow
        from, or where the checkpoint has gone further.
        """
        done, facts = newest_checkpoint(self.checkpoints, self.process)
        if not done:
            return 0, {}
        path = self.checkpoints / f"step-{done}"
        if facts.get("version") != VERSION:
            raise ValueError(
                f"--resume: {path} was written by another version of train.py "
                f"(facts.json has version {facts.get('version')}, expected {VERSION}); resume it "
                "with that version, or give another --output_dir"
            )
        different = differences(facts["result"], self.result)
        if different:
            raise ValueError(
                f"--resume: {path} is of a run with other flags: {'; '.join(different)}; "
                "give the same flags, or another --output_dir"
            )
        if done > total_steps:
            raise ValueError(
                f"--max_steps: found {total_steps}; {path} has gone further; "
                f"give at least {done}, or another --output_dir"
            )
        return done, facts

    def open(self, done: int, model_size: int, saves_checkpoints: bool):
        """Make the directory ready for a run that resumes after step `done`, or starts (0).

        At step 0 the files of an earlier run are moved to earlier-N; later, the lines of later
        steps are dropped from metrics.jsonl. model_size: bytes of the weights.
        Raises ValueError where the disk has no room for all that the run will write.
        """
        if self.process.rank == 0:
            if self.tensorboard_path:
                self.tensorboard = Writer(self.tensorboard_path, done)
            try:
                self.path.mkdir(parents=True, exist_ok=True)
                if not done:
                    self.move_earlier_run()
                self.check_room(model_size, self.keep + 1 if saves_checkpoints else 1)
                self.open_metrics(done)
            except OSError as error:
                raise ValueError(
                    f"--output_dir {self.path}: cannot be written to ({error.strerror}); "
                    "give another directory"
                ) from None

    def move_earlier_run(self):
        """Move the files of an earlier run, if there is one, to a new directory earlier-N."""
        # Checkpoints go first: if this is interrupted, the rest is not taken for a run to resume.
        names = ["checkpoints", "metrics.jsonl", "report.html", "config.json", *WEIGHT_FILES]
        names += [*TOKENIZER_FILES, *CONFIG_FILES, "merges.txt", "examples.jsonl"]
        files = [self.path / name for name in names if (self.path / name).exists()]
        if not files:
            return
        for number in itertools.count(1):
            aside = self.path / f"earlier-{number}"
            if not aside.exists():
                break
        aside.mkdir()
        for file in files:
            file.rename(aside / file.name)
        self.process.print(f"{self.path} held the files of an earlier run; they are in {aside} now")

    def check_room(self, model_size: int, checkpoints: int):
        """Raise ValueError unless the disk has room for the model and the number of checkpoints."""
        needed = model_size * (1 + 3 * checkpoints)  # a checkpoint has AdamW's two moments, too
        free = shutil.disk_usage(self.path).free
        # Checkpoints that are there belong to this run: they are counted in what is needed.
        free += sum(file.stat().st_size for file in self.checkpoints.rglob("*"))
        if free < needed:
            raise ValueError(
                f"--output_dir {self.path}: {free / 1e9:.1f} GB are free there; the model and "
                f"{counted(checkpoints, 'checkpoint')} (--keep_checkpoints, and the one being "
                "written) take "
                f"{needed / 1e9:.1f} GB; give another directory"
            )

    def open_metrics(self, done: int):
        """Open metrics.jsonl, with the lines of steps up to `done` alone."""
        path = self.path / "metrics.jsonl"
        kept = ""
        for event in self.events():
            if event["step"] <= done:
                kept += json.dumps(event) + "\n"
                if event["event"] == "eval":
                    self.evaluated.add(event["step"])
        part = self.path / "metrics.jsonl.part"
        part.write_text(kept)
        part.rename(path)
        self.metrics_file = open(path, "a")

    # ----------------------------------------------------------------------------------------------
    # Metrics

    def events(self) -> list[dict]:
        """Read the events of metrics.jsonl, without a last line that the end of a run has cut."""
        path = self.path / "metrics.jsonl"
        if not path.exists():
            return []
        lines = path.read_text().splitlines(keepends=True)
        return [json.loads(line) for line in lines if line.endswith("\n")]

    def has_evaluation(self, step: int) -> bool:
        """Tell every rank whether metrics.jsonl has the evaluation of this step."""
        return self.process.broadcast(step in self.evaluated)

    def log(self, **event):
        """Append an event to metrics.jsonl, on rank 0. A number that is not finite becomes null."""
        if self.process.rank != 0:
            return
        for name, value in event.items():
            if isinstance(value, float) and not math.isfinite(value):
                event[name] = None
        if event["event"] == "eval":
            self.evaluated.add(event["step"])
        with self.writing():
            self.metrics_file.write(json.dumps(event) + "\n")
            self.metrics_file.flush()
            if self.tensorboard:
                self.tensorboard.write(event)

    # ----------------------------------------------------------------------------------------------
    # Checkpoints

    def save(self, step: int, model, optimizer, facts: dict):
        """Write checkpoints/step-N, on all ranks, and keep the newest ones.

        facts: what a run that resumes here must know or agree with, in JSON.
        Raises ValueError where the disk does not take it.
        """
        facts = {"version": VERSION, "step": step, "result": self.result, **facts}
        facts["processes"] = [self.process.world_size, self.process.device.type]
        with self.writing():
            if self.process.rank == 0:
                os.fsync(self.metrics_file.fileno())  # its lines belong to the checkpoint
            state = training_state(model, optimizer, self.process)
            save_checkpoint(self.checkpoints, step, state, facts, self.keep, self.process)

    def load(self, facts: dict, model, optimizer, seed: int):
        """Give model, optimizer and random states the values of the checkpoint with these facts.

        With another number or kind of processes random states begin anew, from `seed` and the step.
        """
        process, step = self.process, facts["step"]
        state = training_state(model, optimizer, process)
        is_same = facts["processes"] == [process.world_size, process.device.type]
        if not is_same:
            del state["random"]
        path = self.checkpoints / f"step-{step}"
        process.print(f"resuming after step {step}, from {path}")
        dcp.load(state, checkpoint_id=path, no_dist=not dist.is_initialized())
        set_state_dict(
            model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"]
        )
        if not is_same:
            torch.manual_seed(seed + process.rank + step * process.world_size)
            return
        random = state["random"][f"rank {process.rank}"]
        torch.set_rng_state(random["cpu"])
        if "cuda" in random:
            torch.cuda.set_rng_state(random["cuda"])

    def what_is_left(self) -> str:
        """Say which checkpoint a run can resume from."""
        steps = checkpoint_steps(self.checkpoints)
        if not steps:
            return "there is no checkpoint"
        return f"the last whole checkpoint is {self.checkpoints}/step-{steps[0]}"

    @contextmanager
    def writing(self):
        """Turn an error of writing into a ValueError that says what is left."""
        try:
            yield
        except (OSError, RuntimeError, CheckpointException) as error:
            if isinstance(error, CheckpointException):  # of several ranks
                error, _ = next(iter(error.failures.values()))
            if lost_process(error) or isinstance(error, torch.OutOfMemoryError):
                raise error
            reason = str(error).partition("\n")[0]
            raise ValueError(
                f"--output_dir {self.path}: cannot be written to ({reason}); "
                f"{self.what_is_left()}. Make room; the same command with --resume then continues, "
                "or starts anew"
            ) from None

    # ----------------------------------------------------------------------------------------------
    # End

    def write_examples(self, comparisons: Iterable) -> Path:
        """Write the first comparisons of two texts as rows of examples.jsonl; return its path."""
        path = self.path / "examples.jsonl"
        with self.writing(), open(path, "w") as file:
            for comparison in itertools.islice(comparisons, EXAMPLES):
                chosen, rejected = comparison.responses
                row = {"prompt": comparison.prompt, "chosen": chosen, "rejected": rejected}
                file.write(json.dumps(row) + "\n")
        return path

    def last_lines(self, files: list, flags: list[str]) -> str:
        """Write the last lines of a finished run: its files, and commands that score with it.

        The commands work in the current directory, on the first of `files` that is still there (an
        earlier run's examples may have been moved). Without one, the user has to fill in a file.
        flags: say how the rows of the file are read.
        """
        there = [str(file) for file in files if Path(file).exists()]
        file = there[0] if there else "FILE.jsonl"
        score = shlex.join([*how_to_start("rm.py"), str(self.path), file, *flags])
        page, scores = (
            shlex.quote(str(self.path / name)) for name in ("pairs.html", "scores.jsonl")
        )
        return (
            f"model: {self.path}   metrics: {self.path}/metrics.jsonl   "
            f"page: {self.path}/report.html\n"
            "score with it, token by token in the terminal or on a page, or as numbers alone:\n"
            f"    {score} --show\n"
            f"    {score} --html {page}\n"
            f"    {score} --out {scores}"
        )


def how_to_start(program: str) -> list[str]:
    """Return the words that start a program of this repository from the current directory.

    Where `python` would not be the Python that runs this, as in a virtual environment that is not
    activated, its path takes the place.
    """
    python, found = "python", shutil.which("python")
    if not found or Path(found).parent != Path(sys.executable).parent:
        python = sys.executable
    if Path.cwd() != REPOSITORY:
        program = str(REPOSITORY / program)
    return [python, program]


def differences(before: dict, now: dict) -> list[str]:
    """List the differences between the facts of two runs, names missing on one side included."""
    found = []
    for name in sorted(before.keys() | now.keys()):
        part, _, field = name.partition(".")
        called = DESCRIPTIONS.get(part, f"--{name}")
        if field:
            called = f"{field} of {called}"
        if name not in now:
            found.append(f"{called} is unknown to this version of train.py")
        elif name not in before:
            found.append(f"{called} was not recorded and is {now[name]!r}")
        elif before[name] != now[name] and ANY not in (before[name], now[name]):
            found.append(f"{called} was {before[name]!r} and is {now[name]!r}")
    return found


def training_state(model, optimizer, process) -> dict:
    """Collect the tensors of a checkpoint: this rank's shards of them, where they are sharded."""
    model_state, optimizer_state = get_state_dict(model, optimizer)
    random = {"cpu": torch.get_rng_state()}
    if process.device.type == "cuda":
        random["cuda"] = torch.cuda.get_rng_state()
    return {
        "model": model_state,
        "optimizer": optimizer_state,
        "random": {f"rank {process.rank}": random},
    }


def save_checkpoint(directory: Path, step: int, state: dict, facts: dict, keep: int, process):
    """Write directory/step-N under another name, and rename it when all of it is on the disk.

    Keeps the newest `keep` checkpoints. Raises OSError or CheckpointException.
    """
    whole, part = directory / f"step-{step}", directory / f".step-{step}.part"
    if process.rank == 0:
        for left_over in directory.glob(".step-*"):  # of a run that was killed while it saved
            shutil.rmtree(left_over)
        part.mkdir(parents=True)
    process.wait()
    # Each rank writes its shards and syncs them to the disk.
    dcp.save(state, checkpoint_id=part, no_dist=not dist.is_initialized())
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
        discard_old(directory, step, keep)
    process.wait()


def discard_old(directory: Path, step: int, keep: int):
    """Delete all checkpoints but the newest `keep` up to `step`.

    Checkpoints of later steps were damaged when this run began.
    """
    steps = checkpoint_steps(directory)
    kept = [earlier for earlier in steps if earlier <= step][:keep]
    for old in set(steps) - set(kept):
        (directory / f"step-{old}").rename(directory / f".step-{old}.old")
    for old in directory.glob(".step-*.old"):
        shutil.rmtree(old)


def sync(path: Path):
    """Flush the content of a file, or the names in a directory, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def hashes(checkpoint: Path) -> dict[str, str]:
    """Return the SHA-256 of every file in a checkpoint except sha256.json."""
    files = sorted(checkpoint.iterdir())
    return {file.name: file_hash(file) for file in files if file.name != "sha256.json"}


def checkpoint_steps(directory: Path) -> list[int]:
    """List the steps that have a checkpoint, the newest first."""
    names = [path.name.removeprefix("step-") for path in directory.glob("step-*")]
    return sorted((int(name) for name in names if name.isdecimal()), reverse=True)


def newest_checkpoint(directory: Path, process) -> tuple[int, dict]:
    """Find the newest checkpoint that is whole: its step and facts, (0, {}) where there is none.

    Says which checkpoints it skips, and why. Every rank gets what rank 0 has found.
    """
    newest = 0, {}
    if process.rank == 0:
        for step in checkpoint_steps(directory):
            path = directory / f"step-{step}"
            try:
                check_hashes(path)
                newest = step, json.loads((path / "facts.json").read_text())
                break
            except (OSError, ValueError, TypeError) as error:
                process.print(f"{path}: skipped, as it is damaged: {error}")
    return process.broadcast(newest)


def check_hashes(checkpoint: Path):
    """Raise an error that names a file of a checkpoint which is not as it was written."""
    written = json.loads((checkpoint / "sha256.json").read_text())
    found = hashes(checkpoint)
    for name in written | found:
        if name not in found:
            raise ValueError(f"{name} is missing")
        if written.get(name) != found[name]:
            raise ValueError(f"{name} is not what was written")


def stop_signals() -> list[int]:
    """Collect SIGTERM and SIGINT in the returned list, so that they no longer end the process."""
    received = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, frame: received.append(number))
    return received
