"""The tables of a report."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from expert_merging.comparing.finished import Answers, Finished
from expert_merging.comparing.scores_file import SetScore, mean_of

# Questions shown of each task.
_QUESTIONS = 20


@dataclass(frozen=True)
class Cell:
    """A number in a table.

    Args:
        value: the number, None where there is none.
        text: how it is shown.
        interval: its 95 % interval as text.
        rank: ``best`` or ``second``, if it is.
    """

    value: float | None
    text: str
    interval: str = ""
    rank: str = ""


@dataclass(frozen=True)
class Row:
    """A run's numbers."""

    label: str
    cells: Sequence[Cell]


@dataclass(frozen=True)
class ScoreTable:
    """Runs and their numbers."""

    caption: str
    columns: Sequence[str]
    rows: Sequence[Row]


@dataclass(frozen=True)
class TextTable:
    """Texts; the first column names the rows.

    Args:
        caption: what it shows.
        columns: names.
        rows: texts.
        folded: shown on demand.
    """

    caption: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    folded: bool = False


def score_table(caption: str, scores: Mapping[str, SetScore]) -> ScoreTable:
    """Runs by tasks and their mean, the best and the second best of each column marked.

    Args:
        caption: what it shows.
        scores: by run.
    """
    tasks = list(dict.fromkeys(task for one in scores.values() for task in one.tasks))
    first = next(iter(scores.values()))
    columns = [[one.tasks[task].mean if task in one.tasks else None for one in scores.values()] for task in tasks]
    intervals = [[_interval(one, task) for one in scores.values()] for task in tasks]
    columns.append([one.mean for one in scores.values()])
    intervals.append([""] * len(scores))
    show = partial(_score, first)
    return _table(caption, [*tasks, "mean"], list(scores), columns, intervals, first.higher_is_better, show)


def _interval(scores: SetScore, task: str) -> str:
    score = scores.tasks.get(task)
    if score is None or score.low is None or score.high is None:
        return ""
    return f"{_score(scores, score.low)} to {_score(scores, score.high)}"


def _score(scores: SetScore, value: float | None) -> str:
    """A score; small ones of a set of percentages have more digits."""
    if value is None or not math.isfinite(value) or scores.higher_is_better:
        return _number(value)
    return scores.show(value)


def divergence_tables(runs: Sequence[Finished]) -> list[ScoreTable]:
    """The table of divergences, of the runs for which they are known."""
    own = {run.label: run.scores.divergence for run in runs if run.scores.divergence}
    if not own:
        return []
    tasks = list(dict.fromkeys(task for shares in own.values() for task in shares))
    columns = [[shares.get(task) for shares in own.values()] for task in tasks]
    columns.append([mean_of(shares) for shares in own.values()])
    caption = "Divergence from each task's expert, as a share of the base's: lower is better"
    empty = [[""] * len(own) for _ in columns]
    return [_table(caption, [*tasks, "mean"], list(own), columns, empty, False, _number)]


def _table(
    caption: str,
    names: Sequence[str],
    labels: Sequence[str],
    columns: Sequence[Sequence[float | None]],
    intervals: Sequence[Sequence[str]],
    higher_is_better: bool,
    show: Callable[[float | None], str],
) -> ScoreTable:
    cells = [
        [
            Cell(value, show(value), interval, rank)
            for value, interval, rank in zip(column, own, ranks(column, higher_is_better), strict=True)
        ]
        for column, own in zip(columns, intervals, strict=True)
    ]
    rows = [Row(label, [column[place] for column in cells]) for place, label in enumerate(labels)]
    return ScoreTable(caption, names, rows)


def ranks(values: Sequence[float | None], higher_is_better: bool) -> list[str]:
    """Which values are best and second best, equal ones alike; none where there is nothing to compare."""
    known = {value for value in values if value is not None and math.isfinite(value)}
    if len([value for value in values if value in known]) < 2:
        return [""] * len(values)
    ordered = sorted(known, reverse=higher_is_better)
    names = dict(zip(ordered, ("best", "second"), strict=False))
    return [names.get(value, "") if value is not None else "" for value in values]


def _number(value: float | None) -> str:
    """Percentages with one digit after the point, as the paper has them, and small numbers with three."""
    if value is None or not math.isfinite(value):
        return "-"
    return f"{value:.1f}" if abs(value) >= 2 else f"{value:.3f}"


def answer_tables(answers: Sequence[Answers]) -> list[TextTable]:
    """Questions with the answers of several models side by side, a table for each task."""
    models = list(dict.fromkeys(model for one in answers for model in one.by_model))
    tables = []
    for task in dict.fromkeys(one.task for one in answers):
        own = [one for one in answers if one.task == task]
        rows = [
            [one.question, " | ".join(one.right), *(one.by_model.get(model, "") for model in models)]
            for one in own[:_QUESTIONS]
        ]
        tables.append(TextTable(_counted(f"{task}: answers of models", own), ["question", "right", *models], rows))
    return tables


def response_tables(runs: Sequence[Finished]) -> list[TextTable]:
    """What experts have answered, a table for each task, a column for each run whose experts were asked."""
    asked = {run.label: {(one.task, one.question): one.text for one in run.responses} for run in runs if run.responses}
    questions = list(dict.fromkeys(key for own in asked.values() for key in own))
    tables = []
    for task in dict.fromkeys(task for task, _ in questions):
        own = [key for key in questions if key[0] == task]
        rows = [[key[1], *(found.get(key, "") for found in asked.values())] for key in own[:_QUESTIONS]]
        caption = _counted(f"{task}: what its expert answered while the run was prepared", own)
        tables.append(TextTable(caption, ["question", *asked], rows, folded=True))
    return tables


def _counted(caption: str, questions: Sequence[object]) -> str:
    return caption if len(questions) <= _QUESTIONS else f"{caption} (the first {_QUESTIONS} of {len(questions)})"


def option_tables(runs: Sequence[Finished]) -> list[TextTable]:
    """Options in which runs differ, and those that only some of the methods have."""
    names = dict.fromkeys(name for run in runs for name in run.options)
    differing, partial = list[list[str]](), list[list[str]]()
    for name in names:
        values = [_shown(run.options[name]) for run in runs if name in run.options]
        row = [name, *(_shown(run.options[name]) if name in run.options else "-" for run in runs)]
        if len(set(values)) > 1:
            differing.append(row)
        elif len(values) < len(runs):
            partial.append(row)
    columns = ["option", *(run.label for run in runs)]
    tables = [
        TextTable("Options with different values; - where a method has no such option", columns, differing),
        TextTable("Options that only some of the methods have, with the same value", columns, partial, folded=True),
    ]
    return [table for table in tables if table.rows]


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
