"""Sparse runs: held against dense ones in which attention is barred from the other tokens."""

from functools import partial

import pytest
import timm
import torch
from timm.models.vision_transformer import Block

from backfold.energy import EnergyModel
from backfold.errors import UserError
from backfold.pretext import Masking
from backfold.pretext.corruption import RunningSquares
from backfold.restoration import energy_gradient, restoration_loss
from backfold.sparse import check_sparse, running_tokens, sparse_feature_map

TINY = {"patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 2}
WHOLE = (16, 24)
BACKBONES = {
    "class token": ("vit_tiny_patch16_224", {}),
    "no class token": ("vit_tiny_patch16_224", {"class_token": False, "global_pool": "avg"}),
    "oblong patches": ("vit_tiny_patch16_224", {"patch_size": (2, 4)}),
    "norm before blocks": ("vit_base_patch32_clip_224", {}),
    "distilled DeiT": ("deit_tiny_distilled_patch16_224", {}),
    "DINOv2, registers": ("vit_small_patch14_reg4_dinov2", {}),
    "parallel blocks": ("vit_small_patch16_18x2_224", {}),
    "EVA-02": ("eva02_tiny_patch14_224", {}),
    "axial rotary, any size": ("vit_small_patch16_rope_224", {"dynamic_img_size": True}),
    "axial rotary and absolute": ("vit_small_patch16_rope_ape_224", {}),
    "mixed rotary": ("vit_small_patch16_rope_mixed_224", {}),
    "DINOv3": ("vit_small_patch16_dinov3", {}),
    "perception encoder": ("vit_pe_core_small_patch16_384", {}),
}


def make_energy(backbone):
    """A small energy in float64, no parameter of which is zero or negligible."""
    name, options = BACKBONES[backbone]
    energy = EnergyModel(name, image_size=WHOLE, backbone_options=TINY | options).double().eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in energy.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator).double())
    return energy


def draw(energy):
    """Images, and tokens to run that differ from image to image."""
    generator = torch.Generator().manual_seed(2)
    clean = torch.randn(3, 3, *WHOLE, generator=generator).double()
    corruption = Masking(0.6, 4, "noise", hidden_share=0.4)(clean, generator)
    tokens = running_tokens(corruption.running, energy.backbone, WHOLE).tokens
    assert len({tuple(row) for row in tokens.tolist()}) == 3
    return clean, corruption, tokens


def dense_energy(energy, tokens):
    """The whole model on all tokens, which see only the prefix and the running ones."""

    def energies(images):
        backbone = energy.backbone
        prefix = backbone.num_prefix_tokens
        length = prefix + backbone.patch_embed.num_patches
        barred = torch.full((len(images), 1, length, length), -torch.inf).to(images)
        for image, row in enumerate(tokens.tolist()):
            for token in [*range(prefix), *(prefix + patch for patch in row)]:
                barred[image, :, :, token] = 0
        features = backbone.forward_features(images, attn_mask=barred)[:, prefix:]
        chosen = zip(features, tokens.tolist(), strict=True)
        return torch.stack([(image[row] * energy.head.weight).sum() for image, row in chosen])

    return energies


def energies_and_gradients(energy, energy_fn, clean, corruption):
    """Energies, their gradient, and the training loss's gradient by parameter."""
    energy.zero_grad()
    energies, gradient = energy_gradient(energy_fn, corruption.corrupted, create_graph=True)
    loss = restoration_loss(corruption.corrupted - gradient, clean, corruption.loss_mask)
    loss.backward()
    gradients = {name: parameter.grad for name, parameter in energy.named_parameters()}
    return energies.detach(), gradient.detach(), gradients


