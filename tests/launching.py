"""Processes of a parallel run, forked from one that has imported what they need: importing takes longer than learning.

`torchrun` and `accelerate launch` start processes that import everything anew. What they say to their processes is said
here as well, and a process that fails ends the others. Each launcher has tests of its own.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import sys
import time
import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

from expert_merging import processes
from expert_merging.learned import reporting
from tests.command import save_table

# Seconds until the others of a process that has failed are ended, and until all are.
_PATIENCE, _LONGEST = 30, 240


@dataclass(frozen=True)
class Ended:
    """Processes that have ended.

    Args:
        codes: exit code of each; negative where a signal has ended it.
        stdout: what all of them have printed.
        stderr: what all of them have told of errors.
    """

    codes: tuple[int, ...]
    stdout: str
    stderr: str


def run_together(count: int, function: Callable[..., object], *arguments: Any, folder: Path) -> Ended:
    """Call a function in so many processes of a parallel run.

    Args:
        count: number of processes; a single one is told of no others.
        function: its result is the exit code; of a module, since the processes import it.
        arguments: of the function.
        folder: for what they print.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.preloaded"])
    files = folder / "stdout.txt", folder / "stderr.txt"
    for file in files:
        file.unlink(missing_ok=True)
        file.touch()
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    started = []
    for rank in range(count):
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        if count > 1:
            environment |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "MASTER_PORT": str(port)}
            environment |= {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count), "MASTER_ADDR": "localhost"}
        started.append(context.Process(target=_enter, args=(environment, files, function, arguments)))
        started[-1].start()
    _wait_for(started)
    return Ended(tuple(process.exitcode for process in started), *(file.read_text() for file in files))


def run_program(text: str) -> None:
    """Run the text of a program, as a function for `run_together`."""
    module = types.ModuleType("program")
    sys.modules["program"] = module  # where the annotations of its functions are looked up
    exec(compile(text, "program", "exec"), vars(module))


def _wait_for(started: Sequence[Any]) -> None:
    end = time.monotonic() + _LONGEST
    while running := [process for process in started if process.exitcode is None]:
        wait([process.sentinel for process in running], max(0, end - time.monotonic()))
        if any(process.exitcode for process in started):
            end = min(end, time.monotonic() + _PATIENCE)
        if time.monotonic() >= end:
            for process in running:
                process.kill()
                process.join()


def _enter(
    environment: dict[str, str], files: Sequence[Path], function: Callable[..., Any], arguments: Sequence[Any]
) -> None:
    for number, file in enumerate(files, 1):
        os.dup2(os.open(file, os.O_WRONLY | os.O_APPEND), number)
    os.environ.clear()
    os.environ.update(environment)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    reporting.draw_all = save_table
    processes.PATIENCE = 0.5  # no launcher is there to end it
    sys.exit(function(*arguments))
