"""Tokenizers: load, train, save; and what they know of their ids and their chat template.

It knows no comparisons: which text becomes a sequence, and where bos and eos stand, is in data.py.
How dialogues become text: parts/chat.py.

Two kinds: sentencepiece models, and the formats of Hugging Face (tokenizer.json, or vocab.json and
merges.txt), which need the `tokenizers` library. Both are saved with a tokenizer.json, if it can
say the same, from which transformers' `AutoTokenizer` makes the same tokenizer.
"""

import base64
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import sentencepiece

from parts.chat import (
    TEMPLATE_DIRECTORY,
    TEMPLATE_FILE,
    ChatTemplate,
    find_template,
    plain_template,
)
from parts.guards import LONGEST_NAME, listed, one_line
from parts.inputs import is_file
from parts.memory import full_memory
from parts.rows import json_type
from parts.token_cache import hash_of

try:
    import tokenizers
except ImportError:  # it is optional, see requirements-hf.txt
    tokenizers = None

# The files of a tokenizer, in the order in which they are looked for.
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")
# The files beside it; a later one overrides an earlier one.
CONFIG_FILES = ("added_tokens.json", "special_tokens_map.json", "tokenizer_config.json")
SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token")
# How a text is searched for an added token; `AddedToken` in the library `tokenizers`.
TOKEN_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")
SPACE = "\u2581"  # sentencepiece's sign for a space
NO_JSON = "no tokenizer.json can say what the tokenizer does, so AutoTokenizer makes other ids"
# Names of bytes, <0x41>, are text in texts, but a unigram model of the library `tokenizers` takes
# them for the byte, unless they are in parts.
BYTE_NAMES = {
    "type": "Split",
    "pattern": {"Regex": "(?<=<)0x[0-9A-F]{2}>"},
    "behavior": "Isolated",
    "invert": False,
}
MOST_NEW_IDS = 10_000  # behind a tokenizer's own, up to a new pad id; each gets a name
UNIGRAM, USER_DEFINED = 1, 4  # in its protobuf: a type of models, and a type of pieces

# --------------------------------------------------------------------------------------------------
# Two kinds of tokenizers


class PadIdError(ValueError):
    """The pad id that a tokenizer is given is none, or too far beyond its ids."""


