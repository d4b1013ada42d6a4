"""Calibration files ``DATA_DIR/<Task>.json`` or ``.jsonl``, and the samples in them."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from expert_merging.errors import InputError, Problems, about, excerpt, first_of, near_name
from expert_merging.questions.entries import Exchange, read_entries, read_exchange
from expert_merging.questions.picture_sources import Picture, find_pictures

logger = logging.getLogger(__name__)

_SUFFIXES = (".json", ".jsonl")


@dataclass(frozen=True)
class Sample:
    """One unlabeled input.

    Args:
        task: name of its file.
        expert: the expert whose behaviour the merged model should match on it.
        question: the prompt.
        response: text that follows the prompt; None where the expert is to write it.
        identity: ``question_id`` of the entry, or its number.
        images: pictures that belong to it.
        tokens: the response as an expert wrote it, its end token included; None where the file has the response.
        file: the file that it is from, if it is from one.
        number: its place there, counted from 0.
    """

    task: str
    expert: str
    question: str
    response: str | None
    identity: str
    images: tuple[Picture, ...] = ()
    tokens: tuple[int, ...] | None = None
    file: Path | None = None
    number: int = 0

    @property
    def place(self) -> str:
        """Where it is, for messages."""
        return f"the question {excerpt(self.question)}" if self.file is None else entry_place(self.file, [self.number])

    @classmethod
    def test(cls, question: str, *images: Path, expert: str = "") -> Sample:
        """A question to ask any model; in the words of an expert if one is named."""
        return cls(task="test", expert=expert, question=question, response=None, identity="0", images=images)


def entry_place(file: Path, numbers: Sequence[int]) -> str:
    """The first entries of those numbers, for messages: all count from 0, as JSON's own positions do."""
    return f"{file}, {'entry' if len(numbers) == 1 else 'entries'} {first_of(numbers, 5)} (counted from 0)"


def find_tasks(data_dir: Path, names: Iterable[str]) -> dict[str, Path]:
    """The task files of a folder by task, ``TASK.json`` or ``TASK.jsonl``.

    A file whose name differs from one of the known names in case alone, such as ``code.json`` for Code, is that one's.

    Args:
        data_dir: the folder.
        names: known names of tasks and experts.

    Raises:
        InputError: a known name has several files.
    """
    files = [file for file in sorted(data_dir.iterdir()) if file.suffix.lower() in _SUFFIXES and file.is_file()]
    known = [*dict.fromkeys(names)]
    there = {file.stem for file in files}
    found: dict[str, list[Path]] = {}
    for file in files:
        missing = [name for name in known if name not in there]
        task = file.stem if file.stem in known else _same_task(file.stem, missing)
        found.setdefault(task, []).append(file)
    problems = Problems()
    for task, own in found.items():
        if len(own) > 1 and task in known:
            problems.add(f"{own[0]} and {own[1]} are both for the task {task}; keep one of them")
    problems.check()
    return {task: own[0] for task, own in found.items()}


def _same_task(name: str, known: Iterable[str]) -> str:
    """The one known name that differs from a name in case alone, or the name itself."""
    known = [*known]
    same = [other for other in known if other.lower() == name.lower()]
    return same[0] if name not in known and len(same) == 1 else name


def unknown_task(flag: str, task: str, data_dir: Path, tasks: Iterable[str]) -> str:
    """The problem with a flag that names a task without a file."""
    return f"--{flag} names the task {task!r}, which {data_dir} has no file for. {near_name(task, [*tasks])}"


