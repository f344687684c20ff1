"""Data files and the fields of their rows, with errors that name file and line.

It makes no comparison of a row (data.py) and no tokens (parts/tokenizers.py, parts/token_cache.py).
Parquet: parts/parquet.py. Repeated prompts and system messages: parts/repeats.py.

A file is .jsonl or .jsonl.gz with one JSON object a line, .json with the same or with one array of
objects, or .parquet. A row is any of

    {"prompt": "...", "chosen": "...", "rejected": "..."}    text: prompt + response is a sequence
    {"chosen": "...", "rejected": "..."}                     whole dialogues
    {"prompt": ..., "responses": [best, ..., worst]}         a ranking
    {"prompt": ..., "chosen": [a], "rejected": [b, c, ...]}  RewardBench 2, for rm.py alone

with text, or chat messages [{"role": "...", "content": "..."}, ...] in place of it. docs/data.md
has the other fields that are read, and what becomes of fields that are not.
"""

import glob
import gzip
import json
import os
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from parts.guards import LONGEST_NAME, counted, listed, one_line, shown
from parts.parquet import parquet_rows
from parts.repeats import read_answers_once, read_dialogue_once, read_text_once

BYTE_ORDER_MARK = b"\xef\xbb\xbf"
SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".parquet")
EXPECTED_FILE = "expected .jsonl, .jsonl.gz, .json or .parquet"
MOST_ROW_BYTES = 100_000_000  # of its JSON; some gigabytes are needed to encode so long a text
MOST_NOTES = 40  # that are printed for a file; its keys may be numbers

# --------------------------------------------------------------------------------------------------
# Files


def files_of(paths: Iterable[str]) -> list[str]:
    """List the data files that paths stand for: files, directories, and globs like "data/*.json".

    A directory stands for the files in it whose names end as data files do, in the order of their
    names; a glob for what it matches, in the same order. Raises ValueError that names a path where
    nothing is found, and two paths of one file.
    """
    files = []
    for path in map(str, paths):
        if Path(path).exists():
            files += files_at(path)
            continue
        matches = sorted(glob.glob(path, recursive=True))
        if not matches:
            found = "no file matches" if glob.has_magic(path) else "no such file"
            raise ValueError(f"{path}: {found}; {EXPECTED_FILE}")
        for match in matches:
            files += files_at(match)
    check_no_file_twice(files)
    return files


def check_no_file_twice(files: list[str]):
    """Raise ValueError that names two paths of one file, whose rows would count twice.

    A link is a path of the file that it leads to.
    """
    paths = {}
    for path in files:
        if not os.path.exists(path):
            continue  # reading it says what is wrong
        stat = os.stat(path)
        place = stat.st_dev, stat.st_ino
        if place in paths:
            first = paths[place]
            found = f"is the same file as {first}" if first != path else "found twice"
            raise ValueError(f"{path}: {found}; give each file once, or a copy of it")
        paths[place] = path


def files_at(path: str) -> list[str]:
    """List the data files in a directory; any other path stands for itself."""
    if not Path(path).is_dir():
        return [path]
    names = sorted(file.name for file in Path(path).iterdir() if file.name.endswith(SUFFIXES))
    if not names:
        raise ValueError(f"{path}: a directory without a data file; {EXPECTED_FILE} in it")
    return [str(Path(path) / name) for name in names]


class RepeatedKeyError(ValueError):
    """A key stands twice in an object of JSON, which Python reads as the last value in silence."""


class SetupError(ValueError):
    """An error that comes with a row but is no fault of it: a library is missing, for example.

    It ends the program also where bad rows are skipped.
    """


def read_rows(path) -> Iterator[tuple[int, bytes]]:
    """Yield (line number, JSON) for every row of a file, and skip blank lines.

    The rows of a parquet file are numbered from 1. Raises ValueError that names the file where it
    is missing, damaged or has no row, and also the line where it cannot be decompressed or its
    array is not JSON. JSON lines are not parsed here.
    """
    path = Path(path)
    if not path.is_file():
        found = "is a directory" if path.is_dir() else "no such file"
        raise ValueError(f"{path}: {found}; {EXPECTED_FILE}")
    rows = parquet_rows(path) if path.suffix == ".parquet" else json_rows(path)
    is_empty = True
    for line, text in rows:
        if len(text) > MOST_ROW_BYTES:
            raise ValueError(
                f"{path}:{line}: a row of more than {MOST_ROW_BYTES:,} bytes; expected one JSON "
                "object a line"
            )
        is_empty = False
        yield line, text
    if is_empty:
        raise ValueError(f"{path}: no row in it; expected one JSON object a line")


