"""DOGE: task arithmetic with a change that all experts share, which is found by projected gradient descent.

With D the change, L the sum of the experts' coefficients and S the weighted sum of the task vectors, what an expert
misses in a row is its row's inner product with ``own - S - L * D``. That is linear in D, so its squares can be made as
small as can be by conjugate gradients, whose steps cost no more than Adam's.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from expert_merging.arithmetic import weighted_sum
from expert_merging.context import Context
from expert_merging.flags import Count, Factor, Fraction, Positive
from expert_merging.method import ORDER_FREE, Preparation, Prepare, register
from expert_merging.methods.sparse import unchanged
from expert_merging.methods.spectral import norms, rounding_floor, singular_triples
from expert_merging.methods.thresholds import find_thresholds

if TYPE_CHECKING:
    from torch import Tensor

# Directions of several experts that differ by less are one: float32 does not tell them apart.
_PARALLEL = 1e-5
# Conjugate gradients end when the gradient is this much smaller than at the start; float32 has no more digits.
_SMALLEST_GRADIENT = 1e-6
_MOST_STEPS = 300


@dataclass(frozen=True)
class _Misses:
    """What experts miss in each row, as a linear function of a change outside of the directions that all share.

    Args:
        rows: the experts' rows, ``(rows, experts, columns)``.
        protected: orthonormal directions, ``(rows, protected)``, that the change leaves alone.
        total: sum of the coefficients.
    """

    rows: Tensor
    protected: Tensor
    total: float

    def of(self, change: Tensor) -> Tensor:
        """What a change ``(rows, columns)`` gives the experts, ``(rows, experts)``."""
        return (self.rows @ change[:, :, None]).squeeze(2) * self.total

    def back(self, weights: Tensor) -> Tensor:
        """The transposed map: from ``(rows, experts)`` to a change ``(rows, columns)``."""
        change = (weights[:, None] @ self.rows).squeeze(1) * self.total
        return change.addmm_(self.protected, self.protected.mT @ change, alpha=-1)


def _adam(misses: _Misses, missing: Tensor, steps: int, step_size: float) -> Tensor:
    """The change after some steps of Adam (betas 0.9 and 0.999, epsilon 1e-8) along projected gradients."""
    first, second = 0.9, 0.999
    change = missing.new_zeros(misses.rows.shape[0], misses.rows.shape[2])
    average, square = change.clone(), change.clone()
    for step in range(1, steps + 1):
        gradient = misses.back(misses.of(change).sub_(missing).mul_(2))
        average.lerp_(gradient, 1 - first)
        square.mul_(second).addcmul_(gradient, gradient, value=1 - second)
        scale = square.sqrt().div_(math.sqrt(1 - second**step)).add_(1e-8)
        change.addcdiv_(average, scale, value=-step_size / (1 - first**step))
    return change


def _least_squares(misses: _Misses, missing: Tensor) -> Tensor:
    """The shortest change after which as little as possible is missing, by conjugate gradients."""
    residual = missing.clone()
    gradient = misses.back(residual)
    direction, change = gradient.clone(), gradient * 0
    square = start = float(gradient.double().square().sum())
    for _ in range(_MOST_STEPS):
        if square <= start * _SMALLEST_GRADIENT**2:
            break
        moved = misses.of(direction)
        step = square / float(moved.double().square().sum())
        change.add_(direction, alpha=step)
        residual.sub_(moved, alpha=step)
        gradient = misses.back(residual)
        before, square = square, float(gradient.double().square().sum())
        direction.mul_(square / before).add_(gradient)
    return change


def _protected(task_vectors: Tensor, experts: int, divisor: int) -> Tensor:
    """The leading left directions of all experts' leading ones, ``(rows, so many)`` float32.

    Args:
        task_vectors: those that are not zero.
        experts: how many there are, with those that are.
        divisor: of the shorter side, for the number of directions.
    """
    import torch

    side = min(task_vectors.shape[1:])
    lefts = [singular_triples(own, rounding_floor(own[None]), side // experts, single=True)[0] for own in task_vectors]
    together = torch.cat(lefts, 1)
    if not together.shape[1]:
        return together
    return singular_triples(together, _PARALLEL, side // divisor, single=True)[0]


def find_masks(context: Context, *, density: float) -> Preparation:
    """The smallest magnitude that each expert keeps, over all merged parameters."""
    return Preparation(lambda: {"thresholds": find_thresholds(context.passes, unchanged, density)[0]})


@register(unit="matrix", promises=frozenset({ORDER_FREE}), prepare=Prepare(find_masks, ("thresholds",)))
def doge_ta(
    task_vectors: Tensor,
    thresholds: Tensor,
    *,
    scaling_coefficient: Factor = 1.0,
    doge_eta: Positive = 0.07,
    density: Fraction = 0.3,
    doge_subspace: Count = 6,
    solver: Literal["adam", "exact"] = "adam",
    steps: Count = 400,
    step_size: Positive = 1e-4,
) -> Tensor:
    """DOGE TA: task arithmetic and a change that all experts share (Wei et al., 2025, arXiv 2501.01230).

    An expert's coefficient is ``doge_eta / norm(task_vector)``, matrix by matrix. The change starts at zero and lowers
    the squares of the inner products, row by row, of each task vector and what it loses in the weighted sum. Gradients
    lose what they have along the leading left directions of all experts. Each expert then adds the entries where it is
    large itself, its own and the change's, times its coefficient.

    Adam moves an entry by about steps * step_size at most, in weights. The exact solver gives the shortest change that
    loses least, within the directions that gradients have, and is several times as fast. Other tensors get the
    mean, where the authors' code keeps the base. Task vectors that are zero are left out, which it divides by.

    Args:
        task_vectors: ``(experts, rows, columns)`` float32.
        thresholds: smallest magnitude kept, ``(experts,)``.
        scaling_coefficient: factor on the merged task vector.
        doge_eta: norm that every expert's matrix is scaled to.
        density: fraction of the entries that each expert keeps, over all merged parameters.
        doge_subspace: a matrix's shorter side over this is the number of left directions that gradients lose.
        solver: adam, or exact for the shortest change that loses least.
        steps: number of Adam's steps.
        step_size: Adam's learning rate.

    Returns:
        Merged task vector ``(rows, columns)``.
    """
    import torch

    del density  # it went into the thresholds
    sizes = norms(task_vectors)
    present = [number for number, size in enumerate(sizes.tolist()) if size]
    if not present:
        return task_vectors[0].clone()
    given = task_vectors[present]
    weights = [doge_eta / size for size in sizes[present].tolist()]
    rows = given.transpose(0, 1).contiguous()
    misses = _Misses(rows, _protected(given, len(task_vectors), doge_subspace), sum(weights))
    kept = weighted_sum(given, weights)
    missing = rows.square().sum(2) - (rows @ kept[:, :, None]).squeeze(2)
    change = _least_squares(misses, missing) if solver == "exact" else _adam(misses, missing, steps, step_size)
    merged = torch.zeros_like(change)
    for own, weight, threshold in zip(given, weights, thresholds[present].tolist(), strict=True):
        merged.add_((own + change) * (own.abs() >= threshold), alpha=weight * scaling_coefficient)
    return merged
