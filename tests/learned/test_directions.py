"""Directions: what coefficients multiply, kept and read as it was made, and learned with from command to checkpoint."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path

import pytest
import torch

from expert_merging.catalogue import all_methods, find_method
from expert_merging.context import Context
from expert_merging.errors import InputError
from expert_merging.learned import directions as module
from expert_merging.learned.coefficients import Coefficients, load_coefficients
from expert_merging.learned.directions import find_directions, kept_name, make_directions
from expert_merging.learned.task_vectors import TaskVectors
from expert_merging.plan import make_plan
from expert_merging.progress import no_progress
from expert_merging.run import Run
from Mistral.backbone import BACKBONE
from tests.checkpoints import BASE, EXPERTS, tensors_of
from tests.command import merge, refused
from tests.launching import run_together
from tests.learned.training import EXCLUDED, make_trainer, read_task_vectors
from tests.learned.watched import learn_and_be_killed

CPU = torch.device("cpu")
SUMS = [name for name, method in all_methods().items() if method.parts is not None]


@pytest.fixture
def context(answered_zoo, tmp_path) -> Context:
    plan = make_plan(answered_zoo / BASE, {name: answered_zoo / path for name, path in EXPERTS.items()}, EXCLUDED)
    return Context(plan, BACKBONE, Run(tmp_path), 3, "cpu", "none", no_progress, find_method=find_method)


def whole(context: Context, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The base's tensor and all task vectors."""
    part = context.plan.part(name)
    base, task_vectors = read_task_vectors(context.plan, part)
    return base.view(part.shape), task_vectors.view(-1, *part.shape)


@pytest.mark.parametrize("name", SUMS)
def test_coefficients_of_one_give_the_methods_result(name, context):
    directions = find_directions(context, name)
    rule = directions.prepare()
    method = find_method(name)
    merges = method.rule({"seed": 3, "experts": tuple(EXPERTS)}, {**directions.options, "scaling_coefficient": 1.0})
    for tensor in context.plan.merged[:4]:
        part = context.plan.part(tensor)
        base, task_vectors = whole(context, tensor)
        expected = merges(task_vectors.clone(), part, base)
        ones = Coefficients(tuple(EXPERTS), {tensor: torch.ones(3, 1)}, (1.0, 1.0, 1.0), directions=directions.record)
        torch.testing.assert_close(ones.merge(rule(task_vectors, part, base), part), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["svd", "aswudi", "weight_average"])
def test_the_live_models_blocks_are_the_parts(name, context, tmp_path):
    """Kept in files or made on the fly, wherever they are kept; scaled by the user's factors last."""
    directions = find_directions(context, name)
    kept = None if directions.in_blocks else make_directions(directions, context, tmp_path / "kept")
    assert (kept is None) == (name == "weight_average")
    rule = directions.prepare()
    vectors = TaskVectors(context.plan, (1.0, 1.0, 0.5), CPU, rule, kept)
    vectors._block, vectors._step = 300, 100
    for place in ("device", "host", "disk"):
        vectors.place(dict.fromkeys(vectors.places, place))
        for tensor in context.plan.merged[:3]:
            part = context.plan.part(tensor)
            base, task_vectors = whole(context, tensor)
            expected = rule(task_vectors, part, base).reshape(3, -1) * torch.tensor([[1.0], [1.0], [0.5]])
            means = (expected.abs().mean(1) / torch.tensor([1.0, 1.0, 0.5])).tolist()
            assert vectors.magnitudes[tensor] == pytest.approx(means, rel=1e-5)
            for _, piece, found_base, found in vectors.blocks([part]):
                run = slice(piece.start, piece.stop)
                assert torch.equal(found_base, base.flatten()[run])
                torch.testing.assert_close(found, expected[:, run], rtol=0, atol=0)
    for tensor, size in vectors.sizes.items():
        assert size == directions.entry_bytes(context.plan, tensor) * context.plan.part(tensor).elements


def test_directions_are_made_once_and_continued(context, tmp_path, monkeypatch):
    directions = find_directions(context, "svd")
    kept = make_directions(directions, context, tmp_path / "kept")
    names = {kept_name(expert, name) for expert in EXPERTS for name in context.plan.merged}
    assert set(kept.entries) == names
    monkeypatch.setattr(module, "write_output", None)
    make_directions(directions, context, tmp_path / "kept")
    (tmp_path / "kept" / "config.json").unlink()
    with pytest.raises(TypeError):
        make_directions(directions, context, tmp_path / "kept")
    monkeypatch.undo()
    before = {file.name: file.stat().st_mtime_ns for file in (tmp_path / "kept").glob("*.safetensors")}
    make_directions(directions, context, tmp_path / "kept")
    assert before == {file.name: file.stat().st_mtime_ns for file in (tmp_path / "kept").glob("*.safetensors")}


