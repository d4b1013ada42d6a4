"""What is trained: numbers that a merge function takes beside the task vectors, and gradients for them.

A parametrisation is a merge function whose extra input has a gradient. Whoever adds one says how its numbers make a
merged task vector out of a block of the experts' directions; autograd does the rest, block by block. What is used most
has a fast pair of its own, which the tests hold to that default.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from expert_merging.learned.axes import AXES, RUNS, Axis
from expert_merging.parts import Part


class Parametrisation(torch.nn.Module):
    """Trainable numbers, and how they merge.

    Attributes:
        raw: all trainable numbers as one vector, which makes the optimizer's step one operation; AdamW works entry by
            entry and the gradient is clipped over all numbers together, so the result is that of a vector per tensor.
        places: where in the vector a tensor's numbers are, by tensor name.
        constants: values of the tensors that are not trained, by tensor name.
    """

    raw: torch.nn.Parameter
    places: dict[str, slice]
    constants: dict[str, Tensor]

    def forward(self) -> Tensor:
        """Values of all trainable numbers, laid out like `raw`."""
        raise NotImplementedError

    def view(self, vector: Tensor, name: str) -> Tensor:
        """The part of a vector laid out like `raw` that belongs to a tensor, in the shape that `merge` takes."""
        return vector[self.places[name]]

    def merge(self, values: Tensor, directions: Tensor, part: Part) -> Tensor:
        """Merge a block, by operations that autograd can follow back to the values.

        Args:
            values: the tensor's numbers, as `view` gives them.
            directions: ``(experts, entries)``, task vectors or what stands for them.
            part: which entries of which tensor they are.

        Returns:
            The merged task vector, ``(entries,)``.
        """
        raise NotImplementedError

    def add_merged(self, total: Tensor, values: Tensor, directions: Tensor, part: Part) -> None:
        """Add the merged task vector of a block to ``total``, its base weights ``(entries,)``."""
        total.add_(self.merge(values, directions, part))

    def add_gradient(self, total: Tensor, values: Tensor, directions: Tensor, part: Part, gradient: Tensor) -> None:
        """Add the gradient with respect to the values to ``total``, of their shape.

        Args:
            total: added to.
            values: the values that the weights were made with.
            directions: ``(experts, entries)``.
            part: which entries of which tensor they are.
            gradient: ``(entries,)``, the loss's gradient with respect to the merged weights.
        """
        with torch.enable_grad():
            leaf = values.detach().requires_grad_(True)
            (found,) = torch.autograd.grad(self.merge(leaf, directions, part), leaf, gradient)
        total.add_(found)


@dataclass(frozen=True)
class Layout:
    """Which coefficients there are and where they start.

    Args:
        chunks: number of chunks by tensor name, each with a coefficient for every expert; 0 for a tensor that keeps its
            first values.
        initial: initial value per expert.
        first: ``(experts,)`` first values by tensor name where they are not the initial ones.
        shared: one coefficient per expert for all tensors together.
        bounded: coefficients stay in (0, 1), as a sigmoid's values; others are free.
        signed: bounded ones stay in (-1, 1), as those of the hyperbolic tangent.
        axes: along what the coefficients of a tensor are, by tensor name, where they are not those of chunks.
    """

    chunks: Mapping[str, int]
    initial: Sequence[float]
    first: Mapping[str, Tensor] | None = None
    shared: bool = False
    bounded: bool = True
    signed: bool = False
    axes: Mapping[str, str] = field(default_factory=dict)

    @property
    def trained(self) -> int:
        """Number of coefficients that are learned."""
        return len(self.initial) * (1 if self.shared else sum(self.chunks.values()))

    def vector(self, device: torch.device | str) -> CoefficientVector:
        """The coefficients as training begins."""
        return CoefficientVector(self, device)

    def of_whole_tensors(self) -> Layout:
        """One coefficient for each tensor, which gives the same merge as training begins."""
        return replace(self, chunks=dict.fromkeys(self.chunks, 1), axes={})


class CoefficientVector(Parametrisation):
    """A coefficient per expert and chunk of each tensor, kept in float32.

    ``value = sigmoid(raw)`` where they are bounded (as published), ``tanh(raw)`` if signed too, else ``value = raw``.

    Attributes:
        derived: coefficients are made of the values; else they are the values.

    Args:
        layout: the coefficients.
        device: where they are, from the beginning: another device's sigmoid may round differently.
    """

    derived = False

    def __init__(self, layout: Layout, device: torch.device | str = "cpu") -> None:
        super().__init__()
        self.experts = len(layout.initial)
        self.bounded, self.signed = layout.bounded, layout.signed
        self.axes: dict[str, Axis] = {name: AXES[axis] for name, axis in layout.axes.items()}
        usual = torch.tensor(layout.initial, device=device)
        chunks = layout.chunks
        first = {name: (usual if layout.first is None else layout.first[name].to(device))[:, None] for name in chunks}
        self.constants = {name: first[name] for name, count in chunks.items() if count == 0}
        self.places = {}
        rows, anchors, position = [], [], 0
        for name, count in chunks.items():
            if count == 0:
                continue
            if not layout.shared or position == 0:
                rows.append(first[name].expand(-1, count).reshape(-1))
                anchors.append(usual[:, None].expand(-1, count).reshape(-1))
                position += count * self.experts
            self.places[name] = slice(position - count * self.experts, position)
        self.raw = torch.nn.Parameter(self._raw(torch.cat(rows)))
        # Not the given values but what rounding leaves of them: so the distance of initial values is exactly 0, and the
        # sign of a rounding error cannot steer the first update, whose step size Adam takes from signs alone.
        self.anchor: Tensor
        self.register_buffer("anchor", self._value(self._raw(torch.cat(anchors))))

    def _raw(self, value: Tensor) -> Tensor:
        if not self.bounded:
            return value
        return torch.atanh(value) if self.signed else torch.logit(value)

    def _value(self, raw: Tensor) -> Tensor:
        if not self.bounded:
            return raw
        return torch.tanh(raw) if self.signed else torch.sigmoid(raw)

    def draw(self, seed: str | None) -> None:
        """Draw what an update is to be random in, from a seed; without one, nothing is random any more."""

    @property
    def fixed(self) -> tuple[str, ...]:
        """Tensors whose coefficients are not trained."""
        return tuple(self.constants)

    def forward(self) -> Tensor:
        """Values of all trainable coefficients, ``(coefficients,)``."""
        return self._value(self.raw)

    def view(self, vector: Tensor, name: str) -> Tensor:
        """The part of a vector laid out like `raw` that belongs to a tensor, ``(experts, chunks)``."""
        return vector[self.places[name]].view(self.experts, -1)

    def merge(self, values: Tensor, directions: Tensor, part: Part) -> Tensor:
        """Sum of the experts' directions, each entry times its coefficient; see `Parametrisation.merge`."""
        return self._axis(part).merge(self.coefficients(values, part.name), directions, part)

    def add_merged(self, total: Tensor, values: Tensor, directions: Tensor, part: Part) -> None:
        """The same as by `merge`, faster; see `Parametrisation.add_merged`."""
        self._axis(part).add_applied(total, self.coefficients(values, part.name), directions, part)

    def add_gradient(self, total: Tensor, values: Tensor, directions: Tensor, part: Part, gradient: Tensor) -> None:
        """The same as by autograd, faster; see `Parametrisation.add_gradient`."""
        if not self.derived:  # the merged weights are linear in the values
            self._axis(part).add_inner_products(total, gradient, directions, part)
            return
        with torch.enable_grad():
            leaf = values.detach().requires_grad_(True)
            coefficients = self.coefficients(leaf, part.name)
        found = torch.zeros_like(coefficients)
        self._axis(part).add_inner_products(found, gradient, directions, part)
        total.add_(torch.autograd.grad(coefficients, leaf, found)[0])

    def _axis(self, part: Part) -> Axis:
        return self.axes.get(part.name, RUNS)

    def coefficients(self, values: Tensor, name: str) -> Tensor:
        """A tensor's coefficients ``(experts, count)``, of its values as `view` gives them; see ``derived``."""
        del name
        return values

    @torch.no_grad()
    def by_name(self) -> dict[str, Tensor]:
        """Current values of every tensor, the fixed ones included, ``(experts, chunks)`` each."""
        values = self()
        trained = {name: self.coefficients(self.view(values, name), name).clone() for name in self.places}
        return trained | {name: value.clone() for name, value in self.constants.items()}

    @torch.no_grad()
    def by_expert(self) -> Tensor:
        """Current values of all trainable coefficients, ``(experts, coefficients per expert)``."""
        values = self()
        return torch.cat([self.coefficients(self.view(values, name), name) for name in self.places], dim=1)
