"""A mixture in which one expert does all the work: that expert's model with the shared tensors of the mixture.

Routers see hidden states of the mixture, whose attention is merged, not those of the experts.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from expert_merging.context import Context
from expert_merging.merge import takes_blocks
from expert_merging.mixtures.tensors import FeedForward
from expert_merging.parts import Part
from expert_merging.plan import Rule
from expert_merging.roles import is_rotary_table
from expert_merging.stored import stored_tensors
from expert_merging.streaming import Reader, block_entries
from expert_merging.wholes import whole_shape


@torch.no_grad()
def share(model: Any, context: Context, rule: Rule, unit: str) -> None:
    """Give an expert's model all that a mixture's experts share: merged tensors, and the base's own.

    Args:
        model: the expert's model, which is changed.
        context: the run.
        rule: what merges.
        unit: what the rule is fed.
    """
    plan, file_name = context.plan, context.backbone.file_name
    parameters, stored = dict(model.named_parameters()), stored_tensors(model, file_name)
    reader = Reader(plan, torch.device(context.device))
    for name in plan.base.entries:
        # A head that is the embedding in memory has no place of its own there.
        if FeedForward.named(name) or is_rotary_table(name) or file_name(name) not in stored:
            continue
        (place,) = stored[file_name(name)]  # no such model has a tensor in several parameters
        target = parameters[place.parameter].detach().view(-1)[place.start : place.stop]
        merged = plan.merged_as(name)
        if merged is None:
            target.copy_(plan.base.read(name))
            continue
        for piece, values in _merged(reader, plan.part(merged), rule, unit):
            target[piece.start : piece.stop].copy_(values)


def _merged(reader: Reader, part: Part, rule: Rule, unit: str) -> Iterator[tuple[Part, Tensor]]:
    """The pieces of a merged tensor, in the base's type, as the driver would write them."""
    dtype = reader.plan.base.entries[part.name].torch_dtype
    with reader.streaming():
        if not takes_blocks(part, unit):
            base, task_vectors = reader.read(part)
            change = rule(task_vectors.view(-1, *whole_shape(part)), part, base.view(whole_shape(part)))
            yield part, base.add_(change.reshape(-1)).to(dtype)
            return
        length = block_entries(reader.device)
        for block in part.cut(part.whole_rows(length) if unit == "rows" else length):
            for piece, base, task_vectors in reader.steps(block, rows=unit == "rows"):
                yield piece, (base + rule(task_vectors, piece, base).reshape(-1)).to(dtype)
