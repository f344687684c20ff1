"""The directory of a run, --output_dir: checkpoints, metrics, examples, earlier runs; signals.

It knows neither the loop (train.py) nor what a model's files hold (parts/huggingface.py). A
checkpoint, checkpoints/step-N, is whole or not there.
"""

import fcntl
import itertools
import json
import math
import os
import shlex
import shutil
import signal
import socket
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from parts import guards, tensor_files
from parts.agreement import differences
from parts.distributed import lost_process
from parts.files import replacing, sync
from parts.flags import REPOSITORY
from parts.guards import counted
from parts.huggingface import WEIGHT_FILES
from parts.inputs import is_file
from parts.memory import full_memory
from parts.metrics import Writer
from parts.token_cache import file_hash
from parts.tokenizers import CONFIG_FILES, TOKENIZER_FILES

VERSION = 4  # of the facts in a checkpoint
EXAMPLES = 20  # comparisons in examples.jsonl

# Numbers that every event of metrics.jsonl has. Others are null where they were not finite.
NUMBERS = {"step": ("lr", "pairs", "tokens", "seconds"), "eval": ("pairs",)}


class RunDirectory:
    """The files of one run, written by rank 0; checkpoints by all ranks.

    An existing directory is locked from here on, a new one from `open` on: a second run in it is
    refused, with a ValueError that names the process of the first.
    tensorboard_path: directory of TensorBoard's copy of the metrics, or None.
    """

    def __init__(self, path, keep_checkpoints: int, process, tensorboard_path: str | None = None):
        self.path = Path(path)
        self.checkpoints = self.path / "checkpoints"
        self.keep = keep_checkpoints
        self.process = process
        self.result = None  # what the weights follow from
        self.threads = ""  # the numbers of threads that ranks have
        self.metrics_file = None
        self.evaluated = set()  # on rank 0, the steps whose evaluation metrics.jsonl has
        self.tensorboard_path = tensorboard_path
        self.tensorboard = None
        if process.rank == 0 and self.path.is_dir():
            self.lock()

    # ----------------------------------------------------------------------------------------------
    # Start

    def lock(self):
        """Hold the directory for this process until it ends."""
        try:
            hold(self.path.resolve())
        except OSError as error:
            raise self.unusable(error) from None

    def unusable(self, error: OSError) -> ValueError:
        """Make the error of a directory in which no run can start."""
        return ValueError(
            f"--output_dir {self.path}: cannot be written to ({error.strerror}); "
            "give another directory"
        )

    def step_to_resume(self, result: dict, total_steps: int, is_asked: bool) -> tuple[int, dict]:
        """Find the newest whole checkpoint: its step and its facts, or (0, {}) to start anew.

        result: what the weights of the run follow from, by stable names, in JSON.
        is_asked: whether this rank is to resume. All do where one is, as torchrun may count a
            restart on some nodes alone.
        Raises ValueError that names each difference of what the results of the two runs follow
        from, or where the checkpoint has gone further.
        """
        if not any(self.process.join([is_asked])[0]):
            return 0, {}
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
        different = differences(facts["result"], result)
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

    def open(
        self, result: dict, done: int, model_size: int, moments_size: int, saves_checkpoints: bool
    ):
        """Make the directory ready for a run that resumes after step `done`, or starts (0).

        At step 0 the files of an earlier run are moved to earlier-N; later, the lines of later
        steps are dropped from metrics.jsonl. result: as above. model_size, moments_size: bytes of
        the weights, and of AdamW's moments.
        Raises ValueError where the disk has no room for all that the run will write.
        """
        self.result = result
        threads = set(self.process.join([torch.get_num_threads()])[0])
        self.threads = ", ".join(str(count) for count in sorted(threads))
        if self.process.rank == 0:
            if self.tensorboard_path:
                self.tensorboard = Writer(self.tensorboard_path, done)
            try:
                self.path.mkdir(parents=True, exist_ok=True)
                self.lock()
                self.discard_unfinished()
                if not done:
                    self.move_earlier_run()
                checkpoints = self.keep + 1 if saves_checkpoints else 1
                self.check_room(model_size, moments_size, checkpoints)
                self.open_metrics(done)
            except OSError as error:
                raise self.unusable(error) from None

    def discard_unfinished(self):
        """Delete what a process was writing when it was killed."""
        for name in ("metrics.jsonl", "report.html", *WEIGHT_FILES):
            (self.path / f"{name}.part").unlink(missing_ok=True)
        for unfinished in self.checkpoints.glob(".step-*"):
            shutil.rmtree(unfinished)

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

    def check_room(self, model_size: int, moments_size: int, checkpoints: int):
        """Raise ValueError unless the disk has room for the model and the number of checkpoints."""
        needed = model_size + checkpoints * (model_size + moments_size)
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
        kept, steps = "", 0
        for event in self.events():
            if event["step"] <= done:
                kept += json.dumps(event) + "\n"
                if event["event"] == "eval":
                    self.evaluated.add(event["step"])
                else:
                    steps += 1
        if steps < done:
            missing = guards.counted(done - steps, "step")
            self.process.print(f"{path}: the lines of {missing} of {done} are missing")
        with replacing(path) as part:
            part.write_text(kept)
        self.metrics_file = open(path, "a")

    # ----------------------------------------------------------------------------------------------
    # Metrics

    def events(self) -> list[dict]:
        """Read the events of metrics.jsonl, and say which lines are none, and are skipped."""
        path = self.path / "metrics.jsonl"
        if not is_file(path):
            return []
        events, damaged = [], []
        for number, line in enumerate(path.read_bytes().splitlines(), start=1):
            event = event_of(line)
            if event:
                events.append(event)
            else:
                damaged.append(str(number))
        if damaged:
            self.process.print(
                f"{path}: line {guards.listed(damaged)} skipped: cut or damaged, no event of a run"
            )
        return events

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
        facts["threads"] = self.threads
        shared, own = named(*get_state_dict(model, optimizer)), random_states(self.process)
        local = {name: tensor_files.own_rows(tensor)[0] for name, tensor in shared.items()}
        spoiled = self.process.join(guards.non_finite(local))[0]
        if spoiled:
            raise ValueError(
                f"after step {step} {spoiled[0]} is not finite, so no checkpoint is saved of it; "
                f"{self.what_is_left()}. A smaller --learning_rate may help"
            )
        with self.writing():
            if self.process.rank == 0:
                os.fsync(self.metrics_file.fileno())  # its lines belong to the checkpoint
            state = shared, own
            save_checkpoint(self.checkpoints, step, state, facts, self.keep, self.process)

    def load(self, facts: dict, model, optimizer, scaler, seed: int):
        """Give model, optimizer, scaler and random states the values of the checkpoint of `facts`.

        With another number or kind of processes random states begin anew, from `seed` and the step.
        Raises ValueError that names the file of the checkpoint which does not fit.
        """
        process, step = self.process, facts["step"]
        path = self.checkpoints / f"step-{step}"
        process.print(f"resuming after step {step}, from {path}")
        is_same = facts["processes"] == [process.world_size, process.device.type]
        if not is_same:
            count, device = facts["processes"]
            process.print(
                f"step-{step} is of {count} processes ({device}), this run has "
                f"{process.world_size} ({process.device.type}): dropout draws other numbers, and "
                "rounding differs"
            )
        elif facts["threads"] != self.threads and process.device.type == "cpu":
            process.print(
                f"step-{step} was computed with {facts['threads']} threads, this run has "
                f"{self.threads} (OMP_NUM_THREADS): rounding differs, so the last bits of results "
                "will, too"
            )
        try:
            scaler.load_state_dict(facts["scaler"])
        except (RuntimeError, KeyError) as error:
            raise ValueError(
                f"{path}/facts.json: scaler is not as it was saved ({error})"
            ) from None
        state, optimizer_state = get_state_dict(model, optimizer)
        own = random_states(process) if is_same else {}
        tensor_files.load(path, process.rank, named(state, optimizer_state), own)
        set_state_dict(model, optimizer, model_state_dict=state, optim_state_dict=optimizer_state)
        if not is_same:
            torch.manual_seed(seed + process.rank + step * process.world_size)
            return
        torch.set_rng_state(own["random.cpu"])
        if "random.cuda" in own:
            torch.cuda.set_rng_state(own["random.cuda"])

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
        except (OSError, RuntimeError) as error:
            if lost_process(error) or full_memory(error):
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
        words = [*how_to_start("rm.py"), str(self.path), file, *flags]
        score = " ".join(map(shell_word, words))
        page, scores = (shell_word(self.path / name) for name in ("pairs.html", "scores.jsonl"))
        path = guards.one_line(self.path)
        return (
            f"model: {path}   metrics: {path}/metrics.jsonl   page: {path}/report.html\n"
            "score with it, token by token in the terminal or on a page, or as numbers alone:\n"
            f"    {score} --show\n"
            f"    {score} --html {page}\n"
            f"    {score} --out {scores}"
        )


