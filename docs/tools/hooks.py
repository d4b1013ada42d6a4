"""What MkDocs calls while it builds the pages: methods' pages are completed, and formulas become MathML.

MathML is what browsers draw themselves, so the built pages need no network.
"""

from __future__ import annotations

import html
import re
from functools import cache
from typing import Any

from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import Files
from mkdocs.structure.pages import Page

from docs.tools.catalogue import DocumentedMethod, documented_methods
from docs.tools.methods import KINDS, TABLES, method_page, read_written, tables

_FORMULA = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL)


@cache
def _methods() -> dict[str, DocumentedMethod]:
    return documented_methods()


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Put the methods' pages into the navigation, by kind, where it says ``methods: ...``."""
    by_kind: dict[str, list[Any]] = {kind: [] for kind in KINDS}
    for page, method in _methods().items():
        by_kind[read_written(page).kind].append({method.name: f"methods/{page}.md"})
    groups = [{kind.capitalize(): pages} for kind, pages in by_kind.items() if pages]
    for entry in config.nav or []:
        if entry.get("Methods"):
            entry["Methods"] = ["methods/index.md", *groups]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:  # noqa: ARG001  (MkDocs gives arguments by name)
    """Leave out pages of methods that the program does not have."""
    known = {f"methods/{page}.md" for page in ("index", *_methods())}
    for file in list(files.documentation_pages()):
        if file.src_uri.startswith("methods/") and file.src_uri not in known:
            files.remove(file)
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:  # noqa: ARG001
    """Complete the pages of methods and their list."""
    folder, _, name = page.file.src_uri.removesuffix(".md").rpartition("/")
    if folder == "methods" and name in _methods():
        return method_page(_methods()[name], read_written(name))
    return markdown.replace(TABLES, tables(_methods())) if TABLES in markdown else markdown


def on_page_content(content: str, page: Page, config: MkDocsConfig, files: Files) -> str:  # noqa: ARG001
    """Turn formulas into MathML."""
    return _FORMULA.sub(_formula, content)


def _formula(match: re.Match[str]) -> str:
    drawn = convert(html.unescape(match[2]), display="block" if match[1] == "div" else "inline")
    if "\\" in drawn:  # a command that the converter does not know is passed on as it is
        raise PluginError(f"this formula cannot be drawn: {match[2].strip()}")
    return f'<div class="formula">{drawn}</div>' if match[1] == "div" else drawn
