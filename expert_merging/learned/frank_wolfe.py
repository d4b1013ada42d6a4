"""Frank-Wolfe instead of AdamW: each update goes towards one expert, or the base, and never beyond.

The coefficients of a tensor are a point between the base (all 0) and the experts (one is 1). An update looks at which
of these corners the gradient points away from, and goes a part of the way to the one that it does most.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from expert_merging.learned.options import FrankWolfeOptions
from expert_merging.learned.parametrisations import CoefficientVector
from expert_merging.learned.task_vectors import TaskVectors
from expert_merging.learned.trainer import Trainer


def lengths(task_vectors: TaskVectors) -> dict[str, Tensor]:
    """Euclidean length of each expert's task vector of each tensor, ``(experts,)`` float64, by its name."""
    plan = task_vectors.plan
    squares = {
        name: torch.zeros(len(plan.experts), dtype=torch.float64, device=task_vectors.device) for name in plan.merged
    }
    for _, part, _, own in task_vectors.blocks(map(plan.part, plan.merged)):
        squares[part.name] += own.square().sum(1, dtype=torch.float64)
    return {name: found.sqrt() for name, found in squares.items()}


def corner(slopes: Tensor) -> Tensor:
    """The corner with the steepest descent: 1 for the expert of the smallest number, 0 for all if none is negative.

    Args:
        slopes: ``(experts,)``, how fast the loss rises towards each.
    """
    best = int(slopes.argmin())
    at = functional.one_hot(torch.tensor(best, device=slopes.device), len(slopes)).to(slopes.dtype)
    return at if float(slopes[best]) < 0 else torch.zeros_like(at)


class FrankWolfe(torch.optim.Optimizer):
    """Steps ``c <- c + rate (corner - c)``.

    Args:
        vector: free coefficients, one per expert and tensor.
        lengths: of the task vectors, by tensor name; a tensor's corner is then that of the smallest cosine between its
            gradient and a task vector, and the gradient's own length changes no choice. Without, all tensors have one
            corner, that of the smallest inner product over all of them.
        rate: share of the way to the corner.
    """

    def __init__(self, vector: CoefficientVector, lengths: dict[str, Tensor] | None, rate: float) -> None:
        super().__init__([vector.raw], {"lr": rate})
        self.vector, self.lengths = vector, lengths

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One update, by the gradient that the coefficients have."""
        del closure
        raw, gradient, rate = self.vector.raw, self.vector.raw.grad, float(self.param_groups[0]["lr"])
        if gradient is None:
            return
        slopes = {name: self.vector.view(gradient, name)[:, 0] for name in self.vector.places}
        for name, towards in self._corners(slopes).items():
            own = self.vector.view(raw, name)[:, 0]
            own += rate * (towards - own)

    def _corners(self, slopes: dict[str, Tensor]) -> dict[str, Tensor]:
        if self.lengths is None:
            return dict.fromkeys(slopes, corner(torch.stack([*slopes.values()]).sum(0)))
        cosines = {
            name: torch.where(self.lengths[name] > 0, slope.double() / self.lengths[name], 0.0)
            for name, slope in slopes.items()
        }
        return {name: corner(found).to(slopes[name].dtype) for name, found in cosines.items()}


class FrankWolfeTrainer(Trainer):
    """The trainer with Frank and Wolfe's updates, of ``2 / (t + 2)`` times the learning rate at the t-th from 0 on."""

    def _make_optimizer(self) -> tuple[Any, Any]:
        options = self.settings.options
        by_tensor = not isinstance(options, FrankWolfeOptions) or options.granularity == "layer"
        found = lengths(self.gather().task_vectors) if by_tensor else None
        optimizer = FrankWolfe(self.vector, found, options.learning_rate)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda update: 2 / (update + 2))
        optimizer, scheduler = self.accelerator.prepare(optimizer, scheduler)
        return optimizer, scheduler
