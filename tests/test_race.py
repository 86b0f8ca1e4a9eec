"""The race's conversions, splits, pieces and page; how the contenders do is no test's business."""

import importlib
import io
import json
import math
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from torch import nn

from backfold.data.augmentation import Augmentation
from backfold.embedding import embed
from backfold.errors import UserError
from backfold.evaluation.measures import MeasureRow, write_measures
from race import parse, race_of, run
from racing.contenders import BY_NAME, CONTENDERS
from racing.conversion import timm_weights
from racing.driving import drive, pieces_of, with_tuned
from racing.embedding import LAYERS, embed_choices
from racing.images import load_race_images
from racing.masked import make_autoencoder, make_simmim
from racing.packing import MOST_BYTES, pack
from racing.pretraining import OutOfTimeError, pretrain
from racing.recipes import SPARSE
from racing.restoring import merged, recipe_config
from racing.sizes import SMOKE
from racing.views import ContrastivePairs, Order, crops

SCRIPTS = Path(__file__).resolve().parent.parent / "scripts"
FOREVER = float("inf")


def png(pixels):
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture(scope="module", autouse=True)
def quick_probes():
    """One penalty: the grid is the probes' own tests' business."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("backfold.evaluation.probes.REGULARISATION_GRID", (1e-3,))
        yield


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """64 random images of 4 classes to train on, and 24 to test."""
    folder = tmp_path_factory.mktemp("random-images")
    generator = np.random.default_rng(0)
    for name, count in {"train": 64, "test": 24}.items():
        pixels = generator.integers(0, 256, (count, 16, 16, 3), dtype=np.uint8)
        table = pa.table({"image": [png(image) for image in pixels], "label": np.arange(count) % 4})
        pq.write_table(table, folder / f"{name}.parquet")
    return folder


def options(data, out, *more):
    return parse([
        "--size", "smoke", "--data", str(data), "--out", str(out), "--work", str(out / "work"),
        "--accelerator", "cpu", "--only", "untrained", "mae", "energy-mae-seconds",
        "--seeds", "0", *more,
    ])  # fmt: skip


@pytest.fixture(scope="module")
def raced(data, tmp_path_factory):
    out = tmp_path_factory.mktemp("raced")
    assert run(options(data, out)) == []
    return out


@pytest.fixture(scope="module")
def results_page():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(SCRIPTS))
        yield importlib.import_module("results_page")


def disturbed(model):
    """Every weight away from its start, where many are 0 or 1."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
    return model.eval()


@pytest.mark.parametrize("layer", [-1, -2])
def test_an_autoencoder_s_encoder_becomes_a_timm_backbone_with_equal_features(layer):
    spec, images = SMOKE.backbones["vit"], torch.randn(3, 3, 16, 16)
    model = disturbed(make_autoencoder(spec, 16, seed=0))
    model.config.mask_ratio = 0.0  # whole images, in the order of the noise
    noise = torch.arange(16.0).expand(3, -1)
    found = features(spec, timm_weights(model.vit.state_dict(), 3), images, layer)
    with torch.no_grad():
        states = model.vit(images, noise=noise, output_hidden_states=True)
    expected = states.last_hidden_state if layer == -1 else states.hidden_states[layer]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("layer", [-1, -2])
def test_simmim_s_encoder_becomes_a_timm_backbone_with_equal_features(layer):
    spec, images = SMOKE.backbones["vit"], torch.randn(3, 3, 16, 16)
    model = disturbed(make_simmim(spec, 16, seed=0))
    found = features(spec, timm_weights(model.vit.state_dict(), 3), images, layer)
    with torch.no_grad():
        states = model.vit(images, output_hidden_states=True)
    expected = states.last_hidden_state if layer == -1 else states.hidden_states[layer]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def features(spec, weights, images, layer):
    """All tokens of the backbone after so many blocks, counted from the end."""
    backbone = spec.build(16, seed=5).eval()
    backbone.load_state_dict(weights)
    if layer != -1:
        backbone.norm = nn.Identity()
        del backbone.blocks[layer + 1 :]
    with torch.no_grad():
        return backbone.forward_features(images)


