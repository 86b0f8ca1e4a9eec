"""Measured memory against what tensors take, and the memory of the training step."""

import psutil
import pytest
import torch

from backfold.energy import EnergyModel
from backfold.first_order import finite_difference_losses
from backfold.memory import available_bytes, peak_bytes, tensor_bytes
from backfold.restoration import restoration_losses, training_step

EVERYWHERE = torch.ones(1, dtype=torch.bool)
KIB = 1024


def floats(kib):
    return torch.empty(kib * KIB // 4)


def test_the_peak_is_the_most_that_lives_at_one_time():
    def work():
        first = floats(8)
        second = floats(4)
        del first
        third = floats(2)
        return second, third

    assert peak_bytes(work) == 12 * KIB
    assert peak_bytes(lambda: [floats(8), floats(8)]) == 16 * KIB
    assert peak_bytes(lambda: [floats(8) is None for _ in range(5)]) == 8 * KIB


def test_views_and_work_in_place_take_nothing_and_neither_do_older_tensors():
    older = floats(64)

    def work():
        older.add_(1)
        return older[3:].view(-1, 1).t()

    assert peak_bytes(work) == 0
    assert peak_bytes(lambda: floats(8)[10:20].fill_(1).expand(7, 10)[0]) == 8 * KIB


def test_what_autograd_keeps_and_makes_is_counted():
    point = torch.ones(KIB, requires_grad=True)

    def work():
        # exp keeps its result, 4 KiB; the square keeps exp's. Both live when their sum is taken.
        loss = point.exp().square().sum()
        loss.backward()

    peak = peak_bytes(work)
    assert point.grad is not None
    # On the way back: exp's result, and one gradient read while the next is written.
    assert 12 * KIB <= peak <= 17 * KIB


def test_tensor_bytes():
    assert tensor_bytes([torch.empty(3, 5), torch.empty(7, dtype=torch.bfloat16)]) == 60 + 14
    assert tensor_bytes([]) == 0


def small_vit():
    options = {"patch_size": 8, "embed_dim": 48, "depth": 3, "num_heads": 3}
    model = EnergyModel("vit_tiny_patch16_224", image_size=32, backbone_options=options)
    return model, torch.randn(2, 8, 3, 32, 32)


def exact_peak(num_steps):
    model, (corrupted, clean) = small_vit()

    def step(images):
        return training_step(model, images, clean, EVERYWHERE)

    def train():
        for loss, _, _ in restoration_losses(step, corrupted, num_steps):
            loss.backward()

    train()  # makes the gradients
    return peak_bytes(train)


def test_memory_does_not_grow_with_the_number_of_steps():
    once = exact_peak(1)
    assert once > 1e6
    assert exact_peak(4) <= 1.05 * once


def test_the_finite_difference_takes_less_memory_and_as_much_as_an_ordinary_step():
    model, (corrupted, clean) = small_vit()

    def finite_difference():
        for part, _, _ in finite_difference_losses(model, corrupted, clean, EVERYWHERE):
            part.backward()

    def ordinary():
        model(corrupted).sum().backward()

    for train in (finite_difference, ordinary):
        train()
    found = peak_bytes(finite_difference)
    assert found < 0.7 * exact_peak(1)
    # It holds the restored images, the displacement and the displaced images besides.
    images = tensor_bytes([corrupted])
    assert found <= peak_bytes(ordinary) + 6 * images


def write(root, path, content):
    file = root / path
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(f"{content}\n")


def test_without_control_groups_the_systems_memory_counts(tmp_path):
    assert available_bytes(tmp_path) == pytest.approx(psutil.virtual_memory().available, rel=0.2)


@pytest.mark.parametrize(
    ("membership", "base", "limit", "usage", "cache"),
    [
        ("0::/pod/job", "sys/fs/cgroup", "memory.max", "memory.current", "inactive_file"),
        (
            "4:memory,hugetlb:/pod/job\n0::/",
            "sys/fs/cgroup/memory",
            "memory.limit_in_bytes",
            "memory.usage_in_bytes",
            "total_inactive_file",
        ),
    ],
)
@pytest.mark.parametrize("folder", ["", "pod", "pod/job"])
def test_the_narrowest_control_group_counts(
    tmp_path, membership, base, limit, usage, cache, folder
):
    write(tmp_path, "proc/self/cgroup", membership)
    write(tmp_path, f"{base}/{folder}/{limit}", 5000)
    write(tmp_path, f"{base}/{folder}/{usage}", 3000)
    write(tmp_path, f"{base}/{folder}/memory.stat", f"anon 1\n{cache} 700")
    assert available_bytes(tmp_path) == 2700
    # A wider one above or a narrower one beside it changes nothing.
    write(tmp_path, f"{base}/other/{limit}", 1)
    write(tmp_path, f"{base}/other/{usage}", 0)
    write(tmp_path, f"{base}/other/memory.stat", "anon 0")
    assert available_bytes(tmp_path) == 2700


def test_a_control_group_without_limit_leaves_what_the_system_has(tmp_path):
    write(tmp_path, "proc/self/cgroup", "0::/job")
    write(tmp_path, "sys/fs/cgroup/job/memory.max", "max")
    write(tmp_path, "sys/fs/cgroup/job/memory.current", 3000)
    write(tmp_path, "sys/fs/cgroup/job/memory.stat", "anon 1")
    assert available_bytes(tmp_path) == pytest.approx(psutil.virtual_memory().available, rel=0.2)
