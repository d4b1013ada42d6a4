"""TIES, and its steps, which other methods take too."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from expert_merging.arithmetic import one_each
from expert_merging.context import Context
from expert_merging.flags import Factor, Fraction, NotNegative
from expert_merging.method import ORDER_FREE, Preparation, Prepare, register
from expert_merging.methods.thresholds import Change, elected_signs, find_thresholds, trim
from expert_merging.parts import Part
from expert_merging.streaming import Passes

if TYPE_CHECKING:
    from torch import Tensor


def merge_agreeing(weighted: Tensor, signs: Tensor, weights: Sequence[float], *, normalize: bool) -> Tensor:
    """Merge the experts whose entry has the elected sign, ``(*shape)``; zero where there is none.

    Args:
        weighted: task vectors times weights, ``(experts, *shape)``.
        signs: the elected signs, ``(*shape)``.
        weights: weight of each expert, none negative.
        normalize: divide the sum of those that agree by the sum of their weights.
    """
    import torch

    total, divisor, agreeing = signs.new_zeros(signs.shape), signs.new_zeros(signs.shape), signs.new_empty(signs.shape)
    for row, weight in zip(weighted, weights, strict=True):
        torch.mul(row, signs, out=agreeing).relu_()
        total.add_(agreeing)
        if normalize:
            divisor.add_(agreeing.sign_(), alpha=weight)
    total.mul_(signs)
    least = min((weight for weight in weights if weight), default=1.0)
    return total.div_(divisor.clamp_(min=least)) if normalize else total


def first_pass(passes: Passes, change: Change, *, density: float, ties_scope: str) -> dict[str, Any]:
    """Thresholds and majority signs by tensor name; the same for all of them in the global scope.

    Args:
        passes: passes over all task vectors.
        change: applied to task vectors first.
        density: fraction of the entries that each expert keeps.
        ties_scope: ``global`` or ``tensor``.
    """
    if ties_scope == "tensor":
        found = {name: find_thresholds(passes, change, density, name) for name in passes.sizes}
    else:
        found = dict.fromkeys(passes.sizes, find_thresholds(passes, change, density))
    return {
        "thresholds": {name: thresholds for name, (thresholds, _) in found.items()},
        "majorities": {name: majority for name, (_, majority) in found.items()},
    }


def unchanged(task_vectors: Tensor, _part: Part) -> Tensor:
    """The task vectors as they are."""
    return task_vectors


def prepare_ties(
    context: Context, *, density: float, ties_scope: str, ties_weights: float | list[float]
) -> Preparation:
    """What TIES needs of the whole model before it merges."""

    def change(task_vectors: Tensor, _part: Part) -> Tensor:
        return weigh(task_vectors, one_each(ties_weights, len(task_vectors)))

    return Preparation(lambda: first_pass(context.passes, change, density=density, ties_scope=ties_scope))


def weigh(task_vectors: Tensor, weights: Sequence[float]) -> Tensor:
    """Multiply every task vector by its weight, in place."""
    for row, weight in zip(task_vectors, weights, strict=True):
        if weight != 1:
            row.mul_(weight)
    return task_vectors


# What `first_pass` gives.
FOUND = ("thresholds", "majorities")


@register(unit="entries", promises=frozenset({ORDER_FREE}), prepare=Prepare(prepare_ties, FOUND))
def ties(
    task_vectors: Tensor,
    part: Part,
    thresholds: Mapping[str, Tensor],
    majorities: Mapping[str, float],
    *,
    density: Fraction = 0.2,
    ties_scope: Literal["global", "tensor"] = "global",
    ties_weights: NotNegative | list[NotNegative] = 1.0,
    ties_normalize: bool = True,
    scaling_coefficient: Factor = 1.0,
) -> Tensor:
    """Trim, elect signs, average what agrees (Yadav et al., 2023, arXiv 2306.01708).

    Every expert keeps its entries of largest magnitude; for each entry the sign of the kept sum is elected, and the
    experts that agree with it are averaged. Where the sum is zero, the sign that was elected most often counts.

    Args:
        task_vectors: ``(experts, *shape)`` float32.
        part: where the entries stand.
        thresholds: smallest magnitude kept, ``(experts,)`` by tensor name.
        majorities: sign for sums of zero, by tensor name.
        density: fraction of the entries that each expert keeps.
        ties_scope: whether entries are ranked over all merged parameters together (as in the paper) or in each tensor.
        ties_weights: weight of an expert in the election and in the average, one for all or a list with one per expert.
        ties_normalize: whether the sum of what agrees is divided by the sum of its experts' weights.
        scaling_coefficient: factor on the merged task vector.

    Returns:
        Merged task vector ``(*shape)``.
    """
    del density, ties_scope  # they went into the thresholds
    weights = one_each(ties_weights, len(task_vectors))
    trimmed = trim(weigh(task_vectors, weights), thresholds[part.name])
    signs = elected_signs(trimmed, majorities[part.name])
    return merge_agreeing(trimmed, signs, weights, normalize=ties_normalize).mul_(scaling_coefficient)
