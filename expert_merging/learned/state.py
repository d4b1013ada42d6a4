"""How far training is, and the folder that it continues from after an interruption."""

from __future__ import annotations

import errno
import json
import logging
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from expert_merging.errors import InputError
from expert_merging.writing import sync_files

logger = logging.getLogger(__name__)


@contextmanager
def full_disk_as_os_error() -> Iterator[None]:
    """Raise what the system said where torch and safetensors say it in words of their own."""
    try:
        yield
    except (RuntimeError, SafetensorError) as error:
        if any(sign in str(error) for sign in ("inline_container", "PytorchStreamWriter", "iostream", "No space left")):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) from error
        raise


class TrainingState:
    """How far training is; its numbers are saved with every update."""

    def __init__(self) -> None:
        self.updates = 0
        self.skipped = 0
        self.epochs = 0
        self.epoch_losses: dict[str, float] = {}
        self.epoch_samples = 0
        self.best_loss = math.inf
        self.epochs_without_better = 0

    def count(self, means: Mapping[str, float], *, samples: float, numbers: Tensor) -> None:
        """Count an update.

        Args:
            means: mean losses of its samples.
            samples: their number.
            numbers: what is trained, as the update has left it.

        Raises:
            InputError: a loss or a number is not finite.
        """
        if not (math.isfinite(means["total"]) and numbers.isfinite().all()):
            raise InputError(
                f"the loss is not a number after {self.updates} updates; lower --learning_rate, or use "
                "--mixed_precision no"
            )
        self.updates += 1
        self.add(means, int(samples))

    def add(self, losses: Mapping[str, float], samples: int) -> None:
        """Count the mean losses of an update's samples; the one called ``total`` is the sum of the others."""
        for name, loss in losses.items():
            self.epoch_losses[name] = self.epoch_losses.get(name, 0.0) + loss * samples
        self.epoch_samples += samples

    @property
    def epoch_means(self) -> dict[str, float]:
        """Mean losses of the epoch so far."""
        return {name: total / self.epoch_samples for name, total in self.epoch_losses.items()}

    def end_epoch(self) -> None:
        """Compare the epoch's mean loss with the best so far."""
        mean = self.epoch_means["total"]
        better = mean < self.best_loss
        self.best_loss = min(mean, self.best_loss)
        self.epochs_without_better = 0 if better else self.epochs_without_better + 1
        self.epochs += 1
        self.epoch_losses, self.epoch_samples = {}, 0


class StateFolder:
    """A folder that is replaced as a whole, so that there is always one complete state.

    Args:
        folder: where the state is; the next one is written beside it, and the last one waits there until the new one
            has its name.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.partial = folder.with_name(folder.name + ".partial")
        self.old = folder.with_name(folder.name + ".old")

    @property
    def found(self) -> list[Path]:
        """Complete states, the newest first."""
        return [place for place in (self.folder, self.old) if place.exists()]

    def replace(self, write: Callable[[Path], None]) -> None:
        """Let ``write`` fill a folder, then swap it with the last one."""
        shutil.rmtree(self.partial, ignore_errors=True)
        write(self.partial)
        sync_files(self.partial)
        if self.folder.exists():
            shutil.rmtree(self.old, ignore_errors=True)
            os.rename(self.folder, self.old)
        os.rename(self.partial, self.folder)
        shutil.rmtree(self.old, ignore_errors=True)

    def save(self, accelerator: Any, trained: torch.nn.Module, state: TrainingState) -> None:
        """Save what a restart needs."""

        def write(folder: Path) -> None:
            with full_disk_as_os_error():
                accelerator.save_state(str(folder))
                save_file(trained.state_dict(), folder / "coefficients.safetensors")
            (folder / "training.json").write_text(json.dumps(vars(state)), encoding="utf-8")

        self.replace(write)

    def resume(self, accelerator: Any, trained: torch.nn.Module, state: TrainingState) -> None:
        """Take up the last saved state; what is damaged is passed over.

        Raises:
            InputError: the processes have not found the same.
        """
        for place in self.found:
            try:
                training = json.loads((place / "training.json").read_text(encoding="utf-8"))
                if training.keys() != vars(state).keys():
                    raise ValueError("it is of another version")
                saved = load_file(place / "coefficients.safetensors")
                accelerator.load_state(str(place))
            except (OSError, EOFError, ValueError, RuntimeError, SafetensorError, UnpicklingError) as error:
                logger.warning("the saved state in %s cannot be read (%s)", place, str(error).split("\n")[0])
                continue
            trained.load_state_dict(saved)
            vars(state).update(training)
            logger.info("continuing after update %d", state.updates)
            break
        own = torch.tensor([state.updates], device=accelerator.device)
        if len(found := set(accelerator.gather(own).tolist())) > 1:
            raise InputError(
                f"some processes continue after update {min(found)}, others after {max(found)}; all of them must "
                f"be able to read {self.folder}, or move it away"
            )

    def remove(self) -> None:
        """Remove all states."""
        for folder in (self.folder, self.partial, self.old):
            shutil.rmtree(folder, ignore_errors=True)
