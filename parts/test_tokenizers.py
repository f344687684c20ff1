"""Tokenizers: what text becomes, what is trained, loaded and saved, also against transformers."""

import base64
import io
import json
import os
import random
import signal
import time
from pathlib import Path

import pytest
import sentencepiece
import tokenizers
import transformers

import data
import parts.tokenizers
from conftest import TINY, end, start
from data import Comparison
from parts.chat import chat_text, plain_template

# --------------------------------------------------------------------------------------------------
# sentencepiece

TEXTS = [
    "the cat sat on the mat\n\nHuman: hello\n\nAssistant: ab ab ab\tcab",
    "a  dog, and a log",
] * 20


@pytest.fixture(scope="module")
def tokenizer():
    return data.train_tokenizer(TEXTS, 400)


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "  two  spaces  ",
        "\n\nHuman: a\n\n",
        "\ta\t",
        "\r\n",
        "\0a\0",
        "😀👨\u200d👩\u200d👧",
        "日本 жщ ß",
        "e\u0301 é ﬁ ①",
        "<s></s><pad><unk><0x41>",
        "\ufeff\u2028\u00a0\u0085",
        "QXZ{}~",
    ],
)
def test_round_trip_is_lossless(tokenizer, text):
    """Characters that the training text lacked are spelled in bytes. No text is a special id."""
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert all(4 <= i < tokenizer.vocab_size for i in ids)


def test_trained_tokenizer_has_fixed_special_ids(tokenizer):
    pieces = sentencepiece.SentencePieceProcessor(model_proto=tokenizer.model_proto)
    assert [pieces.id_to_piece(i) for i in range(5)] == ["<pad>", "<s>", "</s>", "<unk>", "<0x00>"]
    assert (tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id) == (0, 1, 2)
    assert tokenizer.vocab_size == tokenizer.text_size == pieces.get_piece_size()
    assert tokenizer.model_size == tokenizer.text_size


@pytest.mark.parametrize("special", [0, 1, 2, 3, 400])
def test_special_ids_have_no_text(tokenizer, special):
    """Ids beyond the vocabulary, which an embedding of more rows has, have none either."""
    assert tokenizer.decode([special, *tokenizer.encode("a cat"), special, special]) == "a cat"


def test_training_is_reproducible_and_vocab_size_an_upper_bound(tokenizer):
    assert data.train_tokenizer(iter(TEXTS), 400).model_proto == tokenizer.model_proto
    assert tokenizer.vocab_size < 400  # so much the text supports
    assert data.train_tokenizer(TEXTS, 50_000).vocab_size == tokenizer.vocab_size
    assert data.train_tokenizer(TEXTS, 290).vocab_size == 290
    for vocab_size in (8, 256, 260):  # 4 special ids and 256 bytes are 260, before any letter
        with pytest.raises(ValueError, match=f"^{vocab_size} ids are too few .*; 282 would do"):
            data.train_tokenizer(TEXTS, vocab_size)


@pytest.mark.parametrize(
    "program, found",
    [
        ("raise MemoryError('is full')", "MemoryError: is full"),
        ("import os; os.kill(os.getpid(), 9)", "ended by signal 9, perhaps for lack of memory"),
    ],
)
def test_a_process_that_trains_no_tokenizer_is_an_error(program, found, tmp_path, monkeypatch):
    (tmp_path / "train_pieces.py").write_text(program)
    monkeypatch.setattr(parts.tokenizers, "__file__", str(tmp_path / "tokenizers.py"))
    with pytest.raises(ValueError, match=f"^found 400, .* not trained a tokenizer .*{found}[)]; "):
        data.train_tokenizer(TEXTS, 400)


def state_of(process: int) -> str:
    """Return the state of a process, "S" or "T" for example, "" where it has ended (man 5 proc)."""
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return ""
    return state.replace("Z", "")  # one that has ended, and that nobody has asked about


def training_process(run) -> int:
    """Wait for the process that trains a tokenizer for a run, and hold it for good."""
    while True:
        assert run.is_alive()
        for status in Path("/proc").glob("[0-9]*/status"):
            try:
                lines = status.read_text().splitlines()
            except (FileNotFoundError, ProcessLookupError):
                continue
            facts = dict(line.split(":\t", 1) for line in lines if ":\t" in line)
            # It ignores Ctrl-C once it is set up.
            ignores = int(facts["SigIgn"], 16) >> (signal.SIGINT - 1) & 1
            if facts["PPid"].strip() == str(run.pid) and ignores:
                child = int(status.parent.name)
                os.kill(child, signal.SIGSTOP)
                return child
        time.sleep(0.01)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_run_that_trains_a_tokenizer_and_the_training(number, tmp_path):
    """The training process is held, so that a run which waits for its end would wait for ever."""
    file, rng, rows = tmp_path / "rows.jsonl", random.Random(0), []
    for _ in range(5000):  # it would take many times as long as it takes to find the process
        words = "".join(rng.choices("abcdefghijklmnopqrst", k=1000))
        rows.append({"prompt": "", "chosen": words, "rejected": "c"})
    file.write_text("\n".join(map(json.dumps, rows)))
    flags = ["--data_path", file, "--data_output_path", tmp_path / "cache"]
    ranks = start(tmp_path / "out", *TINY, *flags)
    child = training_process(ranks[0])
    os.kill(ranks[0].pid, number)
    (code,), (said,) = end(ranks)
    if number == signal.SIGINT:
        assert code == 1
        last = said.splitlines()[-1]
        assert last == "train.py: interrupted before the first step; nothing was trained"
        assert [file.suffix for file in (tmp_path / "cache").iterdir()] == [".lock"]
    else:
        assert code == -signal.SIGTERM  # as at any time before the first step
    while state_of(child):
        assert state_of(child) != "T"  # a process that is killed is held no longer
        time.sleep(0.01)
    assert not (tmp_path / "out").exists() and "Traceback" not in said


def sentencepiece_model(**options) -> bytes:
    model = io.BytesIO()
    options = (
        dict(
            model_type="bpe",
            vocab_size=300,
            byte_fallback=True,
            hard_vocab_limit=False,
            minloglevel=2,
        )
        | options
    )
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS), model_writer=model, **options
    )
    return model.getvalue()


# Options of a sentencepiece model, the pad id that is asked for; then what pad_id, bos_id, eos_id,
# vocab_size become.
PADS = [
    (dict(pad_id=3), None, 3, 1, 2, 300),
    (dict(pad_id=-1), None, 300, 1, 2, 301),  # no pad (Llama)
    (dict(pad_id=-1, pad_piece="</s>"), None, 300, 1, 2, 301),  # pad is eos
    (dict(pad_id=-1, pad_piece="<s>"), None, 300, 1, 2, 301),  # pad is bos
    (dict(pad_id=3, bos_id=-1, eos_id=1, unk_id=0), None, 3, None, 1, 300),
    (dict(pad_id=-1, bos_id=-1, eos_id=-1), None, 300, None, None, 301),
    (dict(pad_id=-1), 2, 2, 1, 2, 300),  # --pad_id, as DeepSpeed-Chat has it for OPT
    (dict(pad_id=3), 5, 5, 1, 2, 300),  # an id of text: as padding it has none
    (dict(pad_id=3), 310, 310, 1, 2, 311),
]


