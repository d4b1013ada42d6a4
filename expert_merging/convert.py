"""A model's pickle files made into safetensors files, without running what they may hold.

`torch.load` reads tensors and refuses everything else. Files are mapped and tensors are written one by one, so memory
is that of the largest tensor that has to be copied. Tensors that share memory in the pickle are written each in full.
"""

from __future__ import annotations

import logging
import pickle
import re
import struct
import warnings
import zipfile
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from expert_merging.checkpoints.checkpoint import TORCH_NAMES, as_bytes
from expert_merging.checkpoints.folders import (
    ADAPTER,
    INDEX,
    SINGLE,
    has_safetensors,
    is_pickle,
    parts_of_training,
    refuse_pointers,
)
from expert_merging.checkpoints.other_files import check_kinds, check_other_files, not_copied, other_files
from expert_merging.checkpoints.sources import locate
from expert_merging.console import Terminal, say
from expert_merging.errors import InputError, Problems, first_line
from expert_merging.machine import show_size
from expert_merging.outputs import Made, Slot, index_of, make_header
from expert_merging.progress import Advance
from expert_merging.writing import (
    ShardWriter,
    check_free_disk,
    check_new_folder,
    copy_file,
    making_folder,
    sync_files,
    write_atomically,
)

if TYPE_CHECKING:
    from torch import Tensor

logger = logging.getLogger(__name__)
_MODEL_PICKLE, _ADAPTER_PICKLE = "pytorch_model.bin", "adapter_model.bin"
_NUMBERED = re.compile(r"pytorch_model-(\d{5})-of-(\d{5})\.bin")
# Safetensors' names of torch's types.
_TYPES = {
    **{kind: name for name, kind in TORCH_NAMES.items()},
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
    "int8": "I8",
    "int16": "I16",
    "int32": "I32",
    "uint16": "U16",
    "uint32": "U32",
    "uint64": "U64",
}
# What reading a damaged file may end with.
_DAMAGES = (
    RuntimeError,
    EOFError,
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    ArithmeticError,
    AssertionError,
    struct.error,
    zipfile.BadZipFile,
)


def convert(place: Path, target: Path, console: Console) -> None:
    """Write a folder's model as safetensors files, with copies of its other files.

    Args:
        place: the folder, or a repository on the Hub.
        target: where the model goes; nothing may be there.
        console: told what was written.

    Raises:
        InputError: every problem found, before anything is written.
    """
    target = target.absolute()
    folder = locate(place, pickles=True)
    files = pickle_files(folder)
    check_other_files(folder)
    check_new_folder(target, [folder], "NEW_FOLDER")
    layouts = _read_layouts(files)
    size = sum(slot.size for slots in layouts.values() for slot in slots)
    check_free_disk(target, size, "NEW_FOLDER")
    with closing(Terminal()) as terminal, making_folder(target) as partial:
        partial.mkdir(parents=True)
        for line in not_copied(folder):
            logger.warning("%s", line)
        with terminal.progress("converting", size, "B") as advance:
            for name, file in files.items():
                _write(_load(file), layouts[name], partial / name, advance)
        _complete(partial, folder, layouts, size)
    say(console, f"{target} ({show_size(size)})")


def pickle_files(folder: Path) -> dict[str, Path]:
    """The pickle files of a folder's model, by the names of the safetensors files that they become.

    Raises:
        InputError: there is no folder, there are none, some are missing, or there are safetensors files already.
    """
    if not folder.is_dir():
        raise InputError(f"checkpoint folder {folder} does not exist")
    check_kinds(folder)
    names = sorted(file.name for file in folder.iterdir())
    if has_safetensors(names):
        raise InputError(f"{folder} has safetensors files already, which are read; there is nothing to convert")
    numbered = [name for name in names if _NUMBERED.fullmatch(name)]
    known = [name for name in (_MODEL_PICKLE, _ADAPTER_PICKLE) if name in names]
    others = [name for name in names if is_pickle(name)]
    if known:
        found = known[:1]
    elif numbered:
        found = numbered
        _check_complete(folder, numbered)
    elif len(others) == 1:
        found = others
    elif others:
        raise InputError(
            f"{folder} has several pickle files ({', '.join(others[:4])}), and none is called pytorch_model.bin or "
            "pytorch_model-00001-of-00002.bin, as those of a model are"
        )
    else:
        raise InputError(parts_of_training(folder) or f"{folder} has no pickle files of a model")
    refuse_pointers(folder / name for name in found)
    return {_new_name(name): folder / name for name in found}


