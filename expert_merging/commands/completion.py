"""Completion of the command line by the shell, through argcomplete."""

from __future__ import annotations

import argparse
import itertools
import os
from collections.abc import Callable
from typing import Any, Literal, get_args, get_origin

from expert_merging.backbone import Backbone
from expert_merging.catalogue import all_methods
from expert_merging.commands.merge import help_parser
from expert_merging.families import family_names, general_family, load_family
from expert_merging.flags import Option
from expert_merging.method import Method
from expert_merging.parser import all_options


def complete(parser: Callable[[], argparse.ArgumentParser]) -> None:
    """Answer a shell that asks what may come next, and end; nothing where none asks.

    Args:
        parser: makes the parser of all commands.
    """
    if "_ARGCOMPLETE" not in os.environ:
        return
    import argcomplete

    words = os.environ.get("COMP_LINE", "").split()
    place = words.index("merge") if "merge" in words else None
    argcomplete.autocomplete(parser() if place is None else _merging(words[:place], words[place + 1 :]))


def _merging(before: list[str], words: list[str]) -> argparse.ArgumentParser:
    """The parser of a command line that merges.

    Args:
        before: the program, as it was typed.
        words: what was typed after ``merge``.
    """
    backbone, method = _family(words), _method(words)
    result = argparse.ArgumentParser(prog=" ".join(before))
    flags = help_parser(backbone, None if words[:1] and words[0].startswith("-") else method)
    kinds = result.add_subparsers()
    own = kinds.add_parser("merge", parents=[flags], add_help=False, conflict_handler="resolve")
    if method is not None and not words[0].startswith("-"):
        own.add_argument("name", choices=[method.name])
    options = all_options(backbone)
    for action in own._actions:  # argparse has no other way to them
        _suggest(action, options.get(action.dest))
    return result


def _family(words: list[str]) -> Backbone:
    """The family that was typed, or the general one."""
    typed = [after for word, after in itertools.pairwise(words) if word == "--family"]
    return load_family(typed[-1]) if typed and typed[-1] in family_names() else general_family()


def _method(words: list[str]) -> Method | None:
    """The method that was typed, once its name is complete."""
    named = [after for word, after in itertools.pairwise(words) if word == "--method"]
    first = words[:1] if words and not words[0].startswith("-") else []
    return next((all_methods()[name] for name in (*first, *named) if name in all_methods()), None)


def _suggest(action: argparse.Action, option: Option | None) -> None:
    """Say what an argument's value may be, where that is a list; paths are completed otherwise."""
    methods = all_methods().values()
    values: list[Any] = []
    if action.dest in ("name", "method"):
        values = [method.name for method in methods if not method.is_modifier]
    elif action.dest == "post":
        values = [method.name for method in methods if method.is_modifier]
    elif option is not None:
        kinds = (option.annotation, *get_args(option.annotation))
        values = [value for kind in kinds if get_origin(kind) is Literal for value in get_args(kind)]
    if values:
        action.completer = lambda **_: map(str, values)  # type: ignore[attr-defined]
