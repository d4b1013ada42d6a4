"""Whether a finished run is still what it was: its files, its checkpoints, and that they fit together.

Files are read once, block by block, so memory does not depend on their size. Nothing is written.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from expert_merging.checkpoints.adapter import open_checkpoint
from expert_merging.checkpoints.checkpoint import FLOATS, Checkpoint, Entry, read_header, torch_dtype
from expert_merging.checkpoints.naming import published_names
from expert_merging.console import Terminal, say
from expert_merging.digests import Section, read_digest
from expert_merging.documents import resolved
from expert_merging.errors import InputError, Problems, first_of
from expert_merging.families import load_family
from expert_merging.kept import HEAD, Written
from expert_merging.machine import limit_threads, show_size
from expert_merging.progress import Advance
from expert_merging.records import method_in_words
from expert_merging.run import Run

if TYPE_CHECKING:
    import torch

# Names that a line shows.
_SHOWN = 3
_COUNTED = re.compile(r"(\d+) of (\d+) tensors were merged")


@dataclass
class Findings:
    """What was looked at, and what differs.

    Args:
        problems: what differs, one line each.
        notes: what could not be looked at.
        files: number of files that were read.
        size: bytes of them.
        tensors: number of their tensors.
        copies: number of tensors that were compared with the checkpoint that they are copied from.
    """

    problems: Problems = field(default_factory=Problems)
    notes: list[str] = field(default_factory=list)
    files: int = 0
    size: int = 0
    tensors: int = 0
    copies: int = 0


def verify(folder: Path, console: Console) -> None:
    """Check a finished run and say what was looked at; problems do not name its folder.

    Args:
        folder: folder of the run, or its model.
        console: told what was looked at.

    Raises:
        InputError: what differs, or why nothing can be said.
    """
    run = _complete_run(folder)
    record, written = run.merged_from(), run.kept.within(run.model.name).files()
    if record is None or not written:
        missing = run.config if record is None else run.kept.file
        raise InputError(
            f"{missing.name} is missing, damaged, or of an earlier version, and says what the run has written; nothing "
            "can be verified without it"
        )
    limit_threads()
    found = Findings()
    checkpoints = _open_checkpoints(record, found)
    with closing(Terminal()) as terminal:
        total = sum(one.size for one in written.values())
        with terminal.progress(f"verifying {run.folder}", total, "B") as advance:
            for name, one in written.items():
                _verify_file(run.model, name, one, found, advance)
    _verify_names(run.model, written, found)
    _verify_copies(written, checkpoints, found)
    _verify_cards(run.model, record, written, found)
    if any(name.startswith(run.coefficients.stem) for name in run.kept.files()):
        from expert_merging.learned.fitting import check_learned

        with found.problems.collecting():
            check_learned(run, record, load_family(record["family"]), merges_again=not found.problems.found)
    for note in found.notes:
        say(console, f"not looked at: {note}")
    found.problems.check()
    say(console, _summary(run, checkpoints, found))


def _complete_run(folder: Path) -> Run:
    """The run whose folder it is, or whose model.

    Raises:
        InputError: there is none, or it is not complete.
    """
    place = resolved(folder)
    for holder in (place, place.parent):
        for holds_several in (False, True):
            run = Run(holder)
            run.holds_several = holds_several
            if run.is_complete and run.config.is_file() and place in (run.folder, run.model):
                return run
    if Run(folder).record is not None:
        raise InputError("this run is not complete; its own command continues it")
    if not folder.exists():
        raise InputError("there is no such folder")
    raise InputError("this is no finished run: it has no config.json of one, or no folder model")


def _open_checkpoints(record: Mapping[str, Any], found: Findings) -> dict[str, Checkpoint]:
    """Base and experts that are where they were for the run; those that differ from what was merged are told."""
    options, digests = record["options"], record["checkpoints"]
    backbone = load_family(record["family"])
    base = Path(options["base_model_path"])
    opened: dict[str, Checkpoint] = {}
    for name, place in {"base": base, **{name: Path(path) for name, path in options["expert"].items()}}.items():
        who = _called(name)
        if not place.is_dir():
            found.notes.append(f"{who}, which is not at {place} any more")
            continue
        with found.problems.collecting():
            if name == "base":
                checkpoint = Checkpoint(place)
            else:
                owner = opened.get("base")
                names = published_names(owner.entries, backbone.file_name, backbone.landmark)[1] if owner else None
                checkpoint = open_checkpoint(place, owner, backbone.file_name, names)
            opened[name] = checkpoint
            if checkpoint.fingerprint(whole=name == "base") != digests.get(name):
                found.problems.add(f"{who} ({place}) is not what was merged: its files have changed")
    return opened


def _called(name: str) -> str:
    return "the base" if name == "base" else f"expert {name}"


def _verify_file(model: Path, name: str, written: Written, found: Findings, advance: Advance) -> None:
    """Read a file: whether it is what was written, and whether what was merged in it is finite."""
    file, add = model / name, found.problems.add
    if not file.is_file():
        add(f"{name} is missing")
        return
    size = file.stat().st_size
    if size != written.size:
        add(f"{name} has {size} bytes, and {written.size} were written")
        return
    entries: dict[str, Entry] = {}
    differing, infinite = [], []
    with file.open("rb", buffering=0) as stream:
        for section_name, section in written.sections.items():
            check = _FiniteCheck.of(entries.get(section_name), section)
            if read_digest(stream.fileno(), section, check.look) != section.digest:
                differing.append(section_name)
            elif section_name == HEAD and len(written.sections) > 1:
                entries = {entry.name: entry for entry in read_header(file)[1]}
            if not check.is_finite:
                infinite.append(section_name)
            advance(section.size, name)
    found.files, found.size, found.tensors = found.files + 1, found.size + size, found.tensors + len(entries)
    if HEAD in differing:
        add(f"{name} is not what was written" + (": its header differs" if len(written.sections) > 1 else ""))
    if tensors := [name for name in differing if name != HEAD]:
        add(f"{name}: {first_of(tensors, _SHOWN)} is not what was written")
    if infinite:
        add(f"{name}: {first_of(infinite, _SHOWN)} has NaN or infinite values")


class _FiniteCheck:
    """Looks for NaN and infinite values, block by block.

    Args:
        dtype: type of the values; None where any bytes will do.
    """

    def __init__(self, dtype: torch.dtype | None) -> None:
        self.dtype = dtype
        self.is_finite = True

    @classmethod
    def of(cls, entry: Entry | None, section: Section) -> _FiniteCheck:
        """The check of a tensor; what is the base's own may be anything, as it may be in the base."""
        is_checked = entry is not None and entry.dtype in FLOATS and section.source[:1] != ("base",)
        return cls(torch_dtype(entry.dtype) if entry is not None and is_checked else None)

    def look(self, block: memoryview) -> None:
        """Look at some bytes."""
        if self.dtype is None or not self.is_finite:
            return
        import torch

        values = torch.frombuffer(block[: len(block) // self.dtype.itemsize * self.dtype.itemsize], dtype=self.dtype)
        # A sum is not finite if one value is not; it may also overflow.
        if not math.isfinite(values.sum(dtype=torch.float32)):
            self.is_finite = bool(values.isfinite().all())


def _model_folders(model: Path, written: Mapping[str, Written]) -> list[Path]:
    """Folders with weights that can be loaded, unlike those of masks."""
    folders = dict.fromkeys((model / name).parent for name, one in written.items() if len(one.sections) > 1)
    return [folder for folder in folders if (folder / "config.json").is_file()]


def _verify_names(model: Path, written: Mapping[str, Written], found: Findings) -> None:
    """Whether files lie there that the run has not written, and whether every model can be opened."""
    there = [file.relative_to(model).as_posix() for file in sorted(model.rglob("*")) if not file.is_dir()]
    foreign = [name for name in there if name not in written and not _is_of_system(name)]
    if foreign:
        found.problems.add(f"{first_of(foreign, _SHOWN)} lies there, and the run has not written it")
    if found.problems.found:
        return  # which would say the same in other words
    for folder in _model_folders(model, written):
        with found.problems.collecting():
            Checkpoint(folder)


def _is_of_system(name: str) -> bool:
    """Whether a file is what Python or a desktop leaves in folders."""
    return name.endswith((".pyc", ".DS_Store"))


def _verify_copies(written: Mapping[str, Written], checkpoints: Mapping[str, Checkpoint], found: Findings) -> None:
    """Whether what was copied is what the base, or an expert, has now."""
    for owner, checkpoint in checkpoints.items():
        entries = {entry.name: entry for entry in checkpoint.stored}
        for file, one in written.items():
            copied = {name: section for name, section in one.sections.items() if section.source[:1] == (owner,)}
            differing = [name for name, section in copied.items() if not _has(entries, section)]
            found.copies += len(copied)
            if differing:
                found.problems.add(f"{file}: {first_of(differing, _SHOWN)} is not what {_called(owner)} has")


def _has(entries: Mapping[str, Entry], section: Section) -> bool:
    """Whether the tensor of a checkpoint that was copied has the bytes that were."""
    entry = entries.get(section.source[1]) if section.source else None
    if entry is None or entry.size != section.size:
        return False
    there = section._replace(start=entry.offset)
    with entry.file.open("rb") as stream:
        return read_digest(stream.fileno(), there) == section.digest


def _verify_cards(model: Path, record: Mapping[str, Any], written: Mapping[str, Written], found: Findings) -> None:
    """Whether each model's card tells of the method and of the tensors that the model has."""
    for folder in _model_folders(model, written):
        card = folder / "README.md"
        if not card.is_file():
            continue
        text = card.read_text(encoding="utf-8", errors="replace")
        counted = _COUNTED.search(text)
        tensors = sum(len(one.sections) - 1 for other, one in written.items() if (model / other).parent == folder)
        names = {record["method"], method_in_words(record)}  # older cards name no modifiers
        if counted is None or int(counted[2]) != tensors or not any(f"`{name}`" in text for name in names):
            found.problems.add(
                f"{card.relative_to(model.parent)} does not tell of {tensors} tensors and of {record['method']}"
            )


def _summary(run: Run, checkpoints: Mapping[str, Checkpoint], found: Findings) -> str:
    """What was looked at and is as it was."""
    whose = ", ".join(map(_called, checkpoints)) or "no checkpoint"
    return (
        f"{run.folder}: {found.files} files of {run.model.name} ({show_size(found.size)}) are as they were written, "
        f"{found.tensors} tensors; {found.copies} copied tensors are those of their checkpoints; "
        f"fingerprints unchanged: {whose}"
    )
