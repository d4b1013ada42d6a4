"""What may not be as the user thinks, but is no mistake for certain."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from expert_merging import machine
from expert_merging.backbone import Backbone, Evaluation
from expert_merging.checkpoints.adapter import Adapter
from expert_merging.checkpoints.configurations import differing_settings
from expert_merging.checkpoints.folders import origin
from expert_merging.idle import idle_flags
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
        *idle_flags(resolved),
        *_large_factors(resolved),
        *_short_memory(memory, device),
        *_foreign_base(plan, backbone),
        *_adapters_of_others(plan),
        *_lost_tower(plan, backbone),
        *_idle_patterns(plan, backbone, resolved.general["exclude_params"]),
        *_heads(plan),
        *differing_settings(plan.base.config, {name: expert.config for name, expert in plan.experts.items()}),
        *_misleading_path(models, backbone.evaluation_of(plan.base.model_type), plan.base.model_type),
    ]


def rewritten_weights(plan: Plan, record: Mapping[str, Any]) -> list[str]:
    """Checkpoints whose weight files were written since the run began, where samples of them show no change.

    Args:
        plan: what is merged.
        record: the run's ``config.json``. A checkpoint that has moved since has times of its own.
    """
    options, written = record["options"], record.get("written", {})
    places = {"base": options.get("base_model_path"), **(options.get("expert") or {})}
    return [
        f"the weights of {name} ({checkpoint.folder}) were written again since this run began; samples of them are as "
        "they were, so it goes on. If you have changed weights, move the run's folder away"
        for name, checkpoint in plan.checkpoints.items()
        if places.get(name) == str(checkpoint.folder.resolve())
        if written.get(name, checkpoint.opened) != checkpoint.opened
    ]


def _large_factors(resolved: Resolved) -> list[str]:
    """A factor that has been meant as a percentage, perhaps; methods that learn refuse it."""
    given = resolved.options.get("scaling_coefficient") or 0
    factors = [one for one in (given if isinstance(given, list) else [given]) if isinstance(one, int | float)]
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


def _adapters_of_others(plan: Plan) -> list[str]:
    """Adapters that say that they were trained on another model than the base."""
    adapters = {name: expert for name, expert in plan.experts.items() if isinstance(expert, Adapter)}
    said = {name: other_base(expert.settings.base, plan.base.folder) for name, expert in adapters.items()}
    foreign = [f"{name} ({model})" for name, model in said.items() if model]
    if not foreign:
        return []
    return [
        f"adapters say that they were trained on another model than the base {plan.base.folder.name}: "
        f"{', '.join(foreign)}; an adapter makes sense on its own base alone"
    ]


def other_base(said: str, folder: Path) -> str | None:
    """The name of the model that an adapter says it was trained on, where this folder holds another one.

    Paths and names differ from machine to machine, so only two names that both say a model's size are compared.
    """
    place = folder.resolve()
    repository = origin(place)
    names = Path(said).name, Path(repository[0] if repository else place).name
    sized = all(re.search(r"\d[bm]\b", name.lower()) for name in names)
    # What is at the end of these names says how a model was packed.
    usual = {re.sub(r"(-unsloth)?(-bnb-\dbit)?$", "", name.lower()) for name in names}
    return names[0] if sized and len(usual) == 2 else None


def _idle_patterns(plan: Plan, backbone: Backbone, patterns: Sequence[str]) -> list[str]:
    """Patterns of the user's own that exclude nothing; the family's may be for tensors that not all bases have."""
    names = _names(plan)
    return [
        f"--exclude_params {pattern!r} matches no parameter, from the start of its name (such as {min(names)})"
        for pattern in patterns
        if pattern not in backbone.exclude_params and not any(re.match(pattern, name) for name in names)
    ]


def _names(plan: Plan) -> set[str]:
    """Names of the base's tensors, as in its files and as published."""
    return {*plan.base.entries, *plan.published.values()}


def _lost_tower(plan: Plan, backbone: Backbone) -> list[str]:
    """A vision tower that goes by a name which the family's pattern does not match."""
    if plan.base.model_type not in backbone.evaluation or not backbone.vision_tower:
        return []
    if any(re.match(backbone.vision_tower, name) for name in _names(plan)):
        return []
    return [
        f"the base has no tensor that {backbone.vision_tower!r} matches, the pattern of the vision tower: if it has "
        f"one under another name (names are such as {min(plan.base.entries)}), that is merged; give --exclude_params"
    ]


def _heads(plan: Plan) -> list[str]:
    """Output heads that the merged model will not have, or not everywhere."""
    base, heads = plan.base.folder, plan.heads
    lost = [
        f"expert {name} has an output head apart from its embedding, and in the base the two are one: the merged model "
        "gets the base's"
        for name in heads.own
    ]
    if heads.contradicts:
        lost.append(
            f"{base / 'config.json'} says tie_word_embeddings, and head and embedding differ: recent versions of "
            "transformers load both, older ones and other programs may take the embedding for both"
        )
    return lost


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
