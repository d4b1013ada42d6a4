"""Make safetensors files of pickle files."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from expert_merging.commands.command import Command


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Give a parser the arguments."""
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="folder of the model, or its repository on the Hub")
    parser.add_argument("target", type=Path, metavar="NEW_FOLDER", help="where the result goes; must not exist yet")


def run(given: Mapping[str, Any], console: Console) -> None:
    """Make safetensors files of pickle files."""
    from expert_merging.convert import convert

    convert(given["folder"], given["target"], console)


COMMAND = Command(
    "convert",
    "make safetensors files of a model's pickle files, without running what these may hold",
    run,
    add_arguments,
    "Make safetensors files of a model's or an adapter's pickle files (pytorch_model*.bin, adapter_model.bin). "
    "Names, types and division into files stay, and other files are copied, but for what trainers keep for "
    "themselves. Files that hold more than tensors are refused: nothing in them is run.",
)
