"""Weights & Biases and MLflow: asked for, they get every number; else they are never touched.

Their packages are replaced by stand-ins that keep what Lightning's loggers tell them.
"""

import sys
from collections import defaultdict
from types import ModuleType, SimpleNamespace
from unittest.mock import Mock

import pytest
from lightning.pytorch.loggers import mlflow as lightning_mlflow
from lightning.pytorch.loggers import wandb as lightning_wandb
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from backfold.cli.main import main
from backfold.errors import UserError
from backfold.training import log
from backfold.training import pretrain as trainer
from backfold.training.log import COLUMNS, IDENTITIES, ServiceLoggers
from backfold.training.pretrain import pretrain
from backfold.training.run import RunFolder

SETTINGS = {"seed": 3, "tasks": {"masking": {"mask_ratio": 0.5}}}


def module(monkeypatch, name, **content):
    made = ModuleType(name)
    made.__spec__ = SimpleNamespace(name=name)
    vars(made).update(content)
    monkeypatch.setitem(sys.modules, name, made)
    return made


class WandbRun:
    """What `wandb.init` gives."""

    def __init__(self, **started):
        self.started, self.id = started, started["id"] or "new-1"
        self.rows, self.settings, self.ended = [], {}, None
        self.config = SimpleNamespace(update=lambda values, **_: self.settings.update(values))
        self.define_metric, self.log = Mock(), self.rows.append

    def finish(self, exit_code):
        self.ended = exit_code


@pytest.fixture
def wandb(monkeypatch):
    """The runs that were begun."""
    runs = []
    init = lambda **started: runs.append(WandbRun(**started)) or runs[-1]  # noqa: E731
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
        self.tags[f"{experiment_id}-1"] = tags
        return self.get_run(f"{experiment_id}-1")

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


def test_a_service_that_fails_costs_no_run(wandb, mlflow, folder, monkeypatch):
    loggers = ServiceLoggers(["wandb", "mlflow"], folder, SETTINGS)
    warned = Mock()
    monkeypatch.setattr(log.LOGGER, "warning", warned)
    with monkeypatch.context() as patch:
        failing = Mock(side_effect=ConnectionError("no route\nto anywhere"))
        patch.setattr(mlflow, "log_batch", failing)
        loggers.add({"train/loss": 1.0}, 1)
    loggers.add({"train/loss": 0.5}, 2)
    loggers.close(succeeded=True)
    assert [row["trainer/global_step"] for row in wandb[0].rows] == [1, 2]
    assert not any(mlflow.metrics.values())
    message, *values = warned.call_args.args
    assert warned.call_count == 1
    assert (message % tuple(values)).startswith("mlflow failed (no route) and gets no more")


@pytest.mark.usefixtures("wandb")
def test_a_service_that_can_t_start_is_told_in_a_line(folder, monkeypatch):
    refuse = Mock(side_effect=RuntimeError("api_key not configured\nmore"))
    monkeypatch.setattr(sys.modules["wandb"], "init", refuse)
    with pytest.raises(UserError, match=r"wandb can't be started \(api_key not configured\); "):
        ServiceLoggers(["wandb"], folder, SETTINGS)


def test_a_run_s_numbers_reach_the_services_it_names_and_no_other(
    tiny, quiet, wandb, mlflow, monkeypatch, tmp_path
):
    monkeypatch.setattr(trainer, "LOG_EVERY", 1)
    plain = pretrain(tiny(), console=quiet)
    assert (wandb, mlflow.uris) == ([], [])
    folder = pretrain(tiny(loggers=["wandb", "mlflow"], out=tmp_path / "told"), console=quiet)
    for run in (plain, folder):
        assert (run.checkpoints / IDENTITIES).exists() == (run is folder)
        assert len(run.metrics.read_text().splitlines()) == 1 + 3
        events = EventAccumulator(str(run.tensorboard)).Reload()
        assert [event.step for event in events.Scalars("train/loss")] == [1, 2, 3]
    (run,) = wandb
    assert (run.started["project"], run.started["name"]) == ("backfold", "told")
    # Whether it is offline is left to its own environment.
    assert "mode" not in run.started
    assert run.settings["backbone"] == "vit_tiny_patch16_224"
    assert run.ended == 0
    rows = [row for row in run.rows if "train/loss" in row]
    assert [row["trainer/global_step"] for row in rows] == [1, 2, 3]
    assert set(rows[0]) == {f"train/{name}" for name in COLUMNS[3:]} | {"trainer/global_step"}
    held_out = [row["trainer/global_step"] for row in run.rows if "held_out/energy_gap" in row]
    assert held_out == [0, 3]
    assert (set(mlflow.uris), mlflow.experiments) == ({"theirs"}, ["backfold"])
    ((name, metrics),) = mlflow.metrics.items()
    assert mlflow.tags == {name: {"mlflow.runName": "told"}}
    assert mlflow.params[name]["tasks/masking/mask_patch_size"] == "7"
    losses = [(step, value) for key, step, value in metrics if key == "train/loss"]
    assert losses == [(row["trainer/global_step"], row["train/loss"]) for row in rows]
    assert mlflow.ended == {name: "FINISHED"}
    # Under the same identity; what may change when a run goes on is not told MLflow again.
    assert main(["pretrain", "--resume", "--out", str(folder.root)]) == 0
    assert (wandb[1].started["id"], wandb[1].started["resume"]) == (run.id, "allow")
    assert mlflow.metrics.keys() == {name}


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_a_missing_package_is_found_before_anything_is_written(tiny, quiet, monkeypatch, name):
    monkeypatch.setitem(sys.modules, name, None)
    config = tiny(loggers=[name])
    with pytest.raises(UserError, match=rf"run `pip install backfold\[{name}\]`"):
        pretrain(config, console=quiet)
    assert not config.out.exists()
