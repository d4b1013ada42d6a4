"""The first step of a run: everything that can be wrong is found before the first tensor is read."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from expert_merging import __version__
from expert_merging.asking import Wording, choose_wording
from expert_merging.backbone import Backbone
from expert_merging.catalogue import find_method
from expert_merging.checkpoints.adapter import Adapter
from expert_merging.checkpoints.other_files import other_files
from expert_merging.checkpoints.sources import locate_all
from expert_merging.checkpoints.vocabulary import check_size
from expert_merging.closed_form import check_one_per_expert
from expert_merging.console import Terminal
from expert_merging.context import Context
from expert_merging.documents import resolved as resolved_path
from expert_merging.errors import InputError, Problems
from expert_merging.machine import limit_threads
from expert_merging.merged_tokenizer import choose_word_tables, is_wanted
from expert_merging.method import Preparation, Unit, coarsest
from expert_merging.options import Resolved, checkpoint_folders, command_line
from expert_merging.outputs import Output
from expert_merging.plan import Plan, make_plan
from expert_merging.processes import choose_device, from_main_process, is_main_process, join
from expert_merging.provenance import provenance
from expert_merging.roles import ROW_PER_WORD
from expert_merging.run import Run
from expert_merging.run_names import default_folder
from expert_merging.word_tables import BASE, WordTables
from expert_merging.writing import NAME_BYTES, can_name_file, check_free_disk, check_lengths

# Options that decide where and how a run is done but not its result.
_INDIFFERENT = (
    "cache_dir",
    "output_path",
    "run_name",
    "device",
    "log_with",
    "keep_targets",
    "run_tests",
    "dry_run",
    "method",
    "push_to_hub",
)
# The same among the options of methods: they trade memory for time.
_SAVING = ("task_vectors", "weight_gradients", "shard", "gradient_checkpointing", "logits_chunk_tokens", "batch_tokens")


@dataclass(frozen=True)
class Job:
    """A run whose checks have passed.

    Args:
        resolved: the options.
        context: checkpoints, family, run folder, seed, device, processes.
        preparations: what the method, and each of its modifiers, does before merging.
        outputs: what is written.
        description: the run's ``config.json``.
        word_tables: embeddings, head and tokenizer where they are not the base's and not merged.
        wording: in whose words models are asked.
        alignment: what puts the experts' units in the base's order before all of these; None to leave them.
    """

    resolved: Resolved
    context: Context
    preparations: tuple[Preparation, ...]
    outputs: tuple[Output, ...]
    description: Mapping[str, Any]
    word_tables: WordTables | None
    wording: Wording
    alignment: Preparation | None = None

    @property
    def unit(self) -> Unit:
        """What the rule is fed."""
        return coarsest(preparation.unit for preparation in self.preparations)

    @property
    def copies(self) -> int:
        """Copies of the task vectors that the rule holds at a time: modifiers see them as they were."""
        return 1 if self.resolved.modifiers else 0

    @property
    def models(self) -> list[Path]:
        """Where the results that can be loaded are once the run is complete."""
        return [self.context.run.model / output.folder for output in self.outputs if output.is_model]


def check(resolved: Resolved, backbone: Backbone, terminal: Terminal) -> Job:
    """Check everything.

    Args:
        resolved: the options.
        backbone: the model family.
        terminal: shows progress.

    Raises:
        InputError: every problem found.
    """
    backbone = backbone.configured(resolved.family)
    plan, device, word_tables, wording = _open_checkpoints(resolved, backbone)
    backbone = backbone.beside(plan.base.folder)
    limit_threads()
    processes = join(device, runs_models=resolved.reads_samples)
    named = {name: option for step in resolved.steps for name, option in step.options.items()}
    check_one_per_expert(named, resolved.options, tuple(plan.experts))
    description = {**_describe(resolved, backbone, plan, device), "asking": wording.record}
    run = _open_run(resolved, backbone, plan, description)
    seed = description["seed"]
    if resolved.general["seed"] < 0:
        seed = description["seed"] = from_main_process(run.recorded_seed(seed))
    if from_main_process(run.would_go_on(description)):
        run = run.longer
    if resolved.general["keep_targets"]:
        run.targets = run.common_targets
    context = Context(
        plan=plan,
        backbone=backbone,
        run=run,
        seed=seed,
        device=device,
        log_with=resolved.general["log_with"],
        progress=terminal.progress,
        processes=processes,
        find_method=find_method,
        dry_run=resolved.general["dry_run"],
    )
    return _check_rest(Job(resolved, context, (), (), description, word_tables, wording))


def _open_checkpoints(resolved: Resolved, backbone: Backbone) -> tuple[Plan, str, WordTables | None, Wording]:
    problems, general = Problems(), resolved.general
    with problems.collecting():
        base, experts = checkpoint_folders(general, backbone)
        base, experts = locate_all(base, experts, dry_run=general["dry_run"])
        by_token = [ROW_PER_WORD] if is_wanted(general) else []
        excluded = [*general["exclude_params"], *by_token]
        plan = make_plan(base, experts, excluded, backbone.file_name, backbone.landmark)
        _check_sizes(plan, experts_too=resolved.reads_samples)
        chosen = (general["tokenizer"] or BASE, general["embeddings"] or BASE)
        word_tables = choose_word_tables(plan, *chosen) if by_token else None
        given, source = resolved.options.get("prompt_template"), general["chat_template_from"]
        wording = choose_wording(backbone, plan, given, source, chosen[0])
    if resolved.general["device"] != "auto" or not problems.found:  # a wrong path needs no torch to be answered
        with problems.collecting():
            device = choose_device(resolved.general["device"], one_each=resolved.reads_samples)
    problems.check()
    return plan, device, word_tables, wording


def _check_sizes(plan: Plan, *, experts_too: bool) -> None:
    """Check that models that will be loaded can be: the result, for which the base stands, and perhaps the experts.

    Raises:
        InputError: ``vocab_size`` does not fit the rows of one.
    """
    problems = Problems()
    for name, model in {"the base": plan.base, **(plan.experts if experts_too else {})}.items():
        if isinstance(model, Adapter):
            continue  # which may resize what its base's config.json tells of
        with problems.collecting():
            check_size(name if model is plan.base else f"expert {name}", model)
    problems.check()


def _describe(resolved: Resolved, backbone: Backbone, plan: Plan, device: str) -> dict[str, Any]:
    """The run's ``config.json``, but for what its preparation reads."""
    general, options = resolved.general, method_options(resolved)
    decisive = {name: value for name, value in general.items() if name not in _INDIFFERENT}
    decisive |= {
        "base_model_path": str(plan.base.folder.resolve()),
        "expert": {name: str(expert.folder.resolve()) for name, expert in plan.experts.items()},
    }
    for name in ("post", "align_experts", "tokenizer", "embeddings", "chat_template_from"):
        if decisive[name] is None:
            del decisive[name]
    adapters = [name for name, expert in plan.experts.items() if isinstance(expert, Adapter)]
    saving = {name: value for name, value in resolved.options.items() if name in _SAVING}
    return {
        "family": backbone.name,
        "method": resolved.method.name,
        "options": decisive | {name: value for name, value in options.items() if name not in _SAVING},
        "checkpoints": {name: entry.fingerprint(whole=name == "base") for name, entry in plan.checkpoints.items()},
        **({"adapters": adapters} if adapters else {}),
        "inputs": {"device": device.split(":")[0], "version": __version__},
        "written": {name: entry.opened for name, entry in plan.checkpoints.items()},
        "seed": general["seed"] if general["seed"] >= 0 else secrets.randbelow(2**31),
        "run": {name: general[name] for name in ("output_path", "run_name", "log_with")} | saving | {"device": device},
        **provenance(),
        "command": command_line(),
    }


