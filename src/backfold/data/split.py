"""Which images are for training and which for testing."""

import numpy as np
from numpy.typing import NDArray
from sklearn.model_selection import train_test_split

from backfold.errors import UserError


def stratified_split(
    labels: NDArray[np.int64] | int, share: float, seed: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Sorted (train indices, test indices), the test part holding about ``share`` of every class.

    Classes of one image stay in the train part.

    Args:
        labels: (length,) int64; or a count, for images without labels.
        share: the test part, above 0 and below 1.
        seed: of the random choice.

    Raises:
        UserError: too few images for such a split.
    """
    classes = np.zeros(labels, dtype=np.int64) if isinstance(labels, int) else labels
    names, members = np.unique(classes, return_counts=True)
    single = np.isin(classes, names[members == 1])
    many = np.flatnonzero(~single)
    try:
        train, test = train_test_split(
            many, test_size=share, random_state=seed, stratify=classes[many]
        )
    except ValueError as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"{len(classes)} images can't be split with a test share of {share:g} ({reason}); "
            "give more images or another share"
        ) from error
    return np.sort(np.concatenate([train, np.flatnonzero(single)])), np.sort(test)