def load_samples(
    data_dir: Path,
    experts: tuple[str, ...],
    *,
    default_count: int,
    counts: Mapping[str, int],
    task_expert: Mapping[str, str],
    family_tasks: Mapping[str, str] | None = None,
    flag: str = "data_dir",
) -> list[Sample]:
    """The first samples of every task file that belongs to an expert.

    A file belongs to the expert of its name unless ``task_expert`` says otherwise; other files are left alone, since
    one folder may serve several families.

    Args:
        data_dir: folder with one JSON or JSON Lines file per task.
        experts: names of the experts.
        default_count: samples taken from each file, from its beginning.
        counts: numbers that differ, by task.
        task_expert: expert by task, where the names differ.
        family_tasks: the same for the family's usual tasks, which may be absent; an expert of the file's own name and
            ``task_expert`` win.
        flag: names the folder, for messages.

    Raises:
        InputError: a missing folder, an expert without samples, a faulty file or entry; all of them at once.
    """
    if data_dir.is_file():
        raise InputError(f"--{flag} {data_dir} is a file; give the folder that it lies in")
    if not data_dir.is_dir():
        raise InputError(
            f"calibration folder {data_dir} does not exist; give --{flag} a folder with one JSON file per task"
        )
    problems = Problems()
    usual = family_tasks or {}
    tasks = find_tasks(data_dir, (*experts, *usual, *task_expert))
    for other, named in {"samples_per_task_dict": counts, "task_expert": task_expert}.items():
        for task in named:
            if task not in tasks:
                problems.add(unknown_task(other, task, data_dir, tasks))
    for task, expert in task_expert.items():
        if expert not in experts:
            problems.add(f"--task_expert {task}={expert}: there is no expert {expert!r}. {near_name(expert, experts)}")
    samples: list[Sample] = []
    own = {task: task for task in tasks if task in experts}
    expert_of = {**dict.fromkeys(tasks, ""), **usual, **own, **task_expert}
    for task, file in tasks.items():
        expert = expert_of[task]
        if expert in experts:
            with problems.collecting():
                samples += _read_task(task, file, expert, counts.get(task, default_count))
    served = {expert_of[task] for task in tasks}
    # What assigns files to experts is for the folder of --data_dir alone.
    where = ", and no --task_expert TASK={} assigns it another file" if flag == "data_dir" else f" (--{flag})"
    for expert in experts:
        if expert not in served:
            lacks = f"{data_dir} has no {expert}.json" + where.format(expert)
            problems.add(f"expert {expert} has no calibration samples: {lacks}")
    problems.check()
    _tell_short({task: counts.get(task, default_count) for task in sorted(tasks)}, samples)
    return samples


def _tell_short(asked: Mapping[str, int], samples: Sequence[Sample]) -> None:
    """Say which files have fewer samples than were asked for of them."""
    found = Counter(sample.task for sample in samples)
    short = [f"{task} {found[task]} of {count}" for task, count in asked.items() if 0 < found[task] < count]
    if short:
        logger.info("tasks with fewer samples than asked for, of which all are used: %s", ", ".join(short))


def _read_task(task: str, file: Path, expert: str, count: int) -> list[Sample]:
    entries = read_entries(file)
    problems = Problems()
    samples: list[Sample] = []
    left_out: dict[str, list[int]] = {}
    for number, entry in enumerate(entries[:count]):
        with problems.collecting(), about(entry_place(file, [number])):
            exchange = read_exchange(entry)
            samples.append(sample_of(task, file, number, entry, exchange, expert))
            for words in exchange.left_out:
                left_out.setdefault(words, []).append(number)
    problems.check()
    for words, numbers in left_out.items():
        are = "is" if words.startswith("a ") else "are"
        logger.warning("%s: %s cannot be part of a prompt and %s left out", entry_place(file, numbers), words, are)
    return samples


def sample_of(task: str, file: Path, number: int, entry: Mapping[str, Any], exchange: Exchange, expert: str) -> Sample:
    """The sample that an entry is, after the checks of its texts and pictures.

    Raises:
        InputError: question or response is no text, or a picture is missing.
    """
    question, response = exchange.question, exchange.response
    if not isinstance(question, str) or not question.strip():
        raise InputError(f"'question' must be a text that is not empty, got {excerpt(question)}")
    if response is not None and not isinstance(response, str):
        raise InputError(f"'response' must be a text (or left out), got {excerpt(response)}")
    return Sample(
        task=task,
        expert=expert,
        question=question,
        response=response or None,
        identity=str(entry.get("question_id", number)),
        images=find_pictures(exchange.pictures, [file.parent, file.parent.parent, Path.cwd()]),
        file=file,
        number=number,
    )
