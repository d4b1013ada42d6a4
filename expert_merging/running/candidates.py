"""Scores of merges that are not written: each is made in the one live model, and compared with the experts.

The experts are asked once. `expert_merging.running.scores.ExpertDivergence` is the score, as everywhere.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from expert_merging.context import Context
from expert_merging.plan import Plan, Rule
from expert_merging.running.in_memory import InMemory
from expert_merging.running.samples import Samples
from expert_merging.running.scores import ExpertDivergence, HasTask
from expert_merging.running.sharding import load_on
from expert_merging.running.targets import Target

Item = TypeVar("Item", bound=HasTask)


class Candidates:
    """The live model, and what the experts say about the samples.

    Args:
        context: any run with the same base and experts.
        asked: the samples.
        shares: of each task's samples, in (0, 1], by which candidates may be scored.

    Raises:
        InputError: the base and an expert agree, so that there is nothing to compare with.
    """

    def __init__(self, context: Context, asked: Samples, shares: Sequence[float] = (1.0,)) -> None:
        self.context, self.device = context, torch.device(context.device)
        targets = experts_targets(context, asked, self.device)
        self.model = load_on(self.device, context.backbone, context.plan.base, asked.dtype, sharded=False)
        self.divergences = {
            share: ExpertDivergence.beside(self.model, first_of_tasks(targets, share), asked.batch_tokens)
            for share in shares
        }
        self._last: InMemory | None = None

    def merge(self, rule: Rule, unit: str, plan: Plan | None = None) -> Any:
        """The model with what a rule makes.

        Args:
            rule: how task vectors become one.
            unit: what it is fed.
            plan: the same checkpoints, where perhaps other tensors are merged than for the first.
        """
        plan = plan or self.context.plan
        former, memory = self._last, self._memory(plan)
        if former is not None and former is not memory:
            merged = set(plan.merged)
            former.merge(_base_alone, "entries", [name for name in former.plan.merged if name not in merged])
        return memory.merge(rule, unit)

    def _memory(self, plan: Plan) -> InMemory:
        """What writes the merged tensors of a plan into the model; made anew only where they are others."""
        if self._last is None or self._last.plan.merged != plan.merged:
            self._last = InMemory(self.model, plan, self.context.backbone.file_name, self.device)
        return self._last

    def divergence(self, share: float = 1.0) -> dict[str, float]:
        """How far the model is from each task's expert now, as a share of how far the base is."""
        return self.divergences[share].by_task(self.model)


def experts_targets(context: Context, asked: Samples, device: torch.device) -> list[Target]:
    """What the experts say about the samples; each has its own head, since those of merges may be anything."""
    everything = replace(context.plan, merged=tuple(context.plan.base.entries))
    return replace(asked.target_maker(context, (), device), plan=everything).make(asked.samples)


def _base_alone(task_vectors: Tensor, *_: Any) -> Tensor:
    """The rule of tensors that keep the base's value."""
    return task_vectors.new_zeros(task_vectors.shape[1:])


def first_of_tasks(items: Sequence[Item], share: float) -> list[Item]:
    """The first so many of each task's samples or questions, at least one of each."""
    by_task: dict[str, list[Item]] = {}
    for item in items:
        by_task.setdefault(item.task, []).append(item)
    return [item for own in by_task.values() for item in own[: math.ceil(share * len(own))]]
