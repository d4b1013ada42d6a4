"""Digests of files: they follow contents, so that a copy has the digest of its original.

Weights are too large to be read for a digest. A block in the middle of every 16 MiB of a tensor stands for it. So a
tensor that was trained on, rounded or exchanged is noticed. A change of a few entries between the blocks is not, but it
changes the time of the file, which `written` tells of.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from expert_merging.errors import InputError

_BLOCK = 4096
_STRETCH = 1 << 24
# Files up to this size are read whole: tokenizers, processors and code are far smaller.
_WHOLE = 1 << 26
_PIECE = 1 << 20


def blocks(descriptor: int, start: int, size: int) -> Iterator[bytes]:
    """The blocks that stand for ``size`` bytes of an open file from ``start`` on; all of them if they are few.

    Raises:
        InputError: the file is shorter than it was when its header was read.
    """
    stretches = max(1, -(-size // _STRETCH))
    for number in range(stretches):
        middle = start + (size * (2 * number + 1)) // (2 * stretches)
        place = max(start, min(middle - _BLOCK // 2, start + size - _BLOCK))
        block = os.pread(descriptor, min(_BLOCK, size), place)
        if len(block) < min(_BLOCK, size):
            raise InputError(
                "a file of weights was cut off while it was read, as when it is downloaded again; wait until it is "
                "complete, then start the same command again, which names it if it is not"
            )
        yield block


def file_content(file: Path) -> bytes:
    """A digest of a file, read in pieces; of one above 64 MiB, of its size and of blocks that stand for it."""
    digest = hashlib.sha256()
    with file.open("rb", buffering=0) as stream:
        size = os.fstat(stream.fileno()).st_size
        if size > _WHOLE:
            digest.update(f"{size} ".encode())
            pieces = blocks(stream.fileno(), 0, size)
        else:
            pieces = iter(lambda: stream.read(_PIECE), b"")
        for piece in pieces:
            digest.update(piece)
    return digest.digest()


def written(files: Iterable[Path]) -> str:
    """A digest of names, sizes and times of change, which differs once a file was written or replaced.

    The system's own time of change (``ctime``) counts too, which nobody can set back. Numbers of inodes do not, since
    some network file systems give new ones at any time.
    """
    facts = [
        (file.name, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
        for file in files
        for status in [file.stat()]
    ]
    return of_text(repr(facts))


def of_text(text: str) -> str:
    """A digest of a text."""
    return shortened(hashlib.sha256(text.encode()).digest())


def shortened(digest: bytes) -> str:
    """As much of a digest as is recorded."""
    return digest.hex()[:16]
