"""Ctrl-C, SIGTERM and a cluster's preemption: the step is finished and saved, then the run ends."""

import signal

import pytest
from forked_runs import FOREVER
from test_resume import assert_same_run, rows

STEPS = 12
SLOW_WORKERS = {"num_workers": 2, "prefetch": 1}
TERM = (0.0, signal.SIGTERM, False)


@pytest.fixture
def run(runner):
    # Checkpoints only where the held-out images are looked at: after steps 0, 9 and 12.
    return runner(checkpoint_minutes=1000.0)


@pytest.fixture
def goes_on(unbroken):
    def check(run):
        assert run.resume().code == 0, run.said
        assert_same_run(unbroken.folder, run.folder)
        assert [int(row["step"]) for row in rows(run.folder)] == list(range(1, STEPS + 1))

    return check


def last_line(run):
    return run.said.splitlines()[-1]


STEP = {"moment": "step", "count": 4}
# Of each batch's 8 images a worker takes 1.2 seconds: the signal finds the run waiting.
WAITING = {"moment": "batch", "count": 4, "image_seconds": 0.15}


@pytest.mark.parametrize(
    ("when", "number", "to_group"),
    [
        pytest.param(STEP, signal.SIGTERM, True, id="SIGTERM in a step"),
        pytest.param(STEP, signal.SIGINT, False, id="Ctrl-C in a step"),
        pytest.param(WAITING, signal.SIGTERM, False, id="SIGTERM waiting for workers"),
        pytest.param(WAITING, signal.SIGINT, True, id="Ctrl-C waiting for workers, to all"),
    ],
)
def test_a_signal_stops_the_run_behind_a_checkpoint(runner, goes_on, when, number, to_group):
    run = runner(checkpoint_minutes=1000.0, **(SLOW_WORKERS if when is WAITING else {}))
    delay = 0.3 if when is WAITING else 0.0
    assert run.start(signals=[(delay, number, to_group)], **when).code == 128 + number, run.said
    assert "Traceback" not in run.said
    # Whether the step was still taken, or the workers had left: what was done is saved.
    assert 3 <= run.step < 9
    assert f"{number.name} at step {run.step} of {STEPS}, which is saved" in last_line(run)
    assert "--resume" in last_line(run)
    goes_on(run)


@pytest.mark.parametrize(
    ("moment", "count", "steps", "code"),
    [
        # Whether or not another step is taken: nothing that was done is lost.
        pytest.param("watch", 1, {0, 1}, 143, id="first look"),
        pytest.param("watch", 2, {9}, 143, id="look"),
        pytest.param("write last.ckpt", 2, {9, 10}, 143, id="checkpoint"),
        pytest.param("step", STEPS, {STEPS}, 0, id="last step"),
    ],
)
def test_what_is_going_on_is_finished(run, goes_on, moment, count, steps, code):
    # A scheduler signals every process, and a launcher passes on what it got.
    signals = [TERM, (0.1, signal.SIGTERM, True), (0.1, signal.SIGTERM, True)]
    outcome = run.start(moment=moment, count=count, hold=0.5, signals=signals)
    assert outcome.code == code, run.said
    assert run.step in steps
    goes_on(run)


def test_a_second_ctrl_c_leaves_at_once(run, goes_on):
    first, second = (0.3, signal.SIGINT, True), (3.0, signal.SIGINT, True)
    # The step never ends: were the second one only noted, too, the run would hang. It comes late,
    # as two that a busy machine delivers together are one.
    outcome = run.start(hold=FOREVER, signals=[first, second], **STEP)
    assert outcome.code == 130, run.said
    assert "Traceback" not in run.said
    assert "interrupted; `backfold pretrain --resume --out" in last_line(run)
    assert run.step == 0
    goes_on(run)


def test_a_run_stops_that_waits_for_an_image_that_never_comes(runner, goes_on):
    run = runner(checkpoint_minutes=1000.0, **SLOW_WORKERS)
    term = (0.3, signal.SIGTERM, True)
    outcome = run.start(moment="batch", count=1, signals=[term], image_seconds=3600.0)
    assert outcome.code == 143, run.said
    assert "SIGTERM at step 0 of" in last_line(run)
    goes_on(run)


@pytest.fixture
def slurm(tmp_path):
    """The environment of a job whose `scontrol` writes down how it was called."""
    calls = tmp_path / "bin" / "calls"
    calls.parent.mkdir()
    scontrol = calls.with_name("scontrol")
    scontrol.write_text(f'#!/bin/sh\necho "$@" >> {calls}\necho "told: $@" >&2\nexit $ANSWER\n')
    scontrol.chmod(0o755)

    def environment(answer=0):
        return {
            "PATH": f"{calls.parent}:/usr/bin:/bin", "SLURM_JOB_ID": "4711", "ANSWER": str(answer),
        }  # fmt: skip

    return environment, lambda: calls.read_text().split("\n")[:-1] if calls.exists() else []


@pytest.mark.parametrize(
    ("number", "answer"),
    [
        pytest.param(signal.SIGUSR1, 0, id="SIGUSR1"),
        pytest.param(signal.SIGTERM, 1, id="SIGTERM, refused"),
        pytest.param(signal.SIGINT, None, id="Ctrl-C"),
    ],
)
def test_a_preempted_run_queues_itself_again(run, slurm, number, answer):
    environment, calls = slurm
    outcome = run.start(signals=[(0.0, number, False)], env=environment(answer or 0), **STEP)
    asked = [] if answer is None else ["requeue 4711"]
    assert (outcome.code, calls()) == (128 + number, asked), run.said
    assert ("queued the job again" in last_line(run)) == (answer == 0)
    assert ("did not requeue job 4711: told: requeue 4711" in run.said) == (answer == 1)
    assert 3 < run.step < 9


def test_a_job_stopped_before_its_first_step_is_queued_again_and_starts_over(run, goes_on, slurm):
    environment, calls = slurm
    outcome = run.start(moment="warm-up", hold=FOREVER, signals=[TERM], env=environment())
    assert (outcome.code, calls()) == (143, ["requeue 4711"]), run.said
    assert "Traceback" not in run.said
    goes_on(run)


def test_a_requeued_job_goes_on_with_the_command_that_started_it(run, goes_on, slurm):
    environment, _ = slurm
    assert run.start(signals=[TERM], env=environment(), **STEP).code == 143
    again = run.start(env=environment() | {"SLURM_RESTART_COUNT": "1"})
    assert again.code == 0, run.said
    assert f"resuming at step 4 of {STEPS}" in run.said
    goes_on(run)