@pytest.mark.parametrize("options, given, pad_id, bos_id, eos_id, vocab_size", PADS)
def test_pad_is_the_given_one_or_the_tokenizers_own_or_new(
    tmp_path, options, given, pad_id, bos_id, eos_id, vocab_size
):
    """The pad is a new id, right after the vocabulary, where text or its end could be mistaken for
    padding. Saving keeps all ids."""
    (tmp_path / "tokenizer.model").write_bytes(sentencepiece_model(**options))
    (tmp_path / "saved").mkdir()
    data.load_tokenizer(tmp_path / "tokenizer.model", given).save(tmp_path / "saved")
    for loaded in (data.load_tokenizer(tmp_path, given), data.load_tokenizer(tmp_path / "saved")):
        assert (loaded.pad_id, loaded.bos_id, loaded.eos_id, loaded.vocab_size) == (
            pad_id,
            bos_id,
            eos_id,
            vocab_size,
        )
        assert loaded.decode([*loaded.encode("a dog"), pad_id, pad_id]) == "a dog"
    assert data.load_tokenizer(tmp_path / "saved", pad_id=5).pad_id == 5


@pytest.mark.parametrize(
    "file, content, found",
    [
        *(
            (
                "tokenizer.model",
                lambda model, share=share: model[: int(share * len(model))],
                "damaged",
            )
            for share in (0.9, 0.5, 0.01)
        ),
        ("tokenizer.model", lambda model: b"", "damaged"),
        *(
            ("tokenizer_config.json", lambda model, config=config: config, "")
            for config in (b"{", b"[]", b'{"pad_token_id": "x"}', b'{"pad_token_id": -1}')
        ),
    ],
)
def test_damaged_tokenizer_file(tmp_path, tokenizer, file, content, found):
    with pytest.raises(ValueError, match=f"^{tmp_path}: no tokenizer in this directory"):
        data.load_tokenizer(tmp_path)
    tokenizer.save(tmp_path)
    (tmp_path / file).write_bytes(content(tokenizer.model_proto))
    with pytest.raises(ValueError, match=f"^{tmp_path}/{file}: .*{found}"):
        data.load_tokenizer(tmp_path)


@pytest.mark.parametrize("pad_id", [10_400, 2**24 - 1, 2**63, 10**400, -1, 1.5, "5"], ids=repr)
@pytest.mark.parametrize("kind", ["sentencepiece", "Hugging Face"])
def test_a_pad_id_far_beyond_the_ids_is_refused(kind, pad_id, tokenizer, tmp_path):
    """Each id up to it would get a name: sixteen million of them take minutes, and gigabytes."""
    tokenizer.save(tmp_path)
    file = tmp_path / ("tokenizer.model" if kind == "sentencepiece" else "tokenizer.json")
    size = tokenizer.text_size
    with pytest.raises(ValueError, match=f"^{file}: the pad id .--pad_id.* tokenizer has {size} i"):
        data.load_tokenizer(file, pad_id=pad_id)
    assert data.load_tokenizer(file, pad_id=size + 1000).vocab_size == size + 1001


@pytest.mark.parametrize("pad_id", [None, 2, 450])
def test_a_saved_tokenizer_is_read_without_the_library(tmp_path, monkeypatch, tokenizer, pad_id):
    """It has the same ids and files, whether the library `tokenizers` was there or not."""
    tokenizer = data.Tokenizer(tokenizer.model_proto, pad_id)
    (tmp_path / "with").mkdir()
    tokenizer.save(tmp_path / "with")
    monkeypatch.setattr(parts.tokenizers, "tokenizers", None)
    (tmp_path / "without").mkdir()
    tokenizer.save(tmp_path / "without")
    names = sorted(file.name for file in (tmp_path / "without").iterdir())
    assert names == ["tokenizer.json", "tokenizer.model", "tokenizer_config.json"]
    for name in names:
        saved = [(tmp_path / kind / name).read_bytes() for kind in ("with", "without")]
        assert saved[0] == saved[1], name
    (tmp_path / "with" / "tokenizer.json").unlink()  # sentencepiece alone is enough, too
    for name in ("with", "without"):
        loaded = data.load_tokenizer(tmp_path / name)
        assert all(
            getattr(loaded, key) == getattr(tokenizer, key)
            for key in ("pad_id", "bos_id", "eos_id", "text_size", "vocab_size")
        )
        assert loaded.encode(TEXTS[0]) == tokenizer.encode(TEXTS[0])


@pytest.mark.parametrize("file", ["tokenizer.json", "vocab.json"])
def test_a_file_that_only_the_library_can_read(tmp_path, monkeypatch, file):
    monkeypatch.setattr(parts.tokenizers, "tokenizers", None)
    (tmp_path / file).write_text("{}")
    with pytest.raises(
        ValueError,
        match=f"^{tmp_path}/{file}: reading it needs `pip install -r requirements-hf.txt`",
    ):
        data.load_tokenizer(tmp_path)


@pytest.mark.parametrize("kind", ["sentencepiece", "Hugging Face"])
@pytest.mark.parametrize("texts", [[], [""], ["", "a", ""], "all"], ids=str)
def test_a_batch_is_encoded_as_its_texts_are(tmp_path, tokenizer, kind, texts):
    if kind == "Hugging Face":
        tokenizer.save(tmp_path)
        tokenizer = data.load_tokenizer(tmp_path / "tokenizer.json")
        assert type(tokenizer) is parts.tokenizers.HuggingFaceTokenizer
    if texts == "all":
        rng = random.Random(0)
        drawn = ["".join(map(chr, rng.choices(range(1, 0x3000), k=20))) for _ in range(500)]
        texts = [*HARD_TEXTS, *TEXTS, "e\u0301 \ufb01 \u2460 \u2581", "\0", "a" * 5000, *drawn]
    batch = tokenizer.encode_batch(texts)
    assert batch == [tokenizer.encode(text) for text in texts]
    assert type(batch) is list and all(type(ids) is list for ids in batch)


# --------------------------------------------------------------------------------------------------
# Hugging Face

