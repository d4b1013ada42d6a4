"""Compare models with the experts on calibration questions: what is compared, with what, and the table."""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from expert_merging.asking import check_given
from expert_merging.backbone import Backbone
from expert_merging.catalogue import find_method
from expert_merging.checkpoints.sources import locate, locate_all
from expert_merging.console import Terminal, say, table_of_numbers
from expert_merging.documents import resolved
from expert_merging.errors import InputError
from expert_merging.families import load_family as load_family
from expert_merging.flags import Count
from expert_merging.libraries import import_transformers
from expert_merging.run import Run
from expert_merging.writing import check_file, write_atomically

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from expert_merging.plan import Plan
    from expert_merging.questions.calibration import Sample
    from expert_merging.running.scores import ByTask


@dataclass(frozen=True, kw_only=True)
class AlignOptions:
    """Options of ``python -m expert_merging align``.

    Args:
        family: model family, as its folder is called; by default that of the runs.
        base_model_path: base model, a folder or a repository on the Hub; by default that of the runs.
        expert: an expert, NAME=PATH, a folder or a repository; repeat for each. By default those of the runs.
        data_dir: folder with one file per task, TASK.json; by default the calibration folder of the runs. What they
            learned from is left out.
        task_expert: expert by task (TASK=EXPERT), for task files that are not called like their expert.
        samples: questions per task.
        loss_tokens: look at the tokens that predict the response, or at all.
        max_new_tokens: bound on the length of the responses that experts write where the files have none.
        prompt_template: text with {question} in it, for all or by expert or task; by default that of the runs, else
            each expert is asked in its own words.
        device: where to compute; auto takes the first GPU if there is one.
        json: file to write the numbers to.
    """

    family: str | None = None
    base_model_path: str | None = None
    expert: dict[str, str] | None = None
    data_dir: str | None = None
    task_expert: dict[str, str] | None = None
    samples: Count = 32
    loss_tokens: Literal["response", "all"] = "response"
    max_new_tokens: Count = 128
    prompt_template: dict[str, str] | str | None = None
    device: str = "auto"
    json: str | None = None


@dataclass(frozen=True)
class Compared:
    """One model to compare.

    Args:
        label: its row in the table.
        folder: where the model is.
        record: ``config.json`` of its run; None for a model that no run has made.
        run: the run; None for a model that no run has made.
    """

    label: str
    folder: Path
    record: Mapping[str, Any] | None
    run: Run | None = None


def compare(models: Sequence[Path], options: AlignOptions, console: Console) -> None:
    """Measure the models, print the table and write the numbers.

    Args:
        models: runs or folders of models.
        options: the command's options.
        console: where the table goes.

    Raises:
        InputError: something that is needed is neither given nor in a run's record, or cannot be used.
    """
    if options.json is not None:
        check_file(Path(options.json), "--json")
    compared = find_models(models)
    backbone, base, experts = _sources(compared, options)
    learned = [model.record["options"] for model in compared if model.record and _has_read_samples(model.record)]
    found, samples = _measure(compared, learned, backbone, base, experts, options)
    from expert_merging.comparing.align import relative

    shares = relative(found)
    console.print(_table(shares), soft_wrap=False)  # which would cut names instead of folding them
    if not _has_hidden(shares):
        say(console, f"hidden states are not compared: {_why_not_hidden(compared)}")
    counts = Counter(sample.task for sample in samples)
    say(console, f"on {', '.join(f'{count} questions of {task}' for task, count in sorted(counts.items()))}")
    if options.json is not None:
        result = {
            "base": str(base),
            "experts": {name: str(folder) for name, folder in experts.items()},
            "questions": dict(counts),
            "models": {
                model.label: {
                    "folder": str(model.folder),
                    "relative": shares[model.label],
                    "absolute": found[model.label],
                }
                for model in compared
            },
        }
        write_atomically(Path(options.json), (json.dumps(result, indent=2) + "\n").encode())


