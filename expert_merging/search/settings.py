"""Checks of a search's options before any tensor is read, and the search in words."""

from __future__ import annotations

from dataclasses import dataclass

from expert_merging.context import Context
from expert_merging.errors import Problems
from expert_merging.learned.estimates import estimate, this_machine
from expert_merging.machine import gib
from expert_merging.running.accelerator import check_tracker
from expert_merging.running.samples import Samples, check_samples
from expert_merging.search.evolution import Candidate, default_population
from expert_merging.search.options import SearchOptions
from expert_merging.search.space import Space, make_space


@dataclass(frozen=True)
class Settings:
    """A search whose options are checked.

    Args:
        options: the options as given.
        asked: calibration samples.
        space: what is searched.
        start: where the search begins.
        population: candidates of a generation.
    """

    options: SearchOptions
    asked: Samples
    space: Space
    start: Candidate
    population: int


def check(context: Context, options: SearchOptions) -> Settings:
    """Check the options against experts, parameters and calibration files.

    Raises:
        InputError: every problem found.
    """
    problems = Problems()
    with problems.collecting():
        check_tracker(context.log_with)
    with problems.collecting():
        asked = check_samples(context, options, batch_tokens=options.batch_tokens, synthesize=options.synthesize)
    problems.check()
    space = make_space(context.plan, options.search_space)
    population = options.population or default_population(space.size)
    return Settings(options, asked, space, space.start(options.scaling_coefficient), population)


def notes(context: Context, settings: Settings) -> tuple[str, ...]:
    """Lines for the plan: what is searched for, and the memory that it takes."""
    budget, population, space = settings.options.evaluations, settings.population, settings.space
    groups = "" if len(space.order) == 1 else f" (for each expert: {', '.join(space.order)})"
    few = "" if budget > population else ", of which the budget has not one: it draws around the start alone"
    return (
        f"{space.size} coefficients{groups} searched for in at most {budget} evaluations on "
        f"{len(settings.asked.samples)} samples, in generations of {population}{few}",
        *_memory(context, settings.asked),
    )


def _memory(context: Context, asked: Samples) -> tuple[str, ...]:
    """What each device needs for a model that runs without a backward pass."""
    machine = this_machine(context.device)
    needs = estimate(context.plan, asked.dtype.itemsize, asked.tokens_together(), context.device.split(":")[0])
    enough = "" if needs.least <= machine.free else f", which does not fit, as {gib(machine.free)} are free"
    elsewhere = "" if context.device == "cpu" else "in host memory or "
    return (
        f"searching needs about {gib(needs.least)} for each process on {context.device}{enough}: model "
        f"{gib(needs.model)}, the rest for {asked.tokens_together()} tokens at a time and work in progress",
        f"with base and experts there too, {gib(needs.task_vectors)} more; otherwise they are {elsewhere}read from the "
        "files for every evaluation",
    )
