"""The command that makes a run again, as others can type it: checkpoints by their names, no other paths."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping
from typing import Any

from expert_merging.card import checkpoint_name, is_shown
from expert_merging.checkpoints.folders import origin
from expert_merging.parser import LISTS, show


def command_of(description: Mapping[str, Any], changed: Mapping[str, Any]) -> str:
    """The command of a run.

    Args:
        description: its ``config.json``.
        changed: its options that are not the defaults.
    """
    options = description["options"]
    words = ["expert-merging", "merge", description["method"], "--family", description["family"]]
    words += ["--base_model_path", _source(options["base_model_path"])]
    for name, path in options["expert"].items():
        words += ["--expert", f"{name}={_source(path)}"]
    return shlex.join([*words, *_flags({**changed, "seed": description["seed"]})])


def _source(path: str) -> str:
    """A checkpoint's name, with the commit where it is of the Hub."""
    repository = origin(path)
    return "@".join(repository) if repository else checkpoint_name(path)


def _flags(options: Mapping[str, Any]) -> Iterator[str]:
    for name, value in options.items():
        if not is_shown(value) or (name == "seed" and value == 0):
            continue
        yield f"--{name}"
        if name in LISTS:
            yield from value or ["none"]
        elif value is not True:
            yield show(value)