def json_rows(path: Path) -> Iterator[tuple[int, bytes]]:
    """Yield (line number, JSON) for every row of a .jsonl, .jsonl.gz or .json file."""
    open_file = gzip.open if path.suffix == ".gz" else open
    line = 0
    try:
        with open_file(path, "rb") as file:
            # A longer line would fill the memory; `read_rows` refuses it by its beginning.
            lines = iter(partial(file.readline, MOST_ROW_BYTES + 1), b"")
            rows = enumerate(lines, start=1)
            if path.suffix == ".json":
                start = file.peek(1024).lstrip(BYTE_ORDER_MARK + b" \t\r\n")
                if start.startswith(b"["):
                    rows = array_items(path, file.read())
            for line, text in rows:
                if line == 1:
                    text = text.removeprefix(BYTE_ORDER_MARK)
                if text.strip():
                    yield line, text
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        found = f"cannot be decompressed ({error}); the file is cut, damaged, or not gzip"
        raise ValueError(f"{path}:{line + 1}: {found}") from None
    except MemoryError:
        raise MemoryError(f"{path}:{line + 1}: cannot be read into memory") from None


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
    line, counted_to = 1, 0  # lines are counted up to this character
    start = gap.match(text, text.index("[") + 1).end()
    while text[start] != "]":
        line += text.count("\n", counted_to, start)
        counted_to = start
        _, end = decoder.raw_decode(text, start)
        yield line, text[start:end].encode()
        start = gap.match(text, end).end()


def parsed_rows(
    path, parse: Callable[[bytes], Any], bad_rows: list[str] | None
) -> Iterator[tuple[int, Any]]:
    """Yield (line number, what `parse` makes of the JSON) for every row of a file.

    bad_rows: as in `good_rows`, which also has the errors.
    """
    rows = ((path, line, text) for line, text in read_rows(path))
    for _, line, parsed in good_rows(parse, rows, bad_rows):
        yield line, parsed


def good_rows(
    convert: Callable, rows: Iterable[tuple[Any, int | str, Any]], bad_rows: list[str] | None
) -> Iterator[tuple[Any, int | str, Any]]:
    """Yield (path, line, `convert` of the item) for rows of a file, each (path, line, item).

    bad_rows: rows for which `convert` raises ValueError are skipped, and listed here. Raises
    ValueError that names file and line; also with `bad_rows` where every row is bad.
    """
    path, is_empty = "", True
    for path, line, item in rows:
        try:
            converted = convert(item)
        except ValueError as error:
            bad_row(path, line, error, bad_rows)
        else:
            is_empty = False
            yield path, line, converted
    if is_empty and bad_rows:
        raise nothing_left(path, bad_rows)


def bad_row(path, line: int, error: ValueError, bad_rows: list[str] | None):
    """Raise ValueError that names file and line, or append "line: error" to `bad_rows`.

    A SetupError is raised as it is.
    """
    if isinstance(error, SetupError):
        raise error
    if bad_rows is None:
        raise ValueError(f"{path}:{line}: {error}") from None
    bad_rows.append(f"{line}: {error}")


def convert_rows(
    convert: Callable, comparisons: Iterable, bad_rows: list[str] | None = None
) -> Iterator:
    """Yield `convert` of each comparison of a file; its ValueErrors are errors of the row.

    comparisons: each with "file:line" in `where`. bad_rows: as in `good_rows`.
    """

    def located() -> Iterator[tuple]:
        for comparison in comparisons:
            path, _, line = comparison.where.rpartition(":")
            yield path, line, comparison

    for _, _, converted in good_rows(convert, located(), bad_rows):
        yield converted


