"""Checks of the learning options against experts, parameters and calibration files, before any tensor is read."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from expert_merging.backbone import Backbone, language_setting, layer_count, refuse_lacking
from expert_merging.calibration import Sample, load_samples
from expert_merging.errors import InputError, Problems, near_name
from expert_merging.learned import Context
from expert_merging.learned.coefficients import CoefficientVector, choose_chunks
from expert_merging.learned.objectives import Objective, alignment, prediction_entropy
from expert_merging.learned.options import AlignmentOptions, LearningOptions, TrainingOptions
from expert_merging.learned.targets import check_lengths, response_tokens
from expert_merging.plan import Plan

_CHANGES_LOGITS = ("final_logit_softcapping", "logit_scale", "logits_scaling")


@dataclass(frozen=True)
class Settings:
    """Options after all checks, in the form that training uses.

    Args:
        options: the options as given.
        samples: calibration samples.
        initial: initial coefficient per expert.
        scale: factor on task vectors per expert.
        chunks: number of chunks by parameter name.
        objective: what is made small.
        regularisation_weight: weight of the coefficients' distance from their initial values.
        precision: ``no``, ``fp16`` or ``bf16``.
        longest: tokens of the longest sample with its response.
        budget: coefficients per expert that the regularisation counts; None for those that are trained.
        start: ``(experts,)`` first values by parameter name; None for the initial ones.
        shared: one coefficient per expert for all parameters together.
        density: fraction of the task vectors' entries that TIES keeps before anything is learned; None for all.
    """

    options: TrainingOptions
    samples: tuple[Sample, ...]
    initial: tuple[float, ...]
    scale: tuple[float, ...]
    chunks: Mapping[str, int]
    objective: Objective
    regularisation_weight: float
    precision: str
    longest: int = 0
    budget: float | None = None
    start: Mapping[str, Tensor] | None = None
    shared: bool = False
    density: float | None = None

    @property
    def trained(self) -> int:
        """Number of coefficients that are learned."""
        return len(self.initial) * (1 if self.shared else sum(self.chunks.values()))

    def make_vector(self, device: torch.device) -> CoefficientVector:
        """The coefficients as training begins."""
        return CoefficientVector(self.chunks, self.initial, device, start=self.start, shared=self.shared)


def check(plan: Plan, context: Context, options: TrainingOptions) -> Settings:
    """Resolve the options against experts, parameters and calibration files."""
    problems = Problems()
    experts = tuple(plan.experts)
    sizes = {name: plan.base.entries[name].elements for name in plan.merged}
    initial, scale, chunks = (), (), dict.fromkeys(sizes, 1)  # type: tuple[float, ...], tuple[float, ...], dict[str, int]
    samples: list[Sample] = []
    longest = 0
    with problems.collecting():
        initial = _initial_values(options.scaling_coefficient, experts)
    with problems.collecting():
        scale = _task_vector_scale(options.task_vector_coeffs_dict or {}, experts)
    if isinstance(options, LearningOptions):
        with problems.collecting():
            chunks = choose_chunks(sizes, options.coeffs_size_dict or {})
    with problems.collecting():
        objective = _objective(options, layer_count(plan.base.config))
    with problems.collecting():
        precision = _precision(options.mixed_precision, context.device)
    with problems.collecting():
        _check_tracker(context.log_with)
    with problems.collecting():
        _check_model(plan, context)
    if options.shard and int(os.environ.get("WORLD_SIZE", "1")) == 1:
        problems.add(
            "--shard splits a model over the processes of a run, and this is the only one; start it with torchrun or "
            "accelerate launch, or leave the flag away"
        )
    if options.prompt_template is not None and "{question}" not in options.prompt_template:
        problems.add(f"--prompt_template must contain {{question}}, got {options.prompt_template!r}")
    with problems.collecting():
        samples = load_samples(
            Path(options.data_dir or "dataset"),
            experts,
            default_count=options.samples_per_task,
            counts=options.samples_per_task_dict or {},
            task_expert=options.task_expert or {},
            family_tasks=context.backbone.task_experts,
        )
        if any(sample.images for sample in samples) and not context.backbone.takes_images:
            with_image = next(sample for sample in samples if sample.images)
            problems.add(f"{with_image.task}.json has an image_path, and {context.backbone.name} is a language model")
        else:
            longest = _check_prompts(plan, context.backbone, samples, options)
        tasks = sorted({sample.task for sample in samples})
        for task in options.loss_alphas or {}:
            if task not in tasks:
                problems.add(f"--loss_alphas names the task {task!r}, which has no samples. {near_name(task, tasks)}")
    problems.check()
    weight = options.sparsity_reg_weight if isinstance(options, AlignmentOptions) else 0.0
    return Settings(options, tuple(samples), initial, scale, chunks, objective, weight, precision, longest)


def _objective(options: TrainingOptions, layer_count: int | None) -> Objective:
    if not isinstance(options, AlignmentOptions):
        return prediction_entropy(options.logits_chunk_tokens)
    layers = _aligned_layers(options, layer_count)
    if not layers and options.logits_weight == 0:
        raise InputError(
            "neither logits nor hidden states are aligned, so there is nothing to learn; give --logits_weight or "
            "--hidden_states_weight and --hidden_states_layers a value that is not 0 or none"
        )
    return alignment(
        layers,
        temperature=options.temperature,
        logits_weight=options.logits_weight,
        hidden_states_weight=options.hidden_states_weight,
        slice_tokens=options.logits_chunk_tokens,
    )


def _check_prompts(plan: Plan, backbone: Backbone, samples: list[Sample], options: TrainingOptions) -> int:
    """Check that every sample can be encoded: files of tokenizer and processor, pictures and their sizes.

    Returns:
        Tokens of the longest, with its response or the most that an expert may write.
    """
    processor = backbone.load_processor(plan.base.folder)
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
        check_lengths(plan.base, backbone, lengths)
    problems.check()
    return longest


def _check_model(plan: Plan, context: Context) -> None:
    """Check that the model's parameters are there, what is merged among them, and that its head is all there is."""
    file_name = context.backbone.file_name
    names = {file_name(name) for name in context.backbone.parameter_names(plan.base.folder)}
    unknown = [name for name in plan.merged if file_name(name) not in names]
    if unknown:
        raise InputError(f"{unknown[0]} is in the checkpoint but is no parameter of the model; exclude it")
    refuse_lacking(plan.base.folder, names - {file_name(name) for name in plan.base.entries})
    changed = [name for name in _CHANGES_LOGITS if language_setting(plan.base.config, name) not in (None, 1, 1.0)]
    if changed:
        raise InputError(
            f"the model changes its logits after the output head ({changed[0]} in config.json), which learning does "
            "not cover; closed-form methods do"
        )


