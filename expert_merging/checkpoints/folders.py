"""What lies in a checkpoint's folder: weights, what a trainer keeps, other files; and what a folder without weights is.

Names are looked at, the first bytes of files that may stand for others, and files that hold a JSON object.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from expert_merging.documents import read_object
from expert_merging.errors import InputError, excerpt

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
ADAPTER = "adapter_model.safetensors"

_WEIGHTS = re.compile(
    r".*\.(bin|pt|pth|ckpt|h5|msgpack|gguf|onnx|safetensors|distcp)$|.*\.(bin|safetensors)\.index\.json$"
)
_PICKLES = re.compile(r".*\.(bin|pt|pth|ckpt|pkl)$")
_NUMBERED = re.compile(r"model-(\d{5})-of-(\d{5})\.safetensors")
# Mistral's and Llama's own formats, with tensor names of their own.
_CONSOLIDATED = re.compile(r"consolidated.*\.(safetensors|pth)")
# What trainers keep beside a model, to go on from there.
_OF_TRAINERS = re.compile(
    r"training_args\.bin|trainer_state\.json|latest|zero_to_fp32\.py|\.metadata|.*\.distcp|events\.out\.tfevents\..*"
    r"|(optimizer|scheduler|scaler|sampler|rng_state|random_states|dl_state_dict|custom_checkpoint)(_\d+)*"
    r"\.(pt|pth|bin|pkl)|.*_(model|optim)_states\.pt"
)
_CHECKPOINT = re.compile(r"checkpoint-(\d+)")
_DEEPSPEED = re.compile(r"global_step\d+")
_FSDP = re.compile(r"(pytorch_model_fsdp|optimizer)(_\d+)?")
_CACHED = re.compile(r".*/models--(?P<id>[^/]+)/snapshots/(?P<commit>[^/]+)")
# Bytes of a file's name on every usual file system.
_LONGEST_NAME = 255
_POINTER = b"version https://git-lfs"
_POINTER_BYTES = 1024  # more than a pointer ever has


def origin(folder: Path | str) -> tuple[str, str] | None:
    """Name and commit of the repository that a folder in the Hub's cache is a snapshot of; None for other folders."""
    match = _CACHED.fullmatch(str(folder).rstrip("/"))
    return match and (match["id"].replace("--", "/", 1), match["commit"])


def owner(folder: Path | str) -> str:
    """What a checkpoint is called without the folders of this machine: its repository's name, or its folder's."""
    repository = origin(folder)
    return Path(folder).name if repository is None else repository[0]


def is_weights(name: str) -> bool:
    """Whether a file of that name holds weights, of any format, or says where they are."""
    return bool(_WEIGHTS.fullmatch(name)) and not _OF_TRAINERS.fullmatch(name)


def is_pickle(name: str) -> bool:
    """Whether a file of that name holds pickled weights."""
    return bool(_PICKLES.fullmatch(name)) and not (_OF_TRAINERS.fullmatch(name) or _CONSOLIDATED.fullmatch(name))


def is_of_trainer(name: str) -> bool:
    """Whether a trainer keeps a file or a folder of that name, for itself."""
    return any(pattern.fullmatch(name) for pattern in (_OF_TRAINERS, _CHECKPOINT, _DEEPSPEED, _FSDP))


def chosen_weights(names: Iterable[str]) -> list[str]:
    """Of the names in a folder, the safetensors files that hold a model, as `from_pretrained` chooses them."""
    present = sorted(names)
    return [SINGLE] if SINGLE in present else [name for name in present if _NUMBERED.fullmatch(name)]


