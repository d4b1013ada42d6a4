"""Simple scenes with things at known places, for questions about where and what things are."""

from __future__ import annotations

from collections.abc import Callable

from PIL import Image, ImageDraw

from dataset.draw.entry import HEIGHT, WIDTH, Draw, Entry

# Painted larger and made small, which smooths the edges.
_SCALE = 3
_INK = "#303030"


class _Brush:
    """Shapes in picture coordinates, from a reference point and a factor that each thing is painted with."""

    def __init__(self, picture: Image.Image) -> None:
        self.pen = ImageDraw.Draw(picture)
        self.move(0, 0, 1)

    def move(self, x: float, y: float, factor: float) -> _Brush:
        self.x, self.y, self.factor = x, y, factor
        return self

    def _at(self, *numbers: float) -> list[float]:
        starts = (self.x, self.y) * (len(numbers) // 2)
        return [_SCALE * (start + self.factor * number) for start, number in zip(starts, numbers, strict=True)]

    def box(self, left: float, top: float, right: float, bottom: float, colour: str, *, round_by: float = 0) -> None:
        corners = self._at(left, top, right, bottom)
        self.pen.rounded_rectangle(corners, _SCALE * self.factor * round_by, fill=colour)

    def oval(self, left: float, top: float, right: float, bottom: float, colour: str) -> None:
        self.pen.ellipse(self._at(left, top, right, bottom), fill=colour)

    def polygon(self, *corners: float, colour: str) -> None:
        self.pen.polygon(self._at(*corners), fill=colour)

    def line(self, *points: float, colour: str = _INK, width: float = 3) -> None:
        self.pen.line(self._at(*points), fill=colour, width=round(_SCALE * self.factor * width), joint="curve")


Thing = Callable[[_Brush], None]


def _house(wall: str, roof: str) -> Thing:
    def paint(brush: _Brush) -> None:
        brush.box(0, -60, 100, 0, wall)
        brush.polygon(-10, -60, 50, -105, 110, -60, colour=roof)
        brush.box(40, -38, 60, 0, "#6a4830")
        for left in (10, 70):
            brush.box(left, -46, left + 20, -26, "#c8e4f4")

    return paint


def _tree(crown: str) -> Thing:
    def paint(brush: _Brush) -> None:
        brush.box(-6, -50, 6, 0, "#7a5230")
        for left, top in ((-36, -90), (-4, -90), (-22, -116)):
            brush.oval(left, top, left + 42, top + 48, crown)

    return paint


def _fir(brush: _Brush) -> None:
    brush.box(-5, -16, 5, 0, "#6a4830")
    for top, half in ((-110, 20), (-84, 27), (-56, 34)):
        brush.polygon(0, top, half, top + 46, -half, top + 46, colour="#2c6a44")


def _car(colour: str) -> Thing:
    def paint(brush: _Brush) -> None:
        brush.polygon(22, -34, 36, -56, 78, -56, 94, -34, colour=colour)
        brush.box(0, -36, 116, -10, colour, round_by=8)
        brush.polygon(34, -36, 42, -50, 56, -50, 56, -36, colour="#d8ecf8")
        brush.polygon(60, -36, 60, -50, 75, -50, 85, -36, colour="#d8ecf8")
        for left in (16, 78):
            brush.oval(left, -22, left + 24, 2, _INK)
            brush.oval(left + 7, -15, left + 17, -5, "#b0b0b0")

    return paint


def _bicycle(colour: str) -> Thing:
    def paint(brush: _Brush) -> None:
        for left in (0, 58):
            brush.oval(left, -40, left + 40, 0, _INK)
            brush.oval(left + 4, -36, left + 36, -4, "#d8d8d0")
        brush.line(20, -20, 34, -46, 68, -46, 46, -20, 20, -20, colour=colour, width=4)
        brush.line(46, -20, 32, -54, colour=colour, width=4)
        brush.line(78, -20, 66, -60, 76, -62, colour=colour, width=4)
        brush.line(24, -55, 42, -55, width=5)

    return paint


def _boat(hull: str, sail: str) -> Thing:
    def paint(brush: _Brush) -> None:
        brush.polygon(0, -18, 90, -18, 76, 4, 14, 4, colour=hull)
        brush.line(44, -18, 44, -92)
        brush.polygon(48, -90, 48, -24, 84, -24, colour=sail)
        brush.polygon(40, -80, 40, -24, 14, -24, colour="#f4f4f0")

    return paint


def _ball(colour: str) -> Thing:
    def paint(brush: _Brush) -> None:
        brush.oval(0, -30, 30, 0, colour)
        brush.oval(6, -26, 14, -18, "#ffffff")

    return paint


def _cat(fur: str) -> Thing:
    def paint(brush: _Brush) -> None:
        brush.line(52, -8, 70, -16, 72, -36, colour=fur, width=7)
        brush.oval(8, -44, 58, 0, fur)
        brush.oval(0, -66, 36, -32, fur)
        brush.polygon(3, -54, 4, -76, 17, -63, colour=fur)
        brush.polygon(20, -63, 33, -76, 34, -54, colour=fur)
        for left in (9, 22):
            brush.oval(left, -55, left + 6, -47, "#d8f080")
            brush.oval(left + 2, -54, left + 4, -48, _INK)

    return paint


def _cup(colour: str) -> Thing:
    def paint(brush: _Brush) -> None:
        brush.oval(22, -32, 46, -8, colour)
        brush.oval(28, -26, 40, -14, "#f4ece0")
        brush.box(0, -38, 34, 0, colour, round_by=5)

    return paint


def _lamp(shade: str) -> Thing:
    def paint(brush: _Brush) -> None:
        brush.line(25, -4, 25, -60, width=4)
        brush.box(8, -6, 42, 0, _INK, round_by=3)
        brush.polygon(12, -92, 38, -92, 52, -56, -2, -56, colour=shade)

    return paint


def _book(cover: str) -> Thing:
    def paint(brush: _Brush) -> None:
        brush.box(0, -14, 64, 0, cover, round_by=2)
        brush.box(4, -11, 64, -3, "#f8f4e8")

    return paint


def _plant(pot: str) -> Thing:
    def paint(brush: _Brush) -> None:
        for top in ((-8, -66), (20, -82), (46, -64), (6, -78), (36, -78)):
            brush.line(20, -24, *top, colour="#3c8a48", width=7)
        brush.polygon(2, -28, 38, -28, 32, 0, 8, 0, colour=pot)

    return paint


def _table(colour: str) -> Thing:
    def paint(brush: _Brush) -> None:
        brush.box(0, -80, 240, -68, colour, round_by=3)
        for left in (14, 214):
            brush.box(left, -68, left + 12, 0, colour)

    return paint


def _chair(colour: str) -> Thing:
    def paint(brush: _Brush) -> None:
        brush.box(0, -110, 9, 0, colour)
        brush.box(0, -104, 14, -62, colour, round_by=4)
        brush.box(0, -54, 58, -44, colour, round_by=3)
        brush.box(49, -46, 58, 0, colour)

    return paint


def _window(brush: _Brush) -> None:
    brush.box(0, -100, 90, 0, "#f8f8f4")
    brush.box(6, -94, 42, -6, "#a8d4f0")
    brush.box(48, -94, 84, -6, "#a8d4f0")


def _bird(colour: str) -> Thing:
    def paint(brush: _Brush) -> None:
        brush.line(0, -10, 14, -20, 25, -6, 36, -20, 50, -10, colour=colour, width=4)

    return paint


def _sun(brush: _Brush) -> None:
    brush.oval(-26, -26, 26, 26, "#f8d040")


def _scene(ground: tuple[str, str, int], *things: tuple[float, float, float, Thing]) -> Draw:
    """A picture of things at ``(x, y, factor)``, y being where they stand, before a wall or sky over a floor."""

    def draw() -> Image.Image:
        upper, lower, horizon = ground
        picture = Image.new("RGB", (_SCALE * WIDTH, _SCALE * HEIGHT), upper)
        brush = _Brush(picture)
        brush.box(0, horizon, WIDTH, HEIGHT, lower)
        for x, y, factor, paint in things:
            paint(brush.move(x, y, factor))
        return picture.resize((WIDTH, HEIGHT), Image.Resampling.LANCZOS)

    return draw


_MEADOW, _LAKE, _ROOM = ("#bcdcf4", "#8cc070", 210), ("#cfe4f4", "#5c94c0", 190), ("#ece4d4", "#b08c68", 250)
_STREET = ("#c4dcf0", "#888c90", 246)
_FARM = _scene(
    _MEADOW,
    (390, 50, 1, _sun),
    (40, 236, 1.2, _house("#e8d8b8", "#a84030")),
    (230, 230, 1, _tree("#4c9448")),
    (330, 250, 1.2, _tree("#78a838")),
    (190, 310, 1, _cat("#505050")),
)
_ROAD = _scene(
    _STREET,
    (10, 246, 1.3, _house("#d8c0a0", "#584038")),
    (170, 246, 1.2, _house("#a8c0d0", "#803028")),
    (350, 246, 1.2, _fir),
    (30, 316, 1.1, _car("#c83030")),
    (240, 320, 1.2, _car("#3060b0")),
)
_SHORE = _scene(
    _LAKE,
    (60, 52, 0.9, _sun),
    (40, 226, 1, _boat("#8c4830", "#d84040")),
    (180, 268, 1.4, _boat("#304878", "#f0c040")),
    (352, 216, 0.7, _boat("#486850", "#60a0d0")),
    (230, 60, 1, _bird("#404040")),
    (300, 90, 0.8, _bird("#404040")),
)
_STUDY = _scene(
    _ROOM,
    (300, 150, 1.2, _window),
    (60, 316, 1.3, _table("#7a5030")),
    (90, 212, 1, _lamp("#e8b040")),
    (190, 212, 1, _book("#a03048")),
    (290, 212, 0.9, _cup("#3878a8")),
    (376, 320, 1.2, _chair("#50402c")),
)
_CORNER = _scene(
    _ROOM,
    (40, 150, 1.2, _window),
    (210, 300, 1.6, _plant("#b86038")),
    (330, 300, 1.2, _chair("#385878")),
    (30, 310, 1.2, _cat("#d08840")),
    (130, 320, 1, _ball("#c83838")),
)
_PARK = _scene(
    _MEADOW,
    (60, 240, 1.3, _tree("#3c8448")),
    (160, 300, 1.2, _bicycle("#c03838")),
    (310, 290, 1.1, _bicycle("#3060a8")),
    (400, 232, 1, _fir),
    (60, 318, 1, _ball("#f0a030")),
)
_CUPS = _scene(
    _ROOM,
    (20, 330, 1.7, _table("#8c6848")),
    (60, 194, 1.1, _cup("#c84040")),
    (150, 194, 0.8, _cup("#40884c")),
    (230, 194, 1.3, _cup("#4868b0")),
    (340, 194, 1, _plant("#d0a050")),
)
_YARD = _scene(
    _MEADOW,
    (280, 240, 1.3, _house("#f0e8d8", "#486078")),
    (40, 250, 1.1, _fir),
    (120, 236, 0.9, _fir),
    (60, 312, 1.2, _car("#e0b030")),
    (240, 318, 0.9, _cat("#f0ece4")),
    (320, 316, 0.8, _ball("#4068c0")),
)
_HARBOUR = _scene(
    _LAKE,
    (330, 196, 1, _house("#d8d0c0", "#904838")),
    (20, 196, 0.9, _house("#c0c8b0", "#505c68")),
    (210, 196, 0.9, _tree("#58905c")),
    (60, 300, 1.5, _boat("#6c3840", "#f4f0e0")),
    (280, 306, 1.2, _boat("#386070", "#e07838")),
)
_SHELF = _scene(
    _ROOM,
    (30, 240, 1.6, _table("#6c4c34")),
    (60, 112, 1, _book("#384c80")),
    (60, 98, 0.9, _book("#c8a038")),
    (60, 85, 0.8, _book("#a03840")),
    (190, 112, 1, _plant("#88583c")),
    (320, 112, 1.1, _lamp("#80b0a0")),
    (150, 322, 1.3, _cat("#303030")),
)

_PLEASE = "Please provide the bounding box coordinate of the region this sentence describes: "
GROUNDING = [
    Entry(_PLEASE + "the tree farthest to the right.", _FARM),
    Entry(_PLEASE + "the blue car.", _ROAD),
    Entry(_PLEASE + "the sailing boat with the yellow sail.", _SHORE),
    Entry(_PLEASE + "the cup on the table.", _STUDY),
    Entry(_PLEASE + "the cat under the window.", _CORNER),
    Entry(_PLEASE + "the red bicycle beside the tree.", _PARK),
    Entry(_PLEASE + "the smallest cup.", _CUPS),
    Entry(_PLEASE + "the white cat in front of the house.", _YARD),
    Entry(_PLEASE + "the house on the left.", _HARBOUR),
    Entry(_PLEASE + "the green lamp.", _SHELF),
]
QUESTIONS = [
    Entry("What colour is the roof of the house?", _FARM),
    Entry("How many cars are on the street, and what colours are they?", _ROAD),
    Entry("What is flying in the sky?", _SHORE),
    Entry("What lies on the table between the lamp and the cup?", _STUDY),
    Entry("Is the ball closer to the cat or to the chair?", _CORNER),
    Entry("How many bicycles are there in the park?", _PARK),
    Entry("What stands to the right of the cups?", _CUPS),
    Entry("Describe what you see in front of the house.", _YARD),
    Entry("Which of the two boats has an orange sail?", _HARBOUR),
    Entry("What animal is under the table?", _SHELF),
]
