"""Images: where they come from, how they are read, and how they become batches."""

from backfold.data.augmentation import Augmentation, ImageSize
from backfold.data.broken import BrokenFiles
from backfold.data.decode import BrokenImage, decode, to_channels
from backfold.data.folder import FolderSource
from backfold.data.loading import Batch, evaluation_loader, training_loader
from backfold.data.parquet import ParquetSource
from backfold.data.sampling import StepSampler, steps_per_epoch
from backfold.data.source import (
    ImageSource,
    NoTestSplit,
    SubsetSource,
    open_source,
    stratified_split,
)
from backfold.data.statistics import ChannelStatistics, count_channels, measure_statistics

__all__ = [
    "Augmentation",
    "Batch",
    "BrokenFiles",
    "BrokenImage",
    "ChannelStatistics",
    "FolderSource",
    "ImageSize",
    "ImageSource",
    "NoTestSplit",
    "ParquetSource",
    "StepSampler",
    "SubsetSource",
    "count_channels",
    "decode",
    "evaluation_loader",
    "measure_statistics",
    "open_source",
    "steps_per_epoch",
    "stratified_split",
    "to_channels",
    "training_loader",
]
