"""What may not be as the user thinks, but is no mistake for certain."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from expert_merging import machine
from expert_merging.backbone import Backbone, Evaluation
from expert_merging.configurations import differing_settings
from expert_merging.options import Resolved
from expert_merging.plan import Plan

# Nobody scales task vectors by more.
_LARGE_FACTOR = 10


def warnings_before(
    resolved: Resolved, backbone: Backbone, plan: Plan, *, models: Sequence[Path], memory: int, device: str
) -> list[str]:
    """One line for everything in a run that may not be as the user thinks.

    Args:
        resolved: the options.
        backbone: the model family.
        plan: what is merged.
        models: where the results will be.
        memory: bytes that merging needs.
        device: where it is done.
    """
    return [
        *ignored_flags(resolved),
        *_large_factors(resolved),
        *_short_memory(memory, device),
        *_foreign_base(plan, backbone),
        *_idle_patterns(plan, backbone, resolved.general["exclude_params"]),
        *differing_settings(plan.base.config, {name: expert.config for name, expert in plan.experts.items()}),
        *_misleading_path(models, backbone.evaluation_of(plan.base.model_type), plan.base.model_type),
    ]


def ignored_flags(resolved: Resolved) -> list[str]:
    """A line for flags that the method does not have, if there are any."""
    flags = ", ".join(f"--{name}" for name in resolved.ignored)
    return [f"ignored, since {resolved.method.name} has no such option: {flags}"] if flags else []


def _large_factors(resolved: Resolved) -> list[str]:
    """A factor that has been meant as a percentage, perhaps; methods that learn refuse it."""
    given = resolved.options.get("scaling_coefficient") or 0
    factors = given if isinstance(given, list) else [given]
    return [
        f"--scaling_coefficient {factor:g} is a factor on task vectors, which are hardly ever scaled by more than 2; "
        f"for {factor:g} % write {factor / 100:g}"
        for factor in factors
        if abs(factor) > _LARGE_FACTOR
    ][:1]


def _short_memory(needed: int, device: str) -> list[str]:
    free = machine.free_memory(device)
    if needed <= free:
        return []
    return [
        f"merging needs about {machine.gib(needed)} of memory, and {machine.gib(free)} are free on {device}; leave out "
        "the largest tensors (--exclude_params) or take a machine with more"
    ]


def _foreign_base(plan: Plan, backbone: Backbone) -> list[str]:
    """A base of a kind that the family is not made for, where it is not made for all."""
    kinds = backbone.evaluation
    if plan.base.model_type in kinds or "" in kinds:
        return []
    return [
        f"the base has the model_type {plan.base.model_type!r}, and the {backbone.name} command is made for "
        f"{' and '.join(kinds)}: its patterns may leave out other parameters than they should (a vision tower may "
        "be merged); look at the names and give --exclude_params, or use the command of the base's own family"
    ]


def _idle_patterns(plan: Plan, backbone: Backbone, patterns: Sequence[str]) -> list[str]:
    """Patterns of the user's own that exclude nothing; the family's may be for tensors that not all bases have."""
    names = {published for name in plan.base.entries for published in (name, backbone.file_name(name))}
    return [
        f"--exclude_params {pattern!r} matches no parameter, from the start of its name (such as {min(names)})"
        for pattern in patterns
        if pattern not in backbone.exclude_params and not any(re.match(pattern, name) for name in names)
    ]


def _misleading_path(models: Sequence[Path], evaluation: Evaluation, model_type: str) -> list[str]:
    """The place of a result that VLMEvalKit would take for another kind of model."""
    wanted = evaluation.vlmeval_path
    paths = [str(folder.resolve()) for folder in models]
    wrong = [path for path in paths if not re.match(wanted, path, re.IGNORECASE)]
    return [
        f"VLMEvalKit goes by the path and will not take {path} for {model_type}, for which it has to match "
        f"{wanted!r}; choose another --run_name or --output_path before you evaluate it there"
        for path in wrong[:1]
    ]
