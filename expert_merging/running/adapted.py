"""Models of which some weights are others than the loaded files': an adapter's, or one with units in another order."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from expert_merging.checkpoints.checkpoint import Checkpoint
from expert_merging.stored import Run, stored_tensors


def changed_weights(
    model: Any, checkpoint: Checkpoint, file_name: Callable[[str], str]
) -> dict[torch.nn.Parameter, Callable[[], Tensor]]:
    """What makes the values of parameters that a checkpoint has otherwise than its loaded model, when it is called.

    A weight that the model uses twice, as embedding and head, stays one where low-rank matrices are added to it, as
    peft leaves it; one that was trained whole is parted from the other.

    Args:
        model: the checkpoint's, or the one that an adapter changes, whose parted weights get parameters of their own.
        checkpoint: the checkpoint.
        file_name: published name of a parameter in memory, of which several may be consecutive rows of one tensor, and
            one may have several tensors in it.
    """
    whole = set(map(file_name, checkpoint.whole))
    for name, _ in list(model.named_parameters(remove_duplicate=False)):
        if file_name(name) in whole:
            _part(model, name)
    places, pieces = _places(model, file_name), dict[str, list[_Piece]]()
    for stored in checkpoint.changed:
        start, runs = 0, places.get(file_name(stored), [])
        for run in runs:
            pieces.setdefault(run.parameter, []).append(_Piece(run, stored, start, is_all=len(runs) == 1))
            start += run.stop - run.start
    parameters = dict(model.named_parameters())
    return {parameters[name]: partial(_values, checkpoint, parameters[name], found) for name, found in pieces.items()}


class _Piece(NamedTuple):
    """What a parameter has of a tensor of the files.

    Args:
        run: the entries of the parameter.
        stored: the tensor.
        start: its entry that is the run's first one.
        is_all: the run is all of it.
    """

    run: Run
    stored: str
    start: int
    is_all: bool


def _places(model: Any, file_name: Callable[[str], str]) -> dict[str, list[Run]]:
    """Where the model has the tensors of files, by all names of a parameter that it uses twice."""
    found = stored_tensors(model, file_name)
    first = {parameter: name for name, parameter in model.named_parameters()}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        found.setdefault(file_name(name), [Run(first[parameter], 0, parameter.numel())])
    return found


def _part(model: Any, name: str) -> None:
    """Give a weight a parameter of its own."""
    owner, _, attribute = name.rpartition(".")
    module = model.get_submodule(owner)
    setattr(module, attribute, torch.nn.Parameter(getattr(module, attribute).data, requires_grad=False))


def _values(checkpoint: Checkpoint, parameter: torch.nn.Parameter, pieces: list[_Piece]) -> Tensor:
    """A parameter's values; what is in none of the pieces stays as it is."""
    (run, stored, start, is_all), *others = pieces
    if not others and run.stop - run.start == parameter.numel():
        if is_all:
            return checkpoint.read(stored).view(checkpoint.entries[stored].shape)  # of more words perhaps
        return checkpoint.read(stored, start, start + parameter.numel()).view(parameter.shape)
    values = parameter.data.to(torch.float32, copy=True).flatten()
    for run, stored, start, _ in pieces:
        values[run.start : run.stop] = checkpoint.read(stored, start, start + run.stop - run.start)
    return values.view(parameter.shape)
