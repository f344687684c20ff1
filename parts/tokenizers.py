"""Tokenizers and the plain chat template: load, train, save.

It knows no comparisons: which text becomes a sequence, and where bos and eos stand, is in data.py.

Two kinds: sentencepiece models, and the formats of Hugging Face (tokenizer.json, or vocab.json and
merges.txt), which need the `tokenizers` library. Both are saved with a tokenizer.json, if it can
say the same, from which transformers' `AutoTokenizer` makes the same tokenizer.
"""

import io
import json
import os
import re
from collections.abc import Callable, Iterable
from pathlib import Path

import sentencepiece

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

# --------------------------------------------------------------------------------------------------
# The plain chat template, that of Anthropic's hh-rlhf dialogues


def chat_text(messages: list[dict]) -> str:
    """Render chat messages, each {"role", "content"}, as text.

    A system message's content stands as it is; a turn is "\\n\\nHuman: " or "\\n\\nAssistant: "
    and its content.
    """
    starts = {"system": "", "user": "\n\nHuman: ", "assistant": "\n\nAssistant: "}
    return "".join(starts[message["role"]] + message["content"] for message in messages)


# The same in jinja, for transformers; a test holds the two together.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ {'system': '', 'user': '\\n\\nHuman: ', 'assistant': '\\n\\nAssistant: '}"
    "[message['role']] + message['content'] }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '\\n\\nAssistant:' }}{% endif %}"
)

# --------------------------------------------------------------------------------------------------
# Two kinds of tokenizers


