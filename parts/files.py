"""Writing: a file is replaced as a whole or stays as it was; output outlives its reader.

Files of tensors are in parts/tensor_files.py, the directory of a run in parts/run_directory.py.
"""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(file) -> Iterator[Path]:
    """Give the path FILE.part to write to; it takes the name of `file` when the block ends.

    After an error `file` is as it was, and FILE.part is gone.
    """
    part = Path(f"{file}.part")
    try:
        yield part
        sync(part)  # a power failure must not leave the new name without the new content
        os.replace(part, file)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


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


def outlive_readers():
    """Make standard output and standard error streams that end no program when they are closed.

    A stream that was closed when the program started (`>&-`) is /dev/null from here on.
    """
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            # Its descriptor is the lowest free one, so that no file of ours gets that number.
            stream = open(os.devnull, "w")
        setattr(sys, name, LastingStream(stream))
