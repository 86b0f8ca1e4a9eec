"""Which processes a run takes, and what it says where that can't be."""

import logging

import pytest
import torch

from backfold.errors import UserError
from backfold.training.distribution import (
    largest,
    launched_processes,
    make_fabric,
    refuse_strategy,
)

VARIABLES = (
    "TORCHELASTIC_RUN_ID", "SLURM_NTASKS", "SLURM_JOB_NAME", "MASTER_ADDR", "NODE_RANK",
)  # fmt: skip
TORCHRUN = {"TORCHELASTIC_RUN_ID": "1", "LOCAL_WORLD_SIZE": "4", "WORLD_SIZE": "12"}
SRUN = {"SLURM_NTASKS": "16", "SLURM_NNODES": "2"}


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    """No launcher around the test."""
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)


def set_all(monkeypatch, variables):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    return variables


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, None),
        (TORCHRUN, (4, 3)),
        (SRUN, (8, 2)),
        ({**SRUN, "SLURM_NTASKS_PER_NODE": "8"}, (8, 2)),
        ({"SLURM_NTASKS": "1"}, (1, 1)),
        ({**SRUN, "SLURM_JOB_NAME": "bash"}, None),  # an interactive shell, not srun
        ({**SRUN, **TORCHRUN}, (4, 3)),
    ],
)
def test_launchers_say_how_many_processes_there_are(monkeypatch, variables, expected):
    assert launched_processes(set_all(monkeypatch, variables)) == expected


def test_one_device_needs_no_processes(tiny):
    fabric = make_fabric(tiny())
    assert (fabric.world_size, fabric.global_rank) == (1, 0)
    assert type(fabric.strategy).__name__ == "SingleDeviceStrategy"
    assert largest(fabric, 3, -4) == [3, -4]


def test_sharding_on_one_device_is_said_to_be_idle(tiny, caplog):
    with caplog.at_level(logging.WARNING, logger="backfold"):
        make_fabric(tiny())
        assert not caplog.records
        make_fabric(tiny(shard_optimizer=True))
    assert [record.message for record in caplog.records] == [
        "shard_optimizer has no effect on one device"
    ]


def test_several_machines_need_to_know_each_other(tiny, monkeypatch):
    with pytest.raises(UserError, match=r"MASTER_ADDR and NODE_RANK are not set: .* torchrun"):
        make_fabric(tiny(num_nodes=2))
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    with pytest.raises(UserError, match="num_nodes is 2, and NODE_RANK are not set"):
        make_fabric(tiny(num_nodes=2))


def test_devices_that_are_not_the_launcher_s_are_refused_in_one_line(tiny, monkeypatch):
    set_all(monkeypatch, {**TORCHRUN, "RANK": "0", "LOCAL_RANK": "0", "GROUP_RANK": "0"})
    monkeypatch.setattr(torch.distributed, "is_torchelastic_launched", lambda: True)
    with pytest.raises(UserError, match="does not match the world size") as caught:
        make_fabric(tiny(devices=2))
    assert "--devices auto" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_accelerator_that_is_not_there_is_refused(tiny):
    with pytest.raises(UserError, match="can't use accelerator 'abacus'"):
        make_fabric(tiny(accelerator="abacus"))


@pytest.mark.parametrize("count", [0, -1])
def test_a_number_of_machines_is_positive(tiny, count):
    with pytest.raises(UserError, match=f"num_nodes is {count}; give 1 or more"):
        tiny(num_nodes=count)


@pytest.mark.parametrize("name", ["fsdp", "FSDP2", "fsdp_cpu_offload"])
def test_fsdp_is_refused_with_reason_and_remedy(name):
    with pytest.raises(UserError) as caught:
        refuse_strategy(name)
    message = str(caught.value)
    assert f"--strategy {name}" in message
    assert "second derivative" in message
    assert "--shard-optimizer" in message
    assert "\n" not in message


def test_other_strategies_are_not_for_choosing():
    with pytest.raises(UserError, match="always run on DDP"):
        refuse_strategy("ddp")
