"""`python rm.py`: the scores that it writes, models that it converts, and how it hands over."""

import itertools
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

import data
import train
from model import GPT, GPTConfig
from parts.huggingface import LAYOUTS
from parts.normalize import normalize
from parts.test_tokenizers import (
    FAILING,
    FAST,
    byte_level,
    failing_tokenizer,
    hub_files,
    sentencepiece_model,
)
from rm import RewardModel
from tools import score

HERE = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Train a tiny model for three steps."""
    directory = tmp_path_factory.mktemp("trained")
    sizes = ["--n_layer", "2", "--n_head", "2", "--n_embd", "32", "--max_seq_len", "64"]
    run = ["--max_steps", "3", "--eval_iters", "4", "--output_dir", str(directory)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["train.py", *sizes, *run])
        patch.setattr(signal, "signal", lambda *_: None)  # an interrupt stays pytest's
        train.main()
    return directory


def with_error(outcomes):
    """Write the share of what is right as the program does: "0.6250 ± 0.0988 (24 pairs)"."""
    share, n = np.mean(outcomes), len(outcomes)
    estimate = (sum(outcomes) + 1) / (n + 2) if share in (0, 1) else share
    noun = "pair" if n == 1 else "pairs"
    return f"{share:.4f} ± {math.sqrt(estimate * (1 - estimate) / n):.4f} ({n} {noun})"


def write_rows(path, n, ranking=()):
    """Write n rows of the built-in data; the rows numbered in `ranking` become rankings of 3."""
    with open(path, "w") as file:
        for i, c in enumerate(itertools.islice(data.known_rewards(0), n)):
            row = {"prompt": c.prompt, "chosen": c.responses[0], "rejected": c.responses[1]}
            if i in ranking:
                row = {"prompt": c.prompt, "responses": [*c.responses, " No."]}
            file.write(json.dumps(row) + "\n")
    return path


def run(*arguments, program=HERE / "rm.py", **how):
    """Run `python rm.py` as a user does, in a process."""
    command = [sys.executable, str(program), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, **how)


@pytest.fixture
def run_here(monkeypatch, capsys):
    """Run the program in this process, which is sooner there: (what it exits with, stdout)."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["rm.py", *map(str, arguments)])
        capsys.readouterr()
        try:
            status = score.main()
        except SystemExit as stop:
            status = stop.code
            if isinstance(status, int):
                status = capsys.readouterr().err.splitlines()[-1]
        return status, capsys.readouterr().out

    return run


@pytest.fixture(scope="module")
def chat_checkpoint(tmp_path_factory):
    """Save a small reward model whose tokenizer has a chat template of its own."""
    directory = tmp_path_factory.mktemp("chat")
    template = (
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}"
        "{% endif %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    special = ["<|im_start|>", "<|im_end|>"]
    config = {"eos_token": "<|im_end|>", "chat_template": template, **FAST}
    hub_files(directory / "hub", backend=byte_level(special), config=config)
    tokenizer = data.load_tokenizer(directory / "hub")
    torch.manual_seed(0)
    tiny = GPTConfig("llama", vocab_size=301, n_positions=200, n_layer=2, n_head=2, n_embd=16)
    model = RewardModel(GPT(tiny), tokenizer.pad_id)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    model.save_pretrained(directory / "model", tokenizer=tokenizer)
    return directory / "model"


# --------------------------------------------------------------------------------------------------
# Scores


def messages(*contents, first="user"):
    """Make messages of user and assistant in turn."""
    roles = ["user", "assistant"] if first == "user" else ["assistant", "user"]
    return [{"role": role, "content": c} for role, c in zip(itertools.cycle(roles), contents)]


def test_messages_are_scored_by_the_checkpoints_template(chat_checkpoint, tmp_path, run_here):
    """Ids are those of transformers, but for the newline behind the last <|im_end|>."""
    theirs = transformers.AutoTokenizer.from_pretrained(chat_checkpoint)
    prompt = messages("the cat", "a dog", "and?")
    answers = [messages(text, first="assistant") for text in ("a mat", "a log", "a log", "")]
    rows = [
        {"prompt": prompt, "chosen": answers[0], "rejected": answers[1]},
        {"prompt": prompt, "responses": answers},
        {"prompt": prompt, "response": answers[0]},
        {"chosen": prompt + answers[0], "rejected": prompt + answers[1]},
        {"prompt": "the cat", "chosen": " a", "rejected": " b"},
    ]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    status, printed = run_here(chat_checkpoint, file)
    assert status is None
    lines = [json.loads(line) for line in printed.splitlines()]
    by_hand = []
    model = score.trained_model(chat_checkpoint)
    for answer in answers:
        ids = theirs.apply_chat_template(prompt + answer, tokenize=True, return_dict=False)
        assert theirs.decode(ids[-2:]) == "<|im_end|>\n"
        ids = torch.tensor([ids[:-1]])
        by_hand.append(model.forward_value(ids)["chosen_end_scores"].item())
    close = pytest.approx(by_hand, abs=1e-5)
    assert lines[1]["scores"] == close and len(set(by_hand)) == 3
    assert lines[0]["scores"] == pytest.approx(by_hand[:2], abs=1e-5)
    assert lines[3]["scores"] == pytest.approx(by_hand[:2], abs=1e-5)
    assert lines[2]["score"] == pytest.approx(by_hand[0], abs=1e-5)


@pytest.mark.parametrize("flags", [[], ["--show"], ["--html"]], ids=str)
def test_a_row_that_the_template_refuses_is_named(chat_checkpoint, tmp_path, run_here, flags):
    system = [{"role": "system", "content": "Be brief."}, *messages("the cat")]
    answer = messages("a", first="assistant"), messages("b", first="assistant")
    rows = [
        {"prompt": prompt, "chosen": answer[0], "rejected": answer[1]}
        for prompt in (messages("the cat"), system)
    ]
    file = tmp_path / "rows.jsonl"
    file.write_text("\n" + "".join(json.dumps(row) + "\n" for row in rows))
    if flags == ["--html"]:
        flags = ["--html", tmp_path / "page.html"]
    message, printed = run_here(chat_checkpoint, file, *flags)
    assert message.startswith(f"rm.py: error: {file}:3: the chat template of {chat_checkpoint}/")
    assert message.endswith("does not take these messages: no system")


