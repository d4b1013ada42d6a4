"""The samples of a run and all checks that they need, before any tensor is read."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from expert_merging import processes
from expert_merging.asking import check_given, choose_formats
from expert_merging.backbone import language_setting, refuse_lacking
from expert_merging.calibration import Sample, load_samples
from expert_merging.context import Context
from expert_merging.errors import InputError, Problems
from expert_merging.running.options import SampleOptions
from expert_merging.running.prompts import Prompts
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
        options: how they are asked.
        prompts: their prompts as model inputs; None to make them when they are asked.
    """

    samples: tuple[Sample, ...]
    longest: int
    precision: str
    options: SampleOptions
    prompts: Prompts | None = None

    @property
    def dtype(self) -> torch.dtype:
        """Type of the weights while models run."""
        return DTYPES[self.precision]

    @property
    def tasks(self) -> list[str]:
        """Names of the tasks."""
        return sorted({sample.task for sample in self.samples})

    @property
    def digest(self) -> str:
        """Of all questions, responses and pictures."""
        contents = [(sample.task, sample.expert, sample.question, sample.response) for sample in self.samples]
        digest = hashlib.sha256(json.dumps(contents).encode())
        for sample in self.samples:
            for picture in sample.images:  # as files: to hash what models are given of them takes forty times as long
                digest.update(picture.read_bytes())
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
            prompts=self.prompts,
        )


def check_samples(context: Context, options: SampleOptions, *, compares_logits: bool = True) -> Samples:
    """Read the calibration files and check that every model of the run can be asked.

    Args:
        context: the run.
        options: which samples are asked, and how.
        compares_logits: the models' output heads are used apart from the models.

    Raises:
        InputError: every problem found.
    """
    problems = Problems()
    found = Samples((), 0, "no", options)
    with problems.collecting():
        found = replace(found, precision=_precision(options.mixed_precision, context.device))
    with problems.collecting():
        _check_model(context, compares_logits=compares_logits)
    with problems.collecting():
        found = replace(found, samples=_load(context, options))
    problems.found += check_given(options.prompt_template, context.plan.experts, set(found.tasks))
    if found.samples and not problems.found:
        with problems.collecting():
            found = _with_prompts(found, context)
    problems.check()
    return found


def _load(context: Context, options: SampleOptions) -> tuple[Sample, ...]:
    """The samples of the calibration files."""
    samples = load_samples(
        Path(options.data_dir or "dataset"),
        tuple(context.plan.experts),
        default_count=options.samples_per_task,
        counts=options.samples_per_task_dict or {},
        task_expert=options.task_expert or {},
        family_tasks=context.backbone.task_experts,
    )
    with_image = next((sample for sample in samples if sample.images), None)
    if with_image is not None and not context.backbone.takes_images:
        raise InputError(f"{with_image.task}.json has an image_path, and {context.backbone.name} is a language model")
    return tuple(samples)


def _with_prompts(found: Samples, context: Context) -> Samples:
    """The samples with their prompts: files of tokenizer and processor, pictures, their sizes and lengths are checked.

    The prompts are kept for the experts, unless none will be asked.
    """
    options = found.options
    keeps = not (context.dry_run or context.run.is_complete)
    formats = choose_formats(context.backbone, context.plan, options.prompt_template)
    prompts = Prompts(context.backbone, context.plan.base, formats, keeps=keeps)
    lengths = prompts.check(found.samples)
    # What an expert writes may be followed by all of a turn's end but its first token.
    longest = max(
        length if sample.response is not None else length + options.max_new_tokens + len(prompts.end_tokens(sample)) - 2
        for sample, length in zip(found.samples, lengths, strict=True)
    )
    return replace(found, longest=longest, prompts=prompts)


def _check_model(context: Context, *, compares_logits: bool) -> None:
    """Check that the model's parameters are there, what is merged among them, and that its head is all there is."""
    plan, file_name = context.plan, context.backbone.file_name
    names = {file_name(name) for name in context.backbone.parameter_names(plan.base.folder)}
    unknown = [name for name in plan.merged if file_name(name) not in names]
    if unknown:
        raise InputError(f"{unknown[0]} is in the checkpoint but is no parameter of the model; exclude it")
    refuse_lacking(plan.base.folder, names - {file_name(name) for name in plan.base.entries})
    changed = [name for name in _CHANGES_LOGITS if language_setting(plan.base.config, name) not in (None, 1, 1.0)]
    if changed and compares_logits:
        raise InputError(
            f"the model changes its logits after the output head ({changed[0]} in config.json), which learning does "
            "not cover; closed-form methods do"
        )


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
