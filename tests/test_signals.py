"""What ends a program: one line, an exit code that tells of the signal, no traceback and nobody left behind."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from expert_merging.options import ROOT
from expert_merging.signals import CONTINUES
from tests.checkpoints import BASE
from tests.faults.moments import children_of
from tests.test_workers import FORKS, ended

SIGNALS = {signal.SIGINT: "interrupted", signal.SIGTERM: "ended by SIGTERM", signal.SIGHUP: "ended by SIGHUP"}
HOW = "the same command continues"

# Programs that print "ready" at a moment at which they are signalled.
BEGINNING = """
import sys, time
from expert_merging.signals import run_program

def ready():
    print("ready", flush=True)
"""
ENDING = f"""
run_program(main, {HOW!r})
"""
PROGRAMS = {
    "in its own code": """
def main():
    ready()
    while True:
        pass
""",
    "waiting": """
def main():
    ready()
    time.sleep(60)
""",
    "in a library for long": """
import hashlib

def main():
    ready()
    hashlib.pbkdf2_hmac("sha512", b"", b"", 20_000_000)
""",
    "where interrupts are lost": """
def main():
    ready()
    while True:
        try:
            time.sleep(60)
        except BaseException:
            pass
""",
    "where an interrupt becomes another error": """
def main():
    ready()
    try:
        time.sleep(60)
    except KeyboardInterrupt:
        raise ValueError("lost")
""",
    "where a thread works for long": """
import threading

def main():
    threading.Thread(target=lambda: time.sleep(60)).start()
    ready()
    time.sleep(60)
""",
    "at the very end": """
import atexit

def wait():
    ready()
    time.sleep(60)

def main():
    atexit.register(wait)
    return 0
""",
    "while another thread ends": """
import threading

def main():
    threading.Thread(target=lambda: (time.sleep(0.2), ready(), time.sleep(60))).start()
    return 0
""",
}
# With two forked workers that tell their numbers.
WORKING = """
import os
from expert_merging.forks import share_out

def work(number):
    os.write(1, f"{os.getpid()}\\n".encode())
    time.sleep(60)

def main():
    share_out(4, work, print, 2, lambda number: None)
"""


@contextmanager
def program(text: str, **environment: str) -> Iterator[subprocess.Popen[str]]:
    """A program that has just said that it is ready."""
    started = subprocess.Popen(
        [sys.executable, "-c", BEGINNING + text + ENDING],
        cwd=ROOT,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    with started:
        try:
            yield started
        finally:
            started.kill()


def told(process: subprocess.Popen[str], patience: float = 5) -> tuple[int, str, str]:
    """Exit code, and what it says to the end, which must come soon."""
    out, errors = process.communicate(timeout=patience)
    return process.returncode, out, errors


@pytest.mark.parametrize("number", SIGNALS)
@pytest.mark.parametrize("text", [PROGRAMS["waiting"], PROGRAMS["at the very end"]], ids=["waiting", "at the very end"])
def test_every_signal_is_one_line(number, text):
    with program(text) as process:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(number)
        assert told(process) == (128 + number, "", f"\n{SIGNALS[number]}; {HOW}\n")


@pytest.mark.slow
@pytest.mark.parametrize("again", [0, 0.05], ids=["once", "twice"])
@pytest.mark.parametrize("name", PROGRAMS)
def test_an_interrupt_ends_a_program_wherever_it_is(name, again):
    with program(PROGRAMS[name]) as process:
        assert process.stdout.readline() == "ready\n"
        begun = time.monotonic()
        process.send_signal(signal.SIGINT)
        if again:
            time.sleep(again)
            process.send_signal(signal.SIGTERM)
        assert told(process) == (130, "", f"\ninterrupted; {HOW}\n")
        assert not again or time.monotonic() - begun < 1.5, "a second signal is not kept waiting"


@FORKS
@pytest.mark.parametrize("number", [*SIGNALS, signal.SIGKILL])
def test_no_child_is_left(number):
    """A terminal sends signals to all of them; SIGKILL is sent to the parent alone."""
    with program(WORKING) as process:
        children = [int(process.stdout.readline()) for _ in range(2)]
        if number == signal.SIGKILL:
            process.kill()
        else:
            os.killpg(process.pid, number)
        code, _, errors = told(process)
        expected = (-number, "") if number == signal.SIGKILL else (128 + number, f"\n{SIGNALS[number]}; {HOW}\n")
        assert (code, errors) == expected
        assert all(ended(child) for child in children)


def test_the_other_processes_of_a_run_end_in_silence():
    with program(PROGRAMS["waiting"], RANK="1") as process:
        process.stdout.readline()
        process.send_signal(signal.SIGINT)
        assert told(process) == (130, "", "")


def test_a_program_started_by_nohup_does_not_hear_that_the_terminal_is_closed():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with program(PROGRAMS["waiting"]) as process:
            process.stdout.readline()
            process.send_signal(signal.SIGHUP)
            time.sleep(0.1)
            assert process.poll() is None
            process.send_signal(signal.SIGTERM)
            assert told(process)[0] == 143
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_program_without_a_signal_ends_as_its_main_function_says():
    for text, expected in (
        ("main = lambda: 0", (0, "")),
        ("main = lambda: 3", (3, "")),
        ("main = lambda: sys.exit('told')", (1, "told\n")),
    ):
        with program(text) as process:
            code, _, errors = told(process)
            assert (code, errors) == expected


STARTING = """
import subprocess
from expert_merging.signals import environment_of_child

