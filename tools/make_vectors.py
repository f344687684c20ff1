"""Write the conformance kit: inputs, and the numbers that every implementation must give for them.

    python -m tools.make_vectors [DIRECTORY]                      (default: vectors/)

vectors/README.md describes the files of the kit. Their inputs stand in vector_cases.json or follow
from SEED and the names there. They are exact in every format: rewards are multiples of 1/64,
weights multiples of 1/128. All expected numbers are computed in float64 by the functions of rm.py,
model.py, data.py and train.py. Two runs on a machine write the same bytes. On another machine, or
with other versions of PyTorch, computed numbers may differ in their last bits (sums in another
order, another libm), and nothing else may. tools/check_vectors.py checks other implementations.
"""

import argparse
import itertools
import json
import random
from pathlib import Path
from unittest import mock

import torch

import data
from model import GPT, GPTConfig
from parts.distributed import Process
from parts.huggingface import family_of, weight_names
from rm import RewardModel, pairwise_loss
from tools.check_vectors import arguments
from train import make_optimizer

SEED = 20231
DIRECTORY = Path(__file__).resolve().parent.parent / "vectors"
CASES = json.loads(Path(__file__).with_name("vector_cases.json").read_text(encoding="utf-8"))
MODELS = CASES["models"]
TRAINED = ("gpt2", "llama_gqa")  # 20 steps of training start from them


def seeded(*names) -> random.Random:
    """Return a random generator that depends on the names alone: new cases change no others."""
    return random.Random(" ".join(map(str, (SEED, *names))))


# --------------------------------------------------------------------------------------------------
# The loss: ids and rewards in; loss, scores and gradient out


def loss_cases() -> list[dict]:
    return [with_numbers(loss_case(case)) for section in CASES["loss"].values() for case in section]


def loss_case(case: dict) -> dict:
    """Complete the inputs of a case of vector_cases.json to those of loss.json.

    mask: a string of 0 and 1 for every row. rewards_of: the case whose random rewards to take.
    """
    name, rows, mask = case["name"], case.get("input_ids"), case.get("mask")
    if rows is None:
        rows, mask = many_pairs(name, **case["many_pairs"])
    rewards = case.get("rewards")
    if rewards is None:
        rewards = random_rewards(case.get("rewards_of", name), rows)
    return {
        "name": name,
        "pad_id": case.get("pad_id", 0),
        "num_padding_at_beginning": case.get("num_padding_at_beginning", 0),
        "input_ids_dtype": case.get("input_ids_dtype", "int64"),
        "rewards_dtype": case.get("rewards_dtype", "float64"),
        "input_ids": rows,
        "attention_mask": mask and [[int(digit) for digit in row] for row in mask],
        "rewards": rewards,
        "options": case.get("options", {}),
        "error": case.get("error"),
    }


def random_rewards(name: str, rows: list) -> list[list[float]]:
    """Draw a reward for every id, from -4 to 4."""
    rng = seeded("rewards", name)
    return [[rng.randint(-256, 256) / 64 for _ in row] for row in rows]


def many_pairs(name: str, pairs: int, length: int, pads_inside: bool) -> tuple[list, list | None]:
    """Draw pairs, most of which share a beginning and are ragged: padded rows, and their mask."""
    rng, lowest = seeded("ids", name), 0 if pads_inside else 1
    chosen, rejected = [], []
    for _ in range(pairs):
        prompt = random_ids(rng, lowest, length)
        chosen.append((prompt + random_ids(rng, lowest, length))[:length] or [1])
        rejected.append((prompt + random_ids(rng, lowest, length))[:length] or [1])
    texts, mask = chosen + rejected, None
    if pads_inside:
        mask = [f"{'1' * len(text):0<{length}}" for text in texts]
    return [text + [0] * (length - len(text)) for text in texts], mask


def random_ids(rng: random.Random, lowest: int, length: int) -> list[int]:
    return [rng.randint(lowest, 3) for _ in range(rng.randint(0, length))]


def with_numbers(case: dict) -> dict:
    """Add what `rm.pairwise_loss` gives in float64, which holds float32's rewards, too."""
    if case["error"] is not None:
        return case
    (ids, rewards, *rest), options = arguments(case | {"rewards_dtype": "float64"})
    out = pairwise_loss(ids, rewards, *rest, **options)
    out["loss"].backward()
    return case | lists(out) | {"grad_rewards": rewards.grad.tolist()}


def lists(tensors: dict[str, torch.Tensor]) -> dict:
    return {name: tensor.tolist() for name, tensor in tensors.items()}


# --------------------------------------------------------------------------------------------------
# Models: every family, and its numbers


