"""Pretext tasks: callables that corrupt a batch of clean images, and say where the loss counts."""

from backfold.pretext.corruption import Corruption, Identity, PretextTask
from backfold.pretext.hidden import HiddenPatches
from backfold.pretext.masking import Masking
from backfold.pretext.mixture import Excerpt, ExcerptSettings, Mixture
from backfold.pretext.pixels import (
    Bands,
    Colorization,
    Denoising,
    SuperResolution,
    chroma_error,
    luminance,
    spectral_angle,
)
from backfold.pretext.sorting import Sorting, patches_placed_right

__all__ = [
    "Bands", "Colorization", "Corruption", "Denoising", "Excerpt", "ExcerptSettings",
    "HiddenPatches", "Identity", "Masking", "Mixture", "PretextTask", "Sorting",
    "SuperResolution", "chroma_error", "luminance", "patches_placed_right", "spectral_angle",
]  # fmt: skip
