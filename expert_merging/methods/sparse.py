"""Methods that leave out part of every task vector: TIES and DARE."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal

from expert_merging.arithmetic import weighted_sum
from expert_merging.context import Context
from expert_merging.flags import Factor, Fraction, Interval
from expert_merging.method import ORDER_FREE, Preparation, Prepare, register
from expert_merging.methods.thresholds import Change, elected_signs, find_thresholds, trim
from expert_merging.parts import Part
from expert_merging.streaming import Passes

if TYPE_CHECKING:
    from torch import Tensor


# Random bits are drawn for runs of this many entries, each from a seed of its own, so that any block can be drawn
# alone. Part of what decides a result's bytes: changing it changes every mask.
_SEGMENT = 1 << 16

DropRate = Annotated[float, Interval("[0, 1)")]


def drop(task_vectors: Tensor, part: Part, seed: int, experts: tuple[str, ...], drop_rate: float) -> Tensor:
    """Set each entry to zero with probability ``drop_rate``, in place (DARE without its division by 1 - ``drop_rate``).

    That division changes neither order nor signs, so that the methods leave it to the factor on their result.

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
    mask = torch.empty_like(task_vectors[0])  # a product of one type is faster than one of two, or than a selection
    for row, expert in zip(task_vectors, experts, strict=True):
        mask.view(-1).copy_(_draw(part, f"{seed}/{expert}/{part.name}", drop_rate).to(mask.device))
        row.mul_(mask)
    return task_vectors


def _draw(part: Part, key: str, drop_rate: float) -> Tensor:
    """Which of the part's entries are kept: ``(entries,)`` uint8, 1 with probability 1 - ``drop_rate``."""
    import numpy
    import torch

    pieces = [numpy.empty(0, dtype=numpy.uint8)] if part.start == part.stop else []
    for segment in range(part.start // _SEGMENT, -(-part.stop // _SEGMENT)):
        first = segment * _SEGMENT
        entries = min(_SEGMENT, part.elements - first)
        drawn = _draw_segment(f"{key}/{segment}", entries, drop_rate)
        pieces.append(drawn[max(0, part.start - first) : part.stop - first])
    return torch.from_numpy(pieces[0] if len(pieces) == 1 else numpy.concatenate(pieces))


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
    undecided = (digits == int(boundary)).nonzero()[0]
    kept[undecided] = generator.random_raw(len(undecided)) * 2.0**-64 >= others if others else True
    return kept.view(numpy.uint8)


_GENERATORS = threading.local()


def _generator() -> Any:
    """This thread's generator, whose state is set before each use; to make one costs as much as ten thousand digits."""
    import numpy

    if not hasattr(_GENERATORS, "own"):
        _GENERATORS.own = numpy.random.SFC64(0)
    return _GENERATORS.own


def disjoint_mean(trimmed: Tensor, signs: Tensor) -> Tensor:
    """Mean over the experts whose entry has the elected sign, ``(*shape)``; zero where there is none."""
    import torch

    total, count, agreeing = signs.new_zeros(signs.shape), signs.new_zeros(signs.shape), signs.new_empty(signs.shape)
    for row in trimmed:
        torch.mul(row, signs, out=agreeing).relu_()
        total.add_(agreeing)
        count.add_(agreeing.sign_())
    return total.mul_(signs).div_(count.clamp_(min=1))


def first_pass(passes: Passes, change: Change, *, density: float, ties_scope: str) -> dict[str, Any]:
    """Thresholds and majority signs by tensor name; the same for all of them in the global scope.

    Args:
        passes: passes over all task vectors.
        change: applied to task vectors first.
        density: fraction of the entries that each expert keeps.
        ties_scope: ``global`` or ``tensor``.
    """
    if ties_scope == "tensor":
        found = {name: find_thresholds(passes, change, density, name) for name in passes.sizes}
    else:
        found = dict.fromkeys(passes.sizes, find_thresholds(passes, change, density))
    return {
        "thresholds": {name: thresholds for name, (thresholds, _) in found.items()},
        "majorities": {name: majority for name, (_, majority) in found.items()},
    }


def unchanged(task_vectors: Tensor, _part: Part) -> Tensor:
    """The task vectors as they are."""
    return task_vectors


def prepare_ties(context: Context, *, density: float, ties_scope: str) -> Preparation:
    """What TIES needs of the whole model before it merges."""
    return Preparation(lambda: first_pass(context.passes, unchanged, density=density, ties_scope=ties_scope))


_FOUND = ("thresholds", "majorities")


@register(unit="entries", promises=frozenset({ORDER_FREE}), prepare=Prepare(prepare_ties, _FOUND))
def ties(
    task_vectors: Tensor,
    part: Part,
    thresholds: Mapping[str, Tensor],
    majorities: Mapping[str, float],
    *,
    density: Fraction = 0.2,
    ties_scope: Literal["global", "tensor"] = "global",
    scaling_coefficient: Factor = 1.0,
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


@register(unit="entries", promises=frozenset(), family_defaults=("scaling_coefficient",))
def dare_ta(
    task_vectors: Tensor,
    part: Part,
    seed: int,
    experts: tuple[str, ...],
    *,
    drop_rate: DropRate = 0.2,
    scaling_coefficient: Factor | list[Factor] = 0.3,
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
    weights = scaling_coefficient if isinstance(scaling_coefficient, list) else [scaling_coefficient] * len(experts)
    dropped = drop(task_vectors, part, seed, experts, drop_rate)
    return weighted_sum(dropped, [weight / (1 - drop_rate) for weight in weights])


def prepare_dare_ties(context: Context, *, density: float, ties_scope: str, drop_rate: float) -> Preparation:
    """What TIES needs of the whole model whose entries were dropped."""
    experts = tuple(context.plan.experts)

    def change(task_vectors: Tensor, part: Part) -> Tensor:
        return drop(task_vectors, part, context.seed, experts, drop_rate)

    return Preparation(lambda: first_pass(context.passes, change, density=density, ties_scope=ties_scope))


@register(unit="entries", promises=frozenset(), prepare=Prepare(prepare_dare_ties, _FOUND))
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
    scaling_coefficient: Factor = 1.0,
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
    dropped = drop(task_vectors, part, seed, experts, drop_rate)
    factor = scaling_coefficient / (1 - drop_rate)
    options = {"density": density, "ties_scope": ties_scope, "scaling_coefficient": factor}
    return ties(dropped, part, thresholds, majorities, **options)  # type: ignore[no-any-return]
