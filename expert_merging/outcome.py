"""``RUN/outcome.json``: what a run took and how far it went from its base, for tables of runs.

``config.json`` says what was asked and can be repeated; this says what came of it. The file is there before the model
gets its name, so every complete run of this version has one.
"""

from __future__ import annotations

import contextlib
import json
import math
import resource
import sys
import time
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from expert_merging.documents import read_object
from expert_merging.errors import InputError
from expert_merging.writing import write_atomically

FORMAT = 1
_PROC = Path("/proc")


@dataclass(frozen=True)
class Outcome:
    """What a run took and what came out.

    Args:
        seconds: from the end of its checks to the complete model; of one that was interrupted, of its last part.
        peak_memory: bytes of memory of its largest process, of the last part.
        peak_gpu_memory: bytes of the main process's GPU; None without one.
        relative_change: ``norm(merged - base) / norm(base)`` over all merged tensors; None where an earlier part had
            merged some of them.
        continued: an earlier part of the run was interrupted, so it took more than is said here.
        finished: when, as ISO 8601 has it.
    """

    seconds: float
    peak_memory: int
    peak_gpu_memory: int | None
    relative_change: float | None
    continued: bool
    finished: str


class Meter:
    """Measures a run from now on.

    Args:
        continued: an earlier part of the run is there.
    """

    def __init__(self, *, continued: bool) -> None:
        self.start = time.monotonic()
        self.continued = continued

    @property
    def seconds(self) -> float:
        """Seconds until now."""
        return time.monotonic() - self.start

    def save(self, file: Path, relative_change: float | None, device: str) -> None:
        """Write what the run has taken until now.

        Args:
            file: the run's ``outcome.json``.
            relative_change: as `Outcome` has it.
            device: where the run computes.
        """
        outcome = Outcome(
            round(self.seconds, 3),
            peak_memory(),
            _peak_gpu_memory(device),
            relative_change,
            self.continued,
            datetime.now().astimezone().isoformat(timespec="seconds"),
        )
        write_atomically(file, (json.dumps({"format": FORMAT, **asdict(outcome)}, indent=2) + "\n").encode())


def read_outcome(file: Path) -> Outcome | None:
    """What was written; None where nothing was, or something that this version cannot read."""
    if not file.is_file():
        return None
    try:
        content = read_object(file)
        if content.pop("format") != FORMAT or not _is_outcome(content):
            return None
        return Outcome(**content)
    except (InputError, KeyError, TypeError):
        return None


def _is_outcome(content: dict[str, Any]) -> bool:
    """Whether the values are of the types that they have; a truth value is no number, and what is taken is finite."""
    optional = content["peak_gpu_memory"], content["relative_change"]
    numbers = [content["seconds"], content["peak_memory"], *(value for value in optional if value is not None)]
    return (
        all(type(value) in (int, float) for value in numbers)
        and all(map(math.isfinite, numbers[:2]))
        and isinstance(content["continued"], bool)
        and isinstance(content["finished"], str)
    )


def peak_memory(proc: Path = _PROC) -> int:
    """Bytes of memory that the largest of this process and of those that it has forked has taken at its peak.

    Args:
        proc: where the kernel tells of processes. What `resource` tells of this one counts the program that started it.
    """
    unit = 1 if sys.platform == "darwin" else 1024
    own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    with contextlib.suppress(OSError, StopIteration, ValueError):
        lines = (proc / "self" / "status").read_text(encoding="utf-8").splitlines()
        own = next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))
    return max(own, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * unit)


def _peak_gpu_memory(device: str) -> int | None:
    if not device.startswith("cuda"):
        return None
    import torch

    return torch.cuda.max_memory_allocated(device)