def make_model(name: str) -> RewardModel:
    """Make a model whose weights float16 and bfloat16 hold, too.

    They are multiples of 1/128, at most 5/16 away from 0, those of norms from 1.
    """
    given = MODELS[name]
    backbone = GPT(GPTConfig(**given["config"]))
    model = RewardModel(backbone, given["pad_id"], given["num_padding_at_beginning"])
    for weight_name, weight in model.named_parameters():
        rng = seeded(name, weight_name)
        numbers = torch.tensor([rng.randint(-40, 40) / 128 for _ in range(weight.numel())])
        middle = 1.0 if weight_name.endswith("norm.weight") else 0.0
        weight.data = numbers.view(weight.shape) + middle
    return model


def text(rng: random.Random, length: int) -> list[int]:
    """Draw ids that are special in no model."""
    return [rng.randint(3, 39) for _ in range(length)]


def random_pairs(rng: random.Random, start: list[int], shapes) -> list[list[int]]:
    """Draw pairs of texts that begin with `start`; all chosen ones, then all rejected ones.

    shapes: the numbers of (prompt, chosen, rejected) tokens of every pair.
    """
    chosen_texts, rejected_texts = [], []
    for prompt, chosen, rejected in shapes:
        shared = start + text(rng, prompt - len(start))
        chosen_texts.append(shared + text(rng, chosen))
        rejected_texts.append(shared + text(rng, rejected))
    return chosen_texts + rejected_texts


def backward_norms(model: RewardModel, loss: torch.Tensor) -> dict:
    """Compute the gradient's norm, over all parameters and over each of model.safetensors."""
    model.zero_grad()
    loss.backward()
    model_type = model.backbone.config.model_type
    prefix, norms = family_of(model_type).prefixes[0], {}
    for theirs, ours in weight_names(model_type, model.backbone.state_dict()).items():
        gradients = [model.backbone.get_parameter(name).grad.norm() for name in ours]
        norms[prefix + theirs] = torch.stack(gradients).norm()
    norms["score.weight"] = model.v_head.weight.grad.norm()
    return {"grad_norm": torch.stack([*norms.values()]).norm().item(), "grad_norms": lists(norms)}


def batch_numbers(model: RewardModel, ids: torch.Tensor, mask: torch.Tensor) -> dict:
    """Compute what a model gives for a batch of pairs, in the padded layout."""
    out = model(ids, mask)
    numbers = {
        "last_hidden_state": model.backbone(ids, mask),
        "rewards": model.token_rewards(ids, mask),
        **out,
    }
    return lists(numbers) | backward_norms(model, out["loss"])


def step3_numbers(
    model: RewardModel, ids: torch.Tensor, mask: torch.Tensor, prompt_length: int
) -> dict:
    """Compute what step 3 of RLHF reads.

    `compared` is 0 at left padding, where values have no meaning and 0.0 stands for them.
    """
    out = model.forward_value(ids, mask, prompt_length=prompt_length)
    compared = mask.cumsum(1) > 0
    return {
        "compared": compared.long().tolist(),
        "values": out["values"].where(compared, 0.0).tolist(),
        "chosen_end_scores": out["chosen_end_scores"].tolist(),
    }


def model_file(name: str, model: RewardModel) -> dict:
    given, rng = MODELS[name], seeded("batch", name)
    start, pad_id = given["begins_with"], given["pad_id"]
    # In these pairs chosen ends first; rejected ends first; a response is empty, so one text is a
    # prefix; the texts share only what all texts begin with.
    shapes = [(4, 2, 5), (5, 4, 1), (6, 0, 3), (len(start), 5, 6)]
    ids, mask = data.pad_rows(random_pairs(rng, start, shapes), pad_id)
    # Two prompts are padded on the left to 5 columns; answers end at different columns; one row
    # fills all of them.
    step3_rows = [
        [pad_id] * 3 + text(rng, 4) + [pad_id] * 3,
        text(rng, 10),
        [pad_id] + text(rng, 5) + [pad_id] * 4,
    ]
    step3 = torch.tensor(step3_rows)
    step3_mask = (step3 != pad_id).long()
    return {
        "pad_id": pad_id,
        "num_padding_at_beginning": given["num_padding_at_beginning"],
        "input_ids": ids.tolist(),
        "attention_mask": mask.tolist(),
        **batch_numbers(model, ids, mask),
        "step3": {
            "input_ids": step3_rows,
            "attention_mask": step3_mask.tolist(),
            "prompt_length": 5,
            **step3_numbers(model, step3, step3_mask, 5),
        },
    }


