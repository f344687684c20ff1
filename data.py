"""Comparisons in, token ids out; and a built-in data set with known rewards.

File formats: parts/rows.py. Tokenizers: parts/tokenizers.py. Chat templates: parts/chat.py. Token
files on the disk: parts/token_cache.py.
"""

import math
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch

# Names that nothing below uses, such as PackedBatch and load_tokenizer, are imported for callers.
from parts.chat import encode_prompt, notes_on, without_ends
from parts.packed import PackedBatch, pack, shared_prefix
from parts.rows import TWICE, Reading, files_of, parse_row, parsed_rows, reading_of, row_by_row
from parts.token_cache import Tokenized, TokenizedData, cut_sequences, rows_of, select, token_file
from parts.tokenizers import Tokenizer, has_tokenizer, load_tokenizer, train_tokenizer

# --------------------------------------------------------------------------------------------------
# Comparisons


@dataclass
class Comparison:
    """A prompt and two or more responses, or one that is only to be scored.

    Both are text, or chat messages {"role", "content"}: prompt + response is the whole dialogue.
    """

    prompt: str | list[dict]  # [] is none
    responses: list[str] | list[list[dict]]  # best first
    rewards: list[float] | None = None  # their true rewards, where these are known
    margin: float = 0.0  # of a pair: by how much the first is to be better (Llama 2, eq. 2)
    target: float = 1.0  # of a pair: the probability that the first is preferred
    subset: str | None = None
    ranked: bool = True  # False: the first is preferred to each of the others, and that is all
    notes: tuple[str, ...] = ()  # what a reader of the file should know of this row
    where: str = field(default="", compare=False)  # the file and the line that it is from


def load_comparisons(
    path, fields=None, ignore_fields=(), text_as="text", min_responses=2, bad_rows=None
) -> Iterator[Comparison]:
    """Yield the comparisons of a file, a directory or a glob in order, reading row by row.

    fields: {our name: the name in the file}. ignore_fields: names. text_as: "text" or "messages".
    min_responses: 1 allows rows of one response, and of one chosen and several rejected ones.
    bad_rows: a list; a row that is no comparison is skipped, and "line: what is wrong" appended.
    Raises ValueError that names the file and the line; also with `bad_rows` where a file cannot
    be read to its end, or no row of it is a comparison.
    """
    reading = reading_of(fields, ignore_fields, text_as)
    parse = partial(parse_comparison, reading=reading, min_responses=min_responses)
    for file in files_of([path]):
        for line, comparison in parsed_rows(file, parse, bad_rows):
            comparison.where = f"{file}:{line}"
            yield comparison


def parse_comparison(text: bytes, reading=Reading(), min_responses: int = 2) -> Comparison:
    """Make a Comparison of the JSON of a row. Raises ValueError as `parse_row` does."""
    return Comparison(**parse_row(text, reading, min_responses))


def split_indices(n: int, data_split: list[float], stage: int, seed: int) -> np.ndarray:
    """Return the row numbers, uint32, of one stage's share of a file of n rows.

    data_split: the stages' shares, of any sum. stage: 0 is supervised fine-tuning, 1 the reward
    model, 2 PPO. Stages do not overlap, here or in DeepSpeed-Chat, if all have the same seed: this
    is its `get_raw_dataset_split_index`.
    """
    bounds = [0]
    for share in data_split:
        bounds.append(bounds[-1] + int(round(share / sum(data_split) * float(n))))
    excess = bounds[-1] - n
    bounds[1:] = [bound - excess for bound in bounds[1:]]
    order = np.arange(n, dtype=np.uint32)
    np.random.RandomState(seed).shuffle(order)
    return order[bounds[stage] : bounds[stage + 1]]


# --------------------------------------------------------------------------------------------------
# Tokens


def tokenize(
    comparison: Comparison, tokenizer: Tokenizer, max_seq_len: int, truncation_side: str = "left"
) -> list[list[int]]:
    """Return the token ids of a comparison's sequences, best first.

    A sequence is bos, prompt + response encoded as one string, eos. bos stands where the tokenizer
    has one, eos where it is not also the pad; a text that has them already gets no second one.
    Sequences over `max_seq_len` are truncated. "left" keeps bos and eos and drops the same number
    of tokens from the start of every text, at most the tokens that all texts share; the end of a
    text that is still too long is dropped, too. "right" drops the end, eos included
    (DeepSpeed-Chat).
    Raises ValueError where a sequence would have no token, or a template refuses the messages.
    """
    texts = [tokenizer.encode(text) for text in texts_of(comparison, tokenizer)]
    return sequences_of(texts, comparison.prompt, tokenizer, max_seq_len, truncation_side)


def texts_of(comparison: Comparison, tokenizer: Tokenizer) -> list[str]:
    """Return the text of every sequence of a comparison; a dialogue is rendered as a whole."""
    whole = [comparison.prompt + response for response in comparison.responses]
    if isinstance(comparison.prompt, str):
        return whole
    return [tokenizer.render(messages) for messages in whole]


