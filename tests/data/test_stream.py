import io
import itertools
import pickle
import tarfile

import datasets
import numpy as np
import pytest
import torch

from backfold.data.augmentation import Augmentation
from backfold.data.decode import decode
from backfold.data.hugging_face_stream import HuggingFaceStream
from backfold.data.source import open_source, open_stream
from backfold.data.stream import StreamItem, StreamSource, TarStream
from backfold.data.stream_loading import SHARD_FACTOR, plan_stream, stream_loader
from backfold.errors import UserError

pytestmark = [
    pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning"),
]
PLAIN = Augmentation(random_crop=False, horizontal_flip=False)


class Numbers(StreamSource):
    """Shards of one-value images: shard * 16 + position."""

    name = "numbers"
    max_pixels = 10**6

    def __init__(self, encode, sizes=(8,) * 8, broken=()):
        self.sizes = sizes
        self.count = sum(sizes)
        self.opened = []
        self.contents = {
            (shard, position): b"broken"
            if (shard, position) in broken
            else encode(np.full((4, 4), (16 * shard + position) % 256, dtype=np.uint8))
            for shard, size in enumerate(sizes)
            for position in range(size)
        }

    @property
    def shards(self):
        return len(self.sizes)

    def open_shard(self, shard):
        self.opened.append(shard)
        for position in range(self.sizes[shard]):
            place = f"shard {shard} position {position}"
            yield StreamItem(shard, position, place, self.contents[shard, position])


def load(source, start=0, total=16, num_workers=0, augmentation=PLAIN, batch_size=4, **options):
    loader = stream_loader(
        source, (4, 4), 1, augmentation, batch_size, 0, start, total,
        num_workers=num_workers, buffer=options.pop("buffer", 3), **options,
    )  # fmt: skip
    return list(loader)


def places(batches):
    return [[divmod(index, SHARD_FACTOR) for index in batch.indices.tolist()] for batch in batches]


def same(left, right):
    return len(left) == len(right) and all(
        torch.equal(a.images, b.images)
        and torch.equal(a.indices, b.indices)
        and a.broken == b.broken
        for a, b in zip(left, right, strict=True)
    )


def test_batches_hold_the_images_that_their_indices_say(encode):
    source = Numbers(encode)
    for batch, where in zip(load(source), places(load(source)), strict=True):
        assert batch.images.shape == (4, 1, 4, 4)
        assert batch.images[:, 0, 0, 0].tolist() == [16 * shard + at for shard, at in where]


def test_an_epoch_sees_every_image_once_and_the_next_in_another_order(encode):
    batches = places(load(Numbers(encode), total=32))
    epochs = [list(itertools.chain(*batches[first : first + 16])) for first in (0, 16)]
    for epoch in epochs:
        assert sorted(epoch) == [(shard, at) for shard in range(8) for at in range(8)]
    assert epochs[0] != epochs[1]
    assert epochs[0] != sorted(epochs[0])


@pytest.mark.parametrize("num_workers", [1, 2, 3, 4, 8, 11])
def test_workers_do_not_change_the_bits(encode, num_workers):
    source = Numbers(encode, sizes=(3,) * 33)
    assert plan_stream(source, 4, 1).lanes == 8
    whole = load(source, total=30, augmentation=Augmentation())
    assert same(load(source, total=30, augmentation=Augmentation(), num_workers=num_workers), whole)


@pytest.mark.parametrize(("start", "num_workers"), [(1, 0), (7, 2), (16, 0), (21, 4), (21, 0)])
def test_resumption_gives_the_tail(encode, start, num_workers):
    source = Numbers(encode, broken=((3, 1), (6, 6)))
    whole = load(source, total=24, augmentation=Augmentation())
    tail = load(source, start, 24, num_workers, Augmentation())
    assert same(tail, whole[start:])


def test_resumption_skips_within_the_epoch_only(encode):
    source = Numbers(encode)
    load(source, start=16 * 1000, total=16 * 1000 + 1)
    assert len(source.opened) <= 2


