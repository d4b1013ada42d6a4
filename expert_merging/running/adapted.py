"""An adapter's model: the base's, in which some weights are what the adapter makes of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from expert_merging.checkpoints.adapter import Adapter


def changed_weights(
    model: Any, adapter: Adapter, file_name: Callable[[str], str]
) -> dict[torch.nn.Parameter, Callable[[], Tensor]]:
    """What makes the values of the base model's parameters that an adapter changes, each when it is called.

    A weight that the model uses twice, as embedding and head, stays one where low-rank matrices are added to it, as
    peft leaves it; one that was trained whole is parted from the other.

    Args:
        model: the base's model, whose parted weights get parameters of their own.
        adapter: the adapter.
        file_name: published name of a parameter in memory, of which several may be consecutive rows of one tensor.
    """
    groups: dict[str, list[str]] = {}
    for name, _ in model.named_parameters(remove_duplicate=False):
        groups.setdefault(file_name(name), []).append(name)
    for stored in adapter.whole:
        for name in groups.get(file_name(stored), ()):
            _part(model, name)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    found: dict[torch.nn.Parameter, Callable[[], Tensor]] = {}
    for stored in adapter.changed:
        names, row = groups.get(file_name(stored), []), 0
        for name in names:
            shape = adapter.entries[stored].shape if len(names) == 1 else tuple(parameters[name].shape)
            found[parameters[name]] = _values(adapter, stored, row, shape)
            row += shape[0]
    return found


def _part(model: Any, name: str) -> None:
    """Give a weight a parameter of its own."""
    owner, _, attribute = name.rpartition(".")
    module = model.get_submodule(owner)
    setattr(module, attribute, torch.nn.Parameter(getattr(module, attribute).data, requires_grad=False))


def _values(adapter: Adapter, stored: str, row: int, shape: tuple[int, ...]) -> Callable[[], Tensor]:
    entries = torch.Size(shape).numel()
    start = row * (entries // max(1, shape[0]))
    return lambda: adapter.read(stored, start, start + entries).view(shape)
