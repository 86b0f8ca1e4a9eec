"""How many images at once fit: the search, both ways to ask, and what the user is told."""

import math

import pytest
import torch
from torch import nn

from backfold.energy import EnergyModel
from backfold.errors import UserError
from backfold.memory import peak_bytes, tensor_bytes
from backfold.restoration import training_step
from backfold.training import micro_batch
from backfold.training.micro_batch import (
    find_micro_batch,
    fits_by_measurement,
    fits_by_trial,
    largest_micro_batch,
    measure_peak,
    out_of_memory,
    out_of_memory_message,
    split_sizes,
)

GIB = 2**30


@pytest.mark.parametrize("local_batch", [*range(1, 34), 100, 255, 256, 257, 1000])
def test_parts_are_the_fewest_and_as_equal_as_possible(local_batch):
    for largest in range(1, local_batch + 2):
        sizes = split_sizes(local_batch, largest)
        assert sum(sizes) == local_batch
        assert max(sizes) <= largest
        assert max(sizes) - min(sizes) <= 1
        assert len(sizes) == math.ceil(local_batch / largest)


def reference(local_batch, limit):
    sizes = (math.ceil(local_batch / parts) for parts in range(1, local_batch + 1))
    return next(size for size in sizes if size <= limit)


@pytest.mark.parametrize("local_batch", [1, 2, 3, 7, 16, 31, 64, 100, 257, 1024])
def test_the_search_finds_what_a_linear_one_does_with_few_probes(local_batch):
    for limit in {*range(1, 40), local_batch - 1, local_batch, local_batch // 2, 10**6} - {0}:
        probes = []

        def fits(count, limit=limit, probes=probes):
            probes.append(count)
            return count <= limit

        assert largest_micro_batch(local_batch, fits) == reference(local_batch, limit)
        assert len(probes) == len(set(probes)) <= 2 + 2 * math.log2(local_batch + 1)
        assert probes[0] == local_batch
        if limit >= local_batch:
            assert probes == [local_batch]


def test_not_even_one_image_is_a_users_error():
    with pytest.raises(UserError, match="a single image at once, of a device's batch of 12"):
        largest_micro_batch(12, lambda _: False)


def energy_step():
    """A small ViT's restoration step on so many images; gradients add up."""
    torch.manual_seed(0)
    options = {"patch_size": 4, "embed_dim": 48, "depth": 3, "num_heads": 3}
    model = EnergyModel("vit_tiny_patch16_224", image_size=32, backbone_options=options)

    def attempt(count):
        corrupted, clean = torch.randn(2, count, 3, 32, 32)
        training_step(model, corrupted, clean, torch.ones(1, dtype=torch.bool))[0].backward()

    return model, attempt


def test_the_predicted_peak_is_the_measured_one():
    _, attempt = energy_step()
    peak = measure_peak(64, attempt)
    for count in (8, 16, 24):
        measured = peak_bytes(lambda count=count: attempt(count))
        assert peak.at(count) == pytest.approx(measured, rel=0.05)


def test_no_probe_is_larger_than_the_batch_or_the_room():
    seen = []

    def attempt(count):
        seen.append(count)
        torch.empty(count, 1000)

    assert measure_peak(1, attempt).at(3) == 12_000
    assert max(seen) == 1
    seen.clear()
    assert measure_peak(3, attempt).at(10) == 40_000
    assert max(seen) == 2
    seen.clear()
    measure_peak(64, attempt, room=9000)
    assert max(seen) == 2
    seen.clear()
    measure_peak(64, attempt)
    assert max(seen) == 4


@pytest.fixture
def available(monkeypatch):
    def set_available(amount):
        monkeypatch.setattr(micro_batch, "available_bytes", lambda: amount)

    return set_available


def test_on_a_cpu_the_choice_stays_within_four_fifths_of_the_memory_there_is(available):
    model, attempt = energy_step()
    parameters = list(model.parameters())
    available(200_000_000)
    chosen = find_micro_batch(512, attempt, parameters)
    assert all(parameter.grad is None for parameter in parameters)
    assert 1 < chosen < 512
    larger = min(size for size in {-(-512 // n) for n in range(1, 513)} if size > chosen)
    attempt(1)
    # AdamW keeps two moments, and the gradients are there when the second part's step begins.
    beside = 3 * tensor_bytes(parameters)
    assert peak_bytes(lambda: attempt(chosen)) + beside < 1.05 * 0.8 * 200_000_000
    assert peak_bytes(lambda: attempt(larger)) + beside > 0.95 * 0.8 * 200_000_000

    available(10**15)
    assert find_micro_batch(512, attempt, parameters) == 512
    available(1_000_000)
    with pytest.raises(UserError, match="a single image"):
        find_micro_batch(512, attempt, parameters)


def test_on_a_cpu_frozen_parameters_need_no_room(available):
    model = nn.Linear(1000, 1000, bias=False)
    available(int((3 * 4_000_000 - 1) / 0.8))
    assert not fits_by_measurement(4, lambda _: None, list(model.parameters()))(1)
    model.requires_grad_(False)
    assert fits_by_measurement(4, lambda _: None, list(model.parameters()))(1)


def test_where_one_image_is_refused_by_the_allocator_nothing_fits(available):
    available(10**15)
    model = nn.Linear(2, 2)
    fits = fits_by_measurement(4, lambda _: torch.empty(2**60, dtype=torch.uint8), [model.weight])
    assert not fits(1)


class FakeDevice:
    """A step that runs out of memory above so many images; the second beside gradients sooner."""

    def __init__(self, most, most_beside_gradients):
        self.model = nn.Linear(3, 1)
        self.most, self.most_beside_gradients = most, most_beside_gradients
        self.seen = []

    def __call__(self, count):
        with_gradients = self.model.weight.grad is not None
        self.seen.append((count, with_gradients))
        if count > (self.most_beside_gradients if with_gradients else self.most):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        self.model(torch.ones(count, 3)).sum().backward()


def test_by_trial_a_step_must_run_twice_the_second_time_beside_gradients():
    device = FakeDevice(most=50, most_beside_gradients=20)
    parameters = list(device.model.parameters())
    assert largest_micro_batch(64, fits_by_trial(device, parameters)) == 16
    assert all(parameter.grad is None for parameter in parameters)
    assert (16, True) in device.seen
    # Each trial began without gradients, those after a failure too.
    begun = {count for count, with_gradients in device.seen if not with_gradients}
    assert begun == {count for count, _ in device.seen}


def test_by_trial_there_must_be_room_for_the_optimizers_moments(monkeypatch):
    model = nn.Linear(1000, 1000, bias=False)
    asked = []
    empty = torch.empty

    def spy(*size, **options):
        asked.append((size, options))
        return empty(*size, **options)

    monkeypatch.setattr(torch, "empty", spy)
    assert fits_by_trial(lambda _: None, list(model.parameters()))(1)
    (size, options) = asked[0]
    assert size == (8_000_000,)
    assert options == {"dtype": torch.uint8, "device": model.weight.device}


def test_by_trial_other_errors_pass_through():
    def attempt(_):
        raise RuntimeError("shapes do not match")

    with pytest.raises(RuntimeError, match="shapes do not match"):
        fits_by_trial(attempt, list(nn.Linear(2, 2).parameters()))(1)


def error_of(function):
    try:
        function()
    except Exception as error:
        return error
    raise AssertionError("nothing was raised")


def test_running_out_of_memory_is_told_from_other_errors():
    real = error_of(lambda: torch.empty(2**60, dtype=torch.uint8))
    assert out_of_memory(real), real
    assert out_of_memory(torch.OutOfMemoryError("CUDA out of memory."))
    assert out_of_memory(error_of(lambda: bytearray(2**60)))
    assert out_of_memory(RuntimeError("MPS backend out of memory (MPS allocated: 17 GB)"))
    assert out_of_memory(
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")
    )
    assert not out_of_memory(error_of(lambda: torch.ones(2) @ torch.ones(3)))
    assert not out_of_memory(ValueError("out of memory"))
    assert not out_of_memory(KeyboardInterrupt())


def test_the_message_says_what_was_tried_and_what_to_set():
    message = out_of_memory_message(100, 256)
    assert "\n" not in message
    for part in ("100 images", "256", "--micro-batch auto", "--micro-batch 50", "hidden-share",
                 "finite-difference", "image size", "backbone"):  # fmt: skip
        assert part in message
    assert "--micro-batch 1," in out_of_memory_message(2, 256)
    alone = out_of_memory_message(1, 256)
    assert "a single image" in alone
    assert "--micro-batch" not in alone
    assert "smaller image size" in alone
