"""Methods that find the matrix which interferes least with what every expert reads from its inputs.

All of them look for the merged task vector M that keeps ``sum_k norm((M - target_k) @ projection_k.T)**2`` small.
That is a quadratic function of M, so a sum over the experts made once holds all of it (`Interference`): a step of an
optimizer costs one matrix product whatever the number of experts, and steps that are linear in the gradient (gradient
flow, momentum, the optimum itself) need no steps at all, only a function of the eigenvalues of one symmetric matrix.

M is written as start + change and only the change is computed. So a task vector that is alone comes back exactly, and
nothing small is the difference of large numbers. Task vectors that are zero have no say and are skipped (the
published scripts divide by zero). Other tensors than matrices get the mean of the task vectors.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from expert_merging.flags import Count, Factor, Fraction, Positive
from expert_merging.method import register
from expert_merging.methods.spectral import (
    ROUNDING,
    exact_sum,
    expert_rank,
    norms,
    singular_triples,
)

if TYPE_CHECKING:
    from torch import Tensor

# Rows do not depend on each other. The optimizer works on so many of them together that its numbers stay in a core's
# cache, but on enough for an efficient product.
_BLOCK_ENTRIES = 1 << 18
_BLOCK_ROWS = 512

Start = Literal["sum", "mean", "zero"]
RankRule = Literal["participation_sqrt", "participation", "stable_rank", "entropy", "cumulative", "gavish_donoho"]
Filter = Callable[["Tensor"], "Tensor"]


@dataclass(frozen=True)
class Interference:
    """The quadratic function around a start; half its gradient is ``change @ projections.T @ projections + slope``.

    With ``projections`` the projections of all experts below each other, ``(height, columns)``, it is kept in the
    smaller of two forms: if they are higher than wide as ``curvature = projections.T @ projections`` and ``slope``
    ``(rows, columns)``; otherwise as ``curvature = projections @ projections.T`` and ``slope`` ``(rows, height)``,
    which is to be multiplied by ``projections``.

    Args:
        curvature: symmetric, ``(side, side)``.
        slope: half the gradient at the start, ``(rows, side)``.
        projections: ``(side, columns)`` in the second form, otherwise None.
    """

    curvature: Tensor
    slope: Tensor
    projections: Tensor | None = None

    def filtered(self, response: Callable[[Tensor], Tensor]) -> Tensor:
        """The change ``-slope @ response(projections.T @ projections)``.

        Args:
            response: of eigenvalues ``(side,)`` in descending order; where the eigenvalue is zero it is of no effect,
                because the slope has no part there.
        """
        import torch

        eigenvalues, directions = torch.linalg.eigh(self.curvature)
        eigenvalues, directions = eigenvalues.flip(0).clamp_(min=0), directions.flip(1)
        change: Tensor = (self.slope @ directions).mul_(response(eigenvalues)) @ directions.mT
        if self.projections is not None:
            change = change @ self.projections
        return change.neg_()


def interference(
    start: Tensor, experts: Iterator[tuple[Tensor, Tensor]], height: int, *, for_steps: bool = False
) -> Interference:
    """Sum the experts' quadratic functions around a start.

    Args:
        start: ``(rows, columns)``; its dtype is that of the computation.
        experts: target ``(rows, columns)`` and projection ``(its height, columns)`` of each.
        height: of all projections together.
        for_steps: the gradient will be computed many times, so that the second form is worth it only if its two
            products are less work than one with the full curvature.
    """
    import torch

    columns = start.shape[1]
    if height * (2 if for_steps else 1) < columns:
        pairs = list(experts)
        slope = torch.cat([(start - target) @ projection.mT for target, projection in pairs], 1)
        projections = torch.cat([projection for _, projection in pairs])
        return Interference(projections @ projections.mT, slope, projections)
    curvature = start.new_zeros(columns, columns)
    slope = torch.zeros_like(start)
    for target, projection in experts:
        if 2 * len(projection) < columns:
            curvature.addmm_(projection.mT, projection)
            slope.addmm_((start - target) @ projection.mT, projection)
        else:
            square = projection.mT @ projection
            curvature += square
            slope.addmm_(start - target, square)
    return Interference(curvature, slope)


def adam(problem: Interference, steps: int, step_size: float) -> Tensor:
    """The change after some steps of Adam (betas 0.9 and 0.999, epsilon 1e-8) on twice `Interference`'s gradient.

    Rows are independent of each other and taken in blocks.

    Returns:
        ``(rows, columns)``.
    """
    import torch

    columns = (problem.curvature if problem.projections is None else problem.projections).shape[1]
    rows = len(problem.slope) if problem.slope.is_cuda else max(_BLOCK_ROWS, _BLOCK_ENTRIES // columns)
    return torch.cat([_adam_rows(problem, slope, steps, step_size) for slope in _blocks(problem.slope, rows)])


def _blocks(matrix: Tensor, rows: int) -> list[Tensor]:
    return [matrix[start : start + rows] for start in range(0, len(matrix), rows)]


def _adam_rows(problem: Interference, slope: Tensor, steps: int, step_size: float) -> Tensor:
    import torch

    first, second = 0.9, 0.999
    factor = problem.curvature if problem.projections is None else problem.projections
    change = slope.new_zeros(len(slope), factor.shape[1])
    average, square, gradient = (torch.zeros_like(change) for _ in range(3))
    for step in range(1, steps + 1):
        if problem.projections is None:
            torch.addmm(slope, change, factor, beta=2, alpha=2, out=gradient)
        else:
            torch.mm(torch.addmm(slope, change, factor.mT, beta=2, alpha=2), factor, out=gradient)
        average.lerp_(gradient, 1 - first)
        square.mul_(second).addcmul_(gradient, gradient, value=1 - second)
        torch.sqrt(square, out=gradient).div_(math.sqrt(1 - second**step)).add_(1e-8)
        change.addcdiv_(average, gradient, value=-step_size / (1 - first**step))
    return change


def flow(duration: float) -> Filter:
    """Response of gradient flow on half the function: ``(1 - exp(-duration * eigenvalue)) / eigenvalue``."""

    def response(eigenvalues: Tensor) -> Tensor:
        progress = -(-duration * eigenvalues).expm1()
        return (progress / eigenvalues).where(eigenvalues * duration > 1e-12, duration)

    return response


def momentum(steps: int, step_size: float) -> Filter:
    """Response of gradient descent with momentum 0.9, which is linear: each eigenvalue goes its own way."""

    def response(eigenvalues: Tensor) -> Tensor:
        position, velocity = eigenvalues * 0, eigenvalues * 0
        for _ in range(steps):
            velocity = 0.9 * velocity + 2 * (1 - eigenvalues * position)
            position = position + step_size * velocity
        return position

    return response


def leading(response: Filter, count: int) -> Filter:
    """The response of the leading eigenvalues alone; the others keep the start."""

    def cut(eigenvalues: Tensor) -> Tensor:
        kept = response(eigenvalues)
        kept[count:] = 0
        return kept

    return cut


def optimum(eigenvalues: Tensor) -> Tensor:
    """Response that leads to the optimum nearest to the start.

    Along eigenvalues that may come from the rounding of the task vectors to float32 alone, the start is kept. The sum
    of the eigenvalues is the squared norm of the projections, of which rounding takes at most half of `ROUNDING`.
    """
    smallest = ROUNDING**2 * eigenvalues.sum()
    return (1 / eigenvalues).where(eigenvalues > smallest, 0)


def _present(task_vectors: Tensor) -> tuple[list[Tensor], list[float]]:
    """Task vectors that are not zero, and their Frobenius norms."""
    sizes = norms(task_vectors).tolist()
    present = [(task_vector, size) for task_vector, size in zip(task_vectors, sizes, strict=True) if size]
    return [task_vector for task_vector, _ in present], [size for _, size in present]


def _beginning(task_vectors: Tensor, start: Start) -> Tensor:
    """Where the search starts, ``(*shape)`` float32."""
    if start == "zero":
        return task_vectors[0].new_zeros(task_vectors.shape[1:])
    return exact_sum(task_vectors) / (len(task_vectors) if start == "mean" else 1)


def _whole_rows(task_vectors: Tensor, beginning: Tensor, *, for_steps: bool = False) -> Interference | None:
    """WUDI's function: every expert is its own target and, over its norm, its own projection; None if all are zero."""
    present, sizes = _present(task_vectors)
    if not present:
        return None
    rows = (task_vector.to(beginning.dtype) for task_vector in present)
    experts = ((task_vector, task_vector / size) for task_vector, size in zip(rows, sizes, strict=True))
    return interference(beginning, experts, sum(map(len, present)), for_steps=for_steps)


