"""Samples that go through a model together: how many, which, and as one batch of model inputs.

A pass over a few tokens costs nearly as much as one over several hundred, since every weight is fetched for either. So
samples are put together, those of like length, as long as few tokens are padding and the activations stay small.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from expert_merging.checkpoints.configurations import layer_count, size_setting
from expert_merging.machine import memory_of

# Tokens beyond which a pass gains nothing, and the share of a device's memory that their activations may take.
_MOST_TOKENS, _SHARE = 2048, 0.1
# Tokens of a sample for one of its neighbours' in a batch: padding costs what tokens cost.
_LIKE = 2 / 3

Item = TypeVar("Item")


def kept_bytes(config: Mapping[str, Any], width: int) -> int:
    """Bytes that autograd keeps of a layer for each token; counted on decoders of Llama's kind.

    Args:
        config: the checkpoint's ``config.json``.
        width: bytes of a weight.
    """
    hidden, middle = size_setting(config, "hidden_size") or 0, size_setting(config, "intermediate_size") or 0
    return int(width * (4 * middle + 4.5 * hidden) + 11.4 * hidden)


def fitting_tokens(config: Mapping[str, Any], width: int, device: torch.device) -> int:
    """Tokens, padding included, that a pass should have at most; the same on every machine with such a device.

    Args:
        config: the checkpoint's ``config.json``.
        width: bytes of a weight.
        device: where the model runs.
    """
    token = kept_bytes(config, width) * (layer_count(config) or 0)
    return min(_MOST_TOKENS, int(_SHARE * memory_of(device) / token)) if token else _MOST_TOKENS


def pack(
    items: Iterable[Item], length: Callable[[Item], int], tokens: int, most: int | None = None
) -> list[list[Item]]:
    """Put items of like length together.

    Args:
        items: what goes through a model.
        length: tokens of an item.
        tokens: bound on a batch's tokens, padding included; a single item may have more.
        most: bound on a batch's items.

    Returns:
        Batches, those of the longest items first.
    """
    batches: list[list[Item]] = []
    for item in sorted(items, key=length, reverse=True):
        batch = batches[-1] if batches else []
        longest = length(batch[0]) if batch else 0
        full = most is not None and len(batch) >= most
        if batch and not full and (len(batch) + 1) * longest <= tokens and length(item) >= _LIKE * longest:
            batch.append(item)
        else:
            batches.append([item])
    return batches


def together(
    inputs: Sequence[Mapping[str, Tensor]], padding: int = 0, side: Literal["left", "right"] = "right"
) -> dict[str, Tensor]:
    """Model inputs of several samples as one batch.

    Args:
        inputs: those of each, batch of one. What has a number per token is padded; pictures follow one another.
        padding: token that is put where a sample has none; the attention mask leaves it out.
        side: where padding is.
    """
    names = dict.fromkeys(name for one in inputs for name in one)
    return {name: _joined(name, inputs, padding, side) for name in names}


def _joined(name: str, inputs: Sequence[Mapping[str, Tensor]], padding: int, side: Literal["left", "right"]) -> Tensor:
    """One input of all samples that have it; what has a number per token is 0 where a sample lacks it."""
    first = next(one for one in inputs if name in one)
    if first[name].shape != first["input_ids"].shape:
        return torch.cat([one[name] for one in inputs if name in one])
    rows = [one.get(name, torch.zeros_like(one["input_ids"]))[0] for one in inputs]
    return pad_sequence(rows, True, padding if name == "input_ids" else 0, side)
