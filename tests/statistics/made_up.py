"""Task vectors, and Gram matrices of inputs that are made up; what methods on them must be in simple cases."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch

from expert_merging.parts import Part
from expert_merging.statistics.gram import Gram

OUTPUTS, INPUTS = 5, 8
PART = Part.whole("layers.0.weight", (OUTPUTS, INPUTS))
FEW, MANY = (2, 3, 2), (9, 30, 12)
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


@dataclass(frozen=True)
class Given:
    """Gram matrices as the method asks for them."""

    grams: tuple[Gram | None, ...]

    def of(self, name: str) -> tuple[Gram | None, ...]:
        assert name == PART.name
        return self.grams


def inputs_of(counts: tuple[int, ...], seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(INPUTS, INPUTS, generator=generator)
    return [torch.randn(count, INPUTS, generator=generator) @ mixing for count in counts]


def kept(vectors: torch.Tensor) -> Gram:
    return Gram(vectors, len(vectors), is_summed=False)


def summed(vectors: torch.Tensor) -> Gram:
    return Gram(vectors.T @ vectors, len(vectors), is_summed=True)


def task_vectors(experts: int = 3) -> torch.Tensor:
    return torch.randn(experts, OUTPUTS, INPUTS, generator=torch.Generator().manual_seed(1))


def check_simple_cases(
    merged: Callable[[torch.Tensor, Iterable[Gram | None]], torch.Tensor],
    counts: tuple[int, ...],
    form: Callable[[torch.Tensor], Gram],
    *,
    close: dict[str, Any],
    loose: dict[str, Any],
) -> None:
    """Check what every method on Gram matrices must give.

    Args:
        merged: the method.
        counts: vectors of each expert.
        form: how they are kept.
        close: tolerance where the result is known.
        loose: tolerance of another order of the experts.
    """
    given = task_vectors()
    grams = [form(vectors) for vectors in inputs_of(counts)]
    assert merged(given[:1], grams[:1]).equal(given[0]), "one expert"
    torch.testing.assert_close(merged(given[:1].expand(3, -1, -1), grams), given[0], **close)
    torch.testing.assert_close(merged(given, [grams[1]] * 3), given.mean(0), **close)
    torch.testing.assert_close(merged(given, [None] * 3), given.mean(0))
    zeros = [form(torch.zeros(count, INPUTS)) for count in counts]
    torch.testing.assert_close(merged(given, zeros), given.mean(0))
    order = [2, 0, 1]
    result = merged(given, grams)
    torch.testing.assert_close(merged(given[order], [grams[index] for index in order]), result, **loose)