@register(unit="matrix")
def wudi(
    task_vectors: Tensor,
    *,
    scaling_coefficient: Factor = 1.0,
    solver: Literal["adam", "exact"] = "adam",
    steps: Count = 300,
    step_size: Positive = 1e-5,
) -> Tensor:
    """WUDI: least interference with the inputs each expert reacts to (Cheng et al., 2025, arXiv 2503.08099).

    Minimises over M the sum over experts of ``norm((M - task_vector) @ task_vector.T)**2 / norm(task_vector)**2``,
    starting at the sum of the task vectors. Adam, as in the authors' code, moves an entry by about steps * step_size
    at most, in weights and not relative to the task vectors: its answer lies between the sum and the optimum.

    Args:
        task_vectors: ``(experts, rows, columns)`` float32.
        scaling_coefficient: factor on the merged task vector.
        solver: adam, or exact for the optimum nearest to the sum.
        steps: number of Adam's steps.
        step_size: Adam's learning rate.

    Returns:
        Merged task vector ``(rows, columns)``.
    """
    beginning = _beginning(task_vectors, "sum")
    if solver == "exact":
        return _filtered(task_vectors, beginning, optimum, scaling_coefficient)
    problem = _whole_rows(task_vectors, beginning, for_steps=True)
    if problem is not None:
        beginning += adam(problem, steps, step_size)
    return beginning * scaling_coefficient


