"""What a model's norms scale: their inputs once they are normalised."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from expert_merging.running.sharding import decoder_layers
from expert_merging.running.targets import Asked
from expert_merging.statistics.gram import Gram
from expert_merging.stored import stored_tensors


class NormWatch:
    """Adds up the squares of what each norm of a model scales.

    Args:
        model: the model.
        names: merged tensors, of which those count that are weights of norms.
        file_name: published name of a parameter in memory.
    """

    def __init__(self, model: Any, names: Iterable[str], file_name: Callable[[str], str]) -> None:
        stored = stored_tensors(model, file_name)
        modules = {f"{name}.weight": module for name, module in model.named_modules() if _is_norm(module)}
        self.sums: dict[str, Tensor] = {}
        self.counts: dict[str, int] = {}
        self._asked: Asked | None = None
        in_decoder, self.hooks = set(decoder_layers(model)[0].modules()), []
        for name in names:
            runs = stored.get(file_name(name), [])
            module = modules.get(runs[0].parameter) if len(runs) == 1 else None
            if module is not None:
                self.hooks.append(module.register_forward_pre_hook(self._hook(name, sees_tokens=module in in_decoder)))

    def watching(self, asked: Iterable[Asked]) -> Iterator[Asked]:
        """The samples, each of which is looked at until the next one is asked for."""
        for one in asked:
            self._asked = one
            yield one
        self._asked = None

    def finish(self) -> dict[tuple[str, ...], Gram]:
        """The mean squares by name, and the model is let go."""
        while self.hooks:
            self.hooks.pop().remove()
        return {(name,): Gram.of_squares((total / self.counts[name]).float()) for name, total in self.sums.items()}

    def _hook(self, name: str, *, sees_tokens: bool) -> Callable[..., None]:
        def see(module: Any, positional: tuple[Any, ...]) -> None:
            if self._asked is None or not positional:
                return
            ids, scaled = self._asked.inputs["input_ids"], scaled_by(module, positional[0])
            if sees_tokens and scaled.shape[:2] == ids.shape:
                scaled = scaled[:, self._asked.tokens]
            rows = scaled.flatten(0, -2).double()
            self.sums[name] = self.sums.get(name, torch.zeros(())) + rows.square().sum(0).cpu()
            self.counts[name] = self.counts.get(name, 0) + len(rows)

        return see


def _is_norm(module: torch.nn.Module) -> bool:
    """Whether a module has one number for each of its inputs."""
    weight = getattr(module, "weight", None)
    return isinstance(weight, Tensor) and weight.dim() == 1


@torch.no_grad()
def scaled_by(norm: Any, inputs: Tensor) -> Tensor:
    """What a norm multiplies its weights with, of the shape of its inputs.

    Its output is that times the weights, plus what does not depend on them (a bias; Gemma adds 1 to the weights). So it
    is the difference of the outputs with weights of 1 and of 0.

    Args:
        norm: the module, whose hooks do not run.
        inputs: ``(..., inputs)``.
    """
    weight = norm.weight
    saved = weight.data
    try:
        weight.data = torch.ones_like(saved)
        ones: Tensor = norm.forward(inputs)
        weight.data = torch.zeros_like(saved)
        zeros: Tensor = norm.forward(inputs)
        return ones - zeros
    finally:
        weight.data = saved
