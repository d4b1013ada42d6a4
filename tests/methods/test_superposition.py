"""STF: what is asked of each feature, and against plain solvers."""

from __future__ import annotations

import pytest
import torch

from expert_merging.methods.superposition import stf, stf_parts
from tests.methods.numbers import assert_near, draw, low_rank, orthogonal

SHAPES = [(40, 12), (12, 40), (20, 20), (1, 9), (9, 1), (2, 3)]
systems = pytest.mark.parametrize("system", ["scalar", "vector"])


def features(given: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    count = max(1, min(given.shape[1:]) // len(given))
    left, values, right = torch.linalg.svd(given.double(), full_matrices=False)
    return left[:, :, :count], values[:, :count], right[:, :count].mT


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("experts", [1, 2, 4])
def test_every_feature_has_its_value(shape, experts):
    """As far as there are solutions, which there are for as many features as the matrix has entries."""
    given = draw(experts, *shape)
    if experts > min(shape):
        pytest.skip("more features than directions")
    merged = stf(given).double()
    for left, values, right in zip(*features(given), strict=True):
        torch.testing.assert_close((left.T @ merged @ right).diagonal(), values, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("experts", [1, 2, 3])
def test_every_feature_s_answer_is_the_expert_s(shape, experts):
    given = draw(experts, *shape)
    left, values, right = (torch.cat([*parts], -1) for parts in features(given))
    expected = (left * values) @ torch.linalg.pinv(right, rtol=1e-3)
    assert_near(stf(given, stf_system="vector"), expected, 1e-3)


def test_the_strengths_solve_the_system():
    given = draw(3, 12, 9)
    left, values, right = (torch.cat([*parts], -1) for parts in features(given))
    plain = torch.stack([torch.outer(one, other).flatten() for one, other in zip(left.T, right.T, strict=True)])
    strengths = torch.linalg.solve(plain @ plain.T, values)
    assert_near(stf(given), (left * strengths) @ right.T, 1e-4)


@systems
def test_features_that_are_orthogonal_are_summed(system):
    given = torch.zeros(3, 12, 9)
    for expert, block in enumerate(draw(3, 4, 3)):
        given[expert, 4 * expert : 4 * expert + 4, 3 * expert : 3 * expert + 3] = block
    assert_near(stf(given, stf_system=system), given.sum(0), 1e-5)


@systems
def test_equal_experts_have_their_leading_part_once(system):
    expert = draw(12, 9)
    left, values, right = torch.linalg.svd(expert, full_matrices=False)
    expected = left[:, :3] * values[:3] @ right[:3]
    assert_near(stf(expert.expand(3, 12, 9).clone(), stf_system=system), expected, 1e-4)


@systems
@pytest.mark.parametrize("magnitude", [1e-30, 1e-12, 1e4, 1e18])
def test_scaled_and_turned_task_vectors_give_the_like_result(system, magnitude):
    given = draw(3, 12, 9)
    expected = stf(given, stf_system=system)
    assert_near(stf(given * magnitude, stf_system=system) / magnitude, expected, 1e-3)
    left, right = orthogonal(12, 0), orthogonal(9, 1)
    assert_near(stf(left @ given @ right, stf_system=system), left @ expected @ right, 1e-3)


@systems
@pytest.mark.parametrize("rank", [1, 2])
def test_low_ranks_and_experts_that_are_zero_are_defined(system, rank):
    given = low_rank(3, 14, 9, rank)
    expected = torch.nn.functional.pad(stf(given, stf_system=system), (0, 0, 0, 5))
    assert_near(stf(torch.nn.functional.pad(given, (0, 0, 0, 5)), stf_system=system), expected, 1e-4)
    given[1] = 0
    assert stf(given, stf_system=system).isfinite().all()


@systems
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_experts_parts_are_their_features(system, shape):
    given = draw(2, *shape)
    parts = stf_parts(given, scaling_coefficient=0.7, stf_system=system)
    assert_near(parts.sum(0), stf(given, scaling_coefficient=0.7, stf_system=system), 1e-5)
    for part, left in zip(parts.double(), features(given)[0], strict=True):
        assert_near(left @ left.T @ part, part, 1e-4)
