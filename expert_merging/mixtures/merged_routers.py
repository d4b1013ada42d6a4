"""Routers of mixtures that are merged with one another: made anew after any method has merged all else."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any

from expert_merging.arithmetic import scaled_mean
from expert_merging.context import Context
from expert_merging.errors import InputError, first_of
from expert_merging.flags import Count, Interval
from expert_merging.method import SAMPLES, Preparation, Prepare, register
from expert_merging.mixtures.layouts import MIXTURES
from expert_merging.parts import Part
from expert_merging.plan import Plan, Rule
from expert_merging.processes import while_others_wait
from expert_merging.roles import is_router
from expert_merging.running.options import SampleOptions
from expert_merging.statistics.gathering import kept_note

if TYPE_CHECKING:
    from torch import Tensor

    from expert_merging.statistics.layer_by_layer import Calibrated


def routers_of(plan: Plan, modifier: str) -> tuple[str, ...]:
    """Names of the routers that are merged.

    Args:
        plan: the checkpoints.
        modifier: who wants them, for messages.

    Raises:
        InputError: the checkpoints are no mixtures, or all routers are excluded.
    """
    base = plan.base
    if base.model_type not in MIXTURES:
        raise InputError(
            f"--post {modifier} is for experts that are mixtures themselves ({', '.join(sorted(MIXTURES))}), and "
            f"{base.folder} has the model_type {base.model_type!r}; leave it out"
        )
    routers = [name for name in base.entries if is_router(plan.published.get(name, name))]
    merged = tuple(name for name in routers if name in plan.merged_set)
    if not merged:
        out = f"--exclude_params leaves out {first_of(routers, 1)}" if routers else f"{base.folder} has none"
        raise InputError(f"--post {modifier} makes routers anew, and {out}; exclude other parameters, or leave it out")
    return merged


@dataclass(frozen=True, kw_only=True)
class HarcOptions(SampleOptions):
    """Options of HARC.

    Args:
        harc_damping: factor on what is beside the diagonal of each expert's curvature, from 0 to 1.
        harc_iterations: at most so many steps of conjugate gradients for a router.
    """

    harc_damping: Annotated[float, Interval("[0, 1]")] = 0.9
    harc_iterations: Count = 1000


def _prepare(context: Context, **given: Any) -> Preparation:
    """Check the samples and that there are routers; the work is to go through the merged model.

    Raises:
        InputError: options or calibration files cannot be used, there are no routers, or the disk has no room.
    """
    routers = routers_of(context.plan, "harc")
    from expert_merging.mixtures.router_calibration import calibrate_routers
    from expert_merging.statistics.layer_by_layer import Calibrated, check_layers

    options = HarcOptions(**given)
    alone = replace(context, plan=replace(context.plan, merged=routers))
    checked = check_layers(alone, options, "harc")

    def work(rule: Rule, unit: str) -> dict[str, Any]:
        counts = options.harc_damping, options.harc_iterations
        while_others_wait(lambda: calibrate_routers(context, checked, *counts, rule, unit))
        calibrated = Calibrated(checked.folder)
        return {"calibrated": calibrated, "anew": calibrated.files}

    notes = (
        f"{len(routers)} routers are calibrated on {len(checked.samples.samples)} samples, a layer at a time",
        kept_note("they", checked.folder, checked.size),
    )
    return Preparation(work, checked.samples.inputs, notes, follows=True)


@register(
    options=HarcOptions,
    unit="matrix",
    reads=frozenset({SAMPLES}),
    prepare=Prepare(_prepare, ("calibrated",)),
    family_defaults=("samples_per_task",),
)
def harc(task_vectors: Tensor, part: Part, base: Tensor, merged: Tensor, calibrated: Calibrated) -> Tensor:
    """For --post: routers of merged mixtures send tokens where the experts' do (2026, arXiv 2606.03391).

    The layers are gone through from below. With ``X_k`` what goes into a layer's router on expert k's samples, in the
    merged model with the routers below it as they were made anew, and ``r = softmax(W_k x)``, the divergence between
    the routing by ``W`` and by the expert's ``W_k`` is to second order ``(W - W_k)^T S_k (W - W_k)`` with ``S_k`` the
    mean over ``x`` of ``(diag(r) - r r^T)`` times ``x x^T``. Its minimum solves ``sum_k S_k W = sum_k S_k W_k``, by
    conjugate gradients that begin with the merged router. Beside the diagonal ``S_k`` is
    multiplied by a factor (damping). So what no sample says anything about stays as it was merged.

    All but routers stays as it was merged. The authors calibrate 7000 samples a task, and take all of a conversation.

    Args:
        task_vectors: ``(experts, experts of a layer, hidden size)`` float32 for a router.
        part: the tensor.
        base: the base's entries.
        merged: merged task vector ``(experts of a layer, hidden size)``.
        calibrated: the new routers.

    Returns:
        Merged task vector ``(experts of a layer, hidden size)``.
    """
    del task_vectors  # they have had their say in the new routers
    found = calibrated.task_vector(part, base)
    return merged if found is None else found


def _prepare_mean(context: Context) -> Preparation:
    """Find the routers.

    Raises:
        InputError: there are none.
    """
    routers = frozenset(routers_of(context.plan, "router_mean"))
    return Preparation(lambda: {"routers": routers, "anew": routers})


@register(unit="entries", prepare=Prepare(_prepare_mean, ("routers",)))
def router_mean(task_vectors: Tensor, part: Part, merged: Tensor, routers: frozenset[str]) -> Tensor:
    """For --post: routers of merged mixtures are the mean of the experts', and all else as it was merged.

    Methods that drop, scale or orthogonalise task vectors do so to routers too, which are small, and in which little
    decides between two experts of a layer.

    Args:
        task_vectors: ``(experts, entries)`` float32.
        part: the entries.
        merged: merged task vector ``(entries,)``.
        routers: names of the routers.

    Returns:
        Merged task vector ``(entries,)``.
    """
    return scaled_mean(task_vectors, 1.0) if part.name in routers else merged
