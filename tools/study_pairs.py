"""Real pairs as the model sees them, where they are read, and their features of a frozen backbone.

The arms that learn from them are in tools/study_real.py.
"""

import gzip
import json
import math
import re
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

import data
import rm
from parts.packed import pack, reward_places, trunk_length
from parts.token_cache import cached, hash_of
from tools.study_cells import hidden_states

FRACTIONS = (0.25, 0.5, 0.75, 1.0)
# Where margins are read: after these shares of the responses, without their last token; at the last
# token, which is the score of a response; and the mean over the divergent region.
READINGS = ("25", "50", "75", "100", "end", "mean")
SPLIT_SEED = 18  # of the parts and folds: the same for every seed
FOLDS = 5  # of hh-harmless
NO_CUT = 1_000_000  # tokens: more than any text has


@dataclass
class Pairs:
    """The pairs of a data set, chosen first, and which of them train and evaluate together."""

    comparisons: list[data.Comparison]
    groups: list[list[list[int]]]  # token ids, cut to max_seq_len
    lengths: np.ndarray  # (N, 2), tokens behind what a pair shares, before it is cut
    clusters: np.ndarray  # (N,), number of the instruction or dialogue
    folds: list[tuple[np.ndarray, np.ndarray]]  # indices: to train on, to evaluate on
    dropped: int  # pairs that are identical once they are cut


# --------------------------------------------------------------------------------------------------
# Files


def messages_of(dialogue: str) -> list[dict]:
    """Split a dialogue of hh-rlhf, "\\n\\nHuman: ...\\n\\nAssistant: ...", into chat messages."""
    before, *turns = re.split(r"\n\n(Human|Assistant): ?", dialogue)
    if before or not turns:
        raise ValueError(f"a dialogue: found {dialogue[:20]!r}...; expected '\\n\\nHuman: ' first")
    roles = {"Human": "user", "Assistant": "assistant"}
    messages = []
    for name, content in zip(turns[::2], turns[1::2]):
        messages.append({"role": roles[name], "content": content})
    return messages


def lines_of(file: Path) -> list[str]:
    with gzip.open(file, "rt") as lines:
        return list(lines)


def write_messages(source: Path, target: Path):
    """Write train and eval rows of hh-harmless as chat messages, for the model's own template."""
    rows = []
    for name in ("train", "eval"):
        for line in lines_of(source / f"{name}.jsonl.gz"):
            row = json.loads(line)
            rows.append({side: messages_of(row[side]) for side in ("chosen", "rejected")})
    target.write_text("".join(json.dumps(row) + "\n" for row in rows))


def numbered(names: Iterable[str]) -> np.ndarray:
    """Number names by their first occurrence: (N,) int64."""
    numbers = {}
    return np.array([numbers.setdefault(name, len(numbers)) for name in names])


def split_clusters(clusters: np.ndarray, parts: int) -> list[np.ndarray]:
    """Divide the indices of pairs into parts, so that no cluster is in two of them."""
    order = np.random.RandomState(SPLIT_SEED).permutation(np.unique(clusters))
    return [np.flatnonzero(np.isin(clusters, some)) for some in np.array_split(order, parts)]


