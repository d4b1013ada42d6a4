"""The table of sweeps over several seeds."""

from __future__ import annotations

import json

import pytest

from benchmarks import seeds
from expert_merging.comparing.sweep_record import Record, Scored
from expert_merging.errors import InputError


def sweep(folder, name, **correct):
    """A record whose points have answered so many of ten questions of either task rightly."""
    record = Record(folder / f"{name}.json", {"seed": name.split("-")[0]})
    for method, right in correct.items():
        points = {task: [1.0] * count + [0.0] * (10 - count) for task, count in zip("AB", right, strict=True)}
        record.add(Scored({"method": method}, method, 1.0, {"A": 0.25, "B": 0.5}, points))
    record.add(Scored({"method": "ties"}, "early", 0.5, {"A": 1.0, "B": 1.0}, {"A": [1.0], "B": [1.0]}))
    record.add(Scored({"method": "broken"}, "broken", problem="it cannot be merged"))
    return record.file


def test_means_spread_and_tests(tmp_path, monkeypatch, capsys):
    first = sweep(tmp_path, "first", ties=(2, 4), svd=(6, 8), pcb=(1, 1))
    second = sweep(tmp_path, "second", ties=(4, 6))
    more = sweep(tmp_path, "second-more", svd=(10, 10))
    monkeypatch.setattr("sys.argv", ["seeds", str(first), str(second), str(more)])
    seeds.main()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "|  | mean | 95 % interval | worst to best | divergence |"
    assert lines[2].startswith("| `svd` | 85.0 | ")
    assert lines[2].endswith(" | 70.0-100.0 | 0.38 |")
    assert lines[3].startswith("| `ties` | 40.0 | ")
    low, high = map(float, lines[3].split(" | ")[2].split("-"))
    assert 20 < low < 40 < high < 60
    assert lines[5] == "- `svd` alone is right on 18 questions of 40, `ties` alone on 0 (p = 7.6e-06)"
    assert lines[-1] == "not in all sweeps, and left out: pcb"


def test_one_sweep_has_no_spread(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["seeds", str(sweep(tmp_path, "first", ties=(2, 4)))])
    seeds.main()
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == ["|  | mean | 95 % interval | divergence |", "| --- | --- | --- | --- |"]
    assert lines[2].count("|") == 5


def test_questions_are_paired_by_their_tasks(tmp_path):
    record = Record(tmp_path / "one.json", {"seed": 1})
    points = {"A": [1.0] * 10, "B": [0.0] * 10}
    record.add(Scored({"method": "svd"}, "a", 1.0, {"A": 0.5}, points))
    record.add(Scored({"method": "ties"}, "b", 1.0, {"A": 0.5}, dict(reversed(points.items()))))
    (line,) = seeds.tests_of(seeds.rows_of(seeds.read_all([record.file])))
    assert "alone is right on 0 questions of 20" in line
    assert "alone on 0 (p = 1)" in line


def test_a_record_may_lack_a_description(tmp_path):
    file = sweep(tmp_path, "old", ties=(2, 4))
    content = json.loads(file.read_text())
    del content["description"]
    file.write_text(json.dumps(content))
    assert [*seeds.read_all([file])[0]] == ["ties"]


def test_what_is_no_record_with_questions_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"none.json is no file; give the sweep.json of sweeps"):
        seeds.read(tmp_path / "none.json")
    for content, told in (("[1", "is not valid JSON"), ("{}", "holds no scores of a sweep")):
        (tmp_path / "other.json").write_text(content)
        with pytest.raises(InputError, match=rf"other.json {told}.*; give the sweep.json of sweeps"):
            seeds.read(tmp_path / "other.json")
    record = Record(tmp_path / "bare.json", {})
    record.add(Scored({"method": "svd"}, "a", 1.0, {"A": 0.25}))
    with pytest.raises(InputError, match="has no points that were asked labelled questions; sweep with --questions"):
        seeds.read(record.file)