def _filtered(task_vectors: Tensor, beginning: Tensor, response: Filter, scaling_coefficient: float) -> Tensor:
    """WUDI's function followed from the start by a filter of its eigenvalues, in float64."""
    beginning = beginning.double()
    problem = _whole_rows(task_vectors, beginning)
    if problem is not None:
        beginning += problem.filtered(response)
    return (beginning * scaling_coefficient).float()


@register(aliases=("wudi_v2",), unit="matrix")
def wudi2(
    task_vectors: Tensor,
    *,
    scaling_coefficient: Factor = 1.0,
    wudi2_variant: Literal["centered", "lora"] = "centered",
    solver: Literal["adam", "sgd", "exact"] | None = None,
    steps: Count = 300,
    step_size: Positive | None = None,
) -> Tensor:
    """WUDI v2 (OptMerge): WUDI on the leading directions of each expert (Wei et al., 2025, arXiv 2505.19892).

    With q the shorter side, an expert's projection is its leading q // experts singular directions times their
    singular values. Its target is, for models trained in full (centered), the mean of the task vectors plus as many
    leading directions of the difference from it, starting at the sum; for LoRA-trained ones (lora) as many leading
    directions of itself, starting at the mean.

    The authors' scripts use Adam with 1e-5 for the first and SGD with 1e-4 and momentum 0.9 for the second, which are
    the defaults here; the published Expert Merging script has 1e-6 for Adam (``--step_size 1e-6``). A matrix with a
    side shorter than the number of experts keeps one direction per expert, not none.

    Args:
        task_vectors: ``(experts, rows, columns)`` float32.
        scaling_coefficient: factor on the merged task vector.
        wudi2_variant: centered for experts trained in full, lora for LoRA-trained ones.
        solver: adam, sgd (with momentum 0.9) or exact for the optimum; by default adam for the centered variant, sgd
            for lora.
        steps: number of the optimizer's steps.
        step_size: learning rate; by default 1e-5 for adam and 1e-4 for sgd.

    Returns:
        Merged task vector ``(rows, columns)``.
    """
    centered = wudi2_variant == "centered"
    solver = solver or ("adam" if centered else "sgd")
    beginning = _beginning(task_vectors, "sum" if centered else "mean")
    if solver != "adam":
        beginning = beginning.double()
    mean = _beginning(task_vectors, "mean") if centered else None
    problem = _leading_rows(task_vectors, beginning, mean, for_steps=solver == "adam")
    if problem is not None and solver == "adam":
        beginning += adam(problem, steps, step_size or 1e-5)
    elif problem is not None:
        beginning += problem.filtered(optimum if solver == "exact" else momentum(steps, step_size or 1e-4))
    return (beginning * scaling_coefficient).float()


