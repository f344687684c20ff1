"""Chat templates: what they render and which ids that gives, also against transformers."""

import itertools
import json
import re
from types import SimpleNamespace

import jinja2
import pytest
import sentencepiece
import tokenizers
import transformers
from transformers.utils.chat_template_utils import render_jinja_template

import data
import parts.chat
from data import Comparison
from parts.chat import ChatTemplate, chat_text, given_template, plain_template
from parts.rows import SetupError
from parts.test_tokenizers import (
    FAST,
    IDENTITY,
    LLAMA,
    TEXTS,
    byte_level,
    hub_files,
    metaspace_json,
    one_bos_one_eos,
    sentencepiece_model,
)

# --------------------------------------------------------------------------------------------------
# Templates in the manner of well-known ones

# The special tokens of TEMPLATES. <s> and </s> are the tokenizers' bos and eos, but for "eos" of a
# template.
NAMES = "<|im_start|> <|im_end|> <|head|> <|/head|> <|eot|> [INST] [/INST] <|user|>".split()

CHATML = """
{%- for message in messages %}
    {%- if loop.first and message.role != 'system' %}
        {{- '<|im_start|>system\\nHelp.<|im_end|>\\n' }}
    {%- endif %}
    {{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""
LLAMA_3 = (
    "{% for message in messages %}"
    "{% set turn = '<|head|>' + message['role'] + '<|/head|>\n\n' + message['content'] | trim %}"
    "{% if loop.index0 == 0 %}{% set turn = bos_token + turn %}{% endif %}"
    "{{ turn + '<|eot|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|head|>assistant<|/head|>\n\n' }}{% endif %}"
)
MISTRAL = """{{ bos_token }}
{%- if messages[0].role == 'system' %}
    {%- set first, turns = messages[0].content + '\n\n', messages[1:] %}
{%- else %}
    {%- set first, turns = '', messages %}
{%- endif %}
{%- for turn in turns %}
    {%- if (turn.role == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('user and assistant take turns') }}
    {%- endif %}
    {%- if turn.role == 'user' %}
        {{- '[INST] ' + (first if loop.first else '') + turn.content + ' [/INST]' }}
    {%- else %}
        {{- ' ' + turn.content + eos_token }}
    {%- endif %}
{%- endfor %}
"""
ZEPHYR = """{% for message in messages %}
{% if message['role'] == 'user' %}
{{ '<|user|>\n' + message['content'] + eos_token }}
{% elif message['role'] == 'system' %}
{{ '<|system|>\n' + message['content'] + eos_token }}
{% else %}
{{ '<|assistant|>\n' + message['content'] + eos_token }}
{% endif %}
{% if loop.last and add_generation_prompt %}
{{ '<|assistant|>' }}
{% endif %}
{% endfor %}
"""
NO_SYSTEM = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for message in messages %}"
    "<|im_start|>{{ 'model' if message.role == 'assistant' else message.role }}\n"
    "{{ message.content | trim }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>model\n{% endif %}"
)
GENERATION = (
    "{% for message in messages %}{% if message.role == 'assistant' %}"
    "{% generation %}{{ message.content }}{{ eos_token }}{% endgeneration %}"
    "{% else %}{{ message.content }}\n{% endif %}{% endfor %}"
)
TEMPLATES = {  # name: (template, the token that ends an answer)
    "ChatML": (CHATML, "<|im_end|>"),
    "Llama 3": (LLAMA_3, "<|eot|>"),
    "Mistral": (MISTRAL, "</s>"),
    "Zephyr": (ZEPHYR, "</s>"),
    "no system role": (NO_SYSTEM, "<|im_end|>"),
    "generation": (GENERATION, "</s>"),
}


def messages(*turns: str) -> list[dict]:
    """Make messages of texts like "user: Hi"."""
    names = {"s": "system", "u": "user", "a": "assistant"}
    pairs = [turn.split(":", 1) for turn in turns]
    return [{"role": names[role], "content": content} for role, content in pairs]


DIALOGUES = {
    "one turn": messages("u:the cat", "a:a dog"),
    "system": messages("s:Be brief.", "u:the cat", "a:a dog"),
    "several turns": messages("u:a", "a:b", "u:the  mat", "a:log\n", "u:c?", "a:d"),
    "empty answer": messages("u:the cat", "a:"),
    "empty system": messages("s:", "u:a", "a:b"),
    "white space": messages("u: \n\ta  ", "a:\n\n the cat \n\n"),
    "white space alone": messages("u: ", "a: \n "),
    "unicode": messages("u:日本 жщ ß \u00a0", "a:e\u0301 ﬁ ① 👨\u200d👩\u2028"),
    "special tokens in a text": messages(
        "u:<s> a </s><|im_end|>\n<|im_start|>assistant\n[/INST]", "a:<|eot|></s>"
    ),
    "ends with eos": messages("u:the cat", "a:a dog</s>"),
    "two users": messages("u:a", "u:b", "a:c"),
    "assistant first": messages("a:a", "u:b", "a:c"),
    "system later": messages("u:a", "s:b", "a:c"),
}

# --------------------------------------------------------------------------------------------------
# Tokenizers


def sentencepiece_with_json(directory, config):
    """A sentencepiece BPE as tokenizer.json; every part of a text begins with a space."""
    backend = metaspace_json()
    backend.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    backend.add_special_tokens(NAMES)
    return hub_files(directory, backend=backend, config=FAST | config)


def llama_2(directory, config):
    """A sentencepiece BPE as LlamaTokenizer: only the first part of a text begins with a space."""
    return sentencepiece_with_json(directory, {"tokenizer_class": "LlamaTokenizer"} | config)


def sentencepiece_alone(directory, config):
    proto = sentencepiece_model(**IDENTITY)
    size = sentencepiece.SentencePieceProcessor(model_proto=proto).get_piece_size()
    added = {name: size + i for i, name in enumerate(NAMES)}
    config = LLAMA | config
    return hub_files(directory, sentencepiece_proto=proto, config=config, added=added)


def special_bytes(directory, config):
    """A byte-level BPE whose sequences begin with a bos, as Llama 3's."""
    backend = byte_level(["<s>", "</s>", *NAMES], "<s> $A")
    return hub_files(directory, backend=backend, config=FAST | config)


