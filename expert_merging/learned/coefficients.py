"""Merging coefficients: one number per expert and chunk of each parameter tensor, and the rule that applies them."""

from __future__ import annotations

import fnmatch
import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from expert_merging.errors import InputError
from expert_merging.methods.thresholds import elected_signs, trim
from expert_merging.parts import Part
from expert_merging.writing import write_atomically


def chunk_length(elements: int, chunks: int) -> int:
    """Entries per chunk when a flattened tensor is cut into that many contiguous runs, as `torch.chunk` cuts it."""
    return max(1, math.ceil(elements / chunks))


def chunk_count(elements: int, wanted: int) -> int:
    """Chunks that really result: `torch.chunk` may give fewer than asked, and each coefficient must have entries."""
    return math.ceil(elements / chunk_length(elements, wanted)) if elements else 1


def choose_chunks(sizes: Mapping[str, int], patterns: Mapping[str, int]) -> dict[str, int]:
    """Number of chunks of each parameter: 1, or what the last matching pattern says (0: not trained).

    Args:
        sizes: number of entries by parameter name.
        patterns: number of chunks by `fnmatch` pattern over parameter names.

    Raises:
        InputError: a pattern matches nothing, a number is negative, or nothing is left to train.
    """
    problems = [f"--coeffs_size_dict: {pattern!r} asks for {count} chunks; 0 fixes a parameter, 1 or more are trained"
                for pattern, count in patterns.items() if count < 0]  # fmt: skip
    chunks = dict.fromkeys(sizes, 1)
    for pattern, count in patterns.items():
        matching = fnmatch.filter(sizes, pattern)
        if not matching:
            problems.append(
                f"--coeffs_size_dict: {pattern!r} matches no merged parameter (a name looks like {next(iter(sizes))})"
            )
        chunks |= {name: chunk_count(sizes[name], count) if count > 0 else 0 for name in matching}
    if not problems and not any(chunks.values()):
        problems.append("--coeffs_size_dict fixes every parameter; nothing is left to learn")
    if problems:
        raise InputError(*problems)
    return chunks


def apply(coefficients: Tensor, task_vectors: Tensor, start: int, elements: int) -> Tensor:
    """Sum of task vectors, each chunk times its coefficient (paper, Eq. 5).

    Args:
        coefficients: ``(experts, chunks)``.
        task_vectors: ``(experts, entries)``, a run of the flattened tensor.
        start: position of the first of the entries in the flattened tensor.
        elements: size of the whole tensor.

    Returns:
        ``(entries,)``
    """
    experts, chunks = coefficients.shape
    merged = torch.empty_like(task_vectors[0])
    for chunk, run in _runs(start, task_vectors.shape[1], elements, chunks):
        torch.mul(task_vectors[0, run], coefficients[0, chunk], out=merged[run])
        for expert in range(1, experts):
            merged[run].addcmul_(task_vectors[expert, run], coefficients[expert, chunk])
    return merged


def add_applied(total: Tensor, coefficients: Tensor, task_vectors: Tensor, start: int, elements: int) -> None:
    """Add what `apply` gives, up to rounding; on a CPU with one pass over the task vectors.

    Args:
        total: ``(entries,)``, the base weights, added to.
        coefficients: ``(experts, chunks)``.
        task_vectors: ``(experts, entries)``, a run of the flattened tensor.
        start: position of the first of the entries in the flattened tensor.
        elements: size of the whole tensor.
    """
    if total.is_cuda:
        total.add_(apply(coefficients, task_vectors, start, elements))
        return
    for chunk, run in _runs(start, total.numel(), elements, coefficients.shape[1]):
        total[run].addmv_(task_vectors[:, run].t(), coefficients[:, chunk])


