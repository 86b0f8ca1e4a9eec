"""Pretext tasks: callables that corrupt a batch of clean images, and say where the loss counts."""

from backfold.pretext.colorization import Colorization, chroma_error, luminance
from backfold.pretext.corruption import Corruption, PretextTask, SecondTarget
from backfold.pretext.denoising import Denoising
from backfold.pretext.excerpt import Excerpt, ExcerptSettings
from backfold.pretext.identity import Identity
from backfold.pretext.masking import Masking
from backfold.pretext.mixture import Mixture
from backfold.pretext.sorting import Sorting, patches_placed_right
from backfold.pretext.superresolution import SuperResolution

__all__ = [
    "Colorization",
    "Corruption",
    "Denoising",
    "Excerpt",
    "ExcerptSettings",
    "Identity",
    "Masking",
    "Mixture",
    "PretextTask",
    "SecondTarget",
    "Sorting",
    "SuperResolution",
    "chroma_error",
    "luminance",
    "patches_placed_right",
]
