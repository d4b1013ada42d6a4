"""One run's folder; the only place that names a path under ``results/logs/<method>/<run_name>/``."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import subprocess
from collections.abc import Mapping
from datetime import datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from expert_merging import __version__
from expert_merging.documents import read_object, resolved
from expert_merging.errors import InputError
from expert_merging.kept import Kept
from expert_merging.writing import partial_name, sync_folder, take_hold, write_atomically

# Entries of config.json that decide the result; a folder is continued only by a run that agrees in all of them.
_DECISIVE = ("family", "method", "options", "checkpoints", "inputs")
# What the kernel tells of locks.
_LOCKS = Path("/proc/locks")
# Options that say where checkpoints are; what they are is said by their fingerprints.
_PLACES = ("base_model_path", "expert")
# What every record has, and other files of that name have not.
_KINDS = {"family": str, "method": str, "options": dict}


class Run:
    """Paths and state of a run.

    ``model.partial/`` becomes ``model/`` when it is complete, so a folder of that name is always a finished model.

    Args:
        folder: ``<output_path>/<method>/<run_name>``.

    Attributes:
        kept: digests of what the run has written.
        holds_several: the result is a folder of models, ``models/``, instead of one.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.log = folder / "merge.log"
        self.config = folder / "config.json"
        self.lock = folder / ".lock"
        self.holds_several = False
        self.board = folder / "board"
        self.state = folder / "state"
        self.evaluations = folder / "evaluations.json"
        self.responses = folder / "responses.json"
        self.scores = folder / "scores.json"
        self.statistics = folder / "statistics"
        self.calibrated = folder / "calibrated"
        self.coefficients = folder / "coefficients.safetensors"
        self.weight_coeffs = folder / "weight_coeffs.json"
        self.analysis = folder / "analysis"
        self.directions = folder / "directions"
        self.start = folder / "start.json"
        self.coefficient = folder / "coefficient.json"
        self.magnitudes = folder / "magnitudes.json"
        self.outcome = folder / "outcome.json"
        # Shared by all runs of an output folder; None to keep nothing there.
        self.targets: Path | None = folder.parent.parent / "targets"
        self.kept = Kept(folder / "digests.json")
        self._lock: int | None = None

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
        is_stage = self.config.parent != self.folder
        return " ".join(resolved(self.folder).parts[-3 if is_stage else -2 :])

    @property
    def model(self) -> Path:
        """The result, once it is complete."""
        return self.folder / ("models" if self.holds_several else "model")

    @property
    def partial_model(self) -> Path:
        """Where the result is written until it is complete."""
        return partial_name(self.model)

    @property
    def is_complete(self) -> bool:
        """Whether the merged model is there."""
        return self.model.is_dir()

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
        stage = Run(self.folder / name)
        stage.responses, stage.directions, stage.board = self.responses, self.directions, self.board
        stage.config, stage.magnitudes, stage.targets = self.config, self.magnitudes, self.targets
        return stage

    def check(self, description: Mapping[str, Any]) -> dict[str, Any] | None:
        """Check that the folder is free or holds an earlier part of the same run.

        Args:
            description: what `begin` will write.

        Returns:
            The earlier part's ``config.json``, None for a new run.

        Raises:
            InputError: the folder holds something else; what differs is named.
        """
        existing = next(path for path in (self.folder, *self.folder.parents) if os.path.lexists(path))
        if existing.is_symlink() and not existing.exists():
            raise InputError(f"{existing} is a link that leads nowhere; remove it")
        if not existing.is_dir():
            raise InputError(f"{existing} is a file where the run needs a folder; move it away")
        # A run that was stopped in its first moments, or that another process is just beginning, is no other run.
        if existing != self.folder or {path.name for path in self.folder.iterdir()} <= {
            partial_name(self.config).name,
            self.lock.name,
        }:
            return None
        advice = "choose another --run_name, or move the folder away"
        earlier = self.record
        if earlier is None:
            raise InputError(f"{self.folder} is in use and has no readable config.json of a run; {advice}")
        differing = _differences(earlier, description)
        if differing:
            raise InputError(f"{self.folder} holds a different run ({'; '.join(differing)}); {advice}")
        return earlier

    def recorded_seed(self, default: int) -> int:
        """The seed that an earlier part of the run used, the default where there was none."""
        seed = (self.record or {}).get("seed")
        return seed if isinstance(seed, int) else default

    @property
    def record(self) -> dict[str, Any] | None:
        """``config.json`` of an earlier part, None where there is none or something else, such as a model's."""
        record = self._read()
        return record if record is not None and _is_of_run(record) else None

    def merged_from(self) -> dict[str, Any] | None:
        """Like `record`, which other programs than the run's own need in full.

        Raises:
            InputError: there is one, and it does not say what was merged.
        """
        record = self._read()
        if record is not None and not (_is_of_run(record) and _says_what_was_merged(record)):
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
        return record if set(_KINDS) <= set(record) else None

    def begin(self, description: Mapping[str, Any]) -> None:
        """Make the folder, take hold of it and write ``config.json``.

        Raises:
            InputError: another process is writing to the folder.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = take_hold(self.lock, "--run_name")
        if not self.config.exists():
            write_atomically(self.config, (json.dumps(description, indent=2) + "\n").encode())

    def finish(self) -> None:
        """Give the complete model folder its name."""
        os.rename(self.partial_model, self.model)
        sync_folder(self.folder)

    def release(self) -> None:
        """Let go of the folder."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


