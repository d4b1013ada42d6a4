"""Show runs as a table."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from expert_merging.commands.command import Command

# Columns of text that a file's table has at most.
_WIDEST = 10_000


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Give a parser the arguments."""
    parser.add_argument(
        "folders",
        nargs="*",
        type=Path,
        metavar="FOLDER",
        help="runs, or folders around them, however deep; results/logs at the repository root by default",
    )
    parser.add_argument(
        "--where",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="only runs with that value of a column or an option, such as method=ties; may be repeated",
    )
    parser.add_argument(
        "--sort",
        metavar="NAME",
        help="a column or an option to sort by, smallest first: divergence, seconds, a set of scores; by method and "
        "what differs by default. Runs that have none come last",
    )
    parser.add_argument("--descending", action="store_true", help="sort the largest first")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--csv", action="store_true", help="as CSV, with a column for each option that differs")
    form.add_argument("--json", action="store_true", help="as JSON, with every option and score")
    form.add_argument("--markdown", action="store_true", help="as Markdown")


def run(given: Mapping[str, Any], console: Console) -> None:
    """Print the table."""
    from expert_merging.comparing import run_tables as tables
    from expert_merging.comparing.runs import chosen, find_runs, ordered
    from expert_merging.options import ROOT

    rows = chosen(find_runs(given["folders"] or [ROOT / "results" / "logs"]), given["where"])
    if given["sort"] is not None:
        rows = ordered(rows, given["sort"], descending=given["descending"])
    elif given["descending"]:
        rows.reverse()
    forms = {"csv": tables.csv_table, "json": tables.json_table, "markdown": tables.markdown_table}
    for name, make in forms.items():
        if given[name]:
            console.out(make(rows), end="")
            return
    table = tables.terminal_table(rows)
    if not console.is_terminal:  # a file has room for everything
        console.width = console.measure(table, options=console.options.update(max_width=_WIDEST)).maximum
    console.print(table, soft_wrap=False)


COMMAND = Command(
    "runs",
    "show runs as a table: what differs, time, memory, and scores where they are known",
    run,
    add_arguments,
    "Show runs as a table: method, the options in which runs of a method differ, seed, time, peak memory, share of the "
    "base's divergence from the experts and scores where they have been measured, relative change of the merged "
    "weights, and whether the run is complete. Nothing is computed.",
)
