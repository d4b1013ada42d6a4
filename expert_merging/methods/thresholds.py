"""What TIES needs to know of the whole model: each expert's trim threshold and the sign of the majority.

One pass over all task vectors finds both. Before it, a sample tells between which two magnitudes an expert's threshold
lies; nearly every entry is below the lower one or not below the upper one, so that it can be trimmed, and vote, at
once. How each of the few others would change a vote is kept: in a table by magnitude where it is the only undecided
one of its column, otherwise together with the column, one entry of each expert. When everything is counted, the
thresholds are known, and with them which of those entries are kept. Another pass for the votes would be a hundred lines
shorter and take a quarter more of the processor (`ties`, five experts of 275M parameters: 12.2 s against 15.4).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from decimal import Decimal
from typing import TYPE_CHECKING, Any

from expert_merging.arithmetic import weighted_sum
from expert_merging.errors import InputError
from expert_merging.parts import Part
from expert_merging.streaming import Passes

if TYPE_CHECKING:
    from torch import Tensor


Change = Callable[["Tensor", Part], "Tensor"]

# Magnitudes of a sample are told apart among the bit patterns of three values of the upper 16 bits, from the one before
# that of the rank that is looked for: 2 % of a magnitude and some 1 % of the entries.
_RANGE = 3 << 16
# A sample has this share of the entries; of fewer entries than these, it would tell less than it saves.
_SAMPLE = 16
_SAMPLED = 1 << 22
# Ranks by which a sample may be wrong, times the square root of its size. Forty standard deviations of independent
# entries, as entries side by side are alike.
_SLACK = 16
# Bytes of columns that are kept, by all processes together; if there are more, another pass counts the votes.
_KEPT_BYTES = 1 << 25

_INFINITY = 0x7F800000  # its bits

# Counts of an expert before those by bit pattern: entries below and up to its bounds; and in the first expert's row the
# votes, and the number of columns.
_HEADS = 4


def trim(task_vectors: Tensor, thresholds: Tensor) -> Tensor:
    """Set entries with a smaller magnitude than their expert's threshold to zero, in place.

    Args:
        task_vectors: ``(experts, *shape)``.
        thresholds: ``(experts,)``.

    Returns:
        The task vectors themselves.
    """
    import torch

    # hardshrink keeps what is *above* its bound: the next smaller number makes that "not below the threshold".
    bounds = torch.nextafter(thresholds, torch.tensor(-torch.inf)).tolist()
    for row, bound in zip(task_vectors, bounds, strict=True):
        torch.ops.aten.hardshrink.out(row, bound, out=row)
    return task_vectors


def elected_signs(trimmed: Tensor, majority: float = 0.0) -> Tensor:
    """Sign of the sum over experts, ``(*shape)``; the majority's sign where the sum is zero."""
    import torch

    signs = weighted_sum(trimmed, [1.0] * len(trimmed)).sign_()
    if not majority:
        return signs
    # A sign's square is 0 where the sign is, and 1 elsewhere: sign + majority * (1 - sign ** 2). For 131072 entries it
    # takes 32 us on one core, and `masked_fill_`, whose mask is of another type, 555.
    return signs.add_(torch.addcmul(signs.new_tensor(majority), signs, signs, value=-majority))


def find_thresholds(passes: Passes, change: Change, density: float, only: str | None = None) -> tuple[Tensor, float]:
    """Magnitude of the k-th smallest entry of every expert, k = floor((1 - density) * entries), and the majority.

    Both are exact: where the pass shows that the sample was wrong, all entries take its place. Nothing of the size of a
    model is kept.

    Args:
        passes: passes over all task vectors.
        change: applied to task vectors first.
        density: fraction of entries to keep, in (0, 1].
        only: a single tensor instead of all together.

    Returns:
        Thresholds ``(experts,)`` float32, where an entry is kept if its magnitude is not smaller; and which sign more
        sums of kept entries have: 1, -1, or 0 for neither.
    """
    import torch

    sizes, experts = passes.sizes, len(passes.expert_names)
    entries = sizes[only] if only else sum(sizes.values())
    # In decimals, so that a tenth of ten entries is one entry.
    rank = int((1 - Decimal(str(density))) * entries)
    zero = torch.zeros(experts, dtype=torch.int64)
    for share in (_SAMPLE, 1) if entries >= _SAMPLED else (1,):
        low, high = _bracket(passes, change, rank, entries, only, share) if rank else (zero, zero)
        counted = _count(passes, change, low, high, only)
        if counted.confirms(rank):
            break
    else:
        raise InputError("the checkpoints have changed while they were read")
    found = counted.patterns(rank)
    majority = counted.majority(passes, found)
    if majority is None:
        majority = _count(passes, change, found, found, only).majority(passes, found)
    assert majority is not None  # noqa: S101  (nothing was undecided)
    return _magnitudes(found), majority


