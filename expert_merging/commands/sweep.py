"""Score many settings of merges without writing them, and write the best."""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from rich.console import Console

from expert_merging.commands.command import Command
from expert_merging.comparing.grid import label_of, points_of
from expert_merging.comparing.scores_file import Scores, SetScore, add_scores, mean_of
from expert_merging.console import say, table_of_numbers
from expert_merging.documents import parse_yaml, read_text, resolved
from expert_merging.errors import InputError, near_name, one_line
from expert_merging.families import TELLING, find_family, values_of
from expert_merging.flags import Count, Interval, read_options
from expert_merging.options import ROOT, read_config
from expert_merging.parser import add_flag, all_options, parse, single_value
from expert_merging.writing import NAME_BYTES, can_name_file

if TYPE_CHECKING:
    from rich.table import Table

    from expert_merging.backbone import Backbone
    from expert_merging.comparing.finished import Finished
    from expert_merging.comparing.sweep import Sweep
    from expert_merging.comparing.sweep_record import Scored
    from expert_merging.questions.labelled import Question

FOLDER = "sweeps"
_SHOWN = 20


@dataclass(frozen=True, kw_only=True)
class SweepOptions:
    """Options of ``python -m expert_merging sweep``, beside those of the family's own command.

    Args:
        family: model family, as its folder is called; by default that of the base, as merge finds it.
        sweep: an option and its values, OPTION=FIRST:LAST:STEP or OPTION=VALUE,VALUE; repeat for each. Every
            combination is a point.
        questions: folder of labelled questions, as evaluate takes it; accuracy on them is measured too.
        question_samples: questions of each task, from the beginning of its file; all by default.
        select: score that decides which point is best; by default accuracy where there are questions.
        halving: score all points on few samples first, keep the best of so many, and so on (successive halving); by
            default all points are scored on all samples.
        jobs: points that are scored at a time, in processes of their own; each GPU has as many of them as another. By
            default one.
        write: which merges are written in the end, as ordinary runs.
        report: file of a page that shows all points side by side, as the report command makes it of runs.
        sweep_name: name of the sweep's folder; by default the same for all points that can be compared, so that a sweep
            with more points goes on from the scores that are known.
    """

    sweep: Any
    family: str | None = None
    questions: str | None = None
    question_samples: Count | None = None
    select: Literal["divergence", "accuracy"] | None = None
    halving: Annotated[int, Interval("[2, inf)")] | None = None
    jobs: Count = 1
    write: Literal["best", "all", "none"] = "best"
    report: str | None = None
    sweep_name: str | None = None


