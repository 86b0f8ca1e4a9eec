"""SimCLR with lightly's head, loss and augmentation, on the timm backbone itself."""

from collections.abc import Iterator, Mapping

import torch
from lightly.loss import NTXentLoss
from lightly.models.modules.heads import SimCLRProjectionHead
from torch import Tensor, nn

from backfold.backbone import feature_map, use_plain_attention
from racing.methods import Rival, Setting
from racing.views import ContrastivePairs, contrastive_batches

# Of SimCLR's paper for CIFAR-10, and for larger images.
SMALL_TEMPERATURE, LARGE_TEMPERATURE = 0.5, 0.1
SMALL_SIDE = 64
OUTPUT = 128
BETAS = (0.9, 0.999)


class Projected(nn.Module):
    """The mean of the feature map, projected."""

    def __init__(self, backbone: nn.Module, width: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = SimCLRProjectionHead(width, 4 * width, OUTPUT)

    def forward(self, images: Tensor) -> Tensor:
        """(images, OUTPUT) in float32."""
        projected: Tensor = self.head(feature_map(self.backbone, images).mean(dim=1))
        return projected.float()


class Contrastive(Rival):
    """SimCLR (Chen et al., ICML 2020); both views pass the backbone as one batch."""

    def __init__(self, setting: Setting) -> None:
        size = setting.image_size
        backbone = setting.backbone.build(size, setting.seed)
        if setting.attention == "plain":
            use_plain_attention(backbone)
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(setting.seed)
            projected = Projected(backbone, backbone.num_features)
        temperature = SMALL_TEMPERATURE if size <= SMALL_SIDE else LARGE_TEMPERATURE
        self.criterion = NTXentLoss(temperature)
        self.pairs = ContrastivePairs(setting.images.cpu(), size, setting.order)
        super().__init__(setting, projected, BETAS, 0.0)

    def batches(self, steps: range) -> Iterator[Tensor]:
        """See `Method`: (2, batch, channels, height, width)."""
        for batch in contrastive_batches(self.pairs, steps, self.setting.workers):
            yield batch.to(self.setting.fabric.device)

    def loss(self, batch: Tensor, seed: int) -> Tensor:
        """See `Rival`."""
        del seed  # all that is random is in the views
        images = self.setting.statistics.normalize(batch.flatten(0, 1))
        loss: Tensor = self.criterion(*self.module(images).chunk(2))
        return loss

    def backbone(self) -> Mapping[str, Tensor]:
        """See `Method`."""
        projected = self.module
        assert isinstance(projected, Projected)
        state = projected.backbone.state_dict()
        return {name: tensor.detach().clone() for name, tensor in state.items()}
