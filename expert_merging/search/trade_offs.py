"""Trade-offs between functions of a few numbers, by NSGA-II (Deb et al., 2002), with the library pymoo.

Each function is an objective of its own. What comes out is a set of candidates none of which is worse than another one
in everything: the Pareto front.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import numpy as np

from expert_merging.errors import InputError
from expert_merging.search.evolution import Candidate

Scores: TypeAlias = Sequence[float]
EvaluateEach: TypeAlias = Callable[[Sequence[Candidate]], Sequence[Scores]]

POPULATION = 20


def check_pymoo(flag: str) -> None:
    """Check that the library is there.

    Args:
        flag: what needs it.

    Raises:
        InputError: it is not.
    """
    try:
        import pymoo  # noqa: F401
    except ImportError:
        raise InputError(f"{flag} needs pymoo, which has NSGA-II; pip install 'pymoo>=0.6.2,<0.7'") from None


def trade_off(
    evaluate: EvaluateEach,
    start: Candidate,
    *,
    spread: float,
    highest: float,
    objectives: int,
    evaluations: int,
    population: int,
    seed: int,
    tell: Callable[[int], None] = lambda _: None,
) -> list[Candidate]:
    """Evaluate candidates, generation after generation, that come nearer to the Pareto front.

    The start is evaluated first, and the rest of the first generation is drawn around it. The last generation may be
    cut short. The same arguments and scores always give the same candidates in the same order.

    Args:
        evaluate: scores of candidates, one for each objective, the lower the better; what is not finite counts as
            worst. Fewer than candidates end the search.
        start: where to begin.
        spread: standard deviation of the first generation.
        highest: numbers are between 0 and this.
        objectives: scores of a candidate.
        evaluations: candidates to evaluate at most.
        population: candidates of a generation, at least 2.
        seed: decides the candidates.
        tell: is given the number of each complete generation, 1 for the first.

    Returns:
        Candidates that survive after the last complete generation and that no other survivor is better than.
    """
    population = max(2, min(population, evaluations))  # of a larger one, only so many would be evaluated
    generations = _Generations(_around(start, spread, highest, population, seed), highest, objectives, seed)
    done, number = 0, 0
    while done < evaluations and (candidates := generations.ask()):
        scores = evaluate(candidates[: evaluations - done])
        done += len(scores)
        if len(scores) < len(candidates):
            break
        generations.tell(scores)
        number += 1
        tell(number)
    return generations.front if number else []


def front_of(scores: Sequence[Scores]) -> list[int]:
    """Places of those that no other is at least as good as in everything and better in something.

    Of several with the same scores, the first counts. What has no numbers is no trade-off.

    Args:
        scores: one for each objective, the lower the better.
    """
    found = list[int]()
    for place, own in enumerate(scores):
        if not all(map(math.isfinite, own)):
            continue
        others = (other for number, other in enumerate(scores) if number != place)
        if not any(_dominates(other, own) for other in others) and own not in [scores[one] for one in found]:
            found.append(place)
    return found


def _dominates(one: Scores, other: Scores) -> bool:
    pairs = [*zip(one, other, strict=True)]
    return all(a <= b for a, b in pairs) and any(a < b for a, b in pairs)


def _around(start: Candidate, spread: float, highest: float, population: int, seed: int) -> Any:
    """The start and others around it, ``(population, numbers)``."""
    normal = np.random.RandomState(seed % 2**32).randn(population, len(start))
    normal[0] = 0
    return np.clip(np.array(start) + spread * normal, 0, highest)


class _Generations:
    """NSGA-II, which is asked for candidates and told their scores.

    Args:
        first: the first generation, ``(population, numbers)``.
        highest: numbers are between 0 and this.
        objectives: scores of a candidate.
        seed: decides the candidates.
    """

    def __init__(self, first: Any, highest: float, objectives: int, seed: int) -> None:
        from pymoo.algorithms.moo.nsga2 import NSGA2
        from pymoo.core.problem import Problem
        from pymoo.core.termination import NoTermination

        self.problem = Problem(n_var=first.shape[1], n_obj=objectives, xl=0.0, xu=highest)
        self.algorithm = NSGA2(pop_size=len(first), sampling=first)
        self.algorithm.setup(self.problem, termination=NoTermination(), seed=seed % 2**32, verbose=False)
        self.asked: Any = None

    def ask(self) -> list[Candidate]:
        """The next generation without candidates that there were; empty where no other is found."""
        self.asked = self.algorithm.ask()
        numbers = [] if self.asked is None else self.asked.get("X")
        return [tuple(map(float, row)) for row in numbers]

    @property
    def front(self) -> list[Candidate]:
        """The survivors that none of the others is better than."""
        return [tuple(map(float, row)) for row in self.algorithm.opt.get("X")]

    def tell(self, scores: Sequence[Scores]) -> None:
        """The scores of the generation that was asked for last."""
        from pymoo.core.evaluator import Evaluator
        from pymoo.problems.static import StaticProblem

        told = StaticProblem(self.problem, F=_finite(np.array(scores, dtype=float)))
        Evaluator().eval(told, self.asked)
        self.algorithm.tell(infills=self.asked)


def _finite(scores: Any) -> Any:
    """Scores with a number above all finite ones for those that are not: NSGA-II goes by their order."""
    known = scores[np.isfinite(scores)]
    return np.where(np.isfinite(scores), scores, (known.max() if known.size else 0.0) + 1)
