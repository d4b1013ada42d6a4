"""Methods that follow the angles between models: from all inner products of a tensor come the weights of its experts.

Results lie in the span of the models, so that a first pass for the inner products is all that has to be known.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from expert_merging.arithmetic import scaled_mean, weighted_sum
from expert_merging.context import Context
from expert_merging.flags import Count, Positive
from expert_merging.method import Preparation, Prepare, register
from expert_merging.parts import Part

if TYPE_CHECKING:
    from torch import Tensor

# The result's share of the base that is left is rounding, where it is smaller.
_ROUNDING = 1e-12


def multiply_all(context: Context) -> Preparation:
    """Inner products of the base and all task vectors, by tensor."""

    def measure(base: Tensor, task_vectors: Tensor, _part: Part) -> Tensor:
        import torch

        rows = torch.cat([base[None], task_vectors]).double()
        return rows @ rows.mT

    models = 1 + len(context.plan.experts)
    return Preparation(lambda: {"products": context.passes.sums(measure, (models, models), "measuring angles")})


_PRODUCTS = Prepare(multiply_all, ("products",))


@register(unit="entries", prepare=_PRODUCTS)
def karcher(
    task_vectors: Tensor,
    part: Part,
    base: Tensor,
    products: Mapping[str, Tensor],
    *,
    karcher_iterations: Count = 10,
    karcher_tolerance: Positive = 1e-5,
) -> Tensor:
    """Mean of the experts' weights on the sphere, times their mean length (mergekit's karcher, arXiv 2403.13257).

    Each tensor of weights is a point on a sphere. Experts whose tensor is zero have no direction, and count in the
    length alone. All inner products are float64, so that angles are exact where mergekit's float32 rounds them.

    Args:
        task_vectors: ``(experts, *shape)`` float32.
        part: where the entries stand.
        base: the base's weights ``(*shape)``.
        products: inner products of base and task vectors ``(1 + experts, 1 + experts)`` float64 by tensor name.
        karcher_iterations: number of steps towards the mean, at most.
        karcher_tolerance: angle in radians below which a step ends the search, and an expert is at the mean.

    Returns:
        Merged task vector ``(*shape)``.
    """
    weights = karcher_weights(_of_weights(products[part.name]), karcher_iterations, karcher_tolerance)
    of_base = sum(weights) - 1  # every expert's weights are the base's and its task vector
    merged = weighted_sum(task_vectors, weights)
    return merged.add_(base, alpha=of_base) if abs(of_base) > _ROUNDING else merged


def _of_weights(products: Tensor) -> Tensor:
    """Inner products of the experts' weights ``(experts, experts)``, from those of base and task vectors."""
    return products[0, 0] + products[0, 1:] + products[1:, :1] + products[1:, 1:]


def karcher_weights(products: Tensor, iterations: int, tolerance: float) -> list[float]:
    """Factors on vectors whose sum is their mean on the sphere, times their mean length.

    Args:
        products: inner products of the vectors ``(vectors, vectors)`` float64.
        iterations: number of steps, at most.
        tolerance: as for `karcher`.
    """
    import torch

    lengths = products.diagonal().clamp(min=0).sqrt()
    directed = lengths > 0
    if not directed.any():
        return [1 / len(lengths)] * len(lengths)
    inverse = torch.where(directed, 1 / lengths, 0.0)
    cosines = products * inverse[:, None] * inverse
    share = directed.double() / directed.sum()
    mean = _normalized(share, cosines)  # factors on unit vectors, as all that follows
    if mean is None:  # they cancel: begin at the first
        mean = torch.zeros_like(share)
        mean[int(directed.nonzero()[0])] = 1.0
    for _ in range(iterations):
        along = (cosines @ mean).clamp(-1, 1)
        angles = along.arccos()
        pulls = torch.where(angles < tolerance, 0.0, share * angles / angles.sin().clamp(min=tolerance))
        step = pulls - (pulls @ along) * mean
        length = math.sqrt(max(0.0, float(step @ cosines @ step)))
        if length < tolerance:
            break
        moved = math.cos(length) * mean + math.sin(length) / length * step
        mean = _normalized(moved, cosines)
        assert mean is not None  # noqa: S101  (it is on the sphere but for rounding)
    found: list[float] = (float(lengths.mean()) * mean * inverse).tolist()
    return found


def _normalized(factors: Tensor, cosines: Tensor) -> Tensor | None:
    """Factors of a vector of length 1, None of one that has nearly none."""
    length = math.sqrt(max(0.0, float(factors @ cosines @ factors)))
    return factors / length if length > _ROUNDING else None


@register(unit="entries", prepare=_PRODUCTS)
def model_stock(task_vectors: Tensor, part: Part, products: Mapping[str, Tensor]) -> Tensor:
    """Average of the experts, drawn back to the base by the angle between them (Jang et al., 2024, arXiv 2403.19522).

    With more than two experts, the cosine is the mean over all pairs, as in mergekit. A negative one counts as zero,
    which gives the base; mergekit's result then lies beyond it. A tensor that an expert has not changed counts as
    perpendicular to those of others. A single expert is its own average.

    Args:
        task_vectors: ``(experts, *shape)`` float32.
        part: where the entries stand.
        products: inner products of base and task vectors ``(1 + experts, 1 + experts)`` float64 by tensor name.

    Returns:
        Merged task vector ``(*shape)``.
    """
    experts = len(task_vectors)
    cosine = max(0.0, mean_cosine(products[part.name][1:, 1:]))
    return scaled_mean(task_vectors, experts * cosine / (1 + (experts - 1) * cosine))


def mean_cosine(products: Tensor) -> float:
    """Mean of the cosines of all pairs, 1 if there is none.

    Args:
        products: inner products ``(vectors, vectors)`` float64.
    """
    import torch

    count = len(products)
    lengths = products.diagonal().sqrt()
    sizes = lengths[:, None] * lengths
    cosines = torch.where(sizes > 0, products / sizes, 0.0)
    return float(cosines.triu(1).sum()) / (count * (count - 1) / 2) if count > 1 else 1.0
