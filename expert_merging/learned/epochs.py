"""The order in which samples are learned from."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

from expert_merging.running.scores import HasTask

Item = TypeVar("Item", bound=HasTask)


def hold_out(samples: Sequence[Item], share: float) -> tuple[list[Item], list[Item]]:
    """Samples to learn from and samples that are held out, in the order given.

    Args:
        samples: of all tasks.
        share: of each task's samples that are held out, in [0, 1), spread over them evenly; of a task with several at
            least one stays on either side.
    """
    held: set[int] = set()
    for task in {sample.task for sample in samples} if share else ():
        own = [number for number, sample in enumerate(samples) if sample.task == task]
        count = min(max(1, round(share * len(own))), len(own) - 1)
        held |= {own[place * len(own) // count] for place in range(count)}
    return (
        [sample for number, sample in enumerate(samples) if number not in held],
        [sample for number, sample in enumerate(samples) if number in held],
    )


def epoch_order(experts: Sequence[str], seed: int, epoch: int) -> list[int]:
    """Order of the samples in one epoch.

    Every expert comes equally often, its samples repeated where it has fewer; then all are shuffled.

    Args:
        experts: the expert of each sample.
        seed: seed of the run.
        epoch: number of the epoch.

    Returns:
        Indices into the samples.
    """
    own: dict[str, list[int]] = {}
    for index, expert in enumerate(experts):
        own.setdefault(expert, []).append(index)
    rounds = max(len(indices) for indices in own.values())
    order = [indices[turn % len(indices)] for turn in range(rounds) for indices in own.values()]
    random.Random(f"{seed}/{epoch}").shuffle(order)
    return order


@dataclass(frozen=True)
class Update:
    """One update's samples.

    Args:
        number: of the update, from 1 on.
        samples: indices into the samples.
        ends_epoch: it is its epoch's last.
    """

    number: int
    samples: list[int]
    ends_epoch: bool


def updates(experts: Sequence[str], seed: int, *, epochs: int, size: int) -> Iterator[Update]:
    """All updates in their order.

    Args:
        experts: the expert of each sample.
        seed: seed of the run.
        epochs: passes over the samples.
        size: samples of an update; the last one of an epoch may have fewer.
    """
    number = 0
    for epoch in range(epochs):
        order = epoch_order(experts, seed, epoch)
        for first in range(0, len(order), size):
            number += 1
            yield Update(number, order[first : first + size], ends_epoch=first + size >= len(order))
