"""Tests of tools/study.py: the cells, the measures beside brute force, and the page."""

import itertools
import json
import math
import random
from xml.etree import ElementTree

import numpy as np
import pytest
import torch

import data
import rm
from model import GPT, GPTConfig
from parts.packed import pack
from tools import study, study_cells
from tools.score import score

GROUPS = [[[1, 2, 3, 4, 5], [1, 2, 6]], [[7, 8], [7, 9, 10, 11]], [[1, 2], [1, 2, 3, 4]]]
METRICS = [*study.QUALITY, *study.LENGTH]


def test_the_shorter_region_is_every_position_of_both_texts_from_the_first_that_differs():
    texts = [list(text) for n in range(1, 5) for text in itertools.product((1, 2), repeat=n)]
    for a, b in itertools.product(texts, repeat=2):
        differ = [t for t in range(min(len(a), len(b))) if a[: t + 1] != b[: t + 1]]
        region = range(*study.shorter_region(a, b))
        assert list(region) == (differ or [min(len(a), len(b)) - 1])


def test_up_to_the_shorter_end_no_reward_at_padding_is_read(monkeypatch):
    monkeypatch.setattr(rm, "divergent_region", study.shorter_region)
    ids, mask = data.pad_rows([pair[0] for pair in GROUPS] + [pair[1] for pair in GROUPS], 0)
    rewards = torch.randn(ids.shape, dtype=torch.float64, requires_grad=True)
    rm.pairwise_loss(ids, rewards, 0, attention_mask=mask)["loss"].backward()
    assert (rewards.grad[mask == 0] == 0).all() and (rewards.grad[:, 1] != 0).any()


def test_a_batch_packed_with_the_shorter_region_reads_no_padding():
    model = rm.RewardModel(GPT(GPTConfig(n_layer=1, n_head=1, n_embd=8)), pad_id=0)
    for region, reads_padding in ((study.shorter_region, False), (None, True)):
        batch = model.pack(GROUPS, region=region)
        regions, _ = batch.pairs
        is_padding = regions.places >= sum(batch.branches)
        assert is_padding.any() == reads_padding and regions.weights.sum() == pytest.approx(1)


def test_confounded_labels_have_the_stated_probability():
    pairs = list(itertools.islice(data.known_rewards(3), 20_000))
    stays, differences = [], []
    for pair, drawn in zip(pairs, study.confounded(pairs, seed=5)):
        stays.append(drawn.responses == pair.responses)
        words = [len(response.split()) for response in pair.responses]
        difference = pair.rewards[0] - pair.rewards[1]
        differences.append(difference + 0.3 * (words[0] - words[1]))
    p = 1 / (1 + np.exp(-np.array(differences)))
    for low in np.arange(0, 1, 0.1):
        some = (low <= p) & (p < low + 0.1)
        error = math.sqrt((p * (1 - p))[some].sum())
        assert some.sum() > 100
        assert abs((np.array(stays) - p)[some].sum()) < 4 * error


def test_confounded_pairs_are_the_same_pairs_and_a_word_weighs_as_tone_does():
    pairs = list(itertools.islice(data.known_rewards(3), 4000))
    drawn = list(study.confounded(pairs, seed=5))
    assert drawn == list(study.confounded(pairs, seed=5)) != list(study.confounded(pairs, seed=6))
    for a, b in zip(pairs, drawn):
        assert a.prompt == b.prompt
        assert sorted(zip(a.responses, a.rewards)) == sorted(zip(b.responses, b.rewards))
    words = [len(response.split()) for pair in pairs for response in pair.responses]
    of_tone = np.std(list(data.TONE_REWARD.values()))
    assert study.LENGTH_BONUS * np.std(words) == pytest.approx(of_tone, rel=0.05)


