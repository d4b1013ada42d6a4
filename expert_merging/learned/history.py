"""What training was like: the numbers of every update, and the coefficients by depth at some of them.

The trainer's state keeps both, so a run that was interrupted has them from its beginning, whatever tracker it uses.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from expert_merging.errors import InputError
from expert_merging.learned.importance import write_table
from expert_merging.roles import OUTSIDE, find_places

CURVES = "learning.csv"
OVER_TIME = "over_time.csv"

# How much less a point weighs in the exponential mean than the one after it: the mean is of about ten points.
_DECAY = 0.9
# Coefficients are kept of at most so many updates, evenly spread.
_MOST = 64

# A row of curves: numbers by name, with that of the update as ``update``.
Row = dict[str, float]
# The number of an update, and mean coefficients by expert and depth.
Snapshot = Sequence[Any]


def exponential_mean(before: float, value: float, count: int) -> float:
    """Mean of a curve's points, each weighing 0.9 times as much as the one after it.

    Args:
        before: the mean of the points before, whatever for the first one.
        value: the newest point.
        count: number of points, this one included.
    """
    weight = 1 - _DECAY ** (count - 1)
    return (_DECAY * weight * before + (1 - _DECAY) * value) / (_DECAY * weight + 1 - _DECAY)


def add_update(rows: list[Row], count: int, numbers: Mapping[str, float], losses: Mapping[str, float]) -> Row:
    """Add an update's row, with the exponential mean beside every loss.

    Args:
        rows: what is there already.
        count: number of updates, this one included.
        numbers: the update's other numbers.
        losses: its losses by name.

    Returns:
        The row.
    """
    before = rows[-1] if rows else {}
    means = {
        f"{name}_smoothed": exponential_mean(before.get(f"{name}_smoothed", 0.0), loss, count)
        for name, loss in losses.items()
    }
    rows.append({**numbers, **losses, **means})
    return rows[-1]


class Depths:
    """Mean coefficient of each expert at each depth of the language model.

    Args:
        chunks: coefficients per expert by tensor name, in the order in which they are laid out.

    Attributes:
        names: what each depth is called: its number, or outside.
    """

    def __init__(self, chunks: Mapping[str, int]) -> None:
        places = find_places(list(chunks))
        trained = {name: places[name].depth for name, count in chunks.items() if count}
        found = sorted({depth for depth in trained.values() if depth is not None})
        order: list[int | None] = [*found, *([None] if None in trained.values() else [])]
        self.names = [OUTSIDE if depth is None else str(depth) for depth in order]
        counts = torch.tensor([chunks[name] for name in trained])
        self._of_column = torch.tensor([order.index(depth) for depth in trained.values()]).repeat_interleave(counts)

    def means(self, values: Tensor) -> list[list[float]]:
        """Means over the coefficients of each depth.

        Args:
            values: ``(experts, coefficients per expert)``.

        Returns:
            By expert and depth.
        """
        sums = torch.zeros(len(values), len(self.names))
        sums.index_add_(1, self._of_column, values.detach().float().cpu())
        return (sums / self._of_column.bincount(minlength=len(self.names))).tolist()


def add_snapshot(snapshots: list[Snapshot], update: int, means: list[list[float]]) -> None:
    """Add the coefficients after an update; of more than 64, those of every second are given up, and so on.

    Args:
        snapshots: those before.
        update: number of the update.
        means: as `Depths.means` gives them.
    """
    first = snapshots[0][0] if snapshots else update
    apart = 1
    while (update - first) // apart >= _MOST:
        apart *= 2
    snapshots[:] = [shot for shot in snapshots if (shot[0] - first) % apart == 0]
    snapshots.append([update, means])


@dataclass(frozen=True)
class OverTime:
    """Coefficients over time.

    Args:
        updates: their numbers, in order.
        depths: names.
        coefficients: by expert, means by depth and update.
    """

    updates: list[int]
    depths: list[str]
    coefficients: dict[str, list[list[float]]]


def load_over_time(file: Path) -> OverTime:
    """Read what `save_history` wrote of the coefficients.

    Raises:
        InputError: it is something else.
    """
    try:
        with file.open(encoding="utf-8", newline="") as stream:
            cells = {
                (row["expert"], row["depth"], int(row["update"])): float(row["coefficient"])
                for row in csv.DictReader(stream)
            }
        experts, depths, updates = (list(dict.fromkeys(column)) for column in zip(*cells, strict=True))
        found = {
            expert: [[cells[expert, depth, update] for update in updates] for depth in depths] for expert in experts
        }
    except (KeyError, TypeError, ValueError, csv.Error) as error:
        raise InputError(f"{file} is not the table of coefficients that a run writes ({error!r})") from None
    return OverTime(updates, depths, found)


def save_history(
    rows: Sequence[Row], snapshots: Sequence[Snapshot], experts: Sequence[str], depths: Sequence[str], folder: Path
) -> None:
    """Write curves and coefficients over time as CSV.

    Args:
        rows: of all updates.
        snapshots: of some of them.
        experts: names.
        depths: names.
        folder: where to, made if it does not exist.
    """
    folder.mkdir(parents=True, exist_ok=True)
    columns = list(dict.fromkeys(name for row in rows for name in row))
    write_table(folder / CURVES, columns, [[row.get(name) for name in columns] for row in rows])
    cells = [
        [update, expert, depth, value]
        for update, means in snapshots
        for expert, row in zip(experts, means, strict=True)
        for depth, value in zip(depths, row, strict=True)
    ]
    write_table(folder / OVER_TIME, ["update", "expert", "depth", "coefficient"], cells)


def load_curves(file: Path) -> list[Row]:
    """Read what `save_history` wrote of the curves; a row has the numbers that it was written with.

    Raises:
        InputError: it is something else.
    """
    try:
        with file.open(encoding="utf-8", newline="") as stream:
            rows = [{name: float(text) for name, text in row.items() if text != ""} for row in csv.DictReader(stream)]
        return sorted(rows, key=lambda row: row["update"])
    except (KeyError, TypeError, ValueError, csv.Error) as error:
        raise InputError(f"{file} is not the table of curves that a run writes ({error!r})") from None
