"""The published rules for pictures and positions, written plainly: what the family's inputs must equal."""

from __future__ import annotations

import math

import torch
from PIL import Image

from tests.qwen2vl import CHARACTERS, PREPROCESSOR, SPECIAL

PATCH, SIDE = 14, 28  # a token stands for SIDE x SIDE pixels: 2 x 2 patches


def picture_size(width: int, height: int, low: int = 3136, high: int = 12845056) -> tuple[int, int]:
    """Width and height after resizing: multiples of 28 of about the same shape, with an area within the bounds."""
    columns, rows = SIDE * round(width / SIDE), SIDE * round(height / SIDE)
    if columns * rows > high:
        shrink = math.sqrt(width * height / high)
        columns = max(SIDE, SIDE * math.floor(width / shrink / SIDE))
        rows = max(SIDE, SIDE * math.floor(height / shrink / SIDE))
    elif columns * rows < low:
        grow = math.sqrt(low / (width * height))
        columns, rows = SIDE * math.ceil(width * grow / SIDE), SIDE * math.ceil(height * grow / SIDE)
    return columns, rows


def patches(picture: Image.Image, low: int = 3136, high: int = 12845056) -> tuple[torch.Tensor, list[int]]:
    """Pixels of every patch, the four of a token one after the other, and the grid of patches."""
    size = picture_size(*picture.size, low, high)
    resized = picture.resize(size, Image.Resampling.BICUBIC)
    columns, rows = size[0] // PATCH, size[1] // PATCH
    table = []
    for token_row in range(rows // 2):
        for token_column in range(columns // 2):
            for row in (2 * token_row, 2 * token_row + 1):
                for column in (2 * token_column, 2 * token_column + 1):
                    table.append(_patch(resized, column, row))
    return torch.stack(table), [1, rows, columns]


def _patch(picture: Image.Image, column: int, row: int) -> torch.Tensor:
    """One patch, colour by colour; each colour twice, since a still picture is two equal moments of a video."""
    box = (column * PATCH, row * PATCH, (column + 1) * PATCH, (row + 1) * PATCH)
    values = []
    for colour, channel in enumerate(picture.crop(box).split()):
        mean, deviation = PREPROCESSOR["image_mean"][colour], PREPROCESSOR["image_std"][colour]
        numbers = [(value / 255 - mean) / deviation for value in channel.tobytes()]
        values += numbers * 2
    return torch.tensor(values)


def tokens(text: str) -> list[int]:
    """Token ids: one for each special token, one for each other character."""
    ids = []
    while text:
        special = next((token for token in SPECIAL if text.startswith(token)), text[0])
        ids.append(CHARACTERS.index(special))
        text = text[len(special) :]
    return ids


def chat(*parts: str | tuple[int, int]) -> str:
    """Prompt of texts and pictures, the latter given by their columns and rows of tokens."""
    content = "".join(
        part if isinstance(part, str) else f"<|vision_start|>{'<|image_pad|>' * (part[0] * part[1])}<|vision_end|>"
        for part in parts
    )
    return f"<|im_start|>user\n{content}<|im_end|>\n<|im_start|>assistant\n"


def positions(ids: list[int], grids: list[list[int]]) -> torch.Tensor:
    """Time, height and width of every token, ``(3, tokens)``.

    A text token is one further than the largest position before it, in all three. A picture's tokens share one time and
    count rows and columns from there.
    """
    picture = SPECIAL.index("<|image_pad|>")
    found: list[tuple[int, int, int]] = []
    remaining = iter(grids)
    while len(found) < len(ids):
        start = max((max(position) for position in found), default=-1) + 1
        if ids[len(found)] != picture:
            found.append((start, start, start))
            continue
        _, rows, columns = next(remaining)
        found += [(start, start + row, start + column) for row in range(rows // 2) for column in range(columns // 2)]
    return torch.tensor(found).T
