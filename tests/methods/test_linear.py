"""The linear methods against peft and plain averages."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from expert_merging.arithmetic import weighted_sum
from expert_merging.methods.linear import pma, task_arithmetic, weight_average
from tests.checkpoints import tensors_of, write_checkpoint
from tests.command import flags, merged

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


CHECKPOINTS = torch.tensor([[1.0, 0.0], [0.0, 1.0], [3.0, -2.0]])


def test_checkpoints_of_a_run_count_alike_or_the_later_the_more():
    assert pma(CHECKPOINTS.clone()).tolist() == pytest.approx([4 / 3, -1 / 3])
    assert pma(CHECKPOINTS.clone(), pma_average="wma").tolist() == pytest.approx([10 / 6, -4 / 6])


@pytest.mark.parametrize("alpha", [0.1, 0.5, 1.0])
def test_a_moving_average_is_what_its_steps_give(alpha):
    average = CHECKPOINTS[0]
    for checkpoint in CHECKPOINTS[1:]:
        average = alpha * checkpoint + (1 - alpha) * average
    torch.testing.assert_close(pma(CHECKPOINTS.clone(), pma_average="ema", pma_alpha=alpha), average)


@pytest.mark.parametrize("average", ["sma", "wma", "ema"])
@pytest.mark.parametrize("checkpoints", [1, 2, 7])
def test_equal_checkpoints_stay_what_they_are(average, checkpoints):
    given = CHECKPOINTS[:1].repeat(checkpoints, 1)
    torch.testing.assert_close(pma(given, pma_average=average), CHECKPOINTS[0])


def test_the_base_of_a_run_s_average_does_not_matter(tmp_path):
    checkpoints = {f"step{number}": write_checkpoint(tmp_path / str(number), {"a": row, "norm": row + 1})
                   for number, row in enumerate(CHECKPOINTS)}  # fmt: skip
    options = ["--method", "pma", "--pma_average", "wma", "--exclude_params", "none"]
    for base in checkpoints.values():
        found = tensors_of(merged(tmp_path / f"of {base.name}", *options, *flags(base, **checkpoints)).model)
        torch.testing.assert_close(found["a"], torch.tensor([10 / 6, -4 / 6]))
        torch.testing.assert_close(found["norm"], torch.tensor([16 / 6, 2 / 6]))
