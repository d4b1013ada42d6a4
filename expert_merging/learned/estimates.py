"""What learning needs on each device, foretold from headers and ``config.json``; what to do if it is too much."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from expert_merging.checkpoints.configurations import layer_count, size_setting
from expert_merging.learned.directions import PLAIN, Directions
from expert_merging.learned.options import TrainingOptions
from expert_merging.learned.task_vectors import BLOCK_ON_CPU, BLOCK_ON_GPU, DEVICE, HOST, STEP_ON_CPU
from expert_merging.machine import free_host_memory, free_memory, gib
from expert_merging.plan import Plan
from expert_merging.processes import count, local_count
from expert_merging.roles import is_in_decoder, word_tables
from expert_merging.running.batches import kept_bytes

# Memory of a GPU that its driver and libraries take, in bytes, and of logits that are worked on.
_CONTEXT, _LOGITS = 1 << 29, 1 << 28


@dataclass(frozen=True)
class Needs:
    """Bytes that learning takes on a device, estimated from headers and ``config.json``.

    Args:
        model: the merged model.
        sample: activations of the tokens that go through the model together.
        checkpointed_sample: the same with gradient checkpointing.
        working: the largest weight gradient, blocks of task vectors, logits, and the driver's own.
        task_vectors: base and experts.
        gradients: all weight gradients in float32.
    """

    model: int
    sample: int
    checkpointed_sample: int
    working: int
    task_vectors: int
    gradients: int

    @property
    def plain(self) -> int:
        """All but what may be elsewhere."""
        return self.model + self.sample + self.working

    @property
    def least(self) -> int:
        """The same with gradient checkpointing."""
        return self.model + self.checkpointed_sample + self.working


def estimate(
    plan: Plan,
    width: int,
    tokens: int,
    device: str = "cuda",
    shares: int = 1,
    directions: Directions = PLAIN,
) -> Needs:
    """What learning needs.

    Args:
        plan: the checkpoints.
        width: bytes of a weight.
        tokens: that go through the model together.
        device: ``cpu`` or ``cuda``.
        shares: with more than one, the decoder's layers are split, and each device has one.
        directions: what coefficients multiply.
    """
    config, entries = plan.base.config, plan.base.entries
    hidden = size_setting(config, "hidden_size") or 0
    layers = layer_count(config) or 0
    # What is kept of a layer per token where layers are computed again in the backward pass.
    kept = kept_bytes(config, width)
    kept_again = 1.5 * width * hidden
    on_cpu = device == "cpu"
    block, step, context = (BLOCK_ON_CPU, STEP_ON_CPU, 0) if on_cpu else (BLOCK_ON_GPU, BLOCK_ON_GPU, _CONTEXT)
    blocks = (1 + len(plan.experts)) * (4 * step + 2 * width * block)
    model = {name: width * entry.elements for name, entry in entries.items()}
    task_vectors = {name: entries[name].elements * directions.entry_bytes(plan, name) for name in plan.merged}
    # Of a split model, one layer runs while the next is put together, and gradients are exchanged in float32.
    layer = sum(entries[name].elements for name in entries if is_in_decoder(name)) // max(1, layers)
    together = (2 * width + 4) * layer if shares > 1 else 0
    return Needs(
        model=_share(model, shares),
        sample=int(tokens * layers * kept),
        checkpointed_sample=int(tokens * (layers * kept_again + kept)),
        working=width * max(entries[name].elements for name in plan.merged) + blocks + _LOGITS + context + together,
        task_vectors=_share(task_vectors, shares),
        gradients=_share({name: 4 * entries[name].elements for name in plan.merged}, shares),
    )


def _share(sizes: Mapping[str, int], shares: int) -> int:
    """What one device has of tensors of these sizes."""
    return sum(size // shares if is_in_decoder(name) else size for name, size in sizes.items())


@dataclass(frozen=True)
class Machine:
    """What a plan is made for.

    Args:
        device: a process's device as text.
        free: bytes that are free there.
        processes: processes of the run.
        local: processes of the run on this machine.
        host_free: bytes of host memory that are free for each of them.
    """

    device: str
    free: float
    processes: int = 1
    local: int = 1
    host_free: float = math.inf


def this_machine(device: str) -> Machine:
    """The machine and the run that this process belongs to."""
    return Machine(device, free_memory(device), count(), local_count(), free_host_memory())


@dataclass(frozen=True)
class Demand:
    """What is to be learned, as far as memory goes.

    Args:
        plan: the checkpoints.
        precision: ``no``, ``fp16`` or ``bf16``.
        tokens: that go through the model together.
        longest: tokens of the longest sample with its response.
        options: what the user wants.
        directions: what coefficients multiply.
    """

    plan: Plan
    precision: str
    tokens: int
    longest: int
    options: TrainingOptions
    directions: Directions = PLAIN

    @property
    def width(self) -> int:
        """Bytes of a weight of the model."""
        return 4 if self.precision == "no" else 2

    def needs(self, machine: Machine, *, width: int | None = None, shares: int | None = None) -> Needs:
        """What it takes on a device of the machine.

        Args:
            machine: where the run is.
            width: bytes of a weight, where it is not the wanted one.
            shares: number of devices that share the decoder's layers, where it is not as the user wants it.
        """
        wanted = machine.processes if self.options.shard else 1
        kind = machine.device.split(":")[0]
        return estimate(self.plan, width or self.width, self.tokens, kind, shares or wanted, self.directions)


def describe(demand: Demand, machine: Machine) -> tuple[str, ...]:
    """The memory that each device needs, for the plan that ``--dry_run`` prints, and what to do if it is too much."""
    options, device = demand.options, machine.device
    needs = demand.needs(machine)
    now = needs.least if options.gradient_checkpointing else needs.plain
    flag = "" if options.gradient_checkpointing else f" ({gib(needs.least)} with --gradient_checkpointing)"
    elsewhere = "" if device == "cpu" else f"in host memory{_together(needs.task_vectors, machine)}, or "
    too_many = f", as {device} has no memory left for them" if now + needs.task_vectors > machine.free else ""
    lines = [
        f"learning needs at least {gib(now)}{flag} for each process on {device}: model {gib(needs.model)}, "
        f"{demand.tokens} tokens at a time {gib(now - needs.model - needs.working)}, "
        f"work in progress {gib(needs.working)}" + _own_heads(demand.plan, demand.width),
        f"with base and experts there too, {gib(needs.task_vectors)} more; otherwise they are {elsewhere}read from "
        f"the files{too_many}",
        f"with weight gradients added up, {gib(needs.gradients)} more",
    ]
    if now > machine.free:
        lines.append(
            f"that does not fit on {device}, where {gib(machine.free)} are free: it takes {_what_fits(demand, machine)}"
        )
    elif options.task_vectors == DEVICE and now + needs.task_vectors > machine.free:
        lines.append(f"--task_vectors device does not fit on {device}, where {gib(machine.free)} are free: use auto")
    if options.task_vectors == HOST and needs.task_vectors > machine.host_free:
        lines.append(f"--task_vectors host does not fit, where {gib(machine.host_free)} are free a process: use auto")
    return tuple(lines)


def _own_heads(plan: Plan, width: int) -> str:
    """What experts take whose output heads are not the merged model's; whether they differ is seen while learning."""
    _, head = word_tables(plan.base.entries)
    size = len(plan.experts) * width * plan.base.entries[head].elements if head else 0
    return f", and up to {gib(size)} for experts' own output heads" if size >= 2**20 else ""


