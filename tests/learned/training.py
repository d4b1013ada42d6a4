"""Trainers of small checkpoints, and their plain twins."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from expert_merging.catalogue import find_method
from expert_merging.context import Context
from expert_merging.learned.options import LearningOptions
from expert_merging.learned.settings import check
from expert_merging.learned.trainer import Trainer
from expert_merging.parts import Part
from expert_merging.plan import Plan, make_plan
from expert_merging.progress import no_progress
from expert_merging.run import Run
from expert_merging.streaming import Reader
from Mistral.backbone import BACKBONE
from tests.checkpoints import BASE, EXPERTS
from tests.learned.twin import Example, Twin

EXCLUDED = list(BACKBONE.exclude_params)


def read_task_vectors(plan: Plan, part: Part) -> tuple[torch.Tensor, torch.Tensor]:
    """The base's entries of a part, and all task vectors'."""
    return Reader(plan, torch.device("cpu")).read(part)


def make_trainer(
    cache: Path,
    folder: Path,
    *,
    exclude=EXCLUDED,
    experts=tuple(EXPERTS),
    log_with="none",
    device="cpu",
    kind=LearningOptions,
    **options,
):
    plan = make_plan(cache / BASE, {name: cache / EXPERTS[name] for name in experts}, exclude)
    run = Run(folder)
    folder.mkdir(parents=True, exist_ok=True)
    context = Context(plan, BACKBONE, run, 3, device, log_with, no_progress, find_method=find_method)
    settings = check(context, kind(**{"data_dir": str(cache / "dataset"), "max_new_tokens": 8, **options}))
    return Trainer(context, settings)


def make_twin(trainer: Trainer, **options) -> tuple[Twin, list[Example]]:
    plan, settings = trainer.plan, trainer.settings
    twin = Twin(
        base=plan.base.folder,
        experts={name: checkpoint.folder for name, checkpoint in plan.experts.items()},
        merged=list(plan.merged),
        initial=list(settings.layout.initial),
        layers=list(settings.objective.layers),
        **options,
    )
    answers = json.loads(trainer.context.run.responses.read_text()) if trainer.context.run.responses.exists() else {}
    examples = [
        Example(
            sample.expert,
            sample.task,
            sample.question,
            sample.response or answers[f"{sample.task}/{sample.identity}/{sample.question}"]["response"],
        )
        for sample in settings.asked.samples
    ]
    return twin, examples


def answering(*tokens: int):
    """Lets every expert answer with these tokens, in place of `expert_merging.running.targets.generate`."""
    return lambda model, processor, prompts, *_: [("text", list(tokens))] * len(prompts)
