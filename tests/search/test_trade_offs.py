"""NSGA-II on functions whose Pareto front is known, and the front of any scores."""

from __future__ import annotations

import math
import random
import sys

import numpy as np
import pytest

from expert_merging.errors import InputError
from expert_merging.search.trade_offs import check_pymoo, front_of, trade_off

# The nearest points to both of these lie on the line between them, and nowhere else.
FIRST, SECOND = (0.2, 0.2, 0.2), (0.8, 0.8, 0.5)


def distances(candidate):
    return tuple(sum((x - goal) ** 2 for x, goal in zip(candidate, goals, strict=True)) for goals in (FIRST, SECOND))


def off_the_line(candidate):
    """Distance of a point from the line between the two."""
    start, way = np.array(FIRST), np.array(SECOND) - FIRST
    along = np.clip((np.array(candidate) - start) @ way / (way @ way), 0, 1)
    return float(np.linalg.norm(np.array(candidate) - start - along * way))


class Counting:
    def __init__(self, function=distances, most=math.inf):
        self.function, self.most, self.asked, self.groups = function, most, [], []

    def __call__(self, candidates):
        candidates = candidates[: max(0, min(self.most - len(self.asked), len(candidates)))]
        self.asked += candidates
        self.groups.append(len(candidates))
        return [self.function(candidate) for candidate in candidates]


def search(counting=None, **changes):
    counting = counting or Counting()
    options = {"spread": 0.2, "highest": 1.0, "objectives": 2, "evaluations": 60, "population": 20, "seed": 3}
    trade_off(counting, (0.4, 0.3, 0.3), **{**options, **changes})
    return counting


@pytest.mark.slow
def test_the_front_comes_to_lie_on_the_line_between_the_two_goals():
    first = search(evaluations=20)
    found = search(evaluations=1000)
    front = [found.asked[place] for place in front_of([distances(one) for one in found.asked])]
    assert np.mean([off_the_line(one) for one in front]) < 0.06
    assert np.mean([off_the_line(one) for one in first.asked]) > 0.15
    # It reaches from the one to the other.
    for goals in (FIRST, SECOND):
        assert min(math.dist(one, goals) for one in front) < 0.1


@pytest.mark.parametrize(("budget", "groups"), [(1, [1]), (2, [2]), (19, [19]), (20, [20]), (50, [20, 20, 10])])
def test_the_budget_is_spent_exactly(budget, groups):
    found = search(evaluations=budget)
    assert found.groups == groups
    assert found.asked[0] == (0.4, 0.3, 0.3)


@pytest.mark.parametrize("most", [1, 20, 33])
def test_fewer_scores_than_candidates_end_the_search(most):
    assert len(search(Counting(most=most)).asked) == most


def test_candidates_stay_between_the_bounds_and_follow_from_the_seed_alone(capfd):
    before = np.random.get_state()[1].copy()
    first = search(highest=0.5).asked
    assert (np.random.get_state()[1] == before).all()
    assert all(0 <= x <= 0.5 for one in first for x in one)
    assert {0.0, 0.5} <= {x for one in first for x in one}
    np.random.seed(11)
    assert search(highest=0.5).asked == first
    assert search(highest=0.5, seed=2**40 + 1).asked != first
    assert capfd.readouterr() == ("", "")


def test_generations_are_told_and_what_is_not_finite_counts_as_worst():
    def broken(candidate):
        return (math.nan, math.inf) if candidate[0] > 0.45 else distances(candidate)

    told = []
    found = search(Counting(broken), evaluations=200, tell=told.append)
    assert told == list(range(1, 11))
    early, late = found.asked[:40], found.asked[-40:]
    assert sum(one[0] > 0.45 for one in late) < sum(one[0] > 0.45 for one in early)
    assert len(search(Counting(lambda _: (math.nan, math.nan))).asked) == 60


def test_the_front_of_scores_is_what_pairs_of_them_say():
    draw = random.Random(0)
    scores = [tuple(draw.randrange(6) / 5 for _ in range(3)) for _ in range(60)]
    scores[7] = (math.nan, 0.0, 0.0)

    def beaten(own):
        return any(
            all(a <= b for a, b in zip(other, own, strict=True)) and other != own
            for other in scores
            if not math.isnan(other[0])
        )

    expected = [place for place, own in enumerate(scores) if place != 7 and not beaten(own)]
    firsts = [place for place in expected if scores[place] not in [scores[one] for one in expected if one < place]]
    assert front_of(scores) == firsts
    assert front_of([(1.0, 0.0), (0.0, 1.0), (1.0, 0.0)]) == [0, 1]
    assert front_of([]) == front_of([(math.inf, 0.0)]) == []


def test_without_pymoo_it_says_so(monkeypatch):
    check_pymoo("--algorithm nsga2")
    monkeypatch.setitem(sys.modules, "pymoo", None)
    with pytest.raises(InputError, match=r"--algorithm nsga2 needs pymoo, .*; pip install 'pymoo>=0.6.2,<0.7'"):
        check_pymoo("--algorithm nsga2")
