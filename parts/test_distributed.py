"""Processes: which rank computes what, sharded weights, and what happens when a process is lost.

Two processes against the curve of one, with whole weights: test_train.py.
"""

import functools
import os
import re
import signal
import subprocess
import sys
import time
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist

import data
import rm
import train
from conftest import (
    HERE,
    LIMIT,
    TINY,
    end,
    events_of,
    forked,
    forked_ok,
    in_float64,
    metrics_of,
    same_bits,
    same_run,
    signal_in_step,
    start,
    wait_for_steps,
    wait_for_stop,
    words,
    write_rows,
)
from model import GPT, GPTConfig
from parts import run_directory
from parts.distributed import (
    Process,
    complaint_about,
    cut_into_micro_batches,
    own_gpu,
    share_of,
    size_of,
    split_over_ranks,
)

# --------------------------------------------------------------------------------------------------
# Shares and micro-batches


@pytest.mark.parametrize("layout", ["packed", "padded"])
@pytest.mark.parametrize("budget", [1, 20, 60, 10**6])
def test_micro_batches_hold_every_comparison_once_within_the_budget(layout, budget):
    """And they are no more than needed: the next comparison would not have fitted in."""
    rng = np.random.default_rng(0)
    groups = []
    for _ in range(30):
        responses = range(rng.integers(2, 5))
        groups.append([[7] * rng.integers(0, 6) + [k] * rng.integers(1, 9) for k in responses])
    sizes = [size_of(group, layout, None) for group in groups]
    batches = cut_into_micro_batches(range(30), sizes, budget)
    assert sorted(i for batch in batches for i in batch) == list(range(30))
    config = GPTConfig(n_layer=1, n_embd=8, n_head=2, vocab_size=9, n_positions=4)
    model = rm.RewardModel(GPT(config), 0)

    def tokens_of(batch):
        comparisons = [data.Tokenized(groups[i]) for i in batch]
        return train.collate(comparisons, model, layout, torch.device("cpu"))[1]

    for batch in batches:
        assert tokens_of(batch) <= budget or len(batch) == 1
    for batch, following in zip(batches, batches[1:]):
        one_more = [*batch, following[0]]
        sizes_differ = len({len(groups[i]) for i in one_more}) > 1
        assert tokens_of(one_more) > budget or (layout == "padded" and sizes_differ)
    if layout == "padded":
        assert all(len({len(groups[i]) for i in batch}) == 1 for batch in batches)


@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_ranks_get_every_comparison_once_and_similar_numbers_of_tokens(layout):
    rng = np.random.default_rng(0)
    groups = [[[1] * 5 + [k] * rng.integers(1, 60) for k in range(2)] for _ in range(64)]
    sizes = [size_of(group, layout, None) for group in groups]
    shares = split_over_ranks(sizes, 4)
    assert sorted(sum(shares, [])) == list(range(64))
    tokens = [sum(sizes[i].rows * sizes[i].length for i in share) for share in shares]
    assert max(tokens) - min(tokens) <= 130  # one comparison's, of some 2,000
    assert [len(share) for share in split_over_ranks(sizes[:3], 4)] == [1, 1, 1, 0]


@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_with_sharded_weights_every_rank_has_as_many_micro_batches(layout):
    """A large comparison on a rank alone, many small ones on the other: each is there once."""
    batch = [data.Tokenized([[1] * 200, [2] * 200])]
    for _ in range(20):
        batch.append(data.Tokenized([[1] * 6, [2] * 5]))
    for is_sharded in (False, True):
        shares = []
        for rank in range(2):
            shares.append(share_of(batch, layout, None, 100, Process(rank, 2), is_sharded))
        computed = [id(c) for share in shares for micro_batch in share for c in micro_batch]
        assert sorted(computed) == sorted(id(comparison) for comparison in batch)
        assert (len({len(share) for share in shares}) == 1) == is_sharded
        assert any([] in share for share in shares) == is_sharded
    assert share_of(batch[:1], layout, None, 100, Process(1, 2), False) == [[]]


