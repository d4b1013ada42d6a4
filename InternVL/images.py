"""Pictures as InternVL reads them: square tiles of 448 pixels, as many as fit the picture's shape, with Pillow alone.

Steps and numbers are those of the published inference code, down to the resizing filter.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_DEVIATION = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Tiling:
    """How a checkpoint wants its pictures.

    Args:
        size: side of a tile in pixels.
        dynamic: several tiles for a picture; otherwise the whole picture is one.
        thumbnail: the whole picture as one more tile where there are several.
    """

    size: int
    dynamic: bool
    thumbnail: bool


def grid(width: int, height: int, tiling: Tiling, most: int) -> tuple[int, int]:
    """Columns and rows of tiles for a picture: the aspect ratio closest to its own.

    Among grids of the same ratio the larger one is taken if the picture has more than half of its pixels.

    Args:
        width: of the picture, in pixels.
        height: of the picture, in pixels.
        tiling: the checkpoint's settings.
        most: largest number of tiles.
    """
    grids = [(columns, rows) for columns in range(1, most + 1) for rows in range(1, most // columns + 1)]
    ratio = width / height
    best, best_distance = (1, 1), float("inf")
    for columns, rows in sorted(grids, key=lambda shape: shape[0] * shape[1]):
        distance = abs(ratio - columns / rows)
        covers = width * height > 0.5 * tiling.size**2 * columns * rows
        if distance < best_distance or (distance == best_distance and covers):
            best, best_distance = (columns, rows), distance
    return best


def tiles(image: Image.Image, tiling: Tiling, most: int) -> list[Image.Image]:
    """The picture cut into square tiles, row by row, then the thumbnail."""
    from PIL import Image

    size = tiling.size
    columns, rows = grid(*image.size, tiling, most) if tiling.dynamic else (1, 1)
    resized = image.resize((columns * size, rows * size), Image.Resampling.BICUBIC)
    cut = [
        resized.crop((column * size, row * size, (column + 1) * size, (row + 1) * size))
        for row in range(rows)
        for column in range(columns)
    ]
    if tiling.thumbnail and len(cut) > 1:
        cut.append(image.resize((size, size), Image.Resampling.BICUBIC))
    return cut


def pixel_values(image: Image.Image, tiling: Tiling, most: int) -> Tensor:
    """Normalised tiles, ``(tiles, 3, size, size)`` float32.

    Args:
        image: an RGB picture.
        tiling: the checkpoint's settings.
        most: largest number of tiles, the thumbnail not counted.
    """
    import numpy
    import torch

    stacked = numpy.stack([numpy.asarray(tile) for tile in tiles(image, tiling, most)])
    values = torch.from_numpy(stacked).permute(0, 3, 1, 2).float() / 255
    mean, deviation = torch.tensor(IMAGENET_MEAN), torch.tensor(IMAGENET_DEVIATION)
    return (values - mean[:, None, None]) / deviation[:, None, None]
