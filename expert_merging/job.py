"""One run: check (`expert_merging.checks`), prepare, merge, write."""

from __future__ import annotations

import logging
import time
from collections.abc import Container, Mapping
from pathlib import Path
from typing import Any

import torch

from expert_merging.advice import rewritten_weights
from expert_merging.alignment import aligning
from expert_merging.card import CARD, model_card, vlmeval_config
from expert_merging.checks import Job
from expert_merging.console import Terminal
from expert_merging.errors import InputError
from expert_merging.idle import idle_flags
from expert_merging.merge import Summary, write_output
from expert_merging.outcome import Meter
from expert_merging.outputs import Output
from expert_merging.plan import Rule
from expert_merging.preparing import prepare
from expert_merging.processes import from_main_process, is_main_process
from expert_merging.publishing import publish
from expert_merging.questions.templates import put_template
from expert_merging.repeating import command_of
from expert_merging.run_names import changed_options
from expert_merging.search import automatic, stable
from expert_merging.summary import COMPLETE, log_result, log_start
from expert_merging.unchanged import check_unchanged
from expert_merging.writing import write_atomically

logger = logging.getLogger(__name__)

# Seconds until what one machine writes to a shared folder is seen by the others.
_SHARING = 60


def perform(job: Job, terminal: Terminal) -> int:
    """Do what was checked, or tell that it is done already.

    Returns:
        Exit code.
    """
    run = job.context.run
    meter, summary = Meter(continued=run.goes_on or run.config.exists()), None
    complete = from_main_process(job.context.run.is_complete)
    if not complete:
        _begin(job, terminal)
        complete = from_main_process(job.context.run.is_complete)  # by another process, which has just let go of it
    if complete:
        for line in (*idle_flags(job.resolved), *rewritten_weights(job.context.plan, job.description)):
            logger.warning("%s", line)
        logger.info(COMPLETE)
    else:
        rule, made = prepare(job)
        if is_main_process() or job.context.processes.size > 1:  # the others have prepared with it, and it merges
            summary = write(job, rule, made, meter)
    job.context.processes.leave()
    if is_main_process():
        log_result(job, summary, meter.seconds)
        if job.resolved.general["push_to_hub"]:
            publish(job.context.run, job.resolved.general["push_to_hub"])
        if job.resolved.general["run_tests"]:
            from expert_merging.running.questions import ask_questions  # loads what merging alone does not need

            for model in job.models:
                ask_questions(job.context, model, job.wording.of_merged)
    return 0


def _begin(job: Job, terminal: Terminal) -> None:
    """Take hold of the run's folder."""
    run = job.context.run
    if is_main_process():
        run.begin(job.description)
        run.check(job.description)  # once more: nobody else can change it now
        terminal.log_to(run.log)
    log_start(job)
    _wait_for_folder(job)


def _wait_for_folder(job: Job) -> None:
    """Wait until every process of a parallel run sees the folder that the main process has begun.

    Raises:
        InputError: this one does not, as on a machine that does not share it.
    """
    run = job.context.run
    begun = from_main_process(run.config.read_text(encoding="utf-8") if is_main_process() else "")
    last = time.monotonic() + _SHARING
    while not (run.config.is_file() and run.config.read_text(encoding="utf-8") == begun):
        if time.monotonic() > last:
            raise InputError(
                f"{run.folder} is another folder here than for the main process; the machines of a run need an "
                "--output_path that all of them see"
            )
        time.sleep(0.2)


def write(job: Job, rule: Rule, made: Mapping[str, Any], meter: Meter) -> Summary:
    """Merge and write every output, and give the complete folder its name.

    Returns:
        What was done, for all outputs together.
    """
    context, run, summary = job.context, job.context.run, Summary()
    kept = run.kept.within(run.model.name)
    if is_main_process():
        files = {(Path(output.folder) / file).as_posix() for output in job.outputs for file in output.files}
        _remove_strays(run.partial_model, files)
    for output in job.outputs:
        folder = run.partial_model / output.folder
        done = write_output(
            output,
            context.plan,
            rule,
            folder,
            unit=job.unit,
            device=torch.device(context.device),
            progress=context.progress,
            processes=context.processes,
            made=made,
            copies=job.copies,
            kept=kept.within(output.folder, context.plan.opened),
        )
        summary = summary.with_output(output.folder, done)
        if is_main_process() and output.is_model:
            _describe_model(job, output, folder)
    if is_main_process():
        check_unchanged(context.plan, job.description)
        kept.note_others(run.partial_model)
        is_known = summary.squares and not summary.kept_shards
        meter.save(run.outcome, summary.relative_change if is_known else None, context.device)
        run.finish()
    return summary


def _remove_strays(folder: Path, files: Container[str]) -> None:
    """Remove what an unfinished model's folder has beside files that the run makes: it would be published.

    What is copied into it is copied again, and a link in place of a file that was made is no such file.
    """
    paths = [path for path in sorted(folder.rglob("*")) if path.is_symlink() or not path.is_dir()]
    for path in paths:
        if path.relative_to(folder).as_posix() not in files:
            path.unlink()


def _describe_model(job: Job, output: Output, folder: Path) -> None:
    """Put a chat template and a card into a model's folder, and a configuration for VLMEvalKit beside it."""
    backbone, run, base = job.context.backbone, job.context.run, job.context.plan.base
    template = job.wording.template
    kept = [] if template is None else put_template(template.text, folder)
    card = model_card(
        job.description,
        title="-".join(filter(None, [run.folder.name, output.folder])),
        loading=backbone.loading,
        merged=len(output.merged),
        tensors=sum(map(len, output.files.values())),
        is_mirror=output.is_mirror,
        keeps_others=job.word_tables is None,
        about=" ".join(
            filter(None, [output.about, aligning.for_card(run), automatic.for_card(run), stable.for_card(run)])
        ),
        asking=job.wording.card(kept),
        task="image-text-to-text" if backbone.takes_images else "text-generation",
        command=command_of(job.description, changed_options(job.description, job.resolved)),
    )
    write_atomically(folder / CARD, card.encode())
    evaluation = backbone.evaluation_of(base.model_type)
    if evaluation.vlmeval:
        family = "" if run.folder.name.startswith(backbone.name) else backbone.name
        name = "-".join(filter(None, [family, run.folder.name, output.folder]))
        final = (run.model / output.folder).resolve()
        write_atomically(run.evaluation(output.folder), vlmeval_config(evaluation, name, final))
