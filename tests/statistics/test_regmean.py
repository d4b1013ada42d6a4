"""RegMean against a plain twin: least squares on all inputs at once."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from expert_merging.statistics.regmean import regmean
from tests.statistics.made_up import (
    DEVICES,
    FEW,
    INPUTS,
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

RATIOS = [0.0, 0.5, 0.9, 1.0]


def merged(given: torch.Tensor, grams, ratio: float = 0.9) -> torch.Tensor:
    return regmean(given.clone(), PART, Given(tuple(grams)), reduce_non_diagonal_ratio=ratio)


@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("counts", [FEW, MANY], ids=["few", "many"])
@pytest.mark.parametrize("form", [kept, summed])
@pytest.mark.parametrize("device", DEVICES)
def test_it_is_least_squares_on_all_inputs(ratio, counts, form, device):
    given, inputs = task_vectors(), inputs_of(counts)
    result = merged(given.to(device), map(form, inputs), ratio)
    assert result.dtype == torch.float32
    assert result.device.type == device
    # Sums in float32 have errors that a ratio of 1 leaves in directions without inputs.
    loose = form is summed and ratio == 1
    torch.testing.assert_close(
        result.cpu(), least_squares(given, inputs, ratio), rtol=1e-4, atol=1e-2 if loose else 1e-5
    )


@pytest.mark.parametrize("form", [kept, summed])
def test_no_other_matrix_has_outputs_nearer_to_the_experts(form):
    given, inputs = task_vectors(), inputs_of(MANY)

    def distance(weight: torch.Tensor) -> float:
        pairs = zip(given.double(), inputs, strict=True)
        return sum(float(((weight.double() - own) @ vectors.double().T).square().mean()) for own, vectors in pairs)

    best = least_squares(given, inputs, 1.0, ridge=0.0)
    result = merged(given, map(form, inputs), 1.0)
    assert distance(best) <= distance(result) <= distance(best) * (1 + 1e-3)
    assert distance(result) < 0.8 * distance(given.mean(0))


def test_it_is_the_papers_formula():
    """Where that is defined: for many inputs, up to the pull towards the mean."""
    given, inputs = task_vectors(), inputs_of((300, 400, 500))
    grams = [vectors.T.double() @ vectors.double() / len(vectors) for vectors in inputs]
    reduced = [0.9 * gram + 0.1 * torch.diag(gram.diagonal()) for gram in grams]
    products = sum(weight @ gram for weight, gram in zip(given.double(), reduced, strict=True))
    expected = products @ torch.linalg.inv(sum(reduced))
    torch.testing.assert_close(merged(given, map(summed, inputs)).double(), expected, rtol=0, atol=5e-3)


@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("counts", [FEW, MANY], ids=["few", "many"])
@pytest.mark.parametrize("form", [kept, summed])
def test_what_it_must_be_in_simple_cases(ratio, counts, form):
    close = {"rtol": 1e-5, "atol": 1e-6}
    loose = {"rtol": 1e-3, "atol": 1e-2 if form is summed and ratio == 1 else 1e-5}
    check_simple_cases(partial(merged, ratio=ratio), counts, form, close=close, loose=loose)
    given = task_vectors()
    result = merged(given, [form(vectors) for vectors in inputs_of(counts)], ratio)
    larger = [form(vectors * 1024) for vectors in inputs_of(counts)]
    torch.testing.assert_close(merged(given, larger, ratio), result, **loose)


@pytest.mark.parametrize("counts", [FEW, MANY], ids=["few", "many"])
def test_an_expert_with_more_tokens_does_not_count_for_more(counts):
    given, inputs = task_vectors(), inputs_of(counts)
    repeated = [inputs[0], inputs[1].repeat(20, 1), inputs[2]]
    expected = merged(given, map(summed, inputs))
    torch.testing.assert_close(merged(given, map(summed, repeated)), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("form", [kept, summed])
@pytest.mark.parametrize("ratio", RATIOS)
def test_an_input_that_is_always_zero_gets_the_mean(form, ratio):
    given = task_vectors()
    inputs = inputs_of(FEW)
    for vectors in inputs:
        vectors[:, 3] = 0
    result = merged(given, map(form, inputs), ratio)
    torch.testing.assert_close(result[:, 3], given.mean(0)[:, 3])
    torch.testing.assert_close(
        result, least_squares(given, inputs, ratio), rtol=1e-4, atol=1e-2 if ratio == 1 else 1e-5
    )


def test_an_expert_whose_samples_do_not_come_by_leaves_the_matrix_to_the_others():
    given, inputs = task_vectors(), inputs_of(MANY)
    grams = [None, *map(summed, inputs[1:])]
    alone = least_squares(given[1:], inputs[1:], 0.9, ridge=0.0)
    torch.testing.assert_close(merged(given, grams), alone, rtol=0, atol=5e-3)


def test_only_directions_with_inputs_move_away_from_the_mean():
    """At a ratio of 1 the sum of few inputs' Gram matrices is singular."""
    given, (own, *_) = task_vectors(2), inputs_of((1,))
    result = merged(given, [kept(own), kept(torch.zeros(1, INPUTS))], 1.0)
    torch.testing.assert_close(result @ own.T, given[0] @ own.T, rtol=1e-3, atol=1e-2)
    change = result - given.mean(0)
    assert torch.linalg.matrix_rank(change, atol=1e-3) == 1
