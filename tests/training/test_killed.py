"""Runs ended by SIGKILL or a full disk at chosen and at random moments, resumed until they end."""

import signal

import numpy as np
import pytest
from forked_runs import FOREVER
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_resume import assert_same_run, rows

from backfold.data.augmentation import Augmentation
from tiny_run import TINY_VIT

STEPS = 12  # of which 9 are an epoch
KILL = [(0.0, signal.SIGKILL, False)]
RANDOM = {
    "augmentation": Augmentation(crop_scale=(0.3, 1.0)),
    "backbone_options": {**TINY_VIT, "depth": 2, "drop_path_rate": 0.3, "proj_drop_rate": 0.1},
}


def assert_nothing_lost(whole, run):
    assert_same_run(whole.folder, run.folder)
    events = EventAccumulator(str(run.folder.tensorboard)).Reload()
    for steps in (
        [int(row["step"]) for row in rows(run.folder)],
        [event.step for event in events.Scalars("train/loss")],
    ):
        assert steps == list(range(1, STEPS + 1))
    assert not list(run.folder.root.rglob("*.tmp"))


@pytest.mark.parametrize(
    ("moment", "count", "completed"),
    [
        pytest.param("warm-up", 1, None, id="warming up"),
        pytest.param("torn step-*.ckpt", 1, None, id="first checkpoint"),
        pytest.param("write last.ckpt", 1, None, id="first checkpoint, still unnamed"),
        pytest.param("step", 1, 0, id="first step"),
        pytest.param("stepped", 5, 4, id="after a step"),
        pytest.param("torn step-*.ckpt", 6, 4, id="writing a checkpoint"),
        pytest.param("torn last.ckpt", 6, 4, id="naming a checkpoint"),
        pytest.param("batch", 10, 9, id="between epochs"),
        pytest.param("watch", 2, 8, id="evaluating"),
        pytest.param("torn *.png", 2, 8, id="drawing"),
        pytest.param("written last.ckpt", 10, 9, id="behind the best checkpoint"),
        pytest.param("torn best.ckpt", 2, None, id="writing the best checkpoint"),
        pytest.param("torn run.json", STEPS + 1, None, id="last facts"),
        pytest.param("torn backbone.safetensors", 1, STEPS, id="exporting"),
    ],
)
def test_a_run_killed_at_this_moment_goes_on(runner, unbroken, moment, count, completed):
    killed = runner()
    outcome = killed.start(moment=moment, count=count, hold=FOREVER, signals=KILL)
    assert outcome == (-signal.SIGKILL, True), killed.said
    assert completed is None or killed.step == completed
    assert killed.resume().code == 0, killed.said
    assert completed is None or f"resuming at step {completed} of" in killed.said
    assert moment != "warm-up" or "no checkpoint yet" in killed.said
    assert_nothing_lost(unbroken, killed)


def test_a_run_killed_before_it_wrote_anything_starts_anew(runner, unbroken):
    killed = runner()
    outcome = killed.start(moment="torn config.yaml", hold=FOREVER, signals=KILL)
    assert outcome == (-signal.SIGKILL, True), killed.said
    assert killed.start().code == 0, killed.said
    assert_nothing_lost(unbroken, killed)


def test_steps_behind_no_checkpoint_are_taken_and_told_once_more(runner, unbroken):
    killed = runner(checkpoint_minutes=1000.0)
    outcome = killed.start(moment="stepped", count=5, hold=FOREVER, signals=KILL)
    assert (outcome.code, killed.step) == (-signal.SIGKILL, 0), killed.said
    assert killed.resume().code == 0, killed.said
    assert_nothing_lost(unbroken, killed)


def kill_until_done(run, seed, kills):
    """Kill at random moments, then let it end; returns how many died."""
    random = np.random.default_rng(seed)
    outcome = run.start(**draw(random))
    died, step = 0, 0
    while outcome.code != 0:
        assert outcome.code == -signal.SIGKILL, run.said
        died += 1
        has_checkpoint = run.folder.last_checkpoint.exists()
        before, step = step, run.step if has_checkpoint else 0
        assert step >= before
        outcome = run.resume(**(draw(random) if died < kills else {}))
        line = f"resuming at step {step} of" if has_checkpoint else "starting from step 0"
        assert line in run.said or outcome.code, run.said
    return died


def draw(random):
    """Some events into the run; then at once, or some milliseconds later, in whatever it does."""
    moments = {"*": 40, "step": 4, "torn *": 12, "write *": 12, "written *": 12, "watch": 1}
    moment = str(random.choice(list(moments)))
    # Who goes on after half of its file is gone would not have been killed.
    hold = FOREVER if moment in ("*", "torn *") or random.random() < 0.3 else 0.0
    delay = 0.0 if hold else float(random.uniform(0, 0.05))
    return {
        "moment": moment,
        "count": int(random.integers(1, moments[moment] + 1)),
        "hold": hold,
        "signals": [(delay, signal.SIGKILL, False)],
    }


@pytest.mark.slow
@pytest.mark.parametrize(
    ("seed", "changes"),
    [
        pytest.param(2, RANDOM | {"pretext": "mixture", "num_workers": 2}, id="mixture, 2 workers"),
        pytest.param(3, RANDOM | {"checkpoint_minutes": 0.002}, id="checkpoints by the clock"),
    ],
)
def test_a_run_killed_at_random_moments_ends_in_the_same_bits(runner, seed, changes):
    whole, killed = runner("whole", **changes), runner("killed", **changes)
    assert whole.start().code == 0, whole.said
    assert kill_until_done(killed, seed, kills=6) >= 3
    assert_nothing_lost(whole, killed)


@pytest.mark.parametrize(
    ("moment", "count", "step", "workers", "largest_file"),
    [
        pytest.param("step", 5, 4, 0, 0, id="in a step"),
        pytest.param("step", 5, 4, 2, 0, id="in a step, beside workers"),
        pytest.param("written last.ckpt", 6, 5, 0, 0, id="behind a checkpoint"),
        pytest.param("watch", 2, 8, 0, 0, id="evaluating"),
        pytest.param("written last.ckpt", STEPS + 1, STEPS, 2, 0, id="at the end"),
        # A limit of the system, such as a quota's, in the midst of writing.
        pytest.param("step", 5, 4, 0, 20_000, id="a file too large"),
    ],
)
def test_a_full_disk_stops_the_run_behind_its_last_checkpoint(
    runner, unbroken, moment, count, step, workers, largest_file
):
    run = runner(num_workers=workers)
    full, reason = str(run.folder.root), "No space left"
    if largest_file:
        full, reason = "", "File too large"
    outcome = run.start(moment=moment, count=count, full=full, largest_file=largest_file)
    assert outcome == (2, True), run.said
    (error,) = (line for line in run.said.splitlines() if reason in line)
    assert error.startswith("backfold: error: ")
    assert "free space or choose another --out" in error
    assert "Traceback" not in run.said
    assert "Logging error" not in run.said
    assert run.step == step
    assert run.resume().code == 0, run.said
    assert_same_run(unbroken.folder, run.folder)
    assert not list(run.folder.root.rglob("*.tmp"))
