"""Coefficients of singular directions: AdaRank against its plain twin, and from command to checkpoint."""

from __future__ import annotations

import pytest
import torch

from expert_merging.learned.axes import Singular
from expert_merging.learned.coefficients import load_coefficients
from expert_merging.learned.masks import GatedVector
from expert_merging.learned.options import LearningOptions, RankOptions
from expert_merging.learned.parametrisations import Layout, Parametrisation
from expert_merging.parts import Part
from tests.checkpoints import BASE, EXPERTS, tensors_of
from tests.command import merged
from tests.learned.training import make_trainer, make_twin

VARIANTS = {
    "as published": (RankOptions, {"initial_rank_ratio": 0.5}, {"entropy": True, "gates": 0.5}),
    "directions with coefficients": (
        LearningOptions,
        {"parametrisation": "direction", "learning_rate": 0.02, "sparsity_reg_weight": 0.0},
        {},
    ),
    "aligned": (
        LearningOptions,
        {"parametrisation": "rank", "learning_rate": 0.04, "sparsity_reg_weight": 0.0, "num_epochs": 4},
        {"gates": 1.0},
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", VARIANTS)
def test_training_gives_the_coefficients_of_the_plain_twin(name, answered_zoo, tmp_path):
    kind, options, twin_options = VARIANTS[name]
    trainer = make_trainer(answered_zoo, tmp_path, kind=kind, **{"num_epochs": 2, **options})
    coefficients = trainer.train()
    rate, epochs = trainer.settings.options.learning_rate, trainer.settings.options.num_epochs
    chunks = dict(trainer.settings.layout.chunks)
    twin, examples = make_twin(trainer, singular=True, chunks=chunks, learning_rate=rate, **twin_options)
    twin.train(examples, epochs, seed=3)
    closed = 0
    for parameter, values in coefficients.values.items():
        expected = twin.coefficients(parameter).detach()
        assert values.shape == expected.shape == (3, min(trainer.plan.part(parameter).shape))
        # A gate whose gradient is near 0 may stand otherwise, and moves the gradients of all others a little.
        same = (values == 0) == (expected == 0)
        assert same.float().mean() > 0.97
        torch.testing.assert_close(values[same], expected[same], rtol=0, atol=3e-3)
        closed += int((values == 0).sum())
    assert (closed > 0) == ("gates" in twin_options)


@pytest.mark.parametrize(("rows", "columns"), [(6, 4), (4, 6), (5, 5), (1, 3)])
def test_blocks_of_rows_are_the_singular_directions_of_the_whole(rows, columns):
    """Also of matrices of rank 2 or 0, whose other directions come to nothing."""
    torch.manual_seed(0)
    low = torch.randn(rows, 2) @ torch.randn(2, columns)
    matrices = torch.stack([torch.randn(rows, columns), low, torch.zeros(rows, columns)])
    whole, values = Part.whole("w", (rows, columns)), torch.rand(3, min(rows, columns))
    flat, gradient = matrices.view(3, -1), torch.randn(rows * columns)
    axis = Singular()
    bases = axis.bases(flat, whole)
    in_blocks = Singular(lambda directions, part: bases)
    expected, products = torch.zeros(rows, columns), torch.zeros_like(values)
    for number, matrix in enumerate(matrices):
        left, sizes, right = torch.linalg.svd(matrix, full_matrices=False)
        expected += (left * sizes * values[number]) @ right
        products[number] = sizes * torch.einsum("ij,ir,rj->r", gradient.view(rows, columns), left, right)
    torch.testing.assert_close(axis.apply(values, flat, whole).view(rows, columns), expected, rtol=1e-4, atol=1e-5)
    merged_blocks, total = [], torch.zeros_like(values)
    for part in whole.cut(2 * columns):
        block = slice(part.start, part.stop)
        merged_blocks.append(in_blocks.apply(values, flat[:, block], part))
        in_blocks.add_inner_products(total, gradient[block], flat[:, block], part)
    torch.testing.assert_close(torch.cat(merged_blocks).view(rows, columns), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(total, products, rtol=1e-4, atol=1e-5)


def test_gates_have_the_gradient_of_autograd():
    """That of a vector that only merges, with respect to gates and coefficient."""
    torch.manual_seed(0)
    vector = GatedVector(Layout({"w": 3, "norm": 1}, [0.3, 0.5], axes={"w": "singular"}), share=0.7)
    torch.testing.assert_close(vector.by_name()["w"], torch.tensor([[0.3, 0.3, 0.0], [0.5, 0.5, 0.0]]))
    torch.testing.assert_close(vector.by_name()["norm"], torch.tensor([[0.3], [0.5]]))
    values = vector().detach()
    for part in (Part.whole("w", (4, 3)), Part.whole("norm", (12,))):
        directions, gradient = torch.randn(2, 12), torch.randn(12)
        own, found = vector.view(values, part.name), []
        for kind in (Parametrisation, GatedVector):
            total, merged_weights = torch.zeros_like(own), torch.ones(12)
            kind.add_gradient(vector, total, own, directions, part, gradient)
            kind.add_merged(vector, merged_weights, own, directions, part)
            found.append((total, merged_weights))
        for slow, fast in zip(*found, strict=True):
            torch.testing.assert_close(fast, slow)


def test_a_gate_that_is_closed_can_open_again():
    vector = GatedVector(Layout({"w": 2}, [0.4], axes={"w": "singular"}), share=0.5)
    vector().backward(torch.tensor([1.0, -1.0, 0.0]))
    steepness = float(torch.sigmoid(torch.tensor(0.01)) * torch.sigmoid(torch.tensor(-0.01))) / 10
    assert vector.raw.grad.tolist() == pytest.approx([steepness, -steepness, 0.0])
    with torch.no_grad():
        vector.raw -= 5 * vector.raw.grad
    assert vector.by_name()["w"].tolist() == [[0.0, pytest.approx(0.4)]]


@pytest.mark.slow
def test_the_checkpoint_has_the_directions_that_count(answered_zoo, tmp_path):
    given = ["--cache_dir", answered_zoo, "--data_dir", answered_zoo / "dataset", "--samples_per_task", 2]
    given += ["--parametrisation", "rank", "--num_epochs", 4, "--learning_rate", 0.05, "--max_new_tokens", 4]
    run = merged(tmp_path, *given)
    coefficients = load_coefficients(run.folder)
    assert not run.directions.exists()
    base, result = tensors_of(answered_zoo / BASE), tensors_of(run.model)
    experts = [tensors_of(answered_zoo / folder) for folder in EXPERTS.values()]
    zeros = 0
    for name, values in coefficients.values.items():
        expected = base[name].clone()
        for row, expert in zip(values, experts, strict=True):
            left, sizes, right = torch.linalg.svd(expert[name] - base[name], full_matrices=False)
            expected += (left * (sizes * row)) @ right
        torch.testing.assert_close(result[name], expected, rtol=1e-4, atol=1e-5)
        zeros += int((values == 0).sum())
    assert zeros


@pytest.mark.slow
def test_experts_that_have_changed_nothing_or_little_are_learned_from(answered_zoo, tmp_path):
    """Their directions come to nothing, and no number is NaN."""
    base = tensors_of(answered_zoo / BASE)
    given = ["--base_model_path", answered_zoo / BASE, "--data_dir", answered_zoo / "dataset", "--num_epochs", 2]
    given += ["--samples_per_task", 1, "--expert", f"Math={answered_zoo / EXPERTS['Math']}"]
    given += ["--expert", f"Chat={answered_zoo / BASE}", "--method", "adarank"]
    run = merged(tmp_path / "out", *given)
    values = load_coefficients(run.folder).values
    assert all(value.isfinite().all() for value in values.values())
    assert base.keys() == tensors_of(run.model).keys()
