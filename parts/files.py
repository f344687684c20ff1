"""Writing: a file is replaced as a whole, or stays as it was.

The directory of a run is in parts/run_directory.py.
"""

import os
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
