"""DELLA against its authors' code, a plain twin and its definition."""

from __future__ import annotations

import pytest
import torch

from expert_merging.catalogue import find_method
from expert_merging.methods import della as module
from expert_merging.methods.della import ranks_in_rows
from expert_merging.methods.drawing import draw_uniform
from expert_merging.parts import Part
from tests.command import refusal
from tests.methods.elsewhere import assert_agrees, inputs, numbers
from tests.methods.test_all import apply, task_vectors

DELLA = find_method("della")
NAMES = ("expert 0", "expert 1", "expert 2")


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({}, "della"),
        ({"della_normalize": False}, "della sum"),
        ({"della_elect": False, "scaling_coefficient": 1.0}, "della pruned mean"),
    ],
)
def test_the_authors_code_agrees_when_it_draws_the_same(options, name, monkeypatch):
    base, given = inputs()
    drawn = iter((numbers(tuple(given.shape), 7, 1.0) + 0.25) * 2)
    monkeypatch.setattr(module, "draw_uniform", lambda *_: next(drawn).float())
    assert_agrees(apply(DELLA, given, base=base, **options), "authors", name)


def plainly(given: torch.Tensor, drop_rate: float, window: float) -> torch.Tensor:
    """Row by row, entry by entry."""
    pruned = torch.zeros_like(given)
    part = Part.whole("weight", tuple(given.shape[1:]))
    for expert, name in enumerate(NAMES):
        drawn = draw_uniform(part, 3, name).view(given.shape[1:])
        for row in range(given.shape[1]):
            order = sorted(range(given.shape[2]), key=lambda column: (abs(given[expert, row, column]), column))
            for rank, column in enumerate(order):
                keep = 1 - drop_rate - window / 2 + window * rank / (given.shape[2] - 1)
                if drawn[row, column] < keep:
                    pruned[expert, row, column] = given[expert, row, column] / keep
    total = pruned.sum(0)
    agreeing = torch.where(pruned * total > 0, pruned, 0.0)
    return agreeing.sum(0) / (agreeing != 0).sum(0).clamp(min=1)


@pytest.mark.parametrize(("drop_rate", "window"), [(0.3, 0.14), (0.5, 1.0 - 1e-6), (0.0, 0.0), (0.9, 0.1)])
@pytest.mark.parametrize("rounded", [False, True])
def test_it_is_the_plain_twin(drop_rate, window, rounded):
    given = task_vectors((4, 13))
    given = (given * 16).round() / 16 if rounded else given
    found = apply(DELLA, given, drop_rate=drop_rate, window_size=window, scaling_coefficient=1.0)
    torch.testing.assert_close(found, plainly(given, drop_rate, window))


def test_ranks_are_those_of_a_stable_sort():
    magnitudes = torch.randint(0, 5, (3, 6, 50), generator=torch.Generator().manual_seed(0)).float()
    expected = magnitudes.argsort(dim=-1, stable=True).argsort(dim=-1).float()
    assert ranks_in_rows(magnitudes).equal(expected)


def test_random_numbers_are_uniform_and_any_block_has_its_own():
    part = Part.whole("w", (200_000,))
    drawn = draw_uniform(part, 1, "a")
    assert 0 <= drawn.min() < drawn.max() < 1
    for share in (0.001, 0.25, 0.77):
        assert float((drawn < share).double().mean()) == pytest.approx(share, abs=4 * 0.5 / 200_000**0.5)
    assert drawn[65_530:140_000].equal(draw_uniform(part.between(65_530, 140_000), 1, "a"))
    assert not drawn.equal(draw_uniform(part, 2, "a"))
    assert not drawn.equal(draw_uniform(part, 1, "b"))


def test_no_task_vector_changes_in_the_mean():
    """MagPrune divides by the probabilities that it keeps entries with."""
    given = task_vectors((1, 11), experts=1).expand(1, 20_000, 11).clone()
    mean = apply(DELLA, given, della_elect=False, scaling_coefficient=1.0, window_size=0.6).mean(0)
    torch.testing.assert_close(mean, given[0, 0], rtol=0.03, atol=1e-3)


def test_larger_entries_are_kept_more_often():
    given = torch.arange(1.0, 12.0).expand(1, 20_000, 11).clone()
    kept = (apply(DELLA, given, window_size=0.4) != 0).double().mean(0)
    torch.testing.assert_close(kept, torch.linspace(0.5, 0.9, 11).double(), rtol=0, atol=0.02)


def test_without_a_window_the_only_column_and_others_are_dropped_alike():
    for shape in ((20_000, 1), (20_000,), (1000, 20)):
        kept = (apply(DELLA, torch.ones(1, *shape), window_size=0.0) != 0).double().mean()
        assert float(kept) == pytest.approx(0.7, abs=0.02)
    column = apply(DELLA, torch.ones(1, 20_000, 1), della_elect=False, scaling_coefficient=0.7)
    assert (column[column != 0] - 1).abs().max() < 1e-6


def test_a_window_beyond_all_probabilities_is_refused(tiny_zoo, capsys):
    message = refusal(capsys, "--method", "della", "--cache_dir", tiny_zoo, "--drop_rate", "0.05")
    assert message == (
        "--window_size is the difference between the highest and the lowest drop rate around --drop_rate, which must "
        "be in [0, 1), got 0.14 around 0.05: from -0.02 to 0.12"
    )
