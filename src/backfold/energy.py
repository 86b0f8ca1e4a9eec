"""The energy function: a vision backbone with one bias-free head, images -> one scalar an image.

Lower means more plausible (Wang et al., ICLR 2023, arXiv 2302.01384). The energy is summed over the
positions of the feature map, so that the gradient at a pixel does not shrink as images grow, and
the head is scaled at construction so that this gradient is about as large as the pixels are: a step
size of 1 then fits every backbone and resolution.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any, Self

import torch
from torch import Tensor, nn

from backfold.backbone import (
    ImageSize,
    balance_positions,
    check_image_size,
    create_backbone,
    default_image_size,
    feature_map,
)
from backfold.batch_norm import batch_norms, measure_batch_norm
from backfold.conditional import Context, hidden, visible
from backfold.invariance import Projector
from backfold.layers import make_twice_differentiable
from backfold.pretext.corruption import Corruption
from backfold.restoration import EnergyFn, at_least_float32, energy_gradient, eval_mode
from backfold.sparse import check_sparse, running_tokens, sparse_feature_map

CALIBRATION_BATCH = 8


class LinearHead(nn.Module):
    """E = sum over positions of w . f. No bias: the energy's gradient would not depend on it."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(num_features) / num_features**0.5)

    def forward(self, features: Tensor) -> Tensor:
        """(batch, positions, features) -> (batch,), in float32 or better."""
        # Not a matrix product: autocast would bring that back to half precision.
        return (at_least_float32(features) * self.weight).sum(dim=(1, 2))


