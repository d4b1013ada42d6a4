"""What ``config.json`` says of a run: which of it decides the result, and how two of them differ."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

# Entries that decide the result; a folder is continued only by a run that agrees in all of them.
_DECISIVE = ("family", "method", "options", "checkpoints", "inputs")
# Options that say where checkpoints are; what they are is said by their fingerprints.
_PLACES = ("base_model_path", "expert")
# What every record has, and other files of that name have not.
KINDS = {"family": str, "method": str, "options": dict}
# Options that say how long a run learns: more of it begins as less of it does.
LENGTHS = ("num_epochs", "patience")


def digest_of_run(description: Mapping[str, Any]) -> str:
    """Eight digits that the same command always gets, so that it finds its own earlier part and continues it."""
    # Options in any order; but in an option's own value, and among the experts, the order decides.
    options = sorted(_decisive_options(description).items())
    checkpoints = list(description["checkpoints"].items())
    decisive = json.dumps([description["family"], description["method"], options, checkpoints])
    return hashlib.sha256(decisive.encode()).hexdigest()[:8]


def is_of_run(record: Mapping[str, Any]) -> bool:
    """Whether what has the right names has what a run's record has there."""
    return all(isinstance(record[name], kind) for name, kind in KINDS.items())


def method_in_words(record: Mapping[str, Any]) -> str:
    """The method and its modifiers, as the command line has them."""
    post = record["options"].get("post")
    return f"{record['method']} --post {' '.join(post)}" if post else str(record["method"])


def says_what_was_merged(record: Mapping[str, Any]) -> bool:
    """Whether a record has what other programs than the run's own need."""
    options = record["options"]
    return (
        isinstance(record.get("checkpoints"), Mapping)
        and isinstance(options.get("base_model_path"), str)
        and isinstance(options.get("expert"), Mapping)
        and all(isinstance(place, str) for place in options["expert"].values())
        and _is_list_of_texts(options.get("exclude_params"))
        and _is_list_of_texts(options.get("post") or [])
    )


def _is_list_of_texts(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(text, str) for text in value)


def differences(earlier: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What decides the result and differs between two records, in words."""
    differing = []
    earlier, now = ({**record, "options": _decisive_options(record)} for record in (earlier, now))
    for key in _DECISIVE:
        before, after = earlier.get(key), now[key]
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            for name in {**before, **after}:
                differing += _difference(name, before.get(name), after.get(name))
            if key == "checkpoints" and before == after:
                differing += _difference(key, before, after)
        else:
            differing += _difference(key, before, after)
    return differing


def _decisive_options(record: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in record["options"].items() if name not in _PLACES}


def _difference(name: str, before: Any, after: Any) -> list[str]:
    """How a value differs, if it does; the order of its entries counts, as that of experts and of patterns does."""
    if before != after:
        return [f"{name}: {_short(before)} there, {_short(after)} now"]
    if isinstance(before, Mapping) and list(before) != list(after):
        return [f"order of {name}: {', '.join(before)} there, {', '.join(after)} now"]
    return []


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."


def is_longer(earlier: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    """Whether a record is of a run that only learns longer than another one, as far as options and checkpoints say.

    Args:
        earlier: the other run's.
        now: the record; what is yet to be found out of its ``inputs`` is not compared.
    """
    lengths = [(earlier["options"].get(name), now["options"].get(name)) for name in LENGTHS]
    return (
        all(type(number) is int for pair in lengths for number in pair)
        and all(before <= after for before, after in lengths)
        and any(before < after for before, after in lengths)
        and not differences(of_same_length({**earlier, "inputs": now["inputs"]}, now), now)
    )


def of_same_length(earlier: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, Any]:
    """A record with the other one's options of how long to learn."""
    lengths = {name: now["options"][name] for name in LENGTHS if name in now["options"]}
    return {**earlier, "options": {**earlier["options"], **lengths}}
