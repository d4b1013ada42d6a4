"""Read task vectors in blocks with a few threads, and share the blocks among processes.

A block's result depends on its entries alone, so results are the same whatever the number of threads and processes.
What a block is read for is done in steps that fit into a core's cache, in memory that is used again.
"""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from expert_merging.checkpoint import Entry
from expert_merging.errors import InputError
from expert_merging.plan import Part, Plan, Progress

if TYPE_CHECKING:
    import torch
    from torch import Tensor

# Entries of one block, which a thread reads, merges and writes at a time: many, since handing out a block costs about
# as much as merging some ten thousand entries.
BLOCK = 1 << 19
# Entries of a block that a thread computes with at a time: few, so that the numbers of all experts stay in a core's
# cache from the first operation to the last, but enough to outweigh the calls.
STEP = 1 << 16
# A GPU computes with a whole block at a time, and it takes millions of entries to keep one busy.
GPU_BLOCK = 1 << 21

# Models with fewer parameters are worked on with one thread: more would wait for each other, many times as long as they
# compute.
SMALL_MODEL = 10_000_000

Block = tuple[Entry, int, int]


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


def worker_count() -> int:
    """Number of threads that work on blocks side by side."""
    return max(2, min(8, os.cpu_count() or 1))


def half_of_memory(device: torch.device) -> int:
    """Half of the bytes of memory that the device has: what threads that share it may work with."""
    import torch

    if device.type == "cpu":
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    return torch.cuda.get_device_properties(device).total_memory // 2


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
        import torch

        self.plan = plan
        self.device = device
        self.checkpoints = (plan.base, *plan.experts.values())
        self.stream = None if device.type == "cpu" else torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
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

    def steps(self, name: str, start: int, stop: int) -> Iterator[tuple[int, int, Tensor, Tensor]]:
        """The entries ``[start, stop)`` of a tensor in pieces that are computed with at a time.

        Yields:
            First entry and end of a piece, the base's entries ``(entries,)`` and all task vectors' ``(experts,
            entries)`` in float32. Both may be overwritten, and are by the next piece.

        Raises:
            InputError: NaN or infinite values.
        """
        pieces = []
        for number, checkpoint in enumerate(self.checkpoints):
            buffer = self.host_buffer(f"file {number}", stop - start, checkpoint.entries[name].torch_dtype)
            checkpoint.read_into(buffer, name, start)
            pieces.append(buffer.to(self.device, non_blocking=True))
        step = STEP if self.stream is None else stop - start
        for first in range(0, stop - start, step):
            base, task_vectors = self._subtract([piece[first : first + step] for piece in pieces])
            # A sum is NaN or infinite if one entry is, and costs one pass; only then is the culprit looked for. To
            # know it, the host waits for the copies to the device, so that its buffers can be used again.
            if not math.isfinite(task_vectors.sum()):
                _refuse_non_finite(self.plan, name, start + first, start + first + len(base))
            yield start + first, start + first + len(base), base, task_vectors

    def _subtract(self, pieces: list[Tensor]) -> tuple[Tensor, Tensor]:
        """The base and the task vectors in float32, from the same entries of all checkpoints."""
        import torch

        entries, experts = len(pieces[0]), len(pieces) - 1
        if self.stream is None:
            base = self.host_buffer("base", entries, torch.float32)
            task_vectors = self.host_buffer("task vectors", experts * entries, torch.float32).view(experts, entries)
        else:
            base = torch.empty(entries, device=self.device)
            task_vectors = torch.empty(experts, entries, device=self.device)
        base.copy_(pieces[0])
        for row, piece in zip(task_vectors, pieces[1:], strict=True):
            # Converting and subtracting apart is faster than one subtraction of mixed types.
            row.copy_(piece).sub_(base)
        return base, task_vectors

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


def read_task_vectors(plan: Plan, name: str, start: int, stop: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """What `Reader.read` returns, for a single call."""
    reader = Reader(plan, device)
    with reader.streaming():
        return reader.read(name, start, stop)


def _refuse_non_finite(plan: Plan, name: str, start: int, stop: int) -> None:
    """Say which checkpoint has NaN or infinite values; return where only the float32 sum overflowed."""
    import torch

    for expert, checkpoint in {"the base": plan.base, **plan.experts}.items():
        bad = ~torch.isfinite(checkpoint.read(name, start, stop).double())
        if bad.any():
            who = expert if checkpoint is plan.base else f"expert {expert}"
            count = int(bad.sum())
            raise InputError(f"{who} has {count} NaN or infinite values in {name} ({checkpoint.entries[name].file})")


def work_through(blocks: Iterable[Block], work: Callable[[Entry, int, int], None], workers: int) -> None:
    """Work through blocks with a few threads, at most a few blocks ahead, and stop at the first error.

    Each call computes with one thread of torch's, as many calls run side by side; so what it computes does not depend
    on the number of threads.

    Args:
        blocks: arguments of the work.
        work: called once for each block, from any thread.
        workers: number of threads.
    """
    import torch

    threads = torch.get_num_threads()
    with ThreadPoolExecutor(workers, "merge", torch.set_num_threads, (1,)) as pool:
        pending: set[Future[None]] = set()
        try:
            for block in blocks:
                pending.add(pool.submit(work, *block))
                if len(pending) >= 4 * workers:
                    done, pending = wait(pending, return_when=FIRST_COMPLETED)
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
        count: Callable[[Tensor, Part, Tensor], None],
        shape: tuple[int, ...],
        title: str,
        only: str | None = None,
        sample: int = 1,
    ) -> Tensor:
        """Counts over all blocks of all merged tensors, or of a single one.

        Args:
            count: ``(task_vectors (experts, entries), part, counts)``, which adds to the counts.
            shape: shape of the counts; they are int64, so that the sum does not depend on the order of the blocks.
            title: shown beside the progress bar.
            only: name of the single tensor, for which no bar is shown.
            sample: count the first one of so many entries of each block, rounded up.

        Returns:
            The counts, on the CPU.
        """
        import torch

        entries = [self.plan.base.entries[name] for name in ([only] if only else self.plan.merged)]
        of_threads: dict[int, Tensor] = {}
        width = 1 + len(self.plan.experts)
        reader = Reader(self.plan, self.device)
        zeros = partial(torch.zeros, shape, dtype=torch.int64)

        def work(entry: Entry, start: int, stop: int) -> None:
            # Each thread counts for itself: adding up large counts after every block would cost more than counting.
            thread = threading.get_ident()
            with reader.streaming():
                if thread not in of_threads:
                    of_threads[thread] = zeros().to(self.device)
                for first, last, _, task_vectors in reader.steps(entry.name, start, stop):
                    count(task_vectors, Part(entry.name, entry.shape, first, last), of_threads[thread])
            advance(self.team.size * width * entry.size * (stop - start) / entry.elements, entry.name)

        block = block_entries(self.device)
        blocks = [
            (entry, start, start - (start - min(start + block, entry.elements)) // sample)
            for entry in entries
            for start in range(0, entry.elements, block)
        ]
        size = sum(width * entry.size * (stop - start) / entry.elements for entry, start, stop in blocks)
        with self.progress(title, size, "B") if only is None else nullcontext(no_advance) as advance:
            work_through(self.team.share(blocks), work, worker_count())
        of_team = self.team.add(sum((counts.cpu() for counts in of_threads.values()), start=zeros()))
        assert of_team is not None  # noqa: S101  (every process brings counts)
        return of_team


def no_advance(_count: float, _note: str = "") -> None:
    """Progress that is not shown."""
