"""Apply one rule to every merged parameter and write an output: the base's mirror image, or other files.

Rules for entries are fed blocks, so memory does not depend on the largest tensor; others get whole tensors. Parts are
read, merged and written by a few workers, each with its own buffers; a part's result depends on its entries alone, so
the bytes are the same whatever the number of workers, and a run that was interrupted continues with the files that are
missing.
"""

from __future__ import annotations

import itertools
import json
import logging
import math
from collections.abc import Container, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from expert_merging.card import CARD
from expert_merging.checkpoints.checkpoint import (
    WIDTHS,
    Checkpoint,
    Entry,
    as_bytes,
    torch_dtype,
)
from expert_merging.checkpoints.folders import INDEX, SINGLE
from expert_merging.checkpoints.other_files import other_files
from expert_merging.digests import Piece, Section, section_of, sections_of
from expert_merging.errors import InputError
from expert_merging.kept import HEAD, Kept, Written
from expert_merging.machine import half_of_memory
from expert_merging.outputs import Computed, Copied, Made, Merged, Output, Slot
from expert_merging.parts import Part
from expert_merging.plan import Plan, Rule
from expert_merging.processes import ALONE, Processes
from expert_merging.progress import Advance, Progress
from expert_merging.roles import is_matrix
from expert_merging.streaming import Reader, block_entries
from expert_merging.wholes import MemoryBudget, load_solver, whole_memory, whole_shape, whole_workers
from expert_merging.workers import Workers
from expert_merging.writing import ShardWriter, copy_file, put_aside, sync_folder, write_atomically

if TYPE_CHECKING:
    import torch
    from torch import Tensor

logger = logging.getLogger(__name__)

_COPY_BYTES = 1 << 22


@dataclass
class Summary:
    """What a merge did.

    Args:
        squares: squared norms of change and base, of every tensor that was merged, by name.
        kept_shards: shards that an earlier, interrupted run had finished.
    """

    squares: dict[str, tuple[float, float]] = field(default_factory=dict)
    kept_shards: int = 0

    @property
    def changes(self) -> dict[str, float]:
        """Relative change ``norm(merged - base) / norm(base)`` of every tensor that was merged, by name."""
        return {name: _relative(*pair) for name, pair in self.squares.items()}

    @property
    def relative_change(self) -> float:
        """The same of all these tensors together."""
        changes, bases = zip(*self.squares.values(), strict=True) if self.squares else ((), ())
        return _relative(sum(changes), sum(bases))

    def with_output(self, folder: str, other: Summary) -> Summary:
        """This one together with what was done for another output, whose tensors are then named by its folder."""
        named = {f"{folder}/{name}" if folder else name: pair for name, pair in other.squares.items()}
        return Summary({**self.squares, **named}, self.kept_shards + other.kept_shards)


def _relative(change: float, base: float) -> float:
    return math.sqrt(change / base) if base else 0.0


def working_memory(plan: Plan, *, unit: str, device: torch.device, copies: int = 0) -> int:
    """Bytes of memory that merging works with, whatever the size of the model for rules that are fed blocks.

    Args:
        plan: checkpoints and parameters.
        unit: as for `write_output`.
        device: as for `write_output`.
        copies: as for `write_output`.
    """
    experts = len(plan.experts) * (1 + copies)
    entries = [plan.base.entries[name] for name in plan.merged]
    whole = [entry for entry in entries if not takes_blocks(plan.part(entry.name), unit)]
    if not whole:
        largest = max((entry.elements for entry in entries), default=0)
        workers = Workers.for_entries(plan.base_elements, device).size
        return 4 * (experts + 4) * min(block_entries(device), largest) * workers
    needs = sorted((whole_memory(entry, experts) for entry in whole), reverse=True)
    return max(needs[0], min(sum(needs[: whole_workers(plan.base_elements, device)]), half_of_memory(device)))


