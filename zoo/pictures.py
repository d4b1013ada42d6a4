"""Small pictures with a question whose right answer is known, drawn with Pillow.

A picture is a grid of square cells of ``CELL`` pixels, which is what one image token of the small models sees.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import cache

from PIL import Image, ImageDraw, ImageFont

from zoo.tasks import Example, Task

CELLS = 3
CELL = 28
SIDE = CELLS * CELL
COLOURS = {
    "red": (220, 40, 40),
    "green": (40, 160, 60),
    "blue": (50, 80, 220),
    "yellow": (240, 210, 40),
    "purple": (150, 60, 180),
    "black": (30, 30, 30),
}
CHARACTERS = "0123456789ACEHKPTX"

Box = tuple[int, int, int, int]


def _canvas() -> tuple[Image.Image, ImageDraw.ImageDraw]:
    picture = Image.new("RGB", (SIDE, SIDE), "white")
    return picture, ImageDraw.Draw(picture)


def _circle(pen: ImageDraw.ImageDraw, box: Box, colour: tuple[int, int, int]) -> None:
    pen.ellipse(box, fill=colour)


def _square(pen: ImageDraw.ImageDraw, box: Box, colour: tuple[int, int, int]) -> None:
    pen.rectangle(box, fill=colour)


def _polygon(*corners: tuple[float, float]) -> Callable[[ImageDraw.ImageDraw, Box, tuple[int, int, int]], None]:
    """A shape from its corners in the unit square."""

    def paint(pen: ImageDraw.ImageDraw, box: Box, colour: tuple[int, int, int]) -> None:
        left, top, right, bottom = box
        pen.polygon([(left + x * (right - left), top + y * (bottom - top)) for x, y in corners], fill=colour)

    return paint


def _ring(pen: ImageDraw.ImageDraw, box: Box, colour: tuple[int, int, int]) -> None:
    pen.ellipse(box, outline=colour, width=max(2, (box[2] - box[0]) // 5))


_THIRDS = (1 / 3, 2 / 3)
SHAPES = {
    "circle": _circle,
    "square": _square,
    "triangle": _polygon((0.5, 0), (1, 1), (0, 1)),
    "diamond": _polygon((0.5, 0), (1, 0.5), (0.5, 1), (0, 0.5)),
    "cross": _polygon(
        (_THIRDS[0], 0), (_THIRDS[1], 0), (_THIRDS[1], _THIRDS[0]), (1, _THIRDS[0]), (1, _THIRDS[1]),
        (_THIRDS[1], _THIRDS[1]), (_THIRDS[1], 1), (_THIRDS[0], 1), (_THIRDS[0], _THIRDS[1]), (0, _THIRDS[1]),
        (0, _THIRDS[0]), (_THIRDS[0], _THIRDS[0]),
    ),
    "ring": _ring,
}  # fmt: skip


def _cells(draw: random.Random, count: int) -> list[tuple[int, int]]:
    """The upper left corners of different cells, in any order."""
    return [(CELL * (cell % CELLS), CELL * (cell // CELLS)) for cell in draw.sample(range(CELLS**2), count)]


def _in_cell(draw: random.Random, corner: tuple[int, int]) -> Box:
    """A box for a shape of nearly a cell's size."""
    size = draw.randint(18, 22)
    left, top = (start + draw.randint(2, CELL - 3 - size) for start in corner)
    return left, top, left + size, top + size


def shapes_easy(draw: random.Random) -> Example:
    """The colour of one of two or three shapes."""
    return _colour_of_shape(draw, draw.randint(2, 3))


def shapes_hard(draw: random.Random) -> Example:
    """The colour of one of six shapes."""
    return _colour_of_shape(draw, 6)


def _colour_of_shape(draw: random.Random, count: int) -> Example:
    picture, pen = _canvas()
    shapes = draw.sample(list(SHAPES), count)
    colours = [draw.choice(list(COLOURS)) for _ in shapes]
    for shape, colour, corner in zip(shapes, colours, _cells(draw, count), strict=True):
        SHAPES[shape](pen, _in_cell(draw, corner), COLOURS[colour])
    return Example(f"What colour is the {shapes[0]}?", colours[0], picture)


def area_easy(draw: random.Random) -> Example:
    """The area of a rectangle with sides up to three."""
    return _area(draw, draw.randint(1, 3), draw.randint(1, 3))


def area_hard(draw: random.Random) -> Example:
    """The area of a rectangle with sides from two to six."""
    return _area(draw, draw.randint(2, 6), draw.randint(2, 6))


def _area(draw: random.Random, columns: int, rows: int) -> Example:
    picture, pen = _canvas()
    unit = 12
    left, top = draw.randint(1, SIDE - 2 - columns * unit), draw.randint(1, SIDE - 2 - rows * unit)
    right, bottom = left + columns * unit, top + rows * unit
    pen.rectangle((left, top, right, bottom), fill=COLOURS[draw.choice(list(COLOURS)[:-1])])
    for x in range(left, right + 1, unit):
        pen.line((x, top, x, bottom), fill="black")
    for y in range(top, bottom + 1, unit):
        pen.line((left, y, right, y), fill="black")
    return Example("How many squares does the rectangle have?", str(columns * rows), picture)


