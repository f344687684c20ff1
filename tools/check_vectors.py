"""Check another implementation of the loss against the numbers in vectors/loss.json.

    python -m tools.check_vectors module:function [--invariants]

imports `function` from `module`, as seen from the current directory, and calls it in every case:

    function(input_ids, rewards, pad_id, num_padding_at_beginning, attention_mask)

with what `rm.pairwise_loss` takes: (2B, L) int64; (2B, L) float64 or float32, which wants a
gradient; int; int; (2B, L) int64 or None. It returns the loss, a tensor of PyTorch, or a dictionary
with `loss`, `chosen_mean_scores` and `rejected_mean_scores`. Cases of other objectives also pass
keywords (`loss`, `margins`, `targets`, `center_rewards_coefficient`); a function that does not take
these is not called, and the case counts as not taken. For a batch that breaks a rule the function
must raise an exception, of any kind.

Prints a line for every case: the largest differences of loss, end scores and d loss / d rewards,
and ok or WRONG; then the known traps (vectors/traps.md) that fail the same cases. `--invariants`
also checks the rules of tools/invariants.py. Exit status 0 where nothing is WRONG. `python -m
tools.check_vectors rm:pairwise_loss` checks our own. tools/make_vectors.py writes the kit.
"""

import argparse
import importlib
import inspect
import json
import math
import sys
from pathlib import Path

import torch

from tools.invariants import NotTaken, broken_by

LOSS_FILE = Path(__file__).resolve().parent.parent / "vectors" / "loss.json"
TRAPS_FILE = LOSS_FILE.with_name("traps.json")

# By the dtype of the rewards, relative above 1: some units in the last place of a mean over up to a
# dozen terms
TOLERANCE = {"float64": 1e-12, "float32": 1e-6}
SCORES = ("chosen_mean_scores", "rejected_mean_scores")


def arguments(case: dict) -> tuple[tuple, dict]:
    """Turn a case of loss.json into the five arguments of `rm.pairwise_loss`, and the keywords.

    Rewards want a gradient if their dtype can have one.
    """
    rewards = torch.tensor(case["rewards"], dtype=getattr(torch, case["rewards_dtype"]))
    mask, options = case["attention_mask"], dict(case["options"])
    if mask is not None:
        mask = torch.tensor(mask)
    for name in options.keys() & {"margins", "targets"}:
        options[name] = torch.tensor(options[name], dtype=rewards.dtype)
    return (
        torch.tensor(case["input_ids"], dtype=getattr(torch, case["input_ids_dtype"])),
        rewards.requires_grad_(rewards.is_floating_point()),
        case["pad_id"],
        case["num_padding_at_beginning"],
        mask,
    ), options


