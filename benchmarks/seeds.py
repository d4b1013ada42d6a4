"""One table of sweeps over several seeds or draws, with what is more than chance between the best.

``python -m benchmarks.seeds results/logs/sweeps/*/sweep.json`` takes the records of sweeps with the same points and
prints the table in Markdown: exact match in the mean of the sweeps with its 95 % interval, from the worst to the best
sweep, and divergence from the experts. Records of the same checkpoints, samples and questions count as one sweep. Below
stand McNemar's tests between the best points, on all questions together.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from expert_merging.comparing.grid import label_of
from expert_merging.comparing.intervals import compare_paired, interval
from expert_merging.comparing.scores_file import mean_of
from expert_merging.comparing.sweep_record import Record, Scored
from expert_merging.console import Screen, say
from expert_merging.documents import read_object
from expert_merging.errors import InputError, file_problem, tell

# Points that are tested against each other.
BEST = 3


@dataclass(frozen=True)
class Row:
    """A point in all sweeps that have it.

    Args:
        label: the point in words.
        scored: its scores in each.
    """

    label: str
    scored: Sequence[Scored]

    @property
    def means(self) -> list[float]:
        """Exact match in each sweep, in percent, mean over tasks."""
        return [mean_of(one.accuracy) for one in self.scored]

    @property
    def mean(self) -> float:
        """Mean of the sweeps."""
        return statistics.mean(self.means)

    @property
    def points(self) -> list[Sequence[float]]:
        """Points of all questions, by sweep and task, whatever the order in which tasks were asked."""
        return [points for one in self.scored for _, points in sorted(one.correct.items())]

    def cells(self) -> list[str]:
        """The row of the table; the spread is that of several sweeps."""
        low, high = (100 * end for end in interval(*self.points))
        divergence = statistics.mean(mean_of(one.divergence) for one in self.scored)
        spread = f"{min(self.means):.1f}-{max(self.means):.1f}"
        shown = [spread] if len(self.scored) > 1 else []
        return [f"`{self.label}`", f"{self.mean:.1f}", f"{low:.1f}-{high:.1f}", *shown, f"{divergence:.2f}"]


def rows_of(sweeps: Sequence[Mapping[str, Scored]]) -> list[Row]:
    """Every point that all sweeps have scored on all of their questions, the best first.

    Args:
        sweeps: scores by a point's words.
    """
    labels = [label for label in sweeps[0] if all(label in sweep for sweep in sweeps)]
    rows = [Row(label, [sweep[label] for sweep in sweeps]) for label in labels]
    return sorted(rows, key=lambda row: row.mean, reverse=True)


def read_all(files: Sequence[Path]) -> list[dict[str, Scored]]:
    """What sweeps have scored, by a point's words; records that can be compared are one sweep.

    Raises:
        InputError: a file is no record of a sweep, or of one without questions.
    """
    sweeps: dict[str, dict[str, Scored]] = {}
    for file in files:
        found = read(file)
        about = json.dumps(read_object(file).get("description"), sort_keys=True)
        sweeps.setdefault(about, {}).update(found)
    return list(sweeps.values())


def read(file: Path) -> dict[str, Scored]:
    """What a sweep has scored on all questions, by a point's words.

    Raises:
        InputError: the file is no record of a sweep, or of one without questions.
    """
    if not file.is_file():
        raise InputError(f"{file} is no file; give the sweep.json of sweeps")
    record = Record(file, {}, advice="give the sweep.json of sweeps")
    found = {label_of(one.point): one for one in record.scored.values() if one.share == 1 and not one.problem}
    if not found or not all(one.correct for one in found.values()):
        raise InputError(f"{file} has no points that were asked labelled questions; sweep with --questions")
    return found


def tests_of(rows: Sequence[Row]) -> list[str]:
    """A line for every two of the rows."""
    lines = []
    for place, row in enumerate(rows):
        for other in rows[place + 1 :]:
            if [len(points) for points in row.points] == [len(points) for points in other.points]:
                pair = compare_paired(*([*itertools.chain(*one.points)] for one in (row, other)))
                lines.append(
                    f"- `{row.label}` alone is right on {pair.first_only} questions of {pair.count}, `{other.label}` "
                    f"alone on {pair.second_only} (p = {pair.p:.2g})"
                )
    return lines


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.seeds", description=__doc__.split("\n")[0])
    parser.add_argument("sweeps", nargs="+", type=Path, metavar="SWEEP.json", help="records of sweeps")
    sweeps = read_all(parser.parse_args().sweeps)
    rows = rows_of(sweeps)
    head = ["", "mean", "95 % interval", *(["worst to best"] if len(sweeps) > 1 else []), "divergence"]
    lines = [f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *(row.cells() for row in rows))]
    lines += ["", *tests_of(rows[:BEST])]
    left = {label for sweep in sweeps for label in sweep} - {row.label for row in rows}
    if left:
        lines += ["", f"not in all sweeps, and left out: {', '.join(sorted(left))}"]
    console = Screen()
    for line in lines:
        say(console, line)


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        tell(error)
        sys.exit(1)
    except OSError as error:
        tell(file_problem(error, "begins again"))
        sys.exit(1)
