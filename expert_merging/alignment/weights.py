"""Units matched by weights: Git Re-Basin's weight matching (Ainsworth et al., 2023, arXiv 2209.04836, algorithm 1).

Looked for is the order ``P`` of an expert's units with the largest ``sum_t <A_t, P(B_t)>`` over all tensors of base and
expert, by coordinate ascent: with all other units in place, those of one kind in one block are a linear assignment
problem. Given the residual stream, heads and feed-forward units of all blocks are independent of one another, so the
ascent goes back and forth between the stream and all blocks. It ends when nothing gains.

Deviations: kinds of units are gone through in the order in which they depend on each other, the stream by the tables
of words first, instead of at random; a key-value group is matched with all that is inside of it, instead of step by
step; what is as good in its place stays there.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from expert_merging.alignment.matching import HeadSimilarity, match, match_heads
from expert_merging.alignment.units import COLUMNS, FEED, HEADS, KEYS, OUTPUTS, ROWS, STREAM, VALUES, BlockOrder, Layout
from expert_merging.checkpoints.checkpoint import Checkpoint
from expert_merging.errors import InputError
from expert_merging.parts import Part
from expert_merging.progress import Advance

# Rounds over all blocks; where the stream keeps its order, one is all.
ROUNDS = 20
# Entries of a table of words that are read at a time.
_BLOCK = 1 << 22


@dataclass(frozen=True)
class Pair:
    """Tensors of the base and of an expert side by side, in float32.

    Args:
        base: the base.
        expert: the expert, whose entries go by the base's names.
        device: where they are compared.
    """

    base: Checkpoint
    expert: Checkpoint
    device: torch.device

    def both(self, name: str) -> tuple[Tensor, Tensor]:
        """A tensor of both, ``(rows, columns)``; a vector is one column.

        Raises:
            InputError: NaN or infinite values.
        """
        first, second = (self._read(one, name) for one in (self.base, self.expert))
        return first, second

    def tables(self, name: str) -> Iterator[tuple[Tensor, Tensor]]:
        """Runs of rows that both have of a tensor outside the blocks, as `both` has them."""
        shapes = [one.entries[name].shape for one in (self.base, self.expert)]
        if len(shapes[0]) == 1:
            yield self.both(name)
            return
        width = shapes[0][1]
        common = Part.whole(name, (min(shape[0] for shape in shapes), width))
        for part in common.cut(max(1, _BLOCK // width) * width):
            first, second = (self._read(one, name, part).view(-1, width) for one in (self.base, self.expert))
            yield first, second

    def compares(self, name: str) -> bool:
        """Whether the expert has the tensor itself; of another's, it has no units."""
        return name in self.expert.entries and self.expert.entries[name].file in self.expert.files

    def _read(self, one: Checkpoint, name: str, part: Part | None = None) -> Tensor:
        shape = one.entries[name].shape
        bounds = (part.start, part.stop) if part else (0, None)
        values = one.read(name, *bounds).to(self.device).float()
        if not bool(values.sum().isfinite()) and not bool(values.isfinite().all()):
            who = "the base" if one is self.base else "the expert"
            raise InputError(f"{who} ({one.folder}) has NaN or infinite values in {name}")
        return values if part else values.view(shape[0], -1)


def match_by_weights(pair: Pair, layout: Layout, advance: Advance) -> tuple[list[BlockOrder], Tensor | None]:
    """The order of an expert's units that brings its weights nearest to the base's.

    Args:
        pair: base and expert.
        layout: where the units are.
        advance: told of each block that was matched.

    Returns:
        The order in each block, and of the residual stream; None where that keeps its order.
    """
    blocks = [BlockOrder.as_stored(layout, number) for number in range(len(layout.blocks))]
    if not layout.moves_stream:
        for number in range(len(blocks)):
            blocks[number] = _match_block(pair, layout, number, blocks[number], {})
            advance(1)
        return blocks, None
    outside = _outside_similarity(pair, layout)
    stream = match(outside)
    for _ in range(ROUNDS):
        similarity = outside.clone()
        for number, names in enumerate(layout.blocks):
            blocks[number] = _match_block(pair, layout, number, blocks[number], {STREAM: stream})
            similarity += block_similarity(pair, names, STREAM, blocks[number].rows(layout))
            advance(1)
        before, stream = stream, match(similarity, stream)
        if torch.equal(before, stream):
            break
    return blocks, stream


def _match_block(
    pair: Pair, layout: Layout, number: int, current: BlockOrder, known: Mapping[str, Tensor]
) -> BlockOrder:
    """The best order of a block's units, given the order of other units by their kind."""
    names, width = layout.blocks[number], layout.width
    heads = HeadSimilarity(
        keys=_by_head(block_similarity(pair, names, KEYS, known), width),
        queries=_by_head(block_similarity(pair, names, HEADS, known), width),
        values=block_similarity(pair, names, VALUES, known),
        outputs=block_similarity(pair, names, OUTPUTS, known),
    )
    order, values = match_heads(heads, layout, current)
    return BlockOrder(order, values, match(block_similarity(pair, names, FEED, known), current.feed))


def _by_head(similarity: Tensor, width: int) -> Tensor:
    """Sums over units that keep their place in the head: ``(heads, heads)`` of ``(heads * width, heads * width)``."""
    heads = len(similarity) // width
    return similarity.view(heads, width, heads, width).diagonal(dim1=1, dim2=3).sum(-1)


def block_similarity(pair: Pair, names: Mapping[str, str], units: str, known: Mapping[str, Tensor]) -> Tensor:
    """How alike units of one kind are in the weights of a block: sums of products of what belongs to them.

    Args:
        pair: base and expert.
        names: the block's tensors by kind.
        units: the kind of units.
        known: order of other kinds of units, in which the expert's are compared; as stored where it is not known.

    Returns:
        ``(units, units)`` of the base's units with the expert's.
    """
    found = torch.zeros((), device=pair.device)
    for kind, name in names.items():
        role, _, last = kind.partition(".")
        rows, columns = ROWS[role], COLUMNS.get(role) if last == "weight" else None
        if units in (rows, columns):
            first, second = pair.both(name)
            if units == columns:
                first, second = first.T, second.T
            other = known.get(str(rows if units == columns else columns))
            found = found + first @ (second if other is None else second[:, other.to(pair.device)]).T
    return found


def _outside_similarity(pair: Pair, layout: Layout) -> Tensor:
    """How alike units of the residual stream are in tensors outside the blocks, ``(hidden, hidden)``."""
    found = torch.zeros(layout.hidden, layout.hidden, device=pair.device)
    for name, along_rows in layout.outside.items():
        if pair.compares(name):
            for first, second in pair.tables(name):
                found += first @ second.T if along_rows else first.T @ second
    return found


def cosine(pair: Pair, layout: Layout) -> float:
    """Cosine of all matrices that have units, of the expert as it is read now with the base.

    Vectors are left out: norms are alike in any order.
    """
    sums = torch.zeros(3, dtype=torch.float64)
    names = [name for block in layout.blocks for name in block.values()]
    for name in (*names, *filter(pair.compares, layout.outside)):
        if len(pair.base.entries[name].shape) < 2:
            continue
        for first, second in pair.tables(name):
            products = torch.stack([(first * second).sum(), first.square().sum(), second.square().sum()])
            sums += products.double().cpu()
    return float(sums[0] / (sums[1] * sums[2]).sqrt().clamp(min=1e-30))
