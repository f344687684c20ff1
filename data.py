"""Preference data: files of comparisons in, token ids out; the tokenizer; and a built-in data set with known rewards.

A comparison is one prompt and two or more responses, best first. Rows of a data file (.jsonl, .jsonl.gz, or .json) are any of

    {"prompt": "...", "chosen": "...", "rejected": "..."}     text; the sequence is prompt + response
    {"chosen": "...", "rejected": "..."}                      whole dialogues
    the same with chat messages [{"role": "...", "content": "..."}, ...] in place of text
    {"prompt": ..., "responses": [best, ..., worst]}          a ranking

A pair may have a "margin", a number: by how much the chosen response is to be better.

Chat messages become text by this template: a system message's content as it is, then for every turn
"\\n\\nHuman: " or "\\n\\nAssistant: " and its content.
"""

import collections
import fcntl
import functools
import gzip
import hashlib
import importlib.util
import io
import itertools
import json
import math
import multiprocessing
import os
import pickle
import random
import re
import shutil
import signal
import tempfile
import threading
import zlib
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import sentencepiece
import torch
from tqdm import tqdm

from parts.packed import PackedBatch, pack, packed_size, shared_prefix

# ----------------------------------------------------------------------------------------------------------------------
# Files


@dataclass
class Comparison:
    prompt: str
    responses: list[str]  # best first
    rewards: list[float] | None = None  # their true rewards, where these are known
    margin: float = 0.0  # of a pair: by how much the first is to be better (Touvron et al. 2023, Llama 2, eq. 2)


def load_comparisons(
    path, min_responses: int = 2, bad_rows: list | None = None
) -> Iterator[Comparison]:
    """The comparisons of one file, in its order, read row by row.

    With `min_responses=1` also rows {"prompt": ..., "response": ...}, as comparisons of one response.
    Raises ValueError that names the file and the line. With `bad_rows`, rows that are no comparison are left out instead,
    and "line: what is wrong" of each is appended to that list; a file that cannot be read to its end is still an error.
    """
    comparison = None
    for line, text in read_rows(path):
        try:
            comparison = parse_line(text, min_responses)
        except ValueError as error:
            bad_row(path, line, error, bad_rows)
        else:
            yield comparison
    if comparison is None:
        raise nothing_left(path, bad_rows)


def bad_row(path, line: int, error: ValueError, bad_rows: list | None):
    """Raise ValueError that says where and what is wrong, or put that into the list."""
    if bad_rows is None:
        raise ValueError(f"{path}:{line}: {error}") from None
    bad_rows.append(f"{line}: {error}")


def nothing_left(path, bad_rows: list[str]) -> ValueError:
    return ValueError(f"{path}: no row of it is a comparison, for example {path}:{bad_rows[-1]}")


def read_rows(path) -> Iterator[tuple[int, bytes]]:
    """(line number, JSON) for every row of a file. Raises ValueError that names the file and the line."""
    path, line, empty = Path(path), 0, True
    if not path.is_file():
        raise ValueError(
            f"{path}: {'is a directory' if path.is_dir() else 'no such file'}; expected .jsonl, .jsonl.gz or .json"
        )
    try:
        with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as file:
            is_array = path.suffix == ".json" and file.peek(1024).lstrip(
                b"\xef\xbb\xbf \t\r\n"
            ).startswith(b"[")
            for line, text in array_items(file.read()) if is_array else enumerate(file, start=1):
                text = (
                    text.removeprefix(b"\xef\xbb\xbf") if line == 1 and not is_array else text
                )  # a byte order mark
                if text.strip():
                    empty = False
                    yield line, text
    except (
        ValueError,
        RecursionError,
    ) as error:  # of an array; where neither gives a place, it is the array's first line
        before = (
            error.object[: error.start].count(b"\n")
            if isinstance(error, UnicodeDecodeError)
            else getattr(error, "lineno", 1) - 1
        )
        raise ValueError(f"{path}:{before + 1}: {not_json(error)}") from None
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(
            f"{path}:{line + 1}: cannot be decompressed ({error}); the file is cut, damaged, or not gzip"
        ) from None
    if empty:
        raise ValueError(f"{path}: no row in it; expected one JSON object a line")


