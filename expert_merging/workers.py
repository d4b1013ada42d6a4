"""Workers that go through parts of tensors side by side: forked processes or threads.

A step of work on a part is some twenty operations of ten microseconds each, too short for threads to share an
interpreter: handing its lock from one to another costs as much as an operation. On Linux, the processor's share of the
work is therefore done by forked processes, which share the memory of what was loaded before; elsewhere, and for a GPU,
by threads.
"""

from __future__ import annotations

import itertools
import math
import mmap
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from expert_merging.forks import share_out
from expert_merging.machine import cores
from expert_merging.parts import Part
from expert_merging.processes import local_count

if TYPE_CHECKING:
    import torch
    from torch import Tensor

# Models with fewer parameters are worked on by one worker: more would wait for each other, many times as long as they
# compute.
SMALL_MODEL = 10_000_000

# Entries that a forked process is handed at a time.
_BATCH = 1 << 22
# Threads that read and write a GPU's parts: enough to keep it busy, and more would wait for each other.
_GPU_THREADS = 4

Work = Callable[[Part], Any]


@contextmanager
def fitting_threads(parameters: int) -> Iterator[None]:
    """One thread for running a small model, which more would slow down; as many as before afterwards.

    Args:
        parameters: number of the model's.
    """
    import torch

    threads = torch.get_num_threads()
    if parameters < SMALL_MODEL:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@dataclass(frozen=True)
class Workers:
    """Who goes through parts: this thread alone, a few threads, or a few processes forked from this one.

    Each worker computes with one thread of torch's, as many work side by side; so what it computes does not depend on
    their number.

    Args:
        size: number of workers.
        forked: they are processes; what they are to tell, they return or write into `shared_zeros`.
    """

    size: int
    forked: bool = False
    own: ClassVar[threading.local] = threading.local()

    @classmethod
    def for_entries(cls, entries: int, device: torch.device) -> Workers:
        """Who works on so many entries on that device; the processes of a run on this machine divide its cores."""
        if device.type != "cpu":
            return cls(_GPU_THREADS)
        if entries < SMALL_MODEL:
            return cls(1)
        return cls(max(1, min(8, cores()) // local_count()), forked=sys.platform == "linux")

    @classmethod
    def number(cls) -> int:
        """Number of the worker that asks."""
        return getattr(cls.own, "number", 0)

    def work_through(
        self,
        parts: Iterable[Part],
        work: Work,
        done: Callable[[Part, Any], None] = lambda _part, _result: None,
    ) -> None:
        """Work through parts, at most a few ahead, and stop at the first error.

        Args:
            parts: arguments of the work.
            work: called once for each part, from any worker.
            done: told of each finished part and of what the work returned, in this thread.

        Raises:
            InputError: what the work raised, or a process was ended from outside.
        """
        import torch

        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            if self.size == 1:
                for part in parts:
                    done(part, work(part))
            else:
                self._share_out(parts, work, done)
        finally:
            torch.set_num_threads(threads)

    def _share_out(self, parts: Iterable[Part], work: Work, done: Callable[[Part, Any], None]) -> None:
        if not self.forked:
            self._share_with_threads(parts, work, done)
            return
        batches = list(_batches(parts, _BATCH))

        def told(number: int, results: list[Any]) -> None:
            for part, result in zip(batches[number], results, strict=True):
                done(part, result)

        share_out(len(batches), lambda number: [work(part) for part in batches[number]], told, self.size, _start_worker)

    def _share_with_threads(self, parts: Iterable[Part], work: Work, done: Callable[[Part, Any], None]) -> None:
        pending: dict[Future[Any], Part] = {}
        numbers = itertools.count()

        def collect(most: int) -> None:
            while len(pending) > most:
                for future in wait(pending, return_when=FIRST_COMPLETED).done:
                    done(pending.pop(future), future.result())

        pool = ThreadPoolExecutor(self.size, "merge", lambda: _start_worker(next(numbers)))
        try:
            for part in parts:
                pending[pool.submit(work, part)] = part
                collect(most=4 * self.size)
            collect(most=0)
        finally:
            pool.shutdown(cancel_futures=True)


def _start_worker(number: int) -> None:
    import torch

    torch.set_num_threads(1)
    Workers.own.number = number


def _batches(parts: Iterable[Part], entries: int) -> Iterator[list[Part]]:
    """Runs of parts with that many entries together, at least one part each."""
    batch: list[Part] = []
    for part in parts:
        batch.append(part)
        if sum(part.entries for part in batch) >= entries:
            yield batch
            batch = []
    if batch:
        yield batch


def shared_zeros(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Zeros in memory that forked processes share with this one."""
    import torch

    return torch.frombuffer(mmap.mmap(-1, math.prod(shape) * dtype.itemsize), dtype=dtype).view(shape)
