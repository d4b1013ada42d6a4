"""Learning of merging coefficients from calibration samples."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from expert_merging.backbone import Backbone
    from expert_merging.learned.coefficients import Coefficients
    from expert_merging.plan import Progress
    from expert_merging.run import Run


@dataclass(frozen=True)
class Context:
    """What a method that learns is given besides the plan.

    Args:
        backbone: the model family.
        run: where the run's files are.
        seed: decides the order of samples.
        device: device as text, such as ``cpu`` or ``cuda:0``.
        log_with: accelerate's name of the experiment tracker, or ``none``.
        progress: shows how far the work is.
    """

    backbone: Backbone
    run: Run
    seed: int
    device: str
    log_with: str
    progress: Progress


@dataclass(frozen=True)
class Work:
    """What a method that learns returns once its options are checked.

    Args:
        run: does the work.
        inputs: digests of what it reads besides checkpoints, by name; a run is continued only with the same.
        notes: lines for the plan that ``--dry_run`` prints.
    """

    run: Callable[[], Coefficients]
    inputs: Mapping[str, str]
    notes: tuple[str, ...] = ()
