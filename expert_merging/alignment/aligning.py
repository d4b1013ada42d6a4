"""The step before merging: each expert's units are put in the base's order.

All experts go to the base, whatever the method: embeddings, norms and all else that is not merged are the base's, so
the merged model has its units; and experts that are aligned to one model are aligned to one another. What is found is
an order for reading. No aligned copy is written, and every method, also one that runs the experts, sees them aligned.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from safetensors.torch import load_file
from torch import Tensor

from expert_merging.alignment.units import (
    BlockOrder,
    Layout,
    check_expert,
    find_layout,
    tensor_orders,
)
from expert_merging.checkpoints.adapter import Adapter
from expert_merging.checkpoints.checkpoint import Checkpoint
from expert_merging.checkpoints.fingerprints import of_text
from expert_merging.context import Context
from expert_merging.documents import read_object
from expert_merging.errors import InputError, Problems
from expert_merging.machine import gib
from expert_merging.method import Preparation, accepted
from expert_merging.plan import Plan
from expert_merging.processes import while_others_wait
from expert_merging.progress import Advance
from expert_merging.provenance import library_versions
from expert_merging.run import Run
from expert_merging.running.options import SampleOptions
from expert_merging.running.tensor_files import write_tensors
from expert_merging.writing import write_atomically

if TYPE_CHECKING:
    from expert_merging.alignment.weights import Pair
    from expert_merging.running.kept_targets import KeptTargets
    from expert_merging.running.samples import Samples

logger = logging.getLogger(__name__)

ACTIVATIONS = "activation_matching"
# ``(expert's name, base and expert, progress) -> order of each block's units, and of the stream``.
_Match: TypeAlias = "Callable[[str, Pair, Advance], tuple[list[BlockOrder], Tensor | None]]"

RECORD = "alignment.json"
# Name of the order of an expert's units among what is kept for other runs.
_ORDERS = of_text("orders")
# An expert stays as it is where alignment adds less to the cosine of its weights with the base's.
_LEAST_GAIN = 1e-3
_KINDS = {"heads": "query heads", "values": "value units", "feed": "feed-forward units", "stream": "residual stream"}


def check_alignment(context: Context, how: str, options: Mapping[str, Any]) -> Preparation:
    """Check that the experts' units can be put in the base's order, which is the work.

    Args:
        context: the run.
        how: value of ``--align_experts``.
        options: all options, of which those of samples count where units are matched by what they say.

    Raises:
        InputError: every problem found.
    """
    problems, plan = Problems(), context.plan
    if find_spec("scipy") is None:
        problems.add("--align_experts needs scipy, which matches units; pip install scipy")
    layout, samples = _layout(context), None
    for name, expert in _own_models(plan).items():
        try:
            check_expert(layout, plan.base, expert, same_words=how == ACTIVATIONS)
        except InputError as error:
            problems.found += [f"expert {name} cannot be aligned ({expert.folder}): {text}" for text in error.problems]
    if how == ACTIVATIONS:
        from expert_merging.running.samples import check_samples

        with problems.collecting():
            samples = check_samples(context, SampleOptions(**accepted(SampleOptions, options)), compares_logits=False)
    problems.check()
    inputs = samples.inputs if samples else {}
    return Preparation(lambda: _align(context, how, layout, samples), inputs, tuple(_notes(layout, plan, how)))


def _layout(context: Context) -> Layout:
    plan, file_name = context.plan, context.backbone.file_name
    return find_layout(plan.base, lambda name: plan.published.get(name) or file_name(name))


def _own_models(plan: Plan) -> dict[str, Checkpoint]:
    """The experts that are no adapters: those have the base's units."""
    return {name: expert for name, expert in plan.experts.items() if not isinstance(expert, Adapter)}


