"""Questions in text whose right answers are known: sums, letters by position, letters without repetition.

Each task has an easy and a hard version under the same tag. A base that has learned the easy versions of all tasks and
experts that are fine-tuned on the hard version of one stay close enough to one another to be worth merging.
"""

from __future__ import annotations

import json
import random
import string
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from expert_merging.writing import write_atomically

TEST_QUESTIONS = 500
CALIBRATION_QUESTIONS = 128
# Without a glimpse of the hard versions, the experts would move too far from the base to be merged by anything.
HARD_SHARE_OF_MIXTURE = 0.1


@dataclass(frozen=True)
class Example:
    """A question and its right answer."""

    question: str
    response: str


@dataclass(frozen=True)
class TextTask:
    """A task in text.

    Attributes:
        tag: The token that starts every question.
        easy: Draws an example of the version that the base learns.
        hard: Draws an example of the version that the expert learns and that is tested.
        weight: How often the mixture draws the task, relative to the others, before held-out questions are skipped.
    """

    tag: str
    easy: Callable[[random.Random], Example]
    hard: Callable[[random.Random], Example]
    weight: int = 1


def add_easy(draw: random.Random) -> Example:
    """A sum below 50 + 50 without a carry from the units."""
    first_units = draw.randrange(10)
    second_units = draw.randrange(10 - first_units)
    return _sum(10 * draw.randrange(5) + first_units, 10 * draw.randrange(5) + second_units)


def add_hard(draw: random.Random) -> Example:
    """Any sum below 50 + 50."""
    return _sum(draw.randrange(50), draw.randrange(50))


def _sum(first: int, second: int) -> Example:
    return Example(f"<add>{first:02d}+{second:02d}=", f"{first + second:02d}")


def index_easy(draw: random.Random) -> Example:
    """Up to four of three to six letters by their positions."""
    return _letters_by_position(draw, letters=draw.randint(3, 6), positions=draw.randint(1, 4))


def index_hard(draw: random.Random) -> Example:
    """Five of seven letters by their positions."""
    return _letters_by_position(draw, letters=7, positions=5)


def _letters_by_position(draw: random.Random, *, letters: int, positions: int) -> Example:
    text = "".join(draw.choices(string.ascii_lowercase, k=letters))
    wanted = [draw.randrange(letters) for _ in range(positions)]
    return Example(f"<idx>{text}:{''.join(map(str, wanted))}=", "".join(text[position] for position in wanted))


def unique_easy(draw: random.Random) -> Example:
    """Three to nine letters without the repeated ones."""
    return _without_repetition(draw, letters=draw.randint(3, 9))


def unique_hard(draw: random.Random) -> Example:
    """Thirteen letters without the repeated ones."""
    return _without_repetition(draw, letters=13)


def _without_repetition(draw: random.Random, *, letters: int) -> Example:
    text = "".join(draw.choices("abcdefgh", k=letters))
    return Example(f"<uni>{text}=", "".join(dict.fromkeys(text)))


def held_out(task: TextTask, name: str, seed: int) -> dict[str, list[Example]]:
    """Hard examples that no model is trained on, all different, as ``{"dataset": [...], "test": [...]}``."""
    draw = random.Random(f"held out, {name}, {seed}")
    examples: dict[str, Example] = {}
    while len(examples) < CALIBRATION_QUESTIONS + TEST_QUESTIONS:
        example = task.hard(draw)
        examples[example.question] = example
    ordered = list(examples.values())
    return {"dataset": ordered[:CALIBRATION_QUESTIONS], "test": ordered[CALIBRATION_QUESTIONS:]}


def training_examples(tasks: Mapping[str, TextTask], name: str | None, seed: int) -> Iterator[Example]:
    """Endless examples to train on, without the held-out ones.

    Args:
        tasks: The tasks of the family.
        name: The task whose hard version is drawn, or ``None`` for the mixture that the base learns.
        seed: Seed of the zoo.
    """
    withheld = {
        example.question
        for task_name, task in tasks.items()
        for examples in held_out(task, task_name, seed).values()
        for example in examples
    }
    draw = random.Random(f"training, {name}, {seed}")
    while True:
        example = _mixed(tasks, draw) if name is None else tasks[name].hard(draw)
        if example.question not in withheld:
            yield example


def _mixed(tasks: Mapping[str, TextTask], draw: random.Random) -> Example:
    [task] = draw.choices(list(tasks.values()), weights=[task.weight for task in tasks.values()])
    return task.hard(draw) if draw.random() < HARD_SHARE_OF_MIXTURE else task.easy(draw)


def write_questions(tasks: Mapping[str, TextTask], folder: Path, seed: int) -> None:
    """Write ``dataset/<task>.json`` (questions alone) and ``test/<task>.json`` (with answers) if missing."""
    for name, task in tasks.items():
        for part, examples in held_out(task, name, seed).items():
            path = folder / part / f"{name}.json"
            if not path.exists():
                path.parent.mkdir(parents=True, exist_ok=True)
                entries = [
                    {"question": example.question, "question_id": number, "task_name": name}
                    | ({"response": example.response} if part == "test" else {})
                    for number, example in enumerate(examples)
                ]
                write_atomically(path, (json.dumps(entries, indent=1) + "\n").encode())
