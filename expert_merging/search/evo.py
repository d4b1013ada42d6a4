"""Evolutionary search over merging coefficients: CMA-ES for the best score, NSGA-II for trade-offs between tasks."""

from __future__ import annotations

from collections.abc import Sequence

from expert_merging.context import Context
from expert_merging.errors import Problems
from expert_merging.method import Preparation
from expert_merging.search.basis import Basis
from expert_merging.search.evolution import Candidate, Generation, default_population, minimise
from expert_merging.search.options import SearchOptions
from expert_merging.search.search import prepare_search
from expert_merging.search.settings import Evaluate, Settings, Tell, budget_of, check
from expert_merging.search.space import Space, make_space
from expert_merging.search.trade_offs import POPULATION, check_pymoo, trade_off


def prepare(context: Context, options: SearchOptions) -> Preparation:
    """Check the options; the search is the work to be done.

    Raises:
        InputError: every problem found.
    """
    space = make_space(context.plan, options.search_space)
    start = space.start(options.scaling_coefficient)
    problems, basis = Problems(), None
    with problems.collecting():
        basis = check(context, options)
    if options.algorithm == "nsga2":
        with problems.collecting():
            check_pymoo("--algorithm nsga2")
        problems.found += _unfit(options, start, basis)
    problems.check()
    assert basis is not None  # noqa: S101  (or there was a problem)
    by_default = default_population(space.size) if options.algorithm == "cma" else POPULATION
    population = options.population or by_default

    def search(evaluate: Evaluate, seed: int, tell: Tell) -> Sequence[str]:
        if options.algorithm == "nsga2":
            return _nsga2(options, start, len(basis.tasks), population, evaluate, seed, tell)
        return _cma(options, start, population, evaluate, seed, tell)

    return prepare_search(context, Settings(options, basis, space, search), _about(options, basis, space, population))


def _unfit(options: SearchOptions, start: Candidate, basis: Basis | None) -> list[str]:
    """What keeps NSGA-II from searching."""
    problems = []
    if basis is not None and len(basis.tasks) == 1:
        problems.append(
            f"--algorithm nsga2 looks for trade-offs between tasks, and there is one alone, {basis.tasks[0]}; give "
            "files of more tasks, or use --algorithm cma"
        )
    if not all(0 <= number <= options.highest_coefficient for number in start):
        problems.append(
            f"--algorithm nsga2 has coefficients from 0 to --highest_coefficient {options.highest_coefficient:g}, and "
            f"--scaling_coefficient {', '.join(f'{number:g}' for number in dict.fromkeys(start))} is not among them"
        )
    return problems


def _cma(
    options: SearchOptions, start: Candidate, population: int, evaluate: Evaluate, seed: int, tell: Tell
) -> Sequence[str]:
    def told(generation: Generation) -> None:
        best = min(generation.scores)
        tell(f"generation {generation.number}: best score {best:.4g}", f"; spread {generation.spread:.3g}")

    found = minimise(
        lambda candidates: [evaluation.score for evaluation in evaluate(candidates)],
        start,
        spread=options.initial_spread,
        evaluations=options.evaluations,
        population=population,
        seed=seed,
        tell=told,
    )
    return [f"CMA-ES ended the search by its own criteria: {', '.join(found.reasons)}"] if found.reasons else []


def _nsga2(
    options: SearchOptions, start: Candidate, tasks: int, population: int, evaluate: Evaluate, seed: int, tell: Tell
) -> Sequence[str]:
    trade_off(
        lambda candidates: [tuple(evaluation.tasks.values()) for evaluation in evaluate(candidates)],
        start,
        spread=options.initial_spread,
        highest=options.highest_coefficient,
        objectives=tasks,
        evaluations=options.evaluations,
        population=population,
        seed=seed,
        tell=lambda number: tell(f"generation {number}", ""),
    )
    return ()


def _about(options: SearchOptions, basis: Basis, space: Space, population: int) -> str:
    """A line for the plan: what is searched for."""
    groups = "" if len(space.order) == 1 else f" (for each expert: {', '.join(space.order)})"
    few = "" if options.evaluations > population else (
        ", of which the budget has not one: it draws around the start alone"
    )  # fmt: skip
    return (
        f"{space.size} coefficients{groups} searched for in {budget_of(options)} on {basis.told}, in generations of "
        f"{population}{few}"
    )
