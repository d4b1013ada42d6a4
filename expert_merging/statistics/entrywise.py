"""One number for each entry of the merged tensors, and the files that keep them.

Such a statistic is as large as the model in float32. So it is added up in the file itself, which is mapped into memory:
the system keeps as much of it there as there is room for. While tensors are merged, a block at a time is read.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from expert_merging.checkpoints.checkpoint import Entry, as_bytes, read_exactly, read_header
from expert_merging.checkpoints.open_files import OpenFiles
from expert_merging.kept import Kept
from expert_merging.outputs import Made, Slot, make_header
from expert_merging.parts import Part
from expert_merging.running.tensor_files import put_in_place
from expert_merging.writing import partial_name

# Name of the sum of all squares in a file, which no tensor of a checkpoint has.
_SQUARES = "sum of squares"
_WIDTH = 4


def bytes_of(parts: Iterable[Part]) -> int:
    """What the numbers of whole tensors take, in memory while they are added up and on the disk."""
    return sum(_WIDTH * part.elements for part in parts)


class EntrySums:
    """Sums in float32 that grow in a mapped file, which has its name only once they are complete.

    Attributes:
        values: by name of the tensor, flattened.

    Args:
        target: the file.
        parts: the whole tensors by name.
    """

    def __init__(self, target: Path, parts: Mapping[str, Part]) -> None:
        self.target, self.temporary = target, partial_name(target)
        slots = [Slot.of(_SQUARES, "F64", (), Made(_SQUARES))]
        slots += [Slot.of(name, "F32", (part.elements,), Made(name)) for name, part in parts.items()]
        header = make_header(slots)
        size = len(header) + sum(slot.size for slot in slots)
        try:
            with self.temporary.open("wb") as file:
                file.write(header)
                _reserve(file.fileno(), size)
        except BaseException:  # as where the disk is full
            self.temporary.unlink(missing_ok=True)
            raise
        whole = torch.from_file(str(self.temporary), shared=True, size=size, dtype=torch.uint8)
        self._squares, *values = torch.split(whole[len(header) :], [slot.size for slot in slots])
        self.values = {name: own.view(torch.float32) for name, own in zip(parts, values, strict=True)}

    def finish(self, count: int, kept: Kept) -> None:
        """Divide by a count and give the file its name; nothing can be added any more.

        Args:
            count: of what was added.
            kept: notes what is written.
        """
        squares = self._squares.view(torch.float64)
        for own in self.values.values():
            squares += torch.linalg.vector_norm(own.div_(count), dtype=torch.float64).square()
        self.values.clear()
        put_in_place(self.temporary, self.target, kept)

    def abandon(self) -> None:
        """Remove what is not finished."""
        self.values.clear()
        self.temporary.unlink(missing_ok=True)


def _reserve(descriptor: int, size: int) -> None:
    """Give a file its size; where the system can, all of its place on the disk too.

    To write into mapped pages that a full disk has no place for ends the process without a word.
    """
    os.truncate(descriptor, size)
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(descriptor, 0, size)


class Entries:
    """Several experts' numbers, read from their files whenever they are asked for, by any thread or process.

    Args:
        files: file of each expert, by name and in order.
        relative: divide each expert's by the root of their mean square, where they are not all 0; `EntrySums` must have
            written the files.
        ending: what follows a tensor's name in them.
    """

    def __init__(self, files: Mapping[str, Path], *, relative: bool = False, ending: str = "") -> None:
        self.files, self._open_files = dict(files), OpenFiles()
        headers = [{entry.name: entry for entry in read_header(file)[1]} for file in files.values()]
        self._entries = [{name.removesuffix(ending): own for name, own in found.items()} for found in headers]
        self._scales = [self._root_mean_square(found) if relative else 1.0 for found in self._entries]

    def of(self, part: Part) -> Tensor:
        """The numbers ``(experts, entries)`` of a part, in float32."""
        found = torch.empty(len(self.files), part.entries)
        for row, own, scale in zip(found, self._entries, self._scales, strict=True):
            row.copy_(self._read(own[part.name], part.start, part.entries)).div_(scale)
        return found

    def _read(self, entry: Entry, start: int, count: int) -> Tensor:
        """A run of the entries of a tensor, flattened, in the file's type."""
        block = torch.empty(count, dtype=entry.torch_dtype)
        with self._open_files.reading(entry.file) as descriptor:
            read_exactly(descriptor, as_bytes(block), entry.offset + start * block.element_size(), entry.file)
        return block

    def _root_mean_square(self, entries: Mapping[str, Entry]) -> float:
        count = sum(entry.elements for entry in entries.values()) - 1
        return math.sqrt(float(self._read(entries[_SQUARES], 0, 1)) / max(1, count)) or 1.0
