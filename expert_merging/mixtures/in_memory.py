"""A mixture as a live model, before it is written: merged tensors, experts' own, and those that were made."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from expert_merging.context import Context
from expert_merging.libraries import import_transformers
from expert_merging.mixtures.tensors import Mixture
from expert_merging.outputs import Copied, Made
from expert_merging.plan import Rule
from expert_merging.running.in_memory import InMemory
from expert_merging.stored import stored_tensors


@torch.no_grad()
def live_mixture(
    context: Context, mixture: Mixture, made: Mapping[str, Tensor], dtype: torch.dtype, rule: Rule, unit: str
) -> Any:
    """The model that the mixture's files would be, in evaluation mode and without gradients.

    Args:
        context: the run.
        mixture: the mixture.
        made: its tensors that are made, routers included.
        dtype: type of the weights.
        rule: what merges the shared tensors.
        unit: what it is fed.
    """
    plan, device = context.plan, torch.device(context.device)
    model = _unfilled(mixture.config(plan.base.config), dtype, device)
    weights, stored = dict(model.named_parameters()), stored_tensors(model)
    for slot in mixture.slots():
        if isinstance(slot.source, Made):
            values = made[slot.source.key].reshape(-1)
        elif isinstance(slot.source, Copied):
            owner = plan.base if slot.source.expert is None else plan.experts[slot.source.expert]
            values = owner.read(slot.source.name)
        else:
            continue
        for run in stored.get(slot.name, ()):  # a head that is the embedding has no place of its own
            weights[run.parameter].view(-1)[run.start : run.stop].copy_(values)
    merged = tuple(name for name in mixture.shared if name in stored)
    InMemory(model, replace(plan, merged=merged), str, device).merge(rule, unit)
    return model


def _unfilled(config: dict[str, Any], dtype: torch.dtype, device: torch.device) -> Any:
    """A model whose weights have any values, and whose tables are those of its configuration."""
    from accelerate import init_empty_weights

    transformers = import_transformers()
    settings = transformers.AutoConfig.for_model(config.pop("model_type"), **config)
    with init_empty_weights(include_buffers=False):
        model = transformers.AutoModelForCausalLM.from_config(settings)
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            values = torch.empty_like(parameter, dtype=dtype, device=device)
            setattr(module, name, torch.nn.Parameter(values, requires_grad=False))
    model.tie_weights()
    return model.to(device).eval()
