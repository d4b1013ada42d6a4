"""The scores of a candidate: the model that it makes is judged in memory, without writing it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from expert_merging.learned.live import LiveModel
from expert_merging.learned.parametrisations import Layout
from expert_merging.learned.task_vectors import TaskVectors
from expert_merging.questions.labelled import Question
from expert_merging.running.answers import Asker
from expert_merging.running.scores import means_by_task, score_items


@dataclass(frozen=True)
class Judgement:
    """How good a model is.

    Args:
        tasks: its score in every task, the lower the better.
        items: the same for every sample or question.
    """

    tasks: Mapping[str, float]
    items: Sequence[float] = ()


class Judge(Protocol):
    """What says how good a model is."""

    @property
    def record(self) -> Mapping[str, Any]:
        """What its scores are shares of, for the record of a result."""
        ...

    def by_task_and_item(self, model: Any) -> tuple[Mapping[str, float], Sequence[float]]:
        """Its score in every task, the lower the better, and for every sample or question."""
        ...


@dataclass(frozen=True)
class WrongAnswers:
    """Shares of labelled questions that a model does not answer rightly.

    Args:
        asker: asks them.
        questions: the questions.
    """

    asker: Asker
    questions: Sequence[Question]

    @property
    def record(self) -> Mapping[str, Any]:
        """How many questions there are."""
        return {"questions": len(self.questions)}

    def by_task_and_item(self, model: Any) -> tuple[dict[str, float], list[float]]:
        """The share of each task, in [0, 1], and 1 for each question with a wrong answer, else 0."""
        wrong = [[1 - points / 100] for (points,) in score_items(self.asker, model, self.questions)]
        found = means_by_task(("wrong",), self.questions, wrong)
        return {task: numbers["wrong"] for task, numbers in found.items()}, [share for (share,) in wrong]


class Scorer:
    """Scores candidates on one live model.

    Args:
        model: the base model; its merged parameters will be overwritten.
        task_vectors: base weights and task vectors.
        judge: scores models.
        file_name: name in a checkpoint file of a parameter's name in memory.

    Raises:
        InputError: a merged tensor is no parameter of the model.
    """

    def __init__(
        self,
        model: Any,
        task_vectors: TaskVectors,
        judge: Judge,
        file_name: Callable[[str], str],
    ) -> None:
        plan = task_vectors.plan
        # Free coefficients are their own raw numbers, so that candidates can be written into them.
        free = Layout(dict.fromkeys(plan.merged, 1), [1.0] * len(plan.experts), bounded=False)
        self.vector = free.vector(task_vectors.device)
        self.live = LiveModel(model, task_vectors, self.vector, file_name)
        self.judge = judge

    def score(self, coefficients: Mapping[str, Tensor]) -> Judgement:
        """How good the merged model is.

        Args:
            coefficients: ``(experts, 1)`` by parameter name.
        """
        with torch.no_grad():
            for name in self.vector.places:
                self.vector.view(self.vector.raw, name).copy_(coefficients[name])
        self.live.rebuild()
        return Judgement(*self.judge.by_task_and_item(self.live.model))

    def close(self) -> None:
        """Let go of the model."""
        self.live.close()
