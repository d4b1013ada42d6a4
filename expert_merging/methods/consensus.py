"""Consensus masks, which leave out of a merged task vector what serves too few experts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from expert_merging.arithmetic import weighted_sum
from expert_merging.context import Context
from expert_merging.errors import InputError
from expert_merging.flags import Interval, NotNegative
from expert_merging.method import Preparation, Prepare, register
from expert_merging.methods.tall import make_masks

if TYPE_CHECKING:
    from torch import Tensor


def check_agreement(context: Context, *, consensus_k: int) -> Preparation:
    """Check that so many experts can agree.

    Raises:
        InputError: they cannot; every entry would be left out.
    """
    experts = len(context.plan.experts)
    if consensus_k > experts:
        raise InputError(
            f"--consensus_k is the number of experts that an entry has to serve, at most {experts} here, got "
            f"{consensus_k}"
        )
    return Preparation()


@register(unit="entries", prepare=Prepare(check_agreement, ()))
def consensus(
    task_vectors: Tensor,
    merged: Tensor,
    *,
    tall_lambda: NotNegative | list[NotNegative] = 0.2,
    consensus_k: Annotated[int, Interval("[0, inf)")] = 2,
) -> Tensor:
    """For --post: keep the merged entries that serve at least two experts (Wang et al., 2024, arXiv 2405.07813).

    An entry serves the experts whose TALL masks have it. 0 keeps everything, 1 leaves out what serves nobody, 2 also
    what serves a single one. Masks are those of the sum of the task vectors, whatever the method; the authors make
    those for TIES of TIES' own sum. They choose the factor as for `tall`; the default is MergeBench's (arXiv
    2505.10833).

    Args:
        task_vectors: ``(experts, *shape)`` float32.
        merged: merged task vector ``(*shape)``.
        tall_lambda: the larger, the fewer entries of the sum of all task vectors count as an expert's own; one factor
            for all or a list with one per expert.
        consensus_k: number of experts that an entry has to serve.

    Returns:
        Merged task vector ``(*shape)`` with zeros for what is left out.
    """
    multi_task = weighted_sum(task_vectors, [1.0] * len(task_vectors))
    count = sum(mask.byte() for mask in make_masks(task_vectors, multi_task, tall_lambda))
    return merged * (count >= consensus_k)
