"""Models in niches: children, competition and pairs against plain ways, and the command."""

from __future__ import annotations

import json
import math
from collections import Counter

import numpy as np
import pytest
import torch

from expert_merging.learned.coefficients import load_coefficients
from expert_merging.search.niches import Archive, _child, compete, crossed
from expert_merging.search.score import Judgement, Scorer
from tests.checkpoints import BASE, EXPERTS, tensors_of
from tests.command import merge, merged, refusal, refused
from tests.search.searching import KilledError, check_same, evaluations_of, killed_at, score_plainly

SIZES = (3, 5, 2, 7)


def make_task_vectors(kind="any"):
    """Task vectors of three experts, ``(3, entries)``, all tensors beside each other."""
    found = np.random.RandomState(1).randn(3, sum(SIZES))
    if kind == "deficient":
        found[2] = found[0] + found[1]
    if kind == "zero":
        found[:] = 0
    return found


def products_of(task_vectors):
    parts = np.split(task_vectors, np.cumsum(SIZES)[:-1], axis=1)
    return np.stack([part @ part.T for part in parts])


def whole(model, task_vectors):
    """The task vector that a model's coefficients make, entry by entry."""
    found, place = np.zeros(sum(SIZES)), 0
    for tensor, size in enumerate(SIZES):
        for entry in range(place, place + size):
            found[entry] = sum(model[tensor][expert] * task_vectors[expert][entry] for expert in range(3))
        place += size
    return found


def slerp_plainly(first, second, share, split):
    """Spherical interpolation of two vectors whose share is another one from an entry on."""
    lengths = math.sqrt(sum(x * x for x in first)) * math.sqrt(sum(x * x for x in second))
    angle = math.acos(max(-1, min(1, sum(x * y for x, y in zip(first, second, strict=True)) / lengths)))
    found = []
    for place, (x, y) in enumerate(zip(first, second, strict=True)):
        own = share if place < split else 1 - share
        found.append((math.sin((1 - own) * angle) * x + math.sin(own * angle) * y) / math.sin(angle))
    return np.array(found)


@pytest.mark.parametrize("kind", ["any", "deficient"])
@pytest.mark.parametrize("split", [0, 2, 4])
def test_a_child_is_what_its_parents_whole_task_vectors_give(kind, split):
    task_vectors, draw = make_task_vectors(kind), np.random.RandomState(2)
    first, second = draw.uniform(0, 1, (2, 4, 3))
    child = crossed(first, second, 0.3, split, products_of(task_vectors))
    wanted = slerp_plainly(whole(first, task_vectors), whole(second, task_vectors), 0.3, sum(SIZES[:split]))
    np.testing.assert_allclose(whole(child, task_vectors), wanted, rtol=1e-9)


def test_parents_without_an_angle_are_mixed_evenly():
    first, second = np.random.RandomState(2).uniform(0, 1, (2, 4, 3))
    wanted = np.concatenate([0.7 * first[:2] + 0.3 * second[:2], 0.3 * first[2:] + 0.7 * second[2:]])
    nothing = products_of(make_task_vectors("zero"))
    np.testing.assert_allclose(crossed(first, second, 0.3, 2, nothing), wanted)
    products = products_of(make_task_vectors())
    np.testing.assert_allclose(crossed(first, first, 0.3, 2, products), first)
    np.testing.assert_allclose(crossed(first, 2 * first, 0.0, 4, products), first, rtol=1e-6)


def test_splits_fall_between_tensors_as_often_as_they_have_entries():
    draw, products = np.random.RandomState(0), products_of(make_task_vectors())
    first, second = np.zeros((4, 3)), np.zeros((4, 3))
    first[:, 0], second[:, 1] = 1, 1
    children = [_child(first, second, SIZES, products, draw) for _ in range(300)]
    places = [next((place for place in range(1, 4) if not np.allclose(one[place], one[0])), 0) for one in children]
    # Nearest to the places 3, 8 and 10 are 4 entries (1.5 to 5.5), 3.5 and 4.5 of 17; the rest is at the ends.
    counts = Counter(places)
    for place, entries in {1: 4, 2: 3.5, 3: 4.5, 0: 5}.items():
        assert counts[place] / 300 == pytest.approx(entries / 17, abs=0.08)


