"""FuseChat's two ways to merge: experts count by how much they have changed, tensor by tensor."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from expert_merging.arithmetic import scaled_mean, weighted_sum
from expert_merging.context import Context
from expert_merging.flags import Factor, Fraction
from expert_merging.method import ORDER_FREE, Preparation, Prepare, register
from expert_merging.methods.ranks import count_of, values_at
from expert_merging.methods.sparse import merge_agreeing, weigh
from expert_merging.methods.thresholds import elected_signs
from expert_merging.parts import Part

if TYPE_CHECKING:
    from torch import Tensor


@register(unit="tensor", promises=frozenset({ORDER_FREE}))
def sce(task_vectors: Tensor, *, density: Fraction = 0.1, scaling_coefficient: Factor = 1.0) -> Tensor:
    """Select where experts differ, weigh by changes there, erase minorities (Wan et al., 2024, arXiv 2408.07990).

    Experts count equally where none has changed anything, and by their changes however small these are; mergekit's
    version gives up weights where mean squares sum to less than 1e-6, which most do. As many entries more are selected
    as vary just as much as the last one.

    Args:
        task_vectors: ``(experts, *shape)`` float32.
        density: fraction of a tensor's entries that vary between experts that is selected, those that vary most; with
            one expert nothing varies, and nothing but 1 selects anything.
        scaling_coefficient: factor on the merged task vector.

    Returns:
        Merged task vector ``(*shape)``.
    """
    selected = task_vectors if density == 1 else task_vectors.mul_(most_varied(task_vectors, density))
    weights = shares_of([float(row.double().square().sum()) for row in selected])
    signs = elected_signs(selected)
    return merge_agreeing(weigh(selected, weights), signs, weights, normalize=True).mul_(scaling_coefficient)


def most_varied(task_vectors: Tensor, density: float) -> Tensor:
    """Which entries vary most between the experts, ``(*shape)`` bool: a fraction of those that vary at all."""
    mean = scaled_mean(task_vectors, 1.0)
    variances = mean.new_zeros(mean.shape)
    for row in task_vectors:
        variances.addcmul_(difference := row - mean, difference)
    kept = count_of(density, int(variances.count_nonzero()))
    if not kept:
        return variances > variances
    (least,) = values_at(variances, [variances.numel() - kept])
    return variances >= least


def shares_of(squares: list[float]) -> list[float]:
    """Each expert's share of the sum; equal shares of nothing."""
    total = sum(squares)
    return [square / total if total else 1 / len(squares) for square in squares]


def add_up_squares(context: Context) -> Preparation:
    """Sum of the squares of each expert's changes, by tensor."""

    def measure(_base: Tensor, task_vectors: Tensor, _part: Part) -> Tensor:
        return task_vectors.double().square_().sum(1)

    experts = len(context.plan.experts)
    return Preparation(lambda: {"squares": context.passes.sums(measure, (experts,), "measuring changes")})


@register(unit="entries", prepare=Prepare(add_up_squares, ("squares",)))
def varm(
    task_vectors: Tensor, part: Part, squares: Mapping[str, Tensor], *, scaling_coefficient: Factor = 1.0
) -> Tensor:
    """Mean of the experts, weighted by their squared changes in each tensor (Wan et al., 2024, arXiv 2402.16107).

    Args:
        task_vectors: ``(experts, *shape)`` float32.
        part: where the entries stand.
        squares: sum of the squares of each expert's changes, ``(experts,)`` by tensor name.
        scaling_coefficient: factor on the weighted mean.

    Returns:
        Merged task vector ``(*shape)``.
    """
    weights = shares_of(squares[part.name].tolist())
    return weighted_sum(task_vectors, [scaling_coefficient * weight for weight in weights])
