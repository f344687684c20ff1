"""Train on real pairs and measure: how accurate which arm is, and with which loss.

    python -m tools.study real --out DIR --data DIR [--backbone SmolLM2] [--only CELL ...] [--plan]
    python -m tools.study page --out DIR         docs/results.md, and what docs/study.md has of it

`real` appends a line to DIR/real.jsonl for every cell that isn't there yet, cheap ones first. It
can be interrupted at any time and started a second time beside itself, as `run` can. It begins with
an estimate; --plan ends there. How pairs are read and split: tools/study_pairs.py. The pages:
tools/study_results.py.

Data (--data has the two directories; none of their texts gets into DIR's results):
    alpaca      alpaca-eval: answers of models to 805 instructions, preferred by GPT-4; 1,815 pairs
                to train on, 600 pairs over other instructions to evaluate on
    hh          hh-harmless: 1,800 pairs in five folds, grouped by dialogue, so that every pair is
                evaluated once, by a model that has not seen its dialogue
    alpaca-512  alpaca, cut to 512 tokens in place of 256: the longer answer, and heads
    built-in    train.py's own data, 1,000 steps from scratch

A cell is DATA/ARM/OBJECTIVE/VARIANT/SEED:
    longer      the longer answer, in tokens: `whole`, and `cut` as the models see it
    words       logistic regression on the words of a response, as differences of log(1 + count)
    head        a linear head on frozen features of SmolLM2-135M-Instruct, computed once
    all         all weights, by train.py
Objectives: `end` and `divergent`, those of --loss; `both`, their sum; and of a head alone
`shorter`, the divergent region up to the shorter end.
Variants of a head: HEADS below. Variants of `all`: the learning rate. Learning rates and penalties
are chosen by the loss of end scores on a fifth of the training pairs, other instructions or
dialogues than the rest; a head is then trained on all training pairs; a model with all weights
stays as it is, trained on four fifths, since a second training would cost as much as the first.
"""

import itertools
import json
import re
import sys
import time
from collections import Counter
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
import torch.nn.functional as F

import data
import rm
import train
from parts.distributed import Process
from parts.flags import number, parse_flags
from parts.huggingface import FAMILIES
from tools.study_cells import results, run_cells, selected
from tools.study_measures import correctness
from tools.study_pairs import (
    READINGS,
    Features,
    Pairs,
    held_out,
    lines_of,
    load_features,
    load_pairs,
    margins_of,
)

NAME = "real.jsonl"
DIRECTORIES = {"alpaca": "alpaca-eval", "hh": "hh-harmless", "alpaca-512": "alpaca-eval"}
MAX_SEQ_LENS = {"alpaca": 256, "hh": 256, "alpaca-512": 512}
END = READINGS.index("end")
HEAD_RATES = (3e-4, 1e-3, 3e-3, 1e-2)
PENALTIES = (1.0, 1e-1, 1e-2, 1e-3)
ALL_RATES = ("5e-5", "2e-5", "1e-4")
BATCH = 8  # pairs in a step, of heads and of all weights
BUILT_IN_STEPS = 1000
RARE = 5  # a word that fewer responses have is left out


@dataclass(frozen=True)
class Head:
    """The training of a head: by train.py's optimizer, schedule and first weights, or otherwise."""

    zeros: bool = False  # starts at zero, not at nn.Linear's random numbers
    epochs: int = 5
    share: float = 1.0  # of the training pairs
    optimum: bool = False  # the minimum of the loss plus a penalty, in place of steps from a start


HEADS = {
    "default": Head(),
    "optimum": Head(optimum=True),
    "zeros": Head(zeros=True),
    "half": Head(share=1 / 2),
    "quarter": Head(share=1 / 4),
    "epochs-20": Head(epochs=20),
}
OBJECTIVES_OF_HEADS = ("end", "divergent", "both", "shorter")


