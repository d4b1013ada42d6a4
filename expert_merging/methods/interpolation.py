"""Methods that go from one model to another: between two experts, or from the base to one."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from expert_merging.arithmetic import weighted_sum
from expert_merging.context import Context
from expert_merging.errors import InputError
from expert_merging.flags import Share
from expert_merging.method import AT_MOST_TWO, Preparation, Prepare, register

if TYPE_CHECKING:
    from torch import Tensor

# Up to this length a tensor has no direction, and beyond this cosine two have the same or opposite ones (mergekit's).
_SHORT = 1e-8
_COLINEAR = 0.9995
# Entries of which products are summed at a time: few in a core's cache, many on a GPU.
_CACHED, _ON_GPU = 1 << 16, 1 << 22


def prepare_ends(context: Context) -> Preparation:
    """Check that there are two models to go between.

    Raises:
        InputError: there are more than two experts.
    """
    experts = list(context.plan.experts)
    if len(experts) > 2:
        raise InputError(
            f"interpolation is between two experts, or between the base and one, and there are {len(experts)} "
            f"({', '.join(experts)}); choose with --expert NAME=PATH"
        )
    return Preparation()


def _weights(t: float, experts: int) -> list[float]:
    """Factors on the task vectors; the base's own, where it is one of the two, is zero."""
    return [1 - t, t][-experts:]


@register(unit="entries", promises=frozenset({AT_MOST_TWO}), prepare=Prepare(prepare_ends, ()))
def interpolate(task_vectors: Tensor, *, t: Share = 0.5) -> Tensor:
    """The point between two experts, or between the base and one (Wu et al., 2025, arXiv 2510.10977).

    The paper studies the whole way from 0 to 1 and has no default.

    Args:
        task_vectors: ``(experts, *shape)`` float32, of one expert or two.
        t: how far to go, from the first expert (the base, where there is one expert) at 0 to the last one at 1.

    Returns:
        Merged task vector ``(*shape)``.
    """
    return weighted_sum(task_vectors, _weights(t, len(task_vectors)))


@register(unit="tensor", promises=frozenset({AT_MOST_TWO}), prepare=Prepare(prepare_ends, ()))
def slerp(task_vectors: Tensor, base: Tensor, *, t: Share = 0.5) -> Tensor:
    """Interpolation along the arc between two models' weights, tensor by tensor (mergekit, arXiv 2403.13257).

    With mergekit's conventions: the angle is between whole tensors of weights, not between task vectors; where its
    cosine is beyond 0.9995 in magnitude, as it is between most fine-tuned models, the way is straight; and a tensor of
    zeros counts as perpendicular to every other.

    Args:
        task_vectors: ``(experts, *shape)`` float32, of one expert or two.
        base: the base's weights ``(*shape)``.
        t: how far to go, from the first expert (the base, where there is one expert) at 0 to the last one at 1.

    Returns:
        Merged task vector ``(*shape)``.
    """
    experts = len(task_vectors)
    cosine = _cosine(base, task_vectors)
    if abs(cosine) > _COLINEAR:
        return weighted_sum(task_vectors, _weights(t, experts))
    angle = math.acos(cosine)
    start, end = math.sin((1 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle)
    # Both models' weights are the base's and a task vector; less the base, this leaves more or less of it than nothing.
    return weighted_sum(task_vectors, [start, end][-experts:]).add_(base, alpha=start + end - 1)


def _cosine(base: Tensor, task_vectors: Tensor) -> float:
    """Cosine between the weights of the two models, summed in float64; short ones are taken as they are."""
    import torch

    flat, rows = base.reshape(-1), task_vectors.reshape(len(task_vectors), -1)
    products = torch.zeros(2, 2, dtype=torch.float64, device=base.device)
    step = _ON_GPU if base.is_cuda else _CACHED
    for first in range(0, len(flat), step):
        block = flat[first : first + step].double()
        weights = [block, *(block + row[first : first + step] for row in rows)]
        ends = torch.stack([weights[-2], weights[-1]])
        products += ends @ ends.mT
    (first_square, product), (_, last_square) = products.tolist()
    lengths = [length if length > _SHORT else 1.0 for length in map(math.sqrt, (first_square, last_square))]
    return float(product / (lengths[0] * lengths[1]))