def trajectory(name: str, model: RewardModel) -> dict:
    """Train for 20 steps, on five batches in turns.

    Loss and gradient norm are those before a step, and before clipping; the norm of all matrices is
    that after it. Vectors are left out of the norm: gpt2's key biases change no output, so their
    gradient is 0 up to rounding, and Adam makes steps of the rounding.
    """
    given, settings, rng = MODELS[name], CASES["optimizer"], seeded("trajectory", name)
    batches = []
    for _ in range(5):
        shapes = [(rng.randint(2, 5), rng.randint(1, 6), rng.randint(1, 6)) for _ in range(4)]
        rows = random_pairs(rng, given["begins_with"], shapes)
        batches.append(data.pad_rows(rows, given["pad_id"]))
    # Adam's eps is PyTorch's default, which make_optimizer takes.
    rate, decay = settings["learning_rate"], settings["weight_decay_of_matrices"]
    optimizer = make_optimizer(model, rate, decay, rate, Process(rank=1))  # rank 1 prints nothing
    steps = []
    for step in range(20):
        out = model(*batches[step % 5])
        optimizer.zero_grad()
        out["loss"].backward()
        grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), settings["max_grad_norm"])
        optimizer.step()
        matrices = [weight.detach() for weight in model.parameters() if weight.dim() == 2]
        steps.append(
            {
                "batch": step % 5,
                "loss": out["loss"].item(),
                "grad_norm": grad_norm.item(),
                "matrix_norm_after": torch.stack([m.norm() for m in matrices]).norm().item(),
            }
        )
    padded = [lists({"input_ids": ids, "attention_mask": mask}) for ids, mask in batches]
    return {"optimizer": settings, "batches": padded, "steps": steps}


# --------------------------------------------------------------------------------------------------
# The packed layout, and rankings


def attends(groups, batch: data.PackedBatch) -> list[str]:
    """Write for every token of a packed batch which tokens it sees, as a string of 0 and 1.

    They follow from what packing promises and not from how it is done: a token sees what it would
    see in a row of its own text, padded on the right, under causal attention and no padding as
    keys: columns up to its own, of its text alone.
    """
    # Tokens are numbered in the order of the layout: all trunks, all branches, all tails.
    numbers = iter(range(batch.num_tokens))
    trunks, branches, tails = (
        [[next(numbers) for _ in range(length)] for length in lengths]
        for lengths in (batch.trunks, batch.branches, batch.tails)
    )
    rows, sees = iter(zip(branches, tails)), {}
    for trunk, group in zip(trunks, groups):
        for sequence, (branch, tail) in zip(group, rows):
            row = trunk + branch + tail
            for column, number in enumerate(row):
                sees[number] = set(row[: min(column + 1, len(sequence))])
    tokens = range(batch.num_tokens)
    return ["".join(str(int(key in sees[query])) for key in tokens) for query in tokens]


def packed_case(case: dict, model: RewardModel) -> dict:
    groups, options = case["token_groups"], case.get("options", {})
    margins, targets = options.get("margins"), options.get("targets")
    longest_tail = case.get("longest_tail")
    batch = data.pack(groups, model.pad_id, margins, targets, longest_tail=longest_tail)
    objective = {}
    for name, value in options.items():
        if name not in ("margins", "targets"):
            objective[name] = value
    with mock.patch.multiple(model, **({"loss": model.loss} | objective)):
        out = model(batch)
    return {
        "name": case["name"],
        "model": case["model"],
        "pad_id": model.pad_id,
        "longest_tail": batch.longest_tail,
        "options": options,
        "token_groups": groups,
        "input_ids": batch.input_ids.tolist(),
        "positions": batch.positions.tolist(),
        "trunks": batch.trunks,
        "branches": batch.branches,
        "tails": batch.tails,
        "attends": attends(groups, batch),
        **lists(out),
        **backward_norms(model, out["loss"]),
    }


def ranking_case(case: dict, model: RewardModel) -> dict:
    """Compute a case of comparisons of 2 to 6 responses, best first, in the padded layout.

    sizes: the number of responses of every comparison.
    """
    name = f"rankings of {', '.join(map(str, case['sizes']))}"
    rng, start = seeded(name), MODELS[case["model"]]["begins_with"]
    groups, rewards, pairs, losses, chosen_scores, rejected_scores = [], [], [], [], [], []
    gradients = []
    for number, size in enumerate(case["sizes"]):
        prompt = start + text(rng, rng.randint(1, 4))
        groups.append([prompt + text(rng, rng.randint(1, 6)) for _ in range(size)])
        ids, mask = data.pad_rows(groups[-1], model.pad_id)
        rewards.append(model.token_rewards(ids, mask).tolist())
        pair_losses = []
        # A pair at a time, padded as the whole ranking is, so that its rewards are those above.
        for i, j in itertools.combinations(range(size), 2):
            out = model(ids[[i, j]], mask[[i, j]])
            pairs.append([number, i, j])
            pair_losses.append(out["loss"])
            chosen_scores += out["chosen_mean_scores"].tolist()
            rejected_scores += out["rejected_mean_scores"].tolist()
        losses.append(torch.stack(pair_losses).mean())
    loss = torch.stack(losses).mean()
    for group, rows in zip(groups, rewards):
        gradients.append(ranking_gradient(group, rows, model.pad_id, len(groups)))
    return {
        "name": name,
        "model": case["model"],
        "pad_id": model.pad_id,
        "token_groups": groups,
        "rewards": rewards,
        "pairs": pairs,
        "loss_of_comparisons": [loss.item() for loss in losses],
        "loss": loss.item(),
        "chosen_mean_scores": chosen_scores,
        "rejected_mean_scores": rejected_scores,
        **backward_norms(model, loss),
        "grad_rewards": gradients,
    }


