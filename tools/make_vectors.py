"""Write the conformance kit: inputs and the numbers that any implementation of this training has to give for them.

    python -m tools.make_vectors [DIRECTORY]                      (default: vectors/)

vectors/README.md tells what the files hold. All inputs follow from SEED and the lists below, and are exact in every format: rewards
are multiples of 1/64 and weights multiples of 1/128. All expected numbers are computed in float64 by the functions of rm.py, model.py,
data.py and train.py. So two runs on a machine write the same bytes; on another one, or with other versions of PyTorch, computed
numbers may differ in their last bits (sums in another order, another libm), and nothing else may.
"""

import argparse
import itertools
import json
import random
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch

import data
from tools.check_vectors import arguments
from model import GPT, GPTConfig
from parts.huggingface import family_of, weight_names
from rm import RewardModel, pairwise_loss
from train import make_optimizer

SEED = 20231
DIRECTORY = Path(__file__).resolve().parent.parent / "vectors"

# ----------------------------------------------------------------------------------------------------------------------
# The loss: ids and rewards in, loss, scores and gradient out


def seeded(*names) -> random.Random:
    """Numbers that depend on these names alone, so that adding a case changes no other."""
    return random.Random(" ".join(map(str, (SEED, *names))))


def random_rewards(name: str, rows: list) -> list[list[float]]:
    """One for every id, from -4 to 4."""
    rng = seeded("rewards", name)
    return [[rng.randint(-256, 256) / 64 for _ in row] for row in rows]


def case(
    name: str,
    *rows,
    rewards=None,
    pad_id=0,
    n=0,
    mask=None,
    error=None,
    ids_dtype="int64",
    dtype="float64",
    **options,
) -> dict:
    """The inputs of a case. rows: the chosen ones, then the rejected ones; `mask` is for each row a string of 0 and 1."""
    return {
        "name": name,
        "pad_id": pad_id,
        "num_padding_at_beginning": n,
        "input_ids_dtype": ids_dtype,
        "rewards_dtype": dtype,
        "input_ids": list(rows),
        "attention_mask": mask and [[int(digit) for digit in row] for row in mask],
        "rewards": random_rewards(name, rows) if rewards is None else rewards,
        "options": options,
        "error": error,
    }


def many_pairs(name: str, B: int, L: int, pads_inside: bool, **options) -> dict:
    """Random pairs whose texts share a beginning, most of them, and are ragged, most of them."""
    rng = seeded("ids", name)
    pairs = []
    for _ in range(B):
        prompt = [rng.randint(not pads_inside, 3) for _ in range(rng.randint(0, L))]
        pairs.append(
            [
                (prompt + [rng.randint(not pads_inside, 3) for _ in range(rng.randint(0, L))])[:L]
                or [1]
                for _ in range(2)
            ]
        )
    texts = [pair[0] for pair in pairs] + [pair[1] for pair in pairs]
    return case(
        name,
        *(text + [0] * (L - len(text)) for text in texts),
        mask=[f"{'1' * len(text):0<{L}}" for text in texts] if pads_inside else None,
        **options,
    )


HUGE = [[0.0, -500.0, 500.0, -750.0], [0.0, 500.0, -500.0, 750.0]]
RAGGED = [1, 2, 3, 0, 0, 0], [1, 1, 1, 4, 5, 6], [1, 2, 4, 5, 6, 0], [1, 3, 0, 0, 0, 0]

