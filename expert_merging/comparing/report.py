"""A page that shows runs side by side: one file, without anything from elsewhere, whatever names the runs have.

jinja escapes every text that it puts into the page, and `expert_merging.comparing.charts` those that plotly reads.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from expert_merging.comparing.charts import (
    Chart,
    coefficient_charts,
    front_charts,
    importance_charts,
    learning_charts,
    over_time_charts,
    score_charts,
)
from expert_merging.comparing.finished import Answers, Finished, read_answers, read_runs
from expert_merging.comparing.report_tables import (
    ScoreTable,
    TextTable,
    answer_tables,
    divergence_tables,
    option_tables,
    response_tables,
    score_table,
)
from expert_merging.comparing.scores_file import Scores, read_models
from expert_merging.documents import resolved
from expert_merging.errors import InputError
from expert_merging.writing import check_file, write_atomically

GENERATOR = "Expert Merging report"
TEMPLATE = "report.html"
# Settings of a run that say how, not what, it computes.
_TOLD = ("output_path", "run_name")


@dataclass(frozen=True)
class ReportOptions:
    """What a report shows.

    Args:
        output: file of the page; an earlier report of that name is replaced.
        title: what stands above it.
        answers: questions with several models' answers, as evaluate --answers writes them.
        scores: files with scores of models that no run has made, such as base and experts, as evaluate --json writes
            them.
    """

    output: str = "report.html"
    title: str = "Merged models side by side"
    answers: str | None = None
    scores: Sequence[str] = ()


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
    check_report(options)
    return write_page(read_runs(folders), options)


def check_report(options: ReportOptions, flag: str = "--output") -> None:
    """Check that a page can be written, and that nothing but an earlier report is replaced.

    Args:
        options: what the page shows.
        flag: says where it goes.

    Raises:
        InputError: plotly is missing, or the output is another file.
    """
    try:
        import plotly  # noqa: F401
    except ImportError:
        raise InputError("a report needs plotly, which draws its charts; pip install plotly") from None
    output = Path(options.output)
    check_file(output, flag)
    if output.exists():
        with output.open("rb") as stream:
            if GENERATOR.encode() not in stream.read(1000):
                raise InputError(f"{flag} {output} exists and is no report; name another file, or move it away")


def write_page(runs: Sequence[Finished], options: ReportOptions) -> Path:
    """Write a page about runs that were read, after `check_report`.

    Raises:
        InputError: a file of answers or scores cannot be read.
    """
    from plotly.offline import get_plotlyjs

    answers = [] if options.answers is None else read_answers(Path(options.answers))
    others = _others(options.scores, runs)
    sections = [one for one in _sections(runs, others, answers) if one.scores or one.charts or one.tables]
    charts = any(section.charts for section in sections)
    page = _render(
        title=options.title,
        generator=GENERATOR,
        sections=sections,
        runs=[repeat(run) for run in runs],
        has_charts=charts,
        has_scores=any(section.scores for section in sections),
        plotly=get_plotlyjs() if charts else "",
    )
    output = Path(options.output)
    write_atomically(output, page.encode())
    return output


def _others(files: Sequence[str], runs: Sequence[Finished]) -> dict[str, Scores]:
    """What has been measured of models other than the runs', by label."""
    own, found = {resolved(run.run.model) for run in runs}, dict[str, Scores]()
    for file in files:
        for label, (folder, scores) in read_models(Path(file)).items():
            if resolved(folder) in own:
                continue
            if label in found:
                raise InputError(f"--scores {file}: another file has scores of a model called {label}, too; rename one")
            found[label] = scores
    return found


def _render(**content: Any) -> str:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    return environment.get_template(TEMPLATE).render(content) + "\n"


def _sections(runs: Sequence[Finished], others: Mapping[str, Scores], answers: Sequence[Answers]) -> list[Section]:
    over_time = over_time_charts(runs)
    return [
        *_score_sections({**others, **{run.label: run.scores for run in runs}}),
        Section("divergence", "Divergence", scores=divergence_tables(runs)),
        Section("trade-offs", "Trade-offs found", charts=front_charts(runs)),
        Section("learning", "Learning", charts=learning_charts(runs)),
        Section("coefficients", "Coefficients", charts=[*coefficient_charts(runs), *over_time], beside=True),
        Section("importance", "Importance and chunks", charts=importance_charts(runs), beside=True),
        Section("answers", "Asked and answered", tables=[*answer_tables(answers), *response_tables(runs)]),
        Section("settings", "Settings that differ", tables=option_tables(runs)),
    ]


def _score_sections(scores: Mapping[str, Scores]) -> list[Section]:
    """A section for each set of scores, in the order of the models, with what was measured of each."""
    names = dict.fromkeys(name for one in scores.values() for name in one.sets)
    sections = []
    for number, name in enumerate(names):
        own = {label: one.sets[name] for label, one in scores.items() if name in one.sets}
        metric, better = next((one.metric, one.higher_is_better) for one in own.values())
        caption = f"{name}: {metric}, {'higher' if better else 'lower'} is better; 95 % intervals in small print"
        table = score_table(caption, own)
        charts = score_charts(number, name, own)
        sections.append(Section(f"scores-{number}", f"Scores: {name}", scores=[table], charts=charts))
    return sections


def repeat(run: Finished) -> dict[str, str]:
    """How a run is made again: a command, and the file of settings that it names."""
    told = {name: value for name, value in run.part("run").items() if name not in _TOLD}
    settings = {name: value for name, value in {**run.options, **told}.items() if value is not None}
    versions = ", ".join(f"{name} {version}" for name, version in run.part("versions").items())
    revision = run.record.get("git_revision")
    program = shlex.quote(f"{run.record['family']}/model_merging.py")
    written = yaml.safe_dump(settings, sort_keys=False, allow_unicode=True)
    return {
        "label": run.label,
        "command": f"python {program} --config run.yaml",
        "settings": written.strip(),
        "versions": f"Made with {versions}{f', revision {revision}' if revision else ''}." if versions else "",
    }
