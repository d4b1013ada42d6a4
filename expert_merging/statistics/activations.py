"""The mean size of what goes into a base's layers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from expert_merging.context import Context
from expert_merging.errors import InputError
from expert_merging.roles import is_word_table
from expert_merging.running.prompts import place, with_response
from expert_merging.running.samples import Samples
from expert_merging.running.sharding import load_on
from expert_merging.running.tensor_files import write_tensors
from expert_merging.stored import stored_tensors

# Beside experts' statistics, none of which can have the name.
_FILE = "base.safetensors"


def read_activations(context: Context) -> dict[str, Tensor]:
    """Mean sizes of the inputs ``(columns,)`` of each merged tensor, relative to the largest of the tensor's."""
    file = context.run.statistics / _FILE
    return load_file(file) if file.exists() else {}


@torch.no_grad()
def gather_activations(context: Context, samples: Samples) -> None:
    """Run the base on all samples and keep the mean sizes, unless an earlier part of the run has done so.

    Raises:
        InputError: the base computes NaN.
    """
    folder = context.run.statistics
    kept = context.run.kept.within(folder.name, context.plan.only([]).opened)
    if kept.has(folder / _FILE):
        return
    device, prompts = torch.device(context.device), samples.prompts
    assert prompts is not None  # noqa: S101  (checked samples have them)
    model = load_on(device, context.backbone, context.plan.base, samples.dtype, sharded=False)
    watch = _Watch(model, context)
    try:
        with context.progress("running the base", len(samples.samples), "sample") as advance:
            for sample in samples.samples:
                inputs = prompts.take(sample)
                if sample.response is not None:
                    inputs = with_response(inputs, prompts.response_tokens(sample))
                model.base_model(**place(inputs, device, samples.dtype), use_cache=False)
                advance(1)
    finally:
        watch.close()
    folder.mkdir(parents=True, exist_ok=True)
    write_tensors(folder / _FILE, watch.relative_sizes(), kept)


class _Watch:
    """Adds up the sizes of what goes into a model's layers.

    Args:
        model: the base.
        context: the run.
    """

    def __init__(self, model: Any, context: Context) -> None:
        self.sums: dict[str, Tensor] = {}
        layers = {name: layer for name, layer in model.named_modules() if _has_columns(layer)}
        stored = stored_tensors(model, context.backbone.file_name)
        self.tensors: dict[str, list[str]] = {}
        for name in context.plan.merged:
            runs = stored.get(context.backbone.file_name(name), [])
            layer = runs[0].parameter.removesuffix(".weight") if runs and not is_word_table(name) else ""
            columns = context.plan.base.entries[name].shape[-1:]
            if layer in layers and columns == layers[layer].weight.shape[-1:]:
                self.tensors.setdefault(layer, []).append(name)
        self.hooks = [
            layers[layer].register_forward_pre_hook(self._see(layer), with_kwargs=True) for layer in self.tensors
        ]

    def close(self) -> None:
        """Let go of the model."""
        while self.hooks:
            self.hooks.pop().remove()

    def relative_sizes(self) -> dict[str, Tensor]:
        """By tensor, relative to the largest; nothing of layers whose inputs were all 0."""
        return {
            name: sizes / sizes.max()
            for layer, sizes in self.sums.items()
            if _checked(layer, sizes).max() > 0
            for name in self.tensors[layer]
        }

    def _see(self, layer: str) -> Callable[..., None]:
        def see(_layer: Any, positional: tuple[Any, ...], named: Mapping[str, Any]) -> None:
            inputs = positional[0] if positional else next(iter(named.values()))
            sizes = inputs.detach().float().abs().flatten(0, -2).sum(0).cpu()
            self.sums[layer] = self.sums[layer] + sizes if layer in self.sums else sizes

        return see


def _has_columns(layer: torch.nn.Module) -> bool:
    """Whether each column of a layer's weight is for one of its inputs: linear layers, and norms."""
    weight = getattr(layer, "weight", None)
    return isinstance(layer, torch.nn.Linear) or (isinstance(weight, torch.Tensor) and weight.dim() == 1)


def _checked(layer: str, sizes: Tensor) -> Tensor:
    """The sizes.

    Raises:
        InputError: they are NaN or infinite.
    """
    if not bool(sizes.isfinite().all()):
        raise InputError(f"the base computes NaN or infinite inputs of {layer}; with bf16 there is room for more")
    return sizes
