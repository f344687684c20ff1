"""`python rm.py`: the scores that it writes, models that it converts, and how it hands over."""

import itertools
import json
import math
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import data
import train
from model import GPT, GPTConfig
from parts.normalize import normalize
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


# --------------------------------------------------------------------------------------------------
# Scores


def test_scores_of_comparisons_and_of_single_rows(trained, tmp_path, run_here):
    """The score of a response does not depend on how its row is given."""
    pairs = write_rows(tmp_path / "pairs.jsonl", 9, ranking={4})
    rows = [json.loads(line) for line in pairs.read_text().splitlines()]
    done = run(trained, pairs, "--batch_size", 4)
    assert done.returncode == 0, done.stderr
    scores = [json.loads(line)["scores"] for line in done.stdout.splitlines()]
    assert [len(s) for s in scores] == [2, 2, 2, 2, 3, 2, 2, 2, 2]
    margins = [s[i] - s[j] for s in scores for i in range(len(s)) for j in range(i + 1, len(s))]
    assert f"11 pairs: accuracy {np.mean([m > 0 for m in margins]):.4f}" in done.stderr
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
    assert message.startswith("rm.py: error: ") and "no v_head.weight" in message and out == ""


def test_scores_of_finite_weights_that_overflow_are_an_error(trained, tmp_path, run_here):
    model = RewardModel.from_pretrained(trained)
    model.v_head.weight.data.fill_(3e38)
    model.save_pretrained(tmp_path, tokenizer=data.load_tokenizer(trained))
    rows = write_rows(tmp_path / "rows.jsonl", 2)
    status, said = run_here(tmp_path, rows)
    assert status.startswith(f"rm.py: error: {rows}: row 1: the score of response 0 is ")
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
    assert status.startswith(f"rm.py: error: {rows}: row 3: the score of response 1 is nan"), status
    assert "NaN" not in said
    assert len(said.splitlines()) == (2 if way == "stdout" else 0)
    assert out.read_text() == "earlier"
    assert not list(tmp_path.glob("*.part"))


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
    """AutoTokenizer and AutoModelForSequenceClassification alone lead from a text to its score."""
    import transformers

    done = run("convert", trained, tmp_path / "hf", "--layout", "hf")
    assert done.returncode == 0, done.stderr
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
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    model = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "hf")
    batch = tokenizer(
        [row["prompt"] + row["chosen"] for row in rows],
        padding=True,
        return_tensors="pt",
        return_token_type_ids=False,
    )
    for directory in (trained, tmp_path / "hf"):
        _, scored = run_here(directory, file)
        assert model(**batch).logits[:, 0].tolist() == pytest.approx(
            [json.loads(line)["scores"][0] for line in scored.splitlines()], abs=1e-5
        )
    refused = run("convert", trained, tmp_path / "hf", "--layout", "deepspeed-chat")
    assert refused.returncode != 0 and "hf, which is not empty" in refused.stderr.splitlines()[-1]


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
