"""Vocabularies of base and experts: what the merged model does not know, and whether rows and numbers fit.

The merged model has the base's tokenizer, embeddings and head unless the user asks otherwise (`word_tables`). What an
expert has beyond them is lost without anybody noticing, so it is told.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from expert_merging.checkpoints.adapter import Adapter
from expert_merging.checkpoints.checkpoint import Checkpoint
from expert_merging.checkpoints.configurations import language_setting
from expert_merging.checkpoints.tokenizer_files import Vocabulary, read_object, read_vocabularies
from expert_merging.errors import InputError, first_of
from expert_merging.roles import has_row_per_word, word_tables

# So many tokens are named in a line.
SHOWN = 3
# A vocabulary that lacks a larger part of another one is none of the same tokenizer.
_OTHER = 0.1
# Endings of what config.json may call numbers of rows, as those with padding, or of another part's tables.
_SIZES = ("vocab_size", "embedding_size")


def row_count(checkpoint: Checkpoint) -> int | None:
    """Rows of the checkpoint's embeddings, or of its head where it has no others; None where it has neither."""
    embedding, head = word_tables(checkpoint.entries)
    shape = checkpoint.entries[name].shape if (name := embedding or head) else ()
    return shape[0] if shape else None


def check_size(owner: str, checkpoint: Checkpoint) -> None:
    """Check that a checkpoint has as many rows for tokens as its ``config.json`` says, without which nothing loads it.

    Raises:
        InputError: it has not.
    """
    said = language_setting(checkpoint.config, "vocab_size")
    others = {name: value for name, value in checkpoint.config.items() if name != "vocab_size"}
    allowed = {size for size in (said, *_sizes(others)) if isinstance(size, int)}
    for name, entry in checkpoint.entries.items():
        if isinstance(said, int) and has_row_per_word(name) and entry.shape and entry.shape[0] not in allowed:
            raise InputError(
                f"{owner}: {checkpoint.folder / 'config.json'} has vocab_size {said}, and {name} has "
                f"{entry.shape[0]} rows; the model cannot be loaded before vocab_size says so too"
            )


def _sizes(config: Mapping[str, Any]) -> Iterator[Any]:
    """Every number of rows that a file names, at any depth."""
    for name, value in config.items():
        if isinstance(value, Mapping):
            yield from _sizes(value)
        elif name.endswith(_SIZES):
            yield value


def lost_tokens(name: str, vocabulary: Vocabulary, merged: Vocabulary, *, is_base: bool) -> list[str]:
    """A line for tokens of a model that the merged model does not know, if there are any, and one for other numbers.

    Args:
        name: the model, such as ``expert Code``.
        vocabulary: its tokens.
        merged: the merged model's.
        is_base: they are the base's.
    """
    if vocabulary.tokens == merged.tokens:
        return []
    whose = "the base" if is_base else "the merged tokenizer"
    lacking = [token for token in vocabulary.tokens if token not in merged.tokens]
    lacking.sort(key=lambda token: vocabulary.tokens[token])
    if len(lacking) > _OTHER * len(vocabulary.tokens):
        return [
            f"{name} has another tokenizer: {whose} lacks {len(lacking)} of its {len(vocabulary.tokens)} tokens, and "
            "the merged model does not know them"
        ]
    lines = []
    if lacking:
        them = "it" if len(lacking) == 1 else "them"
        can_be_added = is_base and all(token in vocabulary.added for token in lacking)
        lines.append(
            f"{name} has {count_of(len(lacking), 'token')} that {whose} lacks ({first_of(lacking, SHOWN)}): the merged "
            f"model does not know {them}" + (f"; --tokenizer union adds {them}" if can_be_added else "")
        )
    moved = [token for token, number in vocabulary.tokens.items() if merged.tokens.get(token, number) != number]
    if moved and is_base:  # a tokenizer that is put together has its rows matched by token
        example = f"{moved[0]} is {vocabulary.tokens[moved[0]]} there and {merged.tokens[moved[0]]} here"
        lines.append(
            f"{name} numbers {count_of(len(moved), 'token')} otherwise than the base ({example}): the merged model "
            "goes by the base"
        )
    return lines