def _leading_rows(
    task_vectors: Tensor, beginning: Tensor, mean: Tensor | None, *, for_steps: bool
) -> Interference | None:
    """WUDI v2's function; targets are centered if there is a mean. None if all task vectors are zero."""
    present, sizes = _present(task_vectors)
    if not present:
        return None
    count = expert_rank(task_vectors)

    def experts() -> Iterator[tuple[Tensor, Tensor]]:
        for task_vector, size in zip(present, sizes, strict=True):
            left, values, right = singular_triples(task_vector, 0.0, count)
            projection = (right * (values / size)).mT.to(beginning.dtype)
            if mean is None:
                yield ((left * values) @ right.mT).to(beginning.dtype), projection
            else:
                left, values, right = singular_triples(task_vector - mean, 0.0, count)
                yield mean.to(beginning.dtype) + ((left * values) @ right.mT).to(beginning.dtype), projection

    return interference(beginning, experts(), count * len(present), for_steps=for_steps)


def _swudi_response(task_vectors: Tensor, flow_time: float, curvature_ratio: float) -> Filter:
    return leading(flow(flow_time), _rounded_up(task_vectors.shape[-1] * curvature_ratio))


def _aswudi_response(
    task_vectors: Tensor, rank_rule: RankRule, cumulative_share: float, max_curvature_ratio: float
) -> Filter:
    def response(eigenvalues: Tensor) -> Tensor:
        shape = tuple(task_vectors.shape[1:])
        rank = effective_rank(eigenvalues, shape, rank_rule, cumulative_share)
        limit = max(1, int(shape[-1] * max_curvature_ratio))
        return leading(optimum, max(1, min(rank, limit)))(eigenvalues)

    return response


def iwudi_parts(task_vectors: Tensor, *, scaling_coefficient: float, flow_time: float, start: Start) -> Tensor:
    """What each expert adds to IWUDI's result, ``(experts, rows, columns)``; see `filtered_parts`."""
    return filtered_parts(task_vectors, start, flow(flow_time), scaling_coefficient)


def swudi_parts(
    task_vectors: Tensor, *, scaling_coefficient: float, flow_time: float, start: Start, curvature_ratio: float
) -> Tensor:
    """What each expert adds to SWUDI's result, ``(experts, rows, columns)``; see `filtered_parts`."""
    response = _swudi_response(task_vectors, flow_time, curvature_ratio)
    return filtered_parts(task_vectors, start, response, scaling_coefficient)


def aswudi_parts(
    task_vectors: Tensor,
    *,
    scaling_coefficient: float,
    start: Start,
    rank_rule: RankRule,
    cumulative_share: float,
    max_curvature_ratio: float,
) -> Tensor:
    """What each expert adds to ASWUDI's result, ``(experts, rows, columns)``; see `filtered_parts`."""
    response = _aswudi_response(task_vectors, rank_rule, cumulative_share, max_curvature_ratio)
    return filtered_parts(task_vectors, start, response, scaling_coefficient)


