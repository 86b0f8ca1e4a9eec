"""How far samples of a run's energy are from test images: Frechet distances.

    python benchmarks/samples.py --run runs/noise --data ../shared/data/cifar10

Beside them noise, a Gaussian with the mean and covariance of the training images' pixels, and
training images themselves. The features are those of a small network that learns the labels of
training images here, as no weights of Inception can be had offline: the numbers compare with each
other and with no one else's. Writes samples.json and samples.png.
"""

import argparse
import math
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics.image.fid import FrechetInceptionDistance
from torchvision.utils import save_image

import backfold
from backfold.data.open import open_source
from backfold.files import write_json
from step_cost.measuring import facts

FITTED_ON, BATCH, RATE, WIDTH = 10_000, 64, 3e-3, 128


def network(channels: int, classes: int) -> nn.Sequential:
    """Features (batch, WIDTH), then logits, of images in [0, 1]."""
    layers: list[nn.Module] = []
    for before, width, stride in (
        (channels, 32, 1),
        (32, 64, 2),
        (64, WIDTH, 2),
        (WIDTH, WIDTH, 2),
    ):
        layers += [nn.Conv2d(before, width, 3, stride, 1), nn.BatchNorm2d(width), nn.GELU()]
    features = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return nn.Sequential(features, nn.Linear(WIDTH, classes))


def learn(images: Tensor, labels: Tensor, epochs: int, device: torch.device) -> nn.Module:
    """The features of a network that learned the labels."""
    torch.manual_seed(0)
    model = network(images.shape[1], int(labels.max()) + 1).to(device)
    steps = epochs * (len(images) // BATCH)
    optimizer = torch.optim.AdamW(model.parameters(), RATE, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, steps)
    for _ in range(epochs):
        for chosen in torch.randperm(len(images)).split(BATCH)[: len(images) // BATCH]:
            logits = model(images[chosen].to(device) / 255)
            optimizer.zero_grad()
            F.cross_entropy(logits, labels[chosen].to(device)).backward()
            optimizer.step()
            schedule.step()
    features: nn.Module = model.eval()[0]
    features.num_features = WIDTH  # or torchmetrics asks by an image on the CPU
    return features


def gaussian(images: Tensor, count: int) -> Tensor:
    """Samples in [0, 1] of a Gaussian with the pixels' mean and covariance."""
    rows = images[:FITTED_ON].flatten(1).double() / 255
    centred = rows - rows.mean(dim=0)
    noise = torch.randn(
        count, len(rows), dtype=torch.float64
    )  # rows are mixed: no factor is needed
    mixed = noise @ centred / math.sqrt(len(rows))
    return (rows.mean(dim=0) + mixed).float().clamp(0, 1).view(count, *images.shape[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", type=Path, required=True, help="on the dense energy, of denoising")
    parser.add_argument("--data", required=True, help="labelled images of one size")
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--levels", type=int, default=50)
    parser.add_argument("--fresh-noise", type=float, default=0.5)
    parser.add_argument("--epochs", type=int, default=5, help="of the network of the features")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("results"))
    given = parser.parse_args()
    device = torch.device(given.device)
    sources = [open_source(given.data, split, labelled=True) for split in ("train", "test")]
    train, test = (torch.stack([each.read(at) for at in range(len(each))]) for each in sources)
    drawn = torch.Generator().manual_seed(0)  # folders come class by class
    orders = [torch.randperm(len(each), generator=drawn) for each in (train, test)]
    labels = torch.as_tensor(sources[0].labels)[orders[0]]
    train, test = train[orders[0]], test[orders[1]]
    features = learn(train, labels, given.epochs, device)
    run = backfold.load(given.run, device)
    parts = [
        run.sample(min(250, given.count - start), given.levels, given.fresh_noise, start)
        for start in range(0, given.count, 250)
    ]
    images = torch.cat(parts).cpu().clamp(0, 1)
    contenders = {
        "samples": images,
        "fitted Gaussian": gaussian(train, given.count),
        "noise": torch.rand(given.count, *train.shape[1:]),
        "training images": train[: given.count] / 255,
    }
    distance = FrechetInceptionDistance(
        features, reset_real_features=False, normalize=True, input_img_size=tuple(train.shape[1:])
    ).to(device)
    for batch in (test[:5000] / 255).split(250):
        distance.update(batch.to(device), real=True)
    found = {}
    for name, each in contenders.items():
        distance.reset()
        for batch in each.split(250):
            distance.update(batch.to(device), real=False)
        found[name] = float(distance.compute())
        print(f"{name}: {found[name]:.1f}", flush=True)
    known = facts(device) | {"run": given.run.name, "levels": given.levels}
    write_json(given.out / "samples.json", {**known, "count": given.count, "distance": found})
    save_image(images[:64], given.out / "samples.png", nrow=8)


if __name__ == "__main__":
    main()
