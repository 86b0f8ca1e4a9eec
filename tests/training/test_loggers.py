"""Weights & Biases and MLflow: asked for, they get every number; else they are never touched.

Their packages are replaced by stand-ins that keep what Lightning's loggers tell them.
"""

import json
import sys
from collections import defaultdict
from types import ModuleType, SimpleNamespace

import pytest
from lightning.pytorch.loggers import mlflow as lightning_mlflow
from lightning.pytorch.loggers import wandb as lightning_wandb
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from backfold.cli.main import main
from backfold.errors import UserError
from backfold.training import loggers as loggers_module
from backfold.training import trainer
from backfold.training.loggers import IDENTITIES, ServiceLoggers, check_loggers
from backfold.training.metrics_log import COLUMNS
from backfold.training.run_folder import RunFolder
from backfold.training.trainer import pretrain

SETTINGS = {"seed": 3, "tasks": {"masking": {"mask_ratio": 0.5}}}


def module(monkeypatch, name, **content):
    made = ModuleType(name)
    made.__spec__ = SimpleNamespace(name=name)
    vars(made).update(content)
    monkeypatch.setitem(sys.modules, name, made)
    return made


class WandbRun:
    """What `wandb.init` gives."""

    def __init__(self, started):
        self.started, self.id = started, started["id"] or "new-1"
        self.rows, self.settings, self.ended = [], {}, None
        self.config = SimpleNamespace(update=lambda values, **_: self.settings.update(values))

    def define_metric(self, *_, **__):
        pass

    def log(self, row):
        self.rows.append(row)

    def finish(self, exit_code):
        self.ended = exit_code


@pytest.fixture
def wandb(monkeypatch):
    """The runs that were begun."""
    runs = []

    def init(**started):
        runs.append(WandbRun(started))
        return runs[-1]

    module(monkeypatch, "wandb", init=init, run=None)
    module(monkeypatch, "wandb.sdk")
    module(monkeypatch, "wandb.sdk.lib", RunDisabled=type("RunDisabled", (), {}))
    module(monkeypatch, "wandb.wandb_run", Run=WandbRun)
    monkeypatch.setattr(lightning_wandb, "_WANDB_AVAILABLE", True)
    for name in ("WANDB_PROJECT", "WANDB_NAME", "WANDB_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    return runs


class MlflowStore:
    """A tracking server, and the client that talks to it."""

    def __init__(self):
        self.uris, self.experiments, self.tags = [], [], {}
        self.metrics, self.params, self.ended = defaultdict(list), defaultdict(dict), {}

    def client(self, uri):
        self.uris.append(uri)
        return self

    def get_experiment_by_name(self, name):
        known = name in self.experiments
        return SimpleNamespace(experiment_id=name, lifecycle_stage="active") if known else None

    def create_experiment(self, name, **_):
        self.experiments.append(name)
        return name

    def create_run(self, experiment_id, tags):
        run = f"{experiment_id}-{len(self.tags)}"
        self.tags[run] = tags
        return self.get_run(run)

    def get_run(self, run_id):
        return SimpleNamespace(info=SimpleNamespace(run_id=run_id, experiment_id="backfold"))

    def log_batch(self, run_id, metrics=(), params=()):
        for metric in metrics:
            self.metrics[run_id].append((metric.key, metric.step, metric.value))
        for param in params:
            # As MLflow: a parameter never changes.
            assert self.params[run_id].setdefault(param.key, param.value) == param.value

    def set_terminated(self, run_id, status):
        self.ended[run_id] = status


@pytest.fixture
def mlflow(monkeypatch):
    store = MlflowStore()
    module(
        monkeypatch, "mlflow", get_tracking_uri=lambda: "theirs", set_tracking_uri=lambda _: None
    )
    module(monkeypatch, "mlflow.entities", Metric=SimpleNamespace, Param=SimpleNamespace)
    context = ModuleType("context")
    module(monkeypatch, "mlflow.tracking", MlflowClient=store.client, context=context)
    module(monkeypatch, "mlflow.utils")
    module(monkeypatch, "mlflow.utils.mlflow_tags", MLFLOW_RUN_NAME="mlflow.runName")
    monkeypatch.setattr(lightning_mlflow, "_MLFLOW_AVAILABLE", True)
    monkeypatch.delenv("MLFLOW_EXPERIMENT_NAME", raising=False)
    return store


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "night").mkdir()
    return RunFolder(tmp_path / "night")


def test_weights_and_biases_gets_settings_and_rows(wandb, folder, monkeypatch):
    loggers = ServiceLoggers(["wandb"], folder, SETTINGS)
    loggers.add({"train/loss": 0.5, "train/lr": 0.1}, 7)
    loggers.close(succeeded=True)
    (run,) = wandb
    assert (run.started["project"], run.started["name"]) == ("backfold", "night")
    # Whether it is offline is left to its own environment.
    assert "mode" not in run.started
    assert run.settings == SETTINGS
    assert run.rows == [{"train/loss": 0.5, "train/lr": 0.1, "trainer/global_step": 7}]
    assert run.ended == 0
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    monkeypatch.setenv("WANDB_NAME", "day")
    monkeypatch.setenv("WANDB_DIR", "there")
    ServiceLoggers(["wandb"], folder, SETTINGS)
    started = wandb[-1].started
    assert (started["project"], started["name"], started["dir"]) == ("mine", "day", "there")


