"""Output heads that are embeddings: one matrix, whatever number of tensors the files have for it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from expert_merging.checkpoints.checkpoint import Checkpoint
from expert_merging.checkpoints.configurations import language_setting
from expert_merging.parts import Part
from expert_merging.roles import word_tables

SETTING = "tie_word_embeddings"
_BLOCK = 1 << 22


@dataclass(frozen=True)
class Heads:
    """How the output heads of a run's checkpoints go together.

    Args:
        kept: the base's tensor that is embedding and head at once; None where the two are apart.
        copy: another tensor of the base that holds the same once more; None where there is none.
        own: experts that have a head apart from the embedding, while the base has not.
        contradicts: the base's ``config.json`` says tied, and its two tensors differ.
    """

    kept: str | None = None
    copy: str | None = None
    own: tuple[str, ...] = ()
    contradicts: bool = False

    def lost_with(self, merged: Sequence[str]) -> list[str]:
        """Why heads of some experts would have no place in the merged model, where what the base keeps is merged."""
        if self.kept not in merged:
            return []
        return [
            f"expert {name} has an output head apart from its embedding, and in the base the two are one "
            f"({self.kept}); exclude that, or give a base with a head of its own"
            for name in self.own
        ]


def tie_heads(base: Checkpoint, experts: Mapping[str, Checkpoint]) -> Heads:
    """Find what stands for head and embedding, and let tied experts have it under the names that the base has.

    Reads heads and embeddings where ``config.json`` leaves open whether the two are one.

    Args:
        base: the base model.
        experts: expert checkpoints by name, whose entries go by the base's names; what one lacks is added.
    """
    embedding, head = word_tables(base.entries)
    tied = is_tied(base)
    own = []
    for name, expert in experts.items():
        if is_tied(expert):
            _share(expert, [table for table in (embedding, head) if table], drops=tied)
        elif tied and (expert.has_own_head or word_tables(expert.entries)[1]):
            own.append(name)
    if not tied:
        return Heads(contradicts=bool(embedding and head and language_setting(base.config, SETTING)))
    return Heads(embedding or head, head if embedding else None, tuple(own))


def _share(expert: Checkpoint, wanted: list[str], *, drops: bool) -> None:
    """Let a tied expert have its one matrix under all wanted names, and under no other if the base is tied too."""
    tables = [table for table in word_tables(expert.entries) if table]
    for name in wanted:
        expert.entries.setdefault(name, expert.entries[tables[0]])
    for name in tables:
        if drops and wanted and name not in wanted:
            del expert.entries[name]


def is_tied(checkpoint: Checkpoint) -> bool:
    """Whether the output head is the embedding, as transformers takes it: both are one unless they differ in the files.

    Where ``config.json`` does not say so, files decide: a head that is not stored is the embedding.
    """
    if checkpoint.has_own_head:
        return False
    embedding, head = word_tables(checkpoint.entries)
    setting = language_setting(checkpoint.config, SETTING)
    if setting is False or not (embedding or head):
        return False
    if not (embedding and head):
        return setting is True or head is None
    first, second = checkpoint.entries[embedding], checkpoint.entries[head]
    return (
        first.is_float
        and (first.dtype, first.shape) == (second.dtype, second.shape)
        and same_tensor(checkpoint, embedding, checkpoint, head)
    )


def same_tensor(first: Checkpoint, first_name: str, second: Checkpoint, second_name: str) -> bool:
    """Whether two tensors of two checkpoints hold the same values, compared block by block."""
    import torch

    entry = first.entries[first_name]
    if entry.elements != second.entries[second_name].elements:
        return False
    return all(
        torch.equal(*(checkpoint.read(name, part.start, part.stop).float() for checkpoint, name in pairs))
        for pairs in [((first, first_name), (second, second_name))]
        for part in Part.whole(first_name, entry.shape).cut(_BLOCK)
    )
