"""SVC against the paper's steps, direction by direction."""

from __future__ import annotations

import pytest
import torch

from expert_merging.methods.calibration import svc
from tests.methods.numbers import assert_near, draw, low_rank, orthogonal


def svc_reference(given: torch.Tensor, merged: torch.Tensor, alpha: float) -> torch.Tensor:
    left, values, right = torch.linalg.svd(merged.double(), full_matrices=False)
    for number in range(len(values)):
        answer = left[:, number] @ merged.double()
        own = [left[:, number] @ task_vector for task_vector in given.double()]
        counts = [max(alpha, float(answer @ row / (row @ row))) for row in own]
        values[number] *= len(given) / sum(counts)
    return left @ torch.diag(values) @ right


@pytest.mark.parametrize("shape", [(40, 12), (12, 40), (20, 20), (1, 9), (9, 1), (2, 3)], ids=str)
@pytest.mark.parametrize("experts", [2, 5])
@pytest.mark.parametrize("alpha", [None, 0.1, 1.0])
def test_the_twin_agrees(shape, experts, alpha):
    given = draw(experts, *shape)
    for merged in (given.sum(0), given.mean(0)):
        expected = svc_reference(given, merged, alpha or 1 / experts)
        assert_near(svc(given, merged, svc_alpha=alpha), expected, 1e-5)


def test_a_direction_that_all_share_is_counted_once_and_one_s_own_is_kept():
    given = torch.zeros(3, 6, 5)
    given[:, 0, 0] = 2.0
    given[1, 3, 4] = 1.5
    calibrated = svc(given, given.sum(0), svc_alpha=1.0)
    assert float(calibrated[0, 0]) == pytest.approx(2.0)
    assert float(calibrated[3, 4]) == pytest.approx(1.5)


def test_the_sum_of_equal_experts_becomes_the_expert():
    expert = draw(12, 9)
    assert_near(svc(expert.expand(4, 12, 9).clone(), 4 * expert), expert, 1e-5)


@pytest.mark.parametrize("magnitude", [1e-30, 1e-12, 1e4, 1e18])
def test_scaled_and_turned_task_vectors_give_the_like_result(magnitude):
    given = draw(3, 12, 9)
    merged = given.sum(0)
    expected = svc(given, merged)
    assert_near(svc(given * magnitude, merged * magnitude) / magnitude, expected, 1e-4)
    left, right = orthogonal(12, 0), orthogonal(9, 1)
    assert_near(svc(left @ given @ right, left @ merged @ right), left @ expected @ right, 1e-3)


@pytest.mark.parametrize("rank", [1, 2])
def test_low_ranks_and_experts_that_are_zero_are_defined(rank):
    given = torch.cat([low_rank(2, 14, 9, rank), torch.zeros(1, 14, 9)])
    calibrated = svc(given, given.sum(0))
    assert calibrated.isfinite().all()
    padded = torch.nn.functional.pad(given, (0, 3, 0, 5))
    assert_near(svc(padded, padded.sum(0)), torch.nn.functional.pad(calibrated, (0, 3, 0, 5)), 1e-4)
