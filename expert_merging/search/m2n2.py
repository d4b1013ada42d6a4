"""M2N2: models in niches, whose children are made of coefficients alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from expert_merging.context import Context
from expert_merging.errors import Problems
from expert_merging.method import Preparation
from expert_merging.methods.geometry import multiply_all
from expert_merging.search.evolution import Candidate
from expert_merging.search.niches import compete
from expert_merging.search.options import NicheOptions
from expert_merging.search.search import prepare_search
from expert_merging.search.settings import Evaluate, Settings, Tell, budget_of, check
from expert_merging.search.space import make_space


def prepare(context: Context, options: NicheOptions) -> Preparation:
    """Check the options; the search is the work to be done.

    Raises:
        InputError: every problem found.
    """
    space, plan = make_space(context.plan, "tensors"), context.plan
    basis = check(context, options, lambda: _check_numbers(options, len(space.experts)))
    products = list[Any]()

    def measure() -> None:
        found = multiply_all(context).run()["products"]
        products.append(np.stack([found[name][1:, 1:].numpy() for name in space.order]))

    def search(evaluate: Evaluate, seed: int, tell: Tell) -> Sequence[str]:
        def points(candidates: Sequence[Candidate]) -> list[Any]:
            return [np.clip(1 - np.array(one.items), 0, 1) for one in evaluate(candidates)]

        compete(
            points,
            len(space.experts),
            [plan.base.entries[name].elements for name in space.order],
            products[0],
            archive=options.archive,
            evaluations=options.evaluations,
            seed=seed,
            tell=lambda done: tell(f"{done} models", ""),
        )
        return ()

    about = (
        f"models of {space.size} coefficients, the experts and their descendants, of which {options.archive} live at a "
        f"time; {budget_of(options)} on {basis.told}"
    )
    return prepare_search(context, Settings(options, basis, space, search, by_item=True, measure=measure), about)


def _check_numbers(options: NicheOptions, experts: int) -> None:
    """Check that every expert lives to have a child.

    Raises:
        InputError: it does not.
    """
    problems = Problems()
    if options.archive < experts:
        problems.add(f"--archive must have room for the {experts} experts, got {options.archive}")
    if options.evaluations <= experts:
        problems.add(
            f"m2n2 begins with an evaluation of each of the {experts} experts; give more --evaluations than "
            f"{options.evaluations}"
        )
    problems.check()
