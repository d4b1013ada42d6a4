"""The options of searches; read by the command line before torch is loaded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from expert_merging.flags import Count, Factor, Interval, Positive
from expert_merging.running.options import ComparingOptions


@dataclass(frozen=True, kw_only=True)
class SearchOptions(ComparingOptions):
    """How coefficients are searched for.

    Args:
        scaling_coefficient: coefficients that the search starts from, one for all experts or a list with one per
            expert.
        search_space: what has a coefficient of its own, each expert, or each expert in each third of the model's depth.
        evaluations: candidates that are merged and scored at most, the start among them.
        population: candidates of a generation; by default 4 + 3 ln(coefficients).
        initial_spread: standard deviation of the first generation's coefficients around the start.
    """

    scaling_coefficient: Factor | list[Factor] = 0.3
    search_space: Literal["experts", "depth"] = "experts"
    evaluations: Count = 100
    population: Annotated[int, Interval("[2, inf)")] | None = None
    initial_spread: Positive = 0.2
