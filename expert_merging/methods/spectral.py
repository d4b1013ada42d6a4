"""Methods that align the singular directions of the experts, without computing a singular value decomposition.

Everything rests on one symmetric eigenproblem of the Gram matrix of the shorter side, in float64 because squaring a
matrix costs half the digits (where those that are left suffice, in float32). Directions that the numbers given do not
determine (the null space of a low-rank stack, whose basis a library picks as it likes) are left out, so that no result
hangs on them: if all task vectors are padded with zero rows and columns, the result is padded likewise and otherwise
the same.

Everything is written for wide matrices, and a tall one is transposed: MKL multiplies a few rows with a wide matrix up
to four times as fast as the transposed matrix with as many columns.

Other tensors than matrices (norms, biases, convolutions, stacks of matrices) get the mean of the task vectors, as in
the authors' code. So do embeddings and output heads, whose rows are words.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from expert_merging.flags import Factor, Fraction
from expert_merging.method import ORDER_FREE, register

if TYPE_CHECKING:
    import torch
    from torch import Tensor

# A number rounded to float32 is off by at most half of this, relatively.
ROUNDING = 2.0**-23
# Singular directions of two experts that differ by less than this are the same direction: float32 task vectors do not
# tell them apart.
_PARALLEL = 1e-5
# Largest over smallest kept singular value up to which a product in float32 is good to 1e-5, and up to which it is good
# to well below `_PARALLEL`, and the Gram matrix may be in float32 as well, whose eigenvalues span the square of it.
_FLOAT32_SPAN = 100
_FLOAT32_SMALL_SPAN = 10
# Columns that a Gram matrix takes at once, and half of the rows from which on its upper triangle is left out.
_GRAM_COLUMNS = 1024
_GRAM_ROWS = 128
# Columns for a row from which a matrix without structure has so narrow a span.
_WIDE = 2
# Entries that a core's cache holds in float64 beside some more.
_CACHED = 1 << 16
# Shorter side from which Newton-Schulz on a GPU is worth its launches.
_NEWTON_SCHULZ_SIDE = 256


def rounding_floor(task_vectors: Tensor) -> float:
    """Singular values up to this may be nothing but the rounding of the task vectors ``(experts, *shape)``.

    Rounding a task vector to float32 changes it by at most half of `ROUNDING` times its Frobenius norm, and a
    matrix's singular values change by at most the norm of a change.
    """
    return ROUNDING * float(norms(task_vectors).sum())


def norms(task_vectors: Tensor) -> Tensor:
    """Frobenius norm of each task vector: ``(experts,)`` float64, without overflow or underflow."""
    import torch

    sizes = torch.stack([torch.linalg.vector_norm(entry) for entry in task_vectors]).double()
    if not ((sizes > 1e-15) & (sizes < 1e15)).all():  # a square may have overflowed, or become zero
        sizes = torch.stack([torch.linalg.vector_norm(entry, dtype=torch.float64) for entry in task_vectors])
    return sizes


def exact_sum(task_vectors: Tensor) -> Tensor:
    """Sum over the experts in float64, rounded once, so that task vectors which cancel leave nothing behind.

    Args:
        task_vectors: ``(experts, rows, columns)``.
    """
    total = task_vectors[0].clone()
    step = len(total) if total.is_cuda else max(1, _CACHED // total.shape[1])
    for start in range(0, len(total), step):
        rows = slice(start, start + step)
        exact = total[rows].double()
        for task_vector in task_vectors[1:]:
            exact += task_vector[rows]
        total[rows] = exact
    return total


def singular_triples(
    matrix: Tensor, floor: float, count: int | None = None, *, single: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """The leading singular triples of a matrix, largest first.

    Args:
        matrix: ``(rows, columns)``, not empty.
        floor: singular values up to this are left out with their directions.
        count: how many at most; by default all.
        single: float32 is enough.

    Returns:
        Left directions ``(rows, rank)``, singular values ``(rank,)`` and right directions ``(columns, rank)``, all
        float64, or float32 if single. Within equal singular values the directions are any basis.
    """
    if matrix.shape[0] > matrix.shape[1]:
        right, values, left = singular_triples(matrix.mT, floor, count, single=single)
        return left, values, right
    import torch

    scale = float(norms(matrix[None])) or 1
    squares, left = _eigenpairs(matrix, scale, torch.float64)
    squares, left = squares[:count], left[:, :count]
    if single and _spans_less(squares, _FLOAT32_SMALL_SPAN):
        left = left.float()
    right = left.mT @ _scaled(matrix, scale, left.dtype)
    sizes = right.norm(dim=1)
    values = sizes.double() * scale  # in float64, as the norm may be beyond float32
    kept = values > floor
    left, values, right = left[:, kept], values[kept], right[kept]
    right /= sizes[kept, None]
    dtype = torch.float32 if single else torch.float64
    return left.to(dtype), values.to(dtype), right.mT.to(dtype)


def _spans_less(squares: Tensor, span: float) -> bool:
    """Whether the largest of some singular values is at most so many times the smallest, given their squares."""
    return len(squares) > 0 and bool(squares[-1] * span**2 >= squares[0])


def _scaled(matrix: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    """A copy of the matrix over its Frobenius norm, so that squares neither overflow nor underflow."""
    if not 1e-30 < scale < 1e30:  # it or its inverse may not be a float32
        return (matrix.double() / scale).to(dtype)
    return matrix.to(dtype, copy=True).div_(scale)


def _eigenpairs(matrix: Tensor, scale: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Squared singular values ``(rows,)``, descending, and left directions of a wide matrix over its norm.

    In float64 the Gram matrix tells singular values apart down to 1e-8 of the largest, and float32 task vectors have
    no digits beyond 1e-7.
    """
    import torch

    gram = matrix.new_zeros(len(matrix), len(matrix), dtype=dtype)
    for columns in torch.split(matrix, matrix.shape[1] if matrix.is_cuda else _GRAM_COLUMNS, 1):
        _add_square(gram, _scaled(columns, scale, dtype))
    squares, left = torch.linalg.eigh(gram)
    return squares.clamp_(min=0).flip(0), left.flip(1)


