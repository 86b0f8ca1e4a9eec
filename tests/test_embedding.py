import pytest
import timm
import torch
from torch import nn

from backfold.backbone import create_backbone
from backfold.embedding import Embedder, EmbeddingChoice, embed, embed_batches
from backfold.errors import UserError

VIT_OPTIONS = {"patch_size": 8, "embed_dim": 24, "depth": 3, "num_heads": 2}


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def vit(name="vit_tiny_patch16_224", **options):
    return create_backbone(name, (16, 16), options={**VIT_OPTIONS, **options}).eval()


def resnet():
    return create_backbone("resnet10t", (32, 32)).eval()


@pytest.fixture
def images():
    return torch.randn(4, 3, 16, 16)


def test_last_layer_average_of_a_vit_is_the_mean_of_the_normed_patch_tokens(images):
    backbone = vit()
    tokens = backbone.forward_features(images)
    assert tokens.shape == (4, 5, 24)
    torch.testing.assert_close(embed(backbone, images), tokens[:, 1:].mean(dim=1))


def test_last_layer_average_of_a_resnet_is_the_mean_of_its_feature_map():
    backbone, images = resnet(), torch.randn(2, 3, 64, 64)
    feature_map = backbone.forward_features(images)
    assert feature_map.shape == (2, 512, 2, 2)
    torch.testing.assert_close(embed(backbone, images), feature_map.mean(dim=(2, 3)))


def test_max_pooling(images):
    backbone = vit()
    expected = backbone.forward_features(images)[:, 1:].max(dim=1).values
    torch.testing.assert_close(embed(backbone, images, EmbeddingChoice(pooling="max")), expected)


@pytest.mark.parametrize(("layer", "block"), [(-2, 1), (-3, 0)])
def test_deeper_layers_of_a_vit_are_the_blocks_outputs(images, layer, block):
    backbone, outputs = vit(), []
    backbone.blocks[block].register_forward_hook(lambda *call: outputs.append(call[-1]))
    average = embed(backbone, images, EmbeddingChoice(layer))
    class_token = embed(backbone, images, EmbeddingChoice(layer, "class_token"))
    torch.testing.assert_close(average, outputs[0][:, 1:].mean(dim=1))
    torch.testing.assert_close(class_token, outputs[0][:, 0])


def test_deeper_layer_of_a_resnet_is_its_stages_output():
    backbone, outputs = resnet(), []
    backbone.layer3.register_forward_hook(lambda *call: outputs.append(call[-1]))
    embeddings = embed(backbone, torch.randn(2, 3, 64, 64), EmbeddingChoice(-2, "max"))
    torch.testing.assert_close(embeddings, outputs[0].amax(dim=(2, 3)))


def test_deeper_layer_of_a_channels_last_backbone():
    backbone = create_backbone("swin_tiny_patch4_window7_224", (64, 64)).eval()
    outputs = []
    backbone.layers[2].register_forward_hook(lambda *call: outputs.append(call[-1]))
    embeddings = embed(backbone, torch.randn(1, 3, 64, 64), EmbeddingChoice(-2))
    assert outputs[0].shape == (1, 4, 4, 384)
    torch.testing.assert_close(embeddings, outputs[0].mean(dim=(1, 2)))


def test_class_token_of_the_last_layer(images):
    backbone = vit()
    expected = backbone.forward_features(images)[:, 0]
    choice = EmbeddingChoice(pooling="class_token")
    torch.testing.assert_close(embed(backbone, images, choice), expected)


def test_embeddings_are_float32(images):
    embeddings = embed(vit().bfloat16(), images.bfloat16(), EmbeddingChoice(-2))
    assert embeddings.dtype == torch.float32


@pytest.mark.parametrize("layer", [-1, -2])
def test_class_token_is_refused_where_there_is_none(images, layer):
    choice = EmbeddingChoice(layer, "class_token")
    registers_only = vit(class_token=False, reg_tokens=2, global_pool="avg")
    assert registers_only.num_prefix_tokens == 2
    for backbone in (resnet(), registers_only):
        with pytest.raises(UserError, match="no class token"):
            embed(backbone, images, choice)


def test_class_token_is_refused_where_deeper_layers_do_not_give_it():
    backbone = timm.create_model(
        "cait_xxs24_224", img_size=32, embed_dim=24, depth=2, num_heads=2, num_classes=0
    )
    with pytest.raises(UserError, match="class token of layer -2; use layer -1"):
        embed(backbone, torch.zeros(1, 3, 32, 32), EmbeddingChoice(-2, "class_token"))


def test_a_layer_that_does_not_exist(images):
    with pytest.raises(UserError, match="can't give layer -4"):
        embed(vit(), images, EmbeddingChoice(-4))


def test_deeper_layers_of_a_plain_module(images):
    with pytest.raises(UserError, match="Conv2d has no way to give the features of layer -2"):
        embed(nn.Conv2d(3, 4, 3), images, EmbeddingChoice(-2))


