"""Questions in text whose right answers are known: sums, letters by position, letters without repetition.

Each task has an easy and a hard version under the same tag.
"""

from __future__ import annotations

import random
import string

from zoo.tasks import Example

TAGS = ("<uni>", "<add>", "<idx>")


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
