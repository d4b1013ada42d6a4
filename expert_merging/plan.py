"""What is merged: checkpoints that fit together."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

from expert_merging.checkpoint import FLOATS, Checkpoint, Entry
from expert_merging.errors import Problems
from expert_merging.folders import check_other_files
from expert_merging.parts import Part
from expert_merging.roles import has_row_per_word, is_rotary_table

# ``(task_vectors, part, base) -> merged task vector``: task vectors ``(experts, entries)`` (whole tensors:
# ``(experts, *shape)``) are working memory, which a rule may overwrite; the base's entries are not. A rule may return
# tensors by name instead, of which ``merged`` is the merged task vector. A modifier is given that as well.
Rule: TypeAlias = Callable[..., Any]


@dataclass(frozen=True)
class Plan:
    """What is merged, checked from headers alone.

    Args:
        base: the base model.
        experts: expert checkpoints by name, in order.
        merged: names of the tensors to merge, in the order of the base's files.
    """

    base: Checkpoint
    experts: Mapping[str, Checkpoint]
    merged: tuple[str, ...]

    def only(self, experts: Sequence[str]) -> Plan:
        """The plan with some of its experts alone."""
        return replace(self, experts={name: self.experts[name] for name in experts})

    def part(self, name: str) -> Part:
        """All of a tensor of the base."""
        return Part.whole(name, self.base.entries[name].shape)

    @property
    def base_elements(self) -> int:
        """Number of entries of the base."""
        return sum(entry.elements for entry in self.base.entries.values())

    @property
    def merged_elements(self) -> int:
        """Number of entries that are merged."""
        return sum(self.base.entries[name].elements for name in self.merged)


def show_size(count: float) -> str:
    """Bytes of files in words."""
    return f"{count / 1e9:.2f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"


def make_plan(
    base_folder: Path,
    expert_folders: Mapping[str, Path],
    excluded: list[str],
    file_name: Callable[[str], str] = str,
) -> Plan:
    """Open all checkpoints and check that they fit together.

    Args:
        base_folder: the base model.
        expert_folders: the experts by name.
        excluded: patterns of parameters that keep the base's value.
        file_name: published name of a parameter, whatever naming it was saved with.

    Raises:
        InputError: every problem found in any of them.
    """
    problems = Problems()
    opened: dict[str, Checkpoint] = {}
    for name, folder in {"": base_folder, **expert_folders}.items():
        with problems.collecting():
            opened[name] = Checkpoint(folder)
    if not expert_folders:
        problems.add("there is nothing to merge: give at least one --expert NAME=PATH")
    if len(opened) > 1 and "" in opened:
        base = opened.pop("")
        with problems.collecting():
            check_other_files(base.folder)
        # Experts may name parameters otherwise than the base, as different versions of transformers do.
        for expert in opened.values():
            adopt_names(base, expert, file_name)
        with problems.collecting():
            merged = check_experts(base, opened, excluded, file_name)
    problems.check()
    return Plan(base, opened, tuple(merged))


def check_experts(
    base: Checkpoint,
    experts: Mapping[str, Checkpoint],
    excluded: Sequence[str],
    file_name: Callable[[str], str] = str,
) -> list[str]:
    """Check that experts fit the base and say which tensors are merged.

    Args:
        base: the base model.
        experts: expert checkpoints by name.
        excluded: patterns of parameters that keep the base's value, matched from the start of the name (`re.match`), as
            it is in the file or as it was published.
        file_name: published name of a parameter, whatever naming it was saved with.

    Returns:
        Names of the tensors to merge, in the order of the base's files: the floating-point ones that no pattern
        matches.

    Raises:
        InputError: missing or extra tensors, shapes or types that differ, a pattern that is not a regular expression,
            or nothing left to merge.
    """
    problems = Problems()
    patterns = []
    for pattern in excluded:
        try:
            patterns.append(re.compile(pattern))
        except re.error as error:
            problems.add(f"--exclude_params {pattern!r} is not a regular expression: {error}")
    problems.check()

    def is_excluded(name: str) -> bool:
        return is_rotary_table(name) or any(
            pattern.match(name) or pattern.match(file_name(name)) for pattern in patterns
        )

    merged = [
        entry.name
        for file in base.files
        for entry in base.in_file(file)
        if entry.is_float and not is_excluded(entry.name)
    ]
    if not merged:
        problems.add(f"every parameter of {base.folder} is excluded by --exclude_params; nothing would be merged")
    shapes = {name: base.entries[name].shape for name in merged}
    for expert, checkpoint in experts.items():
        found = misfits(
            checkpoint.entries,
            shapes,
            is_known=lambda name: name in base.entries or is_excluded(name),
            of="the base",
            advice="; is it an expert of this base? (or exclude it)",
            rows="; --embeddings mean, or base, matches rows by token",
        )
        for problem in found:
            problems.add(f"expert {expert} ({checkpoint.folder}): {problem}")
    problems.check()
    return merged


def adopt_names(base: Checkpoint, expert: Checkpoint, file_name: Callable[[str], str]) -> None:
    """Let an expert's entries go by the base's names, where the two name the same parameters differently."""
    published = Counter(map(file_name, expert.entries))
    names = {file_name(name): name for name in base.entries}
    expert.entries = {
        name if published[file_name(name)] > 1 else names.get(file_name(name), name): entry
        for name, entry in expert.entries.items()
    }


def misfits(
    entries: Mapping[str, Entry],
    shapes: Mapping[str, tuple[int, ...]],
    *,
    is_known: Callable[[str], bool],
    of: str,
    advice: str = "",
    rows: str = "",
) -> list[str]:
    """What keeps tensors from being the wanted ones, the first few of each kind with the number of the rest.

    Args:
        entries: the tensors that are there.
        shapes: shapes of the wanted ones, which must have a floating-point type.
        is_known: whether a tensor may be there without being wanted.
        of: who wants them, for messages.
        advice: what to do about a tensor that is not known.
        rows: what to do about embeddings and heads that have other rows alone.
    """
    there = {name: entries[name] for name in shapes if name in entries}
    missing = [f"lacks the tensor {name}" for name in shapes if name not in there]
    extra = [
        f"has the tensor {name}, which {of} lacks{advice}"
        for name in entries
        if name not in shapes and not is_known(name)
    ]
    shaped = [
        f"{name} has shape {list(entry.shape)}, {of}'s has {list(shapes[name])}"
        + (rows if has_row_per_word(name) and entry.shape[1:] == shapes[name][1:] else "")
        for name, entry in there.items()
        if entry.shape != shapes[name]
    ]
    stored = [
        f"{name} is stored as {entry.dtype}, which cannot be merged; allowed: {', '.join(FLOATS)}"
        for name, entry in there.items()
        if not entry.is_float
    ]
    return [problem for kind in (missing, extra, shaped, stored) for problem in _first(kind)]


def _first(problems: list[str], shown: int = 4) -> list[str]:
    if len(problems) <= shown + 1:
        return problems
    return [*problems[:shown], f"... and {len(problems) - shown} more like the last"]