class Tokenizer:
    """A sentencepiece model, with the special ids that a sequence needs.

    config: special and added tokens by name, from CONFIG_FILES. template: for chat messages.
    pad_id: int. bos_id: int, or None where texts begin with none. eos_id: int or None.
    text_size: number of ids that the tokenizer came with.
    model_size: number of ids before tokens were added to them.
    vocab_size: number of ids, a new pad id included.
    splits_special: whether the names of special tokens are text in texts.
    """

    splits_special = False

    def __init__(
        self,
        model_proto: bytes,
        pad_id: int | None = None,
        config: dict | None = None,
        template: ChatTemplate = ChatTemplate(),
    ):
        self.model_proto = model_proto
        self.config = config or {}
        self.pieces = sentencepiece.SentencePieceProcessor(model_proto=model_proto)
        self.names = special_piece_names(self.pieces)
        piece_names = piece_names_of(self.pieces)
        for i, token in self.config.get("added_tokens_decoder", {}).items():
            self.names[int(i)] = token["content"]
        # Files may call special pieces by the model's names.
        ids = {name: i for names in (piece_names, self.names) for i, name in names.items()}
        own_ids = (self.pieces.pad_id(), self.pieces.bos_id(), self.pieces.eos_id())
        pad, bos, eos = (i if i >= 0 else None for i in own_ids)  # -1: the model has none
        bos = ids.get(self.config.get("bos_token"), bos)
        eos = ids.get(self.config.get("eos_token"), eos)
        named_pad = ids.get(self.config.get("pad_token"))
        if named_pad not in (None, bos, eos):
            pad = named_pad
        special = {"bos_token": bos, "eos_token": eos, "pad_token": pad}
        for name, text in special_texts(self.config, ids).items():
            special[name] = ids[text]
        if self.config.get("add_bos_token") is False:
            bos = None
        self.model_size = self.pieces.get_piece_size()
        self.set_ids(max([*self.names, *piece_names]) + 1, pad, bos, eos, pad_id)
        # Texts are split at these, which no text has by chance.
        self.marks = {name: i for i, name in self.names.items()}
        self.marks |= {new_name(i): i for i in range(self.text_size, self.vocab_size)}
        self.mark = re.compile("|".join(map(re.escape, self.marks)) or "(?!)")
        self.names = piece_names | self.names
        texts = {name: self.names[i] for name, i in special.items() if i is not None}
        self.set_template(template, texts, ids)

    def set_ids(
        self, size: int, own_pad: int | None, bos: int | None, eos: int | None, pad_id: int | None
    ):
        """Set the special ids and sizes of a tokenizer with `size` ids; `pad_id` overrides its pad.

        Padding with eos or bos could be mistaken for text, so such a pad is replaced by a new id.
        Raises PadIdError for a pad id that is none, or far beyond the tokenizer's ids.
        """
        if pad_id is None:
            pad_id = size if own_pad in (None, bos, eos) else own_pad
        if not isinstance(pad_id, int) or not 0 <= pad_id < size + MOST_NEW_IDS:
            raise PadIdError(
                f"the pad id (--pad_id, pad_id, or pad_token_id) is {pad_id!r}, and the tokenizer "
                f"has {size} ids; expected an id from 0, at most {MOST_NEW_IDS:,} beyond its own"
            )
        self.pad_id, self.bos_id, self.eos_id = pad_id, bos, eos
        self.text_size, self.vocab_size = size, max(size, pad_id + 1)

    def set_template(self, template: ChatTemplate, texts: dict[str, str], ids: dict[str, int]):
        """Give the template the texts of special tokens; ids: those of all tokens by their text.

        The texts are those that transformers gives to it. `save` names the pad id that is used, so
        a template that reads another pad token would not stay the same.
        """
        if template.is_plain:
            has_bos = self.bos_id is not None and not self.splits_special
            has_eos = self.eos_id not in (None, self.pad_id) and not self.splits_special
            template = ChatTemplate(plain_template(has_bos, has_eos))
        is_replaced = ids.get(texts.get("pad_token")) != self.pad_id
        replaced = ("pad_token",) if is_replaced else ()
        self.template = replace(template, special_tokens=texts, replaced=replaced)
        self.spaces: dict[int, bool] = {}  # answers of `is_space`

    @property
    def has_own_template(self) -> bool:
        """Tell whether a jinja template renders messages, and not the plain one."""
        return not self.template.is_plain

    def render(self, messages: list[dict], add_generation_prompt: bool = False) -> str:
        """Render chat messages as text, as `ChatTemplate.render` says."""
        return self.template.render(messages, add_generation_prompt)

    def facts(self) -> tuple:
        """List what token ids follow from besides the model of the tokenizer."""
        template = self.template.source, self.template.special_tokens
        return self.pad_id, self.bos_id, self.eos_id, *template

    def fingerprint(self) -> str:
        """Return a hash of everything that token ids follow from."""
        return hash_of(self.model_proto, *self.facts())

    def is_space(self, token_id: int) -> bool:
        """Tell whether the text of a token is white space alone; special tokens have no text."""
        if token_id not in self.spaces:
            # Behind a letter, because decoders leave out a space in front.
            try:
                before = self.encode("a")
            except ValueError:  # the tokenizer has no token for it
                before = []
            text = self.decode([*before, token_id])[len(self.decode(before)) :]
            self.spaces[token_id] = text.isspace()
        return self.spaces[token_id]

    def special_names(self) -> dict[int, str]:
        """Return the texts of the tokens that `decode` leaves out, by id."""
        size = self.pieces.get_piece_size()
        special = [i for i in range(size) if self.pieces.is_control(i) or self.pieces.is_unknown(i)]
        return {i: name for i, name in self.names.items() if i in special or i >= size}

    def encode(self, text: str) -> list[int]:
        """Return the token ids of a text, without special tokens around it."""
        ids, start = [], 0
        for found in self.mark.finditer(text):
            ids += self.pieces.encode(text[start : found.start()])
            ids.append(self.marks[found[0]])
            start = found.end()
        return ids + self.pieces.encode(text[start:])

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """Encode every text as `encode` does, on all cores."""
        encoded = self.pieces.encode(texts, num_threads=len(os.sched_getaffinity(0)))
        for i, text in enumerate(texts):
            if self.mark.search(text):
                encoded[i] = self.encode(text)
        return encoded

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of token ids; special ids have none."""
        special = (self.pad_id, self.bos_id, self.eos_id, self.pieces.unk_id())
        size = self.pieces.get_piece_size()
        return self.pieces.decode([int(i) for i in ids if i < size and i not in special])

    def gap(self) -> str:
        """Say where transformers makes other ids of a text, "" where it makes the same.

        It begins with NO_JSON where the difference is not confined to rare characters.
        """
        spec = sentencepiece_spec(self.pieces, self.names)
        if spec is None:
            return f"{NO_JSON}: it is not BPE or unigram, or has pieces that its user defined"
        if {"type": "NFKC"} in spec["normalizer"]["normalizers"]:
            return (
                "the tokenizer normalizes text (NFKC); transformers does the same, except for "
                "some characters that are written with several marks"
            )
        return ""

    def save(self, directory, settings: dict = {}):
        """Write the files from which `load_tokenizer`, and AutoTokenizer, make this tokenizer.

        settings: keys of tokenizer_config.json that follow from the model beside it.
        Where AutoTokenizer cannot make it, see `gap`, a line on standard error says so.
        Raises ValueError where the directory has a file of another tokenizer.
        """
        directory = Path(directory)
        config = self.config | {"pad_token_id": self.pad_id}
        config["chat_template"] = self.template.source
        config.pop("flags_hold", None)
        files = {"tokenizer_config.json": config}
        files |= sentencepiece_files(self)
        files["tokenizer_config.json"] |= {"sentencepiece_model": "tokenizer.model"} | settings
        others = [name for name in TOKENIZER_FILES if name not in ("tokenizer.model", *files)]
        refuse_others("tokenizer", [directory / name for name in others])
        refuse_templates(directory)
        (directory / "tokenizer.model").write_bytes(self.model_proto)
        write_json(directory, files)
        if "tokenizer.json" not in files:
            print(f"{directory}: {self.gap()}", file=sys.stderr)


class HuggingFaceTokenizer(Tokenizer):
    """A tokenizer of the library `tokenizers`, with the tokens and settings of CONFIG_FILES."""

    def __init__(
        self,
        backend: "tokenizers.Tokenizer",
        config: dict,
        pad_id: int | None = None,
        template: ChatTemplate = ChatTemplate(),
    ):
        default = None
        if (config.get("tokenizer_class") or "GPT2").startswith("GPT2"):
            default = "<|endoftext|>"  # GPT-2's files do not name it
        config = {"bos_token": default, "eos_token": default, "unk_token": default} | config
        self.backend = backend
        add_tokens(backend, config)
        self.splits_special = backend.encode_special_tokens
        ids = backend.get_vocab()
        pad = ids.get(config.get("pad_token"))
        bos = ids.get(config.get("bos_token"))
        eos = ids.get(config.get("eos_token"))
        own_ids = backend.get_vocab(with_added_tokens=False).values()
        self.model_size = max(own_ids, default=-1) + 1
        begins_with_bos = config.get("add_bos_token")
        if begins_with_bos is None:
            begins_with_bos = bos is not None and backend.encode("a").ids[:1] == [bos]
        self.set_ids(max(ids.values()) + 1, pad, bos if begins_with_bos else None, eos, pad_id)
        self.set_template(template, special_texts(config, ids), ids)

    def fingerprint(self) -> str:
        return hash_of(self.backend.to_str(), self.splits_special, *self.facts())

    def encode(self, text: str) -> list[int]:
        """Return the token ids of a text. Raises ValueError that shows a text it cannot encode."""
        with as_value_error("the tokenizer cannot encode", text):
            return self.backend.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        try:
            with as_value_error("the tokenizer cannot encode texts"):
                found = self.backend.encode_batch(texts, add_special_tokens=False)
        except ValueError:
            return [self.encode(text) for text in texts]  # shows which one
        return [encoding.ids for encoding in found]

    def decode(self, ids: Iterable[int]) -> str:
        text_ids = [int(i) for i in ids if i != self.pad_id]
        with as_value_error("the tokenizer cannot decode", text_ids):
            return self.backend.decode(text_ids, skip_special_tokens=True)

    def gap(self) -> str:
        return ""

    def special_names(self) -> dict[int, str]:
        added = self.backend.get_added_tokens_decoder()
        return {i: token.content for i, token in added.items() if token.special}

    def save(self, directory, settings: dict = {}):
        refuse_others("tokenizer", [Path(directory) / "tokenizer.model"])
        refuse_templates(Path(directory))
        spec = json.loads(self.backend.to_str())
        config = {"split_special_tokens": self.splits_special} | settings
        write_json(directory, transformers_files(self, spec, self.backend.id_to_token, config))


@contextmanager
def as_value_error(what: str, item="") -> Iterator[None]:
    """Turn an error of the library `tokenizers` into a ValueError: `what`, the item, the reason.

    The library raises Exception itself; a panic of its Rust code is no Exception at all.
    """
    try:
        yield
    except (KeyboardInterrupt, SystemExit, PadIdError):
        raise
    except BaseException as error:
        if full_memory(error):
            raise
        if item:
            what += f' "{one_line(item, 80)}"'
        raise ValueError(f"{what} ({one_line(error, LONGEST_NAME)})") from None


def piece_names_of(pieces: sentencepiece.SentencePieceProcessor) -> dict[int, str]:
    return {i: pieces.id_to_piece(i) for i in range(pieces.get_piece_size())}


def special_piece_names(pieces: sentencepiece.SentencePieceProcessor) -> dict[int, str]:
    """Name the special pieces of a sentencepiece model, by id, so that no text is taken for one.

    The model's own names, such as <s>, are text to sentencepiece, and may be HTML.
    """
    kinds = {pieces.unk_id(): "unk", pieces.pad_id(): "pad"}
    kinds |= {pieces.bos_id(): "bos", pieces.eos_id(): "eos"}
    names = {}
    for i in range(pieces.get_piece_size()):
        if pieces.is_control(i) or pieces.is_unknown(i):
            names[i] = f"<|reward model {kinds.get(i, i)}|>"
    return names


def new_name(i: int) -> str:
    """Name a new id behind the vocabulary, a pad or one that a new pad id skips."""
    return f"<|reward model pad {i}|>"


def special_texts(config: dict, ids: dict[str, int]) -> dict[str, str]:
    """Return the special tokens that a config names, {"bos_token": text}, if they have an id."""
    texts = {}
    for name, text in config.items():
        if name.endswith("_token") and isinstance(text, str) and text in ids:
            texts[name] = text
    return texts


def read_backend(file: Path) -> "tokenizers.Tokenizer":
    """Read tokenizer.json, or vocab.json and the merges.txt beside it (byte-level BPE)."""
    if file.name == "vocab.json":
        merges = file.with_name("merges.txt")
        if not is_file(merges):
            raise ValueError(f"{merges}: no such file; vocab.json needs it")
        backend = tokenizers.Tokenizer(tokenizers.models.BPE.from_file(str(file), str(merges)))
        backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = tokenizers.decoders.ByteLevel()
    else:
        backend = tokenizers.Tokenizer.from_file(str(file))
    backend.no_truncation()
    backend.no_padding()
    return backend


def add_tokens(backend: "tokenizers.Tokenizer", config: dict):
    """Add the tokens and settings of CONFIG_FILES that a tokenizer's own file lacks.

    Flags of tokens in tokenizer_config.json hold over those in tokenizer.json, as in transformers.
    """
    known = {token.content for token in backend.get_added_tokens_decoder().values()}
    for i, token in sorted(config.get("added_tokens_decoder", {}).items()):
        name = token["content"]
        if name not in known or config.get("flags_hold"):
            backend.add_tokens([tokenizers.AddedToken(**token)])
        own_id = backend.token_to_id(name)
        if own_id != i:
            found = f"has id {i} by the files beside it, {own_id} by its own"
            raise ValueError(f"the added token {name!r} {found}")
        known.add(name)
    special = [text for name, text in config.items() if name.endswith("_token")]
    for name in special + config.get("additional_special_tokens", []):
        is_missing_default = name == "<|endoftext|>" and backend.token_to_id(name) is None
        if isinstance(name, str) and name and name not in known and not is_missing_default:
            backend.add_special_tokens([name])
    backend.encode_special_tokens = bool(config.get("split_special_tokens"))
    add_prefix_space = config.get("add_prefix_space")
    if hasattr(backend.pre_tokenizer, "add_prefix_space") and isinstance(add_prefix_space, bool):
        backend.pre_tokenizer.add_prefix_space = add_prefix_space


def bpe_backend(file: Path) -> "tokenizers.Tokenizer | None":
    """Make a tokenizer, which splits texts at special tokens, of a tokenizer.model.

    Returns None for a model which is no BPE with bytes, or normalizes text.
    """
    pieces = Tokenizer(file.read_bytes()).pieces
    spec = sentencepiece_spec(
        pieces, piece_names_of(pieces)
    )  # texts are split at the model's own names
    # prepare_as replaces the normalizer, so the model must have no other one.
    if spec is None or spec["model"]["type"] != "BPE" or not spec["model"]["byte_fallback"]:
        return None
    if len(spec["normalizer"]["normalizers"]) != 2:
        return None
    return tokenizers.Tokenizer.from_str(json.dumps(spec))


def prepare_as(class_name: str, backend: "tokenizers.Tokenizer", config: dict) -> dict:
    """Have texts prepared as a class of transformers 5 does, whatever tokenizer.json says.

    LlamaTokenizer puts a space in front of the first part of a text that is split at special
    tokens, or with `legacy` of each part; files of transformers 4 say that it is always each part.
    The classes of GPT-2 and GPT-NeoX don't split numbers into digits.
    Returns the special tokens that the class has where its files do not name them.
    """
    pre_tokenizers, decoders = tokenizers.pre_tokenizers, tokenizers.decoders
    prefix = config.get("add_prefix_space")
    is_bytes = "ByteLevel" in f"{backend.pre_tokenizer} {backend.decoder}"
    if class_name in ("GPT2Tokenizer", "GPTNeoXTokenizer") and is_bytes:
        backend.normalizer = None
        if class_name == "GPTNeoXTokenizer":
            backend.normalizer = tokenizers.normalizers.NFC()
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=bool(prefix))
        backend.decoder = decoders.ByteLevel()
    elif class_name == "LlamaTokenizer" and not is_bytes:
        steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
        scheme = "always" if config.get("legacy") else "first"
        if prefix is False:
            scheme = "never"
        else:
            steps.append(decoders.Strip(" ", 1, 0))
        backend.normalizer = None
        backend.pre_tokenizer = pre_tokenizers.Metaspace(SPACE, scheme, split=False)
        backend.decoder = decoders.Sequence(steps)
        return {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return {}


# --------------------------------------------------------------------------------------------------
# Loading and training


def has_tokenizer(directory) -> bool:
    return any(is_file(Path(directory) / name) for name in TOKENIZER_FILES)


def load_tokenizer(path, pad_id: int | None = None, chat_template: str = "auto") -> Tokenizer:
    """Load the tokenizer in a directory, or in one of these files; `pad_id` overrides its own.

    tokenizer.json, or vocab.json beside merges.txt (byte-level BPE: GPT-2, OPT): the `tokenizers`
    library. tokenizer.model: sentencepiece where `save` wrote it, or where no text is split at
    special or added tokens; else that library, too. CONFIG_FILES beside any of these are read.
    chat_template: as `find_template` says.
    Raises ValueError that names the file. Ids never depend on what is installed.
    """
    path = Path(path)
    files = [path / name for name in TOKENIZER_FILES] if path.is_dir() else [path]
    files = [file for file in files if is_file(file)]
    if not files:
        missing = "tokenizer in this directory" if path.is_dir() else "such file"
        expected = "tokenizer.model, tokenizer.json, or vocab.json and merges.txt"
        raise ValueError(f"{path}: no {missing}; expected {expected}")
    file = files[0]
    config = tokenizer_config(file.parent)
    template = find_template(chat_template, file.parent, config.get("chat_template"))
    # `save` writes which pad id was chosen; files of Hugging Face have no such key.
    is_ours = "pad_token_id" in config and (
        "sentencepiece_model" in config or bool(config.get("split_special_tokens"))
    )
    model_file = path / "tokenizer.model"
    if model_file in files and is_ours:
        file = model_file  # it needs no library
    is_json = file.suffix == ".json"
    class_name = class_of(file.parent, config)
    is_llama = not is_json and not is_ours and class_name == "LlamaTokenizer"
    if tokenizers is None and (is_json or is_llama):
        raise ValueError(f"{file}: reading it needs `pip install -r requirements-hf.txt`")
    if pad_id is None:
        pad_id = config.get("pad_token_id")
    try:
        with as_value_error(f"{file}: not a tokenizer, or damaged"):
            backend = None
            if is_json:
                backend = read_backend(file)
            elif is_llama:
                config = {"add_bos_token": True} | config
                backend = bpe_backend(file)
            if backend is not None:
                config = prepare_as(class_name, backend, config) | config
                return HuggingFaceTokenizer(backend, config, pad_id, template)
            tokenizer = sentencepiece_tokenizer(file, config, pad_id, template)
    except PadIdError as error:
        raise PadIdError(f"{file}: {error}") from None
    if not is_ours:
        check_no_splits(file, tokenizer)
    return tokenizer


def sentencepiece_tokenizer(file: Path, config: dict, pad_id: int | None, template) -> Tokenizer:
    model_proto = file.read_bytes()
    if not model_proto:  # sentencepiece takes an empty one
        raise ValueError("the file is empty")
    return Tokenizer(model_proto, pad_id, config, template)


def class_of(directory: Path, config: dict) -> str:
    """Name the class by which transformers 5 reads the tokenizer in a directory.

    Returns "" where tokenizer.json alone decides, as it does for some types of models.
    """
    file = directory / "config.json"
    if is_file(file) and read_object(file).get("model_type") in ("mistral", "qwen2"):
        return ""
    return (config.get("tokenizer_class") or "").removesuffix("Fast")


def check_no_splits(file: Path, tokenizer: Tokenizer):
    """Raise ValueError where transformers splits texts at tokens, as sentencepiece does not.

    Such tokens are no pieces of the model, or a chat template writes them.
    """
    pieces = tokenizer.pieces
    known = {pieces.id_to_piece(i) for i in range(pieces.get_piece_size())}
    config = tokenizer.config
    names = [token["content"] for token in config.get("added_tokens_decoder", {}).values()]
    names += [config.get(name) for name in SPECIAL_TOKENS if name != "pad_token"]
    names += config.get("additional_special_tokens", [])
    added = sorted({one_line(name, LONGEST_NAME) for name in names if name and name not in known})
    if added or (config and tokenizer.has_own_template):
        written = f"added tokens ({listed(added)})" if added else "the tokens of a chat template"
        code = (
            "from transformers import AutoTokenizer as A; "
            f"A.from_pretrained({str(file.parent)!r}).save_pretrained({str(file.parent)!r})"
        )
        raise ValueError(
            f"{file}: sentencepiece splits no text at {written}, as transformers does; "
            f'make a tokenizer.json beside it: python -c "{code}"'
        )


def tokenizer_config(directory: Path) -> dict:
    """Read CONFIG_FILES as one dictionary, {} where there is none.

    Special tokens become their text; "added_tokens_decoder" has all added tokens, by id, with their
    flags; "flags_hold" tells whether these hold over those of tokenizer.json.
    Raises ValueError that names the file.
    """
    config, legacy = {}, {}
    files = [directory / name for name in CONFIG_FILES]
    for file in filter(is_file, files):
        found = read_config(file)
        try:
            if file.name == "added_tokens.json":
                legacy = {int(i): name for name, i in found.items()}
                continue
            read_names(found)
        except (ValueError, TypeError, AttributeError, KeyError) as error:
            raise ValueError(f"{file}: {error}") from None
        config |= found
    if not config and not legacy:
        return {}
    config["flags_hold"] = "added_tokens_decoder" in config
    # transformers takes the tokens of added_tokens.json for text unless something names them.
    named = {text for name, text in config.items() if name.endswith("_token")}
    named.update(config.get("additional_special_tokens", []))
    added = config.get("added_tokens_decoder", {})
    for i, name in legacy.items():
        is_special = name in named
        flags = {"special": is_special, "normalized": not is_special}
        added.setdefault(i, {"content": name, **flags})
    config["added_tokens_decoder"] = added
    return config


def read_names(config: dict):
    """Turn tokens of a config, in place, into text, and added tokens into {id: token}.

    Raises ValueError, or another error of a wrong type, that says what was found.
    """
    more = config.get("extra_special_tokens")
    if isinstance(more, dict):  # {"image_token": ...}
        config |= more
        more = None
    for key in [key for key in config if key.endswith("_token")]:
        config[key] = token_text(config[key])
        if key in SPECIAL_TOKENS and not isinstance(config[key], str | None):
            raise ValueError(f"{key} is {config[key]!r}; expected the text of a token")
        if isinstance(config[key], list | dict):
            del config[key]
    added = {}
    for i, token in config.get("added_tokens_decoder", {}).items():
        flags = {name: bool(token[name]) for name in TOKEN_FLAGS if name in token}
        added[int(i)] = {"content": token["content"], **flags}
    if "added_tokens_decoder" in config:
        config["added_tokens_decoder"] = added
    special = [token_text(token) for token in config.get("additional_special_tokens") or more or []]
    config["additional_special_tokens"] = [name for name in special if isinstance(name, str)]


def token_text(token):
    return token.get("content") if isinstance(token, dict) else token  # a dict: an AddedToken


def read_config(file: Path) -> dict:
    """Read the object in one of CONFIG_FILES. Raises ValueError that names the file."""
    config = read_object(file)
    pad_id = config.get("pad_token_id", 0)
    if pad_id is not None and not (type(pad_id) is int and 0 <= pad_id < 2**24):
        raise ValueError(f"{file}: pad_token_id is {pad_id!r}; expected a token id")
    return config


def read_object(file: Path) -> dict:
    """Read the object in a file of JSON. Raises ValueError that names the file."""
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(config, dict):
            raise ValueError(f"expected an object, found {json_type(config)}")
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file}: {error}") from None
    return config


def sample_texts(sources: list[Iterable[list[str]]], characters: int = 50_000_000) -> list[str]:
    """Take the first texts of each source, about equally many characters of each, to train on.

    sources: lists of texts, each list taken whole or not at all. characters: of all sources
    together; more text changes a tokenizer little, and takes its time. Every source is read to its
    end, so that a bad row shows before a tokenizer is trained.
    """
    taken = []
    for source in sources:
        room = characters // len(sources)
        for texts in source:
            if room > 0:
                taken += texts
                room -= sum(map(len, texts))
    return taken


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Train a sentencepiece BPE tokenizer with at most `vocab_size` ids.

    The same texts in the same order give the same tokenizer. Bytes are the fallback for what is not
    in the vocabulary, and nothing is normalized: no text is lost (but for U+2581, sentencepiece's
    own sign for a space, which is decoded as a space). Ids 0 to 3 are pad, bos, eos, unk.
    Another process trains it, parts/train_pieces.py, which an interrupt ends.
    Raises ValueError where `vocab_size` is too small for the bytes and the text's characters.
    """
    order = json.dumps({"vocab_size": vocab_size, "texts": list(texts)}).encode()
    program = Path(__file__).with_name("train_pieces.py")
    # After an interrupt `run` ends the process. -P: modules of ours hide none of the libraries'.
    done = subprocess.run([sys.executable, "-P", program], input=order, capture_output=True)
    if done.returncode == 0:
        return Tokenizer(done.stdout)
    found = done.stderr.decode(errors="replace").strip()
    # sentencepiece compares the size that was asked for with the size that it needs.
    sizes = re.search(r"(\d+) vs (\d+)", found)
    if sizes:
        text = "256 bytes, 4 special ids and the text's characters"
        raise ValueError(f"{vocab_size} ids are too few for {text}; {sizes[2]} would do")
    if done.returncode < 0:
        found = f"ended by signal {-done.returncode}, perhaps for lack of memory"
    raise ValueError(
        f"found {vocab_size}, and sentencepiece has not trained a tokenizer "
        f"({one_line(found, LONGEST_NAME)}); give another size, or --tokenizer_path"
    )


