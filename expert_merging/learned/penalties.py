"""What is added to the losses for coefficients as they are, whatever the samples."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import combinations
from typing import TypeAlias

import torch
from torch import Tensor
from torch.nn import functional

from expert_merging.learned.parametrisations import CoefficientVector
from expert_merging.running.losses import regularisation

# ``(values of all trained coefficients, whose they are) -> a number with a gradient``.
Penalty: TypeAlias = Callable[[Tensor, CoefficientVector], Tensor]


@dataclass(frozen=True)
class Distance:
    """The distance from the initial values.

    Args:
        weight: its weight beside the losses.
        count: coefficients per expert that it is divided by; None for those that are trained.
    """

    weight: float
    count: float | None = None

    def __call__(self, values: Tensor, vector: CoefficientVector) -> Tensor:
        """The weighted distance."""
        count = self.count or values.numel() / vector.experts
        return self.weight * regularisation(values, vector.anchor, count)


@dataclass(frozen=True)
class Pairs:
    """The distance, and what two experts' coefficients of a parameter have in common (DAM, arXiv 2410.08371).

    Args:
        weight: the distance's weight.
        similarity: weight of the cosine of a pair's coefficients.
        overlap: weight of the sum of the smaller of their magnitudes.
    """

    weight: float
    similarity: float
    overlap: float

    def __call__(self, values: Tensor, vector: CoefficientVector) -> Tensor:
        """The weighted sum, with the mean over pairs and the sum over parameters."""
        total = Distance(self.weight)(values, vector)
        pairs = list(combinations(range(vector.experts), 2))
        if not pairs or not (self.similarity or self.overlap):
            return total
        first, second = torch.tensor(pairs, device=values.device).t()
        for name in vector.places:
            own = vector.view(values, name)
            one, other = own[first], own[second]
            similarity = functional.cosine_similarity(one, other, dim=1).mean()
            overlap = torch.minimum(one.abs(), other.abs()).sum(1).mean()
            total = total + self.similarity * similarity + self.overlap * overlap
        return total