def find_models(models: Sequence[Path], *, weights: bool = True) -> list[Compared]:
    """The models of runs and folders, each with a label of its own.

    Args:
        models: runs or folders.
        weights: a run's must still be there.

    Raises:
        InputError: there is no model in a folder, or scores of a run that cannot be read.
    """
    found = []
    for path in models:
        run = Run.found_at(path) or (None if weights else _recorded(path))
        folder = locate(path) if run is None else run.model
        if (weights or run is None) and not any(folder.glob("*.safetensors")):
            raise InputError(f"{path} holds no model: no .safetensors file is there or in its folder model")
        record = None if run is None else run.merged_from()
        if record is not None and _has_read_samples(record) and not _says_what_it_read(record["options"]):
            raise InputError(f"{path} has a config.json that does not say which samples it has read; was it edited?")
        label = resolved(path).name if run is None else f"{run.method}/{run.name}"
        found.append(Compared(label, folder, record, run))
    repeated = Counter(model.label for model in found)
    return [
        replace(model, label=str(path)) if repeated[model.label] > 1 or model.label == "base" else model
        for path, model in zip(models, found, strict=True)
    ]


def _recorded(folder: Path) -> Run | None:
    """The run of a folder, complete or not."""
    run = Run(resolved(folder))
    return run if run.record is not None else None


def _has_read_samples(record: Mapping[str, Any]) -> bool:
    """Whether the method of a run, or one of its modifiers, has run models on calibration samples."""
    steps = [record["method"], *(record["options"].get("post") or [])]
    return any(find_method(name).reads_samples_with(record["options"]) for name in steps)


def _says_what_it_read(options: Mapping[str, Any]) -> bool:
    experts, counts = (options.get(name) or {} for name in ("task_expert", "samples_per_task_dict"))
    return (
        isinstance(options.get("data_dir"), str)
        and isinstance(experts, Mapping)
        and all(isinstance(expert, str) for expert in experts.values())
        and isinstance(counts, Mapping)
        and all(isinstance(count, int) for count in (options.get("samples_per_task"), *counts.values()))
        and _is_template(options.get("prompt_template"))
    )


def _is_template(value: object) -> bool:
    """Whether it is what ``--prompt_template`` takes: a text, or texts by name."""
    texts = value.values() if isinstance(value, Mapping) else [value]
    return value is None or all(isinstance(text, str) for text in texts)


def _sources(compared: Sequence[Compared], options: AlignOptions) -> tuple[Backbone, Path, dict[str, Path]]:
    """Family, base and experts, from the options or from what all runs say."""
    family = options.family or _agreed(compared, "--family", lambda record: record["family"])
    base = options.base_model_path or _agreed(
        compared, "--base_model_path", lambda record: record["options"]["base_model_path"]
    )
    experts = options.expert or _agreed(compared, "--expert", lambda record: record["options"]["expert"])
    return load_family(family), *locate_all(Path(base), {name: Path(folder) for name, folder in experts.items()})


def _agreed(compared: Sequence[Compared], flag: str, read: Any) -> Any:
    """What the runs say, which must be the same for all of them."""
    said = [read(model.record) for model in compared if model.record is not None]
    if not said:
        raise InputError(f"none of these models was made by a run that says what it was made of; give {flag}")
    other = next((value for value in said if value != said[0]), None)
    if other is not None:
        raise InputError(
            f"these models were made of different things ({said[0]} and {other}), so they cannot be compared; compare "
            f"them one by one, or give {flag}"
        )
    return said[0]


def _measure(
    compared: Sequence[Compared],
    learned: Sequence[Mapping[str, Any]],
    backbone: Backbone,
    base: Path,
    experts: Mapping[str, Path],
    options: AlignOptions,
) -> tuple[dict[str, ByTask], list[Sample]]:
    """Distances by model and task, and the questions that they were measured on.

    Args:
        compared: the models.
        learned: options of the runs that learned from calibration files.
        backbone: the model family.
        base: folder of the base.
        experts: folders of the experts.
        options: the command's options.
    """
    import torch

    from expert_merging.comparing.align import measure, middle_layer
    from expert_merging.machine import limit_threads
    from expert_merging.plan import make_plan
    from expert_merging.processes import choose_device
    from expert_merging.running.batches import fitting_tokens
    from expert_merging.running.targets import TargetMaker

    device = torch.device(choose_device(options.device))
    limit_threads()
    plan = make_plan(base, experts, list(backbone.exclude_params), backbone.file_name, backbone.landmark)
    plan.refuse_contained(*plan.experts)
    samples = _choose_samples(learned, plan, backbone, options)
    problems = check_given(options.prompt_template, plan.experts, {sample.task for sample in samples})
    if problems:
        raise InputError(*problems)
    first = learned[0] if learned else {}
    backbone = backbone.configured({name: first[name] for name in backbone.options if name in first})
    backbone = backbone.beside(base)
    import_transformers()
    dtype = torch.float32 if device.type == "cpu" else plan.base.entries[plan.merged[0]].torch_dtype
    terminal = Terminal()
    try:
        with tempfile.TemporaryDirectory() as folder:
            maker = TargetMaker(
                backbone=backbone,
                plan=plan,
                layers=() if any(map(_is_aligned, compared)) else middle_layer(plan),
                response_only=options.loss_tokens == "response",
                max_new_tokens=options.max_new_tokens,
                prompt_template=options.prompt_template or first.get("prompt_template"),
                responses=Run(Path(folder)).responses,
                device=device,
                dtype=dtype,
                batch_tokens=fitting_tokens(plan.base.config, dtype.itemsize, device),
                progress=terminal.progress,
                kept=_targets(compared),
            )
            return measure(maker, samples, {model.label: model.folder for model in compared}), samples
    finally:
        terminal.close()


