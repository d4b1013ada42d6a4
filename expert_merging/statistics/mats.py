"""MaTS: RegMean's least squares, approached from the mean by conjugate gradients and left early."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from expert_merging.arithmetic import scaled_mean
from expert_merging.flags import Count
from expert_merging.method import SAMPLES, Prepare, register
from expert_merging.parts import Part
from expert_merging.running.options import SampleOptions
from expert_merging.statistics.gathering import gathering

if TYPE_CHECKING:
    from torch import Tensor

    from expert_merging.statistics.gram import Gram, Grams

# Share of the first residual at which nothing is left that the inputs, sums in float32, could say.
_SOLVED = 1e-6


@dataclass(frozen=True, kw_only=True)
class MatsOptions(SampleOptions):
    """Options of MaTS.

    Args:
        iterations: most steps of conjugate gradients; fewer stay nearer to the mean. The authors try 10 to 100.
    """

    iterations: Count = 10


@register(
    options=MatsOptions,
    unit="matrix",
    reads=frozenset({SAMPLES}),
    prepare=Prepare(gathering("mats", MatsOptions), ("grams",)),
    family_defaults=("samples_per_task",),
)
def mats(task_vectors: Tensor, part: Part, grams: Grams, *, iterations: int = 10) -> Tensor:
    """Match each expert's outputs on its own samples, from the mean on (Tam et al., 2023, arXiv 2312.04339).

    Solves ``W sum_k G_k = sum_k W_k G_k``, the paper's system with the Gram matrices of RegMean as blocks, by conjugate
    gradients from the experts' mean. To stop early keeps the result near the mean in directions that few inputs have,
    so no ridge is needed, and no matrix is decomposed. All that is no linear layer's matrix gets the mean; so does what
    no sample comes by.

    Args:
        task_vectors: ``(experts, outputs, inputs)``.
        part: the tensor.
        grams: each expert's Gram matrices.
        iterations: most steps.

    Returns:
        Merged task vector ``(outputs, inputs)``.
    """
    import torch

    mean = scaled_mean(task_vectors, 1.0)
    own = {number: gram for number, gram in enumerate(grams.of(part.name)) if gram is not None}
    if len(task_vectors) == 1 or not own:
        return mean
    residual = mean.new_zeros((), dtype=torch.float64)
    for number, gram in own.items():
        residual = residual + gram.product(task_vectors[number].double() - mean)
    return mean + _conjugate_gradients(list(own.values()), residual, iterations).to(mean.dtype)


def _conjugate_gradients(grams: Sequence[Gram], residual: Tensor, iterations: int) -> Tensor:
    """What ``X sum_k G_k`` brings near ``residual (outputs, inputs)``, in float64, from 0 on."""
    import torch

    found, direction = torch.zeros_like(residual), residual.clone()
    square = first = residual.square().sum()
    for _ in range(iterations):
        if not square > _SOLVED**2 * first:
            break
        product = sum(gram.product(direction) for gram in grams)
        step = square / torch.sum(direction * product)
        found.add_(direction * step)
        residual = residual - product * step
        before, square = square, residual.square().sum()
        direction = residual + direction * (square / before)
    return found
