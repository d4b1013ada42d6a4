"""Merges of one method with many coefficients, each a multiple of one that is made once.

Methods of closed form are linear in their ``scaling_coefficient``. So a matrix is decomposed once for all of them.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from expert_merging.merge import takes_blocks
from expert_merging.parts import Part
from expert_merging.plan import Plan, Rule

_MERGED = "merged"


@contextmanager
def multiples(rule: Rule, unit: str, plan: Plan, folder: Path) -> Iterator[Callable[[float], Rule]]:
    """What gives a method's rule with any coefficient, for any thread.

    Whole tensors are merged when they are first asked for, and read from their files after that. Those that are merged
    block by block are made every time, which takes no longer than to read them.

    Args:
        rule: the method with the coefficient 1.
        unit: what it is fed, as `expert_merging.method.Method` has it.
        plan: checkpoints and parameters.
        folder: where merged tensors are until the end.
    """
    files = {name: folder / f"{number}.safetensors" for number, name in enumerate(_wholes(plan, unit))}

    def once(task_vectors: Tensor, part: Part, base: Tensor) -> Tensor:
        file = files.get(part.name)
        if file is not None and file.exists():
            with safe_open(file, framework="pt") as opened:
                found: Tensor = opened.get_tensor(_MERGED)
            return found.to(task_vectors.device)
        made = rule(task_vectors, part, base)
        merged: Tensor = made[_MERGED] if isinstance(made, Mapping) else made
        if file is not None:
            save_file({_MERGED: merged.contiguous()}, file)
        return merged

    def times(coefficient: float) -> Rule:
        return lambda task_vectors, part, base: once(task_vectors, part, base).mul_(coefficient)

    shutil.rmtree(folder, ignore_errors=True)  # what a killed process has left
    folder.mkdir(parents=True)
    try:
        yield times
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def kept_bytes(plan: Plan, unit: str) -> int:
    """What the files of `multiples` take."""
    return sum(4 * plan.part(name).elements for name in _wholes(plan, unit))


def _wholes(plan: Plan, unit: str) -> list[str]:
    """Names of the tensors that are merged as a whole."""
    return [name for name in plan.merged if not takes_blocks(plan.part(name), unit)]
