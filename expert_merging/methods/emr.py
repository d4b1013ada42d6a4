"""EMR merging: one task vector for all experts, and for each of them a mask and a factor that give it back, nearly.

Masks lie beside the merged weights, as those of `tall` do, and in the same form. The factors are in a file of their own
among them.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from expert_merging.context import Context
from expert_merging.method import ORDER_FREE, Preparation, Prepare, register
from expert_merging.methods.tall import mask_files, mask_result, pack, tell_of_masks
from expert_merging.methods.thresholds import elected_signs
from expert_merging.outputs import Made, Output, Slot, mirror_of
from expert_merging.parts import Part

if TYPE_CHECKING:
    from torch import Tensor

# The file of the factors: a number for each expert, by its name.
RESCALERS = "rescalers.safetensors"
_ABOUT = (
    "The model is the base and, of each entry, the largest change of the experts that agree with the sum of all. "
    "`masks/` says which entries are an expert's, and by what they are multiplied. "
    "`python -m expert_merging extract RUN --expert NAME --output FOLDER` rebuilds the expert."
)


def unify(task_vectors: Tensor) -> Tensor:
    """Of each entry the largest change that has the sign of the sum, ``(*shape)``; zero where the sum is."""
    import torch

    signs = elected_signs(task_vectors)
    largest, agreeing = torch.zeros_like(signs), torch.empty_like(signs)
    for row in task_vectors:
        torch.mul(row, signs, out=agreeing)
        torch.maximum(largest, agreeing, out=largest)
    return largest.mul_(signs)


def measure_rescalers(context: Context) -> Preparation:
    """The factor that gives an expert's masked entries the L1 norm of its task vector."""

    def measure(_base: Tensor, task_vectors: Tensor, _part: Part) -> Tensor:
        import torch

        unified = unify(task_vectors)
        masked = torch.stack([unified.abs().mul_(row * unified > 0) for row in task_vectors])
        return torch.stack([task_vectors.abs().double().sum(1), masked.double().sum(1)])

    def run() -> dict[str, Any]:
        import torch

        experts = tuple(context.plan.experts)
        norms = context.passes.sums(measure, (2, len(experts)), "measuring changes").values()
        own, masked = sum(norms, torch.zeros(2, len(experts), dtype=torch.float64))
        factors = torch.where(masked > 0, own / masked, 1.0).float()
        return {"made": {_rescaler(expert): factor[None] for expert, factor in zip(experts, factors, strict=True)}}

    return replace(tell_of_masks(context), run=run)


def _rescaler(expert: str) -> str:
    """What the preparation calls an expert's factor."""
    return f"rescaler of {expert}"


def model_masks_and_rescalers(context: Context) -> tuple[Output, ...]:
    """Masks and factors of every expert, and the merged model."""
    masks = mask_files(context, {"method": "emr"})
    slots = tuple(Slot.of(expert, "F32", (1,), Made(_rescaler(expert))) for expert in context.plan.experts)
    files = {**masks.files, RESCALERS: slots}
    return replace(masks, files=files), replace(mirror_of(context.plan), about=_ABOUT)


@register(
    unit="entries",
    promises=frozenset({ORDER_FREE}),
    prepare=Prepare(measure_rescalers, ("made",)),
    outputs=model_masks_and_rescalers,
)
def emr(task_vectors: Tensor, experts: tuple[str, ...]) -> dict[str, Tensor]:
    """Elect one task vector, mask and rescale it for each expert (Huang et al., 2024, arXiv 2405.17461).

    Factors are the paper's, of norms over all entries; one of the authors' scripts sums means of tensors instead, where
    small tensors weigh as much as large ones. Where experts cancel each other, the entry is zero, while the scripts
    take the negative ones.

    Args:
        task_vectors: ``(experts, *shape)`` float32.
        experts: names of the experts.

    Returns:
        ``merged``, the elected task vector ``(*shape)``, and by expert its mask ``(ceil(entries / 8),)`` uint8.
    """
    unified = unify(task_vectors)
    masks = (row * unified > 0 for row in task_vectors)
    return {"merged": unified, **{mask_result(name): pack(mask) for name, mask in zip(experts, masks, strict=True)}}