def test_tokens_at_once_are_limited_on_a_cpu():
    assert [Process().at_most(tokens) for tokens in (100, 4096, 16384)] == [100, 4096, 4096]
    assert Process(device=torch.device("cuda")).at_most(16384) == 16384


def test_a_batch_smaller_than_the_number_of_ranks(tmp_path):
    """5 comparisons in batches of 4: the second batch has one comparison for two ranks."""
    file = write_rows(tmp_path / "train.jsonl", 5)
    held_out = write_rows(tmp_path / "eval.jsonl", 3, seed=9)
    flags = [*TINY, "--data_path", file, "--eval_path", held_out, "--max_steps 4"]
    forked_ok(tmp_path / "one", *flags, "--per_device_train_batch_size 4")
    forked_ok(tmp_path / "two", *flags, "--per_device_train_batch_size 2", processes=2)
    one, two = events_of(tmp_path / "one"), events_of(tmp_path / "two")
    assert [event["pairs"] for event in two["step"]] == [4, 1, 4, 1]
    same_run(one, two)


def compare_after_steps():
    """Have the optimizer compare the weights of all ranks after each of its steps."""
    make_optimizer = train.make_optimizer

    def watched(model, *arguments):
        process = arguments[-1]
        optimizer = make_optimizer(model, *arguments)
        step = optimizer.step

        def step_and_compare():
            step()
            mine = torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
            others = [torch.empty_like(mine) for _ in range(process.world_size)]
            dist.all_gather(others, mine)
            process.print(f"ranks agree: {all(torch.equal(mine, other) for other in others)}")
            print(f"dropout seed {torch.initial_seed()}", flush=True)

        optimizer.step = step_and_compare
        return optimizer

    train.make_optimizer = watched


def test_parameters_stay_equal_across_ranks(on_files, tmp_path):
    """After every step, to the bit: with accumulation, ragged batches, and each rank's dropout."""
    codes, said = forked(
        tmp_path / "out",
        *[*TINY, *on_files],
        "--max_steps 7 --per_device_train_batch_size 3 --gradient_accumulation_steps 2",
        "--micro_batch_tokens 150 --dropout 0.1",
        processes=2,
        before=compare_after_steps,
    )
    assert codes == [0, 0], said
    assert said[0].count("ranks agree: True") == 7
    assert len(set(re.findall(r"dropout seed \d+", "".join(said)))) == 2


# --------------------------------------------------------------------------------------------------
# Lost processes


@pytest.mark.parametrize("rank", [0, 1])
def test_killed_rank_ends_the_others_with_a_line_and_nothing_is_lost(rank, two, tmp_path):
    output_dir, other = tmp_path / "out", 1 - rank
    killed = functools.partial(signal_in_step, rank, 6, signal.SIGKILL)
    codes, said = forked(output_dir, *two[1], processes=2, before=killed)
    assert codes[rank] == -9 and codes[other] == 1, said
    last = said[other].strip().splitlines()[-1]
    assert last.startswith(f"train.py: error: rank {other} waited in vain for another process")
    assert "--resume" in last
    assert "Traceback" not in said[other]
    forked_ok(output_dir, *two[1], "--resume", processes=2)
    same_bits(output_dir, two[0])


def test_rank_that_does_not_answer_ends_the_others_after_the_time_out(two, tmp_path):
    """Rank 1 is stopped in step 4. In ten seconds two ranks can meet even on a busy machine."""
    stopped = functools.partial(signal_in_step, 1, 4, signal.SIGSTOP)
    flags = [*two[1], "--process_timeout 10"]
    ranks = start(tmp_path / "out", *flags, processes=2, before=stopped)
    wait_for_stop(ranks[1])
    ranks[0].join(LIMIT)
    for process in ranks:
        process.kill()
    codes, said = end(ranks)
    assert codes == [1, -9], said
    assert "waited in vain" in said[0].strip().splitlines()[-1]