# --------------------------------------------------------------------------------------------------
# Files for transformers


def refuse_others(kind: str, files: Iterable[Path]):
    """Raise ValueError where one of `files` exists, in which a `kind` is not going to be saved."""
    for file in files:
        if file.exists():
            found = f"another {kind}, which could be read in place of the one to save"
            raise ValueError(f"{file}: {found}; move it, or give another directory")


def refuse_templates(directory: Path):
    """Raise ValueError where a file has a chat template that would hide the saved one."""
    others = [directory / TEMPLATE_FILE, *directory.glob(f"{TEMPLATE_DIRECTORY}/*.jinja")]
    refuse_others("chat template", others)


def write_json(directory, files: dict[str, dict]):
    for name, content in files.items():
        text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
        (Path(directory) / name).write_text(text, encoding="utf-8")


def transformers_files(
    tokenizer: Tokenizer, spec: dict, id_to_token: Callable[[int], str], config: dict
) -> dict[str, dict]:
    """Return tokenizer.json and tokenizer_config.json: `spec` and `config` with special tokens.

    By default they make bos, text, eos of a text, as `data.tokenize` does.
    """
    pad_id, bos_id, eos_id = tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id
    named = {"bos_token": bos_id, "eos_token": eos_id, "pad_token": pad_id}
    # A new pad id gets a name, and so do ids that it skips: the length of a tokenizer is its
    # number of names.
    new = range(tokenizer.text_size, tokenizer.vocab_size)
    names = {i: id_to_token(i) for i in named.values() if i is not None}
    names |= {i: new_name(i) for i in new}
    known = {token["id"] for token in spec["added_tokens"]}
    if pad_id < tokenizer.text_size and pad_id not in (*known, bos_id, eos_id):
        named["pad_token"] = None  # a token of text, which would be special in texts, too
    special = {*named.values(), *new} - {*known, None}
    spec["added_tokens"] += [added_token(i, names[i]) for i in sorted(special)]
    in_front = [] if bos_id is None else [bos_id]
    behind = [] if eos_id in (None, pad_id) else [eos_id]
    used = [names[i] for i in in_front + behind]
    templates = []  # of the first text of a pair, and of the second one
    for number, text in enumerate("AB"):
        pieces = [{"SpecialToken": {"id": name, "type_id": number}} for name in used]
        pieces.insert(len(in_front), {"Sequence": {"id": text, "type_id": number}})
        templates.append(pieces)
    ids = {names[i]: {"id": names[i], "ids": [i], "tokens": [names[i]]} for i in in_front + behind}
    spec |= {"truncation": None, "padding": None}
    spec["post_processor"] = {
        "type": "TemplateProcessing",
        "single": templates[0],
        "pair": templates[0] + templates[1],
        "special_tokens": ids,
    }
    # The chat template may write special tokens that no sequence begins or ends with.
    config = {"unk_token": None} | config | tokenizer.template.special_tokens
    config |= {
        "pad_token": names.get(named["pad_token"]),
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": bool(in_front),
        "add_eos_token": bool(behind),
        "pad_token_id": pad_id,
        "chat_template": tokenizer.template.source,
        # Without these transformers 4 makes token_type_ids, which gpt2 adds up and opt refuses.
        "model_input_names": ["input_ids", "attention_mask"],
    }
    return {"tokenizer.json": spec, "tokenizer_config.json": config}