LOSS_CASES = [
    # Where the region begins and ends. Ids 1 to 9 are tokens, 0 is the pad id.
    case("no padding", [1, 2, 3, 4, 5], [1, 2, 6, 7, 8]),
    case("one token", [3], [4]),
    case("one token, identical", [3], [3]),
    case("one token, three pairs", [3], [5], [6], [4], [5], [7]),
    case("no shared prefix", [1, 2, 3, 0], [4, 2, 3, 5]),
    case("chosen ends first", [1, 2, 3, 0, 0, 0], [1, 2, 6, 7, 8, 0]),
    case("rejected ends first", [1, 2, 6, 7, 8, 0], [1, 2, 3, 0, 0, 0]),
    case("ragged both ways, one row fills L", *RAGGED),
    case("chosen is a prefix of rejected", [1, 2, 0, 0, 0], [1, 2, 3, 4, 0]),
    case("rejected is a prefix of chosen, which fills L", [1, 2, 3, 4], [1, 2, 0, 0]),
    case("identical, padded", [1, 2, 3, 0, 0], [1, 2, 3, 0, 0]),
    case("identical, full", [1, 2, 3], [1, 2, 3]),
    case(
        "identical beside one that is not", [1, 2, 0, 0], [1, 2, 3, 0], [1, 2, 0, 0], [1, 4, 0, 0]
    ),
    case("differs in the last token", [1, 2, 3, 4], [1, 2, 3, 5]),
    case("differs in the last token, padded", [1, 2, 3, 4, 0, 0], [1, 2, 3, 5, 0, 0]),
    case("differs in one token", [1, 2, 3, 4, 5], [1, 6, 3, 4, 5]),
    case("equal again later", [1, 2, 3, 4, 5, 0], [1, 6, 7, 4, 0, 0]),
    case(
        "a long region and a short one weigh the same",
        [1, 2, 3, 4, 5, 6],
        [1, 1, 1, 1, 1, 2],
        [1, 7, 7, 7, 7, 7],
        [1, 1, 1, 1, 1, 3],
    ),
    many_pairs("many pairs", 16, 12, pads_inside=False),
    # Where a text ends without a mask: at the first pad id after num_padding_at_beginning of them
    case("leading pad of the text", [2, 5, 6, 2, 2], [2, 5, 7, 8, 2], pad_id=2, n=1),
    case("leading pad of the text, no padding", [2, 5, 6, 4], [2, 5, 7, 8], pad_id=2, n=1),
    case("leading pad of the text, which is all there is", [2, 2, 2], [2, 5, 2], pad_id=2, n=1),
    case("two leading pads of the text", [2, 2, 5, 6, 2], [2, 2, 7, 2, 2], pad_id=2, n=2),
    case(
        "the first pad id is not in front, and counts as text",
        [5, 6, 2, 2, 2],
        [5, 7, 8, 2, 2],
        pad_id=2,
        n=1,
    ),
    case("a pad id inside ends the text", [1, 2, 0, 3, 4], [1, 5, 6, 0, 7]),
    case("pad id -1", [1, 2, 3, -1], [1, 2, 4, 5], pad_id=-1),
    case("pad id above the tokens", [0, 1, 2, 99], [0, 1, 3, 4], pad_id=99),
    case("ids that float32 cannot tell apart", [1, 16777216, 3], [1, 16777217, 3]),
    case("ids that int32 cannot hold", [1, 4294967297, 3], [1, 1, 3]),
    # Where a text ends with a mask: after the last 1
    case("mask: says what the pad id says", *RAGGED, mask=["111000", "111111", "111110", "110000"]),
    case("mask: pad id in the prompt", [1, 0, 2, 3, 0], [1, 0, 2, 4, 5], mask=["11110", "11111"]),
    case("mask: pad id in a response", [1, 2, 0, 4, 0], [1, 2, 3, 0, 5], mask=["11110", "11111"]),
    case(
        "mask: the texts end with the pad id",
        [1, 2, 3, 0, 0],
        [1, 2, 4, 5, 0],
        mask=["11110", "11111"],
    ),
    case(
        "mask: one has ended, the other goes on with pad ids",
        [1, 2, 0, 3],
        [1, 2, 0, 0],
        mask=["1111", "1100"],
    ),
    case(
        "mask: one has ended, and equal ids lie behind it",
        [1, 2, 3, 4],
        [1, 2, 3, 5],
        mask=["1100", "1111"],
    ),
    case("mask: ids behind both ends", [1, 2, 8, 0], [1, 2, 9, 0], mask=["1100", "1100"]),
    case("mask: a text of pad ids", [0, 0, 0, 0], [0, 0, 1, 0], mask=["1100", "1111"]),
    case(
        "mask: leading pads count as text in any number",
        [2, 2, 5, 2],
        [2, 2, 5, 6],
        pad_id=2,
        n=1,
        mask=["1110", "1111"],
    ),
    case("mask: a 0 inside", [1, 2, 3, 4, 0], [1, 2, 5, 4, 6], mask=["11010", "10111"]),
    case(
        "mask: padded on the left by the same",
        [0, 0, 1, 2, 3, 0],
        [0, 0, 1, 2, 4, 5],
        mask=["001110", "001111"],
    ),
    case(
        "mask: padded on the left, other ids in front",
        [7, 1, 2, 0],
        [8, 1, 2, 3],
        mask=["0110", "0111"],
    ),
    case("mask: padded on the left, identical", [0, 1, 2, 0], [0, 1, 2, 0], mask=["0110", "0110"]),
    case(
        "mask: left padding differs from pair to pair",
        [0, 1, 2, 3],
        [4, 5, 6, 0],
        [0, 1, 3, 0],
        [4, 6, 0, 0],
        mask=["0111", "1110", "0110", "1100"],
    ),
    many_pairs("mask: many pairs", 16, 9, pads_inside=True),
    # Numbers: -log(sigmoid(x)) computed as written overflows, and what is masked by a product becomes NaN.
    case("large differences", [1, 2, 3, 4], [1, 5, 6, 7], rewards=HUGE),
    case(
        "large differences against the chosen",
        [1, 2, 3],
        [1, 4, 5],
        rewards=[[0.0, -500.0, -5000.0], [0.0, 500.0, 5000.0]],
    ),
    case(
        "large differences for the chosen",
        [1, 2, 3],
        [1, 4, 5],
        rewards=[[0.0, 500.0, 5000.0], [0.0, -500.0, -5000.0]],
    ),
    case(
        "large differences outside of the region",
        [1, 2, 3, 0, 0],
        [1, 2, 4, 0, 0],
        rewards=[[-1e9, 1e9, 0.5, -1e9, 1e9], [1e9, -1e9, 1.25, 1e9, -1e9]],
    ),
    case(
        "large rewards with a small difference",
        [1, 2, 3],
        [1, 2, 4],
        rewards=[[0.0, 0.0, 1048576.25], [0.0, 0.0, 1048576.0]],
    ),
    case("equal rewards", [1, 2, 3, 0], [1, 4, 0, 0], rewards=[[0.75] * 4] * 2),
    case("float32", *RAGGED, dtype="float32"),
    case("float32: large differences", [1, 2, 3, 4], [1, 5, 6, 7], rewards=HUGE, dtype="float32"),
    many_pairs("float32: many pairs", 8, 9, pads_inside=True, dtype="float32"),
]

