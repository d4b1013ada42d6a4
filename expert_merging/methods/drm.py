"""DRM: all experts in one basis of singular directions, where entries are trimmed and signs are elected as in TIES.

The horizontal variant stacks the matrices side by side, which is the vertical one of their transposes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from expert_merging.flags import BelowOne, Factor
from expert_merging.method import ORDER_FREE, register
from expert_merging.methods.spectral import singular_triples
from expert_merging.methods.thresholds import elected_signs, trim

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
    rank = int((values > _SMALLEST * values[:1]).sum())
    directions = left[:, :rank].float().view(experts, rows, rank)
    lengths = directions.norm(dim=1)
    directions /= torch.where(lengths > 0, lengths, 1)[:, None]  # of an expert that has no part in a direction, zero
    return directions, lengths * values[:rank].float(), right[:, :rank].float()


def _agreeing(task_vectors: Tensor, drop_rate: float) -> tuple[Tensor, Tensor, Tensor]:
    """Each expert's coordinates that are kept and have the elected sign.

    Returns:
        Their magnitudes, ``(experts, rows, rank)``; the elected signs over the number of experts that have them,
        ``(rows, rank)``; and the right directions, ``(columns, rank)``.
    """
    directions, values, right = _in_common_basis(task_vectors)
    entries = directions.numel()
    dropped = entries - round(entries * (1 - drop_rate))
    if dropped:
        threshold = directions.abs().flatten().kthvalue(dropped).values
        trim(directions, threshold.cpu().expand(len(directions)))
    coordinates = directions.mul_(values[:, None])
    signs = elected_signs(coordinates)
    signs = elected_signs(coordinates, float(signs.sum().sign()))
    agreeing = coordinates.mul_(signs).relu_()
    return agreeing, signs.div_(agreeing.sign().sum(0).clamp_(min=1)), right


def drm_v_parts(task_vectors: Tensor, *, scaling_coefficient: float, drop_rate: float) -> Tensor:
    """What each expert adds to DRM's mean, vertically stacked: ``(experts, rows, columns)``.

    Args:
        task_vectors: ``(experts, rows, columns)`` float32.
        scaling_coefficient: factor on the merged task vector.
        drop_rate: as `drm_v` has it.
    """
    agreeing, weights, right = _agreeing(task_vectors, drop_rate)
    return agreeing.mul_(weights * scaling_coefficient) @ right.mT


def drm_h_parts(task_vectors: Tensor, *, scaling_coefficient: float, drop_rate: float) -> Tensor:
    """What each expert adds to DRM's mean, horizontally stacked: ``(experts, rows, columns)``.

    Args:
        task_vectors: ``(experts, rows, columns)`` float32.
        scaling_coefficient: factor on the merged task vector.
        drop_rate: as `drm_h` has it.
    """
    return drm_v_parts(task_vectors.mT, scaling_coefficient=scaling_coefficient, drop_rate=drop_rate).mT


@register(unit="matrix", promises=frozenset({ORDER_FREE}), parts=drm_v_parts)
def drm_v(task_vectors: Tensor, *, scaling_coefficient: Factor = 1.0, drop_rate: BelowOne = 0.8) -> Tensor:
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
    agreeing, weights, right = _agreeing(task_vectors, drop_rate)
    return agreeing.sum(0).mul_(weights * scaling_coefficient) @ right.mT


@register(unit="matrix", promises=frozenset({ORDER_FREE}), parts=drm_h_parts)
def drm_h(task_vectors: Tensor, *, scaling_coefficient: Factor = 1.0, drop_rate: BelowOne = 0.8) -> Tensor:
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
