"""SCE against mergekit and a plain twin, VaRM against its formula."""

from __future__ import annotations

import pytest
import torch

from expert_merging.catalogue import find_method
from tests.methods.elsewhere import assert_agrees, inputs
from tests.methods.test_all import apply, task_vectors

SCE, VARM = find_method("sce"), find_method("varm")


@pytest.mark.parametrize("density", [0.1, 0.5, 1.0])
def test_mergekit_agrees(density):
    base, given = inputs()
    assert_agrees(apply(SCE, given, base=base, density=density), "mergekit", f"sce {density}")


def plain_sce(given: torch.Tensor, density: float) -> torch.Tensor:
    """Entry by entry, in float64."""
    flat = given.flatten(1).double()
    variances = flat.var(0, correction=0)
    count = int(density * int((variances > 0).sum()) + 1e-9)
    chosen = variances.argsort(descending=True)[:count].tolist()
    if density == 1:
        chosen = list(range(flat.shape[1]))
    squares = [sum(float(row[place]) ** 2 for place in chosen) for row in flat]
    result = torch.zeros(flat.shape[1], dtype=torch.float64)
    for place in chosen:
        column = flat[:, place]
        agreeing = [expert for expert in range(len(flat)) if column[expert] * column.sum() > 0]
        weight = sum(squares[expert] for expert in agreeing)
        result[place] = sum(squares[expert] * column[expert] for expert in agreeing) / weight if weight else 0.0
    return result.view(given.shape[1:]).float()


@pytest.mark.parametrize("shape", [(7,), (30, 20), (2, 3, 4)], ids=str)
@pytest.mark.parametrize("density", [0.1, 0.3, 1.0])
@pytest.mark.parametrize("scale", [1.0, 1e-6])
def test_it_is_the_plain_twin_at_any_scale(shape, density, scale):
    """Real changes are so small that mergekit would weigh the experts alike."""
    given = task_vectors(shape) * torch.tensor([1.0, 2.0, 0.3]).view(-1, *[1] * len(shape)) * scale
    torch.testing.assert_close(apply(SCE, given, density=density), plain_sce(given, density), rtol=1e-4, atol=1e-12)


def test_one_expert_comes_back_where_everything_is_selected_and_else_the_base():
    given = task_vectors((6, 5), experts=1)
    torch.testing.assert_close(apply(SCE, given, density=1.0), given[0])
    assert not apply(SCE, given).any()


def test_entries_that_no_expert_has_changed_are_not_counted():
    given = torch.zeros(2, 100)
    given[0, :10], given[1, 5] = 1.0, 3.0
    # One of the ten that vary: the one where the experts have 1 and 3, and count by their squares.
    found = apply(SCE, given, density=0.1)
    assert found.nonzero().flatten().tolist() == [5]
    assert float(found[5]) == pytest.approx((1 * 1 + 9 * 3) / 10)


@pytest.mark.parametrize("shape", [(), (7,), (5, 3)], ids=str)
def test_varm_weighs_by_squares(shape):
    given = task_vectors(shape) * torch.tensor([1.0, 2.0, 0.3]).view(-1, *[1] * len(shape))
    squares = given.reshape(3, -1).double().square().sum(1)
    expected = sum(share * row for share, row in zip((squares / squares.sum()).tolist(), given, strict=True))
    torch.testing.assert_close(apply(VARM, given), expected)
    torch.testing.assert_close(apply(VARM, given, scaling_coefficient=0.5), 0.5 * expected)