def _together(size: int, machine: Machine) -> str:
    """What all processes of this machine take in host memory, beside what there is."""
    if machine.local == 1:
        return ""
    free = machine.local * machine.host_free
    return f", {gib(machine.local * size)} for the {machine.local} processes of this machine ({gib(free)} are free)"


@dataclass(frozen=True)
class _Remedy:
    """Flags that make learning need less.

    Args:
        flags: what to give.
        size: bytes that are needed on each device then.
        devices: number of devices that the model is split over, if it is.
    """

    flags: str
    size: int
    devices: int = 1


def _what_fits(demand: Demand, machine: Machine) -> str:
    """What to do where a device has not enough memory: the flags that cost least and are enough, or what else."""
    for remedy in _remedies(demand, machine):
        if remedy.size <= machine.free:
            over = f" over {remedy.devices} devices" if remedy.devices > 1 and machine.processes == 1 else ""
            split = remedy.devices > 1 and not demand.options.shard
            return remedy.flags + over + (f", which needs {gib(remedy.size)} on each" if split else "")
    more = "shorter samples, smaller pictures (the family's own flags), "
    if demand.options.shard:
        return more + "or more devices"
    if machine.device == "cpu":  # the processes of a machine share its memory
        return more + "or a machine with more memory"
    return more + "--shard over several devices, or one with more memory"


def _remedies(demand: Demand, machine: Machine) -> Iterator[_Remedy]:
    """Flags that the user has not given, those that cost least first.

    One sample at a time, half precision, gradient checkpointing, then the fewest devices that the model can be split
    over.
    """
    again = "" if demand.options.gradient_checkpointing else "--gradient_checkpointing"
    alone, fewer = replace(demand, tokens=demand.longest), ""
    if demand.tokens > demand.longest:
        fewer = f"--batch_tokens {demand.longest} "
        yield _Remedy(fewer.strip(), alone.needs(machine).plain if again else alone.needs(machine).least)
    if demand.precision == "no":
        narrow = f"{fewer}--mixed_precision {'bf16' if machine.device == 'cpu' else 'fp16'}"
        yield from _with_and_without(again, narrow, alone.needs(machine, width=2))
    if again:
        yield _Remedy(fewer + again, alone.needs(machine).least)
    if demand.options.shard or machine.device == "cpu":
        return
    # Who has not started several processes yet is told how many it takes.
    for devices in [machine.processes] if machine.processes > 1 else [2, 4, 8, 16]:
        yield from _with_and_without(again, f"{fewer}--shard", alone.needs(machine, shares=devices), devices)


def _with_and_without(again: str, flags: str, needs: Needs, devices: int = 1) -> Iterator[_Remedy]:
    """Flags alone, then with gradient checkpointing; where that is given already, it is counted in."""
    if again:
        yield _Remedy(flags, needs.plain, devices)
        yield _Remedy(f"{flags} {again}", needs.least, devices)
    else:
        yield _Remedy(flags, needs.least, devices)
