"""Tests of tools/bench.py: contestants compute the same loss; figures are what they say.

No time is tested. That nothing waits for a GPU is in parts/test_packed.py.
"""

import math
import re

import pytest
import torch

from model import GPT, GPTConfig
from tools import bench

GROUPS = [[[5, 6, 7, 8], [5, 6, 9]], [[11, 12], [13, 14, 15, 16]]]


def loss_of(contestant: bench.Ours) -> float:
    return contestant.forward_backward(GROUPS)[0].item()


def test_layouts_of_ours_have_one_loss():
    losses = []
    for how in ({}, {"layout": "padded"}, {"layout": "padded", "pad_to": 32}, {"at_once": 1}):
        losses.append(loss_of(bench.Ours(bench.small_model(n_layer=1, n_embd=64), **how)))
    assert max(losses) - min(losses) < 1e-6 < abs(losses[0])


def test_opt_of_transformers_with_the_reference_loop_has_the_loss_of_ours():
    theirs = bench.TransformersOPT(bench.SHAPES["small OPT"], pad_to=bench.MAX_SEQ_LEN)
    ours = bench.Ours(bench.small_model("opt"))
    backbone = theirs.model.backbone
    ours.model.backbone = GPT.from_hf(
        backbone.config.to_dict(), backbone.state_dict(), "transformers"
    )
    ours.model.v_head = theirs.model.v_head
    assert abs(loss_of(theirs) - loss_of(ours)) < 1e-5


def test_a_step_changes_the_weights():
    ours = bench.Ours(bench.small_model(n_layer=1, n_embd=64))
    before = ours.model.v_head.weight.clone()
    ours.step(GROUPS)
    assert (ours.model.v_head.weight != before).all()


def test_pairs_have_the_lengths_that_were_asked_for():
    batches = bench.random_batches(2, 3)
    assert [len(batch) for batch in batches] == [3, 3]
    for chosen, rejected in sum(batches, []):
        assert chosen != rejected and max(map(len, (chosen, rejected))) <= bench.MAX_SEQ_LEN
        assert all(0 < token < bench.VOCAB_SIZE for token in chosen + rejected)  # no padding inside


# --------------------------------------------------------------------------------------------------
# The table of a GPU, with tiny models on a CPU


def tiny_config(model_type: str) -> GPTConfig:
    return GPTConfig(
        model_type,
        vocab_size=bench.VOCAB_SIZE,
        n_positions=bench.MAX_SEQ_LEN,
        n_layer=2,
        n_embd=16,
        n_head=2,
    )


def test_a_compiled_model_has_the_weights_of_the_other_one():
    """A step of one is a step of both; parts/test_packed.py compares their losses."""
    model = bench.random_model(tiny_config("llama"), torch.device("cpu"))
    twin = bench.compiled(model)
    for parameter, other in zip(model.parameters(), twin.parameters(), strict=True):
        assert parameter is other
    for block, other in zip(model.backbone.blocks, twin.backbone.blocks, strict=True):
        assert block._compiled_call_impl is None and other._compiled_call_impl is not None


def test_the_table_of_a_gpu_has_a_row_for_every_contestant(capsys):
    bench.bench_device(torch.device("cpu"), 1, {"an OPT": tiny_config("opt")}, sizes=(2,))
    said, head, line, *rows = capsys.readouterr().out.strip().replace("\n\n", "\n").splitlines()
    version = re.escape(torch.__version__)
    assert re.fullmatch(rf"cpu, \S+ TFLOP/s by torch\.mm; PyTorch {version}", said)
    cells = [row.strip("| ").split(" | ") for row in rows]
    names = ["packed", "packed, --compile", "padded", "transformers, padded"]
    assert [row[:3] for row in cells] == [["an OPT", "2", name] for name in names]
    columns = head.strip("| ").split(" | ")
    assert len(columns) == len(line.strip("|").split("|")) == 7
    for row in cells:
        assert len(row) == len(columns)
        speed, low, high, ms, share = map(float, re.findall(r"[\d.]+", " ".join(row[3:6])))
        assert low <= speed <= high and ms > 0 and 0 <= share < 1


def test_transformers_takes_part_with_opt_alone():
    found = bench.contestants_of(tiny_config("llama"), torch.device("cpu"))
    assert list(found) == ["packed", "packed, --compile", "padded"]
    assert {contestant.optimizer for contestant in found.values()} == {found["packed"].optimizer}


def test_turns_are_added_up_without_the_first():
    """Two steps of 3 pairs a turn: the first turn compiled; the others took 1 and 2 seconds."""
    model = bench.random_model(tiny_config("gpt2"), torch.device("cpu"))
    turns = [
        bench.Turn(50.0, 70, 9000, 2),
        bench.Turn(1.0, 70, 600, 0),
        bench.Turn(2.0, 70, 500, 1),
    ]
    found = bench.figures(bench.Ours(model), [GROUPS + GROUPS[:1]] * 2, turns, peak=1e9)
    linear = 2 * (12 * 16 * 16 + 13 * 16) + 16  # of two blocks, with biases and norms; value head
    weights = linear + 2 * 16 + (bench.VOCAB_SIZE + bench.MAX_SEQ_LEN) * 16
    assert found == {
        "pairs/s": 4.5,
        "lowest": 3.0,
        "highest": 6.0,
        "ms a step": 750.0,
        "tokens a step": 35.0,
        "share of peak": pytest.approx(6 * (linear + 2 * 16) * 140 / 3.0 / 1e9),
        "peak GB": (3 * 4 * weights + 600) / 1e9,
        "seconds of warm-up": 50.0,
        "graphs": 2,
        "graphs later": 1,
    }


def test_a_contestant_that_fails_is_written_down_and_the_others_go_on(capsys):
    model = bench.random_model(tiny_config("gpt2"), torch.device("cpu"))
    broken = bench.Ours(model)
    broken.run = lambda inputs: {"loss": torch.tensor(math.nan, requires_grad=True)}
    contestants = {"broken": broken, "whole": bench.Ours(model)}
    found = bench.in_turns(contestants, [GROUPS], 2, peak=1e12)
    assert list(found) == ["broken", "whole"] and found["whole"]["pairs/s"] > 0
    assert bench.in_a_row(found["broken"]).startswith("ValueError: loss nan, norm of the gradient")


def test_the_peak_of_a_device_is_that_of_its_name(monkeypatch):
    device = torch.device("cuda", 0)
    for name, flops in (
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
    ):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
        assert bench.dense_peak(device) == (flops, "by the datasheet")
    name = "NVIDIA L4"
    monkeypatch.setattr(bench.dry_run, "measured_flops", {"bf16": 1e14}.get)
    assert bench.dense_peak(device) == (1e14, "by torch.mm")


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--device", "cuda"], "--device cuda: PyTorch .* finds no GPU; leave the flag out"),
        (["load", "--device", "cuda"], "--device cuda: found beside `load`, which measures CPUs"),
    ],
)
def test_without_a_gpu_its_table_is_refused_in_a_line(arguments, said, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("sys.argv", ["bench", *arguments])
    with pytest.raises(SystemExit, match=f"^bench: error: {said}") as stopped:
        bench.main()
    assert "\n" not in stopped.value.code
