import csv

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.summary.writer import event_file_writer

from backfold.training.metrics_log import COLUMNS, MetricsLog
from backfold.training.run_folder import RunFolder


def row(step, loss=0.5):
    return dict.fromkeys(COLUMNS, 0.25) | {"step": step, "loss": loss}


def read(folder):
    with folder.metrics.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture
def folder(tmp_path):
    return RunFolder(tmp_path)


def write(folder, steps_done, steps, loss=0.5):
    log = MetricsLog(folder, steps_done)
    for step in steps:
        log.add(row(step, loss))
    log.close()


def test_rows_are_there_at_once(folder):
    log = MetricsLog(folder, 0)
    assert folder.metrics.read_text() == ",".join(COLUMNS) + "\n"
    log.add(row(1, loss=1 / 3))
    assert read(folder) == [dict.fromkeys(COLUMNS, "0.25") | {"step": "1", "loss": "0.333333"}]
    events = EventAccumulator(str(folder.tensorboard)).Reload()
    assert [event.step for event in events.Scalars("train/energy_gap")] == [1]
    log.close()


def test_large_steps_are_written_whole(folder):
    write(folder, 0, [12345678])
    assert read(folder)[0]["step"] == "12345678"


def test_a_resumed_run_keeps_the_rows_up_to_its_checkpoint(folder):
    write(folder, 0, [1, 2, 3, 4, 5], loss=0.5)
    write(folder, 3, [4, 5, 6], loss=0.75)
    found = [(int(line["step"]), float(line["loss"])) for line in read(folder)]
    assert found == [(1, 0.5), (2, 0.5), (3, 0.5), (4, 0.75), (5, 0.75), (6, 0.75)]


def test_half_a_row_is_dropped(folder):
    write(folder, 0, [1, 2, 3])
    text = folder.metrics.read_text()
    folder.metrics.write_text(text[: text.rindex("0.25,0.25")])
    write(folder, 2, [3])
    assert [int(line["step"]) for line in read(folder)] == [1, 2, 3]


def test_starting_anew_drops_all_rows(folder):
    write(folder, 0, [1, 2])
    write(folder, 0, [1])
    assert [int(line["step"]) for line in read(folder)] == [1]


def test_tensorboard_reads_logs_of_one_second_in_their_order(folder, monkeypatch):
    # Names end with a number that counts up, and "10" would be read before "9".
    monkeypatch.setattr(event_file_writer, "_global_uid", event_file_writer.AtomicCounter(9))
    for step in range(4):
        write(folder, step, [step + 1, step + 2], loss=float(step))
    events = EventAccumulator(str(folder.tensorboard)).Reload()
    found = [(event.step, event.value) for event in events.Scalars("train/loss")]
    assert found == [(1, 0.0), (2, 1.0), (3, 2.0), (4, 3.0), (5, 3.0)]


def test_tensorboard_has_each_step_once(folder):
    entry = {
        "step": 2, "psnr_gain_db": 1.5, "energy_gap": 2.0, "auroc": 0.9, "rank_me": 7.0,
        "knn": None, "tasks": {"masking": {"auroc": 0.9}},
    }  # fmt: skip
    log = MetricsLog(folder, 0)
    for step in (1, 2, 3):
        log.add(row(step, loss=step))
    log.add_health(entry)
    log.close()
    write(folder, 2, [3, 4], loss=9.0)
    events = EventAccumulator(str(folder.tensorboard)).Reload()
    losses = {event.step: event.value for event in events.Scalars("train/loss")}
    assert losses == {1: 1.0, 2: 2.0, 3: 9.0, 4: 9.0}
    assert len(events.Scalars("train/loss")) == 4
    assert [event.value for event in events.Scalars("held_out/psnr_gain_db")] == [1.5]
    assert "held_out/knn" not in events.Tags()["scalars"]
    assert events.Scalars("held_out_masking/auroc")[0].value == pytest.approx(0.9)
