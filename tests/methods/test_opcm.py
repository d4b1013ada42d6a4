"""OPCM against the paper's steps with full decompositions, and its order."""

from __future__ import annotations

import pytest
import torch

from expert_merging.catalogue import find_method
from expert_merging.methods.opcm import accumulate
from expert_merging.parts import Part
from tests.checkpoints import EXPERTS, make_zoo, tensors_of, write_checkpoint
from tests.command import flags, merge, merged
from tests.methods.numbers import assert_near, draw, low_rank, orthogonal
from tests.methods.test_all import apply

OPCM = find_method("opcm")
SHAPES = [(40, 12), (12, 40), (20, 20), (1, 9), (9, 1), (2, 3)]


def opcm_reference(models: list[dict[str, torch.Tensor]], threshold: float = 0.5) -> dict[str, torch.Tensor]:
    """Step by step, with a factor after every one, for models given as task vectors by name."""

    def size(model):
        return torch.sqrt(sum(tensor.square().sum() for tensor in model.values()))

    current, factor, sizes = models[0], 1.0, [size(models[0])]
    for model in models[1:]:
        following = {}
        for name, task_vector in model.items():
            if task_vector.dim() == 2:
                left, values, right = torch.linalg.svd(current[name])
                leading = int((values.cumsum(0) / values.sum() > threshold).float().argmax())
                between = left.T @ task_vector @ right.T
                between.diagonal().fill_(0)
                between[:leading, :leading] = 0
                task_vector = left @ between @ right
            following[name] = factor * current[name] + task_vector
        sizes.append(size(model))
        factor = float(size(following) / (sum(sizes) / len(sizes)))
        current = {name: tensor / factor for name, tensor in following.items()}
    return current


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("experts", [1, 2, 5])
@pytest.mark.parametrize("threshold", [0.0, 0.5, 0.9])
def test_the_twin_agrees_on_a_matrix(shape, experts, threshold):
    given = draw(experts, *shape)
    expected = opcm_reference([{"weight": task_vector} for task_vector in given.double()], threshold)["weight"]
    assert_near(apply(OPCM, given, projection_threshold=threshold), expected, 1e-5)


def folders(tmp_path, scales=(1.0, 1.0, 1.0, 1.0)):
    shapes = {"layers.0.a.weight": (37, 29), "layers.0.b.weight": (10, 50), "layers.0.norm.weight": (11,)}
    return [
        write_checkpoint(
            tmp_path / str(seed),
            {
                name: torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale
                for name, shape in shapes.items()
            },
        )
        for seed, scale in enumerate(scales)
    ]


@pytest.mark.parametrize("more", [(), ("--projection_threshold", "0.8", "--scaling_coefficient", "0.5")])
def test_the_twin_agrees_on_a_model_and_the_norm_is_the_mean_one(tmp_path, more):
    base, *experts = folders(tmp_path, (0.0, 1.0, 0.1, 2.0))
    given = flags(base, **dict(zip("ABC", experts, strict=True)))
    run = merged(tmp_path / "out", "--method", "opcm", "--exclude_params", "none", *more, *given)
    vectors = [{name: tensor.double() for name, tensor in tensors_of(folder).items()} for folder in experts]
    expected = opcm_reference(vectors, 0.8 if more else 0.5)
    for name, tensor in tensors_of(run.model).items():
        assert_near(tensor, expected[name] * (0.5 if more else 1.0), 1e-5)


def test_the_order_matters_and_is_told(tmp_path, capsys):
    zoo = make_zoo(tmp_path / "zoo")
    assert merge("--method", "opcm", "--cache_dir", zoo, "--output_path", tmp_path / "out", "--dry_run") == 0
    assert f"experts are merged in this order: {', '.join(EXPERTS)}" in " ".join(capsys.readouterr().out.split())
    base, *experts = folders(tmp_path, (0.0, 1.0, 1.0, 1.0))
    results = [
        tensors_of(
            merged(tmp_path / names, "--method", "opcm", "--exclude_params", "none", *flags(base, **order)).model
        )
        for names, order in (
            ("ABC", dict(zip("ABC", experts, strict=True))),
            ("CBA", dict(zip("CBA", reversed(experts), strict=True))),
        )
    ]
    assert not results[0]["layers.0.a.weight"].allclose(results[1]["layers.0.a.weight"])


def test_what_is_added_has_nothing_between_a_direction_and_its_own():
    given = draw(2, 14, 9).double()
    added = accumulate(given.float(), Part.whole("weight", (14, 9)), 0.5).double() - given[0]
    left, values, right = torch.linalg.svd(given[0], full_matrices=False)
    between = left.T @ added @ right.T
    leading = int((values.cumsum(0) / values.sum() <= 0.5).sum())
    assert leading > 1
    assert between.diagonal().abs().max() < 1e-5
    assert between[:leading, :leading].abs().max() < 1e-5
    assert_near(added.norm() ** 2 + given[0].norm() ** 2, (added + given[0]).norm() ** 2, 1e-6)


def test_an_expert_outside_of_the_others_is_added_whole():
    given = torch.zeros(2, 12, 9)
    given[0, :6, :4], given[1, 6:, 4:] = draw(6, 4), draw(6, 5)
    assert_near(accumulate(given, Part.whole("weight", (12, 9)), 0.5), given.sum(0), 1e-5)


def test_equal_experts_of_one_direction_are_one():
    given = low_rank(1, 12, 9, 1).expand(3, 12, 9) * torch.tensor([1.0, 2.0, 3.0]).view(-1, 1, 1)
    assert_near(apply(OPCM, given), 2 * given[0], 1e-5)


@pytest.mark.parametrize("rank", [1, 2])
def test_directions_that_are_mere_rounding_remove_nothing(rank):
    given = low_rank(2, 14, 9, rank)
    padded = torch.nn.functional.pad(given, (0, 5, 0, 3))
    assert_near(apply(OPCM, padded), torch.nn.functional.pad(apply(OPCM, given), (0, 5, 0, 3)), 1e-4)


@pytest.mark.parametrize("magnitude", [1e-30, 1e-12, 1e4, 1e18])
def test_scaled_task_vectors_give_the_scaled_result(magnitude):
    given = draw(3, 10, 6)
    assert_near(apply(OPCM, given * magnitude) / magnitude, apply(OPCM, given), 1e-4)


def test_turned_task_vectors_give_the_turned_result():
    given = draw(3, 12, 9)
    left, right = orthogonal(12, 0), orthogonal(9, 1)
    assert_near(apply(OPCM, left @ given @ right), left @ apply(OPCM, given) @ right, 1e-4)


@pytest.mark.parametrize("zero", [0, 1, 2])
def test_an_expert_that_is_zero_only_makes_the_mean_norm_smaller(zero):
    given = draw(3, 12, 9)
    given[zero] = 0
    others = torch.stack([own for number, own in enumerate(given) if number != zero])
    assert_near(apply(OPCM, given), apply(OPCM, others) * 2 / 3, 1e-5)
