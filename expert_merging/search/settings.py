"""Checks of a search's options before any tensor is read, and the search in words."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from expert_merging.context import Context
from expert_merging.errors import Problems
from expert_merging.learned.estimates import estimate, this_machine
from expert_merging.machine import gib
from expert_merging.running.accelerator import check_tracker
from expert_merging.search.basis import Basis, check_basis
from expert_merging.search.evolution import Candidate
from expert_merging.search.options import ScoringOptions
from expert_merging.search.record import Evaluation
from expert_merging.search.space import Space

# Evaluations of candidates; fewer once the time is over.
Evaluate: TypeAlias = Callable[[Sequence[Candidate]], Sequence[Evaluation]]
# Is given what there is to tell of a generation, before and after how far the search is.
Tell: TypeAlias = Callable[[str, str], None]
# Searches, given a seed; returns why it has ended before its budget, if so.
Searcher: TypeAlias = Callable[[Evaluate, int, Tell], Sequence[str]]


@dataclass(frozen=True)
class Settings:
    """A search whose options are checked.

    Args:
        options: the options as given.
        basis: what candidates are scored by.
        space: what their numbers are.
        search: moves them.
        by_item: the search goes by scores of single samples or questions.
        measure: what is done before the model is loaded.
    """

    options: ScoringOptions
    basis: Basis
    space: Space
    search: Searcher
    by_item: bool = False
    measure: Callable[[], None] = lambda: None


def check(context: Context, options: ScoringOptions, *own: Callable[[], None]) -> Basis:
    """Check what all searches have, against experts, parameters, calibration files or questions.

    Args:
        context: the run.
        options: the search's options.
        own: checks that the search has besides, which come first.

    Raises:
        InputError: every problem found.
    """
    problems = Problems()
    for one in own:
        with problems.collecting():
            one()
    with problems.collecting():
        check_tracker(context.log_with)
    with problems.collecting():
        basis = check_basis(context, options)
    problems.check()
    return basis


def budget_of(options: ScoringOptions) -> str:
    """How long a search may take, in words."""
    minutes = "" if options.minutes is None else f" or {options.minutes:g} minutes"
    return f"at most {options.evaluations} evaluations{minutes}"


def memory_notes(context: Context, basis: Basis) -> tuple[str, ...]:
    """Lines for the plan: what each device needs for a model that runs without a backward pass."""
    machine, tokens = this_machine(context.device), basis.tokens_together
    needs = estimate(context.plan, basis.asked.dtype.itemsize, tokens, context.device.split(":")[0])
    enough = "" if needs.least <= machine.free else f", which does not fit, as {gib(machine.free)} are free"
    elsewhere = "" if context.device == "cpu" else "in host memory or "
    return (
        f"searching needs about {gib(needs.least)} for each process on {context.device}{enough}: model "
        f"{gib(needs.model)}, the rest for {tokens} tokens at a time and work in progress",
        f"with base and experts there too, {gib(needs.task_vectors)} more; otherwise they are {elsewhere}read from the "
        "files for every evaluation",
    )
