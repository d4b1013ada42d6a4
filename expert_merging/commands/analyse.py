"""Draw the pictures of learned merges again."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from expert_merging.commands.command import Command
from expert_merging.console import say
from expert_merging.errors import InputError
from expert_merging.run import Run


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Give a parser the arguments."""
    parser.add_argument(
        "runs", nargs="+", type=Path, metavar="RUN", help="folder of a run of a method that learns or searches"
    )


def run(given: Mapping[str, Any], console: Console) -> None:
    """Draw the pictures of every run again and say where they are."""
    from expert_merging.learned import figures
    from expert_merging.search import front

    for folder in given["runs"]:
        run = Run(folder)
        if not run.analysis.is_dir():
            raise InputError(
                f"{folder} has no folder {run.analysis.name}; give a finished run of a method that learns, or of one "
                "that has searched for coefficients in several tasks"
            )
        searched = (run.analysis / front.FRONT).exists()
        redraw = front.redraw if searched else figures.redraw
        for file in redraw(run.analysis, run.title):
            say(console, str(file))


COMMAND = Command(
    "analyse",
    "draw importance, coefficients and chunks of learned merges, and trade-offs found, again",
    run,
    add_arguments,
)
