"""RobustMerge: both factors of adapters are merged by themselves, in proportions that the pruned ones have lost."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from expert_merging.context import Context
from expert_merging.flags import BelowOne, Factor, Fraction
from expert_merging.low_rank.changes import Changes
from expert_merging.low_rank.factors import Factors
from expert_merging.low_rank.options import LowRankOptions
from expert_merging.low_rank.registering import MergeFactors, register_on_factors

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class RobustOptions(LowRankOptions):
    """Options of RobustMerge.

    Args:
        density: share of each factor's entries, the largest, that is kept.
        scaled_share: share of an adapter's directions, those that pruning has taken most of, that count for more than
            the others.
        fuse_weight: factor on each of the two merged factors.
    """

    density: Fraction = 0.2
    scaled_share: BelowOne = 0.2
    fuse_weight: Factor = 2.0


def pruned(factor: Tensor, density: float) -> Tensor:
    """A factor without its smallest entries; those like the last one that is left out stay.

    Args:
        factor: ``(rows, columns)``.
        density: share of the entries that is kept.
    """
    from expert_merging.methods.ranks import count_of

    dropped = count_of(round(1 - density, 9), factor.numel())
    if not dropped:
        return factor
    return factor * (factor.abs() >= factor.abs().flatten().kthvalue(dropped).values)


def lost_scale(right: Tensor, kept: Tensor, scaled_share: float) -> Tensor:
    """By how much pruning has made each direction of a right factor smaller, ``(rank,)``.

    Args:
        right: ``(rank, columns)``.
        kept: what pruning has left of it.
        scaled_share: share of the directions that have a scale of their own; all others have the smallest of these.
    """
    import torch

    from expert_merging.methods.ranks import count_of

    before, after = right.abs().sum(1), kept.abs().sum(1)
    found = before / after
    if (lost := after == 0).any():  # nothing is left: as much as what has lost most
        found[lost] = found[~lost].max() if not lost.all() else 1
    place = min(count_of(round(1 - scaled_share, 9), len(found)), len(found) - 1)
    lowest = found.sort().values[place]
    return torch.maximum(found, lowest)


def robust_factors(
    changes: Mapping[str, Factors], *, density: float, scaled_share: float, fuse_weight: float
) -> Factors:
    """The merged factors of a matrix.

    Args:
        changes: of one rank, each with the factor that is fed the inputs on the right.
        density: as `robustmerge` has it.
        scaled_share: as `robustmerge` has it.
        fuse_weight: as `robustmerge` has it.
    """
    import torch

    rights = [pruned(change.right, density) for change in changes.values()]
    lefts = torch.stack([pruned(change.left, density) for change in changes.values()])
    pairs = zip(changes.values(), rights, strict=True)
    scales = torch.stack([lost_scale(change.right, kept, scaled_share) for change, kept in pairs])
    left = (lefts * scales[:, None]).sum(0) / scales.sum(0)
    return Factors(fuse_weight * left, fuse_weight * torch.stack(rights).sum(0))


@register_on_factors(options=RobustOptions, rank=Changes.common_rank)
def robustmerge(
    context: Context, changes: Changes, *, density: float, scaled_share: float, fuse_weight: float
) -> Callable[[], MergeFactors]:
    """RobustMerge: factors pruned, rescaled by direction, and merged apart (Zeng et al., 2025, arXiv 2502.17159).

    Of each factor of each adapter, the entries of largest magnitude are kept. A direction of a right factor (lora_A)
    that has lost much in this counts for more in the mean of the left factors (lora_B). The right ones are summed. The
    result is an adapter of the same rank, in which left factors of one expert meet right factors of another.

    The authors' code divides by zero where pruning leaves nothing of a direction; here it counts as much as the one of
    the adapter that has lost most.
    """
    del context
    changes.check_equal_ranks("robustmerge")
    options = {"density": density, "scaled_share": scaled_share, "fuse_weight": fuse_weight}

    def merge(name: str, found: Mapping[str, Factors]) -> Factors:
        if not changes.is_turned(name):
            return robust_factors(found, **options)
        return robust_factors({expert: own.turned for expert, own in found.items()}, **options).turned

    return lambda: merge
