"""Prompts that responses repeat, and system messages: read once, or refused with a way out."""

import itertools
import json

import pytest

from parts.repeats import ANSWERS, CONTINUES, REPEATS
from parts.rows import REPEATED, parse_row, reading_of

U, A, S = (
    {"role": role, "content": content}
    for role, content in [("user", "hi"), ("assistant", "A"), ("system", "Be brief.")]
)
B, U2, A2 = A | {"content": "B"}, U | {"content": "More?"}, A | {"content": "More."}
OTHER = U | {"content": "Other?"}


def read(prompt, *responses, text_as="text", **more) -> tuple[list, bool]:
    """Return the whole texts or dialogues of a row, and whether the prompt counts as repeated.

    A single response makes a row to be scored, two a pair, three a ranking.
    """
    row = {"prompt": prompt, **more}
    if len(responses) == 1:
        row["response"] = responses[0]
    elif len(responses) == 2:
        row["chosen"], row["rejected"] = responses
    else:
        row["responses"] = list(responses)
    found = parse_row(json.dumps(row).encode(), reading_of(text_as=text_as), min_responses=1)
    whole = [found["prompt"] + response for response in found["responses"]]
    return whole, REPEATED in found["notes"]


# --------------------------------------------------------------------------------------------------
# Text

QA = "Q: Hi?\nA:"


@pytest.mark.parametrize(
    "prompt, responses",
    [
        (QA, [f"{QA} Yes.", f"{QA} No."]),
        (QA, [f"{QA} Yes."]),
        (QA, [f"{QA} Yes.", f"{QA} No.", f"{QA} Well."]),
        (QA, [QA, f"{QA} No."]),  # an empty response
        (f"{QA} ", [f"{QA} Yes.", f"{QA} No."]),
        (f"{QA} ", [f"{QA}Yes.", f"{QA}No."]),  # white space at the prompt's end alone
        (f"{QA}\n\n", [f"{QA} Yes.", f"{QA}\nNo."]),
        (QA, [f"{QA}\n\nYes.", f"{QA} No."]),
        (f"\n\n{QA}", [f"{QA} Yes.", f"{QA} No."]),
        (QA, [f"\n{QA} Yes.", f"{QA} No."]),  # at the start of one response
        ("Hi", ["Hi there", "Hi!"]),  # one word, but all responses begin with it
        ("Hi", ["Hi\nYes", "Hi\nNo", "Hi\nWell"]),
        ("Tell me a", ["Tell me apart", "Tell me a joke"]),
        ("请介绍一下你自己，用一句话，不要超过二十个字，谢谢", None),
    ],
)
def test_a_prompt_that_all_responses_repeat_is_read_once(prompt, responses):
    """The texts are the responses as they are."""
    responses = responses or [f"{prompt}我是助手", f"{prompt}好的"]
    assert read(prompt, *responses) == (responses, True)


@pytest.mark.parametrize(
    "prompt, responses",
    [
        (QA, [" Yes.", " No."]),
        (QA, ["Q: Hi", "Q: Hi"]),  # a part of it
        (QA, ["q: hi?\na: Yes.", "q: hi?\na: No."]),  # in other letters
        (QA, [f"So, {QA} Yes.", f"So, {QA} No."]),  # not at the start
        ("", ["Yes.", "No."]),
        ("\n\n", ["\n\nYes.", "\n\nNo."]),  # nothing but white space
        (" ", ["Yes.", "No."]),
        ("Hi", ["Hi there", "Hello"]),  # one word, with which one response happens to begin
        ("Hi", ["Hello", "Hi there"]),
        ("Hi", ["Hi there"]),
        ("Hi", ["Hi there", "Hi!", "Hello"]),
        ("Hi ", ["Hi there", "Hello"]),
        ("Hi?", ["Hi? there", "Hello"]),
        ("A", ["Apples", "Another"]),  # longer words
        ("A", ["A dog", "Apples"]),
    ],
)
def test_other_texts_follow_the_prompt(prompt, responses):
    assert read(prompt, *responses) == ([prompt + response for response in responses], False)


@pytest.mark.parametrize("responses", [2, 3])
@pytest.mark.parametrize("prompt", [QA, f"{QA} ", f"\n{QA}", "Hi there", "x" * 20])
def test_a_prompt_that_some_texts_repeat_is_ambiguous(prompt, responses):
    """Both ways out that the message has, tried, read the row."""
    for repeating in itertools.product([True, False], repeat=responses):
        if len(set(repeating)) == 1:
            continue
        texts = [
            f"{prompt} Yes{i}." if is_one else f" No{i}." for i, is_one in enumerate(repeating)
        ]
        names = ["chosen", "rejected"]
        if responses == 3:
            names = [f"responses[{i}]" for i in range(3)]
        name = names[repeating.index(True)]
        with pytest.raises(ValueError) as error:
            read(prompt, *texts)
        assert str(error.value).startswith(
            f"{name} begins with the prompt, {names[repeating.index(False)]} does not"
        )
        assert f"take it off {name}, or put it in front of every response" in str(error.value)
        without = [text.removeprefix(prompt) for text in texts]
        assert read(prompt, *without) == ([prompt + text for text in without], False)
        in_front = [prompt + text for text in texts]
        assert read(prompt, *in_front) == (in_front, True)


