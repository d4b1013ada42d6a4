"""What a machine has and has free, of memory and of processors; where a container has less, that counts."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from expert_merging.processes import local_count

if TYPE_CHECKING:
    import torch


_PROC, _GROUPS = Path("/proc"), Path("/sys/fs/cgroup")


def cores(proc: Path = _PROC, groups: Path = _GROUPS) -> int:
    """Processors that this process may use, at least one; a share of one counts as one.

    Args:
        proc: where the kernel tells of processes.
        groups: where it tells of groups of processes.
    """
    count = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    with contextlib.suppress(OSError, ValueError, IndexError):  # no such group, or one without a limit
        quota, period = map(int, _of_own_group("cpu.max", proc, groups).split())
        count = min(count, -(-quota // period))
    return count


def limit_threads() -> None:
    """Let torch compute with no more threads than there are processors: it counts a machine's, not a container's."""
    import torch

    torch.set_num_threads(min(torch.get_num_threads(), cores()))


def host_memory(proc: Path = _PROC, groups: Path = _GROUPS) -> int:
    """Bytes of memory that this machine has.

    Args:
        proc: where the kernel tells of processes.
        groups: where it tells of groups of processes.
    """
    size = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    with contextlib.suppress(OSError, ValueError, IndexError):
        size = min(size, int(_of_own_group("memory.max", proc, groups)))
    return size


def _of_own_group(kind: str, proc: Path, groups: Path) -> str:
    own = (proc / "self" / "cgroup").read_text(encoding="ascii").split("0::/")[1].splitlines()[0]
    return (groups / own / kind).read_text(encoding="ascii")


@contextlib.contextmanager
def limited_memory(more: int, proc: Path = _PROC) -> Iterator[None]:
    """Around what is not trusted: a `MemoryError` where the process would take more than so many further bytes.

    Args:
        more: bytes of addresses, used or not.
        proc: where the kernel tells of processes; nothing is limited where it does not.
    """
    import resource

    before = resource.getrlimit(resource.RLIMIT_AS)
    with contextlib.suppress(OSError, ValueError, IndexError):
        taken = int((proc / "self" / "statm").read_text(encoding="ascii").split()[0]) * os.sysconf("SC_PAGE_SIZE")
        limits = [taken + more, *(limit for limit in before if limit != resource.RLIM_INFINITY)]
        resource.setrlimit(resource.RLIMIT_AS, (min(limits), before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def memory_of(device: torch.device) -> int:
    """Bytes of memory that the device has."""
    import torch

    return host_memory() if device.type == "cpu" else torch.cuda.get_device_properties(device).total_memory


def half_of_memory(device: torch.device) -> int:
    """Half of the bytes of memory that the device has: what threads that share it may work with."""
    return memory_of(device) // 2


def gib(count: float) -> str:
    """Bytes of memory in words, in the powers of two that memory is sold in."""
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 / 10 else f"{count / 2**20:.1f} MiB"


def free_memory(device: str) -> float:
    """Bytes that are free on a device."""
    import torch

    return float(torch.cuda.mem_get_info(device)[0]) if device.startswith("cuda") else free_host_memory()


def free_host_memory(proc: Path = _PROC, groups: Path = _GROUPS) -> float:
    """Bytes available to this process if all processes of this machine take the same.

    Args:
        proc: where the kernel tells of processes.
        groups: where it tells of groups of processes.
    """
    try:
        lines = (proc / "meminfo").read_text(encoding="ascii").splitlines()
        free = next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        free = host_memory(proc, groups) // 2
    with contextlib.suppress(OSError, ValueError, IndexError, KeyError):  # no such group, or one without a limit
        limit, used = (int(_of_own_group(f"memory.{kind}", proc, groups)) for kind in ("max", "current"))
        statistics = dict(line.split() for line in _of_own_group("memory.stat", proc, groups).splitlines())
        free = min(free, limit - used + int(statistics["inactive_file"]))
    return free / local_count()


def show_size(count: float) -> str:
    """Bytes of files in words."""
    return f"{count / 1e9:.2f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"
