"""What TensorBoard is told beside curves: the options of a run for its table of hyperparameters, and final scores.

TensorBoard makes a row of that table of every folder with options. So they are written into the run's own folder, where
its curves are, and not, as its writer does it, into another one for each start.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from expert_merging.run import Run

# Scores of the table; TensorBoard shows the last point of each.
FINAL = "final"


def hyperparameters(run: Run) -> dict[str, Any]:
    """The options of a run as text, numbers and truth values, by name; what has no value is left out."""
    record = run.record or {}
    named = {"method": record.get("method"), "family": record.get("family"), "seed": record.get("seed")}
    values = {"run": run.owner.name, **named, **record.get("options", {})}
    return {
        name: value if isinstance(value, str | int | float) else json.dumps(value)
        for name, value in values.items()
        if value is not None
    }


def add_hyperparameters(writer: Any, options: Mapping[str, Any]) -> None:
    """Note the options of the run whose folder a writer writes to.

    Args:
        writer: a ``torch.utils.tensorboard.SummaryWriter``.
        options: as `hyperparameters` gives them.
    """
    from torch.utils.tensorboard.summary import hparams

    # Without the first, which would fix one set of options and scores for all runs that are shown together.
    _, started, ended = hparams(dict(options), {})  # type: ignore[no-untyped-call]
    for summary in (started, ended):
        writer.file_writer.add_summary(summary)


def lay_out_losses(writer: Any, losses: Mapping[str, str]) -> None:
    """Show the points of each loss, their exponential mean and the epochs' means in one picture.

    Args:
        writer: a ``torch.utils.tensorboard.SummaryWriter``.
        losses: the curve of each loss, by its name.
    """
    pictures = {
        name: ["Multiline", [f"{curve}{end}$" for end in ("", "_smoothed", "_epoch_mean")]]
        for name, curve in losses.items()
    }
    writer.add_custom_scalars({"losses": pictures})


def add_final(writer: Any, scores: Mapping[str, float], step: int) -> None:
    """Add final scores, which the table of hyperparameters shows beside the options."""
    for name, score in scores.items():
        writer.add_scalar(f"{FINAL}/{name}", score, step)


def note_scores(run: Run, scores: Mapping[str, float]) -> None:
    """Add scores of a finished run to its table, also where nothing was learned.

    Args:
        run: the run.
        scores: by name.
    """
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(run.board)) as writer:
        add_hyperparameters(writer, hyperparameters(run))
        add_final(writer, scores, 0)