class EnergyModel(nn.Module):
    """Backbone and head: ``(batch, channels, height, width) -> (batch,)``.

    Batch normalisation always uses its running statistics, in training too, so that each image's
    energy and gradient depend on that image alone. They are measured once, by `calibrate`.

    Args:
        backbone: a timm model's name (random weights), or any module that gives a feature map. A
            module keeps its weights: only the head is scaled.
        image_size: (height, width) or one number, in pixels; None takes the backbone's own.
        channels: channels of the images.
        second_head: have another such head, ``second_head``, for what hidden patches shall be
            restored to beside their pixels; it is None otherwise.
        hidden_blocks: how many of the last blocks hidden patches run through; see
            `backfold.conditional`.
        projector: have one, for `backfold.invariance`; it is None otherwise.
        backbone_options: further keyword arguments for timm.
        seed: of the head's weights and of the images for the first calibration.

    Raises:
        UserError: an unknown backbone, or an image size that the backbone can't take.
    """

    def __init__(
        self,
        backbone: str | nn.Module,
        *,
        image_size: int | ImageSize | None = None,
        channels: int = 3,
        second_head: bool = False,
        hidden_blocks: int = 1,
        projector: bool = False,
        backbone_options: Mapping[str, Any] | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.hidden_blocks = hidden_blocks
        size = (image_size, image_size) if isinstance(image_size, int) else image_size
        if isinstance(backbone, str):
            self.backbone = create_backbone(backbone, size, channels, backbone_options)
        else:
            self.backbone = backbone
            make_twice_differentiable(backbone)
        size = size or default_image_size(getattr(self.backbone, "pretrained_cfg", None))
        if not isinstance(backbone, str):
            check_image_size(backbone, size, channels, type(backbone).__name__)
        parameter = next(self.backbone.parameters(), torch.zeros(()))
        with eval_mode(self.backbone), torch.random.fork_rng(devices=[]):
            # torch.manual_seed would seed CUDA too, which fork_rng does not put back here.
            torch.default_generator.manual_seed(seed)
            images = torch.randn(CALIBRATION_BATCH, channels, *size).to(parameter)
            if isinstance(backbone, str):
                balance_positions(self.backbone, images)
            with torch.no_grad():
                num_features = feature_map(self.backbone, images[:2]).shape[-1]
            self.head = LinearHead(num_features).to(parameter)
            self.second_head = LinearHead(num_features).to(parameter) if second_head else None
            self.projector = Projector(num_features).to(parameter) if projector else None
            self.calibrate(images, batch_norm=isinstance(backbone, str))
        self.train()

    def forward(
        self,
        images: Tensor,
        tokens: Tensor | None = None,
        context: Context | None = None,
        normalised: Tensor | None = None,
    ) -> Tensor:
        """Energies ``(batch,)`` of normalised images.

        Args:
            images: (batch, channels, height, width).
            tokens: int64, (batch, tokens); only these patch tokens run and are summed over. The
                backbone must be one that `backfold.sparse.check_sparse` accepts.
            context: of visible patches; the ``tokens`` are hidden ones then, whose energy is that
                given the context.
            normalised: bool, as ``tokens``; these hidden patches' energies are the second head's.
        """
        if tokens is None:
            features = feature_map(self.backbone, images)
        elif context is None:
            features = sparse_feature_map(self.backbone, images, tokens)
        else:
            features = hidden(self.backbone, images, tokens, context, self.hidden_blocks)
        energies: Tensor
        if normalised is None:
            energies = self.head(features)
        else:
            assert self.second_head is not None
            chosen, others = (features * mask[:, :, None] for mask in (normalised, ~normalised))
            energies = self.head(others) + self.second_head(chosen)
        return energies

    def given(
        self,
        images: Tensor,
        tokens: Tensor | None = None,
        visible_tokens: Tensor | None = None,
        normalised: Tensor | None = None,
    ) -> partial[Tensor]:
        """The energy as a function of images alone; arguments are those of `RunningTokens`.

        With ``visible_tokens`` the conditional one, whose context is these images' visible patches.
        """
        if visible_tokens is None:
            return partial(self, tokens=tokens)
        context = visible(self.backbone, images, visible_tokens)
        return partial(self, tokens=tokens, context=context, normalised=normalised)

    def projected(
        self, images: Tensor, tokens: Tensor | None = None, context: Context | None = None
    ) -> Tensor:
        """The mean of each image's features through the projector: (batch, width).

        Arguments are those of `forward`; where there is a context, its features are visible ones'.
        """
        assert self.projector is not None
        if context is not None:
            backbone = check_sparse(self.backbone)
            features = backbone.norm(context.tokens)[:, backbone.num_prefix_tokens :]
        elif tokens is not None:
            features = sparse_feature_map(self.backbone, images, tokens)
        else:
            features = feature_map(self.backbone, images)
        projected: Tensor = self.projector(features.mean(dim=1))
        return projected

    @torch.no_grad()
    def of(self, corruption: Corruption) -> EnergyFn:
        """As `given`, of a whole corruption in eval mode, all of it by the first head."""
        images = corruption.corrupted
        tokens, visible_tokens, _ = running_tokens(
            corruption.running, self.backbone, (images.shape[2], images.shape[3])
        )
        with eval_mode(self):
            return self.given(images, tokens, visible_tokens)

    def train(self, mode: bool = True) -> Self:
        """As `nn.Module.train`, but batch normalisation stays in eval mode."""
        super().train(mode)
        for norm in batch_norms(self.backbone):
            norm.eval()
        return self

    def calibrate(
        self, images: Tensor, batch_norm: bool = True, energy_fn: EnergyFn | None = None
    ) -> None:
        """Scale the head so that its energy gradient's root mean square on these images is 1.

        A second head gets the norm of the first.

        Args:
            images: normalised (zero mean, unit deviation), as the energy will see them.
            batch_norm: also set the running statistics of batch normalisation to these images'.
            energy_fn: what is differentiated, as `of` gives it; None takes whole images. Pixels
                that it does not read, whose gradient is zero, do not count.
        """
        with eval_mode(self):
            if batch_norm:
                measure_batch_norm(self.backbone, images)
            _, gradient = energy_gradient(energy_fn or self, images)
        scale = gradient[gradient != 0].float().square().mean().sqrt()
        if torch.isfinite(scale) and scale > 0:
            with torch.no_grad():
                self.head.weight.div_(scale)
                if self.second_head is not None:
                    other = self.second_head.weight
                    other.copy_(other * self.head.weight.norm() / other.norm())
