"""The methods that learn, as the stages that they train in."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from expert_merging.context import Context
from expert_merging.errors import InputError, Problems
from expert_merging.learned.axes import SINGULAR
from expert_merging.learned.bases import bases_size
from expert_merging.learned.chunks import chunk_count
from expert_merging.learned.coefficients import Coefficients, kept_or_made
from expert_merging.learned.directions import kept_output
from expert_merging.learned.earlier import earlier_coefficients
from expert_merging.learned.estimates import Demand, describe, this_machine
from expert_merging.learned.importance import allocate_chunks, describe_layers, mean_coefficients
from expert_merging.learned.optimizer import training_accelerator
from expert_merging.learned.options import ChunkingOptions, TrainingOptions
from expert_merging.learned.penalties import Distance
from expert_merging.learned.settings import Settings, check
from expert_merging.learned.start import choose_start
from expert_merging.learned.state import check_goes_on
from expert_merging.learned.trainer import Trainer
from expert_merging.machine import gib
from expert_merging.method import Preparation, coarsest
from expert_merging.plan import Plan
from expert_merging.processes import is_main_process
from expert_merging.run import Run
from expert_merging.writing import check_free_disk

logger = logging.getLogger(__name__)

# Keeps a first value of 0 or 1 where its gradient, if tiny, is not 0.
_INSIDE = 1e-4


def one_stage(
    context: Context, options: TrainingOptions, *, shared: bool = False, trainer: type[Trainer] = Trainer
) -> Preparation:
    """A method that trains its coefficients once.

    Args:
        context: the run.
        options: the method's options.
        shared: one coefficient per expert for all parameters together.
        trainer: what trains.

    Raises:
        InputError: all problems found.
    """
    settings = check(context, options)
    settings = replace(settings, layout=replace(settings.layout, shared=shared))
    notes = (f"{settings.layout.trained} coefficients learned {_amount(settings)}",)

    def learn() -> Coefficients:
        return _trainer(context, settings, trainer).train()

    return _work(context, settings, learn, notes)


def _trainer(context: Context, settings: Settings, kind: type[Trainer] = Trainer) -> Trainer:
    """What learns, its start chosen."""
    material = None
    if settings.starts:
        settings, material = choose_start(context, settings, training_accelerator(context, settings))
    return kind(context, settings, material)


def two_stages(context: Context, options: ChunkingOptions) -> Preparation:
    """Expert Merging++: learn one coefficient per parameter, then several for those that have proved important.

    The paper is silent on two points. The second stage starts from what the first has learned, or from the initial
    value again (``stage2_init``); and a parameter that gets no chunk keeps the same. The regularisation pulls towards
    the initial value in both cases.

    Args:
        context: the run; the first stage works in a folder inside.
        options: the method's options.

    Raises:
        InputError: all problems found.
    """
    plan, problems = context.plan, Problems()
    given: Coefficients | None = None
    told: tuple[str, ...] = ()
    with problems.collecting():
        settings = check(context, options)
    with problems.collecting():
        _check_budget(options, len(plan.merged))
    if options.coefficients is not None:
        with problems.collecting():
            given, told = earlier_coefficients(context, Path(options.coefficients), force=options.force)
    problems.check()
    if given is not None:
        settings = _beginning_as(given, settings)
        _check_first_stage(given, settings)

    def learn() -> Coefficients:
        stage = replace(context, run=context.run.stage("stage1"))
        first = _trainer(stage, settings)
        coefficients = given or kept_or_made(stage, first.train)
        material = first.gather()
        second = second_stage(first.settings, options, coefficients, material.task_vectors.magnitudes, plan)
        updates = 0 if given else int((coefficients.provenance or {})["updates"])
        # The chunks follow from what the first stage has learned, so with more of that, they are others.
        return Trainer(context, second, material, updates, goes_on=given is not None).train()

    source = f"taken from {options.coefficients}" if given else f"learned {_amount(settings)}"
    notes = (
        f"stage 1: {settings.layout.trained} coefficients {source}",
        *told,
        f"stage 2: {_describe_chunks(options, plan)}",
    )
    inputs = {} if given is None else {"coefficients": given.fingerprint()}
    before = [context.run.stage("stage1")] if given is None else []
    return _work(context, settings, learn, notes, inputs, before)


def second_stage(
    settings: Settings,
    options: ChunkingOptions,
    first: Coefficients,
    magnitudes: Mapping[str, Sequence[float]],
    plan: Plan,
) -> Settings:
    """Settings of the second stage: chunks by importance, first values, and what the regularisation counts."""
    sizes = {name: plan.base.entries[name].elements for name in plan.merged}
    budget = _budget(options, len(sizes))
    if options.chunking == "importance":
        importance = {layer.name: layer.importance for layer in describe_layers(first, magnitudes, sizes)}
        chunks = allocate_chunks(importance, sizes, budget=budget, kappa=options.kappa)
    else:
        wanted = 2 if options.chunking == "all" else 1
        chunks = {name: chunk_count(elements, wanted) for name, elements in sizes.items()}
    begin = None
    if options.stage2_init == "learned":
        begin = {name: mean_coefficients(first.values[name], sizes[name]) for name in sizes}
    if begin is not None and settings.layout.bounded:
        begin = {
            name: value if chunks[name] == 0 else value.clamp(_INSIDE, 1 - _INSIDE) for name, value in begin.items()
        }
    logger.info(
        "stage 2: %d chunks per expert for a budget of %g; %d of %d parameters keep a fixed coefficient",
        sum(chunks.values()),
        budget,
        sum(count == 0 for count in chunks.values()),
        len(chunks),
    )
    return replace(
        settings,
        layout=replace(settings.layout, chunks=chunks, first=begin),
        penalty=Distance(options.regularisation_weight, budget),
    )


def _beginning_as(given: Coefficients, settings: Settings) -> Settings:
    """The settings with the directions of coefficients from elsewhere, if those are among several to choose from."""
    same = [start for start in settings.starts if start.directions.record == given.directions]
    return settings.beginning_at(same[0]) if same else settings


def _check_first_stage(given: Coefficients, settings: Settings) -> None:
    """Check that coefficients from elsewhere can be what this run's first stage would have learned."""
    problems = Problems()
    if given.directions != settings.directions.record:
        problems.add(
            f"--coefficients were learned on {given.directions['name']} and this run learns on "
            f"{settings.directions.name}, or on the same with other options; give a run of expert_merging with the "
            "same --directions"
        )
    if given.task_vector_scale != settings.scale:
        problems.add(
            "--coefficients were learned on task vectors that were scaled otherwise; give the "
            "--task_vector_coeffs_dict that they were learned with"
        )
    outside = [name for name, value in given.values.items() if not bool(((value >= 0) & (value <= 1)).all())]
    if settings.layout.bounded and outside:
        problems.add(f"--coefficients has values outside [0, 1] for {outside[0]}; the second stage learns inside only")
    problems.check()


