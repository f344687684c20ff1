"""tools/verdicts.py: its adapters, on stand-ins for the three projects that are written here."""

import itertools
import json
import subprocess
import sys

import pytest

from conftest import HERE
from tools import verdicts

# As small as can be, and ours: the right loss of the ends, and a token loss without prompts.
FILES = {
    "trl/__init__.py": "__version__ = '0.0'\n",
    "trl/trainer/__init__.py": "",
    "trl/trainer/reward_trainer.py": """
import torch

class RewardTrainer:
    def compute_loss(self, model, inputs, return_outputs=False):
        outputs = model(**inputs)
        chosen, rejected = outputs.logits[:, 0].chunk(2)
        x = chosen - rejected - inputs.get("margin", 0.0)
        loss = torch.nn.functional.softplus(-x).mean()
        center = self.args.center_rewards_coefficient or 0
        loss = loss + center * ((chosen + rejected) ** 2).mean()
        return loss, outputs
""",
    "applications/DeepSpeed-Chat/dschat/__init__.py": "",
    "applications/DeepSpeed-Chat/dschat/utils/__init__.py": "",
    "applications/DeepSpeed-Chat/dschat/utils/model/__init__.py": "",
    "applications/DeepSpeed-Chat/dschat/utils/model/reward_model.py": """
import torch
import rm

class RewardModel(torch.nn.Module):
    def __init__(self, backbone, tokenizer, leading):
        super().__init__()
        self.backbone, self.pad_id, self.leading = backbone, tokenizer.pad_token_id, leading
        self.v_head = torch.nn.Linear(1, 1, bias=False)

    def forward(self, ids, attention_mask=None):
        rewards = self.v_head(self.backbone(ids, attention_mask=attention_mask)[0])[..., 0]
        half = len(ids) // 2
        assert (ids[:half, 0] == ids[half:, 0]).all()
        return rm.pairwise_loss(ids, rewards, self.pad_id, self.leading, attention_mask)
""",
    "openrlhf/__init__.py": "import deepspeed, ray\n",
    "openrlhf/models/__init__.py": "from flash_attn.bert_padding import unpad_input\n",
    "openrlhf/models/loss.py": """
import torch

class PairWiseLoss(torch.nn.Module):
    def forward(self, chosen, rejected, margin=None):
        x = chosen - rejected
        return torch.nn.functional.softplus(-(x if margin is None else x - margin)).mean()
""",
    "openrlhf/models/model.py": """
import torch

def _get_reward_model(base, backbone):
    class Model(base):
        def __init__(self, config):
            super().__init__(config)
            self.model, self.score = backbone(config), torch.nn.Linear(1, 1, bias=False)

        def forward(self, ids, mask):
            ends = ids.shape[1] - 1 - mask.flip(1).argmax(1)
            return self.score(self.model(ids)[0])[torch.arange(len(ids)), ends, 0]

    return Model
""",
    "openrlhf/trainer/__init__.py": "",
    "openrlhf/trainer/rm_trainer.py": """
import torch

class RewardModelTrainer:
    def concatenated_inputs(self, *rows):
        return torch.cat(rows[::2]), torch.cat(rows[1::2])

    def concatenated_forward(self, model, *rows):
        scores = model(*self.concatenated_inputs(*rows))
        return *scores.chunk(2), []
""",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("projects")
    for name, text in FILES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


@pytest.fixture(scope="module")
def done(folder):
    command = [sys.executable, "-m", "tools.verdicts"]
    command += ["--trl", folder, "--deepspeed-chat", folder, "--openrlhf", folder]
    return subprocess.run(command, cwd=HERE, capture_output=True, text=True)


def section(done, name: str) -> dict[str, str]:
    """Return the verdicts of a project by case."""
    assert done.returncode == 0, done.stderr
    of_project = f"\n{done.stdout}".split(f"\n{name}, ")[1].splitlines()[1:]
    found = {}
    for line in itertools.takewhile(lambda line: line.startswith("  "), of_project):
        name = line[len("  WRONG  ") :].split("  ")[0]
        found[name] = line[2:7].strip()
    return found


CASES = {case["name"]: case for case in json.loads(verdicts.LOSS_FILE.read_text())["cases"]}


def wrong(found: dict[str, str]) -> set[str]:
    """Return the cases with numbers that are off."""
    names = {name for name, verdict in found.items() if verdict == "WRONG"}
    return {name for name in names if CASES[name]["error"] is None}


def test_every_adapter_reaches_the_loss(done):
    """Right losses agree; ends by the pad id, and an assertion about column 0, are told apart."""
    assert wrong(section(done, "OpenRLHF")) == set()
    by_pad_id = wrong(section(done, "TRL"))
    assert "end: mask, pad ids at the ends" in by_pad_id
    assert all("pad id" in name or "many pairs" in name for name in by_pad_id)
    chat = wrong(section(done, "DeepSpeed-Chat"))
    assert {"one token", "no shared prefix"} <= chat
    assert "no padding" not in chat and "mask: pad id in a response" not in chat


def test_projects_are_asked_what_their_loss_offers(done):
    trl, chat = section(done, "TRL"), section(done, "DeepSpeed-Chat")
    openrlhf = section(done, "OpenRLHF")
    assert "all three" in trl and "all three" not in openrlhf
    assert "margins: of the ends" in openrlhf and "targets: of the ends" not in openrlhf
    assert "no padding" in chat and "end: one token" not in chat and "no padding" not in trl


def test_difference_without_a_reason_is_named():
    project = verdicts.Project("another", lambda *given: {"loss": given[1].sum()}, "0", "divergent")
    reasons = {"another": [["It adds up.", ["no padding"]]]}
    text, unexplained = verdicts.tables([project], reasons)
    assert "- It differs in: no padding (off by" in text and "). It adds up.\n" in text
    assert "another: one token" in unexplained and "another: no padding" not in unexplained


def test_page_has_every_project_and_reason():
    page = verdicts.PAGE.read_text(encoding="utf-8")
    between = page.split(verdicts.MARKS[0])[1].split(verdicts.MARKS[1])[0]
    for name in ("DeepSpeed-Chat", "TRL", "OpenRLHF"):
        assert f"**{name}**" in between
    reasons = json.loads(verdicts.REASONS.read_text(encoding="utf-8"))
    for of_project in reasons.values():
        for reason, names in of_project:
            assert reason in between
            assert not set(names) - CASES.keys()
            assert all(name in between for name in names)


def test_nothing_to_run_and_too_little_to_write(monkeypatch, capsys):
    monkeypatch.setattr(verdicts, "trl", lambda path: None)
    monkeypatch.setattr(verdicts, "version_of", lambda path, package: "0.0")
    for flags, message in (
        ([], "nothing to run"),
        (["--trl", "there", "--write"], "--write: found fewer than all three"),
    ):
        monkeypatch.setattr(sys, "argv", ["verdicts", *flags])
        with pytest.raises(SystemExit) as exit:
            verdicts.main()
        assert exit.value.code != 0 and message in capsys.readouterr().err


@pytest.mark.parametrize(
    "loss, note, words",
    [
        ("", "AssertionError: x", "AssertionError"),
        ("nan", "loss", "NaN"),
        ("0.0e+00", "scores", "scores alone"),
        ("2.71e-01", "loss", "off by 0.27"),
    ],
)
def test_what_is_seen_of_a_wrong_case(loss, note, words):
    assert verdicts.seen({"loss": loss, "note": note}) == words
