"""What a mixture's routers and experts do while it runs over samples."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from expert_merging.errors import InputError
from expert_merging.mixtures.grouping import LayerStatistics
from expert_merging.running.targets import Asked
from expert_merging.stored import stored_tensors


class MixtureWatch:
    """Adds up what `LayerStatistics` has of each layer, in float64.

    Args:
        model: the mixture.
        routers: names of the routers in files, by the number of their layer.
        file_name: published name of a parameter in memory.
        all_outputs: experts are run on all tokens, not only on those that they were chosen for.

    Raises:
        InputError: the model's layers are no mixtures as transformers 5 has them.
    """

    def __init__(
        self, model: Any, routers: Mapping[int, str], file_name: Callable[[str], str], *, all_outputs: bool
    ) -> None:
        self.model, self.all_outputs = model, all_outputs
        self._sums: dict[int, dict[str, Any]] = {layer: {} for layer in routers}
        self._tokens: Tensor | None = None
        self._hooks: list[Any] = []
        stored = stored_tensors(model, file_name)
        for layer, name in routers.items():
            block = stored[file_name(name)][0].parameter.removesuffix(".gate.weight")
            parts = dict(model.get_submodule(block).named_children())
            if "gate" not in parts or not hasattr(parts.get("experts"), "gate_up_proj"):
                raise InputError(f"{type(model).__name__} has no router and stacked experts in {block}")
            self._hooks.append(parts["gate"].register_forward_hook(self._see_logits(layer)))
            self._hooks.append(parts["experts"].register_forward_pre_hook(self._see_choice(layer)))

    @torch.no_grad()
    def run(self, samples: Iterable[Asked]) -> dict[int, LayerStatistics]:
        """Run the model over samples; what was seen, by the number of the layer.

        Raises:
            InputError: it computes NaN.
        """
        try:
            for asked in samples:
                self._tokens = asked.tokens
                self.model.base_model(**asked.inputs, use_cache=False)
        finally:
            while self._hooks:
                self._hooks.pop().remove()
        found = {layer: LayerStatistics(**{"outputs": None, **sums}) for layer, sums in self._sums.items()}
        for layer, one in found.items():
            if not bool(torch.isfinite(one.likeness).all() and torch.isfinite(one.saliency).all()):
                raise InputError(f"the mixture computes NaN or infinite values in layer {layer}")
        return found

    def _see_logits(self, layer: int) -> Callable[..., None]:
        def see(_router: Any, _given: Any, output: tuple[Tensor, ...]) -> None:
            logits = output[0][self._tokens].double()
            self._add(layer, likeness=(logits.T @ logits).cpu(), tokens=len(logits))

        return see

    def _see_choice(self, layer: int) -> Callable[..., None]:
        def see(experts: Any, given: tuple[Tensor, Tensor, Tensor]) -> None:
            hidden, index, weights = (values[self._tokens] for values in given)
            count = len(experts.gate_up_proj)
            chosen = index.flatten().bincount(minlength=count).cpu()
            saliency = torch.zeros(count, dtype=torch.float64)
            outputs = torch.zeros(count, hidden.shape[1], dtype=torch.float64)
            for expert in range(count):
                rows, places = (index == expert).nonzero(as_tuple=True)
                seen = _output(experts, expert, hidden if self.all_outputs else hidden[rows])
                norms = (seen[rows] if self.all_outputs else seen).double().norm(dim=1)
                saliency[expert] = (weights[rows, places].double() * norms).sum().cpu()
                outputs[expert] = seen.double().sum(0).cpu()
            self._add(layer, chosen=chosen, saliency=saliency, **({"outputs": outputs} if self.all_outputs else {}))

        return see

    def _add(self, layer: int, **values: Any) -> None:
        sums = self._sums[layer]
        for name, value in values.items():
            sums[name] = sums[name] + value if name in sums else value


def _output(experts: Any, number: int, hidden: Tensor) -> Tensor:
    """What one of stacked experts puts out, ``(tokens, hidden size)``, unweighted; its hooks are not called."""
    if not len(hidden):
        return hidden
    index = torch.full((len(hidden), 1), number, device=hidden.device)
    found: Tensor = experts.forward(hidden, index, torch.ones_like(index, dtype=hidden.dtype))
    return found
