"""Rebuild an expert from a run of ``tall`` or ``emr``: the base, with merged entries where the expert's mask has ones.

Nothing but the run and the base is read. The driver that merges does it: the merged model is its only expert.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterable, Mapping
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from expert_merging.card import CARD, code, inline
from expert_merging.checkpoints.checkpoint import Checkpoint, Entry, as_bytes, read_exactly, read_header
from expert_merging.checkpoints.folders import owner
from expert_merging.checkpoints.open_files import OpenFiles
from expert_merging.checkpoints.other_files import not_copied
from expert_merging.checkpoints.sources import locate
from expert_merging.checkpoints.tying import tie_heads
from expert_merging.console import Terminal, say
from expert_merging.errors import InputError, Problems, near_name, one_line
from expert_merging.machine import limit_threads, show_size
from expert_merging.merge import write_output
from expert_merging.methods import emr, tall
from expert_merging.outputs import mirror_of
from expert_merging.parts import Part
from expert_merging.plan import Plan
from expert_merging.run import Run
from expert_merging.writing import check_free_disk, check_new_folder, making_folder, write_atomically

if TYPE_CHECKING:
    from torch import Tensor

logger = logging.getLogger(__name__)
_CARD = """---
base_model:
- {source}
tags:
- merge
- expert-merging
---

# {expert}

An expert rebuilt from a merge of {count} experts of {base} and the expert's mask ({paper}):
{tensors} tensors have the merged model's entries where the mask has ones, {share:.1%} of them all, and the base's
elsewhere.{rescaled} All other tensors and files of this folder are the base's.
"""
_SOURCES = {"tall": "TALL masks, arXiv 2405.07813", "emr": "EMR merging, arXiv 2405.17461"}
_RESCALED = " What the merge changed is multiplied by {factor:g} there."
# Bytes of a tensor by which two bases are told apart.
_SAMPLE = 4096


def extract(folder: Path, expert: str, target: Path, base_folder: Path | None, console: Console) -> None:
    """Write an expert as a complete model folder.

    Args:
        folder: folder of a complete run with masks.
        expert: name of the expert.
        target: where the model goes; nothing may be there.
        base_folder: the base the run was made of, where it is not at its place any more.
        console: told what was written.

    Raises:
        InputError: every problem found, before anything is written.
    """
    target = target.absolute()
    plan, masks = _open(Run(folder), expert, base_folder)
    output = mirror_of(plan)
    check_new_folder(target, (plan.base.folder, folder), "--output")
    check_free_disk(target, output.size, "--output")
    import torch

    limit_threads()

    def rule(task_vectors: Tensor, part: Part, _base: Tensor) -> Tensor:
        return task_vectors[0].mul_(masks.read(part)).mul_(masks.factor)

    with closing(Terminal()) as terminal, making_folder(target) as partial:
        for line in not_copied(plan.base.folder):
            logger.warning("%s", line)
        device = torch.device("cpu")
        write_output(output, plan, rule, partial, unit="entries", device=device, progress=terminal.progress)
        write_atomically(partial / CARD, _card(plan, masks, Run(folder)).encode())
    say(console, f"expert {expert}: {target} ({show_size(output.size)})")


def _open(run: Run, expert: str, base_folder: Path | None) -> tuple[Plan, Masks]:
    """Base, merged model and the expert's masks, checked to belong together."""
    record = _read_record(run)
    problems = Problems()
    with problems.collecting():
        base = Checkpoint(locate(base_folder or Path(record["options"]["base_model_path"])))
    with problems.collecting():
        model = Checkpoint(run.model)
    with problems.collecting():
        masks = Masks(run.model / tall.FOLDER, expert)
    problems.check()
    heads = tie_heads(base, {})
    follows = {heads.copy} if heads.kept in masks.entries else set()
    others = [name for name in base.entries if name not in masks.entries and name not in follows]
    is_same = masks.base in (None, base.content()) and _agree(base, model, others)
    if list(base.headers.values()) != list(model.headers.values()) or not is_same:
        raise InputError(
            f"{base.folder} is not the base that {run.folder} was made of; give that with --base_model_path"
        )
    masks.check(base.entries)
    if record["method"] == emr.emr.__name__:
        masks.factor = _read_factor(masks.folder / emr.RESCALERS, expert)
    merged = [entry.name for file in base.files for entry in base.in_file(file) if entry.name in masks.entries]
    return Plan(base, {expert: model}, tuple(merged), heads), masks