# `options` are keywords that a function may leave out: TRL's and InstructGPT's loss of the ends, Llama 2's margins, and centering.
OBJECTIVE_CASES = [
    case("end: ragged both ways", *RAGGED, loss="end"),
    case("end: one token", [3], [4], loss="end"),
    case("end: differs in the last token", [1, 2, 3, 4], [1, 2, 3, 5], loss="end"),
    case("end: chosen is a prefix of rejected", [1, 2, 0, 0, 0], [1, 2, 3, 4, 0], loss="end"),
    case("end: identical, padded", [1, 2, 3, 0, 0], [1, 2, 3, 0, 0], loss="end"),
    case(
        "end: leading pad of the text", [2, 5, 6, 2, 2], [2, 5, 7, 8, 2], pad_id=2, n=1, loss="end"
    ),
    case(
        "end: mask, pad ids at the ends",
        [1, 2, 3, 0, 0],
        [1, 2, 4, 5, 0],
        mask=["11110", "11111"],
        loss="end",
    ),
    case(
        "end: mask, padded on the left",
        [0, 0, 1, 2, 3, 0],
        [0, 0, 1, 2, 4, 5],
        mask=["001110", "001111"],
        loss="end",
    ),
    case(
        "end: large differences", [1, 2], [1, 3], rewards=[[0.0, -500.0], [0.0, 500.0]], loss="end"
    ),
    case("end: float32", *RAGGED, dtype="float32", loss="end"),
    many_pairs("end: many pairs", 16, 9, pads_inside=True, loss="end"),
    case("margins: at every token", *RAGGED, margins=[0.5, 1.25]),
    case("margins: below zero", *RAGGED, margins=[-2.0, 0.0]),
    case("margins: of the ends", *RAGGED, margins=[0.5, 1.25], loss="end"),
    case("margins: identical", [1, 2, 0], [1, 2, 0], margins=[0.75]),
    case(
        "margins: zero changes nothing",
        *RAGGED,
        rewards=random_rewards("margins: at every token", RAGGED),
        margins=[0.0, 0.0],
    ),
    case("centering", *RAGGED, center_rewards_coefficient=0.25),
    case("centering: of the ends", *RAGGED, center_rewards_coefficient=0.25, loss="end"),
    case(
        "centering: identical, padded", [1, 2, 0, 0], [1, 2, 0, 0], center_rewards_coefficient=0.5
    ),
    case("centering: zero changes nothing", *RAGGED, center_rewards_coefficient=0.0),
    case("all three", *RAGGED, margins=[0.5, 1.25], center_rewards_coefficient=0.125, loss="end"),
    many_pairs(
        "all three: many pairs",
        4,
        9,
        pads_inside=True,
        margins=[0.25, -1.5, 3.0, 0.0],
        center_rewards_coefficient=0.125,
        loss="end",
    ),
]

