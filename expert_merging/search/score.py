"""The score of a candidate: how far the model that it makes is from the experts, in memory and without writing it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from expert_merging.errors import InputError
from expert_merging.learned.live import LiveModel
from expert_merging.learned.parametrisations import CoefficientVector, Layout
from expert_merging.learned.task_vectors import TaskVectors
from expert_merging.running.objectives import alignment_losses
from expert_merging.running.targets import Target

# Hidden states are not compared: predictions are what an expert is for.
LAYERS: tuple[int, ...] = ()


@torch.no_grad()
def divergences(model: Any, targets: Sequence[Target]) -> dict[str, float]:
    """KL(expert || model) per token in nats, its mean over the samples of each task; lower is better."""
    found: dict[str, list[Tensor]] = defaultdict(list)
    for target in targets:
        divergence, _ = alignment_losses(model, target, LAYERS, 1.0)
        found[target.sample.task].append(divergence.double().cpu())
    return {task: torch.stack(found[task]).mean().item() for task in sorted(found)}


class _Given(CoefficientVector):
    """One coefficient per expert and parameter, given instead of learned."""

    def give(self, values: Mapping[str, Tensor]) -> None:
        """Take ``(experts, 1)`` values by parameter name."""
        self.given = torch.cat([values[name].reshape(-1) for name in self.places]).to(self.raw.device)

    def forward(self) -> Tensor:
        """The given values."""
        return self.given


class Scorer:
    """Scores candidates on one live model.

    Args:
        model: the base model; its merged parameters will be overwritten.
        task_vectors: base weights and task vectors.
        targets: the samples, with what their experts say about them.
        file_name: name in a checkpoint file of a parameter's name in memory.

    Raises:
        InputError: the base predicts what an expert does, or a merged tensor is no parameter of the model.
    """

    def __init__(
        self, model: Any, task_vectors: TaskVectors, targets: Sequence[Target], file_name: Callable[[str], str]
    ) -> None:
        plan, self.targets = task_vectors.plan, targets
        # No value of these is used; that they are one each says how the given ones are laid out.
        layout = Layout(dict.fromkeys(plan.merged, 1), [0.5] * len(plan.experts))
        self.vector = _Given(layout, task_vectors.device)
        self.live = LiveModel(model, task_vectors, self.vector, file_name)
        self.base = divergences(model, targets)
        for task, divergence in self.base.items():
            if not divergence > 0:
                raise InputError(
                    f"the base and the expert of {task} predict the same on its samples; there is nothing to search for"
                )

    def score(self, coefficients: Mapping[str, Tensor]) -> dict[str, float]:
        """Divergence of the merged model as a share of the base's, by task: 1 is the base, 0 the expert.

        Args:
            coefficients: ``(experts, 1)`` by parameter name.
        """
        self.vector.give(coefficients)
        self.live.rebuild()
        return {task: value / self.base[task] for task, value in divergences(self.live.model, self.targets).items()}

    def close(self) -> None:
        """Let go of the model."""
        self.live.close()