def digest_of_run(description: Mapping[str, Any]) -> str:
    """Eight digits that the same command always gets, so that it finds its own earlier part and continues it."""
    # Options in any order; but in an option's own value, and among the experts, the order decides.
    options = sorted(_decisive_options(description).items())
    checkpoints = list(description["checkpoints"].items())
    decisive = json.dumps([description["family"], description["method"], options, checkpoints])
    return hashlib.sha256(decisive.encode()).hexdigest()[:8]


def _is_of_run(record: Mapping[str, Any]) -> bool:
    return all(isinstance(record[name], kind) for name, kind in _KINDS.items())


def _says_what_was_merged(record: Mapping[str, Any]) -> bool:
    options = record["options"]
    return (
        isinstance(record.get("checkpoints"), Mapping)
        and isinstance(options.get("base_model_path"), str)
        and isinstance(options.get("expert"), Mapping)
        and all(isinstance(place, str) for place in options["expert"].values())
        and _is_list_of_texts(options.get("exclude_params"))
        and _is_list_of_texts(options.get("post") or [])
    )


def _is_list_of_texts(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(text, str) for text in value)


def _differences(earlier: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    differing = []
    earlier, now = ({**record, "options": _decisive_options(record)} for record in (earlier, now))
    for key in _DECISIVE:
        before, after = earlier.get(key), now[key]
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            for name in {**before, **after}:
                differing += _difference(name, before.get(name), after.get(name))
            if key == "checkpoints" and before == after:
                differing += _difference(key, before, after)
        else:
            differing += _difference(key, before, after)
    return differing


def _decisive_options(record: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in record["options"].items() if name not in _PLACES}


def _difference(name: str, before: Any, after: Any) -> list[str]:
    """How a value differs, if it does; the order of its entries counts, as that of experts and of patterns does."""
    if before != after:
        return [f"{name}: {_short(before)} there, {_short(after)} now"]
    if isinstance(before, Mapping) and list(before) != list(after):
        return [f"order of {name}: {', '.join(before)} there, {', '.join(after)} now"]
    return []


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."


def provenance() -> dict[str, Any]:
    """Versions, the repository's revision and the time, for the record."""
    return {
        "versions": {"expert_merging": __version__, "python": platform.python_version(), **library_versions()},
        "git_revision": _git_revision(),
        "started": datetime.now().astimezone().isoformat(timespec="seconds"),
    }


def library_versions() -> dict[str, str]:
    """Versions of the libraries that compute."""
    versions = {}
    for name in ("torch", "transformers", "accelerate", "safetensors"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return versions


def _git_revision() -> str | None:
    try:
        done = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=40"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
