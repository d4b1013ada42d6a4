"""Options of methods on factors; read by the command line before torch is loaded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from expert_merging.flags import Count, Factor


@dataclass(frozen=True, kw_only=True)
class LowRankOptions:
    """What is made of the merged factors.

    Args:
        output: what is written, the base with the merged change (dense), or an adapter of the base with the merged
            factors, which peft loads.
        merged_rank: rank that the merged change of each matrix is cut to, by its strongest directions; by default all
            of it is kept.
        scaling_coefficient: factor on the merged change.
    """

    output: Literal["dense", "adapter"] = "dense"
    merged_rank: Count | None = None
    scaling_coefficient: Factor = 1.0
