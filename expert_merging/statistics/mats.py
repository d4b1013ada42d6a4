"""MaTS: RegMean's least squares, approached from the mean by conjugate gradients and left early."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from expert_merging.flags import Count
from expert_merging.parts import Part
from expert_merging.running.options import SampleOptions
from expert_merging.statistics.gathering import merge_around_mean, register_on_grams

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


@register_on_grams("mats", MatsOptions)
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
    return merge_around_mean(task_vectors, part, grams, lambda given: _conjugate_gradients(given, iterations))


def _conjugate_gradients(deviations: Iterable[tuple[Tensor, Gram]], iterations: int) -> Tensor:
    """What ``X`` in ``X sum_k G_k = sum_k D_k G_k`` comes to in some steps from 0 on, in float64.

    Args:
        deviations: deviation ``(outputs, inputs)`` and Gram matrix of each expert, each held while it is added.
        iterations: most steps.
    """
    import torch

    residual: Any = 0
    grams = []
    for deviation, gram in deviations:
        residual = residual + gram.product(deviation)
        grams.append(gram)
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
