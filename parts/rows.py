"""Rows of data files, and errors that name file and line.

It makes no comparison of a row (data.py) and no tokens (parts/tokenizers.py, parts/token_cache.py).

A file is .jsonl or .jsonl.gz with one JSON object a line, or .json with the same or with one array
of objects. A row is any of

    {"prompt": "...", "chosen": "...", "rejected": "..."}    text: prompt + response is a sequence
    {"chosen": "...", "rejected": "..."}                     whole dialogues
    {"prompt": ..., "responses": [best, ..., worst]}         a ranking

with text, or chat messages [{"role": "...", "content": "..."}, ...] in place of it.

A pair may have a "margin", a number: by how much the chosen response is to be better.
"""

import gzip
import json
import re
import zlib
from collections.abc import Iterator
from pathlib import Path

BYTE_ORDER_MARK = b"\xef\xbb\xbf"


def read_rows(path) -> Iterator[tuple[int, bytes]]:
    """Yield (line number, JSON) for every row of a file, and skip blank lines.

    Raises ValueError that names the file where it is missing or has no row, and also the line
    where it cannot be decompressed or its array is not JSON. JSON lines are not parsed here.
    """
    path = Path(path)
    if not path.is_file():
        found = "is a directory" if path.is_dir() else "no such file"
        raise ValueError(f"{path}: {found}; expected .jsonl, .jsonl.gz or .json")
    open_file = gzip.open if path.suffix == ".gz" else open
    line, is_empty = 0, True
    try:
        with open_file(path, "rb") as file:
            rows = enumerate(file, start=1)
            if path.suffix == ".json":
                start = file.peek(1024).lstrip(BYTE_ORDER_MARK + b" \t\r\n")
                if start.startswith(b"["):
                    rows = array_items(path, file.read())
            for line, text in rows:
                if line == 1:
                    text = text.removeprefix(BYTE_ORDER_MARK)
                if text.strip():
                    is_empty = False
                    yield line, text
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        found = f"cannot be decompressed ({error}); the file is cut, damaged, or not gzip"
        raise ValueError(f"{path}:{line + 1}: {found}") from None
    if is_empty:
        raise ValueError(f"{path}: no row in it; expected one JSON object a line")


def array_items(path, content: bytes) -> Iterator[tuple[int, bytes]]:
    """Yield (line number, JSON) for every item of a JSON array. Raises as `read_rows` does."""
    try:
        text = content.decode("utf-8-sig")
        json.loads(text)  # finds wrong syntax, but does not say on which line an item stands
    except (ValueError, RecursionError) as error:
        line = 1  # an error without a place is given the array's first line
        if isinstance(error, UnicodeDecodeError):
            line += error.object[: error.start].count(b"\n")
        elif isinstance(error, json.JSONDecodeError):
            line = error.lineno
        raise ValueError(f"{path}:{line}: {not_json(error)}") from None
    decoder = json.JSONDecoder()
    gap = re.compile(r"[ \t\r\n,]*")
    line, counted = 1, 0  # lines are counted up to this character
    start = gap.match(text, text.index("[") + 1).end()
    while text[start] != "]":
        line += text.count("\n", counted, start)
        counted = start
        _, end = decoder.raw_decode(text, start)
        yield line, text[start:end].encode()
        start = gap.match(text, end).end()


def bad_row(path, line: int, error: ValueError, bad_rows: list[str] | None):
    """Raise ValueError that names file and line, or append "line: error" to `bad_rows`."""
    if bad_rows is None:
        raise ValueError(f"{path}:{line}: {error}") from None
    bad_rows.append(f"{line}: {error}")


def nothing_left(path, bad_rows: list[str]) -> ValueError:
    return ValueError(f"{path}: no row of it is a comparison, for example {path}:{bad_rows[-1]}")


# --------------------------------------------------------------------------------------------------
# One row