def bytes_without_bos(directory, config):
    """A byte-level BPE as Qwen's: no bos in front, NAMES added and not special."""
    backend = byte_level(["<s>", "</s>"])
    backend.add_tokens([tokenizers.AddedToken(name, normalized=False) for name in NAMES])
    return hub_files(directory, backend=backend, config=FAST | config)


KINDS = {
    "sentencepiece, tokenizer.json": sentencepiece_with_json,
    "sentencepiece, tokenizer.model": sentencepiece_alone,
    "LlamaTokenizer, tokenizer.json": llama_2,
    "bytes": special_bytes,
    "bytes without bos": bytes_without_bos,
}
NAMED = {"bos_token": "<s>", "eos_token": "</s>"}


@pytest.fixture(scope="module", params=itertools.product(KINDS, TEMPLATES), ids=" and ".join)
def own_template(request, tmp_path_factory):
    """Write a tokenizer of each kind with each template; the directory, and transformers' one."""
    kind, name = request.param
    template, eos = TEMPLATES[name]
    config = NAMED | {"eos_token": eos, "chat_template": template}
    directory = KINDS[kind](tmp_path_factory.mktemp("hub") / "tokenizer", config)
    return directory, transformers.AutoTokenizer.from_pretrained(directory)


def theirs_or_none(function, *arguments, **options):
    """Call a function of transformers; None where the template refuses the messages."""
    try:
        return function(*arguments, **options)
    except (jinja2.TemplateError, TypeError):
        return None


def check_ids(ours, theirs):
    """Assert that texts, ids and sequences of DIALOGUES are those of transformers, by the rule."""
    refused = 0
    for name, dialogue in DIALOGUES.items():
        text = theirs_or_none(theirs.apply_chat_template, dialogue, tokenize=False)
        if text is None:
            refused += 1
            with pytest.raises(ValueError, match="does not take these messages"):
                ours.render(dialogue)
            continue
        assert ours.render(dialogue) == text, name
        ids = theirs.apply_chat_template(dialogue, tokenize=True, return_dict=False)
        assert ours.encode(text) == ids, name
        expected = one_bos_one_eos(ids, theirs, ours.bos_id, ours.eos_id)
        other = [*dialogue[:-1], dialogue[-1] | {"content": "other"}]
        comparison = Comparison(dialogue[:-1], [dialogue[-1:], other[-1:]])
        assert data.tokenize(comparison, ours, 10**6)[0] == expected, name
        assert data.tokenize(Comparison([], [dialogue, other]), ours, 10**6)[0] == expected, name
    return refused


def test_ids_are_those_of_transformers(own_template):
    directory, theirs = own_template
    ours = data.load_tokenizer(directory)
    assert ours.has_own_template
    refused = check_ids(ours, theirs)
    assert refused < len(DIALOGUES) / 2


def test_a_generation_prompt_is_that_of_transformers(own_template):
    directory, theirs = own_template
    ours = data.load_tokenizer(directory)
    for dialogue in DIALOGUES.values():
        for prompt in (dialogue, dialogue[:-1], dialogue[:1]):
            text = theirs_or_none(
                theirs.apply_chat_template, prompt, tokenize=False, add_generation_prompt=True
            )
            if text is not None:
                assert ours.render(prompt, add_generation_prompt=True) == text


def test_a_saved_tokenizer_has_the_same_template(own_template, tmp_path):
    """We and AutoTokenizer get its text, ids, special tokens, and the template byte for byte."""
    directory, theirs = own_template
    ours = data.load_tokenizer(directory)
    ours.save(tmp_path)
    again = data.load_tokenizer(tmp_path)
    again_theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert again_theirs.chat_template == theirs.chat_template == again.template.source
    without_pad = dict(again.template.special_tokens)
    assert without_pad.pop("pad_token") == f"<|reward model pad {ours.pad_id}|>"
    assert without_pad == ours.template.special_tokens
    check_ids(again, theirs)
    check_ids(again, again_theirs)


# --------------------------------------------------------------------------------------------------
# One bos, one eos


def sequence_of(tokenizer, text: str) -> list[int]:
    (sequence,) = data.tokenize(Comparison("", [text]), tokenizer, 10**6)
    return sequence


