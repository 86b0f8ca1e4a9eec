"""Speed, gains and waiting while a run trains, and the rows that keep them."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from skimage.metrics import peak_signal_noise_ratio
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.summary.writer import event_file_writer

from backfold.pretext import Corruption
from backfold.training.log import COLUMNS, Meter, MetricsLog
from backfold.training.step import Restored
from tiny_run import rows_of


@pytest.fixture
def take_step(monkeypatch):
    """Lets a meter wait and work so many seconds of a clock that else stands still."""
    now = [1000.0]
    monkeypatch.setattr("backfold.training.log.time", SimpleNamespace(monotonic=lambda: now[0]))

    def step(meter, waiting, working):
        meter.before_batch()
        now[0] += waiting
        meter.before_step(8)
        now[0] += working

    step.clock = now
    return step


def test_speed_and_share_of_waiting_leave_pauses_out(take_step):
    meter = Meter(50.0)  # a resumed run goes on counting
    take_step(meter, waiting=1.0, working=3.0)
    take_step(meter, waiting=0.0, working=4.0)
    assert meter.read() == pytest.approx((16 / 8, 1 / 8))
    with meter.pause():
        take_step.clock[0] += 100.0
    take_step(meter, waiting=1.0, working=3.0)
    assert meter.read() == pytest.approx((2.0, 0.25))
    assert meter.seconds() == pytest.approx(62.0)


@pytest.mark.parametrize(
    ("judged", "said"),
    [
        ([(1.0, 19)], []),
        ([(1.0, 19), (1.0, 1)], ["50%"]),
        ([(0.24, 20)], []),
        ([(0.24, 20), (0.26, 20), (1.0, 20)], ["21%"]),
    ],
)
def test_waiting_is_long_above_a_fifth_of_twenty_steps_and_told_once(
    take_step, caplog, judged, said
):
    meter = Meter(0.0)
    for waiting, steps in [(9.0, 100), *judged]:  # workers start
        for _ in range(steps):
            take_step(meter, waiting, working=1.0)
        meter.read()
    assert [message.split()[4] for message in caplog.messages] == said


def test_gains_count_only_where_the_loss_does_and_not_images_that_were_left_clean():
    generator = torch.Generator().manual_seed(0)
    clean, corrupted, restored = torch.randn(3, 4, 2, 6, 6, generator=generator)
    corrupted[1] = clean[1]  # as a mixture does
    mask = torch.rand(4, 1, 6, 6, generator=generator) < 0.5
    std = torch.tensor([0.2, 0.3])
    last = Restored(clean, Corruption(corrupted, mask), restored)

    def psnr(images, index):
        pixels = np.where(mask[index].numpy(), images[index].numpy(), clean[index].numpy())
        scale = std.numpy()[:, None, None]
        return peak_signal_noise_ratio(clean[index].numpy() * scale, pixels * scale, data_range=1)

    gains = [psnr(restored, index) - psnr(corrupted, index) for index in (0, 2, 3)]
    assert last.psnr_gain_db(std) == pytest.approx(np.mean(gains), abs=1e-4)
    energy = SimpleNamespace(of=lambda _: lambda images: images.sum(dim=(1, 2, 3)))
    gaps = (corrupted - clean).sum(dim=(1, 2, 3))[[0, 2, 3]]
    assert last.energy_gap(energy) == pytest.approx(gaps.mean().item(), rel=1e-5)


def row(step, loss=0.5):
    return dict.fromkeys(COLUMNS, 0.25) | {"step": step, "loss": loss}


def losses(folder):
    """(step, value) as TensorBoard reads them."""
    events = EventAccumulator(str(folder.tensorboard)).Reload()
    return [(event.step, event.value) for event in events.Scalars("train/loss")]


def write(folder, steps_done, steps, loss=0.5):
    log = MetricsLog(folder, steps_done)
    for step in steps:
        log.add(row(step, loss))
    log.close()


def test_rows_are_there_at_once(folder):
    log = MetricsLog(folder, 0)
    assert folder.metrics.read_text() == ",".join(COLUMNS) + "\n"
    log.add(row(1, loss=1 / 3))
    assert rows_of(folder) == [dict.fromkeys(COLUMNS, "0.25") | {"step": "1", "loss": "0.333333"}]
    assert losses(folder) == [(1, pytest.approx(1 / 3))]
    log.close()


@pytest.mark.parametrize("torn", ["2345678", "0.25,0.25"])
def test_half_a_row_is_dropped_and_starting_anew_drops_all(folder, torn):
    write(folder, 0, [1, 2, 12345678])
    text = folder.metrics.read_text()
    folder.metrics.write_text(text[: text.rindex(torn)])
    write(folder, 2, [12345679])
    assert [int(line["step"]) for line in rows_of(folder)] == [1, 2, 12345679]
    write(folder, 0, [1])
    assert [int(line["step"]) for line in rows_of(folder)] == [1]


def test_steps_of_logs_of_one_second_are_read_once_and_in_their_order(folder, monkeypatch):
    # Names end with a number that counts up, and "10" would be read before "9".
    monkeypatch.setattr(event_file_writer, "_global_uid", event_file_writer.AtomicCounter(9))
    for step in range(4):
        write(folder, step, [step + 1, step + 2], loss=float(step))
    expected = [(1, 0.0), (2, 1.0), (3, 2.0), (4, 3.0), (5, 3.0)]  # a resumed run's are there once
    assert losses(folder) == expected
    assert [(int(line["step"]), float(line["loss"])) for line in rows_of(folder)] == expected
