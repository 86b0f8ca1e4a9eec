import contextlib
import functools
import http.server
import itertools
import json
import os
import signal
import threading
import time

import numpy as np
import pytest
from webdataset import TarWriter

from backfold.data import source
from backfold.data import stream as module
from backfold.data.augmentation import UNCHANGED, Augmentation
from backfold.data.open import open_source, open_stream
from backfold.data.stream import SHARD_FACTOR, Stream, StreamBatches
from backfold.errors import BrokenImage, UserError

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")
SHARDS, EACH = 4, 6
ALL = set(range(SHARDS * EACH))


def write_tar(path, contents):
    with TarWriter(str(path)) as tar:
        for number, content in enumerate(contents):
            tar.write({"__key__": str(number), "png": content, "cls": b"cat"})
    return path


@pytest.fixture
def contents(encode):
    """Images whose value is their number."""
    return [encode(np.full((4, 4), number, dtype=np.uint8)) for number in sorted(ALL)]


@pytest.fixture
def make(tmp_path, contents):
    def make(replaced=None):
        """Compressed shards; some images are replaced, by their numbers."""
        kept = [(replaced or {}).get(number, content) for number, content in enumerate(contents)]
        for shard in range(SHARDS):
            write_tar(tmp_path / f"{shard}.tar.gz", kept[shard * EACH :][:EACH])
        return open_stream(f"{tmp_path}/{{0..{SHARDS - 1}}}.tar.gz", count=len(kept))

    return make


def load(stream, count, batch_size=4, seed=0, augmentation=UNCHANGED, **options):
    """So many batches, and what it takes to go on behind them."""
    stream = StreamBatches(stream, (4, 4), 1, augmentation, batch_size, seed, buffer=3, **options)
    with contextlib.closing(stream.batches()) as batches:
        return list(itertools.islice(batches, count)), stream.where()


def numbers(batches):
    """The images' numbers, which their pixels and their indices must agree on."""
    found = []
    for batch in batches:
        found += batch.images[:, 0, 0, 0].tolist()
        places = [divmod(index, SHARD_FACTOR) for index in batch.indices.tolist()]
        assert [shard * EACH + at for shard, at in places] == found[-len(places) :]
    return found


@pytest.mark.parametrize("workers", [0, 3, 20])
def test_an_epoch_sees_every_image_once_and_the_next_in_another_order(make, workers):
    given = numbers(load(make(), 12, num_workers=workers)[0])
    epochs = [given[:24], given[24:]]
    assert [set(epoch) for epoch in epochs] == [ALL, ALL]
    assert epochs[0] != epochs[1]
    assert epochs[0] != sorted(ALL)
    assert numbers(load(make(), 6, seed=1, num_workers=workers)[0]) != epochs[0]


def test_what_does_not_fill_a_batch_is_kept(make):
    given = numbers(load(make(), 24, batch_size=5, num_workers=2)[0])
    assert all(given.count(number) == 5 for number in ALL)  # 24 x 5 images are 5 epochs


