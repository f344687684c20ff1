"""Tests of tools/study_pairs.py and tools/study_real.py: folds, places, heads, a tiny whole run."""

import gzip
import itertools
import json
import math

import numpy as np
import pytest
import torch

import data
import rm
import train
from model import GPT, GPTConfig
from parts.packed import trunk_length
from tools import study, study_cells, study_pairs, study_real
from tools.study_pairs import READINGS

# Beside ordinary pairs: a text that is the start of the other, and texts of one token behind it.
GROUPS = [
    [[1, 2, 3, 4, 5, 9], [1, 2, 6, 9]],
    [[7, 8, 9], [7, 9]],
    [[1, 2], [1, 2, 3, 4]],
    [[5, 4, 3, 2, 1, 2, 3, 9], [5, 4, 3, 3, 3, 9]],
]


@pytest.fixture
def tiny(monkeypatch):
    torch.manual_seed(0)
    config = GPTConfig("llama", vocab_size=20, n_positions=16, n_layer=2, n_head=2, n_embd=8)
    model = rm.RewardModel(GPT(config), pad_id=0)
    monkeypatch.setattr(study_cells, "backbone_of", lambda path, pad_id: model.backbone)
    return model


# --------------------------------------------------------------------------------------------------
# Pairs


def test_no_cluster_is_in_two_parts_and_every_pair_is_in_one():
    clusters = np.random.default_rng(0).integers(0, 40, size=100)
    parts = study_pairs.split_clusters(clusters, 5)
    assert sorted(np.concatenate(parts)) == list(range(100))
    of_part = [set(clusters[part]) for part in parts]
    assert sum(map(len, of_part)) == len(set(clusters))
    training = np.concatenate(parts[1:])
    kept, chosen = study_pairs.held_out(training, clusters)
    assert sorted([*kept, *chosen]) == sorted(training)
    assert not set(clusters[kept]) & set(clusters[chosen])
    assert 0.1 < len(chosen) / len(training) < 0.3


def test_a_dialogue_becomes_messages():
    assert study_pairs.messages_of("\n\nHuman: a\n\nb\n\nAssistant: c\n\nHuman:") == [
        {"role": "user", "content": "a\n\nb"},
        {"role": "assistant", "content": "c"},
        {"role": "user", "content": ""},
    ]
    with pytest.raises(ValueError, match="expected"):
        study_pairs.messages_of("a\n\nAssistant: c")


@pytest.mark.parametrize(
    "length, start, expected",
    [
        (105, 4, [28, 53, 78, 103, 104]),  # 100 tokens from 4 on, and the last one
        (8, 4, [4, 5, 6, 6, 7]),
        (6, 4, [4, 4, 4, 4, 5]),
        (5, 4, [4, 4, 4, 4, 4]),  # the text's last token is all that there is
    ],
)
def test_reading_places(length, start, expected):
    assert study_pairs.reading_places(length, start) == expected


def test_the_reward_after_a_share_is_that_of_the_text_cut_there(tiny):
    tiny.loss = "end"
    for group in GROUPS:
        found = study_pairs.margins_of(tiny, [group])[0]
        places = [study_pairs.reading_places(len(text), trunk_length(group)) for text in group]
        for reading, chosen, rejected in zip(found, *places):
            cut = [group[0][: chosen + 1], group[1][: rejected + 1]]
            ids, mask = data.pad_rows(cut, 0)
            scores = tiny(ids, mask)
            margin = scores["chosen_mean_scores"] - scores["rejected_mean_scores"]
            assert reading == pytest.approx(margin.item(), abs=0.01)  # found in bfloat16


def test_the_mean_over_the_region_is_that_of_the_padded_rewards(tiny):
    found = study_pairs.margins_of(tiny, GROUPS, at_once=3)[:, READINGS.index("mean")]
    ids, mask = data.pad_rows([text for group in GROUPS for text in group], 0)
    rewards = tiny.token_rewards(ids, mask)
    for i, (group, margin) in enumerate(zip(GROUPS, found)):
        start, stop = rm.divergent_region(*group)
        expected = (rewards[2 * i] - rewards[2 * i + 1])[start:stop].mean()
        assert margin == pytest.approx(expected.item(), abs=0.01)


