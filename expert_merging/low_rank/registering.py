"""How a function on factors becomes a method: what is checked, merged and written is the same for all of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeAlias

from expert_merging.arithmetic import scaled_mean
from expert_merging.card import adapter_card
from expert_merging.context import Context
from expert_merging.errors import InputError, Problems
from expert_merging.low_rank.adapter_output import MergedAdapter
from expert_merging.low_rank.changes import Changes
from expert_merging.low_rank.factors import Factors
from expert_merging.machine import gib
from expert_merging.method import Preparation, Prepare, accepted, enter_method
from expert_merging.outputs import Copied, Merged, Output, Slot, mirror_of
from expert_merging.parts import Part

if TYPE_CHECKING:
    from torch import Tensor

# ``(tensor, changes by expert) -> the merged change``; experts that leave the tensor as it is are not among them.
MergeFactors: TypeAlias = Callable[[str, Mapping[str, Factors]], Factors]
# ``(context, changes, **options) -> what gives that``: checks at once, and is called when numbers may be read.
Begin: TypeAlias = Callable[..., Callable[[], MergeFactors]]


def add_merged(
    task_vectors: Tensor, part: Part, low_rank: Mapping[str, Factors], *, scaling_coefficient: float
) -> Tensor:
    """The merged change of a part, or the mean of the task vectors where experts have trained more than factors.

    Args:
        task_vectors: ``(experts, *shape)``, of no experts where the change is known.
        part: where the entries stand.
        low_rank: merged changes by tensor, scaled.
        scaling_coefficient: factor on the mean.
    """
    if part.name not in low_rank:
        return scaled_mean(task_vectors, scaling_coefficient)
    return low_rank[part.name].entries(part.start, part.stop).view(task_vectors.shape[1:])


def register_on_factors(
    *,
    options: Callable[..., Any],
    rank: Callable[..., int] = Changes.largest_rank,
) -> Callable[[Begin], Begin]:
    """Enter a function on factors into the table of methods.

    Args:
        options: its options, `LowRankOptions` among them.
        rank: ``(changes, tensor, **options) -> rank that the merged change of a tensor has at most``.
    """

    def enter(begin: Begin) -> Begin:
        def ranks(changes: Changes, given: Mapping[str, Any]) -> dict[str, int]:
            bounds = {name: rank(changes, name, **given) for name in changes.products}
            most = given["merged_rank"]
            return {name: min(bound, most) if most else bound for name, bound in bounds.items()}

        def prepare(context: Context, **given: Any) -> Preparation:
            changes, problems = Changes.of(context.plan, begin.__name__), Problems()
            adapter = None
            with problems.collecting():
                start = begin(context, changes, **accepted(begin, given))
                if given["output"] == "adapter":
                    adapter = MergedAdapter(changes, ranks(changes, given))
                    adapter.check()
            problems.check()

            def run() -> dict[str, Any]:
                merged = _merge_all(context, changes, start(), given)
                if adapter is None:
                    return {"low_rank": merged}
                made = (entry for name, factors in merged.items() for entry in adapter.tensors(name, factors))
                return {"low_rank": merged, "made": dict(made)}

            return Preparation(run, notes=_notes(changes, ranks(changes, given)))

        def outputs(context: Context, **given: Any) -> tuple[Output, ...]:
            changes = Changes.of(context.plan, begin.__name__)
            if given["output"] == "adapter":
                card = _card(context, changes, begin.__name__, given)
                return (MergedAdapter(changes, ranks(changes, given)).output(card),)
            return (_dense(context, changes),)

        enter_method(
            add_merged,
            described=begin,
            options=options,
            unit="entries",
            promises=frozenset(),
            prepare=Prepare(prepare, ("low_rank",)),
            outputs=outputs,
            mirrors_with=lambda given: given["output"] == "dense",
        )
        return begin

    return enter


def _merge_all(context: Context, changes: Changes, merge: MergeFactors, given: Mapping[str, Any]) -> dict[str, Factors]:
    import torch

    device, merged = torch.device(context.device), dict[str, Factors]()
    with context.progress("merging factors", len(changes.products), "tensors") as advance:
        for name in changes.products:
            found = merge(name, changes.factors(name, device)).scaled(given["scaling_coefficient"])
            merged[name] = (found.cut(given["merged_rank"]) if given["merged_rank"] else found).single()
            if not (merged[name].left.isfinite().all() and merged[name].right.isfinite().all()):
                raise InputError(f"the merged factors of {name} do not fit into F32; use a smaller coefficient")
            advance(1, name)
    return merged


def _dense(context: Context, changes: Changes) -> Output:
    """The base's mirror, for which no expert is read where its factors say all."""
    output, plan = mirror_of(context.plan), context.plan
    averaged = frozenset(changes.others)

    def source_of(slot: Slot) -> Slot:
        name = plan.merged_as(slot.name)
        if name is None or name in averaged:
            return slot
        merged = Merged(name, reads_experts=False)
        return replace(slot, source=merged if name in changes.products else Copied(slot.name))

    return replace(output, files={file: tuple(map(source_of, slots)) for file, slots in output.files.items()})


def _card(context: Context, changes: Changes, method: str, given: Mapping[str, Any]) -> str:
    """The ``README.md`` of a merged adapter."""
    return adapter_card(
        context.plan.base.folder,
        {name: adapter.folder for name, adapter in changes.adapters.items()},
        title=context.run.name,
        method=method,
        options={**given, "seed": context.seed},
        loading=context.backbone.loading[0],
    )


def _notes(changes: Changes, ranks: Mapping[str, int]) -> tuple[str, ...]:
    averaged = f", and {len(changes.others)} are averaged, which are trained otherwise" if changes.others else ""
    entries = sum(rank * sum(changes.shape(name)) for name, rank in ranks.items())
    return (
        f"{len(changes.products)} tensors are merged by their factors{averaged}; the merged factors take "
        f"{gib(4 * entries)} of memory",
    )