def test_signal_to_one_rank_stops_both(two, tmp_path):
    output_dir = tmp_path / "out"
    stopped = functools.partial(signal_in_step, 1, 3, signal.SIGTERM)
    codes, said = forked(output_dir, *two[1], processes=2, before=stopped)
    assert codes == [0, 0]
    assert "stopped after step 3 of 12" in said[0] and "stopped" not in said[1]
    forked_ok(output_dir, *two[1], "--resume", processes=2)
    same_bits(output_dir, two[0])


def test_run_resumes_on_another_number_of_processes(small, tmp_path):
    """On two, then on one, then on two, without dropout: the curve of one process."""
    flags = [*small, "--dropout 0 --save_interval 4"]
    halves = [*flags, "--per_device_train_batch_size 6"]
    output_dir = tmp_path / "out"
    forked_ok(tmp_path / "one", *flags)
    stopped = functools.partial(signal_in_step, 0, 5, signal.SIGTERM)
    forked_ok(output_dir, *halves, processes=2, before=stopped)
    stopped = functools.partial(signal_in_step, 0, 7, signal.SIGTERM)
    said = forked_ok(output_dir, *flags, "--resume", before=stopped)
    assert "resuming after step 5" in said
    assert "step-5 is of 2 processes (cpu), this run has 1 (cpu): dropout draws other" in said
    forked_ok(output_dir, *halves, "--resume --zero_stage 3", processes=2)
    same_run(events_of(tmp_path / "one"), events_of(output_dir))
    codes, said = forked(output_dir, *flags, "--resume", processes=2)
    assert 0 not in codes
    assert "--per_device_train_batch_size" in said[0].strip().splitlines()[-1]


SCRIPT = """
import signal, sys
sys.path.insert(0, {here!r})
import conftest, train
conftest.signal_in_step(1, 6, signal.SIGKILL)
conftest.hold_in_step(10)
train.main()
"""


def test_torchrun_starts_again_after_a_killed_rank_and_passes_signals_on(two, tmp_path):
    """Rank 1 is killed in step 6, and all start again from step 4 by themselves.

    Later torchrun gets SIGTERM, which step 10 waits for; a resumed run then ends as it should.
    """
    script, output_dir = tmp_path / "script.py", tmp_path / "out"
    script.write_text(SCRIPT.format(here=str(HERE)))
    command = [sys.executable, "-m torch.distributed.run --standalone --nproc_per_node=2"]
    command += ["--max-restarts=1", script, *two[1], "--output_dir", output_dir]
    streams = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    torchrun = subprocess.Popen(words(command), **streams)
    wait_for_steps(output_dir, 8, lambda: torchrun.poll() is None)
    torchrun.terminate()
    said, _ = torchrun.communicate(timeout=LIMIT)
    step = metrics_of(output_dir)[-1]["step"]
    assert "rank 0 waited in vain" in said, said
    assert "resuming after step 4" in said, said
    assert f"stopped after step {step} of 12" in said, said
    forked_ok(output_dir, *two[1], "--resume", processes=2)
    same_bits(output_dir, two[0])


# --------------------------------------------------------------------------------------------------
# Preparation


def prepare_slowly(folder, seconds):
    """Have rank 1 prepare its data for so long. Ranks begin together, however busy the machine.

    Seconds count from when rank 0 is ready: a file tells when.
    """
    rank, prepare, wait = os.environ["RANK"], train.prepare, Process.wait_patiently

    def slow(*arguments):
        prepared = prepare(*arguments)
        if rank == "1":
            wait_for(folder / "waiting")
            time.sleep(seconds)
        return prepared

    def watched(process):
        (folder / "waiting").touch()
        wait(process)

    train.prepare, Process.wait_patiently = slow, watched
    (folder / f"begun {rank}").touch()
    wait_for(folder / f"begun {1 - int(rank)}")


def wait_for(file):
    while not file.exists():
        time.sleep(0.01)


