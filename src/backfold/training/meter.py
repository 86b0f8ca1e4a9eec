"""What is measured while training steps run."""

import time
from dataclasses import dataclass

import torch
from torch import Tensor

from backfold.energy import EnergyModel
from backfold.metrics import energy_gap, psnr_db
from backfold.pretext import Corruption

GAP_IMAGES = 64
# Of the time of so many steps or more.
LONG_WAIT, JUDGED_STEPS = 0.2, 20


@dataclass(frozen=True)
class Restored:
    """A part of a batch after its last restoration step; ``tokens`` ran, or all."""

    clean: Tensor
    corruption: Corruption
    restored: Tensor
    tokens: Tensor | None = None

    def _is_corrupted(self) -> Tensor:
        """Which images are restored to clean ones: bool, (batch,).

        What a mixture leaves clean has nothing to gain, and a second head restores something else.
        """
        corrupted = (self.corruption.corrupted != self.clean).flatten(1).any(dim=1)
        second = self.corruption.second
        return corrupted if second is None else corrupted & ~second.chosen

    def psnr_gain_db(self, std: Tensor) -> float:
        """Mean gain over the corrupted images, where the loss counts; NaN if there are none."""
        chosen = self._is_corrupted()
        mask, clean = self.corruption.loss_mask[chosen], self.clean[chosen]
        restored, corrupted = (
            psnr_db(torch.where(mask, images[chosen], clean), clean, std)
            for images in (self.restored.float(), self.corruption.corrupted)
        )
        return float((restored - corrupted).mean())

    @torch.no_grad()
    def energy_gap(self, energy: EnergyModel) -> float:
        """Mean energy of corrupted minus clean images; NaN if none are corrupted."""
        chosen = self._is_corrupted().nonzero().squeeze(1)[:GAP_IMAGES]
        tokens = None if self.tokens is None else self.tokens[chosen]
        clean, corrupted = (  # by the same weights: those of the step were others
            energy(images[chosen], tokens) for images in (self.clean, self.corruption.corrupted)
        )
        return energy_gap(clean, corrupted)


class Meter:
    """Seconds of training, images a second and the share of time spent waiting for data."""

    def __init__(self, seconds_before: float) -> None:
        self._before, self._start = seconds_before, time.monotonic()
        self._paused = 0.0
        self._mark = self._start
        self._read_before = False
        self._reset()
        self._judge_anew()

    def _reset(self) -> None:
        self._since, self._steps, self._images, self._waited = time.monotonic(), 0, 0, 0.0

    def _judge_anew(self) -> None:
        self._judged_steps, self._judged_seconds, self._judged_wait = 0, 0.0, 0.0

    def before_batch(self) -> None:
        """A batch is asked for."""
        self._mark = time.monotonic()

    def before_step(self, images: int) -> None:
        """The batch is there, with this many images over all devices."""
        self._waited += time.monotonic() - self._mark
        self._images += images
        self._steps += 1

    def pause(self) -> None:
        """Something else than training begins."""
        self._mark = time.monotonic()

    def resume(self) -> None:
        """It is over."""
        self._paused += time.monotonic() - self._mark
        self._reset()

    def seconds(self) -> float:
        """Seconds of training, looks at the held-out images left out."""
        return self._before + time.monotonic() - self._start - self._paused

    def read(self) -> tuple[float, float]:
        """(images a second, share of waiting) since the last reading."""
        elapsed = max(time.monotonic() - self._since, 1e-9)
        result = self._images / elapsed, self._waited / elapsed
        if self._read_before:  # in the first reading workers start, and code is compiled
            self._judged_steps += self._steps
            self._judged_seconds += elapsed
            self._judged_wait += self._waited
        self._read_before = True
        self._reset()
        return result

    def long_wait(self) -> float | None:
        """The share of waiting over the last `JUDGED_STEPS` or more, if it is above `LONG_WAIT`.

        To be asked after each reading; None where it is short, or not yet to be judged.
        """
        if self._judged_steps < JUDGED_STEPS:
            return None
        share = self._judged_wait / self._judged_seconds
        self._judge_anew()
        return share if share > LONG_WAIT else None
