"""The conformance kit in vectors/: tools/make_vectors.py writes it, and plain Python, numbers of
DeepSpeed-Chat and `transformers` agree with it."""

import itertools
import json
import math
import re
from unittest import mock

import pytest
import torch

import data
import rm
import test_loss
from model import GPT, scaled_dot_product
from parts.huggingface import read_checkpoint
from parts.packed import PackedAttention
from rm import RewardModel, pairwise_loss
from test_model import exact_transformers
from tools import check_vectors, make_vectors

VECTORS = make_vectors.DIRECTORY
TESTDATA = VECTORS.parent / "testdata"
DEEPSPEED_CHAT = json.loads((TESTDATA / "loss_cases.json").read_text())["cases"]
CASES = json.loads((VECTORS / "loss.json").read_text())["cases"]
NUMBERS = [case for case in CASES if case["error"] is None]
# Not of make_vectors: written by hand, and by tools/traps.py.
OTHER_FILES = {"README.md", "VERSION", "run_numpy.py", "traps.json", "traps.md"}
LLAMA_3 = make_vectors.MODELS["llama_rope_scaling"]["config"]["rope_scaling"]
MODELS = sorted(path.name for path in (VECTORS / "models").iterdir())


def load(name: str):
    return json.loads((VECTORS / name).read_text(encoding="utf-8"))


def agree(got, expected, tolerance: float, where=""):
    """Check that two trees of JSON are equal, floats up to `tolerance`, relative above 1."""
    assert type(got) is type(expected), where
    if isinstance(expected, dict):
        assert got.keys() == expected.keys(), where
        for key in expected:
            agree(got[key], expected[key], tolerance, f"{where}/{key}")
    elif isinstance(expected, list):
        assert len(got) == len(expected), where
        for i, pair in enumerate(zip(got, expected)):
            agree(*pair, tolerance, f"{where}[{i}]")
    elif isinstance(expected, float):
        assert abs(got - expected) <= tolerance * max(1.0, abs(expected)), (
            f"{where}: {got} {expected}"
        )
    else:
        assert got == expected, where


@pytest.fixture(scope="module")
def models() -> dict[str, RewardModel]:
    return {
        name: RewardModel.from_pretrained(VECTORS / "models" / name).double().eval()
        for name in MODELS
    }


# --------------------------------------------------------------------------------------------------
# loss.json


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x > 0 else math.exp(x) / (1 + math.exp(x))


def by_definition(case: dict) -> dict:
    """Compute loss, scores and d loss / d rewards of a case in plain Python, by position.

    The gradient is by hand: d/dx of -log sigmoid(x) is -sigmoid(-x), d/da of (a + b)^2 2 (a + b).
    """
    rows, rewards, options = case["input_ids"], case["rewards"], case.get("options", {})
    pairs, length = len(rows) // 2, len(rows[0])
    texts = []  # {column: id}, one for every row
    for i, row in enumerate(rows):
        if mask := case.get("attention_mask"):
            ones = [column for column in range(length) if mask[i][column]]
            columns = range(ones[0], ones[-1] + 1)
        else:
            columns, pads = [], 0
            for column in range(length):
                pads += row[column] == case["pad_id"]
                if pads > case["num_padding_at_beginning"]:
                    break
                columns.append(column)
        texts.append({column: row[column] for column in columns})
    loss, scores, gradient = 0.0, [], [[0.0] * length for _ in rows]
    for i in range(pairs):
        j = pairs + i
        ends = max(texts[i]), max(texts[j])
        scores.append((rewards[i][ends[0]], rewards[j][ends[1]]))
        differing = [
            column for column in range(length) if texts[i].get(column) != texts[j].get(column)
        ]
        region = (
            [(t, t) for t in range(differing[0], max(ends) + 1)]
            if differing
            else [(length - 1, length - 1)]
        )
        if options.get("loss") == "end":
            region = [ends]
        for a, b in region:
            x = rewards[i][a] - rewards[j][b] - options.get("margins", [0.0] * pairs)[i]
            p = options.get("targets", [1.0] * pairs)[i]
            for share, sign in ((p, 1), (1 - p, -1)):
                share /= len(region) * pairs
                loss += share * (math.log1p(math.exp(-abs(x))) + max(-sign * x, 0.0))
                slope = -sign * share * sigmoid(-sign * x)
                gradient[i][a] += slope
                gradient[j][b] -= slope
        c, total = options.get("center_rewards_coefficient", 0.0), sum(scores[-1])
        loss += c * total**2 / pairs
        gradient[i][ends[0]] += 2 * c * total / pairs
        gradient[j][ends[1]] += 2 * c * total / pairs
    chosen, rejected = map(list, zip(*scores))
    return {
        "loss": loss,
        "chosen_mean_scores": chosen,
        "rejected_mean_scores": rejected,
        "grad_rewards": gradient,
    }


