"""Comparisons and how they become token ids, splits, batches, and the built-in data."""

import collections
import itertools
import json
import math
import random
import re

import numpy as np
import pytest
import torch

import data
from data import Comparison
from parts.rows import TWICE, Reading
from parts.test_tokenizers import tokenizer  # noqa: F401, a fixture

# --------------------------------------------------------------------------------------------------
# Rows


FIELDS = [  # a part of a row, and its margin, target and subset
    ('"margin": 1.5', (1.5, 1.0, None)),
    ('"margin": -2', (-2.0, 1.0, None)),
    ('"margin": null', (0.0, 1.0, None)),
    ('"other": 1', (0.0, 1.0, None)),
    ('"target": 0.25', (0.0, 0.25, None)),
    ('"target": 0', (0.0, 0.0, None)),
    ('"margin": 2, "target": 1', (2.0, 1.0, None)),
    ('"subset": "math"', (0.0, 1.0, "math")),
    ('"subset": 3, "target": 0.5', (0.0, 0.5, "3")),
]


@pytest.mark.parametrize("row, expected", FIELDS)
def test_margin_target_and_subset_of_a_row_go_with_it_to_the_tokens(
    tmp_path, tokenizer, row, expected
):
    def fields(found):
        return [(one.margin, one.target, one.subset) for one in found]

    file = tmp_path / "rows.jsonl"
    file.write_text(
        '{"prompt": "a", "chosen": "b", "rejected": "c", %s}\n'
        '{"prompt": "a", "chosen": "c", "rejected": "b", "subset": "other"}\n' % row
    )
    other = (0.0, 1.0, "other")
    assert fields(data.load_comparisons(file)) == [expected, other]
    tokens = data.tokenize_file(file, tokenizer, 64, "left", tmp_path / "cache")
    both = data.select([tokens], np.array([[0, 1], [0, 0]]))
    assert fields(both[i] for i in range(2)) == [other, expected]
    assert fields([data.tokenize_all(data.load_comparisons(file), tokenizer, 64)[0]]) == [expected]


# --------------------------------------------------------------------------------------------------
# --data_split


@pytest.mark.parametrize(
    "n, shares, bounds",
    [
        (10, [0, 1, 0], [0, 0, 10, 10]),  # the default: everything is ours
        (11, [6, 2, 2], [0, 7, 9, 11]),  # 6.6, 2.2, 2.2
        (
            8,
            [1, 1, 1],
            [0, 2, 5, 8],
        ),  # 2.67 each, rounded 3, 6, 9: one too many, taken off every boundary but the first
        (7, [1, 1, 1], [0, 3, 5, 7]),  # 2.33 each, rounded 2, 4, 6: one too few
        (5, [1, 1], [0, 3, 5]),  # 2.5 each, rounded to even: 2, 4
        (3, [1, 1], [0, 1, 3]),  # 1.5 each, rounded to even: 2, 4
        (1, [1, 1, 1], [0, 1, 1, 1]),
        (3, [0, 1, 1], [0, -1, 1, 3]),  # as there: -1 counts from the end, and stage 2 gets nothing
    ],
)
def test_split_is_deepspeed_chats(n, shares, bounds):
    """Boundaries are worked by hand; the shuffle is known, as NumPy has frozen RandomState."""
    order = np.arange(n, dtype=np.uint32)
    np.random.RandomState(1234).shuffle(order)
    assert n != 10 or order.tolist() == [7, 2, 9, 1, 0, 8, 4, 5, 6, 3]
    for stage in range(len(shares)):
        indices = data.split_indices(n, shares, stage, seed=1234)
        assert indices.dtype == np.uint32
        assert indices.tolist() == order[bounds[stage] : bounds[stage + 1]].tolist()


@pytest.mark.parametrize(
    "shares", [[1, 1, 1], [2, 4, 4], [0.6, 0.2, 0.2], [3, 5, 7, 11], [1, 0, 1]]
)
def test_stages_are_disjoint_and_cover_everything(shares):
    for n in (1, 2, 3, 10, 101, 997):
        stages = [
            data.split_indices(n, shares, stage, seed=n).tolist() for stage in range(len(shares))
        ]
        assert sorted(itertools.chain(*stages)) == list(range(n))
        assert all(
            abs(len(stage) - n * share / sum(shares)) <= len(shares)
            for stage, share in zip(stages, shares)
        )


