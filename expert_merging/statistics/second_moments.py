"""Second moments of an optimizer, as users give them: one safetensors file for each expert."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

from expert_merging.checkpoints.checkpoint import read_header
from expert_merging.checkpoints.fingerprints import file_content
from expert_merging.context import Context
from expert_merging.documents import resolved
from expert_merging.errors import InputError, Problems, first_of, near_name
from expert_merging.plan import Plan
from expert_merging.statistics.entrywise import Entries

# What may follow a tensor's name in a file.
_ENDINGS = ("", ".exp_avg_sq")


def check_second_moments(context: Context, given: Mapping[str, str]) -> Entries:
    """What the files have, which must be all merged tensors of all experts.

    Args:
        context: the run.
        given: file by expert.

    Raises:
        InputError: every problem found.
    """
    plan, problems, endings = context.plan, Problems(), dict[str, str]()
    for unknown in [name for name in given if name not in plan.experts]:
        problems.add(f"--second_moments: there is no expert {unknown!r}. {near_name(unknown, [*plan.experts])}")
    missing = [name for name in plan.experts if name not in given]
    if missing:
        problems.add(
            f"--second_moments has no file of {first_of(missing, 1)}; give one for each expert, or none, and they are "
            "estimated from samples"
        )
    for expert in [name for name in plan.experts if name in given]:
        with problems.collecting():
            endings[expert] = _check_file(plan, resolved(given[expert]))
    if not problems.found and len(set(endings.values())) > 1:
        problems.add("--second_moments: some files have names that end with .exp_avg_sq, and others have not")
    problems.check()
    return Entries({expert: resolved(given[expert]) for expert in plan.experts}, ending=next(iter(endings.values())))


def digest_of_files(moments: Entries) -> str:
    """A digest of what the files have."""
    digest = hashlib.sha256()
    for file in moments.files.values():
        digest.update(file_content(file))
    return digest.hexdigest()[:16]


def _check_file(plan: Plan, file: Path) -> str:
    """What follows tensors' names in a file.

    Raises:
        InputError: it is no safetensors file, or lacks a merged tensor or has it in another shape.
    """
    if not file.is_file():
        raise InputError(f"--second_moments {file} is no file; give a safetensors file")
    _, found = read_header(file)
    shapes = {entry.name: entry.shape for entry in found}
    ending = next((end for end in _ENDINGS if any(name + end in shapes for name in plan.merged)), "")
    missing = [name for name in plan.merged if name + ending not in shapes]
    if missing:
        raise InputError(f"{file} has no second moments of {first_of(missing, 1)}; exclude it, or give another file")
    for name in plan.merged:
        own, wanted = shapes[name + ending], plan.base.entries[name].shape
        if own != wanted:
            raise InputError(f"{file} has second moments of {name} in the shape {[*own]}, which has {[*wanted]}")
    return ending
