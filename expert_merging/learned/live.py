"""One live copy of the merged model whose gradients flow to the coefficients.

The merged weights are ordinary parameters ``W = base + sum_k a_k T_k`` of an ordinary transformers model. They are
rebuilt in place once per update. In the backward pass, as soon as a parameter's gradient is complete, its inner
products with the task vectors go into the coefficients' gradient and it is freed; or, where there is memory for it, the
gradients of an update's samples are added up first and the task vectors gone through once. Either is the exact gradient
of re-merging in every forward pass, at the memory of one model, its task vectors and one or all parameters' gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from expert_merging.errors import InputError
from expert_merging.learned.coefficients import CoefficientVector, add_applied, add_inner_products
from expert_merging.learned.task_vectors import TaskVectors
from expert_merging.parts import Part
from expert_merging.running.sharding import beside_the_model, own_entries, own_part


class LiveModel:
    """The merged model with gradients that flow to coefficients instead of weights.

    Attributes:
        gradient: gradient with respect to the values of the coefficients, laid out like them.
        accumulates: weight gradients are added up until `finish`, instead of being used and freed as they come.

    Args:
        model: the base model; its merged parameters will be overwritten.
        task_vectors: base weights and task vectors.
        vector: the coefficients.
        file_name: name in a checkpoint file of a parameter's name in memory.

    Raises:
        InputError: a merged tensor is not a parameter of the loaded model.
    """

    def __init__(
        self, model: Any, task_vectors: TaskVectors, vector: CoefficientVector, file_name: Callable[[str], str]
    ) -> None:
        self.model = model.eval().requires_grad_(False)
        self.task_vectors = task_vectors
        self.vector = vector
        self.gradient = torch.zeros_like(vector.raw)
        self.accumulates = False
        pieces: dict[str, list[Any]] = {}
        for name, parameter in model.named_parameters():
            pieces.setdefault(file_name(name), []).append(parameter)
        missing = [name for name in (*vector.places, *vector.fixed) if file_name(name) not in pieces]
        if missing:
            raise InputError(f"{missing[0]} is in the checkpoint but is no parameter of the loaded model; exclude it")
        # The entries of a merged tensor that each parameter holds here: all, or the rows that it is cut into in memory.
        self.parts = {
            parameter: part
            for name in vector.places
            for parameter, part in self._own_parts(name, pieces[file_name(name)])
        }
        self._ignores = False
        self._sums: dict[Any, Tensor] = {}
        self._following: dict[Part, Part] = {}
        self._last: Part | None = None
        self.hooks = []
        for parameter in self.parts:
            parameter.requires_grad_(True)
            self.hooks.append(parameter.register_post_accumulate_grad_hook(self._receive))
        fixed = dict(entry for name in vector.fixed for entry in self._own_parts(name, pieces[file_name(name)]))
        task_vectors.hold([*self.parts.values(), *fixed.values()])
        self._write(fixed, vector.constants)

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
        """Add a weight gradient's inner products, and have the task vectors fetched that came next the last time."""
        if self._last is not None:
            self._following[self._last] = part
        self._last = part
        self._add_inner_products({part: gradient}, self._following.get(part))

    @torch.no_grad()
    def finish(self) -> None:
        """Turn the weight gradients that were added up into the coefficients' gradient, and free them."""
        self._add_inner_products({self.parts[parameter]: gradient for parameter, gradient in self._sums.items()})
        self._sums.clear()

    def _add_inner_products(self, gradients: Mapping[Part, Tensor], after: Part | None = None) -> None:
        for own, part, _, task_vectors in self.task_vectors.blocks(list(gradients), after):
            weight_gradient = gradients[own].reshape(-1)[part.start - own.start : part.stop - own.start].float()
            total = self.vector.view(self.gradient, part.name)
            add_inner_products(total, weight_gradient, task_vectors, part.start, part.elements)

    @torch.no_grad()
    def rebuild(self) -> None:
        """Write the merged weights of the current coefficients into the model and forget the collected gradient."""
        values = self.vector()
        self._write(self.parts, {name: self.vector.view(values, name) for name in self.vector.places})
        self.gradient.zero_()
        self._sums.clear()

    @torch.no_grad()
    def _write(self, parts: Mapping[Any, Part], values: Mapping[str, Tensor]) -> None:
        owners = {own: own_part(parameter.detach()).view(-1) for parameter, own in parts.items()}
        for own, part, base, task_vectors in self.task_vectors.blocks(list(owners)):
            add_applied(base, values[part.name], task_vectors, part.start, part.elements)
            owners[own][part.start - own.start : part.stop - own.start].copy_(base)