# --------------------------------------------------------------------------------------------------
# Sequences


class Letters:
    """A tokenizer with one token a letter, so that tests show the cuts: < is bos, > eos, _ pad."""

    has_own_template = False

    def __init__(self, bos_id="<", eos_id=">", pad_id="_"):
        self.bos_id, self.eos_id, self.pad_id = (
            letter and ord(letter) for letter in (bos_id, eos_id, pad_id)
        )

    def encode(self, text):
        return list(map(ord, text))

    def encode_batch(self, texts):
        return [self.encode(text) for text in texts]

    def is_space(self, token_id):
        return chr(token_id).isspace()

    def fingerprint(self):
        return repr(vars(self))


def letters(groups):
    return [["".join(map(chr, ids)) for ids in group] for group in groups]


def groups_of(file) -> list[list[list[int]]]:
    return [file[row].sequences for row in range(len(file))]


def sequences(prompt, *responses, max_seq_len=99, side="left", **special):
    return letters(
        [data.tokenize(Comparison(prompt, list(responses)), Letters(**special), max_seq_len, side)]
    )[0]


def test_a_sequence_is_bos_text_eos():
    assert sequences("p:", "ab", "c") == ["<p:ab>", "<p:c>"]
    assert sequences("p:", "ab", "c", bos_id=None) == ["p:ab>", "p:c>"]
    assert sequences("p:", "ab", "c", eos_id=None) == ["<p:ab", "<p:c"]
    assert sequences("p:", "ab", "c", eos_id="_") == [
        "<p:ab",
        "<p:c",
    ]  # an eos that is the pad could not be told from it
    assert sequences("p:", "ab", "c", bos_id="_") == [
        "_p:ab>",
        "_p:c>",
    ]  # num_padding_at_beginning 1
    assert sequences("", "", "c") == ["<>", "<c>"]
    with pytest.raises(
        ValueError, match=r"responses\[1\] .* empty"
    ):  # no token that could have a reward
        sequences("", "c", "", bos_id=None, eos_id=None)


def test_truncation_worked_by_hand():
    """Left: bos and eos stay; every response loses as many tokens, out of those that all share,
    until the longest fits; then ends go. Right: the end goes, eos with it (DeepSpeed-Chat)."""
    assert sequences("prompt", "ab", "c", max_seq_len=10) == ["<promptab>", "<promptc>"]
    assert sequences("prompt", "ab", "c", max_seq_len=8) == ["<omptab>", "<omptc>"]
    assert sequences("p", "abcd", "xy", max_seq_len=5) == ["<abc>", "<xy>"]
    assert sequences("p", "abx", "aby", max_seq_len=4) == [
        "<bx>",
        "<by>",
    ]  # what the responses share is shared too
    assert sequences("pq", "", "abc", max_seq_len=5) == ["<>", "<abc>"]
    assert sequences("pq", "a", "b", "cd", max_seq_len=5) == ["<qa>", "<qb>", "<qcd>"]
    assert sequences("pq", "abc", max_seq_len=4) == [
        "<ab>"
    ]  # a single response shares with others its prompt, and no more
    assert sequences("prompt", "ab", "c", max_seq_len=9, side="right") == ["<promptab", "<promptc>"]
    assert sequences("prompt", "ab", "c", max_seq_len=4, side="right") == ["<pro", "<pro"]