def _notes(layout: Layout, plan: Plan, how: str) -> Iterator[str]:
    from expert_merging.alignment.activations import TOKENS

    widest = max(*layout.feed, layout.heads * layout.width, layout.hidden)
    need = 4 * 2 * widest * layout.hidden + 24 * widest**2
    if how == ACTIVATIONS:  # of two models
        need += 8 * TOKENS * (sum(layout.feed) + len(layout.blocks) * (layout.heads * layout.width + layout.hidden))
    names = ", ".join(_own_models(plan)) or "no expert (adapters have the base's)"
    yield (
        f"units in the base's order by {how}: {names}; {len(layout.blocks)} blocks of {max(layout.feed)} feed-forward "
        f"units and {layout.groups} groups of {layout.heads // layout.groups} heads; needs about {gib(need)} of memory"
    )
    if not layout.moves_stream:
        yield f"the residual stream keeps its order: it is not known how it goes through {layout.unknown[0]}"


def _align(context: Context, how: str, layout: Layout, samples: Samples | None) -> dict[str, Any]:
    """Let all experts be read in the base's order; what an earlier part of the run has found is taken.

    Raises:
        InputError: NaN or infinite weights or activations.
    """
    experts = _own_models(context.plan)
    while_others_wait(lambda: _find_all(context, how, layout, experts, samples))
    found = {}
    for name, expert in experts.items():
        tensors = load_file(_file(context.run, name))
        blocks = [
            BlockOrder(*(tensors[f"{number}.{kind}"] for kind in ("heads", "values", "feed")))
            for number in range(len(layout.blocks))
        ]
        before, best = tensors["cosine"].tolist()
        moved = _moved(tensors)
        expert.orders = tensor_orders(layout, blocks, tensors.get("stream"), expert)
        found[name] = {"cosine_before": before, "cosine_after": best if any(moved.values()) else before, "moved": moved}
        _tell(name, found[name], best)
    others = [name for name in context.plan.experts if name not in experts]
    if others:
        logger.warning(
            "adapters have the base's units, and --align_experts changes nothing of them: %s", ", ".join(others)
        )
    record = {"method": how, "to": "base", "experts": found}
    while_others_wait(
        lambda: write_atomically(context.run.alignment / RECORD, (json.dumps(record, indent=2) + "\n").encode())
    )
    return {}


def _file(run: Run, expert: str) -> Path:
    return run.alignment / f"{expert}.safetensors"


def _find_all(
    context: Context, how: str, layout: Layout, experts: Mapping[str, Checkpoint], samples: Samples | None
) -> None:
    """Find and keep the order of each expert's units."""
    folder = context.run.alignment
    folder.mkdir(parents=True, exist_ok=True)
    kept = context.run.kept.within(folder.name, context.plan.opened)
    missing = {name: expert for name, expert in experts.items() if not kept.has(_file(context.run, name))}
    common = {name: _common(context, how, name) for name in missing}
    for name, other in common.items():
        states = other.states(_ORDERS) if other else None
        if states is not None:
            logger.info("expert %s is not matched: the order of its units is known from another run", name)
            write_tensors(_file(context.run, name), dict(zip(_names(layout), states, strict=False)), kept)
            del missing[name]
    if not missing:
        return
    match = _matching(context, layout, samples)
    with context.progress("aligning experts", len(missing) * len(layout.blocks), "block") as advance:
        for name in missing:
            advance(0, name)
            found = _find(context, layout, name, match, advance)
            write_tensors(_file(context.run, name), found, kept)
            if other := common[name]:
                other.add_states(_ORDERS, [*found.values()])


