"""Run TRL's, DeepSpeed-Chat's and OpenRLHF's own loss code on the cases of vectors/loss.json.

    python -m tools.verdicts [--trl [PATH]] [--deepspeed-chat PATH] [--openrlhf PATH] [--write]

PATH is a checkout of the project, or, for DeepSpeed-Chat, of DeepSpeedExamples; `--trl` alone takes
the package that is installed. Their code is imported from there, and a stand-in model hands it the
rewards of a case. Prints a verdict for every case; `--write` writes the tables into
docs/verdicts.md, with the reasons in verdict_reasons.json. Nothing of their code is here, and the
comparison itself is in tools/check_vectors.py.
"""

import argparse
import json
import math
import subprocess
import sys
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Callable
from unittest import mock

import torch
import transformers

from tools.check_vectors import LOSS_FILE, arguments, check, takes

PAGE = Path(__file__).resolve().parent.parent / "docs" / "verdicts.md"
REASONS = Path(__file__).with_name("verdict_reasons.json")
MARKS = "<!-- tables: python -m tools.verdicts --write -->\n", "<!-- end of the tables -->\n"
# Modules that OpenRLHF imports and that its pairwise loss does not use.
UNUSED = (
    "aiohttp deepspeed flash_attn flash_attn.bert_padding flash_attn.utils "
    "flash_attn.utils.distributed peft peft.tuners peft.tuners.lora pylatexenc "
    "pylatexenc.latex2text ray vllm"
).split()


