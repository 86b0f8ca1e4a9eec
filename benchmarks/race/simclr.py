"""SimCLR: lightly's views, projection head and loss on any timm backbone."""

from typing import Any

import torch
from lightly.loss import NTXentLoss
from lightly.models.modules import SimCLRProjectionHead
from lightly.transforms import SimCLRTransform
from torch import Tensor, nn
from torchvision.transforms.v2.functional import to_pil_image

from backfold.backbone import feature_map
from backfold.data.augmentation import Augmentation
from backfold.training.config import PretrainConfig, parse_image_size
from backfold.training.images import Images
from race.contest import fit, start

SMALL = 64  # pixels; up to here weaker colours and no blur, as lightly advises for CIFAR


def view_options(settings: PretrainConfig) -> dict[str, Any]:
    """Of lightly's transforms: the size, and the strengths that suit it; images stay in [0, 1]."""
    size = max(parse_image_size(settings.image_size) or (224, 224))
    small = {"cj_strength": 0.5, "gaussian_blur": 0.0} if size <= SMALL else {}
    return {"input_size": size, "normalize": None, **small}


class TwoViews(nn.Module):
    """The loss of two views of each image, both cut out of the normalised whole image."""

    augmentation = Augmentation(random_crop=False, horizontal_flip=False)

    def __init__(
        self, backbone: nn.Module, head: nn.Module, loss: nn.Module, views: Any, images: Images
    ) -> None:
        super().__init__()
        self.backbone, self.head, self.loss = backbone, head, loss
        self.views, self.statistics = views, images.statistics

    def forward(self, pixels: Tensor) -> Tensor:
        """Of images (batch, channels, height, width)."""
        whole = self.statistics.denormalize(pixels).clamp(0, 1).cpu()
        pairs = [self.views(to_pil_image(image)) for image in whole]
        batch = torch.cat([torch.stack(views) for views in zip(*pairs, strict=True)])
        normalised = self.statistics.normalize(batch.to(pixels.device))
        projected = self.head(feature_map(self.backbone, normalised).mean(dim=1))
        return self.loss(*projected.float().chunk(2))


def train(
    backbone_name: str, options: dict[str, Any], images: Images, settings: PretrainConfig
) -> nn.Module:
    """A timm backbone after SimCLR; goes on with a cut run in the settings' ``out``."""
    backbone: Any = start(backbone_name, options, images, settings)
    head = SimCLRProjectionHead(backbone.num_features, backbone.num_features)
    views = SimCLRTransform(**view_options(settings))
    return fit("simclr", TwoViews(backbone, head, NTXentLoss(), views, images), images, settings)