PAIR = [1, 2, 3, 4], [1, 2, 5, 6]
ERROR_CASES = [
    case(
        "refused: one dimension",
        *[1, 2],
        rewards=[0.5, 0.25],
        error="input_ids have one dimension in place of two",
    ),
    case(
        "refused: three dimensions",
        [[1, 2]],
        [[1, 3]],
        rewards=[[[0.5, 0.25]]] * 2,
        error="input_ids have three dimensions",
    ),
    case(
        "refused: ids of floats",
        *PAIR,
        ids_dtype="float32",
        error="input_ids are float32 in place of integers",
    ),
    case("refused: no columns", [], [], error="rows have no column"),
    case("refused: no rows", rewards=[], error="there is no pair"),
    case("refused: odd rows", *PAIR, [1, 2, 3, 7], error="three rows are no pairs"),
    case(
        "refused: shape of rewards",
        *PAIR,
        rewards=[[0.5, 0.25, 0.0]] * 2,
        error="rewards have another shape than input_ids",
    ),
    case(
        "refused: rewards of integers",
        *PAIR,
        rewards=[[1, 2, 3, 4]] * 2,
        dtype="int64",
        error="rewards are int64",
    ),
    case(
        "refused: rewards of bfloat16",
        *PAIR,
        dtype="bfloat16",
        error="rewards are bfloat16, whose differences are too coarse",
    ),
    case(
        "refused: rewards of float16",
        *PAIR,
        dtype="float16",
        error="rewards are float16, whose differences are too coarse",
    ),
    case(
        "refused: shape of the mask",
        *PAIR,
        mask=["111", "111"],
        error="attention_mask has another shape than input_ids",
    ),
    case(
        "refused: mask of zeros",
        *PAIR,
        mask=["1110", "0000"],
        error="attention_mask is 0 everywhere in row 1",
    ),
    case(
        "refused: left padding by different amounts",
        [0, 1, 2, 3],
        [1, 2, 3, 4],
        mask=["0111", "1111"],
        error="the rows of a pair begin at different columns",
    ),
    case(
        "refused: left padding without a mask",
        [0, 1, 2, 3],
        [1, 2, 4, 0],
        error="row 0 begins with the pad id",
    ),
    case(
        "refused: left padding of a rejected row",
        [1, 2, 3, 0],
        [0, 0, 1, 2],
        error="row 1 begins with the pad id",
    ),
    case(
        "refused: more leading pads than belong to the text",
        [2, 2, 5, 6],
        [2, 5, 7, 2],
        pad_id=2,
        n=1,
        error="row 0 begins with two pad ids, of which one belongs to the text",
    ),
    case("refused: no token", [1, 2, 3, 0], [0, 0, 0, 0], error="row 1 is nothing but padding"),
    case(
        "refused: a pad id ends both texts before they differ",
        [1, 2, 3, 4],
        [1, 0, 2, 3],
        [1, 2, 3, 5],
        [1, 0, 2, 4],
        error="in pair 1 the region is empty, though the rows differ",
    ),
    case(
        "refused: an unknown loss",
        *PAIR,
        loss="last",
        error="the loss is none of divergent and end",
    ),
    case(
        "refused: more margins than pairs",
        *PAIR,
        margins=[0.5, 0.25],
        error="there are two margins for one pair",
    ),
]


def with_numbers(case: dict) -> dict:
    """The case with what `rm.pairwise_loss` gives: in float64, also where the rewards are float32, which hold the same numbers."""
    if case["error"] is not None:
        return case
    (ids, rewards, *rest), options = arguments(case | {"rewards_dtype": "float64"})
    out = pairwise_loss(ids, rewards, *rest, **options)
    out["loss"].backward()
    return (
        case
        | {name: value.tolist() for name, value in out.items()}
        | {"grad_rewards": rewards.grad.tolist()}
    )


# ----------------------------------------------------------------------------------------------------------------------
# Models: every family, and its numbers

SIZES = dict(vocab_size=40, n_positions=32, n_layer=2, n_head=4, n_embd=16, n_inner=24)
LLAMA_3 = dict(
    rope_type="llama3",
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=64,
)
BOS_1 = dict(bos_token_id=1, eos_token_id=2)
BOS_2 = dict(bos_token_id=2, eos_token_id=2)  # OPT's, which are also DeepSpeed-Chat's pad

# name -> fields of GPTConfig, pad_id, num_padding_at_beginning, what texts begin with
MODELS = {
    "gpt2": (dict(model_type="gpt2", token_ids=BOS_2), 0, 0, []),
    "opt": (dict(model_type="opt", token_ids=BOS_2), 2, 1, [2]),
    "opt_postnorm_proj": (
        dict(model_type="opt", pre_norm=False, embed_dim=8, token_ids=BOS_2),
        1,
        0,
        [2],
    ),
    # heads of 8 in place of 16 / 4, as config.json's head_dim can say
    "llama_gqa": (dict(model_type="llama", n_kv_head=2, head_dim=8, token_ids=BOS_1), 0, 0, [1]),
    # Of its four frequencies one stays, two are blended, and one is stretched.
    "llama_rope_scaling": (
        dict(
            model_type="llama",
            n_positions=128,
            n_embd=32,
            n_kv_head=1,
            rope_theta=100.0,
            rope_scaling=LLAMA_3,
            token_ids=BOS_1,
        ),
        0,
        0,
        [1],
    ),
}
TRAINED = ("gpt2", "llama_gqa")  # from which 20 steps of training start
# Adam's eps is PyTorch's default, which make_optimizer takes.
OPTIMIZER = {
    "name": "AdamW",
    "learning_rate": 3e-3,
    "betas": [0.9, 0.95],
    "eps": 1e-8,
    "weight_decay_of_matrices": 0.1,
    "weight_decay_of_vectors": 0.0,
    "max_grad_norm": 1.0,
}


def make_model(name: str) -> RewardModel:
    """Weights of at most 5/16 (of norms: around 1), multiples of 1/128: numbers that float16 and bfloat16 hold, too."""
    fields, pad_id, n, _ = MODELS[name]
    model = RewardModel(GPT(GPTConfig(**SIZES | fields)), pad_id, n)
    for weight_name, weight in model.named_parameters():
        rng = seeded(name, weight_name)
        numbers = torch.tensor([rng.randint(-40, 40) / 128 for _ in range(weight.numel())]).view(
            weight.shape
        )
        weight.data = numbers + (1.0 if weight_name.endswith("norm.weight") else 0.0)
    return model


