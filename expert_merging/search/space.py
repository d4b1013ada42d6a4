"""What a candidate's numbers are coefficients of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from expert_merging.plan import Plan
from expert_merging.roles import OUTSIDE, STAGES, find_places

_WHOLE = "all"


@dataclass(frozen=True)
class Space:
    """One coefficient for each expert in each group of tensors; a candidate has them group by group.

    Args:
        experts: names of the experts.
        groups: name of the group that each merged tensor belongs to.
        order: names of the groups.
    """

    experts: tuple[str, ...]
    groups: Mapping[str, str]
    order: tuple[str, ...]

    @property
    def size(self) -> int:
        """Numbers of a candidate."""
        return len(self.order) * len(self.experts)

    @property
    def names(self) -> list[str]:
        """What each number is, ``expert`` or ``expert/group``."""
        return [f"{expert}/{group}" if group != _WHOLE else expert for group in self.order for expert in self.experts]

    def start(self, initial: float | Sequence[float]) -> tuple[float, ...]:
        """The candidate that has the same in every group.

        Args:
            initial: one coefficient for all experts, or one for each.
        """
        own = tuple(initial) if isinstance(initial, Sequence) else (initial,) * len(self.experts)
        return own * len(self.order)

    def coefficients(self, candidate: Sequence[float]) -> dict[str, Tensor]:
        """A candidate's coefficients by the tensor's name, ``(experts, 1)`` float32 each."""
        rows = torch.tensor(candidate, dtype=torch.float32).view(len(self.order), len(self.experts), 1)
        places = {group: place for place, group in enumerate(self.order)}
        # Each has memory of its own, as a file of tensors needs.
        return {name: rows[places[group]].clone() for name, group in self.groups.items()}


def make_space(plan: Plan, kind: str) -> Space:
    """The space of a kind for these checkpoints.

    Tensors outside the language model's layers (a projector, a vision tower, embeddings) belong to none of its thirds
    and are a group of their own where some are merged.

    Args:
        plan: the checkpoints.
        kind: ``experts``, ``depth`` or ``tensors``.
    """
    if kind == "tensors":
        return Space(tuple(plan.experts), {name: name for name in plan.merged}, tuple(plan.merged))
    if kind == "experts":
        groups = dict.fromkeys(plan.merged, _WHOLE)
    else:
        places = find_places(list(plan.base.entries))
        groups = {name: places[name].stage for name in plan.merged}
    present = set(groups.values())
    order = tuple(name for name in (_WHOLE, *STAGES, OUTSIDE) if name in present)
    return Space(tuple(plan.experts), groups, order)
