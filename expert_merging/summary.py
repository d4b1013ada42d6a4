"""What a run tells of itself: the plan, what may be amiss with it, and what came out."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import replace

import torch
from rich.console import Console

from expert_merging.advice import rewritten_weights, warnings_before
from expert_merging.checkpoints.folders import weights_in_other_formats
from expert_merging.checkpoints.other_files import names_of_this_machine, not_copied
from expert_merging.checkpoints.vocabulary import vocabulary_warnings
from expert_merging.checks import Job, method_options
from expert_merging.console import say
from expert_merging.likeness import Likeness, changes_line, find_likeness, likeness_warnings
from expert_merging.machine import gib, show_size
from expert_merging.merge import Summary, working_memory
from expert_merging.mixtures.order import order_warnings
from expert_merging.outputs import Computed, Copied, Made, Output
from expert_merging.parser import show
from expert_merging.plan import Plan
from expert_merging.records import method_in_words

logger = logging.getLogger(__name__)

COMPLETE = "this run is complete already; remove its folder to repeat it"


def heading(job: Job) -> str:
    """Method, modifiers and folder."""
    return f"method {method_in_words(job.description)}, run folder {job.context.run.folder}"


def plan_lines(job: Job, likeness: Mapping[str, Likeness]) -> list[str]:
    """The plan in words: experts, parameters, memory and disk.

    Args:
        job: the run.
        likeness: how near the experts are to the base.
    """
    plan = job.context.plan
    options = method_options(job.resolved) | {name: job.resolved.general[name] for name in ("post", "align_experts")}
    lines = [
        f"base {plan.base.folder}",
        *(f"expert {name} {expert.folder}{expert.kind}" for name, expert in plan.experts.items()),
        *changes_line(likeness),
        *(f"{who}: names of tensors are read {words}" for who, words in plan.contained.items()),
        *_tied(plan),
        *(f"option {name} {show(value)}" for name, value in options.items() if value is not None),
        *([job.word_tables.about] if job.word_tables else []),
        *(job.wording.lines if job.resolved.reads_samples else ()),
        *job.wording.gets,
        *(note for preparation in (job.alignment, *job.preparations) if preparation for note in preparation.notes),
        *([_sources(job)] if job.models else []),
        f"writes {show_size(sum(output.size for output in job.outputs))}; merging needs about "
        f"{gib(merging_memory(job))} of memory on {job.context.device}",
    ]
    unread = weights_in_other_formats(plan.base.folder, plan.base.headers)
    if unread and job.models:
        lines.append(f"not copied, since they hold the base's weights: {', '.join(unread)}")
    return lines


def _tied(plan: Plan) -> list[str]:
    """Where a copy of a tensor follows it, whatever the patterns say."""
    heads = plan.heads
    copied = heads.copy is not None and plan.merged_as(heads.copy) is not None
    return [f"{heads.copy} becomes what {heads.kept} becomes, since the two are one"] if copied else []


def _merging(job: Job) -> Plan:
    """The plan with those tensors alone that some output has merged."""
    merged = dict.fromkeys(name for output in job.outputs for name in output.merged)
    return replace(job.context.plan, merged=tuple(merged))


def _sources(job: Job) -> str:
    """Where the tensors of models come from, each counted once, whatever number of models has it."""
    models = [output for output in job.outputs if output.is_model]
    sources = {slot.name: slot.source for output in models for slots in output.files.values() for slot in slots}
    copied = [source for source in sources.values() if isinstance(source, Copied)]
    of_experts = sum(source.expert is not None for source in copied)
    made = sum(isinstance(source, Made | Computed) for source in sources.values())
    plan = _merging(job)
    return (
        f"{len(sources) - len(copied) - made} of {len(sources)} tensors are merged "
        f"({plan.merged_elements / 1e6:.1f}M parameters), {len(copied) - of_experts} keep the base's value"
        + (f", {of_experts} are copied from experts" if of_experts else "")
        + (f", {made} are made" if made else "")
    )


def merging_memory(job: Job) -> int:
    """Bytes of memory that merging works with."""
    return working_memory(_merging(job), unit=job.unit, device=torch.device(job.context.device), copies=job.copies)


def warnings(job: Job, likeness: Mapping[str, Likeness]) -> list[str]:
    """One line for everything that may not be as the user thinks.

    Args:
        job: the run.
        likeness: how near the experts are to the base.
    """
    plan = job.context.plan
    found = [*likeness_warnings(plan, likeness, aligned=job.alignment is not None), *order_warnings(plan)]
    found += _token_warnings(job)
    if job.models:
        found += [*not_copied(plan.base.folder), *names_of_this_machine(plan.base.folder)]
    found += warnings_before(
        job.resolved,
        job.context.backbone,
        job.context.plan,
        models=job.models,
        memory=merging_memory(job),
        device=job.context.device,
    )
    formats = job.wording.formats if job.resolved.reads_samples else job.wording.asked
    return [*found, *formats.warnings, *rewritten_weights(job.context.plan, job.description)]


def _token_warnings(job: Job) -> list[str]:
    """What the merged model does not know of its experts' tokens."""
    plan, tables = job.context.plan, job.word_tables
    if tables is None:
        return vocabulary_warnings(plan.base, plan.experts)
    return vocabulary_warnings(plan.base, plan.experts, tables.vocabulary, ends_as_base=tables.identifiers is None)