def array_items(text: bytes) -> Iterator[tuple[int, bytes]]:
    """(line number, JSON) for every item of a JSON array."""
    text = text.decode("utf-8-sig")
    json.loads(
        text
    )  # says what is wrong with the syntax, if anything; but not on which line an item stands
    decoder, gap = json.JSONDecoder(), re.compile(r"[ \t\r\n,]*")
    position, line, counted = text.index("[") + 1, 1, 0
    while text[start := gap.match(text, position).end()] != "]":
        line, counted = line + text.count("\n", counted, start), start
        _, position = decoder.raw_decode(text, start)
        yield line, text[start:position].encode()


def parse_line(text: bytes, min_responses: int = 2) -> Comparison:
    """JSON -> Comparison. Raises ValueError that says what is wrong."""
    try:
        row = json.loads(text.decode().rstrip())
    except (ValueError, RecursionError) as error:
        raise ValueError(not_json(error)) from None
    return parse_row(row, min_responses)


def not_json(error: Exception) -> str:
    if isinstance(error, UnicodeDecodeError):
        return f"not UTF-8 ({error.reason}); save the file as UTF-8"
    if isinstance(error, json.JSONDecodeError):
        return f"not JSON ({error.msg}, column {error.colno}); expected one object a line, or in .json one array of objects"
    return f"not JSON that a row could be ({error})"  # a number of thousands of digits, lists nested thousands deep


def parse_row(row, min_responses: int = 2) -> Comparison:
    """One parsed row -> Comparison. Raises ValueError that says which field is wrong, and how."""
    if not isinstance(row, dict):
        raise ValueError(f"expected an object, found {json_type(row)}")
    if "chosen" in row or "rejected" in row:
        names, responses = ["chosen", "rejected"], [row.get("chosen"), row.get("rejected")]
    elif "responses" in row:
        responses = row["responses"]
        if not isinstance(responses, list) or len(responses) < 2:
            found = len(responses) if isinstance(responses, list) else json_type(responses)
            raise ValueError(
                f"responses: found {found}; a ranking is a list of two or more, best first"
            )
        names = [f"responses[{i}]" for i in range(len(responses))]
    elif min_responses == 1 and "response" in row:
        names, responses = ["response"], [row["response"]]
    else:
        keys = ", ".join(map(str, row)) or "none"
        raise ValueError(
            f"fields found: {keys}; expected chosen and rejected, or prompt and responses"
            + (", or prompt and response" if min_responses == 1 else "")
        )
    if "prompt" not in row and names[0] != "chosen":
        raise ValueError("prompt is missing; only rows of chosen and rejected can do without one")
    prompt = row.get("prompt", "")
    if any(isinstance(value, list) for value in [prompt, *responses]):
        # Plain text beside chat messages is the content of a message: the user's prompt, the assistant's response.
        prompt = parse_messages("prompt", prompt, "user")
        responses = [
            parse_messages(name, response, "assistant") for name, response in zip(names, responses)
        ]
        turns = [
            dialogue[1:] if dialogue and dialogue[0][0] == "system" else dialogue
            for dialogue in responses
        ]
        if all(
            prompt in (whole[: len(prompt)], rest[: len(prompt)])
            for whole, rest in zip(responses, turns)
        ):
            prompt = []  # whole dialogues that repeat the prompt (UltraFeedback), after a system message or not
        prompt, responses = chat_text(prompt), [chat_text(response) for response in responses]
    for name, text in zip(["prompt", *names], [prompt, *responses]):
        check_text(name, text)
    margin = row.get("margin")
    if margin is not None and len(responses) != 2:
        raise ValueError(f"margin: found with {len(responses)} responses; a margin is between two")
    if margin is not None and not (type(margin) in (int, float) and abs(margin) < 1e30):
        raise ValueError(
            f"margin: found {margin if type(margin) in (int, float) else json_type(margin)}; expected a number between -1e30 and 1e30"
        )
    return Comparison(prompt, responses, margin=float(margin or 0.0))


