"""What routers do with samples that they were not made of: the load of each expert, and what is wrong with it."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from expert_merging.context import Context
from expert_merging.mixtures.fitting import conditions, loads
from expert_merging.mixtures.statistics import HELD_OUT
from expert_merging.mixtures.tensors import Mixture
from expert_merging.statistics.gram import Grams

logger = logging.getLogger(__name__)

FILE = "routing.json"
# An expert with a smaller share of all tokens is dead, and a router whose rows are nearer to each other is told of.
_DEAD, _CONDITION = 0.01, 5.0


def measure(mixture: Mixture, routers: Mapping[str, Tensor], grams: Grams) -> dict[str, dict[str, list[float]]]:
    """Load of every expert by router and by the expert whose held-out samples they are; each sums to 1."""
    found: dict[str, dict[str, list[float]]] = {}
    for name, router in mixture.inputs.items():
        for expert, gram in zip(mixture.plan.experts, grams.of(HELD_OUT + name), strict=True):
            if gram is not None:
                own = loads(routers[router], gram.values, mixture.per_token)
                found.setdefault(router, {})[expert] = own.tolist()
    return found


def report(
    context: Context,
    mixture: Mixture,
    routers: Mapping[str, Tensor],
    grams: Grams | None,
    assigned: Mapping[str, Mapping[str, int]] | None = None,
) -> None:
    """Write what routers do to the run's folder and to the log, and warn of what is wrong.

    Args:
        context: the run.
        mixture: the mixture.
        routers: its routers by name.
        grams: statistics with held-out samples; None where no model has run.
        assigned: how many samples are for which expert, by whose they are, where that was found out.
    """
    found, apart = measure(mixture, routers, grams) if grams is not None else {}, conditions(routers)
    content: dict[str, Any] = {"experts": [*mixture.members], "experts_per_token": mixture.per_token}
    content |= {"condition": {name: _finite(number) for name, number in apart.items()}, "load": found}
    content |= {} if assigned is None else {"assigned": assigned}
    context.run.kept.write(context.run.folder / FILE, (json.dumps(content, indent=2) + "\n").encode())
    for line in [*_assigned_in_words(assigned or {}), *_loads_in_words(mixture, found)]:
        logger.info("%s", line)
    for line in [*_without_samples(mixture, assigned), *_ill_conditioned(apart), *_dead(mixture, found)]:
        logger.warning("%s", line)


def _finite(number: float) -> float | None:
    return number if math.isfinite(number) else None


def _assigned_in_words(assigned: Mapping[str, Mapping[str, int]]) -> list[str]:
    return [
        f"by their gradients, samples of {owner} are for "
        + ", ".join(f"{expert} ({count} of {sum(own.values())})" for expert, count in own.items())
        for owner, own in assigned.items()
    ]


def _without_samples(mixture: Mixture, assigned: Mapping[str, Mapping[str, int]] | None) -> list[str]:
    """Experts that no sample is for."""
    found = {expert for own in (assigned or {}).values() for expert in own}
    return [
        f"no sample is for expert {expert} by its gradient, so routers rate it zero; --router ridge goes by whose "
        "samples they are"
        for expert in mixture.plan.experts
        if assigned is not None and expert not in found
    ]


def _loads_in_words(mixture: Mixture, found: Mapping[str, Mapping[str, list[float]]]) -> list[str]:
    domains = list(dict.fromkeys(expert for own in found.values() for expert in own))
    lines = []
    for domain in domains:
        mean = torch.tensor([own[domain] for own in found.values() if domain in own]).mean(0).tolist()
        shares = ", ".join(f"{member} {share:.0%}" for member, share in zip(mixture.members, mean, strict=True))
        lines.append(f"held-out samples of {domain} go to {shares} (mean over layers)")
    return lines


def _ill_conditioned(apart: Mapping[str, float]) -> list[str]:
    worst = {name: number for name, number in apart.items() if number > _CONDITION}
    if not worst:
        return []
    name = max(worst, key=lambda one: worst[one])
    return [
        f"{len(worst)} of {len(apart)} routers hardly tell experts apart: the condition number of {name} is "
        f"{worst[name]:.3g}, and above {_CONDITION:g} small differences decide"
    ]


def _dead(mixture: Mixture, found: Mapping[str, Mapping[str, list[float]]]) -> list[str]:
    """Experts that hardly any token goes to, by the mean over samples of all experts."""
    dead: dict[str, int] = {}
    for own in found.values():
        mean = torch.tensor([*own.values()]).mean(0).tolist()
        for member, share in zip(mixture.members, mean, strict=True):
            dead[member] = dead.get(member, 0) + (share < _DEAD)
    return [
        f"expert {member} is dead in {layers} of {len(found)} layers: less than {_DEAD:.0%} of held-out tokens go to it"
        for member, layers in dead.items()
        if layers
    ]
