"""The alignment losses as pure functions of tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

# By this the gradients of slices are multiplied while they are in half precision. They are small numbers: the two
# distributions' differences, at most 1 for a token, times columns of the output head.
_GRADIENT_SCALE = 2.0**10
# Entries of logits that a CPU works on at a time, few enough to stay in a core's cache from one operation to the next.
# A vocabulary's logits take a dozen operations, which would cost more than the output head if each went to memory.
_CACHED = 1 << 18

# Takes the merged model's logits of some tokens, ``(tokens, vocabulary)``, and perhaps the expert's; returns a number
# that is summed over tokens, and puts its gradient, times `_GRADIENT_SCALE`, in the place of the merged model's.
_Measure = Callable[..., Tensor]


def kl_divergence(expert_logits: Tensor, merged_logits: Tensor, temperature: float) -> Tensor:
    """``T^2 KL(softmax(expert / T) || softmax(merged / T))`` summed over tokens (paper, Eq. 2), in float32.

    The published code minimises the soft cross-entropy; the two differ by the expert's entropy, so gradients are the
    same and this one is 0 where the models agree.

    Args:
        expert_logits: ``(tokens, vocabulary)``; the vocabularies' common beginning is compared.
        merged_logits: ``(tokens, vocabulary)``.
        temperature: T > 0.
    """
    measure = partial(_divergence, temperature=temperature)
    divergence: Tensor = _Measured.apply(measure, merged_logits, expert_logits)  # type: ignore[no-untyped-call]
    return divergence


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
        slice_tokens: most tokens in a slice.
    """
    measure = partial(_divergence, temperature=temperature)
    return _mean_over_tokens(measure, (merged_head, expert_head), (merged_hidden, expert_hidden), slice_tokens)


def entropy(hidden: Tensor, head: Callable[[Tensor], Tensor], *, slice_tokens: int) -> Tensor:
    """Mean over tokens of the entropy of the predicted distribution, in nats, with logits in slices as well.

    Args:
        hidden: ``(tokens, hidden)``, input of the model's output head.
        head: the model's projection to logits.
        slice_tokens: most tokens in a slice.
    """
    return _mean_over_tokens(_entropy, (head,), (hidden,), slice_tokens)


def _divergence(merged_logits: Tensor, expert_logits: Tensor, *, temperature: float) -> Tensor:
    """The measure of `kl_divergence`; its gradient is ``T (softmax(merged / T) - softmax(expert / T))``."""
    # A fine-tune may have added a few tokens to the vocabulary; the shared ones are compared.
    shared = min(expert_logits.shape[-1], merged_logits.shape[-1])
    merged_logits[..., shared:] = 0
    total = torch.zeros((), device=merged_logits.device)
    for merged_rows, expert_rows in zip(
        _cached(merged_logits[..., :shared]), _cached(expert_logits[..., :shared]), strict=True
    ):
        merged, expert = _shifted(merged_rows, temperature), _shifted(expert_rows, temperature)
        difference = expert - merged
        merged_sum, expert_sum = (logits.exp_().sum(dim=-1, keepdim=True) for logits in (merged, expert))
        probabilities = expert.div_(expert_sum)
        total += torch.linalg.vecdot(probabilities, difference).sum() + (merged_sum / expert_sum).log().sum()
        gradient = merged.div_(merged_sum).sub_(probabilities)
        merged_rows.copy_(gradient.mul_(temperature * _GRADIENT_SCALE))
    return temperature**2 * total


def _entropy(logits: Tensor) -> Tensor:
    """The measure of `entropy`; its gradient is ``-p (log p + entropy)``."""
    total = torch.zeros((), device=logits.device)
    for rows in _cached(logits):
        logarithms = _shifted(rows, 1.0)
        logarithms.sub_(logarithms.logsumexp(dim=-1, keepdim=True))
        probabilities = logarithms.exp()
        value = -torch.linalg.vecdot(probabilities, logarithms)[..., None]
        total += value.sum()
        rows.copy_(logarithms.add_(value).mul_(probabilities).mul_(-_GRADIENT_SCALE))
    return total


