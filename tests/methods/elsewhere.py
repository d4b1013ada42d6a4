"""Results of other programs for inputs that anybody can make again.

`elsewhere.json` has the merged task vectors that these programs gave in float64: ``mergekit`` (arcee-ai/mergekit at
a6e4028), and ``authors``: declare-lab/della at 8067515 with the random numbers of `numbers`, duguodong7/pcb-merging at
5897888, harveyhuang18/EMR_Merging at cc225ec, yule-BUAA/MergeLLM at 9178ef9; of adapters,
apanariello4/core-space-merging at 85176fa, gstoica27/KnOTS at baa35e8, and AuroraZengfh/RobustMerge at 1212802, whose
factors are multiplied; with the numbers of `squares`, pmahdavi/ota-merge at eee703f, in float32; and ``fusion_bench``
(tanganke/fusion_bench at 54c9e8c).
"""

from __future__ import annotations

import json
import math
from functools import cache
from pathlib import Path

import torch


def numbers(shape: tuple[int, ...], salt: int, scale: float) -> torch.Tensor:
    """Multiples of 2**-13 between -0.25 and 0.25 times the scale, scattered like noise."""
    places = torch.arange(math.prod(shape), dtype=torch.int64) + 1
    mixed = (places * 2654435761 + salt * 40503) % (1 << 32)
    mixed = (mixed ^ (mixed >> 15)) * 2246822519 % (1 << 32)
    mixed = (mixed ^ (mixed >> 13)) % 4096 - 2048
    return (mixed.double() / 8192 * scale).view(shape)


def inputs(shape: tuple[int, ...] = (6, 9)) -> tuple[torch.Tensor, torch.Tensor]:
    """A base, and task vectors of three experts whose weights float32 holds without rounding."""
    return numbers(shape, 99, 4.0).float(), torch.stack(
        [numbers(shape, expert + 1, 1.0).float() for expert in range(3)]
    )


def squares(shape: tuple[int, ...] = (6, 9)) -> torch.Tensor:
    """What might be squared gradients of three experts, some of them 0."""
    return torch.stack([(numbers(shape, 50 + expert, 4.0).abs() ** 3).float() for expert in range(3)])


@cache
def _results() -> dict[str, dict[str, list[float]]]:
    return json.loads((Path(__file__).parent / "elsewhere.json").read_text(encoding="utf-8"))


def result(program: str, name: str) -> torch.Tensor:
    """What a program gave, ``(entries,)`` float32."""
    return torch.tensor(_results()[program][name])


def assert_agrees(found: torch.Tensor, program: str, name: str, tolerance: float = 1e-5) -> None:
    """Compare with the largest change as the measure."""
    expected = result(program, name)
    difference = float((found.flatten() - expected).abs().max() / expected.abs().max())
    assert difference <= tolerance, f"{name}: {difference:g} of the largest change"