def row_by_row(convert: Callable[[list], list]) -> Callable[[list], list]:
    """Make `convert`, a function of rows together, call itself for each alone where it fails.

    A ValueError of a row then stands in the result, in place of the row.
    """

    def converted(rows: list) -> list:
        try:
            return convert(rows)
        except ValueError:
            pass  # of one of them
        results = []
        for row in rows:
            try:
                results += convert([row])
            except ValueError as error:
                results.append(error)
        return results

    return converted


def nothing_left(path, bad_rows: list[str]) -> ValueError:
    return ValueError(f"{path}: no row of it is a comparison, for example {path}:{bad_rows[-1]}")


# --------------------------------------------------------------------------------------------------
# Fields

RESPONSES = ("chosen", "rejected", "responses", "response")
OURS = ("prompt", *RESPONSES, "margin", "target", "system", "subset")
# A row without a prompt must not have one of these, in letters of any case.
LOOKS_LIKE_PROMPT = ("prompt", "question", "instruction", "input", "query", "context", "history")
REPEATED = "the prompt, which the responses repeat, is read once"
TWICE = "a response that a ranking has twice is left out the second time"
NO_PROMPT = "no prompt, so chosen and rejected are read as whole dialogues"


@dataclass(frozen=True)
class Reading:
    """The way rows are read: --fields as (ours, theirs), --ignore_fields, and --text_as.

    Its repr is a part of the token cache's key. `reading_of` makes and checks one.
    """

    fields: tuple[tuple[str, str], ...] = ()
    ignore_fields: tuple[str, ...] = ()
    text_as: str = "text"

    def as_flags(self) -> list[str]:
        """Return the flags of train.py and rm.py, word by word, that read rows like this."""
        flags = []
        if self.fields:
            flags += ["--fields", *(f"{ours}={theirs}" for ours, theirs in self.fields)]
        if self.ignore_fields:
            flags += ["--ignore_fields", *self.ignore_fields]
        if self.text_as != "text":
            flags += ["--text_as", self.text_as]
        return flags


def reading_of(fields=None, ignore_fields: Iterable[str] = (), text_as: str = "text") -> Reading:
    """Make a Reading. fields: {ours: theirs}, or pairs of them.

    Raises ValueError that begins with the flag which is wrong.
    """
    pairs = list(fields.items()) if isinstance(fields, dict) else list(fields or ())
    if isinstance(ignore_fields, str):  # not its letters
        ignore_fields = [ignore_fields]
    ignored = set(ignore_fields)
    seen = set()
    for ours, theirs in pairs:
        if ours not in OURS:
            expected = f"expected one of {', '.join(OURS)} in front of ="
            raise ValueError(f"--fields: found {ours}={theirs}; {expected}")
        for name in (("ours", ours), ("theirs", theirs)):
            if name in seen:
                raise ValueError(f"--fields: found {name[1]} twice; each field is read once")
            seen.add(name)
        if theirs in ignored:
            raise ValueError(
                f"--ignore_fields: found {theirs}, which --fields reads as {ours}; give one of them"
            )
    if text_as not in ("text", "messages"):
        raise ValueError(f"--text_as: found {text_as}; expected text or messages")
    return Reading(tuple(sorted(pairs)), tuple(sorted(ignored)), text_as)


def flag_labels(reading: Reading) -> dict[str, str]:
    """Map the fields that flags name to the flags: {"question": "--fields prompt=question"}."""
    labels = {name: f"--ignore_fields {name}" for name in reading.ignore_fields}
    for ours, theirs in reading.fields:
        labels[theirs] = f"--fields {ours}={theirs}"
    return labels


def note_lines(path, notes: Counter, rows: int) -> list[str]:
    """Say for a user what a reader of the rows of a file should know, with the number of rows.

    notes: counts how many rows have each note of `parse_row`; `rows`: how many there are.
    """
    lines = []
    for label, count in notes.items():
        is_of_flag = label.startswith("--")  # it is said where a flag has none, by unused_lines
        is_usual = label == NO_PROMPT and count == rows
        if not is_of_flag and not is_usual:
            lines.append(f"{path}: {label} ({counted(count, 'row')})")
    if len(lines) > MOST_NOTES:
        more = f"{path}: and {len(lines) - MOST_NOTES} more such lines, which are left out"
        lines = [*lines[:MOST_NOTES], more]
    return lines