def _add_square(gram: Tensor, matrix: Tensor) -> None:
    """Add ``matrix @ matrix.T`` to the lower triangle, which is all that an eigenproblem reads."""
    half = len(matrix) // 2
    if half < _GRAM_ROWS:
        gram.addmm_(matrix, matrix.mT)
        return
    gram[half:, :half].addmm_(matrix[half:], matrix[:half].mT)
    _add_square(gram[:half, :half], matrix[:half])
    _add_square(gram[half:, half:], matrix[half:])


def polar_factor(matrix: Tensor, floor: float) -> tuple[Tensor, float]:
    """The partial isometry of the polar decomposition: ``U @ V.T`` over the singular values above the floor.

    Args:
        matrix: ``(rows, columns)``, not empty.
        floor: directions with singular values up to this are mapped to zero.

    Returns:
        The factor ``(rows, columns)`` float32 and the mean of those singular values, 0 if there are none.
    """
    import torch

    if matrix.shape[0] > matrix.shape[1]:
        factor, mean = polar_factor(matrix.mT, floor)
        return factor.mT, mean
    if _multiplies_fast(matrix):
        converged = newton_schulz(matrix, floor)
        if converged is not None:
            # The inner product with the polar factor is the sum of the singular values.
            return converged, float((converged * matrix).sum()) / matrix.shape[0]
    found = _polar_factor(matrix, floor, torch.float32) if matrix.shape[1] >= _WIDE * matrix.shape[0] else None
    found = found or _polar_factor(matrix, floor, torch.float64)
    assert found  # noqa: S101  (float64 always does)
    return found


