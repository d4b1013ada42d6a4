"""What is merged: checkpoints that fit together."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

from expert_merging.checkpoints.adapter import open_checkpoint
from expert_merging.checkpoints.checkpoint import FLOATS, Checkpoint, Entry
from expert_merging.checkpoints.fingerprints import of_text
from expert_merging.checkpoints.leftovers import check_leftovers, foreign_types
from expert_merging.checkpoints.naming import DECODER, cut_otherwise, names_of_base, published_names
from expert_merging.checkpoints.other_files import check_other_files
from expert_merging.checkpoints.text_alone import complete
from expert_merging.checkpoints.tying import Heads, tie_heads
from expert_merging.errors import InputError, Problems
from expert_merging.parts import Part
from expert_merging.roles import has_row_per_word, is_rotary_table

T = TypeVar("T")
BASE = "the base"
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
        heads: which output heads are embeddings.
        published: names in the published checkpoints of the base's tensors, where they have others in its files.
        contained: how the names of checkpoints that stand in a container are read, by whose checkpoint it is.
    """

    base: Checkpoint
    experts: Mapping[str, Checkpoint]
    merged: tuple[str, ...]
    heads: Heads = field(default_factory=Heads)
    published: Mapping[str, str] = field(default_factory=dict)
    contained: Mapping[str, str] = field(default_factory=dict)

    def only(self, experts: Sequence[str]) -> Plan:
        """The plan with some of its experts alone."""
        return replace(self, experts={name: self.experts[name] for name in experts})

    def refuse_contained(self, *experts: str) -> None:
        """Refuse to run the base, or one of these experts, where transformers does not know its tensors' names.

        Raises:
            InputError: they stand in a container.
        """
        runs = {BASE, *map(_expert, experts)}
        problems = [
            f"{who} cannot be loaded as a model: transformers knows its tensors by names {words}; save it under those, "
            "or use a method that runs no model (closed forms find the tensors)"
            for who, words in self.contained.items()
            if who in runs
        ]
        if problems:
            raise InputError(*problems)

    def by_own_names(self, values: Mapping[str, T]) -> dict[str, T]:
        """Values by published names, or by the base's own, by the base's own."""
        own = {published: name for name, published in self.published.items()}
        return {own.get(name, name): value for name, value in values.items()}

    def part(self, name: str) -> Part:
        """All of a tensor of the base."""
        return Part.whole(name, self.base.entries[name].shape)

    def merged_as(self, name: str) -> str | None:
        """The tensor whose merged value a tensor gets: itself, or what it is a copy of; None if that is not merged."""
        source = self.heads.kept if name == self.heads.copy else name
        return source if source in self.merged_set else None

    @functools.cached_property
    def merged_set(self) -> frozenset[str]:
        """Names of the tensors to merge, to look one up."""
        return frozenset(self.merged)

    @property
    def checkpoints(self) -> dict[str, Checkpoint]:
        """The experts by name after the ``base``, which no expert is called."""
        return {"base": self.base, **self.experts}

    @property
    def contents(self) -> dict[str, str]:
        """Digests of the weights of ``base`` and experts, which copies share."""
        return {name: checkpoint.content() for name, checkpoint in self.checkpoints.items()}

    @property
    def opened(self) -> str:
        """A digest that differs once a weight file of any of them was written or replaced."""
        return of_text(" ".join(checkpoint.opened for checkpoint in self.checkpoints.values()))

    @property
    def base_elements(self) -> int:
        """Number of entries of the base."""
        return sum(entry.elements for entry in self.base.entries.values())

    @property
    def merged_elements(self) -> int:
        """Number of entries that are merged."""
        return sum(self.base.entries[name].elements for name in self.merged)


def _expert(name: str) -> str:
    return f"expert {name}"


def make_plan(
    base_folder: Path,
    expert_folders: Mapping[str, Path],
    excluded: list[str],
    file_name: Callable[[str], str] = str,
    landmark: str = DECODER,
) -> Plan:
    """Open all checkpoints and check that they fit together.

    Args:
        base_folder: the base model.
        expert_folders: the experts by name.
        excluded: patterns of parameters that keep the base's value.
        file_name: published name of a parameter, whatever naming it was saved with.
        landmark: pattern of names that published checkpoints have.

    Raises:
        InputError: every problem found in any of them.
    """
    problems = Problems()
    opened: dict[str, Checkpoint] = {}
    published: dict[str, str] = {}
    with problems.collecting():
        base = Checkpoint(base_folder)
        check_leftovers(base)
        opened[""] = base
        container, published = published_names(base.entries, file_name, landmark)
    for name, folder in expert_folders.items():
        with problems.collecting():
            expert = open_checkpoint(folder, opened.get(""), file_name, published)
            check_leftovers(expert)
            opened[name] = expert
    if not expert_folders:
        problems.add("there is nothing to merge: give at least one --expert NAME=PATH")
    if len(opened) > 1 and "" in opened:
        base = opened.pop("")
        with problems.collecting():
            check_other_files(base.folder)
        contained = {BASE: container.words(base.entries)}
        # Experts may name parameters otherwise than the base, as different versions of transformers do.
        for name, expert in opened.items():
            contained[_expert(name)] = adopt_names(published, expert, file_name)
            complete(base, published, expert)
        heads = tie_heads(base, opened)
        with problems.collecting():
            merged = check_experts(base, opened, excluded, file_name, published, heads)
    problems.check()
    return Plan(
        base, opened, tuple(merged), heads, published, {who: words for who, words in contained.items() if words}
    )


