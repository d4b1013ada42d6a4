"""Measure how many labelled questions models answer rightly."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from expert_merging.comparing.compare import Compared, find_models
from expert_merging.comparing.evaluated import Found, show, write_answers, write_scores
from expert_merging.comparing.scores_file import Scores, SetScore, add_scores, read_scores
from expert_merging.comparing.scoring import digests_of, points_by_task, set_score
from expert_merging.documents import resolved
from expert_merging.errors import InputError, Problems, about
from expert_merging.families import family_names, load_family
from expert_merging.flags import Count
from expert_merging.running.board import note_scores
from expert_merging.writing import check_file

if TYPE_CHECKING:
    from rich.console import Console

    from expert_merging.backbone import Backbone
    from expert_merging.console import Terminal
    from expert_merging.questions.labelled import Question
    from expert_merging.running.answers import Answered, Asker


@dataclass(frozen=True, kw_only=True)
class EvaluateOptions:
    """Options of ``python -m expert_merging evaluate``.

    Args:
        questions: folder with a file of labelled questions for each task, TASK.json, in the form of calibration files
            with an answer for each entry.
        samples: questions of each task, from the beginning of its file; all by default.
        match: judge written answers by what each file has (a text is matched exactly, a number is looked for), or by
            the last number in any case.
        choices: likelihood that decides between choices, of the whole choice or per byte.
        prompt_template: text with {question} in it, for all or by task; by default each run's own words for the task,
            else those that the model's folder asks for.
        max_new_tokens: bound on the length of an answer in which a number is looked for.
        family: model family of models that no run has made, as its folder is called; by default by their config.json.
        device: where to compute; auto takes the first GPU if there is one.
        json: file to write scores, intervals and tests to.
        answers: file to write every question with every model's answer to, as JSON.
    """

    questions: str | None = None
    samples: Count | None = None
    match: Literal["auto", "numbers"] = "auto"
    choices: Literal["whole", "per_byte"] = "whole"
    prompt_template: dict[str, str] | str | None = None
    max_new_tokens: Count = 256
    family: str | None = None
    device: str = "auto"
    json: str | None = None
    answers: str | None = None


@dataclass(frozen=True)
class Asked:
    """A model that is ready to be asked.

    Args:
        model: the model.
        backbone: its family, with the settings of its run.
        asker: asks it.
        dtype: type of its weights.
    """

    model: Compared
    backbone: Backbone
    asker: Asker
    dtype: Any


def evaluate(models: Sequence[Path], options: EvaluateOptions, console: Console) -> None:
    """Measure the models, print tables, and keep the scores of runs in their ``scores.json``.

    Args:
        models: runs or folders of models.
        options: the command's options.
        console: where the tables go.

    Raises:
        InputError: nothing is to be measured, or something that is needed cannot be used.
    """
    if options.questions is None:
        raise InputError("what is to be measured? Give --questions FOLDER")
    _check_files(options)
    compared = find_models(models)
    found: Found = {model.label: {} for model in compared}
    name, sets = _ask_questions(compared, options)
    for label, score in sets.items():
        found[label][name] = score
    for model in compared:
        if model.run is not None:
            add_scores(model.run.scores, Scores(found[model.label]))
            note_scores(model.run, {set_name: score.mean for set_name, score in found[model.label].items()})
    show(found, console)
    if options.json is not None:
        write_scores(Path(options.json), {model.label: model.folder for model in compared}, found)


def _check_files(options: EvaluateOptions) -> None:
    """Check that the files of results can be written, before models are asked for hours.

    Raises:
        InputError: one cannot.
    """
    problems = Problems()
    for name in ("json", "answers"):
        file = getattr(options, name)
        if file is not None:
            with problems.collecting():
                check_file(Path(file), f"--{name}")
    problems.check()


def _ask_questions(compared: Sequence[Compared], options: EvaluateOptions) -> tuple[str, dict[str, SetScore]]:
    """Name of the set of questions, and every model's scores on it."""
    from expert_merging.console import Terminal
    from expert_merging.machine import limit_threads
    from expert_merging.questions.labelled import check_tasks, load_questions

    limit_threads()
    backbones = [_family_of(model, options) for model in compared]
    experts = {task: expert for backbone in backbones for task, expert in backbone.task_experts.items()}
    folder = resolved(str(options.questions))
    questions = load_questions(folder, experts=experts, count=options.samples, numbers=options.match == "numbers")
    if isinstance(options.prompt_template, dict):
        check_tasks(options.prompt_template, questions, "prompt_template")
    asked = _ready(compared, backbones, questions, options)
    digests = digests_of(questions)
    terminal, found, answers = Terminal(), dict[str, SetScore](), dict[str, Sequence[Any]]()
    try:
        for one in asked:
            own = answers[one.model.label] = _answers(one, questions, options, terminal)
            found[one.model.label] = set_score(questions, points_by_task(questions, own), digests)
    finally:
        terminal.close()
    if options.answers is not None:
        write_answers(Path(options.answers), questions, answers)
    return folder.name, found


