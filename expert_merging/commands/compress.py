"""Make a mixture of experts smaller."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from expert_merging.commands.command import Command
from expert_merging.commands.models import values_of
from expert_merging.compress import CompressOptions, compress
from expert_merging.flags import read_options
from expert_merging.parser import add_flag

OPTIONS = read_options(CompressOptions)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Give a parser the arguments."""
    parser.argument_default = argparse.SUPPRESS
    parser.add_argument(
        "mixture", type=Path, metavar="MIXTURE", help="folder of a Mixtral, Qwen-MoE or OLMoE, or a run that made one"
    )
    for option in OPTIONS.values():
        add_flag(parser, option, option.default)


def run(given: Mapping[str, Any], console: Console) -> None:
    """Make a mixture smaller."""
    compress(given["mixture"], CompressOptions(**values_of(given, OPTIONS)), console)


COMMAND = Command(
    "compress",
    "make a mixture of experts smaller: fewer experts in each layer, kept or merged",
    run,
    add_arguments,
    "Write a Mixtral, Qwen2-MoE, Qwen3-MoE or OLMoE with fewer experts in each layer, in the layout that it had. The "
    "mixture runs over calibration samples once. What its routers and experts do there decides which experts stay "
    "(reap), or which are merged into one (m_smoe, hc_smoe). Nothing is trained.",
)
