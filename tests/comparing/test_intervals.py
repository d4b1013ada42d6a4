"""Intervals of means, and the test between two models."""

from __future__ import annotations

import math

import pytest

from expert_merging.comparing.intervals import compare_paired, interval


def test_an_interval_is_that_of_the_binomial_where_points_are_right_or_wrong():
    points = [1.0] * 300 + [0.0] * 100
    low, high = interval(points)
    spread = 1.96 * math.sqrt(0.75 * 0.25 / 400)
    assert (low, high) == pytest.approx((0.75 - spread, 0.75 + spread), abs=0.004)


def test_an_interval_of_shares_follows_their_spread():
    points = [0.25, 0.5, 0.75, 1.0] * 50
    low, high = interval(points)
    spread = 1.96 * math.sqrt(0.078125 / 200)
    assert (low, high) == pytest.approx((0.625 - spread, 0.625 + spread), abs=0.004)


def test_a_mean_over_tasks_is_surer_than_one_task_and_counts_each_once():
    sure, unsure = [1.0] * 100, [1.0, 0.0] * 50
    low, high = interval(sure, unsure)
    one_low, one_high = interval(unsure)
    assert (low + high) / 2 == pytest.approx(0.75, abs=0.01)
    assert high - low == pytest.approx((one_high - one_low) / 2, rel=0.05)
    assert interval(unsure) == interval(unsure)


@pytest.mark.parametrize("count", [1, 4, 30, 1000])
def test_all_right_or_all_wrong_is_as_sure_as_wilson_has_it(count):
    """His interval is where the score test does not reject: of `count` questions, none are seen to be otherwise."""
    low, high = interval([1.0] * count)
    assert high == 1
    assert (1 - low) / math.sqrt(low * (1 - low) / count) == pytest.approx(1.959964, rel=1e-6)
    assert interval([0.0] * count) == pytest.approx((0, 1 - low))
    assert interval([0.5] * count) == (0.5, 0.5), "no count of right answers"


def test_tasks_that_are_all_right_or_all_wrong_add_what_is_uncertain_about_them():
    right, wrong, unsure = [1.0] * 10, [0.0] * 20, [1.0, 0.0] * 50
    own_low, own_high = interval(unsure)
    low, high = interval(right, wrong, unsure)
    assert low == pytest.approx(0.5 - math.hypot(0.5 - own_low, 1 - interval(right)[0]) / 3, abs=0.002)
    assert high == pytest.approx(0.5 + math.hypot(own_high - 0.5, interval(wrong)[1]) / 3, abs=0.002)
    assert interval(right, wrong) == pytest.approx((0.5 - (1 - interval(right)[0]) / 2, 0.5 + interval(wrong)[1] / 2))


def test_the_paired_test_looks_at_the_questions_on_which_two_differ():
    first = [1.0] * 10 + [0.0] * 2 + [1.0] * 30
    second = [0.0] * 10 + [1.0] * 2 + [1.0] * 30
    found = compare_paired(first, second)
    assert (found.first_only, found.second_only, found.count) == (10, 2, 42)
    assert found.difference == pytest.approx(8 / 42)
    assert found.p == pytest.approx(2 * (1 + 12 + 66) / 4096)
    assert compare_paired(second, first).p == found.p
    assert compare_paired(first, first).p == 1
    assert compare_paired([1.0], [0.0]).p == 1
    with pytest.raises(ValueError, match="zip"):
        compare_paired([1.0], [1.0, 0.0])
