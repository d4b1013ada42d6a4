"""One mixture of experts out of several dense models, as in Branch-Train-Mix and MergeME.

The experts' feed-forward layers stay apart, with a router before them; everything else is merged by any closed form.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from expert_merging.card import inline
from expert_merging.checkpoints.checkpoint import Checkpoint
from expert_merging.context import Context
from expert_merging.errors import InputError, Problems, about
from expert_merging.flags import Count
from expert_merging.method import Method, Preparation, Prepare, enter_method
from expert_merging.mixtures import mixtral
from expert_merging.outputs import Output, shards
from expert_merging.parts import Part
from expert_merging.plan import Plan, Rule

if TYPE_CHECKING:
    from torch import Tensor

_ROUTERS = {
    "random": "Routers are random numbers: train them before anything is expected of the model.",
    "zeros": "Routers are zero: all experts have the same share in every token.",
}
# What transformers draws new weights with where config.json does not say it.
_USUAL_DEVIATION = 0.02


@dataclass(frozen=True, kw_only=True)
class MixtureOptions:
    """Options of mixtures.

    Args:
        router: what chooses a token's experts: random numbers, to be trained, or zeros, which mix all experts equally.
        shared: closed form that merges everything but feed-forward layers, with its defaults.
        experts_per_token: how many experts work on each token.
        include_base: the base's feed-forward layers are one more expert, the last one.
    """

    router: Literal["random", "zeros"] = "random"
    shared: str = "weight_average"
    experts_per_token: Count = 2
    include_base: bool = False

    def members(self, plan: Plan) -> dict[str, str | None]:
        """The mixture's experts."""
        members: dict[str, str | None] = {name: name for name in plan.experts}
        return {**members, "base": None} if self.include_base else members


def merge_shared(task_vectors: Tensor, part: Part, base: Tensor, shared_rule: Rule) -> Any:
    """What the closed form makes of a tensor that all experts share."""
    return shared_rule(task_vectors, part, base)


def moe(context: Context, **options: Any) -> Preparation:
    """A Mixtral with every expert's feed-forward layers; all else is merged (arXiv 2403.07816, 2502.00997).

    Branch-Train-Mix averages the rest, norms and embeddings included, and MergeME merges it by DARE or TIES; here the
    family's excluded parameters keep the base's value unless the user asks otherwise. Both train the result.

    Raises:
        InputError: the base cannot become a Mixtral, there are too few experts, or the closed form cannot be used.
    """
    chosen, problems = MixtureOptions(**options), Problems()
    with problems.collecting():
        mixtral.check_base(context.plan)
    with problems.collecting():
        _check_counts(chosen, len(chosen.members(context.plan)))
    with problems.collecting():
        shared = _Shared.of(chosen.shared, context)
    with problems.collecting():
        deviation = _deviation(context.plan.base) if chosen.router == "random" else 0.0
    problems.check()

    def work() -> Mapping[str, Any]:
        routers = mixtral.routers_of(context.plan.base).items()
        made = {name: _router(context, chosen, name, columns, deviation) for name, columns in routers}
        return {"shared_rule": shared.rule(), "made": made}

    return Preparation(
        work,
        {**shared.preparation.inputs, "shared": shared.described},
        (*shared.preparation.notes, *_notes(context.plan, chosen, shared.described)),
        shared.preparation.unit,
    )


def outputs_of(context: Context, **options: Any) -> tuple[Output, ...]:
    """The mixture's folder.

    Raises:
        InputError: the base cannot become a Mixtral.
    """
    chosen = MixtureOptions(**options)
    mixtral.check_base(context.plan)
    members = chosen.members(context.plan)
    edit = partial(mixtral.config_of, experts=len(members), experts_per_token=chosen.experts_per_token)
    names = ", ".join(map(inline, members))
    about = (
        f"A Mixtral of {len(members)} experts ({names}), each with the feed-forward layers of one "
        f"checkpoint; {chosen.experts_per_token} work on each token. All else is merged by `{chosen.shared}`, or the "
        f"base's. {_ROUTERS[chosen.router]}"
    )
    return (Output(shards(mixtral.slots_of(context.plan, members)), edit=edit, about=about),)


enter_method(
    merge_shared,
    described=moe,
    options=MixtureOptions,
    unit="entries",
    promises=frozenset(),
    prepare=Prepare(moe, ("shared_rule",)),
    outputs=outputs_of,
)


