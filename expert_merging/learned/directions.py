"""Directions: what coefficients multiply.

By default they are the experts' task vectors. They may also be what each expert adds to the result of a closed form, so
that learning begins with that form's merge and finds how much of each expert's part to take; or task vectors that TIES
has trimmed (AdaMerging++). What is known of them before training is recorded beside the coefficients.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from expert_merging.checkpoints.checkpoint import WIDTHS, Checkpoint
from expert_merging.checkpoints.folders import INDEX
from expert_merging.context import Context
from expert_merging.errors import InputError, Problems, near_name
from expert_merging.flags import Fraction, NotNegative, Option
from expert_merging.kept import Kept
from expert_merging.learned.options import TrimmingOptions
from expert_merging.merge import write_output
from expert_merging.method import TABLE, Method, Unit
from expert_merging.methods.sparse import first_pass, unchanged
from expert_merging.methods.thresholds import elected_signs, trim
from expert_merging.outputs import Merged, Output, Slot
from expert_merging.parts import Part
from expert_merging.plan import Plan, Rule
from expert_merging.processes import is_main_process
from expert_merging.writing import write_atomically

TASK_VECTORS, TRIMMED, WEIGHTS = "task_vectors", "trimmed", "weights"
# Type of directions that are kept in files.
_KEPT = "F32"
# What may be recorded of directions beside a method's own options.
_OF_SEEDED = {"seed": Option("seed", int, 0, "")}
_OF_TRIMMED = {
    "density": Option("density", Fraction, None, ""),
    "thresholds": Option("thresholds", list[NotNegative], None, ""),
    "majority": Option("majority", float, None, ""),
}


def as_they_are(task_vectors: Tensor, _part: Part, _base: Tensor | None) -> Tensor:
    """The rule of task vectors."""
    return task_vectors


def whole_weights(task_vectors: Tensor, _part: Part, base: Tensor) -> Tensor:
    """The rule of experts' weights."""
    return task_vectors.add_(base)


@dataclass(frozen=True)
class Directions:
    """What coefficients multiply.

    Args:
        name: ``task_vectors``, ``trimmed``, ``weights``, or the method whose parts they are.
        options: what decides them beside base and experts, for the record.
        prepare: does what the rule needs done first and returns it: ``(task_vectors, part, base) -> directions``, from
            ``(experts, *shape)`` to the same.
        unit: what the rule is fed.
        in_blocks: the rule makes them from a block of task vectors alone, whenever they are used; others are made once
            and kept.
        bounded: coefficients stay between 0 and 1.
        initial: initial value of the coefficients where the user gives none; None for the method's.
        is_whole: their sum takes the place of the base's weights, and is not added to them.
    """

    name: str = TASK_VECTORS
    options: Mapping[str, Any] = field(default_factory=dict)
    prepare: Callable[[], Rule] = lambda: as_they_are
    unit: Unit = "entries"
    in_blocks: bool = True
    bounded: bool = True
    initial: float | None = None
    is_whole: bool = False

    @property
    def record(self) -> dict[str, Any]:
        """Name and options, by which `find_directions` finds them again."""
        return {"name": self.name, "options": dict(self.options)}

    def entry_bytes(self, plan: Plan, name: str) -> int:
        """Bytes that an entry of a tensor takes where base and directions are kept."""
        base = WIDTHS[plan.base.entries[name].dtype]
        if not self.in_blocks:
            return base + len(plan.experts) * WIDTHS[_KEPT]
        return base + sum(WIDTHS[expert.entries[name].dtype] for expert in plan.experts.values())


PLAIN = Directions()


def find_directions(context: Context, name: str, options: Mapping[str, Any] | None = None) -> Directions:
    """Directions by name.

    Args:
        context: the run.
        name: ``task_vectors``, ``trimmed``, ``weights``, or a method.
        options: what was recorded; by default the method's defaults for the family, and the coefficient 1.

    Raises:
        InputError: there is no such method, or its result is no sum over experts.
    """
    if name == TASK_VECTORS:
        return PLAIN
    if name == TRIMMED:
        return _trimmed(context, _checked(name, options or {"density": TrimmingOptions().density}, _OF_TRIMMED))
    if name == WEIGHTS:
        share = 1 / len(context.plan.experts)
        return Directions(WEIGHTS, prepare=lambda: whole_weights, bounded=False, initial=share, is_whole=True)
    known = [TASK_VECTORS, TRIMMED, WEIGHTS, *(other.name for other in TABLE.values() if other.parts is not None)]
    try:
        method: Method = context.find_method(name)
    except InputError:
        raise InputError(f"--directions {name}: there are no such. {near_name(name, known)}") from None
    if method.parts is None:
        raise InputError(
            f"--directions {name}: the result of {method.name} is no sum of a part for each expert; choose one of "
            + ", ".join(known)
        )
    return _parts_of(context, method, options)


