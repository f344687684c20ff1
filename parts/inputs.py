"""Files from outside, before they are opened: a pipe or a device is refused, not waited for.

It reads none of them: parts/huggingface.py, parts/tokenizers.py and parts/rows.py do.
"""

import os
import stat

KINDS = {
    stat.S_IFDIR: "a directory",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def is_file(path) -> bool:
    """Tell whether a file is there; links are followed.

    Raises ValueError where something else is there: opening a pipe would wait for its writer, and
    reading a device may never end.
    """
    try:
        kind = stat.S_IFMT(os.stat(path).st_mode)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}; expected a file") from None
    if kind != stat.S_IFREG:
        raise ValueError(f"{path}: is {KINDS.get(kind, 'no file')}; expected a file")
    return True
