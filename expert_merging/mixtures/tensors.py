"""What becomes of the tensors of dense models in a mixture, in which the experts' feed-forward layers stay apart."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from expert_merging.checkpoints.checkpoint import Checkpoint, Entry
from expert_merging.errors import InputError, Problems, first_of
from expert_merging.mixtures.layouts import PARTS, Layout, layout_of
from expert_merging.outputs import Copied, Made, Merged, Slot
from expert_merging.plan import BASE, Plan
from expert_merging.roles import is_rotary_table

_FEED_FORWARD = re.compile(rf"model\.layers\.(\d+)\.mlp\.({'|'.join(PARTS)})_proj\.weight")


class FeedForward(NamedTuple):
    """A feed-forward tensor of a dense model.

    Args:
        layer: number of its layer.
        part: one of `PARTS`.
    """

    layer: int
    part: str

    @classmethod
    def named(cls, name: str) -> FeedForward | None:
        """The feed-forward tensor of that name; None if it names something else."""
        match = _FEED_FORWARD.fullmatch(name)
        return cls(int(match[1]), match[2]) if match else None

    @property
    def name(self) -> str:
        """Its name in the dense model."""
        return f"model.layers.{self.layer}.mlp.{self.part}_proj.weight"


@dataclass(frozen=True)
class Mixture:
    """A mixture of the base's and the experts' feed-forward layers.

    Args:
        plan: the checkpoints.
        layout: how it is stored.
        members: its experts: the checkpoint whose feed-forward layers each one is, None for the base.
        per_token: how many of them work on each token.
        shared_expert: where it has an expert for all tokens, the base's feed-forward layers are that; else it is one
            that adds nothing.
    """

    plan: Plan
    layout: Layout
    members: Mapping[str, str | None]
    per_token: int
    shared_expert: bool = False

    @classmethod
    def of(cls, plan: Plan, members: Mapping[str, str | None], per_token: int, *, shared_expert: bool) -> Mixture:
        """The mixture of these checkpoints.

        Raises:
            InputError: there is no mixture of such models, or it has no place for some of their tensors, or lacks some;
                or feed-forward tensors are excluded.
        """
        layout = layout_of(plan.base.folder, plan.base.model_type)
        _check(plan, layout)
        if shared_expert and not layout.has_shared_expert:
            raise InputError(f"--shared_expert base: a {layout.title} has no expert for all tokens; leave it out")
        return cls(plan, layout, members, per_token, shared_expert)

    @property
    def shared(self) -> tuple[str, ...]:
        """Names of the tensors that are merged: all that would be in a dense model but for feed-forward ones."""
        return tuple(name for name in self.plan.merged if not FeedForward.named(name))

    @property
    def kept(self) -> tuple[str, ...]:
        """Names of the base's tensors that all experts share as they are."""
        others = (name for name in self.plan.base.entries if self.plan.merged_as(name) is None)
        return tuple(name for name in others if not (FeedForward.named(name) or is_rotary_table(name)))

    @property
    def inputs(self) -> dict[str, str]:
        """The router of each layer, by the tensor of the dense models that has the same inputs."""
        found = _feed_forward_of(self.plan.base)
        return {entry.name: self.layout.router(entry.layer) for entry in found if entry.part == "gate"}

    @property
    def columns(self) -> int:
        """Columns of a router."""
        return self.plan.base.entries[next(iter(self.inputs))].shape[1]

    @property
    def expert_elements(self) -> int:
        """Number of parameters of one expert."""
        return sum(self.plan.base.entries[found.name].elements for found in _feed_forward_of(self.plan.base))

    def config(self, dense: Mapping[str, Any]) -> dict[str, Any]:
        """Its ``config.json``, from the base's."""
        columns = 0
        if self.layout.has_shared_expert:
            columns = self.plan.base.entries[FeedForward(0, "gate").name].shape[0] if self.shared_expert else 1
        counts = {"experts": len(self.members), "per_token": self.per_token}
        return self.layout.config(dense, **counts, shared_columns=columns)

    def slots(self) -> list[Slot]:
        """Its tensors, in the order of the base's files and with the base's types."""
        base = self.plan.base
        entries = [entry for file in base.files for entry in base.in_file(file) if not is_rotary_table(entry.name)]
        return [slot for entry in entries for slot in self._become(entry)]

    def _become(self, entry: Entry) -> Iterator[Slot]:
        """The tensors that a tensor of the base becomes."""
        found = FeedForward.named(entry.name)
        if not found:
            merged = self.plan.merged_as(entry.name)
            source = Copied(entry.name) if merged is None else Merged(merged)
            yield Slot(entry.name, entry.dtype, entry.shape, entry.size, source)
            return
        if found.part == "gate":
            router = self.layout.router(found.layer)
            yield Slot.of(router, entry.dtype, (len(self.members), entry.shape[1]), Made(router))
        for number, expert in enumerate(self.members.values()):
            name = self.layout.expert(found.layer, number, found.part)
            yield Slot.of(name, entry.dtype, entry.shape, Copied(entry.name, expert))
        if self.layout.has_shared_expert:
            yield from self._shared_expert(found, entry)

    def _shared_expert(self, found: FeedForward, entry: Entry) -> Iterator[Slot]:
        """The expert for all tokens, behind a gate of zeros, which lets a half of it through."""
        if found.part == "gate":
            gate = self.layout.shared_gate(found.layer)
            yield Slot.of(gate, entry.dtype, (1, entry.shape[1]), Made(gate))
        name = self.layout.shared_expert(found.layer, found.part)
        if self.shared_expert:
            yield Slot.of(name, entry.dtype, entry.shape, Copied(entry.name))
        else:
            rows, columns = entry.shape
            shape = (rows, 1) if found.part == "down" else (1, columns)
            yield Slot.of(name, entry.dtype, shape, Made(name))

    def zeros(self) -> dict[str, Any]:
        """The tensors that are made of zeros, whatever the router is."""
        import torch

        routers = set(self.inputs.values())
        made = [slot for slot in self.slots() if isinstance(slot.source, Made) and slot.source.key not in routers]
        return {slot.name: torch.zeros(slot.shape) for slot in made}