def write_output(
    output: Output,
    plan: Plan,
    rule: Rule,
    folder: Path,
    *,
    unit: str,
    device: torch.device,
    progress: Progress,
    processes: Processes = ALONE,
    made: Mapping[str, Tensor] | None = None,
    copies: int = 0,
    kept: Kept | None = None,
    title: str = "merging",
) -> Summary:
    """Merge every parameter of an output and write its complete folder.

    The weights come first and the other files last, so that nothing loads the folder before it is complete. Finished
    files found in the folder are kept if they are as they were written and no checkpoint was written since; the caller
    vouches for the options.

    Args:
        output: what is written.
        plan: checkpoints and parameters.
        rule: how task vectors become one.
        folder: folder to write; made if needed.
        unit: what the rule is fed, as `expert_merging.method.Method` has it.
        device: where the arithmetic is done.
        progress: shows throughput in bytes read.
        processes: the processes that share the work; each calls this function.
        made: tensors that the preparation has made.
        copies: copies of the task vectors that the rule holds at a time, for the memory that is shared out.
        kept: what was written below the folder, and will be; without it, all files are made again.
        title: shown beside the progress bar.

    Raises:
        InputError: NaN or infinite values, named by expert and tensor.
    """
    plan = plan if output.experts is None else plan.only(output.experts)
    folder.mkdir(parents=True, exist_ok=True)
    summary = Summary()
    merger = _Merger(plan, rule, unit, device, processes, made or {}, copies)
    width = 1 + len(plan.experts)
    sizes = {file: width * sum(slot.size for slot in slots) for file, slots in output.files.items()}
    with progress(title, sum(sizes.values()), "B") as advance:
        for file, slots in output.files.items():
            target = folder / file
            if processes.agree(processes.rank == 0 and _is_kept(target, kept)):
                summary.kept_shards += 1
                advance(sizes[file], file)
                continue
            summary.squares |= merger.write(slots, output.header(file), target, advance, kept)
    if processes.rank == 0:
        _complete(output, plan.base, folder)
    return summary


def _is_kept(target: Path, kept: Kept | None) -> bool:
    """Whether a file is there that need not be made again; where one is there that must be, tell so."""
    if kept is None or not target.exists():
        return False
    if not (is_kept := kept.has(target)):
        logger.warning(
            "%s is made again: it is not as this run has written it, or checkpoints were written since", target.name
        )
    return is_kept


def _complete(output: Output, base: Checkpoint, folder: Path) -> None:
    """Write what a folder has beside weights."""
    if output.is_model:
        copy_other_files(base, folder, index=output.is_mirror, but=output.beside)
    for name, content in output.beside.items():
        if isinstance(content, Path):
            copy_file(content, folder / name)
        elif content is not None:
            write_atomically(folder / name, content)
    if output.makes_index or (output.is_model and len(output.files) > 1 and not (folder / INDEX).exists()):
        write_atomically(folder / INDEX, output.index())
    if output.edit is not None:
        write_atomically(folder / "config.json", (json.dumps(output.edit(base.config), indent=2) + "\n").encode())


def copy_other_files(base: Checkpoint, folder: Path, *, index: bool, but: Container[str]) -> None:
    """Copy everything but weights byte for byte; the base's model card is put aside as ``README.base.md``.

    Args:
        base: the base.
        folder: where the copies go.
        index: the base's index too.
        but: names of files that are left out.
    """
    copied = other_files(base.folder)
    for relative in copied:
        if str(relative) in but:
            continue
        if relative == Path(INDEX) and (not index or base.files[0].name == SINGLE):
            continue  # of other weights; `from_pretrained` reads a single file first
        target = folder / relative
        target.parent.mkdir(parents=True, exist_ok=True)
        copy_file(base.folder / relative, target)
    if Path(CARD) in copied:  # otherwise it is this run's own, written before it was interrupted
        put_aside(folder / CARD)
        (folder / CARD).unlink()
    sync_folder(folder)


def takes_blocks(part: Part, unit: str) -> bool:
    """Whether a tensor may be merged block by block."""
    return unit in ("entries", "rows") or (unit == "matrix" and not is_matrix(part))


def merged_parts(plan: Plan, names: Iterable[str], unit: str, block: int) -> Iterator[Part]:
    """The parts that tensors are merged in: blocks, or whole tensors.

    Args:
        plan: checkpoints and parameters.
        names: the tensors.
        unit: what the rule is fed, as `expert_merging.method.Method` has it.
        block: entries of a block.
    """
    for name in names:
        part = plan.part(name)
        length = part.whole_rows(block) if unit == "rows" else block
        yield from part.cut(length if takes_blocks(part, unit) else max(1, part.elements))


