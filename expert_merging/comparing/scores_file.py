"""``RUN/scores.json``: what has been measured of a run's model, kept beside it for tables, reports and cards.

``{"format": 1, "scores": {SET: {"metric", "higher_is_better", "mean", "tasks": {TASK: {"mean", "low", "high", "count",
"correct", "questions"}}}}, "divergence": {"mean", "tasks": {TASK: SHARE}}}``. A set is a folder of questions or a
public benchmark. Any part may be missing, but for a task's mean.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from expert_merging.documents import read_object
from expert_merging.errors import InputError
from expert_merging.writing import write_atomically

FORMAT = 1
_ADVICE = "move it away, and measure again"


@dataclass(frozen=True)
class TaskScore:
    """What a model reaches on a task.

    Args:
        mean: the number.
        low: lower end of its 95 % interval; None where it is not known.
        high: upper end.
        count: how many questions it is the mean of; None where it is not known.
        correct: points of each question in [0, 1], in the order of the questions; empty where they are not known.
        questions: digest of the questions and their answers; two models are compared question by question only where
            they have the same one.
    """

    mean: float
    low: float | None = None
    high: float | None = None
    count: int | None = None
    correct: tuple[float, ...] = ()
    questions: str = ""


@dataclass(frozen=True)
class SetScore:
    """What a model reaches on a set of tasks.

    Args:
        tasks: by task.
        metric: what is measured.
        higher_is_better: whether a larger number is.
        own_mean: the set's mean where a benchmark has a rule of its own for it.
    """

    tasks: Mapping[str, TaskScore]
    metric: str = "exact_match"
    higher_is_better: bool = True
    own_mean: float | None = None

    @property
    def mean(self) -> float:
        """The mean over tasks, or by the set's own rule; NaN of no tasks."""
        if self.own_mean is not None:
            return self.own_mean
        return mean_of({task: score.mean for task, score in self.tasks.items()})

    def show(self, value: float) -> str:
        """A number of the set in a table: percentages with one digit after the point, as the paper has them.

        Numbers of which the lower is better are no percentages and may be small.
        """
        return f"{value:.1f}" if self.higher_is_better else f"{value:.4g}"


@dataclass(frozen=True)
class Scores:
    """All that has been measured of a model.

    Args:
        sets: scores by name of the set.
        divergence: from each task's expert, as a share of the base's, by task.
    """

    sets: Mapping[str, SetScore] = field(default_factory=dict)
    divergence: Mapping[str, float] = field(default_factory=dict)


def mean_of(by_task: Mapping[str, float]) -> float:
    """Mean over tasks, each counted once; NaN of none."""
    return sum(by_task.values()) / len(by_task) if by_task else math.nan


def read_scores(file: Path) -> Scores:
    """What has been measured; nothing where there is no file.

    Raises:
        InputError: the file cannot be read, or is something else.
    """
    if not file.exists():
        return Scores()
    return _scores(read_object(file, advice=_ADVICE), file)


def read_models(file: Path) -> dict[str, tuple[str, Scores]]:
    """Folder of several models and what has been measured of them, by label, as ``evaluate --json`` writes it.

    Raises:
        InputError: the file cannot be read, or is something else.
    """
    models = read_object(file, advice=_ADVICE).get("models")
    if not isinstance(models, dict) or not all(isinstance(one, dict) and "format" in one for one in models.values()):
        raise InputError(f"{file} does not hold scores of models as evaluate --json writes them; {_ADVICE}")
    return {label: (str(one.get("folder", "")), _scores(one, file)) for label, one in models.items()}


def _scores(content: Mapping[str, Any], file: Path) -> Scores:
    """What a file says of a model."""
    if content.get("format") != FORMAT:
        raise InputError(f"{file} has format {content.get('format')!r}, and this version reads {FORMAT}; {_ADVICE}")
    try:
        sets = {str(name): _set(entry) for name, entry in content.get("scores", {}).items()}
        divergence = content.get("divergence", {}).get("tasks", {})
        return Scores(sets, {str(task): _number(share) for task, share in divergence.items()})
    except (ValueError, TypeError, KeyError, AttributeError):
        raise InputError(f"{file} does not hold scores; {_ADVICE}") from None


