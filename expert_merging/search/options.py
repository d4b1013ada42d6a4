"""The options of searches; read by the command line before torch is loaded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from expert_merging.flags import Count, Factor, Fraction, Interval, Positive
from expert_merging.running.options import ComparingOptions, SampleOptions

# How the scores of tasks become one.
OverTasks = Literal["mean", "worst"]


@dataclass(frozen=True, kw_only=True)
class ScoringOptions(ComparingOptions):
    """How candidates are scored, and for how long.

    Args:
        questions: folder of labelled questions, as evaluate takes it; the score is then the share of wrong answers, and
            no calibration file is read.
        question_samples: questions of each task, from the beginning of its file; all by default.
        over_tasks: what is made small, the mean of the tasks' scores or the worst of them.
        evaluations: candidates that are merged and scored at most, the start among them.
        minutes: time for merging and scoring candidates, after which the search ends with what it has.
    """

    questions: str | None = None
    question_samples: Count | None = None
    over_tasks: OverTasks = "mean"
    evaluations: Count = 100
    minutes: Positive | None = None


@dataclass(frozen=True, kw_only=True)
class MapOptions(ScoringOptions):
    """What scores are modelled of, and how many of the trade-offs found are evaluated.

    Args:
        scaling_coefficient: the first candidate, one coefficient for all experts or a list with one per expert; all
            others are drawn evenly.
        search_space: what has a coefficient of its own, each expert, or each expert in each third of the model's depth.
        highest_coefficient: largest coefficient of a candidate; the smallest is 0.
        trade_offs: how many of --evaluations are for trade-offs that the fitted quadratics foretell.
    """

    scaling_coefficient: Factor | list[Factor] = 0.3
    search_space: Literal["experts", "depth"] = "experts"
    highest_coefficient: Positive = 1.0
    trade_offs: Count = 20


@dataclass(frozen=True, kw_only=True)
class NicheOptions(ScoringOptions):
    """How many models compete.

    Args:
        archive: models that are kept at a time; the experts are the first.
    """

    archive: Annotated[int, Interval("[2, inf)")] = 20


@dataclass(frozen=True, kw_only=True)
class SearchOptions(ScoringOptions):
    """How coefficients are searched for.

    Args:
        scaling_coefficient: coefficients that the search starts from, one for all experts or a list with one per
            expert.
        search_space: what has a coefficient of its own, each expert, or each expert in each third of the model's depth.
        algorithm: cma looks for the best score (CMA-ES); nsga2 for the best trade-offs between tasks (NSGA-II), of
            which the one with the best score is merged.
        population: candidates of a generation; by default 4 + 3 ln(coefficients), with nsga2 20.
        initial_spread: standard deviation of the first generation's coefficients around the start.
        highest_coefficient: largest coefficient that nsga2 tries; the smallest is 0.
    """

    scaling_coefficient: Factor | list[Factor] = 0.3
    search_space: Literal["experts", "depth"] = "experts"
    algorithm: Literal["cma", "nsga2"] = "cma"
    population: Annotated[int, Interval("[2, inf)")] | None = None
    initial_spread: Positive = 0.2
    highest_coefficient: Positive = 1.0


@dataclass(frozen=True, kw_only=True)
class StableOptions(SampleOptions):
    """How the point between two models is searched for.

    Args:
        largest_t: how far to go, from the first expert (the base, where there is one expert) at 0 to the last one at 1.
        t_step: distance of two points on the way.
    """

    samples_per_task: Count = 100  # five say little of how stable answers are
    largest_t: Fraction = 0.6
    t_step: Positive = 0.1
