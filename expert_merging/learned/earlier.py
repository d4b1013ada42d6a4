"""Coefficients of an earlier run, for the experts, parameters and weights of this one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from expert_merging.checkpoints.adapter import Adapter
from expert_merging.context import Context
from expert_merging.errors import InputError, Problems, near_name
from expert_merging.learned.axes import SINGULAR
from expert_merging.learned.coefficients import Coefficients, load_coefficients
from expert_merging.learned.directions import TASK_VECTORS, find_directions
from expert_merging.learned.edits import Edit, edited, read_edits
from expert_merging.learned.published import load_published
from expert_merging.method import Preparation, coarsest
from expert_merging.plan import Plan
from expert_merging.run import Run


def applied(
    context: Context, place: Path, factors: Mapping[str, float], edit: str | None, *, force: bool
) -> Preparation:
    """What merges with the coefficients of an earlier run.

    Args:
        context: the run.
        place: that run's folder, or a file of coefficients.
        factors: factor on an expert's task vectors, or the coefficient of an expert that was not learned, by name.
        edit: edits of the coefficients, as `expert_merging.learned.edits` reads them.
        force: the weights may be others than those that the coefficients were learned with.

    Raises:
        InputError: there are none, or they belong to other experts, parameters, weights or directions; or edits cannot
            be done.
    """
    problems, edits = Problems(), tuple[Edit, ...]()
    with problems.collecting():
        edits = () if edit is None else read_edits(edit, tuple(context.plan.experts), context.plan.merged)
    with problems.collecting():
        chosen, notes = earlier_coefficients(context, place, factors, force=force)
    problems.check()
    chosen, notes = edited(chosen, edits), (*notes, *map(_about, edits))
    directions = find_directions(context, **chosen.directions)

    def prepare() -> dict[str, Any]:
        return {"coefficients": chosen, "directions": directions.prepare()}

    unit = coarsest([directions.unit, chosen.unit])
    return Preparation(prepare, {"coefficients": chosen.fingerprint()}, notes, unit)


def _about(edit: Edit) -> str:
    """What the plan tells of an edit."""
    return f"edit {edit.text}: coefficients of {', '.join(edit.experts)} in {len(edit.names)} parameters"


def earlier_coefficients(
    context: Context, place: Path, factors: Mapping[str, float] | None = None, *, force: bool
) -> tuple[Coefficients, tuple[str, ...]]:
    """Coefficients of an earlier run for what this one merges, and what the plan tells of them.

    Args:
        context: the run.
        place: the earlier run's folder, or a file of coefficients.
        factors: as for `applied`; without them, the experts have to be the same.
        force: as for `applied`.

    Raises:
        InputError: there are none, or they belong to other experts, parameters or weights.
    """
    plan, problems = context.plan, Problems()
    loaded = _by_own_names(_load(context, place), plan)
    chosen = loaded
    with problems.collecting():
        chosen = _for_experts(loaded, place, tuple(plan.experts), factors)
    with problems.collecting():
        _check_parameters(loaded, place, plan)
    others = _other_weights(loaded, plan)
    for name in [] if force else others:
        folder = (plan.base if name == "base" else plan.experts[name]).folder
        problems.add(
            f"--coefficients {place} were learned with other weights of {name} than those in {folder}; give the "
            "checkpoint that they were learned with, or --force to use them with this one"
        )
    problems.check()
    return chosen, tuple(_notes(loaded, chosen, others))


def _load(context: Context, place: Path) -> Coefficients:
    """Coefficients in either format."""
    run = Run(place)
    if place.is_dir() and not run.coefficients.exists() and run.weight_coeffs.exists():
        place = run.weight_coeffs
    if place.suffix == ".json" and place.is_file():
        values = place.with_suffix(run.coefficients.suffix)  # which the file may describe
        if not values.exists():
            return load_published(place, context.plan, context.backbone.file_name)
        place = values
    return load_coefficients(place)


def _by_own_names(loaded: Coefficients, plan: Plan) -> Coefficients:
    """Coefficients by the names that the base's files have, whatever names of the published they were given by."""
    fixed = tuple(plan.by_own_names(dict.fromkeys(loaded.fixed)))
    axes = plan.by_own_names(loaded.axes)
    return replace(loaded, values=plan.by_own_names(loaded.values), fixed=fixed, axes=axes)


