"""The layers of RegMean++, solved for one after the other in a live model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from expert_merging.arithmetic import scaled_mean
from expert_merging.checkpoints.checkpoint import Checkpoint
from expert_merging.context import Context
from expert_merging.running.in_memory import InMemory
from expert_merging.statistics.gathering import merge_around_mean
from expert_merging.statistics.gram import Gram
from expert_merging.statistics.inputs import InputWatch
from expert_merging.statistics.layer_by_layer import Checked, Stream, change_layers, inputs_watched, live_merge
from expert_merging.statistics.regmean import least_squares
from expert_merging.stored import Run, stored_tensors
from expert_merging.streaming import Reader


def solve_layers(context: Context, checked: Checked, ratio: float) -> None:
    """Merge a model's layers from below, and keep their weights.

    Args:
        context: the run.
        checked: samples, matrices and folder.
        ratio: factor on entries of Gram matrices beside the diagonal.

    Raises:
        InputError: an expert answers with nothing, or the model is no stack of layers.
    """
    memory = live_merge(context, checked.samples, lambda task_vectors, *_: scaled_mean(task_vectors, 1.0), "entries")
    stored = stored_tensors(memory.model, context.backbone.file_name)
    places = {
        name: runs for name in context.plan.base.entries if (runs := stored.get(context.backbone.file_name(name)))
    }
    regression = _Regression(context, memory, places, ratio)
    with inputs_watched(context, checked, memory) as watch:
        change_layers(context, checked, memory, partial(regression.change, watch))


@dataclass(frozen=True)
class _Seen:
    """Gram matrices of a layer, for each expert."""

    by_expert: Sequence[dict[str, Gram]]

    def of(self, name: str) -> tuple[Gram | None, ...]:
        return tuple(own.get(name) for own in self.by_expert)


@dataclass(frozen=True)
class _Regression:
    """What merges a layer.

    Args:
        context: the run.
        memory: the model that is merged.
        places: where the model has the tensors of files.
        ratio: factor on entries beside diagonals.
    """

    context: Context
    memory: InMemory
    places: dict[str, list[Run]]
    ratio: float

    def change(
        self, watch: InputWatch, layer: torch.nn.Module, number: int, streams: Sequence[Stream]
    ) -> dict[str, Tensor]:
        """See `expert_merging.statistics.layer_by_layer.Change`; the inputs are seen by ``watch``."""
        plan, seen = self.context.plan, list[dict[str, Gram]]()
        for expert, checkpoint in plan.experts.items():
            with self._weights_of(checkpoint, layer):
                for stream in streams:
                    if stream.asked.sample.expert == expert:
                        watch.run(stream.asked, partial(stream.through, layer, number))
            seen.append({name: gram for names, gram in watch.finish().items() for name in names})
        reader, changed = Reader(plan, self.memory.device), {}
        for name in dict.fromkeys(name for own in seen for name in own):
            entry, part = plan.base.entries[name], plan.part(name)
            base, task_vectors = reader.read(part)
            merged = merge_around_mean(
                task_vectors.view(-1, *entry.shape), part, _Seen(seen), partial(least_squares, ratio=self.ratio)
            )
            changed[name] = (base.view(entry.shape) + merged).to(entry.torch_dtype).cpu()
        return changed

    @contextmanager
    def _weights_of(self, checkpoint: Checkpoint, layer: torch.nn.Module) -> Iterator[None]:
        """An expert's weights in the place of the layer's."""
        saved = {parameter: parameter.data for parameter in layer.parameters()}
        named = dict(self.memory.model.named_parameters())
        own = {parameter: torch.empty_like(parameter.data) for parameter in saved}
        try:
            for name, runs in self.places.items():
                if named[runs[0].parameter] in own:
                    values, before = checkpoint.read(name), 0
                    for run in runs:
                        count = run.stop - run.start
                        place = own[named[run.parameter]].view(-1)[run.start : run.stop]
                        place.copy_(values[before : before + count])
                        before += count
            for parameter, values in own.items():
                parameter.data = values
            yield
        finally:
            for parameter, values in saved.items():
                parameter.data = values
