"""LoRE-Merging against plain decompositions, and the function that it lowers."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from expert_merging.methods.lore import estimate, lore
from tests.methods.numbers import assert_near, draw, low_rank, orthogonal


def lore_reference(experts: torch.Tensor, penalty: float, weight: float, steps: int) -> torch.Tensor:
    experts = experts.double()
    changes = torch.zeros_like(experts)
    for _ in range(steps):
        common = (experts - changes).mean(0)
        for number, expert in enumerate(experts):
            left, values, right = torch.linalg.svd(expert - common, full_matrices=False)
            changes[number] = left @ torch.diag((values - penalty / 2).clamp(min=0)) @ right
    return (experts - changes).mean(0) + weight * changes.sum(0)


def objective(experts: torch.Tensor, penalty: float, steps: int) -> float:
    common, changes = estimate(experts, penalty, steps)
    lost = (common + changes - experts).double().square().sum()
    return float(lost + penalty * torch.linalg.svdvals(changes.double()).sum())


@pytest.mark.parametrize("shape", [(30, 12), (12, 30), (20, 20), (1, 9), (9, 1)], ids=str)
@pytest.mark.parametrize("experts", [1, 2, 4])
@pytest.mark.parametrize("penalty", [0.01, 0.5])
def test_the_twin_agrees(shape, experts, penalty):
    given = draw(experts, *shape) * 0.1
    options = {"lore_penalty": penalty, "lore_weight": 0.7, "steps": 5}
    assert_near(lore(given, **options), lore_reference(given, penalty, 0.7, 5), 1e-5)


@pytest.mark.parametrize("penalty", [0.1, 1.0, 3.0])
def test_the_function_falls_at_every_step(penalty):
    given = draw(3, 20, 12) * torch.tensor([0.1, 0.3, 0.5]).view(-1, 1, 1)
    values = [objective(given, penalty, steps) for steps in range(1, 12)]
    assert all(after <= before * (1 + 1e-6) for before, after in pairwise(values))
    assert values[-1] < values[0] * 0.999


def test_a_step_is_an_optimum_with_half_of_the_penalty():
    """No scaled copy of a change, nor one with some other amount taken off, is better."""
    given = draw(1, 12, 9)
    penalty = 1.0
    left, values, right = torch.linalg.svd(given[0].double(), full_matrices=False)

    def lost(amount):
        shrunk = (values - amount).clamp(min=0)
        return float((left @ torch.diag(shrunk) @ right - given[0]).square().sum() + penalty * shrunk.sum())

    assert lost(penalty / 2) < min(lost(penalty), lost(penalty / 4), lost(0.45), lost(0.55))


def test_the_base_has_no_say():
    given, base = draw(3, 12, 9), draw(12, 9, seed=5)
    assert_near(lore(given + base, lore_penalty=2.0) - base, lore(given, lore_penalty=2.0), 1e-5)


def test_experts_that_are_alike_or_too_small_give_the_mean():
    given = draw(3, 12, 9)
    assert lore(given[:1].expand(3, 12, 9).clone()).allclose(given[0])
    assert_near(lore(given * 1e-4), given.mean(0) * 1e-4, 1e-5)


@pytest.mark.parametrize("rank", [1, 2])
def test_an_expert_that_is_zero_and_low_ranks_are_defined(rank):
    given = torch.cat([low_rank(2, 14, 9, rank), torch.zeros(1, 14, 9)])
    assert_near(lore(given, lore_penalty=1.0, steps=5), lore_reference(given, 1.0, 1.0, 5), 1e-4)


def test_turned_task_vectors_give_the_turned_result():
    given = draw(3, 12, 9)
    left, right = orthogonal(12, 0), orthogonal(9, 1)
    turned = lore(left @ given @ right, lore_penalty=1.0)
    assert_near(turned, left @ lore(given, lore_penalty=1.0) @ right, 1e-4)
