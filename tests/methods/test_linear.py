"""The linear methods against peft and plain averages."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from expert_merging.arithmetic import weighted_sum
from expert_merging.methods.linear import task_arithmetic, weight_average

COEFFICIENTS = st.floats(-2, 2, width=32)


def task_vectors(experts: int = 3) -> torch.Tensor:
    return torch.randn(experts, 6, 5, generator=torch.Generator().manual_seed(experts))


@given(weights=st.lists(COEFFICIENTS, min_size=1, max_size=5))
def test_task_arithmetic_is_peft_s(weights):
    from peft.utils.merge_utils import task_arithmetic as oracle

    given = task_vectors(len(weights))
    expected = oracle(list(given), torch.tensor(weights))
    torch.testing.assert_close(task_arithmetic(given, scaling_coefficient=weights), expected, rtol=1e-5, atol=1e-5)


@given(experts=st.integers(1, 6), coefficient=COEFFICIENTS)
def test_one_coefficient_counts_for_every_expert(experts, coefficient):
    given = task_vectors(experts)
    merged = task_arithmetic(given, scaling_coefficient=coefficient)
    assert merged.equal(task_arithmetic(given, scaling_coefficient=[coefficient] * experts))


@given(experts=st.integers(1, 6))
def test_weight_average_is_the_mean_of_the_experts(experts):
    base, given = torch.randn(6, 5), task_vectors(experts)
    expected = torch.stack([base + task_vector for task_vector in given]).mean(0)
    torch.testing.assert_close(base + weight_average(given), expected, rtol=1e-5, atol=1e-6)


def test_weight_average_goes_part_of_the_way_to_the_mean():
    given = task_vectors()
    torch.testing.assert_close(weight_average(given, scaling_coefficient=0.1), 0.1 * given.mean(0))


def test_a_weight_for_every_expert_is_needed():
    with pytest.raises(ValueError, match="zip"):
        weighted_sum(task_vectors(), [0.5, 0.5])
