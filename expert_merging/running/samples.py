"""The samples of a run and all checks that they need, before any tensor is read."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Set
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from expert_merging import processes
from expert_merging.asking import check_given, choose_formats
from expert_merging.backbone import Backbone, refuse_lacking
from expert_merging.checkpoints.adapter import Adapter
from expert_merging.checkpoints.checkpoint import Checkpoint
from expert_merging.checkpoints.configurations import language_setting
from expert_merging.checkpoints.reading import MODEL_FILES, damaged_files
from expert_merging.context import Context
from expert_merging.errors import InputError, Problems
from expert_merging.plan import Plan
from expert_merging.questions.calibration import Sample, load_samples
from expert_merging.questions.crossing import crossed, token_pieces
from expert_merging.questions.picture_sources import content_of
from expert_merging.roles import is_word_table
from expert_merging.running.batches import fitting_tokens
from expert_merging.running.options import SampleOptions
from expert_merging.running.prompts import Prompts, tokenizer_of
from expert_merging.running.targets import TargetMaker

_CHANGES_LOGITS = ("final_logit_softcapping", "logit_scale", "logits_scaling")
DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Samples:
    """Samples that can be asked.

    Args:
        samples: the samples.
        longest: tokens of the longest with its response, or the most that an expert may write.
        precision: type of the weights while models run, ``no``, ``fp16`` or ``bf16``.
        batch_tokens: tokens that go through a model together, a single sample's at least.
        options: how they are asked.
        prompts: their prompts as model inputs; None to make them when they are asked.
    """

    samples: tuple[Sample, ...]
    longest: int
    precision: str
    batch_tokens: int
    options: SampleOptions
    prompts: Prompts | None = None

    @property
    def dtype(self) -> torch.dtype:
        """Type of the weights while models run."""
        return DTYPES[self.precision]

    def tokens_together(self, most: int | None = None) -> int:
        """Tokens that go through a model in a pass, at most.

        Args:
            most: bound on the samples of a pass, all by default.
        """
        return max(self.longest, min(self.batch_tokens, self.longest * (most or len(self.samples))))

    @property
    def most_of_an_expert(self) -> int:
        """Number of samples of the expert that has the most."""
        return max(Counter(sample.expert for sample in self.samples).values())

    @property
    def tasks(self) -> list[str]:
        """Names of the tasks."""
        return sorted({sample.task for sample in self.samples})

    @property
    def digest(self) -> str:
        """A digest of all questions, responses and pictures."""
        contents = [(sample.task, sample.expert, sample.question, sample.response) for sample in self.samples]
        digest = hashlib.sha256(json.dumps(contents).encode())
        for sample in self.samples:
            for picture in sample.images:  # as files: to hash what models are given of them takes forty times as long
                digest.update(content_of(picture))
        return digest.hexdigest()[:16]

    @property
    def inputs(self) -> dict[str, str]:
        """What decides a result beside the options: ``auto`` is another thing elsewhere."""
        asked = {} if self.prompts is None else {"formats": self.prompts.formats.digest}
        return {"calibration": self.digest, "precision": self.precision, **asked}

    def target_maker(
        self, context: Context, layers: tuple[int, ...], device: torch.device, *, sharded: bool = False
    ) -> TargetMaker:
        """What loads the experts and records what they say.

        Args:
            context: the run.
            layers: indices of the hidden states that are recorded.
            device: where models run.
            sharded: models are split over all processes.
        """
        return TargetMaker(
            backbone=context.backbone,
            plan=context.plan,
            layers=layers,
            response_only=self.options.loss_tokens == "response",
            max_new_tokens=self.options.max_new_tokens,
            prompt_template=self.options.prompt_template,
            dtype=self.dtype,
            device=device,
            responses=context.run.responses,
            progress=context.progress,
            sharded=sharded,
            batch_tokens=self.batch_tokens,
            prompts=self.prompts,
            kept=context.run.targets,
        )


def check_samples(
    context: Context,
    options: SampleOptions,
    *,
    compares_logits: bool = True,
    batch_tokens: int | None = 1,
    synthesize: int = 0,
    flag: str = "data_dir",
) -> Samples:
    """Read the calibration files and check that every model of the run can be asked.

    Args:
        context: the run.
        options: which samples are asked, and how.
        compares_logits: the models' output heads are used apart from the models.
        batch_tokens: tokens that go through a model together; None for a number that suits model and device.
        synthesize: further questions that are made of those of each task.
        flag: names the folder of the files, for messages.

    Raises:
        InputError: every problem found.
    """
    problems = Problems()
    found = _without_samples(context, options, problems, batch_tokens, compares_logits=compares_logits)
    with problems.collecting():
        found = replace(found, samples=_load(context, options, flag))
    problems.found += check_given(options.prompt_template, context.plan.experts, set(found.tasks))
    if found.samples and not problems.found:
        with problems.collecting():
            found = _with_prompts(found, context, synthesize)
    problems.check()
    return found


def check_models(context: Context, options: SampleOptions, *, batch_tokens: int | None) -> Samples:
    """Check that models of the run can be asked questions that are no samples.

    Args:
        context: the run.
        options: how they are asked.
        batch_tokens: as for `check_samples`.

    Returns:
        Type of the weights and tokens that go through a model together, without samples.

    Raises:
        InputError: every problem found.
    """
    problems = Problems()
    found = _without_samples(context, options, problems, batch_tokens, compares_logits=False)
    problems.check()
    return found


def _without_samples(
    context: Context, options: SampleOptions, problems: Problems, batch_tokens: int | None, *, compares_logits: bool
) -> Samples:
    """Type of the weights and tokens that go through a model together; what keeps models from being run is noted."""
    found = Samples((), 0, "no", batch_tokens or 1, options)
    with problems.collecting():
        found = replace(found, precision=_precision(options.mixed_precision, context.device))
    if batch_tokens is None:
        most = fitting_tokens(context.plan.base.config, found.dtype.itemsize, torch.device(context.device))
        found = replace(found, batch_tokens=most)
    with problems.collecting():
        _check_model(context, compares_logits=compares_logits)
    return found


def _load(context: Context, options: SampleOptions, flag: str) -> tuple[Sample, ...]:
    """The samples of the calibration files."""
    samples = load_samples(
        Path(options.data_dir or "dataset"),
        tuple(context.plan.experts),
        default_count=options.samples_per_task,
        counts=options.samples_per_task_dict or {},
        task_expert=options.task_expert or {},
        family_tasks=context.backbone.task_experts,
        flag=flag,
    )
    with_image = next((sample for sample in samples if sample.images), None)
    if with_image is not None and not context.backbone.takes_images:
        raise InputError(f"{with_image.place} has a picture, and {context.backbone.name} is a language model")
    return tuple(samples)


def _with_prompts(found: Samples, context: Context, synthesize: int) -> Samples:
    """The samples with their prompts: files of tokenizer and processor, pictures, their sizes and lengths are checked.

    Further questions are made of those that are right, so that no error is about a question that nobody has written.

    The prompts are kept for the experts, unless none will be asked.
    """
    options = found.options
    keeps = not (context.dry_run or context.run.is_complete)
    formats = choose_formats(context.backbone, context.plan, options.prompt_template)
    prompts = Prompts(context.backbone, context.plan.base, formats, keeps=keeps)
    lengths = prompts.check(found.samples)
    if synthesize:
        pieces = token_pieces(tokenizer_of(prompts.processor))
        further = crossed(found.samples, synthesize, pieces, context.seed)
        lengths += prompts.check(further)
        found = replace(found, samples=(*found.samples, *further))
    # What an expert writes may be followed by all of a turn's end but its first token.
    longest = max(
        length if sample.response is not None else length + options.max_new_tokens + len(prompts.end_tokens(sample)) - 2
        for sample, length in zip(found.samples, lengths, strict=True)
    )
    return replace(found, longest=longest, prompts=prompts)


def _check_model(context: Context, *, compares_logits: bool) -> None:
    """Check that every model can be loaded, that what is merged is among its parameters, and that its head is all.

    Raises:
        InputError: the first kind of problem found.
    """
    plan = context.plan
    plan.refuse_contained(*plan.experts)
    _check_settings(plan)
    names = _parameters(context.backbone, plan.base)
    unknown = [name for name in plan.merged if context.backbone.file_name(name) not in names]
    if unknown:
        raise InputError(
            f"{unknown[0]} is in the checkpoint, and is neither a parameter of the model nor some of one's entries; "
            "exclude it, or use a method that runs no model"
        )
    _check_adapters(context, names)
    problems = Problems()
    for checkpoint in _whole(plan):
        with problems.collecting():
            wanted = names if checkpoint is plan.base else _parameters(context.backbone, checkpoint)
            refuse_lacking(checkpoint.folder, wanted - set(map(context.backbone.file_name, checkpoint.entries)))
    problems.check()
    changed = [name for name in _CHANGES_LOGITS if language_setting(plan.base.config, name) not in (None, 1, 1.0)]
    if changed and compares_logits:
        raise InputError(
            f"the model changes its logits after the output head ({changed[0]} in config.json), which learning does "
            "not cover; closed-form methods do"
        )


def _check_adapters(context: Context, names: Set[str]) -> None:
    """Check that what adapters change is in the model, but for a head that is its embedding."""
    plan, file_name = context.plan, context.backbone.file_name
    unknown = {file_name(name) for name in plan.base.entries} - names
    for expert, checkpoint in plan.experts.items():
        changed = sorted(checkpoint.changed) if isinstance(checkpoint, Adapter) else ()
        lost = [name for name in changed if file_name(name) in unknown and not is_word_table(name)]
        if lost:
            raise InputError(
                f"expert {expert} changes {lost[0]}, which is no parameter of the model in memory, so it cannot be "
                "run; methods that run no model can merge it"
            )


def _whole(plan: Plan) -> list[Checkpoint]:
    """The checkpoints that are whole models."""
    return [one for one in (plan.base, *plan.experts.values()) if not isinstance(one, Adapter)]


def _parameters(backbone: Backbone, checkpoint: Checkpoint) -> set[str]:
    """File names of the parameters of a checkpoint's model."""
    return set(map(backbone.file_name, backbone.parameter_names(checkpoint.folder)))


def _check_settings(plan: Plan) -> None:
    """Check the settings that loading the models reads, so that none stops the run when its turn comes.

    Raises:
        InputError: every problem found.
    """
    problems = Problems()
    for checkpoint in _whole(plan):
        problems.found += damaged_files(checkpoint.folder, MODEL_FILES)
    problems.check()


def _precision(asked: str, device: str) -> str:
    on_gpu = torch.device(device).type == "cuda"
    if asked == "auto":
        asked = processes.launched_precision() or asked
    if asked == "auto":
        if not on_gpu:
            return "no"
        with torch.cuda.device(device):
            return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    if asked == "fp16" and not on_gpu:
        raise InputError("--mixed_precision fp16 needs a GPU; on a CPU use bf16 or no")
    return asked
