"""Files that are open for reading, a bounded number at a time: models may have more files than a process may open.

A file that is read stays open, as opening it for every block would lose the system's reading ahead. The one that was
read least recently is closed for another.
"""

from __future__ import annotations

import itertools
import os
import resource
import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

# Of the files that the process may open, a share for those that are read; and no more than this, which is plenty.
_SHARE = 4
_MOST = 256


@dataclass
class _Open:
    """An open file.

    Args:
        descriptor: its number.
        users: threads that read from it now.
    """

    descriptor: int
    users: int = 0


# Of all owners, since the process has one bound; the least recently used first.
_open: dict[tuple[int, str], _Open] = {}
_lock = threading.Lock()
_owners = itertools.count()
_gone: deque[int] = deque()  # owners that are no more: memory may be collected at any moment, also under the lock
os.register_at_fork(before=_lock.acquire, after_in_parent=_lock.release, after_in_child=_lock.release)


class OpenFiles:
    """Open files of one owner, such as a checkpoint, within the bound that all owners share."""

    def __init__(self) -> None:
        self._owner = next(_owners)

    @contextmanager
    def reading(self, file: Path) -> Iterator[int]:
        """A descriptor to read a file with, from any thread, inside of the block."""
        key = self._owner, str(file)  # a path would take longer to look up
        with _lock:
            found = _open.pop(key, None) or _opened(file)
            _open[key] = found
            found.users += 1
        try:
            yield found.descriptor
        finally:
            with _lock:
                found.users -= 1

    def close(self) -> None:
        """Close the owner's files; they are opened again when they are needed."""
        with _lock:
            _close_all(self._owner)

    def __del__(self) -> None:
        _gone.append(self._owner)


def _close_all(owner: int) -> None:
    for key in [key for key in _open if key[0] == owner]:
        os.close(_open.pop(key).descriptor)


def _opened(file: Path) -> _Open:
    """A file that is opened, for which others are closed."""
    while _gone:
        _close_all(_gone.popleft())
    _close_some(_bound() - 1)
    return _Open(os.open(file, os.O_RDONLY))


def _close_some(left: int) -> None:
    """Close files that nobody reads from, until there are few enough."""
    while len(_open) > left:
        idle = next((key for key, found in _open.items() if not found.users), None)
        if idle is None:
            return
        os.close(_open.pop(idle).descriptor)


def _bound() -> int:
    """Number of files that may be open at a time."""
    allowed, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return _MOST if allowed == resource.RLIM_INFINITY else max(1, min(_MOST, allowed // _SHARE))
