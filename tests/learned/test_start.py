"""The start that is chosen by divergence, and the samples that are held out."""

from __future__ import annotations

import json
from collections import Counter
from types import SimpleNamespace

import pytest
import torch

from expert_merging.learned.coefficients import load_coefficients
from expert_merging.learned.epochs import hold_out
from expert_merging.learned.settings import Start
from expert_merging.learned.start import choose_start
from expert_merging.learned.trainer import Trainer
from expert_merging.running.scores import relative_mean
from tests.command import merged, refusal
from tests.learned.training import make_trainer


def flags(zoo, *more):
    data = ["--cache_dir", zoo, "--data_dir", zoo / "dataset", "--log_with", "none", "--method", "expert_merging"]
    return [*data, "--samples_per_task", 2, *more]


def test_learning_begins_where_the_merge_is_nearest_to_the_experts(answered_zoo, tmp_path):
    run = merged(tmp_path / "out", *flags(answered_zoo, "--directions", "svd,task_vectors", "--run_name", "chosen"))
    record = json.loads(run.start.read_text())
    names = [*record["divergence"]]
    assert names == ["svd at 1", "task_vectors at 0.3"]
    best = min(record["divergence"], key=record["divergence"].get)
    assert record["chosen"] == best
    lines = run.log.read_text()
    assert f"learning begins at {best}" in lines
    assert f"{best}: {record['divergence'][best]:.4g} of the base's divergence from the experts" in lines
    assert not run.directions.exists()
    name, value = best.split(" at ")
    alone = merged(
        tmp_path / "other",
        *flags(answered_zoo, "--directions", name, "--scaling_coefficient", value, "--run_name", "alone"),
    )
    assert not alone.start.exists()
    chosen, given = load_coefficients(run.folder), load_coefficients(alone.folder)
    assert chosen.directions == given.directions
    for tensor, values in given.values.items():
        assert torch.equal(chosen.values[tensor], values)
    for file in alone.model.glob("*.safetensors"):
        assert (run.model / file.name).read_bytes() == file.read_bytes()


def test_a_given_coefficient_is_the_only_one_that_is_tried(answered_zoo, tmp_path, monkeypatch):
    given = flags(answered_zoo, "--directions", "svd,task_vectors", "--scaling_coefficient", 0.4)
    first = merged(tmp_path / "out", *given)
    assert [*json.loads(first.start.read_text())["divergence"]] == ["svd at 0.4", "task_vectors at 0.4"]


def test_a_choice_is_made_once(answered_zoo, tmp_path, monkeypatch):
    """What an earlier part of the run has chosen stands, and nothing is scored again."""
    given = flags(answered_zoo, "--directions", "task_vectors,svd", "--run_name", "again")

    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_learn", stop)
        with pytest.raises((KeyboardInterrupt, SystemExit, AssertionError)):
            merged(tmp_path / "out", *given)
    (start,) = tmp_path.rglob("start.json")
    record = json.loads(start.read_text())
    record["chosen"] = next(name for name in record["divergence"] if name != record["chosen"])
    start.write_text(json.dumps(record))
    monkeypatch.setattr("expert_merging.learned.start._score", stop)
    run = merged(tmp_path / "out", *given)
    assert load_coefficients(run.folder).directions["name"] == record["chosen"].partition(" at ")[0]
    assert json.loads(start.read_text()) == record


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"chosen": 7}', '{"chosen": "svd at 2"}'])
def test_a_damaged_record_is_no_choice(content, answered_zoo, tmp_path):
    (tmp_path / "start.json").write_text(content)
    trainer = make_trainer(answered_zoo, tmp_path, directions="weight_average,task_vectors", samples_per_task=2)
    chosen, material = choose_start(trainer.context, trainer.settings, trainer.accelerator)
    assert material is not None
    recorded = json.loads((tmp_path / "start.json").read_text())["chosen"]
    assert str(Start(chosen.directions, chosen.layout.initial)) == recorded