def test_mlflow_gets_settings_and_rows(mlflow, folder):
    loggers = ServiceLoggers(["mlflow"], folder, SETTINGS)
    loggers.add({"train/loss": 0.5, "train/lr": 0.1}, 7)
    loggers.close(succeeded=False)
    assert (set(mlflow.uris), mlflow.experiments) == ({"theirs"}, ["backfold"])
    ((run, tags),) = mlflow.tags.items()
    assert tags == {"mlflow.runName": "night"}
    assert mlflow.params[run] == {"seed": "3", "tasks/masking/mask_ratio": "0.5"}
    assert mlflow.metrics[run] == [("train/loss", 7, 0.5), ("train/lr", 7, 0.1)]
    assert mlflow.ended == {run: "FAILED"}


def test_a_resumed_run_goes_on_under_its_identity(wandb, mlflow, folder):
    ServiceLoggers(["wandb", "mlflow"], folder, SETTINGS).close(succeeded=False)
    # What may change when a run goes on must not be told again: MLflow would refuse it.
    again = ServiceLoggers(["wandb", "mlflow"], folder, SETTINGS | {"seed": 4})
    again.add({"train/loss": 0.25}, 8)
    again.close(succeeded=True)
    assert wandb[1].started["id"] == wandb[0].id
    assert wandb[1].started["resume"] == "allow"
    assert wandb[1].rows == [{"train/loss": 0.25, "trainer/global_step": 8}]
    ((run, metrics),) = mlflow.metrics.items()
    assert (metrics, mlflow.ended) == ([("train/loss", 8, 0.25)], {run: "FINISHED"})
    assert json.loads((folder.checkpoints / IDENTITIES).read_text()) == {
        "wandb": wandb[0].id,
        "mlflow": run,
    }


def test_a_service_that_fails_costs_no_run(wandb, mlflow, folder, monkeypatch):
    loggers = ServiceLoggers(["wandb", "mlflow"], folder, SETTINGS)

    def fail(*_, **__):
        raise ConnectionError("no route\nto anywhere")

    told = []
    monkeypatch.setattr(loggers_module.LOGGER, "warning", lambda *line: told.append(line))
    with monkeypatch.context() as patch:
        patch.setattr(mlflow, "log_batch", fail)
        loggers.add({"train/loss": 1.0}, 1)
    loggers.add({"train/loss": 0.5}, 2)
    loggers.close(succeeded=True)
    assert [row["trainer/global_step"] for row in wandb[0].rows] == [1, 2]
    assert list(mlflow.metrics.values()) in ([], [[]])
    ((message, *values),) = told
    assert (message % tuple(values)).startswith("mlflow failed (no route) and gets no more")


@pytest.mark.usefixtures("wandb")
def test_a_service_that_can_t_start_is_told_in_a_line(folder, monkeypatch):
    def refuse(**_):
        raise RuntimeError("api_key not configured\nmore")

    monkeypatch.setattr(sys.modules["wandb"], "init", refuse)
    with pytest.raises(UserError, match=r"wandb can't be started \(api_key not configured\); "):
        ServiceLoggers(["wandb"], folder, SETTINGS)


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_a_missing_package_is_named(monkeypatch, name):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UserError) as caught:
        check_loggers([name])
    assert f"run `pip install backfold[{name}]`" in str(caught.value)
    assert "\n" not in str(caught.value)


def steps_on_board(folder):
    events = EventAccumulator(str(folder.tensorboard)).Reload()
    return [event.step for event in events.Scalars("train/loss")]


def test_csv_and_tensorboard_are_always_there_and_nothing_else(
    tiny, quiet, wandb, mlflow, monkeypatch
):
    monkeypatch.setattr(trainer, "LOG_EVERY", 1)
    folder = pretrain(tiny(), console=quiet)
    assert len(folder.metrics.read_text().splitlines()) == 1 + 3
    assert steps_on_board(folder) == [1, 2, 3]
    assert (wandb, mlflow.uris) == ([], [])
    assert not (folder.checkpoints / IDENTITIES).exists()


def test_a_run_s_numbers_reach_the_services_too(tiny, quiet, wandb, mlflow, monkeypatch):
    monkeypatch.setattr(trainer, "LOG_EVERY", 1)
    folder = pretrain(tiny(loggers=["wandb", "mlflow"]), console=quiet)
    (run,) = wandb
    assert run.settings["backbone"] == "vit_tiny_patch16_224"
    assert run.ended == 0
    rows = [row for row in run.rows if "train/loss" in row]
    assert [row["trainer/global_step"] for row in rows] == [1, 2, 3]
    assert set(rows[0]) == {f"train/{name}" for name in COLUMNS[3:]} | {"trainer/global_step"}
    lines = folder.metrics.read_text().splitlines()
    column = lines[0].split(",").index("loss")
    assert [f"{row['train/loss']:.6g}" for row in rows] == [
        line.split(",")[column] for line in lines[1:]
    ]
    held_out = [row["trainer/global_step"] for row in run.rows if "held_out/energy_gap" in row]
    assert held_out == [0, 3]
    ((name, metrics),) = mlflow.metrics.items()
    losses = [(step, value) for key, step, value in metrics if key == "train/loss"]
    assert losses == [(row["trainer/global_step"], row["train/loss"]) for row in rows]
    assert mlflow.ended == {name: "FINISHED"}
    assert steps_on_board(folder) == [1, 2, 3]
    assert main(["pretrain", "--resume", "--out", str(folder.root)]) == 0
    assert wandb[1].started["id"] == run.id


def test_a_missing_package_is_found_before_anything_is_written(tiny, quiet, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "wandb", None)
    config = tiny(loggers=["wandb"], out=tmp_path / "new")
    with pytest.raises(UserError, match=r"pip install backfold\[wandb\]"):
        pretrain(config, console=quiet)
    assert not config.out.exists()
