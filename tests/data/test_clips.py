"""Clips: which frames become one image's channels, and in which order."""

import shutil

import numpy as np
import pyarrow.parquet as parquet
import pytest
import tifffile
import torch
from PIL import Image

import backfold
from backfold.cli.main import main
from backfold.data.clips import ClipSource
from backfold.data.open import open_source
from backfold.data.source import NoTestSplit
from backfold.errors import BrokenImage, UserError
from backfold.training.config import build_tasks

SIZE = 16


def frame(value, mode="L", size=SIZE):
    return Image.new(mode, (size, size), value if mode == "L" else (value,) * 3)


def write(folder, values, name="{:02d}.png", **options):
    folder.mkdir(parents=True, exist_ok=True)
    for number, value in enumerate(values):
        frame(value, **options).save(folder / name.format(number))


def values(source, index):
    return source.read(index)[:, 0, 0].tolist()


def test_frames_of_a_folder_follow_each_other_and_none_is_shared(tmp_path):
    write(tmp_path / "b", [10, 20, 30, 40, 50])
    write(tmp_path / "a", [1, 2])
    source = ClipSource(tmp_path, 2)
    assert [values(source, index) for index in range(len(source))] == [[2, 1], [20, 10], [40, 30]]
    assert source.describe(1).endswith("b/00.png")
    # No clip crosses from one folder to the next.
    assert len(ClipSource(tmp_path, 3)) == 1


@pytest.mark.parametrize("suffix", ["gif", "tiff"])
def test_pages_of_a_file_are_frames(tmp_path, suffix):
    pages = [frame(value) for value in (5, 60, 120, 200)]
    pages[0].save(tmp_path / f"clip.{suffix}", save_all=True, append_images=pages[1:])
    frame(9).save(tmp_path / "still.png")  # no frame of the file beside it
    source = ClipSource(tmp_path, 4)
    assert len(source) == 1
    grey = source.read(0).unflatten(0, (4, -1))[:, 0, 0, 0]
    torch.testing.assert_close(grey, torch.tensor([200, 120, 60, 5], dtype=torch.uint8))
    assert source.describe(0).endswith(f"clip.{suffix} page 0")


def test_grey_frames_join_coloured_ones_and_unequal_sizes_are_broken(tmp_path):
    write(tmp_path / "a", [7, 8], mode="RGB")
    write(tmp_path / "b", [1, 2])  # all clips have the channels of the first ones
    assert values(ClipSource(tmp_path, 2), 1) == [2, 2, 2, 1, 1, 1]
    frame(9).save(tmp_path / "a" / "00.png")
    assert values(ClipSource(tmp_path, 2), 0) == [8, 8, 8, 9, 9, 9]
    frame(9, size=8).save(tmp_path / "a" / "00.png")
    with pytest.raises(BrokenImage, match="16x16, 8x8 pixels"):
        ClipSource(tmp_path, 2).read(0)
    write(tmp_path / "jpeg", [10], "0.jpg", size=64)
    write(tmp_path / "jpeg", [20], "1.png", size=64)
    assert ClipSource(tmp_path / "jpeg", 2).read(0, min_side=SIZE).shape == (2, 64, 64)


def test_frames_beside_sub_folders_are_one_clip(tmp_path):
    write(tmp_path / "walk", [1], "a{}.png")
    write(tmp_path / "walk" / "m", [9])
    write(tmp_path / "walk", [2], "n{}.png")
    source = ClipSource(tmp_path, 2)
    assert [values(source, index) for index in range(len(source))] == [[2, 1]]


def test_classes_are_folders_above_those_of_clips(tmp_path):
    write(tmp_path / "x" / "a", [1, 2])
    write(tmp_path / "y" / "a", [3, 4, 5, 6])
    labelled = ClipSource(tmp_path, 2, labelled=True)
    assert labelled.class_names == ("x", "y")
    assert labelled.labels.tolist() == [0, 1, 1]
    assert ClipSource(tmp_path, 2).labels is None
    assert ClipSource(tmp_path / "y", 2, labelled=True).labels is None


def test_pages_keep_their_bits(tmp_path):
    pages = np.array([[0, 0, 0], [65535, 13107, 0]], dtype=np.uint16)
    frames = np.broadcast_to(pages[:, None, None], (2, SIZE, SIZE, 3))
    with tifffile.TiffWriter(tmp_path / "clip.tif") as file:
        for page in frames:
            file.write(page, photometric="rgb", contiguous=False)
    found = ClipSource(tmp_path, 2).read(0)[:, 0, 0]
    torch.testing.assert_close(found, torch.tensor([1.0, 0.2, 0.0, 0.0, 0.0, 0.0]))
    with pytest.raises(BrokenImage, match="max_pixels 100"):
        ClipSource(tmp_path, 2, max_pixels=100).read(0)
    Image.fromarray(np.full((SIZE, SIZE), 13107, dtype=np.uint16)).save(tmp_path / "0.png")
    frame(255).save(tmp_path / "1.png")
    torch.testing.assert_close(values(ClipSource(tmp_path, 2), 1), [1.0] * 3 + [0.2] * 3)


