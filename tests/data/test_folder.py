import pickle

import numpy as np
import pytest
import torch
from PIL import Image

from backfold.data.folder import FolderSource
from backfold.errors import BrokenImage, UserError


def test_images_at_any_depth_in_path_order(tmp_path, make_folder):
    names = ["b/deep/er/2.png", "a.png", "b/10.PNG", "b/.hidden.png", ".cache/x.png", "c/1.png"]
    folder = make_folder(tmp_path, names)
    (folder / "notes.txt").write_text("no image")
    source = FolderSource(folder)
    described = [source.describe(index) for index in range(len(source))]
    expected = ["a.png", "b/10.PNG", "b/deep/er/2.png", "c/1.png"]
    assert described == [str(folder / name) for name in expected]
    for index, path in enumerate(described):
        pixels = np.array(Image.open(path))
        assert torch.equal(source.read(index), torch.from_numpy(pixels).permute(2, 0, 1))


@pytest.mark.parametrize("suffix", ["jpg", "jpeg", "png", "webp", "bmp", "tif", "tiff", "JPG"])
def test_every_suffix_is_found(tmp_path, encode, suffix):
    format = {"jpg": "JPEG", "tif": "TIFF"}.get(suffix.lower(), suffix.upper())
    grey = np.full((4, 5, 3), 77, dtype=np.uint8)
    (tmp_path / f"x.{suffix}").write_bytes(encode(grey, format))
    assert FolderSource(tmp_path).read(0).shape == (3, 4, 5)


def test_linked_folders_are_followed(tmp_path, make_folder):
    make_folder(tmp_path / "elsewhere", ["1.png"])
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "link").symlink_to(tmp_path / "elsewhere")
    assert len(FolderSource(tmp_path / "data")) == 1


def test_labels_are_first_level_folders(tmp_path, make_folder):
    folder = make_folder(tmp_path, ["dog/1.png", "cat/x/2.png", "cat/3.png", "emu/4.png"])
    source = FolderSource(folder, labelled=True)
    assert source.class_names == ("cat", "dog", "emu")
    assert source.labels.dtype == np.int64
    for index, label in enumerate(source.labels):
        assert f"/{source.class_names[label]}/" in source.describe(index)
    assert np.bincount(source.labels).tolist() == [2, 1, 1]


@pytest.mark.parametrize(
    ("names", "labelled"),
    [
        (["cat/1.png", "dog/2.png"], False),
        (["cat/1.png", "cat/2.png"], True),
        (["cat/1.png", "dog/2.png", "loose.png"], True),
    ],
)
def test_no_labels_unless_asked_and_possible(tmp_path, make_folder, names, labelled):
    source = FolderSource(make_folder(tmp_path, names), labelled=labelled)
    assert source.labels is None
    assert source.class_names == ()


def test_folders_without_images_are_no_classes(tmp_path, make_folder):
    make_folder(tmp_path, ["cat/1.png", "dog/2.png"])
    (tmp_path / "ant").mkdir()
    assert FolderSource(tmp_path, labelled=True).class_names == ("cat", "dog")


def test_given_classes_decide_the_numbers(tmp_path, make_folder):
    folder = make_folder(tmp_path, ["cat/1.png", "emu/2.png"])
    source = FolderSource(folder, labelled=True, class_names=["ant", "cat", "dog", "emu"])
    assert source.labels.tolist() == [1, 3]
    assert source.class_names == ("ant", "cat", "dog", "emu")


def test_unreadable_files_are_broken(tmp_path, make_folder):
    folder = make_folder(tmp_path, ["1.png", "2.png"], broken=("1.png",))
    source = FolderSource(folder)
    with pytest.raises(BrokenImage, match="not an image"):
        source.read(0)
    (folder / "2.png").unlink()
    with pytest.raises(BrokenImage, match="No such file"):
        source.read(1)


def test_a_folder_without_images_is_the_users_error(tmp_path):
    (tmp_path / "readme.txt").write_text("nothing here")
    with pytest.raises(UserError, match=r"holds no images; give a folder") as caught:
        FolderSource(tmp_path)
    assert "\n" not in str(caught.value)


def test_pickle_round_trip(tmp_path, make_folder):
    source = FolderSource(make_folder(tmp_path, ["cat/1.png", "dog/2.png"]), labelled=True)
    copy = pickle.loads(pickle.dumps(source))
    assert torch.equal(copy.read(1), source.read(1))
    assert np.array_equal(copy.labels, source.labels)
