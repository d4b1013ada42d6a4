"""Measure how many questions models answer rightly: own labelled files, public tasks, other tools' results."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from expert_merging.comparing.compare import Compared, find_models
from expert_merging.comparing.intervals import Paired, compare_paired, interval
from expert_merging.comparing.scores_file import Scores, SetScore, TaskScore, add_scores, as_json
from expert_merging.documents import resolved
from expert_merging.errors import InputError, Problems, about, one_line
from expert_merging.families import family_names, load_family
from expert_merging.flags import Count
from expert_merging.running.board import note_scores

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from expert_merging.backbone import Backbone
    from expert_merging.console import Terminal
    from expert_merging.questions.labelled import Question
    from expert_merging.running.answers import Answered, Asker

# A model's scores by set, for each model by its label.
Found = dict[str, dict[str, SetScore]]


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
    compared = find_models(models)
    found: Found = {model.label: {} for model in compared}
    name, sets = _ask_questions(compared, options)
    for label, score in sets.items():
        found[label][name] = score
    for model in compared:
        if model.run is not None:
            add_scores(model.run.scores, Scores(found[model.label]))
            note_scores(model.run, {set_name: score.mean for set_name, score in found[model.label].items()})
    _show(found, console)
    if options.json is not None:
        _write_json(Path(options.json), compared, found)


def _ask_questions(compared: Sequence[Compared], options: EvaluateOptions) -> tuple[str, dict[str, SetScore]]:
    """Name of the set of questions, and every model's scores on it."""
    from expert_merging.console import Terminal
    from expert_merging.machine import limit_threads
    from expert_merging.questions.labelled import by_task, check_tasks, digest_of, load_questions

    limit_threads()
    backbones = [_family_of(model, options) for model in compared]
    experts = {task: expert for backbone in backbones for task, expert in backbone.task_experts.items()}
    folder = resolved(str(options.questions))
    questions = load_questions(folder, experts=experts, count=options.samples, numbers=options.match == "numbers")
    if isinstance(options.prompt_template, dict):
        check_tasks(options.prompt_template, questions, "prompt_template")
    asked = _ready(compared, backbones, questions, options)
    digests = {task: digest_of(own) for task, own in by_task(questions).items()}
    terminal, found, answers = Terminal(), dict[str, SetScore](), dict[str, Sequence[Any]]()
    try:
        for one in asked:
            answers[one.model.label] = _answers(one, questions, options, terminal)
            found[one.model.label] = _score(questions, answers[one.model.label], digests)
    finally:
        terminal.close()
    if options.answers is not None:
        _write_answers(Path(options.answers), questions, answers)
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


def _score(questions: list[Question], answers: Sequence[Answered], digests: Mapping[str, str]) -> SetScore:
    """What a model reaches on all tasks, in percent."""
    points: dict[str, list[float]] = {}
    for question, answer in zip(questions, answers, strict=True):
        points.setdefault(question.task, []).append(answer.points)
    kinds = {question.kind for question in questions}
    tasks = {task: task_score(own, digests[task]) for task, own in points.items()}
    return SetScore(tasks, kinds.pop() if len(kinds) == 1 else "accuracy")


def task_score(points: Sequence[float], questions: str = "") -> TaskScore:
    """A task's score in percent with its interval.

    Args:
        points: of each question, in [0, 1].
        questions: digest of the questions.
    """
    low, high = interval(points)
    return TaskScore(100 * sum(points) / len(points), 100 * low, 100 * high, len(points), tuple(points), questions)


def paired(found: Found, name: str) -> dict[tuple[str, str], Paired]:
    """Every two models on the questions of a set, where both have answered the same ones."""
    having = {label: sets[name] for label, sets in found.items() if name in sets}
    result = {}
    for (first, one), (second, other) in itertools.combinations(having.items(), 2):
        points = [_points_of(score) for score in (one, other)]
        if points[0] and _questions_of(one) == _questions_of(other):
            result[first, second] = compare_paired(*points)
    return result


def _points_of(score: SetScore) -> list[float]:
    return [point for task in sorted(score.tasks) for point in score.tasks[task].correct]


def _questions_of(score: SetScore) -> list[tuple[str, str, int]]:
    return sorted((name, task.questions, len(task.correct)) for name, task in score.tasks.items())


def _show(found: Found, console: Console) -> None:
    """A table for each set, and which differences are more than chance."""
    from expert_merging.console import say

    for name in dict.fromkeys(name for sets in found.values() for name in sets):
        having = {label: sets[name] for label, sets in found.items() if name in sets}
        console.print(_table(name, having), soft_wrap=False)  # which would cut names instead of folding them
        best = max(having, key=lambda label: having[label].mean)
        for other in having:
            pair = paired({label: found[label] for label in (best, other)}, name).get((best, other))
            if pair is not None:
                say(console, _in_words(best, other, pair))


def _in_words(best: str, other: str, pair: Paired) -> str:
    """What the test says of the best model and another one."""
    p = "p < 0.001" if pair.p < 0.001 else f"p = {pair.p:.3f}"
    return (
        f"{best} is right where {other} is wrong on {pair.first_only} of {pair.count} questions, and wrong where it is "
        f"right on {pair.second_only}: {p} (McNemar's exact test)"
    )


def _table(name: str, scores: Mapping[str, SetScore]) -> Table:
    """Means and intervals, a row for each model."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    metric = next(iter(scores.values())).metric.replace("_", " ")
    result = Table(title=f"{one_line(name)}: {metric} in %, with 95 % intervals", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    result.add_column("", overflow="fold")
    tasks = list(dict.fromkeys(task for score in scores.values() for task in score.tasks))
    for column in (*tasks, "mean"):
        result.add_column(Text(one_line(column)), justify="right")
    for label, score in scores.items():
        cells = [_cell(score.tasks.get(task)) for task in tasks]
        result.add_row(Text(one_line(label)), *cells, _cell(mean_score(score)))
    return result


def mean_score(score: SetScore) -> TaskScore:
    """A set's mean, with its interval where every task has points and the set has no rule of its own."""
    points = [task.correct for task in score.tasks.values()]
    plain = sum(task.mean for task in score.tasks.values()) / max(1, len(score.tasks))
    if not points or not all(points) or abs(plain - score.mean) > 1e-6:
        return TaskScore(score.mean)
    low, high = interval(*points)
    return TaskScore(score.mean, 100 * low, 100 * high)


def _cell(score: TaskScore | None) -> str:
    if score is None:
        return ""
    bounds = "" if score.low is None or score.high is None else f"\n{score.low:.1f} to {score.high:.1f}"
    return f"{score.mean:.1f}{bounds}"


def _write_json(file: Path, compared: Sequence[Compared], found: Found) -> None:
    """Scores of all models, and the tests between every two."""
    names = dict.fromkeys(name for sets in found.values() for name in sets)
    content = {
        "models": {
            model.label: {"folder": str(model.folder), **as_json(Scores(found[model.label]))} for model in compared
        },
        "paired": {
            name: [
                {"first": first, "second": second, **vars(pair)}
                for (first, second), pair in paired(found, name).items()
            ]
            for name in names
        },
    }
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _write_answers(file: Path, questions: list[Question], answers: Mapping[str, Sequence[Answered]]) -> None:
    """Every question with what is right and what each model has answered."""
    content = [
        {
            "task": question.task,
            "question": question.sample.question,
            **({"pictures": list(map(str, question.sample.images))} if question.sample.images else {}),
            "right": list(question.answers),
            "answers": {
                label: {"text": own[number].text, "points": own[number].points} for label, own in answers.items()
            },
        }
        for number, question in enumerate(questions)
    ]
    file.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
