"""Draw the README's picture from the README's own table: ``python -m docs.tools.chart``.

So the picture cannot say anything else than the table.
"""

from __future__ import annotations

import re
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent.parent
PICTURE = REPOSITORY / "docs" / "pictures" / "demo.svg"

Rows = dict[str, list[float]]

_BAR, _BEST = "#c9d1dc", "#7fa6d6"
_DOTS = ("#1f77b4", "#d95f02", "#1b7837")


def read_table(text: str) -> tuple[list[str], Rows]:
    """The first table of a Markdown text: names of its columns, and its rows' numbers by their first cell."""
    lines = [line for line in text[: text.index("\n\n", text.index("|---"))].splitlines() if line.startswith("|")]
    head, _, *body = ([cell.strip(" `*") for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines)
    return head[1:], {row[0].replace("`", ""): [float(cell) for cell in row[1:]] for row in body}


def draw(columns: list[str], rows: Rows, file: Path) -> None:
    """Draw a bar for each row's last column, its mean, and a dot for each of the others."""
    import matplotlib as mpl

    mpl.use("svg")
    # Text stays text, and the same numbers give the same file.
    mpl.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "demo", "font.family": "sans-serif", "font.size": 11})
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(9, 4), layout="constrained")
    places = range(len(rows))
    means = [numbers[-1] for numbers in rows.values()]
    colors = [_BEST if mean == max(means) else _BAR for mean in means]
    axes.barh(places, means, height=0.62, color=colors, label=columns[-1])
    for place, mean in zip(places, means, strict=True):  # at the bar's foot, where no dot is
        axes.text(1, place, f"{mean:.1f}", va="center", fontweight="bold")
    for column, (name, color) in enumerate(zip(columns[:-1], _DOTS, strict=True)):
        values = [numbers[column] for numbers in rows.values()]
        axes.scatter(values, places, s=55, color=color, edgecolors="white", linewidths=1, zorder=3, label=name)
    axes.set_yticks(places, list(rows))
    axes.invert_yaxis()
    axes.set_xlim(0, 103)
    axes.set_xlabel("exact match on 500 held-out questions a task, %")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside upper right", ncols=len(columns), frameon=False)
    figure.savefig(file, metadata={"Date": None})
    plt.close(figure)


if __name__ == "__main__":
    draw(*read_table((REPOSITORY / "README.md").read_text(encoding="utf-8")), PICTURE)
