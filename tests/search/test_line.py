"""The search along a line finds the bottom of a valley in few trials."""

from __future__ import annotations

import math

import pytest

from expert_merging.search.line import minimise_positive


@pytest.mark.parametrize("bottom", [0.05, 0.29, 0.3, 0.37, 1.0, 2.4])
def test_the_bottom_is_found_from_either_side(bottom):
    asked = []

    def score(number: float) -> float:
        asked.append(number)
        return math.log(number / bottom) ** 2 + 1

    tried = minimise_positive(score, 0.3, 14)
    assert list(tried) == asked
    assert len(asked) == len(set(asked)) <= 14
    assert min(tried, key=tried.__getitem__) == pytest.approx(bottom, rel=0.05)


def test_what_is_no_number_counts_as_worst():
    tried = minimise_positive(lambda number: math.nan if number > 0.5 else (number - 0.4) ** 2, 1.0, 12)
    assert min(tried, key=tried.__getitem__) == pytest.approx(0.4, rel=0.1)
    assert set(minimise_positive(lambda _: math.nan, 1.0, 3).values()) == {math.inf}


def test_the_budget_bounds_the_trials():
    assert list(minimise_positive(lambda number: number, 1.0, 1)) == [1.0]
    assert len(minimise_positive(lambda number: number, 1.0, 4)) == 4
