"""The order of one model's units that makes them most alike another's, found by linear assignment."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from expert_merging.alignment.units import BlockOrder, Layout

# Added to the similarity of what is in its place, relative to the largest: where two places are as good, as for units
# that do nothing, none moves.
_INERTIA = 1e-6
# Rounds of matching heads and value units in turn; two or three suffice.
_ROUNDS = 20


def match(similarity: Tensor, current: Tensor | None = None) -> Tensor:
    """The order with the largest sum of similarities.

    Args:
        similarity: ``(units, units)`` of the unit that each place wants with each unit there is.
        current: ``(units,)`` the order so far, which is kept where no other is better; as stored by default.

    Returns:
        ``(units,)`` number of the unit for each place.
    """
    places = torch.arange(len(similarity))
    wanted = similarity.detach().to("cpu", torch.float64, copy=True)
    wanted[places, places if current is None else current] += _INERTIA * float(wanted.abs().max())
    nearest = wanted.argmax(1)
    if nearest.bincount(minlength=len(nearest)).max() == 1:  # as for fine-tunes: no place wants what another one does
        return nearest
    return torch.from_numpy(linear_sum_assignment(wanted.numpy(), maximize=True)[1])


def total(similarity: Tensor, order: Tensor) -> float:
    """The sum of similarities ``(units, units)`` that an order has."""
    places = torch.arange(len(order))
    return float(similarity.cpu()[places, order].sum(dtype=torch.float64))


@dataclass(frozen=True)
class HeadSimilarity:
    """How alike the parts of two models' heads are; the first dimension is the place, the second what there is.

    Args:
        keys: ``(groups, groups)`` of key heads.
        queries: ``(heads, heads)`` of query heads.
        values: ``(groups * width, groups * width)`` of value units.
        outputs: ``(heads * width, heads * width)`` of what comes out of a value unit by a query head.
    """

    keys: Tensor
    queries: Tensor
    values: Tensor
    outputs: Tensor

    def total(self, layout: Layout, order: BlockOrder) -> float:
        """The sum of similarities that an order has."""
        outputs = order.rows(layout)["outputs"]
        return (
            total(self.keys, order.keys(layout))
            + total(self.queries, order.heads)
            + total(self.values, order.values)
            + total(self.outputs, outputs)
        )


def match_heads(similar: HeadSimilarity, layout: Layout, current: BlockOrder) -> tuple[Tensor, Tensor]:
    """Order of query heads ``(heads,)`` and of value units ``(groups * width,)``, key-value groups kept together.

    Each group is tried in each place. There, the order of its query heads and that of its value units depend on each
    other through the outputs, so they are found in turn until neither gains. What is found is the current order where
    no better one is.
    """
    groups, width, repeats = layout.groups, layout.width, layout.heads // layout.groups
    gains = torch.zeros(groups, groups, dtype=torch.float64)
    inside: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
    queries = similar.queries.double().cpu().view(groups, repeats, groups, repeats)
    values = similar.values.double().cpu().view(groups, width, groups, width)
    outputs = similar.outputs.double().cpu().view(groups, repeats, width, groups, repeats, width)
    for place in range(groups):
        for group in range(groups):
            gain, *orders = _match_inside(
                queries[place, :, group], values[place, :, group], outputs[place, :, :, group].transpose(1, 2)
            )
            gains[place, group] = gain + float(similar.keys[place, group])
            inside[place, group] = orders[0], orders[1]
    chosen = match(gains, current.keys(layout)).tolist()
    heads = torch.cat([group * repeats + inside[place, group][0] for place, group in enumerate(chosen)])
    units = torch.cat([group * width + inside[place, group][1] for place, group in enumerate(chosen)])
    found = BlockOrder(heads, units, current.feed)
    before = similar.total(layout, current)
    is_better = similar.total(layout, found) > before + _INERTIA * abs(before)
    return (heads, units) if is_better else (current.heads, current.values)


def _match_inside(queries: Tensor, values: Tensor, outputs: Tensor) -> tuple[float, Tensor, Tensor]:
    """The best order of a group's query heads and value units.

    Args:
        queries: ``(heads, heads)``.
        values: ``(width, width)``.
        outputs: ``(heads, heads, width, width)``.

    Returns:
        The sum of similarities, and both orders.
    """
    places, unit_places = torch.arange(len(queries)), torch.arange(len(values))
    # What each pair of heads could have if the value units were in the order that suits it best.
    best = torch.stack([torch.stack([_most(values + pair) for pair in row]) for row in outputs])
    heads, gain = match(queries + best), -torch.inf
    units = unit_places
    for _ in range(_ROUNDS):
        units = match(values + outputs[places, heads].sum(0), units)
        by_heads = queries + outputs[:, :, unit_places, units].sum(-1)
        heads = match(by_heads, heads)
        now = total(by_heads, heads) + total(values, units)
        if now <= gain + _INERTIA * abs(gain):
            break
        gain = now
    return now, heads, units


def _most(similarity: Tensor) -> Tensor:
    """The largest sum of similarities that an order has."""
    rows, columns = linear_sum_assignment(similarity.numpy(), maximize=True)
    return similarity[rows, columns].sum()
