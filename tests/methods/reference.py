"""Plain twins of the matrix methods, written for clarity: `torch.linalg.svd`, autograd, one product per expert."""

from __future__ import annotations

import torch
from torch import Tensor

ROUNDING = 2.0**-23


def rounding_floor(task_vectors: Tensor) -> float:
    return ROUNDING * sum(float(torch.linalg.matrix_norm(task_vector)) for task_vector in task_vectors)


def polar(matrix: Tensor, floor: float) -> Tensor:
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    kept = values > floor
    return left[:, kept] @ right[kept]


def svd_reference(task_vectors: Tensor) -> Tensor:
    """TSV-M of matrices ``(experts, rows, columns)``, in the dtype given."""
    count = max(1, min(task_vectors.shape[1:]) // len(task_vectors))
    lefts, all_values, rights = [], [], []
    for task_vector in task_vectors:
        left, values, right = torch.linalg.svd(task_vector, full_matrices=False)
        kept = int((values[:count] > rounding_floor(task_vector[None])).sum())
        lefts.append(left[:, :kept])
        all_values.append(values[:kept])
        rights.append(right[:kept])
    left, right = polar(torch.cat(lefts, 1), 1e-5), polar(torch.cat(rights), 1e-5)
    return left @ torch.diag(torch.cat(all_values)) @ right


def iso_reference(task_vectors: Tensor) -> Tensor:
    """Iso-C of matrices ``(experts, rows, columns)``, in the dtype given."""
    left, values, right = torch.linalg.svd(task_vectors.sum(0), full_matrices=False)
    kept = values > rounding_floor(task_vectors)
    return left[:, kept] @ right[kept] * values[kept].sum() / max(1, int(kept.sum()))


def iso_cts_reference(task_vectors: Tensor, common_space_fraction: float = 0.8) -> Tensor:
    """Iso-CTS of matrices ``(experts, rows, columns)`` of full rank, in the dtype given."""
    experts, side = len(task_vectors), min(task_vectors.shape[1:])
    own = round((side - int(side * common_space_fraction)) / experts)
    common = side - experts * own
    left, values, right = torch.linalg.svd(task_vectors.sum(0), full_matrices=False)
    common_left = left[:, :common]
    lefts, all_values, rights = [common_left], [values[:common]], [right[:common]]
    for task_vector in task_vectors:
        left, values, right = torch.linalg.svd(task_vector - common_left @ common_left.T @ task_vector)
        lefts.append(left[:, :own])
        all_values.append(values[:own])
        rights.append(right[:own])
    return polar(torch.cat(lefts, 1), 0.0) @ polar(torch.cat(rights), 0.0) * torch.cat(all_values).mean()


def interference(merged: Tensor, targets: Tensor, projections: Tensor, task_vectors: Tensor) -> Tensor:
    """WUDI's loss, as the authors' scripts compute it: one product per expert."""
    products = (merged - targets) @ projections.transpose(1, 2)
    return (products.square() / task_vectors.square().sum((1, 2), keepdim=True)).sum()


def minimise(
    start: Tensor,
    targets: Tensor,
    projections: Tensor,
    task_vectors: Tensor,
    make_optimizer: type[torch.optim.Optimizer],
    steps: int,
    **options: float,
) -> Tensor:
    merged = torch.nn.Parameter(start.clone())
    optimizer = make_optimizer([merged], **options)
    for _ in range(steps):
        optimizer.zero_grad()
        interference(merged, targets, projections, task_vectors).backward()
        optimizer.step()
    return merged.detach()


def wudi_reference(task_vectors: Tensor, steps: int = 300, step_size: float = 1e-5) -> Tensor:
    """WUDI of matrices ``(experts, rows, columns)``: Adam from the sum."""
    start = task_vectors.sum(0)
    return minimise(start, task_vectors, task_vectors, task_vectors, torch.optim.Adam, steps, lr=step_size)


def wudi2_reference(task_vectors: Tensor, variant: str = "centered", steps: int = 300) -> Tensor:
    """WUDI v2 of matrices ``(experts, rows, columns)``, both published variants."""
    count = max(1, min(task_vectors.shape[1:]) // len(task_vectors))
    mean = task_vectors.mean(0)
    centre = mean if variant == "centered" else torch.zeros_like(mean)
    projections, targets = [], []
    for task_vector in task_vectors:
        _, values, right = torch.linalg.svd(task_vector, full_matrices=False)
        projections.append(torch.diag(values[:count]) @ right[:count])
        left, values, right = torch.linalg.svd(task_vector - centre, full_matrices=False)
        targets.append(left[:, :count] @ torch.diag(values[:count]) @ right[:count] + centre)
    given = (torch.stack(targets), torch.stack(projections), task_vectors)
    if variant == "centered":
        return minimise(task_vectors.sum(0), *given, torch.optim.Adam, steps, lr=1e-5)
    return minimise(mean, *given, torch.optim.SGD, steps, lr=1e-4, momentum=0.9)


def flow_reference(start: Tensor, task_vectors: Tensor, duration: float, step: float) -> Tensor:
    """Gradient flow on half of WUDI's loss, by small steps of the classic Runge-Kutta method."""

    def velocity(merged: Tensor) -> Tensor:
        merged = merged.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(interference(merged, task_vectors, task_vectors, task_vectors) / 2, merged)
        return -gradient

    merged = start
    for _ in range(round(duration / step)):
        first = velocity(merged)
        second = velocity(merged + step / 2 * first)
        third = velocity(merged + step / 2 * second)
        fourth = velocity(merged + step * third)
        merged = merged + step / 6 * (first + 2 * second + 2 * third + fourth)
    return merged
