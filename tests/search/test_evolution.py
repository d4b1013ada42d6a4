"""The searcher on functions of a few numbers, and the file that it continues from."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from expert_merging.errors import InputError
from expert_merging.search.evolution import default_population, minimise
from expert_merging.search.record import Evaluation, Record

GOAL = (0.5, -0.2, 1.4)


def bowl(candidate):
    return sum(weight * (x - goal) ** 2 for x, goal, weight in zip(candidate, GOAL, (1, 5, 20), strict=True))


class Counting:
    """A function that notes what it is asked for."""

    def __init__(self, function=bowl):
        self.function, self.asked, self.groups = function, [], []

    def __call__(self, candidates):
        self.asked += candidates
        self.groups.append(len(candidates))
        return [self.function(candidate) for candidate in candidates]


def search(function=bowl, start=(0.3, 0.3, 0.3), **changes):
    """What is found, and what was asked for."""
    counting = Counting(function)
    options = {"spread": 0.15, "evaluations": 40, "population": 7, "seed": 3, **changes}
    return minimise(counting, start, **options), counting


def test_a_quadratic_function_reaches_its_lowest_point():
    found, _ = search(evaluations=600)
    assert found.score < 1e-6
    assert found.candidate == pytest.approx(GOAL, abs=1e-3)


@pytest.mark.parametrize("size", [1, 2, 12])
def test_any_number_of_coefficients_can_be_searched_for(size):
    found, _ = search(
        lambda candidate: sum((x - 0.6) ** 2 for x in candidate),
        (0.3,) * size,
        population=default_population(size),
        evaluations=900,
    )
    assert found.candidate == pytest.approx((0.6,) * size, abs=0.02)


def test_a_generation_beyond_the_budget_draws_what_can_be_evaluated_alone():
    """Or its numbers would fill the memory; those that are drawn are the same."""
    _, usual = search(evaluations=40)
    for population in (7, 1 << 50):
        _, cut = search(evaluations=5, population=population)
        assert cut.asked == usual.asked[:5]


@pytest.mark.parametrize(
    ("budget", "groups"),
    [
        (1, [1]),
        (2, [1, 1]),
        (5, [1, 4]),
        (8, [1, 7]),
        # The mean is evaluated once the distribution has moved.
        (9, [1, 7, 1]),
        (12, [1, 7, 3, 1]),
        (40, [1, 7, 7, 7, 7, 7, 3, 1]),
    ],
)
def test_the_budget_is_spent_exactly(budget, groups):
    found, counting = search(evaluations=budget)
    assert [size for size in counting.groups if size] == groups
    assert found.evaluations == budget


@pytest.mark.parametrize("function", [bowl, lambda candidate: -bowl(candidate)])
def test_the_best_of_all_is_found_and_the_start_is_among_them(function):
    found, counting = search(function)
    assert counting.asked[0] == (0.3, 0.3, 0.3)
    assert found.score == min(map(function, counting.asked))
    assert function(found.candidate) == found.score


def test_a_start_that_nothing_beats_is_kept():
    found, counting = search(start=GOAL)
    assert found.candidate == GOAL
    assert len(counting.asked) == 40


def test_what_is_not_finite_counts_as_worst():
    def broken(candidate):
        return math.nan if candidate[0] > 0.4 else math.inf if candidate[1] > 0.4 else bowl(candidate)

    found, counting = search(broken, evaluations=300)
    assert sum(not math.isfinite(broken(candidate)) for candidate in counting.asked) > 10
    # 0.4 is the most that the first may be.
    assert found.candidate == pytest.approx((0.4, *GOAL[1:]), abs=0.03)


@pytest.mark.parametrize("most", [1, 5, 8, 12, 23])
def test_fewer_scores_than_candidates_end_the_search(most):
    asked = []

    def until(candidates):
        scores = [bowl(candidate) for candidate in candidates][: max(0, most - len(asked))]
        asked.extend(candidates)
        return scores

    found = minimise(until, (0.3,) * 3, spread=0.15, evaluations=40, population=7, seed=3)
    assert found.evaluations == most
    assert found.score == min(map(bowl, asked[:most]))


def test_a_search_among_broken_candidates_ends():
    found, _ = search(lambda _: math.nan)
    assert found.score == math.inf


def test_criteria_of_the_library_end_the_search_and_are_told():
    found, counting = search(evaluations=100_000)
    assert len(counting.asked) == found.evaluations < 3000
    (reason,) = found.reasons
    assert reason.startswith("tolfun")
    assert search()[0].reasons == ()


def test_candidates_follow_from_the_seed_alone_and_leave_random_numbers_of_others_alone(capfd, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = np.random.get_state()[1].copy()
    first = search()[1].asked
    assert (np.random.get_state()[1] == before).all()
    np.random.seed(11)
    assert search()[1].asked == first
    assert search(seed=4)[1].asked != first
    assert search(seed=2**40)[1].asked
    assert capfd.readouterr() == ("", "")
    assert not list(tmp_path.iterdir())


def test_options_in_the_current_folder_are_not_read(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "cma_signals.in").write_text("{'timeout': 0}")
    assert search()[0].evaluations == 40


def test_generations_are_told():
    told = []
    search(tell=told.append)
    assert [generation.number for generation in told] == [1, 2, 3, 4, 5]
    assert all(len(generation.scores) == 7 and generation.spread > 0 for generation in told)


def test_a_record_is_read_as_it_was_written(tmp_path):
    names = ["A", "B"]
    record = Record(tmp_path / "evaluations.json", names)
    made = [Evaluation((0.1 + 0.2, 1e-17), {"x": 0.5, "y": 1 / 3}), Evaluation((1.0, 2.0), {"x": math.nan, "y": 0.1})]
    record.add(made[:1], save=True)
    record.add(made[1:], save=True)
    assert made[0].score == pytest.approx((0.5 + 1 / 3) / 2)
    again = Record(tmp_path / "evaluations.json", names)
    assert again.evaluations[0] == made[0]
    assert again.evaluations[1].candidate == made[1].candidate
    assert math.isnan(again.evaluations[1].score)
    assert json.loads(record.file.read_text())[1] == {
        "score": None,
        "tasks": {"x": None, "y": 0.1},
        "coefficients": {"A": 1.0, "B": 2.0},
    }


def test_the_worst_task_counts_where_it_should(tmp_path):
    evaluation = Evaluation((1.0,), {"x": 0.5, "y": 0.1}, "worst", seconds=2.5)
    assert (evaluation.score, evaluation.mean) == (0.5, 0.3)
    record = Record(tmp_path / "evaluations.json", ["A"], "worst")
    record.add([evaluation], save=True)
    assert Record(record.file, ["A"], "worst").evaluations == [evaluation]
    assert json.loads(record.file.read_text())[0] == {
        "score": 0.5,
        "tasks": {"x": 0.5, "y": 0.1},
        "coefficients": {"A": 1.0},
        "seconds": 2.5,
    }
    better = Evaluation((2.0,), {"x": 0.5, "y": 0.0}, "worst")
    broken = Evaluation((3.0,), {"x": 0.0, "y": math.nan}, "worst")
    assert math.isnan(broken.score)
    endless = Evaluation((4.0,), {"x": math.inf, "y": 0.0}, "worst")
    assert sorted([broken, endless, evaluation, better], key=lambda one: one.rank) == [
        *(better, evaluation, endless, broken)
    ]


def test_a_record_knows_its_candidates_up_to_rounding(tmp_path):
    record = Record(tmp_path / "evaluations.json", ["A", "B"])
    record.add([Evaluation((0.3, 0.4), {"x": 0.5})], save=False)
    assert not record.file.exists()
    assert record.known(0, (0.3, 0.4 + 1e-12)) is record.evaluations[0]
    assert record.known(1, (0.3, 0.4)) is None
    with pytest.raises(InputError, match=r"evaluations.json: evaluation 1 is of another candidate .* move it away"):
        record.known(0, (0.3, 0.41))


@pytest.mark.parametrize("content", ["[", "{}", "[1]", '[{"tasks": {}}]', '[{"coefficients": {"A": 1}, "tasks": {}}]'])
def test_a_damaged_record_is_refused(content, tmp_path):
    (tmp_path / "evaluations.json").write_text(content)
    with pytest.raises(InputError, match=r"evaluations.json .* move it away to search from the begin"):
        Record(tmp_path / "evaluations.json", ["A", "B"])
