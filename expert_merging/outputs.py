"""What a run writes, as data: folders of files, and where each of their tensors comes from.

By default that is the base's mirror image: its files with its headers, byte for byte, and other numbers in them.
Headers and indexes of other files are made here and nowhere else.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from expert_merging.checkpoints.checkpoint import WIDTHS, Entry
from expert_merging.context import Context
from expert_merging.parts import Part
from expert_merging.plan import Plan

if TYPE_CHECKING:
    from torch import Tensor

# Tensors begin at multiples of so many bytes where the header is made here.
_ALIGNED = 8


@dataclass(frozen=True)
class Merged:
    """What a merge function makes of a tensor of the base.

    Args:
        name: the tensor.
        result: which of the merge function's results; ``merged`` is added to the base.
        packed: entries of the tensor that one entry of the result stands for.
        reads_experts: the function is given the experts' task vectors; else it needs none, and gets ``(0, *shape)``.
    """

    name: str
    result: str = "merged"
    packed: int = 1
    reads_experts: bool = True


@dataclass(frozen=True)
class Copied:
    """A tensor of a checkpoint.

    Args:
        name: the tensor.
        expert: name of the expert that has it; None for the base.
    """

    name: str
    expert: str | None = None


@dataclass(frozen=True)
class Made:
    """A tensor that the preparation has made: ``made[key]`` of what it returns."""

    key: str


@dataclass(frozen=True)
class Computed:
    """A tensor whose entries a function gives, run by run.

    Args:
        entries: ``(start, stop) -> (stop - start,)``, entries of the flattened tensor; it may run in a forked process.
    """

    entries: Callable[[int, int], Tensor]


Source: TypeAlias = Merged | Copied | Made | Computed


@dataclass(frozen=True)
class Slot:
    """A tensor of a file that is written.

    Args:
        name: its name there.
        dtype: safetensors' name of its type.
        shape: its dimensions.
        size: its length in bytes.
        source: where its numbers come from.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    size: int
    source: Source

    @classmethod
    def of(cls, name: str, dtype: str, shape: tuple[int, ...], source: Source) -> Slot:
        """A slot for a tensor of a type of known width."""
        return cls(name, dtype, shape, Part.whole(name, shape).elements * WIDTHS[dtype], source)


@dataclass(frozen=True)
class Output:
    """One folder that is written.

    Args:
        files: tensors by file name, in the order of their bytes.
        folder: its place in the run's ``model/``; empty for that folder itself.
        headers: headers by file name, length fields included, that are taken as they are; others are made.
        edit: gives the ``config.json`` of the folder from the base's; by default that is copied like every other file.
        experts: the experts that are merged; None for all.
        is_model: the folder can be loaded: it gets the base's other files, a card, and an index where it needs one.
        about: what else the card says of the model, in Markdown.
        beside: files beside weights that are not the base's, by name: their content, the file that is copied, or None
            where there is none; also of a folder that is no model.
    """

    files: Mapping[str, tuple[Slot, ...]]
    folder: str = ""
    headers: Mapping[str, bytes] = field(default_factory=dict)
    edit: Callable[[Mapping[str, Any]], Mapping[str, Any]] | None = None
    experts: tuple[str, ...] | None = None
    is_model: bool = True
    about: str = ""
    beside: Mapping[str, bytes | Path | None] = field(default_factory=dict)

    def header(self, file: str) -> bytes:
        """The header of a file, length field included."""
        return self.headers.get(file) or make_header(self.files[file])

    @property
    def size(self) -> int:
        """Bytes of all weight files."""
        return sum(self.file_size(file) for file in self.files)

    def file_size(self, file: str) -> int:
        """Bytes of a file."""
        return len(self.header(file)) + sum(slot.size for slot in self.files[file])

    @property
    def is_mirror(self) -> bool:
        """Whether it has the base's files and tensors."""
        return bool(self.headers)

    @property
    def makes_index(self) -> bool:
        """Whether the folder gets an index of its own; a mirror has the base's."""
        return self.is_model and not self.is_mirror and len(self.files) > 1

    @property
    def merged(self) -> list[str]:
        """Names of the base's tensors that are merged for it."""
        sources = [slot.source for slots in self.files.values() for slot in slots]
        return list(dict.fromkeys(source.name for source in sources if isinstance(source, Merged)))

    def index(self) -> bytes:
        """Content of ``model.safetensors.index.json``."""
        size = sum(slot.size for slots in self.files.values() for slot in slots)
        return index_of({file: [slot.name for slot in slots] for file, slots in self.files.items()}, size)


def mirror(context: Context, **_options: object) -> tuple[Output, ...]:
    """The base with other numbers: same files, headers, names and types."""
    return (mirror_of(context.plan),)


def mirror_of(plan: Plan, *, folder: str = "", experts: Sequence[str] | None = None) -> Output:
    """The base's mirror.

    Args:
        plan: checkpoints and parameters.
        folder: its place in the run's ``model/``.
        experts: the experts that are merged; None for all.
    """

    def slot(entry: Entry) -> Slot:
        merged = plan.merged_as(entry.name)
        source = Copied(entry.name) if merged is None else Merged(merged)
        return Slot(entry.name, entry.dtype, entry.shape, entry.size, source)

    return Output(
        {file.name: tuple(map(slot, plan.base.in_file(file))) for file in plan.base.files},
        folder,
        plan.base.headers,
        experts=None if experts is None else tuple(experts),
    )


def metadata_of(header: bytes) -> Mapping[str, str] | None:
    """What a file's header says beside its tensors, None where that is nothing."""
    found: Mapping[str, str] | None = json.loads(header[8:]).get("__metadata__")
    return found


def make_header(slots: Sequence[Slot], metadata: Mapping[str, str] | None = None) -> bytes:
    """Header of a safetensors file with these tensors one after the other, length field included.

    See https://github.com/huggingface/safetensors#format.
    """
    described: dict[str, Any] = {"__metadata__": dict(metadata or {"format": "pt"})}
    position = 0
    for slot in slots:
        described[slot.name] = {
            "dtype": slot.dtype,
            "shape": list(slot.shape),
            "data_offsets": [position, position + slot.size],
        }
        position += slot.size
    text = json.dumps(described, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNED)
    return struct.pack("<Q", len(text)) + text


def index_of(names: Mapping[str, Sequence[str]], size: int) -> bytes:
    """Content of an index for tensors by file name.

    Args:
        names: the tensors of each file.
        size: bytes of all of them.
    """
    weight_map = {name: file for file, in_file in names.items() for name in in_file}
    return (json.dumps({"metadata": {"total_size": size}, "weight_map": weight_map}, indent=2) + "\n").encode()


def shards(slots: Sequence[Slot], largest: int = 5_000_000_000) -> dict[str, tuple[Slot, ...]]:
    """Slots in files of at most so many bytes, named as transformers names them.

    Args:
        slots: all tensors of a model.
        largest: bytes of a file; a larger tensor has one for itself.
    """
    groups: list[list[Slot]] = [[]]
    for slot in slots:
        if groups[-1] and sum(other.size for other in groups[-1]) + slot.size > largest:
            groups.append([])
        groups[-1].append(slot)
    if len(groups) == 1:
        return {"model.safetensors": tuple(groups[0])}
    names = [f"model-{number:05}-of-{len(groups):05}.safetensors" for number in range(1, len(groups) + 1)]
    return {name: tuple(group) for name, group in zip(names, groups, strict=True)}
