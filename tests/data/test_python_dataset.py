import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import Dataset, TensorDataset

from backfold.data.formats import DatasetSource
from backfold.errors import BrokenImage, UserError

ARRAY = np.random.default_rng(0).integers(0, 256, (9, 11, 3), dtype=np.uint8)
CHANNELS_FIRST = torch.from_numpy(np.moveaxis(ARRAY, 2, 0).copy())


@pytest.mark.parametrize(
    "item",
    [
        Image.fromarray(ARRAY),
        ARRAY,
        np.moveaxis(ARRAY, 2, 0),
        CHANNELS_FIRST,
        [CHANNELS_FIRST, 3, "more"],
        {"image": ARRAY, "label": 3},
    ],
)
def test_the_same_image_in_many_forms(item):
    assert torch.equal(DatasetSource([item]).read(0), CHANNELS_FIRST)


def test_values_are_as_in_files():
    deep = np.array([[0, 65535], [32768, 1]], dtype=np.uint16)
    floats = torch.tensor([[-3.5, 700.0]])
    source = DatasetSource([deep, floats, floats[None].bfloat16(), torch.tensor([[True, False]])])
    np.testing.assert_allclose(source.read(0)[0].numpy(), deep / 65535, rtol=1e-7)
    assert source.read(1).tolist() == [[[-3.5, 700.0]]]
    assert source.read(2).tolist() == [[[-3.5, 700.0]]]
    assert source.read(3).tolist() == [[[255, 0]]]
    assert DatasetSource(TensorDataset(torch.zeros(5, 32, 8, 8))).read(4).shape == (32, 8, 8)


@pytest.mark.parametrize(
    ("item", "reason"),
    [
        ("text", "a str; give an image"),
        (torch.zeros(33, 4, 4), "4 x 4 pixels of 33 channels"),
        (np.zeros((2, 2, 2, 2)), "an array of shape"),
        (torch.zeros(3, 4, 4, dtype=torch.complex64), "complex64"),
        (np.zeros((100, 101)), "more than max_pixels 10000"),
        (Image.new("L", (100, 101)), "more than max_pixels 10000"),
    ],
)
def test_other_items_are_broken(item, reason):
    with pytest.raises(BrokenImage, match=reason):
        DatasetSource([item], max_pixels=10000).read(0)


class Failing(Dataset):
    def __init__(self, targets=None, classes=()):
        self.targets, self.classes = targets, classes

    def __len__(self):
        return 4

    def __getitem__(self, index):
        if index == 2:
            raise KeyError("no\nsuch item")
        return torch.full((1, 4, 4), index, dtype=torch.uint8)


def test_an_item_that_raises_is_broken():
    source = DatasetSource(Failing())
    with pytest.raises(BrokenImage, match=r"KeyError: .*no.*such item") as caught:
        source.read(2)
    assert "\n" not in str(caught.value)
    assert source.describe(2) == "Failing item 2"


def test_labels():
    source = DatasetSource(Failing((1, 0, 1, 1), ["cat", "dog"]))
    assert (source.labels.tolist(), source.class_names) == ([1, 0, 1, 1], ("cat", "dog"))
    given = DatasetSource(Failing([0, 2, 1, 0]))
    assert (given.labels.tolist(), given.class_names) == ([0, 2, 1, 0], ("0", "1", "2"))
    assert DatasetSource(Failing()).labels is None
    for wrong in ([0, 1], [0, 1, 2, -1], [0.5] * 4):
        with pytest.raises(UserError, match="give 4 integers from 0"):
            DatasetSource(Failing(wrong))
    with pytest.raises(UserError, match="1 class names and labels to 1; name every class"):
        DatasetSource(Failing([0, 1, 1, 0], ["cat"]))
    with pytest.raises(UserError, match="is empty, or has no length"):
        DatasetSource([])
    with pytest.raises(UserError, match="has no length; give"):
        DatasetSource(iter([1]))
