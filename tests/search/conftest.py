"""What the tests of searches share."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.checkpoints import write_tasks


@pytest.fixture(scope="session")
def answered(tmp_path_factory) -> Path:
    """Calibration files for the tiny checkpoints that have every response, two questions a task."""
    folder = tmp_path_factory.mktemp("answered")
    write_tasks(folder, count=2, responses={"Chat": "Certainly", "Math": "42", "Code": "def f():"})
    return folder
