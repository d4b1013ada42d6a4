"""How far a piece of work is, as those who do the work tell it; `expert_merging.console` shows it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

Advance = Callable[..., None]


class Progress(Protocol):
    """Shows how far a piece of work is: ``with progress(title, total, unit) as advance: advance(count, note)``."""

    def __call__(self, title: str, total: float, unit: str) -> AbstractContextManager[Advance]:
        """Start a piece of work of ``total`` units."""
        ...


def no_advance(_count: float, _note: str = "") -> None:
    """Progress that is not shown."""


@contextmanager
def no_progress(title: str, total: float, unit: str) -> Iterator[Advance]:
    """Show nothing."""
    del title, total, unit
    yield no_advance