@pytest.mark.parametrize(("sizes", "world_size"), [((8,) * 8, 2), ((8,) * 8, 4), ((64,), 2)])
def test_ranks_share_each_epoch_without_overlap(encode, sizes, world_size):
    source = Numbers(encode, sizes) if len(sizes) > 1 else Numbers(encode, (16,) * 1)
    steps = plan_stream(source, 2, world_size).steps_per_epoch
    ranks = [
        places(load(source, total=steps, batch_size=2, rank=rank, world_size=world_size))
        for rank in range(world_size)
    ]
    seen = [set(itertools.chain(*rank)) for rank in ranks]
    for left, right in itertools.combinations(seen, 2):
        assert not left & right
    assert sum(map(len, seen)) == steps * 2 * world_size
    assert set().union(*seen) <= set(source.contents)


def test_uneven_shards_never_stop_an_epoch(encode):
    source = Numbers(encode, sizes=(1, 2, 3, 16, 4, 1, 2, 3))
    plan = plan_stream(source, 4, 1)
    batches = places(load(source, total=40 * plan.steps_per_epoch))
    assert len(batches) == 40 * plan.steps_per_epoch
    assert set(itertools.chain(*batches)) == set(source.contents)


@pytest.mark.parametrize(
    ("sizes", "batch", "world", "lanes", "steps"),
    [
        ((8,) * 8, 4, 1, 2, 16), ((8,) * 8, 4, 2, 1, 8), ((8,) * 8, 16, 1, 2, 4),
        ((8,) * 7, 4, 1, 1, 14), ((8,) * 20, 4, 1, 4, 40), ((8,), 4, 4, 1, 0), ((8,), 4, 1, 1, 2),
        ((8,) * 70, 4, 1, 8, 136), ((8,) * 70, 100, 1, 4, 4), ((1,) * 33, 4, 1, 8, 8),
    ],
)  # fmt: skip
def test_plan(encode, sizes, batch, world, lanes, steps):
    source = Numbers(encode, sizes)
    if steps == 0:
        with pytest.raises(UserError, match="8 images are fewer than one global batch of 16"):
            plan_stream(source, batch, world)
        return
    plan = plan_stream(source, batch, world)
    assert (plan.lanes, plan.steps_per_epoch) == (lanes, steps)


def test_the_buffer_shuffles_within_a_shard(encode):
    source = Numbers(encode, sizes=(16,))
    in_order = [(0, at) for at in range(16)]
    assert list(itertools.chain(*places(load(source, total=4, buffer=1)))) == in_order
    mixed = list(itertools.chain(*places(load(source, total=4, buffer=8))))
    assert sorted(mixed) != mixed
    firsts = {
        divmod(int(next(iter(loader)).indices[0]), SHARD_FACTOR)[1]
        for seed in range(60)
        for loader in [stream_loader(source, (4, 4), 1, PLAIN, 1, seed, 0, 1, buffer=8)]
    }
    assert firsts == set(range(8))


def test_broken_images_are_told_and_replaced(encode):
    broken = ((0, 0), (3, 1), (3, 2))
    batches = load(Numbers(encode, broken=broken))
    lines = [line for batch in batches for line in batch.broken]
    assert sorted(lines) == [
        f"shard {shard} position {at}: not an image in a known format" for shard, at in broken
    ]
    seen = set(itertools.chain(*places(batches)))
    assert seen == {(s, p) for s in range(8) for p in range(8)} - set(broken)
    for batch, where in zip(batches, places(batches), strict=True):
        assert batch.images[:, 0, 0, 0].tolist() == [16 * shard + at for shard, at in where]


@pytest.mark.parametrize("num_workers", [0, 1])
def test_nothing_readable_is_the_users_error(encode, num_workers):
    source = Numbers(encode, (8,), broken=[(0, at) for at in range(8)])
    try:
        load(source, total=2, num_workers=num_workers)
    except UserError as error:
        # Without its traceback the loader is let go of at once, and its workers end.
        message = str(error.with_traceback(None))
    assert message.startswith("numbers: 4 images in a row can't be read, the last is shard 0 ")
    assert "\n" not in message


def test_the_head_is_held_out(encode):
    source = Numbers(encode)
    head = source.head(11)
    assert len(head) == 11
    assert head.following == (1, 3)
    assert source.head(8).following == (1, 0)
    assert [int(head.read(index)[0, 0, 0]) for index in range(11)] == [*range(8), 16, 17, 18]
    assert head.describe(9) == "shard 1 position 1"
    seen = set(itertools.chain(*places(load(source, total=40, head=head))))
    assert seen == {(s, p) for s in range(8) for p in range(8) if (s, p) >= (1, 3)}
    plan = plan_stream(source, 4, 1, head)
    assert (plan.lanes, plan.steps_per_epoch) == (1, 13)
    for count in (64, 1000):
        with pytest.raises(UserError, match=f"holds 64 images, and {count} are held out; hold"):
            source.head(count)


