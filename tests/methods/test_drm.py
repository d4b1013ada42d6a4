"""DRM against the paper's steps, entry by entry where it chooses."""

from __future__ import annotations

import pytest
import torch

from expert_merging.methods.drm import drm_h, drm_h_parts, drm_v, drm_v_parts
from tests.methods.numbers import assert_near, draw, low_rank

SHAPES = [(40, 12), (12, 40), (20, 20), (1, 9), (9, 1), (2, 3)]
METHODS = [(drm_h, drm_h_parts), (drm_v, drm_v_parts)]
both = pytest.mark.parametrize(("method", "parts"), METHODS, ids=["drm_h", "drm_v"])


def drm_v_reference(given: torch.Tensor, drop_rate: float = 0.8) -> torch.Tensor:
    given = given.double()
    left, values, right = torch.linalg.svd(torch.cat([*given]), full_matrices=False)
    kept = values > 0.01 * values.max()
    blocks = torch.stack(left[:, kept].split(given.shape[1]))
    lengths = blocks.square().sum(1, keepdim=True).sqrt()
    blocks = torch.where(lengths > 0, blocks / lengths, 0)
    ordered = blocks.abs().flatten().sort().values
    dropped = len(ordered) - round(len(ordered) * (1 - drop_rate))
    if dropped:
        blocks = blocks * (blocks.abs() >= ordered[dropped - 1])
    coordinates = blocks * values[kept] * lengths
    sums = coordinates.sum(0)
    merged = torch.zeros_like(sums)
    for row in range(merged.shape[0]):
        for column in range(merged.shape[1]):
            agreeing = [float(own) for own in coordinates[:, row, column] if own * sums[row, column] > 0]
            merged[row, column] = sum(agreeing) / len(agreeing) if agreeing else 0
    return merged @ right[kept]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("experts", [1, 2, 5])
@pytest.mark.parametrize("drop_rate", [0.0, 0.5, 0.8])
def test_the_twin_agrees(shape, experts, drop_rate):
    given = draw(experts, *shape)
    assert_near(drm_v(given, drop_rate=drop_rate), drm_v_reference(given, drop_rate), 1e-5)
    assert_near(drm_h(given, drop_rate=drop_rate), drm_v_reference(given.mT, drop_rate).mT, 1e-5)


@both
@pytest.mark.parametrize("rank", [1, 2])
def test_low_ranks_stay_in_the_space_of_the_experts(method, parts, rank):
    given = low_rank(3, 14, 9, rank)
    merged = method(given)
    assert merged.isfinite().all()
    other = method(torch.nn.functional.pad(given, (0, 2, 0, 0) if method is drm_v else (0, 0, 0, 2)))
    assert_near(other[:14, :9], merged, 1e-4)
    assert other.norm() == pytest.approx(float(merged.norm()), rel=1e-4)


@both
def test_everything_kept_gives_one_expert_itself_but_for_the_weakest_directions(method, parts):
    given = draw(1, 14, 9)
    assert_near(method(given, drop_rate=0.0), given[0], 1e-5)


@both
@pytest.mark.parametrize("magnitude", [1e-30, 1e-12, 1e4, 1e18])
def test_scaled_task_vectors_give_the_scaled_result(method, parts, magnitude):
    given = draw(3, 10, 6)
    assert_near(method(given * magnitude) / magnitude, method(given), 1e-4)


@both
def test_an_expert_that_is_zero_is_defined(method, parts):
    given = draw(3, 10, 6)
    given[1] = 0
    assert method(given).isfinite().all()
    assert method(given).norm() > 0
    assert method(0 * given).equal(torch.zeros(10, 6))


@both
def test_the_experts_parts_are_those_that_agree(method, parts):
    given = draw(3, 10, 6)
    found = parts(given, scaling_coefficient=0.7, drop_rate=0.5)
    assert_near(found.sum(0), method(given, scaling_coefficient=0.7, drop_rate=0.5), 1e-5)
    assert all(part.norm() > 0 for part in found)