def _cached(logits: Tensor) -> tuple[Tensor, ...]:
    """Rows that are worked on at a time: all on a GPU, where each operation has a price of its own."""
    rows = len(logits) if logits.is_cuda else max(1, _CACHED // logits.shape[-1])
    return torch.split(logits, rows)


def _shifted(logits: Tensor, temperature: float) -> Tensor:
    """Logits over temperature with 0 for the largest, in float32 and in memory of their own."""
    shifted = logits.float() - logits.amax(dim=-1, keepdim=True)
    return shifted if temperature == 1 else shifted.div_(temperature)


def _mean_over_tokens(
    measure: _Measure, heads: Sequence[Callable[[Tensor], Tensor]], hidden: Sequence[Tensor], slice_tokens: int
) -> Tensor:
    """Mean over tokens of a measure, a slice at a time, with a gradient for the first of ``hidden``.

    The gradient of a slice is taken along with its value, so its logits are made once and gone before the next slice's.
    A head that is trained itself has a gradient of its own: then slices are computed again in the backward pass.

    Args:
        measure: what is summed.
        heads: the merged model's output head, and perhaps the expert's.
        hidden: ``(tokens, hidden)``, the input of each.
        slice_tokens: most tokens in a slice.
    """
    states, tokens = hidden[0], len(hidden[0])
    slices = list(zip(*(part.tensor_split(-(-tokens // slice_tokens)) for part in hidden), strict=True))
    head = heads[0]
    if isinstance(head, torch.nn.Module) and any(weight.requires_grad for weight in head.parameters()):

        def compare(own: Tensor, *others: Tensor) -> Tensor:
            with torch.no_grad():
                logits = [project(part) for project, part in zip(heads[1:], others, strict=True)]
            value: Tensor = _Measured.apply(measure, head(own), *logits)  # type: ignore[no-untyped-call]
            return value

        return torch.stack([checkpoint(compare, *parts, use_reentrant=False) for parts in slices]).sum() / tokens
    wanted = torch.is_grad_enabled() and states.requires_grad
    values, gradients = [], []
    with torch.no_grad():
        projections = [_Projection(head) for head in heads]
        for parts in slices:
            logits = [project(part) for project, part in zip(projections, parts, strict=True)]
            values.append(measure(*logits))
            if wanted:
                # In half precision, small gradients of improbable tokens would be 0 before loss scaling reached them.
                gradients.append(projections[0].backward(logits[0]).float() / _GRADIENT_SCALE)
    total = torch.stack(values).sum()
    if wanted:
        total = _WithGradient.apply(states, total, torch.cat(gradients))  # type: ignore[no-untyped-call]
    return total / tokens


class _Projection:
    """Logits of one slice of tokens after another, in the same memory: to be given fresh memory costs a CPU time.

    Args:
        head: an output head that is not trained.
    """

    def __init__(self, head: Callable[[Tensor], Tensor]) -> None:
        self.head = head
        self.weight = head.weight if type(head) is torch.nn.Linear and head.bias is None else None
        self.room: Tensor | None = None

    def __call__(self, states: Tensor) -> Tensor:
        """Logits ``(tokens, vocabulary)`` of a slice, which may be overwritten; no longer slice comes later."""
        if self.weight is None:
            with torch.enable_grad():
                self.states = states.detach().requires_grad_(True)
                self.logits = self.head(self.states)
            return self.logits.detach().clone()
        if self.room is None:
            self.room = states.new_empty(len(states), len(self.weight))
        return torch.mm(states, self.weight.t(), out=self.room[: len(states)])

    def backward(self, gradient: Tensor) -> Tensor:
        """From the gradient with respect to the last slice's logits, that with respect to its states."""
        if self.weight is not None:
            return torch.mm(gradient, self.weight)
        return torch.autograd.grad(self.logits, self.states, gradient)[0]


class _Measured(torch.autograd.Function):
    """A measure of logits that are computed with autograd."""

    @staticmethod
    def forward(ctx: Any, measure: _Measure, merged_logits: Tensor, *others: Tensor) -> Tensor:
        gradient = merged_logits.detach().to(torch.float32, copy=True)
        value = measure(gradient, *others)
        ctx.save_for_backward(gradient)
        ctx.dtype, ctx.others = merged_logits.dtype, len(others)
        return value

    @staticmethod
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return None, (gradient * (scale / _GRADIENT_SCALE)).to(ctx.dtype), *[None] * ctx.others


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
