"""Prompts that responses repeat at their start, and repeated system messages: each is read once.

Rows and their fields are in parts/rows.py; how a dialogue becomes text is in parts/chat.py.
"""

OUT_OF_PROMPT = "where the responses are whole dialogues, --ignore_fields prompt reads them alone"

# --------------------------------------------------------------------------------------------------
# Text


def read_text_once(prompt: str, responses: dict[str, str]) -> tuple[str, list[str], bool]:
    """Return prompt, responses, and whether the responses repeated the prompt at their start.

    responses: by the names of their fields. White space around the prompt does not count. A prompt
    of one word counts as repeated where two or more responses all begin with this word. Raises
    ValueError where some responses begin with a longer prompt and others do not.
    """
    ends = {name: end_of_repeat(prompt, text) for name, text in responses.items()}
    repeating = [name for name, end in ends.items() if end]
    texts = list(responses.values())
    if not repeating:
        return prompt, texts, False
    if len(repeating) == len(texts):
        if is_one_word(prompt) and len(texts) == 1:
            return prompt, texts, False
        starts = {text[: ends[name]] for name, text in responses.items()}
        if len(starts) > 1:  # they differ in white space, and stay as they are
            return "", texts, True
        return starts.pop(), [text[ends[name] :] for name, text in responses.items()], True
    if is_one_word(prompt):
        return prompt, texts, False
    other = next(name for name in responses if name not in repeating)
    raise ValueError(
        f"{repeating[0]} begins with the prompt, {other} does not, so a prompt in front of both "
        f"may be there twice; take it off {repeating[0]}, or put it in front of every response"
    )


def read_answers_once(prompt: str, answers: list[str]) -> tuple[list[str], bool]:
    """Return the answers to a user's message without this message, and whether they repeated it.

    A repeat counts only where all answers begin with the message, and it has several words.
    """
    ends = [end_of_repeat(prompt, answer) for answer in answers]
    if is_one_word(prompt) or not all(ends):
        return answers, False
    return [answer[end:].lstrip() for answer, end in zip(answers, ends)], True


def end_of_repeat(prompt: str, text: str) -> int:
    """Return the length of the repeated prompt at the start of a text, 0 where there is none."""
    words = prompt.strip()
    start = len(text) - len(text.lstrip())
    if not words or not text.startswith(words, start):
        return 0
    end = start + len(words)
    is_longer_word = words[-1].isalnum() and text[end : end + 1].isalnum()
    if is_one_word(prompt) and is_longer_word:  # "A" does not stand in front of "Apples"
        return 0
    return end


def is_one_word(text: str) -> bool:
    """Return whether a text is a single word; a long one may be a language without spaces."""
    return len(text.split()) < 2 and len(text) < 20


# --------------------------------------------------------------------------------------------------
# Chat messages


def read_dialogue_once(
    system: str, prompt: list[dict], responses: dict[str, list[dict]]
) -> tuple[list[dict], list[list[dict]], bool]:
    """Return prompt, responses, and whether the responses repeated the prompt.

    system: the text of a system message for the row, or "". responses: by the names of their
    fields. prompt + response is the whole dialogue, with each system message once. A response that
    begins with a user's or a system message is a whole dialogue, in which the prompt must be the
    start of what stands before its last answer, or the end; or it continues a prompt that ends with
    an assistant's message. Raises ValueError where that is not so, where only some responses repeat
    the prompt, and where system messages differ.
    """
    if not system and not prompt:
        return [], list(responses.values()), False
    system, prompt, turns = take_off_system(system, prompt, responses)
    if not prompt:
        return [], [system + dialogue for dialogue in turns.values()], False
    kinds = {}
    for name, dialogue in turns.items():
        kinds[name] = kind_of(name, prompt, dialogue, len(dialogue) < len(responses[name]))
    first, *others = kinds
    for other in others:
        if kinds[other] != kinds[first]:
            raise ValueError(
                f"{first} {kinds[first]}, {other} {kinds[other]}; all responses of a row must do "
                "the same"
            )
    if kinds[first] != REPEATS:
        return system + prompt, list(turns.values()), False
    prompt, answers = divide_dialogues(system, prompt, list(turns.values()))
    return prompt, answers, True


