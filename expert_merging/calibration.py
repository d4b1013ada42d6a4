"""Calibration files ``DATA_DIR/<Task>.json`` and the samples in them."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from expert_merging.errors import InputError, Problems, near_name

logger = logging.getLogger(__name__)

# Characters of a faulty value that a message shows.
_SHOWN = 60
# Names under which other formats have pictures.
_PICTURES = {
    *("image", "images", "image_paths", "image_file", "image_files", "image_url", "img", "imgs", "img_path"),
    *("picture", "pictures", "photo", "photos"),
}


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
    images: tuple[Path, ...] = ()
    tokens: tuple[int, ...] | None = None
    file: Path | None = None
    number: int = 0

    @property
    def place(self) -> str:
        """Where it is, for messages."""
        return f"the question {self.question!r}" if self.file is None else entry_place(self.file, [self.number])

    @classmethod
    def test(cls, question: str, *images: Path, expert: str = "") -> Sample:
        """A question to ask any model; in the words of an expert if one is named."""
        return cls(task="test", expert=expert, question=question, response=None, identity="0", images=images)


def entry_place(file: Path, numbers: Sequence[int], shown: int = 5) -> str:
    """The first entries of those numbers, for messages: all count from 0, as JSON's own positions do."""
    first = ", ".join(map(str, numbers[:shown]))
    more = f" and {len(numbers) - shown} more" if len(numbers) > shown else ""
    return f"{file}, {'entry' if len(numbers) == 1 else 'entries'} {first}{more} (counted from 0)"


def load_samples(
    data_dir: Path,
    experts: tuple[str, ...],
    *,
    default_count: int,
    counts: Mapping[str, int],
    task_expert: Mapping[str, str],
    family_tasks: Mapping[str, str] | None = None,
) -> list[Sample]:
    """The first samples of every task file that belongs to an expert.

    A file belongs to the expert of its name unless ``task_expert`` says otherwise; other files are left alone, since
    one folder may serve several families.

    Args:
        data_dir: folder with one JSON file per task.
        experts: names of the experts.
        default_count: samples taken from each file, from its beginning.
        counts: numbers that differ, by task.
        task_expert: expert by task, where the names differ.
        family_tasks: the same for the family's usual tasks, which may be absent; an expert of the file's own name and
            ``task_expert`` win.

    Raises:
        InputError: a missing folder, an expert without samples, a faulty file or entry; all of them at once.
    """
    if data_dir.is_file():
        raise InputError(f"--data_dir {data_dir} is a file; give the folder that it lies in")
    if not data_dir.is_dir():
        raise InputError(
            f"calibration folder {data_dir} does not exist; give --data_dir a folder with one JSON file per task"
        )
    tasks = {file.stem: file for file in sorted(data_dir.glob("*.json")) if file.is_file()}
    problems = Problems()
    for flag, named in {"samples_per_task_dict": counts, "task_expert": task_expert}.items():
        for task in named:
            if task not in tasks:
                problems.add(
                    f"--{flag} names the task {task!r}, and {data_dir} has no {task}.json. {near_name(task, [*tasks])}"
                )
    for task, expert in task_expert.items():
        if expert not in experts:
            problems.add(f"--task_expert {task}={expert}: there is no expert {expert!r}. {near_name(expert, experts)}")
    samples: list[Sample] = []
    own = {task: task for task in tasks if task in experts}
    expert_of = {**dict.fromkeys(tasks, ""), **(family_tasks or {}), **own, **task_expert}
    for task, file in tasks.items():
        expert = expert_of[task]
        if expert in experts:
            with problems.collecting():
                samples += _read_task(file, expert, counts.get(task, default_count))
    served = {expert_of[task] for task in tasks}
    for expert in experts:
        if expert not in served:
            problems.add(
                f"expert {expert} has no calibration samples: {data_dir} has no {expert}.json, and no --task_expert "
                f"TASK={expert} assigns it another file"
            )
    problems.check()
    return samples


def _read_task(file: Path, expert: str, count: int) -> list[Sample]:
    try:
        entries = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{file} is not valid JSON: {error}") from None
    if not isinstance(entries, list) or not entries:
        found = "an empty list" if entries == [] else _shown(entries)
        raise InputError(
            f"{file} must hold a list of objects with a 'question' each, and has {found}; see dataset/README.md"
        )
    problems = Problems()
    samples = []
    for number, entry in enumerate(entries[:count]):
        with problems.collecting():
            samples.append(_read_entry(file, number, entry, expert))
    problems.check()
    if len(samples) < count:
        have = "1 entry" if len(samples) == 1 else f"{len(samples)} entries"
        logger.info("%s has %s; --samples_per_task asks for %d, all are used", file, have, count)
    return samples


def _shown(value: Any) -> str:
    """The beginning of a value of a JSON file, for messages."""
    text = json.dumps(value)
    return text if len(text) <= _SHOWN else text[:_SHOWN] + "..."


def _read_entry(file: Path, number: int, entry: Any, expert: str) -> Sample:
    where = entry_place(file, [number])
    if not isinstance(entry, dict):
        raise InputError(f"{where}: must be an object with a 'question', got {_shown(entry)}")
    _check_characters(where, entry)
    question, response = entry.get("question"), entry.get("response")
    if not isinstance(question, str) or not question.strip():
        fields = "" if "question" in entry else f" (its fields: {', '.join(map(str, entry)) or 'none'})"
        raise InputError(f"{where}: 'question' must be a text that is not empty, got {json.dumps(question)}{fields}")
    if response is not None and not isinstance(response, str):
        raise InputError(f"{where}: 'response' must be a text (or left out), got {_shown(response)}")
    others = [key for key, value in entry.items() if value and key.lower() in _PICTURES]
    if others and not entry.get("image_path"):
        raise InputError(
            f"{where}: has {others[0]!r}, and pictures are named by 'image_path'; rename it, or take it out if the "
            "question is to be asked without a picture"
        )
    return Sample(
        task=file.stem,
        expert=expert,
        question=question,
        response=response or None,
        identity=str(entry.get("question_id", number)),
        images=_find_images(file, where, entry.get("image_path")),
        file=file,
        number=number,
    )


def _check_characters(where: str, entry: Any) -> None:
    """Check that the entry's texts are texts: JSON can name halves of characters, which no tokenizer takes."""
    try:
        json.dumps(entry, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"{where}: has half a character ({error.object[error.start]!a}), which is no text; write the whole "
            "character, or leave it out"
        ) from None


def _find_images(file: Path, where: str, given: Any) -> tuple[Path, ...]:
    """The entry's pictures, from beside the file, the dataset folder's parent or the current folder."""
    if given is None:
        return ()
    paths = given if isinstance(given, list) else [given]
    found = []
    for path in paths:
        if not isinstance(path, str):
            raise InputError(f"{where}: 'image_path' must be a text or a list of texts, got {json.dumps(path)}")
        if not path.strip():
            raise InputError(f"{where}: 'image_path' is empty; leave it out where there is no picture")
        places = [file.parent, file.parent.parent, Path.cwd()]
        hits = [place / path for place in places if (place / path).is_file()]
        if not hits:
            looked = ", ".join(str(place) for place in places)
            raise InputError(f"{where}: image_path {path} does not exist (looked in {looked})")
        found.append(hits[0])
    return tuple(found)
