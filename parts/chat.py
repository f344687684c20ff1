"""Chat templates: a dialogue as text, by the plain template or by jinja as transformers has it.

It loads and saves no tokenizer (parts/tokenizers.py), and makes no sequence (data.py). jinja2 is
needed only to render messages.
"""

import functools
import itertools
import json
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

from parts.guards import LONGEST_NAME, listed, one_line
from parts.inputs import is_file
from parts.rows import SetupError, check_text, json_type

try:
    import jinja2
    import jinja2.ext
    import jinja2.meta
    import jinja2.sandbox
except ImportError:  # it is optional, see requirements-hf.txt
    jinja2 = None

TEMPLATE_FILE = "chat_template.jinja"
TEMPLATE_DIRECTORY = "additional_chat_templates"  # with NAME.jinja, one for each further template

# --------------------------------------------------------------------------------------------------
# The plain template, that of Anthropic's hh-rlhf dialogues


def chat_text(
    messages: list[dict], add_generation_prompt: bool = False, bos: str = "", eos: str = ""
) -> str:
    """Render chat messages, each {"role", "content"}, as text, by the plain template.

    A system message's content stands as it is; a turn is "\\n\\nHuman: " or "\\n\\nAssistant: "
    and its content. bos stands in front and eos at the end, as Llama 3's template writes its own.
    add_generation_prompt: in place of eos the text ends with "\\n\\nAssistant:".
    """
    starts = {"system": "", "user": "\n\nHuman: ", "assistant": "\n\nAssistant: "}
    text = bos + "".join(starts[message["role"]] + message["content"] for message in messages)
    return text + ("\n\nAssistant:" if add_generation_prompt else eos)


def plain_template(has_bos: bool, has_eos: bool) -> str:
    """Write `chat_text` in jinja, for transformers, with the special tokens of a tokenizer.

    has_bos, has_eos: whether its sequences begin and end with these. A test compares the template
    with `chat_text`.
    """
    bos = "{{ bos_token }}" if has_bos else ""
    eos = "{% else %}{{ eos_token }}" if has_eos else ""
    return (
        bos + "{% for message in messages %}"
        "{{ {'system': '', 'user': '\\n\\nHuman: ', 'assistant': '\\n\\nAssistant: '}"
        "[message['role']] + message['content'] }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '\\n\\nAssistant:' }}" + eos + "{% endif %}"
    )


PLAIN_TEMPLATES = {plain_template(*ends) for ends in itertools.product((False, True), repeat=2)}

# --------------------------------------------------------------------------------------------------
# Any template


TRAINED_TOKENS = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}


@dataclass(frozen=True)
class ChatTemplate:
    """A chat template, and the special tokens that it may write.

    source: its text, in jinja. origin: how messages name it.
    special_tokens: texts by name, such as "bos_token"; variables of the template. By default those
        of `parts.tokenizers.train_tokenizer`.
    replaced: names of special tokens which transformers is going to know by another text after the
        tokenizer is saved, so that a template which reads them would not stay the same.
    """

    source: str = plain_template(False, False)
    origin: str = "the plain chat template"
    special_tokens: dict[str, str] = field(default_factory=TRAINED_TOKENS.copy)
    replaced: tuple[str, ...] = ()

    @property
    def is_plain(self) -> bool:
        return self.source in PLAIN_TEMPLATES

    def render(self, messages: list[dict], add_generation_prompt: bool = False) -> str:
        """Render chat messages, each {"role", "content"}, as one text.

        add_generation_prompt: end with what stands in front of an answer, where the template has
            such a text.
        The plain template's own bos and eos, which `source` writes for transformers, are left out.
        Raises ValueError where the template refuses the messages, and SetupError where it could
        render none: jinja2 is missing, or the template is damaged.
        """
        if self.is_plain:
            # data.py puts bos and eos around every text.
            return chat_text(messages, add_generation_prompt)
        template, variables = self.compiled()
        for name in self.replaced:
            if name in variables:
                raise SetupError(
                    f"{self.origin} reads {name}, which is going to be a new token: the "
                    "tokenizer's own is missing, or is eos or bos; give --pad_id, which keeps it, "
                    "or another --chat_template"
                )
        try:
            text = template.render(
                self.special_tokens,
                messages=messages,
                tools=None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
            )
            check_text("the rendered text", text)
        except Exception as error:  # a template may do anything
            found = words_of(error)
            raise ValueError(f"{self.origin} does not take these messages: {found}") from None
        return text

    def compiled(self) -> tuple:
        """Return the compiled template, and the names of the variables that it reads.

        Raises SetupError where jinja2 is missing or too old, and where the source is no template.
        """
        # Older versions have known ways out of the sandbox; transformers refuses them, too.
        if jinja2 is None or version_of(jinja2) < (3, 1, 6):
            raise SetupError(
                f"{self.origin}: rendering messages needs jinja2 3.1.6 or later; "
                "`pip install -r requirements-hf.txt`, or give --chat_template plain"
            )
        try:
            return compile_template(self.source)
        except (jinja2.TemplateError, RecursionError) as error:
            line = getattr(error, "lineno", 1)
            found = f"line {line}: {words_of(error)}"
            raise SetupError(f"{self.origin}: not a jinja template ({found})") from None