def test_late_pairs_have_half_of_the_remarks_in_front_and_the_same_sentences():
    pairs = list(itertools.islice(data.known_rewards(3), 2000))
    moved = list(study.late(pairs, seed=5))
    assert moved == list(study.late(pairs, seed=5)) != list(study.late(pairs, seed=6))
    remarks = tuple(f" {remark}" for remark in itertools.chain(*data.TONES))
    in_front = []
    for a, b in zip(pairs, moved):
        assert (a.prompt, a.rewards) == (b.prompt, b.rewards)
        for before, after in zip(a.responses, b.responses):
            assert sorted(before.split()) == sorted(after.split())
            assert not before.startswith(remarks)
            if any(remark in before for remark in remarks):
                in_front.append(after.startswith(remarks))
            assert after.startswith(remarks) or after == before
    assert abs(sum(in_front) - len(in_front) / 2) < 4 * math.sqrt(len(in_front)) / 2


def test_features_of_a_response_give_its_reward():
    for pair in itertools.islice(data.known_rewards(1), 500):
        for response, reward in zip(pair.responses, pair.rewards):
            polite, rude, rambles, right, wrong = study.features_of(response, reward)
            off_topic = 1 - right - wrong
            expected = 1.4 * polite - 1.4 * rude - rambles + 3.5 * right - wrong - 3.5 * off_topic
            assert reward == pytest.approx(expected)


def test_partial_coefficient():
    rng = np.random.default_rng(0)
    control = rng.normal(size=500)
    x = 7 * control + rng.normal(size=500)  # so a plain correlation would be far off
    exact = 2 * x - 13 * control + 5
    assert study.partial_coefficient(exact, x, control) == pytest.approx(2 * x.std() / exact.std())
    controls, y = rng.normal(size=(500, 3)), x + rng.normal(size=500)
    slope = np.linalg.lstsq(np.column_stack((np.ones(500), controls, x)), y, rcond=None)[0][-1]
    assert study.partial_coefficient(y, x, controls) == pytest.approx(slope * x.std() / y.std())
    assert study.partial_coefficient(3 * control, x, control) == pytest.approx(0, abs=1e-9)


def test_statistics_of_a_few_pairs():
    found = study.statistics([[2, 1], [0, 3], [5, 1], [1, 0]], [[4, 2], [3, 1], [1, 2], [2, 2]])
    assert (found["pairs"], found["accuracy"]) == (4, 0.75)
    assert (found["accuracy_longer"], found["accuracy_shorter"]) == (0.5, 1)
    assert (found["chosen_is_longer"], found["chosen_is_shorter"]) == (0.5, 0.25)
    losses = [math.log(1 + math.exp(-margin)) for margin in (1, -3, 4, 1)]
    assert found["loss"] == pytest.approx(np.mean(losses))
    true = [[1.5, 0], [1, 0], [0, 1], [0, 2.5]]
    features = [[[i, j] for j in range(2)] for i in range(4)]
    found = study.statistics(true, [[4, 2], [3, 1], [1, 2], [2, 2]], true, features)
    assert found["probability_error"] == 0 and found["score_length"] == found["true_length"]
    assert found["length_given_reward"] == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("loss", ["divergent", "end"])
def test_stored_features_give_the_loss_of_the_backbone(loss, tmp_path, monkeypatch):
    torch.manual_seed(0)
    config = GPTConfig("llama", vocab_size=20, n_positions=16, n_layer=2, n_head=2, n_embd=8)
    model = rm.RewardModel(GPT(config), pad_id=0)
    model.loss = loss
    monkeypatch.setattr(study_cells, "backbone_of", lambda path, pad_id: model.backbone)
    hidden = study.stored_features(GROUPS, "there", 0, tmp_path, at_once=2)
    monkeypatch.setattr(study_cells, "backbone_of", None)  # found again, not made again
    assert study.stored_features(GROUPS, "there", 0, tmp_path).keys() == hidden.keys()
    head = rm.RewardModel(study.StoredBackbone(model.backbone.config, hidden), pad_id=0)
    head.v_head = model.v_head
    head.loss = loss
    batch = pack(GROUPS[::-1], 0, longest_tail=model.longest_tail)
    expected = model(batch)
    for name, found in head(batch).items():
        assert torch.allclose(found, expected[name], atol=2e-3)
    assert list(head.parameters()) == [head.v_head.weight]
    expected = [pytest.approx(row, abs=2e-3) for row in score(model, GROUPS, 4)]
    assert score(head, GROUPS, 4) == expected


