"""Methods that search for coefficients; their results are merged like learned ones."""

from __future__ import annotations

from expert_merging.context import Context
from expert_merging.learned.methods import learns
from expert_merging.method import Preparation
from expert_merging.search.options import SearchOptions


# Candidates are drawn at random, coefficient by coefficient in the order of the experts.
@learns(
    options=SearchOptions,
    promises=frozenset(),
    family_defaults=("scaling_coefficient", "samples_per_task"),
)
def evo(context: Context, **options: object) -> Preparation:
    """Few coefficients, found by CMA-ES to predict like the experts (Akiba et al., 2024, arXiv 2403.13187).

    The original searches for weights and densities of DARE-TIES by the accuracy on labelled tasks; here task vectors
    are searched for their coefficients, by the divergence from each task's expert, which needs no labels.

    Raises:
        InputError: options, calibration files or tracker cannot be used.
    """
    from expert_merging.search.evo import prepare

    return prepare(context, SearchOptions(**options))  # type: ignore[arg-type]