def test_the_model_that_lives_by_what_all_can_do_goes():
    kept = Archive(3)
    points = {"alone": [0, 0, 1.0, 0], "a": [1.0, 1.0, 0, 0], "b": [1.0, 0.9, 0, 0], "c": [1.0, 0.5, 0, 0]}
    for name in ("alone", "a", "b"):
        kept.add(name, np.array(points[name]))
    assert kept.models == ["alone", "a", "b"]
    kept.add("c", np.array(points["c"]))

    def fitness(name):
        totals = [sum(own[question] for own in points.values()) for question in range(4)]
        return sum(points[name][question] / total for question, total in enumerate(totals) if total)

    assert min(points, key=fitness) == "c"
    assert kept.models == ["alone", "a", "b"]
    kept.add("d", np.array([0, 0, 0, 0.9]))
    assert kept.models == ["alone", "a", "d"]


def test_pairs_are_drawn_by_fitness_and_by_what_the_first_lacks():
    kept, draw = Archive(9), np.random.RandomState(0)
    points = np.array([[1, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 1.0]])
    for number, own in enumerate(points):
        kept.add(number, own)
    shares = points / np.array([2, 1, 1, 1])
    counts = Counter(kept.pair(draw) for _ in range(3000))
    fitness = shares.sum(1) / shares.sum()
    for first in range(3):
        gains = [sum(max(0, shares[other][q] - shares[first][q]) for q in range(4)) for other in range(3)]
        for second in range(3):
            wanted = fitness[first] * gains[second] / sum(gains)
            assert counts[first, second] / 3000 == pytest.approx(wanted, abs=0.03)


def test_models_without_points_are_paired_by_chance():
    kept = Archive(3)
    for number in range(3):
        kept.add(number, np.zeros(4))
    assert len({kept.pair(np.random.RandomState(seed)) for seed in range(60)}) == 9


def compete_for(evaluate, **changes):
    options = {"archive": 8, "evaluations": 150, "seed": 0, **changes}
    compete(evaluate, 3, SIZES, products_of(make_task_vectors()), **options)


def test_experts_come_first_and_halves_of_two_are_put_together():
    """One question needs the first expert's first half, the other the second expert's second half."""
    asked, told = [], []

    def points_of(candidate):
        model = np.array(candidate).reshape(4, 3)
        return [float(model[:2, 0].min()), float(model[2:, 1].min()), 0.1]

    def points(candidates):
        asked.extend(candidates)
        return [points_of(candidate) for candidate in candidates]

    compete_for(points, tell=told.append)
    assert len(asked) == 150
    assert [np.array(one).reshape(4, 3).tolist() for one in asked[:3]] == [
        [[float(expert == own) for expert in range(3)]] * 4 for own in range(3)
    ]
    assert told == list(range(8, 151, 8))
    best = max(asked, key=lambda one: sum(points_of(one)))
    assert sum(points_of(best)[:2]) > 1.7
    first = asked.copy()
    asked.clear()
    compete_for(points)
    assert asked == first


def test_no_points_end_it_and_none_that_are_no_numbers_count():
    asked = []
    compete_for(lambda candidates: asked.append(1) or ([] if len(asked) == 7 else [[math.nan, 0.5]]))
    assert len(asked) == 7


@pytest.fixture(scope="session")
def command(tiny_zoo, answered):
    given = ["--method", "m2n2", "--cache_dir", tiny_zoo, "--data_dir", answered, "--samples_per_task", 2]
    return [*given, "--log_with", "none", "--evaluations", 12, "--archive", 4]


@pytest.fixture(scope="session")
def whole_run(command, tmp_path_factory):
    return merged(tmp_path_factory.mktemp("m2n2"), *command)


