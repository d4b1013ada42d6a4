"""Fixtures shared by all tests."""

from __future__ import annotations

from pathlib import Path

import pytest

from expert_merging.backbone import import_transformers
from tests.checkpoints import make_zoo

import_transformers()


@pytest.fixture(scope="session")
def tiny_zoo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache folder with a random base and three experts; tests must not write to it."""
    return make_zoo(tmp_path_factory.mktemp("zoo"))