def _budget(options: ChunkingOptions, layers: int) -> float:
    """B, coefficients per expert in the second stage."""
    return {"importance": options.budget * layers, "all": 2.0 * layers, "none": float(layers)}[options.chunking]


def _check_budget(options: ChunkingOptions, layers: int) -> None:
    if _budget(options, layers) < 1:
        raise InputError(
            f"--budget {options.budget:g} times {layers} merged parameters is less than one coefficient per expert; "
            f"give at least {1 / layers:.2g}"
        )
    if options.chunking == "importance" and options.kappa == 0 and options.budget < 1:
        raise InputError(
            f"--kappa 0 shares the budget out evenly, and --budget {options.budget:g} is less than one coefficient for "
            "each parameter, so none would get any; give at least 1"
        )


def _describe_chunks(options: ChunkingOptions, plan: Plan) -> str:
    layers = len(plan.merged)
    count = f"{_budget(options, layers):g} coefficients per expert"
    how = f"shared out by importance (kappa {options.kappa:g})" if options.chunking == "importance" else "one"
    start = "what stage 1 has learned" if options.stage2_init == "learned" else "the initial value"
    if options.chunking == "importance":
        return f"at most {count}, {how}, from {start}"
    return f"{'2' if options.chunking == 'all' else '1'} chunks for every parameter ({count}), from {start}"


