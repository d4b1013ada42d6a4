"""LoRE-Merging: what the experts have in common, and a change of low rank for each, estimated without the base."""

from __future__ import annotations

from typing import TYPE_CHECKING

from expert_merging.flags import Count, Factor, Positive
from expert_merging.method import register
from expert_merging.methods.spectral import ROUNDING, norms, rounding_floor, singular_triples

if TYPE_CHECKING:
    from torch import Tensor


def estimate(experts: Tensor, penalty: float, steps: int) -> tuple[Tensor, Tensor]:
    """The common part C and changes D that lower ``sum_k norm(C + D_k - expert_k)**2 + penalty * nuclear_norm(D_k)``.

    One after the other is set to its optimum, given the others. Nothing more happens once no change moves.

    Args:
        experts: ``(experts, rows, columns)``, of weights or of task vectors, which differ by the base alone.
        penalty: factor on the sum of the singular values.
        steps: how often each is set.

    Returns:
        ``(rows, columns)`` and ``(experts, rows, columns)``.
    """
    import torch

    changes = torch.zeros_like(experts)
    common = experts.mean(0)
    smallest = ROUNDING * float(norms(experts).max())
    for _ in range(steps):
        moved = 0.0
        for change, expert in zip(changes, experts, strict=True):
            shrunk = _shrunk(expert - common, penalty / 2)
            moved = max(moved, float((shrunk - change).norm()))
            change.copy_(shrunk)
        common = (experts - changes).mean(0)
        if moved <= smallest:
            break
    return common, changes


def _shrunk(matrix: Tensor, amount: float) -> Tensor:
    """The matrix with that much taken off its singular values, at most all: the optimum of one change."""
    left, values, right = singular_triples(matrix, max(amount, rounding_floor(matrix[None])), single=True)
    return (left * (values - amount)) @ right.mT


@register(unit="matrix")
def lore(
    task_vectors: Tensor,
    *,
    scaling_coefficient: Factor = 1.0,
    lore_penalty: Positive = 0.01,
    lore_weight: Factor = 1.0,
    steps: Count = 20,
) -> Tensor:
    """LoRE-Merging: common weights and a change of low rank for each expert (Liu et al., 2025, arXiv 2502.10749).

    Weights in common C and changes D lower ``sum_k norm(C + D_k - expert_k)**2 + lore_penalty * nuclear_norm(D_k)``.
    The result is C and the changes' weighted sum. The base has no say in it: it cancels, and only tensors that are not
    merged come from it. Other tensors get the mean of the experts.

    A change's singular values lose half of the penalty at a time, which is the optimum, and with which the function
    falls at every step. The penalty is in units of weights: the result does not scale with the task vectors.

    Args:
        task_vectors: ``(experts, rows, columns)`` float32.
        scaling_coefficient: factor on the merged task vector.
        lore_penalty: factor on the sum of the changes' singular values.
        lore_weight: factor on the sum of the changes.
        steps: how often common weights and changes are estimated.

    Returns:
        Merged task vector ``(rows, columns)``.
    """
    common, changes = estimate(task_vectors, lore_penalty, steps)
    return common.add_(changes.sum(0), alpha=lore_weight).mul_(scaling_coefficient)
