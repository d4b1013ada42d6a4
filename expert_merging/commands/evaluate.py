"""Measure how many questions models answer rightly."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from expert_merging.commands.command import Command
from expert_merging.commands.models import add_models, values_of
from expert_merging.comparing.evaluate import EvaluateOptions, evaluate
from expert_merging.flags import read_options

OPTIONS = read_options(EvaluateOptions)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Give a parser the arguments."""
    add_models(parser, OPTIONS)
    parser.add_argument(
        "--import",
        dest="imported",
        action="append",
        type=Path,
        metavar="FOLDER",
        help="folder in which VLMEvalKit, lmms-eval or lm_eval has written results of the model; may be repeated",
    )


def run(given: Mapping[str, Any], console: Console) -> None:
    """Measure models."""
    options = EvaluateOptions(**values_of(given, OPTIONS))
    evaluate(given["models"], options, console, given.get("imported", ()))


COMMAND = Command(
    "evaluate",
    "measure how many questions models answer rightly, own ones or public benchmarks, with intervals and tests",
    run,
    add_arguments,
    "Ask models questions whose answers are known, and say how many they answer rightly, how sure that is, and which "
    "differences between models are more than chance. An entry of a task file has a question, as in calibration files, "
    "and an answer: a text (the whole answer must be it), a number (the last one in the answer must be it), or, with a "
    "list of choices, the right one (it must be the likeliest). Each run is asked as it has recorded that its experts "
    "were. --tasks asks public benchmarks in the same way, through lm-evaluation-harness (pip install lm-eval). "
    "--import reads what VLMEvalKit, lmms-eval or lm_eval has measured. Scores of runs are kept in their scores.json.",
)
