"""Tables of runs: for the terminal, as Markdown, CSV and JSON."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from expert_merging.card import cell, inline
from expert_merging.comparing.runs import COLUMNS, HEADINGS, Row, show_setting
from expert_merging.comparing.scores_file import SetScore, as_json
from expert_merging.errors import one_line
from expert_merging.machine import gib

if TYPE_CHECKING:
    from rich.table import Table

# What a person reads, and how it is shown; the other columns are in CSV and JSON.
_SHOWN: Mapping[str, tuple[str, Callable[[Any], str]]] = {
    "seconds": (HEADINGS["seconds"], lambda value: duration(value)),
    "peak_memory": (HEADINGS["peak_memory"], lambda value: gib(value)),
    "peak_gpu_memory": (HEADINGS["peak_gpu_memory"], lambda value: gib(value)),
    "relative_change": (HEADINGS["relative_change"], lambda value: f"{value:.3g}"),
    "divergence": ("divergence", lambda value: f"{value:.3g}"),
}


def duration(seconds: float) -> str:
    """Seconds in words."""
    if seconds < 100:
        return f"{seconds:.1f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min"


def terminal_table(rows: Sequence[Row]) -> Table:
    """The table for a terminal, in which what differs and names are folded where there is no room."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(header_style="bold", pad_edge=False, box=SIMPLE_HEAD)
    lines = _texts(rows)
    for name in lines[0]:
        justify: Literal["left", "right"] = "left" if name in _LEFT else "right"
        table.add_column(name, overflow="fold", justify=justify, no_wrap=name not in _CODE)
    for line in lines[1:]:
        table.add_row(*map(one_line, line))
    return table


def markdown_table(rows: Sequence[Row]) -> str:
    """The table in Markdown."""
    heads, *lines = _texts(rows)
    ruler = ["---" if head in _LEFT else "---:" for head in heads]
    shown = [[cell(text) if head in _CODE and text else inline(text) for head, text in zip(heads, line, strict=True)]
             for line in lines]  # fmt: skip
    return "".join(f"| {' | '.join(line)} |\n" for line in ([*map(inline, heads)], ruler, *shown))


def csv_table(rows: Sequence[Row]) -> str:
    """The table as CSV: a column for each option that differs, seconds, and bytes of memory."""
    options = dict.fromkeys(name for row in rows for name in row.differing)
    sets = _sets(rows)
    names = [*COLUMNS[:4], *(name for name in options if name not in (*COLUMNS, *sets)), *COLUMNS[4:], *sets]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(names)
    for row in rows:
        known = {**{name: _plain(value) for name, value in row.settings.items()}, **row.values}
        writer.writerow([known.get(name) for name in names])
    return text.getvalue()


def json_table(rows: Sequence[Row]) -> str:
    """The table as JSON: with all options, what differs, and every score."""
    found = [
        {
            **{name: row.values[name] for name in COLUMNS},
            "differing": dict(row.differing),
            "options": dict(row.record["options"]),
            **{name: value for name, value in as_json(row.scores).items() if name == "scores"},
        }
        for row in rows
    ]
    return json.dumps(found, indent=2, ensure_ascii=False) + "\n"


_LEFT = ("method", "what differs", "state", "run")
_CODE = ("what differs", "run")


def _texts(rows: Sequence[Row]) -> list[list[str]]:
    """Heads and lines of what a person reads; a column that no run has anything in is left out."""
    heads, lines = ["method", "what differs", "seed"], [_first(row) for row in rows]
    values = [row.values for row in rows]
    shown = {**_SHOWN, **{name: (name, _set_of(rows, name).show) for name in _sets(rows)}}
    for name, (head, show) in shown.items():
        if any(one.get(name) is not None for one in values):
            heads.append(head)
            for row, one, line in zip(rows, values, lines, strict=True):
                line.append("" if one.get(name) is None else _least(row, name) + show(one[name]))
    for row, line in zip(rows, lines, strict=True):
        line += [row.state, row.run.name]
    return [[*heads, "state", "run"], *lines]


def _first(row: Row) -> list[str]:
    settings = " ".join(show_setting(name, value) for name, value in row.differing.items())
    return [row.record["method"], settings, str(row.record.get("seed", ""))]


def _least(row: Row, name: str) -> str:
    """What stands before a number of which only a part is known: earlier parts of the run left none."""
    is_part = name in ("seconds", "peak_memory", "peak_gpu_memory") and row.outcome and row.outcome.continued
    return "≥ " if is_part else ""


def _sets(rows: Sequence[Row]) -> list[str]:
    """Names of the sets of scores that are columns, in the order in which they come."""
    return [*dict.fromkeys(name for row in rows for name in row.scores.sets if name not in COLUMNS)]


def _set_of(rows: Sequence[Row], name: str) -> SetScore:
    """A set of scores of that name, of the first run that has one."""
    return next(row.scores.sets[name] for row in rows if name in row.scores.sets)


def _plain(value: Any) -> Any:
    """An option's value in a cell."""
    return value if isinstance(value, str | int | float | None) else json.dumps(value)
