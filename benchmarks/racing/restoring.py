"""Backfold's own step, built as `backfold.training.trainer` builds it, on the race's images."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from backfold.batch_norm import refresh_batch_norm
from backfold.restoration import eval_mode
from backfold.training.config import PretrainConfig, build_tasks, combine_tasks, watched_tasks
from backfold.training.config_file import config_from_dict, config_to_dict
from backfold.training.optimizer import freeze_unreachable
from backfold.training.setup import build_energy, calibrate
from backfold.training.stepper import Stepper
from racing.methods import Setting, crop_batches

CHANNELS = 3
CALIBRATION_IMAGES = 512
REFRESH_IMAGES = 1024
BETAS, MAX_GRADIENT_NORM = (0.9, 0.95), 1.0  # the product's defaults

Recipe = Mapping[str, Any]


def merged(settings: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Nested settings with some of them changed."""
    result = dict(settings)
    for name, value in changes.items():
        inner = result.get(name)
        nested = isinstance(value, Mapping) and isinstance(inner, Mapping) and bool(inner)
        result[name] = merged(inner, value) if nested else value
    return result


def recipe_config(setting: Setting, recipe: Recipe) -> PretrainConfig:
    """The product's settings for a recipe.

    Args:
        setting: of the race; its learning rate, warm-up, seed and backbone count.
        recipe: what differs from the product's defaults, nested as in a YAML file. An
            ``optimizer.base_lr`` in it would not be raced as the others are, and has no effect.

    Raises:
        UserError: unknown settings.
    """
    spec = setting.backbone
    base = PretrainConfig(
        backbone=spec.name,
        backbone_options=dict(spec.options),
        image_size=setting.image_size,
        channels=CHANNELS,
        batch_size=setting.batch,
        seed=setting.seed,
        compile=setting.compiled,
        optimizer=setting.optimizer_settings(BETAS, MAX_GRADIENT_NORM),
    )
    side = spec.mask_size
    sized = {
        "tasks": {
            "masking": {"mask_patch_size": side},
            "sorting": {"sorting_patch_size": side},
            "excerpt": {"excerpt_patch_size": side},
        }
    }
    changed = merged(merged(config_to_dict(base), sized), recipe)
    changed["optimizer"]["base_lr"] = base.optimizer.base_lr
    return config_from_dict(changed)


class Restoring:
    """The energy's pretraining; see `racing.methods.Method`.

    Args:
        setting: of the race.
        recipe: see `recipe_config`.
    """

    def __init__(self, setting: Setting, recipe: Recipe) -> None:
        self.setting, self.config = setting, recipe_config(setting, recipe)
        tasks = build_tasks(self.config, CHANNELS)
        energy = build_energy(self.config, CHANNELS).to(setting.fabric.device)
        images = self._clean(CALIBRATION_IMAGES)
        calibrate(energy, watched_tasks(tasks), images)
        freeze_unreachable(energy, images[:2], self.config.plausibility_weight)
        self.stepper = Stepper(
            self.config,
            energy,
            combine_tasks(self.config, tasks),
            setting.statistics,
            setting.fabric,
            setting.total_steps,
            setting.order.steps_per_epoch,
        )
        if setting.compiled and self.stepper.restoration is not None:
            self.stepper.restoration.compile_step()
        self.module, self.optimizer = energy.train(), self.stepper.optimizer

    def _clean(self, count: int) -> Tensor:
        images = self.setting.images[:count].to(self.setting.fabric.device)
        return self.setting.statistics.normalize(images)

    def batches(self, steps: range) -> Iterator[Tensor]:
        """See `Method`."""
        return crop_batches(self.setting, self.config.augmentation, steps)

    def step(self, batch: Tensor, step: int) -> Tensor:
        """See `Method`."""
        loss, _, _ = self.stepper(batch, step)
        return loss.detach()

    def backbone(self) -> Mapping[str, Tensor]:
        """See `Method`; batch norms are measured anew, as the product's export does."""
        with eval_mode(self.module), torch.no_grad():
            kept = {name: t.detach().clone() for name, t in self.module.state_dict().items()}
            refresh_batch_norm(self.module.backbone, [self._clean(REFRESH_IMAGES)])
            state = self.module.backbone.state_dict()
            exported = {name: tensor.detach().clone() for name, tensor in state.items()}
            self.module.load_state_dict(kept)
        return exported