REPEATS, ANSWERS, CONTINUES = "repeats the prompt", "answers the prompt", "goes on after the prompt"


def kind_of(name: str, prompt: list[dict], dialogue: list[dict], had_system: bool) -> str:
    """Return what a response does with the prompt: REPEATS, ANSWERS or CONTINUES.

    prompt, dialogue: without system messages. Raises ValueError where it does none of these.
    """
    begins_with_user = bool(dialogue) and dialogue[0]["role"] == "user"
    if not begins_with_user and not had_system:
        return ANSWERS
    before = before_answer(dialogue)
    if begins_with(before, prompt) or ends_with(before, prompt):
        return REPEATS
    may_continue = prompt[-1]["role"] == "assistant" and not begins_with(dialogue, prompt)
    if may_continue and begins_with_user and not had_system:
        return CONTINUES
    start = "a system message" if had_system else "a user's message"
    raise ValueError(
        f"{name} begins with {start}, so it should be a whole dialogue with the prompt at its "
        "start, or at the end of what stands before its last answer, and is not; a response to the "
        f"prompt begins with an assistant's message; {OUT_OF_PROMPT}"
    )


def divide_dialogues(
    system: list[dict], prompt: list[dict], dialogues: list[list[dict]]
) -> tuple[list[dict], list[list[dict]]]:
    """Divide whole dialogues that repeat the prompt into what they share and their answers."""
    contexts = [before_answer(dialogue) for dialogue in dialogues]
    if all(begins_with(context, prompt) for context in contexts):
        return system + prompt, [dialogue[len(prompt) :] for dialogue in dialogues]
    context = contexts[0]
    if all(len(other) == len(context) and begins_with(other, context) for other in contexts):
        return system + context, [dialogue[len(context) :] for dialogue in dialogues]
    return [], [system + dialogue for dialogue in dialogues]  # earlier turns differ


def take_off_system(
    text: str, prompt: list[dict], responses: dict[str, list[dict]]
) -> tuple[list[dict], list[dict], dict[str, list[dict]]]:
    """Return the system message of a row (a list of one or none), and its parts without system.

    text: of the field `system`, or "". White space around a text does not count. Raises ValueError
    where system messages differ, or stand in front of some responses and of nothing else.
    """
    parts = {"prompt": prompt, **responses}
    found = {"system": [{"role": "system", "content": text}]} if text else {}
    rest = {}
    for name, messages in parts.items():
        size = int(bool(messages) and messages[0]["role"] == "system")
        if size:
            found[name] = messages[:size]
        rest[name] = messages[size:]
    if not found:
        return [], rest.pop("prompt"), rest
    first, *others = found
    for other in others:
        if not begins_with(found[other], found[first]):
            raise ValueError(
                f"{other} and {first} have different system messages; a row has one of them"
            )
    without = [name for name in responses if name not in found]
    if first in responses and without:
        raise ValueError(
            f"{first} begins with a system message, {without[0]} does not; put the message into "
            "the prompt, or in front of every response"
        )
    return found[first], rest.pop("prompt"), rest


def before_answer(dialogue: list[dict]) -> list[dict]:
    """Return the messages before the last one of the assistant, [] where there is none."""
    for i in reversed(range(len(dialogue))):
        if dialogue[i]["role"] == "assistant":
            return dialogue[:i]
    return []


def begins_with(dialogue: list[dict], messages: list[dict]) -> bool:
    """Return whether a dialogue begins with these messages, white space around texts aside."""
    if len(dialogue) < len(messages):
        return False
    return all(are_equal(a, b) for a, b in zip(dialogue, messages))


def ends_with(dialogue: list[dict], messages: list[dict]) -> bool:
    """Return whether a dialogue ends with these messages, white space around texts aside."""
    if len(dialogue) < len(messages):
        return False
    return begins_with(dialogue[len(dialogue) - len(messages) :], messages)


def are_equal(a: dict, b: dict) -> bool:
    return a["role"] == b["role"] and a["content"].strip() == b["content"].strip()
