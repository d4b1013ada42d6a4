"""Read task vectors in blocks, and count what is in them.

A block's result depends on its entries alone, so results are the same whoever works on which. What a block is read for
is done in steps that fit into a core's cache, in memory that is used again.
"""

from __future__ import annotations

import functools
import math
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from expert_merging.checkpoint import Entry
from expert_merging.crew import Block, Crew, shared_zeros
from expert_merging.errors import InputError
from expert_merging.plan import Part, Plan, Progress

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


@dataclass(frozen=True)
class Team:
    """The processes that share a merge; a single one by default.

    Args:
        rank: number of this process.
        size: number of processes.
    """

    rank: int = 0
    size: int = 1

    def share(self, blocks: Iterable[Block]) -> list[Block]:
        """The blocks of this process: the largest first, each goes to the process with the fewest entries so far."""
        loads = [0] * self.size
        own = []
        for block in sorted(blocks, key=lambda block: block[1] - block[2]):
            lightest = loads.index(min(loads))
            loads[lightest] += block[2] - block[1]
            if lightest == self.rank:
                own.append(block)
        return own

    def wait(self) -> None:
        """Go on when all processes are here."""
        if self.size > 1:
            import torch

            torch.distributed.barrier()

    def part(self) -> None:
        """Close the connections; without this, a process that ends early can break one that does not."""
        if self.size > 1:
            import torch

            torch.distributed.barrier()
            torch.distributed.destroy_process_group()

    def add(self, value: Tensor | None) -> Tensor | None:
        """Sum of the processes' tensors, in every process; None counts as nothing."""
        if self.size == 1:
            return value
        import torch

        gathered: list[Tensor | None] = [None] * self.size
        torch.distributed.all_gather_object(gathered, value)
        present = [tensor for tensor in gathered if tensor is not None]
        return torch.stack(present).sum(0) if present else None


ALONE = Team()