@pytest.mark.parametrize("backbone", BACKBONES)
def test_equals_the_dense_model_with_the_other_tokens_removed(backbone):
    energy = make_energy(backbone)
    clean, corruption, tokens = draw(energy)
    sparse = partial(energy, tokens=tokens)
    energies, gradient, gradients = energies_and_gradients(energy, sparse, clean, corruption)
    expected = energies_and_gradients(energy, dense_energy(energy, tokens), clean, corruption)
    torch.testing.assert_close(energies, expected[0], rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(gradient, expected[1], rtol=1e-9, atol=1e-10)
    reached = 0
    for name, other in expected[2].items():
        own = gradients[name]
        assert (own is None) == (other is None), name
        if other is not None:
            assert torch.linalg.norm(own - other) <= 1e-9 * torch.linalg.norm(other) + 1e-12, name
            reached += bool(other.any())
    assert reached > 10
    # The pixels of removed tokens play no part.
    runs, images = running_pixels(corruption.running).expand_as(gradient), corruption.corrupted
    assert not gradient[~runs].any()
    assert (gradient[runs] != 0).double().mean() > 0.99
    hidden = sparse(torch.where(runs, images, 9 * images.flip(3) + 1))
    torch.testing.assert_close(hidden, energies, rtol=1e-10, atol=1e-10)


def running_pixels(running):
    """Which pixels of images of the size WHOLE lie in the squares, (batch, 1, height, width)."""
    mask = torch.zeros(len(running.indices), 1, *WHOLE, dtype=torch.bool)
    size = running.square_size
    for image, squares in enumerate(running.indices.tolist()):
        for square in squares:
            top, left = (size * place for place in divmod(square, WHOLE[1] // size))
            mask[image, 0, top : top + size, left : left + size] = True
    return mask


def vit(patch, image_size):
    options = {"embed_dim": 8, "depth": 1, "num_heads": 1}
    return timm.create_model(
        "vit_tiny_patch16_224", patch_size=patch, img_size=image_size, **options
    )


@pytest.mark.parametrize(("size", "patch"), [(4, (4, 4)), (8, (2, 2)), (8, (1, 4)), (4, (4, 2))])
def test_running_tokens_are_the_patches_inside_the_squares(size, patch):
    generator = torch.Generator().manual_seed(0)
    corruption = Masking(0.5, size, hidden_share=0.5)(torch.zeros(5, 3, *WHOLE), generator)
    tokens = running_tokens(corruption.running, vit(patch, WHOLE), WHOLE).tokens
    assert tokens.dtype == torch.int64
    pixels = running_pixels(corruption.running)[:, 0]
    for mask, row in zip(pixels, tokens.tolist(), strict=True):
        corners = mask[:: patch[0], :: patch[1]].flatten()
        assert sorted(row) == [token for token, runs in enumerate(corners.tolist()) if runs]


@pytest.mark.parametrize(("size", "patch"), [(12, (8, 8)), (8, (4, 16))])
def test_refuses_squares_that_are_no_whole_patches(size, patch):
    running = RunningSquares(torch.zeros(1, 1, dtype=torch.int64), size)
    with pytest.raises(UserError, match=rf"excerpt_patch_size is {size} .* {patch[0]}x{patch[1]} "):
        running_tokens(running, vit(patch, (96, 96)), (96, 96))


class OwnForward(timm.models.VisionTransformer):
    def forward_features(self, x):
        return super().forward_features(x)


class OwnBlock(Block):
    pass


SMALL = {"embed_dim": 32, "depth": 1, "num_heads": 2}
NO_KIN = "neither timm's VisionTransformer nor its Eva"
REFUSED = {
    "convolutions": (lambda: timm.create_model("test_convnext"), NO_KIN),
    "BEiT": (lambda: timm.create_model("beit_base_patch16_224", **SMALL), NO_KIN),
    "relative positions": (lambda: timm.create_model("test_vit_relpos"), NO_KIN),
    "random dropping": (
        lambda: timm.create_model("vit_small_patch16_rope_224", patch_drop_rate=0.5, **SMALL),
        "patch_drop_rate",
    ),
    "random zeros": (
        lambda: timm.create_model("vit_tiny_patch16_224", pos_drop_rate=0.5, **SMALL),
        "pos_drop_rate is not 0",
    ),
    "own forward": (lambda: OwnForward(img_size=32, **SMALL), "changes timm's forward pass"),
    "own blocks": (
        lambda: timm.models.VisionTransformer(img_size=32, block_fn=OwnBlock, **SMALL),
        "blocks are not timm's own",
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_refuses_backbones_it_is_not_exact_for(kind):
    make, shown = REFUSED[kind]
    backbone = make()
    images, tokens = torch.zeros(1, 3, 32, 32), torch.zeros(1, 1, dtype=torch.int64)
    for attempt in (check_sparse, lambda b: sparse_feature_map(b, images, tokens)):
        with pytest.raises(UserError, match=shown) as refusal:
            attempt(backbone)
        assert f" does not work with {type(backbone).__name__}: " in str(refusal.value)
        assert "\n" not in str(refusal.value)
