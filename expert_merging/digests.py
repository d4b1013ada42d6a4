"""Digests of files, made of the pieces that are written, by whatever worker and in whatever order.

XXH3 serves against all that happens to files, not against people who make two files with one digest. It takes 0.02 s of
a core for 1 GB; SHA-256 takes 0.6 s with a processor's own instructions, and BLAKE2b 1.1 s. Task arithmetic of five
experts takes 8 s of a core for 1 GB that it writes.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import NamedTuple

import xxhash

# Bytes that are read at a time.
_BLOCK = 1 << 20


class Piece(NamedTuple):
    """A run of bytes of a file, as it was written.

    Args:
        start: position of the first byte in the file.
        size: number of bytes.
        digest: their digest.
    """

    start: int
    size: int
    digest: bytes


class Section(NamedTuple):
    """A run of bytes of a file that has a name, such as a tensor.

    Args:
        start: position of the first byte in the file.
        size: number of bytes.
        piece: bytes of each of its pieces, of which the last may be shorter.
        digest: digest of the pieces' digests, in hexadecimal digits.
        source: whose bytes these are, ``base`` or an expert, and the name of the tensor there; empty for what was made.
    """

    start: int
    size: int
    piece: int
    digest: str
    source: tuple[str, str] | tuple[()] = ()


def digest_of(content: bytes | memoryview) -> bytes:
    """Digest of some bytes."""
    return xxhash.xxh3_128_digest(content)


def section_of(content: bytes | memoryview, start: int = 0) -> Section:
    """The section of some bytes that were written at once."""
    return Section(start, len(content), max(1, len(content)), _joined([digest_of(content)] if len(content) else []))


def sections_of(pieces: Iterable[Piece], runs: Mapping[str, tuple[int, int]]) -> dict[str, Section]:
    """The sections that pieces make together.

    Args:
        pieces: in any order.
        runs: position and size of each section by name, in the order of the file.

    Raises:
        ValueError: some byte was not written, or was written twice.
    """
    ordered, found = sorted(pieces), {}
    number = 0
    for name, (start, size) in runs.items():
        first, place = number, start
        while place < start + size and number < len(ordered) and ordered[number].start == place:
            place += ordered[number].size
            number += 1
        own = ordered[first:number]
        if place != start + size or any(piece.size != own[0].size for piece in own[:-1]):
            raise ValueError(f"{name} was not written piece by piece: byte {place}")
        found[name] = Section(start, size, own[0].size if own else 1, _joined(piece.digest for piece in own))
    if number < len(ordered):
        raise ValueError(f"byte {ordered[number].start} belongs to nothing that is written")
    return found


def read_digest(descriptor: int, section: Section, look: Callable[[memoryview], None] = lambda _: None) -> str:
    """Digest of the bytes that a file has now where a section is; of fewer bytes where it ends too early.

    Args:
        descriptor: the open file.
        section: which bytes, and how they were cut into pieces.
        look: is shown all of them, block by block; a block begins at a multiple of 8 bytes in its piece.
    """
    end = section.start + section.size
    digests = []
    for start in range(section.start, end, section.piece):
        hasher = xxhash.xxh3_128()
        for block in _blocks(descriptor, start, min(start + section.piece, end)):
            hasher.update(block)
            look(block)
        digests.append(hasher.digest())
    return _joined(digests)


def _blocks(descriptor: int, start: int, end: int) -> Iterator[memoryview]:
    """Bytes of a file in blocks, which are overwritten by the next one."""
    buffer = memoryview(bytearray(min(_BLOCK, end - start)))
    while start < end:
        filled = _fill(descriptor, buffer[: min(_BLOCK, end - start)], start)
        yield buffer[:filled]
        if filled < min(_BLOCK, end - start):
            return
        start += filled


def _fill(descriptor: int, view: memoryview, start: int) -> int:
    """Read until a view is full or the file ends; number of bytes."""
    filled = 0
    while filled < len(view) and (count := os.preadv(descriptor, [view[filled:]], start + filled)):
        filled += count
    return filled


def _joined(digests: Iterable[bytes]) -> str:
    return digest_of(b"".join(digests)).hex()
