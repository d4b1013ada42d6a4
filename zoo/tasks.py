"""Tasks whose right answers are known: held-out questions, endless examples to train on, the files of a zoo.

Each task has an easy and a hard version. A base that has learned the easy versions of all tasks and experts that are
fine-tuned on the hard version of one stay close enough to one another to be worth merging.
"""

from __future__ import annotations

import io
import json
import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from expert_merging.writing import write_atomically

if TYPE_CHECKING:
    from PIL.Image import Image

TEST_QUESTIONS = 500
CALIBRATION_QUESTIONS = 128
KNOWN_QUESTIONS = 100
# Without a glimpse of the hard versions, the experts would move too far from the base to be merged by anything.
HARD_SHARE_OF_MIXTURE = 0.1


@dataclass(frozen=True)
class Example:
    """A question, its right answer, and the picture that it is about."""

    question: str
    response: str
    picture: Image | None = None

    @property
    def key(self) -> tuple[str, bytes]:
        """What no other example may share with a held-out one."""
        return self.question, b"" if self.picture is None else self.picture.tobytes()


@dataclass(frozen=True)
class Task:
    """A kind of question.

    Attributes:
        easy: Draws an example of the version that the base learns.
        hard: Draws an example of the version that the expert learns and that is tested.
        weight: How often the mixture draws the task, relative to the others, before held-out questions are skipped.
        test_questions: How many questions are tested, `TEST_QUESTIONS` by default.
    """

    easy: Callable[[random.Random], Example]
    hard: Callable[[random.Random], Example]
    weight: int = 1
    test_questions: int | None = None


def held_out(task: Task, name: str, seed: int) -> dict[str, list[Example]]:
    """Hard examples that no model is trained on, all different, as ``{"dataset": [...], "test": [...]}``."""
    draw = random.Random(f"held out, {name}, {seed}")
    examples: dict[tuple[str, bytes], Example] = {}
    while len(examples) < CALIBRATION_QUESTIONS + (task.test_questions or TEST_QUESTIONS):
        example = task.hard(draw)
        examples[example.key] = example
    ordered = list(examples.values())
    return {"dataset": ordered[:CALIBRATION_QUESTIONS], "test": ordered[CALIBRATION_QUESTIONS:]}


def known(task: Task, name: str, seed: int) -> list[Example]:
    """Easy examples, all different, of what the base has learned: a merge must not unlearn them."""
    if task.easy is task.hard:
        return []
    draw, examples = random.Random(f"known, {name}, {seed}"), dict[tuple[str, bytes], Example]()
    for _ in range(10 * KNOWN_QUESTIONS):  # there may be fewer that differ
        if len(examples) == KNOWN_QUESTIONS:
            break
        example = task.easy(draw)
        examples[example.key] = example
    return list(examples.values())


def training_examples(
    tasks: Mapping[str, Task],
    name: str | None,
    seed: int,
    *,
    rehearsal: float = 0,
    hard_share: float = HARD_SHARE_OF_MIXTURE,
) -> Iterator[Example]:
    """Endless examples to train on, without the held-out ones.

    Args:
        tasks: The tasks of the family.
        name: The task whose hard version is drawn, or ``None`` for the mixture that the base learns.
        seed: Seed of the zoo.
        rehearsal: Share of a task's examples that come from the mixture instead.
        hard_share: Share of hard examples in the mixture.
    """
    withheld = {
        example.key
        for task_name, task in tasks.items()
        for examples in held_out(task, task_name, seed).values()
        for example in examples
    }
    draw = random.Random(f"training, {name}, {seed}")
    while True:
        if name is None or (rehearsal and draw.random() < rehearsal):
            example = _mixed(tasks, draw, hard_share)
        else:
            example = tasks[name].hard(draw)
        if example.key not in withheld:
            yield example


def _mixed(tasks: Mapping[str, Task], draw: random.Random, hard_share: float) -> Example:
    [task] = draw.choices(list(tasks.values()), weights=[task.weight for task in tasks.values()])
    return task.hard(draw) if draw.random() < hard_share else task.easy(draw)


def write_questions(tasks: Mapping[str, Task], folder: Path, seed: int) -> None:
    """Write ``dataset/<task>.json`` (questions alone), and ``test`` and ``known`` (with answers), if missing."""
    for name, task in tasks.items():
        for part, examples in {**held_out(task, name, seed), "known": known(task, name, seed)}.items():
            path = folder / part / f"{name}.json"
            if examples and not path.exists():
                path.parent.mkdir(parents=True, exist_ok=True)
                entries = [
                    {"question": example.question, "question_id": number, "task_name": name}
                    | _write_picture(example, path.parent, f"images/{name}-{number:03d}.png")
                    | ({} if part == "dataset" else {"response": example.response})
                    for number, example in enumerate(examples)
                ]
                write_atomically(path, (json.dumps(entries, indent=1) + "\n").encode())


def _write_picture(example: Example, folder: Path, name: str) -> dict[str, Any]:
    """Write the picture of an example, if it has one, and tell where it is."""
    if example.picture is None:
        return {}
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    png = io.BytesIO()
    example.picture.save(png, "PNG")
    (folder / name).write_bytes(png.getvalue())
    return {"image_path": name}