def shell_word(word) -> str:
    """Quote a word of a command, which bash and zsh read as it is; nothing in it is invisible."""
    text = str(word)
    if text.isprintable():
        return shlex.quote(text)
    quoted = ""
    for character in text:
        if character.isprintable() and character not in "\\'":
            quoted += character
        else:
            quoted += "".join(f"\\x{byte:02x}" for byte in os.fsencode(character))
    return f"$'{quoted}'"


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


HELD = {}  # directories that this process has locked, and the descriptors that hold the locks


def hold(directory: Path):
    """Lock a directory for this process until it ends, however that happens.

    Raises ValueError that names the process which has locked it.
    """
    if directory in HELD:
        return
    # .lock stays when the run has ended: to delete it would leave a second run with another file.
    descriptor = os.open(directory / ".lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = guards.one_line(os.read(descriptor, 100).decode(errors="replace").strip())
        os.close(descriptor)
        raise ValueError(
            f"--output_dir {directory}: {holder or 'another process'} trains into it; wait until "
            "it has ended, or give another directory"
        ) from None
    except OSError as error:
        print(f"{directory}: has no lock ({error.strerror}); give it to no second run")
    os.ftruncate(descriptor, 0)
    os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
    HELD[directory] = descriptor


def event_of(line: bytes) -> dict | None:
    """Return the event in a line of metrics.jsonl, or None where the line is not a whole one."""
    try:
        event = json.loads(line)
    except (ValueError, RecursionError):
        return None
    kind = event.get("event") if isinstance(event, dict) else None
    if kind not in ("step", "eval") or type(event.get("step")) is not int:
        return None
    for name in NUMBERS[kind]:
        if not is_number(event.get(name)):
            return None
    for name, value in event.items():
        if not (name == "event" or value is None or is_number(value) or isinstance(value, dict)):
            return None
    return event


def is_number(value) -> bool:
    """Tell whether a value of JSON is a finite number."""
    return type(value) in (int, float) and abs(value) <= sys.float_info.max


def named(model_state: dict, optimizer_state: dict) -> dict[str, torch.Tensor]:
    """Name the tensors of `get_state_dict`: all that changes in training.

    The other values of an optimizer, such as the learning rate, follow from the flags.
    """
    tensors = {f"model.{name}": tensor for name, tensor in model_state.items()}
    for name, values in optimizer_state["state"].items():
        for key, tensor in values.items():
            tensors[f"optimizer.{name}.{key}"] = tensor
    return tensors


def random_states(process) -> dict[str, torch.Tensor]:
    """Return the states of this rank's random number generators."""
    states = {"random.cpu": torch.get_rng_state()}
    if process.device.type == "cuda":
        states["random.cuda"] = torch.cuda.get_rng_state()
    return states


@contextmanager
def together(process) -> Iterator[None]:
    """Wait for all ranks at the end of the block. Where one raises OSError there, all do."""
    failures = []
    try:
        yield
    except OSError as error:
        failures.append(str(error))
    process.wait_patiently()  # rank 0 reads what all ranks have written
    failures = process.join(failures)[0]
    if failures:
        raise OSError(failures[0])


def save_checkpoint(directory: Path, step: int, state, facts: dict, keep: int, process):
    """Write directory/step-N under another name, and rename it when all of it is on the disk.

    state: tensors that ranks share, and those of this rank. Keeps the newest `keep` checkpoints.
    Raises OSError, on all ranks.
    """
    whole, part = directory / f"step-{step}", directory / f".step-{step}.part"
    try:
        with together(process):
            if process.rank == 0:
                part.mkdir(parents=True)
        with together(process):
            tensor_files.save(part, process.rank, *state)
        with together(process):
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
    except OSError:
        if process.rank == 0:
            shutil.rmtree(part, ignore_errors=True)
        raise


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


def hashes(checkpoint: Path) -> dict[str, str]:
    """Return the SHA-256 of every file in a checkpoint except sha256.json."""
    found = {}
    for file in sorted(checkpoint.iterdir()):
        if not file.is_file():
            raise ValueError(f"{file.name} is no file")
        if file.name != "sha256.json":
            found[file.name] = file_hash(file)
    return found


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
                newest = step, read_facts(path, step)
                break
            except (OSError, ValueError, TypeError, RecursionError) as error:
                process.print(f"{path}: skipped, as it is damaged: {error}")
    process.wait_patiently()  # large checkpoints take minutes to read
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


def read_facts(checkpoint: Path, step: int) -> dict:
    """Read facts.json of checkpoint step-N, and see whether its tensors have headers.

    The facts of another version are returned as they are. Raises ValueError that names the file
    which is not of a run.
    """
    facts = json.loads((checkpoint / "facts.json").read_text())
    if not isinstance(facts, dict):
        raise ValueError(f"facts.json: expected an object, found {type(facts).__name__}")
    if facts.get("version") != VERSION:
        return facts
    scales = list(facts["scaler"].values()) if isinstance(facts.get("scaler"), dict) else [None]
    is_right = {
        "step": facts.get("step") == step,
        "result": isinstance(facts.get("result"), dict),
        "scaler": set(kinds(scales)) <= {int, float},
        "skipped": kinds(facts.get("skipped")) == [int, int],
        "processes": kinds(facts.get("processes")) == [int, str],
        "threads": isinstance(facts.get("threads"), str),
    }
    for name in is_right:
        if not is_right[name]:
            raise ValueError(f"facts.json: {name} is {facts.get(name)!r}, which no run has written")
    for file in tensor_files.files_of(checkpoint):
        tensor_files.parts_of(file)
    return facts


def kinds(values) -> list[type]:
    """List the types of a list's values; of another value, nothing."""
    if not isinstance(values, list):
        return []
    return [type(value) for value in values]


def stop_signals() -> list[int]:
    """Collect SIGTERM and SIGINT in the returned list, so that they no longer end the process."""
    received = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, frame: received.append(number))
    return received
