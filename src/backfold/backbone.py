"""Backbones: making them by their timm name, and reading their feature maps in one layout."""

import difflib
import inspect
import re
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import timm
import torch
from timm.models import PretrainedCfg
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from backfold.errors import UserError, first_line
from backfold.layers import make_twice_differentiable

ImageSize = tuple[int, int]


def create_backbone(
    name: str,
    image_size: ImageSize | None = None,
    channels: int = 3,
    options: Mapping[str, Any] | None = None,
) -> nn.Module:
    """A timm model without classifier and with random weights.

    Args:
        name: as in ``timm.list_models()``.
        image_size: (height, width) in pixels; None takes the size the model was designed for.
        channels: of the images.
        options: further keyword arguments of the model, such as ``depth`` or ``patch_size``.

    Raises:
        UserError: an unknown name, option or channel count, or a size that the model can't take.
    """
    if not timm.is_model(name):
        nearest = difflib.get_close_matches(name, timm.list_models(), n=3, cutoff=0.5)
        hint = f"; nearest: {', '.join(nearest)}" if nearest else ""
        raise UserError(f"unknown backbone {name!r}{hint}; `timm.list_models()` lists all")
    check_options(name, options or {})
    arguments = {"num_classes": 0, "in_chans": channels, **(options or {})}
    size = image_size or default_image_size(timm.get_pretrained_cfg(name))
    try:
        backbone = _create(name, size, arguments)
    except Exception as error:
        raise UserError(
            f"backbone {name!r} can't be built for {_describe(size)} pixels with "
            f"{arguments}: {first_line(error)}; change the image size or the backbone options"
        ) from error
    make_twice_differentiable(backbone)
    check_image_size(backbone, size, channels, name)
    return backbone


def check_options(name: str, options: Mapping[str, Any]) -> None:
    """Raise UserError for all but plain values for parameters of the architecture.

    Options come from settings, checkpoints and exported folders of anybody, and
    `timm.create_model` also takes addresses to download from and files to unpickle.
    """
    module = sys.modules[timm.models.model_entrypoint(name).__module__]
    known = {
        parameter
        for _, member in inspect.getmembers(module, inspect.isclass)
        if member.__module__.startswith("timm.")
        for parameter in inspect.signature(member.__init__).parameters
    } - {"self", "args", "kwargs", "device", "dtype"}
    for option, value in options.items():
        if option not in known or not _is_plain(value):
            nearest = difflib.get_close_matches(option, known, n=3)
            hint = f", such as {', '.join(nearest)}" if nearest else ""
            raise UserError(
                f"backbone option {option} is {value!r}; give parameters of {name!r}{hint}, as "
                "numbers, booleans, names, or lists of them"
            )