def added_token(i: int, name: str) -> dict:
    off = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": i, "content": name, **off, "special": True}


def sentencepiece_files(tokenizer: Tokenizer) -> dict[str, dict]:
    """Return tokenizer.json and tokenizer_config.json of a sentencepiece model.

    Returns {} for a model that `sentencepiece_spec` cannot describe.
    """
    spec = sentencepiece_spec(tokenizer.pieces, tokenizer.names)
    if spec is None:
        return {}
    size = tokenizer.pieces.get_piece_size()
    added = {token["id"]: token for token in spec["added_tokens"] if token["id"] >= size}
    return transformers_files(tokenizer, spec, tokenizer.names.get, {"added_tokens_decoder": added})


def sentencepiece_spec(
    pieces: sentencepiece.SentencePieceProcessor, names: dict[int, str]
) -> dict | None:
    """Return the tokenizer.json of a sentencepiece model, BPE or unigram, with names of its ids.

    Returns None for other models, and where pieces of a user are taken out of a text first.
    """
    size = pieces.get_piece_size()
    special = [i for i in range(size) if pieces.is_control(i) or pieces.is_unknown(i)]
    model = model_spec(pieces, names, special)
    normalizer = proto_fields(proto_fields(pieces.serialized_model_proto()).get(3, [b""])[-1])
    adds_prefix, strips, escapes = (normalizer.get(field, [1])[-1] for field in (3, 4, 5))
    if model is None or not escapes:
        return None
    normalizers = []
    charsmap = normalizer.get(2, [b""])[-1]
    if b"nfkc" in normalizer.get(1, [b""])[-1]:
        # sentencepiece composes characters with their marks; "Precompiled" looks at each alone.
        normalizers.append({"type": "NFKC"})
    if charsmap:
        encoded = base64.b64encode(charsmap).decode()
        normalizers.append({"type": "Precompiled", "precompiled_charsmap": encoded})
    if strips:
        normalizers += [replacement("Regex", r"\A +", ""), replacement("Regex", " {2,}", " ")]
    if adds_prefix:
        normalizers.append({"type": "Prepend", "prepend": SPACE})
    normalizers.append(replacement("String", " ", SPACE))
    if strips:
        normalizers.append(replacement("Regex", SPACE + r"+\z", ""))
    decoders = [replacement("String", SPACE, " "), {"type": "ByteFallback"}, {"type": "Fuse"}]
    if adds_prefix:
        decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    pre_tokenizer = None
    if model["type"] == "Unigram" and model["byte_fallback"]:
        pre_tokenizer = BYTE_NAMES
    added = sorted({*special, *(i for i in names if i >= size)})
    return {
        "version": "1.0",
        "added_tokens": [added_token(i, names[i]) for i in added],
        "normalizer": {"type": "Sequence", "normalizers": normalizers},
        "pre_tokenizer": pre_tokenizer,
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": model,
    }


