"""Facts of runs and of ranks: differences are named, with both values."""

import random
import shutil

import pytest
import torch

from conftest import forked, forked_ok, parsed, same_bits
from parts.agreement import ANY, checksum, differences, differences_of_ranks
from parts.flags import OWN_FLAGS, PATHS, common_flags

# --------------------------------------------------------------------------------------------------
# Runs


def test_differences_name_both_values():
    before = {"seed": 1, "global_batch": 12, "config.n_head": 2, "same": 0, "gone": 3}
    now = {"seed": 2, "global_batch": 6, "config.n_head": 4, "same": 0, "new": 4}
    found = differences(before, now)
    assert [line.partition(" (")[0] for line in found] == [
        "n_head of the model's config",
        "the batch of all processes",
        "--gone is unknown to this version of train.py",
        "--new was not recorded and is 4",
        "--seed was 1 and is 2",
    ]
    assert found[0].endswith(" was 2 and is 4") and found[1].endswith(" was 12 and is 6")
    assert differences(now, dict(now)) == []


def test_differences_say_nothing_of_facts_that_do_not_count():
    """Where dropout differs, the layout counts on one side alone; dropout names the difference."""
    before = {"dropout": 0.0, "layout": ANY}
    found = differences(before, {"dropout": 0.1, "layout": "packed"})
    assert found == ["--dropout was 0.0 and is 0.1"]


# --------------------------------------------------------------------------------------------------
# Ranks


def test_differences_of_ranks_name_each_value_and_its_ranks():
    common = {"seed": 1, "config.n_head": 2}
    ranks = [dict(common) for _ in range(12)]
    assert differences_of_ranks(ranks) == []
    ranks[11] |= {"seed": 7, "layout": "padded"}
    ranks[3]["config.n_head"] = 4
    config, layout, seed = differences_of_ranks(ranks)
    assert seed == "--seed is 1 on rank 0, 1, 2, 3, 4, 5, 6, 7 and 3 more and 7 on rank 11"
    assert layout.endswith("and 'padded' on rank 11") and "None on rank 0, 1" in layout
    assert config.startswith("n_head of the model's config (--model_name_or_path")
    assert config.endswith("and 4 on rank 3")


def test_a_fact_that_does_not_count_on_one_rank_differs_from_none():
    ranks = [{"resume": False}, {"resume": ANY}]
    assert differences_of_ranks(ranks) == []
    assert len(differences_of_ranks([*ranks, {"resume": True}])) == 1


def test_every_flag_but_paths_is_common_to_the_ranks(monkeypatch):
    args = parsed(monkeypatch, "--data_path a b --tokenizer_path c")
    flags = common_flags(args)
    assert vars(args).keys() - flags.keys() == set(OWN_FLAGS)
    for name in PATHS:
        assert flags[name] is (getattr(args, name) is not None)
    others = flags.keys() - set(PATHS)
    assert {name: flags[name] for name in others} == {name: vars(args)[name] for name in others}


def test_checksum_is_of_every_bit_in_any_layout():
    generator = torch.Generator().manual_seed(0)
    tensors = {"a": torch.randn(5, 3, generator=generator), "b": torch.zeros(2)}
    found = checksum(tensors)
    assert checksum({"b": tensors["b"], "a": tensors["a"].t().contiguous().t()}) == found
    for name, index in (("a", (4, 2)), ("b", 0)):
        other = {key: tensor.clone() for key, tensor in tensors.items()}
        other[name].view(torch.int32)[index] ^= 1
        assert checksum(other) != found


def shuffled(path, folder):
    """Write the rows of a file in another order."""
    lines = path.read_text().splitlines(keepends=True)
    random.Random(0).shuffle(lines)
    other = folder / path.name
    other.write_text("".join(lines))
    return other


@pytest.mark.parametrize(
    "flags, value, other",
    [
        ("--learning_rate 0.1", "0.001", "0.1"),
        ("--seed 7", "1234", "7"),
        ("--loss end", "'divergent'", "'end'"),
        ("--save_interval 5", "4", "5"),
        ("--eval_interval 5", "6", "5"),
        ("--zero_stage 3", "0", "3"),
        ("--resume", "False", "True"),
    ],
)
def test_other_flags_on_a_rank_are_refused_on_all_ranks(flags, value, other, two, tmp_path):
    codes, said = forked(tmp_path / "out", *two[1], processes=2, last=[flags])
    assert codes == [1, 1], said
    for text in said:
        line = text.strip().splitlines()[-1]
        assert line.startswith("train.py: error: the ranks do not train the same model: "), text
        assert f"{flags.split()[0]} is {value} on rank 0 and {other} on rank 1" in line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("flag", ["--data_path", "--eval_path"])
def test_rows_in_another_order_on_a_rank_are_refused(flag, files, two, tmp_path):
    path = files[flag == "--eval_path"]
    other = [flag, shuffled(path, tmp_path)]
    codes, said = forked(tmp_path / "out", *two[1], processes=2, last=other)
    assert codes == [1, 1], said
    name = {"--data_path": "the training data", "--eval_path": "the eval data"}[flag]
    for text in said:
        line = text.strip().splitlines()[-1]
        assert f"{name}, or how it is read (" in line and flag in line


@pytest.mark.parametrize("name", ["rwtransformer.norm.weight", "v_head.weight"])
def test_other_weights_of_a_model_on_a_rank_are_refused(name, built_in_run, on_files, tmp_path):
    model = shutil.copytree(built_in_run[0], tmp_path / "model")
    other = shutil.copytree(model, tmp_path / "other")
    weights = torch.load(other / "pytorch_model.bin", weights_only=True)
    weights[name][0] += 0.01
    torch.save(weights, other / "pytorch_model.bin")
    flags = [*on_files, "--max_seq_len 64 --max_steps 2 --zero_stage 3"]
    last = ["--model_name_or_path", other]
    given = [*flags, "--model_name_or_path", model]
    codes, said = forked(tmp_path / "out", *given, processes=2, last=last)
    assert codes == [1, 1], said
    for text in said:
        assert "the weights to start from (--model_name_or_path) is " in text
    shutil.copy(model / "pytorch_model.bin", other)
    forked_ok(tmp_path / "out", *given, processes=2, last=last)


def test_paths_and_what_a_rank_does_alone_may_differ(files, two, tmp_path):
    """The data lies elsewhere on the second machine, which has its own cache and less memory."""
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    own = ["--data_path", shutil.copy(files[0], folder / "a.jsonl")]
    own += ["--eval_path", shutil.copy(files[1], folder / "b.jsonl")]
    own += ["--data_output_path", tmp_path / "cache", "--gradient_checkpointing"]
    own += ["--process_timeout 900"]
    forked_ok(tmp_path / "out", *two[1], processes=2, last=own)
    same_bits(tmp_path / "out", two[0])


def test_all_ranks_resume_where_torchrun_has_restarted_one_alone(two, tmp_path):
    """The agent of another node may join a restart without counting it."""
    output_dir = shutil.copytree(two[0], tmp_path / "out")
    shutil.rmtree(output_dir / "checkpoints" / "step-12")
    restarted = {"TORCHELASTIC_RESTART_COUNT": "1"}
    said = forked_ok(output_dir, *two[1], processes=2, variables=restarted)
    assert "resuming after step 8" in said, said
    same_bits(output_dir, two[0])