def _other_weights(loaded: Coefficients, plan: Plan) -> list[str]:
    """Checkpoints whose weights are not those that coefficients were learned with, as far as that is recorded."""
    others = [name for name, content in plan.contents.items() if loaded.checkpoints.get(name, content) != content]
    if "base" in others:  # with which an adapter's weights are others too
        return [name for name in others if not isinstance(plan.checkpoints[name], Adapter)]
    return others


def _for_experts(
    loaded: Coefficients, place: Path, experts: tuple[str, ...], factors: Mapping[str, float] | None
) -> Coefficients:
    """Coefficients of some of the experts, of others, or in another order."""
    problems = Problems()
    new = [name for name in experts if name not in loaded.experts]
    belong = f"--coefficients {place} belong to the experts {', '.join(loaded.experts)}"
    if factors is None and set(experts) != set(loaded.experts):
        problems.add(f"{belong}, given are {', '.join(experts)}")
    elif loaded.directions["name"] != TASK_VECTORS and experts != loaded.experts:
        problems.add(
            f"{belong} and multiply what was made of all of these together ({loaded.directions['name']}); give the "
            f"same in the same order, not {', '.join(experts)}, and leave one out with --task_vector_coeffs_dict "
            f"'{{\"{loaded.experts[-1]}\": 0}}'"
        )
    elif missing := [name for name in new if name not in (factors or {})]:
        problems.add(
            f"{belong} and have none for {', '.join(missing)}; leave such an expert out, or give it a coefficient: "
            f"--task_vector_coeffs_dict '{{\"{missing[0]}\": 0.3}}'"
        )
    for name in factors or {}:
        if name not in experts:
            problems.add(f"--task_vector_coeffs_dict: there is no expert {name!r}. {near_name(name, experts)}")
    problems.check()
    scales = dict(zip(loaded.experts, loaded.task_vector_scale, strict=True))
    return replace(
        loaded,
        experts=experts,
        values={name: _rows(value, loaded.experts, experts) for name, value in loaded.values.items()},
        task_vector_scale=tuple(scales.get(name, 1.0) * (factors or {}).get(name, 1.0) for name in experts),
    )


def _rows(values: Tensor, learned: tuple[str, ...], experts: tuple[str, ...]) -> Tensor:
    """Coefficients ``(experts, chunks)``, 1 for experts without any."""
    ones = torch.ones_like(values[0])
    return torch.stack([values[learned.index(name)] if name in learned else ones for name in experts])


def _check_parameters(loaded: Coefficients, place: Path, plan: Plan) -> None:
    merged = set(plan.merged)
    without = [name for name in plan.merged if name not in loaded.values]
    unknown = [name for name in loaded.values if name not in merged]
    problems = []
    if without:
        problems.append(
            f"--coefficients {place} has none for {without[0]} ({len(without)} in all); use the same --exclude_params"
        )
    if unknown:
        problems.append(f"--coefficients {place} has {unknown[0]}, which is not merged ({len(unknown)} in all)")
    for name in merged.intersection(loaded.axes):
        part, count, axis = plan.part(name), loaded.values[name].shape[1], loaded.axes[name]
        if len(part.shape) != 2 or count != (min(part.shape) if axis == SINGULAR else part.columns):
            what = "singular directions" if axis == SINGULAR else axis
            problems.append(f"--coefficients {place} has {count} {what} for {name}, which is {list(part.shape)}")
    if problems:
        raise InputError(*problems)


def _notes(loaded: Coefficients, chosen: Coefficients, others: list[str]) -> Iterator[str]:
    """What the plan tells of the coefficients."""
    scales = dict(zip(chosen.experts, chosen.task_vector_scale, strict=True))
    if left_out := [name for name in loaded.experts if name not in chosen.experts]:
        yield f"coefficients of experts that are not merged here are left out: {', '.join(left_out)}"
    if set(scales.values()) != {1.0}:
        yield f"factors on task vectors: {', '.join(f'{name} {scale:g}' for name, scale in scales.items())}"
    if others:
        yield f"by --force, coefficients are used with other weights of {', '.join(others)}"
    if not loaded.checkpoints:
        yield "which weights the coefficients were learned with is not recorded, so they are not compared"
