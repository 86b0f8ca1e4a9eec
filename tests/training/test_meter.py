from types import SimpleNamespace

import numpy as np
import pytest
import torch
from skimage.metrics import peak_signal_noise_ratio

from backfold.pretext import Corruption
from backfold.training.meter import GAP_IMAGES, Meter, Restored


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still until it is moved."""
    face = SimpleNamespace(now=1000.0)
    fake = SimpleNamespace(monotonic=lambda: face.now)
    monkeypatch.setattr("backfold.training.meter.time", fake)
    return face


def take_step(meter, clock, waiting, working, images=8):
    meter.before_batch()
    clock.now += waiting
    meter.before_step(images)
    clock.now += working


def test_speed_and_share_of_waiting(clock):
    meter = Meter(0.0)
    take_step(meter, clock, waiting=1.0, working=3.0)
    take_step(meter, clock, waiting=0.0, working=4.0)
    assert meter.read() == pytest.approx((16 / 8, 1 / 8))
    assert meter.seconds() == pytest.approx(8.0)


def test_a_reading_starts_anew(clock):
    meter = Meter(0.0)
    take_step(meter, clock, waiting=5.0, working=5.0)
    meter.read()
    take_step(meter, clock, waiting=1.0, working=1.0, images=32)
    assert meter.read() == pytest.approx((16.0, 0.5))


def test_pauses_count_neither_as_training_nor_as_waiting(clock):
    meter = Meter(0.0)
    take_step(meter, clock, waiting=1.0, working=1.0)
    meter.read()
    meter.pause()
    clock.now += 100.0
    meter.resume()
    take_step(meter, clock, waiting=1.0, working=3.0)
    assert meter.read() == pytest.approx((2.0, 0.25))
    assert meter.seconds() == pytest.approx(6.0)


def test_a_resumed_run_goes_on_counting(clock):
    meter = Meter(50.0)
    take_step(meter, clock, waiting=0.5, working=1.5)
    assert meter.seconds() == pytest.approx(52.0)


def test_waiting_is_long_above_a_fifth_of_twenty_steps_behind_the_first_reading(clock):
    def waits_long(meter, waiting, steps):
        for _ in range(steps):
            take_step(meter, clock, waiting, working=1.0)
        meter.read()
        return meter.long_wait()

    meter = Meter(0.0)
    assert waits_long(meter, 9.0, 100) is None  # workers start
    assert waits_long(meter, 1.0, 19) is None
    assert waits_long(meter, 1.0, 1) == pytest.approx(0.5)
    assert waits_long(meter, 0.24, 20) is None
    assert waits_long(meter, 0.26, 20) == pytest.approx(0.26 / 1.26)


@pytest.mark.usefixtures("clock")
def test_no_time_at_all_is_no_division_by_zero():
    assert Meter(0.0).read() == (0.0, 0.0)


def test_psnr_gain_counts_only_where_the_loss_does():
    generator = torch.Generator().manual_seed(0)
    clean, corrupted, restored = torch.randn(3, 4, 2, 6, 6, generator=generator)
    mask = torch.rand(4, 1, 6, 6, generator=generator) < 0.5
    std = torch.tensor([0.2, 0.3])
    last = Restored(clean, Corruption(corrupted, mask), restored)

    def psnr(images, index):
        pixels = np.where(mask[index].numpy(), images[index].numpy(), clean[index].numpy())
        scale = std.numpy()[:, None, None]
        return peak_signal_noise_ratio(clean[index].numpy() * scale, pixels * scale, data_range=1)

    gains = [psnr(restored, index) - psnr(corrupted, index) for index in range(4)]
    assert last.psnr_gain_db(std) == pytest.approx(np.mean(gains), abs=1e-4)


def test_images_that_a_mixture_left_clean_gain_nothing_and_count_nowhere():
    generator = torch.Generator().manual_seed(0)
    clean, corrupted, restored = torch.randn(3, 4, 2, 6, 6, generator=generator)
    corrupted[1] = clean[1]
    std, mask = torch.tensor([0.2, 0.3]), torch.ones(4, 1, 6, 6, dtype=torch.bool)
    others = torch.tensor([0, 2, 3])

    def last(chosen):
        corruption = Corruption(corrupted[chosen], mask[chosen])
        return Restored(clean[chosen], corruption, restored[chosen])

    everything, without = last(slice(None)), last(others)
    assert everything.psnr_gain_db(std) == pytest.approx(without.psnr_gain_db(std))

    def energy(images, _):
        return images.sum(dim=(1, 2, 3))

    expected = (energy(corrupted, None) - energy(clean, None))[others].mean().item()
    assert everything.energy_gap(energy) == pytest.approx(expected, rel=1e-5)


def test_energy_gap_is_of_the_first_images_and_of_one_model():
    """Of the model that is given, whatever the step's was."""
    count = GAP_IMAGES + 10
    clean = torch.arange(float(count))[:, None, None, None]
    corrupted = clean + 3.0
    corrupted[GAP_IMAGES:] = 1e6
    mask = torch.ones(count, 1, 1, 1, dtype=torch.bool)
    last = Restored(clean, Corruption(corrupted, mask), clean)
    assert last.energy_gap(lambda images, _: 2 * images.sum(dim=(1, 2, 3))) == pytest.approx(6.0)
