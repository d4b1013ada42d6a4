"""Tiles of awkward pictures against the published rules."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from expert_merging.questions.pictures import read_picture
from InternVL.images import Tiling, grid, pixel_values, tiles
from tests.InternVL import reference
from tests.internvl import make_picture

PUBLISHED = Tiling(size=448, dynamic=True, thumbnail=True)
SIDES = st.integers(1, 5000)


@given(width=SIDES, height=SIDES, most=st.integers(1, 40), size=st.sampled_from([28, 448]))
def test_grid_is_the_published_one(width, height, most, size):
    tiling = Tiling(size, dynamic=True, thumbnail=True)
    assert grid(width, height, tiling, most) == reference.closest_grid(width, height, most, size)


@pytest.mark.parametrize(
    ("size", "most", "expected"),
    [
        ((448, 448), 6, (1, 1)),
        ((800, 800), 6, (2, 2)),  # the same ratio; more than half of four tiles' pixels
        ((600, 600), 6, (1, 1)),  # less than half of them
        ((1000, 500), 12, (2, 1)),
        ((1920, 1080), 12, (4, 2)),
        ((1920, 1080), 6, (2, 1)),
        ((5000, 1), 6, (6, 1)),
        ((1, 5000), 12, (1, 12)),
        ((1, 1), 12, (1, 1)),
    ],
)
def test_grids_worked_out_by_hand(size, most, expected):
    assert grid(*size, PUBLISHED, most) == expected


def settings(tiling: Tiling) -> dict[str, object]:
    return {
        "force_image_size": tiling.size,
        "dynamic_image_size": tiling.dynamic,
        "use_thumbnail": tiling.thumbnail,
    }


@pytest.mark.parametrize("size", [(1, 1), (1, 5000), (5000, 1), (37, 100), (448, 448), (1300, 900)])
@pytest.mark.parametrize(("dynamic", "thumbnail"), [*itertools.product([True, False], repeat=2)])
def test_pixels_are_the_published_ones(size, dynamic, thumbnail, tmp_path):
    image = read_picture(make_picture(tmp_path / "a.png", size))
    tiling = Tiling(448, dynamic, thumbnail)
    ours = pixel_values(image, tiling, 6)
    torch.testing.assert_close(ours, reference.pixel_values(image, settings(tiling), 6), rtol=0, atol=1e-6)
    assert ours.dtype == torch.float32


def test_thumbnail_comes_last_and_only_beside_several_tiles(tmp_path):
    image = read_picture(make_picture(tmp_path / "a.png", (900, 448)))
    cut = tiles(image, PUBLISHED, 6)
    assert len(cut) == 3
    assert cut[-1].tobytes() == image.resize((448, 448), Image.Resampling.BICUBIC).tobytes()
    assert len(tiles(image, PUBLISHED, 1)) == 1
