"""Which entries of which tensor are worked on."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple


class Part(NamedTuple):
    """A run of entries of a flattened tensor.

    Args:
        name: tensor name.
        shape: shape of the whole tensor.
        start: first entry.
        stop: end of the entries.
    """

    name: str
    shape: tuple[int, ...]
    start: int
    stop: int

    @classmethod
    def whole(cls, name: str, shape: tuple[int, ...]) -> Part:
        """All of a tensor."""
        return cls(name, shape, 0, math.prod(shape))

    @property
    def elements(self) -> int:
        """Number of entries of the whole tensor."""
        return math.prod(self.shape)

    @property
    def entries(self) -> int:
        """Number of entries of the part."""
        return self.stop - self.start

    @property
    def columns(self) -> int:
        """Number of entries of a row: the last dimension; a vector is one row."""
        return self.shape[-1] if self.shape else 1

    def whole_rows(self, entries: int) -> int:
        """Entries of as many whole rows of the tensor as so many entries have room for, at least one."""
        return max(1, self.columns, entries - entries % max(1, self.columns))

    def between(self, start: int, stop: int) -> Part:
        """Other entries of the same tensor."""
        return self._replace(start=start, stop=stop)

    def cut(self, length: int) -> Iterator[Part]:
        """The part in runs of so many entries, the last one perhaps shorter; none of no entries."""
        for start in range(self.start, self.stop, length):
            yield self._replace(start=start, stop=min(start + length, self.stop))
