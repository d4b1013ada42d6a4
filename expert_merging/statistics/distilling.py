"""A merged model's layers, each trained to put out what the experts' do, one after the other from below."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from expert_merging.context import Context
from expert_merging.errors import InputError
from expert_merging.plan import Rule
from expert_merging.running.in_memory import InMemory
from expert_merging.running.sharding import decoder_layers
from expert_merging.running.targets import Asked
from expert_merging.statistics.gram import Gram, Grams, KeptVectors
from expert_merging.statistics.inputs import gather
from expert_merging.statistics.layer_by_layer import Checked, Stream, change_layers, hidden_of, live_merge
from expert_merging.streaming import Reader

# How small the factor on the loss may become with which gradients do not overflow in float16.
_SMALLEST = 2.0**-24


class Training(NamedTuple):
    """How the coefficients of a layer are trained.

    Args:
        fineness: how many an expert has for a matrix: one for each ``entry``, for each ``row``, or one (``layer``).
        epochs: passes over all samples.
        rate: Adam's learning rate.
        group: samples in an update.
        seed: decides the order of the samples.
    """

    fineness: str
    epochs: int
    rate: float
    group: int
    seed: int

    def shape(self, matrix: Sequence[int]) -> tuple[int, ...]:
        """Shape of an expert's coefficients, which broadcasts to that of the matrix."""
        rows, columns = matrix
        return {"entry": (rows, columns), "row": (rows, 1), "layer": (1, 1)}[self.fineness]


def distil_layers(context: Context, checked: Checked, training: Training, rule: Rule, unit: str) -> None:
    """Train a merged model's layers from below, and keep their weights; what an earlier part of the run has is taken.

    Args:
        context: the run.
        checked: samples, matrices and folder.
        training: how.
        rule: merges task vectors.
        unit: what the rule is fed.

    Raises:
        InputError: an expert answers with nothing or computes NaN, the model is no stack of layers, or the losses
            become NaN.
    """

    def find(_expert: str, model: Any, own: Iterator[Asked]) -> dict[tuple[str, ...], Gram]:
        return _outputs(model, own)

    folder = checked.folder / "outputs"
    opened = {expert: context.plan.only([expert]).opened for expert in context.plan.experts}
    wanted = gather(context, checked.samples, opened.__getitem__, find, what="outputs", folder=folder)
    memory = live_merge(context, checked.samples, rule, unit)
    read = partial(memory.read, rule=rule, unit=unit)
    distilling = _Distilling(context, checked.matrices, memory, read, wanted, training)
    change_layers(context, checked, memory, distilling.change)


def _outputs(model: Any, asked: Iterator[Asked]) -> dict[tuple[str, ...], Gram]:
    """What comes out of each of a model's layers at all tokens of the samples."""
    layers = decoder_layers(model)[1]
    sums = [KeptVectors() for _ in layers]
    made: list[Tensor] = []
    hooks = [layer.register_forward_hook(lambda *given: made.append(hidden_of(given[-1]))) for layer in layers]
    try:
        for one in asked:
            model.base_model(**one.inputs, use_cache=False)
            for total, hidden in zip(sums, made, strict=True):
                total.add(hidden[0].clone())
            made.clear()
    finally:
        for hook in hooks:
            hook.remove()
    return {(_name(number),): total.finish() for number, total in enumerate(sums)}


def _name(layer: int) -> str:
    """By which a layer's outputs are kept."""
    return f"layer {layer}"


@dataclass(frozen=True)
class _Distilling:
    """What trains a layer.

    Args:
        context: the run.
        names: the matrices that are trained.
        memory: the model that is merged.
        read: the entries of a tensor as it was merged.
        wanted: what comes out of the experts' layers.
        training: how.
    """

    context: Context
    names: Sequence[str]
    memory: InMemory
    read: Callable[[str], Tensor]
    wanted: Grams
    training: Training

    def change(self, layer: torch.nn.Module, number: int, streams: Sequence[Stream]) -> dict[str, Tensor]:
        """See `expert_merging.statistics.layer_by_layer.Change`."""
        own, named = set(layer.parameters()), dict(self.memory.model.named_parameters())
        names = [name for name in self.names if all(named[run.parameter] in own for run in self.memory.runs[name])]
        if not names:
            return {}
        matrices = {name: _Matrix(self.context, self.memory, name, self.read(name), self.training) for name in names}
        with torch.enable_grad():
            self._train(matrices, layer, number, self._lessons(streams, number))
        return {name: matrix.merged().cpu() for name, matrix in matrices.items()}

    def _lessons(self, streams: Sequence[Stream], number: int) -> list[_Lesson]:
        """Every sample with what is to come out; all experts count the same, whatever the number of their tokens.

        Squares are added up, as the authors do, and not averaged over tokens and units: then most gradients would be
        below what Adam adds to their size (1e-8), and below what float16 holds.
        """
        left = {
            expert: gram.values.to(self.memory.device).float()
            for expert, gram in zip(self.context.plan.experts, self.wanted.of(_name(number)), strict=True)
            if gram is not None
        }
        sizes = {expert: wanted.numel() for expert, wanted in left.items()}
        mean = sum(sizes.values()) / len(sizes)
        lessons = []
        for stream in streams:
            expert, count = stream.asked.sample.expert, stream.hidden.shape[1]
            lessons.append(_Lesson(stream, left[expert][:count], mean / sizes[expert]))
            left[expert] = left[expert][count:]
        return lessons

    def _train(
        self, matrices: Mapping[str, _Matrix], layer: torch.nn.Module, number: int, lessons: Sequence[_Lesson]
    ) -> None:
        training, scale = self.training, 1.0
        weights = [weight for weight in layer.parameters() if any(matrix.is_in(weight) for matrix in matrices.values())]
        # One matrix after the other, since all together would take memory for a further number of each entry.
        optimizer = torch.optim.Adam(
            [matrix.coefficients for matrix in matrices.values()], lr=training.rate, foreach=False
        )
        order = torch.Generator().manual_seed(training.seed)
        try:
            for weight in weights:
                weight.requires_grad_(True)
            for _ in range(training.epochs):
                for group in torch.split(torch.randperm(len(lessons), generator=order), training.group):
                    for matrix in matrices.values():
                        matrix.write()
                    own = [lessons[sample] for sample in group.tolist()]
                    while not _add_gradients(layer, number, own, weights, scale):
                        scale /= 2
                        if scale < _SMALLEST:
                            raise _beyond(number, "gradients are infinite", weights)
                    for matrix in matrices.values():
                        matrix.pull_back(scale)
                    optimizer.step()
        finally:
            for weight in weights:
                weight.requires_grad_(False)
                weight.grad = None