def text(rng: random.Random, length: int) -> list[int]:
    """Ids that are special in no model."""
    return [rng.randint(3, SIZES["vocab_size"] - 1) for _ in range(length)]


def random_pairs(rng: random.Random, start: list[int], shapes) -> list[list[list[int]]]:
    """Texts of (prompt, chosen, rejected) tokens."""
    pairs = []
    for prompt, chosen, rejected in shapes:
        shared = start + text(rng, prompt - len(start))
        pairs.append([shared + text(rng, chosen), shared + text(rng, rejected)])
    return pairs


def rows_of(pairs: list[list[list[int]]]) -> list[list[int]]:
    """All chosen, then all rejected ones."""
    return [pair[0] for pair in pairs] + [pair[1] for pair in pairs]


def backward_norms(model: RewardModel, loss: torch.Tensor) -> dict:
    """The norm of the gradient over all parameters, and over each weight of model.safetensors, under its name there."""
    model.zero_grad()
    loss.backward()
    model_type = model.backbone.config.model_type
    parameters = dict(model.backbone.named_parameters())
    norms = {}
    for theirs, ours in weight_names(model_type, parameters).items():
        parts = torch.stack([parameters[name].grad.norm() for name in ours])
        norms[family_of(model_type).prefixes[0] + theirs] = parts.norm()
    norms["score.weight"] = model.v_head.weight.grad.norm()
    return {
        "grad_norm": torch.stack([*norms.values()]).norm().item(),
        "grad_norms": {name: norm.item() for name, norm in norms.items()},
    }


def batch_numbers(model: RewardModel, ids: torch.Tensor, mask: torch.Tensor) -> dict:
    """What a model gives for a batch of pairs, in the padded layout."""
    out = model(ids, mask)
    numbers = {
        "last_hidden_state": model.backbone(ids, mask),
        "rewards": model.token_rewards(ids, mask),
        **out,
    }
    return {name: value.tolist() for name, value in numbers.items()} | backward_norms(
        model, out["loss"]
    )


def step3_numbers(
    model: RewardModel, ids: torch.Tensor, mask: torch.Tensor, prompt_length: int
) -> dict:
    """What step 3 of RLHF gets. `compared` is 0 at left padding, where values have no meaning (0.0 stands there)."""
    out = model.forward_value(ids, mask, prompt_length=prompt_length)
    compared = mask.cumsum(1) > 0
    return {
        "compared": compared.long().tolist(),
        "values": out["values"].where(compared, 0.0).tolist(),
        "chosen_end_scores": out["chosen_end_scores"].tolist(),
    }


def model_file(name: str, model: RewardModel) -> dict:
    _, pad_id, n, start = MODELS[name]
    rng = seeded("batch", name)
    # chosen and rejected end first, a response of nothing (one text a prefix), nothing in common but what texts begin with
    ids, mask = data.pad_rows(
        rows_of(random_pairs(rng, start, [(4, 2, 5), (5, 4, 1), (6, 0, 3), (len(start), 5, 6)])),
        pad_id,
    )
    # Two prompts are padded on the left to 5 columns; answers end at different columns; one row fills all of them.
    step3 = torch.tensor(
        [
            [pad_id] * 3 + text(rng, 4) + [pad_id] * 3,
            text(rng, 10),
            [pad_id] + text(rng, 5) + [pad_id] * 4,
        ]
    )
    step3_mask = (step3 != pad_id).long()
    return {
        "pad_id": pad_id,
        "num_padding_at_beginning": n,
        "input_ids": ids.tolist(),
        "attention_mask": mask.tolist(),
        **batch_numbers(model, ids, mask),
        "step3": {
            "input_ids": step3.tolist(),
            "attention_mask": step3_mask.tolist(),
            "prompt_length": 5,
            **step3_numbers(model, step3, step3_mask, 5),
        },
    }


def trajectory(name: str, model: RewardModel) -> dict:
    """20 steps of training: loss and gradient norm of each before it (and before clipping), norm of all matrices after it.

    Vectors are left out of that one: gpt2's key biases change no output, so their gradient is 0 up to rounding, and Adam makes
    steps of the rounding.
    """
    _, pad_id, _, start = MODELS[name]
    rng = seeded("trajectory", name)
    batches = [
        random_pairs(
            rng,
            start,
            [(rng.randint(2, 5), rng.randint(1, 6), rng.randint(1, 6)) for _ in range(4)],
        )
        for _ in range(5)
    ]
    args = SimpleNamespace(
        learning_rate=OPTIMIZER["learning_rate"],
        weight_decay=OPTIMIZER["weight_decay_of_matrices"],
        lora_learning_rate=0.0,
    )
    optimizer = make_optimizer(model, args, SimpleNamespace(print=lambda words: None))
    steps = []
    for step in range(20):
        out = model(*data.pad_rows(rows_of(batches[step % 5]), pad_id))
        optimizer.zero_grad()
        out["loss"].backward()
        grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), OPTIMIZER["max_grad_norm"])
        optimizer.step()
        norm = torch.stack(
            [parameter.detach().norm() for parameter in model.parameters() if parameter.dim() == 2]
        ).norm()
        steps.append(
            {
                "batch": step % 5,
                "loss": out["loss"].item(),
                "grad_norm": grad_norm.item(),
                "matrix_norm_after": norm.item(),
            }
        )
    padded = [
        dict(
            zip(
                ("input_ids", "attention_mask"),
                (x.tolist() for x in data.pad_rows(rows_of(pairs), pad_id)),
            )
        )
        for pairs in batches
    ]
    return {"optimizer": OPTIMIZER, "batches": padded, "steps": steps}


