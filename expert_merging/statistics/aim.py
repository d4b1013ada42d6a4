"""AIM: a merge changes least what the base's activations say is important."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

from expert_merging.context import Context
from expert_merging.flags import Interval
from expert_merging.method import SAMPLES, Preparation, Prepare, register
from expert_merging.parts import Part
from expert_merging.processes import while_others_wait
from expert_merging.running.options import SampleOptions

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class AimOptions(SampleOptions):
    """Options of AIM.

    Args:
        aim_omega: what is left of the change where the base's inputs are largest, from 0 (nothing) to 1 (all of it).
            The paper recommends 0.4; the authors' code has 0.2.
    """

    aim_omega: Annotated[float, Interval("[0, 1]")] = 0.4


def _prepare(context: Context, **given: Any) -> Preparation:
    """Check the samples; the work is to run the base on them.

    Raises:
        InputError: options or calibration files cannot be used.
    """
    from expert_merging.running.samples import check_samples

    samples = check_samples(context, AimOptions(**given), compares_logits=False)

    def work() -> dict[str, Any]:
        from expert_merging.statistics.activations import gather_activations, read_activations

        while_others_wait(lambda: gather_activations(context, samples))
        return {"activations": read_activations(context)}

    notes = (f"the base runs on {len(samples.samples)} samples, for the mean size of what goes into its layers",)
    return Preparation(work, samples.inputs, notes)


@register(
    options=AimOptions,
    unit="rows",
    reads=frozenset({SAMPLES}),
    prepare=Prepare(_prepare, ("activations",)),
    family_defaults=("samples_per_task",),
)
def aim(
    task_vectors: Tensor, part: Part, merged: Tensor, activations: Mapping[str, Tensor], *, aim_omega: float = 0.4
) -> Tensor:
    """For --post: change least where the base's own inputs are large (Nobari et al., 2025, arXiv 2502.02421).

    The base runs on the calibration samples. For each layer, ``a`` is the mean size of each of its inputs over all
    tokens, divided by the largest of them. The merged change of a weight is multiplied by ``1 - a (1 - omega)`` with
    the ``a`` of the input that it is for; weights of norms count as their inputs' own. Embeddings, biases and layers
    that no sample comes by stay as they were merged.

    The authors take 256 documents of the Pile. Here they are the calibration samples, with their responses where the
    files have them.

    Args:
        task_vectors: ``(experts, rows, columns)`` float32.
        part: the rows.
        merged: merged task vector ``(rows, columns)``.
        activations: ``(columns,)`` by tensor, relative to the largest.
        aim_omega: what is left of the change where inputs are largest, in [0, 1].

    Returns:
        Merged task vector ``(rows, columns)``.
    """
    del task_vectors  # what counts is the base
    found = activations.get(part.name)
    return merged if found is None else merged * (1 - found.to(merged.device) * (1 - aim_omega))
