"""Workers that go through parts of tensors side by side: forked processes or threads.

A step of work on a part is some twenty operations of ten microseconds each, too short for threads to share an
interpreter: handing its lock from one to another costs as much as an operation. On Linux, the processor's share of the
work is therefore done by forked processes, which share the memory of what was loaded before; elsewhere, and for a GPU,
by threads.
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
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from expert_merging.errors import InputError
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
        pending: dict[Future[list[Any]], list[Part]] = {}

        def collect(most: int) -> None:
            while len(pending) > most:
                for future in wait(pending, return_when=FIRST_COMPLETED).done:
                    for part, result in zip(pending.pop(future), future.result(), strict=True):
                        done(part, result)

        with warnings.catch_warnings():
            # Of forking beside other threads, which may hold locks for ever in the children. These only read and write
            # files and call torch's and numpy's functions on one thread each, as the workers of torch's own data loader
            # do; they neither log nor print.
            warnings.filterwarnings("ignore", ".*multi-threaded.*fork", DeprecationWarning)
            pool = self._pool(work)
            try:
                for batch in _batches(parts, _BATCH if self.forked else 1):
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

    def _pool(self, work: Work) -> Executor:
        if self.forked:
            context = multiprocessing.get_context("fork")
            numbers = context.Value("i", 0)
            return ProcessPoolExecutor(self.size, context, _start_process, (work, numbers, os.getpid()))
        return ThreadPoolExecutor(self.size, "merge", _start_worker, (work, itertools.count()))


def _start_worker(work: Work, numbers: Iterator[int]) -> None:
    import torch

    torch.set_num_threads(1)
    Workers.own.work, Workers.own.number = work, next(numbers)


def _start_process(work: Work, numbers: Any, parent: int) -> None:
    """Begin the life of a forked process, which ends with its parent's, however that ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent tells when to stop
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    if os.getppid() != parent:
        os._exit(1)
    with numbers.get_lock():
        numbers.value += 1
        number = numbers.value - 1
    _start_worker(work, iter([number]))


def _work_on(batch: list[Part]) -> list[Any]:
    try:
        return [Workers.own.work(part) for part in batch]
    except Exception as error:
        try:
            pickle.loads(pickle.dumps(error))  # noqa: S301  (it was made here)
        except Exception:  # noqa: BLE001  (whatever it is, it would be taken for the end of the process)
            raise RuntimeError("".join(traceback.format_exception(error))) from None
        raise


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
