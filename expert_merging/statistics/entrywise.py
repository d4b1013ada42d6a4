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
from safetensors import safe_open
from torch import Tensor

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
        with self.temporary.open("wb") as file:
            file.write(header)
            _reserve(file.fileno(), size)
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
            squares += own.div_(count).double().square_().sum()
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
        self.files, self.ending = dict(files), ending
        self.scales = [_root_mean_square(file) or 1.0 if relative else 1.0 for file in self.files.values()]

    def of(self, part: Part) -> Tensor:
        """The numbers ``(experts, entries)`` of a part, in float32."""
        pairs = zip(self.files.values(), self.scales, strict=True)
        return torch.stack([_read(file, part, self.ending).div_(scale) for file, scale in pairs])


def _read(file: Path, part: Part, ending: str) -> Tensor:
    """A part of a tensor, which the file may have in its shape or flattened."""
    with safe_open(file, framework="pt") as opened:
        stored = opened.get_slice(part.name + ending)
        shape = stored.get_shape() or [1]
        width = max(1, math.prod(shape[1:]))
        first = part.start // width
        rows: Tensor = stored[first : -(-part.stop // width)] if stored.get_shape() else stored[...]
    return rows.flatten()[part.start - first * width :][: part.entries].float()


def _root_mean_square(file: Path) -> float:
    with safe_open(file, framework="pt") as opened:
        count = sum(opened.get_slice(name).get_shape()[0] for name in opened.keys() if name != _SQUARES)  # noqa: SIM118
        squares = float(opened.get_tensor(_SQUARES))
    return math.sqrt(squares / max(1, count))
