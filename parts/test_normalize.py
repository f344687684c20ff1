"""Rewards are changed by one scale and one shift, in either file that they are saved in."""

import itertools
import json
import statistics
import sys

import pytest
import torch

import data
import rm
import train
from model import GPT, GPTConfig
from parts.huggingface import LAYOUTS
from parts.normalize import normalize

KINDS = [
    ("gpt2", {}, True),
    ("opt", {}, True),
    ("opt", {"pre_norm": False, "embed_dim": 8}, False),
    ("llama", {}, False),
    ("qwen3", {}, False),
    ("gpt_neox", {}, True),
]


def end_scores(model, groups) -> list[float]:
    """Compute the rewards at the last tokens of all texts, in the padded layout."""
    ids, mask = data.pad_rows(list(itertools.chain(*groups)), model.pad_id)
    values = model.forward_value(ids, mask, return_value_only=True)
    return values[range(len(ids)), mask.sum(1) - 1].tolist()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("model_type, overrides, in_the_norm", KINDS)
def test_scores_get_mean_0_and_deviation_1_and_keep_it_in_the_file(
    model_type, overrides, in_the_norm, layout, tmp_path
):
    torch.manual_seed(0)
    shape = dict(vocab_size=24, n_layer=2, n_embd=16, n_head=2, n_positions=16)
    model = rm.RewardModel(GPT(GPTConfig(model_type, **shape | overrides)), pad_id=0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    groups = torch.randint(1, 24, (20, 2, 9)).tolist()
    before = end_scores(model, groups)
    said = normalize(model, before)
    mean, deviation = statistics.fmean(before), statistics.pstdev(before)
    assert f"mean {mean:.4f}, standard deviation {deviation:.4f}" in said
    assert ("norm's bias" in said) == in_the_norm
    model.save_pretrained(tmp_path, layout)
    assert ("reward_bias" in json.loads((tmp_path / "config.json").read_text())) != in_the_norm
    loaded = rm.RewardModel.from_pretrained(tmp_path)
    for scored in (model, loaded):
        after = end_scores(scored, groups)
        assert after == pytest.approx([(score - mean) / deviation for score in before], abs=2e-5)
        moments = statistics.fmean(after), statistics.pstdev(after)
        assert moments == pytest.approx((0, 1), abs=2e-5)
        values = scored.forward_value(torch.tensor([groups[0][0]]))  # step 3's call
        assert values["chosen_end_scores"].item() == pytest.approx(after[0], abs=2e-5)
    normalize(loaded, [score + 1 for score in after])  # a bias that is there already is shifted too
    again = end_scores(loaded, groups)
    assert again == pytest.approx([score - 1 for score in after], abs=5e-5)


@pytest.mark.parametrize(
    "scores, found", [([1.0, 1.0], "0"), ([1.0, float("nan")], "nan"), ([1.0, float("inf")], "nan")]
)
def test_scores_without_a_spread_are_refused(scores, found):
    model = rm.RewardModel(GPT(GPTConfig(vocab_size=8, n_layer=1, n_embd=8, n_head=2)), 0)
    with pytest.raises(ValueError, match=f"--normalize_rewards: .* standard deviation {found}"):
        normalize(model, scores)


def test_model_that_cannot_be_normalized_is_saved_as_it_is(tmp_path, monkeypatch):
    flags = "--max_steps 1 --n_layer 1 --n_embd 16 --n_head 2 --eval_iters 1 --save_interval 0"
    flags += f" --normalize_rewards --output_dir {tmp_path}/out"
    monkeypatch.setattr(sys, "argv", ["train.py", *flags.split()])
    evaluate = train.evaluate
    monkeypatch.setattr(train, "evaluate", lambda *a: evaluate(*a) | {"scores": [1.0, 1.0]})
    with pytest.raises(SystemExit, match="train.py: error: --normalize_rewards: the 2 end scores"):
        train.main()
    assert not rm.RewardModel.from_pretrained(tmp_path / "out").reward_bias
    assert (tmp_path / "out" / "report.html").exists()


def test_training_with_the_flag(tmp_path, monkeypatch, capsys):
    """Normalize over the eval responses, each once: those of a ranking of three count as three."""
    rows = []
    for i, c in enumerate(itertools.islice(data.known_rewards(0), 24)):
        responses = [*c.responses, " No."][: 2 + i % 2]
        rows.append(json.dumps({"prompt": c.prompt, "responses": responses}))
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(rows))
    flags = "--max_steps 2 --n_layer 1 --n_embd 16 --n_head 2 --vocab_size 400"
    flags += f" --data_path {file} --eval_path {file} --normalize_rewards"
    flags += f" --output_dir {tmp_path}/out"
    monkeypatch.setattr(sys, "argv", ["train.py", *flags.split()])
    train.main()
    assert "end scores of 60 eval responses: mean" in capsys.readouterr().out
    model = rm.RewardModel.from_pretrained(tmp_path / "out")
    tokenizer = data.load_tokenizer(tmp_path / "out")
    groups = [data.tokenize(c, tokenizer, 512) for c in data.load_comparisons(file)]
    scores = end_scores(model, groups)
    assert len(scores) == 60
    moments = statistics.fmean(scores), statistics.pstdev(scores)
    assert moments == pytest.approx((0, 1), abs=1e-4)
