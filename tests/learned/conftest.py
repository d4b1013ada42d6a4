"""What the tests of learning share."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.checkpoints import BASE, EXPERTS, write_tasks


@pytest.fixture(scope="session")
def answered_zoo(tiny_zoo: Path, tmp_path_factory) -> Path:
    """The tiny checkpoints with calibration files that have every response."""
    cache = tmp_path_factory.mktemp("answered")
    for folder in [BASE, *EXPERTS.values()]:
        (cache / folder).symlink_to(tiny_zoo / folder)
    write_tasks(cache / "dataset", responses={"Chat": "Certainly", "Math": "42", "Code": "def f():"})
    return cache