def add_scores(file: Path, new: Scores) -> dict[str, list[str]]:
    """Add what has been measured; sets of the same name, and divergences if there are new ones, are replaced.

    But a task keeps an earlier score by the same metric that is known to be of more questions.

    Returns:
        The tasks that keep one, by set.

    Raises:
        InputError: the file that is there cannot be read.
    """
    earlier = read_scores(file)
    kept = {name: _of_more_questions(earlier.sets[name], one) for name, one in new.sets.items() if name in earlier.sets}
    sets = {name: _with_tasks(one, kept.get(name) or {}) for name, one in new.sets.items()}
    scores = Scores({**earlier.sets, **sets}, new.divergence or earlier.divergence)
    write_atomically(file, (json.dumps(as_json(scores), indent=2, ensure_ascii=False) + "\n").encode())
    return {name: list(tasks) for name, tasks in kept.items() if tasks}


def _of_more_questions(earlier: SetScore, new: SetScore) -> dict[str, TaskScore]:
    """Earlier scores that are of more questions than new ones of the same tasks, as far as that is known."""
    if earlier.metric != new.metric:
        return {}
    both = {task: (earlier.tasks[task], one) for task, one in new.tasks.items() if task in earlier.tasks}
    return {task: old for task, (old, one) in both.items() if one.count is not None and (old.count or 0) > one.count}


def _with_tasks(new: SetScore, kept: Mapping[str, TaskScore]) -> SetScore:
    """A set with other scores of some tasks, in the order of its tasks; a mean of its own is one of its own tasks."""
    return replace(new, tasks={**new.tasks, **kept}, own_mean=None) if kept else new


def as_json(scores: Scores) -> dict[str, Any]:
    """The content of the file."""
    content: dict[str, Any] = {"format": FORMAT}
    if scores.sets:
        content["scores"] = {
            name: {
                "metric": one.metric,
                "higher_is_better": one.higher_is_better,
                "tasks": {task: _task_json(score) for task, score in one.tasks.items()},
                "mean": one.mean,
            }
            for name, one in scores.sets.items()
        }
    if scores.divergence:
        content["divergence"] = {"tasks": dict(scores.divergence), "mean": mean_of(scores.divergence)}
    return content


def _task_json(score: TaskScore) -> dict[str, Any]:
    """A task's score without what is not known."""
    entry: dict[str, Any] = {"mean": score.mean, "low": score.low, "high": score.high, "count": score.count}
    entry |= {"correct": [int(one) if one in (0, 1) else one for one in score.correct] or None}
    entry |= {"questions": score.questions or None}
    return {name: value for name, value in entry.items() if value is not None}


def _set(entry: Mapping[str, Any]) -> SetScore:
    tasks = {str(name): _task(one) for name, one in entry.get("tasks", {}).items()}
    metric, higher = entry.get("metric", SetScore.metric), entry.get("higher_is_better", True)
    return SetScore(tasks, str(metric), bool(higher), None if entry.get("mean") is None else _number(entry["mean"]))


def _task(entry: Mapping[str, Any]) -> TaskScore:
    low, high = (None if entry.get(end) is None else _number(entry[end]) for end in ("low", "high"))
    count, correct = entry.get("count"), tuple(map(finite, entry.get("correct", ())))
    return TaskScore(
        _number(entry["mean"]),
        low,
        high,
        None if count is None else int(finite(count)),
        correct,
        str(entry.get("questions", "")),
    )


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(value)
    return float(value)


def finite(value: Any) -> float:
    """A finite number of a file in JSON.

    Raises:
        ValueError: it is something else.
    """
    found = _number(value)
    if not math.isfinite(found):
        raise ValueError(value)
    return found
