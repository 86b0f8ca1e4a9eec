"""A disk that fills up ends the run in one line, and the last checkpoint stays whole."""

import pytest
from forked_runs import Forge, Runner
from test_resume import assert_same_run

from backfold.training.config_file import config_to_dict

STEPS = 12


@pytest.fixture(scope="module")
def forge():
    with Forge() as forge:
        yield forge


@pytest.fixture
def runner(forge, tiny, tmp_path):
    def make(name, **changes):
        settings = {"max_steps": STEPS, "checkpoint_minutes": 0, **changes}
        return Runner(forge, config_to_dict(tiny(out=tmp_path / name, **settings)))

    return make


@pytest.fixture(scope="module")
def unbroken():
    """The run whose disk never was full, once it was made."""
    return []


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(
    ("moment", "count", "step"),
    [
        pytest.param("step", 5, 4, id="in a step"),
        pytest.param("written last.ckpt", 6, 5, id="behind a checkpoint"),
        pytest.param("watch", 2, 8, id="evaluating"),
        pytest.param("written last.ckpt", STEPS + 1, STEPS, id="at the end"),
    ],
)
def test_a_full_disk_stops_the_run_behind_its_last_checkpoint(
    runner, unbroken, moment, count, step, workers
):
    run = runner("stopped", num_workers=workers)
    outcome = run.start(moment=moment, count=count, full=str(run.folder.root))
    assert outcome.reached
    assert outcome.code == 2, run.said
    errors = [line for line in run.said.splitlines() if "No space left" in line]
    assert len(errors) == 1, run.said
    assert errors[0].startswith("backfold: error: ")
    assert "free space or choose another --out" in errors[0]
    assert "Traceback" not in run.said
    assert "Logging error" not in run.said
    assert run.step == step
    assert run.resume().code == 0, run.said
    if not unbroken:
        whole = runner("whole")
        assert whole.start().code == 0, whole.said
        unbroken.append(whole.folder)
    assert_same_run(unbroken[0], run.folder)


def test_a_checkpoint_beyond_the_largest_file_stops_the_run(runner):
    """A limit of the system, such as a quota's, in the midst of writing."""
    run = runner("stopped")
    outcome = run.start(moment="step", count=5, largest_file=20_000)
    assert outcome.code == 2, run.said
    assert "File too large; free space" in run.said.splitlines()[-1]
    assert "Traceback" not in run.said
    assert run.step == 4
    assert not list(run.folder.root.rglob("*.tmp"))
    assert run.resume().code == 0, run.said
