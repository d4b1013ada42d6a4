"""Where the pictures of samples come from: files, or an entry that holds its picture itself."""

from __future__ import annotations

import base64
import binascii
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias
from urllib.parse import unquote

from expert_merging.documents import read_bytes
from expert_merging.errors import InputError, excerpt

# How the kinds of picture files that are sent as text begin in base64.
_BEGINNINGS = {"png": "iVBORw0KGgo", "jpeg": "/9j/", "gif": "R0lGOD", "webp": "UklGR"}
# No path is longer.
_LONGEST_PATH = 4096


@dataclass(frozen=True)
class HeldPicture:
    """A picture that an entry holds as text.

    Args:
        content: bytes of a picture file.
    """

    content: bytes = field(repr=False)

    @property
    def name(self) -> str:
        """A name by its content."""
        return f"picture-{hashlib.sha256(self.content).hexdigest()[:16]}"

    def __str__(self) -> str:
        return self.name


Picture: TypeAlias = Path | HeldPicture


def content_of(picture: Picture) -> bytes:
    """The bytes of a picture file.

    Raises:
        InputError: it cannot be read.
    """
    return picture.content if isinstance(picture, HeldPicture) else read_bytes(picture)


def find_pictures(values: Sequence[Any], places: Sequence[Path]) -> tuple[Picture, ...]:
    """The pictures that an entry names or holds.

    Args:
        values: paths, ``file://`` and ``data:`` addresses, base64, or objects with one of these.
        places: folders that paths start from.

    Raises:
        InputError: one is none of these, or no such file is there.
    """
    return tuple(_find(value, places) for value in values)


def _find(value: Any, places: Sequence[Path]) -> Picture:
    if isinstance(value, Mapping):
        value = next((value[key] for key in ("url", "path", "image") if value.get(key)), value)
    if not isinstance(value, str):
        raise InputError(f"'image_path' must be a text or a list of texts, got {excerpt(value)}")
    if not value.strip():
        raise InputError("'image_path' is empty; leave it out where there is no picture")
    if value.startswith("data:"):
        return _from_data_url(value)
    path = _local_path(value)
    hits = [place / path for place in places if _is_file(place / path)]
    if hits:
        return hits[0]
    if value.startswith(tuple(_BEGINNINGS.values())) and len(value) > max(map(len, _BEGINNINGS.values())):
        return _decoded(value)
    looked = ", ".join(str(place) for place in places)
    raise InputError(f"image_path {excerpt(value, quoted=False)} does not exist (looked in {looked})")


def _local_path(value: str) -> str:
    scheme, separator, rest = value.partition("://")
    if not separator:
        return value
    if scheme.lower() == "file":
        return unquote(rest.removeprefix("localhost") if rest.startswith("localhost/") else rest)
    raise InputError(
        f"image_path {excerpt(value, quoted=False)} is not on this machine; download the picture and name the file"
    )


def _is_file(path: Path) -> bool:
    try:
        return len(str(path)) <= _LONGEST_PATH and path.is_file()
    except (OSError, ValueError):  # a name that no file can have
        return False


def _from_data_url(value: str) -> HeldPicture:
    header, _, content = value.partition(",")
    if not header.startswith("data:image/") or not header.endswith(";base64"):
        raise InputError(f"image_path is {excerpt(value)}; a data: address must have a picture in base64")
    return _decoded(unquote(content))


def _decoded(text: str) -> HeldPicture:
    try:
        return HeldPicture(base64.b64decode("".join(text.split()), validate=True))
    except (binascii.Error, ValueError):
        raise InputError(
            f"image_path is a picture in base64 that cannot be decoded ({excerpt(text)}); is it complete?"
        ) from None