def test_scores_of_comparisons_and_of_single_rows(trained, tmp_path, run_here):
    """The score of a response does not depend on how its row is given."""
    pairs = write_rows(tmp_path / "pairs.jsonl", 9, ranking={4})
    rows = [json.loads(line) for line in pairs.read_text().splitlines()]
    done = run(trained, pairs, "--batch_size", 4)
    assert done.returncode == 0, done.stderr
    scores = [json.loads(line)["scores"] for line in done.stdout.splitlines()]
    assert [len(s) for s in scores] == [2, 2, 2, 2, 3, 2, 2, 2, 2]
    margins = [s[i] - s[j] for s in scores for i in range(len(s)) for j in range(i + 1, len(s))]
    assert len(margins) == 11
    assert f"accuracy {with_error([m > 0 for m in margins])}, mean margin" in done.stderr
    singles = tmp_path / "singles.jsonl"
    singles.write_text(
        "\n".join(
            json.dumps({"prompt": row["prompt"], "response": row["chosen"]})
            for row in rows
            if "chosen" in row
        )
    )
    out = tmp_path / "scores.jsonl"
    assert run_here(trained, singles, "--out", out) == (None, "")
    status, reference = run_here(trained, pairs, "--layout", "padded", "--batch_size", 1)
    assert [json.loads(line)["scores"] for line in reference.splitlines()] == [
        pytest.approx(s, abs=1e-5) for s in scores
    ]
    before = out.read_text()
    message, _ = run_here(trained, singles, "--out", singles)
    assert "which is the file to score" in message
    message, _ = run_here(trained, tmp_path / "missing.jsonl", "--out", out)
    assert "no such file" in message
    assert out.read_text() == before and singles.read_text() != ""
    got = [json.loads(line)["score"] for line in before.splitlines()]
    assert got == pytest.approx([s[0] for s in scores if len(s) == 2], abs=1e-5)