def parse_messages(name: str, value, role: str) -> list[tuple[str, str]]:
    """[{"role", "content"}, ...] -> [(role, content), ...]; plain text counts as one message of `role`, "" as none."""
    if isinstance(value, str):
        return [(role, value)] if value else []
    if not isinstance(value, list):
        raise ValueError(
            f"{name}: expected text or a list of chat messages, found {json_type(value)}"
        )
    messages = []
    for i, message in enumerate(value):
        if not isinstance(message, dict) or message.get("role") not in (
            "system",
            "user",
            "assistant",
        ):
            found = (
                f"role {json.dumps(message.get('role'))}"
                if isinstance(message, dict)
                else json_type(message)
            )
            raise ValueError(
                f"{name}[{i}]: found {found}; a message is an object whose role is system, user or assistant"
            )
        check_text(f"{name}[{i}].content", message.get("content"))
        messages.append((message["role"], message["content"]))
    return messages


def chat_text(messages: list[tuple[str, str]]) -> str:
    """The template for chat messages, that of Anthropic's hh-rlhf dialogues."""
    in_front = {"system": "", "user": "\n\nHuman: ", "assistant": "\n\nAssistant: "}
    return "".join(in_front[role] + content for role, content in messages)


def check_text(name: str, value):
    if not isinstance(value, str):
        raise ValueError(f"{name}: expected text, found {json_type(value)}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{name}: character {error.start} is half of a surrogate pair, which is no text"
        ) from None


def json_type(value) -> str:
    names = {
        dict: "an object",
        list: "a list",
        str: "text",
        bool: "true or false",
        type(None): "null or nothing",
    }
    return names.get(type(value), "a number")


def split_indices(n: int, data_split: list[float], stage: int, seed: int) -> np.ndarray:
    """Row numbers of one stage's share of a file of n rows: DeepSpeed-Chat's `get_raw_dataset_split_index`.

    data_split: the stages' shares, of any sum. stage: 0 is supervised fine-tuning, 1 the reward model, 2 PPO.
    Returns uint32. The same seed gives stages that do not overlap, in this code and in DeepSpeed-Chat.
    """
    bounds = [0]
    for share in data_split:
        bounds.append(bounds[-1] + int(round(share / sum(data_split) * float(n))))
    excess = bounds[-1] - n
    bounds[1:] = [bound - excess for bound in bounds[1:]]
    order = np.arange(n, dtype=np.uint32)
    np.random.RandomState(seed).shuffle(order)
    return order[bounds[stage] : bounds[stage + 1]]


# ----------------------------------------------------------------------------------------------------------------------
# Tokens


TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
)  # in the order in which they are looked for
CONFIG_FILES = (
    "added_tokens.json",
    "special_tokens_map.json",
    "tokenizer_config.json",
)  # beside them; the last word counts


class Tokenizer:
    """A sentencepiece model, with the special ids that a sequence needs.

    config: what tokenizer_config.json says of these, by the names of tokens, and of tokens that were added.
    pad_id: int. bos_id: int, or None where texts begin with none. eos_id: int or None.
    text_size: number of ids that the tokenizer came with. vocab_size: the same, with a new pad id if there is one.
    """

    def __init__(self, model_proto: bytes, pad_id: int | None = None, config: dict | None = None):
        self.model_proto, self.config = model_proto, (config := config or {})
        self.pieces = sentencepiece.SentencePieceProcessor(model_proto=model_proto)
        self.names = {i: self.pieces.id_to_piece(i) for i in range(self.pieces.get_piece_size())}
        self.names |= {
            int(i): token["content"] for i, token in config.get("added_tokens_decoder", {}).items()
        }
        ids = {name: i for i, name in self.names.items()}
        pad, bos, eos = (
            i if i >= 0 else None
            for i in (self.pieces.pad_id(), self.pieces.bos_id(), self.pieces.eos_id())
        )
        bos, eos = ids.get(config.get("bos_token"), bos), ids.get(config.get("eos_token"), eos)
        if ids.get(config.get("pad_token")) not in (None, bos, eos):
            pad = ids[config["pad_token"]]
        self.set_ids(
            max(self.names) + 1,
            pad,
            None if config.get("add_bos_token") is False else bos,
            eos,
            pad_id,
        )

    def set_ids(
        self, size: int, own_pad: int | None, bos: int | None, eos: int | None, pad_id: int | None
    ):
        if (
            pad_id is None
        ):  # a pad that is also eos or bos could be taken for text, so it gets an id of its own
            pad_id = size if own_pad in (None, bos, eos) else own_pad
        self.pad_id, self.bos_id, self.eos_id = pad_id, bos, eos
        self.text_size, self.vocab_size = size, max(size, pad_id + 1)

    def fingerprint(self) -> str:
        """What its token ids follow from."""
        return hash_of(self.model_proto, self.pad_id, self.bos_id, self.eos_id)

    def encode(self, text: str) -> list[int]:
        """Token ids, without special tokens."""
        return self.pieces.encode(text)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of token ids; special ids have none."""
        special = (self.pad_id, self.bos_id, self.eos_id, self.pieces.unk_id())
        return self.pieces.decode(
            [int(i) for i in ids if i < self.pieces.get_piece_size() and i not in special]
        )

    def save(self, directory):
        """Write the files from which `load_tokenizer(directory)` and, transformers' `AutoTokenizer` make this tokenizer."""
        directory, files = (
            Path(directory),
            {"tokenizer_config.json": self.config | {"pad_token_id": self.pad_id}},
        )
        try:
            from parts.hf_tokenizer import sentencepiece_files

            files |= sentencepiece_files(self)
        except ImportError:
            pass
        refuse_others(
            "tokenizer",
            [
                directory / name
                for name in TOKENIZER_FILES
                if name not in ("tokenizer.model", *files)
            ],
        )
        (directory / "tokenizer.model").write_bytes(self.model_proto)
        write_json(directory, files)


