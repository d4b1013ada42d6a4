"""Read safetensors checkpoints lazily and check that experts fit their base.

Only headers are read when a checkpoint is opened. Entries are read with positioned reads, block by block, never
through a memory map: resident memory stays what was asked for, and several threads can read the same file. Nothing here
unpickles or executes anything found in a checkpoint folder.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from expert_merging.checkpoints.fingerprints import blocks, file_content, shortened, written
from expert_merging.checkpoints.folders import (
    INDEX,
    SINGLE,
    is_pointer,
    parts_of_training,
    pointer,
    required_object,
    weight_files,
    weight_map,
)
from expert_merging.checkpoints.open_files import OpenFiles
from expert_merging.checkpoints.orders import Order
from expert_merging.checkpoints.other_files import check_kinds, other_files
from expert_merging.errors import InputError, Problems, first_line

if TYPE_CHECKING:
    import torch
    from torch import Tensor

# safetensors' names of floating-point types and of torch's, with bytes per entry.
FLOATS = {"F64": ("float64", 8), "F32": ("float32", 4), "F16": ("float16", 2), "BF16": ("bfloat16", 2)}
OTHERS = {
    "BOOL": 1,
    "U8": 1,
    "I8": 1,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "F8_E8M0": 1,
    "F8_E4M3FNUZ": 1,
    "F8_E5M2FNUZ": 1,
    "I16": 2,
    "U16": 2,
    "I32": 4,
    "U32": 4,
    "I64": 8,
    "U64": 8,
    "C64": 8,
}
# Types of which several entries share bytes, with bits per entry.
_BITS = {"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6}
# Types of what is no parameter: counts, positions, masks.
WHOLE = frozenset(name for name in OTHERS if not name.startswith(("F", "C")))
# Torch's names of the types that are written, and bytes per entry of every type.
TORCH_NAMES = {**{name: kind for name, (kind, _) in FLOATS.items()}, "U8": "uint8", "I64": "int64", "BOOL": "bool"}
WIDTHS = {**{name: width for name, (_, width) in FLOATS.items()}, **OTHERS}


@dataclass(frozen=True)
class Entry:
    """One tensor in a safetensors file.

    Args:
        name: tensor name in the file.
        dtype: safetensors' name of the type, such as ``BF16``.
        shape: its dimensions.
        file: the file that holds it.
        offset: position of its first byte in the file.
        size: its length in bytes.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    offset: int
    size: int

    @property
    def elements(self) -> int:
        """Number of entries."""
        return prod(self.shape)

    @property
    def is_float(self) -> bool:
        """Whether the entries can be merged."""
        return self.dtype in FLOATS

    @property
    def torch_dtype(self) -> torch.dtype:
        """The type as torch calls it, for floating-point entries."""
        return torch_dtype(self.dtype)


def torch_dtype(name: str) -> torch.dtype:
    """Torch's type for safetensors' name of one."""
    import torch

    dtype: torch.dtype = getattr(torch, TORCH_NAMES[name])
    return dtype