def _is_plain(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(map(_is_plain, value))
    if isinstance(value, Mapping):
        return all(map(_is_plain, (*value, *value.values())))
    if isinstance(value, str):
        return re.fullmatch(r"[\w.+-]*", value) is not None
    return value is None or isinstance(value, (bool, int, float))


def use_plain_attention(backbone: nn.Module) -> None:
    """Let timm's attention layers use matrix products and softmax, in place of fused kernels.

    The fused ones have no second derivative. PyTorch's MATH backend, to which they could fall back,
    does the same with more element-wise work.
    """
    for module in backbone.modules():
        if getattr(module, "fused_attn", False) is True:
            module.__dict__["fused_attn"] = False


def is_convolutional(backbone: nn.Module) -> bool:
    """Whether most weights are convolutions'."""
    convolutions = sum(
        module.weight.numel() for module in backbone.modules() if isinstance(module, nn.Conv2d)
    )
    return 2 * convolutions > sum(parameter.numel() for parameter in backbone.parameters())


def _create(name: str, size: ImageSize, arguments: dict[str, Any]) -> nn.Module:
    try:
        return timm.create_model(name, img_size=size, **arguments)
    except TypeError as error:
        if "img_size" not in str(error):
            raise
    return timm.create_model(name, **arguments)


def default_image_size(config: PretrainedCfg | Mapping[str, Any] | None) -> ImageSize:
    """(height, width) that a timm model was designed for; 224 x 224 where nothing says so."""
    known = config if isinstance(config, Mapping) else vars(config or PretrainedCfg())
    _, height, width = known.get("input_size") or (3, 224, 224)
    return height, width


def check_image_size(backbone: nn.Module, size: ImageSize, channels: int, name: str) -> None:
    """Run one black image through; raise UserError if the backbone can't take this size.

    Patches that do not tile the image are refused too: the border would never be restored.
    """
    if len(size) != 2 or min(size) < 1:
        raise UserError(
            f"image size {_describe(size)} is not a height and a width in pixels; "
            "give two numbers of 1 or more"
        )
    patch = _tiling_patch(backbone)
    if patch is not None and (size[0] % patch[0] or size[1] % patch[1]):
        raise UserError(
            f"image size {_describe(size)} is no multiple of the {_describe(patch)} patches of "
            f"{name!r}; give a multiple, or another patch size in the backbone options"
        )
    image = next(backbone.parameters(), torch.zeros(())).new_zeros(2, channels, *size)
    was_training = backbone.training
    try:
        with torch.no_grad():
            feature_map(backbone.eval(), image)
    except UserError:
        raise
    except Exception as error:
        raise UserError(
            f"backbone {name!r} can't take images of {channels} x {_describe(size)}: "
            f"{first_line(error)}; choose another image size or backbone"
        ) from error
    finally:
        backbone.train(was_training)


def _tiling_patch(backbone: nn.Module) -> ImageSize | None:
    """(height, width) of patches that must tile the image; None if they overlap or are padded."""
    embedding = getattr(backbone, "patch_embed", None)
    patch_size = getattr(embedding, "patch_size", None)
    if patch_size is None or getattr(embedding, "dynamic_img_pad", False):
        return None
    height, width = timm.layers.to_2tuple(patch_size)
    stride = getattr(getattr(embedding, "proj", None), "stride", (height, width))
    return (height, width) if tuple(stride) == (height, width) else None


@torch.no_grad()
def balance_positions(backbone: nn.Module, images: Tensor) -> None:
    """Scale learned absolute positions to the loudness of the patches that they are added to.

    timm starts them at a deviation of 0.02, some thirty times below the patches. The first norm
    then makes the energy all but blind to where a hidden patch lies, and masking and sorting take
    longer to start (measured: `docs/method.md`). Fixed sines, as masked autoencoders have them, are
    as loud as this. Backbones without ``pos_embed`` and ``patch_embed`` are left alone; the images
    are of unit variance, (batch, channels, height, width).
    """
    positions = getattr(backbone, "pos_embed", None)
    patch_embed = getattr(backbone, "patch_embed", None)
    if not isinstance(positions, nn.Parameter) or not isinstance(patch_embed, nn.Module):
        return
    patches = patch_embed(images)
    loudness = positions.square().mean().sqrt()
    if isinstance(patches, Tensor) and loudness > 0:
        positions.mul_(patches.square().mean().sqrt() / loudness)


def feature_map(backbone: nn.Module, images: Tensor) -> Tensor:
    """The backbone's last features as (batch, positions, features), class tokens left out.

    Takes timm models in any of their layouts (NCHW, NHWC, tokens, a list of feature maps, of which
    the last counts, a list of parallel branches of tokens, which are joined) and other modules that
    return a feature map or one vector an image.
    """
    alone = len(images) == 1 and images.device.type == "cpu" and torch.is_grad_enabled()
    if alone and any(isinstance(module, _BatchNorm) for module in backbone.modules()):
        # On the CPU the backward pass of batch normalisation (torch 2.15) reads a gradient that
        # comes from tokens in the wrong memory order if the batch size is 1, and says nothing.
        return feature_map(backbone, images.repeat(2, 1, 1, 1))[:1]
    forward = getattr(backbone, "forward_features", backbone)
    return as_positions(backbone, forward(images))


def as_positions(backbone: nn.Module, features: object) -> Tensor:
    """Features in any layout that timm uses as (batch, positions, features)."""
    if isinstance(features, Mapping):
        features = features.get("x_norm_patchtokens", features.get("patch_features"))
    if isinstance(features, (list, tuple)) and features:
        if all(isinstance(branch, Tensor) and branch.ndim == 3 for branch in features):
            return _join_branches(backbone, features)
        features = features[-1]
    if not isinstance(features, Tensor) or features.ndim not in (2, 3, 4):
        given = type(features).__name__
        if isinstance(features, Tensor):
            given = f"a tensor of shape {tuple(features.shape)}"
        raise UserError(
            f"the backbone {type(backbone).__name__} gives {given}, no feature map; "
            "give a module that returns (batch, features, height, width) or "
            "(batch, tokens, features)"
        )
    if features.ndim == 4:
        channels_last = getattr(backbone, "output_fmt", "NCHW") == "NHWC"
        return features.flatten(1, 2) if channels_last else features.flatten(2).transpose(1, 2)
    if features.ndim == 2:
        return features[:, None]
    return _without_prefix(backbone, features)


def _join_branches(backbone: nn.Module, branches: Sequence[Tensor]) -> Tensor:
    """Parallel branches one after another, each with its own features and zeros for the others'.

    So each branch gets its own part of a linear head, whatever the widths are.
    """
    # EfficientViM gives (batch, features, positions): then those widths add up to the model's.
    if sum(branch.shape[1] for branch in branches) == getattr(backbone, "num_features", None):
        branches = [branch.transpose(1, 2) for branch in branches]
    branches = [_without_prefix(backbone, branch) for branch in branches]
    widths = [branch.shape[2] for branch in branches]
    padded = [
        F.pad(branch, (sum(widths[:index]), sum(widths[index + 1 :])))
        for index, branch in enumerate(branches)
    ]
    return torch.cat(padded, dim=1)


def _without_prefix(backbone: nn.Module, tokens: Tensor) -> Tensor:
    """(batch, tokens, features) without class and register tokens, unless there are no others."""
    num_prefix = getattr(backbone, "num_prefix_tokens", None)
    if num_prefix is None:
        # CoaT, CrossViT, PiT and VOLO do not say how many they have.
        own = backbone.named_parameters(recurse=False)
        num_prefix = next((p.shape[1] for name, p in own if name.startswith("cls_token")), 0)
    return tokens[:, num_prefix:] if tokens.shape[1] > num_prefix else tokens


def _describe(size: tuple[int, ...]) -> str:
    return "x".join(str(side) for side in size)
