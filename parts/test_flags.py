"""The flags of train.py: their names and defaults, what refuses a value, and a missing tools/."""

import re
import shutil
import subprocess
import sys

import pytest
import torch

from conftest import HERE, LIMIT, TINY, complaint, words
from parts.flags import parse_flags, row_reading
from parts.rows import Reading, reading_of

# Every flag of commit c0e6c6a, the last one before the redesign.
FLAGS = """
    --data_path --data_split --eval_path --eval_fraction --max_seq_len --truncation_side
    --tokenizer_path --pad_id --num_padding_at_beginning --skip_bad_rows --data_output_path
    --model_name_or_path --model_type --n_layer --n_head --n_embd --vocab_size --dropout --lora_dim
    --lora_module_name --only_optimize_lora --lora_learning_rate --per_device_train_batch_size
    --per_device_eval_batch_size --gradient_accumulation_steps --loss --center_rewards_coefficient
    --layout --micro_batch_tokens --learning_rate --weight_decay --max_grad_norm
    --lr_scheduler_type --num_warmup_steps --num_train_epochs --max_steps --eval_interval
    --eval_iters --seed --dtype --gradient_checkpointing --zero_stage --offload --process_timeout
    --dry_run --flops --output_dir --normalize_rewards --enable_tensorboard --tensorboard_path
    --save_interval --keep_checkpoints --resume
""".split()
NAMES = ["gpt2", "opt", "llama"], ["divergent", "end"]  # of families and losses, for parse_flags


def parsed(monkeypatch, *arguments):
    """Parse these flags alone."""
    monkeypatch.setattr(sys, "argv", ["train.py", *words(arguments)])
    return parse_flags(*NAMES)


LATER = "--fields --ignore_fields --text_as --eval_by".split()


def test_help_lists_every_flag(monkeypatch, capsys):
    with pytest.raises(SystemExit) as exit:
        parsed(monkeypatch, "--help")
    assert exit.value.code == 0
    listed = re.findall(r"^  (--\w+)", capsys.readouterr().out, re.MULTILINE)
    assert {*FLAGS, *LATER} - set(listed) == set()
    assert len(listed) == len(set(listed))


@pytest.mark.parametrize(
    "flags, expected",
    [
        ("", dict(batch=32, steps=2000, warmup=100, tokens=32 * 1024, rate=1e-3, evaluate=225)),
        (
            "--max_steps 50",
            dict(batch=32, steps=50, warmup=2, tokens=32 * 1024, rate=1e-3, evaluate=225),
        ),
        (
            "--eval_interval 0",
            dict(batch=32, steps=2000, warmup=100, tokens=32 * 1024, rate=1e-3, evaluate=0),
        ),
        (
            "--data_path x",
            dict(batch=16, steps=None, warmup=0, tokens=16 * 1024, rate=1e-3, evaluate=0),
        ),
        (
            "--data_path x --model_name_or_path m --max_seq_len 64",
            dict(batch=16, steps=None, warmup=0, tokens=16 * 128, rate=5e-5, evaluate=0),
        ),
    ],
)
def test_defaults_that_depend_on_other_flags(flags, expected, monkeypatch):
    args = parsed(monkeypatch, flags)
    assert args.per_device_train_batch_size == expected["batch"]
    assert args.max_steps == expected["steps"]
    assert args.num_warmup_steps == expected["warmup"]
    assert args.micro_batch_tokens == expected["tokens"]
    assert args.learning_rate == expected["rate"]
    assert args.eval_interval == expected["evaluate"]


def test_run_on_built_in_data_evaluates_ten_times(monkeypatch):
    args = parsed(monkeypatch)
    evaluated = {0, *range(0, args.max_steps, args.eval_interval), args.max_steps}
    assert len(evaluated) == 10


def test_torchrun_that_starts_again_means_resume(monkeypatch):
    for restarts, expected in ((None, False), ("0", False), ("1", True)):
        if restarts:
            monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", restarts)
        assert parsed(monkeypatch).resume == expected


