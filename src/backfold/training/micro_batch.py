"""Micro-batches: how many images at once fit into memory, and what to say when they do not."""

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from backfold.errors import UserError
from backfold.memory import available_bytes, peak_bytes, tensor_bytes

# AdamW's two moments, a copy of the trainable parameters each.
MOMENTS = 2
# The CUDA allocator loses some memory to fragments, and libraries take workspaces late.
CUDA_MARGIN = 0.05
# Of a CPU's available memory. Other processes grow, and kernels take scratch memory unseen.
CPU_SHARE = 0.8
PROBED = (1, 2, 4)


def split_sizes(local_batch: int, micro_batch: int) -> list[int]:
    """Sizes of the fewest parts of at most ``micro_batch`` images; they differ by at most one.

    So at most two shapes are ever compiled.
    """
    parts = -(-local_batch // micro_batch)
    size, larger = divmod(local_batch, parts)
    return [size + 1] * larger + [size] * (parts - larger)


def find_micro_batch(
    local_batch: int, attempt: Callable[[int], object], parameters: Sequence[Tensor]
) -> int:
    """The largest micro-batch whose step fits into the memory of the parameters' device.

    A CPU's memory is measured on a few images and extrapolated, since the system kills the process
    that takes too much; other devices are tried. Leaves the parameters without gradients.

    Args:
        local_batch: images of this device in a batch.
        attempt: takes a step, backward included, on so many images; it adds to the gradients.
        parameters: of the model.

    Raises:
        UserError: not even one image fits.
    """
    if parameters[0].device.type == "cpu":
        fits = fits_by_measurement(local_batch, attempt, parameters)
    else:
        fits = fits_by_trial(attempt, parameters)
    return largest_micro_batch(local_batch, fits)


def largest_micro_batch(local_batch: int, fits: Callable[[int], bool]) -> int:
    """The largest of ceil(local_batch / n), n = 1, 2, ..., that fits.

    Sizes are tried from the largest down at growing distances, then by bisection, so that few
    attempts run out of memory and few are made.

    Args:
        local_batch: 1 or more.
        fits: true for every size below one that fits.

    Raises:
        UserError: not even one image fits.
    """
    sizes = sorted({-(-local_batch // parts) for parts in range(1, local_batch + 1)}, reverse=True)
    too_large, candidate = -1, 0
    while not fits(sizes[candidate]):
        if candidate == len(sizes) - 1:
            raise UserError(out_of_memory_message(1, local_batch))
        too_large, candidate = candidate, min(2 * candidate + 1, len(sizes) - 1)
    while candidate - too_large > 1:
        middle = (candidate + too_large) // 2
        if fits(sizes[middle]):
            candidate = middle
        else:
            too_large = middle
    return sizes[candidate]


def fits_by_trial(
    attempt: Callable[[int], object], parameters: Sequence[Tensor]
) -> Callable[[int], bool]:
    """Whether two steps run, the second beside gradients, with room for the optimizer's moments.

    Args:
        attempt: as for `find_micro_batch`; runs out of memory with an error.
        parameters: as for `find_micro_batch`.
    """
    device = parameters[0].device
    room = MOMENTS * tensor_bytes(_trainable(parameters)) + _margin(device)

    def fits(count: int) -> bool:
        _clear(parameters)
        result = True
        try:
            taken = torch.empty(room, dtype=torch.uint8, device=device)
            for _ in range(2):
                attempt(count)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            del taken
        except Exception as error:
            if not out_of_memory(error):
                raise
            result = False
        # Only now has the error let go of the frames that hold tensors.
        _clear(parameters)
        return result

    return fits


def _margin(device: torch.device) -> int:
    if device.type != "cuda":
        return 0
    return int(CUDA_MARGIN * torch.cuda.get_device_properties(device).total_memory)


def _clear(parameters: Sequence[Tensor]) -> None:
    for parameter in parameters:
        parameter.grad = None
    gc.collect()
    if parameters[0].device.type == "cuda":
        torch.cuda.empty_cache()


def _trainable(parameters: Sequence[Tensor]) -> list[Tensor]:
    return [parameter for parameter in parameters if parameter.requires_grad]


@dataclass(frozen=True)
class PeakMemory:
    """A step's peak in bytes, as ``fixed + per_image * images``."""

    fixed: float
    per_image: float

    def at(self, count: int) -> float:
        """Bytes with so many images at once."""
        return self.fixed + self.per_image * count


def fits_by_measurement(
    local_batch: int, attempt: Callable[[int], object], parameters: Sequence[Tensor]
) -> Callable[[int], bool]:
    """Whether the peak predicted from a few images stays within `CPU_SHARE` of what is available.

    Args:
        local_batch: as for `find_micro_batch`.
        attempt: as for `find_micro_batch`.
        parameters: as for `find_micro_batch`.
    """
    gradients_and_moments = (1 + MOMENTS) * tensor_bytes(_trainable(parameters))
    room = CPU_SHARE * available_bytes() - gradients_and_moments
    try:
        peak = measure_peak(local_batch, attempt, room)
    except Exception as error:
        if not out_of_memory(error):
            raise
        peak = PeakMemory(fixed=room + 1, per_image=0.0)
    _clear(parameters)
    return lambda count: peak.at(count) <= room


def measure_peak(
    local_batch: int, attempt: Callable[[int], object], room: float = float("inf")
) -> PeakMemory:
    """A step's peak without gradients, from steps on one, two and four images.

    Args:
        local_batch: as for `find_micro_batch`.
        attempt: as for `find_micro_batch`.
        room: bytes; no step is taken that may need more.
    """
    attempt(1)  # makes the gradients
    peaks: list[tuple[int, int]] = []
    for count in PROBED:
        if count > local_batch or (peaks and count / peaks[-1][0] * peaks[-1][1] > room):
            break
        peaks.append((count, peak_bytes(partial(attempt, count))))
    if len(peaks) == 1:
        return PeakMemory(fixed=0.0, per_image=peaks[0][1])
    (fewer, smaller), (more, larger) = peaks[-2:]
    per_image = (larger - smaller) / (more - fewer)
    return PeakMemory(larger - per_image * more, per_image)


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, on any device."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    signs = ("DefaultCPUAllocator", "out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in signs)


def out_of_memory_message(micro_batch: int, local_batch: int) -> str:
    """One line: what did not fit, and what to set.

    Args:
        micro_batch: images at once.
        local_batch: images of this device in a batch.
    """
    smaller = (
        "a smaller image size or backbone, --derivative finite-difference, or, with masking, "
        "--tasks.masking.hidden-share 0.33"
    )
    images = "a single image" if micro_batch == 1 else f"{micro_batch} images"
    tried = f"out of memory with {images} at once, of a device's batch of {local_batch}"
    if micro_batch == 1:
        return f"{tried}; choose {smaller}"
    half = split_sizes(micro_batch, -(-micro_batch // 2))[0]
    return (
        f"{tried}; set --micro-batch auto, or --micro-batch {half}, which keep the batch as it "
        f"is; or choose {smaller}"
    )
