"""One boundary for what transformers and its libraries raise while they read a user's folder."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from expert_merging.checkpoints.folders import required_object
from expert_merging.errors import InputError, Problems, first_line

# What loading a model reads beside its weights, and what loading tokenizer and processor reads beside that.
MODEL_FILES = ("config.json", "generation_config.json")
_FILES = (
    *MODEL_FILES,
    *("tokenizer_config.json", "tokenizer.json", "special_tokens_map.json", "added_tokens.json", "vocab.json"),
    *("preprocessor_config.json", "processor_config.json", "chat_template.json"),
)
# Parts of a model of which a list is made, one by one.
_COUNTED = re.compile(r"(^|_)(layers?|depths?|blocks|experts|heads|stages)$")
_MOST = 10_000
# Of which every model has some.
_SIZES = re.compile(r"hidden_size|intermediate_size|vocab_size|num_attention_heads|num_hidden_layers")
# What damaged files lead to in code that takes them to be whole.
_CONFUSED = (
    ImportError,
    OSError,
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    ArithmeticError,
    AssertionError,
    RecursionError,
)


@contextmanager
def reading(folder: Path, what: str) -> Iterator[None]:
    """Around everything that reads files of a folder with transformers.

    Args:
        folder: the folder.
        what: what is read, such as ``tokenizer``.

    Raises:
        InputError: it cannot be read; names the folder, and the file where that is known.
    """
    _check_counts(folder / "config.json")
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        from huggingface_hub.errors import StrictDataclassError

        # The tokenizers' library raises plain exceptions; others are this program's own mistakes.
        if not isinstance(error, (*_CONFUSED, StrictDataclassError)) and type(error) is not Exception:
            raise
        problems = damaged_files(folder) or _lacking_tokenizer(folder)
        said = " ".join(str(error).split()) if isinstance(error, StrictDataclassError) else first_line(error)
        is_told = isinstance(error, (ImportError, OSError, StrictDataclassError, ValueError))
        reason = said if is_told else f"{type(error).__name__}: {said}"
        raise InputError(*problems or [f"{folder} has no {what} that transformers reads: {reason}"]) from None


def _check_counts(file: Path) -> None:
    """Check that the model that a configuration describes can be made: its parts are counted before anything is.

    Raises:
        InputError: it has more of one kind than any model has, or none of what every model has.
    """
    for name, value in _settings(required_object(file)) if file.is_file() else ():
        if _COUNTED.search(name) and isinstance(value, int) and value > _MOST:
            raise InputError(f"{file} has {name} {value}, and no model has more than {_MOST}; download it again")
        if _SIZES.fullmatch(name) and isinstance(value, int) and value < 1:
            raise InputError(f"{file} has {name} {value}, and every model has at least 1; download it again")


def _settings(config: Any) -> Iterator[tuple[str, Any]]:
    """Names and values of settings at any depth; each entry of a list is a value."""
    for name, given in config.items():
        for value in given if isinstance(given, list) else [given]:
            yield name, value
            if isinstance(value, dict):
                yield from _settings(value)


def _lacking_tokenizer(folder: Path) -> list[str]:
    """What a folder without a tokenizer.json lacks, if it has no tokenizer or one that takes another library."""
    if any((folder / name).is_file() for name in ("tokenizer.json", "vocab.json", "vocab.txt")):
        return []
    if not (folder / "tokenizer.model").is_file():
        return [f"{folder} has no tokenizer: no tokenizer.json, tokenizer.model or vocab.json is there; download them"]
    if find_spec("sentencepiece") is None:
        return [
            f"{folder} has its tokenizer as tokenizer.model alone; to read it, pip install sentencepiece, or put the "
            "tokenizer.json of the same tokenizer beside it"
        ]
    return []


def damaged_files(folder: Path, names: Sequence[str] = _FILES) -> list[str]:
    """What is wrong with files that must hold a JSON object; a file that is not there is none.

    Args:
        folder: the folder.
        names: the files.
    """
    problems = Problems()
    for file in (folder / name for name in names):
        if file.is_file():
            with problems.collecting():
                required_object(file)
    return problems.found