def sines(rows, columns, width):
    """The published fixed positions, place by place, behind a class token's zeros."""
    places = [[0.0] * width]
    frequencies = [10000 ** (-index / (width / 4)) for index in range(width // 4)]
    for row in range(rows):
        for column in range(columns):
            angles = [[place * each for each in frequencies] for place in (column, row)]
            places.append([f(a) for axis in angles for f in (math.sin, math.cos) for a in axis])
    return torch.tensor(places)


def assert_uniform(weight, bound):
    assert 0.9 * bound < weight.abs().amax() <= bound
    assert weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.15)


def test_the_autoencoder_has_the_published_start_and_targets():
    model = make_autoencoder(SMOKE.backbones["vit"], 16, seed=0)
    encoder, decoder = model.vit.embeddings.position_embeddings, model.decoder.decoder_pos_embed
    assert not encoder.requires_grad
    assert not decoder.requires_grad
    torch.testing.assert_close(encoder[0], sines(4, 4, 16))
    torch.testing.assert_close(decoder[0], sines(4, 4, 8))
    assert model.decoder.mask_token.abs().amax() > 0
    block = model.vit.layers[0]
    # Uniform within sqrt(6 / (inputs + outputs)), the three projections being one matrix.
    assert_uniform(block.attention.q_proj.weight, (6 / (16 + 3 * 16)) ** 0.5)
    assert_uniform(block.mlp.fc1.weight, (6 / (16 + 64)) ** 0.5)
    assert model.config.norm_pix_loss
    assert model.config.mask_ratio == 0.75


@pytest.mark.parametrize("name", ["vit", "convnext"])
def test_embeddings_in_one_pass_are_those_of_the_product(name):
    backbone = SMOKE.backbones[name].build(16, seed=0).eval()
    images = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        found = embed_choices(backbone, images)
        for choice, embedding in found.items():
            torch.testing.assert_close(embedding, embed(backbone, images, choice))
    poolings = {"average", "max"} | ({"class_token"} if name == "vit" else set())
    assert {(c.layer, c.pooling) for c in found} == {(la, p) for la in LAYERS for p in poolings}


def test_nothing_is_trained_or_reported_on_the_validation_images(data):
    images = load_race_images(data, SMOKE)
    training, validation = set(images.training.rows.tolist()), set(images.validation.rows.tolist())
    assert not training & validation
    assert len(training) == SMOKE.images
    assert len(validation) == SMOKE.validation
    labelled = images.labelled
    assert torch.equal(labelled.images, images.training.images[: SMOKE.labelled])
    of_file = pq.read_table(data / "train.parquet")["image"]
    for part, file in ((images.training, of_file), (images.validation, of_file),
                       (images.test, pq.read_table(data / "test.parquet")["image"])):  # fmt: skip
        for image, row in zip(part.images, part.rows.tolist(), strict=True):
            pixels = np.asarray(Image.open(io.BytesIO(file[row].as_py())))
            assert np.array_equal(image.permute(1, 2, 0).numpy(), pixels)
    assert torch.equal(images.validation.labels, images.validation.rows % 4)


def test_too_few_images_are_named(data):
    with pytest.raises(UserError, match="needs 216 training images, and there are 64"):
        load_race_images(data, replace(SMOKE, images=200))


def test_order_is_each_image_once_an_epoch():
    order = Order(10, 3, seed=0)
    epochs = [torch.cat([order(step) for step in range(e * 3, e * 3 + 3)]) for e in (0, 1)]
    assert all(len(set(epoch.tolist())) == 9 for epoch in epochs)
    assert not torch.equal(*epochs)
    assert torch.equal(order(4), Order(10, 3, seed=0)(4))


def test_crops_depend_on_their_seed_alone_and_can_be_the_image():
    images = torch.randint(0, 256, (4, 3, 16, 16), dtype=torch.uint8)
    first = crops(images, 16, Augmentation(), seed=3)
    torch.rand(5)
    assert torch.equal(first, crops(images, 16, Augmentation(), seed=3))
    assert not torch.equal(first, crops(images, 16, Augmentation(), seed=4))
    assert first.min() >= 0
    assert first.max() <= 1
    whole = crops(images, 16, Augmentation(False, (1.0, 1.0), False), seed=0)
    torch.testing.assert_close(whole, images / 255)


def test_contrastive_pairs_depend_on_seed_and_step_alone():
    images = torch.randint(0, 256, (8, 3, 16, 16), dtype=torch.uint8)
    pairs = ContrastivePairs(images, 16, Order(8, 4, seed=0))
    first = pairs[1]
    assert first.shape == (2, 4, 3, 16, 16)
    assert not torch.equal(first[0], first[1])
    torch.rand(3)
    assert torch.equal(first, pairs[1])
    assert not torch.equal(first, pairs[0])


def test_a_recipe_changes_what_it_names_and_no_learning_rate(data):
    race = race_of(options(data, Path("nowhere")), time.monotonic())
    setting = race.setting(BY_NAME["sparse"], 10, 3e-3, 7, "32-true", "plain")
    config = recipe_config(setting, {**SPARSE, "optimizer": {"base_lr": 9.0, "betas": [0.8, 0.9]}})
    assert config.tasks.masking.hidden_share == 1 / 3
    assert config.tasks.masking.mask_patch_size == SMOKE.backbones["vit"].mask_size
    assert config.optimizer.betas == (0.8, 0.9)
    assert config.optimizer.base_lr * config.batch_size / 256 == pytest.approx(3e-3)
    assert config.seed == 7
    assert merged({"a": {"b": 1, "c": 2}, "d": {}}, {"a": {"b": 3}, "d": {"e": 4}}) == {
        "a": {"b": 3, "c": 2},
        "d": {"e": 4},
    }


def test_a_race_writes_every_piece_and_skips_what_is_there(raced, data):
    files = sorted(raced.rglob("*.json"))
    names = {str(path.relative_to(raced)) for path in files}
    expected = [*with_tuned(["untrained", "mae", "energy-mae-seconds"])]
    assert {each.name for each in expected} >= {"energy"}
    pieces = pieces_of(expected, [0], SMOKE.learning_rates)
    assert names == {piece.name for piece in pieces} | {"race.json"}
    before = {path: path.stat().st_mtime_ns for path in files}
    assert run(options(data, raced)) == []
    assert before == {path: path.stat().st_mtime_ns for path in files}
    result = json.loads((raced / "results" / "mae-seed0.json").read_text())
    assert [point["epochs"] for point in result["points"]] == [0.5, 1.0]
    assert {"linear", "knn", "few"} <= result["points"][-1].keys()
    assert result["facts"]["versions"]["torch"] == torch.__version__.partition("+")[0]


def test_equal_seconds_come_from_the_measured_steps(raced, data):
    race = race_of(options(data, raced), time.monotonic())
    path = raced / "timing-vit.json"
    kept = path.read_text()
    timing = json.loads(kept)
    timing["contenders"]["mae"]["seconds_per_step"] = 3.0
    timing["contenders"]["energy"]["seconds_per_step"] = 1.0
    path.write_text(json.dumps(timing))
    try:
        assert race.total_steps(BY_NAME["mae"]) == 2
        assert race.total_steps(BY_NAME["energy-mae-seconds"]) == 6
    finally:
        path.write_text(kept)


def test_the_same_seed_gives_the_same_numbers(raced, data, tmp_path):
    for name in ("timing-vit.json", "race.json"):
        (tmp_path / name).write_text((raced / name).read_text())
    again = options(data, tmp_path)
    again.only = ["energy"]
    assert run(again) == []
    for name in ("runs/energy-seed0.json", "results/energy-seed0.json"):
        first, second = (json.loads((folder / name).read_text()) for folder in (raced, tmp_path))
        for key in ("losses", "points", "fine_tuned", "lr"):
            assert first.get(key) == second.get(key)


@pytest.mark.parametrize("name", ["mae", "simmim", "energy", "sparse", "simclr"])
def test_a_pretraining_that_was_cut_gives_the_same_weights(name, data, tmp_path):
    race = race_of(options(data, tmp_path), time.monotonic())

    def method():
        contender = BY_NAME[name]
        return contender.method(race.setting(contender, 4, 1e-3, 0, "32-true", "plain"))

    whole = method()
    losses = pretrain(whole, 4, [2], tmp_path / "whole", FOREVER).losses
    for done in (1, 2, 3):
        with pytest.raises(OutOfTimeError):
            pretrain(method(), 4, [2], tmp_path / "cut", -FOREVER)
        checkpoint = torch.load(tmp_path / "cut" / "checkpoint.pt", weights_only=True)
        assert checkpoint["progress"]["step"] == done
    last = method()
    assert pretrain(last, 4, [2], tmp_path / "cut", -FOREVER).losses == losses
    for one, other in zip(whole.backbone().values(), last.backbone().values(), strict=True):
        assert torch.equal(one, other)
    kept = [(tmp_path / folder / "after-2.safetensors").read_bytes() for folder in ("whole", "cut")]
    assert kept[0] == kept[1]


def test_every_contender_s_weights_fit_the_same_timm_backbone(data, tmp_path):
    race = race_of(options(data, tmp_path), time.monotonic())
    for contender in CONTENDERS:
        if contender.is_trained and not contender.tuned_as:
            method = contender.method(race.setting(contender, 4, 1e-3, 0, "32-true", "plain"))
            before = {name: tensor.clone() for name, tensor in method.backbone().items()}
            for step, batch in enumerate(method.batches(range(2))):
                method.step(batch, step)
            after = method.backbone()
            race.size.backbones[contender.backbone].build(16, seed=9).load_state_dict(after)
            assert any(not torch.equal(before[name], after[name]) for name in before)


def test_no_time_leaves_all_pieces_and_another_extent_is_refused(data, tmp_path):
    late = race_of(options(data, tmp_path, "--max-minutes", "0"), time.monotonic() - 1)
    pieces = pieces_of([BY_NAME["mae"]], [0], SMOKE.learning_rates)
    assert drive(late, pieces) == [piece.name for piece in pieces]
    with pytest.raises(UserError, match="a race of another extent"):
        run(options(data, tmp_path, "--epochs", "3"))


def test_data_are_packed_below_the_limit(data, tmp_path, monkeypatch):
    assert pack(data, tmp_path / "whole") == 0
    table = pq.read_table(tmp_path / "whole" / "train.parquet")
    assert table.equals(pq.read_table(data / "train.parquet").select(["image", "label"]))
    size = sum(path.stat().st_size for path in (tmp_path / "whole").iterdir())
    assert size < MOST_BYTES
    monkeypatch.setattr("racing.packing.MOST_BYTES", size - 1)
    assert pack(data, tmp_path / "coded") > 0
    assert sum(path.stat().st_size for path in (tmp_path / "coded").iterdir()) < size
    monkeypatch.setattr("racing.packing.MOST_BYTES", 10)
    with pytest.raises(UserError, match="does not fit"):
        pack(data, tmp_path / "none")


def test_the_page_is_as_the_script_writes_it(results_page):
    races = results_page.read_races(results_page.RESULTS)
    measures = results_page.read_run(results_page.RESULTS / "energy-bars")
    transfer = results_page.read_transfer(results_page.RESULTS / "transfer")
    assert results_page.page(races, measures, transfer) == results_page.PAGE.read_text(), (
        "run `python scripts/results_page.py`"
    )
    for race in races:
        for picture in results_page.pictures_of(race):
            assert (results_page.IMAGES / picture).exists()


def test_the_page_tells_missed_bars_and_every_number(results_page, raced, tmp_path):
    folder = tmp_path / "race-tried"
    folder.symlink_to(raced)
    (race,) = results_page.read_races(tmp_path)
    text = results_page.page([race])
    first = text.split("\n\n")[1]
    assert "bars are missed" in first
    assert "Not measured" in first
    result = json.loads((raced / "results" / "mae-seed0.json").read_text())
    row = next(line for line in text.splitlines() if line.startswith("| MAE (transformers) | 1 |"))
    assert f"| {result['points'][-1]['knn']:.1f} |" in row
    assert "race-tried-vit.svg" in results_page.pictures_of(race)
    assert b"</svg>" in importlib.import_module("results_plots").race_plot(race, "vit")


@pytest.mark.usefixtures("results_page")
def test_verdicts_of_made_up_scores():
    bars = importlib.import_module("results_bars")
    reading = importlib.import_module("results_reading")

    def entry(name, linear, other, epochs=10.0):
        results = {
            seed: {
                "validation_linear": linear,
                "fine_tuned": {"10": other, "100": other},
                "points": [
                    {"step": 5, "linear": linear - 5 + seed, "knn": other, "few": other},
                    {"step": 10, "linear": linear + seed, "knn": other, "few": other + seed},
                ],
            }
            for seed in (0, 1)
        }
        runs = {0: {"epochs": epochs, "steps": 10}}
        timing = {"seconds_per_step": 1.0, "operations_per_image": 1.0}
        return reading.Entry(name, name, runs, results, timing)

    entries = [
        entry("mae", 40, 30), entry("simmim", 35, 30), entry("energy", 39, 31),
        entry("sparse", 46, 31, 8.0), entry("energy-mae-seconds", 40, 29),
    ]  # fmt: skip
    race = reading.RaceResults("race", {}, {each.name: each for each in entries}, {}, [])
    verdicts = bars.judge(race)
    # sparse has the better validation: linear +6 beyond 1, kNN +1 beyond 0, few +1 within 1
    assert verdicts[0].found.startswith("3 of 4, sparse: linear 46.5 ± 0.7 against 40.5 ± 0.7 (+6")
    assert verdicts[0].met
    # level on linear (0) and few (-1, spread 1); behind on the others
    assert verdicts[1].found.startswith("2 of 4")
    assert verdicts[1].met
    assert not verdicts[2].met
    assert verdicts[3].met is None
    # sparse's first point is 41.5, above 40.5, at half of 8 epochs
    assert verdicts[4].found == "4.0 of 10.0 epochs, sparse"
    assert verdicts[4].met
    assert verdicts[5].met is None
    assert bars.shorter_schedules(race).met is None
    race.entries["mae-half"], race.entries["energy-half"] = (
        entry("mae-half", 40, 30, 5.0), entry("energy-half", 42, 31, 5.0)
    )  # fmt: skip
    short = bars.shorter_schedules(race)
    # linear +2 beyond 1, kNN and fine-tuned +1 beyond 0, few +1 within 1
    assert short.what == "energy against MAE, equal epochs, half as many"
    assert short.found.startswith("3 of 4, energy-half: linear 42.5 ± 0.7 against 40.5 ± 0.7 (+2")
    assert short.met


def difference(case, mean, std):
    return MeasureRow("adaptation", case, "difference", "accuracy (%)", mean, std, 100)


def aurocs(means, std=0.01, contender="energy", severity=3):
    return [
        MeasureRow("energy", f"{task}, severity {severity}", contender, "AUROC", mean, std, 100)
        for task, mean in means.items()
    ]


TASKS = ("masking", "sorting", "superresolution", "denoising", "colorization")


@pytest.fixture
def judge_rows(results_page):
    def judge(**rows):
        """The AUROC's verdict and the adaptation's."""
        return results_page.judge_energy(results_page.RunMeasures(rows, {}))

    return judge


def test_the_auroc_s_verdict_looks_at_the_energy_at_the_middle_severity_alone(judge_rows):
    # Neither other scores nor other severities count, however low.
    others = aurocs(dict.fromkeys(TASKS, 0.2), contender="kNN distance")
    others += aurocs(dict.fromkeys(TASKS, 0.3), severity=2)
    reached = dict.fromkeys(TASKS, 0.95)
    met, _ = judge_rows(energy=others + aurocs(reached))
    assert met.bar == "at least 0.95"
    assert met.met
    assert met.found == ", ".join(f"{task} 0.95 ± 0.01" for task in TASKS)
    # One task below is enough, though 0.949 is within the spread of the bar.
    missed, _ = judge_rows(energy=others + aurocs({**reached, "denoising": 0.949}))
    assert missed.met is False
    assert "denoising 0.95 ± 0.01" in missed.found  # rounded
    # With a task not measured, the bar may be missed and can't be met.
    some = {"masking": 0.99, "sorting": 0.99}
    assert judge_rows(energy=aurocs(some))[0].met is None
    assert judge_rows(energy=aurocs({**some, "denoising": 0.9}))[0].met is False
    unknown, _ = judge_rows(energy=others)
    assert (unknown.met, unknown.found) == (None, "not run")


@pytest.mark.parametrize(
    ("hard", "clean", "met"),
    [
        ((1.2, 0.4), (-0.5, 0.3), True),  # 1.2 is beyond 0.4, and 0.5 points may be lost
        ((1.2, 0.4), (-0.6, 0.3), False),  # too much is lost on clean images
        ((0.4, 0.4), (0.0, 0.3), False),  # a gain, but not beyond the spread
        ((-2.0, 0.4), (1.0, 0.3), False),
        ((0.1, 0.0), (3.0, 0.3), True),
    ],
)
def test_the_adaptation_s_verdict_asks_for_a_gain_beyond_the_spread(judge_rows, hard, clean, met):
    case = "mean, severity 3 and above"
    rows = [
        # Accuracies, and gains at single severities, decide nothing.
        replace(difference(case, 99.0, 0.0), contender="restored first"),
        difference("noise, severity 3", -50.0, 0.0),
        difference("clean", *clean),
        difference(case, *hard),
    ]
    _, verdict = judge_rows(adaptation=rows)
    assert verdict.met is met
    assert verdict.found == (
        f"{hard[0]:+.1f} ± {hard[1]:.1f} points on corrupted images, "
        f"{clean[0]:+.1f} ± {clean[1]:.1f} on clean ones"
    )
    for incomplete in (rows[:3], [*rows[:2], rows[3]], []):
        _, unknown = judge_rows(adaptation=incomplete)
        assert (unknown.met, unknown.found) == (None, "not run")


def test_measures_that_were_not_run_have_no_verdict(results_page, judge_rows, tmp_path):
    assert results_page.read_run(tmp_path) is None
    (tmp_path / "facts.json").write_text('{"run": "made up", "commands": []}')
    empty = results_page.read_run(tmp_path)
    assert empty.rows == {}
    assert [verdict.met for verdict in results_page.judge_energy(empty)] == [None, None]
    rows = aurocs({"masking": 0.5, "sorting": 0.99})
    write_measures(tmp_path / "energy.json", rows)
    found = results_page.read_run(tmp_path)
    assert found.rows == {"energy": rows}
    assert found.facts["run"] == "made up"
    assert results_page.judge_energy(found) == judge_rows(energy=rows)
    assert [verdict.met for verdict in results_page.judge_energy(found)] == [False, None]


def test_few_labels_and_segmentation_become_tables(results_page, tmp_path):
    assert results_page.read_transfer(tmp_path) is None
    (tmp_path / "facts.json").write_text('{"run": "One run.", "commands": ["do this"]}')
    empty = results_page.page([], None, results_page.read_transfer(tmp_path))
    assert "One run." in empty
    assert "mIoU" not in empty
    given = [
        ("linear", 5, "untrained", 20.04, 1.0), ("linear", 5, "pretrained", 25.0, 1.25),
        ("finetune", 5, "pretrained", 27.0, 2.0), ("linear", "10 %", "pretrained", 40.0, 0.0),
    ]  # fmt: skip
    names = ("protocol", "labels", "backbone", "accuracy_mean", "accuracy_std")
    rows = [dict(zip(names, row, strict=True)) for row in given]
    (tmp_path / "lowshot.json").write_text(json.dumps(rows))
    heads = [
        MeasureRow("segmentation", "decoder, frozen", name, "mIoU (%)", mean, 0.5, 3)
        for name, mean in (("pretrained", 30.0), ("untrained", 20.0))
    ]
    write_measures(tmp_path / "segmentation.json", heads)
    text = results_page.page([], None, results_page.read_transfer(tmp_path))
    assert "| 5 a class | 20.0 ± 1.0 | 25.0 ± 1.2 |  | 27.0 ± 2.0 |" in text
    assert "| 10 % of all |  | 40.0 ± 0.0 |  |  |" in text
    assert "| decoder, frozen | 30.0 ± 0.5 | 20.0 ± 0.5 |" in text
