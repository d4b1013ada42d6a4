"""Finds the command that the user has typed, runs it, and tells what went wrong."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from expert_merging.commands import (
    align,
    analyse,
    compress,
    convert,
    evaluate,
    extract,
    merge,
    report,
    route,
    runs,
    sweep,
    verify,
)
from expert_merging.commands.command import Command
from expert_merging.commands.completion import complete
from expert_merging.console import Screen
from expert_merging.documents import check_arguments, escape_output
from expert_merging.errors import InputError, file_problem, tell
from expert_merging.processes import count
from expert_merging.relief import out_of_memory
from expert_merging.shortage import shortage_of

COMMANDS: dict[str, Command] = {
    module.COMMAND.name: module.COMMAND
    for module in (merge, route, runs, align, evaluate, sweep, report, analyse, extract, compress, convert, verify)
}

# What `pip install -e .` calls the program.
PROGRAM = "expert-merging"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code."""
    escape_output()
    arguments = sys.argv[1:] if arguments is None else arguments
    complete(parser)
    command = COMMANDS.get(arguments[0]) if arguments else None
    if command is not None and command.main is not None:
        return command.main(arguments[1:])
    given = _parsed(arguments)
    console = Screen(soft_wrap=True, highlight=False, markup=False)
    try:
        check_arguments(arguments)
        name = given.pop("command")
        run = COMMANDS[name].run
        if run is None:
            raise InputError(f"{name} must stand first: {PROGRAM} {name} ..., got {shlex.join(arguments)}")
        if count() > 1:
            jobs = " and give --jobs N" if name == sweep.COMMAND.name else ""
            raise InputError(f"{name} is not for several processes of torchrun or accelerate launch; start one{jobs}")
        run(given, console)
    except InputError as error:
        tell(error)
        return 1
    except (MemoryError, OSError, RuntimeError) as error:
        shortage = shortage_of(error)
        if shortage is not None:
            tell(out_of_memory(shortage, "", "give --device cpu" if shortage.on_gpu else "take a machine with more"))
        elif isinstance(error, OSError):
            tell(file_problem(error, "continues where it stopped" if COMMANDS[name].continues else "begins again"))
        else:
            raise
        return 1
    return 0


def _parsed(arguments: Sequence[str]) -> dict[str, Any]:
    """The values of the arguments by name, the command among them."""
    whole = parser()
    found, more = whole.parse_known_args(arguments)
    given = vars(found)
    if COMMANDS[given["command"]].takes_more:
        given["more"] = more
    elif more:
        whole.error(f"unrecognized arguments: {' '.join(more)}")
    return given


def parser() -> argparse.ArgumentParser:
    """The options of all commands."""
    program = Path(sys.argv[0]).name
    result = argparse.ArgumentParser(
        prog=program if program == PROGRAM else "python -m expert_merging",
        description="Merge experts of one base into one model, compare merges, and make checkpoints ready. "
        "COMMAND --help explains a command.",
    )
    kinds = result.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command in COMMANDS.values():
        own = kinds.add_parser(command.name, help=command.summary, description=command.description or None)
        command.add_arguments(own)
    return result