def refuse_others(kind: str, files: Iterable[Path]):
    """Raise ValueError where one of `files` exists, which are not those that a `kind` is to be saved in."""
    for file in files:
        if file.exists():
            raise ValueError(
                f"{file}: another {kind}, which could be read in place of the one to save; move it, or give another directory"
            )


def write_json(directory, files: dict[str, dict]):
    for name, content in files.items():
        (Path(directory) / name).write_text(
            json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
        )


def has_tokenizer(directory) -> bool:
    return any((Path(directory) / name).is_file() for name in TOKENIZER_FILES)


def load_tokenizer(path, pad_id: int | None = None) -> Tokenizer:
    """The tokenizer in a directory, or in one of these files; `pad_id` overrides its own.

    tokenizer.model: sentencepiece. tokenizer.json, or vocab.json beside merges.txt (byte-level BPE: GPT-2, OPT), and what
    the hub puts beside these three: by parts/hf_tokenizer.py. Raises ValueError that names the file.
    """
    path = Path(path)
    file = (
        next((path / name for name in TOKENIZER_FILES if (path / name).is_file()), path)
        if path.is_dir()
        else path
    )
    if not file.is_file():
        missing = "tokenizer in this directory" if path.is_dir() else "such file"
        raise ValueError(
            f"{path}: no {missing}; expected tokenizer.model, tokenizer.json, or vocab.json and merges.txt"
        )
    config, beside = (
        read_config(file.with_name("tokenizer_config.json")),
        file.with_name("tokenizer.model"),
    )
    # tokenizer.model needs no other library; but only of one that we saved do we know that tokenizer.json adds nothing to it.
    if (
        path.is_dir()
        and beside.is_file()
        and (config.get("split_special_tokens") or not importlib.util.find_spec("tokenizers"))
    ):
        file = beside
    if file.suffix == ".json" or any(file.with_name(name).is_file() for name in CONFIG_FILES):
        try:
            from parts.hf_tokenizer import HuggingFaceTokenizer, tokenizer_config

            config = tokenizer_config(file.parent)
        except ImportError:
            if (
                file.suffix == ".json" or "pad_token_id" not in config
            ):  # what `save` wrote can do without
                raise ValueError(
                    f"{file}: reading it and the files beside it needs parts/hf_tokenizer.py"
                ) from None
    pad_id = config.get("pad_token_id") if pad_id is None else pad_id
    try:
        if file.suffix == ".json":
            return HuggingFaceTokenizer(file, config, pad_id)
        if model_proto := file.read_bytes():  # sentencepiece takes an empty one
            return Tokenizer(model_proto, pad_id, config)
    except ImportError:
        raise ValueError(f"{file}: reading it needs `pip install -r requirements-hf.txt`") from None
    except Exception as error:  # tokenizers raises Exception itself
        raise ValueError(f"{file}: not a tokenizer, or damaged ({error})") from None
    raise ValueError(f"{file}: not a sentencepiece model, or damaged")


