"""What training needs beside coefficients: targets, task vectors and the model, gathered once for all stages."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch

from expert_merging.context import Context
from expert_merging.learned.bases import give_bases
from expert_merging.learned.directions import TASK_VECTORS, make_directions
from expert_merging.learned.live import LiveModel
from expert_merging.learned.memory import arrange
from expert_merging.learned.parametrisations import CoefficientVector
from expert_merging.learned.same_weights import check_weights
from expert_merging.learned.settings import Settings
from expert_merging.learned.task_vectors import TaskVectors
from expert_merging.running.batches import pack
from expert_merging.running.sharding import load_on
from expert_merging.running.targets import Target

Targets: TypeAlias = list[Target]


@dataclass(frozen=True)
class Material:
    """What is read and computed before training, and shared by the stages of a method.

    Args:
        targets: the samples, with what their experts say about them.
        task_vectors: base weights and task vectors, or other directions.
        model: the base model, whose merged parameters are overwritten.
    """

    targets: Targets
    task_vectors: TaskVectors
    model: Any


def gather(
    context: Context, settings: Settings, accelerator: Any, make_targets: Callable[[torch.device], Targets]
) -> Material:
    """Everything, from the files.

    Args:
        context: the run.
        settings: checked options.
        accelerator: knows device and processes.
        make_targets: lets the experts say what the samples' targets are; given the device.
    """
    device, sharded = accelerator.device, settings.options.shard
    task_vectors = open_task_vectors(context, settings, accelerator)
    # The others find the responses that the main process has written, but split models need them all.
    with nullcontext() if sharded else accelerator.main_process_first():
        targets = make_targets(device)
    model = load_on(device, context.backbone, context.plan.base, settings.asked.dtype, sharded=sharded)
    return Material(targets, task_vectors, model)


def open_task_vectors(context: Context, settings: Settings, accelerator: Any) -> TaskVectors:
    """Task vectors, or the directions that coefficients multiply in their place."""
    directions = settings.directions
    if directions.in_blocks:
        rule, whole = directions.prepare(), directions.is_whole
        found = TaskVectors(context.plan, settings.scale, accelerator.device, rule, is_whole=whole)
        check_weights(context, found.magnitudes if directions.name == TASK_VECTORS else None)
        return found
    check_weights(context)
    with accelerator.main_process_first():  # the others find the files
        kept = make_directions(directions, context, context.run.directions / directions.name)
    return TaskVectors(context.plan, settings.scale, accelerator.device, kept=kept)


def targets_of(context: Context, settings: Settings, device: torch.device) -> Targets:
    """What the experts say about the samples."""
    maker = settings.asked.target_maker(context, settings.objective.layers, device, sharded=settings.options.shard)
    return maker.make(settings.asked.samples)


def open_live_model(
    context: Context, settings: Settings, material: Material, vector: CoefficientVector, accelerator: Any
) -> LiveModel:
    """The model that is trained, with everything in the place that memory allows."""
    options = settings.options
    give_bases(context, settings.directions.name, vector, material.task_vectors, accelerator)
    live = LiveModel(material.model, material.task_vectors, vector, context.backbone.file_name)
    try:
        if options.gradient_checkpointing:
            live.checkpoint_activations()
        arrange(live, options, lambda: warm_up(live, settings, material.targets), accelerator.wait_for_everyone)
    except BaseException:
        live.close()
        raise
    return live


def batches_of(settings: Settings, targets: Targets, most: int) -> list[Targets]:
    """Samples that go through the model together.

    Args:
        settings: checked options.
        targets: samples of an update.
        most: bound on the samples of a batch.
    """
    return pack(targets, lambda target: target.length, settings.asked.batch_tokens, most)


def warm_up(live: LiveModel, settings: Settings, targets: Targets) -> None:
    """Forward and backward passes over the longest samples and that with the largest pictures."""
    longest = batches_of(settings, targets, settings.options.gradient_accumulation_steps)[0]
    largest = max(targets, key=lambda target: sum(map(torch.Tensor.numel, target.inputs.values())))
    for batch in [longest] if any(target is largest for target in longest) else [longest, [largest]]:
        losses = settings.objective.losses(live.model, batch)
        if losses.requires_grad:
            losses.sum().backward()  # type: ignore[no-untyped-call]
