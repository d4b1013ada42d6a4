"""A page that shows runs side by side: one file, without anything from elsewhere, whatever names the runs have.

jinja escapes every text that it puts into the page, and `expert_merging.comparing.charts` those that plotly reads.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from expert_merging.comparing.charts import (
    Chart,
    coefficient_charts,
    importance_charts,
    learning_charts,
    over_time_charts,
    score_charts,
)
from expert_merging.comparing.finished import Answers, Finished, read_answers, read_runs
from expert_merging.comparing.scores_file import SetScore, mean_of
from expert_merging.errors import InputError
from expert_merging.writing import write_atomically

GENERATOR = "Expert Merging report"
TEMPLATE = "report.html"
# Questions shown of each task.
_QUESTIONS = 20
# Settings of a run that say how, not what, it computes.
_TOLD = ("output_path", "run_name")


@dataclass(frozen=True)
class ReportOptions:
    """What a report shows.

    Args:
        output: file of the page; an earlier report of that name is replaced.
        title: what stands above it.
        answers: questions with several models' answers, as evaluate --answers writes them.
    """

    output: str = "report.html"
    title: str = "Merged models side by side"
    answers: str | None = None


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


@dataclass(frozen=True)
class Section:
    """A part of the page."""

    name: str
    title: str
    about: str = ""
    scores: Sequence[ScoreTable] = ()
    charts: Sequence[Chart] = ()
    tables: Sequence[TextTable] = ()
    beside: bool = False


def report(folders: Sequence[Path], options: ReportOptions) -> Path:
    """Write a page about runs.

    Args:
        folders: of the runs.
        options: what it shows, and where it goes.

    Returns:
        The file.

    Raises:
        InputError: a folder is no run, a file cannot be read, plotly is missing, or the output is another file.
    """
    try:
        from plotly.offline import get_plotlyjs
    except ImportError:
        raise InputError("a report needs plotly, which draws its charts; pip install plotly") from None
    output = Path(options.output)
    _check_output(output)
    runs = read_runs(folders)
    answers = [] if options.answers is None else read_answers(Path(options.answers))
    sections = [section for section in _sections(runs, answers) if section.scores or section.charts or section.tables]
    charts = any(section.charts for section in sections)
    page = _render(
        title=options.title,
        generator=GENERATOR,
        sections=sections,
        runs=[_repeat(run) for run in runs],
        has_charts=charts,
        plotly=get_plotlyjs() if charts else "",
    )
    write_atomically(output, page.encode())
    return output


def _check_output(output: Path) -> None:
    """Check that a page can be written, and that nothing but an earlier report is replaced.

    Raises:
        InputError: it cannot.
    """
    if not output.parent.is_dir():
        raise InputError(f"--output {output}: there is no folder {output.parent}; make it first")
    if output.is_dir():
        raise InputError(f"--output {output} is a folder; name a file in it, such as {output / 'report.html'}")
    if output.exists():
        with output.open("rb") as stream:
            if GENERATOR.encode() not in stream.read(1000):
                raise InputError(f"--output {output} exists and is no report; name another file, or move it away")


def _render(**content: Any) -> str:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    return environment.get_template(TEMPLATE).render(content) + "\n"


def _sections(runs: Sequence[Finished], answers: Sequence[Answers]) -> list[Section]:
    over_time, tables = over_time_charts(runs), [_differing(runs)] if len(runs) > 1 else []
    return [
        *_score_sections(runs),
        _divergence_section(runs),
        Section("learning", "Learning", charts=learning_charts(runs)),
        Section("coefficients", "Coefficients", charts=[*coefficient_charts(runs), *over_time], beside=True),
        Section("importance", "Importance and chunks", charts=importance_charts(runs), beside=True),
        Section("answers", "Asked and answered", tables=[*_compared(answers), *_responses(runs)]),
        Section("settings", "Settings that differ", tables=[table for table in tables if table.rows]),
    ]


def _score_sections(runs: Sequence[Finished]) -> list[Section]:
    """A section for each set of scores, in the order of the runs."""
    names = dict.fromkeys(name for run in runs for name in run.scores.sets)
    sections = []
    for number, name in enumerate(names):
        own = {run.label: run.scores.sets[name] for run in runs if name in run.scores.sets}
        metric, better = next((one.metric, one.higher_is_better) for one in own.values())
        caption = f"{name}: {metric}, {'higher' if better else 'lower'} is better; 95 % intervals in small print"
        table = score_table(caption, own)
        charts = score_charts(number, name, own)
        sections.append(Section(f"scores-{number}", f"Scores: {name}", scores=[table], charts=charts))
    return sections


def score_table(caption: str, scores: Mapping[str, SetScore]) -> ScoreTable:
    """Runs by tasks and their mean, the best and the second best of each column marked.

    Args:
        caption: what it shows.
        scores: by run.
    """
    tasks = list(dict.fromkeys(task for one in scores.values() for task in one.tasks))
    better = next(iter(scores.values())).higher_is_better
    columns = [[one.tasks[task].mean if task in one.tasks else None for one in scores.values()] for task in tasks]
    intervals = [[_interval(one, task) for one in scores.values()] for task in tasks]
    columns.append([one.mean for one in scores.values()])
    intervals.append([""] * len(scores))
    return _table(caption, [*tasks, "mean"], list(scores), columns, intervals, better)


def _interval(scores: SetScore, task: str) -> str:
    score = scores.tasks.get(task)
    if score is None or score.low is None or score.high is None:
        return ""
    return f"{_number(score.low)} to {_number(score.high)}"


def _divergence_section(runs: Sequence[Finished]) -> Section:
    """Divergences of the runs for which they are known."""
    own = {run.label: run.scores.divergence for run in runs if run.scores.divergence}
    if not own:
        return Section("divergence", "Divergence")
    tasks = list(dict.fromkeys(task for shares in own.values() for task in shares))
    columns = [[shares.get(task) for shares in own.values()] for task in tasks]
    columns.append([mean_of(shares) for shares in own.values()])
    caption = "Divergence from each task's expert, as a share of the base's: lower is better"
    empty = [[""] * len(own) for _ in columns]
    table = _table(caption, [*tasks, "mean"], list(own), columns, empty, higher_is_better=False)
    return Section("divergence", "Divergence", scores=[table])


def _table(
    caption: str,
    names: Sequence[str],
    labels: Sequence[str],
    columns: Sequence[Sequence[float | None]],
    intervals: Sequence[Sequence[str]],
    higher_is_better: bool,
) -> ScoreTable:
    cells = [
        [
            Cell(value, _number(value), interval, rank)
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


def _compared(answers: Sequence[Answers]) -> list[TextTable]:
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


def _responses(runs: Sequence[Finished]) -> list[TextTable]:
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


def _differing(runs: Sequence[Finished]) -> TextTable:
    """Options in which runs differ; a run whose method has no such option has no value."""
    names = dict.fromkeys(name for run in runs for name in run.options)
    rows = []
    for name in names:
        values = [_shown(run.options[name]) if name in run.options else "-" for run in runs]
        if len(set(values)) > 1:
            rows.append([name, *values])
    caption = "Options whose values are not the same in all runs; - where a method has no such option"
    return TextTable(caption, ["option", *(run.label for run in runs)], rows)


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _repeat(run: Finished) -> dict[str, str]:
    """How a run is made again: a command, and the file of settings that it names."""
    record = run.record
    told = {name: value for name, value in record.get("run", {}).items() if name not in _TOLD}
    settings = {name: value for name, value in {**run.options, **told}.items() if value is not None}
    versions = ", ".join(f"{name} {version}" for name, version in record.get("versions", {}).items())
    revision = record.get("git_revision")
    return {
        "label": run.label,
        "command": f"python {record['family']}/model_merging.py --config run.yaml",
        "settings": yaml.safe_dump(settings, sort_keys=False, allow_unicode=True).strip(),
        "versions": f"Made with {versions}{f', revision {revision}' if revision else ''}." if versions else "",
    }
