"""Scores of a model: what is measured of each sample, and one loop that makes means by task of it.

What training makes small (`expert_merging.running.objectives`), what `align` compares models by, what a search moves
coefficients by and how many questions a model answers right are all scores.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch

from expert_merging.errors import InputError
from expert_merging.running.objectives import Objective, distance
from expert_merging.running.targets import Target

# Numbers of a model by task and name.
ByTask = dict[str, dict[str, float]]


class HasTask(Protocol):
    """A sample, or a sample with what its expert says about it (`Target`)."""

    @property
    def task(self) -> str:
        """The task that it belongs to."""
        ...


Item = TypeVar("Item", bound=HasTask, contravariant=True)


class Score(Protocol[Item]):
    """Numbers that say how good a model is.

    A score of targets says by ``layers`` which hidden states they must have; a score of samples needs no expert.
    """

    @property
    def names(self) -> tuple[str, ...]:
        """What the numbers are called."""
        ...

    def measure(self, model: Any, items: Sequence[Item]) -> Iterable[Sequence[Any]]:
        """The numbers of each item, in the order of the items and of the names."""
        ...


def score_by_task(score: Score[Item], model: Any, items: Sequence[Item]) -> ByTask:
    """Mean numbers of a model over the items of each task, tasks in the order of their first item."""
    return means_by_task(score.names, items, score_items(score, model, items))


@torch.no_grad()
def score_items(score: Score[Item], model: Any, items: Sequence[Item]) -> list[list[float]]:
    """Numbers of a model for each item."""
    return [[float(number) for number in found] for found in score.measure(model, items)]


def means_by_task(names: Sequence[str], items: Sequence[HasTask], numbers: Sequence[Sequence[float]]) -> ByTask:
    """Mean numbers over the items of each task, tasks in the order of their first item.

    Args:
        names: what the numbers are called.
        items: the items.
        numbers: of each item, as `score_items` gives them.
    """
    rows: dict[str, list[Sequence[float]]] = {}
    for item, found in zip(items, numbers, strict=True):
        rows.setdefault(item.task, []).append(found)
    return {
        task: {name: sum(column) / len(column) for name, column in zip(names, zip(*own, strict=True), strict=True)}
        for task, own in rows.items()
    }


def relative_mean(losses: Mapping[str, float], first: Mapping[str, float]) -> float:
    """Mean over tasks of each task's loss as a share of what it was at first; a task that had none counts as 1.

    Args:
        losses: by task.
        first: the same, of the model that others are compared with.
    """
    return sum(loss / first[task] if first[task] else 1.0 for task, loss in losses.items()) / len(losses)


def mean_over_tasks(found: ByTask) -> dict[str, float]:
    """Mean of every number over tasks, each task counted once however many items it has."""
    rows = list(found.values())
    return {name: sum(row[name] for row in rows) / len(rows) for name in rows[0]}


def require_distance(base: ByTask) -> None:
    """Check that there is something to compare with.

    Args:
        base: the base's numbers by `expert_merging.running.objectives.distance`.

    Raises:
        InputError: the base and an expert agree.
    """
    for task, numbers in base.items():
        if not numbers["divergence"] > 0:
            raise InputError(f"the base and the expert of {task} predict the same; there is nothing to measure")


def relative_to_base(found: ByTask, base: ByTask) -> ByTask:
    """Distances from the experts as shares of the base's: the base has 1, an expert 0 on its task.

    Args:
        found: a model's numbers by `expert_merging.running.objectives.distance`.
        base: the base's, which `require_distance` has accepted.
    """
    return {
        task: {name: number / base[task][name] if base[task][name] else 0.0 for name, number in numbers.items()}
        for task, numbers in found.items()
    }


@dataclass(frozen=True)
class ExpertDivergence:
    """How far a live model's predictions are from the experts', as a share of the base's: smaller is better.

    Args:
        score: distance from the experts.
        targets: the samples, with what their experts say about them; made once.
        base: the base's numbers.
        base_items: the base's divergence on each sample.
    """

    score: Objective
    targets: Sequence[Target]
    base: ByTask
    base_items: Sequence[float]

    @classmethod
    def beside(cls, base_model: Any, targets: Sequence[Target], batch_tokens: int = 1) -> ExpertDivergence:
        """Measure the base, of which later models' numbers are shares; its weights may be overwritten afterwards.

        Args:
            base_model: the base.
            targets: the samples.
            batch_tokens: tokens that go through a model together.

        Raises:
            InputError: the base and an expert agree, so that there is nothing to compare with.
        """
        score = distance((), batch_tokens)
        items = score_items(score, base_model, targets)
        base = means_by_task(score.names, targets, items)
        require_distance(base)
        return cls(score, targets, base, [found[score.names.index("divergence")] for found in items])

    @property
    def record(self) -> dict[str, dict[str, float]]:
        """The base's divergence, of which scores are shares."""
        return {"divergence_of_base": {task: numbers["divergence"] for task, numbers in self.base.items()}}

    def by_task(self, model: Any) -> dict[str, float]:
        """The share of each task."""
        return self.by_task_and_item(model)[0]

    def by_task_and_item(self, model: Any) -> tuple[dict[str, float], list[float]]:
        """The share of each task, and of each sample; 1 for a sample on which base and expert agree."""
        items = score_items(self.score, model, self.targets)
        shares = relative_to_base(means_by_task(self.score.names, self.targets, items), self.base)
        place = self.score.names.index("divergence")
        own = [row[place] / base if base > 0 else 1.0 for row, base in zip(items, self.base_items, strict=True)]
        return {task: numbers["divergence"] for task, numbers in shares.items()}, own

    def __call__(self, model: Any) -> float:
        """The mean share over tasks."""
        shares = self.by_task(model)
        return sum(shares.values()) / len(shares)
