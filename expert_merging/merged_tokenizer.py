"""The merged model's tokenizer, and whose rows its embeddings have: ``--tokenizer`` and ``--embeddings``.

In a union the base's tokens keep their numbers, and added tokens of experts follow. Tokens of an expert's vocabulary
proper cannot follow: text is cut into them by rules that two tokenizers do not share.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from expert_merging.checkpoints.checkpoint import Checkpoint
from expert_merging.checkpoints.other_files import check_inside
from expert_merging.checkpoints.tokenizer_files import (
    ADDED,
    FAST,
    SETTINGS,
    Vocabulary,
    read_object,
    read_vocabularies,
    tokenizer_files,
)
from expert_merging.checkpoints.vocabulary import SHOWN, count_of, row_count, with_identifiers
from expert_merging.errors import InputError, Problems, first_of, near_name
from expert_merging.plan import Plan
from expert_merging.roles import has_row_per_word
from expert_merging.word_tables import BASE, WordTables, table_of

if TYPE_CHECKING:
    from expert_merging.word_tables import Rows

UNION, MEAN = "union", "mean"
GENERATION = "generation_config.json"
# Rows are padded to a multiple of a power of two, of which nobody uses larger ones.
_LARGEST_MULTIPLE = 128
# What is said of an added token in files, unless something else is.
_PLAIN = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": False}


def is_wanted(general: Mapping[str, Any]) -> bool:
    """Whether embeddings and head are put together by token."""
    return general["tokenizer"] not in (None, BASE) or general["embeddings"] is not None


def choose_word_tables(plan: Plan, tokenizer: str, embeddings: str) -> WordTables:
    """The merged model's tokenizer, embeddings and head.

    Args:
        plan: the checkpoints.
        tokenizer: ``base``, ``union`` or an expert's name.
        embeddings: whose row a token has: ``base`` takes the base's where it has the token, an expert's name the
            expert's or else the base's, ``mean`` the mean of all models that have it. Where those do not have it, it is
            the mean of the experts that do.

    Raises:
        InputError: there is no such expert, or the vocabularies cannot be put together.
    """
    _check_names(plan, tokenizer, embeddings)
    models = plan.checkpoints
    needed = set(models) if tokenizer == UNION or embeddings == MEAN else {BASE, tokenizer, embeddings}
    if tokenizer == BASE:  # whose tokens all have rows in these
        models = {name: model for name, model in models.items() if name in needed}
    vocabularies = _vocabularies(models, needed)
    sizes = _row_counts({name: models[name] for name in vocabularies}, plan.base)
    owner = BASE if tokenizer == UNION or not _has_tokenizer(models[tokenizer]) else tokenizer
    merged, count = vocabularies[owner], sizes[owner]
    if tokenizer == UNION:
        merged = _union(vocabularies)
        count = _padded(sizes[BASE], vocabularies[BASE], merged)
    rows = choose_rows(merged.by_number(count), vocabularies, sizes, owner=owner, embeddings=embeddings)
    new = {token: number for token, number in merged.tokens.items() if token not in vocabularies[BASE].tokens}
    return WordTables(
        plan,
        merged,
        rows,
        beside=_extended(plan.base.folder, merged, new) if tokenizer == UNION else _files_of(models[owner], plan.base),
        identifiers=None if owner == BASE else plan.experts[owner].config,
        about=f"{_about_tokenizer(owner, tokenizer, new)} Embeddings and head have {count} rows, matched by token: "
        + _about_rows(embeddings),
    )


def _check_names(plan: Plan, tokenizer: str, embeddings: str) -> None:
    """Check that the flags name a model.

    Raises:
        InputError: they do not.
    """
    problems = Problems()
    for flag, value, word in (("tokenizer", tokenizer, UNION), ("embeddings", embeddings, MEAN)):
        known = [BASE, word, *plan.experts]
        if value not in known:
            problems.add(f"--{flag} takes {BASE}, {word} or an expert's name, got {value!r}. {near_name(value, known)}")
    problems.check()


def _has_tokenizer(model: Checkpoint) -> bool:
    """Whether the tokenizer is the model's own and not the base's, as that of most adapters is."""
    return read_vocabularies({"": model.folder})[""] is not None


def _vocabularies(models: Mapping[str, Checkpoint], needed: set[str]) -> dict[str, Vocabulary]:
    """The vocabularies of models that have one; an expert without tokenizer files may have the base's.

    Raises:
        InputError: one is not known that is needed.
    """
    found = read_vocabularies({name: model.folder for name, model in models.items()})
    rows, problems = row_count(models[BASE]), Problems()
    for name, vocabulary in found.items():
        if vocabulary is None and row_count(models[name]) == rows:
            found[name] = found[BASE]
        if found[name] is None and name in needed:
            problems.add(
                f"{models[name].folder} has no tokenizer that can be read (tokenizer.json, vocab.json, vocab.txt, or a "
                "tokenizer.model of sentencepiece), and --tokenizer and --embeddings go by tokens; put its files there"
            )
    problems.check()
    return {name: vocabulary for name, vocabulary in found.items() if vocabulary is not None}


def _row_counts(models: Mapping[str, Checkpoint], base: Checkpoint) -> dict[str, int]:
    """Rows of each model's embeddings and head.

    Raises:
        InputError: some do not fit the base's.
    """
    problems, counts = Problems(), {}
    for name, model in models.items():
        with problems.collecting():
            counts[name] = _checked_rows(model, base)
    problems.check()
    return counts


def _checked_rows(model: Checkpoint, base: Checkpoint) -> int:
    """Rows of a model's embeddings and head, which must fit the base's but for their number.

    Raises:
        InputError: they do not.
    """
    names = [name for name, entry in base.entries.items() if has_row_per_word(name) and entry.elements]
    if not names:
        raise InputError(
            f"{base.folder} has no embeddings or head that are known by name; leave out --tokenizer and --embeddings"
        )
    problems = Problems()
    counts = set()
    for name in names:
        with problems.collecting():
            table = table_of(model, name, base)
            entry, wanted = model.entries[table], base.entries[name].shape[1:]
            counts.add(entry.shape[0] if entry.shape else 0)
            if entry.shape[1:] != wanted or not entry.is_float:
                problems.add(
                    f"{model.folder}: rows of {table} are {list(entry.shape[1:])} of {entry.dtype}, and the base's "
                    f"{list(wanted)}; they cannot be put together"
                )
    if len(counts) > 1:
        problems.add(f"{model.folder}: embeddings and head have {' and '.join(map(str, sorted(counts)))} rows")
    problems.check()
    return counts.pop()


def _union(vocabularies: Mapping[str, Vocabulary]) -> Vocabulary:
    """The base's tokens, and the added ones of experts in their order.

    Raises:
        InputError: an expert has more than added tokens that the base lacks.
    """
    base = vocabularies[BASE]
    tokens, added, last = dict(base.tokens), dict(base.added), max(base.tokens.values())
    problems = Problems()
    for name, vocabulary in vocabularies.items():
        lacking = sorted((number, token) for token, number in vocabulary.tokens.items() if token not in tokens)
        own = [token for _, token in lacking if token not in vocabulary.added]
        if own:
            problems.add(
                f"expert {name} has another tokenizer than the base, with {count_of(len(own), 'token')} of its "
                f"vocabulary that the base lacks ({first_of(own, SHOWN)}); a union has added tokens alone, so choose "
                f"--tokenizer base or {name}"
            )
            continue
        for _, token in lacking:
            tokens[token], last = last + 1, last + 1
            added[token] = vocabulary.added[token]
    problems.check()
    return Vocabulary(tokens, added, base.end)


def _padded(rows: int, base: Vocabulary, merged: Vocabulary) -> int:
    """Rows for all tokens, padded as the base's are.

    Args:
        rows: the base's.
        base: its tokens.
        merged: all tokens.
    """
    used = max(base.tokens.values()) + 1
    wanted = max(rows, max(merged.tokens.values()) + 1)
    multiple = min(rows & -rows, _LARGEST_MULTIPLE) if rows > used else 1
    return -(-wanted // multiple) * multiple


def choose_rows(
    tokens: Sequence[str | None],
    vocabularies: Mapping[str, Vocabulary],
    sizes: Mapping[str, int],
    *,
    owner: str,
    embeddings: str,
) -> dict[str, Rows]:
    """For every model, its row for each row of the result, -1 where it does not take part.

    Args:
        tokens: token of each row, None for padding, which is the tokenizer's owner's (its last row where it has fewer).
        vocabularies: tokens by model, the base's among them.
        sizes: rows of each model; what is beyond belongs to no row.
        owner: whose tokenizer it is.
        embeddings: as for `choose_word_tables`.
    """
    import numpy

    rows = {}
    for name, vocabulary in vocabularies.items():
        found = numpy.array([vocabulary.tokens.get(token, -1) for token in tokens])  # type: ignore[arg-type]
        rows[name] = numpy.where(found < sizes[name], found, -1)
    if embeddings != MEAN:
        taken = numpy.zeros(len(tokens), dtype=bool)
        for name in dict.fromkeys((embeddings, BASE)):
            rows[name][taken] = -1
            taken |= rows[name] >= 0
        for name in vocabularies.keys() - {embeddings, BASE}:
            rows[name][taken] = -1
    nobody = numpy.flatnonzero(numpy.all([found < 0 for found in rows.values()], axis=0))
    rows[owner][nobody] = numpy.minimum(nobody, sizes[owner] - 1)
    return {name: found for name, found in rows.items() if (found >= 0).any()}


def _files_of(owner: Checkpoint, base: Checkpoint) -> dict[str, bytes | Path | None]:
    """The tokenizer's files of another model in place of the base's, and the numbers of its special tokens.

    Raises:
        InputError: they lie outside of the model's folder.
    """
    if owner is base:
        return {}
    check_inside(owner.folder, tokenizer_files(owner.folder))
    files: dict[str, bytes | Path | None] = dict.fromkeys(tokenizer_files(base.folder))
    files |= {name: owner.folder / name for name in tokenizer_files(owner.folder)}
    settings = read_object(base.folder / GENERATION)
    if settings:
        numbers = {**owner.config, **read_object(owner.folder / GENERATION)}
        files[GENERATION] = _json(with_identifiers(settings, numbers))
    return files


def _extended(folder: Path, merged: Vocabulary, new: Mapping[str, int]) -> dict[str, bytes | Path | None]:
    """The base's tokenizer files with further added tokens, in each place where such tokens are described."""
    if not new:
        return {}
    check_inside(folder, tokenizer_files(folder))
    said = {token: {**_PLAIN, **merged.added[token], "content": token} for token in new}
    files: dict[str, bytes | Path | None] = {}
    fast, settings, added = (read_object(folder / name) for name in (FAST, SETTINGS, ADDED))
    if fast:
        listed = [*(fast.get("added_tokens") or []), *({"id": new[token], **said[token]} for token in new)]
        files[FAST] = _json({**fast, "added_tokens": listed})
    if "added_tokens_decoder" in settings or not fast:
        described = {str(number): said[token] for token, number in new.items()}
        files[SETTINGS] = _json(
            {**settings, "added_tokens_decoder": {**(settings.get("added_tokens_decoder") or {}), **described}}
        )
    if added or not fast:
        files[ADDED] = _json({**added, **new})
    return files


def _json(content: Mapping[str, Any]) -> bytes:
    return (json.dumps(content, ensure_ascii=False, indent=2) + "\n").encode()


def _about_tokenizer(owner: str, tokenizer: str, new: Mapping[str, int]) -> str:
    if tokenizer != UNION:
        return f"The tokenizer is {'the base' if owner == BASE else f'expert {owner}'}'s."
    if not new:
        return "The tokenizer is the base's, which no expert has added tokens to."
    shown = first_of([f"{token} {number}" for token, number in new.items()], SHOWN)
    return f"The tokenizer is the base's with {count_of(len(new), 'token')} that experts have added ({shown})."


def _about_rows(embeddings: str) -> str:
    if embeddings == MEAN:
        return "the mean of all models that have the token."
    others = "of tokens that it lacks the mean of the experts'"
    if embeddings == BASE:
        return f"the base's, or {others}."
    return f"expert {embeddings}'s, or else the base's, or {others}."
