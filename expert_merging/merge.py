"""Apply one rule to every merged parameter and write the base's mirror image.

Element-wise rules are fed blocks, so memory does not depend on the largest tensor; other rules get whole tensors.
Blocks are read, merged and written by a few workers, each with its own buffers; a block's result depends on its
entries alone, so the bytes are the same whatever the number of workers, and a run that was interrupted continues with
the shards that are missing.
"""

from __future__ import annotations

import math
import os
import re
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from expert_merging.checkpoint import INDEX, SINGLE, Checkpoint, Entry, as_bytes, other_files, read_exactly
from expert_merging.crew import SMALL_MODEL, Block, Crew
from expert_merging.errors import InputError
from expert_merging.machine import half_of_memory
from expert_merging.plan import Advance, Part, Plan, Progress, Rule
from expert_merging.streaming import ALONE, Reader, Team, block_entries
from expert_merging.writing import ShardWriter, partial_name, sync_folder

if TYPE_CHECKING:
    import torch
    from torch import Tensor

_COPY_BYTES = 1 << 22

# Each row of these matrices belongs to a word: they are no maps from one space into another.
_EMBEDDING = re.compile(r"((.*\.)?(embed_tokens|tok_embeddings|wte|lm_head)|(language_model\.)?output)\.weight$")


@dataclass
class Summary:
    """What a merge did.

    Args:
        changes: relative change ``norm(merged - base) / norm(base)`` of every tensor merged by this process, by name.
        kept_shards: shards that an earlier, interrupted run had finished.
    """

    changes: dict[str, float] = field(default_factory=dict)
    kept_shards: int = 0


def working_memory(plan: Plan, *, elementwise: bool, device: torch.device) -> int:
    """Bytes of memory that merging works with, whatever the size of the model for element-wise rules."""
    experts = len(plan.experts)
    entries = [plan.base.entries[name] for name in plan.merged]
    if elementwise:
        largest = max(entry.elements for entry in entries)
        workers = Crew.for_entries(plan.base_elements, device).size
        return 4 * (experts + 4) * min(block_entries(device), largest) * workers
    needs = sorted((_whole_memory(entry, experts) for entry in entries), reverse=True)
    return max(needs[0], min(sum(needs[: _whole_workers(plan, device)]), half_of_memory(device)))


def write_merged(
    plan: Plan,
    rule: Rule,
    folder: Path,
    *,
    elementwise: bool,
    device: torch.device,
    progress: Progress,
    team: Team = ALONE,
) -> Summary:
    """Merge every parameter and write a complete checkpoint folder.

    The weights come first and the other files last, so that nothing loads the folder before it is complete. Finished
    shards found in the folder are kept: the caller vouches that they come from the same inputs and options.

    Args:
        plan: checkpoints and parameters.
        rule: how task vectors become one.
        folder: folder to write; made if needed.
        elementwise: the rule may be fed blocks.
        device: where the arithmetic is done.
        progress: shows throughput in bytes read.
        team: the processes that share the work; each calls this function.

    Raises:
        InputError: NaN or infinite values, named by expert and tensor.
    """
    folder.mkdir(parents=True, exist_ok=True)
    summary = Summary()
    merger = _Merger(plan, rule, elementwise, device, team)
    per_element = {
        file: sum(entry.size for entry in plan.base.in_file(file)) * (1 + len(plan.experts)) for file in plan.base.files
    }
    with progress("merging", sum(per_element.values()), "B") as advance:
        for file in plan.base.files:
            target = folder / file.name
            if target.exists():
                summary.kept_shards += 1
                advance(per_element[file], file.name)
                continue
            summary.changes |= merger.write(file, target, advance)
    if team.rank == 0:
        copy_other_files(plan.base, folder)
    return summary


def copy_other_files(base: Checkpoint, folder: Path) -> None:
    """Copy everything but weights byte for byte; the base's model card keeps its text under ``README.base.md``."""
    for relative in other_files(base.folder):
        if relative == Path(INDEX) and base.files[0].name == SINGLE:
            continue  # left over from other weights; `from_pretrained` reads the single file
        target = folder / ("README.base.md" if relative == Path("README.md") else relative)
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = partial_name(target)
        shutil.copyfile(base.folder / relative, temporary)
        os.rename(temporary, target)
    sync_folder(folder)


def _shape_for_rules(entry: Entry) -> tuple[int, ...]:
    """The shape in which rules for whole tensors get a tensor: its own, but embeddings and output heads as vectors."""
    return (entry.elements,) if _EMBEDDING.match(entry.name) else entry.shape


def _whole_memory(entry: Entry, experts: int) -> int:
    """Bytes that merging a whole tensor takes, at most.

    Base and task vectors and a few more of its size in float32; for a matrix a few in float64, and of the size of the
    Gram matrix of its columns (or, where that is smaller, of all experts' rows) too.
    """
    need = 4 * (experts + 4) * entry.elements
    if len(_shape_for_rules(entry)) == 2:
        rows, columns = entry.shape
        need += 8 * (3 * entry.elements + 4 * min(columns, 2 * experts * rows) ** 2)
    return need


def _whole_workers(plan: Plan, device: torch.device) -> int:
    """Number of threads that merge whole tensors side by side; on a GPU, so many that one reads while others compute.

    A small model is worked on with one thread: more would wait for each other, many times as long as they compute.
    """
    import torch

    if device.type != "cpu":
        return 3
    return torch.get_num_threads() if plan.base_elements >= SMALL_MODEL else 1


