"""Show runs side by side on a page."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from expert_merging.commands.command import Command
from expert_merging.console import say


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Give a parser the arguments."""
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folder of a run, of any method")
    parser.add_argument(
        "-o",
        "--output",
        default="report.html",
        metavar="FILE",
        help="file of the page; an earlier report of that name is replaced (default: report.html)",
    )
    parser.add_argument("--title", default="Merged models side by side", help="what stands above it")
    parser.add_argument(
        "--answers",
        metavar="FILE",
        help="questions with the answers of several models, as evaluate --answers writes them",
    )
    parser.add_argument(
        "--scores",
        metavar="FILE",
        action="append",
        default=[],
        help="scores of models that no run has made, such as base and experts, as evaluate --json writes them; may be "
        "repeated",
    )


def run(given: Mapping[str, Any], console: Console) -> None:
    """Write the page and say where it is."""
    from expert_merging.comparing.report import ReportOptions, report

    options = {name: value for name, value in given.items() if name != "runs"}
    say(console, str(report(given["runs"], ReportOptions(**options))))


COMMAND = Command(
    "report",
    "show runs side by side on one page that needs nothing else",
    run,
    add_arguments,
    "Writes a page that any browser shows, offline too: scores with intervals and divergences where they were measured "
    "(RUN/scores.json), coefficients, importance, losses, what experts answered, which settings differ, and how to "
    "repeat each run. Needs plotly: pip install plotly.",
)
