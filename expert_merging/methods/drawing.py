"""Random numbers for entries of task vectors, and the random masks that are made of them."""

from __future__ import annotations

import functools
import hashlib
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from expert_merging.parts import Part

if TYPE_CHECKING:
    from torch import Tensor

# Random bits are drawn for runs of this many entries, each from a seed of its own, so that any block can be drawn
# alone. Part of what decides a result's bytes: changing it changes every mask.
_SEGMENT = 1 << 16


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
    draw = functools.partial(_draw_kept, drop_rate=drop_rate)
    mask = torch.empty_like(task_vectors[0])  # a product of one type is faster than one of two, or than a selection
    for row, expert in zip(task_vectors, experts, strict=True):
        mask.view(-1).copy_(_draw(part, f"{seed}/{expert}/{part.name}", draw).to(mask.device))
        row.mul_(mask)
    return task_vectors


def draw_uniform(part: Part, seed: int, expert: str) -> Tensor:
    """A random number in [0, 1) for each entry of a part, ``(entries,)`` float32: multiples of 2 to the power of -24.

    They depend on the same as the masks of `drop`.
    """
    import numpy

    def draw(key: str, entries: int) -> Any:
        words = _seeded(key).random_raw(-(-entries // 2)).astype("<u8", copy=False).view("<u4")[:entries]
        return (words >> 8).astype(numpy.float32) * numpy.float32(2.0**-24)

    return _draw(part, f"{seed}/{expert}/{part.name}", draw)


def _draw(part: Part, key: str, draw: Callable[[str, int], Any]) -> Tensor:
    """What ``draw(key, entries)`` gives for the segments that the part lies in, cut to the part."""
    import numpy
    import torch

    pieces = [draw(key, 0)] if part.start == part.stop else []
    for segment in range(part.start // _SEGMENT, -(-part.stop // _SEGMENT)):
        first = segment * _SEGMENT
        drawn = draw(f"{key}/{segment}", min(_SEGMENT, part.elements - first))
        pieces.append(drawn[max(0, part.start - first) : part.stop - first])
    return torch.from_numpy(pieces[0] if len(pieces) == 1 else numpy.concatenate(pieces))


def _draw_kept(key: str, entries: int, drop_rate: float) -> Any:
    """Which entries are kept: ``(entries,)`` uint8, 1 with probability 1 - ``drop_rate``.

    Entry i is kept if a uniform random number u_i in [0, 1) is not below the drop rate.

    A byte each, the leading digit of u_i to the base 256, decides for all but one in 256, whose other digits are drawn
    then. The generator's own numbers are used, which are the same in every version of numpy.
    """
    import numpy

    generator = _seeded(key)
    digits = generator.random_raw(-(-entries // 8)).astype("<u8", copy=False).view(numpy.uint8)[:entries]
    boundary, others = divmod(drop_rate * 256, 1)
    kept = digits > int(boundary)
    undecided = (digits == int(boundary)).nonzero()[0]
    kept[undecided] = generator.random_raw(len(undecided)) * 2.0**-64 >= others if others else True
    return kept.view(numpy.uint8)


_GENERATORS = threading.local()


def _seeded(key: str) -> Any:
    """This thread's generator in the state that the key decides; to make one costs as much as ten thousand digits."""
    import numpy

    if not hasattr(_GENERATORS, "own"):
        _GENERATORS.own = numpy.random.SFC64(0)
    state = numpy.frombuffer(hashlib.sha256(key.encode()).digest(), dtype="<u8")
    _GENERATORS.own.state = {"bit_generator": "SFC64", "state": {"state": state}, "has_uint32": 0, "uinteger": 0}
    return _GENERATORS.own
