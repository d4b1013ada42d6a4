"""Measure how many questions models answer rightly."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from expert_merging.commands.command import Command
from expert_merging.comparing.evaluate import EvaluateOptions, evaluate
from expert_merging.flags import read_options
from expert_merging.parser import add_flag, single_value

OPTIONS = read_options(EvaluateOptions)


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
    """Measure models."""
    texts = {name: value for name, value in given.items() if name != "models"}
    values = {name: OPTIONS[name].convert(single_value(OPTIONS, name, value)) for name, value in texts.items()}
    evaluate(given["models"], EvaluateOptions(**values), console)


COMMAND = Command(
    "evaluate",
    "measure how many labelled questions models answer rightly, with intervals and tests",
    run,
    add_arguments,
    "Ask models questions whose answers are known, and say how many they answer rightly, how sure that is, and which "
    "differences between models are more than chance. An entry of a task file has a question, as in calibration files, "
    "and an answer: a text (the whole answer must be it), a number (the last one in the answer must be it), or, with a "
    "list of choices, the right one (it must be the likeliest). Each run is asked as it has recorded that its experts "
    "were. Scores of runs are kept in their scores.json.",
)
