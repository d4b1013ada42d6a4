"""Ask experts questions, each those whose perplexity speaks for them, and tell who has answered what."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from expert_merging.comparing.scoring import digests_of
from expert_merging.console import say
from expert_merging.documents import resolved
from expert_merging.errors import Problems, near_name
from expert_merging.flags import Count, Positive
from expert_merging.writing import check_file

if TYPE_CHECKING:
    from rich.console import Console

    from expert_merging.console import Terminal
    from expert_merging.questions.labelled import Question
    from expert_merging.routing.record import Record
    from expert_merging.routing.router import PerplexityRouter

# Questions between which perplexities are kept.
_KEPT = 64


@dataclass(frozen=True, kw_only=True)
class RouteOptions:
    """Options of ``python -m expert_merging route``.

    Args:
        expert: an expert, NAME=PATH, a folder or a repository on the Hub; repeat for each.
        questions: folder with a file of questions for each task, TASK.json, in the form of calibration files; answers
            in them are compared with those of the experts.
        answers: file to write every question to, with its perplexity under each expert, who has answered it and the
            answer, as JSON. The same command goes on with what it has.
        experts_per_question: how many experts answer a question; several choose each token together.
        temperature: what 1 / perplexity is divided by before the softmax that makes weights of it; the lower, the more
            the best of several experts counts.
        samples: questions of each task, from the beginning of its file; all by default.
        match: judge written answers by what each file has (a text is matched exactly, a number is looked for), or by
            the last number in any case.
        choices: likelihood that decides between choices, of the whole choice or per byte.
        prompt_template: text with {question} in it, for all or by expert; by default each expert's own words.
        max_new_tokens: bound on the length of an answer in which a number is looked for, or that nothing is known of.
        family: model family of the experts, as its folder is called; by default by their config.json.
        device: where to compute; auto takes the first GPU if there is one.
    """

    expert: dict[str, str] | None = None
    questions: str | None = None
    answers: str | None = None
    experts_per_question: Count = 1
    temperature: Positive = 1.0
    samples: Count | None = None
    match: Literal["auto", "numbers"] = "auto"
    choices: Literal["whole", "per_byte"] = "whole"
    prompt_template: dict[str, str] | str | None = None
    max_new_tokens: Count = 256
    family: str | None = None
    device: str = "auto"


def route(options: RouteOptions, console: Console) -> None:
    """Answer the questions, keep the answers and print who has answered what.

    Args:
        options: the command's options.
        console: where the tables go.

    Raises:
        InputError: something that is needed is not given or cannot be used.
    """
    from expert_merging.console import Terminal
    from expert_merging.machine import limit_threads
    from expert_merging.questions.labelled import load_questions
    from expert_merging.routing.record import Record
    from expert_merging.routing.router import PerplexityRouter
    from expert_merging.routing.telling import tell

    experts, file = _check(options)
    limit_threads()
    questions = load_questions(
        resolved(str(options.questions)),
        count=options.samples,
        numbers=options.match == "numbers",
        without_answers=True,
    )
    router = PerplexityRouter.of(
        experts,
        questions,
        words=options.prompt_template,
        family=options.family,
        per_question=options.experts_per_question,
        temperature=options.temperature,
        device=options.device,
        max_new_tokens=options.max_new_tokens,
        by_length=options.choices == "per_byte",
    )
    record = Record(file, _settings(router, questions), questions)
    for line in _plan(router):
        say(console, line)
    terminal = Terminal()
    try:
        _work(router, questions, record, terminal)
    finally:
        terminal.close()
    tell(record, console)


def _check(options: RouteOptions) -> tuple[dict[str, Path], Path]:
    """Folders of the experts, and the file of answers.

    Raises:
        InputError: all that is missing, or cannot be used.
    """
    problems, experts = Problems(), {name: Path(path) for name, path in (options.expert or {}).items()}
    if not options.expert:
        problems.add("which experts? Give --expert NAME=PATH for each")
    for flag, what in (("questions", "FOLDER"), ("answers", "FILE")):
        if getattr(options, flag) is None:
            problems.add(f"--{flag} {what} is needed")
    if options.answers is not None:
        with problems.collecting():
            check_file(Path(options.answers), "--answers")
    words = options.prompt_template
    for name in words if isinstance(words, Mapping) else ():
        if name not in experts:
            problems.add(f"--prompt_template names the expert {name!r}. {near_name(name, [*experts])}")
    problems.check()
    return experts, resolved(str(options.answers))


def _settings(router: PerplexityRouter, questions: Sequence[Question]) -> dict[str, Any]:
    """All that decides answers, for their file."""
    from expert_merging.checkpoints.checkpoint import Checkpoint
    from expert_merging.processes import choose_device

    return {
        "experts": {
            name: [Checkpoint(one.model.folder).fingerprint(whole=True), one.formats.digest, str(one.dtype)]
            for name, one in router.experts.items()
        },
        "questions": digests_of(questions),
        "experts_per_question": router.per_question,
        "temperature": router.temperature,
        "choices": "per_byte" if router.by_length else "whole",
        "max_new_tokens": router.max_new_tokens,
        "device": choose_device(router.device).partition(":")[0],
    }


def _plan(router: PerplexityRouter) -> list[str]:
    """What is about to be done, in words."""
    from expert_merging.checkpoints.checkpoint import Checkpoint
    from expert_merging.machine import show_size

    sizes = [
        sum(entry.size for entry in Checkpoint(one.model.folder).entries.values()) for one in router.experts.values()
    ]
    together = sum(sorted(sizes)[-router.per_question :])
    several = "one expert is" if router.per_question == 1 else f"{router.per_question} experts are"
    lines = [f"{several} in memory at a time, at most {show_size(together)} of weights"]
    if router.by_bytes:
        lines.append("vocabularies differ, so that perplexity is that of a byte of the question instead of a token")
    return [*lines, *(f"{name}: asked with {one.formats.default.described}" for name, one in router.experts.items())]


def _work(router: PerplexityRouter, questions: Sequence[Question], record: Record, terminal: Terminal) -> None:
    """Find perplexities and answers that are not known yet."""
    for name in router.experts:
        if unread := record.unread(name):
            with terminal.progress(f"perplexity under {name}", len(unread), "question") as advance:
                added = 0
                for found in router.perplexities(name, [questions[number] for number in unread]):
                    for place, value in found.items():
                        record.add_perplexity(unread[place], name, value)
                    added += len(found)
                    if added >= _KEPT:
                        record.save()
                        added = 0
                    advance(len(found))
            record.save()
    if unanswered := record.unanswered():
        weights = router.weights({name: record.perplexities(name) for name in router.experts})[:, unanswered]
        with terminal.progress("answers", len(unanswered), "question") as advance:
            for places, answers in router.answer([questions[number] for number in unanswered], weights):
                for place, answered in zip(places, answers, strict=True):
                    record.add_answer(unanswered[place], router.shares(weights[:, place]), answered)
                record.save()
                advance(len(places))