HARD_TEXTS = [
    "",
    " ",
    "Hello world",
    "  two  spaces ",
    "line\n\nHuman: hi\r\n\tx",
    "naïve café ☕ 日本語 🙂",
    "I'll, you're; 1234 don't",
    "a</s>b<s> c<pad>d <|endoftext|>",
]
CHATML = {
    "<|im_end|>": 295,
    "<|im_start|>": 296,
}  # right behind the vocabulary that the texts support
FAST, GPT2 = {"tokenizer_class": "PreTrainedTokenizerFast"}, {"tokenizer_class": "GPT2Tokenizer"}
BEGIN_END, LLAMA_3 = (
    ["<|begin|>", "<|end|>", "<|pad|>"],
    {
        "bos_token": "<|begin|>",
        "eos_token": {"__type": "AddedToken", "content": "<|end|>", "special": True},
        **FAST,
    },
)
# name: (special tokens, tokenizer_config.json, is a bos put in front, has a pad of its own)
HUB = {
    "gpt2": (["<|endoftext|>"], GPT2, False, False),
    "opt": (
        ["<s>", "<pad>", "</s>"],
        GPT2
        | {  # its eos is its bos, as in facebook/opt-350m
            "bos_token": "</s>",
            "eos_token": "</s>",
            "unk_token": "</s>",
            "pad_token": "<pad>",
            "add_bos_token": True,
        },
        True,
        True,
    ),
    "llama": (BEGIN_END, LLAMA_3, True, False),
    "llama, a pad of its own": (BEGIN_END, LLAMA_3 | {"pad_token": "<|pad|>"}, True, True),
}


def byte_level(special=("<|endoftext|>",), template=None, texts=TEXTS):
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.train_from_iterator(
        texts,
        tokenizers.trainers.BpeTrainer(
            vocab_size=300,
            special_tokens=list(special),
            show_progress=False,
            initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        ),
    )
    if template:
        tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
            single=template, special_tokens=[(special[0], 0)]
        )
    return tokenizer


def hub_files(
    directory, *, backend=None, sentencepiece_proto=None, config, added=None, model_type="llama"
):
    """Write a tokenizer directory as the hub has them; `backend` becomes tokenizer.json, or
    vocab.json and merges.txt."""
    directory.mkdir()
    if (
        backend is not None
        and config.get("tokenizer_class") == "GPT2Tokenizer"
        and "add_prefix_space" not in config
    ):
        backend.model.save(str(directory))
    elif backend is not None:
        backend.save(str(directory / "tokenizer.json"))
    if sentencepiece_proto is not None:
        (directory / "tokenizer.model").write_bytes(sentencepiece_proto)
    for name, content in (
        ("added_tokens", added),
        ("tokenizer_config", config),
        ("config", {"model_type": model_type}),
    ):
        if content is not None:
            (directory / f"{name}.json").write_text(json.dumps(content))
    return directory


@pytest.fixture(scope="module", params=HUB)
def hub_directory(request, tmp_path_factory):
    """Write tokenizer files as the hub has them; return the directory and the last two of HUB."""
    (special, config, *expected), family = HUB[request.param], request.param.split(",")[0]
    backend = byte_level(special, "<|begin|> $A" if family == "llama" else None)
    return hub_files(
        tmp_path_factory.mktemp("hub") / family, backend=backend, config=config, model_type=family
    ), *expected


@pytest.fixture
def gpt2(tmp_path):
    """A directory with a tokenizer.json alone."""
    return hub_files(tmp_path / "hub", backend=byte_level(), config={}, model_type="gpt2")


@pytest.fixture
def saved(tmp_path):
    (tmp_path / "saved").mkdir()
    return tmp_path / "saved"


# --------------------------------------------------------------------------------------------------
# Reading


def test_same_ids_as_transformers(hub_directory):
    ours, theirs = (
        data.load_tokenizer(hub_directory[0]),
        transformers.AutoTokenizer.from_pretrained(hub_directory[0]),
    )
    for text in HARD_TEXTS + TEXTS:
        assert ours.encode(text) == theirs(text, add_special_tokens=False)["input_ids"], text
    for text in HARD_TEXTS[:-1]:
        assert ours.decode(ours.encode(text)) == text
    assert ours.eos_id == theirs.eos_token_id and ours.text_size == len(theirs)


def test_special_ids_of_hub_tokenizers(hub_directory):
    directory, bos_in_front, own_pad = hub_directory
    tokenizer = data.load_tokenizer(directory)
    assert (
        tokenizer.encode("a")[0] != tokenizer.bos_id
        and (tokenizer.bos_id is not None) == bos_in_front
    )
    assert (tokenizer.pad_id < tokenizer.text_size) == own_pad
    assert tokenizer.vocab_size == tokenizer.text_size + (not own_pad)
    assert tokenizer.pad_id not in (tokenizer.bos_id, tokenizer.eos_id)
    assert (
        data.load_tokenizer(directory, pad_id=tokenizer.eos_id).pad_id == tokenizer.eos_id
    )  # DeepSpeed-Chat's choice


@pytest.mark.parametrize("options, given, pad_id, bos_id, eos_id, vocab_size", PADS)
def test_a_pad_token_that_is_eos_says_nothing_about_padding(
    tmp_path, saved, options, given, pad_id, bos_id, eos_id, vocab_size
):
    directory = hub_files(
        tmp_path / "hub",
        sentencepiece_proto=sentencepiece_model(**options),
        config={"pad_token": "</s>"},
    )
    data.load_tokenizer(directory, given).save(saved)
    for loaded in (data.load_tokenizer(directory, given), data.load_tokenizer(saved)):
        assert (loaded.pad_id, loaded.bos_id, loaded.eos_id, loaded.vocab_size) == (
            pad_id,
            bos_id,
            eos_id,
            vocab_size,
        )


@pytest.mark.parametrize(
    "files",
    [
        dict(
            backend=byte_level,
            config={"eos_token": "<|im_end|>", **GPT2},
            added=CHATML,
            model_type="gpt2",
        ),
        dict(
            backend=byte_level,
            config={
                "eos_token": "<|im_end|>",
                "added_tokens_decoder": {
                    str(i): {"content": name, "special": True} for name, i in CHATML.items()
                },
                **FAST,
            },
        ),
        dict(
            backend=lambda: byte_level(["<s>", "</s>"]),
            config={"eos_token": "</s>", "bos_token": None, **FAST},
        ),
        dict(backend=byte_level, config={"eos_token": None, "bos_token": None, **FAST}),
        dict(backend=byte_level, config={"add_prefix_space": True, **GPT2}, model_type="gpt2"),
        dict(
            backend=byte_level,
            config={
                "eos_token": "<|endoftext|>",
                "additional_special_tokens": ["cat", "<|new|>"],
                **FAST,
            },
        ),
    ],
    ids=[
        "added_tokens.json",
        "added_tokens_decoder",
        "no bos",
        "no eos",
        "prefix space",
        "additional special tokens",
    ],
)
def test_files_beside_a_tokenizer_are_read(files, tmp_path, saved):
    """Ids and special ids are those of AutoTokenizer, also after saving."""
    directory = hub_files(tmp_path / "hub", **{**files, "backend": files["backend"]()})
    ours, theirs = (
        data.load_tokenizer(directory),
        transformers.AutoTokenizer.from_pretrained(directory),
    )
    ours.save(saved)
    again = data.load_tokenizer(saved)
    assert (
        ours.eos_id == again.eos_id == theirs.eos_token_id
        and ours.text_size == len(theirs) <= ours.pad_id == again.pad_id
    )
    assert ours.bos_id is None is again.bos_id
    assert ours.model_size == theirs.backend_tokenizer.get_vocab_size(with_added_tokens=False)
    for text in [*HARD_TEXTS, *TEXTS, "the cat<|im_end|>\n<|im_start|>x", "<|new|>"]:
        ids = theirs(text, add_special_tokens=False)["input_ids"]
        assert ours.encode(text) == ids == again.encode(text), text