def test_preparing_data_is_not_under_the_time_out(two, tmp_path):
    """Two nodes with a cache each: rank 0 finds its tokens; rank 1 makes them, and takes longer
    than processes wait for each other."""
    caches = {"XDG_CACHE_HOME": str(tmp_path / "cold")}
    before = functools.partial(prepare_slowly, tmp_path, 5)
    flags = [*two[1], "--max_steps 2 --process_timeout 4 --eval_iters 1"]
    codes, said = forked(tmp_path / "out", *flags, processes=2, before=before, variables=caches)
    assert codes == [0, 0], said
    assert list((tmp_path / "cold" / "reward-model").iterdir())
    assert "score with it" in said[0]


def save_slowly(seconds):
    """Have rank 0 take so long to hash the files of a checkpoint, and to save the model."""
    if os.environ["RANK"] == "0":
        hashes, save = run_directory.hashes, train.RewardModel.save_pretrained

        def hash_slowly(*arguments):
            time.sleep(seconds)
            return hashes(*arguments)

        def save_model_slowly(*arguments, **how):
            time.sleep(seconds)
            return save(*arguments, **how)

        run_directory.hashes = hash_slowly
        train.RewardModel.save_pretrained = save_model_slowly


def test_saving_is_not_under_the_time_out(two, tmp_path):
    """Large files take rank 0 longer than processes wait for each other."""
    flags = [*two[1], "--max_steps 1 --save_interval 1 --process_timeout 4 --eval_iters 1"]
    before = functools.partial(save_slowly, 5)
    codes, said = forked(tmp_path / "out", *flags, processes=2, before=before)
    assert codes == [0, 0], said
    assert "score with it" in said[0]
    assert (tmp_path / "out" / "checkpoints" / "step-1").exists()


def test_process_lost_while_others_prepare_is_noticed_at_once(small, tmp_path):
    """Long before the time-out, half an hour."""
    before = functools.partial(lost_in_preparation, tmp_path)
    codes, said = forked(tmp_path / "out", *small, processes=2, before=before)
    assert codes == [1, -9], said
    assert "rank 0 waited in vain for another process" in said[0].strip().splitlines()[-1]
    assert not (tmp_path / "out").exists()


def lost_in_preparation(folder):
    prepare_slowly(folder, 0)
    if os.environ["RANK"] == "1":
        prepare = train.prepare

        def lost(*arguments):
            prepare(*arguments)
            os.kill(os.getpid(), signal.SIGKILL)

        train.prepare = lost