def test_bad_choices():
    with pytest.raises(UserError, match="layer 0 is not negative"):
        EmbeddingChoice(layer=0)
    with pytest.raises(UserError, match="unknown pooling 'mean'"):
        EmbeddingChoice(pooling="mean")


def test_batches_are_embedded_in_order_and_the_mode_is_left_as_it_was():
    backbone = nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.Dropout(0.5)).train()
    backbone[1].eval()
    images = torch.randn(7, 3, 8, 8)
    embeddings = embed_batches(backbone, images.split(3), device="cpu")
    assert [module.training for module in backbone.modules()] == [True, True, False, True]
    assert embeddings.dtype == torch.float32
    assert not embeddings.requires_grad
    expected = backbone.eval()(images).mean(dim=(2, 3))
    torch.testing.assert_close(embeddings, expected.detach())


def test_the_mode_comes_back_after_an_error():
    backbone = nn.Conv2d(3, 5, 3).train()
    with pytest.raises(UserError):
        embed_batches(backbone, [torch.zeros(1, 3, 8, 8)], EmbeddingChoice(-2))
    assert backbone.training


def test_embeddings_can_be_trained_on():
    embeddings = embed_batches(nn.Conv2d(3, 2, 3), [torch.randn(4, 3, 8, 8)])
    head = nn.Linear(2, 1)
    head(embeddings).sum().backward()
    assert head.weight.grad is not None


def test_no_batches():
    with pytest.raises(UserError, match="no images to embed"):
        embed_batches(nn.Conv2d(3, 2, 3), [])


def slow_quarters(positions, rows, columns):
    """(batch, features x 4): means over the image's quarters, each feature's four together."""
    grid = positions.reshape(len(positions), rows, columns, -1)
    halves = [(slice(0, -(-n // 2)), slice(n // 2, n)) for n in (rows, columns)]
    means = [
        grid[:, down, across].flatten(1, 2).mean(1) for down in halves[0] for across in halves[1]
    ]
    return torch.stack(means, dim=2).flatten(1)


@pytest.mark.parametrize(("height", "width"), [(16, 16), (24, 40), (32, 16)])
def test_grid_pooling_is_the_mean_over_each_quarter(height, width):
    backbone, rows, columns = nn.Conv2d(3, 5, 8, 8), height // 8, width // 8
    images = torch.randn(2, 3, height, width)
    positions = backbone(images).flatten(2).transpose(1, 2)
    found = embed(backbone, images, EmbeddingChoice(pooling="grid"))
    torch.testing.assert_close(found, slow_quarters(positions, rows, columns))


def test_positions_that_are_no_grid_have_no_quarters():
    backbone = nn.Sequential(nn.Conv2d(3, 5, 8, 8), nn.Flatten(2), nn.ZeroPad1d((0, 1)))
    images = torch.randn(2, 3, 16, 16)
    with pytest.raises(UserError, match="5 positions are no grid over 16 x 16"):
        embed(backbone, images, EmbeddingChoice(pooling="grid"))
    assert not [c for c in Embedder(backbone, images).choices if c.pooling == "grid"]


@pytest.mark.parametrize(("name", "layers", "tokens"), [
    ("vit", 3, True), ("registers", 3, False), ("convnext", 4, False), ("swin", 2, False),
    ("resnet", 4, False), ("plain", 1, False), ("cait", 2, False),
])  # fmt: skip
def test_embedder_gives_every_choice_as_embed_does(name, layers, tokens):
    backbone = {
        "vit": vit,
        "registers": lambda: vit(class_token=False, reg_tokens=2, global_pool="avg"),
        "convnext": lambda: create_backbone(
            "convnext_atto", (64, 64), options={"depths": (1, 1, 1, 1), "dims": (8, 8, 16, 24)}),
        "swin": lambda: create_backbone(
            "swin_tiny_patch4_window7_224", (32, 32),
            options={"embed_dim": 12, "depths": (1, 1), "num_heads": (1, 2), "window_size": 4}),
        "resnet": resnet,
        "plain": lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)),
        "cait": lambda: create_backbone(
            "cait_xxs24_224", (32, 32), options={"embed_dim": 24, "depth": 2, "num_heads": 2}),
    }[name]().eval()  # fmt: skip
    size = {"vit": 16, "registers": 16, "convnext": 64}.get(name, 32)
    images = torch.randn(3, 3, size, size)
    embedder = Embedder(backbone, images[:2])
    found = embedder(images)
    assert tuple(found) == embedder.choices
    assert {choice.layer for choice in found} == set(range(-layers, 0))
    assert any(choice.pooling == "class_token" for choice in found) == tokens
    for pooling in ("average", "max"):
        assert {c.layer for c in found if c.pooling == pooling} == set(range(-layers, 0))
    for choice, vectors in found.items():
        assert vectors.dtype == torch.float32
        torch.testing.assert_close(vectors, embed(backbone, images, choice), rtol=1e-4, atol=1e-5)
