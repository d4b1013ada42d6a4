"""Checks of the learning options against experts, parameters and calibration files, before any tensor is read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from expert_merging import processes
from expert_merging.backbone import layer_count
from expert_merging.context import Context
from expert_merging.errors import InputError, Problems, near_name
from expert_merging.learned.coefficients import CoefficientVector, choose_chunks
from expert_merging.learned.options import AlignmentOptions, LearningOptions, TrainingOptions
from expert_merging.running.objectives import Objective, alignment, prediction_entropy
from expert_merging.running.samples import Samples, check_samples


@dataclass(frozen=True)
class Settings:
    """Options after all checks, in the form that training uses.

    Args:
        options: the options as given.
        asked: calibration samples.
        initial: initial coefficient per expert.
        scale: factor on task vectors per expert.
        chunks: number of chunks by parameter name.
        objective: what is made small.
        regularisation_weight: weight of the coefficients' distance from their initial values.
        budget: coefficients per expert that the regularisation counts; None for those that are trained.
        start: ``(experts,)`` first values by parameter name; None for the initial ones.
        shared: one coefficient per expert for all parameters together.
        density: fraction of the task vectors' entries that TIES keeps before anything is learned; None for all.
    """

    options: TrainingOptions
    asked: Samples
    initial: tuple[float, ...]
    scale: tuple[float, ...]
    chunks: Mapping[str, int]
    objective: Objective
    regularisation_weight: float
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


def check(context: Context, options: TrainingOptions) -> Settings:
    """Resolve the options against experts, parameters and calibration files."""
    plan, problems = context.plan, Problems()
    experts = tuple(plan.experts)
    sizes = {name: plan.base.entries[name].elements for name in plan.merged}
    initial, scale, chunks = (), (), dict.fromkeys(sizes, 1)  # type: tuple[float, ...], tuple[float, ...], dict[str, int]
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
        check_tracker(context.log_with)
    if options.shard and processes.count() == 1:
        problems.add(
            "--shard splits a model over the processes of a run, and this is the only one; start it with torchrun or "
            "accelerate launch, or leave the flag away"
        )
    with problems.collecting():
        asked = check_samples(context, options)
        for task in options.loss_alphas or {}:
            if task not in asked.tasks:
                known = near_name(task, asked.tasks)
                problems.add(f"--loss_alphas names the task {task!r}, which has no samples. {known}")
    problems.check()
    weight = options.sparsity_reg_weight if isinstance(options, AlignmentOptions) else 0.0
    return Settings(options, asked, initial, scale, chunks, objective, weight)


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


def check_tracker(log_with: str) -> None:
    """Check that the experiment tracker can be used.

    Raises:
        InputError: it cannot.
    """
    if log_with == "none":
        return
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

    available = [str(getattr(tracker, "value", tracker)) for tracker in get_available_trackers()]
    if log_with not in available:
        known = [str(getattr(tracker, "value", tracker)) for tracker in LOGGER_TYPE_TO_CLASS]
        advice = f"pip install {log_with}" if log_with in known else near_name(log_with, [*known, "none"])
        raise InputError(f"--log_with {log_with}: that tracker is not available. {advice}")
