"""MaTS against conjugate gradients of SciPy's kind written out plainly, and against what it tends to."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from expert_merging.statistics.mats import mats
from tests.statistics.made_up import (
    DEVICES,
    FEW,
    MANY,
    PART,
    Given,
    check_simple_cases,
    inputs_of,
    kept,
    summed,
    task_vectors,
)
from tests.statistics.twin import least_squares


def merged(given: torch.Tensor, grams, iterations: int) -> torch.Tensor:
    return mats(given.clone(), PART, Given(tuple(grams)), iterations=iterations)


def plainly(given: torch.Tensor, inputs: list[torch.Tensor], iterations: int) -> torch.Tensor:
    """Conjugate gradients on the flattened matrix, with the operator written out."""
    given = given.double()
    grams = [own.double().T @ own.double() / len(own) for own in inputs]
    operator = torch.kron(torch.eye(given.shape[1], dtype=torch.float64), sum(grams))
    wanted = sum(weight @ gram for weight, gram in zip(given, grams, strict=True)).flatten()
    point = given.mean(0).flatten()
    residual = wanted - operator @ point
    direction = residual
    for _ in range(iterations):
        if residual.norm() < 1e-12:
            break
        step = residual @ residual / (direction @ operator @ direction)
        point = point + step * direction
        after = residual - step * operator @ direction
        direction = after + direction * (after @ after) / (residual @ residual)
        residual = after
    return point.view(given.shape[1:]).float()


@pytest.mark.parametrize("iterations", [1, 2, 5])
@pytest.mark.parametrize("counts", [FEW, MANY], ids=["few", "many"])
@pytest.mark.parametrize("form", [kept, summed])
@pytest.mark.parametrize("device", DEVICES)
def test_it_takes_the_steps_of_conjugate_gradients(iterations, counts, form, device):
    given, inputs = task_vectors(), inputs_of(counts)
    result = merged(given.to(device), map(form, inputs), iterations)
    assert result.dtype == torch.float32
    assert result.device.type == device
    torch.testing.assert_close(result.cpu(), plainly(given, inputs, iterations), rtol=1e-4, atol=1e-4)


def test_it_ends_at_regmean():
    given, inputs = task_vectors(), inputs_of(MANY)
    best = least_squares(given, inputs, 1.0, ridge=0.0)
    distances = [float((merged(given, map(kept, inputs), steps) - best).norm()) for steps in (1, 4, 200)]
    assert distances[0] > distances[1] > distances[2]
    assert distances[2] < 1e-3 * float(best.norm())


@pytest.mark.parametrize("form", [kept, summed])
@pytest.mark.parametrize("counts", [FEW, MANY], ids=["few", "many"])
def test_what_it_must_be_in_simple_cases(counts, form):
    loose = {"rtol": 1e-4, "atol": 1e-5}
    check_simple_cases(partial(merged, iterations=4), counts, form, close={"rtol": 1e-5, "atol": 1e-5}, loose=loose)


def test_an_expert_whose_samples_do_not_come_by_leaves_the_matrix_to_the_others():
    given, inputs = task_vectors(), inputs_of(MANY)
    grams = [kept(inputs[0]), None, kept(inputs[2])]
    others = least_squares(given[[0, 2]], [inputs[0], inputs[2]], 1.0, ridge=0.0)
    torch.testing.assert_close(merged(given, grams, 200), others, rtol=1e-3, atol=1e-3)