def _checked(name: str, recorded: Mapping[str, Any], known: Mapping[str, Option]) -> dict[str, Any]:
    """Options of directions as they were recorded, in a file that may have been edited.

    Raises:
        InputError: there are no such options, or their values do not fit.
    """
    problems, checked = Problems(), {}
    for option, value in recorded.items():
        if option not in known:
            problems.add(f"no option {option!r}. {near_name(option, [*known])}")
            continue
        with problems.collecting():
            checked[option] = known[option].convert(value)
    if problems.found:
        raise InputError(*(f"directions of {name}: {problem.removeprefix('--')}" for problem in problems.found))
    return checked


def _parts_of(context: Context, method: Method, recorded: Mapping[str, Any] | None) -> Directions:
    """What each expert adds to a method's result."""
    # The published coefficients of some methods are for large models; here the coefficients are what is learned.
    defaults = {**method.defaults(context.backbone.defaults), "scaling_coefficient": 1.0, "seed": context.seed}
    options = {**defaults, **_checked(method.name, recorded or {}, {**method.options, **_OF_SEEDED})}
    own = {name: options[name] for name in method.options}
    preparation = method.prepared(context, own)

    @functools.cache
    def prepare() -> Rule:
        known = {"experts": tuple(context.plan.experts), "seed": options["seed"], **preparation.run()}
        return method.parts_rule(known, own)

    return Directions(
        method.name,
        {**own, **({"seed": options["seed"]} if "seed" in method.needs else {})},
        prepare,
        preparation.unit,
        in_blocks=preparation.unit == "entries" and "base" not in method.needs,
        bounded=False,
        initial=1.0,
    )


def _trimmed(context: Context, options: Mapping[str, Any]) -> Directions:
    """Task vectors as TIES leaves them before it averages.

    Args:
        context: the run.
        options: the ``density``; or what was found for it, ``thresholds`` and ``majority``.

    Raises:
        InputError: there is not one threshold for each expert, or no majority.
    """
    experts = len(context.plan.experts)
    if "density" not in options and (len(options.get("thresholds", ())) != experts or "majority" not in options):
        raise InputError(
            f"directions of {TRIMMED}: what was found before has a threshold for each of {experts} experts and a "
            "majority; give the density instead to find them again"
        )

    @functools.cache
    def prepare() -> Rule:
        if "thresholds" in options:
            return Trimming(tuple(options["thresholds"]), options["majority"])
        found = first_pass(context.passes, unchanged, density=options["density"], ties_scope="global")
        name = context.plan.merged[0]  # the same for all of them
        return Trimming(tuple(found["thresholds"][name].tolist()), found["majorities"][name])

    return Directions(TRIMMED, options, prepare)


@dataclass(frozen=True)
class Trimming:
    """The rule of trimmed task vectors: small entries are 0, and those that disagree with the elected sign.

    Args:
        thresholds: smallest magnitude that is kept, per expert.
        majority: the sign elected where the kept entries sum to 0.
    """

    thresholds: tuple[float, ...]
    majority: float

    def __call__(self, task_vectors: Tensor, _part: Part, _base: Tensor | None = None) -> Tensor:
        """The entries that stay, the others 0."""
        thresholds = torch.tensor(self.thresholds, device=task_vectors.device)
        trimmed = trim(task_vectors.clone(), thresholds)
        signs = elected_signs(trimmed, self.majority)
        return torch.stack([torch.where(row * signs > 0, row, 0.0) for row in trimmed])


def kept_name(expert: str, name: str) -> str:
    """Name of an expert's direction of a tensor in the files that keep it."""
    return f"{expert}/{name}"


def kept_output(plan: Plan) -> Output:
    """The files that keep directions: for each of the base's, one with every expert's direction of its tensors."""
    merged = set(plan.merged)
    files = {
        file.name: tuple(
            Slot.of(kept_name(expert, entry.name), _KEPT, entry.shape, Merged(entry.name, result=str(number)))
            for entry in plan.base.in_file(file)
            if entry.name in merged
            for number, expert in enumerate(plan.experts)
        )
        for file in plan.base.files
    }
    return Output({file: slots for file, slots in files.items() if slots}, is_model=False)


def make_directions(directions: Directions, context: Context, folder: Path) -> Checkpoint:
    """Make directions once and keep them; what an earlier part of the run has made is not made again.

    Args:
        directions: those that are not made in blocks.
        context: the run.
        folder: where they are kept.
    """
    complete = folder / "config.json"  # written last
    output = kept_output(context.plan)
    kept = Kept(folder / "digests.json", made_of=context.plan.opened)
    is_sound = not is_main_process() or all(kept.has(folder / file) for file in output.files)
    if not (complete.exists() and is_sound):
        rule = directions.prepare()

        def by_number(task_vectors: Tensor, part: Part, base: Tensor) -> dict[str, Tensor]:
            return {str(number): own for number, own in enumerate(rule(task_vectors, part, base))}

        write_output(
            output,
            context.plan,
            by_number,
            folder,
            unit=directions.unit,
            device=torch.device(context.device),
            progress=context.progress,
            kept=kept,
            title=f"{directions.name} by expert",
        )
        write_atomically(folder / INDEX, output.index())
        write_atomically(complete, b"{}\n")
    return Checkpoint(folder)
