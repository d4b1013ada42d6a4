"""Orders against all orders that there are."""

from __future__ import annotations

from itertools import permutations, product

import pytest
import torch

from expert_merging.alignment.matching import HeadSimilarity, match, match_heads, total
from expert_merging.alignment.units import BlockOrder, Layout


def layout(heads: int, groups: int, width: int) -> Layout:
    return Layout(8, heads, groups, width, (5,), ({},), {})


def test_the_order_with_the_largest_sum_is_found():
    torch.manual_seed(0)
    similarity = torch.randn(6, 6)
    best = max(permutations(range(6)), key=lambda order: sum(similarity[place, order[place]] for place in range(6)))
    assert match(similarity).tolist() == list(best)
    assert total(similarity, torch.tensor(best)) == pytest.approx(sum(float(similarity[i, best[i]]) for i in range(6)))


def test_where_no_two_places_want_the_same_unit_each_gets_its_own(monkeypatch):
    monkeypatch.setattr("expert_merging.alignment.matching.linear_sum_assignment", None)
    order = torch.tensor([3, 0, 2, 1])
    assert match(torch.eye(4)[order] + 0.1).equal(order)


def test_units_that_are_as_good_where_they_are_stay():
    similarity = torch.zeros(5, 5)
    assert match(similarity).tolist() == [0, 1, 2, 3, 4]
    similarity[0, 1] = similarity[1, 0] = 1.0  # the others do nothing
    assert match(similarity).tolist() == [1, 0, 2, 3, 4]
    current = torch.tensor([1, 0, 4, 2, 3])
    assert match(similarity, current).equal(current)
    assert similarity[2, 2] == 0  # what is given stays as it is


def all_orders(heads: int, groups: int, width: int):
    """Every order of heads and value units that keeps groups together."""
    repeats = heads // groups
    inside = [*product(permutations(range(repeats)), permutations(range(width)))]
    for order in permutations(range(groups)):
        for choice in product(inside, repeat=groups):
            pairs = [*zip(order, choice, strict=True)]
            yield (
                torch.tensor([group * repeats + head for group, (own, _) in pairs for head in own]),
                torch.tensor([group * width + unit for group, (_, own) in pairs for unit in own]),
            )


def gain_plainly(similar: HeadSimilarity, heads, values, repeats: int, width: int) -> float:
    """The sum of similarities, unit by unit."""
    found = 0.0
    for place, head in enumerate(heads.tolist()):
        found += float(similar.queries[place, head])
        for unit in range(width):
            value = int(values[place // repeats * width + unit]) % width
            found += float(similar.outputs[place * width + unit, head * width + value])
    for place, unit in enumerate(values.tolist()):
        found += float(similar.values[place, unit])
    groups = heads[::repeats] // repeats
    return found + sum(float(similar.keys[place, group]) for place, group in enumerate(groups.tolist()))


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("planted", [True, False], ids=["one order stands out", "none does"])
def test_heads_are_matched_as_by_trying_all_orders(planted, seed):
    """The best of 288 orders is found where one stands out; where similarities are noise, a good one is."""
    heads, groups, width, repeats = 4, 2, 3, 2
    generator, place = torch.Generator().manual_seed(seed), layout(heads, groups, width)
    orders = [*all_orders(heads, groups, width)]
    assert len(orders) == 2 * (2 * 6) ** 2
    found = BlockOrder(*orders[int(torch.randint(len(orders), (), generator=generator))], torch.arange(5))

    def draw(order: torch.Tensor) -> torch.Tensor:
        return torch.randn(len(order), len(order), generator=generator) + planted * torch.eye(len(order))[:, order].T

    similar = HeadSimilarity(*map(draw, (found.keys(place), found.heads, found.values, found.rows(place)["outputs"])))
    best = max(gain_plainly(similar, *pair, repeats, width) for pair in orders)
    order, values = match_heads(similar, place, BlockOrder.as_stored(place, 0))
    gain = gain_plainly(similar, order, values, repeats, width)
    assert similar.total(place, BlockOrder(order, values, torch.arange(5))) == pytest.approx(gain)
    assert gain == pytest.approx(best) if planted else gain >= 0.75 * best


@pytest.mark.parametrize("kind", ["keys", "queries", "values", "outputs"])
def test_each_part_of_the_heads_counts(kind):
    """Each alone says where the second group's heads and units belong: in the first place."""
    place = layout(4, 2, 3)
    found = BlockOrder(torch.tensor([3, 2, 1, 0]), torch.tensor([5, 4, 3, 0, 2, 1]), torch.arange(5))
    order = {"keys": found.keys(place), "queries": found.heads, "values": found.values}
    order["outputs"] = found.rows(place)["outputs"]
    parts = {name: torch.eye(len(own))[:, own].T * (name == kind) for name, own in order.items()}
    heads, values = match_heads(HeadSimilarity(**parts), place, BlockOrder.as_stored(place, 0))
    assert (heads // 2).tolist() == [1, 1, 0, 0]
    assert heads.equal(found.heads) or kind in ("keys", "values")
    assert values.equal(found.values) or kind in ("keys", "queries")


def test_heads_stay_where_no_order_is_better():
    heads, groups, width = 4, 2, 3
    place = layout(heads, groups, width)
    zeros = [torch.zeros(size, size) for size in (groups, heads, groups * width, heads * width)]
    current = BlockOrder(torch.tensor([3, 2, 0, 1]), torch.tensor([4, 3, 5, 2, 0, 1]), torch.arange(5))
    order, values = match_heads(HeadSimilarity(*zeros), place, current)
    assert order.equal(current.heads)
    assert values.equal(current.values)
