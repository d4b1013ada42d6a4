"""What is told of questions that experts have answered: who has answered which task, and how much of it is right."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from expert_merging.comparing.scores_file import SetScore, TaskScore
from expert_merging.comparing.scoring import mean_score, task_score
from expert_merging.console import table_of_numbers

if TYPE_CHECKING:
    from rich.console import Console

    from expert_merging.routing.record import Record


def shares_of(entries: Sequence[Mapping[str, Any]], experts: Sequence[str]) -> dict[str, float]:
    """Mean weight of each expert in the answers to some questions, which sum to 1."""
    return {name: sum(entry["experts"].get(name, 0) for entry in entries) / len(entries) for name in experts}


def tell(record: Record, console: Console) -> None:
    """Print the table, and keep its numbers with the answers."""
    experts, tasks = [*record.settings["experts"]], dict[str, list[dict[str, Any]]]()
    for entry in record.entries:
        tasks.setdefault(entry["task"], []).append(entry)
    shares = {task: shares_of(own, experts) for task, own in tasks.items()}
    points = {task: [entry["points"] for entry in own if "points" in entry] for task, own in tasks.items()}
    scores = {task: task_score(own) for task, own in points.items() if own}
    rows = [[task, *map(_percent, own.values()), _right(scores.get(task))] for task, own in shares.items()]
    means = [sum(own[name] for own in shares.values()) / len(shares) for name in experts]
    rows.append(["mean", *map(_percent, means), _right(mean_score(SetScore(scores))) if scores else ""])
    columns = [*(f"by {name}" for name in experts), "right"]
    if not scores:
        columns, rows = columns[:-1], [row[:-1] for row in rows]
    record.save(
        shares=shares,
        scores={task: {"mean": one.mean, "low": one.low, "high": one.high} for task, one in scores.items()},
    )
    title = "Who has answered, and what is right, in % (with 95 % intervals)" if scores else "Who has answered, in %"
    console.print(table_of_numbers(title, columns, rows), soft_wrap=False)


def _percent(share: float) -> str:
    return f"{100 * share:.1f}"


def _right(score: TaskScore | None) -> str:
    """A share of right answers with its interval; empty where none is known to be right."""
    return "" if score is None else f"{score.mean:.1f}\n{score.low:.1f} to {score.high:.1f}"
