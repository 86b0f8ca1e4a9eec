import pytest

from backfold.data.broken import BrokenFiles
from backfold.errors import UserError


class Sized:
    def __init__(self, count):
        self.count = count

    def __len__(self):
        return self.count


def test_each_file_counts_once():
    broken = BrokenFiles(allowed=2)
    assert broken.add(["a: empty", "b: empty", "a: empty"]) == ["a: empty", "b: empty"]
    assert broken.add(["b: empty"]) == []
    assert broken.add([]) == []
    assert broken.descriptions == ["a: empty", "b: empty"]


def test_one_too_many_stops_the_run():
    broken = BrokenFiles(allowed=3)
    broken.add(["a: empty", "b: empty", "c: empty"])
    expected = "4 images can't be read, 3 are allowed: a: empty; b: empty; c: empty; mend or remove"
    with pytest.raises(UserError, match=expected):
        broken.add(["d: empty"])


@pytest.mark.parametrize(
    ("count", "share", "allowed"), [(1000, 0.01, 10), (1099, 0.01, 10), (5, 0.01, 1), (9, 0.0, 1)]
)
def test_allowance(count, share, allowed):
    assert BrokenFiles.for_source(Sized(count), share).allowed == allowed