def rows_file(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def scored(trained, tmp_path, monkeypatch, capsys):
    """Score rows in this process: (the lines of scores, the lines on standard error)."""

    def run(file, *flags):
        out = tmp_path / "scored.jsonl"
        arguments = [trained, file, "--out", out, *flags]
        monkeypatch.setattr(sys, "argv", ["rm.py", *map(str, arguments)])
        capsys.readouterr()
        score.main()
        said = capsys.readouterr().err.splitlines()
        lines = [line for line in said if line and " rows [" not in line]  # the bar's have it
        return [json.loads(line) for line in out.read_text().splitlines()], lines

    return run


def test_repeated_responses_have_scores_and_no_pairs(tmp_path, scored):
    """A ranking counts as if it had the response once; identical pairs are counted apart."""
    best, middle, worst = " Paris.", " Rome.", " No."
    rows = [
        {"prompt": "Where?", "responses": [best, best, worst]},
        {"prompt": "Where?", "responses": [best, middle, best, worst, middle]},
        {"prompt": "Where?", "responses": [worst, worst, worst]},
        {"prompt": "Where?", "chosen": best, "rejected": best},
        {"prompt": "Where?", "chosen": worst, "rejected": worst},
        {"prompt": "Where?", "chosen": middle, "rejected": worst},
    ]
    found, said = scored(rows_file(tmp_path / "a.jsonl", *rows))
    assert [len(row["scores"]) for row in found] == [3, 5, 3, 2, 2, 2]
    assert found[0]["scores"][0] == pytest.approx(found[0]["scores"][1], abs=1e-6)
    pairs = [(0, 0, 2), (1, 0, 1), (1, 0, 3), (1, 1, 3), (5, 0, 1)]  # row, better, worse
    margins = [found[row]["scores"][i] - found[row]["scores"][j] for row, i, j in pairs]
    assert said[-1].startswith(f"accuracy {with_error([m > 0 for m in margins])}, mean margin ")
    assert f"mean margin {np.mean(margins):.4f}; 2 identical pairs left out; 3 rankings" in said[-1]
    only = rows_file(tmp_path / "b.jsonl", rows[3])
    assert scored(only)[1] == ["1 identical pair left out"]


@pytest.mark.parametrize("kind", ["text", "messages", "dialogues"])
def test_rows_of_one_chosen_and_several_rejected_texts(
    trained, tmp_path, scored, monkeypatch, kind
):
    """RewardBench 2: the share of rows whose chosen text scores highest, by hand, and by subset.

    Scores equal those of the texts in rows of their own.
    """
    answers, rows = [" Paris.", " Rome.", " No.", " Oslo is a city."], []
    for subset, chosen in (("Math", 0), ("Math", 1), ("Focus", 2), (None, 3), ("Focus", 1)):
        others = answers[:chosen] + answers[chosen + 1 :]
        row = {"prompt": "Where?", "chosen": [answers[chosen]], "rejected": others}
        rows.append(row | {"subset": subset})
    rows[4]["rejected"] = [answers[1], answers[2]]  # a tie at best
    singles = [{"prompt": "Where?", "response": answer} for answer in answers]
    if kind != "text":
        for row in [*rows, *singles]:
            row["prompt"] = messages(row["prompt"])
    if kind == "dialogues":
        for row in rows:
            for name in ("chosen", "rejected"):
                row[name] = [messages(text, first="assistant") for text in row[name]]
    alone, _ = scored(rows_file(tmp_path / "singles.jsonl", *singles))
    known = dict(zip(answers, [row["score"] for row in alone]))
    file = rows_file(tmp_path / "rows.jsonl", *rows)
    found, said = scored(file)
    is_best = []
    for line, row in zip(found, rows, strict=True):
        texts = [*row["chosen"], *row["rejected"]]
        if kind == "dialogues":
            texts = [text[0]["content"] for text in texts]
        assert line["scores"] == pytest.approx([known[text] for text in texts], abs=1e-5)
        is_best.append(all(known[texts[0]] > known[text] for text in texts[1:]))
    assert is_best[4] is False and sum(is_best) == 1
    title = "the chosen text scores highest"
    assert said[0].startswith(f"{title}: {with_error(is_best).replace('pairs', 'rows')}")
    by = {"Focus": [is_best[2], is_best[4]], "Math": is_best[:2]}
    subsets = [f"  {name}: {with_error(own).replace('pairs', 'rows')}" for name, own in by.items()]
    assert said[1:] == [f"{title}, by subset:", *subsets]
    # train.py names the row and the way out.
    monkeypatch.setattr(sys, "argv", ["train.py", "--data_path", str(file)])
    with pytest.raises(SystemExit) as stop:
        train.main()
    assert f"{file}:1: chosen and rejected: found lists of responses" in str(stop.value)
    assert "give each rejected response a row of its own" in str(stop.value)


def test_a_chosen_text_that_is_rejected_too_ties_and_is_not_highest():
    comparison = data.Comparison("", ["a", "b", "a"], ranked=False)
    counts = score.Counts()
    counts.add(comparison, [[1], [2], [1]], [3.0 + 1e-7, 1.0, 3.0])
    counts.add(comparison, [[1], [2], [1]], [3.0, 4.0, 3.0])
    counts.add(comparison, [[1], [2], [3]], [3.0, 3.0, 1.0])
    counts.add(comparison, [[1], [2], [3]], [3.0, 2.0, 1.0])
    assert [lead for lead, _ in counts.leads] == [0.0, -1.0, 0.0, 1.0]
    assert counts.summary(9) == [
        "the chosen text scores highest: 0.2500 ± 0.2165 (4 rows); 2 ties count as wrong"
    ]


@pytest.mark.parametrize("targets", [[1], [0.25], [0.5, 1], [0.5, 0.2, 0.9]])
def test_accuracy_of_soft_labels(tmp_path, scored, targets):
    """A target of 0.5 has no right side, a lower one is reversed; the pairs are counted."""
    row = {"prompt": "Where?", "chosen": " Paris.", "rejected": " No."}
    rows = [row | {"target": target} for target in targets]
    found, said = scored(rows_file(tmp_path / "a.jsonl", *rows))
    margin = found[0]["scores"][0] - found[0]["scores"][1]
    right = [(margin > 0) == (target > 0.5) for target in targets if target != 0.5]
    assert said[-1].startswith(f"accuracy {with_error(right)}, mean margin ")
    left_out = "; 1 pair of target 0.5 left out"
    assert said[-1].endswith(left_out) == (len(right) < len(targets))


def test_rows_that_are_truncated_are_counted(tmp_path, scored):
    rows = [
        {"prompt": "Where?", "chosen": " Paris." * 20, "rejected": " No."},
        {"prompt": "Where?", "chosen": " Paris.", "rejected": " No."},
        {"prompt": "Where?" * 30, "chosen": " Paris.", "rejected": " No."},
    ]
    file = rows_file(tmp_path / "a.jsonl", *rows)
    assert scored(file, "--max_seq_len", 20)[1][-1].endswith("; 2 rows truncated to 20 tokens")
    assert "truncated" not in scored(rows_file(tmp_path / "b.jsonl", rows[1]))[1][-1]
    singles = [{"prompt": row["prompt"], "response": row["chosen"]} for row in rows]
    file = rows_file(tmp_path / "c.jsonl", *singles)
    assert scored(file, "--max_seq_len", 20)[1] == ["2 rows truncated to 20 tokens"]


def test_flags_for_fields_and_notes_on_them(
    tmp_path, scored, trained, run_here, monkeypatch, capsys
):
    """Files of a directory, in order; what is not read is named for each, also for a page."""
    folder = tmp_path / "folder"
    folder.mkdir()
    ours = {"prompt": "Where?", "chosen": " Paris.", "rejected": " No."}
    theirs = {"question": "Where?", "good": " Paris.", "bad": " No.", "label": "x", "kind": 1}
    expected, _ = scored(rows_file(tmp_path / "ours.jsonl", ours))
    rows_file(folder / "b.jsonl", theirs | {"more": 1})
    rows_file(folder / "a.jsonl", theirs, theirs)
    flags = ["--fields", "prompt=question", "chosen=good", "rejected=bad"]
    flags += ["--ignore_fields", "kind", "other"]
    for path in (folder, f"{folder}/*.jsonl"):
        found, said = scored(path, *flags)
        assert [row["scores"] for row in found] == [
            pytest.approx(expected[0]["scores"], abs=1e-6)
        ] * 3
        assert said[:4] == [
            f'{folder}/a.jsonl: field "label" is not read (2 rows)',
            f'{folder}/b.jsonl: field "label" is not read (1 row)',
            f'{folder}/b.jsonl: field "more" is not read (1 row)',
            '--ignore_fields other: no row has a field "other"',
        ]
        assert "(3 pairs)" in said[4]
    message, _ = run_here(trained, folder)
    assert f"{folder}/a.jsonl:1: fields found: question, good, bad" in message
    message, _ = run_here(trained, folder, "--fields", "chosen=good", "rejected=bad")
    assert f"{folder}/a.jsonl:1: " in message and "--fields prompt=question " in message
    message, _ = run_here(trained, folder, "--fields", "promt=question")
    assert "argument --fields: found promt=question" in message
    message, _ = run_here(trained, folder, *flags, "--out", folder / "a.jsonl")
    assert "a.jsonl, which is the file to score" in message
    page = tmp_path / "page.html"
    arguments = ["rm.py", str(trained), str(folder), *flags, "--html", str(page)]
    monkeypatch.setattr(sys, "argv", arguments)
    score.main()
    said = capsys.readouterr().err
    assert "all 3 rows" in page.read_text()
    assert f'{folder}/b.jsonl: field "more" is not read (1 row)' in said
    assert '--ignore_fields other: no row has a field "other"' in said
    monkeypatch.setattr(sys, "argv", [*arguments, "--rows", "1"])
    score.main()
    said = capsys.readouterr().err
    assert "(1 row)" in said and "--ignore_fields" not in said  # it has not read all


def test_summary_has_targets_and_subsets(trained, tmp_path, monkeypatch, capsys):
    """By hand from the scores that are written; rows without a subset count in the whole alone."""
    file = write_rows(tmp_path / "rows.jsonl", 12, ranking={4})
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    for i, row in enumerate(rows):
        if "chosen" in row:
            row["target"] = [1.0, 0.25, 0.5][i % 3]
        if i % 4:
            row["subset"] = f"part {i % 4}"
    file.write_text("\n".join(map(json.dumps, rows)))
    monkeypatch.setattr(sys, "argv", ["rm.py", str(trained), str(file)])
    score.main()
    said = capsys.readouterr()
    outcomes = {"all": []}
    for row, line in zip(rows, said.out.splitlines(), strict=True):
        for better, worse in itertools.combinations(json.loads(line)["scores"], 2):
            target = row.get("target", 1.0)
            is_right = better > worse if target > 0.5 else worse > better
            for name in {"all", row.get("subset", "all")}:
                outcomes.setdefault(name, []).append(None if target == 0.5 else is_right)
    accuracy = {name: with_error([r for r in o if r is not None]) for name, o in outcomes.items()}
    last = said.err.splitlines()[-5:]
    assert last[0].startswith(f"accuracy {accuracy['all']}, mean margin ")
    assert "; 4 pairs of target 0.5 left out" in last[0]
    assert last[1] == "accuracy by subset:"
    for i, line in enumerate(last[2:], start=1):
        assert line == f"  part {i}: {accuracy[f'part {i}']}"


def test_a_collapsed_model_is_called_so(trained, tmp_path, monkeypatch, capsys):
    """Its value head is 0 but for one weight: the scores of pairs, or of single rows, are close."""
    model = RewardModel.from_pretrained(trained)
    torch.nn.init.normal_(model.v_head.weight, std=1e-5)
    model.save_pretrained(tmp_path / "model", tokenizer=data.load_tokenizer(trained))
    pairs = write_rows(tmp_path / "pairs.jsonl", 8)
    rows = [json.loads(line) for line in pairs.read_text().splitlines()]
    singles = [{"prompt": row["prompt"], "response": row["chosen"]} for row in rows]
    twice = [{"prompt": "Where?", "responses": [" Paris."] * 3}]
    for directory, is_collapsed in ((trained, False), (tmp_path / "model", True)):
        for name, some, count in (("a", rows, 16), ("b", singles, 8), ("c", twice, 1)):
            file, out = rows_file(tmp_path / f"{name}.jsonl", *some), tmp_path / "out.jsonl"
            monkeypatch.setattr(
                sys, "argv", ["rm.py", str(directory), str(file), "--out", str(out)]
            )
            score.main()
            said = capsys.readouterr().err.splitlines()[-1]
            scores = []
            for line in map(json.loads, out.read_text().splitlines()):
                scores += line.get("scores", [line.get("score")])
            if is_collapsed and count > 1:
                deviation = f"{np.std(scores):.2g}, below 0.001"
                said_so = f"the scores of {count} responses have a standard deviation of"
                assert said == f"collapsed: {said_so} {deviation}"
            else:
                assert "collapsed" not in said


# --------------------------------------------------------------------------------------------------
# From Python


def scores_by_program(run_here, checkpoint, path, *rows):
    """Run the program of `python rm.py`; return the scores of every row."""
    status, printed = run_here(checkpoint, rows_file(path, *rows))
    assert status is None
    lines = [json.loads(line) for line in printed.splitlines()]
    return [line["scores"] if "scores" in line else [line["score"]] for line in lines]


@pytest.fixture(scope="module")
def scorer(trained):
    return score.Scorer(trained, device="cpu")


def test_scorer_refuses_scores_that_are_not_finite(trained):
    """As rm.py does: one NaN in a batch may spoil others."""
    scorer = score.Scorer(trained, device="cpu")
    scorer.model.v_head.weight.data[0, 0] = math.nan
    with pytest.raises(ValueError, match="Scorer: the score of response 0 is nan"):
        scorer("Where?", [" Paris.", " No."])


def test_scorer_gives_the_numbers_of_the_program(trained, scorer, tmp_path, run_here):
    """Rankings, single responses, repeats, prompts that are too long, and no prompt."""
    built_in = [[c.prompt, c.responses] for c in itertools.islice(data.known_rewards(0), 6)]
    calls = [
        *built_in,
        ["Where?", [" Paris.", " No.", " Paris.", ""]],
        ["Where?", [" Paris."]],
        ["Where? " * 40, [" Paris.", " No, and not there either."]],
        ["Where? " * 40, [" Paris."]],
        ["", ["Paris.", "Rome."]],
        ["Is it Paris?", ["Is it Paris? Yes.", "Is it Paris? No."]],
        [messages("Where?"), [messages("Paris.", first="assistant"), "Rome."]],
        ["Where?", ["Paris.", messages("Rome.", first="assistant")]],
    ]
    rows = []
    for prompt, responses in calls:
        row = {"prompt": prompt, "responses": responses}
        if len(responses) == 1:
            row = {"prompt": prompt, "response": responses[0]}
        rows.append(row)
    expected = scores_by_program(run_here, trained, tmp_path / "rows.jsonl", *rows)
    for (prompt, responses), scores in zip(calls, expected, strict=True):
        found = scorer(prompt, responses)
        assert all(type(number) is float for number in found)
        assert found == pytest.approx(scores, abs=1e-6)
    assert len({round(number, 5) for scores in expected for number in scores}) > 20


def test_scorer_renders_messages_by_the_checkpoints_template(chat_checkpoint, tmp_path, run_here):
    """A text beside messages is the user's, or the assistant's; text alone gets no template."""
    scorer = score.Scorer(chat_checkpoint)
    prompt = messages("the cat", "a dog", "and?")
    answers = [messages(text, first="assistant") for text in ("a mat", "a log")]
    rows = [{"prompt": prompt, "responses": answers}, {"prompt": "the cat", "responses": answers}]
    file = tmp_path / "rows.jsonl"
    of_dialogue, of_text = scores_by_program(run_here, chat_checkpoint, file, *rows)
    assert scorer(prompt, answers) == pytest.approx(of_dialogue, abs=1e-6)
    assert scorer(prompt, ["a mat", answers[1]]) == pytest.approx(of_dialogue, abs=1e-6)
    assert scorer("the cat", answers) == pytest.approx(of_text, abs=1e-6)
    with pytest.warns(UserWarning, match="text is not put into the chat template"):
        plain = scorer("the cat", ["a mat", "a log"])
    assert plain != pytest.approx(of_text, abs=1e-2)
    with pytest.raises(ValueError, match="does not take these messages: no system"):
        scorer([{"role": "system", "content": "Be brief."}, *prompt], answers)


def test_scorer_takes_thousands_of_responses_in_batches_of_similar_lengths(scorer, monkeypatch):
    rng = np.random.default_rng(0)
    words = [" yes", " no", " maybe", " Oslo", " is", " a", " city"]
    responses = ["".join(rng.choice(words, size=rng.integers(0, 9))) for _ in range(2000)]
    sizes = []
    end_scores = score.end_scores

    def counted(model, groups, layout):
        sizes.append([len(text) for group in groups for text in group])
        return end_scores(model, groups, layout)

    monkeypatch.setattr(score, "end_scores", counted)
    found = scorer("Where?", tuple(responses))
    assert [len(batch) for batch in sizes] == [score.BATCH_SIZE] * (2000 // score.BATCH_SIZE)
    lengths = list(itertools.chain(*sizes))
    assert lengths == sorted(lengths) and lengths[0] < lengths[-1]
    for i in range(0, 2000, 400):
        assert scorer("Where?", [responses[i]]) == pytest.approx([found[i]], abs=1e-5)
    assert scorer("Where?", []) == []


def test_scorer_is_used_from_another_directory_and_loads_once(trained, tmp_path, run_here):
    """By sys.path, with a relative path of the checkpoint, whose files are then gone."""
    shutil.copytree(trained, tmp_path / "model")
    (tmp_path / "use.py").write_text(
        f"import shutil, sys\nsys.path.insert(0, {str(HERE)!r})\n"
        "from tools.score import Scorer\n"
        "scorer = Scorer('model')\nshutil.rmtree('model')\n"
        "print(scorer('Where?', [' Paris.', ' No.']), scorer('Where?', [' Paris.']))\n"
    )
    command = [sys.executable, "use.py"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    rows = {"prompt": "Where?", "responses": [" Paris.", " No."]}
    ((first, second),) = scores_by_program(run_here, trained, tmp_path / "rows.jsonl", rows)
    numbers = [float(word.strip("[],")) for word in done.stdout.split()]
    assert numbers == pytest.approx([first, second, first], abs=1e-6)


@pytest.mark.parametrize(
    "prompt, responses, words",
    [
        ("p", "one text", "responses: found text; expected a list of texts, or of dialogues"),
        ("p", {"role": "assistant", "content": "a"}, "responses: found an object; expected a list"),
        ("p", None, "responses: found null or nothing; expected a list"),
        ("p", [{"role": "assistant", "content": "a"}], "responses[0]: found an object; expected"),
        ("p", ["a", None], "responses[1]: expected text, found null or nothing"),
        ("p", ["a", 7], "responses[1]: expected text, found a number"),
        (None, ["a"], "prompt: expected text, found null or nothing"),
        ("p", ["a", [{"role": "bot", "content": "a"}]], 'responses[1][0]: found role "bot"'),
        ("p q", ["p q a", "b"], "responses[0] begins with the prompt, responses[1] does not"),
    ],
)
def test_scorer_refuses_what_is_no_prompt_or_response(scorer, prompt, responses, words):
    with pytest.raises(ValueError) as error:
        scorer(prompt, responses)
    assert str(error.value).startswith(words)


def test_scorer_refuses_devices_and_checkpoints_that_are_not_there(trained, tmp_path):
    with pytest.raises(ValueError, match="device: found nowhere, which torch cannot use"):
        score.Scorer(trained, device="nowhere")
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="device: found cuda:0, which torch cannot use"):
            score.Scorer(trained, device="cuda:0")
    with pytest.raises(ValueError, match="no config.json"):
        score.Scorer(tmp_path)
    RewardModel.from_pretrained(trained).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="tokenizer"):
        score.Scorer(tmp_path)


def test_the_code_of_the_page_about_use_gives_the_numbers_of_the_program(
    trained, tmp_path, monkeypatch, run_here
):
    """docs/use.md: its lines with Scorer, and TRL's reward function, of texts and of messages."""
    page = (HERE / "docs" / "use.md").read_text()
    assert len(page.split()) <= 900 and max(map(len, page.splitlines())) <= 100
    monkeypatch.syspath_prepend(str(HERE))
    monkeypatch.setattr(sys, "path", sys.path.copy())
    blocks = dict(
        re.findall(r"^## ([^\n]*)\n(?:(?!^## ).)*?```python\n(.*?)```", page, re.M | re.S)
    )
    names = {}
    of_scorer = blocks["From Python"].replace('"out"', repr(str(trained)))
    exec(of_scorer.replace("/path/to/this/repository", str(HERE)), names)
    exec(blocks["TRL (not run here)"].partition("\n\n\n")[0], names)
    prompts = ["\n\nHuman: Is it cold?\n\nAssistant:"] * 2, [messages("Is it cold?")] * 2
    completions = [" Yes.", " No."], [messages(text, first="assistant") for text in ("Yes.", "No.")]
    rows = [
        {"prompt": prompt[0], "responses": texts} for prompt, texts in zip(prompts, completions)
    ]
    expected = scores_by_program(run_here, trained, tmp_path / "rows.jsonl", *rows)
    assert names["scores"] == pytest.approx(expected[0], abs=1e-6)
    for prompt, texts, scores in zip(prompts, completions, expected):
        found = names["reward"](prompts=prompt, completions=texts, completion_ids=[[1], [2]])
        assert found == pytest.approx(scores, abs=1e-6)


# --------------------------------------------------------------------------------------------------
# Batches and models


@pytest.mark.parametrize("batch_size", [1, 4, 5, 100])
def test_batches_hold_every_comparison_once_and_are_full(batch_size):
    """No batch is too large but for a comparison that is, and the next one would not fit in."""
    rng = np.random.default_rng(0)
    groups = [[[1] * rng.integers(1, 9)] * rng.integers(1, 7) for _ in range(30)]
    batches = list(score.batches(groups, batch_size))
    assert sorted(itertools.chain(*batches)) == list(range(30))
    sizes = [sum(len(groups[i]) for i in batch) for batch in batches]
    assert all(n <= batch_size or len(batch) == 1 for n, batch in zip(sizes, batches))
    for n, (following, *_) in zip(sizes, batches[1:]):
        assert n + len(groups[following]) > batch_size
    lengths = [len(groups[i][0]) for i in itertools.chain(*batches)]
    assert lengths == sorted(lengths)


def test_a_backbone_without_a_value_head_is_not_scored_with(tmp_path, run_here):
    data.train_tokenizer(["a few words"], 290).save(tmp_path)
    backbone = GPT(
        GPTConfig("llama", n_layer=1, n_embd=8, n_head=2, vocab_size=290, n_positions=64)
    )
    (tmp_path / "config.json").write_text(json.dumps(backbone.config.to_hf()))
    torch.save(backbone.to_hf(), tmp_path / "pytorch_model.bin")
    message, out = run_here(tmp_path, write_rows(tmp_path / "rows.jsonl", 2))
    assert message.startswith("rm.py: error: ") and "no value head there" in message and out == ""


def test_rows_are_cut_to_a_sliding_window(trained, tmp_path, run_here):
    tokenizer = data.load_tokenizer(trained)
    torch.manual_seed(0)
    shape = dict(n_layer=1, n_embd=8, n_head=2, vocab_size=tokenizer.vocab_size, n_positions=64)
    config = GPTConfig("mistral", sliding_window=16, **shape)
    RewardModel(GPT(config), tokenizer.pad_id).save_pretrained(tmp_path, tokenizer=tokenizer)
    file = write_rows(tmp_path / "rows.jsonl", 5)
    outputs = []
    for flags in ([], ["--max_seq_len", "16"], ["--layout", "padded"]):
        status, out = run_here(tmp_path, file, *flags)
        assert status is None
        outputs.append([json.loads(line)["scores"] for line in out.splitlines()])
    sequences = [data.tokenize(row, tokenizer, 64) for row in data.load_comparisons(file)]
    assert all(len(text) > 16 for group in sequences for text in group)
    assert outputs[1] == outputs[0]
    for padded, packed in zip(outputs[2], outputs[0], strict=True):
        assert padded == pytest.approx(packed, abs=1e-5)
    message, _ = run_here(tmp_path, file, "--max_seq_len", "17")
    assert "--max_seq_len: found 17; expected 2 to 16, because the model has a sliding" in message


def test_added_tokens_without_a_row_are_scored_as_rows_of_zeros(tmp_path, run_here):
    backend = byte_level()
    backend.add_special_tokens([f"<|{i}|>" for i in range(12)])
    config = {"eos_token": "<|endoftext|>", "pad_token": "<|11|>"}
    directory = hub_files(tmp_path / "model", backend=backend, config=config)
    rows = backend.get_vocab_size() - 4  # of which saving makes a multiple of 8
    torch.manual_seed(0)
    shape = dict(n_layer=1, n_embd=8, n_head=2, vocab_size=rows, n_positions=64)
    model = RewardModel(GPT(GPTConfig("qwen3", **shape)), pad_id=0)
    model.save_pretrained(directory)
    saved = len(RewardModel.from_pretrained(directory).backbone.embed.weight)
    assert saved < backend.get_vocab_size()
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps({"prompt": "the cat", "chosen": "<|10|> sat", "rejected": " on"}))
    status, out = run_here(directory, file)
    assert status is None
    tokenizer = data.load_tokenizer(directory, 0)
    model.backbone.resize_embedding(tokenizer.vocab_size)
    (comparison,) = data.load_comparisons(file)
    expected = score.end_scores(model.eval(), [data.tokenize(comparison, tokenizer, 64)], "padded")
    assert json.loads(out)["scores"] == pytest.approx(expected.tolist(), abs=1e-6)