def read_config(file: Path) -> dict:
    """The object in one of CONFIG_FILES, {} where there is none."""
    try:
        config = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        if not isinstance(config, dict):
            raise ValueError(f"expected an object, found {json_type(config)}")
        pad_id = config.get(
            "pad_token_id"
        )  # ours says which pad id was chosen; Hugging Face's has no such key
        if not (pad_id is None or type(pad_id) is int and 0 <= pad_id < 2**24):
            raise ValueError(f"pad_token_id is {pad_id!r}; expected a token id")
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file}: {error}") from None
    return config


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """A sentencepiece BPE tokenizer with at most `vocab_size` ids; the same for the same texts, in the same order.

    Bytes are the fallback for what is not in the vocabulary, and nothing is normalized: no text is lost (but for U+2581,
    sentencepiece's own sign for a space, which comes back as one). Ids 0 to 3 are pad, bos, eos, unk.
    Raises ValueError where `vocab_size` is too small for the bytes and the text's characters.
    """
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(texts),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            hard_vocab_limit=False,
            byte_fallback=True,
            character_coverage=0.9995,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            max_sentence_length=1 << 24,
            num_threads=1,
            pad_id=0,
            bos_id=1,
            eos_id=2,
            unk_id=3,
            minloglevel=2,
        )
    except RuntimeError as error:
        found = re.search(
            r"(\d+) vs (\d+)", str(error)
        )  # sentencepiece compares what was asked for with what it needs
        needed = f"; {found[2]} would do" if found else f" ({error})"
        raise ValueError(
            f"{vocab_size} ids are too few for 256 bytes, 4 special ids and the text's characters{needed}"
        ) from None
    return Tokenizer(model.getvalue())


def tokenize(
    comparison: Comparison, tokenizer: Tokenizer, max_seq_len: int, truncation_side: str = "left"
) -> list[list[int]]:
    """The token ids of a comparison's sequences, best first: bos, prompt + response encoded as one string, eos.

    bos stands only where the tokenizer has one, eos only where it is not also the pad. What is longer than `max_seq_len`
    is truncated: "left" takes the same number of tokens off the start of every text, out of what all share and no more,
    keeps bos and eos, and cuts what is then still too long before eos. "right" cuts the end, eos too (DeepSpeed-Chat).
    """
    bos = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    eos = [] if tokenizer.eos_id in (None, tokenizer.pad_id) else [tokenizer.eos_id]
    texts = [tokenizer.encode(comparison.prompt + response) for response in comparison.responses]
    if not bos and not eos and [] in texts:
        raise ValueError(
            f"responses[{texts.index([])}] and its prompt are empty, and the tokenizer puts no bos or eos around them"
        )
    if truncation_side == "right":
        return [(bos + text + eos)[:max_seq_len] for text in texts]
    room = max_seq_len - len(bos) - len(eos)
    excess = max(map(len, texts)) - room
    if excess > 0:
        # A response that stands alone shares its prompt with the comparisons it could stand in.
        others = texts if len(texts) > 1 else [*texts, tokenizer.encode(comparison.prompt)]
        cut = min(excess, shared_prefix(others))
        if not bos and not eos:
            cut = min(cut, min(map(len, texts)) - 1)  # a sequence has a token
        texts = [text[cut : cut + room] for text in texts]
    return [bos + text + eos for text in texts]


def teaches_nothing(sequences: list[list[int]]) -> bool:
    """Whether all sequences of a comparison are, or became by truncation, the same."""
    return all(sequence == sequences[0] for sequence in sequences)


class Tokenized(NamedTuple):
    """A comparison as token ids."""

    sequences: list[list[int]]  # best first
    where: str = ""  # it is from: the file and the line
    margin: float = 0.0
    rewards: list[float] | None = None  # of the responses, where they are known


# Of a row of a file: its line, its margin, and which sequences it has: so many from the first one on, best first.
ROW = np.dtype(
    [("line", np.int64), ("margin", np.float64), ("first", np.int64), ("count", np.int64)]
)


@dataclass
class TokenizedFile:
    """The comparisons of one file, in arrays that are mapped from the disk. Item r: that of row r."""

    path: str
    key: str  # a hash of what all this follows from
    bad_rows: list[str]  # where a row was left out, and what is wrong with it
    tokens: np.ndarray  # (number of tokens,) int32, those of all sequences, one after the other
    sequences: np.ndarray  # (S + 1,) int64. Sequence s is tokens[sequences[s] : sequences[s + 1]]
    rows: np.ndarray  # (R,) ROW. One that teaches nothing has no sequences

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, row: int) -> Tokenized:
        line, margin, first, count = self.rows[row].tolist()
        bounds = self.sequences[first : first + count + 1].tolist()
        return Tokenized(
            [self.tokens[start:stop].tolist() for start, stop in zip(bounds, bounds[1:])],
            f"{self.path}:{line}",
            margin,
        )


