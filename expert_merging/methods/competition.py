"""PCB merging: entries of experts compete within their expert and with those of the others."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from expert_merging.arithmetic import one_each, weighted_sum
from expert_merging.context import Context
from expert_merging.flags import Factor, Fraction
from expert_merging.method import ORDER_FREE, Preparation, Prepare, register
from expert_merging.methods.ranks import find_values_at

if TYPE_CHECKING:
    from torch import Tensor

# Share of an expert's magnitudes at either end that count as the first one inside.
_CLAMPED = 1e-4
_LEAST_WEIGHT = 1e-12


def find_bounds(context: Context, *, pcb_ratio: float) -> Preparation:
    """Bounds of each expert's magnitudes, and then of its scores, over all merged parameters."""
    experts = len(context.plan.experts)

    def find() -> dict[str, Any]:
        passes = context.passes
        entries = sum(passes.sizes.values())
        if not entries:
            return dict.fromkeys(("bounds", "scores"), [[0.0, 0.0]] * experts)
        ends = [int(entries * _CLAMPED), int(entries * (1 - _CLAMPED) - 1)]
        bounds = find_values_at(passes, lambda given, _part: given.abs(), ends, experts, "finding magnitudes").tolist()
        ends = [int(entries * (1 - pcb_ratio)), entries - 1]
        scores = find_values_at(passes, lambda given, _: score(given, bounds), ends, experts, "finding scores").tolist()
        return {"bounds": bounds, "scores": scores}

    return Preparation(find)


@register(unit="entries", promises=frozenset({ORDER_FREE}), prepare=Prepare(find_bounds, ("bounds", "scores")))
def pcb(
    task_vectors: Tensor,
    bounds: list[list[float]],
    scores: list[list[float]],
    *,
    pcb_ratio: Fraction = 0.05,
    scaling_coefficient: Factor | list[Factor] = 1.2,
) -> Tensor:
    """Let entries compete within their expert and between experts (Du et al., 2024, arXiv 2410.02396).

    As in the authors' main file, whose scores and quantiles differ from those of their evolutionary variant. Its scores
    are not of one scale: the same task vectors, all times ten, are merged in other proportions. Its search for
    coefficients by accuracy is left out.

    Args:
        task_vectors: ``(experts, *shape)`` float32.
        bounds: lowest and highest magnitude that counts, by expert.
        scores: the score from which on entries are merged and the highest, by expert.
        pcb_ratio: share of each expert's entries that are merged, those of highest score.
        scaling_coefficient: factor on each task vector, one for all or a list with one per expert.

    Returns:
        Merged task vector ``(*shape)``.
    """
    del pcb_ratio  # it went into the scores
    experts = len(task_vectors)
    weights = score(task_vectors, bounds)
    for row, (low, high) in zip(weights, scores, strict=True):
        scale_between(row, low, high)
    for row, (low, high) in zip(task_vectors, bounds, strict=True):
        magnitudes = row.abs().clamp_(low, high)
        row.sign_().mul_(magnitudes)
    factors = one_each(scaling_coefficient, experts)
    total = weighted_sum(weights, [1.0] * experts).clamp_(min=_LEAST_WEIGHT)
    return weighted_sum(task_vectors.mul_(weights), factors).div_(total)


def score(task_vectors: Tensor, bounds: list[list[float]]) -> Tensor:
    """How well each entry does within its expert, times how well it agrees with all experts, ``(experts, *shape)``.

    Args:
        task_vectors: ``(experts, *shape)``; not changed.
        bounds: lowest and highest magnitude that counts, by expert.
    """
    within = task_vectors.abs()
    for row, (low, high) in zip(within, bounds, strict=True):
        scale_between(row, low, high)
    between = task_vectors * weighted_sum(task_vectors, [1.0] * len(task_vectors))
    return _in_place("exp", within.square_().mul_(len(task_vectors))).mul_(_in_place("tanh", between))


def _in_place(function: str, values: Tensor) -> Tensor:
    """A function of each value, by its name; numpy's take an eighth of the time of torch's, but on a CPU alone."""
    import numpy

    if values.is_cuda:
        return getattr(values, f"{function}_")()  # type: ignore[no-any-return]
    array = values.numpy()
    getattr(numpy, function)(array, out=array)
    return values


def scale_between(values: Tensor, low: float, high: float) -> None:
    """Clamp values to an interval and map it to [0, 1], in place; to 0 if it is a point."""
    values.clamp_(low, high).sub_(low).mul_(1 / (high - low) if high > low else 0.0)
