"""What merging a block costs step by step, beside reading its bytes: what keeps entry methods from the limit.

``python -m benchmarks.steps`` times on one thread what the driver does with a block of bfloat16 entries, for several
numbers of experts. Everything is relative to reading the experts' bytes of the block once, from the page cache.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable, Sequence

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from expert_merging.methods.linear import task_arithmetic
from expert_merging.methods.sparse import ties
from expert_merging.parts import Part
from expert_merging.streaming import BLOCK, STEP, in_float32

_NAME = "block"
# Share of an expert's entries that TIES keeps.
_DENSITY = 0.2


def steps_of(experts: int, repeats: int) -> dict[str, float]:
    """Seconds that each step of a block takes, the shortest of so many times, in the order of the work."""
    stored = torch.randn(experts + 1, BLOCK).bfloat16()
    rows, merged = torch.empty(experts + 1, STEP), torch.empty(STEP, dtype=torch.bfloat16)
    found = torch.randn(STEP)
    base, task_vectors = in_float32([stored], 0, rows)
    thresholds = {_NAME: task_vectors.abs().quantile(1 - _DENSITY, dim=1)}
    part = Part(_NAME, (BLOCK,), 0, STEP)

    def fresh() -> Tensor:
        return in_float32([stored], 0, rows)[1]

    def measure() -> None:
        torch.stack([torch.dot(found, found), torch.dot(base, base)]).tolist()

    count = BLOCK // STEP
    convert = _shortest(fresh, repeats)
    with tempfile.TemporaryFile() as file:
        file.write(bytes(2 * BLOCK * (experts + 1)))
        file.flush()
        buffer = memoryview(bytearray(2 * BLOCK))
        read = _shortest(
            lambda: [os.preadv(file.fileno(), [buffer], 2 * BLOCK * row) for row in range(experts)], repeats
        )
    return {
        "read the experts' bytes": read,
        "to float32, minus the base": count * convert,
        "look for NaN": count * _shortest(lambda: float(task_vectors.sum()), repeats),
        "task_arithmetic": count * _shortest(lambda: task_arithmetic(task_vectors), repeats),
        "ties, once thresholds are known": count
        * (_shortest(lambda: ties(fresh(), part, thresholds, {_NAME: 1.0}), repeats) - convert),
        "norms, plus the base, to bfloat16": count
        * (_shortest(measure, repeats) + _shortest(lambda: merged.copy_(base.add_(found)), repeats)),
    }


def _shortest(work: Callable[[], object], repeats: int) -> float:
    """Seconds of the shortest call: on a shared machine, longer ones measure the others."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return min(times)


def show(counts: Sequence[int], repeats: int) -> None:
    """Measure and print the table."""
    columns = {count: steps_of(count, repeats) for count in counts}
    table = Table("step", *(f"{count} experts" for count in counts))
    first = next(iter(columns.values()))
    read = next(iter(first))
    for name in first:
        table.add_row(name, *(f"{found[name] / found[read]:.2f}" for found in columns.values()))
    Console().print(table)


def main() -> None:
    """Measure and print what steps cost."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.steps", description=__doc__.split("\n")[0])
    parser.add_argument(
        "--experts", nargs="*", type=int, default=[2, 5, 10], help="numbers of experts (default: 2 5 10)"
    )
    parser.add_argument("--repeats", type=int, default=200, help="times of which the shortest counts (default: 200)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    show(options.experts, options.repeats)


if __name__ == "__main__":
    main()
