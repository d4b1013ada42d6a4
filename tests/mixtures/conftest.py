"""Calibration files that routers are made of, and a command that makes them."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.checkpoints import write_tasks
from tests.mixtures.test_moe import MOE

# Answers of very different letters, so that routers can tell them apart.
ANSWERS = {"Chat": "aaaaaaaaaaaaaaaa", "Math": "0123456789012345", "Code": "((((((()))))))) "}
COUNT = 5


@pytest.fixture(scope="session")
def dataset(tmp_path_factory) -> Path:
    """A folder with the questions and answers of the three experts."""
    folder = tmp_path_factory.mktemp("dataset")
    write_tasks(folder, responses=ANSWERS)
    return folder


@pytest.fixture
def arguments(tiny_zoo, dataset) -> list[object]:
    """Flags of a mixture whose routers may be made of them."""
    return [*MOE, "--cache_dir", tiny_zoo, "--data_dir", dataset, "--samples_per_task", COUNT]
