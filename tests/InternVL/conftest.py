"""Checkpoints of the InternVL tests."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.internvl import make_zoo


@pytest.fixture(scope="session")
def internvl_zoo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache folder with a random base and five experts; tests must not write to it."""
    return make_zoo(tmp_path_factory.mktemp("internvl"))
