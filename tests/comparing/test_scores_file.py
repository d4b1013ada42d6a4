"""Scores of a run are kept, added to, and refused where they are damaged."""

from __future__ import annotations

import json
import math

import pytest

from expert_merging.comparing.scores_file import Scores, SetScore, TaskScore, add_scores, read_scores
from expert_merging.errors import InputError

ADDING = TaskScore(50.0, 9.5, 90.5, 2, (1.0, 0.0), "abc")


def test_what_is_written_is_read(tmp_path):
    file = tmp_path / "scores.json"
    scores = Scores({"test": SetScore({"adding": ADDING}, "numbers", own_mean=50.0)}, {"Math": 0.25})
    add_scores(file, scores)
    assert read_scores(file) == scores
    content = json.loads(file.read_text())
    assert content["format"] == 1
    assert content["scores"]["test"]["mean"] == 50.0
    assert content["scores"]["test"]["tasks"]["adding"]["correct"] == [1, 0]
    assert content["divergence"] == {"tasks": {"Math": 0.25}, "mean": 0.25}


def test_other_sets_stay_and_those_of_the_same_name_are_replaced(tmp_path):
    file = tmp_path / "scores.json"
    add_scores(
        file, Scores({"a": SetScore({"x": TaskScore(1.0)}), "b": SetScore({"x": TaskScore(2.0)})}, {"Math": 0.5})
    )
    add_scores(file, Scores({"b": SetScore({"y": TaskScore(3.0)})}))
    found = read_scores(file)
    assert {name: dict(one.tasks) for name, one in found.sets.items()} == {
        "a": {"x": TaskScore(1.0)},
        "b": {"y": TaskScore(3.0)},
    }
    assert found.divergence == {"Math": 0.5}


def test_a_task_keeps_its_score_on_more_questions(tmp_path):
    file = tmp_path / "scores.json"
    before = {"x": TaskScore(1.0, count=5), "y": TaskScore(2.0, count=5), "u": TaskScore(3.0), "gone": TaskScore(9.0)}
    assert add_scores(file, Scores({"a": SetScore(before)})) == {}
    new = {"y": TaskScore(6.0, count=4), "x": TaskScore(5.0, count=6), "u": TaskScore(7.0, count=1)}
    assert add_scores(file, Scores({"a": SetScore(new), "b": SetScore(new)})) == {"a": ["y"]}
    found = read_scores(file).sets
    assert list(found["a"].tasks.items()) == [("y", before["y"]), ("x", new["x"]), ("u", new["u"])]
    assert found["a"].mean == pytest.approx((2 + 5 + 7) / 3)
    unknown = {"x": TaskScore(8.0), "y": TaskScore(8.0, count=5)}
    assert add_scores(file, Scores({"a": SetScore(unknown)})) == {}, "how many questions that is nobody knows"
    assert read_scores(file).sets["a"].tasks == unknown
    other = {"y": TaskScore(6.0, count=4)}
    assert add_scores(file, Scores({"a": SetScore(other, "numbers")})) == {}, "something else is measured"
    assert read_scores(file).sets["a"].tasks == other


def test_a_mean_is_over_tasks_unless_the_set_has_its_own():
    tasks = {"x": TaskScore(1.0), "y": TaskScore(2.0)}
    assert SetScore(tasks).mean == 1.5
    assert SetScore(tasks, own_mean=7.0).mean == 7.0
    assert math.isnan(SetScore({}).mean)


def test_nothing_is_read_of_no_file_and_of_parts_that_are_missing(tmp_path):
    file = tmp_path / "scores.json"
    assert read_scores(file) == Scores()
    file.write_text('{"format": 1, "scores": {"test": {"tasks": {"x": {"mean": 3}}}}}')
    assert read_scores(file) == Scores({"test": SetScore({"x": TaskScore(3.0)})})


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("[]", "holds list, not a JSON object; move it away, and measure again"),
        ('{"format": 2}', "has format 2, and this version reads 1; move it away, and measure again"),
        ('{"format": 1, "scores": []}', "does not hold scores; move it away, and measure again"),
        ('{"format": 1, "scores": {"a": {"tasks": {"x": {}}}}}', "does not hold scores"),
        ('{"format": 1, "scores": {"a": {"tasks": {"x": {"mean": "3"}}}}}', "does not hold scores"),
        ('{"format": 1, "scores": {"a": {"tasks": {"x": {"mean": 3, "count": Infinity}}}}}', "does not hold scores"),
        ('{"format": 1, "scores": {"a": {"tasks": {"x": {"mean": 3, "correct": [NaN]}}}}}', "does not hold scores"),
        ('{"format": 1, "divergence": {"tasks": {"x": true}}}', "does not hold scores"),
    ],
)
def test_another_file_is_refused_and_left_alone(tmp_path, content, reason):
    file = tmp_path / "scores.json"
    file.write_text(content)
    with pytest.raises(InputError, match=reason):
        add_scores(file, Scores())
    assert file.read_text() == content
