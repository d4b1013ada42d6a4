"""A merged model's layers, changed one after the other, so that each sees what the changed ones below it make."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import torch
from safetensors import safe_open
from torch import Tensor

from expert_merging.checkpoints.configurations import layer_count, size_setting
from expert_merging.context import Context
from expert_merging.errors import InputError, first_of
from expert_merging.outputs import mirror_of
from expert_merging.parts import Part
from expert_merging.plan import Plan, Rule
from expert_merging.roles import is_in_decoder
from expert_merging.running.in_memory import InMemory
from expert_merging.running.options import SampleOptions
from expert_merging.running.samples import Samples, check_samples
from expert_merging.running.sharding import decoder_layers, load_on
from expert_merging.running.targets import Asked
from expert_merging.running.tensor_files import write_tensors
from expert_merging.statistics.gram import Gram, Grams, GramSum, KeptVectors
from expert_merging.statistics.inputs import InputWatch, gather, grams_of, matrices, place_of
from expert_merging.streaming import Reader
from expert_merging.writing import check_free_disk

logger = logging.getLogger(__name__)


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


def layer_matrices(context: Context) -> list[str]:
    """Names of the merged matrices of the language model's layers."""
    return [name for name in matrices(context) if is_in_decoder(name)]


def input_bytes(context: Context, samples: Samples) -> int:
    """The most bytes that what goes into all experts' layers takes; layers that share it share its place."""
    columns = sum(context.plan.base.entries[name].shape[1] for name in layer_matrices(context))
    return samples.dtype.itemsize * columns * samples.longest * len(samples.samples)


class Checked(NamedTuple):
    """What a method that goes through the layers needs.

    Args:
        samples: what the experts are asked.
        matrices: names of the matrices that may be changed.
        folder: where their new weights are kept.
        size: the most bytes that are kept.
    """

    samples: Samples
    matrices: list[str]
    folder: Path
    size: int


def output_bytes(context: Context, samples: Samples) -> int:
    """The most bytes that what comes out of all experts' layers takes."""
    config = context.plan.base.config
    width = (size_setting(config, "hidden_size") or 0) * (layer_count(config) or 0)
    return samples.dtype.itemsize * width * samples.longest * len(samples.samples)


def check_layers(
    context: Context,
    options: SampleOptions,
    method: str,
    *,
    more: Callable[[Samples], int] = lambda _: 0,
    synthesize: int = 0,
) -> Checked:
    """Check the samples, that some layer is merged, and the disk.

    Args:
        context: the run.
        options: which samples are asked, and how.
        method: name of the method, after which its folder is called: several may be in one run.
        more: the bytes of what is kept beside the new weights.
        synthesize: further questions that are made of those of each task.

    Raises:
        InputError: options or calibration files cannot be used, no layer is merged, or the disk has no room.
    """
    samples = check_samples(context, options, compares_logits=False, synthesize=synthesize)
    names = layer_matrices(context)
    if not names:
        raise InputError(f"{method} changes matrices of the language model's layers, and --exclude_params leaves none")
    size = sum(context.plan.base.entries[name].size for name in names) + more(samples)
    folder = context.run.calibrated / method
    if not context.run.is_complete:
        there = sum(file.stat().st_size for file in folder.rglob("*.safetensors"))
        check_free_disk(context.run.folder, max(0, size - there) + mirror_of(context.plan).size)
    return Checked(samples, names, folder, size)


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


# New weights of the layer of a number, all found before the first is written; by name, in the base's type.
Change: TypeAlias = Callable[[torch.nn.Module, int, "Sequence[Stream]"], dict[str, Tensor]]


@contextmanager
def inputs_watched(
    context: Context, checked: Checked, memory: InMemory, new_sum: Callable[[], GramSum] = GramSum
) -> Iterator[InputWatch]:
    """What sees the inputs of the linear layers whose matrices may be changed, until the block ends.

    Args:
        context: the run.
        checked: samples, matrices and folder.
        memory: the merged model.
        new_sum: as for `InputWatch`.

    Raises:
        InputError: none of the matrices is a linear layer's.
    """
    file_name = context.backbone.file_name
    watch = InputWatch(memory.model, {file_name(name): name for name in checked.matrices}, file_name, new_sum)
    try:
        yield watch
    finally:
        watch.close()


@torch.no_grad()
def change_layers(context: Context, checked: Checked, memory: InMemory, change: Change) -> None:
    """Go through a merged model's layers, change each, and keep its weights; layers that the run has are read.

    Args:
        context: the run.
        checked: samples, matrices and folder.
        memory: the merged model.
        change: finds a layer's weights.

    Raises:
        InputError: the model is no stack of layers.
    """
    samples, folder, device = checked.samples, checked.folder, torch.device(context.device)
    layers = decoder_layers(memory.model)[1]
    folder.mkdir(parents=True, exist_ok=True)
    kept = context.run.kept.within(place_of(context, folder), context.plan.opened)
    asked = list(samples.target_maker(context, (), device).answered(samples.samples))
    streams = streams_of(memory.model, layers, asked)
    with context.progress("calibrating layers", len(layers), "layer") as advance:
        for number, layer in enumerate(layers):
            file = folder / f"layer-{number:04}.safetensors"
            if not kept.has(file):
                write_tensors(file, change(layer, number, streams), kept)
            with safe_open(file, framework="pt") as opened:
                for name in opened.keys():  # noqa: SIM118  (it is no mapping)
                    memory.write(context.plan.part(name), opened.get_tensor(name).view(-1))
            for stream in streams:
                stream.hidden = stream.through(layer, number)
            advance(1)
    changed = Calibrated(folder).files
    others = [name for name in checked.matrices if name not in changed]
    if others:
        logger.info("no linear layer with %s ran on the same tokens in all models: not changed", first_of(others, 1))


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
    drawing = _Drawing(context.plan, memory, own, pull)
    with inputs_watched(context, checked, memory, KeptVectors) as watch:
        change_layers(context, checked, memory, partial(drawing.change, watch))