def _bracket(
    passes: Passes, change: Change, rank: int, entries: int, only: str | None, sample: int
) -> tuple[Tensor, Tensor]:
    """Two bit patterns for every expert, ``(experts,)`` int64, between which a sample has the magnitude of a rank.

    The rank is one of so many entries; a sample of all of them gives that magnitude itself, twice.
    """
    import torch

    experts = len(passes.expert_names)

    def count_upper(task_vectors: Tensor, part: Part, counts: Tensor) -> None:
        for row, task_vector in zip(counts, change(task_vectors, part), strict=True):
            row += torch.bincount(_magnitude_bits(task_vector).bitwise_right_shift_(16), minlength=len(row)).cpu()

    seen = passes.total(count_upper, (experts, 1 << 15), "sampling magnitudes", only, sample).cumsum(1)
    size = int(seen[0, -1])
    near = max(1, rank * size // entries)
    lowest = ((seen < near).sum(1) - 1).clamp_(min=0) << 16

    def count_range(task_vectors: Tensor, part: Part, counts: Tensor) -> None:
        for row, task_vector, low in zip(counts, change(task_vectors, part), lowest.tolist(), strict=True):
            below, _, places = _between(task_vector, low, min(low + _RANGE, _INFINITY))
            row[0] += below
            offsets = _magnitude_bits(task_vector.index_select(0, places)).long().cpu() - (low - 1)
            row.scatter_add_(0, offsets, torch.ones_like(offsets))

    counted = passes.total(count_range, (experts, 1 + _RANGE), "sampling near thresholds", only, sample).cumsum(1)

    def pattern(sampled_rank: int) -> Tensor:
        return lowest + (counted[:, 1:] < sampled_rank).sum(1).clamp_(max=_RANGE - 1)

    slack = 0 if sample == 1 else int(_SLACK * math.sqrt(size))
    return pattern(max(1, near - slack)), pattern(min(size, near + slack))


def _magnitude_bits(task_vector: Tensor) -> Tensor:
    """The bits of the magnitudes, ``(entries,)`` int32, which are ordered like the magnitudes themselves."""
    import torch

    return task_vector.abs().view(torch.int32)


def _between(task_vector: Tensor, low: int, high: int) -> tuple[int, int, Tensor]:
    """How many magnitudes are below one bit pattern, how many are not above another, and the places between.

    Places ``(found,)`` int64 have magnitudes from the first pattern to the other, that not included.
    """
    # numpy compares and selects several times faster than torch does, but on a CPU alone.
    return (_between_by_numpy if task_vector.device.type == "cpu" else _between_by_torch)(task_vector, low, high)


def _between_by_torch(task_vector: Tensor, low: int, high: int) -> tuple[int, int, Tensor]:
    import torch

    bits = _magnitude_bits(task_vector)
    places = ((bits >= low) & (bits < high)).nonzero().flatten()
    below, up_to = torch.stack([(bits < low).sum(), (bits <= high).sum()]).tolist()
    return below, up_to, places


def _between_by_numpy(task_vector: Tensor, low: int, high: int) -> tuple[int, int, Tensor]:
    import numpy
    import torch

    magnitudes = numpy.abs(task_vector.numpy())
    bounds = numpy.array([low, high], dtype=numpy.int32).view(numpy.float32)
    are_below, are_up_to = magnitudes < bounds[0], magnitudes <= bounds[1]
    below = int(numpy.count_nonzero(are_below))
    if low == high:
        return below, int(numpy.count_nonzero(are_up_to)), torch.empty(0, dtype=torch.int64)
    places_up_to = (are_below ^ are_up_to).nonzero()[0]
    between = places_up_to[magnitudes[places_up_to] < bounds[1]]
    return below, below + len(places_up_to), torch.from_numpy(between)


@dataclass(frozen=True)
class _Counted:
    """What a pass has counted; an entry is undecided if its magnitude is not below ``low`` but below ``high``.

    Args:
        low: bit pattern for each expert, ``(experts,)`` int64.
        high: the same.
        below: number of entries whose magnitude is below ``low``, ``(experts,)``.
        up_to: number of entries whose magnitude is not above ``high``.
        votes: sum of the signs that are elected if undecided entries are trimmed.
        undecided: number of undecided entries by bit pattern above ``low``, ``(experts, width)``.
        changes: what those that are alone in their column add to the votes if they are kept, likewise.
        columns: the others' columns, numpy arrays ``(found, experts)``, seen by this process; None if they were too
            many for one.
    """

    low: Tensor
    high: Tensor
    below: Tensor
    up_to: Tensor
    votes: int
    undecided: Tensor
    changes: Tensor
    columns: list[Any] | None

    def confirms(self, rank: int) -> bool:
        """Whether every expert's magnitude of that rank lies between its bounds."""
        return not rank or bool((self.below < rank).all() and (self.up_to >= rank).all())

    def patterns(self, rank: int) -> Tensor:
        """Bit patterns of the magnitudes of that rank, ``(experts,)`` int64."""
        seen = self.below[:, None] + self.undecided.cumsum(1)
        return self.low + (seen < rank).sum(1).minimum(self.high - self.low)

    def majority(self, passes: Passes, patterns: Tensor) -> float | None:
        """The sign that is elected more often with these thresholds; None if columns that matter are not known."""
        import torch

        if self.columns is None:
            return None
        own = torch.zeros((), dtype=torch.int64)
        for columns in self.columns:
            rows = torch.from_numpy(columns).T
            own += elected_signs(trim(rows.clone(), _magnitudes(patterns))).long().sum()
            own -= elected_signs(trim(rows.clone(), _magnitudes(self.high))).long().sum()
        kept = torch.arange(self.changes.shape[1]) >= (patterns - self.low)[:, None]
        votes = self.votes + int(self.changes[kept].sum()) + int(passes.processes.add(own))
        return float((votes > 0) - (votes < 0))


def _magnitudes(patterns: Tensor) -> Tensor:
    import torch

    return patterns.to(torch.int32).view(torch.float32)


def _count(passes: Passes, change: Change, low: Tensor, high: Tensor, only: str | None) -> _Counted:
    import torch

    experts, width = len(low), int((high - low).max())
    bounds, most = _magnitudes(high), _KEPT_BYTES // (4 * experts)
    kept: list[Any] = []

    def count(task_vectors: Tensor, part: Part, counts: Tensor) -> Any:
        rows = change(task_vectors, part)
        found = [_between(row, *ends) for row, *ends in zip(rows, low.tolist(), high.tolist(), strict=True)]
        counts[:, :2] += torch.tensor([[below, up_to] for below, up_to, _ in found])
        places = [places for _, _, places in found]
        values = [row.index_select(0, own) for row, own in zip(rows, places, strict=True)]  # before they are trimmed
        signs = elected_signs(trim(rows, bounds))
        counts[0, 2] += int(signs.sum())  # exact in float32, since a block has fewer entries than 2**24
        if not any(map(len, places)):
            return None
        undecided = _Undecided.of(rows, signs, places, values)
        undecided.count(counts.numpy(), low.numpy())
        several = None if counts[0, 3] > most else undecided.columns_of_several()
        counts[0, 3] += 0 if several is None else len(several)
        return several

    counts = passes.total(count, (experts, _HEADS + 2 * width), "finding thresholds", only, keep=kept.append)
    return _Counted(
        low=low,
        high=high,
        below=counts[:, 0],
        up_to=counts[:, 1],
        votes=int(counts[0, 2]),
        undecided=counts[:, _HEADS::2],
        changes=counts[:, _HEADS + 1 :: 2],
        columns=None if counts[0, 3] > most else kept,
    )


class _Undecided:
    """The undecided entries of a block, as numpy's arrays.

    Args:
        experts: expert of each, ``(found,)``.
        places: place of each in the block.
        values: the entries.
        columns: the trimmed entries of all experts at that place, ``(experts, found)``.
        signs: the signs elected there.
    """

    @classmethod
    def of(cls, trimmed: Tensor, signs: Tensor, places: list[Tensor], values: list[Tensor]) -> _Undecided:
        """Gather them.

        Args:
            trimmed: all entries of the block as they are if undecided ones are trimmed, ``(experts, entries)``.
            signs: the signs elected then, ``(entries,)``.
            places: for each expert, where its undecided entries are, ``(found,)``.
            values: what they are.
        """
        import numpy
        import torch

        experts = numpy.arange(len(places)).repeat([len(own) for own in places])
        place = torch.cat(places)
        columns = (place, torch.cat(values), trimmed.index_select(1, place), signs.index_select(0, place))
        return cls(experts, *(column.cpu().numpy() for column in columns))

    def __init__(self, experts: Any, places: Any, values: Any, columns: Any, signs: Any) -> None:
        import numpy

        self.experts, self.places, self.values, self.columns, self.signs = experts, places, values, columns, signs
        columns[experts, numpy.arange(len(experts))] = values
        self.alone = numpy.bincount(places)[places] == 1

    def count(self, counts: Any, low: Any) -> None:
        """Count all by bit pattern, and what those that are alone in their column would add to the votes."""
        import numpy

        offsets = numpy.abs(self.values).view(numpy.int32) - low[self.experts]
        spots = self.experts * counts.shape[1] + _HEADS + 2 * offsets
        flat = counts.reshape(-1)
        numpy.add.at(flat, spots, numpy.ones(len(spots), dtype=numpy.int64))
        total = self.columns[0].copy()
        for row in self.columns[1:]:
            total += row
        changes = (numpy.sign(total) - self.signs).astype(numpy.int64)
        numpy.add.at(flat, spots[self.alone] + 1, changes[self.alone])

    def columns_of_several(self) -> Any:
        """Columns in which several entries are undecided ``(found, experts)``; None if there are none."""
        import numpy

        others = (~self.alone).nonzero()[0]
        if not len(others):
            return None
        _, first, inverse = numpy.unique(self.places[others], return_index=True, return_inverse=True)
        columns = self.columns[:, others[first]]
        columns[self.experts[others], inverse] = self.values[others]
        return columns.T.copy()
