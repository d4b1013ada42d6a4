"""Rebuild an expert from a merge."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from expert_merging.commands.command import Command


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Give a parser the arguments."""
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of a run of --method tall or emr")
    parser.add_argument("--expert", required=True, metavar="NAME", help="name of the expert in that run")
    parser.add_argument("--output", required=True, type=Path, metavar="FOLDER", help="where the model goes")
    parser.add_argument(
        "--base_model_path",
        type=Path,
        metavar="FOLDER",
        help="the base, a folder or a repository on the Hub, if it is not where it was for the run",
    )


def run(given: Mapping[str, Any], console: Console) -> None:
    """Rebuild an expert."""
    from expert_merging.extract import extract

    extract(given["run"], given["expert"], given["output"], given["base_model_path"], console)


COMMAND = Command(
    "extract",
    "rebuild an expert from a merge by --method tall or emr, which needs the base alone",
    run,
    add_arguments,
)