def replacement(kind: str, pattern: str, content: str) -> dict:
    return {"type": "Replace", "pattern": {kind: pattern}, "content": content}


def model_spec(
    pieces: sentencepiece.SentencePieceProcessor, names: dict[int, str], special: list[int]
) -> dict | None:
    """Return the model of a tokenizer.json, or None as `sentencepiece_spec` says."""
    size = pieces.get_piece_size()
    proto = proto_fields(pieces.serialized_model_proto())
    trainer = proto_fields(proto.get(2, [b""])[-1])
    puts_space_behind = trainer.get(24, [0])[-1]
    kinds = {proto_fields(piece).get(3, [1])[-1] for piece in proto[1]}
    if puts_space_behind or USER_DEFINED in kinds:
        return None
    has_bytes = any(pieces.is_byte(i) for i in range(size))
    if trainer.get(3, [UNIGRAM])[-1] == UNIGRAM:
        vocab = [[names[i], pieces.get_score(i)] for i in range(size)]
        unk = pieces.unk_id()
        return {"type": "Unigram", "unk_id": unk, "vocab": vocab, "byte_fallback": has_bytes}
    ordinary = [i for i in range(size) if i not in special and not pieces.is_byte(i)]
    # The scores of BPE are the ranks of merges.
    if [pieces.get_score(i) for i in ordinary] != [-rank for rank in range(len(ordinary))]:
        return None
    return {
        "type": "BPE",
        "unk_token": names[pieces.unk_id()],
        "fuse_unk": True,
        "vocab": {names[i]: i for i in range(size)},
        "merges": merges([names[i] for i in ordinary]),
        "byte_fallback": has_bytes,
    }


def proto_fields(message: bytes) -> dict[int, list]:
    """Return the values of each field of a protobuf message: integers, or bytes.

    The fields of sentencepiece's are in its sentencepiece_model.proto.
    """
    fields, at = {}, 0

    def varint() -> int:
        nonlocal at
        value, shift = 0, 0
        while True:
            byte = message[at]
            at += 1
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value

    while at < len(message):
        number, wire_type = divmod(varint(), 8)
        if wire_type == 0:
            value = varint()
        else:
            length = {1: 8, 5: 4}.get(wire_type)
            if length is None:
                length = varint()
            value = message[at : at + length]
            at += length
        fields.setdefault(number, []).append(value)
    return fields


def merges(names: list[str]) -> list[list[str]]:
    """List the merges of a BPE vocabulary: each way to make a piece of two others, in its order."""
    parts = set(names)
    found = []
    for name in names:
        for cut in range(len(name) - 1, 0, -1):
            if name[:cut] in parts and name[cut:] in parts:
                found.append([name[:cut], name[cut:]])
    return found
