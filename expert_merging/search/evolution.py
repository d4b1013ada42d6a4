"""Minimise a function of a few numbers by CMA-ES (Hansen, 2016, arXiv 1604.00772), with the library pycma.

The numbers are unbounded. Any real factor on a task vector gives a model, the best may lie below 0 or above 1, and a
bound would bend the distribution that CMA-ES learns near it. Scores alone keep the search where models are good.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import cma
import numpy as np

Candidate: TypeAlias = tuple[float, ...]
Evaluate: TypeAlias = Callable[[Sequence[Candidate]], Sequence[float]]

# Below -9 the library prints nothing, and reads no options from a file in the current folder.
_SILENT = {"verbose": -10, "verb_log": 0, "verb_disp": 0}


@dataclass(frozen=True)
class Generation:
    """What is told of a generation.

    Args:
        number: 1 for the first.
        scores: of its candidates.
        spread: standard deviation of the next one's coefficients, averaged over them.
    """

    number: int
    scores: Sequence[float]
    spread: float


@dataclass(frozen=True)
class Found:
    """The end of a search.

    Args:
        candidate: the best of all that were evaluated.
        score: its score.
        evaluations: how many were evaluated.
        reasons: the criteria of CMA-ES that ended it before the budget did, with their values.
    """

    candidate: Candidate
    score: float
    evaluations: int
    reasons: tuple[str, ...]


def default_population(size: int) -> int:
    """Candidates of a generation for so many numbers (Hansen, 2016, Eq. 48)."""
    return 4 + int(3 * math.log(size))


def minimise(
    evaluate: Evaluate,
    start: Candidate,
    *,
    spread: float,
    evaluations: int,
    population: int,
    seed: int,
    tell: Callable[[Generation], None] = lambda _: None,
) -> Found:
    """Search for the candidate with the lowest score.

    The start is evaluated first, so the result is never worse. Generations follow, of which the last may be cut short,
    and the last evaluation is for the mean of the final distribution, which is often better than its samples. The same
    arguments and scores always give the same candidates in the same order.

    Args:
        evaluate: scores of candidates, which are asked for in groups; what is not finite counts as worst. Fewer than
            candidates end the search.
        start: where to begin.
        spread: standard deviation of the first generation.
        evaluations: candidates to evaluate at most.
        population: candidates of a generation, at least 2.
        seed: decides the candidates.
        tell: is given each complete generation.
    """
    tried: list[tuple[float, Candidate]] = []

    def score(candidates: Sequence[Candidate]) -> list[float]:
        scores = [value if math.isfinite(value) else math.inf for value in evaluate(candidates)]
        tried.extend(zip(scores, candidates, strict=False))
        return scores

    score([start])
    # Random numbers of its own: numpy's global ones are left alone, and nobody else can change these.
    population = max(2, min(population, evaluations))  # of a larger one, only so many would be evaluated
    options = {"seed": math.nan, "randn": np.random.RandomState(seed % 2**32).randn, "popsize": population, **_SILENT}
    strategy = cma.CMAEvolutionStrategy(list(start), spread, options)
    while len(tried) < evaluations and not strategy.stop():
        moved = strategy.countiter > 0
        drawn = strategy.ask()
        candidates = [_plain(numbers) for numbers in drawn]
        left = evaluations - len(tried) - int(moved)
        if left < population:
            score(candidates[:left])
            break
        scores = score(candidates)
        if len(scores) < population:
            return _found(tried, strategy)
        strategy.tell(drawn, _finite(scores, [value for value, _ in tried]))
        tell(Generation(strategy.countiter, scores, float(np.mean(strategy.stds))))
    if strategy.countiter and len(tried) < evaluations:
        score([_plain(strategy.result.xfavorite)])
    return _found(tried, strategy)


def _found(tried: Sequence[tuple[float, Candidate]], strategy: cma.CMAEvolutionStrategy) -> Found:
    best, candidate = min(tried, key=lambda pair: pair[0])
    reasons = tuple(f"{name} {value}" for name, value in strategy.stop().items())
    return Found(candidate, best, len(tried), reasons)


def _plain(numbers: Sequence[float]) -> Candidate:
    return tuple(float(number) for number in numbers)


def _finite(scores: Sequence[float], seen: Sequence[float]) -> list[float]:
    """Scores with a number above all finite ones for those that are infinite: CMA-ES goes by their order alone."""
    worst = max((score for score in seen if math.isfinite(score)), default=0.0) + 1
    return [score if math.isfinite(score) else worst for score in scores]