def takes(function, keywords) -> bool:
    """Return whether a function can be called with these keywords, as far as it tells."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # built in: it tells nothing
        return not keywords
    named = {p.name for p in parameters if p.kind != p.POSITIONAL_ONLY}
    return keywords <= named or any(p.kind == p.VAR_KEYWORD for p in parameters)


def check(function, case: dict) -> dict:
    """Check a function in one case.

    Returns `verdict` ("ok", "WRONG" or "not taken"), the differences `loss`, `scores` and
    `gradient` as text, and a `note`.
    """
    row = {"name": case["name"], "loss": "", "scores": "", "gradient": "", "note": ""}
    given, options = arguments(case)
    if not takes(function, options.keys()):
        return row | {"verdict": "not taken", "note": ", ".join(options)}
    try:
        out = function(*given, **options)
    except Exception as error:  # anything that foreign code raises belongs into its line
        if case["error"] is not None:
            return row | {"verdict": "ok", "note": f"refused: {type(error).__name__}"}
        note = f"{type(error).__name__}: {error}".splitlines()[0]
        return row | {"verdict": "WRONG", "note": note}
    if case["error"] is not None:
        return row | {"verdict": "WRONG", "note": f"accepted, but {case['error']}"}
    if torch.is_tensor(out):
        out = {"loss": out}
    loss = out.get("loss") if isinstance(out, dict) else None
    if not torch.is_tensor(loss) or loss.numel() != 1:
        expected = "a tensor of one element, the loss, or a dictionary that has one under"
        return row | {"verdict": "WRONG", "note": f'expected {expected} "loss"'}
    wrong = compare(out, given[1], case, row)
    return row | {"verdict": "WRONG" if wrong else "ok", "note": ", ".join(dict.fromkeys(wrong))}


def compare(out: dict, rewards: torch.Tensor, case: dict, row: dict) -> list[str]:
    """Fill in the differences of a row. Returns what is out of tolerance."""
    wrong = []

    def difference(what: str, got: torch.Tensor, name: str) -> float:
        got, expected = got.detach().double().cpu(), torch.tensor(case[name], dtype=torch.float64)
        if got.shape != expected.shape:
            wrong.append(f"{what} of shape {list(got.shape)}, expected {list(expected.shape)}")
            return math.nan
        differences = (got - expected).abs()
        tolerance = TOLERANCE[case["rewards_dtype"]] * expected.abs().clamp(min=1)
        if not (differences <= tolerance).all():  # NaN is not
            wrong.append(what)
        return differences.max().item()

    row["loss"] = f"{difference('loss', out['loss'].reshape(()), 'loss'):.1e}"
    row["scores"], row["gradient"], reason = "not given", "none", ""
    scores = [name for name in SCORES if torch.is_tensor(out.get(name))]
    if scores:
        row["scores"] = f"{max(difference('scores', out[name], name) for name in scores):.1e}"
    try:
        out["loss"].sum().backward()
    except Exception as error:  # a loss that was computed outside of autograd, say
        reason = f": {one_line(error)}"[:100]
    if rewards.grad is None:
        wrong.append(f"the loss has no gradient for rewards{reason}")
    else:
        row["gradient"] = f"{difference('gradient', rewards.grad, 'grad_rewards'):.1e}"
    return wrong


def matching_traps(rows: list[dict], cases: list[dict]) -> list[str]:
    """Return the traps that fail just the cases that are WRONG, among those with numbers taken.

    None where nine in ten of them are WRONG: many mistakes do that.
    """
    numbers = {case["name"] for case in cases if case["error"] is None}
    taken = {row["name"] for row in rows if row["verdict"] != "not taken"} & numbers
    wrong = {row["name"] for row in rows if row["verdict"] == "WRONG"} & numbers
    names = []
    for trap in json.loads(TRAPS_FILE.read_text(encoding="utf-8"))["traps"]:
        fails = set(trap["fails"]["loss.json"]) & taken
        if wrong and fails == wrong and len(wrong) < 0.9 * len(taken):
            names.append(f"{trap['name']} (the loss {trap['what']})")
    return names


def broken_invariants(function, cases: list[dict]) -> dict[str, str]:
    """Return the invariants that a function breaks, each with the first case that shows it."""

    def compute(case: dict) -> dict:
        given, options = arguments(case)
        if not takes(function, options.keys()):
            raise NotTaken
        out = function(*given, **options)
        if torch.is_tensor(out):
            out = {"loss": out}
        (gradient,) = torch.autograd.grad(out["loss"].sum(), given[1])
        results = {"loss": out["loss"].item(), "grad_rewards": gradient.numpy()}
        for name in SCORES:
            if torch.is_tensor(out.get(name)):
                results[name] = out[name].detach().double().numpy()
        return results

    return broken_by(compute, {"loss.json": cases})


def one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())


def load_function(words: str):
    """Import "module:function". Raises ValueError that says what is wrong, and what is right."""
    module_name, _, name = words.partition(":")
    if not module_name or not name or ":" in name:
        raise ValueError(f"found {words!r}; expected module:function, for example rm:pairwise_loss")
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # also what the module itself raises
        missing = isinstance(error, ModuleNotFoundError) and error.name
        if missing and f"{module_name}.".startswith(f"{missing}."):
            raise ValueError(
                f"no module {missing!r}; expected a module's dotted name "
                f"as seen from {Path.cwd()}, without .py"
            ) from None
        raise ValueError(
            f"importing {module_name!r} failed ({one_line(error)}); "
            "expected a module that can be imported"
        ) from None
    function = getattr(module, name, None)
    if callable(function):
        return function
    functions = []
    for key, value in vars(module).items():
        if inspect.isfunction(value) and value.__module__ == module_name:
            functions.append(key)
    found = "no function" if function is None else "something else than a function as"
    raise ValueError(
        f"{module_name!r} has {found} {name!r}; it has {', '.join(functions) or 'none at all'}"
    )


def main():
    parser = argparse.ArgumentParser(
        "check_vectors",
        description="Check an implementation of the loss against vectors/loss.json.",
    )
    parser.add_argument(
        "function", metavar="module:function", help="what to call, for example rm:pairwise_loss"
    )
    parser.add_argument(
        "--invariants", action="store_true", help="also check the rules of tools/invariants.py"
    )
    args = parser.parse_args()
    words = args.function
    try:
        function = load_function(words)
    except ValueError as error:
        sys.exit(f"check_vectors: error: {error}")
    cases = json.loads(LOSS_FILE.read_text(encoding="utf-8"))["cases"]
    rows = [check(function, case) for case in cases]
    width, counts = max(len(row["name"]) for row in rows), {"ok": 0, "WRONG": 0, "not taken": 0}
    print(f"{'case':{width}}  {'loss':9}  {'scores':9}  {'gradient':9}  ")
    for row in rows:
        counts[row["verdict"]] += 1
        numbers = f"{row['loss']:9}  {row['scores']:9}  {row['gradient']:9}"
        note = f" ({row['note']})" if row["note"] else ""
        print(f"{row['name']:{width}}  {numbers}  {row['verdict']}{note}")
    for name in matching_traps(rows, cases):
        print(f"these cases are those of a known trap: {name}")
    broken = {}
    if args.invariants:
        broken = broken_invariants(function, cases)
        for name, case_name in broken.items():
            print(f"broken invariant: {name}, in the case {case_name!r}")
        print(f"invariants: {len(broken)} broken")
    counted = ", ".join(f"{count} {verdict}" for verdict, count in counts.items())
    print(f"{words}: {len(rows)} cases: {counted}")
    sys.exit(counts["WRONG"] > 0 or bool(broken))


if __name__ == "__main__":
    main()