@dataclass
class TokenizedData:
    """Comparisons to train or to evaluate on, which all teach something. Item i: row `selected[i, 1]` of `files[selected[i, 0]]`."""

    files: list[TokenizedFile] | list[list[Tokenized]]
    selected: np.ndarray  # (n, 2) int64
    dropped: int  # how many more were selected, and left out, as they teach nothing

    def __len__(self) -> int:
        return len(self.selected)

    def __getitem__(self, i: int) -> Tokenized:
        file, row = self.selected[i]
        return self.files[file][row]

    def fingerprint(self) -> str:
        """A hash of what its token ids and margins follow from, and of their order. Of files alone."""
        return hash_of([file.key for file in self.files], hashlib.sha256(self.selected).digest())


def select(files: list[TokenizedFile], selected: np.ndarray) -> TokenizedData:
    """selected: (n, 2) int64, numbers of files and of rows in them."""
    kept = np.zeros(len(selected), dtype=bool)
    for i, file in enumerate(files):
        of_file = selected[:, 0] == i
        kept[of_file] = file.rows["count"][selected[of_file, 1]] > 0
    return TokenizedData(files, selected[kept], int((~kept).sum()))


def tokenize_each(comparisons: Iterable[Comparison], *how) -> Iterator[Tokenized]:
    """`tokenize` for a stream of comparisons, like `known_rewards`. Those that teach nothing are left out."""
    for number, comparison in enumerate(comparisons, start=1):
        if not teaches_nothing(sequences := tokenize(comparison, *how)):
            yield Tokenized(
                sequences, f"built-in comparison {number}", comparison.margin, comparison.rewards
            )


def tokenize_all(comparisons: Iterable[Comparison], *how) -> TokenizedData:
    """The same for a number of comparisons that are in memory."""
    comparisons = list(comparisons)
    kept = list(tokenize_each(comparisons, *how))
    return TokenizedData(
        [kept], np.array([(0, row) for row in range(len(kept))]), len(comparisons) - len(kept)
    )


def tokenize_file(
    path, tokenizer, max_seq_len: int, truncation_side: str, cache_dir, skip_bad_rows: bool = False
) -> TokenizedFile:
    """The comparisons of a file as token ids, mapped from the disk: files may be larger than memory.

    They are written into `cache_dir` once, by one process of a machine, while others that want them wait. They are found
    there again by a hash of what they follow from: the content of the file, the tokenizer, and the other arguments.
    Raises ValueError that names the file and the line, or the file where no row of it has sequences that differ.
    """
    content = file_hash(path)
    key = hash_of(
        "tokens 3",
        content,
        Path(path).suffix,
        tokenizer.fingerprint(),
        max_seq_len,
        truncation_side,
        skip_bad_rows,
    )

    def build(directory: Path):
        lengths, rows, bad_rows = [], [], []
        with open(directory / "tokens.bin", "wb") as file:
            for tokens, *part, bad in tokenize_rows(
                path, tokenizer, max_seq_len, truncation_side, skip_bad_rows
            ):
                file.write(tokens)
                lengths.append(part[0])
                rows.append(part[1])
                bad_rows += bad
        sequences, rows = np.cumsum(np.concatenate(([0], *lengths))), np.concatenate(rows)
        rows["first"] = rows["count"].cumsum() - rows["count"]
        if len(rows) == 0:
            raise nothing_left(path, bad_rows)
        if len(sequences) == 1:
            raise ValueError(
                f"{path}: in all {len(rows)} rows the responses are identical (--max_seq_len {max_seq_len}); some must differ"
            )
        if file_hash(path) != content:
            raise ValueError(
                f"{path}: was changed while it was read; start again when it is complete"
            )
        np.save(directory / "sequences.npy", sequences)
        np.save(directory / "rows.npy", rows)
        (directory / "bad_rows.json").write_text(json.dumps(bad_rows))

    directory = cached(Path(cache_dir) / key, build)
    try:
        sequences, rows = (
            np.load(directory / name, mmap_mode="r") for name in ("sequences.npy", "rows.npy")
        )
        bad_rows = [
            f"{path}:{row}" for row in json.loads((directory / "bad_rows.json").read_text())
        ]
        tokens = np.memmap(directory / "tokens.bin", np.int32, "r")
        if len(tokens) != sequences[-1]:
            raise ValueError(f"{len(tokens)} tokens in place of {sequences[-1]}")
    except (OSError, EOFError, ValueError) as error:
        raise ValueError(
            f"{directory}: damaged ({error}); delete it, and it will be made again"
        ) from None
    return TokenizedFile(path, key, bad_rows, tokens, sequences, rows)