def print_plan(job: Job, console: Console, more: Iterable[str] = ()) -> None:
    """Show the plan and what may be amiss with it.

    Args:
        job: the run.
        console: where it goes.
        more: lines about what is done after the run.
    """
    run, likeness = job.context.run, find_likeness(job.context.plan)
    for line in (heading(job), *plan_lines(job, likeness), *more):
        say(console, line)
    for line in warnings(job, likeness):
        say(console, f"warning: {line}")
    if run.is_complete:
        console.print(COMPLETE)
    elif run.config.exists():
        console.print("this run has been begun and would be continued")
    console.print("dry run: all checks passed, nothing was written")


def log_start(job: Job) -> None:
    """Write the plan and its warnings to the log."""
    likeness = find_likeness(job.context.plan)
    for line in (heading(job), *plan_lines(job, likeness)):
        logger.info("%s", line)
    for line in warnings(job, likeness):
        logger.warning("%s", line)


def log_result(job: Job, summary: Summary | None, seconds: float) -> None:
    """Write to the log what came out and what to do with it.

    Args:
        job: the run.
        summary: what the merge did; None where the run was complete already.
        seconds: what it took.
    """
    run = job.context.run
    if summary is not None:
        if summary.kept_shards:
            logger.info("kept %d finished shards of an earlier, interrupted run", summary.kept_shards)
        if summary.changes:
            name = max(summary.changes, key=lambda key: summary.changes[key])
            where = " outside of them" if summary.kept_shards else ""
            logger.info("largest relative change%s: %.3g in %s", where, summary.changes[name], name)
        logger.info("done in %.1f s", seconds)
    if run.board.exists():
        logger.info("curves:       tensorboard --logdir %s", run.board)
    for output in job.outputs:
        if output.is_model:
            _log_model(job, output)
    if not job.models:
        logger.info("result:       %s", run.model)


def _log_model(job: Job, output: Output) -> None:
    """Write to the log where a model is, how to load it and how to evaluate it."""
    plan, backbone = job.context.plan, job.context.backbone
    model = job.context.run.model / output.folder
    settings = job.context.run.evaluation(output.folder)
    logger.info("merged model: %s", model)
    logger.info("load it:      %s", backbone.loading[0].format(model=model))
    if output.is_mirror:  # a mixture's routers are to be trained first
        evaluation = backbone.evaluation_of(plan.base.model_type)
        for command in evaluation.commands_for(output.experts or plan.experts):
            logger.info("evaluate it:  %s", command.format(model=model, eval=settings))
