"""RegMean++: RegMean from below, each layer on what the merged layers below it make."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from expert_merging.arithmetic import scaled_mean
from expert_merging.context import Context
from expert_merging.method import SAMPLES, Preparation, Prepare, register
from expert_merging.parts import Part
from expert_merging.processes import while_others_wait
from expert_merging.statistics.gathering import kept_note
from expert_merging.statistics.regmean import RegMeanOptions

if TYPE_CHECKING:
    from torch import Tensor

    from expert_merging.statistics.layer_by_layer import Calibrated


def _prepare(context: Context, **given: Any) -> Preparation:
    """Check the samples; the work is to go through the layers.

    Raises:
        InputError: options or calibration files cannot be used, no layer is merged, or the disk has no room.
    """
    from expert_merging.statistics.layer_by_layer import Calibrated, check_layers

    options = RegMeanOptions(**given)
    checked = check_layers(context, options, "regmean++")

    def work() -> dict[str, Calibrated]:
        from expert_merging.statistics.regression import solve_layers

        while_others_wait(lambda: solve_layers(context, checked, options.reduce_non_diagonal_ratio))
        return {"calibrated": Calibrated(checked.folder)}

    notes = (
        f"{len(checked.matrices)} matrices are solved for from {len(checked.samples.samples)} samples, a layer at a "
        "time",
        kept_note("they", checked.folder, checked.size),
    )
    return Preparation(work, checked.samples.inputs, notes)


@register(
    name="regmean++",
    options=RegMeanOptions,
    aliases=("regmean_pp",),
    unit="matrix",
    reads=frozenset({SAMPLES}),
    prepare=Prepare(_prepare, ("calibrated",)),
    family_defaults=("samples_per_task",),
)
def regmean_pp(task_vectors: Tensor, part: Part, base: Tensor, calibrated: Calibrated) -> Tensor:
    """RegMean, each layer on what the merged layers below it make (2025, arXiv 2508.03121).

    The language model's layers are merged from below, as `regmean` merges them. But what goes into an expert's layer is
    what the layers merged so far make of that expert's samples, so that the regression is on the inputs that the merged
    model's layers will have. Within the layer, inputs are those of the expert's own layer. It starts from embeddings as
    they are merged, the base's by default.

    Matrices outside the layers, and everything that is no matrix, get the experts' mean.

    Args:
        task_vectors: ``(experts, outputs, inputs)`` float32.
        part: the tensor.
        base: the base's entries.
        calibrated: the layers' merged weights.

    Returns:
        Merged task vector ``(outputs, inputs)``.
    """
    found = calibrated.task_vector(part, base)
    return scaled_mean(task_vectors, 1.0) if found is None else found
