"""The pages of the methods: what somebody wrote by hand, and below it what follows from the code.

``docs/methods/<method>.md`` holds a method's title, idea and formula. The sections below them (details, flags, command,
source) are made from its docstring and options. Pages of methods that the program does not have (yet) are left out.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from docs.tools.catalogue import DocumentedMethod, Flag

PAGES = Path(__file__).resolve().parent.parent
METHODS = PAGES / "methods"
# Notes on single flags that need more than a sentence, one file each; every method with the flag shows them.
FLAGS = PAGES / "flags"

# In the order in which they are shown: the name of a kind, and what its methods have in common.
KINDS = {
    "closed form": "A formula of the task vectors. Needs the checkpoints and nothing else.",
    "adapters": "A closed form of LoRA adapters, which merges their factors. Full models are refused.",
    "statistics": "A closed form that also needs statistics of the models on calibration samples.",
    "learned": "Coefficients that gradient descent learns on calibration samples.",
    "search": "Coefficients that a search without gradients finds by a score.",
    "mixture": "The result is not one dense model: it is a mixture of experts, or a model and masks.",
    "modifier": "Improves the result of another method; `--post NAME` adds it.",
}

# Where a page that lists the methods wants its tables.
TABLES = "<!-- tables of methods -->"

_FRONT_MATTER = re.compile(r"\A---\n(.*?\n)---\n", re.DOTALL)


@dataclass(frozen=True)
class Written:
    """What was written by hand about a method.

    Args:
        kind: one of `KINDS`.
        sources: where the method comes from, each a Markdown text.
        command: what the command needs besides the method and the checkpoints.
        text: title, idea and formula.
    """

    kind: str
    sources: tuple[str, ...]
    command: str
    text: str

    @property
    def title(self) -> str:
        """The page's first heading."""
        return self.text.lstrip().splitlines()[0].removeprefix("# ")


def read_written(page: str) -> Written:
    """What was written by hand for the page of that name.

    Raises:
        ValueError: there is no such page, or it lacks its kind, sources, idea or formula.
    """
    file = METHODS / f"{page}.md"
    if not file.is_file():
        raise ValueError(f"{file.relative_to(PAGES.parent)} is missing: write the idea and the formula of the method")
    text = file.read_text(encoding="utf-8")
    head = _FRONT_MATTER.match(text)
    fields: Mapping[str, Any] = yaml.safe_load(head[1]) if head else {}
    text = _FRONT_MATTER.sub("", text).strip()
    lacking = [name for name in ("kind", "sources") if not fields.get(name)]
    lacking += [title for title in ("Idea", "Formula") if f"\n## {title}\n" not in text]
    if lacking:
        raise ValueError(f"{file.relative_to(PAGES.parent)} lacks {', '.join(lacking)}")
    if fields["kind"] not in KINDS:
        raise ValueError(f"{file.name}: kind must be one of {', '.join(KINDS)}, got {fields['kind']!r}")
    return Written(fields["kind"], tuple(fields["sources"]), fields.get("command", ""), text)


def method_page(method: DocumentedMethod, written: Written) -> str:
    """The whole page of a method, as Markdown."""
    title, _, text = written.text.partition("\n")
    sections = [
        title,
        f"{method.summary}\n\n{_facts(method, written)}",
        text.strip(),
        _section("Details", method.details),
        _section("Flags", _flags(method.flags)),
        _section("Command", _command(method, written)),
        _section("Source", _sources(method, written)),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def tables(methods: Mapping[str, DocumentedMethod]) -> str:
    """A table of methods for every kind that has some.

    Args:
        methods: by the name of their page.
    """
    written = {page: read_written(page) for page in methods}
    parts = []
    for kind, meaning in KINDS.items():
        rows = [
            f"| [`{method.name}`]({page}.md) | {_uncited(method.summary)} | {_names(method)} |"
            for page, method in methods.items()
            if written[page].kind == kind
        ]
        if rows:
            table = "\n".join(["| method | what it does | own flags |", "|---|---|---|", *rows])
            parts.append(f"## {kind.capitalize()}\n\n{meaning}\n\n{table}")
    return "\n\n".join(parts)


def _uncited(summary: str) -> str:
    """The summary without its source, which the method's page has."""
    return _one_line(re.sub(r" \([^()]*arXiv[^()]*\)", "", summary))


def _names(method: DocumentedMethod) -> str:
    """The method's flags; of a method with very many, their number."""
    if len(method.flags) > 6:
        return f"{len(method.flags)} flags"
    return ", ".join(f"`--{flag.name}`" for flag in method.flags)


def _facts(method: DocumentedMethod, written: Written) -> str:
    names = ", ".join(f"`{name}`" for name in (method.name, *method.aliases))
    return f"**Name** {names} · **Kind** {written.kind}"


def _section(title: str, text: str) -> str:
    return f"## {title}\n\n{text}" if text else ""


def _flags(flags: tuple[Flag, ...]) -> str:
    if not flags:
        return "The method has no flags of its own."
    rows = [
        f"| `--{flag.name}` | {_one_line(flag.takes)} | {_one_line(flag.default)} | {_one_line(_sentence(flag.help))} |"
        for flag in flags
    ]
    table = "\n".join(["| flag | takes | default | meaning |", "|---|---|---|---|", *rows])
    return "\n\n".join([table, *_notes(flags)])


def _notes(flags: tuple[Flag, ...]) -> list[str]:
    files = {flag.name: FLAGS / f"{flag.name}.md" for flag in flags}
    return [
        f"### `--{name}`\n\n{file.read_text(encoding='utf-8').strip()}"
        for name, file in files.items()
        if file.is_file()
    ]


def _sentence(text: str) -> str:
    return text[0].upper() + text[1:]


def _one_line(text: str) -> str:
    return " ".join(text.split()).replace("|", r"\|")


def command_of(method: DocumentedMethod, written: Written) -> str:
    """A command that runs the method with its defaults."""
    chosen = "" if written.kind == "modifier" else f"--method {method.name} "
    return f"python Mistral/model_merging.py {chosen}{written.command} --cache_dir /data/ckpt".replace("  ", " ")


def _command(method: DocumentedMethod, written: Written) -> str:
    return f"```\n{command_of(method, written)}\n```"


def _sources(method: DocumentedMethod, written: Written) -> str:
    return "\n".join([*(f"- {source}" for source in written.sources), f"- Code: `{method.module}`"])
