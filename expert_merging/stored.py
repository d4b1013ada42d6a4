"""Where a model in memory has the tensors of its files.

Transformers renames tensors when it loads a model, and fuses some: the experts of a Mixtral's layer are two parameters.
What it does to names and rows is found by letting it undo that on numbers of rows, for any architecture.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Iterator, Mapping
from itertools import accumulate
from math import prod
from typing import TYPE_CHECKING, Any, NamedTuple

from expert_merging.backbone import empty_model
from expert_merging.libraries import import_transformers

if TYPE_CHECKING:
    from torch import Tensor


class Run(NamedTuple):
    """A run of entries of a flattened parameter.

    Args:
        parameter: its name in memory.
        start: first entry.
        stop: end of the entries.
    """

    parameter: str
    start: int
    stop: int


def stored_tensors(model: Any, file_name: Callable[[str], str] = str) -> dict[str, list[Run]]:
    """The runs that the tensors of the files are, by published names.

    A tensor is one run, all of a parameter or a part of it, or several one after the other. What is neither, such as a
    matrix that is turned, is left out.

    Args:
        model: the model, whose parameters need no memory.
        file_name: published name of a parameter, whatever naming it has.
    """
    order = {name: number for number, (name, _) in enumerate(model.named_parameters())}
    found: dict[str, list[Run]] = {}
    for name, runs in sorted(_runs(model), key=lambda pair: (order[pair[1][0].parameter], pair[1][0].start)):
        found.setdefault(file_name(name), []).extend(runs)
    return found


def parameter_names(kind: str, config: Any) -> list[str]:
    """Names that a model's parameters have in files, but for the family's own rules, from its configuration alone.

    Args:
        kind: one of transformers' automatic classes, such as ``AutoModelForCausalLM``.
        config: a configuration of transformers'.
    """
    return list(stored_tensors(empty_model(kind, config)))


def _runs(model: Any) -> Iterator[tuple[str, list[Run]]]:
    """Names in files, before families' own rules, with the runs that each is."""
    rows = _Rows({name: tuple(parameter.shape) for name, parameter in model.named_parameters()})
    for name, numbers in _undone(model, rows.numbers()).items():
        runs = rows.runs(numbers)
        if runs:
            yield name, runs


def _undone(model: Any, numbers: dict[str, Tensor]) -> Mapping[str, Tensor]:
    """What files would have of these values of the parameters."""
    if not isinstance(model, import_transformers().PreTrainedModel):
        return numbers
    from transformers.core_model_loading import revert_weight_conversion

    undone: Mapping[str, Tensor] = revert_weight_conversion(model, dict(numbers))
    return undone


class _Rows:
    """Numbers of the rows of all parameters, counted through.

    Args:
        shapes: shapes by name.
    """

    def __init__(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self.names = list(shapes)
        self.shapes = [(*shape[:-1], 1) if len(shape) > 1 else shape for shape in shapes.values()]
        self.widths = [shape[-1] if len(shape) > 1 else 1 for shape in shapes.values()]
        counts = map(prod, self.shapes)
        self.firsts = [0, *accumulate(counts)]

    def numbers(self) -> dict[str, Tensor]:
        """The number of each row in its place, ``(*shape[:-1], 1)``; entries of vectors count as rows."""
        import torch

        bounds = zip(self.names, self.shapes, self.firsts, self.firsts[1:], strict=False)
        return {name: torch.arange(first, stop, dtype=torch.int32).view(shape) for name, shape, first, stop in bounds}

    def runs(self, numbers: Tensor) -> list[Run]:
        """The runs that rows with these numbers are, one of each parameter; none where they are something else."""
        import torch

        flat, found = numbers.flatten(), list[Run]()
        while len(flat):
            first = int(flat[0])
            place = bisect.bisect_right(self.firsts, first) - 1
            count = min(len(flat), self.firsts[place + 1] - first)
            is_rows = len(self.shapes[place]) < 2 or numbers.shape[-1] == 1
            is_run = torch.equal(flat[:count], torch.arange(first, first + count, dtype=flat.dtype))
            if not (is_rows and is_run) or self.names[place] in {run.parameter for run in found}:
                return []
            width, before = self.widths[place], first - self.firsts[place]
            found.append(Run(self.names[place], before * width, (before + count) * width))
            flat = flat[count:]
        return found
