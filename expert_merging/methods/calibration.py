"""SVC, which weakens the directions of a merged matrix that several experts have put there."""

from __future__ import annotations

from typing import TYPE_CHECKING

from expert_merging.flags import Positive
from expert_merging.method import register
from expert_merging.methods.spectral import rounding_floor, singular_triples

if TYPE_CHECKING:
    from torch import Tensor


@register(unit="matrix")
def svc(task_vectors: Tensor, merged: Tensor, *, svc_alpha: Positive | None = None) -> Tensor:
    """For --post: weaken singular values that several experts have added to (Li et al., 2026, arXiv 2602.05536).

    Along a left direction of the merged matrix, every expert has an answer, which is a row. How many times that row is
    in the merged one, at least alpha, is averaged over the experts, and the singular value divided by this mean. It
    grows where the mean is below one. Other tensors stay as they are.

    The authors' scripts have alpha 1 for TSV-M (``--method svd``), and one over the number of experts for all others.
    Directions whose singular values are mere rounding are left out, and an expert without an answer counts as alpha.

    Args:
        task_vectors: ``(experts, rows, columns)`` float32.
        merged: merged task vector ``(rows, columns)``.
        svc_alpha: the least that an expert counts for; by default one divided by the number of experts.

    Returns:
        Merged task vector ``(rows, columns)``.
    """
    import torch

    least = svc_alpha or 1 / len(task_vectors)
    left, values, right = singular_triples(merged, rounding_floor(merged[None]), single=True)
    shares = values.new_zeros(len(values), dtype=torch.float64)
    for task_vector in task_vectors:
        own = (left.mT @ task_vector).double()  # whose squares may not be float32
        squares = own.square().sum(1)
        share = values * (own * right.mT).sum(1) / squares
        shares += share.where(squares > 0, 0).clamp_(min=least)
    return (left * (values * (len(task_vectors) / shares)).float()) @ right.mT
