"""Tensors that are worked on as a whole: in which shape, with how much memory, and by how many threads."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from expert_merging.checkpoints.checkpoint import Entry
from expert_merging.parts import Part
from expert_merging.roles import is_matrix, is_word_table
from expert_merging.workers import SMALL_MODEL

if TYPE_CHECKING:
    import torch


def whole_shape(part: Part) -> tuple[int, ...]:
    """The shape in which rules get a whole tensor: its own, but tables of words as vectors, as rows are words."""
    return (part.elements,) if is_word_table(part.name) else part.shape


def whole_memory(entry: Entry, experts: int) -> int:
    """Bytes that merging a whole tensor takes, at most.

    Base and task vectors and a few more of its size in float32; for a matrix a few in float64, and of the size of the
    Gram matrix of its columns (or, where that is smaller, of all experts' rows) too.
    """
    need = 4 * (experts + 4) * entry.elements
    if is_matrix(Part.whole(entry.name, entry.shape)):
        rows, columns = entry.shape
        need += 8 * (3 * entry.elements + 4 * min(columns, 2 * experts * rows) ** 2)
    return need


def whole_workers(elements: int, device: torch.device) -> int:
    """Number of threads that merge whole tensors side by side; on a GPU, so many that one reads while others compute.

    A small model is worked on with one thread: more would wait for each other, many times as long as they compute.

    Args:
        elements: entries of the model.
        device: where they compute.
    """
    import torch

    if device.type != "cpu":
        return 3
    return torch.get_num_threads() if elements >= SMALL_MODEL else 1


class MemoryBudget:
    """Memory that threads share; each takes what it needs, and waits while the others leave too little."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.taken = 0
        self.changed = threading.Condition()

    @contextmanager
    def taking(self, need: int) -> Iterator[None]:
        """Hold that many bytes; one thread alone may hold more than there are."""
        with self.changed:
            self.changed.wait_for(lambda: not self.taken or self.taken + need <= self.size)
            self.taken += need
        try:
            yield
        finally:
            with self.changed:
                self.taken -= need
                self.changed.notify_all()


def load_solver(device: torch.device) -> None:
    """Load a GPU's library for decompositions, which several threads at once must not."""
    import torch

    if device.type != "cpu":
        torch.linalg.eigh(torch.eye(2, device=device))
