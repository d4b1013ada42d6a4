"""Merging coefficients as the result of a run: the rule that they are, and the files that keep it."""

from __future__ import annotations

import hashlib
import json
import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from expert_merging.context import Context
from expert_merging.documents import read_object
from expert_merging.errors import InputError
from expert_merging.kept import Kept, Written
from expert_merging.learned.axes import AXES, RUNS, SINGULAR
from expert_merging.learned.directions import TASK_VECTORS, TRIMMED, WEIGHTS
from expert_merging.learned.same_weights import check_rewritten
from expert_merging.libraries import import_transformers
from expert_merging.method import Unit
from expert_merging.parts import Part
from expert_merging.run import Run
from expert_merging.workers import fitting_threads
from expert_merging.writing import write_atomically

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Coefficients:
    """Coefficients of every merged parameter.

    Args:
        experts: expert names, in the order of the rows.
        values: ``(experts, chunks)`` float32 by parameter name.
        task_vector_scale: a factor on each expert's directions, one per expert.
        fixed: parameters whose coefficients were not trained.
        provenance: where they come from, for the reader.
        directions: what they multiply, as `expert_merging.learned.directions.Directions.record` has it.
        axes: along what a parameter's coefficients are, by its name, where they are not those of chunks.
        checkpoints: digests of the weights of ``base`` and experts that they were learned with, where it is known.
    """

    experts: tuple[str, ...]
    values: Mapping[str, Tensor]
    task_vector_scale: tuple[float, ...]
    fixed: tuple[str, ...] = ()
    provenance: Mapping[str, Any] | None = None
    directions: Mapping[str, Any] = field(default_factory=lambda: {"name": TASK_VECTORS, "options": {}})
    checkpoints: Mapping[str, str] = field(default_factory=dict)
    axes: Mapping[str, str] = field(default_factory=dict)

    @property
    def is_whole(self) -> bool:
        """Whether the sum is the merged weights themselves, and no task vector."""
        return bool(self.directions["name"] == WEIGHTS)

    @property
    def unit(self) -> Unit:
        """What `merge` has to be fed."""
        return "matrix" if SINGULAR in self.axes.values() else "entries"

    def merge(self, directions: Tensor, part: Part) -> Tensor:
        """The sum of the directions of a block, each entry times its coefficient.

        Args:
            directions: ``(experts, *shape)``.
            part: where the entries stand.

        Returns:
            ``(*shape)``
        """
        scale = torch.tensor(self.task_vector_scale, device=directions.device)
        effective = self.values[part.name].to(directions.device) * scale[:, None]
        axis = AXES[self.axes[part.name]] if part.name in self.axes else RUNS
        return axis.apply(effective, directions.reshape(len(directions), -1), part).view(directions.shape[1:])

    @property
    def _multiplied(self) -> dict[str, Any]:
        """What they multiply, where it is not chunks of task vectors."""
        named = {} if self.directions["name"] == TASK_VECTORS else {"directions": dict(self.directions)}
        return named | ({"axes": dict(self.axes)} if self.axes else {})

    def fingerprint(self) -> str:
        """A digest of the values and of all that decides what they do."""
        decisive: list[Any] = [self.experts, self.task_vector_scale, list(self.values), *self._multiplied.values()]
        digest = hashlib.sha256(json.dumps(decisive).encode())
        for value in self.values.values():
            digest.update(value.contiguous().numpy().tobytes())
        return digest.hexdigest()[:16]

    def save(self, file: Path, kept: Kept | None = None) -> None:
        """Write the values and, beside them, a ``.json`` that says what they belong to (and may be edited).

        Args:
            file: the file of the values.
            kept: notes both first.
        """
        described = {
            "experts": list(self.experts),
            "task_vector_scale": list(self.task_vector_scale),
            "chunks": {name: value.shape[1] for name, value in self.values.items()},
            "fixed": list(self.fixed),
            "checkpoints": dict(self.checkpoints),
            "provenance": self.provenance or {},
            **self._multiplied,
        }
        contents = {
            file.with_suffix(".json"): (json.dumps(described, indent=2) + "\n").encode(),
            file: save({name: value.contiguous().cpu() for name, value in self.values.items()}),
        }
        if kept is not None:
            kept.note({target.name: Written.of(content) for target, content in contents.items()})
        for target, content in contents.items():
            write_atomically(target, content)

    def published(self) -> bytes | None:
        """The published format: for each parameter a value, or a list per chunk, for each expert.

        None where there are others than those of chunks, which it cannot hold.
        """
        if self.axes:
            return None
        readable = {
            name.replace(".", "_"): (value[:, 0] if value.shape[1] == 1 else value).tolist()
            for name, value in self.values.items()
        }
        return (json.dumps(readable, indent=4) + "\n").encode()

    def save_published(self, file: Path) -> None:
        """Write the published format, where it can hold the coefficients."""
        content = self.published()
        if content is not None:
            write_atomically(file, content)


