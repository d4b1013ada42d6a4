"""Arguments of the commands that take models, and a flag for each option of a class."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from expert_merging.flags import Option
from expert_merging.parser import add_flag, single_value


def add_models(parser: argparse.ArgumentParser, options: Mapping[str, Option]) -> None:
    """Give a parser models as arguments, and flags of options.

    Args:
        parser: the command's parser.
        options: the command's options by name.
    """
    parser.argument_default = argparse.SUPPRESS
    parser.add_argument(
        "models",
        nargs="+",
        type=Path,
        metavar="RUN_OR_FOLDER",
        help="a run, or the folder of any model, or its repository on the Hub",
    )
    for option in options.values():
        add_flag(parser, option, option.default, takes_several=False)


def values_of(given: Mapping[str, Any], options: Mapping[str, Option]) -> dict[str, Any]:
    """The values of those options that were given, by name.

    Args:
        given: texts of arguments, as they were parsed.
        options: the command's options by name.

    Raises:
        InputError: a value is not allowed.
    """
    return {
        name: option.convert(single_value(options, name, given[name]))
        for name, option in options.items()
        if name in given
    }
