"""Whether the experts inside mixtures that are merged with one another stand in the base's order.

Expert 3 of a layer is merged with expert 3 of the others. In fine-tunes of one mixture these are the same. Where a
tool has put them in another order, what is merged has nothing to do with each other, though every shape fits.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from expert_merging.checkpoints.checkpoint import Checkpoint
from expert_merging.plan import Plan
from expert_merging.roles import is_router

if TYPE_CHECKING:
    from torch import Tensor

# Rows of unrelated routers have cosines of about 0, those of fine-tunes of nearly 1.
_RELATED = 0.5


def order_warnings(plan: Plan) -> list[str]:
    """A line for every expert, itself a mixture, whose routers have the base's rows in another order."""
    routers = [name for name, entry in plan.base.entries.items() if is_router(name) and len(entry.shape) == 2]
    found = []
    for expert, checkpoint in plan.experts.items():
        others = {name: order for name in routers if (order := _order(plan.base, checkpoint, name)) is not None}
        if others:
            name, order = next(iter(others.items()))
            place = next(place for place, number in enumerate(order) if place != number)
            found.append(
                f"expert {expert} has its experts in another order than the base in {len(others)} of {len(routers)} "
                f"layers ({name}: row {place} is the base's row {order[place]}), and those of the same number are "
                "merged; save it with the experts, and the rows of its routers, in the base's order"
            )
    return found


def _order(base: Checkpoint, expert: Checkpoint, name: str) -> list[int] | None:
    """The base's row that each row of an expert's router is likest to; None where that is its own, or unclear."""
    if name not in expert.entries or expert.entries[name].shape != base.entries[name].shape:
        return None
    likest = _directions(expert, name) @ _directions(base, name).T
    values, rows = likest.max(dim=1)
    order: list[int] = rows.tolist()
    is_other = sorted(order) == [*range(len(order))] != order
    return order if is_other and float(values.mean()) > _RELATED else None


def _directions(checkpoint: Checkpoint, name: str) -> Tensor:
    import torch

    rows = checkpoint.read(name).view(checkpoint.entries[name].shape).double()
    return torch.nn.functional.normalize(rows, dim=1)
