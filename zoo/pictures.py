"""Small pictures with a question whose right answer is known, drawn with Pillow.

A picture has four square cells, and each is what one image token of the small models sees.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import cache

from PIL import Image, ImageDraw, ImageFont

from zoo.tasks import Example, Task

CELL = 28
SIDE = 2 * CELL
DIGITS_IN_ROW = 4
# What both families' processors turn into zeros: empty paper then says nothing, and models learn several times faster
# than from white paper.
PAPER = (124, 116, 104)
COLOURS = {
    "red": (220, 40, 40),
    "green": (40, 160, 60),
    "blue": (60, 110, 250),
    "yellow": (240, 210, 40),
    "black": (20, 20, 20),
    "white": (250, 250, 250),
}
PLACES = ("top left", "top right", "bottom left", "bottom right")

Box = tuple[int, int, int, int]
Colour = tuple[int, int, int]
Shape = Callable[[ImageDraw.ImageDraw, Box, Colour], None]


def _circle(pen: ImageDraw.ImageDraw, box: Box, colour: Colour) -> None:
    pen.ellipse(box, fill=colour)


def _square(pen: ImageDraw.ImageDraw, box: Box, colour: Colour) -> None:
    pen.rectangle(box, fill=colour)


def _ring(pen: ImageDraw.ImageDraw, box: Box, colour: Colour) -> None:
    pen.ellipse(box, outline=colour, width=max(2, (box[2] - box[0]) // 5))


def _polygon(*corners: tuple[float, float]) -> Shape:
    """A shape from its corners in the unit square."""

    def paint(pen: ImageDraw.ImageDraw, box: Box, colour: Colour) -> None:
        left, top, right, bottom = box
        pen.polygon([(left + x * (right - left), top + y * (bottom - top)) for x, y in corners], fill=colour)

    return paint


SHAPES: dict[str, Shape] = {
    "circle": _circle,
    "square": _square,
    "ring": _ring,
    "triangle": _polygon((0.5, 0), (1, 1), (0, 1)),
    "diamond": _polygon((0.5, 0), (1, 0.5), (0.5, 1), (0, 0.5)),
    "cross": _polygon(
        (1 / 3, 0), (2 / 3, 0), (2 / 3, 1 / 3), (1, 1 / 3), (1, 2 / 3), (2 / 3, 2 / 3),
        (2 / 3, 1), (1 / 3, 1), (1 / 3, 2 / 3), (0, 2 / 3), (0, 1 / 3), (1 / 3, 1 / 3),
    ),
}  # fmt: skip


def _canvas() -> tuple[Image.Image, ImageDraw.ImageDraw]:
    picture = Image.new("RGB", (SIDE, SIDE), PAPER)
    return picture, ImageDraw.Draw(picture)


def _corner(cell: int) -> tuple[int, int]:
    """The upper left corner of one of the four cells."""
    return CELL * (cell % 2), CELL * (cell // 2)


def shape_easy(draw: random.Random) -> Example:
    """Name and colour of the only shape."""
    return _shape_at(draw, 1)


def shape_hard(draw: random.Random) -> Example:
    """Name and colour of one of four shapes."""
    return _shape_at(draw, 4)


def _shape_at(draw: random.Random, count: int) -> Example:
    picture, pen = _canvas()
    cells = draw.sample(range(4), count)
    things = [(draw.choice(list(COLOURS)), draw.choice(list(SHAPES))) for _ in cells]
    for cell, (colour, shape) in zip(cells, things, strict=True):
        size = draw.randint(18, 22)
        left, top = (start + draw.randint(2, CELL - 3 - size) for start in _corner(cell))
        SHAPES[shape](pen, (left, top, left + size, top + size), COLOURS[colour])
    return Example(f"What is at the {PLACES[cells[0]]}?", " ".join(things[0]), picture)


def area_easy(draw: random.Random) -> Example:
    """The area of a rectangle with sides up to three."""
    return _area(draw, draw.randint(1, 3), draw.randint(1, 3))


def area_hard(draw: random.Random) -> Example:
    """The area of a rectangle with sides from two to six."""
    return _area(draw, draw.randint(2, 6), draw.randint(2, 6))


def _area(draw: random.Random, columns: int, rows: int) -> Example:
    picture, pen = _canvas()
    unit = 8
    left, top = draw.randint(1, SIDE - 2 - columns * unit), draw.randint(1, SIDE - 2 - rows * unit)
    right, bottom = left + columns * unit, top + rows * unit
    pen.rectangle((left, top, right, bottom), fill=COLOURS[draw.choice([name for name in COLOURS if name != "black"])])
    for x in range(left, right + 1, unit):
        pen.line((x, top, x, bottom), fill="black")
    for y in range(top, bottom + 1, unit):
        pen.line((left, y, right, y), fill="black")
    return Example("How many squares has the rectangle?", str(columns * rows), picture)


def bar_easy(draw: random.Random) -> Example:
    """The length of one of three upright bars."""
    return _bar(draw, 3)


def bar_hard(draw: random.Random) -> Example:
    """The length of one of five lying bars."""
    return _bar(draw, 5, lying=True)


def _bar(draw: random.Random, count: int, *, lying: bool = False) -> Example:
    picture, pen = _canvas()
    colours = draw.sample(list(COLOURS), count)
    values = [draw.randint(1, 9) for _ in colours]
    floor, unit, width = SIDE - 4, 5, 50 // count
    for value in range(1, 10):
        pen.line((4, floor - unit * value, SIDE - 2, floor - unit * value), fill=(160, 152, 140))
    for number, (colour, value) in enumerate(zip(colours, values, strict=True)):
        start = 5 + number * width
        pen.rectangle((start, floor - unit * value, start + width - 3, floor), fill=COLOURS[colour])
    pen.line((3, 2, 3, floor, SIDE - 2, floor), fill="black")
    if lying:
        picture = picture.transpose(Image.Transpose.ROTATE_270)
    return Example(f"How long is the {colours[0]} bar?", str(values[0]), picture)


@cache
def _font(size: int) -> ImageFont.ImageFont | ImageFont.FreeTypeFont:
    return ImageFont.load_default(size)


def digits_easy(draw: random.Random) -> Example:
    """A number of one to four digits at the left of one of two rows."""
    return _digits(draw, draw.randint(1, DIGITS_IN_ROW))


def digits_hard(draw: random.Random) -> Example:
    """A number of eight digits, which fill both rows."""
    return _digits(draw, 2 * DIGITS_IN_ROW)


def _digits(draw: random.Random, count: int) -> Example:
    """Digits of half a cell's width, two for each image token, all in white, since colours would take long to learn."""
    picture, pen = _canvas()
    text = "".join(draw.choices("0123456789", k=count))
    first = 0 if count > DIGITS_IN_ROW else draw.choice((0, DIGITS_IN_ROW))
    width = SIDE // DIGITS_IN_ROW
    for number, digit in enumerate(text, first):
        row, column = divmod(number, DIGITS_IN_ROW)
        x = column * width + width // 2 + draw.randint(-1, 1)
        y = row * CELL + CELL // 2 + draw.randint(-1, 1)
        pen.text((x, y), digit, fill="white", font=_font(20), anchor="mm")
    return Example("Read the number.", text, picture)


