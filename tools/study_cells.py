"""Cells that run once, hidden states of a frozen backbone, and tables, for the parts of the study.

Which cells there are is in tools/study.py and tools/study_real.py; the measures of real pairs are
in tools/study_measures.py.
"""

import fcntl
import functools
import itertools
import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

import rm
from parts.packed import pack
from parts.token_cache import hash_of

RESULTS = "results.jsonl"

# --------------------------------------------------------------------------------------------------
# Cells


def results(out: Path, name: str = RESULTS) -> list[dict]:
    file = out / name
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def selected(cells: list[str], only: list[str] | None, example: str) -> list[str]:
    """Select the cells that begin with a part of `only`, in the order of `cells`; None: all.

    Raises SystemExit for a part of `only` that no cell begins with. example: what it could be.
    """
    if not only:
        return cells
    chosen = []
    for start in only:
        found = [cell for cell in cells if f"{cell}/".startswith(f"{start}/")]
        if not found:
            raise SystemExit(
                f"--only: found {start!r}; expected the start of a cell, such as {example}"
            )
        chosen += found
    return [cell for cell in cells if cell in chosen]


def run_cells(
    out: Path, cells: list[str], run_cell: Callable[[str], dict | None], name: str = RESULTS
):
    """Run the cells that out/name lacks, and append a line for each.

    Processes beside each other share the work: each takes the cells that no other has begun.
    run_cell: returns the line, or None where training was interrupted, which ends the program.
    """
    for cell in cells:
        lock = out / cell / "lock"
        lock.parent.mkdir(parents=True, exist_ok=True)
        with lock.open("w") as held:
            try:
                fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                print(f"{cell}: another process is at it")
                continue
            if any(row["cell"] == cell for row in results(out, name)):
                print(f"{cell}: done before")
                continue
            row = run_cell(cell)
            if row is None:
                raise SystemExit(f"{cell}: stopped; the same command resumes")
            # O_APPEND, and one write: whole lines.
            with (out / name).open("a") as file:
                file.write(json.dumps(row) + "\n")


# --------------------------------------------------------------------------------------------------
# A frozen backbone


@functools.cache
def backbone_of(path: str, pad_id: int):
    return rm.RewardModel.from_pretrained(path, pad_id).backbone.eval()


@torch.no_grad()
def hidden_states(groups: list, path: str, pad_id: int, at_once: int) -> dict:
    states = {}
    for start in range(0, len(groups), at_once):
        batch = pack(groups[start : start + at_once], pad_id)
        rows = backbone_of(path, pad_id).forward_packed(batch).half()
        # clone: a view would be saved with all that it is a view of.
        pieces = [piece.clone() for piece in rows.split(batch.branches + batch.tails)]
        branches, tails = iter(pieces[: len(batch.branches)]), iter(pieces[len(batch.branches) :])
        for group in batch.token_groups:
            count = len(group)
            states[hash_of(group)] = (
                list(itertools.islice(branches, count)),
                list(itertools.islice(tails, count)),
            )
    return states


# --------------------------------------------------------------------------------------------------
# Tables


def summary(values: list[float]) -> tuple[float, float]:
    """Compute mean and standard error; of a single value the latter is NaN."""
    error = math.nan
    if len(values) > 1:
        error = float(np.std(values, ddof=1) / math.sqrt(len(values)))
    return float(np.mean(values)), error


def plus_minus(values: list[float]) -> str:
    mean, error = summary(values)
    return f"{mean:.4f}" if math.isnan(error) else f"{mean:.4f} ± {error:.4f}"


def markdown(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *rows]) + "\n"
