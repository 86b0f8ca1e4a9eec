"""A model on a device with a batch of images, and the steps that can be run on it."""

import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from functools import cached_property

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from backfold.backbone import feature_map, use_plain_attention
from backfold.energy import EnergyModel
from backfold.finite_difference import finite_difference_losses
from backfold.pretext.masking import Masking
from backfold.restoration import restoration_losses
from backfold.sparse import running_tokens, token_size
from backfold.training.stepper import RestorationTraining
from step_cost.measuring import Step
from step_cost.models import Model
from step_cost.variants import Method, Variant

MASK_RATIO = 0.75
HIDDEN_SHARE = 1 / 3
NUM_CLASSES = 1000


class Classifier(nn.Module):
    """The ordinary step: mean over positions, one linear layer, cross-entropy of random labels."""

    def __init__(self, backbone: nn.Module, num_features: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = nn.Linear(num_features, NUM_CLASSES)

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        """The mean loss of images with labels (batch,)."""
        return F.cross_entropy(self.head(feature_map(self.backbone, images).mean(dim=1)), labels)


class Workload:
    """A model on a device with a batch; makes its variants, which share weights where they can.

    Masks and corrupted images are drawn here once. MAE draws its masks in its own forward pass.
    """

    def __init__(self, model: Model, batch: int, device: torch.device, seed: int = 0) -> None:
        torch.manual_seed(seed)
        self.model, self.batch, self.device = model, batch, device
        self.energy = EnergyModel(
            model.backbone, image_size=model.image_size, backbone_options=model.options, seed=seed
        ).to(device)
        # A restoration's attention becomes plain for good; the forward pass keeps its fused one.
        self.fused = copy.deepcopy(self.energy)
        self.generator = torch.Generator(device).manual_seed(seed)
        shape = (batch, 3, model.image_size, model.image_size)
        self.images = torch.randn(shape, generator=self.generator, device=device)
        self.labels = torch.randint(NUM_CLASSES, (batch,), generator=self.generator, device=device)
        self.dense = self._task(1.0)(self.images, self.generator)

    def _task(self, hidden_share: float) -> Masking:
        return Masking(MASK_RATIO, self.model.mask_size, hidden_share=hidden_share)

    @cached_property
    def classifier(self) -> Classifier:
        """The ordinary step's model."""
        # A copy: the energy's batch norms stay on fixed statistics, an ordinary step's do not.
        backbone = copy.deepcopy(self.fused.backbone)
        made = Classifier(backbone, self.energy.head.weight.shape[-1])
        return made.to(self.device).train()

    @cached_property
    def plain_classifier(self) -> Classifier:
        """The same without fused attention."""
        made = copy.deepcopy(self.classifier)
        use_plain_attention(made)
        return made

    @cached_property
    def mae(self) -> nn.Module:
        """The masked autoencoder with this backbone as its encoder."""
        from step_cost import rivals

        made = rivals.masked_autoencoder(self.model, self.energy.backbone, MASK_RATIO)
        return made.to(self.device)

    @cached_property
    def simmim(self) -> nn.Module:
        """SimMIM with this backbone."""
        from step_cost import rivals

        return rivals.simmim(self.model, self.energy.backbone).to(self.device)

    def _autocast(self, variant: Variant) -> AbstractContextManager[object]:
        enabled = variant.precision == "bf16"
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=enabled)

    def step(self, variant: Variant) -> Step:
        """Forward and backward to all parameters; for "masking" and "forward" only that."""
        makers: dict[Method, Callable[[Variant], Step]] = {
            "masking": self._masking,
            "forward": self._forward,
            "ordinary": self._ordinary,
            "ordinary-plain": self._ordinary_plain,
            "mae": self._mae,
            "simmim": self._simmim,
            "exact": self._exact,
            "sparse": self._sparse,
            "finite-difference": self._finite_difference,
        }
        return makers[variant.method](variant)

    def _masking(self, _: Variant) -> Step:
        task = self._task(1.0)

        def step() -> None:
            task(self.images, self.generator)

        return step

    @staticmethod
    def _compiled(function: Callable[..., Tensor], whole: bool = True) -> Callable[..., Tensor]:
        return torch.compile(function, fullgraph=whole, dynamic=False)

    def _forward(self, variant: Variant) -> Step:
        energy = self._compiled(self.fused) if variant.compiled else self.fused

        def step() -> None:
            with torch.no_grad(), self._autocast(variant):
                energy(self.images)

        return step

    def _ordinary(self, variant: Variant) -> Step:
        return self._loss_step(variant, self.classifier, self.images, self.labels)

    def _ordinary_plain(self, variant: Variant) -> Step:
        return self._loss_step(variant, self.plain_classifier, self.images, self.labels)

    def _mae(self, variant: Variant) -> Step:
        model = self.mae
        return self._loss_step(variant, lambda images: model(images).loss, self.images, whole=False)

    def _simmim(self, variant: Variant) -> Step:
        from step_cost import rivals

        model = self.simmim
        hidden = rivals.simmim_mask(model, self.dense.loss_mask)
        return self._loss_step(
            variant, lambda images, mask: model(images, mask).loss, self.images, hidden, whole=False
        )

    def _loss_step(
        self, variant: Variant, loss: Callable[..., Tensor], *inputs: Tensor, whole: bool = True
    ) -> Step:
        """Forward and backward of a loss; ``whole`` asks for one graph when compiled."""
        called = self._compiled(loss, whole) if variant.compiled else loss

        def step() -> None:
            with self._autocast(variant):
                value = called(*inputs)
            value.backward()

        return step

    def _exact(self, variant: Variant) -> Step:
        return self._restoration(variant, self.dense.corrupted, self.dense.loss_mask, None)

    def _sparse(self, variant: Variant) -> Step:
        sparse = self._task(HIDDEN_SHARE)(self.images, self.generator)
        assert sparse.running is not None
        size = (self.model.image_size, self.model.image_size)
        tokens = running_tokens(sparse.running, token_size(self.energy.backbone), size)
        return self._restoration(variant, sparse.corrupted, sparse.loss_mask, tokens)

    def _restoration(
        self, variant: Variant, corrupted: Tensor, loss_mask: Tensor, tokens: Tensor | None
    ) -> Step:
        training = RestorationTraining(self.energy, 1.0, compiled=variant.compiled)

        def restore(points: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            with self._autocast(variant):
                return training(points, self.images, loss_mask, tokens)

        return lambda: _backward_each(restoration_losses(restore, corrupted, variant.num_steps))

    def _finite_difference(self, variant: Variant) -> Step:
        energy = self._compiled(self.fused) if variant.compiled else self.fused
        corrupted, loss_mask = self.dense.corrupted, self.dense.loss_mask

        def step() -> None:
            losses = finite_difference_losses(energy, corrupted, self.images, loss_mask, 1.0)
            _backward_each(losses)

        return step

    def clear_gradients(self) -> None:
        """Set all gradients to None, as before every step."""
        for module in vars(self).values():
            if isinstance(module, nn.Module):
                module.zero_grad(set_to_none=True)


def _backward_each(losses: Iterator[tuple[Tensor, Tensor, Tensor]]) -> None:
    for loss, _, _ in losses:
        loss.backward()
