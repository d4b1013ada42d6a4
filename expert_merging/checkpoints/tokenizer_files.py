"""What a checkpoint's tokenizer files say, read as the data that they are: no tokenizer is loaded, and no code runs.

The numbers of tokens are in ``tokenizer.json``, else in ``vocab.json`` or ``vocab.txt``, else in ``tokenizer.model``.
Tokens that were added later are in other files too, and their numbers may follow those of the vocabulary.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from expert_merging import documents
from expert_merging.checkpoints.fingerprints import file_content
from expert_merging.checkpoints.folders import refuse_pointers
from expert_merging.errors import InputError

FAST, SETTINGS, ADDED = "tokenizer.json", "tokenizer_config.json", "added_tokens.json"
# Whatever a tokenizer may consist of.
FILES = (
    FAST,
    SETTINGS,
    ADDED,
    "special_tokens_map.json",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "tokenizer.model",
    "spiece.model",
    "tekken.json",
    "chat_template.jinja",
)


@dataclass(frozen=True)
class Vocabulary:
    """The tokens of one tokenizer.

    Args:
        tokens: number of every token.
        added: settings (``special``, ``lstrip``, ...) of the tokens that are no part of the tokenizer's own vocabulary.
        end: the token that ends a text; None where it is not said.
    """

    tokens: Mapping[str, int]
    added: Mapping[str, Mapping[str, Any]]
    end: str | None

    def by_number(self, count: int) -> list[str | None]:
        """The tokens of the numbers below ``count``, None where a number has none."""
        found: list[str | None] = [None] * count
        for token, number in self.tokens.items():
            if number < count:
                found[number] = token
        return found


def read_vocabularies(folders: Mapping[str, Path]) -> dict[str, Vocabulary | None]:
    """The vocabularies of checkpoints by name, None for those without; what is read of the same files is the same.

    Raises:
        InputError: a file is not what its name says.
    """
    known: dict[str, Vocabulary | None] = {}
    found = {}
    for name, folder in folders.items():
        key = _digest(folder)
        if key not in known:
            known[key] = _read_once(folder, key)
        found[name] = known[key]
    return found


@functools.lru_cache(maxsize=32)
def _read_once(folder: Path, _digest: str) -> Vocabulary | None:
    """The vocabulary of files of that digest, which is read for checks and for warnings."""
    return read_vocabulary(folder)


def tokenizer_files(folder: Path) -> list[str]:
    """Names of the folder's tokenizer files."""
    return [name for name in FILES if (folder / name).is_file()]


def _digest(folder: Path) -> str:
    digest = hashlib.sha256()
    for name in tokenizer_files(folder):
        digest.update(name.encode() + file_content(folder / name))
    return digest.hexdigest()


def read_vocabulary(folder: Path) -> Vocabulary | None:
    """The vocabulary of a checkpoint, None where no file has one that is known here.

    Raises:
        InputError: a file is not what its name says.
    """
    refuse_pointers(folder / name for name in FILES)
    fast = read_object(folder / FAST)
    own = _own_tokens(folder, fast)
    if own is None:
        return None
    settings = read_object(folder / SETTINGS)
    added = _added_tokens(folder, fast, settings)
    tokens = {**own, **{token: number for token, (number, _) in added.items()}}
    return Vocabulary(tokens, {token: said for token, (_, said) in added.items()}, _text(settings.get("eos_token")))


def read_object(file: Path) -> dict[str, Any]:
    """The JSON object of a file, empty where there is no such file.

    Raises:
        InputError: it holds something else.
    """
    return documents.read_object(file) if file.is_file() else {}


def _own_tokens(folder: Path, fast: Mapping[str, Any]) -> dict[str, int] | None:
    """Numbers of the tokens of the vocabulary proper."""
    if fast:
        model = fast.get("model")
        entries = model.get("vocab") if isinstance(model, dict) else None
        if isinstance(entries, list):  # of tokens with their scores
            entries = {entry[0]: number for number, entry in enumerate(entries) if isinstance(entry, list) and entry}
        return _checked(entries, folder / FAST)
    if (folder / "vocab.json").is_file():
        return _checked(read_object(folder / "vocab.json"), folder / "vocab.json")
    if (folder / "vocab.txt").is_file():
        text = documents.read_bytes(folder / "vocab.txt").decode("utf-8", errors="replace")
        lines = text.removesuffix("\n").split("\n")
        return {token: number for number, token in enumerate(lines)}
    if (folder / "tokenizer.model").is_file():
        return _sentence_pieces(documents.read_bytes(folder / "tokenizer.model"))
    return None


def _checked(entries: Any, file: Path) -> dict[str, int]:
    if not isinstance(entries, dict) or not all(type(number) is int and number >= 0 for number in entries.values()):
        raise InputError(f"{file} does not give tokens their numbers; download it again")
    return entries


def _added_tokens(
    folder: Path, fast: Mapping[str, Any], settings: Mapping[str, Any]
) -> dict[str, tuple[int, Mapping[str, Any]]]:
    """Numbers and settings of added tokens, from every file that has some."""
    found: dict[str, tuple[int, Mapping[str, Any]]] = {}
    listed = fast.get("added_tokens") or []
    described = settings.get("added_tokens_decoder") or {}
    try:
        for token, number in _checked(read_object(folder / ADDED), folder / ADDED).items():
            found[token] = (number, {})
        for number, said in described.items():
            found[said["content"]] = (int(number), said)
        for said in listed:
            found[said["content"]] = (int(said["id"]), {key: value for key, value in said.items() if key != "id"})
    except (TypeError, KeyError, ValueError, AttributeError):
        raise InputError(
            f"{folder} has added tokens without text or number ({FAST}, {SETTINGS}); download its tokenizer again"
        ) from None
    return found


def _text(token: Any) -> str | None:
    """A token, which files write as its text or with its settings."""
    return str(token["content"]) if isinstance(token, dict) and "content" in token else token


def _sentence_pieces(data: bytes) -> dict[str, int] | None:
    """Tokens of a sentencepiece model, None for a file of another kind.

    Its pieces are the first field of the message, in their order, and a piece's text is the first field of its own. See
    https://github.com/google/sentencepiece/blob/master/src/sentencepiece_model.proto.
    """
    try:
        pieces = [value for number, value in _fields(data) if number == 1]
        texts = [next(value for number, value in _fields(piece) if number == 1).decode() for piece in pieces]
    except (IndexError, ValueError, StopIteration):
        return None
    return {text: number for number, text in enumerate(texts)} or None


def _fields(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Numbers and values of the fields of a protocol buffer, of which only those with a length have their value.

    Raises:
        IndexError: it ends early.
        ValueError: it is none.
    """
    place = 0
    while place < len(data):
        key, place = _number(data, place)
        kind = key & 7
        if kind == 0:
            _, place = _number(data, place)
            continue
        if kind == 2:
            length, place = _number(data, place)
        elif kind in (1, 5):
            length = 8 if kind == 1 else 4
        else:
            raise ValueError("kind")
        if place + length > len(data):
            raise IndexError("end")
        yield key >> 3 if kind == 2 else 0, data[place : place + length]
        place += length


def _number(data: bytes, place: int) -> tuple[int, int]:
    """A number of variable length, and the place after it."""
    value = shift = 0
    while data[place] & 0x80:
        value |= (data[place] & 0x7F) << shift
        shift, place = shift + 7, place + 1
    return value | data[place] << shift, place + 1
