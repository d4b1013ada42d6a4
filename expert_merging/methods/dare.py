"""DARE: entries are dropped at random, and the others made larger."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal

from expert_merging.arithmetic import one_each, weighted_sum
from expert_merging.context import Context
from expert_merging.flags import BelowOne, Factor, Fraction
from expert_merging.method import Preparation, Prepare, register
from expert_merging.methods.drawing import drop
from expert_merging.methods.sparse import FOUND, first_pass, ties, weigh
from expert_merging.parts import Part
from expert_merging.streaming import Passes

if TYPE_CHECKING:
    from torch import Tensor

Rescale = Literal["probability", "l1"]


def drop_and_rescale(
    task_vectors: Tensor,
    part: Part,
    seed: int,
    experts: tuple[str, ...],
    factors: Mapping[str, list[float]],
    drop_rate: float,
) -> Tensor:
    """Drop entries and multiply the others, in place.

    A common factor is left to the methods: it changes neither order nor signs.

    Args:
        task_vectors: ``(experts, *shape)``.
        part: where the entries stand.
        seed: seed of the run.
        experts: names of the experts.
        factors: by tensor name and expert; nothing where all are the same.
        drop_rate: probability with which an entry is dropped.
    """
    dropped = drop(task_vectors, part, seed, experts, drop_rate)
    return weigh(dropped, factors[part.name]) if factors else dropped


def find_factors(passes: Passes, seed: int, drop_rate: float) -> dict[str, list[float]]:
    """What makes up for the L1 norm that is dropped, by tensor name and expert."""
    experts = passes.expert_names

    def measure(_base: Tensor, task_vectors: Tensor, part: Part) -> Tensor:
        import torch

        before = task_vectors.abs().double().sum(1)
        return torch.stack([before, drop(task_vectors, part, seed, experts, drop_rate).abs_().double().sum(1)])

    norms = passes.sums(measure, (2, len(experts)), "measuring what is kept")
    return {
        name: [before / after if after else 1.0 for before, after in found.T.tolist()] for name, found in norms.items()
    }


def prepare_dare(context: Context, *, drop_rate: float, dare_rescale: str) -> Preparation:
    """What is multiplied by more than the same number everywhere."""
    if dare_rescale == "probability":
        return Preparation(lambda: {"factors": {}})
    return Preparation(lambda: {"factors": find_factors(context.passes, context.seed, drop_rate)})


@register(
    unit="entries",
    promises=frozenset(),
    prepare=Prepare(prepare_dare, ("factors",)),
    family_defaults=("scaling_coefficient",),
)
def dare_ta(
    task_vectors: Tensor,
    part: Part,
    seed: int,
    experts: tuple[str, ...],
    factors: Mapping[str, list[float]],
    *,
    drop_rate: BelowOne = 0.2,
    dare_rescale: Rescale = "probability",
    scaling_coefficient: Factor | list[Factor] = 0.3,
) -> Tensor:
    """Drop entries at random, rescale the rest, then task arithmetic (Yu et al., 2024, arXiv 2311.03099).

    Args:
        task_vectors: ``(experts, *shape)`` float32.
        part: where the entries stand.
        seed: seed of the run.
        experts: names of the experts.
        factors: what the entries that are kept are multiplied by, by tensor name and expert, if that differs.
        drop_rate: probability with which an entry of a task vector is dropped.
        dare_rescale: what makes up for dropped entries; ``probability`` divides by the share that is kept, and ``l1``,
            as in mergekit, gives each tensor of an expert the L1 norm that it had.
        scaling_coefficient: factor on each task vector, one for all or a list with one per expert.

    Returns:
        Merged task vector ``(*shape)``.
    """
    dropped = drop_and_rescale(task_vectors, part, seed, experts, factors, drop_rate)
    kept = _share_kept(dare_rescale, drop_rate)
    return weighted_sum(dropped, [weight / kept for weight in one_each(scaling_coefficient, len(experts))])


def _share_kept(dare_rescale: str, drop_rate: float) -> float:
    """By what the result is still to be divided."""
    return 1 - drop_rate if dare_rescale == "probability" else 1.0


def prepare_dare_ties(
    context: Context, *, density: float, ties_scope: str, drop_rate: float, dare_rescale: str
) -> Preparation:
    """What TIES needs of the whole model whose entries were dropped."""
    experts = tuple(context.plan.experts)

    def run() -> dict[str, object]:
        factors = {} if dare_rescale == "probability" else find_factors(context.passes, context.seed, drop_rate)

        def change(task_vectors: Tensor, part: Part) -> Tensor:
            return drop_and_rescale(task_vectors, part, context.seed, experts, factors, drop_rate)

        return {"factors": factors, **first_pass(context.passes, change, density=density, ties_scope=ties_scope)}

    return Preparation(run)


@register(unit="entries", promises=frozenset(), prepare=Prepare(prepare_dare_ties, ("factors", *FOUND)))
def dare_ties(
    task_vectors: Tensor,
    part: Part,
    seed: int,
    experts: tuple[str, ...],
    factors: Mapping[str, list[float]],
    thresholds: Mapping[str, Tensor],
    majorities: Mapping[str, float],
    *,
    drop_rate: BelowOne = 0.2,
    dare_rescale: Rescale = "probability",
    density: Fraction = 0.2,
    ties_scope: Literal["global", "tensor"] = "global",
    scaling_coefficient: Factor = 1.0,
) -> Tensor:
    """Drop entries at random, rescale the rest, then TIES (Yu et al., 2024, arXiv 2311.03099).

    Args:
        task_vectors: ``(experts, *shape)`` float32.
        part: where the entries stand.
        seed: seed of the run.
        experts: names of the experts.
        factors: what the entries that are kept are multiplied by, by tensor name and expert, if that differs.
        thresholds: smallest magnitude kept, ``(experts,)`` by tensor name.
        majorities: sign for sums of zero, by tensor name.
        drop_rate: probability with which an entry of a task vector is dropped.
        dare_rescale: what makes up for dropped entries; ``probability`` divides by the share that is kept, and ``l1``,
            as in mergekit, gives each tensor of an expert the L1 norm that it had.
        density: fraction of the entries that each expert keeps.
        ties_scope: whether entries are ranked over all merged parameters together (as in the paper) or in each tensor.
        scaling_coefficient: factor on the merged task vector.

    Returns:
        Merged task vector ``(*shape)``.
    """
    dropped = drop_and_rescale(task_vectors, part, seed, experts, factors, drop_rate)
    factor = scaling_coefficient / _share_kept(dare_rescale, drop_rate)
    options = {"density": density, "ties_scope": ties_scope, "scaling_coefficient": factor}
    return ties(dropped, part, thresholds, majorities, **options)  # type: ignore[no-any-return]
