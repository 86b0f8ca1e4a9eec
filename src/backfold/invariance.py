"""Two crops of an image embed alike: a small loss beside restoration, without a teacher or a queue.

Variance, invariance and covariance (VICReg; Bardes, Ponce and LeCun, ICLR 2022): the embeddings of
two views come together (invariance) while each of their features keeps a spread over the images
(variance) and says what no other says (covariance).
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from backfold.restoration import at_least_float32

WIDTH = 512
INVARIANCE, VARIANCE, COVARIANCE = 25.0, 25.0, 1.0  # the paper's, section 4.2
SMALLEST_VARIANCE = 1e-4


class Projector(nn.Sequential):
    """Two layers on the mean visible token; they serve the loss and are thrown away."""

    def __init__(self, num_features: int) -> None:
        super().__init__(nn.Linear(num_features, WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH))


def vicreg_loss(embeddings: Tensor) -> Tensor:
    """The loss of a batch's projected embeddings, (images, features), 0 or more.

    Images 0 and 1 are two views of one image, 2 and 3 of the next, and so on: four or more.
    """
    one, other = (at_least_float32(embeddings)[view::2] for view in (0, 1))
    loss = INVARIANCE * F.mse_loss(one, other)
    with torch.autocast(embeddings.device.type, enabled=False):
        for views in (one, other):
            centred = views - views.mean(dim=0)
            covariance = centred.mT @ centred / (len(views) - 1)
            variance = covariance.diagonal()
            spread = F.relu(1 - (variance + SMALLEST_VARIANCE).sqrt()).mean()
            shared = (covariance.square().sum() - variance.square().sum()) / views.shape[1]
            loss = loss + VARIANCE * spread / 2 + COVARIANCE * shared
    return loss


def of_all_processes(embeddings: Tensor) -> Tensor:
    """The embeddings of all processes' images, one process after the other, with their graph."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return embeddings
    from torch.distributed.nn.functional import all_gather

    return torch.cat(list(all_gather(embeddings)))