def parse_row(text: bytes, min_responses: int = 2) -> dict:
    """Parse the JSON of a row into plain fields: "prompt", "responses" (best first), "margin".

    Prompt and responses are all text, or all lists of chat messages {"role", "content"}; such a
    prompt is empty where every response repeats it. min_responses: 1 allows rows {"prompt": ...,
    "response": ...} as well. Raises ValueError that says which field is wrong, and how.
    """
    try:
        row = json.loads(text.decode().rstrip())
    except (ValueError, RecursionError) as error:
        raise ValueError(not_json(error)) from None
    if not isinstance(row, dict):
        raise ValueError(f"expected an object, found {json_type(row)}")
    fields = response_fields(row, min_responses)
    if "prompt" not in row and "chosen" not in fields:
        raise ValueError("prompt is missing; only rows of chosen and rejected can do without one")
    prompt, responses = row.get("prompt", ""), list(fields.values())
    if any(isinstance(value, list) for value in [prompt, *responses]):
        prompt = parse_messages("prompt", prompt, "user")
        responses = [parse_messages(name, value, "assistant") for name, value in fields.items()]
        if all(repeats(prompt, response) for response in responses):
            prompt = []
    else:
        for name, value in {"prompt": prompt, **fields}.items():
            check_text(name, value)
    margin = parse_margin(row.get("margin"), len(responses))
    return {"prompt": prompt, "responses": responses, "margin": margin}


def response_fields(row: dict, min_responses: int) -> dict:
    """Return {field: response} of a row, best first."""
    if "chosen" in row or "rejected" in row:
        return {"chosen": row.get("chosen"), "rejected": row.get("rejected")}
    if "responses" in row:
        ranking = row["responses"]
        if not isinstance(ranking, list) or len(ranking) < 2:
            found = len(ranking) if isinstance(ranking, list) else json_type(ranking)
            expected = "a ranking is a list of two or more, best first"
            raise ValueError(f"responses: found {found}; {expected}")
        return {f"responses[{i}]": response for i, response in enumerate(ranking)}
    expected = "chosen and rejected, or prompt and responses"
    if min_responses == 1:
        if "response" in row:
            return {"response": row["response"]}
        expected += ", or prompt and response"
    raise ValueError(f"fields found: {', '.join(row) or 'none'}; expected {expected}")


def parse_messages(name: str, value, role: str) -> list[dict]:
    """Return the chat messages of a field as {"role", "content"}, without their other keys.

    Text counts as the content of one message of `role`; empty text as no message.
    """
    if isinstance(value, str):
        check_text(name, value)
        return [{"role": role, "content": value}] if value else []
    if not isinstance(value, list):
        expected = "expected text or a list of chat messages"
        raise ValueError(f"{name}: {expected}, found {json_type(value)}")
    expected = "a message is an object whose role is system, user or assistant"
    messages = []
    for i, message in enumerate(value):
        if not isinstance(message, dict):
            raise ValueError(f"{name}[{i}]: found {json_type(message)}; {expected}")
        message_role, content = message.get("role"), message.get("content")
        if message_role not in ("system", "user", "assistant"):
            raise ValueError(f"{name}[{i}]: found role {json.dumps(message_role)}; {expected}")
        check_text(f"{name}[{i}].content", content)
        messages.append({"role": message_role, "content": content})
    return messages


def repeats(prompt: list[dict], dialogue: list[dict]) -> bool:
    """Return whether a dialogue begins with the prompt (UltraFeedback), a system message aside."""
    if dialogue[: len(prompt)] == prompt:
        return True
    has_system = bool(dialogue) and dialogue[0]["role"] == "system"
    return has_system and dialogue[1 : 1 + len(prompt)] == prompt


def parse_margin(margin, responses: int) -> float:
    if margin is None:
        return 0.0
    if responses != 2:
        raise ValueError(f"margin: found with {responses} responses; a margin is between two")
    is_number = type(margin) in (int, float)
    if is_number and abs(margin) < 1e30:
        return float(margin)
    found = margin if is_number else json_type(margin)
    raise ValueError(f"margin: found {found}; expected a number between -1e30 and 1e30")


def check_text(name: str, value):
    if not isinstance(value, str):
        raise ValueError(f"{name}: expected text, found {json_type(value)}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        found = f"character {error.start} is half of a surrogate pair"
        raise ValueError(f"{name}: {found}, which is no text") from None


def not_json(error: Exception) -> str:
    if isinstance(error, UnicodeDecodeError):
        return f"not UTF-8 ({error.reason}); save the file as UTF-8"
    if isinstance(error, json.JSONDecodeError):
        expected = "expected one object a line, or in .json one array of objects"
        return f"not JSON ({error.msg}, column {error.colno}); {expected}"
    # A number of thousands of digits, or lists nested thousands deep.
    return f"not JSON that a row could be ({error})"


def json_type(value) -> str:
    if value is None:
        return "null or nothing"
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false"}
    return names.get(type(value), "a number")