# ----------------------------------------------------------------------------------------------------------------------
# The packed layout, and rankings


def attends(groups, batch: data.PackedBatch) -> list[str]:
    """For every token of a packed batch, which tokens it sees: a 1 or 0 for each.

    By what packing promises and not by how it is done: a token sees what it would see in a row of its own text, padded on
    the right, under causal attention and no padding as keys: columns up to its own, of its text alone.
    """
    numbers = iter(
        range(batch.num_tokens)
    )  # in the order of the layout: all trunks, then all branches, then all tails
    trunks, branches, tails = (
        [[next(numbers) for _ in range(length)] for length in lengths]
        for lengths in (batch.trunks, batch.branches, batch.tails)
    )
    rows, sees = iter(zip(branches, tails)), {}
    for trunk, group in zip(trunks, groups):
        for sequence, (branch, tail) in zip(group, rows):
            row = trunk + branch + tail  # the numbers of what stands in the columns
            for column, number in enumerate(row):
                sees[number] = set(row[: min(column + 1, len(sequence))])
    return [
        "".join(str(int(key in sees[query])) for key in range(batch.num_tokens))
        for query in range(batch.num_tokens)
    ]


A, B, C, D, E = [11, 12], [13, 14, 15], [16], [17, 18, 19, 20, 21], [11, 22, 12]
PACKED_CASES = [  # name, model, groups of texts, longest_tail and margins of data.pack, the loss's other options
    ("a pair", "llama_gqa", [[[1] + A + B, [1] + A + D]], {}),
    ("rejected ends first", "llama_gqa", [[[1] + B + D, [1] + B + C]], {}),
    ("one text a prefix of the other", "llama_gqa", [[[1] + A, [1] + A + B]], {}),
    ("nothing shared", "gpt2", [[A + B, D]], {}),
    ("one token each", "gpt2", [[[11], [12]]], {}),
    ("identical", "gpt2", [[A + B, A + B]], {}),
    ("pad ids inside", "gpt2", [[[11, 0, 12, 0], [11, 0, 13, 14, 0, 0]]], {}),
    (
        "three pairs",
        "llama_rope_scaling",
        [[[1] + A + B, [1] + A + D], [[1] + D + A, [1] + D + B], [[1] + C, [1] + E]],
        {},
    ),
    (
        "a pair and a ranking",
        "llama_rope_scaling",
        [[[1] + D + A, [1] + D + C], [[1] + B + A, [1] + B + E, [1] + B, [1] + B + D]],
        {},
    ),
    ("opt", "opt", [[[2] + A + B, [2] + A + D], [[2] + C + D, [2] + C]], {}),
    (
        "opt, one token for each tail",
        "opt",
        [[[2] + A + B, [2] + A + D], [[2] + C + D, [2] + C]],
        {"longest_tail": 1},
    ),
    ("opt with norms behind", "opt_postnorm_proj", [[[2] + B + A, [2] + B + D, [2] + B + C]], {}),
    (
        "margins and centering",
        "llama_gqa",
        [[[1] + A + B, [1] + A + D], [[1] + D + A, [1] + D + B]],
        {"margins": [0.5, 1.25], "center_rewards_coefficient": 0.25},
    ),
    (
        "loss of the ends, so no tails",
        "llama_gqa",
        [[[1] + A + B, [1] + A + D], [[1] + D + A, [1] + D + B]],
        {"longest_tail": 0, "loss": "end"},
    ),
]


def packed_file(models: dict[str, RewardModel]) -> dict:
    cases = []
    for name, model_name, groups, options in PACKED_CASES:
        model = models[model_name]
        batch = data.pack(
            groups,
            model.pad_id,
            longest_tail=options.get("longest_tail"),
            margins=options.get("margins"),
        )
        objective = {key: options.get(key, usual) for key, usual in model.objective.items()}
        with mock.patch.multiple(model, **objective):
            out = model(batch)
        cases.append(
            {
                "name": name,
                "model": model_name,
                "pad_id": model.pad_id,
                "longest_tail": batch.longest_tail,
                "options": {key: value for key, value in options.items() if key != "longest_tail"},
                "token_groups": groups,
                "input_ids": batch.input_ids.tolist(),
                "positions": batch.positions.tolist(),
                "trunks": batch.trunks,
                "branches": batch.branches,
                "tails": batch.tails,
                "attends": attends(groups, batch),
                **{key: value.tolist() for key, value in out.items()},
                **backward_norms(model, out["loss"]),
            }
        )
    return {"cases": cases}


