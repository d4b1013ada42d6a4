"""The losses against their definitions."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from expert_merging.running.losses import (
    cross_entropy,
    entropy,
    hidden_alignment,
    logit_alignment,
    regularisation,
)


def kl_divergence(expert_logits: torch.Tensor, merged_logits: torch.Tensor, temperature: float) -> torch.Tensor:
    """The mean over tokens of logits themselves: heads that change nothing make logits in memory of their own."""
    heads = torch.clone, torch.clone
    return logit_alignment(expert_logits, merged_logits, *heads, temperature=temperature, slice_tokens=4)


def kl_plainly(expert_logits: torch.Tensor, merged_logits: torch.Tensor, temperature: float) -> torch.Tensor:
    expert, merged = (functional.log_softmax(logits / temperature, -1) for logits in (expert_logits, merged_logits))
    return temperature**2 * (expert.exp() * (expert - merged)).sum(-1).mean()


def test_kl_by_hand():
    expert = torch.tensor([[math.log(3.0), 0.0]])  # probabilities 3/4 and 1/4
    merged = torch.tensor([[0.0, 0.0]])  # one half each
    expected = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    assert kl_divergence(expert, merged, 1.0).item() == pytest.approx(expected, rel=1e-6)


@given(temperature=st.floats(0.2, 8.0), tokens=st.integers(1, 9), seed=st.integers(0, 1000))
@settings(max_examples=30, deadline=None)
def test_kl_has_the_gradient_of_the_soft_cross_entropy_and_vanishes_where_models_agree(temperature, tokens, seed):
    torch.manual_seed(seed)
    expert, merged = torch.randn(tokens, 11), torch.randn(tokens, 11, requires_grad=True)
    probabilities = functional.softmax(expert / temperature, dim=-1)
    published = -(probabilities * functional.log_softmax(merged / temperature, dim=-1)).sum(-1).mean() * temperature**2
    (expected,) = torch.autograd.grad(published, merged)
    (actual,) = torch.autograd.grad(kl_divergence(expert, merged, temperature), merged)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
    assert kl_divergence(expert, expert, temperature).item() == pytest.approx(0.0, abs=1e-4)
    assert kl_divergence(expert, merged, temperature).item() >= -1e-4


@pytest.mark.parametrize("slice_tokens", [1, 4, 100])
def test_tokens_count_where_the_expert_is_surer_or_agrees(slice_tokens):
    torch.manual_seed(0)
    expert, merged = torch.randn(40, 5), torch.randn(40, 5, requires_grad=True)
    sure, own = functional.softmax(expert, -1).max(-1), functional.softmax(merged, -1).max(-1)
    counts = (sure.values >= own.values) | (sure.indices == own.indices)
    assert 5 < counts.sum() < 35
    logs = functional.log_softmax(expert, -1), functional.log_softmax(merged, -1)
    expected = ((logs[0].exp() * (logs[0] - logs[1])).sum(-1) * counts).mean()
    heads = torch.clone, torch.clone
    found = logit_alignment(expert, merged, *heads, temperature=1.0, slice_tokens=slice_tokens, confident=True)
    torch.testing.assert_close(found, expected)
    gradients = [torch.autograd.grad(loss, merged, retain_graph=True) for loss in (found, expected)]
    torch.testing.assert_close(*gradients)


def js_plainly(expert_logits: torch.Tensor, merged_logits: torch.Tensor, temperature: float) -> torch.Tensor:
    """By tokens."""
    p, q = (functional.softmax(logits / temperature, -1) for logits in (expert_logits, merged_logits))
    middle = (p + q) / 2
    return temperature**2 * ((p * (p / middle).log()).sum(-1) + (q * (q / middle).log()).sum(-1)) / 2


def test_jensen_shannon_by_hand():
    """Of one word each, two models are as far apart as they can be, and no gradient says which way is nearer."""
    expert, merged = (100 * torch.eye(2)).split(1)
    merged.requires_grad_()
    heads = torch.clone, torch.clone
    found = logit_alignment(expert, merged, *heads, temperature=1.0, slice_tokens=1, symmetric=True)
    assert found.item() == pytest.approx(math.log(2), rel=1e-6)
    (gradient,) = torch.autograd.grad(found, merged)
    assert gradient.abs().max() < 1e-6 < torch.autograd.grad(kl_divergence(expert, merged, 1.0), merged)[0].abs().max()


@pytest.mark.parametrize("confident", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_jensen_shannon_has_value_and_gradient_of_its_definition(temperature, confident):
    torch.manual_seed(0)
    expert, merged = 3 * torch.randn(40, 7), (3 * torch.randn(40, 7)).requires_grad_()
    sure, own = (functional.softmax(logits / temperature, -1).max(-1) for logits in (expert, merged))
    counts = (sure.values >= own.values) | (sure.indices == own.indices) | (not confident)
    expected = (js_plainly(expert, merged, temperature) * counts).mean()
    settings = {"temperature": temperature, "slice_tokens": 4, "confident": confident, "symmetric": True}
    found = logit_alignment(expert, merged, torch.clone, torch.clone, **settings)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(*(torch.autograd.grad(loss, merged) for loss in (found, expected)))
    same = logit_alignment(expert, expert.clone(), torch.clone, torch.clone, **settings)
    assert same.item() == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("slice_tokens", [1, 3, 7, 100])
def test_slices_of_tokens_give_the_loss_and_gradient_of_the_whole(slice_tokens):
    torch.manual_seed(0)
    head = torch.nn.Linear(6, 13)
    expert, merged = torch.randn(7, 6), torch.randn(7, 6, requires_grad=True)
    whole = kl_plainly(head(expert), head(merged), 2.0)
    sliced = logit_alignment(expert, merged, head, head, temperature=2.0, slice_tokens=slice_tokens)
    torch.testing.assert_close(sliced, whole)
    for variable in (merged, head.weight):
        expected = torch.autograd.grad(
            kl_plainly(head(expert).detach(), head(merged), 2.0), variable, retain_graph=True
        )
        torch.testing.assert_close(torch.autograd.grad(sliced, variable, retain_graph=True), expected)


def test_vocabularies_of_different_size_are_compared_on_shared_tokens():
    torch.manual_seed(0)
    small, large = torch.nn.Linear(4, 5), torch.nn.Linear(4, 8)
    large.load_state_dict(
        {"weight": torch.cat([small.weight, torch.ones(3, 4)]), "bias": torch.cat([small.bias, torch.ones(3)])}
    )
    hidden = torch.randn(3, 4)
    assert logit_alignment(hidden, hidden, large, small, temperature=1.0, slice_tokens=9).item() == pytest.approx(
        0, abs=1e-6
    )


def test_hidden_alignment_is_the_mean_over_entries_and_layers():
    ones, zeros = torch.ones(2, 3), torch.zeros(2, 3)
    assert hidden_alignment([ones, 3 * ones], [zeros, zeros]).item() == pytest.approx((1 + 9) / 2)


def test_regularisation_has_the_published_scale():
    """For two experts and two layers: twice Eq. 3."""
    values, anchor = torch.tensor([0.5, 0.1, 0.3, 0.3]), torch.full((4,), 0.3)
    assert regularisation(values, anchor, 2).item() == pytest.approx(2 * (0.2 + 0.2) / (2 * 2))


def test_entropy_of_certain_and_of_even_predictions():
    head = torch.nn.Linear(8, 8, bias=False)
    torch.nn.init.eye_(head.weight)
    assert entropy(torch.zeros(3, 8), head, slice_tokens=9).item() == pytest.approx(math.log(8), rel=1e-6)
    assert entropy(200 * torch.eye(8)[:1], head, slice_tokens=9).item() == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize("slice_tokens", [1, 3, 100])
def test_entropy_in_slices_has_value_and_gradient_of_the_definition(slice_tokens):
    torch.manual_seed(0)
    head = torch.nn.Linear(6, 13)
    hidden = torch.randn(7, 6, requires_grad=True)
    expected = torch.distributions.Categorical(logits=head(hidden)).entropy().mean()
    actual = entropy(hidden, head, slice_tokens=slice_tokens)
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(torch.autograd.grad(actual, hidden), torch.autograd.grad(expected, hidden))


@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("slice_tokens", [1, 3, 100])
def test_cross_entropy_in_slices_has_value_and_gradient_of_the_definition(slice_tokens, trained, monkeypatch):
    """Also where a slice is worked on two tokens at a time."""
    torch.manual_seed(0)
    monkeypatch.setattr("expert_merging.running.losses._CACHED", 26)
    head = torch.nn.Linear(6, 13).requires_grad_(trained)
    hidden, words = torch.randn(7, 6, requires_grad=True), torch.randint(13, (7,))
    expected = torch.nn.functional.cross_entropy(head(hidden), words)
    actual = cross_entropy(hidden, words, head, slice_tokens=slice_tokens)
    torch.testing.assert_close(actual, expected)
    wanted = [hidden, *(head.parameters() if trained else ())]
    torch.testing.assert_close(torch.autograd.grad(actual, wanted), torch.autograd.grad(expected, wanted))


@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_hidden_states_and_heads_stay_as_they_are(trained, bias):
    """Gradients take the place of logits in memory, and of nothing else."""
    torch.manual_seed(0)
    head, own_head = (torch.nn.Linear(6, 13, bias=bias).requires_grad_(trained) for _ in range(2))
    expert, merged = torch.randn(7, 6), torch.randn(7, 6, requires_grad=True)
    everything = [expert, merged, *head.parameters(), *own_head.parameters()]
    before = [value.detach().clone() for value in everything]
    logit_alignment(expert, merged, head, own_head, temperature=2.0, slice_tokens=3).backward()
    with torch.no_grad():
        logit_alignment(expert, merged, head, own_head, temperature=2.0, slice_tokens=3)
    for value, same in zip(everything, before, strict=True):
        assert torch.equal(value, same)