def made_up(cell: str) -> dict:
    kind, objective, seed = cell.split("/")
    rng = random.Random(cell)
    row = {"cell": cell, "data": kind, "objective": objective, "seed": int(seed), "steps": 10}
    row |= {"pairs": 100, "seconds": 1.0, "chosen_is_longer": 0.4, "chosen_is_shorter": 0.5}
    # These need the true rewards.
    of_built_in = ("probability_error", "length_given_reward", "length_given_features")
    for name in METRICS:
        if not kind.startswith("hh") or name not in of_built_in:
            row[name] = rng.random()
    if not kind.startswith("hh"):
        row["ideal"] = {name: rng.random() for name in study.LENGTH}
    return row


def test_cells_run_once_and_the_page_has_every_one_of_them(tmp_path, monkeypatch):
    ran = []

    def run_cell(cell, options):
        ran.append(cell)
        return made_up(cell)

    monkeypatch.setattr(study, "run_cell", run_cell)
    study.main(["run", "--out", str(tmp_path), "--only", "clean/end", "hh-head/shorter/2"])
    assert ran == ["clean/end/1", "clean/end/2", "clean/end/3", "hh-head/shorter/2"]
    study.main(["run", "--out", str(tmp_path)])
    assert len(ran) == len(set(ran)) == 45
    study.main(["page", "--out", str(tmp_path), "--docs", str(tmp_path / "docs")])
    text = (tmp_path / "docs" / "study.md").read_text()
    rows = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    for kind, objective in itertools.product(study.DATA, study.OBJECTIVES):
        for name in set(METRICS) & set(rows[-1] if kind.startswith("hh") else rows[0]):
            cells = [row for row in rows if (row["data"], row["objective"]) == (kind, objective)]
            values = [row[name] for row in cells]
            assert f"{np.mean(values):.4f} ± {np.std(values, ddof=1) / math.sqrt(3):.4f}" in text
    assert text.count("(n = 3)") == 5 * 3 * 2 + 10
    template = (study.HERE / "study_page.md").read_text()
    said = [line for line in template.splitlines() if "{" not in line]
    assert len(said) > 60
    assert all(line in text for line in said)
    plots = sorted((tmp_path / "docs").glob("*.svg"))
    assert len(plots) == 4
    for plot in plots:
        assert plot.name in text
        assert ElementTree.parse(plot).getroot().tag.endswith("svg")


def test_the_page_in_docs_is_the_page_of_its_results(tmp_path):
    docs = study.HERE.parent / "docs"
    for name in ("study-results.jsonl", "real-results.jsonl"):
        (tmp_path / name.removeprefix("study-")).write_text((docs / name).read_text())
    study.main(["page", "--out", str(tmp_path), "--docs", str(tmp_path / "docs")])
    written = sorted((tmp_path / "docs").iterdir())
    names = ["study.md", "results.md", "real-results.jsonl"]
    names += [plot.name for plot in docs.glob("study-*.svg")]
    assert [file.name for file in written] == sorted(names)
    for file in written:
        assert file.read_bytes() == (docs / file.name).read_bytes()


def test_a_page_of_some_cells_and_no_page_of_cells_that_cannot_be_compared(tmp_path):
    file = tmp_path / "results.jsonl"
    file.write_text(json.dumps(made_up("confounded/end/1")) + "\n")
    study.main(["page", "--out", str(tmp_path), "--docs", str(tmp_path / "docs")])
    assert "No cell of clean has been run" in (tmp_path / "docs" / "study.md").read_text()
    with file.open("a") as more:
        more.write(json.dumps(made_up("confounded/end/2") | {"steps": 11}) + "\n")
    with pytest.raises(ValueError, match="confounded: cells of different"):
        study.main(["page", "--out", str(tmp_path), "--docs", str(tmp_path / "docs")])


def test_a_cell_that_is_none_is_named(tmp_path):
    with pytest.raises(SystemExit, match="'clean/ends'"):
        study.main(["run", "--out", str(tmp_path), "--only", "clean/ends"])
