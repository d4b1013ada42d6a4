"""Which experts of a mixture's layer are kept, or become one: functions of numbers that a pass over samples has left.

No published layout can say that several rows of a router mean one expert, as M-SMoE and HC-SMoE leave them. So a new
expert has one row here, that of its most used member.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class LayerStatistics:
    """What samples have shown of a layer with ``experts`` experts.

    Args:
        chosen: ``(experts,)`` tokens that each works on.
        saliency: ``(experts,)`` sum over these of the expert's weight times the norm of its output.
        likeness: ``(experts, experts)`` sum over all tokens of products of router logits.
        outputs: ``(experts, hidden size)`` sum over all tokens of each expert's output, whoever was chosen; None where
            that is not asked for.
        tokens: number of tokens.
    """

    chosen: Tensor
    saliency: Tensor
    likeness: Tensor
    outputs: Tensor | None
    tokens: int


@dataclass(frozen=True)
class Group:
    """Old experts that become a new one.

    Args:
        centre: number of the one whose row of the router, and place, it has.
        members: weight of each by its number; they sum to 1.
    """

    centre: int
    members: Mapping[int, float]


def reap(found: LayerStatistics, count: int) -> list[Group]:
    """Keep the experts that add most where they work (REAP, 2025, arXiv 2510.13999).

    An expert's score is the mean, over the tokens that it works on, of its weight times the norm of its output. One
    that never works has none.

    Args:
        found: of the layer.
        count: experts that are kept.
    """
    scores = found.saliency / found.chosen.clamp(min=1)
    kept = scores.argsort(descending=True, stable=True)[:count]
    return [Group(number, {number: 1.0}) for number in sorted(kept.tolist())]


def m_smoe(found: LayerStatistics, count: int) -> list[Group]:
    """Merge each expert into the one of the most used that routers rate likest (M-SMoE, 2023, arXiv 2310.01334).

    The most used experts are centres. Every other joins the centre whose router logits, over all tokens, have the
    largest cosine with its own. Members are averaged by how often they are used. As in the authors' code for Mixtral,
    units are not put in one order first. There the number of centres differs from layer to layer; a config.json has
    one number for all, so it is the same in each.

    Args:
        found: of the layer.
        count: centres.
    """
    order = found.chosen.argsort(descending=True, stable=True)
    norms = found.likeness.diagonal().clamp(min=torch.finfo(torch.float64).tiny).sqrt()
    cosines = found.likeness / norms / norms[:, None]
    centres = order[:count]
    labels = {int(number): int(number) for number in centres}
    labels |= {int(number): int(centres[cosines[number, centres].argmax()]) for number in order[count:]}
    return _groups(found, [[number for number in labels if labels[number] == int(centre)] for centre in centres])


def hc_smoe(found: LayerStatistics, count: int) -> list[Group]:
    """Merge experts that put out the same on average (HC-SMoE, 2024, arXiv 2410.08589).

    Experts are clustered from below, by the distances between their mean outputs over all tokens: the two clusters are
    joined whose members are nearest on average (average linkage), until ``count`` are left. Members are averaged by how
    often they are used.

    Args:
        found: of the layer, outputs included.
        count: clusters.
    """
    assert found.outputs is not None  # noqa: S101  (asked for by this method)
    from scipy.cluster.hierarchy import cut_tree, linkage
    from scipy.spatial.distance import pdist

    tree = linkage(pdist((found.outputs / found.tokens).numpy()), method="average")
    labels = cut_tree(tree, n_clusters=count)[:, 0].tolist()
    return _groups(found, [[number for number, own in enumerate(labels) if own == label] for label in set(labels)])


def _groups(found: LayerStatistics, members: Sequence[Sequence[int]]) -> list[Group]:
    """Groups of these members, weighted by how often each is used; where none is, all alike."""
    groups = []
    for own in map(sorted, members):
        used = found.chosen[own].double()
        weights = used / used.sum() if used.sum() > 0 else torch.full_like(used, 1 / len(own))
        groups.append(Group(own[int(used.argmax())], dict(zip(own, weights.tolist(), strict=True))))
    return sorted(groups, key=lambda group: group.centre)


# By the value of --method; the second says that it looks at outputs of experts that were not chosen, too.
METHODS: Mapping[str, tuple[Callable[[LayerStatistics, int], list[Group]], bool]] = {
    "reap": (reap, False),
    "m_smoe": (m_smoe, False),
    "hc_smoe": (hc_smoe, True),
}