def test_flags_of_rows(monkeypatch):
    """A flag that is given twice adds to the first; --eval_by is --fields subset=FIELD."""
    reading = row_reading(parsed(monkeypatch, "--data_path x"))
    assert reading.as_flags() == []
    assert reading == Reading()
    flags = "--data_path x --fields prompt=q chosen=a=b --ignore_fields label x"
    flags += " --fields rejected=worse --ignore_fields y --text_as messages --eval_by kind"
    args = parsed(monkeypatch, flags)
    fields = {"prompt": "q", "chosen": "a=b", "rejected": "worse", "subset": "kind"}
    assert row_reading(args) == reading_of(fields, ["label", "x", "y"], "messages")
    again = parsed(monkeypatch, "--data_path x", *row_reading(args).as_flags())
    assert row_reading(again) == row_reading(args)
    for flags in ("--eval_by kind", "--fields subset=kind"):
        args = parsed(monkeypatch, "--data_path x", flags)
        assert row_reading(args) == Reading(fields=(("subset", "kind"),))


@pytest.mark.parametrize(
    "flags, expected",
    [
        ("--learning_rate fast", ["--learning_rate", "'fast'", "above 0"]),
        ("--learning_rate 0", ["--learning_rate", "'0'", "above 0"]),
        ("--learning_rate nan", ["--learning_rate", "'nan'", "above 0"]),
        (
            "--per_device_train_batch_size -1",
            ["--per_device_train_batch_size", "'-1'", "whole number", "from 1"],
        ),
        (
            "--gradient_accumulation_steps 1.5",
            ["--gradient_accumulation_steps", "'1.5'", "whole number"],
        ),
        ("--data_split 2,4", ["--data_split", "'2,4'", "three numbers"]),
        ("--data_split 1,0,1", ["--data_split", "'1,0,1'", "above 0"]),
        ("--eval_fraction 1", ["--eval_fraction", "'1'", "0.9"]),
        ("--seed -1", ["--seed", "'-1'", "from 0"]),
        ("--lr_scheduler_type cosin", ["--lr_scheduler_type", "'cosin'", "cosine"]),
        ("--model_type bert", ["--model_type", "'bert'", "gpt2", "llama"]),
        ("--n_embd 30 --n_head 4", ["--n_head", "4", "--n_embd 30"]),
        ("--model_type llama --n_embd 12 --n_head 4", ["--n_head", "4", "even"]),
        ("--model_type mistral --n_embd 12 --n_head 4", ["--n_head", "4", "even"]),
        ("--model_type qwen2 --n_embd 12 --n_head 4", ["--n_head", "4", "even"]),
        ("--model_type qwen3 --n_embd 12 --n_head 4", ["--n_head", "4", "even"]),
        ("--model_type gpt_neox --n_embd 12 --n_head 4", ["--n_head", "4", "even"]),
        ("--model_type gemma2", ["--model_type", "'gemma2'", "qwen3", "gpt_neox"]),
        ("--vocab_size 100", ["--vocab_size", "'100'", "from 300"]),
        ("--n_layer 2 --model_name_or_path x", ["--n_layer", "--model_name_or_path"]),
        ("--eval_path x.jsonl", ["--eval_path", "--data_path"]),
        ("--data_path x --fields question", ["--fields", "'question'", "OURS=THEIRS"]),
        ("--data_path x --fields =question", ["--fields", "'=question'", "prompt=question"]),
        ("--data_path x --fields prompt=", ["--fields", "'prompt='", "OURS=THEIRS"]),
        ("--data_path x --fields promt=q", ["--fields", "promt=q", "prompt, chosen, rejected"]),
        ("--data_path x --fields prompt=a prompt=b", ["--fields", "prompt twice"]),
        ("--data_path x --fields prompt=a --fields prompt=b", ["--fields", "prompt twice"]),
        ("--data_path x --fields prompt=a system=a", ["--fields", "a twice"]),
        ("--data_path x --fields subset=a --eval_by b", ["--fields", "subset twice"]),
        ("--data_path x --fields prompt=a --ignore_fields a", ["--ignore_fields", "found a"]),
        ("--data_path x --text_as chat", ["--text_as", "'chat'", "messages"]),
        ("--fields prompt=q", ["--fields", "--data_path"]),
        ("--ignore_fields q", ["--ignore_fields", "--data_path"]),
        ("--text_as messages", ["--text_as", "--data_path"]),
        ("--eval_by q", ["--eval_by", "--data_path"]),
        ("--offload", ["--offload", "--zero_stage 0", "2 or 3"]),
        ("--lora_module_name q_proj", ["--lora_module_name", "--lora_dim"]),
        ("--only_optimize_lora", ["--only_optimize_lora", "--lora_dim"]),
        ("--model_name_or_path out", ["--output_dir", "'out'", "--model_name_or_path"]),
        ("--max_step 3", ["--max_step"]),  # no abbreviations
        # flags come before files
        ("--model_name_or_path /no/such --dropout 2", ["--dropout", "'2'"]),
    ],
)
def test_bad_flags(flags, expected, monkeypatch, capsys):
    line = complaint(monkeypatch, capsys, flags)
    assert line.startswith("train.py: error:") and all(word in line for word in expected), line


