"""Tests of tools/bench.py: the contestants compute the same loss, on batches as asked for."""

from model import GPT
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
