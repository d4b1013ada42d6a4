"""What the tests of learning share."""

from __future__ import annotations

from pathlib import Path

import pytest
from accelerate.state import AcceleratorState

from tests.checkpoints import BASE, EXPERTS, write_tasks


@pytest.fixture(autouse=True)
def fresh_accelerate():
    """accelerate keeps one state per process; each test starts its own."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="session")
def answered_zoo(tiny_zoo: Path, tmp_path_factory) -> Path:
    """The tiny checkpoints with calibration files that have every response."""
    cache = tmp_path_factory.mktemp("answered")
    for folder in [BASE, *EXPERTS.values()]:
        (cache / folder).symlink_to(tiny_zoo / folder)
    write_tasks(cache / "dataset", responses={"Chat": "Certainly", "Math": "42", "Code": "def f():"})
    return cache