def _polar_factor(matrix: Tensor, floor: float, dtype: torch.dtype) -> tuple[Tensor, float] | None:
    """What `polar_factor` returns for a wide matrix, or None where float32 is not enough."""
    import torch

    scale = float(norms(matrix[None])) or 1
    squares, left = _eigenpairs(matrix, scale, dtype)
    kept = squares.sqrt() * scale > floor
    if dtype == torch.float32 and not (kept.all() and _spans_less(squares, _FLOAT32_SMALL_SPAN)):
        return None
    squares, left = squares[kept], left[:, kept]
    values = squares.sqrt()
    if _spans_less(squares, _FLOAT32_SPAN):
        # As many digits are lost as the kept singular values span.
        factor = ((left / values) @ left.mT).float() @ _scaled(matrix, scale, torch.float32)
    else:
        # Directions have all digits, and so has their product in float32.
        right = left.mT @ _scaled(matrix, scale, dtype)
        factor = left.float() @ (right / right.norm(dim=1, keepdim=True)).float()
    return factor, float(values.double().sum()) * scale / max(1, len(values))


def _multiplies_fast(matrix: Tensor) -> bool:
    """Whether some fifty products cost less than one eigenproblem."""
    return matrix.is_cuda and matrix.shape[0] >= _NEWTON_SCHULZ_SIDE


def newton_schulz(matrix: Tensor, floor: float) -> Tensor | None:
    """Polar factor of a matrix of full rank by matrix products alone, which is what a GPU is good at.

    Every step multiplies a small singular value by 1.5, and there are too few steps for one below the floor to reach
    1. So either all singular values are above the floor and the iteration has converged, or there is no answer.

    Args:
        matrix: ``(rows, columns)`` float32, at least as wide as high.
        floor: as for `polar_factor`.

    Returns:
        ``(rows, columns)`` float32, or None where the matrix is too close to one of lower rank.
    """
    import torch

    scale = float(norms(matrix[None]))
    if scale <= 2 * floor:
        return None
    factor = _scaled(matrix, scale, torch.float32)
    identity = torch.eye(matrix.shape[0], device=matrix.device)
    for _ in range(int(math.log(scale / (2 * floor), 1.5))):
        distance = identity - factor @ factor.mT
        if float(distance.norm()) < 1e-5 * math.sqrt(len(identity)):
            return factor
        factor = torch.addmm(factor, distance, factor, alpha=0.5)
    return None


def _orthogonal_triples(triples: list[tuple[Tensor, Tensor, Tensor]]) -> tuple[Tensor, Tensor, Tensor]:
    """TSV-M's triples of all experts side by side, left and right directions made orthogonal."""
    left, values, right = _side_by_side(triples)
    return _orthonormal(left), values, _orthonormal(right)


def _leading_triples(task_vectors: Tensor) -> list[tuple[Tensor, Tensor, Tensor]]:
    count = expert_rank(task_vectors)
    return [singular_triples(entry, rounding_floor(entry[None]), count, single=True) for entry in task_vectors]


def svd_parts(task_vectors: Tensor, *, scaling_coefficient: float) -> Tensor:
    """What each expert adds to TSV-M's sum: its own orthogonal directions, ``(experts, rows, columns)``.

    Args:
        task_vectors: ``(experts, rows, columns)`` float32.
        scaling_coefficient: factor on the merged task vector.
    """
    import torch

    triples = _leading_triples(task_vectors)
    ranks = [len(values) for _, values, _ in triples]
    left, values, right = _orthogonal_triples(triples)
    own = zip(*(torch.split(given, ranks, 1) for given in (left * (values * scaling_coefficient), right)), strict=True)
    return torch.stack([columns @ rows.mT for columns, rows in own])


@register(aliases=("tsv_m",), unit="matrix", parts=svd_parts)
def svd(task_vectors: Tensor, *, scaling_coefficient: Factor = 1.0) -> Tensor:
    """TSV-M: leading singular directions of every expert, made orthogonal (Gargiulo et al., 2025, arXiv 2412.00081).

    With q the shorter side, each expert keeps its q // experts leading singular triples. The left directions of all
    experts side by side are replaced by the nearest orthonormal ones (their polar factor), the right ones likewise,
    and put together again with the singular values. Every matrix is merged so; the published Expert Merging script
    does it for ``lm_head.weight`` alone, which it excludes, and thus averages. Other tensors get the mean.

    Where the authors' code leaves the result to the library: directions whose singular values are mere rounding are
    left out, and directions that experts share count once (identical experts give the expert's rank-q // experts
    part). A matrix with a side shorter than the number of experts keeps one direction per expert, not none.

    Args:
        task_vectors: ``(experts, rows, columns)`` float32.
        scaling_coefficient: factor on the merged task vector.

    Returns:
        Merged task vector ``(rows, columns)``.
    """
    left, values, right = _orthogonal_triples(_leading_triples(task_vectors))
    merged: Tensor = (left * (values * scaling_coefficient)) @ right.mT
    return merged


