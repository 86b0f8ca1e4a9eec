"""One seed for everything random in a block of code, and the caller's generators left alone."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Seed PyTorch's generators of the CPU and the device within; afterwards put them back."""
    used = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=used):
        torch.default_generator.manual_seed(seed)
        for each in used:
            with torch.cuda.device(each):
                torch.cuda.manual_seed(seed)
        yield
