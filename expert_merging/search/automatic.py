"""``--scaling_coefficient auto``: any closed form with the coefficient whose merge is nearest to the experts.

A method is given a record of its own for it, which reads samples and whose preparation chooses; nothing else knows.
"""

from __future__ import annotations

import functools
import json
import logging
import math
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

from expert_merging.context import Context
from expert_merging.documents import read_object
from expert_merging.errors import InputError
from expert_merging.flags import read_options
from expert_merging.machine import show_size
from expert_merging.method import SAMPLES, Method, Preparation, Prepare, accepted
from expert_merging.outputs import mirror_of
from expert_merging.parts import Part
from expert_merging.plan import Rule
from expert_merging.processes import from_main_process, is_main_process
from expert_merging.run import Run
from expert_merging.running.options import SampleOptions
from expert_merging.writing import check_free_disk, write_atomically

if TYPE_CHECKING:
    from torch import Tensor

    from expert_merging.running.samples import Samples

logger = logging.getLogger(__name__)

COEFFICIENT, AUTO = "scaling_coefficient", "auto"
# Merges that are tried: some four until the best is between two of them, and the rest to narrow that to a few percent.
_EVALUATIONS = 10


def automatic(method: Method) -> Method:
    """The method that chooses its own coefficient.

    Raises:
        InputError: it has none, or runs models by itself.
    """
    if COEFFICIENT not in method.options or not method.is_closed_form:
        raise InputError(
            f"--{COEFFICIENT} {AUTO} chooses the coefficient of a method of closed form by its distance from the "
            f"experts, and {method.name} " + ("is none" if COEFFICIENT in method.options else "has no coefficient")
        )
    choice = replace(method.options[COEFFICIENT], annotation=Literal["auto"], default=AUTO)
    return replace(
        method,
        merge=merge_as_chosen,
        options={**method.options, **read_options(SampleOptions), COEFFICIENT: choice},
        family_defaults=("samples_per_task", *(name for name in method.family_defaults if name != COEFFICIENT)),
        needs=("rule", "part", "base"),
        unit="tensor" if method.unit == "matrix" else method.unit,  # whose own rule knows what is no matrix
        reads=frozenset({SAMPLES}),
        prepare=Prepare(functools.partial(_prepare, method), ("rule",)),
        parts=None,
    )


def merge_as_chosen(task_vectors: Tensor, rule: Rule, part: Part, base: Tensor) -> Any:
    """What the method makes with the coefficient chosen."""
    return rule(task_vectors, part, base)


def _prepare(method: Method, context: Context, **options: Any) -> Preparation:
    """Check options and samples; the choice is the work to be done.

    Raises:
        InputError: every problem found.
    """
    from expert_merging.running.samples import check_samples
    from expert_merging.search.multiples import kept_bytes

    given = SampleOptions(**accepted(SampleOptions, options))
    start = method.defaults(context.backbone.defaults)[COEFFICIENT] or 1.0
    own = {name: options[name] for name in method.options} | {COEFFICIENT: start}
    asked = check_samples(context, given, batch_tokens=None)
    inner = method.prepared(context, own)
    kept = 0 if remembered(context.run) else kept_bytes(context.plan, inner.unit)
    if kept and not context.run.is_complete:
        check_free_disk(context.run.folder, kept + mirror_of(context.plan).size)

    def work() -> dict[str, Any]:
        known = {"seed": context.seed, "experts": tuple(context.plan.experts), **inner.run()}
        chosen = 0.0
        if is_main_process():  # elsewhere the last digits of a score may differ
            chosen = remembered(context.run) or _choose(context, asked, method, known, own, inner.unit)
        chosen = from_main_process(chosen)
        return {"rule": method.rule(known, own | {COEFFICIENT: chosen})}

    notes = [f"the coefficient is chosen by divergence from the experts on {len(asked.samples)} samples"]
    if kept:
        notes.append(f"until it is chosen, {show_size(kept)} of merged tensors are in {context.run.multiples}")
    return Preparation(work, {**asked.inputs, **inner.inputs}, (*inner.notes, *notes), inner.unit)


def _choose(
    context: Context, asked: Samples, method: Method, known: Mapping[str, Any], own: Mapping[str, Any], unit: str
) -> float:
    """The coefficient whose merge is nearest to the experts; the run remembers it.

    Raises:
        InputError: no merge has predictions that are numbers.
    """
    from expert_merging.running.candidates import Candidates
    from expert_merging.search.line import minimise_positive
    from expert_merging.search.multiples import multiples

    candidates = Candidates(context, asked)
    rule = method.rule(known, {**own, COEFFICIENT: 1.0})
    with (
        multiples(rule, unit, context.plan, context.run.multiples) as times,
        context.progress("choosing the coefficient", _EVALUATIONS, "merge") as advance,
    ):

        def score(coefficient: float) -> float:
            candidates.merge(times(coefficient), unit)
            found = candidates.divergence()
            advance(1, f"{coefficient:g}")
            return sum(found.values()) / len(found)

        tried = minimise_positive(score, own[COEFFICIENT], _EVALUATIONS)
    chosen = min(tried, key=tried.__getitem__)
    if math.isinf(tried[chosen]):
        raise InputError(
            f"--{COEFFICIENT} {AUTO}: no merge's predictions are numbers, with coefficients from {min(tried):g} to "
            f"{max(tried):g}; give one yourself, or use --mixed_precision no"
        )
    logger.info(
        "--%s %s: %g, with %.4g of the base's divergence from the experts", COEFFICIENT, AUTO, chosen, tried[chosen]
    )
    record = {"chosen": chosen, "divergence": {f"{number:g}": found for number, found in sorted(tried.items())}}
    context.run.folder.mkdir(parents=True, exist_ok=True)
    write_atomically(context.run.coefficient, (json.dumps(record, indent=2) + "\n").encode())
    return chosen


def remembered(run: Run) -> float | None:
    """What a run, or an earlier part of it, has chosen; None where it has not, or its record is damaged."""
    try:
        chosen = read_object(run.coefficient).get("chosen")
    except InputError:
        return None
    return chosen if isinstance(chosen, float) and 0 < chosen < math.inf else None


def for_card(run: Run) -> str:
    """What the card of a run's model says of the choice; empty where there was none."""
    chosen = remembered(run)
    return "" if chosen is None else f"Its coefficient, {chosen:g}, was chosen by divergence from the experts."