def test_the_written_model_has_the_best_score(whole_run, tiny_zoo, answered):
    evaluations = evaluations_of(whole_run)
    assert len(evaluations) == 12
    for number, expert in enumerate(EXPERTS):
        entry = evaluations[number]
        assert {name.split("/")[0] for name, value in entry["coefficients"].items() if value == 1} == {expert}
        assert set(entry["coefficients"].values()) == {0.0, 1.0}
        assert len(entry["items"]) == 6
    best = min(evaluations, key=lambda entry: entry["score"])
    assert score_plainly(whole_run.model, tiny_zoo, answered) == pytest.approx(best["score"], rel=1e-4)
    values = load_coefficients(whole_run.folder).values
    base, experts = tensors_of(tiny_zoo / BASE), [tensors_of(tiny_zoo / place) for place in EXPERTS.values()]
    for name, own in values.items():
        assert own[:, 0].tolist() == pytest.approx([best["coefficients"][f"{expert}/{name}"] for expert in EXPERTS])
        wanted = base[name] + sum(a * (expert[name] - base[name]) for a, expert in zip(own[:, 0], experts, strict=True))
        torch.testing.assert_close(tensors_of(whole_run.model)[name], wanted, rtol=1e-5, atol=1e-6)


def test_children_follow_from_weights_and_scores(whole_run, tiny_zoo):
    """The same search, with inner products from the files and points from the scores that were recorded."""
    evaluations = evaluations_of(whole_run)
    base, experts = tensors_of(tiny_zoo / BASE), [tensors_of(tiny_zoo / place) for place in EXPERTS.values()]
    names = list(load_coefficients(whole_run.folder).values)
    products, sizes, asked = [], [], []
    for name in names:
        task_vectors = [(expert[name] - base[name]).double().flatten() for expert in experts]
        products.append([[float(one @ other) for other in task_vectors] for one in task_vectors])
        sizes.append(base[name].numel())

    def points(candidates):
        asked.extend(candidates)
        return [[max(0, min(1, 1 - score)) for score in evaluations[len(asked) - 1]["items"]]]

    compete(points, 3, sizes, np.array(products), archive=4, evaluations=12, seed=0)
    for candidate, entry in zip(asked, evaluations, strict=True):
        recorded = [entry["coefficients"][f"{expert}/{name}"] for name in names for expert in EXPERTS]
        assert candidate == pytest.approx(recorded, abs=1e-5)


@pytest.mark.slow
def test_an_interrupted_search_ends_the_same(command, whole_run, tmp_path, monkeypatch):
    asked = killed_at(monkeypatch, 8)
    with pytest.raises(KilledError):
        merge(*command, "--output_path", tmp_path)
    run = merged(tmp_path, *command)
    assert len(asked) == 8 + 5
    check_same(run, whole_run)


@pytest.mark.slow
def test_answers_to_single_questions_are_what_models_compete_for(command, tiny_zoo, answered, tmp_path):
    for task in ("Chat", "Math"):
        entries = [
            {"question": f"{task} question {number}?", "choices": ["a", "b"], "answer": "ab"[number % 4 == 3]}
            for number in range(4)
        ]
        (tmp_path / f"{task}.json").write_text(json.dumps(entries))
    run = merged(tmp_path / "out", *command, "--evaluations", 5, "--questions", tmp_path)
    for entry in evaluations_of(run):
        assert set(entry["items"]) <= {0.0, 1.0}
        for place, task in enumerate(("Chat", "Math")):
            assert sum(entry["items"][4 * place : 4 * place + 4]) / 4 == entry["tasks"][task]


def test_candidates_without_numbers_are_refused(command, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(Scorer, "score", lambda *_: Judgement({"Chat": math.nan}, (math.nan, 0.5)))
    assert refusal(capsys, *command, "--output_path", tmp_path / "out") == (
        "no candidate's predictions are numbers; use --mixed_precision no"
    )


def test_numbers_that_leave_no_room_are_refused(command, tmp_path, capsys):
    given = [*command, "--output_path", tmp_path / "out"]
    assert refused(capsys, *given, "--archive", 2, "--evaluations", 3, "--prompt_template", "x") == [
        "--archive must have room for the 3 experts, got 2",
        "m2n2 begins with an evaluation of each of the 3 experts; give more --evaluations than 3",
        "--prompt_template must contain {question}, got 'x'",
    ]
    assert merge(*given, "--dry_run") == 0
    assert (
        "models of 63 coefficients, the experts and their descendants, of which 4 live at a time; at most 12 "
        "evaluations on 6 samples" in capsys.readouterr().out
    )
