"""Scores with a gradient, which training can make small: the losses of the merged model on one sample."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from expert_merging.running.losses import entropy, hidden_alignment, logit_alignment
from expert_merging.running.targets import Target, hidden_states

# Logits that are held at a time, in bytes of float32.
_SLICE_BYTES = 1 << 26


@dataclass(frozen=True)
class Objective:
    """Losses whose sum is made small; a `expert_merging.running.scores.Score` of targets.

    Args:
        names: what the losses are called in curves.
        layers: hidden states that the targets must have.
        losses: ``(model, target) -> losses``, scalars in float32, in the order of their names.
    """

    names: tuple[str, ...]
    layers: tuple[int, ...]
    losses: Callable[[Any, Target], tuple[Tensor, ...]]

    def measure(self, model: Any, targets: Sequence[Target]) -> Iterator[tuple[Tensor, ...]]:
        """The losses of each target."""
        return (self.losses(model, target) for target in targets)


def alignment(
    layers: tuple[int, ...],
    *,
    temperature: float,
    logits_weight: float,
    hidden_states_weight: float,
    slice_tokens: int | None = None,
) -> Objective:
    """Alignment with the experts (paper, Eq. 1 and 2)."""

    def losses(model: Any, target: Target) -> tuple[Tensor, ...]:
        logits, hidden = alignment_losses(
            model, target, layers, temperature, logits=logits_weight > 0, slice_tokens=slice_tokens
        )
        return logits_weight * logits, hidden_states_weight * hidden

    return Objective(("logits", "hidden_states"), layers, losses)


def distance(layers: tuple[int, ...]) -> Objective:
    """How far a model is from the experts: KL(expert || model) per token in nats, and the hidden states' difference.

    Args:
        layers: hidden states that are compared; without any, their difference is 0.
    """
    return Objective(
        ("divergence", "hidden"), layers, lambda model, target: alignment_losses(model, target, layers, 1.0)
    )


def alignment_losses(
    model: Any,
    target: Target,
    layers: Sequence[int],
    temperature: float,
    *,
    logits: bool = True,
    slice_tokens: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Logit and hidden-state alignment of a model with one sample's expert, both scalars in float32.

    Args:
        model: a causal language model.
        target: the sample and what its expert says about it.
        layers: indices of the aligned hidden states, those of the target.
        temperature: softens both distributions.
        logits: whether the first is wanted, else it is 0.
        slice_tokens: tokens whose logits are held at a time; None for a number that suits the vocabulary.
    """
    hidden, last = hidden_states(model, target.inputs)
    zero = torch.zeros((), device=last.device)
    own_head = model.get_output_embeddings()
    logit_loss = hidden_loss = zero
    if logits:
        logit_loss = logit_alignment(
            target.last_hidden,
            last[0, target.tokens],
            target.head or own_head,
            own_head,
            temperature=temperature,
            slice_tokens=slice_tokens or _slice_tokens(own_head),
        )
    if layers:
        hidden_loss = hidden_alignment(target.layers, [hidden[layer][0, target.tokens] for layer in layers])
    return logit_loss, hidden_loss


def prediction_entropy(slice_tokens: int | None = None) -> Objective:
    """Entropy of the next token (AdaMerging), which takes a confident prediction for a good one."""

    def losses(model: Any, target: Target) -> tuple[Tensor, ...]:
        _, last = hidden_states(model, target.inputs)
        head = model.get_output_embeddings()
        return (entropy(last[0, target.tokens], head, slice_tokens=slice_tokens or _slice_tokens(head)),)

    return Objective(("entropy",), (), losses)


def _slice_tokens(head: Any) -> int:
    """Tokens whose logits are held at a time."""
    return max(1, _SLICE_BYTES // (4 * int(head.weight.shape[0])))
