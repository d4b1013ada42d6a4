"""Read task vectors in blocks, and count what is in them.

A block's result depends on its entries alone, so results are the same whoever works on which. What a block is read for
is done in steps that fit into a core's cache, in memory that is used again.
"""

from __future__ import annotations

import functools
import math
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any

from expert_merging.checkpoints.checkpoint import Checkpoint
from expert_merging.errors import InputError
from expert_merging.machine import half_of_memory
from expert_merging.parts import Part
from expert_merging.plan import Plan
from expert_merging.processes import ALONE, Processes
from expert_merging.progress import Progress, no_progress
from expert_merging.wholes import MemoryBudget, load_solver, whole_memory, whole_shape, whole_workers
from expert_merging.workers import Workers, shared_zeros

if TYPE_CHECKING:
    import torch
    from torch import Tensor

# Entries of one block, which a worker reads, merges and writes at a time: many, since reading and writing a block costs
# about as much as merging some ten thousand entries.
BLOCK = 1 << 19
# Entries of a block that a worker computes with at a time: few, so that the numbers of all experts (3 MB for five) stay
# in a cache from the first operation to the last, but enough to outweigh the calls. 1 << 16 took up to a tenth longer.
STEP = 1 << 17
# A GPU computes with a whole block at a time.
GPU_BLOCK = 1 << 22


def block_entries(device: torch.device) -> int:
    """Entries of one block on that device."""
    return BLOCK if device.type == "cpu" else GPU_BLOCK


def read_rows(
    sources: Sequence[tuple[Checkpoint, str]],
    part: Part,
    memory: Callable[[int, tuple[int, int], torch.dtype], Tensor],
) -> list[Tensor]:
    """A part of a tensor as several checkpoints store it.

    Args:
        sources: the checkpoints, and the tensor's name in each.
        part: the entries.
        memory: ``(number of the matrix, shape, type) -> matrix`` to read into.

    Returns:
        Matrices ``(checkpoints, entries)``, one for each run of checkpoints that store the same type.
    """
    matrices = []
    groups = groupby(sources, key=lambda source: source[0].entries[source[1]].torch_dtype)
    for number, (dtype, group) in enumerate(groups):
        alike = list(group)
        matrix = memory(number, (len(alike), part.entries), dtype)
        for row, (checkpoint, stored) in zip(matrix, alike, strict=True):
            checkpoint.read_into(row, stored, part.start)
        matrices.append(matrix)
    return matrices


def in_float32(
    stored: Sequence[Tensor], start: int, rows: Tensor, *, are_differences: bool = False
) -> tuple[Tensor, Tensor]:
    """Stored entries as base and task vectors.

    Args:
        stored: result of `read_rows`, the base's row first.
        start: first entry that is wanted.
        rows: float32 memory ``(checkpoints, entries)`` for them.
        are_differences: all rows but the base's are task vectors already.

    Returns:
        The base's entries ``(entries,)`` and the task vectors ``(experts, entries)``, which are the given memory.
    """
    import torch

    run = slice(start, start + rows.shape[1])
    for converted, matrix in zip(torch.split(rows, [len(matrix) for matrix in stored]), stored, strict=True):
        converted.copy_(matrix[:, run])
    base, task_vectors = rows[0], rows[1:]
    if not are_differences:
        task_vectors.sub_(base)  # apart from the conversion: a CPU is slow where types are mixed
    return base, task_vectors


