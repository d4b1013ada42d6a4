"""Models of single experts whose task vectors keep only their strongest directions."""

from __future__ import annotations

from decimal import Decimal
from typing import TYPE_CHECKING

from expert_merging.context import Context
from expert_merging.flags import Factor, Fraction
from expert_merging.method import register
from expert_merging.methods.spectral import rounding_floor, singular_triples
from expert_merging.outputs import Output, mirror_of

if TYPE_CHECKING:
    from torch import Tensor


def one_each(context: Context, **_options: object) -> tuple[Output, ...]:
    """A mirror of the base for every expert."""
    return tuple(mirror_of(context.plan, folder=name, experts=[name]) for name in context.plan.experts)


@register(unit="matrix", outputs=one_each)
def svd_intermediate(
    task_vectors: Tensor,
    experts: tuple[str, ...],
    *,
    rank_ratio: Fraction | None = None,
    scaling_coefficient: Factor = 1.0,
) -> Tensor:
    """One model per expert, its matrices' changes truncated to low rank: what TSV-M merges (arXiv 2412.00081).

    The published script of this name reassembles the full decomposition, which changes nothing but rounding; here the
    singular values beyond the rank are really left out. Parameters that are no matrices keep the whole change.

    Args:
        task_vectors: ``(1, rows, columns)`` float32, one expert's.
        experts: names of all experts of the run.
        rank_ratio: share of a matrix's singular values that is kept, at least one; by default one divided by the number
            of experts, as TSV-M has room for.
        scaling_coefficient: factor on the truncated task vector.

    Returns:
        Truncated task vector ``(rows, columns)``.
    """
    side = min(task_vectors[0].shape)
    rank = int(Decimal(str(rank_ratio)) * side) if rank_ratio else side // len(experts)
    left, values, right = singular_triples(task_vectors[0], rounding_floor(task_vectors), max(1, rank))
    return ((left * (scaling_coefficient * values)) @ right.mT).float()
