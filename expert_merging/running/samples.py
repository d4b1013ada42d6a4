"""The samples of a run and all checks that they need, before any tensor is read."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import torch

from expert_merging import processes
from expert_merging.backbone import language_setting, refuse_lacking
from expert_merging.calibration import Sample, load_samples
from expert_merging.context import Context
from expert_merging.errors import InputError, Problems
from expert_merging.running.options import SampleOptions
from expert_merging.running.targets import TargetMaker, check_lengths, response_tokens

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
    """

    samples: tuple[Sample, ...]
    longest: int
    precision: str
    options: SampleOptions

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
        pictures = [picture.read_bytes() for sample in self.samples for picture in sample.images]
        return hashlib.sha256(b"".join([json.dumps(contents).encode(), *pictures])).hexdigest()[:16]

    @property
    def inputs(self) -> dict[str, str]:
        """What decides a result beside the options: ``auto`` is another thing elsewhere."""
        return {"calibration": self.digest, "precision": self.precision}

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
    samples: list[Sample] = []
    longest, precision = 0, "no"
    with problems.collecting():
        precision = _precision(options.mixed_precision, context.device)
    with problems.collecting():
        _check_model(context, compares_logits=compares_logits)
    if options.prompt_template is not None and "{question}" not in options.prompt_template:
        problems.add(f"--prompt_template must contain {{question}}, got {options.prompt_template!r}")
    with problems.collecting():
        samples = load_samples(
            Path(options.data_dir or "dataset"),
            tuple(context.plan.experts),
            default_count=options.samples_per_task,
            counts=options.samples_per_task_dict or {},
            task_expert=options.task_expert or {},
            family_tasks=context.backbone.task_experts,
        )
        if any(sample.images for sample in samples) and not context.backbone.takes_images:
            with_image = next(sample for sample in samples if sample.images)
            problems.add(f"{with_image.task}.json has an image_path, and {context.backbone.name} is a language model")
        else:
            longest = _check_prompts(context, samples, options)
    problems.check()
    return Samples(tuple(samples), longest, precision, options)


def _check_prompts(context: Context, samples: list[Sample], options: SampleOptions) -> int:
    """Check that every sample can be encoded: files of tokenizer and processor, pictures and their sizes.

    Returns:
        Tokens of the longest, with its response or the most that an expert may write.
    """
    base, backbone = context.plan.base, context.backbone
    processor = backbone.load_processor(base.folder)
    problems = Problems()
    longest = 0
    lengths = []
    for sample in samples:
        with problems.collecting():
            prompt = backbone.encode_prompt(processor, sample, options.prompt_template)["input_ids"].shape[1]
            given = None if sample.response is None else len(response_tokens(processor, sample.response))
            lengths.append((sample, prompt + (1 if given is None else given)))
            longest = max(longest, prompt + (options.max_new_tokens if given is None else given))
    with problems.collecting():
        check_lengths(base, backbone, lengths)
    problems.check()
    return longest


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
