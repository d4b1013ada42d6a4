"""Minimise a function of one positive number, such as the divergence of a merge by its coefficient."""

from __future__ import annotations

import math
from collections.abc import Callable

# Of two neighbouring coefficients before the minimum is between three of them, and the golden section's share.
_STEP = math.log(1.6)
_GOLDEN = (3 - math.sqrt(5)) / 2


def minimise_positive(score: Callable[[float], float], start: float, evaluations: int) -> dict[float, float]:
    """Scores of all numbers tried, for a function that falls and then rises.

    From the start, steps of a factor go downhill until the minimum is between two of them, and the golden section
    (Kiefer, 1953) of logarithms narrows that.

    Args:
        score: what is made small; what is not finite counts as worst.
        start: where to begin, above 0.
        evaluations: numbers to try.

    Returns:
        Score by number, in the order of the trials, numbers rounded to four digits.
    """
    tried: dict[float, float] = {}

    def at(place: float) -> float:
        number = float(f"{math.exp(place):.4g}")
        if number not in tried and len(tried) < evaluations:
            found = score(number)
            tried[number] = found if math.isfinite(found) else math.inf
        return tried.get(number, math.inf)

    middle = math.log(start)
    direction = _STEP if at(middle) > at(middle + _STEP) else -_STEP
    while len(tried) < evaluations and (at(middle + direction) < at(middle) or at(middle) == math.inf):
        middle += direction
    low, high = middle - _STEP, middle + _STEP
    while len(tried) < evaluations and high - low > 1e-3:
        wider = high if high - middle > middle - low else low
        inner = middle + _GOLDEN * (wider - middle)
        if at(inner) < at(middle):
            low, high, middle = (middle, high, inner) if inner > middle else (low, middle, inner)
        else:
            low, high = (low, inner) if inner > middle else (inner, high)
    return tried
