"""One mixture of experts out of several dense models, as in Branch-Train-Mix and MergeME.

The experts' feed-forward layers stay apart, with a router before them; everything else is merged by any closed form.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from expert_merging.card import inline
from expert_merging.closed_form import ClosedForm
from expert_merging.context import Context
from expert_merging.errors import InputError, Problems
from expert_merging.machine import show_size
from expert_merging.method import SAMPLES, Preparation, Prepare, enter_method
from expert_merging.mixtures.options import OF_SAMPLES, MixtureOptions, reads_samples
from expert_merging.mixtures.routers import deviation_of, random_routers, zero_routers
from expert_merging.mixtures.tensors import Mixture
from expert_merging.outputs import Output, shards
from expert_merging.parts import Part
from expert_merging.plan import Rule
from expert_merging.processes import while_others_wait

if TYPE_CHECKING:
    from torch import Tensor

# MergeME's settings: a fifth of the changes, the sum of what agrees or is left, a third of it for three experts, and
# the base as one more expert. Like Branch-Train-Mix, it merges norms and embeddings too.
_PUBLISHED = {"exclude_params": "none", "experts_per_token": 2}
_MERGEME = {**_PUBLISHED, "include_base": True}
_THIRD = 0.3333333333333333
PRESETS: Mapping[str, Mapping[str, Any]] = {
    "btx": {**_PUBLISHED, "shared": "weight_average"},
    "mergeme": {
        **_MERGEME,
        "shared": f"ties density=0.2 ties_normalize=false scaling_coefficient={_THIRD}",
    },
    "mergeme_dare": {**_MERGEME, "shared": f"dare_ta drop_rate=0.8 scaling_coefficient={_THIRD}"},
}


def merge_shared(task_vectors: Tensor, part: Part, base: Tensor, shared_rule: Rule) -> Any:
    """What the closed form makes of a tensor that all experts share."""
    return shared_rule(task_vectors, part, base)


def moe(context: Context, **options: Any) -> Preparation:
    """A mixture with every expert's feed-forward layers; all else is merged (arXiv 2403.07816, 2502.00997).

    Branch-Train-Mix averages the rest, norms and embeddings included, and MergeME merges it by DARE or TIES; here the
    family's excluded parameters keep the base's value unless the user asks otherwise. Both train the result.

    Raises:
        InputError: the base cannot become a mixture, there are too few experts, or the closed form cannot be used.
    """
    chosen, problems = MixtureOptions(**options), Problems()
    mixture = shared = maker = trainer = None
    with problems.collecting():
        mixture = chosen.mixture(context.plan)
    with problems.collecting():
        _check_counts(chosen, len(chosen.members(context.plan)))
    with problems.collecting():
        own = replace(context, plan=replace(context.plan, merged=mixture.shared if mixture else ()))
        shared = ClosedForm.of(chosen.shared, own, "shared")
    with problems.collecting():
        deviation = deviation_of(context.plan.base) if chosen.kind == "random" else 0.0
    if mixture is not None and chosen.kind in OF_SAMPLES:
        from expert_merging.mixtures.making import RouterMaker

        size = sum(slot.size for slot in mixture.slots())
        with problems.collecting():
            maker = RouterMaker.check(context, mixture, chosen, size)
    if mixture is not None and chosen.train_router:
        from expert_merging.mixtures.training import RouterTrainer

        with problems.collecting():
            trainer = RouterTrainer.check(context, mixture, chosen)
    problems.check()
    assert mixture is not None  # noqa: S101  (else there were problems)
    assert shared is not None  # noqa: S101

    def work() -> Mapping[str, Any]:
        rule, unit, made = shared.rule(), shared.preparation.unit, mixture.zeros()

        def trained(routers: dict[str, Any]) -> dict[str, Any]:
            return routers if trainer is None else trainer.train({**made, **routers}, rule, unit)

        def make() -> None:
            if maker is not None:
                made.update(maker.make(rule, unit, trained))
            elif chosen.kind == "zeros":
                made.update(trained(zero_routers(mixture)))
            else:
                made.update(trained(random_routers(mixture, context.seed, deviation)))

        if maker is None and trainer is None:
            make()
        else:
            while_others_wait(make)  # models run
        return {"shared_rule": rule, "made": made}

    return Preparation(
        work,
        {
            **shared.preparation.inputs,
            "shared": shared.described,
            **(maker.samples.samples.inputs if maker else {}),
            **(trainer.samples.inputs if trainer else {}),
        },
        (
            *_sizes(mixture),
            *shared.preparation.notes,
            *_notes(chosen, shared.described),
            *(maker.notes if maker else ()),
            *(trainer.notes if trainer else ()),
        ),
        shared.preparation.unit,
    )


def outputs_of(context: Context, **options: Any) -> tuple[Output, ...]:
    """The mixture's folder.

    Raises:
        InputError: the base cannot become a mixture.
    """
    chosen = MixtureOptions(**options)
    mixture = chosen.mixture(context.plan)
    names = ", ".join(map(inline, mixture.members))
    about = (
        f"A {mixture.layout.title} of {len(mixture.members)} experts ({names}), each with the feed-forward layers of "
        f"one checkpoint; {chosen.experts_per_token} work on each token. All else is merged by `{chosen.shared}`, or "
        f"the base's. {chosen.described}"
    )
    return (Output(shards(mixture.slots()), edit=mixture.config, about=about),)


enter_method(
    merge_shared,
    described=moe,
    options=MixtureOptions,
    presets=PRESETS,
    reads=frozenset({SAMPLES}),
    reads_with=reads_samples,
    family_defaults=("samples_per_task",),
    unit="entries",
    promises=frozenset(),
    prepare=Prepare(moe, ("shared_rule",)),
    outputs=outputs_of,
)


def _check_counts(chosen: MixtureOptions, experts: int) -> None:
    """Check that a token can have as many experts as it shall, and that zeros do not leave out some for ever."""
    wanted = chosen.experts_per_token
    if wanted > experts:
        raise InputError(
            f"--experts_per_token must be at most the number of experts, {experts}, got {wanted}; give fewer, or more "
            "experts" + ("" if chosen.include_base else " (--include_base makes the base one)")
        )
    if chosen.kind == "zeros" and wanted < experts:
        raise InputError(
            f"--router zeros rates all experts alike, so that the first {wanted} would do all the work; give "
            f"--experts_per_token {experts} to mix all, or another --router"
        )


def _sizes(mixture: Mixture) -> tuple[str, ...]:
    """How large the mixture is."""
    slots = mixture.slots()
    total, size = sum(math.prod(slot.shape) for slot in slots), sum(slot.size for slot in slots)
    idle = (len(mixture.members) - mixture.per_token) * mixture.expert_elements
    return (
        f"{mixture.layout.title} of {len(mixture.members)} experts ({', '.join(mixture.members)}), {mixture.per_token} "
        f"for each token: {total / 1e6:.1f}M parameters, {(total - idle) / 1e6:.1f}M of them active for a token; to "
        f"run it takes {show_size(size)} of memory for weights",
    )


def _notes(chosen: MixtureOptions, shared: str) -> tuple[str, ...]:
    """What the plan says of the mixture beside its size."""
    half = "every token goes through a half of the base's feed-forward layers as well: train the mixture"
    return (
        f"all but feed-forward layers is merged by {shared}",
        *([half] if chosen.shared_expert == "base" else []),
        chosen.described,
    )
