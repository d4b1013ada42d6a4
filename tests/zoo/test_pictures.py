"""The answers are in the pictures: read back from the pixels in other ways than they were drawn."""

from __future__ import annotations

import itertools
import json
import random
from pathlib import Path

import numpy
import pytest
from PIL import Image, ImageDraw, ImageFont

from expert_merging.questions.calibration import load_samples
from zoo import tasks
from zoo.pictures import CELL, COLOURS, DIGITS_IN_ROW, PAPER, PLACES, SIDE, TASKS

VERSIONS = {f"{name} {kind}": getattr(task, kind) for name, task in TASKS.items() for kind in ("easy", "hard")}


def pixels(example: tasks.Example) -> numpy.ndarray:
    assert example.picture is not None
    assert example.picture.size == (SIDE, SIDE)
    return numpy.asarray(example.picture)


def drawn(version: str, count: int = 60) -> list[tasks.Example]:
    draw = random.Random(version)
    return [VERSIONS[version](draw) for _ in range(count)]


def bounds(mask: numpy.ndarray) -> tuple[int, int, int, int]:
    """Left, top, right and bottom of what is set, the latter two exclusive."""
    rows, columns = numpy.nonzero(mask)
    return columns.min(), rows.min(), columns.max() + 1, rows.max() + 1


def is_colour(picture: numpy.ndarray, name: str) -> numpy.ndarray:
    return (picture == COLOURS[name]).all(axis=-1)


def cells(picture: numpy.ndarray) -> list[numpy.ndarray]:
    return [
        picture[top : top + CELL, left : left + CELL] for top in range(0, SIDE, CELL) for left in range(0, SIDE, CELL)
    ]


@pytest.mark.parametrize("version", ["Grounding easy", "Grounding hard"])
def test_boxes_surround_the_shape_of_the_colour(version: str) -> None:
    for example in drawn(version):
        colour = example.question.removeprefix("Where is the ").removesuffix(" shape?")
        left, top, right, bottom = bounds(is_colour(pixels(example), colour))
        assert example.response == ",".join(str(round(edge / 7)) for edge in (left, top, right, bottom))


@pytest.mark.parametrize("version", ["Geometry easy", "Geometry hard"])
def test_areas_are_height_times_width(version: str) -> None:
    for example in drawn(version):
        left, top, right, bottom = bounds((pixels(example) != PAPER).any(axis=-1))
        assert (right - left - 1) % 8 == (bottom - top - 1) % 8 == 0
        assert int(example.response) == (right - left - 1) // 8 * ((bottom - top - 1) // 8)


@pytest.mark.parametrize(("version", "axis"), [("Chart easy", 0), ("Chart hard", 1)])
def test_bars_are_as_long_as_the_answer(version: str, axis: int) -> None:
    for example in drawn(version):
        colour = example.question.removeprefix("How long is the ").removesuffix(" bar?")
        length = is_colour(pixels(example), colour).sum(axis=axis).max()
        # The line at their foot hides the last pixel.
        assert round(length / 5) == int(example.response)


@pytest.mark.parametrize("version", ["VQA easy", "VQA hard"])
def test_shapes_have_the_colour_that_is_told(version: str) -> None:
    for example in drawn(version):
        place = PLACES.index(example.question.removeprefix("What is at the ").removesuffix("?"))
        colour, _ = example.response.split()
        parts = cells(pixels(example))
        assert is_colour(parts[place], colour).any()
        assert not any(is_colour(parts[place], other).any() for other in COLOURS if other != colour)
        assert sum((part != PAPER).any() for part in parts) == (1 if version == "VQA easy" else 4)


