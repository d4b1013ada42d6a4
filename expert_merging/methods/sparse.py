"""Methods that leave out part of every task vector: TIES and DARE."""

from __future__ import annotations

import functools
import hashlib
import threading
from collections.abc import Callable, Mapping
from decimal import Decimal
from typing import TYPE_CHECKING, Annotated, Any, Literal

from expert_merging.methods.linear import weighted_sum
from expert_merging.registry import Fraction, Interval, register

if TYPE_CHECKING:
    from torch import Tensor

    from expert_merging.plan import Part
    from expert_merging.streaming import Passes

    Change = Callable[[Tensor, Part], Tensor]

# Random bits are drawn for runs of this many entries, each from a seed of its own, so that any block can be drawn
# alone. Part of what decides a result's bytes: changing it changes every mask.
_SEGMENT = 1 << 16

# A threshold is looked for among the bit patterns of three values of the upper 16 bits, from the one before the one
# that a sample of this share of the entries points to. That is 2 % of a magnitude and some 1 % of the entries.
_RANGE = 3 << 16
_SAMPLE = 16
# Of fewer entries a sample tells less than that.
_SAMPLED = 1 << 22

_INFINITY = 0x7F800000  # its bits

DropRate = Annotated[float, Interval("[0, 1)")]


def drop_and_rescale(task_vectors: Tensor, part: Part, seed: int, experts: tuple[str, ...], drop_rate: float) -> Tensor:
    """Set each entry to zero with probability ``drop_rate``, divide the others by 1 - ``drop_rate`` (DARE), in place.

    The mask depends on the seed, the expert's name, the tensor's name and the entry's position alone, and is drawn on
    the CPU: blocks, devices, the order of shards and a restart do not change it.

    Args:
        task_vectors: ``(experts, *shape)``.
        part: where the entries stand.
        seed: seed of the run.
        experts: names of the experts, one per row.
        drop_rate: probability in [0, 1).

    Returns:
        The task vectors themselves: fresh memory for every block would cost as much as the arithmetic.
    """
    import torch

    if drop_rate == 0:
        return task_vectors
    mask = torch.empty_like(task_vectors[0])
    for row, expert in zip(task_vectors, experts, strict=True):
        mask.view(-1).copy_(_draw(part, f"{seed}/{expert}/{part.name}", drop_rate))
        row.mul_(mask.mul_(1 / (1 - drop_rate)))  # a product costs half as much as a quotient
    return task_vectors


