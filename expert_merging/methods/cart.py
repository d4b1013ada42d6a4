"""CART: task vectors around the average, of low rank."""

from __future__ import annotations

import math
from decimal import Decimal
from typing import TYPE_CHECKING

from expert_merging.arithmetic import scaled_mean
from expert_merging.flags import Factor, Fraction
from expert_merging.method import ORDER_FREE, register
from expert_merging.methods.spectral import rounding_floor, singular_triples

if TYPE_CHECKING:
    from torch import Tensor


@register(unit="matrix", promises=frozenset({ORDER_FREE}))
def cart(
    task_vectors: Tensor,
    *,
    cart_rank_ratio: Fraction = 0.08,
    cart_coefficient: Factor = 1.0,
    scaling_coefficient: Factor = 1.0,
) -> Tensor:
    """CART: the average and, of low rank, what each expert differs from it (Choi et al., 2024, arXiv 2412.12153).

    What experts differ from their average sums to zero. Of each difference, the strongest singular directions are kept,
    and these are added to the average. Other tensors than matrices get the mean.

    The authors find about 8 % of the directions best, and choose the coefficient on validation data. Core Space's code
    has 4 % and 0.1. Directions whose singular values are mere rounding are left out.

    Args:
        task_vectors: ``(experts, rows, columns)`` float32.
        cart_rank_ratio: share of a matrix's singular directions, rounded up, that is kept of each difference.
        cart_coefficient: factor on the differences.
        scaling_coefficient: factor on the merged task vector.

    Returns:
        Merged task vector ``(rows, columns)``.
    """
    mean = scaled_mean(task_vectors, 1.0)
    merged = mean.clone()
    rank = math.ceil(Decimal(str(cart_rank_ratio)) * min(mean.shape))
    floor = rounding_floor(task_vectors)
    for task_vector in task_vectors:
        left, values, right = singular_triples(task_vector - mean, floor, rank, single=True)
        merged += ((left * (values * cart_coefficient)) @ right.mT).float()
    return merged.mul_(scaling_coefficient)