def check_experts(
    base: Checkpoint,
    experts: Mapping[str, Checkpoint],
    excluded: Sequence[str],
    file_name: Callable[[str], str] = str,
    published: Mapping[str, str] | None = None,
    heads: Heads | None = None,
) -> list[str]:
    """Check that experts fit the base and say which tensors are merged.

    Args:
        base: the base model.
        experts: expert checkpoints by name.
        excluded: patterns of parameters that keep the base's value, matched from the start of the name (`re.match`), as
            it is in the file or as it was published.
        file_name: published name of a parameter, whatever naming it was saved with.
        published: published names of the base's tensors, where more than that stands between.
        heads: which output heads are embeddings.

    Returns:
        Names of the tensors to merge, in the order of the base's files: the floating-point ones that no pattern
        matches.

    Raises:
        InputError: missing or extra tensors, shapes or types that differ, a pattern that is not a regular expression,
            or nothing left to merge.
    """
    published, heads = published or {name: file_name(name) for name in base.entries}, heads or Heads()
    is_excluded = _exclusion(excluded, lambda name: published.get(name) or file_name(name))
    problems = Problems()
    wanted = [
        entry
        for file in base.files
        for entry in base.in_file(file)
        if entry.name != heads.copy and not is_excluded(entry.name)
    ]
    merged = [entry.name for entry in wanted if entry.is_float]
    for problem in [*_first(foreign_types(base, experts.values(), wanted)), *heads.lost_with(merged)]:
        problems.add(problem)
    if not merged and not problems.found:
        problems.add(f"every parameter of {base.folder} is excluded by --exclude_params; nothing would be merged")
    for name, expert in experts.items():
        cut = cut_otherwise(published, {name: file_name(name) for name in expert.entries})
        for problem in _misfits_of(expert, base, merged, cut, is_excluded):
            problems.add(f"expert {name} ({expert.folder}): {problem}")
    problems.check()
    return merged


def _misfits_of(
    expert: Checkpoint,
    base: Checkpoint,
    merged: Sequence[str],
    cut: Mapping[str, str],
    is_excluded: Callable[[str], bool],
) -> list[str]:
    """What keeps an expert from being merged with the base; ``cut`` has the tensors that it cuts otherwise."""
    found = misfits(
        expert.entries,
        {name: base.entries[name].shape for name in merged if name not in cut},
        is_known=lambda name: name in base.entries or name in cut or is_excluded(name),
        of="the base",
        advice="; is it an expert of this base? (or exclude it)",
        rows="; --embeddings mean, or base, matches rows by token",
    )
    return [*found, *_first(list(dict.fromkeys(cut[name] for name in merged if name in cut)))]


def _exclusion(excluded: Sequence[str], published: Callable[[str], str]) -> Callable[[str], bool]:
    """Whether a tensor keeps the base's value, by its name.

    Raises:
        InputError: a pattern is not a regular expression.
    """
    patterns, problems = [], []
    for pattern in excluded:
        try:
            patterns.append(re.compile(pattern))
        except re.error as error:
            problems.append(f"--exclude_params {pattern!r} is not a regular expression: {error}")
    if problems:
        raise InputError(*problems)
    return lambda name: (
        is_rotary_table(name) or any(pattern.match(name) or pattern.match(published(name)) for pattern in patterns)
    )


def adopt_names(published: Mapping[str, str], expert: Checkpoint, file_name: Callable[[str], str]) -> str:
    """Let an expert's entries go by the base's names, where the two name the same parameters differently.

    Args:
        published: published names of the base's tensors by name.
        expert: the expert.
        file_name: published name of a parameter, whatever naming it was saved with.

    Returns:
        How names are read that stand in another container than the base's; empty where there is none.
    """
    container, names = names_of_base(expert.entries, published, file_name)
    words = container.words(expert.entries)
    is_contained = not names.keys() <= published.keys()
    expert.entries = {names[name]: entry for name, entry in expert.entries.items()}
    return words if is_contained else ""


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
