"""Facts of runs: differences are named, with both values."""

from parts.agreement import ANY, differences


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
