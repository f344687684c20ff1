"""Rewards are changed by one scale and one shift, in whatever file they are saved."""

import itertools
import json
import statistics
import sys

import pytest
import torch

import data
import rm
import train
from parts.normalize import normalize
from model import GPT, GPTConfig
from tools.score import main, score, trained_model

KINDS = [
    ("gpt2", {}, True),
    ("opt", {}, True),
    ("opt", {"pre_norm": False, "embed_dim": 8}, False),
    ("llama", {}, False),
]


@pytest.mark.parametrize("layout", rm.LAYOUTS)
@pytest.mark.parametrize("model_type, overrides, in_the_norm", KINDS)
def test_scores_get_mean_0_and_deviation_1_and_keep_it_in_the_file(
    model_type, overrides, in_the_norm, layout, tmp_path
):
    torch.manual_seed(0)
    model = rm.RewardModel(
        GPT(
            GPTConfig(
                model_type,
                vocab_size=24,
                n_layer=2,
                n_embd=16,
                n_head=2,
                n_positions=16,
                **overrides,
            )
        ),
        pad_id=0,
    )
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    groups = torch.randint(1, 24, (20, 2, 9)).tolist()
    before = list(itertools.chain(*score(model, groups, 8)))
    said = normalize(model, before)
    mean, deviation = statistics.fmean(before), statistics.pstdev(before)
    assert (
        f"mean {mean:.4f}, standard deviation {deviation:.4f}" in said
        and ("norm's bias" in said) == in_the_norm
    )
    model.save_pretrained(tmp_path, layout)
    assert ("reward_bias" in json.loads((tmp_path / "config.json").read_text())) == (
        not in_the_norm
    )
    loaded = rm.RewardModel.from_pretrained(tmp_path)
    for scored in (model, loaded):
        after = list(itertools.chain(*score(scored, groups, 8)))
        assert after == pytest.approx([(score - mean) / deviation for score in before], abs=2e-5)
        assert (statistics.fmean(after), statistics.pstdev(after)) == pytest.approx(
            (0, 1), abs=2e-5
        )
        values = scored.forward_value(torch.tensor([groups[0][0]]))
        assert values["chosen_end_scores"].item() == pytest.approx(
            after[0], abs=2e-5
        )  # what step 3 asks for
    normalize(
        loaded, [score + 1 for score in after]
    )  # a bias that is there already is shifted, too
    assert list(itertools.chain(*score(loaded, groups, 8))) == pytest.approx(
        [score - 1 for score in after], abs=5e-5
    )


@pytest.mark.parametrize(
    "scores, found", [([1.0, 1.0], "0"), ([1.0, float("nan")], "nan"), ([1.0, float("inf")], "nan")]
)
def test_scores_without_a_spread_are_refused(scores, found):
    with pytest.raises(ValueError, match=f"--normalize_rewards: .* standard deviation {found}"):
        normalize(
            rm.RewardModel(GPT(GPTConfig(vocab_size=8, n_layer=1, n_embd=8, n_head=2)), 0), scores
        )


def test_model_that_cannot_be_normalized_is_saved_as_it_is(tmp_path, monkeypatch):
    monkeypatch.setattr(
        sys,
        "argv",
        [
            "train.py",
            "--max_steps",
            "1",
            "--n_layer",
            "1",
            "--n_embd",
            "16",
            "--n_head",
            "2",
            "--eval_iters",
            "1",
            "--save_interval",
            "0",
            "--output_dir",
            str(tmp_path / "out"),
            "--normalize_rewards",
        ],
    )
    evaluate = train.evaluate
    monkeypatch.setattr(
        train, "evaluate", lambda *a: (evaluate(*a)[0], evaluate(*a)[1] | {"scores": [1.0, 1.0]})
    )
    with pytest.raises(SystemExit, match="train.py: error: --normalize_rewards: the 2 end scores"):
        train.main()
    assert (
        not trained_model(tmp_path / "out").reward_bias
        and (tmp_path / "out" / "report.html").exists()
    )


def test_converting_says_what_other_programs_must_add(tmp_path, monkeypatch, capsys):
    model = rm.RewardModel(
        GPT(GPTConfig("llama", vocab_size=8, n_layer=1, n_embd=8, n_head=2)), pad_id=0
    )
    normalize(model, [1.0, 3.0])
    model.save_pretrained(tmp_path / "ours")
    monkeypatch.setattr(
        sys,
        "argv",
        ["rm.py", "convert", str(tmp_path / "ours"), str(tmp_path / "hf"), "--layout", "hf"],
    )
    main()
    assert "other programs must add -2 (reward_bias in config.json)" in capsys.readouterr().out
    from transformers import AutoModelForSequenceClassification

    ids = torch.tensor([[1, 2, 3]])
    theirs = AutoModelForSequenceClassification.from_pretrained(tmp_path / "hf")(ids).logits.item()
    assert score(trained_model(tmp_path / "hf"), [[[1, 2, 3]]], 1)[0][0] == pytest.approx(
        theirs - 2, abs=1e-5
    )


def test_training_with_the_flag(tmp_path, monkeypatch, capsys):
    """Over the eval responses, each once: those of a ranking of three count as three."""
    rows = [
        json.dumps({"prompt": c.prompt, "responses": [*c.responses, " No."][: 2 + i % 2]})
        for i, c in enumerate(itertools.islice(data.known_rewards(0), 24))
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows))
    monkeypatch.setattr(
        sys,
        "argv",
        [
            "train.py",
            "--data_path",
            str(tmp_path / "rows.jsonl"),
            "--eval_path",
            str(tmp_path / "rows.jsonl"),
            "--max_steps",
            "2",
            "--n_layer",
            "1",
            "--n_embd",
            "16",
            "--n_head",
            "2",
            "--vocab_size",
            "400",
            "--output_dir",
            str(tmp_path / "out"),
            "--normalize_rewards",
        ],
    )
    train.main()
    assert "end scores of 60 eval responses: mean" in capsys.readouterr().out
    model, tokenizer = (
        rm.RewardModel.from_pretrained(tmp_path / "out"),
        data.load_tokenizer(tmp_path / "out"),
    )
    groups = [
        data.tokenize(c, tokenizer, 512) for c in data.load_comparisons(tmp_path / "rows.jsonl")
    ]
    scores = list(itertools.chain(*score(model, groups, 16)))
    assert len(scores) == 60 and (
        statistics.fmean(scores),
        statistics.pstdev(scores),
    ) == pytest.approx((0, 1), abs=1e-4)
