"""Pages of the results on real pairs: docs/results.md, and what docs/study.md has of them.

The cells come from tools/study_real.py, the measures from tools/study_measures.py, the words of the
page from tools/results_page.md. `python -m tools.study page` writes both pages.
"""

import json
from collections import Counter
from pathlib import Path

import numpy as np

from parts.guards import counted
from parts.report import Series, chart, standalone
from tools.study_cells import markdown, results
from tools.study_measures import bootstrap, correctness, kinds_of_length, mean_and_error, measures
from tools.study_real import all_cells

HERE = Path(__file__).resolve().parent
NUMBERS = "real-results.jsonl"  # the summaries, of which the pages are made
LEARNS = ("words", "head", "all")
READINGS = {
    "25": "25 %",
    "50": "50 %",
    "75": "75 %",
    "100": "100 %",
    "end": "last token",
    "mean": "mean over the region",
}
QUALITY = {
    "accuracy": "accuracy",
    "loss": "loss",
    "ece": "ece",
    "accuracy_longer": "chosen is longer",
    "accuracy_shorter": "chosen is shorter",
    "accuracy_similar": "similar length",
}
OBJECTIVES = ("divergent", "end", "both")  # in plots, in the order of their colours
MAIN_VARIANTS = ("default", "1000-steps", "5e-5")
PLOTS = (
    ("built-in", "all", ("1000-steps",)),
    ("alpaca", "all", ("5e-5",)),
    ("alpaca", "head", ("default",)),
    ("hh", "head", ("default",)),
)
NAMES = {
    "alpaca": "alpaca-eval",
    "alpaca-512": "alpaca-eval, cut to 512",
    "hh": "hh-harmless",
    "built-in": "built-in data",
    "longer": "the longer answer",
    "words": "bag of words",
    "head": "head on frozen features",
    "all": "all weights",
}

# --------------------------------------------------------------------------------------------------
# Summaries: numbers of an arm over its seeds


def arms_of(rows: list[dict]) -> dict[str, list[dict]]:
    """Group cells that differ by their seed alone, in their order."""
    arms = {}
    for row in rows:
        arms.setdefault(row["cell"].rsplit("/", 1)[0], []).append(row)
    return arms


def margins_at(rows: list[dict], reading: str) -> np.ndarray:
    return np.array([row[reading] for row in rows])  # (seeds, pairs)


def difference(arm: str, other: str, right: dict, clusters: np.ndarray, mask=None) -> dict:
    """Compare two arms on the same pairs, or on those of `mask`.

    right: arm -> (N,), how often each pair is right, over the seeds.
    """
    gap = right[arm] - right[other]
    if mask is not None:
        gap, clusters = gap[mask], clusters[mask]
    return {"minus": other} | bootstrap(gap, clusters)


