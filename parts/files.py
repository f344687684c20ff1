"""Writing: a file is replaced as a whole or stays as it was; output that acts on no terminal.

Files of tensors are in parts/tensor_files.py, the directory of a run in parts/run_directory.py.
"""

import os
import re
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

from parts.guards import one_line, visible

MOST_LINKS = 40  # that Linux follows, one after the other
MOST_CHARACTERS = 3900  # of a line on standard error
# tqdm moves to the start of a line, or up by lines, before it writes a bar.
MOVES_OF_BARS = re.compile("\r|(\x1b\\[A)*")


@contextmanager
def replacing(file) -> Iterator[Path]:
    """Give the path FILE.part to write to; it takes the name of `file` when the block ends.

    After an error `file` is as it was, and FILE.part is gone. Where `file` is a link, all this
    happens to the file that it leads to. A device or a FIFO is not replaced: its own path is given
    to write to. Raises ValueError for a directory.
    """
    if not is_regular_or_new(file):
        yield Path(file)
        return
    target = os.path.realpath(file)
    part = Path(f"{target}.part")
    try:
        yield part
        sync(part)  # a power failure must not leave the new name without the new content
        os.replace(part, target)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def is_regular_or_new(file) -> bool:
    """Tell whether a path leads to a regular file, or to none yet.

    Raises ValueError for a directory.
    """
    try:
        mode = os.stat(file).st_mode
    except FileNotFoundError:
        return True
    if stat.S_ISDIR(mode):
        raise ValueError(f"{file}: is a directory; expected a file")
    return stat.S_ISREG(mode)


@contextmanager
def writing(file) -> Iterator[TextIO]:
    """Open a file to write text to, which is replaced as `replacing` says.

    A path like /dev/stdout is written to by this process's own descriptor, from its position on:
    the shell may have redirected it to a file that other programs write to.
    """
    descriptor = own_descriptor(file)
    if descriptor is not None:
        sys.stdout.flush()  # what was printed before stands in front
        with open(os.dup(descriptor), "w", encoding="utf-8") as out:
            yield out
        return
    check_writable(file)
    try:
        with replacing(file) as part, open(part, "w", encoding="utf-8") as out:
            yield out
    except OSError as error:
        if error.filename is None:  # a full disk, say
            error.filename = str(file)
        raise


def check_writable(file):
    """Raise ValueError for a read-only file: replacing it would pass over its permissions."""
    try:
        mode = os.stat(file).st_mode
    except FileNotFoundError:
        return
    if not mode & 0o222:
        raise ValueError(f"{file}: is read-only; give another file, or make it writable")


def own_descriptor(file) -> int | None:
    """Return the descriptor of this process that a path, or what it links to, stands for."""
    path = Path(file)
    for _ in range(MOST_LINKS):
        directory = os.path.realpath(path.parent)
        if directory == os.path.realpath("/proc/self/fd") and path.name.isdecimal():
            return int(path.name)
        if not path.is_symlink():
            return None
        path = Path(directory, os.readlink(path))
    return None


def sync(path: Path):
    """Flush the content of a file, or the names in a directory, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class LastingStream:
    """A text stream that discards what it is given once nothing can be written to it.

    The reader of a pipe may have gone (`train.py | head -1`), as may a terminal, or the room on a
    disk. Everything but `write` and `flush` is the stream's own.
    """

    def __init__(self, stream):
        self.stream = stream

    def __getattr__(self, name: str):
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        try:
            self.stream.write(text)
        except OSError:
            self.discard()
        return len(text)

    def flush(self):
        try:
            self.stream.flush()
        except OSError:
            self.discard()

    def discard(self):
        """Point the stream's descriptor at /dev/null: what the stream still holds goes there."""
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self.stream.fileno())
        os.close(nowhere)


class VisibleStream:
    """A text stream that shows characters which act on a terminal, in place of sending them there.

    It is the last net: messages show names and values from outside by `guards.one_line`, which also
    takes newlines out. is_error: standard error, whose lines are cut, and which has tqdm's bars.
    Everything but `write` is the stream's own.
    """

    def __init__(self, stream, is_error: bool):
        self.stream = stream
        self.is_error = is_error

    def __getattr__(self, name: str):
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        moves = ""
        if self.is_error:
            moves = MOVES_OF_BARS.match(text)[0]
        lines = text[len(moves) :].split("\n")
        if self.is_error:
            lines = [one_line(line, MOST_CHARACTERS) for line in lines]
        else:
            lines = [visible(line) for line in lines]
        self.stream.write(moves + "\n".join(lines))
        return len(text)


def show_output():
    """Make standard output and standard error streams that act on no terminal (VisibleStream)."""
    # Newer versions of Python colour help and tracebacks; colours would be shown as signs.
    os.environ["PYTHON_COLORS"] = "0"
    for name in ("stdout", "stderr"):
        stream = unfiltered(getattr(sys, name))
        if stream is None:  # closed
            continue
        # A locale may not have the signs. Not every stream can be changed.
        with suppress(AttributeError, OSError):
            stream.reconfigure(errors="backslashreplace")
        setattr(sys, name, VisibleStream(stream, name == "stderr"))


def unfiltered(stream):
    """Return the stream behind a VisibleStream, for text that is shown and coloured already."""
    return stream.stream if isinstance(stream, VisibleStream) else stream


def outlive_readers():
    """Make standard output and standard error streams that end no program when they are closed.

    A stream that was closed when the program started (`>&-`) is /dev/null from here on. They act on
    no terminal, as `show_output` says.
    """
    for name in ("stdout", "stderr"):
        stream = unfiltered(getattr(sys, name))
        if stream is None:
            # Its descriptor is the lowest free one, so that no file of ours gets that number.
            stream = open(os.devnull, "w")
        setattr(sys, name, LastingStream(stream))
    show_output()