def rankings_file(models: dict[str, RewardModel]) -> dict:
    """Comparisons of 2 to 6 responses, best first; by the padded layout, a pair at a time."""
    cases = []
    for sizes, model_name in (
        ([2], "gpt2"),
        ([3], "opt"),
        ([4], "opt_postnorm_proj"),
        ([5], "llama_gqa"),
        ([6], "llama_rope_scaling"),
        ([2, 4, 3], "gpt2"),
    ):
        model, start, name = (
            models[model_name],
            MODELS[model_name][3],
            f"rankings of {', '.join(map(str, sizes))}",
        )
        rng = seeded(name)
        groups = []
        for size in sizes:
            prompt = start + text(rng, rng.randint(1, 4))
            groups.append([prompt + text(rng, rng.randint(1, 6)) for _ in range(size)])
        losses, chosen_scores, rejected_scores, rewards = [], [], [], []
        for group in groups:
            rewards.append(model.token_rewards(*data.pad_rows(group, model.pad_id)).detach())
            pairs = list(itertools.combinations(range(len(group)), 2))
            outs = []
            for (
                pair
            ) in pairs:  # padded as the whole ranking is, so that its rewards are those above
                rows, mask = (x[[*pair]] for x in data.pad_rows(group, model.pad_id))
                outs.append(model(rows, mask))
            losses.append(torch.stack([out["loss"] for out in outs]).mean())
            chosen_scores += [out["chosen_mean_scores"].item() for out in outs]
            rejected_scores += [out["rejected_mean_scores"].item() for out in outs]
        loss = torch.stack(losses).mean()
        cases.append(
            {
                "name": name,
                "model": model_name,
                "pad_id": model.pad_id,
                "token_groups": groups,
                "rewards": [x.tolist() for x in rewards],
                "pairs": [
                    [number, i, j]
                    for number, size in enumerate(sizes)
                    for i, j in itertools.combinations(range(size), 2)
                ],
                "loss_of_comparisons": [loss.item() for loss in losses],
                "loss": loss.item(),
                "chosen_mean_scores": chosen_scores,
                "rejected_mean_scores": rejected_scores,
                **backward_norms(model, loss),
            }
        )
    return {"cases": cases}


# ----------------------------------------------------------------------------------------------------------------------
# Tokens

USER = {"role": "user", "content": "What is a young cat called?"}
GOOD, BAD = (
    {"role": "assistant", "content": f"A young cat is called a {name}."}
    for name in ("kitten", "puppy")
)
SYSTEM = {"role": "system", "content": "Answer in one sentence."}
PROMPT = "\n\nHuman: What is the capital of Italy?\n\nAssistant:"
RIGHT, WRONG = " The capital of Italy is Rome.", " The capital of Italy is Oslo."
ROW = {"prompt": PROMPT, "chosen": RIGHT, "rejected": WRONG}

TOKEN_CASES = [  # name, row, max_seq_len, truncation_side
    ("prompt and responses", ROW, 99, "left"),
    ("whole dialogues", {"chosen": PROMPT + RIGHT, "rejected": PROMPT + WRONG}, 99, "left"),
    (
        "encoded as one string: a token may reach over the border",
        {"prompt": "The cap", "chosen": "ital of Italy", "rejected": " of Italy"},
        99,
        "left",
    ),
    ("messages", {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]}, 99, "left"),
    ("messages, whole dialogues", {"chosen": [USER, GOOD], "rejected": [USER, BAD]}, 99, "left"),
    (
        "messages that repeat the prompt",
        {"prompt": USER["content"], "chosen": [USER, GOOD], "rejected": [USER, BAD]},
        99,
        "left",
    ),
    (
        "messages that repeat the prompt behind a system message",
        {"prompt": [USER], "chosen": [SYSTEM, USER, GOOD], "rejected": [SYSTEM, USER, BAD]},
        99,
        "left",
    ),
    (
        "a system message in the prompt",
        {"prompt": [SYSTEM, USER], "chosen": [GOOD], "rejected": [BAD]},
        99,
        "left",
    ),
    (
        "a prompt of messages, responses of text",
        {"prompt": [USER], "chosen": GOOD["content"], "rejected": BAD["content"]},
        99,
        "left",
    ),
    (
        "several turns",
        {"chosen": [USER, BAD, USER, GOOD], "rejected": [USER, BAD, USER, BAD]},
        99,
        "left",
    ),
    (
        "a ranking of text",
        {"prompt": PROMPT, "responses": [RIGHT, WRONG, " Rome.", ""]},
        99,
        "left",
    ),
    (
        "a ranking of messages",
        {"prompt": [USER], "responses": [[GOOD], [BAD], "A cow."]},
        99,
        "left",
    ),
    (
        "characters outside of the vocabulary",
        {"prompt": "Où est-ce ? ", "chosen": "À Rome 🙂", "rejected": "東京\t\n  ."},
        99,
        "left",
    ),
    (
        "no prompt and an empty response",
        {"prompt": "", "chosen": "Rome", "rejected": ""},
        99,
        "left",
    ),
    ("left: the start of the prompt goes", ROW, 24, "left"),
    ("left: fits exactly", ROW, 31, "left"),
    ("left: what is not shared stays, and then the end is cut before eos", ROW, 6, "left"),
    ("left: of a prefix", {"prompt": PROMPT, "chosen": "", "rejected": RIGHT}, 24, "left"),
    ("left: a ranking", {"prompt": PROMPT, "responses": [RIGHT, WRONG, " Rome."]}, 20, "left"),
    ("right: the end goes, eos too", ROW, 29, "right"),
    ("a margin", ROW | {"margin": 1.5}, 99, "left"),
    ("right: identical then, so the row is dropped", ROW, 20, "right"),
]
BAD_ROWS = [
    ("no responses", {"prompt": "What is the capital of Italy?"}),
    ("rejected is missing", {"prompt": "", "chosen": "Rome"}),
    ("a ranking of one", {"prompt": "", "responses": ["Rome"]}),
    ("a ranking without a prompt", {"responses": ["Rome", "Oslo"]}),
    ("text is a number", {"prompt": "", "chosen": 1, "rejected": "Oslo"}),
    ("an unknown role", {"chosen": [{"role": "tool", "content": ""}], "rejected": [USER]}),
    ("a row that is a list", ["Rome", "Oslo"]),
    ("a margin among three", {"prompt": "", "responses": ["Rome", "Oslo", "Cairo"], "margin": 1.0}),
]


