"""FeatCal's arithmetic: each layer of a merged model is solved for, so that it puts out what the experts' do."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from expert_merging.context import Context
from expert_merging.plan import Plan, Rule
from expert_merging.running.in_memory import InMemory
from expert_merging.running.samples import Samples
from expert_merging.running.targets import Asked
from expert_merging.statistics.gram import Gram, Grams, KeptVectors
from expert_merging.statistics.inputs import InputWatch, gather, grams_of
from expert_merging.statistics.layer_by_layer import (
    Checked,
    Stream,
    change_layers,
    inputs_watched,
    layer_matrices,
    live_merge,
)
from expert_merging.streaming import Reader


class Pull(NamedTuple):
    """Where a layer's weights are drawn to.

    Args:
        mix: share of the expert's own inputs in those that targets are computed from.
        ridge: weight of the pull towards the merged weights.
        reach: how far what it pulls to is from the base, as a multiple of the merged weights.
    """

    mix: float
    ridge: float
    reach: float


class Pair(NamedTuple):
    """What goes into a layer on the same samples of an expert, ``(tokens, inputs)`` each.

    Args:
        expert: number of the expert.
        merged: in the merged model.
        own: in the expert.
    """

    expert: int
    merged: Tensor
    own: Tensor


def input_bytes(context: Context, samples: Samples, count: int | None = None) -> int:
    """The most bytes that what goes into layers on so many samples takes; layers that share it share its place.

    Args:
        context: the run.
        samples: all experts' samples.
        count: of them, by default all.
    """
    columns = sum(context.plan.base.entries[name].shape[1] for name in layer_matrices(context))
    return samples.dtype.itemsize * columns * samples.longest * (count or len(samples.samples))


@torch.no_grad()
def calibrate(context: Context, checked: Checked, pull: Pull, rule: Rule, unit: str) -> None:
    """Draw a merged model's layers to the experts' outputs; what an earlier part of the run has done is taken.

    Args:
        context: the run.
        checked: samples, matrices and folder.
        pull: where weights are drawn to.
        rule: merges task vectors.
        unit: what the rule is fed.

    Raises:
        InputError: an expert answers with nothing or computes NaN, or the model is no stack of layers.
    """
    names, file_name, samples = checked.matrices, context.backbone.file_name, checked.samples

    def find(_expert: str, model: Any, own: Iterator[Asked]) -> dict[tuple[str, ...], Gram]:
        return grams_of(model, names, file_name, own, KeptVectors)

    folder = checked.folder / "inputs"
    own = gather(context, samples, lambda expert: context.plan.only([expert]).opened, find, folder=folder)
    memory = live_merge(context, samples, rule, unit)
    drawing = _Drawing(context.plan, memory, partial(memory.read, rule=rule, unit=unit), own, pull)
    with inputs_watched(context, checked, memory, KeptVectors) as watch:
        change_layers(context, checked, memory, partial(drawing.change, watch))


@dataclass
class _Drawing:
    """What draws a layer of the merged model to the experts'.

    Args:
        plan: the checkpoints.
        memory: the merged model.
        read: the entries of a tensor as it was merged.
        own: what goes into the experts' layers.
        pull: where weights are drawn to.
    """

    plan: Plan
    memory: InMemory
    read: Callable[[str], Tensor]
    own: Grams
    pull: Pull

    def change(
        self, watch: InputWatch, layer: torch.nn.Module, number: int, streams: Sequence[Stream]
    ) -> dict[str, Tensor]:
        """See `expert_merging.statistics.layer_by_layer.Change`; the inputs are seen by ``watch``."""
        seen: list[dict[str, Gram]] = []
        for expert in self.plan.experts:
            for stream in streams:
                if stream.asked.sample.expert == expert:
                    watch.run(stream.asked, partial(stream.through, layer, number))
            seen.append({name: gram for names, gram in watch.finish().items() for name in names})
        reader = Reader(self.plan, self.memory.device)
        changed = {}
        for name in dict.fromkeys(name for own in seen for name in own):
            pairs = self._pairs(name, [own.get(name) for own in seen])
            if pairs:
                changed[name] = self._weights(reader, name, pairs).to(self.plan.base.entries[name].torch_dtype).cpu()
        return changed

    def _pairs(self, name: str, merged: Sequence[Gram | None]) -> list[Pair]:
        """What goes into a layer; nothing where a model of experts sends other tokens there than the expert does."""
        both = [(number, one, own) for number, (one, own) in enumerate(zip(merged, self.own.of(name), strict=True))]
        pairs = [
            Pair(number, one.values, own.values) for number, one, own in both if one is not None and own is not None
        ]
        same = all(len(pair.merged) == len(pair.own) for pair in pairs)
        return pairs if same and len(pairs) == sum(one is not None or own is not None for _, one, own in both) else []

    def _weights(self, reader: Reader, name: str, pairs: Sequence[Pair]) -> Tensor:
        shape = self.plan.base.entries[name].shape
        base, task_vectors = reader.read(self.plan.part(name))
        merged = self.read(name).view(shape)
        shifts = self._shifts(reader, name, task_vectors)
        return new_weights(base.view(shape), task_vectors.view(-1, *shape), merged, pairs, shifts, self.pull)

    def _shifts(self, reader: Reader, name: str, task_vectors: Tensor) -> Tensor:
        bias = f"{name.removesuffix('weight')}bias"
        if bias not in self.plan.merged:
            return task_vectors.new_zeros(len(task_vectors), self.plan.base.entries[name].shape[0])
        base, own = reader.read(self.plan.part(bias))
        return base + own - self.read(bias)


def new_weights(
    base: Tensor, task_vectors: Tensor, merged: Tensor, pairs: Sequence[Pair], shifts: Tensor, pull: Pull
) -> Tensor:
    """The weights that draw a layer's outputs to the experts', in float64; see `featcal` for the formula.

    Args:
        base: ``(outputs, inputs)``.
        task_vectors: ``(experts, outputs, inputs)``.
        merged: the merged weights, ``(outputs, inputs)``.
        pairs: what goes into the layer, for each expert that has samples.
        shifts: ``(experts, outputs)``, what each expert's bias has more than the merged one.
        pull: where to.
    """
    anchor = base.double() + pull.reach * (merged.double() - base.double())
    rows, missing = [], []
    for expert, inputs, own_inputs in pairs:
        inputs = inputs.to(base.device).double()
        wanted = torch.lerp(inputs, own_inputs.to(base.device).double(), pull.mix)
        weights = base.double() + task_vectors[expert].double()
        smaller = inputs @ inputs.T if len(inputs) < inputs.shape[1] else inputs.T @ inputs
        # So that the sum of products has norm 1: the number of tokens, by which means are divided, cancels out.
        scale = smaller.norm().clamp_(min=torch.finfo(torch.float32).tiny).rsqrt_()
        rows.append(inputs * scale)
        missing.append((wanted @ weights.T + shifts[expert].double() - inputs @ anchor.T) * scale)
    stacked, wanted = torch.cat(rows), torch.cat(missing)
    if len(stacked) < stacked.shape[1]:
        change = stacked.T @ _solve(stacked @ stacked.T, wanted, pull.ridge)
    else:
        change = _solve(stacked.T @ stacked, stacked.T @ wanted, pull.ridge)
    return anchor + change.T


def _solve(products: Tensor, right: Tensor, ridge: float) -> Tensor:
    products.diagonal().add_(ridge)
    return torch.cholesky_solve(right, torch.linalg.cholesky(products))