def box_easy(draw: random.Random) -> Example:
    """The box around a shape that keeps to whole patches."""
    return _box(draw, step=2)


def box_hard(draw: random.Random) -> Example:
    """The box around a shape anywhere on a grid of half patches."""
    return _box(draw, step=1)


def _box(draw: random.Random, *, step: int) -> Example:
    """Left, top, right and bottom in units of 7 pixels, half a patch."""
    picture, pen = _canvas()
    unit = CELL // 4
    width, height = (draw.randrange(2, 5, step) for _ in range(2))
    left, top = draw.randrange(0, 9 - width, step), draw.randrange(0, 9 - height, step)
    right, bottom = left + width, top + height
    colour, shape = draw.choice(list(COLOURS)), draw.choice(list(SHAPES))
    box = (left * unit, top * unit, right * unit - 1, bottom * unit - 1)
    SHAPES[shape](pen, box, COLOURS[colour])
    return Example(f"Where is the {colour} shape?", f"{left},{top},{right},{bottom}", picture)


TASKS = {
    "OCR": Task(digits_easy, digits_hard),
    "VQA": Task(shape_easy, shape_hard),
    "Geometry": Task(area_easy, area_hard),
    "Chart": Task(bar_easy, bar_hard),
    "Grounding": Task(box_easy, box_hard),
}
