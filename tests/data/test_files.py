import os

import pytest

from backfold.data.files import expand_pattern, find_files, read_file
from backfold.data.open import open_source
from backfold.errors import BrokenImage


def test_links_back_are_not_followed_for_ever(tmp_path, make_folder):
    folder = make_folder(tmp_path / "data", ["a/1.png", "a/b/2.png"])
    (folder / "a" / "b" / "up").symlink_to(folder / "a")
    (folder / "self").symlink_to(folder)
    (folder / "a" / "beside").symlink_to(folder / "c")
    make_folder(folder, ["c/3.png"])
    found = find_files(folder, (".png",))
    assert found == ["a/1.png", "a/b/2.png", "a/beside/3.png", "c/3.png"]


def test_pipes_and_folders_are_broken_files_and_hang_nothing(tmp_path, make_folder):
    folder = make_folder(tmp_path, ["1.png"])
    os.mkfifo(folder / "2.png")
    source = open_source(folder, "train")
    assert len(source) == 2
    with pytest.raises(BrokenImage, match="no regular file"):
        source.read(1)
    with pytest.raises(BrokenImage, match="no regular file"):
        read_file(tmp_path)
    with pytest.raises(BrokenImage, match="No such file"):
        read_file(tmp_path / "nowhere.png")


@pytest.fixture
def shards(tmp_path):
    for name in ("00.tar", "01.tar", "02.tar", "x.tar", "a[1].tar", "deep/er/3.tar"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    return tmp_path


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("{02..00}.tar", ["02.tar", "01.tar", "00.tar"]),
        ("{x,01}.tar", ["x.tar", "01.tar"]),
        ("0[12].tar", ["01.tar", "02.tar"]),
        ("a[1].tar", ["a[1].tar"]),
        ("**/3.tar", ["deep/er/3.tar"]),
        ("*", ["00.tar", "01.tar", "02.tar", "a[1].tar", "x.tar"]),
    ],
)
def test_patterns(shards, pattern, expected):
    assert expand_pattern(f"{shards}/{pattern}") == [shards / name for name in expected]


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("{00..04}.tar", "03.tar does not exist; check the pattern"),
        ("de*", "matches folders only; match files"),
        ("{00..02.tar", "unbalanced braces; write {000..012}"),
    ],
)
def test_patterns_that_fit_nothing_are_the_users_error(shards, users_error, pattern, message):
    assert message in users_error(lambda: expand_pattern(f"{shards}/{pattern}"))
