"""Methods that are linear in the task vectors."""

from __future__ import annotations

from typing import TYPE_CHECKING

from expert_merging.arithmetic import scaled_mean, weighted_sum
from expert_merging.flags import Factor
from expert_merging.method import register

if TYPE_CHECKING:
    from torch import Tensor


def scaled(task_vectors: Tensor, *, scaling_coefficient: float | list[float]) -> Tensor:
    """What each expert adds to task arithmetic's sum, ``(experts, *shape)``."""
    weights = _weights(scaling_coefficient, len(task_vectors))
    return task_vectors * task_vectors.new_tensor(weights).view(-1, *[1] * (task_vectors.ndim - 1))


def scaled_share(task_vectors: Tensor, *, scaling_coefficient: float) -> Tensor:
    """What each expert adds to the average, ``(experts, *shape)``."""
    return task_vectors * (scaling_coefficient / len(task_vectors))


def _weights(scaling_coefficient: float | list[float], experts: int) -> list[float]:
    """One factor per expert."""
    return scaling_coefficient if isinstance(scaling_coefficient, list) else [scaling_coefficient] * experts


@register(unit="entries", parts=scaled_share)
def weight_average(task_vectors: Tensor, *, scaling_coefficient: Factor = 1.0) -> Tensor:
    """Average of the experts' weights (Wortsman et al., 2022, arXiv 2203.05482).

    With a coefficient s other than 1 the result is base + s * (average - base), which the published Expert Merging
    script does by default (s = 0.1); here an average is an average unless the user asks otherwise.

    Args:
        task_vectors: ``(experts, *shape)`` float32.
        scaling_coefficient: factor on the average task vector.

    Returns:
        Merged task vector ``(*shape)``.
    """
    return scaled_mean(task_vectors, scaling_coefficient)


@register(unit="entries", parts=scaled, family_defaults=("scaling_coefficient",))
def task_arithmetic(task_vectors: Tensor, *, scaling_coefficient: Factor | list[Factor] = 0.3) -> Tensor:
    """Scaled sum of the task vectors (Ilharco et al., 2023, arXiv 2212.04089).

    Args:
        task_vectors: ``(experts, *shape)`` float32.
        scaling_coefficient: factor on each task vector, one for all or a list with one per expert.

    Returns:
        Merged task vector ``(*shape)``.
    """
    return weighted_sum(task_vectors, _weights(scaling_coefficient, len(task_vectors)))
