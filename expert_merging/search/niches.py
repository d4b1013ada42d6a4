"""Models that compete for questions and pair with those that answer others: M2N2 (Abrantes et al., 2025).

A model here is what it is made of: a coefficient for every expert in every tensor, ``(tensors, experts)``. The angle
between two models follows from the inner products of the experts' task vectors, so no weights are needed to mix them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np

from expert_merging.search.evolution import Candidate

# How well candidates do on every question, in [0, 1], the higher the better; fewer than candidates end the search.
EvaluateItems: TypeAlias = Callable[[Sequence[Candidate]], Sequence[Sequence[float]]]

_PARALLEL = 1e-6


@dataclass
class Archive:
    """The models that there are.

    Args:
        most: how many there may be.
        models: each ``(tensors, experts)``.
        points: of each on every question, in [0, 1].
    """

    most: int
    models: list[Any] = field(default_factory=list)
    points: list[Any] = field(default_factory=list)

    def add(self, model: Any, points: Any) -> None:
        """Add a model; where there are too many then, the one of the lowest fitness goes, which may be this one."""
        self.models.append(model)
        self.points.append(points)
        if len(self.models) > self.most:
            worst = int(np.argmin(_shares(self.points).sum(1)))
            del self.models[worst], self.points[worst]

    def pair(self, draw: np.random.RandomState) -> tuple[Any, Any]:
        """Two models: one of high fitness, and one that has much of what the first lacks."""
        shares = _shares(self.points)
        first = _choose(shares.sum(1), draw)
        second = _choose(np.maximum(0, shares - shares[first]).sum(1), draw)
        return self.models[first], self.models[second]


def _shares(points: Sequence[Any]) -> Any:
    """Each model's share of every question, which all that answer it have between them, ``(models, questions)``."""
    own = np.array(points)
    total = own.sum(0)
    return own / np.where(total > 0, total, 1)


def _choose(weights: Any, draw: np.random.RandomState) -> int:
    """A place, drawn in proportion to its weight; any where none has weight."""
    total = weights.sum()
    return int(draw.choice(len(weights), p=weights / total if total > 0 else None))


def compete(
    evaluate: EvaluateItems,
    experts: int,
    sizes: Sequence[int],
    products: Any,
    *,
    archive: int,
    evaluations: int,
    seed: int,
    tell: Callable[[int], None] = lambda _: None,
) -> None:
    """Begin with the experts, and let pairs of models have one child after the other.

    Args:
        evaluate: how well candidates do, which are models, tensor by tensor.
        experts: their number.
        sizes: entries of every tensor.
        products: inner products of the experts' task vectors ``(tensors, experts, experts)``.
        archive: models to keep.
        evaluations: candidates to evaluate at most.
        seed: decides pairs and children.
        tell: is given the number of candidates evaluated, after every so many as are kept.
    """
    draw = np.random.RandomState(seed % 2**32)
    kept, done = Archive(archive), 0
    alone = [np.tile(row, (len(sizes), 1)) for row in np.eye(experts)]
    while done < evaluations:
        model = alone[done] if done < experts else _child(*kept.pair(draw), sizes, products, draw)
        points = evaluate([tuple(map(float, model.reshape(-1)))])
        if not points:
            return
        kept.add(model, np.nan_to_num(np.array(points[0], dtype=float)))
        done += 1
        if done % archive == 0:
            tell(done)


def _child(first: Any, second: Any, sizes: Sequence[int], products: Any, draw: np.random.RandomState) -> Any:
    """A child of two models: mixed by a share before a place among all entries, and by its complement after it."""
    split, share = draw.uniform(0, sum(sizes)), draw.uniform()
    return crossed(first, second, share, int(np.abs(np.cumsum([0, *sizes]) - split).argmin()), products)


def crossed(first: Any, second: Any, share: float, split: int, products: Any) -> Any:
    """Two models mixed along the arc between their task vectors.

    Args:
        first: ``(tensors, experts)``.
        second: the same of the other.
        share: of the second in the tensors before the split, and of the first in those after it.
        split: the first tensor after the split.
        products: inner products of the experts' task vectors ``(tensors, experts, experts)``.
    """
    shares = np.where(np.arange(len(first)) < split, share, 1 - share)[:, None]
    lengths = _product(first, first, products) * _product(second, second, products)
    cosine = _product(first, second, products) / np.sqrt(lengths) if lengths > 0 else 1.0
    angle = np.arccos(np.clip(cosine, -1, 1))
    if np.sin(angle) < _PARALLEL:
        return (1 - shares) * first + shares * second
    return (np.sin((1 - shares) * angle) * first + np.sin(shares * angle) * second) / np.sin(angle)


def _product(first: Any, second: Any, products: Any) -> float:
    """Inner product of the task vectors of two models, over all tensors."""
    return float(np.einsum("ti,tij,tj->", first, products, second))