def test_a_methods_defaults_are_the_familys_but_for_the_coefficient(context):
    assert find_directions(context, "swudi").options == {
        "scaling_coefficient": 1.0,
        "flow_time": 300,
        "start": "sum",
        "curvature_ratio": 0.65,
    }


def test_directions_that_are_none_are_refused(context):
    with pytest.raises(InputError, match=r"^--directions svdd: there are no such\. Did you mean 'svd'\?$"):
        find_directions(context, "svdd")
    with pytest.raises(
        InputError, match="--directions ties: the result of ties is no sum of a part for each expert"
    ) as e:
        find_directions(context, "ties")
    assert "choose one of task_vectors, trimmed, weights, " in str(e.value)


@pytest.mark.parametrize(
    ("name", "options", "problem"),
    [
        ("svd", {"scaling_coefficient": "x"}, "scaling_coefficient must be a number in [-1000, 1000], got x"),
        ("svd", {"scaling_coefficient": None}, "scaling_coefficient must be a number in [-1000, 1000], got null"),
        ("svd", {"rank": 1}, "no option 'rank'. "),
        ("aswudi", {"seed": "x"}, "seed must be a whole number, got x"),
        ("trimmed", {"density": 5}, "density must be a number in (0, 1], got 5; "),
        ("trimmed", {"thresholds": [0.1, 0.1, -1], "majority": 1}, "thresholds must be a number in [0, inf), got "),
        ("trimmed", {"thresholds": [0.1, 0.1], "majority": 1}, "what was found before has a threshold for each of 3 "),
        ("trimmed", {"thresholds": [0.1, 0.1, 0.1]}, "what was found before has a threshold for each of 3 "),
    ],
    ids=str,
)
def test_recorded_options_that_do_not_fit_are_refused(name, options, problem, context):
    """They come from a file that may have been edited."""
    with pytest.raises(InputError) as caught:
        find_directions(context, name, options)
    assert str(caught.value).startswith(f"directions of {name}: {problem}")


@pytest.mark.parametrize("name", [*SUMS, "trimmed"])
def test_what_is_recorded_is_found_again(name, context):
    directions = find_directions(context, name)
    recorded = json.loads(json.dumps(directions.record))
    assert find_directions(context, **recorded).record == directions.record


@pytest.mark.slow
def test_learned_coefficients_of_directions_start_at_one_and_may_pass_it(answered_zoo, tmp_path):
    options = {"directions": "svd", "learning_rate": 0.1, "num_epochs": 3, "sparsity_reg_weight": 0.0}
    trainer = make_trainer(answered_zoo, tmp_path, **options)
    assert trainer.settings.layout.initial == (1.0, 1.0, 1.0)
    values = torch.cat([value.flatten() for value in trainer.train().values.values()])
    assert values.max() > 1.05
    assert values.min() < 0.95
    given = make_trainer(answered_zoo, tmp_path / "given", directions="svd", scaling_coefficient=[0.5, 1.5, -1.0])
    assert given.settings.layout.initial == (0.5, 1.5, -1.0)


@pytest.mark.slow
def test_task_vectors_as_a_methods_parts_learn_the_same_gradient(answered_zoo, tmp_path):
    """The parts of task arithmetic are the task vectors; only their coefficients are free."""
    plain = make_trainer(answered_zoo, tmp_path / "a", scaling_coefficient=0.3)
    parts = make_trainer(answered_zoo, tmp_path / "b", scaling_coefficient=0.3, directions="task_arithmetic")
    gradients = []
    for trainer in (plain, parts):
        material = trainer.gather()
        trainer.vector = trainer.settings.layout.vector(CPU)
        trainer.live = trainer_live(trainer)
        trainer.live.rebuild()
        trainer._collect(material.targets, lambda *_: None)
        gradients.append(trainer.live.gradient)
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-8)


def trainer_live(trainer):
    from expert_merging.learned.live import LiveModel

    material = trainer.gather()
    return LiveModel(material.model, material.task_vectors, trainer.vector, lambda name: name)


def arguments(cache: Path, output: Path, *more: object) -> list[str]:
    given = ["--cache_dir", cache, "--data_dir", cache / "dataset", "--output_path", output, "--run_name", "r"]
    given += ["--device", "cpu", "--log_with", "none", "--learning_rate", 0.05, *more]
    return [str(argument) for argument in given]


