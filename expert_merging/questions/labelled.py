"""Questions with their right answers: task files in the form of calibration files, each entry with an answer."""

from __future__ import annotations

import hashlib
import json
import re
import string
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from expert_merging.errors import InputError, Problems, excerpt, near_name
from expert_merging.questions.calibration import Sample, entry_place, find_tasks, sample_of
from expert_merging.questions.entries import read_entries, read_exchange
from expert_merging.questions.picture_sources import content_of

# How an answer is judged: it is the text, its last number is the right one, the right choice is the likeliest, or it is
# not judged at all.
Kind = Literal["exact_match", "numbers", "choice", "open"]
_NUMBER = re.compile(r"(?:(?<!\w)[-+\u2212])?(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)(?:[eE][-+]?\d+)?")


@dataclass(frozen=True)
class Question:
    """A question and what is right.

    Args:
        sample: the question.
        answers: right answers, any of which counts.
        kind: how an answer is judged.
        choices: what may be answered, for a multiple choice.
    """

    sample: Sample
    answers: tuple[str, ...]
    kind: Kind
    choices: tuple[str, ...] = ()

    @property
    def task(self) -> str:
        """The task that it belongs to."""
        return self.sample.task

    def is_right(self, text: str) -> bool:
        """Whether a written answer is right; white space around it does not count."""
        if self.kind == "numbers":
            number = last_number(text)
            return number is not None and number in map(last_number, self.answers)
        return text.strip() in (answer.strip() for answer in self.answers)

    def can_begin_with(self, text: str) -> bool:
        """Whether a right answer, compared as a text, may begin with what a model has written so far.

        White space does not count, which some tokenizers write otherwise once they know what follows. Nor does a last
        character whose other bytes are to come.
        """
        so_far = _solid(text.rstrip("\ufffd"))
        return any(_solid(answer).startswith(so_far) for answer in self.answers)


def _solid(text: str) -> str:
    return "".join(text.split())


def last_number(text: str) -> float | None:
    """The last number in a text, such as 1250.5 of ``It costs $1,250.50.``; None where there is none."""
    found = _NUMBER.findall(text)
    return float(found[-1].replace(",", "").replace("\u2212", "-")) if found else None


def load_questions(
    folder: Path,
    *,
    experts: Mapping[str, str] | None = None,
    count: int | None = None,
    numbers: bool = False,
    without_answers: bool = False,
) -> list[Question]:
    """The questions of all task files of a folder, tasks in the order of their files.

    Args:
        folder: holds ``TASK.json`` or ``TASK.jsonl``.
        experts: the expert in whose words a task is asked, where that is not the one of its name.
        count: questions of each task, from the beginning of its file; all by default.
        numbers: judge written answers by their last number also where the file has texts.
        without_answers: entries may have no answer, and are not judged then.

    Raises:
        InputError: there is no file, or an entry has no question or no answer; all problems at once.
    """
    if not folder.is_dir():
        raise InputError(f"--questions {folder} is no folder; give one with a file of labelled questions a task")
    tasks = find_tasks(folder, experts or ())
    if not tasks:
        raise InputError(f"--questions {folder} holds no TASK.json and no TASK.jsonl")
    problems, found = Problems(), list[Question]()
    for task, file in tasks.items():
        with problems.collecting():
            found += _read_task(task, file, (experts or {}).get(task, task), count, numbers, without_answers)
    problems.check()
    return found


def check_tasks(names: Iterable[str], tasks: Iterable[str], flag: str) -> None:
    """Check that a flag names tasks that there are.

    Raises:
        InputError: it names others.
    """
    known = sorted(set(tasks))
    problems = [f"--{flag} names the task {name!r}. {near_name(name, known)}" for name in names if name not in known]
    if problems:
        raise InputError(*problems)


def digest_of(questions: Sequence[Question]) -> str:
    """A digest of questions, pictures and answers."""
    asked = [(one.task, one.sample.question, one.answers, one.kind, one.choices) for one in questions]
    digest = hashlib.sha256(json.dumps(asked).encode())
    for one in questions:
        for picture in one.sample.images:
            digest.update(content_of(picture))
    return digest.hexdigest()[:16]


def by_task(questions: Sequence[Question]) -> dict[str, list[Question]]:
    """The questions of each task, in the order of the tasks' first ones."""
    found: dict[str, list[Question]] = {}
    for question in questions:
        found.setdefault(question.task, []).append(question)
    return found


def _read_task(
    task: str, file: Path, expert: str, count: int | None, numbers: bool, without_answers: bool
) -> Iterator[Question]:
    """The questions of a file; a problem that many entries share is told once."""
    found, problems = list[Question](), dict[str, list[int]]()
    for number, entry in enumerate(read_entries(file)[:count]):
        try:
            exchange = read_exchange(entry)
            sample = sample_of(task, file, number, entry, exchange, expert)
            if without_answers and "answer" not in entry and sample.response is None:
                choices = _choices(entry)
                found.append(Question(sample, (), "choice" if choices else "open", choices))
            else:
                found.append(_question(sample, entry, numbers=numbers))
        except InputError as error:
            for problem in error.problems:
                problems.setdefault(problem, []).append(number)
    if problems:
        raise InputError(*(f"{entry_place(file, places)}: {problem}" for problem, places in problems.items()))
    yield from found


def _question(sample: Sample, entry: Mapping[str, Any], *, numbers: bool) -> Question:
    answer = entry.get("answer", sample.response)
    if choices := _choices(entry):
        return Question(sample, (_chosen(answer, choices),), "choice", choices)
    answers = answer if isinstance(answer, list) and answer else [answer]
    if not all(map(_is_text, answers)):
        raise InputError(
            f"'answer' must be a text, a number, or a list of them (a 'response' counts where there is none), got "
            f"{excerpt(answer)}"
        )
    kind: Kind = "numbers" if numbers or not any(isinstance(one, str) for one in answers) else "exact_match"
    texts = tuple(map(str, answers))
    if kind == "numbers" and any(last_number(text) is None for text in texts):
        raise InputError(f"'answer' has no number in it, got {excerpt(answer)}")
    return Question(sample, texts, kind)


def _choices(entry: Mapping[str, Any]) -> tuple[str, ...]:
    """What may be answered; nothing where any text may."""
    choices = entry.get("choices")
    if choices is None:
        return ()
    if not isinstance(choices, list) or len(choices) < 2 or not all(map(_is_text, choices)):
        raise InputError(f"'choices' must be a list of two texts or more, got {excerpt(choices)}")
    return tuple(map(str, choices))


def _is_text(value: Any) -> bool:
    return (isinstance(value, str) and bool(value.strip())) or (
        isinstance(value, int | float) and not isinstance(value, bool)
    )


def _chosen(answer: Any, choices: Sequence[str]) -> str:
    """The right choice: named itself, by its letter, or by its number counted from 0."""
    if str(answer) in choices and not isinstance(answer, bool):
        return str(answer)
    letters = dict(zip(string.ascii_uppercase, choices, strict=False))
    if isinstance(answer, str) and answer.strip().upper() in letters:
        return letters[answer.strip().upper()]
    if isinstance(answer, int) and not isinstance(answer, bool) and 0 <= answer < len(choices):
        return choices[answer]
    raise InputError(
        f"'answer' must be one of the choices, its letter (A is the first) or its number (0 is the first), got "
        f"{excerpt(answer)}"
    )
