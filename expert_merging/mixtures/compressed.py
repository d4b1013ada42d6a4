"""A mixture with fewer experts in each layer: its tensors and its config.json, in the layout that it had."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from expert_merging.checkpoints.checkpoint import Checkpoint, Entry
from expert_merging.errors import InputError, Problems, first_of
from expert_merging.mixtures.layouts import MIXTURES, PARTS, Names
from expert_merging.outputs import Computed, Copied, Made, Output, Slot, Source, shards

if TYPE_CHECKING:
    from torch import Tensor

    from expert_merging.mixtures.grouping import Group

# One is the kind's own; transformers writes the other in place of it for some.
_COUNTS = {"num_local_experts", "num_experts"}


class Place(NamedTuple):
    """Where an expert's matrix is.

    Args:
        layer: number of its layer.
        expert: number of the expert.
        part: one of `PARTS`.
    """

    layer: int
    expert: int
    part: str


@dataclass(frozen=True)
class StoredMixture:
    """A mixture in files, with a tensor for each expert's matrix.

    Args:
        base: the checkpoint.
        names: what its tensors are called.
        routers: names of its routers by the number of the layer; some layers may have none.
        experts: experts in each of these layers.
        per_token: how many of them work on a token.
    """

    base: Checkpoint
    names: Names
    routers: Mapping[int, str]
    experts: int
    per_token: int

    @classmethod
    def of(cls, base: Checkpoint) -> StoredMixture:
        """The mixture in a folder.

        Raises:
            InputError: it is none, layers have different numbers of experts, or these are more than their matrices, or
                stacked.
        """
        if base.model_type not in MIXTURES:
            raise InputError(
                f"{base.folder} has the model_type {base.model_type!r}, and mixtures that can be compressed are "
                f"{', '.join(sorted(MIXTURES))}"
            )
        names = MIXTURES[base.model_type]
        pattern = re.compile(rf"model\.layers\.(\d+)\.{re.escape(names.block)}\.gate\.weight")
        routers = {int(match[1]): name for name in base.entries if (match := pattern.fullmatch(name))}
        counts = {base.entries[name].shape[0] for name in routers.values()}
        per_token = base.config.get("num_experts_per_tok", names.usual_per_token)
        problems = Problems()
        if len(counts) != 1:
            problems.add(f"{base.folder} has layers with {' and '.join(map(str, sorted(counts))) or 'no'} experts")
        if type(per_token) is not int or per_token < 1:
            problems.add(f"config.json of {base.folder} has num_experts_per_tok {per_token!r}, which is no number")
        problems.check()
        found = cls(base, names, dict(sorted(routers.items())), counts.pop(), per_token)
        found._check_tensors()
        return found

    def _check_tensors(self) -> None:
        """Check that experts are their matrices, each a tensor, and nothing else.

        Raises:
            InputError: they are not.
        """
        folder, places = self.base.folder, self.places
        if missing := [name for name in places if name not in self.base.entries]:
            raise InputError(
                f"{folder} lacks {missing[0]}: experts must have tensors of their own; if they are stacked, load "
                "the folder with transformers 5 and save it again"
            )
        own = re.compile(rf"model\.layers\.\d+\.{re.escape(self.names.block)}\.(experts|gate)\..*")
        known = {*places, *self.routers.values()}
        if other := sorted(name for name in self.base.entries if own.fullmatch(name) and name not in known):
            raise InputError(
                f"{folder} has {first_of(other, 1)} beside the routers' rows and the matrices of {self.experts} "
                "experts in each layer, and they cannot be left out one by one"
            )

    def check(self, count: int) -> None:
        """Check that it can have so many experts in a layer.

        Raises:
            InputError: it cannot.
        """
        if self.per_token >= self.experts:
            raise InputError(
                f"{self.base.folder} has {self.experts} experts in each layer, and by its config.json "
                f"{self.per_token} work on a token, so there are none to leave out"
            )
        if not self.per_token <= count < self.experts:
            raise InputError(
                f"--experts must be less than the {self.experts} that each layer has, and at least the "
                f"{self.per_token} that work on a token, got {count}"
            )

    @property
    def places(self) -> dict[str, Place]:
        """Where each expert's matrix is, by its name."""
        return {
            self.names.expert(layer, number, part): Place(layer, number, part)
            for layer in self.routers
            for number in range(self.experts)
            for part in PARTS
        }

    def total(self, what: Literal["elements", "size"], count: int) -> int:
        """Parameters, or bytes, of all tensors where each layer has so many experts."""
        numbers: dict[str, int] = {name: getattr(entry, what) for name, entry in self.base.entries.items()}
        shrinking = sum(numbers[name] for name in (*self.places, *self.routers.values()))
        return sum(numbers.values()) - shrinking * (self.experts - count) // self.experts

    def config(self, count: int) -> dict[str, Any]:
        """Its ``config.json`` with so many experts."""
        config = dict(self.base.config)
        return config | dict.fromkeys([self.names.count, *_COUNTS.intersection(config)], count)

    def output(self, groups: Mapping[int, Sequence[Group]], **more: Any) -> Output:
        """The folder of the smaller mixture, whose routers are made by `new_routers`.

        Args:
            groups: of each layer.
            more: further fields of `Output`.
        """
        count = len(next(iter(groups.values())))
        places = self.places
        entries = [entry for file in self.base.files for entry in self.base.in_file(file)]
        slots = [slot for entry in entries for slot in self._become(entry, places, groups)]
        return Output(shards(slots), edit=lambda _: self.config(count), **more)

    def _become(
        self, entry: Entry, places: Mapping[str, Place], groups: Mapping[int, Sequence[Group]]
    ) -> Iterator[Slot]:
        """The tensor that an old one becomes; none of a matrix that goes into another expert's."""
        if entry.name in self.routers.values():
            layer = next(layer for layer, name in self.routers.items() if name == entry.name)
            yield Slot.of(entry.name, entry.dtype, (len(groups[layer]), entry.shape[1]), Made(entry.name))
        elif entry.name in places:
            layer, expert, part = places[entry.name]
            for number, group in enumerate(groups[layer]):
                if group.centre == expert:
                    source = self._source(layer, part, group)
                    yield Slot.of(self.names.expert(layer, number, part), entry.dtype, entry.shape, source)
        else:
            yield Slot(entry.name, entry.dtype, entry.shape, entry.size, Copied(entry.name))

    def _source(self, layer: int, part: str, group: Group) -> Source:
        weights = {self.names.expert(layer, number, part): share for number, share in group.members.items() if share}
        if len(weights) == 1:
            return Copied(next(iter(weights)))
        return Computed(partial(_weighted, self.base, weights))

    def new_routers(self, groups: Mapping[int, Sequence[Group]]) -> dict[str, Tensor]:
        """The routers' rows of the groups' centres, by name."""
        return {
            name: self.base.read(name).view(self.base.entries[name].shape)[[group.centre for group in groups[layer]]]
            for layer, name in self.routers.items()
        }


def _weighted(base: Checkpoint, weights: Mapping[str, float], start: int, stop: int) -> Tensor:
    """Weighted sum of some entries of tensors, float32."""
    import torch

    total = torch.zeros(stop - start)
    for name, share in weights.items():
        total.add_(base.read(name, start, stop).float(), alpha=share)
    return total
