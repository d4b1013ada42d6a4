"""What the tests of learning share."""

from __future__ import annotations

from pathlib import Path

import pytest
from accelerate.state import AcceleratorState

from tests.checkpoints import BASE, EXPERTS, write_tasks


def forget_accelerate():
    """accelerate keeps one state per process."""
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(autouse=True)
def fresh_accelerate():
    """Each test starts its own."""
    forget_accelerate()
    yield
    forget_accelerate()


@pytest.fixture(scope="module")
def fresh_for_module():
    """The same for what several tests share."""
    forget_accelerate()


@pytest.fixture(scope="session")
def answered_zoo(tiny_zoo: Path, tmp_path_factory) -> Path:
    """The tiny checkpoints with calibration files that have every response."""
    cache = tmp_path_factory.mktemp("answered")
    for folder in [BASE, *EXPERTS.values()]:
        (cache / folder).symlink_to(tiny_zoo / folder)
    write_tasks(cache / "dataset", responses={"Chat": "Certainly", "Math": "42", "Code": "def f():"})
    return cache
