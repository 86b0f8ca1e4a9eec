"""Ctrl-C, SIGTERM and a cluster's preemption: the step is finished and saved, then the run ends."""

import signal

import pytest
from forked_runs import FOREVER, Forge, Runner
from test_resume import assert_same_run, rows

from backfold.training.config_file import config_to_dict

STEPS = 12
TWO_WORKERS = {"num_workers": 2, "prefetch": 1}


@pytest.fixture(scope="module")
def forge():
    with Forge() as forge:
        yield forge


@pytest.fixture
def runner(forge, tiny, tmp_path):
    def make(name, **changes):
        # Checkpoints only where the held-out images are looked at: after steps 0, 9 and 12.
        settings = {"max_steps": STEPS, "checkpoint_minutes": 1000.0, **changes}
        return Runner(forge, config_to_dict(tiny(out=tmp_path / name, **settings)))

    return make


def last_line(run):
    return run.said.splitlines()[-1]


@pytest.fixture(scope="module")
def unbroken():
    """The run that no signal stopped, once it was made."""
    return []


@pytest.fixture
def goes_on(runner, unbroken):
    def check(run):
        assert run.resume().code == 0, run.said
        if not unbroken:
            whole = runner("whole")
            assert whole.start().code == 0, whole.said
            unbroken.append(whole.folder)
        assert_same_run(unbroken[0], run.folder)
        assert [int(row["step"]) for row in rows(run.folder)] == list(range(1, STEPS + 1))

    return check


@pytest.mark.parametrize("to_group", [False, True], ids=["process", "group"])
@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)], ids=["SIGTERM", "Ctrl-C"]
)
@pytest.mark.parametrize(
    ("changes", "seconds"),
    [
        pytest.param({}, 0.0, id="in a step"),
        # Of each batch's 8 images a worker takes 1.2 seconds: the signal finds the run waiting.
        pytest.param(TWO_WORKERS, 0.15, id="waiting for workers"),
    ],
)
def test_a_signal_stops_the_run_behind_a_checkpoint(
    runner, goes_on, number, code, to_group, changes, seconds
):
    run = runner("stopped", **changes)
    outcome = run.start(
        moment="batch" if changes else "step",
        count=4,
        signals=[(0.3 if changes else 0.0, number, to_group)],
        image_seconds=seconds,
    )
    assert outcome.code == code, run.said
    assert "Traceback" not in run.said
    # Whether the step was still taken, or the workers had left: what was done is saved.
    assert 3 <= run.step < 9
    assert f"{number.name} at step {run.step} of {STEPS}, which is saved" in last_line(run)
    assert "--resume" in last_line(run)
    goes_on(run)


@pytest.mark.parametrize(
    ("moment", "count", "steps"),
    [
        # Whether or not another step is taken: nothing that was done is lost.
        pytest.param("watch", 1, {0, 1}, id="first look"),
        pytest.param("watch", 2, {9}, id="look"),
        pytest.param("write last.ckpt", 2, {9, 10}, id="checkpoint"),
    ],
)
def test_what_is_going_on_is_finished(runner, goes_on, moment, count, steps):
    run = runner("stopped")
    term = [(0.0, signal.SIGTERM, False)]
    outcome = run.start(moment=moment, count=count, hold=0.5, signals=term)
    assert outcome.code == 143, run.said
    assert run.step in steps
    goes_on(run)


def test_a_signal_before_the_first_step_stops_the_run(runner, goes_on):
    run = runner("stopped")
    outcome = run.start(moment="warm-up", hold=FOREVER, signals=[(0.0, signal.SIGTERM, False)])
    assert outcome.code == 143, run.said
    assert "SIGTERM" in last_line(run)
    assert "Traceback" not in run.said
    goes_on(run)


def test_a_signal_in_the_last_step_changes_nothing(runner, goes_on):
    run = runner("stopped")
    outcome = run.start(moment="step", count=STEPS, signals=[(0.0, signal.SIGTERM, False)])
    assert outcome.code == 0, run.said
    goes_on(run)


def test_a_second_ctrl_c_leaves_at_once(runner, goes_on):
    run = runner("stopped")
    first, second = (0.3, signal.SIGINT, True), (3.0, signal.SIGINT, True)
    # The step never ends: were the second one only noted, too, the run would hang. It comes late,
    # as two that a busy machine delivers together are one.
    outcome = run.start(moment="step", count=4, hold=FOREVER, signals=[first, second])
    assert outcome.code == 130, run.said
    assert "Traceback" not in run.said
    assert "interrupted" in last_line(run)
    assert run.step == 0
    goes_on(run)


def test_a_run_stops_that_waits_for_an_image_that_never_comes(runner, goes_on):
    run = runner("stopped", **TWO_WORKERS)
    term = (0.3, signal.SIGTERM, True)
    outcome = run.start(moment="batch", count=1, signals=[term], image_seconds=3600.0)
    assert outcome.code == 143, run.said
    assert "SIGTERM at step 0 of" in last_line(run)
    goes_on(run)


def test_a_repeated_sigterm_changes_nothing(runner, goes_on):
    """A scheduler signals every process; a launcher passes on what it got."""
    run = runner("stopped")
    term = (0.1, signal.SIGTERM, True)
    outcome = run.start(moment="step", count=4, hold=1.0, signals=[term, term, term])
    assert outcome.code == 143, run.said
    assert "which is saved" in last_line(run)
    assert run.step == 4
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
    ("number", "code", "asked"),
    [
        pytest.param(signal.SIGTERM, 143, ["requeue 4711"], id="SIGTERM"),
        pytest.param(signal.SIGUSR1, 128 + signal.SIGUSR1, ["requeue 4711"], id="SIGUSR1"),
        pytest.param(signal.SIGINT, 130, [], id="Ctrl-C"),
    ],
)
def test_a_preempted_run_queues_itself_again(runner, goes_on, slurm, number, code, asked):
    environment, calls = slurm
    run = runner("stopped")
    outcome = run.start(moment="step", count=4, signals=[(0.0, number, False)], env=environment())
    assert (outcome.code, calls()) == (code, asked), run.said
    assert ("queued the job again" in last_line(run)) == bool(asked)
    assert 3 < run.step < 9
    goes_on(run)


def test_a_refused_requeue_is_told(runner, goes_on, slurm):
    environment, calls = slurm
    run = runner("stopped")
    outcome = run.start(
        moment="step", count=4, signals=[(0.0, signal.SIGTERM, False)], env=environment(1)
    )
    assert (outcome.code, calls()) == (143, ["requeue 4711"])
    assert "queued the job again" not in last_line(run)
    assert "did not requeue job 4711: told: requeue 4711" in run.said
    goes_on(run)


def test_a_job_stopped_before_its_first_step_is_queued_again(runner, slurm):
    environment, calls = slurm
    run = runner("stopped")
    outcome = run.start(
        moment="warm-up",
        hold=FOREVER,
        signals=[(0.0, signal.SIGTERM, False)],
        env=environment(),
    )
    assert (outcome.code, calls()) == (143, ["requeue 4711"]), run.said


def test_a_requeued_job_goes_on_with_the_command_that_started_it(runner, goes_on, slurm):
    environment, _ = slurm
    run = runner("stopped")
    term = [(0.0, signal.SIGTERM, False)]
    assert run.start(moment="step", count=4, signals=term, env=environment()).code == 143
    again = run.start(env=environment() | {"SLURM_RESTART_COUNT": "1"})
    assert again.code == 0, run.said
    assert f"resuming at step 4 of {STEPS}" in run.said
    goes_on(run)
