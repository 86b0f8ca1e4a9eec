"""Training on the conditional energy: hidden patches one by one, two heads, two views alike."""

import copy
import math

import pytest
import torch
import yaml
from lightning.fabric import Fabric
from torch._dynamo.utils import counters

from backfold.cli.main import main
from backfold.conditional import hidden, visible
from backfold.data.loading import step_keys
from backfold.data.statistics import ChannelStatistics
from backfold.errors import UserError
from backfold.invariance import vicreg_loss
from backfold.pretext import Denoising, HiddenPatches, Masking, Sorting
from backfold.restoration import energy_gradient, eval_mode, training_step
from backfold.sparse import running_tokens
from backfold.training.autotune import gradient_distance
from backfold.training.config import OptimizerSettings, PretrainConfig, TaskSettings
from backfold.training.optimizer import freeze_unreachable
from backfold.training.pretrain import pretrain
from backfold.training.run import load_checkpoint, load_pretrained, save_checkpoint
from backfold.training.step import CompiledStep, RestorationTraining, Stepper, step_seed
from tiny_run import RESNET, seeded, tiny_energy

MASKING = Masking(0.75, 4, normalised_share=0.5)
TASK = HiddenPatches((MASKING, Sorting(4), Denoising()), (2.0, 1.0, 1.0), MASKING)
STATISTICS = ChannelStatistics((0.0,) * 3, (1.0,) * 3)


def make(**options):
    heads = {"second_head": True, **options}
    return tiny_energy(16, heads=heads, patch_size=4, embed_dim=12, depth=2)


def images_of(count=8):
    return torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def stepper(energy, task=TASK, **changes):
    config = PretrainConfig(
        batch_size=8, optimizer=OptimizerSettings(max_gradient_norm=0.0), **changes
    )
    fabric = Fabric(accelerator="cpu", devices=1, precision="32-true")
    return Stepper(config, energy, task, STATISTICS, fabric, total_steps=9, steps_per_epoch=3)


def one_by_one(energy, corruption, number, points):
    """The energy of one image, a sum over hidden patches that are run alone, each by its head."""
    running, one = corruption.running, slice(number, number + 1)
    tokens, seen, normalised = running_tokens(running, energy.backbone, (16, 16))
    context = visible(energy.backbone, points, seen[one])

    def energies(images):
        total = 0.0
        for token, second in zip(tokens[number], normalised[number], strict=True):
            given = images, torch.tensor([[token]]), context, energy.hidden_blocks
            head = energy.second_head if second else energy.head
            total = total + head(hidden(energy.backbone, *given))
        return total

    return energies


@pytest.mark.parametrize(
    "changes", [{}, {"num_steps": 2}, {"micro_batch": 3}, {"hidden_blocks": 2}], ids=str
)
def test_a_step_equals_hidden_patches_run_one_by_one(changes):
    energy, images = make(hidden_blocks=changes.get("hidden_blocks", 1)), images_of()
    twin, steps = copy.deepcopy(energy), changes.get("num_steps", 1)
    loss, _ = stepper(energy, **changes).accumulate(images, 3)
    corruption, total = TASK(images, seeded(step_seed(0, 3, 0))), 0.0
    for number in range(8):
        one = slice(number, number + 1)
        points = corruption.corrupted[one]
        for _ in range(steps):
            more, points, _ = training_step(
                one_by_one(twin, corruption, number, points),
                points, corruption.target[one], corruption.loss_mask[one],
            )  # fmt: skip
            total = total + more / steps / 8
    total.backward()
    assert float(loss) == pytest.approx(total.item(), rel=1e-5)
    for own, other in zip(energy.parameters(), twin.parameters(), strict=True):
        if own.grad is not None and other.grad is not None:
            torch.testing.assert_close(own.grad, other.grad, rtol=1e-3, atol=1e-6)
    assert energy.second_head.weight.grad.abs().min() > 0
    assert energy.head.weight.grad.abs().min() > 0


def test_gains_count_the_patches_that_are_restored_to_pixels():
    energy, images = make(), images_of()
    _, _, last = stepper(energy)(images, 0)
    pixels = (last.corruption.target == images).all(dim=1, keepdim=True) & last.corruption.loss_mask
    assert pixels.sum() == 8 * 6 * 16
    before, after = (
        (((each - images).square() * pixels).sum(dim=(1, 2, 3))).tolist()
        for each in (last.corruption.corrupted, last.restored)
    )
    expected = [10 * math.log10(old / new) for old, new in zip(before, after, strict=True)]
    assert last.psnr_gain_db(torch.ones(3)) == pytest.approx(sum(expected) / 8, abs=1e-3)