def test_sentencepiece_beside_a_tokenizer_json_with_more_tokens(tmp_path, saved, monkeypatch):
    """A chat model made from Llama 2: the tokens that were added are in tokenizer.json alone."""
    proto = sentencepiece_model(normalization_rule_name="identity", remove_extra_whitespaces=False)
    n = sentencepiece.SentencePieceProcessor(model_proto=proto).get_piece_size()
    spec = llama_spec(proto)
    spec["added_tokens"] += [
        parts.tokenizers.added_token(n, "<|im_end|>"),
        parts.tokenizers.added_token(n + 1, "<|im_start|>"),
    ]
    config = {
        "bos_token": "<s>",
        "eos_token": "<|im_end|>",
        "pad_token": "<unk>",
        "add_bos_token": True,
        **FAST,
    }
    added = {"<|im_end|>": n, "<|im_start|>": n + 1}
    directory = hub_files(
        tmp_path / "hub",
        backend=tokenizers.Tokenizer.from_str(json.dumps(spec)),
        sentencepiece_proto=proto,
        config=config,
        added=added,
    )
    ours, theirs = (
        data.load_tokenizer(directory),
        transformers.AutoTokenizer.from_pretrained(directory),
    )
    assert (
        (ours.bos_id, ours.eos_id, ours.pad_id, ours.vocab_size)
        == (1, n, 0, n + 2)
        == (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id, len(theirs))
    )
    assert (
        ours.encode("a cat<|im_end|>")
        == theirs("a cat<|im_end|>", add_special_tokens=False)["input_ids"]
    )
    # Without the library nothing is read, since sentencepiece has other ids for such texts.
    monkeypatch.setattr(parts.tokenizers, "tokenizers", None)
    with pytest.raises(ValueError, match="tokenizer.json: reading it needs `pip install"):
        data.load_tokenizer(directory)


LLAMA = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "<|im_end|>"}
IDENTITY = dict(normalization_rule_name="identity", remove_extra_whitespaces=False)
FLAGS = [
    *(dict(special=special) for special in (True, False)),
    *(dict(special=True, **{flag: True}) for flag in ("lstrip", "rstrip", "single_word")),
    *(dict(special=False, normalized=normalized) for normalized in (True, False)),
    dict(special=False, lstrip=True, rstrip=True, single_word=True),
]
SPLIT_TEXTS = [
    "<|im_start|>user\nthe cat<|im_end|>\n<|im_start|>assistant\na dog <|im_end|>\n",
    "the cat <|im_end|> a dog",
    "the<|im_end|>cat  <|im_end|>\n\na",
    "<|im_end|><|im_end|> <|im_start|>",
    "<s>[INST] a [/INST] b</s> <unk><pad>",
    "<|im_end|",
]


def added_tokens(flags: dict) -> dict:
    return {str(i): {"content": name, **flags} for i, name in enumerate(CHATML, start=300)}


