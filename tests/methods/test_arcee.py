"""Arcee Fusion against mergekit."""

from __future__ import annotations

import torch

from expert_merging.catalogue import find_method
from tests.methods.elsewhere import assert_agrees, inputs
from tests.methods.test_all import apply, task_vectors

FUSION = find_method("arcee_fusion")


def test_mergekit_agrees():
    base, given = inputs()
    assert_agrees(apply(FUSION, given[:1], base=base), "mergekit", "arcee_fusion")


def test_of_two_experts_the_first_takes_the_base_s_place():
    base, given = inputs()
    from_first = apply(FUSION, (given[1] - given[0])[None], base=base + given[0])
    torch.testing.assert_close(apply(FUSION, given[:2], base=base), given[0] + from_first)


def test_few_entries_are_taken_as_they_are():
    given = task_vectors((40, 50), 1)
    found = apply(FUSION, given)
    taken = found != 0
    assert 0.02 < float(taken.double().mean()) < 0.25
    assert found[taken].equal(given[0][taken])


def test_a_tensor_without_a_row_s_distribution_is_taken_whole():
    given = torch.tensor([0.5])
    assert apply(FUSION, given).equal(given[0])
