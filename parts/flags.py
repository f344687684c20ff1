"""How one program hands over to another, which stands on the floor above it.

It reads no files.
"""

import os
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent


def hand_over(program: str, arguments: list[str], command: str):
    """Replace this process by `python -m tools.PROGRAM ARGUMENTS`, in the same directory.

    A fresh process imports every module once, under one name. It finds ours first: -P and
    PYTHONPATH keep modules of the same names in the current directory out of the way.
    command: what the user asked for, the subject of the error message.
    Raises ValueError where tools/PROGRAM.py is missing.
    """
    if not (REPOSITORY / "tools" / f"{program}.py").exists():
        raise ValueError(
            f"{command} needs tools/{program}.py, which is missing; restore it in {REPOSITORY}"
        )
    search_path = str(REPOSITORY)
    if os.environ.get("PYTHONPATH"):
        search_path += os.pathsep + os.environ["PYTHONPATH"]
    os.execve(
        sys.executable,
        [sys.executable, "-P", "-m", f"tools.{program}", *arguments],
        os.environ | {"PYTHONPATH": search_path},
    )