def _family_of(model: Compared, options: EvaluateOptions) -> Backbone:
    """The family of a model, with the settings of its run."""
    from expert_merging.checkpoints.adapter_files import is_adapter
    from expert_merging.checkpoints.folders import required_object

    if is_adapter(model.folder):
        raise InputError(f"{model.folder} is an adapter; evaluate the model that it makes, such as a merge of it alone")
    if model.record is not None:
        backbone = load_family(model.record["family"])
        given = model.record["options"]
        return backbone.configured({name: given[name] for name in backbone.options if name in given})
    if options.family is not None:
        return load_family(options.family)
    kind = required_object(model.folder / "config.json").get("model_type")
    known = [
        backbone
        for backbone in map(load_family, family_names())
        if "" in backbone.evaluation or kind in backbone.evaluation
    ]
    return next((backbone for backbone in known if kind in backbone.evaluation), known[0])


def _ready(
    compared: Sequence[Compared], backbones: Sequence[Backbone], questions: list[Question], options: EvaluateOptions
) -> list[Asked]:
    """The models with what asks them; all that can be wrong is told before the first is loaded."""
    problems, found = Problems(), list[Asked]()
    checked: set[str] = set()
    for model, backbone in zip(compared, backbones, strict=True):
        with problems.collecting(), about(model.label):
            found.append(_prepared(model, backbone, questions, options, checked))
    problems.check()
    return found


def _prepared(
    model: Compared, backbone: Backbone, questions: list[Question], options: EvaluateOptions, checked: set[str]
) -> Asked:
    """A model with what asks it; its prompts are checked unless another model has the same."""
    from expert_merging.checkpoints.checkpoint import Checkpoint
    from expert_merging.comparing.words import words_of
    from expert_merging.running.answers import Asker
    from expert_merging.running.prompts import Prompts

    if model.run is not None:
        read_scores(model.run.scores)  # which the new ones are added to
    checkpoint = Checkpoint(model.folder)
    with_picture = next((one.sample for one in questions if one.sample.images), None)
    if with_picture is not None and not backbone.takes_images:
        raise InputError(f"{with_picture.place} has a picture, and {backbone.name} is a language model")
    formats = words_of(backbone, checkpoint, model.record, options.prompt_template)
    prompts = Prompts(backbone, checkpoint, formats, keeps=False)
    key = f"{backbone.name} {formats.digest} {checkpoint.config.get('max_position_embeddings')}"
    if key not in checked:
        prompts.check([one.sample for one in questions])
        checked.add(key)
    by_length = options.choices == "per_byte"
    asker = Asker(backbone, prompts.processor, formats, max_new_tokens=options.max_new_tokens, by_length=by_length)
    dtype = next(entry.torch_dtype for entry in checkpoint.entries.values() if entry.is_float)
    return Asked(model, backbone, asker, dtype)


def _answers(asked: Asked, questions: list[Question], options: EvaluateOptions, terminal: Terminal) -> list[Answered]:
    """What a model answers; it is loaded, asked and released."""
    from expert_merging.processes import choose_device
    from expert_merging.workers import fitting_threads

    label, found = asked.model.label, list[Any]()
    model = asked.backbone.load_model(asked.model.folder, asked.dtype).to(choose_device(options.device))
    with fitting_threads(model.num_parameters()), terminal.progress(label, len(questions), "question") as advance:
        for answered in asked.asker.answer(model, questions):
            found.append(answered)
            advance(1)
    return found