def truncate_token_by_token(prompt, texts, bos, eos, max_seq_len, side):
    """Truncate by the contract's rule, one token after the other."""
    cut = lambda rows, size: [row[:-1] if len(row) > size else row for row in rows]  # noqa: E731
    if side == "right":
        rows = [bos + text + eos for text in texts]
        while max(map(len, rows)) > max_seq_len:
            rows = cut(rows, max_seq_len)
        return rows
    room = max_seq_len - len(bos + eos)
    while (
        max(map(len, texts)) > room
        and all(texts)
        and len({text[0] for text in texts}) == 1
        and (len(texts) > 1 or prompt)
        and (bos or eos or min(map(len, texts)) > 1)
    ):  # every sequence keeps a token
        texts, prompt = [text[1:] for text in texts], prompt[1:]
    while max(map(len, texts)) > room:
        texts = cut(texts, room)
    return [bos + text + eos for text in texts]


@pytest.mark.parametrize("side", ["left", "right"])
def test_truncation_against_token_by_token(side):
    rng = random.Random(0)
    for _ in range(4000):
        bos_id, eos_id = rng.choice(["<", None]), rng.choice([">", None, "_"])
        bos, eos = bos_id or "", ">" if eos_id == ">" else ""
        least = 0 if bos or eos else 1
        prompt, *responses = (
            "".join(rng.choices("ab", k=rng.randint(least, 7))) for _ in range(rng.randint(2, 5))
        )
        texts, max_seq_len = [prompt + response for response in responses], rng.randint(2, 16)
        found = sequences(
            prompt, *responses, max_seq_len=max_seq_len, side=side, bos_id=bos_id, eos_id=eos_id
        )
        assert found == truncate_token_by_token(prompt, texts, bos, eos, max_seq_len, side)
        if side == "left" and (bos or eos) and max_seq_len > 2:
            assert (len(set(found)) > 1) == (
                len(set(texts)) > 1
            )  # responses that differ stay different: no pair is lost


def test_prompt_and_response_are_encoded_as_one_string():
    """A token may reach across the boundary, as it does when the model reads text."""
    tokenizer = data.train_tokenizer(["ab", "ab c", "cab"] * 9, 300)
    (ab,), (c,) = tokenizer.encode("ab"), tokenizer.encode("c")
    assert data.tokenize(Comparison("a", ["b", "bc"]), tokenizer, 9) == [[1, ab, 2], [1, ab, c, 2]]


def test_tokenize_all_drops_repeats_and_counts_identical_and_truncated_comparisons():
    comparisons = [
        Comparison("p", ["same", "same"], [1.0, 0.0]),
        Comparison("p", ["a", "b"], [2.0, 1.0], target=0.75, subset="s"),
        Comparison(
            "longer", ["a", "b"], [3.0, 2.0]
        ),  # <longe and <longe, once the right side is cut
        Comparison("p", ["a", "a", "b"], [3.0, 2.0, 1.0]),
        Comparison("p", ["a", "a", "a"]),
        Comparison("p", ["b", "long", "a", "lone", "b"]),  # two are the same once they are cut
    ]
    kept = data.tokenize_all(comparisons, Letters(), 6, "right")
    assert letters(groups_of(kept)) == [
        ["<pa>", "<pb>"],
        ["<pa>", "<pb>"],
        ["<pb>", "<plong", "<pa>", "<plone"],
    ]
    assert (len(kept), kept.dropped, kept.truncated) == (3, 3, 1)
    assert [kept[i]._replace(sequences=[]) for i in range(3)] == [
        data.Tokenized([], "built-in comparison 2", 0.0, [2.0, 1.0], 0.75, "s", False),
        data.Tokenized([], "built-in comparison 4", 0.0, [3.0, 1.0]),
        data.Tokenized([], "built-in comparison 6", truncated=True),
    ]
    assert letters(groups_of(data.tokenize_all(comparisons, Letters(), 5, "right")))[2] == [
        "<pb>",
        "<plon",
        "<pa>",
    ]
    kept = data.tokenize_all(comparisons, Letters(), 6, "left")
    assert (kept.dropped, kept.truncated) == (2, 2)


