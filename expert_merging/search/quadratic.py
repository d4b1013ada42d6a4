"""Scores of tasks as functions of few numbers: a quadratic for each task, fitted to what was evaluated."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np

# What makes a score of the quadratic's value: one for scores without an upper bound, one for shares in [0, 1].
Link: TypeAlias = Literal["softplus", "sigmoid"]
# Scores are taken to be at least this far from what a link can only approach.
_MARGIN = 1e-3


def terms(numbers: int) -> int:
    """Terms of a quadratic of so many numbers: squares, products of two, the numbers themselves, and a constant."""
    return (numbers + 1) * (numbers + 2) // 2


@dataclass(frozen=True)
class Quadratics:
    """One quadratic for each task.

    Args:
        weights: ``(terms, tasks)`` float64.
        link: what makes scores of their values.
        explained: share of the variance of each task's scores, as its link sees them, that its quadratic explains.
    """

    weights: Any
    link: Link
    explained: tuple[float, ...]

    def scores(self, candidates: Any) -> Any:
        """Scores ``(candidates, tasks)`` that candidates ``(candidates, numbers)`` are expected to have."""
        return _of_values(_features(candidates) @ self.weights, self.link)


def fit(candidates: Sequence[Sequence[float]], scores: Sequence[Sequence[float]], link: Link) -> Quadratics:
    """Fit quadratics by weighted least squares.

    What is fitted is each score's value before the link, with the link's slope there as its weight. So errors count,
    to first order, as errors of scores. Candidates whose scores are not all finite are left out.

    Args:
        candidates: ``(candidates, numbers)``.
        scores: ``(candidates, tasks)``.
        link: what makes scores of the quadratics' values.
    """
    found = np.array(scores, dtype=float)
    usable = np.isfinite(found).all(1)
    features, values = _features(np.array(candidates, dtype=float)[usable]), _values(found[usable], link)
    slopes = _slopes(values, link)
    weights = np.stack(
        [
            np.linalg.lstsq(features * slope[:, None], value * slope, rcond=None)[0]
            for value, slope in zip(values.T, slopes.T, strict=True)
        ],
        axis=1,
    )
    left = (slopes * (values - features @ weights)) ** 2
    around = (slopes * (values - np.average(values, axis=0, weights=slopes**2))) ** 2
    explained = 1 - left.sum(0) / np.maximum(around.sum(0), np.finfo(float).tiny)
    return Quadratics(weights, link, tuple(map(float, explained)))


def _features(candidates: Any) -> Any:
    """The terms of candidates ``(candidates, numbers)``: ``(candidates, terms)``."""
    first, second = np.triu_indices(candidates.shape[1])
    products = candidates[:, first] * candidates[:, second]
    return np.concatenate([products, candidates, np.ones((len(candidates), 1))], axis=1)


def _of_values(values: Any, link: Link) -> Any:
    return np.logaddexp(0, values) if link == "softplus" else np.exp(-np.logaddexp(0, -values))


def _values(scores: Any, link: Link) -> Any:
    """What the link makes scores of."""
    if link == "softplus":
        bounded = np.maximum(scores, _MARGIN)
        return bounded + np.log(-np.expm1(-bounded))
    bounded = np.clip(scores, _MARGIN, 1 - _MARGIN)
    return np.log(bounded / (1 - bounded))


def _slopes(values: Any, link: Link) -> Any:
    share = np.exp(-np.logaddexp(0, -values))
    return share if link == "softplus" else share * (1 - share)
