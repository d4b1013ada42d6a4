"""DELLA: entries are dropped at random, the less likely the larger they are in their row."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from expert_merging.arithmetic import weighted_sum
from expert_merging.context import Context
from expert_merging.errors import InputError
from expert_merging.flags import BelowOne, Factor, Interval
from expert_merging.method import Preparation, Prepare, register
from expert_merging.methods.drawing import draw_uniform
from expert_merging.methods.sparse import merge_agreeing
from expert_merging.methods.thresholds import elected_signs
from expert_merging.parts import Part

if TYPE_CHECKING:
    from torch import Tensor

Window = Annotated[float, Interval("[0, 1)")]


def check_window(_context: Context, *, drop_rate: float, window_size: float) -> Preparation:
    """Check that the probabilities that the window spans are some.

    Raises:
        InputError: entries would be kept with a probability of nothing or of more than one.
    """
    lowest, highest = drop_rate - window_size / 2, drop_rate + window_size / 2
    if lowest < 0 or highest >= 1:
        raise InputError(
            f"--window_size is the difference between the highest and the lowest drop rate around --drop_rate, which "
            f"must be in [0, 1), got {window_size:g} around {drop_rate:g}: from {lowest:g} to {highest:g}"
        )
    return Preparation()


@register(unit="rows", promises=frozenset(), prepare=Prepare(check_window, ()))
def della(
    task_vectors: Tensor,
    part: Part,
    seed: int,
    experts: tuple[str, ...],
    *,
    drop_rate: BelowOne = 0.3,
    window_size: Window = 0.14,
    della_elect: bool = True,
    della_normalize: bool = True,
    scaling_coefficient: Factor = 1.1,
) -> Tensor:
    """Drop small entries more often than large ones, rescale, elect signs, merge (Deep et al., 2024, arXiv 2406.11617).

    Defaults are those of the authors' script, which divides by the number of experts that agree; their equations have
    the sum. Where the signs of all experts cancel, nothing is merged, while the script takes positive entries. Equal
    magnitudes have ranks in the order of the columns, and the only entry of a row is in the middle.

    Args:
        task_vectors: ``(experts, rows, columns)`` float32.
        part: where the entries stand.
        seed: seed of the run.
        experts: names of the experts.
        drop_rate: mean probability with which an entry of a task vector is dropped.
        window_size: difference between the drop rates of the smallest and the largest entry of a row; with 0 all are
            dropped alike, as by DARE.
        della_elect: whether only the experts are merged whose entry has the sign of the sum; without it, this is
            MagPrune alone.
        della_normalize: whether experts are averaged (those that agree, where signs are elected); otherwise, their sum.
        scaling_coefficient: factor on the merged task vector.

    Returns:
        Merged task vector ``(rows, columns)``.
    """
    ranks = ranks_in_rows(task_vectors.abs()).mul_(1 / max(1, task_vectors.shape[2] - 1))
    if task_vectors.shape[2] == 1:
        ranks.fill_(0.5)
    kept = ranks.mul_(window_size).add_(1 - drop_rate - window_size / 2)
    for row, probability, expert in zip(task_vectors, kept, experts, strict=True):
        drawn = draw_uniform(part, seed, expert).to(row.device).view_as(row)
        row.div_(probability).mul_(drawn < probability)
    ones = [1.0] * len(experts)
    if not della_elect:
        weight = scaling_coefficient / (len(experts) if della_normalize else 1)
        return weighted_sum(task_vectors, [weight] * len(experts))
    merged = merge_agreeing(task_vectors, elected_signs(task_vectors), ones, normalize=della_normalize)
    return merged.mul_(scaling_coefficient)


def ranks_in_rows(magnitudes: Tensor) -> Tensor:
    """Number of entries of its row that each one comes after, from the smallest on, of equal ones the earlier first.

    Args:
        magnitudes: ``(..., columns)`` float32, none negative.

    Returns:
        The ranks, of the same shape.
    """
    import torch

    # The bits of magnitudes are ordered as they are; with the column below them, no two keys are equal.
    columns = torch.arange(magnitudes.shape[-1], device=magnitudes.device)
    keys = magnitudes.view(torch.int32).long().bitwise_left_shift_(32).bitwise_or_(columns)
    order = _sorted(keys).bitwise_and_((1 << 32) - 1)
    return torch.empty_like(magnitudes).scatter_(-1, order, columns.float().expand_as(magnitudes))


def _sorted(keys: Tensor) -> Tensor:
    if keys.is_cuda:
        return keys.sort(dim=-1).values
    keys.numpy().sort(axis=-1)  # several times as fast as torch
    return keys
