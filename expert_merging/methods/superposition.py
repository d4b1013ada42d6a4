"""STF: a matrix that answers every expert's leading features as the expert does.

Made from the paper's abstract, which speaks of a linear system: both that it may mean are here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from expert_merging.flags import Factor
from expert_merging.method import register
from expert_merging.methods.spectral import expert_rank, rounding_floor, singular_triples

if TYPE_CHECKING:
    from torch import Tensor

# Eigenvalues of a system up to this share of the largest are taken for zero: float32 directions do not tell.
_SMALLEST = 1e-5

System = Literal["scalar", "vector"]


def stf_parts(task_vectors: Tensor, *, scaling_coefficient: float, stf_system: System) -> Tensor:
    """What each expert's features add to the superposition, ``(experts, rows, columns)``.

    Args:
        task_vectors: ``(experts, rows, columns)`` float32.
        scaling_coefficient: factor on the merged task vector.
        stf_system: as `stf` has it.
    """
    import torch

    left, right, ranks = _superposed(task_vectors, stf_system)
    own = zip(torch.split(left * scaling_coefficient, ranks, 1), torch.split(right, ranks, 1), strict=True)
    return torch.stack([columns @ rows.mT for columns, rows in own])


def _superposed(task_vectors: Tensor, system: System) -> tuple[Tensor, Tensor, list[int]]:
    """Factors ``(rows, features)`` and ``(columns, features)`` of the result, and how many features each expert has."""
    import torch

    count = expert_rank(task_vectors)
    triples = [singular_triples(own, rounding_floor(own[None]), count, single=True) for own in task_vectors]
    left, values, right = (torch.cat(parts, -1) for parts in zip(*triples, strict=True))
    ranks = [len(own) for _, own, _ in triples]
    exact = right.double()
    if system == "vector":
        return left * values, (exact @ _pseudo_inverse(exact.mT @ exact)).float(), ranks
    overlaps = (left.double().mT @ left.double()) * (exact.mT @ exact)
    return left * (_pseudo_inverse(overlaps) @ values.double()).float(), right, ranks


def _pseudo_inverse(system: Tensor) -> Tensor:
    """Of a symmetric matrix ``(side, side)`` without negative eigenvalues."""
    import torch

    eigenvalues, directions = torch.linalg.eigh(system)
    kept = eigenvalues > _SMALLEST * eigenvalues[-1:]
    inverse: Tensor = (directions[:, kept] / eigenvalues[kept]) @ directions[:, kept].mT
    return inverse


@register(unit="matrix", parts=stf_parts)
def stf(task_vectors: Tensor, *, scaling_coefficient: Factor = 1.0, stf_system: System = "scalar") -> Tensor:
    """STF, experimental: all experts' leading features answered as by the expert (Qiu et al., 2025, arXiv 2502.10698).

    With q the shorter side, the features of an expert are its q // experts leading singular triples. The result M is a
    weighted sum of all of them, with ``left.T @ M @ right`` each feature's singular value (scalar), or the shortest M
    with ``M @ right`` the left direction times the singular value (vector). Features that are orthogonal are just
    summed. Other tensors get the mean.

    Only the paper's abstract was at hand: neither which of the two systems nor what number of features is meant is
    known. Where features depend on each other, the shortest solution is taken.

    Args:
        task_vectors: ``(experts, rows, columns)`` float32.
        scaling_coefficient: factor on the merged task vector.
        stf_system: what is asked of each feature, scalar or vector.

    Returns:
        Merged task vector ``(rows, columns)``.
    """
    left, right, _ = _superposed(task_vectors, stf_system)
    return (left * scaling_coefficient) @ right.mT