def test_text_that_a_template_has_rendered_gets_no_second_bos_and_no_second_eos(tmp_path):
    config = NAMED | {"eos_token": "<|eot|>", "chat_template": LLAMA_3}
    ours = data.load_tokenizer(special_bytes(tmp_path / "hub", config))
    dialogue = DIALOGUES["one turn"]
    text = ours.render(dialogue)
    assert text.startswith("<s>") and text.endswith("<|eot|>")
    (ids,) = data.tokenize(Comparison(dialogue[:1], [dialogue[1:]]), ours, 10**6)
    assert ids.count(ours.bos_id) == 1 and ids[-2:].count(ours.eos_id) == 1
    head, tail = text[:20], text[20:]
    assert data.tokenize(Comparison(head, [tail]), ours, 10**6) == [ids]
    assert sequence_of(ours, text.removeprefix("<s>")) == ids
    assert sequence_of(ours, text.removesuffix("<|eot|>")) == ids


@pytest.mark.parametrize("kind", ["sentencepiece, tokenizer.json", "bytes", "bytes without bos"])
@pytest.mark.parametrize("end", ["", "\n", " ", "\n\n", " \t\n", "\u3000", "x", "\u200b"])
def test_white_space_behind_an_eos_goes(tmp_path, kind, end):
    """White space without an eos stays, as do other characters that only look like it."""
    ours = data.load_tokenizer(KINDS[kind](tmp_path / "hub", NAMED))
    bos = [] if ours.bos_id is None else [ours.bos_id]
    is_space = end in ("", "\n", " ", "\n\n", " \t\n")
    plain = bos + ours.encode("a cat</s>")
    if is_space:
        assert sequence_of(ours, "a cat</s>" + end) == plain
        assert sequence_of(ours, "<s>a cat</s>" + end)[-3:] == plain[-3:]
    else:
        # The bytes of an ideographic space are tokens of their own, and none is white space.
        assert sequence_of(ours, "a cat</s>" + end) == bos + ours.encode("a cat</s>" + end) + [
            ours.eos_id
        ]
    assert sequence_of(ours, "a cat" + end) == bos + ours.encode("a cat" + end) + [ours.eos_id]
    assert sequence_of(ours, end) == bos + ours.encode(end) + [ours.eos_id]


def test_an_eos_that_is_the_pad_is_neither_added_nor_taken_away(tmp_path):
    directory = special_bytes(tmp_path / "hub", NAMED)
    ours = data.load_tokenizer(directory, pad_id=1)
    assert ours.eos_id == ours.pad_id == 1
    for text in ("a cat", "a cat</s>", "a cat</s>\n"):
        assert sequence_of(ours, text) == [0, *ours.encode(text)]


@pytest.mark.parametrize("kind", KINDS)
def test_white_space_tokens(tmp_path, kind):
    ours = data.load_tokenizer(KINDS[kind](tmp_path / "hub", NAMED))
    ids = ours.encode("the cat\n \tab<s></s><|eot|>a")
    names = {i: ours.backend.id_to_token(i) for i in [*ids, *ours.encode("  a \n")]}
    found = {name for i, name in names.items() if ours.is_space(i)}
    spaces = {"\u2581", "\u2581\u2581", "Ġ", "ĠĠ"}
    lines = {"Ċ", "<0x0A>", "\n"}
    assert found <= spaces | lines | {"ĉ", "<0x09>", "\t"}
    assert found & spaces and found & lines


def test_white_space_tokens_of_a_tokenizer_of_ours():
    ours = data.train_tokenizer(TEXTS, 400)
    assert [ours.is_space(i) for i in range(4)] == [False] * 4  # special
    (newline,), (space,) = ours.encode("\n"), ours.encode(" ")
    assert ours.is_space(newline) and ours.is_space(space)
    assert not any(map(ours.is_space, ours.encode("the cat")))


# --------------------------------------------------------------------------------------------------
# Truncation, and the prompt that responses share


def truncated(whole: list[list[int]], shared: int, ours, length: int) -> list[list[int]]:
    """Cut sequences, one step at a time: a shared token in front, else the last before eos."""
    bos = 0 if ours.bos_id is None else 1
    whole = [list(ids) for ids in whole]
    while max(map(len, whole)) > length and shared > 0:
        for ids in whole:
            del ids[bos]
        shared -= 1
    return [ids if len(ids) <= length else ids[: length - 1] + ids[-1:] for ids in whole]


def shared_length(sequences: list[list[int]]) -> int:
    count = 0
    for ids in zip(*sequences):
        if len(set(ids)) > 1:
            break
        count += 1
    return count


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["ChatML", "Mistral", "Llama 3"])
def test_truncation_takes_only_what_responses_share(tmp_path, kind, name):
    """A pair shares what is equal; a single response what its prompt has, up to its beginning."""
    template, eos = TEMPLATES[name]
    config = NAMED | {"eos_token": eos, "chat_template": template}
    ours = data.load_tokenizer(KINDS[kind](tmp_path / "hub", config))
    bos = 0 if ours.bos_id is None else 1
    prompt = messages("u:a long one, the cat sat on the mat", "a:b", "u:and a dog?")
    responses = [messages("a:the log, the log"), messages("a:a")]
    for count in (1, 2):
        comparison = Comparison(prompt, responses[:count])
        whole = data.tokenize(comparison, ours, 10**6)
        start = ours.encode(ours.render(prompt, add_generation_prompt=True))
        if bos and start[0] == ours.bos_id:
            del start[0]
        texts = [ids[bos:-1] for ids in whole]
        shared = shared_length(texts if count == 2 else [*texts, start])
        assert 10 < shared <= min(map(len, texts))
        for length in range(2, max(map(len, whole)) + 2):
            expected = truncated(whole, shared, ours, length)
            assert data.tokenize(comparison, ours, length) == expected, length
            right = [ids[:length] for ids in whole]
            assert data.tokenize(comparison, ours, length, "right") == right


