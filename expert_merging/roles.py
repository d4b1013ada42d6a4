"""What a tensor is for, by its name alone; the only place that knows names of architectures."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from expert_merging.parts import Part

SUBMODULES = ("q", "k", "v", "qkv", "o", "gate", "up", "gate_up", "down")
OTHER = "other"
STAGES = ("early", "middle", "late")
OUTSIDE = "outside"

# Each row of these matrices belongs to a word: they are no maps from one space into another.
_WORDS = r"((.*\.)?(embed_tokens|tok_embeddings|wte|lm_head)|(.*\.)?language_model\.output|output)"
_WORD_TABLE = re.compile(rf"{_WORDS}\.weight$")
# These tables and a head's bias, as a pattern of excluded parameters.
ROW_PER_WORD = rf"{_WORDS}\.(weight|bias)$"
_HEAD = re.compile(r"((.*\.)?lm_head|(.*\.)?language_model\.output|output)\.")
_PROJECTION = re.compile(rf"\b({'|'.join(SUBMODULES)})_proj\b")
# InternLM's names, of which Mixtral's experts have the last three; the first is q, k and v in one.
_NUMBERED = re.compile(r"\.(wqkv|wo|w1|w3|w2)\b")
_MEANT = {"wqkv": "qkv", "wo": "o", "w1": "gate", "w3": "up", "w2": "down"}
_DEPTH = re.compile(r"^(.*\blayers)\.(\d+)\.")
_VISION = re.compile(r"\bvis(ion|ual)")
# Of mixtures' layers: a row for each expert.
_ROUTER = re.compile(r"(.*\.)?(block_sparse_moe|mlp)\.gate\.weight$")
# Encoders of pictures have layers too.
_IN_DECODER = re.compile(r"(?<!encoder\.)\blayers\.\d+\.")
# Older checkpoints hold this table, which follows from config.json and is no parameter.
_ROTARY_TABLE = re.compile(r".*rotary_emb\.inv_freq$")


class Place(NamedTuple):
    """Where in a model a tensor lies.

    Args:
        submodule: one of `SUBMODULES`, or other.
        depth: number of its transformer layer; None outside the language model's layers.
        stage: third of the language model that it lies in, or outside.
    """

    submodule: str
    depth: int | None
    stage: str


def is_word_table(name: str) -> bool:
    """Whether the tensor is a table of embeddings or an output head."""
    return bool(_WORD_TABLE.match(name))


def is_matrix(part: Part) -> bool:
    """Whether the tensor is a map from one space into another: a matrix that has entries and is no table of words."""
    return len(part.shape) == 2 and part.elements > 0 and not is_word_table(part.name)


def is_router(name: str) -> bool:
    """Whether the tensor is the router of a mixture's layer, in files or in memory."""
    return bool(_ROUTER.match(name))


def is_rotary_table(name: str) -> bool:
    """Whether the tensor is a table of rotary frequencies."""
    return bool(_ROTARY_TABLE.match(name))


def is_in_decoder(name: str) -> bool:
    """Whether the tensor belongs to a layer of the language model."""
    return bool(_IN_DECODER.search(name))


def word_tables(names: Iterable[str]) -> tuple[str | None, str | None]:
    """The language model's table of embeddings and its output head; None for what is not there."""
    tables = [name for name in names if is_word_table(name)]
    heads = [name for name in tables if is_head(name)]
    return next((name for name in tables if name not in heads), None), next(iter(heads), None)


def has_row_per_word(name: str) -> bool:
    """Whether the tensor has a row, or an entry, for every word of the vocabulary."""
    return bool(re.match(ROW_PER_WORD, name))


def is_head(name: str) -> bool:
    """Whether the tensor belongs to an output head."""
    return bool(_HEAD.match(name))


def find_places(names: Sequence[str]) -> dict[str, Place]:
    """Submodule, depth and stage of each tensor.

    A stage is a third of the language model's layers. What lies outside them, the vision tower's own layers included,
    counts as other.
    """
    matches = {name: _DEPTH.match(name) for name in names}
    depths = {name: int(match[2]) for name, match in matches.items() if match and not _VISION.search(match[1])}
    count = max(depths.values(), default=0) + 1
    places = {}
    for name in names:
        if name in depths:
            places[name] = Place(_submodule(name), depths[name], STAGES[3 * depths[name] // count])
        else:
            places[name] = Place(OTHER, None, OUTSIDE)
    return places


def _submodule(name: str) -> str:
    """Which projection of a layer a tensor belongs to; several that are stored as one have a name of their own."""
    projection, numbered = _PROJECTION.search(name), _NUMBERED.search(name)
    if projection:
        return projection[1]
    return _MEANT[numbered[1]] if numbered else OTHER
