"""Processes that share numbered work: forked from this one, or begun anew where a fork cannot be, beside a GPU.

Each has a pipe of its own, whose other end nobody else holds: so the end of a process is seen at any moment, whatever
it was doing. Nothing but numbers is sent to them, which a pipe always has room for; what the numbers mean, they know
from their beginning.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from typing import Any, Literal, TypeAlias

from expert_merging.errors import InputError
from expert_merging.signals import leave_signals_to, signals_held_back

Work = Callable[[int], Any]


def share_out(
    count: int, work: Work, done: Callable[[int, Any], None], size: int, start: Callable[[int], None]
) -> None:
    """Do numbered work in forked processes, and stop at the first error.

    Args:
        count: of the work's numbers, which begin at 0.
        work: called once for each number, in any process.
        done: told in this process of each number and of what the work returned.
        size: number of processes.
        start: called first in every process, with its own number.

    Raises:
        InputError: what the work raised, or a process was ended from outside.
    """
    with crew(work, min(size, count), start) as hand_out:
        hand_out(range(count), done)


# Does numbers of the work, and tells of each and of what the work returned.
HandOut: TypeAlias = Callable[[Iterable[int], Callable[[int, Any], None]], None]


@contextmanager
def crew(
    work: Work, size: int, start: Callable[[int], None], kind: Literal["fork", "spawn"] = "fork"
) -> Iterator[HandOut]:
    """Processes that are there for several rounds of numbered work.

    Args:
        work: called once for each number, in any process; what begins anew must be able to pickle it.
        size: number of processes.
        start: called first in every process, with its own number.
        kind: ``fork``, or ``spawn`` for processes that begin anew.

    Raises:
        InputError: what the work raised, or a process was ended from outside.
    """
    forks: list[_Fork] = []
    try:
        for number in range(size):
            forks.append(_Fork(work, start, number, kind))
        yield lambda numbers, done: _hand_out(numbers, forks, done)
        for fork in forks:
            fork.finish()
    finally:
        for fork in forks:
            fork.end()


def _hand_out(numbers: Iterable[int], forks: list[_Fork], done: Callable[[int, Any], None]) -> None:
    left = iter(numbers)
    for fork in forks:
        fork.hand(next(left, None))
    while any(fork.busy_with is not None for fork in forks):
        ready = wait([fork.pipe for fork in forks])  # of the idle ones too, which tell of their end alone
        for fork in [fork for fork in forks if fork.pipe in ready]:
            number, result = fork.busy_with, fork.receive()
            fork.hand(next(left, None))
            if number is not None:
                done(number, result)


class _Fork:
    """One process, which works on one number at a time.

    Args:
        work: as for `crew`.
        start: called first, with ``number``.
        number: its own number.
        kind: as for `crew`.
    """

    def __init__(self, work: Work, start: Callable[[int], None], number: int, kind: Literal["fork", "spawn"]) -> None:
        fork, spawn = multiprocessing.get_context("fork"), multiprocessing.get_context("spawn")
        self.busy_with: int | None = None
        self.pipe, end = multiprocessing.Pipe()
        arguments = (end, work, start, number, os.getpid())
        self.process = (fork if kind == "fork" else spawn).Process(target=_serve, args=arguments)
        if kind == "spawn":
            resource_tracker.ensure_running()  # which would let signals through if it started below
        with signals_held_back(), warnings.catch_warnings():
            # Of forking beside other threads, which may hold locks for ever in the children. These only read and write
            # files and call torch's and numpy's functions on one thread each, as the workers of torch's own data loader
            # do; they neither log nor print.
            warnings.filterwarnings("ignore", ".*multi-threaded.*fork", DeprecationWarning)
            self.process.start()
        end.close()

    def hand(self, number: int | None) -> None:
        """Give it a number to work on; None where there is none left."""
        self.busy_with = number
        if number is not None:
            self._send(number)

    def receive(self) -> Any:
        """What its work has returned.

        Raises:
            InputError: the work raised it, or the process has ended.
        """
        try:
            result, error, text = self.pipe.recv()
        except (EOFError, OSError) as lost:
            raise _ended() from lost
        if error is not None:
            raise error from RuntimeError(f"in another process:\n{text}")
        return result

    def finish(self) -> None:
        """Let it end.

        Raises:
            InputError: it was ended before.
        """
        self._send(None)
        self.process.join()
        if self.process.exitcode:
            raise _ended()

    def end(self) -> None:
        """End it, whatever it is doing."""
        self.process.kill()
        self.process.join()
        self.process.close()
        self.pipe.close()

    def _send(self, number: int | None) -> None:
        try:
            self.pipe.send(number)
        except OSError as lost:
            raise _ended() from lost


def _ended() -> InputError:
    return InputError(
        "a process of this run was ended from outside, perhaps because memory ran out; "
        "the same command continues the run"
    )


def _serve(pipe: Connection, work: Work, start: Callable[[int], None], number: int, parent: int) -> None:
    """The life of one process."""
    leave_signals_to(parent)
    start(number)
    with suppress(EOFError, OSError):  # the parent is gone, and the system is about to end this process
        while (asked := pipe.recv()) is not None:
            pipe.send(_attempt(work, asked))
    os._exit(0)  # without what the interpreter does at its end, which may wait for threads that were not forked


def _attempt(work: Work, number: int) -> tuple[Any, Exception | None, str]:
    """What the work returns or raises, and where it raised it."""
    try:
        return work(number), None, ""
    except Exception as error:  # noqa: BLE001  (it is raised again in the parent)
        text = traceback.format_exc()
        try:
            pickle.loads(pickle.dumps(error))  # noqa: S301  (it was made here)
        except Exception:  # noqa: BLE001  (whatever it is, it would be taken for the end of the process)
            return None, RuntimeError(text), text
        return None, error, text
