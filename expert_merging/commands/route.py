"""Ask experts questions, each those whose perplexity speaks for them."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

from rich.console import Console

from expert_merging.commands.command import Command
from expert_merging.commands.models import values_of
from expert_merging.flags import read_options
from expert_merging.parser import add_flag
from expert_merging.routing.route import RouteOptions, route

OPTIONS = read_options(RouteOptions)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Give a parser the arguments."""
    parser.argument_default = argparse.SUPPRESS
    for option in OPTIONS.values():
        add_flag(parser, option, option.default)


def run(given: Mapping[str, Any], console: Console) -> None:
    """Answer questions."""
    route(RouteOptions(**values_of(given, OPTIONS)), console)


COMMAND = Command(
    "route",
    "answer questions by the experts that their perplexity speaks for, without merging anything",
    run,
    add_arguments,
    "Answer questions by experts that stay apart, attention too (MergeME's routing by perplexity). A question's "
    "perplexity is found under each expert, in the expert's own words. The expert of the smallest answers it, or with "
    "--experts_per_question several do, token by token, by the mean of what they predict, weighted by 1 / perplexity. "
    "Nothing is trained and no model is written. With one expert for a question, one is in memory at a time.",
    continues=True,
)
