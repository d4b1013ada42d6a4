"""Show how far a build is: bars in a terminal, a line for every finished model elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

Show = Callable[[str, int, int], None]


def silent(label: str, step: int, steps: int) -> None:
    """Show nothing."""


@contextmanager
def progress(console: Console) -> Iterator[Show]:
    """A function to call with the label of a model, its finished steps and all its steps."""
    if not console.is_terminal:
        yield _lines(console)
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as bars:
        rows: dict[str, int] = {}

        def show(label: str, step: int, steps: int) -> None:
            if label not in rows:
                rows[label] = bars.add_task(f"Training the {label}", total=steps)
            bars.update(rows[label], completed=step)  # type: ignore[arg-type]

        yield show


def _lines(console: Console) -> Show:
    started: dict[str, float] = {}

    def show(label: str, step: int, steps: int) -> None:
        if label not in started:
            started[label] = time.monotonic()
            console.print(f"training the {label}: {steps} steps")
        if step == steps:
            console.print(f"trained the {label} in {time.monotonic() - started[label]:.0f} s")

    return show
