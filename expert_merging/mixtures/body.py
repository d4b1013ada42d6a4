"""A mixture in which one expert does all the work: that expert's model with the shared tensors of the mixture.

Routers see hidden states of the mixture, whose attention is merged, not those of the experts.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from expert_merging.context import Context
from expert_merging.mixtures.tensors import Mixture
from expert_merging.plan import Rule
from expert_merging.roles import word_tables
from expert_merging.running.in_memory import InMemory
from expert_merging.stored import stored_tensors


@torch.no_grad()
def share(model: Any, context: Context, mixture: Mixture, rule: Rule, unit: str) -> None:
    """Give an expert's model all that a mixture's experts share: merged tensors, and the base's own.

    Args:
        model: the expert's model, which is changed.
        context: the run.
        mixture: the mixture.
        rule: what merges.
        unit: what the rule is fed.
    """
    base, file_name = context.plan.base, context.backbone.file_name
    embedding, _ = word_tables(base.entries)
    assert embedding is not None  # noqa: S101  (the layout has one)
    rows = base.entries[embedding].shape[0]
    if len(model.get_input_embeddings().weight) != rows:  # of a fine-tune that has added tokens
        model.resize_token_embeddings(rows, mean_resizing=False)
    weights, stored = dict(model.named_parameters()), stored_tensors(model, file_name)
    # A head that is the embedding in memory has no place of its own there.
    plan = replace(context.plan, merged=tuple(name for name in mixture.shared if file_name(name) in stored))
    for name in mixture.kept:
        for place in stored.get(file_name(name), ()):
            weights[place.parameter].view(-1)[place.start : place.stop].copy_(base.read(name))
    InMemory(model, plan, file_name, torch.device(context.device)).merge(rule, unit)