def ranking_gradient(group, rewards, pad_id: int, comparisons: int) -> list[list[float]]:
    """Compute d loss / d rewards of one of several comparisons, (K, its longest text)."""
    ids, mask = data.pad_rows(group, pad_id)
    leaf = torch.tensor(rewards, dtype=torch.float64, requires_grad=True)
    chosen, rejected = zip(*itertools.combinations(range(len(group)), 2))
    rows = [*chosen, *rejected]
    loss = pairwise_loss(ids[rows], leaf[rows], pad_id, attention_mask=mask[rows])["loss"]
    (loss / comparisons).backward()
    return leaf.grad.tolist()


# --------------------------------------------------------------------------------------------------
# Tokens


def make_tokenizer() -> data.Tokenizer:
    texts = []
    for comparison in itertools.islice(data.known_rewards(SEED), 200):
        texts += [comparison.prompt + response for response in comparison.responses]
    return data.train_tokenizer(texts, 400)


def token_case(case: dict, tokenizer: data.Tokenizer) -> dict:
    max_seq_len, side = case.get("max_seq_len", 99), case.get("truncation_side", "left")
    comparison = data.parse_comparison(json.dumps(case["row"]).encode())
    tokens = data.tokenize(comparison, tokenizer, max_seq_len, side)
    return {
        "name": case["name"],
        "max_seq_len": max_seq_len,
        "truncation_side": side,
        "row": case["row"],
        "texts": data.texts_of(comparison, tokenizer),
        "tokens": tokens,
        "margin": comparison.margin,
        "dropped": all(sequence == tokens[0] for sequence in tokens),
    }


def tokens_file(tokenizer: data.Tokenizer) -> dict:
    return {
        "pad_id": tokenizer.pad_id,
        "bos_id": tokenizer.bos_id,
        "eos_id": tokenizer.eos_id,
        "cases": [token_case(case, tokenizer) for case in CASES["tokens"]],
        "bad_rows": CASES["bad_rows"],
    }


# --------------------------------------------------------------------------------------------------
# Files


def dumps(value, indent: str = "") -> str:
    """Write JSON with a line for every field of an object, and an array of numbers in one."""
    if isinstance(value, dict) and value:
        opening, closing = "{}"
        parts = [f"{json.dumps(key)}: {dumps(item, indent + ' ')}" for key, item in value.items()]
    elif isinstance(value, list) and any(isinstance(item, (dict, str)) for item in value):
        opening, closing = "[]"
        parts = [dumps(item, indent + " ") for item in value]
    else:
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    return opening + ",".join(f"\n{indent} {part}" for part in parts) + f"\n{indent}{closing}"


def write_json(path: Path, content: dict):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(dumps(content) + "\n", encoding="utf-8")


def write(directory: Path):
    """Write all files of the kit but its README."""
    write_json(directory / "loss.json", {"cases": loss_cases()})
    models = {}
    for name in MODELS:
        path = directory / "models" / name
        make_model(name).save_pretrained(path, layout="hf")
        # The numbers are those of the model in the files.
        models[name] = RewardModel.from_pretrained(path).double().eval()
        write_json(path / "expected.json", model_file(name, models[name]))
    packed = [packed_case(case, models[case["model"]]) for case in CASES["packed"]]
    write_json(directory / "packed.json", {"cases": packed})
    rankings = [ranking_case(case, models[case["model"]]) for case in CASES["rankings"]]
    write_json(directory / "rankings.json", {"cases": rankings})
    for name in TRAINED:  # last, as it changes the model
        path = directory / "models" / name / "trajectory.json"
        write_json(path, trajectory(name, models[name]))
    tokenizer = make_tokenizer()
    write_json(directory / "tokens" / "rows.json", tokens_file(tokenizer))
    (directory / "tokens" / "tokenizer.model").write_bytes(tokenizer.model_proto)


if __name__ == "__main__":
    parser = argparse.ArgumentParser("make_vectors", description="Write the conformance kit.")
    parser.add_argument(
        "directory", nargs="?", type=Path, default=DIRECTORY, help="where to (default: vectors/)"
    )
    torch.set_num_threads(1)  # the order of sums depends on their number
    write(parser.parse_args().directory)
