"""Checks of the learning options against experts, parameters and calibration files, before any tensor is read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from expert_merging import processes
from expert_merging.checkpoints.configurations import layer_count
from expert_merging.context import Context
from expert_merging.errors import InputError, Problems, near_name
from expert_merging.learned.directions import Directions, find_directions
from expert_merging.learned.options import TrainingOptions
from expert_merging.learned.parametrisations import Layout
from expert_merging.learned.penalties import Penalty
from expert_merging.running.accelerator import check_tracker
from expert_merging.running.objectives import Objective
from expert_merging.running.samples import Samples, check_samples

# Initial value of coefficients of task vectors, where the family has none.
_USUAL = 0.3


@dataclass(frozen=True, eq=False)
class Start:
    """Where learning may begin.

    Args:
        directions: what the coefficients multiply.
        initial: their initial value, per expert.
    """

    directions: Directions
    initial: tuple[float, ...]

    def __str__(self) -> str:
        """For the log: ``svd at 1``."""
        return f"{self.directions.name} at {', '.join(f'{value:g}' for value in dict.fromkeys(self.initial))}"


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Options after all checks, in the form that training uses.

    Args:
        options: the options as given.
        asked: calibration samples.
        objective: what is made small.
        directions: what the coefficients multiply.
        scale: factor on an expert's directions, per expert.
        layout: which coefficients there are and where they start.
        penalty: what is added to the losses for coefficients as they are.
        starts: where learning may begin, if that is still to be chosen.
    """

    options: TrainingOptions
    asked: Samples
    objective: Objective
    directions: Directions
    scale: tuple[float, ...]
    layout: Layout
    penalty: Penalty
    starts: tuple[Start, ...] = ()

    def beginning_at(self, start: Start) -> Settings:
        """The same with one start."""
        layout = replace(self.layout, initial=start.initial, bounded=start.directions.bounded)
        return replace(self, directions=start.directions, layout=layout, starts=())


def check(context: Context, options: TrainingOptions) -> Settings:
    """Resolve the options against experts, parameters and calibration files.

    Raises:
        InputError: every problem found.
    """
    plan, problems = context.plan, Problems()
    experts = tuple(plan.experts)
    with problems.collecting():
        starts = _starts(context, options)
    with problems.collecting():
        scale = _task_vector_scale(options.task_vector_coeffs_dict or {}, experts)
    with problems.collecting():
        chunks = options.chunks(map(plan.part, plan.merged))
        axes = options.axes(map(plan.part, plan.merged))
    with problems.collecting():
        objective = options.objective(layer_count(plan.base.config))
    with problems.collecting():
        check_tracker(context.log_with)
    if options.shard and processes.count() == 1:
        problems.add(
            "--shard splits a model over the processes of a run, and this is the only one; start it with torchrun or "
            "accelerate launch, or leave the flag away"
        )
    with problems.collecting():
        asked = check_samples(context, options, batch_tokens=options.batch_tokens, synthesize=options.synthesize)
        for task in options.loss_alphas or {}:
            if task not in asked.tasks:
                known = near_name(task, asked.tasks)
                problems.add(f"--loss_alphas names the task {task!r}, which has no samples. {known}")
    problems.check()
    return Settings(
        options=options,
        asked=asked,
        objective=replace(objective, batch_tokens=asked.batch_tokens),
        directions=starts[0].directions,
        scale=scale,
        layout=Layout(
            chunks,
            starts[0].initial,
            bounded=starts[0].directions.bounded and not options.free,
            signed=options.signed,
            axes=axes,
        ),
        penalty=options.penalty(),
        starts=starts if len(starts) > 1 else (),
    )


def _starts(context: Context, options: TrainingOptions) -> tuple[Start, ...]:
    """Where learning may begin: at the given coefficient, or at that which the directions are made for."""
    found = [find_directions(context, *asked) for asked in options.asked_directions]
    return tuple(Start(directions, _initial_values(options, directions, context)) for directions in found)


def _initial_values(options: TrainingOptions, directions: Directions, context: Context) -> tuple[float, ...]:
    """Initial coefficient per expert: as given, or 1 for a method's directions, or what is usual for task vectors."""
    given = options.scaling_coefficient
    family, count = float(context.backbone.defaults.get("scaling_coefficient", _USUAL)), len(context.plan.experts)
    default = options.usual_coefficient(family, count) if directions.initial is None else directions.initial
    each = given if isinstance(given, list) else [given] * count
    values = [default if value is None else value for value in each]
    least = -1 if options.signed else 0
    bounded = directions.bounded and not options.free
    outside = [value for value in values if bounded and not least < value < 1]
    if outside:
        raise InputError(
            "--scaling_coefficient is the initial value of learned coefficients and must lie strictly between "
            f"{least} and 1 (0.3, for example), got {outside[0]:g}"
        )
    return tuple(values)


def _task_vector_scale(given: Mapping[str, float], experts: tuple[str, ...]) -> tuple[float, ...]:
    unknown = [name for name in given if name not in experts]
    if unknown:
        raise InputError(
            f"--task_vector_coeffs_dict: there is no expert {unknown[0]!r}. {near_name(unknown[0], experts)}"
        )
    return tuple(given.get(name, 1.0) for name in experts)