class Tokenizer:
    """A sentencepiece model, with the special ids that a sequence needs.

    config: special and added tokens by name, from CONFIG_FILES.
    pad_id: int. bos_id: int, or None where texts begin with none. eos_id: int or None.
    text_size: number of ids that the tokenizer came with.
    model_size: number of ids before tokens were added to them.
    vocab_size: number of ids, a new pad id included.
    """

    def __init__(self, model_proto: bytes, pad_id: int | None = None, config: dict | None = None):
        self.model_proto = model_proto
        self.config = config or {}
        self.pieces = sentencepiece.SentencePieceProcessor(model_proto=model_proto)
        self.names = {i: self.pieces.id_to_piece(i) for i in range(self.pieces.get_piece_size())}
        for i, token in self.config.get("added_tokens_decoder", {}).items():
            self.names[int(i)] = token["content"]
        ids = {name: i for i, name in self.names.items()}
        own_ids = (self.pieces.pad_id(), self.pieces.bos_id(), self.pieces.eos_id())
        pad, bos, eos = (i if i >= 0 else None for i in own_ids)  # -1: the model has none
        bos = ids.get(self.config.get("bos_token"), bos)
        eos = ids.get(self.config.get("eos_token"), eos)
        named_pad = ids.get(self.config.get("pad_token"))
        if named_pad not in (None, bos, eos):
            pad = named_pad
        if self.config.get("add_bos_token") is False:
            bos = None
        self.model_size = self.pieces.get_piece_size()
        self.set_ids(max(self.names) + 1, pad, bos, eos, pad_id)

    def set_ids(
        self, size: int, own_pad: int | None, bos: int | None, eos: int | None, pad_id: int | None
    ):
        """Set the special ids and sizes of a tokenizer with `size` ids; `pad_id` overrides its pad.

        Padding with eos or bos could be mistaken for text, so such a pad is replaced by a new id.
        """
        if pad_id is None:
            pad_id = size if own_pad in (None, bos, eos) else own_pad
        self.pad_id, self.bos_id, self.eos_id = pad_id, bos, eos
        self.text_size, self.vocab_size = size, max(size, pad_id + 1)

    def fingerprint(self) -> str:
        """Return a hash of everything that token ids follow from."""
        return hash_of(self.model_proto, self.pad_id, self.bos_id, self.eos_id)

    def encode(self, text: str) -> list[int]:
        """Return the token ids of a text, without special tokens."""
        return self.pieces.encode(text)

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """Encode every text as `encode` does, on all cores."""
        return self.pieces.encode(texts, num_threads=len(os.sched_getaffinity(0)))

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of token ids; special ids have none."""
        special = (self.pad_id, self.bos_id, self.eos_id, self.pieces.unk_id())
        size = self.pieces.get_piece_size()
        return self.pieces.decode([int(i) for i in ids if i < size and i not in special])

    def save(self, directory):
        """Write the files from which `load_tokenizer`, and AutoTokenizer, make this tokenizer.

        Raises ValueError where the directory has a file of another tokenizer.
        """
        directory = Path(directory)
        files = {"tokenizer_config.json": self.config | {"pad_token_id": self.pad_id}}
        files |= sentencepiece_files(self)
        others = [name for name in TOKENIZER_FILES if name not in ("tokenizer.model", *files)]
        refuse_others("tokenizer", [directory / name for name in others])
        (directory / "tokenizer.model").write_bytes(self.model_proto)
        write_json(directory, files)


class HuggingFaceTokenizer(Tokenizer):
    """The tokenizer of a tokenizer.json, or of a vocab.json and the merges.txt beside it."""

    def __init__(self, file: Path, config: dict, pad_id: int | None = None):
        default = None
        if config.get("tokenizer_class", "GPT2").startswith("GPT2"):
            default = "<|endoftext|>"  # GPT-2's files do not name it
        config = {"bos_token": default, "eos_token": default} | config
        backend = self.backend = read_backend(file)
        add_tokens(backend, config)
        ids = backend.get_vocab()
        pad = ids.get(config.get("pad_token"))
        bos = ids.get(config.get("bos_token"))
        eos = ids.get(config.get("eos_token"))
        has_unk = config.get("unk_token") in ids
        self.unk_token = config["unk_token"] if has_unk else None
        own_ids = backend.get_vocab(with_added_tokens=False).values()
        self.model_size = max(own_ids, default=-1) + 1
        begins_with_bos = config.get("add_bos_token")
        if begins_with_bos is None:
            begins_with_bos = bos is not None and backend.encode("a").ids[:1] == [bos]
        self.set_ids(max(ids.values()) + 1, pad, bos if begins_with_bos else None, eos, pad_id)

    def fingerprint(self) -> str:
        return hash_of(self.backend.to_str(), self.pad_id, self.bos_id, self.eos_id)

    def encode(self, text: str) -> list[int]:
        return self.backend.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        return [found.ids for found in self.backend.encode_batch(texts, add_special_tokens=False)]

    def decode(self, ids: Iterable[int]) -> str:
        text_ids = [int(i) for i in ids if i != self.pad_id]
        return self.backend.decode(text_ids, skip_special_tokens=True)

    def save(self, directory):
        refuse_others("tokenizer", [Path(directory) / "tokenizer.model"])
        spec = json.loads(self.backend.to_str())
        config = {"unk_token": self.unk_token} if self.unk_token else {}
        write_json(directory, transformers_files(self, spec, self.backend.id_to_token, config))


def read_backend(file: Path) -> "tokenizers.Tokenizer":
    """Read tokenizer.json, or vocab.json and the merges.txt beside it (byte-level BPE)."""
    if file.name == "vocab.json":
        merges = file.with_name("merges.txt")
        backend = tokenizers.Tokenizer(tokenizers.models.BPE.from_file(str(file), str(merges)))
        backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = tokenizers.decoders.ByteLevel()
    else:
        backend = tokenizers.Tokenizer.from_file(str(file))
    backend.no_truncation()
    backend.no_padding()
    return backend


def add_tokens(backend: "tokenizers.Tokenizer", config: dict):
    """Add the tokens and settings of CONFIG_FILES that a tokenizer's own file lacks."""
    for i, token in sorted(config.get("added_tokens_decoder", {}).items()):
        name = token["content"]
        if backend.token_to_id(name) is None:
            backend.add_special_tokens([name])
        own_id = backend.token_to_id(name)
        if own_id != i:
            found = f"has id {i} by the files beside it, {own_id} by its own"
            raise ValueError(f"the added token {name!r} {found}")
    special = [config.get(key) for key in SPECIAL_TOKENS]
    for name in special + config.get("additional_special_tokens", []):
        is_missing_default = name == "<|endoftext|>" and backend.token_to_id(name) is None
        if name and not is_missing_default:
            backend.add_special_tokens([name])
    add_prefix_space = config.get("add_prefix_space")
    if hasattr(backend.pre_tokenizer, "add_prefix_space") and isinstance(add_prefix_space, bool):
        backend.pre_tokenizer.add_prefix_space = add_prefix_space