def _read_record(run: Run) -> Mapping[str, Any]:
    """``config.json`` of a complete run with masks."""
    record = run.merged_from()
    if record is None:
        raise InputError(f"{run.folder} is no run: it has no readable {run.config.name} of one")
    if record["method"] not in _SOURCES:
        raise InputError(
            f"{run.folder} is a run of {record['method']}; experts can be rebuilt from runs of --method "
            f"{' and '.join(_SOURCES)}"
        )
    if not run.is_complete:
        raise InputError(f"{run.folder} is not complete; its own command continues it")
    return record


def _agree(base: Checkpoint, model: Checkpoint, names: Iterable[str]) -> bool:
    """Whether the two have the same bytes at the beginning of tensors that were copied."""

    def first_bytes(checkpoint: Checkpoint, entry: Entry) -> bytes:
        view = memoryview(bytearray(min(_SAMPLE, entry.size)))
        checkpoint.read_bytes(view, entry.file, entry.offset)
        return bytes(view)

    return all(first_bytes(base, base.entries[name]) == first_bytes(model, model.entries[name]) for name in names)


class Masks:
    """The masks of one expert, read bit by bit.

    Args:
        folder: where the masks of all experts are.
        expert: the expert's name.

    Raises:
        InputError: there are none, or none of this expert.

    Attributes:
        entries: the masks in their files, by name of the tensor that they are for.
        experts: names of all experts.
        base: digest of the base's weights, None where it is not recorded.
        factor: what the merged model's changes are multiplied by where the mask has ones.
    """

    def __init__(self, folder: Path, expert: str) -> None:
        self.folder = folder
        self.entries: dict[str, Entry] = {}
        self.experts: list[str] = []
        self.base: str | None = None
        self.factor = 1.0
        for file in sorted(folder.glob("*.safetensors")):
            if file.name == emr.RESCALERS:
                continue
            header, entries = read_header(file)
            self.base = tall.base_of(header) or self.base
            for entry in entries:
                owner, _, name = entry.name.partition("/")
                self.experts += [] if owner in self.experts else [owner]
                if owner == expert:
                    self.entries[name] = entry
        if not self.experts:
            raise InputError(f"{folder} has no masks; were they moved away from the merged model?")
        if not self.entries:
            raise InputError(f"{folder} has no masks of {expert!r}. {near_name(expert, self.experts)}")
        self._open_files = OpenFiles()

    def check(self, entries: Mapping[str, Entry]) -> None:
        """Check that the masks fit the tensors of a checkpoint."""
        problems = [
            f"{mask.file}: the mask {mask.name} does not fit the merged model's tensor of that name"
            for name, mask in self.entries.items()
            if name not in entries or (mask.dtype, mask.shape) != ("U8", (-(-entries[name].elements // tall.PACKED),))
        ]
        if problems:
            raise InputError(*problems[:4])

    def read(self, part: Part) -> Tensor:
        """The mask of a part's entries, ``(entries,)`` uint8."""
        import torch

        entry = self.entries[part.name]
        first, last = part.start // tall.PACKED, -(-part.stop // tall.PACKED)
        packed = torch.empty(last - first, dtype=torch.uint8)
        with self._open_files.reading(entry.file) as descriptor:
            read_exactly(descriptor, as_bytes(packed), entry.offset + first, entry.file)
        before = part.start - first * tall.PACKED
        return tall.unpack(packed, before + part.entries)[before:]

    def share(self) -> float:
        """Share of ones among all bits."""
        ones = sum(int(self.read(block).sum()) for name in self.entries for block in self._blocks(name))
        return ones / max(1, tall.PACKED * sum(entry.size for entry in self.entries.values()))

    def _blocks(self, name: str) -> Iterable[Part]:
        return Part.whole(name, (tall.PACKED * self.entries[name].size,)).cut(1 << 22)


def _read_factor(file: Path, expert: str) -> float:
    """The expert's factor of a run of ``emr``.

    Raises:
        InputError: it is not there.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        factor = float(load_file(file)[expert])
    except (OSError, SafetensorError, KeyError, ValueError, RuntimeError):  # the last where it is several numbers
        factor = math.nan
    if not math.isfinite(factor):
        raise InputError(f"{file} does not have the factor of {expert!r}; was it changed or moved away?")
    return factor


def _card(plan: Plan, masks: Masks, run: Run) -> str:
    assert run.record is not None  # noqa: S101  (the run was checked)
    return _CARD.format(
        source=json.dumps(one_line(owner(plan.base.folder)), ensure_ascii=False),
        base=code(owner(plan.base.folder)),
        expert=inline(next(iter(plan.experts))),
        count=len(masks.experts),
        tensors=len(plan.merged),
        share=masks.share(),
        paper=_SOURCES[run.record["method"]],
        rescaled=_RESCALED.format(factor=masks.factor) if masks.factor != 1 else "",
    )
