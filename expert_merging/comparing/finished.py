"""What runs have left in their folders, read for a report. All of it is data: a name may be any text."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from expert_merging.comparing.scores_file import Scores, read_scores
from expert_merging.documents import read_json, read_object
from expert_merging.errors import InputError, Problems
from expert_merging.learned.figures import LAYERS
from expert_merging.learned.history import CURVES, OVER_TIME, OverTime, Row, load_curves, load_over_time
from expert_merging.learned.importance import Layer, load_layers
from expert_merging.run import Run
from expert_merging.search.front import FRONT, Point, load_front


class Response(NamedTuple):
    """What an expert has answered.

    Args:
        task: the task asked.
        question: what was asked.
        text: the answer.
    """

    task: str
    question: str
    text: str


@dataclass(frozen=True)
class Finished:
    """A run, whole or not.

    Args:
        label: what it is called.
        run: its folder.
        record: its ``config.json``.
        scores: what has been measured of it.
        layers: what it has learned by tensor; empty where it learns nothing.
        curves: numbers of its updates, those of an earlier stage first.
        over_time: its coefficients while it learned.
        responses: what its experts have answered.
        points: what it has evaluated, where it searched for trade-offs between tasks.
    """

    label: str
    run: Run
    record: dict[str, Any]
    scores: Scores
    layers: Sequence[Layer] = ()
    curves: Sequence[Row] = ()
    over_time: OverTime | None = None
    responses: Sequence[Response] = ()
    points: Sequence[Point] = ()

    @property
    def options(self) -> dict[str, Any]:
        """Its options as recorded, its method among them."""
        return {"method": self.record["method"], **self.record["options"]}

    def part(self, name: str) -> dict[str, Any]:
        """An object in its record, empty where there is none of that name."""
        found = self.record.get(name)
        return found if isinstance(found, dict) else {}


def read_runs(folders: Sequence[Path]) -> list[Finished]:
    """What runs have left.

    Args:
        folders: of the runs, or of their models.

    Raises:
        InputError: every folder that is no run, and every file that cannot be read.
    """
    problems, found = Problems(), list[Run]()
    for folder in folders:
        run = Run.found_at(folder) or Run(folder)
        if run.record is None:
            problems.add(f"{folder} is no folder of a run (it has no config.json that a run has written)")
        elif run.folder.resolve() not in [other.folder.resolve() for other in found]:
            found.append(run)
    titles = Counter(run.title for run in found)
    read = []
    for run in found:
        label = run.title if titles[run.title] == 1 else str(run.folder)
        with problems.collecting():
            read.append(_read(run, label))
    problems.check()
    return read


def _read(run: Run, label: str) -> Finished:
    analysis, stage = run.analysis, run.stage("stage1").analysis
    curves = [row for folder in (stage, analysis) if (folder / CURVES).exists() for row in load_curves(folder / CURVES)]
    return Finished(
        label,
        run,
        run.record or {},
        read_scores(run.scores),
        load_layers(analysis / LAYERS) if (analysis / LAYERS).exists() else (),
        curves,
        load_over_time(analysis / OVER_TIME) if (analysis / OVER_TIME).exists() else None,
        _responses(run.responses) if run.responses.exists() else (),
        load_front(analysis / FRONT) if (analysis / FRONT).exists() else (),
    )


def _responses(file: Path) -> list[Response]:
    """Answers by ``TASK/NUMBER/QUESTION``; beside them the file has what is no answer."""
    return [
        Response(*_asked(key), str(entry["response"]))
        for key, entry in read_object(file).items()
        if key.count("/") >= 2 and isinstance(entry, dict) and "response" in entry
    ]


def _asked(key: str) -> tuple[str, str]:
    task, _, question = key.split("/", 2)
    return task, question


@dataclass(frozen=True)
class Answers:
    """A question with the answers of several models.

    Args:
        task: the task asked.
        question: what was asked.
        right: answers that are right.
        by_model: what each model has answered.
    """

    task: str
    question: str
    right: Sequence[str]
    by_model: dict[str, str]


def read_answers(file: Path) -> list[Answers]:
    """Questions with the answers of several models, as ``evaluate --answers`` writes them.

    Raises:
        InputError: the file cannot be read, or is something else.
    """
    content = read_json(file)
    try:
        return [
            Answers(
                str(entry["task"]),
                str(entry["question"]),
                [str(text) for text in entry["right"]],
                {str(label): str(own["text"]) for label, own in entry["answers"].items()},
            )
            for entry in content
        ]
    except (KeyError, TypeError, AttributeError):
        raise InputError(f"{file} does not hold answers as evaluate --answers writes them") from None
