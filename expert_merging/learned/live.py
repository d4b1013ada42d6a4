"""One live copy of the merged model whose gradients flow to the coefficients.

The merged weights are ordinary parameters ``W = base + sum_k a_k T_k`` of an ordinary transformers model. They are
rebuilt in place once per update. In the backward pass, as soon as a parameter's gradient is complete, its inner
products with the task vectors go into the coefficients' gradient and it is freed. That is the exact gradient of
re-merging in every forward pass, at the memory of one model, its task vectors and one parameter's gradient.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from expert_merging.errors import InputError
from expert_merging.learned.coefficients import CoefficientVector, Trimming, add_inner_products, apply
from expert_merging.plan import Plan
from expert_merging.streaming import read_task_vectors

logger = logging.getLogger(__name__)


class TaskVectors:
    """Base weights and task vectors as float32 on the training device.

    Tensors are kept there in the checkpoint's own type, which is exact and takes no more room than the files, one by
    one while half of the free memory lasts. The others are read from the files whenever they are needed, and nothing of
    them stays.

    Attributes:
        magnitudes: mean absolute entry of every task vector, per expert by tensor name.

    Args:
        plan: the checkpoints.
        scale: factor on each expert's task vectors.
        device: training device.
        processes: processes that share the machine's memory.
        trimming: what is done to the task vectors first.

    Raises:
        InputError: a checkpoint has NaN or infinite values.
    """

    def __init__(
        self,
        plan: Plan,
        scale: Sequence[float],
        device: torch.device,
        processes: int = 1,
        trimming: Trimming | None = None,
    ) -> None:
        self.plan = plan
        self.scale = scale
        self.trimming = trimming
        self.magnitudes: dict[str, tuple[float, ...]] = {}
        self.device = device
        self.kept: dict[str, list[Tensor]] = {}
        room = _free_memory(device) / (2 * (1 if device.type == "cuda" else processes))
        for name in plan.merged:
            elements = plan.base.entries[name].elements
            # Refuses what is not finite.
            task_vectors = self._trimmed(read_task_vectors(plan, name, 0, elements, torch.device("cpu"))[1])
            sums = task_vectors.abs_().sum(1, dtype=torch.float64)
            self.magnitudes[name] = tuple((sums / max(1, elements)).tolist())
            room -= sum(checkpoint.entries[name].size for checkpoint in (plan.base, *plan.experts.values()))
            if room > 0:
                self.kept[name] = self._read(name)
        logger.info("task vectors: %d of %d tensors are kept on %s", len(self.kept), len(plan.merged), device)

    def _read(self, name: str) -> list[Tensor]:
        """The base's and the experts' entries as they are in the files."""
        return [checkpoint.read(name).to(self.device) for checkpoint in (self.plan.base, *self.plan.experts.values())]

    def __getitem__(self, name: str) -> tuple[Tensor, Tensor]:
        """Flattened base weights ``(elements,)`` and task vectors ``(experts, elements)``."""
        stored_base, *stored_experts = self.kept[name] if name in self.kept else self._read(name)
        base = stored_base.float()
        task_vectors = torch.empty(len(self.scale), base.numel(), device=self.device)
        for row, expert in zip(task_vectors, stored_experts, strict=True):
            row.copy_(expert).sub_(base)
        task_vectors = self._trimmed(task_vectors)
        for row, scale in zip(task_vectors, self.scale, strict=True):
            if scale != 1:
                row.mul_(scale)
        return base, task_vectors

    def _trimmed(self, task_vectors: Tensor) -> Tensor:
        return task_vectors if self.trimming is None else self.trimming(task_vectors)


def _free_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2


class LiveModel:
    """The merged model with gradients that flow to coefficients instead of weights.

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
        pieces: dict[str, list[Any]] = {}
        for name, parameter in model.named_parameters():
            pieces.setdefault(file_name(name), []).append(parameter)
        missing = [name for name in (*vector.places, *vector.fixed) if file_name(name) not in pieces]
        if missing:
            raise InputError(f"{missing[0]} is in the checkpoint but is no parameter of the loaded model; exclude it")
        # The parameters that make up each merged tensor: itself, or the rows that it is cut into in memory.
        self.pieces = {name: pieces[file_name(name)] for name in (*vector.places, *vector.fixed)}
        self.hooks = []
        for name in vector.places:
            start = 0
            for parameter in self.pieces[name]:
                parameter.requires_grad_(True)
                self.hooks.append(parameter.register_post_accumulate_grad_hook(self._collector(name, start)))
                start += parameter.numel()
        for name in vector.fixed:
            self._set(name, vector.constants[name])

    def close(self) -> None:
        """Let go of the model; the hooks hold it in a circle that Python cannot see."""
        while self.hooks:
            self.hooks.pop().remove()

    def _collector(self, name: str, start: int) -> Callable[[Tensor], None]:
        """What takes the gradient of the parameter that holds the merged tensor's entries from ``start``."""

        def collect(parameter: Tensor) -> None:
            """Turn dL/dW into the coefficients' gradient and free it.

            Runs once per backward pass also where a weight is used twice: autograd adds up its uses first. Where it
            does not (reentrant gradient checkpointing), each call brings one share and the shares are added here.
            """
            if parameter.grad is not None:
                weight_gradient = parameter.grad.reshape(-1).float()
                parameter.grad = None
                task_vectors = self.task_vectors[name][1]
                add_inner_products(self.vector.view(self.gradient, name), weight_gradient, task_vectors, start)

        return collect

    @torch.no_grad()
    def rebuild(self) -> None:
        """Write the merged weights of the current coefficients into the model and forget the collected gradient."""
        values = self.vector()
        for name in self.vector.places:
            self._set(name, self.vector.view(values, name))
        self.gradient.zero_()

    @torch.no_grad()
    def _set(self, name: str, values: Tensor) -> None:
        base, task_vectors = self.task_vectors[name]
        merged = apply(values, task_vectors, 0, base.numel()).add_(base)
        pieces = self.pieces[name]
        for parameter, entries in zip(pieces, torch.split(merged, [piece.numel() for piece in pieces]), strict=True):
            parameter.copy_(entries.view_as(parameter))
