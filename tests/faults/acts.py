"""What goes wrong at a moment, inside the process that it happens to, and how it is put right."""

from __future__ import annotations

import ctypes
import errno
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from expert_merging.checkpoints import open_files
from expert_merging.cli import main
from expert_merging.options import ROOT
from Mistral.backbone import BACKBONE

_FILLER = "filler"
# Bits of capabilities(7): CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH, for which permissions count nothing.
_ABOVE_PERMISSIONS = 0b110
_CAPABILITIES = 0x20080522  # version of their layout


def fill(disk: Path) -> None:
    """Leave no room on a disk."""
    with suppress(OSError), (disk / _FILLER).open("wb", buffering=0) as stream:
        while True:
            stream.write(bytes(4096))


def make_room(disk: Path) -> None:
    """Put `fill` right."""
    (disk / _FILLER).unlink(missing_ok=True)


@contextmanager
def small_disk(folder: Path) -> Iterator[Path]:
    """A disk of a few megabytes; the test is skipped where it may not be mounted."""
    folder.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)], capture_output=True)
    if made.returncode:
        pytest.skip("a file system may not be mounted here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def limit_files() -> None:
    """Let no file become larger than a page, as where a disk is full, in every place."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


def fail_to_read() -> None:
    """Let everything that is read of weights from now on fail, as of a broken disk."""

    def fail(*_arguments: Any) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    os.preadv = fail


def take_permission(folder: Path) -> None:
    """Let nothing be written into a folder, nor into those inside, also by the superuser."""
    for place in [folder, *folder.rglob("*")]:
        if place.is_dir():
            place.chmod(0o555)
    library = ctypes.CDLL(None, use_errno=True)
    header, sets = (ctypes.c_uint32 * 2)(_CAPABILITIES, 0), (ctypes.c_uint32 * 6)()
    assert library.capget(header, sets) == 0
    sets[0] &= ~_ABOVE_PERMISSIONS
    assert library.capset(header, sets) == 0


def give_permission(folder: Path) -> None:
    """Put `take_permission` right."""
    folder.chmod(0o755)
    for place in folder.rglob("*"):
        if place.is_dir():
            place.chmod(0o755)


def cut(file: Path) -> None:
    """Cut a file in the middle."""
    os.truncate(file, file.stat().st_size // 2)


def rewrite(file: Path, content: bytes) -> None:
    """Write other content of the same length over a file, in place."""
    with file.open("r+b") as stream:
        stream.write(content)


def run_beside(arguments: list[str], told: Path) -> None:
    """Run the same command in a second process, to its end; its exit code is left in a file."""
    if open_files._lock.locked():  # a file is just being opened, and a fork would wait for the lock that this one holds
        program = "import sys; from tests.faults.acts import main, BACKBONE; sys.exit(main(BACKBONE, sys.argv[1:]))"
        done = subprocess.run([sys.executable, "-c", program, *arguments], cwd=ROOT, capture_output=True)
        told.write_text(str(done.returncode))
        return
    process = os.fork()
    if process == 0:
        code = 2
        try:
            code = main(BACKBONE, arguments)
        finally:
            told.write_text(str(code))
            os._exit(0)
    os.waitpid(process, 0)


def send(number: int) -> None:
    """Send a signal to this process."""
    os.kill(os.getpid(), signal.Signals(number))
