"""What all tests share."""

import pytest
import torch


def pytest_itemcollected(item: pytest.Item) -> None:
    """From Python 3.12 on, forking a process with threads warns; torch has threads and forks."""
    warning = "ignore:This process .* is multi-threaded:DeprecationWarning"
    item.add_marker(pytest.mark.filterwarnings(warning))


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