def held_out(training: np.ndarray, clusters: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Divide training pairs: four fifths to train on, a fifth to choose a learning rate on."""
    chosen = split_clusters(clusters[training], 5)[0]
    return np.delete(training, chosen), training[chosen]


def load_pairs(directory: Path, tokenizer, max_seq_len: int, out: Path) -> Pairs:
    """Read the pairs of the directory alpaca-eval or hh-harmless.

    A cluster is an instruction of alpaca-eval; of hh-harmless, the dialogues that begin with the
    same message. alpaca-eval has a set to evaluate on; hh-harmless, five folds. out: where
    hh-harmless is written as chat messages.
    """
    is_alpaca = directory.name == "alpaca-eval"
    if is_alpaca:
        files = [directory / "train.jsonl.gz", directory / "eval.jsonl.gz"]
    else:
        files = [out / "hh.jsonl"]
        write_messages(directory, files[0])
    kept = []
    is_eval = []
    dropped = 0
    for file in files:
        for comparison in data.load_comparisons(file):
            group = data.tokenize(comparison, tokenizer, max_seq_len)
            if group[0] == group[1]:
                dropped += 1
                continue
            kept.append((comparison, group))
            is_eval.append(file.name.startswith("eval"))
    names = []
    lengths = []
    for comparison, _ in kept:
        first_message = (comparison.prompt or comparison.responses[0])[0]
        names.append(first_message["content"])
        whole = data.tokenize(comparison, tokenizer, NO_CUT)
        lengths.append([len(text) - trunk_length(whole) for text in whole])
    comparisons, groups = zip(*kept)
    clusters = numbered(names)
    every = np.arange(len(kept))
    if is_alpaca:
        folds = [(every[~np.array(is_eval)], every[is_eval])]
    else:
        folds = [(np.delete(every, part), part) for part in split_clusters(clusters, FOLDS)]
    return Pairs(list(comparisons), list(groups), np.array(lengths), clusters, folds, dropped)


# --------------------------------------------------------------------------------------------------
# Where scores are read


def reading_places(length: int, start: int) -> list[int]:
    """Find the positions after 25, 50, 75 and 100 % of a response, and that of its last token.

    length: tokens of the text. start: where the tokens begin that its pair does not share. The last
    token ends the text, and is no part of the response, unless it is all that there is.
    """
    response = length - 1 - start
    places = []
    for fraction in FRACTIONS:
        read = max(1, math.ceil(fraction * response))
        places.append(min(start + read, length) - 1)
    return [*places, length - 1]


def margins_at_places(group: list[list[int]], rewards: list[torch.Tensor]) -> list[float]:
    """Read the margin of a pair at each of READINGS.

    rewards: of both texts, (N,), from the end of the pair's trunk to the longer end.
    """
    trunk = trunk_length(group)
    margins = []
    places = [reading_places(len(text), trunk) for text in group]
    for chosen, rejected in zip(*places):
        margins.append(rewards[0][chosen - trunk] - rewards[1][rejected - trunk])
    start, stop = rm.divergent_region(*group)
    region = slice(start - trunk, stop - trunk)
    margins.append((rewards[0][region] - rewards[1][region]).mean())
    return [float(margin) for margin in margins]


@torch.no_grad()
def margins_of(model: rm.RewardModel, groups: list, at_once: int = 8) -> np.ndarray:
    """Compute the margins of pairs at each of READINGS: (N, 6), in bfloat16 products."""
    model.eval()
    margins = []
    for first in range(0, len(groups), at_once):
        batch = pack(groups[first : first + at_once], model.pad_id)
        with torch.autocast("cpu", torch.bfloat16):
            rewards = model.packed_rewards(batch)
        for group, places in zip(batch.token_groups, reward_places(batch)):
            of_pair = [rewards[of_text] for of_text in places]
            margins.append(margins_at_places(group, of_pair))
    return np.array(margins)


# --------------------------------------------------------------------------------------------------
# Features of a frozen backbone


@dataclass
class Features:
    """Differences of hidden states, chosen minus rejected: a linear head turns them into margins.

    region: (R, C) float16, of each position of each pair's divergent region, pair after pair.
    counts: (N,), positions of each pair's region. texts: (N,), those before the shorter end; 1
        where there is none, which does not happen to texts that end with eos.
    readings: (N, 6, C) float32, at each of READINGS.
    """

    region: torch.Tensor
    counts: torch.Tensor
    texts: torch.Tensor
    readings: torch.Tensor


def features_of_pair(group: list[list[int]], branches: list, tails: list) -> tuple:
    """Compute a pair's differences: region (N, C), positions of both texts in it, readings (6, C).

    branches, tails: hidden states of both texts behind the trunk, and of their padding.
    """
    trunk = trunk_length(group)
    chosen, rejected = (torch.cat(pieces).float() for pieces in zip(branches, tails))
    start, stop = rm.divergent_region(*group)
    region = (chosen - rejected)[start - trunk : stop - trunk]
    readings = []
    places = [reading_places(len(text), trunk) for text in group]
    for chosen_place, rejected_place in zip(*places):
        readings.append(chosen[chosen_place - trunk] - rejected[rejected_place - trunk])
    readings.append(region.mean(0))
    texts = max(1, min(map(len, group)) - start)
    return region, texts, torch.stack(readings)


def load_features(groups: list, backbone: str, pad_id: int, directory: Path) -> Features:
    """Compute the features of pairs in parts of 50, or find the parts that are in `directory`."""
    parts = []
    for first in range(0, len(groups), 50):
        some = groups[first : first + 50]

        def build(made: Path):
            began = time.perf_counter()
            with torch.autocast("cpu", torch.bfloat16):
                states = hidden_states(some, backbone, pad_id, at_once=5)
            regions, texts, readings = zip(
                *(features_of_pair(group, *states[hash_of(group)]) for group in some)
            )
            counts = torch.tensor([len(region) for region in regions])
            part = [torch.cat(regions).half(), counts, torch.tensor(texts), torch.stack(readings)]
            torch.save(part, made / "features.pt")
            took = time.perf_counter() - began
            print(f"features: {first + len(some)} of {len(groups)} pairs, {took:.1f} s", flush=True)

        key = hash_of("features 1", some, pad_id)
        parts.append(torch.load(cached(directory / key, build) / "features.pt"))
    return Features(*(torch.cat(tensors) for tensors in zip(*parts)))