def unused_lines(reading: Reading, notes: Iterable[Counter]) -> list[str]:
    """Say which fields that flags name no row has. notes: a Counter for each file."""
    found = set().union(*notes)
    lines = []
    for name, label in flag_labels(reading).items():
        if label not in found:
            if label.startswith("--fields subset="):
                label += " (--eval_by)"
            lines.append(f"{label}: no row has a field {shown(name)}")
    return lines


# --------------------------------------------------------------------------------------------------
# One row


def parse_row(text: bytes, reading: Reading = Reading(), min_responses: int = 2) -> dict:
    """Parse the JSON of a row into plain fields: those of `data.Comparison` but the rewards.

    "prompt" and "responses" (best first) are all text, or all lists of chat messages {"role",
    "content"}; a prompt that the responses repeat is in the prompt alone. "margin", "target",
    "subset"; "ranked": False where the first response is preferred to each of the others, which are
    not compared with one another; "notes": short labels, the same for all rows that they apply to.
    min_responses: 1 allows rows of one response, and of lists of chosen and rejected ones, as well.
    Raises ValueError that says which field is wrong, and how.
    """
    found = parse_object(text)
    row, unread, notes = divide_fields(found, reading)
    responses = take_responses(row, min_responses)
    if not responses:
        raise ValueError(no_responses(found, min_responses))
    theirs = dict(reading.fields)
    for name in RESPONSES:
        if name in row:
            unread[theirs.get(name, name)] = row[name]
    if row.get("prompt") is None:
        check_no_other_prompt(unread, theirs.get("prompt", "prompt"))
    is_ranked = "chosen[0]" not in responses
    if "prompt" not in row:
        if is_ranked and "chosen" not in responses:
            raise ValueError(
                "prompt is missing; only rows of chosen and rejected can do without one"
            )
        notes.append(NO_PROMPT)
    for name, value in unread.items():
        if value is not None:
            notes.append(f"field {shown(name)} is not read")
    if not is_ranked:
        check_plain(row)
    prompt, responses = read_dialogue(row, responses, reading, notes)
    margin = parse_margin(row.get("margin"), len(responses))
    return {
        "prompt": prompt,
        "responses": responses,
        "margin": margin,
        "target": parse_target(row.get("target"), len(responses), margin),
        "subset": parse_subset(row.get("subset")),
        "ranked": is_ranked,
        "notes": tuple(notes),
    }


def parse_object(text: bytes) -> dict:
    """Parse the JSON of a row.

    Raises ValueError where it is no object, or an object in it has a key twice.
    """
    try:
        row = ROW_DECODER.decode(text.decode().rstrip())
    except RepeatedKeyError:
        raise
    except (ValueError, RecursionError) as error:
        raise ValueError(not_json(error)) from None
    if not isinstance(row, dict):
        raise ValueError(f"expected an object, found {json_type(row)}")
    return row


def object_of(pairs: list[tuple[str, Any]]) -> dict:
    """Make the dictionary of a JSON object. Raises RepeatedKeyError that names a repeated key."""
    found = dict(pairs)
    if len(found) == len(pairs):
        return found
    keys = Counter(key for key, _ in pairs)
    key, count = keys.most_common(1)[0]
    raise RepeatedKeyError(f"{shown(key)}: found {count} times in one object; give each key once")


ROW_DECODER = json.JSONDecoder(object_pairs_hook=object_of)


def divide_fields(found: dict, reading: Reading) -> tuple[dict, dict, list[str]]:
    """Divide a row into the fields that we have, by our names, and all others by theirs.

    Also returns the labels of flags whose fields the row has.
    """
    notes = []
    for name, label in flag_labels(reading).items():
        if found.get(name) is not None:
            notes.append(label)
    others = {name: value for name, value in found.items() if name not in reading.ignore_fields}
    row = {}
    for ours, theirs in reading.fields:
        if theirs in others:
            row[ours] = others.pop(theirs)
    replaced = [ours for ours, _ in reading.fields]
    for name in OURS:
        if name in others and name not in replaced:
            row[name] = others.pop(name)
    return row, others, notes


