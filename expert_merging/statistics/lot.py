"""LOT Merging: the task vectors whose features are nearest to the experts'."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from expert_merging.arithmetic import scaled_mean
from expert_merging.flags import Factor
from expert_merging.method import ORDER_FREE
from expert_merging.parts import Part
from expert_merging.roles import is_matrix
from expert_merging.running.options import SampleOptions
from expert_merging.statistics.gathering import HasGrams, register_on_grams
from expert_merging.statistics.regmean import least_squares

if TYPE_CHECKING:
    from torch import Tensor

    from expert_merging.statistics.gram import Gram


@dataclass(frozen=True, kw_only=True)
class LotOptions(SampleOptions):
    """Options of LOT Merging.

    Args:
        scaling_coefficient: factor on the merged task vector.
    """

    scaling_coefficient: Factor = 1.0


@register_on_grams("lot", LotOptions, with_norms=True, promises=frozenset({ORDER_FREE}))
def lot(task_vectors: Tensor, part: Part, grams: HasGrams, *, scaling_coefficient: float = 1.0) -> Tensor:
    """Least drift of each layer's features, and the base where no sample says otherwise (2025, arXiv 2505.23859).

    With ``G_k`` the mean of ``x x^T`` over inputs ``x`` of expert k's samples, a linear layer's merged task vector is
    ``(sum_k tau_k G_k) (sum_k G_k)^+`` (Eq. 9, for ``tau`` of shape ``(outputs, inputs)``), and a norm's is
    ``sum_k m_k tau_k / sum_k m_k`` with ``m_k`` the mean square of what each of its weights scales (Eq. 12). All other
    tensors, and what no sample comes by, get the mean of the task vectors.

    Where no inputs are, a linear layer stays the base's, of one expert too; RegMean leaves the mean there. In place of
    the pseudo-inverse, which cuts small directions off, there is a pull to the base with a weight of 1e-4 of each
    input's mean square. It ends up at the same where inputs determine the result, and does not depend on the scale of
    an input. The paper adds tokens up; here it is their mean, so that an expert with longer samples does not count for
    more.

    Args:
        task_vectors: ``(experts, *shape)``.
        part: the tensor.
        grams: each expert's Gram matrices, and what norms scale.
        scaling_coefficient: factor on the result.

    Returns:
        Merged task vector ``(*shape)``.
    """
    own = [(task_vectors[number], gram) for number, gram in enumerate(grams.of(part.name)) if gram is not None]
    if not own:
        return scaled_mean(task_vectors, scaling_coefficient)
    merged = (
        least_squares(((vector.double(), gram) for vector, gram in own), 1.0) if is_matrix(part) else _weighted(own)
    )
    return merged.to(task_vectors.dtype).mul_(scaling_coefficient)


def _weighted(own: list[tuple[Tensor, Gram]]) -> Tensor:
    """The mean of vectors weighted by the diagonals, in float64; the plain one where these are 0."""
    import torch

    vectors = torch.stack([vector.double() for vector, _ in own])
    weights = torch.stack([gram.diagonal(vector.device) for vector, gram in own])
    weights.masked_fill_(weights.sum(0) == 0, 1.0)
    return (weights * vectors).sum(0) / weights.sum(0)
