"""What a search has evaluated, in order, in a file that it is continued from.

The search is a function of its seed, the scores and, where time is limited, the seconds. So a continued one starts
again from the beginning and is given what is known: it is then where it was, without a copy of the optimizer's own
state.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from expert_merging.documents import read_json
from expert_merging.errors import InputError
from expert_merging.search.options import OverTasks
from expert_merging.writing import write_atomically

# Far above what another processor's rounding makes of a candidate, and far below what matters to a model.
_SAME = 1e-6


@dataclass(frozen=True)
class Evaluation:
    """A candidate and its score.

    Args:
        candidate: its numbers.
        tasks: its score in every task, the lower the better.
        over: how these become one.
        seconds: what it took, where time is limited.
        items: its score for every sample or question, where a search goes by them.
    """

    candidate: tuple[float, ...]
    tasks: Mapping[str, float]
    over: OverTasks = "mean"
    seconds: float = 0.0
    items: tuple[float, ...] = ()

    @property
    def mean(self) -> float:
        """Mean over tasks."""
        return sum(self.tasks.values()) / len(self.tasks)

    @property
    def score(self) -> float:
        """What is made small."""
        if self.over == "mean" or math.isnan(self.mean):
            return self.mean
        return max(self.tasks.values())

    @property
    def rank(self) -> tuple[bool, float, float]:
        """Smaller is better; of two with the same score, the one with the smaller mean, and without numbers last."""
        return (True, 0.0, 0.0) if math.isnan(self.mean) else (False, self.score, self.mean)


class Record:
    """Evaluations of a search.

    Args:
        file: where they are kept.
        names: what each number of a candidate is.
        over: how scores of tasks become one.

    Raises:
        InputError: the file is damaged.
    """

    def __init__(self, file: Path, names: Sequence[str], over: OverTasks = "mean") -> None:
        self.file, self.names, self.over = file, list(names), over
        self.evaluations = self._read() if file.exists() else []
        self._lines = [json.dumps(self._entry(evaluation), allow_nan=False) for evaluation in self.evaluations]

    def _read(self) -> list[Evaluation]:
        content = read_json(self.file, advice="move it away to search from the beginning")
        try:
            if not isinstance(content, list):
                raise TypeError("no list")
            return [
                Evaluation(
                    tuple(float(entry["coefficients"][name]) for name in self.names),
                    {task: math.nan if value is None else float(value) for task, value in entry["tasks"].items()},
                    self.over,
                    float(entry.get("seconds", 0.0)),
                    tuple(math.nan if value is None else float(value) for value in entry.get("items", ())),
                )
                for entry in content
            ]
        except (ArithmeticError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise InputError(
                f"{self.file} cannot be read ({error!r}); move it away to search from the beginning"
            ) from None

    def known(self, number: int, candidate: Sequence[float]) -> Evaluation | None:
        """The evaluation of that number, None if there is none yet.

        Args:
            number: 0 for the first.
            candidate: what is to be evaluated.

        Raises:
            InputError: another candidate has been evaluated.
        """
        if number >= len(self.evaluations):
            return None
        found = self.evaluations[number]
        pairs = zip(found.candidate, candidate, strict=True)
        if not all(math.isclose(*pair, rel_tol=_SAME, abs_tol=_SAME) for pair in pairs):
            raise InputError(
                f"{self.file}: evaluation {number + 1} is of another candidate than this search comes to, perhaps "
                "since another version of cma or numpy has made it; move it away to search from the beginning"
            )
        return found

    def add(self, evaluations: Sequence[Evaluation], *, save: bool) -> None:
        """Note evaluations.

        Args:
            evaluations: the next ones.
            save: write the file, so that they need not be made again.
        """
        self.evaluations += evaluations
        self._lines += [json.dumps(self._entry(evaluation), allow_nan=False) for evaluation in evaluations]
        if save:
            write_atomically(self.file, ("[\n" + ",\n".join(self._lines) + "\n]\n").encode())

    def _entry(self, evaluation: Evaluation) -> dict[str, Any]:
        tasks = {task: _known(value) for task, value in evaluation.tasks.items()}
        return {
            "score": _known(evaluation.score),
            "tasks": tasks,
            "coefficients": dict(zip(self.names, evaluation.candidate, strict=True)),
            **({"seconds": evaluation.seconds} if evaluation.seconds else {}),
            **({"items": [_known(value) for value in evaluation.items]} if evaluation.items else {}),
        }


def _known(value: float) -> float | None:
    """The value, where JSON has such a number."""
    return value if math.isfinite(value) else None
