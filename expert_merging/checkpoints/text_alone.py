"""Experts of text alone: fine-tunes of the language model that a base with pictures holds."""

from __future__ import annotations

from collections.abc import Mapping

from expert_merging.checkpoints.checkpoint import Checkpoint
from expert_merging.roles import is_head

_PICTURES = "vision_config"


def complete(base: Checkpoint, published: Mapping[str, str], expert: Checkpoint) -> None:
    """Let an expert that is a language model alone have the base's values in the parts that it lacks.

    It has changed nothing there, so its task vector is zero.

    Args:
        base: the base model.
        published: published names of the base's tensors by name.
        expert: the expert, whose entries go by the base's names; what it lacks is added.
    """
    if _PICTURES not in base.config or _PICTURES in expert.config:
        return
    own = {_part(published[name]) for name in expert.entries if name in published}
    lacking = {
        name: entry
        for name, entry in base.entries.items()
        if name not in expert.entries and _part(published[name]) not in own and not is_head(name)
    }
    if own and lacking:
        parts = sorted({_part(published[name]) for name in lacking})
        expert.entries |= lacking
        expert.kind = f" (a language model alone, with the base's {' and '.join(parts)})"


def _part(name: str) -> str:
    return name.partition(".")[0]
