"""Which units a model of Llama-like blocks can have in another order without computing anything else.

=====================  ===================================================================================
units                  what moves with them
=====================  ===================================================================================
feed-forward units     rows of gate and up, columns of down
key-value groups       rows of k and v, and with each group its query heads
query heads            inside their group: rows of q, columns of o
value units            inside their head: rows of v, columns of o for every query head of the group
residual stream        columns of q, k, v, gate, up, embedding and head, rows of o and down, norms, and the rows in
                       which a projector writes pictures into it
=====================  ===================================================================================

Units of queries and keys stay where they are in their head: rotary embeddings turn each pair of them at a speed of its
own. Biases go with their rows.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from expert_merging.checkpoints.checkpoint import Checkpoint, Entry
from expert_merging.checkpoints.configurations import size_setting
from expert_merging.checkpoints.orders import Order
from expert_merging.errors import InputError, Problems, first_of
from expert_merging.roles import find_places, is_rotary_table, is_word_table

STREAM, HEADS, KEYS, VALUES, OUTPUTS, FEED = "stream", "heads", "keys", "values", "outputs", "feed"
INSIDE = "inside"  # of a head, the same for all of them
# Units of the rows and of the columns of a block's tensors.
ROWS = {
    "q": HEADS,
    "k": KEYS,
    "v": VALUES,
    "o": STREAM,
    "gate": FEED,
    "up": FEED,
    "down": STREAM,
    "norm": STREAM,
    "head_norm": INSIDE,
}
COLUMNS = {"q": STREAM, "k": STREAM, "v": STREAM, "o": OUTPUTS, "gate": STREAM, "up": STREAM, "down": FEED}
_HEADS = "num_attention_heads"
_MATRICES = [f"{kind}.weight" for kind in COLUMNS]
_NORM = re.compile(r"layers\.\d+\.\w*norm\.weight$")
_HEAD_NORM = re.compile(r"self_attn\.[qk]_norm\.weight$")
# Outside the blocks: what pictures go through before the residual stream, and where they come into it.
_BEFORE = re.compile(r"vision_model\.|mlp1\.[01]\.|visual\.(patch_embed|blocks|merger\.(ln_q|mlp\.0))\.")
_INTO = re.compile(r"mlp1\.3\.|visual\.merger\.mlp\.2\.")
_FINAL_NORM = re.compile(r"(.*\.)?model\.norm\.weight$")


@dataclass(frozen=True)
class Layout:
    """Where a model's units are.

    Args:
        hidden: width of the residual stream.
        heads: query heads of a block.
        groups: its key-value heads.
        width: units of a head.
        feed: feed-forward units of each block.
        blocks: of each block, names of its tensors by kind, such as ``q.weight``; norms are ``norm.`` and a number.
        outside: tensors outside the blocks that touch the residual stream: whether it runs along their rows.
        unknown: tensors outside the blocks of which that is not known; if there are any, the stream keeps its order.
    """

    hidden: int
    heads: int
    groups: int
    width: int
    feed: tuple[int, ...]
    blocks: tuple[Mapping[str, str], ...]
    outside: Mapping[str, bool]
    unknown: tuple[str, ...] = ()

    @property
    def moves_stream(self) -> bool:
        """Whether the residual stream may get another order."""
        return not self.unknown

    def shape(self, block: int, kind: str) -> tuple[int, ...]:
        """Shape that a block's tensor of a kind must have."""
        sizes = {
            STREAM: self.hidden,
            HEADS: self.heads * self.width,
            OUTPUTS: self.heads * self.width,
            KEYS: self.groups * self.width,
            VALUES: self.groups * self.width,
            FEED: self.feed[block],
            INSIDE: self.width,
        }
        role, _, last = kind.partition(".")
        return (sizes[ROWS[role]], sizes[COLUMNS[role]]) if last == "weight" else (sizes[ROWS[role]],)


