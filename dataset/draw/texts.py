"""Things with writing on them: signs, a receipt, a ticket, labels."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from dataset.draw.entry import HEIGHT, WIDTH, Draw, Entry

Line = tuple[int, int, str, str, int, str]
"""Column, row, text, face, size, colour; a column below zero counts from the right edge, where the line then ends."""


@cache
def _font(face: str, size: int) -> ImageFont.FreeTypeFont:
    """A face that comes with matplotlib, so that every machine has it."""
    import matplotlib

    return ImageFont.truetype(str(Path(matplotlib.get_data_path(), "fonts", "ttf", f"DejaVu{face}.ttf")), size)


def _surface(
    lines: Sequence[Line],
    *,
    size: tuple[int, int] = (WIDTH, HEIGHT),
    paper: str = "white",
    ground: str = "#b8b0a0",
    turned: float = 0,
    frame: str | None = None,
) -> Draw:
    """Lines of text on a sheet or sign that lies on a ground, turned by some degrees."""

    def draw() -> Image.Image:
        sheet = Image.new("RGBA", size, paper)
        pen = ImageDraw.Draw(sheet)
        if frame:
            pen.rounded_rectangle((6, 6, size[0] - 7, size[1] - 7), 14, outline=frame, width=5)
        for column, row, text, face, height, colour in lines:
            at, anchor = ((column, row), "la") if column >= 0 else ((size[0] + column, row), "ra")
            pen.text(at, text, fill=colour, font=_font(face, height), anchor=anchor)
        sheet = sheet.rotate(turned, Image.Resampling.BICUBIC, expand=True)
        picture = Image.new("RGB", (WIDTH, HEIGHT), ground)
        picture.paste(sheet, ((WIDTH - sheet.width) // 2, (HEIGHT - sheet.height) // 2), sheet)
        return picture

    return draw


def _column(*texts: str, face: str, size: int, left: int, top: int, colour: str = "#202020") -> list[Line]:
    """Lines under one another."""
    return [(left, top + round(1.35 * size * row), text, face, size, colour) for row, text in enumerate(texts)]


RECEIPT = [
    *_column("BÄCKEREI SOMMER", face="SansMono-Bold", size=18, left=42, top=16),
    *_column("Rye bread 750 g", "2 x Pretzel", "Plum cake", "Coffee to go", "", "TOTAL",
             face="SansMono", size=15, left=18, top=62),
    *[(-18, 62 + 20 * row, price, "SansMono", 15, "#202020")
      for row, price in enumerate(["4.20", "1.90", "3.10", "2.40", "", "11.60"])],
    *_column("Cash 20.00  Change 8.40", "14 Mar 2024  08:17", face="SansMono", size=13, left=18, top=206),
]  # fmt: skip
MENU = [
    *_column("Today's lunch", face="Serif-Bold", size=30, left=90, top=18, colour="#f4f0e0"),
    *_column("Leek soup with croutons", "Risotto with mushrooms", "Trout, potatoes, spinach", "Apple crumble",
             face="Serif-Italic", size=19, left=24, top=86, colour="#f4f0e0"),
    *[(-24, 86 + 26 * row, price, "Serif", 19, "#f0d060")
      for row, price in enumerate(["5.50", "11.00", "14.80", "4.90"])],
    *_column("served from 11:45 to 14:00", face="Serif", size=15, left=110, top=232, colour="#f4f0e0"),
]  # fmt: skip
LABEL = [
    *_column("RASPBERRY JAM", face="Sans-Bold", size=26, left=24, top=20, colour="#a01840"),
    *_column("Ingredients: raspberries, cane sugar,", "lemon juice, pectin.", "May contain traces of nuts.",
             "Keep cool after opening.", face="Sans", size=14, left=24, top=70),
    *_column("Net weight 340 g", "Best before 09/2026", "Lot L2317-B", face="Sans-Bold", size=15, left=24, top=160),
]  # fmt: skip
TICKET = [
    *_column("REGIONAL RAIL", face="Sans-Bold", size=22, left=20, top=16, colour="#103870"),
    *_column("From  Altenburg", "To    Neustadt Hbf", "Date  Fri 07 Jun 2024", "Dep.  16:42   Platform 5",
             face="SansMono", size=17, left=20, top=58),
    *_column("Coach 12  Seat 84 window", face="SansMono-Bold", size=16, left=20, top=164),
    (-20, 20, "23.90 €", "Sans-Bold", 18, "#103870"),
]  # fmt: skip

ENTRIES = [
    Entry("What does the sign say?", _surface(
        _column("CAUTION", face="Sans-Bold", size=52, left=46, top=30)
        + _column("Wet floor.", "Please use the", "other staircase.", face="Sans", size=26, left=48, top=110),
        size=(350, 240), paper="#f8d030", frame="#202020", ground="#90a0a8")),
    Entry("How much was paid for the plum cake, and what was the total?",
          _surface(RECEIPT, size=(290, 260), turned=4, ground="#705038")),
    Entry("Read the licence plate.", _surface(
        _column("KX 4081 RB", face="SansMono-Bold", size=54, left=24, top=22), size=(372, 108), frame="#101010",
        ground="#4a5058", turned=-3)),
    Entry("Which dish costs 11.00?", _surface(MENU, size=(400, 280), paper="#2c3830", ground="#8a6848")),
    Entry("What is the lot number on the jar's label?",
          _surface(LABEL, size=(330, 240), paper="#fdf4ec", ground="#c8c0b0", turned=-5)),
    Entry("Write down the title, the author and the publisher of this book.", _surface(
        _column("The Lighthouse", "at Cape Sorrow", face="Serif-Bold", size=27, left=22, top=44, colour="#f8e8c0")
        + _column("a novel by", "Miriam Oduya", face="Serif-Italic", size=20, left=22, top=150, colour="#e0d0b0")
        + _column("HARBOUR & FINCH", face="Sans", size=14, left=22, top=268, colour="#e0d0b0"),
        size=(280, 310), paper="#243c5c", ground="#d8d0c0")),
    Entry("From which platform and at what time does the train leave?",
          _surface(TICKET, size=(380, 200), paper="#eef4ea", ground="#585048", turned=3)),
    Entry("What time does the display show?", _surface(
        _column("07:35", face="SansMono-Bold", size=96, left=36, top=28, colour="#ff5030")
        + _column("MON 21 OCT   18.5 °C", face="SansMono", size=20, left=52, top=150, colour="#ff5030"),
        size=(360, 200), paper="#140808", ground="#c8b8a8")),
    Entry("To whom is this letter addressed? Give the full address.", _surface(
        [*_column("Dr. Lena Hofbauer", "Am Mühlbach 17", "4820 Bad Ischl", "Austria",
                  face="Serif-Italic", size=21, left=150, top=112, colour="#203060"),
         *_column("PRIORITY", face="Sans-Bold", size=16, left=20, top=20, colour="#b02020")],
        size=(410, 250), paper="#fbf6e8", ground="#786858", turned=-2)),
    Entry("Until what time is the library open on Saturdays?", _surface(
        _column("City Library", face="Sans-Bold", size=28, left=26, top=20, colour="#ffffff")
        + _column("Mon - Wed   9:00 - 18:30", "Thu        13:00 - 20:00", "Fri         9:00 - 17:00",
                  "Sat        10:00 - 14:30", "Sun        closed", face="SansMono", size=17, left=26, top=76,
                  colour="#ffffff"),
        size=(340, 220), paper="#20604c", ground="#b8c4c8", frame="#ffffff")),
]  # fmt: skip
