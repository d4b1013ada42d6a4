"""How sure a score is, and whether two models differ on the same questions."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

LEVEL = 0.95
_RESAMPLES = 10_000


def interval(*tasks: Sequence[float], seed: int = 0) -> tuple[float, float]:
    """A 95 % interval of the mean over tasks by the percentile bootstrap (Efron, 1979), of 10,000 resamples.

    Questions are drawn within each task. Those with the same points are alike, so a resample is a draw of how many have
    which, however many there are. Of a task that is all right, or all wrong, all resamples are alike, though further
    questions might not be. Such a task has the interval of Wilson (1927), and the margins of it and of the others are
    put together as Zou and Donner (2008) do it for sums.

    Args:
        tasks: points of each question, by task; at least one of each.
        seed: decides the resamples.
    """
    import numpy as np

    random, means = np.random.default_rng(seed), np.zeros(_RESAMPLES)
    for points in tasks:
        counted = Counter(points)
        values, counts = np.array(list(counted), dtype=np.float64), np.array(list(counted.values()))
        drawn = random.multinomial(len(points), counts / len(points), _RESAMPLES)
        means += drawn @ values / len(points) / len(tasks)
    low, high = map(float, np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2]))
    below = [_unseen(len(points)) / len(tasks) for points in tasks if set(points) == {1}]
    above = [_unseen(len(points)) / len(tasks) for points in tasks if set(points) == {0}]
    mean = math.fsum(math.fsum(points) / len(points) for points in tasks) / len(tasks)
    low = mean - math.hypot(mean - low, *below) if below else low
    high = mean + math.hypot(high - mean, *above) if above else high
    return low, high


def _unseen(count: int) -> float:
    """The share of questions that may be the other way where so many are all right, or all wrong."""
    squared = NormalDist().inv_cdf((1 + LEVEL) / 2) ** 2
    return squared / (count + squared)


@dataclass(frozen=True)
class Paired:
    """Two models on the same questions.

    Args:
        first_only: questions on which the first has more points.
        second_only: questions on which the second has more.
        difference: mean points of the first less those of the second.
        p: probability of counts at least as uneven, were both equally good.
        count: number of questions.
    """

    first_only: int
    second_only: int
    difference: float
    p: float
    count: int


def compare_paired(first: Sequence[float], second: Sequence[float]) -> Paired:
    """The exact McNemar test (1947), two-sided: of the questions on which two models differ, who wins how many.

    Where points are shares of a question, it is the sign test.

    Args:
        first: points of one model.
        second: points of the other, of the same questions in the same order.
    """
    pairs = list(zip(first, second, strict=True))
    wins, losses = sum(one > other for one, other in pairs), sum(one < other for one, other in pairs)
    differing, fewer = wins + losses, min(wins, losses)
    tail = sum(math.comb(differing, count) for count in range(fewer + 1))
    difference = (sum(first) - sum(second)) / max(1, len(pairs))
    return Paired(wins, losses, difference, min(1.0, 2 * tail / 2**differing), len(pairs))
