"""How near experts are to their base and to one another, from a few thousand entries of every merged tensor.

That takes a second before the work begins, and finds what would merge to nothing: the base given as an expert, an
expert given twice, a model of another base.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import combinations
from typing import TYPE_CHECKING

from expert_merging.parts import Part
from expert_merging.plan import Plan

if TYPE_CHECKING:
    from torch import Tensor

# Runs of consecutive entries that are read of every tensor, and their length.
_RUNS = 4
_RUN = 512
# Models of different origin have a cosine of about 0. Fine-tunes change weights by a hundredth to a fifth of their
# size, which leaves 0.97 and more; even a change as large as the base, in any direction of its own, leaves 0.7.
_UNRELATED = 0.5
# Of fewer entries, a cosine says nothing.
_ENOUGH = 1000


@dataclass(frozen=True)
class Likeness:
    """What samples of the merged tensors say about an expert.

    Args:
        change: relative change ``norm(expert - base) / norm(base)``; None where it is not defined.
        cosine: of the expert's and the base's matrices; None where there are too few entries.
        equals_base: no entry differs.
        digest: the same for experts whose entries are the same.
    """

    change: float | None
    cosine: float | None
    equals_base: bool
    digest: str


def find_likeness(plan: Plan) -> dict[str, Likeness]:
    """Look at samples of all merged tensors; what is found by expert.

    Raises:
        InputError: a file ended early.
    """
    found = {name: _Sums() for name in plan.experts}
    for name in plan.merged:
        entry = plan.base.entries[name]
        weight = max(1.0, entry.elements / (_RUNS * _RUN))
        for run in _runs(plan.part(name)):
            base = plan.base.read(name, run.start, run.stop).double()
            for expert, checkpoint in plan.experts.items():
                values = checkpoint.read(name, run.start, run.stop).double()
                found[expert].add(values, base, weight, is_matrix=len(entry.shape) > 1)
    return {name: sums.result() for name, sums in found.items()}


def _runs(part: Part) -> Iterator[Part]:
    """Runs spread evenly over a tensor; all of it where it is small."""
    if part.entries <= _RUNS * _RUN:
        yield part
        return
    for number in range(_RUNS):
        start = number * (part.entries - _RUN) // (_RUNS - 1)
        yield part.between(start, start + _RUN)


class _Sums:
    """What is summed over an expert's samples, each weighted with the entries that it stands for."""

    def __init__(self) -> None:
        self.change = self.base = self.products = self.own = self.of_base = 0.0
        self.in_matrices = 0
        self.digest = hashlib.sha256()

    def add(self, values: Tensor, base: Tensor, weight: float, *, is_matrix: bool) -> None:
        """Add a run of entries ``(entries,)`` of expert and base."""
        difference = values - base
        self.digest.update(values.numpy().tobytes())
        self.change += weight * float(difference @ difference)
        self.base += weight * float(base @ base)
        if is_matrix:
            self.in_matrices += len(values)
            self.products += weight * float(values @ base)
            self.own += weight * float(values @ values)
            self.of_base += weight * float(base @ base)

    def result(self) -> Likeness:
        """What the sums say."""
        norms = math.sqrt(self.own * self.of_base)
        has_change = self.base > 0 and math.isfinite(self.change)
        has_cosine = norms > 0 and math.isfinite(norms) and self.in_matrices >= _ENOUGH
        return Likeness(
            change=math.sqrt(self.change / self.base) if has_change else None,
            cosine=self.products / norms if has_cosine else None,
            equals_base=self.change == 0,
            digest=self.digest.hexdigest(),
        )


def changes_line(found: Mapping[str, Likeness]) -> list[str]:
    """A line with every expert's relative change, if one is known."""
    known = [f"{name} {_percent(like.change)}" for name, like in found.items() if like.change is not None]
    return [f"relative change by experts, from samples: {', '.join(known)}"] if known else []


def likeness_warnings(plan: Plan, found: Mapping[str, Likeness], *, aligned: bool = False) -> list[str]:
    """A line for every expert that adds nothing, for every pair that is one, and for every model of another base.

    Args:
        plan: what is merged.
        found: what samples say about each expert.
        aligned: units will be put in the base's order, for which models of other origin are expected.
    """
    equal = [name for name, like in found.items() if like.equals_base]
    others = {name: like for name, like in found.items() if name not in equal}
    pairs = [pair for pair in combinations(others, 2) if others[pair[0]].digest == others[pair[1]].digest]
    return [
        *(
            f"expert {name} has the base's values {_extent(plan)}: it adds nothing; is {plan.experts[name].folder} the "
            "right folder?"
            for name in equal
        ),
        *(
            f"experts {first} and {second} have the same values {_extent(plan)}: what they have learned counts twice; "
            "give each expert once"
            for first, second in pairs
        ),
        *(
            f"expert {name} is hardly related to the base (the cosine of their weights is {like.cosine:.2f}, and near "
            "1 for a fine-tune): is it an expert of this base? For models of different origin, there is --align_experts"
            for name, like in others.items()
            if like.cosine is not None and like.cosine < _UNRELATED and not aligned
        ),
    ]


def _extent(plan: Plan) -> str:
    """How much was looked at."""
    sizes = [plan.base.entries[name].elements for name in plan.merged]
    seen = sum(min(size, _RUNS * _RUN) for size in sizes)
    return "in every merged tensor" if seen == sum(sizes) else f"in all {seen} sampled entries of the merged tensors"


def _percent(change: float | None) -> str:
    percent = 100 * (change or 0)
    return f"{percent:.0f} %" if percent >= 10 else f"{percent:.2g} %"