def test_scores_of_finite_weights_that_overflow_are_an_error(trained, tmp_path, run_here):
    model = RewardModel.from_pretrained(trained)
    model.v_head.weight.data.fill_(3e38)
    model.save_pretrained(tmp_path, tokenizer=data.load_tokenizer(trained))
    rows = write_rows(tmp_path / "rows.jsonl", 2)
    status, said = run_here(tmp_path, rows)
    assert status.startswith(f"rm.py: error: {rows}:1: the score of response 0 is ")
    assert said == ""


@pytest.mark.parametrize("way", ["stdout", "--out", "--html", "--show"])
@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_score_that_is_not_finite_is_an_error_that_names_the_row(
    way, layout, trained, tmp_path, run_here, monkeypatch
):
    """The model computes NaN where a token stands that the rejected response of row 3 alone has.

    Packed, it spoils the other rows of the batch, which are written all the same.
    """
    rows = write_rows(tmp_path / "rows.jsonl", 4)
    lines = [json.loads(line) for line in rows.read_text().splitlines()]
    lines[2]["rejected"] += " Quite."
    rows.write_text("".join(json.dumps(line) + "\n" for line in lines))
    tokenizer = data.load_tokenizer(trained)
    used = [set(tokenizer.encode("".join(line.values()))) for line in lines]
    token = min(used[2] - used[0] - used[1] - used[3])

    def spoil(module, inputs, output):
        return output.masked_fill((inputs[0] == token)[..., None], math.nan)

    def spoiled_model(checkpoint):
        model = trained_model(checkpoint)
        model.backbone.embed.register_forward_hook(spoil)
        return model

    trained_model = score.trained_model
    monkeypatch.setattr(score, "trained_model", spoiled_model)
    out = tmp_path / "file"
    out.write_text("earlier")
    flags = {"stdout": [], "--show": ["--show"]}.get(way, [way, out])
    status, said = run_here(trained, rows, *flags, "--layout", layout)
    assert status.startswith(f"rm.py: error: {rows}:3: the score of response 1 is nan"), status
    assert "NaN" not in said
    assert len(said.splitlines()) == (2 if way == "stdout" else 0)
    assert out.read_text() == "earlier"
    assert not list(tmp_path.glob("*.part"))


