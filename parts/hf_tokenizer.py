"""Tokenizers in Hugging Face's formats, for data.py, which imports this only where it meets them.

To read: tokenizer.json, or vocab.json and merges.txt, by the `tokenizers` library; and the files beside a tokenizer of any kind.
To write: a tokenizer.json and tokenizer_config.json from which transformers' `AutoTokenizer` makes the tokenizer that we have.
"""

import json
from collections.abc import Iterable
from pathlib import Path

from data import CONFIG_FILES, Tokenizer, hash_of, read_config, refuse_others, write_json

SPACE = "\u2581"  # sentencepiece's sign for a space
NOT_NORMAL = "A  \ufb01 \u2460\n"  # text that every way to normalize changes
CHAT_TEMPLATE = (  # `data.chat_text`
    "{% for message in messages %}"
    "{{ {'system': '', 'user': '\\n\\nHuman: ', 'assistant': '\\n\\nAssistant: '}[message['role']] + message['content'] }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '\\n\\nAssistant:' }}{% endif %}"
)


class HuggingFaceTokenizer(Tokenizer):
    """The tokenizer of a tokenizer.json, or of a vocab.json and the merges.txt beside it. `config` names the special tokens."""

    def __init__(self, file: Path, config: dict, pad_id: int | None = None):
        import tokenizers

        if file.name == "vocab.json":
            backend = tokenizers.Tokenizer(
                tokenizers.models.BPE.from_file(str(file), str(file.with_name("merges.txt")))
            )
            backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
            backend.decoder = tokenizers.decoders.ByteLevel()
        else:
            backend = tokenizers.Tokenizer.from_file(str(file))
        backend.no_truncation()
        backend.no_padding()
        default = (
            "<|endoftext|>" if config.get("tokenizer_class", "GPT2").startswith("GPT2") else None
        )  # GPT-2's files leave them out
        config = {"bos_token": default, "eos_token": default} | config
        for i, name in sorted(
            (i, token["content"]) for i, token in config["added_tokens_decoder"].items()
        ):
            if backend.token_to_id(name) is None:
                backend.add_special_tokens([name])
            if backend.token_to_id(name) != i:
                raise ValueError(
                    f"the added token {name!r} has id {i} by the files beside it, {backend.token_to_id(name)} by its own"
                )
        named = [
            config.get(key) for key in ("bos_token", "eos_token", "unk_token", "pad_token")
        ] + config.get("additional_special_tokens", [])
        backend.add_special_tokens(
            [
                name
                for name in named
                if name and (name != "<|endoftext|>" or backend.token_to_id(name) is not None)
            ]
        )
        if hasattr(backend.pre_tokenizer, "add_prefix_space") and isinstance(
            config.get("add_prefix_space"), bool
        ):
            backend.pre_tokenizer.add_prefix_space = config["add_prefix_space"]
        ids = backend.get_vocab()
        pad, bos, eos = (
            ids.get(config.get(name)) for name in ("pad_token", "bos_token", "eos_token")
        )
        self.backend, self.unk_token = (
            backend,
            config.get("unk_token") if config.get("unk_token") in ids else None,
        )
        in_front = config.get("add_bos_token")
        if in_front is None:
            in_front = bos is not None and backend.encode("a").ids[:1] == [bos]
        self.set_ids(max(ids.values()) + 1, pad, bos if in_front else None, eos, pad_id)

    def fingerprint(self) -> str:
        return hash_of(self.backend.to_str(), self.pad_id, self.bos_id, self.eos_id)

    def encode(self, text: str) -> list[int]:
        return self.backend.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Iterable[int]) -> str:
        return self.backend.decode(
            [int(i) for i in ids if i != self.pad_id], skip_special_tokens=True
        )

    def save(self, directory):
        refuse_others("tokenizer", [Path(directory) / "tokenizer.model"])
        config = {"unk_token": self.unk_token} if self.unk_token else {}
        write_json(
            directory,
            transformers_files(
                self, json.loads(self.backend.to_str()), self.backend.id_to_token, config
            ),
        )


def tokenizer_config(directory: Path) -> dict:
    """What CONFIG_FILES say. Special tokens become their text, and `added_tokens_decoder` has all that were added, by id."""
    config, added = {}, {}
    for file in (directory / name for name in CONFIG_FILES if (directory / name).is_file()):
        found = read_config(file)
        try:
            if file.name == "added_tokens.json":
                found = {
                    "added_tokens_decoder": {i: {"content": name} for name, i in found.items()}
                }
            for key in ("bos_token", "eos_token", "unk_token", "pad_token"):
                if isinstance(found.get(key), dict):
                    found[key] = found[key].get("content")  # an AddedToken
                if not isinstance(found.get(key, ""), str | None):
                    raise ValueError(f"{key} is {found[key]!r}; expected the text of a token")
            added |= {
                int(i): {"content": token["content"]}
                for i, token in found.get("added_tokens_decoder", {}).items()
            }
            more = [
                token.get("content") if isinstance(token, dict) else token
                for token in found.get("additional_special_tokens") or []
            ]
            config |= found | {
                "additional_special_tokens": [token for token in more if isinstance(token, str)]
            }
        except (ValueError, TypeError, AttributeError) as error:
            raise ValueError(f"{file}: {error}") from None
    return config | {"added_tokens_decoder": added}


