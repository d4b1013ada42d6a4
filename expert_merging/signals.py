"""Signals that end a program: one line that says how to continue, an end that nothing holds up, and no children left.

Python runs a signal's handler in the main thread, between two of its own instructions. A decomposition of a large
matrix, or a message that a dead process never sends, can keep it from that for minutes. So a thread is woken as well:
it tells the user at once, and ends the process where the main thread does not.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import FrameType

from expert_merging.processes import count, is_main_process

CONTINUES = "the same command continues where this one stopped"
ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
# Seconds in which a signalled process tidies up; whatever it leaves half-done then is what SIGKILL would leave.
_PATIENCE = 3.0
_SHOW_CURSOR = "\x1b[?25h"
_SET_PARENT_DEATH_SIGNAL = 1  # of prctl
# Number of the process that a program ends with.
_PARENT = "EXPERT_MERGING_PARENT"


def run_program(main: Callable[[], int], how: str) -> None:
    """Run the main function of a program, end the process with its exit code, and tell of signals that end it before.

    Call it in the main thread, once.

    Args:
        main: returns the exit code. A signal raises KeyboardInterrupt in it.
        how: what the user can do after a signal.
    """
    open_missing_streams()
    program = _Program(how)
    try:
        program.listen()
        _end_with_starter()
        code = main()
        program.finished = True
    except BaseException:
        program.finished = True
        program.end_if_signalled()  # an interrupt can come out as any other error
        raise
    program.end_if_signalled()
    sys.exit(code)


def open_missing_streams() -> None:
    """Let input and outputs that this process was started without lead nowhere.

    Otherwise the next files that are opened, weights perhaps, have their numbers, to which libraries write warnings.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # the lowest number that is free, this one
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, "w" if number else "r", encoding="utf-8", closefd=False))  # noqa: SIM115


class _Program:
    """What a signal does to this process, from now to its end.

    Args:
        how: as for `run_program`.

    Attributes:
        finished: nothing is to be tidied up any more, so a signal ends the process at once.
    """

    def __init__(self, how: str) -> None:
        self.how = how
        self.finished = False
        self.code = 0
        self.raised = False
        self.telling = threading.RLock()

    def listen(self) -> None:
        """Take over the signals, but those that this process was started without, as by nohup."""
        reader, writer = os.pipe()
        os.set_blocking(writer, False)
        signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        threading.Thread(target=self._watch, args=(reader,), name="signals", daemon=True).start()
        for number in ENDING:
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, self._interrupt)

    def end_if_signalled(self) -> None:
        """End the process if a signal has come: other threads may be at work for minutes."""
        with self.telling:
            if self.code:
                os._exit(self.code)

    def _interrupt(self, number: int, _frame: FrameType | None) -> None:
        if not (self.raised or self.finished):
            self.raised = True
            self._tell(number)
            raise KeyboardInterrupt

    def _watch(self, reader: int) -> None:
        """Wait for signals: the first one gives the main thread some time, the second one does not."""
        timer = threading.Timer(_PATIENCE, self.end_if_signalled)
        timer.daemon = True
        while True:
            number = os.read(reader, 1)[0]
            if number in ENDING:
                self._tell(number)
                if self.finished or timer.is_alive():
                    self.end_if_signalled()
                timer.start()

    def _tell(self, number: int) -> None:
        """Say that the program ends, once and as its last words."""
        with self.telling:
            if self.code:
                return
            self.code = 128 + number
            if is_main_process():
                reason = "interrupted" if number == signal.SIGINT else f"ended by {signal.Signals(number).name}"
                _write(1, _SHOW_CURSOR if os.isatty(1) else "")
                _write(2, f"\n{reason}; {self.how}\n")
            nowhere = os.open(os.devnull, os.O_WRONLY)
            for descriptor in (1, 2):
                os.dup2(nowhere, descriptor)


def _write(descriptor: int, text: str) -> None:
    try:
        os.write(descriptor, text.encode())
    except OSError:  # the terminal is gone, which SIGHUP tells
        return


@contextmanager
def signals_held_back() -> Iterator[None]:
    """Around the start of a child: those that end a program wait until `leave_signals_to` is called there."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ENDING)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def leave_signals_to(parent: int) -> None:
    """In a child: let the parent alone decide when to end, and end with it, however it ends.

    A terminal sends signals to parent and children.

    Args:
        parent: number of its process.
    """
    for number in ENDING:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, ENDING)
    end_with(parent)


def end_with(parent: int) -> None:
    """In a child: end when the parent ends, where the system offers that.

    Args:
        parent: number of its process.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_SET_PARENT_DEATH_SIGNAL, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def environment_of_child() -> Mapping[str, str]:
    """The environment of a program that ends with this process, if `run_program` runs it."""
    return {**os.environ, _PARENT: str(os.getpid())}


def _end_with_starter() -> None:
    """End with the process that has started this one as its child, or as one of the processes of a parallel run."""
    starter = os.environ.pop(_PARENT, None)
    if starter is not None or count() > 1:
        end_with(os.getppid() if starter is None else int(starter))
