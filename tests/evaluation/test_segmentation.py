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
from backfold.data.segmentation import VOID
from backfold.data.statistics import ChannelStatistics
from backfold.errors import UserError
from backfold.evaluation.evaluate import EvaluateSettings, Evaluation
from backfold.evaluation.segmentation import (
    FeatureGrid,
    SegmentationSettings,
    decoder,
    fit,
    linear_head,
    mean_iou,
    predict,
    resized,
    segmentation,
)
from backfold.evaluation.subject import Subject

# From Python 3.12 on, forking a process with threads warns; loaders fork their workers.
pytestmark = pytest.mark.filterwarnings(
    "ignore:This process .* is multi-threaded:DeprecationWarning"
)
STATISTICS = ChannelStatistics((0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
VIT = {"patch_size": 8, "depth": 1, "embed_dim": 24, "num_heads": 2}
CPU = torch.device("cpu")
FROZEN = ("linear head, frozen", "decoder, frozen")
TUNED = ("linear head, fine-tuned", "decoder, fine-tuned")


class Pairs(list):
    """Inputs and masks, as `segmentation` has them."""

    def batches(self, indices):
        for places in indices:
            inputs, masks = zip(*(self[place] for place in places), strict=True)
            yield torch.stack(inputs), torch.stack(masks)


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
    batches = zip(predicted.split(2), masks.split(2), strict=True)
    assert mean_iou(batches, 5) == pytest.approx(counted_iou(predicted, masks), rel=1e-5)


FAMILIES = {
    "vit_tiny_patch16_224": VIT,
    "swin_tiny_patch4_window7_224": {"embed_dim": 12, "depths": (1, 1), "num_heads": (2, 2)},
    "convnext_atto": {"depths": (1, 1, 1, 1), "dims": (8, 8, 8, 12)},
    "resnet18": {},
}


@pytest.mark.parametrize("name", FAMILIES)
def test_feature_grids_are_timm_s_maps_of_an_image_that_is_not_square(name):
    # Built for another size than it is used with.
    backbone = create_backbone(name, (64, 64), options=FAMILIES[name]).eval()
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


def test_positions_are_resampled_as_timm_does():
    made, backbone = (
        timm.create_model("vit_tiny_patch16_224", img_size=size, num_classes=0, **VIT).eval()
        for size in ((48, 64), (32, 32))
    )
    before = {name: weight.clone() for name, weight in backbone.state_dict().items()}
    prefix = backbone.num_prefix_tokens
    expected = resample_abs_pos_embed(before["pos_embed"], (6, 8), (4, 4), num_prefix_tokens=prefix)
    wide = resized(backbone, (48, 64), 3, "vit")
    assert torch.equal(wide.pos_embed, expected)
    made.load_state_dict(timm.models.vision_transformer.checkpoint_filter_fn(before, made))
    images = torch.randn(1, 3, 48, 64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert torch.allclose(
            wide.forward_features(images), made.forward_features(images), atol=1e-5
        )
    with pytest.raises(UserError, match="; ") as caught:
        resized(wide, (30, 32), 3, "vit")
    assert "\n" not in str(caught.value)


def readable_maps(count, seed):
    """Feature maps (6, 4, 7) of which a matrix gives the class, and a tenth of void."""
    random = torch.Generator().manual_seed(seed)
    classes = torch.randint(0, 3, (count, 4, 7), generator=random)
    mixing = torch.randn(3, 6, generator=torch.Generator().manual_seed(99))
    maps = mixing[classes].permute(0, 3, 1, 2) * 50 + 1000
    maps = maps + torch.randn(maps.shape, generator=random)
    void = torch.rand(classes.shape, generator=random) < 0.1
    masks = torch.where(void, VOID, classes).to(torch.uint8)
    return Pairs(zip(maps, masks, strict=True)), classes


@pytest.mark.parametrize("kind", ["linear", "decoder"])
def test_a_class_that_can_be_read_linearly_is_found_and_no_other(kind):
    train, _ = readable_maps(24, 0)
    test, classes = readable_maps(8, 1)
    torch.manual_seed(0)
    head = linear_head(6, 3) if kind == "linear" else decoder(6, 3, 4)
    encoder = nn.Identity()
    fit(encoder, head, train, epochs=40, batch_size=4, rates=(2e-3, 0.0))
    every = torch.arange(8).split(3)
    assert mean_iou(predict(encoder, head, test, every), 3) > 99
    predicted = torch.cat([each for each, _ in predict(encoder, head, test, every)])
    assert predicted.dtype == torch.uint8
    if kind == "linear":  # right where the truth was hidden, too
        assert (predicted == classes).float().mean() > 0.99
    unrelated = Pairs(zip((m for m, _ in test), readable_maps(8, 2)[1].byte(), strict=True))
    assert mean_iou(predict(encoder, head, unrelated, every), 3) < 35


@pytest.mark.parametrize("stride", [2, 4, 8, 16, 32])
def test_the_decoder_s_logits_are_four_pixels_apart(stride):
    with torch.no_grad():
        logits = decoder(6, 3, stride)(torch.randn(2, 6, 3, 5))
    factor = max(1, stride // 4)
    assert logits.shape == (2, 3, 3 * factor, 5 * factor)


class Colours(nn.Module):
    """The mean colour of 8 x 8 squares, as far as its weights let it see."""

    feature_info = ({"reduction": 8},)

    def __init__(self):
        super().__init__()
        self.look = nn.Conv2d(3, 3, 8, 8, bias=False)

    def forward(self, images):
        return self.look(images)


def colours(strength):
    eye = torch.eye(3)[:, :, None, None].expand(-1, -1, 8, 8)
    return {"look.weight": strength * eye / 64}


def subject_of(weights, make=Colours, statistics=STATISTICS, **options):
    return Subject("by hand", weights, lambda _: make(), 3, (16, 16), statistics, **options)


def png(array):
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, "PNG")
    return buffer.getvalue()


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
            "image": [png(each.astype(np.uint8)) for each in images],
            "mask": [png(each.astype(np.uint8)) for each in masks],
        }
        pq.write_table(pa.table(columns), folder / f"{part}.parquet")
        found[part] = torch.from_numpy(np.where(masks == 0, VOID, classes))
    return folder, found


def evaluate(folder, subject, seed=3, num_workers=0, **options):
    chosen = {"void": 0, "epochs": 40, "finetune_epochs": 0, "seeds": 2, "batch_size": 4}
    settings = EvaluateSettings(
        protocols="segmentation",
        segmentation=SegmentationSettings(data=folder, **{**chosen, **options}),
        num_workers=num_workers,
        seed=seed,
    )
    given = Evaluation(settings, subject, CPU)
    return {(row.case, row.contender): row for row in segmentation(given)}, given


SEES, BLIND = colours(1.0), colours(0.0)


def test_who_sees_the_colours_wins_whatever_the_name(squares):
    folder, masks = squares
    right, given = evaluate(folder, subject_of({"pretrained": SEES, "before": BLIND}))
    bent, _ = evaluate(folder, subject_of({"pretrained": BLIND, "before": SEES}))
    assert masks["train"][masks["train"] != VOID].double().mean() > 0.5
    floor = counted_iou(torch.ones_like(masks["test"]), masks["test"])
    assert right["without the image", "most frequent class"].mean == pytest.approx(floor)
    for case in FROZEN:
        assert right[case, "pretrained"].mean > 75
        # The decoder's padding tells it where the border is.
        assert right[case, "before"].mean == pytest.approx(
            floor, abs=0.01 if "linear" in case else 12
        )
        assert right[case, "pixels"].mean == pytest.approx(right[case, "pretrained"].mean, abs=0.5)
        assert bent[case, "pretrained"].mean == right[case, "before"].mean
        assert bent[case, "before"].mean == right[case, "pretrained"].mean
        for rows in (right, bent):
            gap = rows[case, "pretrained"].mean - rows[case, "before"].mean
            assert rows[case, "pretrained over before"].mean == pytest.approx(gap)
            assert rows[case, "pretrained"].count == 2
        assert right[case, "pretrained over before"].mean > 40
        assert bent[case, "pretrained over before"].mean < -40
    with Image.open(io.BytesIO(given.pictures["segmentation.png"])) as picture:
        assert picture.format == "PNG"
        assert len(picture.convert("RGB").getcolors(2**20)) > 10


def test_gaps_are_taken_seed_by_seed(squares):
    folder, _ = squares
    subject = subject_of({"pretrained": SEES, "before": colours(-1.0)})
    options = {"epochs": 1, "seeds": 1}
    both, _ = evaluate(folder, subject, seed=3, epochs=1)
    single = [evaluate(folder, subject, seed=seed, **options)[0] for seed in (3, 4)]
    for key, row in both.items():
        values = [rows[key].mean for rows in single]
        assert row.mean == pytest.approx(np.mean(values))
        assert row.std == pytest.approx(np.std(values, ddof=row.count - 1))


def test_rows_are_the_same_wherever_images_and_maps_are_kept(squares, monkeypatch):
    folder, _ = squares
    subject = subject_of({"pretrained": SEES}, statistics=None)
    options = {"epochs": 2, "finetune_epochs": 1, "seeds": 1}
    kept, _ = evaluate(folder, subject, **options)
    for module in ("backfold.data.segmentation", "backfold.evaluation.segmentation"):
        monkeypatch.setattr(f"{module}.KEPT_BYTES", 0)
    anew, _ = evaluate(folder, subject, num_workers=2, **options)
    assert anew.keys() == kept.keys()
    for key, row in kept.items():
        assert anew[key].mean == pytest.approx(row.mean)


def test_fine_tuning_opens_blind_eyes_and_leaves_the_subject_alone(squares):
    folder, _ = squares

    def make():
        return timm.create_model("vit_tiny_patch16_224", img_size=16, num_classes=0, **VIT)

    torch.manual_seed(0)
    weights = {name: make().state_dict() for name in ("pretrained", "before", "random")}
    before = {key: value.clone() for key, value in weights["pretrained"].items()}
    subject = subject_of(weights, make, started_random=False)
    options = {"epochs": 5, "finetune_epochs": 8, "finetune_rate": 1e-3, "seeds": 1}
    rows, _ = evaluate(folder, subject, **options)
    frozen = {"pretrained", "before", "random", "pixels"}
    assert {name for case, name in rows if case == FROZEN[0] and "over" not in name} == frozen
    tuned = {name for case, name in rows if case in TUNED and "over" not in name}
    assert tuned == {"pretrained", "before", "from scratch"}
    assert all(rows[case, name].mean > 70 for case in TUNED for name in tuned)
    assert all(torch.equal(before[key], value) for key, value in weights["pretrained"].items())


def test_settings_and_sizes_outside_their_range_are_refused(squares):
    wrong = {
        "epochs": 0, "finetune_epochs": -1, "batch_size": 1, "seeds": 0, "limit": 0,
        "finetune_rate": float("nan"),
    }  # fmt: skip
    for name, value in wrong.items():
        with pytest.raises(UserError, match=rf"segmentation's {name} is .*; give"):
            SegmentationSettings(**{name: value})
    with pytest.raises(UserError, match="stride is 8; give multiples of it, such as 16x24"):
        evaluate(squares[0], subject_of({"pretrained": SEES}), image_size="15x24")