def tokens_file(tokenizer: data.Tokenizer) -> dict:
    cases = []
    for name, row, max_seq_len, side in TOKEN_CASES:
        comparison = data.parse_comparison(json.dumps(row).encode())
        tokens = data.tokenize(comparison, tokenizer, max_seq_len, side)
        cases.append(
            {
                "name": name,
                "max_seq_len": max_seq_len,
                "truncation_side": side,
                "row": row,
                "texts": [comparison.prompt + response for response in comparison.responses],
                "tokens": tokens,
                "margin": comparison.margin,
                "dropped": all(sequence == tokens[0] for sequence in tokens),
            }
        )
    return {
        "pad_id": tokenizer.pad_id,
        "bos_id": tokenizer.bos_id,
        "eos_id": tokenizer.eos_id,
        "cases": cases,
        "bad_rows": [{"name": name, "row": row} for name, row in BAD_ROWS],
    }


# ----------------------------------------------------------------------------------------------------------------------
# Files


def dumps(value, indent: str = "") -> str:
    """JSON with a line for every field of an object, and an array of numbers in one."""
    if isinstance(value, dict) and value:
        parts, brackets = (
            [f"{json.dumps(key)}: {dumps(item, indent + ' ')}" for key, item in value.items()],
            "{}",
        )
    elif isinstance(value, list) and any(isinstance(item, (dict, str)) for item in value):
        parts, brackets = [dumps(item, indent + " ") for item in value], "[]"
    else:
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    return (
        brackets[0] + ",".join(f"\n{indent} {part}" for part in parts) + f"\n{indent}{brackets[1]}"
    )


def write(directory: Path):
    """All files of the kit but its README."""

    def write_json(name, content):
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_text(dumps(content) + "\n", encoding="utf-8")

    write_json(
        "loss.json",
        {"cases": [with_numbers(case) for case in LOSS_CASES + OBJECTIVE_CASES + ERROR_CASES]},
    )
    models = {}
    for name in MODELS:
        path = directory / "models" / name
        make_model(name).save_pretrained(path, layout="hf")
        # read back: the numbers are those of the files
        models[name] = RewardModel.from_pretrained(path).double().eval()
        write_json(f"models/{name}/expected.json", model_file(name, models[name]))
    write_json("packed.json", packed_file(models))
    write_json("rankings.json", rankings_file(models))
    for name in TRAINED:
        write_json(
            f"models/{name}/trajectory.json", trajectory(name, models[name])
        )  # trains the model, so it comes last
    comparisons = itertools.islice(data.known_rewards(SEED), 200)
    tokenizer = data.train_tokenizer(
        (
            comparison.prompt + response
            for comparison in comparisons
            for response in comparison.responses
        ),
        400,
    )
    (directory / "tokens").mkdir(exist_ok=True)
    (directory / "tokens" / "tokenizer.model").write_bytes(tokenizer.model_proto)
    write_json("tokens/rows.json", tokens_file(tokenizer))


if __name__ == "__main__":
    parser = argparse.ArgumentParser("make_vectors", description="Write the conformance kit.")
    parser.add_argument(
        "directory", nargs="?", type=Path, default=DIRECTORY, help="where to (default: vectors/)"
    )
    torch.set_num_threads(1)  # the order of sums depends on their number
    write(parser.parse_args().directory)
