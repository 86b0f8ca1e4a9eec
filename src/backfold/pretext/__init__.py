"""Pretext tasks: callables that corrupt a batch of clean images, and say where the loss counts."""

from backfold.pretext.corruption import Corruption, Identity, PretextTask
from backfold.pretext.hidden import HiddenPatches
from backfold.pretext.masking import Masking
from backfold.pretext.mixture import Excerpt, ExcerptSettings, Mixture
from backfold.pretext.pixels import (
    Colorization,
    Denoising,
    SuperResolution,
    chroma_error,
    luminance,
)
from backfold.pretext.sorting import Sorting, patches_placed_right

__all__ = [
    "Colorization", "Corruption", "Denoising", "Excerpt", "ExcerptSettings", "HiddenPatches",
    "Identity", "Masking", "Mixture", "PretextTask", "Sorting", "SuperResolution", "chroma_error",
    "luminance", "patches_placed_right",
]  # fmt: skip