def sequences_of(
    texts: list[list[int]], prompt, tokenizer: Tokenizer, max_seq_len: int, side: str
) -> list[list[int]]:
    """Put bos and eos around encoded texts, and truncate them, as `tokenize` says."""
    texts = [without_ends(text, tokenizer) for text in texts]
    bos = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    eos = [] if tokenizer.eos_id in (None, tokenizer.pad_id) else [tokenizer.eos_id]
    is_bare = not bos and not eos
    if is_bare and [] in texts:
        raise ValueError(
            f"responses[{texts.index([])}] and its prompt are empty, "
            "and the tokenizer puts no bos or eos around them"
        )
    if side == "right":
        return [(bos + text + eos)[:max_seq_len] for text in texts]
    room = max_seq_len - len(bos) - len(eos)
    excess = max(map(len, texts)) - room
    if excess > 0:
        # A single response shares its prompt with the responses that it may be compared with.
        sharing = texts if len(texts) > 1 else [*texts, encode_prompt(prompt, tokenizer)]
        cut = min(excess, shared_prefix(sharing))
        if is_bare:
            cut = min(cut, min(map(len, texts)) - 1)  # a sequence has a token
        texts = [text[cut : cut + room] for text in texts]
    return [bos + text + eos for text in texts]


def tokenized(comparison: Comparison, texts, tokenizer, max_seq_len: int, side: str) -> Tokenized:
    """Make the sequences of a comparison's encoded texts, as `tokenize` does; drop repeats."""

    def cut(length: int) -> list[list[int]]:
        return sequences_of(texts, comparison.prompt, tokenizer, length, side)

    facts = {name: getattr(comparison, name) for name in ("margin", "rewards", "target", "subset")}
    return cut_sequences(Tokenized([], **facts), cut, max_seq_len)


def tokenize_each(
    comparisons: Iterable[Comparison], tokenizer: Tokenizer, max_seq_len: int, side: str = "left"
) -> Iterator[Tokenized]:
    """Tokenize a stream of comparisons, such as `known_rewards`, and drop identical sequences."""
    for number, comparison in enumerate(comparisons, start=1):
        texts = [tokenizer.encode(text) for text in texts_of(comparison, tokenizer)]
        found = tokenized(comparison, texts, tokenizer, max_seq_len, side)
        if found.sequences:
            yield found._replace(where=f"built-in comparison {number}")


def tokenize_all(comparisons: Iterable[Comparison], *how) -> TokenizedData:
    """Tokenize comparisons in memory; drop and count comparisons with identical sequences.

    how: the arguments of `tokenize` after the comparison.
    """
    comparisons = list(comparisons)
    kept = list(tokenize_each(comparisons, *how))
    selected = np.array([(0, row) for row in range(len(kept))])
    truncated = sum(comparison.truncated for comparison in kept)
    return TokenizedData([kept], selected, len(comparisons) - len(kept), truncated)


def tokenize_file(
    path, tokenizer, max_seq_len, truncation_side, cache_dir, skip_bad_rows=False, reading=Reading()
):
    """Tokenize the comparisons of a file, which may be larger than memory, into `cache_dir`.

    A row whose sequences are identical keeps its number, and has no sequences. Done once:
    `parts.token_cache.token_file` says how files are found again, and what it raises.
    """

    def tokenize_chunk(rows: list[bytes]) -> list:
        return tokenize_rows(rows, tokenizer, max_seq_len, truncation_side, reading)

    keys = tokenizer.fingerprint(), max_seq_len, truncation_side, skip_bad_rows, reading
    return token_file(path, cache_dir, row_by_row(tokenize_chunk), *keys)


def tokenize_rows(
    rows: list[bytes], tokenizer: Tokenizer, max_seq_len: int, side: str, reading: Reading
) -> list[tuple | ValueError]:
    """Tokenize the JSON of rows, all texts in one call of `encode_batch`.

    Returns a Tokenized, without sequences where they are identical, and the notes of every row, or
    the ValueError that says what is wrong with the row.
    """
    parsed, texts = [], []
    for row in rows:
        try:
            comparison = parse_comparison(row, reading)
            comparison.notes += notes_on(comparison.prompt, tokenizer)
            texts += texts_of(comparison, tokenizer)
        except ValueError as error:
            comparison = error
        parsed.append(comparison)
    encoded = iter(tokenizer.encode_batch(texts))
    results = []
    for comparison in parsed:
        if isinstance(comparison, ValueError):
            results.append(comparison)
            continue
        ids = [next(encoded) for _ in comparison.responses]
        try:
            found = tokenized(comparison, ids, tokenizer, max_seq_len, side)
        except ValueError as error:
            results.append(error)
            continue
        notes = comparison.notes
        if 0 < len(found.sequences) < len(ids):
            notes += (TWICE,)
        results.append((found, notes))
    return results