def whole(comparison, **special) -> list[list[int]]:
    return data.tokenize(comparison, Letters(**special), 10**6)


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_comparison_counts_as_truncated_where_a_token_is_missing(side):
    """Against the lengths of the sequences without a limit, around each length."""
    rng = random.Random(0)
    for _ in range(2000):
        bos_id, eos_id = rng.choice(["<", None]), rng.choice([">", None, "_"])
        letters = ["cd", *["ab"] * rng.randint(1, 4)]  # no response repeats the prompt
        prompt, *responses = ("".join(rng.choices(of, k=rng.randint(1, 7))) for of in letters)
        comparison = Comparison(prompt, responses)
        special = dict(bos_id=bos_id, eos_id=eos_id)
        longest = max(map(len, whole(comparison, **special)))
        max_seq_len = max(2, longest + rng.randint(-3, 3))
        (found, *_), *_ = data.tokenize_rows(
            [json.dumps({"prompt": prompt, "responses": responses * 2}).encode()],
            Letters(**special),
            max_seq_len,
            side,
            Reading(),
        )
        assert found.truncated == (longest > max_seq_len)


def test_rankings_that_repeat_a_response_are_noted_and_pairs_are_not():
    rows = [["a", "b", "a"], ["a", "b"], ["a", "a"], ["b", "b", "b"]]
    rows = [json.dumps({"prompt": "p", "responses": row, "x": 1}).encode() for row in rows]
    found = data.tokenize_rows(rows, Letters(), 9, "left", Reading())
    assert [letters([row.sequences])[0] for row, _ in found] == [
        ["<pa>", "<pb>"],
        ["<pa>", "<pb>"],
        [],
        [],
    ]
    unread = 'field "x" is not read'
    assert [notes for _, notes in found] == [(unread, TWICE), (unread,), (unread,), (unread,)]


# --------------------------------------------------------------------------------------------------
# Batches


def test_pad_rows():
    """A pad id inside a text is text: the mask says so."""
    input_ids, mask = data.pad_rows([[5, 0, 6], [7]], pad_id=0)
    assert input_ids.tolist() == [[5, 0, 6], [7, 0, 0]] and mask.tolist() == [[1, 1, 1], [1, 0, 0]]
    assert input_ids.dtype == mask.dtype == torch.int64


# --------------------------------------------------------------------------------------------------
# The built-in data

# Every statement that a response can make: (the question that it answers, the answer, is it true)
STATEMENTS = {
    statement.format(subject, answer): (question.format(subject), answer, answer == facts[subject])
    for question, statement, facts in data.QUESTIONS
    for subject in facts
    for answer in facts.values()
}
REMARKS = {
    remark: tone for remarks in data.TONES for tone, remark in zip(("polite", "rude"), remarks)
}


@pytest.fixture(scope="module")
def pairs():
    return list(itertools.islice(data.known_rewards(seed=7), 24_000))


def better_first(pairs) -> float:
    """Return the share of pairs whose label is the sign of the true difference: the accuracy of a
    model that knows the true rewards."""
    return sum(pair.rewards[0] > pair.rewards[1] for pair in pairs) / len(pairs)


def words(text: str) -> list[str]:
    return re.findall(r"\w+|[^\w\s]", text)


def read(prompt: str, response: str) -> tuple[str, str, int, str]:
    """Read (quality, tone, number of rambling sentences, answer) from the text alone."""
    question, whole = re.fullmatch(r"\n\nHuman: (.*)\n\nAssistant:", prompt)[1], response
    remarks = [remark for remark in REMARKS if remark in response]
    rambles = [ramble for ramble in data.RAMBLES if ramble in response]
    for sentence in remarks + rambles:
        response = response.replace(" " + sentence, "", 1)
    assert whole == " ".join([response, *remarks, *rambles])  # in this order
    answered, answer, true = STATEMENTS[response[1:]]  # nothing else is left
    assert true or answered == question  # what is off topic is true
    quality = "off topic" if answered != question else "right" if true else "wrong"
    return quality, REMARKS[remarks[0]] if remarks else "neutral", len(rambles), answer


def test_same_seed_same_pairs(pairs):
    """The stream is the same whatever else draws random numbers meanwhile."""
    stream = data.known_rewards(seed=7)
    for expected in pairs[:100]:
        random.seed(1)
        assert next(stream) == expected
    assert sum(a == b for a, b in zip(pairs, itertools.islice(data.known_rewards(seed=8), 100))) < 5


