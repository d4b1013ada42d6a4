"""Entries of task files in the forms that people have: a question, an instruction, or a chat.

Nothing is known here of experts or of where pictures are; `expert_merging.questions.calibration` makes samples of what
is found.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from expert_merging.documents import parse_json, read_bytes
from expert_merging.errors import InputError, excerpt

# Questions may hold their pictures.
_LARGEST = 1 << 30
# Where a picture belongs in a question; without it, pictures come first.
MARK = "<image>"

_USER, _ASSISTANT, _SYSTEM = "user", "assistant", "system"
# Who speaks, by the words of OpenAI's, ShareGPT's and LLaVA's files.
_ROLES = {
    **dict.fromkeys(("user", "human"), _USER),
    **dict.fromkeys(("assistant", "gpt", "model"), _ASSISTANT),
    **dict.fromkeys(("system", "developer"), _SYSTEM),
}
_PICTURE_FIELDS = ("image_path", "image", "images")
# Names under which other formats have pictures.
_OTHER_PICTURE_FIELDS = {
    *("image", "images", "image_paths", "image_file", "image_files", "image_url", "img", "imgs", "img_path"),
    *("picture", "pictures", "photo", "photos"),
}


@dataclass(frozen=True)
class Exchange:
    """A question and what follows it, as an entry has them.

    Args:
        question: the question; pictures that do not come first have a `MARK` in it.
        response: the answer, None where there is none.
        pictures: what names or holds each picture, in the order of their places.
        left_out: what else the entry has and the prompt will not, in words.
    """

    question: Any
    response: Any
    pictures: tuple[Any, ...] = ()
    left_out: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Turn:
    """What one side says; a picture without a name of its own is None."""

    role: str
    text: Any
    pictures: tuple[Any, ...] = ()


def read_entries(file: Path) -> list[Any]:
    """The entries of a task file: a list in JSON, or one entry a line (JSON Lines), with or without a byte order mark.

    Raises:
        InputError: it is neither.
    """
    content = read_bytes(file, largest=_LARGEST)
    try:
        text = content.decode(json.detect_encoding(content))
    except UnicodeDecodeError as error:
        raise InputError(f"{file} is not valid JSON: {error}") from None
    in_lines = file.suffix.lower() == ".jsonl" and not text.lstrip().startswith("[")
    entries = _read_lines(file, text) if in_lines else _read_whole(file, text)
    if not isinstance(entries, list) or not entries:
        found = "an empty list" if entries == [] else excerpt(entries)
        raise InputError(
            f"{file} must hold a list of objects with a 'question' each, and has {found}; see dataset/README.md"
        )
    return entries


def _read_whole(file: Path, text: str) -> Any:
    try:
        return parse_json(text)
    except ValueError as error:
        if isinstance(error, json.JSONDecodeError) and error.msg == "Extra data":
            return _read_lines(file, text)
        raise InputError(f"{file} is not valid JSON: {error}") from None


def _read_lines(file: Path, text: str) -> list[Any]:
    entries = []
    for number, line in enumerate(text.split("\n"), 1):  # other ends of lines may stand in texts
        if line.strip():
            try:
                entries.append(parse_json(line))
            except ValueError as error:
                reason = error.msg if isinstance(error, json.JSONDecodeError) else error
                raise InputError(f"{file} is not valid JSON Lines: line {number}: {reason}") from None
    return entries


def read_exchange(entry: Any) -> Exchange:
    """The question of an entry, from ``question``, ``messages``, ``conversations`` or ``instruction``.

    A chat gives its first question and the answer to it, which need nothing said before; a question later in the chat
    would.

    Raises:
        InputError: it has none of these forms.
    """
    if not isinstance(entry, dict):
        raise InputError(f"must be an object with a 'question', got {excerpt(entry)}")
    _check_characters(entry)
    given = _given_pictures(entry)
    if "question" in entry:
        return Exchange(entry["question"], entry.get("response"), given)
    turns = _turns(entry)
    if turns is None:
        fields = excerpt(", ".join(map(str, entry)) or "none", quoted=False)
        raise InputError(f"'question' must be a text that is not empty, got null (its fields: {fields})")
    exchange = _first_exchange(turns, given)
    return replace(exchange, response=entry["response"]) if "response" in entry else exchange


def _check_characters(entry: Any) -> None:
    """Check that the entry's texts are texts: JSON can name halves of characters, which no tokenizer takes."""
    try:
        json.dumps(entry, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"has half a character ({error.object[error.start]!a}), which is no text; write the whole character, or "
            "leave it out"
        ) from None


