"""Where learning begins: the directions whose merge is nearest to the experts.

Which directions are right depends on the experts: the filtered parts of one closed form, or the orthogonalised ones of
another. So all are merged in memory and scored on the calibration samples, and learning begins at the best. No answers
are needed for it. Other coefficients than those that directions are made for are not tried: a smaller one is often
nearer, but learning gets less far from there.
"""

from __future__ import annotations

import json
import logging
from typing import Any

import torch

from expert_merging.context import Context
from expert_merging.documents import read_object
from expert_merging.errors import InputError
from expert_merging.learned.live import LiveModel
from expert_merging.learned.material import Material, open_task_vectors, targets_of
from expert_merging.learned.settings import Settings, Start
from expert_merging.learned.task_vectors import TaskVectors
from expert_merging.running.scores import ExpertDivergence
from expert_merging.running.sharding import load_on
from expert_merging.writing import write_atomically

logger = logging.getLogger(__name__)


def choose_start(context: Context, settings: Settings, accelerator: Any) -> tuple[Settings, Material | None]:
    """The settings with the best start.

    Args:
        context: the run, which remembers the choice.
        settings: checked options with several starts.
        accelerator: knows device and processes.

    Returns:
        The settings, and what was gathered for them; None if an earlier part of the run has chosen.

    Raises:
        InputError: the base and an expert agree, so that there is nothing to compare with.
    """
    remembered = _remembered(context, settings)
    if remembered is not None:
        return settings.beginning_at(remembered), None
    with accelerator.main_process_first():  # the others find the responses
        targets = targets_of(context, settings, accelerator.device)
    model = load_on(
        accelerator.device, context.backbone, context.plan.base, settings.asked.dtype, sharded=settings.options.shard
    )
    given = [target for target in targets if target.sample.file is not None]  # not the many that were made of them
    divergence = ExpertDivergence.beside(model, given, settings.asked.batch_tokens)
    scores: dict[Start, float] = {}
    made: dict[str, TaskVectors] = {}
    with context.progress("choosing the start", len(settings.starts), "merge") as advance:
        for start in settings.starts:
            own, name = settings.beginning_at(start), start.directions.name
            if name not in made:
                made[name] = open_task_vectors(context, own, accelerator)
            scores[start] = _score(context, own, model, made[name], divergence)
            logger.info("%s: %.4g of the base's divergence from the experts", start, scores[start])
            advance(1, name)
    number = _agreed(settings.starts.index(min(scores, key=scores.__getitem__)), accelerator)
    chosen = settings.starts[number]
    logger.info("learning begins at %s", chosen)
    if accelerator.is_main_process:
        record = {"chosen": str(chosen), "divergence": {str(start): score for start, score in scores.items()}}
        context.run.folder.mkdir(parents=True, exist_ok=True)
        write_atomically(context.run.start, (json.dumps(record, indent=2) + "\n").encode())
    return settings.beginning_at(chosen), Material(targets, made[chosen.directions.name], model)


def _remembered(context: Context, settings: Settings) -> Start | None:
    """What an earlier part of the run has chosen; None where it has not, or its record is damaged."""
    try:
        chosen = read_object(context.run.start).get("chosen")
    except InputError:
        return None
    return next((start for start in settings.starts if str(start) == chosen), None)


def _score(
    context: Context, settings: Settings, model: Any, task_vectors: TaskVectors, divergence: ExpertDivergence
) -> float:
    """Divergence of a start's merge from the experts as a share of the base's, mean over tasks."""
    vector = settings.layout.of_whole_tensors().vector(task_vectors.device)
    live = LiveModel(model, task_vectors, vector, context.backbone.file_name)
    try:
        live.rebuild()
        return divergence(live.model)
    finally:
        live.close()


def _agreed(choice: int, accelerator: Any) -> int:
    """The main process's choice, for all: elsewhere the last digits of a score may differ."""
    from accelerate.utils import broadcast

    return int(broadcast(torch.tensor([choice], device=accelerator.device))[0])
