"""What the pages know of the methods; the only module here that asks the program for them."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from expert_merging.backbone import Backbone
from expert_merging.catalogue import all_methods
from expert_merging.flags import describe_type
from expert_merging.method import Method
from expert_merging.parser import show_default
from InternVL.backbone import BACKBONE as INTERNVL
from Mistral.backbone import BACKBONE as MISTRAL
from Qwen2VL.backbone import BACKBONE as QWEN2VL

FAMILIES: tuple[Backbone, ...] = (MISTRAL, INTERNVL, QWEN2VL)


@dataclass(frozen=True)
class Flag:
    """One flag of a method.

    Args:
        name: without the dashes.
        takes: what its value looks like.
        default: in words, with the families' own where they differ.
        help: one sentence.
    """

    name: str
    takes: str
    default: str
    help: str


@dataclass(frozen=True)
class DocumentedMethod:
    """What the program says of one method.

    Args:
        name: value of ``--method``.
        aliases: other values that mean the same, or the same with settings of their own.
        summary: first line of its docstring.
        details: the docstring's other paragraphs, without its sections.
        flags: its own flags.
        module: file of its source, relative to the repository.
    """

    name: str
    aliases: tuple[str, ...]
    summary: str
    details: str
    flags: tuple[Flag, ...]
    module: str


def documented_methods() -> dict[str, DocumentedMethod]:
    """Every method that the program has, by the name of its page."""
    return {page_name(method.name): _documented(method) for method in all_methods().values()}


def page_name(method: str) -> str:
    """Name of a method's page: a plus sign in an address is read as a space by some servers."""
    return method.replace("++", "_pp")


def _documented(method: Method) -> DocumentedMethod:
    summary, details = _paragraphs(method.described)
    return DocumentedMethod(
        name=method.name,
        aliases=method.names[1:],
        summary=summary,
        details=details,
        flags=tuple(_flag(method, name) for name in method.options),
        module=method.described.__module__.replace(".", "/") + ".py",
    )


def _paragraphs(function: Callable[..., Any]) -> tuple[str, str]:
    """First line of a docstring, and what follows it before its sections."""
    text = inspect.getdoc(function) or ""
    text = re.split(r"^(?:Args|Returns|Raises):$", text, maxsplit=1, flags=re.MULTILINE)[0]
    summary, _, details = text.partition("\n")
    return summary.strip(), details.strip()


def _flag(method: Method, name: str) -> Flag:
    option = method.options[name]
    shown = [show_default(name, method.defaults(family.defaults)[name]) for family in FAMILIES]
    # The first family's value is said first, the others' where they differ from it.
    others = [f"{family.name} {value}" for family, value in zip(FAMILIES, shown, strict=True) if value != shown[0]]
    default = f"{shown[0]} ({', '.join(others)})" if others else shown[0]
    return Flag(name, describe_type(option.annotation), default, option.help)
