"""What the figures of the quality benchmark say: choices without labels, rank correlation, tables."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from benchmarks.recipes import ABLATION, CHOICE, METHOD

if TYPE_CHECKING:
    from rich.table import Table


def rounded(value: float) -> float:
    """Four digits, which is more than the figures are sure of."""
    return float(f"{value:.4g}")


def choose(rows: Mapping[str, Any]) -> dict[str, str]:
    """For each method, the row that is nearest to the experts on held-out calibration questions, mean over seeds."""
    best: dict[str, str] = {}
    for label, row in rows.items():
        if row["group"] in (METHOD, CHOICE) and (
            row["method"] not in best or row["divergence"] < rows[best[row["method"]]]["divergence"]
        ):
            best[row["method"]] = label
    return best


def rank_correlation(first: Sequence[float], second: Sequence[float]) -> float:
    """Spearman's correlation of ranks; ties share their mean rank."""
    ranks = [_ranks(values) for values in (first, second)]
    return statistics.correlation(*ranks) if len(set(first)) > 1 and len(set(second)) > 1 else math.nan


def _ranks(values: Sequence[float]) -> list[float]:
    ordered = sorted(values)
    return [ordered.index(value) + (ordered.count(value) - 1) / 2 for value in values]


def correlations(rows: Mapping[str, Any], seeds: Sequence[int]) -> dict[str, Any]:
    """How well the score without labels predicts the order of the merged models' accuracies, within each seed."""
    merged = [row for row in rows.values() if row["group"] != "zoo" and "accuracy" in row]
    found = {}
    for kind in ("divergence", "hidden"):
        per_seed = [
            -rank_correlation(
                [row["seeds"][seed][kind]["mean"] for row in merged],
                [row["seeds"][seed]["accuracy"]["mean"] for row in merged],
            )
            for seed in seeds
        ]
        found[kind] = {"mean": rounded(statistics.mean(per_seed)), "seeds": [rounded(value) for value in per_seed]}
    return found


def table(rows: Mapping[str, Any], labels: Sequence[str], title: str) -> Table:
    """Accuracy and distances of some rows, mean over seeds; accuracies with their standard deviation over seeds."""
    from rich.table import Table

    result = Table("", "accuracy (%)", "over seeds", "KL / base's", "hidden / base's", title=title)
    for column in result.columns[1:]:
        column.justify = "right"
    for label in labels:
        row = rows[label]
        accuracy = [f"{row['accuracy']:.1f}", f"+- {row['accuracy spread']:.1f}"] if "accuracy" in row else ["", ""]
        result.add_row(label, *accuracy, f"{row['divergence']:.3f}", f"{row['hidden']:.3f}")
    return result


def report(rows: Mapping[str, Any], seeds: Sequence[int]) -> dict[str, Any]:
    """Print the tables; the summary for the file."""
    from rich.console import Console

    console = Console()
    console.width = max(console.width, 120)
    titles = {"zoo": "Base and experts", METHOD: "Methods", ABLATION: "Ablations", CHOICE: "Settings to choose among"}
    for group, title in titles.items():
        labels = [label for label, row in rows.items() if row["group"] == group]
        if labels:
            console.print(table(rows, labels, f"{title}; {len(seeds)} seeds"))
    best = choose(rows)
    console.print(f"nearest to the experts on held-out calibration questions: {', '.join(best.values())}")
    found = correlations(rows, seeds)
    for kind, value in found.items():
        console.print(f"rank correlation of {kind} and accuracy: {value['mean']:.2f} (by seed: {value['seeds']})")
    return {"chosen": best, "rank_correlation": found}