class Checkpoint:
    """A folder with ``config.json`` and safetensors weights, opened for reading.

    Args:
        folder: the folder as downloaded or as `save_pretrained` left it.

    Attributes:
        opened: a digest of what tells whether the weight files were written since: `fingerprints.written`.
        orders: tensors whose rows or columns are read in another order than they are stored in, by name.

    Raises:
        InputError: the folder cannot be used; every problem found is listed.
    """

    config_name = "config.json"
    kind = ""  # what is said beside the folder of one that is no full model
    has_own_head = False  # the head is not the embedding, whatever names and settings say
    orders: Mapping[str, Order] = MappingProxyType({})
    whole: frozenset[str] = frozenset()  # tensors that an adapter has itself

    def __init__(self, folder: Path) -> None:
        self.config = _read_config(folder)
        self._open(folder, weight_files(folder))
        _check_index(folder, self.entries)

    def _open(self, folder: Path, files: list[Path]) -> None:
        self._open_files = OpenFiles()
        self._pages: dict[Path, Tensor] = {}
        self.opened = written(files)
        self.folder = folder
        self.files = files
        self.headers: dict[str, bytes] = {}
        self.entries: dict[str, Entry] = {}
        problems = Problems()
        for file in files:
            with problems.collecting():
                header, entries = read_header(file)
                self.headers[file.name] = header
                self._add(entries)
        problems.check()
        self.stored = tuple(self.entries.values())  # whatever they are called or computed to be later

    def _add(self, entries: list[Entry]) -> None:
        for entry in entries:
            if entry.name in self.entries:
                first = self.entries[entry.name].file.name
                raise InputError(
                    f"{entry.file}: tensor {entry.name} is in {first} already; a tensor belongs in one file"
                )
            self.entries[entry.name] = entry

    @property
    def model_type(self) -> str:
        """What ``config.json`` calls the kind of model, empty where it does not say."""
        return str(self.config.get("model_type") or "")

    @property
    def changed(self) -> frozenset[str]:
        """Names of the tensors that are read otherwise than the folder that is loaded for them has them."""
        return frozenset(self.orders)

    @property
    def order_digest(self) -> str:
        """A digest of the order that rows and columns are read in; empty where that is the stored one."""
        digest = hashlib.sha256()
        for name, order in sorted(self.orders.items()):
            digest.update(f"{name} {order.key()}".encode())
        return shortened(digest.digest()) if self.orders else ""

    def in_file(self, file: Path) -> list[Entry]:
        """The tensors of one file in the order of their bytes."""
        return sorted((entry for entry in self.entries.values() if entry.file == file), key=lambda entry: entry.offset)

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Entries ``[start, stop)`` of the flattened tensor, in the file's type.

        Returns:
            ``(stop - start,)``; the whole tensor, flattened, without bounds.
        """
        import torch

        entry = self.entries[name]
        stop = entry.elements if stop is None else stop
        block = torch.empty(stop - start, dtype=entry.torch_dtype)
        self.read_into(block, name, start)
        return block

    def read_into(self, block: Tensor, name: str, start: int) -> None:
        """Fill a block ``(entries,)`` of the file's type with entries of the flattened tensor, from ``start`` on."""
        entry = self.entries[name]
        if name in self.orders:
            self.orders[name].fill(block, entry.shape, start, lambda run, first: self._read_entry(run, entry, first))
        else:
            self._read_entry(block, entry, start)

    def _read_entry(self, block: Tensor, entry: Entry, start: int) -> None:
        position = entry.offset + start * block.element_size()
        self.read_bytes(as_bytes(block), entry.file, position)

    def mapped(self, name: str) -> Tensor:
        """The flattened tensor ``(entries,)`` as pages of the file, which take memory while they are used.

        Whoever writes to it changes copies of the pages, which later calls for this checkpoint get, and not the file.
        """
        import torch

        entry = self.entries[name]
        is_misplaced = entry.offset % entry.torch_dtype.itemsize  # allowed, but no tensor begins there
        if is_misplaced or not entry.size or name in self.orders:
            return self.read(name)
        if entry.file not in self._pages:
            size = entry.file.stat().st_size
            self._pages[entry.file] = torch.from_file(str(entry.file), shared=False, size=size, dtype=torch.uint8)
        return self._pages[entry.file][entry.offset : entry.offset + entry.size].view(entry.torch_dtype)

    def read_bytes(self, view: memoryview, file: Path, position: int) -> None:
        """Fill the view with bytes of one of the files, from any thread."""
        with self._open_files.reading(file) as descriptor:
            read_exactly(descriptor, view, position, file)

    def close(self) -> None:
        """Close the files; pages that somebody still holds stay."""
        self._pages.clear()
        self._open_files.close()

    def fingerprint(self, *, whole: bool) -> str:
        """A digest of the contents of weights and ``config.json``, which a copy shares.

        Args:
            whole: also of every other file (tokenizer, processor, ...).
        """
        headers = [self.headers[file.name] for file in self.files]
        digest = hashlib.sha256(b"".join([*headers, *self._digests()]))
        for relative in other_files(self.folder) if whole else [Path(self.config_name)]:
            digest.update(os.fsencode(relative) + file_content(self.folder / relative))
        return shortened(digest.digest())

    def content(self) -> str:
        """A digest of samples of all tensors, which copies of the weights share, whatever their files and names."""
        return shortened(hashlib.sha256(b"".join(sorted(self._digests()))).digest())

    def _digests(self) -> Iterator[bytes]:
        """Of type, shape and samples of every stored tensor."""
        for entry in self.stored:
            digest = hashlib.sha256(f"{entry.dtype} {entry.shape}".encode())
            with self._open_files.reading(entry.file) as descriptor:
                for block in blocks(descriptor, entry.offset, entry.size):
                    digest.update(block)
            yield digest.digest()

    def is_as_opened(self) -> bool:
        """Whether nobody has written to the weight files, or put others in their place, since they were opened."""
        try:
            headers = {file.name: read_header(file)[0] for file in self.files}
            return self.opened == written(self.files) and headers == self.headers
        except (InputError, OSError):  # one is damaged now, or gone
            return False


