"""A score without labels: how near a model comes to each task's expert, on inputs that it has not been merged with.

For every task, the mean divergence of the model's predictions from those of the task's expert, and the mean squared
difference of a hidden state, both relative to the base's: the base has 1, the expert 0. Works for any model that has
the base's architecture, whatever merged it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from expert_merging.backbone import Backbone, layer_count
from expert_merging.calibration import Sample
from expert_merging.errors import Problems
from expert_merging.plan import Plan
from expert_merging.progress import Progress
from expert_merging.running.objectives import distance
from expert_merging.running.scores import ByTask, mean_over_tasks, relative_to_base, score_by_task
from expert_merging.running.targets import TargetMaker

BASE = "base"
MEAN = "mean"


@dataclass(frozen=True)
class Probe:
    """What is asked of every model, and where.

    Args:
        samples: questions of all tasks.
        response_only: look at the tokens that predict the response, instead of all.
        max_new_tokens: bound on the length of the responses that experts write.
        prompt_template: text with ``{question}`` in it; None for the family's own.
        responses: file that keeps the responses written by experts.
        device: where models run.
        dtype: type of their weights.
    """

    samples: Sequence[Sample]
    response_only: bool
    max_new_tokens: int
    prompt_template: str | None
    responses: Path
    device: torch.device
    dtype: torch.dtype


def held_out(samples: Sequence[Sample], used: Mapping[str, int]) -> list[Sample]:
    """The samples of each task after those that were used for learning.

    Args:
        samples: the first of each task, in the order of its file.
        used: number of samples used, by task.

    Raises:
        InputError: a task has no others.
    """
    by_task: dict[str, list[Sample]] = defaultdict(list)
    for sample in samples:
        by_task[sample.task].append(sample)
    problems = Problems()
    for task, own in by_task.items():
        if len(own) <= used.get(task, 0):
            problems.add(
                f"all {len(own)} samples of {task}.json were used for learning; give --data_dir a folder with others"
            )
    problems.check()
    return [sample for task, own in by_task.items() for sample in own[used.get(task, 0) :]]


def measure(
    plan: Plan, backbone: Backbone, models: Mapping[str, Path], probe: Probe, progress: Progress
) -> dict[str, ByTask]:
    """How far the base and every model are from each task's expert: ``divergence`` in nats per token, and ``hidden``.

    Args:
        plan: base and experts.
        backbone: the model family.
        models: folders by name.
        probe: what is asked.
        progress: shows how far the work is.

    Raises:
        InputError: a folder holds no model of the family, or an expert cannot answer.
    """
    count = layer_count(plan.base.config)
    layers = () if count is None else (count // 2,)
    # Every head counts as changed, so that targets keep the expert's own: the models' heads may be anything.
    everything = replace(plan, merged=tuple(plan.base.entries))
    targets = TargetMaker(
        backbone=backbone,
        plan=everything,
        layers=layers,
        response_only=probe.response_only,
        max_new_tokens=probe.max_new_tokens,
        prompt_template=probe.prompt_template,
        dtype=probe.dtype,
        device=probe.device,
        responses=probe.responses,
        progress=progress,
    ).make(probe.samples)
    score, folders = distance(layers), {BASE: plan.base.folder, **models}
    found = {}
    with progress("measuring models", len(folders) * len(targets), "sample") as advance:
        for name, folder in folders.items():
            model = backbone.load_model(folder, probe.dtype).to(probe.device)
            found[name] = score_by_task(score, model, targets)
            advance(len(targets), name)
    return found


def relative(found: Mapping[str, ByTask]) -> dict[str, ByTask]:
    """Every model's distances as shares of the base's, with their mean over tasks; the base has 1.

    Raises:
        InputError: the base and an expert agree, so that there is nothing to compare with.
    """
    shares = {name: relative_to_base(own, found[BASE]) for name, own in found.items()}
    return {name: {**own, MEAN: mean_over_tasks(own)} for name, own in shares.items()}
