"""What a contender is to the race: something that takes steps and has a timm backbone inside."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal, Protocol

from lightning.fabric import Fabric
from torch import Tensor, nn
from torch.optim import Optimizer

from backfold.data.augmentation import Augmentation
from backfold.data.statistics import ChannelStatistics
from backfold.training.optimizer import OptimizerSettings, build_optimizer, build_schedule
from backfold.training.stepper import step_seed
from racing.sizes import BackboneSpec
from racing.views import Order, crops

Attention = Literal["fused", "plain"]
WEIGHT_DECAY = 0.05


@dataclass(frozen=True)
class Setting:
    """All that the contenders have in common.

    Attributes:
        backbone: which one.
        images: uint8, (images, channels, height, width), what is pretrained on.
        image_size: side in pixels.
        statistics: normalise the images.
        batch: images in a step.
        total_steps: of the run.
        warmup_share: of the run's steps.
        lr: highest of the schedule.
        seed: of weights, order, crops and corruption.
        fabric: device and precision.
        attention: "fused" kernels, or "plain" matrix products; the energy's is always plain.
        workers: processes that make contrastive views.
        compiled: run steps under torch.compile.
    """

    backbone: BackboneSpec
    images: Tensor
    image_size: int
    statistics: ChannelStatistics
    batch: int
    total_steps: int
    warmup_share: float
    lr: float
    seed: int
    fabric: Fabric
    attention: Attention = "fused"
    workers: int = 0
    compiled: bool = False

    @property
    def order(self) -> Order:
        """Which images each step sees."""
        return Order(len(self.images), self.batch, self.seed)

    def optimizer_settings(
        self, betas: tuple[float, float], max_gradient_norm: float
    ) -> OptimizerSettings:
        """AdamW with this setting's learning rate, whatever the batch size scales it by."""
        return OptimizerSettings(
            base_lr=self.lr * 256 / self.batch,
            weight_decay=WEIGHT_DECAY,
            betas=betas,
            warmup_epochs=self.warmup_share * self.total_steps / self.order.steps_per_epoch,
            max_gradient_norm=max_gradient_norm,
        )


class Method(Protocol):
    """A pretraining in progress.

    Attributes:
        module: everything that has weights.
        optimizer: of these weights.
    """

    module: nn.Module
    optimizer: Optimizer

    def batches(self, steps: range) -> Iterator[Tensor]:
        """What each step is given, on the device."""

    def step(self, batch: Tensor, step: int) -> Tensor:
        """One optimizer step; returns the loss, detached."""

    def backbone(self) -> Mapping[str, Tensor]:
        """The backbone's weights under timm's names."""


class Rival(ABC):
    """Loss, backward pass, clipping and update, as for any model that returns its loss.

    What the loss is, and which weights are the backbone's, is left to the subclass.

    Args:
        setting: of the race.
        module: everything that has weights.
        betas: of AdamW.
        max_gradient_norm: 0 clips nothing.
    """

    def __init__(
        self,
        setting: Setting,
        module: nn.Module,
        betas: tuple[float, float],
        max_gradient_norm: float,
    ) -> None:
        self.setting = setting
        self.module = module.to(setting.fabric.device).train()
        settings = setting.optimizer_settings(betas, max_gradient_norm)
        self.max_gradient_norm = max_gradient_norm
        self.optimizer = build_optimizer(self.module, settings, setting.batch)
        self.schedule = build_schedule(
            self.optimizer, settings, setting.total_steps, setting.order.steps_per_epoch
        )
        if setting.compiled:
            self.module.compile()

    def batches(self, steps: range) -> Iterator[Tensor]:
        """See `Method`."""
        return crop_batches(self.setting, Augmentation(), steps)

    @abstractmethod
    def loss(self, batch: Tensor, seed: int) -> Tensor:
        """Of images from 0 to 1; all that is random in it comes from the seed."""

    @abstractmethod
    def backbone(self) -> Mapping[str, Tensor]:
        """See `Method`."""

    def step(self, batch: Tensor, step: int) -> Tensor:
        """See `Method`."""
        self.schedule.step_update(step)
        self.optimizer.zero_grad(set_to_none=True)
        with self.setting.fabric.autocast():
            loss = self.loss(batch, step_seed(self.setting.seed, step, 0))
        loss.backward()
        if self.max_gradient_norm:
            nn.utils.clip_grad_norm_(self.module.parameters(), self.max_gradient_norm)
        self.optimizer.step()
        return loss.detach()


def crop_batches(setting: Setting, augmentation: Augmentation, steps: range) -> Iterator[Tensor]:
    """Augmented images from 0 to 1 for each step, on the images' device."""
    for step in steps:
        chosen = setting.images[setting.order(step).to(setting.images.device)]
        seed = step_seed(setting.seed, step, 3)
        yield crops(chosen.to(setting.fabric.device), setting.image_size, augmentation, seed)