class Given(torch.nn.Module):
    """A backbone of width 1 whose hidden states are the rewards, whatever the ids."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.rewards = None  # (N, L)

    def forward(self, input_ids=None, **_):
        states = self.rewards[..., None]
        return transformers.modeling_outputs.BaseModelOutputWithPast(last_hidden_state=states)


def ones(layer: torch.nn.Linear, dtype: torch.dtype):
    """Make a value head of width 1 hand on what it gets."""
    torch.nn.init.ones_(layer.to(dtype).weight).requires_grad_(False)


def mask_of(input_ids: torch.Tensor, pad_id: int, num_padding_at_beginning: int) -> torch.Tensor:
    """Make the mask of a batch that has none, as their collators do: 1 where a text is."""
    return ((input_ids == pad_id).cumsum(1) <= num_padding_at_beginning).long()


# --------------------------------------------------------------------------------------------------
# The adapters: functions as tools/check_vectors.py calls them


def deepspeed_chat(path: Path):
    """Load RewardModel.forward of step 2."""
    sys.path.insert(0, str(path / "applications" / "DeepSpeed-Chat"))
    from dschat.utils.model.reward_model import RewardModel

    def function(input_ids, rewards, pad_id, num_padding_at_beginning, attention_mask):
        backbone = Given(SimpleNamespace(model_type="llama", hidden_size=1))
        backbone.rewards = rewards
        tokenizer = SimpleNamespace(pad_token_id=pad_id)
        model = RewardModel(backbone, tokenizer, num_padding_at_beginning)
        ones(model.v_head, rewards.dtype)
        return model(input_ids, attention_mask=attention_mask)

    return function


def trl(path: Path | None):
    """Load RewardTrainer.compute_loss, and the head of transformers that it is given."""
    if path is not None:
        sys.path.insert(0, str(path))
    from trl.trainer.reward_trainer import RewardTrainer

    def function(
        input_ids,
        rewards,
        pad_id,
        num_padding_at_beginning,
        attention_mask,
        loss="end",
        margins=None,
        center_rewards_coefficient=None,
    ):
        config = transformers.LlamaConfig(
            vocab_size=8,
            hidden_size=2,
            intermediate_size=2,
            num_hidden_layers=0,
            num_attention_heads=1,
            num_labels=1,
            pad_token_id=pad_id,
        )
        model = transformers.LlamaForSequenceClassification(config)
        model.model, model.score = Given(config), torch.nn.Linear(1, 1, bias=False)
        model.model.rewards = rewards
        ones(model.score, rewards.dtype)
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask}
        if attention_mask is None:
            inputs["attention_mask"] = mask_of(input_ids, pad_id, num_padding_at_beginning)
        if margins is not None:
            inputs["margin"] = margins
        kept = SimpleNamespace(gather=lambda x: x, gather_for_metrics=lambda x: x)
        trainer = SimpleNamespace(
            model=model,
            args=SimpleNamespace(center_rewards_coefficient=center_rewards_coefficient),
            accelerator=kept,
            _metrics={"train": defaultdict(list)},
            _total_train_tokens=0,
            _tp_size=1,
        )
        value, outputs = RewardTrainer.compute_loss(trainer, model, inputs, return_outputs=True)
        chosen, rejected = outputs.logits.squeeze(-1).chunk(2)
        return {"loss": value, "chosen_mean_scores": chosen, "rejected_mean_scores": rejected}

    return function


def openrlhf(path: Path):
    """Load PairWiseLoss, the reward model's forward and the trainer's concatenated_forward."""
    sys.path.insert(0, str(path))
    with mock.patch.dict(sys.modules, {name: mock.MagicMock() for name in UNUSED}):
        from openrlhf.models.loss import PairWiseLoss
        from openrlhf.models.model import _get_reward_model
        from openrlhf.trainer.rm_trainer import RewardModelTrainer

    def function(
        input_ids,
        rewards,
        pad_id,
        num_padding_at_beginning,
        attention_mask,
        loss="end",
        margins=None,
    ):
        config = transformers.LlamaConfig(vocab_size=8, hidden_size=1, num_attention_heads=1)
        config.normalize_reward = False
        make = _get_reward_model(transformers.LlamaPreTrainedModel, Given)
        model = make(config)
        model.model.rewards = rewards
        ones(model.score, rewards.dtype)
        if attention_mask is None:
            attention_mask = mask_of(input_ids, pad_id, num_padding_at_beginning)
        trainer = SimpleNamespace(
            strategy=SimpleNamespace(ring_attn_group=None),
            tokenizer=SimpleNamespace(pad_token_id=pad_id),
        )
        trainer.concatenated_inputs = RewardModelTrainer.concatenated_inputs.__get__(trainer)
        B = len(input_ids) // 2
        rows = input_ids[:B], attention_mask[:B], input_ids[B:], attention_mask[B:]
        chosen, rejected, _ = RewardModelTrainer.concatenated_forward(trainer, model, *rows)
        value = PairWiseLoss()(chosen, rejected, margins)
        return {"loss": value, "chosen_mean_scores": chosen, "rejected_mean_scores": rejected}

    return function


# --------------------------------------------------------------------------------------------------
# Verdicts


@dataclass
class Project:
    name: str
    function: Callable
    code: str  # the version, or the commit
    loss: str  # "divergent" or "end", the objective that it has


def verdicts(project: Project) -> list[dict]:
    """Check a project on the cases of its objective with the options that it takes.

    Rows as those of `check`, and `refused`, whether the case is to be refused.
    """
    rows = []
    for case in json.loads(LOSS_FILE.read_text(encoding="utf-8"))["cases"]:
        options = case["options"]
        broken = case["error"] is not None
        of_its_loss = options.get("loss", "divergent") == project.loss
        if broken:  # a batch has to be refused with any objective
            of_its_loss = options.get("loss") in (None, project.loss)
        if of_its_loss and takes(project.function, options.keys()):
            rows.append(check(project.function, case) | {"refused": broken})
    return rows


def in_bfloat16(project: Project) -> str:
    """Compute a case of its objective from bfloat16 rewards: the error of the loss, or a refusal.

    The rewards are multiples of 1/64 up to 4, which bfloat16 holds: the error is arithmetic alone.
    """
    name = {"divergent": "ragged both ways, one row fills L", "end": "end: ragged both ways"}
    for case in json.loads(LOSS_FILE.read_text(encoding="utf-8"))["cases"]:
        if case["name"] == name[project.loss]:
            given, _ = arguments(case | {"rewards_dtype": "bfloat16"})
            try:
                loss = project.function(*given)["loss"].item()
            except Exception:  # whatever foreign code raises
                return "refused"
            return f"{abs(loss - case['loss']):.1g}"
    raise ValueError(f"{LOSS_FILE}: no case {name[project.loss]!r}")


def seen(row: dict) -> str:
    """Say what a wrong case shows: an exception, or how far the loss is off."""
    if not row["loss"]:
        return row["note"].split(":")[0]
    if math.isnan(float(row["loss"])):
        return "NaN"
    if float(row["loss"]) == 0:
        return "scores alone"
    return f"off by {float(row['loss']):.2g}"


# --------------------------------------------------------------------------------------------------
# The page


# What users ask about most, and words in the names of the cases that answer it
TOPICS = {
    "identical texts": "identical",
    "pad ids inside texts, or at their ends": "pad id",
    "large differences": "large",
    "margins": "margins",
    "centering": "centering",
    "targets": "targets",
}


def tables(projects: list[Project], reasons: dict) -> tuple[str, list[str]]:
    """Write the tables, and list the differences that no reason explains."""
    columns = "project | code | loss | cases | agree | differ | in bfloat16, off by".split(" | ")
    summary, topics = [columns], [["cases about", *(project.name for project in projects)]]
    topics += [[topic] for topic in TOPICS]
    details, unexplained = [], []
    for project in projects:
        rows = verdicts(project)
        numbers = [row for row in rows if not row["refused"]]
        wrong = {row["name"]: row for row in numbers if row["verdict"] == "WRONG"}
        counts = len(numbers), len(numbers) - len(wrong), len(wrong)
        row = [project.name, project.code, project.loss, *counts, in_bfloat16(project)]
        summary.append(row)
        for line, word in zip(topics[1:], TOPICS.values()):
            line.append(agreeing([row for row in numbers if word in row["name"]]))
        lines, explained = differences(wrong, reasons.get(project.name, []))
        unexplained += [f"{project.name}: {name}" for name in wrong if name not in explained]
        details += ["", f"**{project.name}**", "", *lines, refusals(rows)]
    text = [*table(summary), "", *table(topics), *details]
    return "\n".join(text) + "\n", unexplained


def table(rows: list[list]) -> list[str]:
    lines = [f"| {' | '.join(map(str, row))} |" for row in rows]
    return [lines[0], "| --- " * len(rows[0]) + "|", *lines[1:]]


def agreeing(rows: list[dict]) -> str:
    if not rows:
        return "not taken"
    return f"{sum(row['verdict'] == 'ok' for row in rows)} of {len(rows)} agree"


def differences(wrong: dict[str, dict], reasons: list) -> tuple[list[str], set[str]]:
    """Write a line for each reason, with its cases; return them and the names that they explain."""
    if not wrong:
        return ["- It agrees in every case."], set()
    lines, explained = [], set()
    for reason, names in reasons:
        found = [f"{name} ({seen(wrong[name])})" for name in names if name in wrong]
        if found:
            lines.append(f"- It differs in: {'; '.join(found)}. {reason}")
        explained.update(names)
    return lines, explained


def refusals(rows: list[dict]) -> str:
    broken = [row for row in rows if row["refused"]]
    accepted = [row["name"] for row in broken if row["verdict"] == "WRONG"]
    names = "; ".join(name.removeprefix("refused: ") for name in accepted)
    return (
        f"- Of {len(broken)} batches that break a rule it refuses {len(broken) - len(accepted)}. "
        f"It gives a number for: {names}."
    )


def version_of(path: Path | None, package: str) -> str:
    """Name the commit of a checkout, or the version of an installed package."""
    if path is None:
        return f"{package} {sys.modules[package].__version__}"
    git = ["git", "-C", str(path), "rev-parse", "--short=12", "HEAD"]
    commit = subprocess.run(git, capture_output=True, text=True).stdout.strip()
    return commit or "no commit known"


def main():
    parser = argparse.ArgumentParser(
        "verdicts", description="Run other projects' loss code on vectors/loss.json."
    )
    parser.add_argument(
        "--trl", nargs="?", type=Path, const=Path(), help="a checkout; none: installed"
    )
    parser.add_argument("--deepspeed-chat", type=Path, help="a checkout of DeepSpeedExamples")
    parser.add_argument("--openrlhf", type=Path, help="a checkout of OpenRLHF")
    parser.add_argument("--write", action="store_true", help="write the tables of docs/verdicts.md")
    args = parser.parse_args()
    projects = []
    if args.deepspeed_chat:
        function = deepspeed_chat(args.deepspeed_chat)
        code = version_of(args.deepspeed_chat, "dschat")
        projects.append(Project("DeepSpeed-Chat", function, code, "divergent"))
    if args.trl:
        path = None if args.trl == Path() else args.trl
        function = trl(path)
        code = f"{version_of(path, 'trl')}, transformers {transformers.__version__}"
        projects.append(Project("TRL", function, code, "end"))
    if args.openrlhf:
        function = openrlhf(args.openrlhf)
        code = version_of(args.openrlhf, "openrlhf")
        projects.append(Project("OpenRLHF", function, code, "end"))
    if not projects:
        parser.error("nothing to run: give --trl, --deepspeed-chat or --openrlhf")
    if args.write and len(projects) < 3:
        parser.error("--write: found fewer than all three projects; the page needs every one")
    for project in projects:
        print(f"{project.name}, {project.code}, the loss {project.loss!r}")
        for row in verdicts(project):
            print(f"  {row['verdict']:5}  {row['name']}  {row['note']}".rstrip())
    text, unexplained = tables(projects, json.loads(REASONS.read_text(encoding="utf-8")))
    print(text)
    if args.write:
        before, _, rest = PAGE.read_text(encoding="utf-8").partition(MARKS[0])
        after = rest.partition(MARKS[1])[2]
        PAGE.write_text(f"{before}{MARKS[0]}\n{text}\n{MARKS[1]}{after}", encoding="utf-8")
    if unexplained:
        sys.exit("verdicts: no reason is written down for " + "; ".join(unexplained))


if __name__ == "__main__":
    main()