@pytest.mark.parametrize("flag", ["--out", "--html"])
def test_links_are_followed_and_devices_written_to_as_they_are(flag, trained, tmp_path, run_here):
    file = write_rows(tmp_path / "rows.jsonl", 3)
    assert run_here(trained, file, flag, tmp_path / "expected")[0] is None
    (tmp_path / "there").mkdir()
    target, link = tmp_path / "there" / "file", tmp_path / "link"
    link.symlink_to("there/file")
    for before in (None, "old"):
        if before:
            target.write_text(before)
        assert run_here(trained, file, flag, link)[0] is None
        assert link.is_symlink() and target.read_text() == (tmp_path / "expected").read_text()
    assert run_here(trained, file, flag, "/dev/null")[0] is None
    assert Path("/dev/null").is_char_device() and [*(tmp_path / "there").iterdir()] == [target]
    link.unlink()
    link.symlink_to("nowhere/file")
    status, _ = run_here(trained, file, flag, link)
    assert status.endswith(f"{flag}: found {link}; expected a file in a directory that exists")
    with open(tmp_path / "log", "w") as log:
        stdout = os.dup(1)
        os.dup2(log.fileno(), 1)
        os.write(1, b"before\n")
        status, _ = run_here(trained, file, flag, "/dev/stdout")
        os.write(1, b"after\n")
        os.dup2(stdout, 1)
        os.close(stdout)
    assert status is None
    expected = (tmp_path / "expected").read_text()
    assert (tmp_path / "log").read_text() == f"before\n{expected}after\n"


