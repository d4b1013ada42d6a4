"""Models of single experts whose task vectors keep only their strongest directions."""

from __future__ import annotations

from typing import TYPE_CHECKING

from expert_merging.registry import Fraction, register

if TYPE_CHECKING:
    from torch import Tensor


@register(per_expert=True)
def svd_intermediate(
    task_vectors: Tensor,
    experts: tuple[str, ...],
    *,
    rank_ratio: Fraction | None = None,
    scaling_coefficient: float = 1.0,
) -> Tensor:
    """One model per expert, its matrices' changes truncated to low rank: what TSV-M merges (arXiv 2412.00081).

    The published script of this name reassembles the full decomposition, which changes nothing but rounding; here the
    singular values beyond the rank are really left out. Parameters that are no matrices keep the whole change.

    Args:
        task_vectors: ``(1, *shape)`` float32, one expert's.
        experts: names of all experts of the run.
        rank_ratio: share of a matrix's singular values that is kept, at least one; by default one divided by the number
            of experts, as TSV-M has room for.
        scaling_coefficient: factor on the truncated task vector.

    Returns:
        Truncated task vector ``(*shape)``.
    """
    import torch

    task_vector: Tensor = task_vectors[0]
    if task_vector.dim() != 2 or 0 in task_vector.shape:
        return task_vector * scaling_coefficient
    rank = max(1, int(min(task_vector.shape) * (rank_ratio or 1 / len(experts))))
    left, values, right = torch.linalg.svd(task_vector, full_matrices=False)
    truncated: Tensor = (left[:, :rank] * (scaling_coefficient * values[:rank])) @ right[:rank]
    return truncated
