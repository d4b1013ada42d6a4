"""Moments of a run that can be told and found again, and what goes wrong at them.

Time differs from run to run, but what a run asks of the system does not. So a moment is the number of such a step: a
file opened, read, written, made durable or renamed, a message between processes. What is on the disk changes at no
other moment.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from expert_merging import forks

_AUDITED = {"open", "os.rename", "os.mkdir", "os.rmdir", "os.remove", "os.truncate", "os.listdir", "shutil.rmtree"}
_WRAPPED = ("pwrite", "preadv", "fsync", "posix_fadvise")


@dataclass(frozen=True)
class Moment:
    """A step in one of a run's processes.

    Args:
        number: of the step, from 1.
        worker: number of the worker, of all that are forked in the run; None for the process itself.
    """

    number: int
    worker: int | None = None

    @classmethod
    def drawn(cls, drawing: random.Random, counts: Mapping[str, Any], *, of_worker: bool = False) -> Moment:
        """Any of the moments of a run that went well.

        Args:
            drawing: draws it.
            counts: what the run has recorded.
            of_worker: of one of its workers.
        """
        if not of_worker:
            return cls(drawing.randint(1, counts["steps"]))
        worker = drawing.randrange(len(counts["workers"]))
        return cls(drawing.randint(1, counts["workers"][worker]["steps"]), worker)


class Watch:
    """Counts the steps of a process, which ends afterwards, and lets something happen at one of them.

    Args:
        moment: when; None only counts.
        act: what happens.
        record: file for what was counted, or for where it happened.
    """

    def __init__(self, moment: Moment | None, act: Callable[[], object], record: Path) -> None:
        self.moment, self.act, self.record = moment, act, record
        self.worker: int | None = None
        self.started_workers = 0
        self.steps = 0
        self.process = os.getpid()

    def start(self) -> None:
        """Count from now on, in this process and in the workers that it forks."""
        sys.addaudithook(self._audit)
        for name in _WRAPPED:
            setattr(os, name, self._counted(getattr(os, name)))
        torch.save = self._counted(torch.save)
        serve, make = forks._serve, forks._Fork.__init__

        def serve_watched(pipe: Any, *arguments: Any) -> None:
            self.worker, self.steps, self.process = self.started_workers, 0, os.getpid()
            self.record = self.record.with_suffix(f".worker{self.worker:04}")
            pipe.recv, pipe.send = self._counted(pipe.recv), self._counted(pipe.send)
            os._exit = self._counted(os._exit)
            serve(pipe, *arguments)

        def make_counted(fork: Any, *arguments: Any) -> None:
            make(fork, *arguments)
            self.started_workers += 1

        forks._serve, forks._Fork.__init__ = serve_watched, make_counted  # type: ignore[method-assign]

    def stop(self) -> None:
        """Record what was counted."""
        self.process = 0
        self._write({"steps": self.steps})

    def _audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event in _AUDITED and not str(arguments[0]).endswith((".py", ".pyc")):  # what is imported when may differ
            self._step(f"{event} {arguments[0]}")

    def _counted(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*arguments: Any, **named: Any) -> Any:
            self._step(f"{function.__name__} {arguments[-1] if arguments else ''}")
            return function(*arguments, **named)

        return counted

    def _step(self, what: str) -> None:
        if self.process != os.getpid():  # it is over, or a process that has just been forked
            return
        self.steps += 1
        if self.moment == Moment(self.steps, self.worker):
            self.process = 0
            self._write({"before": what, "at": time.monotonic(), "children": children_of(os.getpid())})
            self.act()
        elif self.moment is None and what.startswith("_exit"):
            self.stop()

    def _write(self, content: object) -> None:
        self.record.write_text(json.dumps(content), encoding="utf-8")


def children_of(process: int) -> list[int]:
    """Numbers of the processes that a process has started."""
    return [int(number) for number in Path(f"/proc/{process}/task/{process}/children").read_text().split()]


def kill() -> None:
    """End this process as nothing can prevent."""
    os.kill(os.getpid(), signal.SIGKILL)
