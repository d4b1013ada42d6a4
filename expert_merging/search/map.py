"""MAP: the trade-offs between tasks are searched for on quadratic models of their scores, and the best evaluated."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from expert_merging.context import Context
from expert_merging.errors import InputError
from expert_merging.method import Preparation
from expert_merging.search.evolution import Candidate
from expert_merging.search.options import MapOptions
from expert_merging.search.quadratic import Link, Quadratics, fit, terms
from expert_merging.search.record import Evaluation
from expert_merging.search.search import prepare_search
from expert_merging.search.settings import Evaluate, Settings, Tell, budget_of, check
from expert_merging.search.space import make_space
from expert_merging.search.trade_offs import check_pymoo, trade_off

logger = logging.getLogger(__name__)

# Of NSGA-II on the models, whose evaluations cost nothing.
_POPULATION, _GENERATIONS = 100, 150


def prepare(context: Context, options: MapOptions) -> Preparation:
    """Check the options; the search is the work to be done.

    Raises:
        InputError: every problem found.
    """
    space = make_space(context.plan, options.search_space)
    start = space.start(options.scaling_coefficient)
    basis = check(context, options, lambda: check_pymoo("map"), lambda: _check_budget(options, space.size))
    link: Link = "sigmoid" if basis.questions else "softplus"

    def search(evaluate: Evaluate, seed: int, tell: Tell) -> Sequence[str]:
        return _search(options, start, link, evaluate, seed, tell)

    about = (
        f"a quadratic of {space.size} coefficients for each task, with {terms(space.size)} terms, fitted to "
        f"{options.evaluations - options.trade_offs} of {budget_of(options)} on {basis.told}; the others are for "
        f"trade-offs that it foretells"
    )
    return prepare_search(context, Settings(options, basis, space, search), about)


def _search(
    options: MapOptions, start: Candidate, link: Link, evaluate: Evaluate, seed: int, tell: Tell
) -> Sequence[str]:
    """Sample, fit, search on the models, and evaluate what that finds."""
    sampled = options.evaluations - options.trade_offs
    drawn = np.random.RandomState(seed % 2**32).uniform(0, options.highest_coefficient, (sampled - 1, len(start)))
    evaluated = evaluate([start, *(tuple(map(float, row)) for row in drawn)])
    if len(evaluated) < sampled:
        return ()
    if sum(map(_has_numbers, evaluated)) < terms(len(start)):
        return ("too few candidates have scores that are numbers, so no quadratics were fitted",)
    model = _fitted(evaluated, link)
    tell(f"quadratics fitted to {sampled} candidates", "")
    found = foretold(model, start, highest=options.highest_coefficient, seed=seed)
    expected = model.scores(np.array(found))
    best = int(np.argmin(expected.max(1) if options.over_tasks == "worst" else expected.mean(1)))
    evaluate([found[place] for place in spread_out(expected, best, options.trade_offs)])
    tell("trade-offs that the quadratics foretell", "")
    return ()


def _has_numbers(evaluation: Evaluation) -> bool:
    return all(map(math.isfinite, evaluation.tasks.values()))


def _check_budget(options: MapOptions, size: int) -> None:
    """Check that there are evaluations enough to fit quadratics.

    Raises:
        InputError: there are too few.
    """
    needed = terms(size)
    if options.evaluations - options.trade_offs < needed:
        raise InputError(
            f"map fits quadratics of {size} coefficients, which have {needed} terms, to --evaluations less "
            f"--trade_offs, {options.evaluations} - {options.trade_offs}; give at least {needed + options.trade_offs} "
            "evaluations, better twice as many"
        )


def _fitted(evaluated: Sequence[Evaluation], link: Link) -> Quadratics:
    """The quadratics, and a line that says how well they fit."""
    model = fit([one.candidate for one in evaluated], [tuple(one.tasks.values()) for one in evaluated], link)
    told = ", ".join(f"{task} {share:.3f}" for task, share in zip(evaluated[0].tasks, model.explained, strict=True))
    logger.info("share of the scores' variance that quadratics explain: %s", told)
    return model


def foretold(model: Quadratics, start: Candidate, *, highest: float, seed: int) -> list[Candidate]:
    """The Pareto front of the models.

    Args:
        model: the fitted quadratics.
        start: a candidate.
        highest: numbers are between 0 and this.
        seed: decides what is tried.
    """
    return trade_off(
        lambda candidates: [tuple(map(float, row)) for row in model.scores(np.array(candidates))],
        start,
        spread=highest / 2,
        highest=highest,
        objectives=len(model.explained),
        evaluations=_POPULATION * _GENERATIONS,
        population=_POPULATION,
        seed=seed,
    )


def spread_out(scores: Any, first: int, count: int) -> list[int]:
    """Places of so many points, each as far as can be from those before it.

    Args:
        scores: ``(points, tasks)``; each task's range counts as 1.
        first: place of the first.
        count: how many at most.
    """
    scaled = scores / np.maximum(np.ptp(scores, axis=0), np.finfo(float).tiny)
    chosen = [first]
    nearest = np.full(len(scores), np.inf)
    while len(chosen) < min(count, len(scores)):
        nearest = np.minimum(nearest, np.linalg.norm(scaled - scaled[chosen[-1]], axis=1))
        if nearest.max() == 0:
            break  # all others are equals
        chosen.append(int(nearest.argmax()))
    return chosen
