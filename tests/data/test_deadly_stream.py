"""Streams go on past images that crash or hang their decoder."""

import itertools
import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from test_stream import PLAIN, Numbers, load, places, same, write_tar

from backfold.data import stream_loading
from backfold.data.augmentation import Augmentation
from backfold.data.stream import TarStream
from backfold.errors import UserError

pytestmark = [
    # From Python 3.12 on, forking a process with threads warns; torch has threads and forks.
    pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning"),
]
CRASH, HANG, EXIT = (2, 5), (6, 0), (6, 1)
FATES = {
    CRASH: "ends the process that decodes it (exit code -11)",
    HANG: "takes its decoder more than 0.5 seconds",
    EXIT: "ends the process that decodes it (exit code 3)",
}


@pytest.fixture
def deadly(monkeypatch):
    """Let the decoder be crashed, hung and ended by these contents."""

    def make(crash=(), hang=(), leave=()):
        decode = stream_loading.decode

        def decode_or_die(content, *rest):
            if content in crash:
                os.kill(os.getpid(), signal.SIGSEGV)
            if content in hang:
                time.sleep(1000)
            if content in leave:
                os._exit(3)
            return decode(content, *rest)

        monkeypatch.setattr(stream_loading, "decode", decode_or_die)
        monkeypatch.setattr(stream_loading, "IMAGE_SECONDS", 0.5)

    return make


@pytest.fixture
def numbers(encode, deadly):
    """A stream with three deadly images, and what it must give: the same with broken ones."""

    def make(**options):
        source = Numbers(encode)
        expected = load(Numbers(encode, broken=tuple(FATES)), **options)
        contents = [[source.contents[place]] for place in (CRASH, HANG, EXIT)]
        deadly(*contents)
        return source, expected

    return make


def named(batches):
    """The broken images' lines, each once a batch."""
    return [sorted(set(batch.broken)) for batch in batches]


def with_fates(batches):
    """What is named where `FATES` are known, in the words of an image that can't be decoded."""
    fates = {f"shard {shard} position {at}": fate for (shard, at), fate in FATES.items()}
    return [
        sorted(f"{place}: {fates[place]}" for place in (line.split(":")[0] for line in lines))
        for lines in named(batches)
    ]


def assert_as_if_broken(given, expected):
    assert places(given) == places(expected)
    assert all(np.array_equal(a.images, b.images) for a, b in zip(given, expected, strict=True))
    assert named(given) == with_fates(expected)


@pytest.mark.parametrize("num_workers", [1, 2])
@pytest.mark.parametrize("augmentation", [PLAIN, Augmentation()], ids=["plain", "augmented"])
def test_deadly_images_are_broken_ones(numbers, num_workers, augmentation):
    source, expected = numbers(total=20, augmentation=augmentation)  # 16 are an epoch
    given = load(source, total=20, augmentation=augmentation, num_workers=num_workers)
    assert_as_if_broken(given, expected)
    epoch = given[:16]
    assert sum(map(len, named(epoch))) == 3
    seen = set(itertools.chain(*places(epoch)))
    assert seen == {(s, p) for s in range(8) for p in range(8)} - set(FATES)
    if augmentation is PLAIN:
        for batch, where in zip(given, places(given), strict=True):
            assert batch.images[:, 0, 0, 0].tolist() == [16 * shard + at for shard, at in where]


@pytest.mark.parametrize("num_workers", [1, 2])
def test_resumption_before_and_behind_them_gives_the_tail(numbers, num_workers):
    source, expected = numbers(total=24)
    whole = load(source, total=24, num_workers=num_workers)
    assert_as_if_broken(whole, expected)
    first = next(step for step, batch in enumerate(whole) if batch.broken)
    for start in (first, first + 1, 17):
        assert same(load(source, start, 24, num_workers), whole[start:])


def test_ranks_keep_their_shares(numbers):
    options = {"total": 8, "batch_size": 2, "world_size": 4}
    for rank in range(4):
        source, expected = numbers(rank=rank, **options)
        assert_as_if_broken(load(source, rank=rank, num_workers=1, **options), expected)


def test_nothing_but_deadly_images_is_the_users_error(encode, deadly):
    source = Numbers(encode, (8,))
    deadly(leave=list(source.contents.values()))
    try:
        load(source, total=2, num_workers=1)
    except UserError as error:
        message = str(error.with_traceback(None))
    assert message.startswith("numbers: 4 images in a row can't be read, the last is shard 0 ")
    assert message.endswith("(exit code 3); mend or remove them")


def test_unfit_channels_are_the_users_error_in_one_line(encode):
    source = Numbers(encode, (8,))
    source.contents[0, 3] = encode(np.zeros((4, 4, 3), dtype=np.uint8))
    loader = stream_loading.stream_loader(source, (4, 4), 2, PLAIN, 1, 0, 0, 8, num_workers=1)
    try:
        list(loader)
    except UserError as error:
        message = str(error.with_traceback(None))
    assert message.startswith("shard 0 position ")
    assert message.splitlines() == [message]


def test_the_place_in_its_shard_is_named(tmp_path, encode, deadly):
    random = np.random.default_rng(0)
    contents = [encode(random.integers(0, 256, (4, 4), dtype=np.uint8)) for _ in range(6)]
    path = write_tar(tmp_path / "0.tar.gz", contents)
    deadly(crash=[contents[1]])
    batches = load(TarStream([str(path)], 6), total=3, batch_size=2, num_workers=1)
    (line,) = itertools.chain(*(batch.broken for batch in batches))
    assert line == f"{path} member 1.png: {FATES[CRASH]}"
    seen = [at for _, at in itertools.chain(*places(batches))]
    assert set(seen) == {0, 2, 3, 4, 5}


def test_it_works_outside_the_main_thread(numbers):
    source, expected = numbers()
    with ThreadPoolExecutor(1) as pool:
        given = pool.submit(load, source, num_workers=1).result()
    assert_as_if_broken(given, expected)
