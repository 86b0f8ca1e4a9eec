from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from forked_runs import Forge, Runner
from rich.console import Console
from tiny_run import tiny_config, write_images

from backfold.training.config import PretrainConfig, config_to_dict


@pytest.fixture
def quiet() -> Console:
    return Console(quiet=True)


@pytest.fixture
def make_parquet(tmp_path) -> Callable[..., Path]:
    def make(count: int, first: int = 0, name: str = "images.parquet") -> Path:
        return write_images(tmp_path / name, count, first)

    return make


@pytest.fixture
def tiny(tmp_path, make_parquet) -> Callable[..., PretrainConfig]:
    def make(**changes: Any) -> PretrainConfig:
        """Settings of a run that takes a second; data of 80 images unless they are given."""
        data = changes.pop("data", None) or make_parquet(80)
        return tiny_config(**{"data": data, "out": tmp_path / "run", **changes})

    return make


@pytest.fixture(scope="session")
def forge() -> Iterator[Forge]:
    with Forge() as forge:
        yield forge


@pytest.fixture
def runner(forge, tiny, tmp_path) -> Callable[..., Runner]:
    def make(name: str = "stopped", **changes: Any) -> Runner:
        """A run of 12 steps in a process of its own, of which 9 are an epoch."""
        settings = {"max_steps": 12, "checkpoint_minutes": 0, **changes}
        return Runner(forge, config_to_dict(tiny(out=tmp_path / name, **settings)))

    return make


@pytest.fixture(scope="session")
def made_once() -> list[Runner]:
    """The run that nothing stopped, once it was made."""
    return []


@pytest.fixture
def unbroken(runner, made_once) -> Runner:
    if not made_once:
        whole = runner("whole")
        assert whole.start().code == 0, whole.said
        made_once.append(whole)
    return made_once[0]