def _given_pictures(entry: Mapping[str, Any]) -> tuple[Any, ...]:
    """Pictures that stand beside the text."""
    own = [name for name in _PICTURE_FIELDS if entry.get(name) not in (None, "", [])]
    others = [
        key
        for key, value in entry.items()
        if value and key.lower() in _OTHER_PICTURE_FIELDS and key not in _PICTURE_FIELDS
    ]
    if others and not own:
        raise InputError(
            f"has {others[0]!r}, and pictures are named by 'image_path'; rename it, or take it out if the question is "
            "to be asked without a picture"
        )
    if len(own) > 1 and own[0] != "image_path":
        raise InputError(f"has {own[0]!r} and {own[1]!r}; keep the one that names its pictures")
    if not own:
        if entry.get("image_path") in ("", []) and "image_path" in entry:
            raise InputError("'image_path' is empty; leave it out where there is no picture")
        return ()
    value = entry[own[0]]
    return tuple(value) if isinstance(value, list) else (value,)


def _turns(entry: Mapping[str, Any]) -> list[_Turn] | None:
    """What is said in the entry, one turn after the other; None where it is no chat and no instruction."""
    for name in ("messages", "conversations"):
        if name in entry:
            return list(_chat(name, entry[name]))
    if "instruction" not in entry:
        return None
    parts = [entry["instruction"], entry.get("input") or ""]
    for name, part in zip(("instruction", "input"), parts, strict=True):
        if not isinstance(part, str):
            raise InputError(f"{name!r} must be a text, got {excerpt(part)}")
    turns = [_Turn(_SYSTEM, entry["system"])] if entry.get("system") else []
    history = entry.get("history") or []
    for pair in history if isinstance(history, list) else [history]:
        if not isinstance(pair, list) or len(pair) != 2:
            raise InputError(f"'history' must be a list of questions with their answers, got {excerpt(pair)}")
        turns += [_Turn(_USER, pair[0]), _Turn(_ASSISTANT, pair[1])]
    return [*turns, _Turn(_USER, "\n".join(filter(None, parts))), _Turn(_ASSISTANT, entry.get("output"))]


def _chat(name: str, messages: Any) -> Iterator[_Turn]:
    if not isinstance(messages, list):
        raise InputError(f"{name!r} must be a list of turns, got {excerpt(messages)}")
    for message in messages:
        speaker = message.get("role", message.get("from")) if isinstance(message, dict) else None
        if not isinstance(speaker, str):
            raise InputError(
                f"{name!r} must have turns with 'role' and 'content', or 'from' and 'value', got {excerpt(message)}"
            )
        content = message.get("content", message.get("value"))
        text, pictures = _joined(content) if isinstance(content, list) else (content, ())
        yield _Turn(_ROLES.get(speaker.lower(), speaker), text, pictures)


def _joined(parts: Sequence[Any]) -> tuple[str, tuple[Any, ...]]:
    """Text and pictures of a content that is given in parts; pictures before all text need no mark."""
    text, pictures = "", []
    for part in parts:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind in ("text", "input_text") and isinstance(part.get("text"), str):
            text += part["text"]
        elif kind in ("image", "image_url", "input_image"):
            pictures.append(next((part[key] for key in ("image", "image_url", "url", "path") if part.get(key)), None))
            text += MARK if text else ""
        else:
            raise InputError(f"a content may have parts of the types 'text' and 'image', got {excerpt(part)}")
    return text, tuple(pictures)


def _first_exchange(turns: Sequence[_Turn], given: Sequence[Any]) -> Exchange:
    """The first question of a chat and the answer to it."""
    start = next((number for number, turn in enumerate(turns) if turn.role == _USER), None)
    if start is None:
        raise InputError("has no turn of the user, whose question would be asked")
    before, question, after = turns[:start], turns[start], turns[start + 1 :]
    odd = next((turn.role for turn in before if turn.role not in (_SYSTEM, _ASSISTANT)), None)
    if odd is not None:
        raise InputError(f"has a turn of {excerpt(odd)} before the user's; only 'system' may stand there")
    answer = after[0].text if after and after[0].role == _ASSISTANT else None
    left_out = {
        "a system message": any(turn.role == _SYSTEM for turn in before),
        "turns before the user's": any(turn.role == _ASSISTANT for turn in before),
        "turns after the first answer": any(turn.role == _USER for turn in after),
    }
    pictures = _pictures_of(question, turns, given)
    return Exchange(question.text, answer, pictures, tuple(words for words, is_so in left_out.items() if is_so))


def _pictures_of(question: _Turn, turns: Sequence[_Turn], given: Sequence[Any]) -> tuple[Any, ...]:
    """A question's own pictures; those that stand beside the chat belong to its places or marks in their order."""
    if question.pictures:
        beside = iter(given)
        own = tuple(next(beside, None) if picture is None else picture for picture in question.pictures)
        if None in own:
            raise InputError(f"has {len(own)} places for pictures and {len(given)} pictures beside them")
        return own
    marks = [turn.text.count(MARK) if isinstance(turn.text, str) else 0 for turn in turns]
    if sum(marks) == len(given):  # each has its place, perhaps in a later turn
        return tuple(given[: question.text.count(MARK)]) if isinstance(question.text, str) else ()
    return tuple(given)
