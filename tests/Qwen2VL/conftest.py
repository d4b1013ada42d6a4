"""Checkpoints of the Qwen2-VL tests."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.qwen2vl import make_zoo


@pytest.fixture(scope="session")
def qwen_zoo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache folder with a random base and five experts; tests must not write to it."""
    return make_zoo(tmp_path_factory.mktemp("qwen"))
