"""Whether a run's coefficients are what was learned, and its weights what they make of base and experts."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from expert_merging.backbone import Backbone
from expert_merging.checkpoints.checkpoint import Checkpoint
from expert_merging.errors import InputError, Problems, first_of
from expert_merging.learned.coefficients import Coefficients, load_coefficients
from expert_merging.learned.directions import TASK_VECTORS
from expert_merging.merged_tokenizer import is_wanted
from expert_merging.parts import Part
from expert_merging.plan import Plan, make_plan
from expert_merging.roles import ROW_PER_WORD
from expert_merging.run import Run

# Entries of each tensor that are merged once more.
_SAMPLE = 4096
# Units of the last place by which another device's sums may differ, before they are rounded.
_UNITS = 8
# Names that a message shows.
_SHOWN = 3


def check_learned(run: Run, record: Mapping[str, Any], backbone: Backbone, *, merges_again: bool) -> None:
    """Check what a finished run has learned.

    Args:
        run: the run.
        record: its ``config.json``.
        backbone: its family.
        merges_again: look at the weights too, where the checkpoints are still there.

    Raises:
        InputError: it is not what was learned, in one of the formats, or not what the weights were merged with.
    """
    files = (run.coefficients, run.coefficients.with_suffix(".json"))
    differing = [file.name for file in files if not run.kept.has(file)]
    if differing:
        raise InputError(f"{' and '.join(differing)} is not what was learned")
    coefficients, problems = load_coefficients(run.folder), Problems()
    if coefficients.experts != tuple(record["options"]["expert"]):
        problems.add(f"{run.coefficients.name} is of the experts {', '.join(coefficients.experts)}")
    published = run.weight_coeffs.read_bytes() if run.weight_coeffs.is_file() else None
    if published != coefficients.published():
        problems.add(f"{run.weight_coeffs.name} has other values than {run.coefficients.name}")
    problems.check()
    if merges_again and not any(record["options"].get(name) for name in ("post", "align_experts")):
        _check_weights(run, record["options"], backbone, coefficients)


def _check_weights(run: Run, options: Mapping[str, Any], backbone: Backbone, coefficients: Coefficients) -> None:
    """Check that the first entries of each tensor are what coefficients make of base and experts.

    Raises:
        InputError: some are not.
    """
    base, experts = Path(options["base_model_path"]), {name: Path(path) for name, path in options["expert"].items()}
    if not all(place.is_dir() for place in (base, *experts.values())):
        return
    by_token = is_wanted({name: options.get(name) for name in ("tokenizer", "embeddings")})
    excluded = [*options["exclude_params"], *([ROW_PER_WORD] if by_token else [])]
    plan = make_plan(base, experts, excluded, backbone.file_name, backbone.landmark)
    if differing := misfits_of(coefficients, plan, Checkpoint(run.model)):
        raise InputError(f"{first_of(differing, _SHOWN)} is not what {run.coefficients.name} makes of the experts")


def misfits_of(coefficients: Coefficients, plan: Plan, model: Checkpoint) -> list[str]:
    """Names of merged tensors whose first entries are others, or that have no coefficients.

    Args:
        coefficients: of task vectors; what is made of others, or of whole matrices, is not looked at.
        plan: the checkpoints.
        model: the merged model.
    """
    if coefficients.directions["name"] != TASK_VECTORS or coefficients.unit != "entries":
        return []
    return [
        name
        for name in plan.merged
        if name not in coefficients.values or not _fits(coefficients, plan, model, _first_entries(plan, name))
    ]


def _first_entries(plan: Plan, name: str) -> Part:
    part = plan.part(name)
    return part.between(0, min(_SAMPLE, part.elements))


def _fits(coefficients: Coefficients, plan: Plan, model: Checkpoint, part: Part) -> bool:
    base, *experts = (checkpoint.read(part.name, part.start, part.stop) for checkpoint in plan.checkpoints.values())
    base, found = base.float(), model.read(part.name, part.start, part.stop)
    expected = base + coefficients.merge(torch.stack([expert.float() - base for expert in experts]), part)
    unit = torch.finfo(found.dtype).eps / 2 + _UNITS * torch.finfo(torch.float32).eps
    largest = torch.maximum(base.abs(), expected.abs())
    return bool(((found.double() - expected.double()).abs() <= unit * largest.double() + 1e-7).all())
