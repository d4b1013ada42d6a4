"""What a LoRA adapter makes of a tensor, computed as it is read: ``start + scale * left @ right``, in float32.

Rows are computed in tiles that begin at multiples of a fixed number of rows. So an entry has the same bits whichever
block it is read with, and no more than a tile is computed for a block beside the block itself.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, TypeAlias

from expert_merging.checkpoints.checkpoint import Entry

if TYPE_CHECKING:
    from torch import Tensor

# ``(tensor in a file, first entry, end) -> entries (end - first,)`` of the flattened tensor, float32.
Read: TypeAlias = Callable[[Entry, int, int], "Tensor"]

# Entries of a tile, or one row where a row is longer: with fewer, fetching the right matrix again for each tile takes
# longer than multiplying (1 << 16 took three times as long at rank 64).
TILE = 1 << 18


@dataclass(frozen=True)
class Matrix:
    """A tensor of a file as a matrix, whose columns are all dimensions but the first.

    Args:
        entry: where it is.
        transposed: rows and columns are exchanged.
    """

    entry: Entry
    transposed: bool = False

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns."""
        rows, columns = self._stored
        return (columns, rows) if self.transposed else (rows, columns)

    @property
    def _stored(self) -> tuple[int, int]:
        return prod(self.entry.shape[:1]), prod(self.entry.shape[1:])

    def whole(self, read: Read) -> Tensor:
        """All of it, ``(rows, columns)`` float32."""
        stored = read(self.entry, 0, self.entry.elements).view(self._stored)
        return stored.T if self.transposed else stored

    def rows(self, first: int, last: int, read: Read) -> Tensor:
        """Some rows, ``(last - first, columns)`` float32."""
        import torch

        rows, columns = self.shape
        if not self.transposed:
            return read(self.entry, first * columns, last * columns).view(-1, columns)
        return torch.stack(
            [read(self.entry, column * rows + first, column * rows + last) for column in range(columns)], 1
        )


@dataclass(frozen=True)
class Change:
    """What an adapter does to a tensor.

    Args:
        left: ``(rows, rank)``.
        right: ``(rank, columns)``; None where ``left`` is the whole change.
        scale: factor on their product.
        magnitude: DoRA's norms of the result's rows or columns; None without DoRA.
        by_columns: they are the columns': these are the outputs where the file has the weight transposed, and each is
            a feature of an embedding.
    """

    left: Matrix
    right: Matrix | None
    scale: float
    magnitude: Entry | None = None
    by_columns: bool = False


class Adapted:
    """A tensor that an adapter changes.

    Args:
        start: the tensor before.
        read: reads from files.
        change: what is added; None where only rows are replaced.
        tokens: numbers of rows that are replaced.
        replacing: ``(tokens, columns)`` what they are replaced with.
    """

    def __init__(
        self,
        start: Entry,
        read: Read,
        change: Change | None,
        tokens: Sequence[int] = (),
        replacing: Entry | None = None,
    ) -> None:
        self.start = Matrix(start)
        self.read = read
        self.change = change
        self.tokens = {token: number for number, token in enumerate(tokens)}
        self.replacing = replacing
        self._norms: Tensor | None = None
        self._lock = threading.Lock()

    def fill(self, block: Tensor, start: int) -> None:
        """Fill a block ``(entries,)`` of float32 with entries of the flattened tensor, from ``start`` on."""
        columns, stop = self.start.shape[1], start + len(block)
        for first, rows in self._tiles(start // max(1, columns), -(-stop // max(1, columns))):
            entries, begin = rows.reshape(-1), first * columns
            low, high = max(start, begin), min(stop, begin + len(entries))
            block[low - start : high - start] = entries[low - begin : high - begin]

    def _tiles(self, first: int, last: int) -> Iterator[tuple[int, Tensor]]:
        """The tiles with some rows, each with the number of its first row."""
        change = self.change
        right = None if change is None or change.right is None else change.right.whole(self.read)
        for number, rows in self._sums(first, last, right):
            if change is not None and change.magnitude is not None:
                rows.mul_(self._factors(change, change.magnitude, number, rows, right))
            self._replace(number, rows)
            yield number, rows

    def _sums(self, first: int, last: int, right: Tensor | None) -> Iterator[tuple[int, Tensor]]:
        """The tiles before DoRA's norms change them."""
        height, columns = self.start.shape
        tile = max(1, TILE // max(1, columns))
        for number in range(first // tile * tile, last, tile):
            end = min(number + tile, height)
            rows = self.start.rows(number, end, self.read)
            if self.change is not None:
                left = self.change.left.rows(number, end, self.read)
                rows.add_((left if right is None else left @ right).mul_(self.change.scale))
            yield number, rows

    def _factors(self, change: Change, magnitude: Entry, first: int, rows: Tensor, right: Tensor | None) -> Tensor:
        """What DoRA multiplies rows with: ``(rows, 1)``, or ``(1, columns)`` for norms of columns."""
        import torch

        if change.by_columns:
            return (self.read(magnitude, 0, magnitude.elements) / self._column_norms(right))[None]
        norms: Tensor = torch.linalg.norm(rows, dim=1)
        return (self.read(magnitude, first, first + len(rows)) / norms)[:, None]

    def _column_norms(self, right: Tensor | None) -> Tensor:
        """Norms of all columns, ``(columns,)``, which take a pass over the tensor; it is made once."""
        import torch

        with self._lock:
            if self._norms is None:
                squares = torch.zeros(self.start.shape[1], dtype=torch.float64)
                for _, rows in self._sums(0, self.start.shape[0], right):
                    squares.add_(rows.double().square_().sum(0))
                self._norms = squares.sqrt_().float()
            return self._norms

    def _replace(self, first: int, rows: Tensor) -> None:
        if self.replacing is None:
            return
        columns = self.start.shape[1]
        for row in range(first, first + len(rows)):
            if row in self.tokens:
                place = self.tokens[row] * columns
                rows[row - first] = self.read(self.replacing, place, place + columns)
