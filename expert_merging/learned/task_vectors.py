"""Base weights and task vectors in float32, a block at a time, from wherever there is memory for them.

They are kept in the files' own types, which is exact and takes no more memory than the files, tensor by tensor on the
training device, in host memory, or not at all: then they are read from the files whenever they are needed. What is not
on the device is brought there a block ahead of its use, on a CUDA device by a stream of its own. The subtraction
``expert - base`` is done in float32 on pieces that fit into a core's cache, so it costs little more than reading.

Where coefficients multiply other directions than task vectors, those stand here in their place: made from the task
vectors of each piece, or read from the files that keep them.
"""

from __future__ import annotations

import logging
import mmap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from expert_merging.checkpoints.checkpoint import Checkpoint
from expert_merging.learned.directions import as_they_are, kept_name
from expert_merging.parts import Part
from expert_merging.plan import Plan, Rule
from expert_merging.progress import no_progress
from expert_merging.streaming import Passes, in_float32, read_rows

logger = logging.getLogger(__name__)

DEVICE, HOST, DISK = "device", "host", "disk"

# Entries of a block that is fetched at a time, on a CPU and on a GPU, where each costs a handful of kernel launches.
BLOCK_ON_CPU, BLOCK_ON_GPU = 1 << 18, 1 << 23
# Entries that a CPU computes with at a time: few, so that all experts' stay in a core's cache from the first operation
# to the last, but enough to outweigh the calls.
STEP_ON_CPU = 1 << 15
_ALIGNED = 64  # bytes


