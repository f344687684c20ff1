"""Check another implementation of the loss against vectors/loss.json, whose numbers any implementation must give.

    python -m tools.check_vectors module:function

imports `function` from `module`, looked for from the current directory on, and calls it in every case with five arguments:

    function(input_ids, rewards, pad_id, num_padding_at_beginning, attention_mask)

as `rm.pairwise_loss` takes them: (2B, L) int64; (2B, L) float64 or float32, which wants a gradient; int; int; (2B, L) int64 or None.
It returns a dictionary with `loss`, `chosen_mean_scores` and `rejected_mean_scores`, or the loss alone, as tensors of PyTorch. Cases
with other objectives also pass keywords (`loss`, `margins`, `center_rewards_coefficient`); a function that does not take
these is not asked, and the case is counted as not taken. Batches that break a rule have to raise an exception, of any kind.

Prints a line for every case: the differences of loss, end scores and d loss / d rewards (the largest of each), and ok or WRONG.
Exit status 0 where no case is WRONG. `python -m tools.check_vectors rm:pairwise_loss` checks our own.
"""

import argparse
import importlib
import inspect
import json
import sys
from pathlib import Path

import torch

LOSS_FILE = Path(__file__).resolve().parent.parent / "vectors" / "loss.json"

# By the dtype of the rewards, relative above 1: some units in the last place of a mean over up to a dozen terms.
TOLERANCE = {"float64": 1e-12, "float32": 1e-6}
SCORES = ("chosen_mean_scores", "rejected_mean_scores")


def arguments(case: dict) -> tuple[tuple, dict]:
    """A case of loss.json -> the five arguments of `rm.pairwise_loss`, and the keywords. The rewards want a gradient if they can."""
    rewards = torch.tensor(case["rewards"], dtype=getattr(torch, case["rewards_dtype"]))
    mask, options = case["attention_mask"], dict(case["options"])
    if "margins" in options:
        options["margins"] = torch.tensor(options["margins"], dtype=rewards.dtype)
    return (
        torch.tensor(case["input_ids"], dtype=getattr(torch, case["input_ids_dtype"])),
        rewards.requires_grad_(rewards.is_floating_point()),
        case["pad_id"],
        case["num_padding_at_beginning"],
        None if mask is None else torch.tensor(mask),
    ), options