def test_true_rewards_follow_from_the_text(pairs):
    seen = collections.Counter()
    for pair in pairs[:2000]:
        for response, reward in zip(pair.responses, pair.rewards):
            quality, tone, rambles, _ = read(pair.prompt, response)
            seen.update([quality, tone, rambles])
            expected = (
                data.QUALITY_REWARD[quality] + data.TONE_REWARD[tone] + data.RAMBLE_REWARD * rambles
            )
            assert reward == pytest.approx(expected, abs=1e-6)
    assert (
        set(seen) == {"right", "wrong", "off topic", "polite", "neutral", "rude", 0, 1}
        and min(seen.values()) > 200
    )


def test_labels_follow_bradley_terry(pairs):
    """At every difference d of true rewards the better response comes first with frequency
    sigmoid(d): within 4 standard deviations of the binomial, and 1 count for the rare differences.
    True rewards predict most labels, not all."""
    assert 0.75 < better_first(pairs) < 0.92
    by_difference = collections.defaultdict(list)
    for pair in pairs:
        by_difference[round(abs(pair.rewards[0] - pair.rewards[1]), 6)].append(pair)
    for d, group in by_difference.items():
        n, p = len(group), 1 / (1 + math.exp(-d))
        assert d > 0  # equal rewards teach nothing
        assert abs(n * better_first(group) - n * p) <= 4 * math.sqrt(n * p * (1 - p)) + 1


def test_no_answer_is_better_than_another(pairs):
    """Each answer of a kind is right for one question and wrong for all others. So each stands in
    the same share of right as of wrong responses: within 4.5 standard deviations."""
    assert len(STATEMENTS) == sum(
        len(facts) ** 2 for _, _, facts in data.QUESTIONS
    )  # no two facts of a kind have one answer
    read_all = [read(pair.prompt, response) for pair in pairs for response in pair.responses]
    right, wrong = (
        collections.Counter(row[-1] for row in read_all if row[0] == quality)
        for quality in ("right", "wrong")
    )
    p = right.total() / (right + wrong).total()
    assert (
        set(right)
        == set(wrong)
        == {answer for _, _, facts in data.QUESTIONS for answer in facts.values()}
    )
    for answer, n in (right + wrong).items():
        assert abs(right[answer] - n * p) <= 4.5 * math.sqrt(n * p * (1 - p)), answer


def test_counting_words_is_not_enough(pairs):
    """The best linear reward over word counts (the convex Bradley-Terry fit) stays 0.05 below Bayes
    on held-out pairs. To get further, a model has to read the question and the order of words; a
    polite and a rude remark have the same words."""
    assert all(
        polite != rude and sorted(words(polite)) == sorted(words(rude))
        for polite, rude in data.TONES
    )
    counts = [
        [collections.Counter(words(response)) for response in pair.responses] for pair in pairs
    ]
    column = {word: i for i, word in enumerate(sorted(set().union(*itertools.chain(*counts))))}
    features = torch.zeros(len(pairs), len(column))  # chosen - rejected
    for row, (chosen, rejected) in zip(features.numpy(), counts):
        for word in chosen | rejected:
            row[column[word]] = chosen[word] - rejected[word]
    weight = torch.zeros(len(column), requires_grad=True)
    optimizer = torch.optim.LBFGS([weight], max_iter=100, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = (
            torch.nn.functional.softplus(-features[:20_000] @ weight).mean()
            + 1e-4 * weight.square().sum()
        )
        loss.backward()
        return loss

    optimizer.step(closure)
    margins = (features[20_000:] @ weight).detach()
    accuracy = ((margins > 0).double() + 0.5 * (margins == 0)).mean().item()
    best = better_first(pairs[20_000:])
    print(f"accuracy of counting words {accuracy:.4f}, Bayes-optimal {best:.4f}")
    assert accuracy < best - 0.05
    # It has learned what words alone teach, such as to dislike rambling. One standard deviation is
    # 0.008.
    assert accuracy > 0.52
