"""Read task vectors in blocks with a few processes or threads.

A block's result depends on its entries alone, so results are the same whatever the number of processes and threads.
What a block is read for is done in steps that fit into a core's cache, in memory that is used again.

A step is some twenty operations of ten microseconds each, too short for threads to share an interpreter: handing its
lock from one to another costs as much as an operation. On Linux, the processor's share of the work is therefore done by
forked processes, which share the memory of what was loaded before; elsewhere, and for a GPU, by threads.
"""

from __future__ import annotations

import ctypes
import itertools
import math
import mmap
import multiprocessing
import os
import pickle
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from expert_merging.checkpoint import Entry
from expert_merging.errors import InputError
from expert_merging.plan import Part, Plan, Progress

if TYPE_CHECKING:
    import torch
    from torch import Tensor

# Entries of one block, which a worker reads, merges and writes at a time: many, since reading and writing a block costs
# about as much as merging some ten thousand entries.
BLOCK = 1 << 19
# Entries that a forked process is handed at a time.
_BATCH = 1 << 22
# Entries of a block that a worker computes with at a time: few, so that the numbers of all experts stay in a core's
# cache from the first operation to the last, but enough to outweigh the calls.
STEP = 1 << 16
# A GPU computes with a whole block at a time, and it takes millions of entries to keep one busy.
GPU_BLOCK = 1 << 21

# Models with fewer parameters are worked on by one worker: more would wait for each other, many times as long as they
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
        pieces = []
        for number, checkpoint in enumerate(self.checkpoints):
            buffer = self.host_buffer(f"file {number}", stop - start, checkpoint.entries[name].torch_dtype)
            checkpoint.read_into(buffer, name, start)
            pieces.append(buffer.to(self.device, non_blocking=True))
        step = STEP if self.stream is None else stop - start
        for first in range(0, stop - start, step):
            entries = min(step, stop - start - first)
            base, task_vectors, rows = self._workspace(entries)
            base.copy_(pieces[0][first : first + entries])
            for row, piece in zip(rows, pieces[1:], strict=True):
                # Converting and subtracting apart is faster than one subtraction of mixed types.
                row.copy_(piece[first : first + entries]).sub_(base)
            # A sum is NaN or infinite if one entry is, and costs one pass; only then is the culprit looked for. To
            # know it, the host waits for the copies to the device, so that its buffers can be used again.
            if not math.isfinite(task_vectors.sum()):
                _refuse_non_finite(self.plan, name, start + first, start + first + entries)
            yield start + first, start + first + entries, base, task_vectors

    def _workspace(self, entries: int) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        """Room in float32 for the base's entries, for all task vectors' and, as views of these, for each one's."""
        import torch

        if self.stream is not None:
            task_vectors = torch.empty(len(self.checkpoints) - 1, entries, device=self.device)
            return torch.empty(entries, device=self.device), task_vectors, task_vectors.unbind()
        if entries not in self._spaces:
            experts = len(self.checkpoints) - 1
            base = self.host_buffer("base", entries, torch.float32)
            task_vectors = self.host_buffer("task vectors", experts * entries, torch.float32).view(experts, entries)
            self._spaces = {entries: (base, task_vectors, task_vectors.unbind())}
        return self._spaces[entries]

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


