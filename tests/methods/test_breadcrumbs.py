"""Model Breadcrumbs against mergekit, MergeLLM and sorting."""

from __future__ import annotations

import pytest
import torch

from expert_merging.catalogue import find_method
from tests.command import refusal
from tests.methods.elsewhere import assert_agrees, inputs
from tests.methods.test_all import apply, task_vectors

BREADCRUMBS = find_method("breadcrumbs")


@pytest.mark.parametrize(
    ("shape", "first", "stop", "program", "name"),
    [
        ((6, 9), 33, 49, "mergekit", "breadcrumbs 0.3 0.1"),
        ((6, 8), 13, 43, "authors", "breadcrumbs mergellm 0.6 0.3"),
    ],
)
def test_other_programs_agree(shape, first, stop, program, name):
    """They count what they keep in other ways: of the sorted entries, those from the first to the one before stop."""
    base, given = inputs(shape)
    entries = given[0].numel()
    shares = {"breadcrumbs_beta": (first + 0.5) / entries, "breadcrumbs_gamma": (stop + 0.5) / entries}
    assert_agrees(apply(BREADCRUMBS, given, base=base, **shares, scaling_coefficient=1.0), program, name)


@pytest.mark.parametrize(("beta", "gamma"), [(0.85, 0.993), (0.0, 1.0), (0.5, 0.6), (0.0, 0.2)])
@pytest.mark.parametrize("shape", [(500,), (40, 25), (2, 3, 4)], ids=str)
def test_it_is_what_sorting_gives(beta, gamma, shape):
    given = task_vectors(shape)
    entries = given[0].numel()
    expected = torch.zeros(shape)
    for row in given:
        order = row.abs().flatten().argsort()[int(beta * entries + 1e-6) : int(gamma * entries + 1e-6)]
        kept = torch.zeros(entries)
        kept[order] = row.flatten()[order]
        expected += 0.3 * kept.view(shape)
    found = apply(BREADCRUMBS, given, breadcrumbs_beta=beta, breadcrumbs_gamma=gamma)
    torch.testing.assert_close(found, expected)


def test_entries_as_large_as_the_bounds_are_kept():
    given = torch.tensor([[0.0, 1.0, 1.0, -1.0, 2.0, 2.0, 3.0, 3.0, 3.0, 3.0]])
    found = apply(BREADCRUMBS, given, breadcrumbs_beta=0.2, breadcrumbs_gamma=0.5, scaling_coefficient=1.0)
    assert found.tolist() == [0, 1, 1, -1, 2, 2, 0, 0, 0, 0]


def test_shares_that_leave_nothing_are_refused(tiny_zoo, capsys):
    message = refusal(capsys, "--method", "breadcrumbs", "--cache_dir", tiny_zoo, "--breadcrumbs_gamma", "0.5")
    assert message == (
        "--breadcrumbs_beta is where the entries that are kept begin, from the smallest on, and must be below "
        "--breadcrumbs_gamma, where they end, got 0.85 and 0.5"
    )
