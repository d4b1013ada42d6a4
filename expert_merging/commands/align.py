"""Compare models with the experts."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from expert_merging.commands.command import Command
from expert_merging.comparing.compare import AlignOptions, compare
from expert_merging.flags import read_options
from expert_merging.parser import add_flag, single_value

OPTIONS = read_options(AlignOptions)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Give a parser the arguments."""
    parser.argument_default = argparse.SUPPRESS
    parser.add_argument(
        "models",
        nargs="+",
        type=Path,
        metavar="RUN_OR_FOLDER",
        help="a run, or the folder of any model, or its repository on the Hub",
    )
    for option in OPTIONS.values():
        add_flag(parser, option, option.default, takes_several=False)


def run(given: Mapping[str, Any], console: Console) -> None:
    """Compare models with the experts."""
    texts = {name: value for name, value in given.items() if name != "models"}
    values = {name: OPTIONS[name].convert(single_value(OPTIONS, name, value)) for name, value in texts.items()}
    compare(given["models"], AlignOptions(**values), console)


COMMAND = Command(
    "align",
    "compare models with the experts, without labels",
    run,
    add_arguments,
    "How near models come to each task's expert: 0 is the expert itself, 1 the base.",
)
