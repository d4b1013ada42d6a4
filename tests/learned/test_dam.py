"""Coefficients of columns: DAM against its plain twin, and from command to checkpoint."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from expert_merging.commands.main import main
from expert_merging.learned.coefficients import load_coefficients
from expert_merging.learned.options import ColumnOptions, EntropyOptions, LearningOptions
from expert_merging.learned.parametrisations import CoefficientVector, Layout
from expert_merging.learned.penalties import Pairs
from tests.checkpoints import EXPERTS, tensors_of
from tests.command import merge, merged, refusal
from tests.learned.training import make_trainer, make_twin

VARIANTS = {
    "as published": (ColumnOptions, {}, {"free": True, "whole": True, "temperature": 2.0, "similarity": 0.01}),
    "every penalty": (
        ColumnOptions,
        {"similarity_weight": 0.1, "overlap_weight": 0.05, "scaling_coefficient": [0.2, 0.5, 0.35]},
        {"free": True, "whole": True, "temperature": 2.0, "similarity": 0.1, "overlap": 0.05},
    ),
    "columns of task vectors": (
        LearningOptions,
        {"parametrisation": "column", "learning_rate": 0.02},
        {"regularisation": 0.8},
    ),
    "columns by entropy": (EntropyOptions, {"parametrisation": "column", "learning_rate": 0.02}, {"entropy": True}),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", VARIANTS)
def test_training_gives_the_coefficients_of_the_plain_twin(name, answered_zoo, tmp_path):
    kind, options, twin_options = VARIANTS[name]
    trainer = make_trainer(answered_zoo, tmp_path, kind=kind, num_epochs=2, **options)
    coefficients = trainer.train()
    matrices = {part.name: part for part in map(trainer.plan.part, trainer.plan.merged) if len(part.shape) == 2}
    assert {name: value.shape[1] for name, value in coefficients.values.items() if name in matrices} == {
        name: part.shape[1] for name, part in matrices.items()
    }
    rate = trainer.settings.options.learning_rate
    chunks = dict(trainer.settings.layout.chunks)
    twin, examples = make_twin(trainer, columns=True, chunks=chunks, learning_rate=rate, **twin_options)
    twin.train(examples, 2, seed=3)
    for parameter, values in coefficients.values.items():  # of many columns, some have gradients near 0, as Adam's sign
        torch.testing.assert_close(values, twin.coefficients(parameter).detach(), rtol=1e-4, atol=5e-4)


def run_of(cache, output, *more):
    given = ["--cache_dir", cache, "--data_dir", cache / "dataset", "--samples_per_task", 2, "--max_new_tokens", 4]
    return merged(output, "--method", "dam", *given, *more)


@pytest.mark.slow
def test_the_checkpoint_is_the_sum_of_weights_each_column_times_its_coefficient(answered_zoo, tmp_path):
    run = run_of(answered_zoo, tmp_path / "out")
    coefficients = load_coefficients(run.folder)
    assert not run.weight_coeffs.exists(), "the published format would take columns for chunks"
    result = tensors_of(run.model)
    experts = [tensors_of(answered_zoo / folder) for folder in EXPERTS.values()]
    for name, values in coefficients.values.items():
        assert values.std(1).min() > 0, "every column has learned for itself"
        expected = sum(expert[name] * row for row, expert in zip(values, experts, strict=True))
        torch.testing.assert_close(result[name], expected, rtol=1e-5, atol=1e-6)
    assert main(["verify", str(run.folder)]) == 0


def test_the_plan_says_that_weights_take_the_place_of_the_bases(answered_zoo, tmp_path, capsys):
    given = ["--cache_dir", answered_zoo, "--data_dir", answered_zoo / "dataset", "--dry_run"]
    assert merge("--method", "dam", "--output_path", tmp_path, *given) == 0
    assert "multiply each expert's weights, whose sum takes the place of the base's" in capsys.readouterr().out


@pytest.mark.slow
def test_columns_of_other_tensors_are_refused(answered_zoo, tmp_path, capsys):
    run = run_of(answered_zoo, tmp_path / "out", "--num_epochs", 1)
    name = "model.layers.0.self_attn.q_proj.weight"
    for damage, told in (
        ({name: 3}, f"has 3 columns for {name}, which is [32, 32]"),
        ({name: "diagonals"}, "are not coefficients of a run (ValueError(\"coefficients along 'diagonals'\"))"),
    ):
        place = tmp_path / str(damage[name])
        place.mkdir()
        described = json.loads(run.coefficients.with_suffix(".json").read_text())
        values = load_file(run.coefficients)
        if damage[name] == 3:
            described["chunks"][name], values[name] = 3, values[name][:, :3].clone()
        else:
            described["axes"][name] = damage[name]
        save_file(values, place / "coefficients.safetensors")
        (place / "coefficients.json").write_text(json.dumps(described))
        given = ["--method", "coefficients", "--coefficients", place / "coefficients.safetensors"]
        assert told in refusal(capsys, "--cache_dir", answered_zoo, "--output_path", tmp_path / "again", *given)


def test_a_single_expert_has_no_pairs():
    vector = CoefficientVector(Layout({"a": 3}, [0.5], bounded=False, axes={"a": "columns"}))
    assert Pairs(0.0, similarity=1.0, overlap=1.0)(vector(), vector) == 0
