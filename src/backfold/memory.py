"""Main memory that is kept for reuse, and what to say when memory runs out."""

import ctypes
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from backfold.errors import UserError


def keep_freed_memory() -> None:
    """Let this process keep the main memory that it frees, for its next tensors.

    By default the C library gives large blocks back to the system at once, and each new tensor is
    then paid for page by page: measured at 9 % of an eager restoration step on a CPU. Linux with
    the GNU C library only.
    """
    if not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        most_mapped_blocks, trim_threshold = -4, -1  # M_MMAP_MAX and M_TRIM_THRESHOLD of malloc.h
        mallopt(most_mapped_blocks, 0)
        mallopt(trim_threshold, -1)


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, on any device."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    signs = ("DefaultCPUAllocator", "out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in signs)


@contextmanager
def memory_advice(images_at_once: Callable[[], int | None] = lambda: None) -> Iterator[None]:
    """Turn a lack of memory within the block into a UserError that says what to set.

    The micro-batch at that time is asked for; it is None where it makes no difference.
    """
    try:
        yield
    except Exception as error:
        if not out_of_memory(error):
            raise
        count, when, remedy = images_at_once(), "before the first step", ""
        if count == 1:
            when = "with a single image at once"
        elif count:
            when = f"with {count} images at once"
            remedy = (
                f"set --micro-batch {-(-count // 2)}, or auto on a GPU, which keep the batch as it "
                "is; or "
            )
        raise UserError(
            f"out of memory {when}; {remedy}choose a smaller image size or backbone, or, with "
            "masking, --tasks.masking.hidden-share 0.33"
        ) from error