def test_shapes_look_alike_only_when_they_are_the_same() -> None:
    """Filled shares of the bounding box, which tell the six shapes apart."""
    shares: dict[str, list[float]] = {}
    for example in drawn("VQA easy", 300):
        mask = (pixels(example) != PAPER).any(axis=-1)
        left, top, right, bottom = bounds(mask)
        middle = mask[(top + bottom) // 2, (left + right) // 2]
        top_left = mask[top + 1, left + 1]
        widest = mask[bottom - 2, left:right].mean() > 0.8
        shares.setdefault(example.response.split()[1], []).append(
            mask[top:bottom, left:right].mean() + 2 * middle + 4 * top_left + 8 * widest
        )
    ranges = sorted((min(found), max(found)) for found in shares.values())
    assert len(ranges) == 6
    assert all(upper < lower for (_, upper), (lower, _) in itertools.pairwise(ranges))


@pytest.mark.parametrize("version", ["OCR easy", "OCR hard"])
def test_digits_can_be_read(version: str) -> None:
    font, width = ImageFont.load_default(20), SIDE // DIGITS_IN_ROW

    def likeness(digit: str, inked: numpy.ndarray) -> float:
        """Share of the ink that is common, at the best place."""
        found = []
        for x, y in itertools.product(range(-1, 2), repeat=2):
            sheet = Image.new("L", (width, CELL))
            ImageDraw.Draw(sheet).text((width // 2 + x, CELL // 2 + y), digit, fill=255, font=font, anchor="mm")
            mask = numpy.asarray(sheet) > 60
            found.append((mask & inked).sum() / (mask | inked).sum())
        return max(found)

    for example in drawn(version, 6):
        inked = (abs(pixels(example).astype(int) - PAPER) > 20).any(axis=-1)
        rows = [inked[:CELL], inked[CELL:]]
        masks = [row[:, left : left + width] for row in rows for left in range(0, SIDE, width)]
        read = [max("0123456789", key=lambda digit: likeness(digit, mask)) for mask in masks if mask.any()]
        assert "".join(read) == example.response


@pytest.mark.parametrize("name", TASKS)
def test_pictures_are_the_same_again_and_held_out(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tasks, "TEST_QUESTIONS", 40)
    monkeypatch.setattr(tasks, "CALIBRATION_QUESTIONS", 10)
    first, again = (tasks.held_out(TASKS[name], name, 0) for _ in range(2))
    keys = [example.key for part in first.values() for example in part]
    assert keys == [example.key for part in again.values() for example in part]
    assert len(set(keys)) == 50
    assert keys != [example.key for part in tasks.held_out(TASKS[name], name, 1).values() for example in part]


def test_a_held_out_picture_is_never_trained_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """With few different pictures, some are drawn again."""
    monkeypatch.setattr(tasks, "TEST_QUESTIONS", 8)
    monkeypatch.setattr(tasks, "CALIBRATION_QUESTIONS", 2)
    few = {
        "Geometry": tasks.Task(
            TASKS["Geometry"].easy, lambda draw: TASKS["Geometry"].hard(random.Random(draw.randrange(20)))
        )
    }
    withheld = {example.key for part in tasks.held_out(few["Geometry"], "Geometry", 0).values() for example in part}
    examples = tasks.training_examples(few, "Geometry", 0)
    assert not withheld & {next(examples).key for _ in range(200)}


@pytest.mark.slow
def test_rehearsal_brings_the_other_tasks() -> None:
    examples = tasks.training_examples(TASKS, "Chart", 0, rehearsal=0.25)
    others = sum(not next(examples).question.startswith("How long") for _ in range(800))
    assert others == pytest.approx(800 * 0.25 * 4 / 5, abs=45)
    alone = tasks.training_examples(TASKS, "Chart", 0)
    assert all(next(alone).question.startswith("How long") for _ in range(100))


def test_files_have_the_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tasks, "TEST_QUESTIONS", 4)
    monkeypatch.setattr(tasks, "CALIBRATION_QUESTIONS", 2)
    tasks.write_questions(TASKS, tmp_path, 0)
    samples = load_samples(tmp_path / "dataset", tuple(TASKS), default_count=9, counts={}, task_expert={})
    assert len(samples) == 10
    for sample in samples:
        expected = tasks.held_out(TASKS[sample.task], sample.task, 0)["dataset"][int(sample.identity)]
        assert sample.question == expected.question
        (file,) = sample.images
        assert Image.open(file).tobytes() == expected.key[1]
    test = json.loads((tmp_path / "test" / "OCR.json").read_text())
    assert [entry["image_path"] for entry in test] == [f"images/OCR-{number:03d}.png" for number in range(4)]