def main():
    child = "from expert_merging.signals import run_program; import time; print('on', flush=True); "
    child += "run_program(lambda: print('ready', flush=True) or time.sleep(60), 'x')"
    process = subprocess.Popen([sys.executable, "-c", child], env=environment_of_child())
    print(process.pid, flush=True)
    process.wait()
"""


@FORKS
def test_a_program_ends_with_the_one_that_has_started_it():
    with program(STARTING) as process:
        said = [process.stdout.readline() for _ in range(3)]
        child = next(int(line) for line in said if line[0].isdigit())
        process.kill()
        assert ended(child)


@contextmanager
def started(*arguments: object) -> Iterator[subprocess.Popen[str]]:
    """A command of the project in a session of its own, as one that a terminal has started."""
    process = subprocess.Popen(
        [sys.executable, *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    with process:
        try:
            yield process
        finally:
            process.kill()


# Opens a file that a program without outputs would open as its output.
OPENING = """
import os

def main():
    with open(sys.argv[1], "wb") as file:
        os.write(file.fileno(), b"weights")
        print("shown")
        print("told", file=sys.stderr)
        os.write(2, b"a library's warning")
        os.kill(os.getpid(), 2)
        time.sleep(60)
"""


@pytest.mark.parametrize("closed", [(1,), (2,), (0, 1, 2)], ids=str)
def test_a_program_without_outputs_writes_nothing_of_them_into_its_files(closed, tmp_path):
    code = subprocess.run(
        [sys.executable, "-c", BEGINNING + OPENING + ENDING, tmp_path / "file"],
        cwd=ROOT,
        preexec_fn=lambda: [os.close(number) for number in closed],
        check=False,
    ).returncode
    assert (code, (tmp_path / "file").read_bytes()) == (130, b"weights")


# Runs a program as `python -m` does, up to where it imports what takes a while.
IMPORTING = """
import runpy, sys, time

class Waits:
    def find_spec(self, name, *_):
        if name == sys.argv[2]:
            print("ready", flush=True)
            time.sleep(60)

sys.meta_path.insert(0, Waits())
runpy.run_module(sys.argv[1], run_name="__main__", alter_sys=True)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("module", "awaited"),
    [
        ("expert_merging", "expert_merging.commands"),
        ("zoo", "zoo.commands"),
        *((f"{family}.model_merging", "expert_merging.cli") for family in ("InternVL", "Mistral", "Qwen2VL")),
    ],
)
def test_programs_listen_before_they_import(module, awaited):
    with started("-c", IMPORTING, module, awaited) as process:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGINT)
        code, out, errors = told(process)
        assert (code, out) == (130, "")
        assert re.fullmatch("\ninterrupted; the same command .*\n", errors), errors


def descendants(process: int) -> list[int]:
    """Numbers of all processes below one."""
    children = children_of(process)
    return [*children, *(below for child in children for below in descendants(child))]


def wait_until(true: Callable[[], object]) -> None:
    for _ in range(1200):
        if true():
            return
        time.sleep(0.05)
    raise AssertionError("it did not happen")


@FORKS
@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_zoo_that_is_built_leaves_no_worker(number, tmp_path):
    with started("-m", "zoo", "build", "mistral", "--output", tmp_path / "zoo") as process:
        line = process.stdout.readline()
        assert line.startswith("training the base"), line
        wait_until(lambda: children_of(process.pid))
        children = descendants(process.pid)
        process.send_signal(number)
        code, _, errors = told(process)
        expected = (-9, "") if number == signal.SIGKILL else (143, f"\nended by SIGTERM; {CONTINUES}\n")
        assert (code, errors) == expected
        assert all(ended(child) for child in children)
        assert not (tmp_path / "zoo" / BASE).exists()