# --------------------------------------------------------------------------------------------------
# Heads


def features_of(tiny, directory):
    return study_pairs.load_features(GROUPS, "there", 0, directory)


def test_features_are_found_again(tiny, tmp_path, monkeypatch):
    first = features_of(tiny, tmp_path)
    monkeypatch.setattr(study_cells, "backbone_of", None)
    second = features_of(tiny, tmp_path)
    assert torch.equal(first.region, second.region)
    assert torch.equal(first.readings, second.readings)


@pytest.mark.parametrize("objective", ["divergent", "end", "shorter", "both"])
def test_the_loss_of_a_head_is_that_of_the_model(tiny, tmp_path, monkeypatch, objective):
    features = features_of(tiny, tmp_path)
    regression = study_real.regression_of(features, objective)
    ids, mask = data.pad_rows([group[0] for group in GROUPS] + [group[1] for group in GROUPS], 0)
    rewards = tiny.token_rewards(ids, mask)
    losses = {"both": ["divergent", "end"], "shorter": ["divergent"]}.get(objective, [objective])
    some = [np.arange(4), np.array([2, 0])]
    if objective == "shorter":
        monkeypatch.setattr(rm, "divergent_region", study.shorter_region)
        some = [np.array([0, 1, 3]), np.array([3, 0])]  # pair 2: see `Features.texts`
    for pairs in some:
        rows = torch.tensor([*pairs, *(pairs + 4)])
        expected = 0.0
        for loss in losses:
            how = dict(attention_mask=mask[rows], loss=loss)
            expected += rm.pairwise_loss(ids[rows], rewards[rows], 0, **how)["loss"].item()
        found = regression.of(pairs).loss(tiny.v_head.weight[0])
        assert found.item() == pytest.approx(expected, abs=2e-3)


def test_readings_of_features_are_margins_of_the_model(tiny, tmp_path):
    features = features_of(tiny, tmp_path)
    found = (features.readings @ tiny.v_head.weight[0].detach()).numpy()
    assert found == pytest.approx(study_pairs.margins_of(tiny, GROUPS), abs=0.01)


def made_regression(pairs: int, wide: int) -> tuple:
    """Make pairs of 1 to 3 rows whose labels follow from a known w."""
    generator = torch.Generator().manual_seed(0)
    counts = torch.randint(1, 4, (pairs,), generator=generator)
    rows = torch.randn(int(counts.sum()), wide, generator=generator)
    w = torch.arange(1.0, wide + 1)
    signs = torch.where(torch.rand(len(rows), generator=generator) < (rows @ w).sigmoid(), 1, -1)
    rows = rows * signs[:, None]
    weights = 1 / counts.repeat_interleave(counts)
    return study_real.Regression(rows, weights, counts), w


def test_the_minimum_has_no_gradient_and_finds_what_made_the_labels():
    regression, w = made_regression(3000, 3)
    found = study_real.by_minimum(regression, 1e-3).requires_grad_()
    loss = regression.loss(found) + 1e-3 * found.square().sum()
    loss.backward()
    assert found.grad.abs().max() < 1e-4
    exact = study_real.by_minimum(regression, 0.0)
    assert (exact - w).abs().max() < 0.3