def expert_rank(task_vectors: Tensor) -> int:
    """Directions of each expert when all share the shorter side of a matrix; at least one."""
    return max(1, min(task_vectors.shape[1:]) // len(task_vectors))


def _side_by_side(triples: list[tuple[Tensor, Tensor, Tensor]]) -> tuple[Tensor, Tensor, Tensor]:
    """Several sets of singular triples as one, in float32."""
    import torch

    left, values, right = ([part.float() for part in parts] for parts in zip(*triples, strict=True))
    return torch.cat(left, 1), torch.cat(values), torch.cat(right, 1)


def _orthonormal(directions: Tensor) -> Tensor:
    """The nearest orthonormal columns; what several columns share is shared among them."""
    return polar_factor(directions, _PARALLEL)[0] if directions.shape[1] else directions


@register(aliases=("iso_c",), unit="matrix", promises=frozenset({ORDER_FREE}))
def iso(task_vectors: Tensor, *, scaling_coefficient: Factor = 1.0) -> Tensor:
    """Iso-C: the sum of the task vectors with all singular values made equal (Marczak et al., 2025, arXiv 2502.04959).

    A matrix becomes the polar factor of the sum times the mean of the sum's singular values. Other tensors get the
    mean, not the sum, as in the authors' code: one coefficient serves both scales.

    If the sum has a rank below its shorter side (LoRA experts, experts that cancel), the mean is over the singular
    values that are there and the result has that rank. The authors' code averages over the zeros too and fills the
    null space with directions that the library picks.

    Args:
        task_vectors: ``(experts, rows, columns)`` float32.
        scaling_coefficient: factor on the merged task vector.

    Returns:
        Merged task vector ``(rows, columns)``.
    """
    factor, mean = polar_factor(exact_sum(task_vectors), rounding_floor(task_vectors))
    return factor.mul_(mean * scaling_coefficient)


@register(unit="matrix", promises=frozenset({ORDER_FREE}))
def iso_cts(
    task_vectors: Tensor, *, scaling_coefficient: Factor = 1.0, common_space_fraction: Fraction = 0.8
) -> Tensor:
    """Iso-CTS: Iso-C with the last directions given to each expert's own (Marczak et al., 2025, arXiv 2502.04959).

    The leading directions of the sum are the common space. Of what each expert has outside (its left side projected
    away from the common left directions) the leading directions join them, equally many per expert. All are made
    orthogonal as in TSV-M and get the mean of their singular values. Other tensors get the mean of the task vectors.

    Directions whose singular values are mere rounding are left out and do not count in the mean, as for ``iso``.

    Args:
        task_vectors: ``(experts, rows, columns)`` float32.
        scaling_coefficient: factor on the merged task vector.
        common_space_fraction: share of the directions that come from the sum; the rest is divided among the experts.

    Returns:
        Merged task vector ``(rows, columns)``.
    """
    floor = rounding_floor(task_vectors)
    common_count, own_count = _shares(min(task_vectors.shape[1:]), len(task_vectors), common_space_fraction)
    common = singular_triples(exact_sum(task_vectors), floor, common_count)
    triples = [common]
    if own_count:
        for task_vector in task_vectors:
            outside = task_vector - common[0] @ (common[0].mT @ task_vector.double())
            triples.append(singular_triples(outside, floor, own_count))
    left, values, right = _side_by_side(triples)
    mean = float(values.sum()) / max(1, len(values))
    merged: Tensor = (_orthonormal(left) * (mean * scaling_coefficient)) @ _orthonormal(right).mT
    return merged


def _shares(side: int, experts: int, common_space_fraction: float) -> tuple[int, int]:
    """Number of common directions and of each expert's own, which together are the shorter side of the matrix."""
    wanted = side - int(side * common_space_fraction)
    own = min(round(wanted / experts), side // experts)
    return side - experts * own, own
