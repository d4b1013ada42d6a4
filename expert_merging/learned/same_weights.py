"""Whether a run that learns goes on with the weights that it began with.

Fingerprints are made of samples. The mean magnitudes of task vectors are made of every entry, and learning needs them
in any case.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import TypeAlias

from expert_merging.context import Context
from expert_merging.documents import read_object
from expert_merging.errors import InputError
from expert_merging.learned.task_vectors import mean_magnitudes
from expert_merging.processes import is_main_process
from expert_merging.writing import write_atomically

# Numbers by tensor, one per expert.
Magnitudes: TypeAlias = Mapping[str, Sequence[float]]

# Above what another processor's order of adding makes of a sum in float64, and below what one entry of a thousand
# million does.
_SAME = 1e-11


def check_weights(context: Context, magnitudes: Magnitudes | None = None) -> None:
    """Check that merged weights are those that the run began with, or note them where it begins.

    Args:
        context: the run.
        magnitudes: mean absolute entries of the task vectors, where they are known already.

    Raises:
        InputError: some have changed, be it where no sample shows it.
    """
    before = _read(context)
    now = mean_magnitudes(context.plan) if magnitudes is None else magnitudes
    if before is None:
        if is_main_process():
            write_atomically(context.run.magnitudes, (json.dumps(now) + "\n").encode())
        return
    changed = [
        expert
        for number, expert in enumerate(context.plan.experts)
        if not all(math.isclose(now[name][number], before[name][number], rel_tol=_SAME) for name in now)
    ]
    if changed:
        raise InputError(
            f"weights of {', '.join(changed)}, or of the base, have changed since this run began, though samples of "
            "them are as they were; put the old ones back, or move the run's folder away to begin again"
        )


def check_rewritten(context: Context) -> None:
    """Check the same of a run that has learned already, where files were written or moved since it began.

    Raises:
        InputError: some have changed.
    """
    written = (context.run.record or {}).get("written")
    if written != {name: checkpoint.opened for name, checkpoint in context.plan.checkpoints.items()}:
        check_weights(context)


def _read(context: Context) -> Magnitudes | None:
    """What was noted, None where nothing was that fits."""
    try:
        noted = read_object(context.run.magnitudes)
        rows = {name: [float(value) for value in noted[name]] for name in context.plan.merged}
    except (InputError, ValueError, TypeError, KeyError):
        return None
    return rows if all(len(row) == len(context.plan.experts) for row in rows.values()) else None
