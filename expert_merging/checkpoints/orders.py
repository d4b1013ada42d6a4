"""A model's units in another order: rows and columns of its tensors are put in their places as they are read."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

# Entries that are put in order at a time, or one row where a row is longer.
_TILE = 1 << 18


@dataclass(frozen=True)
class Order:
    """Which of a stored tensor's rows and columns stand where.

    Args:
        rows: ``(rows,)`` number of the stored row for each row; None where all are in their places. Of a vector, its
            entries count as rows.
        columns: ``(columns,)`` the same of columns, of a matrix.
    """

    rows: Tensor | None = None
    columns: Tensor | None = None

    def key(self) -> str:
        """A text that other orders do not have."""
        return str([None if way is None else way.tolist() for way in (self.rows, self.columns)])

    def fill(self, block: Tensor, shape: tuple[int, ...], start: int, read: Callable[[Tensor, int], None]) -> None:
        """Fill a block ``(entries,)`` with entries of the flattened tensor in this order.

        Args:
            block: of the file's type.
            shape: the tensor's.
            start: first entry.
            read: ``(block, start)`` fills a block with entries in the stored order.
        """
        width, stop = prod(shape[1:]), start + len(block)
        tile = max(1, _TILE // width)
        for first in range(start // width, -(-stop // width), tile):
            last = min(first + tile, -(-stop // width))
            entries = self._rows(block.new_empty(last - first, width), first, shape, read).reshape(-1)
            low, high = max(start, first * width), min(stop, last * width)
            block[low - start : high - start] = entries[low - first * width : high - first * width]

    def _rows(self, rows: Tensor, first: int, shape: tuple[int, ...], read: Callable[[Tensor, int], None]) -> Tensor:
        """Fill rows ``(rows, width)`` from the ``first`` one on, and put their columns in order."""
        width = rows.shape[1]
        if self.rows is None:
            read(rows.view(-1), first * width)
        elif len(shape) == 1:  # a run for each entry would be read
            whole = rows.new_empty(shape[0])
            read(whole, 0)
            rows[:, 0] = whole[self.rows[first : first + len(rows)]]
        else:
            for place, source, count in _runs(self.rows[first : first + len(rows)].tolist()):
                read(rows[place : place + count].view(-1), source * width)
        return rows if self.columns is None else rows[:, self.columns]


def _runs(sources: list[int]) -> Iterator[tuple[int, int, int]]:
    """Runs of rows that are stored one after the other: place of the first, number where it is stored, and length."""
    place = 0
    while place < len(sources):
        count = 1
        while place + count < len(sources) and sources[place + count] == sources[place] + count:
            count += 1
        yield place, sources[place], count
        place += count