@pytest.mark.parametrize(
    "config, added",
    [
        ({}, {"<|im_end|>": 300, "<|im_start|>": 301}),
        ({"legacy": True}, {"<|im_end|>": 300, "<|im_start|>": 301}),
        ({"legacy": False}, {"<|im_end|>": 300, "<|im_start|>": 301}),
        ({"add_prefix_space": False}, {"<|im_end|>": 300, "<|im_start|>": 301}),
        ({"tokenizer_class": "LlamaTokenizerFast"}, {"<|im_end|>": 300}),
        ({"eos_token": "</s>", "unk_token": "<unk>"}, None),
        ({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"], "eos_token": "</s>"}, None),
        *(({"added_tokens_decoder": added_tokens(flags)}, None) for flags in FLAGS),
    ],
    ids=str,
)
def test_sentencepiece_texts_are_split_at_added_tokens(tmp_path, saved, config, added):
    """Ids are those of transformers' LlamaTokenizer, from tokenizer.model alone and when saved."""
    directory = hub_files(
        tmp_path / "hub",
        sentencepiece_proto=sentencepiece_model(**IDENTITY),
        config=LLAMA | config,
        added=added,
    )
    theirs = transformers.AutoTokenizer.from_pretrained(directory)
    assert type(theirs) is transformers.LlamaTokenizer
    ours = data.load_tokenizer(directory)
    ours.save(saved)
    again, again_theirs = (
        data.load_tokenizer(saved),
        transformers.AutoTokenizer.from_pretrained(saved),
    )
    assert (ours.bos_id, ours.eos_id, ours.text_size) == (1, theirs.eos_token_id, len(theirs))
    assert ours.pad_id == again.pad_id == again_theirs.pad_token_id == len(theirs)
    for text in [*SPLIT_TEXTS, *HARD_TEXTS, *TEXTS]:
        ids = theirs(text, add_special_tokens=False)["input_ids"]
        assert ours.encode(text) == ids == again.encode(text), text
        assert again_theirs(text, add_special_tokens=False)["input_ids"] == ids, text


def test_a_chatml_text_has_as_many_ids_as_in_transformers(tmp_path):
    directory = hub_files(
        tmp_path / "hub",
        sentencepiece_proto=sentencepiece_model(**IDENTITY),
        config=LLAMA,
        added={"<|im_end|>": 300, "<|im_start|>": 301},
    )
    text = "<|im_start|>user\nthe cat<|im_end|>\n<|im_start|>assistant\n dog<|im_end|>\n"
    assert len(data.load_tokenizer(directory).encode(text)) == 26
    spelled = data.Tokenizer(sentencepiece_model(**IDENTITY))
    assert len(spelled.encode(text)) == 65  # as sentencepiece alone has it


@pytest.mark.parametrize("flags", FLAGS, ids=str)
@pytest.mark.parametrize("in_own_file", [False, True])
def test_flags_of_added_tokens_are_those_of_transformers(tmp_path, saved, flags, in_own_file):
    """tokenizer_config.json has the last word about a token that is in tokenizer.json, too."""
    backend = byte_level()
    if in_own_file:
        backend.add_tokens(list(CHATML))
    decoder = {str(i): {"content": name, **flags} for name, i in CHATML.items()}
    config = {"added_tokens_decoder": decoder, "eos_token": "<|endoftext|>", **FAST}
    directory = hub_files(tmp_path / "hub", backend=backend, config=config)
    theirs, ours = (
        transformers.AutoTokenizer.from_pretrained(directory),
        data.load_tokenizer(directory),
    )
    ours.save(saved)
    again = data.load_tokenizer(saved)
    for text in [*SPLIT_TEXTS, *HARD_TEXTS]:
        ids = theirs(text, add_special_tokens=False)["input_ids"]
        assert ours.encode(text) == ids == again.encode(text), text


@pytest.mark.parametrize("in_own_file", [False, True])
@pytest.mark.parametrize("is_named", [False, True])
def test_tokens_of_added_tokens_json_are_those_of_transformers(
    tmp_path, saved, in_own_file, is_named
):
    """Flags are those of tokenizer.json, if it has the token; else one that is named is special,
    and others are looked for in normalized text."""
    backend, token = byte_level(), "<|Im_End|>"
    backend.normalizer = tokenizers.normalizers.Lowercase()
    if in_own_file:
        backend.add_tokens([tokenizers.AddedToken(token, lstrip=True, normalized=False)])
    config = FAST | {"eos_token": token if is_named else "<|endoftext|>"}
    added = {token: backend.token_to_id(token) or backend.get_vocab_size()}
    directory = hub_files(tmp_path / "hub", backend=backend, config=config, added=added)
    theirs, ours = (
        transformers.AutoTokenizer.from_pretrained(directory),
        data.load_tokenizer(directory),
    )
    ours.save(saved)
    again = data.load_tokenizer(saved)
    found = set()
    for text in ("A  <|Im_End|> b", "a <|im_end|>", "<|IM_END|>"):
        ids = theirs(text, add_special_tokens=False)["input_ids"]
        assert ours.encode(text) == ids == again.encode(text), text
        found.add(added[token] in ids)
    is_exact = in_own_file or is_named  # capital letters count
    assert found == ({True, False} if is_exact else {True})


@pytest.mark.parametrize("splits", [False, True])
def test_names_of_special_tokens_are_text_where_the_files_say_so(tmp_path, saved, splits):
    directory = hub_files(
        tmp_path / "hub", backend=byte_level(), config=FAST | {"split_special_tokens": splits}
    )
    theirs, ours = (
        transformers.AutoTokenizer.from_pretrained(directory),
        data.load_tokenizer(directory),
    )
    ours.save(saved)
    again = data.load_tokenizer(saved)
    ids = theirs("a<|endoftext|>", add_special_tokens=False)["input_ids"]
    assert (len(ids) > 2) == splits
    assert ours.encode("a<|endoftext|>") == ids == again.encode("a<|endoftext|>")


def llama_spec(proto: bytes) -> dict:
    """Make the tokenizer.json of a sentencepiece model as transformers writes it for Llama 2."""
    pieces = sentencepiece.SentencePieceProcessor(model_proto=proto)
    return parts.tokenizers.sentencepiece_spec(pieces, parts.tokenizers.piece_names_of(pieces))


def metaspace_json() -> tokenizers.Tokenizer:
    """Make a tokenizer.json as transformers 4 wrote it for Llama 2: each part gets a space."""
    return tokenizers.Tokenizer.from_str(json.dumps(llama_spec(sentencepiece_model(**IDENTITY))))


def digits_json() -> tokenizers.Tokenizer:
    """Make a tokenizer.json as SmolLM's: each digit is a token, and some numbers are pieces."""
    numbers = ["2024 and 2025 are 20 24"] * 20
    backend = byte_level(texts=numbers)
    digits = tokenizers.pre_tokenizers.Digits(individual_digits=True)
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([digits, backend.pre_tokenizer])
    return backend


@pytest.mark.parametrize("model_type", ["llama", "mistral", "gpt2", "qwen3", "gpt_neox", None])
@pytest.mark.parametrize(
    "kind, config",
    [
        ("spaces", {"tokenizer_class": "LlamaTokenizer"}),
        ("spaces", {"tokenizer_class": "LlamaTokenizer", "legacy": True}),
        ("spaces", {"tokenizer_class": "LlamaTokenizerFast", "add_prefix_space": False}),
        ("spaces", FAST),
        ("digits", {"tokenizer_class": "LlamaTokenizer"}),
        ("digits", {"tokenizer_class": "GPT2Tokenizer"}),
        ("digits", {"tokenizer_class": "GPT2TokenizerFast", "add_prefix_space": True}),
        ("digits", {"tokenizer_class": "GPTNeoXTokenizer"}),
        ("digits", FAST),
    ],
    ids=str,
)
def test_texts_are_prepared_as_by_the_class_that_transformers_takes(
    tmp_path, saved, config, kind, model_type
):
    """tokenizer.json does not decide alone. What is saved gives the same ids as what was read."""
    directory = hub_files(tmp_path / "hub", config=config)
    backend = {"spaces": metaspace_json, "digits": digits_json}[kind]()
    backend.save(str(directory / "tokenizer.json"))
    (directory / "config.json").write_text(json.dumps({"model_type": model_type}))
    if model_type is None:
        (directory / "config.json").unlink()
    theirs = transformers.AutoTokenizer.from_pretrained(directory)
    ours = data.load_tokenizer(directory)
    ours.save(saved)
    again = data.load_tokenizer(saved), transformers.AutoTokenizer.from_pretrained(saved)
    texts = ["in 2024</s> e\u0301 2025<|endoftext|> 20<s>a", "\u2581a ", " a", *HARD_TEXTS]
    for text in texts:
        ids = theirs(text, add_special_tokens=False)["input_ids"]
        assert ours.encode(text) == ids == again[0].encode(text), text
        assert again[1](text, add_special_tokens=False)["input_ids"] == ids, text


TEMPLATE = {"chat_template": "{{ bos_token }}{{ messages[0]['content'] }}"}
REFUSED = {  # name: (options of the model, tokenizer_config.json, are tokens added, model type)
    "unigram": (dict(model_type="unigram"), LLAMA, True, "llama"),
    "normalizes": ({}, LLAMA, True, "llama"),
    "no bytes": (dict(byte_fallback=False, **IDENTITY), LLAMA, True, "llama"),
    "another class": (IDENTITY, LLAMA | FAST, True, "llama"),
    "no class": (IDENTITY, None, True, "llama"),
    "another model": (IDENTITY, LLAMA, True, "mistral"),
    "added_tokens_decoder": (
        IDENTITY,
        FAST | {"added_tokens_decoder": added_tokens({"special": True})},
        None,
        "llama",
    ),
    "a name that is no piece": (IDENTITY, FAST | {"eos_token": "<|im_end|>"}, None, "llama"),
    "additional": (IDENTITY, FAST | {"additional_special_tokens": ["<|a|>"]}, None, "llama"),
    "a template": (IDENTITY, FAST | TEMPLATE, None, "llama"),
}


@pytest.mark.parametrize("options, config, added, model_type", REFUSED.values(), ids=REFUSED.keys())
def test_sentencepiece_that_cannot_split_as_transformers_does(
    tmp_path, options, config, added, model_type
):
    """It is refused, and what the message says to do helps."""
    proto = sentencepiece_model(**options)
    size = sentencepiece.SentencePieceProcessor(model_proto=proto).get_piece_size()
    directory = hub_files(
        tmp_path / "hub",
        sentencepiece_proto=proto,
        config=config,
        added={"<|im_end|>": size} if added else None,
        model_type=model_type,
    )
    with pytest.raises(
        ValueError, match=f"^{directory}/tokenizer.model: sentencepiece splits no"
    ) as error:
        data.load_tokenizer(directory)
    code = str(error.value).partition('python -c "')[2].rstrip('"')
    exec(code)
    theirs, ours = (
        transformers.AutoTokenizer.from_pretrained(directory),
        data.load_tokenizer(directory),
    )
    for text in SPLIT_TEXTS:
        assert ours.encode(text) == theirs(text, add_special_tokens=False)["input_ids"], text


def test_llama_tokenizer_model_needs_the_library(tmp_path, monkeypatch):
    monkeypatch.setattr(parts.tokenizers, "tokenizers", None)
    directory = hub_files(
        tmp_path / "hub", sentencepiece_proto=sentencepiece_model(**IDENTITY), config=LLAMA
    )
    with pytest.raises(ValueError, match="tokenizer.model: reading it needs `pip install -r"):
        data.load_tokenizer(directory)


def test_an_appended_eos_is_not_a_bos_in_front(tmp_path):
    backend = byte_level(template="$A <|endoftext|>")
    assert (
        data.load_tokenizer(
            hub_files(tmp_path / "hub", backend=backend, config={}, model_type="gpt2")
        ).bos_id
        is None
    )


def test_without_the_tokenizers_library(gpt2, monkeypatch, tokenizer):
    """The message says what to install, also where there is a sentencepiece model, too."""
    monkeypatch.setattr(parts.tokenizers, "tokenizers", None)
    with pytest.raises(
        ValueError,
        match=f"^{gpt2}/tokenizer.json: reading it needs `pip install -r requirements-hf.txt`",
    ):
        data.load_tokenizer(gpt2)
    (gpt2 / "tokenizer.model").write_bytes(tokenizer.model_proto)
    with pytest.raises(ValueError, match=f"^{gpt2}/tokenizer.json: reading it needs"):
        data.load_tokenizer(gpt2)


@pytest.mark.parametrize(
    "file, content",
    [
        ("tokenizer_config.json", {"eos_token": 5}),
        ("tokenizer_config.json", {"unk_token": ["a"]}),
        ("special_tokens_map.json", {"pad_token": 1}),
        ("tokenizer_config.json", {"pad_token_id": 2**63}),
        ("added_tokens.json", {"a": "b"}),
        ("added_tokens.json", []),
        ("tokenizer_config.json", {"added_tokens_decoder": {"x": {"content": "a"}}}),
        ("tokenizer_config.json", {"added_tokens_decoder": [1]}),
    ],
    ids=str,
)
def test_a_wrong_file_beside_a_tokenizer_is_named(file, content, gpt2):
    (gpt2 / file).write_text(json.dumps(content))
    with pytest.raises(ValueError, match=f"^{gpt2}/{file}: "):
        data.load_tokenizer(gpt2)


@pytest.mark.parametrize(
    "file, content", [("tokenizer.json", "{"), ("vocab.json", "[]"), ("vocab.json", "{}")]
)
def test_damaged_hub_tokenizer_is_named(file, content, tmp_path):
    (tmp_path / file).write_text(content)  # the third lacks its merges.txt
    with pytest.raises(ValueError, match=f"^{tmp_path}/{file}: not a tokenizer"):
        data.load_tokenizer(tmp_path)


# --------------------------------------------------------------------------------------------------
# Tokenizers that fail at a text

BACKTRACKING = "(a+)+$"  # takes the regex library too many steps for many a's and a b
# sentencepiece's map of characters: the size of a trie, and the trie, which ends before z.
SHORT_TRIE = base64.b64encode((4 * ord("z")).to_bytes(4, "little") + bytes(4 * ord("z"))).decode()
AT_LETTERS = {"x y": [1, 2], "y": [2], "x aab": [1, 0]}
FAILING = {  # name: parts of its tokenizer.json, texts that it encodes, one at which it fails
    "no unk": ({"model": {"unk_token": "none"}}, {"x y": [1, 2], "y y y": [2, 2, 2]}, "x z"),
    "a normalizer panics": (
        {"normalizer": {"type": "Precompiled", "precompiled_charsmap": SHORT_TRIE}},
        AT_LETTERS,
        "x z",
    ),
    "a pre-tokenizer panics": (
        {
            "pre_tokenizer": {
                "type": "Sequence",
                "pretokenizers": [
                    {"type": "WhitespaceSplit"},
                    {
                        "type": "Split",
                        "pattern": {"Regex": BACKTRACKING},
                        "behavior": "Isolated",
                        "invert": False,
                    },
                ],
            }
        },
        AT_LETTERS,
        "a" * 60 + "b",
    ),
}


def failing_tokenizer(directory, change):
    """Write tokenizer.json of a tokenizer of words, x, y and eos, with some parts changed."""
    spec = {
        "version": "1.0",
        **dict.fromkeys(["truncation", "padding", "normalizer", "post_processor", "decoder"]),
        "added_tokens": [],
        "pre_tokenizer": {"type": "WhitespaceSplit"},
    }
    spec |= change
    vocab = {"?": 0, "x": 1, "y": 2, "<end>": 3}
    spec["model"] = {"type": "WordLevel", "vocab": vocab, "unk_token": "?"} | spec.get("model", {})
    directory.mkdir()
    (directory / "tokenizer.json").write_text(json.dumps(spec))
    config = {"eos_token": "<end>", "tokenizer_class": "PreTrainedTokenizerFast"}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return directory


@pytest.fixture(params=FAILING)
def failing(request, tmp_path):
    """Write one of FAILING; its directory, what it makes of texts, and a text where it fails."""
    change, good, bad = FAILING[request.param]
    return failing_tokenizer(tmp_path / "tokenizer", change), good, bad


def test_a_text_that_cannot_be_encoded_is_a_value_error_that_shows_it(failing):
    directory, good, bad = failing
    tokenizer = data.load_tokenizer(directory)
    for _ in range(2):  # also after it has failed
        for text, ids in good.items():
            assert tokenizer.encode(text) == ids
        assert tokenizer.encode_batch(list(good)) == list(good.values())
        for encode in (tokenizer.encode, lambda text: tokenizer.encode_batch([*good, text, *good])):
            with pytest.raises(ValueError, match=f'cannot encode "{bad[:15]}.* [(].+[)]$'):
                encode(bad)


def test_rows_that_cannot_be_encoded_are_named_or_skipped_and_others_kept(failing, tmp_path):
    directory, good, bad = failing
    tokenizer, file = data.load_tokenizer(directory), tmp_path / "rows.jsonl"
    texts = list(good)
    rows = [{"prompt": "", "chosen": texts[i % 2], "rejected": texts[1 - i % 2]} for i in range(7)]
    rows[2]["rejected"], rows[5]["prompt"] = bad, bad + " "
    file.write_text("\n".join(json.dumps(row) for row in rows))
    how = file, tokenizer, 100, "left", tmp_path / "cache"
    with pytest.raises(ValueError, match=f'^{file}:3: the tokenizer cannot encode "{bad[:15]}'):
        data.tokenize_file(*how)
    found = data.tokenize_file(*how, skip_bad_rows=True)
    assert [place.partition(": ")[0] for place in found.bad_rows] == [f"{file}:3", f"{file}:6"]
    expected = []
    for i in (0, 1, 3, 4, 6):
        ids = [good[rows[i][name]] + [tokenizer.eos_id] for name in ("chosen", "rejected")]
        expected.append(ids)
    assert [found[i].sequences for i in range(len(found))] == expected


def test_ids_that_cannot_be_decoded_are_a_value_error(gpt2):
    tokenizer = data.load_tokenizer(gpt2)
    with pytest.raises(ValueError, match="^the tokenizer cannot decode .*-5"):
        tokenizer.decode([-5])


def test_a_tokenizer_json_that_makes_the_library_panic_is_named(tmp_path, monkeypatch):
    directory = failing_tokenizer(tmp_path / "tokenizer", {})

    class PanicException(BaseException):
        """An error that is no Exception, as a panic in the library's Rust code is one."""

    def panic(*_):
        raise PanicException("index out of bounds\n\x1b]52;c;aGk=\x07")

    monkeypatch.setattr(parts.tokenizers, "read_backend", panic)
    found = "not a tokenizer, or damaged (index out of bounds↵␛]52;c;aGk=␇)"
    with pytest.raises(ValueError) as error:
        data.load_tokenizer(directory)
    assert str(error.value) == f"{directory}/tokenizer.json: {found}"
    monkeypatch.setattr(parts.tokenizers, "read_backend", interrupted)
    with pytest.raises(KeyboardInterrupt):
        data.load_tokenizer(directory)


def interrupted(*_):
    raise KeyboardInterrupt


# --------------------------------------------------------------------------------------------------
# Saving


def one_bos_one_eos(ids: list[int], theirs, bos: int | None, eos: int | None) -> list[int]:
    """Put a bos in front of a text's ids and an eos behind, where it has none: the contract's rule.

    theirs: the tokenizer of transformers, which knows the tokens of white space.
    """
    text = ids[1:] if bos is not None and ids[0:1] == [bos] else ids
    words = []  # positions of the tokens that are not white space alone
    for position, name in enumerate(theirs.convert_ids_to_tokens(text)):
        if not theirs.convert_tokens_to_string(["a", name])[1:].isspace():
            words.append(position)
    if eos is not None and words and text[words[-1]] == eos:
        text = text[: words[-1]]
    return [i for i in [bos, *text, eos] if i is not None]


def assert_transformers_agrees(tokenizer, directory):
    """Assert that `save` writes the same tokenizer for us and for AutoTokenizer, whose default is
    the sequence that we train on, and whose chat template is `chat_text`."""
    tokenizer.save(directory)
    again, theirs = (
        data.load_tokenizer(directory),
        transformers.AutoTokenizer.from_pretrained(directory),
    )
    names = ("pad_id", "bos_id", "eos_id", "vocab_size")
    assert [getattr(again, name) for name in names] == [getattr(tokenizer, name) for name in names]
    assert (theirs.pad_token_id, theirs.eos_token_id, len(theirs)) == (
        tokenizer.pad_id,
        tokenizer.eos_id,
        tokenizer.vocab_size,
    )
    rng = random.Random(0)
    alphabet = [
        "a",
        "aa",
        "ab",
        " ",
        "  ",
        "\n",
        "the",
        " the",
        "é",
        "e\u0301",
        "ﬁ",
        "😀",
        "日本",
        "\u2581",
        "<s>",
        "</s>",
        "<unk>",
        "<0x41>",
    ]
    drawn = [
        "".join(rng.choices([*alphabet, chr(rng.randrange(1, 0x3000))], k=rng.randrange(30)))
        for _ in range(500)
    ]
    for text in HARD_TEXTS + TEXTS + drawn:
        ids = tokenizer.encode(text)
        assert again.encode(text) == ids == theirs(text, add_special_tokens=False)["input_ids"], (
            text
        )
        if ids or tokenizer.bos_id or tokenizer.eos_id:
            (sequence,) = data.tokenize(Comparison("", [text]), tokenizer, 10**6)
            eos = None if tokenizer.eos_id == tokenizer.pad_id else tokenizer.eos_id
            assert sequence == one_bos_one_eos(ids, theirs, tokenizer.bos_id, eos), text
            if tokenizer.bos_id not in ids and tokenizer.eos_id not in ids:
                assert sequence == theirs(text)["input_ids"], text
    chat = [("system", "Be kind."), ("user", "Hi"), ("assistant", "Hello {}")]
    messages = [{"role": role, "content": content} for role, content in chat]
    ends = {"bos": "", "eos": ""}
    if tokenizer.bos_id is not None and not tokenizer.splits_special:
        ends["bos"] = theirs.bos_token
    if tokenizer.eos_id not in (None, tokenizer.pad_id) and not tokenizer.splits_special:
        ends["eos"] = theirs.eos_token
    (sequence,) = data.tokenize(Comparison(messages[:2], [messages[2:]]), tokenizer, 10**6)
    text = theirs.apply_chat_template(messages, tokenize=False)
    assert text == chat_text(messages, **ends)
    assert again.render(messages) == chat_text(messages) == tokenizer.render(messages)
    question = theirs.apply_chat_template(messages[:2], tokenize=False, add_generation_prompt=True)
    assert question == ends["bos"] + chat_text(messages[:2]) + "\n\nAssistant:"
    if not tokenizer.splits_special:
        ids = theirs.apply_chat_template(messages, tokenize=True, return_dict=False)
        assert ids == sequence == theirs(text, add_special_tokens=False)["input_ids"]
        # Rendered text in a row gets no second bos or eos.
        assert data.tokenize(Comparison(text, [""]), tokenizer, 10**6) == [ids]
        assert tokenizer.encode_batch([text, "a", text]) == [ids, tokenizer.encode("a"), ids]


@pytest.mark.parametrize("above", [None, 0, 7])
def test_saved_hub_tokenizer_is_the_same_for_us_and_for_transformers(
    hub_directory, tmp_path, above
):
    """A pad id may be given, too: at the end of the vocabulary, or some ids behind it."""
    tokenizer = data.load_tokenizer(hub_directory[0])
    if above is not None:
        tokenizer = data.load_tokenizer(hub_directory[0], tokenizer.text_size + above)
    assert_transformers_agrees(tokenizer, tmp_path)


@pytest.mark.parametrize("pad_id", [None, 2, 450])
def test_saved_tokenizer_of_ours_is_the_same_for_transformers(tokenizer, tmp_path, pad_id):
    assert_transformers_agrees(data.Tokenizer(tokenizer.model_proto, pad_id), tmp_path)


@pytest.mark.parametrize(
    "options", [{}, dict(bos_id=-1, eos_id=-1), dict(byte_fallback=False), dict(pad_id=3)], ids=str
)
def test_saved_sentencepiece_of_llama_2_is_the_same_for_transformers(tmp_path, options):
    """Llama 2 puts a space in front of every text, and loses none."""
    model = sentencepiece_model(
        normalization_rule_name="identity", remove_extra_whitespaces=False, **options
    )
    assert_transformers_agrees(data.Tokenizer(model), tmp_path)


def test_padding_with_a_token_of_text_does_not_change_how_text_is_read(gpt2, saved):
    """`--pad_id 0` does so for Llama 3, whose id 0 is an exclamation mark."""
    letter = data.load_tokenizer(gpt2).encode("a")[0]
    tokenizer = data.load_tokenizer(gpt2, letter)
    tokenizer.save(saved)
    again = data.load_tokenizer(saved)
    assert again.pad_id == letter and again.vocab_size == tokenizer.vocab_size
    assert all(again.encode(text) == tokenizer.encode(text) for text in TEXTS + HARD_TEXTS)


def test_two_new_pad_ids_one_after_the_other_are_two_tokens(gpt2, saved, tmp_path):
    first = data.load_tokenizer(gpt2)
    first.save(saved)
    (tmp_path / "two").mkdir()
    assert_transformers_agrees(data.load_tokenizer(saved, first.pad_id + 6), tmp_path / "two")


@pytest.mark.parametrize("kinds", [("ours", "hub"), ("hub", "words")], ids=" then ".join)
def test_tokenizer_is_not_saved_beside_one_that_could_be_read_in_its_place(
    kinds, tokenizer, gpt2, saved
):
    of_kind = {
        "ours": tokenizer,
        "words": data.Tokenizer(sentencepiece_model(**WORDS)),
        "hub": data.load_tokenizer(gpt2),
    }
    of_kind[kinds[0]].save(saved)
    with pytest.raises(ValueError, match="saved/tokenizer.*: another tokenizer"):
        of_kind[kinds[1]].save(saved)


@pytest.mark.parametrize("model_type", ["bpe", "unigram"])
@pytest.mark.parametrize("byte_fallback", [True, False])
@pytest.mark.parametrize(
    "options",
    [
        dict(remove_extra_whitespaces=False),
        dict(remove_extra_whitespaces=True),
        dict(remove_extra_whitespaces=True, add_dummy_prefix=False),
    ],
    ids=str,
)
def test_saved_sentencepiece_of_other_kinds_is_the_same_for_transformers(
    tmp_path, model_type, byte_fallback, options
):
    """Random texts have names of bytes, characters beyond the vocabulary, and spaces in a row."""
    options |= dict(
        model_type=model_type,
        byte_fallback=byte_fallback,
        normalization_rule_name="identity",
        vocab_size=290,
    )
    tokenizer = data.Tokenizer(sentencepiece_model(**options))
    assert tokenizer.gap() == ""
    assert_transformers_agrees(tokenizer, tmp_path)


NORMALIZED = [
    "\ufb01 \u2460 \uff21\uff22 \u00bd\u3000a\u00a0b",
    "a   b\t\tc\r\nd  ",
    "e\u0301 \u00e9 A\u030a",
    "\uff76\uff9e \u1100\u1161 \uac00",  # half-width kana and Hangul, each with its mark
    "\u200b\ufeffthe cat\u2028",
]


@pytest.mark.parametrize("model_type", ["bpe", "unigram"])
@pytest.mark.parametrize("rule", ["nmt_nfkc", "nfkc", "nmt_nfkc_cf", "nfkc_cf"])
@pytest.mark.parametrize("prefix", [True, False])
def test_saved_sentencepiece_that_normalizes_is_the_same_for_transformers(
    tmp_path, model_type, rule, prefix
):
    options = dict(model_type=model_type, normalization_rule_name=rule, add_dummy_prefix=prefix)
    tokenizer = data.Tokenizer(sentencepiece_model(vocab_size=290, **options))
    tokenizer.save(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in NORMALIZED + HARD_TEXTS + TEXTS:
        assert theirs(text, add_special_tokens=False)["input_ids"] == tokenizer.encode(text), text
    assert "several marks" in tokenizer.gap()


@pytest.mark.parametrize("pad_id", [None, 2, 450])
def test_a_directory_of_an_earlier_version_is_read(tokenizer, tmp_path, pad_id):
    """Its files call special pieces by the model's names, and ask for them to be text."""
    expected = data.Tokenizer(tokenizer.model_proto, pad_id)
    (tmp_path / "tokenizer.model").write_bytes(tokenizer.model_proto)
    pad_token = {None: "<pad>", 2: "</s>", 450: "<|reward model pad 450|>"}[pad_id]
    config = {
        "added_tokens_decoder": {},
        "split_special_tokens": True,
        "bos_token": "<s>",
        "eos_token": "</s>",
        "pad_token": pad_token,
        "add_bos_token": True,
        "pad_token_id": expected.pad_id,
        "chat_template": plain_template(False, False),
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "tokenizer.json").write_text(json.dumps(llama_spec(tokenizer.model_proto)))
    found = data.load_tokenizer(tmp_path)
    for name in ("pad_id", "bos_id", "eos_id", "text_size", "vocab_size", "marks"):
        assert getattr(found, name) == getattr(expected, name)
    assert_transformers_agrees(found, tmp_path)


WORDS = dict(model_type="word", byte_fallback=False, vocab_size=20)


@pytest.mark.parametrize(
    "options",
    [
        dict(user_defined_symbols=["ab"]),
        dict(treat_whitespace_as_suffix=True),
        dict(model_type="char", byte_fallback=False),
        WORDS,
    ],
    ids=str,
)
def test_a_tokenizer_json_that_would_differ_is_not_written(options, tmp_path, capsys):
    tokenizer = data.Tokenizer(sentencepiece_model(**options))
    tokenizer.save(tmp_path)
    names = sorted(file.name for file in tmp_path.iterdir())
    assert names == ["tokenizer.model", "tokenizer_config.json"]
    assert f"{tmp_path}: no tokenizer.json can say" in capsys.readouterr().err
    assert data.load_tokenizer(tmp_path).encode("a  \ufb01 ab") == tokenizer.encode("a  \ufb01 ab")