class _Room:
    """Memory that threads share; each takes what it needs, and waits while the others leave too little."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.taken = 0
        self.changed = threading.Condition()

    @contextmanager
    def taking(self, need: int) -> Iterator[None]:
        """Hold that many bytes; one thread alone may hold more than there are."""
        with self.changed:
            self.changed.wait_for(lambda: not self.taken or self.taken + need <= self.size)
            self.taken += need
        try:
            yield
        finally:
            with self.changed:
                self.taken -= need
                self.changed.notify_all()


class _Merger:
    """Merges the tensors of one file after another, a few blocks at a time."""

    def __init__(self, plan: Plan, rule: Rule, elementwise: bool, device: torch.device, team: Team) -> None:
        self.plan = plan
        self.rule = rule
        self.elementwise = elementwise
        self.team = team
        self.merged = set(plan.merged)
        self.reader = Reader(plan, device)
        self.block = block_entries(device)
        workers = Crew.for_entries(plan.base_elements, device)
        self.crew = workers if elementwise else Crew(_whole_workers(plan, device))
        self.room = _Room(half_of_memory(device) // (team.size if device.type == "cpu" else 1))
        if device.type != "cpu":
            import torch

            torch.linalg.eigh(torch.eye(2, device=device))  # loads the library, which several threads at once must not

    def write(self, file: Path, target: Path, advance: Advance) -> dict[str, float]:
        """Write one shard together with the team; the relative change of each merged tensor."""
        import torch

        base = self.plan.base
        squares = {entry.name: [0.0, 0.0] for entry in base.in_file(file) if entry.name in self.merged}
        writer = self._open(file, target)

        def work(entry: Entry, start: int, stop: int) -> tuple[float, float]:
            if entry.name in self.merged:
                return self._merge(entry, start, stop, writer)
            self._copy(entry, start, stop, writer)
            return 0.0, 0.0

        def done(block: Block, change_and_size: tuple[float, float]) -> None:
            entry, start, stop = block
            if entry.name in self.merged:
                pairs = zip(squares[entry.name], change_and_size, strict=True)
                squares[entry.name] = [before + more for before, more in pairs]
            share = self.team.size * (stop - start) / max(1, self._length(entry))
            advance(share * entry.size * (1 + len(self.plan.experts)), entry.name)

        try:
            self.crew.work_through(self.team.share(self._blocks(file)), work, done)
        except BaseException:
            writer.abandon()
            raise
        own = torch.tensor([*squares.values()], dtype=torch.float64)
        totals = self.team.add(own)  # and by that, all processes have written their blocks
        assert totals is not None  # noqa: S101  (every process brings a tensor)
        if self.team.rank == 0:
            writer.finish()
        else:
            writer.leave()
        return {name: math.sqrt(row[0] / row[1]) if row[1] else 0.0 for name, row in zip(squares, totals, strict=True)}

    def _open(self, file: Path, target: Path) -> ShardWriter:
        """The shard being written: made by the first process, joined by the others."""
        header, size = self.plan.base.headers[file.name], file.stat().st_size
        if self.team.rank == 0:
            writer = ShardWriter(target, header, size)
            self.team.wait()
            return writer
        self.team.wait()
        return ShardWriter(target)

    def _blocks(self, file: Path) -> Iterator[Block]:
        """Pieces of the file's tensors: blocks of entries, whole tensors for other rules, bytes for copies."""
        for entry in self.plan.base.in_file(file):
            length = self._length(entry)
            merged_step = self.block if self.elementwise else max(1, length)
            step = merged_step if entry.name in self.merged else _COPY_BYTES
            for start in range(0, length, step):
                yield entry, start, min(start + step, length)

    def _length(self, entry: Entry) -> int:
        return entry.elements if entry.name in self.merged else entry.size

    def _copy(self, entry: Entry, start: int, stop: int, writer: ShardWriter) -> None:
        import torch

        view = as_bytes(self.reader.host_buffer("copy", stop - start, torch.uint8))
        read_exactly(self.plan.base.descriptor(entry.file), view, entry.offset + start, entry.file)
        writer.write(view, entry.offset + start)

    def _merge(self, entry: Entry, start: int, stop: int, writer: ShardWriter) -> tuple[float, float]:
        """Merge entries ``[start, stop)`` and write them; squared norms of the change and of the base."""
        import torch

        merged = self.reader.host_buffer("merged", stop - start, entry.torch_dtype)
        squares = base_squares = 0.0
        need = 0 if self.elementwise else _whole_memory(entry, len(self.plan.experts))
        with self.room.taking(need), self.reader.streaming():
            for first, last, base, task_vectors in self._pieces(entry, start, stop):
                change = self.rule(task_vectors, Part(entry.name, entry.shape, first, last)).reshape(-1)
                found = torch.stack([torch.dot(change, change), torch.dot(base, base)]).tolist()
                change_squares, squares, base_squares = found[0], squares + found[0], base_squares + found[1]
                merged[first - start : last - start].copy_(base.add_(change), non_blocking=True)
                # Only float16 is so narrow that finite float32 numbers overflow in it.
                doubtful = entry.dtype == "F16" or not math.isfinite(change_squares)
                if doubtful and not torch.isfinite(base.to(entry.torch_dtype)).all():
                    raise InputError(
                        f"the merged {entry.name} does not fit into {entry.dtype} (the base's type); "
                        "use a smaller coefficient"
                    )
        writer.write(as_bytes(merged), entry.offset + start * merged.element_size())
        return squares, base_squares

    def _pieces(self, entry: Entry, start: int, stop: int) -> Iterator[tuple[int, int, Tensor, Tensor]]:
        """Base and task vectors: in steps for element-wise rules, otherwise of the whole tensor."""
        if self.elementwise:
            yield from self.reader.steps(entry.name, start, stop)
        else:
            base, task_vectors = self.reader.read(entry.name, start, stop)
            yield start, stop, base, task_vectors.view(len(task_vectors), *_shape_for_rules(entry))