def test_a_dialogue_without_a_prompt_is_truncated_as_a_pair_or_alone(tmp_path):
    config = NAMED | {"eos_token": "</s>", "chat_template": MISTRAL}
    ours = data.load_tokenizer(special_bytes(tmp_path / "hub", config))
    whole = [messages("u:the cat sat", "a:a"), messages("u:the cat sat", "a:b")]
    pair = data.tokenize(Comparison([], whole), ours, 10**6)
    shared = shared_length(pair) - 1
    assert data.tokenize(Comparison([], whole), ours, 6) == truncated(pair, shared, ours, 6)
    alone = data.tokenize(Comparison([], whole[:1]), ours, 6)
    assert alone == [pair[0][:5] + pair[0][-1:]]  # it shares nothing


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", TEMPLATES)
def test_the_trunk_of_a_packed_pair_has_the_whole_rendered_prompt(tmp_path, kind, name):
    template, eos = TEMPLATES[name]
    config = NAMED | {"eos_token": eos, "chat_template": template}
    ours = data.load_tokenizer(KINDS[kind](tmp_path / "hub", config))
    prompt = messages("u:the cat sat on the mat.", "a:It did.", "u:And the dog?")
    pair = Comparison(prompt, [messages("a:log"), messages("a:mat")])
    batch = data.pack([data.tokenize(pair, ours, 512)], ours.pad_id)
    start = ours.encode(ours.render(prompt, add_generation_prompt=True))
    # The last token of the prompt may differ where the answer joins it.
    assert batch.trunks[0] >= len(start) - 1
    if name in ("ChatML", "Llama 3", "no system role"):
        assert batch.trunks[0] >= len(start)


# --------------------------------------------------------------------------------------------------
# The environment of templates

CHAT = messages("s:<b> & 'é' \"q\"", "u:two\nlines", "a:{{ 7 * 7 }} {% raw %}")
SNIPPETS = [
    "a\n{% if true %}\n  b\n{% endif %}\nc\n\n",
    "  {% set x = 1 %}  \n   {{ x }}\n\t{# a comment #}\nend",
    "{% for m in messages %}{% if loop.index == 2 %}{% break %}{% endif %}{{ m.role }}{% endfor %}",
    "{% for m in messages %}{% if loop.first %}{% continue %}{% endif %}{{ m.role }}{% endfor %}",
    "{{ messages | tojson }}",
    "{{ messages[0].content | tojson(ensure_ascii=True) }}{{ '<>&' | tojson }}",
    "{{ {'b': 1, 'a': [1, 2]} | tojson(indent=2, sort_keys=True) }}",
    "{{ {'b': 1, 'a': none} | tojson(separators=(',', ':')) }}",
    "{{ dict(a=1) }}{{ dict([('b', 2)], c=3) }}{{ dict.fromkeys('ab', 0) }}",
    "{% set ns = namespace(found=false, self=1) %}{% for m in messages %}"
    "{% set ns.found = m.role == 'user' or ns.found %}{% endfor %}{{ ns.found }}{{ ns.self }}",
    "{% set ns = namespace({'x': 1}, y=2) %}{{ ns.x + ns.y }}",
    "{% generation %}{% set x = 5 %}{{ x }}{% endgeneration %}{{ x }}{{ x is defined }}",
    "{%- generation -%} a {%- endgeneration -%} b",
    "{{ strftime_now('%Y-%m-%d') }}{{ strftime_now(format='%b') }}",
    "{{ tools is none }}{{ documents is none }}{{ tools is defined }}{{ add_generation_prompt }}",
    "{{ bos_token }}|{{ eos_token }}|{{ unk_token is defined }}|{{ undefined }}|{{ image_token }}",
    "{{ messages[0].missing }}{{ messages[0]['content'] is string }}{{ messages | length }}",
    "{{ messages[-1].content }}{{ 'x' * 3 }}{{ [1, 2] | sum }}{{ 'A' | lower | upper }}",
    "{% macro f(m) %}{{ m.role }}:{% endmacro %}{% for m in messages %}{{ f(m) }}{% endfor %}",
    "{{ messages | selectattr('role', 'equalto', 'user') | map(attribute='content') | list }}",
    "{{ messages[0].content.split(' ')[0].strip() }}{{ 'a,b'.replace(',', ';') }}",
    "{% set a, b = messages[0], messages[1:] %}{{ b | length }}{{ a.role.title() }}",
    "\ufeff{{ '\\u00e9\\n' }}\r\n{{ 1 }}\r\n",
    "{{ raise_exception('no') }}",
    "{{ missing.x }}",
    "{{ messages[9].role }}",
    "{{ messages[0].content + 1 }}",
    "{{ 1 / 0 }}",
    "{{ dict.get({'a': 1}, 'a') }}",
]
# Each tries to reach or change what is no business of a template.
ESCAPES = [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ messages.__class__.__name__ }}",
    "{{ messages.append(1) }}",
    "{{ messages[0].update(role='x') }}",
    "{{ messages[0].pop('role') }}",
    "{{ strftime_now.__globals__['datetime'] }}",
    "{{ dict.__class__ }}{{ dict.mro() }}",
    "{{ namespace.__init__.__globals__ }}",
    "{{ self.__init__.__globals__ }}",
    "{{ '{0.__class__.__name__}'.format(messages) }}",
    "{{ ('{0.__cl' ~ 'ass__.__mro__}').format(messages) }}",
    "{{ ''|attr('__class__') }}{{ (''|attr('__class__')).mro() }}",
    "{% set ns = namespace(__class__=1) %}{{ ns }}",
    "{% set ns = namespace() %}{% set ns._x = 1 %}{{ ns }}",
    "{% for i in range(10**9) %}a{% endfor %}",
    "{% include '/etc/passwd' %}",
    "{{ cycler.__init__.__globals__.os.popen('true').read() }}",
    "{{ lipsum.__globals__.os }}",
]
# What is not there for a template is empty text for it.
HIDDEN = [
    "{{ messages.__class__ }}",
    "{{ raise_exception.__globals__ }}",
    "{{ '{0.__class__}'.format(messages) }}",
    "{{ lipsum.__globals__ }}",
]