def _is_aligned(model: Compared) -> bool:
    """Whether a run has put its experts' units in another order, in which their own hidden states are not."""
    return bool(model.record and model.record["options"].get("align_experts"))


def _targets(compared: Sequence[Compared]) -> Path | None:
    """Where the runs keep what their experts say; None where none is in the output folder that it was made in."""
    for model in compared:
        if model.run is not None and model.record is not None:
            made_in = (model.record.get("run") or {}).get("output_path")
            if resolved(model.run.folder).parent.parent == Path(made_in or ""):
                return model.run.common_targets
    return None


def _choose_samples(
    learned: Sequence[Mapping[str, Any]], plan: Plan, backbone: Backbone, options: AlignOptions
) -> list[Sample]:
    """Questions of every task that no run has learned from."""
    from expert_merging.comparing.align import held_out
    from expert_merging.questions.calibration import find_tasks, load_samples

    folders = sorted({record["data_dir"] for record in learned})
    if options.data_dir is None and len(folders) != 1:
        reason = f"these runs learned from {' and '.join(folders)}" if folders else "no run says what it learned from"
        raise InputError(f"which questions? {reason}; give --data_dir")
    data_dir = resolved(options.data_dir or folders[0])
    there = [record for record in learned if Path(record["data_dir"]) == data_dir]
    task_expert = options.task_expert or next(
        (record["task_expert"] for record in there if record.get("task_expert")), {}
    )
    tasks = find_tasks(data_dir, (*plan.experts, *backbone.task_experts, *task_expert)) if data_dir.is_dir() else {}
    used = {task: max((_samples_used(record, task) for record in there), default=0) for task in tasks}
    samples = load_samples(
        data_dir,
        tuple(plan.experts),
        default_count=options.samples,
        counts={task: count + options.samples for task, count in used.items()},
        task_expert=task_expert,
        family_tasks=backbone.task_experts,
    )
    return held_out(samples, used)


def _samples_used(record: Mapping[str, Any], task: str) -> int:
    """How many samples of a task a run has learned from."""
    special = record.get("samples_per_task_dict") or {}
    count: int = special.get(task, record["samples_per_task"])
    return count


def _table(shares: Mapping[str, ByTask]) -> Table:
    """Relative distances: divergence by task and its mean, and the mean of the hidden state's where that is known."""
    from expert_merging.comparing.align import BASE, MEAN

    columns = {task: (task, "divergence") for task in shares[BASE] if task != MEAN} | {MEAN: (MEAN, "divergence")}
    if _has_hidden(shares):
        columns["hidden states"] = MEAN, "hidden"
    rows = [
        [label, *(f"{found[task][number]:.3f}" for task, number in columns.values())] for label, found in shares.items()
    ]
    return table_of_numbers("Divergence from each task's expert (0: the expert, 1: the base)", [*columns], rows)


def _has_hidden(shares: Mapping[str, ByTask]) -> bool:
    return all("hidden" in numbers for found in shares.values() for numbers in found.values())


def _why_not_hidden(compared: Sequence[Compared]) -> str:
    if aligned := [model.label for model in compared if _is_aligned(model)]:
        return f"{' and '.join(aligned)} put experts' units in another order than the experts have"
    return "the base's config.json does not say how many layers there are"
