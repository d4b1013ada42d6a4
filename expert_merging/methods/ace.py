"""ACE-Merging: regression on the inputs of every expert, whose covariance is guessed from its own task vector.

The covariance of what a layer reads is all that the best linear merge needs to know (RegMean measures it). Without
samples, the rows of a task vector stand for those inputs. All is done in float64 in the space that the rows of all
task vectors span, which is smaller than that of the columns where there are fewer rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from expert_merging.flags import Factor, Interval, Positive
from expert_merging.method import ORDER_FREE, register
from expert_merging.methods.spectral import norms, rounding_floor, singular_triples

if TYPE_CHECKING:
    from torch import Tensor

# Squared coefficient of variation of the experts' log-energies from which their covariances are scaled.
_HETEROGENEOUS = 0.3
# The authors' guard against a logarithm of zero and a trace of zero.
_TINY = 1e-12

Share = Annotated[float, Interval("[0, 1]")]


@dataclass(frozen=True)
class _Experts:
    """Experts that are not zero.

    Args:
        task_vectors: of each, ``(rows, side)`` in an orthonormal basis of so many directions.
        ones: the vector of ones over the columns in that basis, ``(side,)``.
        columns: how many there are.
        ridge: number on the diagonal of a covariance that is not scaled.
        energy: mean of the squared norms where the experts are heterogeneous, otherwise None.
    """

    task_vectors: list[Tensor]
    ones: Tensor
    columns: int
    ridge: float
    energy: float | None

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, float]]:
        """Centred task vector ``(rows, side)``, covariance ``(side, side)`` and ridge of each expert, in float64."""
        for task_vector in self.task_vectors:
            centred = task_vector.double()
            centred = centred - centred.mean(0)
            divisor = 1.0 if self.energy is None else float(centred.square().sum()) + _TINY
            yield centred, (centred.mT @ centred).div_(divisor), self.ridge / divisor

    def regression(self, *, keep: bool) -> tuple[Tensor, Tensor]:
        """The solution by expert, ``(experts, rows, side)``, or its sum ``(1, rows, side)``.

        With it comes the sum of the covariances and their ridges, ``(side, side)``.
        """
        import torch

        total = self.ones.new_zeros(len(self.ones), len(self.ones))
        ridges = 0.0
        terms: list[Tensor] = []
        for centred, covariance, ridge in self:
            term = torch.addmm(centred, centred, covariance, beta=ridge)
            terms = [*terms, term] if keep or not terms else [terms[0].add_(term)]
            total += covariance
            ridges += ridge
        mean_row = total @ self.ones / self.columns
        total.diagonal().add_(ridges)
        prior = torch.outer(self.ones, mean_row if self.energy is None else mean_row / (self.energy + _TINY))
        stacked = torch.cat(terms)
        return torch.linalg.solve(total + prior, stacked, left=False).view(len(terms), -1, len(self.ones)), total

    def refined(self, terms: Tensor, total: Tensor, leading_share: float, *, keep: bool) -> Tensor:
        """The solution's terms and their shares of the leading directions of what the experts have of their own.

        These directions are of the solution and the residual, and get the mean of their singular values.
        """
        import torch

        mean = total / len(self.task_vectors)
        pairs = zip(self.task_vectors, self, strict=True)
        residuals = (own.double() @ (covariance - mean) for own, (_, covariance, _) in pairs)
        fused = terms + (torch.stack([*residuals]) if keep else sum(residuals))
        whole = fused.sum(0)
        count = int(min(whole.shape[0], self.columns) * leading_share)
        _, values, right = singular_triples(whole, rounding_floor(whole[None]), count)
        # The polar factor of the leading part of a matrix is that matrix times this, which is linear in the matrix.
        return terms + fused @ (right / values * (values.mean() if len(values) else 0.0)) @ right.mT


def _merge(
    task_vectors: Tensor, *, scaling_coefficient: float, ace_ridge: float, leading_share: float, keep: bool
) -> Tensor:
    """What each expert adds, ``(experts, rows, columns)`` float32, or the sum of it, ``(1, rows, columns)``."""
    import torch

    sizes = norms(task_vectors)
    present = sizes > 0
    merged = torch.zeros_like(task_vectors if keep else task_vectors[:1])
    if not present.any():
        return merged
    given, basis, ones = _in_row_space(
        [own for own, is_present in zip(task_vectors, present, strict=True) if is_present]
    )
    energies = sizes[present].square()
    logs = (energies + _TINY).log()
    spread = float(logs.var() / (logs.mean().square() + _TINY)) if len(logs) > 1 else 0.0
    energy = float(energies.mean()) if spread > _HETEROGENEOUS else None
    experts = _Experts(given, ones, task_vectors.shape[2], ace_ridge, energy)
    terms, total = experts.regression(keep=keep)
    if energy is not None:
        terms = experts.refined(terms, total, leading_share, keep=keep)
    terms = terms if basis is None else terms @ basis.mT
    merged[present if keep else slice(None)] = (terms * scaling_coefficient).float()
    return merged


def _in_row_space(task_vectors: list[Tensor]) -> tuple[list[Tensor], Tensor | None, Tensor]:
    """Task vectors and the vector of ones in a basis of the space of all rows, where that is smaller.

    Returns:
        ``(rows, side)`` of each, the basis ``(columns, side)``, None for the columns' own, and ``(side,)`` float64.
    """
    import torch

    rows, columns = task_vectors[0].shape
    ones = task_vectors[0].new_ones(columns, dtype=torch.float64)
    if len(task_vectors) * rows + 1 >= columns:
        return task_vectors, None, ones
    basis = torch.linalg.qr(torch.cat([*task_vectors, ones[None]]).mT).Q
    return [own.double() @ basis for own in task_vectors], basis, ones @ basis


def ace_parts(task_vectors: Tensor, *, scaling_coefficient: float, ace_ridge: float, leading_share: float) -> Tensor:
    """What each expert adds to ACE-Merging's result, ``(experts, rows, columns)``: it is linear but for what is shared.

    Args:
        task_vectors: ``(experts, rows, columns)`` float32.
        scaling_coefficient: factor on the merged task vector.
        ace_ridge: as `ace` has it.
        leading_share: as `ace` has it.
    """
    options = {"scaling_coefficient": scaling_coefficient, "ace_ridge": ace_ridge, "leading_share": leading_share}
    return _merge(task_vectors, **options, keep=True)


@register(unit="matrix", promises=frozenset({ORDER_FREE}), parts=ace_parts)
def ace(
    task_vectors: Tensor,
    *,
    scaling_coefficient: Factor = 1.0,
    ace_ridge: Positive = 0.01,
    leading_share: Share = 0.3,
) -> Tensor:
    """ACE-Merging: regression on inputs guessed from task vectors (Xu et al., 2026, arXiv 2603.02945).

    With X an expert's task vector less its mean row, ``X.T @ X`` is its covariance. The result is the sum of
    ``X @ (X.T @ X + ridge)`` over the experts times the inverse of the sum of these covariances and of a matrix whose
    rows all are the mean row of that sum without ridges. Where the logarithms of the experts' squared norms have a
    variance above 0.3 times their squared mean, each covariance and its ridge are divided by the trace, and the leading
    directions of the result and a residual are added, all with the mean of their singular values.

    As in the authors' code, mean rows have no part in the result, the ridge is in units of squared weights, and so the
    result does not scale with the task vectors. Other than there, task vectors that are zero are left out (divided by
    their trace, they would outweigh all others), and so are directions whose singular values are mere rounding.

    Args:
        task_vectors: ``(experts, rows, columns)`` float32.
        scaling_coefficient: factor on the merged task vector.
        ace_ridge: number on the diagonal of each covariance.
        leading_share: share of the directions that experts of different scale are refined along.

    Returns:
        Merged task vector ``(rows, columns)``.
    """
    options = {"scaling_coefficient": scaling_coefficient, "ace_ridge": ace_ridge, "leading_share": leading_share}
    return _merge(task_vectors, **options, keep=False)[0]