def all_cells(seeds: list[int]) -> list[str]:
    """List all cells, in the order in which they run."""
    cells = []
    for kind, arm in itertools.product(DIRECTORIES, ("longer/-/whole", "longer/-/cut")):
        cells.append(f"{kind}/{arm}/1")
    cells += ["alpaca/words/-/-/1", "hh/words/-/-/1"]  # they read whole responses
    heads = itertools.product(HEADS, ("hh", "alpaca"), seeds)
    heads = itertools.chain(heads, itertools.product(["default"], ["alpaca-512"], seeds))
    for variant, kind, seed in heads:
        for objective in OBJECTIVES_OF_HEADS:
            is_rare = objective == "shorter" and variant not in ("default", "optimum")
            is_repeat = variant != "default" and seed != seeds[0]
            if not is_rare and not is_repeat:
                cells.append(f"{kind}/head/{objective}/{variant}/{seed}")
    for seed, objective in itertools.product(seeds, (*rm.LOSSES, "both")):
        cells.append(f"built-in/all/{objective}/1000-steps/{seed}")
    for rate, objective in itertools.product(ALL_RATES, ("end", "divergent")):
        cells.append(f"alpaca/all/{objective}/{rate}/{seeds[0]}")
    cells.append(f"alpaca/all/both/{ALL_RATES[0]}/{seeds[0]}")
    return cells


# --------------------------------------------------------------------------------------------------
# Linear arms: a weight vector w turns differences of features into margins


@dataclass
class Regression:
    """Differences of features, row by row, and how much each of them weighs in its pair's loss.

    The loss of a pair is the sum of weight * -log sigmoid(row @ w) over its rows.

    rows: (R, C). weights: (R,). counts: (N,), rows of each pair, pair after pair.
    """

    rows: torch.Tensor
    weights: torch.Tensor
    counts: torch.Tensor

    def of(self, pairs: np.ndarray) -> "Regression":
        """Select pairs."""
        starts = self.counts.cumsum(0) - self.counts
        counts = self.counts[pairs]
        within = torch.arange(int(counts.sum())) - (counts.cumsum(0) - counts).repeat_interleave(
            counts
        )
        chosen = starts[pairs].repeat_interleave(counts) + within
        return Regression(self.rows[chosen], self.weights[chosen], counts)

    def loss(self, w: torch.Tensor) -> torch.Tensor:
        """Compute the mean loss over the pairs. w: (C,)."""
        margins = self.rows.to(w.dtype) @ w
        return (self.weights * F.softplus(-margins)).sum() / len(self.counts)


def regression_of(features: Features, objective: str) -> Regression:
    """Make the rows and weights with which a head on these features has the loss of `objective`."""
    counts = features.counts
    within = torch.arange(len(features.region)) - (counts.cumsum(0) - counts).repeat_interleave(
        counts
    )
    every = counts.repeat_interleave(counts)
    ends = features.readings[:, END].half()
    if objective == "end":
        return Regression(ends, torch.ones(len(ends)), torch.ones_like(counts))
    if objective == "divergent":
        return Regression(features.region, 1 / every, counts)
    if objective == "shorter":
        texts = features.texts.repeat_interleave(counts)
        return Regression(features.region, (within < texts) / texts, counts)
    if objective != "both":
        raise ValueError(f"objective: found {objective!r}; expected end, divergent, shorter, both")
    rows, weights = [], []
    for region, end in zip(features.region.split(counts.tolist()), ends):
        rows += [region, end[None]]
        weights += [torch.full((len(region),), 1 / len(region)), torch.ones(1)]
    return Regression(torch.cat(rows), torch.cat(weights), counts + 1)


