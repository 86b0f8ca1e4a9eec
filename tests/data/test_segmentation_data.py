import io

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from backfold.data.segmentation import VOID, load_masked, open_masked
from backfold.errors import UserError

# From Python 3.12 on, forking a process with threads warns; loaders fork their workers.
pytestmark = pytest.mark.filterwarnings(
    "ignore:This process .* is multi-threaded:DeprecationWarning"
)
SIZE = (12, 20)


def png(array: np.ndarray, palette: bool = False) -> bytes:
    picture = Image.fromarray(array)
    if palette:
        picture = Image.fromarray(array).convert("P")
        picture.frombytes(array.tobytes())
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()


def draw(seed: int, size=SIZE, ids=(0, 3, 7, 11)) -> tuple[np.ndarray, np.ndarray]:
    """A colour image, and a mask of 2 x 2 pixel blocks of these ids."""
    random = np.random.default_rng(seed)
    image = random.integers(0, 256, (*size, 3), dtype=np.uint8)
    blocks = random.choice(np.array(ids, dtype=np.uint8), (size[0] // 2, size[1] // 2))
    return image, blocks.repeat(2, 0).repeat(2, 1)


@pytest.fixture
def write(tmp_path):
    def write_part(name: str, seeds, palette=False, struct=False, **options):
        pairs = [draw(seed, **options) for seed in seeds]
        images = [png(image) for image, _ in pairs]
        masks = [png(mask, palette) for _, mask in pairs]
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        columns = {"image": images, "mask": [{"bytes": m} for m in masks] if struct else masks}
        pq.write_table(pa.table(columns), path)
        return pairs

    return write_part


@pytest.mark.parametrize("style", [{}, {"palette": True}, {"struct": True}])
def test_parts_keep_pixels_and_name_classes_by_position(write, tmp_path, style):
    train, test = write("train-0.parquet", [0, 1], **style), write("test-0.parquet", [2], **style)
    write("val-0.parquet", [3], **style)
    loaded = load_masked(open_masked(tmp_path), SIZE, 3, void=11)
    assert [len(part) for part in loaded] == [2, 1]
    for part, pairs in zip(loaded, (train, test), strict=True):
        assert part.class_ids == (0, 3, 7)
        images, masks = everything(part)
        assert masks.dtype == torch.uint8
        for number, (image, mask) in enumerate(pairs):
            assert np.array_equal(images[number].permute(1, 2, 0).numpy(), image)
            expected = np.select([mask == 0, mask == 3, mask == 7], [0, 1, 2], VOID)
            assert np.array_equal(masks[number].numpy(), expected)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_many_images_are_decoded_as_few_are(write, tmp_path, monkeypatch, num_workers):
    write("train.parquet", range(5))
    write("test.parquet", [9])
    kept, _ = load_masked(open_masked(tmp_path), SIZE, 3, void=11)
    monkeypatch.setattr("backfold.data.segmentation.KEPT_BYTES", 0)
    anew, _ = load_masked(open_masked(tmp_path), SIZE, 3, void=11, num_workers=num_workers)
    assert anew.pixels == kept.pixels
    assert sum(anew.pixels.values()) == 5 * SIZE[0] * SIZE[1]
    places = [torch.tensor([4, 1, 4]), torch.tensor([0])]
    for expected, found in zip(kept.batches(places), anew.batches(places), strict=True):
        assert all(torch.equal(*pair) for pair in zip(expected, found, strict=True))


def test_validation_is_the_test_part_where_there_is_no_other(write, tmp_path):
    write("train/a.parquet", [0, 1])
    ((image, _),) = write("val/a.parquet", [2])
    _, test = load_masked(open_masked(tmp_path), SIZE, 3, void=11)
    assert np.array_equal(everything(test)[0][0].permute(1, 2, 0).numpy(), image)


def test_the_data_s_own_folder_names_no_part(write, tmp_path):
    write("test/train.parquet", [0, 1, 2])
    write("test/test.parquet", [3])
    assert [len(part) for part in open_masked(tmp_path / "test")] == [3, 1]


def test_a_fifth_is_set_apart_where_there_are_no_parts(write, tmp_path):
    write("all.parquet", range(10))
    train, test = open_masked(tmp_path / "all.parquet", seed=3)
    assert (len(train), len(test)) == (8, 2)
    assert sorted([*train.indices, *test.indices]) == list(range(10))


def test_both_are_stretched_and_masks_stay_ids(write, tmp_path):
    ((image, mask),) = write("train.parquet", [0])
    write("test.parquet", [1])
    train, _ = load_masked(open_masked(tmp_path), (6, 10), 1, void=11)
    images, masks = everything(train)
    assert images.shape == (1, 1, 6, 10)
    # Each 2 x 2 block of the mask becomes one pixel.
    expected = np.select([mask == 0, mask == 3, mask == 7], [0, 1, 2], VOID)[::2, ::2]
    assert np.array_equal(masks[0].numpy(), expected)
    grey = torch.from_numpy(image @ np.array([0.2989, 0.587, 0.114]))
    assert (images.float().mean() - grey.mean()).abs() < 1.0


def test_a_limit_takes_images_spread_over_the_part(write, tmp_path):
    pairs = write("train.parquet", range(5))
    write("test.parquet", [9])
    train, _ = load_masked(open_masked(tmp_path), SIZE, 3, void=11, limit=3)
    images, _ = everything(train)
    for number, row in enumerate((0, 2, 4)):
        assert np.array_equal(images[number].permute(1, 2, 0).numpy(), pairs[row][0])


def everything(part):
    ((images, masks),) = part.batches([torch.arange(len(part))])
    return images, masks


def refusal(call) -> str:
    with pytest.raises(UserError) as caught:
        call()
    assert "\n" not in str(caught.value)
    assert "; " in str(caught.value)
    return str(caught.value)


def test_what_has_no_masks_is_refused_with_the_remedy(tmp_path):
    assert "--segmentation.data" in refusal(lambda: open_masked(None))
    assert "holds no parquet files" in refusal(lambda: open_masked(tmp_path))
    assert "nowhere" in refusal(lambda: open_masked(tmp_path / "nowhere"))
    pq.write_table(pa.table({"image": [b"1"], "label": [0]}), tmp_path / "a.parquet")
    assert "has columns image, label but no `mask`" in refusal(lambda: open_masked(tmp_path))
    pq.write_table(pa.table({"image": [b"1"], "mask": [0]}), tmp_path / "a.parquet")
    assert "column `mask` holds int64" in refusal(lambda: open_masked(tmp_path))
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    assert "no readable parquet" in refusal(lambda: open_masked(tmp_path))


@pytest.mark.parametrize(
    ("image", "mask", "message"),
    [
        (png(draw(0)[0]), png(draw(0, size=(12, 18))[1]), "12 x 20 pixels and its mask 12 x 18"),
        (png(draw(0)[0]), png(draw(0)[0]), "its mask has 3 channels"),
        (png(draw(0)[0]), b"no image", "its mask is no PNG"),
        (b"no image", png(draw(0)[1]), "mend or remove this row"),
    ],
)
def test_a_broken_row_is_named(tmp_path, image, mask, message):
    good = [png(array) for array in draw(1)]
    table = pa.table({"image": [good[0], image], "mask": [good[1], mask]})
    pq.write_table(table, tmp_path / "train.parquet")
    pq.write_table(table.slice(0, 1), tmp_path / "test.parquet")
    lines = {
        refusal(lambda n=n: load_masked(open_masked(tmp_path), SIZE, 3, num_workers=n))
        for n in (0, 1)
    }
    (line,) = lines
    assert message in line
    assert "train.parquet row 1" in line


def test_a_part_of_nothing_but_void_is_refused(write, tmp_path):
    write("train.parquet", [0])
    write("test.parquet", [0], ids=(11,))
    line = refusal(lambda: load_masked(open_masked(tmp_path), SIZE, 3, void=11))
    assert "test.parquet: every pixel of the masks is void, 11" in line


def test_masks_of_one_class_are_refused(write, tmp_path):
    write("train.parquet", [0], ids=(5, 11))
    write("test.parquet", [0], ids=(5, 11))
    line = refusal(lambda: load_masked(open_masked(tmp_path), SIZE, 3, void=11))
    assert "1 classes beside void, 11" in line