def _check(plan: Plan, layout: Layout) -> None:
    """Check that there is a place for everything.

    Raises:
        InputError: there is not, or feed-forward tensors are missing or excluded.
    """
    base, problems = plan.base, Problems()
    if BASE in plan.contained:
        problems.add(
            f"a {layout.title} has fixed names, and those of {base.folder} are read {plan.contained[BASE]}; save it "
            "without its container, or use another method"
        )
        problems.check()
    feed_forward = _feed_forward_of(base)
    layers = sorted({found.layer for found in feed_forward}) or [0]
    wanted = [FeedForward(layer, part).name for layer in layers for part in PARTS]
    merged = set(plan.merged)
    missing = [name for name in wanted if name not in base.entries]
    homeless = [entry.name for entry in base.entries.values() if not _has_place(layout, entry)]
    excluded = [found.name for found in feed_forward if found.name not in merged]
    if missing:
        problems.add(f"{base.folder} lacks {first_of(missing, 1)}; download it again")
    if homeless:
        problems.add(f"{base.folder} has {first_of(homeless, 1)}, for which a {layout.title} has no place")
    if excluded:
        problems.add(
            f"--exclude_params leaves out {first_of(excluded, 1)}, and feed-forward layers are what a mixture has of "
            "its experts; exclude other parameters"
        )
    with problems.collecting():
        layout.config(base.config, experts=1, per_token=1)
    problems.check()


def _feed_forward_of(base: Checkpoint) -> list[FeedForward]:
    return [found for name in base.entries if (found := FeedForward.named(name))]


def _has_place(layout: Layout, entry: Entry) -> bool:
    if FeedForward.named(entry.name):
        return len(entry.shape) == 2
    return bool(layout.homes.fullmatch(entry.name)) or is_rotary_table(entry.name)
