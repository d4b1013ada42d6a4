"""Gram matrices of what goes into linear layers, and the files that keep them.

A layer of a large model has more inputs than a few samples have tokens. Then the input vectors themselves are kept,
which is smaller and exact: 1000 tokens of 14336 inputs take 29 MB in bfloat16, their Gram matrix 822 MB. Only where
there are more vectors than inputs are they added up.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from expert_merging.checkpoints.checkpoint import TORCH_NAMES, as_bytes
from expert_merging.digests import Piece, digest_of, sections_of
from expert_merging.kept import HEAD, Kept, Written
from expert_merging.outputs import Made, Slot, make_header
from expert_merging.writing import ShardWriter

_FILE_NAMES = {kind: name for name, kind in TORCH_NAMES.items()}
_LAYOUT = "grams"


@dataclass(frozen=True)
class Gram:
    """The mean of ``x x^T`` over input vectors ``x``; its parts are in float64 and on the device that is asked for.

    Args:
        values: the vectors, ``(vectors, inputs)``, or the sum of their outer products, ``(inputs, inputs)`` in float32.
        vectors: number of vectors.
        is_summed: which of the two it is.
    """

    values: Tensor
    vectors: int
    is_summed: bool

    @classmethod
    def of_squares(cls, squares: Tensor) -> Gram:
        """One of which only the diagonal counts, the mean squares ``(inputs,)``."""
        return cls(squares.sqrt()[None], 1, is_summed=False)

    def rows(self, device: torch.device) -> Tensor:
        """Vectors ``(vectors, inputs)`` whose outer products' sum is the matrix; only where they are kept."""
        if self.is_summed:
            raise ValueError("the vectors of a Gram matrix that was summed are gone")
        return self.values.to(device).double().div_(self.vectors**0.5)

    def matrix(self, device: torch.device) -> Tensor:
        """The matrix ``(inputs, inputs)``."""
        if self.is_summed:
            return self.values.to(device).double().div_(self.vectors)
        rows = self.rows(device)
        return rows.T @ rows

    def diagonal(self, device: torch.device) -> Tensor:
        """The mean square of each input, ``(inputs,)``."""
        if self.is_summed:
            return self.values.diagonal().to(device).double().div_(self.vectors)
        return self.rows(device).square_().sum(0)

    def product(self, left: Tensor) -> Tensor:
        """``left (rows, inputs)`` times the matrix."""
        if self.is_summed:
            return left @ self.matrix(left.device)
        rows = self.rows(left.device)
        return (left @ rows.T) @ rows


class GramSum:
    """A Gram matrix in the making, in the host's memory; products are computed where the vectors are.

    Attributes:
        vectors: number of vectors so far.
    """

    def __init__(self) -> None:
        self.vectors = 0
        self._kept: list[Tensor] = []
        self._sum: Tensor | None = None

    def add(self, vectors: Tensor) -> None:
        """Add vectors ``(vectors, inputs)`` of any floating-point type, which must not be overwritten later."""
        self.vectors += len(vectors)
        inputs = vectors.shape[1]
        if self._sum is None and self.vectors < inputs:
            self._kept.append(vectors.cpu())
            return
        if self._sum is None:
            self._sum = torch.zeros(inputs, inputs)
            while self._kept:
                self._add_products(self._kept.pop(0).to(vectors.device))
        self._add_products(vectors)

    def _add_products(self, vectors: Tensor) -> None:
        assert self._sum is not None  # noqa: S101  (made by the caller)
        exact = vectors.float()
        if exact.device.type == "cpu":
            self._sum.addmm_(exact.T, exact)
        else:
            self._sum += (exact.T @ exact).cpu()

    def finish(self) -> Gram:
        """What was added, and nothing is kept here any more."""
        values, self._sum = self._sum, None
        if values is not None:
            return Gram(values, self.vectors, is_summed=True)
        values = torch.cat(self._kept)
        self._kept.clear()
        return Gram(values, self.vectors, is_summed=False)


class KeptVectors(GramSum):
    """Keeps all vectors, in their order, however many they are."""

    def add(self, vectors: Tensor) -> None:
        """See `GramSum.add`."""
        self.vectors += len(vectors)
        self._kept.append(vectors.cpu())


def write_grams(target: Path, grams: Mapping[tuple[str, ...], Gram], kept: Kept | None = None) -> None:
    """Write Gram matrices to a safetensors file, which has its name only once it is complete.

    Args:
        target: the file.
        grams: by names of the tensors whose inputs they are of.
        kept: notes what is written.
    """
    layout = {
        str(number): {"tensors": names, "vectors": gram.vectors, "is_summed": gram.is_summed}
        for number, (names, gram) in enumerate(grams.items())
    }
    tensors = dict(zip(layout, (gram.values for gram in grams.values()), strict=True))
    slots = [
        Slot.of(key, _FILE_NAMES[str(tensor.dtype).removeprefix("torch.")], tuple(tensor.shape), Made(key))
        for key, tensor in tensors.items()
    ]
    header = make_header(slots, {_LAYOUT: json.dumps(layout)})
    size = len(header) + sum(slot.size for slot in slots)
    writer, pieces = ShardWriter(target, header, size), [Piece(0, len(header), digest_of(header))]
    try:
        for slot in slots:
            pieces.append(writer.write(as_bytes(tensors[slot.name].contiguous().view(-1)), sum(pieces[-1][:2])))
    except BaseException:
        writer.abandon()
        raise
    if kept is not None:
        runs = {name: piece[:2] for name, piece in zip([HEAD, *layout], pieces, strict=True)}
        kept.note({target.name: Written(size, sections_of(pieces, runs))})
    writer.finish()


class Grams:
    """Gram matrices of several experts, read from their files whenever they are asked for, by any thread or process.

    Args:
        files: file of each expert, by name and in order.
    """

    def __init__(self, files: Mapping[str, Path]) -> None:
        self.files = dict(files)
        self._layouts = {expert: _read_layout(file) for expert, file in files.items()}

    @property
    def names(self) -> set[str]:
        """Names of the tensors that some expert has a Gram matrix for."""
        return {name for layout in self._layouts.values() for entry in layout.values() for name in entry["tensors"]}

    def of(self, name: str) -> tuple[Gram | None, ...]:
        """Each expert's Gram matrix of a tensor's inputs; None where the expert's samples did not come by it."""
        return tuple(combined(self._read(expert, name)) for expert in self.files)

    def _read(self, expert: str, name: str) -> Iterable[Gram]:
        keys = {key: entry for key, entry in self._layouts[expert].items() if name in entry["tensors"]}
        with safe_open(self.files[expert], framework="pt") as file:
            return [Gram(file.get_tensor(key), keys[key]["vectors"], keys[key]["is_summed"]) for key in keys]


def _read_layout(file: Path) -> dict[str, Any]:
    with safe_open(file, framework="pt") as opened:
        layout: dict[str, Any] = json.loads(opened.metadata()[_LAYOUT])
    return layout


def combined(grams: Iterable[Gram]) -> Gram | None:
    """The Gram matrix of all their vectors; a layer can get its inputs together with other layers or without them."""
    found = list(grams)
    if len(found) < 2:
        return found[0] if found else None
    vectors = sum(gram.vectors for gram in found)
    if not any(gram.is_summed for gram in found):
        return Gram(torch.cat([gram.values for gram in found]), vectors, is_summed=False)
    total = torch.stack([gram.matrix(gram.values.device) * gram.vectors for gram in found]).sum(0)
    return Gram(total.float(), vectors, is_summed=True)
