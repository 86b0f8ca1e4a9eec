"""Which processes a run takes, and what it says where that can't be."""

import logging

import pytest
import torch

from backfold.errors import UserError
from backfold.training.devices import launched_processes, make_fabric

TORCHRUN = {"TORCHELASTIC_RUN_ID": "1", "LOCAL_WORLD_SIZE": "4", "WORLD_SIZE": "12"}
SRUN = {"SLURM_NTASKS": "16", "SLURM_NNODES": "2"}


@pytest.fixture(autouse=True)
def launcher(monkeypatch):
    """There is none around the test; sets the variables of one."""
    for name in (*TORCHRUN, *SRUN, "SLURM_JOB_NAME", "MASTER_ADDR", "NODE_RANK"):
        monkeypatch.delenv(name, raising=False)

    def set_all(**variables):
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        return variables

    return set_all


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
def test_launchers_say_how_many_processes_there_are(launcher, variables, expected):
    assert launched_processes(launcher(**variables)) == expected


def test_one_device_needs_no_processes_and_is_told_that_sharding_is_idle(tiny, caplog):
    with caplog.at_level(logging.WARNING, logger="backfold"):
        fabric = make_fabric(tiny())
        assert (fabric.world_size, fabric.global_rank) == (1, 0)
        assert type(fabric.strategy).__name__ == "SingleDeviceStrategy"
        assert not caplog.records
        make_fabric(tiny(shard_optimizer=True))
    assert [record.message for record in caplog.records] == [
        "shard_optimizer has no effect on one device"
    ]


def test_several_machines_need_to_know_each_other(tiny, launcher):
    with pytest.raises(UserError, match=r"MASTER_ADDR and NODE_RANK are not set: .* torchrun"):
        make_fabric(tiny(num_nodes=2))
    launcher(MASTER_ADDR="127.0.0.1")
    with pytest.raises(UserError, match="num_nodes is 2, and NODE_RANK are not set"):
        make_fabric(tiny(num_nodes=2))


def test_devices_that_are_not_the_launcher_s_are_refused_in_one_line(tiny, launcher, monkeypatch):
    launcher(**TORCHRUN, RANK="0", LOCAL_RANK="0", GROUP_RANK="0")
    monkeypatch.setattr(torch.distributed, "is_torchelastic_launched", lambda: True)
    with pytest.raises(UserError, match="does not match the world size") as caught:
        make_fabric(tiny(devices=2))
    assert "--devices auto" in str(caught.value)
    assert "\n" not in str(caught.value)