def filtered_parts(task_vectors: Tensor, start: Start, response: Filter, scaling_coefficient: float) -> Tensor:
    """What each expert adds where the flow from a start is a filter r of the curvature's eigenvalues.

    With C the curvature and T an expert's task vector, ``S - (S @ C - T @ T.T @ T / norm(T)**2) @ r(C)``, where S is
    the expert's share of the start. Both terms are sums over the experts, and so is their result.

    Args:
        task_vectors: ``(experts, rows, columns)`` float32.
        start: as `iwudi` has it.
        response: the filter.
        scaling_coefficient: factor on all.

    Returns:
        ``(experts, rows, columns)`` float32.
    """
    import torch

    factor = {"sum": 1.0, "mean": 1 / len(task_vectors), "zero": 0.0}[start]
    shares = task_vectors.double() * factor
    problem = _whole_rows(task_vectors, shares.sum(0))
    if problem is not None:
        slopes = torch.stack([*_own_slopes(task_vectors, shares, problem)])
        own = replace(problem, slope=slopes.flatten(0, 1))
        shares += own.filtered(response).view_as(shares)
    return (shares * scaling_coefficient).float()


def _own_slopes(task_vectors: Tensor, shares: Tensor, problem: Interference) -> Iterator[Tensor]:
    """Each expert's part of the slope, ``(rows, side)``: what its target adds, and its share of the start."""
    first = 0
    for task_vector, share, size in zip(task_vectors.double(), shares, norms(task_vectors).tolist(), strict=True):
        slope = share @ (problem.curvature if problem.projections is None else problem.projections.mT)
        if size:
            square = task_vector @ task_vector.mT / size
            if problem.projections is None:
                slope -= square @ task_vector / size
            else:
                slope[:, first : first + len(square)] -= square
                first += len(square)
        yield slope


@register(unit="matrix", parts=iwudi_parts)
def iwudi(
    task_vectors: Tensor, *, scaling_coefficient: Factor = 1.0, flow_time: Positive = 300, start: Start = "sum"
) -> Tensor:
    """IWUDI: WUDI's gradient flow in closed form (OptMerge's authors' code, arXiv 2505.19892).

    The flow on half of WUDI's function from the start for some time: along an eigenvector of the curvature with
    eigenvalue e, the share ``1 - exp(-e * flow_time)`` of the way to the optimum is done.

    Args:
        task_vectors: ``(experts, rows, columns)`` float32.
        scaling_coefficient: factor on the merged task vector.
        flow_time: for how long the gradient is followed; the eigenvalues sum up to the number of experts.
        start: where the flow starts, at the sum of the task vectors, at their mean or at zero.

    Returns:
        Merged task vector ``(rows, columns)``.
    """
    return _closed_form(task_vectors, start, flow(flow_time), scaling_coefficient)


@register(unit="matrix", parts=swudi_parts)
def swudi(
    task_vectors: Tensor,
    *,
    scaling_coefficient: Factor = 1.0,
    flow_time: Positive = 300,
    start: Start = "sum",
    curvature_ratio: Fraction = 0.65,
) -> Tensor:
    """SWUDI: IWUDI along the leading eigenvectors of the curvature alone (OptMerge's authors' code).

    Along the other eigenvectors the start is kept.

    Args:
        task_vectors: ``(experts, rows, columns)`` float32.
        scaling_coefficient: factor on the merged task vector.
        flow_time: for how long the gradient is followed; the eigenvalues sum up to the number of experts.
        start: where the flow starts, at the sum of the task vectors, at their mean or at zero.
        curvature_ratio: share of the eigenvectors that are followed, of all as many as the matrix has columns.

    Returns:
        Merged task vector ``(rows, columns)``.
    """
    response = _swudi_response(task_vectors, flow_time, curvature_ratio)
    return _closed_form(task_vectors, start, response, scaling_coefficient)


