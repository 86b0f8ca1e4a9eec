"""The devices and processes of a run: Lightning finds them, DistributedDataParallel joins them."""

import logging
import os
from collections.abc import Mapping, Sequence
from inspect import signature
from typing import TYPE_CHECKING, Any, Literal

import torch
from lightning.fabric import Fabric
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from lightning.fabric.strategies.ddp import DDPStrategy
from torch.optim import AdamW

from backfold.errors import UserError, first_line
from backfold.training.config import PretrainConfig

if TYPE_CHECKING:
    from torch.distributed.optim import ZeroRedundancyOptimizer

LOGGER = logging.getLogger("backfold")


def make_fabric(config: PretrainConfig) -> Fabric:
    """Lightning's devices, precision and processes, all started and joined.

    Under ``torchrun`` and ``srun`` the processes are there, and ``devices`` and ``num_nodes`` left
    at "auto" take their numbers. Otherwise this starts one process for each further device.
    UserError: the devices are not there, or the settings are not those of the launcher.
    """
    launched = launched_processes(os.environ)
    processes, nodes = launched or ("auto", 1)
    devices = processes if config.devices == "auto" else config.devices
    num_nodes = nodes if config.num_nodes == "auto" else config.num_nodes
    missing = [name for name in ("MASTER_ADDR", "NODE_RANK") if name not in os.environ]
    if num_nodes > 1 and missing and not launched:
        raise UserError(
            f"num_nodes is {num_nodes}, and {' and '.join(missing)} are not set: start the run "
            "with torchrun or srun, which name the machines, or set MASTER_ADDR, MASTER_PORT and "
            "NODE_RANK on each of them"
        )
    # Gradients live in the buffers that are reduced: one copy of them less.
    ddp = DDPStrategy(gradient_as_bucket_view=True)
    wanted: dict[str, Any] = {"accelerator": config.accelerator, "devices": devices}
    wanted["num_nodes"] = num_nodes
    try:
        probe = Fabric(**wanted)
        strategy = ddp if isinstance(probe.strategy, DDPStrategy) else "auto"
        precision = choose_precision(config, probe.device)
        fabric = Fabric(**wanted, strategy=strategy, precision=precision)
        fabric.launch()
    except Exception as error:
        raise UserError(
            f"can't use accelerator {config.accelerator!r} with devices {config.devices!r} and "
            f"num_nodes {config.num_nodes!r}: {first_line(error)}; try --accelerator auto "
            "--devices auto --num-nodes auto"
        ) from error
    if config.shard_optimizer and fabric.world_size == 1:
        LOGGER.warning("shard_optimizer has no effect on one device")
    return fabric


def launched_processes(environment: Mapping[str, str]) -> tuple[int, int] | None:
    """(processes on each machine, machines), as torchrun or srun has started them; None without."""
    if TorchElasticEnvironment.detect():
        local = int(environment["LOCAL_WORLD_SIZE"])
        return local, int(environment["WORLD_SIZE"]) // local
    if SLURMEnvironment.detect():
        nodes = int(environment.get("SLURM_NNODES", "1"))
        tasks = environment.get("SLURM_NTASKS_PER_NODE")
        return int(tasks) if tasks else int(environment["SLURM_NTASKS"]) // nodes, nodes
    return None


def choose_precision(
    config: PretrainConfig, device: torch.device
) -> Literal["32-true", "bf16-mixed"]:
    """Lightning's name of the precision: bf16 autocast where the hardware computes in bf16."""
    if config.precision != "auto":
        return config.precision
    if device.type == "cuda":
        has_bf16 = torch.cuda.get_device_capability(device) >= (8, 0)
    else:
        has_bf16 = device.type == "cpu" and bool(cpu_capabilities().get("avx512_bf16"))
    return "bf16-mixed" if has_bf16 else "32-true"


def cpu_capabilities() -> Mapping[str, Any]:
    """What torch knows of this machine's processor: nothing in older versions."""
    return torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}


def has_fast_kernels(config: PretrainConfig, device: torch.device) -> bool:
    """Whether ``fast_kernels`` has an effect."""
    return config.fast_kernels and device.type == "cuda"


def choose_kernels(config: PretrainConfig, device: torch.device) -> None:
    """Set torch's global switches as the run wants them."""
    if has_fast_kernels(config, device):
        torch.set_float32_matmul_precision("high")
        torch.backends.cudnn.benchmark = not config.deterministic
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what cuBLAS asks for
        torch.use_deterministic_algorithms(True, warn_only=True)


def largest(fabric: Fabric, *numbers: int) -> list[int]:
    """Each number's largest value over the processes, which must all ask at the same point."""
    values = torch.tensor(numbers, device=fabric.device)
    if fabric.world_size > 1:
        # Lightning's all_reduce adds a barrier, and its all_gather calls what PyTorch deprecated.
        torch.distributed.all_reduce(values, op=torch.distributed.ReduceOp.MAX)
    result: list[int] = values.tolist()
    return result


def gather_lines(fabric: Fabric, lines: Sequence[str]) -> list[str]:
    """The lines of all processes, which must all ask at the same point; in the order of ranks."""
    if fabric.world_size == 1:
        return list(lines)
    if not largest(fabric, len(lines))[0]:
        return []  # nearly always, and cheaper than sending objects
    parts: list[list[str]] = [[] for _ in range(fabric.world_size)]
    torch.distributed.all_gather_object(parts, list(lines))
    return [line for part in parts for line in part]


def shard_optimizer(optimizer: AdamW) -> "ZeroRedundancyOptimizer":
    """The same new optimizer with its state shared out: each process keeps and applies a part.

    Parameters are whole on every process. Lightning gathers the state in the first process when all
    call ``state_dict`` together. It is the unsharded optimizer's, and either loads it.
    """
    # Importing it takes long, and few need it.
    from torch.distributed.optim import ZeroRedundancyOptimizer

    known = signature(AdamW).parameters
    defaults = {name: value for name, value in optimizer.defaults.items() if name in known}
    groups = [dict(group) for group in optimizer.param_groups]
    return ZeroRedundancyOptimizer(groups, AdamW, **defaults)


def choose_device(accelerator: str) -> torch.device:
    """The device that Lightning would take; UserError for an accelerator that is not there."""
    try:
        return Fabric(accelerator=accelerator, devices=1).device
    except Exception as error:
        reason = first_line(error)
        raise UserError(f"can't use accelerator {accelerator!r}: {reason}; try auto") from error
