"""Quadratic models of scores, and the search on them: on scores that are quadratics, and as a command."""

from __future__ import annotations

import json
import math
from itertools import combinations_with_replacement

import numpy as np
import pytest

from expert_merging.learned.coefficients import load_coefficients
from expert_merging.search.map import _search, foretold, spread_out
from expert_merging.search.options import MapOptions
from expert_merging.search.quadratic import fit, terms
from expert_merging.search.record import Evaluation
from tests.command import merged, refused
from tests.search.searching import evaluations_of, score_plainly

# Where each of two tasks is best; its score rises with the squared distance from there.
GOALS = {"A": (0.3, 0.6, 0.2), "B": (0.7, 0.4, 0.2)}


def true_scores(candidate):
    """Softplus of a quadratic, which a fit must find exactly."""
    values = {
        task: 9 * sum((x - g) ** 2 for x, g in zip(candidate, goal, strict=True)) - 2 for task, goal in GOALS.items()
    }
    return {task: math.log1p(math.exp(value)) for task, value in values.items()}


def draws(count, seed=0):
    return [tuple(map(float, row)) for row in np.random.RandomState(seed).uniform(0, 1, (count, 3))]


def predicted_plainly(weights, candidate):
    """The value of a quadratic, term by term."""
    pairs = [candidate[i] * candidate[j] for i, j in combinations_with_replacement(range(len(candidate)), 2)]
    return sum(w * term for w, term in zip(weights, [*pairs, *candidate, 1.0], strict=True))


def test_scores_that_are_quadratics_are_found_exactly():
    given = draws(12)
    model = fit(given, [tuple(true_scores(one).values()) for one in given], "softplus")
    assert model.explained == pytest.approx((1, 1))
    others = draws(30, seed=1)
    wanted = [list(true_scores(one).values()) for one in others]
    np.testing.assert_allclose(model.scores(np.array(others)), wanted, rtol=1e-6)
    plain = [[math.log1p(math.exp(predicted_plainly(w, one))) for w in model.weights.T] for one in others]
    np.testing.assert_allclose(model.scores(np.array(others)), plain, rtol=1e-9)
    assert terms(3) == len(model.weights) == 10


@pytest.mark.parametrize("link", ["softplus", "sigmoid"])
def test_errors_count_as_errors_of_scores_to_first_order(link):
    """The twin moves a full fit of the scores themselves by one step of Gauss and Newton, from where they were."""
    draw = np.random.RandomState(3)
    given, scores = draw.uniform(0, 1, (40, 2)), draw.uniform(0.1, 0.9, (40, 2))
    model = fit(given.tolist(), scores.tolist(), link)
    for task in range(2):
        features = np.array([[a * a, a * b, b * b, a, b, 1] for a, b in given])
        inverse = (lambda y: math.log(math.expm1(y))) if link == "softplus" else (lambda y: math.log(y / (1 - y)))
        values = np.array([inverse(y) for y in scores[:, task]])
        shares = 1 / (1 + np.exp(-values))
        weight = np.diag((shares if link == "softplus" else shares * (1 - shares)) ** 2)
        plain = np.linalg.solve(features.T @ weight @ features, features.T @ weight @ values)
        np.testing.assert_allclose(model.weights[:, task], plain, rtol=1e-8)
    assert all(0 < share < 1 for share in model.explained)


def test_what_has_no_score_is_left_out_and_bounds_are_no_infinities():
    given = draws(14)
    scores = [tuple(true_scores(one).values()) for one in given]
    broken = [*scores, (math.nan, 1.0), (math.inf, 1.0)]
    np.testing.assert_array_equal(
        fit([*given, *draws(2, seed=5)], broken, "softplus").weights, fit(given, scores, "softplus").weights
    )
    assert np.isfinite(fit(given, [(0.0, 1.0)] * 14, "sigmoid").weights).all()
    assert np.isfinite(fit(given, [(0.0, 50.0)] * 14, "softplus").weights).all()


@pytest.mark.slow
def test_the_front_of_the_models_is_the_line_between_the_goals():
    given = draws(20)
    model = fit(given, [tuple(true_scores(one).values()) for one in given], "softplus")
    front = np.array(foretold(model, (0.3, 0.3, 0.3), highest=1.0, seed=0))
    start, way = np.array(GOALS["A"]), np.array(GOALS["B"]) - GOALS["A"]
    along = np.clip((front - start) @ way / (way @ way), 0, 1)
    assert np.linalg.norm(front - start - along[:, None] * way, axis=1).mean() < 0.02
    assert along.min() < 0.05
    assert along.max() > 0.95