@pytest.mark.parametrize(
    "variables, gpus",
    [
        ({"LOCAL_RANK": "2"}, 2),
        ({"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "3"}, 2),
        ({"LOCAL_RANK": "0"}, 0),
    ],
)
def test_more_ranks_than_gpus_are_refused_on_each_of_them(variables, gpus, monkeypatch):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    ranks = gpus + 1
    with pytest.raises(ValueError, match=f"found {ranks} ranks on this machine.* has {gpus} GPUs"):
        own_gpu(gpus)
    assert own_gpu(ranks) == int(variables["LOCAL_RANK"])


# --------------------------------------------------------------------------------------------------
# Sharded weights


def same_model(output_dir, expected, atol=1e-4):
    """Compare saved models: plain tensors that differ little on average, equal config.json."""
    weights = []
    for path in (output_dir, expected):
        weights.append(torch.load(path / "pytorch_model.bin", weights_only=True))
    assert weights[0].keys() == weights[1].keys()
    for name, weight in weights[0].items():
        assert type(weight) is torch.Tensor, name
        assert (weight - weights[1][name]).abs().mean() < atol, name
    assert (output_dir / "config.json").read_bytes() == (expected / "config.json").read_bytes()


@pytest.mark.parametrize(
    "flags",
    [
        "--zero_stage 2",
        "--zero_stage 3 --gradient_checkpointing",
        "--zero_stage 3 --offload --layout padded",
    ],
)
def test_sharded_weights_give_the_curve_and_the_model_of_one_process(flags, stage_0, tmp_path):
    forked_ok(tmp_path / "out", *stage_0[1], flags, processes=2)
    same_run(events_of(stage_0[0]), events_of(tmp_path / "out"))
    same_model(tmp_path / "out", stage_0[0])


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_in_float64_two_processes_give_the_curve_of_one_to_rounding(stage, stage_0, tmp_path):
    whole = "--per_device_train_batch_size 12"
    forked_ok(tmp_path / "one", *stage_0[1], whole, before=in_float64)
    sharded = f"--zero_stage {stage}"
    forked_ok(tmp_path / "two", *stage_0[1], sharded, processes=2, before=in_float64)
    one, two = events_of(tmp_path / "one"), events_of(tmp_path / "two")
    for kind in ("step", "eval"):
        expected = [event["loss"] for event in one[kind]]
        assert [event["loss"] for event in two[kind]] == pytest.approx(expected, abs=1e-12)
    weights = torch.load(tmp_path / "two" / "pytorch_model.bin", weights_only=True)
    assert weights["v_head.weight"].dtype == torch.float64


def test_sharded_run_resumes_to_the_bit_with_dropout(two, tmp_path):
    flags = [*two[1], "--zero_stage 3 --gradient_checkpointing"]
    forked_ok(tmp_path / "whole", *flags, processes=2)
    killed = functools.partial(signal_in_step, 0, 6, signal.SIGKILL)
    codes, said = forked(tmp_path / "out", *flags, processes=2, before=killed)
    assert codes == [-9, 1] and "waited in vain" in said[1]
    forked_ok(tmp_path / "out", *flags, "--resume", processes=2)
    same_bits(tmp_path / "out", tmp_path / "whole")


@pytest.mark.parametrize("only", ["", "--only_optimize_lora"])
def test_lora_saves_a_plain_model_sharded_or_not(only, stage_0, tmp_path):
    """And a run with LoRA resumes: on one process, then on two at stage 3."""
    lora = [*stage_0[1], "--lora_dim 3 --lora_learning_rate 1e-2", only]
    whole = "--per_device_train_batch_size 12"
    forked_ok(tmp_path / "one", *lora, whole)
    stopped = functools.partial(signal_in_step, 0, 5, signal.SIGTERM)
    forked_ok(tmp_path / "two", *lora, whole, before=stopped)
    forked_ok(tmp_path / "two", *lora, "--zero_stage 3 --resume", processes=2)
    one, two = events_of(tmp_path / "one"), events_of(tmp_path / "two")
    same_run(one, two)
    same_model(tmp_path / "two", tmp_path / "one")
    assert one["eval"][-1]["loss"] != events_of(stage_0[0])["eval"][-1]["loss"]
    saved = rm.RewardModel.from_pretrained(tmp_path / "two")
    assert not any("lora" in name for name, _ in saved.named_parameters())


@pytest.mark.parametrize("offload, place", [(True, "cpu"), (False, "meta")])
def test_the_scale_of_a_loss_lies_where_gradients_do(offload, place):
    """Let the meta device stand in for a GPU, whose scale the CPU must not read."""
    with mock.patch.object(torch.amp.GradScaler, "__init__", scaler_for_any_device):
        scaler = Process(device=torch.device("meta")).gradient_scaler(True, offload)
    loss = scaler.scale(torch.zeros((), device="meta"))
    assert loss.device.type == "meta" and scaler._scale.device.type == place


make_scaler = torch.amp.GradScaler.__init__


def scaler_for_any_device(self, device, enabled):
    """Make a GradScaler of the CPU: PyTorch makes none for the meta device."""
    make_scaler(self, "cpu", enabled=enabled)


def test_a_failed_compilation_is_said_in_a_line():
    """The last error is PyTorch's own: a backend of --compile that raises."""

    def backend(graph, inputs):
        raise RuntimeError("no compiler here")

    torch.compiler.reset()
    with pytest.raises(Exception) as error:
        torch.compile(torch.nn.Linear(2, 2), backend=backend)(torch.ones(2))
    line = complaint_about(error.value, 1.0)
    assert line.startswith("train.py: error: --compile: torch.compile failed (")
    assert "no compiler here" in line and "\n" not in line