CASES = {
    "svd": ["--directions", "svd"],
    "rows": ["--parametrisation", "row"],
    "columns": ["--parametrisation", "column"],
    "columns of weights": ["--method", "dam"],
    "singular directions": ["--parametrisation", "direction"],
    "those of svd that count": ["--directions", "svd", "--parametrisation", "rank"],
    "rows of aswudi": ["--directions", "aswudi", "--parametrisation", "row"],
    "two stages": ["--method", "expert_merging++", "--directions", "iwudi", "--budget", "2"],
}


@pytest.mark.slow
@pytest.mark.usefixtures("pictures")
@pytest.mark.parametrize("case", CASES)
def test_coefficients_of_a_run_write_its_checkpoint_again(case, answered_zoo, tmp_path):
    assert merge(*arguments(answered_zoo, tmp_path, *CASES[case])) == 0
    (run,) = tmp_path.glob("*/r")
    assert not (run / "directions").exists()
    assert len(list((run / "analysis").glob("*.png"))) == 6
    again = ["--method", "coefficients", "--coefficients", run]
    assert merge("--cache_dir", answered_zoo, "--output_path", tmp_path, "--run_name", "again", *again) == 0
    written = (tmp_path / "coefficients" / "again" / "model" / "model.safetensors").read_bytes()
    assert written == (run / "model" / "model.safetensors").read_bytes()


def test_rows_of_the_checkpoint_are_rows_times_coefficients(answered_zoo, tmp_path):
    assert merge(*arguments(answered_zoo, tmp_path, *CASES["rows"])) == 0
    run = tmp_path / "expert_merging" / "r"
    coefficients = load_coefficients(run)
    base, merged = tensors_of(answered_zoo / BASE), tensors_of(run / "model")
    experts = [tensors_of(answered_zoo / folder) for folder in EXPERTS.values()]
    for name, values in coefficients.values.items():
        assert values.shape == (3, len(base[name]))
        assert values.std(1).min() > 0, "every row has learned for itself"
        expected = base[name].clone()
        for row, expert in zip(values, experts, strict=True):
            expected += row[:, None] * (expert[name] - base[name])
        torch.testing.assert_close(merged[name], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("when", ["making", "saved"])
@pytest.mark.parametrize("parametrisation", ["layer", "direction"])
def test_a_killed_run_goes_on_to_the_same_bytes(parametrisation, when, answered_zoo, tmp_path):
    more = ["--directions", "svd", "--samples_per_task", "3", "--parametrisation", parametrisation]
    assert merge(*arguments(answered_zoo, tmp_path / "whole", *more)) == 0
    given = arguments(answered_zoo, tmp_path / "killed", *more)
    assert run_together(1, learn_and_be_killed, given, when, folder=tmp_path).codes == (-signal.SIGKILL,)
    killed, unharmed = (tmp_path / name / "expert_merging" / "r" for name in ("killed", "whole"))
    assert (killed / "directions").is_dir()
    assert merge(*given) == 0
    for name in ("coefficients.safetensors", "coefficients.json", "model/model.safetensors"):
        assert (killed / name).read_bytes() == (unharmed / name).read_bytes()
    assert not (killed / "directions").exists()


def test_the_plan_says_what_is_learned(answered_zoo, tmp_path, capsys):
    assert merge(*arguments(answered_zoo, tmp_path, "--dry_run")) == 0
    assert "coefficients start at 0.3 and multiply task vectors" in capsys.readouterr().out
    assert merge(*arguments(answered_zoo, tmp_path, "--dry_run", "--directions", "svd")) == 0
    shown = capsys.readouterr().out
    assert "coefficients start at 1 and multiply each expert's part of svd (scaling_coefficient 1.0)" in shown
    assert merge(*arguments(answered_zoo, tmp_path, "--dry_run", "--parametrisation", "row")) == 0
    rows = 3 * 3 * (2 * 32 + 2 * 16 + 2 * 48 + 32)
    assert f"{rows} coefficients learned from 15 samples" in capsys.readouterr().out


def test_a_disk_that_is_too_small_is_told_before_anything(answered_zoo, tmp_path, monkeypatch, capsys):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=200_000))
    found = refused(capsys, *arguments(answered_zoo, tmp_path / "out", "--directions", "svd"))
    assert any("directions has 0.0 GB free" in line for line in found)
    assert not (tmp_path / "out").exists()


def test_older_names_of_flags_still_count(answered_zoo, tmp_path):
    (tmp_path / "options.yaml").write_text("rank_batches: update\n")
    for name, more in {"flag": ["--rank_batches", "sample"], "file": ["--config", tmp_path / "options.yaml"]}.items():
        assert merge(*arguments(answered_zoo, tmp_path / name, "--samples_per_task", 1, *more)) == 0
        record = json.loads((tmp_path / name / "expert_merging" / "r" / "config.json").read_text())
        assert record["run"]["weight_gradients"] == ("sample" if name == "flag" else "update")
