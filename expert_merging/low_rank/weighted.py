"""peft's own ways to combine adapters, `add_weighted_adapter`."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from expert_merging.arithmetic import one_each
from expert_merging.context import Context
from expert_merging.flags import Factor, Fraction
from expert_merging.low_rank.changes import Changes
from expert_merging.low_rank.factors import Factors
from expert_merging.low_rank.options import LowRankOptions
from expert_merging.low_rank.registering import MergeFactors, register_on_factors
from expert_merging.parts import Part

if TYPE_CHECKING:
    from torch import Tensor

Combination = Literal["linear", "cat", "svd", "ties", "dare_linear", "dare_ties", "magnitude_prune"]
Majority = Literal["total", "frequency"]


@dataclass(frozen=True, kw_only=True)
class WeightedOptions(LowRankOptions):
    """Options of peft's ways.

    Args:
        combination_type: cat is the exact weighted sum, whose rank is that of all adapters together, and svd the same
            cut to the largest rank of an adapter; the others merge the two factors apart, as sums (linear), by TIES,
            after dropping entries at random (dare_linear, dare_ties) or the smallest ones (magnitude_prune).
        adapter_weights: weight of each adapter, one for all or a list with one per expert.
        density: share of each factor's entries that is kept, where some are left out.
        majority_sign_method: whether TIES elects signs by the sum of the values (total) or by their number (frequency).
    """

    combination_type: Combination = "cat"
    adapter_weights: Factor | list[Factor] = 1.0
    density: Fraction = 0.2
    majority_sign_method: Majority = "total"


def largest(factors: Tensor, density: float) -> Tensor:
    """Each expert's entries of largest magnitude, ``(experts, rows, columns)``, the others zero."""
    import torch

    from expert_merging.methods.ranks import count_of

    rows = factors.flatten(1)
    places = rows.abs().topk(count_of(density, rows.shape[1])).indices
    return torch.zeros_like(rows).scatter(1, places, rows.gather(1, places)).view_as(factors)


def agreeing(factors: Tensor, weights: Tensor, majority_sign_method: Majority) -> Tensor:
    """Weighted mean of the entries with the elected sign, which is plus for a sum of zero.

    Args:
        factors: ``(experts, rows, columns)``, which elect unweighted.
        weights: ``(experts, 1, 1)``; the mean is over the number of entries.
        majority_sign_method: as `WeightedOptions` has it.
    """
    import torch

    voted = factors if majority_sign_method == "total" else factors.sign()
    agree = factors.sign() == torch.where(voted.sum(0) >= 0, 1, -1)
    return (factors * weights * agree).sum(0) / agree.sum(0).clamp(min=1)


@dataclass(frozen=True)
class Combiner:
    """Merges one factor of all adapters.

    Args:
        context: the run.
        combination_type: as `WeightedOptions` has it.
        density: as `WeightedOptions` has it.
        majority_sign_method: as `WeightedOptions` has it.
    """

    context: Context
    combination_type: str
    density: float
    majority_sign_method: Majority

    def merge(self, factors: Mapping[str, Tensor], weights: list[float], name: str) -> Tensor:
        """The merged factor.

        Args:
            factors: by expert.
            weights: of the experts.
            name: names the factor, for what is drawn.
        """
        import torch

        stacked, kind = torch.stack([*factors.values()]), self.combination_type
        if kind in ("ties", "magnitude_prune"):
            stacked = largest(stacked, self.density)
        elif kind.startswith("dare"):
            stacked = self._at_random(stacked, (*factors,), name)
        given = stacked.new_tensor(weights)[:, None, None]
        is_ties = kind.endswith("ties")
        return agreeing(stacked, given, self.majority_sign_method) if is_ties else (stacked * given).sum(0)

    def _at_random(self, stacked: Tensor, experts: tuple[str, ...], name: str) -> Tensor:
        from expert_merging.methods.drawing import drop

        part = Part.whole(name, tuple(stacked.shape[1:]))
        return drop(stacked, part, self.context.seed, experts, 1 - self.density) / self.density


def _rank(changes: Changes, name: str, *, combination_type: str, **_options: Any) -> int:
    if combination_type == "cat":
        return sum(changes.ranks(name))
    bound = changes.largest_rank(name)
    return min(bound, changes.most) if combination_type == "svd" else max(changes.ranks(name))


@register_on_factors(options=WeightedOptions, rank=_rank)
def weighted_adapter(
    context: Context,
    changes: Changes,
    *,
    combination_type: str,
    adapter_weights: float | list[float],
    density: float,
    majority_sign_method: Majority,
) -> Callable[[], MergeFactors]:
    """Peft's add_weighted_adapter: adapters combined by weights, as a sum or factor by factor.

    Of the weight times the adapter's scale, each factor gets the square root, and the sign goes with the right one
    (lora_A). Factors that are merged apart meet those of other adapters in the product, so that even linear is no sum
    of the changes: cat is. peft's other ways, which end in _svd, merge whole matrices first: take the method of that
    name (ties, dare_ta, dare_ties).

    As in peft, one adapter alone is always combined by linear, and only cat and svd take adapters of several ranks.
    What DARE drops is decided by seed, expert and tensor, and not by torch's generator.
    """
    weights = dict(zip(context.plan.experts, one_each(adapter_weights, len(context.plan.experts)), strict=True))
    kind = "linear" if len(weights) == 1 else combination_type
    if kind not in ("cat", "svd"):
        changes.check_equal_ranks(f"--combination_type {kind}")
    combiner = Combiner(context, kind, density, majority_sign_method)

    def merge(name: str, found: Mapping[str, Factors]) -> Factors:
        if kind in ("cat", "svd"):
            together = Factors.sum_of([own.scaled(weights[expert]) for expert, own in found.items()])
            return together.cut(changes.most) if kind == "svd" else together
        scales = {expert: changes.products[name][expert].scale for expert in found}
        both = [weights[expert] * scales[expert] for expert in found]
        roots = [math.sqrt(abs(one)) for one in both]
        signed = [math.copysign(root, one) for root, one in zip(roots, both, strict=True)]
        turned = changes.is_turned(name)
        plain = {expert: own.scaled(1 / (scales[expert] or 1)) for expert, own in found.items()}
        straight = {expert: own.turned if turned else own for expert, own in plain.items()}
        merged = Factors(
            combiner.merge({expert: own.left for expert, own in straight.items()}, roots, f"{name} lora_B"),
            combiner.merge({expert: own.right for expert, own in straight.items()}, signed, f"{name} lora_A"),
        )
        return merged.turned if turned else merged

    return lambda: merge
