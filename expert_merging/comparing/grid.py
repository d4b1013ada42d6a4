"""The points of a sweep: every combination of the values that options are to have."""

from __future__ import annotations

import csv
import itertools
import json
import re
from collections.abc import Mapping
from typing import Any, TypeAlias

from expert_merging.documents import parse_json
from expert_merging.errors import InputError, excerpt

# The values of the swept options by name.
Point: TypeAlias = dict[str, Any]

_NUMBER = r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?"
_RANGE = re.compile(rf"\s*({_NUMBER})\s*:\s*({_NUMBER})\s*:\s*({_NUMBER})\s*")
# Options that decide what every score is compared with, so that points that differ in them cannot be compared.
_FIXED = (
    *("cache_dir", "base_model_path", "expert", "data_dir", "task_expert", "output_path", "run_name", "device"),
    *("loss_tokens", "max_new_tokens", "prompt_template", "keep_targets"),
    *("mixed_precision", "log_with", "dry_run", "run_tests", "tokenizer", "embeddings", "chat_template_from"),
)
_MOST = 10_000


def points_of(given: Any) -> list[Point]:
    """All points of a grid, or of several one after the other, each once.

    Args:
        given: values by option, as ``0.1:1.0:0.1`` (both ends), ``0,1,2`` or a list; or a list of such grids.

    Raises:
        InputError: it is something else.
    """
    grids = given if isinstance(given, list) else [given]
    if not grids or not all(isinstance(grid, dict) and grid for grid in grids):
        raise InputError(
            f"what is to be swept? Give --sweep OPTION=VALUES, such as --sweep scaling_coefficient=0.1:1.0:0.1, got "
            f"{excerpt(given)}"
        )
    points = [point for grid in grids for point in _points(grid)]
    return list({json.dumps(point): point for point in points}.values())


def _points(grid: Mapping[str, Any]) -> list[Point]:
    columns = {str(name).replace("-", "_"): values_of(str(name), values) for name, values in grid.items()}
    fixed = [name for name in columns if name in _FIXED]
    if fixed:
        raise InputError(
            f"--sweep {fixed[0]}: scores of such points cannot be compared with each other; give --{fixed[0]} once"
        )
    count = 1
    for values in columns.values():
        count *= len(values)
    if count > _MOST:
        raise InputError(f"--sweep has {count} combinations, and at most {_MOST} are taken; leave some out")
    return [dict(zip(columns, row, strict=True)) for row in itertools.product(*columns.values())]


def values_of(name: str, given: Any) -> list[Any]:
    """The values that an option is to have.

    Args:
        name: the option.
        given: a range with both ends, values with commas between them, or a list.

    Raises:
        InputError: it is none of them.
    """
    if isinstance(given, list):
        values = given
    elif isinstance(given, str):
        bounds = _RANGE.fullmatch(given)
        values = _range(name, given, *map(float, bounds.groups())) if bounds else _listed(given)
    else:
        values = [given]
    if not values or not all(value != "" for value in values):
        raise InputError(
            f"--sweep {name} takes FIRST:LAST:STEP or values with commas between them, got {excerpt(given)}"
        )
    return values


def _range(name: str, given: str, first: float, last: float, step: float) -> list[float | int]:
    if step == 0 or (last - first) / step < 0 or (last - first) / step > _MOST:
        raise InputError(f"--sweep {name}={given}: no steps of {step:g} lead from {first:g} to {last:g}")
    # Steps in binary do not add up, and 0.1 + 2 * 0.1 is meant to be 0.3.
    numbers = [round(first + number * step, 12) for number in range(int((last - first) / step + 1e-9) + 1)]
    return [int(number) if number.is_integer() and "." not in given else number for number in numbers]


def _listed(given: str) -> list[Any]:
    """Values as JSON has them; what is no JSON is text, in double quotes where it has commas."""
    try:
        values = parse_json(f"[{given}]")
    except ValueError:
        return [_value(text.strip()) for text in next(csv.reader([given], skipinitialspace=True), [""])]
    return list(values)


def _value(text: str) -> Any:
    try:
        return parse_json(text)
    except ValueError:
        return text


def label_of(point: Mapping[str, Any]) -> str:
    """A point in words: a method is its name alone, and factors of 0 by expert are left out."""
    return ", ".join(_words(name, value) for name, value in point.items())


def _words(name: str, value: Any) -> str:
    if isinstance(value, dict) and all(isinstance(factor, int | float) for factor in value.values()):
        value = ", ".join(f"{key}: {factor}" for key, factor in value.items() if factor) or "0"
    text = value if isinstance(value, str) else json.dumps(value)
    return text if name == "method" else f"{name} {text}"