def live_merge(context: Context, samples: Samples, rule: Rule, unit: str) -> InMemory:
    """The model that a rule makes, in memory.

    Args:
        context: the run.
        samples: say in which type models run.
        rule: merges task vectors.
        unit: what the rule is fed.
    """
    device = torch.device(context.device)
    model = load_on(device, context.backbone, context.plan.base, samples.dtype, sharded=False)
    memory = InMemory(model, context.plan, context.backbone.file_name, device)
    memory.merge(rule, unit)
    return memory


@dataclass
class Stream:
    """A sample on its way through the layers.

    Args:
        asked: the sample.
        hidden: what goes into the next layer.
        given: what each layer is given beside it, by position and by name.
    """

    asked: Asked
    hidden: Tensor
    given: list[tuple[tuple[Any, ...], dict[str, Any]]]

    def through(self, layer: torch.nn.Module, number: int) -> Tensor:
        """What comes out of the layer of that number."""
        positional, named = self.given[number]
        return hidden_of(layer(self.hidden, *positional, **named))


def hidden_of(output: Any) -> Tensor:
    """The hidden states ``(batch, tokens, hidden)`` in what a layer returns."""
    found: Tensor = output[0] if isinstance(output, tuple) else output
    return found


def streams_of(model: Any, layers: Sequence[torch.nn.Module], asked: Iterable[Asked]) -> list[Stream]:
    """What goes into a model's layers on each sample, found by running it.

    Raises:
        InputError: there are none, or what comes out of a layer is not what goes into the next.
    """
    if not layers:
        raise InputError(f"{type(model).__name__} has no list of layers; use a method that does not go through layers")
    return [_stream(model, layers, one) for one in asked]


def _stream(model: Any, layers: Sequence[torch.nn.Module], asked: Asked) -> Stream:
    first: list[Tensor] = []
    last: list[Tensor] = []
    given: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def before(_layer: Any, positional: tuple[Any, ...], named: dict[str, Any]) -> None:
        if not positional or (last and not torch.equal(positional[0], last[-1])):
            raise InputError(
                f"{type(model).__name__} changes hidden states between its layers, so that they cannot be changed one "
                "by one; use a method that does not go through layers"
            )
        first.extend(positional[:1] if not given else ())
        given.append((positional[1:], named))

    def after(_layer: Any, _given: Any, output: Any) -> None:
        last[:] = [hidden_of(output)]

    hooks = [layer.register_forward_pre_hook(before, with_kwargs=True) for layer in layers]
    hooks += [layer.register_forward_hook(after) for layer in layers]
    try:
        model.base_model(**asked.inputs, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return Stream(asked, first[0], given)


@dataclass
class _Drawing:
    """What draws a layer of the merged model to the experts'.

    Args:
        plan: the checkpoints.
        memory: the merged model.
        own: what goes into the experts' layers.
        pull: where weights are drawn to.
    """

    plan: Plan
    memory: InMemory
    own: Grams
    pull: Pull

    def change(
        self, watch: InputWatch, layer: torch.nn.Module, number: int, streams: Sequence[Stream]
    ) -> dict[str, Tensor]:
        """See `Change`; the inputs are seen by ``watch``."""
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
        merged = self.memory.read(name).view(shape)
        shifts = self._shifts(reader, name, task_vectors)
        return new_weights(base.view(shape), task_vectors.view(-1, *shape), merged, pairs, shifts, self.pull)

    def _shifts(self, reader: Reader, name: str, task_vectors: Tensor) -> Tensor:
        bias = f"{name.removesuffix('weight')}bias"
        if bias not in self.plan.merged:
            return task_vectors.new_zeros(len(task_vectors), self.plan.base.entries[name].shape[0])
        base, own = reader.read(self.plan.part(bias))
        return base + own - self.memory.read(bias)


class Calibrated:
    """New weights of a run's layers, read from their files whenever they are asked for, by any thread or process.

    Args:
        folder: where they are.
    """

    def __init__(self, folder: Path) -> None:
        self.files: Mapping[str, Path] = {
            name: file for file in sorted(folder.glob("layer-*.safetensors")) for name in _names(file)
        }

    def task_vector(self, part: Part, base: Tensor) -> Tensor | None:
        """The new weights less the base's; None where a tensor stays as it was merged.

        Args:
            part: the tensor.
            base: the base's entries.
        """
        file = self.files.get(part.name)
        if file is None:
            return None
        with safe_open(file, framework="pt") as opened:
            found: Tensor = opened.get_tensor(part.name)
        return found.to(base.device).float().view(part.shape) - base.view(part.shape)


def _names(file: Path) -> list[str]:
    with safe_open(file, framework="pt") as opened:
        return list(opened.keys())
