"""One live copy of the merged model whose gradients flow to a parametrisation's numbers.

The merged weights are ordinary parameters of an ordinary transformers model. They are rebuilt in place once per update.
In the backward pass, as soon as a parameter's gradient is complete, it is pulled back to the numbers that the parameter
was merged with, and freed; or, where there is memory for it, the gradients of an update's samples are added up first
and the task vectors gone through once. Either is the exact gradient of re-merging in every forward pass, at the memory
of one model, its task vectors and one or all parameters' gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from expert_merging.errors import InputError
from expert_merging.learned.parametrisations import Parametrisation
from expert_merging.learned.task_vectors import TaskVectors
from expert_merging.parts import Part
from expert_merging.running.sharding import beside_the_model, own_entries, own_part


class LiveModel:
    """The merged model with gradients that flow to a parametrisation's numbers instead of weights.

    Attributes:
        gradient: gradient with respect to the values of the numbers, laid out like them.
        accumulates: weight gradients are added up until `finish`, instead of being used and freed as they come.

    Args:
        model: the base model; its merged parameters will be overwritten.
        task_vectors: base weights and task vectors.
        parametrisation: what is trained.
        file_name: name in a checkpoint file of a parameter's name in memory.

    Raises:
        InputError: a merged tensor is not a parameter of the loaded model.
    """

    def __init__(
        self, model: Any, task_vectors: TaskVectors, parametrisation: Parametrisation, file_name: Callable[[str], str]
    ) -> None:
        self.model = model.eval().requires_grad_(False)
        self.task_vectors = task_vectors
        self.parametrisation = parametrisation
        self.gradient = torch.zeros_like(parametrisation.raw)
        self.accumulates = False
        pieces: dict[str, list[Any]] = {}
        for name, parameter in model.named_parameters():
            pieces.setdefault(file_name(name), []).append(parameter)
        places, constants = parametrisation.places, parametrisation.constants
        missing = [name for name in (*places, *constants) if file_name(name) not in pieces]
        if missing:
            raise InputError(f"{missing[0]} is in the checkpoint but is no parameter of the loaded model; exclude it")
        # The entries of a merged tensor that each parameter holds here: all, or the rows that it is cut into in memory.
        self.parts = {
            parameter: part for name in places for parameter, part in self._own_parts(name, pieces[file_name(name)])
        }
        self._ignores = False
        self._sums: dict[Any, Tensor] = {}
        self._values = parametrisation().detach()
        # For each part, the one whose gradient came next in the last backward pass; and the last one that came.
        self._next: dict[Part, Part] = {}
        self._previous: Part | None = None
        self.hooks = []
        for parameter in self.parts:
            parameter.requires_grad_(True)
            self.hooks.append(parameter.register_post_accumulate_grad_hook(self._receive))
        fixed = dict(entry for name in constants for entry in self._own_parts(name, pieces[file_name(name)]))
        task_vectors.hold([*self.parts.values(), *fixed.values()])
        self._write(fixed, constants)

    def _own_parts(self, name: str, pieces: Sequence[Any]) -> Iterator[tuple[Any, Part]]:
        """Each of the parameters that make up a merged tensor, one after the other, with what is here of it."""
        whole, before = self.task_vectors.plan.part(name), 0
        for parameter in pieces:
            start, stop = own_entries(parameter)
            yield parameter, whole.between(before + start, before + stop)
            before += parameter.numel()

    def close(self) -> None:
        """Let go of the model; the hooks hold it in a circle that Python cannot see."""
        while self.hooks:
            self.hooks.pop().remove()
        self._sums.clear()

    def checkpoint_activations(self) -> None:
        """Compute each layer again in the backward pass instead of keeping its activations.

        Raises:
            InputError: the model cannot.
        """
        # Called so since transformers 5.2x.
        enable = (
            getattr(self.model, "activation_checkpointing_enable", None) or self.model.gradient_checkpointing_enable
        )
        try:
            enable({"use_reentrant": False})
        except ValueError as error:
            raise InputError(f"--gradient_checkpointing: {str(error).splitlines()[0]}") from None
        for module in self.model.modules():
            # Layers ask for training mode, which their parts, dropout among them, must not be in.
            module.training = bool(getattr(module, "gradient_checkpointing", False))

    @contextmanager
    def ignoring_gradients(self) -> Iterator[None]:
        """Free weight gradients as they come and do nothing with them."""
        self._ignores = True
        try:
            yield
        finally:
            self._ignores = False

    def _receive(self, parameter: Tensor) -> None:
        """Take dL/dW off a parameter.

        Runs once per backward pass also where a weight is used twice: autograd adds up its uses first. Where it does
        not (reentrant gradient checkpointing), each call brings one share and the shares are added here.
        """
        gradient, parameter.grad = parameter.grad, None
        if gradient is None or self._ignores:
            return
        with beside_the_model(gradient):
            gradient = own_part(gradient)
            if not self.accumulates:
                self._use(self.parts[parameter], gradient)
            elif parameter in self._sums:
                self._sums[parameter].add_(gradient)
            else:
                self._sums[parameter] = gradient.float()

    def _use(self, part: Part, gradient: Tensor) -> None:
        """Pull a weight gradient back at once, while the task vectors of the next one are fetched.

        Every backward pass comes by the parts in the same order, so the next one is known from the pass before.
        """
        if self._previous is not None:
            self._next[self._previous] = part
        self._previous = part
        self._pull_back({part: gradient}, self._next.get(part))

    @torch.no_grad()
    def finish(self) -> None:
        """Pull the weight gradients that were added up back, and free them."""
        self._pull_back({self.parts[parameter]: gradient for parameter, gradient in self._sums.items()})
        self._sums.clear()

    def _pull_back(self, gradients: Mapping[Part, Tensor], then: Part | None = None) -> None:
        """Add what weight gradients mean for the numbers that the weights were merged with."""
        view = self.parametrisation.view
        for own, part, _, task_vectors in self.task_vectors.blocks(list(gradients), then):
            weight_gradient = gradients[own].reshape(-1)[part.start - own.start : part.stop - own.start].float()
            total, values = view(self.gradient, part.name), view(self._values, part.name)
            self.parametrisation.add_gradient(total, values, task_vectors, part, weight_gradient)

    @torch.no_grad()
    def rebuild(self) -> None:
        """Write the merged weights of the current numbers into the model and forget the collected gradient."""
        self._values = self.parametrisation().detach()
        places = self.parametrisation.places
        self._write(self.parts, {name: self.parametrisation.view(self._values, name) for name in places})
        self.gradient.zero_()
        self._sums.clear()

    @torch.no_grad()
    def _write(self, parts: Mapping[Any, Part], values: Mapping[str, Tensor]) -> None:
        owners = {own: own_part(parameter.detach()).view(-1) for parameter, own in parts.items()}
        for own, part, base, task_vectors in self.task_vectors.blocks(list(owners)):
            self.parametrisation.add_merged(base, values[part.name], task_vectors, part)
            owners[own][part.start - own.start : part.stop - own.start].copy_(base)
