"""Sums of task vectors, which methods and the driver share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def weighted_sum(task_vectors: Tensor | Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Sum of ``weights[k] * task_vectors[k]``, added in the order of the experts.

    Args:
        task_vectors: ``(experts, *shape)``.
        weights: one number per expert.
    """
    total = task_vectors[0] * weights[0]
    for task_vector, weight in zip(task_vectors[1:], weights[1:], strict=True):
        total.add_(task_vector, alpha=weight)
    return total


def one_each(weights: float | list[float], experts: int) -> list[float]:
    """A weight for every expert, from one for all or a list of them."""
    return weights if isinstance(weights, list) else [weights] * experts


def scaled_mean(task_vectors: Tensor, scaling_coefficient: float) -> Tensor:
    """The mean of ``(experts, *shape)`` times the coefficient."""
    return weighted_sum(task_vectors, [scaling_coefficient / len(task_vectors)] * len(task_vectors))
