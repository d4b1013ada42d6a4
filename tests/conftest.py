"""Fixtures shared by all tests."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from hypothesis import settings

from expert_merging.learned import figures, reporting
from expert_merging.libraries import import_transformers
from expert_merging.search import front
from Mistral.backbone import BACKBONE
from tests.checkpoints import BASE, make_zoo, write_checkpoint
from tests.command import COMMAND, TENSORS, flags, forget_accelerate, save_table

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"  # tests that ask a Hub bring their own
import_transformers()
settings.register_profile("suite", deadline=None, derandomize=True, max_examples=50)
settings.register_profile("fast", settings.get_profile("suite"), max_examples=10)
settings.load_profile("suite")
DRAW_FRONT = front.draw_front


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """Go back to one thread, before any fixture: tests are small, and more threads only wait for each other."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def heard_signals() -> Iterator[None]:
    """Programs that tests start hear an interrupt and a closed terminal, also where a script runs the tests."""
    wanted = {signal.SIGHUP: signal.SIG_DFL, signal.SIGINT: signal.default_int_handler}
    before = {number: signal.signal(number, handler) for number, handler in wanted.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(scope="session")
def tiny_zoo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache folder with a random base and three experts; tests must not write to it."""
    return make_zoo(tmp_path_factory.mktemp("zoo"))


@pytest.fixture(scope="session")
def processor(tiny_zoo: Path) -> Any:
    """The tokenizer of the tiny base, which its experts have too."""
    return BACKBONE.load_processor(tiny_zoo / BASE)


@pytest.fixture(scope="session")
def model(tiny_zoo: Path) -> Any:
    """The tiny base; tests must leave it as it is."""
    return BACKBONE.load_model(tiny_zoo / BASE, torch.float32)


@pytest.fixture(autouse=True)
def bare_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of the developer's own settings reaches a test."""
    for name in ("CACHE_DIR", "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "ACCELERATE_MIXED_PRECISION"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(autouse=True)
def fresh_accelerate() -> Iterator[None]:
    """Each test starts accelerate anew."""
    forget_accelerate()
    yield
    forget_accelerate()


@pytest.fixture(scope="session", autouse=True)
def no_pictures() -> Iterator[None]:
    """Drawing takes four times as long as learning does here; tests of pictures ask for ``pictures``."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reporting, "draw_all", save_table)
        patch.setattr(front, "draw_front", lambda *_: numpy.zeros((1, 1, 3), numpy.uint8))
        yield


@pytest.fixture
def pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs draw their pictures."""
    monkeypatch.setattr(reporting, "draw_all", figures.draw_all)
    monkeypatch.setattr(front, "draw_front", DRAW_FRONT)


@pytest.fixture
def tiny(tmp_path: Path) -> list[object]:
    """Flags for a base and two experts that no model class knows, at ``tmp_path / base``, ``a`` and ``b``."""
    base = write_checkpoint(tmp_path / "base", TENSORS)
    experts = {
        name: write_checkpoint(tmp_path / name.lower(), {key: tensor + shift for key, tensor in TENSORS.items()})
        for name, shift in {"A": 0.5, "B": -2.0}.items()
    }
    return [*COMMAND, *flags(base, **experts)]


@pytest.fixture
def command(tiny: list[object], tmp_path: Path) -> list[object]:
    """The flags of ``tiny`` with results in ``tmp_path / out``."""
    return [*tiny, "--output_path", tmp_path / "out"]
