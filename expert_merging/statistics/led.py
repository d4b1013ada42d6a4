"""LED-Merging: of each expert, what matters to it and to the base, and to no other expert."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from expert_merging.arithmetic import one_each, weighted_sum
from expert_merging.context import Context
from expert_merging.flags import Factor, Fraction
from expert_merging.method import ORDER_FREE, SAMPLES, Preparation, Prepare, register
from expert_merging.methods.ranks import count_of, values_at
from expert_merging.parts import Part
from expert_merging.processes import while_others_wait
from expert_merging.running.options import SampleOptions
from expert_merging.statistics.gathering import check_entries

if TYPE_CHECKING:
    from torch import Tensor

    from expert_merging.statistics.entrywise import Entries


@dataclass(frozen=True, kw_only=True)
class LedOptions(SampleOptions):
    """Options of LED-Merging.

    Args:
        loss_tokens: the likelihood is of the response, given the prompt, or of all tokens but the first.
        led_ratio: fraction of each tensor's entries that are located in an expert, and as many in the base, one for
            all experts or a list with one per expert; the authors have 0.1 to 0.5.
        scaling_coefficient: factor on what is left of each task vector, one for all or a list with one per expert.
    """

    loss_tokens: Literal["all", "response"] = "response"
    led_ratio: Fraction | list[Fraction] = 0.4
    scaling_coefficient: Factor | list[Factor] = 1.0


def _prepare(context: Context, **given: Any) -> Preparation:
    """Check the samples and the disk; the work is to take gradients of each expert and of the base.

    Raises:
        InputError: options or calibration files cannot be used, or the disk has no room.
    """
    from expert_merging.running.samples import check_samples

    samples, base = check_samples(context, LedOptions(**given)), _base_folder(context)
    notes = check_entries(context, samples, base)

    def work() -> dict[str, Entries]:
        from expert_merging.statistics.entrywise import Entries
        from expert_merging.statistics.gradients import gather_base_gradients, gather_gradients, salience
        from expert_merging.statistics.inputs import files_of

        def gather() -> None:
            gather_gradients(context, samples, salience, per_token=True)
            gather_base_gradients(context, samples, salience, base)

        while_others_wait(gather)
        return {"own": Entries(files_of(context)), "of_base": Entries(files_of(context, base))}

    return Preparation(work, samples.inputs, notes)


def _base_folder(context: Context) -> Path:
    """Where the base's scores on each expert's samples are; no expert's file has such a name."""
    return context.run.statistics / "base"


@register(
    options=LedOptions,
    promises=frozenset({ORDER_FREE}),
    reads=frozenset({SAMPLES}),
    prepare=Prepare(_prepare, ("own", "of_base")),
    family_defaults=("samples_per_task",),
)
def led(
    task_vectors: Tensor,
    part: Part,
    own: Entries,
    of_base: Entries,
    *,
    led_ratio: float | list[float] = 0.4,
    scaling_coefficient: float | list[float] = 1.0,
) -> Tensor:
    """Locate what matters, elect what base and expert agree on, keep it disjoint (Ma et al., 2025, arXiv 2502.16770).

    An entry's score in a model is the mean over an expert's samples of ``|weight * gradient|``, for the loss as a mean
    over the sample's tokens. *Locate*: the fraction ``led_ratio`` of each tensor's entries with the highest scores, in
    the expert and in the base. *Elect*: those that both have. *Disjoint*: without those that another expert has
    elected. What is left of each task vector is added up.

    The published script merges one model after the other and has two more patterns of masks; here is the one that its
    README and the paper have. Of ratios that mean less than one entry, one is located.

    Args:
        task_vectors: ``(experts, *shape)`` float32.
        part: the tensor.
        own: scores of each expert on its samples.
        of_base: scores of the base on the same samples.
        led_ratio: fraction of entries that are located.
        scaling_coefficient: factor on each expert's part.

    Returns:
        Merged task vector ``(*shape)``.
    """
    import torch

    experts = len(task_vectors)
    pairs = zip(own.of(part), of_base.of(part), one_each(led_ratio, experts), strict=True)
    elected = torch.stack([_located(scores, ratio) & _located(others, ratio) for scores, others, ratio in pairs])
    masks = elected & (elected.sum(0) == 1)
    kept = task_vectors.mul_(masks.view_as(task_vectors).to(task_vectors.device))
    return weighted_sum(kept, one_each(scaling_coefficient, experts))


def _located(scores: Tensor, ratio: float) -> Tensor:
    """Which entries are among the highest scores; all that are equal to the least of them are."""
    if not len(scores):
        return scores.bool()
    count = max(1, count_of(ratio, len(scores)))
    return scores >= values_at(scores, [len(scores) - count])[0]
