"""Every complete run says what it took and how far it went from its base."""

from __future__ import annotations

import json
import math

import pytest

from expert_merging.merge import Summary
from expert_merging.outcome import Meter, peak_memory, read_outcome
from tests.checkpoints import tensors_of
from tests.command import TENSORS, merge, merged


def test_a_run_says_what_it_took(command, tmp_path):
    run = merged(tmp_path / "out", *command)
    outcome = read_outcome(run.outcome)
    assert outcome.seconds > 0
    assert outcome.peak_memory > 1 << 20
    assert outcome.peak_gpu_memory is None
    assert not outcome.continued
    assert outcome.finished >= json.loads(run.config.read_text())["started"]


def test_the_relative_change_is_that_of_all_merged_tensors_together(command, tmp_path):
    run = merged(tmp_path / "out", *command)
    found, names = tensors_of(run.model), ("layers.0.weight", "layers.1.weight")
    change = sum(float((found[name] - TENSORS[name]).square().sum()) for name in names)
    base = sum(float(TENSORS[name].square().sum()) for name in names)
    assert read_outcome(run.outcome).relative_change == pytest.approx(math.sqrt(change / base), rel=1e-6)


def test_a_continued_run_says_that_it_took_more(command, tmp_path, monkeypatch):
    def stop(*_arguments, **_keywords):
        raise KeyboardInterrupt

    monkeypatch.setattr("expert_merging.job.write_output", stop)
    assert merge(*command) == 130
    monkeypatch.undo()
    run = merged(tmp_path / "out", *command)
    outcome = read_outcome(run.outcome)
    assert outcome.continued
    assert outcome.relative_change > 0  # nothing had been merged before


def test_what_an_earlier_part_has_merged_leaves_no_change(command, tmp_path):
    run = merged(tmp_path / "out", *command)
    run.model.rename(run.partial_model)
    assert merge(*command) == 0
    assert read_outcome(run.outcome).relative_change is None


def test_of_several_models_the_change_is_that_of_all():
    one, other = Summary({"a": (1.0, 4.0)}, 1), Summary({"a": (8.0, 5.0)}, 2)
    both = Summary().with_output("A", one).with_output("B", other)
    assert both.changes == {"A/a": 0.5, "B/a": math.sqrt(1.6)}
    assert both.relative_change == 1.0
    assert both.kept_shards == 3
    assert Summary().relative_change == 0.0


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        "{}",
        '{"format": 2, "seconds": 1}',
        '{"format": 1, "seconds": 1}',
        '{"format": 1, "seconds": "1", "peak_memory": 1, "peak_gpu_memory": null, "relative_change": null, '
        '"continued": false, "finished": ""}',
        '{"format": 1, "seconds": true, "peak_memory": 1, "peak_gpu_memory": null, "relative_change": null, '
        '"continued": false, "finished": ""}',
        '{"format": 1, "seconds": Infinity, "peak_memory": 1, "peak_gpu_memory": null, "relative_change": null, '
        '"continued": false, "finished": ""}',
        '{"format": 1, "seconds": 1, "peak_memory": 1, "peak_gpu_memory": null, "relative_change": null, '
        '"continued": false, "finished": "", "more": 1}',
    ],
)
def test_a_damaged_record_is_none(tmp_path, content):
    file = tmp_path / "outcome.json"
    assert read_outcome(file) is None
    file.write_text(content)
    assert read_outcome(file) is None


def test_what_was_saved_is_read(tmp_path):
    Meter(continued=True).save(tmp_path / "outcome.json", 0.25, "cpu")
    outcome = read_outcome(tmp_path / "outcome.json")
    assert (outcome.relative_change, outcome.continued) == (0.25, True)


def test_the_peak_of_memory_is_this_program_s_own(tmp_path):
    (tmp_path / "self").mkdir()
    (tmp_path / "self" / "status").write_text("Name: x\nVmHWM:\t  999999999 kB\n")
    assert peak_memory(tmp_path) == 1024 * 999999999
    assert peak_memory(tmp_path / "nowhere") > 1 << 20