BYTES_AT_ONCE = (
    1 << 20
)  # of a file, that a process tokenizes; smaller files are not worth other processes


def tokenize_rows(path, *how) -> Iterator[tuple]:
    """`tokenize_chunk` of all chunks of a file, in its order, by as many processes as there are cores."""
    chunks = divide_rows(read_rows(path))
    first = list(itertools.islice(chunks, 2))
    if len(first) == 1:
        yield tokenize_chunk(first[0], path, *how)
        return
    # Not forked: a process that computes has threads, which a fork would lose while they hold locks.
    context, cores = multiprocessing.get_context("spawn"), len(os.sched_getaffinity(0))
    with (
        tempfile.NamedTemporaryFile() as file,
        tqdm(desc=f"tokenize {Path(path).name}", unit=" rows") as bar,
        ProcessPoolExecutor(cores, context, start_worker, (file.name,)) as pool,
    ):
        # By a file: of arguments larger than a pipe, one process would have to start and read them before the next one starts.
        pickle.dump((path, *how), file)
        file.flush()
        parts = (
            (len(chunk), pool.submit(tokenize_in_worker, chunk))
            for chunk in itertools.chain(first, chunks)
        )
        try:
            waiting = collections.deque(
                itertools.islice(parts, 2 * cores)
            )  # no further ahead, for the sake of memory
            while waiting:
                count, part = waiting.popleft()
                yield part.result()
                bar.update(count)
                waiting.extend(itertools.islice(parts, 1))
        except BrokenProcessPool:
            raise ValueError(
                f"{path}: a process that tokenized it was killed; give them more memory, or fewer cores (taskset)"
            ) from None


def divide_rows(rows: Iterable[tuple[int, bytes]]) -> Iterator[list[tuple[int, bytes]]]:
    """Lists of rows; each but the last has BYTES_AT_ONCE, and no row more than it takes for that."""
    chunk, size = [], 0
    for line, text in rows:
        chunk.append((line, text))
        size += len(text)
        if size >= BYTES_AT_ONCE:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def start_worker(file):
    """Of a process that tokenizes: how, which is read once. An interrupt from the keyboard is the main process's to handle."""
    global how_a_worker_tokenizes
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(
        target=lambda: (multiprocessing.parent_process().join(), os._exit(1)), daemon=True
    ).start()  # no worker outlives it
    how_a_worker_tokenizes = pickle.loads(Path(file).read_bytes())


def tokenize_in_worker(chunk):
    return tokenize_chunk(chunk, *how_a_worker_tokenizes)


def tokenize_chunk(
    chunk: list[tuple[int, bytes]], path, tokenizer, max_seq_len, truncation_side, skip_bad_rows
) -> tuple:
    """The tokens (int32) of some rows; the lengths of their sequences (int64); the rows (ROW); what is wrong with bad ones."""
    sequences, rows, bad_rows = [], [], []
    for line, text in chunk:
        try:
            comparison = parse_line(text)
            group = tokenize(comparison, tokenizer, max_seq_len, truncation_side)
        except ValueError as error:
            bad_row(path, line, error, bad_rows if skip_bad_rows else None)
        else:
            group = [] if teaches_nothing(group) else group
            rows.append(
                (line, comparison.margin, 0, len(group))
            )  # which is the first is known when all are together
            sequences += group
    tokens, lengths = (
        np.fromiter(itertools.chain(*sequences), np.int32),
        np.fromiter(map(len, sequences), np.int64),
    )
    return tokens, lengths, np.array(rows, ROW), bad_rows


