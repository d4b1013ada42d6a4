"""Values by their rank among all of a tensor, without sorting them all."""

from __future__ import annotations

from collections.abc import Sequence
from decimal import Decimal
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def count_of(share: float, entries: int) -> int:
    """How many entries a share of them is, rounded down; in decimals, so that a tenth of ten entries is one entry."""
    return int(Decimal(str(share)) * entries)


def values_at(values: Tensor, places: Sequence[int]) -> list[float]:
    """The values that are at some places of all, from the smallest on.

    Args:
        values: any shape, float32.
        places: numbers from 0 to the number of values less one.
    """
    if values.is_cuda:
        ordered = values.flatten().sort().values
        return [float(ordered[place]) for place in places]
    import numpy

    # numpy's partition takes a fraction of the time of torch's `kthvalue`, and finds several places at once.
    parted = numpy.partition(values.flatten().numpy(), sorted(set(places)))
    return [float(parted[place]) for place in places]
