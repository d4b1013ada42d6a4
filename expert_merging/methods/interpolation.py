"""Methods that go from one model to another: between two experts, or from the base to one."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal

from expert_merging.arithmetic import weighted_sum
from expert_merging.context import Context
from expert_merging.errors import InputError
from expert_merging.flags import Share
from expert_merging.method import AT_MOST_TWO, Preparation, Prepare, register
from expert_merging.parts import Part

if TYPE_CHECKING:
    from torch import Tensor

# Up to this length a tensor has no direction, and beyond this cosine two have the same or opposite ones (mergekit's).
_SHORT = 1e-8
_COLINEAR = 0.9995
# Below this sine an arc differs from a straight line by less than float32 can tell.
_STRAIGHT = 1e-6
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


@register(unit="tensor", promises=frozenset({AT_MOST_TWO}), prepare=Prepare(prepare_ends, ()))
def nuslerp(
    task_vectors: Tensor,
    part: Part,
    base: Tensor,
    *,
    t: Share = 0.5,
    nuslerp_space: Literal["task_vectors", "weights"] = "task_vectors",
    nuslerp_along: Literal["tensor", "rows", "columns"] = "tensor",
) -> Tensor:
    """Interpolation along the arc between two task vectors, or weights, by tensor, row or column (mergekit's nuslerp).

    The way is straight only where the two have the same or opposite directions. Vectors of zeros count as perpendicular
    to every other. mergekit's task vectors are those of a merge with a base model; its ``nuslerp_row_wise`` goes along
    columns, and has no effect but with ``nuslerp_flatten: false``, which by itself goes along rows.

    Args:
        task_vectors: ``(experts, *shape)`` float32, of one expert or two.
        part: where the entries stand.
        base: the base's weights ``(*shape)``.
        t: how far to go, from the first expert (the base, where there is one expert) at 0 to the last one at 1.
        nuslerp_space: what the arc is between.
        nuslerp_along: which vectors have a direction: whole tensors, or rows or columns of matrices.

    Returns:
        Merged task vector ``(*shape)``.
    """
    import torch

    by_tensor = nuslerp_along == "tensor" or len(part.shape) < 2
    columns = max(1, base.numel() if by_tensor else part.columns)
    origin = base.reshape(base.numel() // columns, columns)
    ends = [torch.zeros_like(origin), *task_vectors.reshape(len(task_vectors), *origin.shape)]
    if nuslerp_space == "weights":
        ends = [origin + end for end in ends]
    dim = 0 if nuslerp_along == "columns" and not by_tensor else 1
    start, end = (factor.float() for factor in _arc(ends[-2].double(), ends[-1].double(), t, dim))
    merged: Tensor = (ends[-2] * start).addcmul_(ends[-1], end)
    if nuslerp_space == "weights":
        merged.sub_(origin)
    return merged.view(base.shape)


def _arc(first: Tensor, last: Tensor, t: float, dim: int) -> tuple[Tensor, Tensor]:
    """Factors on the two ends of arcs, along a dimension, that give their points at t of the way."""
    import torch

    lengths = first.norm(dim=dim, keepdim=True) * last.norm(dim=dim, keepdim=True)
    product = (first * last).sum(dim, keepdim=True)
    angle = torch.where(lengths > 0, product / lengths, 0.0).clamp(-1, 1).arccos()
    sine = angle.sin()
    is_straight = sine < _STRAIGHT
    sine = torch.where(is_straight, 1.0, sine)
    start = torch.where(is_straight, 1 - t, ((1 - t) * angle).sin() / sine)
    return start, torch.where(is_straight, t, (t * angle).sin() / sine)


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
