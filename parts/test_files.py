"""Files are replaced as a whole or not at all; a program goes on when nobody reads its output."""

import errno
import functools
import os
import subprocess
import sys

import pytest

from conftest import HERE, forked_ok, same_bits, words
from parts.files import LastingStream, replacing


def test_file_is_replaced_when_all_of_it_is_written(tmp_path):
    file = tmp_path / "file"
    file.write_text("old")
    with replacing(file) as part:
        part.write_text("new")
        assert file.read_text() == "old"
    assert file.read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("error", [OSError, ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("is_begun", [False, True])
def test_file_is_as_it_was_after_an_error(error, is_begun, tmp_path):
    file = tmp_path / "file"
    file.write_text("old")
    with pytest.raises(error), replacing(file) as part:
        if is_begun:
            part.write_text("half")
        raise error
    assert file.read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


# --------------------------------------------------------------------------------------------------
# Output


def test_stream_that_nobody_reads_discards_what_it_is_given():
    reader, writer = os.pipe()
    stream = LastingStream(os.fdopen(writer, "w"))
    print("read", file=stream, flush=True)
    assert os.read(reader, 100) == b"read\n"
    os.close(reader)
    for _ in range(3):
        assert stream.write("nobody reads this\n") == 18
        stream.flush()
    assert os.readlink(f"/proc/self/fd/{stream.fileno()}") == "/dev/null"
    assert stream.encoding and not stream.isatty()
    stream.close()


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC, errno.EPIPE])
def test_stream_outlives_a_terminal_that_is_gone_and_a_full_disk(number, tmp_path):
    class Failing:
        def __init__(self):
            self.file = open(tmp_path / "log", "w")

        def write(self, text):
            raise OSError(number, os.strerror(number))

        flush = functools.partialmethod(write, "")

        def fileno(self):
            return self.file.fileno()

    stream = LastingStream(Failing())
    print("a line", file=stream, flush=True)
    assert os.readlink(f"/proc/self/fd/{stream.fileno()}") == "/dev/null"


SHELL = {
    "head": "PYTHONUNBUFFERED=1 {train} | head -1",
    "both closed": "{train} >&- 2>&-",
    "full disk": "{train} > /dev/full 2>&1",
}


@pytest.fixture(scope="module")
def read_run(small, tmp_path_factory):
    """Train while somebody reads the output. The directory."""
    output_dir = tmp_path_factory.mktemp("read") / "out"
    forked_ok(output_dir, *small)
    return output_dir


@pytest.mark.parametrize("command", SHELL.values(), ids=SHELL)
def test_training_goes_on_to_its_end_when_nobody_reads_it(command, small, read_run, tmp_path):
    """The exit status is 0, and the model is that of a run whose output was read."""
    flags = words([*small, "--save_interval 4 --output_dir", tmp_path / "out"])
    train = f"{sys.executable} {HERE}/train.py {' '.join(flags)}"
    shell = f"set -o pipefail; {command.format(train=train)}"
    done = subprocess.run(["bash", "-c", shell], capture_output=True, text=True)
    assert done.returncode == 0, done
    assert "Traceback" not in done.stderr and "Exception ignored" not in done.stderr
    same_bits(tmp_path / "out", read_run)
