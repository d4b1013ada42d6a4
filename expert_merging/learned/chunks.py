"""Coefficients of contiguous chunks of a flattened tensor: how many there are, what they do, and their gradient.

A coefficient for a whole tensor is one chunk, and a coefficient for each row of a matrix is as many chunks as it has
rows, so one pair of functions serves all.
"""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from expert_merging.errors import InputError
from expert_merging.parts import Part
from expert_merging.roles import is_matrix

# From so many whole chunks in a block on, they are worked on together. For three experts and blocks of 32768 entries on
# a CPU, a gradient takes 3100, 400 and 40 microseconds with a call for each of 256, 32 and 2 chunks, and 38 with a call
# for all of them.
_MANY = 32

# Along what they are, where that is no run of entries.
_AXES = {"column": "columns", "direction": "singular", "rank": "singular"}


def chunk_length(elements: int, chunks: int) -> int:
    """Entries per chunk when a flattened tensor is cut into that many contiguous runs, as `torch.chunk` cuts it."""
    return max(1, math.ceil(elements / chunks))


def chunk_count(elements: int, wanted: int) -> int:
    """Chunks that really result: `torch.chunk` may give fewer than asked, and each coefficient must have entries."""
    return math.ceil(elements / chunk_length(elements, wanted)) if elements else 1


def choose_chunks(parts: Iterable[Part], patterns: Mapping[str, int], parametrisation: str = "layer") -> dict[str, int]:
    """Number of chunks of each tensor: what the last matching pattern says (0: not trained), or the parametrisation.

    Args:
        parts: the tensors.
        patterns: number of chunks by `fnmatch` pattern over tensor names.
        parametrisation: ``row``, ``column``, ``direction`` or ``rank``: as many as a matrix has rows, columns or
            singular directions, where no pattern matches; otherwise one.

    Raises:
        InputError: a pattern matches nothing, a number is negative, chunks are asked for without a pattern, or nothing
            is left to train.
    """
    parts = list(parts)
    sizes = {part.name: part.elements for part in parts}
    problems = [f"--coeffs_size_dict: {pattern!r} asks for {count} chunks; 0 fixes a parameter, 1 or more are trained"
                for pattern, count in patterns.items() if count < 0]  # fmt: skip
    if parametrisation == "chunk" and not patterns:
        problems.append("--parametrisation chunk needs --coeffs_size_dict to say how many chunks, such as '{\"*\": 4}'")
    chunks = {part.name: _of_matrix(part, parametrisation) if is_matrix(part) else 1 for part in parts}
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


def _of_matrix(part: Part, parametrisation: str) -> int:
    rows, columns = part.shape
    smaller = min(rows, columns)
    return {"row": rows, "column": columns, "direction": smaller, "rank": smaller}.get(parametrisation, 1)


def choose_axes(parts: Iterable[Part], patterns: Mapping[str, int], parametrisation: str = "layer") -> dict[str, str]:
    """Tensors whose coefficients are not those of chunks, with what they are along; the others as `choose_chunks` says.

    Args:
        parts: the tensors.
        patterns: as for `choose_chunks`.
        parametrisation: as for `choose_chunks`.
    """
    if parametrisation not in _AXES:
        return {}
    matrices = [part.name for part in parts if is_matrix(part)]
    cut = {name for pattern in patterns for name in fnmatch.filter(matrices, pattern)}
    return {name: _AXES[parametrisation] for name in matrices if name not in cut}


