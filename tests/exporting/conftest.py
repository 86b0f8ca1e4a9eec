from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from backfold.files import write_json
from backfold.training.config import PretrainConfig, config_to_dict
from backfold.training.run import RunFolder, build_energy, save_checkpoint

# timm name, options, image size.
SWIN = {"embed_dim": 12, "depths": [1, 1], "num_heads": [1, 2], "window_size": 4}
VIT = {"patch_size": 7, "embed_dim": 16, "depth": 1, "num_heads": 2}
MODELS: dict[str, tuple[str, dict[str, Any], int]] = {
    "vit": ("vit_tiny_patch16_224", VIT, 28),
    "convnext": ("convnext_atto", {"depths": [1, 1, 1, 1], "dims": [8, 16, 24, 32]}, 64),
    "swin": ("swin_tiny_patch4_window7_224", SWIN, 32),
    "resnet": ("resnet10t", {"channels": [8, 16, 24, 32]}, 32),
}


@pytest.fixture
def make_run(tmp_path) -> Callable[..., Path]:
    folder = RunFolder(tmp_path / "run")

    def make(model: str = "vit", channels: int = 3) -> Path:
        """The folder of a run whose weights are noise, norms and batch norms included."""
        backbone, options, size = MODELS[model]
        made = {"backbone": backbone, "backbone_options": options, "image_size": size}
        data = Path("/home/somebody/pictures")
        config = PretrainConfig(data=data, out=folder.root, channels=channels, **made)
        energy = build_energy(config, channels)
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in energy.parameters():
                parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
        content = {
            "state": {"step": 7},
            "config": config_to_dict(config),
            "channels": channels,
            "image_size": [size, size],
            "mean": [0.3, 0.4, 0.5][:channels],
            "std": [0.2, 0.25, 0.3][:channels],
            "model": energy.state_dict(),
        }
        save_checkpoint(folder.last_checkpoint, content)
        folder.config.write_text("backbone: a run has its settings beside it")
        write_json(folder.facts, {"data": "/home/somebody/pictures", "training_images": 123})
        return folder.root

    return make


@pytest.fixture
def pixels() -> Callable[..., torch.Tensor]:
    def make(count: int, channels: int = 3, size: tuple[int, int] = (28, 28)) -> torch.Tensor:
        """Images in [0, 1]."""
        return torch.rand(count, channels, *size, generator=torch.Generator().manual_seed(count))

    return make
