"""Apply one rule to every merged parameter and write the base's mirror image.

Element-wise rules are fed blocks, so memory does not depend on the largest tensor; other rules get whole tensors.
Blocks are read, merged and written by a few threads, each with its own buffers; a block's result depends on its
entries alone, so the bytes are the same whatever the number of threads, and a run that was interrupted continues with
the shards that are missing.
"""

from __future__ import annotations

import logging
import math
import os
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from expert_merging.checkpoint import (
    INDEX,
    SINGLE,
    Checkpoint,
    Entry,
    check_experts,
    check_other_files,
    other_files,
    read_exactly,
)
from expert_merging.errors import InputError, Problems
from expert_merging.writing import ShardWriter, partial_name, sync_folder

if TYPE_CHECKING:
    import torch
    from torch import Tensor

logger = logging.getLogger(__name__)

# Entries of one block. Few enough that the blocks of base and experts stay in a core's cache, enough to keep calls
# rare.
BLOCK = 1 << 17
_COPY_BYTES = 1 << 22


@dataclass(frozen=True)
class Part:
    """Which entries of which tensor a rule is given.

    Args:
        name: tensor name.
        shape: shape of the whole tensor.
        start: first entry of the flattened tensor.
        stop: end of the entries.
    """

    name: str
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def elements(self) -> int:
        """Number of entries of the whole tensor."""
        return math.prod(self.shape)


class Rule(Protocol):
    """Turns task vectors ``(experts, entries)`` (whole tensors: ``(experts, *shape)``) into the merged task vector."""

    def __call__(self, task_vectors: Tensor, part: Part, /) -> Tensor:
        """Merge one part."""
        ...


Advance = Callable[..., None]


class Progress(Protocol):
    """Shows how far a piece of work is: ``with progress(title, total, unit) as advance: advance(count, note)``."""

    def __call__(self, title: str, total: float, unit: str) -> AbstractContextManager[Advance]:
        """Start a piece of work of ``total`` units."""
        ...


@dataclass(frozen=True)
class Plan:
    """What is merged, checked from headers alone.

    Args:
        base: the base model.
        experts: expert checkpoints by name, in order.
        merged: names of the tensors to merge, in the order of the base's files.
    """

    base: Checkpoint
    experts: Mapping[str, Checkpoint]
    merged: tuple[str, ...]

    @property
    def output_bytes(self) -> int:
        """Size of the merged weight files."""
        return sum(file.stat().st_size for file in self.base.files)

    @property
    def merged_elements(self) -> int:
        """Number of entries that are merged."""
        return sum(self.base.entries[name].elements for name in self.merged)


def make_plan(base_folder: Path, expert_folders: Mapping[str, Path], excluded: list[str]) -> Plan:
    """Open all checkpoints and check that they fit together.

    Raises:
        InputError: every problem found in any of them.
    """
    problems = Problems()
    opened: dict[str, Checkpoint] = {}
    for name, folder in {"": base_folder, **expert_folders}.items():
        with problems.collecting():
            opened[name] = Checkpoint(folder)
    if not expert_folders:
        problems.add("there is nothing to merge: give at least one --expert NAME=PATH")
    if len(opened) > 1 and "" in opened:
        base = opened.pop("")
        with problems.collecting():
            check_other_files(base.folder)
        with problems.collecting():
            merged = check_experts(base, opened, excluded)
    problems.check()
    return Plan(base, opened, tuple(merged))


@dataclass
class Summary:
    """What a merge did.

    Args:
        changes: relative change ``norm(merged - base) / norm(base)`` of every tensor merged in this session, by name.
        kept_shards: shards that an earlier, interrupted run had finished.
    """

    changes: dict[str, float] = field(default_factory=dict)
    kept_shards: int = 0


def working_memory(plan: Plan, *, elementwise: bool) -> int:
    """Bytes of float32 working memory that merging needs, whatever the size of the model for element-wise rules."""
    largest = max(plan.base.entries[name].elements for name in plan.merged)
    copies = len(plan.experts) + 4
    return 4 * copies * (min(BLOCK, largest) * _worker_count() if elementwise else largest)


def _worker_count() -> int:
    return max(2, min(8, os.cpu_count() or 1))


