"""Along what a tensor's coefficients are: runs of its flattened entries, columns, or singular directions of a matrix.

An axis has a plain way, which autograd can follow, and a fast one that works on blocks that begin and end anywhere. The
tests hold the one to the other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import TypeAlias

import torch
from torch import Tensor

from expert_merging.learned import chunks
from expert_merging.methods.spectral import singular_triples
from expert_merging.parts import Part


class Axis:
    """How coefficients ``(experts, count)`` lie over a tensor; the sum of directions, each entry times its coefficient.

    Blocks of directions are ``(experts, entries)``, those of the flattened tensor that a part names.
    """

    def number(self, entries: Tensor, part: Part, count: int) -> Tensor:
        """Which coefficient each of these entries of the flattened tensor has."""
        raise NotImplementedError

    def merge(self, coefficients: Tensor, directions: Tensor, part: Part) -> Tensor:
        """The sum ``(entries,)`` of a block, by operations that autograd can follow."""
        entries = torch.arange(part.start, part.stop, device=coefficients.device)
        return (coefficients[:, self.number(entries, part, coefficients.shape[1])] * directions).sum(0)

    def apply(self, coefficients: Tensor, directions: Tensor, part: Part) -> Tensor:
        """The same, faster."""
        total = torch.zeros_like(directions[0])
        self.add_applied(total, coefficients, directions, part)
        return total

    def add_applied(self, total: Tensor, coefficients: Tensor, directions: Tensor, part: Part) -> None:
        """Add the same to ``total (entries,)``."""
        raise NotImplementedError

    def add_inner_products(self, total: Tensor, gradient: Tensor, directions: Tensor, part: Part) -> None:
        """Add the gradient with respect to the coefficients.

        Args:
            total: ``(experts, count)``, added to.
            gradient: ``(entries,)``, that with respect to the sum.
            directions: ``(experts, entries)``.
            part: which entries they are.
        """
        raise NotImplementedError


class Runs(Axis):
    """Contiguous runs of the flattened tensor, such as its rows; see `expert_merging.learned.chunks`."""

    def number(self, entries: Tensor, part: Part, count: int) -> Tensor:
        """See `Axis.number`."""
        return entries // chunks.chunk_length(part.elements, count)

    def apply(self, coefficients: Tensor, directions: Tensor, part: Part) -> Tensor:
        """See `Axis.apply`."""
        return chunks.apply(coefficients, directions, part.start, part.elements)

    def add_applied(self, total: Tensor, coefficients: Tensor, directions: Tensor, part: Part) -> None:
        """See `Axis.add_applied`."""
        chunks.add_applied(total, coefficients, directions, part.start, part.elements)

    def add_inner_products(self, total: Tensor, gradient: Tensor, directions: Tensor, part: Part) -> None:
        """See `Axis.add_inner_products`."""
        chunks.add_inner_products(total, gradient, directions, part.start, part.elements)


class Columns(Axis):
    """The columns of a matrix ``(outputs, inputs)``, so that each coefficient is on an input."""

    def number(self, entries: Tensor, part: Part, count: int) -> Tensor:
        """See `Axis.number`."""
        del part
        return entries % count

    def add_applied(self, total: Tensor, coefficients: Tensor, directions: Tensor, part: Part) -> None:
        """See `Axis.add_applied`."""
        for entries, columns in _stretches(part):
            width = columns.stop - columns.start
            rows = total[entries].view(-1, width)
            for values, own in zip(coefficients[:, columns], directions[:, entries], strict=True):
                rows.addcmul_(own.view(-1, width), values)

    def add_inner_products(self, total: Tensor, gradient: Tensor, directions: Tensor, part: Part) -> None:
        """See `Axis.add_inner_products`."""
        for entries, columns in _stretches(part):
            width = columns.stop - columns.start
            for sums, own in zip(total[:, columns], directions[:, entries], strict=True):
                sums += (own * gradient[entries]).view(-1, width).sum(0)


def _stretches(part: Part) -> Iterator[tuple[slice, slice]]:
    """A block cut where whole rows begin and end: the entries of each piece, and the columns that they lie in."""
    columns = part.columns
    first, last = -(-part.start // columns) * columns, part.stop // columns * columns
    bounds = [part.start, *([first, last] if first <= last else []), part.stop]
    for start, stop in pairwise(bounds):
        if start < stop:
            column = start % columns
            yield slice(start - part.start, stop - part.start), slice(column, min(columns, column + stop - start))


# ``(directions, part) -> (experts, columns, rank)``: each expert's right singular directions, those of the largest
# singular values first, and zeros for those of singular value 0.
Bases: TypeAlias = Callable[[Tensor, Part], Tensor]


def right_directions(directions: Tensor, part: Part) -> Tensor:
    """The right singular directions of whole matrices.

    In float64, so that they come out the same wherever they are made again.

    Args:
        directions: ``(experts, entries)``, all of the tensor's.
        part: the tensor.

    Returns:
        ``(experts, columns, rank)`` float32, the rank being the smaller of rows and columns.
    """
    found = directions.new_zeros(len(directions), part.columns, min(part.shape))
    for own, matrix in zip(found, directions.view(-1, *part.shape), strict=True):
        right = singular_triples(matrix, 0.0)[2]
        own[:, : right.shape[1]] = right
    return found


class Singular(Axis):
    """Singular directions of each expert's matrix, by which it is ``U diag(c) S V^T = (W V) diag(c) V^T``.

    With the right directions known, that takes whole rows of the matrix and no more.

    Args:
        bases: gives the right directions; by default they are made of the block, which must be the whole matrix.
    """

    def __init__(self, bases: Bases = right_directions) -> None:
        self.bases = bases

    def merge(self, coefficients: Tensor, directions: Tensor, part: Part) -> Tensor:
        """See `Axis.merge`; the block must be of whole rows."""
        total = torch.zeros_like(directions[0]).view(-1, part.columns)
        for values, own, basis in zip(coefficients, directions, self.bases(directions, part), strict=True):
            total = total.addmm((own.view(-1, part.columns) @ basis) * values, basis.mT)
        return total.view(-1)

    def add_applied(self, total: Tensor, coefficients: Tensor, directions: Tensor, part: Part) -> None:
        """See `Axis.add_applied`."""
        total += self.merge(coefficients, directions, part)

    def add_inner_products(self, total: Tensor, gradient: Tensor, directions: Tensor, part: Part) -> None:
        """See `Axis.add_inner_products`."""
        for sums, own, basis in zip(total, directions, self.bases(directions, part), strict=True):
            sums += ((own.view(-1, part.columns) @ basis) * (gradient.view(-1, part.columns) @ basis)).sum(0)


RUNS, COLUMNS = Runs(), Columns()
SINGULAR = "singular"
# By the names that files of coefficients have for those that are not runs.
AXES: dict[str, Axis] = {"columns": COLUMNS, SINGULAR: Singular()}
