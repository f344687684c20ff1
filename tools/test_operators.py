"""The work of the host in a step: operators by hand, and counts that do not grow with the batch."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from model import GPT, GPTConfig
from rm import RewardModel
from tools import bench, operators

SHAPE = dict(vocab_size=bench.VOCAB_SIZE, n_positions=bench.MAX_SEQ_LEN, n_head=2, n_embd=16)


def counted(pairs: int, n_layer: int) -> operators.Operators:
    (groups,) = bench.random_batches(1, pairs)
    with operators.path_of_a_gpu(), FakeTensorMode(allow_non_fake_inputs=True):
        model = RewardModel(GPT(GPTConfig("opt", n_layer=n_layer, **SHAPE)), pad_id=0)
        return operators.count_operators(model, groups)


def test_count_of_a_few_operators_by_hand():
    x = torch.ones(2, 3)
    with operators.Count() as count:
        y = (x.t() @ x).to(torch.bfloat16)  # a view, a product, a cast
        y.unflatten(0, (3, 1)).detach()
    assert count.names == {"mm": 1, "_to_copy": 1}


def test_operators_grow_with_the_layers_and_not_with_the_batch():
    """The loss has no operator of a pair, and attention none of a text."""
    few, many = counted(4, 2), counted(32, 2)
    assert few == many
    deeper = counted(4, 4)
    deepest = counted(4, 6)
    assert deepest.forward - deeper.forward == deeper.forward - few.forward
    # A layer has six products, each with a cast of its weight and of its bias; one cast of x for q,
    # k and v, one for the MLP; these have gradients, and so has each sublayer's half-precision
    # output, which joins the residual stream.
    assert deeper.casts - few.casts == 2 * (2 * (6 * 2 + 2) + 2)


def test_no_pairs_are_an_error_of_the_flag(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["operators", "--pairs", "0"])
    with pytest.raises(SystemExit):
        operators.main()
    assert "argument --pairs: found '0'; expected a whole number from 1" in capsys.readouterr().err


def test_a_step_of_the_host_is_measured_in_parts():
    (groups,) = bench.random_batches(1, 4)
    with operators.path_of_a_gpu():
        host = operators.host_milliseconds(GPTConfig("opt", n_layer=1, **SHAPE), groups)
    assert min(host.pack, host.loss, host.dispatch) > 0
    assert host.all == pytest.approx(host.pack + host.dispatch)