@pytest.mark.parametrize(
    "prompt, responses, expected, is_repeated",
    [
        (QA, [f"{QA} Yes.", f"{QA}\nNo."], ["Yes.", "No."], True),
        (QA, [f"{QA} Yes.", "No.", "Well."], [f"{QA} Yes.", "No.", "Well."], False),
        (QA, [" Yes.", f"{QA} No."], [" Yes.", f"{QA} No."], False),
        ("Hi", ["Hi there", "Hi!"], ["Hi there", "Hi!"], False),
        ("Hi", ["Hi there", "Hello"], ["Hi there", "Hello"], False),
        (QA, [f"{QA} Yes."], ["Yes."], True),
    ],
)
def test_answers_that_repeat_the_users_message(prompt, responses, expected, is_repeated):
    """With --text_as messages it counts where all do so, and the message has several words."""
    user = {"role": "user", "content": prompt}
    dialogues = [[user, {"role": "assistant", "content": answer}] for answer in expected]
    assert read(prompt, *responses, text_as="messages") == (dialogues, is_repeated)


# --------------------------------------------------------------------------------------------------
# Chat messages


def spaced(messages):
    """Put white space around the texts of messages."""
    return [message | {"content": f" {message['content']}\n"} for message in messages]


@pytest.mark.parametrize("system", [[], [S]], ids=["no system", "system"])
@pytest.mark.parametrize(
    "prompt, before",
    [
        ([U], [U]),  # all that stands before the last answer
        ([U, A2, U2], [U, A2, U2]),
        ([U], [U, A2, U2]),  # its start
        ([U, A2], [U, A2, U2]),
        ([U2], [U, A2, U2]),  # its end
        ([A2, U2], [U, A2, U2]),
        ([U2], [OTHER, A, U, A2, U2]),
    ],
)
@pytest.mark.parametrize("space", [None, "prompt", "responses"])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_a_prompt_that_all_dialogues_repeat_is_read_once(system, prompt, before, space, count):
    """Also with a system message in the prompt alone, in the responses alone, or in both."""
    answers = [[A], [B], [A2]][:count]
    for in_prompt, in_responses in ([True, False], [False, True], [True, True]):
        given = [*system, *prompt] if in_prompt else prompt
        dialogues = [[*before, *answer] for answer in answers]
        if in_responses:
            dialogues = [[*system, *dialogue] for dialogue in dialogues]
        if space == "prompt":
            given = spaced(given)
        elif space == "responses":
            dialogues = [spaced(dialogue) for dialogue in dialogues]
        whole, is_repeated = read(given, *dialogues)
        assert is_repeated
        for dialogue, answer in zip(whole, answers):
            expected = [*system, *before, *answer]
            assert [message["role"] for message in dialogue] == [m["role"] for m in expected]
            texts = [message["content"].strip() for message in dialogue]
            assert texts == [message["content"] for message in expected]
        # What stands before the answers is the same, white space and all.
        assert all(dialogue[:-1] == whole[0][:-1] for dialogue in whole)


def test_a_text_prompt_beside_dialogues_is_the_users_message():
    assert read("hi", [U, A], [U, B]) == ([[U, A], [U, B]], True)
    assert read("hi", [S, U, A], [S, U, B]) == ([[S, U, A], [S, U, B]], True)
    assert read("More?", [U, A, U2, A2], [U, A, U2, B]) == ([[U, A, U2, A2], [U, A, U2, B]], True)
    assert read("hi\n", [U, A]) == ([[U | {"content": "hi\n"}, A]], True)


def test_earlier_turns_may_differ():
    dialogues = [[OTHER, A, U, A2], [OTHER, B, U, B]]
    assert read([U], *dialogues) == (dialogues, True)
    whole = [[S, *dialogue] for dialogue in dialogues]
    assert read([S, U], *dialogues) == (whole, True)
    assert read([U], *dialogues, system="Be brief.") == (whole, True)


@pytest.mark.parametrize(
    "prompt, responses",
    [
        ([U], [[A], [B]]),
        ([U], [[A, U2, A2], [B]]),
        ([U], [[A, U, B], [A, U]]),  # a later turn with the prompt's words
        ([S, U], [[A], [B], []]),
        ([U, A, U2], [[A2], [B]]),
        ([U, A], [[U2, A2], [U2, B]]),  # it goes on after the prompt
        ([S, U, A], [[U2, A2], [OTHER, B]]),
        ([U, A], [[U, B], [U, A2]]),  # the user asks again
        ([S], [[U, A], [U, B]]),
        ([S], [[A], [B]]),
        ([U, A], [[U2], [OTHER]]),
    ],
)
def test_other_messages_follow_the_prompt(prompt, responses):
    assert read(prompt, *responses) == ([prompt + response for response in responses], False)


