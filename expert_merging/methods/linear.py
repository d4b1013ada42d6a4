"""Methods that are linear in the task vectors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from expert_merging.registry import register

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


@register(elementwise=True)
def weight_average(task_vectors: Tensor, *, scaling_coefficient: float = 1.0) -> Tensor:
    """Average of the experts' weights (Wortsman et al., 2022, arXiv 2203.05482).

    With a coefficient s other than 1 the result is base + s * (average - base), which the published Expert Merging
    script does by default (s = 0.1); here an average is an average unless the user asks otherwise.

    Args:
        task_vectors: ``(experts, *shape)`` float32.
        scaling_coefficient: factor on the average task vector.

    Returns:
        Merged task vector ``(*shape)``.
    """
    experts = len(task_vectors)
    return weighted_sum(task_vectors, [scaling_coefficient / experts] * experts)


@register(elementwise=True, family_defaults=("scaling_coefficient",))
def task_arithmetic(task_vectors: Tensor, *, scaling_coefficient: float | list[float] = 0.3) -> Tensor:
    """Scaled sum of the task vectors (Ilharco et al., 2023, arXiv 2212.04089).

    Args:
        task_vectors: ``(experts, *shape)`` float32.
        scaling_coefficient: factor on each task vector, one for all or a list with one per expert.

    Returns:
        Merged task vector ``(*shape)``.
    """
    experts = len(task_vectors)
    weights = scaling_coefficient if isinstance(scaling_coefficient, list) else [scaling_coefficient] * experts
    return weighted_sum(task_vectors, weights)