def load_coefficients(place: Path) -> Coefficients:
    """Read coefficients from a run folder or a ``.safetensors`` file with its ``.json`` beside it.

    Raises:
        InputError: they are missing, damaged or do not fit together.
    """
    file = Run(place).coefficients if place.is_dir() else place
    described_in = file.with_suffix(".json")
    for needed in (file, described_in):
        if not needed.is_file():
            raise InputError(
                f"--coefficients {place}: {needed} does not exist; give a finished run of a method that learns, its "
                "coefficients.safetensors, or the published implementation's weight_coeffs.json"
            )
    described = read_object(described_in, advice="learn them again")
    try:
        values = load_file(file)
        chunks = {str(name): _count(count) for name, count in described["chunks"].items()}
        coefficients = Coefficients(
            experts=tuple(map(str, described["experts"])),
            values={name: values[name].float() for name in chunks},
            task_vector_scale=tuple(float(scale) for scale in described["task_vector_scale"]),
            fixed=tuple(map(str, described["fixed"])),
            provenance=described["provenance"],
            directions=_read_directions(described),
            checkpoints={str(name): str(digest) for name, digest in described.get("checkpoints", {}).items()},
            axes={str(name): _axis(axis) for name, axis in described.get("axes", {}).items()},
        )
    except (SafetensorError, ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise InputError(f"{file} and {described_in.name} are not coefficients of a run ({error!r})") from None
    experts = len(coefficients.experts)
    broken = [name for name, value in coefficients.values.items() if not value.isfinite().all()]
    if broken:
        raise InputError(f"{file} has NaN or infinite coefficients for {broken[0]}; learn them again")
    if not all(map(math.isfinite, coefficients.task_vector_scale)):
        raise InputError(f"{described_in} has a task_vector_scale that is NaN or infinite; give every expert a number")
    wrong = [name for name, value in coefficients.values.items() if value.shape != (experts, chunks[name])]
    if wrong or len(coefficients.task_vector_scale) != experts:
        raise InputError(f"{file} and {described_in.name} disagree about {wrong[0] if wrong else 'task_vector_scale'}")
    return coefficients


def _count(given: Any) -> int:
    """A number of chunks, at least 1."""
    if isinstance(given, bool) or not isinstance(given, int) or given < 1:
        raise ValueError(f"{given!r} chunks")
    return given


def _axis(given: Any) -> str:
    """An axis by its name."""
    if given not in AXES:
        raise ValueError(f"coefficients along {given!r}")
    return str(given)


def kept_or_made(context: Context, make: Callable[[], Coefficients]) -> Coefficients:
    """The coefficients in the run's folder, made first if they are not there, with the threads that suit the model."""
    if context.run.coefficients.exists():
        logger.info("coefficients are there already: %s", context.run.coefficients)
        _check_kept(context.run)
        check_rewritten(context)
        return load_coefficients(context.run.coefficients)
    import_transformers()
    with fitting_threads(context.plan.base_elements):
        return make()


def _check_kept(run: Run) -> None:
    """Check that an earlier part's coefficients are what it has learned.

    Raises:
        InputError: they were damaged or edited.
    """
    for file in (run.coefficients, run.coefficients.with_suffix(".json")):
        if not run.kept.has(file):
            raise InputError(
                f"{file} is not what this run has learned; put that back, or remove coefficients.* to learn again "
                "(--method coefficients merges with edited ones)"
            )


def _read_directions(described: Mapping[str, Any]) -> dict[str, Any]:
    """What coefficients multiply, by the description in their file."""
    if "trimming" in described:  # as version 0.2 wrote it
        trimming = described["trimming"]
        return {"name": TRIMMED, "options": {name: trimming[name] for name in ("thresholds", "majority")}}
    given = described.get("directions", {"name": TASK_VECTORS, "options": {}})
    return {"name": str(given["name"]), "options": dict(given["options"])}