@pytest.mark.parametrize("flag", ["--out", "--html"])
def test_read_only_files_circles_of_links_and_full_disks_are_named(
    flag, trained, tmp_path, run_here
):
    rows = write_rows(tmp_path / "rows.jsonl", 3)
    file, circle = tmp_path / "file", tmp_path / "circle"
    file.write_text("old")
    file.chmod(0o444)
    status, _ = run_here(trained, rows, flag, file)
    assert status == f"rm.py: error: {file}: is read-only; give another file, or make it writable"
    assert file.read_text() == "old"
    circle.symlink_to("circle")
    for path, words in ((circle, "symbolic links"), (Path("/dev/full"), "No space left")):
        status, _ = run_here(trained, rows, flag, path)
        assert status.startswith("rm.py: error: ") and words in status and str(path) in status


def test_converting_into_a_directory_by_a_link(trained, tmp_path, run_here):
    (tmp_path / "there").mkdir()
    (tmp_path / "link").symlink_to("there")
    assert run_here("convert", trained, tmp_path / "link", "--layout", "hf")[0] is None
    assert (tmp_path / "link").is_symlink() and RewardModel.from_pretrained(tmp_path / "there")
    (tmp_path / "dangling").symlink_to("nowhere")
    status, _ = run_here("convert", trained, tmp_path / "dangling", "--layout", "hf")
    assert status.startswith("rm.py: error: ") and "dangling" in status


@pytest.mark.parametrize("flags", [[], ["--show"], ["--html", "page.html"]])
@pytest.mark.parametrize("kind", ["no unk", "a normalizer panics"])
def test_a_text_that_the_tokenizer_cannot_encode_is_named(kind, flags, tmp_path, run_here):
    change, good, bad = FAILING[kind]
    tokenizer = data.load_tokenizer(failing_tokenizer(tmp_path / "hub", change))
    tiny = GPTConfig("llama", vocab_size=8, n_positions=64, n_layer=1, n_head=2, n_embd=16)
    model = RewardModel(GPT(tiny), tokenizer.pad_id)
    model.save_pretrained(tmp_path / "model", tokenizer=tokenizer)
    chosen, rejected = list(good)[:2]
    row = {"prompt": "", "chosen": chosen, "rejected": rejected}
    file = tmp_path / "rows.jsonl"
    rows = [row, row, row | {"rejected": bad}]
    file.write_text("\n".join(map(json.dumps, rows)))
    flags = [tmp_path / flag if flag.endswith(".html") else flag for flag in flags]
    status, _ = run_here(tmp_path / "model", file, *flags)
    assert status.startswith(f'rm.py: error: {file}:3: the tokenizer cannot encode "{bad}" (')
    scorer = score.Scorer(tmp_path / "model")
    with pytest.raises(ValueError, match=f'^the tokenizer cannot encode "y {bad}" [(]'):
        scorer("y ", [chosen, bad])
    assert len(scorer("", [rejected, chosen])) == 2


def test_an_interrupt_is_said_in_a_line(monkeypatch, run_here):
    def interrupted(checkpoint):
        raise KeyboardInterrupt

    monkeypatch.setattr(score, "trained_model", interrupted)
    message = "rm.py: interrupted; --out and --html are as they were"
    assert run_here("model", "rows.jsonl") == (message, "")


# --------------------------------------------------------------------------------------------------
# Converting


