"""tools/traps.py: the table of known traps is what happens, and only the wrong step is wrong."""

import json
from collections import Counter

import numpy as np
import pytest

from tools import invariants, traps
from tools.make_vectors import DIRECTORY

CASES = traps.load_cases()
TABLE = json.loads((DIRECTORY / "traps.json").read_text(encoding="utf-8"))["traps"]
BY_NAME = {case["name"]: case for cases in CASES.values() for case in cases}
ROWS = {row["name"]: row for row in TABLE}
INVARIANTS = {invariant.name: invariant for invariant in invariants.INVARIANTS}


def test_table_has_every_trap():
    assert list(ROWS) == [trap.name for trap in traps.TRAPS]
    assert [row["what"] for row in TABLE] == [trap.what for trap in traps.TRAPS]


@pytest.mark.parametrize("trap", traps.TRAPS, ids=lambda trap: trap.name)
def test_trap_fails_the_cases_of_the_table(trap):
    """And breaks the invariants named there, in the case named there."""
    row = ROWS[trap.name]
    with traps.in_place(trap):
        assert traps.failed_cases(CASES) == row["fails"]
        for name, case_name in row["breaks"].items():
            assert not invariants.holds(INVARIANTS[name], traps.compute, BY_NAME[case_name]), name


def test_page_is_that_of_the_table():
    text = (DIRECTORY / "traps.md").read_text(encoding="utf-8")
    assert text == traps.page(TABLE, sum(map(len, CASES.values())))


def test_every_case_with_numbers_catches_a_trap():
    caught = Counter()
    for row in TABLE:
        for names in row["fails"].values():
            caught.update(names)
    assert not BY_NAME.keys() - caught.keys()


def test_every_invariant_catches_a_trap():
    broken = {name for row in TABLE for name in row["breaks"]}
    assert broken == INVARIANTS.keys()


SAME = np.array  # a copy
RIGHT = {
    "region": ("region", traps.with_span(lambda start, stop, ends, L: (start, max(ends)))),
    "texts": (
        "texts_of",
        traps.with_texts(lambda *rows: traps.right_texts(*rows) != traps.OUTSIDE),
    ),
    "weights": (
        "results",
        traps.with_weights(lambda lengths, identical: np.full(len(lengths), 1 / len(lengths))),
    ),
    "options": ("results", traps.with_options(lambda *options: options)),
    "logarithms": (
        "term",
        traps.with_log(
            lambda x: traps.right_term(x, 1.0)[0], lambda x: traps.right_term(x, 0.0)[0]
        ),
    ),
    "targets": ("term", traps.with_target(SAME)),
    "second term": ("term", traps.combined(0, 1)),
    "pairs": (
        "ranking_case",
        traps.with_pairs(lambda i, j, K, pairs, count: 2 / (K * (K - 1)) / count),
    ),
}


@pytest.mark.parametrize("name", RIGHT)
def test_the_right_step_in_place_fails_nothing(name):
    """So that a trap fails by its wrong step, and not by how it is put in place."""
    place, right = RIGHT[name]
    with traps.in_place(traps.Trap(name, "", place, right)):
        assert traps.failed_cases(CASES) == {"loss.json": [], "rankings.json": []}


def test_bfloat16_is_pytorchs():
    import torch

    numbers = np.random.default_rng(0).normal(size=1000) * 10.0 ** np.arange(-5, 5).repeat(100)
    # PyTorch rounds to float32 first; these numbers are exact there.
    numbers = numbers.astype(np.float32).astype(np.float64)
    expected = torch.tensor(numbers).bfloat16().double().numpy()
    assert np.array_equal(traps.bfloat16(numbers), expected)
