"""Measure how many questions models answer rightly, and how well they predict texts; and what others have measured."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from expert_merging.comparing.columns import BENCHMARKS, NO_SHARE, Measured, joined
from expert_merging.comparing.compare import Compared, find_models
from expert_merging.comparing.evaluated import Found, show, write_answers, write_scores
from expert_merging.comparing.imported import read_folder
from expert_merging.comparing.scores_file import Scores, SetScore, add_scores, read_scores
from expert_merging.comparing.scoring import digests_of, points_by_task, set_score
from expert_merging.console import say
from expert_merging.documents import resolved
from expert_merging.errors import InputError, Problems, about, first_of
from expert_merging.flags import Count, CountOrNone
from expert_merging.running.board import note_scores
from expert_merging.writing import check_file

if TYPE_CHECKING:
    from rich.console import Console

    from expert_merging.comparing.asked import Asked
    from expert_merging.comparing.harness import Tasks
    from expert_merging.comparing.texts import Text
    from expert_merging.console import Terminal
    from expert_merging.questions.labelled import Question
    from expert_merging.running.answers import Answered


@dataclass(frozen=True, kw_only=True)
class EvaluateOptions:
    """Options of ``python -m expert_merging evaluate``.

    Args:
        questions: folder with a file of labelled questions for each task, TASK.json, in the form of calibration files
            with an answer for each entry.
        texts: folder with texts (.txt, .md) that models predict, in bits per byte: what was not to be unlearned.
        tasks: public benchmarks, tasks of lm-evaluation-harness, with commas between them.
        tasks_dir: folder with files of further tasks for the harness, in its form.
        num_fewshot: examples before each question of the harness's tasks; by default what each task says.
        metric: metric, or filter of answers, that is the score where a task of a harness has it; by default the first.
        batch_size: questions of the harness's tasks that go through a model together.
        confirm_run_unsafe_code: run code that models write, which tasks such as humaneval do.
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
    texts: str | None = None
    tasks: str | None = None
    tasks_dir: str | None = None
    num_fewshot: CountOrNone | None = None
    metric: str | None = None
    batch_size: Count = 8
    confirm_run_unsafe_code: bool = False
    samples: Count | None = None
    match: Literal["auto", "numbers"] = "auto"
    choices: Literal["whole", "per_byte"] = "whole"
    prompt_template: dict[str, str] | str | None = None
    max_new_tokens: Count = 256
    family: str | None = None
    device: str = "auto"
    json: str | None = None
    answers: str | None = None


def evaluate(models: Sequence[Path], options: EvaluateOptions, console: Console, imported: Sequence[Path] = ()) -> None:
    """Measure the models, print tables, and keep the scores of runs in their ``scores.json``.

    Args:
        models: runs or folders of models.
        options: the command's options.
        console: where the tables go.
        imported: folders in which other toolkits have written results of the model, which is only one then.

    Raises:
        InputError: nothing is to be measured, or something that is needed cannot be used.
    """
    _check(models, options, imported)
    asks = any(given is not None for given in (options.questions, options.texts, options.tasks))
    compared = find_models(models, weights=asks)
    earlier = _earlier(compared)
    public = {model.label: Measured() for model in compared}
    for folder in imported:
        public[compared[0].label].add(read_folder(folder, options.metric))
    tasks = None if options.tasks is None else _load_tasks(compared, options)
    texts = None if options.texts is None else _load_texts(compared, options)
    found: Found = {model.label: {} for model in compared}
    for name, sets in (
        *([] if options.questions is None else [_ask_questions(compared, options)]),
        *([] if texts is None else [_predict_texts(texts, options)]),
    ):
        for label, score in sets.items():
            found[label][name] = score
    for model, measured in () if tasks is None else _ask_tasks(tasks, options):
        public[model.label].add(measured)
        if model.run is not None:  # hours may follow
            add_scores(model.run.scores, Scores(_benchmarks(earlier, model.label, public)))
    for model in compared:
        found[model.label] |= _benchmarks(earlier, model.label, public)
    _tell(compared, found, public, options, console)


