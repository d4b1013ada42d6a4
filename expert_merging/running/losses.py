"""The alignment losses as pure functions of tensors."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

# Gradients with respect to logits are kept times this while they are in half precision: with many words most are below
# what float16 holds well. With a vocabulary of 151936 it keeps 99.6 % of the gradient right, and 1 only 93.6 %.
_GRADIENT_SCALE = 2.0**10
# Entries of logits that a CPU works on at a time, few enough to stay in a core's cache from one operation to the next.
# A vocabulary's logits take a dozen operations, which would cost more than the output head if each went to memory.
_CACHED = 1 << 18

# Takes the merged model's logits of some tokens, ``(tokens, vocabulary)``, and perhaps the expert's. Returns a number
# summed over tokens, and overwrites the merged model's logits with its gradient with respect to them, times
# `_GRADIENT_SCALE`.
_Measure = Callable[..., Tensor]


def logit_alignment(
    expert_hidden: Tensor,
    merged_hidden: Tensor,
    expert_head: Callable[[Tensor], Tensor],
    merged_head: Callable[[Tensor], Tensor],
    *,
    temperature: float,
    slice_tokens: int,
    confident: bool = False,
    symmetric: bool = False,
) -> Tensor:
    """``T^2 KL(softmax(expert / T) || softmax(merged / T))`` as a mean over tokens (paper, Eq. 2), in float32.

    The published code minimises the soft cross-entropy; the two differ by the expert's entropy, so gradients are the
    same and this one is 0 where the models agree. Logits are made and compared a slice of tokens at a time, so memory
    grows with ``slice_tokens x vocabulary`` and not with the length of the sequence.

    Args:
        expert_hidden: ``(tokens, hidden)``, input of the expert's output head.
        merged_hidden: ``(tokens, hidden)``, input of the merged model's output head.
        expert_head: the expert's projection to logits.
        merged_head: the merged model's projection to logits.
        temperature: T > 0.
        slice_tokens: most tokens in a slice.
        confident: tokens count as 0 whose likeliest word the expert thinks less likely than the merged model its own,
            another one (the filter of SyMerge, arXiv 2412.19098); the mean is over all tokens.
        symmetric: Jensen and Shannon's divergence instead of Kullback and Leibler's.
    """
    compare = _jensen_shannon if symmetric else _kullback_leibler
    measure = partial(_divergence, temperature=temperature, confident=confident, compare=compare)
    return _mean_over_tokens(measure, (merged_head, expert_head), (merged_hidden, expert_hidden), slice_tokens)


def entropy(hidden: Tensor, head: Callable[[Tensor], Tensor], *, slice_tokens: int) -> Tensor:
    """Mean over tokens of the entropy of the predicted distribution, in nats, with logits in slices as well.

    Args:
        hidden: ``(tokens, hidden)``, input of the model's output head.
        head: the model's projection to logits.
        slice_tokens: most tokens in a slice.
    """
    return _mean_over_tokens(_entropy, (head,), (hidden,), slice_tokens)


def cross_entropy(hidden: Tensor, labels: Tensor, head: Callable[[Tensor], Tensor], *, slice_tokens: int) -> Tensor:
    """Mean over tokens of minus the log of a word's probability, in nats, with logits in slices as well.

    Args:
        hidden: ``(tokens, hidden)``, input of the model's output head.
        labels: ``(tokens,)``, numbers of the words.
        head: the model's projection to logits.
        slice_tokens: most tokens in a slice.
    """
    return _mean_over_tokens(_cross_entropy, (head, torch.nn.Identity()), (hidden, labels[:, None]), slice_tokens)


# Takes logits of merged model and expert, the largest 0, which it may overwrite, and whether tokens are left out at
# which the expert is less sure and says something else. Returns a number for each token, ``(tokens, 1)``, and its
# gradient with respect to the merged model's logits.
_Compare = Callable[[Tensor, Tensor, bool], tuple[Tensor, Tensor]]


def _divergence(
    merged_logits: Tensor, expert_logits: Tensor, *, temperature: float, confident: bool, compare: _Compare
) -> Tensor:
    """The measure of `logit_alignment`; its gradient is T times that of the comparison."""
    # A fine-tune may have added a few tokens to the vocabulary; the shared ones are compared.
    shared = min(expert_logits.shape[-1], merged_logits.shape[-1])
    merged_logits[..., shared:] = 0
    total = torch.zeros((), device=merged_logits.device)
    for merged_rows, expert_rows in zip(
        _cached(merged_logits[..., :shared]), _cached(expert_logits[..., :shared]), strict=True
    ):
        merged, expert = _shifted(merged_rows, temperature), _shifted(expert_rows, temperature)
        values, gradient = compare(merged, expert, confident)
        total += values.sum()
        merged_rows.copy_(gradient.mul_(temperature * _GRADIENT_SCALE))
    return temperature**2 * total


def _kullback_leibler(merged: Tensor, expert: Tensor, confident: bool) -> tuple[Tensor, Tensor]:
    """``KL(p || q)`` of the expert's p and the merged model's q; its gradient is ``q - p``."""
    difference = expert - merged
    merged_sum, expert_sum = (logits.exp_().sum(dim=-1, keepdim=True) for logits in (merged, expert))
    counts = _counts(merged, expert, merged_sum, expert_sum) if confident else None
    probabilities = expert.div_(expert_sum)
    values = torch.linalg.vecdot(probabilities, difference)[..., None] + (merged_sum / expert_sum).log()
    gradient = merged.div_(merged_sum).sub_(probabilities)
    return (values, gradient) if counts is None else (values * counts, gradient.mul_(counts))


def _jensen_shannon(merged: Tensor, expert: Tensor, confident: bool) -> tuple[Tensor, Tensor]:
    """``(KL(p || m) + KL(q || m)) / 2``, m the mean of p and q; its gradient is ``q (log(q / m) - KL(q || m)) / 2``."""
    merged_sum, expert_sum = (logits.exp().sum(dim=-1, keepdim=True) for logits in (merged, expert))
    counts = _counts(merged, expert, merged_sum, expert_sum) if confident else None
    merged.sub_(merged_sum.log_())
    expert.sub_(expert_sum.log_())
    q, p = merged.exp(), expert.exp()
    middle = torch.logaddexp(merged, expert).sub_(math.log(2))
    from_middle = torch.linalg.vecdot(q, merged.sub_(middle))[..., None]
    values = (from_middle + torch.linalg.vecdot(p, expert.sub_(middle))[..., None]) / 2
    gradient = merged.sub_(from_middle).mul_(q).div_(2)
    return (values, gradient) if counts is None else (values * counts, gradient.mul_(counts))


def _counts(merged: Tensor, expert: Tensor, merged_sum: Tensor, expert_sum: Tensor) -> Tensor:
    """Tokens at which the expert is surer than the merged model, or says the same, ``(tokens, 1)``.

    The likeliest word has exp(0), so the surer model is that of the smaller sum.
    """
    return (expert_sum <= merged_sum) | (merged.argmax(dim=-1) == expert.argmax(dim=-1))[..., None]


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


def _cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """The measure of `cross_entropy`; its gradient is ``p`` less 1 at the word."""
    total = torch.zeros((), device=logits.device)
    for rows, words in zip(_cached(logits), torch.split(labels, _rows_cached(logits)), strict=True):
        logarithms = _shifted(rows, 1.0)
        logarithms.sub_(logarithms.logsumexp(dim=-1, keepdim=True))
        total -= logarithms.gather(-1, words).sum()
        gradient = logarithms.exp_()
        gradient.scatter_add_(-1, words, torch.full_like(words, -1, dtype=gradient.dtype))
        rows.copy_(gradient.mul_(_GRADIENT_SCALE))
    return total


def _cached(logits: Tensor) -> tuple[Tensor, ...]:
    """Rows that are worked on at a time: all on a GPU, where each operation has a price of its own."""
    return torch.split(logits, _rows_cached(logits))


def _rows_cached(logits: Tensor) -> int:
    return max(1, len(logits) if logits.is_cuda else _CACHED // logits.shape[-1])


def _shifted(logits: Tensor, temperature: float) -> Tensor:
    """Logits over temperature with 0 for the largest, in float32 and in memory of their own."""
    shifted = logits.float() - logits.amax(dim=-1, keepdim=True)
    return shifted if temperature == 1 else shifted.div_(temperature)


def _mean_over_tokens(
    measure: _Measure, heads: Sequence[Callable[[Tensor], Tensor]], hidden: Sequence[Tensor], slice_tokens: int
) -> Tensor:
    """Mean over tokens of a measure, a slice at a time, with a gradient for the first of ``hidden``.

    The gradient of a slice is taken along with its value, so its logits are made once and gone before the next slice's.
    Left to autograd and checkpointing they would be made again in the backward pass: a sample of 256 tokens then takes
    6.8 s instead of 3.1 s on one core with 151936 words and 896 hidden units, 4.3 s instead of 2.4 s with 32000 and
    4096. A head that is trained itself needs autograd, so its slices are computed twice.

    Args:
        measure: what is summed.
        heads: the merged model's output head, and perhaps the expert's; each makes logits in memory of their own.
        hidden: ``(tokens, hidden)``, the input of each.
        slice_tokens: most tokens in a slice.
    """
    states, tokens = hidden[0], len(hidden[0])
    slices = list(zip(*(part.tensor_split(-(-tokens // slice_tokens)) for part in hidden), strict=True))
    if _is_trained(heads[0]):
        parts = [checkpoint(_compare, measure, heads, *own, use_reentrant=False) for own in slices]
        return torch.stack(parts).sum() / tokens
    wanted = torch.is_grad_enabled() and states.requires_grad
    values, gradients = [], []
    for own, *others in slices:
        own = own.detach().requires_grad_(wanted)
        logits = heads[0](own)
        with torch.no_grad():
            values.append(measure(logits.detach(), *_project(heads[1:], others)))
        if wanted:
            (gradient,) = torch.autograd.grad(logits, own, logits.detach())
            gradients.append(gradient.float() / _GRADIENT_SCALE)
    total = torch.stack(values).sum()
    return (_with_gradient(total, states, torch.cat(gradients)) if wanted else total) / tokens


def _is_trained(head: Callable[[Tensor], Tensor]) -> bool:
    return isinstance(head, torch.nn.Module) and any(weight.requires_grad for weight in head.parameters())


def _project(heads: Sequence[Callable[[Tensor], Tensor]], hidden: Sequence[Tensor]) -> list[Tensor]:
    return [head(states) for head, states in zip(heads, hidden, strict=True)]


def _compare(measure: _Measure, heads: Sequence[Callable[[Tensor], Tensor]], own: Tensor, *others: Tensor) -> Tensor:
    """A measure of one slice, with gradients for its states and for the merged model's head."""
    with torch.no_grad():
        logits = _project(heads[1:], others)
    return _measured(measure, heads[0](own), *logits)


def _measured(measure: _Measure, logits: Tensor, *others: Tensor) -> Tensor:
    """A measure with its gradient for logits that autograd has made."""
    gradient = logits.detach().to(torch.float32, copy=True)
    with torch.no_grad():
        value = measure(gradient, *others)
    return _with_gradient(value, logits, gradient / _GRADIENT_SCALE)


def _with_gradient(value: Tensor, variable: Tensor, gradient: Tensor) -> Tensor:
    """The value, of which autograd will believe that it has this gradient with respect to the variable."""
    product = (variable * gradient).sum()
    return value + (product - product.detach())


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