def pieces_of(reader: Reader, part: Part, unit: str) -> Iterator[tuple[Part, Tensor, Tensor]]:
    """Base and task vectors of a part as its rule is fed them: in steps, or of the whole tensor.

    Args:
        reader: reads the checkpoints.
        part: one of `merged_parts`.
        unit: what the rule is fed.
    """
    if takes_blocks(part, unit):
        yield from reader.steps(part, rows=unit == "rows")
    else:
        base, task_vectors = reader.read(part)
        yield part, base, task_vectors.view(len(task_vectors), *whole_shape(part))


@dataclass(frozen=True)
class _Place:
    """Where a slot's bytes are in the file that is being written."""

    slot: Slot
    offset: int


class _Done(NamedTuple):
    """What became of a part: the pieces that were written, and squared norms of the change and of the base."""

    pieces: list[Piece]
    squares: tuple[float, float] = (0.0, 0.0)


class _Merger:
    """Writes one file after another, a few parts at a time."""

    def __init__(
        self,
        plan: Plan,
        rule: Rule,
        unit: str,
        device: torch.device,
        processes: Processes,
        made: Mapping[str, Tensor],
        copies: int,
    ) -> None:
        self.plan = plan
        self.rule = rule
        self.unit = unit
        self.processes = processes
        self.made = made
        self.held = len(plan.experts) * (1 + copies)
        self.merged = frozenset(plan.merged)
        self.reader = Reader(plan, device)
        self.base_reader = Reader(plan.only(()), device)
        self.block = block_entries(device)
        workers = Workers.for_entries(plan.base_elements, device)
        self.workers = workers if unit in ("entries", "rows") else Workers(whole_workers(plan.base_elements, device))
        self.memory = MemoryBudget(half_of_memory(device) // (processes.size if device.type == "cpu" else 1))
        load_solver(device)

    def write(
        self, slots: tuple[Slot, ...], header: bytes, target: Path, advance: Advance, kept: Kept | None
    ) -> dict[str, tuple[float, float]]:
        """Write one file together with the other processes; squared norms of each merged tensor, as `Summary` has."""
        import torch

        merged, others, size = _places(slots, len(header))
        shares = {
            **{name: sum(place.slot.size for place in places) for name, places in merged.items()},
            **{name: place.slot.size for name, place in others.items()},
        }
        squares = {name: [0.0, 0.0] for name in merged}
        pieces: list[Piece] = []
        writer = self._open(header, size, target)

        def work(part: Part) -> _Done:
            if part.name in merged:
                return self._merge(part, merged[part.name], writer)
            return _Done([self._copy(part, others[part.name], writer)])

        def done(part: Part, found: _Done) -> None:
            pieces.extend(found.pieces)
            if part.name in merged:
                pairs = zip(squares[part.name], found.squares, strict=True)
                squares[part.name] = [before + more for before, more in pairs]
            share = self.processes.size * part.entries / max(1, part.elements)
            advance(share * shares[part.name] * (1 + len(self.plan.experts)), part.name)

        parts = [*merged_parts(self.plan, merged, self.unit, self.block), *self._copied_parts(others)]
        try:
            self.workers.work_through(self.processes.share(parts), work, done)
        except BaseException:
            writer.abandon()
            raise
        own = torch.tensor([*squares.values()], dtype=torch.float64)
        totals = self.processes.add(own)  # and by that, all processes have written their parts
        everywhere = self.processes.gather(pieces)
        if self.processes.rank == 0:
            if kept is not None:
                sections = self._sections(slots, header, itertools.chain.from_iterable(everywhere))
                kept.note({target.name: Written(size, sections)})
            writer.finish()
        else:
            writer.leave()
        return {name: (float(row[0]), float(row[1])) for name, row in zip(squares, totals, strict=True)}

    def _sections(self, slots: tuple[Slot, ...], header: bytes, pieces: Iterable[Piece]) -> dict[str, Section]:
        """Digests of a file's header and tensors."""
        starts = itertools.accumulate((slot.size for slot in slots), initial=len(header))
        runs = {slot.name: (start, slot.size) for slot, start in zip(slots, starts, strict=False)}
        found = sections_of(pieces, runs)
        sources = {slot.name: self._bytes_of(slot) for slot in slots}
        return {
            HEAD: section_of(header),
            **{name: section._replace(source=sources[name]) for name, section in found.items()},
        }

    def _bytes_of(self, slot: Slot) -> tuple[str, str] | tuple[()]:
        """The checkpoint and its tensor that has the bytes of a slot; nothing where they are made."""
        if not isinstance(slot.source, Copied):
            return ()
        checkpoint, entry = self._source(slot)
        is_there = entry.dtype == slot.dtype and entry.offset > 0 and entry.file.parent == checkpoint.folder
        is_there &= slot.source.name not in checkpoint.orders
        return (slot.source.expert or "base", entry.name) if is_there else ()

    def _open(self, header: bytes, size: int, target: Path) -> ShardWriter:
        """The file being written: made by the first process, joined by the others."""
        if self.processes.rank == 0:
            writer = ShardWriter(target, header, size)
            self.processes.barrier()
            return writer
        self.processes.barrier()
        return ShardWriter(target)

    def _copied_parts(self, places: Mapping[str, _Place]) -> Iterator[Part]:
        """Runs of bytes of everything else, which is seen as vectors of bytes."""
        for name, place in places.items():
            slot = place.slot
            width = WIDTHS.get(slot.dtype, 1)
            step = slot.size if isinstance(slot.source, Made) else _COPY_BYTES // width * width
            yield from Part.whole(name, (slot.size,)).cut(max(width, step))

    def _source(self, slot: Slot) -> tuple[Checkpoint, Entry]:
        assert isinstance(slot.source, Copied)  # noqa: S101  (the caller has looked)
        expert = slot.source.expert
        checkpoint = self.plan.base if expert is None else self.plan.experts[expert]
        return checkpoint, checkpoint.entries[slot.source.name]

    def _is_plain_copy(self, slot: Slot) -> bool:
        """Whether bytes are copied unseen: what the base keeps of its own, whatever is in it."""
        if not isinstance(slot.source, Copied) or self._source(slot)[1].dtype != slot.dtype:
            return False
        return slot.source.expert is None and slot.source.name not in self.merged

    def _copy(self, part: Part, place: _Place, writer: ShardWriter) -> Piece:
        import torch

        slot = place.slot
        if self._is_plain_copy(slot):
            checkpoint, entry = self._source(slot)
            view = as_bytes(self.reader.host_buffer("copy", part.entries, torch.uint8))
            checkpoint.read_bytes(view, entry.file, entry.offset + part.start)
            return writer.write(view, place.offset + part.start)
        dtype = torch_dtype(slot.dtype)
        if isinstance(slot.source, Made):
            tensor = self.made[slot.source.key]
        elif isinstance(slot.source, Computed):
            tensor = slot.source.entries(part.start // dtype.itemsize, part.stop // dtype.itemsize)
            _check_fits(tensor, dtype, slot)
        else:
            checkpoint, _ = self._source(slot)
            width = dtype.itemsize
            tensor = checkpoint.read(slot.source.name, part.start // width, part.stop // width)
            _check_fits(tensor, dtype, slot)
        view = as_bytes(tensor.detach().cpu().to(dtype).reshape(-1).contiguous())
        return writer.write(view, place.offset + part.start)

    def _merge(self, part: Part, places: list[_Place], writer: ShardWriter) -> _Done:
        """Merge a part and write its results."""
        import torch

        squares = base_squares = 0.0
        blocks = takes_blocks(part, self.unit)
        need = 0 if blocks else whole_memory(self.plan.base.entries[part.name], self.held)
        slots = {
            place.slot.source: place.slot for place in places
        }  # of a head tied to embeddings, both have one source
        buffers = {source: self._buffer(part, slot) for source, slot in slots.items()}
        reads_experts = any(isinstance(source, Merged) and source.reads_experts for source in slots)
        reader = self.reader if reads_experts else self.base_reader
        with self.memory.taking(need), reader.streaming():
            for piece, base, task_vectors in pieces_of(reader, part, self.unit):
                made = self.rule(task_vectors, piece, base.view(task_vectors.shape[1:]))
                results = made if isinstance(made, Mapping) else {"merged": made}
                for source, buffer in buffers.items():
                    assert isinstance(source, Merged)  # noqa: S101  (others are copied)
                    found = results[source.result].reshape(-1)
                    run = buffer[_packed_run(part, piece, source, len(found))]
                    if source.result != "merged":
                        run.copy_(found, non_blocking=True)
                        continue
                    numbers = torch.stack([torch.dot(found, found), torch.dot(base, base)]).tolist()
                    squares, base_squares = squares + numbers[0], base_squares + numbers[1]
                    merged = self._exact_sum(piece, found) if run.dtype == torch.float64 else base.add_(found)
                    run.copy_(merged, non_blocking=True)
                    # Only float16 is so narrow that finite float32 numbers overflow in it.
                    if slots[source].dtype == "F16" or not math.isfinite(numbers[0]):
                        _check_fits(merged, buffer.dtype, slots[source])
        done = _Done([], (squares, base_squares))
        for place in places:
            assert isinstance(place.slot.source, Merged)  # noqa: S101  (others are copied)
            buffer = buffers[place.slot.source]
            first = part.start // place.slot.source.packed
            done.pieces.append(writer.write(as_bytes(buffer), place.offset + first * buffer.element_size()))
        return done

    def _exact_sum(self, piece: Part, found: Tensor) -> Tensor:
        """Base and merged task vector in float64, so that what no expert changes stays as it is to the bit."""
        return self.plan.base.read(piece.name, piece.start, piece.stop).add_(found.cpu())

    def _buffer(self, part: Part, slot: Slot) -> Tensor:
        """Memory of the host for what a part becomes in a slot."""
        assert isinstance(slot.source, Merged)  # noqa: S101  (others are copied)
        entries = -(-part.entries // slot.source.packed)
        return self.reader.host_buffer(f"merged {slot.source.result}", entries, torch_dtype(slot.dtype))


def _packed_run(part: Part, piece: Part, source: Merged, found: int) -> slice:
    """Where what a rule has made of a piece of a part lies in the buffer of the part's result."""
    first, inside = divmod(piece.start - part.start, source.packed)
    if inside or part.start % source.packed:
        raise ValueError(f"{source.name} is cut at entry {piece.start}, inside a run of {source.packed}")
    if found != (expected := -(-piece.entries // source.packed)):
        raise ValueError(f"{source.result} of {piece.entries} entries of {source.name}: {found} instead of {expected}")
    return slice(first, first + found)


def _places(slots: tuple[Slot, ...], start: int) -> tuple[dict[str, list[_Place]], dict[str, _Place], int]:
    """The places of a file's slots, by the tensor that is merged and by name for the others; and the file's size."""
    merged: dict[str, list[_Place]] = {}
    others: dict[str, _Place] = {}
    for slot in slots:
        place = _Place(slot, start)
        if isinstance(slot.source, Merged):
            places = merged.setdefault(slot.source.name, [])
            if any(other.slot.source == slot.source and other.slot.dtype != slot.dtype for other in places):
                raise ValueError(f"{slot.name} is what another slot of the file is in another type: {slot.source}")
            places.append(place)
        else:
            others[slot.name] = place
        start += slot.size
    if both := merged.keys() & others.keys():
        raise ValueError(f"{min(both)} is merged for one slot and the name of another that is not")
    return merged, others, start


def _check_fits(values: Tensor, dtype: torch.dtype, slot: Slot) -> None:
    import torch

    if torch.isfinite(values.to(dtype)).all():
        return
    if isinstance(slot.source, Copied):
        owner = "the base" if slot.source.expert is None else f"expert {slot.source.expert}"
        if not torch.isfinite(values.double()).all():
            raise InputError(f"{owner} has NaN or infinite values in {slot.source.name}; download it again")
        raise InputError(
            f"{slot.source.name} of {owner} has values that {slot.dtype} (the base's type) cannot hold; convert the "
            "base to a wider type"
        )
    if isinstance(slot.source, Computed):
        raise InputError(
            f"{slot.name} would have values that {slot.dtype} (the base's type) cannot hold, or NaN; a checkpoint that "
            "it is made of has them"
        )
    raise InputError(
        f"the merged {slot.name} does not fit into {slot.dtype} (the base's type); use a smaller coefficient"
    )