@pytest.mark.parametrize(
    "prompt, responses, words",
    [
        ([U], [[OTHER, A], [OTHER, B]], "chosen begins with a user's message"),
        ([U], [[U, A], [OTHER, B]], "rejected begins with a user's message"),
        ("hi", [[OTHER, A], [OTHER, B]], "chosen begins with a user's message"),
        ("hi", [[U], [U, B]], "chosen begins with a user's message"),  # no answer
        ([U], [[OTHER, A, U, A2, U2, B], [U, B]], "chosen begins with a user's message"),  # between
        ([U, A, U2], [[U, A], [U, B]], "chosen begins with a user's message"),  # a part of it
        ([U, A], [[U, A], [U, A]], "chosen begins with a user's message"),  # and no answer
        ([U], [[S, A], [S, B]], "chosen begins with a system message"),
        ([U, A], [[S, U2, A2], [S, U2, B]], "chosen begins with a system message"),
        ([U], [[S], [S]], "chosen begins with a system message"),
        ([U], [[A], [OTHER, B], [B]], r"responses\[1\] begins with a user's message"),
    ],
)
def test_dialogues_without_the_prompt_are_ambiguous(prompt, responses, words):
    with pytest.raises(ValueError, match=f"^{words}") as error:
        read(prompt, *responses)
    for way_out in ("begins with an assistant's message", "--ignore_fields prompt"):
        assert way_out in str(error.value)


@pytest.mark.parametrize(
    "prompt, responses, kinds",
    [
        ([U], [[U, A], [B]], (REPEATS, ANSWERS)),
        ([U], [[A], [U, B]], (ANSWERS, REPEATS)),
        ([U], [[U, A], []], (REPEATS, ANSWERS)),
        ("hi", [[U, A], "B"], (REPEATS, ANSWERS)),
        ([U, A], [[U, A, U2, A2], [U2, B]], (REPEATS, CONTINUES)),
        ([U, A], [[U2, B], [A2]], (CONTINUES, ANSWERS)),
        ([S, U], [[A], [B], [S, U, A]], (ANSWERS, REPEATS)),
    ],
)
def test_responses_of_a_row_must_agree(prompt, responses, kinds):
    with pytest.raises(ValueError) as error:
        read(prompt, *responses)
    assert f" {kinds[0]}, " in str(error.value) and f" {kinds[1]}; all responses" in str(
        error.value
    )


# --------------------------------------------------------------------------------------------------
# System messages

X = S | {"content": "Be rude."}
SPACED = S | {"content": "\nBe brief. "}


@pytest.mark.parametrize("field", ["", "Be brief.", " Be brief.\n"])
@pytest.mark.parametrize("in_prompt", [[], [S], [SPACED]])
@pytest.mark.parametrize("in_responses", [[], [S], [SPACED]])
def test_equal_system_messages_are_one(field, in_prompt, in_responses):
    for dialogue in ([A], [U, A]):
        if in_responses and dialogue == [A]:
            continue
        responses = [[*in_responses, *dialogue], [*in_responses, *dialogue[:-1], B]]
        whole, _ = read([*in_prompt, U], *responses, system=field)
        count = int(bool(field or in_prompt or in_responses))
        for messages, answer in zip(whole, (A, B)):
            assert messages[count:] == [U, answer]
            assert [m["content"].strip() for m in messages[:count]] == ["Be brief."] * count


@pytest.mark.parametrize(
    "row, names",
    [
        (
            {"system": "Be rude.", "prompt": [S, U], "chosen": [A], "rejected": [B]},
            "prompt and system",
        ),
        ({"system": "Be rude.", "chosen": [S, U, A], "rejected": [S, U, B]}, "chosen and system"),
        ({"prompt": [S, U], "chosen": [X, U, A], "rejected": [X, U, B]}, "chosen and prompt"),
        ({"prompt": [S, U], "chosen": [U, A], "rejected": [X, U, B]}, "rejected and prompt"),
        ({"prompt": [U], "chosen": [S, U, A], "rejected": [X, U, B]}, "rejected and chosen"),
        (
            {"prompt": "hi", "responses": [[S, U, A], [S, U, B], [X, U, B]]},
            "responses[2] and responses[0]",
        ),
    ],
)
def test_different_system_messages_are_an_error(row, names):
    with pytest.raises(ValueError) as error:
        parse_row(json.dumps(row).encode())
    assert str(error.value) == f"{names} have different system messages; a row has one of them"


def test_a_system_message_in_some_dialogues_alone_is_an_error():
    with pytest.raises(ValueError, match="^chosen begins with a system message, rejected does not"):
        read([U], [S, U, A], [U, B])
    for whole in (
        read([S, U], [S, U, A], [U, B]),
        read([U], [S, U, A], [U, B], system="Be brief."),
    ):
        assert whole == ([[S, U, A], [S, U, B]], True)


def test_whole_dialogues_alone_stay_as_they_are():
    for pair in ([[S, U, A], [U, B]], [[U, A], [OTHER, B]], [[A], [B]], [[S, U, A], [X, U, B]]):
        row = {"chosen": pair[0], "rejected": pair[1]}
        found = parse_row(json.dumps(row).encode())
        assert (found["prompt"], found["responses"]) == ([], pair)