def _find(context: Context, layout: Layout, name: str, match: _Match, advance: Advance) -> dict[str, Tensor]:
    """The order of an expert's units, with the cosines of its weights before and in the order that was found."""
    from expert_merging.alignment.weights import Pair, cosine

    expert = context.plan.experts[name]
    pair = Pair(context.plan.base, expert, torch.device(context.device))
    expert.orders = {}
    before = cosine(pair, layout)
    blocks, stream = match(name, pair, advance)
    expert.orders = tensor_orders(layout, blocks, stream, expert)
    after = cosine(pair, layout)
    if after < before + _LEAST_GAIN:
        blocks, stream = [BlockOrder.as_stored(layout, number) for number in range(len(blocks))], None
    orders = [order for block in blocks for order in (block.heads, block.values, block.feed)]
    cosines = torch.tensor([before, after], dtype=torch.float64)
    return dict(zip(_names(layout), [cosines, *orders, *([] if stream is None else [stream])], strict=False))


def _names(layout: Layout) -> list[str]:
    """What the tensors of an expert's file are called; the last one is not there where the stream keeps its order."""
    orders = [f"{number}.{kind}" for number in range(len(layout.blocks)) for kind in ("heads", "values", "feed")]
    return ["cosine", *orders, "stream"]


def _common(context: Context, how: str, expert: str) -> KeptTargets | None:
    """Where the order of an expert's units is kept for other runs; None where it is found out from samples.

    Those may be answered by other experts, and what they say may depend on all that these are asked.
    """
    from expert_merging.running.kept_targets import KeptTargets

    if context.run.targets is None or how == ACTIVATIONS:
        return None
    way = {
        "units": how,
        "family": context.backbone.name,
        "base": context.plan.base.fingerprint(whole=False),
        "expert": context.plan.experts[expert].fingerprint(whole=False),
        "device": torch.device(context.device).type,
        "versions": library_versions(),
    }
    return KeptTargets(context.run.targets, f"{expert}-units", way)


def _matching(context: Context, layout: Layout, samples: Samples | None) -> _Match:
    """What finds the order of an expert's units: by weights, or by what they say about samples."""
    from expert_merging.alignment.activations import activations_of, asked_samples, match_by_activations
    from expert_merging.alignment.weights import match_by_weights

    if samples is None:
        return lambda _, pair, advance: match_by_weights(pair, layout, advance)
    asked = asked_samples(context, samples)
    base = activations_of(context, layout, "base", samples, asked)
    return lambda name, _, advance: match_by_activations(
        layout, base, activations_of(context, layout, name, samples, asked), advance
    )


def _moved(tensors: Mapping[str, Tensor]) -> dict[str, float]:
    """Share of units of each kind that are not in their places, of all blocks together."""
    found = {}
    for kind, title in _KINDS.items():
        orders = [order for name, order in tensors.items() if name.rpartition(".")[2] == kind]
        moved = sum(int((order != torch.arange(len(order))).sum()) for order in orders)
        if orders:
            found[title] = moved / sum(map(len, orders))
    return found


def _tell(expert: str, found: Mapping[str, Any], best: float) -> None:
    """Say what share of an expert's units has moved; ``best`` is the cosine of weights in the order that was found."""
    if not any(found["moved"].values()):
        logger.warning(
            "expert %s has the base's order of units, as a fine-tune of this base has (cosine of weights %.3f, and "
            "%.3f in the order that was found): --align_experts changes nothing of it",
            *(expert, found["cosine_before"], best),
        )
        return
    shares = ", ".join(f"{100 * share:.0f} % of {kind}" for kind, share in found["moved"].items())
    logger.info(
        "expert %s: %s moved; cosine of weights with the base %.3f, before %.3f",
        *(expert, shares, found["cosine_after"], found["cosine_before"]),
    )


def for_card(run: Run) -> str:
    """What the card of a run's model says of the experts' units; empty where they were not aligned."""
    try:
        record = read_object(run.alignment / RECORD)
        shares = {name: max(found["moved"].values()) for name, found in record["experts"].items()}
    except (InputError, KeyError, TypeError, ValueError, AttributeError):
        return ""
    moved = ", ".join(f"{name} {100 * share:.0f} %" for name, share in shares.items())
    return (
        f"Before merging, experts' units were put in the base's order (`{record['method']}`). Of the kind of units "
        f"that moved most, this share did: {moved}."
    )
