"""A zoo of models that are hardly trained, which is enough for everything but their scores."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from zoo import tasks
from zoo.build import build
from zoo.family import Family, Schedule
from zoo.mistral import FAMILY

BRIEF = Schedule(steps=3, learning_rate=1e-3, warmup_steps=1, decay_steps=1, batch_size=4, frozen=(".*norm.*",))


def write_few_questions(folder: Path, seed: int) -> None:
    """The first test questions of each task: every model that a test measures has to answer them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tasks, "TEST_QUESTIONS", 20)
        FAMILY.write_data(folder, seed)


def brief_family() -> Family:
    return replace(
        FAMILY,
        base_schedule=BRIEF,
        expert_schedules=dict.fromkeys(FAMILY.expert_schedules, BRIEF),
        write_data=write_few_questions,
    )


@pytest.fixture(scope="session")
def built_zoo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A complete zoo; tests must not write to it."""
    folder = tmp_path_factory.mktemp("brief") / "zoo"
    build(brief_family(), folder, workers=0)
    return folder


@pytest.fixture
def own_zoo(built_zoo: Path, tmp_path: Path) -> Path:
    """A copy to write to."""
    return Path(shutil.copytree(built_zoo, tmp_path / "zoo"))
