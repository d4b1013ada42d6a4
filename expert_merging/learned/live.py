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
from expert_merging.learned.coefficients import CoefficientVector, apply, inner_products
from expert_merging.learned.losses import hidden_alignment, logit_alignment
from expert_merging.learned.targets import Target, hidden_states
from expert_merging.plan import Plan

logger = logging.getLogger(__name__)

_SLICE_TOKENS = 512


class TaskVectors:
    """Base weights and task vectors as float32 on the training device.

    They are kept there when they fit in a third of the free memory; otherwise each tensor is read from the checkpoint
    files whenever it is needed, and nothing stays.

    Args:
        plan: the checkpoints.
        scale: factor on each expert's task vectors.
        device: training device.
    """

    def __init__(self, plan: Plan, scale: Sequence[float], device: torch.device) -> None:
        self.plan = plan
        self.scale = scale
        self.device = device
        self.kept: dict[str, tuple[Tensor, Tensor]] = {}
        needed = 4 * plan.merged_elements * (1 + len(plan.experts))
        self.keep = needed < _free_memory(device) / 3
        where = f"kept on {device}" if self.keep else "read from the checkpoint files when needed"
        logger.info("task vectors (%.2f GB in float32) are %s", needed / 1e9, where)

    def __getitem__(self, name: str) -> tuple[Tensor, Tensor]:
        """Flattened base weights ``(elements,)`` and task vectors ``(experts, elements)``."""
        if name in self.kept:
            return self.kept[name]
        base = self.plan.base.read(name).to(self.device).float()
        task_vectors = torch.empty(len(self.scale), base.numel(), device=self.device)
        for row, expert, scale in zip(task_vectors, self.plan.experts.values(), self.scale, strict=True):
            torch.sub(expert.read(name).to(self.device), base, out=row)
            if scale != 1:
                row.mul_(scale)
        if self.keep:
            self.kept[name] = base, task_vectors
        return base, task_vectors


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
        parameters = {file_name(name): parameter for name, parameter in model.named_parameters()}
        missing = [name for name in (*vector.places, *vector.fixed) if name not in parameters]
        if missing:
            raise InputError(f"{missing[0]} is in the checkpoint but is no parameter of the loaded model; exclude it")
        self.parameters = {name: parameters[name] for name in vector.places}
        for name, parameter in self.parameters.items():
            parameter.requires_grad_(True)
            parameter.register_post_accumulate_grad_hook(self._collector(name))
        for name in vector.fixed:
            self._set(parameters[name], name, vector.initial.to(vector.raw.device)[:, None])

    def _collector(self, name: str) -> Callable[[Tensor], None]:
        chunks = self.vector.view(self.gradient, name).shape[1]

        def collect(parameter: Tensor) -> None:
            """Turn dL/dW into the coefficients' gradient and free it.

            Runs once per backward pass also where a weight is used twice: autograd adds up its uses first. Where it
            does not (reentrant gradient checkpointing), each call brings one share and the shares are added here.
            """
            if parameter.grad is not None:
                weight_gradient = parameter.grad.reshape(-1).float()
                parameter.grad = None
                products = inner_products(weight_gradient, self.task_vectors[name][1], chunks)
                self.vector.view(self.gradient, name).add_(products)

        return collect

    @torch.no_grad()
    def rebuild(self) -> None:
        """Write the merged weights of the current coefficients into the model and forget the collected gradient."""
        values = self.vector()
        for name, parameter in self.parameters.items():
            self._set(parameter, name, self.vector.view(values, name))
        self.gradient.zero_()

    @torch.no_grad()
    def _set(self, parameter: Tensor, name: str, values: Tensor) -> None:
        base, task_vectors = self.task_vectors[name]
        merged = apply(values, task_vectors, 0, base.numel()).add_(base)
        parameter.copy_(merged.view_as(parameter))


def alignment_losses(
    live: LiveModel, target: Target, layers: Sequence[int], temperature: float
) -> tuple[Tensor, Tensor]:
    """Logit and hidden-state alignment of the live model with one sample's expert, both scalars in float32."""
    hidden = hidden_states(live.model, target.inputs)
    own_head = live.model.get_output_embeddings()
    logits = logit_alignment(
        target.last_hidden,
        hidden[-1][0, target.tokens],
        target.head or own_head,
        own_head,
        temperature=temperature,
        slice_tokens=_SLICE_TOKENS,
    )
    if not layers:
        return logits, torch.zeros_like(logits)
    return logits, hidden_alignment(target.layers, [hidden[layer][0, target.tokens] for layer in layers])
