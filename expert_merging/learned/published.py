"""Reads ``weight_coeffs.json``, in which the published implementation leaves what it has learned.

By parameter it has a coefficient for each expert, or a list of them, one per chunk. Parameters go by their names with
underscores for dots. Neither experts nor checkpoints are named: the experts are the run's, in their order. Where the
file lies in a run's folder of this program, the description of its coefficients says what they belong to.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from expert_merging.documents import read_json
from expert_merging.errors import InputError
from expert_merging.learned.chunks import chunk_count
from expert_merging.learned.coefficients import Coefficients, load_coefficients
from expert_merging.plan import Plan
from expert_merging.run import Run


def published_name(name: str) -> str:
    """What the file calls a parameter."""
    return name.replace(".", "_")


def load_published(file: Path, plan: Plan, file_name: Callable[[str], str]) -> Coefficients:
    """Coefficients from a file in the published format.

    Args:
        file: the file.
        plan: what is merged.
        file_name: published name of a parameter, whatever naming its checkpoint was saved with.

    Returns:
        Coefficients by the base's names; those of parameters that are not merged keep the names of the file.

    Raises:
        InputError: the file cannot be read, or its coefficients are of another number of experts.
    """
    run = Run(file.parent)
    belonging = Coefficients(tuple(plan.experts), {}, (1.0,) * len(plan.experts), provenance={"file": str(file)})
    if run.coefficients.is_file():
        belonging = load_coefficients(run.folder)
    names, values = _names(plan, file_name), {}
    for key, given in _read(file).items():
        name, rows = names.get(key, key), _rows(file, key, given, belonging.experts)
        entry = plan.base.entries.get(name)
        # Of more chunks than a tensor can be cut into, the published code leaves the last ones unused.
        values[name] = rows if entry is None else rows[:, : chunk_count(entry.elements, rows.shape[1])]
    return replace(belonging, values=values)


def _names(plan: Plan, file_name: Callable[[str], str]) -> dict[str, str]:
    """Names of the merged tensors by what the file calls them.

    Raises:
        InputError: two of them have one name there.
    """
    names: dict[str, str] = {}
    for name in plan.merged:
        for key in {published_name(name), published_name(file_name(name))}:
            if key in names:
                raise InputError(
                    f"--coefficients: {names[key]} and {name} are both {key} in the published format, which cannot "
                    "tell them apart; give coefficients.safetensors"
                )
            names[key] = name
    return names


def _read(file: Path) -> Mapping[str, Any]:
    content = read_json(file)
    if not isinstance(content, dict) or not content:
        raise InputError(f"--coefficients {file} must hold coefficients by parameter, as weight_coeffs.json does")
    return content


def _rows(file: Path, key: str, given: Any, experts: tuple[str, ...]) -> Tensor:
    """A parameter's coefficients ``(experts, chunks)`` float32."""
    rows = [row if isinstance(row, list) else [row] for row in given] if isinstance(given, list) else []
    if not rows or not rows[0] or any(len(row) != len(rows[0]) or not all(map(_is_number, row)) for row in rows):
        raise InputError(
            f"--coefficients {file}: {key} must have a number for each expert, or for each a list of as many numbers"
        )
    if len(rows) != len(experts):
        raise InputError(
            f"--coefficients {file} has coefficients of {len(rows)} experts, and {len(experts)} are given "
            f"({', '.join(experts)}); give those that they were learned with, in the same order"
        )
    return torch.tensor([list(map(float, row)) for row in rows], dtype=torch.float32)


# The largest float32.
_LARGEST = torch.finfo(torch.float32).max


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= _LARGEST