def pad_rows(sequences: list[list[int]], pad_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Right-pad N sequences to the longest, and return input_ids and mask, each (N, L) int64."""
    input_ids = torch.full((len(sequences), max(map(len, sequences))), pad_id)
    attention_mask = torch.zeros_like(input_ids)
    for row, sequence in enumerate(sequences):
        input_ids[row, : len(sequence)] = torch.tensor(sequence)
        attention_mask[row, : len(sequence)] = 1
    return input_ids, attention_mask


# --------------------------------------------------------------------------------------------------
# Built-in data with known rewards

# For each kind of question: how it is asked, how it is answered, and what is true. Each answer of a
# kind is right for one of its subjects and wrong for the others, so no word is better than another:
# a model that wants to know must read the question.
QUESTIONS = [
    (
        "What is the capital of {}?",
        "The capital of {} is {}.",
        {
            "France": "Paris",
            "Italy": "Rome",
            "Spain": "Madrid",
            "Japan": "Tokyo",
            "Egypt": "Cairo",
            "Norway": "Oslo",
        },
    ),
    (
        "What is a young {} called?",
        "A young {} is called a {}.",
        {
            "dog": "puppy",
            "cat": "kitten",
            "cow": "calf",
            "sheep": "lamb",
            "horse": "foal",
            "goat": "kid",
        },
    ),
    (
        "What is the opposite of {}?",
        "The opposite of {} is {}.",
        {"hot": "cold", "high": "low", "fast": "slow", "old": "new", "wet": "dry", "full": "empty"},
    ),
]
# The same words make a polite remark and a rude one, so tone is in their order. (polite, rude)
TONES = [
    ("I am happy to help, not annoyed.", "I am annoyed to help, not happy."),
    ("A pleasure, never a burden.", "A burden, never a pleasure."),
    ("Do ask me again, do not worry.", "Do worry, do not ask me again."),
]
RAMBLES = [
    "Anyway, time goes by.",
    "Well, one could say more.",
    "By the way, it rained.",
    "So much for that.",
]
QUALITY_REWARD = {"right": 3.5, "wrong": -1.0, "off topic": -3.5}
TONE_REWARD = {"polite": 1.4, "neutral": 0.0, "rude": -1.4}
RAMBLE_REWARD = -1.0  # of a sentence that leads nowhere


def known_rewards(seed: int) -> Iterator[Comparison]:
    """Yield comparisons of two responses whose true rewards are known, without end.

    The same seed gives the same stream. A prompt asks for one of 18 facts. A response states the
    fact, a wrong answer of the same kind, or another fact that was not asked for; then it may carry
    a polite or a rude remark, and then it may ramble for a sentence. Its true reward is the sum of
    QUALITY_REWARD, TONE_REWARD, and RAMBLE_REWARD where it rambles. Of the two, `responses[0]` is
    drawn with probability sigmoid(difference of their true rewards): Bradley & Terry (1952).

    The answer always comes first: otherwise the loss would compare texts that have ended with texts
    that have not answered yet, and no reward of theirs would be right (docs/study.md).
    """
    rng = random.Random(seed)
    while True:
        kind = rng.choice(QUESTIONS)
        subject = rng.choice(list(kind[2]))
        a, reward_a = write_response(rng, kind, subject)
        b, reward_b = write_response(rng, kind, subject)
        if reward_a == reward_b:
            continue  # nothing to learn or to get right
        if rng.random() >= 1 / (1 + math.exp(reward_b - reward_a)):
            a, b, reward_a, reward_b = b, a, reward_b, reward_a
        prompt = f"\n\nHuman: {kind[0].format(subject)}\n\nAssistant:"
        yield Comparison(prompt, [a, b], [reward_a, reward_b])


def write_response(rng: random.Random, kind, subject: str) -> tuple[str, float]:
    """Write a response to a kind's question about a subject; return it and its true reward."""
    quality = rng.choices(list(QUALITY_REWARD), weights=(0.45, 0.35, 0.2))[0]
    if quality == "off topic":
        kind, subject = rng.choice([(k, s) for k in QUESTIONS for s in k[2] if s != subject])
    answer = kind[2][subject]
    if quality == "wrong":
        answer = rng.choice([other for other in kind[2].values() if other != answer])
    tone = rng.choice(list(TONE_REWARD))
    rambles = rng.random() < 0.5
    sentences = [kind[1].format(subject, answer)]
    if rambles:
        sentences.append(rng.choice(RAMBLES))
    if tone != "neutral":
        remark = rng.choice(TONES)[tone == "rude"]
        sentences.insert(1, remark)
    reward = QUALITY_REWARD[quality] + TONE_REWARD[tone] + RAMBLE_REWARD * rambles
    reward = round(reward, 6)  # so that equal sums are equal numbers
    return " " + " ".join(sentences), reward
