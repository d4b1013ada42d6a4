"""Calibration files of all experts with their answers."""

from __future__ import annotations

import pytest

from tests.checkpoints import write_tasks
from tests.statistics.twin import RESPONSES


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """A folder with the questions and answers of the three experts."""
    folder = tmp_path_factory.mktemp("dataset")
    write_tasks(folder, responses=RESPONSES)
    return folder
