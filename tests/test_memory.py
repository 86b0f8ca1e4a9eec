"""The memory of the training step, and what is said when there is not enough."""

import pytest
import torch

from backfold.errors import UserError
from backfold.memory import memory_advice, out_of_memory
from backfold.restoration import restoration_losses, training_step
from step_cost.measuring import peak_memory
from tiny_run import tiny_energy

EVERYWHERE = torch.ones(1, dtype=torch.bool)
CPU = torch.device("cpu")


def exact_peak(num_steps, backward_at_once=True):
    model = tiny_energy(32, patch_size=8, embed_dim=48, depth=3, num_heads=3)
    corrupted, clean = torch.randn(2, 8, 3, 32, 32)

    def step(images):
        return training_step(model, images, clean, EVERYWHERE)

    def train():
        losses = []
        for loss, _, _ in restoration_losses(step, corrupted, num_steps):
            if backward_at_once:
                loss.backward()
            else:
                losses.append(loss)

    train()  # makes the gradients
    return peak_memory(train, CPU)


def test_memory_does_not_grow_with_the_number_of_steps():
    once, many = exact_peak(1), exact_peak(4)
    assert once > 1e6
    assert many <= 1.15 * once  # the images of the steps before, until they are let go
    assert exact_peak(8) <= 1.01 * many
    assert exact_peak(4, backward_at_once=False) > 2.5 * once


def test_running_out_of_memory_is_told_from_other_errors():
    for allocate in (lambda: torch.empty(2**60, dtype=torch.uint8), lambda: bytearray(2**60)):
        with pytest.raises((RuntimeError, MemoryError)) as caught:
            allocate()
        assert out_of_memory(caught.value)
    assert out_of_memory(torch.OutOfMemoryError("CUDA out of memory."))
    assert out_of_memory(RuntimeError("MPS backend out of memory (MPS allocated: 17 GB)"))
    assert out_of_memory(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling"))
    assert not out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert not out_of_memory(ValueError("out of memory"))


@pytest.mark.parametrize(("count", "micro_batch"), [(100, 50), (3, 2), (1, None), (None, None)])
def test_the_advice_names_a_smaller_micro_batch_where_there_is_one(count, micro_batch):
    with pytest.raises(UserError, match="out of memory") as caught, memory_advice(lambda: count):
        raise torch.OutOfMemoryError("CUDA out of memory.")
    advice = str(caught.value)
    assert "\n" not in advice
    assert (f"--micro-batch {micro_batch}" in advice) == bool(micro_batch)
    for part in ("smaller image size", "hidden-share"):
        assert part in advice
