"""A table of runs: what they were asked, what they took, and how good they are, as far as it is known.

Nothing is computed here and no model is read: the rows are what runs have left beside their models.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from expert_merging.comparing.scores_file import Scores, mean_of, read_scores
from expert_merging.documents import parse_json, resolved
from expert_merging.errors import InputError, Problems, near_name
from expert_merging.flags import current_name
from expert_merging.outcome import Outcome, read_outcome
from expert_merging.run import Run

# Columns that every table has a name for, beside options and sets of scores.
COLUMNS = (
    *("run", "family", "method", "seed", "seconds", "peak_memory", "peak_gpu_memory"),
    *("divergence", "relative_change", "state", "started", "folder"),
)
# Of columns that tables call otherwise.
HEADINGS = {
    "seconds": "time",
    "peak_memory": "peak memory",
    "peak_gpu_memory": "peak GPU memory",
    "relative_change": "change",
}
# Digits of a digest that tell two inputs apart for a reader.
_DIGITS = 6
# Options that say where checkpoints are, and the name of a digest of what these are.
_PLACES, _CHECKPOINTS = ("base_model_path", "expert"), "checkpoints"


@dataclass(frozen=True)
class Row:
    """One run.

    Args:
        run: its folder.
        record: its ``config.json``.
        outcome: what it took; None where that was not recorded.
        scores: what has been measured of it.
        state: ``complete``, ``running``, or ``interrupted``.
        differing: its modifiers, and options and inputs that other runs of these and its method in the table have
            otherwise.
    """

    run: Run
    record: Mapping[str, Any]
    outcome: Outcome | None
    scores: Scores
    state: str
    differing: Mapping[str, Any] = field(default_factory=dict)

    @property
    def settings(self) -> dict[str, Any]:
        """Everything that decides the result, by name: options, and what was read, checkpoints by their names."""
        options, checkpoints = self.record["options"], json.dumps(self.record.get("checkpoints"))
        inputs = self.record.get("inputs")
        read = {name: _short_digest(value) for name, value in inputs.items()} if isinstance(inputs, Mapping) else {}
        paths = {name: _as_text(options[name]) for name in _PLACES if name in options}
        return {**read, **options, **paths, _CHECKPOINTS: hashlib.sha256(checkpoints.encode()).hexdigest()[:_DIGITS]}

    @property
    def values(self) -> dict[str, Any]:
        """The columns of the table, by name; None for what is not known.

        A set of scores that is called like another column has none.
        """
        outcome, divergence = self.outcome, self.scores.divergence
        known: dict[str, Any] = {
            "run": self.run.name,
            "family": self.record["family"],
            "method": self.record["method"],
            "seed": self.record.get("seed"),
            "seconds": outcome and outcome.seconds,
            "peak_memory": outcome and outcome.peak_memory,
            "peak_gpu_memory": outcome and outcome.peak_gpu_memory,
            "divergence": mean_of(divergence) if divergence else None,
            "relative_change": outcome and outcome.relative_change,
            "state": self.state,
            "started": self.record.get("started"),
            "folder": str(self.run.folder),
        }
        return {name: score.mean for name, score in self.scores.sets.items()} | known

    def value(self, name: str) -> Any:
        """A column, or an option; None where the run has none of that name."""
        values = self.values
        return values[name] if name in values else self.record["options"].get(name)


def find_runs(folders: Sequence[Path]) -> list[Row]:
    """The runs in folders, however deep, by method and what differs; each once.

    Args:
        folders: runs, or folders of any depth around them.

    Raises:
        InputError: a folder does not exist, there is no run in any, or the scores of one cannot be read.
    """
    problems, rows = Problems(), dict[Path, Row]()
    for folder in folders:
        if not folder.is_dir():
            problems.add(f"{folder} is no folder; runs are written to results/logs, or to their --output_path")
            continue
        for run, record in _runs_below(resolved(folder)):
            with problems.collecting():
                rows[run.folder] = _row(run, record)
    problems.check()
    if not rows:
        raise InputError(
            f"there is no run in {', '.join(map(str, folders))}; a run's folder has a config.json of its own"
        )
    return with_differences(rows.values())


def with_differences(rows: Iterable[Row]) -> list[Row]:
    """Rows by method and modifiers, and what differs among the rows of these, each with that and its modifiers."""
    by_steps: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        post = row.record["options"].get("post")
        by_steps.setdefault((row.record["method"], json.dumps(post) if post else ""), []).append(row)
    found: list[Row] = []
    for (_, post), own in sorted(by_steps.items()):
        names = [*(["post"] if post else []), *_differing([row.settings for row in own])]
        shown = [
            Row(
                row.run,
                row.record,
                row.outcome,
                row.scores,
                row.state,
                {name: row.settings.get(name) for name in names},
            )
            for row in own
        ]
        found += sorted(shown, key=lambda row: [*map(_place, row.differing.values()), _place(row.value("seed"))])
    return found


def chosen(rows: Sequence[Row], conditions: Sequence[str]) -> list[Row]:
    """The rows that meet all conditions.

    Args:
        rows: from `find_runs`.
        conditions: each ``NAME=VALUE``, of a column or an option.

    Raises:
        InputError: every condition that has no such form or name, or that no run meets.
    """
    problems, known = Problems(), _names(rows)
    for condition in conditions:
        name, equals, text = condition.partition("=")
        name = _meant(name)
        if not equals:
            problems.add(f"--where takes NAME=VALUE, such as method=ties, got {condition!r}")
        elif name not in known:
            problems.add(f"--where {condition}: no run has {name!r}. {near_name(name, known)}")
        elif rows and not (met := [row for row in rows if _is_value(row.value(name), text)]):
            values = sorted({_as_text(row.value(name)) for row in rows})
            problems.add(f"--where {condition}: no run has that; there are {', '.join(values[:8])}")
        else:
            rows = met
    problems.check()
    return with_differences(rows)


def ordered(rows: Sequence[Row], name: str, *, descending: bool) -> list[Row]:
    """The rows by a column or an option; those that have none come last.

    Raises:
        InputError: there is no such column.
    """
    name, known = _meant(name), _names(rows)
    if name not in known:
        raise InputError(f"--sort {name}: there is no such column or option. {near_name(name, known)}")
    having = [row for row in rows if row.value(name) is not None]
    having.sort(key=lambda row: _place(row.value(name)), reverse=descending)
    return [*having, *(row for row in rows if row.value(name) is None)]


def _runs_below(folder: Path) -> Iterator[tuple[Run, dict[str, Any]]]:
    """A folder's runs; what is in a run is not looked at."""
    for place, inside, _ in os.walk(folder):
        run = Run(Path(place))
        record = run.record
        inside[:] = [] if record else sorted(name for name in inside if not name.startswith("."))
        if record:
            yield run, record