@dataclass(frozen=True)
class _Run:
    """Chunks that a block of a flattened tensor touches and that are worked on at once.

    Args:
        chunks: their numbers; several only if the block has all entries of each.
        entries: where in the block they are.
    """

    chunks: slice
    entries: slice

    @property
    def is_single(self) -> bool:
        return self.count == 1

    @property
    def count(self) -> int:
        first, stop = self.chunks.start, self.chunks.stop
        return int(stop - first)

    def rows(self, values: Tensor) -> Tensor:
        """``(..., entries)`` of several chunks as ``(..., chunks, length)``."""
        return values.view(*values.shape[:-1], self.count, values.shape[-1] // self.count)


def _runs(start: int, entries: int, elements: int, chunks: int) -> Iterator[_Run]:
    """The chunks that a block touches: many whole ones together, and each of the others by itself."""
    length, stop = chunk_length(elements, chunks), start + entries
    first_whole, after_whole = math.ceil(start / length), stop // length
    if after_whole - first_whole < _MANY:
        first_whole = after_whole = math.ceil(stop / length)
    for chunk in (*range(start // length, first_whole), *range(after_whole, math.ceil(stop / length))):
        bounds = max(chunk * length, start) - start, min((chunk + 1) * length, stop) - start
        yield _Run(slice(chunk, chunk + 1), slice(*bounds))
    if first_whole < after_whole:
        yield _Run(slice(first_whole, after_whole), slice(first_whole * length - start, after_whole * length - start))


def apply(coefficients: Tensor, directions: Tensor, start: int, elements: int) -> Tensor:
    """Sum of the experts' directions, each chunk times its coefficient (paper, Eq. 5).

    Args:
        coefficients: ``(experts, chunks)``.
        directions: ``(experts, entries)``, a block of the flattened tensor.
        start: position of the first of the entries in the flattened tensor.
        elements: size of the whole tensor.

    Returns:
        ``(entries,)``
    """
    experts, chunks = coefficients.shape
    merged = torch.empty_like(directions[0])
    for run in _runs(start, directions.shape[1], elements, chunks):
        total, own = merged[run.entries], directions[:, run.entries]
        if run.is_single:
            factors = coefficients[:, run.chunks.start]
        else:
            total, own, factors = run.rows(total), run.rows(own), coefficients[:, run.chunks, None]
        torch.mul(own[0], factors[0], out=total)
        for expert in range(1, experts):
            total.addcmul_(own[expert], factors[expert])
    return merged


def add_applied(total: Tensor, coefficients: Tensor, directions: Tensor, start: int, elements: int) -> None:
    """Add what `apply` gives, up to rounding; on a CPU with one pass over the directions.

    Args:
        total: ``(entries,)``, the base weights, added to.
        coefficients: ``(experts, chunks)``.
        directions: ``(experts, entries)``, a block of the flattened tensor.
        start: position of the first of the entries in the flattened tensor.
        elements: size of the whole tensor.
    """
    if total.is_cuda:
        total.add_(apply(coefficients, directions, start, elements))
        return
    for run in _runs(start, total.numel(), elements, coefficients.shape[1]):
        if run.is_single:
            total[run.entries].addmv_(directions[:, run.entries].t(), coefficients[:, run.chunks.start])
        else:
            rows = run.rows(total[run.entries])
            for values, own in zip(coefficients[:, run.chunks, None], directions[:, run.entries], strict=True):
                rows.addcmul_(run.rows(own), values)


def add_inner_products(total: Tensor, gradient: Tensor, directions: Tensor, start: int, elements: int) -> None:
    """Add ``<dL/dW, direction>`` per expert and chunk, the gradient of the loss with respect to the coefficients.

    Args:
        total: ``(experts, chunks)``, added to.
        gradient: ``(entries,)``, dL/dW of a block of the flattened tensor.
        directions: ``(experts, entries)`` of the same block.
        start: position of the first of the entries in the flattened tensor.
        elements: size of the whole tensor.
    """
    for run in _runs(start, gradient.numel(), elements, total.shape[1]):
        own, weights = directions[:, run.entries], gradient[run.entries]
        if not run.is_single:
            products = run.rows(own * weights).sum(-1)
        elif gradient.is_cuda:  # where a product of so few and so long rows would occupy a part of the device
            products = torch.stack([torch.dot(row, weights) for row in own])[:, None]
        else:
            products = torch.mv(own, weights)[:, None]
        total[:, run.chunks] += products
