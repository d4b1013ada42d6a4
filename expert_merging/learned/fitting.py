"""Whether a model has the weights that coefficients make of its base and experts."""

from __future__ import annotations

import torch

from expert_merging.checkpoints.checkpoint import Checkpoint
from expert_merging.learned.coefficients import Coefficients
from expert_merging.learned.directions import TASK_VECTORS
from expert_merging.parts import Part
from expert_merging.plan import Plan

# Entries of each tensor that are merged once more.
_SAMPLE = 4096
# Units of the last place by which another device's sums may differ, before they are rounded.
_UNITS = 8


def misfits_of(coefficients: Coefficients, plan: Plan, model: Checkpoint) -> list[str]:
    """Names of merged tensors whose first entries are others, or that have no coefficients.

    Args:
        coefficients: of task vectors; what is made of others is not looked at.
        plan: the checkpoints.
        model: the merged model.
    """
    if coefficients.directions["name"] != TASK_VECTORS:
        return []
    return [
        name
        for name in plan.merged
        if name not in coefficients.values or not _fits(coefficients, plan, model, _first_entries(plan, name))
    ]


def _first_entries(plan: Plan, name: str) -> Part:
    part = plan.part(name)
    return part.between(0, min(_SAMPLE, part.elements))


def _fits(coefficients: Coefficients, plan: Plan, model: Checkpoint, part: Part) -> bool:
    base, *experts = (checkpoint.read(part.name, part.start, part.stop) for checkpoint in plan.checkpoints.values())
    base, found = base.float(), model.read(part.name, part.start, part.stop)
    expected = base + coefficients.merge(torch.stack([expert.float() - base for expert in experts]), part)
    unit = torch.finfo(found.dtype).eps / 2 + _UNITS * torch.finfo(torch.float32).eps
    largest = torch.maximum(base.abs(), expected.abs())
    return bool(((found.double() - expected.double()).abs() <= unit * largest.double() + 1e-7).all())
