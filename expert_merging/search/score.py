"""The score of a candidate: how far the model that it makes is from the experts, in memory and without writing it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from expert_merging.learned.live import LiveModel
from expert_merging.learned.parametrisations import Layout
from expert_merging.learned.task_vectors import TaskVectors
from expert_merging.running.scores import ExpertDivergence
from expert_merging.running.targets import Target


class Scorer:
    """Scores candidates on one live model.

    Args:
        model: the base model; its merged parameters will be overwritten.
        task_vectors: base weights and task vectors.
        targets: the samples, with what their experts say about them.
        file_name: name in a checkpoint file of a parameter's name in memory.
        batch_tokens: tokens that go through the model together.

    Raises:
        InputError: the base predicts what an expert does, or a merged tensor is no parameter of the model.
    """

    def __init__(
        self,
        model: Any,
        task_vectors: TaskVectors,
        targets: Sequence[Target],
        file_name: Callable[[str], str],
        batch_tokens: int = 1,
    ) -> None:
        plan = task_vectors.plan
        # Free coefficients are their own raw numbers, so that candidates can be written into them.
        free = Layout(dict.fromkeys(plan.merged, 1), [1.0] * len(plan.experts), bounded=False)
        self.vector = free.vector(task_vectors.device)
        self.live = LiveModel(model, task_vectors, self.vector, file_name)
        self.divergence = ExpertDivergence.beside(model, targets, batch_tokens)

    def score(self, coefficients: Mapping[str, Tensor]) -> dict[str, float]:
        """Divergence of the merged model as a share of the base's, by task: 1 is the base, 0 the expert.

        Args:
            coefficients: ``(experts, 1)`` by parameter name.
        """
        with torch.no_grad():
            for name in self.vector.places:
                self.vector.view(self.vector.raw, name).copy_(coefficients[name])
        self.live.rebuild()
        return self.divergence.by_task(self.live.model)

    def close(self) -> None:
        """Let go of the model."""
        self.live.close()