def block_entries(device: torch.device) -> int:
    """Entries of one block on that device."""
    return BLOCK if device.type == "cpu" else GPU_BLOCK


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
        self.stream = None if device.type == "cpu" else _stream(device, Crew.number())
        self._buffers: dict[str, Tensor] = {}
        self._spaces: dict[int, tuple[Tensor, Tensor, tuple[Tensor, ...]]] = {}

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

    def steps(self, name: str, start: int, stop: int) -> Iterator[tuple[int, int, Tensor, Tensor]]:
        """The entries ``[start, stop)`` of a tensor in pieces that are computed with at a time.

        Yields:
            First entry and end of a piece, the base's entries ``(entries,)`` and all task vectors' ``(experts,
            entries)`` in float32. Both may be overwritten, and are by the next piece.

        Raises:
            InputError: NaN or infinite values.
        """
        if self.stream is None:
            pieces = self._convert_in_steps(name, start, stop)
        else:
            pieces = iter([(start, stop, *self._convert_on_gpu(name, start, stop))])
        for first, last, base, task_vectors in pieces:
            # A sum is NaN or infinite if one entry is, and costs one pass; only then is the culprit looked for. To
            # know it, the host waits for the copies to the device, so that its buffers can be used again.
            if not math.isfinite(task_vectors.sum()):
                _refuse_non_finite(self.plan, name, first, last, task_vectors)
            yield first, last, base, task_vectors

    def _convert_in_steps(self, name: str, start: int, stop: int) -> Iterator[tuple[int, int, Tensor, Tensor]]:
        import torch

        pieces = []
        for number, checkpoint in enumerate(self.checkpoints):
            buffer = self.host_buffer(f"file {number}", stop - start, checkpoint.entries[name].torch_dtype)
            checkpoint.read_into(buffer, name, start)
            pieces.append(buffer)
        experts = len(pieces) - 1
        for first in range(0, stop - start, STEP):
            entries = min(STEP, stop - start - first)
            if entries not in self._spaces:
                base = self.host_buffer("base", entries, torch.float32)
                task_vectors = self.host_buffer("task vectors", experts * entries, torch.float32).view(experts, entries)
                self._spaces = {entries: (base, task_vectors, task_vectors.unbind())}
            base, task_vectors, rows = self._spaces[entries]
            base.copy_(pieces[0][first : first + entries])
            for row, piece in zip(rows, pieces[1:], strict=True):
                # Converting and subtracting apart is faster than one subtraction of mixed types.
                row.copy_(piece[first : first + entries]).sub_(base)
            yield start + first, start + first + entries, base, task_vectors

    def _convert_on_gpu(self, name: str, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """All at once, in few calls: while one thread makes them, the others wait."""
        import torch

        count, dtypes = len(self.checkpoints), [checkpoint.entries[name].torch_dtype for checkpoint in self.checkpoints]
        if len(set(dtypes)) == 1:
            given = self.host_buffer("files", count * (stop - start), dtypes[0]).view(count, stop - start)
            for checkpoint, row in zip(self.checkpoints, given, strict=True):
                checkpoint.read_into(row, name, start)
            rows = given.to(self.device, non_blocking=True).float()
        else:
            rows = torch.empty(count, stop - start, device=self.device)
            for number, (checkpoint, row) in enumerate(zip(self.checkpoints, rows, strict=True)):
                buffer = self.host_buffer(f"file {number}", stop - start, dtypes[number])
                checkpoint.read_into(buffer, name, start)
                row.copy_(buffer.to(self.device, non_blocking=True))  # converted there, and not by the host
        return rows[0], rows[1:].sub_(rows[0])

    def read(self, name: str, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """The base's entries ``[start, stop)``, ``(entries,)``, and all task vectors', ``(experts, entries)``.

        Returns:
            float32, in memory of their own.

        Raises:
            InputError: NaN or infinite values.
        """
        import torch

        base = torch.empty(stop - start, device=self.device)
        task_vectors = torch.empty(len(self.checkpoints) - 1, stop - start, device=self.device)
        block = block_entries(self.device)
        for begin in range(start, stop, block):
            for first, last, some_base, some_task_vectors in self.steps(name, begin, min(begin + block, stop)):
                base[first - start : last - start] = some_base
                task_vectors[:, first - start : last - start] = some_task_vectors
        return base, task_vectors


@functools.cache
def _stream(device: torch.device, _worker: int) -> torch.cuda.Stream:
    """A worker's stream, the same in every pass: torch keeps freed memory for each of them."""
    import torch

    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


def read_task_vectors(plan: Plan, name: str, start: int, stop: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """What `Reader.read` returns, for a single call."""
    reader = Reader(plan, device)
    with reader.streaming():
        return reader.read(name, start, stop)


def _refuse_non_finite(plan: Plan, name: str, start: int, stop: int, task_vectors: Tensor) -> None:
    """Say which checkpoint has NaN or infinite values; return where only the sum of all differences overflowed."""
    import torch

    for expert, checkpoint in {"the base": plan.base, **plan.experts}.items():
        bad = ~torch.isfinite(checkpoint.read(name, start, stop).double())
        if bad.any():
            who = expert if checkpoint is plan.base else f"expert {expert}"
            count = int(bad.sum())
            raise InputError(f"{who} has {count} NaN or infinite values in {name} ({checkpoint.entries[name].file})")
    if not torch.isfinite(task_vectors).all():
        raise InputError(f"experts differ from the base in {name} by more than float32 can hold")


@dataclass(frozen=True)
class Passes:
    """Streaming passes over all task vectors, for methods that need something of the whole model before they merge.

    Args:
        plan: checkpoints and parameters.
        device: where the arithmetic is done.
        progress: shows throughput in bytes read.
        team: the processes that share the work.
    """

    plan: Plan
    device: torch.device
    progress: Progress
    team: Team = ALONE

    @property
    def expert_names(self) -> tuple[str, ...]:
        """Names of the experts, in the order of the rows."""
        return tuple(self.plan.experts)

    @property
    def sizes(self) -> dict[str, int]:
        """Number of entries of every merged tensor by name."""
        return {name: self.plan.base.entries[name].elements for name in self.plan.merged}

    def total(
        self,
        count: Callable[[Tensor, Part, Tensor], Any],
        shape: tuple[int, ...],
        title: str,
        only: str | None = None,
        sample: int = 1,
        keep: Callable[[Any], None] = lambda _: None,
    ) -> Tensor:
        """Counts over all blocks of all merged tensors, or of a single one.

        Args:
            count: ``(task_vectors (experts, entries), part, counts)``, adds to the counts, which are on the CPU, and
                may return something.
            shape: shape of the counts; they are int64, so that the sum does not depend on the order of the blocks.
            title: shown beside the progress bar.
            only: name of the single tensor, for which no bar is shown.
            sample: count the first one of so many entries of each block, rounded up.
            keep: told in this process of everything but None that the count returned for its blocks.

        Returns:
            The counts.
        """
        import torch

        entries = [self.plan.base.entries[name] for name in ([only] if only else self.plan.merged)]
        width = 1 + len(self.plan.experts)
        reader = Reader(self.plan, self.device)
        crew = Crew.for_entries(sum(entry.elements for entry in entries) // sample, self.device)
        # Each worker counts for itself: adding up large counts after every block would cost more than counting.
        rows = shared_zeros((crew.size, *shape), torch.int64)

        def work(entry: Entry, start: int, stop: int) -> list[Any]:
            with reader.streaming():
                return [
                    count(task_vectors, Part(entry.name, entry.shape, first, last), rows[Crew.number()])
                    for first, last, _, task_vectors in reader.steps(entry.name, start, stop)
                ]

        block = block_entries(self.device)
        blocks = [
            (entry, start, start - (start - min(start + block, entry.elements)) // sample)
            for entry in entries
            for start in range(0, entry.elements, block)
        ]

        def share(entry: Entry, start: int, stop: int) -> float:
            return width * entry.size * (stop - start) / entry.elements

        size = sum(share(*block) for block in blocks)
        with self.progress(title, size, "B") if only is None else nullcontext(no_advance) as advance:

            def done(block: Block, returned: list[Any]) -> None:
                advance(self.team.size * share(*block), block[0].name)
                for result in returned:
                    if result is not None:
                        keep(result)

            crew.work_through(self.team.share(blocks), work, done)
        of_team = self.team.add(rows.sum(0))
        assert of_team is not None  # noqa: S101  (every process brings counts)
        return of_team


def no_advance(_count: float, _note: str = "") -> None:
    """Progress that is not shown."""
