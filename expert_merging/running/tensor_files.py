"""Files of tensors that a run keeps for itself, known by their digests."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from expert_merging.kept import Kept, Written
from expert_merging.writing import partial_name, sync_file, sync_folder


def write_tensors(file: Path, tensors: Mapping[str, Tensor], kept: Kept) -> None:
    """Write tensors to a file that has its name only once it is complete and noted.

    Args:
        file: the file.
        tensors: by name, of any device.
        kept: notes what is written.
    """
    temporary = partial_name(file)
    try:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary)
    except BaseException:  # as where the disk is full
        temporary.unlink(missing_ok=True)
        raise
    put_in_place(temporary, file, kept)


def put_in_place(temporary: Path, file: Path, kept: Kept) -> None:
    """Give a file that is complete its name, once it is durable and noted.

    Args:
        temporary: where it is.
        file: where it belongs, in the same folder.
        kept: notes it.
    """
    try:
        sync_file(temporary)
    except BaseException:  # as where the disk is full
        temporary.unlink(missing_ok=True)
        raise
    kept.note({file.name: Written.of_file(temporary)})
    os.rename(temporary, file)
    sync_folder(file.parent)
