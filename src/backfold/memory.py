"""Memory: how much a function's tensors take at most, and how much there is."""

import ctypes
import sys
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import psutil
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def peak_bytes(function: Callable[[], object]) -> int:
    """The most bytes that tensors made during a call take at one time, on all devices together.

    Tensors of before the call do not count, and what kernels use inside themselves is not seen.
    Exact for eager code, forward and backward (equal to PyTorch's profiler); the code that
    `torch.compile` makes allocates unseen.
    """
    live = _LiveBytes()
    with live:
        function()
    return live.peak


class _LiveBytes(TorchDispatchMode):
    """Counts the bytes of the storages that operations make, until they are freed."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.known: set[int] = set()

    def __torch_dispatch__(
        self,
        func: Callable[..., object],
        types: Sequence[type],
        args: tuple[object, ...] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        """Run the operation and count what is new among its results."""
        result = func(*args, **(kwargs or {}))
        given = {tensor.untyped_storage().data_ptr() for tensor in _tensors((args, kwargs))}
        for tensor in _tensors(result):
            storage = tensor.untyped_storage()
            address, size = storage.data_ptr(), storage.nbytes()
            # A view's storage is not new; tensors without data are at address 0.
            if address == 0 or address in given or address in self.known:
                continue
            self.known.add(address)
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._forget, address, size).atexit = False
        return result

    def _forget(self, address: int, size: int) -> None:
        self.known.discard(address)
        self.now -= size


def _tensors(tree: object) -> Iterator[Tensor]:
    return (leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor))


def keep_freed_memory() -> bool:
    """Let this process keep the main memory that it frees, for its next tensors.

    By default the C library gives large blocks back to the system at once, and each new tensor is
    then paid for page by page: measured at 9 % of an eager restoration step on a CPU. Linux with
    the GNU C library only; returns whether it was done.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except AttributeError:  # another C library
        return False
    most_mapped_blocks, trim_threshold = -4, -1  # M_MMAP_MAX and M_TRIM_THRESHOLD of malloc.h
    return bool(mallopt(most_mapped_blocks, 0)) and bool(mallopt(trim_threshold, -1))


def tensor_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the values of tensors."""
    return sum(tensor.numel() * tensor.itemsize for tensor in tensors)


def available_bytes(root: Path = Path("/")) -> int:
    """Bytes of main memory that this process can still take without being killed.

    What the system and, on Linux, the control groups that the process is in (containers) leave.

    Args:
        root: of the file system.
    """
    return min([int(psutil.virtual_memory().available), *_left_in_control_groups(root)])


def _left_in_control_groups(root: Path) -> Iterator[int]:
    """What each control group that this process is in leaves, for those with a limit."""
    membership = root / "proc/self/cgroup"
    if not membership.is_file():
        return
    for line in membership.read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            base, names = root / "sys/fs/cgroup", ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            base, names = (
                root / "sys/fs/cgroup/memory",
                ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
            )
        else:
            continue
        group = base / path.lstrip("/")
        for folder in (group, *group.parents):
            if folder == base.parent:
                break
            yield from _left_in(folder, *names)


def _left_in(folder: Path, limit: str, usage: str, cache: str) -> Iterator[int]:
    try:
        most, used = (folder / limit).read_text().strip(), int((folder / usage).read_text())
        statistics = (folder / "memory.stat").read_text().splitlines()
    except FileNotFoundError:
        return  # the root group has no limit, and a container may not see its own group
    if most != "max":
        # Old file pages count as used, and are given up when memory is short.
        reclaimable = dict(line.split() for line in statistics).get(cache, "0")
        yield int(most) - used + int(reclaimable)
