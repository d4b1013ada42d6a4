"""accelerate, as everything that runs models has it: device, processes and experiment tracker."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from expert_merging.context import Context
from expert_merging.errors import InputError, near_name
from expert_merging.processes import forget_fsdp


def make_accelerator(context: Context, **settings: Any) -> Any:
    """What runs models on the context's device, in as many processes as were started.

    Args:
        context: the run.
        settings: of `accelerate.Accelerator`.
    """
    from accelerate import Accelerator
    from accelerate.utils import ProjectConfiguration

    if torch.device(context.device).index is not None:
        torch.cuda.set_device(context.device)
    # Models are split here; accelerate's own way splits those that it prepares for an optimizer of their weights.
    forget_fsdp()
    folder = str(context.run.folder)
    return Accelerator(
        cpu=context.device == "cpu",
        log_with=None if context.log_with == "none" else context.log_with,
        project_config=ProjectConfiguration(project_dir=folder, logging_dir=folder),
        **settings,
    )


def start_tracker(
    accelerator: Any, context: Context, *, first: int | None, options: Mapping[str, Any] | None = None
) -> None:
    """Open the tracker.

    Args:
        accelerator: has it.
        context: the run.
        first: number of the first point that this part of the run adds, from which on older ones are replaced; None for
            a new run.
        options: the run's, for the tracker's tables.
    """
    folder, board = context.run.folder, context.run.board
    arguments: dict[str, dict[str, Any]] = {
        "tensorboard": {} if first is None else {"purge_step": first},
        "wandb": {"dir": str(folder), "name": folder.name},
    }
    tensorboard = context.log_with == "tensorboard"
    # TensorBoard takes the project's name for a folder, and would show the options of every start as another run.
    project = board.name if tensorboard else "expert_merging"
    config = None if tensorboard and any(board.glob("*/hparams.yml")) else options
    accelerator.init_trackers(project, config=config, init_kwargs=arguments)


def finish_trackers(accelerator: Any) -> None:
    """Close the trackers."""
    for tracker in accelerator.trackers:
        tracker.finish()


def check_tracker(log_with: str) -> None:
    """Check that the experiment tracker can be used.

    Raises:
        InputError: it cannot.
    """
    if log_with == "none":
        return
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

    available = [str(getattr(tracker, "value", tracker)) for tracker in get_available_trackers()]
    if log_with not in available:
        known = [str(getattr(tracker, "value", tracker)) for tracker in LOGGER_TYPE_TO_CLASS]
        advice = f"pip install {log_with}" if log_with in known else near_name(log_with, [*known, "none"])
        raise InputError(f"--log_with {log_with}: that tracker is not available. {advice}")
