"""Main memory that is kept for reuse, and what to say when memory runs out."""

import ctypes
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from backfold.errors import UserError


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


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, on any device."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    signs = ("DefaultCPUAllocator", "out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in signs)


@contextmanager
def memory_advice(images_at_once: Callable[[], int | None] = lambda: None) -> Iterator[None]:
    """Turn a lack of memory within the block into one line that says what to set.

    Args:
        images_at_once: the micro-batch at that time; None where it makes no difference.

    Raises:
        UserError: memory ran out, on any device.
    """
    try:
        yield
    except Exception as error:
        if not out_of_memory(error):
            raise
        raise UserError(_advice(images_at_once())) from error


def _advice(count: int | None) -> str:
    remedy = (
        "choose a smaller image size or backbone, --derivative finite-difference, or, with "
        "masking, --tasks.masking.hidden-share 0.33"
    )
    if count is None:
        return f"out of memory before the first step; {remedy}"
    if count == 1:
        return f"out of memory with a single image at once; {remedy}"
    return (
        f"out of memory with {count} images at once; set --micro-batch {-(-count // 2)}, or auto "
        f"on a GPU, which keep the batch as it is; or {remedy}"
    )
