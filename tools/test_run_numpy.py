"""vectors/run_numpy.py stands alone, agrees with the kit, and fails with every wrong loss in it."""

import ast
import decimal
import itertools
import json
import subprocess
import sys
from decimal import Decimal

import pytest

from tools import traps
from tools.make_vectors import DIRECTORY
from tools.test_vectors import WRONG
from vectors import run_numpy

RUNNER = DIRECTORY / "run_numpy.py"
CASES = traps.load_cases()
FUNCTIONS = {"loss.json": run_numpy.loss_case, "rankings.json": run_numpy.ranking_case}
# Imports torch and everything of ours as a module that fails.
ALONE = """
import runpy, sys
for name in ("torch", "rm", "model", "data", "train", "parts", "tools", "transformers"):
    sys.modules[name] = None
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def run_alone(*arguments) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", ALONE, RUNNER, *arguments]
    return subprocess.run(command, capture_output=True, text=True)


def test_runs_without_torch_and_without_ours():
    done = run_alone()
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    names = [case["name"] for cases in CASES.values() for case in cases]
    assert lines[-1] == f"{len(names)} cases, 0 WRONG"
    assert len(lines) == len(names) + 1
    for name, line in zip(names, lines):
        assert line.endswith(f"ok         {name}")


def test_wrong_number_is_found(tmp_path):
    """A number that is off by more than the tolerance, and a case that should be refused."""
    for file, cases in CASES.items():
        (tmp_path / file).write_text(json.dumps({"cases": cases}))
    content = json.loads((tmp_path / "loss.json").read_text())
    content["cases"][0]["loss"] += 1e-11
    content["cases"][1]["grad_rewards"][0][0] += 1e-11
    del content["cases"][2]["loss"]
    content["cases"][2]["error"] = "no reason"
    (tmp_path / "loss.json").write_text(json.dumps(content))
    done = run_alone(tmp_path)
    assert done.returncode == 1
    wrong = [line for line in done.stdout.splitlines() if "  WRONG (" in line]
    assert len(wrong) == 3
    assert "(loss)" in wrong[0] and "(grad_rewards)" in wrong[1]


def test_is_short_and_imports_numpy_alone():
    source = RUNNER.read_text()
    assert source.count("\n") < 120
    imported = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            imported.update(alias.name for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            imported.add(node.module)
    assert imported == {"json", "sys", "pathlib", "numpy"}


@pytest.mark.parametrize("trap", traps.TRAPS, ids=lambda trap: trap.name)
def test_every_wrong_loss_in_it_fails(trap):
    """Among them are all wrong losses of tools/test_vectors.py, with the cases named there."""
    with traps.in_place(trap):
        failed = traps.failed_cases(CASES)
    assert failed["loss.json"] or failed["rankings.json"]
    if trap.name in WRONG:
        assert WRONG[trap.name][1] <= set(failed["loss.json"])


def test_every_wrong_loss_of_the_tests_is_a_trap():
    assert WRONG.keys() <= {trap.name for trap in traps.TRAPS}


# --------------------------------------------------------------------------------------------------
# The numbers once more, with 50 digits and by another road


def exact_term(x: Decimal, target: Decimal) -> tuple[Decimal, Decimal]:
    """Compute a term and its slope at d = x."""
    sigmoid = 1 / (1 + (-x).exp())
    value = target * (1 + (-x).exp()).ln() + (1 - target) * (1 + x.exp()).ln()
    return value, sigmoid - target


def exact_loss(texts, rewards, options) -> tuple[Decimal, list[list[Decimal]]]:
    """Compute loss and gradient of texts whose ends are known: (begin, end, ids) of every row."""
    B, L = len(texts) // 2, len(rewards[0])
    margins, targets = options.get("margins", [0] * B), options.get("targets", [1] * B)
    center = Decimal(options.get("center_rewards_coefficient", 0))
    loss, gradient = Decimal(0), [[Decimal(0)] * L for _ in rewards]
    for i, j in zip(range(B), range(B, 2 * B)):
        (begin, end, ids), (_, other_end, other_ids) = texts[i], texts[j]
        own, other = ids[begin:end], other_ids[begin:other_end]
        shared = sum(
            1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(own, other))
        )
        columns = list(range(begin + shared, max(end, other_end)))
        if own == other:
            columns = [L - 1]
        read = [(t, t) for t in columns]
        if options.get("loss") == "end":
            read = [(end - 1, other_end - 1)]
        for t, u in read:
            x = Decimal(rewards[i][t]) - Decimal(rewards[j][u]) - Decimal(margins[i])
            value, slope = exact_term(x, Decimal(targets[i]))
            loss += value / len(read) / B
            gradient[i][t] += slope / len(read) / B
            gradient[j][u] -= slope / len(read) / B
        total = Decimal(rewards[i][end - 1]) + Decimal(rewards[j][other_end - 1])
        loss += center * total**2 / B
        gradient[i][end - 1] += 2 * center * total / B
        gradient[j][other_end - 1] += 2 * center * total / B
    return loss, gradient


def spans(case: dict) -> list[tuple[int, int, list[int]]]:
    rows = []
    for i, ids in enumerate(case["input_ids"]):
        if case["attention_mask"] is not None:
            mask = case["attention_mask"][i]
            rows.append((mask.index(1), len(mask) - mask[::-1].index(1), ids))
            continue
        pads = [t for t, token in enumerate(ids) if token == case["pad_id"]]
        pads = [*pads, *[len(ids)] * (1 + case["num_padding_at_beginning"])]
        rows.append((0, pads[case["num_padding_at_beginning"]], ids))
    return rows


def off(got, expected) -> float:
    """Return the largest difference of nested lists, relative above 1."""
    if isinstance(expected, list):
        assert len(got) == len(expected)
        return max(map(off, got, expected))
    return float(abs(Decimal(expected) - got) / max(Decimal(1), abs(got)))


@pytest.mark.parametrize(
    "case",
    [case for case in CASES["loss.json"] if case["error"] is None],
    ids=lambda case: case["name"],
)
def test_loss_with_50_digits(case):
    with decimal.localcontext(prec=50, Emax=decimal.MAX_EMAX, Emin=decimal.MIN_EMIN):
        loss, gradient = exact_loss(spans(case), case["rewards"], case["options"])
        assert off(loss, case["loss"]) < 1e-13
        assert off(gradient, case["grad_rewards"]) < 1e-14


@pytest.mark.parametrize("case", CASES["rankings.json"], ids=lambda case: case["name"])
def test_rankings_with_50_digits(case):
    count = len(case["token_groups"])
    with decimal.localcontext(prec=50):
        total = Decimal(0)
        for number, (group, rewards) in enumerate(zip(case["token_groups"], case["rewards"])):
            pairs = list(itertools.combinations(range(len(group)), 2))
            gradient = [[Decimal(0)] * len(rewards[0]) for _ in group]
            for i, j in pairs:
                texts = [(0, len(group[row]), group[row]) for row in (i, j)]
                loss, slopes = exact_loss(texts, [rewards[i], rewards[j]], {})
                total += loss / len(pairs) / count
                for row, slope in zip((i, j), slopes):
                    for t, value in enumerate(slope):
                        gradient[row][t] += value / len(pairs) / count
            assert off(gradient, case["grad_rewards"][number]) < 1e-14
        assert off(total, case["loss"]) < 1e-14
