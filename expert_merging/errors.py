"""The one exception for everything a user can put right."""

from __future__ import annotations

import errno
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

# Characters of a value that a message shows.
_SHOWN = 60


class InputError(Exception):
    """What the user gave cannot be used.

    Args:
        problems: one sentence each: what is wrong with the value in hand, what is allowed, what to do.
    """

    def __init__(self, *problems: str) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems

    def __reduce__(self) -> tuple[type[InputError], tuple[str, ...]]:
        """How it reaches the process that a worker was forked from."""
        return type(self), self.problems


def one_line(text: str) -> str:
    """Text to show, whatever names are in it: what breaks a line or colours it is written as its escape."""
    if text.isprintable():
        return text
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode() for character in text
    )


def lines_of(error: InputError) -> str:
    """Each problem as one line."""
    return "".join(f"error: {one_line(problem)}\n" for problem in error.problems)


def tell(error: InputError) -> None:
    """Show each problem as one line of the error stream."""
    sys.stderr.write(lines_of(error))


def file_problem(error: OSError, again: str) -> InputError:
    """What a file or a disk that cannot be used means for the user.

    Args:
        error: the system's error, or a library's of that kind, which may say no file.
        again: what the same command does once there is room.
    """
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return InputError(f"the disk is full; make room, then the same command {again}")
    if error.errno == errno.EFBIG:
        return InputError(
            "a file would be larger than the file system, or `ulimit -f`, allows; with that changed, the same command "
            f"{again}"
        )
    if error.errno == errno.EPIPE:
        return InputError(f"what reads the output of this program has ended before it; the same command {again}")
    reason = error.strerror or first_line(error)
    if error.filename is not None:
        return InputError(f"{error.filename}: {reason}")
    return InputError(f"a file or a connection cannot be used ({reason}); the same command {again}")


def excerpt(value: Any, *, quoted: bool = True) -> str:
    """The beginning of a value that a message is about, however long it is.

    Args:
        value: a value of a JSON file.
        quoted: as JSON; otherwise as it is.
    """
    text = json.dumps(value) if quoted else str(value)
    return text if len(text) <= _SHOWN else text[:_SHOWN] + "..."


def first_line(error: BaseException) -> str:
    """The beginning of what an error says, which may go on for pages; its kind where it says nothing."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__).rstrip(" :")


def first_of(names: Sequence[object], shown: int) -> str:
    """The first names, and the number of the others."""
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(map(str, names[:shown])) + more


@contextmanager
def about(what: str) -> Iterator[None]:
    """Say in errors that are raised inside what they are about."""
    try:
        yield
    except InputError as error:
        raise InputError(*(f"{what}: {problem}" for problem in error.problems)) from None


class Problems:
    """Collects the problems of several independent checks, so that the user sees all of them at once."""

    def __init__(self) -> None:
        self.found: list[str] = []

    def add(self, problem: str) -> None:
        """Note one problem."""
        self.found.append(problem)

    @contextmanager
    def collecting(self) -> Iterator[None]:
        """Note the problems of an `InputError` raised inside and go on after the block."""
        try:
            yield
        except InputError as error:
            self.found.extend(problem for problem in error.problems if problem not in self.found)

    def check(self) -> None:
        """Raise what was collected.

        Raises:
            InputError: there was at least one problem.
        """
        if self.found:
            raise InputError(*self.found)


def near_name(name: str, known: list[str] | tuple[str, ...], *, before: str = "") -> str:
    """The part of a message that offers the closest of the known names, or lists them all.

    Args:
        name: what was given.
        known: what it may be.
        before: what is written before each known name.
    """
    import difflib

    normal: Callable[[str], str] = lambda text: text.lower().replace("-", "_")  # noqa: E731
    by_normal = {normal(candidate): candidate for candidate in known}
    close = difflib.get_close_matches(normal(name), list(by_normal), n=1, cutoff=0.6)
    close = close or [candidate for candidate in by_normal if name and candidate.startswith(normal(name))][:1]
    # Initials are a common short form, such as lr.
    close = close or [candidate for candidate in by_normal if _initials(candidate) == normal(name)][:1]
    if close:
        return f"Did you mean {before + by_normal[close[0]]!r}?"
    return f"Known: {', '.join(before + candidate for candidate in sorted(known))}." if known else "None is known."


def _initials(name: str) -> str:
    return "".join(word[:1] for word in name.split("_"))
