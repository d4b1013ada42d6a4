"""The Pareto front of a search: candidates that none is better than in every task, in a table and a picture.

The table has every evaluation, the front among them, so that a picture can show both.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

from expert_merging.errors import InputError
from expert_merging.learned.figures import finish_figure, make_figure
from expert_merging.learned.importance import write_table
from expert_merging.run import Run
from expert_merging.search.record import Evaluation
from expert_merging.search.trade_offs import front_of

FRONT = "front.csv"
_TASK, _COEFFICIENT = "task ", "coefficient "
# Panels beside each other; more pairs of tasks than this are not drawn.
_WIDE, _MOST_PANELS = 3, 21


@dataclass(frozen=True)
class Point:
    """An evaluated candidate.

    Args:
        number: its place in the front, 1 for the one that was merged; 0 outside.
        tasks: scores.
        coefficients: by name.
    """

    number: int
    tasks: Mapping[str, float]
    coefficients: Mapping[str, float]


def ranked_front(evaluations: Sequence[Evaluation]) -> list[int]:
    """Places of the evaluations that make up the front, the best score first."""
    found = front_of([tuple(one.tasks.values()) for one in evaluations])
    return sorted(found, key=lambda place: evaluations[place].rank)


def leave_front(evaluations: Sequence[Evaluation], front: Sequence[int], names: Sequence[str], run: Run) -> Any:
    """Write table and picture into a run's folder.

    Args:
        evaluations: all of them.
        front: places of the front, as `ranked_front` gives them.
        names: what each number of a candidate is.
        run: the run.

    Returns:
        The picture, ``(height, width, 3)`` uint8.
    """
    run.analysis.mkdir(parents=True, exist_ok=True)
    numbers = {place: number for number, place in enumerate(front, start=1)}
    points = [
        Point(numbers.get(place, 0), one.tasks, dict(zip(names, one.candidate, strict=True)))
        for place, one in enumerate(evaluations)
    ]
    tasks = list(evaluations[0].tasks)
    header = ["evaluation", "front", *(_TASK + task for task in tasks), *(_COEFFICIENT + name for name in names)]
    rows = [
        [place, point.number, *point.tasks.values(), *point.coefficients.values()]
        for place, point in enumerate(points, start=1)
    ]
    write_table(run.analysis / FRONT, header, rows)
    return draw_front(points, (run.analysis / FRONT).with_suffix(".png"), run.title)


def redraw(folder: Path, run: str) -> list[Path]:
    """Draw the picture again from the table in the folder; both files."""
    file = folder / FRONT
    draw_front(load_front(file), file.with_suffix(".png"), run)
    return [file, file.with_suffix(".png")]


def load_front(file: Path) -> list[Point]:
    """Read the table that `leave_front` wrote.

    Raises:
        InputError: it is something else.
    """
    try:
        with file.open(encoding="utf-8", newline="") as stream:
            return [
                Point(int(row["front"]), _named(row, _TASK), _named(row, _COEFFICIENT))
                for row in csv.DictReader(stream)
            ]
    except (KeyError, TypeError, ValueError, AttributeError, csv.Error) as error:
        raise InputError(f"{file} is not the table of trade-offs that a search writes ({error!r})") from None


def _named(row: Mapping[str, str], kind: str) -> dict[str, float]:
    return {name.removeprefix(kind): float(value) for name, value in row.items() if name.startswith(kind)}


def draw_front(points: Sequence[Point], file: Path, run: str) -> Any:
    """A panel for each pair of tasks: all evaluations, the front, and what was merged.

    Args:
        points: all evaluations.
        file: where to.
        run: what the run is called.

    Returns:
        ``(height, width, 3)`` uint8.
    """
    import matplotlib

    pairs = [*combinations(points[0].tasks, 2)][:_MOST_PANELS]
    wide = min(_WIDE, len(pairs))
    lines = -(-len(pairs) // wide)
    with matplotlib.rc_context({"text.parse_math": False}):  # names of tasks are no formulas
        figure, axes = make_figure(lines, wide, width=max(3.6 * wide, 5), height=3.4 * lines)
        for axis, (first, second) in zip(axes, pairs, strict=False):
            for label, colour, size, shown in (
                ("evaluated", "#bdbdbd", 12, [point for point in points if not point.number]),
                ("trade-offs", "#4292c6", 22, [point for point in points if point.number > 1]),
                ("merged", "#d55e00", 40, [point for point in points if point.number == 1]),
            ):
                across, up = ([point.tasks[task] for point in shown] for task in (first, second))
                axis.scatter(across, up, s=size, color=colour, label=label)
            axis.set_xlabel(first)
            axis.set_ylabel(second)
        for axis in axes[len(pairs) :]:
            axis.set_axis_off()
        axes[0].legend(frameon=False, fontsize=8)
        return finish_figure(figure, file, "Trade-offs between tasks: lower is better", run)
