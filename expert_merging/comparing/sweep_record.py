"""``sweeps/NAME/sweep.json``: the scores of a sweep's points, which it goes on from.

``{"format": 1, "description", "points": [{"point", "key", "share", "divergence": {TASK: SHARE}, "accuracy": {TASK:
PERCENT}, "correct": {TASK: [POINTS]}, "seconds", "problem"}]}``, a line for each point.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from expert_merging.comparing.grid import Point
from expert_merging.comparing.scores_file import finite, mean_of
from expert_merging.documents import read_object
from expert_merging.errors import InputError
from expert_merging.writing import write_atomically

FORMAT = 1
Select = Literal["divergence", "accuracy"]


@dataclass(frozen=True)
class Scored:
    """A point with its scores.

    Args:
        point: the values of the swept options.
        key: digest of all its settings.
        share: share of the samples and questions that it was scored by.
        divergence: from each task's expert, as a share of the base's.
        correct: points of each question, by task.
        seconds: that it took.
        problem: why it could not be merged; empty where it could.
    """

    point: Point
    key: str
    share: float = 1.0
    divergence: Mapping[str, float] = field(default_factory=dict)
    correct: Mapping[str, Sequence[float]] = field(default_factory=dict)
    seconds: float = 0.0
    problem: str = ""

    @property
    def accuracy(self) -> dict[str, float]:
        """Percentage of right answers, by task."""
        return {task: 100 * sum(points) / len(points) for task, points in self.correct.items()}

    def badness(self, select: Select) -> float:
        """What is smallest for the best point; infinite where there is no number."""
        found = mean_of(self.divergence) if select == "divergence" else -mean_of(self.accuracy)
        return found if math.isfinite(found) else math.inf

    def rank(self, select: Select) -> tuple[float, float]:
        """What is smallest for the best point: its badness, and where that of two is the same, the other score."""
        first, other = self.badness(select), self.badness("accuracy" if select == "divergence" else "divergence")
        return round(first, 9), other


class Record:
    """What a sweep has scored, in a file that it is continued from.

    Args:
        file: where it is kept.
        description: what must be the same for scores to be compared.
        advice: what to do about a file that is no record.

    Raises:
        InputError: the file has scores of something else, or is damaged.
    """

    def __init__(
        self, file: Path, description: Mapping[str, Any], *, advice: str = "move it away to begin again"
    ) -> None:
        self.file, self.description, self._advice = file, dict(description), advice
        self.scored: dict[tuple[str, float], Scored] = {}
        self.read()

    def read(self) -> None:
        """Take over what the file has by now, if there is one.

        Raises:
            InputError: it has scores of something else, or is damaged.
        """
        if not self.file.exists():
            return
        content = read_object(self.file, advice=self._advice)
        try:
            found = [_scored(entry) for entry in content["points"]]
            differing = [name for name, value in self.description.items() if content["description"].get(name) != value]
        except (KeyError, TypeError, ValueError, AttributeError):
            raise InputError(f"{self.file} holds no scores of a sweep; {self._advice}") from None
        if differing or content.get("format") != FORMAT:
            raise InputError(
                f"{self.file} has scores of another sweep ({', '.join(differing) or 'format'}); choose another "
                "--sweep_name, or move the folder away"
            )
        self.scored = {(one.key, one.share): one for one in found}

    def known(self, key: str, share: float) -> Scored | None:
        """The scores of a point; None where it has none yet."""
        return self.scored.get((key, share))

    def add(self, scored: Scored) -> None:
        """Note the scores of a point and write all."""
        self.scored[scored.key, scored.share] = scored
        points = ",\n".join(json.dumps(_entry(one), ensure_ascii=False) for one in self.scored.values())
        head = json.dumps({"format": FORMAT, "description": self.description}, ensure_ascii=False)
        write_atomically(self.file, f'{head[:-1]}, "points": [\n{points}\n]}}\n'.encode())


def _entry(scored: Scored) -> dict[str, Any]:
    """A point's scores without what it has not; a divergence that is no number is null."""
    known = {task: value if math.isfinite(value) else None for task, value in scored.divergence.items()}
    entry = {**vars(scored), "divergence": known, "accuracy": scored.accuracy}
    return {name: value for name, value in entry.items() if value not in ("", {}) or name == "divergence"}


def _scored(entry: Mapping[str, Any]) -> Scored:
    """What `_entry` made.

    Raises:
        KeyError, TypeError, ValueError, AttributeError: it is something else.
    """
    point, key, problem = entry["point"], entry["key"], entry.get("problem", "")
    correct = {task: [finite(one) for one in points] for task, points in entry.get("correct", {}).items()}
    if not (isinstance(point, dict) and isinstance(key, str) and isinstance(problem, str) and all(correct.values())):
        raise ValueError(entry)
    divergence = {task: math.nan if value is None else finite(value) for task, value in entry["divergence"].items()}
    return Scored(point, key, finite(entry["share"]), divergence, correct, finite(entry.get("seconds", 0)), problem)