def _draw(part: Part, key: str, drop_rate: float) -> Tensor:
    """Which of the part's entries are kept: ``(entries,)`` uint8, 1 with probability 1 - ``drop_rate``."""
    import numpy
    import torch

    kept = numpy.empty(part.stop - part.start, dtype=numpy.uint8)
    for segment in range(part.start // _SEGMENT, -(-part.stop // _SEGMENT)):
        first = segment * _SEGMENT
        entries = min(_SEGMENT, part.elements - first)
        low, high = max(first, part.start), min(first + entries, part.stop)
        drawn = _draw_segment(f"{key}/{segment}", entries, drop_rate)
        kept[low - part.start : high - part.start] = drawn[low - first : high - first]
    return torch.from_numpy(kept)


def _draw_segment(key: str, entries: int, drop_rate: float) -> Any:
    """Entry i is kept if a uniform random number u_i in [0, 1) is not below the drop rate.

    A byte each, the leading digit of u_i to the base 256, decides for all but one in 256, whose other digits are drawn
    then. The generator's own numbers are used, which are the same in every version of numpy.
    """
    import numpy

    generator = _generator()
    state = numpy.frombuffer(hashlib.sha256(key.encode()).digest(), dtype="<u8")
    generator.state = {"bit_generator": "SFC64", "state": {"state": state}, "has_uint32": 0, "uinteger": 0}
    digits = generator.random_raw(-(-entries // 8)).astype("<u8", copy=False).view(numpy.uint8)[:entries]
    boundary, others = divmod(drop_rate * 256, 1)
    kept = digits > int(boundary)
    undecided = numpy.flatnonzero(digits == int(boundary))
    kept[undecided] = generator.random_raw(len(undecided)) * 2.0**-64 >= others
    return kept


_GENERATORS = threading.local()


def _generator() -> Any:
    """This thread's generator, whose state is set before each use; to make one costs as much as ten thousand digits."""
    import numpy

    if not hasattr(_GENERATORS, "own"):
        _GENERATORS.own = numpy.random.SFC64(0)
    return _GENERATORS.own


def trim_thresholds(passes: Passes, change: Change, density: float, only: str | None = None) -> Tensor:
    """Magnitude of the k-th smallest entry of every expert, k = floor((1 - density) * entries), exactly.

    The bits of magnitudes are ordered like the magnitudes themselves. A sample tells between which bits the k-th lies;
    one pass over all entries then counts how many lie below and how many at each pattern of bits between, which also
    tells whether the sample was right. If it was not, it is repeated with all entries. Nothing of the size of a model
    is kept.

    Args:
        passes: passes over all task vectors.
        change: applied to task vectors first.
        density: fraction of entries to keep, in (0, 1].
        only: a single tensor instead of all together.

    Returns:
        ``(experts,)`` float32; an entry is kept where its magnitude is not smaller.
    """
    import torch

    sizes, experts = passes.sizes, len(passes.expert_names)
    entries = sizes[only] if only else sum(sizes.values())
    # In decimals, so that a tenth of ten entries is one entry.
    rank = int((1 - Decimal(str(density))) * entries)
    if rank == 0:
        return torch.zeros(experts)

    def count_upper(task_vectors: Tensor, part: Part, counts: Tensor) -> None:
        for row, task_vector in zip(counts, change(task_vectors, part), strict=True):
            upper = _magnitude_bits(task_vector).bitwise_right_shift_(16)
            row.add_(torch.bincount(upper, minlength=len(row)).to(row.device))

    def count_range(lowest: list[int], task_vectors: Tensor, part: Part, counts: Tensor) -> None:
        for row, task_vector, low in zip(counts, change(task_vectors, part), lowest, strict=True):
            below, offsets = _within(task_vector, low)
            row[0] += below
            row[1:].scatter_add_(0, offsets.to(row.device), torch.ones_like(offsets, device=row.device))

    for sample in (_SAMPLE, 1) if entries >= _SAMPLED else (1,):
        seen = passes.total(count_upper, (experts, 1 << 15), "sampling magnitudes", only, sample).cumsum(1)
        buckets = (seen < max(1, rank * int(seen[0, -1]) // entries)).sum(1)
        lowest = (buckets - 1).clamp_(min=0) << 16
        count = functools.partial(count_range, lowest.tolist())
        counted = passes.total(count, (experts, 1 + _RANGE), "finding thresholds", only).cumsum(1)
        if (counted[:, 0] < rank).all() and (counted[:, -1] >= rank).all():
            break
    return (lowest + (counted[:, 1:] < rank).sum(1)).to(torch.int32).view(torch.float32)


def _magnitude_bits(task_vector: Tensor) -> Tensor:
    """The bits of the magnitudes, ``(entries,)`` int32."""
    import torch

    return task_vector.reshape(-1).abs().view(torch.int32)


def _within(task_vector: Tensor, low: int) -> tuple[int, Tensor]:
    """How many magnitudes have bits below ``low``, and by how much the bits of those in range exceed it, int64."""
    import torch

    if task_vector.device.type != "cpu":
        offsets = _magnitude_bits(task_vector) - low
        return int((offsets < 0).sum()), offsets[(offsets >= 0) & (offsets < _RANGE)].long()
    import numpy

    # Magnitudes are ordered like their bits, and numpy compares and selects several times faster than torch does.
    magnitudes = numpy.abs(task_vector.reshape(-1).numpy())
    bounds = numpy.array([low, min(low + _RANGE, _INFINITY)], dtype=numpy.int32).view(numpy.float32)
    below, below_end = magnitudes < bounds[0], magnitudes < bounds[1]
    inside = magnitudes[below ^ below_end].view(numpy.int32)
    return int(numpy.count_nonzero(below)), torch.from_numpy(inside.astype(numpy.int64) - low)


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


def elected_signs(trimmed: Tensor, majority: float) -> Tensor:
    """Sign of the sum over experts, ``(*shape)``; the majority's sign where the sum is zero."""
    import torch

    signs = weighted_sum(trimmed, [1.0] * len(trimmed)).sign_()
    if not majority:
        return signs
    # The majority where the square of the sign is zero.
    return signs.add_(torch.addcmul(signs.new_tensor(majority), signs, signs, value=-majority))


def disjoint_mean(trimmed: Tensor, signs: Tensor) -> Tensor:
    """Mean over the experts whose entry has the elected sign, ``(*shape)``; zero where there is none."""
    import torch

    total, count, agreeing = signs.new_zeros(signs.shape), signs.new_zeros(signs.shape), signs.new_empty(signs.shape)
    for row in trimmed:
        torch.mul(row, signs, out=agreeing).relu_()
        total.add_(agreeing)
        count.add_(agreeing.sign_())
    return total.mul_(signs).div_(count.clamp_(min=1))


def _survey_ties(passes: Passes, change: Change, density: float, ties_scope: str) -> dict[str, Any]:
    """Thresholds and majority signs by tensor name; the same for all of them in the global scope."""
    groups: list[str | None] = [*passes.sizes] if ties_scope == "tensor" else [None]
    thresholds, majorities = {}, {}
    for only in groups:
        found = trim_thresholds(passes, change, density, only)

        def vote(task_vectors: Tensor, part: Part, votes: Tensor, found: Tensor = found) -> None:
            signs = elected_signs(trim(change(task_vectors, part), found), 0.0)
            votes += int(signs.sum())  # exact in float32, since a block has fewer entries than 2**24

        majority = float(passes.total(vote, (), "electing signs", only).sign())
        for name in [only] if only else passes.sizes:
            thresholds[name], majorities[name] = found, majority
    return {"thresholds": thresholds, "majorities": majorities}


def _unchanged(task_vectors: Tensor, _part: Part) -> Tensor:
    return task_vectors


def survey_ties(passes: Passes, _seed: int, *, density: float, ties_scope: str, **_: object) -> dict[str, Any]:
    """What TIES needs of the whole model before it merges."""
    return _survey_ties(passes, _unchanged, density, ties_scope)


@register(elementwise=True, keeps_single=False, survey=survey_ties)
def ties(
    task_vectors: Tensor,
    part: Part,
    thresholds: Mapping[str, Tensor],
    majorities: Mapping[str, float],
    *,
    density: Fraction = 0.2,
    ties_scope: Literal["global", "tensor"] = "global",
    scaling_coefficient: float = 1.0,
) -> Tensor:
    """Trim, elect signs, average what agrees (Yadav et al., 2023, arXiv 2306.01708).

    Every expert keeps its entries of largest magnitude; for each entry the sign of the kept sum is elected, and the
    experts that agree with it are averaged. Where the sum is zero, the sign that was elected most often counts.

    Args:
        task_vectors: ``(experts, *shape)`` float32.
        part: where the entries stand.
        thresholds: smallest magnitude kept, ``(experts,)`` by tensor name.
        majorities: sign for sums of zero, by tensor name.
        density: fraction of the entries that each expert keeps.
        ties_scope: whether entries are ranked over all merged parameters together (as in the paper) or in each tensor.
        scaling_coefficient: factor on the merged task vector.

    Returns:
        Merged task vector ``(*shape)``.
    """
    del density, ties_scope  # they went into the thresholds
    trimmed = trim(task_vectors, thresholds[part.name])
    return disjoint_mean(trimmed, elected_signs(trimmed, majorities[part.name])).mul_(scaling_coefficient)


@register(elementwise=True, order_free=False, keeps_single=False, family_defaults=("scaling_coefficient",))
def dare_ta(
    task_vectors: Tensor,
    part: Part,
    seed: int,
    experts: tuple[str, ...],
    *,
    drop_rate: DropRate = 0.2,
    scaling_coefficient: float | list[float] = 0.3,
) -> Tensor:
    """Drop entries at random, rescale the rest, then task arithmetic (Yu et al., 2024, arXiv 2311.03099).

    Args:
        task_vectors: ``(experts, *shape)`` float32.
        part: where the entries stand.
        seed: seed of the run.
        experts: names of the experts.
        drop_rate: probability with which an entry of a task vector is dropped.
        scaling_coefficient: factor on each task vector, one for all or a list with one per expert.

    Returns:
        Merged task vector ``(*shape)``.
    """
    dropped = drop_and_rescale(task_vectors, part, seed, experts, drop_rate)
    weights = scaling_coefficient if isinstance(scaling_coefficient, list) else [scaling_coefficient] * len(experts)
    return weighted_sum(dropped, weights)


def survey_dare_ties(
    passes: Passes, seed: int, *, density: float, ties_scope: str, drop_rate: float, **_: object
) -> dict[str, Any]:
    """What TIES needs of the whole model whose entries were dropped."""

    def change(task_vectors: Tensor, part: Part) -> Tensor:
        return drop_and_rescale(task_vectors, part, seed, passes.expert_names, drop_rate)

    return _survey_ties(passes, change, density, ties_scope)


@register(elementwise=True, order_free=False, keeps_single=False, survey=survey_dare_ties)
def dare_ties(
    task_vectors: Tensor,
    part: Part,
    seed: int,
    experts: tuple[str, ...],
    thresholds: Mapping[str, Tensor],
    majorities: Mapping[str, float],
    *,
    drop_rate: DropRate = 0.2,
    density: Fraction = 0.2,
    ties_scope: Literal["global", "tensor"] = "global",
    scaling_coefficient: float = 1.0,
) -> Tensor:
    """Drop entries at random, rescale the rest, then TIES (Yu et al., 2024, arXiv 2311.03099).

    Args:
        task_vectors: ``(experts, *shape)`` float32.
        part: where the entries stand.
        seed: seed of the run.
        experts: names of the experts.
        thresholds: smallest magnitude kept, ``(experts,)`` by tensor name.
        majorities: sign for sums of zero, by tensor name.
        drop_rate: probability with which an entry of a task vector is dropped.
        density: fraction of the entries that each expert keeps.
        ties_scope: whether entries are ranked over all merged parameters together (as in the paper) or in each tensor.
        scaling_coefficient: factor on the merged task vector.

    Returns:
        Merged task vector ``(*shape)``.
    """
    dropped = drop_and_rescale(task_vectors, part, seed, experts, drop_rate)
    options = {"density": density, "ties_scope": ties_scope, "scaling_coefficient": scaling_coefficient}
    return ties(dropped, part, thresholds, majorities, **options)  # type: ignore[no-any-return]