class TaskVectors:
    """Base weights and task vectors, or other directions, of all merged tensors.

    Attributes:
        magnitudes: mean absolute entry of every task vector, per expert by tensor name.
        places: where each tensor is: ``device``, ``host`` or, until `place` is called, ``disk``.
        in_rows: pieces are of whole rows, if what is asked for is.

    Args:
        plan: the checkpoints.
        scale: factor on each expert's task vectors.
        device: training device.
        rule: what is made of a block of task vectors: ``(task_vectors, part, base) -> (experts, entries)``.
        kept: files with the directions, which are used instead of what the experts' files have.
        is_whole: the directions' sum takes the place of the base's weights, which are then given as 0.

    Raises:
        InputError: a checkpoint has NaN or infinite values.
    """

    def __init__(
        self,
        plan: Plan,
        scale: Sequence[float],
        device: torch.device,
        rule: Rule = as_they_are,
        kept: Checkpoint | None = None,
        *,
        is_whole: bool = False,
    ) -> None:
        self.plan = plan
        self.scale = scale
        self.device = device
        self.rule = rule
        self.kept = kept
        self.is_whole = is_whole
        self.magnitudes = mean_magnitudes(plan, rule) if kept is None else _kept_magnitudes(plan, kept)
        self.places = dict.fromkeys(plan.merged, DISK)
        self._held = {name: [self.plan.part(name)] for name in plan.merged}
        # By part, matrices ``(checkpoints, entries)``, the base's row first: one, or several where types differ.
        self._kept: dict[Part, list[Tensor]] = {}
        self._pinned: list[Tensor] = []
        self._warned = False
        on_gpu = device.type == "cuda"
        self._block, self._step = (BLOCK_ON_GPU, BLOCK_ON_GPU) if on_gpu else (BLOCK_ON_CPU, STEP_ON_CPU)
        self.in_rows = False
        self._fetcher = ThreadPoolExecutor(1, "task vectors")
        self._stream: Any = torch.cuda.Stream(device) if on_gpu else None  # type: ignore[no-untyped-call]
        self._coming: tuple[Part, Future[list[Tensor]]] | None = None
        self._scratch = torch.empty(0)

    def hold(self, parts: Iterable[Part]) -> None:
        """Say what this process needs, which is all that it then keeps; nothing is kept yet, or the same was said.

        Args:
            parts: as `blocks` will be asked for them.
        """
        self._held = {name: [] for name in self.plan.merged}
        for part in parts:
            if part.entries:
                self._held[part.name].append(part)

    @property
    def sizes(self) -> dict[str, int]:
        """Bytes that this process's part of each tensor takes where it is kept, base and experts together."""
        return {
            name: sum(checkpoint.entries[stored].torch_dtype.itemsize for checkpoint, stored in self._rows(name))
            * sum(part.entries for part in parts)
            for name, parts in self._held.items()
        }

    def _rows(self, name: str) -> list[tuple[Checkpoint, str]]:
        """Where the base and each expert's share of a tensor are stored: in which files, and by which name."""
        if self.kept is not None:
            return [(self.plan.base, name), *((self.kept, kept_name(expert, name)) for expert in self.plan.experts)]
        return [(checkpoint, name) for checkpoint in (self.plan.base, *self.plan.experts.values())]

    @property
    def working_bytes(self) -> int:
        """Bytes on the device beside what is kept there: float32 numbers of one step, and two blocks on their way."""
        widest = max(
            checkpoint.entries[stored].torch_dtype.itemsize
            for name in self.plan.merged
            for checkpoint, stored in self._rows(name)
        )
        return (len(self.scale) + 1) * (4 * self._step + 2 * widest * self._block)

    def place(self, places: Mapping[str, str]) -> None:
        """Bring tensors to where they are to be kept.

        Args:
            places: ``device``, ``host`` or ``disk`` by tensor name.
        """
        for name, place in places.items():
            if place == self.places[name]:
                continue
            self.places[name] = place
            for part in self._held[name]:
                if place == DISK:
                    del self._kept[part]
                    continue
                stored = self._read(part)
                if place == DEVICE:
                    self._kept[part] = [tensor.to(self.device) for tensor in stored]
                else:
                    self._kept[part] = self._pin(stored) if self._stream else stored

    def _pin(self, stored: list[Tensor]) -> list[Tensor]:
        """The same in pages that a GPU reads directly; torch's own pinned memory is rounded up to powers of two."""
        sizes = [tensor.numel() * tensor.element_size() for tensor in stored]
        starts = [0, *accumulate(-(-size // _ALIGNED) * _ALIGNED for size in sizes)]
        pages = torch.frombuffer(mmap.mmap(-1, max(_ALIGNED, starts[-1])), dtype=torch.uint8)
        if int(_cuda_runtime().cudaHostRegister(pages.data_ptr(), pages.numel(), 0)) == 0:
            self._pinned.append(pages)
        elif not self._warned:  # once, not for each of hundreds of tensors
            self._warned = True
            logger.warning(
                "host memory cannot be pinned (see ulimit -l); task vectors travel to the device more slowly"
            )
        return [
            pages[start : start + size].view(tensor.dtype).view(tensor.shape).copy_(tensor)
            for tensor, start, size in zip(stored, starts, sizes, strict=False)
        ]

    def release(self) -> None:
        """Free all memory; what is used afterwards is read from the files."""
        self._coming = None
        self._kept.clear()
        self._scratch = torch.empty(0)
        while self._pinned:
            torch.cuda.synchronize(self.device)
            _cuda_runtime().cudaHostUnregister(self._pinned.pop().data_ptr())
        self.places = dict.fromkeys(self.plan.merged, DISK)

    def __del__(self) -> None:
        fetcher = getattr(self, "_fetcher", None)
        if fetcher is not None:  # the constructor may have refused the checkpoints
            self.release()
            fetcher.shutdown(wait=False)  # the last reference may have been the fetching thread

    def blocks(self, wanted: Iterable[Part], then: Part | None = None) -> Iterator[tuple[Part, Part, Tensor, Tensor]]:
        """Go through parts piece by piece; while a block is used, the next one is fetched.

        Args:
            wanted: what is needed.
            then: what will be asked for after that, if it is known: its first block is fetched during the last one.

        Yields:
            The part, the piece of it that is read, base weights ``(entries,)`` and task vectors
            ``(experts, entries)``, both float32. Both may be overwritten, and are by the next piece.
        """
        owners = [(part, block) for part in wanted for block in part.cut(self._length(part, self._block))]
        order: list[Part | None] = [block for _, block in owners]
        order.append(None if then is None else next(then.cut(self._length(then, self._block)), None))
        for (part, block), following in zip(owners, order[1:], strict=True):
            stored = self._fetched(block)
            self._fetch_ahead(following)
            for piece in block.cut(block.entries if self.in_rows else self._step):
                yield part, piece, *self._convert(piece, stored, piece.start - block.start)

    def _length(self, part: Part, entries: int) -> int:
        """Entries of a piece of about so many."""
        return part.whole_rows(entries) if self.in_rows else entries

    def _convert(self, part: Part, stored: list[Tensor], start: int) -> tuple[Tensor, Tensor]:
        if self._scratch.numel() < (len(self.scale) + 1) * part.entries:
            step = max(self._step, part.entries)
            self._scratch = torch.empty(len(self.scale) + 1, step, device=self.device)
        kept = self.kept is not None
        base, task_vectors = in_float32(stored, start, self._scratch[:, : part.entries], are_differences=kept)
        if not kept:
            task_vectors = self.rule(task_vectors, part, base)
        for row, factor in zip(task_vectors, self.scale, strict=True):
            if factor != 1:
                row.mul_(factor)
        return base.zero_() if self.is_whole else base, task_vectors

    def _fetch_ahead(self, part: Part | None) -> None:
        """Start to bring a block to the device, unless it is there."""
        self._coming = None
        if part is not None and self._is_elsewhere(part.name):
            self._coming = part, self._fetcher.submit(self._bring, part)

    def _is_elsewhere(self, name: str) -> bool:
        return self.places[name] == DISK or (self.places[name] == HOST and self._stream is not None)

    def _fetched(self, part: Part) -> list[Tensor]:
        """A block as it is stored, on the device."""
        if not self._is_elsewhere(part.name):
            return self._stored(part)
        if self._coming is None or self._coming[0] != part:
            self._fetch_ahead(part)
        assert self._coming is not None  # noqa: S101  (just started)
        tensors = self._coming[1].result()
        if self._stream is not None:
            current = torch.cuda.current_stream(self.device)
            current.wait_stream(self._stream)
            for tensor in tensors:
                tensor.record_stream(current)
        return tensors

    def _bring(self, part: Part) -> list[Tensor]:
        """Copy a block to the device; runs in a thread of its own."""
        stored = self._stored(part)
        if self._stream is None:
            return stored
        with torch.cuda.stream(self._stream):
            moved = [torch.empty_like(matrix, device=self.device) for matrix in stored]
            for target, source in zip(moved, stored, strict=True):
                for row, stored_row in zip(target, source, strict=True):  # a part of a matrix would be copied twice
                    row.copy_(stored_row, non_blocking=True)
            return moved

    def _stored(self, part: Part) -> list[Tensor]:
        for held in self._held[part.name]:
            if held in self._kept and held.start <= part.start and part.stop <= held.stop:
                return [matrix[:, part.start - held.start : part.stop - held.start] for matrix in self._kept[held]]
        return self._read(part)

    def _read(self, part: Part) -> list[Tensor]:
        return read_rows(self._rows(part.name), part, lambda _, shape, dtype: torch.empty(shape, dtype=dtype))


def _cuda_runtime() -> Any:
    return torch.cuda.cudart()  # type: ignore[no-untyped-call]


def mean_magnitudes(plan: Plan, rule: Rule = as_they_are) -> dict[str, tuple[float, ...]]:
    """Mean absolute entry of every task vector; the pass over all of them also refuses what is not finite."""

    def measure(base: Tensor, task_vectors: Tensor, part: Part) -> Tensor:
        found: Tensor = rule(task_vectors, part, base)
        return found.abs_().sum(1, dtype=torch.float64)

    passes = Passes(plan, torch.device("cpu"), no_progress)
    sums = passes.sums(measure, (len(plan.experts),), "measuring task vectors")
    return {name: tuple((sums[name] / max(1, size)).tolist()) for name, size in passes.sizes.items()}


def _kept_magnitudes(plan: Plan, kept: Checkpoint) -> dict[str, tuple[float, ...]]:
    """The same of directions in files."""

    def mean(expert: str, part: Part) -> float:
        name = kept_name(expert, part.name)
        blocks = (kept.read(name, block.start, block.stop) for block in part.cut(BLOCK_ON_CPU))
        return sum(float(block.abs_().sum(dtype=torch.float64)) for block in blocks) / max(1, part.elements)

    return {name: tuple(mean(expert, plan.part(name)) for expert in plan.experts) for name in plan.merged}
