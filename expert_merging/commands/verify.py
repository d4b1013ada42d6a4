"""Check that finished runs are what they were."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from expert_merging.commands.command import Command
from expert_merging.errors import Problems, about


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Give a parser the arguments."""
    parser.add_argument(
        "runs", nargs="+", type=Path, metavar="RUN", help="folder of a finished run of any method, or its model"
    )


def run(given: Mapping[str, Any], console: Console) -> None:
    """Check runs, all of them before any problem is told."""
    from expert_merging.verify import verify

    problems = Problems()
    for folder in given["runs"]:
        with problems.collecting(), about(str(folder)):
            verify(folder, console)
    problems.check()


COMMAND = Command(
    "verify",
    "check that finished runs are what they were: files, checkpoints, and that they fit together",
    run,
    add_arguments,
    "Read a finished run and say what differs, in a line each. Every file and tensor is compared with the "
    "digest that was taken when it was written, and looked through for NaN and infinite values. Copied tensors "
    "are compared with the checkpoint that they are of, and base and experts with their fingerprints, where "
    "they are still there; learned coefficients with the weights that they make; the card with the model. "
    "Nothing is written. The exit code is 0 where all is as it was, and 1 otherwise.",
)