def test_the_energy_gap_is_that_of_hidden_patches_given_the_visible_ones():
    energy, images = make(), images_of()
    _, _, last = stepper(energy)(images, 0)
    plain = copy.deepcopy(energy)
    plain.second_head = energy.head  # what restores pixels judges all
    gaps = []
    for number in range(8):
        one = slice(number, number + 1)
        function = one_by_one(plain, last.corruption, number, images[one])
        with torch.no_grad():
            corrupted, clean = function(last.corruption.corrupted[one]), function(images[one])
        gaps.append(float(corrupted - clean))
    assert last.energy_gap(energy) == pytest.approx(sum(gaps) / 8, rel=1e-4)


def test_calibration_makes_hidden_pixels_as_loud_as_they_are():
    energy, images = make(), images_of(64)
    made = TASK(images, seeded())
    energy.calibrate(made.corrupted, energy_fn=energy.of(made))
    with eval_mode(energy):
        _, gradient = energy_gradient(energy.of(made), made.corrupted)
    hidden = made.loss_mask.expand_as(gradient)
    assert gradient[hidden].square().mean().sqrt().item() == pytest.approx(1.0, rel=1e-3)
    assert not gradient[~hidden].any()
    norms = [head.weight.norm().item() for head in (energy.head, energy.second_head)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)


@pytest.mark.filterwarnings("ignore")  # what the compiler warns of is not ours
def test_the_compiled_step_has_the_same_gradients():
    torch._dynamo.reset()
    counters.clear()
    energy = make(projector=True)
    training, twin = (RestorationTraining(energy, 1.0, 0.0, True, invariance=0.1) for _ in "ab")
    training.compiled = step = CompiledStep(training.restore, backend="aot_eager")
    for seed in range(2):
        made = TASK(images_of(), seeded(seed))
        tokens = running_tokens(made.running, energy.backbone, (16, 16))
        inputs = made.corrupted, made.target, made.loss_mask, *tokens
        losses = [lambda i=inputs, t=each: t(*i)[0] for each in (training, twin)]
        assert gradient_distance(dict(energy.named_parameters()), *losses)[0] < 1e-4
    assert step.is_compiled
    assert counters["stats"]["unique_graphs"] == 1
    torch._dynamo.reset()


def test_every_weight_is_reached_but_the_last_norm_s_bias():
    energy = make(projector=True)
    made = TASK(images_of(2), seeded())
    frozen = freeze_unreachable(energy, made.corrupted, running=made.running)
    assert frozen == ["backbone.norm.bias"]


def test_views_agree_as_lightly_has_it():
    losses = pytest.importorskip("lightly.loss")
    embeddings = torch.randn(12, 5, dtype=torch.float64)
    expected = losses.VICRegLoss()(embeddings[0::2], embeddings[1::2])
    torch.testing.assert_close(vicreg_loss(embeddings), expected)
    alike = torch.randn(64, 1, 5).expand(-1, 2, -1).flatten(0, 1)
    assert vicreg_loss(alike) < vicreg_loss(alike[torch.randperm(128)])


@pytest.mark.parametrize("task", [TASK, Masking(0.75, 4), Masking(0.75, 4, hidden_share=0.5)])
def test_a_step_adds_the_views_loss_of_whole_pairs(task):
    """In micro-batches too, each of which holds whole pairs, and on the dense energy."""
    energy, images = make(projector=True), images_of(10)
    twin = copy.deepcopy(energy)
    loss, _ = stepper(energy, task, micro_batch=4, invariance=0.3).accumulate(images, 3)
    plain, _ = stepper(twin, task, micro_batch=4).accumulate(images, 3)
    made, total = task(images, seeded(step_seed(0, 3, 0))), 0.0
    for part in (slice(0, 4), slice(4, 8), slice(8, 10)):
        ran, seen, _ = running_tokens(made.running, twin.backbone, (16, 16))
        if task is TASK or ran is not None:  # what runs alone is what is visible of all that ran
            shown = (ran if seen is None else seen)[part]
            tokens = visible(twin.backbone, made.corrupted[part], shown).tokens
            tokens = twin.backbone.norm(tokens)
        else:
            tokens = twin.backbone.forward_features(made.corrupted[part])
        total = total + len(images[part]) / 10 * vicreg_loss(twin.projector(tokens[:, 1:].mean(1)))
    (0.3 * total).backward()  # adds to the gradient of restoration alone
    assert float(loss) == pytest.approx(float(plain) + 0.3 * total.item(), rel=1e-5)
    for own, other in zip(energy.parameters(), twin.parameters(), strict=True):
        if own.grad is not None and other.grad is not None:
            torch.testing.assert_close(own.grad, other.grad, rtol=1e-3, atol=1e-5)


