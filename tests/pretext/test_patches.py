import pytest
import torch

from backfold.pretext.patches import patch_mask_to_pixels, patchify, random_order, unpatchify


@pytest.mark.parametrize("patch_size", [1, 5, 16, 64])
def test_patchify_cuts_row_by_row(photographs, patch_size):
    patches = patchify(photographs, patch_size)
    expected = [
        photographs[:, :, top : top + patch_size, left : left + patch_size]
        for top in range(0, 64 - patch_size + 1, patch_size)
        for left in range(0, 96 - patch_size + 1, patch_size)
    ]
    assert torch.equal(patches, torch.stack(expected, dim=1))


@pytest.mark.parametrize("patch_size", [1, 4, 16, 32])
def test_unpatchify_inverts_patchify(photographs, patch_size):
    restored = unpatchify(patchify(photographs, patch_size), 64 // patch_size)
    assert torch.equal(restored, photographs)


@pytest.mark.parametrize(("height", "width"), [(8, 12), (7, 10), (9, 14)])
def test_patch_mask_to_pixels(height, width):
    mask = torch.rand(3, 2, 3, generator=torch.Generator().manual_seed(0)) < 0.5
    pixels = patch_mask_to_pixels(mask, 4, height, width)
    assert pixels.shape == (3, 1, height, width)
    for y in range(height):
        for x in range(width):
            inside = y < 8 and x < 12
            expected = mask[:, y // 4, x // 4] if inside else torch.zeros(3, dtype=torch.bool)
            assert torch.equal(pixels[:, 0, y, x], expected)


def test_random_order_is_a_uniform_permutation():
    order = random_order(6000, 3, torch.Generator().manual_seed(0))
    kinds, counts = torch.unique(order, dim=0, return_counts=True)
    assert kinds.tolist() == [[0, 1, 2], [0, 2, 1], [1, 0, 2], [1, 2, 0], [2, 0, 1], [2, 1, 0]]
    # 5 standard deviations of a binomial with probability 1/6.
    assert (counts - 1000).abs().max() < 5 * (6000 * 5 / 36) ** 0.5