def _benchmarks(earlier: Mapping[str, Scores], label: str, public: Mapping[str, Measured]) -> dict[str, SetScore]:
    """A model's set of public benchmarks, if any was measured."""
    new = public[label].tasks
    return {BENCHMARKS: joined(earlier[label].sets.get(BENCHMARKS), new)} if new else {}


def _tell(
    compared: Sequence[Compared],
    found: Found,
    public: Mapping[str, Measured],
    options: EvaluateOptions,
    console: Console,
) -> None:
    """Keep scores and show them."""
    for model in compared:
        if model.run is not None:
            kept = add_scores(model.run.scores, Scores(found[model.label]))
            sets = read_scores(model.run.scores).sets
            note_scores(model.run, {name: sets[name].mean for name in found[model.label]})
            for name, tasks in kept.items():
                say(console, f"{model.label} keeps its scores on more questions of {name}: {', '.join(tasks)}")
    show(found, console)
    for label, measured in public.items():
        if measured.left_out:
            say(console, f"{label}: not among the scores, as {NO_SHARE}: {first_of(measured.left_out, 10)}")
    if options.json is not None:
        write_scores(Path(options.json), {model.label: model.folder for model in compared}, found)


def _check(models: Sequence[Path], options: EvaluateOptions, imported: Sequence[Path]) -> None:
    """Check what was given, and that the files of results can be written, before models are asked for hours.

    Raises:
        InputError: all that is wrong.
    """
    problems = Problems()
    if options.questions is None and options.texts is None and options.tasks is None and not imported:
        problems.add(
            "what is to be measured? Give --questions FOLDER, --texts FOLDER, --tasks NAMES or --import FOLDER"
        )
    if imported and len(models) > 1:
        problems.add(f"--import has the results of one model; give it one run, got {len(models)}")
    if options.answers is not None and options.questions is None:
        problems.add("--answers is for the answers to --questions; give such a folder")
    if options.texts is not None and resolved(options.texts).name in (_set_name(options.questions), BENCHMARKS):
        problems.add(f"--texts {options.texts}: scores are kept by the folder's name, which is taken; rename it")
    for name in ("json", "answers"):
        file = getattr(options, name)
        if file is not None:
            with problems.collecting():
                check_file(Path(file), f"--{name}")
    problems.check()


def _set_name(folder: str | None) -> str | None:
    """The name by which the scores on a folder's questions are kept."""
    return None if folder is None else resolved(folder).name


def _earlier(compared: Sequence[Compared]) -> dict[str, Scores]:
    """What has been measured of the models before, by label.

    Raises:
        InputError: scores that new ones are to be added to cannot be read.
    """
    problems, found = Problems(), {}
    for model in compared:
        with problems.collecting(), about(model.label):
            found[model.label] = Scores() if model.run is None else read_scores(model.run.scores)
    problems.check()
    return found


def _ask_questions(compared: Sequence[Compared], options: EvaluateOptions) -> tuple[str, dict[str, SetScore]]:
    """Name of the set of questions, and every model's scores on it."""
    from expert_merging.comparing.asked import family_of, ready
    from expert_merging.console import Terminal
    from expert_merging.machine import limit_threads
    from expert_merging.questions.labelled import check_tasks, load_questions

    limit_threads()
    backbones = [family_of(model, options.family) for model in compared]
    experts = {task: expert for backbone in backbones for task, expert in backbone.task_experts.items()}
    folder = resolved(str(options.questions))
    if folder.name == BENCHMARKS:
        raise InputError(f"--questions {folder}: scores on public benchmarks are kept as {BENCHMARKS}; rename it")
    questions = load_questions(folder, experts=experts, count=options.samples, numbers=options.match == "numbers")
    if isinstance(options.prompt_template, dict):
        check_tasks(
            options.prompt_template,
            {question.task for question in questions} | {*_names_of(options)},
            "prompt_template",
        )
    asked = ready(compared, backbones, options.prompt_template, questions)
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


