"""Compare models with the experts."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

from rich.console import Console

from expert_merging.commands.command import Command
from expert_merging.commands.models import add_models, values_of
from expert_merging.comparing.compare import AlignOptions, compare
from expert_merging.flags import read_options

OPTIONS = read_options(AlignOptions)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Give a parser the arguments."""
    add_models(parser, OPTIONS)


def run(given: Mapping[str, Any], console: Console) -> None:
    """Compare models with the experts."""
    compare(given["models"], AlignOptions(**values_of(given, OPTIONS)), console)


COMMAND = Command(
    "align",
    "compare models with the experts, without labels",
    run,
    add_arguments,
    "How near models come to each task's expert: 0 is the expert itself, 1 the base.",
)
