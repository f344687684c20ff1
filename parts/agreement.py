"""Facts that the result of a run follows from, and where two runs differ in them.

train.py lists the facts of a run, and parts/run_directory.py keeps them in checkpoints.
"""

ANY = "any"  # the value of a fact that does not count, since another fact says so

# How an error calls what a result follows from; everything else is a flag of its name.
DESCRIPTIONS = {
    "global_batch": "the batch of all processes (--per_device_train_batch_size, "
    "--gradient_accumulation_steps)",
    "total_steps": "the number of steps (--max_steps, --num_train_epochs)",
    "config": "the model's config (--model_name_or_path, --model_type, --n_layer, --n_head, "
    "--n_embd)",
    "padding": "the pad id (--pad_id, --num_padding_at_beginning)",
    "tokenizer": "the tokenizer (--tokenizer_path, --vocab_size)",
    "training_data": "the training data (--data_path, --data_split, --eval_path, --eval_fraction)",
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
