"""RegMean: the matrix whose outputs are nearest to those of all experts, each on inputs of its own."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

from expert_merging.flags import Interval
from expert_merging.parts import Part
from expert_merging.running.options import SampleOptions
from expert_merging.statistics.gathering import merge_around_mean, register_on_grams

if TYPE_CHECKING:
    from torch import Tensor

    from expert_merging.statistics.gram import Gram, Grams

# Weight of the pull towards the mean, as a fraction of every input's mean square. Sums of outer products in float32
# have errors of up to 5e-5 of it for the widest layers there are; this keeps them out of the result.
_RIDGE = 1e-4


@dataclass(frozen=True, kw_only=True)
class RegMeanOptions(SampleOptions):
    """Options of RegMean.

    Args:
        reduce_non_diagonal_ratio: factor on the entries of the Gram matrices beside the diagonal, from 0 (each input
            for itself) to 1 (as they are).
    """

    reduce_non_diagonal_ratio: Annotated[float, Interval("[0, 1]")] = 0.9


@register_on_grams("regmean", RegMeanOptions)
def regmean(task_vectors: Tensor, part: Part, grams: Grams, *, reduce_non_diagonal_ratio: float = 0.9) -> Tensor:
    """Least squares between outputs on each expert's own samples (Jin et al., 2023, arXiv 2212.09849).

    ``W = (sum_k W_k G_k) (sum_k G_k)^-1`` with ``G_k`` the mean of ``x x^T`` over inputs ``x`` of expert k's samples
    (section 3.3, for ``W`` of shape ``(outputs, inputs)``), entries beside its diagonal times the given factor. It is
    the mean over tokens, so that an expert with longer samples does not count for more.

    Where the data do not say what to do, the result stays near the experts' mean: changes are measured from it, and
    pulled back with a weight of 1e-4 of each input's mean square. The paper inverts the sum, which is singular at a
    factor of 1 and fewer tokens than inputs. An expert whose samples never come by a layer, such as a projector of
    pictures, has no say in it beyond the mean. All that is no linear layer's matrix gets the mean, as published; so
    does the output head, where it is merged at all.

    Args:
        task_vectors: ``(experts, outputs, inputs)``.
        part: the tensor.
        grams: each expert's Gram matrices.
        reduce_non_diagonal_ratio: factor on entries beside the diagonal, in [0, 1].

    Returns:
        Merged task vector ``(outputs, inputs)``.
    """
    return merge_around_mean(task_vectors, part, grams, lambda given: least_squares(given, reduce_non_diagonal_ratio))


def least_squares(deviations: Iterable[tuple[Tensor, Gram]], ratio: float) -> Tensor:
    """``(sum_k D_k G_k) (sum_k G_k + ridge)^-1`` with reduced Gram matrices, in float64.

    Args:
        deviations: deviation ``(outputs, inputs)`` and Gram matrix of each expert, each held while it is added.
        ratio: factor on entries beside the diagonals.
    """
    import torch

    products: Any = 0
    diagonal: Any = 0
    grams = []
    for deviation, gram in deviations:
        squares = gram.diagonal(deviation.device)
        own = gram.product(deviation).mul_(ratio).addcmul_(deviation, squares, value=1 - ratio)
        products, diagonal = own.add_(products), squares.add_(diagonal)
        grams.append(gram)
    # An input that is always 0 has no column to solve for; any number does.
    loading = torch.where(diagonal > 0, (1 - ratio + _RIDGE) * diagonal, 1.0)
    if not any(gram.is_summed for gram in grams) and sum(gram.vectors for gram in grams) < len(diagonal):
        rows = torch.cat([gram.rows(diagonal.device) for gram in grams])
        return _solve_by_vectors(products, loading, rows, ratio)
    total = torch.diag(loading)
    for gram in grams:
        total.add_(gram.matrix(diagonal.device), alpha=ratio)
    return torch.cholesky_solve(products.T, torch.linalg.cholesky(total)).T


def _solve_by_vectors(products: Tensor, loading: Tensor, rows: Tensor, ratio: float) -> Tensor:
    """``products (diag(loading) + ratio rows^T rows)^-1`` by a matrix of the size of the vectors (Woodbury).

    Args:
        products: ``(outputs, inputs)``.
        loading: ``(inputs,)``, above 0.
        rows: ``(vectors, inputs)``, fewer than inputs.
        ratio: factor.
    """
    import torch

    scaled = rows / loading
    small = (scaled @ rows.T).mul_(ratio)
    small.diagonal().add_(1)
    inner = torch.cholesky_solve((products @ scaled.T).T, torch.linalg.cholesky(small)).T
    return products.div_(loading).sub_(inner @ scaled, alpha=ratio)
