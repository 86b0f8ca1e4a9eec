import io
from functools import partial

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.layers import resample_abs_pos_embed

from backfold.backbone import create_backbone
from backfold.data.segmentation import VOID, MaskedImages
from backfold.data.statistics import ChannelStatistics
from backfold.errors import UserError
from backfold.evaluation.segmentation import (
    SegmentationSettings,
    compare_segmentation,
    segment_with_run,
)
from backfold.evaluation.segmentation_picture import draw_segmentation
from backfold.evaluation.segmenter import (
    FeatureGrid,
    decoder,
    fit,
    grid_shape,
    linear_head,
    mean_iou,
    predict,
    resized,
)
from backfold.training.config import PretrainConfig
from backfold.training.pretrained import Pretrained
from backfold.training.setup import build_energy

STATISTICS = ChannelStatistics((0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
VIT = {"patch_size": 8, "depth": 1, "embed_dim": 24, "num_heads": 2}


def counted_iou(predicted, masks):
    """Over pixels one by one, in percent."""
    inside, union = {}, {}
    for guess, truth in zip(predicted.flatten().tolist(), masks.flatten().tolist(), strict=True):
        if truth == VOID:
            continue
        for name in {guess, truth}:
            union[name] = union.get(name, 0) + 1
        if guess == truth:
            inside[truth] = inside.get(truth, 0) + 1
    return 100 * sum(inside.get(name, 0) / union[name] for name in union) / len(union)


@pytest.mark.parametrize("seed", range(4))
def test_mean_iou_against_counting(seed):
    random = np.random.default_rng(seed)
    # The last class occurs nowhere; with the seeds' choices some occur in one of both only.
    masks = torch.from_numpy(random.choice([0, 1, 2, VOID], (3, 5, 7)).astype(np.uint8))
    predicted = torch.from_numpy(random.choice([0, 1, 3][: 1 + seed], (3, 5, 7)).astype(np.uint8))
    assert mean_iou(predicted, masks, 5) == pytest.approx(counted_iou(predicted, masks), rel=1e-5)


def test_void_pixels_do_not_count():
    masks = torch.tensor([[[0, 1, VOID, VOID]]], dtype=torch.uint8)
    assert mean_iou(torch.tensor([[[0, 1, 1, 0]]]), masks, 2) == 100
    with pytest.raises(UserError, match="every pixel of the test masks is void"):
        mean_iou(torch.zeros(1, 1, 2), torch.full((1, 1, 2), VOID, dtype=torch.uint8), 2)


@pytest.mark.parametrize("rows", range(1, 9))
@pytest.mark.parametrize("columns", [1, 5, 6])
def test_the_grid_has_the_image_s_shape(rows, columns):
    assert grid_shape(rows * columns, (16 * rows, 16 * columns)) == (rows, columns)


def test_positions_that_are_no_grid_are_refused():
    with pytest.raises(UserError, match="7 positions are no grid over 32 x 48 pixels; give"):
        grid_shape(7, (32, 48))


FAMILIES = {
    "vit_tiny_patch16_224": VIT,
    "swin_tiny_patch4_window7_224": {"embed_dim": 12, "depths": (1, 1), "num_heads": (2, 2)},
    "convnext_atto": {"depths": (1, 1, 1, 1), "dims": (8, 8, 8, 12)},
    "resnet18": {},
}


@pytest.mark.parametrize("name", FAMILIES)
def test_feature_grids_are_timm_s_maps_of_an_image_that_is_not_square(name):
    # Built for another size than it is used with.
    backbone = create_backbone(name, (64, 64), options=FAMILIES[name])
    wide = resized(backbone, (64, 96), 3, name)
    images = torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(0))
    unit = ChannelStatistics((0.0,) * 3, (1.0,) * 3)
    with torch.no_grad():
        grid = FeatureGrid(wide, unit)(images)
        expected = wide.forward_intermediates(
            images, indices=[-1], norm=True, intermediates_only=True, output_fmt="NCHW"
        )[0]
    reduction = wide.feature_info[-1]["reduction"]
    assert grid.shape[2:] == (64 // reduction, 96 // reduction)
    assert torch.allclose(grid, expected, atol=1e-5)


def test_positions_are_resampled_as_timm_does_and_the_original_stays():
    backbone = create_backbone("vit_tiny_patch16_224", (32, 32), options=VIT)
    before = {name: weight.clone() for name, weight in backbone.state_dict().items()}
    wide = resized(backbone, (48, 64), 3, "vit")
    expected = resample_abs_pos_embed(
        backbone.pos_embed, (6, 8), (4, 4), num_prefix_tokens=backbone.num_prefix_tokens
    )
    assert torch.equal(wide.pos_embed, expected)
    # As a model that was made for this size and read the weights.
    made = timm.create_model("vit_tiny_patch16_224", img_size=(48, 64), num_classes=0, **VIT)
    filtered = timm.models.vision_transformer.checkpoint_filter_fn(before, made)
    made.load_state_dict(filtered)
    images = torch.randn(1, 3, 48, 64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        features, expected = (m.eval().forward_features(images) for m in (wide, made))
    assert torch.allclose(features, expected, atol=1e-5)
    assert all(torch.equal(before[name], weight) for name, weight in backbone.state_dict().items())


def test_a_size_that_the_backbone_cannot_take_is_refused():
    backbone = create_backbone("vit_tiny_patch16_224", (32, 32), options=VIT)
    with pytest.raises(UserError, match="; ") as caught:
        resized(backbone, (30, 32), 3, "vit")
    assert "\n" not in str(caught.value)


def readable_maps(count, seed):
    """Feature maps (count, 6, 4, 7) of which a matrix gives the class, and a tenth of void."""
    random = torch.Generator().manual_seed(seed)
    classes = torch.randint(0, 3, (count, 4, 7), generator=random)
    mixing = torch.randn(3, 6, generator=torch.Generator().manual_seed(99))
    maps = mixing[classes].permute(0, 3, 1, 2) * 50 + 1000
    maps = maps + torch.randn(maps.shape, generator=random)
    void = torch.rand(classes.shape, generator=random) < 0.1
    return maps, torch.where(void, VOID, classes).to(torch.uint8), classes


@pytest.mark.parametrize("make_head", [linear_head, partial(decoder, stride=4)])
def test_a_class_that_can_be_read_linearly_is_found(make_head):
    train, masks, _ = readable_maps(24, 0)
    test, test_masks, classes = readable_maps(8, 1)
    torch.manual_seed(0)
    head = make_head(6, 3)
    encoder = torch.nn.Identity()
    fit(encoder, head, train, masks, epochs=40, batch_size=4, seed=0)
    predicted = predict(encoder, head, test, (4, 7), 3)
    assert predicted.dtype == torch.uint8
    assert mean_iou(predicted, test_masks, 3) > 99
    if make_head is linear_head:  # right where the truth was hidden, too
        assert (predicted == classes).float().mean() > 0.99


@pytest.mark.parametrize("stride", [2, 4, 8, 16, 32])
def test_the_decoder_s_logits_are_four_pixels_apart(stride):
    with torch.no_grad():
        logits = decoder(6, 3, stride)(torch.randn(2, 6, 3, 5))
    factor = max(1, stride // 4)
    assert logits.shape == (2, 3, 3 * factor, 5 * factor)


def test_a_class_that_is_not_in_the_features_is_not_found():
    train, masks, _ = readable_maps(24, 0)
    test, _, _ = readable_maps(8, 1)
    _, other, _ = readable_maps(8, 2)
    torch.manual_seed(0)
    head = linear_head(6, 3)
    fit(torch.nn.Identity(), head, train, masks, epochs=40, batch_size=4)
    assert mean_iou(predict(torch.nn.Identity(), head, test, (4, 7), 8), other, 3) < 30


def coloured_squares(count, seed):
    """Images of 16 x 24 pixels in 8 x 8 squares, light where the class is 1; one corner is void."""
    random = torch.Generator().manual_seed(seed)
    squares = torch.randint(0, 2, (count, 2, 3), generator=random)
    masks = squares.repeat_interleave(8, 1).repeat_interleave(8, 2).to(torch.uint8)
    noise = torch.randint(0, 60, (count, 3, 16, 24), generator=random)
    images = (60 + 120 * masks[:, None] + noise).to(torch.uint8)
    masks[:, :4, :4] = VOID
    return MaskedImages(images, masks, (4, 9))


@pytest.fixture(scope="module")
def compared():
    torch.manual_seed(0)
    backbone = create_backbone("vit_tiny_patch16_224", (16, 24), options=VIT).eval()
    before = {name: weight.clone() for name, weight in backbone.state_dict().items()}
    settings = SegmentationSettings(
        epochs=15, finetune_epochs=4, finetune_rate=1e-3, seeds=2, batch_size=4
    )
    parts = coloured_squares(12, 0), coloured_squares(5, 1)
    results = [
        compare_segmentation({"untrained": backbone}, *parts, STATISTICS, settings, seed=seed)
        for seed in (3, 3, 4)
    ]
    after = backbone.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    return results, parts


def test_rows_of_both_heads_frozen_and_fine_tuned(compared):
    (result, again, other), (train, test) = compared
    assert result.rows == again.rows
    assert result.rows != other.rows
    floor, *rows = result.rows
    commonest = 0 if (train.masks == 0).sum() > (train.masks == 1).sum() else 1
    predicted = torch.full_like(test.masks, commonest)
    assert floor.mean == pytest.approx(counted_iou(predicted, test.masks), rel=1e-5)
    assert [row.case for row in rows] == [
        "linear head, frozen", "decoder, frozen", "linear head, fine-tuned", "decoder, fine-tuned",
    ]  # fmt: skip
    for row in rows:
        assert (row.protocol, row.metric, row.count) == ("segmentation", "mIoU (%)", 2)
        # Brightness is read from a square's mean, and squares are patches.
        assert floor.mean < row.mean <= 100
    assert max(row.mean for row in rows) > 70


def test_the_picture_has_a_row_an_image_and_a_column_a_contender(compared):
    (result, *_), (_, test) = compared
    with Image.open(io.BytesIO(result.picture)) as picture:
        assert picture.format == "PNG"
        narrow = picture.size
    predicted = test.masks[:2].where(test.masks[:2] != VOID, 0)
    wide = draw_segmentation(test, {"untrained": predicted, "pretrained": predicted})
    with Image.open(io.BytesIO(wide)) as picture:
        assert picture.width > narrow[0]
        assert picture.height < narrow[1]
        assert len(picture.convert("RGB").getcolors(2**16)) > 10


def test_a_run_s_backbone_is_measured_at_the_images_own_size():
    config = PretrainConfig(
        backbone="vit_tiny_patch16_224", image_size=16, backbone_options=VIT, seed=5
    )
    energy = build_energy(config, 3).eval()
    with torch.no_grad():
        for weight in energy.backbone.parameters():
            weight.add_(
                0.05 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))
            )
    run = Pretrained(energy, config, STATISTICS, 3, (16, 16), 0)
    parts = tuple(Memory(coloured_squares(6, seed)) for seed in (0, 1))
    settings = SegmentationSettings(epochs=2, finetune_epochs=0, seeds=1, batch_size=4)
    result = segment_with_run(run, parts, settings, device=torch.device("cpu"))
    assert [(row.case, row.contender) for row in result.rows] == [
        ("without the image", "most frequent class"),
        ("linear head, frozen", "untrained"),
        ("decoder, frozen", "untrained"),
        ("linear head, frozen", "pretrained"),
        ("decoder, frozen", "pretrained"),
    ]
    refused = SegmentationSettings(image_size="15x24")
    with pytest.raises(UserError, match="stride is 8; give multiples of it, such as 16x24"):
        segment_with_run(run, parts, refused, device=torch.device("cpu"))


class Memory:
    """Stands for a `MaskedSource`."""

    def __init__(self, part):
        self.part = part

    def __len__(self):
        return len(self.part)

    def read(self, row):
        return self.part.images[row], self.part.masks[row].long()


WRONG = [
    {"epochs": 0}, {"finetune_epochs": -1}, {"batch_size": 1}, {"seeds": 0}, {"limit": 0},
    {"finetune_rate": 0.0}, {"finetune_rate": float("nan")},
]  # fmt: skip


@pytest.mark.parametrize("wrong", WRONG)
def test_settings_outside_their_range_are_refused(wrong):
    (name,) = wrong
    with pytest.raises(UserError, match=rf"segmentation's {name} is .*; give"):
        SegmentationSettings(**wrong)
