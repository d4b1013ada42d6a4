"""Matrices to try methods on, and what near means."""

from __future__ import annotations

import torch


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def low_rank(experts: int, rows: int, columns: int, rank: int, seed: int = 0) -> torch.Tensor:
    """Of that rank, but for the rounding to float32."""
    return (
        draw(experts, rows, rank, seed=seed).double() @ draw(experts, rank, columns, seed=seed + 1).double()
    ).float()


def orthogonal(side: int, seed: int) -> torch.Tensor:
    return torch.linalg.qr(draw(side, side, seed=seed).double())[0].float()


def assert_near(actual: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-4) -> None:
    distance = float((actual.double() - expected.double()).norm())
    assert distance <= tolerance * float(expected.double().norm()), distance