def write_merged(
    plan: Plan, rule: Rule, folder: Path, *, elementwise: bool, device: torch.device, progress: Progress
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

    Raises:
        InputError: NaN or infinite values, named by expert and tensor.
    """
    folder.mkdir(parents=True, exist_ok=True)
    summary = Summary()
    merger = _Merger(plan, rule, elementwise, device)
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


class _Merger:
    """Merges the tensors of one file after another, a few blocks at a time."""

    def __init__(self, plan: Plan, rule: Rule, elementwise: bool, device: torch.device) -> None:
        self.plan = plan
        self.rule = rule
        self.elementwise = elementwise
        self.device = device
        self.merged = set(plan.merged)
        self.lock = threading.Lock()
        self.workers = _worker_count() if elementwise else 1

    def write(self, file: Path, target: Path, advance: Advance) -> dict[str, float]:
        """Write one shard; the relative change of each merged tensor."""
        base = self.plan.base
        norms = {entry.name: [0.0, 0.0] for entry in base.in_file(file) if entry.name in self.merged}
        writer = ShardWriter(target, base.headers[file.name], file.stat().st_size)

        def work(entry: Entry, start: int, stop: int) -> None:
            if entry.name in self.merged:
                change, size = self._merge(entry, start, stop, writer)
                with self.lock:
                    norms[entry.name][0] += change
                    norms[entry.name][1] += size
            else:
                self._copy(entry, start, stop, writer)
            with self.lock:
                share = (stop - start) / max(1, self._length(entry))
                advance(share * entry.size * (1 + len(self.plan.experts)), entry.name)

        try:
            _work_through(self._blocks(file), work, workers=self.workers, alone=self.elementwise)
        except BaseException:
            writer.abandon()
            raise
        writer.finish()
        return {name: math.sqrt(change / size) if size else 0.0 for name, (change, size) in norms.items()}

    def _blocks(self, file: Path) -> Iterator[tuple[Entry, int, int]]:
        """Pieces of the file's tensors: blocks of entries, whole tensors for other rules, bytes for copies."""
        for entry in self.plan.base.in_file(file):
            length = self._length(entry)
            merged_step = BLOCK if self.elementwise else max(1, length)
            step = merged_step if entry.name in self.merged else _COPY_BYTES
            for start in range(0, length, step):
                yield entry, start, min(start + step, length)

    def _length(self, entry: Entry) -> int:
        return entry.elements if entry.name in self.merged else entry.size

    def _copy(self, entry: Entry, start: int, stop: int, writer: ShardWriter) -> None:
        buffer = memoryview(bytearray(stop - start))
        read_exactly(self.plan.base.descriptor(entry.file), buffer, entry.offset + start, entry.file)
        writer.write(buffer, entry.offset + start)

    def _merge(self, entry: Entry, start: int, stop: int, writer: ShardWriter) -> tuple[float, float]:
        """Merge entries ``[start, stop)`` and write them; squared norms of the change and of the base."""
        import torch

        base, task_vectors = _read_task_vectors(self.plan, entry.name, start, stop, self.device)
        part = Part(entry.name, entry.shape, start, stop)
        shaped = task_vectors if self.elementwise else task_vectors.view(len(task_vectors), *entry.shape)
        change = self.rule(shaped, part).reshape(-1)
        squares, base_squares = float(torch.dot(change, change)), float(torch.dot(base, base))
        merged = base.add_(change).to(entry.torch_dtype)
        # Only float16 is so narrow that finite float32 numbers overflow in it.
        if (entry.dtype == "F16" or not math.isfinite(squares)) and not torch.isfinite(merged).all():
            raise InputError(
                f"the merged {entry.name} does not fit into {entry.dtype} (the base's type); use a smaller coefficient"
            )
        data = memoryview(merged.cpu().view(torch.uint8).numpy())  # type: ignore[arg-type]
        writer.write(data, entry.offset + start * merged.element_size())
        return squares, base_squares


def _read_task_vectors(plan: Plan, name: str, start: int, stop: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """The base's entries ``[start, stop)``, ``(entries,)``, and all task vectors', ``(experts, entries)``; float32."""
    import torch

    base = plan.base.read(name, start, stop).to(device).float()
    task_vectors = torch.empty(len(plan.experts), stop - start, device=device)
    for row, expert in zip(task_vectors, plan.experts.values(), strict=True):
        # Converting and subtracting apart is faster than one subtraction of mixed types.
        row.copy_(expert.read(name, start, stop)).sub_(base)
    # A sum is NaN or infinite if one entry is, and costs one pass; only then is the culprit looked for.
    if not torch.isfinite(task_vectors.sum()):
        _refuse_non_finite(plan, name, start, stop)
    return base, task_vectors


def _refuse_non_finite(plan: Plan, name: str, start: int, stop: int) -> None:
    """Say which checkpoint has NaN or infinite values; return where only the float32 sum overflowed."""
    import torch

    for expert, checkpoint in {"the base": plan.base, **plan.experts}.items():
        bad = ~torch.isfinite(checkpoint.read(name, start, stop).double())
        if bad.any():
            who = expert if checkpoint is plan.base else f"expert {expert}"
            count = int(bad.sum())
            raise InputError(f"{who} has {count} NaN or infinite values in {name} ({checkpoint.entries[name].file})")


def _work_through(
    blocks: Iterator[tuple[Entry, int, int]], work: Callable[[Entry, int, int], None], *, workers: int, alone: bool
) -> None:
    """Work through blocks with a few threads, at most a few blocks ahead, and stop at the first error.

    Args:
        blocks: arguments of the work.
        work: called once for each block, from any thread.
        workers: number of threads.
        alone: each call computes with one thread, as many calls run side by side; otherwise with torch's own threads.
    """
    import torch

    settings = (torch.set_num_threads, (1,)) if alone else (None, ())
    threads = torch.get_num_threads()
    with ThreadPoolExecutor(workers, "merge", *settings) as pool:
        pending: set[Future[None]] = set()
        try:
            for block in blocks:
                pending.add(pool.submit(work, *block))
                if len(pending) >= 4 * workers:
                    done, pending = wait(pending, return_when="FIRST_COMPLETED")
                    for future in done:
                        future.result()
            for future in wait(pending, return_when=FIRST_EXCEPTION).done:
                future.result()
        finally:
            pool.shutdown(cancel_futures=True)
            torch.set_num_threads(threads)


@dataclass(frozen=True)
class Passes:
    """Streaming passes over all task vectors, for methods that need something of the whole model before they merge.

    Args:
        plan: checkpoints and parameters.
        device: where the arithmetic is done.
        progress: shows throughput in bytes read.
    """

    plan: Plan
    device: torch.device
    progress: Progress

    @property
    def expert_names(self) -> tuple[str, ...]:
        """Names of the experts, in the order of the rows."""
        return tuple(self.plan.experts)

    @property
    def sizes(self) -> dict[str, int]:
        """Number of entries of every merged tensor by name."""
        return {name: self.plan.base.entries[name].elements for name in self.plan.merged}

    def total(self, function: Callable[[Tensor, Part], Tensor], title: str, only: str | None = None) -> Tensor | None:
        """Sum of a function over all blocks of all merged tensors, or of a single one.

        Args:
            function: ``(task_vectors (experts, entries), part) -> tensor`` of one shape and an exact type (whole
                numbers or float64), so that the sum does not depend on the order of the blocks.
            title: shown beside the progress bar.
            only: name of the single tensor.

        Returns:
            The sum, None where there is no entry.
        """
        entries = [self.plan.base.entries[name] for name in ([only] if only else self.plan.merged)]
        totals: list[Tensor] = []
        lock = threading.Lock()
        width = 1 + len(self.plan.experts)

        def work(entry: Entry, start: int, stop: int) -> None:
            _, task_vectors = _read_task_vectors(self.plan, entry.name, start, stop, self.device)
            value = function(task_vectors, Part(entry.name, entry.shape, start, stop))
            with lock:
                totals[:] = [totals[0].add_(value)] if totals else [value]
                advance(width * entry.size * (stop - start) / entry.elements, entry.name)

        blocks = (
            (entry, start, min(start + BLOCK, entry.elements))
            for entry in entries
            for start in range(0, entry.elements, BLOCK)
        )
        with self.progress(title, width * sum(entry.size for entry in entries), "B") as advance:
            _work_through(blocks, work, workers=_worker_count(), alone=True)
        return totals[0] if totals else None
