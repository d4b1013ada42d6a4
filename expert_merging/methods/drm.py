"""DRM: all experts in one basis of singular directions, where entries are trimmed and signs are elected as in TIES.

The horizontal variant stacks the matrices side by side, which is the vertical one of their transposes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from expert_merging.flags import Factor
from expert_merging.method import ORDER_FREE, register
from expert_merging.methods.sparse import DropRate
from expert_merging.methods.spectral import norms, singular_triples
from expert_merging.methods.thresholds import elected_signs

if TYPE_CHECKING:
    from torch import Tensor

# Singular values up to this share of the largest are left out, as in the authors' code.
_SMALLEST = 0.01


def _in_common_basis(task_vectors: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Task vectors stacked vertically and decomposed.

    Returns:
        Each expert's left directions, ``(experts, rows, rank)``, of length one; their singular values
        ``(experts, rank)``; and the right directions that all share, ``(columns, rank)``.
    """
    import torch

    experts, rows, columns = task_vectors.shape
    stacked = task_vectors.reshape(experts * rows, columns)
    left, values, right = singular_triples(stacked, 0.0)
    kept = values > _SMALLEST * values[:1]
    directions = left[:, kept].float().view(experts, rows, -1)
    lengths = directions.norm(dim=1)
    directions /= torch.where(lengths > 0, lengths, 1)[:, None]  # of an expert that has no part in a direction, zero
    return directions, lengths * values[kept].float(), right[:, kept].float()


def _trimmed(directions: Tensor, drop_rate: float) -> Tensor:
    """The directions' entries of largest magnitude, of all experts together; the others are zero."""
    entries = directions.numel()
    dropped = entries - round(entries * (1 - drop_rate))
    if not dropped:
        return directions
    threshold = directions.abs().flatten().kthvalue(dropped).values
    return directions.where(directions.abs() >= threshold, 0)


def drm_v_parts(task_vectors: Tensor, *, scaling_coefficient: float, drop_rate: float) -> Tensor:
    """What each expert adds to DRM's mean, vertically stacked: ``(experts, rows, columns)``.

    Args:
        task_vectors: ``(experts, rows, columns)`` float32.
        scaling_coefficient: factor on the merged task vector.
        drop_rate: as `drm_v` has it.
    """
    coordinates, right = _shares(task_vectors, drop_rate)
    return coordinates.mul_(scaling_coefficient) @ right.mT


def drm_h_parts(task_vectors: Tensor, *, scaling_coefficient: float, drop_rate: float) -> Tensor:
    """What each expert adds to DRM's mean, horizontally stacked: ``(experts, rows, columns)``.

    Args:
        task_vectors: ``(experts, rows, columns)`` float32.
        scaling_coefficient: factor on the merged task vector.
        drop_rate: as `drm_h` has it.
    """
    return drm_v_parts(task_vectors.mT, scaling_coefficient=scaling_coefficient, drop_rate=drop_rate).mT


def _shares(task_vectors: Tensor, drop_rate: float) -> tuple[Tensor, Tensor]:
    """Each expert's share of the merged coordinates, ``(experts, rows, rank)``, and the right directions."""
    if not norms(task_vectors).any():
        return task_vectors[:, :, :0], task_vectors[0, :0].mT
    directions, values, right = _in_common_basis(task_vectors)
    coordinates = _trimmed(directions, drop_rate) * values[:, None]
    signs = elected_signs(coordinates)
    majority = signs.sum().sign()
    agreeing = coordinates.sign() == signs.where(signs != 0, majority)
    coordinates = coordinates.where(agreeing, 0)
    return coordinates.div_((coordinates != 0).sum(0).clamp_(min=1)), right


@register(unit="matrix", promises=frozenset({ORDER_FREE}), parts=drm_v_parts)
def drm_v(task_vectors: Tensor, *, scaling_coefficient: Factor = 1.0, drop_rate: DropRate = 0.8) -> Tensor:
    """DRM-V: TIES in the right singular directions that all experts share (Chaichana et al., 2025, arXiv 2505.23117).

    The task vectors are stacked below each other and decomposed. Each expert's rows of left directions are scaled to
    length one, and its singular values by as much the other way. The largest entries of these directions are kept, over
    all experts together; times the singular values they are the expert's coordinates. Signs are elected by their sum,
    those that disagree are left out, and the others are averaged. Other tensors get the mean.

    The authors' code takes the plain average where nothing is dropped; here signs are elected then too.

    Args:
        task_vectors: ``(experts, rows, columns)`` float32.
        scaling_coefficient: factor on the merged task vector.
        drop_rate: share of the directions' entries that is left out.

    Returns:
        Merged task vector ``(rows, columns)``.
    """
    coordinates, right = _shares(task_vectors, drop_rate)
    return (coordinates.sum(0) * scaling_coefficient) @ right.mT


@register(unit="matrix", promises=frozenset({ORDER_FREE}), parts=drm_h_parts)
def drm_h(task_vectors: Tensor, *, scaling_coefficient: Factor = 1.0, drop_rate: DropRate = 0.8) -> Tensor:
    """DRM-H: TIES in the left singular directions that all experts share (Chaichana et al., 2025, arXiv 2505.23117).

    As `drm_v`, of task vectors stacked side by side.

    Args:
        task_vectors: ``(experts, rows, columns)`` float32.
        scaling_coefficient: factor on the merged task vector.
        drop_rate: share of the directions' entries that is left out.

    Returns:
        Merged task vector ``(rows, columns)``.
    """
    merged: Tensor = drm_v(task_vectors.mT, scaling_coefficient=scaling_coefficient, drop_rate=drop_rate)
    return merged.mT.contiguous()