@dataclass(frozen=True)
class BlockOrder:
    """Which of a block's units stands where, by number.

    Args:
        heads: ``(heads,)``; those of a group stay together.
        values: ``(groups * width,)``; those of a group stay together.
        feed: ``(feed-forward units,)``.
    """

    heads: Tensor
    values: Tensor
    feed: Tensor

    @classmethod
    def as_stored(cls, layout: Layout, block: int) -> BlockOrder:
        """The order that units have."""
        sizes = layout.heads, layout.groups * layout.width, layout.feed[block]
        return cls(*(torch.arange(size) for size in sizes))

    def keys(self, layout: Layout) -> Tensor:
        """Key-value heads ``(groups,)``: those that the query heads belong to."""
        return self.heads[:: layout.heads // layout.groups] // (layout.heads // layout.groups)

    def rows(self, layout: Layout) -> dict[str, Tensor]:
        """Numbers of rows or columns by what they are units of."""
        width, repeats = layout.width, layout.heads // layout.groups
        inside = torch.arange(width)
        values = (self.values.view(layout.groups, 1, width) % width).expand(-1, repeats, -1).reshape(-1, width)
        return {
            HEADS: (self.heads[:, None] * width + inside).flatten(),
            KEYS: (self.keys(layout)[:, None] * width + inside).flatten(),
            VALUES: self.values,
            OUTPUTS: (self.heads[:, None] * width + values).flatten(),
            FEED: self.feed,
        }


def find_layout(base: Checkpoint, published: Callable[[str], str]) -> Layout:
    """Find a model's units.

    Args:
        base: the model.
        published: published name of a tensor.

    Raises:
        InputError: its blocks are no Llama-like ones.
    """
    names = {name: published(name) for name in base.entries if not is_rotary_table(name)}
    places = find_places(list(names.values()))
    blocks: dict[int, dict[str, str]] = {}
    outside: dict[str, bool] = {}
    unknown, strange = list[str](), list[str]()
    for name, said in names.items():
        place = places[said]
        if place.depth is not None:
            block = blocks.setdefault(place.depth, {})
            kind = _kind(said, place.submodule, len(block))
            if kind:
                block[kind] = name
            else:
                strange.append(name)
        elif is_word_table(said) or _FINAL_NORM.match(said) or _INTO.match(said):
            outside[name] = not is_word_table(said)
        elif not _BEFORE.match(said):
            unknown.append(name)
    ordered = tuple(blocks[depth] for depth in sorted(blocks))
    lacking = [
        f"{kind} in layer {depth}" for depth in sorted(blocks) for kind in _MATRICES if kind not in blocks[depth]
    ]
    problems = [f"they have {first_of(strange, 1)}"] if strange else []
    problems += [f"they lack {first_of(lacking, 1)}"] if lacking or not blocks else []
    if problems:
        raise _refusal(base, " and ".join(problems))
    return _measured(base, ordered, outside, tuple(unknown))


def _kind(name: str, submodule: str, number: int) -> str:
    """What a block calls one of its tensors; empty for one that it has no place for."""
    last = name.rpartition(".")[2]
    if submodule in COLUMNS and last in ("weight", "bias"):
        return f"{submodule}.{last}"
    if _HEAD_NORM.search(name):
        return f"head_norm.{number}"
    return f"norm.{number}" if _NORM.search(name) else ""


def _refusal(base: Checkpoint, what: str) -> InputError:
    return InputError(
        f"--align_experts knows units of blocks as Llama, Mistral and Qwen2 have them (q, k, v, o, gate, up and down "
        f"with norms), and those of {base.folder} are others: {what}; leave it out"
    )


def _measured(
    base: Checkpoint, blocks: tuple[dict[str, str], ...], outside: Mapping[str, bool], unknown: tuple[str, ...]
) -> Layout:
    """The layout with the sizes that config.json and the tensors say.

    Raises:
        InputError: they contradict each other.
    """
    heads, first = size_setting(base.config, _HEADS) or 0, blocks[0]
    rows, hidden = _matrix(base, first["q.weight"])
    width = rows // heads if heads else 0
    groups = _matrix(base, first["k.weight"])[0] // width if width else 0
    feed = tuple(_matrix(base, block["gate.weight"])[0] for block in blocks)
    layout = Layout(hidden, heads, groups, width, feed, blocks, outside, unknown)
    wrong = [
        name
        for number, block in enumerate(blocks)
        for kind, name in block.items()
        if base.entries[name].shape != layout.shape(number, kind)
    ]
    wrong += [name for name, along in outside.items() if _stream_size(base.entries[name].shape, along) != hidden]
    if not groups or heads % groups or wrong:
        found = f", and {wrong[0]} is {list(base.entries[wrong[0]].shape)}" if wrong else ""
        raise _refusal(base, f"config.json says {heads} heads ({_HEADS}){found}")
    return layout


def _matrix(base: Checkpoint, name: str) -> tuple[int, int]:
    shape = base.entries[name].shape
    return (shape[0], shape[1]) if len(shape) == 2 else (0, 0)


def _stream_size(shape: tuple[int, ...], along_rows: bool) -> int:
    return shape[0 if along_rows else -1] if shape else 0


def check_expert(layout: Layout, base: Checkpoint, expert: Checkpoint, *, same_words: bool = False) -> None:
    """Check that an expert has the base's units.

    Args:
        layout: the base's.
        base: the base.
        expert: the expert, whose entries go by the base's names.
        same_words: both will run on the same tokens.

    Raises:
        InputError: every kind of problem found.
    """
    problems = Problems()
    own = size_setting(expert.config, _HEADS)
    if own != layout.heads:
        problems.add(f"its config.json says {own} heads ({_HEADS}), and the base's {layout.heads}")
    names = [name for block in layout.blocks for name in block.values()]
    missing = [name for name in names if name not in expert.entries]
    if missing:
        problems.add(f"it lacks {first_of(missing, 1)}")
    others = [
        name
        for name in (*names, *layout.outside)
        if name in expert.entries and not _is_alike(base.entries[name], expert.entries[name])
    ]
    if others:
        problems.add(f"{first_of(others, 1)} has another shape, or is no floating-point tensor")
    tables = [name for name in layout.outside if is_word_table(name) and name in expert.entries]
    if same_words and any(expert.entries[name].shape[:1] < base.entries[name].shape[:1] for name in tables):
        problems.add("it knows fewer words than the base, and activation_matching runs both on the same tokens")
    problems.check()


def _is_alike(base: Entry, expert: Entry) -> bool:
    """Whether two tensors can be compared; tables may have other words."""
    first, second = (entry.shape[1:] if is_word_table(entry.name) else entry.shape for entry in (base, expert))
    return first == second and base.is_float and expert.is_float


def tensor_orders(
    layout: Layout, blocks: Sequence[BlockOrder], stream: Tensor | None, expert: Checkpoint
) -> dict[str, Order]:
    """What the order of units makes of an expert's tensors, by name; those that stay as they are are left out.

    Args:
        layout: where the units are.
        blocks: their order in each block.
        stream: ``(hidden,)`` order of the residual stream; None where it is as stored.
        expert: the expert. What it lacks, and has of the base, is in the base's order.
    """
    found = {}
    for number, block in enumerate(layout.blocks):
        own = blocks[number].rows(layout) | ({} if stream is None else {STREAM: stream})
        for kind, name in block.items():
            rows, columns = (own.get(units.get(kind.split(".")[0], "")) for units in (ROWS, COLUMNS))
            found[name] = Order(rows, columns if kind.endswith("weight") else None)
    if stream is not None:
        heads = {name: False for name in expert.entries if is_word_table(name)}  # one that the base lacks too
        for name, along_rows in {**layout.outside, **heads}.items():
            found[name] = Order(stream, None) if along_rows else Order(None, stream)
    own_files = {*expert.files}
    return {
        name: order
        for name, order in ((name, _without_identity(order)) for name, order in found.items())
        if (order.rows is not None or order.columns is not None)
        and name in expert.entries
        and expert.entries[name].file in own_files
    }


def _without_identity(order: Order) -> Order:
    """The order without what leaves everything in its place."""
    kept = [None if way is None or is_identity(way) else way for way in (order.rows, order.columns)]
    return Order(*kept)


def is_identity(order: Tensor) -> bool:
    """Whether every unit is in its place."""
    return torch.equal(order, torch.arange(len(order)))