OPTIONS = read_options(SweepOptions)
_TAKEN = {name: option for name, option in OPTIONS.items() if name != "sweep"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Give a parser the arguments."""
    parser.argument_default = argparse.SUPPRESS
    parser.usage = "%(prog)s [FILE.yaml] [--sweep OPTION=VALUES ...] [options below] [flags as of merge METHOD --help]"
    parser.add_argument("--sweep", action="append", metavar="OPTION=VALUES", help=OPTIONS["sweep"].help)
    for option in _TAKEN.values():
        add_flag(parser, option, option.default, takes_several=False)


def run(given: Mapping[str, Any], console: Console) -> None:
    """Score all points, show the best and write them."""
    own, merging, backbone = read(given)
    points = points_of(own.sweep)
    unknown = [name for point in points for name in point if name not in all_options(backbone)]
    if unknown:
        raise InputError(f"--sweep {unknown[0]}: no such option. {near_name(unknown[0], [*all_options(backbone)])}")
    if own.sweep_name is not None and not can_name_file(own.sweep_name):
        raise InputError(
            f"--sweep_name is the name of a folder, at most {NAME_BYTES} bytes long, got {own.sweep_name!r}"
        )
    questions = _questions(own, backbone)
    select = own.select or ("accuracy" if questions else "divergence")
    if select == "accuracy" and not questions:
        raise InputError("--select accuracy needs --questions FOLDER with labelled questions")
    if own.write == "all" and merging.get("run_name"):
        raise InputError("--write all writes several runs, which cannot have one --run_name; leave it out")
    from expert_merging.comparing.report import ReportOptions, check_report, write_page
    from expert_merging.comparing.sweep import Scoring, Sweep

    page = None if own.report is None else ReportOptions(own.report, f"{backbone.name}: points of a sweep")
    if page is not None:
        check_report(page, "--report")

    parent = Path(merging.get("output_path") or ROOT / "results" / "logs") / FOLDER
    sweep = Sweep(merging, points, backbone, Scoring(select, questions, own.halving), parent, own.sweep_name)
    if own.jobs > 1 and not sweep.first.resolved.general["keep_targets"]:
        raise InputError("--jobs needs what experts say to be kept, which all processes read; leave --keep_targets out")
    for one, other in sweep.same:
        say(console, f"{label_of(one)}: the same as {label_of(other)}")
    if merging.get("dry_run"):
        say(console, f"{len(sweep.planned)} points would be scored, in {sweep.folder}:")
        for planned in sweep.planned:
            say(console, label_of(planned.point))
        return
    scored, written = _score_and_write(sweep, own, console)
    if page is not None:
        say(console, str(write_page(_finished(sweep, scored, written, own), page)))


def _score_and_write(sweep: Sweep, own: SweepOptions, console: Console) -> tuple[list[Scored], dict[str, Path]]:
    """All points, best first, and the folders of the runs that were written, by the points' keys."""
    from expert_merging.comparing.sweep_run import run as run_sweep
    from expert_merging.console import Terminal

    terminal, select = Terminal(), sweep.scoring.select
    try:
        scored = run_sweep(sweep, terminal, own.jobs)
        console.print(_table(scored, select), soft_wrap=False)
        if len(scored) > _SHOWN:
            say(console, f"and {len(scored) - _SHOWN} more")
        say(console, f"all scores: {sweep.record.file}")
        usable = [one for one in scored if one.share == 1 and one.badness(select) < float("inf")]
        if not usable:
            reasons = [one.problem for one in scored if one.problem]
            raise InputError(f"no point has a score{f'; the first one: {reasons[0]}' if reasons else ''}")
        chosen = {"best": usable[:1], "all": usable, "none": []}[own.write]
        return scored, {one.key: _write(sweep, one, own, terminal) for one in chosen}
    finally:
        terminal.close()


def _finished(sweep: Sweep, scored: Sequence[Scored], written: Mapping[str, Path], own: SweepOptions) -> list[Finished]:
    """What a report shows of the points that were scored on all samples, in their order; more of those written."""
    from expert_merging.comparing.finished import Finished, read_runs

    complete = {one.key: one for one in scored if one.share == 1 and not one.problem}
    found = []
    for planned in sweep.planned:
        if planned.key in written:
            found.append(replace(*read_runs([written[planned.key]]), label=label_of(planned.point)))
        elif planned.key in complete:
            job, scores = planned.job, scores_of(sweep, complete[planned.key], own)
            found.append(Finished(label_of(planned.point), job.context.run, {**job.description, "run": {}}, scores))
    return found


def read(given: Mapping[str, Any]) -> tuple[SweepOptions, dict[str, Any], Backbone]:
    """The sweep's own options, those of the merges, and the family.

    Args:
        given: what was parsed; ``more`` begins with a file of options or has flags of the family's command.

    Raises:
        InputError: the file or a flag cannot be used, or no family is named.
    """
    more = list(given.get("more", ()))
    file = _read_file(Path(more.pop(0))) if more and not more[0].startswith("-") else {}
    flags = {name: single_value(OPTIONS, name, given[name]) for name in _TAKEN if name in given}
    if given.get("sweep"):
        flags["sweep"] = _named(given["sweep"])
    own = {name: file.pop(name) for name in OPTIONS if name in file} | flags
    told = {name: str(value) for name, value in {**file, **own}.items() if name in TELLING}
    backbone = find_family({**told, **values_of(more, TELLING)}, os.environ)
    known = all_options(backbone)
    config = file.pop("config", None)
    problems = [f"no option {name!r}. {near_name(name, [*known, *OPTIONS])}" for name in file if name not in known]
    if problems:
        raise InputError(*problems)
    parsed = parse(more, backbone)
    config = parsed.pop("config", config)
    merging = {**({} if config is None else read_config(Path(config), backbone)), **file, **parsed}
    values = {name: _TAKEN[name].convert(value) for name, value in own.items() if name in _TAKEN}
    return SweepOptions(**values, sweep=own.get("sweep", {})), merging, backbone


def _read_file(file: Path) -> dict[str, Any]:
    """Options by name, of the sweep and of the merges."""
    try:
        content = parse_yaml(read_text(file, advice="write options in YAML"))
    except ValueError as error:
        raise InputError(f"{file} is no YAML: {error}") from None
    if not isinstance(content, dict):
        raise InputError(
            f"{file} must hold options by name, such as 'family: Mistral', and 'sweep' with values by option"
        )
    return {str(name): value for name, value in content.items() if value is not None}


def _named(texts: Sequence[str]) -> dict[str, str]:
    """Values by option, of flags that each hold ``OPTION=VALUES``."""
    found: dict[str, str] = {}
    for text in texts:
        name, equals, values = text.partition("=")
        if not equals or not name or name in found:
            raise InputError(f"--sweep takes OPTION=VALUES, each option once, got {text!r}")
        found[name.replace("-", "_")] = values
    return found


def _questions(own: SweepOptions, backbone: Backbone) -> list[Question]:
    from expert_merging.questions.labelled import load_questions

    if own.questions is None:
        return []
    return load_questions(resolved(own.questions), experts=backbone.task_experts, count=own.question_samples)


def _write(sweep: Sweep, scored: Scored, own: SweepOptions, terminal: Any) -> Path:
    """Write a point's merge as the ordinary command does, and keep its scores with it; the folder of the run."""
    from expert_merging.checks import check
    from expert_merging.job import perform

    # Of options that all points share, some are other methods'.
    job = check(replace(sweep.resolved(scored.point), ignored=()), sweep.backbone, terminal)
    try:
        perform(job, terminal)
        add_scores(job.context.run.scores, scores_of(sweep, scored, own))
    finally:
        job.context.run.release()
    return job.context.run.folder


def scores_of(sweep: Sweep, scored: Scored, own: SweepOptions) -> Scores:
    """A point's scores as a run keeps them; they are of the very weights that are written."""
    from expert_merging.comparing.scoring import digests_of, set_score

    questions, sets = sweep.scoring.questions, dict[str, SetScore]()
    if own.questions is not None:
        sets[resolved(own.questions).name] = set_score(questions, scored.correct, digests_of(questions))
    return Scores(sets, scored.divergence)


def _table(scored: Sequence[Scored], select: str) -> Table:
    """The best points, with their mean scores."""
    title = f"The best of {len(scored)} points by {select} (divergence: 0 is the experts, 1 the base)"
    rows = []
    for one in scored[:_SHOWN]:
        numbers = [f"{mean_of(one.divergence):.4f}", f"{mean_of(one.accuracy):.1f}" if one.accuracy else ""]
        row = [one_line(one.problem), "", ""] if one.problem else [*numbers, f"{one.share:.3g}"]
        rows.append([label_of(one.point), *row])
    return table_of_numbers(title, ["divergence", "accuracy %", "share of samples"], rows)


COMMAND = Command(
    "sweep",
    "score many settings of merges without writing them, and write the best",
    run,
    add_arguments,
    "Every combination of the values is merged in memory and scored: by its distance from the experts on calibration "
    "samples (--data_dir, --samples_per_task ...), and by the questions that it answers rightly (--questions). Nothing "
    "is written but scores, and in the end the best merge as an ordinary run. All flags of the family's command are "
    "taken, and apply to every point. They can stand in a file: python -m expert_merging sweep sweep.yaml has the "
    "options by name, and under 'sweep' the values by option, or a list of such. The same command goes on where it "
    "stopped.",
    takes_more=True,
    continues=True,
)