def _row(run: Run, record: Mapping[str, Any]) -> Row:
    complete = run.model.is_dir()
    if not complete:
        run.holds_several = True
        complete = run.model.is_dir()
    state = "complete" if complete else "running" if run.is_held else "interrupted"
    return Row(run, record, read_outcome(run.outcome), read_scores(run.scores), state)


def _differing(settings: Sequence[Mapping[str, Any]]) -> list[str]:
    """Names of which not all have the same value, in the order in which they come."""
    names = dict.fromkeys(name for one in settings for name in one if name != "seed")
    found = [name for name in names if any(one.get(name) != settings[0].get(name) for one in settings)]
    return [name for name in found if name != _CHECKPOINTS or not {*_PLACES} & {*found}]


def _meant(name: str) -> str:
    """A column by its heading in the table, or an option by a name that it once had."""
    return next((column for column, heading in HEADINGS.items() if heading == name), current_name(name))


def _names(rows: Sequence[Row]) -> list[str]:
    """Names of columns and options of any row."""
    of_rows = (name for row in rows for name in (*row.values, *row.record["options"]))
    return [*dict.fromkeys((*COLUMNS, *of_rows))]


def _is_value(value: Any, text: str) -> bool:
    """Whether a text means a value: as it is, or as JSON."""
    if text == _as_text(value):
        return True
    try:
        meant = parse_json(text)
    except ValueError:
        return False
    return bool(meant == value) and isinstance(meant, bool) == isinstance(value, bool)


def _as_text(value: Any) -> str:
    """A value as a reader knows it: checkpoints by their names, without the folders around them."""
    if isinstance(value, str):
        return Path(value).name if os.path.isabs(value) else value
    if isinstance(value, Mapping):
        return json.dumps({name: _as_text(one) if isinstance(one, str) else one for name, one in value.items()})
    return "none" if value is None else json.dumps(value)


def _short_digest(digest: Any) -> Any:
    """The beginning of a digest; other inputs, such as versions, as they are."""
    is_digest = isinstance(digest, str) and len(digest) >= 32 and digest.isalnum()
    return digest[:_DIGITS] if is_digest else digest


def _place(value: Any) -> tuple[bool, float, str]:
    """Where a value comes in a list: numbers first, by size, then texts."""
    if isinstance(value, int | float):
        return False, float(value), ""
    return True, 0.0, _as_text(value)


def show_setting(name: str, value: Any) -> str:
    """An option and its value in a table."""
    return f"{name}={_as_text(value)}"
