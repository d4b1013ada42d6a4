"""What a command of ``python -m expert_merging`` is."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console


@dataclass(frozen=True)
class Command:
    """A command.

    Args:
        name: what the user types.
        summary: what it does, as a phrase.
        run: does it, given the values of its arguments by name; None where `main` does it.
        add_arguments: gives a parser its arguments.
        description: more than the summary, for its own help.
        main: given all its arguments as they were typed, instead of `run`; returns the exit code.
        takes_more: what the parser does not know is left to `run`, as ``more``, or to `main`.
        continues: the same command goes on with what it has, after an interrupt or a full disk.
    """

    name: str
    summary: str
    run: Callable[[Mapping[str, Any], Console], None] | None
    add_arguments: Callable[[argparse.ArgumentParser], None]
    description: str = ""
    main: Callable[[Sequence[str]], int] | None = None
    takes_more: bool = False
    continues: bool = False