def _initial_values(given: float | list[float], experts: tuple[str, ...]) -> tuple[float, ...]:
    values = given if isinstance(given, list) else [given] * len(experts)
    if len(values) != len(experts):
        raise InputError(
            f"--scaling_coefficient has {len(values)} values for {len(experts)} experts ({', '.join(experts)})"
        )
    outside = [value for value in values if not 0 < value < 1]
    if outside:
        raise InputError(
            "--scaling_coefficient is the initial value of learned coefficients and must lie strictly between 0 and 1 "
            f"(0.3, for example), got {outside[0]:g}"
        )
    return tuple(values)


def _task_vector_scale(given: Mapping[str, float], experts: tuple[str, ...]) -> tuple[float, ...]:
    unknown = [name for name in given if name not in experts]
    if unknown:
        raise InputError(
            f"--task_vector_coeffs_dict: there is no expert {unknown[0]!r}. {near_name(unknown[0], experts)}"
        )
    return tuple(given.get(name, 1.0) for name in experts)


def _aligned_layers(options: AlignmentOptions, count: int | None) -> tuple[int, ...]:
    """Indices of the aligned hidden states: 0 is the embeddings' output, N that of layer N."""
    chosen = options.hidden_states_layers
    if chosen == "none" or options.hidden_states_weight == 0:
        return ()
    if count is None:
        raise InputError(
            "config.json of the base does not say how many layers it has; give --hidden_states_layers none"
        )
    if chosen == "middle":
        return (count // 2,)
    if chosen == "all":
        return tuple(range(1, count + 1))
    outside = [layer for layer in chosen if int(layer) > count]
    if outside:
        raise InputError(f"--hidden_states_layers: the model has {count} layers (0 to {count}), got {outside[0]}")
    return tuple(int(layer) for layer in chosen)


def _precision(asked: str, device: str) -> str:
    on_gpu = torch.device(device).type == "cuda"
    launched = os.environ.get("ACCELERATE_MIXED_PRECISION")  # "no" unless the user has chosen
    if asked == "auto" and launched in ("fp16", "bf16"):
        asked = launched
    if asked == "auto":
        if not on_gpu:
            return "no"
        with torch.cuda.device(device):
            return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    if asked == "fp16" and not on_gpu:
        raise InputError("--mixed_precision fp16 needs a GPU; on a CPU use bf16 or no")
    return asked


def _check_tracker(log_with: str) -> None:
    if log_with == "none":
        return
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

    available = [str(getattr(tracker, "value", tracker)) for tracker in get_available_trackers()]
    if log_with not in available:
        known = [str(getattr(tracker, "value", tracker)) for tracker in LOGGER_TYPE_TO_CLASS]
        advice = f"pip install {log_with}" if log_with in known else near_name(log_with, [*known, "none"])
        raise InputError(f"--log_with {log_with}: that tracker is not available. {advice}")