def vocabulary_warnings(
    base: Checkpoint,
    experts: Mapping[str, Checkpoint],
    merged: Vocabulary | None = None,
    *,
    ends_as_base: bool = True,
) -> list[str]:
    """A line for everything about tokens that an expert has and the merged model has not.

    Args:
        base: the base model.
        experts: the experts by name.
        merged: the merged model's tokens where they are not simply the base's.
        ends_as_base: the merged model's answers end with the base's tokens.
    """
    try:
        folders = {name: model.folder for name, model in {"base": base, **experts}.items()}
        vocabularies = read_vocabularies(folders)
        ends = other_ends(experts, base, vocabularies) if ends_as_base else []
    except InputError as error:
        return [f"vocabularies are not compared: {problem}" for problem in error.problems]
    known = merged or vocabularies["base"]
    lines = []
    for name, expert in experts.items():
        vocabulary = vocabularies[name]
        found = []
        if known is not None and vocabulary is not None:
            found = lost_tokens(f"expert {name}", vocabulary, known, is_base=merged is None)
        lines += found or (extra_rows(name, expert, vocabulary, base) if merged is None else [])
    if merged is not None and vocabularies["base"] is not None:
        lines += lost_tokens("the base", vocabularies["base"], merged, is_base=False)
    return lines + ends


def count_of(number: int, word: str) -> str:
    """A number of things in words."""
    return f"{number} {word}{'' if number == 1 else 's'}"


def extra_rows(name: str, expert: Checkpoint, vocabulary: Vocabulary | None, base: Checkpoint) -> list[str]:
    """A line where an expert's embeddings have other rows than the base's, and no token says why."""
    rows, usual = row_count(expert), row_count(base)
    if rows is None or usual is None or rows == usual:
        return []
    start = f"expert {name} has {rows} rows of embeddings and the base {usual}"
    if vocabulary is None:
        return [f"{start}, and no tokenizer that says what they are: what it has learned of more tokens is lost"]
    used = sum(number >= min(rows, usual) for number in vocabulary.tokens.values())
    if used:
        return [f"{start}: one of them has no rows for {count_of(used, 'token')}"]
    return [f"{start}, of which the others belong to no token (padding): nothing is lost"]


def other_ends(
    experts: Mapping[str, Checkpoint], base: Checkpoint, vocabularies: Mapping[str, Vocabulary | None]
) -> list[str]:
    """A line for every expert that ends its answers with a token that does not end the base's."""
    of_base, lines = vocabularies.get("base"), []
    for name, expert in experts.items():
        vocabulary = vocabularies.get(name)
        # Where only one of the two has a tokenizer, such as an adapter's base, it says what both numbers mean.
        usual = _ends(base, of_base or vocabulary)
        own = {vocabulary.end if vocabulary else None} - {None}
        if not isinstance(expert, Adapter):  # whose settings are the base's
            own |= _ends(expert, vocabulary or of_base)
        others = sorted(map(str, own - usual))
        if usual and others:
            lines.append(
                f"expert {name} ends its answers with {' or '.join(others)} and the base with "
                f"{' or '.join(sorted(usual))} (generation_config.json): the merged model stops where the base does"
            )
    return lines


def _ends(checkpoint: Checkpoint, vocabulary: Vocabulary | None) -> set[str]:
    """The tokens after which nothing more is generated."""
    file = checkpoint.folder / "generation_config.json"
    said = read_object(file).get("eos_token_id")
    numbers = said if said is not None else language_setting(checkpoint.config, "eos_token_id")
    names = {number: token for token, number in vocabulary.tokens.items()} if vocabulary else {}
    listed: Iterable[Any] = numbers if isinstance(numbers, list) else [numbers]
    return {names.get(number, f"token {number}") for number in listed if isinstance(number, int)}


def with_size(config: Mapping[str, Any], rows: int) -> dict[str, Any]:
    """``config.json`` with another ``vocab_size``, where it is said or else for the language model."""
    sections = [name for name in ("text_config", "llm_config") if isinstance(config.get(name), Mapping)]
    edited = {name: {**config[name]} if name in sections else value for name, value in config.items()}
    places = [edited, *(edited[name] for name in sections)]
    said = [place for place in places if "vocab_size" in place] or places[-1:]
    for place in said:
        place["vocab_size"] = rows
    return edited


def with_identifiers(config: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    """``config.json`` with the numbers of special tokens (``eos_token_id``, ...) of another one."""
    edited = {**config}
    for name, value in config.items():
        if isinstance(value, Mapping) and isinstance(other.get(name), Mapping):
            edited[name] = with_identifiers(value, other[name])
        elif name.endswith(("_token_id", "_token_index")) and name in other:
            edited[name] = other[name]
    return edited
