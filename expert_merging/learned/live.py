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
from typing import Any, NamedTuple

import torch
from torch import Tensor

from expert_merging.errors import InputError, first_line
from expert_merging.learned.parametrisations import Parametrisation
from expert_merging.learned.task_vectors import TaskVectors
from expert_merging.parts import Part
from expert_merging.running.sharding import beside_the_model, own_entries, own_part
from expert_merging.stored import Run, stored_tensors


class Held(NamedTuple):
    """What a parameter holds of a merged tensor in this process.

    Args:
        part: which of the tensor's entries.
        start: where in what this process has of the flattened parameter they begin.
    """

    part: Part
    start: int


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
        stored = stored_tensors(model, file_name)
        places, constants = parametrisation.places, parametrisation.constants
        missing = [name for name in (*places, *constants) if file_name(name) not in stored]
        if missing:
            raise InputError(f"{missing[0]} is in the checkpoint but is no parameter of the loaded model; exclude it")
        # What of merged tensors each parameter holds here: one, some rows of one, or several that are fused in memory.
        self.parts = self._own_parts({name: stored[file_name(name)] for name in places})
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
        fixed = self._own_parts({name: stored[file_name(name)] for name in constants})
        task_vectors.hold(held.part for parts in (self.parts, fixed) for own in parts.values() for held in own)
        self._write(fixed, constants)

    def _own_parts(self, tensors: Mapping[str, Sequence[Run]]) -> dict[Any, list[Held]]:
        """What each parameter holds here of tensors, by the runs of parameters that make them up."""
        parameters, found = dict(self.model.named_parameters()), dict[Any, list[Held]]()
        for name, runs in tensors.items():
            whole, before = self.task_vectors.plan.part(name), 0
            for run in runs:
                parameter = parameters[run.parameter]
                start, stop = own_entries(parameter)
                first = min(max(run.start, start), run.stop)
                last = max(min(run.stop, stop), first)
                offset = before - run.start
                found.setdefault(parameter, []).append(
                    Held(whole.between(offset + first, offset + last), max(0, first - start))
                )
                before += run.stop - run.start
        return found

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
            raise InputError(f"--gradient_checkpointing: {first_line(error)}") from None
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
                self._use(self._by_part(parameter, gradient))
            elif parameter in self._sums:
                self._sums[parameter].add_(gradient)
            else:
                self._sums[parameter] = gradient.float()

    def _by_part(self, parameter: Any, entries: Tensor) -> dict[Part, Tensor]:
        """What a parameter holds, each with its own of these entries of the same places, flattened."""
        flat = entries.reshape(-1)
        return {held.part: flat[held.start : held.start + held.part.entries] for held in self.parts[parameter]}

    def _use(self, gradients: Mapping[Part, Tensor]) -> None:
        """Pull a parameter's gradient back at once, while the task vectors of the next one are fetched.

        Every backward pass comes by the parts in the same order, so the next one is known from the pass before.
        """
        first, *_, last = (*gradients, *gradients)
        if self._previous is not None:
            self._next[self._previous] = first
        self._previous = last
        self._pull_back(gradients, self._next.get(last))

    @torch.no_grad()
    def finish(self) -> None:
        """Pull the weight gradients that were added up back, and free them."""
        sums = (self._by_part(parameter, gradient) for parameter, gradient in self._sums.items())
        self._pull_back({part: gradient for found in sums for part, gradient in found.items()})
        self._sums.clear()

    def _pull_back(self, gradients: Mapping[Part, Tensor], then: Part | None = None) -> None:
        """Add what weight gradients mean for the numbers that the weights were merged with."""
        view = self.parametrisation.view
        for own, part, _, task_vectors in self.task_vectors.blocks(list(gradients), then):
            weight_gradient = gradients[own][part.start - own.start : part.stop - own.start].float()
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
    def _write(self, parts: Mapping[Any, Sequence[Held]], values: Mapping[str, Tensor]) -> None:
        owners = {
            held.part: own_part(parameter.detach()).view(-1)[held.start : held.start + held.part.entries]
            for parameter, own in parts.items()
            for held in own
        }
        for own, part, base, task_vectors in self.task_vectors.blocks(list(owners)):
            self.parametrisation.add_merged(base, values[part.name], task_vectors, part)
            owners[own][part.start - own.start : part.stop - own.start].copy_(base)
