"""Model Breadcrumbs: of every task vector, neither the smallest entries of a tensor nor the largest."""

from __future__ import annotations

from typing import TYPE_CHECKING

from expert_merging.arithmetic import weighted_sum
from expert_merging.context import Context
from expert_merging.errors import InputError
from expert_merging.flags import Factor, Share
from expert_merging.method import ORDER_FREE, Preparation, Prepare, register
from expert_merging.methods.ranks import count_of, values_at

if TYPE_CHECKING:
    from torch import Tensor


def check_shares(_context: Context, *, breadcrumbs_beta: float, breadcrumbs_gamma: float) -> Preparation:
    """Check that entries are left.

    Raises:
        InputError: what is left out at both ends is everything.
    """
    if breadcrumbs_beta >= breadcrumbs_gamma:
        raise InputError(
            "--breadcrumbs_beta is where the entries that are kept begin, from the smallest on, and must be below "
            f"--breadcrumbs_gamma, where they end, got {breadcrumbs_beta:g} and {breadcrumbs_gamma:g}"
        )
    return Preparation()


@register(
    unit="tensor",
    promises=frozenset({ORDER_FREE}),
    prepare=Prepare(check_shares, ()),
    family_defaults=("scaling_coefficient",),
)
def breadcrumbs(
    task_vectors: Tensor,
    *,
    breadcrumbs_beta: Share = 0.85,
    breadcrumbs_gamma: Share = 0.993,
    scaling_coefficient: Factor = 0.3,
) -> Tensor:
    """Leave out the smallest and the largest changes, then task arithmetic (Davari et al., 2023, arXiv 2312.06795).

    Entries are ranked by magnitude in each tensor. Those as large as the first or the last that is kept are kept too.

    Args:
        task_vectors: ``(experts, *shape)`` float32.
        breadcrumbs_beta: share of the entries below those that are kept.
        breadcrumbs_gamma: share of the entries up to the last that is kept; the others, the largest, are left out.
        scaling_coefficient: factor on the sum of what is kept.

    Returns:
        Merged task vector ``(*shape)``.
    """
    entries = task_vectors[0].numel()
    first, last = count_of(breadcrumbs_beta, entries), count_of(breadcrumbs_gamma, entries) - 1
    for row in task_vectors:
        if first > last:  # of so few entries, none is kept
            row.zero_()
            continue
        magnitudes = row.abs()
        low, high = values_at(magnitudes, (first, last))
        row.mul_((magnitudes >= low) & (magnitudes <= high))
    return weighted_sum(task_vectors, [scaling_coefficient] * len(task_vectors))
