"""What the benchmark compares computes the same loss."""

import torch

from model import GPT
from tools import bench

GROUPS = [[[5, 6, 7, 8], [5, 6, 9]], [[11, 12], [13, 14, 15, 16]]]


def test_layouts_of_ours_have_one_loss():
    losses = [
        bench.Ours(*how, n_layer=1, n_embd=64).loss(GROUPS).item()
        for how in (("packed",), ("padded",), ("padded", "gpt2", 32))
    ]
    assert max(losses) - min(losses) < 1e-6 < abs(losses[0])


def test_opt_of_transformers_with_the_reference_loop_has_the_loss_of_ours():
    theirs, ours = bench.TransformersOPT(), bench.Ours("packed", "opt")
    ours.model.backbone = GPT.from_hf(
        theirs.theirs.config.to_dict(), theirs.theirs.state_dict(), "transformers"
    )
    ours.model.v_head = theirs.model.v_head
    with torch.no_grad():
        assert abs(theirs.loss(GROUPS) - ours.loss(GROUPS)) < 1e-5


def test_a_step_changes_the_weights():
    ours = bench.Ours("packed", n_layer=1, n_embd=64)
    before = ours.model.v_head.weight.clone()
    ours.step(GROUPS)
    assert (ours.model.v_head.weight != before).all()


def test_pairs_have_the_lengths_that_were_asked_for():
    batches = bench.random_batches(2, 3)
    assert [len(batch) for batch in batches] == [3, 3]
    for chosen, rejected in sum(batches, []):
        assert chosen != rejected and max(map(len, (chosen, rejected))) <= bench.MAX_SEQ_LEN
        assert all(0 < token < bench.VOCAB_SIZE for token in chosen + rejected)  # no padding inside