def _add_gradients(
    layer: torch.nn.Module, number: int, lessons: Sequence[_Lesson], weights: Sequence[Tensor], scale: float
) -> bool:
    """Let the weights have the gradient of the loss on some samples times a factor; whether it is finite.

    Raises:
        InputError: the loss is not.
    """
    for weight in weights:
        weight.grad = None
    loss = math.fsum(lesson.backward(layer, number, scale) for lesson in lessons)
    if not math.isfinite(loss):
        raise _beyond(number, f"the loss is {loss}", weights)
    return all(weight.grad is None or bool(weight.grad.isfinite().all()) for weight in weights)


def _beyond(number: int, what: str, weights: Sequence[Tensor]) -> InputError:
    """What is told of numbers that are none any more."""
    narrow = any(weight.dtype == torch.float16 for weight in weights)
    hint = "give a smaller --distil_rate" + (", or --mixed_precision bf16 or no" if narrow else "")
    return InputError(f"layer {number}: {what}; {hint}")


class _Lesson(NamedTuple):
    """A sample, and what is to come out of the layer.

    Args:
        stream: what goes in.
        wanted: ``(tokens, hidden)``.
        weight: of a squared difference.
    """

    stream: Stream
    wanted: Tensor
    weight: float

    def backward(self, layer: torch.nn.Module, number: int, scale: float) -> float:
        """Add the gradient, times a factor, to the weights'.

        Returns:
            The weighted squared distance of what comes out from what should.
        """
        made = self.stream.through(layer, number)[0].float()
        loss = self.weight * functional.mse_loss(made, self.wanted, reduction="sum")
        if loss.requires_grad:  # of a mixture, perhaps none of the matrices has been used
            torch.autograd.backward([scale * loss])
        return loss.item()


class _Matrix:
    """A matrix of the layer that is trained, and its coefficients.

    Args:
        context: the run.
        memory: the model that has it.
        name: its name.
        before: its entries as it was merged, ``(entries,)``.
        training: which coefficients there are.
    """

    def __init__(self, context: Context, memory: InMemory, name: str, before: Tensor, training: Training) -> None:
        entry, self.memory, self.part = context.plan.base.entries[name], memory, context.plan.part(name)
        shape, self.dtype = entry.shape, entry.torch_dtype
        _, task_vectors = Reader(context.plan, memory.device).read(self.part)
        self.before, self.task_vectors = before.view(shape), task_vectors.view(-1, *shape)
        size = (len(self.task_vectors), *training.shape(shape))
        self.coefficients = torch.zeros(size, device=memory.device)
        named = dict(memory.model.named_parameters())
        self.pieces = [(named[run.parameter], run) for run in memory.runs[name]]

    def is_in(self, weight: Tensor) -> bool:
        """Whether a parameter holds the matrix or a part of it."""
        return any(parameter is weight for parameter, _ in self.pieces)

    def merged(self) -> Tensor:
        """The merged weights in the base's type, ``(rows, columns)``."""
        total = self.before.clone()
        for coefficients, task_vector in zip(self.coefficients, self.task_vectors, strict=True):
            total.addcmul_(coefficients, task_vector)
        return total.to(self.dtype)

    def write(self) -> None:
        """Put the merged weights into the model."""
        self.memory.write(self.part, self.merged().view(-1))

    def pull_back(self, scale: float) -> None:
        """Turn the weights' gradient times a factor into the coefficients' without.

        A mixture's matrix that no token came by has none.
        """
        pieces = [
            torch.zeros(run.stop - run.start, device=self.before.device)
            if parameter.grad is None
            else parameter.grad.view(-1)[run.start : run.stop].float() / scale
            for parameter, run in self.pieces
        ]
        gradient = torch.cat(pieces).view(self.before.shape)
        self.coefficients.grad = (self.task_vectors * gradient).sum_to_size(self.coefficients.shape)