def words_of(error: Exception) -> str:
    """Return the message of an error in one line that may be shown, at most 300 characters."""
    message = getattr(error, "message", None) or str(error) or type(error).__name__
    return one_line(" ".join(message.split()), 300)


def version_of(module) -> tuple[int, ...]:
    return tuple(int(part) for part in module.__version__.split(".")[:3] if part.isdigit())


@functools.lru_cache
def compile_template(source: str) -> tuple:
    """Compile a template; return it, and the names of the variables that it reads."""
    environment = sandbox()
    variables = jinja2.meta.find_undeclared_variables(environment.parse(source))
    return environment.from_string(source), variables


def sandbox() -> "jinja2.Environment":
    """Make the environment of templates: that of transformers 5 (utils/chat_template_utils.py).

    A template comes with a model, from anywhere: it can read the values that it is given, change
    none, and reach nothing else of Python.
    """

    class Generation(jinja2.ext.Extension):
        """The tag {% generation %}, which marks what the model wrote, and changes no text."""

        tags = {"generation"}

        def parse(self, parser):
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            # A block of its own: variables that are set inside do not leave it.
            call = jinja2.nodes.CallBlock(self.call_method("text_of"), [], [], body)
            return call.set_lineno(line)

        def text_of(self, caller) -> str:
            return caller()

    class Namespace(jinja2.utils.Namespace):
        """Jinja's namespace without names that begin with an underscore."""

        def __init__(self, /, *args, **kwargs):
            super().__init__()
            for name, value in dict(*args, **kwargs).items():
                self[name] = value

        def __setitem__(self, name, value):
            if str(name).startswith("_"):
                raise jinja2.exceptions.SecurityError(f"namespace: found the name {name}")
            super().__setitem__(name, value)

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = to_json
    environment.globals |= {
        "raise_exception": raise_exception,
        "strftime_now": strftime_now,
        "dict": Dictionary(),
        "namespace": Namespace,
    }
    return environment