@pytest.mark.parametrize("source", SNIPPETS + HIDDEN)
def test_the_environment_is_that_of_transformers(source):
    tokens = {"bos_token": "<s>", "eos_token": "</s>", "image_token": "<i>"}
    expected = theirs_or_none_of_any(source, tokens)
    ours = ChatTemplate(source, "the template", tokens)
    if expected is None:
        with pytest.raises(ValueError, match="^the template does not take these messages: ."):
            ours.render(CHAT)
    else:
        assert ours.render(CHAT) == expected


def theirs_or_none_of_any(source: str, tokens: dict) -> str | None:
    try:
        return render_jinja_template([CHAT], chat_template=source, **tokens)[0][0]
    except Exception:
        return None


@pytest.mark.parametrize("source", ESCAPES)
def test_a_template_that_tries_to_leave_the_sandbox_is_refused(source, tmp_path):
    """The row is named; the data and Python's objects are as they were."""
    before = json.dumps(CHAT)
    assert theirs_or_none_of_any(source, {}) is None
    config = NAMED | {"chat_template": source}
    ours = data.load_tokenizer(special_bytes(tmp_path / "hub", config))
    with pytest.raises(ValueError, match="hub/tokenizer_config.json does not take these messages"):
        ours.render(CHAT)
    assert json.dumps(CHAT) == before
    file = tmp_path / "rows.jsonl"
    row = {"prompt": CHAT[:2], "chosen": CHAT[2:], "rejected": messages("a:no")}
    file.write_text(json.dumps({"prompt": "", "chosen": "a", "rejected": "b"}) + "\n")
    with open(file, "a") as out:
        out.write(json.dumps(row) + "\n")
    with pytest.raises(ValueError, match=f"^{file}:2: the chat template of "):
        data.tokenize_file(file, ours, 64, "left", tmp_path / "cache")
    assert json.dumps(CHAT) == before


@pytest.mark.parametrize("has_bos", [False, True])
@pytest.mark.parametrize("has_eos", [False, True])
def test_the_plain_template_is_the_same_in_jinja(has_bos, has_eos):
    source = plain_template(has_bos, has_eos)
    tokens = {"bos_token": "<b>", "eos_token": "<e>"}
    plain = ChatTemplate(source)
    jinja = ChatTemplate(source + "{# #}", "the template", tokens)
    assert plain.is_plain and not jinja.is_plain
    ends = "<b>" if has_bos else "", "<e>" if has_eos else ""
    for dialogue in DIALOGUES.values():
        for ask in (False, True):
            text = chat_text(dialogue, ask, *ends)
            assert jinja.render(dialogue, ask) == text
            assert plain.render(dialogue, ask) == chat_text(dialogue, ask)
            assert text.startswith(ends[0]) and text.endswith("\n\nAssistant:" if ask else ends[1])


# --------------------------------------------------------------------------------------------------
# Where templates are


FILES = {  # name: (chat_template in tokenizer_config.json, template files)
    "config": ("C", {}),
    "file": (None, {"chat_template.jinja": "F"}),
    "file before config": ("C", {"chat_template.jinja": "F"}),
    "a list of named ones": (
        [{"name": "tool_use", "template": "T"}, {"name": "default", "template": "D"}],
        {},
    ),
    "named files": (
        None,
        {"chat_template.jinja": "F", "additional_chat_templates/tool_use.jinja": "T"},
    ),
    "default among the named files": (
        "C",
        {"chat_template.jinja": "F", "additional_chat_templates/default.jinja": "D"},
    ),
    "file with CR LF and white space": (None, {"chat_template.jinja": "\n F\r\nG \n\n"}),
    "unicode": ("é\u2028<|ß|>", {}),
    "no template": (None, {}),
    "files beside it that nobody reads": (None, {"chat_template.json": '{"chat_template": "J"}'}),
}


