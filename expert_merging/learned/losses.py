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

    tokens = len(merged_hidden)
    if tokens <= slice_tokens:  # nothing to save
        return compare(expert_hidden, merged_hidden) / tokens
    slices = [
        checkpoint(compare, *pair, use_reentrant=False)
        for pair in zip(torch.split(expert_hidden, slice_tokens), torch.split(merged_hidden, slice_tokens), strict=True)
    ]
    return torch.stack(slices).sum() / tokens


def hidden_alignment(expert_layers: Sequence[Tensor], merged_layers: Sequence[Tensor]) -> Tensor:
    """Mean squared difference of hidden states, averaged over the chosen layers (Eq. 1 as a mean, as published).

    Args:
        expert_layers: ``(tokens, hidden)`` per layer.
        merged_layers: ``(tokens, hidden)`` per layer.
    """
    pairs = zip(expert_layers, merged_layers, strict=True)
    return torch.stack([functional.mse_loss(merged.float(), expert.float()) for expert, merged in pairs]).mean()


def regularisation(values: Tensor, start: Tensor, experts: int) -> Tensor:
    """Distance of the coefficients from their start, ``experts / count * sum |value - start|``.

    This is `experts` times Eq. 3, the scale that the published weights belong to.

    Args:
        values: ``(coefficients,)``, trainable ones only.
        start: their initial values.
        experts: number of experts.
    """
    return (values - start).abs().sum() * (experts / values.numel())