@pytest.mark.parametrize("case", DEEPSPEED_CHAT + NUMBERS, ids=lambda case: case["name"])
def test_loss_by_definition(case):
    """A few lines of plain Python give DeepSpeed-Chat's numbers and those of the kit."""
    got = by_definition(case)
    agree(got, {name: case[name] for name in got}, 1e-12)


def verdicts(function) -> dict[str, dict]:
    return {case["name"]: check_vectors.check(function, case) for case in CASES}


def test_our_loss_agrees():
    assert {row["verdict"] for row in verdicts(pairwise_loss).values()} == {"ok"}


def with_region(wrong):
    """Make our loss with another region: `wrong` gets two texts and the right (start, stop)."""
    right = rm.divergent_region

    def function(input_ids, rewards, pad_id, num_padding_at_beginning=0, attention_mask=None):
        with mock.patch.object(rm, "divergent_region", lambda a, b: wrong(a, b, *right(a, b))):
            return pairwise_loss(
                input_ids, rewards, pad_id, num_padding_at_beginning, attention_mask
            )

    return function


def with_terms(wrong):
    """Make our loss with other terms: `wrong` gets the differences of a pair."""

    def function(input_ids, rewards, pad_id, num_padding_at_beginning=0, attention_mask=None):
        with mock.patch.object(
            rm, "pair_terms", lambda chosen, rejected, *_: wrong(chosen - rejected)
        ):
            return pairwise_loss(
                input_ids, rewards, pad_id, num_padding_at_beginning, attention_mask
            )

    return function


def with_target(term):
    """Make our loss with another term of a pair, which gets the differences and the target."""

    def function(ids, rewards, pad_id, leading=0, mask=None, loss="divergent", targets=None):
        with mock.patch.object(rm, "pair_terms", test_loss.of_target(term)):
            return pairwise_loss(ids, rewards, pad_id, leading, mask, loss, targets=targets)

    return function


def pad_over_mask(input_ids, rewards, pad_id, num_padding_at_beginning, attention_mask):
    return pairwise_loss(input_ids, rewards, pad_id, num_padding_at_beginning)


def at_padding_nothing(input_ids, rewards, pad_id, num_padding_at_beginning, attention_mask):
    """Take 0 for rewards at padding: the mean has the right length, but not the right terms."""
    text = input_ids != pad_id if attention_mask is None else attention_mask.bool()
    return pairwise_loss(
        input_ids, rewards * text, pad_id, num_padding_at_beginning, attention_mask
    )


def refuses_nothing(input_ids, rewards, pad_id, num_padding_at_beginning, attention_mask):
    try:
        return pairwise_loss(input_ids, rewards, pad_id, num_padding_at_beginning, attention_mask)
    except ValueError:
        return rewards.sum()