def pairs_of(out: Path, kind: str, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Return clusters (N,) and lengths (N, 2) of the pairs that a kind of data is evaluated on."""
    if kind == "built-in":
        return np.arange(count), np.zeros((count, 2), int)
    known = json.loads((out / f"pairs-{kind}.json").read_text())
    return np.array(known["clusters"]), np.array(known["lengths"])


def summarize(out: Path) -> list[dict]:
    """Compute the numbers of every arm from out/real.jsonl, a dictionary each."""
    arms = arms_of(results(out, "real.jsonl"))
    right, summaries = {reading: {} for reading in READINGS}, []
    for arm, rows in arms.items():
        for reading in READINGS:
            right[reading][arm] = correctness(margins_at(rows, reading)).mean(0)
    for arm, rows in arms.items():
        kind, how, objective, variant = arm.split("/")
        margins = margins_at(rows, "end")
        clusters, lengths = pairs_of(out, kind, margins.shape[1])
        # A resumed cell has the seconds of its last part.
        seconds = [max(row["seconds"], row.get("training_seconds", 0.0)) for row in rows]
        found = {"arm": arm, "seconds": sum(seconds)}
        found |= measures(margins, clusters, lengths)
        found["at"] = {
            reading: mean_and_error(right[reading][arm], clusters) for reading in READINGS
        }
        judge = f"{kind}/longer/-/whole"
        if judge in arms and how in LEARNS:
            similar = kinds_of_length(lengths)["similar"]
            found["judge"] = difference(arm, judge, right["end"], clusters)
            found["judge_similar"] = difference(arm, judge, right["end"], clusters, similar)
        for other in ("divergent", "end"):
            compared = f"{kind}/{how}/{other}/{variant}"
            if compared != arm and compared in arms:
                found[other] = {
                    reading: difference(arm, compared, right[reading], clusters)
                    for reading in READINGS
                }
        for name in ("settings", "chosen", "trials", "pairs", "training_seconds"):
            if name in rows[0]:
                found[f"first_{name}"] = rows[0][name]
        for name in ("held_out_loss", "held_out_accuracy"):
            if name in rows[0]:
                found[name] = rows[0][name]
        summaries.append(rounded(found))
    return summaries


def rounded(value):
    """Round the numbers in a summary to 5 digits behind the point."""
    if isinstance(value, dict):
        return {name: rounded(each) for name, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [rounded(each) for each in value]
    return round(value, 5) if isinstance(value, float) else value


def summaries_in(out: Path) -> list[dict]:
    """Compute the summaries from the cells in `out`, or read them where only they are there."""
    if (out / "real.jsonl").exists():
        return summarize(out)
    return results(out, NUMBERS)


# --------------------------------------------------------------------------------------------------
# Tables and plots


def shown(value, digits: int = 3) -> str:
    """Show a number, or [number, standard error]."""
    if isinstance(value, (list, tuple)):
        number, error = value
        if error is None:
            return f"{number:.{digits}f}"
        return f"{number:.{digits}f} ± {error:.{digits}f}"
    return f"{value:.{digits}f}"


def shown_difference(found: dict | None) -> str:
    if found is None:
        return ""
    return f"{found['mean']:+.3f} ± {found['error']:.3f}"


def title_of(summary: dict) -> str:
    _, how, objective, variant = summary["arm"].split("/")
    words = [NAMES[how]]
    if objective != "-":
        words.append(f"`{objective}`")
    if variant not in ("-", "default"):
        words.append(variant)
    return ", ".join(words)


def of_kind(summaries: list[dict], kind: str, arms: tuple = (), variants: tuple = ()) -> list[dict]:
    """Select the summaries of a kind of data, of these arms and variants (empty: all)."""
    found = []
    for summary in summaries:
        its_kind, how, _, variant = summary["arm"].split("/")
        if its_kind != kind or (arms and how not in arms):
            continue
        if not variants or variant in variants:
            found.append(summary)
    return found


NOT_RUN = "(No cell of it has been run.)\n"


def quality_table(summaries: list[dict], kind: str) -> str:
    """Write the table of the arms on one data set."""
    main = main_arms(summaries, kind)
    if not main:
        return NOT_RUN
    body = []
    for summary in main:
        line = [f"{title_of(summary)} (n = {len(summary['seeds'])})"]
        for name in QUALITY:
            is_no_model = "/longer/" in summary["arm"] and name in ("loss", "ece")
            line.append("" if is_no_model else shown(summary[name]))
        line.append(shown_difference(summary.get("judge")))
        line.append(shown_difference(summary.get("judge_similar")))
        body.append(line)
    first = main[0]
    head = [NAMES[kind], *QUALITY.values(), "minus the longer answer", "the same, similar length"]
    counts = [f"{first[f'pairs_{name}']} {name}" for name in ("longer", "shorter", "similar")]
    return f"{first['pairs']} pairs; the chosen response is: {', '.join(counts)}.\n\n" + markdown(
        head, body
    )


def our_rows(summaries: list[dict]) -> str:
    """Write the rows of the first table that are ours: the main arms, their data and accuracy."""
    lines = []
    for kind in ("alpaca", "alpaca-512", "hh"):
        for summary in main_arms(summaries, kind):
            how, objective = summary["arm"].split("/")[1:3]
            pairs = f", {summary['first_pairs']:,}" if "first_pairs" in summary else ""
            who = "`tools.study real`"
            model = title_of(summary)
            if how in ("head", "all"):
                model = f"SmolLM2-135M-Instruct, {model}"
            accuracy = shown(summary["accuracy"])
            lines.append(f"| {who} | {model} | {NAMES[kind]}{pairs} | {accuracy} |\n")
    return "".join(lines)


def missing_arms(summaries: list[dict]) -> str:
    """List the arms of which not every seed has been run."""
    planned = Counter(cell.rsplit("/", 1)[0] for cell in all_cells([1, 2, 3]))
    run = {summary["arm"]: len(summary["seeds"]) for summary in summaries}
    lines = []
    for arm, seeds in planned.items():
        if run.get(arm, 0) < seeds:
            lines.append(f"- `{arm}`: {run.get(arm, 0)} of {counted(seeds, 'seed')}\n")
    return "".join(lines) or "Nothing: every cell has been run.\n"


def main_arms(summaries: list[dict], kind: str) -> list[dict]:
    """Select the arms that the pages compare; the ablations of heads are left out."""
    found = of_kind(summaries, kind, ("longer", "words"))
    found += of_kind(summaries, kind, ("head",), ("default",))
    return found + of_kind(summaries, kind, ("all",))


def rates_table(summaries: list[dict]) -> str:
    """Write which learning rates were tried, and their loss on held-out training pairs."""
    body = []
    for summary in summaries:
        if "first_trials" in summary:
            losses = np.mean([trial["held_out_loss"] for trial in summary["first_trials"]], 0)
            pairs = zip(summary["first_settings"], losses)
            tried = ", ".join(f"{setting:g}: {loss:.3f}" for setting, loss in pairs)
            chosen = ", ".join(f"{each:g}" for each in summary["first_chosen"])
        elif "held_out_loss" in summary:
            rate = summary["arm"].rsplit("/", 1)[1]
            tried, chosen = f"{rate}: {summary['held_out_loss']:.3f}", ""
        else:
            continue
        kind = NAMES[summary["arm"].split("/")[0]]
        body.append([f"{kind}, {title_of(summary)}", tried, chosen])
    if not body:
        return NOT_RUN
    return markdown(["", "rate or penalty: loss on held-out training pairs", "chosen"], body)


def readings_table(summaries: list[dict]) -> str:
    """Write the accuracy after shares of the responses."""
    body = []
    for kind in ("built-in", "alpaca", "alpaca-512", "hh"):
        for summary in of_kind(summaries, kind, ("head", "all")):
            if "/head/" in summary["arm"] and not summary["arm"].endswith("/default"):
                continue
            name = f"{NAMES[kind]}, {title_of(summary)} (n = {len(summary['seeds'])})"
            body.append([name, *(shown(summary["at"][reading]) for reading in READINGS)])
    if not body:
        return NOT_RUN
    return markdown(["accuracy after", *READINGS.values()], body)


def gaps_table(summaries: list[dict]) -> str:
    """Write differences between objectives after shares of the responses."""
    body = []
    for objective, other in (("end", "divergent"), ("both", "divergent"), ("both", "end")):
        for summary in summaries:
            kind, how, its_objective, variant = summary["arm"].split("/")
            if its_objective != objective or other not in summary or variant not in MAIN_VARIANTS:
                continue
            gaps = [shown_difference(summary[other][reading]) for reading in READINGS]
            body.append([f"{NAMES[kind]}, {NAMES[how]}: `{objective}` minus `{other}`", *gaps])
    if not body:
        return NOT_RUN
    return markdown(["difference of accuracies after", *READINGS.values()], body)


def ablation_table(summaries: list[dict]) -> str:
    """Write the accuracy and loss of every head."""
    heads = {}
    for kind in ("alpaca", "hh"):
        for summary in of_kind(summaries, kind, ("head",)):
            heads.setdefault(summary["arm"].split("/", 2)[2], {})[kind] = summary
    if not heads:
        return NOT_RUN
    body = []
    for name, found in heads.items():
        objective, variant = name.split("/", 1)
        line = [f"`{objective}`, {variant}"]
        for kind in ("alpaca", "hh"):
            if kind not in found:
                line += ["", "", ""]
                continue
            line.append(shown(found[kind]["accuracy"]))
            line.append(shown(found[kind]["loss"]))
            line.append(shown(found[kind]["at"]["mean"]))
        body.append(line)
    columns = []
    for kind in ("alpaca", "hh"):
        columns += [f"{NAMES[kind]}: accuracy", "loss", "accuracy of the mean over the region"]
    return markdown(["a head on frozen features", *columns], body)


def readings_plot(summaries: list[dict], title: str) -> str:
    """Draw accuracy after shares of the responses, as the content of an .svg file.

    summaries: of one data set and way to train, with different objectives.
    """
    shares = [reading for reading in READINGS if reading != "mean"]
    series = []
    for color, summary in enumerate(summaries):
        at = [summary["at"][share] for share in shares]
        series.append(
            Series(
                [accuracy for accuracy, _ in at],
                name=summary["arm"].split("/")[2],
                kind="point",
                color=color,
                error=[error for _, error in at],
            )
        )
    names = [READINGS[share] for share in shares]
    return standalone(chart(series, title, categories=names, size=(620, 240)))


def write_plots(summaries: list[dict], docs: Path) -> str:
    """Write a plot for each data set and way to train; return the lines that show them."""
    lines = []
    for kind, how, variants in PLOTS:
        found = of_kind(summaries, kind, (how,), variants)
        found = [summary for summary in found if summary["arm"].split("/")[2] in OBJECTIVES]
        found.sort(key=lambda summary: OBJECTIVES.index(summary["arm"].split("/")[2]))
        if found:
            title = f"{NAMES[kind]}, {NAMES[how]}: accuracy after a share of both responses"
            file = f"study-readings-{kind}-{how}.svg"
            (docs / file).write_text(readings_plot(found, title))
            lines.append(f"![{title}]({file})\n")
    return "\n".join(lines)


# --------------------------------------------------------------------------------------------------
# Pages


def write_results(out: Path, docs: Path) -> dict[str, str]:
    """Write docs/results.md, its numbers and plot; return what docs/study.md has of them."""
    summaries = summaries_in(out)
    if summaries:
        lines = [json.dumps(summary) + "\n" for summary in summaries]
        (docs / NUMBERS).write_text("".join(lines))
    template = (HERE / "results_page.md").read_text()
    text = template.format(
        ours=our_rows(summaries),
        alpaca=quality_table(summaries, "alpaca"),
        alpaca_512=quality_table(summaries, "alpaca-512"),
        hh=quality_table(summaries, "hh"),
        rates=rates_table(summaries),
        missing=missing_arms(summaries),
        hours=f"{sum(summary['seconds'] for summary in summaries) / 3600:.1f}",
    )
    (docs / "results.md").write_text(text)
    return {
        "plots": write_plots(summaries, docs),
        "readings": readings_table(summaries),
        "gaps": gaps_table(summaries),
        "ablations": ablation_table(summaries),
    }