def to_json(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
    """Write JSON. Jinja's own filter escapes signs of HTML."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def raise_exception(message):
    raise jinja2.TemplateError(message)


def strftime_now(format: str) -> str:
    """Write today's date, as Llama 3.1's template does."""
    return datetime.now().strftime(format)


class Dictionary:
    """The function `dict` of templates. The type itself would be a way to others."""

    def __call__(self, *args, **kwargs) -> dict:
        return dict(*args, **kwargs)

    def fromkeys(self, *args) -> dict:
        return dict.fromkeys(*args)


# --------------------------------------------------------------------------------------------------
# Token ids, where a template shows in them


def without_ends(ids: list[int], tokenizer) -> list[int]:
    """Take the bos off the start of an encoded text that has it, and the eos off its end.

    Tokens of white space behind the eos go with it: templates put a newline there. The end stays as
    it is where the eos is also the pad, since no eos is put behind a text then.
    """
    start, end = 0, len(ids)
    if tokenizer.bos_id is not None and ids[:1] == [tokenizer.bos_id]:
        start = 1
    if tokenizer.eos_id in (None, tokenizer.pad_id):
        return ids[start:]
    while end > start and tokenizer.is_space(ids[end - 1]):
        end -= 1
    if end > start and ids[end - 1] == tokenizer.eos_id:
        return ids[start : end - 1]
    return ids[start:]


def encode_prompt(prompt: str | list[dict], tokenizer) -> list[int]:
    """Encode a prompt, text or chat messages, up to where its answers begin, without bos."""
    if not isinstance(prompt, str):
        prompt = tokenizer.render(prompt, add_generation_prompt=True) if prompt else ""
    ids = tokenizer.encode(prompt)
    if tokenizer.bos_id is not None and ids[:1] == [tokenizer.bos_id]:
        return ids[1:]
    return ids


NOT_TEMPLATED = "text, not put into the tokenizer's chat template (--text_as messages does that)"


def notes_on(prompt: str | list[dict], tokenizer) -> tuple[str, ...]:
    """List what a reader of a data file should know of a row with this prompt."""
    if isinstance(prompt, str) and tokenizer.has_own_template:
        return (NOT_TEMPLATED,)
    return ()


# --------------------------------------------------------------------------------------------------
# Where templates are found


def find_template(choice: str, directory: Path, own) -> ChatTemplate:
    """Return the template that --chat_template asks for.

    choice: "auto" is the tokenizer's own template, or the plain one where it has none; "plain"; or
        a file. directory: the tokenizer's. own: `chat_template` of its tokenizer_config.json.
    Raises ValueError that names the flag or the file.
    """
    if choice == "auto":
        return own_template(directory, own) or ChatTemplate()
    return given_template(choice)


def given_template(choice: str) -> ChatTemplate:
    """Return the template that a value of --chat_template names, the plain one for "auto".

    Raises ValueError that names the flag, where the file is missing or no jinja template, and where
    jinja2 is missing, which has to read it.
    """
    if choice in ("auto", "plain"):
        return ChatTemplate()
    path, origin = Path(choice), f"--chat_template {choice}"
    if not path.is_file():
        found = "no such file"
        if path.exists():
            found = "is a directory" if path.is_dir() else "is no regular file"
        raise ValueError(f"{origin}: {found}; expected auto, plain or a file with a jinja template")
    template = ChatTemplate(read_source(path, origin), origin)
    if not template.source.strip():
        raise ValueError(f"{origin}: is empty; expected a jinja template")
    if not template.is_plain:
        template.compiled()
    return template


def own_template(directory: Path, own) -> ChatTemplate | None:
    """Return a tokenizer's own template; of several ones, "default".

    Templates in files of their own hide those in tokenizer_config.json, as in transformers.
    Raises ValueError that names the file, or the names where none is "default".
    """
    templates, place = {}, directory
    file = directory / TEMPLATE_FILE
    if is_file(file):
        templates["default"] = read_source(file, str(file))
    for file in filter(is_file, sorted((directory / TEMPLATE_DIRECTORY).glob("*.jinja"))):
        templates[file.stem] = read_source(file, str(file))
    if not templates:
        place = directory / "tokenizer_config.json"
        templates = named_templates(place, own)
    if not templates:
        return None
    if "default" not in templates:
        names = listed([one_line(name, LONGEST_NAME) for name in sorted(templates)])
        raise ValueError(
            f"{place}: the chat templates are {names}, and none is default; "
            "--chat_template takes plain or a file"
        )
    return ChatTemplate(templates["default"], f"the chat template of {place}")


def named_templates(file: Path, own) -> dict[str, str]:
    """Return templates by name: one text is "default"; or a list of {"name", "template"}."""
    if own is None:
        return {}
    if isinstance(own, str):
        return {"default": own}
    pairs = []
    if isinstance(own, dict):
        pairs = list(own.items())
    elif isinstance(own, list) and all(isinstance(item, dict) for item in own):
        pairs = [(item.get("name"), item.get("template")) for item in own]
    if pairs and all(isinstance(text, str) for pair in pairs for text in pair):
        return dict(pairs)
    expected = "expected text, or a list of objects with name and template"
    raise ValueError(f"{file}: chat_template: found {json_type(own)}; {expected}")


def read_source(file: Path, origin: str) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (UnicodeDecodeError, OSError) as error:
        raise ValueError(f"{origin}: cannot be read as UTF-8 text ({error})") from None
