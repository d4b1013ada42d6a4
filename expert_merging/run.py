"""One run's folder; the only place that names a path under ``results/logs/<method>/<run_name>/``."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from expert_merging.documents import read_object, resolved
from expert_merging.errors import InputError
from expert_merging.kept import Kept
from expert_merging.records import (
    KINDS,
    LENGTHS,
    differences,
    is_longer,
    is_of_run,
    of_same_length,
    says_what_was_merged,
)
from expert_merging.writing import partial_name, sync_folder, take_hold, write_atomically

# What the kernel tells of locks.
_LOCKS = Path("/proc/locks")

_ADVICE = "choose another --run_name, or move the folder away"


class Run:
    """Paths and state of a run.

    ``model.partial/`` becomes ``model/`` when it is complete, so a folder of that name is always a finished model.

    A finished run that learns longer works in a folder inside, `longer`. What is there takes the place of what the
    finished run has left when all of it is complete; until then, the finished run stays what it was.

    Args:
        folder: ``<output_path>/<method>/<run_name>``.
        work: where the run works until it is complete; the same folder by default.

    Attributes:
        owner: the folder of the run that this is, or is a stage of.
        kept: digests of what the run has written.
        holds_several: the result is a folder of models, ``models/``, instead of one.
        targets: where what experts say is kept for other runs; None to keep nothing.
    """

    def __init__(self, folder: Path, work: Path | None = None) -> None:
        self.folder = self.owner = folder
        self.log = folder / "merge.log"
        self.lock = folder / ".lock"
        self.holds_several = False
        self.board = folder / "board"
        self.evaluations = folder / "evaluations.json"
        self.responses = folder / "responses.json"
        self.scores = folder / "scores.json"
        self.statistics = folder / "statistics"
        self.directions = folder / "directions"
        self.front = folder / "front"
        self.start = folder / "start.json"
        self.coefficient = folder / "coefficient.json"
        self.multiples = folder / "multiples"
        self.stability = folder / "stability.json"
        self.magnitudes = folder / "magnitudes.json"
        self.targets: Path | None = None
        self._work_in(work or folder)
        self._lock: int | None = None

    def _work_in(self, work: Path) -> None:
        self.work = work
        self.config = work / "config.json"
        self.state = work / "state"
        self.coefficients = work / "coefficients.safetensors"
        self.weight_coeffs = work / "weight_coeffs.json"
        self.analysis = work / "analysis"
        self.calibrated = work / "calibrated"
        self.alignment = work / "alignment"
        self.outcome = work / "outcome.json"
        self.kept = Kept(work / "digests.json")

    @classmethod
    def named(cls, output_path: Path, method: str, run_name: str) -> Run:
        """The run of a method with that name."""
        return cls(output_path / method / run_name)

    @classmethod
    def found_at(cls, place: Path) -> Run | None:
        """The complete run whose folder, or whose model, a place is; None where it is neither."""
        folder = resolved(place)
        for run in (cls(folder), cls(folder.parent)):
            if run.is_complete and folder in (run.folder, run.model):
                return run
        return None

    @property
    def common_targets(self) -> Path:
        """Where all runs of its output folder keep what experts say."""
        return self.folder.parent.parent / "targets"

    @property
    def method(self) -> str:
        """Name of its method."""
        return self.folder.parent.name

    @property
    def name(self) -> str:
        """Its own name."""
        return self.folder.name

    @property
    def title(self) -> str:
        """What its pictures are called: method, name and, if it is one, stage."""
        return " ".join(resolved(self.folder).parts[-2 if self.folder == self.owner else -3 :])

    @property
    def model(self) -> Path:
        """The result, once it is complete."""
        return self.folder / ("models" if self.holds_several else "model")

    @property
    def partial_model(self) -> Path:
        """Where the result is written until it is complete."""
        return self.work / partial_name(self.model).name

    def trade_off(self, number: int) -> Path:
        """Coefficients of a search's trade-off of that number, 1 for the one that the model has."""
        return self.front / str(number) / self.coefficients.name

    @property
    def is_complete(self) -> bool:
        """Whether the merged model is there."""
        return self.model.is_dir() and not self.goes_on

    @property
    def is_held(self) -> bool:
        """Whether a process is writing to the folder now, as far as the system tells."""
        try:
            number = self.lock.stat().st_ino
            return any(line.split()[5].endswith(f":{number}") for line in _LOCKS.read_text("ascii").splitlines())
        except (OSError, ValueError, IndexError):
            return False

    def evaluation(self, folder: str = "") -> Path:
        """What VLMEvalKit is told of a model; outside of it, since it says where on this machine the model is.

        Args:
            folder: the model's place in the result, where there are several.
        """
        return self.folder / f"{'-'.join(filter(None, ['eval', folder]))}.json"

    def stage(self, name: str) -> Run:
        """A folder inside for what is learned on the way; what all stages use stays where it is."""
        stage = Run(self.folder / name, self.work / name)
        stage.owner = self.owner
        stage.responses, stage.directions, stage.board = self.responses, self.directions, self.board
        stage.config, stage.magnitudes, stage.targets = self.config, self.magnitudes, self.targets
        return stage

    @property
    def longer(self) -> Run:
        """This run, finished, while it learns longer."""
        return Run(self.folder, self.folder / "longer")

    @property
    def goes_on(self) -> bool:
        """Whether this is a finished run that learns longer."""
        return self.work != self.folder

    @property
    def last_state(self) -> Path | None:
        """The state of training in which the finished run has ended that this one goes on from."""
        return self.folder / self.state.name if self.goes_on else None

    def would_go_on(self, description: Mapping[str, Any]) -> bool:
        """Whether a run is this one, finished, and only learns longer, as far as options and checkpoints say.

        Args:
            description: as for `check`.
        """
        record = self.record
        is_finished = self.is_complete or self.longer.config.exists()  # or is being replaced
        return is_finished and record is not None and is_longer(record, description)

    def check(self, description: Mapping[str, Any]) -> dict[str, Any] | None:
        """Check that the folder is free or holds an earlier part of the same run.

        Args:
            description: what `begin` will write.

        Returns:
            The earlier part's ``config.json``, None for a new run.

        Raises:
            InputError: the folder holds something else; what differs is named.
        """
        if self.goes_on:
            finished = Run(self.folder).record or {"options": {}}
            _check_same(self.folder, of_same_length(finished, description), description)
        elif self.longer.config.exists() and not self.is_complete:
            raise InputError(f"{self.folder} was stopped while a longer run took its place; start that again")
        folder = self.work
        existing = next(path for path in (folder, *folder.parents) if os.path.lexists(path))
        if existing.is_symlink() and not existing.exists():
            raise InputError(f"{existing} is a link that leads nowhere; remove it")
        if not existing.is_dir():
            raise InputError(f"{existing} is a file where the run needs a folder; move it away")
        # A run that was stopped in its first moments, or that another process is just beginning, is no other run.
        if existing != folder or {path.name for path in folder.iterdir()} <= {
            partial_name(self.config).name,
            self.lock.name,
        }:
            return None
        earlier = self.record
        if earlier is None:
            raise InputError(f"{folder} is in use and has no readable config.json of a run; {_ADVICE}")
        _check_same(folder, earlier, description)
        return earlier

    def recorded_seed(self, default: int) -> int:
        """The seed that an earlier part of the run used, the default where there was none."""
        seed = (self.record or {}).get("seed")
        return seed if isinstance(seed, int) else default

    @property
    def record(self) -> dict[str, Any] | None:
        """``config.json`` of an earlier part, None where there is none or something else, such as a model's."""
        record = self._read()
        return record if record is not None and is_of_run(record) else None

    def merged_from(self) -> dict[str, Any] | None:
        """Like `record`, which other programs than the run's own need in full.

        Raises:
            InputError: there is one, and it does not say what was merged.
        """
        record = self._read()
        if record is not None and not (is_of_run(record) and says_what_was_merged(record)):
            raise InputError(f"{self.config} does not say what was merged; was it edited?")
        return record

    def _read(self) -> dict[str, Any] | None:
        """What calls itself a record of a run."""
        if not self.config.is_file():  # a pipe would be waited for
            return None
        try:
            record = read_object(self.config)
        except InputError:
            return None
        return record if set(KINDS) <= set(record) else None

    def begin(self, description: Mapping[str, Any]) -> None:
        """Make the folder, take hold of it and write ``config.json``.

        Raises:
            InputError: another process is writing to the folder.
        """
        self.work.mkdir(parents=True, exist_ok=True)
        self._lock = take_hold(self.lock, "--run_name")
        if not self.config.exists():
            write_atomically(self.config, (json.dumps(description, indent=2) + "\n").encode())

    def finish(self) -> None:
        """Give the complete model folder its name."""
        if self.goes_on:
            self._replace()
            return
        os.rename(self.partial_model, self.model)
        sync_folder(self.folder)

    def _replace(self) -> None:
        """Let what is complete take the place of what the finished run has left.

        The record comes last: until it is there, the same command does again what is missing. Coefficients count as
        missing without their values, which go before what describes them.
        """
        self.scores.unlink(missing_ok=True)  # of the model that is replaced
        last = (
            self.coefficients,
            self.coefficients.with_suffix(".json"),
            self.partial_model,
            self.kept.file,
            self.config,
        )
        for entry in (*({*self.work.iterdir()} - {*last}), *last):
            _put(entry, self.model if entry == self.partial_model else self.folder / entry.name)
            sync_folder(self.folder)
        shutil.rmtree(self.work)
        self._work_in(self.folder)

    def release(self) -> None:
        """Let go of the folder."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


def _check_same(folder: Path, earlier: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    if differing := differences(earlier, now):
        shorter = all(text.split(":")[0] in LENGTHS for text in differing)
        only = "a run can learn longer once it is finished, and never shorter; " if shorter else ""
        raise InputError(f"{folder} holds a different run ({'; '.join(differing)}); {only}{_ADVICE}")


def _put(entry: Path, target: Path) -> None:
    """Move a file or a folder to where an older one may be."""
    old = target.with_name(f"{target.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if target.is_dir():
        os.rename(target, old)
    os.replace(entry, target)
    shutil.rmtree(old, ignore_errors=True)
