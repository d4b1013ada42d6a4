"""Values by their rank, without sorting them all: of one tensor in memory, or of a whole model by streaming."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from decimal import Decimal
from typing import TYPE_CHECKING

from expert_merging.parts import Part
from expert_merging.streaming import Passes

if TYPE_CHECKING:
    from torch import Tensor

# Values are counted by the upper half of their bits first, then by the lower half.
_HALF = 1 << 16


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


def find_values_at(
    passes: Passes, make: Callable[[Tensor, Part], Tensor], places: Sequence[int], rows: int, title: str
) -> Tensor:
    """The same of all values that a function makes of a model's task vectors, in two passes over them.

    Args:
        passes: passes over all task vectors.
        make: ``(task_vectors (experts, entries), part) -> values (rows, entries)`` float32; each row is ranked by
            itself.
        places: as for `values_at`, of as many values as the model has entries.
        rows: number of rows.
        title: shown beside the progress bars.

    Returns:
        The values, ``(rows, places)`` float32. They are exact.
    """
    import torch

    def count_upper(task_vectors: Tensor, part: Part, counts: Tensor) -> None:
        for row, values in zip(counts, make(task_vectors, part), strict=True):
            row += torch.bincount(_keys(values) >> 16, minlength=_HALF).cpu()

    seen = passes.total(count_upper, (rows, _HALF), title).cumsum(1)
    wanted = torch.tensor(places).expand(rows, -1).contiguous()
    upper = torch.searchsorted(seen, wanted, right=True).clamp_(max=_HALF - 1)

    def count_lower(task_vectors: Tensor, part: Part, counts: Tensor) -> None:
        for row, halves, values in zip(counts, upper.tolist(), make(task_vectors, part), strict=True):
            keys = _keys(values)
            for count, half in zip(row, halves, strict=True):
                found = keys[(keys >> 16) == half].bitwise_and_(_HALF - 1).cpu()
                count.scatter_add_(0, found, torch.ones_like(found))

    within = passes.total(count_lower, (rows, len(places), _HALF), title).cumsum(2)
    below = torch.where(upper > 0, seen.gather(1, (upper - 1).clamp(min=0)), 0)
    lower = (within <= (wanted - below)[:, :, None]).sum(2).clamp_(max=_HALF - 1)
    return _values(upper * _HALF + lower)


def _keys(values: Tensor) -> Tensor:
    """Whole numbers below 2**32 in the order of the values, ``(entries,)`` int64: their bits, rearranged."""
    import torch

    bits = values.view(torch.int32)
    # Bits of negative numbers ascend with their magnitude.
    return bits.bitwise_xor((bits >> 31).bitwise_and_(0x7FFFFFFF)).long().add_(1 << 31)


def _values(keys: Tensor) -> Tensor:
    import torch

    bits = (keys - (1 << 31)).to(torch.int32)
    return bits.bitwise_xor((bits >> 31).bitwise_and_(0x7FFFFFFF)).view(torch.float32)
