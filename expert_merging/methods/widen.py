"""WIDEN: experts count, column by column, by how far they have moved its length and its direction."""

from __future__ import annotations

from typing import TYPE_CHECKING

from expert_merging.flags import NotNegative
from expert_merging.method import register
from expert_merging.parts import Part
from expert_merging.roles import is_head, is_word_table

if TYPE_CHECKING:
    from torch import Tensor


@register(unit="tensor")
def widen(
    task_vectors: Tensor, part: Part, base: Tensor, *, widen_ratio: NotNegative = 1.0, widen_score: NotNegative = 1.0
) -> Tensor:
    """Weigh experts by changes of columns' lengths and directions (Yu et al., 2024, arXiv 2408.03092).

    As in the authors' code, which has no factor on the result. Tables of embeddings have a vector a word. Ranks are
    compared as whole numbers, so that the middle one of an odd number is not above the mean by rounding. A column of
    zeros has no direction, and no change of it. Tensors of more dimensions than two, which the authors do not have,
    count as vectors.

    Args:
        task_vectors: ``(experts, *shape)`` float32.
        part: where the entries stand.
        base: the base's weights ``(*shape)``.
        widen_ratio: how many times the mean rank of an expert's columns a column must exceed to count in full.
        widen_score: what counts as in full.

    Returns:
        Merged task vector ``(*shape)``.
    """
    import torch

    if not base.numel():
        return torch.zeros_like(base)
    if len(part.shape) != 2:
        changes = task_vectors.abs().flatten(1) if base.ndim else task_vectors.abs()[:, None]
        significant = changes > widen_ratio * changes.mean(1, keepdim=True)
        weights = changes.softmax(0).masked_fill_(significant, widen_score)
        return (task_vectors * weights.view_as(task_vectors)).sum(0)
    along = 1 if is_word_table(part.name) and not is_head(part.name) else 0
    vectors = task_vectors.view(-1, *part.shape)
    moved = [moves(base.view(part.shape).double(), vector, along) for vector in vectors]
    scores = [score_ranks(torch.stack(kind), widen_ratio, widen_score) for kind in zip(*moved, strict=True)]
    weights = ((scores[0] + scores[1]) / 2).float().unsqueeze(1 + along)
    return (vectors * weights).sum(0).view(base.shape)


def moves(base: Tensor, task_vector: Tensor, along: int) -> tuple[Tensor, Tensor]:
    """How far lengths and directions of vectors have moved, ``(vectors,)`` each.

    Args:
        base: ``(rows, columns)`` float64.
        task_vector: ``(rows, columns)``.
        along: dimension that the vectors run along.
    """
    import torch

    expert = base + task_vector
    lengths = base.norm(dim=along), expert.norm(dim=along)
    both = lengths[0] * lengths[1]
    cosines = torch.where(both > 0, (base * expert).sum(along) / both, 1.0)
    return (lengths[1] - lengths[0]).abs(), 1 - cosines


def score_ranks(changes: Tensor, ratio: float, full: float) -> Tensor:
    """Scores of vectors by the rank of their change within the expert, ``(experts, vectors)`` float64.

    Args:
        changes: ``(experts, vectors)``.
        ratio: how many times the mean rank counts in full.
        full: what counts as in full.
    """
    import torch

    count = changes.shape[1]
    order = changes.argsort(dim=1, stable=True)
    ranks = torch.empty_like(order).scatter_(1, order, torch.arange(count, device=order.device).expand_as(order))
    return (ranks.double() / count).softmax(0).masked_fill_(2 * ranks > ratio * (count - 1), full)