def _check_complete(folder: Path, names: list[str]) -> None:
    """Check that numbered files are all there."""
    totals = sorted({name.rpartition("-of-")[2] for name in names})
    if len(totals) > 1:
        sets = ", ".join(f"*-of-{total}" for total in totals)
        raise InputError(f"{folder} has pickle files of several sets ({sets}); remove those that do not belong there")
    count = int(totals[0].removesuffix(".bin"))
    wanted = [f"pytorch_model-{number:05}-of-{totals[0]}" for number in range(1, count + 1)]
    missing = [name for name in wanted if name not in names]
    if missing:
        raise InputError(
            f"{folder} has {len(names)} of {count} pickle files of its model; missing: {', '.join(missing)}; "
            "download the rest"
        )


def _new_name(name: str) -> str:
    if name == _ADAPTER_PICKLE:
        return ADAPTER
    return f"{name.removeprefix('pytorch_').removesuffix('.bin')}.safetensors" if _NUMBERED.fullmatch(name) else SINGLE


def _read_layouts(files: Mapping[str, Path]) -> dict[str, tuple[Slot, ...]]:
    """The tensors of every file that is written."""
    problems, layouts, seen = Problems(), dict[str, tuple[Slot, ...]](), dict[str, str]()
    for name, file in files.items():
        with problems.collecting():
            layouts[name] = tuple(_slot(file, key, value) for key, value in _load(file).items())
            for slot in layouts[name]:
                if slot.name in seen:
                    problems.add(f"{file}: tensor {slot.name} is in {seen[slot.name]} already; download both again")
                seen[slot.name] = file.name
    problems.check()
    return layouts


def _slot(file: Path, name: str, tensor: Tensor) -> Slot:
    import torch

    kind = str(tensor.dtype).removeprefix("torch.")
    if kind not in _TYPES or tensor.layout != torch.strided:
        how = kind if kind not in _TYPES else str(tensor.layout).removeprefix("torch.")
        raise InputError(f"{file}: {name} is stored as {how}, which safetensors files cannot hold")
    return Slot.of(name, _TYPES[kind], tuple(tensor.shape), Made(name))


def _load(file: Path) -> dict[str, Tensor]:
    """The tensors of a pickle file by name, as pages of the file.

    Raises:
        InputError: it holds something else, or cannot be read.
    """
    import torch

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of versions of pickle that it does not know
            # Files of torch before 1.6 are no archives and cannot be mapped.
            content = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except pickle.UnpicklingError as error:
        named = re.search(r"GLOBAL (\S+)", str(error))
        what = f" ({named[1]})" if named else ""
        raise InputError(
            f"{file} holds more than tensors{what}, which could run code when it is opened, or is no pickle file; ask "
            "its maker for safetensors files"
        ) from None
    except _DAMAGES as error:
        reason = first_line(error)
        raise InputError(f"{file} is no pickle file of tensors, or is damaged ({reason}); download it again") from None
    if not isinstance(content, dict):
        raise InputError(f"{file} holds {type(content).__name__}, not tensors by name as a model's file does")
    others = [str(name) for name, value in content.items() if not (isinstance(name, str) and torch.is_tensor(value))]
    if others:
        raise InputError(f"{file} holds {', '.join(others[:3])} beside or instead of tensors; a model's file has none")
    return dict(content)


def _write(tensors: Mapping[str, Tensor], slots: tuple[Slot, ...], target: Path, advance: Advance) -> None:
    """Write one file."""
    header = make_header(slots)
    offset = len(header)
    writer = ShardWriter(target, header, offset + sum(slot.size for slot in slots))
    try:
        for slot in slots:
            writer.write(as_bytes(tensors[slot.name].detach().contiguous().flatten()), offset)
            offset += slot.size
            advance(slot.size, target.name)
    except BaseException:
        writer.abandon()
        raise
    writer.finish()


def _complete(partial: Path, folder: Path, layouts: Mapping[str, tuple[Slot, ...]], size: int) -> None:
    """Write what the folder has beside weights."""
    for relative in other_files(folder):
        (partial / relative).parent.mkdir(parents=True, exist_ok=True)
        copy_file(folder / relative, partial / relative)
    if len(layouts) > 1:
        names = {file: [slot.name for slot in slots] for file, slots in layouts.items()}
        write_atomically(partial / INDEX, index_of(names, size))
    sync_files(partial)
