"""What is done beside merging: ``python -m expert_merging`` with ``analyse``, ``align``, ``verify`` and others."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from expert_merging.comparing.compare import AlignOptions, compare
from expert_merging.documents import check_arguments, escape_output
from expert_merging.errors import InputError, Problems, about, file_problem, tell
from expert_merging.flags import read_options
from expert_merging.parser import add_flag, single_value
from expert_merging.relief import out_of_memory
from expert_merging.shortage import shortage_of
from expert_merging.signals import run_program

ALIGN = read_options(AlignOptions)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code."""
    escape_output()
    given = vars(parser().parse_args(arguments))
    console = Console(soft_wrap=True, highlight=False, markup=False)
    try:
        check_arguments(sys.argv[1:] if arguments is None else arguments)
        COMMANDS[given.pop("command")](given, console)
    except InputError as error:
        tell(error)
        return 1
    except (MemoryError, OSError, RuntimeError) as error:
        shortage = shortage_of(error)
        if shortage is not None:
            tell(out_of_memory(shortage, "", "give --device cpu" if shortage.on_gpu else "take a machine with more"))
        elif isinstance(error, OSError):
            tell(file_problem(error, "begins again"))
        else:
            raise
        return 1
    return 0


def parser() -> argparse.ArgumentParser:
    """The options of all commands."""
    result = argparse.ArgumentParser(
        prog="python -m expert_merging", description="Use finished merges, and make checkpoints ready to be merged."
    )
    commands = result.add_subparsers(dest="command", required=True)
    analyse = commands.add_parser("analyse", help="draw importance, coefficients and chunks of learned merges again")
    analyse.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folder of a run of a method that learns")
    align = commands.add_parser(
        "align",
        help="compare models with the experts, without labels",
        description="How near models come to each task's expert: 0 is the expert itself, 1 the base.",
        argument_default=argparse.SUPPRESS,
    )
    align.add_argument(
        "models",
        nargs="+",
        type=Path,
        metavar="RUN_OR_FOLDER",
        help="a run, or the folder of any model, or its repository on the Hub",
    )
    for option in ALIGN.values():
        add_flag(align, option, option.default, takes_several=False)
    extract = commands.add_parser(
        "extract", help="rebuild an expert from a merge by --method tall or emr, which needs the base alone"
    )
    extract.add_argument("run", type=Path, metavar="RUN", help="folder of a run of --method tall or emr")
    extract.add_argument("--expert", required=True, metavar="NAME", help="name of the expert in that run")
    extract.add_argument("--output", required=True, type=Path, metavar="FOLDER", help="where the model goes")
    extract.add_argument(
        "--base_model_path",
        type=Path,
        metavar="FOLDER",
        help="the base, a folder or a repository on the Hub, if it is not where it was for the run",
    )
    convert = commands.add_parser(
        "convert",
        help="make safetensors files of a model's pickle files, without running what these may hold",
        description=(
            "Make safetensors files of a model's or an adapter's pickle files (pytorch_model*.bin, adapter_model.bin). "
            "Names, types and division into files stay, and other files are copied, but for what trainers keep for "
            "themselves. Files that hold more than tensors are refused: nothing in them is run."
        ),
    )
    convert.add_argument(
        "folder", type=Path, metavar="FOLDER", help="folder of the model, or its repository on the Hub"
    )
    convert.add_argument("target", type=Path, metavar="NEW_FOLDER", help="where the result goes; must not exist yet")
    verify = commands.add_parser(
        "verify",
        help="check that finished runs are what they were: files, checkpoints, and that they fit together",
        description=(
            "Read a finished run and say what differs, in a line each. Every file and tensor is compared with the "
            "digest that was taken when it was written, and looked through for NaN and infinite values. Copied tensors "
            "are compared with the checkpoint that they are of, and base and experts with their fingerprints, where "
            "they are still there; learned coefficients with the weights that they make; the card with the model. "
            "Nothing is written. The exit code is 0 where all is as it was, and 1 otherwise."
        ),
    )
    verify.add_argument(
        "runs", nargs="+", type=Path, metavar="RUN", help="folder of a finished run of any method, or its model"
    )
    return result


def analyse(given: Mapping[str, Any], console: Console) -> None:
    """Draw the pictures of every run again and say where they are."""
    from expert_merging.console import say
    from expert_merging.learned.figures import redraw
    from expert_merging.run import Run

    for folder in given["runs"]:
        analysis = Run(folder).analysis
        if not analysis.is_dir():
            raise InputError(f"{folder} has no folder {analysis.name}; give a finished run of a method that learns")
        for file in redraw(analysis):
            say(console, str(file))


def align(given: Mapping[str, Any], console: Console) -> None:
    """Compare models with the experts."""
    texts = {name: value for name, value in given.items() if name != "models"}
    values = {name: ALIGN[name].convert(single_value(ALIGN, name, value)) for name, value in texts.items()}
    compare(given["models"], AlignOptions(**values), console)


def extract(given: Mapping[str, Any], console: Console) -> None:
    """Rebuild an expert."""
    from expert_merging.extract import extract

    extract(given["run"], given["expert"], given["output"], given["base_model_path"], console)


def convert(given: Mapping[str, Any], console: Console) -> None:
    """Make safetensors files of pickle files."""
    from expert_merging.convert import convert

    convert(given["folder"], given["target"], console)


def verify(given: Mapping[str, Any], console: Console) -> None:
    """Check runs, all of them before any problem is told."""
    from expert_merging.verify import verify

    problems = Problems()
    for folder in given["runs"]:
        with problems.collecting(), about(str(folder)):
            verify(folder, console)
    problems.check()


COMMANDS = {"analyse": analyse, "align": align, "extract": extract, "convert": convert, "verify": verify}

if __name__ == "__main__":
    run_program(main, "the same command begins again")
