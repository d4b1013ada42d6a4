"""Matrices that are given as a product of two thin ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Factors:
    """A matrix of low rank.

    Args:
        left: ``(rows, rank)``.
        right: ``(rank, columns)``, of the same type and on the same device.
    """

    left: Tensor
    right: Tensor

    @classmethod
    def sum_of(cls, products: Sequence[Factors]) -> Factors:
        """The sum of several matrices, whose rank is that of all together."""
        import torch

        return cls(torch.cat([one.left for one in products], 1), torch.cat([one.right for one in products]))

    @property
    def rank(self) -> int:
        """Number of columns of the left factor; the rank is that at most."""
        return self.left.shape[1]

    @property
    def turned(self) -> Factors:
        """The transposed matrix."""
        return Factors(self.right.mT, self.left.mT)

    def whole(self) -> Tensor:
        """The matrix itself, ``(rows, columns)``."""
        return self.left @ self.right

    def entries(self, start: int, stop: int) -> Tensor:
        """Entries ``[start, stop)`` of the flattened matrix, ``(stop - start,)``."""
        columns = self.right.shape[1]
        first = start // columns
        rows = self.left[first : -(-stop // columns)] @ self.right
        return rows.view(-1)[start - first * columns : stop - first * columns]

    def scaled(self, factor: float) -> Factors:
        """The matrix times a number."""
        return Factors(self.left * factor, self.right)

    def cut(self, rank: int) -> Factors:
        """The nearest matrix of that rank: the strongest singular directions, found between the two factors."""
        from expert_merging.methods.spectral import singular_triples

        if self.rank <= rank:
            return self
        left, left_sizes, inner_left = singular_triples(self.left, 0.0)
        inner_right, right_sizes, right = singular_triples(self.right, 0.0)
        between = left_sizes[:, None] * (inner_left.mT @ inner_right) * right_sizes
        if not between.any():
            return Factors(self.left[:, :rank] * 0, self.right[:rank])
        first, sizes, second = singular_triples(between, 0.0, rank)
        return Factors(left @ (first * sizes), second.mT @ right.mT)

    def padded(self, rank: int) -> Factors:
        """The same matrix with factors of that rank, filled with zeros."""
        import torch

        more = rank - self.rank
        pad = torch.nn.functional.pad
        return Factors(pad(self.left, (0, more)), pad(self.right, (0, 0, 0, more)))

    def on_cpu(self) -> Factors:
        """The factors in the host's memory."""
        return Factors(self.left.cpu(), self.right.cpu())

    def single(self) -> Factors:
        """The factors in float32."""
        return Factors(self.left.float(), self.right.float())
