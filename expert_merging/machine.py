"""How much memory a machine has, and has free, and in which words that is said."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def half_of_memory(device: torch.device) -> int:
    """Half of the bytes of memory that the device has: what threads that share it may work with."""
    import torch

    if device.type == "cpu":
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    return torch.cuda.get_device_properties(device).total_memory // 2


def gib(count: float) -> str:
    """Bytes of memory in words, in the powers of two that memory is sold in."""
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 / 10 else f"{count / 2**20:.1f} MiB"


def free_memory(device: str) -> float:
    """Bytes that are free on a device."""
    import torch

    return float(torch.cuda.mem_get_info(device)[0]) if device.startswith("cuda") else free_host_memory()


def free_host_memory(proc: Path = Path("/proc"), groups: Path = Path("/sys/fs/cgroup")) -> float:
    """Bytes available to this process if all processes of this machine take the same; a container's limit counts.

    Args:
        proc: where the kernel tells of processes.
        groups: where it tells of groups of processes.
    """
    try:
        lines = (proc / "meminfo").read_text(encoding="ascii").splitlines()
        free = next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        free = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    with contextlib.suppress(OSError, ValueError, IndexError, KeyError):  # no such group, or one without a limit
        own = (proc / "self" / "cgroup").read_text(encoding="ascii").split("0::/")[1].splitlines()[0]
        limit, used = (
            int((groups / own / f"memory.{kind}").read_text(encoding="ascii")) for kind in ("max", "current")
        )
        statistics = dict(line.split() for line in (groups / own / "memory.stat").read_text().splitlines())
        free = min(free, limit - used + int(statistics["inactive_file"]))
    return free / int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
