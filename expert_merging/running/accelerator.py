"""accelerate, as everything that runs models has it: device, processes and experiment tracker."""

from __future__ import annotations

from typing import Any

import torch

from expert_merging.context import Context
from expert_merging.errors import InputError, near_name
from expert_merging.processes import forget_fsdp
from expert_merging.running import board


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
    folder, above_board = str(context.run.folder), str(context.run.board.parent)
    return Accelerator(
        cpu=context.device == "cpu",
        log_with=None if context.log_with == "none" else context.log_with,
        project_config=ProjectConfiguration(project_dir=folder, logging_dir=above_board),
        **settings,
    )


def start_tracker(accelerator: Any, context: Context, *, first: int) -> None:
    """Open the tracker, and tell it the run's options.

    Args:
        accelerator: has it.
        context: the run.
        first: number of the first point that this part of the run adds, from which on older ones are replaced.
    """
    run, options = context.run, board.hyperparameters(context.run)
    arguments: dict[str, dict[str, Any]] = {
        "tensorboard": {"purge_step": first},
        "wandb": {"dir": str(run.folder), "name": run.folder.name},
    }
    tensorboard = context.log_with == "tensorboard"
    # TensorBoard takes the project's name for a folder, and accelerate would make another run there of the options.
    project = run.board.name if tensorboard else "expert_merging"
    accelerator.init_trackers(project, config=None if tensorboard else options, init_kwargs=arguments)
    writer = board_of(accelerator)
    if writer is not None:
        board.add_hyperparameters(writer, options)


def board_of(accelerator: Any) -> Any | None:
    """What writes to TensorBoard; None in processes beside the main one, and with another tracker."""
    found = [tracker.writer for tracker in accelerator.trackers if tracker.name == "tensorboard"]
    return found[0] if found and accelerator.is_main_process else None


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
