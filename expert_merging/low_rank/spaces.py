"""Methods that give all adapters coordinates in one common space of few dimensions, and merge those."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from expert_merging.checkpoints.checkpoint import Checkpoint, Entry
from expert_merging.checkpoints.lora import TILE
from expert_merging.closed_form import ClosedForm
from expert_merging.context import Context
from expert_merging.errors import InputError
from expert_merging.low_rank.changes import Changes
from expert_merging.low_rank.factors import Factors
from expert_merging.low_rank.options import LowRankOptions
from expert_merging.low_rank.registering import MergeFactors, register_on_factors
from expert_merging.parts import Part
from expert_merging.plan import Plan, Rule

if TYPE_CHECKING:
    import torch
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class CoreSpaceOptions(LowRankOptions):
    """Options of Core Space.

    Args:
        inner: closed form that merges the coordinates, with options that differ from its defaults, such as
            'ties density=0.1 ties_scope=tensor'.
        isotropize: whether the singular values of the merged coordinates are made equal, as Iso-C does.
    """

    inner: str = "svd"
    isotropize: bool = False


@dataclass(frozen=True, kw_only=True)
class KnotsOptions(LowRankOptions):
    """Options of KnOTS.

    Args:
        inner: closed form that merges the coordinates, with options that differ from its defaults, such as
            'dare_ties drop_rate=0.8'.
    """

    inner: str = "ties"


class Space(NamedTuple):
    """Coordinates of all experts' changes of a tensor: a change is ``left @ coordinates @ right``.

    Args:
        left: ``(rows, height)`` float64, with orthonormal columns.
        right: ``(width, columns)`` float64, with orthonormal rows; None for coordinates of all columns.
        coordinates: each expert's, ``(height, width)`` as two factors.
    """

    left: Tensor
    right: Tensor | None
    coordinates: Mapping[str, Factors]

    @property
    def shape(self) -> tuple[int, int]:
        """Height and width."""
        return self.left.shape[1], next(iter(self.coordinates.values())).right.shape[1]

    def without_coordinates(self) -> Space:
        """The directions alone, in float32."""
        return Space(self.left.float(), None if self.right is None else self.right.float(), {})


def common_directions(stacked: Tensor, parts: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
    """Left and right singular directions of factors side by side, without those that are mere rounding.

    Args:
        stacked: ``(rows, columns)`` float64.
        parts: the factors that it is made of.
    """
    from expert_merging.methods.spectral import rounding_floor, singular_triples

    floor = sum(rounding_floor(part[None]) for part in parts)
    left, _, right = singular_triples(stacked, floor)
    return left, right


def core_coordinates(changes: Mapping[str, Factors]) -> Space:
    """Coordinates between the spaces that all left factors, and all right factors, span."""
    import torch

    lefts, rights = [change.left for change in changes.values()], [change.right for change in changes.values()]
    left, _ = common_directions(torch.cat(lefts, 1), lefts)
    _, right = common_directions(torch.cat(rights), rights)
    found = {name: Factors(left.mT @ change.left, change.right @ right) for name, change in changes.items()}
    return Space(left, right.mT, found)


def knots_coordinates(changes: Mapping[str, Factors]) -> Space:
    """Coordinates in the left singular directions of all changes side by side, which the singular values scale."""
    import torch

    from expert_merging.methods.spectral import singular_triples

    sized = []
    for change in changes.values():
        turn, sizes, _ = singular_triples(change.right, 0.0)
        sized.append(change.left @ (turn * sizes))
    left, _ = common_directions(torch.cat(sized, 1), sized)
    return Space(left, None, {name: Factors(left.mT @ change.left, change.right) for name, change in changes.items()})


class Coordinates(Checkpoint):
    """Coordinates that are read like a checkpoint, so that any closed form can pass over them.

    An entry has the same bits whichever block it is read with: a threshold that a pass finds is that of an entry.

    Args:
        shapes: by tensor.
        factors: the coordinates as two factors in float32 on the CPU, by tensor; elsewhere they are zeros.
    """

    def __init__(self, shapes: Mapping[str, tuple[int, int]], factors: Mapping[str, Factors]) -> None:
        self.factors = factors
        self.folder = file = Path("coordinates")
        self.entries = {
            name: Entry(name, "F32", shape, file, offset=0, size=4 * shape[0] * shape[1])
            for name, shape in shapes.items()
        }

    def read_into(self, block: Tensor, name: str, start: int) -> None:
        """Fill a block ``(entries,)`` with entries of the flattened coordinates, from ``start`` on."""
        if name not in self.factors:
            block.zero_()
            return
        factors, columns = self.factors[name], self.entries[name].shape[1]
        tile = max(1, TILE // columns) * columns
        for begin in range(start // tile * tile, start + len(block), tile):
            low, high = max(start, begin), min(start + len(block), begin + tile)
            entries = factors.entries(begin, min(begin + tile, self.entries[name].elements))
            block[low - start : high - start] = entries[low - begin : high - begin]


@dataclass(frozen=True)
class InSpace:
    """A closed form that merges coordinates.

    Args:
        context: the run.
        changes: what the experts change.
        make: gives the coordinates of a tensor.
        inner: the closed form.
        isotropize: whether the merged singular values are made equal.
    """

    context: Context
    changes: Changes
    make: Callable[[Mapping[str, Factors]], Space]
    inner: ClosedForm
    isotropize: bool = False

    @classmethod
    def check(
        cls, context: Context, changes: Changes, make: Callable[..., Space], inner: str, *, isotropize: bool = False
    ) -> InSpace:
        """Check that the closed form can merge coordinates.

        Raises:
            InputError: there is none of that name, or it needs the base's weights.
        """
        own = replace(context, plan=replace(context.plan, merged=tuple(changes.products)))
        form = ClosedForm.of(inner, own, "inner")
        if "base" in form.method.needs:
            raise InputError(
                f"--inner {inner}: that needs the base's weights, which have no coordinates among those of changes; "
                "choose a method of changes alone, such as svd or ties"
            )
        return cls(context, changes, make, form, isotropize)

    def begin(self) -> MergeFactors:
        """What merges a tensor; a closed form that has to look at all coordinates first has done so."""
        if self.inner.method.prepare is not None:
            return self._after_passes()
        rule, experts = self.inner.rule(), tuple(self.context.plan.experts)

        def merge(name: str, changes: Mapping[str, Factors]) -> Factors:
            space = self.make(changes)
            zeros = space.left.new_zeros(space.shape)
            own = [space.coordinates[expert].whole() if expert in changes else zeros for expert in experts]
            return self._merged(rule, name, space, _stack(own).float())

        return merge

    def _after_passes(self) -> MergeFactors:
        shapes, bases = dict[str, tuple[int, int]](), dict[str, Space]()
        own: dict[str, dict[str, Factors]] = {expert: {} for expert in self.context.plan.experts}
        for name in self.changes.products:
            space = self.make(self.changes.factors(name, self._device))
            shapes[name], bases[name] = space.shape, space.without_coordinates()
            for expert, factors in space.coordinates.items():
                own[expert][name] = factors.single().on_cpu()
        experts = {expert: Coordinates(shapes, factors) for expert, factors in own.items()}
        plan = Plan(Coordinates(shapes, {}), experts, tuple(name for name, shape in shapes.items() if min(shape)))
        rule = self.inner.on(replace(self.context, plan=plan)).rule()

        def merge(name: str, changes: Mapping[str, Factors]) -> Factors:
            del changes  # their coordinates are known
            found = _stack([expert.read(name).view(shapes[name]) for expert in experts.values()])
            return self._merged(rule, name, bases[name], found.to(self._device))

        return merge

    @property
    def _device(self) -> torch.device:
        import torch

        return torch.device(self.context.device)

    def _merged(self, rule: Rule, name: str, space: Space, coordinates: Tensor) -> Factors:
        """What a rule makes of coordinates ``(experts, height, width)`` float32, outside of the space."""
        import torch

        merged = coordinates[0]
        if merged.numel():
            merged = rule(coordinates, Part.whole(name, tuple(merged.shape)), torch.zeros_like(merged))
            merged = _isotropic(merged) if self.isotropize else merged
        left, merged = space.left.double(), merged.double()
        if space.right is None:
            return Factors(left, merged)
        right = space.right.double()
        is_flat = len(merged) < merged.shape[1]
        return Factors(left, merged @ right) if is_flat else Factors(left @ merged, right)


def _stack(tensors: Sequence[Tensor]) -> Tensor:
    """`torch.stack`, which is not loaded before it is needed."""
    import torch

    return torch.stack(list(tensors))


def _isotropic(matrix: Tensor) -> Tensor:
    """A matrix with all singular values made their mean, those that are mere rounding left out."""
    from expert_merging.methods.spectral import polar_factor, rounding_floor

    factor, mean = polar_factor(matrix, rounding_floor(matrix[None]))
    return factor * mean


@register_on_factors(options=CoreSpaceOptions)
def core_space(context: Context, changes: Changes, *, inner: str, isotropize: bool) -> Callable[[], MergeFactors]:
    """Core Space: adapters merged in one small space that all of them span (Panariello et al., 2025, arXiv 2509.17786).

    The left factors of all adapters side by side have an orthonormal basis, their left singular directions, and so have
    the right factors below each other. Between the two bases each adapter is a small matrix, with as many rows and
    columns as all ranks together. Any closed form merges these, and nothing is lost on the way there and back. The
    scale of an adapter is part of its left factor; the authors' code leaves it out.

    Methods with a first pass see the coordinates of all tensors: trimming is over the model unless their options say
    otherwise. The authors trim each tensor by itself (ties_scope=tensor).
    """
    return InSpace.check(context, changes, core_coordinates, inner, isotropize=isotropize).begin


@register_on_factors(options=KnotsOptions)
def knots(context: Context, changes: Changes, *, inner: str) -> Callable[[], MergeFactors]:
    """KnOTS: adapters merged in the directions that all their changes share (Stoica et al., 2024, arXiv 2410.19735).

    All changes of a matrix side by side are decomposed to U S V. What is merged of each adapter is its own part of S V,
    and U is put before the result. The decomposition is made between the factors; as in the authors' code, directions
    that are mere rounding are left out.

    The version in Core Space's code merges parts of V and multiplies by S later, trimming each tensor by itself. For
    sums and averages the two are the same.
    """
    return InSpace.check(context, changes, knots_coordinates, inner).begin
