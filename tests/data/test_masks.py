import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from backfold.data.masks import VOID, load_masked, open_masked
from backfold.errors import UserError
from backfold.pictures import png_bytes

SIZE = (12, 20)


def png(array, palette=False):
    picture = Image.fromarray(array).convert("P" if palette else None)
    picture.frombytes(array.tobytes())
    return png_bytes(picture)


def draw(seed, size=SIZE, ids=(0, 3, 7, 11)):
    """A colour image, and a mask of 2 x 2 pixel blocks of these ids."""
    random = np.random.default_rng(seed)
    image = random.integers(0, 256, (*size, 3), dtype=np.uint8)
    blocks = random.choice(np.array(ids, dtype=np.uint8), (size[0] // 2, size[1] // 2))
    return image, blocks.repeat(2, 0).repeat(2, 1)


def write(path, seeds, style="bytes", **options):
    pairs = [draw(seed, **options) for seed in seeds]
    masks = [png(mask, style == "palette") for _, mask in pairs]
    masks = [{"bytes": mask} for mask in masks] if style == "struct" else masks
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"image": [png(image) for image, _ in pairs], "mask": masks}), path)
    return pairs


def by_position(ids):
    return np.select([ids == 0, ids == 3, ids == 7], [0, 1, 2], VOID)


def load(data, size=SIZE, channels=3, **options):
    return load_masked(open_masked(data), size, channels, void=11, **options)


def check(part, pairs):
    ((images, masks),) = part.batches([torch.arange(len(part))])
    assert (masks.dtype, len(part), part.class_ids) == (torch.uint8, len(pairs), (0, 3, 7))
    assert np.array_equal(images.permute(0, 2, 3, 1), np.stack([image for image, _ in pairs]))
    assert np.array_equal(masks, by_position(np.stack([mask for _, mask in pairs])))


def test_parts_keep_pixels_and_name_classes_by_position(tmp_path):
    folder = tmp_path / "test"  # the data's own folder names no part
    train = write(folder / "train.parquet", [0, 1], "palette")
    for seed, name in ((2, "val0/a.parquet"), (3, "test.parquet")):
        expected = write(folder / name, [seed], "struct")
        for part, pairs in zip(load(folder), (train, expected), strict=True):
            check(part, pairs)


def test_many_images_are_decoded_as_few_are(tmp_path, monkeypatch):
    pairs = write(tmp_path / "train.parquet", range(5))
    write(tmp_path / "test.parquet", [9])
    monkeypatch.setattr("backfold.data.masks.KEPT_BYTES", 0)
    train, _ = load(tmp_path, limit=3, num_workers=2)
    check(train, pairs[::2])  # spread over the part
    assert sum(train.pixels.values()) == 3 * SIZE[0] * SIZE[1]


def test_a_fifth_is_set_apart_where_there_are_no_parts(tmp_path):
    write(tmp_path / "all.parquet", range(10))
    train, test = open_masked(tmp_path / "all.parquet", seed=3)
    assert (len(train.indices), len(test.indices)) == (8, 2)
    assert sorted([*train.indices, *test.indices]) == list(range(10))


def test_both_are_stretched_and_masks_stay_ids(tmp_path):
    ((image, mask), *_) = write(tmp_path / "all.parquet", [0] * 5)
    ((images, masks),) = load(tmp_path, (6, 10), 1)[1].batches([torch.tensor([0])])
    # Each 2 x 2 block of the mask becomes one pixel.
    assert np.array_equal(masks[0], by_position(mask)[::2, ::2])
    grey = (image @ np.array([0.2989, 0.587, 0.114])).mean()
    assert float(images.float().mean()) == pytest.approx(grey, abs=1.0)


def refusal(data, columns=None, num_workers=0):
    if columns is not None:
        pq.write_table(pa.table(columns), data / "a.parquet")
    with pytest.raises(UserError, match="; ") as caught:
        load(data, num_workers=num_workers)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_what_has_no_masks_is_refused_with_the_remedy(tmp_path):
    assert "--segmentation.data" in refusal(None)
    assert "holds no parquet files" in refusal(tmp_path)
    assert "image, label but no `mask`" in refusal(tmp_path, {"image": [b"1"], "label": [0]})
    assert "column `mask` holds int64" in refusal(tmp_path, {"image": [b"1"], "mask": [0]})
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    assert "no readable parquet" in refusal(tmp_path)


def test_a_broken_row_is_named(tmp_path):
    image, mask = (png(array) for array in draw(1))
    for other, its_mask, message in (
        (image, png(draw(0, size=(12, 18))[1]), "shape (12, 20) and its mask (12, 18)"),
        (image, image, "its mask (12, 20, 3)"),
        (image, b"no image", "its mask is no PNG"),
        (b"no image", mask, "mend or remove this row"),
    ):
        columns = {"image": [image] * 4 + [other], "mask": [mask] * 4 + [its_mask]}
        line = refusal(tmp_path, columns, num_workers=int(its_mask == image))
        assert message in line
        assert "a.parquet row 4" in line


def test_masks_without_two_classes_are_refused(tmp_path):
    write(tmp_path / "test.parquet", [0], ids=(11,))
    write(tmp_path / "train.parquet", [0])
    assert "test.parquet: every pixel of the masks is void, 11" in refusal(tmp_path)
    for name in ("train", "test"):
        write(tmp_path / f"{name}.parquet", [0], ids=(5, 11))
    assert "1 classes beside void, 11" in refusal(tmp_path)
