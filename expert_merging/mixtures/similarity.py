"""Which expert a text is for, by the gradient of the base's loss on it (MergeME, arXiv 2502.00997, appendix C).

An expert's task vector is where its fine-tuning has gone. It is likest to a step down the loss of the texts that the
expert is for. MergeME rates a prompt so whenever one comes, which takes a backward pass of the base. A mixture's
routers see hidden states alone, so here it says which expert each sample is for, and routers are fitted to that.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from expert_merging.context import Context
from expert_merging.documents import read_object
from expert_merging.errors import InputError
from expert_merging.learned.live import LiveModel
from expert_merging.learned.parametrisations import Layout
from expert_merging.learned.task_vectors import HOST, TaskVectors
from expert_merging.machine import half_of_memory
from expert_merging.mixtures.tensors import FeedForward
from expert_merging.questions.calibration import Sample
from expert_merging.running.answers import final_logits
from expert_merging.running.samples import Samples
from expert_merging.running.sharding import load_on
from expert_merging.running.targets import Asked

FILE = "similarity.json"
# Tokens whose logits are held at a time.
_SLICE = 64


def similarities(products: Tensor, squares: Tensor) -> Tensor:
    """``-<g, tau_i> / |tau_i|``, which is the cosine of the two but for the length of ``g``, the same for all experts.

    Args:
        products: ``<g, tau_i>``, ``(samples, experts)``.
        squares: ``|tau_i|^2``, ``(experts,)``; an expert without a change has similarity 0.
    """
    lengths = squares.double().sqrt()
    return torch.where(lengths > 0, -products.double() / lengths.clamp(min=torch.finfo(torch.float64).tiny), 0.0)


def chosen_experts(context: Context, samples: Samples) -> list[str]:
    """The expert that each sample is for; what an earlier part of the run has found is taken.

    Args:
        context: the run.
        samples: the samples, checked.

    Raises:
        InputError: the base computes NaN.
    """
    experts, file = [*context.plan.experts], context.run.statistics / FILE
    kept = context.run.kept.within(file.parent.name, context.plan.opened)
    if file.exists() and kept.has(file):
        return [str(name) for name in read_object(file)["experts"]]
    found = _similarities_of(context, samples)
    if bool(found.isnan().any()):
        hint = "give --mixed_precision bf16 or no" if samples.precision == "fp16" else "its weights are damaged"
        raise InputError(f"the base computes NaN, or its loss has such a gradient, on calibration samples; {hint}")
    chosen = [experts[number] for number in found.argmax(1).tolist()]
    file.parent.mkdir(parents=True, exist_ok=True)
    kept.write(file, (json.dumps({"experts": chosen, "similarity": found.tolist()}, indent=1) + "\n").encode())
    return chosen


def _similarities_of(context: Context, samples: Samples) -> Tensor:
    """Similarities ``(samples, experts)``: a backward pass of the base for each sample, one of the models in memory."""
    names = tuple(name for name in context.plan.merged if FeedForward.named(name))
    device = torch.device(context.device)
    own = replace(context, plan=replace(context.plan, merged=names))
    asked = samples.target_maker(context, (), device).answered(samples.samples)
    task_vectors = TaskVectors(own.plan, [1.0] * len(own.plan.experts), device)
    squares = _squares(task_vectors)
    layout = Layout(dict.fromkeys(names, 1), [0.0] * len(own.plan.experts), shared=True, bounded=False)
    model = load_on(device, context.backbone, context.plan.base, samples.dtype, sharded=False)
    live = LiveModel(model, task_vectors, layout.vector(device), context.backbone.file_name)
    try:
        if sum(task_vectors.sizes.values()) <= half_of_memory(torch.device("cpu")):
            task_vectors.place(dict.fromkeys(names, HOST))
        count = len(samples.samples)
        with context.progress("gradients of the base", count, "sample") as advance:
            rows = []
            for row in _products(live, asked):
                rows.append(row)
                advance(1)
        return similarities(torch.stack(rows), squares)
    finally:
        live.close()
        task_vectors.release()


def _squares(task_vectors: TaskVectors) -> Tensor:
    """``|tau_i|^2`` of each expert, ``(experts,)`` float64."""
    total = torch.zeros(len(task_vectors.scale), dtype=torch.float64)
    parts = [task_vectors.plan.part(name) for name in task_vectors.plan.merged]
    for _, _, _, found in task_vectors.blocks(parts):
        total += found.square().sum(1, dtype=torch.float64).cpu()
    return total


def _products(live: LiveModel, asked: Iterator[Asked]) -> Iterator[Tensor]:
    """``<g, tau_i>`` of each sample, ``(experts,)``: the gradient of its loss with respect to experts' coefficients."""
    for one in asked:
        live.gradient.zero_()
        loss = language_loss(live.model, one)
        loss.backward()  # type: ignore[no-untyped-call]
        yield live.gradient.double().cpu()


def language_loss(model: Any, asked: Asked) -> Tensor:
    """Mean negative log-likelihood of a sample's tokens, those that come after the positions that are looked at."""
    tokens = asked.inputs["input_ids"][0]
    places = asked.tokens[asked.tokens < len(tokens) - 1]  # nothing follows the last one
    states = model.base_model(**asked.inputs, use_cache=False).last_hidden_state[0, places]
    head = model.get_output_embeddings()

    def lost(own: Tensor, following: Tensor) -> Tensor:
        logits = final_logits(model, head(own).float())
        return torch.nn.functional.cross_entropy(logits, following, reduction="sum")

    slices = zip(torch.split(states, _SLICE), torch.split(tokens[places + 1], _SLICE), strict=True)
    sums = [checkpoint(lost, *both, use_reentrant=False) for both in slices]
    return torch.stack(sums).sum() / len(places)


def told(samples: Sequence[Sample], chosen: Sequence[str]) -> dict[str, dict[str, int]]:
    """How many samples are for which expert, by the expert whose file they are from."""
    found: dict[str, dict[str, int]] = {}
    for sample, expert in zip(samples, chosen, strict=True):
        own = found.setdefault(sample.expert, {})
        own[expert] = own.get(expert, 0) + 1
    return found