def test_points_are_chosen_far_from_each_other():
    scores = np.array([[0.0, 0.0], [0.1, 0.0], [1.0, 0.0], [0.5, 100.0], [0.5, 100.0]])
    assert spread_out(scores, 1, 3) == [1, 3, 2]
    assert spread_out(scores, 0, 9) == [0, 3, 2, 1]
    assert spread_out(scores[:1], 0, 9) == [0]


@pytest.mark.slow
@pytest.mark.parametrize("over", ["mean", "worst"])
def test_the_best_candidate_is_the_known_one(over):
    evaluated, told = [], []

    def evaluate(candidates):
        found = [Evaluation(one, true_scores(one), over) for one in candidates]
        evaluated.extend(found)
        return found

    options = MapOptions(evaluations=40, trade_offs=8, over_tasks=over)
    _search(options, (0.3,) * 3, "softplus", evaluate, 0, lambda before, _: told.append(before))
    assert len(evaluated) == 40
    assert evaluated[0].candidate == (0.3,) * 3
    assert told == ["quadratics fitted to 32 candidates", "trade-offs that the quadratics foretell"]
    best = min(evaluated, key=lambda one: one.rank)
    # By symmetry: half way between the goals.
    assert best.candidate == pytest.approx((0.5, 0.5, 0.2), abs=0.05)
    assert best is evaluated[32]


def test_a_search_whose_time_is_over_fits_nothing():
    assert _search(MapOptions(), (0.3,) * 3, "softplus", lambda candidates: [], 0, lambda *_: None) == ()


@pytest.mark.parametrize("usable", [0, 9, pytest.param(10, marks=pytest.mark.slow)])
def test_where_too_few_candidates_have_scores_nothing_is_fitted(usable):
    asked = []

    def evaluate(candidates):
        asked.extend(candidates)
        scores = [true_scores(one) for one in candidates]
        return [
            Evaluation(one, own if place < usable else {"A": math.nan, "B": 0.1})
            for place, (one, own) in enumerate(zip(candidates, scores, strict=True))
        ]

    reasons = _search(MapOptions(evaluations=14, trade_offs=2), (0.3,) * 3, "softplus", evaluate, 0, lambda *_: None)
    wanted = ("too few candidates have scores that are numbers, so no quadratics were fitted",)
    assert (reasons, len(asked)) == ((wanted, 12) if usable < 10 else ((), 14))


@pytest.fixture(scope="session")
def command(tiny_zoo, answered):
    given = ["--method", "map", "--cache_dir", tiny_zoo, "--data_dir", answered, "--samples_per_task", 2]
    return [*given, "--log_with", "none", "--evaluations", 14, "--trade_offs", 3, "--highest_coefficient", 0.8]


@pytest.mark.slow
def test_the_written_model_has_the_best_score(command, tiny_zoo, answered, tmp_path):
    run = merged(tmp_path, *command)
    evaluations = evaluations_of(run)
    assert len(evaluations) == 14
    assert all(0 <= value <= 0.8 for entry in evaluations for value in entry["coefficients"].values())
    best = min(evaluations, key=lambda entry: entry["score"])
    assert score_plainly(run.model, tiny_zoo, answered) == pytest.approx(best["score"], rel=1e-4)
    assert load_coefficients(run.folder).provenance["score"] == best["score"]
    log = run.log.read_text()
    assert "a quadratic of 3 coefficients for each task, with 10 terms, fitted to 11 of at most 14 evaluations" in log
    assert "share of the scores' variance that quadratics explain: Chat " in log
    assert json.loads(run.config.read_text())["options"]["trade_offs"] == 3


def test_too_few_evaluations_are_refused(command, tmp_path, capsys):
    given = [*command, "--output_path", tmp_path / "out", "--search_space", "depth", "--prompt_template", "x"]
    first, second = refused(capsys, *given)
    assert first == (
        "map fits quadratics of 9 coefficients, which have 55 terms, to --evaluations less --trade_offs, 14 - 3; give "
        "at least 58 evaluations, better twice as many"
    )
    assert "--prompt_template must contain" in second
