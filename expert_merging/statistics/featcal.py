"""FeatCal: a merged model's features are drawn to the experts', layer by layer."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

from expert_merging.context import Context
from expert_merging.flags import Interval, Positive
from expert_merging.machine import gib
from expert_merging.method import SAMPLES, Preparation, Prepare, register
from expert_merging.parts import Part
from expert_merging.plan import Rule
from expert_merging.processes import while_others_wait
from expert_merging.running.options import SampleOptions
from expert_merging.statistics.gathering import kept_note

if TYPE_CHECKING:
    from torch import Tensor

    from expert_merging.statistics.layer_by_layer import Calibrated


@dataclass(frozen=True, kw_only=True)
class FeatCalOptions(SampleOptions):
    """Options of FeatCal.

    Args:
        featcal_mix: share of the expert's own inputs in those that a layer's target is computed from, the rest being
            the merged model's; from 0 to 1.
        featcal_ridge: weight of the pull towards the merged weights, beside inputs whose Gram matrices have norm 1.
        featcal_reach: how far the weights that it pulls to are from the base, as a multiple of the merged ones; the
            authors have 2 to 2.2 for task arithmetic at 0.3.
    """

    featcal_mix: Annotated[float, Interval("[0, 1]")] = 0.3
    featcal_ridge: Positive = 0.05
    featcal_reach: Positive = 1.0


def _prepare(context: Context, **given: Any) -> Preparation:
    """Check the samples; the work is to ask the experts, and to go through the merged model.

    Raises:
        InputError: options or calibration files cannot be used, nothing can be calibrated, or the disk has no room.
    """
    from expert_merging.statistics.calibrating import Pull, calibrate, input_bytes
    from expert_merging.statistics.layer_by_layer import Calibrated, check_layers

    options = FeatCalOptions(**given)
    checked = check_layers(context, options, "featcal", more=partial(input_bytes, context))

    def work(rule: Rule, unit: str) -> dict[str, Any]:
        pull = Pull(options.featcal_mix, options.featcal_ridge, options.featcal_reach)
        while_others_wait(lambda: calibrate(context, checked, pull, rule, unit))
        calibrated = Calibrated(checked.folder)
        return {"calibrated": calibrated, "anew": calibrated.files}

    inputs = input_bytes(context, checked.samples, checked.samples.most_of_an_expert)
    notes = (
        f"features of {len(checked.matrices)} matrices are calibrated on {len(checked.samples.samples)} samples, a "
        "layer at a time",
        "before, an expert at a time runs on its samples; what goes into its layers takes at most "
        f"{gib(inputs)} of memory beside it",
        kept_note("what goes into the experts' layers, and the new weights,", checked.folder, checked.size),
    )
    return Preparation(work, checked.samples.inputs, notes, follows=True)


@register(
    options=FeatCalOptions,
    unit="matrix",
    reads=frozenset({SAMPLES}),
    prepare=Prepare(_prepare, ("calibrated",)),
    family_defaults=("samples_per_task",),
)
def featcal(task_vectors: Tensor, part: Part, base: Tensor, merged: Tensor, calibrated: Calibrated) -> Tensor:
    """For --post: draw each layer's outputs to the experts' (2026, arXiv 2605.13030).

    The language model's layers are gone through from below. With ``x`` what goes into a matrix in the merged model as
    it has been changed so far, ``x_k`` the same in expert k, and ``x' = mix x_k + (1 - mix) x``, its new weights solve
    ``W (sum_k C_k + ridge I) = sum_k W_k Q_k + ridge A``, where ``C_k`` and ``Q_k`` are the means of ``x x^T`` and
    ``x' x^T`` over expert k's samples, both divided by the norm of ``C_k``, and ``A = W_base + reach (W_merged -
    W_base)``. Where there are fewer tokens than inputs a system of the tokens' size is solved instead, with the same
    result. A change of biases counts for the outputs that are matched.

    Biases, norms, embeddings, head and whatever is outside the layers stay as they were merged; the authors' rule for
    norms is one for LayerNorm.

    Args:
        task_vectors: ``(experts, outputs, inputs)`` float32.
        part: the tensor.
        base: the base's entries.
        merged: merged task vector ``(outputs, inputs)``.
        calibrated: the new weights.

    Returns:
        Merged task vector ``(outputs, inputs)``.
    """
    del task_vectors  # they have had their say in the new weights
    found = calibrated.task_vector(part, base)
    return merged if found is None else found
