"""Fisher merging: each entry is the experts' mean, weighted by how much their answers depend on it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from expert_merging.arithmetic import one_each
from expert_merging.context import Context
from expert_merging.flags import Positive
from expert_merging.method import SAMPLES, Preparation, Prepare, register
from expert_merging.parts import Part
from expert_merging.running.options import SampleOptions
from expert_merging.statistics.gathering import check_entries

if TYPE_CHECKING:
    from torch import Tensor

    from expert_merging.statistics.entrywise import Entries


@dataclass(frozen=True, kw_only=True)
class FisherOptions(SampleOptions):
    """Options of Fisher merging.

    Args:
        loss_tokens: the likelihood is of the response, given the prompt, or of all tokens but the first.
        fisher_labels: whose likelihood's gradients are squared: that of the samples' tokens (the empirical Fisher), or
            of tokens that are drawn, one at each place, from what the expert predicts there (the Fisher information,
            estimated).
        fisher_weights: weight of an expert, one for all or a list with one per expert.
        fisher_floor: what is added to each expert's Fisher, of its root mean square; an entry that no expert's answers
            depend on gets the mean.
    """

    loss_tokens: Literal["all", "response"] = "response"
    fisher_labels: Literal["given", "drawn"] = "given"
    fisher_weights: Positive | list[Positive] = 1.0
    fisher_floor: Positive = 1e-6


def _prepare(context: Context, **given: Any) -> Preparation:
    """Check the samples and the disk; the work is to take gradients, an expert at a time.

    Raises:
        InputError: options or calibration files cannot be used, or the disk has no room.
    """
    from expert_merging.running.samples import check_samples

    options = FisherOptions(**given)
    samples = check_samples(context, options)
    notes = check_entries(context, samples)

    def work() -> dict[str, Entries]:
        from expert_merging.statistics.gradients import squared_gradients

        return {"fishers": squared_gradients(context, samples, drawn=options.fisher_labels == "drawn")}

    return Preparation(work, samples.inputs, notes)


@register(
    options=FisherOptions,
    unit="entries",
    reads=frozenset({SAMPLES}),
    prepare=Prepare(_prepare, ("fishers",)),
    family_defaults=("samples_per_task",),
)
def fisher(
    task_vectors: Tensor,
    part: Part,
    fishers: Entries,
    *,
    fisher_weights: float | list[float] = 1.0,
    fisher_floor: float = 1e-6,
) -> Tensor:
    """Mean weighted by each expert's diagonal Fisher information (Matena and Raffel, 2022, arXiv 2111.09832).

    ``sum_k w_k F_k tau_k / sum_k w_k F_k`` for each entry, with ``F_k`` the mean over expert k's samples of the squared
    gradient of ``log p(response | prompt)``. As the authors do, each expert's ``F_k`` is divided by its norm over all
    merged entries, so that an expert whose gradients are larger as a whole does not win everywhere.

    The authors replace entries of ``F_k`` below 1e-6 by that, before they divide. Gradients of a language model are so
    small that this would be most entries, which then get the mean. So the floor is relative to the root mean square
    of the expert's entries, and added. The authors take the expectation over all classes; over sequences of words it
    is estimated from drawn tokens, or replaced by the samples' own. Squares are of each sample's gradient, not of a
    batch's, and a sequence's likelihood is the product of its tokens'.

    Args:
        task_vectors: ``(experts, *shape)`` float32.
        part: the entries.
        fishers: each expert's Fisher information, of its root mean square.
        fisher_weights: weight of an expert, one for all or a list with one per expert.
        fisher_floor: what is added, of the root mean square.

    Returns:
        Merged task vector ``(*shape)``.
    """
    weights = fishers.of(part).to(task_vectors.device).add_(fisher_floor)
    for own, weight in zip(weights, one_each(fisher_weights, len(weights)), strict=True):
        own.mul_(weight)
    shares = weights.div_(weights.sum(0)).view_as(task_vectors)
    return task_vectors.mul_(shares).sum(0)