def check_no_other_prompt(unread: dict, missing: str):
    """Raise ValueError for a field that looks like the prompt, in a row without the field for it.

    unread: the fields of the row that nothing reads. missing: the name of the field for the prompt.
    """
    for name, value in unread.items():
        if name.casefold() in LOOKS_LIKE_PROMPT and value not in (None, "", []):
            raise ValueError(
                f"no field {shown(missing)}, but a field {shown(name)}, which may be it; --fields "
                f"prompt={name} reads it as the prompt, --ignore_fields {name} reads the row "
                "without it"
            )


def take_responses(row: dict, min_responses: int) -> dict:
    """Take the responses out of a row: {field: response}, best first; {} where it has none."""
    if "chosen" in row or "rejected" in row:
        pair = {"chosen": row.pop("chosen", None), "rejected": row.pop("rejected", None)}
        lists = [name for name, value in pair.items() if holds_responses(value)]
        if len(lists) == 2 or (lists and min_responses == 1):
            return one_and_others(pair, min_responses)
        return pair
    if "responses" in row:
        ranking = row.pop("responses")
        if not isinstance(ranking, list) or len(ranking) < 2:
            found = len(ranking) if isinstance(ranking, list) else json_type(ranking)
            expected = "a ranking is a list of two or more, best first"
            raise ValueError(f"responses: found {found}; {expected}")
        return {f"responses[{i}]": response for i, response in enumerate(ranking)}
    if "response" in row and min_responses == 1:
        return {"response": row.pop("response")}
    return {}


def holds_responses(value) -> bool:
    """Return whether a field is a list of responses, text or dialogues, and not of messages."""
    return isinstance(value, list) and len(value) > 0 and isinstance(value[0], (str, list))


def one_and_others(pair: dict, min_responses: int) -> dict:
    """Name the responses of a row whose chosen and rejected are lists: chosen[0], rejected[0], ...

    Raises ValueError where such rows are not read, or the chosen list has not one response.
    """
    if min_responses > 1:
        raise ValueError(
            "chosen and rejected: found lists of responses, as in RewardBench 2, which rm.py alone "
            "reads; for training, give each rejected response a row of its own, beside the chosen "
            "one"
        )
    responses = {}
    for name, value in pair.items():
        if not holds_responses(value):
            found = json_type(value)
            if isinstance(value, list):
                found = "chat messages" if value else "an empty list"
            raise ValueError(
                f"{name}: found {found}; expected a list of responses, as the other field has one"
            )
        for i, response in enumerate(value):
            responses[f"{name}[{i}]"] = response
    if len(pair["chosen"]) != 1:
        raise ValueError(
            f"chosen: found {counted(len(pair['chosen']), 'response')}; expected a list of one; "
            "rows in which several responses are right, RewardBench 2's subset Ties, are scored "
            "by other rules, so take them out"
        )
    return responses


def check_plain(row: dict):
    """Raise ValueError for a margin or a target in a row of one chosen and other responses."""
    for name in ("margin", "target"):
        if row.get(name) is not None:
            raise ValueError(
                f"{name}: found beside lists of chosen and rejected responses; it is of a pair, so "
                f"take it out (--ignore_fields {name})"
            )


def no_responses(found: dict, min_responses: int) -> str:
    """Say for an error which fields a row without responses has."""
    names = listed([one_line(name, LONGEST_NAME) for name in found]) or "none"
    expected = "expected chosen and rejected, or prompt and responses"
    if min_responses == 1:
        expected += ", or prompt and response"
    return f"fields found: {names}; {expected}; --fields reads fields with other names"


