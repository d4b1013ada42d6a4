"""The command line: ``python -m zoo build FAMILY``, ``evaluate RUN...``, ``demo FAMILY`` and ``sweep FAMILY``."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from expert_merging.console import Screen
from expert_merging.documents import check_arguments, escape_output
from expert_merging.errors import InputError, file_problem, tell
from expert_merging.signals import CONTINUES
from zoo.family import FAMILY_MODULES, default_folder, load_family


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code."""
    escape_output()
    whole = parser()
    options, more = whole.parse_known_args(arguments)
    if more and options.command != "sweep":
        whole.error(f"unrecognized arguments: {' '.join(more)}")
    try:
        check_arguments(sys.argv[1:] if arguments is None else arguments)
        if options.command == "build":
            build_command(
                options.family, options.output, options.seed, adapters=options.adapters, mixture=options.mixture
            )
        elif options.command == "demo":
            demo_command(options.family, options.seed, options.methods, options.json)
        elif options.command == "sweep":
            from zoo.sweep import sweep

            return sweep(load_family(options.family), options.seed, options.draw, more)
        else:
            evaluate_command(options.runs, options.zoo, options.questions, options.json)
    except InputError as error:
        tell(error)
        return 1
    except OSError as error:
        tell(file_problem(error, "continues where it stopped"))
        return 1
    except KeyboardInterrupt:
        sys.stderr.write(f"interrupted; {CONTINUES}\n")
        return 130
    return 0


def parser() -> argparse.ArgumentParser:
    """The options of all commands."""
    result = argparse.ArgumentParser(prog="python -m zoo", description="Small real experts to merge and to measure.")
    commands = result.add_subparsers(dest="command", required=True)
    build = commands.add_parser("build", help="train the base and the experts of a zoo")
    build.add_argument("family", metavar="FAMILY", help=f"model family: {', '.join(FAMILY_MODULES)}")
    build.add_argument("--seed", type=int, default=0, help="decides the questions and the training (default: 0)")
    build.add_argument("--output", type=Path, metavar="DIR", help="folder (default: zoo/models/FAMILY-seedN)")
    build.add_argument(
        "--adapters", action="store_true", help="train a LoRA adapter for every task as well, in DIR/adapters"
    )
    build.add_argument(
        "--mixture",
        action="store_true",
        help="train the base on all tasks together as well, in DIR/mixture: what a merge could at best be",
    )
    demo = commands.add_parser("demo", help="build a zoo, merge its experts and compare the methods")
    demo.add_argument("family", metavar="FAMILY", help=f"model family: {', '.join(FAMILY_MODULES)}")
    demo.add_argument("--seed", type=int, default=0, help="decides the zoo and the merging (default: 0)")
    demo.add_argument(
        "--methods",
        nargs="+",
        metavar="METHOD",
        default=["weight_average", "task_arithmetic", "expert_merging"],
        help="methods to compare, or all (default: %(default)s)",
    )
    demo.add_argument("--json", type=Path, metavar="FILE", help="write the numbers to this file")
    evaluate = commands.add_parser("evaluate", help="exact match of the base, the experts and merged models")
    evaluate.add_argument("runs", nargs="*", type=Path, metavar="RUN", help="folder of a run, or of a model")
    evaluate.add_argument(
        "--zoo", type=Path, metavar="DIR", help="folder of the zoo (default: the one whose experts were merged)"
    )
    evaluate.add_argument("--questions", type=int, metavar="N", help="ask the first N of each task (default: all)")
    evaluate.add_argument("--json", type=Path, metavar="FILE", help="write the numbers to this file")
    swept = commands.add_parser(
        "sweep",
        usage="%(prog)s FAMILY [FILE.yaml] [--seed N] [--draw N] [flags as of python -m expert_merging sweep --help]",
        help="score many merges of a zoo's experts",
    )
    swept.add_argument("family", metavar="FAMILY", help=f"model family: {', '.join(FAMILY_MODULES)}")
    swept.add_argument("--seed", type=int, default=0, help="of the zoo and of the merges (default: 0)")
    swept.add_argument(
        "--draw",
        type=int,
        choices=range(12),
        metavar="N",
        default=0,
        help="which ten questions of a task methods learn from, 0 to 11 (default: 0)",
    )
    return result


def build_command(family_name: str, output: Path | None, seed: int, *, adapters: bool, mixture: bool) -> None:
    """Build a zoo and say where it is."""
    from zoo.build import build
    from zoo.progress import progress

    family = load_family(family_name)
    zoo = output or default_folder(family_name, seed)
    console = Screen(soft_wrap=True)
    with progress(console) as shown:
        build(family, zoo, seed=seed, adapters=adapters, mixture=mixture, progress=shown)
    console.print(f"The zoo is in {zoo}", highlight=False)


def demo_command(family_name: str, seed: int, methods: Sequence[str], json_file: Path | None) -> None:
    """Run the demo and write the numbers."""
    from zoo.demo import demo

    scores = demo(family_name, seed=seed, methods=methods, console=Screen())
    if json_file is not None:
        json_file.write_text(json.dumps(scores, indent=2) + "\n", encoding="utf-8")


def evaluate_command(runs: Sequence[Path], zoo: Path | None, questions: int | None, json_file: Path | None) -> None:
    """Print the table and write the numbers."""
    from zoo.belonging import zoo_of
    from zoo.report import evaluate, table

    scores = evaluate(zoo or zoo_of(runs), runs, questions=questions)
    Screen().print(table(scores))
    if json_file is not None:
        json_file.write_text(json.dumps(scores, indent=2) + "\n", encoding="utf-8")