def method_options(resolved: Resolved) -> dict[str, Any]:
    """Options that decide what the method does: its own, and the family's where samples are read."""
    return {**resolved.options, **(resolved.family if resolved.reads_samples else {})}


def _open_run(resolved: Resolved, backbone: Backbone, plan: Plan, description: Mapping[str, Any]) -> Run:
    """The run's folder, which may be there already and must not lie inside a checkpoint."""
    problems = Problems()
    parent, run_name = Path(resolved.general["output_path"]) / resolved.method.name, resolved.general["run_name"]
    if run_name is not None and not can_name_file(run_name):
        problems.add(
            f"--run_name is the name of a folder inside {parent}, at most {NAME_BYTES} bytes long, got {run_name!r}"
        )
        run_name = None
    family = backbone.evaluation_of(plan.base.model_type).run_name or backbone.name
    folder = parent / run_name if run_name else default_folder(parent, family, description, resolved, backbone)
    with problems.collecting():
        _check_output(folder, [plan.base.folder, *(expert.folder for expert in plan.experts.values())])
    problems.check()
    return Run(folder)


def _check_output(folder: Path, checkpoints: Sequence[Path]) -> None:
    place = resolved_path(folder)
    for checkpoint in checkpoints:
        if place.is_relative_to(resolved_path(checkpoint)):
            raise InputError(
                f"the run folder {folder} would lie inside the checkpoint folder {checkpoint}, which is never written "
                "to; choose another --output_path"
            )
    existing = next(parent for parent in [folder, *folder.parents] if parent.exists())
    if not os.access(existing, os.W_OK):
        raise InputError(f"{existing} cannot be written to; choose another --output_path")


