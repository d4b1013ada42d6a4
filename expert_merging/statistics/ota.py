"""OTA with FFG: entries that matter little are left out, and the others weighted by how steep the loss is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from expert_merging.context import Context
from expert_merging.errors import InputError
from expert_merging.flags import Factor, Fraction, Positive
from expert_merging.method import ORDER_FREE, SAMPLES, Preparation, Prepare, register
from expert_merging.methods.thresholds import find_thresholds
from expert_merging.parts import Part
from expert_merging.running.options import SampleOptions
from expert_merging.statistics.gathering import check_entries

if TYPE_CHECKING:
    from torch import Tensor

    from expert_merging.statistics.entrywise import Entries

# Added to the weights, as published, so that entries without any have a mean.
_EPSILON = 1e-26


@dataclass(frozen=True, kw_only=True)
class OtaOptions(SampleOptions):
    """Options of OTA with FFG.

    Args:
        loss_tokens: the likelihood is of the response, given the prompt, or of all tokens but the first.
        second_moments: safetensors file with Adam's second moments (exp_avg_sq) by tensor name, for each expert
            (EXPERT=FILE); no sample is read then. By default they are estimated by squared gradients.
        density: fraction of the entries that each expert keeps, over the whole model.
        ota_power: power of the second moments that weighs an entry.
        scaling_coefficient: factor on the merged task vector.
    """

    loss_tokens: Literal["all", "response"] = "response"
    second_moments: dict[str, str] | None = None
    density: Fraction = 0.3
    ota_power: Positive = 0.5
    scaling_coefficient: Factor = 1.0


def _prepare(context: Context, **given: Any) -> Preparation:
    """Check the files, or the samples and the disk; the work is to find what each expert keeps.

    Raises:
        InputError: options, files or calibration files cannot be used, or the disk has no room.
    """
    options = OtaOptions(**given)
    if options.second_moments:
        from expert_merging.statistics.second_moments import check_second_moments, digest_of_files

        moments = check_second_moments(context, options.second_moments)
        inputs = {"second moments": digest_of_files(moments)}
        return Preparation(lambda: _found(context, moments, options.density), inputs)
    from expert_merging.running.samples import check_samples

    samples = check_samples(context, options)
    notes = check_entries(context, samples)

    def work() -> dict[str, Any]:
        from expert_merging.statistics.gradients import squared_gradients

        return _found(context, squared_gradients(context, samples), options.density)

    return Preparation(work, samples.inputs, notes)


def _found(context: Context, moments: Entries, density: float) -> dict[str, Any]:
    """Second moments, and the least saliency that each expert keeps."""
    import torch

    if density == 1:
        return {"moments": moments, "thresholds": torch.zeros(len(context.plan.experts))}

    def change(task_vectors: Tensor, part: Part) -> Tensor:
        return saliency(task_vectors, _moments_of(moments, part, task_vectors))

    return {"moments": moments, "thresholds": find_thresholds(context.passes, change, density)[0]}


def saliency(task_vectors: Tensor, moments: Tensor) -> Tensor:
    """``sqrt(v) |tau|``, which ranks entries as ``v tau^2`` does and is not too small for float32."""
    return moments.sqrt() * task_vectors.abs()


def _reads_samples(options: Mapping[str, Any]) -> bool:
    return not options.get("second_moments")


@register(
    options=OtaOptions,
    unit="entries",
    promises=frozenset({ORDER_FREE}),
    reads=frozenset({SAMPLES}),
    reads_with=_reads_samples,
    prepare=Prepare(_prepare, ("moments", "thresholds")),
    family_defaults=("samples_per_task",),
)
def ota_ffg(
    task_vectors: Tensor,
    part: Part,
    moments: Entries,
    thresholds: Tensor,
    *,
    ota_power: float = 0.5,
    scaling_coefficient: float = 1.0,
) -> Tensor:
    """What matters of each expert, weighted by Adam's second moments (Mahdavinia et al., 2025, arXiv 2509.11167).

    With ``v_k`` the second moments of expert k's optimizer, FFG keeps the entries of largest ``v_k tau_k^2``, and OTA
    takes their mean with weights ``v_k^power``. Entries that no expert keeps are the base's.

    Where no second moments are given, ``v_k`` is the mean over the expert's samples of its squared gradients, which is
    what Adam's are a moving average of (of batches, there). It is divided by its norm, as for Fisher merging: the
    likelihoods of a few samples are not on one scale, as losses of trainings are, and the expert whose gradients are
    largest would win. The authors give a threshold for each expert, as a number;
    here it follows from the fraction that is kept, the same for all. Their compression of ``v_k`` is not needed, since
    it is read from the disk a block at a time.

    Args:
        task_vectors: ``(experts, *shape)`` float32.
        part: the entries.
        moments: each expert's second moments.
        thresholds: the least saliency that is kept, ``(experts,)``.
        ota_power: power of the second moments.
        scaling_coefficient: factor on the merged task vector.

    Returns:
        Merged task vector ``(*shape)``.
    """
    own = _moments_of(moments, part, task_vectors)
    kept = saliency(task_vectors, own) >= thresholds.to(own.device).view(-1, *[1] * (own.dim() - 1))
    weights = own.pow_(ota_power).add_(_EPSILON).mul_(kept)
    shares = weights.div_(weights.sum(0).clamp_(min=_EPSILON))
    return task_vectors.mul_(shares).sum(0).mul_(scaling_coefficient)


def _moments_of(moments: Entries, part: Part, task_vectors: Tensor) -> Tensor:
    """The second moments of task vectors, in their shape and on their device.

    Raises:
        InputError: some are negative, NaN or infinite.
    """
    own = moments.of(part)
    for values, file in zip(own, moments.files.values(), strict=True):
        if not (values.numel() == 0 or 0 <= float(values.min()) <= float(values.max()) < float("inf")):
            raise InputError(f"{file} has second moments of {part.name} that are negative, NaN or infinite")
    return own.to(task_vectors.device).view_as(task_vectors)
