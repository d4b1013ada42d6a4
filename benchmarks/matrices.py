"""Time of the methods that work on matrices, against plain ways to the same result.

The plain ways are `torch.linalg.svd` for ``iso`` and ``svd``, and for ``wudi`` one product per expert and step. A tenth
of the default number of steps is enough to compare them.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING

from benchmarks.shapes import config_of, is_merged, parameter_shapes

if TYPE_CHECKING:
    from torch import Tensor

    Rule = Callable[[Tensor], Tensor]
    Figures = dict[str, float]


_STEPS = 30


def plain_iso(task_vectors: Tensor) -> Tensor:
    """Iso-C as it is written in the paper."""
    import torch

    left, values, right = torch.linalg.svd(task_vectors.sum(0), full_matrices=False)
    merged: Tensor = left @ right * values.mean()
    return merged


def plain_svd(task_vectors: Tensor) -> Tensor:
    """TSV-M as it is written in the paper: a decomposition per expert and one per side."""
    import torch

    count = min(task_vectors.shape[1:]) // len(task_vectors)
    triples = [torch.linalg.svd(task_vector, full_matrices=False) for task_vector in task_vectors]
    sides = []
    for side in (
        torch.cat([left[:, :count] for left, _, _ in triples], 1),
        torch.cat([right[:count] for _, _, right in triples]),
    ):
        left, _, right = torch.linalg.svd(side, full_matrices=False)
        sides.append(left @ right)
    merged: Tensor = (sides[0] * torch.cat([values[:count] for _, values, _ in triples])) @ sides[1]
    return merged


def plain_wudi(task_vectors: Tensor) -> Tensor:
    """WUDI with Adam, as its authors compute it but with the experts' Gram matrices made once."""
    import torch

    squares = task_vectors.square().sum((1, 2), keepdim=True)
    grams = task_vectors.mT @ task_vectors / squares
    merged = torch.nn.Parameter(task_vectors.sum(0))
    optimizer = torch.optim.Adam([merged], lr=1e-5)
    for _ in range(_STEPS):
        differences = merged.detach() - task_vectors
        merged.grad = sum(
            (difference @ gram for difference, gram in zip(differences, grams, strict=True)), torch.zeros_like(merged)
        ).mul_(2)
        optimizer.step()
    return merged.detach()


PLAIN: dict[str, Rule] = {"iso": plain_iso, "svd": plain_svd, "wudi": plain_wudi}


def measure_matrices(model: str, experts: int, device: str, methods: list[str]) -> dict[str, dict[str, Figures]]:
    """Seconds of each method and of the plain way, for each shape of matrix and for whole layers, one per thread.

    On a CPU a single matrix is merged with one thread both ways. The matrices of the layers are merged side by side
    with a thread each, as in a merge, while the plain way takes one after another with as many threads.

    Args:
        model: key of `benchmarks.shapes.SHAPES`.
        experts: number of experts.
        device: where to compute.
        methods: some of `PLAIN`.

    Returns:
        By method and shape: seconds, plain_seconds, times_faster and the relative difference of the results.
    """
    import torch

    from expert_merging.methods import spectral, wudi

    rules: dict[str, Rule] = {"iso": spectral.iso, "svd": spectral.svd, "wudi": partial(wudi.wudi, steps=_STEPS)}
    generator = torch.Generator().manual_seed(0)
    layer = parameter_shapes(config_of(model, layers=1)).items()
    shapes = [shape for name, shape in layer if ".layers." in name and is_merged(name, shape)]
    given = {
        shape: (torch.randn(experts, *shape, generator=generator) * 0.002).to(device) for shape in dict.fromkeys(shapes)
    }
    threads = torch.get_num_threads() if device == "cpu" else 3
    figures: dict[str, dict[str, Figures]] = {}
    for method in methods:
        rule, plain = rules[method], PLAIN[method]
        figures[method] = {
            f"{shape[0]} x {shape[1]}": _compare(rule, plain, [task_vectors], 1)
            for shape, task_vectors in given.items()
        }
        figures[method]["layers"] = _compare(rule, plain, [given[shape] for shape in shapes * threads], threads)
    return figures


def _compare(rule: Rule, plain: Rule, given: list[Tensor], threads: int) -> Figures:
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    seconds, merged = _timed(lambda: _side_by_side(rule, given, threads))
    plain_seconds, expected = _timed(lambda: [plain(task_vectors) for task_vectors in given])
    torch.set_num_threads(before)
    differences = [float((one - other).norm() / other.norm()) for one, other in zip(merged, expected, strict=True)]
    return {
        "seconds": seconds,
        "plain_seconds": plain_seconds,
        "times_faster": plain_seconds / seconds,
        "difference": max(differences),
    }


def _side_by_side(rule: Rule, given: list[Tensor], workers: int) -> list[Tensor]:
    """Merge matrices as the driver does: the largest first, each with one thread."""
    import torch

    order = sorted(range(len(given)), key=lambda index: -given[index].numel())
    with ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        merged = dict(zip(order, pool.map(rule, [given[index] for index in order]), strict=True))
    torch.set_num_threads(workers)
    return [merged[index] for index in range(len(given))]


def _timed(work: Callable[[], list[Tensor]]) -> tuple[float, list[Tensor]]:
    """Seconds of the faster of two repeats, and what the last one gave."""
    import torch

    seconds, result = [], []
    for _ in range(2):
        start = time.perf_counter()
        result = work()
        if result[0].is_cuda:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return min(seconds), result
