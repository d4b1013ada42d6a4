"""A merged model's layers, changed one after the other, so that each sees what the changed ones below it make.

What FeatCal, RegMean++ and Distil share: the checks, the way through the layers, and the new weights' files.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import torch
from safetensors import safe_open
from torch import Tensor

from expert_merging.context import Context
from expert_merging.errors import InputError, first_of
from expert_merging.outputs import mirror_of
from expert_merging.parts import Part
from expert_merging.plan import Rule
from expert_merging.roles import is_in_decoder
from expert_merging.running.in_memory import InMemory
from expert_merging.running.options import SampleOptions
from expert_merging.running.samples import Samples, check_samples
from expert_merging.running.sharding import decoder_layers, load_on
from expert_merging.running.targets import Asked
from expert_merging.running.tensor_files import write_tensors
from expert_merging.statistics.gram import GramSum
from expert_merging.statistics.inputs import InputWatch, matrices, place_of
from expert_merging.writing import check_free_disk

logger = logging.getLogger(__name__)


def layer_matrices(context: Context) -> list[str]:
    """Names of the merged matrices of the language model's layers."""
    return [name for name in matrices(context) if is_in_decoder(name)]


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
        InputError: there are none, one computes NaN, or what comes out of a layer is not what goes into the next.
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
        if not bool(torch.isfinite(last[0]).all()):
            number = len(given) - 1
            raise InputError(f"the merged model computes NaN or infinite values in layer {number}; merge with less")

    hooks = [layer.register_forward_pre_hook(before, with_kwargs=True) for layer in layers]
    hooks += [layer.register_forward_hook(after) for layer in layers]
    try:
        model.base_model(**asked.inputs, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return Stream(asked, first[0], given)


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