def test_steps_are_those_of_train():
    """The optimizer, schedule and batches of train.py, written a second time, pair by pair."""
    regression, _ = made_regression(20, 4)
    head = study_real.Head(epochs=2)
    found = study_real.by_steps(regression, 1e-2, head, seed=3)
    torch.manual_seed(3)
    layer = torch.nn.Linear(4, 1, bias=False)
    optimizer = torch.optim.AdamW(layer.parameters(), betas=(0.9, 0.95), weight_decay=0.0)
    starts = [0, *regression.counts.cumsum(0).tolist()]
    for step in range(6):
        optimizer.param_groups[0]["lr"] = 1e-2 * 0.5 * (1 + math.cos(math.pi * step / 6))
        losses = []
        for pair in train.batch_indices(20, 8, 3, step):
            margins = layer(regression.rows[starts[pair] : starts[pair + 1]])[:, 0]
            losses.append(-torch.nn.functional.logsigmoid(margins).mean())
        optimizer.zero_grad()
        torch.stack(losses).mean().backward()
        torch.nn.utils.clip_grad_norm_(layer.parameters(), 1.0)
        optimizer.step()
    assert found == pytest.approx(layer.weight[0].detach(), abs=1e-6)
    zeros = study_real.by_steps(regression, 0.0, study_real.Head(zeros=True), seed=3)
    assert not zeros.any()


def test_a_rate_is_chosen_on_training_pairs_and_each_pair_is_evaluated_once(monkeypatch):
    regression, w = made_regression(100, 3)
    regression = study_real.Regression(
        regression.rows[:100], torch.ones(100), torch.ones(100).long()
    )
    clusters = np.arange(100) // 2
    parts = study_pairs.split_clusters(clusters, 5)
    folds = [(np.delete(np.arange(100), part), part) for part in parts]
    pairs = study_pairs.Pairs([], [], np.zeros((100, 2)), clusters, folds, 0)
    readings = regression.rows[:, None].expand(-1, 6, -1).clone()
    asked = []
    by_minimum = study_real.by_minimum
    monkeypatch.setattr(
        study_real,
        "by_minimum",
        lambda some, penalty: asked.append(some) or by_minimum(some, penalty),
    )
    head = study_real.Head(optimum=True)
    found = study_real.linear_arm(regression, readings, pairs, head, 1)
    assert found["margins"].shape == (100, 6)
    assert len(found["chosen"]) == 5 and set(found["chosen"]) <= set(study_real.PENALTIES)
    # Wrong labels in a fold change what it is measured at, and none of its choices and weights.
    wrong = regression.rows.clone()
    wrong[parts[0]] *= -1
    regression.rows = wrong
    readings[parts[0]] *= -1
    again = study_real.linear_arm(regression, readings, pairs, head, 1)
    count = len(parts[0])
    assert again["trials"][0] == found["trials"][0] != again["trials"][1]
    assert again["margins"][:count] == pytest.approx(-found["margins"][:count])


def test_a_share_of_the_training_pairs_is_of_whole_clusters():
    clusters = np.arange(100) // 3
    training = np.arange(9, 100)
    some = study_real.training_share(training, clusters, 0.5)
    assert set(some) < set(training) and len(some) == pytest.approx(46, abs=4)
    left = set(training) - set(some)
    assert not set(clusters[some]) & set(clusters[list(left)])
    assert study_real.training_share(training, clusters, 1.0).tolist() == training.tolist()


# --------------------------------------------------------------------------------------------------
# A whole run


def write_data(directory):
    """Write made-up pairs in the formats of alpaca-eval and hh-harmless: 60 + 20, 40 + 10 rows."""
    stream = data.known_rewards(0)
    for name, counts in (("alpaca-eval", (60, 20)), ("hh-harmless", (40, 10))):
        (directory / name).mkdir()
        for file, count in zip(("train", "eval"), counts):
            lines = []
            for i, pair in enumerate(itertools.islice(stream, count)):
                sides = dict(zip(("chosen", "rejected"), pair.responses))
                if name == "hh-harmless":
                    row = {side: pair.prompt + text for side, text in sides.items()}
                else:
                    content = f"{file} {i // 3} {pair.prompt}"
                    row = {"prompt": [{"role": "user", "content": content}]}
                    for side, text in sides.items():
                        row[side] = [{"role": "assistant", "content": text}]
                lines.append(json.dumps(row) + "\n")
            with gzip.open(directory / name / f"{file}.jsonl.gz", "wt") as written:
                written.writelines(lines)


