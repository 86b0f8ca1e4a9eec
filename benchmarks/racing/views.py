"""Batches of augmented images, each decided by the seed and the step alone.

All contenders but the contrastive one see the same crops and flips of the same images at the same
step. The contrastive one has lightly's own, stronger augmentation: without it, it does not learn.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from lightly.transforms.simclr_transform import SimCLRTransform
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms.v2.functional import to_pil_image

from backfold.data.augmentation import Augmentation
from backfold.evaluation.batch_augmentation import crop_and_flip
from backfold.evaluation.seeding import seeded
from backfold.training.stepper import step_seed

# What lightly advises for small images.
SMALL_SIDE, SMALL_STRENGTH = 64, 0.5


@dataclass(frozen=True)
class Order:
    """Which images a step sees: each once an epoch, in an order of the seed and the epoch.

    Args:
        images: how many there are.
        batch: images in a step; an epoch's incomplete batch is left out.
        seed: of the order.
    """

    images: int
    batch: int
    seed: int

    @property
    def steps_per_epoch(self) -> int:
        """Whole batches in an epoch."""
        return self.images // self.batch

    def __call__(self, step: int) -> Tensor:
        """Indices, int64, (batch,)."""
        epoch, position = divmod(step, self.steps_per_epoch)
        generator = torch.Generator().manual_seed(step_seed(self.seed, epoch, 1))
        order = torch.randperm(self.images, generator=generator)
        return order[position * self.batch : (position + 1) * self.batch]


def crops(images: Tensor, image_size: int, augmentation: Augmentation, seed: int) -> Tensor:
    """Each image's own random resized crop, half of them mirrored.

    Args:
        images: uint8, (batch, channels, image_size, image_size), on any device.
        image_size: side of the images and of the results.
        augmentation: the product's; its smallest crop and its flip count.
        seed: of this batch.

    Returns:
        float32 from 0 to 1, as large as the images.
    """
    assert images.shape[-2:] == (image_size, image_size)
    smallest = augmentation.crop_scale[0] if augmentation.random_crop else 1.0
    with seeded(seed, images.device):
        views = crop_and_flip(images.float() / 255, smallest, augmentation.horizontal_flip)
    return views.clamp(0, 1)


class ContrastivePairs(Dataset[Tensor]):
    """Two views of each image of a step, by lightly's SimCLR transform.

    Args:
        images: uint8, (images, channels, height, width), on the CPU.
        image_size: side of the views.
        order: of the images.
    """

    def __init__(self, images: Tensor, image_size: int, order: Order) -> None:
        self.images, self.order = images, order
        small = image_size <= SMALL_SIDE
        self.transform = SimCLRTransform(
            input_size=image_size,
            cj_strength=SMALL_STRENGTH if small else 1.0,
            gaussian_blur=0.0 if small else 0.5,
            normalize=None,
        )

    def __getitem__(self, step: int) -> Tensor:
        """Float32 from 0 to 1, (2, batch, channels, image_size, image_size)."""
        with seeded(step_seed(self.order.seed, step, 2), torch.device("cpu")):
            pairs = [self.transform(to_pil_image(image)) for image in self.images[self.order(step)]]
        return torch.stack([torch.stack(views) for views in zip(*pairs, strict=True)])


def contrastive_batches(pairs: ContrastivePairs, steps: range, workers: int) -> Iterator[Tensor]:
    """The pairs of these steps, made ahead of time where there are workers."""
    loader: DataLoader[Tensor] = DataLoader(
        pairs, batch_size=None, sampler=steps, num_workers=workers, generator=torch.Generator()
    )
    yield from loader
