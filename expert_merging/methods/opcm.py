"""OPCM: experts are merged one after the other, each without what lies in the directions merged before.

The paper keeps a merged task vector of the mean size of the experts after every step. Sizes cancel: a step only needs
the singular directions of what was merged, and the next one is added at full size. So the sum is made expert by expert,
matrix by matrix, and scaled once at the end. That factor is one number for the whole model, found by a pass that merges
everything and keeps nothing but norms: merging takes twice as long as its decompositions.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from expert_merging.context import Context
from expert_merging.flags import Factor, Interval
from expert_merging.method import KEEPS_SINGLE, Preparation, Prepare, register
from expert_merging.methods.spectral import norms, rounding_floor, singular_triples
from expert_merging.parts import Part
from expert_merging.roles import is_matrix

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Share = Annotated[float, Interval("[0, 1)")]


def accumulate(task_vectors: Tensor, part: Part, projection_threshold: float) -> Tensor:
    """The sum of each expert's part outside of what was summed before, ``(*shape)``; of vectors, the plain sum.

    Args:
        task_vectors: ``(experts, *shape)``, in the order in which they are merged.
        part: the whole tensor.
        projection_threshold: as `opcm` has it.
    """
    total = task_vectors[0].clone()
    for number, task_vector in enumerate(task_vectors[1:], 1):
        if is_matrix(part):
            floor = rounding_floor(task_vectors[:number])
            task_vector = _outside(task_vector, total, floor, projection_threshold)
        total += task_vector
    return total


def _outside(task_vector: Tensor, merged: Tensor, floor: float, threshold: float) -> Tensor:
    """A task vector without its entries between leading directions of a matrix, and between each of its pairs."""
    left, values, right = singular_triples(merged, floor, single=True)
    if not len(values):
        return task_vector
    # The first direction with which the sum of singular values exceeds its share is no leading one any more.
    leading = int((values.double().cumsum(0) / values.double().sum() <= threshold).sum())
    seen = left.mT @ task_vector
    removed = right.mT * (seen * right.mT).sum(1, keepdim=True)
    removed[:leading] = seen[:leading] @ right[:, :leading] @ right[:, :leading].mT
    return task_vector - left @ removed


def measure_scale(context: Context, *, projection_threshold: float) -> Preparation:
    """The factor that gives the sum of all experts' parts the mean of the experts' norms."""

    def measure(task_vectors: Tensor, part: Part) -> Tensor:
        import torch

        sizes = norms(task_vectors)
        return torch.cat([sizes, norms(accumulate(task_vectors, part, projection_threshold)[None])]).square()

    def find() -> dict[str, float]:
        count = len(context.plan.experts)
        found = context.passes.measure_wholes(measure, (count + 1,), "measuring what is merged")
        *sizes, merged = _total(list(found.values()), count + 1).sqrt().tolist()
        return {"opcm_scale": sum(sizes) / count / merged if merged else 0.0}

    return Preparation(find, notes=(f"experts are merged in this order: {', '.join(context.plan.experts)}",))


def _total(rows: list[torch.Tensor], width: int) -> torch.Tensor:
    import torch

    return torch.stack([torch.zeros(width, dtype=torch.float64), *rows]).sum(0)


@register(unit="tensor", promises=frozenset({KEEPS_SINGLE}), prepare=Prepare(measure_scale, ("opcm_scale",)))
def opcm(
    task_vectors: Tensor,
    part: Part,
    opcm_scale: float,
    *,
    scaling_coefficient: Factor = 1.0,
    projection_threshold: Share = 0.5,
) -> Tensor:
    """OPCM: experts one after the other, outside of what was merged before (Tang et al., 2025, arXiv 2501.09522).

    Of a matrix, the singular directions of what was merged so far are made. An expert loses its entries between the
    leading left and the leading right ones, and those between every left direction and its own right one. The rest is
    added. The result has the mean norm of the experts, over all merged parameters. Other tensors are summed and scaled
    alike.

    The order of the experts matters: it is that of ``--expert``, or of their folders, and is recorded. The authors'
    code shuffles by default. Directions whose singular values are mere rounding are left out, which their code fills
    with what the library picks.

    Args:
        task_vectors: ``(experts, *shape)`` float32.
        part: the whole tensor.
        opcm_scale: mean norm of the experts over the norm of what is summed, of the whole model.
        scaling_coefficient: factor on the merged task vector.
        projection_threshold: share of the sum of singular values that the leading directions hold at most.

    Returns:
        Merged task vector ``(*shape)``.
    """
    return accumulate(task_vectors, part, projection_threshold).mul_(opcm_scale * scaling_coefficient)
