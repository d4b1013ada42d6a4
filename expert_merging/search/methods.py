"""Methods that search for coefficients; their results are merged like learned ones."""

from __future__ import annotations

from typing import TYPE_CHECKING

from expert_merging.context import Context
from expert_merging.learned.methods import learns
from expert_merging.method import AT_MOST_TWO, SAMPLES, TABLE, Preparation, Prepare, register
from expert_merging.methods.interpolation import interpolate
from expert_merging.search.options import MapOptions, NicheOptions, SearchOptions, StableOptions

if TYPE_CHECKING:
    from torch import Tensor


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


@learns(
    name="map",
    options=MapOptions,
    promises=frozenset(),
    family_defaults=("scaling_coefficient", "samples_per_task"),
)
def amortized_front(context: Context, **options: object) -> Preparation:
    """Few coefficients, by quadratic models of every task's score (MAP; Li et al., 2024, arXiv 2406.07529).

    Candidates are drawn evenly and scored; a quadratic of the coefficients is fitted to each task's scores; the
    trade-offs of these models are searched for, which costs nothing. The original writes what the models foretell. Here
    some of that is evaluated, and the best of all that was evaluated is merged. The search on the models is by NSGA-II,
    where the original has NSGA-III, and quadratics are fitted by weighted linear least squares.

    Raises:
        InputError: options, calibration files or tracker cannot be used.
    """
    from expert_merging.search.map import prepare

    return prepare(context, MapOptions(**options))  # type: ignore[arg-type]


def _prepare_stable(context: Context, **options: object) -> Preparation:
    from expert_merging.search.stable import prepare

    return prepare(context, StableOptions(**options), TABLE[interpolate.__name__])  # type: ignore[arg-type]


@register(
    options=StableOptions,
    unit="entries",
    promises=frozenset({AT_MOST_TWO}),
    reads=frozenset({SAMPLES}),
    prepare=Prepare(_prepare_stable, ("t",)),
)
def adamms(task_vectors: Tensor, t: float) -> Tensor:
    """The point between two models whose answers change least if it is moved (AdaMMS, 2025, arXiv 2503.23733).

    Points on a grid are merged in memory and answer the same questions, for which no answers are needed. The one whose
    answers agree most with those of both its neighbours is taken. The original also maps names of unlike models onto
    each other, prints all equally stable points, and may compare answers by sentence embeddings instead of as texts.

    Args:
        task_vectors: ``(experts, *shape)`` float32, of one expert or two.
        t: the point, from the first model at 0 to the last one at 1.

    Returns:
        Merged task vector ``(*shape)``.
    """
    merged: Tensor = interpolate(task_vectors, t=t)
    return merged


# Pairs are drawn at random, expert by expert in their order.
@learns(options=NicheOptions, promises=frozenset(), family_defaults=("samples_per_task",))
def m2n2(context: Context, **options: object) -> Preparation:
    """Descendants of the experts, mixed before and after a split point (Abrantes et al., 2025, arXiv 2508.16204).

    M2N2: every question is a resource that all models that answer it share, so that a model lives by what few others
    can do; and one pairs with another that can do what it cannot. The original mixes weights along the arc between two
    models, split at any entry. Here task vectors are mixed, which are far enough apart to have an arc, and a split
    falls between two tensors. Nothing is mutated, as in the original for language models.

    Raises:
        InputError: options, calibration files or tracker cannot be used.
    """
    from expert_merging.search.m2n2 import prepare

    return prepare(context, NicheOptions(**options))  # type: ignore[arg-type]
