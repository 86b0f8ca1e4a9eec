"""Two crops of an image embed alike: a small loss beside restoration, without a teacher or a queue.

Variance, invariance and covariance (VICReg; Bardes, Ponce and LeCun, ICLR 2022): the embeddings of
two views come together (invariance) while each of their features keeps a spread over the images
(variance) and says what no other says (covariance).
"""

import torch
from torch import Tensor, distributed, nn
from torch.nn import functional as F

from backfold.restoration import at_least_float32

WIDTH = 512
INVARIANCE, VARIANCE, COVARIANCE = 25.0, 25.0, 1.0  # the paper's, section 4.2
SMALLEST_VARIANCE = 1e-4


class Projector(nn.Sequential):
    """Two layers on the mean feature; they serve the loss and are thrown away."""

    def __init__(self, num_features: int) -> None:
        # The loss does not see a shift of all embeddings.
        last = nn.Linear(WIDTH, WIDTH, bias=False)
        super().__init__(nn.Linear(num_features, WIDTH), nn.GELU(), last)


def vicreg_loss(embeddings: Tensor) -> Tensor:
    """The loss of a batch's projected embeddings, (images, features), 0 or more.

    Images 0 and 1 are two views of one image, 2 and 3 of the next, and so on. Of one image alone
    there is no spread, and its views need only agree.
    """
    one, other = (at_least_float32(embeddings)[view::2] for view in (0, 1))
    loss = INVARIANCE * F.mse_loss(one, other)
    if len(one) < 2:
        return loss
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
    """The embeddings of all processes' images, one process after the other.

    The gradient of this process's own is as many times as large as there are processes, as
    DistributedDataParallel takes the mean of gradients, of which each has its own images' share.
    """
    if not (distributed.is_available() and distributed.is_initialized()):
        return embeddings
    fixed, count = embeddings.detach().contiguous(), distributed.get_world_size()
    parts = [torch.empty_like(fixed) for _ in range(count)]
    distributed.all_gather(parts, fixed)
    parts[distributed.get_rank()] = fixed + count * (embeddings - fixed)
    return torch.cat(parts)
