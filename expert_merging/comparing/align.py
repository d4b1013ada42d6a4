"""A score without labels: how near a model comes to each task's expert, on inputs that it has not been merged with.

For every task, the mean divergence of the model's predictions from those of the task's expert, and the mean squared
difference of a hidden state, both relative to the base's: the base has 1, the expert 0. Works for any model that has
the base's architecture, whatever merged it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from expert_merging.checkpoints.adapter import Adapter
from expert_merging.checkpoints.adapter_files import is_adapter
from expert_merging.checkpoints.configurations import layer_count
from expert_merging.errors import Problems
from expert_merging.plan import Plan
from expert_merging.questions.calibration import Sample
from expert_merging.running.objectives import distance
from expert_merging.running.scores import ByTask, mean_over_tasks, relative_to_base, require_distance, score_by_task
from expert_merging.running.sharding import load_on
from expert_merging.running.targets import TargetMaker

BASE = "base"
MEAN = "mean"


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


def middle_layer(plan: Plan) -> tuple[int, ...]:
    """The hidden state that is compared; none where ``config.json`` does not say how many there are."""
    count = layer_count(plan.base.config)
    return () if count is None else (count // 2,)


def measure(maker: TargetMaker, samples: Sequence[Sample], models: Mapping[str, Path]) -> dict[str, ByTask]:
    """How far the base and every model are from each task's expert: ``divergence`` in nats per token, and ``hidden``.

    The latter is left out where the experts are not asked for hidden states.

    Args:
        maker: asks the experts; models run as it lets experts run.
        samples: questions of all tasks.
        models: folders by name.

    Raises:
        InputError: a folder holds no model of the family, or an expert cannot answer.
    """
    plan = maker.plan
    # Every head counts as changed, so that targets keep the expert's own: the models' heads may be anything.
    everything = replace(plan, merged=tuple(plan.base.entries))
    targets = replace(maker, plan=everything).make(samples)
    score, folders = distance(maker.layers, maker.batch_tokens), {BASE: plan.base.folder, **models}
    found = {}
    with maker.progress("measuring models", len(folders) * len(targets), "sample") as advance:
        for name, folder in folders.items():
            model = _load(maker, folder)
            found[name] = score_by_task(score, model, targets)
            advance(len(targets), name)
    return found


def _load(maker: TargetMaker, folder: Path) -> Any:
    """The model of a folder, which may be an adapter of the base."""
    if is_adapter(folder):
        adapter = Adapter(folder, maker.plan.base, maker.backbone.file_name, maker.plan.published)
        return load_on(maker.device, maker.backbone, adapter, maker.dtype, sharded=False)
    return maker.backbone.load_model(folder, maker.dtype).to(maker.device)


def relative(found: Mapping[str, ByTask]) -> dict[str, ByTask]:
    """Every model's distances as shares of the base's, with their mean over tasks; the base has 1.

    Raises:
        InputError: the base and an expert agree, so that there is nothing to compare with.
    """
    require_distance(found[BASE])
    shares = {name: relative_to_base(own, found[BASE]) for name, own in found.items()}
    return {name: {**own, MEAN: mean_over_tasks(own)} for name, own in shares.items()}