def tokenizer_with(directory, own, files: dict[str, str]):
    special_bytes(directory, NAMED | ({} if own is None else {"chat_template": own}))
    for name, content in files.items():
        (directory / name).parent.mkdir(exist_ok=True)
        (directory / name).write_bytes(content.encode())
    return directory


@pytest.mark.parametrize("own, files", FILES.values(), ids=FILES.keys())
def test_templates_are_found_where_transformers_finds_them(tmp_path, own, files):
    directory = tokenizer_with(tmp_path / "hub", own, files)
    ours = data.load_tokenizer(directory)
    theirs = transformers.AutoTokenizer.from_pretrained(directory)
    if theirs.chat_template is None:
        assert not ours.has_own_template
        assert ours.render(CHAT) == chat_text(CHAT)
    else:
        assert ours.has_own_template
        assert ours.template.source == theirs.get_chat_template()
        text = theirs.apply_chat_template(CHAT, tokenize=False)
        assert ours.render(CHAT) == text
    (tmp_path / "saved").mkdir()
    ours.save(tmp_path / "saved")
    assert data.load_tokenizer(tmp_path / "saved").template.source == ours.template.source
    again = transformers.AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert again.chat_template == ours.template.source


@pytest.mark.parametrize(
    "own, files",
    [
        ([{"name": "tool_use", "template": "T"}, {"name": "rag", "template": "R"}], {}),
        ("C", {"additional_chat_templates/rag.jinja": "R"}),  # the file hides the other
    ],
    ids=["config", "files"],
)
def test_several_templates_none_of_which_is_the_default(tmp_path, own, files):
    directory = tokenizer_with(tmp_path / "hub", own, files)
    theirs = transformers.AutoTokenizer.from_pretrained(directory)
    with pytest.raises(ValueError):
        theirs.apply_chat_template(CHAT, tokenize=False)
    with pytest.raises(
        ValueError, match="the chat templates are rag.*none is default; --chat_temp"
    ):
        data.load_tokenizer(directory)
    assert data.load_tokenizer(directory, chat_template="plain").render(CHAT) == chat_text(CHAT)


@pytest.mark.parametrize(
    "own",
    [
        5,
        [],
        {},
        ["a"],
        [{"name": "default"}],
        [{"template": "T"}],
        [{"name": "default", "template": "T"}, "a"],
        [{"name": ["default"], "template": "T"}],
        {"default": 1},
    ],
    ids=str,
)
def test_a_wrong_template_in_the_config_is_named(tmp_path, own):
    directory = tokenizer_with(tmp_path / "hub", own, {})
    with pytest.raises(
        ValueError, match="tokenizer_config.json: chat_template: found .*; expected"
    ):
        data.load_tokenizer(directory)


def test_a_template_file_in_another_encoding_is_named(tmp_path):
    directory = tokenizer_with(tmp_path / "hub", None, {})
    (directory / "chat_template.jinja").write_bytes("é".encode("latin-1"))
    with pytest.raises(
        ValueError, match=f"^{directory}/chat_template.jinja: cannot be read as UTF"
    ):
        data.load_tokenizer(directory)


@pytest.mark.parametrize(
    "choice, content, found",
    [
        ("none.jinja", None, "no such file; expected auto, plain or a file"),
        ("folder", "folder", "is a directory; expected auto, plain or a file"),
        ("bad.jinja", "a\n{% if %}", "not a jinja template (line 2: "),
        ("bad.jinja", "{% unknown %}", "not a jinja template (line 1: "),
        ("bad.jinja", "{{ a | unknown }}", "not a jinja template (line 1: "),
        ("bad.jinja", "{% for %}" * 3, "not a jinja template (line 1: "),
        ("empty.jinja", " \n", "is empty"),
        ("latin.jinja", "é".encode("latin-1"), "cannot be read as UTF-8"),
    ],
)
def test_a_wrong_value_of_the_flag_is_named(tmp_path, choice, content, found):
    path = tmp_path / choice
    if content == "folder":
        path.mkdir()
    elif content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=f"^{re.escape(f'--chat_template {path}: {found}')}"):
        given_template(str(path))
    special_bytes(tmp_path / "hub", NAMED)
    with pytest.raises(ValueError, match=f"^--chat_template {path}: "):
        data.load_tokenizer(tmp_path / "hub", chat_template=str(path))


def test_the_flag_takes_the_place_of_the_own_template(tmp_path):
    directory = tokenizer_with(tmp_path / "hub", "C", {})
    (tmp_path / "my.jinja").write_text("{{ messages | length }}{{ eos_token }}")
    auto = data.load_tokenizer(directory)
    plain = data.load_tokenizer(directory, chat_template="plain")
    given = data.load_tokenizer(directory, chat_template=str(tmp_path / "my.jinja"))
    assert (auto.render(CHAT), plain.render(CHAT)) == ("C", chat_text(CHAT))
    assert given.render(CHAT) == "3</s>"
    assert [t.has_own_template for t in (auto, plain, given)] == [True, False, True]
    assert len({t.fingerprint() for t in (auto, plain, given)}) == 3
    for number, tokenizer in enumerate((plain, given)):
        saved = tmp_path / f"saved {number}"
        saved.mkdir()
        tokenizer.save(saved)
        again = data.load_tokenizer(saved)
        assert again.render(CHAT) == tokenizer.render(CHAT)
        assert again.has_own_template == tokenizer.has_own_template
        theirs = transformers.AutoTokenizer.from_pretrained(saved)
        ends = {} if tokenizer.has_own_template else {"bos": "<s>", "eos": "</s>"}
        rendered = chat_text(CHAT, **ends) if ends else tokenizer.render(CHAT)
        assert theirs.apply_chat_template(CHAT, tokenize=False) == rendered