@register(unit="matrix", parts=aswudi_parts)
def aswudi(
    task_vectors: Tensor,
    *,
    scaling_coefficient: Factor = 1.0,
    start: Start = "sum",
    rank_rule: RankRule = "participation_sqrt",
    cumulative_share: Fraction = 0.95,
    max_curvature_ratio: Fraction = 1.0,
) -> Tensor:
    """ASWUDI: the optimum along as many leading eigenvectors as the curvature says (OptMerge's authors' code).

    The number is found for each matrix from the eigenvalues e: participation_sqrt ``sum(sqrt(e))**2 / sum(e)``,
    participation ``sum(e)**2 / sum(e**2)``, stable_rank ``sum(e**2) / max(e)**2``, entropy ``exp`` of the entropy of
    e as a distribution, cumulative the fewest that hold a share of the sum, gavish_donoho those above the singular
    value threshold for an unknown level of noise.

    Args:
        task_vectors: ``(experts, rows, columns)`` float32.
        scaling_coefficient: factor on the merged task vector.
        start: what is kept along the other eigenvectors, the sum of the task vectors, their mean or zero.
        rank_rule: how the number of eigenvectors is found.
        cumulative_share: share of the eigenvalues' sum for the cumulative rule.
        max_curvature_ratio: at most this share of the eigenvectors, of all as many as the matrix has columns.

    Returns:
        Merged task vector ``(rows, columns)``.
    """
    response = _aswudi_response(task_vectors, rank_rule, cumulative_share, max_curvature_ratio)
    return _closed_form(task_vectors, start, response, scaling_coefficient)


def _closed_form(task_vectors: Tensor, start: Start, response: Filter, scaling_coefficient: float) -> Tensor:
    return _filtered(task_vectors, _beginning(task_vectors, start), response, scaling_coefficient)


def effective_rank(eigenvalues: Tensor, shape: tuple[int, ...], rule: RankRule, share: float) -> int:
    """How many of the curvature's eigenvalues count.

    Args:
        eigenvalues: descending, not negative; missing ones are zero.
        shape: rows and columns of the merged matrix.
        rule: as `aswudi` describes.
        share: of the sum, for the cumulative rule.
    """
    total = float(eigenvalues.sum())
    squares = float(eigenvalues.square().sum())
    shares = eigenvalues / total
    if rule == "participation_sqrt":
        return _rounded_up(float(eigenvalues.sqrt().sum()) ** 2 / total)
    if rule == "participation":
        return _rounded_up(total**2 / squares)
    if rule == "stable_rank":
        return _rounded_up(squares / float(eigenvalues[0]) ** 2)
    if rule == "entropy":
        return _rounded_up(math.exp(-float(shares.xlogy(shares).sum())))
    if rule == "cumulative":
        return int((shares.cumsum(0) < share * (1 - 1e-9)).sum()) + 1
    return int((eigenvalues.sqrt() > _gavish_donoho(eigenvalues, shape)).sum())


def _gavish_donoho(eigenvalues: Tensor, shape: tuple[int, ...]) -> float:
    """Threshold for singular values under unknown noise (Gavish and Donoho, 2014, arXiv 1305.5870).

    The median of the Marchenko-Pastur law is the authors' surrogate, ``sqrt((1 - ratio)**2 + ratio)`` and, for square
    matrices, ``sqrt(2 + sqrt(3))``.
    """
    import torch

    ratio = min(shape) / max(shape)
    known_noise = math.sqrt(2 * (ratio + 1) + 8 * ratio / ((ratio + 1) + math.sqrt(ratio**2 + 14 * ratio + 1)))
    median_law = math.sqrt(2 + math.sqrt(3)) if ratio == 1 else math.sqrt((1 - ratio) ** 2 + ratio)
    missing = eigenvalues.new_zeros(shape[-1] - len(eigenvalues))
    median = float(torch.cat([eigenvalues, missing]).median())
    return known_noise / median_law * math.sqrt(median)


def _rounded_up(number: float) -> int:
    """Ceiling of a number that may be off by rounding, so that 3.0000000001 is 3."""
    return math.ceil(number * (1 - 1e-9))
