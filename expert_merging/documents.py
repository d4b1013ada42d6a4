"""What users give as text: files in UTF-8, JSON, YAML, paths. One boundary each, which names the file.

Nothing else in the project parses such a file. Whatever a file holds, the result is plain data (texts, numbers, lists,
dictionaries) of bounded depth, or an `InputError`.
"""

from __future__ import annotations

import functools
import json
import os
import re
import stat
import sys
from collections.abc import Sequence
from io import TextIOWrapper
from itertools import accumulate
from pathlib import Path
from typing import Any

from expert_merging.errors import InputError

# Far above the largest tokenizers and indexes, and little beside the memory that a model takes.
_LARGEST = 1 << 27
# YAML is read a thousand times more slowly, and only options are written in it.
_LARGEST_YAML = 1 << 18
_DEEPEST = 100
# Whole numbers of more digits than any float has are no settings.
_DIGITS = 300
_HALF = re.compile(r"\\u[dD][89a-fA-F]")
_AGAIN = "download it again"


def read_bytes(file: Path, *, largest: int = _LARGEST) -> bytes:
    """The content of a file.

    Raises:
        InputError: it cannot be read, or has more than ``largest`` bytes.
    """
    try:
        if file.is_fifo() and file.parent.name != "fd":  # the shell's <(command) is one that is written to
            raise InputError(f"{file} is a named pipe, not a file; give a file")
        with file.open("rb") as stream:
            status = os.fstat(stream.fileno())
            size = status.st_size if stat.S_ISREG(status.st_mode) else largest
            content = stream.read(min(size, largest) + 1)
    except (OSError, ValueError) as error:  # the last for a name with NUL in it
        raise InputError(f"{file} cannot be read ({getattr(error, 'strerror', None) or error})") from None
    if len(content) > largest:
        raise InputError(f"{file} has more than {largest >> 20} MiB, too many for a file of its kind")
    return content


def read_text(file: Path, *, advice: str = _AGAIN) -> str:
    """The text of a file in UTF-8.

    Raises:
        InputError: it cannot be read or is something else; ends with ``advice``.
    """
    try:
        return read_bytes(file).decode("utf-8")
    except UnicodeDecodeError:
        raise InputError(f"{file} is no text in UTF-8; {advice}") from None


def parse_json(text: str) -> Any:
    """The value of a text in JSON, of at most 100 levels.

    Raises:
        ValueError: it is something else.
    """
    try:
        content = json.loads(text, parse_int=_whole)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    _check_depth(content)
    return content


def _whole(digits: str) -> int:
    if len(digits) > _DIGITS:
        raise ValueError(f"a number of {len(digits)} digits")
    return int(digits)


def _check_depth(content: Any) -> None:
    level = [content]
    for _ in range(_DEEPEST + 1):
        containers = [value for value in level if isinstance(value, dict | list)]
        if not containers:
            return
        level = [inner for value in containers for inner in (value.values() if isinstance(value, dict) else value)]
    raise ValueError("nested too deeply")


def read_json(file: Path, *, advice: str = _AGAIN) -> Any:
    """The value of a file in JSON.

    Raises:
        InputError: it cannot be read or is something else; ends with ``advice``.
    """
    found = read_bytes(file)
    try:
        text = found.decode("utf-8")
        content = parse_json(text)
        if _HALF.search(text):
            json.dumps(content, ensure_ascii=False).encode()  # halves of characters, which cannot be written anywhere
    except ValueError as error:
        raise InputError(f"{file} is not valid JSON ({_reason(error)}); {advice}") from None
    return content


def _reason(error: ValueError) -> str:
    if isinstance(error, UnicodeEncodeError):
        return f"half a character, {error.object[error.start]!a}"
    return str(error)


def read_object(file: Path, *, advice: str = _AGAIN) -> dict[str, Any]:
    """The object that a file in JSON holds.

    Raises:
        InputError: it cannot be read or is something else; ends with ``advice``.
    """
    content = read_json(file, advice=advice)
    if not isinstance(content, dict):
        raise InputError(f"{file} holds {type(content).__name__}, not a JSON object; {advice}")
    return content


def parse_yaml(text: str) -> Any:
    """The value of a text in YAML, with what JSON has too: dates stay texts; other types and references are refused.

    Raises:
        ValueError: it is something else.
    """
    import yaml

    if len(text) > _LARGEST_YAML:
        raise ValueError(f"more than {_LARGEST_YAML >> 10} KiB of YAML")
    # PyYAML's time grows with the square of the depth; brackets in texts may count here too.
    if max(accumulate((sign in "[{") - (sign in "]}") for sign in text), default=0) > _DEEPEST:
        raise ValueError("nested too deeply")
    try:
        content = yaml.load(text, _yaml_loader())  # noqa: S506  (a kind of safe loader)
        json.dumps(content, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise ValueError(_reason(error)) from None
    except RecursionError:
        raise ValueError("nested too deeply") from None
    except (yaml.YAMLError, ArithmeticError, AttributeError, LookupError, TypeError) as error:
        raise ValueError(" ".join(str(error).split())) from None
    _check_depth(content)
    return content


@functools.cache
def _yaml_loader() -> type[Any]:
    import yaml

    class Loader(yaml.SafeLoader):
        """Makes what JSON has, and every value once: a text of some lines could stand for more than fits in memory."""

        def compose_node(self, parent: Any, index: Any) -> Any:
            if self.check_event(yaml.AliasEvent):
                raise yaml.YAMLError("it has references (*name); write out what they stand for")
            return super().compose_node(parent, index)

    tag = "tag:yaml.org,2002:"
    known = {f"{tag}{name}" for name in ("null", "bool", "int", "float", "str", "seq", "map")}
    Loader.yaml_constructors = {name: make for name, make in Loader.yaml_constructors.items() if name in {*known, None}}
    Loader.yaml_implicit_resolvers = {
        first: [(name, pattern) for name, pattern in resolvers if name in {*known, f"{tag}merge"}]
        for first, resolvers in Loader.yaml_implicit_resolvers.items()
    }
    return Loader


def resolved(path: str | Path) -> Path:
    """A path from the root, without links, of which ``~`` is the user's own folder.

    Raises:
        InputError: no file can have it, or a link in it leads to itself.
    """
    try:
        found = Path(os.path.expanduser(path)).resolve()  # which leaves the name of an unknown user as it is
        str(found).encode()
    except UnicodeEncodeError:
        raise InputError(f"the path {str(path)!a} has a name that is no text in UTF-8; rename it") from None
    except ValueError:
        raise InputError(f"the path {str(path)!a} has a NUL character in it, which no file's name has") from None
    except (OSError, RuntimeError):  # the latter up to Python 3.12
        raise InputError(f"the path {path} has a link in it that leads to itself; remove the link") from None
    return found


def check_arguments(arguments: Sequence[str]) -> None:
    """Check that what stands on the command line is text, and that there is a folder from which its paths lead.

    Raises:
        InputError: something is not, or there is none.
    """
    try:
        os.getcwd()
    except FileNotFoundError:
        raise InputError("the current folder does not exist any more; change to another one") from None
    for argument in arguments:
        try:
            argument.encode()
        except UnicodeEncodeError:
            raise InputError(f"{argument!a} on the command line is no text in UTF-8; rename what it names") from None


def escape_output() -> None:
    """Let the process show characters that its output has no place for, or that are none, by their numbers."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