@pytest.mark.parametrize("first", ["weight_average", "task_vectors"])
def test_given_coefficients_decide_what_they_multiply(first, answered_zoo, tmp_path):
    """Though others of the directions may be nearer to the experts."""
    learned = merged(tmp_path / "first", *flags(answered_zoo, "--directions", first))
    given = ["--method", "expert_merging++", "--directions", "weight_average,task_vectors", "--budget", 2]
    run = merged(tmp_path / "second", *flags(answered_zoo, *given, "--coefficients", learned.folder))
    assert load_coefficients(run.folder).directions["name"] == first


def test_the_plus_plus_variant_chooses_as_well(answered_zoo, tmp_path):
    given = ["--method", "expert_merging++", "--directions", "weight_average,task_vectors", "--budget", 2]
    run = merged(tmp_path / "out", *flags(answered_zoo, *given))
    assert json.loads((run.folder / "stage1" / "start.json").read_text())["divergence"]


def test_unknown_directions_among_several_are_refused(answered_zoo, tmp_path, capsys):
    line = refusal(capsys, *flags(answered_zoo, "--directions", "svd,sdv", "--output_path", tmp_path))
    assert line.startswith("--directions sdv: there are no such. Did you mean 'svd'?")


def test_of_each_task_a_share_is_held_out():
    samples = [SimpleNamespace(task="ab"[number % 2], number=number) for number in range(20)]
    learned, held = hold_out(samples, 0.2)
    assert Counter(sample.task for sample in held) == {"a": 2, "b": 2}
    assert sorted(sample.number for sample in (*learned, *held)) == [*range(20)]
    assert [sample.number for sample in learned] == sorted(sample.number for sample in learned)
    assert hold_out(samples, 0.0) == (samples, [])
    learned, held = hold_out(samples[:3], 0.9)
    assert [sample.task for sample in held] == ["a"], "a task keeps one to learn from, and its only one"
    learned, held = hold_out(samples[:2], 0.5)
    assert (learned, held) == (samples[:2], [])
    assert len(hold_out(samples, 0.01)[1]) == 2


def test_losses_are_compared_task_by_task():
    assert relative_mean({"a": 1.0, "b": 3.0}, {"a": 2.0, "b": 2.0}) == 1.0
    assert relative_mean({"a": 0.0, "b": 0.0}, {"a": 0.0, "b": 4.0}) == 0.5


def test_the_best_on_the_held_out_samples_is_kept(answered_zoo, tmp_path, monkeypatch):
    trainer = make_trainer(answered_zoo, tmp_path, samples_per_task=4, num_epochs=4, held_out=0.25, learning_rate=0.1)
    seen, scores = [], iter([0.9, 0.7, 0.8, 0.75])
    real = Trainer._losses_held_out

    def losses(self):
        found = real(self)
        assert set(found) == set(trainer.report.tasks)
        if not self.state.first_losses:
            return found
        seen.append(self.vector.raw.detach().clone())
        share = next(scores)
        return {task: share * first for task, first in self.state.first_losses.items()}

    monkeypatch.setattr(Trainer, "_losses_held_out", losses)
    result = trainer.train()
    assert len(seen) == 4
    assert torch.equal(trainer.vector.raw, seen[1])
    assert trainer.state.best_loss == pytest.approx(0.7)
    best = torch.sigmoid(seen[1])
    name = next(iter(result.values))
    torch.testing.assert_close(result.values[name], trainer.vector.view(best, name))


def test_coefficients_that_help_no_held_out_sample_are_not_kept(answered_zoo, tmp_path):
    """At a rate that can only harm, the result is the start."""
    trainer = make_trainer(answered_zoo, tmp_path, samples_per_task=4, num_epochs=2, held_out=0.5, learning_rate=500.0)
    start = trainer.settings.layout.vector("cpu").raw.detach().clone()
    trainer.train()
    assert torch.equal(trainer.vector.raw, start)
    assert trainer.state.best_loss == 1.0