def test_views_are_neighbours_in_the_batch_and_differ_in_their_changes():
    batches = list(step_keys(20, 4, 0, 0, 20, rank=1, world_size=2, views=2))
    for keys in batches:
        (first, second), (third, fourth) = keys[:2], keys[2:]
        assert first[1] == second[1] != third[1] == fourth[1]
        assert len(set(keys)) == 4
    plain = list(step_keys(20, 2, 0, 0, 20, rank=1, world_size=2))
    assert [[key[1] for key in keys[::2]] for keys in batches] == [
        [key[1] for key in keys] for keys in plain
    ]


def test_an_older_run_is_read_and_resumed_as_the_dense_one_it_was(tiny, quiet, tmp_path):
    """They knew no other energy, and some had a second head for whole images."""
    out = tmp_path / "run"
    folder = pretrain(tiny(out=out, energy="dense", max_steps=2), console=quiet)
    content = load_checkpoint(folder.last_checkpoint)
    written = yaml.safe_load(folder.config.read_text())
    for name in ("energy", "hidden_blocks", "invariance"):
        content["config"].pop(name)
        written.pop(name)
    content["config"] |= {"head": "linear"}
    for older in (content["config"], written):
        del older["augmentation"]["color_jitter"]
    save_checkpoint(folder.last_checkpoint, content)
    folder.config.write_text(yaml.safe_dump(written))
    assert main(["pretrain", "--resume", f"--out={out}"]) == 0
    pretrain(tiny(out=out, max_steps=3), console=quiet, resume=True)
    assert load_checkpoint(folder.last_checkpoint)["config"]["energy"] == "dense"
    with pytest.raises(UserError, match=r"last\.ckpt does not fit these settings: .*second_head"):
        pretrain(tiny(out=out, energy="conditional"), console=quiet, resume=True)
    content["config"]["tasks"]["exchange"] = {}
    content["model"]["second_head.weight"] = torch.ones(16)
    save_checkpoint(folder.last_checkpoint, content)
    run = load_pretrained(out)
    assert (run.config.energy, run.energy.second_head, run.step) == ("dense", None, 2)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({**RESNET, "tasks": TaskSettings(masking=Masking(mask_patch_size=8))}, "neither timm's"),
        ({"tasks": TaskSettings(masking=Masking(mask_patch_size=10))}, "mask_patch_size is 10"),
        ({"tasks": TaskSettings(masking=Masking(mask_patch_size=4))}, "give a multiple"),
        ({"hidden_blocks": 9}, "hidden_blocks is 9; give 1 to 1"),
        (
            {
                "pretext": "mixture",
                "plausibility_weight": 0.1,
                "tasks": TaskSettings(
                    Masking(mask_patch_size=7), mixture={"masking": 3, "identity": 1}
                ),
            },
            r"plausibility_weight 0\.1 needs the dense energy",
        ),
        ({"batch_size": 7, "invariance": 0.1}, "needs an even number of 4 or more"),
    ],
)
def test_what_it_can_t_do_is_dense_and_refused_where_it_is_asked_for(
    tiny, quiet, tmp_path, changes, reason
):
    if "tasks" in changes:
        given = {"out": tmp_path / "run", "max_steps": 1, "invariance": 0.1, **changes}
        folder = pretrain(tiny(**given), console=quiet)
        settings = load_checkpoint(folder.last_checkpoint)["config"]
        assert (settings["energy"], settings["invariance"]) == ("dense", 0.1)
        # What settings do to a backbone that could, is to be seen.
        level = "INFO" if changes.keys() & {"plausibility_weight", "backbone"} else "WARNING"
        assert f"{level} training the dense energy, whose steps cost more" in folder.log.read_text()
    with pytest.raises(UserError, match=reason):
        pretrain(tiny(out=tmp_path / "asked", energy="conditional", **changes), console=quiet)
    assert not (tmp_path / "asked").exists()
