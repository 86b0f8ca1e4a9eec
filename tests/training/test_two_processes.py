"""Two processes, joined by gloo under torchrun, equal one with the whole batch."""

import os
import subprocess
import sys

import pytest
import torch
import two_processes
from lightning.fabric import Fabric
from safetensors.torch import load_file
from two_processes import CASES, MOST_TORN, make_stepper, run_config, take_steps, torn_config

from backfold.data.loading import training_loader
from backfold.training.images import open_images
from backfold.training.run import RunFolder, load_checkpoint
from tiny_run import rows_of

TOLERANCE = 1e-6


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where both processes have left their results."""
    path = tmp_path_factory.mktemp("two")
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    finished = subprocess.run(
        [sys.executable, *command, two_processes.__file__, str(path)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert finished.returncode == 0, finished.stderr[-4000:]
    return path


@pytest.fixture(scope="module")
def ranks(folder):
    found = [torch.load(folder / f"rank-{rank}.pt", weights_only=False) for rank in (0, 1)]
    assert [result["processes"] for result in found] == [(2, 0), (2, 1)]
    assert {result["ddp"] for result in found} == {"DDPStrategy"}
    return found


@pytest.fixture(scope="module")
def alone():
    return Fabric(accelerator="cpu", devices=1)


def assert_same_weights(found, expected, start):
    """Changes since the start differ by at most `TOLERANCE` of their length."""
    assert found.keys() == expected.keys() == start.keys()
    moved = 0
    for name, value in expected.items():
        change = (value - start[name]).norm()
        moved += bool(change > 0)
        assert (found[name] - value).norm() <= TOLERANCE * change, name
    assert moved >= len(expected) - 1  # the last norm's bias is frozen


@pytest.mark.parametrize("name", CASES)
def test_three_steps_equal_those_of_one_process_with_the_whole_batch(ranks, alone, name):
    stepper = make_stepper(name, alone, micro_batch=None)  # cut ones against the uncut batch
    start = {key: value.clone() for key, value in stepper.energy.state_dict().items()}
    expected = take_steps(stepper)
    for result in ranks:
        assert_same_weights(result[name]["weights"], expected["weights"], start)
        assert result[name]["norms"] == pytest.approx(expected["norms"], rel=TOLERANCE)
        assert result[name]["compiled"] == (name == "compiled")
    pairs = zip(ranks[0][name]["losses"], ranks[1][name]["losses"], strict=True)
    assert [sum(pair) / 2 for pair in pairs] == pytest.approx(expected["losses"], rel=TOLERANCE)
    assert ranks[0][name]["losses"] != ranks[1][name]["losses"]


def batches_of(config, steps, rank=0, world_size=1):
    training = open_images(config).training
    return training_loader(
        training, (28, 28), 1, config.augmentation, 8 // world_size, 3, 0, steps, rank, world_size
    )


def test_the_processes_see_disjoint_images_that_are_one_process_s_batch(ranks, folder):
    for step, batch in enumerate(batches_of(run_config(folder), 4)):
        shares = [result["run"]["images"][step] for result in ranks]
        assert [len(share) for share in shares] == [4, 4]
        assert torch.equal(torch.cat(shares), batch.images)
        assert len(set(batch.indices.tolist())) == 8
    assert step == 3


def test_metrics_are_means_over_the_processes(ranks, folder):
    rows = {int(row["step"]): row for row in rows_of(RunFolder(folder / "run"))}
    assert rows.keys() == {1, 4}
    for step, row in rows.items():
        for name in ("loss", "psnr_gain_db", "energy_gap"):
            values = [result["run"]["measured"][name][step - 1] for result in ranks]
            assert values[0] != values[1]
            assert float(row[name]) == pytest.approx(sum(values) / 2, rel=1e-4, abs=1e-6)


def test_only_the_first_process_writes(ranks, folder):
    first, second = (result["run"]["written"] for result in ranks)
    for name in ("metrics.csv", "train.log"):
        assert str(folder / "run" / name) in first
    assert any("last.ckpt" in path for path in first)
    assert second == []


def test_torn_images_of_all_processes_are_told_once_and_counted_together(ranks, folder):
    # The lines on images that each process could not read, those held out left aside.
    first, second = (
        {line for batch in batches_of(torn_config(folder), 9, rank, 2) for line in batch.broken}
        for rank in (0, 1)
    )
    assert first - second
    assert second - first
    log = RunFolder(folder / "torn").log.read_text().splitlines()
    told = [line.partition("skipped: ")[2] for line in log if "skipped: " in line]
    assert len(told) == len(set(told)) == 12
    assert first | second <= set(told)
    held_out = 12 - len(first | second)
    assert all(len(own) + held_out <= MOST_TORN for own in (first, second))
    messages = [result["stopped"] for result in ranks]
    assert messages[0] == messages[1]
    assert messages[0].startswith(f"12 images can't be read, {MOST_TORN} are allowed: ")


def test_a_resumed_run_with_a_sharded_optimizer_ends_as_an_unbroken_one(ranks, folder):
    assert [len(result["resumed run"]["measured"]["loss"]) for result in ranks] == [2, 2]
    whole, broken = RunFolder(folder / "run"), RunFolder(folder / "sharded")
    left, right = load_file(whole.backbone), load_file(broken.backbone)
    for name, value in left.items():
        torch.testing.assert_close(right[name], value, rtol=1e-5, atol=1e-7, msg=name)
    states = [load_checkpoint(run.last_checkpoint)["optimizer"]["state"] for run in (whole, broken)]
    assert states[0].keys() == states[1].keys()
    assert len(states[0]) > 10
