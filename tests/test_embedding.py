from functools import partial
from itertools import product

import pytest
import torch
from torch import nn

from backfold.backbone import create_backbone
from backfold.embedding import Embedder, EmbeddingChoice, embed, embed_batches
from backfold.errors import UserError

VIT_OPTIONS = {"patch_size": 8, "embed_dim": 24, "depth": 3, "num_heads": 2}
SWIN = {"embed_dim": 12, "depths": (1, 1), "num_heads": (1, 2), "window_size": 4}
CAIT = {"embed_dim": 24, "depth": 2, "num_heads": 2}
CONVNEXT = {"depths": (1, 1, 1, 1), "dims": (8, 8, 16, 24)}


def vit(name="vit_tiny_patch16_224", **options):
    return create_backbone(name, (16, 16), options={**VIT_OPTIONS, **options}).eval()


@pytest.fixture
def images():
    return torch.randn(4, 3, 16, 16)


def test_the_last_layer_is_pooled_over_its_positions(images):
    backbone = vit()
    tokens = backbone.forward_features(images)
    assert tokens.shape == (4, 5, 24)
    torch.testing.assert_close(embed(backbone, images), tokens[:, 1:].mean(dim=1))
    highest = embed(backbone, images, EmbeddingChoice(pooling="max"))
    torch.testing.assert_close(highest, tokens[:, 1:].max(dim=1).values)
    class_token = embed(backbone, images, EmbeddingChoice(pooling="class_token"))
    torch.testing.assert_close(class_token, tokens[:, 0])
    half = embed(backbone.bfloat16(), images.bfloat16(), EmbeddingChoice(-2))
    assert half.dtype == torch.float32


@pytest.mark.parametrize(("layer", "block"), [(-2, 1), (-3, 0)])
def test_deeper_layers_of_a_vit_are_the_blocks_outputs(images, layer, block):
    backbone, outputs = vit(), []
    backbone.blocks[block].register_forward_hook(lambda *call: outputs.append(call[-1]))
    average = embed(backbone, images, EmbeddingChoice(layer))
    class_token = embed(backbone, images, EmbeddingChoice(layer, "class_token"))
    torch.testing.assert_close(average, outputs[0][:, 1:].mean(dim=1))
    torch.testing.assert_close(class_token, outputs[0][:, 0])


def test_deeper_layers_of_other_backbones_are_their_stages_outputs():
    stages = {"test_resnet": "layer3", "swin_tiny_patch4_window7_224": "layers.0"}
    for name, stage in stages.items():
        options = SWIN if name.startswith("swin") else {}
        backbone, outputs = create_backbone(name, (64, 64), options=options).eval(), []
        backbone.get_submodule(stage).register_forward_hook(lambda *c, o=outputs: o.append(c[-1]))
        vectors = embed(backbone, torch.randn(2, 3, 64, 64), EmbeddingChoice(-2, "max"))
        axes = (1, 2) if options else (2, 3)  # Swin's channels come last
        torch.testing.assert_close(vectors, outputs[0].amax(dim=axes))


def test_what_is_not_there_is_refused(images):
    registers_only = vit(class_token=False, reg_tokens=2, global_pool="avg")
    assert registers_only.num_prefix_tokens == 2
    cait = create_backbone("cait_xxs24_224", (16, 16), options=CAIT)
    no_grid = nn.Sequential(nn.Conv2d(3, 5, 8, 8), nn.Flatten(2), nn.ZeroPad1d((0, 1)))
    for backbone, choice, message in (
        (registers_only, {"pooling": "class_token"}, "no class token"),
        (registers_only, {"layer": -2, "pooling": "class_token"}, "no class token"),
        (registers_only, {"layer": -4}, "can't give layer -4"),
        (registers_only, {"layer": 0}, "layer 0 is not negative"),
        (registers_only, {"pooling": "mean"}, "unknown pooling 'mean'"),
        (cait, {"layer": -2, "pooling": "class_token"}, "no class token in layer -2"),
        (nn.Conv2d(3, 4, 3), {"layer": -2}, "Conv2d can't give layer -2"),
        (no_grid, {"pooling": "grid"}, "5 positions are no grid over 16 x 16"),
    ):
        with pytest.raises(UserError, match=message):
            embed(backbone, images, EmbeddingChoice(**choice))
    assert not [c for c in Embedder(no_grid, images).choices if c.pooling == "grid"]


def test_batches_are_embedded_in_order_and_the_mode_is_left_as_it_was():
    backbone = nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.Dropout(0.5)).train()
    backbone[1].eval()
    images = torch.randn(7, 3, 8, 8)
    embeddings = embed_batches(backbone, images.split(3), device="cpu")
    with pytest.raises(UserError):
        embed_batches(backbone, [images], EmbeddingChoice(-2))
    assert [module.training for module in backbone.modules()] == [True, True, False, True]
    assert not embeddings.is_inference()  # may be trained on
    expected = backbone.eval()(images).mean(dim=(2, 3))
    torch.testing.assert_close(embeddings, expected.detach())
    with pytest.raises(UserError, match="no images to embed"):
        embed_batches(backbone, [])


def slow_means(grid, sides):
    """Means over parts of (batch, features, rows, columns), each feature's together."""
    parts = [
        [slice(n * part // sides, -(-n * (part + 1) // sides)) for part in range(sides)]
        for n in grid.shape[2:]
    ]
    means = [grid[:, :, down, across].mean(dim=(2, 3)) for down, across in product(*parts)]
    return torch.stack(means, dim=2).flatten(1)


@pytest.mark.parametrize(
    ("height", "width", "features", "sides"),
    [(16, 16, 5, 2), (24, 40, 5, 2), (32, 16, 5, 2), (40, 56, 5, 4), (32, 32, 128, 4),
     (32, 32, 129, 2)],
)  # fmt: skip
def test_grid_pooling_is_the_mean_over_each_part(height, width, features, sides):
    backbone, images = nn.Conv2d(3, features, 8, 8), torch.randn(2, 3, height, width)
    found = embed(backbone, images, EmbeddingChoice(pooling="grid"))
    torch.testing.assert_close(found, slow_means(backbone(images), sides))


EMBEDDERS = {
    "vit": (vit, 16, 3),
    "registers": (partial(vit, class_token=False, reg_tokens=2, global_pool="avg"), 16, 3),
    "convnext": (partial(create_backbone, "convnext_atto", (64, 64), options=CONVNEXT), 64, 4),
    "resnet": (partial(create_backbone, "test_resnet", (32, 32)), 32, 4),
    "cait": (partial(create_backbone, "cait_xxs24_224", (32, 32), options=CAIT), 32, 2),
}


@pytest.mark.parametrize("name", EMBEDDERS)
def test_embedder_gives_every_choice_as_embed_does(name):
    build, size, layers = EMBEDDERS[name]
    backbone, images = build().eval(), torch.randn(3, 3, size, size)
    embedder = Embedder(backbone, images[:2])
    found = embedder(images)
    assert tuple(found) == embedder.choices
    for pooling in ("average", "max"):
        assert {c.layer for c in found if c.pooling == pooling} == set(range(-layers, 0))
    assert any(choice.pooling == "class_token" for choice in found) == (name == "vit")
    for choice, vectors in found.items():
        assert vectors.dtype == torch.float32
        torch.testing.assert_close(vectors, embed(backbone, images, choice), rtol=1e-4, atol=1e-5)
