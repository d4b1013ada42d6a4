"""What the preparation of a method is given."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from expert_merging.backbone import Backbone
from expert_merging.plan import Plan
from expert_merging.processes import ALONE, Processes
from expert_merging.progress import Progress
from expert_merging.run import Run
from expert_merging.streaming import Passes


@dataclass(frozen=True)
class Context:
    """The run that a method is prepared for.

    Args:
        plan: checkpoints and parameters.
        backbone: the model family.
        run: where the run's files are.
        seed: decides everything random.
        device: device as text, such as ``cpu`` or ``cuda:0``.
        log_with: accelerate's name of the experiment tracker, or ``none``.
        progress: shows how far the work is.
        find_method: another method by name, for methods that build on one (`expert_merging.catalogue.find_method`).
        processes: the processes that share passes over task vectors.
        dry_run: nothing is done after the checks, so that they need not keep what they have read.
    """

    plan: Plan
    backbone: Backbone
    run: Run
    seed: int
    device: str
    log_with: str
    progress: Progress
    find_method: Callable[[str], Any]
    processes: Processes = ALONE
    dry_run: bool = False

    @property
    def passes(self) -> Passes:
        """Streaming passes over all task vectors."""
        import torch

        return Passes(self.plan, torch.device(self.device), self.progress, self.processes)
