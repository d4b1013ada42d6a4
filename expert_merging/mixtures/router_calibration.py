"""HARC's arithmetic: each router of a merged mixture is solved for, so that it sends tokens where the experts' do."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from expert_merging.context import Context
from expert_merging.plan import Rule
from expert_merging.running.in_memory import InMemory
from expert_merging.statistics.layer_by_layer import Checked, Stream, change_layers, live_merge
from expert_merging.streaming import Reader

# Of the residual, relative; the authors have 1e-6, with which what a router was before still shows.
_TOLERANCE = 1e-9


@dataclass(frozen=True)
class Curvature:
    """How much the routing of one expert's tokens changes with the router, to second order.

    Args:
        inputs: ``(tokens, hidden size)`` float64.
        probabilities: ``(tokens, experts of a layer)``, the expert's own routing of them.
        damping: factor on what is beside the diagonal.
    """

    inputs: Tensor
    probabilities: Tensor
    damping: float

    @classmethod
    def of(cls, inputs: Tensor, router: Tensor, damping: float) -> Curvature:
        """That of an expert's router ``(experts of a layer, hidden size)`` on these inputs, in float64."""
        inputs, router = inputs.double(), router.double()
        return cls(inputs, (inputs @ router.T).softmax(dim=1), damping)

    def product(self, router: Tensor) -> Tensor:
        """The curvature times a router, ``(experts of a layer, hidden size)``; a mean over the tokens."""
        share, logits = self.probabilities, self.inputs @ router.T
        moved = share * (logits - (share * logits).sum(1, keepdim=True))
        both = self.damping * (moved.T @ self.inputs) + (1 - self.damping) * self._diagonal() * router
        return both / len(self.inputs)

    def _diagonal(self) -> Tensor:
        return (self.probabilities * (1 - self.probabilities)).T @ self.inputs.square()


def solve(curvatures: Sequence[Curvature], routers: Sequence[Tensor], start: Tensor, iterations: int) -> Tensor:
    """The router that is nearest to the experts' in routing, by conjugate gradients in float64.

    Args:
        curvatures: of the experts that have samples.
        routers: their routers, ``(experts of a layer, hidden size)``.
        start: where it begins; directions without curvature keep it.
        iterations: at most so many steps.
    """

    def product(router: Tensor) -> Tensor:
        return torch.stack([one.product(router) for one in curvatures]).sum(0)

    wanted = sum(one.product(router.double()) for one, router in zip(curvatures, routers, strict=True))
    found = start.double()
    residual = wanted - product(found)
    direction, size = residual, residual.square().sum()
    enough = _TOLERANCE * torch.as_tensor(wanted).norm()
    for _ in range(iterations):
        if size.sqrt() <= enough:
            break
        image = product(direction)
        curved = (direction * image).sum()
        if curved <= 0:  # by rounding: what is left has no curvature
            break
        found = found + size / curved * direction
        residual = residual - size / curved * image
        before, size = size, residual.square().sum()
        direction = residual + size / before * direction
    return found


@torch.no_grad()
def calibrate_routers(
    context: Context, checked: Checked, damping: float, iterations: int, rule: Rule, unit: str
) -> None:
    """Make the routers of a merged mixture anew; those of an earlier part of the run are taken.

    Args:
        context: the run.
        checked: samples, routers and folder.
        damping: see `Curvature`.
        iterations: see `solve`.
        rule: merges task vectors.
        unit: what the rule is fed.

    Raises:
        InputError: an expert answers with nothing, the merged model computes NaN, or it is no stack of layers.
    """
    memory = live_merge(context, checked.samples, rule, unit)
    read = partial(memory.read, rule=rule, unit=unit)
    change_layers(context, checked, memory, _Calibration(context, checked, memory, read, damping, iterations).change)


@dataclass(frozen=True)
class _Calibration:
    """What makes a layer's router anew.

    Args:
        context: the run.
        checked: samples, routers and folder.
        memory: the merged model.
        read: the entries of a tensor as it was merged.
        damping: see `Curvature`.
        iterations: see `solve`.
    """

    context: Context
    checked: Checked
    memory: InMemory
    read: Callable[[str], Tensor]
    damping: float
    iterations: int

    def change(self, layer: torch.nn.Module, number: int, streams: Sequence[Stream]) -> dict[str, Tensor]:
        """See `expert_merging.statistics.layer_by_layer.Change`."""
        modules = {module: name for name, module in self.memory.model.named_modules()}
        inside = {modules[module] for module in layer.modules()}
        plan, places = self.context.plan, {name: self.memory.runs[name][0].parameter for name in self.checked.matrices}
        changed = {}
        for name, parameter in places.items():
            place = parameter.rpartition(".")[0]
            if place in inside:
                seen = self._seen(self.memory.model.get_submodule(place), layer, number, streams)
                found = self._router(name, seen)
                changed[name] = found.to(plan.base.entries[name].torch_dtype).cpu()
        return changed

    def _seen(
        self, router: torch.nn.Module, layer: torch.nn.Module, number: int, streams: Sequence[Stream]
    ) -> dict[int, Tensor]:
        """What goes into a router, ``(tokens, hidden size)``, by the number of the expert whose samples it is."""
        found: dict[int, list[Tensor]] = {}
        with _inputs_of(router) as inputs:
            for place, expert in enumerate(self.context.plan.experts):
                for stream in streams:
                    if stream.asked.sample.expert == expert:
                        inputs.clear()
                        stream.through(layer, number)
                        vectors = inputs[0].reshape(-1, inputs[0].shape[-1])
                        found.setdefault(place, []).append(vectors[stream.asked.tokens])
        return {place: torch.cat(vectors) for place, vectors in found.items()}

    def _router(self, name: str, seen: dict[int, Tensor]) -> Tensor:
        """The new router, ``(experts of a layer, hidden size)`` float64."""
        plan, shape = self.context.plan, self.context.plan.base.entries[name].shape
        base, task_vectors = Reader(plan, self.memory.device).read(plan.part(name))
        routers = {place: (base + task_vectors[place]).view(shape) for place in seen}
        curvatures = [Curvature.of(inputs, routers[place], self.damping) for place, inputs in seen.items()]
        return solve(curvatures, [*routers.values()], self.read(name).view(shape), self.iterations)


@contextmanager
def _inputs_of(router: torch.nn.Module) -> Iterator[list[Tensor]]:
    """What a router is given, while the block lasts."""
    inputs: list[Tensor] = []

    def see(_router: Any, positional: tuple[Any, ...]) -> None:
        inputs.append(positional[0])

    hook = router.register_forward_pre_hook(see)
    try:
        yield inputs
    finally:
        hook.remove()
