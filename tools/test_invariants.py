"""tools/invariants.py: right losses keep every rule, and vectors/README.md lists the rules."""

import re

import pytest

from rm import pairwise_loss
from tools import check_vectors, traps
from tools.invariants import INVARIANTS, broken_by
from tools.make_vectors import DIRECTORY
from tools.test_vectors import by_definition

CASES = traps.load_cases()
# Some of each kind, in the order of the file: all of them take half a minute.
SOME = {"loss.json": CASES["loss.json"][::4], "rankings.json": CASES["rankings.json"]}


def test_numpy_keeps_every_rule():
    assert broken_by(traps.compute, CASES) == {}


def test_plain_python_keeps_every_rule():
    assert broken_by(by_definition, {"loss.json": CASES["loss.json"]}) == {}


def test_our_loss_keeps_every_rule():
    assert check_vectors.broken_invariants(pairwise_loss, SOME["loss.json"]) == {}


def test_rules_say_something_about_some_case():
    """No rule passes by being silent about all cases."""
    for invariant in INVARIANTS:
        answers = set()
        for case in CASES[invariant.file]:
            if case.get("error") is None:
                answers.add(invariant.holds(traps.compute, case | {"rewards_dtype": "float64"}))
        assert True in answers and False not in answers, invariant.name


def test_loss_that_takes_no_options_is_not_asked_for_them():
    def function(ids, rewards, pad_id, leading, mask):
        return pairwise_loss(ids, rewards, pad_id, leading, mask)["loss"]

    assert check_vectors.broken_invariants(function, SOME["loss.json"]) == {}


@pytest.mark.parametrize(
    "wrong, names",
    [
        (lambda loss, rewards: loss + 0.1 * rewards.mean(), ["a constant", "equal rewards"]),
        (lambda loss, rewards: 2 * loss, ["swap turns d into -d", "equal rewards"]),
        (lambda loss, rewards: loss * len(rewards), ["mean of pairs", "batch twice"]),
    ],
)
def test_wrong_losses_break_the_rules_named(wrong, names):
    def function(ids, rewards, pad_id, leading, mask):
        return wrong(pairwise_loss(ids, rewards, pad_id, leading, mask)["loss"], rewards)

    broken = check_vectors.broken_invariants(function, SOME["loss.json"])
    assert set(names) <= broken.keys()


def test_loss_that_breaks_down_breaks_the_rules():
    def function(ids, rewards, pad_id, leading, mask):
        raise RuntimeError("no such thing")

    broken = check_vectors.broken_invariants(function, SOME["loss.json"])
    assert "order of pairs" in broken


def test_readme_lists_every_rule():
    readme = " ".join((DIRECTORY / "README.md").read_text(encoding="utf-8").split())
    listed = re.findall(r"- \*\*([^*]+)\*\*", readme)
    assert listed == [invariant.name for invariant in INVARIANTS]
    for invariant in INVARIANTS:
        assert invariant.rule in readme, invariant.name


def test_version_is_the_newest_in_the_readme():
    version = (DIRECTORY / "VERSION").read_text(encoding="utf-8")
    assert re.fullmatch(r"\d+\.\d+\.\d+\n", version)
    news = (DIRECTORY / "README.md").read_text(encoding="utf-8").partition("## What is new")[2]
    assert re.search(r"- (\d+\.\d+\.\d+):", news).group(1) == version.strip()