def write_tar(path, contents, mode="w:gz"):
    with tarfile.open(path, mode) as tar:
        for number, content in enumerate(contents):
            for name, data in ((f"{number}.png", content), (f"{number}.cls", b"1")):
                member = tarfile.TarInfo(name)
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    return path


@pytest.fixture
def contents(encode):
    random = np.random.default_rng(0)
    return [encode(random.integers(0, 256, (6, 7, 3), dtype=np.uint8)) for _ in range(6)]


def test_compressed_shards_are_streamed(tmp_path, contents):
    write_tar(tmp_path / "0.tar.gz", contents[:3])
    write_tar(tmp_path / "1.tar.gz", contents[3:])
    data = f"{tmp_path}/{{0..1}}.tar.gz"
    with pytest.raises(UserError, match=r"2 files of kind \.gz; give"):
        open_source(data, "train")
    stream = open_stream(data, count=6)
    assert stream.shards == 2
    items = [item for shard in range(2) for item in stream.open_shard(shard)]
    assert [item.content for item in items] == contents
    assert items[4].place == f"{tmp_path}/1.tar.gz member 1.png"
    copy = pickle.loads(pickle.dumps(stream))
    assert next(copy.open_shard(1)).content == contents[3]
    with pytest.raises(UserError, match="does not say its length; give the image count"):
        open_stream(data)


def test_a_command_is_a_stream(tmp_path, contents):
    path = write_tar(tmp_path / "0.tar", contents, "w")
    stream = open_stream(f"pipe:cat {path}", count=6)
    assert [item.content for item in stream.open_shard(0)] == contents
    with pytest.raises(UserError, match="is elsewhere and is only read as a stream"):
        open_source(f"pipe:cat {path}", "train")


def test_a_damaged_shard_ends_with_a_broken_item(tmp_path, contents):
    content = write_tar(tmp_path / "0.tar.gz", contents).read_bytes()
    (tmp_path / "0.tar.gz").write_bytes(content[: len(content) * 2 // 3])
    stream = TarStream([f"{tmp_path}/0.tar.gz", f"{tmp_path}/nowhere.tar.gz"], count=6)
    items = list(stream.open_shard(0))
    assert [item.content for item in items[:-1]] == contents[: len(items) - 1]
    assert items[-1].reason.startswith("the shard ends here")
    (missing,) = stream.open_shard(1)
    assert "FileNotFoundError" in missing.reason


def test_members_of_any_promised_size_take_no_memory(tmp_path, contents, monkeypatch):
    monkeypatch.setattr("backfold.data.stream.LARGEST_MEMBER", len(contents[0]) + 5)
    path = write_tar(tmp_path / "0.tar.gz", [contents[0], b"x" * 10_000, contents[0]])
    items = list(TarStream([str(path)], count=3).open_shard(0))
    assert [item.content for item in items] == [contents[0], None, contents[0]]
    assert "bytes" in items[1].reason


def test_what_can_be_opened_is_no_stream(tmp_path, contents):
    path = write_tar(tmp_path / "0.tar", contents, "w")
    for data in (None, tmp_path, path, f"{tmp_path}/*.tar", str(tmp_path / "nowhere")):
        assert open_stream(data) is None


def test_a_hugging_face_stream(contents):
    rows = {"image": [{"bytes": content, "path": None} for content in contents]}
    made = datasets.Dataset.from_dict(rows, features=datasets.Features({"image": datasets.Image()}))
    stream = HuggingFaceStream(made.to_iterable_dataset(num_shards=3), "x", count=6)
    assert stream.shards == 3
    found = [[item.content for item in stream.open_shard(shard)] for shard in range(3)]
    assert found == [contents[:2], contents[2:4], contents[4:]]
    whole = load(stream, total=6, batch_size=2)
    assert same(load(stream, start=4, total=6, batch_size=2, num_workers=1), whole[4:])
    expected = decode(contents[0])
    assert stream.head(1).read(0).equal(expected)
    with pytest.raises(UserError, match="count 0; give"):
        HuggingFaceStream(made.to_iterable_dataset(), "x", count=0)
