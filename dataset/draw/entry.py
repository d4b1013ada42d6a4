"""A picture with a question, and how figures become pictures."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from PIL import Image

if TYPE_CHECKING:
    from matplotlib.axes import Axes

WIDTH, HEIGHT = 448, 336
_DOTS_PER_INCH = 100
_COLOURS = 64


Draw = Callable[[], Image.Image]


@dataclass(frozen=True)
class Entry:
    """One calibration entry: what to ask about which picture."""

    question: str
    draw: Draw


def figure(paint: Callable[[Axes], None]) -> Draw:
    """A picture that matplotlib draws; ``paint`` is given its only axes."""

    def draw() -> Image.Image:
        import matplotlib
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        with matplotlib.rc_context(matplotlib.rcParamsDefault | {"font.size": 9}):
            drawn = Figure(figsize=(WIDTH / _DOTS_PER_INCH, HEIGHT / _DOTS_PER_INCH), layout="tight")
            canvas = FigureCanvasAgg(drawn)
            paint(drawn.add_subplot())
            canvas.draw()
            pixels = bytes(canvas.buffer_rgba())
        return Image.frombytes("RGBA", (WIDTH, HEIGHT), pixels).convert("RGB")

    return draw


def png(picture: Image.Image) -> bytes:
    """The bytes of a small PNG: a palette of few colours, nothing but the pixels."""
    written = io.BytesIO()
    palette = picture.quantize(_COLOURS, method=Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE)
    palette.save(written, "PNG", optimize=True)
    return written.getvalue()