# --------------------------------------------------------------------------------------------------
# Loading and training


def has_tokenizer(directory) -> bool:
    return any((Path(directory) / name).is_file() for name in TOKENIZER_FILES)


def load_tokenizer(path, pad_id: int | None = None) -> Tokenizer:
    """Load the tokenizer in a directory, or in one of these files; `pad_id` overrides its own.

    tokenizer.model: sentencepiece. tokenizer.json, or vocab.json beside merges.txt (byte-level
    BPE: GPT-2, OPT): the `tokenizers` library. CONFIG_FILES beside any of these are read, too.
    Raises ValueError that names the file.
    """
    path = Path(path)
    files = [path / name for name in TOKENIZER_FILES] if path.is_dir() else [path]
    files = [file for file in files if file.is_file()]
    if not files:
        missing = "tokenizer in this directory" if path.is_dir() else "such file"
        expected = "tokenizer.model, tokenizer.json, or vocab.json and merges.txt"
        raise ValueError(f"{path}: no {missing}; expected {expected}")
    file = files[0]
    config = tokenizer_config(file.parent)
    # tokenizer.model needs no library. A tokenizer.json beside it may add tokens, but not where
    # `save` wrote both, which split_special_tokens shows.
    model_file = path / "tokenizer.model"
    if model_file in files and (config.get("split_special_tokens") or tokenizers is None):
        file = model_file
    if file.suffix == ".json" and tokenizers is None:
        raise ValueError(f"{file}: reading it needs `pip install -r requirements-hf.txt`")
    if pad_id is None:
        pad_id = config.get("pad_token_id")
    try:
        if file.suffix == ".json":
            return HuggingFaceTokenizer(file, config, pad_id)
        model_proto = file.read_bytes()
        if model_proto:  # sentencepiece takes an empty one
            return Tokenizer(model_proto, pad_id, config)
    except Exception as error:  # tokenizers raises Exception itself
        raise ValueError(f"{file}: not a tokenizer, or damaged ({error})") from None
    raise ValueError(f"{file}: not a sentencepiece model, or damaged")


def tokenizer_config(directory: Path) -> dict:
    """Read CONFIG_FILES as one dictionary, {} where there is none.

    Special tokens become their text; "added_tokens_decoder" has all added tokens, by id.
    Raises ValueError that names the file.
    """
    config, added = {}, {}
    files = [directory / name for name in CONFIG_FILES]
    for file in filter(Path.is_file, files):
        found = read_config(file)
        try:
            if file.name == "added_tokens.json":
                decoder = {i: {"content": name} for name, i in found.items()}
                found = {"added_tokens_decoder": decoder}
            for key in [key for key in SPECIAL_TOKENS if key in found]:
                found[key] = token_text(found[key])
                if not isinstance(found[key], str | None):
                    raise ValueError(f"{key} is {found[key]!r}; expected the text of a token")
            for i, token in found.get("added_tokens_decoder", {}).items():
                added[int(i)] = {"content": token["content"]}
            special = [token_text(token) for token in found.get("additional_special_tokens") or []]
            found["additional_special_tokens"] = [name for name in special if isinstance(name, str)]
        except (ValueError, TypeError, AttributeError) as error:
            raise ValueError(f"{file}: {error}") from None
        config |= found
    if config:
        config["added_tokens_decoder"] = added
    return config


def token_text(token):
    return token.get("content") if isinstance(token, dict) else token  # a dict: an AddedToken