def file_hash(path) -> str:
    """Of a file's content, which is read once, and again if the file changes."""
    if not Path(path).is_file():
        next(read_rows(path))  # says what is wrong with it
    stat = os.stat(path)
    return content_hash(path, stat.st_size, stat.st_mtime_ns)


@functools.lru_cache
def content_hash(path, *version) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hash_of(*parts) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:32]


def cached(directory: Path, build) -> Path:
    """`directory`, which `build` fills where it is not there yet: once, by one process; it is there whole or not at all."""
    if directory.exists():
        return directory
    directory.parent.mkdir(parents=True, exist_ok=True)
    with open(directory.with_name(directory.name + ".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # goes with the process that holds it, however that ends
        if directory.exists():  # by now
            return directory
        part = directory.with_name(directory.name + ".part")
        shutil.rmtree(part, ignore_errors=True)  # of a process that was killed
        part.mkdir()
        try:
            build(part)
            for file in part.iterdir():
                with open(file, "rb+") as written:
                    os.fsync(written)
            part.rename(directory)
        finally:
            shutil.rmtree(part, ignore_errors=True)  # there only after an error
    return directory


def pad_rows(sequences: list[list[int]], pad_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Right-pad N sequences to the longest. Returns input_ids and attention_mask, each (N, L) int64."""
    input_ids = torch.full((len(sequences), max(map(len, sequences))), pad_id)
    attention_mask = torch.zeros_like(input_ids)
    for row, sequence in enumerate(sequences):
        input_ids[row, : len(sequence)] = torch.tensor(sequence)
        attention_mask[row, : len(sequence)] = 1
    return input_ids, attention_mask


# ----------------------------------------------------------------------------------------------------------------------
# Built-in data with known rewards

# Per kind of question: how it is asked, how it is answered, and what is true. Each answer of a kind is right for one of
# its subjects and wrong for the others, so no word is better than another: who wants to know must read the question.
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
    """An endless stream of comparisons of two responses whose true rewards are known; the same for the same seed.

    A prompt asks for one of 18 facts. A response states the fact, a wrong answer of the same kind, or another fact that
    was not asked for; then it may carry a polite or a rude remark, and then it may ramble for a sentence. Its true reward is
    the sum of QUALITY_REWARD, TONE_REWARD, and RAMBLE_REWARD where it rambles. Of the two, `responses[0]` is drawn with
    probability sigmoid(difference of their true rewards): Bradley & Terry (1952).

    The answer always comes first: otherwise the loss would compare texts that have ended with texts that have not answered
    yet, and no reward of theirs would be right (docs/study.md).
    """
    rng = random.Random(seed)
    while True:
        kind = rng.choice(QUESTIONS)
        subject = rng.choice(list(kind[2]))
        (a, reward_a), (b, reward_b) = (
            write_response(rng, kind, subject),
            write_response(rng, kind, subject),
        )
        if reward_a == reward_b:
            continue  # nothing to learn or to get right
        if rng.random() >= 1 / (1 + math.exp(reward_b - reward_a)):
            a, b, reward_a, reward_b = b, a, reward_b, reward_a
        yield Comparison(
            f"\n\nHuman: {kind[0].format(subject)}\n\nAssistant:", [a, b], [reward_a, reward_b]
        )


def write_response(rng: random.Random, kind, subject: str) -> tuple[str, float]:
    """A response to the question of that kind about that subject, and its true reward."""
    quality = rng.choices(list(QUALITY_REWARD), weights=(0.45, 0.35, 0.2))[0]
    if quality == "off topic":
        kind, subject = rng.choice([(k, s) for k in QUESTIONS for s in k[2] if s != subject])
    answer = kind[2][subject]
    if quality == "wrong":
        answer = rng.choice([other for other in kind[2].values() if other != answer])
    tone = rng.choice(list(TONE_REWARD))
    rambles = rng.random() < 0.5
    sentences = [kind[1].format(subject, answer), *([rng.choice(RAMBLES)] if rambles else [])]
    if tone != "neutral":
        remark = rng.choice(TONES)[tone == "rude"]
        sentences.insert(1, remark)
    reward = QUALITY_REWARD[quality] + TONE_REWARD[tone] + RAMBLE_REWARD * rambles
    return " " + " ".join(sentences), round(
        reward, 6
    )  # rounded, so that equal sums are equal numbers