@dataclass(frozen=True)
class _Shared:
    """The closed form that merges what the experts share, prepared for those tensors alone.

    Args:
        method: the closed form.
        options: its options, all of them the family's defaults.
        context: the run, with no other tensors to merge.
        preparation: what it does before it merges.
    """

    method: Method
    options: Mapping[str, Any]
    context: Context
    preparation: Preparation

    @classmethod
    def of(cls, name: str, context: Context) -> _Shared:
        """The closed form of that name.

        Raises:
            InputError: there is none, or it cannot merge these experts.
        """
        own = replace(context, plan=replace(context.plan, merged=mixtral.shared_of(context.plan)))
        with about(f"--shared {name}"):
            method: Method = context.find_method(name)
            _check_closed_form(method)
            options = method.defaults(context.backbone.defaults)
            return cls(method, options, own, method.prepared(own, options))

    @property
    def described(self) -> str:
        """Name and options."""
        given = {name: value for name, value in self.options.items() if value is not None}
        return " ".join([self.method.name, *(f"{name}={value}" for name, value in given.items())])

    def rule(self) -> Rule:
        """Do what is to be done before merging; the rule."""
        plan = self.context.plan
        found = self.preparation.run() if plan.merged else {}
        return self.method.rule({"seed": self.context.seed, "experts": tuple(plan.experts), **found}, self.options)


def _check_closed_form(method: Method) -> None:
    """Check that the method makes one dense model of nothing but the base and the experts."""
    if not method.is_closed_form:
        raise InputError(
            "that is no closed form; choose a method that merges the base and experts alone into one dense model, such "
            "as weight_average, task_arithmetic, ties or svd"
        )


def _check_counts(chosen: MixtureOptions, experts: int) -> None:
    """Check that a token can have as many experts as it shall, and that zeros do not leave out some for ever."""
    wanted = chosen.experts_per_token
    if wanted > experts:
        raise InputError(
            f"--experts_per_token must be at most the number of experts, {experts}, got {wanted}; give fewer, or more "
            "experts" + ("" if chosen.include_base else " (--include_base makes the base one)")
        )
    if chosen.router == "zeros" and wanted < experts:
        raise InputError(
            f"--router zeros rates all experts alike, so that the first {wanted} would do all the work; give "
            f"--experts_per_token {experts} to mix all, or another --router"
        )


def _deviation(base: Checkpoint) -> float:
    """Standard deviation of the numbers in random routers: that of the base's own weights before it was trained."""
    given = base.config.get("initializer_range")
    if given is None:
        return _USUAL_DEVIATION
    if isinstance(given, bool) or not isinstance(given, int | float) or not 0 <= given < math.inf:
        raise InputError(
            f"{base.folder}/config.json has the initializer_range {given!r}, and routers are drawn with it as their "
            "standard deviation; give it a number that is not negative, or choose --router zeros"
        )
    return float(given)


def _router(context: Context, chosen: MixtureOptions, name: str, columns: int, deviation: float) -> Tensor:
    """A layer's router ``(experts, columns)`` float32.

    A row depends on the seed and the names of expert and router alone: a restart does not change it, and experts in
    another order make the same model.
    """
    import torch

    members = chosen.members(context.plan)
    if chosen.router == "zeros":
        return torch.zeros(len(members), columns)
    rows = []
    for member in members:
        key = f"{context.seed}/{member}/{name}".encode()
        seed = int.from_bytes(hashlib.sha256(key).digest()[:8], "little")
        rows.append(torch.randn(columns, generator=torch.Generator().manual_seed(seed)) * deviation)
    return torch.stack(rows)


def _notes(plan: Plan, chosen: MixtureOptions, shared: str) -> tuple[str, ...]:
    """What the plan says of the mixture."""
    members = chosen.members(plan)
    total = sum(math.prod(slot.shape) for slot in mixtral.slots_of(plan, members))
    idle = (len(members) - chosen.experts_per_token) * mixtral.feed_forward_elements(plan.base)
    return (
        f"Mixtral of {len(members)} experts ({', '.join(members)}), {chosen.experts_per_token} for each token: "
        f"{total / 1e6:.1f}M parameters, {(total - idle) / 1e6:.1f}M of them active for a token",
        f"all but feed-forward layers is merged by {shared}",
        _ROUTERS[chosen.router],
    )