def read_config(file: Path) -> dict:
    """Read the object in one of CONFIG_FILES. Raises ValueError that names the file."""
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(config, dict):
            raise ValueError(f"expected an object, found {json_type(config)}")
        # `save` writes which pad id was chosen; files of Hugging Face have no such key.
        pad_id = config.get("pad_token_id", 0)
        if pad_id is not None and not (type(pad_id) is int and 0 <= pad_id < 2**24):
            raise ValueError(f"pad_token_id is {pad_id!r}; expected a token id")
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
        # sentencepiece compares the size that was asked for with the size that it needs.
        sizes = re.search(r"(\d+) vs (\d+)", str(error))
        needed = f"; {sizes[2]} would do" if sizes else f" ({error})"
        text = "256 bytes, 4 special ids and the text's characters"
        raise ValueError(f"{vocab_size} ids are too few for {text}{needed}") from None
    return Tokenizer(model.getvalue())


# --------------------------------------------------------------------------------------------------
# Files for transformers


def refuse_others(kind: str, files: Iterable[Path]):
    """Raise ValueError where one of `files` exists, in which a `kind` is not going to be saved."""
    for file in files:
        if file.exists():
            found = f"another {kind}, which could be read in place of the one to save"
            raise ValueError(f"{file}: {found}; move it, or give another directory")


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
    names |= {i: f"<|reward model pad {i}|>" for i in new}
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
    config = config | {name: names.get(i) for name, i in named.items()}
    config |= {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": bool(in_front),
        "add_eos_token": bool(behind),
        "pad_token_id": pad_id,
        "chat_template": CHAT_TEMPLATE,
    }
    return {"tokenizer.json": spec, "tokenizer_config.json": config}


def added_token(i: int, name: str) -> dict:
    off = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": i, "content": name, **off, "special": True}


def sentencepiece_files(tokenizer: Tokenizer) -> dict[str, dict]:
    """Return tokenizer.json and tokenizer_config.json of a sentencepiece BPE model.

    Returns {} for other models, and for BPE that normalizes text or has pieces of a user.
    """
    pieces, names = tokenizer.pieces, tokenizer.names
    size = pieces.get_piece_size()
    special = [i for i in range(size) if pieces.is_control(i) or pieces.is_unknown(i)]
    ordinary = [i for i in range(size) if i not in special and not pieces.is_byte(i)]
    space = "\u2581"  # sentencepiece's sign for a space
    dummy_prefix = pieces.normalize("a")[:-1]
    not_normal = "A  \ufb01 \u2460\n"  # text that every way to normalize changes
    if dummy_prefix not in ("", space):
        return {}
    if pieces.normalize(not_normal) != dummy_prefix + not_normal.replace(" ", space):
        return {}
    # The scores of BPE are the ranks of merges.
    if [pieces.get_score(i) for i in ordinary] != [-rank for rank in range(len(ordinary))]:
        return {}
    added = {i: added_token(i, name) for i, name in sorted(names.items()) if i >= size}
    normalizers = [{"type": "Replace", "pattern": {"String": " "}, "content": space}]
    decoders = [
        {"type": "Replace", "pattern": {"String": space}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if dummy_prefix:
        normalizers.insert(0, {"type": "Prepend", "prepend": space})
        decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    spec = {
        "version": "1.0",
        "added_tokens": [*(added_token(i, names[i]) for i in special), *added.values()],
        "normalizer": {"type": "Sequence", "normalizers": normalizers},
        "pre_tokenizer": None,
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": {
            "type": "BPE",
            "unk_token": names[pieces.unk_id()],
            "fuse_unk": True,
            "vocab": {names[i]: i for i in range(size)},
            "merges": merges([names[i] for i in ordinary]),
            "byte_fallback": any(pieces.is_byte(i) for i in range(size)),
        },
    }
    # transformers takes the name of a special token in a text for the token, sentencepiece for
    # text. With split_special_tokens both take it for text.
    config = {"added_tokens_decoder": added, "split_special_tokens": True}
    return transformers_files(tokenizer, spec, names.get, config)


def merges(names: list[str]) -> list[list[str]]:
    """List the merges of a BPE vocabulary: each way to make a piece of two others, in its order."""
    parts = set(names)
    found = []
    for name in names:
        for cut in range(len(name) - 1, 0, -1):
            if name[:cut] in parts and name[cut:] in parts:
                found.append([name[:cut], name[cut:]])
    return found
