"""CART: the average and the strongest directions around it."""

from __future__ import annotations

import pytest
import torch

from expert_merging.methods.cart import cart
from tests.methods.numbers import assert_near, draw, low_rank, orthogonal


def reference(given: torch.Tensor, rank: int, coefficient: float = 1.0) -> torch.Tensor:
    exact = given.double()
    mean = exact.mean(0)
    merged = mean.clone()
    for task_vector in exact:
        left, values, right = torch.linalg.svd(task_vector - mean, full_matrices=False)
        merged += coefficient * left[:, :rank] @ torch.diag(values[:rank]) @ right[:rank]
    return merged


@pytest.mark.parametrize("shape", [(20, 30), (30, 20)])
@pytest.mark.parametrize(("ratio", "rank"), [(0.08, 2), (0.1, 2), (0.11, 3), (1.0, 20)])
def test_it_is_what_whole_decompositions_give(shape, ratio, rank):
    given = draw(3, *shape)
    found = cart(given.clone(), cart_rank_ratio=ratio, cart_coefficient=0.4, scaling_coefficient=0.5)
    assert_near(found, 0.5 * reference(given, rank, 0.4), 1e-5)


def test_all_directions_together_leave_the_average():
    given = draw(4, 9, 7)
    assert_near(cart(given.clone(), cart_rank_ratio=1.0, cart_coefficient=3.0), given.mean(0), 1e-5)


def test_it_turns_with_the_space():
    given, left, right = low_rank(3, 8, 12, 3), orthogonal(8, 1), orthogonal(12, 2)
    assert_near(cart(left @ given @ right), left @ cart(given.clone()) @ right, 1e-4)


def test_it_scales_with_the_task_vectors():
    given = draw(3, 8, 12)
    assert_near(cart(given * 100), 100 * cart(given.clone()), 1e-5)
