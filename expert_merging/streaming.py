"""Read task vectors in blocks with a few threads, and share the blocks among processes.

A block's result depends on its entries alone, so results are the same whatever the number of threads and processes.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_COMPLETED, FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

from expert_merging.checkpoint import Entry
from expert_merging.errors import InputError
from expert_merging.plan import Part, Plan, Progress

if TYPE_CHECKING:
    import torch
    from torch import Tensor

# Entries of one block: so many that threads seldom wait for one another between calls, so few that a handful of blocks
# takes tens of megabytes. Measured on two cores, a quarter as many makes two threads no faster than one.
BLOCK = 1 << 19

# Models with fewer parameters are worked on with one thread: more would wait for each other, many times as long as they
# compute.
SMALL_MODEL = 10_000_000

Block = tuple[Entry, int, int]


@dataclass(frozen=True)
class Team:
    """The processes that share a merge; a single one by default.

    Args:
        rank: number of this process.
        size: number of processes.
    """

    rank: int = 0
    size: int = 1

    def share(self, blocks: Iterable[Block]) -> list[Block]:
        """The blocks of this process: the largest first, each goes to the process with the fewest entries so far."""
        loads = [0] * self.size
        own = []
        for block in sorted(blocks, key=lambda block: block[1] - block[2]):
            lightest = loads.index(min(loads))
            loads[lightest] += block[2] - block[1]
            if lightest == self.rank:
                own.append(block)
        return own

    def wait(self) -> None:
        """Go on when all processes are here."""
        if self.size > 1:
            import torch

            torch.distributed.barrier()

    def part(self) -> None:
        """Close the connections; without this, a process that ends early can break one that does not."""
        if self.size > 1:
            import torch

            torch.distributed.barrier()
            torch.distributed.destroy_process_group()

    def add(self, value: Tensor | None) -> Tensor | None:
        """Sum of the processes' tensors, in every process; None counts as nothing."""
        if self.size == 1:
            return value
        import torch

        gathered: list[Tensor | None] = [None] * self.size
        torch.distributed.all_gather_object(gathered, value)
        present = [tensor for tensor in gathered if tensor is not None]
        return torch.stack(present).sum(0) if present else None


ALONE = Team()


def worker_count() -> int:
    """Number of threads that work on blocks side by side."""
    return max(2, min(8, os.cpu_count() or 1))


def read_task_vectors(plan: Plan, name: str, start: int, stop: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """The base's entries ``[start, stop)``, ``(entries,)``, and all task vectors', ``(experts, entries)``; float32."""
    import torch

    base = plan.base.read(name, start, stop).to(device).float()
    task_vectors = torch.empty(len(plan.experts), stop - start, device=device)
    for row, expert in zip(task_vectors, plan.experts.values(), strict=True):
        # Converting and subtracting apart is faster than one subtraction of mixed types.
        row.copy_(expert.read(name, start, stop)).sub_(base)
    # A sum is NaN or infinite if one entry is, and costs one pass; only then is the culprit looked for.
    if not torch.isfinite(task_vectors.sum()):
        _refuse_non_finite(plan, name, start, stop)
    return base, task_vectors


def _refuse_non_finite(plan: Plan, name: str, start: int, stop: int) -> None:
    """Say which checkpoint has NaN or infinite values; return where only the float32 sum overflowed."""
    import torch

    for expert, checkpoint in {"the base": plan.base, **plan.experts}.items():
        bad = ~torch.isfinite(checkpoint.read(name, start, stop).double())
        if bad.any():
            who = expert if checkpoint is plan.base else f"expert {expert}"
            count = int(bad.sum())
            raise InputError(f"{who} has {count} NaN or infinite values in {name} ({checkpoint.entries[name].file})")


def work_through(
    blocks: Iterable[Block], work: Callable[[Entry, int, int], None], *, workers: int, alone: bool
) -> None:
    """Work through blocks with a few threads, at most a few blocks ahead, and stop at the first error.

    Args:
        blocks: arguments of the work.
        work: called once for each block, from any thread.
        workers: number of threads.
        alone: each call computes with one thread, as many calls run side by side; otherwise with torch's own threads.
    """
    import torch

    settings = (torch.set_num_threads, (1,)) if alone else (None, ())
    threads = torch.get_num_threads()
    with ThreadPoolExecutor(workers, "merge", *settings) as pool:
        pending: set[Future[None]] = set()
        try:
            for block in blocks:
                pending.add(pool.submit(work, *block))
                if len(pending) >= 4 * workers:
                    done, pending = wait(pending, return_when=FIRST_COMPLETED)
                    for future in done:
                        future.result()
            for future in wait(pending, return_when=FIRST_EXCEPTION).done:
                future.result()
        finally:
            pool.shutdown(cancel_futures=True)
            torch.set_num_threads(threads)


@dataclass(frozen=True)
class Passes:
    """Streaming passes over all task vectors, for methods that need something of the whole model before they merge.

    Args:
        plan: checkpoints and parameters.
        device: where the arithmetic is done.
        progress: shows throughput in bytes read.
        team: the processes that share the work.
    """

    plan: Plan
    device: torch.device
    progress: Progress
    team: Team = ALONE

    @property
    def expert_names(self) -> tuple[str, ...]:
        """Names of the experts, in the order of the rows."""
        return tuple(self.plan.experts)

    @property
    def sizes(self) -> dict[str, int]:
        """Number of entries of every merged tensor by name."""
        return {name: self.plan.base.entries[name].elements for name in self.plan.merged}

    def total(
        self,
        count: Callable[[Tensor, Part, Tensor], None],
        shape: tuple[int, ...],
        title: str,
        only: str | None = None,
    ) -> Tensor:
        """Counts over all blocks of all merged tensors, or of a single one.

        Args:
            count: ``(task_vectors (experts, entries), part, counts)``, which adds to the counts.
            shape: shape of the counts; they are int64, so that the sum does not depend on the order of the blocks.
            title: shown beside the progress bar.
            only: name of the single tensor, for which no bar is shown.

        Returns:
            The counts, on the CPU.
        """
        import torch

        entries = [self.plan.base.entries[name] for name in ([only] if only else self.plan.merged)]
        of_threads: dict[int, Tensor] = {}
        width = 1 + len(self.plan.experts)

        def work(entry: Entry, start: int, stop: int) -> None:
            # Each thread counts for itself: adding up large counts after every block would cost more than counting.
            thread = threading.get_ident()
            if thread not in of_threads:
                of_threads[thread] = torch.zeros(shape, dtype=torch.int64)
            _, task_vectors = read_task_vectors(self.plan, entry.name, start, stop, self.device)
            count(task_vectors, Part(entry.name, entry.shape, start, stop), of_threads[thread])
            advance(self.team.size * width * entry.size * (stop - start) / entry.elements, entry.name)

        blocks = self.team.share(
            (entry, start, min(start + BLOCK, entry.elements))
            for entry in entries
            for start in range(0, entry.elements, BLOCK)
        )
        size = width * sum(entry.size for entry in entries)
        with self.progress(title, size, "B") if only is None else nullcontext(no_advance) as advance:
            work_through(blocks, work, workers=worker_count(), alone=True)
        counts = self.team.add(sum(of_threads.values(), torch.zeros(shape, dtype=torch.int64)))
        assert counts is not None  # noqa: S101  (every process brings counts)
        return counts


def no_advance(_count: float, _note: str = "") -> None:
    """Progress that is not shown."""
