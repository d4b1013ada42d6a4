"""Embeddings and head that are put together by token, instead of being the base's or merged row by row.

Rows of embeddings and head belong to tokens, and models that were resized number theirs differently. So no method
merges them here: each row of the result is the row, or the mean of the rows, that some models have for its token.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from expert_merging.card import inline
from expert_merging.checkpoints.checkpoint import Checkpoint
from expert_merging.checkpoints.configurations import language_setting
from expert_merging.checkpoints.fingerprints import file_content
from expert_merging.checkpoints.folders import INDEX
from expert_merging.checkpoints.tokenizer_files import Vocabulary, read_object
from expert_merging.checkpoints.tying import SETTING
from expert_merging.checkpoints.vocabulary import row_count, with_identifiers, with_size
from expert_merging.errors import InputError
from expert_merging.outputs import Computed, Copied, Output, Slot, make_header, metadata_of
from expert_merging.plan import Plan
from expert_merging.roles import has_row_per_word, is_head, word_tables

if TYPE_CHECKING:
    import numpy
    from torch import Tensor

    Rows = numpy.ndarray[Any, numpy.dtype[numpy.int64]]

# What the base is called among models, which no expert is.
BASE = "base"


@dataclass(frozen=True)
class WordTables:
    """Embeddings and head of the merged model, put together by token.

    Args:
        plan: the checkpoints.
        vocabulary: the merged model's tokens.
        rows: for every model that rows are taken from, ``base`` or an expert, its row for each row of the result, -1
            where it does not take part.
        beside: the tokenizer's files, as `expert_merging.outputs.Output` has them.
        identifiers: ``config.json`` of the expert whose tokenizer it is; None for the base's.
        about: what the card and the plan say.
    """

    plan: Plan
    vocabulary: Vocabulary
    rows: Mapping[str, Rows]
    beside: Mapping[str, bytes | Path | None]
    identifiers: Mapping[str, Any] | None
    about: str

    @property
    def count(self) -> int:
        """Rows of the result."""
        return len(next(iter(self.rows.values())))

    @property
    def digest(self) -> str:
        """A digest of rows and files: a run is continued only with the same."""
        digest = hashlib.sha256()
        for name, rows in self.rows.items():
            digest.update(name.encode() + rows.tobytes())
        for name, content in sorted(self.beside.items()):
            digest.update(name.encode() + (file_content(content) if isinstance(content, Path) else content or b"none"))
        return digest.hexdigest()[:16]

    def applied(self, output: Output) -> Output:
        """The output with these embeddings, head and tokenizer."""
        files = {file: tuple(map(self._slot, slots)) for file, slots in output.files.items()}
        headers = {
            file: header if files[file] == output.files[file] else self._header(header, files[file])
            for file, header in output.headers.items()
        }
        edits = self.count != row_count(self.plan.base) or self.identifiers is not None
        return replace(
            output,
            files=files,
            headers=headers,
            edit=partial(self._edit, output.edit) if edits else output.edit,
            about="\n\n".join(filter(None, [output.about, inline(self.about)])),
            beside={**output.beside, **self.beside, **self._index(output, files)},
        )

    def _slot(self, slot: Slot) -> Slot:
        if not isinstance(slot.source, Copied) or slot.source.expert or not has_row_per_word(slot.source.name):
            return slot
        shape = (self.count, *slot.shape[1:])
        return Slot.of(slot.name, slot.dtype, shape, Computed(partial(self._entries, slot.source.name)))

    def _header(self, header: bytes, slots: Sequence[Slot]) -> bytes:
        has_base_shapes = all(slot.shape == self.plan.base.entries[slot.name].shape for slot in slots)
        return header if has_base_shapes else make_header(slots, metadata_of(header))

    def _index(self, output: Output, files: Mapping[str, Sequence[Slot]]) -> dict[str, bytes]:
        """The base's index with the size that the tensors have now."""
        file = self.plan.base.folder / INDEX
        if not output.is_mirror or not file.is_file() or len(files) == 1:
            return {}
        index = read_object(file)
        size = sum(slot.size for slots in files.values() for slot in slots)
        index["metadata"] = {**(index.get("metadata") or {}), "total_size": size}
        return {INDEX: (json.dumps(index, indent=2) + "\n").encode()}

    def _edit(self, before: Callable[[Mapping[str, Any]], Mapping[str, Any]] | None, base: Mapping[str, Any]) -> Any:
        """``config.json`` with the number of rows, and with what the tokenizer's owner calls special tokens."""
        config = {**(before(base) if before else base)}
        if self.identifiers is not None:
            config = with_identifiers(config, self.identifiers)
        return with_size(config, self.count)

    def _entries(self, name: str, start: int, stop: int) -> Tensor:
        """Entries ``[start, stop)`` of a flattened table, in float32 or more."""
        import torch

        entry = self.plan.base.entries[name]
        width = entry.elements // entry.shape[0]
        first, last = start // width, -(-stop // width)
        dtype = torch.promote_types(entry.torch_dtype, torch.float32)
        total = torch.full((last - first, width), -0.0, dtype=dtype)  # to which -0 may be added and stay what it is
        counts = torch.zeros(last - first, 1, dtype=dtype)
        for model, rows in self.rows.items():
            checkpoint = self.plan.checkpoints[model]
            table = table_of(checkpoint, name, self.plan.base)
            places, numbers = _used(rows[first:last])
            if len(numbers):
                total[places] += _read_rows(checkpoint, table, numbers, width).to(dtype)
                counts[places] += 1
        return (total / counts).view(-1)[start - first * width : stop - first * width]


def _used(rows: Rows) -> tuple[Tensor | slice, Rows]:
    """Where rows are taken, and which ones; everywhere is a slice, which is many times as fast."""
    import torch

    places = (rows >= 0).nonzero()[0]
    return slice(None) if len(places) == len(rows) else torch.from_numpy(places), rows[places]


def _read_rows(checkpoint: Checkpoint, table: str, numbers: Rows, width: int) -> Tensor:
    """Rows ``(rows, width)`` of a table; what follows one another is read at once."""
    import numpy
    import torch

    ends = numpy.flatnonzero(numpy.diff(numbers) != 1) + 1
    runs = numpy.split(numbers, ends)
    return torch.cat([checkpoint.read(table, int(run[0]) * width, (int(run[-1]) + 1) * width) for run in runs]).view(
        -1, width
    )


def table_of(checkpoint: Checkpoint, name: str, base: Checkpoint) -> str:
    """The tensor of a checkpoint that stands for a table of the base: of a tied head, the embeddings.

    Raises:
        InputError: it has none.
    """
    tables, (embedding, _) = [name], word_tables(checkpoint.entries)
    if is_head(name) and embedding:
        tables.insert(0 if language_setting(base.config, SETTING) else 1, embedding)
    for table in tables:
        if table in checkpoint.entries:
            return table
    raise InputError(f"{checkpoint.folder} has neither {name} nor embeddings that it could be tied to")
