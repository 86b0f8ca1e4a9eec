"""The conditional energy, held against whole-sequence passes with an attention mask."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from backfold.conditional import check_conditional, hidden, visible
from backfold.errors import UserError
from backfold.restoration import energy_gradient, training_step
from backfold.sparse import embed_tokens, token_size
from test_sparse import BACKBONES, WHOLE, make_energy

PLAIN = [name for name in BACKBONES if name != "parallel blocks"]


def draw(energy, batch_size=2):
    """Images, and their visible and hidden tokens, other ones in each image."""
    generator = torch.Generator().manual_seed(3)
    images = torch.randn(batch_size, 3, *WHOLE, generator=generator, dtype=torch.float64)
    size = token_size(energy.backbone)
    count = (WHOLE[0] // size[0]) * (WHOLE[1] // size[1])
    order = torch.rand(batch_size, count, generator=generator).argsort(dim=1)
    seen = order[:, : count // 3].sort(dim=1).values
    return images, seen, order[:, count // 3 :].sort(dim=1).values


def reference(backbone, images, seen, unseen, num_blocks):
    """One sequence of context and hidden tokens, with all other attention barred."""
    context = visible(backbone, images, seen).tokens
    prefix, (start, _) = backbone.num_prefix_tokens, embed_tokens(backbone, images, unseen)
    features, length = start[:, prefix:], context.shape[1]
    _, rotations = embed_tokens(backbone, images, torch.cat([seen, unseen], dim=1))
    allowed = torch.zeros(length + features.shape[1], length + features.shape[1], dtype=torch.bool)
    allowed[:, :length] = True
    allowed |= torch.eye(len(allowed), dtype=torch.bool)
    first = len(backbone.blocks) - num_blocks
    for block, rope in list(zip(backbone.blocks, rotations, strict=True))[first:]:
        options = {"attn_mask": allowed} | ({} if rope is None else {"rope": rope})
        features = block(torch.cat([context, features], dim=1), **options)[:, length:]
    return backbone.norm(features)


@pytest.mark.parametrize("name", PLAIN)
@pytest.mark.parametrize("num_blocks", [1, 2])
def test_hidden_features_are_those_of_a_masked_whole_sequence(name, num_blocks):
    energy = make_energy(name)
    backbone, (images, seen, unseen) = energy.backbone, draw(energy)
    found = hidden(backbone, images, unseen, visible(backbone, images, seen), num_blocks)
    expected = reference(backbone, images, seen, unseen, num_blocks)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    assert found.std() > 1e-3


def conditional(energy, images, seen, unseen):
    context = visible(energy.backbone, images, seen)
    return lambda given: energy.head(hidden(energy.backbone, given, unseen, context))


@pytest.mark.parametrize("name", ["class token", "EVA-02", "mixed rotary"])
def test_gradients_are_finite_differences_and_stay_in_the_hidden_patches(name):
    energy = make_energy(name)
    images, seen, unseen = draw(energy)
    function = conditional(energy, images, seen, unseen)
    _, gradient = energy_gradient(function, images)
    rows, columns = token_size(energy.backbone)
    inside = torch.zeros(2, WHOLE[0] // rows * (WHOLE[1] // columns), dtype=torch.bool)
    inside = inside.scatter(1, unseen, True).view(2, 1, WHOLE[0] // rows, WHOLE[1] // columns)
    pixels = inside.repeat_interleave(rows, 2).repeat_interleave(columns, 3).expand_as(images)
    assert torch.equal(gradient != 0, pixels)
    direction = torch.randn(images.shape, generator=torch.Generator().manual_seed(4)).double()
    h = 1e-5
    with torch.no_grad():
        slope = (function(images + h * direction) - function(images - h * direction)) / (2 * h)
    torch.testing.assert_close(
        (gradient * direction).sum(dim=(1, 2, 3)), slope, rtol=1e-6, atol=1e-6
    )


@pytest.mark.parametrize("name", ["class token", "EVA-02"])
def test_parameter_gradients_are_finite_differences(name):
    energy = make_energy(name)
    images, seen, unseen = draw(energy)
    generator = torch.Generator().manual_seed(5)
    corrupted = images + torch.randn(images.shape, generator=generator).double()
    mask = torch.ones_like(images[:, :1], dtype=torch.bool)

    def loss():
        function = conditional(energy, images, seen, unseen)
        return training_step(function, corrupted, images, mask, step_size=0.05)[0]

    with sdpa_kernel(SDPBackend.MATH):
        loss().backward()
        reached = {n: p for n, p in energy.named_parameters() if p.grad is not None}
        assert "backbone.blocks.0.attn.proj.weight" in reached  # through the context alone
        directions = {
            n: torch.randn(p.shape, generator=generator).double() for n, p in reached.items()
        }
        expected = sum(float((p.grad * directions[n]).sum()) for n, p in reached.items())
        values, h = [], 1e-6
        for sign in (1, -2):
            with torch.no_grad():
                for key, parameter in reached.items():
                    parameter.add_(directions[key], alpha=sign * h)
            values.append(loss().item())
    assert (values[0] - values[1]) / (2 * h) == pytest.approx(expected, rel=1e-4)


def test_other_backbones_and_depths_are_refused():
    energy = make_energy("class token")
    images, seen, unseen = draw(energy)
    with pytest.raises(UserError, match="hidden_blocks is 3; give 1 to 2"):
        hidden(energy.backbone, images, unseen, visible(energy.backbone, images, seen), 3)
    with pytest.raises(UserError, match="its blocks are not timm's plain ones; take the dense"):
        check_conditional(make_energy("parallel blocks").backbone)