def test_a_converted_model_gives_the_same_scores_in_transformers_and_comes_back_bit_for_bit(
    trained, tmp_path, run_here
):
    """The printed lines, of transformers alone, lead from a text to its score."""
    status, said = run_here("convert", trained, tmp_path / "hf", "--layout", "hf")
    assert status is None
    status, _ = run_here(
        "convert", tmp_path / "hf", tmp_path / "back", "--layout", "deepspeed-chat"
    )
    assert status is None
    before, after = (
        torch.load(directory / "pytorch_model.bin", weights_only=True)
        for directory in (trained, tmp_path / "back")
    )
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    for file in ("config.json", "tokenizer.model", "tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "back" / file).read_bytes() == (trained / file).read_bytes(), file

    file = write_rows(tmp_path / "rows.jsonl", 5)
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert "`pip install -r requirements-hf.txt transformers`" in said
    printed = [line.strip() for line in said.splitlines() if line.startswith("    ")]
    loaded = {}
    exec("\n".join(printed), loaded)
    tokenizer, model = loaded["tokenizer"], loaded["model"]
    assert type(model).__name__ == "LlamaForSequenceClassification"
    batch = tokenizer(
        [row["prompt"] + row["chosen"] for row in rows], padding=True, return_tensors="pt"
    )
    for directory in (trained, tmp_path / "hf"):
        _, scored = run_here(directory, file)
        assert model(**batch).logits[:, 0].tolist() == pytest.approx(
            [json.loads(line)["scores"][0] for line in scored.splitlines()], abs=1e-5
        )
    refused, _ = run_here("convert", trained, tmp_path / "hf", "--layout", "deepspeed-chat")
    assert "hf, which is not empty" in refused


def test_converting_without_safetensors_names_what_to_install_and_writes_nothing(
    trained, tmp_path, run_here, monkeypatch
):
    monkeypatch.setitem(sys.modules, "safetensors", None)
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    message, out = run_here("convert", trained, tmp_path / "hf", "--layout", "hf")
    expected = "rm.py: error: layout 'hf' needs `pip install -r requirements-hf.txt`"
    assert (message, out) == (expected, "")
    assert list(tmp_path.iterdir()) == []


def test_help_of_convert_says_what_the_hf_layout_needs(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["rm.py", "convert", "--help"])
    monkeypatch.setenv("COLUMNS", "300")
    with pytest.raises(SystemExit):
        score.main()
    needs = "needs `pip install -r requirements-hf.txt`, and `pip install transformers` to load it"
    assert needs in capsys.readouterr().out


def test_converting_says_what_other_programs_must_add(tmp_path, run_here):
    from transformers import AutoModelForSequenceClassification

    config = GPTConfig("llama", vocab_size=8, n_layer=1, n_embd=8, n_head=2)
    model = RewardModel(GPT(config), pad_id=0)
    normalize(model, [1.0, 3.0])
    model.save_pretrained(tmp_path / "ours")
    _, out = run_here("convert", tmp_path / "ours", tmp_path / "hf", "--layout", "hf")
    assert "other programs must add -2 (reward_bias in config.json)" in out
    theirs = AutoModelForSequenceClassification.from_pretrained(tmp_path / "hf")
    logit = theirs(torch.tensor([[1, 2, 3]])).logits.item()
    ((ours,),) = score.score(score.trained_model(tmp_path / "hf"), [[[1, 2, 3]]], 1)
    assert ours == pytest.approx(logit - 2, abs=1e-5)


def converted(run_here, checkpoint, directory, layout="hf"):
    """Convert a checkpoint; return the lines that are printed."""
    status, printed = run_here("convert", checkpoint, directory, "--layout", layout)
    assert status is None
    return printed.splitlines()


def small_model(tokenizer, model_type="llama", pad_id=None, **other_keys):
    shape = dict(n_layer=1, n_embd=8, n_head=2, vocab_size=tokenizer.vocab_size, n_positions=64)
    ids = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id}
    config = GPTConfig(model_type, **shape, token_ids=ids, other_keys=other_keys)
    return RewardModel(GPT(config), tokenizer.pad_id if pad_id is None else pad_id)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("has_tokenizer", [True, False])
def test_converting_says_that_pad_is_eos(layout, has_tokenizer, tmp_path, run_here):
    tokenizer = data.train_tokenizer(["a few words"], 290)
    padded_with_eos = data.Tokenizer(tokenizer.model_proto, tokenizer.eos_id)
    for number, (used, is_said) in enumerate(((tokenizer, False), (padded_with_eos, True))):
        model = small_model(used)
        source = tmp_path / str(number)
        model.save_pretrained(source, tokenizer=used if has_tokenizer else None)
        lines = converted(run_here, source, tmp_path / f"{number} {layout}", layout)
        said = [line for line in lines if line.startswith("pad is eos (id 2): ")]
        assert len(said) == is_said


def test_transformers_ends_a_text_one_token_earlier_where_pad_is_eos(tmp_path, run_here):
    """The warning holds: there the score is the reward in front of eos, here that of eos."""
    tokenizer = data.train_tokenizer(["a few words"], 290)
    tokenizer = data.Tokenizer(tokenizer.model_proto, tokenizer.eos_id)
    model = small_model(tokenizer)
    model.save_pretrained(tmp_path / "ours", tokenizer=tokenizer)
    converted(run_here, tmp_path / "ours", tmp_path / "hf")
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "hf")
    ids = torch.tensor([[1, 8, 9, 2]])
    out = model.forward_value(ids, torch.ones_like(ids))
    assert out["chosen_end_scores"].item() == out["values"][0, 3].item()
    score_there = theirs(ids, attention_mask=torch.ones_like(ids)).logits.item()
    assert score_there == pytest.approx(out["values"][0, 2].item(), abs=1e-6)
    assert abs(score_there - out["values"][0, 3].item()) > 1e-3


def test_converting_says_what_right_truncation_does_in_transformers(tmp_path, run_here):
    """There eos follows the cut, here not; the ids show it."""
    tokenizer = data.train_tokenizer(["a few words"], 290)
    said = "texts over 9 tokens: transformers truncates on the right before it adds eos"
    for side in ("left", "right"):
        model = small_model(tokenizer, max_seq_len=9, truncation_side=side)
        model.save_pretrained(tmp_path / side, tokenizer=tokenizer)
        lines = converted(run_here, tmp_path / side, tmp_path / f"hf {side}")
        assert any(line.startswith(said) for line in lines) == (side == "right")
        theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / f"hf {side}")
        text = "a few words " * 9
        ids = theirs(text, truncation=True)["input_ids"]
        ((ours),) = data.tokenize(data.Comparison(text, [""]), tokenizer, 9, side)
        assert len(ids) == len(ours) == 9 and ids[-1] == tokenizer.eos_id
        assert (ids == ours) == (side == "left") and ids[:8] == ours[:8]


def test_rm_truncates_as_in_training(tmp_path, run_here):
    """Length and side are the checkpoint's, in either layout; flags take their place."""
    tokenizer = data.train_tokenizer(["a few words"], 290)
    model = small_model(tokenizer, max_seq_len=9, truncation_side="right")
    model.save_pretrained(tmp_path / "ours", tokenizer=tokenizer)
    converted(run_here, tmp_path / "ours", tmp_path / "hf")
    prompt, answers = "a few words " * 3, ["x few words " * 3, "a words " * 9]
    file = rows_file(
        tmp_path / "rows.jsonl", {"prompt": prompt, "chosen": answers[0], "rejected": answers[1]}
    )
    comparison = data.Comparison(prompt, answers)
    for length, side in ((9, "right"), (9, "left"), (30, "right"), (30, "left")):
        groups = [data.tokenize(comparison, tokenizer, length, side)]
        expected = score.score(model.eval(), groups, 4)[0]
        flags = [[], ["--max_seq_len", 30]][length == 30]
        flags = flags + [[], ["--truncation_side", "left"]][side == "left"]
        for checkpoint in (tmp_path / "ours", tmp_path / "hf"):
            for layout in ("packed", "padded"):
                status, out = run_here(checkpoint, file, *flags, "--layout", layout)
                assert status is None
                assert json.loads(out)["scores"] == pytest.approx(expected, abs=1e-5)
        shown, page = run_here(checkpoint, file, *flags, "--show")
        assert shown is None and f"score {expected[0]:.4f}" in page.replace("\u2212", "-")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_converting_says_where_the_value_head_was_read(layout, tmp_path, run_here):
    model = small_model(data.train_tokenizer(["a few words"], 290))
    model.save_pretrained(tmp_path / "ours", layout)
    lines = converted(run_here, tmp_path / "ours", tmp_path / "other", "deepspeed-chat")
    key = "score.weight" if layout == "hf" else "v_head.weight"
    assert lines[0] == f"{tmp_path}/ours: value head read from {key}"


