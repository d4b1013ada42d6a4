"""Show how far a build is, several models at once: bars in a terminal, a line for every finished model elsewhere."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars

from expert_merging.progress import Advance, Progress, no_advance


@contextmanager
def progress(console: Console) -> Iterator[Progress]:
    """What shows pieces of work on a console; they may overlap."""
    if not console.is_terminal:
        yield partial(_lines, console)
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Bars(*columns, console=console) as bars:
        yield partial(_bar, bars)


@contextmanager
def _bar(bars: Bars, title: str, total: float, unit: str) -> Iterator[Advance]:
    del unit
    row = bars.add_task(title, total=total)
    yield lambda count, _note="": bars.advance(row, count)


@contextmanager
def _lines(console: Console, title: str, total: float, unit: str) -> Iterator[Advance]:
    start = time.monotonic()
    console.print(f"{title}: {total:g} {unit}s")
    yield no_advance
    console.print(f"{title} took {time.monotonic() - start:.0f} s")