def has_safetensors(names: Iterable[str]) -> bool:
    """Whether a model or an adapter is there in safetensors files, by the names in its folder."""
    present = set(names)
    return bool(chosen_weights(present) or {INDEX, ADAPTER} & present)


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model.

    Raises:
        InputError: there are none, or one is missing.
    """
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    names = sorted(set(weight_map(folder).values())) if (folder / INDEX).is_file() else _numbered(folder)
    outside = [name for name in names if Path(name).name != name or len(name.encode()) > _LONGEST_NAME]
    if outside:
        raise InputError(
            f"{folder / INDEX} names {excerpt(outside[0], quoted=False)!r}; weight files must lie in the folder itself"
        )
    missing = [
        f"{folder / name} is missing, and {INDEX} names it; download it"
        for name in names
        if not (folder / name).is_file()
    ]
    if missing:
        raise InputError(*missing)
    return [folder / name for name in names]


def weight_map(folder: Path) -> dict[str, str]:
    """File by tensor, as the index of the folder says.

    Raises:
        InputError: it is none.
    """
    found = required_object(folder / INDEX).get("weight_map")
    if not isinstance(found, dict) or not found or not all(isinstance(file, str) for file in found.values()):
        raise InputError(f"{folder / INDEX} is not a JSON object with a weight_map; download it again")
    return {str(name): file for name, file in found.items()}


def _numbered(folder: Path) -> list[str]:
    """Numbered files without an index, which are all there."""
    names = chosen_weights(file.name for file in folder.iterdir())
    totals = sorted({name.split("-of-")[1] for name in names})
    if not totals:
        raise InputError(without_weights(folder))
    if len(totals) > 1:
        raise InputError(
            f"{folder} has files of several sets ({', '.join(f'*-of-{total}' for total in totals)}) and no {INDEX}, "
            "which says what belongs together; download it, or remove the files that do not belong there"
        )
    count = int(totals[0].partition(".")[0])
    missing = [
        name for name in (f"model-{number:05}-of-{totals[0]}" for number in range(1, count + 1)) if name not in names
    ]
    if missing:
        raise InputError(
            f"{folder} has {len(names)} of {count} weight files and no {INDEX}; missing: {', '.join(missing)}; "
            "download the rest"
        )
    return names


def without_weights(folder: Path) -> str:
    """What a folder is that has no safetensors files of a model, and what to do, in a sentence."""
    pickles = sorted(file.name for file in folder.iterdir() if is_pickle(file.name))
    if pickles:
        return pickled(str(folder), pickles[0])
    return parts_of_training(folder) or (f"{folder} has neither {SINGLE} nor {INDEX}; download the safetensors weights")


def pickled(place: str, name: str) -> str:
    """What to do with a model in pickle files.

    Args:
        place: the folder, or the repository on the Hub.
        name: one of the files.
    """
    return (
        f"{place} has its weights in pickle files ({name}), which can run code when they are opened; this converts "
        f"them without running any, in the repository's folder: python -m expert_merging convert {place} NEW_FOLDER"
    )


def parts_of_training(folder: Path) -> str | None:
    """What a folder is that training left and that holds no model, in a sentence; None if it is something else."""
    names = sorted(file.name for file in folder.iterdir())
    if chosen_weights(names) or any(map(is_pickle, names)):
        return None
    saved = sorted((int(name.split("-")[1]), name) for name in names if _CHECKPOINT.fullmatch(name))
    consolidated = [name for name in names if _CONSOLIDATED.fullmatch(name)]
    kept = [name for name in names if _OF_TRAINERS.fullmatch(name)]
    scattered = _scattered(folder, names)
    if scattered:
        return f"{scattered}, and copy config.json and the tokenizer there"
    if saved:
        return f"{folder} has no weights of its own; its newest checkpoint is {folder / saved[-1][1]}"
    if consolidated:
        return (
            f"{folder} has its weights in the maker's own format ({consolidated[0]}), with names of its own; download "
            "the same repository's files for transformers (model*.safetensors)"
        )
    if kept:
        return (
            f"{folder} has no weights: {', '.join(kept[:3])} are what a trainer keeps for itself; give the folder that "
            "it saved the model to"
        )
    return None


def _scattered(folder: Path, names: Iterable[str]) -> str | None:
    """How to put a model together whose parts the processes of a training saved each on its own."""
    parts = [name for name in names if _DEEPSPEED.fullmatch(name)]
    if parts:
        return (
            f"{folder} holds the parts of a model that DeepSpeed saved ({parts[-1]}), not the model; put them "
            f"together: python {folder / 'zero_to_fp32.py'} {folder} NEW_FOLDER --safe_serialization"
        )
    sharded = [*sorted(folder.glob("*.distcp")), *sorted(folder.glob("pytorch_model_fsdp*/*.distcp"))]
    if sharded:
        place = sharded[0].parent
        return (
            f"{place} holds the parts of a model that FSDP saved (*.distcp), not the model; put them together: "
            f"accelerate merge-weights {place} NEW_FOLDER"
        )
    return None


def weights_in_other_formats(folder: Path, read: Iterable[str]) -> list[str]:
    """Names of weight files that are not copied and that are not among those that are read."""
    names = sorted(file.name for file in folder.iterdir() if is_weights(file.name))
    return [name for name in names if name != INDEX and name not in set(read)]


def is_pointer(file: Path) -> bool:
    """Whether a file only says what Git LFS would put in its place."""
    if file.stat().st_size > _POINTER_BYTES:
        return False
    with file.open("rb") as stream:
        return stream.read(len(_POINTER)) == _POINTER


def refuse_pointers(files: Iterable[Path]) -> None:
    """Check that files are themselves.

    Raises:
        InputError: they stand for others.
    """
    found = [pointer(file) for file in sorted(files) if file.is_file() and is_pointer(file)]
    if found:
        raise InputError(*found)


def required_object(file: Path) -> dict[str, Any]:
    """The JSON object of a file that is there.

    Raises:
        InputError: it holds something else, or stands for another file.
    """
    if is_pointer(file):
        raise InputError(pointer(file))
    return read_object(file)


def pointer(file: Path) -> str:
    """What to do about a file that stands for another."""
    return f"{file} is a Git LFS pointer, not the file itself; run `git lfs pull` in {file.parent}"