def _amount(settings: Settings) -> str:
    epochs = settings.options.num_epochs
    return f"from {len(settings.asked.samples)} samples in {epochs} epoch{'s' if epochs > 1 else ''}"


def _work(
    context: Context,
    settings: Settings,
    train: Callable[[], Coefficients],
    notes: tuple[str, ...],
    inputs: Mapping[str, str] | None = None,
    before: Sequence[Run] = (),
) -> Preparation:
    """The work of a method whose options are checked.

    Args:
        context: the run.
        settings: checked options.
        train: makes the coefficients.
        notes: what the plan tells.
        inputs: what decides the result beside options and samples.
        before: stages that are learned before the last.
    """
    directions, options = settings.directions, settings.options
    if context.run.goes_on and not context.run.config.exists():  # which has been checked when it began
        last = [run.last_state for run in (*before, context.run) if run.last_state is not None]
        notes = (*notes, check_goes_on(last, options.num_epochs, options.patience))
    every = [start.directions for start in settings.starts] or [directions]
    kept = len({one.name for one in every if not one.in_blocks})
    bases = bases_size(context.plan, [name for name, axis in settings.layout.axes.items() if axis == SINGULAR])
    if bases:
        notes = (*notes, f"singular directions take {gib(bases)} on disk while learning")
    if (kept or bases) and is_main_process() and not context.run.coefficients.exists():
        check_free_disk(context.run.directions, kept * kept_output(context.plan).size + bases)

    def learn() -> dict[str, Any]:
        coefficients = kept_or_made(context, train)
        if is_main_process():
            shutil.rmtree(context.run.directions, ignore_errors=True)  # merging makes a tensor's directions itself
        chosen = {one.name: one for one in every}[coefficients.directions["name"]]
        return {"coefficients": coefficients, "directions": chosen.prepare()}

    layers = settings.objective.layers
    initial = ", ".join(f"{value:g}" for value in dict.fromkeys(settings.layout.initial))
    decisive = {**settings.asked.inputs, "layers": ",".join(map(str, layers)), "initial": initial}
    precision = "float32" if settings.asked.precision == "no" else settings.asked.precision
    multiplied = f"coefficients start at {initial} and multiply {_describe_directions(settings)}"
    if settings.starts:
        names = ", ".join(dict.fromkeys(one.name for one in every))
        multiplied = f"the start is chosen of {len(settings.starts)}, by divergence from the experts: {names}"
    aligned = f"hidden states aligned: {_places(layers)}; precision: {precision}"
    asked = settings.asked
    together = asked.tokens_together(options.gradient_accumulation_steps)
    demand = Demand(context.plan, asked.precision, together, asked.longest, options, directions)
    memory = describe(demand, this_machine(context.device))
    notes = (*notes, multiplied, aligned, *memory)
    unit = coarsest([*(one.unit for one in every), "matrix" if bases else "entries"])
    return Preparation(learn, {**decisive, **(inputs or {})}, notes, unit=unit)


def _places(layers: Sequence[int]) -> str:
    """Where hidden states are aligned, in words."""
    return f"after layer{'' if len(layers) == 1 else 's'} {', '.join(map(str, layers))}" if layers else "none"


def _describe_directions(settings: Settings) -> str:
    """What coefficients multiply, in words."""
    directions = settings.directions
    if directions.bounded:
        return directions.name.replace("_", " ") + (" task vectors" if directions.options else "")
    if directions.is_whole:
        return "each expert's weights, whose sum takes the place of the base's"
    options = ", ".join(f"{name} {value}" for name, value in directions.options.items())
    return f"each expert's part of {directions.name} ({options})"