class Reader(threading.local):
    """Reads the base and all experts, block by block, into buffers that each thread has for itself and uses again.

    Fresh memory for every block would cost more than the arithmetic, since the system hands it out page by page. On a
    GPU, buffers on the host are pinned and each thread has a stream, so that the threads' copies and computations
    overlap; use the reader inside ``with reader.streaming():``.

    Args:
        plan: checkpoints and parameters.
        device: where the arithmetic is done.
    """

    def __init__(self, plan: Plan, device: torch.device) -> None:
        self.plan = plan
        self.device = device
        self.checkpoints = (plan.base, *plan.experts.values())
        self.stream = None if device.type == "cpu" else _stream(device, Workers.number())
        self._buffers: dict[str, Tensor] = {}

    @contextmanager
    def streaming(self) -> Iterator[None]:
        """Work on this thread's stream; at the end, all work is done."""
        import torch

        if self.stream is None:
            yield
            return
        with torch.cuda.stream(self.stream):
            yield
            self.stream.synchronize()

    def host_buffer(self, role: str, entries: int, dtype: torch.dtype) -> Tensor:
        """Memory of the host for some entries ``(entries,)``, until this thread asks for the same role again."""
        import torch

        size = entries * dtype.itemsize
        if role not in self._buffers or len(self._buffers[role]) < size:
            self._buffers[role] = torch.empty(size, dtype=torch.uint8, pin_memory=self.stream is not None)
        return self._buffers[role][:size].view(dtype)

    def steps(self, part: Part, *, rows: bool = False) -> Iterator[tuple[Part, Tensor, Tensor]]:
        """The entries of a part in pieces that are computed with at a time.

        Args:
            part: the entries.
            rows: pieces are whole rows, as the part is.

        Yields:
            The piece, the base's entries ``(entries,)`` and all task vectors' ``(experts, entries)`` in float32. Both
            may be overwritten, and are by the next piece.

        Raises:
            InputError: NaN or infinite values.
        """
        step = part.whole_rows(STEP) if rows else STEP
        is_on_cpu = self.stream is None
        pieces = self._convert_in_steps(part, step) if is_on_cpu else iter([(part, *self._convert_on_gpu(part))])
        for piece, base, task_vectors in pieces:
            # A sum is NaN or infinite if one entry is, and costs one pass; only then is the culprit looked for. To
            # know it, the host waits for the copies to the device, so that its buffers can be used again.
            if not math.isfinite((task_vectors if len(task_vectors) else base).sum()):
                _refuse_non_finite(self.plan, piece, task_vectors)
            yield piece, base, task_vectors

    def _convert_in_steps(self, part: Part, step: int) -> Iterator[tuple[Part, Tensor, Tensor]]:
        import torch

        stored = self._stored(part)
        for piece in part.cut(step):
            shape = len(self.checkpoints), piece.entries
            rows = self.host_buffer("rows", shape[0] * shape[1], torch.float32).view(shape)
            yield piece, *in_float32(stored, piece.start - part.start, rows)

    def _convert_on_gpu(self, part: Part) -> tuple[Tensor, Tensor]:
        """All at once, in few calls, since other threads wait meanwhile; the device converts."""
        import torch

        rows = torch.empty(len(self.checkpoints), part.entries, device=self.device)
        stored = [matrix.to(self.device, non_blocking=True) for matrix in self._stored(part)]
        return in_float32(stored, 0, rows)

    def _stored(self, part: Part) -> list[Tensor]:
        def memory(number: int, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
            return self.host_buffer(f"files {number}", shape[0] * shape[1], dtype).view(shape)

        return read_rows([(checkpoint, part.name) for checkpoint in self.checkpoints], part, memory)

    def read(self, part: Part) -> tuple[Tensor, Tensor]:
        """The base's entries of a part, ``(entries,)``, and all task vectors', ``(experts, entries)``.

        Returns:
            float32, in memory of their own.

        Raises:
            InputError: NaN or infinite values.
        """
        import torch

        base = torch.empty(part.entries, device=self.device)
        task_vectors = torch.empty(len(self.checkpoints) - 1, part.entries, device=self.device)
        for block in part.cut(block_entries(self.device)):
            for piece, some_base, some_task_vectors in self.steps(block):
                run = slice(piece.start - part.start, piece.stop - part.start)
                base[run] = some_base
                task_vectors[:, run] = some_task_vectors
        return base, task_vectors


@functools.cache
def _stream(device: torch.device, _worker: int) -> torch.cuda.Stream:
    """A worker's stream, the same in every pass: torch keeps freed memory for each of them."""
    import torch

    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


def _refuse_non_finite(plan: Plan, part: Part, task_vectors: Tensor) -> None:
    """Say which checkpoint has NaN or infinite values; return where only the sum of all differences overflowed."""
    import torch

    name = part.name
    for expert, checkpoint in {"the base": plan.base, **plan.experts}.items():
        bad = ~torch.isfinite(checkpoint.read(name, part.start, part.stop).double())
        if bad.any():
            who = expert if checkpoint is plan.base else f"expert {expert}"
            count = int(bad.sum())
            raise InputError(f"{who} has {count} NaN or infinite values in {name} ({checkpoint.entries[name].file})")
    if not torch.isfinite(task_vectors).all():
        raise InputError(f"experts differ from the base in {name} by more than float32 can hold")


@dataclass(frozen=True)
class Passes:
    """Streaming passes over all task vectors, for what needs something of the whole model before it merges.

    Args:
        plan: checkpoints and parameters.
        device: where the arithmetic is done.
        progress: shows throughput in bytes read.
        processes: the processes that share the work.
    """

    plan: Plan
    device: torch.device
    progress: Progress
    processes: Processes = ALONE

    @property
    def expert_names(self) -> tuple[str, ...]:
        """Names of the experts, in the order of the rows."""
        return tuple(self.plan.experts)

    @property
    def sizes(self) -> dict[str, int]:
        """Number of entries of every merged tensor by name."""
        return {name: self.plan.base.entries[name].elements for name in self.plan.merged}

    def go_through(
        self,
        look: Callable[[Tensor, Part], Any],
        done: Callable[[Any], None],
        *,
        title: str,
        only: str | None = None,
        sample: int = 1,
        workers: Workers | None = None,
    ) -> None:
        """Show every piece of all merged tensors, or of a single one, to a function.

        Args:
            look: ``(task_vectors (experts, entries), part) -> what is found``, called from any worker. The task vectors
                may be overwritten.
            done: told of everything found but None, in this process, of this process's share.
            title: shown beside the progress bar.
            only: name of the single tensor, for which no bar is shown.
            sample: look at the first one of so many entries of each block, rounded up.
            workers: who looks; by default as many as suit the entries.
        """
        blocks = [
            block.between(block.start, block.start + -(-block.entries // sample))
            for block in self._blocks([only] if only else self.plan.merged)
        ]
        workers = workers or self.workers(only, sample)

        def tell(_block: Part, found: list[Any]) -> None:
            for result in found:
                if result is not None:
                    done(result)

        progress = self.progress if only is None else no_progress
        self._look(lambda piece, _, task_vectors: look(task_vectors, piece), blocks, tell, workers, title, progress)

    def sums(
        self, measure: Callable[[Tensor, Tensor, Part], Tensor], shape: tuple[int, ...], title: str
    ) -> dict[str, Tensor]:
        """Sums over all entries of each merged tensor, by its name.

        They are added in the order of the entries, so that they do not depend on who measured which.

        Args:
            measure: ``(base (entries,), task_vectors (experts, entries), part) -> sums over these entries (*shape)``,
                called from any worker. Base and task vectors may be overwritten.
            shape: shape of the sums, which are float64 on the CPU.
            title: as for `go_through`.
        """
        import torch

        blocks = self._blocks(self.plan.merged)
        places = {block: place for place, block in enumerate(blocks)}
        own = torch.zeros(len(blocks), *shape, dtype=torch.float64)

        def tell(block: Part, found: list[Any]) -> None:
            for numbers in found:
                own[places[block]] += torch.from_numpy(numbers)

        def look(piece: Part, base: Tensor, task_vectors: Tensor) -> Any:
            return measure(base, task_vectors, piece).double().cpu().numpy()  # arrays go between processes as bytes

        self._look(look, blocks, tell, self.workers(), title, self.progress)
        totals = {name: torch.zeros(shape, dtype=torch.float64) for name in self.plan.merged}
        for block, found in zip(blocks, self.processes.add(own), strict=True):  # of the others' blocks, zeros
            totals[block.name] += found
        return totals

    def measure_wholes(
        self, measure: Callable[[Tensor, Part], Tensor], shape: tuple[int, ...], title: str
    ) -> dict[str, Tensor]:
        """Numbers of each merged tensor that has entries, which is measured as a whole, by its name.

        Args:
            measure: ``(task_vectors (experts, *shape), part) -> numbers (*shape)``, called from several threads, with
                tables of words as vectors. The task vectors may be overwritten.
            shape: shape of the numbers, which are float64 on the CPU.
            title: as for `go_through`.
        """
        import torch

        parts = [part for part in map(self.plan.part, self.plan.merged) if part.elements]
        places = {part: place for place, part in enumerate(parts)}
        own = torch.zeros(len(parts), *shape, dtype=torch.float64)
        sharing = self.processes.size if self.device.type == "cpu" else 1
        reader, memory = Reader(self.plan, self.device), MemoryBudget(half_of_memory(self.device) // sharing)
        load_solver(self.device)

        def work(part: Part) -> Tensor:
            need = whole_memory(self.plan.base.entries[part.name], len(self.plan.experts))
            with memory.taking(need), reader.streaming():
                _, task_vectors = reader.read(part)
                return measure(task_vectors.view(len(task_vectors), *whole_shape(part)), part).double().cpu()

        with self.progress(title, sum(map(self._bytes_of, parts)), "B") as advance:

            def tell(part: Part, numbers: Tensor) -> None:
                advance(self.processes.size * self._bytes_of(part), part.name)
                own[places[part]] = numbers

            workers = Workers(whole_workers(self.plan.base_elements, self.device))
            workers.work_through(self.processes.share(parts), work, tell)
        totals = self.processes.add(own)  # of the others' tensors, zeros
        return {part.name: numbers for part, numbers in zip(parts, totals, strict=True)}

    def _bytes_of(self, part: Part) -> float:
        """Bytes of a part in all checkpoints."""
        return (1 + len(self.plan.experts)) * self.plan.base.entries[part.name].size * part.entries / part.elements

    def _blocks(self, names: Iterable[str]) -> list[Part]:
        return [block for name in names for block in self.plan.part(name).cut(block_entries(self.device))]

    def _look(
        self,
        look: Callable[[Part, Tensor, Tensor], Any],
        blocks: list[Part],
        done: Callable[[Part, list[Any]], None],
        workers: Workers,
        title: str,
        progress: Progress,
    ) -> None:
        """Show every piece of this process's share to a function: ``look(piece, base, task_vectors)``."""
        reader = Reader(self.plan, self.device)

        def work(part: Part) -> list[Any]:
            with reader.streaming():
                return [look(*piece) for piece in reader.steps(part)]

        with progress(title, sum(map(self._bytes_of, blocks)), "B") as advance:

            def tell(block: Part, found: list[Any]) -> None:
                advance(self.processes.size * self._bytes_of(block), block.name)
                done(block, found)

            workers.work_through(self.processes.share(blocks), work, tell)

    def workers(self, only: str | None = None, sample: int = 1) -> Workers:
        """Who goes through all merged tensors, or a single one."""
        entries = self.sizes[only] if only else self.plan.merged_elements
        return Workers.for_entries(entries // sample, self.device)

    def total(
        self,
        count: Callable[[Tensor, Part, Tensor], Any],
        shape: tuple[int, ...],
        title: str,
        only: str | None = None,
        sample: int = 1,
        keep: Callable[[Any], None] = lambda _: None,
    ) -> Tensor:
        """Counts over all pieces of all merged tensors, or of a single one.

        Args:
            count: ``(task_vectors (experts, entries), part, counts)``, adds to the counts, which are on the CPU, and
                may return something.
            shape: shape of the counts; they are int64, so that the sum does not depend on the order of the pieces.
            title: as for `go_through`.
            only: as for `go_through`.
            sample: as for `go_through`.
            keep: told in this process of everything but None that the count returned for its pieces.

        Returns:
            The counts.
        """
        import torch

        workers = self.workers(only, sample)
        # Each worker counts for itself: adding up large counts after every block would cost more than counting.
        rows = shared_zeros((workers.size, *shape), torch.int64)
        self.go_through(
            lambda task_vectors, part: count(task_vectors, part, rows[Workers.number()]),
            keep,
            title=title,
            only=only,
            sample=sample,
            workers=workers,
        )
        return self.processes.add(rows.sum(0))