@pytest.mark.parametrize(
    "flag",
    "--data_path --eval_path --tokenizer_path --chat_template --data_output_path --eval_by "
    "--ignore_fields --model_name_or_path --lora_module_name --output_dir --tensorboard_path "
    "--fields".split(),
)
def test_empty_text_is_refused(flag, monkeypatch, capsys):
    """It is what a shell makes of "$NAME" where NAME is not set."""
    monkeypatch.setattr(sys, "argv", ["train.py", "--data_path", "x", flag, ""])
    with pytest.raises(SystemExit) as exit:
        parse_flags(*NAMES)
    line = capsys.readouterr().err.splitlines()[-1]
    assert exit.value.code and line.startswith(f"train.py: error: argument {flag}: found ''"), line


def test_values_that_a_later_flag_replaces_are_named(monkeypatch, capsys):
    args = parsed(monkeypatch, "--data_path a b --eval_path c --data_path d")
    assert (args.data_path, args.eval_path) == (["d"], ["c"])
    assert capsys.readouterr().err == "--data_path: found again, so a b is not read\n"


@pytest.mark.parametrize(
    "tokenizer",
    ["out", "out/tokenizer.model", "out/a/tokenizer.json", "./x/../out", "link", "link/a"],
)
def test_tokenizer_in_the_output_directory_is_refused(tokenizer, monkeypatch, capsys, tmp_path):
    """It would be moved to earlier-1, as a file of an earlier run."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x").mkdir()
    (tmp_path / "link").symlink_to("out")
    line = complaint(monkeypatch, capsys, "--tokenizer_path", tokenizer)
    assert line.startswith("train.py: error: argument --output_dir: found 'out', which is or holds")
    assert f"--tokenizer_path {tokenizer!r}" in line and "another directory" in line


@pytest.mark.parametrize("tokenizer", ["output", ".", "outer/out", "../out"])
def test_tokenizer_beside_the_output_directory_or_around_it_is_not(
    tokenizer, monkeypatch, tmp_path
):
    monkeypatch.chdir(tmp_path)
    assert parsed(monkeypatch, "--tokenizer_path", tokenizer).tokenizer_path == tokenizer


def test_without_tools_training_works_and_other_programs_name_what_is_missing(tmp_path):
    """A copy of the four modules and parts/ alone trains; the model loads there."""
    for name in ("rm.py", "model.py", "data.py", "train.py"):
        shutil.copy(HERE / name, tmp_path / name)
    not_code = shutil.ignore_patterns("test_*", "__pycache__")
    shutil.copytree(HERE / "parts", tmp_path / "parts", ignore=not_code)

    def run(*arguments):
        command = [sys.executable, *words(arguments)]
        how = dict(cwd=tmp_path, capture_output=True, text=True, timeout=LIMIT)
        return subprocess.run(command, **how)

    done = run("train.py", *TINY, "--max_steps 2 --eval_iters 1 --vocab_size 400 --output_dir out")
    assert done.returncode == 0, done.stderr
    assert "accuracy after training: " in done.stdout
    weights = torch.load(tmp_path / "out" / "pytorch_model.bin", weights_only=True)
    assert all(weight.isfinite().all() for weight in weights.values())
    script = "import data, rm; rm.RewardModel.from_pretrained('out'); data.load_tokenizer('out')"
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, timeout=LIMIT)
    assert done.returncode == 0
    for arguments, name in (  # without `convert`: tools/test_score.py
        ("train.py --dry_run", "dry_run"),
        ("rm.py convert out other --layout hf", "score"),
    ):
        refused = run(arguments)
        assert refused.returncode == 1
        (line,) = refused.stderr.strip().splitlines()
        assert line.startswith(f"{arguments.split()[0]}: error: ")
        assert f"tools/{name}.py" in line and "missing" in line
        if name == "dry_run":
            assert "--dry_run" in line
        assert refused.stdout == ""