def read_dialogue(
    row: dict, responses: dict, reading: Reading, notes: list[str]
) -> tuple[str | list[dict], list]:
    """Return the prompt and the responses of a row, all text or all lists of chat messages.

    responses: by the names of their fields. notes: gets what a reader should know.
    """
    prompt, system = row.get("prompt", ""), row.get("system") or ""
    check_text("system", system)
    if any(isinstance(value, list) for value in [prompt, *responses.values()]):
        unread = set()
        prompt = parse_messages("prompt", prompt, "user", unread)
        dialogues = {}
        for name, value in responses.items():
            dialogues[name] = parse_messages(name, value, "assistant", unread)
        for key in sorted(unread - {"role", "content", *reading.ignore_fields}):
            notes.append(f"field {shown(key)} of messages is not read")
        for key in sorted(unread & set(reading.ignore_fields)):
            notes.append(f"--ignore_fields {key}")
        prompt, responses, is_repeated = read_dialogue_once(system, prompt, dialogues)
    else:
        for name, value in {"prompt": prompt, **responses}.items():
            check_text(name, value)
        if reading.text_as == "messages":
            prompt, responses, is_repeated = text_as_messages(row, responses, system)
        elif system:
            raise ValueError(
                "system: found beside text alone, which has no place for it; --text_as messages "
                "makes chat messages of the text, --ignore_fields system reads the row without it"
            )
        else:
            prompt, responses, is_repeated = read_text_once(prompt, responses)
    if is_repeated:
        notes.append(REPEATED)
    return prompt, responses


def text_as_messages(
    row: dict, responses: dict[str, str], system: str
) -> tuple[list[dict], list[list[dict]], bool]:
    """Return prompt and responses as chat messages, and whether the prompt was repeated."""
    if "prompt" not in row:
        raise ValueError(
            "prompt is missing; --text_as messages makes it the user's message, and whole "
            "dialogues of text need --text_as text"
        )
    answers, is_repeated = read_answers_once(row["prompt"], list(responses.values()))
    prompt = parse_messages("prompt", row["prompt"], "user", set())
    if system:
        prompt = [{"role": "system", "content": system}, *prompt]
    dialogues = [parse_messages("response", answer, "assistant", set()) for answer in answers]
    return prompt, dialogues, is_repeated


def parse_messages(name: str, value, role: str, unread: set[str]) -> list[dict]:
    """Return the chat messages of a field as {"role", "content"}.

    Text counts as the content of one message of `role`, even an empty response; an empty prompt
    counts as no message. unread: gets the names of other keys that are not null.
    """
    if isinstance(value, str):
        check_text(name, value)
        is_message = value or role == "assistant"
        return [{"role": role, "content": value}] if is_message else []
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
            found = one_line(json.dumps(message_role, ensure_ascii=False), LONGEST_NAME)
            raise ValueError(f"{name}[{i}]: found role {found}; {expected}")
        check_text(f"{name}[{i}].content", content)
        messages.append({"role": message_role, "content": content})
        if len(message) > 2:
            unread.update(key for key, value in message.items() if value is not None)
    return messages


def parse_margin(margin, responses: int) -> float:
    if margin is None:
        return 0.0
    if responses != 2:
        raise ValueError(
            f"margin: found with {counted(responses, 'response')}; a margin is between two"
        )
    is_number = type(margin) in (int, float)
    if is_number and abs(margin) < 1e30:
        return float(margin)
    found = margin if is_number else json_type(margin)
    raise ValueError(f"margin: found {found}; expected a number between -1e30 and 1e30")


def parse_target(target, responses: int, margin: float) -> float:
    """Return the probability that the first of two responses is preferred; null is 1."""
    if target is None:
        return 1.0
    if responses != 2:
        raise ValueError(f"target: found with {counted(responses, 'response')}; a target is of two")
    is_number = type(target) in (int, float)
    if not is_number or not 0 <= target <= 1:
        found = target if is_number else json_type(target)
        raise ValueError(f"target: found {found}; expected a number from 0 to 1")
    if margin and target != 1:
        raise ValueError(
            f"target: found {target:g} beside margin {margin:g}; a row with a margin has target 1"
        )
    return float(target)


def parse_subset(subset) -> str | None:
    """Return the subset of a row as text; null and empty text are none."""
    if isinstance(subset, (bool, int, float)):
        return json.dumps(subset)
    if subset is None:
        return None
    check_text("subset", subset)
    return subset or None


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
    return f"not JSON that a row could be ({one_line(error, LONGEST_NAME)})"


def json_type(value) -> str:
    if value is None:
        return "null or nothing"
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false"}
    return names.get(type(value), "a number")
