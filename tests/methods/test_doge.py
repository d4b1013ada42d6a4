"""DOGE TA against its authors' loop by autograd, and the solver that needs no loop."""

from __future__ import annotations

import pytest
import torch

from expert_merging.catalogue import find_method
from tests.methods.numbers import assert_near, draw, low_rank
from tests.methods.test_all import apply

DOGE = find_method("doge_ta")
SHAPES = [(30, 12), (12, 30), (20, 20), (2, 3), (1, 9), (9, 1)]


def projection(task_vectors: torch.Tensor, divisor: int) -> torch.Tensor:
    experts, rows, columns = task_vectors.shape
    side = min(rows, columns)
    lefts = [torch.linalg.svd(own, full_matrices=False)[0][:, : side // experts] for own in task_vectors]
    left, values, _ = torch.linalg.svd(torch.cat(lefts, 1), full_matrices=False)
    left = left[:, values > 1e-5][:, : side // divisor]
    return left @ left.T


def loss(task_vectors: torch.Tensor, weights: torch.Tensor, change: torch.Tensor) -> torch.Tensor:
    lost = task_vectors - (weights * (task_vectors + change)).sum(0)
    return (task_vectors * lost).sum(2).square().sum()


def doge_reference(given: torch.Tensor, steps=400, step_size=1e-4, eta=0.07, density=0.3, divisor=6) -> torch.Tensor:
    given = given.double()
    weights = eta / given.square().sum((1, 2), keepdim=True).sqrt()
    change = torch.nn.Parameter(torch.zeros_like(given[0]))
    optimizer = torch.optim.Adam([change], lr=step_size)
    protected = projection(given, divisor)
    for _ in range(steps):
        optimizer.zero_grad()
        loss(given, weights, change).backward()
        change.grad -= protected @ change.grad
        optimizer.step()
    rank = max(1, int((1 - density) * given[0].numel() + 1e-9))
    thresholds = given.abs().flatten(1).kthvalue(rank, dim=1).values.view(-1, 1, 1)
    return (weights * (given + change.detach()) * (given.abs() >= thresholds)).sum(0)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("experts", [2, 4])
def test_the_twin_agrees(shape, experts):
    given = draw(experts, *shape) * 0.05
    assert_near(apply(DOGE, given, steps=50), doge_reference(given, 50), 1e-3)


def test_the_twin_agrees_with_all_flags():
    given = draw(3, 20, 14) * torch.tensor([0.01, 0.03, 0.1]).view(-1, 1, 1)
    options = {"steps": 30, "step_size": 1e-3, "doge_eta": 0.5, "density": 0.6, "doge_subspace": 2}
    assert_near(apply(DOGE, given, **options), doge_reference(given, 30, 1e-3, 0.5, 0.6, 2), 1e-3)


@pytest.mark.parametrize("shape", [(30, 12), (12, 30), (20, 20), (9, 2)], ids=str)
def test_the_exact_solver_leaves_no_gradient_and_less_loss_than_adam(shape):
    given = draw(3, *shape) * 0.05
    weights = 0.07 / given.double().square().sum((1, 2), keepdim=True).sqrt()

    def change(solver):
        merged = apply(DOGE, given, density=1.0, solver=solver).double()
        found = (merged - (weights * given).sum(0)) / weights.sum()
        return found.requires_grad_()

    exact = change("exact")
    (gradient,) = torch.autograd.grad(loss(given.double(), weights, exact), exact)
    protected = projection(given.double(), 6)
    start = torch.zeros_like(exact, requires_grad=True)
    (first,) = torch.autograd.grad(loss(given.double(), weights, start), start)
    assert (gradient - protected @ gradient).norm() < 1e-4 * first.norm()
    assert (protected @ exact).norm() < 1e-4 * exact.norm()
    assert loss(given.double(), weights, exact) < loss(given.double(), weights, change("adam"))


@pytest.mark.parametrize("solver", ["adam", "exact"])
def test_an_expert_that_is_zero_has_no_say_but_takes_its_share_of_the_directions(solver):
    given = draw(2, 20, 12) * 0.05
    merged = apply(DOGE, torch.cat([given, 0 * given[:1]]), solver=solver)
    assert merged.isfinite().all()
    assert merged.norm() > 0


@pytest.mark.parametrize("solver", ["adam", "exact"])
@pytest.mark.parametrize("rank", [1, 2])
def test_low_ranks_and_equal_experts_are_defined(solver, rank):
    given = low_rank(2, 20, 30, rank) * 0.05
    given = torch.cat([given, given[:1]])
    merged = apply(DOGE, given, solver=solver)
    assert merged.isfinite().all()
    assert_near(apply(DOGE, given[[2, 0, 1]], solver=solver), merged, 1e-3)


def test_an_expert_s_own_scale_does_not_matter_to_its_coefficient():
    given = draw(1, 20, 12)
    kept = apply(DOGE, given, density=1.0, steps=1, step_size=1e-12)
    assert float(kept.norm()) == pytest.approx(0.07, rel=1e-4)