def check_summaries(rows: list[dict], summaries: list[dict]):
    """Accuracies are shares of pairs, ties half; differences are differences of accuracies."""
    right = {}
    for row in rows:
        arm = row["cell"].rsplit("/", 1)[0]
        for reading in READINGS:
            margins = row[reading]
            ties = sum(margin == 0 for margin in margins)
            wins = sum(margin > 0 for margin in margins)
            right[arm, reading] = (wins + ties / 2) / len(margins)
    assert len(summaries) == len(rows)
    for summary in summaries:
        arm = summary["arm"]
        kind = arm.split("/")[0]
        assert summary["accuracy"] == summary["at"]["end"]
        for reading in READINGS:
            assert summary["at"][reading][0] == pytest.approx(right[arm, reading], abs=1e-4)
            for other in ("divergent", "end"):
                if other in summary:
                    found = summary[other][reading]
                    gap = right[arm, reading] - right[found["minus"], reading]
                    assert found["mean"] == pytest.approx(gap, abs=1e-4)
        assert ("judge" in summary) == (kind != "built-in" and "/longer/" not in arm)
        if "judge" in summary:
            gap = right[arm, "end"] - right[f"{kind}/longer/-/whole", "end"]
            assert summary["judge"]["mean"] == pytest.approx(gap, abs=1e-4)
    for other in ("divergent", "end"):
        assert sum(other in summary for summary in summaries) == 5


def test_a_whole_run_and_its_pages(built_in_run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(study_real, "BUILT_IN_STEPS", 2)
    monkeypatch.setattr(study_real, "MAX_SEQ_LENS", {"alpaca": 64, "hh": 64, "alpaca-512": 96})
    monkeypatch.setattr(study_real, "HEAD_RATES", (1e-3, 1e-2))
    monkeypatch.setattr(study_real, "PENALTIES", (1e-2, 1e-3))
    monkeypatch.setattr(train, "EVAL_PAIRS", 40)
    write_data(tmp_path)
    out, docs = tmp_path / "out", tmp_path / "docs"
    command = ["real", "--out", str(out), "--data", str(tmp_path), "--seeds", "1"]
    command += ["--backbone", str(built_in_run[0]), "--only"]
    linear = [f"{kind}/{arm}" for kind in ("alpaca", "hh") for arm in ("longer", "words")]
    for objective, variant in itertools.product(("end", "divergent"), ("default", "optimum")):
        linear += [f"{kind}/head/{objective}/{variant}" for kind in ("alpaca", "hh")]
    whole = ["built-in/all/end", "alpaca/all/end/5e-5", "alpaca/all/divergent/5e-5"]
    study.main([*command, *linear, "--plan"])
    assert "14 of 14 cells to run" in capsys.readouterr().out and not (out / "real.jsonl").exists()
    study.main([*command, *linear])
    study.main([*command, *whole])
    rows = study_cells.results(out, "real.jsonl")
    assert len(rows) == len({row["cell"] for row in rows}) == 17
    for row in rows:
        pairs = {"alpaca": 20, "hh": 50, "built-in": 40}[row["cell"].split("/")[0]]
        assert [len(row[reading]) for reading in READINGS] == [pairs] * 6
        assert np.isfinite([row[reading] for reading in READINGS]).all()
    study.main([*command, *whole])  # done before
    assert study_cells.results(out, "real.jsonl") == rows
    (out / "results.jsonl").write_text((study.HERE.parent / "docs/study-results.jsonl").read_text())
    study.main(["page", "--out", str(out), "--docs", str(docs)])
    pages = [(docs / name).read_text() for name in ("results.md", "study.md")]
    assert "head on frozen features, `end`" in pages[0] and "all weights, `end`" in pages[1]
    check_summaries(rows, study_cells.results(docs, "real-results.jsonl"))
    (out / "real.jsonl").rename(out / "elsewhere.jsonl")
    (docs / "real-results.jsonl").rename(out / "real-results.jsonl")
    study.main(["page", "--out", str(out), "--docs", str(docs)])
    assert [(docs / name).read_text() for name in ("results.md", "study.md")] == pages
