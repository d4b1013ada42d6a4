"""Merge: the families' commands as one, which finds the family by the base."""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping, Sequence

from expert_merging import cli
from expert_merging.backbone import Backbone
from expert_merging.catalogue import find_method
from expert_merging.commands.command import Command
from expert_merging.documents import check_arguments, escape_output
from expert_merging.errors import InputError
from expert_merging.families import TELLING, family_names, find_family, general_family, values_of
from expert_merging.method import Method
from expert_merging.parser import build_parser
from expert_merging.processes import is_main_process

PROG = "expert-merging merge"


def main(arguments: Sequence[str]) -> int:
    """Merge, or explain the flags of one method or of all; returns the exit code.

    Args:
        arguments: what was typed after ``merge``: perhaps a method, then flags of a family's command and ``--family``.
    """
    escape_output()
    try:
        check_arguments(arguments)
        name, flags = _method_first(arguments)
        given = values_of(flags, (*TELLING, "method"))
        name = name or given.get("method")
        if {"-h", "--help"} & set(flags):
            help_parser(_family(given), find_method(name) if name else None).print_help()
            return 0
        backbone = (
            _family(given) if {"--list_methods", "--list-methods"} & set(flags) else find_family(given, os.environ)
        )
    except InputError as error:
        return cli.fail(error, at_once=is_main_process())
    return cli.main(backbone, _without_family(flags))


def help_parser(backbone: Backbone, method: Method | None) -> argparse.ArgumentParser:
    """The command's flags, for its help and for completion.

    Args:
        backbone: the family, for its defaults.
        method: the only method whose options are shown; None for all.
    """
    parser = build_parser(backbone, method, PROG if method is None else f"{PROG} {method.name}")
    if method is None:
        parser.epilog = f"{PROG} METHOD --help shows the options of one method."
    add_arguments(parser, takes_method=method is None)
    return parser


def add_arguments(parser: argparse.ArgumentParser, *, takes_method: bool = True) -> None:
    """Give a parser the arguments that families' commands do not have."""
    if takes_method:
        parser.add_argument("name", nargs="?", metavar="METHOD", help="the method, instead of --method")
    parser.add_argument(
        "--family",
        choices=family_names(),
        help="model family; by default that of the base, by its config.json, or of the base in --cache_dir",
    )


def _method_first(arguments: Sequence[str]) -> tuple[str | None, list[str]]:
    """The method, if it stands first, and all flags with it as one of them.

    Raises:
        InputError: it is given twice.
    """
    if not arguments or arguments[0].startswith("-"):
        return None, list(arguments)
    name, flags = arguments[0], list(arguments[1:])
    if "method" in values_of(flags, ("method",)):
        raise InputError(f"the method is given twice: {name}, and with --method; leave one out")
    find_method(name)
    return name, ["--method", name, *flags]


def _family(given: Mapping[str, str]) -> Backbone:
    """The family whose defaults are shown: that of the base, as far as one is given."""
    return find_family(given, {}) if {*given} & {*TELLING} else general_family()


def _without_family(flags: Sequence[str]) -> list[str]:
    """The flags that a family's own command has."""
    kept, skips = [], False
    for flag in flags:
        if skips:
            skips = False
        elif flag == "--family":
            skips = True
        elif not flag.startswith("--family="):
            kept.append(flag)
    return kept


COMMAND = Command(
    "merge",
    "merge experts of one base into one model",
    None,
    add_arguments,
    main=main,
    takes_more=True,
    continues=True,
)