@pytest.mark.parametrize("name", ["chat_template.jinja", "additional_chat_templates/a.jinja"])
def test_a_template_is_not_saved_beside_a_file_that_would_hide_it(tmp_path, name):
    for number, tokenizer in enumerate(
        (
            data.load_tokenizer(special_bytes(tmp_path / "hub", NAMED)),
            data.train_tokenizer(TEXTS, 400),
        )
    ):
        file = tmp_path / f"saved {number}" / name
        file.parent.mkdir(parents=True)
        file.write_text("x")
        with pytest.raises(
            ValueError, match=f"^{file}: another chat template, which could be read"
        ):
            tokenizer.save(tmp_path / f"saved {number}")


# --------------------------------------------------------------------------------------------------
# Special tokens that a template writes


@pytest.mark.parametrize("kind", KINDS)
def test_special_tokens_stay_the_same_for_a_template(tmp_path, kind):
    """Also a bos that no sequence begins with, and tokens that are neither bos nor eos."""
    names = "bos_token eos_token unk_token sep_token cls_token mask_token image_token".split()
    source = "|".join("{{ %s }}" % name for name in names)
    config = {
        "eos_token": "<|im_end|>",
        "bos_token": "<s>",
        "sep_token": "<|eot|>",
        "image_token": "[INST]",
        "add_bos_token": False,
        "chat_template": source,
    }
    directory = KINDS[kind](tmp_path / "hub", config)
    theirs = transformers.AutoTokenizer.from_pretrained(directory)
    expected = theirs.apply_chat_template(CHAT, tokenize=False)
    assert expected.startswith("<s>|<|im_end|>|") and expected.endswith("|[INST]")
    ours = data.load_tokenizer(directory)
    assert ours.bos_id is None
    (tmp_path / "saved").mkdir()
    ours.save(tmp_path / "saved")
    again = data.load_tokenizer(tmp_path / "saved")
    assert again.bos_id is None and again.eos_id == ours.eos_id
    again_theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert ours.render(CHAT) == again.render(CHAT) == expected
    assert again_theirs.apply_chat_template(CHAT, tokenize=False) == expected


def test_a_template_that_reads_a_pad_token_which_changes(tmp_path):
    """A pad that is eos is replaced; with --pad_id it stays, as its own pad would."""
    source = "{% if pad_token is defined %}{{ pad_token }}{% endif %}a"
    config = NAMED | {"pad_token": "</s>", "chat_template": source}
    directory = special_bytes(tmp_path / "hub", config)
    words = "reads pad_token, which is going to be a new token: .* give --pad_id, .*--chat_template"
    with pytest.raises(SetupError, match=words):
        data.load_tokenizer(directory).render(CHAT)
    kept = data.load_tokenizer(directory, pad_id=1)
    assert kept.render(CHAT) == "</s>a"
    (tmp_path / "saved").mkdir()
    kept.save(tmp_path / "saved")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert theirs.apply_chat_template(CHAT, tokenize=False) == "</s>a"
    own = special_bytes(tmp_path / "own", config | {"pad_token": "<|user|>"})
    assert data.load_tokenizer(own).render(CHAT) == "<|user|>a"


def test_the_fingerprint_has_the_template_and_its_special_tokens(tmp_path):
    variants = [
        NAMED,
        NAMED | {"chat_template": "a"},
        NAMED | {"chat_template": "b"},
        NAMED | {"chat_template": "b", "sep_token": "<|eot|>"},
    ]
    prints = []
    for number, config in enumerate(variants):
        directory = special_bytes(tmp_path / str(number), config)
        prints.append(data.load_tokenizer(directory).fingerprint())
    assert len(set(prints)) == len(variants)
    proto = data.train_tokenizer(TEXTS, 400).model_proto
    ours = [data.Tokenizer(proto), data.Tokenizer(proto, template=ChatTemplate("a", "a"))]
    assert ours[0].fingerprint() != ours[1].fingerprint()