def _check_rest(job: Job) -> Job:
    """The method's own checks, the folder's earlier content, and free disk; the job with what they have found."""
    resolved, context, run = job.resolved, job.context, job.context.run
    description = {**job.description, "inputs": {**job.description["inputs"]}}
    problems = Problems()
    preparations: list[Preparation] = []
    outputs: tuple[Output, ...] = ()
    with problems.collecting():
        outputs = resolved.method.outputs(context, **resolved.options_of(resolved.method))
        if job.word_tables is not None:
            outputs = _with_word_tables(job.word_tables, outputs, resolved.method.name)
            description["inputs"]["vocabulary"] = job.word_tables.digest
        run.holds_several = all(output.folder for output in outputs)  # by which preparations see what is complete
    alignment: Preparation | None = None
    if how := resolved.general["align_experts"]:
        with problems.collecting():
            from expert_merging.alignment.aligning import check_alignment  # loads torch

            alignment = check_alignment(context, how, resolved.options)
            description["inputs"] |= alignment.inputs
    for number, step in enumerate(resolved.steps):
        with problems.collecting():
            found = step.prepared(context, resolved.options_of(step))
            if found.follows and step in resolved.steps[:number]:
                raise InputError(f"--post names {step.name} twice, which keeps one result in a run; name it once")
            preparations.append(found)
    for preparation in preparations:
        description["inputs"] |= preparation.inputs
    if resolved.general["run_tests"]:
        with problems.collecting():
            _check_questions(job, outputs)
    # The main process writes to the folder while the others start, so it alone looks at it.
    if is_main_process() and not problems.found:
        with problems.collecting():
            description = run.check(description) or description
    if is_main_process() and not run.is_complete:
        with problems.collecting():
            check_lengths(run.partial_model, _names(outputs, context.plan.base.folder))
        with problems.collecting():
            check_free_disk(run.folder, _missing_bytes(run, outputs))
    problems.check()
    return replace(job, preparations=tuple(preparations), outputs=outputs, description=description, alignment=alignment)


def _with_word_tables(word_tables: WordTables, outputs: Sequence[Output], method: str) -> tuple[Output, ...]:
    """The outputs with other embeddings, head and tokenizer than the base's.

    Raises:
        InputError: something beside the models goes by the base's.
    """
    if not all(output.is_model for output in outputs):
        raise InputError(
            f"--tokenizer and --embeddings cannot be used with {method}, whose files beside the model go by the base's "
            "embeddings"
        )
    return tuple(map(word_tables.applied, outputs))


def _check_questions(job: Job, outputs: Sequence[Output]) -> None:
    """Check that the merged model can be loaded and asked, for which it needs what its base needs.

    Raises:
        InputError: it cannot, or there is none.
    """
    if outputs and not any(output.is_model for output in outputs):
        raise InputError("--run_tests asks a merged model, and this run writes none; leave it out")
    backbone, base = job.context.backbone, job.context.plan.base.folder
    job.context.plan.refuse_contained()
    backbone.parameter_names(base)
    processor = backbone.load_processor(base)
    for sample in backbone.test_questions:
        backbone.encode_prompt(processor, sample, job.wording.of_merged.of(sample))


def _names(outputs: Sequence[Output], base: Path) -> Iterator[Path]:
    """The files that are written, relative to the result."""
    for output in outputs:
        for name in (*output.files, *(other_files(base) if output.is_model else ())):
            yield Path(output.folder) / name


def _missing_bytes(run: Run, outputs: Sequence[Output]) -> int:
    """Bytes of the outputs that an earlier part of the run has not written."""
    files = {
        run.partial_model / output.folder / file: output.file_size(file) for output in outputs for file in output.files
    }
    return sum(size - (file.stat().st_size if file.exists() else 0) for file, size in files.items())