logsigmoid = torch.nn.functional.logsigmoid
WRONG = {  # a wrong loss, and cases that must tell it apart
    "the whole row": (
        with_region(lambda a, b, start, stop: (0, stop)),
        {"no padding", "differs in the last token", "many pairs"},
    ),
    "to the end of L": (
        with_region(lambda a, b, start, stop: (start, None if start < stop else stop)),
        {"ragged both ways, one row fills L", "differs in the last token, padded"},
    ),
    "up to the shorter end": (
        with_region(lambda a, b, start, stop: (start, max(start + 1, min(len(a), len(b))))),
        {
            "chosen ends first",
            "rejected ends first",
            "mask: one has ended, and equal ids lie behind it",
        },
    ),
    "a sum for the mean": (
        with_terms(lambda x: -logsigmoid(x) * len(x)),
        {"no padding", "a long region and a short one weigh the same"},
    ),
    "one too early": (
        with_region(lambda a, b, start, stop: (max(0, start - (start < stop)), stop)),
        {"no padding", "differs in the last token"},
    ),
    "one too late": (
        with_region(lambda a, b, start, stop: (min(start + 1, max(stop - 1, start)), stop)),
        {"no padding", "no shared prefix"},
    ),
    "the last token alone": (
        with_region(lambda a, b, start, stop: (max(start, stop - 1), stop)),
        {"no padding", "equal again later"},
    ),
    "the pad id over the mask": (
        pad_over_mask,
        {
            "mask: pad id in the prompt",
            "mask: pad id in a response",
            "mask: the texts end with the pad id",
        },
    ),
    "nothing at padding": (
        at_padding_nothing,
        {"chosen ends first", "chosen is a prefix of rejected", "identical, padded"},
    ),
    "chosen and rejected swapped": (
        with_terms(lambda x: -logsigmoid(-x)),
        {"no padding", "one token"},
    ),
    "log of sigmoid as written": (
        with_terms(lambda x: -torch.log(torch.sigmoid(x))),
        {"large differences against the chosen"},
    ),
    "nothing refused": (
        refuses_nothing,
        {
            "refused: odd rows",
            "refused: left padding by different amounts",
            "refused: rewards of bfloat16",
        },
    ),
    "leading pads unknown": (
        lambda ids, rewards, pad_id, n, mask: pairwise_loss(ids, rewards, pad_id, 0, mask),
        {"leading pad of the text"},
    ),
    "no gradient": (
        lambda ids, rewards, *rest: pairwise_loss(ids, rewards.detach(), *rest),
        {"no padding"},
    ),
}
WRONG |= {
    name: (with_target(term), set(cases)) for name, (term, cases) in test_loss.WRONG_TARGETS.items()
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_losses_are_told_apart(name):
    function, cases = WRONG[name]
    rows = verdicts(function)
    wrong = {case for case, row in rows.items() if row["verdict"] == "WRONG"}
    print(f"{name}: {len(wrong)} of {len(rows)}")
    assert cases <= wrong
    assert rows["all three"]["verdict"] == "not taken" or name == "no gradient"


def test_a_loss_without_targets_is_not_called_with_them():
    """As without margins: those cases are counted as not taken, and none of them as wrong."""

    def function(ids, rewards, pad_id, leading, mask, loss="divergent", margins=None):
        return pairwise_loss(ids, rewards, pad_id, leading, mask, loss, margins)

    rows = verdicts(function)
    for case in CASES:
        taken = not case["options"].keys() - {"loss", "margins"}
        assert rows[case["name"]]["verdict"] == ("ok" if taken else "not taken")
    assert rows["targets: at every token"]["note"] == "targets"


def test_every_wrong_loss_is_put_through_the_packed_path_too():
    """Most of them by one table; the other two need more than a wrong region or term."""
    others = {"nothing at padding", "nothing refused"}
    assert set(WRONG) == set(test_loss.WRONG_LOSSES) | others


@pytest.mark.parametrize("name", ["one too early", "to the end of L"])
def test_a_wrong_region_that_is_the_right_one_in_a_case_is_ok(name):
    """A row of one token has one region."""
    row = verdicts(WRONG[name][0])["one token"]
    assert row["verdict"] == "ok" and float(row["loss"]) == 0


# --------------------------------------------------------------------------------------------------
# check_vectors


def run(monkeypatch, capsys, *words) -> tuple[object, list[str]]:
    """Run check_vectors. Returns its exit status or message, and the lines that it printed."""
    monkeypatch.setattr("sys.argv", ["check_vectors", *words])
    with pytest.raises(SystemExit) as exit:
        check_vectors.main()
    return exit.value.code, capsys.readouterr().out.splitlines()


def test_program_passes_our_own(monkeypatch, capsys):
    status, lines = run(monkeypatch, capsys, "rm:pairwise_loss")
    assert (
        not status
        and lines[-1]
        == f"rm:pairwise_loss: {len(CASES)} cases: {len(CASES)} ok, 0 WRONG, 0 not taken"
    )
    assert [
        line[: max(map(len, (case["name"] for case in CASES)))].rstrip() for line in lines[1:-1]
    ] == [case["name"] for case in CASES]


MODULE = """
import torch
from rm import pairwise_loss

def five(ids, rewards, pad, n, mask):
    return pairwise_loss(ids, rewards, pad, n, mask)

def loss_alone(ids, rewards, pad, n, mask):
    return five(ids, rewards, pad, n, mask)["loss"]

def without_gradient(ids, rewards, pad, n, mask):
    return five(ids, rewards, pad, n, mask)["loss"].detach()

def breaks(ids, rewards, pad, n, mask):
    return ids.no_such_thing

def nothing(ids, rewards, pad, n, mask):
    return None

def one_score(ids, rewards, pad, n, mask):
    out = five(ids, rewards, pad, n, mask)
    return {"loss": out["loss"], "chosen_mean_scores": out["chosen_mean_scores"].sum()}

def keywords(ids, rewards, pad, n, mask, **options):
    return pairwise_loss(ids, rewards, pad, n, mask, **options)

SOMETHING = 5
"""


@pytest.mark.parametrize(
    "function, status, line, last",
    [
        (
            "five",
            0,
            "no padding +0.0e[+]00 +0.0e[+]00 +0.0e[+]00 +ok$",
            "{five} ok, 0 WRONG, {options} not taken",
        ),
        (
            "keywords",
            0,
            "all three +0.0e[+]00 +0.0e[+]00 +0.0e[+]00 +ok$",
            "{all} ok, 0 WRONG, 0 not taken",
        ),
        (
            "loss_alone",
            0,
            "no padding +0.0e[+]00 +not given +0.0e[+]00 +ok$",
            "{five} ok, 0 WRONG, {options} not taken",
        ),
        (
            "without_gradient",
            1,
            "no padding +0.0e[+]00 +not given +none +WRONG .the loss has no gradient",
            "{errors} ok, {numbers} WRONG, ",
        ),
        (
            "breaks",
            1,
            "no padding +WRONG .AttributeError: .*no_such_thing",
            "{errors} ok, {numbers} WRONG, {options} not taken",
        ),
        (
            "nothing",
            1,
            "refused: odd rows +WRONG .accepted, but three rows are no pairs",
            "0 ok, {five} WRONG, {options} not taken",
        ),
        (
            "one_score",
            1,
            r"no padding .* WRONG .scores of shape \[\], expected \[1\]",
            "{errors} ok, {numbers} WRONG, ",
        ),
    ],
)
def test_program_with_foreign_functions(
    function, status, line, last, tmp_path, monkeypatch, capsys
):
    (tmp_path / "others").mkdir()
    (tmp_path / "others" / "theirs.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    got, lines = run(monkeypatch, capsys, f"others.theirs:{function}")
    options = sum(bool(case["options"]) for case in CASES)
    numbers = sum(not case["options"] for case in NUMBERS)
    counts = dict(
        all=len(CASES),
        options=options,
        five=len(CASES) - options,
        numbers=numbers,
        errors=len(CASES) - options - numbers,
    )
    assert got == status and last.format(**counts) in lines[-1], lines[-1]
    assert any(re.match(line, words) for words in lines), lines


def test_program_names_the_trap_that_fails_the_same_cases(tmp_path, monkeypatch, capsys):
    """A loss that ignores the mask, and one that is wrong in no case."""
    (tmp_path / "trapped.py").write_text(
        "from rm import pairwise_loss\n\n"
        "def no_mask(ids, rewards, pad, n, mask):\n"
        "    return pairwise_loss(ids, rewards, pad, n)\n\n"
        "def halved(ids, rewards, pad, n, mask):\n"
        "    return pairwise_loss(ids, rewards, pad, n, mask)['loss'] / 2\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    _, lines = run(monkeypatch, capsys, "trapped:no_mask")
    named = [line for line in lines if "a known trap: " in line]
    assert len(named) == 1 and "the pad id over the mask" in named[0]
    for word in ("trapped:halved", "rm:pairwise_loss"):
        _, lines = run(monkeypatch, capsys, word)
        assert not [line for line in lines if "a known trap: " in line]


def test_program_checks_invariants(tmp_path, monkeypatch, capsys):
    (tmp_path / "halves.py").write_text(
        "from rm import pairwise_loss\n\n"
        "def halved(ids, rewards, pad, n, mask):\n"
        "    return pairwise_loss(ids, rewards, pad, n, mask)['loss'] / 2\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    loss_file = tmp_path / "loss.json"  # a few cases: all of them take half a minute
    loss_file.write_text(json.dumps({"cases": CASES[:40:4]}))
    monkeypatch.setattr(check_vectors, "LOSS_FILE", loss_file)
    status, lines = run(monkeypatch, capsys, "rm:pairwise_loss", "--invariants")
    assert status == 0 and "invariants: 0 broken" in lines
    status, lines = run(monkeypatch, capsys, "halves:halved", "--invariants")
    assert status == 1
    broken = [line for line in lines if line.startswith("broken invariant: ")]
    assert "broken invariant: equal rewards, in the case 'no padding'" in broken
    assert f"invariants: {len(broken)} broken" in lines


@pytest.mark.parametrize(
    "word, words",
    [
        ("rm", ["'rm'", "module:function", "rm:pairwise_loss"]),
        ("rm:", ["'rm:'", "module:function"]),
        (":f", ["':f'", "module:function"]),
        ("a:b:c", ["'a:b:c'", "module:function"]),
        ("no_such_module:f", ["no module 'no_such_module'", "without .py"]),
        ("rm.py:pairwise_loss", ["no module 'rm.py'", "without .py"]),
        ("rm:no_such_function", ["no function 'no_such_function'", "pairwise_loss"]),
        (
            "others.broken:f",
            ["importing 'others.broken' failed", "ModuleNotFoundError", "no_such_module_either"],
        ),
        ("others.constant:F", ["something else than a function as 'F'", "none at all"]),
    ],
)
def test_program_names_the_mistake_in_its_argument(word, words, tmp_path, monkeypatch, capsys):
    (tmp_path / "others").mkdir()
    (tmp_path / "others" / "broken.py").write_text("import no_such_module_either")
    (tmp_path / "others" / "constant.py").write_text("F = 5")
    monkeypatch.syspath_prepend(tmp_path)
    message, lines = run(monkeypatch, capsys, word)
    assert not lines and message.startswith("check_vectors: error: ") and "\n" not in message
    assert all(word in message for word in words), message


# --------------------------------------------------------------------------------------------------
# The kit is what its generator writes


def test_generator_writes_the_kit_again(tmp_path):
    """JSON comes in the same order, weights and tokenizer come to the bit.

    Computed numbers may differ by the rounding of another machine.
    """
    make_vectors.write(tmp_path)
    names = sorted(
        str(path.relative_to(VECTORS))
        for path in VECTORS.rglob("*")
        if path.is_file() and path.name not in OTHER_FILES and path.suffix != ".pyc"
    )
    assert (
        sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file())
        == names
    )
    for name in names:
        got, expected = (tmp_path / name).read_bytes(), (VECTORS / name).read_bytes()
        if name.endswith(".json"):
            got, expected = map(json.loads, (got, expected))
            agree(got, expected, 1e-12 if name == "loss.json" else 1e-9, name)
        else:
            assert got == expected, name


def test_inputs_are_exact_in_every_format():
    """float32 holds the rewards; bfloat16 and float16 hold the weights, too."""
    for case in NUMBERS:
        rewards = torch.tensor(case["rewards"], dtype=torch.float64)
        assert torch.equal(rewards.float().double(), rewards), case["name"]
    for name in MODELS:
        for weight in read_checkpoint(VECTORS / "models" / name)[1].values():
            assert torch.equal(weight.bfloat16().float(), weight) and torch.equal(
                weight.half().float(), weight
            )


def test_kit_is_small():
    files = [path for path in VECTORS.rglob("*") if path.is_file() and path.suffix != ".pyc"]
    assert sum(path.stat().st_size for path in files) < 1e6


@pytest.mark.parametrize("name", ["gpt2", "llama_gqa", "opt", "opt_postnorm_proj"])
def test_generator_gives_deepspeed_chats_numbers(name):
    """DeepSpeed-Chat's own code computed these from the checkpoints in testdata/, in float32."""
    expected = json.loads((TESTDATA / name / "expected.json").read_text())
    model = RewardModel.from_pretrained(
        TESTDATA / name, expected.get("pad_id", 0), expected.get("num_padding_at_beginning", 0)
    ).double()
    model.v_head.weight.data = torch.tensor(expected["v_head"], dtype=torch.float64)
    got = make_vectors.batch_numbers(
        model, torch.tensor(expected["input_ids"]), torch.tensor(expected["attention_mask"])
    )
    assert got["grad_norms"].pop("score.weight") == pytest.approx(
        torch.tensor(expected["grad_v_head"]).norm().item(), abs=1e-5
    )
    del got["grad_norms"]
    agree(got, {key: expected[key] for key in got}, 1e-5)
    ids, mask = (torch.tensor(expected["step3"][key]) for key in ("input_ids", "attention_mask"))
    got = make_vectors.step3_numbers(model, ids, mask, expected["step3"]["prompt_length"])
    agree(got["chosen_end_scores"], expected["step3"]["chosen_end_scores"], 1e-5)
    compared = torch.tensor(got["compared"]).bool()
    assert 0 < compared.sum() < compared.numel()
    agree(
        torch.tensor(got["values"])[compared].tolist(),
        torch.tensor(expected["step3"]["values"])[compared].tolist(),
        1e-5,
    )


# --------------------------------------------------------------------------------------------------
# models/, packed.json, rankings.json: our implementation, in other ways than the generator took


def numbers(out: dict, model) -> dict:
    return {key: value.tolist() for key, value in out.items()} | make_vectors.backward_norms(
        model, out["loss"]
    )


@pytest.mark.parametrize("name", MODELS)
def test_model_in_float32(name):
    """float32 keeps to the tolerance that vectors/README.md states."""
    model = RewardModel.from_pretrained(VECTORS / "models" / name)
    agree(make_vectors.model_file(name, model), load(f"models/{name}/expected.json"), 1e-5)


@pytest.mark.parametrize("name", make_vectors.TRAINED)
def test_training_in_float32(name):
    model = RewardModel.from_pretrained(VECTORS / "models" / name)
    agree(make_vectors.trajectory(name, model), load(f"models/{name}/trajectory.json"), 1e-4)


def replay(name: str, **changed) -> list[dict]:
    """Replay trajectory.json from what it says alone.

    AdamW is written out: Loshchilov & Hutter (2019), algorithm 2.
    """
    file = load(f"models/{name}/trajectory.json")
    o = file["optimizer"] | changed
    (beta1, beta2), model = (
        o["betas"],
        RewardModel.from_pretrained(VECTORS / "models" / name).double(),
    )
    parameters, steps = [*model.parameters()], []
    moments = [(torch.zeros_like(p), torch.zeros_like(p)) for p in parameters]
    for t, step in enumerate(file["steps"], start=1):
        batch = file["batches"][step["batch"]]
        loss = model(torch.tensor(batch["input_ids"]), torch.tensor(batch["attention_mask"]))[
            "loss"
        ]
        gradients = torch.autograd.grad(loss, parameters)
        norm = sum(g.square().sum() for g in gradients).sqrt().item()
        scale = min(1.0, o["max_grad_norm"] / (norm + 1e-6))
        with torch.no_grad():
            for p, g, (m, v) in zip(parameters, gradients, moments):
                m.mul_(beta1).add_((1 - beta1) * scale * g)
                v.mul_(beta2).add_((1 - beta2) * (scale * g).square())
                decay = (
                    o["weight_decay_of_matrices"] if p.dim() == 2 else o["weight_decay_of_vectors"]
                )
                p -= o["learning_rate"] * (
                    m / (1 - beta1**t) / ((v / (1 - beta2**t)).sqrt() + o["eps"]) + decay * p
                )
        matrices = sum(p.detach().square().sum() for p in parameters if p.dim() == 2).sqrt().item()
        steps.append(
            {
                "batch": step["batch"],
                "loss": loss.item(),
                "grad_norm": norm,
                "matrix_norm_after": matrices,
            }
        )
    return steps


@pytest.mark.parametrize("name", make_vectors.TRAINED)
def test_training_by_formula(name):
    agree(replay(name), load(f"models/{name}/trajectory.json")["steps"], 1e-9)


@pytest.mark.parametrize(
    "changed",
    [
        {"betas": [0.9, 0.999]},
        {"weight_decay_of_matrices": 0.0},
        {"weight_decay_of_vectors": 0.1},
        {"max_grad_norm": 1e9},
        {"eps": 1e-5},
    ],
    ids=str,
)
def test_training_in_another_way_is_told_apart(changed):
    """They differ by more than the tolerance of float32."""
    with pytest.raises(AssertionError):
        agree(replay("gpt2", **changed), load("models/gpt2/trajectory.json")["steps"], 1e-4)


@pytest.mark.parametrize("name", MODELS)
def test_model_packed_and_without_a_mask(name, models):
    model, expected = models[name], load(f"models/{name}/expected.json")
    assert (model.pad_id, model.num_padding_at_beginning) == (
        expected["pad_id"],
        expected["num_padding_at_beginning"],
    )  # by config.json
    ids = torch.tensor(expected["input_ids"])
    texts = [
        row[: sum(mask)] for row, mask in zip(expected["input_ids"], expected["attention_mask"])
    ]
    for out in (
        model(ids),
        model(data.pack([*map(list, zip(texts[:4], texts[4:]))], model.pad_id)),
    ):
        got = numbers(out, model)
        agree(got, {key: expected[key] for key in got}, 1e-10)
    out = model.forward_value(
        torch.tensor(expected["step3"]["input_ids"]),
        prompt_length=expected["step3"]["prompt_length"],
    )
    agree(out["chosen_end_scores"].tolist(), expected["step3"]["chosen_end_scores"], 1e-10)


@pytest.mark.parametrize(
    "name, changed",
    [
        ("gpt2", {"activation_function": "gelu"}),
        ("gpt2", {"n_head": 2}),
        ("opt", {"activation_function": "gelu"}),
        ("opt_postnorm_proj", {"num_attention_heads": 2}),
        ("llama_gqa", {"rope_theta": 500.0}),
        ("llama_gqa", {"rms_norm_eps": 1e-5}),
        ("gpt2", {"layer_norm_epsilon": 1e-6}),
        ("llama_rope_scaling", {"rope_scaling": None}),
        ("llama_rope_scaling", {"rope_scaling": LLAMA_3 | {"high_freq_factor": 3.0}}),
        ("mistral", {"rope_theta": 500.0}),
        ("qwen2", {"rope_theta": 500.0}),
        ("qwen3", {"rms_norm_eps": 1e-5}),
        ("gpt_neox", {"use_parallel_residual": False}),
        ("gpt_neox", {"rotary_pct": 0.5}),
        ("gpt_neox", {"rotary_emb_base": 500.0, "rotary_pct": 1.0}),
        ("gpt_neox", {"hidden_act": "gelu_new"}),
        ("gpt_neox", {"layer_norm_eps": 1e-6}),
        ("gpt_neox", {"num_attention_heads": 1}),
    ],
    ids=str,
)
def test_models_that_differ_in_one_detail_are_told_apart(name, changed):
    """They differ by ten times the tolerance of float32, or more."""
    hf, weights = read_checkpoint(VECTORS / "models" / name)
    expected = load(f"models/{name}/expected.json")
    backbone = GPT.from_hf(hf | changed, weights, source=name).double()
    hidden = backbone(torch.tensor(expected["input_ids"]), torch.tensor(expected["attention_mask"]))
    assert (
        hidden - torch.tensor(expected["last_hidden_state"], dtype=torch.float64)
    ).abs().max() > 1e-4


@pytest.mark.parametrize("name", MODELS)
def test_hidden_states_are_those_of_transformers(name):
    import transformers

    expected = load(f"models/{name}/expected.json")
    ids, mask = torch.tensor(expected["input_ids"]), torch.tensor(expected["attention_mask"])
    with exact_transformers():
        theirs = transformers.AutoModel.from_pretrained(
            VECTORS / "models" / name, dtype=torch.float64, attn_implementation="sdpa"
        ).eval()
        got = theirs(ids, attention_mask=mask).last_hidden_state
    torch.testing.assert_close(
        got, torch.tensor(expected["last_hidden_state"], dtype=torch.float64), atol=1e-12, rtol=0
    )


@pytest.mark.parametrize("case", load("packed.json")["cases"], ids=lambda case: case["name"])
def test_packed(case, models):
    """Attention with equal scores is a mean over the keys that a query sees, here unit vectors."""
    batch = data.pack(case["token_groups"], case["pad_id"], longest_tail=case["longest_tail"])
    tokens, keys = batch.num_tokens, batch.num_tokens - sum(case["tails"])
    zeros, units = (
        torch.zeros(tokens, 1, keys, dtype=torch.float64),
        torch.eye(keys, dtype=torch.float64)[:, None],
    )
    seen = (
        (PackedAttention(batch, scaled_dot_product)(zeros, zeros[:keys], units, 0.0)[:, 0] > 0)
        .long()
        .tolist()
    )
    assert ["".join(map(str, row)) + "0" * (tokens - keys) for row in seen] == case["attends"]
    # A text is its trunk and its branch, in its columns; its tail is padding, in the next columns.
    parts = iter(zip(case["input_ids"], case["positions"]))
    trunks, branches, tails = (
        [[next(parts) for _ in range(length)] for length in case[name]]
        for name in ("trunks", "branches", "tails")
    )
    rows = iter(zip(branches, tails))
    for trunk, group in zip(trunks, case["token_groups"]):
        longest = max(map(len, group))
        alike = next(
            (t for t, column in enumerate(zip(*group)) if len({*column}) > 1), min(map(len, group))
        )
        assert len(trunk) == min(alike, min(map(len, group)) - 1)
        for tokens, (branch, tail) in zip(group, rows):
            padding = range(len(tokens), longest)[: case["longest_tail"]]
            assert trunk + branch + tail == [*zip(tokens, range(len(tokens)))] + [
                (case["pad_id"], column) for column in padding
            ]
    assert not [*parts]
    # The numbers are the padded layout's, a comparison at a time.
    model, outs = models[case["model"]], []
    options = dict(case["options"])
    margins = options.pop("margins", [0.0] * len(case["token_groups"]))
    targets = options.pop("targets", [1.0] * len(case["token_groups"]))
    with mock.patch.multiple(model, **({"loss": model.loss} | options)):
        for group, margin, target in zip(case["token_groups"], margins, targets):
            chosen, rejected = zip(*itertools.combinations(group, 2))
            outs.append(
                model(
                    *data.pad_rows([*chosen, *rejected], model.pad_id),
                    margins=[margin] * len(chosen),
                    targets=[target] * len(chosen),
                )
            )
    scores = {key: torch.cat([out[key] for out in outs]) for key in check_vectors.SCORES}
    got = numbers({"loss": torch.stack([out["loss"] for out in outs]).mean()} | scores, model)
    agree(got, {key: case[key] for key in got}, 1e-10)


@pytest.mark.parametrize("case", load("rankings.json")["cases"], ids=lambda case: case["name"])
def test_rankings(case, models):
    """The packed layout agrees, and so does plain Python from the rewards in the file."""
    model = models[case["model"]]
    got = numbers(model(data.pack(case["token_groups"], model.pad_id)), model)
    agree(got, {key: case[key] for key in got}, 1e-10)
    losses, scores = [[] for _ in case["token_groups"]], ([], [])
    gradients = [torch.zeros(len(rewards), len(rewards[0])).double() for rewards in case["rewards"]]
    for number, i, j in case["pairs"]:
        group, rewards = case["token_groups"][number], case["rewards"][number]
        ids, mask = data.pad_rows(group, case["pad_id"])
        out = by_definition(
            {
                "attention_mask": mask[[i, j]].tolist(),
                "input_ids": ids[[i, j]].tolist(),
                "rewards": [rewards[i], rewards[j]],
            }
        )
        losses[number].append(out["loss"])
        count = len(group) * (len(group) - 1) / 2 * len(gradients)
        gradients[number][[i, j]] += torch.tensor(out["grad_rewards"], dtype=torch.float64) / count
        scores[0].extend(out["chosen_mean_scores"])
        scores[1].extend(out["rejected_mean_scores"])
    agree([gradient.tolist() for gradient in gradients], case["grad_rewards"], 1e-12)
    means = [sum(terms) / len(terms) for terms in losses]
    agree(
        [means, sum(means) / len(means), *scores],
        [
            case[key]
            for key in ("loss_of_comparisons", "loss", "chosen_mean_scores", "rejected_mean_scores")
        ],
        1e-12,
    )


# --------------------------------------------------------------------------------------------------
# tokens/

TOKENS = load("tokens/rows.json")


@pytest.fixture(scope="module")
def tokenizer():
    return data.load_tokenizer(VECTORS / "tokens" / "tokenizer.model")


@pytest.mark.parametrize("case", TOKENS["cases"], ids=lambda case: case["name"])
def test_tokens(case, tokenizer, tmp_path):
    """Read rows from a file, as training does. Sequences decode to their text, or a part of it."""
    (tmp_path / "row.jsonl").write_text(json.dumps(case["row"]) + "\n")
    (comparison,) = data.load_comparisons(tmp_path / "row.jsonl")
    assert data.texts_of(comparison, tokenizer) == case["texts"]
    assert comparison.margin == case["margin"]
    assert (
        data.tokenize(comparison, tokenizer, case["max_seq_len"], case["truncation_side"])
        == case["tokens"]
    )
    assert (
        len(
            data.tokenize_all([comparison], tokenizer, case["max_seq_len"], case["truncation_side"])
        )
        == 0
    ) == case["dropped"]
    for text, tokens in zip(case["texts"], case["tokens"]):
        assert len(tokens) <= case["max_seq_len"] and tokens[0] == TOKENS["bos_id"]
        decoded = tokenizer.decode(tokens)
        if case["truncation_side"] == "right":
            assert text.startswith(decoded) and decoded != text and TOKENS["eos_id"] not in tokens
        else:
            assert (
                decoded in text
                and tokens[-1] == TOKENS["eos_id"]
                and (decoded == text or case["max_seq_len"] < 99)
            )


def test_token_cases_do_what_their_names_say(tokenizer):
    by_name = {case["name"]: case for case in TOKENS["cases"]}
    row = by_name["encoded as one string: a token may reach over the border"]["row"]
    assert tokenizer.encode(row["prompt"] + row["chosen"]) != tokenizer.encode(
        row["prompt"]
    ) + tokenizer.encode(row["chosen"])
    fits, cut = (
        by_name["left: fits exactly"],
        by_name["left: what is not shared stays, and then the end is cut before eos"],
    )
    assert max(map(len, fits["tokens"])) == fits["max_seq_len"]
    assert [tokenizer.decode(tokens) for tokens in cut["tokens"]] == [
        "Rome",
        "Oslo",
    ]  # without the space in front and the full stop


@pytest.mark.parametrize("case", TOKENS["bad_rows"], ids=lambda case: case["name"])
def test_bad_rows(case):
    with pytest.raises(ValueError):
        data.parse_comparison(json.dumps(case["row"]).encode())


def test_readme_names_every_file_and_field():
    readme = (VECTORS / "README.md").read_text()
    fields = TOKENS.keys() | TOKENS["cases"][0].keys()
    for path in VECTORS.rglob("*"):
        if path.suffix == ".pyc":
            continue
        assert path.is_dir() or path.name in readme or path.name == "README.md", path
        if path.name in (
            "loss.json",
            "packed.json",
            "rankings.json",
            "expected.json",
            "trajectory.json",
            "traps.json",
        ):
            content = json.loads(path.read_text())
            fields |= (
                content.keys()
                | content.get("step3", {}).keys()
                | content.get("optimizer", {}).keys()
            )
            fields |= {
                key
                for name in ("cases", "steps", "traps")
                for item in content.get(name, [])
                for key in item
            }
    assert not [field for field in fields if f"`{field}`" not in readme]
