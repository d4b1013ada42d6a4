"""Errors that mean that memory ran out, whoever raises them: Python, numpy, torch on a CPU or a GPU, the system."""

from __future__ import annotations

import errno
import re
from dataclasses import dataclass

# What those say that raise no error of a kind of its own.
_SIGNS = re.compile(r"out of memory|allocate memory|_ALLOC_FAILED|Unable to allocate", re.IGNORECASE)
_ON_GPU = re.compile(r"CUDA|CUBLAS|CUDNN|GPU")
_ASKED = re.compile(r"allocate (\d+(?:\.\d+)?) (bytes|[KMGTP]iB)")
_UNITS = {"bytes": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40, "PiB": 2**50}


@dataclass(frozen=True)
class Shortage:
    """Memory that was not there.

    Args:
        on_gpu: of a GPU; otherwise of the host.
        asked: bytes that were asked for at last, None where that is not said.
    """

    on_gpu: bool
    asked: float | None


def shortage_of(error: BaseException) -> Shortage | None:
    """The shortage that an error means, None for any other error."""
    said = str(error)
    # torch's own kind is told by its name, so that torch need not be loaded here.
    is_one = (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or (isinstance(error, OSError) and error.errno == errno.ENOMEM)
        or (isinstance(error, RuntimeError) and _SIGNS.search(said) is not None)
    )
    if not is_one:
        return None
    found = _ASKED.search(said)
    asked = float(found[1]) * _UNITS[found[2]] if found else None
    return Shortage(on_gpu=not isinstance(error, MemoryError | OSError) and bool(_ON_GPU.search(said)), asked=asked)
