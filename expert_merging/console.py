"""What the terminal shows: progress bars and log lines, plain where it is not a terminal."""

from __future__ import annotations

import errno
import logging
import os
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from logging.handlers import MemoryHandler
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from expert_merging.errors import one_line
from expert_merging.progress import Advance

if TYPE_CHECKING:
    from rich.table import Table

logger = logging.getLogger(__name__)
_PACKAGE = "expert_merging"
# Lines that are kept for a file that is opened later: what the checks of a run have to say.
_EARLY = 1000


class _Lines(logging.Formatter):
    """Lines that begin with ``warning:`` where they are one, as those of errors begin with ``error:``.

    Args:
        form: form of a line, with ``%(beginning)s`` in it.
        usual: how other lines begin.
    """

    def __init__(self, form: str, usual: str = "") -> None:
        super().__init__(form)
        self.usual = usual

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802  (logging's name)
        """The line of a record."""
        record.message = one_line(record.message)
        record.beginning = "warning: " if record.levelno >= logging.WARNING else self.usual
        return super().formatMessage(record)


def say(console: Console, text: str, style: str | None = None) -> None:
    """Print one line as it is, unwrapped, so that paths and commands can be copied."""
    console.print(one_line(text), style=style, markup=False, emoji=False, highlight=False, soft_wrap=True)


class Screen(Console):
    """A console that says so when nobody reads it any more, as after ``| head``; rich would end without a word."""

    def on_broken_pipe(self) -> None:
        """Raise the error, and let nothing more come there: Python would fail once more at its end."""
        self.quiet = True
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), sys.stdout.fileno())
        raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))


def table_of_numbers(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> Table:
    """A table for a terminal, whose first column has names, which are folded where there is no room.

    Args:
        title: what stands above it.
        columns: names of the columns of numbers.
        rows: name and numbers of each.
    """
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    # Lines between columns would take space from the names.
    table = Table(title=title, box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("", overflow="fold")
    for column in columns:
        table.add_column(Text(one_line(column)), justify="right")
    for name, *numbers in rows:
        table.add_row(Text(one_line(name)), *map(Text, numbers))
    return table


class _ConsoleHandler(logging.Handler):
    """Prints log lines above the progress bars."""

    def __init__(self, console: Console) -> None:
        super().__init__()
        self.console = console
        self.setFormatter(_Lines("%(beginning)s%(message)s"))

    def emit(self, record: logging.LogRecord) -> None:
        """Print one line."""
        style = "yellow" if record.levelno >= logging.WARNING else None
        say(self.console, self.format(record), style)


class _File(logging.FileHandler):
    """A file of log lines; one that cannot be written, as on a full disk, is an error like any other."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802, ARG002  (logging's name)
        """Raise what writing a line has raised."""
        raise


class Terminal:
    """Shows log lines and progress of one process, until it is closed.

    Args:
        quiet: show nothing, as in the other processes of a parallel run.

    Attributes:
        doing: what is being done, in words.
    """

    def __init__(self, *, quiet: bool = False) -> None:
        self.console = Screen(quiet=quiet, highlight=False, soft_wrap=True, markup=False)
        self.handlers: list[logging.Handler] = []
        self.doing = "before the first step"
        self.package = logging.getLogger(_PACKAGE)
        self.before = self.package.level, self.package.propagate
        # Without any handler, logging itself would print warnings.
        self._add(logging.NullHandler() if quiet else _ConsoleHandler(self.console))
        self.of_threads, threading.excepthook = threading.excepthook, self._in_thread
        self.early = MemoryHandler(_EARLY, flushLevel=logging.CRITICAL, flushOnClose=False)
        self._add(self.early)

    def _add(self, handler: logging.Handler) -> None:
        self.package.setLevel(logging.INFO)
        self.package.propagate = False
        self.package.addHandler(handler)
        self.handlers.append(handler)

    def log_to(self, file: Path) -> None:
        """Write log lines with times to a file as well, those from before too, after what it has already."""
        handler = _File(file, encoding="utf-8", errors="backslashreplace")
        handler.setFormatter(_Lines("%(asctime)s %(beginning)s%(message)s", "INFO "))
        self._add(handler)
        self.early.setTarget(handler)
        self.early.flush()
        self.package.removeHandler(self.early)

    def _in_thread(self, raised: threading.ExceptHookArgs) -> None:
        """Leave a file that cannot be written to the main thread: a tracker's thread tells it of it, in a traceback."""
        if not isinstance(raised.exc_value, OSError):
            self.of_threads(raised)

    def close(self) -> None:
        """Stop showing and writing log lines, and leave logging as it was found."""
        threading.excepthook = self.of_threads
        for handler in self.handlers:
            self.package.removeHandler(handler)
            handler.close()
        self.handlers.clear()
        level, self.package.propagate = self.before
        self.package.setLevel(level)

    @contextmanager
    def progress(self, title: str, total: float, unit: str) -> Iterator[Advance]:
        """A bar with throughput and time left; see `expert_merging.progress.Progress`."""
        start = time.monotonic()
        self.doing = f"in the step {title!r}"
        amount: list[ProgressColumn] = (
            [DownloadColumn(), TransferSpeedColumn()] if unit == "B" else [MofNCompleteColumn(), TextColumn(f"{unit}s")]
        )
        columns = [
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            *amount,
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        ]
        with Progress(
            *columns,
            TextColumn("{task.fields[note]}", style="dim", markup=False),
            console=self.console,
            disable=not self.console.is_terminal,
        ) as bar:
            task = bar.add_task(one_line(title), total=total, note="")
            yield lambda count, note="": bar.update(task, advance=count, note=one_line(note))
        self.doing = f"after the step {title!r}"
        logger.info("%s took %.1f s", title, time.monotonic() - start)
