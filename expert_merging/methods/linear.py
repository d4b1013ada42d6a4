"""Methods that are linear in the task vectors."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from expert_merging.arithmetic import one_each, scaled_mean, weighted_sum
from expert_merging.flags import Factor, Fraction
from expert_merging.method import KEEPS_SINGLE, register

if TYPE_CHECKING:
    from torch import Tensor


def scaled(task_vectors: Tensor, *, scaling_coefficient: float | list[float]) -> Tensor:
    """What each expert adds to task arithmetic's sum, ``(experts, *shape)``."""
    weights = one_each(scaling_coefficient, len(task_vectors))
    return task_vectors * task_vectors.new_tensor(weights).view(-1, *[1] * (task_vectors.ndim - 1))


def scaled_share(task_vectors: Tensor, *, scaling_coefficient: float) -> Tensor:
    """What each expert adds to the average, ``(experts, *shape)``."""
    return task_vectors * (scaling_coefficient / len(task_vectors))


# The authors' settings of ProDistill, which starts at the mean.
PRODISTILL = {"post": ["distil"], "distil_epochs": 100, "synthesize": 0}


@register(unit="entries", parts=scaled_share, presets={"prodistill": PRODISTILL})
def weight_average(task_vectors: Tensor, *, scaling_coefficient: Factor = 1.0) -> Tensor:
    """Average of the experts' weights (Wortsman et al., 2022, arXiv 2203.05482).

    With a coefficient s other than 1 the result is base + s * (average - base), which the published Expert Merging
    script does by default (s = 0.1); here an average is an average unless the user asks otherwise.

    `--method prodistill` is the average with the layers trained to put out what the experts' do, see `distil`.

    Args:
        task_vectors: ``(experts, *shape)`` float32.
        scaling_coefficient: factor on the average task vector.

    Returns:
        Merged task vector ``(*shape)``.
    """
    return scaled_mean(task_vectors, scaling_coefficient)


@register(unit="entries", parts=scaled, family_defaults=("scaling_coefficient",))
def task_arithmetic(task_vectors: Tensor, *, scaling_coefficient: Factor | list[Factor] = 0.3) -> Tensor:
    """Scaled sum of the task vectors (Ilharco et al., 2023, arXiv 2212.04089).

    Args:
        task_vectors: ``(experts, *shape)`` float32.
        scaling_coefficient: factor on each task vector, one for all or a list with one per expert.

    Returns:
        Merged task vector ``(*shape)``.
    """
    return weighted_sum(task_vectors, one_each(scaling_coefficient, len(task_vectors)))


@register(unit="entries", promises=frozenset({KEEPS_SINGLE}))
def pma(
    task_vectors: Tensor, *, pma_average: Literal["sma", "wma", "ema"] = "sma", pma_alpha: Fraction = 0.2
) -> Tensor:
    """Average of checkpoints of one training run, in their order (Li et al., 2025, arXiv 2505.12082).

    The base has no part in it: it gives the other files, and the parameters that are not merged.

    Args:
        task_vectors: ``(experts, *shape)`` float32, of the earliest checkpoint first.
        pma_average: ``sma``, all checkpoints alike; ``wma``, the i-th one counts i times; ``ema``, exponential moving
            average.
        pma_alpha: share of the newest checkpoint in an exponential moving average, whose value is the first checkpoint
            to begin with.

    Returns:
        Merged task vector ``(*shape)``.
    """
    return weighted_sum(task_vectors, _ageing(len(task_vectors), pma_average, pma_alpha))


def _ageing(checkpoints: int, average: str, alpha: float) -> list[float]:
    """Weight of each checkpoint from the earliest on; they sum to 1."""
    if average == "ema":
        later = [alpha * (1 - alpha) ** age for age in reversed(range(checkpoints - 1))]
        return [(1 - alpha) ** (checkpoints - 1), *later]
    counts = range(1, checkpoints + 1) if average == "wma" else [1] * checkpoints
    return [count / sum(counts) for count in counts]
