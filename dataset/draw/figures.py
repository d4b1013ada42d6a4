"""Figures as geometry exercises have them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from dataset.draw.entry import Entry, figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Point = tuple[float, float]
INK = "#202020"


def _plain(axes: Axes, width: float, height: float) -> None:
    axes.set(xlim=(-0.08 * width, 1.08 * width), ylim=(-0.12 * height, 1.12 * height), aspect="equal")
    axes.axis("off")


def _outline(axes: Axes, corners: Sequence[Point], names: str = "", fill: str = "none") -> None:
    """A polygon with its corners named, each name away from the middle."""
    from matplotlib.patches import Polygon

    axes.add_patch(Polygon(list(corners), facecolor=fill, edgecolor=INK, linewidth=1.6))
    middle = [sum(values) / len(corners) for values in zip(*corners, strict=True)]
    for name, corner in zip(names, corners, strict=False):
        x, y = (at + 0.1 * (at - centre) for at, centre in zip(corner, middle, strict=True))
        axes.text(x, y, name, ha="center", va="center", fontsize=11, style="italic")


def _write(axes: Axes, at: Point, text: str) -> None:
    axes.text(*at, text, ha="center", va="center", fontsize=11)


def _angle(axes: Axes, at: Point, start: float, stop: float, radius: float, text: str) -> None:
    """An arc from one direction to another, in degrees, with its name inside."""
    from matplotlib.patches import Arc

    axes.add_patch(Arc(at, 2 * radius, 2 * radius, theta1=start, theta2=stop, color="#b03030", linewidth=1.4))
    middle = math.radians((start + stop) / 2)
    _write(axes, (at[0] + 1.75 * radius * math.cos(middle), at[1] + 1.75 * radius * math.sin(middle)), text)


def _right_angle(axes: Axes, at: Point, size: float, across: int = 1) -> None:
    axes.plot([at[0] + across * size] * 2, [at[1], at[1] + size], color=INK, linewidth=1)
    axes.plot([at[0], at[0] + across * size], [at[1] + size] * 2, color=INK, linewidth=1)


def right_triangle(axes: Axes) -> None:
    """Two legs given, the hypotenuse asked."""
    _outline(axes, [(0, 0), (12, 0), (0, 5)], "CAB", "#e8f0f8")
    _right_angle(axes, (0, 0), 0.6)
    _write(axes, (6, -0.6), "12 cm")
    _write(axes, (-1, 2.3), "5 cm")
    _write(axes, (6.6, 3.1), "x")
    _plain(axes, 12, 5)


def isosceles_triangle(axes: Axes) -> None:
    """Equal sides, one angle at the base given."""
    height = 3 * math.tan(math.radians(70))
    _outline(axes, [(0, 0), (6, 0), (3, height)], "ABC")
    for x, y, lean in ((1.5, height / 2, 1), (4.5, height / 2, -1)):
        axes.plot([x - 0.25, x + 0.25], [y + 0.12 * lean, y - 0.12 * lean], color=INK)
    _angle(axes, (0, 0), 0, 70, 0.9, "70°")
    _angle(axes, (3, height), 250, 290, 1.2, "?")
    _plain(axes, 6, height)


def circle_radius(axes: Axes) -> None:
    """A circle in a square."""
    from matplotlib.patches import Circle

    _outline(axes, [(0, 0), (8, 0), (8, 8), (0, 8)], "", "#f4e8d0")
    axes.add_patch(Circle((4, 4), 4, facecolor="white", edgecolor=INK, linewidth=1.6))
    axes.plot([4, 8], [4, 4], color="#3050b0")
    axes.plot([4], [4], "o", color=INK, markersize=4)
    _write(axes, (6, 4.5), "r = 4")
    _plain(axes, 8, 8)


def inscribed_angle(axes: Axes) -> None:
    """The angle at the centre given, the one on the circle asked."""
    from matplotlib.patches import Circle

    places = {name: math.radians(angle) for name, angle in {"A": 220, "B": 320, "C": 80}.items()}
    points = {name: (3 + 3 * math.cos(angle), 3 + 3 * math.sin(angle)) for name, angle in places.items()}
    axes.add_patch(Circle((3, 3), 3, facecolor="none", edgecolor=INK, linewidth=1.6))
    for start in ((3, 3), points["C"]):
        for stop in (points["A"], points["B"]):
            axes.plot([start[0], stop[0]], [start[1], stop[1]], color=INK)
    for name, angle in places.items():
        _write(axes, (3 + 3.35 * math.cos(angle), 3 + 3.35 * math.sin(angle)), name)
    _write(axes, (3, 3.3), "O")
    _angle(axes, (3, 3), 220, 320, 0.6, "100°")
    _plain(axes, 6, 6)


def trapezium(axes: Axes) -> None:
    """Parallel sides and height given."""
    _outline(axes, [(0, 0), (10, 0), (7.5, 4), (2, 4)], "ABCD", "#e4f2e4")
    axes.plot([2, 2], [0, 4], "--", color="#3050b0")
    _right_angle(axes, (2, 0), 0.45)
    for at, text in (((5, -0.5), "10 m"), ((4.8, 4.4), "5.5 m"), ((2.7, 2), "4 m")):
        _write(axes, at, text)
    _plain(axes, 10, 4)


def parallel_lines(axes: Axes) -> None:
    """Two parallel lines cut by a third."""
    for y, name in ((1, "g"), (3, "h")):
        axes.plot([0, 8], [y, y], color=INK)
        _write(axes, (8.3, y), name)
    axes.plot([2.2, 5.8], [0, 4.11], color=INK)
    slope = math.degrees(math.atan2(4.11, 3.6))
    low, high = 2.2 + 3.6 / 4.11, 2.2 + 3 * 3.6 / 4.11
    _angle(axes, (low, 1), 0, slope, 0.45, "49°")
    _angle(axes, (high, 3), slope, 180, 0.4, r"$\beta$")
    _plain(axes, 8, 4)


def similar_triangles(axes: Axes) -> None:
    """A pole, a tree and their shadows."""
    _outline(axes, [(0, 0), (12, 0), (12, 6)])
    axes.plot([4, 4], [0, 2], color="#b03030", linewidth=2.5)
    axes.plot([12, 12], [0, 6], color="#308030", linewidth=3.5)
    _right_angle(axes, (12, 0), 0.45, -1)
    for at, text in (((2, -0.6), "4 m"), ((8, -0.6), "8 m"), ((4.7, 1), "2 m"), ((11.3, 3), "h")):
        _write(axes, at, text)
    _plain(axes, 12, 6)


def coordinates(axes: Axes) -> None:
    """A triangle on squared paper."""
    _outline(axes, [(1, 1), (7, 2), (3, 6)], "PQR", "#e8e0f4")
    axes.set(xlim=(0, 8), ylim=(0, 7), aspect="equal", xticks=range(9), yticks=range(8), xlabel="x", ylabel="y")
    axes.grid(alpha=0.5)


def cylinder(axes: Axes) -> None:
    """A can with its measures."""
    from matplotlib.patches import Arc, Ellipse, Rectangle

    axes.add_patch(Rectangle((1, 1), 6, 5, facecolor="#dce8f0", edgecolor="none"))
    axes.add_patch(Ellipse((4, 1), 6, 1.6, facecolor="#dce8f0", edgecolor="none"))
    axes.add_patch(Ellipse((4, 6), 6, 1.6, facecolor="#f0f6fa", edgecolor=INK, linewidth=1.6))
    axes.add_patch(Arc((4, 1), 6, 1.6, theta1=180, theta2=360, edgecolor=INK, linewidth=1.6))
    axes.add_patch(Arc((4, 1), 6, 1.6, theta1=0, theta2=180, edgecolor=INK, linestyle="--"))
    for x in (1, 7):
        axes.plot([x, x], [1, 6], color=INK, linewidth=1.6)
    axes.plot([4, 7], [6, 6], color="#3050b0")
    _write(axes, (5.4, 6.35), "3 cm")
    _write(axes, (7.8, 3.5), "5 cm")
    _plain(axes, 8, 7)


def hexagon(axes: Axes) -> None:
    """A regular polygon with one angle asked."""
    corners = [
        (3 + 3 * math.cos(math.radians(60 * corner)), 3 + 3 * math.sin(math.radians(60 * corner)))
        for corner in range(6)
    ]
    _outline(axes, corners, "ABCDEF", "#fdf0d8")
    axes.plot([corners[0][0], corners[2][0]], [corners[0][1], corners[2][1]], "--", color="#3050b0")
    _angle(axes, corners[1], 180, 300, 0.45, r"$\alpha$")
    _write(axes, (3, 0.1), "6 cm")
    _plain(axes, 6, 6)


ENTRIES = [
    Entry("How long is the side x of the right triangle?", figure(right_triangle)),
    Entry("The two marked sides are equal. How large is the angle at C?", figure(isosceles_triangle)),
    Entry("Find the area of the coloured region between the square and the circle.", figure(circle_radius)),
    Entry("O is the centre of the circle. Find the angle ACB.", figure(inscribed_angle)),
    Entry("What is the area of the trapezium ABCD?", figure(trapezium)),
    Entry("The lines g and h are parallel. What is the angle β?", figure(parallel_lines)),
    Entry("A pole of 2 m and a tree cast shadows that end in the same point. How tall is the tree?",
          figure(similar_triangles)),
    Entry("Read off the coordinates of P, Q and R and compute the area of the triangle.", figure(coordinates)),
    Entry("What is the volume of this cylinder? Give it in terms of π.", figure(cylinder)),
    Entry("ABCDEF is a regular hexagon. How large is the angle at B, and why?", figure(hexagon)),
]  # fmt: skip
