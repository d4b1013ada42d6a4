"""Singular directions of what coefficients multiply, made once while learning and kept in files.

They take as much room as the experts' matrices, or less, in float32. So they stay on disk, where the system keeps in
memory what fits there, and are read a tensor at a time.
"""

from __future__ import annotations

from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from expert_merging.context import Context
from expert_merging.kept import Kept
from expert_merging.learned.axes import Singular, right_directions
from expert_merging.learned.parametrisations import CoefficientVector
from expert_merging.learned.task_vectors import TaskVectors
from expert_merging.parts import Part
from expert_merging.plan import Plan
from expert_merging.processes import is_main_process
from expert_merging.running.tensor_files import write_tensors


def bases_size(plan: Plan, names: list[str]) -> int:
    """Bytes of the files for these matrices."""
    parts = map(plan.part, names)
    return sum(4 * len(plan.experts) * part.columns * min(part.shape) for part in parts)


class KeptBases:
    """Right singular directions of matrices, read from the files that keep them.

    Args:
        context: the run, whose folder of directions has the files.
        name: name of what coefficients multiply.
        names: the matrices.
    """

    def __init__(self, context: Context, name: str, names: list[str]) -> None:
        self.context, self.names = context, names
        self.folder = context.run.directions / f"{name}-bases"
        self.files = {tensor: self.folder / f"{number}.safetensors" for number, tensor in enumerate(names)}
        self._last: tuple[str, Tensor] | None = None

    def make(self, task_vectors: TaskVectors) -> None:
        """Make what an earlier part of the run has not made.

        Args:
            task_vectors: what coefficients multiply, with the user's factors, which change no direction.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        kept = Kept(self.folder / "digests.json", made_of=self.context.plan.opened)
        with self.context.progress("singular directions", len(self.names), "matrix") as advance:
            for tensor, file in self.files.items():
                if not (file.exists() and kept.has(file)):
                    part = self.context.plan.part(tensor)
                    basis = right_directions(_whole(task_vectors, part), part)
                    write_tensors(file, {"directions": basis.cpu()}, kept)
                advance(1, tensor)

    def __call__(self, directions: Tensor, part: Part) -> Tensor:
        """See `expert_merging.learned.axes.Bases`."""
        if self._last is None or self._last[0] != part.name:
            self._last = None  # before the next is there too
            self._last = part.name, load_file(self.files[part.name])["directions"].to(directions.device)
        return self._last[1]


def _whole(task_vectors: TaskVectors, part: Part) -> Tensor:
    """All entries of a tensor, ``(experts, entries)``."""
    found = torch.empty(len(task_vectors.scale), part.entries, device=task_vectors.device)
    for _, piece, _, own in task_vectors.blocks([part]):
        found[:, piece.start : piece.stop] = own
    return found


def give_bases(
    context: Context, name: str, vector: CoefficientVector, task_vectors: TaskVectors, accelerator: Any
) -> None:
    """Make the singular directions that coefficients are along, if any are, and let the coefficients use them.

    Args:
        context: the run.
        name: name of what coefficients multiply.
        vector: the coefficients.
        task_vectors: what they multiply, whose pieces are then of whole rows.
        accelerator: knows the processes.
    """
    names = [tensor for tensor, axis in vector.axes.items() if isinstance(axis, Singular)]
    if not names:
        return
    task_vectors.in_rows = True
    kept = KeptBases(context, name, names)
    with accelerator.main_process_first():  # the others find the files
        if is_main_process():
            kept.make(task_vectors)
    vector.axes |= dict.fromkeys(names, Singular(kept))
