"""How far training is, and the folder that it continues from: after an interruption, or to learn longer."""

from __future__ import annotations

import errno
import json
import logging
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from expert_merging.documents import read_object
from expert_merging.errors import InputError
from expert_merging.kept import digest_files
from expert_merging.writing import sync_files

logger = logging.getLogger(__name__)

_DIGESTS = "digests.json"
_TRAINING = "training.json"


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
        # Losses on the samples that were held out, by task, before training.
        self.first_losses: dict[str, float] = {}
        self.best_loss = math.inf
        self.epochs_without_better = 0
        # See `expert_merging.learned.history`.
        self.rows: list[dict[str, float]] = []
        self.snapshots: list[Any] = []

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

    def end_epoch(self, loss: float | None = None) -> bool:
        """Compare the epoch with the best so far.

        Args:
            loss: what it is compared by; None for its mean loss.

        Returns:
            Whether it is better.
        """
        loss = self.epoch_means["total"] if loss is None else loss
        better = loss < self.best_loss
        self.best_loss = min(loss, self.best_loss)
        self.epochs_without_better = 0 if better else self.epochs_without_better + 1
        self.epochs += 1
        self.epoch_losses, self.epoch_samples = {}, 0
        return better


def _check_digests(folder: Path) -> None:
    """Check that a saved state is what was saved.

    Raises:
        InputError: its digests cannot be read.
        ValueError: it is not.
    """
    noted = read_object(folder / _DIGESTS)
    found = digest_files(folder)
    differing = [name for name in noted if found.get(name) != noted[name]]
    if differing:
        raise ValueError(f"{differing[0]} is not what was saved")


class StateFolder:
    """A folder that is replaced as a whole, so that there is always one complete state.

    Args:
        folder: where the state is; the next one is written beside it, and the last one waits there until the new one
            has its name.
        before: another folder with a state to begin from where there is none yet; None to begin anew.
    """

    def __init__(self, folder: Path, before: Path | None = None) -> None:
        self.folder = folder
        self.before = before
        self.partial = folder.with_name(folder.name + ".partial")
        self.old = folder.with_name(folder.name + ".old")

    @property
    def found(self) -> list[Path]:
        """Complete states, the newest first."""
        return [place for place in (self.folder, self.old, self.before) if place is not None and place.exists()]

    def replace(self, write: Callable[[Path], None]) -> None:
        """Let ``write`` fill a folder, then swap it with the last one."""
        shutil.rmtree(self.partial, ignore_errors=True)
        write(self.partial)
        (self.partial / _DIGESTS).write_text(json.dumps(digest_files(self.partial)), encoding="utf-8")
        sync_files(self.partial)
        if self.folder.exists():
            shutil.rmtree(self.old, ignore_errors=True)
            os.rename(self.folder, self.old)
        os.rename(self.partial, self.folder)
        shutil.rmtree(self.old, ignore_errors=True)

    def begin(self) -> None:
        """Take over the state to begin from, which also a run that has nothing more to learn leaves."""
        if self.before is not None and self.found == [self.before]:
            shutil.rmtree(self.partial, ignore_errors=True)
            shutil.copytree(self.before, self.partial)
            os.rename(self.partial, self.folder)

    def save(self, accelerator: Any, trained: torch.nn.Module, state: TrainingState) -> None:
        """Save what a restart needs."""

        def write(folder: Path) -> None:
            with full_disk_as_os_error():
                accelerator.save_state(str(folder))
                save_file(trained.state_dict(), folder / "coefficients.safetensors")
            (folder / _TRAINING).write_text(json.dumps(vars(state)), encoding="utf-8")

        self.replace(write)

    def resume(self, accelerator: Any, trained: torch.nn.Module, state: TrainingState) -> None:
        """Take up the last saved state; what is damaged is passed over.

        Raises:
            InputError: the processes have not found the same.
        """
        for place in self.found:
            try:
                _check_digests(place)
                training = read_object(place / _TRAINING)
                if training.keys() != vars(state).keys():
                    raise ValueError("it is of another version")
                saved = load_file(place / "coefficients.safetensors")
                accelerator.load_state(str(place))
            except (InputError, OSError, EOFError, ValueError, RuntimeError, SafetensorError, UnpicklingError) as error:
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


def check_goes_on(last: Sequence[Path], epochs: int, patience: int) -> str:
    """Check that a finished run would learn more than it has.

    Args:
        last: the states of training in which its stages have ended.
        epochs: how many there are to be.
        patience: how many may go by without a better loss.

    Returns:
        How many epochs it has learned, in words, for the plan.

    Raises:
        InputError: it would end where it has ended.
    """
    ends = [end for place in last if (end := _end_of(place)) is not None]
    if len(ends) < len(last):
        return "the state in which the finished run has ended is not there, so all is learned again"
    done, waited = ends[-1]
    if all(done >= epochs or waited >= patience for done, waited in ends):
        worse = f", and the last {waited} had no better loss" if waited else ""
        raise InputError(
            f"the finished run would learn nothing more: it has ended after epoch {done}{worse}; give --num_epochs "
            f"above {done} and --patience above {waited}"
        )
    anew = ", and begins its second stage anew" if len(ends) > 1 else ""
    return f"goes on with the finished run after its epoch {ends[0][0]}{anew}"


def _end_of(state: Path) -> tuple[int, int] | None:
    """Epochs that were learned, and how many of the last ones without a better loss; None where nobody knows."""
    try:
        training = read_object(state / _TRAINING)
        return int(training["epochs"]), int(training["epochs_without_better"])
    except (InputError, KeyError, TypeError, ValueError):
        return None
