from collections.abc import Callable
from typing import Any

import pytest
from forked_runs import Runner
from rich.console import Console

from backfold.training.config import PretrainConfig, config_to_dict
from backfold.training.run import RunFolder
from tiny_run import tiny_config, write_images


@pytest.fixture
def quiet() -> Console:
    return Console(quiet=True)


@pytest.fixture
def folder(tmp_path) -> RunFolder:
    return RunFolder(tmp_path / "night")


@pytest.fixture
def tiny(tmp_path) -> Callable[..., PretrainConfig]:
    def make(**changes: Any) -> PretrainConfig:
        """Settings of a run that takes a second; data of 80 images unless they are given."""
        data = changes.pop("data", None) or write_images(tmp_path / "images.parquet")
        return tiny_config(**{"data": data, "out": tmp_path / "run", **changes})

    return make


STOPPED = {"max_steps": 12, "checkpoint_minutes": 0}  # of which 9 are an epoch


@pytest.fixture
def runner(tiny, tmp_path) -> Callable[..., Runner]:
    def make(name: str = "stopped", **changes: Any) -> Runner:
        """A run in a process of its own."""
        return Runner(config_to_dict(tiny(**{"out": tmp_path / name, **STOPPED, **changes})))

    return make


@pytest.fixture(scope="session")
def unbroken(tmp_path_factory) -> Runner:
    """The run that nothing stopped."""
    folder = tmp_path_factory.mktemp("unbroken")
    data = write_images(folder / "images.parquet")
    whole = Runner(config_to_dict(tiny_config(data=data, out=folder / "whole", **STOPPED)))
    assert whole.start().code == 0, whole.said
    return whole
