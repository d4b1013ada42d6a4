"""Scores with a gradient, which training can make small: the losses of the merged model on each sample."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from expert_merging.running.batches import pack, together
from expert_merging.running.losses import cross_entropy, entropy, hidden_alignment, logit_alignment
from expert_merging.running.targets import Target, hidden_states

# Logits that are held at a time, in bytes of float32.
_SLICE_BYTES = 1 << 26


@dataclass(frozen=True)
class Seen:
    """What a model makes of a sample, at the tokens that the losses look at.

    Args:
        last: ``(selected, hidden)`` input of the output head.
        layers: ``(selected, hidden)`` each, the hidden states that are wanted.
        head: the model's output head.
    """

    last: Tensor
    layers: tuple[Tensor, ...]
    head: torch.nn.Module


@dataclass(frozen=True)
class Objective:
    """Losses whose sum is made small; a `expert_merging.running.scores.Score` of targets.

    Args:
        names: what the losses are called in curves.
        layers: hidden states that are looked at, and that the targets must have.
        compare: ``(what the model makes of a sample, its target) -> losses``, scalars in float32, in the order of their
            names.
        batch_tokens: tokens that go through the model together where many samples are measured.
    """

    names: tuple[str, ...]
    layers: tuple[int, ...]
    compare: Callable[[Seen, Target], tuple[Tensor, ...]]
    batch_tokens: int = 1

    def losses(self, model: Any, targets: Sequence[Target]) -> Tensor:
        """The losses of samples that go through a model together, ``(samples, losses)`` in float32."""
        hidden, last = hidden_states(model, together([target.inputs for target in targets]))
        head, found = model.get_output_embeddings(), []
        for row, target in enumerate(targets):
            layers = tuple(hidden[layer][row, target.tokens] for layer in self.layers)
            found.append(torch.stack(self.compare(Seen(last[row, target.tokens], layers, head), target)))
        return torch.stack(found)

    def measure(self, model: Any, targets: Sequence[Target]) -> Iterator[list[float]]:
        """The losses of each target."""
        found: dict[int, list[float]] = {}
        for batch in pack(range(len(targets)), lambda number: targets[number].length, self.batch_tokens):
            found.update(zip(batch, self.losses(model, [targets[number] for number in batch]).tolist(), strict=True))
        return (found[number] for number in range(len(targets)))


def alignment(
    layers: tuple[int, ...],
    *,
    temperature: float,
    logits_weight: float,
    hidden_states_weight: float,
    slice_tokens: int | None = None,
    confident: bool = False,
    symmetric: bool = False,
) -> Objective:
    """Alignment with the experts (paper, Eq. 1 and 2)."""

    def compare(seen: Seen, target: Target) -> tuple[Tensor, ...]:
        logits = seen.last.new_zeros((), dtype=torch.float32)
        if logits_weight > 0:
            logits = _divergence(seen, target, temperature, slice_tokens, confident=confident, symmetric=symmetric)
        return logits_weight * logits, hidden_states_weight * _hidden(seen, target)

    return Objective(("logits", "hidden_states"), layers, compare)


def distance(layers: tuple[int, ...], batch_tokens: int = 1) -> Objective:
    """How far a model is from the experts: KL(expert || model) per token in nats, and the hidden states' difference.

    Args:
        layers: hidden states that are compared; without any, there is no such number.
        batch_tokens: tokens that go through the model together.
    """

    def compare(seen: Seen, target: Target) -> tuple[Tensor, ...]:
        divergence = _divergence(seen, target, 1.0)
        return (divergence, _hidden(seen, target)) if layers else (divergence,)

    return Objective(("divergence", "hidden") if layers else ("divergence",), layers, compare, batch_tokens)


def with_divergence(objective: Objective) -> Objective:
    """The objective with one number more, the divergence of `distance`, so that one pass measures both."""

    def compare(seen: Seen, target: Target) -> tuple[Tensor, ...]:
        return *objective.compare(seen, target), _divergence(seen, target, 1.0)

    return replace(objective, names=(*objective.names, "divergence"), compare=compare)


def prediction_entropy(slice_tokens: int | None = None) -> Objective:
    """Entropy of the next token (AdaMerging), which takes a confident prediction for a good one."""

    def compare(seen: Seen, _: Target) -> tuple[Tensor, ...]:
        return (entropy(seen.last, seen.head, slice_tokens=slice_tokens or _slice_tokens(seen.head)),)

    return Objective(("entropy",), (), compare)


def answer_likelihood(slice_tokens: int | None = None) -> Objective:
    """Minus the log-likelihood of the samples' own tokens, mean over those that are looked at (SuperMerge).

    With ``loss_tokens=response`` they are the answers that files give or experts have written.
    """

    def compare(seen: Seen, target: Target) -> tuple[Tensor, ...]:
        following = target.tokens + 1
        within = following < target.length  # nothing follows the last token
        labels = target.inputs["input_ids"][0, following[within]]
        slices = slice_tokens or _slice_tokens(seen.head)
        return (cross_entropy(seen.last[within], labels, seen.head, slice_tokens=slices),)

    return Objective(("cross_entropy",), (), compare)


def _divergence(
    seen: Seen,
    target: Target,
    temperature: float,
    slice_tokens: int | None = None,
    *,
    confident: bool = False,
    symmetric: bool = False,
) -> Tensor:
    """Logit alignment with the expert, by default of as many tokens at a time as suit the vocabulary."""
    return logit_alignment(
        target.last_hidden,
        seen.last,
        target.head or seen.head,
        seen.head,
        temperature=temperature,
        slice_tokens=slice_tokens or _slice_tokens(seen.head),
        confident=confident,
        symmetric=symmetric,
    )


def _hidden(seen: Seen, target: Target) -> Tensor:
    """Hidden-state alignment with the expert, 0 without layers."""
    if not seen.layers:
        return seen.last.new_zeros((), dtype=torch.float32)
    return hidden_alignment(target.layers, seen.layers)


def _slice_tokens(head: Any) -> int:
    """Tokens whose logits are held at a time."""
    return max(1, _SLICE_BYTES // (4 * int(head.weight.shape[0])))