@contextmanager
def loadable(folder: Path) -> Iterator[Path]:
    """A folder that `from_pretrained` loads like this one: itself, or links with the index that numbered files lack."""
    if (folder / SINGLE).is_file() or (folder / INDEX).is_file():
        yield folder
        return
    checkpoint = Checkpoint(folder)
    with tempfile.TemporaryDirectory() as links:
        for file in folder.iterdir():
            (Path(links) / file.name).symlink_to(file.resolve())
        index = {"metadata": {}, "weight_map": {name: entry.file.name for name, entry in checkpoint.entries.items()}}
        (Path(links) / INDEX).write_text(json.dumps(index), encoding="utf-8")
        yield Path(links)


def as_bytes(block: Tensor) -> memoryview:
    """The memory of a block ``(entries,)`` of any type on the CPU."""
    import torch

    return memoryview(block.view(torch.uint8).numpy())  # type: ignore[arg-type]


def read_exactly(descriptor: int, view: memoryview, offset: int, file: Path) -> None:
    """Fill the view from the file.

    Raises:
        InputError: the file is shorter than its header says, as when it is being replaced meanwhile.
    """
    filled = 0
    while filled < len(view):
        count = os.preadv(descriptor, [view[filled:]], offset + filled)
        if count == 0:
            raise InputError(f"{file} ended early while it was read; was it replaced or cut off? Download it again")
        filled += count


def _read_config(folder: Path) -> dict[str, Any]:
    """``config.json`` of the folder, with a clear error for every kind of folder that is not a full checkpoint."""
    if folder.is_file():
        raise InputError(f"{folder} is a file; give the folder of the checkpoint that it belongs to")
    if not folder.is_dir():
        raise InputError(f"checkpoint folder {folder} does not exist")
    check_kinds(folder)
    if (folder / "adapter_config.json").is_file():
        raise InputError(
            f"{folder} holds an adapter (adapter_config.json), and a full model is needed here; adapters can be "
            "experts (--expert), and the base is the model that they were trained on"
        )
    file = folder / "config.json"
    if not file.is_file():
        raise InputError(
            parts_of_training(folder)
            or f"{folder} has no config.json; a checkpoint folder holds config.json and safetensors weights"
        )
    config = required_object(file)
    if config.get("quantization_config"):
        raise InputError(
            f"{file} has a quantization_config: quantized weights cannot be merged exactly; use the unquantized ones"
        )
    return config


def _check_index(folder: Path, entries: Mapping[str, Entry]) -> None:
    if (folder / SINGLE).is_file() or not (folder / INDEX).is_file():
        return
    problems = [
        f"{folder / file} does not hold {name}, and {INDEX} says it does; download both again"
        for name, file in weight_map(folder).items()
        if name not in entries or entries[name].file.name != file
    ]
    if problems:
        raise InputError(*problems[:10])


def read_header(file: Path) -> tuple[bytes, list[Entry]]:
    """The raw header of a safetensors file, length field included, and its entries, as the safetensors library has it.

    See https://github.com/huggingface/safetensors#format. Tensors lie one after the other without a gap.

    Raises:
        InputError: the library does not take the file, or it has a type that is not known here.
    """
    from safetensors import SafetensorError, safe_open

    if is_pointer(file):
        raise InputError(pointer(file))
    try:
        with safe_open(file, framework="numpy") as opened, file.open("rb") as stream:
            length_field = stream.read(8)
            header = stream.read(struct.unpack("<Q", length_field)[0])
            described = [(name, opened.get_slice(name)) for name in opened.offset_keys()]
            entries, end = [], len(length_field) + len(header)
            for name, tensor in described:
                entry = _entry(name, tensor.get_dtype(), tuple(tensor.get_shape()), file, end)
                entries.append(entry)
                end += entry.size
    except SafetensorError as error:
        raise InputError(
            f"{file} is truncated or not a safetensors file ({file.stat().st_size} bytes: {_reason(error)}); download "
            "it again"
        ) from None
    except OSError as error:
        raise InputError(f"{file} cannot be read ({error.strerror or error})") from None
    # The library has no order for empty tensors in one place.
    return length_field + header, sorted(entries, key=lambda entry: (entry.offset, entry.size, entry.name))


def _reason(error: Exception) -> str:
    """What the library says of a header, without a list of all types that there are."""
    return first_line(error).removeprefix("Error while deserializing header: ").partition(", expected one of")[0]


def _entry(name: str, dtype: str, shape: tuple[int, ...], file: Path, offset: int) -> Entry:
    bits = _BITS.get(dtype) or 8 * WIDTHS.get(dtype, 0)
    if not bits:
        raise InputError(f"{file}: {name} is stored as {dtype}, a type that is not known here; convert it with torch")
    return Entry(name, dtype, shape, file, offset, prod(shape) * bits // 8)
