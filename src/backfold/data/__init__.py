"""Images: where they come from, how they are read, and how they become batches."""

from backfold.data.augmentation import Augmentation, ImageSize
from backfold.data.broken import BrokenFiles
from backfold.data.decode import BrokenImage, decode, to_channels
from backfold.data.folder import FolderSource
from backfold.data.guarded import survive
from backfold.data.loading import Batch, evaluation_loader, training_loader
from backfold.data.parquet import ParquetSource
from backfold.data.python_dataset import DatasetSource
from backfold.data.sampling import StepSampler, steps_per_epoch
from backfold.data.source import (
    ImageSource,
    NoTestSplit,
    SubsetSource,
    open_source,
    open_stream,
    stratified_split,
)
from backfold.data.statistics import ChannelStatistics, count_channels, measure_statistics
from backfold.data.stream import StreamSource, TarStream
from backfold.data.stream_loading import plan_stream, stream_loader
from backfold.data.survey import Survey
from backfold.data.survey_file import find_survey
from backfold.data.tar import TarSource

__all__ = [
    "Augmentation",
    "Batch",
    "BrokenFiles",
    "BrokenImage",
    "ChannelStatistics",
    "DatasetSource",
    "FolderSource",
    "ImageSize",
    "ImageSource",
    "NoTestSplit",
    "ParquetSource",
    "StepSampler",
    "StreamSource",
    "SubsetSource",
    "Survey",
    "TarSource",
    "TarStream",
    "count_channels",
    "decode",
    "evaluation_loader",
    "find_survey",
    "measure_statistics",
    "open_source",
    "open_stream",
    "plan_stream",
    "steps_per_epoch",
    "stratified_split",
    "stream_loader",
    "survive",
    "to_channels",
    "training_loader",
]
