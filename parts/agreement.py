"""Facts that the result of a run follows from: where two runs differ in them, or two ranks.

train.py lists the facts of a run, and parts/run_directory.py keeps them in checkpoints.
"""

import zlib

import torch

from parts.guards import listed

ANY = "any"  # the value of a fact that does not count, since another fact says so

# Facts by name, as errors describe them; any other fact is the flag of its name.
DESCRIPTIONS = {
    "global_batch": "the batch of all processes (--per_device_train_batch_size, "
    "--gradient_accumulation_steps)",
    "total_steps": "the number of steps (--max_steps, --num_train_epochs)",
    "config": "the model's config (--model_name_or_path, --model_type, --n_layer, --n_head, "
    "--n_embd)",
    "padding": "the pad id (--pad_id, --num_padding_at_beginning)",
    "tokenizer": "the tokenizer (--tokenizer_path, --vocab_size)",
    "training_data": "the training data, or how it is read (--data_path, --data_split, "
    "--eval_path, --eval_fraction, --fields, --ignore_fields, --text_as, --eval_by, "
    "--skip_bad_rows)",
    "eval_data": "the eval data, or how it is read (--eval_path, --eval_fraction, --fields)",
    "weights": "the weights to start from (--model_name_or_path)",
    "device": "the kind of device",
}


def described(name: str) -> str:
    """Name a fact for an error: a description, or the flag."""
    part, _, field = name.partition(".")
    description = DESCRIPTIONS.get(part, f"--{name}")
    if field:
        return f"{field} of {description}"
    return description


def differences(before: dict, now: dict) -> list[str]:
    """List the differences between the facts of two runs, names missing on one side included."""
    found = []
    for name in sorted(before.keys() | now.keys()):
        called = described(name)
        if name not in now:
            found.append(f"{called} is unknown to this version of train.py")
        elif name not in before:
            found.append(f"{called} was not recorded and is {now[name]!r}")
        elif before[name] != now[name] and ANY not in (before[name], now[name]):
            found.append(f"{called} was {before[name]!r} and is {now[name]!r}")
    return found


def differences_of_ranks(ranks: list[dict]) -> list[str]:
    """List the facts that are not the same on all ranks, with each value and its ranks."""
    found = []
    for name in sorted(set().union(*ranks)):
        ranks_of = {}  # a value: the ranks that have it
        for rank, facts in enumerate(ranks):
            value = facts.get(name)
            if value != ANY:
                ranks_of.setdefault(repr(value), []).append(str(rank))
        if len(ranks_of) > 1:
            values = [f"{value} on rank {listed(who)}" for value, who in ranks_of.items()]
            found.append(f"{described(name)} is {' and '.join(values)}")
    return found


def check_ranks(facts: dict, model, evaluation, process):
    """Raise ValueError, on all ranks, that names each fact which is not the same on all of them.

    facts: all that the result and the ranks' communication depend on, but for the eval data and
        the weights of `model`, which are added here.
    The ranks are awaited without --process_timeout: some may have taken long to prepare their data.
    """
    if process.world_size == 1:
        return
    process.wait_patiently()
    facts = facts | {"device": process.device.type}
    if facts["data_path"]:
        facts["eval_data"] = evaluation.fingerprint()
    if facts["model_name_or_path"]:  # fresh weights follow from the seed
        facts["weights"] = checksum(model.state_dict())
    found = differences_of_ranks(process.join([facts])[0])
    if found:
        raise ValueError(
            f"the ranks do not train the same model: {'; '.join(found)}; start all of them with "
            "the same flags and the same data (paths may differ)"
        )


def checksum(tensors: dict[str, torch.Tensor]) -> str:
    """Return a CRC-32 of the bytes of some tensors, in the order of their names."""
    crc = 0
    for _, tensor in sorted(tensors.items()):
        content = tensor.detach().contiguous().flatten()
        crc = zlib.crc32(content.view(torch.uint8).numpy(), crc)
    return f"{crc:08x}"
