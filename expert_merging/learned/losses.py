"""The alignment losses as pure functions of tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint


def kl_divergence(expert_logits: Tensor, merged_logits: Tensor, temperature: float) -> Tensor:
    """``T^2 KL(softmax(expert / T) || softmax(merged / T))`` summed over tokens (paper, Eq. 2), in float32.

    The published code minimises the soft cross-entropy; the two differ by the expert's entropy, so gradients are the
    same and this one is 0 where the models agree.

    Args:
        expert_logits: ``(tokens, vocabulary)``.
        merged_logits: ``(tokens, vocabulary)``.
        temperature: T > 0.
    """
    return temperature**2 * functional.kl_div(
        functional.log_softmax(merged_logits.float() / temperature, dim=-1),
        functional.log_softmax(expert_logits.float() / temperature, dim=-1),
        reduction="sum",
        log_target=True,
    )


def logit_alignment(
    expert_hidden: Tensor,
    merged_hidden: Tensor,
    expert_head: Callable[[Tensor], Tensor],
    merged_head: Callable[[Tensor], Tensor],
    *,
    temperature: float,
    slice_tokens: int,
) -> Tensor:
    """Mean of `kl_divergence` over tokens, from last hidden states, without ever holding all logits.

    A slice of tokens is projected and compared at a time and projected again in the backward pass, so memory grows with
    ``slice_tokens x vocabulary`` and not with the length of the sequence.

    Args:
        expert_hidden: ``(tokens, hidden)``, input of the expert's output head.
        merged_hidden: ``(tokens, hidden)``, input of the merged model's output head.
        expert_head: the expert's projection to logits.
        merged_head: the merged model's projection to logits.
        temperature: T > 0.
        slice_tokens: tokens in a slice.
    """

    def compare(expert_slice: Tensor, merged_slice: Tensor) -> Tensor:
        with torch.no_grad():
            expert_logits = expert_head(expert_slice)
        merged_logits = merged_head(merged_slice)
        # A fine-tune may have added a few tokens to the vocabulary; the shared ones are compared.
        shared = min(expert_logits.shape[-1], merged_logits.shape[-1])
        return kl_divergence(expert_logits[..., :shared], merged_logits[..., :shared], temperature)

    return _mean_over_tokens(compare, slice_tokens, expert_hidden, merged_hidden)


def entropy(hidden: Tensor, head: Callable[[Tensor], Tensor], *, slice_tokens: int) -> Tensor:
    """Mean over tokens of the entropy of the predicted distribution, in nats, with logits in slices as well.

    Args:
        hidden: ``(tokens, hidden)``, input of the model's output head.
        head: the model's projection to logits.
        slice_tokens: tokens in a slice.
    """

    def measure(part: Tensor) -> Tensor:
        log_probabilities = functional.log_softmax(head(part).float(), dim=-1)
        return -(log_probabilities.exp() * log_probabilities).sum()

    return _mean_over_tokens(measure, slice_tokens, hidden)


def _mean_over_tokens(measure: Callable[..., Tensor], slice_tokens: int, *hidden: Tensor) -> Tensor:
    """Mean over tokens of what ``measure`` sums, a slice at a time that is computed again in the backward pass."""
    tokens = len(hidden[0])
    if tokens <= slice_tokens:  # nothing to save
        return measure(*hidden) / tokens
    parts = zip(*(torch.split(states, slice_tokens) for states in hidden), strict=True)
    slices = [checkpoint(measure, *part, use_reentrant=False) for part in parts]
    return torch.stack(slices).sum() / tokens


def hidden_alignment(expert_layers: Sequence[Tensor], merged_layers: Sequence[Tensor]) -> Tensor:
    """Mean squared difference of hidden states, averaged over the chosen layers (Eq. 1 as a mean, as published).

    Args:
        expert_layers: ``(tokens, hidden)`` per layer.
        merged_layers: ``(tokens, hidden)`` per layer.
    """
    pairs = zip(expert_layers, merged_layers, strict=True)
    return torch.stack([functional.mse_loss(merged.float(), expert.float()) for expert, merged in pairs]).mean()


def regularisation(values: Tensor, anchor: Tensor, count: float) -> Tensor:
    """Distance of the coefficients from their initial values, ``sum |value - initial| / count``.

    This is as many times the paper's as there are experts (its Eq. 3 divides by their number too, and so does the
    chunk-aware term of section 3.3), the scale that the published weights belong to.

    Args:
        values: ``(coefficients,)``, trainable ones only.
        anchor: their initial values.
        count: coefficients per expert: the number of layers L, or the budget B of chunks.
    """
    return (values - anchor).abs().sum() / count
