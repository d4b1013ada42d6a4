"""The second step of a run: what must be known of the whole before the first tensor is merged."""

from __future__ import annotations

from collections.abc import Container, Mapping
from typing import Any

from expert_merging.checks import Job
from expert_merging.method import modified
from expert_merging.plan import Rule


def prepare(job: Job) -> tuple[Rule, Mapping[str, Any]]:
    """Do the work of the preparations: passes over task vectors, statistics, learning, search.

    Returns:
        The rule that merges, and tensors that are to be written as they are.
    """
    if job.alignment is not None:
        job.alignment.run()
    always = {"seed": job.context.seed, "experts": tuple(job.context.plan.experts)}
    rules, anew, made = list[Rule](), list[Container[str]](), {}
    for step, preparation in zip(job.resolved.steps, job.preparations, strict=True):
        before = (modified(rules, anew), job.unit) if preparation.follows else ()
        known = {**always, **preparation.run(*before)}
        made.update(known.get("made", {}))
        anew.append(known.get("anew", ()))
        rules.append(step.rule(known, job.resolved.options_of(step)))
    return modified(rules, anew), made
