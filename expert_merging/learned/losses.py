"""The alignment losses as pure functions of tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

# By this the gradients of slices are multiplied while they are in half precision. They are small numbers: the two
# distributions' differences, at most 1 for a token, times columns of the output head.
_GRADIENT_SCALE = 2.0**10


def kl_divergence(expert_logits: Tensor, merged_logits: Tensor, temperature: float) -> Tensor:
    """``T^2 KL(softmax(expert / T) || softmax(merged / T))`` summed over tokens (paper, Eq. 2), in float32.

    The published code minimises the soft cross-entropy; the two differ by the expert's entropy, so gradients are the
    same and this one is 0 where the models agree.

    Args:
        expert_logits: ``(tokens, vocabulary)``.
        merged_logits: ``(tokens, vocabulary)``.
        temperature: T > 0.
    """
    divergence: Tensor = _Divergence.apply(expert_logits, merged_logits, temperature)  # type: ignore[no-untyped-call]
    return divergence


class _Divergence(torch.autograd.Function):
    """The divergence with its gradient ``T (softmax(merged / T) - softmax(expert / T))`` for the merged model alone.

    Over a vocabulary, passes through memory and exponentials cost more than the output head: this takes each once.
    """

    @staticmethod
    def forward(ctx: Any, expert_logits: Tensor, merged_logits: Tensor, temperature: float) -> Tensor:
        expert, log_expert = _softmax(expert_logits, temperature)
        merged, log_merged = _softmax(merged_logits, temperature)
        value = log_expert.sub_(log_merged).mul_(expert).sum()
        ctx.save_for_backward(merged.sub_(expert))
        ctx.temperature, ctx.dtype = temperature, merged_logits.dtype
        return temperature**2 * value

    @staticmethod
    def backward(ctx: Any, scale: Tensor) -> tuple[None, Tensor, None]:
        (difference,) = ctx.saved_tensors
        return None, (difference * (ctx.temperature * scale)).to(ctx.dtype), None


def _softmax(logits: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Probabilities and their logarithms, in float32."""
    shifted = logits.float() - logits.amax(dim=-1, keepdim=True)
    if temperature != 1:
        shifted.div_(temperature)
    probabilities = shifted.exp()
    total = probabilities.sum(dim=-1, keepdim=True)
    return probabilities.div_(total), shifted.sub_(total.log())


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

    A slice of tokens is projected and compared at a time, so memory grows with ``slice_tokens x vocabulary`` and not
    with the length of the sequence.

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

    return _mean_over_tokens(compare, merged_head, slice_tokens, expert_hidden, merged_hidden)


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

    return _mean_over_tokens(measure, head, slice_tokens, hidden)


def _mean_over_tokens(
    measure: Callable[..., Tensor], head: Callable[[Tensor], Tensor], slice_tokens: int, *hidden: Tensor
) -> Tensor:
    """Mean over tokens of what ``measure`` sums, a slice at a time, with a gradient for the last of ``hidden``.

    The gradient of a slice is taken along with its value, so its logits are made once and gone before the next slice's.
    A head that is trained itself has a gradient of its own: then slices are computed again in the backward pass.
    """
    tokens = len(hidden[0])
    parts = list(zip(*(torch.split(states, slice_tokens) for states in hidden), strict=True))
    if isinstance(head, torch.nn.Module) and any(weight.requires_grad for weight in head.parameters()):
        return torch.stack([checkpoint(measure, *part, use_reentrant=False) for part in parts]).sum() / tokens
    if not (torch.is_grad_enabled() and hidden[-1].requires_grad):
        return torch.stack([measure(*part) for part in parts]).sum() / tokens
    values, gradients = [], []
    for *others, states in parts:
        own = states.detach().requires_grad_(True)
        value = measure(*others, own)
        # In half precision, the small gradients of improbable tokens would become 0 before loss scaling reached them.
        (gradient,) = torch.autograd.grad(value * _GRADIENT_SCALE, own)
        values.append(value.detach())
        gradients.append(gradient.float() / _GRADIENT_SCALE)
    known = torch.stack(values).sum(), torch.cat(gradients)
    total: Tensor = _WithGradient.apply(hidden[-1], *known)  # type: ignore[no-untyped-call]
    return total / tokens


class _WithGradient(torch.autograd.Function):
    """A number whose gradient with respect to a tensor is known already."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, value: Tensor, gradient: Tensor) -> Tensor:
        ctx.save_for_backward(gradient)
        ctx.dtype = states.dtype
        return value.clone()

    @staticmethod
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return (gradient * scale).to(ctx.dtype), None, None


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
