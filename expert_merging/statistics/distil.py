"""Distil: layers of a merged model are trained to put out what the experts' do, as ProDistill does it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from expert_merging.checkpoints.configurations import layer_count, size_setting
from expert_merging.context import Context
from expert_merging.flags import Count, CountOrNone, Positive
from expert_merging.machine import gib
from expert_merging.method import SAMPLES, Preparation, Prepare, register
from expert_merging.parts import Part
from expert_merging.plan import Rule
from expert_merging.processes import while_others_wait
from expert_merging.roles import find_places
from expert_merging.running.options import SampleOptions
from expert_merging.statistics.gathering import kept_note

if TYPE_CHECKING:
    from torch import Tensor

    from expert_merging.running.samples import Samples
    from expert_merging.statistics.layer_by_layer import Calibrated

# float32 numbers of each entry and expert at a time: task vector, coefficient, its gradient and Adam's two moments.
_NUMBERS = 5


@dataclass(frozen=True, kw_only=True)
class DistilOptions(SampleOptions):
    """Options of distil.

    Args:
        distil_fineness: an expert's coefficients for a matrix, one for each entry, one for each row, or one (layer).
        distil_epochs: passes over the samples in each layer.
        distil_rate: Adam's learning rate.
        distil_group: samples per update.
        synthesize: further questions per task, each the beginning of one of its questions and the rest of another.
    """

    distil_fineness: Literal["entry", "row", "layer"] = "entry"
    distil_epochs: Count = 10
    distil_rate: Positive = 0.1
    distil_group: Count = 16
    synthesize: CountOrNone = 100


def _prepare(context: Context, **given: Any) -> Preparation:
    """Check the samples; the work is to ask the experts, and to train the layers.

    Raises:
        InputError: options or calibration files cannot be used, no layer is merged, or the disk has no room.
    """
    from expert_merging.statistics.layer_by_layer import Calibrated, check_layers

    options, experts = DistilOptions(**given), len(context.plan.experts)
    checked = check_layers(
        context, options, "distil", more=partial(_output_bytes, context), synthesize=options.synthesize
    )

    def work(rule: Rule, unit: str) -> dict[str, Any]:
        from expert_merging.statistics.distilling import Training, distil_layers

        training = Training(
            options.distil_fineness, options.distil_epochs, options.distil_rate, options.distil_group, context.seed
        )
        while_others_wait(lambda: distil_layers(context, checked, training, rule, unit))
        calibrated = Calibrated(checked.folder)
        return {"calibrated": calibrated, "anew": calibrated.files}

    numbers = 1 + (_NUMBERS if options.distil_fineness == "entry" else 1) * experts
    memory = 4 * numbers * _largest_layer(context, checked.matrices) + _state_bytes(context, checked.samples)
    outputs = _output_bytes(context, checked.samples, checked.samples.most_of_an_expert)
    notes = (
        f"{len(checked.matrices)} matrices are drawn to the experts on {len(checked.samples.samples)} samples, a layer "
        f"at a time, --distil_epochs {options.distil_epochs}; that takes at most {gib(memory)} beside a model",
        f"before, an expert at a time runs on its samples; what comes out of its layers takes about {gib(outputs)} of "
        "memory beside it",
        kept_note("what comes out of the experts' layers, and the new weights,", checked.folder, checked.size),
    )
    return Preparation(work, checked.samples.inputs, notes, follows=True)


def _largest_layer(context: Context, names: Sequence[str]) -> int:
    """Entries of the matrices of the layer that has the most."""
    places, entries = find_places(names), Counter[int | None]()
    for name in names:
        entries[places[name].depth] += context.plan.base.entries[name].elements
    return max(entries.values())


def _state_bytes(context: Context, samples: Samples) -> int:
    """Bytes of what goes into a layer on all samples, and of what is to come out, which is in float32."""
    width = size_setting(context.plan.base.config, "hidden_size") or 0
    return (samples.dtype.itemsize + 4) * width * samples.longest * len(samples.samples)


def _output_bytes(context: Context, samples: Samples, count: int | None = None) -> int:
    """The most bytes that what comes out of layers on so many samples takes, by default on all experts' samples."""
    config = context.plan.base.config
    width = (size_setting(config, "hidden_size") or 0) * (layer_count(config) or 0)
    return samples.dtype.itemsize * width * samples.longest * (count or len(samples.samples))


@register(
    options=DistilOptions,
    unit="matrix",
    reads=frozenset({SAMPLES}),
    prepare=Prepare(_prepare, ("calibrated",)),
    family_defaults=("samples_per_task",),
)
def distil(task_vectors: Tensor, part: Part, base: Tensor, merged: Tensor, calibrated: Calibrated) -> Tensor:
    """For --post: train each layer to put out what the experts' do (after ProDistill, 2025, arXiv 2502.12706).

    The language model's layers are gone through from below. To the merged matrices of each, the task vectors are added,
    every entry times a coefficient of its own that begins at 0, and these are trained by Adam until what comes out of
    the layer is, on each expert's samples, what comes out of that expert's layer: the sum of squares, in which each
    expert weighs the same, however many tokens its samples have. Into it goes what the layers below make as they have
    been trained, into the expert's what its own make. All tokens are compared, whatever `loss_tokens` says: answers are
    made of what layers make of questions.

    `--method prodistill` is this after the average, with the authors' settings: 100 epochs in each layer, no further
    questions. Biases, norms, embeddings, head and whatever is outside the layers stay as they were merged; the authors
    train all of a layer's tensors.

    Args:
        task_vectors: ``(experts, outputs, inputs)`` float32.
        part: the tensor.
        base: the base's entries.
        merged: merged task vector ``(outputs, inputs)``.
        calibrated: the layers' new weights.

    Returns:
        Merged task vector ``(outputs, inputs)``.
    """
    del task_vectors  # they have had their say in the new weights
    found = calibrated.task_vector(part, base)
    return merged if found is None else found
