"""Values by their rank, without sorting them all: of one tensor in memory, or of a whole model by streaming."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from decimal import Decimal
from typing import TYPE_CHECKING

from expert_merging.parts import Part
from expert_merging.streaming import Passes

if TYPE_CHECKING:
    from torch import Tensor

# Values are counted by the upper half of their bits first, then by the lower half.
_HALF = 1 << 16
# Which of the two halves in memory is the upper one.
_UPPER = 1 if sys.byteorder == "little" else 0


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
    import numpy
    import torch

    def count_upper(task_vectors: Tensor, part: Part, counts: Tensor) -> None:
        for row, values in zip(counts.numpy(), make(task_vectors, part).cpu().numpy(), strict=True):
            row += numpy.bincount(values.view(numpy.uint16)[_UPPER::2], minlength=_HALF)

    seen = _ascending(passes.total(count_upper, (rows, _HALF), title)).cumsum(1)
    wanted = torch.tensor(places).expand(rows, -1).contiguous()
    upper = torch.searchsorted(seen, wanted, right=True).clamp_(max=_HALF - 1)
    patterns = _ascending(torch.arange(_HALF))[upper]

    def count_lower(task_vectors: Tensor, part: Part, counts: Tensor) -> None:
        made = make(task_vectors, part).cpu().numpy().view(numpy.uint32)
        for row, halves, bits in zip(counts.numpy(), patterns.tolist(), made, strict=True):
            for count, half in zip(row, halves, strict=True):
                found = bits[(bits >> 16) == half] & (_HALF - 1)
                numpy.add.at(count, found, 1)

    within = passes.total(count_lower, (rows, len(places), _HALF), title)
    is_negative = patterns >= _HALF // 2
    within = torch.where(is_negative[:, :, None], within.flip(2), within).cumsum(2)
    below = torch.where(upper > 0, seen.gather(1, (upper - 1).clamp(min=0)), 0)
    lower = (within <= (wanted - below)[:, :, None]).sum(2).clamp_(max=_HALF - 1)
    bits = patterns * _HALF + torch.where(is_negative, _HALF - 1 - lower, lower)
    return torch.from_numpy(bits.numpy().astype(numpy.uint32).view(numpy.float32))


def _ascending(by_bits: Tensor) -> Tensor:
    """What is ordered by the upper halves of the bits of values, ``(..., 65536)``, in the order of the values.

    Bits of negative numbers come after those of others, and ascend with their magnitude.
    """
    import torch

    return torch.cat([by_bits[..., _HALF // 2 :].flip(-1), by_bits[..., : _HALF // 2]], -1)