def test_scoring_says_which_of_two_files_of_weights_is_read(tmp_path, monkeypatch, capsys):
    tokenizer = data.train_tokenizer(["a few words"], 290)
    model = small_model(tokenizer)
    model.save_pretrained(tmp_path / "hf", "hf", tokenizer)
    torch.save({}, tmp_path / "hf" / "pytorch_model.bin")
    words = "hf: weights read from model.safetensors; pytorch_model.bin, there too, not read"
    with pytest.warns(UserWarning, match=words):
        score.Scorer(tmp_path / "hf")
    rows = rows_file(tmp_path / "rows.jsonl", {"prompt": "a", "response": " few"})
    monkeypatch.setattr(sys, "argv", ["rm.py", str(tmp_path / "hf"), str(rows)])
    score.main()
    assert f"{tmp_path}/{words}" in capsys.readouterr().err.splitlines()


@pytest.mark.parametrize("flag", ["--out", "--html", "--eval_by", "", "file"])
def test_empty_text_is_refused(flag, monkeypatch, capsys):
    """It is what a shell makes of "$NAME" where NAME is not set."""
    arguments = {"": ["", "rows.jsonl"], "file": ["out", ""]}
    called = arguments.get(flag, ["out", "rows.jsonl", flag, ""])
    monkeypatch.setattr(sys, "argv", ["rm.py", *called])
    with pytest.raises(SystemExit):
        score.main()
    line = capsys.readouterr().err.splitlines()[-1]
    assert f"argument {flag or 'checkpoint'}: found ''" in line


def test_a_classifier_is_refused_by_the_shape_of_its_head(tmp_path, run_here):
    tokenizer = data.train_tokenizer(["a few words"], 290)
    model = small_model(tokenizer)
    model.save_pretrained(tmp_path, "hf", tokenizer)
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(
        tmp_path, num_labels=3, ignore_mismatched_sizes=True
    )
    theirs.save_pretrained(tmp_path)
    message, _ = run_here(tmp_path, write_rows(tmp_path / "rows.jsonl", 2))
    assert "weight score.weight has shape [3, 8]; expected [1, 8]" in message


def test_a_tokenizer_that_transformers_cannot_make_is_not_converted_to_hf(
    tmp_path, run_here, capsys
):
    words = dict(model_type="word", byte_fallback=False, vocab_size=20)
    tokenizer = data.Tokenizer(sentencepiece_model(**words))
    small_model(tokenizer).save_pretrained(tmp_path / "ours", tokenizer=tokenizer)
    message, _ = run_here("convert", tmp_path / "ours", tmp_path / "hf", "--layout", "hf")
    assert message.startswith("rm.py: error: layout 'hf': no tokenizer.json can say what the tok")
    assert not (tmp_path / "hf").exists()
    lines = converted(run_here, tmp_path / "ours", tmp_path / "other", "deepspeed-chat")
    assert lines[-1].startswith("no tokenizer.json can say")


# --------------------------------------------------------------------------------------------------
# The processes


def test_bad_input_ends_the_program_with_one_line_and_no_traceback(tmp_path):
    done = run(HERE / "testdata", tmp_path / "no.jsonl")
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.strip().startswith(f"rm.py: error: {HERE}/testdata: no config.json")


@pytest.mark.parametrize("python_path", [None, "", "theirs"])
def test_it_runs_in_a_directory_that_has_modules_of_the_same_names(trained, tmp_path, python_path):
    """--show and --html, with relative paths and flags that hold spaces."""
    (tmp_path / "tools").mkdir()
    (tmp_path / "theirs").mkdir()
    for name in ("tools/__init__.py", "tools/score.py", "data.py", "rm.py", "theirs/model.py"):
        (tmp_path / name).write_text("raise SystemExit('not ours')")
    write_rows(tmp_path / "two rows.jsonl", 2)
    environment = os.environ.copy()
    environment.pop("PYTHONPATH", None)
    if python_path is not None:
        environment["PYTHONPATH"] = python_path
    arguments = "two rows.jsonl", "--show", "--html", "a page.html"
    done = run(trained, *arguments, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("row 1  prompt of ") and "\nrow 2  prompt of " in done.stdout
    assert "two rows.jsonl: comparisons" in (tmp_path / "a page.html").read_text()


def test_without_tools_a_line_says_what_is_missing(tmp_path):
    for name in ("rm.py", "model.py", "data.py"):
        shutil.copy(HERE / name, tmp_path)
    shutil.copytree(HERE / "parts", tmp_path / "parts")
    done = run("model", "rows.jsonl", program=tmp_path / "rm.py")
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr == (
        "rm.py: error: python rm.py needs tools/score.py, which is missing; "
        f"restore it in {tmp_path.resolve()}\n"
    )


CHATML = """{% for message in messages -%}
<|im_start|>{{ message.role }}
{{ message.content }}<|im_end|>{{ end }}
{%- endfor %}"""


@pytest.mark.parametrize("end", ["\n", ""])
def test_convert_says_where_a_rendered_dialogue_does_not_end_with_eos(end, tmp_path, run_here):
    """ChatML has a newline behind eos; without it, transformers gives the score of rm.py."""
    config = {
        "eos_token": "<|im_end|>",
        "chat_template": CHATML.replace("{{ end }}", f"{{{{ {end!r} }}}}"),
    }
    backend = byte_level(["<|im_start|>", "<|im_end|>"])
    directory = hub_files(tmp_path / "model", backend=backend, config=FAST | config)
    torch.manual_seed(0)
    shape = dict(n_layer=1, n_embd=8, n_head=2, vocab_size=304, n_positions=64)
    RewardModel(GPT(GPTConfig("llama", **shape)), 302).save_pretrained(directory)
    _, out = run_here("convert", directory, tmp_path / "hf", "--layout", "hf")
    assert ("the chat template does not end with eos" in out) == (end == "\n")
    dialogue = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes."}]
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    model = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "hf")
    text = tokenizer.apply_chat_template(dialogue, tokenize=False)
    ids = tokenizer(text.rstrip(), add_special_tokens=False, return_tensors="pt")
    expected = model(**ids).logits.item()
    assert score.Scorer(directory)(dialogue[:1], [dialogue[1:]]) == pytest.approx(
        [expected], abs=1e-6
    )
