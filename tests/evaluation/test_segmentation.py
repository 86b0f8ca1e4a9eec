import io

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import timm
import torch
from PIL import Image
from timm.layers import resample_abs_pos_embed
from torch import nn

from backfold.backbone import create_backbone
from backfold.data.masks import VOID
from backfold.data.statistics import ChannelStatistics
from backfold.evaluation import segmentation as module
from backfold.evaluation.evaluate import EvaluateSettings, Evaluation
from backfold.evaluation.subject import Subject
from backfold.pictures import png_bytes

STATISTICS = ChannelStatistics((0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
VIT = {"patch_size": 8, "depth": 1, "embed_dim": 24, "num_heads": 2}
FROZEN = ("linear head, frozen", "decoder, frozen")
TUNED = ("linear head, fine-tuned", "decoder, fine-tuned")


def counted_iou(predicted, masks):
    """Over pixels one by one, in percent."""
    inside, union = {}, {}
    for guess, truth in zip(predicted.flatten().tolist(), masks.flatten().tolist(), strict=True):
        for name in {guess, truth} if truth != VOID else ():
            union[name] = union.get(name, 0) + 1
            inside[name] = inside.get(name, 0) + (guess == truth)
    return 100 * sum(inside[name] / union[name] for name in union) / len(union)


def test_mean_iou_against_counting():
    random = np.random.default_rng(0)
    # Class 4 occurs nowhere, 2 and 3 in one of both only.
    masks = torch.from_numpy(random.choice([0, 1, 2, VOID], (3, 5, 7)).astype(np.uint8))
    predicted = torch.from_numpy(random.choice([0, 1, 3], (3, 5, 7)).astype(np.uint8))
    batches = zip(predicted.split(2), masks.split(2), strict=True)
    assert module.mean_iou(batches, 5) == pytest.approx(counted_iou(predicted, masks), rel=1e-5)


FAMILIES = {
    "vit_tiny_patch16_224": VIT,
    "swin_tiny_patch4_window7_224": {"embed_dim": 12, "depths": (1, 1), "num_heads": (2, 2)},
    "test_convnext": {},
}


@pytest.mark.parametrize("name", FAMILIES)
def test_feature_grids_are_timm_s_maps_of_an_image_that_is_not_square(name):
    # Built for another size than it is used with.
    backbone = create_backbone(name, (64, 64), options=FAMILIES[name]).eval()
    before = {key: value.clone() for key, value in backbone.state_dict().items()}
    wide = module.resized(backbone, (64, 96), 3, name)
    if "pos_embed" in before:
        given = {"new_size": (8, 12), "old_size": (8, 8), "num_prefix_tokens": 1}
        assert torch.equal(wide.pos_embed, resample_abs_pos_embed(before["pos_embed"], **given))
    images = torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        grid = module.FeatureGrid(wide, ChannelStatistics((0.0,) * 3, (1.0,) * 3))(images)
        expected = wide.forward_intermediates(
            images, indices=[-1], norm=True, intermediates_only=True, output_fmt="NCHW"
        )[0]
    assert torch.allclose(grid, expected, atol=1e-5)


def colours(strength=1.0):
    """Mean colours of 8 x 8 squares, as far as the weights let them be seen."""
    look = nn.Conv2d(3, 3, 8, 8, bias=False)
    look.feature_info = ({"reduction": 8},)
    look.weight.data = strength * torch.eye(3)[:, :, None, None].repeat(1, 1, 8, 8) / 64
    return look


def vit():
    return timm.create_model("vit_tiny_patch16_224", img_size=16, num_classes=0, **VIT)


def subject_of(weights, make=colours, statistics=STATISTICS, **options):
    return Subject("by hand", weights, lambda _: make(), 3, (16, 16), statistics, **options)


@pytest.fixture(scope="module")
def squares(tmp_path_factory):
    """16 x 24 pixels in 8 x 8 squares whose class, 4 or 9, is the colour; a corner is void."""
    folder = tmp_path_factory.mktemp("squares")
    random, found = np.random.default_rng(0), {}
    for part, count in (("train", 12), ("test", 5)):
        classes = random.choice(2, (count, 2, 3), p=(0.4, 0.6)).repeat(8, 1).repeat(8, 2)
        images = random.integers(60, 120, (count, 16, 24, 3))
        images[..., 0] += 100 * classes
        masks = np.where(classes, 9, 4)
        masks[:, :4, :4] = 0
        columns = {
            name: [png_bytes(Image.fromarray(each.astype(np.uint8))) for each in arrays]
            for name, arrays in (("image", images), ("mask", masks))
        }
        pq.write_table(pa.table(columns), folder / f"{part}.parquet")
        found[part] = torch.from_numpy(np.where(masks == 0, VOID, classes))
    return folder, found


def evaluate(folder, subject, seed=3, num_workers=0, **options):
    chosen = {"void": 0, "epochs": 40, "finetune_epochs": 0, "seeds": 1, "batch_size": 4, **options}
    own = module.SegmentationSettings(data=folder, **chosen)
    settings = EvaluateSettings(segmentation=own, num_workers=num_workers, seed=seed)
    given = Evaluation(settings, subject, torch.device("cpu"))
    return {(row.case, row.contender): row for row in module.segmentation(given)}, given.pictures


def test_who_sees_the_colours_wins_whatever_the_name(squares):
    (folder, masks), sees, blind = squares, colours().state_dict(), colours(0.0).state_dict()
    right, pictures = evaluate(folder, subject_of({"pretrained": sees, "before": blind}))
    bent, _ = evaluate(folder, subject_of({"pretrained": blind, "before": sees}))
    assert masks["train"][masks["train"] != VOID].double().mean() > 0.5
    floor = counted_iou(torch.ones_like(masks["test"]), masks["test"])
    assert right["without the image", "most frequent class"].mean == pytest.approx(floor)
    for case in FROZEN:
        ours, blindly, pixels = (right[case, n].mean for n in ("pretrained", "before", "pixels"))
        assert ours > 75
        # The decoder's padding tells it where the border is.
        assert blindly == pytest.approx(floor, abs=0.01 if "linear" in case else 12)
        assert pixels == pytest.approx(ours, abs=0.5)
        assert (bent[case, "before"].mean, bent[case, "pretrained"].mean) == (ours, blindly)
        assert right[case, "pretrained over before"].mean == pytest.approx(ours - blindly)
        assert bent[case, "pretrained over before"].mean == pytest.approx(blindly - ours)
    with Image.open(io.BytesIO(pictures["segmentation.png"])) as picture:
        assert picture.getpixel((252, 30)) == (0, 0, 0)  # the truth's void corner
        assert picture.getpixel((380, 30)) != (0, 0, 0)


def test_gaps_are_taken_seed_by_seed(squares):
    weights = {"pretrained": colours().state_dict(), "before": colours(-1.0).state_dict()}
    both, _ = evaluate(squares[0], subject_of(weights), epochs=1, seeds=2)
    single = [evaluate(squares[0], subject_of(weights), s, epochs=1)[0] for s in (3, 4)]
    for key, row in both.items():
        values = [rows[key].mean for rows in single]
        assert (row.mean, row.std) == pytest.approx(
            (np.mean(values), np.std(values, ddof=row.count - 1))
        )


def test_rows_are_the_same_wherever_images_and_maps_are_kept(squares, monkeypatch):
    subject = subject_of({"pretrained": colours().state_dict()}, statistics=None)
    options = {"epochs": 1, "finetune_epochs": 1}
    kept, _ = evaluate(squares[0], subject, **options)
    for name in ("backfold.data.masks", "backfold.evaluation.segmentation"):
        monkeypatch.setattr(f"{name}.KEPT_BYTES", 0)
    anew, _ = evaluate(squares[0], subject, num_workers=1, **options)
    means = {key: row.mean for key, row in kept.items()}
    assert {key: row.mean for key, row in anew.items()} == pytest.approx(means)


def test_fine_tuning_opens_blind_eyes_and_leaves_the_subject_alone(squares):
    torch.manual_seed(0)
    weights = {name: vit().state_dict() for name in ("pretrained", "before", "random")}
    before = {key: value.clone() for key, value in weights["pretrained"].items()}
    subject = subject_of(weights, vit, started_random=False)
    options = {"epochs": 5, "finetune_epochs": 8, "finetune_rate": 1e-3}
    rows, _ = evaluate(squares[0], subject, **options)
    frozen = {"pretrained", "before", "random", "pixels"}
    assert {name for case, name in rows if case == FROZEN[0] and "over" not in name} == frozen
    tuned = {name for case, name in rows if case in TUNED and "over" not in name}
    assert tuned == {"pretrained", "before", "from scratch"}
    assert all(rows[case, name].mean > 70 for case in TUNED for name in tuned)
    assert all(torch.equal(before[key], value) for key, value in weights["pretrained"].items())
