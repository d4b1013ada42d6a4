"""How far training is, and the folder that it continues from after an interruption."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

from expert_merging.writing import sync_files


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

    def remove(self) -> None:
        """Remove all states."""
        for folder in (self.folder, self.partial, self.old):
            shutil.rmtree(folder, ignore_errors=True)