def test_what_holds_no_clips_is_refused(tmp_path):
    write(tmp_path / "a", [1, 2])
    for data, frames, message in (
        (tmp_path, 3, "no clip of 3 frames"),
        (tmp_path / "a" / "00.png", 2, "is no folder"),
        (None, 2, "no clips"),
    ):
        with pytest.raises(UserError, match=message):
            open_source(data, "train", frames=frames)
    with pytest.raises(NoTestSplit):
        open_source(tmp_path, "test", frames=2)
    with pytest.raises(UserError, match="frames is 1"):
        backfold.pretrain(data=tmp_path, frames=1)
    (tmp_path / "a" / "damaged.gif").write_bytes(b"GIF89a")  # no clip, but a frame
    assert len(open_source(tmp_path, "train", frames=3)) == 1
    write(tmp_path / "splits" / "train" / "a", [1, 2])
    write(tmp_path / "splits" / "test" / "a", [3, 4])
    assert values(open_source(tmp_path / "splits", "test", frames=2), 0) == [4, 3]


@pytest.fixture(scope="module")
def moving(tmp_path_factory):
    """Each clip has a bright bar that moves by two pixels a frame."""
    folder = tmp_path_factory.mktemp("moving")
    for clip in range(20):
        (folder / f"{clip:02d}").mkdir()
        for number in range(3):
            pixels = np.full((SIZE, SIZE), 40, dtype=np.uint8)
            at = (clip + 2 * number) % (SIZE - 2)
            pixels[:, at : at + 2] = 220
            Image.fromarray(pixels).save(folder / f"{clip:02d}" / f"{number}.png")
    return folder


SETTINGS = {
    "pretext": "frames", "backbone": "vit_tiny_patch16_224", "image_size": SIZE, "epochs": 1,
    "backbone_options": {"patch_size": 4, "embed_dim": 32, "depth": 1, "num_heads": 1},
    "tasks": {"masking": {"mask_patch_size": 4}}, "batch_size": 4, "num_workers": 0,
    "accelerator": "cpu",
}  # fmt: skip


@pytest.mark.parametrize("energy", ["dense", "conditional"])
def test_a_run_restores_the_latest_frame_from_those_before(moving, tmp_path, energy):
    run = backfold.pretrain(data=moving, frames=3, energy=energy, out=tmp_path / "run", **SETTINGS)
    assert run.run.channels == 3
    (task,) = build_tasks(run.run.config, 3).values()
    clean = torch.ones(2, 3, SIZE, SIZE)
    corrupted = task(clean, torch.Generator()).corrupted
    assert corrupted.mean(dim=(0, 2, 3)).tolist() == [0, 1, 1]
    assert torch.isfinite(run.restore(torch.rand(1, 3, SIZE, SIZE)).restored).all()


def test_frames_that_do_not_divide_the_channels_are_refused(moving, tmp_path):
    given = {"data": moving, "out": tmp_path / "run", **SETTINGS}
    for changes, message in (
        ({"channels": 3}, "frames None and images of 3 channel"),
        ({"frames": 2, "channels": 3}, "channels is 3 and frames 2"),
        ({"frames": 3, "data": torch.zeros(20, 3, SIZE, SIZE)}, "images are in memory"),
    ):
        with pytest.raises(UserError, match=message):
            backfold.pretrain(**given | changes)


def test_every_verb_takes_a_run_on_clips(moving, tmp_path, monkeypatch):
    for name in ("good", "bad"):
        (tmp_path / "data" / name).mkdir(parents=True)
    for clip in sorted(moving.iterdir()):
        name = "good" if int(clip.name) % 3 else "bad"
        shutil.copytree(clip, tmp_path / "data" / name / clip.name)
    run = backfold.pretrain(data=moving, frames=2, out=tmp_path / "run", **SETTINGS)
    assert run.run.channels == 2
    given = [f"--checkpoint={run.path}", f"--data={tmp_path / 'data'}", "--accelerator=cpu"]
    monkeypatch.chdir(tmp_path)
    assert main(["embed", *given]) == 0
    assert main(["score", *given, "--good=good", f"--usual={moving}"]) == 0
    assert len(parquet.read_table("scores.parquet")) == 20
    rows = backfold.evaluate(
        run, data=tmp_path / "data", protocols=["knn", "restoration", "energy"], labels="all",
        num_steps=[1], far=moving, accelerator="cpu", num_workers=0,
    )  # fmt: skip
    assert {"knn", "restoration", "energy"} == {row.protocol for row in rows}
    assert any(row.case.startswith("frames") for row in rows)