@pytest.mark.parametrize("world_size", [2, 3])  # 4 shards are 2 for each, or all for each
def test_ranks_share_each_epoch_without_overlap(make, world_size):
    share = len(ALL) // world_size
    options = {"world_size": world_size, "num_workers": 2}
    ranks = [load(make(), share // 4, rank=rank, **options)[0] for rank in range(world_size)]
    assert sorted(numbers(itertools.chain(*ranks))) == sorted(ALL)


@pytest.mark.parametrize(("workers", "done"), [(0, 0), (0, 20), (2, 5), (2, 53)])
def test_a_resumed_epoch_repeats_nothing_and_lacks_the_buffers_alone(make, workers, done):
    before, place = load(make(), done, 1, num_workers=workers)
    after, _ = load(make(), 3 * len(ALL), 1, num_workers=workers, state=place)
    seen, after = numbers(before)[done - done % len(ALL) :], numbers(after)
    left = len(ALL) - len(seen) - 3 * max(1, workers)
    assert len({*seen, *after[:left]}) == len(seen) + left
    assert set(after[-2 * len(ALL) :]) == ALL


def test_another_number_of_workers_begins_the_epoch_anew(make, caplog):
    _, place = load(make(), 9, num_workers=2)
    given, _ = load(make(), 6, num_workers=1, state=place)
    assert "begins anew: it was shared by 1 process(es) with 2 worker(s)" in caplog.text
    assert set(numbers(given)) == ALL
    assert json.loads(place)["epoch"] == 1


def test_augmentation_depends_on_seed_epoch_and_image_alone(tmp_path, encode):
    random = np.random.default_rng(0)
    images = [encode(random.integers(0, 256, (9, 9), dtype=np.uint8)) for _ in range(8)]
    for shard in (0, 1):
        write_tar(tmp_path / f"{shard}.tgz", images[4 * shard :][:4])
    stream = open_stream(f"{tmp_path}/*.tgz", count=8)
    seen = []
    for workers in (0, 2):
        given, _ = load(stream, 8, 2, augmentation=Augmentation(), num_workers=workers)
        pairs = []
        for batch in given:
            pairs += zip(batch.indices.tolist(), batch.images.tolist(), strict=True)
        seen.append([dict(pairs[:8]), dict(pairs[8:])])
    assert seen[0] == seen[1]
    assert seen[0][0] != seen[0][1]


def test_broken_and_deadly_images_are_passed_over_and_told(make, contents, monkeypatch, tmp_path):
    decode = source.decode

    def decode_or_die(content, *rest):
        if content == contents[7]:
            os.kill(os.getpid(), signal.SIGSEGV)
        if content == contents[20]:
            time.sleep(1000)
        return decode(content, *rest)

    monkeypatch.setattr(source, "decode", decode_or_die)
    monkeypatch.setattr(module, "IMAGE_SECONDS", 2.0)
    batches, _ = load(make({15: b"broken"}), 7, batch_size=3, num_workers=2)
    assert set(numbers(batches)) == ALL - {7, 15, 20}
    assert sorted(itertools.chain(*(batch.broken for batch in batches))) == [
        f"{tmp_path}/1.tar.gz member 1.png: ends the process that decodes it (exit code -11)",
        f"{tmp_path}/2.tar.gz member 3.png: not an image in a known format",
        f"{tmp_path}/3.tar.gz member 2.png: takes its decoder more than 2 seconds",
    ]


@pytest.mark.parametrize("limit", [5, 100])
def test_nothing_readable_is_the_users_error(make, monkeypatch, users_error, limit):
    monkeypatch.setattr(module, "MAX_REPLACEMENTS", limit)
    message = f"{limit} images in a row can't" if limit < len(ALL) else "no image can be read"
    stream = make(dict.fromkeys(ALL, b"broken"))
    assert f"3 more: {message}" in users_error(lambda: load(stream, 1, num_workers=1))


def test_the_first_images_are_held_out(make, contents):
    head, rest = make().hold_out(8)
    assert [head.content(index) for index in range(len(head))] == contents[:8]
    assert head.describe(7).endswith("1.tar.gz member 1.png")
    assert rest.count == 16
    assert set(numbers(load(rest, 8, num_workers=2)[0])) == ALL - set(range(8))
    with pytest.raises(UserError, match="holds 24 images, and 24 are held out; hold out fewer"):
        make().hold_out(24)


def test_a_damaged_shard_ends_with_a_broken_row(tmp_path):
    contents = [np.random.default_rng(0).bytes(5000)] * 24  # so large that the cut is in one
    content = write_tar(tmp_path / "0.tar.gz", contents).read_bytes()
    (tmp_path / "0.tar.gz").write_bytes(content[: len(content) * 2 // 3])
    stream = Stream([f"{tmp_path}/0.tar.gz", f"{tmp_path}/nowhere.tar.gz"], 24)
    *rows, last = stream.rows([0])
    assert [row["content"] for row in rows] == contents[: len(rows)]
    assert str(last["content"]).startswith("the shard ends here")
    (missing,) = stream.rows([1])
    assert "FileNotFoundError" in str(missing["content"])


def test_members_of_any_promised_size_take_no_memory(tmp_path, contents, monkeypatch):
    monkeypatch.setattr(module, "LARGEST_MEMBER", len(contents[0]) + 5)
    path = write_tar(tmp_path / "0.tar.gz", [contents[0], b"x" * 10_000, contents[0]])
    rows = list(Stream([str(path)], 3).rows([0]))
    first, large, last = (row["content"] for row in rows)
    assert first == last == contents[0]
    assert isinstance(large, BrokenImage)


def test_what_is_a_stream(tmp_path, contents):
    path = write_tar(tmp_path / "0.tar", contents)
    for data in (None, tmp_path, path, f"{tmp_path}/*.tar", str(tmp_path / "nowhere")):
        assert open_stream(data) is None
    packed = write_tar(tmp_path / "0.tar.gz", contents)
    for opened, message in (
        (lambda: open_source(packed, "train"), "a single file; give"),
        (lambda: open_stream(packed), "does not say its length; give the image count"),
        (lambda: open_source("https://a/0.tar", "train"), "is elsewhere and is only read as a str"),
        (lambda: open_stream("nonsense://a/0.tar", 5), r"can't be opened .*nonsense"),
    ):
        with pytest.raises(UserError, match=message):
            opened()


class Handler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


def test_shards_at_addresses(make, tmp_path):
    make()
    handler = functools.partial(Handler, directory=tmp_path)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}/{{0..3}}.tar.gz"
        head, rest = open_stream(address, count=24).hold_out(4)  # in this process, and in workers
        given = numbers(load(rest, 5, num_workers=2)[0])
        server.shutdown()
    assert len(head) == 4
    assert set(given) == ALL - set(range(4))


@pytest.mark.parametrize("data", ["pipe:touch {}", "PIPE:touch {}", "{{Pipe:touch {},a://b}}"])
def test_a_command_is_never_run(tmp_path, data):
    canary = tmp_path / "canary"
    text = data.format(canary)
    with pytest.raises(UserError, match=r"does not exist|is elsewhere"):
        open_source(text, "train")
    with contextlib.suppress(UserError):  # or else `open_source` is asked, as above
        assert open_stream(text, count=5) is None
    (row,) = Stream([text], 5).rows([0])
    assert isinstance(row["content"], BrokenImage)
    assert not canary.exists()
