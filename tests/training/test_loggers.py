"""Weights & Biases and MLflow: asked for, they get every number; else they are never touched.

Lightning's loggers of theirs are replaced by stand-ins that keep what they are told.
"""

import inspect
import sys
from importlib.machinery import ModuleSpec
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
from lightning.pytorch import loggers as lightning
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from backfold.cli.main import main
from backfold.errors import UserError
from backfold.training import log
from backfold.training import pretrain as trainer
from backfold.training.log import COLUMNS, IDENTITIES, MetricsLog, open_services
from backfold.training.pretrain import pretrain

SETTINGS = {"seed": 3}
LOGGERS = {"wandb": "WandbLogger", "mlflow": "MLFlowLogger"}


class Service:
    """One start of a logger; ``finish`` is what a run of Weights & Biases is told."""

    def __init__(self, options):
        self.options = options
        self.version = options.get("version") or options.get("run_id") or "new-1"
        self.rows, self.settings, self.ended, self.finish = [], [], [], Mock()
        self.experiment = SimpleNamespace(id=self.version, finish=self.finish)
        self.log_hyperparams, self.finalize = self.settings.append, self.ended.append

    def log_metrics(self, numbers, step):
        self.rows.append((step, numbers))


@pytest.fixture
def started(monkeypatch):
    """The loggers that were started, by name."""
    starts = {name: [] for name in LOGGERS}

    def stand_in(name):
        signature = inspect.signature(getattr(lightning, LOGGERS[name]))

        def start(**options):
            signature.bind(**options)
            starts[name].append(Service(options))
            return starts[name][-1]

        return start

    for name, logger in LOGGERS.items():
        spec = ModuleSpec(name, None)
        package = SimpleNamespace(get_tracking_uri=lambda: "theirs", __spec__=spec)
        monkeypatch.setitem(sys.modules, name, package)
        monkeypatch.setattr(lightning, logger, stand_in(name))
    for name in ("WANDB_PROJECT", "WANDB_NAME", "WANDB_RUN_ID", "MLFLOW_EXPERIMENT_NAME"):
        monkeypatch.delenv(name, raising=False)
    return starts


def test_a_service_that_fails_costs_no_run(started, folder, monkeypatch):
    numbers = MetricsLog(folder, 0, open_services(["wandb", "mlflow"], folder, SETTINGS))
    warned = Mock()
    monkeypatch.setattr(log.LOGGER, "warning", warned)
    ((wandb,), (mlflow,)) = started.values()
    mlflow.log_metrics = Mock(side_effect=ConnectionError("no route\nto anywhere"))
    for step in (1, 2):
        numbers.add(dict.fromkeys(COLUMNS, 0.5) | {"step": step})
    numbers.close(succeeded=True)
    assert [step for step, _ in wandb.rows] == [1, 2]
    assert mlflow.log_metrics.call_count == 1
    message, *values = warned.call_args.args
    assert warned.call_count == 1
    assert (message % tuple(values)).startswith("mlflow failed (no route) and gets no more")


@pytest.mark.usefixtures("started")
def test_a_service_that_can_t_start_is_told_in_a_line(folder, monkeypatch):
    refuse = Mock(side_effect=RuntimeError("api_key not configured\nmore"))
    monkeypatch.setattr(lightning, "WandbLogger", refuse)
    with pytest.raises(UserError, match=r"wandb can't be started \(api_key not configured\); "):
        open_services(["wandb"], folder, SETTINGS)


def test_a_run_s_numbers_reach_the_services_it_names_and_no_other(
    tiny, quiet, started, monkeypatch, tmp_path
):
    monkeypatch.setattr(trainer, "LOG_EVERY", 1)
    plain = pretrain(tiny(), console=quiet)
    assert not any(started.values())
    folder = pretrain(tiny(loggers=["wandb", "mlflow"], out=tmp_path / "told"), console=quiet)
    for run in (plain, folder):
        assert (run.checkpoints / IDENTITIES).exists() == (run is folder)
        assert len(run.metrics.read_text().splitlines()) == 1 + 3
        events = EventAccumulator(str(run.tensorboard)).Reload()
        for name, steps in (("train/loss", [1, 2, 3]), ("held_out_masking/auroc", [0, 3])):
            assert [event.step for event in events.Scalars(name)] == steps
        assert "held_out/knn" not in events.Tags()["scalars"]
    ((wandb,), (mlflow,)) = started.values()
    # Whether it is offline is left to its own environment.
    assert (wandb.options["project"], wandb.options["name"]) == ("backfold", "told")
    assert "offline" not in wandb.options
    assert (mlflow.options["experiment_name"], mlflow.options["run_name"]) == ("backfold", "told")
    assert mlflow.options["tracking_uri"] == "theirs"
    assert wandb.settings == mlflow.settings
    assert wandb.settings[0]["backbone"] == "vit_tiny_patch16_224"
    assert wandb.rows == mlflow.rows
    rows = {step: numbers for step, numbers in wandb.rows if "train/loss" in numbers}
    assert set(rows) == {1, 2, 3}
    assert set(rows[1]) == {f"train/{name}" for name in COLUMNS[3:]}
    assert [step for step, numbers in wandb.rows if "held_out/energy_gap" in numbers] == [0, 3]
    assert wandb.ended == mlflow.ended == ["success"]
    wandb.finish.assert_called_once_with(exit_code=0)
    # Under the same identity; what may change when a run goes on is not told MLflow again.
    assert main(["pretrain", "--resume", "--out", str(folder.root)]) == 0
    (_, wandb), (_, mlflow) = started.values()
    assert (wandb.options["version"], mlflow.options["run_id"]) == ("new-1", "new-1")
    assert wandb.settings == mlflow.settings == []


@pytest.mark.parametrize("name", LOGGERS)
def test_a_missing_package_is_found_before_anything_is_written(tiny, quiet, monkeypatch, name):
    monkeypatch.setitem(sys.modules, name, None)
    config = tiny(loggers=[name])
    with pytest.raises(UserError, match=rf"run `pip install backfold\[{name}\]`"):
        pretrain(config, console=quiet)
    assert not config.out.exists()