def _runs(start: int, entries: int, elements: int, chunks: int) -> Iterator[tuple[int, slice]]:
    """The chunks that a run of a flattened tensor touches, each with where in the run it is."""
    length = chunk_length(elements, chunks)
    stop = start + entries
    for chunk in range(start // length, math.ceil(stop / length)):
        yield chunk, slice(max(chunk * length, start) - start, min((chunk + 1) * length, stop) - start)


def add_inner_products(total: Tensor, gradient: Tensor, task_vectors: Tensor, start: int, elements: int) -> None:
    """Add ``<dL/dW, task vector>`` per expert and chunk, the gradient of the loss with respect to the coefficients.

    Args:
        total: ``(experts, chunks)``, added to.
        gradient: ``(entries,)``, dL/dW of a run of the flattened tensor.
        task_vectors: ``(experts, entries)`` of the same run.
        start: position of the first of the entries in the flattened tensor.
        elements: size of the whole tensor.
    """
    for chunk, run in _runs(start, gradient.numel(), elements, total.shape[1]):
        if gradient.is_cuda:  # where a product of so few and so long rows would occupy a part of the device
            products = torch.stack([torch.dot(row[run], gradient[run]) for row in task_vectors])
        else:
            products = torch.mv(task_vectors[:, run], gradient[run])
        total[:, chunk] += products


@dataclass(frozen=True)
class Trimming:
    """Task vectors as TIES leaves them before it averages: trimmed, and 0 where they disagree with the elected sign.

    Args:
        thresholds: smallest magnitude that is kept, per expert.
        majority: the sign elected where the kept entries sum to 0.
    """

    thresholds: tuple[float, ...]
    majority: float

    def __call__(self, task_vectors: Tensor) -> Tensor:
        """The entries that stay, the others 0; ``(experts, entries)`` to the same."""
        trimmed = trim(task_vectors.clone(), torch.tensor(self.thresholds))
        signs = elected_signs(trimmed, self.majority)
        return torch.stack([torch.where(row * signs > 0, row, 0.0) for row in trimmed])


@dataclass(frozen=True)
class Coefficients:
    """Coefficients of every merged parameter.

    Args:
        experts: expert names, in the order of the rows.
        values: ``(experts, chunks)`` float32 by parameter name.
        task_vector_scale: a factor on each expert's task vectors, one per expert.
        fixed: parameters whose coefficients were not trained.
        provenance: where they come from, for the reader.
        trimming: what is done to the task vectors before they are multiplied.
    """

    experts: tuple[str, ...]
    values: Mapping[str, Tensor]
    task_vector_scale: tuple[float, ...]
    fixed: tuple[str, ...] = ()
    provenance: Mapping[str, Any] | None = None
    trimming: Trimming | None = None

    def rule(self, task_vectors: Tensor, part: Part, /) -> Tensor:
        """The merged task vector of a block, see `expert_merging.plan.Rule`."""
        scale = torch.tensor(self.task_vector_scale, device=task_vectors.device)
        effective = self.values[part.name].to(task_vectors.device) * scale[:, None]
        entries = task_vectors.reshape(len(task_vectors), -1)
        if self.trimming is not None:
            entries = self.trimming(entries)
        return apply(effective, entries, part.start, math.prod(part.shape))

    def fingerprint(self) -> str:
        """A digest of the values and of all that decides what they do."""
        decisive: list[Any] = [self.experts, self.task_vector_scale, list(self.values)]
        if self.trimming is not None:
            decisive.append(asdict(self.trimming))
        digest = hashlib.sha256(json.dumps(decisive).encode())
        for value in self.values.values():
            digest.update(value.contiguous().numpy().tobytes())
        return digest.hexdigest()[:16]

    def save(self, file: Path) -> None:
        """Write the values and, beside them, a ``.json`` that says what they belong to (and may be edited)."""
        described = {
            "experts": list(self.experts),
            "task_vector_scale": list(self.task_vector_scale),
            "chunks": {name: value.shape[1] for name, value in self.values.items()},
            "fixed": list(self.fixed),
            "provenance": self.provenance or {},
            **({} if self.trimming is None else {"trimming": asdict(self.trimming)}),
        }
        write_atomically(file.with_suffix(".json"), (json.dumps(described, indent=2) + "\n").encode())
        write_atomically(file, save({name: value.contiguous().cpu() for name, value in self.values.items()}))

    def save_published(self, file: Path) -> None:
        """Write the published format: for each parameter a value, or a list per chunk, for each expert."""
        readable = {
            name.replace(".", "_"): (value[:, 0] if value.shape[1] == 1 else value).tolist()
            for name, value in self.values.items()
        }
        write_atomically(file, (json.dumps(readable, indent=4) + "\n").encode())


def load_coefficients(place: Path) -> Coefficients:
    """Read coefficients from a run folder or a ``.safetensors`` file with its ``.json`` beside it.

    Raises:
        InputError: they are missing, damaged or do not fit together.
    """
    file = place / "coefficients.safetensors" if place.is_dir() else place
    described_in = file.with_suffix(".json")
    for needed in (file, described_in):
        if not needed.is_file():
            raise InputError(
                f"--coefficients {place}: {needed} does not exist; give a finished run of a method that learns, or its "
                "coefficients.safetensors"
            )
    try:
        values = load_file(file)
        described = json.loads(described_in.read_text(encoding="utf-8"))
        coefficients = Coefficients(
            experts=tuple(described["experts"]),
            values={name: values[name].float() for name in described["chunks"]},
            task_vector_scale=tuple(float(scale) for scale in described["task_vector_scale"]),
            fixed=tuple(described["fixed"]),
            provenance=described["provenance"],
            trimming=_read_trimming(described),
        )
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{file} and {described_in.name} are not coefficients of a run ({error!r})") from None
    experts = len(coefficients.experts)
    broken = [name for name, value in coefficients.values.items() if not value.isfinite().all()]
    if broken:
        raise InputError(f"{file} has NaN or infinite coefficients for {broken[0]}; learn them again")
    wrong = [name for name, value in coefficients.values.items() if value.shape != (experts, described["chunks"][name])]
    if wrong or len(coefficients.task_vector_scale) != experts:
        raise InputError(f"{file} and {described_in.name} disagree about {wrong[0] if wrong else 'task_vector_scale'}")
    return coefficients


def _read_trimming(described: Mapping[str, Any]) -> Trimming | None:
    if "trimming" not in described:
        return None
    thresholds = tuple(float(threshold) for threshold in described["trimming"]["thresholds"])
    return Trimming(thresholds, float(described["trimming"]["majority"]))


class CoefficientVector(torch.nn.Module):
    """All trainable coefficients as one vector: ``value = sigmoid(raw)``, kept in float32 (published parametrisation).

    One vector instead of a parameter per tensor makes the optimizer step one operation; AdamW works entry by entry
    and the gradient is clipped over all coefficients together, so the result is the same.

    Args:
        chunks: number of chunks by parameter name, 0 for one that keeps its first value.
        initial: ``(experts,)`` initial value per expert, each in (0, 1).
        device: where the coefficients are, from the beginning: another device's sigmoid may round differently.
        start: ``(experts,)`` first values by parameter name where they are not the initial ones.
        shared: one coefficient per expert for all parameters together.
    """

    def __init__(
        self,
        chunks: Mapping[str, int],
        initial: Sequence[float],
        device: torch.device | str = "cpu",
        *,
        start: Mapping[str, Tensor] | None = None,
        shared: bool = False,
    ) -> None:
        super().__init__()
        self.experts = len(initial)
        usual = torch.tensor(initial, device=device)
        first = {name: (usual if start is None else start[name].to(device))[:, None] for name in chunks}
        self.places: dict[str, slice] = {}
        self.fixed = tuple(name for name, count in chunks.items() if count == 0)
        self.constants = {name: first[name] for name in self.fixed}
        rows, anchors = [], []
        position = 0
        for name, count in chunks.items():
            if count == 0:
                continue
            if not shared or position == 0:
                rows.append(first[name].expand(-1, count).reshape(-1))
                anchors.append(usual[:, None].expand(-1, count).reshape(-1))
                position += count * self.experts
            self.places[name] = slice(position - count * self.experts, position)
        self.raw = torch.nn.Parameter(torch.logit(torch.cat(rows)))
        # Not the given values but what rounding leaves of them: so the distance of initial values is exactly 0, and the
        # sign of a rounding error cannot steer the first update, whose step size Adam takes from signs alone.
        self.anchor: Tensor
        self.register_buffer("anchor", torch.sigmoid(torch.logit(torch.cat(anchors))))

    def forward(self) -> Tensor:
        """Values of all trainable coefficients, ``(coefficients,)``."""
        return torch.sigmoid(self.raw)

    def view(self, vector: Tensor, name: str) -> Tensor:
        """The part of a vector laid out like `raw` that belongs to a parameter, ``(experts, chunks)``."""
        return vector[self.places[name]].view(self.experts, -1)

    @torch.no_grad()
    def by_name(self) -> dict[str, Tensor]:
        """Current values of every parameter, the fixed ones included, ``(experts, chunks)`` each."""
        values = self()
        trained = {name: self.view(values, name).detach().clone() for name in self.places}
        return trained | {name: value.clone() for name, value in self.constants.items()}
