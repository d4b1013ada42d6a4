"""TALL masks: which entries of the sum of all task vectors serve which expert.

The merged model and a bit per entry and expert are all that it takes to have every expert back, nearly: the expert is
the merged model where its mask has ones, and the base where it has zeros (``python -m expert_merging extract``).

Masks lie in ``masks/`` beside the merged weights, in a file for each of the base's files and under its name: tensors
``EXPERT/NAME`` of ``numpy.packbits``' bytes, of the flattened tensor. The header's metadata says how they were made.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from expert_merging.arithmetic import one_each, weighted_sum
from expert_merging.context import Context
from expert_merging.flags import Factor, NotNegative
from expert_merging.method import Preparation, Prepare, register
from expert_merging.outputs import Merged, Output, Slot, make_header, metadata_of, mirror_of

if TYPE_CHECKING:
    from torch import Tensor

FOLDER = "masks"
_ABOUT = (
    "The model is the base and the sum of all task vectors. `masks/` says which entries of the sum are an expert's. "
    "`python -m expert_merging extract RUN --expert NAME --output FOLDER` rebuilds the expert."
)
# Entries whose bits share a byte.
PACKED = 8


def mask_name(expert: str, tensor: str) -> str:
    """Name of a packed mask in its file; no expert has a slash in its name."""
    return f"{expert}/{tensor}"


def base_of(header: bytes) -> str | None:
    """Digest of the base's weights that the header of a file of masks has, None where it has none."""
    try:
        digest = json.loads((metadata_of(header) or {})["base_content"])
    except (ValueError, KeyError, TypeError):
        return None
    return str(digest)


def make_masks(task_vectors: Tensor, multi_task: Tensor, tall_lambda: float | list[float]) -> Iterator[Tensor]:
    """Which entries serve an expert, ``(*shape)`` bool for one after the other.

    An entry does if it is nearer to the expert's with the sum of all than with nothing: where
    ``|task_vector| > tall_lambda * |multi_task - task_vector|``.

    Args:
        task_vectors: ``(experts, *shape)``.
        multi_task: sum of the task vectors, ``(*shape)``.
        tall_lambda: factor on the distance, one for all or one per expert.
    """
    factors = one_each(tall_lambda, len(task_vectors))
    for task_vector, factor in zip(task_vectors, factors, strict=True):
        yield _is_greater(task_vector.abs(), (multi_task - task_vector).abs_().mul_(factor))


def _is_greater(first: Tensor, second: Tensor) -> Tensor:
    """Where the one is greater than the other, bool."""
    if first.device.type != "cpu":
        return first > second
    import numpy
    import torch

    # numpy is many times as fast as torch is, but works on a CPU alone; of scalars it makes numbers and not arrays.
    return torch.from_numpy(numpy.asarray(numpy.greater(first.numpy(), second.numpy())))


def model_and_masks(
    context: Context, *, tall_lambda: float | list[float], scaling_coefficient: float
) -> tuple[Output, ...]:
    """Masks of every expert, and the merged model, of which a run tells last."""
    facts = {"tall_lambda": tall_lambda, "scaling_coefficient": scaling_coefficient}
    return mask_files(context, facts), replace(mirror_of(context.plan), about=_ABOUT)


def mask_files(context: Context, made_with: Mapping[str, Any]) -> Output:
    """A file of masks for each of the base's files.

    Args:
        context: the run.
        made_with: what their headers say beside experts, base and shapes.
    """
    plan, merged = context.plan, set(context.plan.merged)
    files, headers = {}, {}
    for file in plan.base.files:
        entries = [entry for entry in plan.base.in_file(file) if entry.name in merged]
        slots = tuple(
            Slot.of(
                mask_name(expert, entry.name),
                "U8",
                (-(-entry.elements // PACKED),),
                Merged(entry.name, mask_result(expert), PACKED),
            )
            for expert in plan.experts
            for entry in entries
        )
        if not slots:
            continue
        facts = {
            "experts": list(plan.experts),
            **made_with,
            "base_content": plan.base.content(),
            "shapes": {entry.name: list(entry.shape) for entry in entries},
        }
        files[file.name] = slots
        metadata = {name: json.dumps(fact, ensure_ascii=False) for name, fact in facts.items()}
        headers[file.name] = make_header(slots, {"format": "pt", "packing": "numpy.packbits", **metadata})
    return Output(files, FOLDER, headers, is_model=False)


def mask_result(expert: str) -> str:
    """What the merge function calls an expert's mask, whatever the expert is called."""
    return f"mask of {expert}"


def tell_of_masks(context: Context) -> Preparation:
    """Tell how to have an expert back."""
    return Preparation(
        notes=(
            "masks of the experts are written beside the model; an expert comes back with python -m expert_merging "
            f"extract {context.run.folder} --expert NAME --output FOLDER",
        )
    )


@register(unit="entries", prepare=Prepare(tell_of_masks, ()), outputs=model_and_masks)
def tall(
    task_vectors: Tensor,
    experts: tuple[str, ...],
    *,
    tall_lambda: NotNegative | list[NotNegative] = 0.4,
    scaling_coefficient: Factor = 1.0,
) -> dict[str, Tensor]:
    """The sum of the task vectors and a bit mask per expert that rebuilds it (Wang et al., 2024, arXiv 2405.07813).

    The authors choose the factor for each task among 0.2, 0.3, 0.4, 0.5 and 0.6, by accuracy on validation questions.

    Args:
        task_vectors: ``(experts, *shape)`` float32.
        experts: names of the experts.
        tall_lambda: the larger, the fewer entries of the sum of all task vectors count as an expert's own; one factor
            for all or a list with one per expert.
        scaling_coefficient: factor on the sum of all task vectors, from which masks are made and experts rebuilt.

    Returns:
        ``merged``, the sum ``(*shape)``, and by expert its mask ``(ceil(entries / 8),)`` uint8.
    """
    multi_task = weighted_sum(task_vectors, [scaling_coefficient] * len(task_vectors))
    masks = make_masks(task_vectors, multi_task, tall_lambda)
    packed = {mask_result(expert): pack(mask) for expert, mask in zip(experts, masks, strict=True)}
    return {"merged": multi_task, **packed}


def pack(mask: Tensor) -> Tensor:
    """Bits ``(*shape)`` as bytes ``(ceil(entries / 8),)`` uint8, the first one in the highest place (as numpy does)."""
    # numpy is twenty times as fast as torch is, but works on a CPU alone.
    return _pack_by_numpy(mask.reshape(-1)) if mask.device.type == "cpu" else _pack_by_torch(mask.reshape(-1))


def _pack_by_numpy(bits: Tensor) -> Tensor:
    import numpy
    import torch

    return torch.from_numpy(numpy.packbits(bits.numpy()))


def _pack_by_torch(bits: Tensor) -> Tensor:
    import torch

    rows = torch.nn.functional.pad(bits, (0, -len(bits) % PACKED)).view(-1, PACKED)
    places = torch.tensor([1 << place for place in reversed(range(PACKED))], dtype=torch.uint8, device=bits.device)
    return (rows * places).sum(1, dtype=torch.uint8)


def unpack(packed: Tensor, entries: int) -> Tensor:
    """The first bits of bytes ``(bytes,)`` uint8, as ``(entries,)`` uint8."""
    import numpy
    import torch

    return torch.from_numpy(numpy.unpackbits(packed.numpy(), count=entries))