def takes(function, keywords) -> bool:
    """Whether a function can be called with these keywords, as far as it tells."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # built in: it tells nothing
        return not keywords
    return any(p.kind == p.VAR_KEYWORD for p in parameters) or keywords <= {
        p.name for p in parameters if p.kind != p.POSITIONAL_ONLY
    }


def check(function, case: dict) -> dict:
    """One case. Returns `verdict` ("ok", "WRONG" or "not taken"), the columns `loss`, `scores`, `gradient` as text, and a `note`."""
    given, options = arguments(case)
    row = {
        "name": case["name"],
        "loss": "",
        "scores": "",
        "gradient": "",
        "note": "",
        "verdict": "WRONG",
    }
    if not takes(function, options.keys()):
        return row | {"verdict": "not taken", "note": ", ".join(options)}
    try:
        out = function(*given, **options)
    except Exception as error:  # whatever somebody else's code raises belongs into its line
        said = f"{type(error).__name__}: {error}".splitlines()[0]
        return row | (
            {"note": said}
            if case["error"] is None
            else {"verdict": "ok", "note": f"refused: {type(error).__name__}"}
        )
    if case["error"] is not None:
        return row | {"note": f"accepted, but {case['error']}"}
    out = {"loss": out} if torch.is_tensor(out) else out
    if (
        not isinstance(out, dict)
        or not torch.is_tensor(out.get("loss"))
        or out["loss"].numel() != 1
    ):
        return row | {
            "note": 'expected a tensor of one element, the loss, or a dictionary that has one under "loss"'
        }
    wrong = []

    def difference(what: str, got: torch.Tensor, name: str) -> float:
        """The largest one, in plain float64; takes down what is out of tolerance."""
        got, expected = got.detach().double().cpu(), torch.tensor(case[name], dtype=torch.float64)
        if got.shape != expected.shape:
            wrong.append(f"{what} of shape {list(got.shape)}, expected {list(expected.shape)}")
            return float("nan")
        differences = (got - expected).abs()
        if not (
            differences <= TOLERANCE[case["rewards_dtype"]] * expected.abs().clamp(min=1)
        ).all():  # NaN is not
            wrong.append(what)
        return differences.max().item()

    row["loss"] = f"{difference('loss', out['loss'].reshape(()), 'loss'):.1e}"
    given_scores = [name for name in SCORES if torch.is_tensor(out.get(name))]
    row["scores"] = (
        f"{max(difference('scores', out[name], name) for name in given_scores):.1e}"
        if given_scores
        else "not given"
    )
    why = ""
    try:
        out["loss"].sum().backward()
    except Exception as error:  # a loss that was computed outside of autograd, say
        why = " ".join(f": {type(error).__name__}: {error}".split())[:100]
    if given[1].grad is None:
        row["gradient"] = "none"
        wrong.append("the loss has no gradient for rewards" + why)
    else:
        row["gradient"] = f"{difference('gradient', given[1].grad, 'grad_rewards'):.1e}"
    return row | {"verdict": "WRONG" if wrong else "ok", "note": ", ".join(dict.fromkeys(wrong))}


def load_function(words: str):
    """ "module:function" -> the function. Raises ValueError that says what is wrong, and what would be right."""
    module_name, colon, name = words.partition(":")
    if not all((colon, module_name, name)) or ":" in name:
        raise ValueError(f"found {words!r}; expected module:function, for example rm:pairwise_loss")
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # also what the module itself raises
        if (
            isinstance(error, ModuleNotFoundError)
            and error.name
            and f"{module_name}.".startswith(f"{error.name}.")
        ):
            raise ValueError(
                f"no module {error.name!r}; expected a module's dotted name as seen from {Path.cwd()}, without .py"
            ) from None
        raise ValueError(
            f"importing {module_name!r} failed ({' '.join(f'{type(error).__name__}: {error}'.split())}); "
            "expected a module that can be imported"
        ) from None
    function = getattr(module, name, None)
    if not callable(function):
        functions = [
            key
            for key, value in vars(module).items()
            if inspect.isfunction(value) and value.__module__ == module_name
        ]
        raise ValueError(
            f"{module_name!r} has {'no function' if function is None else 'something else than a function as'} {name!r}; "
            f"it has {', '.join(functions) or 'none at all'}"
        )
    return function


def main():
    parser = argparse.ArgumentParser(
        "check_vectors",
        description="Check an implementation of the loss against vectors/loss.json.",
    )
    parser.add_argument(
        "function", metavar="module:function", help="what to call, for example rm:pairwise_loss"
    )
    words = parser.parse_args().function
    try:
        function = load_function(words)
    except ValueError as error:
        sys.exit(f"check_vectors: error: {error}")
    rows = [check(function, case) for case in json.loads(LOSS_FILE.read_text())["cases"]]
    width = max(len(row["name"]) for row in rows)
    print(f"{'case':{width}}  {'loss':9}  {'scores':9}  {'gradient':9}  ")
    for row in rows:
        line = f"{row['name']:{width}}  {row['loss']:9}  {row['scores']:9}  {row['gradient']:9}  {row['verdict']}"
        print(line + (f" ({row['note']})" if row["note"] else ""))
    counts = {
        verdict: sum(row["verdict"] == verdict for row in rows)
        for verdict in ("ok", "WRONG", "not taken")
    }
    print(
        f"{words}: {len(rows)} cases: "
        + ", ".join(f"{count} {verdict}" for verdict, count in counts.items())
    )
    sys.exit(counts["WRONG"] > 0)


if __name__ == "__main__":
    main()
