"""Arcee Fusion: of one model's changes to another, those that stand out."""

from __future__ import annotations

from typing import TYPE_CHECKING

from expert_merging.method import AT_MOST_TWO, Prepare, register
from expert_merging.methods.interpolation import prepare_ends
from expert_merging.methods.ranks import values_at
from expert_merging.parts import Part

if TYPE_CHECKING:
    from torch import Tensor

# Added to probabilities, as in mergekit.
_LEAST_PROBABILITY = 1e-8
_QUARTILES = (0.25, 0.5, 0.75)


@register(unit="tensor", promises=frozenset({AT_MOST_TWO}), prepare=Prepare(prepare_ends, ()))
def arcee_fusion(task_vectors: Tensor, part: Part, base: Tensor) -> Tensor:
    """One model with the changes to another that stand out among all of a tensor (mergekit's arcee_fusion).

    Quartiles are exact, where mergekit draws a million entries of a large tensor at random.

    Args:
        task_vectors: ``(experts, *shape)`` float32, of one expert or two; changes are those from the first one (the
            base, where there is one expert) to the last one.
        part: where the entries stand.
        base: the base's weights ``(*shape)``.

    Returns:
        Merged task vector ``(*shape)``.
    """
    import torch

    if not base.numel():
        return torch.zeros_like(base)
    rows = (-1, part.columns)
    ends = [torch.zeros_like(base).view(rows), *(vector.view(rows) for vector in task_vectors)][-2:]
    change = ends[1] - ends[0]
    importance = change.abs() * divergence(base.view(rows) + ends[1], base.view(rows) + ends[0])[:, None]
    low, middle, high = values_at(importance, [int(share * (importance.numel() - 1)) for share in _QUARTILES])
    chosen = importance >= middle + 1.5 * (high - low)
    merged: Tensor = (ends[0] + change * chosen).view(base.shape)
    return merged


def divergence(weights: Tensor, others: Tensor) -> Tensor:
    """Kullback-Leibler divergence between the softmax of rows, ``(rows,)`` float32, computed in float64."""
    first, last = (rows.double().softmax(1).add_(_LEAST_PROBABILITY) for rows in (weights, others))
    found: Tensor = (first * (first / last).log_()).sum(1).float()
    return found