def transformers_files(
    tokenizer: Tokenizer, spec: dict, id_to_token, config: dict
) -> dict[str, dict]:
    """`spec` as tokenizer.json, and tokenizer_config.json. By default they make bos, text, eos of a text, as `data.tokenize`."""
    pad_id, bos_id, eos_id = tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id
    ids = {"bos_token": bos_id, "eos_token": eos_id, "pad_token": pad_id}
    # A new pad id gets a name, and so do ids that it leaves out: the length of a tokenizer is its number of names.
    new = range(tokenizer.text_size, tokenizer.vocab_size)
    token = {
        i: f"<|reward model pad {i}|>" if i in new else id_to_token(i)
        for i in (*ids.values(), *new)
        if i is not None
    }
    known = {added["id"] for added in spec["added_tokens"]}
    if pad_id < tokenizer.text_size and pad_id not in known and pad_id not in (bos_id, eos_id):
        ids["pad_token"] = None  # a token of text: named as special, it would be one in texts, too
    special = {*ids.values(), *new} - {*known, None}
    spec["added_tokens"] += [added_token(i, token[i]) for i in sorted(special)]
    in_front = [] if bos_id is None else [bos_id]
    behind = [] if eos_id in (None, pad_id) else [eos_id]
    first, second = (
        [
            *({"SpecialToken": {"id": token[i], "type_id": k}} for i in in_front),
            {"Sequence": {"id": name, "type_id": k}},
            *({"SpecialToken": {"id": token[i], "type_id": k}} for i in behind),
        ]
        for k, name in enumerate("AB")
    )
    spec |= {
        "truncation": None,
        "padding": None,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": first,
            "pair": first + second,
            "special_tokens": {
                token[i]: {"id": token[i], "ids": [i], "tokens": [token[i]]}
                for i in in_front + behind
            },
        },
    }
    config = (
        config
        | {name: token.get(i) for name, i in ids.items()}
        | {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "add_bos_token": bool(in_front),
            "add_eos_token": bool(behind),
            "pad_token_id": pad_id,
            "chat_template": CHAT_TEMPLATE,
        }
    )
    return {"tokenizer.json": spec, "tokenizer_config.json": config}


def added_token(i: int, name: str) -> dict:
    return dict(
        id=i,
        content=name,
        single_word=False,
        lstrip=False,
        rstrip=False,
        normalized=False,
        special=True,
    )


def sentencepiece_files(tokenizer: Tokenizer) -> dict[str, dict]:
    """The same for a sentencepiece BPE model; none for other ones than BPE, and for those that normalize or have pieces of their user."""
    pieces, names, size = tokenizer.pieces, tokenizer.names, tokenizer.pieces.get_piece_size()
    special = [i for i in range(size) if pieces.is_control(i) or pieces.is_unknown(i)]
    ordinary = [i for i in range(size) if i not in special and not pieces.is_byte(i)]
    dummy_prefix = pieces.normalize("a")[:-1]
    if (
        dummy_prefix not in ("", SPACE)
        or pieces.normalize(NOT_NORMAL) != dummy_prefix + NOT_NORMAL.replace(" ", SPACE)
        or [pieces.get_score(i) for i in ordinary] != [-rank for rank in range(len(ordinary))]
    ):  # BPE's scores are ranks of merges
        return {}
    parts = {names[i] for i in ordinary}
    merges = [
        [names[i][:cut], names[i][cut:]]
        for i in ordinary
        for cut in range(len(names[i]) - 1, 0, -1)
        if names[i][:cut] in parts and names[i][cut:] in parts
    ]
    replace = [
        {"type": "Replace", "pattern": {"String": a}, "content": b}
        for a, b in ((" ", SPACE), (SPACE, " "))
    ]
    prepend = [{"type": "Prepend", "prepend": SPACE}] * len(dummy_prefix)
    strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] * len(dummy_prefix)
    added = {i: added_token(i, name) for i, name in sorted(names.items()) if i >= size}
    spec = {
        "version": "1.0",
        "added_tokens": [*(added_token(i, names[i]) for i in special), *added.values()],
        "normalizer": {"type": "Sequence", "normalizers": [*prepend, replace[0]]},
        "pre_tokenizer": None,
        "decoder": {
            "type": "Sequence",
            "decoders": [replace[1], {"type": "ByteFallback"}, {"type": "Fuse"}, *strip],
        },
        "model": {
            "type": "BPE",
            "unk_token": names[pieces.unk_id()],
            "fuse_unk": True,
            "vocab": {names[i]: i for i in range(size)},
            "merges": merges,
            "byte_fallback": any(map(pieces.is_byte, range(size))),
        },
    }
    # transformers takes the name of a special token for the token, sentencepiece for text: told to, both do that.
    return transformers_files(
        tokenizer, spec, names.get, {"added_tokens_decoder": added, "split_special_tokens": True}
    )