# --------------------------------------------------------------------------------------------------
# A tokenizer of ours


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_trained_tokenizer_with_a_template_of_a_file(tmp_path, name):
    """The special tokens that it writes are one bos and one eos, for us and for transformers."""
    source, _ = TEMPLATES[name]
    (tmp_path / "my.jinja").write_text(source)
    template = given_template(str(tmp_path / "my.jinja"))
    ours = data.Tokenizer(data.train_tokenizer(TEXTS, 400).model_proto, template=template)
    ours.save(tmp_path)
    again = data.load_tokenizer(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for tokenizer in (ours, again):
        check_ids(tokenizer, theirs)
    text = ours.render(DIALOGUES["one turn"])
    assert ours.encode(text) == data.Tokenizer(ours.model_proto).encode(text)


# --------------------------------------------------------------------------------------------------
# Rows


@pytest.fixture
def rows(tmp_path):
    """Write a file: a dialogue, text, and a dialogue in a wrong order of roles, in lines 1 to 3."""
    right, wrong = DIALOGUES["one turn"], DIALOGUES["two users"]
    lines = [
        {"prompt": right[:1], "chosen": right[1:], "rejected": messages("a:no")},
        {"prompt": "the", "chosen": " cat", "rejected": " dog"},
        {"prompt": wrong[:2], "chosen": wrong[2:], "rejected": messages("a:no")},
    ]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


def test_a_row_that_the_template_refuses_is_named_or_skipped(tmp_path, rows):
    config = NAMED | {"chat_template": MISTRAL}
    ours = data.load_tokenizer(special_bytes(tmp_path / "hub", config))
    words = "tokenizer_config.json does not take these messages: user and assistant take turns"
    with pytest.raises(ValueError, match=f"^{rows}:3: the chat template of .*{words}$"):
        data.tokenize_file(rows, ours, 64, "left", tmp_path / "cache")
    file = data.tokenize_file(rows, ours, 64, "left", tmp_path / "cache", skip_bad_rows=True)
    assert len(file) == 2 and len(file.bad_rows) == 1
    assert file.bad_rows[0].startswith(f"{rows}:3: the chat template")
    expected = [data.tokenize(row, ours, 64) for row in itertools.islice(comparisons(rows), 2)]
    assert [file[0].sequences, file[1].sequences] == expected


def comparisons(file):
    return data.load_comparisons(file)


def test_what_a_template_says_is_shown_safely_and_not_at_length(tmp_path):
    template = ChatTemplate("{{ raise_exception(messages[0].content) }}", "the template")
    with pytest.raises(ValueError) as error:
        template.render(messages("u:\x1b[31m\u202e" + "x" * 1000))
    assert "\x1b" not in str(error.value) and "\u202e" not in str(error.value)
    assert len(str(error.value)) < 400
    with pytest.raises(ValueError, match="^the template does not take these messages: a b c$"):
        template.render(messages("u:a\nb\r\n\tc"))


def test_half_of_a_surrogate_pair_is_no_text():
    with pytest.raises(ValueError, match="the rendered text: character 0 is half of a surrogate"):
        ChatTemplate(r"{{ '\ud800' }}", "the template").render(CHAT)


def test_text_rows_of_a_tokenizer_with_a_template_get_a_note(tmp_path, rows, monkeypatch):
    words = "text, not put into the tokenizer's chat template (--text_as messages does that)"
    config = NAMED | {"chat_template": CHATML}
    ours = data.load_tokenizer(special_bytes(tmp_path / "hub", config))
    plain = data.load_tokenizer(tmp_path / "hub", chat_template="plain")
    dialogue, text, _ = comparisons(rows)
    assert parts.chat.notes_on(text.prompt, ours) == (words,)
    assert parts.chat.notes_on(dialogue.prompt, ours) == ()
    assert parts.chat.notes_on(text.prompt, plain) == ()
    read, parse = [], data.parse_comparison

    def watched(*arguments):
        read.append(parse(*arguments))
        return read[-1]

    monkeypatch.setattr(data, "parse_comparison", watched)
    data.tokenize_file(rows, ours, 64, "left", tmp_path / "cache")
    assert [comparison.notes for comparison in read] == [(), (words,), ()]


@pytest.mark.parametrize("version", [None, "3.1.5", "2.11.3"])
def test_without_jinja2_text_is_read_and_messages_are_an_error_of_no_row(
    tmp_path, rows, monkeypatch, version
):
    """An older version has ways out of the sandbox. A skipped row would hide the error."""
    config = NAMED | {"chat_template": CHATML}
    ours = data.load_tokenizer(special_bytes(tmp_path / "hub", config))
    parts.chat.compile_template.cache_clear()
    stub = version and SimpleNamespace(__version__=version)
    monkeypatch.setattr(parts.chat, "jinja2", stub)
    text = tmp_path / "text.jsonl"
    text.write_text(rows.read_text().splitlines()[1] + "\n")
    assert len(data.tokenize_file(text, ours, 64, "left", tmp_path / "cache")) == 1
    for skip in (False, True):
        with pytest.raises(SetupError, match="needs jinja2 .*`pip install -r requirements-hf.txt`"):
            data.tokenize_file(rows, ours, 64, "left", tmp_path / "cache", skip_bad_rows=skip)
    plain = data.load_tokenizer(tmp_path / "hub", chat_template="plain")
    assert len(data.tokenize_file(rows, plain, 64, "left", tmp_path / "cache")) == 3
    (tmp_path / "my.jinja").write_text("a")
    with pytest.raises(ValueError, match=f"^--chat_template {tmp_path}/my.jinja: .*pip install"):
        given_template(str(tmp_path / "my.jinja"))


def test_a_damaged_template_is_an_error_of_no_row(tmp_path, rows):
    """Text rows do not need it."""
    ours = data.load_tokenizer(special_bytes(tmp_path / "hub", NAMED | {"chat_template": "{% x"}))
    for skip in (False, True):
        with pytest.raises(SetupError, match="^the chat template of .*: not a jinja template"):
            data.tokenize_file(rows, ours, 64, "left", tmp_path / "cache", skip_bad_rows=skip)
    assert len(sequence_of(ours, "the cat")) > 2