def by_steps(regression: Regression, rate: float, head: Head, seed: int) -> torch.Tensor:
    """Train a head (C,) as train.py trains: its optimizer, schedule, batches and first weights."""
    torch.manual_seed(seed)
    layer = torch.nn.Linear(regression.rows.shape[1], 1, bias=False)
    if head.zeros:
        layer.weight.data.zero_()
    optimizer = torch.optim.AdamW([layer.weight], betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    n = len(regression.counts)
    total = head.epochs * -(-n // BATCH)
    for step in range(total):
        optimizer.param_groups[0]["lr"] = train.learning_rate("cosine", rate, step, 0, total)
        batch = regression.of(train.batch_indices(n, BATCH, seed, step))
        batch.loss(layer.weight[0]).backward()
        torch.nn.utils.clip_grad_norm_(layer.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return layer.weight[0].detach()


def by_minimum(regression: Regression, penalty: float) -> torch.Tensor:
    """Minimize the loss + penalty * |w|^2, which is convex, by L-BFGS: w (C,)."""
    rows = regression.rows.float()
    regression = Regression(rows, regression.weights, regression.counts)
    w = torch.zeros(rows.shape[1], requires_grad=True)
    optimizer = torch.optim.LBFGS([w], max_iter=60, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = regression.loss(w) + penalty * w.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return w.detach()


def linear_arm(
    regression: Regression, readings: torch.Tensor, pairs: Pairs, head: Head, seed: int
) -> dict:
    """Train and evaluate a linear arm on every fold.

    readings: (N, 6, C), where margins are read. Returns the margins, by pair in the order of the
    folds, the rate or penalty chosen in each fold, and the losses and accuracies that say why.
    """
    settings = PENALTIES if head.optimum else HEAD_RATES

    def fit(training: np.ndarray, setting: float) -> torch.Tensor:
        some = regression.of(training)
        return by_minimum(some, setting) if head.optimum else by_steps(some, setting, head, seed)

    margins, chosen, trials = [], [], []
    for training, evaluation in pairs.folds:
        training = training_share(training, pairs.clusters, head.share)
        part, rest = held_out(training, pairs.clusters)
        losses, accuracies = [], []
        for setting in settings:
            margin = (readings[rest, END] @ fit(part, setting)).numpy()
            losses.append(float(np.logaddexp(0, -margin).mean()))
            accuracies.append(float(correctness(margin).mean()))
        best = settings[int(np.argmin(losses))]
        chosen.append(best)
        trials.append({"held_out_loss": losses, "held_out_accuracy": accuracies})
        margins.append(readings[evaluation] @ fit(training, best))
    found = {"settings": settings, "chosen": chosen, "trials": trials}
    return found | {"pairs": len(pairs.folds[0][0]), "margins": torch.cat(margins).numpy()}


def training_share(training: np.ndarray, clusters: np.ndarray, share: float) -> np.ndarray:
    """Take the first clusters of the training pairs, about `share` of them."""
    names = np.unique(clusters[training])
    names = np.random.RandomState(0).permutation(names)[: round(share * len(names))]
    return training[np.isin(clusters[training], names)]


# --------------------------------------------------------------------------------------------------
# The arms


def word_regression(pairs: Pairs) -> tuple[Regression, torch.Tensor]:
    """Count words: rows (N, words) for a regression, and the same as readings (N, 6, words)."""
    counted, seen = [], Counter()
    for comparison in pairs.comparisons:
        texts = []
        for response in comparison.responses:
            text = response if isinstance(response, str) else response[-1]["content"]
            texts.append(Counter(re.findall(r"\w+|[^\w\s]", text.lower())))
            seen.update(texts[-1].keys())
        counted.append(texts)
    vocabulary = sorted(word for word, count in seen.items() if count >= RARE)
    place = {word: i for i, word in enumerate(vocabulary)}
    rows = torch.zeros(len(counted), len(vocabulary))
    for row, texts in zip(rows, counted):
        for sign, words in zip((1, -1), texts):
            for word, count in words.items():
                if word in place:
                    row[place[word]] += sign * float(np.log1p(count))
    ones = torch.ones(len(rows))
    regression = Regression(rows, ones, ones.long())
    return regression, rows[:, None].expand(-1, len(READINGS), -1)


def longer_arm(pairs: Pairs, variant: str) -> dict:
    """Take the longer response: its margin is the difference of lengths, the same at any place."""
    evaluation = np.concatenate([part for _, part in pairs.folds])
    lengths = pairs.lengths
    if variant == "cut":
        lengths = np.array([[len(text) for text in group] for group in pairs.groups])
    margins = (lengths[:, 0] - lengths[:, 1])[evaluation]
    return {"margins": np.repeat(margins[:, None], len(READINGS), 1).astype(float)}


def forward_with_both(self: rm.RewardModel, batch, forward_packed=rm.RewardModel.forward_packed):
    """Compute what `forward_packed` does, with the loss of the end scores added to `divergent`."""
    out = forward_packed(self, batch)
    end_loss = F.softplus(out["rejected_mean_scores"] - out["chosen_mean_scores"]).mean()
    return out | {"loss": out["loss"] + end_loss}


def train_flags(out: Path, objective: str, seed: str, more: list) -> list[str]:
    loss = "divergent" if objective == "both" else objective
    return ["--loss", loss, "--seed", seed, "--output_dir", str(out), *map(str, more)]


def all_weights_flags(cell: str, options) -> list[str]:
    """List train.py's flags for a cell of `alpaca/all`, where they are not its defaults."""
    _, _, objective, rate, seed = cell.split("/")
    files = options.out / "alpaca-part.jsonl", options.out / "alpaca-held-out.jsonl"
    more = ["--data_path", files[0], "--eval_path", files[1], "--eval_iters", 1]
    more += ["--model_name_or_path", options.backbone, "--max_seq_len", MAX_SEQ_LENS["alpaca"]]
    # Micro-batches of 4 pairs: 9 to 10 GB of memory, in place of 11.
    more += ["--per_device_train_batch_size", BATCH // 2, "--gradient_accumulation_steps", 2]
    more += ["--dtype", "bf16"]
    more += ["--learning_rate", rate, "--num_warmup_steps", 10]
    more += ["--save_interval", 45, "--keep_checkpoints", 1, "--resume"]
    return train_flags(options.out / cell, objective, seed, more)


def train_by(out: Path, objective: str, flags: list[str]) -> bool:
    """Train by train.py's loop, unless the model is there. Returns whether training has ended."""
    model = out / "pytorch_model.bin"
    if not model.exists():
        print(f"train.py {' '.join(flags)}", flush=True)
        with patch.object(sys, "argv", ["train.py", *flags]):
            args = parse_flags(list(FAMILIES), rm.LOSSES)
        with ExitStack() as stack:
            if objective == "both":
                stack.enter_context(
                    patch.object(rm.RewardModel, "forward_packed", forward_with_both)
                )
            train.train(args, Process.start(False, args.process_timeout))
    return model.exists()


def seconds_of(out: Path) -> float:
    """Sum the seconds of the steps of a run of train.py, without evaluations."""
    events = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return sum(event["seconds"] for event in events if event["event"] == "step")


def all_weights(cell: str, pairs: Pairs, options) -> dict | None:
    """Train all weights on four fifths of alpaca-eval's pairs, and evaluate."""
    training, evaluation = pairs.folds[0]
    part, rest = held_out(training, pairs.clusters)
    lines = lines_of(options.data / DIRECTORIES["alpaca"] / "train.jsonl.gz")
    if len(lines) != len(training):
        raise ValueError(f"{len(lines)} rows for {len(training)} training pairs: some were dropped")
    for name, indices in (("part", part), ("held-out", rest)):
        text = "".join(lines[i] for i in indices)
        (options.out / f"alpaca-{name}.jsonl").write_text(text)
    objective = cell.split("/")[2]
    if not train_by(options.out / cell, objective, all_weights_flags(cell, options)):
        return None
    model = rm.RewardModel.from_pretrained(options.out / cell)
    held_out_margins = margins_of(model, [pairs.groups[i] for i in rest])
    return {
        "pairs": len(part),
        "training_seconds": seconds_of(options.out / cell),
        "held_out_loss": float(np.logaddexp(0, -held_out_margins[:, END]).mean()),
        "held_out_accuracy": float(correctness(held_out_margins[:, END]).mean()),
        "margins": margins_of(model, [pairs.groups[i] for i in evaluation]),
    }


def built_in(cell: str, options) -> dict | None:
    """Train on the built-in data, as train.py does without a flag, and evaluate on its eval set."""
    _, _, objective, _, seed = cell.split("/")
    out = options.out / cell
    more = ["--max_steps", BUILT_IN_STEPS, "--eval_interval", 0, "--resume"]
    if not train_by(out, objective, train_flags(out, objective, seed, more)):
        return None
    tokenizer = data.load_tokenizer(out)
    comparisons = itertools.islice(data.known_rewards(train.EVAL_SEED), train.EVAL_PAIRS)
    groups = [data.tokenize(comparison, tokenizer, 512) for comparison in comparisons]
    model = rm.RewardModel.from_pretrained(out)
    return {"training_seconds": seconds_of(out), "margins": margins_of(model, groups, 64)}


class Workplace:
    """Pairs and features, loaded once in a process, when the first cell needs them."""

    def __init__(self, options):
        self.options = options
        self.tokenizer = data.load_tokenizer(options.backbone)
        self.pairs, self.features, self.words = {}, {}, {}

    def pairs_of(self, kind: str) -> Pairs:
        if kind not in self.pairs:
            directory = self.options.data / DIRECTORIES[kind]
            out = self.options.out
            pairs = load_pairs(directory, self.tokenizer, MAX_SEQ_LENS[kind], out)
            evaluation = np.concatenate([part for _, part in pairs.folds])
            facts = {"clusters": pairs.clusters[evaluation], "lengths": pairs.lengths[evaluation]}
            facts = {name: numbers.tolist() for name, numbers in facts.items()}
            (out / f"pairs-{kind}.json").write_text(json.dumps(facts | {"dropped": pairs.dropped}))
            self.pairs[kind] = pairs
        return self.pairs[kind]

    def features_of(self, kind: str) -> Features:
        if kind not in self.features:
            place = str(self.options.backbone), self.tokenizer.pad_id, self.options.out / "features"
            features = load_features(self.pairs_of(kind).groups, *place)
            positions = features.counts.double().mean()
            in_region, at_end = features.region.float().std(), features.readings[:, END].std()
            print(
                f"{kind}: {positions:.0f} positions in the region of a pair; differences of hidden "
                f"states: standard deviation {in_region:.2f} there, {at_end:.2f} at the end"
            )
            self.features[kind] = features
        return self.features[kind]

    def run_cell(self, cell: str) -> dict | None:
        """Run a cell: its line of real.jsonl, or None where it was interrupted."""
        kind, arm, objective, variant, seed = cell.split("/")
        began = time.perf_counter()
        if kind == "built-in":
            found = built_in(cell, self.options)
        elif arm == "all":
            found = all_weights(cell, self.pairs_of(kind), self.options)
        elif arm == "longer":
            found = longer_arm(self.pairs_of(kind), variant)
        elif arm == "words":
            regression, readings = word_regression(self.pairs_of(kind))
            found = linear_arm(regression, readings, self.pairs_of(kind), Head(optimum=True), 1)
        else:
            features = self.features_of(kind)
            regression = regression_of(features, objective)
            how = features.readings, self.pairs_of(kind), HEADS[variant], int(seed)
            found = linear_arm(regression, *how)
        if found is None:
            return None
        margins = found.pop("margins")
        accuracy = correctness(margins[:, END]).mean()
        seconds = time.perf_counter() - began
        print(f"{cell}: accuracy {accuracy:.4f}, {seconds:.0f} s", flush=True)
        rounded = np.round(margins, 4).T.tolist()
        return {"cell": cell, "seconds": round(seconds, 1), **found} | dict(zip(READINGS, rounded))


# --------------------------------------------------------------------------------------------------
# The program

# Seconds of a cell on one free thread of an AMD Xeon with AMX.
SECONDS = {"longer": 1, "words": 40, "head": 20, "built-in": 130, "all": 2200, "features": 550}


def estimate(cells: list[str]) -> float:
    """Estimate the seconds that cells take on one thread."""
    total = 0.0
    with_features = set()
    for cell in cells:
        kind, arm, *_ = cell.split("/")
        total += SECONDS["built-in" if kind == "built-in" else arm]
        if arm == "head":
            with_features.add(kind)
    return total + SECONDS["features"] * len(with_features)


def real(options):
    """Train and measure the cells on real pairs that are missing."""
    cells = all_cells(options.seeds)
    cells = selected(cells, options.only, f"{cells[0]}, alpaca/head or {', '.join(DIRECTORIES)}")
    done = {row["cell"] for row in results(options.out, NAME)}
    missing = [cell for cell in cells if cell not in done]
    hours = estimate(missing) / 3600
    print(
        f"{len(missing)} of {len(cells)} cells to run, about {hours:.1f} hours of one free thread"
    )
    for cell in missing:
        print(f"    {cell}")
    if options.plan or not missing:
        return
    workplace = Workplace(options)
    run_cells(options.out, missing, workplace.run_cell, NAME)


def add_program(programs):
    """Add `real` to the programs of tools/study.py."""
    words = real.__doc__.splitlines()[0]
    parser = programs.add_parser("real", help=words, description=words, allow_abbrev=False)
    parser.set_defaults(call=real)
    flag = parser.add_argument
    flag("--out", type=Path, required=True, metavar="DIR")
    flag("--data", type=Path, required=True, metavar="DIR", help="has alpaca-eval, hh-harmless")
    flag("--backbone", type=Path, help="SmolLM2-135M-Instruct (OUT/SmolLM2)")
    flag("--seeds", type=number(int, 0, 2**32 - 1), nargs="+", default=[1, 2, 3], help="(1 2 3)")
    flag("--only", nargs="+", metavar="CELL", help="cells that begin with these names (all)")
    flag("--plan", action="store_true", help="only list the missing cells, and what they take")