def count_easy(draw: random.Random) -> Example:
    """The number of one kind of shape among up to four shapes of two kinds."""
    return _count(draw, draw.randint(1, 4))


def count_hard(draw: random.Random) -> Example:
    """The number of one kind of shape among nine shapes of three kinds."""
    return _count(draw, 9)


def _count(draw: random.Random, count: int) -> Example:
    picture, pen = _canvas()
    kinds = draw.sample(list(SHAPES), 3 if count > 4 else 2)
    wanted = draw.randint(1, count if count <= 4 else 7)
    shapes = [kinds[0]] * wanted + draw.choices(kinds[1:], k=count - wanted)
    for shape, corner in zip(shapes, _cells(draw, count), strict=True):
        SHAPES[shape](pen, _in_cell(draw, corner), COLOURS[draw.choice(list(COLOURS))])
    return Example(f"How many times is there a {kinds[0]}?", str(wanted), picture)


def chart_easy(draw: random.Random) -> Example:
    """The height of one of three bars."""
    return _bar_height(draw, 3)


def chart_hard(draw: random.Random) -> Example:
    """The height of one of six bars."""
    return _bar_height(draw, 6)


def _bar_height(draw: random.Random, count: int) -> Example:
    picture, pen = _canvas()
    colours = draw.sample(list(COLOURS), count)
    heights = [draw.randint(1, 9) for _ in colours]
    floor, unit, width = SIDE - 5, 8, 72 // count
    left = 8 + (72 - width * count) // 2
    for height in range(1, 10):
        pen.line((4, floor - unit * height, SIDE - 3, floor - unit * height), fill=(205, 205, 205))
    for number, (colour, height) in enumerate(zip(colours, heights, strict=True)):
        start = left + number * width
        pen.rectangle((start, floor - unit * height, start + width - 4, floor), fill=COLOURS[colour])
    pen.line((4, 2, 4, floor, SIDE - 3, floor), fill="black")
    return Example(f"How high is the {colours[0]} bar?", str(heights[0]), picture)


@cache
def _font(size: int) -> ImageFont.ImageFont | ImageFont.FreeTypeFont:
    return ImageFont.load_default(size)


def text_easy(draw: random.Random) -> Example:
    """Two or three characters in a row."""
    return _text(draw, draw.randint(2, 3), lines=1)


def text_hard(draw: random.Random) -> Example:
    """Six characters in two rows."""
    return _text(draw, 6, lines=2)


def _text(draw: random.Random, count: int, *, lines: int) -> Example:
    picture, pen = _canvas()
    text = "".join(draw.choices(CHARACTERS, k=count))
    colour = COLOURS[draw.choice([name for name in COLOURS if name != "yellow"])]
    first_row = draw.randrange(CELLS + 1 - lines)
    for number, character in enumerate(text):
        row, column = divmod(number, CELLS)
        at = (
            CELL * column + CELL // 2 + draw.randint(-3, 3),
            CELL * (first_row + row) + CELL // 2 + draw.randint(-2, 2),
        )
        pen.text(at, character, fill=colour, font=_font(draw.randint(20, 24)), anchor="mm")
    return Example("Read the text.", text, picture)


def box_easy(draw: random.Random) -> Example:
    """The box around the only shape."""
    return _box(draw, 1)


def box_hard(draw: random.Random) -> Example:
    """The box around one of four shapes."""
    return _box(draw, 4)


GRID = 12


def _box(draw: random.Random, count: int) -> Example:
    picture, pen = _canvas()
    cells = SIDE // GRID
    shapes = draw.sample(list(SHAPES), count)
    taken: list[Box] = []
    while len(taken) < count:
        size = draw.randint(2, 3)
        x, y = draw.randint(0, cells - size), draw.randint(0, cells - size)
        if all(x >= right or y >= bottom or x + size <= left or y + size <= top for left, top, right, bottom in taken):
            taken.append((x, y, x + size, y + size))
        elif draw.random() < 0.05:
            taken.clear()
    for shape, (left, top, right, bottom) in zip(shapes, taken, strict=True):
        colour = COLOURS[draw.choice(list(COLOURS))]
        SHAPES[shape](pen, (left * GRID, top * GRID, right * GRID - 1, bottom * GRID - 1), colour)
    return Example(f"Where is the {shapes[0]}?", ",".join(map(str, taken[0])), picture)


TASKS = {
    "OCR": Task(text_easy, text_hard),
    "VQA": Task(shapes_easy, shapes_hard),
    "Geometry": Task(count_easy, count_hard),
    "Chart": Task(chart_easy, chart_hard),
    "Grounding": Task(box_easy, box_hard),
}