@dataclass(frozen=True)
class Crew:
    """Who works through blocks: this thread alone, a few threads, or a few processes forked from this one.

    Each worker computes with one thread of torch's, as many work side by side; so what it computes does not depend on
    their number.

    Args:
        size: number of workers.
        forked: they are processes; what they are to tell, they return or write into `shared_zeros`.
    """

    size: int
    forked: bool = False
    worker: ClassVar[threading.local] = threading.local()

    @classmethod
    def for_entries(cls, entries: int, device: torch.device) -> Crew:
        """Who works on so many entries on that device; the processes of a run on this machine divide its cores."""
        cores = min(8, len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1)
        if device.type != "cpu":
            return cls(max(2, cores))
        if entries < SMALL_MODEL:
            return cls(1)
        local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        return cls(max(1, cores // local), forked=sys.platform == "linux")

    @classmethod
    def number(cls) -> int:
        """Number of the worker that asks."""
        return getattr(cls.worker, "number", 0)

    def work_through(
        self,
        blocks: Iterable[Block],
        work: Callable[[Entry, int, int], Any],
        done: Callable[[Block, Any], None] = lambda _block, _result: None,
    ) -> None:
        """Work through blocks, at most a few ahead, and stop at the first error.

        Args:
            blocks: arguments of the work.
            work: called once for each block, from any worker.
            done: told of each finished block and of what the work returned, in this thread.

        Raises:
            InputError: what the work raised, or a process was ended from outside.
        """
        import torch

        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            if self.size == 1:
                for block in blocks:
                    done(block, work(*block))
            else:
                self._share_out(blocks, work, done)
        finally:
            torch.set_num_threads(threads)

    def _share_out(
        self, blocks: Iterable[Block], work: Callable[[Entry, int, int], Any], done: Callable[[Block, Any], None]
    ) -> None:
        pending: dict[Future[list[Any]], list[Block]] = {}

        def collect(most: int) -> None:
            while len(pending) > most:
                for future in wait(pending, return_when=FIRST_COMPLETED).done:
                    for block, result in zip(pending.pop(future), future.result(), strict=True):
                        done(block, result)

        with warnings.catch_warnings():
            # Of forking beside other threads, which may hold locks for ever in the children. These only read and write
            # files and call torch's and numpy's functions on one thread each, as the workers of torch's own data loader
            # do; they neither log nor print.
            warnings.filterwarnings("ignore", ".*multi-threaded.*fork", DeprecationWarning)
            pool = self._pool(work)
            try:
                for batch in _batches(blocks, _BATCH if self.forked else 1):
                    pending[pool.submit(_work_on, batch)] = batch
                    collect(most=4 * self.size)
                collect(most=0)
            except BrokenProcessPool as error:
                raise InputError(
                    "a process of this run was ended from outside, perhaps because memory ran out; "
                    "the same command continues the run"
                ) from error
            finally:
                pool.shutdown(cancel_futures=True)

    def _pool(self, work: Callable[[Entry, int, int], Any]) -> Executor:
        if self.forked:
            context = multiprocessing.get_context("fork")
            numbers = context.Value("i", 0)
            return ProcessPoolExecutor(self.size, context, _start_process, (work, numbers, os.getpid()))
        return ThreadPoolExecutor(self.size, "merge", _start_worker, (work, itertools.count()))


def _start_worker(work: Callable[[Entry, int, int], Any], numbers: Iterator[int]) -> None:
    import torch

    torch.set_num_threads(1)
    Crew.worker.work, Crew.worker.number = work, next(numbers)


def _start_process(work: Callable[[Entry, int, int], Any], numbers: Any, parent: int) -> None:
    """Begin the life of a forked process, which ends with its parent's, however that ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent tells when to stop
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    if os.getppid() != parent:
        os._exit(1)
    with numbers.get_lock():
        numbers.value += 1
        number = numbers.value - 1
    _start_worker(work, iter([number]))


def _work_on(batch: list[Block]) -> list[Any]:
    try:
        return [Crew.worker.work(*block) for block in batch]
    except Exception as error:
        try:
            pickle.loads(pickle.dumps(error))  # noqa: S301  (it was made here)
        except Exception:  # noqa: BLE001  (whatever it is, it would be taken for the end of the process)
            raise RuntimeError("".join(traceback.format_exception(error))) from None
        raise


def _batches(blocks: Iterable[Block], entries: int) -> Iterator[list[Block]]:
    """Runs of blocks with that many entries together, at least one block each."""
    batch: list[Block] = []
    for block in blocks:
        batch.append(block)
        if sum(stop - start for _, start, stop in batch) >= entries:
            yield batch
            batch = []
    if batch:
        yield batch


def shared_zeros(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Zeros in memory that forked processes share with this one."""
    import torch

    return torch.frombuffer(mmap.mmap(-1, math.prod(shape) * dtype.itemsize), dtype=dtype).view(shape)


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
