"""ACE-Merging against the formula written with inverses, and what is left to decide."""

from __future__ import annotations

import pytest
import torch

from expert_merging.methods.ace import ace, ace_parts
from tests.methods.numbers import assert_near, draw, low_rank

SHAPES = [(40, 12), (12, 40), (20, 20), (3, 90), (1, 9), (9, 1), (2, 3), (1, 1)]
SCALES = [[1.0, 1.0, 1.0], [10.0, 1.0, 0.1]]
shapes = pytest.mark.parametrize("shape", SHAPES, ids=str)
scales = pytest.mark.parametrize("scales", SCALES, ids=["alike", "heterogeneous"])


def scaled(shape: tuple[int, int], scales: list[float], seed: int = 0) -> torch.Tensor:
    return draw(len(scales), *shape, seed=seed) * torch.tensor(scales).view(-1, 1, 1)


def ace_reference(task_vectors: torch.Tensor, ridge: float = 0.01, share: float = 0.3) -> torch.Tensor:
    given = task_vectors.double()
    experts, _, columns = given.shape
    logs = given.square().sum((1, 2)).log()
    heterogeneous = experts > 1 and float(logs.var() / logs.mean() ** 2) > 0.3
    identity = torch.eye(columns, dtype=torch.float64)
    covariances, with_ridges, numerator = [], [], 0
    for task_vector in given:
        centred = task_vector - task_vector.mean(0, keepdim=True)
        covariance = centred.T @ centred
        divisor = covariance.trace() + 1e-12 if heterogeneous else 1.0
        covariances.append(covariance / divisor)
        with_ridges.append(covariance / divisor + ridge / divisor * identity)
        numerator = numerator + centred @ with_ridges[-1]
    prior = sum(covariances).mean(0, keepdim=True).expand(columns, columns)
    if heterogeneous:
        prior = prior / given.square().sum((1, 2)).mean()
    merged = numerator @ torch.linalg.inv(sum(with_ridges) + prior)
    if heterogeneous:
        mean = sum(with_ridges) / experts
        fused = merged + sum(own @ (covariance - mean) for own, covariance in zip(given, covariances, strict=True))
        left, values, right = torch.linalg.svd(fused, full_matrices=False)
        count = int(len(values) * share)
        if count:
            merged = merged + values[:count].mean() * left[:, :count] @ right[:count]
    return merged


@shapes
@scales
def test_the_twin_agrees(shape, scales):
    given = scaled(shape, scales)
    assert_near(ace(given), ace_reference(given), 1e-5)
    assert_near(ace(given, ace_ridge=2.0, leading_share=1.0), ace_reference(given, 2.0, 1.0), 1e-5)


@pytest.mark.parametrize("shape", [(12, 40), (20, 20), (3, 90)], ids=str)
def test_refinement_is_for_experts_of_different_scale_alone(shape):
    alike, different = scaled(shape, SCALES[0]), scaled(shape, SCALES[1])
    assert ace(alike, leading_share=0.0).equal(ace(alike, leading_share=1.0))
    assert not ace(different, leading_share=0.0).allclose(ace(different, leading_share=1.0))


@shapes
@scales
def test_an_expert_that_is_zero_has_no_say(shape, scales):
    given = scaled(shape, scales)
    assert_near(ace(torch.cat([given, 0 * given[:2]])), ace(given), 1e-6)


@scales
@pytest.mark.parametrize("rank", [1, 2])
def test_directions_that_no_expert_has_are_not_in_the_result(scales, rank):
    given = low_rank(3, 14, 9, rank) * torch.tensor(scales).view(-1, 1, 1)
    merged = ace(given)
    assert merged.isfinite().all()
    basis = torch.linalg.svd(torch.cat([*given, torch.ones(1, 9)]).double())[2][: 3 * rank + 1]
    assert_near(merged.double() @ basis.T @ basis, merged, 1e-5)


@pytest.mark.parametrize("factor", [0.5, 2.0])
def test_rows_that_are_all_alike_have_no_part_in_the_result(factor):
    given = draw(3, 12, 9)
    shifted = given + factor * draw(3, 1, 9, seed=1)
    assert_near(ace(shifted, ace_ridge=1.0), ace(given, ace_ridge=1.0), 1e-5)


@pytest.mark.parametrize("magnitude", [1e-30, 1e-12, 1e4, 1e18])
def test_extreme_magnitudes_give_numbers(magnitude):
    merged = ace(draw(3, 10, 6) * magnitude)
    assert merged.isfinite().all()
    assert 0 < merged.double().norm() < 100 * magnitude


@shapes
@scales
def test_the_experts_terms_sum_to_the_result(shape, scales):
    given = scaled(shape, scales)
    parts = ace_parts(given, scaling_coefficient=0.7, ace_ridge=0.01, leading_share=0.3)
    assert_near(parts.double().sum(0), ace(given, scaling_coefficient=0.7), 1e-5)