def _load_texts(compared: Sequence[Compared], options: EvaluateOptions) -> tuple[list[Text], list[Asked]]:
    """The texts and the models that are to predict them; all that can be wrong is told here."""
    from expert_merging.comparing.asked import family_of, ready
    from expert_merging.comparing.texts import load_texts, token_before
    from expert_merging.machine import limit_threads

    limit_threads()
    texts = load_texts(resolved(str(options.texts)))
    asked = ready(compared, [family_of(model, options.family) for model in compared], None)
    problems = Problems()
    for one in asked:
        with problems.collecting():
            token_before(one)
    problems.check()
    return texts, asked


def _predict_texts(ready: tuple[list[Text], list[Asked]], options: EvaluateOptions) -> tuple[str, dict[str, SetScore]]:
    """Name of the set of texts, and how well every model predicts them."""
    from expert_merging.comparing.asked import loaded
    from expert_merging.comparing.texts import predict
    from expert_merging.console import Terminal

    texts, asked = ready
    terminal, found = Terminal(), dict[str, SetScore]()
    try:
        for one in asked:
            label = one.model.label
            with loaded(one, options.device) as model, terminal.progress(label, len(texts), "text") as advance:
                found[label] = predict(one, model, texts, advance)
    finally:
        terminal.close()
    return resolved(str(options.texts)).name, found


def _answers(asked: Asked, questions: list[Question], options: EvaluateOptions, terminal: Terminal) -> list[Answered]:
    """What a model answers; it is loaded, asked and released."""
    from expert_merging.comparing.asked import loaded
    from expert_merging.running.answers import Asker

    label, found = asked.model.label, list[Any]()
    asker = Asker(
        asked.backbone,
        asked.processor,
        asked.formats,
        max_new_tokens=options.max_new_tokens,
        by_length=options.choices == "per_byte",
    )
    with loaded(asked, options.device) as model, terminal.progress(label, len(questions), "question") as advance:
        for answered in asker.answer(model, questions):
            found.append(answered)
            advance(1)
    return found


def _names_of(options: EvaluateOptions) -> list[str]:
    """The names of the harness's tasks."""
    return [name.strip() for name in (options.tasks or "").split(",") if name.strip()]


def _load_tasks(compared: Sequence[Compared], options: EvaluateOptions) -> tuple[Tasks, list[Asked]]:
    """The harness's tasks and the models that they are for; all that can be wrong is told here."""
    from expert_merging.comparing.asked import family_of, ready
    from expert_merging.comparing.harness import load_tasks
    from expert_merging.machine import limit_threads
    from expert_merging.questions.labelled import check_tasks

    limit_threads()
    backbones = [family_of(model, options.family) for model in compared]
    names = _names_of(options)
    if isinstance(options.prompt_template, dict) and options.questions is None:
        check_tasks(options.prompt_template, names, "prompt_template")
    for backbone in backbones:
        if backbone.takes_images:
            raise InputError(
                f"--tasks are for language models; measure {backbone.name} with VLMEvalKit or lmms-eval and "
                "give --import"
            )
    folder = None if options.tasks_dir is None else resolved(options.tasks_dir)
    tasks = load_tasks(names, folder, shots=options.num_fewshot, runs_code=options.confirm_run_unsafe_code)
    tasks.check_metric(options.metric)
    asked, problems = ready(compared, backbones, options.prompt_template), Problems()
    for one in asked:
        with problems.collecting(), about(one.model.label):
            tasks.check_context(one.longest)
    problems.check()
    return tasks, asked


def _ask_tasks(ready: tuple[Tasks, list[Asked]], options: EvaluateOptions) -> Iterator[tuple[Compared, Measured]]:
    """What each model reaches on each of the harness's tasks."""
    from expert_merging.comparing.asked import loaded
    from expert_merging.running.prompts import tokenizer_of

    tasks, asked = ready
    how: dict[str, Any] = {"count": options.samples, "batch": options.batch_size, "metric": options.metric}
    for one in asked:
        with loaded(one, options.device) as model:
            for measured in tasks.measure(model, tokenizer_of(one.processor), one.formats, **how):
                yield one.model, measured
